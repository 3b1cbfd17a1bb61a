"""Likelihoods of the variational bound."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from guided_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl

RANGES = [(0.0, 1.0), (-1.0, 1.0)]


def log_tail(z):
    """log P(Z > z) of a standard normal: erfc, or its asymptotic series where erfc underflows."""
    if z < 25:
        return math.log(math.erfc(z / math.sqrt(2)) / 2)
    series = -1 / z ** 2 + 3 / z ** 4 - 15 / z ** 6
    return -z * z / 2 - math.log(z * math.sqrt(2 * math.pi)) + math.log1p(series)


def log_probability_of_bin(x, mean, std, x_range, levels):
    """log of the Gaussian's mass between half-way to the left neighbour of x and half-way to the right one."""
    low, high = x_range
    half = (high - low) / (levels - 1) / 2
    lower, upper = (x - half - mean) / std, (x + half - mean) / std
    if abs(x - low) < half:
        return log_tail(-upper)
    if abs(x - high) < half:
        return log_tail(lower)
    if lower < 0 < upper:
        return math.log1p(-math.exp(log_tail(-lower)) - math.exp(log_tail(upper)))
    near, far = sorted((abs(lower), abs(upper)))
    return log_tail(near) + math.log1p(-math.exp(log_tail(far) - log_tail(near)))


def level_values(x_range, levels, dtype=torch.float64):
    low, high = x_range
    return torch.tensor([low + (high - low) * i / (levels - 1) for i in range(levels)], dtype=dtype)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(*[st.floats(-3, 3)] * 4)
def test_kl_of_two_normals_agrees_with_torch_distributions(mean1, log_variance1, mean2, log_variance2):
    values = [torch.tensor(v, dtype=torch.float64) for v in (mean1, log_variance1, mean2, log_variance2)]
    expected = kl_divergence(Normal(mean1, math.exp(log_variance1 / 2)), Normal(mean2, math.exp(log_variance2 / 2)))
    assert normal_kl(*values).item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)


def test_kl_of_two_normals_agrees_with_monte_carlo():
    mean1, std1, mean2, std2 = 0.3, 0.7, -0.5, 1.4
    z = torch.randn(200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = mean1 + std1 * z
    ratio = math.log(std2 / std1) - z ** 2 / 2 + ((x - mean2) / std2) ** 2 / 2
    kl = normal_kl(*(torch.tensor(v) for v in (mean1, 2 * math.log(std1), mean2, 2 * math.log(std2)))).item()
    assert abs(kl - ratio.mean().item()) < 5 * ratio.std().item() / math.sqrt(len(z))


def test_kl_broadcasts_and_vanishes_for_equal_normals():
    mean = torch.randn(2, 1, 3, generator=torch.Generator().manual_seed(1))
    log_variance = torch.randn(3, generator=torch.Generator().manual_seed(2))
    kl = normal_kl(mean, log_variance, mean, log_variance)
    assert kl.shape == (2, 1, 3)
    torch.testing.assert_close(kl, torch.zeros_like(kl), atol=1e-6, rtol=0)


@pytest.mark.parametrize("x_range", RANGES)
@pytest.mark.parametrize("levels", [2, 3, 256])
def test_bins_of_a_pixel_sum_to_one(levels, x_range):
    x = level_values(x_range, levels)[:, None]
    generator = torch.Generator().manual_seed(levels)
    mean = torch.empty(40, dtype=torch.float64).uniform_(x_range[0] - 1, x_range[1] + 1, generator=generator)
    log_std = torch.empty(40, dtype=torch.float64).uniform_(-4, 1, generator=generator)
    total = discretized_gaussian_log_likelihood(x, mean, log_std, x_range, levels).exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-9, atol=0)


@pytest.mark.parametrize("x_range", RANGES)
@pytest.mark.parametrize("levels", [2, 3, 256])
@pytest.mark.parametrize("dtype, rtol", [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_likelihood_agrees_with_error_functions_even_in_far_tails(dtype, rtol, levels, x_range):
    generator = torch.Generator().manual_seed(10 + levels)
    x = level_values(x_range, levels, dtype)[torch.randint(levels, (300,), generator=generator)]
    log_std = torch.empty(300, dtype=dtype).uniform_(-5, 0, generator=generator)
    # from the middle of the bin to some thousand standard deviations off
    mean = x + torch.randn(300, generator=generator, dtype=dtype) * torch.logspace(-3, 1, 300, dtype=dtype)
    result = discretized_gaussian_log_likelihood(x, mean, log_std, x_range, levels)
    assert result.dtype == dtype and result.isfinite().all()
    expected = [log_probability_of_bin(a, m, math.exp(s), x_range, levels)
                for a, m, s in zip(x.tolist(), mean.tolist(), log_std.tolist())]
    torch.testing.assert_close(result, torch.tensor(expected, dtype=dtype), rtol=rtol, atol=rtol)
    assert min(expected) < -1e4  # the tails were visited


@pytest.mark.parametrize("levels", [2, 3, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_likelihood_is_finite_and_right_in_far_tails(dtype, levels):
    distance = torch.tensor([-300., -20., -3., 3., 20., 300.], dtype=dtype)
    for value in level_values((0, 1), levels)[[0, levels // 2, levels - 1]].tolist():
        for log_std in (-6.0, -2.0, 0.0):
            x = torch.full_like(distance, value)
            mean = (x + distance).requires_grad_()
            scale = torch.full_like(distance, log_std).requires_grad_()
            discretized_gaussian_log_likelihood(x, mean, scale, levels=levels).sum().backward()
            for m, mean_slope, scale_slope in zip(mean.tolist(), mean.grad.tolist(), scale.grad.tolist()):
                def at(m, s, value=value):
                    return log_probability_of_bin(value, m, math.exp(s), (0, 1), levels)

                step = 1e-6 * abs(m)
                expected = (at(m + step, log_std) - at(m - step, log_std)) / (2 * step)
                assert mean_slope == pytest.approx(expected, rel=1e-3, abs=1e-3)
                expected = (at(m, log_std + 1e-6) - at(m, log_std - 1e-6)) / 2e-6
                assert scale_slope == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("levels", [2, 3, 256])
def test_gradient_of_likelihood_agrees_with_finite_differences(levels):
    generator = torch.Generator().manual_seed(20 + levels)
    x = level_values((0, 1), levels)[torch.randint(levels, (30,), generator=generator)]
    mean = (x + torch.randn(30, generator=generator, dtype=torch.float64)).requires_grad_()
    log_std = torch.empty(30, dtype=torch.float64).uniform_(-3, 0, generator=generator).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda m, s: discretized_gaussian_log_likelihood(x, m, s, levels=levels), (mean, log_std), rtol=1e-4)


def test_mask_is_two_levels_from_0_to_1_unless_said():
    x, mean, log_std = torch.tensor([0., 1.]), torch.tensor([0.2, 0.2]), torch.tensor(0.0)
    below_half = 0.5 * math.erfc(-0.3 / math.sqrt(2))
    assert discretized_gaussian_log_likelihood(x, mean, log_std).exp().tolist() == pytest.approx(
        [below_half, 1 - below_half], rel=1e-5)
