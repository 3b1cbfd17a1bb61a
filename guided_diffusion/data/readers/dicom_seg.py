"""DICOM SEG files, read with pydicom as raters' labels of the series that they refer to."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...system import packages
from ...system.errors import InputError
from .. import masks
from .base import Segments

NEAR = 0.05  # mm between a frame and a slice that are at one place


class DicomSegments(Segments):
    """The segments of a BINARY file. Its frames may come in any order, and frames without a mark may be missing.

    A frame is of the slice whose image it refers to, or else of the slice at its place.

    :param slices: further info of each slice of the scan, see Volume.
    :raises InputError: if the file is of another kind, or a frame is of no slice.
    """

    def __init__(self, path: Path, slices: Sequence[Mapping[str, Any]]):
        self._pydicom = packages.require("pydicom", f"{path}: reading it")
        self._data = data = self._pydicom.dcmread(path)
        if data.get("SegmentationType") != "BINARY":
            raise InputError(f"{path}: is a segmentation of the type {data.get('SegmentationType')}; give one of the"
                             f" type BINARY")
        self.numbers = tuple(sorted(int(segment.SegmentNumber) for segment in data.SegmentSequence))
        self._frames: dict[tuple[int, int], list[int]] = {}  # by (slice, segment)
        by_uid: dict[str, list[int]] = {}
        for i, each in enumerate(slices):
            by_uid.setdefault(each.get("sop_uid", ""), []).append(i)
        for i, own in enumerate(data.PerFrameFunctionalGroupsSequence):
            groups = own, *(data.get("SharedFunctionalGroupsSequence") or [])[:1]
            number = self._slice_of(groups, slices, by_uid)
            if number is None:
                raise InputError(f"{path}: its frame {i + 1} is of no slice of the scan beside it; give the"
                                 f" segmentation of that series")
            segment = int(_first(groups, "SegmentIdentificationSequence").ReferencedSegmentNumber)
            self._frames.setdefault((number, segment), []).append(i)
        self._frame(len(data.PerFrameFunctionalGroupsSequence) - 1)  # so that a file that is cut off is found here

    @staticmethod
    def _slice_of(groups, slices, by_uid):
        """The number of the slice that a frame is of; None if there is none."""
        derived = _first(groups, "DerivationImageSequence")
        for source in (derived.get("SourceImageSequence") or []) if derived is not None else []:
            frames = source.get("ReferencedFrameNumber")
            frames = [frames] if isinstance(frames, int) else frames or []
            for i in by_uid.get(str(source.get("ReferencedSOPInstanceUID")), ()):
                if slices[i].get("frame") is None or not frames or slices[i]["frame"] + 1 in frames:
                    return i
        place = _first(groups, "PlanePositionSequence")
        position = None if place is None else place.get("ImagePositionPatient")
        return None if position is None else next(
            (i for i, each in enumerate(slices) if "position" in each and np.allclose(
                each["position"], np.array(position, float), rtol=0, atol=NEAR)), None)

    def mask(self, slice: int, segment: int) -> np.ndarray:
        marked = np.zeros((self._data.Rows, self._data.Columns), masks.DTYPE)
        for i in self._frames.get((slice, segment), ()):
            marked |= self._frame(i)
        return marked

    def _frame(self, i):
        return self._pydicom.pixels.pixel_array(self._data, index=i) > 0  # [H, W]


def _first(groups, name):
    """The first item of a sequence in the nearest group that has one; None if none has."""
    return next((group[name].value[0] for group in groups if name in group and group[name].value), None)
