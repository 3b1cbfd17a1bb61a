"""cimd-prepare on the command line: what it says, what it refuses, and that training reads what it wrote."""

import re

import numpy as np
import pytest
from helpers.files import save
from helpers.processes import TRAIN
from helpers.refusals import refused

from guided_diffusion.prepare import SOURCES

PREPARE = "prepare_data.py"
PATTERNS = ["--images", "i/{patient}/{case}.png", "--masks", "m/{patient}/{case}_0.png", "m/{patient}/{case}_1.png"]


@pytest.fixture
def pictures(tmp_path):
    """A folder of 4 patients with 2 cases of 16 x 16 pixels each, and 2 raters."""
    rng = np.random.default_rng(0)
    for i in range(8):
        save(tmp_path / "in" / "i" / f"p{i // 2}" / f"{i}.png", rng.integers(0, 256, (16, 16), np.uint8))
        for rater in range(2):
            mask = np.zeros((16, 16), np.uint8)
            mask[4:8 + rater, 4:10] = 255
            save(tmp_path / "in" / "m" / f"p{i // 2}" / f"{i}_{rater}.png", mask)
    return tmp_path / "in"


def test_help_has_every_source_and_each_teaches_with_an_example(run):
    everything = run(PREPARE, "--help").out
    for name, entry in SOURCES.entries.items():
        assert re.search(rf"^ +{name} ", everything, re.MULTILINE)
        text = run(PREPARE, name, "--help").out
        assert f"{PREPARE} {name} " in text and "--split" in text
        assert all(f"--{flag.name}" in text for flag in entry.flags)
    assert "check.png" in run(PREPARE, "check", "--help").out


def test_what_is_prepared_is_checked_and_trained_on_and_never_both_sides_of_a_split(run, pictures, tiny, tmp_path):
    result = run(PREPARE, "pictures", pictures, "out", *PATTERNS, "--split", "50:25:25", "--num_workers", 1)
    assert result.code == 0, result.err
    for words in ("8 cases in out", "by patient", "4 cases of 2 patients", "manifest.csv"):
        assert words in result.out, result.out
    assert result.out.strip().splitlines()[-1].endswith("prepare_data.py check out results/check")
    checked = run(PREPARE, "check", "out", "results/check")
    assert checked.code == 0 and "nothing wrong" not in checked.err and "best GED of 16 masks" in checked.out

    flags = [*tiny, "--max_steps", 1, "--image_channels", 4, "--sample_interval", 1]
    trained = run(TRAIN, "--data_dir", "out/train", "--val_dir", "out/val", "--results_dir", "r", *flags)
    assert trained.code == 0, trained.err
    run(PREPARE, "pictures", pictures, "whole", *PATTERNS, "--num_workers", 1)
    refused(run(TRAIN, "--data_dir", "out/train", "--val_dir", "whole", "--results_dir", "s", *flags),
            "--val_dir whole: shares patient p", "--data_dir out/train")
    assert not (tmp_path / "s").exists()


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(run, pictures, tmp_path):
    result = run(PREPARE, "pictures", pictures, "out", *PATTERNS, "--split", "50:25:25", "--dry_run", "True",
                 "--num_workers", 1)
    assert result.code == 0, result.err
    assert "would write about 8 cases to out" in result.out and "disk" in result.out and "2 patients" in result.out
    assert not (tmp_path / "out").exists()


def test_what_is_left_out_is_listed_and_the_same_command_goes_on(run, pictures):
    (pictures / "i" / "p0" / "0.png").write_bytes(b"")
    words = ["pictures", pictures, "out", *PATTERNS, "--num_workers", 1]
    result = run(PREPARE, *words)
    assert result.code == 0 and "7 cases in out" in result.out
    assert re.search(r"left out +1\n.*p0/0.png: cannot be read", result.out)
    save(pictures / "i" / "p0" / "0.png", np.zeros((16, 16), np.uint8))
    again = run(PREPARE, *words)
    assert "8 cases in out" in again.out and "7 of 8 units" in again.out and "left out" not in again.out
    refused(run(PREPARE, *words, "--missing_masks", "empty"), "--missing_masks empty (there: leave_out)")


@pytest.mark.parametrize("words, message", [
    ([], "KIND"), (["dicoms", "in", "out"], "dicoms"), (["pictures", "in"], "OUT"),
    (["pictures", "nowhere", "out"], "INPUT nowhere: no such file"),
    (["pictures", "in", "out", "--image", "a"], "did you mean --images?"),
    (["crops", "in", "out", "--masks", "a"], "unknown flag --masks"),
    (["crops", "in", "out", "--seed", "1"], "--seed 1: only a split"),
    (["crops", "in", "out", "--num_workers", "-1"], "--num_workers -1: must be at least 0"),
    (["crops", "in", "out", "--split", "60:40"], "--split 60:40"),
    (["crops", "in", "in/file/out"], "OUT in/file/out: cannot be written"),
    (["crops", "in", "out", "--plugin", "none.py"], "--plugin none.py: no such file"),
    (["check", "in", "out"], "holds no case")])
def test_bad_input_is_refused_in_a_line(run, tmp_path, words, message):
    (tmp_path / "in" / "images" / "p").mkdir(parents=True)
    (tmp_path / "in" / "file").touch()
    if words[:1] == ["check"]:
        (tmp_path / "in" / "images" / "p").rmdir()
        (tmp_path / "in" / "images").rmdir()
    refused(run(PREPARE, *words), message)
    assert not (tmp_path / "out").exists()
