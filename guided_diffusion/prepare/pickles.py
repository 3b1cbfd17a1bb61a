"""data_lidc.pickle of the Probabilistic U-Net's PyTorch code, and others of its form.

A pickle can name any function for Python to call. The one here knows what NumPy's arrays are made of and nothing else,
and NumPy itself is not called either: arrays are made here, from bytes whose number fits their shape.
"""

import math
import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import _Unpickler  # in Python: the one in C takes as much memory as a pickle asks for
from typing import Any

import numpy as np

from ..data.scaling import to_16_bits
from ..metrics import patient_of
from ..system.errors import InputError
from . import SOURCES
from .base import LeftOut, PreparedCase, Source, Unit
from .splits import PATIENT_PATTERN, checked

SUFFIXES = (".pickle", ".pkl", ".p")


@SOURCES.add("pickle", "data_lidc.pickle of the Probabilistic U-Net in PyTorch, and its like",
             [PATIENT_PATTERN])
class Pickles(Source):
    """Reads a pickle, or all of a folder, of the form {name: {"image": [H, W], "masks": [[H, W], ...], "series_uid":
    ...}}: images from 0 to 1 or of 8 or 16 bits, masks of any number of raters. Further entries are not copied. No code
    in a pickle is run. A pickle is held in memory as a whole.
    """

    example = "data_lidc.pickle lidc --split 60:20:20"

    def __init__(self, path: Path, patient_pattern: str):
        super().__init__(path)
        self.patient_pattern = checked(patient_pattern)
        self.split_by = "patient" if patient_pattern else "series"

    def units(self) -> Iterator[Unit | LeftOut]:
        paths = [self.path]
        if self.path.is_dir():
            paths = sorted(path for path in self.path.iterdir() if path.suffix.lower() in SUFFIXES)
        if not paths:
            raise InputError(f"{self.path}: holds no {', '.join(SUFFIXES)}; name the pickle")
        for path in paths:
            try:
                content = load(path)
            except InputError as error:
                if len(paths) == 1:
                    raise
                yield LeftOut(path.name, str(error).removeprefix(f"{path}: "))
                continue
            for key, value in content.items():
                if not isinstance(key, str) or not isinstance(value, dict) or not {"image", "masks"} <= value.keys():
                    yield LeftOut(f"{path.name}, {key!r:.80}", "is no name with an image and masks")
                    continue
                series = value.get("series_uid") if isinstance(value.get("series_uid"), (str, int)) else None
                patient = patient_of(key, self.patient_pattern) if self.patient_pattern else str(series or key)
                yield Unit(key, patient, (value["image"], value["masks"], series))

    def cases(self, unit: Unit) -> Iterator[PreparedCase | LeftOut]:
        image, masks, series = unit.data
        masks = list(masks) if isinstance(masks, (list, tuple)) or getattr(masks, "ndim", 0) == 3 else [masks]
        if not masks or not all(isinstance(array, np.ndarray) for array in (image, *masks)):
            raise InputError("its image and masks are no arrays")
        raters = [_mask(mask) for mask in masks]
        if any(mask.shape != raters[0].shape for mask in raters):
            raise InputError("its masks have different sizes")
        name = re.sub(r"[/\\\s]+", "_", unit.name)
        yield PreparedCase(name, _image(image), np.stack(raters), {"series": series})


def _image(array):
    """[H, W], or with channels first or last -> [C, H, W] uint8 or uint16."""
    if array.ndim == 3:
        array = array.transpose(2, 0, 1) if array.shape[2] <= 4 else array
    pixels = array[None] if array.ndim == 2 else array
    if pixels.dtype.kind == "f":
        if not (pixels.size and pixels.min() >= 0 and pixels.max() <= 1):
            raise InputError(f"its image has values from {pixels.min():g} to {pixels.max():g}; scale it from 0 to 1")
        return to_16_bits(pixels)
    if pixels.dtype not in (np.uint8, np.uint16):
        raise InputError(f"its image is {pixels.dtype}; write floats from 0 to 1, uint8 or uint16")
    return pixels.astype(pixels.dtype.newbyteorder("="))


def _mask(array):
    """[H, W] of 0 and 1, or 0 and 255 -> bool."""
    full = array.max(initial=0)
    if array.ndim != 2 or full not in (0, 1, 255) or not np.isin(array, (0, full)).all():
        raise InputError(f"one of its masks, {list(array.shape)}, is not [H, W] of 0 and 1")
    return array > 0


# ---- reading pickles ----

def load(path: Path) -> dict:
    """The dict in a pickle, of containers, text, numbers and arrays.

    :raises InputError: if it holds anything else, or is damaged. Nothing that it names is called.
    """
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            content = _arrays(_ArrayUnpickler(data, encoding="latin1").load(), {})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # a damaged pickle raises almost anything
        raise InputError(f"{path}: cannot be read ({type(error).__name__}: {error}); it is no pickle, or a damaged one"
                         ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no dict of cases by name; write it as {{name: {{\"image\", \"masks\"}}}}")
    return content


class _Array:
    """An array in a pickle that is being read."""

    __slots__ = ("array",)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, raw = state
        self.array = _from_bytes(raw, dtype, shape, "F" if fortran else "C")


class _Type:
    """A type of numbers in a pickle that is being read."""

    __slots__ = ("text",)

    def __init__(self, text: str):
        if not isinstance(text, str) or not re.fullmatch(r"[<>|=]?[biuf][1248]", text):
            raise InputError(f"holds arrays of the type {text!r}, not of numbers")
        self.text = text.lstrip("<>|=")

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise InputError("holds numbers of an unknown order of bytes")
        self.text = state[1] + self.text


class _Call:
    """A function that a pickle may call; nothing can be set on it."""

    __slots__ = ("function",)

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __setstate__(self, state: object) -> None:
        raise InputError("changes what reads it")


def _from_bytes(raw, dtype, shape, order):
    if isinstance(raw, str):  # of Python 2
        raw = raw.encode("latin1")
    values = np.frombuffer(raw, np.dtype(dtype.text))
    if math.prod(shape) != values.size:
        raise InputError(f"holds an array of the shape {list(shape)} with {values.size} values")
    return values.reshape(shape, order=order)


def _finished(raw, dtype, shape, order, *_):
    made = _Array()
    made.array = _from_bytes(raw, dtype, shape, order)
    return made


def _encode(text, encoding):
    if encoding not in ("latin1", "latin-1"):
        raise InputError(f"holds bytes as {encoding}")
    return text.encode("latin1")


_KNOWN = {name: _Call(function) for name, function in {
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.core.multiarray.scalar": lambda dtype, raw: _from_bytes(raw, dtype, (1,), "C")[0].item(),
    "numpy.core.numeric._frombuffer": _finished,
    "numpy.ndarray": lambda *_: _Array(),
    "numpy.dtype": lambda text, *_: _Type(text),
    "_codecs.encode": _encode,
    "__builtin__.bytes": lambda: b"",  # how old protocols write none
}.items()}


class _ArrayUnpickler(_Unpickler):
    def find_class(self, module: str, name: str) -> _Call:
        known = _KNOWN.get(f"{re.sub('^numpy[.]_core[.]', 'numpy.core.', module)}.{name}")
        if not known:
            raise InputError(f"names {module}.{name}, and only NumPy's arrays are read from a pickle; do not open it"
                             f" otherwise unless you trust it")
        return known

    def persistent_load(self, pid: object) -> None:
        raise InputError("refers to what lies outside of it")


def _arrays(value, seen):
    """A container that was read, its _Array replaced by their arrays; `seen` has what was replaced already."""
    if isinstance(value, _Array):
        return value.array
    if not isinstance(value, (dict, list, tuple)):
        return value
    if id(value) not in seen:
        seen[id(value)] = None  # inside itself
        items = value.items() if isinstance(value, dict) else enumerate(value)
        made = {key: _arrays(item, seen) for key, item in items}
        seen[id(value)] = made if isinstance(value, dict) else list(made.values())
    return seen[id(value)]
