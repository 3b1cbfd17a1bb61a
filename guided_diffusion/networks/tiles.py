"""A network that sees squares of one size, made to see larger scans by overlapping tiles whose outputs are blended.

The blend is of what the network returns: the predicted noise or x_0 at every step of a diffusion (Bar-Tal et al. 2023,
arXiv 2302.08113, section 4), or the features of a scan. So whatever is drawn from it, a member has one noise over the
whole scan and one latent, and no border between tiles.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .base import Encoded


def starts(length: int, side: int) -> list[int]:
    """Where tiles of this side begin along an axis: evenly, neighbours at most half a side apart, to both ends."""
    count = -(-2 * (length - side) // side) + 1
    return [round(i * (length - side) / max(count - 1, 1)) for i in range(count)]


def tiles(height: int, width: int, side: int) -> list[tuple[slice, slice]]:
    """Rows and columns of the tiles of a scan, which is at least as large as one."""
    return [(slice(top, top + side), slice(left, left + side))
            for top in starts(height, side) for left in starts(width, side)]


def weights(side: int, like: Tensor) -> Tensor:
    """How much each pixel of a tile counts, [side, side] float32: sin^2 along both axes, so next to nothing at its
    border."""
    axis = torch.sin(torch.pi * (torch.arange(side, device=like.device) + 0.5) / side) ** 2
    return axis[:, None] * axis


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
        return [self.network.encode(part) for part in self._parts(image)]

    def _parts(self, x: Tensor) -> Iterator[Tensor]:
        for place in tiles(*x.shape[2:], self.side):
            yield x[..., *place].contiguous()

    def forward(self, x: Tensor, timesteps: Tensor, image: Tensor | None = None, encoded: Encoded = None) -> Tensor:
        scans = [{"image": part} for part in self._parts(image)] if encoded is None else [
            {"encoded": part} for part in encoded]
        count, total, out = weights(self.side, x), x.new_zeros(x.shape[2:], dtype=torch.float32), None
        for place, part, scan in zip(tiles(*x.shape[2:], self.side), self._parts(x), scans):
            drawn = self.network(part, timesteps, **scan).float()
            if out is None:
                out = drawn.new_zeros(*drawn.shape[:2], *x.shape[2:])
            out[..., *place] += count * drawn
            total[place] += count
        return out / total


def tiled(module: nn.Module, side: int, name: str = "") -> nn.Module:
    """A network by tiles; or with a name, a copy of a module in which this network of its own is by tiles. Weights are
    shared."""
    if not name:
        return Tiled(module, side)
    copied = copy.copy(module)
    copied._modules = {**module._modules, name: Tiled(getattr(module, name), side)}
    return copied
