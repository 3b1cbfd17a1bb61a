"""The checks of the torture benchmark find what they look for."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers.files import ROOT
from PIL import Image

from guided_diffusion import checkpoint


@pytest.fixture
def torture(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import torture

    return torture


@pytest.fixture
def runs(tmp_path):
    """Two equal folders of a run of two steps, and one step that only the second has saved."""
    for name in ("results", "reference"):
        folder = tmp_path / name
        folder.mkdir()
        for step in (1, 2) if name == "reference" else (2,):
            weights = {"w": torch.arange(8.0), "nan": torch.tensor(float("nan"))}
            checkpoint.save(folder / checkpoint.model_name(step), weights)
            checkpoint.save(folder / checkpoint.opt_name(step), {"step": step, "moments": [torch.zeros(3)]})
        checkpoint.save(folder / checkpoint.NEWEST, weights)
        rows = [{"step": step, "loss": 1 / 3, "seconds": time.time()} for step in (1, 2)]
        (folder / "progress.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def wrong(torture, folder):
    try:
        torture.check_training(folder, folder / "reference", kept=[2])
    except torture.Wrong as error:
        return str(error)
    return ""


def test_equal_runs_are_equal_whatever_their_clocks_say(torture, runs):
    assert wrong(torture, runs) == ""


def test_another_weight_moment_row_or_file_is_reported(torture, runs):
    results = runs / "results"
    model, rest = results / checkpoint.model_name(2), results / checkpoint.opt_name(2)
    for path, state, words in (
            (model, {"w": torch.arange(8.0) + 1e-7 * torch.arange(8), "nan": torch.tensor(float("nan"))}, "w: another"),
            (rest, {"step": 2, "moments": [-torch.zeros(3)]}, "moments [0]: another tensor"),
            (rest, {"step": 3, "moments": [torch.zeros(3)]}, "step: 3, not 2"),
            (rest, {"step": 2, "moments": []}, "moments: 0 items, not 1")):
        before = path.read_bytes()
        checkpoint.save(path, state)
        assert f"{path.name} {words}" in wrong(torture, runs)
        path.write_bytes(before)
    rows = (results / "progress.json").read_text()
    for found, words in ((rows.replace("0.3333333333333333", "0.3333333333333334", 1), "[0] loss"),
                         (rows + rows.splitlines()[-1] + "\n", "the steps [1, 2, 2]"), ("", "the steps []"),
                         (rows.replace('"loss"', '"los"', 1), "is in one only")):
        (results / "progress.json").write_text(found)
        assert words in wrong(torture, runs)
    (results / "progress.json").write_text(rows)
    for name, words in ((".savedmodel.pt.7.partial", "is left over"), (checkpoint.opt_name(1), "is left over")):
        (results / name).touch()
        assert f"{name} {words}" in wrong(torture, runs)
        (results / name).unlink()
    rest.unlink()
    assert f"{rest.name} is missing" in wrong(torture, runs)


def test_another_pixel_is_reported(torture, tmp_path):
    for name in ("results", "reference"):
        pixels = np.zeros((4, 4), np.uint8)
        pixels[0, 0] = 255 * (name == "results")
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "case_output0.png")
    found = torture.file_differences(tmp_path / "results", tmp_path / "reference", {"case_output0.png"})
    assert found == ["case_output0.png differs"]


def test_a_damaged_checkpoint_is_reported(torture, runs):
    results = runs / "results"
    assert torture.broken_checkpoint(results) == []
    for name in (checkpoint.NEWEST, checkpoint.opt_name(2)):
        before = (results / name).read_bytes()
        (results / name).write_bytes(before[:-100])
        assert name in "".join(torture.broken_checkpoint(results))
        (results / name).write_bytes(before)


def test_files_that_are_not_whole_are_told_from_those_of_before(torture, runs):
    results = runs / "results"
    assert torture.unfinished_files(results, torture.incomplete_checkpoints) == set()
    (results / checkpoint.opt_name(4)).touch()
    (results / ".savedmodel.pt.7.partial").touch()
    found = torture.unfinished_files(results, torture.incomplete_checkpoints)
    assert {name for name, _ in found} == {checkpoint.opt_name(4), ".savedmodel.pt.7.partial"}
    assert torture.incomplete_cases({"a_output0.png": 1, "a_ensemble.npz": 2, "b_mean.png": 3}) == ["b_mean.png"]


def test_a_process_that_outlives_its_launcher_is_found_and_ended(torture, tmp_path):
    orphan = f"import signal, time; signal.signal({int(signal.SIGTERM)}, signal.SIG_IGN); time.sleep(60)"
    launcher = (f"import os, subprocess, sys; subprocess.Popen([sys.executable, '-c', {orphan!r}, {str(tmp_path)!r}],"
                f" env={{**os.environ, 'RANK': '1'}}, start_new_session=True)")
    process = subprocess.Popen([sys.executable, "-c", launcher])
    process.wait()
    assert list(torture.processes_of(tmp_path).values()) in ([1], [None])  # None until it is Python
    with pytest.raises(torture.Wrong, match=r"after 0\.5 s there still were"):
        torture.finish(process, tmp_path, 0.5)
    assert torture.processes_of(tmp_path) == {}
