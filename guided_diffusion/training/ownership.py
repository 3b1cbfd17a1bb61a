"""A results folder has one writer."""

import os
import time
from typing import Any, Self

from ..system import storage
from ..system.errors import InputError
from ..system.lease import Leases, Lost
from .callback import Callback, Loop

LOCK = ".training.lock"


def elastic_job() -> str:
    """The name of the torchrun job that this process is started by, if it has one of its own (--rdzv_id, or that of
    --standalone): of such a job only the newest start runs."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name


class Ownership(Callback):
    """That this process alone writes into a folder, within its `with`.

    A process that others take for gone may still run, and reach the folder when they have gone on without it: each of
    its writes asks first, and then raises Lost.

    :param timeout: seconds after which one that does not renew its lease is taken for gone.
    :raises InputError: if another process trains into the folder.
    """

    def __init__(self, folder: storage.AnyPath, timeout: float):
        self.folder, self.path = folder, storage.join(folder, LOCK)
        self.leases = Leases(timeout, elastic_job())
        try:
            self._take()
        except OSError as error:
            self.leases.close()
            raise InputError(f"--results_dir {folder}: {LOCK} cannot be written ({error.strerror or error}); mend that,"
                             f" or give another folder") from None
        except BaseException:
            self.leases.close()
            raise
        storage.fence(folder, self.check)

    def _take(self):
        told = False
        while holder := self.leases.take(self.path):
            if holder.machine == self.leases.me.machine or self.leases.renewed(self.path):
                raise InputError(f"--results_dir {self.folder}: {holder} is training into it; give another folder, or"
                                 f" stop that run")
            if not told:
                print(f"{self.path} is held by {holder}, and is taken over unless that renews it within"
                      f" {self.leases.timeout:g} seconds", flush=True)
                told = True
            time.sleep(self.leases.interval / 5)

    def check(self) -> None:
        """:raises Lost: if another process has taken over."""
        if not self.leases.holds(self.path):
            by = self.leases.holder(self.path) or "another run"
            raise Lost(f"{self.folder}: {by} has gone on with this run, since this process had not been heard of;"
                       f" nothing more is written")

    def stepped(self, loop: Loop, *step: Any) -> None:
        if self.leases.lost:
            self.check()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        storage.fence(self.folder, None)
        self.leases.close()
