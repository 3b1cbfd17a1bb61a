"""The speed benchmark runs as documented, at a small scale; what it measures is not tested, only that it is there."""

import json
import subprocess
import sys

import pytest
from helpers.files import ROOT


@pytest.fixture
def speed(environment, tmp_path):
    def call(*flags):
        tiny = ["--image_size", "32", "--num_channels", "32", "--threads", "1", "--rounds", "1"]
        command = [sys.executable, ROOT / "benchmarks" / "speed.py", *tiny, *flags]
        return subprocess.run(command, cwd=tmp_path, text=True, env={**environment, "OMP_NUM_THREADS": "1"},
                              capture_output=True)

    return call


def test_every_part_is_measured_and_written(speed, tmp_path):
    done = speed("--batch_size", "2", "--train_batch_size", "2", "--output_dir", "out")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out" / "speed.md").read_text()
    assert text.strip() in done.stdout and "torch" in text.splitlines()[0] and "1 CPU threads" in text.splitlines()[0]
    assert (tmp_path / "out" / "speed.png").read_bytes().startswith(b"\x89PNG")
    parts = json.loads((tmp_path / "out" / "speed.json").read_text())["parts"]
    assert list(parts) == ["ceilings", "unet", "profile", "training", "ensemble", "memory", "loader"]
    for part, rows in parts.items():
        assert len(rows) > 1 and (rows[0]["ratio"] == 1 or part == "profile")
        for row in rows:
            assert row["variant"] in text and row["ratio"] > 0 and len(row["rounds"]) == 1 and row["rounds"][0] > 0
    for row in parts["ensemble"]:
        assert ("EXTRAPOLATED" in row["how found"]) == ("1000 ancestral steps" in row["variant"])
    assert parts["ensemble"][2]["ratio"] == 1  # 16 masks have a first variant of their own
    _, *kinds = parts["profile"]
    assert sum(row["rounds"][0] for row in kinds) == pytest.approx(parts["profile"][0]["rounds"][0])
    for row in parts["unet"] + parts["training"]:
        assert row["% of convolution"] > 0 and row["% of product"] > 0


def test_parts_are_chosen_and_mistakes_refused(speed, tmp_path):
    done = speed("--rounds", "2", "--parts", "loader", "--output_dir", "out")
    assert done.returncode == 0, done.stderr
    parts = json.loads((tmp_path / "out" / "speed.json").read_text())["parts"]
    assert list(parts) == ["loader"] and [len(row["rounds"]) for row in parts["loader"]] == [2, 2, 2]
    for flags in (["--parts", "loader,unets"], ["--rounds", "0"]):
        assert speed(*flags).returncode == 2
