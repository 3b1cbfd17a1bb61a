"""How pictures, charts and pages look: their colours, and the letters on pictures."""

import functools
import importlib.util
from pathlib import Path

import numpy as np
from PIL import ImageFont

# Okabe and Ito's colours, told apart by colour-blind readers
BLACK, ORANGE, SKY_BLUE, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY, PALE_BLUE = "#777777", "#BBD7EA"  # of what stands behind
CURVES = [BLUE, ORANGE, GREEN, PURPLE, VERMILLION, SKY_BLUE, BLACK, YELLOW]  # of the lines of a chart, in turn


def rgb(colour: str) -> tuple[int, int, int]:
    """"#E69F00" -> (230, 159, 0)."""
    return tuple(bytes.fromhex(colour.removeprefix("#")))


OUTLINES = [rgb(colour) for colour in (ORANGE, GREEN, YELLOW, PURPLE, VERMILLION)]  # of raters, in turn
ENSEMBLE = rgb(SKY_BLUE)
# the sequential map, from dark blue to yellow
MAP = np.array([[68, 1, 84], [65, 68, 135], [42, 120, 142], [34, 168, 132], [122, 209, 81], [253, 231, 37]], float)
_RAMP = np.stack([np.interp(np.arange(256), np.linspace(0, 255, len(MAP)), channel) for channel in MAP.T], 1
                 ).round().astype(np.uint8)

TEXT, TITLE = 12, 16  # sizes of letters in pixels


def coloured(values: np.ndarray) -> np.ndarray:
    """[H, W] in [0, 1] -> [H, W, 3] uint8, by the sequential map."""
    return _RAMP[np.round(np.clip(values, 0, 1) * 255).astype(np.uint8)]


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """DejaVu Sans, which matplotlib brings along; without it Pillow's own, which has ASCII only."""
    matplotlib = importlib.util.find_spec("matplotlib")
    if matplotlib:
        try:
            return ImageFont.truetype(Path(matplotlib.origin).parent / "mpl-data/fonts/ttf/DejaVuSans.ttf", size)
        except OSError:
            pass
    return ImageFont.load_default(size)


@functools.cache
def drawable(letter: str) -> str:
    """The letter, or its code where the font has none, so that names stay apart."""
    shown, missing = (font(TEXT).getmask(character) for character in (letter, "\uffff"))
    has = shown.size != missing.size or bytes(shown) != bytes(missing)
    return letter if has else letter.encode("unicode_escape").decode()
