"""The training stream: cases in random order, each with one of its raters, as batches on the device."""

import hashlib
import json

import numpy as np
import torch

from ..dist_util import to_device
from .cases import read_ahead, widen


class ShuffledCases:
    """The endless training stream: position p -> image, one rater's mask.

    Position p is place p % n of epoch p // n; every epoch is a fresh permutation of the n cases, and every visit
    draws one of the raters at random. Both follow from (seed, position) alone, so the stream is the same however
    many processes share it, and goes on exactly where it stopped.
    """

    def __init__(self, cases, seed=0):
        self.cases, self.seed = cases, seed
        self._shuffled = None, None  # an epoch and its order

    def __getitem__(self, position):
        """Image [c, S, S] uint8 or uint16 and mask [1, S, S] uint8, 0 or 1, of one place in the stream."""
        image, masks = self.cases.compact(self._number(position))
        rater = np.random.default_rng([self.seed, 1, position]).integers(len(masks))
        pixels = image.shape[1:]
        return image, np.unpackbits(masks[rater], count=pixels[0] * pixels[1]).reshape(1, *pixels)

    def digest(self):
        """A hash of the names of the cases, in order."""
        return hashlib.sha256(json.dumps([files.name for files in self.cases.cases]).encode()).hexdigest()

    def case_name(self, position):
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

    def batches(self, batch_size, rank=0, world_size=1, start=0):
        """Endless batches of this rank: image [N, c, S, S] uint8 or uint16, mask [N, 1, S, S] uint8, and the list of
        their N positions; read ahead of their use. See to_floats.

        `start` is the position of the first global batch; rank r takes the r-th part of each global batch.
        """
        def positions():
            first = start + rank * batch_size
            while True:
                yield range(first, first + batch_size)
                first += world_size * batch_size

        def read(positions):
            images, masks = zip(*(self[position] for position in positions))
            return torch.from_numpy(_stack_images(images)), torch.from_numpy(np.stack(masks)), list(positions)

        return read_ahead(read, positions())


def to_floats(image, mask, channels, device):
    """A batch of ShuffledCases on its device: image [N, channels, S, S] float32 in [0, 1], mask float32."""
    image, mask = (to_device(part, device) for part in (image, mask))
    image = image.float().mul_(1 / (255 if image.dtype == torch.uint8 else 65535))
    return image.expand(-1, channels, -1, -1), mask.float()


def randomness(seed, positions, mask):
    """What else is random in a step, of the examples at these places in the stream; seeds PyTorch's own, for dropout.

    :param mask: [N, 1, S, S], on the device.
    :returns: for each example a uniform number in [0, 1) that picks its timestep, N floats, and its noise, like mask.
    """
    generator = torch.Generator(mask.device)
    uniforms, noise = [], torch.empty_like(mask)
    for row, position in zip(noise, positions):
        generator.manual_seed(_hash(seed, position))
        row.normal_(generator=generator)
        uniforms.append(_hash(seed, position, "t") / 2 ** 63)
    torch.manual_seed(_hash(seed, positions[0], "dropout"))
    return uniforms, noise


def _hash(*parts):
    """A number in 0 .. 2**63 - 1 from anything, the same on every machine."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def _stack_images(images):
    """[c, S, S] arrays -> [N, C, S, S]; where they differ, 8 bits are widened as 16 and a single channel repeated."""
    if len({(image.dtype, len(image)) for image in images}) > 1:
        channels = max(map(len, images))
        images = [np.repeat(image, channels // len(image), axis=0) for image in widen(images)]
    return np.stack(images)
