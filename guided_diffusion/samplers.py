"""Ways to walk from noise to a mask.

Each is a generator with one signature: it takes a GaussianDiffusion, a denoiser and x, walks over the steps of the
process, and yields (x, predicted x_0) after each, both [N, C, H, W]. `noise(x)` draws Gaussian noise of the shape
of x; give your own to fix the randomness of every row apart from the others. A flag of a sampler, --<sampler>_<option>,
is its keyword <option>.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .system.flag import Flag
from .system.registry import Registry

SAMPLERS = Registry("sampler")

Diffusion = Any  # a GaussianDiffusion, whose module imports this one
Model = Callable[..., Tensor]  # model(x_t, timesteps, **model_kwargs)
Kwargs = dict[str, Any] | None  # what else the model is called with
OnMasks = Callable[[Tensor], Tensor]  # [N, C, H, W] -> [N, C, H, W]
Walk = Iterator[tuple[Tensor, Tensor]]  # x and the predicted x_0 after each step


def network_calls(walk: Callable, steps: int) -> int:
    """Network calls a mask that a sampler makes for so many steps: what its attribute `calls` says, else one a step."""
    return getattr(walk, "calls", int)(steps)


@SAMPLERS.add("ancestral", "as published")
@torch.no_grad()
def ancestral(diffusion: Diffusion, model: Model, x: Tensor, *, noise: OnMasks = torch.randn_like,
              clip_denoised: bool = True, denoised_fn: OnMasks | None = None, model_kwargs: Kwargs = None) -> Walk:
    """x_{t-1} ~ p(x_{t-1} | x_t) for t = T-1 .. 0 (Ho et al. 2020, arXiv 2006.11239, algorithm 2).

    The last step takes the mean.
    """
    for t in reversed(range(diffusion.num_timesteps)):
        p = diffusion.p_mean_variance(model, x, _batch(t, x), clip_denoised, denoised_fn, model_kwargs)
        x = p["mean"]
        if t > 0:
            x = x + (0.5 * p["log_variance"]).exp() * noise(x)
        yield x, p["pred_xstart"]


@SAMPLERS.add("ddim", "deterministic unless --ddim_eta adds noise", flags=[
    Flag("ddim_eta", float, 0.0, "noise of DDIM: 0 deterministic, 1 as much as ancestral steps", "sampling", least=0,
         most=1)])
@torch.no_grad()
def ddim(diffusion: Diffusion, model: Model, x: Tensor, *, noise: OnMasks = torch.randn_like,
         clip_denoised: bool = True, denoised_fn: OnMasks | None = None, model_kwargs: Kwargs = None,
         eta: float = 0.0) -> Walk:
    """Denoising diffusion implicit model (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16).

    eta 0 is deterministic given x; eta 1 has the variance of the posterior q(x_{t-1} | x_t, x_0).
    """
    for t in reversed(range(diffusion.num_timesteps)):
        t_batch = _batch(t, x)
        x_start = diffusion.p_mean_variance(model, x, t_batch, clip_denoised, denoised_fn, model_kwargs)["pred_xstart"]
        eps = diffusion.predict_eps_from_xstart(x, t_batch, x_start)
        abar_prev = diffusion.alphas_cumprod_prev[t].item()  # the tables live on the CPU: no device is waited for
        variance = eta ** 2 * diffusion.posterior_variance[t].item()
        x = abar_prev ** 0.5 * x_start + max(1 - abar_prev - variance, 0) ** 0.5 * eps
        if variance > 0:
            x = x + variance ** 0.5 * noise(x)
        yield x, x_start


@SAMPLERS.add("dpm++", "of second order")
@torch.no_grad()
def dpm_solver(diffusion: Diffusion, model: Model, x: Tensor, *, noise: OnMasks = torch.randn_like,
               clip_denoised: bool = True, denoised_fn: OnMasks | None = None, model_kwargs: Kwargs = None,
               stochastic: bool = False) -> Walk:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2): second order at one network call a step.

    It extrapolates x_0 from the last two predictions, linearly in half the log-SNR, lambda = log(alpha / sigma).
    `stochastic` is the SDE-DPM-Solver++(2M) of the same paper, which adds noise at every step but the last. The first
    step, with no earlier prediction, and the last, which goes to lambda = infinity, are of first order.
    """
    before = None  # the prediction of the step before, and how far that step went in lambda
    for t in reversed(range(diffusion.num_timesteps)):
        x_start = diffusion.p_mean_variance(
            model, x, _batch(t, x), clip_denoised, denoised_fn, model_kwargs)["pred_xstart"]
        (alpha, sigma), (alpha_next, sigma_next) = _level(diffusion, t), _level(diffusion, t - 1)
        if t == 0:
            yield x_start, x_start
            return
        step = math.log(alpha_next / sigma_next) - math.log(alpha / sigma)
        target = x_start
        if before is not None:
            previous, previous_step = before
            target = x_start + (x_start - previous) * (step / (2 * previous_step))
        decay = math.exp(-2 * step if stochastic else -step)
        x = sigma_next / sigma * math.exp(-step if stochastic else 0) * x + alpha_next * (1 - decay) * target
        if stochastic:
            x = x + sigma_next * (1 - decay) ** 0.5 * noise(x)
        before = x_start, step
        yield x, x_start


@SAMPLERS.add("dpm++sde", "dpm++ with noise")
def dpm_solver_sde(diffusion: Diffusion, model: Model, x: Tensor, **options: Any) -> Walk:
    """dpm_solver with fresh noise at every step."""
    return dpm_solver(diffusion, model, x, stochastic=True, **options)


@SAMPLERS.add("heun", "of second order, two network calls a step")
@torch.no_grad()
def heun(diffusion: Diffusion, model: Model, x: Tensor, *, noise: OnMasks = torch.randn_like,
         clip_denoised: bool = True, denoised_fn: OnMasks | None = None, model_kwargs: Kwargs = None) -> Walk:
    """Heun's second-order method: two network calls a step, one for the last; deterministic, `noise` is not used.

    As in EDM (Karras et al. 2022, arXiv 2206.00364, algorithm 1, without churn) each step is taken once with the
    prediction at its start and again with the mean of that and the one at its end. The mean is of x_0 rather than of
    the noise, over an exact solution for constant x_0 (eq. 9 of DPM-Solver++): EDM's form is linear in sigma / alpha,
    which a cosine schedule takes to 20,000.
    """
    def predict(x, t):
        return diffusion.p_mean_variance(
            model, x, _batch(t, x), clip_denoised, denoised_fn, model_kwargs)["pred_xstart"]

    for t in reversed(range(1, diffusion.num_timesteps)):
        (alpha, sigma), (alpha_next, sigma_next) = _level(diffusion, t), _level(diffusion, t - 1)
        ratio = sigma_next / sigma
        x_start = predict(x, t)
        ahead = predict(ratio * x + (alpha_next - ratio * alpha) * x_start, t - 1)
        x = ratio * x + (alpha_next - ratio * alpha) * (x_start + ahead) / 2
        yield x, x_start
    x_start = predict(x, 0)
    yield x_start, x_start


heun.calls = lambda steps: 2 * steps - 1


@torch.no_grad()
def ddim_reverse(diffusion: Diffusion, model: Model, x: Tensor, *, clip_denoised: bool = True,
                 denoised_fn: OnMasks | None = None, model_kwargs: Kwargs = None) -> Walk:
    """DDIM's ordinary differential equation backwards, from a mask x_0 to the noise x_T that would give it.

    Song et al. 2021, section 4.3. It follows the same path as ddim with eta 0 up to the error of the step size.
    """
    for t in range(diffusion.num_timesteps):
        t_batch = _batch(t, x)
        x_start = diffusion.p_mean_variance(model, x, t_batch, clip_denoised, denoised_fn, model_kwargs)["pred_xstart"]
        eps = diffusion.predict_eps_from_xstart(x, t_batch, x_start)
        abar_next = diffusion.alphas_cumprod_next[t].item()
        x = abar_next ** 0.5 * x_start + (1 - abar_next) ** 0.5 * eps
        yield x, x_start


def last(steps: Walk, total: int, progress: bool = False) -> Tensor:
    """Run a sampler to its end and return its last x; `progress` shows a bar over its `total` steps."""
    for x, _ in progress_bar(steps, progress, total):
        pass
    return x


def progress_bar(iterable: Iterable, show: bool, total: int | None = None) -> Iterable:
    return tqdm(iterable, total=total, leave=False) if show else iterable


def _batch(t, x):
    return torch.full((len(x),), t, device=x.device)


def _level(diffusion, t):
    """alpha and sigma of q(x_t | x_0) = N(alpha x_0, sigma^2) as floats; step -1 is x_0 itself."""
    if t < 0:
        return 1.0, 0.0
    return diffusion.sqrt_alphas_cumprod[t].item(), diffusion.sqrt_one_minus_alphas_cumprod[t].item()
