"""The training stream follows from seed and position alone, whoever reads it, and is read ahead in order."""

import itertools
import os
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from guided_diffusion.data.cases import read_ahead
from guided_diffusion.data.stream import ShuffledCases
from guided_diffusion.system.errors import InputError


class Numbered:
    """A stand-in for SegmentationCases: case i is filled with i, its rater r with r in the bits of four pixels."""

    def __init__(self, count, raters):
        self.count, self.raters = count, raters

    def __len__(self):
        return self.count

    def compact(self, i):
        masks = [[rater >> bit & 1 for bit in range(4)] for rater in range(self.raters)]
        return np.full((1, 1, 4), i, np.uint8), np.packbits(np.array(masks, np.uint8), axis=1)


def numbers(image, mask):
    """(case, rater) of an item of a Numbered stream."""
    return int(image.flatten()[0]), sum(int(bit) << i for i, bit in enumerate(mask.flatten()[:4]))


def test_every_epoch_shows_each_case_once_in_a_new_order():
    stream = ShuffledCases(Numbered(20, 2), seed=3)
    seen = [numbers(*stream[p][:2])[0] for p in range(100)]
    epochs = [seen[i:i + 20] for i in range(0, 100, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5 and list(range(20)) not in epochs


def test_stream_follows_from_seed_and_position_alone():
    stream, other = ShuffledCases(Numbered(7, 4), seed=1), ShuffledCases(Numbered(7, 4), seed=2)
    forward = [numbers(*stream[p][:2]) for p in range(60)]
    backward = [numbers(*ShuffledCases(Numbered(7, 4), seed=1)[p][:2]) for p in reversed(range(60))]
    assert backward[::-1] == forward
    assert [numbers(*other[p][:2]) for p in range(60)] != forward


def test_raters_are_drawn_uniformly_and_afresh_at_every_visit():
    raters, visits = 4, 20_000
    stream = ShuffledCases(Numbered(5, raters), seed=0)
    counts = np.zeros((5, raters))
    for position in range(visits):
        counts[numbers(*stream[position][:2])] += 1
    expected = visits / 5 / raters
    sigma = np.sqrt(expected * (1 - 1 / raters))
    assert np.abs(counts - expected).max() < 5 * sigma
    # neither the next visit to a case nor the next case of an epoch repeats a rater more often than chance would
    drawn = np.array([numbers(*stream[p][:2]) for p in range(2000)])
    pairs = [np.diff(drawn[drawn[:, 0] == case, 1]) for case in range(5)] + [np.diff(drawn[:, 1])]
    for repeats in pairs:
        assert abs((repeats == 0).mean() - 1 / raters) < 5 * np.sqrt(raters - 1) / raters / np.sqrt(len(repeats))


@pytest.mark.parametrize("world_size, batch_size", [(1, 12), (2, 6), (3, 4), (4, 3), (12, 1)])
@pytest.mark.parametrize("start", [0, 36, 5])
def test_global_batches_are_the_same_for_any_number_of_ranks(world_size, batch_size, start):
    stream = ShuffledCases(Numbered(10, 3), seed=4)
    whole = [numbers(*stream[p][:2]) for p in range(start, start + 36)]
    ranks = [stream.batches(batch_size, rank, world_size, start) for rank in range(world_size)]
    got, positions = [], []
    for _ in range(3):
        for batches in ranks:
            image, mask, position = next(batches)
            assert image.shape == (batch_size, 1, 1, 4) and mask.shape == (batch_size, 1, 1, 4)
            assert image.dtype == mask.dtype == torch.uint8
            got += [numbers(*item) for item in zip(image, mask)]
            positions += position
    assert positions == list(range(start, start + 36)) and got == whole


def test_threads_read_the_stream_as_one_reader_does():
    n, positions = 3, range(904)
    expected = [numbers(*ShuffledCases(Numbered(n, 4), seed=5)[p]) for p in positions]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):
            stream = ShuffledCases(Numbered(n, 4), seed=5)
            with ThreadPoolExecutor(8) as pool:
                parts = list(pool.map(lambda part, stream=stream: [numbers(*stream[p]) for p in part],
                                      [positions[k::8] for k in range(8)]))
            assert [parts[p % 8][p // 8] for p in positions] == expected
    finally:
        sys.setswitchinterval(interval)


# ---- reading ahead ----

def test_reading_ahead_keeps_the_order():
    rng = random.Random(0)
    delays = [rng.choice([0, 0.001, 0.005]) for _ in range(100)]

    def read(i):
        time.sleep(delays[i])
        return i * i

    assert list(read_ahead(read, range(100))) == [i * i for i in range(100)]
    assert list(read_ahead(read, [])) == []


def test_reading_ahead_stays_a_few_ahead():
    read = []
    results = read_ahead(lambda i: read.append(i) or i, itertools.count())
    for taken in range(1, 200):
        assert next(results) == taken - 1
        assert len(read) - taken <= 2 * min(8, os.cpu_count())
    deadline = time.monotonic() + 30
    while len(read) == taken and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(read) > taken  # though nobody has asked for it yet


def test_an_error_while_reading_ahead_reaches_the_reader_in_its_place():
    before = set(threading.enumerate())

    def read(i):
        if i == 40:
            raise InputError("40 is bad")
        return i

    results = read_ahead(read, itertools.count())
    assert list(itertools.islice(results, 40)) == list(range(40))
    with pytest.raises(InputError, match="40 is bad"):
        next(results)
    assert list(results) == [] and set(threading.enumerate()) <= before


def test_an_error_of_what_is_to_be_read_reaches_the_reader():
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(str, (1 // (50 - i) for i in range(100))))


def test_closing_ends_the_threads_that_read_ahead():
    before, read = set(threading.enumerate()), []
    results = read_ahead(lambda i: time.sleep(0.002) or read.append(i), itertools.count())
    next(results)
    assert set(threading.enumerate()) - before
    results.close()
    assert set(threading.enumerate()) <= before
    count = len(read)
    time.sleep(0.02)
    assert len(read) == count
