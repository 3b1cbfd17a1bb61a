"""Weights that come with the package are whole, described, and found by their names wherever weights are named."""

import shutil

import numpy as np
import pytest
from helpers.files import ROOT
from helpers.processes import SAMPLE
from helpers.refusals import refusal, refused

from guided_diffusion import Segmenter, checkpoint, pretrained

HEADINGS = ["What it is", "Data", "Input", "Training", "Scores", "What it must not be used for"]


@pytest.fixture
def copied(monkeypatch, tmp_path):
    """The folder of the weights as a copy, to be damaged."""
    shutil.copytree(pretrained.FOLDER, tmp_path / "copy")
    monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.parametrize("name", pretrained.names())
def test_each_is_whole_small_and_described(name):
    path = pretrained.FOLDER / f"{name}.safetensors"
    assert pretrained.path_of(f"pretrained:{name}") == str(path) and path.stat().st_size < 10 << 20
    card = path.with_suffix(".md").read_text(encoding="utf-8")
    assert [line[3:] for line in card.splitlines() if line.startswith("## ")] == HEADINGS
    said = checkpoint.metadata_of(path)
    assert {"flags", "method", "step", "data", "licence"} <= said.keys()
    assert f"pretrained/{name}.md" in (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", pretrained.names())
def test_each_draws_as_soon_as_the_package_is_installed(name):
    segmenter = Segmenter.pretrained(name, device="cpu")
    side = segmenter.flags["image_size"]
    image = np.random.default_rng(0).random((side, side))
    ensemble = segmenter.sample(image, num_ensemble=2)
    assert ensemble.masks.shape == (2, side, side) and np.isfinite(ensemble.samples).all()
    again = Segmenter.load(f"pretrained:{name}", device="cpu").sample(image, num_ensemble=2)
    assert np.array_equal(again.samples, ensemble.samples)


def test_there_is_no_file_without_weights():
    kinds = {path.suffix: set() for path in pretrained.FOLDER.iterdir() if path.is_file()}
    for suffix in kinds.keys() - {".py"}:
        assert sorted(path.stem for path in pretrained.FOLDER.glob(f"*{suffix}")) == pretrained.names()
    assert kinds.keys() == {".py", ".safetensors", ".sha256", ".md"}


@pytest.mark.parametrize("path", ["", "results/savedmodel.pt", "gs://bucket/a.pt", "phantoms", "a/pretrained:phantoms"])
def test_other_paths_stay_as_they_are(path):
    assert pretrained.path_of(path) == path


@pytest.mark.parametrize("name", ["lung", "", "../pretrained/phantoms", "phantoms.safetensors", "Phantoms"])
def test_an_unknown_name_is_refused_with_those_there_are(name):
    message = refusal(pretrained.path_of, f"pretrained:{name}")
    assert message.startswith(f"pretrained:{name}: ") and "pretrained:phantoms" in message


def test_a_file_that_does_not_agree_with_its_checksum_is_refused_wherever_named(run, copied, make_cases, tmp_path):
    path = copied / "phantoms.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    for message in (refusal(pretrained.path_of, "pretrained:phantoms"), refusal(Segmenter.pretrained, "phantoms"),
                    refusal(Segmenter.load, "pretrained:phantoms")):
        assert message.startswith(f"pretrained:phantoms: {path} does not agree with the SHA-256 in phantoms.sha256")
    cases = make_cases(tmp_path / "data")
    refused(run(SAMPLE, "--data_dir", cases, "--model_path", "pretrained:phantoms"), path, "SHA-256")
    assert not (tmp_path / "results").exists()
    path.with_suffix(".sha256").unlink()
    assert "phantoms.sha256" in refusal(pretrained.path_of, "pretrained:phantoms")


def test_sampling_takes_a_name_and_refuses_flags_of_another_model(run, make_cases, tmp_path):
    data = make_cases(tmp_path / "data", size=64)
    flags = ["--data_dir", data, "--model_path", "pretrained:phantoms", "--num_ensemble", 2]
    result = run(SAMPLE, *flags, "--results_dir", "a")
    assert result.code == 0, result.err
    assert (tmp_path / "a" / "case1_output1.png").exists()
    assert "2 of them already complete" in run(SAMPLE, *flags, "--results_dir", "a").out
    refused(run(SAMPLE, *flags, "--results_dir", "b", "--image_size", 32), "--image_size 32 (there: 64)",
            "phantoms.safetensors")
    assert not (tmp_path / "b").exists()
