"""What a source of data answers to, which `cimd-prepare` turns into the folder layout that training reads."""

import abc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Unit(NamedTuple):
    """A part of the input that one process prepares at once, as a series of slices or a file."""

    name: str  # that no other unit has
    patient: str  # or the series, where the source knows no patients; a split never parts its cases
    data: Any = None  # for Source.cases; goes to another process, so it can be pickled
    part: str = ""  # of a split that the source itself makes: train, val or test


class PreparedCase(NamedTuple):
    """One case to be written."""

    name: str  # of its folder; no other case of the source has it
    image: np.ndarray  # [C, H, W] uint8 or uint16
    raters: np.ndarray  # [R, H, W] bool, the mask of each rater
    facts: dict[str, Any]  # its columns of manifest.csv, beyond those of data.manifest.COLUMNS that every case has


class LeftOut(NamedTuple):
    """Something of the input that becomes no case."""

    what: str  # a file, a series, a nodule
    reason: str


class Source(abc.ABC):
    """One kind of input.

    An entry of SOURCES is a subclass, made with the path of the input and its flags as keyword arguments. Its docstring
    stands in --help, up to the first empty line and :param.
    """

    split_by = "patient"  # what `patient` of its units is: a patient, else a series, or a case
    example = ""  # for --help: what follows `cimd-prepare KIND`

    def __init__(self, path: Path):
        self.path = path

    @abc.abstractmethod
    def units(self) -> Iterable[Unit | LeftOut]:
        """What there is to prepare, in a fixed order, found without reading more than is needed.

        :raises InputError: if the path holds nothing of this kind, naming it.
        """

    @abc.abstractmethod
    def cases(self, unit: Unit) -> Iterator[PreparedCase | LeftOut]:
        """The cases of a unit. Runs in another process.

        :raises InputError: if the unit cannot be read; it is then left out as a whole, and the others go on.
        """
