"""Noise that follows from what it is for: a member of an ensemble."""

import hashlib

import numpy as np
import torch

from .. import dist_util


class MemberNoise:
    """Gaussian noise for a batch of ensemble members, each row from a generator of its own.

    A member's noise follows from (seed, case name, number of the member) alone, so neither the batch size nor the
    other rows nor the device change it.

    :param members: one (case name, number) a row.
    """

    def __init__(self, seed, members):
        digests = [hashlib.sha256(repr((seed, *member)).encode()).digest() for member in members]
        self.generators = [np.random.default_rng(int.from_bytes(digest, "big")) for digest in digests]

    def __call__(self, like):
        """Fresh noise with the shape, dtype and device of `like`, [N, ...]."""
        rows = [generator.standard_normal(like.shape[1:], dtype=np.float32) for generator in self.generators]
        return dist_util.to_device(torch.from_numpy(np.stack(rows)), like.device).to(like.dtype)
