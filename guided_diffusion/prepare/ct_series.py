"""CT series of DICOM files: which files are of a series, its slices in order, and their Hounsfield units.

Read with pydicom, which is imported where it is used.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from ..system.errors import InputError
from ..system.packages import require
from .base import LeftOut

_HEAD = [0x00080060, 0x00100020, 0x0020000E]  # the tags of Modality, PatientID and SeriesInstanceUID
_SLICE = ["SOPInstanceUID", "SeriesInstanceUID", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing",
          "Rows", "Columns"]
_OPTIONAL = ["InstanceNumber", "SliceThickness"]
AXIAL = 0.99  # least cosine between the normal of an axial slice and the body's axis
GAP = 1.5  # of the usual distance of slices; where two are further apart, one is missing between them


class Head(NamedTuple):
    """What tells whose a DICOM file is."""

    path: Path
    series: str  # its UID
    patient: str
    modality: str


class Slice(NamedTuple):
    """One image of a series."""

    path: Path
    uid: str  # SOPInstanceUID
    position: float  # along the body's axis, mm, to 0.001
    number: int  # InstanceNumber; 0 if it has none


def pydicom() -> ModuleType:
    """The package.

    :raises InputError: if it is not installed, with the command that installs it.
    """
    return require("pydicom", "reading DICOM")


def find_files(folder: Path) -> Iterator[Path]:
    """All files below a folder, in a fixed order."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(place, name) for name in sorted(names))


def head_of(path: Path) -> Head | None:
    """Whose a file is; None if it is no DICOM.

    :raises InputError: if it is damaged, or calls itself DICOM and is none.
    """
    try:
        with open(path, "rb") as file:  # the tags of a file ascend
            data = pydicom().filereader.read_partial(file, lambda tag, vr, size: tag > _HEAD[-1], specific_tags=_HEAD)
        return Head(path, str(data.SeriesInstanceUID), str(data.get("PatientID", "")), str(data.get("Modality", "")))
    except pydicom().errors.InvalidDicomError:
        if path.suffix.lower() == ".dcm":
            raise InputError("is no DICOM, or cut short; download it again") from None
        return None
    except Exception as error:  # pydicom raises almost anything on a damaged file
        raise InputError(_damaged(error)) from error


class Series:
    """The slices of an axial CT series, by their position along the body's axis, then by their InstanceNumber.

    :param slices: in that order.
    :param spacing: (row, column) distance of pixels in mm.
    :param thickness: SliceThickness in mm, else the distance of slices.
    """

    def __init__(self, slices: Sequence[Slice], height: int, width: int, spacing: tuple[float, float],
                 thickness: float | None):
        self.slices, self.height, self.width, self.spacing = slices, height, width, spacing
        self.places = {each.uid: place for place, each in enumerate(slices)}
        self.levels = sorted({each.position for each in slices})  # several slices may be at one
        self.distance = float(np.median(np.diff(self.levels))) if self.levels[1:] else 1.0  # usual one of levels, mm
        self.thickness = thickness or self.distance

    def neighbours(self, place: int, count: int) -> list[int]:
        """The places of `count` slices before, of this slice, and of `count` slices after it.

        Beyond an end of the series its last slice is repeated. Of several slices at one position the first is taken.

        :raises InputError: if a slice is missing among them.
        """
        level = self.levels.index(self.slices[place].position)
        wanted = np.clip(np.arange(level - count, level + count + 1), 0, len(self.levels) - 1)
        positions = np.array(self.levels)[wanted]
        if (np.diff(positions) > GAP * self.distance).any():
            raise InputError(f"a slice is missing within {count} of it; download the series again")
        first: dict[float, int] = {}
        for other, each in enumerate(self.slices):
            first.setdefault(each.position, other)
        found = [first[position] for position in positions]
        found[count] = place
        return found

    def hounsfield(self, place: int) -> np.ndarray:
        """The Hounsfield units of a slice, [H, W] float32.

        :raises InputError: if its pixels cannot be read.
        """
        path = self.slices[place].path
        try:
            data = pydicom().dcmread(path)
            pixels = data.pixel_array
            slope, intercept = float(data.RescaleSlope), float(data.RescaleIntercept)
        except Exception as error:
            raise InputError(f"{path}: {_unread(error)}") from error
        if pixels.shape != (self.height, self.width):
            raise InputError(f"{path}: has pixels {list(pixels.shape)}, not [{self.height}, {self.width}]; download it"
                             f" again")
        return pixels.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def read_series(paths: Iterable[Path]) -> tuple[Series, list[LeftOut]]:
    """A series from its files; files that cannot be read are left out, and those of a slice that is there already.

    :raises InputError: if no file can be read, if slices differ in orientation, size or spacing, or are not axial.
    """
    found, left_out = {}, []
    for path in paths:
        try:
            data = _read(path, _SLICE + _OPTIONAL)
            values = {name: getattr(data, name) for name in _SLICE}
            if any(value is None for value in values.values()):
                raise ValueError(f"{next(name for name in _SLICE if values[name] is None)} is empty")
            rows, columns = np.array(values["ImageOrientationPatient"], float).reshape(2, 3)
            position = np.array(values["ImagePositionPatient"], float)
            kind = (int(data.Rows), int(data.Columns), *map(float, data.PixelSpacing))
            number = int(data.get("InstanceNumber") or 0)
            each = Slice(path, str(data.SOPInstanceUID), round(float(position[2]), 3), number)
            thickness = float(data.get("SliceThickness") or 0) or None
        except Exception as error:
            left_out.append(LeftOut(str(path), _damaged(error)))
            continue
        if each.uid in found:
            left_out.append(LeftOut(str(path), f"is the same slice as {found[each.uid][0].path}"))
        else:
            found[each.uid] = each, kind, rows, columns, thickness
    if not found:
        raise InputError(f"none of its files can be read ({left_out[0].what}: {left_out[0].reason})")
    slices, kinds, rows, columns, thicknesses = zip(*found.values())
    if np.ptp(rows, axis=0).max() > 1e-3 or np.ptp(columns, axis=0).max() > 1e-3:
        raise InputError("its slices differ in orientation; part them into a series each")
    if abs(np.cross(rows[0], columns[0])[2]) < AXIAL:
        raise InputError("is not axial")
    if len({kind[:2] for kind in kinds}) > 1 or np.ptp([kind[2:] for kind in kinds], axis=0).max() > 1e-4:
        raise InputError("its slices differ in size or in the spacing of pixels; part them into a series each")
    height, width, *spacing = kinds[0]
    slices = sorted(slices, key=lambda each: (each.position, each.number, each.uid))
    return Series(slices, height, width, tuple(spacing), thicknesses[0]), left_out


def _read(path, tags):
    return pydicom().dcmread(path, stop_before_pixels=True, specific_tags=tags)


def _damaged(error):
    return f"is damaged ({type(error).__name__}: {error}); download it again"


def _unread(error):
    words = " ".join(str(error).split())
    if isinstance(error, (RuntimeError, NotImplementedError)):  # what pydicom raises where it has no decoder
        return f"its pixels cannot be decoded ({words}); pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg"
    return f"is damaged ({type(error).__name__}: {words}); download it again"
