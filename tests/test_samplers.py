"""Samplers, on data whose exact denoiser is known, and with a real U-Net."""

import math

import pytest
import torch

from guided_diffusion import samplers
from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from guided_diffusion.predictions import PREDICTIONS
from guided_diffusion.respace import SpacedDiffusion, space_timesteps
from guided_diffusion.samplers import SAMPLERS
from guided_diffusion.script_util import create_gaussian_diffusion, create_model

MEAN, STD = 0.3, 0.5  # of every pixel of the data, if nothing else is said
ABAR = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64), 0)


def make(respacing="", mean=ModelMeanType.START_X, var=ModelVarType.FIXED_SMALL):
    return SpacedDiffusion(space_timesteps(1000, respacing), betas=get_named_beta_schedule("linear", 1000),
                           model_mean_type=mean, model_var_type=var, loss_type=LossType.MSE)


def exact_denoiser(x, timesteps):
    """E[x_0 | x_t] for x_0 ~ N(MEAN, STD^2): the mean, moved by the regression of x_0 on x_t."""
    abar = ABAR[timesteps].to(x.dtype).view(-1, 1, 1, 1)
    slope = STD ** 2 * abar.sqrt() / (STD ** 2 * abar + 1 - abar)
    return MEAN + slope * (x - abar.sqrt() * MEAN)


def exact_noise(x, timesteps):
    """E[eps | x_t] of the same data."""
    abar = ABAR[timesteps].to(x.dtype).view(-1, 1, 1, 1)
    return (x - abar.sqrt() * exact_denoiser(x, timesteps)) / (1 - abar).sqrt()


def exact_velocity(x, timesteps):
    """E[sqrt(abar) eps - sqrt(1 - abar) x_0 | x_t] of the same data."""
    abar = ABAR[timesteps].to(x.dtype).view(-1, 1, 1, 1)
    return abar.sqrt() * exact_noise(x, timesteps) - (1 - abar).sqrt() * exact_denoiser(x, timesteps)


EXACT = {"eps": exact_noise, "xstart": exact_denoiser, "v": exact_velocity}


def wavy_denoiser(x, timesteps):
    """Some smooth function of x and t that is no line in x."""
    return torch.sin(2 * x) + 0.001 * timesteps.view(-1, 1, 1, 1)


def gaussian(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def no_noise(x):
    pytest.fail("noise was drawn")


def end(steps):
    return samplers.last(steps, None)


# ---- the right distribution ----

WALKS = {
    "ancestral, small variance": (samplers.ancestral, ModelVarType.FIXED_SMALL, {}),
    "ancestral, large variance": (samplers.ancestral, ModelVarType.FIXED_LARGE, {}),
    "ddim": (samplers.ddim, ModelVarType.FIXED_SMALL, {}),
    "ddim, eta 0.5": (samplers.ddim, ModelVarType.FIXED_SMALL, {"eta": 0.5}),
    "ddim, eta 1": (samplers.ddim, ModelVarType.FIXED_SMALL, {"eta": 1.0}),
    "dpm++": (samplers.dpm_solver, ModelVarType.FIXED_SMALL, {}),
    "dpm++sde": (samplers.dpm_solver_sde, ModelVarType.FIXED_SMALL, {}),
    "heun": (samplers.heun, ModelVarType.FIXED_SMALL, {}),
}


@pytest.mark.parametrize("predicts", PREDICTIONS)
@pytest.mark.parametrize("walk", WALKS)
def test_samples_have_the_mean_and_variance_of_the_data(walk, predicts):
    walk, var, options = WALKS[walk]
    diffusion = make(mean=predicts, var=var)
    torch.manual_seed(0)
    n = 4000
    x = end(walk(diffusion, EXACT[predicts], gaussian((4, 1, 25, 40)), clip_denoised=False, **options))
    assert abs(x.mean().item() - MEAN) < 5 * STD / math.sqrt(n)
    assert abs(x.var().item() / STD ** 2 - 1) < 5 * math.sqrt(2 / n)


def test_every_sampler_is_among_these_walks():
    assert set(SAMPLERS.values()) == {walk for walk, *_ in WALKS.values()}


@pytest.mark.parametrize("respacing", ["50", "10,15,20", "ddim25", "1"])
def test_respaced_ddim_contracts_gaussian_data_as_computed_by_hand(respacing):
    """Its error with few steps is known, too: the denoiser is a line, so each step is one."""
    kept = space_timesteps(1000, respacing)
    factor, offset = 1.0, 0.0  # x = factor * x_T + offset
    for t, previous in zip(kept[::-1], [*kept[-2::-1], None]):
        now, before = ABAR[t].item(), 1.0 if previous is None else ABAR[previous].item()
        slope = STD ** 2 * math.sqrt(now) / (STD ** 2 * now + 1 - now)
        mask = [slope * factor, MEAN + slope * (offset - math.sqrt(now) * MEAN)]  # the predicted x_0
        eps = [(x - math.sqrt(now) * m) / math.sqrt(1 - now) for x, m in zip((factor, offset), mask)]
        factor, offset = (math.sqrt(before) * m + math.sqrt(1 - before) * e for m, e in zip(mask, eps))
    x = gaussian((2, 1, 5, 4))
    result = end(samplers.ddim(make(respacing), exact_denoiser, x, clip_denoised=False))
    torch.testing.assert_close(result, factor * x + offset, rtol=1e-8, atol=1e-8)


def test_ddim_carries_each_pixel_to_its_quantile():
    """The deterministic flow of Gaussian data is known: x_0 = MEAN + STD * x_T, up to the last signal in x_T."""
    x = gaussian((1, 1, 8, 8))
    result = end(samplers.ddim(make(), exact_denoiser, x, clip_denoised=False))
    torch.testing.assert_close(result, MEAN + STD * x, atol=0.02, rtol=0)


# ---- steps ----

def injected(walk, diffusion, model, **options):
    """The standard deviation of the noise that each step adds, in the order of the walk.

    Two walks that differ in the noise of one step only differ by its scale right after it.
    """
    def outcomes(values):
        values = iter(values)
        steps = walk(diffusion, model, gaussian((1, 1, 2, 2)), clip_denoised=False,
                     noise=lambda x: torch.full_like(x, next(values)), **options)
        return [x for x, _ in steps]

    count = diffusion.num_timesteps
    silent = outcomes([0.0] * count)
    return [(outcomes([0.0] * i + [1.0] + [0.0] * count)[i] - silent[i]).mean().item() for i in range(count)]


def posterior_variance(diffusion, t):
    """Of q(x_{t-1} | x_t, x_0), from the two Gaussians it is the product of."""
    if t == 0:
        return 0.0
    before, now = (math.prod((1 - diffusion.betas[:i]).tolist()) for i in (t, t + 1))
    alpha = now / before
    return 1 / (1 / (1 - before) + alpha / (1 - alpha))


@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_ddim_adds_eta_times_the_deviation_of_the_posterior(eta):
    diffusion = make("12")
    expected = [eta * math.sqrt(posterior_variance(diffusion, t)) for t in reversed(range(12))]
    assert injected(samplers.ddim, diffusion, wavy_denoiser, eta=eta) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("var", [ModelVarType.FIXED_SMALL, ModelVarType.FIXED_LARGE])
def test_ancestral_steps_add_the_deviation_of_p_and_the_last_none(var):
    diffusion = make("12", var=var)
    variances = [0.0, *(posterior_variance(diffusion, t) if var == ModelVarType.FIXED_SMALL else
                        diffusion.betas[t].item() for t in range(1, 12))]
    expected = [math.sqrt(v) for v in reversed(variances)]
    assert injected(samplers.ancestral, diffusion, wavy_denoiser) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("clip", [False, True])
def test_ddim_with_eta_1_takes_the_steps_of_ancestral_sampling(clip):
    """Equal in exact arithmetic with the small variance, whatever the denoiser."""
    diffusion, walks = make("20"), []
    for walk, options in ((samplers.ancestral, {}), (samplers.ddim, {"eta": 1.0})):
        generator = torch.Generator().manual_seed(1)

        def noise(x, generator=generator):
            return torch.randn(x.shape, generator=generator, dtype=x.dtype)

        walks.append([*walk(diffusion, wavy_denoiser, gaussian((2, 1, 3, 4)), noise=noise, clip_denoised=clip,
                            **options)])
    assert len(walks[0]) == 20
    for (x, x_start), (other, other_start) in zip(*walks):
        torch.testing.assert_close(other, x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(other_start, x_start, rtol=1e-8, atol=1e-8)


def test_ddim_step_moves_along_its_predictions():
    """Eq. 12 of the paper, without noise: the predicted x_0 and noise, mixed anew for the step before."""
    diffusion = make("5")
    x = gaussian((2, 1, 3, 3))
    walk = samplers.ddim(diffusion, wavy_denoiser, x, clip_denoised=False)
    kept = space_timesteps(1000, "5")
    for i, (result, x_start) in zip(reversed(range(5)), walk):
        now, before = ABAR[kept[i]], ABAR[kept[i - 1]] if i else torch.tensor(1.0)
        expected = wavy_denoiser(x, torch.full((2,), kept[i]))
        torch.testing.assert_close(x_start, expected)
        eps = (x - now.sqrt() * expected) / (1 - now).sqrt()
        x = before.sqrt() * expected + (1 - before).sqrt() * eps
        torch.testing.assert_close(result, x)


def test_ddim_without_eta_draws_no_noise():
    diffusion, x = make("20"), gaussian((1, 1, 4, 4))
    first, second = (end(samplers.ddim(diffusion, wavy_denoiser, x, noise=no_noise)) for _ in range(2))
    assert torch.equal(first, second)


def test_last_step_ends_at_the_predicted_mask():
    diffusion = make("6")
    for walk in (samplers.ancestral, samplers.ddim):
        x, x_start = [*walk(diffusion, wavy_denoiser, gaussian((1, 1, 4, 4)))][-1]
        torch.testing.assert_close(x, x_start)
        assert x_start.min() >= 0 and x_start.max() <= 1


def test_samplers_leave_the_noise_they_start_from_alone():
    x = gaussian((1, 1, 4, 4))
    for walk in (samplers.ancestral, samplers.ddim, samplers.ddim_reverse):
        end(walk(make("6"), wavy_denoiser, x))
    assert torch.equal(x, gaussian((1, 1, 4, 4)))


@pytest.mark.parametrize("walk", [samplers.ancestral, samplers.ddim, samplers.ddim_reverse])
def test_denoised_fn_and_clipping_reach_every_step(walk):
    diffusion, x = make("6"), gaussian((1, 1, 4, 4))
    for _, x_start in walk(diffusion, wavy_denoiser, x, denoised_fn=lambda v: 100 * v.abs() + 2):
        assert (x_start == 1).all()
    for _, x_start in walk(diffusion, wavy_denoiser, x, clip_denoised=False, denoised_fn=lambda v: 0 * v + 2):
        assert (x_start == 2).all()


# ---- and back ----

def test_ddim_forward_undoes_ddim_backward_better_with_more_steps():
    x_start = MEAN + STD * gaussian((1, 1, 8, 8))
    errors = []
    for respacing in ("10", "40", "160", "640"):
        diffusion = make(respacing)
        latent = end(samplers.ddim_reverse(diffusion, exact_denoiser, x_start, clip_denoised=False))
        back = end(samplers.ddim(diffusion, exact_denoiser, latent, clip_denoised=False))
        errors.append((back - x_start).abs().max().item())
    assert all(finer < coarser / 2 for coarser, finer in zip(errors, errors[1:]))
    assert errors[-1] < 0.02


def test_ddim_backward_leads_to_the_noise_of_each_quantile():
    x_start = MEAN + STD * gaussian((1, 1, 8, 8))
    latent = end(samplers.ddim_reverse(make(), exact_denoiser, x_start, clip_denoised=False))
    torch.testing.assert_close(latent, gaussian((1, 1, 8, 8)), atol=0.05, rtol=0)


# ---- loops ----

def loops(diffusion):
    return diffusion.p_sample_loop, diffusion.ddim_sample_loop


@pytest.mark.parametrize("shape", [(1, 1, 4, 4), (3, 1, 2, 6), (2, 3, 5, 4)])
def test_loops_return_the_shape_asked_for(shape):
    for loop in loops(make("5")):
        x = loop(wavy_denoiser, shape)
        assert x.shape == shape and x.dtype == torch.float32 and not x.requires_grad


def test_loops_start_from_gaussian_noise():
    seen = []

    def model(x, timesteps):
        seen.append(x)
        return x

    torch.manual_seed(0)
    for loop in loops(make("2")):
        loop(model, (4, 1, 50, 50))
    for x in seen[::2]:
        assert abs(x.mean().item()) < 0.05 and abs(x.var().item() - 1) < 0.08
    assert not torch.equal(seen[0], seen[2])


def test_noise_given_to_a_loop_is_where_it_starts():
    x = gaussian((2, 1, 4, 4), dtype=torch.float32)
    for loop in loops(make("5")):
        seen = []

        def model(x, timesteps, seen=seen):
            seen.append(x)
            return wavy_denoiser(x, timesteps)

        loop(model, x.shape, noise=x)
        assert torch.equal(seen[0], x)
    ddim = make("5").ddim_sample_loop
    assert torch.equal(ddim(wavy_denoiser, x.shape, noise=x), ddim(wavy_denoiser, x.shape, noise=x))
    assert not torch.equal(ddim(wavy_denoiser, x.shape, noise=x), ddim(wavy_denoiser, x.shape, noise=-x))


def test_loops_do_what_their_samplers_do():
    diffusion, x = make("8"), gaussian((1, 1, 4, 4))
    for loop, walk, options in ((diffusion.p_sample_loop, samplers.ancestral, {}),
                                (diffusion.ddim_sample_loop, samplers.ddim, {"eta": 0.7})):
        for clip in (False, True):
            torch.manual_seed(3)
            expected = end(walk(diffusion, wavy_denoiser, x, clip_denoised=clip, **options))
            torch.manual_seed(3)
            assert torch.equal(loop(wavy_denoiser, x.shape, noise=x, clip_denoised=clip, **options), expected)


def test_progress_shows_a_bar_over_all_steps(capsys):
    for loop in loops(make("7")):
        quiet = loop(wavy_denoiser, (1, 1, 2, 2), noise=torch.ones(1, 1, 2, 2))
        assert capsys.readouterr().err == ""
        shown = loop(wavy_denoiser, (1, 1, 2, 2), noise=torch.ones(1, 1, 2, 2), progress=True)
        assert "/7 [" in capsys.readouterr().err
        assert shown.shape == quiet.shape


def test_sampling_keeps_no_graph():
    model = torch.nn.Conv2d(1, 1, 3, padding=1)
    for loop in loops(make("3")):
        assert not loop(lambda x, t: model(x), (1, 1, 4, 4)).requires_grad


# ---- with a U-Net ----

@pytest.mark.parametrize("learn_sigma", [False, True])
@pytest.mark.parametrize("respacing, count", [("250", 250), ("10,15,20", 45), ("ddim25", 25)])
def test_respaced_process_trains_and_samples_with_a_unet(respacing, count, learn_sigma):
    torch.manual_seed(0)
    model = create_model(image_size=8, num_channels=32, channel_mult="1", num_res_blocks=1, attention_resolutions="",
                         learn_sigma=learn_sigma, image_channels=1)
    diffusion = create_gaussian_diffusion(timestep_respacing=respacing, learn_sigma=learn_sigma)
    assert diffusion.num_timesteps == count
    image, mask = torch.rand(3, 1, 8, 8), torch.randint(0, 2, (3, 1, 8, 8)).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        loss = diffusion.training_losses(
            model, mask, torch.tensor([0, count // 2, count - 1]), model_kwargs={"image": image})["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert any((p.grad != 0).any() for p in model.input_blocks.parameters())
    loop = diffusion.p_sample_loop if learn_sigma else diffusion.ddim_sample_loop
    x = loop(model.eval(), (1, 1, 8, 8), model_kwargs={"image": image[:1]})
    assert x.shape == (1, 1, 8, 8) and x.isfinite().all() and x.min() >= 0 and x.max() <= 1
