"""Masks: cut from samples, and filtered."""

import numpy as np
from PIL import Image, ImageFilter

THRESHOLD = 0.5  # the middle of the mask scaling


def to_masks(samples, median_blur=0):
    """Samples [n, H, W] float -> masks [n, H, W] bool, each median-filtered with this odd side if it is above 1."""
    masks = samples > THRESHOLD
    if median_blur > 1:
        smooth = ImageFilter.MedianFilter(median_blur)
        masks = np.stack([np.asarray(_grey(mask).filter(smooth)) > 127 for mask in masks])
    return masks


def _grey(values):
    """[H, W] in [0, 1] or bool -> an 8-bit picture."""
    return Image.fromarray(np.round(np.clip(values, 0, 1) * 255.0).astype(np.uint8))
