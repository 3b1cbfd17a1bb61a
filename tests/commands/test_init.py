"""--init starts a new run from weights of the same network, and the same command goes on with it."""

import json
import shutil

import pytest
import torch
from helpers.files import tree
from helpers.models import ENERGY, same_weights
from helpers.processes import TRAIN
from helpers.refusals import refused

from guided_diffusion import checkpoint


@pytest.fixture
def tune(run, make_cases, tmp_path):
    """tune(*flags): train into "tuned" on other cases, with no flag of the model; the network is left as it is."""
    others = make_cases(tmp_path / "others", count=2, seed=7)

    def call(*flags):
        return run(TRAIN, "--data_dir", others, "--results_dir", "tuned", "--lr", 0, "--save_interval", 1, *flags)

    return call


def test_a_run_starts_from_the_weights_of_another_and_goes_on_without_them(train, tune, tmp_path):
    train("first", "--learn_sigma", "True", "--max_steps", 2, "--seed", 3, "--ema_rate", "0.5")
    before, first = tree(tmp_path / "first"), checkpoint.load(tmp_path / "first" / "savedmodel000002.pt")
    result = tune("--init", "first/savedmodel000002.pt", "--max_steps", 1)
    assert result.code == 0 and result.err == "", result.err
    assert "--model_path tuned/emasavedmodel_0.9999_000001.pt" in result.out  # averages of trained weights are of use
    assert "all weights of the network are those of first/savedmodel000002.pt; posterior and prior are of" \
           " first/optsavedmodel000002.pt; the optimiser starts afresh" in result.out
    assert tree(tmp_path / "first") == before and checkpoint.steps_in(tmp_path / "tuned") == [1]
    for name in ("savedmodel000001.pt", "emasavedmodel_0.9999_000001.pt"):
        assert same_weights(checkpoint.load(tmp_path / "tuned" / name), first)
    opts = [checkpoint.load(tmp_path / folder / name) for folder, name in (
        ("first", "optsavedmodel000002.pt"), ("tuned", "optsavedmodel000001.pt"))]
    assert same_weights(opts[0]["posterior"], opts[1]["posterior"]) and opts[1]["position"] == 1
    flags = json.loads((tmp_path / "tuned" / "flags.json").read_text())
    assert (flags["learn_sigma"], flags["image_size"], flags["num_filters"]) == (True, 16, "8,16")
    assert (flags["seed"], flags["init"]) == (0, "first/savedmodel000002.pt")

    shutil.rmtree(tmp_path / "first")
    result = tune("--init", "first/savedmodel000002.pt", "--max_steps", 2)
    assert result.code == 0 and "resumed at step 1" in result.out and "those of first" not in result.out
    refused(tune("--max_steps", 3), "(there: first/savedmodel000002.pt)", "another --results_dir")
    refused(tune("--max_steps", 3, "--init", "first/savedmodel000002.pt", "--num_channels", 64),
            "--num_channels 64 (there: 32)")
    refused(tune("--max_steps", 3, "--init", "first/savedmodel000002.pt", "--optimizer", "muon"),
            "--optimizer muon (there: adamw)")


def test_weights_of_another_architecture_are_refused_with_what_differs(trained, tune, tmp_path):
    result = tune("--init", trained / "savedmodel.pt", "--num_channels", 64, "--max_steps", 1)
    refused(result, f"--init {trained / 'savedmodel.pt'}", "another architecture", "of another shape",
            "time_embed.0.weight is [128, 32], not [256, 64]", "--num_channels 64 (there: 32)")
    assert not (tmp_path / "tuned").exists()


def test_weights_alone_start_all_else_afresh_and_flags_that_fit_may_differ(trained, tune, tmp_path):
    result = tune("--init", trained / "savedmodel.pt", "--diffusion_steps", 40, "--num_filters", "8", "--max_steps", 1)
    assert result.code == 0 and result.err == "", result.err
    assert "the optimiser, posterior, prior start afresh" in result.out
    assert "--diffusion_steps 40 (there: 30)" in result.out
    assert same_weights(checkpoint.load(tmp_path / "tuned" / "savedmodel.pt"),
                        checkpoint.load(trained / "savedmodel.pt"))


def test_the_best_weights_are_started_from_with_the_encoders_of_their_step_if_those_fit(train, tune, tmp_path):
    train("first", "--max_steps", 3, "--save_interval", 1)
    best = {name: torch.ones_like(value) for name, value in checkpoint.load(tmp_path / "first/savedmodel.pt").items()}
    checkpoint.save_best(tmp_path / "first", best, {"step": 2, "GED_unbiased": 0.1, "cases": ""})
    result = tune("--init", "first/savedmodel_best.pt", "--latent_dim", 3, "--max_steps", 1)
    assert result.code == 0 and result.err == "", result.err
    assert "posterior (its posterior: holds another architecture" in result.out
    assert same_weights(checkpoint.load(tmp_path / "tuned" / "savedmodel.pt"), best)
    shutil.rmtree(tmp_path / "tuned")
    result = tune("--init", "first/savedmodel_best.pt", "--max_steps", 1)
    assert "prior are of first/optsavedmodel000002.pt" in result.out


def test_the_method_of_the_weights_decides_which_flags_have_an_effect(run, make_cases, tune, tmp_path):
    flags = [word for name, value in ENERGY.items() for word in (f"--{name}", value)]
    first = run(TRAIN, "--data_dir", make_cases(tmp_path / "data"), "--results_dir", "first", *flags, "--max_steps", 1)
    assert first.code == 0, first.err
    refused(tune("--init", "first/savedmodel.pt", "--beta", 3, "--max_steps", 1), "--beta 3", "--method is energy")
    refused(tune("--init", "pretrained:nobody", "--max_steps", 1), "pretrained:nobody", "pretrained:phantoms")
    result = tune("--init", "first/savedmodel.pt", "--energy_draws", 3, "--max_steps", 1)
    assert result.code == 0 and result.err == "", result.err
    assert json.loads((tmp_path / "tuned" / "flags.json").read_text())["energy_draws"] == 3


def test_a_part_that_the_weights_lack_starts_afresh_and_one_beside_is_left_out(run, make_cases, tune, tmp_path):
    flags = [word for name, value in ENERGY.items() for word in (f"--{name}", value)]
    first = run(TRAIN, "--data_dir", make_cases(tmp_path / "data"), "--results_dir", "first", *flags, "--max_steps", 1)
    assert first.code == 0, first.err
    result = tune("--init", "first/savedmodel.pt", "--presence_channels", 8, "--max_steps", 1)
    assert result.code == 0 and result.err == "", result.err
    assert "the other weights of the network are those of first/savedmodel.pt; the optimiser, presence (not in" \
           " first/savedmodel.pt) start afresh" in result.out
    before, after = (checkpoint.load(tmp_path / folder / "savedmodel.pt") for folder in ("first", "tuned"))
    assert {name.split(".")[0] for name in after.keys() - before.keys()} == {"presence"}
    assert before.keys() - after.keys() == {"head.empty.weight", "head.empty.bias"}
    assert same_weights({name: before[name] for name in before.keys() & after.keys()},
                        {name: after[name] for name in before.keys() & after.keys()})
    refused(tune("--init", "first/savedmodel.pt", "--presence_channels", 8, "--latent_size", 5, "--max_steps", 1,
                 "--results_dir", "other"), "another architecture", "modulation")
