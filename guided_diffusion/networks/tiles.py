"""Scans larger than the squares that a network sees, by overlapping tiles whose outputs are blended.

In a diffusion the blend is of the predicted noise or x_0 at every step (Bar-Tal et al. 2023, arXiv 2302.08113,
section 4); else of the logits of a mask. Noise and latents are drawn once for the whole scan.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from .base import Encoded


def starts(length: int, side: int) -> list[int]:
    """Where tiles of this side begin along an axis: at even numbers (so must `length - side` be), about half a side or
    less apart, to both ends."""
    count = -(-2 * (length - side) // side) + 1
    return [2 * round(i * (length - side) / max(count - 1, 1) / 2) for i in range(count)]


def tiles(height: int, width: int, side: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the tiles of a scan, which is at least as large as one."""
    return [(slice(top, top + side), slice(left, left + side))
            for top in starts(height, side) for left in starts(width, side)]


def weights(side: int, like: Tensor) -> Tensor:
    """How much each pixel of a tile counts, [side, side] float32: sin^2 along both axes, so next to nothing at its
    border."""
    axis = torch.sin(torch.pi * (torch.arange(side, device=like.device) + 0.5) / side) ** 2
    return axis[:, None] * axis


def blend(parts: Iterable[Tensor], height: int, width: int, side: int) -> Tensor:
    """What there is of each tile of a scan, in order, [N, c, side, side] -> [N, c, height, width] float32."""
    places, total = tiles(height, width, side), None
    for place, part in zip(places, parts, strict=True):
        if total is None:
            count = weights(side, part)
            whole, total = (part.new_zeros(*lead, height, width, dtype=torch.float32) for lead in (part.shape[:2], ()))
        whole[..., *place] += count * part
        total[place] += count
    return whole / total


def cut(x: Tensor, side: int) -> Iterator[Tensor]:
    """[N, c, H, W] -> its tiles, [N, c, side, side] each."""
    for place in tiles(*x.shape[2:], side):
        yield x[..., *place].contiguous()


class Tiled(nn.Module):
    """A network called on larger squares or rectangles than it was trained on.

    Called as the network is: x [N, c, H, W], timesteps [N], and image [N, C, H, W] or encoded, with H and W of at least
    `side`; returns [N, c', H, W] float32.

    :param network: called on tiles [N, c, side, side], one place of all N after another.
    """

    def __init__(self, network: nn.Module, side: int):
        super().__init__()
        self.network, self.side = network, side
        if hasattr(network, "encode"):
            self.encode = self._encode

    def _encode(self, image: Tensor) -> Encoded:
        return [self.network.encode(part) for part in cut(image, self.side)]

    def forward(self, x: Tensor, timesteps: Tensor, image: Tensor | None = None, encoded: Encoded = None) -> Tensor:
        name, scans = ("image", cut(image, self.side)) if encoded is None else ("encoded", encoded)
        drawn = (self.network(part, timesteps, **{name: scan}) for part, scan in zip(cut(x, self.side), scans))
        return blend(drawn, *x.shape[2:], self.side)
