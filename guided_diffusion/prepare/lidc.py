"""LIDC-IDRI as The Cancer Imaging Archive ships it: DICOM series of CTs, and XML files of what readers marked.

Armato et al. 2011 (Medical Physics 38, 915). docs/prepare-lidc.md says what is taken and how.
"""

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..data import masks
from ..system.errors import InputError
from ..system.flag import Flag, parse_numbers
from . import SOURCES
from .base import LeftOut, PreparedCase, Source, Unit
from .ct_series import Series, find_files, head_of, pydicom, read_series
from .lidc_marks import find_nodules, merges, place_marks
from .lidc_nodules import Mark
from .lidc_xml import series_of, sessions_of

LEAST_SPACING = 0.05  # mm; finer ones would end in want of memory
CASE_NUMBER = re.compile(r"LIDC-IDRI-\d+")  # the source's own; no other PatientID is copied
SPACING = Flag("spacing", float, 0.0, "distance of pixels in mm to resample to (0: as it is)", "the cases", least=0)
CONTEXT = Flag("context", int, 0, "so many slices before and after become further channels", "the cases", least=0,
               most=64)
FLAGS = [
    Flag("xml", str, "", "folder of the XML files, where they do not lie below INPUT", "the cases"),
    Flag("window", str, "-1000,400", "Hounsfield units that become black and white; written with =, as in"
         " --window=-1000,400", "the cases"),
    SPACING,
    Flag("size", int, 128, "side in pixels of the square around a nodule's centre (0: whole slices, with all nodules)",
         "the cases", least=0, most=8192),
    Flag("slices", ("all", "largest"), "all", "all marked slices of a nodule, or the one with the largest area",
         "the cases"),
    CONTEXT,
    Flag("max_raters", int, 0, "take the first so many readers of a series (0: all)", "the cases", least=0),
    Flag("unrated", bool, True, "count nodules whose characteristics are missing or 0", "the cases"),
    Flag("point_marks", bool, False, "count slices as marked that have only a single point, or an outline that encloses"
         " nothing; their masks are empty", "the cases"),
]


@SOURCES.add("lidc", "LIDC-IDRI: DICOM series of CTs, and XML files of what up to four readers outlined", FLAGS)
class Lidc(Source):
    """The lung CTs of LIDC-IDRI, from its DICOM and XML files.

    :param path: a folder with the DICOM files, and the XML files where `xml` is "".
    """

    example = "LIDC-IDRI data/lidc --split 60:20:20"

    def __init__(self, path: Path, xml: str, window: str, spacing: float, size: int, slices: str, context: int,
                 max_raters: int, unrated: bool, point_marks: bool):
        super().__init__(path)
        self.xml, self.spacing, self.size, self.slices, self.context = xml, spacing, size, slices, context
        self.max_raters, self.unrated, self.point_marks = max_raters, unrated, point_marks
        self.window = parse_numbers(float, window, "window")
        if len(self.window) != 2 or not -np.inf < self.window[0] < self.window[1] < np.inf:
            raise InputError(f"--window {window}: must be two numbers, the lower one first, as in --window=-1000,400")
        if 0 < spacing < LEAST_SPACING:
            raise InputError(f"--spacing {spacing:g}: must be 0, or at least {LEAST_SPACING} mm")
        pydicom()

    # ---- what there is ----

    def units(self) -> Iterator[Unit | LeftOut]:
        """The CT series that XML files name, by patient."""
        heads, readings, left_out = {}, {}, []
        folders = [self.path, *([Path(self.xml)] if self.xml else [])]
        if self.xml and Path(self.xml).resolve().is_relative_to(self.path.resolve()):
            folders.pop()  # is found with the rest
        for name, folder in zip(("INPUT", "--xml"), folders):
            if not folder.is_dir():
                raise InputError(f"{name} {folder}: is no folder")
        for path in (path for folder in folders for path in find_files(folder)):
            try:
                if path.suffix.lower() == ".xml":
                    readings.setdefault(series_of(path), []).append(path)
                elif head := head_of(path):
                    heads.setdefault(head.series, []).append(head)
            except InputError as error:
                left_out.append(LeftOut(self._name(path), str(error)))
        if not heads and not readings and not left_out:
            raise InputError(f"{self.path}: holds neither DICOM nor XML files; give the folder of LIDC-IDRI that has"
                             f" both")
        yield from left_out
        for uid, paths in readings.items():
            if uid not in heads:
                yield from (LeftOut(self._name(path), f"names the series {uid}, which is not there; download it")
                            for path in paths)
        patients: dict[str, int] = {}  # those before it, and their number of CTs
        for patient, uid in sorted((files[0].patient, uid) for uid, files in heads.items()):
            files = [head.path for head in heads[uid]]
            if heads[uid][0].modality not in ("CT", ""):
                yield LeftOut(f"series {uid}", f"is of the modality {heads[uid][0].modality}, not a CT")
                continue
            patients[patient] = patients.get(patient, 0) + 1
            if uid not in readings:
                yield LeftOut(f"series {uid}", f"no XML file names it ({self._name(files[0])}); put its XML file below"
                              f" {self.path}, or name the folder with --xml")
                continue
            name = patient if CASE_NUMBER.fullmatch(patient) else f"patient-{len(patients):04}"
            yield Unit(f"{name}-s{patients[patient]}", name, (uid, files, readings[uid]))

    def _name(self, path):
        """A file's name for messages, short where it lies below INPUT."""
        return str(path.relative_to(self.path) if path.is_relative_to(self.path) else path)

    # ---- what becomes of a series ----

    def cases(self, unit: Unit) -> Iterator[PreparedCase | LeftOut]:
        """A case for each nodule and slice that is marked, or for each slice with `size` 0."""
        uid, files, readings = unit.data
        series, left_out = read_series(files)
        yield from (LeftOut(self._name(Path(what)), reason) for what, reason in left_out)
        sessions, taken = [], {}
        for path in readings:
            try:
                found = sessions_of(path)
            except InputError as error:
                yield LeftOut(self._name(path), str(error))
                continue
            if same := [other for other in taken if taken[other] == found]:
                yield LeftOut(self._name(path), f"says the same as {self._name(same[0])}")
            else:
                taken[path] = found
                sessions += found
        if taken and not sessions:
            yield LeftOut(unit.name, "its XML files hold no reading session")
        sessions = sessions[:self.max_raters or None]
        marks, broken, problems = place_marks(series, sessions, self.unrated, self.point_marks)
        yield from (LeftOut(unit.name, problem) for problem in problems)
        known = {"series": uid, "window": self.window, "tolerance": series.thickness,
                 "slice_spacing": series.distance if series.levels[1:] else None, "sessions": len(sessions),
                 "xml": "; ".join(path.name for path in taken)}  # folders may be called by names of patients
        yield from self._cases(unit.name, series, marks, broken, known)

    def _cases(self, name: str, series: Series, marks: list[Mark], broken: set[int], known):
        found = dict(enumerate(find_nodules(series, marks), 1))
        wanted = {number: self._slices_of(nodule, broken) for number, nodule in found.items()}
        read = lru_cache(2 * self.context + 2)(series.hounsfield)
        for place in sorted(set().union(*wanted.values())):
            try:
                image = np.stack([self._grey(read(each)) for each in series.neighbours(place, self.context)])
            except InputError as error:
                yield LeftOut(name, f"slice {place}: {error}")
                continue
            if self.size:
                of = {f"{name}-n{number:02}-{place:04}": [number] for number in found if place in wanted[number]}
            else:
                of = {f"{name}-{place:04}": [number for number, nodule in found.items() if place in nodule.areas]}
            for case, numbers in of.items():
                members = [marks[i] for number in numbers for i in found[number].group.marks
                           if place in marks[i].lesions]
                raters = np.zeros((known["sessions"], series.height, series.width), masks.DTYPE)
                for mark in members:
                    raters[mark.reader].flat[mark.lesions[place]] = True
                picture, raters, facts = self._cut(image, raters, series.spacing, found[numbers[0]].centre[1:])
                yield PreparedCase(case, picture, raters, {
                    **known, **facts, "image_uid": series.slices[place].uid, "slice": place,
                    "volume": f"{name}-n{numbers[0]:02}" if self.size else name,  # of slices that lie on each other
                    "position": series.slices[place].position, "nodules": numbers,
                    "marked_by": sorted({mark.reader for mark in members
                                         if self.point_marks or len(mark.lesions[place])}),
                    "merges": "; ".join(words for number in numbers for words in merges(found[number].group, marks))})

    def _slices_of(self, nodule, broken):
        """The slices of a nodule that become cases."""
        marked = [place for place, area in sorted(nodule.areas.items())
                  if place not in broken and (area or self.point_marks)]
        if self.slices == "largest":
            marked = sorted(marked, key=nodule.areas.get, reverse=True)[:1]
        return marked

    def _grey(self, hounsfield):
        """Hounsfield units [H, W] -> uint16, what the window makes of them."""
        low, high = self.window
        return (np.clip((hounsfield - low) / (high - low), 0, 1) * 65535).round().astype(np.uint16)

    def _cut(self, image, raters, spacing, centre):
        """Image [C, H, W] and raters [R, H, W] resampled to the spacing and cut to the size around (row, column)
        `centre`, with what the manifest says of it."""
        if self.spacing:
            image = np.stack([resample(each, spacing, self.spacing) for each in image])
            raters = np.stack([masks.from_pixels(resample(masks.to_pixels(each), spacing, self.spacing))
                               for each in raters])
            centre = [(middle + 0.5) * each / self.spacing - 0.5 for middle, each in zip(centre, spacing)]
            spacing = self.spacing, self.spacing
        top, left = 0, 0
        if self.size:
            top, left = (int(np.floor(middle + 0.5)) - self.size // 2 for middle in centre)
            image, raters = (crop(each, top, left, self.size) for each in (image, raters))
        return image, raters, {"spacing": list(spacing), "top_left": [top, left]}


def resample(pixels: np.ndarray, spacing: tuple[float, float], wanted: float) -> np.ndarray:
    """Pixels [H, W] uint8 or uint16 of a (row, column) spacing in mm -> those of the wanted one, bilinear with
    antialiasing; less than a new pixel at the right and lower edge is lost."""
    height, width = (max(1, int(side * each / wanted + 1e-6)) for side, each in zip(pixels.shape, spacing))
    box = 0, 0, min(pixels.shape[1], width * wanted / spacing[1]), min(pixels.shape[0], height * wanted / spacing[0])
    picture = Image.fromarray(pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32))
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR, box)).round().astype(pixels.dtype)


def crop(pixels: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
    """The square [..., size, size] of pixels [..., H, W] whose first pixel is at (top, left), 0 beyond their edge."""
    height, width = pixels.shape[-2:]
    out = np.zeros((*pixels.shape[:-2], size, size), pixels.dtype)
    rows, columns = (range(max(0, start), min(start + size, side)) for start, side in ((top, height), (left, width)))
    if rows and columns:
        out[..., rows.start - top:rows.stop - top, columns.start - left:columns.stop - left] = \
            pixels[..., rows.start:rows.stop, columns.start:columns.stop]
    return out
