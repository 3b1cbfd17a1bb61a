"""What the network predicts, and how the mask x_0 follows from it.

An entry has two functions, both [N, C, H, W] -> [N, C, H, W]; `diffusion` is the GaussianDiffusion, t the steps, [N].
"""

from typing import Any, Protocol

from torch import Tensor

from .system.registry import Registry

PREDICTIONS = Registry("prediction")

Diffusion = Any  # a GaussianDiffusion, whose module imports this one


class Prediction(Protocol):
    """One parametrisation of the denoiser."""

    @staticmethod
    def target(diffusion: Diffusion, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is trained to return for x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise."""

    @staticmethod
    def x_start(diffusion: Diffusion, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The x_0 that an output of the network means at x_t."""


@PREDICTIONS.add("eps", "the noise, as published")
class Epsilon:
    """Ho et al. 2020 (arXiv 2006.11239), section 3.2."""

    @staticmethod
    def target(diffusion: Diffusion, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise

    @staticmethod
    def x_start(diffusion: Diffusion, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return diffusion.predict_xstart_from_eps(x_t, t, output)


@PREDICTIONS.add("xstart", "the mask")
class XStart:
    """Ho et al. 2020, section 3.2."""

    @staticmethod
    def target(diffusion: Diffusion, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return x_start

    @staticmethod
    def x_start(diffusion: Diffusion, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return output


@PREDICTIONS.add("v", "the velocity v = sqrt(abar) noise - sqrt(1 - abar) x_0")
class Velocity:
    """Salimans and Ho 2022 (arXiv 2202.00512), section 4 and appendix D."""

    @staticmethod
    def target(diffusion: Diffusion, x_start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return (diffusion.at("sqrt_alphas_cumprod", t, x_start) * noise
                - diffusion.at("sqrt_one_minus_alphas_cumprod", t, x_start) * x_start)

    @staticmethod
    def x_start(diffusion: Diffusion, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        return (diffusion.at("sqrt_alphas_cumprod", t, x_t) * x_t
                - diffusion.at("sqrt_one_minus_alphas_cumprod", t, x_t) * output)
