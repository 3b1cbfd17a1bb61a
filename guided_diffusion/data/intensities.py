"""Intensities of scans brought to 8 or 16 bits, as --normalise says, and values of label maps, as --foreground says.

All ways are one: numbers from `low` to `high` become 0 to 1, and those beyond become 0 or 1.
"""

import re

import numpy as np

from ..system.errors import InputError
from .scaling import to_16_bits

MOST_SAMPLED = 1 << 22  # numbers that percentiles are taken of, evenly spaced among all
WORDS = ("full: the whole range of the type, for CT -1000 to 400 HU; minmax: the smallest and largest number;"
         " percentile: those that 0.5 % and 99.5 % lie below; zscore: the mean and 3 standard deviations to each side;"
         " window:LOW,HIGH: these numbers, as they are in the file")

Limits = tuple[np.ndarray, np.ndarray] | None  # (low, high), [C] each, what becomes 0 and 1; None: leave them as is


def _minmax(numbers):
    return numbers.min(1), numbers.max(1)


def _percentile(numbers):
    low, high = np.percentile(numbers[:, ::-(-numbers.shape[1] // MOST_SAMPLED)], [0.5, 99.5], axis=1)
    return low, high


def _zscore(numbers):
    mean, deviation = numbers.mean(1, dtype=np.float64), numbers.std(1, dtype=np.float64)
    return mean - 3 * deviation, mean + 3 * deviation


_OF_DATA = {"minmax": _minmax, "percentile": _percentile, "zscore": _zscore}  # numbers [C, k] -> low [C], high [C]


class Normalise:
    """What --normalise says.

    :param text: full, minmax, percentile, zscore or window:LOW,HIGH.
    :raises InputError: for anything else.
    """

    def __init__(self, text: str = "full"):
        self.text, self.window = text, None
        if text.startswith("window:"):
            numbers = re.fullmatch(r"([^,]+),([^,]+)", text.removeprefix("window:"))
            try:
                self.window = float(numbers[1]), float(numbers[2])
            except (TypeError, ValueError):
                self.window = np.nan, np.nan
            if not -np.inf < self.window[0] < self.window[1] < np.inf:
                raise InputError(f"--normalise {text}: needs two numbers, the lower one first, as in window:-1000,400")
        elif text != "full" and text not in _OF_DATA:
            raise InputError(f"--normalise {text}: is none of full, {', '.join(_OF_DATA)} and window:LOW,HIGH")

    def __str__(self) -> str:
        return self.text

    def limits(self, pixels: np.ndarray, full: tuple[float, float] | None = None) -> Limits:
        """The limits of an image or volume, pixels [C, ...], of each channel by itself.

        :param full: what --normalise full takes; without it, integers of 8 and 16 bits without a sign and floats in
            [0, 1] stay as they are.
        :raises ValueError: for pixels that are no numbers, or have no full range.
        """
        if pixels.dtype.kind not in "uif" or pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise ValueError(f"{pixels.dtype}, not all of them finite numbers; save it without others, as"
                             f" numpy.nan_to_num makes it")
        count = len(pixels)
        if full == (0, 255) and pixels.dtype == np.uint8 or full == (0, 65535) and pixels.dtype == np.uint16:
            full = None
        if self.window or (self.text == "full" and full):
            return tuple(np.full(count, value, np.float64) for value in self.window or full)
        if self.text != "full":
            return _OF_DATA[self.text](pixels.reshape(count, -1))
        if pixels.dtype not in (np.uint8, np.uint16) and not (
                pixels.dtype.kind == "f" and pixels.min() >= 0 and pixels.max() <= 1):
            raise ValueError(f"{pixels.dtype} from {pixels.min():g} to {pixels.max():g}, not uint8, uint16 or floats in"
                             f" [0, 1]; give --normalise minmax, percentile, zscore or window:LOW,HIGH")
        return None

    def apply(self, pixels: np.ndarray, limits: Limits) -> np.ndarray:
        """Pixels [C, H, W] -> uint8 or uint16, white at the largest number of the type. What is all alike is black."""
        if limits is None:
            return to_16_bits(pixels)
        low, high = (limit.astype(np.float32)[:, None, None] for limit in limits)
        return to_16_bits(((pixels.astype(np.float32) - low) / np.where(high > low, high - low, np.inf)).clip(0, 1))


def parse_foreground(text: str) -> tuple[int, ...]:
    """"1,2,4" -> (1, 2, 4), the values of a label map that are foreground; () for an empty text.

    :raises InputError: for anything else.
    """
    if not re.fullmatch(r"(-?\d+(,-?\d+)*)?", text):
        raise InputError(f"--foreground {text}: is not a list of whole numbers separated by commas, as in 1,2,4")
    return tuple(map(int, filter(None, text.split(","))))
