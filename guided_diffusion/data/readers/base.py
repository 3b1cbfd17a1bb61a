"""What a reader of a file format answers to, and the choice of one by the suffix of a file."""

import abc
import contextlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...system.errors import InputError, raise_problems
from .. import masks, scaling
from ..intensities import Normalise, parse_foreground
from . import READERS

KEPT_SEGMENTS = 32  # labels with segments that are kept in memory
VOLUME_BYTES = 1 << 30  # volumes are kept in memory up to this size, since their slices are read one after another


class Scan(NamedTuple):
    """What a file of one picture holds, or what one slice of a volume is."""

    pixels: np.ndarray  # [C, H, W] numbers of any type, which --normalise scales
    spacing: tuple[float, float] | None  # (row, column) distance of the pixels in mm; None if the file does not say
    info: dict[str, Any]  # what must come back out with the masks, such as the place of the scan in the patient
    full: tuple[float, float] | None = None  # what is black and white in full; None: what the type says, see Normalise


class Volume(NamedTuple):
    """What a file, or a series of files, of several slices holds.

    The `info` of a slice is that of its volume, that of the slice, and "slice", its number. These names are agreed on:

    format         nifti or dicom
    path           of the file
    slices         how many there are
    slice_spacing  the distance of slices in mm, None if unknown
    grid           the affine of (column, row, slice) to (right, front, up) in mm; none for DICOM without its place
    nifti: shape, affine   those of the file; axes, its orientation against (left, posterior, superior) as nibabel has
                   it; see nifti.to_file_axes
    dicom: files   of the series, in the order of the slices; one, if all are in one file
           frame   number of the slice within `path`; None if it is all of it
           modality, study_uid, series_uid, sop_uid; position and orientation, those of the slice as DICOM has them
    """

    pixels: np.ndarray  # [C, D, H, W] numbers of any type; rows and columns as they are shown
    spacing: tuple[float, float] | None  # (row, column) distance of the pixels in mm
    info: dict[str, Any]  # of all slices
    full: tuple[float, float] | None = None  # as for Scan
    slices: Sequence[dict[str, Any]] = ()  # further info, one a slice; or nothing

    def at(self, number: int) -> Scan:
        """One slice."""
        further = self.slices[number] if self.slices else {}
        return Scan(self.pixels[:, number], self.spacing, {**self.info, **further, "slice": number}, self.full)


class Stack(NamedTuple):
    """Files that make up one volume, or one picture."""

    name: str  # within their folder; "" if the folder's name is enough
    files: tuple[Path, ...]  # one, or one a slice, in order
    slices: int
    problem: str = ""  # why it cannot be read


class Segments(abc.ABC):
    """A label that itself says which slices of which scan it marks."""

    numbers: tuple[int, ...]  # of its segments

    @abc.abstractmethod
    def mask(self, slice: int, segment: int) -> np.ndarray:
        """What a segment marks on a slice of the scan, [H, W] bool."""


class Reader(abc.ABC):
    """Reads files of one format.

    An entry of READERS is a subclass, made with its flags as keyword arguments. Files are read on several threads at
    once. What it raises is reported with the name of the file, an InputError as it is.
    """

    suffixes: tuple[str, ...]  # of its files, in small letters: (".nii", ".nii.gz")

    def recognises(self, path: Path) -> bool:
        """Whether a file whose name has none of all readers' suffixes is of this format."""
        return False

    @abc.abstractmethod
    def read(self, path: Path) -> Scan:
        """The scan in a file."""

    def read_mask(self, path: Path) -> np.ndarray:
        """The mask in a file, [H, W] bool: what is above half of full scale in any channel of its scan.

        Overwrite it for a format whose labels are counted 0, 1, ...
        """
        return foreground(self.read(path).pixels, path)


class VolumeReader(Reader):
    """Reads a format whose files may hold several slices, or be slices of a series. Each slice is a case.

    Its files are cases without labels where they lie in no case folder. What is above 0 in a label is foreground.
    """

    @abc.abstractmethod
    def read_volume(self, files: tuple[Path, ...]) -> Volume:
        """All slices of a Stack's files."""

    @abc.abstractmethod
    def stacks(self, files: Sequence[Path]) -> list[Stack]:
        """The volumes that files of one folder make up, without reading their pixels."""

    def segments(self, path: Path, scan: Volume) -> Segments | None:
        """The segments that a label marks on a scan; None for a label that is a volume like its scan."""
        return None

    def read(self, path: Path) -> Scan:
        volume = self.read_volume((path,))
        if volume.pixels.shape[1] != 1:
            raise InputError(f"{path}: holds {volume.pixels.shape[1]} slices where one is expected; save the one that"
                             f" is meant by itself")
        return volume.at(0)

    def read_mask(self, path: Path) -> np.ndarray:
        return (self.read(path).pixels > 0).any(axis=0)


def foreground(pixels: np.ndarray, path: Path) -> np.ndarray:
    """Pixels [C, H, W] of a label -> mask [H, W] bool, above half of full scale in any channel.

    :raises InputError: if nothing is, and yet not all of it is 0.
    """
    mask = masks.of_label(pixels)
    if pixels.any() and not mask.any():
        full = scaling.full_scale(pixels.dtype)
        raise InputError(f"{path}: its brightest value is {pixels.max()} of {full}, so nothing of it is foreground"
                         f" (above half); write masks as 0 and {full}, or say which values are, as in --foreground"
                         f" {pixels.max()}")
    return mask


class _Kept:
    """A Scan or Volume and the limits of its intensities, which are found when they are first asked for."""

    def __init__(self, volume, normalise):
        self.volume, self.normalise = volume, normalise

    @cached_property
    def limits(self):
        return self.normalise.limits(self.volume.pixels, self.volume.full)


class Readers:
    """All readers, made with their flags.

    :param options: values of readers' flags, and of normalise, foreground and context, {name: value}; other names are
        passed over, other flags have defaults.
    :raises InputError: if two readers take one suffix, or a value cannot be used.
    """

    def __init__(self, options: Mapping[str, Any] | None = None):
        options = options or {}
        self.normalise = Normalise(options.get("normalise", "full"))
        self.foreground = parse_foreground(options.get("foreground", ""))
        self.context = options.get("context", 0)  # slices before and after that are further channels
        self.options = {name: {flag.name: options.get(flag.name, flag.default) for flag in entry.flags}
                        for name, entry in READERS.entries.items()}
        self._made = {name: READERS[name](**flags) for name, flags in self.options.items()}
        self._by_suffix: dict[str, str] = {}
        for name, reader in self._made.items():
            for suffix in reader.suffixes:
                other = self._by_suffix.setdefault(suffix, name)
                if other != name:
                    raise InputError(f"files called *{suffix}: have a reader in {READERS.entries[other].file} and again"
                                     f" in {READERS.entries[name].file}; take the suffix from one")
        self._recognised: dict[Path, str | None] = {}
        self._volumes: dict[tuple[Path, ...], Future] = {}
        self._segments: dict[tuple[Path, ...], Segments | None] = {}
        self._lock, self._segments_lock = threading.Lock(), threading.Lock()

    # ---- which reader ----

    def suffix_of(self, path: Path) -> str | None:
        """The suffix, in small letters, by which a file has a reader; None if it has none."""
        parts = path.name.lower().split(".")
        return next((suffix for i in range(1, len(parts)) if (suffix := "." + ".".join(parts[i:])) in self._by_suffix),
                    None)

    def stem_of(self, path: Path) -> str:
        """The name of a file without that suffix."""
        return path.name[:len(path.name) - len(self.suffix_of(path) or "")]

    def name_of(self, path: Path) -> str | None:
        """The name of a file's reader, by its suffix, or else by what is in it; None if it has none."""
        if suffix := self.suffix_of(path):
            return self._by_suffix[suffix]
        if path not in self._recognised:
            self._recognised[path] = next((name for name, reader in self._made.items() if reader.recognises(path)),
                                          None)
        return self._recognised[path]

    def used(self, cases: Iterable) -> set[str]:
        """The names of the readers that the files of these case_files.CaseFiles need."""
        return {self.name_of(path) for files in cases for path in (*files.images, *files.labels)}

    def settings(self) -> dict[str, Any]:
        """Whatever of normalise, foreground and context is not as it is by default."""
        values = {"normalise": str(self.normalise), "foreground": self.foreground, "context": self.context}
        return {name: value for name, value in values.items() if value not in ("full", (), 0)}

    def stacks(self, files: Sequence[Path]) -> list[Stack]:
        """The volumes and pictures among files of one folder, of formats whose files are cases by themselves.

        :raises InputError: naming the package that is missing.
        """
        found = []
        for name, reader in self._made.items():
            own = [path for path in files if self.name_of(path) == name]
            if own and isinstance(reader, VolumeReader):
                found += reader.stacks(own)
        return sorted(found, key=lambda stack: stack.name)

    def slices(self, path: Path) -> int | None:
        """How many slices a file holds; None if it is no volume, or cannot be read, which reading it will say."""
        with contextlib.suppress(Exception):
            return max((stack.slices for stack in self.stacks([path])), default=1) if self.is_volume(path) else None
        return None

    def is_volume(self, path: Path) -> bool:
        """Whether a file is of a format whose files may hold volumes."""
        return isinstance(self._made.get(self.name_of(path)), VolumeReader)

    # ---- reading ----

    def read(self, path: Path, number: int = 0, series: tuple[Path, ...] = ()) -> Scan:
        """The scan in a file, or slice `number` of the volume in it or in a series of files, with 8 or 16 bits.

        :raises InputError: naming the file.
        """
        if self.is_volume(path):
            kept = self._volume(path, series)
            scan, whole = self._slice(kept.volume, number, path), kept
        else:
            scan = self._call("read", path)
            self._check(scan.pixels, path, 3)
            whole = _Kept(scan, self.normalise)
        try:
            return scan._replace(pixels=self.normalise.apply(scan.pixels, whole.limits), full=None)
        except ValueError as error:
            raise InputError(f"{path}: its reader {self.name_of(path)} gives {error}") from None

    def read_mask(self, path: Path, number: int = 0) -> np.ndarray:
        """The mask in a file, or in slice `number` of the volume in it, [H, W] bool.

        :raises InputError: naming the file.
        """
        if not self.is_volume(path) and not self.foreground:
            return self._call("read_mask", path)
        pixels = self._slice(self._volume(path).volume, number, path).pixels if self.is_volume(path) \
            else self._call("read", path).pixels
        if not self.foreground:
            return (pixels > 0).any(axis=0)
        if len(pixels) != 1:
            raise InputError(f"{path}: has {len(pixels)} channels, but --foreground takes values of grey label maps;"
                             f" write it as one")
        return np.isin(pixels[0], self.foreground)

    def read_segments(self, path: Path, number: int, image: Path, series: tuple[Path, ...] = (), each: bool = False
                      ) -> list[np.ndarray] | None:
        """What a label marks on slice `number` of the volume in an image, or in a series of files: one mask [H, W]
        bool, or if `each`, one a segment. --foreground chooses segments by their numbers. None for other labels.

        :raises InputError: naming the file.
        """
        if not self.is_volume(path) or not self.is_volume(image):
            return None
        scan = self._volume(image, series).volume
        with self._segments_lock:
            key = path, *(series or (image,))
            if key not in self._segments:
                if len(self._segments) >= KEPT_SEGMENTS:
                    self._segments.clear()
                self._segments[key] = self._call("segments", path, path, scan)
        segments = self._segments[key]
        if segments is None:
            return None
        if missing := {*self.foreground} - {*segments.numbers}:
            raise InputError(f"{path}: has the segments {', '.join(map(str, segments.numbers))}, and none of the number"
                             f" {min(missing)} of --foreground; give those that there are")
        marked = [segments.mask(number, segment) for segment in self.foreground or segments.numbers]
        return marked if each else [np.any(marked, axis=0)]

    def read_channels(self, path: Path, number: int = 0) -> list[np.ndarray]:
        """The masks in the channels of a volume, as read_mask has that of all, each [H, W] bool."""
        pixels = self._slice(self._volume(path).volume, number, path).pixels
        return [*(np.isin(pixels, self.foreground) if self.foreground else pixels > 0)]

    def info(self, path: Path, number: int = 0) -> dict[str, Any]:
        """What else the file of a label says, {} for one of a picture."""
        return self._slice(self._volume(path).volume, number, path).info if self.is_volume(path) else {}

    def _slice(self, volume, number, path):
        if number >= volume.pixels.shape[1]:
            raise InputError(f"{path}: has {volume.pixels.shape[1]} slices, fewer than the first image of its case;"
                             f" write all files of a case with the same slices")
        return volume.at(number)

    def _volume(self, path, series=()):
        """A _Kept volume. The slices of one are read one after another, on several threads."""
        files = series or (path,)
        with self._lock:
            future = self._volumes.pop(files, None)
            first = future is None
            future = self._volumes[files] = future or Future()
            self._forget(VOLUME_BYTES)
        if first:
            try:
                volume = self._call("read_volume", files[0], files)
                self._check(volume.pixels, path, 4)
                future.set_result(_Kept(volume, self.normalise))
            except BaseException as error:
                future.set_exception(error)
        return future.result()

    def forget(self) -> None:
        """Let go of all volumes that are kept."""
        with self._lock:
            self._forget(0)
        with self._segments_lock:
            self._segments.clear()

    def _forget(self, most):
        """Let go of the volumes that were used longest ago, above so many bytes."""
        size = 0
        for files in reversed([*self._volumes]):
            future = self._volumes[files]
            if future.done() and not future.exception():
                size += future.result().volume.pixels.nbytes
                if size > most:
                    del self._volumes[files]

    def _check(self, pixels, path, dimensions):
        if pixels.ndim != dimensions or not pixels.size:
            raise InputError(f"{path}: its reader {self.name_of(path)} gives pixels {list(pixels.shape)}, not"
                             f" [channels, {'slices, ' if dimensions == 4 else ''}rows, columns]")

    def _call(self, method, path, *args):
        name = self.name_of(path)
        if name is None:
            raise InputError(f"{path}: no reader takes files of its name; there are {', '.join(self._by_suffix)}")
        try:
            return getattr(self._made[name], method)(*args or (path,))
        except InputError:
            raise
        except Exception as error:  # libraries raise almost anything on a damaged file
            words = " ".join(str(error).split())[:300]
            raise InputError(f"{path}: cannot be read ({type(error).__name__}: {words}); replace it or remove its case"
                             ) from error


def refuse_unused(options: Mapping[str, Any], used: Iterable[str], where: str) -> None:
    """Raise InputError if a flag of a reader has another value than its default, and no file needs that reader.

    :param options: values of flags; used: names of the readers of all files; where: the files are, for the message.
    """
    problems = []
    for flag in READERS.flags():
        owners = READERS.owners(flag.name)
        if options.get(flag.name, flag.default) != flag.default and not {*owners} & {*used}:
            problems.append(f"--{flag.name} {options[flag.name]}: is a flag of the reader {' and '.join(owners)}, which"
                            f" no file of {where} needs; leave it away")
    raise_problems(problems, "the flags")
