"""The HDF5 files that PHiSeg's code writes, and that others train on."""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from ..data.scaling import to_16_bits
from ..system import packages
from ..system.errors import InputError
from . import SOURCES
from .base import LeftOut, PreparedCase, Source, Unit
from .splits import PARTS

PIECE = 64  # cases that are read at once
SHIFT = 0.5  # what was taken away from images that were from 0 to 1


@SOURCES.add("hdf5", "HDF5 files as PHiSeg writes them")
class Hdf5(Source):
    """Reads a file with groups train, val and test that hold images [N, H, W], from -0.5 to 0.5, labels [N, H, W,
    raters] of 0 and 1, and uids [N], a number for each series (Baumgartner et al. 2019, arXiv 1906.04045). That split
    is kept unless --split is given. Files that lead to other files are refused. Needs h5py.
    """

    split_by = "series"
    example = "data_lidc.hdf5 lidc"

    def units(self) -> Iterator[Unit | LeftOut]:
        with _opened(self.path) as file:
            found = [part for part in PARTS if part in file]
            if not found:
                raise InputError(f"{self.path}: holds no group train, val or test")
            tables = {part: _tables(self.path, file, part) for part in found}
            uids = {part: table["uids"][:].tolist() if "uids" in table else [f"{part}-{i}" for i in range(
                len(table["images"]))] for part, table in tables.items()}
            series = {uid: i for i, uid in enumerate(dict.fromkeys(uid for part in found for uid in uids[part]))}
            for part in found:
                for start, stop in _runs(uids[part]):
                    uid = uids[part][start]
                    yield Unit(f"{part}-{start:06d}", str(uid), (part, start, stop, series[uid]), part)

    def cases(self, unit: Unit) -> Iterator[PreparedCase | LeftOut]:
        part, start, stop, series = unit.data
        with _opened(self.path) as file:
            table = _tables(self.path, file, part)
            images, labels = table["images"][start:stop], table["labels"][start:stop]
        for i, (image, label) in enumerate(zip(images, labels), start):
            name, values = f"series{series:04d}-{part}-{i:06d}", image.astype(np.float64) + SHIFT
            if not (values.min() >= 0 and values.max() <= 1):
                yield LeftOut(f"{part}/images {i}", f"has values from {image.min():g} to {image.max():g}, not from"
                                                    f" -{SHIFT} to {SHIFT}; write it anew")
            elif not np.isin(label, (0, 1)).all():
                yield LeftOut(f"{part}/labels {i}", "has other values than 0 and 1; write it anew")
            else:
                yield PreparedCase(name, to_16_bits(values)[None], label.transpose(2, 0, 1) > 0, {"slice": i})


@contextlib.contextmanager
def _opened(path) -> Iterator[Any]:
    h5py = packages.require("h5py", "HDF5")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(f"{path}: cannot be read as HDF5 ({error})") from None
    with file:
        yield file


def _tables(path, file, part):
    """The data sets of a group by name, images, labels and perhaps uids.

    :raises InputError: if one is missing, of another shape, or not in this file.
    """
    found = {}
    for place in (part, f"{part}/images", f"{part}/labels", f"{part}/uids"):
        link = file.get(place, getlink=True)
        if link is None and place.endswith("uids"):
            continue
        if link is None:
            raise InputError(f"{path}: has no {place}; write images and labels into each group")
        if type(link).__name__ != "HardLink":
            raise InputError(f"{path}: {place} leads elsewhere ({type(link).__name__}), which is not followed; copy"
                             f" what is meant into the file")
        if place != part:
            found[place.rpartition("/")[2]] = table = file[place]
            if table.external or table.is_virtual:
                raise InputError(f"{path}: {place} lies in another file, which is not read; copy it into this one")
    images, labels = found["images"], found["labels"]
    lengths = {len(table) for table in found.values()}
    if images.ndim != 3 or labels.ndim != 4 or labels.shape[:3] != images.shape or len(lengths) > 1:
        raise InputError(f"{path}: {part} has images {list(images.shape)} and labels {list(labels.shape)}, not [N, H,"
                         f" W] and [N, H, W, raters]")
    return found


def _runs(uids) -> Iterator[tuple[int, int]]:
    """Ranges of equal uids, of at most PIECE."""
    start = 0
    for i in range(1, len(uids) + 1):
        if i == len(uids) or uids[i] != uids[start] or i - start == PIECE:
            yield start, i
            start = i
