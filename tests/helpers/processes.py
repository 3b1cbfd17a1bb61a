"""Runs in processes of their own."""

import contextlib
import os
import shutil
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest

from .files import ROOT

TRAIN, SAMPLE = (str(ROOT / "scripts" / f"segmentation_{job}.py") for job in ("train", "sample"))
PATIENCE = 300  # seconds until a process that should have ended counts as hanging
HERE = Path(sys.executable).parent
MPIEXEC = HERE / "mpiexec" if (HERE / "mpiexec").exists() else shutil.which("mpiexec")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def end(started):
    """Kill whatever is left of processes that were started in sessions of their own, and close their pipes."""
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for stream in filter(None, (process.stdout, process.stderr)):
            stream.close()


def training(data, results, tiny, *flags):
    return ["--data_dir", data, "--results_dir", results, "--max_steps", 3, "--lr", "3e-4", "--log_interval", 1,
            "--num_filters", "8,16", "--seed", 5, "--sample_interval", 0, *tiny,
            "--learn_sigma", "True", *flags]


def read_until(stream, word):
    """The lines of a stream up to the one that holds a word; the rest is read and dropped by a thread."""
    lines = []
    for line in stream:
        lines.append(line)
        if word in line:
            threading.Thread(target=stream.read, daemon=True).start()
            return lines
    pytest.fail(f"ended without {word!r}: {''.join(lines)}")
