"""The folder that cimd-prepare writes, and how it goes on.

In it lie the cases (or train/, val/, test/ or fold1/, fold2/, ... with them), manifest.csv, split.json, left_out.csv,
and the journal by which a later run goes on: a line with the options, and one for each unit done.
"""

import json
import os
import re
import shutil
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data import manifest
from ..data.case_files import MAX_NAME_BYTES
from ..system import storage
from ..system.errors import InputError
from .base import LeftOut, Unit

JOURNAL, SPLIT, LEFT_OUT, UNFINISHED = ".prepared.jsonl", "split.json", "left_out.csv", ".unfinished"
LOCK = ".prepared.lock"
_UNSAFE = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff/\\]|^\.")

Row = dict[str, Any]  # of the manifest, by column


class Done(NamedTuple):
    """What became of a unit."""

    rows: list[Row]  # row i is that of the case in folder i
    left_out: list[LeftOut]
    failed: bool = False  # as a whole; a later run tries it again


class Folder:
    """A folder that is being written.

    :param kind: of the source; split_by: what its units name, see Source.
    :raises InputError: if nothing can be written there.
    """

    def __init__(self, path: Path, kind: str, split_by: str):
        storage.make_folder(path, "OUT")
        self.path, self.kind, self.split_by = path, kind, split_by
        self.unfinished = path / UNFINISHED  # the cases of unit i are first written to unfinished/i
        self.rows: list[Row] = []
        self.parts: dict[str, str] = {}  # of a split by patient
        self._taken = dict.fromkeys((manifest.FILE, SPLIT, LEFT_OUT), "cimd-prepare")  # name of a case -> its unit

    # ---- going on ----

    def begin(self, options: Mapping[str, Any]) -> dict[str, list[LeftOut]]:
        """Take over what earlier runs have done.

        :returns: the units that they have done by name, with what these left out.
        :raises InputError: if the folder holds other things, or was begun with other options.
        """
        path, options = self.path / JOURNAL, json.loads(json.dumps(options))
        lines = []
        if path.exists():
            for text in storage.read_bytes(path).decode(errors="replace").splitlines():
                try:
                    lines.append(json.loads(text))
                except ValueError:  # where a run was killed while it wrote
                    break
        elif others := sorted(storage.names_in(self.path) - {LOCK}):
            raise InputError(f"OUT {self.path}: holds {others[0]}, which cimd-prepare did not begin; give a new or"
                             f" empty folder")
        begun, *units = lines or [options]
        if not units:  # nothing is there that other options would not suit
            begun = options
            (self.path / SPLIT).unlink(missing_ok=True)
        unlike = [f"{name} {options.get(name)} (there: {begun.get(name)})"
                  for name in dict.fromkeys([*options, *begun]) if options.get(name) != begun.get(name)]
        if unlike:
            raise InputError(f"{', '.join(unlike)}: not what {self.path} was begun with; give the same options to go on"
                             f" with it, or another OUT")
        storage.write_bytes(path, "".join(json.dumps(line) + "\n" for line in [begun, *units]).encode())
        shutil.rmtree(self.unfinished, ignore_errors=True)
        for unit in units:
            self.rows += unit["rows"]
            self._taken |= {unicodedata.normalize("NFC", row["case"]): unit["unit"] for row in unit["rows"]}
        return {unit["unit"]: [LeftOut(*left) for left in unit["left_out"]] for unit in units}

    def known_parts(self) -> dict[str, str]:
        """The part of a split for each patient that the folder was begun with.

        :raises InputError: if split.json cannot be read.
        """
        if not (self.path / SPLIT).exists():
            return {}
        try:
            split = json.loads(storage.read_bytes(self.path / SPLIT))
            return {patient: part for part, names in split["parts"].items() for patient in names["patients"]}
        except (ValueError, LookupError, TypeError, AttributeError):
            raise InputError(f"{self.path / SPLIT}: cannot be read; prepare into another folder") from None

    # ---- cases ----

    def take(self, unit: Unit, done: Done, number: int) -> list[LeftOut]:
        """Bring the cases of a unit from unfinished/number to their places, no two of one name, and note it as done.

        :returns: what is left out.
        """
        rows, left_out, folder = [], list(done.left_out), self.unfinished / str(number)
        for i, row in enumerate(done.rows):
            name = row["case"]
            other = self._taken.setdefault(unicodedata.normalize("NFC", name), unit.name)
            if _UNSAFE.search(name) or not 0 < len(name.encode(errors="replace")) <= MAX_NAME_BYTES:
                left_out.append(LeftOut(unit.name, f"its case {name!r} cannot be the name of a folder; rename it"))
            elif other != unit.name or name in [row["case"] for row in rows]:
                left_out.append(LeftOut(unit.name, f"names its case {name}, as {other} does; rename one"))
            else:
                part = self.parts.get(unit.patient, "")
                place = self.path / part / name
                place.parent.mkdir(exist_ok=True)
                if place.exists():  # of a run that was killed before it had noted the unit as done
                    shutil.rmtree(place)
                os.rename(folder / str(i), place)
                rows.append({"part": part, "source": self.kind, **self._whose(unit), **row})
        shutil.rmtree(folder, ignore_errors=True)
        self.rows += rows
        if not done.failed:
            self._note({"unit": unit.name, "rows": rows, "left_out": left_out})
        return left_out

    def _whose(self, unit):
        return {"patient": unit.patient} if self.split_by == "patient" else (
            {"series": unit.patient} if self.split_by == "series" else {})

    def _note(self, line):
        with open(self.path / JOURNAL, "a", encoding="utf-8") as journal:
            journal.write(json.dumps(line, default=lambda number: number.item()) + "\n")  # of NumPy

    # ---- tables ----

    def finish(self, left_out: Sequence[LeftOut]) -> None:
        """Write manifest.csv and left_out.csv."""
        shutil.rmtree(self.unfinished, ignore_errors=True)
        self.rows.sort(key=lambda row: (row["part"], row["case"]))
        manifest.write(self.path / manifest.FILE, self.rows)
        storage.write_bytes(self.path / LEFT_OUT, manifest.table([LeftOut._fields, *left_out]))

    def write_split(self, split: str, folds: int, seed: int, names: Sequence[str]) -> None:
        """Write split.json: how cases were split, and the patients (or series) and cases of each of these parts."""
        content = {"by": self.split_by, "split": split, "folds": folds, "seed": seed, "parts": {
            part: {"patients": sorted(patient for patient, other in self.parts.items() if other == part),
                   "cases": [row["case"] for row in self.rows if row["part"] == part]} for part in names}}
        storage.write_bytes(self.path / SPLIT, json.dumps(content, indent=1).encode())

    def link_folds(self, folds: int) -> None:
        """Make without_fold1/, ...: links to all folds but one, to train on."""
        for left in range(1, folds + 1):
            folder = self.path / f"without_fold{left}"
            folder.mkdir(exist_ok=True)
            for fold in range(1, folds + 1):
                link = folder / f"fold{fold}"
                if fold != left and not link.is_symlink():
                    link.symlink_to(Path("..", f"fold{fold}"), target_is_directory=True)
