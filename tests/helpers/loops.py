"""Training loops in one process, on cases in memory."""

import json
from collections.abc import Sequence

import numpy as np
import torch

from guided_diffusion.data.cases import Case
from guided_diffusion.data.masks import pack
from guided_diffusion.data.stream import Batch, ShuffledCases, to_floats
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.resume import Checkpoints
from guided_diffusion.training.settings import Settings
from guided_diffusion.training.watch import BadSteps

from .models import SIZE, make_cimd

WALL_CLOCK = {"seconds", "images_per_second", "waiting_for_data", "memory_gb"}  # of the log


class Memory(list):
    """Cases in memory, as SegmentationCases would hand them out."""

    @property
    def cases(self):
        return self

    def compact(self, i):
        return np.round(self[i].image * 255).astype(np.uint8), pack(self[i].raters)


def make_cases(count=5, raters: int | Sequence[int] = 3, seed=0):
    """Random scans; each rater outlines a disc of his own. raters: of every case, or a list with one number a case."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIZE, :SIZE]
    cases = Memory()
    for i in range(count):
        outlines = raters if isinstance(raters, int) else raters[i]
        centres, radii = rng.uniform(4, 12, (outlines, 2)), rng.uniform(2, 6, outlines)
        masks = np.stack([np.hypot(y - cy, x - cx) < r for (cy, cx), r in zip(centres, radii)])
        cases.append(Case(f"case{i}", rng.random((1, SIZE, SIZE), dtype=np.float32), masks))
    return cases


def make_loop(folder, method=None, cases=None, seed=0, *, callbacks=(), max_bad_steps=50, save_interval=5000,
              keep_checkpoints=0, save_patience=3, **settings):
    """A TrainLoop with BadSteps, the callbacks, and Checkpoints in the folder; settings are those of Settings."""
    return TrainLoop(
        method or make_cimd(), ShuffledCases(cases or make_cases(), seed),
        Settings(**{"batch_size": 2, "image_channels": 1, "seed": seed, **settings}),
        [BadSteps(max_bad_steps), *callbacks, Checkpoints(folder, save_interval, keep_checkpoints, save_patience)])


def callback(loop, kind):
    """The loop's callback of this class."""
    return next(part for part in loop.callbacks if isinstance(part, kind))


def saver_of(loop):
    """What writes the loop's checkpoints."""
    return callback(loop, Checkpoints).saver


def bad_steps(loop):
    """How many steps of the loop were skipped, as far as it has looked."""
    return callback(loop, BadSteps).count


def next_floats(batches):
    """The next batch of a stream as run_step takes it."""
    return to_floats(next(batches), 1, torch.device("cpu"))


def batch(n=5, seed=1, dtype=torch.float32):
    """A Batch of noise, each example with one rater, for run_step and forward_backward."""
    generator = torch.Generator().manual_seed(seed)
    return Batch(torch.rand(n, 1, SIZE, SIZE, generator=generator, dtype=dtype),
                 torch.randint(0, 2, (n, 1, SIZE, SIZE), generator=generator).to(dtype),
                 torch.ones(n, 1, dtype=torch.bool), [*range(n * seed, n * seed + n)], 0)


def watch_steps(loop, after=lambda: None, before=lambda: None):
    """Call functions before and behind each step of a loop; returns it."""
    run_step = loop.run_step

    def watched(batch):
        before()
        run_step(batch)
        after()

    loop.run_step = watched
    return loop


def spoil(loop, steps, rows=(1,), value=float("nan")):
    """Make the network see a scan that is not finite in these rows of the batches of these steps (counted from 1)."""
    run_step = loop.run_step

    def spoilt(batch):
        image = batch.image.clone()
        if loop.step + 1 in steps:
            image[list(rows)] = value
        run_step(batch._replace(image=image))

    loop.run_step = spoilt
    return loop


def logged(folder):
    """The rows of progress.json, but for the values that depend on the machine."""
    return [{name: value for name, value in json.loads(line).items() if name not in WALL_CLOCK}
            for line in (folder / "progress.json").read_text().splitlines()]
