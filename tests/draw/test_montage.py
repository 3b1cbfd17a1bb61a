"""Pictures of cases show the scan, every rater and the ensemble, each in a labelled cell, and nothing is cut off."""

import importlib.util
import io
import itertools

import numpy as np
import pytest
from PIL import Image, ImageDraw

from guided_diffusion import metrics
from guided_diffusion.data.cases import Case
from guided_diffusion.draw import montage, style
from guided_diffusion.draw.montage import (
    IN_PANEL,
    LARGE,
    MARGIN,
    SMALL,
    case_montage,
    film,
    panel,
    png,
    stack,
)
from guided_diffusion.draw.style import ENSEMBLE, OUTLINES

FRAME = (170, 170, 170)  # every cell has a frame of this colour
YELLOW, VIOLET = (253, 231, 37), (68, 1, 84)


def make_case(size, raters, members, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.random((4, size, size), dtype=np.float32) / 2  # never as bright as an outline
    return image, rng.random((raters, size, size)) < 0.5, rng.random((members, size, size)) < 0.5


def squares(size, *boxes):
    """Masks [len(boxes), size, size], each with the square of (top, left, side)."""
    masks = np.zeros((len(boxes), size, size), bool)
    for mask, (top, left, side) in zip(masks, boxes):
        mask[top:top + side, left:left + side] = True
    return masks


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
            label = pixels[top - 15:top, left:right]
            row.append((pixels[top + 1:bottom - 1, left + 1:right - 1], bool((label.max(-1) < 100).any())))
            assert (pixels[top - 15:top, right + 1:right + MARGIN - 2] == 255).all()  # no label runs into the next one
        rows.append(row)
    return rows


def cells_of(page):
    return [[cell for cell, _ in row] for row in rows_of(page)]


def has(cell, colour):
    """Where a cell is of this colour, [H, W] bool."""
    return (cell == np.array(colour)).all(-1)


@pytest.fixture
def texts(monkeypatch):
    """All that is written into pictures, in order."""
    written, draw = [], ImageDraw.ImageDraw.text

    def record(self, place, text, *args, **options):
        written.append(text)
        draw(self, place, text, *args, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return written


# ---- what a montage holds ----

@pytest.mark.parametrize("size, members", [(16, 1), (64, 5), (128, 16), (256, 30), (512, 2)])
@pytest.mark.parametrize("raters", [0, 1, 4, 9])
def test_every_part_has_a_labelled_cell_and_the_page_holds_them_all(size, members, raters):
    page = case_montage("patient 1", *make_case(size, raters, members))
    first, *others = rows_of(page)
    assert len(first) == (6 if raters else 4)
    expected = [min(8, count - start) for count in (raters, min(members, 24)) for start in range(0, count, 8)]
    assert [len(row) for row in others] == expected
    assert all(labelled for row in [first, *others] for _, labelled in row)
    assert {cell.shape for cell, _ in first} == {(LARGE, LARGE, 3)}
    assert {cell.shape for row in others for cell, _ in row} == {(SMALL, SMALL, 3)}
    pixels = np.asarray(page)
    assert (pixels[-3:] == 255).all() and (pixels[:, -3:] == 255).all() and (pixels[:, :3] == 255).all()
    assert page.width <= 1230  # fits into a window of the live view


def test_heading_has_name_areas_and_scores(texts):
    image, masks, _ = make_case(16, 3, 1)
    ensemble = squares(16, *[(2, 2, side) for side in (1, 2, 3, 4, 5)])
    case_montage("patient 1", image, masks, ensemble)
    score = metrics.scores(ensemble, masks)
    assert texts[0] == "patient 1"
    assert texts[1] == ("3 raters, 5 masks; median area 9 px, 90 % within 2 to 23; "
                        f"GED {score['GED']:.3f}, D_max {score['D_max']:.3f}, CI {score['CI']:.3f}")
    assert "mask 4: 25 px" in texts and f"rater 2: {masks[2].sum()} px" in texts
    texts.clear()
    case_montage("patient 1", image, masks[:0], ensemble[:1] & False)
    assert texts[1] == "0 raters, 1 mask" and "mask 0: empty" in texts


def test_members_beyond_the_shown_are_counted(texts):
    image, masks, ensemble = make_case(16, 1, 30)
    assert len(sum(rows_of(case_montage("x", image, masks, ensemble)), [])) == 6 + 1 + 24
    assert texts[1].startswith("1 rater, 30 masks;") and texts[1].endswith("; the first 24 are shown")
    assert len(sum(rows_of(case_montage("x", image, masks, ensemble[:10], max_members=8)), [])) == 6 + 1 + 8
    texts.clear()
    case_montage("x", image, masks, ensemble[:24])
    assert "shown" not in texts[1]


def test_probability_and_spread_show_their_values_with_a_bar_each(texts):
    ensemble = np.zeros((4, 32, 32), bool)
    ensemble[:, 8:16, 4:28] = True  # sure foreground
    ensemble[:2, 16:24, 4:28] = True  # half of the members
    page = case_montage("x", np.zeros((1, 32, 32)), ensemble[:0], ensemble)
    (*_, probability, spread), *_ = cells_of(page)
    pixel = LARGE / 32
    at = {where: round(pixel * row) for where, row in (("sure", 12), ("half", 20), ("none", 4))}
    assert tuple(probability[at["sure"], 100]) == YELLOW and tuple(probability[at["none"], 100]) == VIOLET
    assert abs(probability[at["half"], 100].astype(int) - YELLOW).min() > 10 and probability[at["half"], 100, 1] > 120
    assert tuple(spread[at["half"], 100]) == YELLOW  # a standard deviation of 0.5
    assert tuple(spread[at["sure"], 100]) == tuple(spread[at["none"], 100]) == VIOLET
    pixels = np.asarray(page)
    framed = (pixels == FRAME).all(-1)
    bottom = runs(framed[:, MARGIN - 1])[0][1]
    columns = runs(framed[bottom - 1])
    bars = [pixels[bottom + 6, left + 1:right - 1] for left, right in columns]
    assert [tuple(bar[0]) == VIOLET and tuple(bar[-1]) == YELLOW for bar in bars] == [False, False, True, True]
    assert [text for text in texts if text.replace(".", "").isdigit()] == ["0", "0.5", "1", "0", "0.25", "0.5"]


def test_ensembles_outline_is_of_half_and_a_tint_shows_what_is_unsure():
    ensemble = np.concatenate([squares(32, *[(8, 8, 8)] * 6), squares(32, *[(8, 8, 16)] * 4)])
    first, *_ = cells_of(case_montage("x", np.zeros((1, 32, 32)), ensemble[:0], ensemble))
    tile, pixel = first[1], LARGE / 32
    line = has(tile, ENSEMBLE)
    assert runs(line.any(0)) == runs(line.any(1)) == [(round(8 * pixel) - 1, round(16 * pixel) + 1)]
    assert not tile[round(12 * pixel), round(12 * pixel)].any()  # all mark it
    assert tile[round(20 * pixel), round(20 * pixel)].any() and not tile[round(28 * pixel), round(28 * pixel)].any()


# ---- outlines ----

def test_outline_is_a_line_along_the_border_of_each_mask():
    masks = squares(48, (6, 8, 9), (30, 16, 14))
    _, raters, members = cells_of(case_montage("x", np.zeros((1, 48, 48)), masks, masks))
    for cells, colours in ((raters, OUTLINES), (members, [ENSEMBLE] * 2)):
        for cell, colour, (top, left, side) in zip(cells, colours, ((18, 24, 27), (90, 48, 42))):
            y, x = np.indices(cell.shape[:2])
            inwards = np.minimum.reduce([y - top, x - left, top + side - 1 - y, left + side - 1 - x])
            corner = (y + 0.5 - top - side / 2) ** 2 + (x + 0.5 - left - side / 2) ** 2 > 2 * (side / 2) ** 2 + side
            assert np.array_equal(has(cell, colour), np.isin(inwards, (-1, 0)) & ~corner)


def test_raters_who_agree_are_all_seen_in_one_picture():
    masks = squares(32, *[(8, 8, 16)] * 4)
    raters = cells_of(case_montage("x", np.zeros((1, 32, 32)), masks, masks))[0][1]
    side = np.s_[round(8 * LARGE / 32), 60:130]  # along the upper border
    assert {tuple(colour) for colour in raters[side]} == set(OUTLINES[:4])
    assert {tuple(colour) for colour in raters.transpose(1, 0, 2)[side]} == set(OUTLINES[:4])


def test_more_raters_than_colours_differ_by_dashes_where_they_meet_others():
    count = len(OUTLINES)
    masks = squares(128, *[(7 * i + 8, 7 * i + 4, 40) for i in range(2 * count)])
    first, *rest = cells_of(case_montage("x", np.zeros((1, 128, 128)), masks, masks[:1]))
    raters = rest[0] + rest[1]
    drawn = []
    for i, cell in enumerate(raters):  # a picture of one rater's needs no dashes
        outline = has(cell, OUTLINES[i % count])
        assert runs(outline[outline.any(1).argmax() + 1]) and len(runs(outline[outline.any(1).argmax() + 1])) == 1
        drawn.append(first[1][round(LARGE / SMALL * (outline.any(1).argmax() + 1))])
    whole, dashed = ([len(runs(has(line[None], OUTLINES[i % count])[0])) for i, line in group]
                     for group in (list(enumerate(drawn))[:count], list(enumerate(drawn))[count:]))
    assert max(whole) < min(dashed)


@pytest.mark.parametrize("size", [64, 512])
def test_a_single_pixel_is_seen_whatever_the_size_of_the_scan(size):
    masks = squares(size, (0, 0, 1), (size - 1, size - 2, 1))  # the detail is the whole scan
    first, raters, members = cells_of(case_montage("x", np.zeros((1, size, size)), masks, masks[::-1]))
    for cells, colours in ((raters, OUTLINES), (members, [ENSEMBLE] * 2)):
        assert all(has(cell, colour).sum() >= 3 for cell, colour in zip(cells, colours))
    assert has(first[1], OUTLINES[0]).any() and has(first[1], OUTLINES[1]).any()
    assert all((~has(first[i], VIOLET)).sum() >= 2 for i in (2, 4, 5))


# ---- the detail ----

def test_the_detail_holds_all_masks_and_a_frame_shows_where_it_is():
    masks, ensemble = squares(128, (70, 50, 10)), squares(128, (80, 60, 20))
    image = np.zeros((2, 128, 128))
    image[0, 70:100, 50:80] = 0.5  # around all of them
    image[1] = 1  # of another channel
    first, _, (member,) = cells_of(case_montage("x", image, masks, ensemble))
    scan, raters = first[:2]
    window = np.argwhere(has(scan, (255, 255, 255)))
    top, left, bottom, right = [*window.min(0), *window.max(0) + 1]
    for low, high, start, end in ((top, bottom, 70, 100), (left, right, 50, 80)):
        assert low / LARGE * 128 < start - 5 and end + 5 < high / LARGE * 128 and (high - low) / LARGE * 128 < 50
    scale = LARGE / (bottom - top)
    bright = np.argwhere(first[1].max(-1) > 64)
    expected = [(70 * LARGE / 128 - top) * scale, (50 * LARGE / 128 - left) * scale]
    assert np.abs(bright.min(0) - expected).max() < 8 and bright.max() < LARGE - 20
    assert has(member, ENSEMBLE).any() and has(raters, OUTLINES[0]).any()


@pytest.mark.parametrize("shape", [(16, 16), (40, 90), (128, 128), (512, 512)])
def test_windows_hold_what_is_marked_within_the_scan(shape):
    rng = np.random.default_rng(0)
    for _ in range(100):
        marked = np.zeros(shape, bool)
        corner, end = np.sort(rng.integers(0, shape, (2, 2)), axis=0)
        marked[corner[0], corner[1]] = marked[end[0], end[1]] = True
        rows, columns = montage._window(marked)
        assert marked[rows, columns].sum() == marked.sum()
        for part, length in zip((rows, columns), shape):
            assert 0 <= part.start < part.stop <= length
            assert part.stop - part.start >= min(length, montage.FEWEST)
    assert montage._window(np.zeros(shape, bool)) == (slice(0, shape[0]), slice(0, shape[1]))


def test_scans_that_are_no_squares_keep_their_shape():
    image = np.zeros((1, 40, 80))
    first, *_ = cells_of(case_montage("x", image, np.ones((1, 40, 80), bool), np.ones((2, 40, 80), bool)))
    assert {cell.shape for cell in first} == {(LARGE // 2, LARGE, 3)}


# ---- text ----

@pytest.mark.parametrize("name", ["patient_" * 25, "W" * 200])
def test_long_names_are_wrapped_and_whole(texts, name):
    page = case_montage(name, *make_case(16, 0, 1))
    short = case_montage("x", *make_case(16, 0, 1))
    assert page.width == short.width and page.height > short.height
    assert "".join(texts).startswith(f"{name}0 raters, 1 mask")
    assert (np.asarray(page)[:, -4:] == 255).all() and rows_of(page)


def test_names_in_any_script_stay_apart(texts):
    pages = [case_montage(f"Fall 7 (größer) {word}", *make_case(16, 0, 1)) for word in ("病例", "患者")]
    assert texts[0] == "Fall 7 (größer) \\u75c5\\u4f8b"  # the font has no such letters
    assert np.asarray(pages[0]).tobytes() != np.asarray(pages[1]).tobytes()


def test_pictures_need_no_matplotlib(texts, monkeypatch):
    caches = style.font, style.drawable
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert rows_of(case_montage("größer", *make_case(16, 2, 3))) and texts[0] == "gr\\xf6\\xdfer"
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize("size", [64, 512])
def test_labels_of_the_largest_areas_fit_above_their_tiles(size):
    masks = np.ones((12, size, size), bool)
    rows_of(case_montage("x", np.zeros((1, size, size)), masks, masks))  # which looks at the space between labels
    rows_of(panel([Case("x", np.zeros((1, size, size)), masks[:4])], [masks[:4]]))


# ---- several cases ----

def make_panel(*counts, size=32):
    """A panel of cases with (raters, members) each."""
    cases = [make_case(size, raters, members, seed) for seed, (raters, members) in enumerate(counts)]
    return panel([Case(f"case{i}", image, masks) for i, (image, masks, _) in enumerate(cases)],
                 [ensemble for *_, ensemble in cases], "step 100")


def test_a_panel_has_a_row_a_case_with_scan_raters_members_mean_and_spread(texts):
    page = make_panel(*[(4, 4)] * 4)
    rows = rows_of(page)
    assert [len(row) for row in rows] == [11] * 4 and all(labelled for row in rows for _, labelled in row)
    assert {cell.shape for row in rows for cell, _ in row} == {(IN_PANEL, IN_PANEL, 3)}
    assert 1200 < page.width < 1300 and page.height < 720
    assert texts[0] == "step 100" and [text for text in texts if text.startswith("case")][3].startswith(
        "case3: 4 raters, 4 masks; ")
    for *_, (probability, _), (spread, _) in rows:
        assert has(probability, YELLOW).any() and has(spread, YELLOW).any() and has(spread, VIOLET).any()
    assert [text for text in texts if text.replace(".", "").isdigit()] == ["0", "0.5", "1", "0", "0.25", "0.5"]


def test_a_panel_shows_each_rater_and_member_in_its_colour():
    for row in cells_of(make_panel((3, 2), (3, 2))):
        for cell, colour in zip(row[1:6], [*OUTLINES[:3], ENSEMBLE, ENSEMBLE]):
            assert has(cell, colour).any()
            assert not any(has(cell, other).any() for other in {*OUTLINES, ENSEMBLE} - {colour})


def test_columns_of_a_panel_line_up_where_cases_differ():
    pixels = np.asarray(make_panel((1, 2), (3, 4), (0, 1)))
    framed = (pixels == FRAME).all(-1)
    tops = [top for top, _ in runs(framed[:, MARGIN - 1])]
    columns = [{left for left, _ in runs(framed[top])} for top in tops]
    assert [len(row) for row in columns] == [1 + 1 + 2 + 2, 1 + 3 + 4 + 2, 1 + 0 + 1 + 2]
    assert columns[0] <= columns[1] and columns[2] <= columns[1]


def test_many_raters_share_a_tile_of_a_panel():
    rows = rows_of(make_panel((5, 2), (2, 2), (0, 2)))
    assert [len(row) for row in rows] == [1 + 1 + 2 + 2] * 3
    assert all(has(rows[0][1][0], colour).any() for colour in OUTLINES)
    assert not any(has(rows[2][1][0], colour).any() for colour in OUTLINES)


# ---- the rest ----

def test_a_film_shows_every_step_from_noise_to_mask(texts):
    rng = np.random.default_rng(0)
    mask = squares(16, (4, 4, 8))[0].astype(np.float32)
    frames = [(step, noise * rng.standard_normal((16, 16)) + mask, mask) for step, noise in ((1, 1.0), (9, 0.0))]
    noisy, clean = cells_of(film("case1, member 0", frames))
    assert texts[0] == "case1, member 0" and "x_t at step 9" in texts and "x_0 at step 1" in texts
    assert clean[0].min() == 0 and clean[0].max() == 255 and np.array_equal(*clean)
    middle = SMALL // 2
    assert abs(int(noisy[1][middle, middle, 0]) - 191) < 3 and abs(int(noisy[1][2, 2, 0]) - 128) < 3
    assert noisy[0].astype(int).std() > noisy[1].astype(int).std() + 20


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


def test_no_two_colours_are_close():
    for one, other in itertools.combinations([*OUTLINES, ENSEMBLE], 2):
        assert np.abs(np.subtract(one, other)).sum() > 60
