"""The U-Net of the Probabilistic U-Net (Kohl et al. 2018, arXiv 1806.05034): plain convolutions without norms."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn import initialise_for_relu, relu_convolutions
from ..system.errors import InputError
from ..system.flag import Flag, parse_filters
from . import NETWORKS

FLAGS = [
    Flag("conv_unet_filters", str, "32,64,128,192", "filters of each level of conv_unet", "model"),
    Flag("conv_unet_convs", int, 3, "convolutions a level of conv_unet, on the way down and up each", "model", least=1,
         most=1024),
]


class ConvUNet(nn.Module):
    """Blocks of 3 x 3 convolutions with ReLU, average pooling on the way down, bilinear interpolation on the way up.

    A last 1 x 1 convolution brings the features of the finest level to `out_channels`. Sides may be of any length.

    :param filters: of each level; convs: convolutions of each block.
    """

    def __init__(self, in_channels: int, out_channels: int, filters: Sequence[int] = (32, 64, 128, 192),
                 convs: int = 3):
        super().__init__()
        channels = [in_channels, *filters]
        self.down = nn.ModuleList(nn.Sequential(*relu_convolutions(above, here, convs))
                                  for above, here in zip(channels, filters))
        self.up = nn.ModuleList(nn.Sequential(*relu_convolutions(here + below, here, convs))
                                for here, below in reversed([*zip(filters, filters[1:])]))
        self.out = nn.Conv2d(filters[0], out_channels, 1)
        initialise_for_relu(self)

    def forward(self, x: Tensor, timesteps: Tensor, image: Tensor) -> Tensor:
        """image: [N, C, H, W] in [0, 1] -> [N, out_channels, H, W]. x, [N, 0, H, W], and timesteps are there for the
        call to be that of all networks."""
        h, skips = image, []
        for level, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2, ceil_mode=True) if level else h)
            skips.append(h)
        skips.pop()
        for block in self.up:
            skip = skips.pop()
            h = F.interpolate(h, skip.shape[2:], mode="bilinear", align_corners=True)
            h = block(torch.cat([h, skip], dim=1))
        return self.out(h)


@NETWORKS.add("conv_unet", "the convolutional U-Net of the Probabilistic U-Net, for methods without diffusion", FLAGS)
def conv_unet(flags: SimpleNamespace, x_channels: int = 0, out_channels: int = 1) -> ConvUNet:
    """The convolutional U-Net from its flags.

    :raises InputError: for flags that make none, and for a method of diffusion.
    """
    if x_channels:
        raise InputError("--network conv_unet: sees neither a noisy mask nor a timestep, so that it is of no use to a"
                         " method of diffusion; choose another, or --method probunet")
    return ConvUNet(flags.image_channels, out_channels, parse_filters(flags.conv_unet_filters, "conv_unet_filters"),
                    flags.conv_unet_convs)
