"""The jobs one after the other: where their results go, and the command that each prints for the next."""

import json
import shlex
from pathlib import Path

from helpers.files import ROOT
from helpers.processes import SAMPLE, TRAIN


def test_results_go_to_the_environments_folder_and_the_flag_wins(run, data, tiny, trained, tmp_path, monkeypatch):
    flags = ["--data_dir", data, *tiny, "--max_steps", 1, "--num_filters", "8,16"]
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "from-environment"))
    assert run(TRAIN, *flags).code == 0
    assert (tmp_path / "from-environment" / "savedmodel000001.pt").exists()
    assert (tmp_path / "from-environment" / "log.txt").exists() and not (tmp_path / "results").exists()
    assert run(TRAIN, *flags, "--results_dir", tmp_path / "from-flag").code == 0
    assert (tmp_path / "from-flag" / "savedmodel000001.pt").exists() and (tmp_path / "from-flag" / "log.txt").exists()
    monkeypatch.delenv("OPENAI_LOGDIR")
    assert run(TRAIN, *flags).code == 0
    assert (tmp_path / "results" / "savedmodel000001.pt").exists()


def test_a_bucket_holds_a_whole_run(run, train, data, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "logs"))
    folder = "gs://bucket/run"
    assert train(folder, "--max_steps", 1).code == 0
    result = train(folder, "--max_steps", 2)
    assert result.code == 0 and "resumed at step 1" in result.out
    result = run(SAMPLE, "--data_dir", data, "--results_dir", folder, "--num_ensemble", 2, "--timestep_respacing", 3)
    assert result.code == 0, result.err
    again = run(SAMPLE, "--data_dir", data, "--results_dir", folder, "--num_ensemble", 2, "--timestep_respacing", 3)
    assert "3 of them already complete" in again.out
    assert {f"{folder}/{name}" for name in ("savedmodel000002.pt", "savedmodel.pt", "flags.json", "case0_montage.png",
                                            "emasavedmodel_0.9999_000001.pt", "case2_output1.png")} <= set(bucket)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "logs"]
    assert "saved step 2" in (tmp_path / "logs" / "log.txt").read_text()


def test_the_next_command_can_be_pasted_from_training_to_scores(run, make_cases, tmp_path, tiny):
    """What training and sampling print last runs as it stands, in folders whose names need quotes, too."""
    data = make_cases(tmp_path / "my scans" / "training", size=20)
    make_cases(tmp_path / "my scans" / "testing", count=3, size=20)
    result = run("segmentation_train.py", "--data_dir", data, "--results_dir", "my results", *tiny, "--max_steps", 1,
                 "--fit", "crop")
    for script in ("segmentation_sample.py", "segmentation_evaluate.py"):
        assert result.code == 0, result.err
        *_, word, line = result.out.strip().splitlines()
        python, path, *flags = shlex.split(line)
        assert word == "next:" and Path(path) == ROOT / "scripts" / script and Path(python).name.startswith("python")
        result = run(script, *flags)
    assert result.code == 0 and (tmp_path / "my results" / "report.html").exists()
    assert json.loads((tmp_path / "my results" / "scores.json").read_text())["cases"] == 3
