"""The PNG crops of LIDC-IDRI that the Hierarchical Probabilistic U-Net was published with."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..data.readers.base import Readers
from ..system.errors import InputError
from . import SOURCES
from .base import LeftOut, PreparedCase, Source, Unit
from .splits import PARTS


@SOURCES.add("crops", "the PNG crops of the Hierarchical Probabilistic U-Net")
class Crops(Source):
    """Reads images/PATIENT/NAME.png with gt/PATIENT/NAME_l0.png, NAME_l1.png, ..., the mask of each rater (Kohl et al.
    2019, arXiv 1905.13077; LIDC-IDRI, Armato et al. 2011, CC BY 3.0). INPUT holds images and gt, or folders train, val
    and test that hold them; that split is kept unless --split is given.
    """

    example = "lidc_crops lidc"

    def __init__(self, path: Path):
        super().__init__(path)
        self.readers = Readers()

    def units(self) -> Iterator[Unit | LeftOut]:
        found = [(part, folder) for part, folder in (("", self.path), *((part, self.path / part) for part in PARTS))
                 if (folder / "images").is_dir()]
        if not found:
            raise InputError(f"{self.path}: holds no folder images, nor do train, val and test in it; name the folder"
                             f" of the crops")
        for part, folder in found:
            for patient in sorted(path for path in (folder / "images").iterdir() if path.is_dir()):
                yield Unit(f"{part}/{patient.name}" if part else patient.name, patient.name, str(folder), part)

    def cases(self, unit: Unit) -> Iterator[PreparedCase | LeftOut]:
        folder = Path(unit.data)
        masks: dict[str, dict[int, Path]] = {}
        for path in sorted((folder / "gt" / unit.patient).glob("*")):
            if named := re.fullmatch(r"(.+)_l(\d+)", self.readers.stem_of(path)):
                masks.setdefault(named[1], {})[int(named[2])] = path
        for path in sorted((folder / "images" / unit.patient).iterdir()):
            if not self.readers.suffix_of(path):
                continue
            name = self.readers.stem_of(path)
            raters = masks.pop(name, {})
            if not raters:
                yield LeftOut(str(path), f"has no masks, gt/{unit.patient}/{name}_l0.png, ...; add them")
                continue
            try:
                image = self.readers.read(path).pixels
                outlines = [mask_of(self.readers, raters[k], image) for k in sorted(raters)]
            except InputError as error:
                yield LeftOut(str(path), str(error))
            else:
                yield PreparedCase(f"{unit.patient}_{name}", image, np.stack(outlines), {})
        for raters in masks.values():
            yield LeftOut(str(min(raters.values())), "is a mask without its image; add that")


def mask_of(readers: Readers, path: Path, image: np.ndarray) -> np.ndarray:
    """The mask in a file, [H, W] bool, of the size of its image [C, H, W].

    :raises InputError: if it cannot be read, or has another size.
    """
    mask = readers.read_mask(path)
    if mask.shape != image.shape[1:]:
        raise InputError(f"{path}: is {mask.shape[1]} x {mask.shape[0]} pixels, but its image {image.shape[2]} x"
                         f" {image.shape[1]}; give it the mask that belongs to it")
    return mask
