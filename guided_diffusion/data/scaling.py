"""Pixels of scans: scaled to [0, 1], widened from 8 to 16 bits, a single channel repeated."""

from collections.abc import Sequence

import numpy as np
import torch


def full_scale(dtype: np.dtype | torch.dtype) -> int:
    """The number that white is in pixels of this type: 255, 65535, or 1 for floats."""
    floating = dtype.is_floating_point if isinstance(dtype, torch.dtype) else dtype.kind == "f"
    return 1 if floating else (torch if isinstance(dtype, torch.dtype) else np).iinfo(dtype).max


def to_unit(image: np.ndarray) -> np.ndarray:
    """Pixels uint8, uint16 or float32 -> float32 in [0, 1]; floats stay as they are."""
    return image if image.dtype == np.float32 else image * np.float32(1 / full_scale(image.dtype))


def to_unit_tensor(image: torch.Tensor) -> torch.Tensor:
    """to_unit for tensors, to the same bits."""
    return image if image.dtype == torch.float32 else image.float().mul_(1 / full_scale(image.dtype))


def repeat_channel(image: np.ndarray, channels: int) -> np.ndarray:
    """[1 or channels, H, W] -> [channels, H, W], always a new array."""
    return np.repeat(image, channels // len(image), axis=0)


def repeat_channel_of_tensor(images: torch.Tensor, channels: int) -> torch.Tensor:
    """[N, 1 or channels, H, W] -> [N, channels, H, W], a view."""
    return images.expand(-1, channels, -1, -1)


def widen(parts: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
    """Where arrays of 8 and 16 bits meet, those of 8 as 16, 255 becoming 65535."""
    if len({part.dtype for part in parts}) == 1:
        return parts
    return [part * np.uint16(257) if part.dtype == np.uint8 else part for part in parts]


def to_16_bits(image: np.ndarray) -> np.ndarray:
    """Floats in [0, 1] -> uint16, 1 becoming 65535; pixels of 8 or 16 bits stay as they are."""
    return (image * 65535).round().astype(np.uint16) if image.dtype.kind == "f" else image
