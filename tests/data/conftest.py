"""Pictures and cases that the tests of this folder share."""

import numpy as np
import pytest
from helpers.files import save
from helpers.pictures import SIZE, as_label

from guided_diffusion.data import cases as data_cases
from guided_diffusion.data.cases import SegmentationCases


@pytest.fixture
def disc():
    y, x = np.mgrid[:SIZE, :SIZE]
    return np.hypot(y - 8, x - 7) < 5


@pytest.fixture
def grey():
    """A scan that uses the whole 8-bit range."""
    return np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)


@pytest.fixture
def mixed(tmp_path):
    """A folder of random cases: 8 and 16 bits, 1 and 4 channels, 1 to 5 raters."""
    rng = np.random.default_rng(5)
    for i in range(11):
        case = tmp_path / "mixed" / f"case{i:02}"
        dtype = (np.uint8, np.uint16)[i % 2]
        for channel in range((1, 4)[i // 2 % 2]):
            pixels = rng.integers(0, np.iinfo(dtype).max, (SIZE, SIZE), dtype, endpoint=True)
            save(case / f"image_{channel}.png", pixels, compress_level=0)
        for rater in range(1 + i % 5):
            save(case / f"label{rater}_.png", as_label(rng.random((SIZE, SIZE)) < 0.5), compress_level=0)
    return tmp_path / "mixed"


@pytest.fixture
def open_large(monkeypatch):
    """SegmentationCases that keeps nothing in memory."""

    def open_cases(*args, **kwargs):
        with monkeypatch.context() as context:
            context.setattr(data_cases, "MEMORY_BYTES", 0)
            return SegmentationCases(*args, **kwargs)

    return open_cases
