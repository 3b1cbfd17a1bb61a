"""The XML files of LIDC-IDRI: what each reader marked on a CT series.

A file is the reading of one series. Every readingSession of it is one reader's. A reader's unblindedReadNodule has a
roi for every outline on a slice, whose points are its edgeMap. nonNodule marks are no lesions and are passed over.
"""

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

from ..system.errors import InputError

NAMESPACE = "{http://www.nih.gov}"
CT, X_RAY = f"{NAMESPACE}LidcReadMessage", "{http://www.nih.gov/idri}IdriReadMessage"  # what the root is called
BROKEN = "is damaged or cut short ({}); download it again"


class Outline(NamedTuple):
    """One contour of a nodule on a slice."""

    image_uid: str  # of the slice
    inclusion: bool  # False: what it encloses is no part of the nodule
    points: tuple[tuple[int, int], ...]  # (x, y) of its pixels in order, (0, 0) is the top left one

    @property
    def is_point(self) -> bool:
        """Whether it is a single point: a nodule below 3 mm, or a stray mark."""
        return len(self.points) == 1


class Nodule(NamedTuple):
    """What one reader marked as one nodule."""

    name: str  # its noduleID, which means nothing to other readers
    rated: bool  # whether it has characteristics, none of which is 0
    outlines: tuple[Outline, ...]


Session = tuple[Nodule, ...]  # all that one reader marked on a series


def series_of(path: Path) -> str:
    """The SeriesInstanceUid that a file names, read no further than there.

    :raises InputError: if the file is no reading of a CT, or names none.
    """
    try:
        for event, element in ElementTree.iterparse(path, ("start", "end")):
            if event == "start" and element.tag == X_RAY:
                raise InputError("is the reading of an X-ray, not of a CT")
            if event == "end" and element.tag == f"{NAMESPACE}SeriesInstanceUid":
                if uid := (element.text or "").strip():
                    return uid
            if event == "end" and element.tag == f"{NAMESPACE}ResponseHeader":
                break
    except (ElementTree.ParseError, OSError, LookupError, ValueError) as error:
        raise InputError(BROKEN.format(error)) from None
    raise InputError(f"is no LidcReadMessage of {NAMESPACE[1:-1]} with a SeriesInstanceUid; remove it")


def sessions_of(path: Path) -> tuple[Session, ...]:
    """What each reader of a file marked, in the order of the file.

    :raises InputError: if the file is damaged.
    """
    try:
        root = ElementTree.parse(path).getroot()
        return tuple(tuple(map(_nodule, session.findall(f"{NAMESPACE}unblindedReadNodule")))
                     for session in root.findall(f"{NAMESPACE}readingSession"))
    except (ElementTree.ParseError, OSError, LookupError, ValueError) as error:
        raise InputError(BROKEN.format(error)) from None


def _nodule(element):
    ratings = element.find(f"{NAMESPACE}characteristics")
    values = [] if ratings is None else [int(rating.text or 0) for rating in ratings]
    return Nodule(_text(element, "noduleID"), bool(values) and all(values),
                  tuple(map(_outline, element.findall(f"{NAMESPACE}roi"))))


def _outline(element):
    points = tuple((int(_text(point, "xCoord")), int(_text(point, "yCoord")))
                   for point in element.findall(f"{NAMESPACE}edgeMap"))
    inclusion = _text(element, "inclusion").upper()
    if not points or inclusion not in ("TRUE", "FALSE"):
        raise ValueError(f"a roi has {len(points)} points and the inclusion {inclusion!r}")
    return Outline(_text(element, "imageSOP_UID"), inclusion == "TRUE", points)


def _text(element, name):
    """The text of a part of an element."""
    text = element.findtext(NAMESPACE + name)
    if text is None:
        raise ValueError(f"a {element.tag.removeprefix(NAMESPACE)} has no {name}")
    return text.strip()
