"""Which marks of several readers are one nodule.

**The rule.** Marks of different readers whose outlines come within a tolerance of each other can be linked. They are
linked one pair after another: those that overlap most first, by intersection over union, then those whose outlines are
closest. A link that would bring two marks of one reader into one nodule is not made: there, and only there, the
tolerance is tightened. So a nodule has at most as many marks as there are readers, which are four in most files.

Then the pieces are joined that one reader drew of what another drew whole: two nodules become one where half of a mark
lies in a mark of the other. That also joins outlines that lie far within each other, and points within an outline.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

PIECE = 0.5  # of the smaller of two marks, in the larger


class Mark(NamedTuple):
    """One reader's mark, in the place of its scan."""

    reader: int
    name: str
    outline: np.ndarray  # [P, 3] float, the points of all its outlines, (z, y, x) in mm
    body: np.ndarray  # [K] int, indices into the scan's pixels, ascending: its lesion, and its single points
    lesions: dict[int, np.ndarray]  # by slice: indices into its pixels; [] where it is marked, yet has no area


class Link(NamedTuple):
    """Two marks, by their places in a list, that lie close to each other or overlap."""

    a: int
    b: int
    distance: float  # of their outlines in mm; inf beyond the tolerance
    iou: float  # intersection over union of their bodies
    share: float  # of the smaller body that lies in the larger

    @property
    def order(self) -> tuple[float, float]:
        """By which links are made."""
        return -self.iou, self.distance


class Group(NamedTuple):
    """The marks of one nodule."""

    marks: list[int]  # their places, ascending
    links: list[Link]  # that hold it together
    apart: list[Link]  # within the tolerance, to marks of other nodules: tightening parted them


def nodules(marks: Sequence[Mark], tolerance: float) -> list[Group]:
    """Sort marks into nodules by the rule above, in the order of their first marks.

    :param tolerance: in mm.
    """
    trees = [cKDTree(mark.outline) for mark in marks]
    links = [_link(marks, trees, a, b, tolerance) for a, b in itertools.combinations(range(len(marks)), 2)]
    links = sorted(filter(None, links), key=lambda link: link.order)
    near = [link for link in links if link.distance <= tolerance and marks[link.a].reader != marks[link.b].reader]
    groups, made = [{i} for i in range(len(marks))], []  # groups[i] is the one of mark i

    def join(link):
        groups[link.a] |= groups[link.b]
        for i in groups[link.b]:
            groups[i] = groups[link.a]
        made.append(link)

    for link in near:
        readers = [{marks[i].reader for i in groups[end]} for end in (link.a, link.b)]
        if groups[link.a] is not groups[link.b] and not readers[0] & readers[1]:
            join(link)
    for link in links:
        if groups[link.a] is not groups[link.b] and link.share >= PIECE:
            join(link)
    return [Group(sorted(group), [link for link in made if link.a in group],
                  [link for link in near if (link.a in group) != (link.b in group)])
            for group in {min(group): group for group in groups}.values()]


def _link(marks, trees, a, b, tolerance):
    """The link of two marks; None for those that are neither near nor overlap."""
    distance, common = _distance(trees[a], trees[b], tolerance), _common(marks[a].body, marks[b].body)
    sizes = len(marks[a].body), len(marks[b].body)
    if common:
        return Link(a, b, distance, common / (sum(sizes) - common), common / min(sizes))
    return Link(a, b, distance, 0.0, 0.0) if distance <= tolerance else None


def _distance(a, b, most):
    """The least distance of two trees of points in mm; inf beyond `most`."""
    if (np.maximum(a.mins, b.mins) - np.minimum(a.maxes, b.maxes)).max() > most:
        return np.inf
    return float(a.query(b.data, distance_upper_bound=np.nextafter(most, np.inf))[0].min())  # the bound is exclusive


def _common(a, b):
    """How many pixels two bodies share."""
    if not len(a) or not len(b) or a[-1] < b[0] or b[-1] < a[0]:
        return 0
    return len(np.intersect1d(a, b, assume_unique=True))
