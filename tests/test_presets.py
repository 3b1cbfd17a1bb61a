"""A preset is a set of flags that training takes, stores and holds the user to."""

import re
import shlex

import pytest
import torch
from helpers.files import ROOT
from helpers.models import pick
from helpers.processes import TRAIN
from helpers.refusals import refusal, refused

from guided_diffusion import checkpoint
from guided_diffusion.commands.cli import parse_flags
from guided_diffusion.flags import default
from guided_diffusion.presets import PRESETS
from guided_diffusion.script_util import create_method

GROUPS = ("model", "encoders", "diffusion", "method", "training")


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_makes_the_model_that_its_words_say(name, monkeypatch):
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda weight, *args, **options: weight)  # takes seconds
    args, _ = parse_flags("training", "", ["--preset", name])
    method = create_method(args)
    said = re.search(r"([\d.]+) million parameters", PRESETS.entries[name].help)
    count = sum(p.numel() for p in method.model.parameters()) / 1e6
    assert count > 0 and (not said or float(said[1]) == round(count, 1))


def test_the_published_preset_is_the_published_command_line():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    words = " ".join(re.findall(r'^(?:MODEL|DIFFUSION|TRAIN)_FLAGS="(.*)"$', readme, re.M))
    published, _ = parse_flags("training", "", shlex.split(words))
    preset, _ = parse_flags("training", "", ["--preset", "cimd-published"])
    assert pick(preset, *GROUPS) == {**pick(published, *GROUPS), "preset": "cimd-published"}


def test_what_a_preset_says_of_the_model_is_fixed_and_how_it_is_trained_is_free():
    message = refusal(parse_flags, "training", "", ["--preset", "cpu-32", "--num_channels", "64", "--lr", "1", "--seed",
                                                    "3", "--prediction", "v"])
    assert message.startswith("--preset cpu-32 and --prediction v (there: xstart), --num_channels 64 (there: 32): ")
    free = {"lr": 0.5, "batch_size": 3, "lr_anneal_steps": 7, "ema_rate": "0.5", "use_bf16": True, "fit": "resize",
            "data_dir": "elsewhere", "num_channels": 32, "dropout": 0.1, "kl_weight": 0.5}
    words = [word for name, value in free.items() for word in (f"--{name}", str(value))]
    args, given = parse_flags("training", "", ["--preset", "cpu-32", *words])
    assert {name: getattr(args, name) for name in free} == free and args.channel_mult == "1,2,2"
    assert given.items() >= {**free, "prediction": "xstart", "image_size": 32}.items()


def test_flags_of_a_preset_that_have_no_effect_beside_those_given_are_left_out():
    args, given = parse_flags("training", "", ["--preset", "cpu-32", "--kl_weight", "0"])
    assert args.kl_weight == 0 and "num_filters" not in given and args.num_filters == default("encoders", "num_filters")
    assert "--num_filters 8: has no effect" in refusal(
        parse_flags, "training", "", ["--preset", "cimd-published", "--kl_weight", "0", "--num_filters", "8"])
    assert "--method energy (there: cimd)" in refusal(
        parse_flags, "training", "", ["--preset", "cpu-32", "--method", "energy"])


def test_other_spellings_of_what_it_says_are_refused_too():
    assert "--predict_xstart False and --prediction xstart" in refusal(
        parse_flags, "training", "", ["--preset", "cpu-32", "--predict_xstart", "False"])


def test_a_name_that_there_is_not_is_refused_with_those_there_are():
    message = refusal(parse_flags, "training", "", ["--preset", "cpu"])
    assert "--preset" in message and all(name in message for name in PRESETS)


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from guided_diffusion.presets import PRESETS\n"
                    "PRESETS.add('mine', 'a tiny one')('--image_size 16 --num_channels 32 --channel_mult 1,2"
                    " --num_res_blocks 1 --num_heads 1 --attention_resolutions 8 --num_filters 8 --max_steps 2')\n")
    yield path
    PRESETS._entries.pop("mine", None)


def test_a_run_stores_the_flags_of_its_preset_and_goes_on_without_its_name(run, plugin, make_cases, tmp_path):
    data = make_cases(tmp_path / "data")
    flags = ["--plugin", plugin, "--data_dir", data, "--results_dir", "results"]
    result = run(TRAIN, *flags, "--preset", "mine", "--max_steps", 1)
    assert result.code == 0, result.err
    stored = checkpoint.load_flags(tmp_path / "results")
    assert stored.items() >= {"preset": "mine", "channel_mult": "1,2", "num_filters": "8", "max_steps": 1}.items()
    result = run(TRAIN, *flags, "--preset", "mine")
    assert result.code == 0 and "resumed at step 1" in result.out and "trained to step 2" in result.out
    refused(run(TRAIN, *flags, "--preset", "cpu-32"), "results", "--channel_mult 1,2,2 (there: 1,2)")
    assert "mine: a tiny one" in " ".join(run(TRAIN, "--plugin", plugin, "--help").out.split())
