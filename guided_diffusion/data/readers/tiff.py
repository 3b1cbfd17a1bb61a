"""TIFF and GIF pictures, of labels above all, which other programs write so."""

from pathlib import Path

from .. import pictures
from . import READERS
from .base import Reader, Scan


@READERS.add("tiff", "TIFF with 8, 16 or 32 bits or floats, and GIF")
class Tiff(Reader):
    """TIFF and GIF of one picture a file. A colour picture whose channels are all equal counts as grey."""

    suffixes = ".tif", ".tiff", ".gif"

    def read(self, path: Path) -> Scan:
        return Scan(pictures.channels_first(pictures.decode(path, ("TIFF", "GIF"), any_number=True)), None, {})
