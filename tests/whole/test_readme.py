"""What the README says stays true."""

import ast
import re
import shlex
import shutil

import numpy as np
import pytest
from helpers.files import ROOT
from helpers.models import MODEL

from guided_diffusion import Segmenter
from guided_diffusion.commands.cli import parse_flags
from guided_diffusion.sampling.files import case_files

README = (ROOT / "README.md").read_text(encoding="utf-8")
JOBS = {"segmentation_train": "training", "segmentation_sample": "sampling", "segmentation_evaluate": "evaluation",
        "visdom_replay": "replay"}
VARIABLES = dict(re.findall(r'^([A-Z]+_FLAGS)="(.*)"$', README, re.MULTILINE))
COMMAND = re.compile(rf"^(?:python|torchrun|mpiexec) .*?scripts/({'|'.join(JOBS)})\.py (.*?)(?:#.*)?$", re.M)
COMMANDS = COMMAND.findall(README)


def test_readme_shows_the_commands_that_these_tests_read():
    assert VARIABLES.keys() == {"MODEL_FLAGS", "DIFFUSION_FLAGS", "TRAIN_FLAGS"} and len(COMMANDS) >= 6


@pytest.mark.parametrize("script, flags", COMMANDS)
def test_every_command_of_the_readme_is_understood(script, flags):
    for name, value in VARIABLES.items():
        flags = flags.replace(f"${name}", value)
    parse_flags(JOBS[script], "", [word for word in shlex.split(flags) if word != "..."])


def test_every_flag_of_the_readme_exists():
    table = re.findall(r"^\| `--.*?\|", README, re.MULTILINE)
    named = {flag for row in table for flag in re.findall(r"`--(\w+)`", row)}
    known = {flag for job in JOBS.values() for flag in vars(parse_flags(job, "", [])[0])}
    assert len(named) > 15 and named <= known


def run_lines(code, names):
    """Execute Python with these names, as it stands; returns the values of its bare expressions, by their text."""
    values = {}
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.Expr):
            values[ast.unparse(statement)] = eval(ast.unparse(statement), names)
        else:
            exec(ast.unparse(statement), names)
    return values


def test_the_python_of_the_readme_runs_as_it_stands(trained, monkeypatch, tmp_path):
    [code] = re.findall(r"^### From Python\n\n```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    shutil.copytree(trained, tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    side = MODEL["image_size"]
    names = {"image": np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)}
    values = run_lines(code, names)

    assert isinstance(names["segmenter"], Segmenter)
    masks = values["ensemble.masks"]
    assert masks.shape == (16, side, side) and masks.dtype == bool and 0 < masks.mean() < 1
    mean, std = values["(ensemble.mean, ensemble.std)"]
    assert mean.shape == std.shape == (side, side)
    assert np.array_equal(mean, masks.mean(0)) and np.array_equal(std, masks.std(0))
    lines = values["ensemble.outline_at(0.5)"]
    assert lines and all(line.ndim == 2 and line.shape[1] == 2 and -0.5 <= line.min() and line.max() <= side - 0.5
                         for line in lines)
    low, median, high = (names[name] for name in ("low", "median", "high"))
    assert 0 <= low <= median <= high <= side ** 2 and median == np.median(masks.sum((1, 2)))
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(case_files("image", 16))
    assert {path.name for path in tmp_path.iterdir()} == {"results", "out"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == {path.name for path in trained.iterdir()}
