"""Running a diffusion process on a subset of its timesteps (Nichol & Dhariwal 2021, section 4)."""

import torch

from .gaussian_diffusion import GaussianDiffusion


def space_timesteps(num_timesteps, section_counts):
    """The timesteps to keep of 0..num_timesteps-1, as an ascending list.

    :param section_counts: one number a section, as a list or as "10,15,20": the process is cut into equal sections
        and that many evenly spaced steps, ends included, are kept of each; "250" is one section.
        "ddimN" keeps N steps at a whole stride from 0, as in the DDIM paper. "" keeps all.
    :raises ValueError: if that many steps cannot be had.
    """
    if section_counts == "":
        return list(range(num_timesteps))
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


def _whole(text, whole_text):
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{whole_text!r} is not a number, a list of numbers, or ddim and a number") from None


class SpacedDiffusion(GaussianDiffusion):
    """The process that visits only `use_timesteps` of the one with the given betas.

    Its betas are such that q(x_t | x_0) at a kept timestep is unchanged; the network still sees the original
    timesteps. Other parameters as GaussianDiffusion's.
    """

    def __init__(self, use_timesteps, *, betas, **kwargs):
        betas = torch.as_tensor(betas, dtype=torch.float64)
        kept = torch.tensor(sorted(set(use_timesteps)))
        alphas_cumprod = (1 - betas).cumprod(0)[kept]
        previous = torch.cat([betas.new_ones(1), alphas_cumprod[:-1]])
        super().__init__(betas=1 - alphas_cumprod / previous, timestep_map=kept, original_num_steps=len(betas),
                         **kwargs)
