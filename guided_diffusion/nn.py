"""Small pieces that networks and losses share."""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import logger


class GroupNorm32(nn.GroupNorm):
    """Group normalisation in the dtype of its input, under autocast as well; the kernels take the statistics of 16-bit
    inputs in float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if x.is_cuda or x.dtype.itemsize > 2:  # on a CPU, the kernel takes float32 weights beside a 16-bit input
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        whole = torch.autocast("cuda", enabled=False) if x.is_cuda else contextlib.nullcontext()
        with whole:  # autocast would widen the whole feature map
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


class SiLU(nn.SiLU):
    """x sigmoid(x), written over x where no gradient needs that: only for behind a layer that makes a new output."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, inplace=not torch.is_grad_enabled())


def normalization(channels: int) -> GroupNorm32:
    """The U-Net's norm layer: 32 groups over `channels` (a multiple of 32)."""
    return GroupNorm32(32, channels)


def zero_module(module: nn.Module) -> nn.Module:
    """Set every parameter of `module` to zero and return it, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def relu_convolutions(channels: int, filters: int, count: int) -> list[nn.Module]:
    """So many 3 x 3 convolutions from `channels` to `filters`, each with a ReLU behind it."""
    layers: list[nn.Module] = []
    for _ in range(count):
        layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU()]
        channels = filters
    return layers


def initialise_for_relu(network: nn.Module) -> None:
    """Initialise convolutions as the Probabilistic U-Net does: He et al. 2015 (arXiv 1502.01852), biases near 0."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.trunc_normal_(layer.bias, std=0.001)


def mean_flat(x: Tensor) -> Tensor:
    """Mean over all but the batch axis: [N, ...] -> [N]."""
    return x.flatten(1).mean(1)


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
    """Sinusoidal embedding of timesteps (Vaswani et al. 2017, section 3.5).

    timesteps: [N], may be fractional. Returns [N, dim] float32: cosines in the first half, sines in the second,
    at frequencies from 1 down to 1 / max_period; an odd `dim` is padded with a zero.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, device=timesteps.device))
    angles = timesteps.float()[:, None] * frequencies  # [N, half]
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))


@torch.no_grad()
def update_ema(target: list[Tensor], source: list[Tensor], rate: float) -> None:
    """target <- rate * target + (1 - rate) * source, for two equally long lists of parameters."""
    torch._foreach_lerp_(target, source, 1 - rate)


def compile_network(network: nn.Module, device: torch.device, **options: Any) -> None:
    """Compile a network in place for inputs of fixed shapes; where no compiler works, log that and leave it as it is.

    :param options: of torch.compile.
    """
    try:
        torch.compile(torch.nn.SiLU())(torch.zeros(8, device=device))
    except Exception as error:  # almost anything
        logger.log(f"--compile: goes on without, since no compiler works here"
                   f" ({type(error).__name__}: {str(error).strip().splitlines()[0]})")
        return
    torch._dynamo.config.suppress_errors = True  # a part that cannot be compiled runs as it is
    network.compile(dynamic=False, **options)
    logger.log("--compile: the first pass compiles the network, which takes minutes on a CPU")
