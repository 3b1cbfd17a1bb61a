"""Outlines of LIDC-IDRI filled: the pixels of a lesion on a slice.

**The fill rule.** The points of an outline lie just outside the lesion. Successive points are joined by straight lines
where they are no neighbours, and the last one is joined to the first. Then the plane is flooded from outside, in steps
to the four nearest pixels that never enter the outline. The interior of the outline is what stays dry and is not on it.
So an open outline and one with gaps are closed; where an outline crosses or touches itself, all that it encloses is
interior (by the even-odd rule some of it would not be); and one that encloses nothing has no interior.

The lesion is the union of the interiors of all inclusions, less those of all exclusions, less the points and joining
lines of both. An outline of a single point adds nothing and takes nothing away.
"""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

from ..system.errors import InputError
from .lidc_xml import Outline


def closed(points: Sequence[tuple[int, int]]) -> np.ndarray:
    """All pixels of an outline, [P, 2] of (x, y): its points, and those of the lines that join them.

    The line from a to b has n = max(|bx - ax|, |by - ay|) steps; its pixels are a + (b - a) k / n, halves rounded up.
    """
    start = np.array(points)
    step = np.roll(start, -1, axis=0) - start  # the last one leads back to the first
    count = np.abs(step).max(1)  # [P]
    if count.max() <= 1:
        return start
    pixels = [a + (2 * d * np.arange(max(n, 1))[:, None] + n) // (2 * max(n, 1))
              for a, d, n in zip(start, step, count)]
    return np.concatenate(pixels)


def interior(outline: np.ndarray) -> np.ndarray:
    """The pixels within a closed outline [P, 2], without its own: [K, 2] of (x, y)."""
    corner = outline.min(0) - 1  # leaves a rim of outside, by which all of the outside hangs together
    x, y = (outline - corner).T
    wall = np.zeros((y.max() + 2, x.max() + 2), bool)
    wall[y, x] = True
    dry, _ = ndimage.label(~wall)  # areas that hang together by their sides
    rows, columns = np.nonzero(~wall & (dry != dry[0, 0]))
    return np.stack([columns, rows], axis=1) + corner


def lesion(outlines: Iterable[Outline], height: int, width: int) -> np.ndarray:
    """What outlines of one slice of height x width pixels enclose by the fill rule.

    :return: indices into the slice's pixels, row after row, ascending.
    :raises InputError: if an outline leaves the slice by more than one pixel: beside a lesion at its edge, it may
        leave it by one.
    """
    inside = np.zeros((height + 2, width + 2), bool)  # with a rim of one pixel
    outside = np.zeros_like(inside)
    for outline in outlines:
        pixels = closed(outline.points) + 1
        if pixels.min() < 0 or (pixels.max(0) > (width + 1, height + 1)).any():
            raise InputError(f"an outline leaves its slice of {width} x {height} pixels")
        if outline.is_point:
            continue
        x, y = interior(pixels).T
        (inside if outline.inclusion else outside)[y, x] = True
        outside[pixels[:, 1], pixels[:, 0]] = True
    return np.flatnonzero((inside & ~outside)[1:-1, 1:-1])
