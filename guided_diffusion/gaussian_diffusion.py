"""Gaussian diffusion of a mask: schedules, q, p, and the losses that train p.

Equation numbers: [DDPM] Ho et al. 2020 (arXiv 2006.11239); [iDDPM] Nichol & Dhariwal 2021 (arXiv 2102.09672).
The diffusion variable is x, [N, C, H, W], with C = 1 for masks; whatever else the denoiser sees (the scan)
travels in `model_kwargs` and is none of this module's business.
"""

import enum
import math
from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from . import samplers
from .losses import NATS_PER_BIT, discretized_gaussian_log_likelihood, normal_kl
from .nn import mean_flat
from .predictions import PREDICTIONS
from .samplers import Kwargs, Model, OnMasks
from .system.registry import Registry


class ModelMeanType(enum.StrEnum):
    """What the network predicts: the published names of two entries of PREDICTIONS."""

    EPSILON = "eps"
    START_X = "xstart"


class ModelVarType(enum.Enum):
    """The variance of p(x_{t-1} | x_t)."""

    FIXED_SMALL = enum.auto()  # that of the posterior q(x_{t-1} | x_t, x_0)
    FIXED_LARGE = enum.auto()  # beta_t
    LEARNED = enum.auto()  # the network's second half is its logarithm
    LEARNED_RANGE = enum.auto()  # the network's second half interpolates between small (-1) and large (1)


class LossType(enum.Enum):
    MSE = enum.auto()  # squared error, plus the bound's term if the variance is learned
    RESCALED_MSE = enum.auto()  # likewise, the bound's term scaled by T / 1000
    KL = enum.auto()  # the bound's term alone
    RESCALED_KL = enum.auto()  # likewise, times T: an estimate of the whole bound

    def is_bound(self) -> bool:
        return self in (LossType.KL, LossType.RESCALED_KL)


SCHEDULES = Registry("noise_schedule")  # number of timesteps T -> betas, [T] float64


@SCHEDULES.add("linear", "betas from 0.0001 to 0.02")
def linear_betas(num_timesteps: int) -> Tensor:
    """[DDPM] section 4: betas from 0.0001 to 0.02 for T = 1000; other T scale both ends by 1000 / T, so that x_T is
    equally noisy. It needs T > 20, else the last beta reaches 1."""
    scale = 1000 / num_timesteps
    if scale * 0.02 >= 1:
        raise ValueError(f"the linear schedule needs more than 20 steps, not {num_timesteps}")
    return torch.linspace(scale * 0.0001, scale * 0.02, num_timesteps, dtype=torch.float64)


@SCHEDULES.add("cosine", "the share of signal falls as a squared cosine")
def cosine_betas(num_timesteps: int) -> Tensor:
    """[iDDPM] eq. 17."""
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alphas_cumprod = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - alphas_cumprod[1:] / alphas_cumprod[:-1]).clamp(max=0.999)


def get_named_beta_schedule(name: str, num_timesteps: int) -> Tensor:
    """Betas of one of SCHEDULES, [T] float64; ValueError if there is none of this name, or none of so many steps."""
    if name not in SCHEDULES:
        raise ValueError(f"no noise schedule is called {name!r}: use {' or '.join(SCHEDULES)}")
    return SCHEDULES[name](num_timesteps)


class GaussianDiffusion:
    """The forward process q, the reverse process p of a denoiser, and the losses between them.

    A denoiser is any callable model(x_t, timesteps, **model_kwargs) -> [N, C, H, W], or [N, 2C, H, W] if the
    variance is learned.

    :param betas: [T], each in (0, 1).
    :param model_mean_type: what the denoiser predicts, a name of PREDICTIONS.
    :param x_range: the values that x_0 spans: background and foreground. `clip_denoised` clips to it.
    :param levels: number of values x_0 takes, evenly spaced over x_range; a mask has two.
    :param rescale_timesteps: hand the network timesteps scaled to 0..1000 whatever T.
    :param timestep_map: the network's own timestep for each step here (see respace), [T]; default 0..T-1.
    :param original_num_steps: the T the network was trained with, default that of betas.
    """

    def __init__(self, *, betas: ArrayLike, model_mean_type: str, model_var_type: ModelVarType, loss_type: LossType,
                 x_range: tuple[float, float] = (0.0, 1.0), levels: int = 2, rescale_timesteps: bool = False,
                 timestep_map: ArrayLike | None = None, original_num_steps: int | None = None):
        betas = torch.as_tensor(betas, dtype=torch.float64)
        if betas.ndim != 1 or not ((betas > 0) & (betas < 1)).all():
            raise ValueError("betas must be one row of numbers in (0, 1)")
        self.model_mean_type, self.prediction = model_mean_type, PREDICTIONS[model_mean_type]
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.x_range = x_range
        self.levels = levels
        self.rescale_timesteps = rescale_timesteps
        self.num_timesteps = len(betas)
        self.original_num_steps = original_num_steps or len(betas)
        self.timestep_map = torch.arange(len(betas)) if timestep_map is None else torch.as_tensor(timestep_map)

        self.betas = betas
        alphas = 1 - betas
        self.alphas_cumprod = alphas.cumprod(0)
        self.alphas_cumprod_prev = torch.cat([betas.new_ones(1), self.alphas_cumprod[:-1]])
        self.alphas_cumprod_next = torch.cat([self.alphas_cumprod[1:], betas.new_zeros(1)])
        # roots and logarithms are taken here, in float64: 1 - abar has few digits left in float32
        self.sqrt_alphas_cumprod = self.alphas_cumprod.sqrt()
        self.sqrt_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).sqrt()
        self.log_one_minus_alphas_cumprod = (1 - self.alphas_cumprod).log()

        # q(x_{t-1} | x_t, x_0), [DDPM] eq. 6 and 7
        remaining = 1 - self.alphas_cumprod
        self.posterior_variance = betas * (1 - self.alphas_cumprod_prev) / remaining
        self.posterior_mean_coef1 = betas * self.alphas_cumprod_prev.sqrt() / remaining
        self.posterior_mean_coef2 = (1 - self.alphas_cumprod_prev) * alphas.sqrt() / remaining
        # that variance is 0 at t = 0; its logarithm there is that of t = 1
        second = self.posterior_variance[1:2] if len(betas) > 1 else betas
        self.posterior_log_variance_clipped = torch.cat([second, self.posterior_variance[1:]]).log()
        self.log_betas = betas.log()
        # as in [DDPM], the last step of FIXED_LARGE keeps the small variance: beta_0 would blur the result
        self.fixed_large_log_variance = torch.cat([second, betas[1:]]).log()
        self._on_device = {}

    def at(self, name: str, t: Tensor, like: Tensor) -> Tensor:
        """Row t, [N], of the [T] table called `name`, shaped [N, 1, 1, 1], in the dtype and on the device of `like`."""
        key = (name, like.device, like.dtype)
        if key not in self._on_device:
            self._on_device[key] = getattr(self, name).to(like.device, like.dtype)
        return self._on_device[key][t].view(-1, *[1] * (like.ndim - 1))

    # ---- q ----

    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and log-variance of q(x_t | x_0), [DDPM] eq. 4."""
        mean = self.at("sqrt_alphas_cumprod", t, x_start) * x_start
        log_variance = self.at("log_one_minus_alphas_cumprod", t, x_start).expand_as(mean)
        return mean, log_variance.exp(), log_variance

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, [N, C, H, W]."""
        noise = torch.randn_like(x_start) if noise is None else noise
        return (self.at("sqrt_alphas_cumprod", t, x_start) * x_start
                + self.at("sqrt_one_minus_alphas_cumprod", t, x_start) * noise)

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, variance and clipped log-variance of q(x_{t-1} | x_t, x_0), [DDPM] eq. 7."""
        mean = (self.at("posterior_mean_coef1", t, x_t) * x_start
                + self.at("posterior_mean_coef2", t, x_t) * x_t)
        variance = self.at("posterior_variance", t, x_t).expand_as(mean)
        log_variance = self.at("posterior_log_variance_clipped", t, x_t).expand_as(mean)
        return mean, variance, log_variance

    def predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The x_0 for which x_t has the noise eps: [DDPM] eq. 4 solved for x_0."""
        return ((x_t - self.at("sqrt_one_minus_alphas_cumprod", t, x_t) * eps)
                / self.at("sqrt_alphas_cumprod", t, x_t))

    def predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, x_start: Tensor) -> Tensor:
        """The noise that leads from x_0 to x_t: [DDPM] eq. 4 solved for eps."""
        return ((x_t - self.at("sqrt_alphas_cumprod", t, x_t) * x_start)
                / self.at("sqrt_one_minus_alphas_cumprod", t, x_t))

    # ---- p ----

    def run_model(self, model: Model, x: Tensor, t: Tensor, model_kwargs: Kwargs = None) -> Tensor:
        """The network's raw output at step t of this process, in the precision of x.

        A copy: a compiled network may write its next output over this one.
        """
        key = ("timestep_map", t.device)
        if key not in self._on_device:
            self._on_device[key] = self.timestep_map.to(t.device)
        timesteps = self._on_device[key][t]
        if self.rescale_timesteps:
            timesteps = timesteps.float() * (1000.0 / self.original_num_steps)
        return model(x, timesteps, **(model_kwargs or {})).to(x.dtype, copy=True)

    def p_mean_variance(self, model: Model, x: Tensor, t: Tensor, clip_denoised: bool = True,
                        denoised_fn: OnMasks | None = None, model_kwargs: Kwargs = None) -> dict[str, Tensor]:
        """p(x_{t-1} | x_t) and the prediction of x_0, as a dict of [N, C, H, W]: mean, variance, log_variance,
        pred_xstart.

        :param t: [N] steps of this process, 0..T-1.
        :param clip_denoised: clip the predicted x_0 into x_range and a LEARNED_RANGE log-variance between its bounds.
        :param denoised_fn: applied to the predicted x_0 before it is clipped.
        """
        output = self.run_model(model, x, t, model_kwargs)
        return self.p_from_output(output, x, t, clip_denoised, denoised_fn)

    def p_from_output(self, output: Tensor, x: Tensor, t: Tensor, clip_denoised: bool = True,
                      denoised_fn: OnMasks | None = None) -> dict[str, Tensor]:
        """As p_mean_variance, from the network's output at (x, t)."""
        learned = self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
        channels = x.shape[1]
        if output.shape != (len(x), channels * (2 if learned else 1), *x.shape[2:]):
            raise ValueError(f"the denoiser returned {list(output.shape)} for an x of {list(x.shape)}"
                             f" with {self.model_var_type.name} variance")
        prediction, variance_output = output[:, :channels], output[:, channels:]

        small = self.at("posterior_log_variance_clipped", t, x)
        if self.model_var_type == ModelVarType.LEARNED:
            log_variance = variance_output
        elif self.model_var_type == ModelVarType.LEARNED_RANGE:  # [iDDPM] eq. 15
            fraction = (variance_output + 1) / 2
            if clip_denoised:
                fraction = fraction.clamp(0, 1)
            log_variance = fraction * self.at("log_betas", t, x) + (1 - fraction) * small
        elif self.model_var_type == ModelVarType.FIXED_SMALL:
            log_variance = small.expand_as(x)
        else:
            log_variance = self.at("fixed_large_log_variance", t, x).expand_as(x)

        prediction = self.prediction.x_start(self, prediction, x, t)
        if denoised_fn is not None:
            prediction = denoised_fn(prediction)
        if clip_denoised:
            prediction = prediction.clamp(*self.x_range)
        mean, _, _ = self.q_posterior_mean_variance(prediction, x, t)
        return {"mean": mean, "variance": log_variance.exp(), "log_variance": log_variance, "pred_xstart": prediction}

    def p_sample_loop(self, model: Model, shape: Sequence[int], *, device: torch.device | str | None = None,
                      model_kwargs: Kwargs = None, clip_denoised: bool = True, noise: Tensor | None = None,
                      progress: bool = False) -> Tensor:
        """Ancestral sampling from x_T ~ N(0, 1) (or `noise`) to x_0, all steps; see samplers.ancestral."""
        x = torch.randn(shape, device=device) if noise is None else noise
        steps = samplers.ancestral(self, model, x, clip_denoised=clip_denoised, model_kwargs=model_kwargs)
        return samplers.last(steps, self.num_timesteps, progress)

    def ddim_sample_loop(self, model: Model, shape: Sequence[int], *, device: torch.device | str | None = None,
                         model_kwargs: Kwargs = None, clip_denoised: bool = True, noise: Tensor | None = None,
                         progress: bool = False, eta: float = 0.0) -> Tensor:
        """DDIM sampling from x_T ~ N(0, 1) (or `noise`) to x_0, all steps; see samplers.ddim."""
        x = torch.randn(shape, device=device) if noise is None else noise
        steps = samplers.ddim(self, model, x, clip_denoised=clip_denoised, model_kwargs=model_kwargs, eta=eta)
        return samplers.last(steps, self.num_timesteps, progress)

    # ---- losses ----

    def _bound_term(self, p, x_start, x_t, t):
        """L_t of the bound in bits per dimension, [N]: a KL for t > 0, the decoder's likelihood at t = 0."""
        true_mean, _, true_log_variance = self.q_posterior_mean_variance(x_start, x_t, t)
        kl = mean_flat(normal_kl(true_mean, true_log_variance, p["mean"], p["log_variance"]))
        decoder_nll = -mean_flat(discretized_gaussian_log_likelihood(
            x_start, p["mean"], 0.5 * p["log_variance"], self.x_range, self.levels))
        return torch.where(t == 0, decoder_nll, kl) / NATS_PER_BIT

    def training_losses(self, model: Model, x_start: Tensor, t: Tensor, model_kwargs: Kwargs = None,
                        noise: Tensor | None = None) -> dict[str, Tensor]:
        """Losses of one step t each, as a dict of [N]: loss; mse and vb where the loss type has them.

        Also "pred_xstart", [N, C, H, W]: the unclipped prediction of x_0, with its gradient.
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        x_t = self.q_sample(x_start, t, noise)
        output = self.run_model(model, x_t, t, model_kwargs)
        p = self.p_from_output(output, x_t, t, clip_denoised=False)
        if self.loss_type.is_bound():
            loss = self._bound_term(p, x_start, x_t, t)
            if self.loss_type == LossType.RESCALED_KL:
                loss = loss * self.num_timesteps
            return {"loss": loss, "vb": loss, "pred_xstart": p["pred_xstart"]}

        channels = x_start.shape[1]
        target = self.prediction.target(self, x_start, noise, t)
        terms = {"mse": mean_flat((target - output[:, :channels]) ** 2), "pred_xstart": p["pred_xstart"]}
        terms["loss"] = terms["mse"]
        if self.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE):
            # the bound trains the variance only; the mean is left to the squared error ([iDDPM] section 3.1)
            frozen = torch.cat([output[:, :channels].detach(), output[:, channels:]], dim=1)
            p = self.p_from_output(frozen, x_t, t, clip_denoised=False)
            terms["vb"] = self._bound_term(p, x_start, x_t, t)
            if self.loss_type == LossType.RESCALED_MSE:
                terms["vb"] = terms["vb"] * (self.num_timesteps / 1000.0)
            terms["loss"] = terms["mse"] + terms["vb"]
        return terms

    def prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) in bits per dimension, [N]: what the schedule leaves undestroyed."""
        t = torch.full((len(x_start),), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        zero = torch.zeros_like(mean)
        return mean_flat(normal_kl(mean, log_variance, zero, zero)) / NATS_PER_BIT

    @torch.no_grad()
    def calc_bpd_loop(self, model: Model, x_start: Tensor, clip_denoised: bool = True, model_kwargs: Kwargs = None,
                      progress: bool = False) -> dict[str, Tensor]:
        """The whole variational bound of x_start, term by term, in bits per dimension.

        Returns a dict: total_bpd, prior_bpd [N]; vb, xstart_mse, mse [N, T], column t for step t.
        """
        terms = {"vb": [], "xstart_mse": [], "mse": []}
        for step in samplers.progress_bar(range(self.num_timesteps), progress):
            t = torch.full((len(x_start),), step, device=x_start.device)
            noise = torch.randn_like(x_start)
            x_t = self.q_sample(x_start, t, noise)
            p = self.p_mean_variance(model, x_t, t, clip_denoised, model_kwargs=model_kwargs)
            eps = self.predict_eps_from_xstart(x_t, t, p["pred_xstart"])
            terms["vb"].append(self._bound_term(p, x_start, x_t, t))
            terms["xstart_mse"].append(mean_flat((p["pred_xstart"] - x_start) ** 2))
            terms["mse"].append(mean_flat((eps - noise) ** 2))
        terms = {name: torch.stack(values, dim=1) for name, values in terms.items()}
        prior = self.prior_bpd(x_start)
        return {"total_bpd": terms["vb"].sum(1) + prior, "prior_bpd": prior, **terms}
