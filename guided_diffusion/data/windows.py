"""Windows of image_size that training takes out of larger scans, and the masks of their raters alike."""

import numpy as np

from .augment import Example
from .cases import Case
from .noise import window_generator

# where a window may lie
WINDOWS = {
    "uniform": "anywhere, all places alike",
    "lesion": "where it holds a random pixel that some rater marks; anywhere in scans that nobody marks",
}


def window(image: np.ndarray, raters: np.ndarray, side: int, kind: str, seed: int, place: int) -> Example:
    """Image [C, H, W] and raters [R, H, W] -> [C, side, side] and [R, side, side], views.

    :param kind: a name of WINDOWS. The place of the window follows from (seed, place in the stream) alone.
    """
    rng, marked = window_generator(seed, place), np.argwhere(raters.any(0)) if kind == "lesion" else ()
    pixel = marked[rng.integers(len(marked))] if len(marked) else None
    corner = []
    for axis, length in enumerate(image.shape[1:]):
        first, last = 0, length - side
        if pixel is not None:
            first, last = max(first, pixel[axis] - side + 1), min(last, pixel[axis])
        corner.append(int(rng.integers(first, last, endpoint=True)))
    top, left = corner
    return tuple(array[:, top:top + side, left:left + side] for array in (image, raters))


def window_of(case: Case, side: int, kind: str, seed: int, number: int) -> Case:
    """The same of a Case, which is number so many."""
    return Case(case.name, *window(case.image, case.raters, side, kind, seed, number))
