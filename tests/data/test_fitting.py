"""Images and masks of another size are brought to that of the model."""

import numpy as np
import pytest
from helpers.files import save
from helpers.pictures import SIZE, as_label, same
from helpers.refusals import problems_of

from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.system.errors import InputError


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
