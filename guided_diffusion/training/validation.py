"""What a network in training makes of a few fixed cases: ensembles to look at, and their scores."""

import itertools
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from .. import dist_util, logger, metrics
from ..data.cases import Case, SegmentationCases
from ..data.masks import to_masks
from ..data.windows import window_of
from ..methods.base import Method
from ..sampling.ensembles import EnsembleSampler, largest_batch
from .callback import Callback, Loop, Stopped

SHOWN = 4  # cases in the panel, and members of theirs
SCORED = 16  # members that are scored
LOGGED = ("GED", "GED_unbiased", "CI", "D_max")  # of metrics.SCORES


class Validation(Callback):
    """Draws the same ensembles every `interval` steps and at the end: the noise of a member follows from the seed, the
    case and its number alone.

    :param cases: of these, spread over all, `count` are drawn.
    :param method: makes the method that draws, of a network.
    :param scored: whether to draw SCORED members a case and score them, rather than as many as are shown.
    :param window: a name of windows.WINDOWS: draw and score a window of each case, always the same; None: all of it.
    """

    def __init__(self, cases: SegmentationCases, method: Callable[[nn.Module], Method],
                 dtype: torch.dtype | None = None, count: int = SHOWN, seed: int = 0, interval: int = 1000,
                 scored: bool = False, window: str | None = None):
        self.method, self.dtype, self.seed, self.interval, self.scored = method, dtype, seed, interval, scored
        self.members, self.name = (SCORED, "validation cases") if scored else (SHOWN, "training cases")
        places = np.linspace(0, len(cases) - 1, min(count, len(cases))).round().astype(int)
        self.cases: list[Case] = [
            window_of(cases[i], cases.image_size, window, seed, i) if window else cases[i] for i in places.tolist()]

    def due(self, loop: Loop) -> bool:
        """Whether the cases are drawn behind this step."""
        return loop.step == loop.end or loop.step % self.interval == 0

    def overdue(self, loop: Loop) -> bool:
        """Whether a signal broke off the drawing behind this step, where the run resumes: its line is not logged."""
        logged, waiting = dist_util.all_gather_objects(
            (any(row["step"] == loop.step for row in logger.history()), bool(loop.meter.sums)))[0]
        if logged and loop.step % loop.settings.log_interval == 0:
            loop.meter.restart()  # the line was made up for, and the checkpoint after it lost
        return self.due(loop) and waiting and not logged

    def scores(self, loop: Loop) -> dict[str, float]:
        if not self.due(loop):
            return {}
        start = time.perf_counter()
        rate, averaged = loop.rate_to_use()
        words = f"weights averaged at the rate {rate}" if averaged else "present weights"
        steps = itertools.count(1)

        def on_step(*_):
            if loop.signals.received:
                raise Stopped
            loop.tell("doing", f"drawing the validation cases at step {loop.step}", within=[next(steps)])

        def method():
            return self.method(loop.network_to_draw()).prepare(self.dtype)

        masks = self.draw(method, on_step)
        loop.tell("doing", f"in step {loop.step}")
        loop.meter.since += time.perf_counter() - start  # the speed is that of training
        if masks is None:
            return {}
        loop.tell("drawn", self.cases, masks, f"{self.name} at step {loop.step}, {words}")
        means = self.means(masks)
        if means:
            loop.tell("validated", self.cases, means)
        return means

    def draw(self, method: Callable[[], Method], on_step: Callable = lambda *_: None) -> list[np.ndarray] | None:
        """Draw the ensembles, shared among all ranks.

        :param method: returns a method that is ready to draw, on its device.
        :param on_step: as in EnsembleSampler.draw; may raise Stopped.
        :returns: masks, a list of [n, H, W] bool a case, or None on every rank if one has no memory left for it.
        :raises Stopped: on every rank, if one was stopped.
        """
        mine = self.cases[dist_util.rank()::dist_util.world_size()]
        try:
            drawer = method()
            largest = largest_batch(dist_util.device_of(drawer), mine[0].image[0].size if mine else 1)
            sampler = EnsembleSampler(drawer, batch_size=min(32, largest), seed=self.seed)
            drawn = sampler.ensembles(mine, self.members, on_step)
            masks = [torch.from_numpy(to_masks(samples)) for _, samples in drawn]
        except Stopped:
            masks = "stopped"
        except torch.OutOfMemoryError:
            masks = None
            logger.log("the validation cases are not drawn: the device's memory does not hold them beside training")
        dist_util.at(None)  # the others may have more to draw
        shares = dist_util.all_gather_objects(masks)
        if "stopped" in shares:
            raise Stopped
        if None in shares:
            return None
        return [shares[i % len(shares)][i // len(shares)].numpy() for i in range(len(self.cases))]

    def means(self, masks: Sequence[np.ndarray]) -> dict[str, float]:
        """Mean scores over the cases, {"val_GED_16": ..., ...}, if they are to be scored."""
        if not self.scored:
            return {}
        pairs = [metrics.Agreement(drawn, case.raters) for drawn, case in zip(masks, self.cases)]
        return {f"val_{name}_{self.members}": float(np.mean([metrics.SCORES[name](pair) for pair in pairs]))
                for name in LOGGED}
