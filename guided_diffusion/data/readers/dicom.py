"""DICOM images, series and multi-frame files, read with pydicom, which is needed for these files only."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...system import packages
from ...system.errors import InputError
from . import READERS
from .base import Segments, Stack, Volume, VolumeReader
from .dicom_seg import DicomSegments

CT_RANGE = -1000.0, 400.0  # HU, air to bone: what --normalise full takes of CT, whose numbers mean the same everywhere
_HEADER = ["SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "SeriesNumber", "InstanceNumber", "Rows", "Columns",
           "NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"]
_SEGMENTATIONS = "1.2.840.10008.5.1.4.1.1.66"  # and what begins with it: masks rather than scans
_NAMELESS = re.compile(r"[^.]+|[\d.]+")  # names without a suffix, or of digits and dots as UIDs are


@READERS.add("dicom", "DICOM, .dcm or without a suffix; each slice of a series and each frame is a case")
class Dicom(VolumeReader):
    """DICOM. Numbers are rescaled as the file says, to HU for CT. Slices of a series are in the order of their places.

    --normalise full takes CT_RANGE for CT, and the range of the stored bits for the rest.
    """

    suffixes = ".dcm",

    def recognises(self, path: Path) -> bool:
        if not _NAMELESS.fullmatch(path.name) or path.name.upper() == "DICOMDIR" or not path.is_file():
            return False
        try:
            with open(path, "rb") as file:
                return file.read(132)[128:] == b"DICM"
        except OSError:
            return False

    def stacks(self, files: Sequence[Path]) -> list[Stack]:
        pydicom = packages.require("pydicom", f"{files[0]}: reading it")
        series, found = {}, []
        for path in files:
            try:
                header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_HEADER)
                kind, frames = header.get("SOPClassUID"), int(header.get("NumberOfFrames", 1) or 1)
                for name in _HEADER:
                    header.get(name)  # values are parsed when they are asked for
            except Exception:  # reading it says what is wrong
                found.append(Stack(path.stem, (path,), 1))
                continue
            if kind and (kind.startswith(_SEGMENTATIONS) or ("Rows" not in header and "Image" not in kind.name)):
                continue  # plans, reports, outlines, masks
            if frames > 1:
                found.append(Stack(_stem(path), (path,), frames))
            else:
                series.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((path, header))
        alone = len(series) == 1 and not found
        for number, slices in enumerate(series.values(), 1):
            if len(slices) == 1:
                found.append(Stack(_stem(slices[0][0]), (slices[0][0],), 1))
            else:
                number = slices[0][1].get("SeriesNumber", number) if _distinct_numbers(series) else number
                name = "" if alone else f"series{number}"
                found.append(_in_order(name, slices))
        return found

    def read_volume(self, files: tuple[Path, ...]) -> Volume:
        parts = [_read(path, several=len(files) > 1) for path in files]
        pixels = np.concatenate([part for part, *_ in parts], axis=1)
        *_, spacing, full, common = parts[0]
        places = [place for _, places, *_ in parts for place in places]
        between = None
        if len(places) > 1 and all("position" in place and "orientation" in place for place in places[:2]):
            between = abs(_along(places[1]) - _along(places[0])) or None
        info = {"format": "dicom", "slices": len(places), "slice_spacing": between, "files": [*map(str, files)],
                **common}
        if between and spacing:
            info["grid"] = _grid(places, spacing)
        return Volume(pixels, spacing, info, full, places)

    def segments(self, path: Path, scan: Volume) -> Segments | None:
        pydicom = packages.require("pydicom", f"{path}: reading it")
        kind = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SOPClassUID"]).get("SOPClassUID", "")
        return DicomSegments(path, scan.slices) if kind.startswith(_SEGMENTATIONS) else None


def _stem(path):
    return path.stem if path.suffix.lower() == ".dcm" else path.name


def _distinct_numbers(series):
    numbers = [slices[0][1].get("SeriesNumber") for slices in series.values()]
    return None not in numbers and len({*numbers}) == len(numbers)


def _in_order(name, slices):
    """The Stack of the slices [(path, header)] of one series."""
    first, problem = slices[0][1], ""
    for tag, words in (("Rows", "size"), ("Columns", "size"), ("PixelSpacing", "spacing"),
                       ("ImageOrientationPatient", "orientation")):
        other = next((path for path, header in slices if not _alike(header.get(tag), first.get(tag))), None)
        if other and not problem:
            problem = (f"{other}: has another {words} than {slices[0][0].name}, of the same series; put slices of one"
                       f" {words} into a folder of their own")
    by_number = sorted(slices, key=lambda part: (int(part[1].get("InstanceNumber") or 0), part[0].name))
    if problem or not all("ImagePositionPatient" in header and "ImageOrientationPatient" in header
                          for _, header in slices):
        return Stack(name, tuple(path for path, _ in by_number), len(slices), problem)
    places = [_along({"position": header.ImagePositionPatient, "orientation": header.ImageOrientationPatient})
              for _, header in by_number]
    order = np.argsort(places, kind="stable")
    steps = np.diff(np.array(places)[order])
    usual = np.median(steps)
    gap = next((i for i, step in enumerate(steps) if step > 1.5 * usual > 0), None)
    if gap is not None:
        here, following = (by_number[order[i]][0] for i in (gap, gap + 1))
        problem = (f"{here}: is {steps[gap]:g} mm from the next slice of its series, {following.name}, but others are"
                   f" {usual:g} mm apart, so that slices are missing; add them, or put the slices of each side into a"
                   f" folder of their own")
    return Stack(name, tuple(by_number[i][0] for i in order), len(slices), problem)


def _alike(a, b):
    if isinstance(a, (int, type(None))) or isinstance(b, (int, type(None))):
        return a == b
    return np.allclose(np.array(a, float), np.array(b, float), atol=1e-3)


def _along(place):
    """Where a slice lies along the normal of its plane, in mm."""
    across, down = np.array(place["orientation"], float).reshape(2, 3)
    return float(np.dot(np.cross(across, down), np.array(place["position"], float)))


def _grid(places, spacing):
    """The affine of (column, row, slice) to (right, front, up) in mm, lists [4][4]."""
    across, down = np.array(places[0]["orientation"], float).reshape(2, 3)
    first, second = (np.array(place["position"], float) for place in places[:2])
    grid = np.eye(4)
    grid[:3] = np.stack([across * spacing[1], down * spacing[0], second - first, first], axis=1)
    return (np.diag([-1.0, -1, 1, 1]) @ grid).tolist()  # DICOM counts to the left and the back


def _read(path, several):
    """Pixels [C, D, H, W], further info of each slice, spacing, full range and info of one file."""
    pydicom = packages.require("pydicom", f"{path}: reading it")
    try:
        data = pydicom.dcmread(path)
    except pydicom.errors.InvalidDicomError:
        raise InputError(f"{path}: is no DICOM file, since it does not begin as one; replace it or remove it") from None
    if "PixelData" not in data and "FloatPixelData" not in data and "DoubleFloatPixelData" not in data:
        raise InputError(f"{path}: holds no picture, or is cut off; replace it or remove it")
    frames = int(data.get("NumberOfFrames", 1) or 1)
    stored = _decoded(pydicom, data, path)
    stored = stored.reshape(frames, data.Rows, data.Columns, -1)  # [D, H, W, C]
    if data.get("PhotometricInterpretation") == "MONOCHROME1" and stored.dtype.kind in "iu":  # 0 is white
        low, high = _stored_range(data)
        stored = (low + high - stored.astype(np.int32)).astype(stored.dtype)
    groups = [_groups(data, i) for i in range(frames)]
    rescale = [_rescale(each) for each in groups]
    if any(pair != (1, 0) for pair in rescale):
        stored = np.stack([_apply(frame, *pair) for frame, pair in zip(stored, rescale)])
    full = None
    if data.get("Modality") == "CT" and stored.shape[3] == 1:
        full = CT_RANGE
    elif "BitsStored" in data and stored.shape[3] == data.get("SamplesPerPixel", 1):  # not so for palettes
        slope, intercept = rescale[0]
        full = tuple(value * slope + intercept for value in _stored_range(data))
    places = [_place(each, path, i if frames > 1 and not several else None, data) for i, each in enumerate(groups)]
    common = {"modality": str(data.get("Modality", "")), "study_uid": str(data.get("StudyInstanceUID", "")),
              "series_uid": str(data.get("SeriesInstanceUID", ""))}
    return stored.transpose(3, 0, 1, 2), places, _spacing(groups[0]), full, common


def _decoded(pydicom, data, path):
    """Stored numbers, or colours as RGB."""
    try:
        pixels = pydicom.pixels.pixel_array(data)
    except (NotImplementedError, RuntimeError):
        syntax = data.file_meta.TransferSyntaxUID
        if not syntax.is_compressed:
            raise
        raise InputError(f"{path}: is compressed ({syntax.name}), and damaged or without a decoder here; replace it, or"
                         f" pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg") from None
    if data.get("PhotometricInterpretation") == "PALETTE COLOR":
        pixels = pydicom.pixels.apply_color_lut(pixels, data)
        return np.round(pixels / 257).astype(np.uint8) if pixels.dtype == np.uint16 else pixels
    return pixels


def _stored_range(data):
    bits, signed = int(data.BitsStored), int(data.get("PixelRepresentation", 0))
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)


def _apply(frame, slope, intercept):
    """Rescaled numbers, integers where slope and intercept are."""
    if float(slope).is_integer() and float(intercept).is_integer() and frame.dtype.kind in "iu":
        wide = frame.astype(np.int32) * int(slope) + int(intercept)
        return wide.astype(np.int16) if -32768 <= wide.min() and wide.max() <= 32767 else wide
    return frame.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _groups(data, frame):
    """The data sets that may say something of a frame, the nearest first."""
    own = data.get("PerFrameFunctionalGroupsSequence") or []
    shared = data.get("SharedFunctionalGroupsSequence") or []
    inside = [item[0] for group in (*own[frame:frame + 1], *shared[:1]) for element in group
              if element.VR == "SQ" and (item := element.value)]
    return [*inside, data]


def _find(groups, *names):
    return next((value for name in names for group in groups if (value := group.get(name)) not in (None, "")), None)


def _rescale(groups):
    slope, intercept = _find(groups, "RescaleSlope"), _find(groups, "RescaleIntercept")
    return (1.0 if slope is None else float(slope)), (0.0 if intercept is None else float(intercept))


def _spacing(groups):
    found = _find(groups, "PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
    return (float(found[0]), float(found[1])) if found is not None and min(map(float, found)) > 0 else None


def _place(groups, path, frame, data):
    place = {"path": str(path), "frame": frame, "sop_uid": str(data.get("SOPInstanceUID", ""))}
    for name, tag in (("position", "ImagePositionPatient"), ("orientation", "ImageOrientationPatient")):
        if (found := _find(groups, tag)) is not None:
            place[name] = [*map(float, found)]
    return place
