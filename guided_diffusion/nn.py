"""Small pieces that networks and losses share."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class GroupNorm32(nn.GroupNorm):
    """Group normalisation with statistics in float32, whatever the dtype of the input (float64 stays float64)."""

    def forward(self, x):
        wide = x if x.dtype == torch.float64 else x.float()
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return F.group_norm(wide, self.num_groups, weight, bias, self.eps).to(x.dtype)


def normalization(channels):
    """The U-Net's norm layer: 32 groups over `channels` (a multiple of 32)."""
    return GroupNorm32(32, channels)


def zero_module(module):
    """Set every parameter of `module` to zero and return it, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def mean_flat(x):
    """Mean over all but the batch axis: [N, ...] -> [N]."""
    return x.flatten(1).mean(1)


def timestep_embedding(timesteps, dim, max_period=10000):
    """Sinusoidal embedding of timesteps (Vaswani et al. 2017, section 3.5).

    timesteps: [N], may be fractional. Returns [N, dim] float32: cosines in the first half, sines in the second,
    at frequencies from 1 down to 1 / max_period; an odd `dim` is padded with a zero.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=timesteps.device))
    angles = timesteps.float()[:, None] * frequencies  # [N, half]
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


@torch.no_grad()
def update_ema(target, source, rate):
    """target <- rate * target + (1 - rate) * source, for two equally long lists of parameters."""
    torch._foreach_mul_(target, rate)
    torch._foreach_add_(target, source, alpha=1 - rate)
