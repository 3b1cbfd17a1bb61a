"""Drawing ensembles of masks for many cases in full batches."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch

from .. import dist_util
from ..data.cases import Case
from ..methods.base import Encoded, Method, join
from ..system.errors import InputError


def largest_batch(device: torch.device, pixels: int) -> int:
    """The most masks of so many pixels that pay to be drawn at once, if the memory holds them: on a CPU, those that its
    caches hold."""
    return max(1, 2 ** 16 // pixels) if device.type == "cpu" else 256


class OutOfMemory(InputError, torch.OutOfMemoryError):
    """Not even one network call fits."""


class EnsembleSampler:
    """Draws masks for scans.

    :param method: ready to draw (see Method.prepare), on its device.
    :param batch_size: rows of every network call. A batch that is not full is padded to it, since a network's
        rounding depends on the shape of its batch: so a member is the same to the last bit whatever it is drawn with.
        A batch that does not fit into the device's memory is halved, and so are all that follow.
    """

    def __init__(self, method: Method, *, batch_size: int = 1, seed: int = 0):
        self.method, self.batch_size, self.seed = method, batch_size, seed
        self.device = dist_util.device_of(method)

    def encode(self, image: np.ndarray) -> Encoded:
        """What the method makes of a scan [C, H, W] before any mask of it is drawn."""
        return self.method.encode(dist_util.to_device(torch.from_numpy(image)[None], self.device))

    def seconds_a_call(self, image: np.ndarray) -> float:
        """How long the network takes for one batch of scans like this one, [C, H, W]."""
        encoded, rows = self.encode(image), [(0, "", i) for i in range(self.batch_size)]
        for _ in range(2):  # the first call also chooses algorithms
            start = time.perf_counter()
            self.method.evaluate_once(encoded, rows)
        return time.perf_counter() - start

    def fit_batch_size(self, image: np.ndarray) -> None:
        """Halve batch_size until a network call on scans like this one, [C, H, W], fits into the device's memory."""
        while True:
            try:
                self.seconds_a_call(image)
                return
            except torch.OutOfMemoryError:
                self._halve_batch_size()

    def _halve_batch_size(self):
        if self.batch_size == 1:
            raise OutOfMemory("the device's memory does not hold one network call; try --use_bf16 True") from None
        self.batch_size //= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def draw(self, scans: Sequence[Encoded], members: Sequence[tuple[str, int]], on_step: Callable = lambda *_: None
             ) -> np.ndarray:
        """Samples of one batch, [N, H, W] float32; see data.masks.

        :param scans: what `encode` returned, one a row, those of one scan being the same object; members: one (case
            name, number) a row. Rows are repeated until the batch is full.
        :param on_step: called after every step with the members, x_t and the predicted x_0, both [N, 1, H, W] on the
            device and in the scaling of samples; rows beyond the members repeat the last.
        """
        distinct = {id(scan): scan for scan in scans}
        numbers = {key: i for i, key in enumerate(distinct)}
        rows = [(numbers[id(scan)], *member) for scan, member in zip(scans, members)]
        rows += [rows[-1]] * (self.batch_size - len(rows))
        samples = self.method.draw(join([*distinct.values()]), rows, self.seed,
                                   lambda x_t, x_start: on_step(members, x_t, x_start))
        return samples[:len(members)].numpy()

    def ensembles(self, cases: Iterable[Case], num_ensemble: int, on_step: Callable = lambda *_: None
                  ) -> Iterator[tuple[Case, np.ndarray]]:
        """Draw num_ensemble members for each Case of an iterable; yields (case, samples [n, H, W] float32 array)
        in the same order, each as soon as it is whole. Batches run across cases of one size. on_step as in `draw`."""
        waiting = []  # cases begun, each with the samples it has so far

        def jobs():
            for case in cases:
                scan = self.encode(case.image)
                waiting.append((case, []))
                for i in range(num_ensemble):
                    yield waiting[-1], scan, i

        jobs = jobs()
        while batch := list(itertools.islice(jobs, self.batch_size)):
            _, same = next(itertools.groupby(batch, key=lambda job: job[0][0].image.shape))
            same = list(same)
            jobs, batch = itertools.chain(batch[len(same):], jobs), same
            try:
                drawn = self.draw([scan for _, scan, _ in batch], [(case.name, i) for (case, _), _, i in batch],
                                  on_step)
            except torch.OutOfMemoryError:
                self._halve_batch_size()
                jobs = itertools.chain(batch, jobs)
                drawn = ()
            for ((_, samples), _, _), row in zip(batch, drawn):
                samples.append(row)
            while waiting and len(waiting[0][1]) == num_ensemble:
                case, samples = waiting.pop(0)
                yield case, np.stack(samples)
