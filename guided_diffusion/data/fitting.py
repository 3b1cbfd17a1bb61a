"""Scans brought to the size that a network takes, and what is drawn for them put back into their own size and place."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from ..system.errors import InputError
from . import masks

# what becomes of a scan of another size than image_size, and where its masks are put back
FITS = {
    "error": "refuse it",
    "resize": "scale it to the square, whatever its aspect ratio",
    "crop": "see the central square alone; beyond it no mask has anything",
    "pad": "repeat the edge of a smaller scan around it",
    "tile": "draw a larger scan by overlapping tiles that are blended; training takes windows of it, see --window",
}


class Fitting(NamedTuple):
    """The way of one scan to the size that the network takes, and back."""

    size: tuple[int, int]  # (H, W) of the scan in pixels
    side: int  # of the square that the network takes: image_size
    fit: str  # a name of FITS

    @property
    def fitted(self) -> tuple[int, int]:
        """The size that the scan is brought to, (h, w): for tiles at least a square of that side, and as even."""
        if self.fit == "tile":
            return tuple(max(self.side, length + (length - self.side) % 2) for length in self.size)
        return self.side, self.side

    @property
    def changes(self) -> bool:
        """Whether the scan has another size than it is brought to."""
        return self.fitted != self.size

    def check(self, what: str | Path) -> None:
        """Raise InputError, calling the scan `what`, unless there is such a way."""
        height, width = self.size
        known = fits_between(self.size, self.side)
        if self.changes and self.fit not in (*known, "tile"):
            why = f"but --image_size is {self.side}" if self.fit == "error" else (
                f"too {'small' if self.fit == 'crop' else 'large'} for --fit {self.fit} to --image_size {self.side}")
            remedies = " or ".join(f"--fit {name}" for name in known)
            raise InputError(f"{what}: is {width} x {height} pixels, {why}; give {remedies}, or another --image_size")

    def there(self, image: np.ndarray, raters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """image [C, H, W] uint8, uint16 or float32 and raters [R, H, W] bool -> the same, [C, h, w] and [R, h, w].

        What a padded scan gains repeats its edge, and no mask has anything there.
        """
        if not self.changes:
            return image, raters
        if self.fit == "resize":
            fitted = [masks.from_pixels(resize(masks.to_pixels(mask), self.fitted)) for mask in raters]
            return (np.stack([resize(channel, self.fitted) for channel in image]),
                    np.array(fitted, masks.DTYPE).reshape(len(raters), *self.fitted))
        rows, columns = self._places()
        scan = np.s_[:, rows[0]:rows[1], columns[0]:columns[1]]
        around = [(0, 0), *((-min(offset, 0), side - (last - offset)) for side, (_, last, offset) in
                            zip(self.fitted, (rows, columns)))]
        return np.pad(image[scan], around, "edge"), np.pad(raters[scan], around)  # copies: no view of the whole picture

    def back(self, samples: np.ndarray) -> np.ndarray:
        """Samples [n, h, w] float32, before they are cut, or masks [n, h, w] bool -> [n, H, W] of the scan.

        Padding is cut away, and what a crop left out is 0. After "resize", samples are interpolated, and a mask is cut
        anew: its border moves by at most half a pixel of the coarser of the two grids.
        """
        if not self.changes:
            return samples
        if self.fit == "resize" and samples.dtype == masks.DTYPE:
            return masks.to_masks(self.back(samples.astype(np.float32)))
        if self.fit == "resize":
            return np.stack([resize(sample, self.size) for sample in samples])
        (top, bottom, y), (left, right, x) = self._places()
        whole = np.zeros((len(samples), *self.size), samples.dtype)
        whole[:, top:bottom, left:right] = samples[:, top - y:bottom - y, left - x:right - x]
        return whole

    def _places(self):
        """For rows and for columns: the first and last + 1 of the scan that are kept, and the number of the scan's that
        the first of the fitted one is; centred."""
        for own, side in zip(self.size, self.fitted):
            offset = (own - side) // 2 if own > side else -((side - own) // 2)
            yield max(offset, 0), min(offset + side, own), offset


def fits_between(size: tuple[int, int], side: int) -> list[str]:
    """The names of FITS that take a scan of this size, (H, W), to side x side, or to tiles of it."""
    return ["resize", *["crop"] * (min(size) >= side), "pad" if max(size) <= side else "tile"]


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """[H, W] -> [h, w], `size`, bilinear with antialiasing, same dtype."""
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
    picture = Image.fromarray(pixels.astype(np.float32)).resize(size[::-1], Image.Resampling.BILINEAR)
    resized = np.asarray(picture)
    return resized if pixels.dtype.kind == "f" else resized.round().astype(pixels.dtype)
