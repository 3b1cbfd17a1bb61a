"""Pictures and folders on disk."""

from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parents[2]  # of the checkout


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    picture.save(path, **options)


def tree(folder):
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def read(path):
    """The pixels of a picture."""
    return np.asarray(Image.open(path))
