"""Random changes of training examples: alike for a scan and the masks of all its raters.

An entry is called as entry(image, masks, rng) and returns both as they become:

    image  [c, S, S] uint8, uint16, or float32 in [0, 1]
    masks  [R, S, S] bool
    rng    a numpy Generator, which follows from the seed and the place of the example in the stream
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from ..system.errors import InputError
from ..system.registry import Registry
from . import scaling
from .noise import place_generator

AUGMENTATIONS = Registry("augment")  # they are applied in the order of this table
SHIFT = 1 / 16  # the largest shift, as a share of the side
ZOOM = 0.15  # the largest change of scale, as the logarithm of a factor
GAIN, OFFSET = 0.1, 0.05  # standard deviations of what intensities in [0, 1] are multiplied by, and of what is added

Example = tuple[np.ndarray, np.ndarray]  # image and masks


@AUGMENTATIONS.add("flips", "mirror left and right, and up and down, each in half of the cases")
def flips(image: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> Example:
    """Views that are mirrored, or not, along each axis."""
    down, across = 1 - 2 * rng.integers(2, size=2)
    return image[:, ::down, ::across], masks[:, ::down, ::across]


@AUGMENTATIONS.add("rot90", "turn by 0, 90, 180 or 270 degrees")
def rot90(image: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> Example:
    """Views that are turned.

    :raises InputError: if the image is not square.
    """
    height, width = image.shape[1:]
    if height != width:
        raise InputError(f"--augment rot90: turns square images only, but one has {width} x {height} pixels; leave"
                         f" rot90 away")
    quarters = int(rng.integers(4))
    return np.rot90(image, quarters, (1, 2)), np.rot90(masks, quarters, (1, 2))


@AUGMENTATIONS.add("shift", "move by whole pixels, up to 1/16 of the side each way")
def shift(image: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> Example:
    """Moved copies. What comes in repeats the edge of the image; no mask has anything there."""
    sides = image.shape[1:]
    steps = [int(rng.integers(-(most := int(side * SHIFT)), most, endpoint=True)) for side in sides]
    for axis, (side, step) in enumerate(zip(sides, steps), 1):
        image = image.take(np.clip(np.arange(side) - step, 0, side - 1), axis)
    there, here = ([slice(max(sign * step, 0), side + min(sign * step, 0)) for side, step in zip(sides, steps)]
                   for sign in (1, -1))
    moved = np.zeros_like(masks)
    moved[:, *there] = masks[:, *here]
    return image, moved


@AUGMENTATIONS.add("affine", "in half of the cases, turn by any angle about the centre and zoom by a factor of"
                   f" {np.exp(-ZOOM):.2f} to {np.exp(ZOOM):.2f}, bilinear")
def affine(image: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> Example:
    """Turned and zoomed copies. What comes in repeats the edge of the image; no mask has anything there. The other half
    of the cases keeps the sharpness of scans that are not resampled."""
    angle, zoom = rng.uniform((0, -ZOOM), (2 * np.pi, ZOOM))
    if rng.random() < 0.5:
        return image, masks
    cosine, sine = np.exp(zoom) * np.cos(angle), np.exp(zoom) * np.sin(angle)
    matrix = np.array([[cosine, -sine], [sine, cosine]])
    centre = (np.array(image.shape[1:]) - 1) / 2

    def resampled(pixels, edge):
        return ndimage.affine_transform(pixels.astype(np.float32), matrix, centre - matrix @ centre, order=1, mode=edge)

    turned = [resampled(channel, "nearest") for channel in image]
    if image.dtype.kind == "u":
        turned = np.rint(turned)
    moved = [resampled(mask, "constant") > 0.5 if mask.any() else mask for mask in masks]
    return np.array(turned, image.dtype), np.array(moved, masks.dtype).reshape(masks.shape)


@AUGMENTATIONS.add("intensity", f"multiply the scan's intensities in [0, 1] by a normal number of mean 1 and standard"
                   f" deviation {GAIN}, add one of 0 and {OFFSET}, and cut to [0, 1]; masks stay")
def intensity(image: np.ndarray, masks: np.ndarray, rng: np.random.Generator) -> Example:
    """Another contrast and brightness, as float32; cut, since scans never leave [0, 1]."""
    gain, offset = np.float32(rng.normal((1, 0), (GAIN, OFFSET)))
    return np.clip(scaling.to_unit(image) * gain + offset, 0, 1), masks


def parse_kinds(text: str) -> list[str]:
    """Names of AUGMENTATIONS separated by commas -> a list of them in the table's order.

    :raises InputError: for a name that is none.
    """
    names = text.replace(" ", "").split(",") if text else []
    if unknown := [name for name in names if name not in AUGMENTATIONS]:
        raise InputError(f"--augment {text}: there is no {unknown[0]!r}; there are {','.join(AUGMENTATIONS)}")
    return [name for name in AUGMENTATIONS if name in names]


def augmented(image: np.ndarray, masks: np.ndarray, kinds: Sequence[str], seed: int, place: int) -> Example:
    """The example at this place of the stream after these changes, names of AUGMENTATIONS."""
    rng = place_generator(seed, place)
    for kind in kinds:
        image, masks = AUGMENTATIONS[kind](image, masks, rng)
    return image, masks
