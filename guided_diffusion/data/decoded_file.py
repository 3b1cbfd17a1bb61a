"""Decoded cases of a large data set in one file, mapped into memory by every process that reads them.

The file holds the records one after another, then an index as JSON, then the length of that index and a magic word; it
appears under its name only when it is whole.
"""

import contextlib
import json
import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ..system import storage
from .masks import packed_size

_MAGIC = b"DECODED2"
_TAIL = struct.Struct("<Q8s")

# image [C, h, w] uint8 or uint16, masks [R, bytes] uint8, and the size (H, W) of the scan before it was fitted
Record = tuple[np.ndarray, np.ndarray, tuple[int, int]]


class DecodedFile:
    """Records, their arrays as read-only views of the file.

    :param key: what the records were made from, as a string.
    :raises OSError: if there is no such file, or it is of another key.
    """

    def __init__(self, path: str | Path, key: str):
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if size < _TAIL.size:
                raise OSError(f"{path}: is cut off")
            file.seek(size - _TAIL.size)
            length, magic = _TAIL.unpack(file.read())
            if magic != _MAGIC or length > size - _TAIL.size:
                raise OSError(f"{path}: is of another kind or cut off")
            file.seek(size - _TAIL.size - length)
            text = file.read(length)
        try:
            index = json.loads(text)
            found = index["key"]
            # offset, bytes a value, C, h, w, R, bytes a mask, H, W
            self.records = np.array(index["records"]).reshape(-1, 9)
            self._check(size)
        except (ValueError, LookupError, TypeError, RecursionError):
            raise OSError(f"{path}: its index cannot be read") from None
        if found != key:
            raise OSError(f"{path}: is of other files, or of an earlier state of them")
        self.bytes = np.asarray(np.memmap(path, np.uint8, mode="r"))

    def _check(self, size):
        """Raise ValueError unless every record lies in the file, as its numbers say."""
        if self.records.size and self.records.dtype.kind != "i" or (self.records < 0).any():
            raise ValueError
        offset, itemsize, channels, height, width, raters, row, *_ = self.records.astype(float).T  # without overflow
        ends = offset + channels * height * width * itemsize + raters * row
        if not np.isin(itemsize, (1, 2)).all() or (ends > size).any() or (row != packed_size(height, width)).any():
            raise ValueError

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, i: int) -> Record:
        offset, itemsize, channels, height, width, raters, row, *size = self.records[i].tolist()
        middle = offset + channels * height * width * itemsize
        image = self.bytes[offset:middle].view(np.uint8 if itemsize == 1 else np.uint16)
        return (image.reshape(channels, height, width),
                self.bytes[middle:middle + raters * row].reshape(raters, row), tuple(size))


def write(path: str | Path, key: str, records: Iterable[Record]) -> None:
    """Write a DecodedFile of an iterable of records; nothing is left behind if that fails."""
    path, offset, index = Path(path), 0, []
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)  # it may be a link to elsewhere
    try:
        with open(part, "wb") as file:
            for image, masks, size in records:
                index.append((offset, image.itemsize, *image.shape, *masks.shape, *size))
                offset += file.write(image.tobytes()) + file.write(masks.tobytes())
                offset += file.write(bytes(offset % 2))  # 16-bit images start at even places
            text = json.dumps({"key": key, "records": index}).encode()
            file.write(text + _TAIL.pack(len(text), _MAGIC))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """One process at a time inside, among those that ask for the same path; those of Windows are not held back."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    storage.replace_link(f"{path}.lock")
    with open(f"{path}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
