"""Masks are packed, scaled and cut, and smoothed on request."""

import numpy as np
import pytest
import torch

from guided_diffusion.data.masks import (
    from_diffusion,
    from_pixels,
    pack,
    packed_size,
    to_diffusion,
    to_masks,
    to_pixels,
    unpack,
)


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


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 5, 7), (0, 5, 7)])
def test_packed_masks_take_a_bit_a_pixel_and_come_back(shape):
    masks = np.random.default_rng(0).random(shape) < 0.5
    packed = pack(masks)
    assert packed.dtype == np.uint8 and packed.shape == (shape[0], packed_size(*shape[1:]))
    assert packed_size(4, 4) == 2 and packed_size(5, 7) == 5
    assert unpack(packed, *shape[1:]).dtype == bool and np.array_equal(unpack(packed, *shape[1:]), masks)


@pytest.mark.parametrize("ends", [(0.0, 1.0), (-1.0, 1.0), (-0.1, 0.1)])
def test_samples_are_cut_at_the_middle_whatever_the_range_of_the_diffusion_variable(monkeypatch, ends):
    monkeypatch.setattr("guided_diffusion.data.masks.RANGE", ends)
    masks = torch.tensor([0.0, 1.0])
    assert to_diffusion(masks).tolist() == pytest.approx(ends)
    assert from_diffusion(to_diffusion(masks)).tolist() == pytest.approx([0, 1])
    middle = torch.tensor([sum(ends) / 2])
    assert to_masks(from_diffusion(middle + 1e-3).numpy()) and not to_masks(from_diffusion(middle - 1e-3).numpy())


def test_pixels_of_masks_come_back():
    masks = np.random.default_rng(0).random((2, 3, 3)) < 0.5
    assert np.unique(to_pixels(masks)).tolist() == [0, 255] and np.array_equal(from_pixels(to_pixels(masks)), masks)
