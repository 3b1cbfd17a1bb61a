"""The samplers as solvers: how fast their error falls, what they do exactly, and what each costs.

Most data here are Gaussian, x_0 ~ N(MEAN, STD^2) for every pixel, for which the best denoiser and the path of every
pixel are known. Processes have 100,000 timesteps, so that steps can be put where lambda = log(alpha / sigma) wants
them.
"""

import functools
import math

import numpy as np
import pytest
import torch

from guided_diffusion import samplers
from guided_diffusion.data.noise import MemberNoise
from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from guided_diffusion.predictions import PREDICTIONS
from guided_diffusion.respace import SpacedDiffusion
from guided_diffusion.samplers import SAMPLERS, network_calls
from guided_diffusion.script_util import create_gaussian_diffusion

MEAN, STD = 0.3, 0.5
DETERMINISTIC = ["ddim", "dpm++", "heun"]
STOCHASTIC = ["ancestral", "dpm++sde"]
SCHEDULES = ["linear", "cosine"]


@functools.cache
def levels(schedule, steps=100_000):
    """alpha and sigma of every timestep."""
    abar = (1 - get_named_beta_schedule(schedule, steps)).cumprod(0)
    return abar.sqrt(), (1 - abar).sqrt()


def make(timesteps, schedule="cosine", mean=ModelMeanType.START_X, var=ModelVarType.FIXED_SMALL):
    return SpacedDiffusion(timesteps, betas=get_named_beta_schedule(schedule, 100_000), model_mean_type=mean,
                           model_var_type=var, loss_type=LossType.MSE)


def even_in_lambda(schedule, steps, low=-3.0, high=3.0):
    """Timesteps, ascending, with `steps` equal steps of lambda between them."""
    alpha, sigma = levels(schedule)
    wanted = np.linspace(low, high, steps + 1)
    found = np.interp(-wanted, -(alpha / sigma).log().numpy(), np.arange(len(alpha)))
    return sorted(found.round().astype(int).tolist())


def uneven(count=8):
    """Timesteps whose steps in lambda all differ."""
    return np.geomspace(300, 99_000, count).astype(int).tolist()


def level(schedule, timesteps):
    alpha, sigma = levels(schedule)
    return alpha[timesteps].view(-1, 1, 1, 1), sigma[timesteps].view(-1, 1, 1, 1)


# what a network that predicts this returns where it takes x_0 to be x_start
OUTPUTS = {
    "eps": lambda x, x_start, alpha, sigma: (x - alpha * x_start) / sigma,
    "xstart": lambda x, x_start, alpha, sigma: x_start,
    "v": lambda x, x_start, alpha, sigma: alpha * (x - alpha * x_start) / sigma - sigma * x_start,
}


class Exact:
    """The best denoiser of the Gaussian data in any of PREDICTIONS; more channels hold what a variance might."""

    def __init__(self, schedule, predicts="xstart", learned=False):
        self.schedule, self.predicts, self.learned = schedule, predicts, learned

    def __call__(self, x, timesteps):
        alpha, sigma = level(self.schedule, timesteps)
        x_start = MEAN + alpha * STD ** 2 / (alpha ** 2 * STD ** 2 + sigma ** 2) * (x - alpha * MEAN)
        output = OUTPUTS[self.predicts](x, x_start, alpha, sigma)
        return torch.cat([output, torch.sin(40 * x)], dim=1) if self.learned else output


def wavy(x, timesteps):
    """Some smooth function of x and t that is no line in x."""
    return torch.sin(2 * x) + 1e-5 * timesteps.view(-1, 1, 1, 1)


def gaussian(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def walk(name, diffusion, model, x, **options):
    """All (x, x_0) that a sampler yields, without clipping unless asked for."""
    return [*SAMPLERS[name](diffusion, model, x, **{"clip_denoised": False, **options})]


def no_noise(x):
    pytest.fail("noise was drawn")


# ---- order of accuracy ----

def flow(schedule, t, z):
    """Where the probability-flow ODE has the pixel of quantile z at timestep t."""
    alpha, sigma = (table[t] for table in levels(schedule))
    return alpha * MEAN + (alpha ** 2 * STD ** 2 + sigma ** 2).sqrt() * z


def orders(errors):
    """log2 of how many times smaller each error is than the one with half as many steps."""
    return [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]


def flow_error(name, schedule, steps, predicts, var=ModelVarType.FIXED_SMALL):
    """Largest error right before the last step, which is of first order in all of them."""
    timesteps, z = even_in_lambda(schedule, steps), gaussian((1, 1, 4, 6))
    diffusion = make(timesteps, schedule, predicts, var)
    model = Exact(schedule, predicts, var in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE))
    path = walk(name, diffusion, model, flow(schedule, timesteps[-1], z), noise=no_noise)
    return (path[-2][0] - flow(schedule, timesteps[0], z)).abs().max().item()


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name, order", [("ddim", 1), ("dpm++", 2), ("heun", 2)])
def test_error_falls_with_the_order_of_the_method(name, order, schedule, predicts):
    errors = [flow_error(name, schedule, steps, predicts) for steps in (20, 40, 80)]
    assert orders(errors) == pytest.approx([order] * 2, abs=0.1)
    assert errors[-1] < (0.03 if order == 1 else 0.001)


@pytest.mark.parametrize("var", [ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE, ModelVarType.FIXED_LARGE])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_variance_of_the_model_does_not_matter_to_deterministic_samplers(name, var):
    for predicts in PREDICTIONS:
        expected = flow_error(name, "linear", 10, predicts)
        assert flow_error(name, "linear", 10, predicts, var) == pytest.approx(expected, rel=1e-9)


def test_second_order_methods_are_far_ahead_with_as_many_network_calls():
    ddim, dpm, heun = (flow_error(name, "cosine", steps, "xstart") for name, steps in (("ddim", 40), ("dpm++", 40),
                                                                                   ("heun", 20)))
    assert dpm < ddim / 20 and heun < ddim / 3


def two_values(x, timesteps):
    """The best denoiser of data that are 0 or 1 with even chances."""
    alpha, sigma = level("cosine", timesteps)
    return torch.sigmoid(alpha * (x - alpha / 2) / sigma ** 2)


def two_values_flow(start, timesteps):
    """The ODE in one dimension keeps the order of all pixels, so each keeps its quantile; found by bisection."""
    def share_below(x, t):
        alpha, sigma = (table[t] for table in levels("cosine"))
        return (torch.special.ndtr(x / sigma) + torch.special.ndtr((x - alpha) / sigma)) / 2

    wanted, (low, high) = share_below(start, timesteps[-1]), (start - 5, start + 5)
    for _ in range(60):
        middle = (low + high) / 2
        above = share_below(middle, timesteps[0]) > wanted
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return middle


@pytest.mark.parametrize("name, order", [("ddim", 1), ("dpm++", 2), ("heun", 2)])
def test_order_is_the_same_for_data_whose_denoiser_is_no_line(name, order):
    errors, start = [], torch.linspace(-1.5, 1.5, 12, dtype=torch.float64).view(1, 1, 3, 4)
    for steps in (40, 80, 160):
        timesteps = even_in_lambda("cosine", steps, high=1.0)
        result = walk(name, make(timesteps), two_values, start)[-2][0]
        errors.append((result - two_values_flow(start, timesteps)).abs().mean().item())
    assert orders(errors) == pytest.approx([order] * 2, abs=0.15)


def moments_error(name, schedule, steps, predicts):
    """Error of mean and of variance right before the last step, without chance: a step is a line in x and its noise,
    so one row with neither, one for x_T and one for the noise of each step tell all."""
    timesteps = even_in_lambda(schedule, steps)
    x = torch.zeros(steps + 2, 1, 1, 1, dtype=torch.float64)
    x[1] = 1
    impulses = iter(torch.eye(steps + 2, dtype=torch.float64)[2:].view(steps, -1, 1, 1, 1))
    path = walk(name, make(timesteps, schedule, predicts), Exact(schedule, predicts), x,
                noise=lambda x: next(impulses))
    offset, *slopes = path[-2][0].flatten()
    slopes = torch.stack(slopes) - offset
    (alpha, sigma), (first_alpha, first_sigma) = ([table[t] for table in levels(schedule)]
                                                  for t in (timesteps[0], timesteps[-1]))
    start = first_alpha ** 2 * STD ** 2 + first_sigma ** 2
    mean = offset + slopes[0] * first_alpha * MEAN
    variance = slopes[0] ** 2 * start + (slopes[1:] ** 2).sum()
    return abs(mean - alpha * MEAN).item(), abs(variance - alpha ** 2 * STD ** 2 - sigma ** 2).item()


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name, order", [("ancestral", 1), ("dpm++sde", 2)])
def test_variance_comes_to_that_of_the_data_with_the_order_of_the_method(name, order, schedule, predicts):
    means, variances = zip(*(moments_error(name, schedule, steps, predicts) for steps in (40, 80, 160)))
    assert max(means) < 1e-12  # the denoiser is right on the path of the mean, whatever the steps
    assert orders(variances) == pytest.approx([order] * 2, abs=0.1)


@pytest.mark.parametrize("name, error", [("ancestral", 0.15), ("dpm++sde", 0.05)])
def test_drawn_samples_have_the_mean_and_variance_of_the_data(name, error):
    """The same with real noise, to the end, within what chance and the number of steps allow."""
    n, found = 20_000, []
    for steps in (10, 60):
        timesteps = even_in_lambda("cosine", steps, high=4.0)
        torch.manual_seed(0)
        start = flow("cosine", timesteps[-1], gaussian((2, 1, 100, 100)))
        x = walk(name, make(timesteps), Exact("cosine"), start)[-1][0]
        assert abs(x.mean().item() - MEAN) < 5 * STD / math.sqrt(n)
        found.append(abs(x.var().item() / STD ** 2 - 1))
    assert found[1] < error < found[0] + 0.05 and found[1] < found[0]


# ---- single steps ----

@pytest.mark.parametrize("name", DETERMINISTIC)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_deterministic_steps_are_exact_while_the_prediction_stays(name, schedule):
    """For a network that always sees the same x_0 the noise of x_t is never in doubt."""
    timesteps, start, mask = uneven(), gaussian((2, 2, 3, 5)), gaussian((2, 2, 3, 5), seed=1)
    (first_alpha, first_sigma), path = level(schedule, timesteps[-1:]), walk(
        name, make(timesteps, schedule), lambda x, t: mask, start, noise=no_noise)
    noise = (start - first_alpha * mask) / first_sigma
    for t, (x, x_start) in zip(timesteps[-2::-1], path):
        alpha, sigma = level(schedule, [t])
        torch.testing.assert_close(x, alpha * mask + sigma * noise, rtol=1e-10, atol=1e-10)
        assert torch.equal(x_start, mask)
    assert len(path) == len(timesteps) and torch.equal(path[-1][0], mask)


def given_x_start(before, now, mask):
    """Mean, a function of x_now, and variance of q(x_before | x_now, x_0), the product of two Gaussians; `before` and
    `now` are (alpha, sigma)."""
    ratio = now[0] / before[0]
    added = now[1] ** 2 - ratio ** 2 * before[1] ** 2
    variance = 1 / (1 / before[1] ** 2 + ratio ** 2 / added)
    return lambda x: variance * (before[0] * mask / before[1] ** 2 + ratio * x / added), variance


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", STOCHASTIC)
def test_stochastic_steps_draw_from_the_exact_conditional_while_the_prediction_stays(name, schedule):
    """Mean and deviation of q(x_{t-1} | x_t, x_0) by Bayes' rule: with noise of 0 a step gives the first, and with 1
    both together."""
    timesteps, mask = uneven(), gaussian((1, 1, 3, 4), seed=1)
    diffusion = make(timesteps, schedule)
    for value, noise in ((0, torch.zeros_like), (1, torch.ones_like)):
        x = gaussian((1, 1, 3, 4))
        path = walk(name, diffusion, lambda x, t: mask, x, noise=noise)
        for i, (result, _) in zip(reversed(range(1, len(timesteps))), path):
            mean, variance = given_x_start(level(schedule, timesteps[i - 1:i]), level(schedule, timesteps[i:i + 1]),
                                           mask)
            torch.testing.assert_close(result, mean(x) + value * variance.sqrt(), rtol=1e-8, atol=1e-8)
            x = result


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", ["dpm++", "dpm++sde", "heun"])
def test_second_order_steps_use_the_prediction_of_their_middle(name, schedule):
    """For predictions linear in lambda, over steps of all sizes. A step of constant x_0 with that of the middle is
    what extrapolation from the step before and the mean of both ends must give; dpm++ has no step before its first."""
    timesteps, x = uneven(), gaussian((1, 1, 3, 4))
    alpha, sigma = levels(schedule)
    logs = (alpha / sigma).log()

    def model(x, timesteps):
        return (2 - 0.3 * logs[timesteps]).view(-1, 1, 1, 1).expand_as(x)

    path = walk(name, make(timesteps, schedule), model, x, noise=torch.zeros_like)
    for i, (result, x_start) in zip(reversed(range(1, len(timesteps))), path):
        now, before = timesteps[i], timesteps[i - 1]
        first = i == len(timesteps) - 1 and name != "heun"
        target = 2 - 0.3 * (logs[now] if first else (logs[now] + logs[before]) / 2)
        if name == "dpm++sde":
            mean, _ = given_x_start((alpha[before], sigma[before]), (alpha[now], sigma[now]), target)
            expected = mean(x)
        else:
            expected = alpha[before] * target + sigma[before] * (x - alpha[now] * target) / sigma[now]
        torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(x_start, model(x, torch.tensor([now])))
        x = result


def test_second_call_of_heun_is_where_a_step_of_ddim_ends():
    timesteps, x, seen = uneven(3), gaussian((1, 1, 3, 4)), []

    def model(x, timesteps):
        seen.append(x)
        return wavy(x, timesteps)

    walk("heun", make(timesteps), model, x)
    expected = next(samplers.ddim(make(timesteps), wavy, x, clip_denoised=False))[0]
    torch.testing.assert_close(seen[1], expected)


def test_first_steps_without_a_past_are_those_of_the_first_order_methods():
    timesteps, x = uneven(), gaussian((2, 1, 3, 4))
    for solver, plain in (("dpm++", "ddim"), ("dpm++sde", "ancestral")):
        (result, x_start), (expected, same) = (
            walk(name, make(timesteps), wavy, x, noise=lambda x: gaussian(x.shape, seed=2))[0]
            for name in (solver, plain))
        torch.testing.assert_close(result, expected, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(x_start, same)


# ---- every sampler ----

@pytest.mark.parametrize("var", [ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_path_is_the_same_whatever_the_network_predicts(name, schedule, var):
    """To the last step, for the same x_0 said in the words of each of PREDICTIONS."""
    timesteps = even_in_lambda(schedule, 12)
    noises = [gaussian((2, 1, 3, 4), seed) for seed in range(1, 13)]
    paths = []
    for predicts in PREDICTIONS:
        left = iter(noises)
        paths.append(walk(name, make(timesteps, schedule, predicts, var), Exact(schedule, predicts),
                          gaussian((2, 1, 3, 4)), noise=lambda x, left=left: next(left)))
    assert len(paths) == len(OUTPUTS) == 3
    for steps in zip(*paths, strict=True):
        (x, x_start), *others = steps
        for other, other_start in others:
            torch.testing.assert_close(other, x, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(other_start, x_start, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SAMPLERS)
def test_last_step_ends_at_the_predicted_mask(name):
    path = walk(name, make(uneven()), wavy, gaussian((2, 1, 4, 3)), clip_denoised=True)
    x, x_start = path[-1]
    torch.testing.assert_close(x, x_start, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x_start, wavy(path[-2][0], torch.tensor(uneven()[:1])).clamp(0, 1))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("timestep", [99_999, 400, 0])
def test_one_step_gives_the_prediction_at_it(name, timestep):
    x = gaussian((2, 1, 4, 3))
    (result, x_start), = walk(name, make([timestep]), wavy, x, noise=no_noise)
    torch.testing.assert_close(result, wavy(x, torch.tensor([timestep])), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x_start, result, rtol=1e-9, atol=1e-9)


def test_table_names_every_walk_of_the_command_line():
    assert dict(SAMPLERS) == {
        "ancestral": samplers.ancestral, "ddim": samplers.ddim, "dpm++": samplers.dpm_solver,
        "dpm++sde": samplers.dpm_solver_sde, "heun": samplers.heun}


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("name", SAMPLERS)
def test_network_calls_are_as_many_as_the_table_says_and_at_these_timesteps(name, count):
    timesteps, seen = uneven(7)[:count], []

    def model(x, timesteps):
        assert timesteps.shape == (3,) and len(set(timesteps.tolist())) == 1
        seen.append(timesteps[0].item())
        return wavy(x, timesteps)

    path = walk(name, make(timesteps), model, gaussian((3, 1, 2, 2)))
    assert len(path) == count
    assert len(seen) == network_calls(SAMPLERS[name], count) == (2 * count - 1 if name == "heun" else count)
    twice = [t for t in timesteps[::-1] for _ in range(2)]  # where a step ends, then where the next starts
    assert seen == (twice[1:] if name == "heun" else timesteps[::-1])


@pytest.mark.parametrize("name, options, draws", [
    ("ancestral", {}, 5), ("ddim", {}, 0), ("ddim", {"eta": 0.5}, 5), ("dpm++", {}, 0), ("dpm++sde", {}, 5),
    ("heun", {}, 0)])
def test_noise_is_drawn_once_a_step_but_the_last_and_only_if_it_is_used(name, options, draws):
    drawn = []

    def noise(x):
        drawn.append(x.shape)
        return torch.randn_like(x)

    x, state = gaussian((2, 1, 3, 4)), torch.get_rng_state()
    walk(name, make(uneven(6)), wavy, x, noise=noise, **options)
    assert drawn == [(2, 1, 3, 4)] * draws
    if not draws:
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_of_torch_is_used_unless_another_is_given(name):
    results = []
    for seed, options in ((0, {}), (0, {"noise": torch.randn_like}), (1, {})):
        torch.manual_seed(seed)
        results.append(walk(name, make(uneven()), wavy, gaussian((1, 1, 3, 4)), **options)[-1][0])
    assert torch.equal(results[0], results[1]) and not torch.allclose(results[0], results[2], atol=1e-3)


@pytest.mark.parametrize("name", SAMPLERS)
def test_row_with_noise_of_its_own_does_not_depend_on_the_other_rows(name):
    def draw(members):
        noise = MemberNoise(0, members)
        x = noise(torch.empty(len(members), 1, 5, 4))
        return walk(name, make(uneven()), wavy, x, noise=noise)[-1][0]

    together = draw([("a", 0), ("b", 0), ("b", 1)])
    for i, member in enumerate([("a", 0), ("b", 0), ("b", 1)]):
        assert torch.equal(draw([member])[0], together[i])
        assert torch.equal(draw([("c", 9), member])[1], together[i])


@pytest.mark.parametrize("name", SAMPLERS)
def test_channels_and_pixels_of_oblong_images_are_all_treated_alike(name):
    """A denoiser that looks at one pixel at a time makes any shape a rearrangement of one row."""
    x = gaussian((2, 3, 5, 4))
    noises = [gaussian(x.shape, seed) for seed in range(1, 9)]

    def draw(shape):
        left = iter(noises)
        return walk(name, make(uneven()), wavy, x.reshape(shape), noise=lambda x: next(left).reshape(shape))

    for (result, x_start), (flat, flat_start) in zip(draw((2, 3, 5, 4)), draw((1, 1, 1, 120)), strict=True):
        assert result.shape == x_start.shape == (2, 3, 5, 4)
        torch.testing.assert_close(result.flatten(), flat.flatten())
        torch.testing.assert_close(x_start.flatten(), flat_start.flatten())


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_goes_in_is_left_as_it_was_and_reaches_every_call(name):
    x, image, seen = gaussian((2, 1, 3, 4)), gaussian((2, 4, 3, 4), seed=1), []
    kwargs = {"image": image}

    def model(x, timesteps, image):
        seen.append(image)
        return wavy(x, timesteps) + image[:, :1]

    path = walk(name, make(uneven()), model, x, model_kwargs=kwargs)
    assert len(seen) == network_calls(SAMPLERS[name], 8) and all(value is image for value in seen)
    assert kwargs == {"image": image} and torch.equal(image, gaussian((2, 4, 3, 4), seed=1))
    assert torch.equal(x, gaussian((2, 1, 3, 4)))
    assert len({id(x) for x, _ in path}) == len({tuple(x.flatten().tolist()) for x, _ in path}) == 8  # no x is reused


@pytest.mark.parametrize("name", SAMPLERS)
def test_denoised_fn_and_clipping_reach_every_call(name):
    """x shows whether the calls whose prediction is not yielded have them, too: it is that of a constant x_0."""
    diffusion, x = make(uneven()), gaussian((1, 1, 4, 4))
    for clip, mask in ((False, torch.tensor([[[[2.0]]]])), (True, torch.tensor([[[[1.0]]]]))):
        options = {"clip_denoised": clip, "denoised_fn": lambda v: 0 * v + 2}
        expected = walk(name, diffusion, lambda x, t, mask=mask: mask.to(x).expand_as(x), x, noise=torch.zeros_like)
        got = walk(name, diffusion, wavy, x, noise=torch.zeros_like, **options)
        for (result, x_start), (wanted, _) in zip(got, expected, strict=True):
            assert (x_start == mask).all()
            torch.testing.assert_close(result, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SAMPLERS)
def test_masks_are_clipped_unless_asked_otherwise(name):
    def far(x, timesteps):
        return 3 * torch.sin(9 * x)

    masks = [x_start for _, x_start in SAMPLERS[name](make(uneven()), far, gaussian((1, 1, 4, 4)))]
    assert min(mask.min() for mask in masks) == 0 and max(mask.max() for mask in masks) == 1


@pytest.mark.parametrize("name", SAMPLERS)
def test_no_graph_is_kept(name):
    model = torch.nn.Conv2d(1, 1, 3, padding=1)
    for x, x_start in SAMPLERS[name](make(uneven()), lambda x, t: model(x), torch.zeros(1, 1, 4, 4)):
        assert not x.requires_grad and not x_start.requires_grad


@pytest.mark.parametrize("predicts, tolerance", [("eps", 2e-4), ("xstart", 5e-6), ("v", 5e-6)])
@pytest.mark.parametrize("spacing", ["uniform", "trailing", "quadratic", "logsnr"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_ten_steps_of_a_cosine_schedule_are_close_to_exact_arithmetic_in_float32(name, spacing, predicts, tolerance):
    """Its last timestep has a signal of 1 in 20,000, the hardest place for a network that predicts noise."""
    diffusion = create_gaussian_diffusion(noise_schedule="cosine", timestep_respacing=f"{spacing}10",
                                          prediction=predicts)
    alpha, sigma = levels("cosine", 1000)

    def model(x, timesteps):
        a, s = (table[timesteps].to(x.dtype).view(-1, 1, 1, 1) for table in (alpha, sigma))
        x_start = MEAN + a * STD ** 2 / (a ** 2 * STD ** 2 + s ** 2) * (x - a * MEAN)
        return OUTPUTS[predicts](x, x_start, a, s)

    results = []
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(0)

        def noise(x, generator=generator):
            return torch.randn(x.shape, generator=generator).to(x)

        x = noise(torch.empty(2, 1, 8, 8, dtype=dtype))
        path = walk(name, diffusion, model, x, noise=noise, clip_denoised=True)
        assert all(x.dtype == x_start.dtype == dtype and x.isfinite().all() for x, x_start in path)
        results.append(path[-1][0])
    single, double = results
    assert (single - double).abs().max() < tolerance
