"""Samples are cut to masks above the middle, and smoothed on request."""


import numpy as np
import pytest

from guided_diffusion.data.masks import to_masks


def brute_median(mask, side):
    padded = np.pad(mask.astype(int), side // 2, mode="edge")
    height, width = mask.shape
    return np.array([[np.median(padded[y:y + side, x:x + side]) for x in range(width)] for y in range(height)]) > 0.5


def test_masks_are_above_the_middle():
    samples = np.array([[[0.0, 0.5, np.nextafter(np.float32(0.5), np.float32(1)), 1.0]]], np.float32)
    assert to_masks(samples).tolist() == [[[False, False, True, True]]]


@pytest.mark.parametrize("side", [3, 5, 7])
def test_median_blur_is_the_median_of_each_neighbourhood(side):
    samples = np.random.default_rng(side).random((3, 13, 17)).astype(np.float32)
    samples[2, :, :9] = 1
    masks = to_masks(samples, side)
    assert masks.dtype == bool
    for mask, sample in zip(masks, samples):
        assert np.array_equal(mask, brute_median(sample > 0.5, side))


@pytest.mark.parametrize("side", [0, 1])
def test_no_median_blur_changes_nothing(side):
    samples = np.random.default_rng(0).random((2, 9, 9)).astype(np.float32)
    assert np.array_equal(to_masks(samples, side), samples > 0.5)
