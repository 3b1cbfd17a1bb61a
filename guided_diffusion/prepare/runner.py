"""Prepares the cases of a source: in parallel, going on where it was stopped, whatever is broken in between."""

import shutil
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..system.errors import InputError
from ..system.lease import OneWriter
from ..system.registry import load_plugin
from ..system.terminal import progress
from . import SOURCES
from .base import LeftOut, Source
from .folder import LEFT_OUT, LOCK, Done, Folder
from .splits import PARTS, assign, shares_of
from .writing import WriteError, write_case

GONE_SECONDS = 60  # without a sign of life of another machine that prepares into the folder
SAMPLE = 8  # units that an estimate is made from


class Job(NamedTuple):
    """What is to be prepared."""

    kind: str  # an entry of SOURCES
    path: Path
    flags: dict[str, Any]  # of the source, by name
    plugins: Sequence[str] = ()  # files that other processes load, too
    split: str = ""
    folds: int = 0
    seed: int = 0
    workers: int = 1  # processes; 1: this one

    def source(self) -> Source:
        return SOURCES[self.kind](self.path, **self.flags)

    def options(self) -> dict[str, Any]:
        """What the cases follow from, by the name on the command line."""
        return {"KIND": self.kind, "INPUT": str(self.path.resolve()), "--split": self.split, "--folds": self.folds,
                "--seed": self.seed, **{f"--{name}": value for name, value in self.flags.items()}}


class Outcome(NamedTuple):
    """What was made of the input, or would be."""

    rows: list[dict[str, Any]]  # of the manifest, or of those units that an estimate looked at
    left_out: list[LeftOut]
    units: int
    parts: dict[str, str]  # of a split by patient; empty without one
    split_by: str
    patients: int  # or series, or cases, as split_by says
    size: float = 0.0  # of an estimate: bytes that all cases take
    cases: float = 0.0  # of an estimate: how many
    done_before: int = 0  # units that an earlier run has done


def prepare(job: Job, out: Path) -> Outcome:
    """Prepare all cases into a folder.

    :raises InputError: if the input holds nothing of the kind or no case at all, if the folder holds other things, or
        was begun with other options, or cannot be written.
    """
    shares, source = shares_of(job.split, job.folds), job.source()
    units, left_out = _units(source, job)
    folder = Folder(out, job.kind, source.split_by)
    with OneWriter(out, LOCK, "OUT", "is preparing", GONE_SECONDS):
        before = folder.begin(job.options())
        folder.parts = _parts(job, units, source, shares, folder.known_parts())
        names = [*shares] or sorted({*folder.parts.values()})
        if names:  # now, so that a run that goes on knows it
            folder.write_split(job.split, job.folds, job.seed, names)
        left_out += [left for lost in before.values() for left in lost]
        todo = [unit for unit in units if unit.name not in before]
        shown = progress(_results(job, source, todo, folder.unfinished), "preparing", len(units), "unit",
                         initial=len(units) - len(todo))
        for number, (done, unit) in enumerate(zip(shown, todo)):
            left_out += folder.take(unit, done, number)
        folder.finish(left_out)
        if names:
            folder.write_split(job.split, job.folds, job.seed, names)
        folder.link_folds(job.folds)
    if not folder.rows:
        raise InputError(f"{job.path}: nothing of it became a case ({_first(left_out)}); {out / LEFT_OUT} has all"
                         f" reasons")
    return Outcome(folder.rows, left_out, len(units), folder.parts, source.split_by, _patients(units),
                   done_before=len(units) - len(todo))


def estimate(job: Job, folder: Path) -> Outcome:
    """What preparing would write, from a sample of the units, whose cases are written to a folder for that.

    :raises InputError: as prepare, as far as the sample tells.
    """
    shares, source = shares_of(job.split, job.folds), job.source()
    units, left_out = _units(source, job)
    parts = _parts(job, units, source, shares, {})
    chosen = sorted({*np.linspace(0, len(units) - 1, min(SAMPLE, len(units))).round().astype(int).tolist()})
    rows, size = [], 0
    for number, done in zip(chosen, _results(job, source, [units[i] for i in chosen], folder)):
        rows += [{**row, "part": parts.get(units[number].patient, "")} for row in done.rows]
        left_out += done.left_out
    for path in folder.rglob("*"):
        size += path.lstat().st_size if path.is_dir() else -(-path.lstat().st_size // 4096) * 4096  # in whole blocks
    scale = len(units) / len(chosen)
    return Outcome(rows, left_out, len(units), parts, source.split_by, _patients(units), size * scale,
                   len(rows) * scale)


def _patients(units):
    return len({unit.patient for unit in units})


# ---- units and their parts ----

def _units(source, job):
    """The units of a source, and what it leaves out without reading it."""
    units, left_out, names = [], [], set()
    for item in source.units():
        if isinstance(item, LeftOut):
            left_out.append(item)
        elif item.name in names:
            left_out.append(LeftOut(item.name, "is there twice; rename one"))
        else:
            names.add(item.name)
            units.append(item)
    if not units:
        raise InputError(f"{job.path}: holds nothing to prepare as {job.kind} ({_first(left_out)})")
    return units, left_out


def _first(left_out):
    if not left_out:
        return "it is empty"
    more = f", and {len(left_out) - 1} more" if left_out[1:] else ""
    return f"{said(left_out[0])}{more}"


def said(left: LeftOut) -> str:
    """Something left out, and why, in a line."""
    return f"{left.what}: {left.reason}"


def _parts(job, units, source, shares, known):
    """The part of a split for every patient: as known, else as the flags say, else as the source does; {} without a
    split."""
    if shares:
        return assign((unit.patient for unit in units), shares, job.seed, known)
    parts = {}
    for unit in units:
        if unit.part and parts.setdefault(unit.patient, unit.part) != unit.part:
            raise InputError(f"{job.path}: has the {source.split_by} {unit.patient} both in {parts[unit.patient]} and"
                             f" in {unit.part}; give --split to split it anew")
    return parts


# ---- units to cases, in this and other processes ----

_source: Source | None = None  # of a process that works for another


def _start(job):
    global _source
    for plugin in job.plugins:
        load_plugin(plugin)
    _source = job.source()


def _work(unit, folder):
    return _prepare(_source, unit, folder)


def _prepare(source, unit, folder):
    """Write the cases of a unit into folder/0, folder/1, ..."""
    rows, left_out = [], []
    try:
        for item in source.cases(unit):
            if isinstance(item, LeftOut):
                left_out.append(_plain(*item))
            else:
                rows.append(write_case(folder / str(len(rows)), item))
    except WriteError:
        raise
    except InputError as error:
        return Done([], [_plain(unit.name, str(error))], failed=True)
    except Exception as error:  # libraries raise almost anything on a damaged file
        return Done([], [LeftOut(unit.name, f"cannot be read ({type(error).__name__}: {error})")], failed=True)
    return Done(rows, left_out)


def _plain(what, reason):
    """Left out, without saying twice what."""
    return LeftOut(str(what), reason.removeprefix(f"{what}: "))


def _results(job, source, units, folder) -> Iterator[Done]:
    """What became of each unit, in their order; the cases of unit i are in folder/i.

    :raises InputError: if nothing can be written any more.
    """
    try:
        if job.workers > 1:
            yield from _in_processes(job, units, folder)
        else:
            for i, unit in enumerate(units):
                yield _prepare(source, unit, folder / str(i))
    except WriteError as error:
        raise InputError(f"OUT {folder.parent}: cannot be written ({error}); make room and give the same command again"
                         f" to go on") from None


def _in_processes(job, units, folder):
    """As _results. Where a process dies of a unit, those that were being read are tried one by one."""
    todo = deque(enumerate(units))
    while todo:
        running = deque()
        try:
            with _pool(job, min(job.workers, len(todo))) as pool:
                while todo or running:
                    while todo and len(running) < 2 * job.workers:
                        running.append((*todo[0], pool.submit(_work, todo[0][1], folder / str(todo[0][0]))))
                        todo.popleft()
                    done = running[0][2].result()
                    running.popleft()
                    yield done
        except BrokenProcessPool:
            yield from _one_by_one(job, deque((number, unit) for number, unit, _ in running), folder)


def _one_by_one(job, suspects, folder):
    """What became of units of which at least one ends its process."""
    while suspects:
        with _pool(job, 1) as pool:
            try:
                while suspects:
                    number, unit = suspects[0]
                    shutil.rmtree(folder / str(number), ignore_errors=True)
                    done = pool.submit(_work, unit, folder / str(number)).result()
                    suspects.popleft()
                    yield done
            except BrokenProcessPool:
                suspects.popleft()
                yield Done([], [LeftOut(unit.name, "the process that read it was ended, perhaps for want of memory")],
                            failed=True)


def _pool(job, workers) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, get_context("spawn"), _start, (job._replace(workers=1),))


def pieces(outcome: Outcome) -> Mapping[str, tuple[int, int]]:
    """The parts of what was prepared, with how many cases and how many patients (or series) each has."""
    found: dict[str, tuple[int, int]] = {}
    for part in sorted({row["part"] for row in outcome.rows}, key=lambda part: (
            PARTS.index(part) if part in PARTS else len(part), part)):
        rows = [row for row in outcome.rows if row["part"] == part]
        found[part] = len(rows), sum(other == part for other in outcome.parts.values())
    return found
