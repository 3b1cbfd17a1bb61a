"""The files of the cases in a folder: found, sorted into images and labels, and read.

Layout: one folder a case, `<data_dir>/.../<case>/image_<n>.jpg label0_.jpg label1_.jpg ...`. A file's kind is the part
of its name before the first underscore; files that no reader takes are ignored. Several image files of a case are its
channels, in the order of their names. Any number of raters from 1 up; cases may differ in it. In a file called
labels_... each segment of a DICOM SEG file, or each channel of a volume, is a rater.

Where the images are volumes, every slice is a case, <case>_000, <case>_001, ... A DICOM series beside labels, whatever
its files are called, is the image of its folder. Volumes and DICOM series in folders without such names are cases
without labels.
"""

import functools
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import dist_util
from ..system.errors import InputError, raise_problems
from . import masks, scaling
from .mirror import local_folder
from .readers.base import Readers

SEVERAL = "labels"  # the kind of a NIfTI or DICOM file with the masks of several raters
MAX_NAME_BYTES = 200  # of a case, so that the names of its results are none too long for a file system
_UNSAFE = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # control characters, bytes that are no UTF-8


class CaseFiles(NamedTuple):
    """The files of one case."""

    name: str
    folder: Path
    images: list[Path]  # one, or one a channel
    labels: list[Path]  # one a rater, or one of several raters
    volume: str = ""  # the name of the volume that it is a slice of; "" for a picture
    slice: int = 0  # its number there
    series: tuple[Path, ...] = ()  # the files of the volume in order, where each slice is a file of its own
    problem: str = ""  # why its files cannot be read


class CaseContents(NamedTuple):
    """What the files of one case hold, at their own size."""

    image: np.ndarray  # [C, H, W] uint8 or uint16, with --context first the slice, then those before and after it
    raters: np.ndarray  # [R, H, W] bool, the mask of each rater
    spacing: tuple[float, float] | None  # (row, column) distance of the pixels in mm
    info: dict[str, Any]  # of the first image, see readers.base.Scan


def find_cases(data_dir: str | os.PathLike, flag: str = "--data_dir", readers: Readers | None = None
               ) -> list[CaseFiles]:
    """The case folders under data_dir, sorted by name: every folder that holds files or nothing at all.

    :param flag: that the folder comes from, for messages.
    :param readers: which files count (default: those of all readers).
    :raises InputError: naming every folder that cannot be listed, and every name that results cannot be called by.
    """
    data_dir = local_folder(data_dir, flag)
    root, readers = Path(data_dir), readers or Readers()
    if not os.path.isdir(data_dir):
        raise InputError(f"{flag} {data_dir}: no such folder")
    cases, problems = {}, []

    def unlisted(error):
        problems.append(f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or remove it")

    for folder, subfolders, names in os.walk(root, onerror=unlisted, followlinks=True):
        folder = Path(folder)
        if folder.is_symlink() and any(folder.samefile(parent) for parent in folder.parents):
            problems.append(f"{folder}: is a link to a folder that it lies in; remove it")
            subfolders.clear()
            continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths = sorted(folder / name for name in names if not name.startswith("."))
        files = [path for path in paths if readers.name_of(path)]
        problems += [f"{path}: is a link to nothing; mend it, or remove it" for path in paths
                     if not readers.name_of(path) and path.is_symlink() and not path.exists()]
        if subfolders and not files:
            continue
        for case in cases_of(folder, root, files, readers):
            problems += _wrong_names(case)
            same = cases.setdefault(unicodedata.normalize("NFC", case.name), case)
            if same is not case:
                problems.append(f"{folder}: names the same case as {same.folder}; rename one")
    raise_problems(problems, data_dir)
    if not cases:
        raise InputError(f"{flag} {data_dir}: holds no case; each case is a folder with an image_<n>.jpg and"
                         f" label0_.jpg, label1_.jpg, ...")
    return sorted(cases.values(), key=lambda case: case.name)


def find_cases_together(data_dir: str | os.PathLike, flag: str = "--data_dir", readers: Readers | None = None,
                        limit: int = 0) -> tuple[list[CaseFiles], set[str]]:
    """The first so many cases (0: all), and the names of the readers that their files need, found by rank 0 alone;
    every rank of a launch calls it.

    :raises InputError: on every rank: as find_cases, or naming a rank that does not see the same folder.
    """
    readers = readers or Readers()
    with dist_util.all_ranks_or_none():
        data_dir = local_folder(data_dir, flag)
    if dist_util.world_size() > 1:
        with dist_util.all_ranks_or_none():
            if not os.path.isdir(data_dir):
                raise InputError(f"{flag} {data_dir}: no such folder")
            seen = sorted(name for name in os.listdir(data_dir) if not name.startswith("."))
        dist_util.refuse_unlike({"number of entries": str(len(seen)), "names of entries": digest_of(seen)[:12]},
                                f"{flag} {data_dir} must hold the same for every process")

    def look():
        cases = find_cases(data_dir, flag, readers)[:limit or None]
        return [to_words(cases, data_dir), sorted(readers.used(cases))]

    words, used = dist_util.from_first_rank(look)
    return from_words(words, data_dir), set(used)


def to_words(cases: Iterable[CaseFiles], root: str | os.PathLike) -> list[list[Any]]:
    """Cases below a folder as lists, texts and numbers, for other processes."""
    relative = functools.cache(lambda path: os.path.relpath(path, root))  # the slices of a series share its files
    return [[[*map(relative, value)] if isinstance(value, (list, tuple)) else
             relative(value) if isinstance(value, Path) else value for value in case] for case in cases]


def from_words(cases: Iterable[list[Any]], root: str | os.PathLike) -> list[CaseFiles]:
    """The cases of to_words, below what is the same folder here."""
    paths = functools.cache(lambda *names: tuple(Path(root, name) for name in names))
    return [CaseFiles(name, Path(root, folder), [*paths(*images)], [*paths(*labels)], volume, number, paths(*series),
                      problem) for name, folder, images, labels, volume, number, series, problem in cases]


def digest_of(names: Iterable[str]) -> str:
    """A hash of names, in order."""
    return hashlib.sha256(json.dumps([*names]).encode()).hexdigest()


def case_name(folder: Path, root: Path) -> str:
    """What the case in a folder below root is called: a/b is a_b."""
    return "_".join(folder.relative_to(root).parts)


def cases_of(folder: Path, root: Path, files: Iterable[Path], readers: Readers) -> list[CaseFiles]:
    """The cases that the files of one folder, at or below root, make up.

    :raises InputError: naming a package that is missing.
    """
    files = sorted(files)
    case = sort_files(case_name(folder, root), folder, files, readers)
    stacks = [] if case.images else readers.stacks([path for path in files if path not in case.labels])
    if case.labels and len(stacks) == 1:  # a series, and volumes of its masks
        stack, = stacks
        return slices_of(case._replace(images=[stack.files[0]], series=stack.files[1:] and stack.files,
                                       problem=stack.problem), stack.slices)
    if case.labels or not stacks:
        slices = readers.slices(case.images[0]) if case.images else None
        return [] if folder == root else slices_of(case, slices)
    found = []
    for stack in stacks:
        parts = [*folder.relative_to(root).parts, *filter(None, [stack.name])] or [folder.resolve().name]
        case = CaseFiles("_".join(parts), folder, [stack.files[0]], [], series=stack.files[1:] and stack.files,
                         problem=stack.problem)
        found += slices_of(case, stack.slices)
    return found


def slices_of(case: CaseFiles, slices: int | None) -> list[CaseFiles]:
    """The cases that a case is if its images are volumes of so many slices; None for pictures."""
    if slices is None:
        return [case]
    if slices == 1 or case.problem:
        return [case._replace(volume=case.name)]
    digits = max(3, len(str(slices - 1)))
    return [case._replace(name=f"{case.name}_{i:0{digits}}", volume=case.name, slice=i,
                          images=[case.series[i]] if case.series else case.images) for i in range(slices)]


def sort_files(name: str, folder: Path, paths: Iterable[Path], readers: Readers) -> CaseFiles:
    """The images and labels among the files of a case folder, in their order."""
    kinds = {path: _kind(path, readers) for path in paths if readers.name_of(path)}
    labels = [path for path, kind in kinds.items() if re.fullmatch(r"label\d+", kind)
              or path.name.lower().startswith(f"{SEVERAL}_") and readers.is_volume(path)]
    return CaseFiles(name, folder, sorted(path for path, kind in kinds.items() if kind == "image"),
                     sorted(labels, key=lambda path: (kinds[path] == SEVERAL, int(kinds[path][5:].strip("s") or 0),
                                                      path)))


def _wrong_names(case):
    """What is wrong with the names of a case and its files."""
    wrong = [case.folder] if _UNSAFE.search(case.name) else [path for path in (*case.images, *case.labels)
                                                             if _UNSAFE.search(path.name)]
    if not wrong and len(case.name.encode()) > MAX_NAME_BYTES:
        return [f"{case.folder}: names its case by {len(case.name.encode())} bytes; rename it, since the files of"
                f" results need names of at most {MAX_NAME_BYTES}"]
    return [f"{str(path)!r}: has control characters in its name, or bytes that are not UTF-8; rename it"
            for path in wrong]  # quoted, so that the message stays one line


def read_case(files: CaseFiles, need_labels: bool = True, readers: Readers | None = None) -> CaseContents:
    """Decode the files of one case.

    :param need_labels: refuse a case without labels.
    :raises InputError: naming the file that is missing or wrong.
    """
    check_complete(files, need_labels)
    readers = readers or Readers()
    scans = [readers.read(path, files.slice, files.series) for path in files.images]
    image = _join_channels([scan.pixels for scan in scans], files.images)
    image = np.concatenate([image, *_neighbours(files, readers, scans[0].info.get("slices", 1))])
    for path, scan in zip(files.images, scans):
        check_place(path, scan.info, files.images[0], scans[0].info)
        if scan.spacing != scans[0].spacing:
            raise InputError(f"{path}: its pixels are {_in_mm(scan.spacing)}, but those of the first image of its case,"
                             f" {files.images[0].name}, are {_in_mm(scans[0].spacing)}; give all the same spacing")
    kinds = [_kind(path, readers) for path in files.labels]
    for kind, first, following, second in zip(kinds, files.labels, kinds[1:], files.labels[1:]):
        if kind == following != SEVERAL:
            raise InputError(f"{second}: is a second {kind} of its case, beside {first.name}; give every"
                             f" rater a number of their own")
    size = image.shape[1:]
    raters = [mask for path in files.labels for mask in _read_label(path, size, files, scans[0].info, readers)]
    return CaseContents(image, np.array(raters, masks.DTYPE).reshape(len(raters), *size), scans[0].spacing,
                        {**scans[0].info, **({"volume": files.volume} if files.volume else {})})


def check_complete(files: CaseFiles, need_labels: bool) -> None:
    """Raise InputError if a case has no image, or no labels though they are needed."""
    if files.problem:
        raise InputError(files.problem)
    if not files.images:
        raise InputError(f"{files.folder}: no image (a file called image_<n>.jpg or .png)")
    if not files.labels and need_labels:
        raise InputError(f"{files.folder}: no labels (files called label0_.jpg, label1_.jpg, ... or .png)")


def _kind(path, readers):
    return readers.stem_of(path).split("_")[0].lower()


def _in_mm(spacing):
    return f"{spacing[0]:g} x {spacing[1]:g} mm" if spacing else "of unknown distance"


def _neighbours(files, readers, slices):
    """The images [C, H, W] of the slices before and after, as many to each side as --context says, the nearest first;
    beyond an end the last slice is repeated."""
    if readers.context and not files.volume:
        raise InputError(f"{files.images[0]}: is a picture, but --context {readers.context} takes slices of volumes;"
                         f" leave it away")
    images = []
    for distance in range(1, readers.context + 1):
        for number in (max(files.slice - distance, 0), min(files.slice + distance, slices - 1)):
            paths = [files.series[number]] if files.series else files.images
            images += [readers.read(path, number, files.series).pixels for path in paths]
    return images


def check_place(path: Path, info: Mapping[str, Any], image_path: Path, image_info: Mapping[str, Any]) -> None:
    """Raise InputError if two volumes do not lie on each other, as their readers' info tells."""
    grids = info.get("grid"), image_info.get("grid")
    if None not in grids and not np.allclose(*grids, atol=1e-2):
        raise InputError(f"{path}: lies elsewhere than the first image of its case, {image_path.name}, since their"
                         f" affines differ; resample it to that image")
    if image_info.get("slices", 1) != info.get("slices", image_info.get("slices", 1)):
        raise InputError(f"{path}: has {info['slices']} slices, but the first image of its case, {image_path.name}, has"
                         f" {image_info['slices']}; give all the same slices")


def _join_channels(parts, paths):
    """The pictures [c, H, W] of one case -> one, [C, H, W]."""
    for part, path in zip(parts, paths):
        if part.shape[1:] != parts[0].shape[1:]:
            raise InputError(f"{path}: is {part.shape[2]} x {part.shape[1]} pixels, but the first image of its case,"
                             f" {paths[0].name}, is {parts[0].shape[2]} x {parts[0].shape[1]}")
    return np.concatenate(scaling.widen(parts))


def _read_label(path, size, files, info, readers):
    """The masks [H, W] bool in a label, of the size of its image: one, or several in a file that is called so."""
    several = _kind(path, readers) == SEVERAL
    found = readers.read_segments(path, files.slice, files.images[0], files.series, each=several)
    if found is None:
        found = readers.read_channels(path, files.slice) if several else [readers.read_mask(path, files.slice)]
        own = readers.info(path, files.slice)
    else:
        own = {}
    for mask in found:
        if mask.shape != size:
            raise InputError(f"{path}: is {mask.shape[1]} x {mask.shape[0]} pixels, but its image"
                             f" {files.images[0].name} is {size[1]} x {size[0]}")
    check_place(path, own, files.images[0], info)
    return found
