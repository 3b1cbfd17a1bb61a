"""The convolutional U-Net."""

from types import SimpleNamespace

import pytest
import torch
from helpers.refusals import refusal
from torch import nn
from torch.nn import functional as F

from guided_diffusion.flags import defaults
from guided_diffusion.networks import NETWORKS
from guided_diffusion.networks.conv_unet import ConvUNet


def from_flags(x_channels=0, out_channels=32, **flags):
    return NETWORKS["conv_unet"](SimpleNamespace(**{**defaults("model"), **flags}), x_channels, out_channels)


def call(network, image):
    return network(image[:, :0], torch.zeros(len(image)), image=image)


def test_default_is_the_published_architecture():
    network = from_flags(image_channels=1)
    channels = [(c.in_channels, c.out_channels) for c in network.modules() if isinstance(c, nn.Conv2d)]
    assert channels == [(1, 32), (32, 32), (32, 32), (32, 64), (64, 64), (64, 64), (64, 128), (128, 128), (128, 128),
                        (128, 192), (192, 192), (192, 192), (320, 128), (128, 128), (128, 128), (192, 64), (64, 64),
                        (64, 64), (96, 32), (32, 32), (32, 32), (32, 32)]
    assert not any(isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)) for module in network.modules())


def test_it_agrees_with_its_formula():
    torch.manual_seed(0)
    network = ConvUNet(2, 3, (4, 6), convs=1).double()
    image = torch.rand(2, 2, 8, 8, dtype=torch.float64)
    top, bottom, up = network.down[0][0], network.down[1][0], network.up[0][0]
    skip = F.conv2d(image, top.weight, top.bias, padding=1).clamp(min=0)
    half = (skip[..., ::2, ::2] + skip[..., 1::2, ::2] + skip[..., ::2, 1::2] + skip[..., 1::2, 1::2]) / 4
    low = F.conv2d(half, bottom.weight, bottom.bias, padding=1).clamp(min=0)
    at = torch.linspace(0, 3, 8, dtype=torch.float64)  # where the 8 pixels lie among the 4, corners on corners
    weights = (1 - (at[:, None] - torch.arange(4)).abs()).clamp(min=0)  # [8, 4]
    h = torch.cat([torch.einsum("ih,jw,nchw->ncij", weights, weights, low), skip], 1)
    h = F.conv2d(h, up.weight, up.bias, padding=1).clamp(min=0)
    expected = torch.einsum("oc,nchw->nohw", network.out.weight[:, :, 0, 0], h) + network.out.bias[:, None, None]
    torch.testing.assert_close(call(network, image), expected)


@pytest.mark.parametrize("size", [(13, 20), (1, 1), (7, 64)])
def test_sides_of_any_length_come_back(size):
    assert call(from_flags(image_channels=2, out_channels=5), torch.rand(1, 2, *size)).shape == (1, 5, *size)


@pytest.mark.parametrize("x_channels, flags, words", [
    (1, {}, "--network conv_unet: sees neither a noisy mask nor a timestep"),
    (0, {"conv_unet_filters": ""}, "--conv_unet_filters"),
    (0, {"conv_unet_filters": "8,0"}, "--conv_unet_filters 8,0")])
def test_flags_that_make_none_are_refused(x_channels, flags, words):
    assert words in refusal(from_flags, x_channels, **flags)
