"""Pixels of any depth become floats in [0, 1], alike in numpy and PyTorch."""

import numpy as np
import pytest
import torch

from guided_diffusion.data import scaling


@pytest.mark.parametrize("dtype, full", [(np.uint8, 255), (np.uint16, 65535)])
def test_arrays_and_tensors_are_scaled_to_the_same_bits(dtype, full):
    pixels = np.arange(full + 1).astype(dtype)
    floats = scaling.to_unit(pixels)
    assert floats.dtype == np.float32 and floats[0] == 0 and floats[-1] == 1
    np.testing.assert_allclose(floats, pixels / full, rtol=2e-7)
    assert torch.equal(scaling.to_unit_tensor(torch.from_numpy(pixels)), torch.from_numpy(floats))
    assert np.array_equal(scaling.to_16_bits(floats), pixels * np.uint16(65535 // full))


def test_scaling_leaves_floats_and_what_they_were_made_of_alone():
    floats = torch.tensor([0.25, 1.0])
    assert torch.equal(scaling.to_unit_tensor(floats), torch.tensor([0.25, 1.0]))
    assert np.array_equal(scaling.to_unit(floats.numpy()), floats)
    image = np.ones((1, 2, 2), np.float32)
    for channels in (1, 3):
        repeated = scaling.repeat_channel(image, channels)
        repeated[:] = 0
        assert repeated.shape == (channels, 2, 2) and image.all()
