"""Data in s3://, copied to this machine: readers want files."""

import contextlib
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..system import s3
from ..system.errors import InputError
from ..system.storage import AnyPath, is_remote
from ..system.terminal import progress
from . import decoded_file

COPIED_AT_ONCE = 8  # files


def local_folder(folder: AnyPath, flag: str = "--data_dir") -> AnyPath:
    """A folder of this machine with the files of one that may be in s3://. What is there from an earlier time is copied
    again where its size or time is another, and removed where the bucket has it no more. Names that begin with a dot
    are left alone. Processes of one machine wait for the one that copies.

    :param flag: that the folder comes from, for messages.
    :returns: the folder itself if it is none of a bucket, else its copy, see cache_folder.
    :raises InputError: if the bucket holds nothing there, cannot be read, or the copy cannot be written.
    """
    if not is_remote(folder):
        return folder
    if not str(folder).startswith("s3://"):
        raise InputError(f"{flag} {folder}: data are read from folders of this machine and from s3://; copy them")
    objects = {found.key: found for found in s3.objects_below(str(folder)) if _is_file(found.key)}
    if not objects:
        raise InputError(f"{flag} {folder}: nothing is there; mend the name")
    copy = cache_folder(folder)
    try:
        copy.mkdir(parents=True, exist_ok=True)
        with decoded_file.locked(copy / ".copy"):
            _remove_others(copy, objects)
            wanted = [found for found in objects.values() if not _is_there(copy / found.key, found)]
            with ThreadPoolExecutor(COPIED_AT_ONCE) as pool:
                fetched = pool.map(lambda found: _fetch(folder, copy, found), wanted)
                deque(progress(fetched, f"copying {folder}", len(wanted), "file", leave=False), 0)
    except s3.StoreError:
        raise
    except OSError as error:
        raise InputError(f"{flag} {folder}: cannot be copied to {error.filename or copy} ({error.strerror}); make room,"
                         f" or set XDG_CACHE_HOME") from None
    return copy


def cache_folder(folder: AnyPath) -> Path:
    """Where files of a folder in a bucket are kept: guided_diffusion/<bucket>/<folder> in $XDG_CACHE_HOME, by default
    ~/.cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "guided_diffusion", *(part for part in str(folder).removeprefix("s3://").split("/") if part))


def _is_file(key):
    return not any(part in ("", ".") or part.startswith(".") for part in key.split("/"))


def _is_there(path, found):
    with contextlib.suppress(OSError):
        status = path.lstat()
        return status.st_size == found.size and int(status.st_mtime) == int(found.changed.timestamp())
    return False


def _fetch(folder, copy, found):
    path = copy / found.key
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    s3.fetch(f"{str(folder).rstrip('/')}/{found.key}", partial)
    os.utime(partial, (found.changed.timestamp(),) * 2)
    os.replace(partial, path)


def _remove_others(copy, objects):
    """Remove files that the bucket does not have, and folders that this leaves empty."""
    for folder, _, names in os.walk(copy, topdown=False):
        folder = Path(folder)
        for name in names:
            if not name.startswith(".") and (folder / name).relative_to(copy).as_posix() not in objects:
                (folder / name).unlink()
        if folder != copy and not any(folder.iterdir()):
            folder.rmdir()
