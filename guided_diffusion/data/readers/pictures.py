"""JPEG and PNG pictures."""

from pathlib import Path

import numpy as np

from .. import masks, pictures
from . import READERS
from .base import Reader, Scan, foreground

EMPTY_JPEG_RINGING = 32  # an empty JPEG label may hold values up to about this, of 255


@READERS.add("pictures", "JPEG and PNG, with 8 or 16 bits")
class Pictures(Reader):
    """JPEG and PNG. A colour picture whose channels are all equal counts as grey."""

    suffixes = ".jpg", ".jpeg", ".png"

    def read(self, path: Path) -> Scan:
        return Scan(pictures.channels_first(pictures.decode(path)), None, {})

    def read_mask(self, path: Path) -> np.ndarray:
        pixels = self.read(path).pixels
        if 0 < pixels.max() <= EMPTY_JPEG_RINGING and pictures.format_of(path) == "JPEG":
            return np.zeros(pixels.shape[1:], masks.DTYPE)
        return foreground(pixels, path)
