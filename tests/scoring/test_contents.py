"""What is said of a data set before anything is trained."""

import csv
import json

import numpy as np
import pytest
from helpers.files import save
from helpers.refusals import refusal

from guided_diffusion.metrics import PATIENT_PATTERN, Agreement
from guided_diffusion.scoring import contents

OPTIONS = {"patient_pattern": PATIENT_PATTERN}


def write(folder, name, raters, seed=0, image=None):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, raters.shape[1:], np.uint8) if image is None else image
    save(folder / name / "image_0.png", image)
    for i, mask in enumerate(raters):
        save(folder / name / f"label{i}_.png", mask.astype(np.uint8) * 255)


def masks(*areas, size=16):
    """Masks of squares' rows: the first so many pixels of the inner rows."""
    out = np.zeros((len(areas), size * size), bool)
    for mask, area in zip(out, areas):
        mask[size + 1:size + 1 + area] = True
    return out.reshape(-1, size, size)


def test_the_numbers_are_those_of_the_masks(tmp_path):
    sets = [masks(10, 5, 0), masks(4, 4, 4), masks(0, 0, 0), masks(8, 0)]
    for i, raters in enumerate(sets):
        write(tmp_path / "in", f"case{i}", raters, seed=i)
    text = contents.check(tmp_path / "in", tmp_path / "out", OPTIONS)
    said = json.loads((tmp_path / "out" / "check.json").read_text())
    table = said["table"]["all"]
    distances = [Agreement(raters, raters).rater_diversity().item() for raters in sets]
    assert distances == pytest.approx([(0.5 + 1 + 1) / 3, 0, 0, 1])
    assert table["D, mean 1 - IoU of raters"] == pytest.approx(np.mean(distances))
    assert table["best GED of 16 masks"] == pytest.approx(np.mean(
        [d * (1 / 16 + 1 / len(raters)) for d, raters in zip(distances, sets)]))
    assert table["best GED of any number"] == pytest.approx(np.mean([d / len(r) for d, r in zip(distances, sets)]))
    assert table["IoU of raters who both mark"] == pytest.approx((0.5 + 1) / 2)
    assert table["Dice of raters who both mark"] == pytest.approx((10 / 15 + 1) / 2)
    assert table["of which one marks nothing"] == pytest.approx((2 / 3 + 1) / sum(distances))
    assert (table["cases"], table["empty masks"], table["raters a case"]) == (4, pytest.approx(5 / 11), "2 to 3")
    assert table["cases by raters who mark"] == "0:1 1:1 2:1 3:1" and table["sizes"] == "16 x 16"
    assert "nothing wrong" in text and "check.png" in text
    rows = list(csv.DictReader((tmp_path / "out" / "check.csv").open()))
    assert [row["areas"] for row in rows] == ["10 5 0", "4 4 4", "0 0 0", "8 0"]
    assert (tmp_path / "out" / "check.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_likely_to_be_a_mistake_is_named(tmp_path):
    folder = tmp_path / "in"
    write(folder / "train", "P1-a", masks(3, 3))
    write(folder / "train", "P2-a", masks(3, 3), seed=1)
    write(folder / "train", "P2-b", masks(3, 3), seed=1)
    write(folder / "val", "P1-b", masks(3, 3))
    write(folder / "val", "flat", masks(3, 3), image=np.full((16, 16), 7, np.uint8))
    write(folder / "test", "one", masks(3), seed=2)
    write(folder / "test", "full", ~masks(3, 3), seed=3)
    write(folder / "test", "broken", masks(3, 3), seed=4)
    (folder / "test" / "broken" / "label1_.png").write_bytes(b"")
    text = contents.check(folder, tmp_path / "out", OPTIONS)
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert list(found["table"]) == ["train", "val", "test", "all"]
    for words in ("broken/label1_.png: cannot be read", "train/P1-a = val/P1-b: the same picture lies in two parts",
                  "P2-a = P2-b: the same picture under two names", "val/flat: the image has one grey value",
                  "test/full: a mask covers more than half", "test/one: has one rater",
                  "P1: the names of cases in several parts"):
        assert any(words in line for line in found["found"]), (words, found["found"])
        assert words in text
    assert len(found["found"]) == 7


def test_patients_on_both_sides_are_named_by_the_manifests(tmp_path):
    from guided_diffusion.data import manifest

    for part, name in (("train", "x"), ("val", "y"), ("val", "z")):
        write(tmp_path / "in" / part, name, masks(3, 3), seed=ord(name))
    rows = [{"case": case, "part": part, "patient": patient, "source": "s"} for case, part, patient in (
        ("x", "train", "P1"), ("y", "val", "P1"), ("z", "val", "P2"))]
    manifest.write(tmp_path / "in" / "manifest.csv", rows)
    text = contents.check(tmp_path / "in", tmp_path / "out", OPTIONS)
    assert "patient P1 of the source s: has cases in train (x) and in val (y)" in text and "P2" not in text
    assert json.loads((tmp_path / "out" / "check.json").read_text())["table"]["all"]["patients"] == 2


def test_a_folder_without_readable_cases_is_refused(tmp_path):
    assert "no such folder" in refusal(contents.check, tmp_path / "none", tmp_path / "out", OPTIONS)
    write(tmp_path / "in", "a", masks(3, 3))
    (tmp_path / "in" / "a" / "image_0.png").write_bytes(b"")
    assert "none of its 1 cases can be read" in refusal(contents.check, tmp_path / "in", tmp_path / "out", OPTIONS)


def test_a_set_of_single_raters_has_no_distance(tmp_path):
    write(tmp_path / "in", "a", masks(3))
    text = contents.check(tmp_path / "in", tmp_path / "out", OPTIONS)
    assert "every case has one rater" in text


def test_volumes_are_read_as_training_would_read_them(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    folder = tmp_path / "in" / "p1"
    folder.mkdir(parents=True)
    scan = np.random.default_rng(0).normal(size=(6, 5, 4)).astype(np.float32)
    for name, numbers in (("image_0", scan), ("label0_", (scan > 1).astype(np.uint8))):
        nibabel.save(nibabel.Nifti1Image(numbers, np.eye(4)), folder / f"{name}.nii")
    assert "give --normalise" in refusal(contents.check, tmp_path / "in", tmp_path / "out", OPTIONS)
    contents.check(tmp_path / "in", tmp_path / "out", {**OPTIONS, "normalise": "minmax", "context": 1})
    table = json.loads((tmp_path / "out" / "check.json").read_text())["table"]["all"]
    assert table["cases"] == 4 and table["channels"] == "3 of 16 bits"
