"""Masks of NIfTI and DICOM scans in files of the same format, in the scan's own geometry.

    <name>_ensemble.nii.gz     members on the last axis, 0 or 1
    <name>_probability.nii.gz  share of the members that mark a voxel, 0 to 1
    <name>_spread.nii.gz       standard deviation over the members, 0 to 0.5
    <name>_members.dcm         DICOM SEG, binary: a segment a member, and one of where the probability is 0.5 or more
    <name>_probability.dcm     DICOM SEG, fractional: the probability

A volume, or a series, has one set of files, of all its slices; slices without masks are empty in them. `info` is what
the reader says of a slice, see data.readers.base.Volume.
"""

import gzip
import hashlib
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data.fitting import resize
from ..data.masks import from_pixels, to_pixels
from ..data.readers.nifti import slice_size, to_file_axes
from ..system import packages, storage
from ..system.errors import InputError, raise_problems
from .files import writing

FORMATS = {"nifti": ("nibabel",), "dicom": ("pydicom", "highdicom")}  # and the packages that writing takes
NIFTI = "ensemble.nii.gz", "probability.nii.gz", "spread.nii.gz"
DICOM = "members.dcm", "probability.dcm"
MAKER = "guided_diffusion"
# of DICOM files, which must be there and may be empty; what takes names out of files takes some of them with it
MAY_BE_EMPTY = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
                "AccessionNumber", "ReferringPhysicianName")

Info = Mapping[str, Any]


class NoGeometry(InputError):
    """A scan does not say all of its place that masks in its format need."""


def refuse_missing_packages(formats: Iterable[str]) -> None:
    """Raise InputError if scans of these formats are to be sampled, and a package is missing that writes masks of such,
    which is better known before masks are drawn."""
    for name in formats:
        for package in FORMATS.get(name, ()):
            packages.require(package, f"writing masks of {name} scans")


def names(volume: str, format: str) -> list[str]:
    """The files of the masks of a volume of this name, in a format of FORMATS."""
    return [f"{volume}_{kind}" for kind in (NIFTI if format == "nifti" else DICOM)]


def write_volume(folder: storage.AnyPath, name: str, slices: Sequence[tuple[Info, np.ndarray]]) -> None:
    """Write the files of one volume.

    :param name: of the files. slices: (info, masks [n, H, W] bool) of each slice that has masks, in any order.
    :raises NoGeometry: if the source is gone, or does not say where it is; InputError: if a file cannot be written.
    """
    info = slices[0][0]
    try:
        contents = (_nifti_files if info["format"] == "nifti" else _dicom_files)(slices)
    except InputError:
        raise
    except Exception as error:  # the libraries raise almost anything on a header that they do not take
        where = info.get("path") or info["files"][0]
        raise NoGeometry(f"{where}: masks cannot be written in its format ({type(error).__name__}: {error}); they are"
                         f" in {name}*_output<i>.png") from error
    for file, data in zip(names(name, info["format"]), contents):
        with writing(storage.join(folder, file)) as path:
            storage.write_bytes(path, data)


def save_volumes(folder: storage.AnyPath, ensembles: Iterable[Any]) -> None:
    """Write the files of all volumes whose slices are among these Ensembles, what Segmenter.sample returned.

    :raises InputError: naming all volumes that have no geometry, once the others are written, and as write_volume.
    """
    storage.make_folder(folder, "folder")
    volumes = {}
    for ensemble in ensembles:
        if ensemble.info.get("format") in FORMATS:
            volumes.setdefault(ensemble.info["volume"], []).append((ensemble.info, ensemble.masks))
    problems = []
    for name, slices in volumes.items():
        try:
            write_volume(folder, name, slices)
        except NoGeometry as error:
            problems.append(str(error))
    raise_problems(problems, str(folder))


def volume_interval(ensembles: Sequence[Any], level: float = 0.9) -> tuple[float, float, float]:
    """(low, median, high) of the foreground's volume over the members, in ml, as Ensemble.area_interval has areas.

    Member i of the volume is made of member i of each slice. Slices are drawn each by itself, so their errors cancel
    out in the sum, and the interval is narrower than one of whole outlines that experts draw.

    :param ensembles: those of the slices of one volume, what Segmenter.sample returned.
    :raises ValueError: if they are of several volumes, differ in the number of masks, or a spacing is unknown.
    """
    if not 0 <= level <= 1:
        raise ValueError(f"level is {level}, but must be a share from 0 to 1")
    if len({(each.info.get("volume"), len(each)) for each in ensembles}) != 1:
        raise ValueError("the ensembles are not of the slices of one volume with the same number of masks; give those"
                         " that Segmenter.sample returned for it")
    for each in ensembles:
        if not each.spacing or not each.info.get("slice_spacing"):
            raise ValueError(f"{each.name}: the distance of its pixels or of its slices is unknown, so that its volume"
                             f" is none in ml")
    voxels = [math.prod(each.spacing) * each.info["slice_spacing"] for each in ensembles]  # mm3
    sums = sum(each.masks.sum((1, 2)) * voxel / 1000 for each, voxel in zip(ensembles, voxels))  # [n]
    return tuple(np.quantile(sums, [(1 - level) / 2, 0.5, (1 + level) / 2]).tolist())


def read_masks(folder: storage.AnyPath, case_name: str, num_ensemble: int) -> np.ndarray:
    """The members [n, H, W] bool of a case that files.write_case has written."""
    files = (storage.read_bytes(storage.join(folder, f"{case_name}_output{i}.png")) for i in range(num_ensemble))
    return np.stack([from_pixels(np.asarray(Image.open(io.BytesIO(data)))) for data in files])


def _of_size(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Masks [n, h, w] bool of a slice that was prepared at another spacing -> [n, H, W] of its volume."""
    if masks.shape[1:] == size:
        return masks
    return np.stack([from_pixels(resize(mask, size)) for mask in to_pixels(masks)])


def _stacked(slices: Sequence[tuple[Info, np.ndarray]], depth: int) -> np.ndarray:
    """Masks of slices as one array [D, H, W, n] uint8 in the order of the volume; slices without any are empty."""
    n, height, width = slices[0][1].shape
    whole = np.zeros((depth, height, width, n), np.uint8)
    for info, masks in slices:
        whole[info["slice"]] = np.moveaxis(masks, 0, -1)
    return whole


# ---- NIfTI ----

def _nifti_files(slices):
    """Compressed files, in the order of NIFTI, with affine, qform and sform of the scan, and axes in its order."""
    nibabel = packages.require("nibabel", "writing masks of NIfTI scans")
    info = slices[0][0]
    source = nibabel.load(info["path"])
    slices = [(each, _of_size(masks, slice_size(info))) for each, masks in slices]
    members = to_file_axes(_stacked(slices, info["slices"]), info)  # [I, J, K, n]
    probability = members.mean(-1, dtype=np.float32)
    spread = members.std(-1, dtype=np.float32)
    flat = source.shape[:2] if len(source.shape) == 2 else probability.shape
    return [_nifti(nibabel, array, source) for array in (members, probability.reshape(flat), spread.reshape(flat))]


def _nifti(nibabel, array, source):
    kind = type(source) if isinstance(source, nibabel.Nifti1Image) else nibabel.Nifti1Image  # Nifti2Image is one, too
    header = kind.header_class.from_header(source.header)
    header["descrip"] = MAKER.encode()  # of the scan, it may name the patient
    for field in ("scl_slope", "scl_inter", "cal_max", "cal_min"):
        header[field] = np.nan if field.startswith("scl") else 0
    header["intent_code"], header["intent_name"], header["aux_file"] = 0, b"", b""
    header.set_data_dtype(array.dtype)
    image = kind(array, None, header)  # None: the affines of the header, with their codes
    image.header["pixdim"][4] = 1
    return gzip.compress(image.to_bytes(), 6, mtime=0)


# ---- DICOM SEG ----

def _dicom_files(slices):
    """DICOM SEG objects, in the order of DICOM. They name the patient and study of the scan, as DICOM asks."""
    pydicom = packages.require("pydicom", "writing masks of DICOM scans")
    info = slices[0][0]
    files = info["files"]
    masks = _stacked(slices, info["slices"])  # [D, H, W, n]
    if len(files) > 1:  # a file a slice: those with masks
        numbers = sorted(info["slice"] for info, _ in slices)
        files, masks = [files[i] for i in numbers], masks[numbers]
    sources = [pydicom.dcmread(Path(file), stop_before_pixels=True) for file in files]
    for source in sources:
        for name in MAY_BE_EMPTY:
            if name not in source:
                setattr(source, name, "")
        if "FrameOfReferenceUID" not in source:  # then the series has one of its own
            source.FrameOfReferenceUID = pydicom.uid.generate_uid(entropy_srcs=[str(source.SeriesInstanceUID)])
        if not source.get("SliceThickness") and info["slice_spacing"]:
            source.SliceThickness = info["slice_spacing"]
    probability = masks.mean(-1, dtype=np.float32)
    labels = [*(f"member {i}" for i in range(masks.shape[-1])), "probability of at least 0.5"]
    segments = np.concatenate([masks, (probability >= 0.5)[..., None]], axis=-1, dtype=np.uint8)
    return [_seg(sources, segments, labels, "BINARY", 1), _seg(sources, probability, ["probability"], "FRACTIONAL", 2)]


def _seg(sources, pixels, labels, kind, number):
    """A DICOM SEG object of pixels [D, H, W, segments] or, of one segment, [D, H, W]."""
    highdicom = packages.require("highdicom", "writing masks of DICOM scans")
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name=MAKER, family=codes.DCM.ArtificialIntelligence, version=packages.own_version())
    described = [highdicom.seg.SegmentDescription(
        i, label, codes.SCT.MorphologicallyAbnormalStructure, codes.SCT.Lesion, "AUTOMATIC", algorithm)
        for i, label in enumerate(labels, 1)]
    # the same masks of the same scan are the same object
    origin = [sources[0].SOPInstanceUID, kind, str(len(labels)), hashlib.sha256(pixels.tobytes()).hexdigest()]
    seg = highdicom.seg.Segmentation(
        sources, pixels, kind, described, series_instance_uid=generate_uid(entropy_srcs=[*origin, "series"]),
        series_number=100 + number, sop_instance_uid=generate_uid(entropy_srcs=origin), instance_number=1,
        manufacturer=MAKER, manufacturer_model_name=MAKER, software_versions=packages.own_version(),
        device_serial_number="0", content_label=kind)
    buffer = io.BytesIO()
    seg.save_as(buffer)
    return buffer.getvalue()
