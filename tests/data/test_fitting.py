"""Images and masks of another size are brought to that of the model."""

import numpy as np
import pytest
from helpers.files import save
from helpers.pictures import SIZE, as_label, same
from helpers.refusals import problems_of, refusal
from scipy import ndimage

from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.fitting import Fitting
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
    for image, packed, _ in cases.decoded:
        assert image.base is None and image.nbytes == SIZE ** 2
        assert packed.base is None and packed.nbytes == 2 * SIZE ** 2 // 8


@pytest.mark.parametrize("fit, size, words", [
    ("crop", (12, 40), ["40 x 12", "too small for --fit crop", "--fit resize"]),
    ("pad", (12, 40), ["40 x 12", "too large for --fit pad", "--fit resize"]),
    ("pad", (20, 16), ["16 x 20", "too large", "--fit resize or --fit crop"]),
    ("error", (9, 16), ["16 x 9", "--image_size is 16", "--fit resize or --fit pad"])])
def test_what_does_not_fit_is_refused_with_what_would(fit, size, words):
    message = refusal(Fitting(size, SIZE, fit).check, "scan.png")
    assert message.startswith("scan.png: is ") and all(word in message for word in words)
    assert not any(f"give --fit {wrong}" in message for wrong in ("error", fit))


# ---- there and back ----

def blob(size, seed=0):
    """A smooth mask that no edge cuts off."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).random(size), min(size) / 8)
    y, x = (np.linspace(-1, 1, side) for side in size)
    return (noise > np.median(noise)) & (np.hypot(y[:, None], x) < 0.8)


@pytest.mark.parametrize("fit, size", [("error", (16, 16)), ("pad", (16, 16)), ("pad", (11, 8)), ("pad", (1, 15)),
                                       ("crop", (16, 16)), ("crop", (31, 18)), ("crop", (17, 16))])
def test_what_lies_in_the_fitted_scan_comes_back_exactly(fit, size):
    rng, way = np.random.default_rng(0), Fitting(size, SIZE, fit)
    image, raters = rng.integers(0, 65536, (2, *size), np.uint16), rng.random((3, *size)) < 0.5
    fitted_image, fitted = way.there(image, raters)
    assert fitted_image.shape == (2, 16, 16) and fitted.shape == (3, 16, 16) and fitted.dtype == bool
    samples = np.where(fitted, np.float32(0.7), np.float32(0.2))
    seen = way.back(np.ones((1, 16, 16), bool))[0]  # of the scan by the network
    assert seen.sum() == min(size[0], 16) * min(size[1], 16)
    for drawn in (way.back(fitted), way.back(samples) > 0.5):
        assert np.array_equal(drawn[:, seen], raters[:, seen]) and not drawn[:, ~seen].any()
    assert np.array_equal(way.back(fitted_image)[:, seen], image[:, seen])
    if fit == "pad":  # its edge goes on
        assert np.isin(fitted_image, image).all() and fitted.sum() == raters.sum()


@pytest.mark.parametrize("size", [(64, 64), (150, 90), (33, 47), (256, 200)])
def test_a_resized_mask_comes_back_within_half_a_pixel_of_the_coarser_grid(size):
    side, mask = 64, blob(size)
    way = Fitting(size, side, "resize")
    _, fitted = way.there(np.zeros((1, *size), np.uint8), mask[None])
    back = way.back(fitted.astype(np.float32))[0] > 0.5
    assert np.array_equal(back, way.back(fitted)[0]) and 0.1 < mask.mean() < 0.8
    units = [min(side / own, 1) for own in size]  # sides of the scan's pixels, in pixels of the coarser grid
    depth = np.where(mask, *(ndimage.distance_transform_edt(one, units) for one in (mask, ~mask)))
    depth -= max(units) / 2  # from the middle of a pixel to the border, not to the next pixel's
    assert depth[back != mask].max(initial=0) <= 0.5


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
