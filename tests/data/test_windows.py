"""Training sees larger scans through windows whose places follow from the place in the stream."""

import numpy as np
import pytest
from helpers.files import save
from helpers.pictures import SIZE, as_label

from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.stream import ShuffledCases
from guided_diffusion.data.windows import window

ROWS, COLUMNS = np.mgrid[:40, :29]
SCAN = (29 * ROWS + COLUMNS)[None].astype(np.uint16)  # every pixel is a number of its own


def corner(image):
    return divmod(int(image[0, 0, 0]), 29)


@pytest.mark.parametrize("kind", ["uniform", "lesion"])
def test_windows_of_scan_and_masks_are_alike_and_lie_anywhere_where_nobody_marks(kind):
    for seed, raters in ((0, np.zeros((2, 40, 29), bool)), (1, np.zeros((0, 40, 29), bool))):
        corners = []
        for place in range(400):
            image, masks = window(SCAN, raters, 16, kind, seed, place)
            top, left = corner(image)
            assert np.array_equal(image, SCAN[:, top:top + 16, left:left + 16])
            assert masks.shape == (len(raters), 16, 16)
            corners.append((top, left))
        tops, lefts = map(set, zip(*corners))
        assert tops == set(range(25)) and lefts == set(range(14))
    marks = (SCAN % 3 == 0)
    if kind == "uniform":
        image, masks = window(SCAN, marks, 16, kind, 0, 5)
        assert np.array_equal(masks, image % 3 == 0)


def test_windows_of_lesions_hold_what_some_rater_marks_wherever_it_lies():
    raters = np.zeros((3, 40, 29), bool)
    raters[1, 0, 28] = raters[2, 20:22, 10] = True
    seen = {False: 0, True: 0}
    for place in range(300):
        image, masks = window(SCAN, raters, 16, "lesion", 0, place)
        rows, columns = (slice(start, start + 16) for start in corner(image))
        assert masks.any() and np.array_equal(masks, raters[:, rows, columns])
        seen[bool(masks[1].any())] += 1
    assert seen[True] > 50 and seen[False] > 100  # one of three pixels, and two


def test_a_stream_of_windows_follows_from_seed_and_place_alone(tmp_path):
    rng = np.random.default_rng(0)
    for i, size in enumerate(((40, 29), (16, 16), (9, 50))):
        save(tmp_path / f"case{i}" / "image_0.png", rng.integers(0, 256, size, np.uint8))
        save(tmp_path / f"case{i}" / "label0_.png", as_label(rng.random(size) < 0.1))
    cases = SegmentationCases(tmp_path, SIZE, 1, "tile")
    assert [case.image.shape[1:] for case in cases] == [(40, 30), (16, 16), (16, 50)]
    assert [cases.whole(i).image.shape[1:] for i in range(3)] == [(40, 29), (16, 16), (9, 50)]
    stream = ShuffledCases(cases, 3, ["rot90"], "uniform")
    batch = next(stream.batches(6, start=4))
    assert batch.image.shape == (6, 1, SIZE, SIZE) and batch.masks.shape == (6, 1, SIZE, SIZE)
    for row, place in enumerate(batch.places):
        image, masks = ShuffledCases(cases, 3, ["rot90"], "uniform")[place]
        assert np.array_equal(batch.image[row], image) and np.array_equal(batch.masks[row], masks)
    twice = [stream[place][0] for place in range(30) if stream.case_name(place) == "case0"]
    assert len({image.tobytes() for image in twice}) == len(twice)  # at every visit anew
