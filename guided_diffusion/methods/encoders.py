"""Axis-aligned Gaussian encoders: prior and posterior of the Probabilistic U-Net, AMN and ACN of CIMD (section 3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal

from ..nn import initialise_for_relu, relu_convolutions
from ..system.errors import InputError
from ..system.flag import Flag, parse_filters


class AxisAlignedConvGaussian(nn.Module):
    """q(z | image, mask) or p(z | image): a convolutional encoder of a Gaussian with diagonal covariance.

    Architecture of Kohl et al. 2018 (arXiv 1806.05034): blocks of convolutions with ReLU, average pooling
    between blocks, global average pooling, and a 1x1 convolution to mean and log standard deviation.

    :param image_channels: image channels it sees; one mask channel comes on top if it `sees_mask`.
    :param num_filters: filters of each block; a side shrinks by 2 ** (len(num_filters) - 1).
    :param no_convs_per_block: convolutions a block.
    :param latent_dim: dimensions of z.
    """

    def __init__(self, image_channels: int = 1, num_filters: Sequence[int] = (32, 64, 128, 192),
                 no_convs_per_block: int = 3, latent_dim: int = 6,
                 sees_mask: bool = True):
        super().__init__()
        self.image_channels = image_channels
        layers, channels = [], image_channels + sees_mask
        for i, filters in enumerate(num_filters):
            if i:
                layers.append(nn.AvgPool2d(2, ceil_mode=True))
            layers += relu_convolutions(channels, filters, no_convs_per_block)
            channels = filters
        self.encoder = nn.Sequential(*layers)
        self.conv_layer = nn.Conv2d(channels, 2 * latent_dim, 1)
        initialise_for_relu(self)

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Independent:
        """image: [N, C, H, W] in [0, 1], of which the first `image_channels` are seen; mask: [N, 1, H, W] in [0, 1],
        for one that sees it.

        Returns a distribution over z, batch shape [N], event shape [latent_dim].
        """
        seen = image[:, :self.image_channels]
        h = self.encoder(seen if mask is None else torch.cat([seen, mask], dim=1))
        mean, log_std = self.conv_layer(h.mean((2, 3), keepdim=True)).float().flatten(1).chunk(2, dim=1)
        # unchecked: a check would wait for the device at every step
        return Independent(Normal(mean, log_std.exp(), validate_args=False), 1, validate_args=False)


FLAGS = [
    Flag("input_channels_dist", int, 1, "image channels that AMN and ACN see (the first ones)", "encoders", least=1),
    Flag("num_filters", str, "32,64,128,192", "filters of each block of AMN and ACN", "encoders"),
    Flag("no_convs_per_block", int, 3, "convolutions a block of AMN and ACN", "encoders", least=1, most=1024),
    Flag("latent_dim", int, 6, "dimensions of their latent Gaussian", "encoders", least=1, most=65536),
]


KL_WEIGHT = 0.001  # of the ambiguity loss, as published
_DEFAULT = {flag.name: flag.default for flag in FLAGS}


def create_encoders(
    image_channels: int = 4, kl_weight: float = KL_WEIGHT,
    input_channels_dist: int = _DEFAULT["input_channels_dist"], num_filters: str = _DEFAULT["num_filters"],
    no_convs_per_block: int = _DEFAULT["no_convs_per_block"], latent_dim: int = _DEFAULT["latent_dim"],
) -> tuple[AxisAlignedConvGaussian | None, AxisAlignedConvGaussian | None]:
    """AMN (posterior) and ACN (prior) from their flags; (None, None) if kl_weight is 0.

    :raises InputError: for flags that make no encoders, naming them.
    """
    if not kl_weight:
        return None, None
    if input_channels_dist > image_channels:
        raise InputError(f"--input_channels_dist {input_channels_dist}: the image has --image_channels"
                         f" {image_channels}")
    filters = parse_filters(num_filters, "num_filters")
    return tuple(AxisAlignedConvGaussian(input_channels_dist, filters, no_convs_per_block, latent_dim)
                 for _ in range(2))
