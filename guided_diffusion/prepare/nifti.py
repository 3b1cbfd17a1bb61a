"""NIfTI volumes of scans, one a modality, with volumes of masks, one a rater."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data import masks, scaling
from ..data.case_files import check_place
from ..data.intensities import WORDS
from ..data.readers.base import Readers
from ..metrics import patient_of
from ..system import packages
from ..system.errors import InputError
from ..system.flag import Flag, several
from . import SOURCES
from .base import LeftOut, PreparedCase, Source, Unit
from .lidc import CONTEXT, LEAST_SPACING, SPACING, resample
from .pictures import FOREGROUND, MISSING_MASKS
from .splits import PATIENT_PATTERN, checked

AXES = ("axial", "coronal", "sagittal")
BIDS = re.compile(r"(sub-[A-Za-z0-9]+)(_ses-[A-Za-z0-9]+)?(?![A-Za-z0-9])")  # patient and session
FLAGS = [
    Flag("modalities", str, "", "modalities by the names that files have in theirs, in the order of channels, as in"
         " flair,t1,t2,pd (default: a scan is one file)", "the cases"),
    Flag("raters", several, ["*_mask{k}", "*_desc-rater{k}_*"], "how the masks of raters are called: {k} is the"
         " rater's number, * at the start the name of the scan; without {k} a pattern is one rater", "the cases"),
    MISSING_MASKS,
    FOREGROUND,
    Flag("axis", AXES, "axial", "which slices become cases", "the cases"),
    Flag("normalise", str, "percentile", f"the numbers of a volume that become black and white. {WORDS}", "the cases"),
    Flag("empty", str, "keep", "slices that no rater marks. keep: all; drop: none; a number: so many of each volume,"
         " evenly spaced", "the cases"),
    CONTEXT,
    SPACING,
    PATIENT_PATTERN,
]


class _File(NamedTuple):
    """A file, and what its name says it is."""

    path: Path  # below INPUT
    scan: str  # what is before the modality or the rater's number
    slot: Any  # a modality's number, or (pattern, number) of a rater


@SOURCES.add("nifti", "NIfTI volumes, by modality, with masks in volumes, one a rater", FLAGS)
class Nifti(Source):
    """Reads volumes, .nii or .nii.gz, and a volume of a mask for each rater, as p1_flair.nii.gz, p1_t1.nii.gz,
    p1_mask1.nii.gz and p1_mask2.nii.gz, or as BIDS has them. Files whose names begin alike are of one scan; it does not
    matter in which folders they lie. Each slice becomes a case. Needs the package nibabel.
    """

    example = "my_mri my_data --modalities flair,t1,t2,pd --raters '*_mask{k}.nii.gz' --split 60:20:20"

    def __init__(self, path: Path, modalities: str, raters: list[str], missing_masks: str, foreground: str, axis: str,
                 normalise: str, empty: str, context: int, spacing: float, patient_pattern: str):
        super().__init__(path)
        packages.require("nibabel", "reading NIfTI")
        self.readers = Readers({"normalise": normalise, "foreground": foreground})
        self.modalities = [name for name in modalities.split(",") if name]
        self.raters, self.missing_masks, self.axis = [_rater_pattern(text) for text in raters], missing_masks, axis
        self.context, self.spacing, self.patient_pattern = context, spacing, checked(patient_pattern)
        self.normalise = normalise
        if not re.fullmatch(r"keep|drop|\d+", empty):
            raise InputError(f"--empty {empty}: must be keep, drop, or a number of slices a volume")
        self.empty = {"keep": None, "drop": 0}.get(empty, empty)
        if 0 < spacing < LEAST_SPACING:
            raise InputError(f"--spacing {spacing:g}: must be 0, or at least {LEAST_SPACING} mm")

    # ---- what there is ----

    def units(self) -> Iterator[Unit | LeftOut]:
        """The scans, each with a file a modality and those of its raters."""
        if not self.path.is_dir():
            raise InputError(f"INPUT {self.path}: no such folder")
        names = [path for path in _files(self.path) if self.readers.name_of(self.path / path) == "nifti"]
        files = [file for path in names if (file := self._file(path))]
        slots = {file.slot for file in files}
        for number, name in enumerate(self.modalities):
            if number not in slots:
                raise InputError(f"--modalities {name}: no file below {self.path} has it in its name"
                                 f" ({', '.join(path.name for path in names[:3]) or 'there is no NIfTI file'}"
                                 f"{' ...' if names[3:] else ''}); give those that there are")
        raters = sorted(slot for slot in slots if isinstance(slot, tuple))
        units = []
        for scan, found in self._scans(files):
            if problem := self._problem(found):
                yield LeftOut(scan, problem)
            else:
                by_slot = {file.slot: file.path for file in found}
                paths = [by_slot[number] for number in range(len(self.modalities) or 1)]
                units.append(Unit(scan, scan, (paths, [by_slot.get(rater) for rater in raters])))
        yield from self._by_patient(units)

    def _file(self, path) -> _File | None:
        stem = self.readers.stem_of(path)
        for number, pattern in enumerate(self.raters):
            if found := pattern.fullmatch(stem):
                return _File(path, _scan(path, found["scan"] or ""), (number, int(found["k"] or 0)))
        for number, name in enumerate(self.modalities):
            if found := re.search(rf"(?:^|[_.-]){re.escape(name)}(?![^_.-])", stem, re.IGNORECASE):
                return _File(path, _scan(path, stem[:found.start()]), number)
        return None if self.modalities else _File(path, _scan(path, stem), 0)

    def _scans(self, files):
        """(name, files) of each scan: files whose names begin alike, or, where these are no whole scan, those of a
        folder of its own."""
        alike, folders = {}, {}
        for file in files:
            alike.setdefault(file.scan, []).append(file)
            folders.setdefault(file.path.parent, []).append(file)
        whole = {scan for scan, found in alike.items() if not self._problem(found)}
        by_folder = {"_".join(folder.parts): found for folder, found in folders.items()
                     if folder.parts and not whole & {file.scan for file in found} and not self._problem(found)}
        placed = {file.path for found in by_folder.values() for file in found}
        rest = {scan: [file for file in found if file.path not in placed] for scan, found in alike.items()}
        return sorted([*by_folder.items(), *((scan, found) for scan, found in rest.items() if found)])

    def _problem(self, files):
        """Why the files of a scan make no cases; None if they do."""
        slots: dict[Any, Path] = {}
        for file in files:
            if file.slot in slots:
                return (f"{slots[file.slot]} and {file.path} are the same of it; give the folder of one of them as"
                        f" INPUT, or longer names, as in --modalities flair_pp or --raters '*_lesion{{k}}'")
            slots[file.slot] = file.path
        for number, name in enumerate(self.modalities or ["scan"]):
            if number not in slots:
                return f"has no file for the modality {name} ({files[0].path}); add it"
        if not any(isinstance(slot, tuple) for slot in slots):
            return f"no rater's mask has its name ({files[0].path}); add them, or say by --raters how they are called"
        return None

    def _by_patient(self, units):
        """Units with their patients: by --patient_pattern, as BIDS names them, else those in whose folder all files of
        a scan lie."""
        patients = []
        for unit in units:
            paths = [str(path.parent) for path in (*unit.data[0], *filter(None, unit.data[1]))]
            folder = "_".join(Path(os.path.commonpath(paths)).parts)
            bids = BIDS.match(unit.name)
            patients.append(patient_of(unit.name, self.patient_pattern) if self.patient_pattern
                            else bids[1] if bids else folder)
        known = all(patients) and (self.patient_pattern or len({*patients}) > 1 or len(units) == 1)
        self.split_by = "patient" if known else "series"
        return [unit._replace(patient=patient) if known else unit for unit, patient in zip(units, patients)]

    # ---- what becomes of a scan ----

    def cases(self, unit: Unit) -> Iterator[PreparedCase | LeftOut]:
        """The slices of a scan."""
        paths, labels = unit.data
        if self.missing_masks == "leave_out" and None in labels:
            yield LeftOut(unit.name, f"has masks of {len(labels) - labels.count(None)} of {len(labels)} raters; add the"
                                     f" others, or say by --missing_masks empty or skip what it means that they are"
                                     f" missing")
            return
        try:
            volumes, info, spacing = self._read(paths)
            image = np.concatenate(scaling.widen(volumes))  # [C, D, H, W]
            none = np.zeros(image.shape[1:], masks.DTYPE)
            raters = np.stack([none if path is None else self._mask(path, paths[0], info, image.shape[2:])
                               for path in labels if path is not None or self.missing_masks == "empty"])  # [R, D, H, W]
        finally:
            self.readers.forget()
        image, raters = (_slices(each, self.axis) for each in (image, raters))
        between, row, column = _of_axis((info["slice_spacing"], *(spacing or (None, None))), self.axis)
        known = {"volume": unit.name, "axis": self.axis, "slice_spacing": between, "window": self.normalise,
                 "file": str((self.path / paths[0]).resolve())}
        digits = max(3, len(str(image.shape[1] - 1)))
        for i in self._wanted(raters.any((0, 2, 3))):
            picture, outlines = image[:, _neighbours(i, self.context, image.shape[1])], raters[:, i]
            picture = picture.swapaxes(0, 1).reshape(-1, *picture.shape[2:])  # [(1 + 2 K) C, H, W]
            pixel = row, column
            if self.spacing and all(pixel):
                picture = np.stack([resample(each, pixel, self.spacing) for each in picture])
                outlines = np.stack([masks.from_pixels(resample(masks.to_pixels(each), pixel, self.spacing))
                                     for each in outlines])
                pixel = self.spacing, self.spacing
            yield PreparedCase(f"{unit.name}_{i:0{digits}}", picture, outlines, {
                **known, "slice": i, "spacing": list(pixel) if all(pixel) else None})

    def _read(self, paths):
        """The volumes [c, D, H, W] of the modalities, and what the first one says of itself."""
        volumes, first = [], None
        for path in paths:
            path = self.path / path
            scan = self.readers.read(path)
            first = first or scan
            slices = [scan.pixels, *(self.readers.read(path, i).pixels for i in range(1, scan.info["slices"]))]
            volumes.append(np.stack(slices, 1))
            self._check_size(path, volumes[-1].shape[2:], paths[0], volumes[0].shape[2:])
            check_place(path, scan.info, self.path / paths[0], first.info)
            for channel in volumes[-1]:
                if channel.min() == channel.max():
                    raise InputError(f"{path}: is of one grey value throughout with --normalise {self.normalise};"
                                     f" replace it, or give another --normalise")
        return volumes, first.info, first.spacing

    def _mask(self, path, image, info, size):
        """[D, H, W] bool, on the image's grid."""
        path = self.path / path
        own = self.readers.info(path)
        mask = np.stack([self.readers.read_mask(path, i) for i in range(own["slices"])])
        self._check_size(path, mask.shape[1:], image, size)
        check_place(path, own, self.path / image, info)
        return mask

    def _check_size(self, path, size, other, wanted):
        if size != wanted:
            raise InputError(f"{path}: is {size[1]} x {size[0]} voxels a slice, but {self.path / other} is"
                             f" {wanted[1]} x {wanted[0]}; resample it to that")

    def _wanted(self, marked):
        """The numbers of the slices to take; marked [D] bool."""
        empty = np.flatnonzero(~marked)
        if self.empty is not None:
            empty = empty[np.linspace(0, len(empty) - 1, min(int(self.empty), len(empty))).round().astype(int)]
        return sorted([*np.flatnonzero(marked).tolist(), *empty.tolist()])


def _files(root) -> Iterator[Path]:
    """All files below a folder, as paths below it, in a fixed order."""
    for folder, subfolders, names in os.walk(root):
        subfolders.sort()
        yield from (Path(folder, name).relative_to(root) for name in sorted(names) if not name.startswith("."))


def _rater_pattern(text: str) -> re.Pattern:
    """'*_mask{k}.nii.gz' as what finds the scan and the rater in the name of a file without its suffix."""
    if not text or set(re.findall(r"\{(.*?)\}", text)) - {"k"} or text.count("{k}") > 1 or "/" in text:
        raise InputError(f"--raters {text}: is no name of files with * for anything and {{k}}, at most once, for the"
                         f" number of a rater, as in '*_mask{{k}}.nii.gz'")
    stem = re.sub(r"\.nii(\.gz)?$", "", text)
    begins = stem.startswith("*")
    rest = re.escape(stem[begins:]).replace(r"\*", ".*").replace(r"\{k\}", r"(?P<k>\d+)")
    return re.compile((r"(?P<scan>.*?)" if begins else "(?P<scan>)") + rest + ("" if "{k}" in stem else "(?P<k>)"),
                      re.IGNORECASE)


def _scan(path: Path, start: str) -> str:
    """The name of a file's scan: what its name starts with, as BIDS has it, else the folders that it lies in."""
    bids = BIDS.match(path.name)
    return bids[0] if bids else start.rstrip("_-.") or "_".join(path.parent.parts) or "scan"


def _of_axis(each: tuple, axis: str) -> tuple:
    """Something of (slices, rows, columns) of axial slices -> that of the slices of this axis."""
    up, back, left = each
    return {"axial": (up, back, left), "coronal": (back, up, left), "sagittal": (left, up, back)}[axis]


def _slices(volume: np.ndarray, axis: str) -> np.ndarray:
    """Axial slices [..., D, H, W], from feet to head -> slices of an axis, the head at the top."""
    if axis == "axial":
        return volume
    lead = volume.ndim - 3
    volume = volume[..., ::-1, :, :]
    return volume.transpose(*range(lead), *(lead + i for i in _of_axis((0, 1, 2), axis)))


def _neighbours(number: int, context: int, slices: int) -> list[int]:
    """This slice, then those before and after, the nearest first; beyond an end the last slice is repeated."""
    return [number, *(min(max(number + side * distance, 0), slices - 1)
                      for distance in range(1, context + 1) for side in (-1, 1))]
