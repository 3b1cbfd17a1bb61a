"""AMN and ACN, the Gaussian encoders."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import kl_divergence
from torch.nn import functional as F

from guided_diffusion.methods.encoders import AxisAlignedConvGaussian
from guided_diffusion.script_util import create_encoders
from guided_diffusion.system.errors import InputError


def inputs(n=3, channels=4, size=(16, 16), seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, channels, *size, generator=generator, dtype=dtype),
            torch.randint(0, 2, (n, 1, *size), generator=generator).to(dtype))


def encoder(*args, **kwargs):
    torch.manual_seed(0)
    return AxisAlignedConvGaussian(*args, **kwargs)


def convolutions(module):
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]


# ---- architecture ----

def test_published_encoder_has_four_blocks_of_three_convolutions_and_a_1x1_to_12_numbers():
    posterior, prior = create_encoders()
    for net in (posterior, prior):
        *body, head = convolutions(net)
        assert [(c.in_channels, c.out_channels) for c in body] == [
            (2, 32), (32, 32), (32, 32), (32, 64), (64, 64), (64, 64),
            (64, 128), (128, 128), (128, 128), (128, 192), (192, 192), (192, 192)]
        assert all(c.kernel_size == (3, 3) and c.padding == (1, 1) and c.stride == (1, 1) for c in body)
        assert (head.in_channels, head.out_channels, head.kernel_size) == (192, 12, (1, 1))
        assert sum(p.numel() for p in net.parameters()) == sum(
            (k * k * i + 1) * o for k, i, o in [
                (3, 2, 32), *[(3, 32, 32)] * 2, (3, 32, 64), *[(3, 64, 64)] * 2, (3, 64, 128), *[(3, 128, 128)] * 2,
                (3, 128, 192), *[(3, 192, 192)] * 2, (1, 192, 12)])


def test_encoder_flags_set_its_sizes():
    net, _ = create_encoders(num_filters="8,16", no_convs_per_block=2, latent_dim=5, input_channels_dist=3)
    assert [(c.in_channels, c.out_channels) for c in convolutions(net)] == [(4, 8), (8, 8), (8, 16), (16, 16), (16, 10)]
    assert net(*inputs()).event_shape == (5,)


def test_sides_halve_between_blocks():
    net, sides = encoder(), []
    for layer in convolutions(net):
        layer.register_forward_pre_hook(lambda layer, args: sides.append(args[0].shape[-1]))
    net(*inputs())
    assert sides == [16, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2, 1]


def test_encoder_agrees_with_its_formula():
    net = encoder(2, (4, 6), 2, 3).double()
    image, mask = inputs(channels=2, size=(8, 6), dtype=torch.float64)
    h = torch.cat([image, mask], dim=1)
    *body, head = convolutions(net)
    for i, layer in enumerate(body):
        if i == 2:
            h = (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
        h = F.conv2d(h, layer.weight, layer.bias, padding=1).clamp(min=0)
    numbers = h.mean((2, 3)) @ head.weight[:, :, 0, 0].T + head.bias
    z = net(image, mask)
    torch.testing.assert_close(z.mean.double(), numbers[:, :3], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.stddev.double(), numbers[:, 3:].exp(), rtol=1e-5, atol=1e-6)


def test_distribution_is_over_six_dimensions_for_each_example():
    z = encoder()(*inputs(n=5))
    assert z.batch_shape == (5,) and z.event_shape == (6,)
    assert z.rsample().shape == (5, 6) and (z.stddev > 0).all()


@pytest.mark.parametrize("size", [(13, 20), (7, 9), (1, 1), (17, 128)])
def test_sides_that_are_no_multiple_of_8_work(size):
    z = encoder()(*inputs(size=size))
    assert z.batch_shape == (3,) and z.mean.isfinite().all() and z.stddev.isfinite().all()


def test_every_pixel_counts_even_in_a_row_that_does_not_halve():
    net = encoder().double()
    image, mask = (x.requires_grad_() for x in inputs(n=1, channels=1, size=(9, 11), dtype=torch.float64))
    net(image, mask).mean.sum().backward()
    assert (image.grad != 0).all() and (mask.grad != 0).all()


def test_latent_is_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        z = encoder()(*inputs())
    assert z.mean.dtype == z.stddev.dtype == torch.float32


# ---- what it sees ----

@pytest.mark.parametrize("seen", [1, 3])
def test_only_the_first_image_channels_are_seen(seen):
    net = encoder(seen)
    image, mask = inputs()
    z = net(image, mask)
    hidden, shown = image.clone(), image.clone()
    hidden[:, seen:] = 0
    shown[:, seen - 1] = 0
    assert torch.equal(net(hidden, mask).mean, z.mean)
    assert not torch.allclose(net(shown, mask).mean, z.mean)


def test_mask_is_seen():
    net = encoder()
    image, mask = inputs()
    assert not torch.allclose(net(image, 1 - mask).mean, net(image, mask).mean)


# ---- their divergence ----

def test_kl_of_amn_and_acn_agrees_with_monte_carlo():
    torch.manual_seed(1)
    posterior, prior = create_encoders(num_filters="8,16")
    image, mask = inputs()
    with torch.no_grad():
        q, p = posterior(image, mask), prior(image, 1 - mask)
        z = q.sample((100_000,))
        ratio = q.log_prob(z) - p.log_prob(z)  # [100000, 3]
    kl = kl_divergence(q, p)
    assert kl.shape == (3,) and (kl > 0).all()
    assert ((ratio.mean(0) - kl).abs() < 5 * ratio.std(0) / math.sqrt(len(z))).all()


def test_kl_sums_over_the_latent_dimensions():
    torch.manual_seed(1)
    posterior, prior = create_encoders(num_filters="8,16")
    q, p = (net(*inputs()) for net in (posterior, prior))
    variance = (q.stddev / p.stddev) ** 2
    expected = (variance + ((q.mean - p.mean) / p.stddev) ** 2 - 1 - variance.log()).sum(1) / 2
    torch.testing.assert_close(kl_divergence(q, p), expected, rtol=1e-4, atol=1e-5)


# ---- creation from flags ----

def test_amn_and_acn_are_two_networks():
    posterior, prior = create_encoders()
    assert not {*map(id, posterior.parameters())} & {*map(id, prior.parameters())}
    assert not torch.equal(convolutions(posterior)[0].weight, convolutions(prior)[0].weight)


def test_kl_weight_0_needs_no_encoders():
    assert create_encoders(kl_weight=0) == (None, None)


@pytest.mark.parametrize("flags, name", [
    ({"input_channels_dist": 5}, "input_channels_dist"), ({"num_filters": ""}, "num_filters"),
    ({"num_filters": "32,x"}, "num_filters"), ({"num_filters": "32,0"}, "num_filters")])
def test_flags_that_make_no_encoder_are_refused_by_name(flags, name):
    with pytest.raises(InputError, match=f"--{name}"):
        create_encoders(**flags)


def test_initial_activations_neither_vanish_nor_explode():
    z = encoder()(*inputs(n=8, size=(32, 32)))
    assert 1e-3 < z.mean.std() < 10 and z.stddev.log().abs().max() < 10
