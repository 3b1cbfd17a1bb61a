"""Ensembles of masks on disk, of this program or any other, read to be scored."""

import os
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath

import numpy as np

from ..data import pictures, scaling
from ..data.case_files import CaseFiles, read_case
from ..data.fitting import Fitting, fits_between
from ..data.readers.base import Readers
from ..sampling.files import draws_are_independent
from ..system.errors import InputError, raise_problems

MASK_RINGING = 64  # grey levels of 255 by which a mask of an ensemble, saved as JPEG, may be off
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP")  # of masks, which any program may have written


class EnsembleFolder:
    """Masks of many cases in a folder, found by a pattern of their names.

    :param pattern: path below the folder, with {case} and {i} or {i:03d}. The members of a case count up from any
        number without a gap.
    """

    def __init__(self, folder: str | Path, pattern: str):
        self.folder, self.pattern = folder, pattern
        try:
            fields = [_fields(part) for part in pattern.rpartition("/")[::2]]
            pattern.format(case="", i=0)
        except (ValueError, TypeError, LookupError, AttributeError):  # unbalanced braces, formats that do not fit
            fields = [[], []]
        if sorted(sum(fields, [])) != ["case", "i"] or "i" not in fields[1]:
            raise InputError(f"--pattern {pattern}: must hold {{case}} and, in the file's name, {{i}}, each once, as in"
                             f" {{case}}_output{{i}}.png or {{case}}/{{i:03d}}.png")
        if PurePath(pattern).anchor or ".." in PurePath(pattern).parts:
            raise InputError(f"--pattern {pattern}: leads out of --samples_dir; give that folder as --samples_dir, and"
                             f" the rest as --pattern")
        if not os.path.isdir(folder):
            raise InputError(f"--samples_dir {folder}: no such folder on this machine")
        self._listed = {}

    def find(self, cases: Iterable[str], skip_missing: bool = False) -> dict[str, list[Path]]:
        """The files of the members of each case, {case name: [paths in order]}.

        :raises InputError: naming every case without members, or with a gap; those without are left out if
            skip_missing, unless no case has any.
        """
        found, problems = {}, []
        for case in cases:
            try:
                members = self._members(case)
            except InputError as error:
                problems.append(str(error))
                continue
            if members:
                found[case] = members
            elif not skip_missing:
                problems.append(f"{case}: no masks to score, such as {self.pattern.format(case=case, i=0)}, in"
                                f" {self.folder}; sample it, or give --skip_missing True")
        if not found and all("no masks to score" in problem for problem in problems):
            names = sorted(_names(self.folder))
            holds = f"holds {', '.join(names[:3])}{' ...' if names[3:] else ''}" if names else "is empty"
            problems = [f"--pattern {self.pattern}: matches no file of any case in {self.folder}, which {holds}"]
        raise_problems(problems, self.folder)
        return found

    def independent(self, members: Mapping[str, Sequence[Path]]) -> bool:
        """Whether the masks that `find` has found are independent draws, not spread over the distribution.

        :raises InputError: if they are in some cases and not in others.
        """
        cases = {draws_are_independent(paths[0].parent, case): case for case, paths in members.items()}
        if len(cases) == 2:
            raise InputError(f"--samples_dir {self.folder}: the masks of {cases[True]} are independent draws, and those"
                             f" of {cases[False]} are spread evenly over the distribution, which scores tell apart;"
                             f" sample all cases again with the same flags")
        return True in cases

    def _members(self, case):
        if case in ("", ".", "..") or PurePath(case).name != case:
            raise InputError(f"{case!r}: is no name of a case, since it would lead out of {self.folder}; rename it")
        folder, _, name = self.pattern.rpartition("/")
        folder = Path(self.folder, folder.format(case=case))
        if folder not in self._listed:
            self._listed[folder] = _names(folder)
        parts = [re.escape(text) + {"case": re.escape(case), "i": r"(\d+)"}.get(field, "")
                 for text, field, _, _ in string.Formatter().parse(name)]
        matches = (re.fullmatch("".join(parts), name) for name in self._listed[folder])
        members = sorted((int(match[1]), folder / match[0]) for match in matches if match)
        for (before, first), (after, second) in zip(members, members[1:]):
            if after == before:
                raise InputError(f"{case}: {first.name} and {second.name} are both its member {after}; remove one, or"
                                 f" give another --pattern")
            if after != before + 1:
                raise InputError(f"{case}: has member {before} and {second.name}, but none between; sample it again")
        return [path for _, path in members]


def _fields(pattern):
    """The fields of a pattern; ValueError for a format other than the number of digits of {i}."""
    fields = [part[1:] for part in string.Formatter().parse(pattern) if part[1] is not None]
    for field, width, conversion in fields:
        if conversion or not re.fullmatch(r"(\d{1,2})?d?" if field == "i" else "", width):
            raise ValueError(width)
    return [field for field, _, _ in fields]


def _names(folder):
    """What is in a folder; nothing if there is none."""
    try:
        return os.listdir(folder) if os.path.isdir(folder) else []
    except OSError as error:
        raise InputError(f"--samples_dir: {folder} cannot be listed ({error.strerror}); make it readable") from None


def read_scored_case(files: CaseFiles, members: Sequence[Path], fit: str, readers: Readers | None = None
                     ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One case to score: image [C, H, W] float32 in [0, 1], raters [m, H, W] bool, predictions [n, H, W] bool.

    All are at the size of the scan.

    :param files: of the case, from find_cases; members: the files of its predictions; fit: what was done to the scan
        before it was sampled, as for SegmentationCases, if predictions have another size than it.
    :param readers: of the files (default: with the default values of their flags).
    :raises InputError: naming the case and file.
    """
    name, readers = files.name, readers or Readers()
    predictions = [_read_mask(path, name, readers) for path in members]
    size = predictions[0].shape
    for path, mask in zip(members, predictions):
        if mask.shape != size:
            raise InputError(f"{name}: {path} is {mask.shape[1]} x {mask.shape[0]} pixels, but {members[0].name} is"
                             f" {size[1]} x {size[0]}")
    image, raters, *_ = read_case(files, readers=readers)
    if image.shape[1:] != size:
        way = Fitting(image.shape[1:], size[0], fit)
        known = [name for name in fits_between(way.size, size[0]) if name != "tile"]  # which have the scan's size
        if fit not in known or size[0] != size[1]:
            remedies = " or ".join(f"--fit {name}" for name in known)
            words = f"give {remedies} if it was sampled with that" if fit == "error" else \
                f"--fit {fit} does not lead from one to the other"
            raise InputError(f"{name}: {members[0]} is {size[1]} x {size[0]} pixels, but its raters' masks are"
                             f" {image.shape[2]} x {image.shape[1]}; {words}")
        return scaling.to_unit(image), raters, way.back(np.stack(predictions))
    return scaling.to_unit(image), raters, np.stack(predictions)


def _read_mask(path, case, readers):
    """[H, W] bool. In a picture of any kind: 0 and one other value, or, in a JPEG, black and white with ringing."""
    if readers.name_of(path) not in (None, "pictures", "tiff"):
        return readers.read_mask(path)
    pixels = pictures.decode(path, FORMATS)
    if pixels.ndim == 3:
        pixels = pixels.max(axis=2)
    if path.suffix.lower() in (".jpg", ".jpeg"):
        if 0 < pixels.max() <= MASK_RINGING:
            raise InputError(f"{case}: {path} is black but for values up to {pixels.max()}; write JPEG masks as 0 and"
                             f" 255")
        pixels = np.where(pixels <= MASK_RINGING, 0, np.where(pixels >= 255 - MASK_RINGING, 255, pixels))
    values = np.unique(pixels[pixels > 0])
    if len(values) > 1:
        raise InputError(f"{case}: {path} is no binary mask: it holds the values {', '.join(map(str, values[:3]))}"
                         f"{' ...' if values[3:].any() else ''} besides 0; cut probabilities at one half, and give each"
                         f" mask one value for foreground")
    return pixels > 0
