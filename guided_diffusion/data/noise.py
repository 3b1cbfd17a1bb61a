"""All that is random about an example or a mask follows from what it is for, by its place or its name.

In training from the seed and the place of the example in the stream, in sampling from the seed, the case and the number
of the member: so neither the size of a batch nor the number of processes changes it.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from .. import dist_util

# ---- training: by place in the stream ----

def draw_rater(seed: int, place: int, raters: int) -> int:
    """Which of so many raters the example at this place is learnt from, 0 ... raters - 1."""
    return int(np.random.default_rng([seed, 1, place]).integers(raters))


def place_generator(seed: int, place: int) -> np.random.Generator:
    """What the augmentation of the example at this place is drawn from."""
    return np.random.default_rng([seed, 2, place])


def window_generator(seed: int, place: int) -> np.random.Generator:
    """What the place of a window in the scan of the example at this place is drawn from."""
    return np.random.default_rng([seed, 3, place])


def step_noise(seed: int, places: Sequence[int], like: torch.Tensor) -> tuple[list[float], torch.Tensor]:
    """What picks the timesteps of the examples at these places, and their Gaussian noise.

    :param like: [N, ...] on the device, a row a place.
    :returns: N numbers in [0, 1), and noise of the shape, dtype and device of `like`.
    """
    generator = torch.Generator(like.device)
    uniforms, noise = [], torch.empty_like(like)
    for row, place in zip(noise, places):
        generator.manual_seed(_hash(seed, place))
        row.normal_(generator=generator)
        uniforms.append(_hash(seed, place, "t") / 2 ** 63)
    return uniforms, noise


def seed_dropout(seed: int, place: int) -> None:
    """Seed PyTorch's own generators, which dropout draws from, for a step whose first example is at this place."""
    torch.manual_seed(_hash(seed, place, "dropout"))


def _hash(*parts):
    """A number in 0 .. 2**63 - 1 from anything, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


# ---- sampling: by member of an ensemble ----

class MemberNoise:
    """Gaussian noise for a batch of ensemble members, each row from a generator of its own.

    A member's noise follows from (seed, case name, number of the member) alone, so neither the batch size nor the
    other rows nor the device change it.

    :param members: one (case name, number) a row.
    """

    def __init__(self, seed: int, members: Sequence[tuple[str, int]]):
        digests = [hashlib.sha256(repr((seed, *member)).encode()).digest() for member in members]
        self.generators = [np.random.default_rng(int.from_bytes(digest, "big")) for digest in digests]

    def __call__(self, like: torch.Tensor) -> torch.Tensor:
        """Fresh noise with the shape, dtype and device of `like`, [N, ...]."""
        rows = [generator.standard_normal(like.shape[1:], dtype=np.float32) for generator in self.generators]
        return dist_util.to_device(torch.from_numpy(np.stack(rows)), like.device).to(like.dtype)


def spread_noise(seed: int, members: Sequence[tuple[str, int]], size: int) -> torch.Tensor:
    """Standard normal numbers that the members of a case share out evenly: [N, size] float32, a row a member.

    Member i of a case is point i of a Sobol sequence, scrambled afresh for each (seed, case), through the quantile
    function of the normal distribution (Owen 1995). Over seeds each member alone is standard normal; the first 2^k of a
    case are balanced over the distribution, and a longer ensemble begins with the shorter one.
    """
    rows = torch.empty(len(members), size, dtype=torch.float64)
    for case in dict.fromkeys(case for case, _ in members):
        numbers = {i: member for i, (name, member) in enumerate(members) if name == case}
        sobol = torch.quasirandom.SobolEngine(size, scramble=True, seed=_hash(seed, case, "sobol"))
        first = min(numbers.values())
        sobol.fast_forward(first)
        points = sobol.draw(max(numbers.values()) - first + 1, dtype=torch.float64)
        rows[list(numbers)] = points[[member - first for member in numbers.values()]]
    # points are k / 2^30: the middle of their cell is neither 0 nor 1
    return torch.special.ndtri(rows + 2.0 ** -31).float()
