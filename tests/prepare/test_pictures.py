"""Folders of images and of masks become cases, by the patterns of their names."""

import numpy as np
import pytest
from helpers.files import save
from helpers.refusals import refusal
from PIL import Image

from guided_diffusion.prepare.pictures import Pictures
from guided_diffusion.prepare.runner import Job, prepare, said


@pytest.fixture
def job(tmp_path):
    """job(images, masks, **options) -> the Job of these patterns below tmp_path/in."""
    def make(images, masks, missing_masks="leave_out", **fields):
        flags = {"images": [images] if isinstance(images, str) else images, "masks": masks,
                 "missing_masks": missing_masks, "foreground": "", "patient_pattern": ""}
        return Job("pictures", tmp_path / "in", flags, **fields)

    return make


def disc(height, width, radius):
    y, x = np.ogrid[:height, :width]
    return (np.hypot(y - height / 2, x - width / 2) < radius).astype(np.uint8) * 255


def test_colour_in_tiff_with_raters_in_gif_and_png_is_read_back_exactly(job, tmp_path, prepared):
    rng = np.random.default_rng(0)
    images = {f"{i:02d}": rng.integers(0, 256, (48, 60, 3), np.uint8) for i in range(3)}
    for i, (name, image) in enumerate(images.items()):
        save(tmp_path / "in" / "scans" / f"{name}_fundus.tif", image)
        save(tmp_path / "in" / "reader_a" / f"{name}-a.gif", disc(48, 60, 10 + i))
        save(tmp_path / "in" / "reader_b" / f"{name}-b.png", disc(48, 60, 15 + i))
    outcome = prepare(job("scans/{case}_fundus.tif", ["reader_a/{case}-a.gif", "reader_b/{case}-b.png"],
                          split="1:1:1"), tmp_path / "out")
    assert outcome.split_by == "case"
    cases = {}
    for part in ("train", "val", "test"):
        cases |= prepared(tmp_path / "out" / part)
    assert cases.keys() == images.keys()
    for i, (name, (image, raters, row)) in enumerate(sorted(cases.items())):
        assert np.array_equal(image, images[name].transpose(2, 0, 1)) and row["patient"] == ""
        assert np.array_equal(raters, np.stack([disc(48, 60, 10 + i), disc(48, 60, 15 + i)]) > 0)


def test_channels_patients_and_raters_are_found_by_their_fields(job, tmp_path, prepared):
    folder = tmp_path / "in"
    for patient, case in (("p1", "s1"), ("p1", "s2"), ("p2", "s1")):
        for value, channel in ((300, "flair"), (40000, "t1")):
            save(folder / patient / channel / f"{case}.png", np.full((4, 6), value, np.uint16))
        for rater in (2, 10):
            save(folder / "masks" / f"{patient}_{case}_r{rater}.png", disc(4, 6, rater / 5))
    outcome = prepare(job(["{patient}/flair/{case}.png", "{patient}/t1/{case}.png"],
                          ["masks/{patient}_{case}_r{rater}.png"]), tmp_path / "out")
    cases = prepared(tmp_path / "out")
    assert [*cases] == ["p1_s1", "p1_s2", "p2_s1"] and outcome.split_by == "patient"
    image, raters, row = cases["p2_s1"]
    assert image[:, 0, 0].tolist() == [300, 40000] and row["patient"] == "p2"
    assert np.array_equal(raters, np.stack([disc(4, 6, 0.4), disc(4, 6, 2)]) > 0)  # rater 2 comes before rater 10


def test_a_missing_mask_means_what_the_flag_says(job, tmp_path, prepared):
    for case in "ab":
        save(tmp_path / "in" / f"{case}.png", disc(8, 8, 1))
        save(tmp_path / "in" / "r0" / f"{case}.png", disc(8, 8, 2))
    save(tmp_path / "in" / "r1" / "a.png", disc(8, 8, 3))
    patterns = "{case}.png", ["r0/{case}.png", "r1/{case}.png"]
    outcome = prepare(job(*patterns), tmp_path / "left")
    assert [row["case"] for row in outcome.rows] == ["a"] and "--missing_masks" in said(*outcome.left_out)
    for how, areas in (("empty", [9, 0]), ("skip", [9])):
        prepare(job(*patterns, how), tmp_path / how)
        assert prepared(tmp_path / how)["b"][1].sum((1, 2)).tolist() == areas


def test_values_of_a_label_map_are_foreground_where_the_flag_says_so(job, tmp_path, prepared):
    save(tmp_path / "in" / "a.png", disc(4, 4, 1))
    labels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    save(tmp_path / "in" / "a_m.gif", labels)
    one = job("{case}.png", ["{case}_m.gif"])
    prepare(one._replace(flags={**one.flags, "foreground": "2,13"}), tmp_path / "out")
    assert np.flatnonzero(prepared(tmp_path / "out")["a"][1]).tolist() == [2, 13]
    save(tmp_path / "in" / "a_m.gif", np.stack([labels, labels, labels * 2], -1))
    message = refusal(prepare, one._replace(flags={**one.flags, "foreground": "2"}), tmp_path / "colour")
    assert "has 3 channels, but --foreground takes values of grey label maps" in message
    assert "--foreground x" in refusal(Pictures, tmp_path, ["{case}"], ["{case}"], "empty", "x", "")


@pytest.mark.parametrize("suffix", ["bmp", "webp", "tif", "npy"])
def test_pictures_of_every_reader_are_taken(job, tmp_path, prepared, suffix):
    image = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    if suffix == "npy":
        (tmp_path / "in").mkdir()
        np.save(tmp_path / "in" / "a.npy", image)
    elif suffix == "webp":
        (tmp_path / "in").mkdir()
        Image.fromarray(np.stack([image] * 3, -1)).save(tmp_path / "in" / "a.webp", lossless=True)
    else:
        save(tmp_path / "in" / f"a.{suffix}", image)
    save(tmp_path / "in" / "a_m.png", disc(8, 8, 2))
    prepare(job(f"{{case}}.{suffix}", ["{case}_m.png"]), tmp_path / "out")
    assert np.array_equal(prepared(tmp_path / "out")["a"][0], [image])


def test_what_does_not_fit_is_left_out_by_name(job, tmp_path):
    folder = tmp_path / "in"
    for case in ("good", "broken", "small", "bare", "grey"):
        save(folder / "i" / f"{case}.png", disc(8, 8, 1))
        if case != "bare":
            save(folder / "m" / f"{case}.png", disc(8, 8, 2))
    save(folder / "i" / "good.jpg", disc(8, 8, 1))
    save(folder / "m" / "alone.png", disc(8, 8, 2))
    save(folder / "m" / "small.png", disc(8, 7, 2))
    save(folder / "m" / "grey.png", np.full((8, 8), 1, np.uint8))
    (folder / "i" / "broken.png").write_bytes((folder / "i" / "broken.png").read_bytes()[:40])
    outcome = prepare(job("i/{case}.*", ["m/{case}.png"]), tmp_path / "out")
    assert [row["case"] for row in outcome.rows] == ["good"]
    lines = "\n".join(map(said, outcome.left_out))
    for words in ("i/good.png: names the same case as i/good.jpg", "m/alone.png: is a mask without its image",
                  "m/small.png: is 7 x 8 pixels", "bare: has masks of 0 of 1 raters", "broken.png: cannot be read",
                  "grey.png: its brightest value is 1 of 255"):
        assert words in lines, lines


@pytest.mark.parametrize("images, masks, words", [
    ([], ["m/{case}.png"], "--images"), (["i/{case}.png"], [], "--masks"), (["i/x.png"], ["m/{case}.png"], "{case}"),
    (["../{case}.png"], ["m/{case}.png"], "below INPUT"), (["/a/{case}.png"], ["m/{case}.png"], "below INPUT"),
    (["{case}_{rater}.png"], ["{case}.png"], "{rater} belongs into --masks"),
    (["{case}_{slice}.png"], ["{case}.png"], "is no pattern"),
    (["{patient}/{case}.png", "{case}.png"], ["{case}.png"], "in all patterns, or in none"),
    (["{case}.png"], ["{patient}/{case}.png"], "so give it in --images")])
def test_patterns_that_cannot_be_are_refused(tmp_path, images, masks, words):
    assert words in refusal(Pictures, tmp_path, images, masks, "empty", "", "")


def test_patients_are_taken_from_the_names_where_a_pattern_says_so(job, tmp_path, prepared):
    for case in ("p1-a", "p1-b", "p2-a", "p3-a"):
        save(tmp_path / "in" / case / "image.png", disc(8, 8, 1))
        save(tmp_path / "in" / case / "mask.png", disc(8, 8, 2))
    patterns = "{case}/image.*", ["{case}/mask.png"]
    one = job(*patterns, split="1:1:1")
    outcome = prepare(one._replace(flags={**one.flags, "patient_pattern": r"p\d"}), tmp_path / "out")
    assert {*outcome.parts} == {"p1", "p2", "p3"} and outcome.split_by == "patient"
    assert {row["patient"] for row in outcome.rows if row["case"].startswith("p1")} == {"p1"}
    assert "says the same" in refusal(Pictures, tmp_path, ["{patient}/{case}.png"], ["{case}.png"], "empty", "", "p")


def test_a_folder_without_such_files_is_refused(job, tmp_path):
    assert "no such folder" in refusal(prepare, job("{case}.png", ["{case}_m.png"]), tmp_path / "out")
    (tmp_path / "in").mkdir()
    assert "holds no file that --images {case}.png" in refusal(prepare, job("{case}.png", ["{case}_m.png"]),
                                                               tmp_path / "out")
