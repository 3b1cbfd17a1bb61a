"""Marks of several readers become the nodules that they were placed as."""

import numpy as np
import pytest
from helpers.lidc import box

from guided_diffusion.prepare.lidc_marks import merges
from guided_diffusion.prepare.lidc_nodules import Mark, nodules

SIDE = 64


def mark(reader, left, top, right, bottom, slices=(5,), name="n"):
    """A box on some slices, 1 mm pixels and 2 mm slices."""
    outline = [(z * 2.0, y, x) for z in slices for x, y in box(left, top, right, bottom)]
    body = [(z * SIDE + y) * SIDE + x for z in slices for y in range(top, bottom + 1) for x in range(left, right + 1)]
    return Mark(reader, name, np.array(outline, float), np.sort(body), {})


def point(reader, x, y, z=5):
    return Mark(reader, "p", np.array([[z * 2.0, y, x]]), np.array([(z * SIDE + y) * SIDE + x]), {z: []})


def found(*marks, tolerance=2.0):
    return sorted(tuple(group.marks) for group in nodules(marks, tolerance))


def test_marks_that_lie_close_are_one_nodule_and_others_are_not():
    assert found(mark(0, 5, 5, 9, 9), mark(1, 6, 5, 10, 9), mark(0, 30, 30, 33, 33), mark(2, 31, 30, 35, 34)) == [
        (0, 1), (2, 3)]


def test_the_tolerance_is_of_outlines_in_mm_and_included():
    a, b = mark(0, 5, 5, 9, 9), mark(1, 14, 5, 18, 9)  # their outlines end at 10 and begin at 13
    assert found(a, b, tolerance=3.0) == [(0, 1)] and found(a, b, tolerance=2.99) == [(0,), (1,)]
    above = mark(1, 5, 5, 9, 9, slices=(7,))  # 4 mm
    assert found(a, above, tolerance=4.0) == [(0, 1)] and found(a, above, tolerance=3.9) == [(0,), (1,)]


def test_nodules_that_touch_are_told_apart_by_readers_who_marked_both():
    """Their outlines share pixels."""
    left, right = (10, 10, 15, 15), (16, 10, 21, 15)
    assert found(mark(0, *left), mark(0, *right), mark(1, *left), mark(1, *right), mark(2, *right)) == [
        (0, 2), (1, 3, 4)]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2)])
def test_nodules_that_touch_are_told_apart_even_if_outlines_of_the_same_do_not_meet(order):
    marks = [mark(0, 10, 10, 20, 20), mark(0, 21, 10, 31, 20), mark(1, 12, 12, 18, 18), mark(1, 23, 12, 29, 18)]
    groups = found(*(marks[i] for i in order), tolerance=2.5)
    assert sorted(tuple(sorted(order[i] for i in group)) for group in groups) == [(0, 2), (1, 3)]


def test_pieces_of_one_reader_are_joined_where_another_drew_the_whole():
    marks = mark(0, 10, 10, 14, 20), mark(0, 17, 10, 21, 20), mark(1, 10, 10, 21, 20), mark(2, 9, 10, 21, 19)
    group, = nodules(marks, 2.0)
    assert group.marks == [0, 1, 2, 3] and len(group.links) == 3 and not group.apart


def test_pieces_on_neighbouring_slices_are_joined_and_alone_they_are_not():
    lower, upper = mark(0, 10, 10, 14, 14, slices=(4, 5)), mark(0, 10, 10, 14, 14, slices=(6, 7))
    assert found(lower, upper) == [(0,), (1,)]
    assert found(lower, upper, mark(1, 10, 10, 14, 14, slices=(4, 5, 6, 7))) == [(0, 1, 2)]


def test_eight_readers_of_one_nodule_stay_together():
    assert found(*(mark(reader, 10, 10, 14 + reader, 15) for reader in range(8))) == [tuple(range(8))]


def test_an_outline_far_within_another_is_of_the_same_nodule():
    assert found(mark(0, 5, 5, 40, 40), mark(1, 20, 20, 25, 25)) == [(0, 1)]


def test_a_point_belongs_to_the_nodule_that_it_lies_in():
    assert found(mark(0, 10, 10, 20, 20), point(1, 15, 15), point(2, 40, 40), point(3, 41, 40)) == [(0, 1), (2, 3)]


def test_an_outline_that_encloses_nothing_belongs_to_the_nodule_that_it_lies_at():
    nothing = Mark(1, "e", np.array([[10.0, 9, 9], [10.0, 9, 10]]), np.array([], int), {5: []})
    assert found(mark(0, 10, 10, 20, 20), nothing) == [(0, 1)]


def test_every_merge_is_said_and_what_was_kept_apart():
    marks = [mark(0, 10, 10, 15, 15, name="A"), mark(0, 16, 10, 21, 15, name="B"), mark(1, 10, 10, 15, 15, name="C")]
    first, second = nodules(marks, 2.0)
    assert merges(first, marks) == ["0:A + 1:C (0 mm apart, IoU 1.00)", "0:B not 1:C (0 mm apart, IoU 0.00)"]
    assert merges(second, marks) == ["0:B not 1:C (0 mm apart, IoU 0.00)"]
    assert merges(nodules(marks[:1], 2.0)[0], marks) == ["0:A"]
