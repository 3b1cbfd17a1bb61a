"""A results folder has one writer."""

import os
from typing import Any

from ..system import storage
from ..system.lease import OneWriter
from .callback import Callback, Loop

LOCK = ".training.lock"


def elastic_job() -> str:
    """The name of the torchrun job that this process is started by, if it has one of its own (--rdzv_id, or that of
    --standalone): of such a job only the newest start runs."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return "" if name == "none" else name


class Ownership(OneWriter, Callback):
    """That this process alone trains into a folder, as OneWriter.

    :param timeout: seconds after which one that does not renew its lease is taken for gone.
    :raises InputError: if another process trains into the folder.
    """

    def __init__(self, folder: storage.AnyPath, timeout: float):
        super().__init__(folder, LOCK, "--results_dir", "is training", timeout, elastic_job())

    def stepped(self, loop: Loop, *step: Any) -> None:
        if self.leases.lost:
            self.check()
