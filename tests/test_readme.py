"""What the README says stays true."""

import re
import shlex
from pathlib import Path

import pytest

from guided_diffusion.cli import parse_flags

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
JOBS = {"train": "training", "sample": "sampling", "evaluate": "evaluation"}
VARIABLES = dict(re.findall(r'^([A-Z]+_FLAGS)="(.*)"$', README, re.MULTILINE))
COMMAND = re.compile(
    r"^(?:python|torchrun|mpiexec) .*?scripts/segmentation_(train|sample|evaluate)\.py (.*?)(?:#.*)?$", re.M)
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
