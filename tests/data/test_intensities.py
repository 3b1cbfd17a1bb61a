"""--normalise, --foreground, and the formats of arrays and of TIFF and GIF pictures."""

import json

import numpy as np
import pytest
from helpers.processes import SAMPLE, TRAIN
from helpers.refusals import refusal, refused
from PIL import Image

from guided_diffusion import Segmenter
from guided_diffusion.data.case_files import find_cases, read_case
from guided_diffusion.data.cases import SegmentationCases, count_channels
from guided_diffusion.data.intensities import Normalise, parse_foreground
from guided_diffusion.data.readers.base import Readers

RNG = np.random.default_rng(0)
CT = RNG.normal(-200, 400, (2, 40, 50)).round().astype(np.int16)


@pytest.mark.parametrize("text, limits", [
    ("minmax", lambda c: (c.min(), c.max())), ("percentile", lambda c: np.percentile(c, [0.5, 99.5])),
    ("zscore", lambda c: (c.mean() - 3 * c.std(), c.mean() + 3 * c.std())),
    ("window:-1000,400", lambda c: (-1000, 400)),
])
def test_numbers_between_the_limits_become_0_to_1_channel_by_channel(text, limits):
    normalise = Normalise(text)
    pixels = normalise.apply(CT, normalise.limits(CT))
    assert pixels.dtype == np.uint16
    for found, channel in zip(pixels, CT):
        low, high = limits(channel.astype(float))
        expected = np.clip((channel - low) / (high - low), 0, 1)
        assert np.abs(found / 65535 - expected).max() < 1e-4


def test_full_leaves_pictures_as_they_are_and_takes_the_range_that_a_file_names():
    normalise = Normalise("full")
    for pixels in (np.array([[[3, 200]]], np.uint8), np.array([[[3, 60000]]], np.uint16)):
        found = normalise.apply(pixels, normalise.limits(pixels))
        assert found.dtype == pixels.dtype and (found == pixels).all()
    assert normalise.apply(CT[:1, :1, :1] * 0, normalise.limits(CT[:1], (-1000, 1000))).item() == 32768
    with pytest.raises(ValueError, match="give --normalise minmax"):
        normalise.limits(CT)
    flat = np.full((1, 2, 2), 7.0)
    assert not Normalise("zscore").apply(flat, Normalise("zscore").limits(flat)).any()  # nor is it divided by 0


@pytest.mark.parametrize("text", ["maximum", "window", "window:", "window:1", "window:4,1", "window:a,b",
                                  "window:1,inf", "window:nan,1", "window:1,2,3"])
def test_other_words_for_normalise_are_refused(text):
    assert f"--normalise {text}" in refusal(Normalise, text)


def test_values_of_a_label_map_are_parsed_or_refused():
    assert parse_foreground("1,2,-4") == (1, 2, -4) and parse_foreground("") == ()
    assert "--foreground 1.5: is not a list" in refusal(parse_foreground, "1.5")


# ---- arrays ----

def test_arrays_are_read_as_they_are_and_what_is_above_0_of_them_is_foreground(tmp_path):
    readers, (a, b) = Readers({"normalise": "window:-1000,400"}), (tmp_path / "a.npy", tmp_path / "b.npy")
    np.save(a, CT.astype(">i2"))
    assert np.abs(readers.read(a).pixels / 65535 - np.clip((CT + 1000) / 1400, 0, 1)).max() < 1e-4
    labels = RNG.integers(0, 4, (40, 50))
    for label, mask in ((labels, labels > 0), (labels == 2, labels == 2), (labels / 4, labels > 2)):
        np.save(b, label)
        assert np.array_equal(readers.read_mask(b), mask)
    np.save(b, labels)
    assert np.array_equal(Readers({"foreground": "1,3"}).read_mask(b), np.isin(labels, (1, 3)))
    np.save(b, CT)
    assert "has 2 channels, but --foreground takes values of grey" in refusal(Readers({"foreground": "1"}).read_mask, b)


@pytest.mark.parametrize("array, words", [
    (np.zeros((40, 50, 3), np.uint8), "channels last; save it as [channels, H, W]"),
    (np.zeros((2, 2, 2, 2)), "is an array [2, 2, 2, 2]; save it as"), (np.array([[1j]]), "complex128"),
    (np.array([[np.nan]]), "not all of them finite numbers"), (np.array([[None]], object), "cannot be read"),
    (np.array([["a"]]), "a.npy: ")])
def test_arrays_that_are_no_scans_are_named_in_one_line(tmp_path, array, words):
    np.save(tmp_path / "a.npy", array)
    message = refusal(Readers({"normalise": "minmax"}).read, tmp_path / "a.npy")
    assert words in message and str(tmp_path / "a.npy") in message


# ---- TIFF and GIF ----

def save_rated(folder, colour, masks):
    """A case as a colour TIFF with a mask in TIFF and one in GIF."""
    folder.mkdir(parents=True)
    Image.fromarray(colour).save(folder / "image_0.tif", compression="tiff_lzw")
    Image.fromarray(masks[0] * np.uint8(255)).save(folder / "label0_.tiff")
    Image.fromarray(masks[1] * np.uint8(255)).save(folder / "label1_.gif")


def test_colour_in_tiff_with_masks_in_tiff_and_gif_is_read_exactly(tmp_path):
    colour, masks = RNG.integers(0, 256, (48, 60, 3), np.uint8), RNG.integers(0, 2, (2, 48, 60)) > 0
    save_rated(tmp_path / "eye", colour, masks)
    found = read_case(find_cases(tmp_path)[0])
    assert np.array_equal(found.image, colour.transpose(2, 0, 1)) and np.array_equal(found.raters, masks)
    assert count_channels(tmp_path) == 3
    assert "--image_channels auto" in refusal(SegmentationCases, tmp_path, 48, 4, fit="crop")


@pytest.mark.parametrize("pixels", [CT[0].astype(np.int32), CT[0].astype(np.float32)])
def test_tiff_of_more_than_16_bits_is_read_with_its_sign(tmp_path, pixels):
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    assert "gives" in refusal(Readers().read, tmp_path / "a.tif")
    found = Readers({"normalise": "minmax"}).read(tmp_path / "a.tif").pixels[0] / 65535
    assert np.abs(found - (CT[0] - CT[0].min()) / np.ptp(CT[0].astype(int))).max() < 1e-4


def test_a_label_map_in_a_picture_is_cut_at_its_values(tmp_path):
    labels = RNG.integers(0, 5, (9, 9)).astype(np.uint8)
    for name in ("a.png", "a.tif", "a.gif"):
        Image.fromarray(labels).save(tmp_path / name)
        assert np.array_equal(Readers({"foreground": "1,2,4"}).read_mask(tmp_path / name), np.isin(labels, (1, 2, 4)))
        assert "--foreground 4" in refusal(Readers().read_mask, tmp_path / name)


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.npy", "a.bmp", "a.webp", "a.jpg", "a.png"])
def test_cut_off_files_are_named_in_one_line(tmp_path, name):
    path, pixels = tmp_path / name, RNG.integers(0, 256, (40, 40), np.uint8)
    np.save(path, pixels) if name == "a.npy" else Image.fromarray(pixels).save(path, quality=95)
    whole = path.read_bytes()
    for length in (0, 3, 20, len(whole) // 2, len(whole) - 200):
        path.write_bytes(whole[:length])
        assert str(path) in refusal(Readers().read, path)


def test_several_pictures_in_one_tiff_are_refused(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.tif", save_all=True, append_images=[Image.new("L", (4, 4), 9)])
    assert "holds 2 pictures" in refusal(Readers().read, tmp_path / "a.tif")


# ---- from the first command to the last ----

def test_a_run_keeps_how_it_read_its_scans(run, tiny, tmp_path):
    for i in range(2):
        folder = tmp_path / "data" / f"case{i}"
        folder.mkdir(parents=True)
        np.save(folder / "image_ct.npy", CT[:, :16, :16] + i)
        np.save(folder / "label0_.npy", RNG.integers(0, 3, (16, 16)))
    flags = "--data_dir", tmp_path / "data", "--results_dir", "results"
    reading = "--normalise", "window:-1000,400", "--foreground", "2"
    result = run(TRAIN, *flags, "--max_steps", 1, "--num_filters", "8,16", *tiny, *reading, "--image_channels", "auto")
    assert result.code == 0, result.err
    stored = json.loads((tmp_path / "results" / "flags.json").read_text())
    assert (stored["image_channels"], stored["normalise"], stored["foreground"]) == (2, "window:-1000,400", "2")
    result = run(SAMPLE, *flags, "--num_ensemble", 1, "--timestep_respacing", 2)
    assert result.code == 0, result.err
    refused(run(SAMPLE, *flags, "--normalise", "minmax"), "--normalise minmax (there: window:-1000,400)")
    refused(run(SAMPLE, *flags, "--image_channels", "auto"), "--image_channels auto: is found from the data")
    segmenter = Segmenter.load(tmp_path / "results", device="cpu")
    expected = np.clip((CT[:, :16, :16] + 1000) / 1400, 0, 1)
    for scan in (CT[:, :16, :16], tmp_path / "data" / "case0"):
        assert np.abs(segmenter.sample(scan, 1, 2).image - expected).max() < 1e-4
