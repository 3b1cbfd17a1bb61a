"""Arrays of NumPy."""

from pathlib import Path

import numpy as np

from ...system.errors import InputError
from . import READERS
from .base import Reader, Scan


@READERS.add("arrays", "NumPy arrays, .npy, [H, W] or [channels, H, W]")
class Arrays(Reader):
    """NumPy arrays. In labels, integers above 0 and floats above 0.5 are foreground."""

    suffixes = ".npy",

    def read(self, path: Path) -> Scan:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: no more is read than the file holds
        if pixels.ndim not in (2, 3):
            raise InputError(f"{path}: is an array {list(pixels.shape)}; save it as [H, W] or [channels, H, W]")
        if pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4) and pixels.shape[0] > 4:
            raise InputError(f"{path}: is an array {list(pixels.shape)} with its channels last; save it as [channels,"
                             f" H, W], as array.transpose(2, 0, 1)")
        pixels = np.array(pixels if pixels.ndim == 3 else pixels[None])
        pixels = pixels.astype(np.uint8 if pixels.dtype == bool else pixels.dtype.newbyteorder("="), copy=False)
        return Scan(pixels, None, {})

    def read_mask(self, path: Path) -> np.ndarray:
        pixels = self.read(path).pixels
        return (pixels > (0.5 if pixels.dtype.kind == "f" else 0)).any(axis=0)
