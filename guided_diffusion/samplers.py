"""Ways to walk from noise to a mask.

Each is a generator with one signature: it takes a GaussianDiffusion, a denoiser and x, walks over the steps of the
process, and yields (x, predicted x_0) after each, both [N, C, H, W]. `noise(x)` draws Gaussian noise of the shape
of x; give your own to fix the randomness of every row apart from the others.
"""

import torch
from tqdm.auto import tqdm


@torch.no_grad()
def ancestral(diffusion, model, x, *, noise=torch.randn_like, clip_denoised=True, denoised_fn=None,
              model_kwargs=None):
    """x_{t-1} ~ p(x_{t-1} | x_t) for t = T-1 .. 0 (Ho et al. 2020, arXiv 2006.11239, algorithm 2).

    The last step takes the mean.
    """
    for t in reversed(range(diffusion.num_timesteps)):
        p = diffusion.p_mean_variance(model, x, _batch(t, x), clip_denoised, denoised_fn, model_kwargs)
        x = p["mean"]
        if t > 0:
            x = x + (0.5 * p["log_variance"]).exp() * noise(x)
        yield x, p["pred_xstart"]


@torch.no_grad()
def ddim(diffusion, model, x, *, noise=torch.randn_like, clip_denoised=True, denoised_fn=None, model_kwargs=None,
         eta=0.0):
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


@torch.no_grad()
def ddim_reverse(diffusion, model, x, *, clip_denoised=True, denoised_fn=None, model_kwargs=None):
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


def last(steps, total, progress=False):
    """Run a sampler to its end and return its last x; `progress` shows a bar over its `total` steps."""
    for x, _ in progress_bar(steps, progress, total):
        pass
    return x


def progress_bar(iterable, show, total=None):
    return tqdm(iterable, total=total, leave=False) if show else iterable


def _batch(t, x):
    return torch.full((len(x),), t, device=x.device)
