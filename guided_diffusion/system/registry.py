"""Tables of what a flag chooses from: methods, networks, predictions, samplers, readers, scores, ...

An entry is a function or class, registered where it is defined:

    @NETWORKS.add("my_net", "a network of mine", flags=[Flag("my_width", int, 64, "channels", "model")])
    class MyNet(nn.Module): ...

Files in the folder of a table are found by themselves. A file of the user's comes in with --plugin FILE.
"""

import importlib
import importlib.util
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .errors import InputError
from .flag import Flag

Added = TypeVar("Added")  # a function or class


class Entry(NamedTuple):
    """One row of a table."""

    value: Any  # the function or class itself
    help: str  # a few words for --help
    flags: tuple[Flag, ...]  # those that only this entry, and others that list the same, can use
    file: str  # where it is defined


class Registry(Mapping):
    """A table of entries by name; reads as a dict of the registered functions or classes.

    :param flag: the flag that chooses one, without dashes, or the word for an entry; for messages.
    :param package: the package whose modules are imported at the first look, so that they register themselves.
    """

    def __init__(self, flag: str, package: str | None = None):
        self.flag, self.package = flag, package
        self._entries: dict[str, Entry] = {}
        self._found = package is None

    def add(self, name: str, help: str = "", flags: Sequence[Flag] = ()) -> Callable[[Added], Added]:
        """A decorator that registers a function or class under this name and returns it unchanged.

        :raises InputError: if another file has registered the name already.
        """
        file = sys._getframe(1).f_code.co_filename

        def register(value):
            known = self._entries.get(name)
            if known and known.file != file:
                raise InputError(f"{self.flag} {name}: is in {known.file} and again in {file}; rename one")
            self._entries[name] = Entry(value, help, tuple(flags), file)
            return value

        return register

    @property
    def entries(self) -> dict[str, Entry]:
        """All entries by name, in the order in which they were registered."""
        if not self._found:
            self._found = True  # first, since the modules may look up what others registered
            for module in sorted(part.name for part in pkgutil.iter_modules(sys.modules[self.package].__path__)):
                importlib.import_module(f"{self.package}.{module}")
        return self._entries

    def flags(self) -> list[Flag]:
        """The flags of all entries, each once.

        :raises InputError: if two entries declare a flag of one name differently.
        """
        found: dict[str, tuple[Flag, str]] = {}
        for entry in self.entries.values():
            for flag in entry.flags:
                known, file = found.setdefault(flag.name, (flag, entry.file))
                if known != flag:
                    raise InputError(f"--{flag.name}: is a flag in {file}, and another one in {entry.file}; rename one,"
                                     f" or import it from there")
        return [flag for flag, _ in found.values()]

    def owners(self, flag_name: str) -> list[str]:
        """The names of the entries that can use a flag."""
        return [name for name, entry in self.entries.items() if any(flag.name == flag_name for flag in entry.flags)]

    def words(self) -> str:
        """What there is to choose from, for --help: "one: what it is; other: what it is"."""
        return "; ".join(f"{name}: {entry.help}" if entry.help else name for name, entry in self.entries.items())

    def __getitem__(self, name: str) -> Any:
        try:
            return self.entries[name].value
        except KeyError:
            raise KeyError(f"no {self.flag} is called {name!r}: there are {', '.join(self.entries)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def load_plugin(path: str) -> None:
    """Run a Python file of the user's, which registers entries.

    :raises InputError: if there is no such file, or running it fails; it then holds the error and its place.
    """
    file = Path(path).resolve()
    if not file.is_file():
        raise InputError(f"--plugin {path}: no such file")
    name = f"guided_diffusion_plugin_{file.stem}"
    if getattr(sys.modules.get(name), "__file__", None) == str(file):
        return
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except InputError:
        del sys.modules[name]
        raise
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"--plugin {path}: {place_of(error, str(file))}") from error


def place_of(error: Exception, file: str) -> str:
    """"line 3: ValueError: its message", of what was raised in or below the last line run in a file."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:  # nothing of it was run
        lines = [error.lineno]
    line = lines[-1] if lines else 0
    return f"line {line}: {type(error).__name__}: {error}"
