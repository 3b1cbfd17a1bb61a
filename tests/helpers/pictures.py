"""Small labels and cases as arrays."""

import numpy as np

SIZE = 16


def as_label(mask):
    return mask.astype(np.uint8) * 255


def same(a, b):
    return a.name == b.name and np.array_equal(a.image, b.image) and np.array_equal(a.raters, b.raters)
