"""Small pieces of networks: embedding of timesteps, norm in float32, moving average."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from guided_diffusion.nn import GroupNorm32, mean_flat, normalization, timestep_embedding, update_ema, zero_module


def group_norm_float64(x, groups, weight, bias, eps=1e-5):
    """Group normalisation written out for numpy arrays [N, C, ...]."""
    x = np.asarray(x, dtype=np.float64)
    result = np.empty_like(x)
    size = x.shape[1] // groups
    for n in range(len(x)):
        for g in range(groups):
            part = x[n, g * size:(g + 1) * size]
            result[n, g * size:(g + 1) * size] = (part - part.mean()) / math.sqrt(part.var() + eps)
    shape = (1, -1) + (1,) * (x.ndim - 2)
    return result * np.reshape(weight, shape) + np.reshape(bias, shape)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.integers(0, 1000), st.floats(0, 1000, width=32)), min_size=1, max_size=4),
       st.integers(2, 9))
def test_timestep_embedding_is_cosines_then_sines_at_falling_frequencies(steps, dim):
    embedding = timestep_embedding(torch.tensor(steps), dim)
    assert embedding.shape == (len(steps), dim) and embedding.dtype == torch.float32
    half = dim // 2
    for row, step in zip(embedding.tolist(), steps):
        for i in range(half):
            angle = step * 10000 ** (-i / half)
            assert row[i] == pytest.approx(math.cos(angle), abs=2e-4)  # float32 angles up to 1000
            assert row[half + i] == pytest.approx(math.sin(angle), abs=2e-4)


def test_timestep_embedding_of_odd_width_ends_in_a_zero():
    assert (timestep_embedding(torch.tensor([3, 700]), 7)[:, 6] == 0).all()
    assert (timestep_embedding(torch.tensor([3, 700]), 6) != 0).all()


def test_timestep_embedding_slowest_frequency_follows_max_period():
    slow = timestep_embedding(torch.tensor([50]), 4, max_period=100)
    assert slow[0].tolist() == pytest.approx([math.cos(50), math.cos(5), math.sin(50), math.sin(5)], abs=1e-5)


def test_group_norm_of_bfloat16_takes_its_statistics_in_float32():
    generator = torch.Generator().manual_seed(0)
    x = (50 + torch.randn(2, 64, 9, 9, generator=generator)).bfloat16()
    norm = normalization(64)
    nn.init.uniform_(norm.weight, 0.5, 2, generator=generator)
    nn.init.uniform_(norm.bias, -1, 1, generator=generator)
    result = norm(x)
    assert result.dtype == torch.bfloat16
    reference = group_norm_float64(x.double().numpy(), 32, norm.weight.detach().numpy(), norm.bias.detach().numpy())
    # only the result is rounded: 8 significant bits, so half a unit in the last place is a 2**-8 part
    np.testing.assert_allclose(result.double().detach().numpy(), reference, rtol=2 ** -8, atol=1e-4)


def test_group_norm_of_a_bfloat16_module_keeps_float32_inside():
    x = 50 + torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(1))
    norm = normalization(32).bfloat16()
    reference = group_norm_float64(x.bfloat16().double().numpy(), 32, np.ones(32), np.zeros(32))
    np.testing.assert_allclose(norm(x.bfloat16()).double().detach().numpy(), reference, rtol=2 ** -8, atol=1e-4)


@pytest.mark.parametrize("double_weights", [False, True])
def test_group_norm_of_float64_loses_no_digits(double_weights):
    x = torch.randn(3, 12, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    norm = GroupNorm32(4, 12)
    result = (norm.double() if double_weights else norm)(x)
    assert result.dtype == torch.float64
    np.testing.assert_allclose(result.detach().numpy(), group_norm_float64(x.numpy(), 4, np.ones(12), np.zeros(12)),
                               atol=1e-12)


def test_normalization_has_32_groups():
    x = torch.randn(1, 96, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    parts = normalization(96)(x).reshape(32, -1)
    np.testing.assert_allclose(parts.mean(1).detach().numpy(), 0, atol=1e-12)
    np.testing.assert_allclose(parts.var(1, unbiased=False).detach().numpy(), 1, rtol=1e-2)


@pytest.mark.parametrize("rate", [0.0, 0.5, 0.99])
def test_moving_average_weighs_the_past_geometrically(rate):
    generator = torch.Generator().manual_seed(4)
    shapes = [(3, 2), (5,)]
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    history = [[torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes] for _ in range(6)]
    average = [nn.Parameter(value.clone()) for value in start]
    for sources in history:
        update_ema(average, [nn.Parameter(value.clone()) for value in sources], rate)
    for i, value in enumerate(average):
        expected = rate ** 6 * start[i]
        for age, sources in enumerate(reversed(history)):
            expected = expected + (1 - rate) * rate ** age * sources[i]
        torch.testing.assert_close(value.detach(), expected, rtol=1e-12, atol=1e-12)


def test_moving_average_leaves_the_source_and_the_graph_alone():
    source, average = nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(3))
    update_ema([average], [source], 0.9)
    assert source.tolist() == [1, 1, 1] and average.is_leaf and average.grad_fn is None


def test_mean_flat_averages_everything_but_the_batch():
    x = torch.arange(2 * 3 * 4 * 5, dtype=torch.float64).reshape(2, 3, 4, 5)
    assert mean_flat(x).tolist() == [29.5, 89.5]


def test_zero_module_zeroes_every_parameter_and_returns_the_module():
    module = nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4))
    assert zero_module(module) is module
    assert all((parameter == 0).all() for parameter in module.parameters())
