"""What a reader of a file format answers to, and the choice of one by the suffix of a file."""

import abc
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...system.errors import InputError, raise_problems
from .. import masks, scaling
from . import READERS


class Scan(NamedTuple):
    """What a file holds."""

    pixels: np.ndarray  # [C, H, W] uint8 or uint16, or floats in [0, 1], of which 16 bits are kept
    spacing: tuple[float, float] | None  # (row, column) distance of the pixels in mm; None if the file does not say
    info: dict[str, Any]  # what must come back out with the masks, such as the place of the scan in the patient


class Reader(abc.ABC):
    """Reads files of one format.

    An entry of READERS is a subclass, made with its flags as keyword arguments. Files are read on several threads at
    once. What it raises is reported with the name of the file, an InputError as it is.
    """

    suffixes: tuple[str, ...]  # of its files, in small letters: (".nii", ".nii.gz")

    @abc.abstractmethod
    def read(self, path: Path) -> Scan:
        """The scan in a file."""

    def read_mask(self, path: Path) -> np.ndarray:
        """The mask in a file, [H, W] bool: what is above half of full scale in any channel of its scan.

        Overwrite it for a format whose labels are counted 0, 1, ...
        """
        return foreground(self.read(path).pixels, path)


def foreground(pixels: np.ndarray, path: Path) -> np.ndarray:
    """Pixels [C, H, W] of a label -> mask [H, W] bool, above half of full scale in any channel.

    :raises InputError: if nothing is, and yet not all of it is 0.
    """
    mask = masks.of_label(pixels)
    if pixels.any() and not mask.any():
        full = scaling.full_scale(pixels.dtype)
        raise InputError(f"{path}: its brightest value is {pixels.max()} of {full}, so nothing of it is foreground"
                         f" (above half); write masks as 0 and {full}")
    return mask


class Readers:
    """All readers, made with their flags.

    :param options: values of readers' flags, {name: value}; other names are passed over, other flags have defaults.
    :raises InputError: if two readers take one suffix.
    """

    def __init__(self, options: Mapping[str, Any] | None = None):
        self.options = {name: {flag.name: (options or {}).get(flag.name, flag.default) for flag in entry.flags}
                        for name, entry in READERS.entries.items()}
        self._made = {name: READERS[name](**flags) for name, flags in self.options.items()}
        self._by_suffix: dict[str, str] = {}
        for name, reader in self._made.items():
            for suffix in reader.suffixes:
                other = self._by_suffix.setdefault(suffix, name)
                if other != name:
                    raise InputError(f"files called *{suffix}: have a reader in {READERS.entries[other].file} and again"
                                     f" in {READERS.entries[name].file}; take the suffix from one")

    def suffix_of(self, path: Path) -> str | None:
        """The suffix, in small letters, by which a file has a reader; None if it has none."""
        parts = path.name.lower().split(".")
        return next((suffix for i in range(1, len(parts)) if (suffix := "." + ".".join(parts[i:])) in self._by_suffix),
                    None)

    def stem_of(self, path: Path) -> str:
        """The name of a file without that suffix."""
        return path.name[:len(path.name) - len(self.suffix_of(path) or "")]

    def name_of(self, path: Path) -> str | None:
        """The name of a file's reader; None if it has none."""
        return self._by_suffix.get(self.suffix_of(path))

    def used(self, cases: Iterable) -> set[str]:
        """The names of the readers that the files of these case_files.CaseFiles need."""
        return {self.name_of(path) for files in cases for path in (*files.images, *files.labels)}

    def read(self, path: Path) -> Scan:
        """The scan in a file, with 8 or 16 bits.

        :raises InputError: naming the file.
        """
        scan = self._call("read", path)
        pixels = scan.pixels
        if pixels.ndim != 3 or not pixels.size:
            raise InputError(f"{path}: its reader {self.name_of(path)} gives pixels {list(pixels.shape)}, not"
                             f" [channels, rows, columns]")
        if pixels.dtype not in (np.uint8, np.uint16) and not (
                pixels.dtype.kind == "f" and pixels.min() >= 0 and pixels.max() <= 1):  # nor is nan
            raise InputError(f"{path}: its reader {self.name_of(path)} gives {pixels.dtype} from {pixels.min():g} to"
                             f" {pixels.max():g}, not uint8, uint16 or floats in [0, 1]")
        return scan._replace(pixels=scaling.to_16_bits(pixels))

    def read_mask(self, path: Path) -> np.ndarray:
        """The mask in a file, [H, W] bool.

        :raises InputError: naming the file.
        """
        return self._call("read_mask", path)

    def _call(self, method, path):
        name = self.name_of(path)
        if name is None:
            raise InputError(f"{path}: no reader takes files of its name; there are {', '.join(self._by_suffix)}")
        try:
            return getattr(self._made[name], method)(path)
        except InputError:
            raise
        except Exception as error:  # libraries raise almost anything on a damaged file
            raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error}); replace it or remove its case"
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
