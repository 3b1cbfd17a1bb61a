"""The files of a case folder become its image and its raters' masks."""

import numpy as np
import pytest
from helpers.files import save
from helpers.pictures import SIZE, as_label
from helpers.refusals import problems_of
from PIL import Image

from guided_diffusion.data.cases import SegmentationCases


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
