"""The diffusion process against closed forms written out in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guided_diffusion.gaussian_diffusion import (
    GaussianDiffusion,
    LossType,
    ModelMeanType,
    ModelVarType,
    get_named_beta_schedule,
)
from guided_diffusion.predictions import PREDICTIONS
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.system.errors import InputError

# Betas so large that every quantity is far from 0 and 1, and none equals another by chance.
BETAS = [0.11, 0.07, 0.2, 0.31, 0.26]
LEARNED = (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)


def make(betas=BETAS, mean=ModelMeanType.EPSILON, var=ModelVarType.FIXED_SMALL, loss=LossType.MSE, **kwargs):
    return GaussianDiffusion(betas=betas, model_mean_type=mean, model_var_type=var, loss_type=loss, **kwargs)


def abar(t, betas=BETAS):
    """Product of 1 - beta over the steps 0..t; 1 before the first."""
    return math.prod(1 - beta for beta in betas[:t + 1])


def posterior(x_start, x_t, t, betas=BETAS):
    """Mean and variance of q(x_{t-1} | x_t, x_0) by Bayes' rule, from N(x_{t-1} | x_0) and N(x_t | x_{t-1})."""
    if t == 0:
        return x_start, 0.0
    prior_mean, prior_variance = math.sqrt(abar(t - 1, betas)) * x_start, 1 - abar(t - 1, betas)
    gain, variance = math.sqrt(1 - betas[t]), betas[t]
    precision = 1 / prior_variance + gain ** 2 / variance
    return (prior_mean / prior_variance + gain * x_t / variance) / precision, 1 / precision


def small_log_variance(t, betas=BETAS):
    """The posterior's; at the last step of the walk, where that is 0, the one of the step before."""
    return math.log(posterior(0, 0, max(t, 1), betas)[1])


def noisy(x_start, eps, t, betas=BETAS):
    return math.sqrt(abar(t, betas)) * x_start + math.sqrt(1 - abar(t, betas)) * eps


def data(shape, seed=0, dtype=torch.float64):
    """A mask, noise, and a network's output of twice the channels."""
    generator = torch.Generator().manual_seed(seed)
    n, channels, *sides = shape
    return (torch.randint(0, 2, shape, generator=generator).to(dtype),
            torch.randn(shape, generator=generator, dtype=dtype),
            torch.randn((n, 2 * channels, *sides), generator=generator, dtype=dtype))


def answering(output):
    """A denoiser that returns `output` whatever it sees."""
    return lambda x, timesteps, **kwargs: output


# ---- schedules ----

@pytest.mark.parametrize("steps", [21, 50, 1000, 4000])
def test_linear_betas_run_evenly_between_ends_scaled_to_the_number_of_steps(steps):
    first, last = 0.1 / steps, 20 / steps
    expected = [first + (last - first) * i / (steps - 1) for i in range(steps)]
    betas = get_named_beta_schedule("linear", steps)
    assert betas.dtype == torch.float64
    np.testing.assert_allclose(betas, expected, rtol=1e-12)


def test_linear_betas_run_from_one_ten_thousandth_to_a_fiftieth_for_1000_steps():
    betas = get_named_beta_schedule("linear", 1000)
    assert (betas[0].item(), betas[-1].item()) == pytest.approx((0.0001, 0.02), rel=1e-12)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_linear_schedule_refuses_so_few_steps_that_a_beta_reaches_one(steps):
    with pytest.raises(ValueError, match="more than 20"):
        get_named_beta_schedule("linear", steps)


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
def test_cosine_betas_follow_the_squared_cosine_and_stay_below_one(steps):
    def signal(i):
        return math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2

    expected = [min(1 - signal(i + 1) / signal(i), 0.999) for i in range(steps)]
    np.testing.assert_allclose(get_named_beta_schedule("cosine", steps), expected, rtol=1e-9)
    assert expected[-1] == 0.999


def test_cosine_schedule_keeps_as_much_signal_as_its_formula():
    diffusion = make(get_named_beta_schedule("cosine", 100))
    start = math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    expected = [math.cos(((t + 1) / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 / start for t in range(99)]
    np.testing.assert_allclose(diffusion.alphas_cumprod[:99], expected, rtol=1e-9)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="linear or cosine"):
        get_named_beta_schedule("square", 100)


@pytest.mark.parametrize("betas", [[0.1, 0.0], [0.1, 1.0], [-0.1], [[0.1, 0.2]], [0.1, float("nan")]])
def test_betas_outside_0_to_1_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        make(betas)


# ---- q ----

def test_marginal_of_x_t_agrees_with_its_closed_form():
    x_start, noise, _ = data((5, 2, 3, 4))
    t = torch.tensor([4, 0, 3, 1, 2])
    mean, variance, log_variance = make().q_mean_variance(x_start, t)
    x_t = make().q_sample(x_start, t, noise)
    for i, step in enumerate(t.tolist()):
        np.testing.assert_allclose(mean[i], math.sqrt(abar(step)) * x_start[i], rtol=1e-12)
        np.testing.assert_allclose(variance[i], np.full((2, 3, 4), 1 - abar(step)), rtol=1e-12)
        np.testing.assert_allclose(log_variance[i].exp(), variance[i], rtol=1e-12)
        np.testing.assert_allclose(x_t[i], noisy(x_start[i], noise[i], step), rtol=1e-12)


def test_marginal_of_x_t_agrees_with_steps_taken_one_by_one():
    n, t = 40_000, 3
    generator = torch.Generator().manual_seed(0)
    x = torch.full((n,), 0.8, dtype=torch.float64)
    for beta in BETAS[:t + 1]:  # q(x_t | x_{t-1}), eq. 2 of DDPM
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * torch.randn(n, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    direct = make().q_sample(torch.full((n, 1, 1, 1), 0.8, dtype=torch.float64), torch.full((n,), t)).flatten()
    mean, variance = math.sqrt(abar(t)) * 0.8, 1 - abar(t)
    for sample in (x, direct):
        assert abs(sample.mean().item() - mean) < 5 * math.sqrt(variance / n)
        assert abs(sample.var().item() - variance) < 5 * variance * math.sqrt(2 / n)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.floats(1e-4, 0.99), min_size=1, max_size=6), st.floats(-2, 2), st.floats(-3, 3), st.data())
def test_posterior_agrees_with_bayes_rule(betas, x_start, x_t, draw):
    t = draw.draw(st.integers(0, len(betas) - 1))
    mean, variance, log_variance = make(betas).q_posterior_mean_variance(
        *(torch.tensor([[[[v]]]], dtype=torch.float64) for v in (x_start, x_t)), torch.tensor([t]))
    expected_mean, expected_variance = posterior(x_start, x_t, t, betas)
    assert mean.item() == pytest.approx(expected_mean, rel=1e-9, abs=1e-9)
    assert variance.item() == pytest.approx(expected_variance, rel=1e-9, abs=1e-15)
    if t:
        assert log_variance.item() == pytest.approx(math.log(expected_variance), abs=1e-9)


def test_clipped_log_variance_of_the_last_step_is_that_of_the_step_before():
    log_variance = make().q_posterior_mean_variance(*torch.zeros(2, 2, 1, 1, 1), torch.tensor([0, 1]))[2].flatten()
    assert log_variance.tolist() == pytest.approx([small_log_variance(1)] * 2, rel=1e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-4)])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_noise_and_x_start_convert_into_each_other(schedule, dtype, tolerance):
    diffusion = make(get_named_beta_schedule(schedule, 1000))
    t = torch.tensor([0, 1, 10, 500, 990])
    x_start, noise, _ = data((5, 1, 4, 4), dtype=dtype)
    x_t = diffusion.q_sample(x_start, t, noise)
    torch.testing.assert_close(diffusion.predict_eps_from_xstart(x_t, t, x_start), noise, atol=tolerance, rtol=0)
    # what is left of x_0 in x_t is sqrt(abar), so that much of the digits is
    left = torch.tensor([abar(step, get_named_beta_schedule(schedule, 1000).tolist()) ** 0.5 for step in t.tolist()])
    error = (diffusion.predict_xstart_from_eps(x_t, t, noise) - x_start).abs().amax((1, 2, 3))
    assert (error * left < tolerance).all()
    back = diffusion.predict_eps_from_xstart(x_t, t, diffusion.predict_xstart_from_eps(x_t, t, noise))
    torch.testing.assert_close(back, noise, atol=tolerance, rtol=0)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_target_and_x_start_are_inverse_to_each_other(prediction, schedule):
    """At every noise level, for any x_0, be it far out of the range of masks. One that predicts noise gets back as
    many digits of x_0 as x_t has of it, its share sqrt(abar)."""
    betas = get_named_beta_schedule(schedule, 1000)
    diffusion, t = make(betas, mean=prediction), torch.arange(1000)
    generator = torch.Generator().manual_seed(0)
    x_start, noise = 3 * torch.randn(2, 1000, 1, 2, 2, generator=generator, dtype=torch.float64)
    x_t = diffusion.q_sample(x_start, t, noise)
    target = PREDICTIONS[prediction].target(diffusion, x_start, noise, t)
    error = (PREDICTIONS[prediction].x_start(diffusion, target, x_t, t) - x_start).abs().amax((1, 2, 3))
    share = (1 - betas).cumprod(0).sqrt() if prediction == "eps" else 1
    assert (error * share).max() < 1e-13
    other = torch.randn(x_t.shape, generator=generator, dtype=torch.float64)  # and an output that no x_0 gave
    found = PREDICTIONS[prediction].x_start(diffusion, other, x_t, t)
    eps = diffusion.predict_eps_from_xstart(x_t, t, found)
    back = PREDICTIONS[prediction].target(diffusion, found, eps, t)
    # dividing by sqrt(1 - abar), a hundredth at the first step, costs as many digits
    torch.testing.assert_close(back, other, rtol=0, atol=1e-10)


def test_velocity_turns_noise_and_mask_by_the_angle_of_the_noise_level():
    """v = sqrt(abar) eps - sqrt(1 - abar) x_0; with x_t it is (x_0, eps) turned, so their lengths agree."""
    x_start, noise, _ = data((5, 2, 3, 4), seed=5)
    diffusion, t = make(mean="v"), torch.tensor([4, 0, 3, 1, 2])
    v = PREDICTIONS["v"].target(diffusion, x_start, noise, t)
    for i, step in enumerate(t.tolist()):
        expected = math.sqrt(abar(step)) * noise[i] - math.sqrt(1 - abar(step)) * x_start[i]
        torch.testing.assert_close(v[i], expected, rtol=1e-12, atol=1e-12)
    x_t = diffusion.q_sample(x_start, t, noise)
    torch.testing.assert_close(x_t ** 2 + v ** 2, x_start ** 2 + noise ** 2)


def test_what_is_predicted_may_be_said_by_the_published_names():
    for published, name in ((ModelMeanType.EPSILON, "eps"), (ModelMeanType.START_X, "xstart")):
        assert make(mean=published).prediction is make(mean=name).prediction is PREDICTIONS[name]
    with pytest.raises(KeyError, match="no prediction is called 'score': there are eps, xstart, v"):
        make(mean="score")


# ---- p ----

def test_prediction_of_the_noise_becomes_the_posterior_mean_of_its_x_start():
    x_t, eps, _ = data((5, 1, 2, 3), seed=1)
    t = torch.arange(5)
    p = make().p_mean_variance(answering(eps), x_t, t, clip_denoised=False)
    for i in range(5):
        x_start = (x_t[i] - math.sqrt(1 - abar(i)) * eps[i]) / math.sqrt(abar(i))
        np.testing.assert_allclose(p["pred_xstart"][i], x_start, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(p["mean"][i], posterior(x_start, x_t[i], i)[0], rtol=1e-10, atol=1e-10)


def test_prediction_of_the_velocity_becomes_the_posterior_mean_of_its_x_start():
    x_t, v, _ = data((5, 1, 2, 3), seed=12)
    p = make(mean="v").p_mean_variance(answering(v), x_t, torch.arange(5), clip_denoised=False)
    for i in range(5):
        x_start = math.sqrt(abar(i)) * x_t[i] - math.sqrt(1 - abar(i)) * v[i]
        np.testing.assert_allclose(p["pred_xstart"][i], x_start, rtol=1e-10, atol=1e-10)
        np.testing.assert_allclose(p["mean"][i], posterior(x_start, x_t[i], i)[0], rtol=1e-10, atol=1e-10)


def test_prediction_of_x_start_becomes_its_posterior_mean():
    x_t, x_start, _ = data((5, 1, 2, 3), seed=2)
    p = make(mean=ModelMeanType.START_X).p_mean_variance(answering(x_start), x_t, torch.arange(5), clip_denoised=False)
    assert torch.equal(p["pred_xstart"], x_start)
    for i in range(5):
        np.testing.assert_allclose(p["mean"][i], posterior(x_start[i], x_t[i], i)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("x_range", [(0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_clipping_keeps_the_predicted_mask_in_its_range_and_the_mean_follows(prediction, x_range):
    x_t, output, _ = data((5, 1, 4, 4), seed=3)
    diffusion, t = make(mean=prediction, x_range=x_range), torch.arange(5)
    free = diffusion.p_mean_variance(answering(3 * output), x_t, t, clip_denoised=False)["pred_xstart"]
    p = diffusion.p_mean_variance(answering(3 * output), x_t, t)
    assert free.min() < x_range[0] and free.max() > x_range[1]
    assert torch.equal(p["pred_xstart"], free.clip(*x_range))
    for i in range(5):
        np.testing.assert_allclose(p["mean"][i], posterior(p["pred_xstart"][i], x_t[i], i)[0], rtol=1e-10, atol=1e-10)


def test_denoised_fn_acts_on_the_predicted_mask_before_it_is_clipped():
    x_t, output, _ = data((5, 1, 2, 2), seed=4)
    p = make(mean=ModelMeanType.START_X).p_mean_variance(
        answering(output), x_t, torch.arange(5), denoised_fn=lambda x: 10 * x)
    assert torch.equal(p["pred_xstart"], (10 * output).clip(0, 1))


@pytest.mark.parametrize("var, expected", [
    (ModelVarType.FIXED_SMALL, [small_log_variance(t) for t in range(5)]),
    (ModelVarType.FIXED_LARGE, [small_log_variance(1), *map(math.log, BETAS[1:])]),
])
def test_fixed_variances_are_the_posterior_and_beta(var, expected):
    p = make(var=var).p_mean_variance(answering(torch.zeros(5, 1, 2, 3)), torch.zeros(5, 1, 2, 3), torch.arange(5))
    for i, value in enumerate(expected):
        np.testing.assert_allclose(p["log_variance"][i], np.full((1, 2, 3), value), rtol=1e-6)
        np.testing.assert_allclose(p["variance"][i], np.full((1, 2, 3), math.exp(value)), rtol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_learned_variance_is_the_second_half_of_the_output(channels):
    x_t, _, output = data((5, channels, 2, 3), seed=5)
    p = make(var=ModelVarType.LEARNED).p_mean_variance(answering(output), x_t, torch.arange(5))
    assert torch.equal(p["log_variance"], output[:, channels:])
    torch.testing.assert_close(p["variance"], output[:, channels:].exp())


@pytest.mark.parametrize("output, of_large", [(-1.0, 0.0), (1.0, 1.0), (0.0, 0.5), (0.5, 0.75)])
def test_learned_range_interpolates_the_log_variance_between_posterior_and_beta(output, of_large):
    x = torch.zeros(5, 1, 2, 2, dtype=torch.float64)
    model = answering(torch.cat([x, torch.full_like(x, output)], dim=1))
    for clip in (True, False):
        p = make(var=ModelVarType.LEARNED_RANGE).p_mean_variance(model, x, torch.arange(5), clip_denoised=clip)
        for t in range(5):
            expected = of_large * math.log(BETAS[t]) + (1 - of_large) * small_log_variance(t)
            np.testing.assert_allclose(p["log_variance"][t], np.full((1, 2, 2), expected), rtol=1e-12)


@pytest.mark.parametrize("scale", [2.0, 1e4, 1e30])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learned_range_stays_between_its_bounds_for_wild_outputs(schedule, scale):
    betas = get_named_beta_schedule(schedule, 100)
    x_t, _, output = data((100, 1, 4, 4), seed=6, dtype=torch.float32)
    p = make(betas, var=ModelVarType.LEARNED_RANGE).p_mean_variance(
        answering(scale * output), x_t, torch.arange(100))
    for t in range(100):
        small, large = small_log_variance(t, betas.tolist()), math.log(betas[t])
        assert small - 1e-5 <= p["log_variance"][t].min() and p["log_variance"][t].max() <= large + 1e-5
        assert p["log_variance"][t].max() - p["log_variance"][t].min() == pytest.approx(large - small, abs=1e-4)


@pytest.mark.parametrize("var, channels, given", [
    (ModelVarType.FIXED_SMALL, 1, 2), (ModelVarType.FIXED_LARGE, 3, 6), (ModelVarType.LEARNED, 1, 1),
    (ModelVarType.LEARNED_RANGE, 1, 1), (ModelVarType.LEARNED_RANGE, 3, 4)])
def test_output_with_the_wrong_number_of_channels_is_refused(var, channels, given):
    diffusion, x, t = make(var=var), torch.zeros(2, channels, 4, 4), torch.tensor([1, 2])
    model = answering(torch.zeros(2, given, 4, 4))
    with pytest.raises(ValueError, match=var.name):
        diffusion.p_mean_variance(model, x, t)
    with pytest.raises(ValueError, match=var.name):
        diffusion.training_losses(model, x, t)


# ---- losses ----

def log_tail(z):
    return math.log(math.erfc(z / math.sqrt(2)) / 2)


def target_reference(prediction, x0, eps, t):
    """What a network that predicts this should return for one pixel."""
    return {"eps": eps, "xstart": x0, "v": math.sqrt(abar(t)) * eps - math.sqrt(1 - abar(t)) * x0}[prediction]


def x_start_reference(prediction, output, x_t, t):
    """The x_0 for which a pixel x_t has this target, from x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps."""
    gain, share = math.sqrt(abar(t)), math.sqrt(1 - abar(t))
    return {"eps": (x_t - share * output) / gain, "xstart": output, "v": gain * x_t - share * output}[prediction]


def bound_reference(prediction, var_type, output, x_start, x_t, t):
    """L_t of one example in bits per dimension: lists of numbers, one a pixel; output is (prediction, variance)."""
    total = 0.0
    for predicted, raw, x0, xt in zip(*output, x_start, x_t):
        mean, _ = posterior(x_start_reference(prediction, predicted, xt, t), xt, t)
        log_variance = {
            ModelVarType.FIXED_SMALL: small_log_variance(t),
            ModelVarType.FIXED_LARGE: math.log(BETAS[t]) if t else small_log_variance(1),
            ModelVarType.LEARNED: raw,
            ModelVarType.LEARNED_RANGE: (1 + raw) / 2 * math.log(BETAS[t]) + (1 - raw) / 2 * small_log_variance(t),
        }[var_type]
        variance = math.exp(log_variance)
        if t == 0:  # probability that the Gaussian falls on the mask's side of one half
            total -= log_tail((mean - 0.5 if x0 == 0 else 0.5 - mean) / math.sqrt(variance))
        else:
            true_mean, true_variance = posterior(x0, xt, t)
            total += (math.log(variance / true_variance) - 1
                      + (true_variance + (true_mean - mean) ** 2) / variance) / 2
    return total / len(x_t) / math.log(2)


@pytest.mark.parametrize("shape", [(5, 1, 2, 3), (5, 3, 4, 2)])
@pytest.mark.parametrize("prediction, var_type, loss_type", [
    *itertools.product(PREDICTIONS, ModelVarType, LossType)])
def test_losses_agree_with_a_reference_written_by_hand(prediction, var_type, loss_type, shape):
    x_start, noise, output = data(shape, seed=7)
    channels, learned = shape[1], var_type in LEARNED
    if not learned:
        output = output[:, :channels]
    t = torch.tensor([3, 0, 1, 4, 2])
    terms = make(mean=prediction, var=var_type, loss=loss_type).training_losses(
        answering(output), x_start, t, noise=noise)
    is_bound = loss_type in (LossType.KL, LossType.RESCALED_KL)
    assert terms.keys() == {"loss", "pred_xstart"} | ({"vb"} if is_bound else {"mse", "vb"} if learned else {"mse"})
    for i, step in enumerate(t.tolist()):
        x0, eps, predicted, raw = (v.flatten().tolist() for v in (
            x_start[i], noise[i], output[i, :channels], output[i, -channels:]))
        x_t = [noisy(a, b, step) for a, b in zip(x0, eps)]
        target = [target_reference(prediction, a, b, step) for a, b in zip(x0, eps)]
        mse = sum((a - b) ** 2 for a, b in zip(target, predicted)) / len(target)
        vb = bound_reference(prediction, var_type, (predicted, raw), x0, x_t, step)
        expected = {
            LossType.MSE: mse + (vb if learned else 0),
            LossType.RESCALED_MSE: mse + (vb * 5 / 1000 if learned else 0),
            LossType.KL: vb,
            LossType.RESCALED_KL: vb * 5,
        }[loss_type]
        assert terms["loss"][i].item() == pytest.approx(expected, rel=1e-8)
        if not is_bound:
            assert terms["mse"][i].item() == pytest.approx(mse, rel=1e-10)
        if learned and not is_bound:
            assert terms["vb"][i].item() == pytest.approx(expected - mse, rel=1e-6)


@pytest.mark.parametrize("loss_type", [LossType.MSE, LossType.RESCALED_MSE])
@pytest.mark.parametrize("var_type", LEARNED)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_bound_trains_the_variance_only_beside_a_squared_error(prediction, var_type, loss_type):
    x_start, noise, output = data((5, 1, 2, 3), seed=8)
    output.requires_grad_()
    diffusion = make(mean=prediction, var=var_type, loss=loss_type)
    terms = diffusion.training_losses(answering(output), x_start, torch.arange(5), noise=noise)
    bound, = torch.autograd.grad(terms["vb"].sum(), output, retain_graph=True)
    assert (bound[:, 0] == 0).all() and (bound[:, 1] != 0).all()
    error, = torch.autograd.grad(terms["mse"].sum(), output, retain_graph=True)
    assert (error[:, 0] != 0).all() and (error[:, 1] == 0).all()
    both, = torch.autograd.grad(terms["loss"].sum(), output)
    torch.testing.assert_close(both, bound + error)


def test_bound_alone_trains_the_mean_too():
    x_start, noise, output = data((5, 1, 2, 3), seed=9)
    output.requires_grad_()
    diffusion = make(var=ModelVarType.LEARNED_RANGE, loss=LossType.RESCALED_KL)
    diffusion.training_losses(answering(output), x_start, torch.arange(5), noise=noise)["loss"].sum().backward()
    assert (output.grad != 0).all()


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predicted_mask_of_the_losses_is_unclipped_and_carries_its_gradient(prediction):
    x_start, noise, output = data((5, 1, 2, 3), seed=10)
    output.requires_grad_()
    t = torch.arange(5)
    diffusion = make(mean=prediction, var=ModelVarType.LEARNED_RANGE)
    predicted = diffusion.training_losses(answering(output), x_start, t, noise=noise)["pred_xstart"]
    x_t = diffusion.q_sample(x_start, t, noise)
    for i in range(5):
        torch.testing.assert_close(predicted[i], x_start_reference(prediction, output[i, :1], x_t[i], i))
    assert predicted.min() < 0 and predicted.max() > 1
    slope, = torch.autograd.grad(predicted.sum(), output)
    assert (slope[:, 0] != 0).all()


def test_fresh_noise_is_drawn_when_none_is_given():
    seen = []

    def model(x, timesteps):
        seen.append(x)
        return x

    torch.manual_seed(0)
    x_start = torch.zeros(2000, 1, 1, 1)
    for _ in range(2):
        make().training_losses(model, x_start, torch.full((2000,), 4))
    assert not torch.equal(*seen)
    assert seen[0].var().item() == pytest.approx(1 - abar(4), rel=0.15)


def test_perfect_network_has_no_squared_error():
    x_start, noise, _ = data((5, 1, 2, 3))
    for prediction in PREDICTIONS:
        truth = torch.stack([target_reference(prediction, x_start[i], noise[i], i) for i in range(5)])
        terms = make(mean=prediction).training_losses(answering(truth), x_start, torch.arange(5), noise=noise)
        assert (terms["mse"] < 1e-30).all()
        torch.testing.assert_close(terms["pred_xstart"], x_start, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (7, 1, 3, 8), (2, 3, 5, 1)])
@pytest.mark.parametrize("var_type", ModelVarType)
def test_any_batch_size_channel_count_and_shape_works(var_type, shape):
    x_start, noise, output = data(shape, dtype=torch.float32)
    output = output if var_type in LEARNED else output[:, :shape[1]]
    diffusion, t = make(var=var_type), torch.arange(shape[0]) % 5
    terms = diffusion.training_losses(answering(output), x_start, t, noise=noise)
    assert terms["loss"].shape == (shape[0],) and terms["pred_xstart"].shape == shape
    p = diffusion.p_mean_variance(answering(output), x_start, t)
    assert all(value.shape == shape and value.isfinite().all() for value in p.values())
    assert diffusion.prior_bpd(x_start).shape == (shape[0],)
    assert diffusion.p_sample_loop(answering(output), shape).shape == shape
    bound = diffusion.calc_bpd_loop(answering(output), x_start)
    assert bound["total_bpd"].shape == (shape[0],) and bound["vb"].shape == (shape[0], 5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loss_type", LossType)
def test_losses_and_gradients_of_wild_predictions_are_finite_at_both_ends_of_the_published_schedule(
        loss_type, prediction):
    x_start, noise, output = data((4, 1, 8, 8), dtype=torch.float32)
    output[:, 0] *= 1e4
    output.requires_grad_()
    diffusion = make(get_named_beta_schedule("linear", 1000), prediction, ModelVarType.LEARNED_RANGE, loss_type)
    loss = diffusion.training_losses(answering(output), x_start, torch.tensor([0, 1, 998, 999]), noise=noise)["loss"]
    loss.sum().backward()
    assert loss.isfinite().all() and output.grad.isfinite().all()


# ---- the whole bound ----

def test_prior_term_is_the_kl_of_the_last_marginal_to_a_standard_normal():
    x_start, _, _ = data((3, 1, 2, 3))
    left, variance = math.sqrt(abar(4)), 1 - abar(4)
    for row, result in zip(x_start, make().prior_bpd(x_start)):
        kl = [(variance + (left * value) ** 2 - 1 - math.log(variance)) / 2 for value in row.flatten().tolist()]
        assert result.item() == pytest.approx(sum(kl) / len(kl) / math.log(2), rel=1e-9)


def test_prior_term_of_the_published_schedule_is_next_to_nothing():
    assert make(get_named_beta_schedule("linear", 1000)).prior_bpd(torch.ones(1, 1, 4, 4)).item() < 1e-4


@pytest.mark.parametrize("var_type", [ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE])
@pytest.mark.parametrize("guess", ["truth", 0.5, 0.2])
def test_whole_bound_of_a_constant_guess_agrees_with_its_closed_form(guess, var_type):
    """The guess of x_0 does not depend on the noise, so neither does any term."""
    x_start, _, _ = data((3, 1, 4, 3), seed=11)
    guessed = x_start if guess == "truth" else torch.full_like(x_start, guess)
    diffusion = make(mean=ModelMeanType.START_X, var=var_type)
    result = diffusion.calc_bpd_loop(answering(guessed), x_start)
    for n in range(3):
        expected = [bound_reference(ModelMeanType.START_X, var_type, (guessed[n].flatten().tolist(), [0.0] * 12),
                                    x_start[n].flatten().tolist(), [0.3] * 12, t) for t in range(5)]
        np.testing.assert_allclose(result["vb"][n], expected, rtol=1e-8, atol=1e-10)
        square = ((guessed[n] - x_start[n]) ** 2).mean().item()
        np.testing.assert_allclose(result["xstart_mse"][n], [square] * 5, atol=1e-12)
        ratio = [abar(t) / (1 - abar(t)) for t in range(5)]  # of the two errors
        np.testing.assert_allclose(result["mse"][n], [square * r for r in ratio], rtol=1e-8, atol=1e-12)
        prior = diffusion.prior_bpd(x_start)[n].item()
        assert result["prior_bpd"][n].item() == prior
        assert result["total_bpd"][n].item() == pytest.approx(sum(expected) + prior, rel=1e-8)
    if guess == "truth" and var_type == ModelVarType.FIXED_SMALL:
        assert (result["vb"][:, 1:].abs() < 1e-12).all()


def test_denoiser_that_knows_the_mask_pays_for_the_prior_only():
    """With many small steps the decoder is sure, and a noise-predicting cheat makes no error anywhere."""
    x_start, _, _ = data((2, 1, 4, 4), seed=12)
    betas = get_named_beta_schedule("linear", 50)
    diffusion = make(betas)

    def cheat(x_t, t):
        return torch.stack([(x - math.sqrt(abar(i, betas.tolist())) * x0) / math.sqrt(1 - abar(i, betas.tolist()))
                            for x, x0, i in zip(x_t, x_start, t.tolist())])

    result = diffusion.calc_bpd_loop(cheat, x_start)
    torch.testing.assert_close(result["total_bpd"], diffusion.prior_bpd(x_start), atol=1e-9, rtol=0)
    assert (result["mse"] < 1e-18).all() and (result["xstart_mse"] < 1e-18).all()


def test_whole_bound_clips_unless_told_not_to():
    x_start = torch.ones(1, 1, 2, 2)
    diffusion = make(mean=ModelMeanType.START_X)
    model = answering(torch.full((1, 1, 2, 2), 3.0))
    assert (diffusion.calc_bpd_loop(model, x_start)["xstart_mse"] == 0).all()
    assert (diffusion.calc_bpd_loop(model, x_start, clip_denoised=False)["xstart_mse"] == 4).all()


# ---- what the network sees ----

@pytest.mark.parametrize("rescale, seen", [(False, [0, 1, 2, 3, 4]), (True, [0, 200, 400, 600, 800])])
def test_rescaled_timesteps_run_to_1000_whatever_the_number_of_steps(rescale, seen):
    shown = []

    def model(x, timesteps):
        shown.extend(timesteps.tolist())
        return x

    x = torch.zeros(5, 1, 2, 2)
    make(rescale_timesteps=rescale).p_mean_variance(model, x, torch.arange(5))
    make(rescale_timesteps=rescale).training_losses(model, x, torch.arange(5))
    assert shown == pytest.approx(seen * 2)


def test_model_kwargs_reach_the_network_everywhere():
    images = []

    def model(x, timesteps, image):
        images.append(image)
        return x

    kwargs = {"image": torch.ones(2, 4, 3, 3)}
    x, diffusion = torch.zeros(2, 1, 3, 3), make()
    diffusion.training_losses(model, x, torch.tensor([0, 1]), kwargs)
    diffusion.p_mean_variance(model, x, torch.tensor([0, 1]), model_kwargs=kwargs)
    diffusion.calc_bpd_loop(model, x, model_kwargs=kwargs)
    diffusion.p_sample_loop(model, x.shape, model_kwargs=kwargs)
    diffusion.ddim_sample_loop(model, x.shape, model_kwargs=kwargs)
    assert len(images) == 2 + 3 * 5 and all(image is kwargs["image"] for image in images)


def test_output_in_bfloat16_is_taken_over_into_the_precision_of_x():
    x_start, noise, output = data((5, 1, 4, 4), dtype=torch.float32)
    terms = make(var=ModelVarType.LEARNED_RANGE).training_losses(
        answering(output.bfloat16()), x_start, torch.arange(5), noise=noise)
    exact = make(var=ModelVarType.LEARNED_RANGE).training_losses(
        answering(output.bfloat16().float()), x_start, torch.arange(5), noise=noise)
    assert terms["loss"].dtype == torch.float32
    assert torch.equal(terms["loss"], exact["loss"])


# ---- creation from flags ----

def test_defaults_are_the_published_ones():
    diffusion = create_gaussian_diffusion()
    assert diffusion.num_timesteps == 1000
    np.testing.assert_allclose(diffusion.betas, np.linspace(0.0001, 0.02, 1000), rtol=1e-9)
    assert (diffusion.model_mean_type, diffusion.model_var_type, diffusion.loss_type) == (
        ModelMeanType.EPSILON, ModelVarType.FIXED_LARGE, LossType.MSE)
    assert diffusion.x_range == (0, 1) and not diffusion.rescale_timesteps


@pytest.mark.parametrize("flags, attribute, value", [
    ({"learn_sigma": True}, "model_var_type", ModelVarType.LEARNED_RANGE),
    ({"predict_xstart": True}, "model_mean_type", ModelMeanType.START_X),
    ({"prediction": "xstart"}, "model_mean_type", ModelMeanType.START_X),
    ({"prediction": "v"}, "model_mean_type", "v"),
    ({"sigma_small": True}, "model_var_type", ModelVarType.FIXED_SMALL),
    ({"sigma_small": True, "learn_sigma": True}, "model_var_type", ModelVarType.LEARNED_RANGE),
    ({"use_kl": True}, "loss_type", LossType.RESCALED_KL),
    ({"use_kl": True, "rescale_learned_sigmas": True}, "loss_type", LossType.RESCALED_KL),
    ({"rescale_learned_sigmas": True}, "loss_type", LossType.RESCALED_MSE),
    ({"rescale_timesteps": True}, "rescale_timesteps", True),
    ({"diffusion_steps": 50}, "num_timesteps", 50),
    ({"steps": 50}, "num_timesteps", 50),
    ({"timestep_respacing": "ddim25"}, "num_timesteps", 25),
    ({"timestep_respacing": "ddim25"}, "original_num_steps", 1000),
])
def test_each_diffusion_flag_does_what_it_says(flags, attribute, value):
    assert getattr(create_gaussian_diffusion(**flags), attribute) == value
    assert getattr(create_gaussian_diffusion(), attribute) != value or attribute == "original_num_steps"


def test_noise_schedule_flag_chooses_the_betas():
    np.testing.assert_allclose(create_gaussian_diffusion(noise_schedule="cosine", steps=30).betas,
                               get_named_beta_schedule("cosine", 30), rtol=1e-9)


@pytest.mark.parametrize("flags, name", [
    ({"steps": 20}, "diffusion_steps"), ({"timestep_respacing": "2000"}, "timestep_respacing"),
    ({"timestep_respacing": "ddim7x"}, "timestep_respacing")])
def test_flags_that_make_no_process_are_refused_by_name(flags, name):
    with pytest.raises(InputError, match=f"--{name}"):
        create_gaussian_diffusion(**flags)


def test_unknown_diffusion_flag_is_a_type_error():
    with pytest.raises(TypeError, match="noise_shedule"):
        create_gaussian_diffusion(noise_shedule="linear")
