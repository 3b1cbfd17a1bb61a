"""The diffusion process of a method, and how its masks are drawn, from their flags."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np

from ..data import masks
from ..gaussian_diffusion import SCHEDULES, LossType, ModelVarType, get_named_beta_schedule
from ..predictions import PREDICTIONS
from ..respace import SPACINGS, SpacedDiffusion, space_timesteps
from ..samplers import SAMPLERS
from ..system.errors import InputError
from ..system.flag import Flag

# What --sampler best means; measured in docs/benchmarks.md
BEST: dict[str, Any] = {"sampler": "dpm++sde", "sampling_steps": 7, "timestep_spacing": "logsnr"}


class _SamplersAndBest(Mapping):
    """The choices of --sampler: those of SAMPLERS, and best."""

    def __getitem__(self, name):
        return SAMPLERS[BEST["sampler"] if name == "best" else name]

    def __iter__(self):
        return iter((*SAMPLERS, "best"))

    def __len__(self):
        return len(SAMPLERS) + 1

    def words(self):
        return f"{SAMPLERS.words()}; best: {BEST['sampler']} with {BEST['sampling_steps']} steps, see docs/sampling.md"


PROCESS_FLAGS = [
    Flag("learn_sigma", bool, False, "learn the variance of each denoising step, too", "diffusion"),
    Flag("diffusion_steps", int, 1000, "timesteps of the diffusion process", "diffusion", least=1, most=10 ** 6),
    Flag("noise_schedule", SCHEDULES, "linear", "how noise grows with the timestep", "diffusion"),
    Flag("timestep_respacing", str, "", 'use fewer timesteps: "250" evenly, "10,15,20" a third each, "ddim25" at a'
         ' whole stride, "trailing10", "quadratic10", "logsnr10" as --timestep_spacing; "" uses all', "diffusion"),
    Flag("use_kl", bool, False, "train on the variational bound instead of the squared error", "diffusion"),
    Flag("prediction", PREDICTIONS, "eps", "what the network predicts", "diffusion"),
    Flag("predict_xstart", bool, False, "the published spelling of --prediction xstart", "diffusion"),
    Flag("rescale_timesteps", bool, False, "hand the network timesteps scaled to 0..1000", "diffusion"),
    Flag("rescale_learned_sigmas", bool, False, "scale the variance's loss by diffusion_steps / 1000", "diffusion"),
]
WALK_FLAGS = [
    Flag("clip_denoised", bool, True, "clip the predicted mask to its range at every step", "sampling"),
    Flag("sampler", _SamplersAndBest(), "ancestral", "how to walk from noise to a mask", "sampling"),
    Flag("sampling_steps", int, 0, "steps of the sampler (0: those of timestep_respacing, every one by default)",
         "sampling", least=0),
    Flag("timestep_spacing", SPACINGS, "uniform", "where sampling_steps puts them: evenly down to 0; evenly, the last"
         " call a whole step before 0; evenly in the square root of t; evenly in the log-SNR where masks are decided",
         "sampling"),
    Flag("use_ddim", bool, False, "the published spelling of --sampler ddim", "sampling"),
]


def create_gaussian_diffusion(
    *, steps: int = 1000, learn_sigma: bool = False, sigma_small: bool = False, noise_schedule: str = "linear",
    use_kl: bool = False, predict_xstart: bool = False, rescale_timesteps: bool = False,
    rescale_learned_sigmas: bool = False, timestep_respacing: str = "", prediction: str = "",
    diffusion_steps: int | None = None,
) -> SpacedDiffusion:
    """The diffusion process of masks, with the names and defaults of the published function.

    :param sigma_small: without learn_sigma, the variance of the posterior rather than beta.
    :param prediction: a name of PREDICTIONS; predict_xstart is the published spelling of "xstart".
    :param diffusion_steps: the flag's name for `steps`.
    :raises InputError: for values that make no process, naming their flags.
    """
    steps = diffusion_steps or steps
    try:
        betas = get_named_beta_schedule(noise_schedule, steps)
    except ValueError as error:
        raise InputError(f"--diffusion_steps {steps}: {error}") from None
    try:
        use_timesteps = space_timesteps(steps, timestep_respacing, np.cumprod(1 - np.asarray(betas)))
    except ValueError as error:
        raise InputError(f"--timestep_respacing {timestep_respacing}: {error}") from None
    if use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if rescale_learned_sigmas else LossType.MSE
    fixed = ModelVarType.FIXED_SMALL if sigma_small else ModelVarType.FIXED_LARGE
    return SpacedDiffusion(
        use_timesteps, betas=betas, loss_type=loss_type, rescale_timesteps=rescale_timesteps, x_range=masks.RANGE,
        model_mean_type=_prediction(prediction, predict_xstart),
        model_var_type=ModelVarType.LEARNED_RANGE if learn_sigma else fixed)


def _prediction(prediction, predict_xstart):
    """The name of PREDICTIONS from both spellings; eps and "" are what stands there if nothing was chosen."""
    if predict_xstart and prediction not in ("", "eps", "xstart"):
        raise InputError(f"--predict_xstart True and --prediction {prediction}: choose one")
    return "xstart" if predict_xstart else prediction or "eps"


def diffusion_from_flags(flags: SimpleNamespace) -> SpacedDiffusion:
    """The diffusion process from all flags."""
    return create_gaussian_diffusion(**{flag.name: getattr(flags, flag.name) for flag in PROCESS_FLAGS})


def settle_prediction(flags: SimpleNamespace, given: dict) -> None:
    """Bring --prediction and its published spelling into agreement. :raises InputError: if they were given unlike."""
    if "prediction" in given and given.get("predict_xstart", given["prediction"] == "xstart") != (
            given["prediction"] == "xstart"):
        raise InputError(f"--predict_xstart {given['predict_xstart']} and --prediction {given['prediction']}: choose"
                         f" one")
    if "prediction" not in given:
        flags.prediction = _prediction(flags.prediction, flags.predict_xstart)
    flags.predict_xstart = flags.prediction == "xstart"


def settle_sampler(flags: SimpleNamespace, given: dict) -> None:
    """Settle sampler and timestep_respacing from all the flags that bear on them.

    :raises InputError: for flags that contradict each other.
    """
    def refuse(*names):
        clash = [f"--{name}" for name in names if name in given]
        if len(clash) == len(names):
            raise InputError(f"{' and '.join(clash)}: choose one")

    refuse("sampling_steps", "timestep_respacing")
    if flags.use_ddim and flags.sampler != "ddim":
        refuse("sampler", "use_ddim")
        flags.sampler = "ddim"
    if flags.sampler == "best":
        refuse("sampler", "timestep_respacing")
        refuse("sampler", "timestep_spacing")
        flags.sampler, flags.timestep_spacing = BEST["sampler"], BEST["timestep_spacing"]
        flags.sampling_steps = flags.sampling_steps or BEST["sampling_steps"]
    elif "timestep_spacing" in given and not flags.sampling_steps:
        raise InputError("--timestep_spacing: says where --sampling_steps lie; give that, too")
    if flags.sampler != "ddim" and "ddim_eta" in given:
        raise InputError("--ddim_eta: only DDIM has it; give --sampler ddim, too")
    if flags.sampling_steps:
        flags.timestep_respacing = f"{flags.timestep_spacing}{flags.sampling_steps}"
