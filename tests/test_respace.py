"""Processes that visit a part of the timesteps."""

import math

import numpy as np
import pytest
import torch
from helpers.refusals import refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion.respace import SPACINGS, SpacedDiffusion, space_timesteps, spread_timesteps
from guided_diffusion.script_util import create_gaussian_diffusion

TYPES = dict(model_mean_type=ModelMeanType.EPSILON, model_var_type=ModelVarType.FIXED_SMALL, loss_type=LossType.MSE)


def spaced(respacing, steps=1000, schedule="linear", **kwargs):
    return SpacedDiffusion(space_timesteps(steps, respacing), betas=get_named_beta_schedule(schedule, steps),
                           **{**TYPES, **kwargs})


class Recorder:
    """A denoiser that predicts no noise and remembers the timesteps it was shown."""

    def __init__(self):
        self.seen = []

    def __call__(self, x, timesteps):
        self.seen += timesteps.tolist()
        return torch.zeros_like(x)


# ---- which timesteps ----

def test_one_number_keeps_that_many_evenly_with_both_ends():
    steps = space_timesteps(1000, "250")
    assert len(steps) == 250 and (steps[0], steps[-1]) == (0, 999)
    assert {b - a for a, b in zip(steps, steps[1:])} <= {4, 5}


def test_three_numbers_keep_as_many_of_each_third_with_its_ends():
    steps = space_timesteps(1000, "10,15,20")
    thirds = [[s for s in steps if low <= s < high] for low, high in ((0, 334), (334, 667), (667, 1000))]
    assert [len(third) for third in thirds] == [10, 15, 20]
    assert [(third[0], third[-1]) for third in thirds] == [(0, 333), (334, 666), (667, 999)]


def test_ddim_keeps_a_whole_stride_from_zero():
    assert space_timesteps(1000, "ddim25") == list(range(0, 1000, 40))
    assert space_timesteps(100, "ddim100") == list(range(100))


def test_no_respacing_keeps_everything():
    assert space_timesteps(7, "") == [0, 1, 2, 3, 4, 5, 6]
    assert space_timesteps(7, "7") == [0, 1, 2, 3, 4, 5, 6]


def test_lists_mean_the_same_as_text():
    assert space_timesteps(100, [10, 15]) == space_timesteps(100, "10,15")


def test_a_single_step_of_a_section_is_its_first():
    assert space_timesteps(100, "1,1") == [0, 50]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_sections_split_the_process_and_spread_their_steps_evenly(data):
    sections = data.draw(st.integers(1, 5))
    total = data.draw(st.integers(sections, 300))
    lengths = [total // sections + (i < total % sections) for i in range(sections)]
    counts = [data.draw(st.integers(1, length)) for length in lengths]
    steps = space_timesteps(total, ",".join(map(str, counts)))
    assert len(steps) == sum(counts) and steps == sorted(set(steps))
    start = 0
    for count, length in zip(counts, lengths):
        part, steps = steps[:count], steps[count:]
        assert part[0] == start and (count == 1 or part[-1] == start + length - 1)
        for k, step in enumerate(part[1:], 1):
            assert abs(step - (start + k * (length - 1) / (count - 1))) <= 0.5
        start += length


@pytest.mark.parametrize("text", ["abc", "10,x", "10,,20", "ddim", "ddimx", "2.5", "0", "-3", "1001", "ddim0",
                                  "ddim999", "ddim1001", "400,400,1", "10,0,10"])
def test_impossible_respacings_are_refused(text):
    with pytest.raises(ValueError):
        space_timesteps(1000, text)


# ---- spread for samplers ----

def noise_levels(schedule, steps=1000):
    return (1 - get_named_beta_schedule(schedule, steps)).cumprod(0).numpy()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("total, counts", [(30, range(1, 31)), (1000, [1, 2, 3, 10, 37, 50, 100, 250, 999, 1000])])
def test_spread_steps_are_as_many_as_asked_for_and_include_the_last(spacing, schedule, total, counts):
    for count in counts:
        steps = spread_timesteps(total, count, spacing, noise_levels(schedule, total))
        assert len(steps) == count and all(type(step) is int for step in steps)
        assert steps == sorted(set(steps)) and steps[0] >= 0 and steps[-1] == total - 1
        if spacing in ("uniform", "quadratic") and count > 1:
            assert steps[0] == 0


@pytest.mark.parametrize("spacing", SPACINGS)
def test_spelling_with_a_number_spreads_that_many(spacing):
    abar = noise_levels("cosine")
    for count in (1, 2, 10, 1000):
        assert space_timesteps(1000, f"{spacing}{count}", abar) == spread_timesteps(1000, count, spacing, abar)
    if spacing != "logsnr":
        assert space_timesteps(1000, f"{spacing}10") == spread_timesteps(1000, 10, spacing)


def test_uniform_steps_are_those_of_one_section_up_to_halves():
    """A place half-way between two timesteps may be rounded to either."""
    for total in (30, 1000):
        for count in range(2, total + 1):
            spread, section = spread_timesteps(total, count, "uniform"), space_timesteps(total, str(count))
            for k, (step, other) in enumerate(zip(spread, section, strict=True)):
                assert step == other or 2 * k * (total - 1) % (count - 1) == 0 and abs(step - other) == 1
    assert space_timesteps(1000, "uniform10") == space_timesteps(1000, "10") == list(range(0, 1000, 111))
    assert space_timesteps(1000, "uniform1") == [999]  # unlike "1"


def test_trailing_steps_end_a_whole_step_before_the_mask():
    assert space_timesteps(1000, "trailing5") == [199, 399, 599, 799, 999]
    assert space_timesteps(1000, "trailing1") == [999]
    for count in range(1, 101):
        steps = space_timesteps(100, f"trailing{count}")
        assert all(abs(step - (100 * k / count - 1)) <= 0.5 + 1e-9 for k, step in enumerate(steps, 1))


def test_quadratic_steps_are_even_in_the_square_root():
    assert space_timesteps(101, "quadratic11") == [k * k for k in range(11)]
    for count in (5, 10, 15):
        steps = space_timesteps(1000, f"quadratic{count}")
        assert all(abs(step - 999 * (k / (count - 1)) ** 2) <= 0.5 for k, step in enumerate(steps))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("count", [2, 5, 10])
def test_logsnr_steps_are_as_even_in_it_as_whole_timesteps_can_be_where_masks_are_decided(schedule, count):
    abar = noise_levels(schedule)
    logsnr = np.log(abar) - np.log1p(-abar)
    *steps, last = space_timesteps(1000, f"logsnr{count}", abar)
    assert last == 999
    for step, wanted in zip(steps, np.linspace(2, -6, count)):
        assert logsnr[step + 1] < wanted < logsnr[step - 1]
        assert abs(np.interp(-wanted, -logsnr, np.arange(1000)) - step) <= 0.5
    if count == 10:
        assert steps[0] == (107 if schedule == "linear" else 217)


def test_steps_that_would_coincide_move_to_the_next_free_ones():
    assert space_timesteps(30, "quadratic20")[:6] == [0, 1, 2, 3, 4, 5]
    crowded = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 1e-9])  # nearly all of the log-SNR lies behind the last step
    assert spread_timesteps(6, 4, "logsnr", crowded) == [0, 3, 4, 5]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("count", [0, 1001, 5000])
def test_more_steps_than_there_are_or_none_are_refused_by_number(spacing, count):
    for function, args in ((spread_timesteps, (1000, count, spacing)), (space_timesteps, (1000, f"{spacing}{count}"))):
        with pytest.raises(ValueError, match=f"cannot keep {count} of 1000 steps"):
            function(*args, noise_levels("linear"))


@pytest.mark.parametrize("text", ["uniform", "foo10", "uniform-3", "uniform2.5", "uniform 10", "10uniform", "uniformx",
                                  "Uniform10", "uniform10,10", "uniform10\n", "trailing", "logsnr", "uniformlogsnr10"])
def test_other_words_spread_nothing(text):
    with pytest.raises(ValueError, match="is not"):
        space_timesteps(1000, text, noise_levels("linear"))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_flag_of_the_process_takes_every_spacing(spacing, schedule):
    part = create_gaussian_diffusion(noise_schedule=schedule, timestep_respacing=f"{spacing}10")
    kept = spread_timesteps(1000, 10, spacing, noise_levels(schedule))
    assert part.timestep_map.tolist() == kept and part.original_num_steps == 1000
    whole = create_gaussian_diffusion(noise_schedule=schedule)
    torch.testing.assert_close(part.alphas_cumprod, whole.alphas_cumprod[kept], rtol=1e-9, atol=0)
    message = refusal(create_gaussian_diffusion, noise_schedule=schedule, timestep_respacing=f"{spacing}1001")
    assert message == f"--timestep_respacing {spacing}1001: cannot keep 1001 of 1000 steps"


# ---- the process on them ----

@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("respacing", ["250", "10,15,20", "ddim25", "1", "uniform10", "trailing10", "quadratic10", ""])
def test_marginals_at_kept_timesteps_are_those_of_the_whole_process(respacing, schedule):
    part = spaced(respacing, schedule=schedule)
    whole = GaussianDiffusion(betas=get_named_beta_schedule(schedule, 1000), **TYPES)
    kept = torch.tensor(space_timesteps(1000, respacing))
    assert part.num_timesteps == len(kept)
    torch.testing.assert_close(part.alphas_cumprod, whole.alphas_cumprod[kept], rtol=1e-9, atol=0)
    assert ((part.betas > 0) & (part.betas < 1)).all()
    n = len(kept)
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, n, 1, 2, 3, generator=generator, dtype=torch.float64)
    here = torch.arange(n)
    torch.testing.assert_close(part.q_sample(x, here, noise), whole.q_sample(x, kept, noise))


def test_posterior_between_kept_timesteps_follows_bayes_rule():
    part = spaced("10")
    kept = space_timesteps(1000, "10")
    abar = [math.prod(1 - (1e-4 + (0.02 - 1e-4) * i / 999) for i in range(t + 1)) for t in kept]
    x_start, x_t = torch.tensor([[[[0.7]]]], dtype=torch.float64), torch.tensor([[[[-0.4]]]], dtype=torch.float64)
    for t in range(1, 10):
        alpha = abar[t] / abar[t - 1]  # q(x_t | x_{t-1}) has mean sqrt(alpha) x_{t-1} and variance 1 - alpha
        precision = 1 / (1 - abar[t - 1]) + alpha / (1 - alpha)
        mean = (math.sqrt(abar[t - 1]) * 0.7 / (1 - abar[t - 1]) + math.sqrt(alpha) * -0.4 / (1 - alpha)) / precision
        result = part.q_posterior_mean_variance(x_start, x_t, torch.tensor([t]))
        assert result[0].item() == pytest.approx(mean, rel=1e-9)
        assert result[1].item() == pytest.approx(1 / precision, rel=1e-9)


@pytest.mark.parametrize("respacing", ["10,15,20", "ddim25"])
def test_network_is_shown_the_original_timesteps(respacing):
    part, kept = spaced(respacing), space_timesteps(1000, respacing)
    model = Recorder()
    part.training_losses(model, torch.zeros(len(kept), 1, 2, 2), torch.arange(len(kept)))
    assert model.seen == kept
    for loop in (part.p_sample_loop, part.ddim_sample_loop):
        model = Recorder()
        loop(model, (1, 1, 2, 2))
        assert model.seen == kept[::-1]
    model = Recorder()
    part.calc_bpd_loop(model, torch.zeros(1, 1, 2, 2))
    assert model.seen == kept


def test_rescaled_timesteps_are_the_original_ones_over_1000():
    part, kept = spaced("10", steps=200, rescale_timesteps=True), space_timesteps(200, "10")
    model = Recorder()
    part.p_sample_loop(model, (1, 1, 2, 2))
    assert model.seen == pytest.approx([5 * t for t in reversed(kept)])


def test_timesteps_may_come_in_any_order_and_more_than_once():
    part = SpacedDiffusion([50, 3, 50, 10], betas=get_named_beta_schedule("linear", 100), **TYPES)
    model = Recorder()
    part.ddim_sample_loop(model, (1, 1, 2, 2))
    assert model.seen == [50, 10, 3]
