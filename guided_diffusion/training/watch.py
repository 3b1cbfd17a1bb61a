"""What a training loop keeps an eye on: its losses, the steps that went wrong, and signals to stop."""

import contextlib
import operator
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from .. import dist_util, logger
from ..data.stream import Batch, ShuffledCases
from ..methods.base import Losses
from ..system.errors import InputError
from .callback import Callback, Loop


class Meter:
    """Means of the losses since the last reading, over all ranks, also by part (of the timesteps, say: _q0 .. _q3); of
    the examples whose losses are finite.

    Sums stay on the device; only reading waits for it.

    :param parts: see Method.parts.
    """

    sums: dict[str, Tensor]

    def __init__(self, parts: Sequence[str], device: torch.device):
        self.parts, self.device = tuple(parts), device
        self.restart()

    def restart(self) -> None:
        self.sums, self.examples = {}, 0
        self.norms = torch.zeros(2, device=self.device)  # sum of the gradient's norm, and the steps it is of
        self.counts = torch.zeros(max(1, len(self.parts)), device=self.device)
        self.start_clock()

    def start_clock(self) -> None:
        self.since, self.waited = time.perf_counter(), 0.0  # waited: for data

    def add(self, losses: Losses) -> None:
        """Count the weighted losses of a batch."""
        terms = {name: (value * losses.weights).detach() for name, value in losses.terms.items()}
        finite = torch.stack(list(terms.values())).isfinite().all(0)
        part = torch.zeros(len(finite), dtype=torch.long, device=self.device) if losses.part is None else losses.part
        self.counts.index_add_(0, part, finite.float())
        for name, values in terms.items():
            total = self.sums.setdefault(name, torch.zeros_like(self.counts))
            total.index_add_(0, part, values.float().where(finite, 0))
        self.examples += len(finite)

    def add_norm(self, norm: Tensor) -> None:
        """The norm of a step's gradient, the same on every rank; left out if it is not finite."""
        finite = norm.isfinite()
        self.norms = self.norms + torch.stack([norm.where(finite, 0), finite]).float()

    def state_dict(self) -> dict[str, Any]:
        """This rank's sums since the last reading."""
        return {"sums": self.sums, "counts": self.counts, "norms": self.norms}

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from the sums of every rank of a run; if it had another number of ranks, the first takes them all."""
        self.restart()
        alike = len(states) == dist_util.world_size()
        for rank, state in enumerate(states):
            if "norms" in state:
                self.norms = state["norms"].to(self.device).reshape(2)
            if dist_util.rank() == (rank if alike else 0):
                for name, total in state["sums"].items():
                    self.sums[name] = self.sums.get(name, 0) + total.to(self.device).reshape(self.counts.shape)
                self.counts = self.counts + state["counts"].to(self.device).reshape(self.counts.shape)

    def read(self, restart: bool = True) -> dict[str, float]:
        """A dict of floats; starts anew, unless told to go on."""
        table = torch.stack([self.counts, *self.sums.values()])
        if dist.is_initialized():
            dist.all_reduce(table)
        counts, *sums = table.tolist()
        norm, steps = self.norms.tolist()
        values = {"grad_norm": norm / steps} if steps else {}
        for name, total in zip(self.sums, sums):
            values[name] = sum(total) / max(sum(counts), 1)
            values.update({f"{name}_{part}": s / n for part, s, n in zip(self.parts, total, counts) if n})
        seconds = max(time.perf_counter() - self.since, 1e-9)
        here = {"waiting_for_data": self.waited / seconds, "memory_gb": peak_memory(self.device) / 1e9}
        examples, ranks = zip(*dist_util.all_gather_objects([self.examples, here]))
        if any(examples):
            values["images_per_second"] = sum(examples) / seconds
        values.update({name: max(rank[name] for rank in ranks) for name in here})
        if restart:
            self.restart()
        return values


def peak_memory(device: torch.device) -> int:
    """The most bytes of a CUDA device's memory that held tensors, or of the machine's that this process held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class SignalsNoted(contextlib.AbstractContextManager):
    """Inside, SIGINT, SIGTERM and SIGUSR1, with which SLURM warns of a time limit, are only noted, in `received`; a
    second one, a while later, acts at once."""

    received: signal.Signals | None

    def __enter__(self) -> Self:
        self.received, self._when = None, 0.0
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        now = time.monotonic()
        if self.received and now - self._when > 2:  # launchers pass on what the terminal has already sent
            raise KeyboardInterrupt
        if not self.received:
            self.received, self._when = signal.Signals(number), now
            if dist_util.rank() == 0:
                print("\nfinishing this step, then saving; once more to leave without saving", flush=True)


class Later:
    """A bool of the device, the same on every rank, whose value is asked for a step later: no device is waited for."""

    def __init__(self, value: torch.Tensor):
        self.value, self.arrived = value, None
        if value.is_cuda:  # only a copy into pinned memory does not wait for the device
            self.value, self.arrived = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
            self.value.copy_(value, non_blocking=True)
            self.arrived.record()

    def __bool__(self) -> bool:
        if self.arrived:
            self.arrived.synchronize()
        return bool(self.value)


class BadSteps(Callback):
    """Counts the steps whose gradient was not finite, names what they saw, and gives up after too many in a row.

    A step is looked at during the one after it, when its result has long arrived.
    """

    def __init__(self, most_in_a_row: int):
        self.most_in_a_row, self.count, self.in_a_row = most_in_a_row, 0, 0
        self.noted = None

    def stepped(self, loop: Loop, batch: Batch, losses: Losses, bad: Later) -> None:
        self.check(loop.data)
        self.noted = bad, loop.step + 1, batch.places, losses

    def figures(self, loop: Loop) -> dict[str, float]:
        self.check(loop.data)
        return {"bad_steps": self.count}

    def state(self, loop: Loop) -> dict:
        self.check(loop.data)
        return {"bad_steps": [self.count, self.in_a_row]}

    def load_state(self, state: dict) -> None:
        self.count, self.in_a_row = map(operator.index, state.get("bad_steps", (0, 0)))

    def check(self, data: ShuffledCases) -> None:
        """Log the step noted before, if it was bad; `data` is where its examples came from.

        :raises InputError: on every rank, if that was one too many.
        """
        if self.noted is None:
            return
        (bad, step, places, losses), self.noted = self.noted, None
        if not bad:
            self.in_a_row = 0
            return
        self.count, self.in_a_row = self.count + 1, self.in_a_row + 1
        finite = losses.terms["loss"].isfinite().tolist()
        details = [" ".join(f"at {name} {values[i]} " for name, values in losses.seen.items())
                   for i in range(len(places))]
        seen = [f"{data.case_name(place)} {detail}on rank {dist_util.rank()}"
                for place, detail, fine in zip(places, details, finite) if not fine]
        seen = sum(dist_util.all_gather_objects(seen), [])
        what = f"the loss is not finite for {', '.join(seen)}" if seen else "the gradient is not finite"
        logger.log(f"step {step} is skipped: {what}")
        if self.in_a_row >= self.most_in_a_row:
            raise InputError(f"gave up at step {step}, the last of {self.in_a_row} in a row without a finite gradient:"
                             f" {what}. The checkpoints are as they were; go on from one with a smaller --lr, with"
                             f" --grad_clip 1, or with --use_bf16 instead of --use_fp16", on_every_rank=True)


class RanksWatched(Callback):
    """Tells the other ranks how far this one is; within a step, all do the same things in the same order."""

    def __init__(self):
        self.places = 0

    def doing(self, loop: Loop, words: str, within: Sequence[int] = ()) -> None:
        self.places += not within
        dist_util.at((loop.step, self.places, *within), words)

    def end(self, loop: Loop) -> None:
        dist_util.at(None)  # the last checkpoint may take its time
