"""The picture of a case shows the scan, every rater and the ensemble, each in a labelled cell."""

import io

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.montage import case_montage, png, stack

FRAME = (170, 170, 170)  # every cell has a frame of this colour


def make_case(size, raters, members, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.random((4, size, size), dtype=np.float32)
    return image, rng.random((raters, size, size)) < 0.5, rng.random((members, size, size)) < 0.5


def runs(flags):
    """(start, end) of every run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    return list(zip(edges[::2], edges[1::2]))


def rows_of(page):
    """Cells as [H, W, 3] arrays, row by row, and whether each has black letters above it; found by their frames."""
    pixels = np.asarray(page)
    framed = (pixels == FRAME).all(-1)
    rows = []
    for top, bottom in runs(framed[:, framed.any(0).argmax()]):
        row = []
        for left, right in runs(framed[top]):
            label = pixels[top - 20:top, left:right]
            row.append((pixels[top + 1:bottom - 1, left + 1:right - 1], bool((label.max(-1) < 100).any())))
        rows.append(row)
    return rows


def enlarged(mask, side):
    return (np.kron(mask, np.ones((side // len(mask),) * 2)) * 255).astype(np.uint8)[..., None].repeat(3, 2)


@pytest.mark.parametrize("size, members", [(16, 1), (16, 5), (16, 30), (64, 9), (128, 16), (256, 3)])
@pytest.mark.parametrize("raters", [0, 1, 2, 4])
def test_every_part_has_a_labelled_cell_and_the_page_holds_them_all(size, raters, members):
    image, masks, ensemble = make_case(size, raters, members)
    page = case_montage("patient 1", image, masks, ensemble)
    buffer = io.BytesIO()
    page.save(buffer, "PNG", compress_level=1)
    assert Image.open(buffer).size == page.size and page.mode == "RGB"

    first, *others = rows_of(page)
    shown = min(members, 24)
    columns = max(5 if raters else 3, min(8, max(raters, shown)))
    assert len(first) == (5 if raters else 3)
    expected = [min(columns, count - start) for count in (raters, shown) for start in range(0, count, columns)]
    assert [len(row) for row in others] == expected
    assert all(labelled for row in [first, *others] for _, labelled in row)
    side = -(-160 // size) * size
    assert side >= 160
    for cell, _ in sum([first, *others], []):
        assert cell.shape == (side, side, 3)
    below = [cell for row in others for cell, _ in row]
    for cell, mask in zip(below, masks):  # each rater in one colour, that of an outline
        colour = cell.reshape(-1, 3).max(0)
        assert np.array_equal(cell, np.where(enlarged(mask, side) > 0, colour, 0))
        assert (first[1][0] == colour).all(-1).any()
    for cell, mask in zip(below[raters:], ensemble[:shown]):
        assert np.array_equal(cell, enlarged(mask, side))


def test_page_is_as_wide_as_a_long_name():
    short, long = (case_montage(name, *make_case(16, 0, 1)).width for name in ("x", "patient " * 40))
    assert long > short


def test_page_is_white_around_its_cells_and_not_wider_than_needed():
    page = case_montage("x", *make_case(16, 2, 3))
    pixels = np.asarray(page)
    assert (pixels[-5:] == 255).all() and (pixels[:, -3:] == 255).all() and (pixels[:, :5] == 255).all()
    assert page.size == (5 * 170 + 80, 3 * 192 + 42)


def test_scan_probability_and_spread_show_their_values():
    image = np.zeros((4, 16, 16), np.float32)
    image[0, :8] = 1
    image[1] = 0.5  # other channels are not shown
    ensemble = np.zeros((4, 16, 16), bool)
    ensemble[:, 0] = True  # sure foreground
    ensemble[:2, 1] = True  # half of the members
    first, *_ = rows_of(case_montage("x", image, np.zeros((0, 16, 16), bool), ensemble))
    (scan, _), (probability, _), (spread, _) = first
    assert (scan[:80] == 255).all() and (scan[80:] == 0).all()
    yellow, blue = (253, 231, 37), (68, 1, 84)
    assert (probability[:10] == yellow).all() and (probability[20:] == blue).all()
    half = probability[15, 80].astype(int)
    assert abs(half - yellow).min() > 10 and half[1] > 120  # green, between the two
    assert (spread[10:20] == yellow).all() and (spread[:10] == blue).all() and (spread[20:] == blue).all()


def test_outline_follows_the_border_of_each_rater_in_its_own_colour():
    masks = np.zeros((2, 16, 16), bool)
    masks[0, 2:6, 2:6] = True
    masks[1, 9:14, 8:12] = True
    image = np.zeros((1, 16, 16), np.float32)
    outlines = rows_of(case_montage("x", image, masks, masks))[0][1][0]
    coloured = outlines.any(-1)
    expected = np.zeros((160, 160), bool)
    for top, bottom, left, right in ((20, 60, 20, 60), (90, 140, 80, 120)):
        expected[top:bottom, left:right] = True
        expected[top + 1:bottom - 1, left + 1:right - 1] = False
    assert np.array_equal(coloured, expected)
    assert len(np.unique(outlines[coloured], axis=0)) == 2


def test_members_beyond_the_shown_are_counted_in_the_title():
    image, masks, ensemble = make_case(16, 1, 30)
    title = np.asarray(case_montage("x", image, masks, ensemble))[:30]
    plain = np.asarray(case_montage("x", image, masks, ensemble[:24]))[:30]
    assert (title < 100).sum() > (plain < 100).sum()


def test_names_in_any_script_can_be_drawn():
    case_montage("Fall 7 (größer) 病例", *make_case(16, 1, 1))


def test_fewer_members_are_shown_on_request_and_the_title_says_so():
    image, masks, ensemble = make_case(16, 1, 10)
    page, all_of_them = (case_montage("x", image, masks, ensemble, max_members=count) for count in (8, 10))
    *_, members = rows_of(page)
    assert len(members) == 8 and len(sum(rows_of(all_of_them), [])) == 5 + 1 + 10
    for (cell, _), mask in zip(members, ensemble):
        assert np.array_equal(cell, enlarged(mask, 160))
    shown, plain = (np.asarray(picture)[:30] for picture in (page, all_of_them))
    assert (shown < 100).sum() > (plain < 100).sum()


def test_stacked_pages_stand_one_below_the_other_on_white():
    pages = [case_montage("x", *make_case(16, raters, 1, seed=raters)) for raters in (2, 0, 1)]
    whole = stack(pages)
    assert whole.size == (max(page.width for page in pages), sum(page.height for page in pages))
    pixels, y = np.asarray(whole), 0
    for page in pages:
        assert np.array_equal(pixels[y:y + page.height, :page.width], np.asarray(page))
        assert (pixels[y:y + page.height, page.width:] == 255).all()
        y += page.height
    assert pages[1].width < whole.width  # some of it is margin


def test_png_holds_every_pixel():
    page = case_montage("x", *make_case(16, 1, 2))
    with Image.open(io.BytesIO(png(page))) as picture:
        assert picture.format == "PNG" and np.array_equal(np.asarray(picture), np.asarray(page))
