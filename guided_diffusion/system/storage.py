"""Files of results: written whole or not at all, on this machine or in a bucket (s3:// through s3fs, gs:// and az://
through blobfile)."""

import contextlib
import errno
import hashlib
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from . import blobs, s3
from .errors import InputError

AnyPath = str | os.PathLike[str]  # of a file or folder on this machine or, as a string with ://, in a bucket


_fences: dict[str, Callable[[], None]] = {}  # folder -> what is asked before a file of it changes


def is_remote(path: AnyPath) -> bool:
    return "://" in str(path)


def join(folder: AnyPath, name: str) -> str:
    return f"{str(folder).rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder) / name)


def folder_of(path: AnyPath) -> str:
    return str(path).rsplit("/", 1)[0] if is_remote(path) else str(Path(path).parent)


def _bucket_of(path) -> ModuleType:
    """What reads and writes the objects of a path in a bucket."""
    return s3 if str(path).startswith("s3://") else blobs


def exists(path: AnyPath) -> bool:
    return _bucket_of(path).exists(str(path)) if is_remote(path) else os.path.exists(path)


def make_folder(folder: AnyPath, flag: str = "--results_dir") -> None:
    """Create a results folder; raises InputError if nothing can be written there."""
    if is_remote(folder):
        return _bucket_of(folder).check_writable(str(folder))
    try:
        os.makedirs(folder, exist_ok=True)
        probe = _temporary(Path(folder) / "writable")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{flag} {folder}: cannot be written ({error.strerror}); give another folder") from None


def fence(folder: AnyPath, check: Callable[[], None] | None) -> None:
    """Call a function before each change to a file of a folder, which raises what keeps the file as it is; None ends
    this."""
    folder = folder_of(join(folder, "any"))
    if check:
        _fences[folder] = check
    else:
        _fences.pop(folder, None)


def _ask(path):
    if check := _fences.get(folder_of(path)):
        check()


def read_bytes(path: AnyPath) -> bytes:
    if is_remote(path):
        return _bucket_of(path).read_bytes(str(path))
    if not os.path.isfile(path):  # a device may never end
        raise OSError(errno.EINVAL, "is no file", str(path))
    return Path(path).read_bytes()


def replace_link(path: AnyPath) -> None:
    """Remove a link that stands in the place of a file to be written, so that nothing is written through it."""
    if os.path.islink(path):
        os.unlink(path)


def remove(path: AnyPath) -> None:
    _ask(path)
    if is_remote(path):
        _bucket_of(path).remove(str(path))
    else:
        os.unlink(path)


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    if is_remote(path):  # an object appears when its upload is complete
        _ask(path)
        return _bucket_of(path).write_bytes(str(path), data)
    path = Path(path)
    partial = _temporary(path)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        _ask(path)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_new(path: AnyPath, data: bytes) -> bool:
    """Write a small file unless there is one of that name; whether it was written. Of several machines that try at the
    same time, one succeeds."""
    if is_remote(path):
        return _bucket_of(path).write_new(str(path), data)
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        os.write(file, data)
    except OSError:
        os.unlink(path)
        raise
    finally:
        os.close(file)
    return True


def write_over(path: AnyPath, old: bytes, data: bytes) -> bool:
    """Write a small file in the place of one that holds `old`, and of no other; whether it was written."""
    if is_remote(path):
        return _bucket_of(path).write_over(str(path), old, data)
    remove_exactly(path, old)
    return write_new(path, data)


def remove_exactly(path: AnyPath, data: bytes) -> None:
    """Remove a small file of this machine that holds these bytes, not one that has taken its place meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        aside = _temporary(Path(path))
        os.rename(path, aside)
        if aside.read_bytes() != data:
            with contextlib.suppress(OSError):
                os.link(aside, path)
        aside.unlink()


def _temporary(path):
    return path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.partial")


def remove_partial(folder: AnyPath) -> None:
    """Remove what processes that were killed while they wrote have left behind in a folder: temporary files of
    processes of this machine that are gone, and any that are older than a day. Called before this one writes."""
    here = f".{socket.gethostname()}."
    for name in () if is_remote(folder) else names_in(folder):
        match, path = re.fullmatch(r"\..+?(\..+\.)(\d+)\.partial", name), Path(folder, name)
        if not match:
            continue
        writer = int(match[2])
        with contextlib.suppress(OSError):  # another process may remove it, too
            gone = match[1].endswith(here) and (writer == os.getpid() or not runs(writer))  # numbers come round again
            if gone or time.time() - path.stat().st_mtime > 86400:
                path.unlink()


def runs(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # someone else's
        pass
    return True


def names_in(folder: AnyPath) -> set[str]:
    """The names of all files of a folder, none if there is no folder."""
    if is_remote(folder):
        return _bucket_of(folder).names_in(str(folder))
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def digest(path: AnyPath) -> str:
    """SHA-256 of a file, as hex."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def digest_path(path: AnyPath) -> str:
    """Where the SHA-256 of <name>.<suffix> lies beside it, as sha256sum writes it: <name>.sha256."""
    return os.path.splitext(str(path))[0] + ".sha256"
