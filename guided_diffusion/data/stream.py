"""The training stream: cases in random order, each with the masks of all its raters, as batches on the device."""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..dist_util import to_device
from . import masks, scaling
from .augment import augmented
from .cases import SegmentationCases, digest_of, read_ahead
from .noise import draw_rater
from .windows import window


class Batch(NamedTuple):
    """N examples of the stream."""

    image: torch.Tensor  # [N, c, S, S] uint8 or uint16, or float32 in [0, 1]; see to_floats
    masks: torch.Tensor  # [N, R, S, S] uint8, 0 or 1; R raters at most, zeros in the place of those who are not there
    present: torch.Tensor  # [N, R] bool, on the CPU: which raters are there; the first ones of each row
    places: list[int]  # [N] in the stream
    seed: int  # of the stream; all that is random about an example follows from it and its place

    def rows(self, part: slice) -> "Batch":
        """The examples of a slice."""
        return self._replace(image=self.image[part], masks=self.masks[part], present=self.present[part],
                             places=self.places[part])


class ShuffledCases:
    """The endless training stream: position p -> image, all raters' masks.

    Position p is place p % n of epoch p // n; every epoch is a fresh permutation of the n cases, which follows from
    (seed, epoch) alone. So the stream is the same however many processes share it, and goes on exactly where it
    stopped.

    :param augment: names of augment.AUGMENTATIONS; how an example is changed follows from (seed, position) alone.
    :param window: a name of windows.WINDOWS, for scans that are larger than image_size; None for none.
    """

    def __init__(self, cases: SegmentationCases, seed: int = 0, augment: Sequence[str] = (),
                 window: str | None = None):
        self.cases, self.seed, self.augment, self.window = cases, seed, augment, window
        self._shuffled = None, None  # an epoch and its order

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Image [c, S, S], uint8 or uint16, or float32 in [0, 1], and masks [R, S, S] bool of one place in the
        stream."""
        image, packed = self.cases.compact(self._number(position))
        raters = masks.unpack(packed, *image.shape[1:])
        if self.window:
            image, raters = window(image, raters, self.cases.image_size, self.window, self.seed, position)
        return augmented(image, raters, self.augment, self.seed, position) if self.augment else (image, raters)

    def digest(self) -> str:
        """A hash of the names of the cases, in order."""
        return digest_of(files.name for files in self.cases.cases)

    def case_name(self, position: int) -> str:
        """The name of the case at one place in the stream."""
        return self.cases.cases[self._number(position)].name

    def _number(self, position):
        """The number of the case at one place in the stream."""
        epoch, place = divmod(position, len(self.cases))
        known, order = self._shuffled
        if epoch != known:
            order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.cases))
            self._shuffled = epoch, order
        return int(order[place])

    def batches(self, batch_size: int, start: int = 0, stride: int = 0) -> Iterator[Batch]:
        """Endless batches, read ahead of their use. See to_floats.

        :param start: the position of the first example.
        :param stride: positions from one batch to the next, what other ranks take included (0: batch_size).
        """
        def positions():
            for first in itertools.count(start, stride or batch_size):
                yield range(first, first + batch_size)

        def read(positions):
            images, raters = zip(*(self[position] for position in positions))
            return Batch(torch.from_numpy(_stack_images(images)), *map(torch.from_numpy, _stack_raters(raters)),
                         list(positions), self.seed)

        return read_ahead(read, positions())


def to_floats(batch: Batch, channels: int, device: torch.device) -> Batch:
    """A batch of ShuffledCases on its device: image [N, channels, S, S] float32 in [0, 1], masks float32, 0 or 1.

    `present` stays on the CPU: who is there decides what is drawn, without waiting for the device.
    """
    image = scaling.to_unit_tensor(to_device(batch.image, device))
    return batch._replace(image=scaling.repeat_channel_of_tensor(image, channels),
                          masks=to_device(batch.masks, device).float())


def chosen_masks(batch: Batch) -> torch.Tensor:
    """The mask of one rater for each example, drawn afresh at every visit: [N, 1, S, S], dtype and device of masks."""
    raters = [draw_rater(batch.seed, place, there)
              for place, there in zip(batch.places, batch.present.sum(1).tolist())]
    return torch.stack([raters_masks[rater:rater + 1] for raters_masks, rater in zip(batch.masks, raters)])


def _stack_images(images: Sequence[np.ndarray]) -> np.ndarray:
    """[c, S, S] arrays -> [N, C, S, S]; where they differ, 8 bits are widened as 16 and a single channel repeated."""
    if len({(image.dtype, len(image)) for image in images}) > 1:
        channels = max(map(len, images))
        images = [scaling.repeat_channel(image, channels) for image in scaling.widen(images)]
    return np.stack(images)


def _stack_raters(raters: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """[R, S, S] bool arrays of different R -> masks [N, largest R, S, S] uint8 and present [N, largest R] bool."""
    counts = np.array([len(case) for case in raters])
    stacked = np.zeros((len(raters), counts.max(), *raters[0].shape[1:]), np.uint8)
    for row, case in zip(stacked, raters):
        row[:len(case)] = case
    return stacked, np.arange(counts.max()) < counts[:, None]
