"""manifest.csv: what is known of prepared cases beyond their pictures, a row a case.

It lies in the folder that `cimd-prepare` wrote, above the folders of its cases and of the parts of a split.
"""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..system import storage
from ..system.errors import InputError
from .case_files import CaseFiles
from .readers import nifti

FILE = "manifest.csv"
COLUMNS = ("case", "part", "patient", "source", "series", "image_uid", "slice", "spacing", "window", "raters", "areas")
"""The first columns: the folder of a case, the part of a split that it is in, its patient (empty if unknown), the kind
of input, UIDs of series and image, the slice, mm (row, column), grey values that became black and white, the number of
raters, and the area of each rater's mask in pixels. Sources add others."""


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows, dicts by column, as CSV; sequences become words with spaces between, None becomes nothing."""
    names = dict.fromkeys([*COLUMNS, *(name for row in rows for name in row)])
    storage.write_bytes(path, table([names, *([row.get(name) for name in names] for row in rows)]))


def table(rows: Iterable[Iterable[Any]]) -> bytes:
    """Rows of values as the bytes of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([_text(value) for value in row] for row in rows)
    return text.getvalue().encode(errors="backslashreplace")


def _text(value):
    if isinstance(value, (list, tuple)):
        return " ".join(map(_text, value))
    return f"{value:.10g}" if isinstance(value, float) else "" if value is None else str(value)


def read(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of a manifest by (part, case), as texts by column; none for another file of that name.

    :raises InputError: if it cannot be read.
    """
    try:
        text = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"), newline=""))
        if not {*COLUMNS} <= {*(text.fieldnames or ())}:
            return {}
        return {(row["part"], row["case"]): row for row in text}
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: cannot be read ({error}); prepare its cases anew, or remove it") from None


def rows_in_order(cases: Iterable[CaseFiles]) -> list[dict[str, str]]:
    """The row of each case in a manifest above its folder, {} for cases without.

    :raises InputError: as read.
    """
    manifests, found = {}, []
    for case in cases:
        folder = case.folder.resolve()  # folds lie among others as links
        for above, part in ((folder.parent, ""), (folder.parent.parent, folder.parent.name)):
            if above not in manifests:
                manifests[above] = read(above / FILE) if (above / FILE).is_file() else {}
            if row := manifests[above].get((part, folder.name)):
                break
        found.append(row or {})
    return found


def rows_of(cases: Iterable[CaseFiles]) -> dict[str, dict[str, str]]:
    """The rows of those cases that have one, by the names of the cases. :raises InputError: as read."""
    cases = [*cases]
    return {case.name: row for case, row in zip(cases, rows_in_order(cases)) if row}


def spacing_of(row: Mapping[str, str]) -> tuple[float, float] | None:
    """The (row, column) distance of pixels in mm that a row of a manifest tells, None if it does not."""
    numbers = [_positive(text) for text in row.get("spacing", "").split()]
    return tuple(numbers) if len(numbers) == 2 and all(numbers) else None


def place_of(row: Mapping[str, str]) -> dict[str, Any]:
    """What a row says of where its slice lies, called as in readers.base.Volume: volume, slice, slice_spacing; {} for
    cases of no volume."""
    if not row.get("volume") or not row["slice"].isdigit():
        return {}
    return {"volume": row["volume"], "slice": int(row["slice"]),
            "slice_spacing": _positive(row.get("slice_spacing", ""))}


def with_place(spacing: tuple[float, float] | None, info: Mapping[str, Any], row: Mapping[str, str]
               ) -> tuple[tuple[float, float] | None, dict[str, Any]]:
    """The spacing and info of a scan: what its files say, or else what a row says of its place, and of the volume that
    it was prepared from, if that is still there.

    :raises InputError: if the header of that volume cannot be read.
    """
    if spacing:
        return spacing, dict(info)
    of_file = nifti.place_of(Path(row["file"]), row["axis"])[1] if volume_of(row) else {}
    return spacing_of(row), {**info, **of_file, **place_of(row)}


def volume_of(row: Mapping[str, str]) -> str:
    """The name of the NIfTI volume that a slice was prepared from, if its file is still there; "" for others."""
    there = row.get("file") and row.get("axis") in nifti.SHOWN and place_of(row) and Path(row["file"]).is_file()
    return row["volume"] if there else ""


def _positive(text):
    """A number above 0; None for any other text."""
    try:
        return number if 0 < (number := float(text)) < float("inf") else None
    except ValueError:
        return None


def patients_of(cases: Iterable[CaseFiles]) -> dict[str, str]:
    """The patients, or else the series, that manifests name, by the names of the cases; cases without are not there.

    :raises InputError: as read.
    """
    return {name: whose for name, row in rows_of(cases).items() if (whose := row["patient"] or row["series"])}


def identities(row: Mapping[str, str]) -> list[str]:
    """What cases of a row's patient have in common, in words: its patient, its series."""
    patient = [f"patient {row['patient']} of the source {row.get('source')}"] if row.get("patient") else []
    return patient + ([f"series {row['series']}"] if row.get("series") else [])


def shared(one: Iterable[CaseFiles], other: Iterable[CaseFiles]) -> dict[str, tuple[str, str]]:
    """The patients and series that have cases in both, in words, each with the name of a case in one and the other."""
    found = {words: name for name, row in rows_of(one).items() for words in identities(row)}
    return {words: (found[words], name) for name, row in rows_of(other).items() for words in identities(row)
            if words in found}


def refuse_shared(cases: Iterable[CaseFiles], held_out: Iterable[CaseFiles], data_dir: str, val_dir: str) -> None:
    """Raise InputError if a patient or series has cases in --data_dir and in --val_dir, as far as manifests tell."""
    both = shared(cases, held_out)
    if both:
        words, (one, other) = next(iter(both.items()))
        more = f", and {len(both) - 1} more of its kind" if both.keys() - {words} else ""
        raise InputError(f"--val_dir {val_dir}: shares {words} with --data_dir {data_dir} ({other} there, {one} here)"
                         f"{more}; split by patient, as cimd-prepare --split does, or take other folders")
