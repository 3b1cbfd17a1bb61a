"""Prepares the cases of a source: in parallel, going on where it was stopped, whatever is broken in between.

In the folder that it writes lie the cases (or train/, val/, test/ or fold1/, fold2/, ... with them), manifest.csv,
split.json, left_out.csv, and the journal by which it goes on: a line with the options, and one for each unit done.
"""

import json
import os
import re
import shutil
import unicodedata
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data import manifest
from ..data.case_files import MAX_NAME_BYTES
from ..system import storage
from ..system.errors import InputError
from ..system.registry import load_plugin
from ..system.terminal import progress
from . import SOURCES
from .base import LeftOut, Source
from .splits import PARTS, assign, shares_of
from .writing import WriteError, write_case

JOURNAL, SPLIT, LEFT_OUT, UNFINISHED = ".prepared.jsonl", "split.json", "left_out.csv", ".unfinished"
_OWN = (manifest.FILE, SPLIT, LEFT_OUT)
SAMPLE = 8  # units that an estimate is made from
_UNSAFE = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff/\\]|^\.")


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


class _Done(NamedTuple):
    """What became of a unit."""

    rows: list[dict[str, Any]]  # row i is that of the case in folder i
    left_out: list[LeftOut]
    failed: bool = False  # as a whole; a later run tries it again


def prepare(job: Job, out: Path) -> Outcome:
    """Prepare all cases into a folder.

    :raises InputError: if the input holds nothing of the kind or no case at all, if the folder holds other things, or
        was begun with other options, or cannot be written.
    """
    shares, source = shares_of(job.split, job.folds), job.source()
    units, left_out = _units(source, job)
    storage.make_folder(out, "OUT")
    with storage.claim(out, "OUT", ".prepared.lock", "is preparing"):
        before = _open_journal(out, job)
        parts = _parts(job, units, source, shares, out)
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        cases = _Cases(job.kind, source.split_by, out, parts)
        for name, (rows, lost) in before.items():
            cases.keep(name, rows)
            left_out += lost
        todo = [unit for unit in units if unit.name not in before]
        with open(out / JOURNAL, "a", encoding="utf-8") as journal:
            shown = progress(_results(job, source, todo, out / UNFINISHED), "preparing", len(units), "unit",
                             initial=len(units) - len(todo))
            for number, (done, unit) in enumerate(zip(shown, todo)):
                rows, lost = cases.take(unit, done, out / UNFINISHED / str(number))
                left_out += lost
                if not done.failed:
                    line = {"unit": unit.name, "rows": rows, "left_out": lost}
                    journal.write(json.dumps(line, default=lambda number: number.item()) + "\n")  # NumPy's
                    journal.flush()
        shutil.rmtree(out / UNFINISHED, ignore_errors=True)
        cases.rows.sort(key=lambda row: (row["part"], row["case"]))
        _write_tables(job, out, cases.rows, left_out, parts, source.split_by)
    if not cases.rows:
        raise InputError(f"{job.path}: nothing of it became a case ({_first(left_out)}); {out / LEFT_OUT} has all"
                         f" reasons")
    return Outcome(cases.rows, left_out, len(units), parts, source.split_by, _patients(units),
                   done_before=len(units) - len(todo))


def estimate(job: Job, folder: Path) -> Outcome:
    """What preparing would write, from a sample of the units, whose cases are written to a folder for that.

    :raises InputError: as prepare, as far as the sample tells.
    """
    shares, source = shares_of(job.split, job.folds), job.source()
    units, left_out = _units(source, job)
    parts = _parts(job, units, source, shares, None)
    chosen = sorted({*np.linspace(0, len(units) - 1, min(SAMPLE, len(units))).round().astype(int).tolist()})
    rows, size = [], 0
    for number, done in zip(chosen, _results(job, source, [units[i] for i in chosen], folder)):
        rows += [{**row, "part": _part(units[number], parts)} for row in done.rows]
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


def _parts(job, units, source, shares, out):
    """The part of a split for every patient: as drawn when the folder was begun, else as the flags say, else as the
    source does; written down. {} without a split."""
    if shares:
        known = {}
        if out is not None and (out / SPLIT).exists():
            try:
                known = {patient: part for part, names in json.loads(storage.read_bytes(out / SPLIT))["parts"].items()
                         for patient in names["patients"]}
            except (ValueError, LookupError, TypeError, AttributeError):
                raise InputError(f"{out / SPLIT}: cannot be read; prepare into another folder") from None
        parts = assign((unit.patient for unit in units), shares, job.seed, known)
    else:
        parts = {}
        for unit in units:
            if unit.part and parts.setdefault(unit.patient, unit.part) != unit.part:
                raise InputError(f"{job.path}: has the {source.split_by} {unit.patient} both in {parts[unit.patient]}"
                                 f" and in {unit.part}; give --split to split it anew")
    if parts and out is not None:
        _write_split(job, out, [], parts, source.split_by)
    return parts


def _part(unit, parts):
    return parts.get(unit.patient, "")


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
        return _Done([], [_plain(unit.name, str(error))], failed=True)
    except Exception as error:  # libraries raise almost anything on a damaged file
        return _Done([], [LeftOut(unit.name, f"cannot be read ({type(error).__name__}: {error})")], failed=True)
    return _Done(rows, left_out)


def _plain(what, reason):
    """Left out, without saying twice what."""
    return LeftOut(str(what), reason.removeprefix(f"{what}: "))


def _results(job, source, units, folder) -> Iterator[_Done]:
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
                yield _Done([], [LeftOut(unit.name, "the process that read it was ended, perhaps for want of memory")],
                            failed=True)


def _pool(job, workers) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, get_context("spawn"), _start, (job._replace(workers=1),))


# ---- the folder that is written ----

class _Cases:
    """The cases in the folder, no two of one name."""

    def __init__(self, kind, split_by, out, parts):
        self.kind, self.split_by, self.out, self.parts = kind, split_by, out, parts
        self.rows, self.taken = [], dict.fromkeys(_OWN, "cimd-prepare")

    def keep(self, unit_name, rows):
        """Count the cases of a unit that an earlier run has prepared."""
        for row in rows:
            self.taken[unicodedata.normalize("NFC", row["case"])] = unit_name
        self.rows += rows

    def take(self, unit, done, folder) -> tuple[list[dict[str, Any]], list[LeftOut]]:
        """Bring the cases of a unit from the folder that they were written to to their places.

        :returns: their rows, and what is left out.
        """
        rows, left_out = [], list(done.left_out)
        for i, row in enumerate(done.rows):
            name = row["case"]
            other = self.taken.setdefault(unicodedata.normalize("NFC", name), unit.name)
            if _UNSAFE.search(name) or not 0 < len(name.encode(errors="replace")) <= MAX_NAME_BYTES:
                left_out.append(LeftOut(unit.name, f"its case {name!r} cannot be the name of a folder; rename it"))
            elif other != unit.name or name in [row["case"] for row in rows]:
                left_out.append(LeftOut(unit.name, f"names its case {name}, as {other} does; rename one"))
            else:
                place = self.out / _part(unit, self.parts) / name
                place.parent.mkdir(exist_ok=True)
                if place.exists():  # of a run that was killed before it had noted the unit as done
                    shutil.rmtree(place)
                os.rename(folder / str(i), place)
                rows.append(self._row(unit, row))
        shutil.rmtree(folder, ignore_errors=True)
        self.rows += rows
        return rows, left_out

    def _row(self, unit, row):
        known = {"part": _part(unit, self.parts), "source": self.kind,
                 "patient": unit.patient if self.split_by == "patient" else None}
        if self.split_by == "series":
            known["series"] = unit.patient
        return {**known, **row}


def _open_journal(out, job) -> dict[str, tuple[list[dict[str, Any]], list[LeftOut]]]:
    """The units that earlier runs have done, by name, with their rows and what they left out.

    :raises InputError: if the folder holds other things, or was begun with other options.
    """
    path, options = out / JOURNAL, json.loads(json.dumps(job.options()))
    lines = []
    if path.exists():
        for text in storage.read_bytes(path).decode(errors="replace").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:  # where a run was killed while it wrote
                break
    elif others := sorted(storage.names_in(out) - {".prepared.lock"}):
        raise InputError(f"OUT {out}: holds {others[0]}, which cimd-prepare did not begin; give a new or empty folder")
    begun, *units = lines or [options]
    unlike = [f"{name} {options.get(name)} (there: {begun.get(name)})" for name in dict.fromkeys([*options, *begun])
              if options.get(name) != begun.get(name)]
    if unlike:
        raise InputError(f"{', '.join(unlike)}: not what {out} was begun with; give the same options to go on with it,"
                         f" or another OUT")
    storage.write_bytes(path, "".join(json.dumps(line) + "\n" for line in [begun, *units]).encode())
    return {unit["unit"]: (unit["rows"], [LeftOut(*left) for left in unit["left_out"]]) for unit in units}


def _write_tables(job, out, rows, left_out, parts, split_by):
    manifest.write(out / manifest.FILE, rows)
    storage.write_bytes(out / LEFT_OUT, manifest.table([LeftOut._fields, *left_out]))
    if parts:
        _write_split(job, out, rows, parts, split_by)
    if job.folds:
        _link_folds(out, job.folds)


def _write_split(job, out, rows, parts, split_by):
    """split.json: by what and how cases were split, and the patients (or series) and cases of each part."""
    names = shares_of(job.split, job.folds) or dict.fromkeys(sorted(parts.values()))
    split = {"by": split_by, "split": job.split, "folds": job.folds, "seed": job.seed, "parts": {
        part: {"patients": sorted(patient for patient, other in parts.items() if other == part),
               "cases": [row["case"] for row in rows if row["part"] == part]} for part in names}}
    storage.write_bytes(out / SPLIT, json.dumps(split, indent=1).encode())


def _link_folds(out, folds):
    """without_fold1/, ...: links to all folds but one, to train on."""
    for left in range(1, folds + 1):
        folder = out / f"without_fold{left}"
        folder.mkdir(exist_ok=True)
        for fold in range(1, folds + 1):
            link = folder / f"fold{fold}"
            if fold != left and not link.is_symlink():
                link.symlink_to(Path("..", f"fold{fold}"), target_is_directory=True)


def pieces(outcome: Outcome) -> Mapping[str, tuple[int, int]]:
    """The parts of what was prepared, with how many cases and how many patients (or series) each has."""
    found: dict[str, tuple[int, int]] = {}
    for part in sorted({row["part"] for row in outcome.rows}, key=lambda part: (
            PARTS.index(part) if part in PARTS else len(part), part)):
        rows = [row for row in outcome.rows if row["part"] == part]
        found[part] = len(rows), sum(other == part for other in outcome.parts.values())
    return found
