"""AMN and ACN: the axis-aligned Gaussian encoders of CIMD (section 3), taken from the Probabilistic U-Net."""

import torch
from torch import nn
from torch.distributions import Independent, Normal


class AxisAlignedConvGaussian(nn.Module):
    """q(z | image, mask): a convolutional encoder of a Gaussian with diagonal covariance.

    Architecture of Kohl et al. 2018 (arXiv 1806.05034): blocks of convolutions with ReLU, average pooling
    between blocks, global average pooling, and a 1x1 convolution to mean and log standard deviation.

    :param image_channels: image channels it sees; one mask channel comes on top.
    :param num_filters: filters of each block; a side shrinks by 2 ** (len(num_filters) - 1).
    :param no_convs_per_block: convolutions a block.
    :param latent_dim: dimensions of z.
    """

    def __init__(self, image_channels=1, num_filters=(32, 64, 128, 192), no_convs_per_block=3, latent_dim=6):
        super().__init__()
        self.image_channels = image_channels
        layers, channels = [], image_channels + 1
        for i, filters in enumerate(num_filters):
            if i:
                layers.append(nn.AvgPool2d(2, ceil_mode=True))
            for _ in range(no_convs_per_block):
                layers += [nn.Conv2d(channels, filters, 3, padding=1), nn.ReLU()]
                channels = filters
        self.encoder = nn.Sequential(*layers)
        self.conv_layer = nn.Conv2d(channels, 2 * latent_dim, 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.trunc_normal_(layer.bias, std=0.001)

    def forward(self, image, mask):
        """image: [N, C, H, W] in [0, 1], of which the first `image_channels` are seen; mask: [N, 1, H, W] in [0, 1].

        Returns a distribution over z, batch shape [N], event shape [latent_dim].
        """
        h = self.encoder(torch.cat([image[:, :self.image_channels], mask], dim=1))
        mean, log_std = self.conv_layer(h.mean((2, 3), keepdim=True)).float().flatten(1).chunk(2, dim=1)
        # unchecked: a check would wait for the device at every step
        return Independent(Normal(mean, log_std.exp(), validate_args=False), 1, validate_args=False)
