"""Masks: how they are packed, scaled for the diffusion process, cut back and filtered. Nothing else knows any of it.

A mask is 1 on the foreground and 0 elsewhere. Here it takes five forms:

    masks      [..., H, W] bool
    packed     [R, ceil(H * W / 8)] uint8, a bit a pixel, rows of a mask one after another
    pixels     [..., H, W] uint8, 0 or 255, as in a picture file
    diffusion  [N, CHANNELS, H, W] float, background RANGE[0] and foreground RANGE[1]: x_0 of the diffusion process
    samples    [n, H, W] float, background 0 and foreground 1, as drawn, before they are cut at THRESHOLD
"""

import math

import numpy as np
import torch
from PIL import Image, ImageFilter
from scipy import ndimage

RANGE = 0.0, 1.0  # what background and foreground are in the diffusion process, as published
DTYPE = bool  # of masks in memory
CHANNELS = 1  # of the diffusion process: one tells background from foreground
THRESHOLD = 0.5  # samples above it are foreground


# ---- packed ----

def pack(masks: np.ndarray) -> np.ndarray:
    """Masks [R, H, W] bool -> packed, [R, ceil(H * W / 8)] uint8."""
    return np.packbits(masks.reshape(len(masks), math.prod(masks.shape[1:])), axis=1)


def packed_size(height: int, width: int) -> int:
    """Bytes of one packed mask."""
    return -(-height * width // 8)


def unpack(packed: np.ndarray, height: int, width: int) -> np.ndarray:
    """Packed [R, ceil(H * W / 8)] uint8 -> masks [R, H, W] bool."""
    bits = np.unpackbits(packed, axis=1, count=height * width)
    return bits.astype(DTYPE).reshape(len(packed), height, width)


# ---- the diffusion variable ----

def to_diffusion(masks: torch.Tensor) -> torch.Tensor:
    """Masks [N, 1, H, W] as floats, 0 and 1 -> x_0 of the diffusion process, [N, CHANNELS, H, W]."""
    low, high = RANGE
    return masks * (high - low) + low


def from_diffusion(x: torch.Tensor) -> torch.Tensor:
    """x_0 of the diffusion process, [N, CHANNELS, H, W] -> samples [N, 1, H, W], background 0 and foreground 1."""
    low, high = RANGE
    return (x - low) / (high - low)


def to_masks(samples: np.ndarray, median_blur: int = 0) -> np.ndarray:
    """Samples [n, H, W] float -> masks [n, H, W] bool, each median-filtered with this odd side if it is above 1."""
    masks = samples > THRESHOLD
    if median_blur > 1:
        smooth = ImageFilter.MedianFilter(median_blur)
        masks = np.stack([from_pixels(np.asarray(Image.fromarray(to_pixels(mask)).filter(smooth))) for mask in masks])
    return masks


def without_crumbs(samples: np.ndarray, share: float) -> np.ndarray:
    """Samples [n, H, W] float, each without the parts of its mask that are smaller than this share of its largest part.
    Parts are connected through edges or corners of pixels."""
    masks = to_masks(samples)
    connected = np.zeros((3, 3, 3), bool)
    connected[1] = True  # within a mask
    parts, _ = ndimage.label(masks, connected)
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    area = sizes[parts]  # of the part that a pixel belongs to
    return np.where(masks & (area < share * area.max((1, 2), keepdims=True)), 0, samples).astype(samples.dtype)


# ---- pictures and labels ----

def of_label(pixels: np.ndarray) -> np.ndarray:
    """Pixels of a label, [C, H, W] -> mask [H, W], what is above half of full scale in any channel."""
    return from_pixels(pixels).any(axis=0)


def to_pixels(masks: np.ndarray) -> np.ndarray:
    """Masks [..., H, W] bool -> uint8, 0 or 255."""
    return masks.astype(np.uint8) * 255


def from_pixels(pixels: np.ndarray) -> np.ndarray:
    """Pixels [..., H, W], unsigned integers, or floats in [0, 1] -> bool: foreground is above half of full scale."""
    half = THRESHOLD if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max // 2
    return pixels > half
