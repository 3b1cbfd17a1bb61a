"""A prepared case -> its folder, in the layout that training reads."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data import masks
from ..system.errors import InputError
from .base import PreparedCase


class WriteError(Exception):
    """The folder that cases are written to takes no more: nothing is wrong with the input."""


def write_case(folder: Path, case: PreparedCase) -> dict[str, Any]:
    """Write image_0.png (image_<n>.png a channel, but one for 8-bit colour) and label0_.png, ... into a new folder.

    :returns: its row of the manifest, as far as the case tells.
    :raises InputError: if the case is not what PreparedCase says.
    :raises WriteError: if the files cannot be written.
    """
    _check(case)
    colour = len(case.image) == 3 and case.image.dtype == np.uint8
    pictures = [case.image.transpose(1, 2, 0)] if colour else case.image
    try:
        folder.mkdir(parents=True)
        for i, picture in enumerate(pictures):
            Image.fromarray(np.ascontiguousarray(picture)).save(folder / f"image_{i}.png")
        for i, mask in enumerate(masks.to_pixels(case.raters)):
            Image.fromarray(mask).save(folder / f"label{i}_.png")
    except OSError as error:
        raise WriteError(error.strerror or str(error)) from error
    return {"case": case.name, "raters": len(case.raters), "areas": case.raters.sum((1, 2)).tolist(), **case.facts}


def _check(case):
    image, raters = case.image, case.raters
    if image.ndim != 3 or not image.size or image.dtype not in (np.uint8, np.uint16):
        raise InputError(f"{case.name}: its image is {image.dtype} {list(image.shape)}, not uint8 or uint16 [C, H, W]")
    if raters.dtype != masks.DTYPE or raters.ndim != 3 or not len(raters) or raters.shape[1:] != image.shape[1:]:
        raise InputError(f"{case.name}: its masks are {raters.dtype} {list(raters.shape)}, not bool"
                         f" [raters, {image.shape[1]}, {image.shape[2]}] as its image; give one mask a rater")
