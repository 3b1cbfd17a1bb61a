"""What this program is called, and others of its kind: beside a console command they are such, too."""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterable

from .. import __version__
from ..system.terminal import program_name

# A module of this folder, run by the console command cimd-<module>, and the script that does the same
SCRIPTS = {"train": "segmentation_train.py", "sample": "segmentation_sample.py", "evaluate": "segmentation_evaluate.py",
           "phantoms": "make_phantoms.py", "replay": "visdom_replay.py", "export": "segmentation_export.py",
           "prepare": "prepare_data.py"}
_CONSOLE_NAMES = {script: f"cimd-{module}" for module, script in SCRIPTS.items()}
# starts a module as its console command does; further words are the name of the command and its flags
_START = "import sys; del sys.argv[0]; from guided_diffusion.commands.{} import run; run()"


def is_console_command() -> bool:
    """Whether this program was started by its console command, cimd-train, rather than by its script."""
    return program_name() in _CONSOLE_NAMES.values()


def command(script: str, flags: Iterable[str]) -> list[str]:
    """The words that run another script, beside this one, as this one was run; its console command for one."""
    folder = os.path.dirname(sys.argv[0])
    if is_console_command():
        name = _CONSOLE_NAMES[script]
        found = shutil.which(name)
        on_path = found is not None and os.path.realpath(os.path.dirname(found)) == os.path.realpath(folder)
        return [name if on_path else _shortened(os.path.join(folder, name)), *flags]
    python = "python" if shutil.which("python") == sys.executable else _shortened(sys.executable)
    return [python, os.path.join(folder, script), *flags]


def _shortened(path: str) -> str:
    return os.path.relpath(path) if path.startswith(os.getcwd() + os.sep) else path


def again() -> list[str]:
    """The words that start this program once more, with the same flags; they need no small file of a console command,
    which is no script of Python everywhere, and as there, no module of the working directory stands in for ours."""
    if is_console_command():
        module = program_name().removeprefix("cimd-")
        return [sys.executable, "-uP", "-c", _START.format(module), *sys.argv]
    return [sys.executable, "-u", *sys.argv]


def as_called(text: str) -> str:
    """A text that names the scripts, as in "python scripts/segmentation_train.py", with what they are called here."""
    if not is_console_command():
        return text
    scripts = "|".join(map(re.escape, _CONSOLE_NAMES))
    return re.sub(rf"(?:python scripts/)?\b({scripts})", lambda match: _CONSOLE_NAMES[match[1]], text)


def add_version(parser: argparse.ArgumentParser) -> None:
    """Give a parser the flag --version."""
    parser.add_argument("--version", action="version", version=f"{program_name()} {__version__}",
                        help="say which version this is, and leave")
