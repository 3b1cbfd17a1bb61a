"""Which part of a split the patients go to."""

import re
from collections.abc import Iterable, Mapping
from itertools import pairwise

import numpy as np

from ..system.errors import InputError
from ..system.flag import Flag

PARTS = ("train", "val", "test")
PATIENT_PATTERN = Flag("patient_pattern", str, "", "regular expression for the patient at the start of a case's name,"
                       " as in LIDC-IDRI-[0-9]+, where nothing else says whose a case is", "the split")


def shares_of(split: str, folds: int) -> dict[str, float]:
    """The parts of a split by name, with their shares of the patients, sum 1; none for neither.

    :param split: "60:20:20" for train, val and test, or "".
    :param folds: parts of equal size, fold1, fold2, ..., or 0.
    :raises InputError: for anything else, naming the flag.
    """
    if split and folds:
        raise InputError("--split and --folds: choose one")
    if folds == 1:
        raise InputError("--folds 1: must be at least 2, or 0 for none")
    if folds:
        return {f"fold{i}": 1 / folds for i in range(1, folds + 1)}
    if not split:
        return {}
    try:
        numbers = [float(part) for part in split.split(":")]
    except ValueError:
        numbers = []
    if len(numbers) != len(PARTS) or not all(0 <= number < np.inf for number in numbers) or not sum(numbers):
        raise InputError(f"--split {split}: is not three shares, of train, val and test, as in 60:20:20")
    return {part: number / sum(numbers) for part, number in zip(PARTS, numbers) if number}


def checked(pattern: str) -> str:
    """The value of --patient_pattern. :raises InputError: if it is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"--patient_pattern {pattern}: is no regular expression ({error})") from None
    return pattern


def assign(patients: Iterable[str], shares: Mapping[str, float], seed: int, known: Mapping[str, str]
           ) -> dict[str, str]:
    """The part of every patient, drawn at random by the seed.

    :param known: patients that have a part already, and keep it; only the others are drawn for.
    :raises InputError: if there are too few patients for every part to have one.
    """
    new = sorted({*patients} - known.keys())
    order = np.random.default_rng(seed).permutation(len(new))
    bounds = np.round(np.cumsum([0, *shares.values()]) * len(new)).astype(int)
    if not known and not all(start < end for start, end in pairwise(bounds)):
        raise InputError(f"the input has {len(new)} patients, or series where it knows no patients: too few for the"
                         f" parts {', '.join(shares)}; leave --split and --folds away, or give other shares")
    drawn = {new[i]: part for part, start, end in zip(shares, bounds, bounds[1:]) for i in order[start:end]}
    return {**known, **drawn}
