"""A small residual network (He et al. 2016, arXiv 1603.05027) that turns a scan into one logit."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import GroupNorm32, zero_module

GROUPS = 8  # of each group normalisation
DROPOUT = 0.5  # of the pooled features


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution twice, beside the input itself; `stride` 2 halves the sides, rounded up."""

    def __init__(self, channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.layers = nn.Sequential(
            GroupNorm32(GROUPS, channels), nn.SiLU(), nn.Conv2d(channels, out_channels, 3, stride, 1),
            GroupNorm32(GROUPS, out_channels), nn.SiLU(), zero_module(nn.Conv2d(out_channels, out_channels, 3, 1, 1)))
        self.skip = nn.Conv2d(channels, out_channels, 1) if channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x, 2, ceil_mode=True) if self.stride == 2 else x
        return self.skip(pooled) + self.layers(x)


class PresenceNetwork(nn.Module):
    """Five blocks at a half, a quarter and an eighth of the resolution; the mean and the maximum of their features over
    the scan, with dropout, decide.

    :param image_channels: of the scan.
    :param channels: of the first blocks, a multiple of 8; the next have twice, the last four times as many.
    """

    def __init__(self, image_channels: int, channels: int = 32):
        super().__init__()
        wide, widest = 2 * channels, 4 * channels
        self.blocks = nn.Sequential(
            nn.PixelUnshuffle(2), nn.Conv2d(4 * image_channels, channels, 3, 1, 1), ResidualBlock(channels, channels),
            ResidualBlock(channels, wide, 2), ResidualBlock(wide, wide), ResidualBlock(wide, widest, 2),
            ResidualBlock(widest, widest), GroupNorm32(GROUPS, widest), nn.SiLU())
        self.dropout = nn.Dropout(DROPOUT)
        self.out = zero_module(nn.Linear(2 * widest, 1))

    def forward(self, image: Tensor) -> Tensor:
        """Scans [N, C, H, W] in [0, 1] with even sides -> logits [N] float32."""
        x = self.blocks(4 * image - 2)
        return self.out(self.dropout(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))).float()[:, 0]
