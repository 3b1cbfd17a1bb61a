"""cimd-export: a checkpoint of this code or of the published one becomes one file that everything reads."""

import filecmp
import json
import shlex

import pytest
import torch
from helpers.files import ROOT
from helpers.models import MODEL, assert_same
from helpers.processes import TRAIN
from helpers.refusals import refused

from guided_diffusion import checkpoint
from guided_diffusion.script_util import create_model_and_diffusion

EXPORT = "segmentation_export.py"


def test_what_is_drawn_from_an_export_is_what_the_checkpoint_draws(run, sample, trained, tmp_path):
    out = tmp_path / "new" / "mine.safetensors"
    result = run(EXPORT, trained / "savedmodel.pt", out, "--dtype", "float32", "--facts", "data=blobs; licence=MIT = a")
    assert result.code == 0, result.err
    assert f"SHA-256            {tmp_path / 'new' / 'mine.sha256'}" in result.out
    assert shlex.split(result.out.strip().splitlines()[-1])[-2:] == ["--model_path", str(out)]
    said = checkpoint.metadata_of(out)
    assert (said["method"], said["data"], said["licence"]) == ("cimd", "blobs", "MIT = a")
    assert json.loads(said["flags"]).items() >= MODEL.items()
    assert not {"data_dir", "results_dir", "plugin"} & json.loads(said["flags"]).keys()  # nothing of this machine
    assert sample("a").code == 0 and sample("b", model=out).code == 0
    for name in ("case0_output0.png", "case2_output1.png", "case1_montage.png"):
        assert filecmp.cmp(tmp_path / "a" / name, tmp_path / "b" / name, shallow=False)
    refused(sample("c", "--image_size", 32, model=out), "--image_size 32 (there: 16)", f"the model in {out}")


def test_the_step_is_that_in_the_name_and_an_export_is_exported_again_as_it_was(run, trained, tmp_path):
    state = checkpoint.load(trained / "savedmodel.pt")
    checkpoint.save(tmp_path / "emasavedmodel_0.9_000012.pt", state)
    checkpoint.save_flags(tmp_path, MODEL)
    assert run(EXPORT, tmp_path / "emasavedmodel_0.9_000012.pt", "a.safetensors", "--facts", "data=x").code == 0
    assert run(EXPORT, "a.safetensors", "b.safetensors").code == 0
    first, second = (checkpoint.metadata_of(tmp_path / f"{name}.safetensors") for name in "ab")
    assert first == second and (first["step"], first["data"]) == ("12", "x")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_of_the_published_code_need_the_flags_of_their_model(run, trained, tiny, tmp_path, prefix):
    state = checkpoint.load(trained / "savedmodel.pt")
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "published.pt")
    refused(run(EXPORT, "published.pt", "a.safetensors"), "checkpoint published.pt", "give the flags it was trained")
    assert not (tmp_path / "a.safetensors").exists()
    assert run(EXPORT, "published.pt", "a.safetensors", "--dtype", "bfloat16", *tiny).code == 0
    model, _ = create_model_and_diffusion(**MODEL)
    checkpoint.load_model(model, tmp_path / "a.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name].bfloat16().float()), name
    assert checkpoint.flags_of(tmp_path / "a.safetensors")[0].items() >= MODEL.items()


def test_training_begins_from_an_export(train, run, trained, tmp_path):
    assert run(EXPORT, trained / "savedmodel.pt", "a.safetensors", "--dtype", "float32").code == 0
    result = train("results", "--resume_checkpoint", tmp_path / "a.safetensors", "--max_steps", 1, "--lr", 0)
    assert result.code == 0, result.err
    result = run(TRAIN, "--init", tmp_path / "a.safetensors", "--data_dir", tmp_path / "data", "--results_dir", "tuned",
                 "--max_steps", 1, "--lr", 0, "--num_filters", "8,16")
    assert result.code == 0, result.err  # with the flags of the model that the file says
    assert checkpoint.load_flags(tmp_path / "tuned").items() >= MODEL.items()
    before, *after = (checkpoint.load(path) for path in (
        trained / "savedmodel.pt", tmp_path / "results/savedmodel.pt", tmp_path / "tuned/savedmodel.pt"))
    for state in after:
        assert_same(dict(before), dict(state))


@pytest.mark.parametrize("words, message", [
    (["savedmodel.pt", "out.pt"], "out.pt: must end in .safetensors"),
    (["savedmodel.pt"], "OUT.safetensors"),
    (["nowhere.pt", "a.safetensors"], "checkpoint nowhere.pt: no such file"),
    (["savedmodel.pt", "a.safetensors", "--dtype", "int8"], "--dtype"),
    (["savedmodel.pt", "a.safetensors", "--facts", "licence"], "--facts licence: is not name=value"),
    (["savedmodel.pt", "a.safetensors", "--facts", "a=b; flags={}"], "--facts flags={}"),
    (["savedmodel.pt", "a.safetensors", "--image_size", "32"], "--image_size 32 (there: 16)"),
    (["pretrained:lung", "a.safetensors"], "pretrained:lung: no such weights"),
    (["savedmodel.pt", "savedmodel.pt/a.safetensors"], "OUT.safetensors savedmodel.pt: cannot be written")])
def test_bad_input_is_refused_and_nothing_written(run, trained, tmp_path, words, message):
    for path in trained.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = sorted(tmp_path.iterdir())
    refused(run(EXPORT, *words), message)
    assert sorted(tmp_path.iterdir()) == before


def test_calibration_is_for_methods_that_have_probabilities(run, trained, tmp_path):
    cases = "--calibrate", ROOT / "data/testing", "--fit", "crop"
    refused(run(EXPORT, trained / "savedmodel.pt", "a.safetensors", *cases), "--calibrate", "leave it away")
    assert not (tmp_path / "a.safetensors").exists()
