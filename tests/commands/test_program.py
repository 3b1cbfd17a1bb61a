"""A program calls itself, and others, by the names that it was called by."""

import os
import sys

import pytest
from helpers.files import ROOT

from guided_diffusion import __version__
from guided_diffusion.commands import program

CONSOLE = sorted(f"cimd-{name}" for name in program.SCRIPTS)


@pytest.fixture
def called(monkeypatch, tmp_path):
    """called(path) makes this program one that was started as this path; the working directory is tmp_path."""
    monkeypatch.chdir(tmp_path)
    return lambda path, *flags: monkeypatch.setattr(sys, "argv", [str(path), *flags])


def test_there_is_a_script_for_every_console_command_and_no_other():
    assert sorted(program.SCRIPTS.values()) == sorted(path.name for path in (ROOT / "scripts").iterdir()
                                                      if path.suffix == ".py")
    for module, script in program.SCRIPTS.items():
        assert f"from guided_diffusion.commands.{module} import run" in (ROOT / "scripts" / script).read_text()


@pytest.mark.parametrize("script", program.SCRIPTS.values())
def test_version_and_usage_name_the_script_as_it_was_called(run, script):
    assert run(script, "--version").out == f"{script} {__version__}\n"
    assert run(script, "--help").out.startswith(f"usage: {script} ")


def test_help_of_a_console_command_names_console_commands_only(called):
    called("/venv/bin/cimd-train")
    text = "python scripts/segmentation_train.py --max_steps 2, see segmentation_sample.py and my_segmentation_train.py"
    assert program.as_called(text) == "cimd-train --max_steps 2, see cimd-sample and my_segmentation_train.py"
    called("scripts/segmentation_train.py")
    assert program.as_called(text) == text


def test_a_script_names_the_script_beside_it(called):
    called("some/scripts/segmentation_train.py")
    python, *words = program.command("segmentation_sample.py", ["--num_ensemble", "4"])
    assert words == [os.path.join("some/scripts", "segmentation_sample.py"), "--num_ensemble", "4"]
    assert os.path.basename(python).startswith("python")


def test_a_console_command_names_the_one_beside_it_by_its_path_unless_that_is_searched(called, tmp_path, monkeypatch):
    folder = tmp_path / "venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "cimd-sample").touch(mode=0o755)
    called(folder / "cimd-train")
    assert program.command("segmentation_sample.py", ["-x"]) == [os.path.join("venv", "bin", "cimd-sample"), "-x"]
    monkeypatch.setenv("PATH", str(folder), os.pathsep)
    assert program.command("segmentation_sample.py", ["-x"]) == ["cimd-sample", "-x"]


def test_a_wrapper_for_windows_is_a_console_command(called):
    called("C:/venv/Scripts/cimd-train.exe".replace("/", os.sep), "--ngpu", "2")
    assert program.is_console_command()
    *_, code, path, flag, value = program.again()
    assert "guided_diffusion.commands.train" in code and path == sys.argv[0] and (flag, value) == ("--ngpu", "2")


def test_a_script_starts_itself_again(called):
    called("scripts/segmentation_train.py", "--ngpu", "2")
    assert program.again() == [sys.executable, "-u", "scripts/segmentation_train.py", "--ngpu", "2"]
