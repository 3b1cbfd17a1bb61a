"""Files on disk become images and raters' masks, and whatever is wrong with them is said at once."""

import hashlib
import itertools
import os
import random
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from helpers.files import save
from helpers.refusals import problems_of
from PIL import Image

from guided_diffusion import dist_util
from guided_diffusion.data import cases as data_cases
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.decoded_file import DecodedFile
from guided_diffusion.data.stream import ShuffledCases, to_floats
from guided_diffusion.system import errors, terminal
from guided_diffusion.system.errors import InputError

SIZE = 16


@pytest.fixture
def disc():
    y, x = np.mgrid[:SIZE, :SIZE]
    return np.hypot(y - 8, x - 7) < 5


@pytest.fixture
def grey():
    """A scan that uses the whole 8-bit range."""
    return np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)


def as_label(mask):
    return mask.astype(np.uint8) * 255


def same(a, b):
    return a.name == b.name and np.array_equal(a.image, b.image) and np.array_equal(a.raters, b.raters)


# ---- the layout ----

def test_published_layout_is_read(tmp_path, grey, disc):
    save(tmp_path / "0001" / "image_1.jpg", grey, quality=95)
    for rater in range(4):
        save(tmp_path / "0001" / f"label{rater}_.jpg", as_label(np.roll(disc, rater, 0)), quality=95)
    case, = SegmentationCases(tmp_path, SIZE)
    assert case.name == "0001"
    assert case.image.shape == (4, SIZE, SIZE) and case.image.dtype == np.float32
    assert np.abs(case.image - grey / 255).max() < 0.05 and (case.image == case.image[:1]).all()
    assert case.raters.dtype == bool and case.raters.shape == (4, SIZE, SIZE)
    for rater, mask in enumerate(case.raters):
        assert np.array_equal(mask, np.roll(disc, rater, 0))


def test_foreground_of_a_jpeg_label_is_what_lies_above_half_of_full_scale(tmp_path, grey, disc):
    save(tmp_path / "a" / "image_1.jpg", grey)
    path = tmp_path / "a" / "label0_.jpg"
    save(path, as_label(disc), quality=85)
    stored = np.asarray(Image.open(path))
    ringing = (stored > 0) & (stored < 128)
    assert ringing.sum() > 10 and stored[ringing].min() <= 20 and stored.max() > 200  # the file does ring
    mask = SegmentationCases(tmp_path, SIZE)[0].raters[0]
    assert np.array_equal(mask, stored > 127) and np.array_equal(mask, disc)


@pytest.mark.parametrize("top, full", [(np.uint8, 255), (np.uint16, 65535)])
def test_threshold_is_exactly_half_of_full_scale(tmp_path, grey, top, full):
    label = np.full((SIZE, SIZE), full // 2, dtype=top)
    label[3, 4] = full // 2 + 1
    save(tmp_path / "a" / "image_1.png", grey)
    save(tmp_path / "a" / "label0_.png", label)
    assert np.argwhere(SegmentationCases(tmp_path, SIZE)[0].raters[0]).tolist() == [[3, 4]]


def test_png_scan_is_read_exactly(tmp_path, grey, disc):
    save(tmp_path / "a" / "image_1.png", grey)
    save(tmp_path / "a" / "label0_.png", as_label(disc))
    case = SegmentationCases(tmp_path, SIZE, image_channels=1)[0]
    np.testing.assert_allclose(case.image[0], grey / 255, atol=1e-7)
    assert case.image.min() == 0 and case.image.max() == 1


def test_sixteen_bit_scan_spans_zero_to_one(tmp_path, disc):
    pixels = np.linspace(0, 65535, SIZE * SIZE).round().astype(np.uint16).reshape(SIZE, SIZE)
    save(tmp_path / "a" / "image_1.png", pixels)
    save(tmp_path / "a" / "label0_.png", as_label(disc))
    image = SegmentationCases(tmp_path, SIZE)[0].image
    np.testing.assert_allclose(image, np.broadcast_to(pixels / 65535, image.shape), atol=1e-7)
    assert image.max() == 1 and len(np.unique(image)) == SIZE * SIZE


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
@pytest.mark.parametrize("value", [0, 255])
def test_pictures_of_every_mode_are_read_alike(tmp_path, disc, mode, value):
    picture = Image.fromarray(as_label(disc)).convert(mode)
    if "A" in mode:  # whatever the transparency
        picture.putalpha(Image.fromarray(np.full((SIZE, SIZE), value, np.uint8)))
    save(tmp_path / "a" / "image_1.png", picture)
    save(tmp_path / "a" / "label0_.png", picture)
    case = SegmentationCases(tmp_path, SIZE)[0]
    assert np.array_equal(case.image, np.repeat(disc[None].astype(np.float32), 4, 0))
    assert np.array_equal(case.raters, disc[None])


def test_label_painted_in_one_colour_counts(tmp_path, grey, disc):
    colours = np.zeros((SIZE, SIZE, 3), np.uint8)
    colours[disc, 0] = 255
    save(tmp_path / "a" / "image_1.png", grey)
    save(tmp_path / "a" / "label0_.png", Image.fromarray(colours).quantize())
    assert np.array_equal(SegmentationCases(tmp_path, SIZE)[0].raters[0], disc)


def test_colour_scan_has_three_channels(tmp_path, disc):
    colours = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    save(tmp_path / "a" / "image_1.png", colours)
    save(tmp_path / "a" / "label0_.png", as_label(disc))
    np.testing.assert_allclose(SegmentationCases(tmp_path, SIZE, 3)[0].image, colours.transpose(2, 0, 1) / 255,
                               atol=1e-7)
    message = problems_of(tmp_path, SIZE, 4)
    assert "image_1.png" in message and "3 channels" in message and "--image_channels is 4" in message


def test_suffix_and_kind_may_be_upper_case(tmp_path, grey, disc):
    save(tmp_path / "a" / "Image_1.JPG", grey, format="JPEG")
    save(tmp_path / "a" / "LABEL0_.PNG", as_label(disc), format="PNG")
    save(tmp_path / "a" / "label1_.jpeg", as_label(~disc), format="JPEG", quality=95)
    masks = SegmentationCases(tmp_path, SIZE)[0].raters
    assert np.array_equal(masks, [disc, ~disc])


def test_label2_comes_before_label10(tmp_path, grey):
    order = [0, 2, 3, 10, 11]
    save(tmp_path / "a" / "image_1.png", grey)
    for number in order:
        mask = np.zeros((SIZE, SIZE), bool)
        mask[number] = True
        save(tmp_path / "a" / f"label{number}_.png", as_label(mask))
    masks = SegmentationCases(tmp_path, SIZE)[0].raters
    assert [int(mask.any(1).argmax()) for mask in masks] == order


def test_several_image_files_are_channels_in_the_order_of_their_names(tmp_path, disc):
    for number in (3, 1, 4, 2):
        save(tmp_path / "a" / f"image_{number}.png", np.full((SIZE, SIZE), number, np.uint8))
    save(tmp_path / "a" / "label0_.png", as_label(disc))
    image = SegmentationCases(tmp_path, SIZE)[0].image
    np.testing.assert_allclose(image[:, 0, 0] * 255, [1, 2, 3, 4], atol=1e-4)


def test_channels_of_8_and_16_bits_may_be_mixed(tmp_path, disc):
    save(tmp_path / "a" / "image_1.png", np.full((SIZE, SIZE), 51, np.uint8))
    save(tmp_path / "a" / "image_2.png", np.full((SIZE, SIZE), 32768, np.uint16))
    save(tmp_path / "a" / "label0_.png", as_label(disc))
    image = SegmentationCases(tmp_path, SIZE, image_channels=2)[0].image
    np.testing.assert_allclose(image[:, 0, 0], [0.2, 32768 / 65535], atol=1e-6)


def test_channels_of_different_sizes_are_refused_by_name(tmp_path, grey, disc):
    save(tmp_path / "a" / "image_1.png", grey)
    save(tmp_path / "a" / "image_2.png", grey[:8])
    save(tmp_path / "a" / "label0_.png", as_label(disc))
    message = problems_of(tmp_path, SIZE, 2)
    assert "image_2.png" in message and "16 x 8" in message and "16 x 16" in message


def test_number_of_channels_of_the_files_must_fit(tmp_path, grey, disc):
    for number in (1, 2):
        save(tmp_path / "a" / f"image_{number}.png", grey)
    save(tmp_path / "a" / "label0_.png", as_label(disc))
    assert SegmentationCases(tmp_path, SIZE, 2)[0].image.shape[0] == 2
    assert "2 channels" in problems_of(tmp_path, SIZE, 4)


@pytest.mark.parametrize("raters", [1, 2, 3, 4, 5])
def test_any_number_of_raters(make_cases, tmp_path, raters):
    cases = SegmentationCases(make_cases(tmp_path, 1, raters), SIZE)
    assert cases[0].raters.shape == (raters, SIZE, SIZE)


def test_cases_may_differ_in_their_number_of_raters(make_cases, tmp_path):
    cases = SegmentationCases(make_cases(tmp_path, 3, raters=[1, 4, 2]), SIZE)
    assert [len(case.raters) for case in cases] == [1, 4, 2]


def test_nested_cases_are_named_by_their_path(make_cases, tmp_path):
    make_cases(tmp_path / "patient 1" / "left", 2)
    make_cases(tmp_path / "patient 2", 1)
    names = [case.name for case in SegmentationCases(tmp_path, SIZE)]
    assert names == ["patient 1_left_case0", "patient 1_left_case1", "patient 2_case0"]


def test_two_folders_that_make_one_name_are_refused(make_cases, tmp_path):
    make_cases(tmp_path / "a", 1)
    make_cases(tmp_path / "b", 1)
    (tmp_path / "b" / "case0").rename(tmp_path / "a_case0")
    (tmp_path / "b").rmdir()
    message = problems_of(tmp_path, SIZE)
    assert "same case" in message and "a_case0" in message and str(tmp_path / "a" / "case0") in message


def test_names_may_hold_spaces_and_any_letters(make_cases, tmp_path):
    make_cases(tmp_path, 2)
    (tmp_path / "case0").rename(tmp_path / "Fall 7 (größer)")
    (tmp_path / "case1").rename(tmp_path / "病例 二")
    assert [case.name for case in SegmentationCases(tmp_path, SIZE)] == ["Fall 7 (größer)", "病例 二"]


def test_hidden_and_other_files_are_ignored(make_cases, tmp_path, grey):
    make_cases(tmp_path, 1, raters=2)
    case = tmp_path / "case0"
    np.savez(case / "truth.npz", x=1)
    (case / "notes.txt").write_text("label9_")
    (case / "._image_0.png").write_bytes(b"not a picture")
    (case / ".label7_.png").write_bytes(b"not a picture")
    save(case / "preview_0.png", grey[:3])
    save(case / "labels.png", grey[:3])
    save(tmp_path / ".thumbnails" / "image_1.png", grey[:3])
    (tmp_path / "README.txt").write_text("about")
    case, = SegmentationCases(tmp_path, SIZE)
    assert case.raters.shape == (2, SIZE, SIZE)


def test_empty_masks_are_fine(tmp_path, grey):
    nothing = np.zeros((SIZE, SIZE), np.uint8)
    save(tmp_path / "a" / "image_1.png", grey)
    save(tmp_path / "a" / "label0_.png", nothing)
    save(tmp_path / "a" / "label1_.jpg", nothing)
    nothing[4, 4] = 12  # ringing that an editor left behind
    save(tmp_path / "a" / "label2_.jpg", nothing, quality=100)
    assert not SegmentationCases(tmp_path, SIZE)[0].raters.any()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_masks_saved_as_0_and_1_are_refused_with_the_remedy(tmp_path, grey, disc, dtype):
    save(tmp_path / "a" / "image_1.png", grey)
    save(tmp_path / "a" / "label0_.png", disc.astype(dtype))
    message = problems_of(tmp_path, SIZE)
    full = np.iinfo(dtype).max
    assert "label0_.png" in message and f"its brightest value is 1 of {full}" in message
    assert f"write masks as 0 and {full}" in message


# ---- other sizes ----

@pytest.mark.parametrize("fit", ["resize", "crop"])
def test_fit_leaves_images_of_the_right_size_alone(make_cases, tmp_path, fit):
    make_cases(tmp_path, 2)
    assert all(map(same, SegmentationCases(tmp_path, SIZE, fit=fit), SegmentationCases(tmp_path, SIZE)))


def test_crop_takes_the_central_square_of_image_and_masks(tmp_path):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 31), dtype=np.uint8)
    label = rng.random((20, 31)) < 0.5
    save(tmp_path / "a" / "image_1.png", image)
    save(tmp_path / "a" / "label0_.png", as_label(label))
    case = SegmentationCases(tmp_path, SIZE, fit="crop")[0]
    np.testing.assert_allclose(case.image[0], image[2:18, 7:23] / 255, atol=1e-7)
    assert np.array_equal(case.raters[0], label[2:18, 7:23])


def test_cropped_images_in_memory_do_not_hold_the_whole_picture(make_cases, tmp_path):
    cases = SegmentationCases(make_cases(tmp_path, size=64), SIZE, fit="crop")
    for image, packed in cases.decoded:
        assert image.base is None and image.nbytes == SIZE ** 2
        assert packed.base is None and packed.nbytes == 2 * SIZE ** 2 // 8


def test_crop_of_a_smaller_image_is_refused(make_cases, tmp_path):
    make_cases(tmp_path, 1, size=12)
    message = problems_of(tmp_path, SIZE, fit="crop")
    assert "12 x 12" in message and "--fit resize" in message


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(32, 32), (8, 8), (48, 20)])
def test_resize_scales_image_and_masks_to_the_square(tmp_path, dtype, shape):
    y, x = np.mgrid[:shape[0], :shape[1]]
    full = np.iinfo(dtype).max
    image = (x / (shape[1] - 1) * full).astype(dtype)
    lower = y >= shape[0] // 2
    save(tmp_path / "a" / "image_1.png", image)
    save(tmp_path / "a" / "label0_.png", as_label(lower))
    case = SegmentationCases(tmp_path, SIZE, image_channels=1, fit="resize")[0]
    assert case.image.shape == (1, SIZE, SIZE)
    assert np.abs(case.image[0] - np.linspace(0, 1, SIZE)).max() < 0.08
    assert np.array_equal(case.raters[0], np.repeat(np.arange(SIZE) >= 8, SIZE).reshape(SIZE, SIZE))


def test_two_files_of_one_rater_are_refused_by_name(make_cases, tmp_path):
    case = make_cases(tmp_path, count=1, raters=2) / "case0"
    (case / "label1_.png").rename(case / "label0_again.png")
    with pytest.raises(InputError, match="label0_again.png: is a second label0"):
        SegmentationCases(tmp_path, 16)


def test_resize_fits_every_channel_and_cases_without_labels(tmp_path):
    save(tmp_path / "a" / "image_1.png", np.full((40, 40, 3), (10, 20, 30), np.uint8))
    case = SegmentationCases(tmp_path, SIZE, 3, fit="resize", need_labels=False)[0]
    np.testing.assert_allclose(case.image[:, 5, 5] * 255, [10, 20, 30], atol=1e-4)
    assert case.raters.shape == (0, SIZE, SIZE)


def test_unknown_fit_is_refused(make_cases, tmp_path):
    assert "--fit stretch" in problems_of(make_cases(tmp_path), SIZE, fit="stretch")


# ---- what is asked of a data set ----

def test_labels_are_optional_only_where_they_are_not_needed(make_cases, tmp_path):
    make_cases(tmp_path, 2, raters=[0, 2])
    cases = SegmentationCases(tmp_path, SIZE, need_labels=False)
    assert [case.raters.shape for case in cases] == [(0, SIZE, SIZE), (2, SIZE, SIZE)]
    message = problems_of(tmp_path, SIZE)
    assert "case0" in message and "no labels" in message and "case1" not in message


def test_limit_takes_the_first_cases_and_looks_at_no_others(make_cases, tmp_path):
    make_cases(tmp_path, 3)
    (tmp_path / "case2" / "image_2.png").write_bytes(b"")
    assert [case.name for case in SegmentationCases(tmp_path, SIZE, limit=2)] == ["case0", "case1"]


def test_data_dir_that_is_missing_empty_or_itself_a_case_is_refused(make_cases, tmp_path):
    assert "no such folder" in problems_of(tmp_path / "nowhere", SIZE)
    (tmp_path / "empty").mkdir()
    assert "holds no case" in problems_of(tmp_path / "empty", SIZE)
    make_cases(tmp_path / "data", 1)
    assert "each case is a folder" in problems_of(tmp_path / "data" / "case0", SIZE)
    (tmp_path / "file").write_text("")
    assert "no such folder" in problems_of(tmp_path / "file", SIZE)


def test_every_problem_is_reported_at_once_file_by_file(make_cases, tmp_path, grey):
    make_cases(tmp_path, 6, suffix=".jpg")
    truncated = tmp_path / "case0" / "image_0.jpg"
    truncated.write_bytes(truncated.read_bytes()[:200])
    save(tmp_path / "case1" / "label1_.jpg", as_label(grey[:8] > 60))
    (tmp_path / "case2" / "image_2.jpg").unlink()
    for label in (tmp_path / "case3").glob("label*"):
        label.unlink()
    save(tmp_path / "case4" / "image_4.jpg", np.zeros((24, 32), np.uint8))
    for label in (tmp_path / "case4").glob("label*"):
        save(label, np.zeros((24, 32), np.uint8))
    first, *lines = problems_of(tmp_path, SIZE).split("\n")
    assert first == f"5 problems in {tmp_path}:"
    expected = [(truncated, "cannot be read"), (tmp_path / "case1" / "label1_.jpg", "16 x 8 pixels"),
                (tmp_path / "case2", "no image"), (tmp_path / "case3", "no labels"),
                (tmp_path / "case4" / "image_4.jpg", "is 32 x 24 pixels, but --image_size is 16")]
    assert len(lines) == len(expected)
    for line, (path, reason) in zip(lines, expected):
        assert line.strip().startswith(f"{path}:") and reason in line
    assert "--fit resize" in lines[4] and "--fit crop" in lines[4]


def test_a_flood_of_problems_is_cut_and_counted(make_cases, tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "MAX_PROBLEMS_SHOWN", 3)
    make_cases(tmp_path, 8, raters=0)
    first, *lines = problems_of(tmp_path, SIZE).split("\n")
    assert first.startswith("8 problems") and len(lines) == 4 and lines[-1].strip() == "... and 5 more"


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_damaged_pictures_are_named_never_a_traceback(make_cases, tmp_path, suffix):
    make_cases(tmp_path, 1, suffix=suffix)
    path = tmp_path / "case0" / f"image_0{suffix}"
    whole, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged[:rng.choice([len(whole), rng.randrange(len(whole))])])
        try:
            SegmentationCases(tmp_path, SIZE)
        except InputError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 50


# ---- data sets too large for the memory ----

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


@pytest.fixture
def decoded_names(monkeypatch):
    """The names of the cases that are decoded, one after another."""
    names, original = [], data_cases.read_case
    monkeypatch.setattr(data_cases, "read_case",
                        lambda files, **args: names.append(files.name) or original(files, **args))
    return names


SAMPLES = 6  # of 11 cases, decoded to learn how large they are


def left_behind(folder):
    return sorted(path.name for path in folder.iterdir()
                  if path.name.startswith(".decoded") and not path.name.endswith(".lock"))


def assert_same_cases(one, other):
    assert len(one) == len(other) and all(map(same, one, other))


def assert_same_batches(one, other, batch_size=4, count=12):
    one, other = (ShuffledCases(cases, seed=7).batches(batch_size, start=4) for cases in (one, other))
    for batch, expected in itertools.islice(zip(one, other), count):
        assert batch.image.dtype == expected.image.dtype and torch.equal(batch.image, expected.image)
        assert torch.equal(batch.masks, expected.masks) and torch.equal(batch.present, expected.present)
        assert (batch.places, batch.seed) == (expected.places, expected.seed)


@pytest.mark.parametrize("side, fit", [(SIZE, "error"), (SIZE - 1, "crop"), (SIZE + 3, "resize")])
def test_large_data_sets_give_the_same_items_and_stream_from_a_file(mixed, open_large, side, fit):
    small = SegmentationCases(mixed, side, fit=fit)
    assert small.kept == "in memory" and left_behind(mixed) == []
    for _ in range(2):  # written, and found again
        large = open_large(mixed, side, fit=fit)
        assert isinstance(large.decoded, DecodedFile) and large.kept == f"decoded in {mixed / f'.decoded_{side}_{fit}'}"
        assert_same_cases(large, small)
        assert_same_batches(large, small)
    assert left_behind(mixed) == [f".decoded_{side}_{fit}"]


def test_data_sets_up_to_the_limit_are_kept_in_memory(make_cases, tmp_path, monkeypatch):
    make_cases(tmp_path, 9, raters=3)
    needed = 9 * (SIZE ** 2 + 3 * SIZE ** 2 // 8)
    for limit, kept in ((needed, "in memory"), (needed - 1, f"decoded in {tmp_path}")):
        monkeypatch.setattr(data_cases, "MEMORY_BYTES", limit)
        assert SegmentationCases(tmp_path, SIZE).kept.startswith(kept)


@pytest.fixture
def bars(monkeypatch):
    """(what it says, cases counted) of every progress that is shown."""
    shown = []

    def record(iterable, desc, total, unit, enabled=True, leave=True):
        count = 0
        for count, item in enumerate(iterable, 1):
            yield item
        if enabled and total:
            shown.append((desc, count, total, unit))

    monkeypatch.setattr(data_cases, "progress", record)
    return shown


def test_checking_and_writing_the_file_show_how_far_they_are(make_cases, tmp_path, open_large, bars):
    make_cases(tmp_path, 9)
    SegmentationCases(tmp_path, SIZE)
    assert bars == []
    SegmentationCases(tmp_path, SIZE, progress=True)
    open_large(tmp_path, SIZE, progress=True)
    open_large(tmp_path, SIZE, progress=True)  # which finds the file
    assert bars == [(f"checking {tmp_path}", 9, 9, "case"),
                    (f"decoding into {tmp_path / f'.decoded_{SIZE}_error'}", 9, 9, "case")]


def test_of_several_processes_the_one_that_writes_shows_it(make_cases, tmp_path, open_large, bars, monkeypatch):
    make_cases(tmp_path, 3)
    monkeypatch.setattr(dist_util, "world_size", lambda: 2)
    open_large(tmp_path, SIZE)  # a rank above 0
    open_large(tmp_path, SIZE, progress=True)
    assert bars == [(f"decoding into {tmp_path / f'.decoded_{SIZE}_error'}", 3, 3, "case")]


def test_long_checking_tells_every_case_in_the_end(make_cases, tmp_path, monkeypatch, capsys):
    make_cases(tmp_path, 5)
    monkeypatch.setattr(terminal, "FIRST", 0)
    SegmentationCases(tmp_path, SIZE, progress=True)
    assert f"checking {tmp_path}: 5 of 5 cases (100 %)" in capsys.readouterr().err


def test_cases_in_memory_need_their_files_no_more(mixed, open_large):
    small, large = SegmentationCases(mixed, SIZE), open_large(mixed, SIZE)
    expected = list(small)
    for case in mixed.glob("case*"):
        shutil.rmtree(case)
    assert_same_cases(expected, small)
    assert_same_cases(expected, large)


def test_a_second_opening_of_an_unchanged_folder_decodes_but_a_sample(mixed, open_large, decoded_names):
    open_large(mixed, SIZE)
    assert len(decoded_names) == SAMPLES + 11 and len(set(decoded_names)) == 11
    decoded_names.clear()
    cases = open_large(mixed, SIZE)
    assert len(decoded_names) <= SAMPLES
    decoded_names.clear()
    assert len(list(cases)) == 11 and decoded_names == []


def touch(path, nanoseconds=10 ** 6):
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + nanoseconds))


def repaint(path):
    """Other pixels in as many bytes."""
    before = path.stat()
    save(path, 255 - np.asarray(Image.open(path)), compress_level=0)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10 ** 6))


def lengthen(path):
    """More bytes, at the same time as before."""
    before = path.stat()
    path.write_bytes(path.read_bytes() + b"tail")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    **{f"{change.__name__} {file}": lambda folder, change=change, file=file: change(folder / file)
       for change in (touch, repaint, lengthen)
       for file in ("case00/image_0.png", "case03/label2_.png", "case10/label0_.png")},
    "label added": lambda folder: shutil.copy2(folder / "case00/label0_.png", folder / "case00/label1_.png"),
    "label removed": lambda folder: (folder / "case03/label0_.png").unlink(),
    "label renamed": lambda folder: (folder / "case03/label0_.png").rename(folder / "case03/label8_.png"),
    "images added": lambda folder: [shutil.copy2(folder / "case00/image_0.png", folder / f"case00/image_{i}.png")
                                    for i in (1, 2, 3)],
    "case added": lambda folder: shutil.copytree(folder / "case05", folder / "case05b"),
    "case removed": lambda folder: shutil.rmtree(folder / "case07"),
    "case renamed": lambda folder: (folder / "case07").rename(folder / "case7"),
    "cases swapped": lambda folder: [(folder / a).rename(folder / b) for a, b in (
        ("case01", "case1"), ("case05", "case01"), ("case1", "case05"))],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_whatever_changes_in_the_folder_is_decoded_again(mixed, open_large, decoded_names, change):
    open_large(mixed, SIZE)
    change(mixed)
    decoded_names.clear()
    cases = open_large(mixed, SIZE)
    assert len(decoded_names) == len(cases.cases[::2]) + len(cases)
    assert_same_cases(cases, SegmentationCases(mixed, SIZE))
    decoded_names.clear()
    open_large(mixed, SIZE)
    assert len(decoded_names) <= SAMPLES


def test_other_settings_are_decoded_afresh(make_cases, tmp_path, open_large):
    make_cases(tmp_path, 10, raters=2, size=20)
    settings = dict(image_size=SIZE, image_channels=4, fit="crop", need_labels=True, limit=0)
    for name, value in (("limit", 0), ("limit", 9), ("image_size", 15), ("image_channels", 1), ("fit", "resize"),
                        ("limit", 0)):
        for changed in ({**settings, name: value}, settings):
            cases = open_large(tmp_path, **changed)
            assert isinstance(cases.decoded, DecodedFile)
            assert_same_cases(cases, SegmentationCases(tmp_path, **changed))


def test_runs_that_need_labels_and_those_that_do_not_share_one_file(make_cases, tmp_path, open_large, decoded_names):
    make_cases(tmp_path, 10, raters=2)
    for label in (tmp_path / "case4").glob("label*"):
        label.unlink()
    path = tmp_path / f".decoded_{SIZE}_error"
    with pytest.raises(InputError, match="case4: no labels"):
        open_large(tmp_path, SIZE)
    assert [len(case.raters) for case in open_large(tmp_path, SIZE, need_labels=False)] == [2] * 4 + [0] + [2] * 5
    whole = path.read_bytes()
    decoded_names.clear()
    with pytest.raises(InputError, match="^[^\\n]*case4: no labels[^\\n]*$"):
        open_large(tmp_path, SIZE)
    scored = open_large(tmp_path, SIZE, skip_bad=True)
    assert list(scored.problems) == [4] and len(list(scored.readable(range(10)))) == 9
    assert len(decoded_names) == 2 * 5 and path.read_bytes() == whole  # the samples that tell how large cases are
    shutil.rmtree(tmp_path / "case4")
    open_large(tmp_path, SIZE)
    decoded_names.clear()
    assert len(open_large(tmp_path, SIZE, need_labels=False)) == 9 and len(decoded_names) == 5


def test_a_file_cut_off_or_of_rubbish_is_written_again(mixed, open_large):
    small = SegmentationCases(mixed, SIZE)
    open_large(mixed, SIZE)
    path, rng = mixed / f".decoded_{SIZE}_error", random.Random(1)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in (0, 1, 15, 16, 17, len(whole) - 17, len(whole) - 16, len(whole) - 8, len(whole) - 1)]
    damaged += [whole[:rng.randrange(len(whole))] for _ in range(8)]
    damaged += [rng.randbytes(len(whole)), bytes(len(whole)), whole + b"x", whole[:-9] + b"\xff" + whole[-8:],
                b"{}" + (2).to_bytes(8, "little") + whole[-8:], b"\xff" + (1).to_bytes(8, "little") + whole[-8:]]
    for data in damaged:
        path.write_bytes(data)
        cases = open_large(mixed, SIZE)
        assert path.read_bytes() == whole and isinstance(cases.decoded, DecodedFile)
        assert_same_cases(cases, small)


@pytest.mark.parametrize("suffix", ["", ".lock"])
def test_where_no_file_can_be_written_each_visit_decodes(mixed, open_large, decoded_names, suffix):
    small = SegmentationCases(mixed, SIZE)
    (mixed / f".decoded_{SIZE}_error{suffix}").mkdir()
    cases = open_large(mixed, SIZE)
    assert cases.decoded is None and "\n" not in cases.kept
    assert "decoded at every visit" in cases.kept and str(mixed / f".decoded_{SIZE}_error") in cases.kept
    assert "directory" in cases.kept  # why
    assert_same_cases(cases, small)
    assert_same_batches(cases, small)
    decoded_names.clear()
    for _ in range(3):
        assert cases[2].name == "case02"
    assert decoded_names == ["case02"] * 3
    assert not list(mixed.glob(".*.part"))
    (mixed / "case03" / "image_0.png").unlink()
    with pytest.raises(InputError, match="case03"):
        open_large(mixed, SIZE)


def test_a_bad_picture_among_good_ones_leaves_no_file_and_each_is_named(mixed, open_large):
    bad = [mixed / "case03" / "image_0.png", mixed / "case04" / "label1_.png", mixed / "case10" / "image_0.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError) as caught:
        open_large(mixed, SIZE)
    first, *lines = str(caught.value).split("\n")
    assert first == f"3 problems in {mixed}:" and len(lines) == 3
    assert all(line.strip().startswith(f"{path}: cannot be read") for line, path in zip(lines, bad))
    assert left_behind(mixed) == []


OPEN = """
import hashlib, sys
from guided_diffusion.data import cases as data_cases

reads, original = [], data_cases.read_case
data_cases.read_case = lambda *args, **named: reads.append(1) or original(*args, **named)
data_cases.MEMORY_BYTES = 0
print("ready", flush=True)
sys.stdin.readline()
cases = data_cases.SegmentationCases(sys.argv[1], int(sys.argv[2]))
digest = hashlib.sha256()
for case in cases:
    digest.update(case.name.encode() + case.image.tobytes() + case.raters.tobytes())
print(len(reads), digest.hexdigest(), cases.kept)
"""


def test_processes_that_open_one_folder_at_once_share_one_file(mixed, environment):
    digest = hashlib.sha256()
    for case in SegmentationCases(mixed, SIZE):
        digest.update(case.name.encode() + case.image.tobytes() + case.raters.tobytes())
    workers = [subprocess.Popen([sys.executable, "-c", OPEN, str(mixed), str(SIZE)], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 3
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    answers = [worker.communicate(timeout=120)[0].split(maxsplit=2) for worker in workers]
    assert all(answer[1:] == [digest.hexdigest(), f"decoded in {mixed / f'.decoded_{SIZE}_error'}\n"]
               for answer in answers)
    assert sorted(int(reads) for reads, *_ in answers) == [SAMPLES, SAMPLES, SAMPLES + 11]  # one of them wrote it
    assert left_behind(mixed) == [f".decoded_{SIZE}_error"]


def test_nothing_written_to_an_item_reaches_the_file(mixed, open_large):
    cases, expected = open_large(mixed, SIZE), list(SegmentationCases(mixed, SIZE))
    whole = (mixed / f".decoded_{SIZE}_error").read_bytes()
    for part in cases.compact(3):
        with pytest.raises(ValueError, match="read-only"):
            part[...] = 1
    case = cases[3]
    case.image[...] = 0.5
    case.raters[...] = True
    for tensor in next(ShuffledCases(cases).batches(11))[:2]:
        tensor.zero_()
    assert_same_cases(cases, expected)
    assert (mixed / f".decoded_{SIZE}_error").read_bytes() == whole


# ---- batches of it all ----

@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 11])
def test_batches_as_floats_are_the_items(mixed, open_large, large, batch_size):
    cases = (open_large if large else SegmentationCases)(mixed, SIZE)
    by_image = {np.round(case.image * 65535).astype(np.uint16).tobytes(): case for case in cases}
    kinds, seen = set(), set()
    for batch in itertools.islice(ShuffledCases(cases, 2).batches(batch_size), 33 // batch_size):
        kinds.add((batch.image.dtype, batch.image.shape[1]))
        floats = to_floats(batch, 4, torch.device("cpu"))
        assert floats.image.dtype == floats.masks.dtype == torch.float32 and batch.masks.dtype == torch.uint8
        assert floats.image.shape == (batch_size, 4, SIZE, SIZE)
        for image, masks, present in zip(floats.image, floats.masks, floats.present):
            case = by_image[(image * 65535).round().numpy().astype(np.uint16).tobytes()]
            np.testing.assert_allclose(image, case.image, atol=1e-6)
            assert present.tolist() == [rater < len(case.raters) for rater in range(len(masks))]
            assert np.array_equal(masks[present], case.raters) and not masks[~present].any()
            seen.add(case.name)
    assert len(seen) == 11 and len(kinds) == {1: 4, 2: len(kinds), 11: 1}[batch_size]
    assert (torch.uint16, 4) in kinds


def test_training_batches_end_their_threads_when_closed(mixed):
    before = set(threading.enumerate())
    batches = ShuffledCases(SegmentationCases(mixed, SIZE)).batches(2)
    next(batches)
    batches.close()
    assert set(threading.enumerate()) <= before
