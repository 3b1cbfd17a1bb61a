"""TIFF, GIF, BMP and WebP pictures, as other programs write them."""

from pathlib import Path

from .. import pictures
from . import READERS
from .base import Reader, Scan


@READERS.add("tiff", "TIFF with 8, 16 or 32 bits or floats, GIF, BMP and WebP")
class Tiff(Reader):
    """TIFF, GIF, BMP and WebP of one picture a file. A colour picture whose channels are all equal counts as grey."""

    suffixes = ".tif", ".tiff", ".gif", ".bmp", ".webp"

    def read(self, path: Path) -> Scan:
        pixels = pictures.decode(path, ("TIFF", "GIF", "BMP", "WEBP"), any_number=True)
        return Scan(pictures.channels_first(pixels), None, {})
