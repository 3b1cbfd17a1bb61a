"""Weights that come with the package: NAME.safetensors, its SHA-256 in NAME.sha256, and its model card, NAME.md.

Wherever weights are named, "pretrained:NAME" names these.
"""

from pathlib import Path

from ..system import storage
from ..system.errors import InputError

PREFIX = "pretrained:"
FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names there are, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def path_of(name_or_path: storage.AnyPath) -> str:
    """The file that pretrained:NAME stands for; any other path as it is.

    :raises InputError: for a name that there is not, and if the file does not agree with its SHA-256.
    """
    if not str(name_or_path).startswith(PREFIX):
        return str(name_or_path)
    name = str(name_or_path).removeprefix(PREFIX)
    if name not in names():
        raise InputError(f"{name_or_path}: no such weights come with the package; there are"
                         f" {', '.join(PREFIX + known for known in names())}")
    path = FOLDER / f"{name}.safetensors"
    known = Path(storage.digest_path(path))
    if not known.exists() or storage.digest(path) not in known.read_text(encoding="utf-8").split():
        raise InputError(f"{name_or_path}: {path} does not agree with the SHA-256 in {known.name} beside it; install"
                         f" the package anew")
    return str(path)
