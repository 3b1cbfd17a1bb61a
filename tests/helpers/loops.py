"""Training loops in one process, on cases in memory."""

import json

import numpy as np
import torch

from guided_diffusion.data.cases import Case
from guided_diffusion.data.masks import pack
from guided_diffusion.data.stream import ShuffledCases, to_floats
from guided_diffusion.resample import UniformSampler
from guided_diffusion.train_util import TrainLoop

from .models import SIZE, make_cimd

WALL_CLOCK = {"seconds", "images_per_second", "waiting_for_data", "memory_gb"}  # of the log


class Memory(list):
    """Cases in memory, as SegmentationCases would hand them out."""

    @property
    def cases(self):
        return self

    def compact(self, i):
        return np.round(self[i].image * 255).astype(np.uint8), pack(self[i].raters)


def make_cases(count=5, raters=3, seed=0):
    """Random scans; each rater outlines a disc of his own."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    cases = Memory()
    for i in range(count):
        centres, radii = rng.uniform(4, 12, (raters, 2)), rng.uniform(2, 6, raters)
        masks = np.stack([np.hypot(y - cy, x - cx) < r for (cy, cx), r in zip(centres, radii)])
        cases.append(Case(f"case{i}", rng.random((1, SIZE, SIZE), dtype=np.float32), masks))
    return cases


def make_loop(folder, cimd=None, cases=None, sampler=None, seed=0, **options):
    cimd = cimd or make_cimd()
    return TrainLoop(cimd=cimd, data=ShuffledCases(cases or make_cases(), seed), seed=seed, results_dir=folder,
                     schedule_sampler=sampler or UniformSampler(cimd.diffusion.num_timesteps),
                     **{"batch_size": 2, **options})


def next_floats(batches):
    """The next batch of a stream as run_step takes it."""
    image, mask, positions = next(batches)
    return *to_floats(image, mask, 1, torch.device("cpu")), positions


def batch(n=5, seed=1, dtype=torch.float32, steps=1000):
    """image, mask, t, weights, noise for forward_backward."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 1, SIZE, SIZE, generator=generator, dtype=dtype),
            torch.randint(0, 2, (n, 1, SIZE, SIZE), generator=generator).to(dtype),
            torch.randint(0, steps, (n,), generator=generator),
            torch.rand(n, generator=generator, dtype=dtype) + 0.5,
            torch.randn(n, 1, SIZE, SIZE, generator=generator, dtype=dtype))


def spoil(loop, steps, rows=(1,), value=float("nan")):
    """Make the network see a scan that is not finite in these rows of the batches of these steps (counted from 1)."""
    run_step = loop.run_step

    def spoilt(image, mask, position):
        image = image.clone()
        if loop.step + 1 in steps:
            image[list(rows)] = value
        run_step(image, mask, position)

    loop.run_step = spoilt
    return loop


def logged(folder):
    """The rows of progress.json, but for the values that depend on the machine."""
    return [{name: value for name, value in json.loads(line).items() if name not in WALL_CLOCK}
            for line in (folder / "progress.json").read_text().splitlines()]
