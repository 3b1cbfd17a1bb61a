"""What readers of LIDC-IDRI marked, put in its place in the CT series, and sorted into nodules."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..system.errors import InputError
from .ct_series import Series
from .lidc_masks import lesion
from .lidc_nodules import Group, Mark, nodules
from .lidc_xml import Outline, Session


class Marked(NamedTuple):
    """All marks of a series."""

    marks: list[Mark]
    broken: set[int]  # slices that cannot be used, since an outline leaves them
    problems: list[str]  # what was left out, and why


class Nodule(NamedTuple):
    """A nodule, with the marks of its readers."""

    group: Group
    centre: tuple[float, float, float]  # of the box around all outlines: position in mm, row and column in pixels
    areas: dict[int, int]  # the sum over its readers, in pixels, for every slice that is marked


def place_marks(series: Series, sessions: Sequence[Session], unrated: bool, point_marks: bool) -> Marked:
    """The marks of all readers, whose numbers are those of their sessions.

    :param unrated: whether nodules count whose characteristics are missing or 0.
    :param point_marks: whether single points count as marks, without any area.
    """
    marks, broken, problems, missing = [], set(), [], {}
    for reader, session in enumerate(sessions):
        for nodule in session:
            what = f"nodule {nodule.name} of reader {reader}"
            drawn = [outline for outline in nodule.outlines if point_marks or not outline.is_point]
            if drawn and not nodule.rated and not unrated:
                problems.append(f"{what} has no characteristics, or zeros; --unrated True counts it")
                continue
            missing.update((each.image_uid, None) for each in drawn if each.image_uid not in series.places)
            outlines: dict[int, list[Outline]] = {}
            for outline in drawn:
                if outline.image_uid in series.places:
                    outlines.setdefault(series.places[outline.image_uid], []).append(outline)
            lesions = {}
            for place, each in sorted(outlines.items()):
                try:
                    lesions[place] = lesion(each, series.height, series.width)
                except InputError as error:
                    broken.add(place)
                    problems.append(f"slice {place}: {what}: {error}; the slice is left out")
            if lesions:
                marks.append(_mark(series, reader, nodule.name, outlines, lesions))
    problems += [f"the slice {uid} is marked, but missing; download the series again" for uid in missing]
    return Marked(marks, broken, problems)


def find_nodules(series: Series, marks: Sequence[Mark]) -> list[Nodule]:
    """The nodules that marks are of, along the body's axis; SliceThickness is the tolerance."""
    found = []
    for group in nodules(marks, series.thickness):
        outline = np.concatenate([marks[i].outline for i in group.marks])  # [P, 3]
        z, y, x = (outline.min(0) + outline.max(0)) / 2
        areas: dict[int, int] = {}
        for i in group.marks:
            for place, pixels in marks[i].lesions.items():
                areas[place] = areas.get(place, 0) + len(pixels)
        found.append(Nodule(group, (z, y / series.spacing[0], x / series.spacing[1]), areas))
    return sorted(found, key=lambda nodule: nodule.centre)


def merges(group: Group, marks: Sequence[Mark]) -> list[str]:
    """How a nodule was put together, and what was kept apart from it, in words with the number of the reader before the
    name of a mark: "0:Nodule 001 + 1:IL057_1 (0 mm apart, IoU 0.8)"."""
    def end(i):
        return f"{marks[i].reader}:{marks[i].name}"

    def words(link, sign):
        return f"{end(link.a)} {sign} {end(link.b)} ({link.distance:.3g} mm apart, IoU {link.iou:.2f})"

    if not group.links and not group.apart:
        return [end(group.marks[0])]
    return [*(words(link, "+") for link in group.links), *(words(link, "not") for link in group.apart)]


def _mark(series, reader, name, outlines, lesions):
    points, bodies = [], []
    for place, pixels in lesions.items():
        xy = np.array([point for outline in outlines[place] for point in outline.points])
        points.append(np.column_stack([np.full(len(xy), series.slices[place].position),
                                       xy[:, 1] * series.spacing[0], xy[:, 0] * series.spacing[1]]))
        single = [y * series.width + x for outline in outlines[place] if outline.is_point for x, y in outline.points]
        bodies.append(np.union1d(pixels, np.array(single, int)) + place * series.height * series.width)
    return Mark(reader, name, np.concatenate(points), np.concatenate(bodies).astype(int), lesions)
