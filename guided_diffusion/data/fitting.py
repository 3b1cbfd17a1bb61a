"""Scans, masks and the distance of their pixels brought to another size."""

from pathlib import Path

import numpy as np
from PIL import Image

from ..system.errors import InputError
from . import masks

FITS = ("error", "resize", "crop")


def fit_case(image: np.ndarray, raters: np.ndarray, side: int, fit: str, path: str | Path
             ) -> tuple[np.ndarray, np.ndarray]:
    """Bring image [C, H, W] uint8 or uint16 and raters [R, H, W] bool to side x side by `fit`, "resize" or "crop".

    :param path: of the image, for messages.
    :raises InputError: for an image too small to crop.
    """
    height, width = image.shape[1:]
    if fit == "resize":
        raters = [masks.from_pixels(_resize(masks.to_pixels(mask), side)) for mask in raters]
        return (np.stack([_resize(channel, side) for channel in image]),
                np.array(raters, masks.DTYPE).reshape(len(raters), side, side))
    if min(height, width) < side:
        raise InputError(f"{path}: is {width} x {height} pixels, too small for --fit crop to --image_size {side}; use"
                         f" --fit resize")
    top, left = (height - side) // 2, (width - side) // 2
    window = np.s_[:, top:top + side, left:left + side]
    return image[window].copy(), raters[window].copy()  # a view would keep the whole picture


def fit_spacing(spacing: tuple[float, float] | None, size: tuple[int, int], side: int, fit: str
                ) -> tuple[float, float] | None:
    """The (row, column) distance of pixels, in mm, after an image of this size, (H, W), is brought to side x side."""
    if spacing is None or fit != "resize":
        return spacing
    return spacing[0] * (size[0] / side), spacing[1] * (size[1] / side)


def _resize(pixels, side):
    """[H, W] -> [side, side], bilinear with antialiasing, same dtype."""
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))
    picture = Image.fromarray(pixels.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(picture).round().astype(pixels.dtype)
