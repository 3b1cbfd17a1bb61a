"""Writing checkpoints beside training."""

import concurrent.futures
import contextlib
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .. import logger
from ..checkpoint import FROZEN, NEWEST, files_of, save, steps_in
from ..system import storage
from ..system.lease import Lost


class Saver:
    """Writes checkpoints on a thread of its own, from copies, while training goes on.

    What cannot be written is logged, and no reason to stop: see `problem`. Once a checkpoint is whole, all but the
    newest `keep` of the folder are removed (0: none is).

    :param last: the step up to which nothing needs to be saved.
    """

    def __init__(self, folder: str, keep: int = 0, last: int = 0):
        self.folder, self.keep = folder, keep
        self.last, self.problem = last, ""  # the newest step that is whole, and why the one after it is not
        self.pool, self.job = ThreadPoolExecutor(1), None

    def begin(self, step: int, files: Mapping[str, Any]) -> None:
        """Copy the states {name: state}, then write them in this order; waits only for what is still being written."""
        self.wait()
        copies = {id(state): _copied(state) for state in files.values()}
        self.job = step, self.pool.submit(self._write, step, {name: copies[id(state)] for name, state in files.items()})

    def wait(self) -> None:
        """Wait until nothing is being written any more."""
        if self.job:
            concurrent.futures.wait([self.job[1]])
        self.poll()

    def finish(self) -> None:
        """Wait half a minute for what is being written, before the process is ended."""
        if self.job:
            concurrent.futures.wait([self.job[1]], timeout=30)

    def poll(self) -> None:
        """Log what has come of the writing, if it is over."""
        if not self.job or not self.job[1].done():
            return
        (step, future), self.job = self.job, None
        if isinstance(future.exception(), Lost):
            raise future.exception()
        if future.exception():
            self.problem = f"step {step} could not be saved in {self.folder} ({future.exception()})"
            logger.log(f"{self.problem}; training goes on, and saving is tried again")
        else:
            self.last, self.problem = step, ""
            logger.log(f"saved step {step} in {self.folder}")

    def _write(self, step, files):
        written = []
        try:
            for name, state in files.items():
                save(storage.join(self.folder, name), state)
                written.append(name)
        except BaseException:
            self._remove(name for name in written if name not in (NEWEST, FROZEN))  # a part only takes space
            raise
        self.prune(step)

    def prune(self, step: int) -> None:
        """Remove all but the newest `keep` checkpoints up to this one, which is whole; later ones may not be."""
        kept = [old for old in steps_in(self.folder) if old <= step][-self.keep:] if self.keep else []
        for name in sorted(storage.names_in(self.folder)) if kept else ():
            match = re.fullmatch(r"optsavedmodel(\d{6,})\.pt", name)
            if match and int(match[1]) < kept[0]:  # removed last, so that an interruption is made up for next time
                self._remove([*(files_of(self.folder, int(match[1])) - {name}), name])

    def _remove(self, names):
        for name in names:
            with contextlib.suppress(Exception):
                storage.remove(storage.join(self.folder, name))


def _copied(state):
    """The same, with CPU copies of its tensors."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    return type(state)(map(_copied, state)) if isinstance(state, (list, tuple)) else state
