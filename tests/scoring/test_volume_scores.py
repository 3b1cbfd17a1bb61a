"""Slices of one volume are scored as one mask."""

import csv

import numpy as np
import pytest
from helpers.files import save
from helpers.refusals import refusal

from guided_diffusion import metrics
from guided_diffusion.data import manifest
from guided_diffusion.data.case_files import CaseFiles, find_cases
from guided_diffusion.scoring.volume_scores import VolumeScores, by_volume, places_of

RNG = np.random.default_rng(0)
PLACES = {**{f"a_{i}": ("a", i) for i in range(3)}, **{f"b_{i}": ("b", i) for i in (9, 10)}, "c_1": ("c", 1)}


def masks(count, height=5, width=7):
    return RNG.random((count, height, width)) < 0.4


def scored(cases, places=PLACES):
    volumes = VolumeScores(places, {}, "cpu")
    for name, raters, predictions in cases:
        volumes.add(name, name[0], raters, predictions)
    volumes.gather()
    return volumes


def test_a_volume_has_the_scores_of_its_slices_as_one_mask():
    cases = [(name, masks(2), masks(3)) for name in ("a_2", "a_0", "a_1", "other", "b_9", "b_10")]
    volumes = scored(cases)
    assert [row[:5] for row in volumes.rows] == [("a", "a", 3, 2, 3), ("b", "b", 2, 2, 3)] and not volumes.left_out
    for row, chosen in zip(volumes.rows, (cases[:3], cases[4:])):
        raters, predictions = (np.stack([case[i] for case in chosen], 1) for i in (1, 2))  # [m, D, H, W]
        flat = metrics.scores(predictions.reshape(3, 1, -1), raters.reshape(2, 1, -1))
        assert row.scores == pytest.approx([value.item() for value in flat.values()], abs=1e-12)


def test_volumes_whose_slices_do_not_fit_each_other_are_left_out_by_name():
    fits = [("c_1", masks(2), masks(3))]
    for second in (("a_1", masks(3), masks(3)), ("a_1", masks(2), masks(4)), ("a_1", masks(2, 7, 5), masks(3, 7, 5)),
                   ("a_0", masks(2), masks(3))):
        volumes = scored([("a_0", masks(2), masks(3)), second, *fits])
        assert volumes.left_out == ["a"] and [row.volume for row in volumes.rows] == ["c"]
        assert volumes.summary(["GED"])["left_out"] == ["a"]


def test_the_manifest_and_the_files_say_which_slices_are_of_one_volume(tmp_path):
    for name in ("x", "y", "z"):
        save(tmp_path / name / "image_0.png", np.zeros((4, 4), np.uint8))
    cases = find_cases(tmp_path)
    assert "--volumes True" in refusal(places_of, cases)
    manifest.write(tmp_path / manifest.FILE, [
        {"case": name, "part": "", "slice": number, "volume": volume}
        for name, number, volume in (("x", 4, "v"), ("y", 7, "v"), ("z", "", ""))])
    assert places_of(cases) == {"x": ("v", 4), "y": ("v", 7)}
    assert [[case.name for case in group] for group in by_volume(cases, places_of(cases))] == [["x", "y"], ["z"]]
    assert places_of([CaseFiles("p_002", tmp_path / "p", [], [], volume="p", slice=2)]) == {"p_002": ("p", 2)}


def test_a_row_a_volume_and_means_over_patients_are_written(tmp_path):
    volumes = scored([(name, masks(2), masks(3)) for name in PLACES])
    summary = volumes.write(tmp_path, ["GED", "D_max"])
    rows = list(csv.DictReader((tmp_path / "scores_volumes.csv").open()))
    assert [(row["volume"], row["slices"]) for row in rows] == [("a", "3"), ("b", "2"), ("c", "1")]
    assert {*summary["scores"]} == {"GED", "D_max"} and {*rows[0]} == {
        "volume", "patient", "slices", "raters", "members", "GED", "D_max"}
    mean = np.mean([float(row["GED"]) for row in rows])
    score = summary["scores"]["GED"]
    assert score["mean"] == pytest.approx(mean) and score["low"] <= mean <= score["high"]
