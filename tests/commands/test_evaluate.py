"""Scoring as users run it agrees with sampling that scores, or says what is wrong."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.files import ROOT, save, tree
from PIL import Image

from guided_diffusion import metrics
from guided_diffusion.data import manifest
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.methods.cimd import CIMD
from guided_diffusion.system import terminal

SCRIPT = ROOT / "scripts" / "segmentation_evaluate.py"
FILES = ["best.png", "report.html", "scores.csv", "scores.json", "scores.png", "worst.png"]


def predict(data, folder, members=4, pattern="{case}_output{i}.png"):
    """Masks for every case of a data folder: the first rater's, moved about."""
    for case in sorted(path for path in data.iterdir() if path.is_dir()):
        mask = np.asarray(Image.open(case / "label0_.png"))
        for i in range(members):
            save(folder / pattern.format(case=case.name, i=i), np.roll(mask, (i, -i), (0, 1)))
    return folder


@pytest.fixture
def evaluate(run, data):
    """evaluate(*flags) scores the masks in "masks" and writes to "scores"."""
    return lambda *flags: run(SCRIPT.name, "--data_dir", data, "--samples_dir", "masks", "--output_dir", "scores",
                              *flags)


# ---- what is scored and written ----

def test_masks_of_any_model_are_scored_by_their_pattern(evaluate, data, tmp_path, undrawn):
    predict(data, tmp_path / "masks", 5, "{case}/mask_{i:02d}.png")
    before = tree(tmp_path / "masks")
    result = evaluate("--pattern", "{case}/mask_{i:02d}.png", "--ensemble_sizes", "2")
    assert result.code == 0 and result.err == "" and tree(tmp_path / "masks") == before
    assert sorted(tree(tmp_path / "scores")) == FILES
    assert "3 cases of 3 patients, 5 masks and 1 to 4 raters" in result.out and "| GED " in result.out
    header, *rows = [line.split(",") for line in (tmp_path / "scores" / "scores.csv").read_text().splitlines()]
    for i, row in enumerate(rows):
        case = SegmentationCases(data, 16)[i]
        masks = [np.asarray(Image.open(tmp_path / "masks" / case.name / f"mask_0{k}.png")) > 0 for k in range(5)]
        expected = [score.item() for score in metrics.scores(np.stack(masks), case.raters).values()]
        assert row[0] == case.name and [float(cell) for cell in row[4:18]] == pytest.approx(expected, abs=1e-12)
    assert len(rows) == 3 and header[18] == "GED_2"


def test_scoring_says_how_far_it_is_and_then_how_to_look_at_the_scores(evaluate, data, tmp_path, undrawn, monkeypatch):
    monkeypatch.setattr(terminal, "FIRST", 0)
    predict(data, tmp_path / "masks", 2)
    result = evaluate()
    assert result.err.splitlines()[-1].startswith("scoring: 3 of 3 cases (100 %)")
    assert result.out.endswith(f"\npython -m webbrowser {(tmp_path / 'scores' / 'report.html').as_uri()}\n")
    assert f"| means and intervals    {Path('scores', 'scores.json')}\n" in result.out


def test_scores_go_beside_the_masks_by_default_and_again_over_the_old_ones(evaluate, data, tmp_path, undrawn):
    predict(data, tmp_path / "masks")
    assert evaluate("--output_dir", "").code == 0
    first = tree(tmp_path / "masks")
    assert set(FILES) < set(first) and not (tmp_path / "scores").exists()
    assert evaluate("--output_dir", "", "--ensemble_sizes", "", "--seed", 1).code == 0
    second = tree(tmp_path / "masks")
    assert second.keys() == first.keys() and second["scores.csv"] != first["scores.csv"]


def test_patients_are_those_of_the_manifest_unless_a_pattern_is_given(run, sample, evaluate, data, tmp_path, undrawn):
    names = sorted(case.name for case in data.iterdir())
    predict(data, tmp_path / "masks", 2)
    manifest.write(data / manifest.FILE, [
        {"case": name, "part": "", "patient": patient, "source": "x", "series": series}
        for name, patient, series in zip(names, ("ann", "ann", ""), ("", "", "s1"))])

    def patients():
        return [line.split(",")[1] for line in (tmp_path / "scores" / "scores.csv").read_text().splitlines()[1:]]

    assert "3 cases of 2 patients" in evaluate().out and patients() == ["ann", "ann", "s1"]
    assert "3 cases of 3 patients" in evaluate("--patient_pattern", r"\D*\d+").out and patients()[0] != "ann"
    both = run(SCRIPT.name, "masks", "masks", "--data_dir", data)
    assert "3 cases of 2 patients" in both.out
    assert "3 cases of 2 patients" in sample("drawn", "--evaluate", "True").out


def test_whole_volumes_are_scored_beside_their_slices_where_asked(run, evaluate, data, tmp_path, undrawn):
    names = sorted(case.name for case in data.iterdir())
    predict(data, tmp_path / "masks", 2)
    assert "--volumes True: neither the files" in evaluate("--volumes", "True").err
    manifest.write(data / manifest.FILE, [{"case": name, "part": "", "patient": "p", "volume": name == names[0],
                                           "slice": i} for i, name in enumerate(names)])
    result = evaluate("--volumes", "True")
    assert result.code == 0 and "| whole volumes: 1, 1 left out" in result.out, result.err
    assert json.loads((tmp_path / "scores" / "scores.json").read_text())["volumes"]["left_out"] == ["False"]
    assert sorted(tree(tmp_path / "scores")) == sorted([*FILES, "scores_volumes.csv"])
    assert evaluate().code == 0 and sorted(tree(tmp_path / "scores")) == FILES  # none of earlier scores is left


def test_sampling_and_scoring_give_what_sampling_with_scores_gives(run, evaluate, undrawn, data, trained, tmp_path):
    flags = ["--data_dir", data, "--model_path", trained / "savedmodel.pt", "--num_ensemble", 5, "--batch_size", 4,
             "--timestep_respacing", 3, "--seed", 7]
    assert run("segmentation_sample.py", *flags, "--results_dir", "masks").code == 0
    assert evaluate("--seed", 7).code == 0
    direct = [*flags, "--results_dir", "direct", "--evaluate", "True"]
    result = run("segmentation_sample.py", *direct)
    assert result.code == 0 and "3 cases of 3 patients, 5 masks" in result.out and "montage" not in result.out
    assert tree(tmp_path / "direct") == tree(tmp_path / "scores") and sorted(tree(tmp_path / "scores")) == FILES
    assert "GED_4" in (tmp_path / "scores" / "scores.csv").read_text()
    others = ["--patient_pattern", "[a-z]+", "--ensemble_sizes", "2,5"]
    assert evaluate("--seed", 7, *others, "--output_dir", "others").code == 0
    assert "3 cases of 1 patients, 5 masks" in run("segmentation_sample.py", *direct, *others).out
    assert tree(tmp_path / "direct") == tree(tmp_path / "others") != tree(tmp_path / "scores")
    refused = run("segmentation_sample.py", *direct, "--ensemble_sizes", 6)
    assert refused.code == 2 and "--ensemble_sizes 6: sizes of sub-ensembles go from 1 to 5" in refused.err
    again = run("segmentation_sample.py", *flags, "--results_dir", "masks", "--evaluate", "True")
    assert "0 of them already complete" in again.out  # masks that are there may be another model's
    assert (tmp_path / "masks" / "scores.csv").read_bytes() == (tmp_path / "scores" / "scores.csv").read_bytes()


def stacked(folder):
    """Make the cases of a folder, of as many raters each, slices of one volume and one of another."""
    names = sorted(case.name for case in folder.iterdir())
    manifest.write(folder / manifest.FILE, [
        {"case": name, "part": "", "patient": f"p{i // 2}", "volume": f"v{i // 2}", "slice": i}
        for i, name in enumerate(names)])
    return folder


def test_sampling_scores_whole_volumes_as_scoring_does(run, undrawn, make_cases, trained, tmp_path):
    data = stacked(make_cases(tmp_path / "scans", count=3))
    flags = ["--data_dir", data, "--model_path", trained / "savedmodel.pt", "--num_ensemble", 2,
             "--timestep_respacing", 2]
    assert run("segmentation_sample.py", *flags, "--results_dir", "masks").code == 0
    assert run(SCRIPT.name, "masks", "--data_dir", data, "--output_dir", "scores", "--volumes", "True").code == 0
    result = run("segmentation_sample.py", *flags, "--results_dir", "direct", "--evaluate", "True", "--volumes", "True")
    assert result.code == 0 and "| whole volumes: 2 " in result.out
    assert tree(tmp_path / "direct") == tree(tmp_path / "scores") and "v1" in (
        tmp_path / "direct" / "scores_volumes.csv").read_text()
    refused = run("segmentation_sample.py", *flags, "--results_dir", "masks", "--volumes", "True")
    assert refused.code == 2 and "--volumes: for scores only" in refused.err


def test_sampling_with_scores_needs_raters_before_it_draws_anything(run, make_cases, trained, tmp_path):
    scans = make_cases(tmp_path / "scans", raters=[0, 0])
    result = run("segmentation_sample.py", "--data_dir", scans, "--model_path", trained / "savedmodel.pt",
                 "--results_dir", "results", "--evaluate", "True")
    assert result.code == 2 and f"{scans / 'case1'}: no labels" in result.err and result.err.count("\n") == 3
    assert result.out == "" and not (tmp_path / "results").exists()


@pytest.mark.long
def test_two_processes_write_what_one_writes(evaluate, make_cases, environment, data, tmp_path):
    for folder in make_cases(tmp_path / "more", 6, seed=1).iterdir():
        folder.rename(data / f"more-{folder.name}")
    predict(data, tmp_path / "masks")
    assert evaluate().code == 0
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             SCRIPT, "--data_dir", data, "--samples_dir", "masks", "--output_dir", "two"],
                            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("9 cases of 9 patients") == 1
    one, two = tree(tmp_path / "scores"), tree(tmp_path / "two")
    assert one == two and sorted(one) == FILES


# ---- masks that are no independent draws ----

def test_spread_masks_are_known_as_such_wherever_they_are_scored(run, evaluate, undrawn, data, trained, tmp_path,
                                                                 monkeypatch):
    monkeypatch.setattr(CIMD, "independent", False)
    flags = ["--data_dir", data, "--model_path", trained / "savedmodel.pt", "--num_ensemble", 2,
             "--timestep_respacing", 2]
    assert run("segmentation_sample.py", *flags, "--results_dir", "masks").code == 0
    result = evaluate()
    assert result.code == 0 and "| GED spread " in result.out and "ECE" not in result.out.split("left out", 1)[1]
    assert run("segmentation_sample.py", *flags, "--results_dir", "direct", "--evaluate", "True").code == 0
    assert tree(tmp_path / "direct") == tree(tmp_path / "scores")
    predict(data, tmp_path / "others", 2)
    result = run(SCRIPT.name, "masks", "others", "--data_dir", data)
    assert result.code == 0 and "| GED (A spread, B independent) " in result.out and "| ECE " not in result.out
    # a run with other flags, stopped after its first case
    monkeypatch.setattr(CIMD, "independent", True)
    assert run("segmentation_sample.py", *flags, "--seed", 1, "--num_samples", 1, "--results_dir", "masks").code == 0
    mixed = evaluate()
    assert mixed.code == 2 and "the masks of case0 are independent draws, and those of case2 are spread" in mixed.err
    assert run("segmentation_sample.py", *flags, "--seed", 1, "--results_dir", "masks").code == 0
    result = evaluate()
    assert result.code == 0 and "| ECE " in result.out and "spread evenly" not in result.out


# ---- two folders ----

def test_two_folders_are_compared_case_by_case(run, data, tmp_path):
    predict(data, tmp_path / "a", 4)
    predict(data, tmp_path / "b", 2)
    for i in range(4):
        (tmp_path / "a" / f"case1_output{i}.png").unlink()
    result = run(SCRIPT.name, "a", "b", "--data_dir", data, "--ensemble_sizes", "2", "--output_dir", "out")
    assert result.code == 0 and result.err == ""
    assert "left out, since only b has their masks: 1 cases, case1\n" in result.out
    assert "A: a, 4 masks a case, independent" in result.out and "2 cases of 2 patients" in result.out
    summary = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert summary["2"]["GED"]["B"] == summary["all"]["GED"]["B"] and summary["members"] == [[4, 4], [2, 2]]
    scores = []
    for folder in ("a", "b"):
        run(SCRIPT.name, folder, "--data_dir", data, "--skip_missing", "True")
        rows = [line.split(",") for line in (tmp_path / folder / "scores.csv").read_text().splitlines()]
        scores.append({row[0]: float(row[rows[0].index("GED")]) for row in rows[1:]})
    differences = [scores[0][case] - scores[1][case] for case in ("case0", "case2")]
    assert summary["all"]["GED"]["A less B"] == pytest.approx({
        "mean": np.mean(differences), "low": min(differences), "high": max(differences)})
    before = tree(tmp_path)
    assert run(SCRIPT.name, "--data_dir", data, "b", "a").code == 0 and tree(tmp_path) == before


def test_whole_volumes_of_two_folders_are_compared(run, make_cases, tmp_path):
    data = stacked(make_cases(tmp_path / "scans", count=4))
    for folder, members in (("a", 3), ("b", 2)):
        predict(data, tmp_path / folder, members)
        assert run(SCRIPT.name, folder, "--data_dir", data, "--volumes", "True").code == 0
    result = run(SCRIPT.name, "a", "b", "--data_dir", data, "--output_dir", "out", "--volumes", "True")
    assert result.code == 0 and "| whole volumes: 2 " in result.out, result.err
    whole = json.loads((tmp_path / "out" / "comparison.json").read_text())["volumes"]
    assert whole["volumes"] == 2 and whole["left_out"] == []
    alone = [json.loads((tmp_path / folder / "scores.json").read_text())["volumes"]["scores"] for folder in "ab"]
    for name, score in whole["scores"].items():
        assert (score["A"], score["B"]) == (alone[0][name], alone[1][name])
        assert score["A less B"]["mean"] == pytest.approx(alone[0][name]["mean"] - alone[1][name]["mean"])


def test_folders_that_cannot_be_compared_are_refused(run, data, tmp_path):
    predict(data, tmp_path / "a", 1)
    save(tmp_path / "b" / "case1_output0.png", np.zeros((8, 8), np.uint8))
    (tmp_path / "c").mkdir()
    (tmp_path / "a" / "case1_output0.png").rename(tmp_path / "c" / "case1_output0.png")
    for folders, words in ((["a", "b", "c"], "one folder is scored, or two are compared"), (["a", "gone"], "gone"),
                           (["b", "c"], "case0 and 1 more: no masks to compare in b or c"),
                           (["a", "b"], "have masks of no case in common"),
                           (["b", "c", "--skip_missing", "True"], "is 8 x 8 pixels, but its raters' masks are 16 x 16"),
                           (["a", "--samples_dir", "b"], "name the folders")):
        result = run(SCRIPT.name, *folders, "--data_dir", data)
        assert result.code == 2 and result.err.count("\n") == 1 and words in result.err, result.err


# ---- bad input: exit code 2, a line each, and nothing written ----

def damage(how, data, masks):
    """Spoil data or masks; returns the flags to give, and what the message must say."""
    if how == "no masks":
        (masks / "case1_output0.png").unlink()
        (masks / "case1_output1.png").unlink()
        return [], ["case1: no masks to score"]
    if how == "another size":
        save(masks / "case1_output1.png", np.zeros((8, 8), np.uint8))
        return [], [f"case1: {Path('masks', 'case1_output1.png')} is 8 x 8"]
    if how == "no raters":
        (data / "case1" / "label0_.png").unlink()
        return [], [data / "case1", "no labels"]
    if how == "no binary masks":
        save(masks / "case0_output0.png", np.arange(256, dtype=np.uint8).reshape(16, 16))
        return [], ["case0: ", "case0_output0.png is no binary mask"]
    if how == "unreadable":
        (masks / "case1_output1.png").write_bytes(b"PNG")
        return [], ["case1_output1.png: cannot be read"]
    (masks.parent / "file").touch()
    return {"pattern": (["--pattern", "{case}/{i}.png"], ["--pattern {case}/{i}.png: matches no file", "masks"]),
            "samples_dir": (["--samples_dir", "gone"], ["--samples_dir gone"]),
            "output_dir": (["--output_dir", "file/x"], ["--output_dir file/x: cannot be written"]),
            "too many": (["--ensemble_sizes", "2,3"], ["--ensemble_sizes 2,3: ", "1 to 2"]),
            "too few": (["--ensemble_sizes", "0"], ["--ensemble_sizes 0: "]),
            "no numbers": (["--ensemble_sizes", "2,all"], ["--ensemble_sizes 2,all: "]),
            "patients": (["--patient_pattern", "(\\d"], ["--patient_pattern (\\d: "])}[how]


@pytest.mark.parametrize("how", ["no masks", "another size", "no raters", "no binary masks", "unreadable", "pattern",
                                 "samples_dir", "output_dir", "too many", "too few", "no numbers", "patients"])
def test_what_cannot_be_scored_is_refused_in_one_line(evaluate, data, tmp_path, how):
    masks = predict(data, tmp_path / "masks", 2)
    flags, words = damage(how, data, masks)
    before = tree(tmp_path)
    before.pop("scores", None)
    result = evaluate(*flags)
    assert result.code == 2 and result.err.count("\n") == 1 and ": error: " in result.err and result.out == ""
    assert all(str(word) in result.err for word in words), result.err
    after = tree(tmp_path)
    after.pop("scores", None)  # may be there, empty
    assert after == before


def test_all_bad_cases_are_listed_together(evaluate, data, tmp_path):
    masks = predict(data, tmp_path / "masks", 2)
    words = [word for how in ("another size", "no binary masks") for word in damage(how, data, masks)[1]]
    result = evaluate()
    assert result.code == 2 and result.err.count("\n") == 3 and "2 problems in masks:" in result.err
    assert all(str(word) in result.err for word in words) and not list((tmp_path / "scores").iterdir())


def test_missing_masks_may_be_skipped_but_no_size_of_ensemble(evaluate, data, tmp_path, undrawn):
    masks = predict(data, tmp_path / "masks", 2)
    damage("no masks", data, masks)
    result = evaluate("--skip_missing", "True")
    assert result.code == 0 and "2 cases of 2 patients" in result.out
    (masks / "case2_output1.png").unlink()
    assert "1 to 1, the fewest masks" in evaluate("--skip_missing", "True", "--ensemble_sizes", 2).err


def test_two_folders_of_one_case_name_are_refused(evaluate, data, tmp_path, undrawn):
    predict(data, tmp_path / "masks", 2)
    shutil.copytree(data / "case0", data / "a" / "b")
    shutil.copytree(data / "case0", data / "a_b")
    for i in range(2):
        shutil.copy(tmp_path / "masks" / f"case0_output{i}.png", tmp_path / "masks" / f"a_b_output{i}.png")
    result = evaluate()
    assert result.code == 2 and "names the same case" in result.err
