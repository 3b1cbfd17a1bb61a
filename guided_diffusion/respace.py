"""Running a diffusion process on a subset of its timesteps (Nichol & Dhariwal 2021, section 4)."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike

from .gaussian_diffusion import GaussianDiffusion

SPACINGS = ("uniform", "trailing", "quadratic", "logsnr")
# where a mask of zeros and ones is decided: above, the noise hides hardly a pixel; below, it hides the whole
LOGSNR_RANGE = (2.0, -6.0)


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int], alphas_cumprod: np.ndarray | None = None
                    ) -> list[int]:
    """The timesteps to keep of 0..num_timesteps-1, as an ascending list.

    :param section_counts: one number a section, as a list or as "10,15,20": the process is cut into equal sections
        and that many evenly spaced steps, ends included, are kept of each; "250" is one section.
        "ddimN" keeps N steps at a whole stride from 0, as in the DDIM paper. "uniformN", "trailingN", "quadraticN"
        and "logsnrN" keep N down from the last one, see spread_timesteps. "" keeps all.
    :param alphas_cumprod: [T], needed for "logsnrN".
    :raises ValueError: if that many steps cannot be had.
    """
    if section_counts == "":
        return list(range(num_timesteps))
    spread = re.fullmatch(f"({'|'.join(SPACINGS)})(\\d+)", str(section_counts))
    if spread:
        return spread_timesteps(num_timesteps, int(spread[2]), spread[1], alphas_cumprod)
    if isinstance(section_counts, str) and section_counts.startswith("ddim"):
        count = _whole(section_counts[4:], section_counts)
        for stride in range(1, num_timesteps + 1):
            if len(range(0, num_timesteps, stride)) == count:
                return list(range(0, num_timesteps, stride))
        raise ValueError(f"no whole stride takes {count} of {num_timesteps} steps")
    if isinstance(section_counts, str):
        section_counts = [_whole(count, section_counts) for count in section_counts.split(",")]
    size, extra = divmod(num_timesteps, len(section_counts))
    steps, start = [], 0
    for i, count in enumerate(section_counts):
        length = size + (i < extra)
        if not 1 <= count <= length:
            raise ValueError(f"cannot keep {count} steps of a section of {length}")
        stride = (length - 1) / (count - 1) if count > 1 else 1
        steps += [start + round(k * stride) for k in range(count)]
        start += length
    return steps


def spread_timesteps(num_timesteps: int, count: int, spacing: str, alphas_cumprod: np.ndarray | None = None
                     ) -> list[int]:
    """`count` timesteps of 0..num_timesteps-1 for a sampler, ascending; the last one is always among them.

    "uniform": evenly down to 0. "trailing": evenly, but the first lies as far from 0 as the others from each other, so
    no call is spent on an x_t almost without noise (Lin et al. 2024, arXiv 2305.08891, section 3.3). "quadratic":
    evenly in the square root, so more with little noise (Song et al. 2021, arXiv 2010.02502, appendix D.3). "logsnr":
    evenly in log(abar / (1 - abar)) (Lu et al. 2022, arXiv 2206.00927) over LOGSNR_RANGE, but for the last one.
    Steps that coincide when rounded move to the next that is free.

    :raises ValueError: if that many steps cannot be had.
    """
    if not 1 <= count <= num_timesteps:
        raise ValueError(f"cannot keep {count} of {num_timesteps} steps")
    if spacing == "uniform" and count > 1:
        return space_timesteps(num_timesteps, [count])
    share = np.linspace(0, 1, count) if count > 1 else np.ones(1)
    if spacing == "trailing":
        places = num_timesteps * np.arange(1, count + 1) / count - 1
    elif spacing == "logsnr":
        logsnr = np.log(alphas_cumprod / (1 - alphas_cumprod))  # falls with t
        places = np.interp(-np.interp(share, (0, 1), LOGSNR_RANGE), -logsnr, np.arange(num_timesteps))
        places[-1] = num_timesteps - 1
    else:
        places = (num_timesteps - 1) * share ** 2
    steps = places.round().astype(int)
    for i in range(1, count):  # distinct from below, then within the end from above
        steps[i] = max(steps[i], steps[i - 1] + 1)
    return np.minimum(steps, num_timesteps - count + np.arange(count)).tolist()


def _whole(text, whole_text):
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{whole_text!r} is not a number, a list of numbers, or a number behind ddim,"
                         f" {', '.join(SPACINGS[:-1])} or {SPACINGS[-1]}") from None


class SpacedDiffusion(GaussianDiffusion):
    """The process that visits only `use_timesteps` of the one with the given betas.

    Its betas are such that q(x_t | x_0) at a kept timestep is unchanged; the network still sees the original
    timesteps. Other parameters as GaussianDiffusion's.
    """

    def __init__(self, use_timesteps: Iterable[int], *, betas: ArrayLike, **kwargs: Any):
        betas = torch.as_tensor(betas, dtype=torch.float64)
        kept = torch.tensor(sorted(set(use_timesteps)))
        alphas_cumprod = (1 - betas).cumprod(0)[kept]
        previous = torch.cat([betas.new_ones(1), alphas_cumprod[:-1]])
        super().__init__(betas=1 - alphas_cumprod / previous, timestep_map=kept, original_num_steps=len(betas),
                         **kwargs)
