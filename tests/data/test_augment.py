"""Augmentation changes a scan and all its masks alike, and follows from the place in the stream alone."""

import numpy as np
import pytest
import torch
from helpers.loops import make_cases
from helpers.refusals import refusal

from guided_diffusion.data.augment import AUGMENTATIONS, augmented, parse_kinds
from guided_diffusion.data.stream import ShuffledCases, to_floats

EVERYTHING = [*AUGMENTATIONS]
SIDE = 32


@pytest.fixture
def example():
    """A scan [2, S, S] uint8, and masks [3, S, S] that are known from it: what is above a value in a channel."""
    image = np.random.default_rng(0).integers(0, 256, (2, SIDE, SIDE), np.uint8)
    return image, masks_of(image)


def masks_of(image):
    return np.stack([image[0] > 100, image[0] > 200, image[1] > 128])


def changes(example, kinds, count=64):
    return [augmented(*example, kinds, 0, place) for place in range(count)]


def seen(images):
    return {image.tobytes() for image in images}


def test_flips_and_turns_move_scan_and_masks_alike_and_are_the_eight_symmetries(example):
    image, _ = example
    turned = [np.rot90(image, k, (1, 2)) for k in range(4)]
    assert seen(image for image, _ in changes(example, ["rot90"])) == seen(turned)
    assert seen(image for image, _ in changes(example, ["flips"])) == seen(
        [image, image[:, ::-1], image[:, :, ::-1], image[:, ::-1, ::-1]])
    both = changes(example, ["flips", "rot90"], 200)
    assert seen(image for image, _ in both) == seen([*turned, *(np.flip(image, 2) for image in turned)])
    assert all(np.array_equal(masks, masks_of(image)) for image, masks in both)


def test_shift_moves_by_whole_pixels_repeats_the_edge_and_puts_nothing_into_the_masks(example):
    image, masks = example
    padded = np.pad(image, ((0, 0), (2, 2), (2, 2)), mode="edge")  # 2 pixels are 1/16 of 32
    steps = set()
    for moved, moved_masks in changes(example, ["shift"], 300):
        down, across = next((y, x) for y in range(-2, 3) for x in range(-2, 3) if np.array_equal(
            moved, padded[:, 2 - y:2 - y + SIDE, 2 - x:2 - x + SIDE]))
        expected = np.pad(masks, ((0, 0), (2, 2), (2, 2)))[:, 2 - down:2 - down + SIDE, 2 - across:2 - across + SIDE]
        assert np.array_equal(moved_masks, expected)
        steps.add((down, across))
    assert len(steps) == 25


def test_intensity_changes_contrast_and_brightness_of_the_scan_alone_within_its_range(example):
    image, masks = example
    gains, offsets = [], []
    for changed, same in changes(example, ["intensity"], 400):
        assert same is masks and changed.dtype == np.float32 and 0 <= changed.min() and changed.max() <= 1
        inside = (changed > 0) & (changed < 1)
        gain, offset = np.polyfit(image[inside] / 255, changed[inside], 1)
        gains, offsets = [*gains, gain], [*offsets, offset]
    assert np.mean(gains) == pytest.approx(1, abs=0.02) and np.std(gains) == pytest.approx(0.1, abs=0.02)
    assert np.mean(offsets) == pytest.approx(0, abs=0.01) and np.std(offsets) == pytest.approx(0.05, abs=0.01)


def test_affine_turns_and_zooms_scan_and_masks_alike_about_the_centre():
    rows, columns = np.mgrid[:65, :65] - 32
    masks = np.stack([np.hypot(rows, columns) < 12, np.hypot(rows, columns - 20) < 6, rows > 99])
    image = masks[:2].astype(np.float32)
    zooms, angles = [], []
    for turned, moved in changes((image, masks), ["affine"], 400):
        assert np.array_equal(turned > 0.5, moved[:2]) and not moved[2].any()
        if np.array_equal(turned, image):
            continue
        there = np.argwhere(moved[1]).mean(0) - 32  # where the small disc lies now
        zooms.append(np.hypot(*there) / 20)
        angles.append(np.arctan2(*there))
        assert moved[0].sum() == pytest.approx(masks[0].sum() * zooms[-1] ** 2, rel=0.06)
        assert np.argwhere(moved[0]).mean(0) == pytest.approx([32, 32], abs=0.1)
    assert 160 < len(zooms) < 240
    assert np.std(np.log(zooms)) == pytest.approx(0.15 / 3 ** 0.5, abs=0.012) and max(np.abs(np.log(zooms))) < 0.17
    assert np.histogram(angles, 4, (-np.pi, np.pi))[0].min() > 30


def test_other_kinds_leave_8_and_16_bits_as_they_are(example):
    image, masks = example
    for scan in (image, image * np.uint16(257)):
        changed, _ = augmented(scan, masks, ["flips", "rot90", "shift"], 0, 5)
        assert changed.dtype == scan.dtype and set(np.unique(changed)) <= set(np.unique(scan))


def test_seed_and_place_decide(example):
    images = [augmented(*example, EVERYTHING, *at)[0].tobytes() for at in ((1, 2), (1, 2), (2, 2), (1, 3))]
    assert images[0] == images[1] and len(set(images)) == 3


def test_augmented_stream_does_not_depend_on_how_it_is_shared_or_where_it_is_entered():
    cases = make_cases(count=7, raters=[1, 2, 3, 1, 2, 3, 4])
    one = ShuffledCases(cases, 3, EVERYTHING).batches(4)
    two = [ShuffledCases(cases, 3, EVERYTHING).batches(2, 2 * rank, 4) for rank in range(2)]
    plain = ShuffledCases(cases, 3).batches(4)
    for _ in range(3):
        whole, parts, before = next(one), [next(part) for part in two], next(plain)
        assert torch.equal(torch.cat([part.image for part in parts]), whole.image)
        raters = whole.masks.shape[1]
        joined = [torch.nn.functional.pad(part.masks, (0, 0, 0, 0, 0, raters - part.masks.shape[1])) for part in parts]
        assert torch.equal(torch.cat(joined), whole.masks) and whole.places == before.places
        assert torch.equal(whole.present, before.present) and not torch.equal(whole.masks, before.masks)
        floats = to_floats(whole, 4, torch.device("cpu"))
        assert floats.image.shape == (4, 4, 16, 16) and floats.image.dtype == torch.float32
    later = next(ShuffledCases(cases, 3, EVERYTHING).batches(4, start=8))
    assert torch.equal(later.image, whole.image) and torch.equal(later.masks, whole.masks)


def test_every_visit_changes_a_case_in_another_way():
    stream = ShuffledCases(make_cases(count=1), 0, ["intensity"])
    assert len({stream[place][0].tobytes() for place in range(5)}) == 5


def test_names_are_taken_in_any_order_and_applied_in_that_of_the_table():
    assert parse_kinds("") == [] and parse_kinds("shift, flips") == ["flips", "shift"]
    assert parse_kinds("intensity,affine,shift,rot90,flips") == EVERYTHING == [
        "flips", "rot90", "shift", "affine", "intensity"]


@pytest.mark.parametrize("text", ["flip", "flips,,shift", "flips;shift"])
def test_unknown_names_are_refused_with_those_there_are(text):
    message = refusal(parse_kinds, text)
    assert f"--augment {text}" in message and "flips,rot90,shift,affine,intensity" in message


def test_turning_what_is_not_square_is_refused():
    image, masks = np.zeros((1, 4, 6), np.uint8), np.zeros((1, 4, 6), bool)
    assert "6 x 4" in refusal(augmented, image, masks, ["rot90"], 0, 0)
