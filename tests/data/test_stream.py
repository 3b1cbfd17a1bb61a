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
from guided_diffusion.data.masks import pack
from guided_diffusion.data.noise import draw_rater
from guided_diffusion.data.stream import Batch, ShuffledCases, chosen_masks
from guided_diffusion.system.errors import InputError


class Numbered:
    """A stand-in for SegmentationCases: case i is filled with i, its rater r with r in the bits of four pixels."""

    def __init__(self, count, raters):
        self.count, self.raters = count, raters

    def __len__(self):
        return self.count

    def compact(self, i):
        masks = [[rater >> bit & 1 for bit in range(4)] for rater in range(self.raters)]
        return np.full((1, 1, 4), i, np.uint8), pack(np.array(masks, bool)[:, None])


def number(image):
    """The case of an item of a Numbered stream."""
    return int(image.flatten()[0])


def test_every_epoch_shows_each_case_once_in_a_new_order():
    stream = ShuffledCases(Numbered(20, 2), seed=3)
    seen = [number(stream[p][0]) for p in range(100)]
    epochs = [seen[i:i + 20] for i in range(0, 100, 20)]
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 5 and list(range(20)) not in epochs


def test_stream_follows_from_seed_and_position_alone():
    stream, other = ShuffledCases(Numbered(7, 4), seed=1), ShuffledCases(Numbered(7, 4), seed=2)
    forward = [number(stream[p][0]) for p in range(60)]
    backward = [number(ShuffledCases(Numbered(7, 4), seed=1)[p][0]) for p in reversed(range(60))]
    assert backward[::-1] == forward
    assert [number(other[p][0]) for p in range(60)] != forward


def test_an_item_has_the_masks_of_all_raters_in_their_order():
    _, masks = ShuffledCases(Numbered(3, 16))[1]
    assert masks.dtype == bool and masks.shape == (16, 1, 4)
    assert [sum(int(bit) << i for i, bit in enumerate(mask.flat)) for mask in masks] == list(range(16))


@pytest.mark.parametrize("world_size, batch_size", [(1, 12), (2, 6), (3, 4), (4, 3), (12, 1)])
@pytest.mark.parametrize("start", [0, 36, 5])
def test_global_batches_are_the_same_for_any_number_of_ranks(world_size, batch_size, start):
    stream = ShuffledCases(Numbered(10, 3), seed=4)
    whole = [number(stream[p][0]) for p in range(start, start + 36)]
    ranks = [stream.batches(batch_size, first, world_size * batch_size)
             for first in range(start, start + world_size * batch_size, batch_size)]
    got, places = [], []
    for _ in range(3):
        for batches in ranks:
            batch = next(batches)
            assert batch.image.shape == (batch_size, 1, 1, 4) and batch.masks.shape == (batch_size, 3, 1, 4)
            assert batch.image.dtype == batch.masks.dtype == torch.uint8 and batch.seed == 4
            got += map(number, batch.image)
            places += batch.places
    assert places == list(range(start, start + 36)) and got == whole


def batch_of(raters, places, seed=0):
    """A Batch of 4 x 4 masks, of which the one of rater r is filled with r."""
    most = max(raters)
    masks = torch.arange(most).repeat(len(raters), 1)[..., None, None].expand(-1, -1, 4, 4)
    return Batch(torch.zeros(len(raters), 1, 4, 4), masks.float(), torch.arange(most) < torch.tensor(raters)[:, None],
                 places, seed)


def test_the_mask_of_an_example_follows_from_seed_and_place_whatever_its_batch():
    raters = [2, 5, 1, 3]
    whole = chosen_masks(batch_of(raters, [9, 4, 7, 2], seed=3))
    assert whole.shape == (4, 1, 4, 4) and whole.dtype == torch.float32
    assert whole[:, 0, 0, 0].tolist() == [draw_rater(3, place, n) for place, n in zip([9, 4, 7, 2], raters)]
    assert torch.equal(chosen_masks(batch_of(raters, [9, 4, 7, 2], seed=3).rows(slice(1, 3))), whole[1:3])
    rows = batch_of(raters, [9, 4, 7, 2]).rows(slice(1, 3))
    assert rows.places == [4, 7] and rows.present.sum(1).tolist() == [5, 1] and len(rows.image) == 2


def test_threads_read_the_stream_as_one_reader_does():
    n, positions = 3, range(904)
    expected = [number(ShuffledCases(Numbered(n, 4), seed=5)[p][0]) for p in positions]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):
            stream = ShuffledCases(Numbered(n, 4), seed=5)
            with ThreadPoolExecutor(8) as pool:
                parts = list(pool.map(lambda part, stream=stream: [number(stream[p][0]) for p in part],
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
