"""One flag of the command line: its type, default, words for --help, and limits."""

import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from .errors import InputError


class Flag(NamedTuple):
    """A flag, --<name> on the command line and <name> from Python."""

    name: str
    type: Callable | tuple | Mapping  # int, float, str, bool, a function of a text, the words allowed, or a Registry
    default: Any
    help: str
    group: str  # its heading in --help; commands.cli.JOBS says which commands take the group
    least: Any = None  # the smallest value allowed
    most: Any = sys.maxsize  # the largest; below that of 64 bits where larger ones would end in want of memory

    @property
    def choices(self) -> tuple | None:
        """The words allowed; None for a flag of another type."""
        return tuple(self.type) if isinstance(self.type, (tuple, Mapping)) else None


def number_or_auto(text: str) -> int | str:
    """The type of a flag that is a number or "auto"."""
    return text if text == "auto" else int(text)


def several(text: str) -> str:
    """The type of a flag that takes one word or more; its value is a list of texts."""
    return text


def check_value(flag: Flag, value: Any, name: str) -> None:
    """InputError, calling the flag `name`, unless this is a value of its type and within its limits."""
    kinds = (flag.type,)
    if flag.choices is None:
        kinds = {float: (int, float), number_or_auto: (int, str), several: (list,)}.get(flag.type, kinds)
    if flag.choices is not None:
        if value not in flag.choices:
            own = "" if isinstance(flag.type, tuple) else ", or one that --plugin FILE brings"
            raise InputError(f"{name} {value!r}: must be one of {', '.join(flag.choices)}{own}")
    elif flag.type is number_or_auto and isinstance(value, str) and value != "auto":
        raise InputError(f"{name} {value!r}: must be a whole number, or auto")
    elif type(value) not in kinds:
        raise InputError(f"{name} {value!r}: must be of the type {kinds[-1].__name__}")
    if type(value) in (int, float):
        if flag.least is not None and not value >= flag.least:
            raise InputError(f"{name} {value}: must be at least {flag.least}")
        if not abs(value) <= flag.most:  # nor is nan
            raise InputError(f"{name} {value}: must be a number of at most {flag.most}")


def parse_numbers(kind: type, text: str, flag: str) -> list:
    """"1,2,3" -> [1, 2, 3] of type `kind`; [] for an empty text; InputError naming the flag for anything else."""
    try:
        return [kind(part) for part in str(text).split(",")] if text else []
    except ValueError:
        raise InputError(f"--{flag} {text}: is not a list of numbers separated by commas") from None


def parse_filters(text: str, flag: str) -> list[int]:
    """"32,64" -> [32, 64], the filters of each block of a network; InputError naming the flag for anything else."""
    filters = parse_numbers(int, text, flag)
    if not filters or not all(0 < number <= 65536 for number in filters):
        raise InputError(f"--{flag} {text}: needs a number a block, above 0 and at most 65536")
    return filters
