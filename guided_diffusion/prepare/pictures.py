"""Any folders of images and of masks, whose files are called by a pattern."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..data import scaling
from ..data.readers.base import Readers
from ..metrics import patient_of
from ..system.errors import InputError
from ..system.flag import Flag, several
from . import SOURCES
from .base import LeftOut, PreparedCase, Source, Unit
from .splits import PATIENT_PATTERN, checked

MISSING_MASKS = Flag("missing_masks", ("leave_out", "empty", "skip"), "leave_out", "what it means that a rater has no"
                     " file for a case. leave_out: nothing is known, and the case is left out; empty: the rater marked"
                     " nothing; skip: the rater did not see the case", "the cases")
FOREGROUND = Flag("foreground", str, "", "values of a mask that are foreground, as in 1,2 (default: of pictures what is"
                  " above half of full scale, of volumes what is above 0)", "the cases")
FLAGS = [
    Flag("images", several, [], "where the images are below INPUT, as in 'scans/{case}.tif': {case} is what names the"
         " case, {patient} its patient, and * is anything. Several patterns are channels", "pictures"),
    Flag("masks", several, [], "where the masks are, a pattern a rater, as in 'a/{case}-a.gif' 'b/{case}-b.png'; or one"
         " with {rater}, as in 'masks/{case}_{rater}.png'", "pictures"),
    MISSING_MASKS,
    FOREGROUND,
    PATIENT_PATTERN,
]


@SOURCES.add("pictures", "folders of images and of masks, found by patterns", FLAGS)
class Pictures(Source):
    """Reads images and masks of one size, found by the patterns of --images and --masks. A pixel of a mask is
    foreground above half of full scale, or where --foreground says so. With {patient} in the patterns a case is called
    PATIENT_CASE and split by patient. So it is with --patient_pattern. Else every case is split by itself.
    """

    example = "my_scans my_data --images 'scans/{patient}/{case}.tif' --masks 'a/{case}-a.gif' 'b/{case}-b.png'"

    def __init__(self, path: Path, images: list[str], masks: list[str], missing_masks: str,
                 foreground: str, patient_pattern: str):
        super().__init__(path)
        self.readers = Readers({"foreground": foreground})
        self.missing_masks, self.patient_pattern = missing_masks, checked(patient_pattern)
        self.images = [_Pattern("--images", pattern) for pattern in images]
        self.masks = [_Pattern("--masks", pattern) for pattern in masks]
        for flag, patterns in (("--images", self.images), ("--masks", self.masks)):
            if not patterns:
                raise InputError(f"{flag}: is needed, as in {flag} 'folder/{{case}}.png'")
        if any("rater" in pattern.fields for pattern in self.images):
            raise InputError(f"--images {images[0]}: is of raters; {{rater}} belongs into --masks")
        with_patient = {"patient" in pattern.fields for pattern in self.images}
        if with_patient == {True, False}:
            raise InputError(f"--images {' '.join(images)}: give {{patient}} in all patterns, or in none")
        has_patients = True in with_patient
        if not has_patients and any("patient" in pattern.fields for pattern in self.masks):
            raise InputError(f"--masks {' '.join(masks)}: has {{patient}}, so give it in --images, too")
        if has_patients and patient_pattern:
            raise InputError(f"--patient_pattern {patient_pattern}: {{patient}} in --images says the same; give one")
        self.split_by = "patient" if has_patients or patient_pattern else "case"

    def units(self) -> Iterator[Unit | LeftOut]:
        if not self.path.is_dir():
            raise InputError(f"INPUT {self.path}: no such folder")
        images, masks, twice = {}, {}, []
        for path in _files(self.path):
            for number, pattern in enumerate(self.images):
                if key := pattern.key(path):
                    _note(images, key[:2], number, path, twice)
            for number, pattern in enumerate(self.masks):
                if key := pattern.key(path):
                    _note(masks, key[:2], (number, key[2]), path, twice)
        if not images:
            raise InputError(f"INPUT {self.path}: holds no file that --images"
                             f" {' '.join(pattern.text for pattern in self.images)} describes")
        yield from twice
        raters = sorted({rater for found in masks.values() for rater in found}, key=_natural)
        seen = set()
        for (patient, case), channels in sorted(images.items()):
            name = f"{patient}_{case}" if patient else case
            keys = {(patient, case), ("", case)}  # masks may leave the patient away
            seen |= keys
            own = {rater: path for key in keys for rater, path in masks.get(key, {}).items()}
            missing = [pattern.text for number, pattern in enumerate(self.images) if number not in channels]
            if missing:
                yield LeftOut(name, f"has no file for --images {missing[0]}; add it")
            else:
                patient = patient or patient_of(case, self.patient_pattern or ".*")
                paths = [channels[number] for number in sorted(channels)]
                yield Unit(name, patient, (paths, [own.get(rater) for rater in raters]))
        for key in sorted(masks.keys() - seen):
            yield LeftOut(min(masks[key].values()), "is a mask without its image; add that")

    def cases(self, unit: Unit) -> Iterator[PreparedCase | LeftOut]:
        paths, masks = unit.data
        channels = [self.readers.read(self.path / path).pixels for path in paths]
        for path, channel in zip(paths, channels):
            _check_size(self.path / path, channel.shape[1:], channels[0])
        image = np.concatenate(scaling.widen(channels))
        raters = [self._mask(path, image) for path in masks if path is not None or self.missing_masks == "empty"]
        if len(raters) < len(masks) and self.missing_masks == "leave_out":
            yield LeftOut(unit.name, f"has masks of {len(raters)} of {len(masks)} raters; add the others, or say by"
                                     f" --missing_masks empty or skip what it means that they are missing")
        elif not any(masks):
            yield LeftOut(unit.name, "has no mask; add one, whose name fits --masks")
        else:
            yield PreparedCase(unit.name, image, np.stack(raters), {})

    def _mask(self, name, image) -> np.ndarray:
        if name is None:
            return np.zeros(image.shape[1:], bool)
        path = self.path / name
        mask = self.readers.read_mask(path)
        _check_size(path, mask.shape, image)
        return mask


class _Pattern:
    """'scans/{case}.tif' as what finds the case in a path."""

    def __init__(self, flag: str, text: str):
        self.text, self.fields = text, set(re.findall(r"\{(.*?)\}", text))
        if "case" not in self.fields or self.fields - {"case", "patient", "rater"} or re.match(r"/|.*\.\./", text):
            raise InputError(f"{flag} {text}: is no pattern below INPUT with {{case}} in it, and perhaps {{patient}}"
                             f" and {{rater}}, as in 'scans/{{patient}}/{{case}}.png'")
        parts, named = re.split(r"(\{\w+\}|\*)", text), set()
        for i, part in enumerate(parts):
            field = part.strip("{}")
            if not i % 2:
                parts[i] = re.escape(part)
            elif part == "*":
                parts[i] = "[^/]*"
            else:
                parts[i] = f"(?P={field})" if field in named else f"(?P<{field}>[^/]+)"
                named.add(field)
        self.expression = re.compile("".join(parts))

    def key(self, path: str) -> tuple[str, str, str] | None:
        """(patient, case, rater) in a path below INPUT, "" for what the pattern does not name; None for another."""
        found = self.expression.fullmatch(path)
        return found and tuple(found.groupdict().get(field, "") for field in ("patient", "case", "rater"))


def _files(root) -> Iterator[str]:
    """All files below a folder, with / between the folders, in a fixed order."""
    for folder, subfolders, names in os.walk(root):
        subfolders.sort()
        for name in sorted(names):
            yield Path(folder, name).relative_to(root).as_posix()


def _note(found: dict[Any, dict], key, which, path, twice):
    """Note a file of a case; `twice` gets those that come in second."""
    other = found.setdefault(key, {}).setdefault(which, path)
    if other != path:
        twice.append(LeftOut(path, f"names the same case as {other}; rename one"))


def _natural(rater):
    """The order of raters: by pattern, then by name, numbers by their size."""
    number, name = rater
    return number, [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _check_size(path, size, image):
    if size != image.shape[1:]:
        raise InputError(f"{path}: is {size[1]} x {size[0]} pixels, but the image of its case is {image.shape[2]} x"
                         f" {image.shape[1]}; give files of one size")
