"""NIfTI images and volumes, read with nibabel, which is needed for these files only."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...system import packages
from ...system.errors import InputError
from . import READERS
from .base import Stack, Volume, VolumeReader

# where columns, rows and slices run to: the patient's left, back (posterior), head (superior) or feet (inferior)
SHOWN = {"axial": ("L", "P", "S"), "coronal": ("L", "I", "P"), "sagittal": ("P", "I", "L")}


@READERS.add("nifti", "NIfTI, .nii and .nii.gz; each axial slice is a case")
class Nifti(VolumeReader):
    """NIfTI. Slices are axial, whatever the order of the file's axes; a fourth axis holds channels."""

    suffixes = ".nii", ".nii.gz"

    def stacks(self, files: Sequence[Path]) -> list[Stack]:
        return [self._stack(path) for path in files]

    def _stack(self, path):
        name = path.name[:path.name.lower().rindex(".nii")]
        packages.require("nibabel", f"{path}: reading it")
        try:
            image = _load(path)
            axes = _axes(image)
        except Exception:  # reading it says what is wrong
            return Stack(name, (path,), 1)
        return Stack(name, (path,), _shape(image)[int(np.argmax(axes[:, 0] == 2))])

    def read_volume(self, files: tuple[Path, ...]) -> Volume:
        path, = files
        nibabel = packages.require("nibabel", f"{path}: reading it")
        image = _load(path)
        numbers, axes = _numbers(image), _axes(image)
        shown = nibabel.orientations.apply_orientation(numbers.reshape(*_shape(image), -1), axes)  # [W, H, D, C]
        spacing, info = _place(image, path, axes)
        return Volume(np.ascontiguousarray(shown.transpose(3, 2, 1, 0)), spacing, info)


@functools.lru_cache(maxsize=64)
def place_of(path: Path, axis: str) -> tuple[tuple[float, float] | None, dict[str, Any]]:
    """The spacing of the slices of a file along an axis of SHOWN, and what Volume.info says of it.

    :raises InputError: if its header cannot be read.
    """
    try:
        image = _load(path)
        return _place(image, path, _axes(image, axis))
    except InputError:
        raise
    except Exception as error:  # nibabel raises almost anything on a damaged file
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error}); put it back") from error


def _place(image, path, axes):
    orientations = packages.require("nibabel", f"{path}: reading it").orientations
    grid = image.affine @ orientations.inv_ornt_aff(axes, _shape(image))
    column, row, between = (float(length) for length in np.linalg.norm(grid[:3, :3], axis=0))
    info = {"format": "nifti", "path": str(path), "slices": _shape(image)[int(np.argmax(axes[:, 0] == 2))],
            "slice_spacing": between, "shape": list(image.shape), "affine": image.affine.tolist(),
            "axes": axes.tolist(), "grid": grid.tolist()}
    return (row, column) if row > 0 and column > 0 else None, info


def slice_size(info: Mapping[str, Any]) -> tuple[int, int]:
    """(H, W) of the slices of a volume in pixels."""
    lengths = {axis: (*info["shape"][:3], 1)[i] for i, (axis, _) in enumerate(info["axes"])}
    return lengths[1], lengths[0]


def to_file_axes(slices: np.ndarray, info: Mapping[str, Any]) -> np.ndarray:
    """Slices [D, H, W, ...] of a volume, in their order -> [I, J, K, ...], in the axes of its file.

    :param info: of any of its slices.
    """
    orientations = packages.require("nibabel", "a NIfTI volume").orientations
    numbers = slices.transpose(2, 1, 0, *range(3, slices.ndim))
    axes = np.array(info["axes"])
    there = np.empty_like(axes)  # the way back: output axis axes[i, 0] came from axis i
    for i, (axis, flip) in enumerate(axes):
        there[int(axis)] = i, flip
    return orientations.apply_orientation(numbers, there)


def _load(path):
    image = packages.require("nibabel", f"{path}: reading it").load(path)
    if not 2 <= len(image.shape) <= 4:
        raise InputError(f"{path}: has {len(image.shape)} axes, not 2, 3, or 4 of which the last holds channels; save"
                         f" it so")
    return image


def _shape(image):
    """The lengths of the first three axes."""
    return (*image.shape[:3], 1)[:3]


def _axes(image, axis="axial"):
    """How the axes of the file become those of SHOWN, [3, 2], as nibabel has it."""
    orientations = packages.require("nibabel", "a NIfTI volume").orientations
    own = orientations.io_orientation(image.affine)
    if np.isnan(own).any():
        raise InputError(f"{image.get_filename()}: its affine leads to no place; write it with a right one")
    return orientations.ornt_transform(own, orientations.axcodes2ornt(SHOWN[axis])).astype(int)


def _numbers(image):
    """The numbers of a file, as integers where they are; colours are channels on a last axis."""
    numbers = np.asanyarray(image.dataobj)
    if numbers.dtype.names:
        numbers = np.stack([numbers[name] for name in numbers.dtype.names if name != "A"], axis=-1)
    numbers = numbers.astype(numbers.dtype.newbyteorder("="), copy=False)
    return numbers.astype(np.float32) if numbers.dtype.kind == "f" else numbers
