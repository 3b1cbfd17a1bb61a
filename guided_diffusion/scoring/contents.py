"""What is in a data set and what is wrong with it, before anything is trained: a table, and a page of pictures."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data import manifest, masks, scaling
from ..data.case_files import CaseFiles, find_cases, read_case
from ..data.cases import Case, read_ahead
from ..data.readers.base import Readers, refuse_unused
from ..draw import montage
from ..metrics import Agreement, patient_of
from ..system import packages, storage
from ..system.errors import InputError
from ..system.terminal import program_name, progress, summary

PARTS = re.compile(r"train(ing)?|val(idation)?|test(ing)?|fold\d+")  # folders that are data sets by themselves
PICTURE, TABLE, NUMBERS = "check.png", "check.csv", "check.json"
MEMBERS = 16  # masks of which a perfect model's GED is said
SHOWN = 5  # names that a line holds


class CaseFacts(NamedTuple):
    """What is kept of a case."""

    part: str
    case: str
    patient: str  # or the series, where the manifest knows no patients
    height: int
    width: int
    channels: int
    bits: int
    low: float  # grey values from 0 to 1
    mean: float
    high: float
    raters: int
    areas: list[int]  # of each rater's mask, in pixels
    distance: float | None  # D of the case: mean 1 - IoU over pairs of different raters; None for one rater
    presence: float | None  # the share of D from pairs of which one marks nothing
    iou: float | None  # mean IoU, and Dice, over pairs that both mark something; None without such pairs
    dice: float | None
    at_edge: bool  # whether a mask reaches the edge of the image
    digest: str  # of the pixels of the image

    @property
    def marked(self) -> int:
        """How many raters mark anything."""
        return sum(area > 0 for area in self.areas)


def facts_of(part: str, case: str, patient: str, image: np.ndarray, raters: np.ndarray) -> CaseFacts:
    """What is said of a case: image [C, H, W] uint8 or uint16, raters [R, H, W] bool."""
    unit, (count, height, width) = scaling.to_unit(image), raters.shape
    agreement = Agreement(raters[:1], raters)
    areas = agreement.area[1:].numpy()
    iou, dice = (agreement.similarity(kind)[1:, 1:].numpy() for kind in ("IoU", "Dice"))
    pairs = np.triu(np.ones((count, count), bool), 1)
    both, one = ((areas[:, None] > 0) & (areas > 0)) & pairs, ((areas[:, None] > 0) != (areas > 0)) & pairs
    edge = raters[:, [0, -1]].any() or raters[:, :, [0, -1]].any()
    return CaseFacts(
        part, case, patient, height, width, len(image), 8 * image.itemsize, *map(float, (unit.min(), unit.mean(),
                                                                                         unit.max())),
        count, areas.astype(int).tolist(), float(1 - iou[pairs].mean()) if count > 1 else None,
        float(one.sum() / pairs.sum()) if count > 1 else None,
        float(iou[both].mean()) if both.any() else None, float(dice[both].mean()) if both.any() else None,
        bool(edge), hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest())


def parts_of(folder: Path) -> dict[str, Path]:
    """The data sets in a folder by name: train, val, ... if it holds nothing else but such, else the folder itself."""
    if not folder.is_dir():
        raise InputError(f"INPUT {folder}: no such folder")
    inside = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    inside = [path for path in inside if not path.name.startswith("without_fold")]  # links to folds
    if inside and all(PARTS.fullmatch(path.name) for path in inside):
        order = {"t": 0, "v": 1, "f": 3}
        return {path.name: path for path in sorted(inside, key=lambda path: (
            2 if path.name.startswith("test") else order[path.name[0]], len(path.name), path.name))}
    return {"": folder}


def check(folder: Path, out: Path, options: Mapping[str, Any]) -> str:
    """Look at all cases of a folder, and write check.png, check.csv and check.json.

    :param options: values of the readers' flags and patient_pattern, by name.
    :returns: the table, as text.
    :raises InputError: if there are no cases, or none can be read.
    """
    readers = Readers(options)
    found = {part: find_cases(path, "INPUT", readers) for part, path in parts_of(folder).items()}
    files = [(part, case) for part, cases in found.items() for case in cases]
    refuse_unused(options, readers.used(case for _, case in files), str(folder))
    known = {part: manifest.rows_of(cases) for part, cases in found.items()}

    def look(item):
        part, case = item
        row = known[part].get(case.name, {})
        patient = row.get("patient") or row.get("series") or patient_of(case.name, options["patient_pattern"])
        try:
            image, raters, *_ = read_case(case, readers=readers)
            return facts_of(part, case.name, patient, image, raters)
        except InputError as error:
            return str(error)

    storage.make_folder(out, "OUT")
    looked = [*progress(read_ahead(look, files), f"checking {folder}", len(files), "case")]
    facts = [result for result in looked if isinstance(result, CaseFacts)]
    problems = [result for result in looked if isinstance(result, str)]
    if not facts:
        raise InputError(f"{folder}: none of its {len(files)} cases can be read; the first: {problems[0]}")
    table = {part or "all": numbers([row for row in facts if row.part == part]) for part in found}
    if found.keys() - {""}:
        table["all"] = numbers(facts)
    wrong = [*problems, *across(found), *([] if any(known.values()) else by_name(facts)), *findings(facts)]
    page = _page(facts, {(part, case.name): case for part, case in files}, readers)
    paths = _write(out, facts, table, wrong, page)
    rows = [*_columns(table), ("", ""), ("found", f"{len(wrong)} things to look at" if wrong else "nothing wrong")]
    return "\n".join([summary(f"{len(facts)} cases in {folder}", [*rows, *paths]), *(f"- {line}" for line in wrong)])


# ---- numbers ----

def numbers(facts: Sequence[CaseFacts]) -> dict[str, Any]:
    """What the table says of cases, by name; None for what they do not tell."""
    areas = np.array([area for row in facts for area in row.areas if area])
    several = [row for row in facts if row.distance is not None]
    distances = np.array([row.distance for row in several])
    floor = {n: np.mean([row.distance * ((1 / n if n else 0) + 1 / row.raters) for row in several]).item()
             if several else None for n in (MEMBERS, None)}

    def mean(values):
        values = [value for value in values if value is not None]
        return float(np.mean(values)) if values else None

    return {
        "cases": len(facts), "patients": len({row.patient for row in facts}),
        "raters a case": _range(row.raters for row in facts),
        "sizes": _most(f"{row.width} x {row.height}" for row in facts),
        "channels": _most(f"{row.channels} of {row.bits} bits" for row in facts),
        "grey values, lowest": mean(row.low for row in facts), "grey values, mean": mean(row.mean for row in facts),
        "grey values, highest": mean(row.high for row in facts),
        "cases by raters who mark": " ".join(f"{count}:{many}" for count, many in sorted(
            Counter(row.marked for row in facts).items())),
        "empty masks": 1 - len(areas) / sum(row.raters for row in facts),
        "area, median (px)": float(np.median(areas)) if len(areas) else None,
        "area, 90 % within (px)": "{:.0f} to {:.0f}".format(*np.percentile(areas, [5, 95])) if len(areas) else None,
        "masks at the image's edge": mean(row.at_edge for row in facts),
        "IoU of raters who both mark": mean(row.iou for row in facts),
        "Dice of raters who both mark": mean(row.dice for row in facts),
        "D, mean 1 - IoU of raters": mean(distances),
        "of which one marks nothing": mean(row.presence for row in several) / distances.mean()
        if several and distances.any() else None,
        f"best GED of {MEMBERS} masks": floor[MEMBERS], "best GED of any number": floor[None],
    }


def _range(values):
    low, high = min(values := list(values)), max(values)
    return str(low) if low == high else f"{low} to {high}"


def _most(values):
    """The three commonest of words, and how many others there are."""
    words = [word for word, _ in Counter(values).most_common()]
    return ", ".join(words[:3]) + (f" and {len(words) - 3} others" if words[3:] else "")


def _columns(table):
    """Rows of words: a name, and what each part has."""
    def word(value):
        if isinstance(value, float):
            return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
        return "-" if value is None else str(value)

    words = {part: [part, *map(word, values.values())] for part, values in table.items()}
    widths = [max(map(len, column)) for column in words.values()]
    names = ["", *next(iter(table.values()))]
    rows = [(name, "  ".join(f"{column[i]:<{width}}" for column, width in zip(words.values(), widths)).rstrip())
            for i, name in enumerate(names)]
    return rows if len(table) > 1 else rows[1:]


# ---- what is wrong ----

def across(found: Mapping[str, Iterable[CaseFiles]]) -> list[str]:
    """The patients and series that manifests name on both sides of a split."""
    parts, lines = [*found], []
    for i, one in enumerate(parts):
        for other in parts[i + 1:]:
            both = manifest.shared(found[one], found[other])
            for words, cases in list(both.items())[:SHOWN]:
                lines.append(f"{words}: has cases in {one} ({cases[0]}) and in {other} ({cases[1]}); move all of them"
                             f" to one part")
    return lines


def by_name(facts: Sequence[CaseFacts]) -> list[str]:
    """The patients that cases of several parts are named after: that of LIDC-IDRI-0314-2 is, that of case1 is not."""
    parts: dict[str, set[str]] = {}
    for row in facts:
        if row.case != row.patient:
            parts.setdefault(row.patient, set()).add(row.part)
    both = sorted(patient for patient, names in parts.items() if len(names) > 1)
    return [line] if (line := _line(both, "the names of cases in several parts of the split begin so; if they are"
                                          " patients, move all cases of each to one part", str)) else []


def findings(facts: Sequence[CaseFacts]) -> list[str]:
    """What of cases is likely to be a mistake, a line each."""
    pictures: dict[str, list[CaseFacts]] = {}
    for row in facts:
        pictures.setdefault(row.digest, []).append(row)
    same = [rows for rows in pictures.values() if len(rows) > 1]
    between, within = ([rows for rows in same if (len({row.part for row in rows}) > 1) == several]
                       for several in (True, False))
    flat = [row for row in facts if row.low == row.high]
    most = [row for row in facts if max(row.areas) > row.height * row.width / 2]
    lonely = [row for row in facts if row.raters == 1]
    return [*filter(None, [
        _line(between, "the same picture lies in two parts of the split; leave one out", lambda rows: " = ".join(
            f"{row.part}/{row.case}" for row in rows[:2])),
        _line(within, "the same picture under two names; leave one out", lambda rows: " = ".join(
            row.case for row in rows[:2])),
        _line(flat, "the image has one grey value throughout; look whether its window or reader is right", _name),
        _line(most, "a mask covers more than half of the image; look whether foreground and background are swapped",
              _name),
        _line(lonely if len(lonely) < len(facts) else [], "has one rater, others have several", _name),
        "every case has one rater: D and the best GED are unknown, and no model learns how raters differ"
        if len(lonely) == len(facts) else None,
        "no rater marks anything in any case; look whether the masks are read as they should be"
        if not any(row.marked for row in facts) else None])]


def _name(row):
    return f"{row.part}/{row.case}" if row.part else row.case


def _line(rows, words, name):
    if not rows:
        return None
    more = f" and {len(rows) - SHOWN} more" if len(rows) > SHOWN else ""
    return f"{', '.join(map(name, rows[:SHOWN]))}{more}: {words}"


# ---- the page ----

def chosen(facts: Sequence[CaseFacts]) -> dict[int, str]:
    """The numbers of the cases to show, each with what it is shown for."""
    by_distance = sorted((i for i, row in enumerate(facts) if row.marked and row.distance is not None),
                         key=lambda i: facts[i].distance)
    by_area = sorted((i for i, row in enumerate(facts) if row.marked), key=lambda i: max(facts[i].areas))
    empty = [i for i, row in enumerate(facts) if not row.marked]
    found = {}
    for share, words in ((0, "raters agree most"), (0.25, "D at its first quarter"), (0.5, "median D"),
                         (0.75, "D at its third quarter"), (1, "raters agree least")):
        if by_distance:
            found.setdefault(by_distance[round(share * (len(by_distance) - 1))], words)
    if by_area:
        found.setdefault(by_area[0], "smallest mask")
        found.setdefault(by_area[len(by_area) // 2], "median area")
        found.setdefault(by_area[-1], "largest mask")
    if empty:
        found.setdefault(empty[0], "no rater marks anything")
    return found


def _page(facts, files, readers):
    """PNG bytes: some cases with their raters' outlines, and charts where matplotlib is installed."""
    cases, none = [], []
    for i, words in chosen(facts).items():
        row = facts[i]
        image, raters, *_ = read_case(files[row.part, row.case], readers=readers)
        cases.append(Case(f"{words}: {_name(row)}", scaling.to_unit(image), raters))
        none.append(np.zeros((0, *raters.shape[1:]), masks.DTYPE))
    pages = [montage.panel(cases, none, "cases and what their raters mark")]
    if packages.is_installed("matplotlib"):
        from ..draw.plots import contents_figure

        pages.append(montage.opened(contents_figure(facts)))
    return montage.png(montage.stack(pages))


def _write(out, facts, table, wrong, page):
    columns = [name for name in CaseFacts._fields if name != "digest"]
    rows = [[getattr(row, name) for name in columns] for row in facts]
    said = {"program": program_name(), "table": table, "found": wrong}
    content = {PICTURE: page, TABLE: manifest.table([columns, *rows]), NUMBERS: json.dumps(said, indent=1).encode()}
    for name, data in content.items():
        storage.write_bytes(out / name, data)
    return [(what, str(out / name)) for what, name in (("to look at", PICTURE), ("a row a case", TABLE),
                                                       ("the same numbers", NUMBERS))]
