"""Outlines of LIDC-IDRI: every mask equals a flood fill that goes pixel by pixel."""

import numpy as np
import pytest
from helpers.lidc import box, flooded

from guided_diffusion.prepare.lidc_masks import lesion
from guided_diffusion.prepare.lidc_xml import Outline
from guided_diffusion.system.errors import InputError

SIZE = 14, 18


def filled(*outlines, size=SIZE):
    mask = np.zeros(size, bool)
    mask.flat[lesion([Outline("1", inclusion, tuple(points)) for points, inclusion in outlines], *size)] = True
    return mask



def test_the_points_lie_just_outside_the_lesion():
    mask = filled((box(3, 2, 6, 4), True))
    assert mask.sum() == 12 and mask[2:5, 3:7].all()


def test_an_exclusion_takes_its_inside_and_its_points():
    mask = filled((box(2, 2, 10, 10), True), (box(5, 5, 6, 7), False))
    expected = np.zeros(SIZE, bool)
    expected[2:11, 2:11] = True
    expected[4:9, 4:8] = False
    assert np.array_equal(mask, expected)


def test_inclusions_are_united_less_the_points_of_both():
    mask = filled((box(2, 2, 6, 6), True), (box(5, 4, 9, 8), True))
    assert mask[3, 3] and mask[7, 8] and mask[5, 5] and not mask[3, 5] and not mask[5, 7]


def test_open_outlines_and_those_with_gaps_are_closed_by_straight_lines():
    corners = [(1, 1), (9, 1), (9, 7), (1, 7)]
    assert np.array_equal(filled((corners, True)), filled((box(2, 2, 8, 6), True)))


def test_all_that_an_outline_encloses_is_inside_where_it_crosses_itself():
    """A smaller turn within a larger one, where the even-odd rule sees a hole."""
    turns = [(1, 1), (11, 1), (11, 11), (1, 11), (1, 1), (4, 4), (8, 4), (8, 8), (4, 8), (4, 4)]
    mask = filled((turns, True))
    assert mask[5:8, 5:8].all() and mask[2, 9]


@pytest.mark.parametrize("points", [[(3, 3)], [(3, 3), (4, 3)], [(3, 3), (4, 4), (3, 3)],
                                    [(3, 3), (4, 2), (5, 3), (6, 4), (3, 3)]])
def test_what_encloses_nothing_has_no_area(points):
    assert not filled((points, True))[[2, 3, 4]][:, [3, 5, 6]].any()


def test_a_single_point_takes_nothing_away():
    assert filled((box(2, 2, 6, 6), True), ([(4, 4)], True), ([(3, 3)], False)).sum() == 25


def test_a_lesion_may_touch_the_edge_but_no_outline_lies_off_the_slice():
    height, width = SIZE
    mask = filled((box(0, 0, 2, 1), True), (box(width - 2, height - 3, width - 1, height - 1), True))
    assert mask[:2, :3].all() and mask[-3:, -2:].all() and mask.sum() == 12
    for off in (box(-1, 3, 4, 5), box(3, -1, 4, 5), box(width - 2, 3, width, 5), box(3, 3, 4, height)):
        with pytest.raises(InputError, match="leaves its slice of 18 x 14 pixels"):
            filled((off, True))


@pytest.mark.parametrize("seed", range(12))
def test_masks_of_any_outlines_equal_a_flood_fill(seed):
    """Crossing ones, open ones, with gaps, cut by the edge, of few points, inclusions and exclusions."""
    rng = np.random.default_rng(seed)
    outlines = [([(int(x), int(y)) for x, y in rng.integers(-1, (SIZE[1] + 1, SIZE[0] + 1), (rng.integers(1, 9), 2))],
                 bool(rng.random() < 0.7)) for _ in range(3)]
    assert np.array_equal(filled(*outlines), flooded(SIZE, *outlines))
