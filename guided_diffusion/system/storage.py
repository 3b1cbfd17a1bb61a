"""Files of results: written whole or not at all, on this machine or in a bucket (gs://, az:// through blobfile)."""

import contextlib
import errno
import hashlib
import os
import re
import socket
import time
from pathlib import Path

from . import packages
from .errors import InputError

AnyPath = str | os.PathLike[str]  # of a file or folder on this machine or, as a string with ://, in a bucket


def is_remote(path: AnyPath) -> bool:
    return "://" in str(path)


def join(folder: AnyPath, name: str) -> str:
    return f"{str(folder).rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder) / name)


def folder_of(path: AnyPath) -> str:
    return str(path).rsplit("/", 1)[0] if is_remote(path) else str(Path(path).parent)


def _blobfile():
    return packages.require("blobfile", "a path with ://")


def exists(path: AnyPath) -> bool:
    return _blobfile().exists(str(path)) if is_remote(path) else os.path.exists(path)


def make_folder(folder: AnyPath, flag: str = "--results_dir") -> None:
    """Create a results folder; raises InputError if nothing can be written there."""
    if is_remote(folder):
        return
    try:
        os.makedirs(folder, exist_ok=True)
        probe = _temporary(Path(folder) / "writable")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"{flag} {folder}: cannot be written ({error.strerror}); give another folder") from None


def claim(folder: AnyPath, flag: str = "--results_dir", name: str = ".training.lock", doing: str = "is training"
          ) -> contextlib.AbstractContextManager:
    """Claim a folder for what this process does, until what is returned is closed.

    :param flag: that the folder comes from; name: of the file that is locked; doing: what is done, for the message.
    :raises InputError: if another process has claimed it. Buckets, Windows and file systems without locks do not tell.
    """
    try:
        import fcntl
    except ImportError:
        return contextlib.nullcontext()
    if is_remote(folder):
        return contextlib.nullcontext()
    replace_link(Path(folder) / name)
    file = open(Path(folder) / name, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"{flag} {folder}: another run {doing} into it; give another folder, or stop that run"
                         ) from None
    except OSError:
        pass
    return file


def read_bytes(path: AnyPath) -> bytes:
    if is_remote(path):
        with _blobfile().BlobFile(str(path), "rb") as file:
            return file.read()
    if not os.path.isfile(path):  # a device may never end
        raise OSError(errno.EINVAL, "is no file", str(path))
    return Path(path).read_bytes()


def replace_link(path: AnyPath) -> None:
    """Remove a link that stands in the place of a file to be written, so that nothing is written through it."""
    if os.path.islink(path):
        os.unlink(path)


def remove(path: AnyPath) -> None:
    if is_remote(path):
        _blobfile().remove(str(path))
    else:
        os.unlink(path)


def write_bytes(path: AnyPath, data: bytes) -> None:
    """Write a file that appears whole or not at all."""
    if is_remote(path):  # an object appears when its upload is complete
        with _blobfile().BlobFile(str(path), "wb") as file:
            file.write(data)
        return
    path = Path(path)
    partial = _temporary(path)
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
            gone = match[1].endswith(here) and (writer == os.getpid() or not _runs(writer))  # numbers come round again
            if gone or time.time() - path.stat().st_mtime > 86400:
                path.unlink()


def _runs(process):
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
        return set(_blobfile().listdir(str(folder))) if exists(folder) else set()
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def digest(path: AnyPath) -> str:
    """SHA-256 of a file, as hex."""
    return hashlib.sha256(read_bytes(path)).hexdigest()


def digest_path(path: AnyPath) -> str:
    """Where the SHA-256 of <name>.<suffix> lies beside it, as sha256sum writes it: <name>.sha256."""
    return os.path.splitext(str(path))[0] + ".sha256"
