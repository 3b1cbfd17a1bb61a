"""What a training loop keeps an eye on: its losses, the steps that went wrong, and signals to stop."""

import contextlib
import signal
import sys
import time

import torch
import torch.distributed as dist

from .. import dist_util, logger
from ..system.errors import InputError


class Meter:
    """Means of the losses since the last reading, over all ranks, also by quartile of the timestep (_q0 .. _q3); of
    the examples whose losses are finite.

    Sums stay on the device; only reading waits for it.
    """

    def __init__(self, num_timesteps, device):
        self.num_timesteps, self.device = num_timesteps, device
        self.restart()

    def restart(self):
        self.sums, self.examples = {}, 0
        self.norms = torch.zeros(2, device=self.device)  # sum of the gradient's norm, and the steps it is of
        self.counts = torch.zeros(4, device=self.device)
        self.start_clock()

    def start_clock(self):
        self.since, self.waited = time.perf_counter(), 0.0  # waited: for data

    def add(self, t, losses):
        quartile = t * 4 // self.num_timesteps
        finite = torch.stack(list(losses.values())).isfinite().all(0)
        self.counts.index_add_(0, quartile, finite.float())
        for name, values in losses.items():
            total = self.sums.setdefault(name, torch.zeros(4, device=self.device))
            total.index_add_(0, quartile, values.float().where(finite, 0))
        self.examples += len(t)

    def add_norm(self, norm):
        """The norm of a step's gradient, the same on every rank; left out if it is not finite."""
        finite = norm.isfinite()
        self.norms = self.norms + torch.stack([norm.where(finite, 0), finite]).float()

    def state_dict(self):
        """This rank's sums since the last reading."""
        return {"sums": self.sums, "counts": self.counts, "norms": self.norms}

    def load_state_dicts(self, states):
        """Go on from the sums of every rank of a run; if it had another number of ranks, the first takes them all."""
        self.restart()
        alike = len(states) == dist_util.world_size()
        for rank, state in enumerate(states):
            if "norms" in state:
                self.norms = state["norms"].to(self.device).reshape(2)
            if dist_util.rank() == (rank if alike else 0):
                for name, total in state["sums"].items():
                    self.sums[name] = self.sums.get(name, 0) + total.to(self.device).reshape(4)
                self.counts = self.counts + state["counts"].to(self.device).reshape(4)

    def read(self, restart=True):
        """A dict of floats; starts anew, unless told to go on."""
        table = torch.stack([self.counts, *self.sums.values()])
        if dist.is_initialized():
            dist.all_reduce(table)
        counts, *sums = table.tolist()
        norm, steps = self.norms.tolist()
        values = {"grad_norm": norm / steps} if steps else {}
        for name, total in zip(self.sums, sums):
            values[name] = sum(total) / max(sum(counts), 1)
            values.update({f"{name}_q{i}": s / n for i, (s, n) in enumerate(zip(total, counts)) if n})
        seconds = time.perf_counter() - self.since
        if self.examples:
            values["images_per_second"] = self.examples * dist_util.world_size() / max(seconds, 1e-9)
        here = {"waiting_for_data": self.waited / max(seconds, 1e-9), "memory_gb": peak_memory(self.device) / 1e9}
        ranks = dist_util.all_gather_objects(here)
        values.update({name: max(rank[name] for rank in ranks) for name in here})
        if restart:
            self.restart()
        return values


def peak_memory(device):
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

    def __enter__(self):
        self.received, self._when = None, 0.0
        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, *exc):
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


class BadSteps:
    """Counts the steps whose gradient was not finite, names what they saw, and gives up after too many in a row.

    A step is looked at during the one after it, when its result has long arrived: no device is waited for.
    """

    def __init__(self, most_in_a_row):
        self.most_in_a_row, self.count, self.in_a_row = most_in_a_row, 0, 0
        self.noted = None

    def note(self, bad, step, position, t, losses):
        """Look at this step in the next `check`: bad a bool tensor, the same on every rank; position, t, losses: [N],
        of this rank's examples."""
        arrived = None
        here = bad
        if bad.is_cuda:  # only a copy into pinned memory does not wait for the device
            here, arrived = torch.empty((), dtype=torch.bool, pin_memory=True), torch.cuda.Event()
            here.copy_(bad, non_blocking=True)
            arrived.record()
        self.noted = here, arrived, step, position, t, losses

    def check(self, data):
        """Log the step noted before, if it was bad; `data` is the ShuffledCases that its examples came from.

        :raises InputError: on every rank, if that was one too many.
        """
        if self.noted is None:
            return
        (bad, arrived, step, position, t, losses), self.noted = self.noted, None
        if arrived:
            arrived.synchronize()
        if not bad.item():
            self.in_a_row = 0
            return
        self.count, self.in_a_row = self.count + 1, self.in_a_row + 1
        finite = losses.isfinite().tolist()
        seen = [f"{data.case_name(place)} at timestep {step_t} on rank {dist_util.rank()}"
                for place, step_t, fine in zip(position, t.tolist(), finite) if not fine]
        seen = sum(dist_util.all_gather_objects(seen), [])
        what = f"the loss is not finite for {', '.join(seen)}" if seen else "the gradient is not finite"
        logger.log(f"step {step} is skipped: {what}")
        if self.in_a_row >= self.most_in_a_row:
            raise InputError(f"gave up at step {step}, the last of {self.in_a_row} in a row without a finite gradient:"
                             f" {what}. The checkpoints are as they were; go on from one with a smaller --lr, with"
                             f" --grad_clip 1, or with --use_bf16 instead of --use_fp16", on_every_rank=True)
