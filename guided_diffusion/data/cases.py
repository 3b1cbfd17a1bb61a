"""All cases of a folder, as images and raters' masks of one size. See case_files for the layout of the folder."""

import contextlib
import hashlib
import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import dist_util
from ..system.errors import InputError, raise_problems
from ..system.terminal import progress
from . import decoded_file, manifest, masks, scaling
from .case_files import check_complete, digest_of, find_cases, find_cases_together, read_case
from .fitting import FITS, Fitting
from .mirror import local_folder
from .pictures import MAX_PIXELS
from .readers.base import Readers

SHARE = 64  # cases that each of several ranks decodes until they exchange them
MEMORY_BYTES = 4 << 30  # decoded data sets up to this size are kept in memory, larger ones in a file beside the data
# in the place of a case that cannot be read
_NOTHING = np.empty((0, 0, 0), np.uint8), np.empty((0, 0), np.uint8), (0, 0)


class Case(NamedTuple):
    """One scan, and how its raters outlined it."""

    name: str
    image: np.ndarray  # [C, H, W] float32 in [0, 1]
    raters: np.ndarray  # [R, H, W] bool, the mask of each rater


class Facts(NamedTuple):
    """What else the files of a case say."""

    spacing: tuple[float, float] | None  # (row, column) distance of the pixels of its image in mm, at its own size
    info: dict[str, Any]  # what must come back out with masks, see readers.base.Scan


class SegmentationCases:
    """All cases of a folder, checked when opened. Item i is a Case, sorted by name.

    Every file is decoded once, here. What comes out, a byte a pixel and a bit a pixel of a mask, is kept in memory, or
    if that would take more than MEMORY_BYTES in `.decoded_<image_size>_<fit>` in data_dir, which all processes share
    and later runs find again until a file changes; where that cannot be written, files are decoded at every visit.

    :param data_dir: folder as case_files describes it, or one in s3://, which is copied to this machine first, see
        mirror; case folders may be nested, and are then named by their path.
    :param image_size: side of the images in pixels.
    :param image_channels: channels of the result; a single-channel image is repeated.
    :param fit: what to do with images of another size, a name of fitting.FITS. `fitting` and `whole` lead back.
    :param need_labels: False for scans nobody has outlined; cases without labels then have raters [0, H, W].
    :param limit: take the first cases only (0: all).
    :param progress: show how far checking is.
    :param skip_bad: keep the places of cases whose files are wrong rather than refuse the folder: reading such an item
        raises InputError, and `problems` says what is wrong with it, {number: message}; see `readable`.
    :param flag: that the folder comes from, for messages.
    :param together: every rank of a launch opens the folder now: rank 0 lists it, each decodes a part and gets the
        others', and whatever is wrong with a case on any of them is wrong on all.
    :param cache_dir: where the file of a large data set goes instead, on a disk of each machine's own; of ranks that
        open it together, the first of each machine writes it.
    :param options: values of readers' flags, see readers.base.Readers; `readers_used` has the names of those that the
        files need.
    :raises InputError: naming everything that is wrong, file by file.
    """

    problems: dict[int, str]

    def __init__(self, data_dir: str | os.PathLike, image_size: int, image_channels: int = 4, fit: str = "error",
                 need_labels: bool = True, limit: int = 0, progress: bool = False, skip_bad: bool = False,
                 flag: str = "--data_dir", together: bool = False, cache_dir: str = "",
                 options: Mapping[str, Any] | None = None):
        if fit not in FITS:
            raise InputError(f"--fit {fit} is none of {', '.join(FITS)}")
        self.together, self.flag, self.cache_dir = together and dist_util.world_size() > 1, flag, cache_dir
        with dist_util.all_ranks_or_none() if self.together else contextlib.nullcontext():
            self.data_dir = local_folder(data_dir, flag)
        self.image_size, self.image_channels = image_size, image_channels
        self.fit, self.need_labels, self.skip_bad, self.problems = fit, need_labels, skip_bad, {}
        self.readers = Readers(options)
        if self.together:
            self.cases, self.readers_used = find_cases_together(self.data_dir, flag, self.readers, limit)
        else:
            self.cases = find_cases(self.data_dir, flag, self.readers)[:limit or None]
            self.readers_used = self.readers.used(self.cases)
        self.decoded, self.kept = self._decode_all(progress)
        self.readers.forget()

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, i: int) -> Case:
        image, packed = self.compact(i)
        return self._case(i, image, masks.unpack(packed, *image.shape[1:]))

    def _case(self, i, image, raters):
        return Case(self.cases[i].name, scaling.repeat_channel(scaling.to_unit(image), self.image_channels), raters)

    def fitting(self, i: int) -> Fitting:
        """The way of case i to the size of the model, and of its masks back. :raises InputError: as `compact`."""
        return Fitting(self._record(i)[2], self.image_size, self.fit)

    def whole(self, i: int) -> Case:
        """Case i at its own size. It is read again if that is not the model's.

        :raises InputError: naming the file, if it cannot be read any more.
        """
        if not self.fitting(i).changes:
            return self[i]
        contents = read_case(self.cases[i], need_labels=False, readers=self.readers)
        return self._case(i, contents.image, contents.raters)

    def readable(self, numbers: Iterable[int], read: Callable[[int], Any] | None = None) -> Iterator[tuple[int, Any]]:
        """Yields (number, read(number)) of these; those that cannot be read, or not any more, join `problems` instead.

        :param read: by default returns the Case.
        """
        for i in numbers:
            try:
                result = self[i] if read is None else read(i)
            except InputError as error:
                self.problems[i] = str(error)
            else:
                yield i, result

    def facts(self, i: int) -> Facts:
        """What the files of case i say beside its pixels, or else manifest.csv above it. Its first image is read again.

        :raises InputError: naming the file, if it cannot be read any more.
        """
        files = self.cases[i]
        scan = self.readers.read(files.images[0], files.slice, files.series)
        info = {**scan.info, **({"volume": files.volume} if files.volume else {})}
        return Facts(*manifest.with_place(scan.spacing, info, self._rows[i]))

    @cached_property
    def volumes(self) -> list[tuple[str, str]]:
        """For each case, the name and format of the volume that it is a slice of, as its files say or else
        manifest.csv; ("", "") for others."""
        prepared = map(manifest.volume_of, self._rows)
        return [(case.volume, self.readers.name_of(case.images[0])) if case.volume else
                (volume, "nifti" if volume else "") for case, volume in zip(self.cases, prepared)]

    @cached_property
    def _rows(self):
        return manifest.rows_in_order(self.cases)

    def compact(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Case i as it is kept: image [c, S, S] uint8 or uint16, c 1 or image_channels, and packed masks of its raters,
        see masks.

        :raises InputError: if it is one of the `problems`.
        """
        return self._record(i)[:2]

    def _record(self, i):
        """A record of decoded_file."""
        check_complete(self.cases[i], self.need_labels)
        record = _NOTHING if self.decoded is None else self.decoded[i]
        return record if len(record[0]) else self._decode(self.cases[i])

    def _decode_all(self, shows):
        """Check every case; returns the decoded ones, None if they are not kept, and words for where they are."""
        sample = [self._attempt(files) for files in self.cases[::-(-len(self.cases) // 8)]]
        if self.together:  # of the cases that all could read
            read = zip(*dist_util.all_gather_objects([isinstance(record, tuple) for record in sample]))
            seen = [record for record, by_all in zip(sample, map(all, read)) if by_all]
            dist_util.refuse_unlike({"contents of cases": _digest_of_contents(seen)[:12]},
                                    f"{self.flag} {self.data_dir} must hold the same for every process")
        largest = max((case[0].nbytes + case[1].nbytes for case in sample if not isinstance(case, str)), default=0)
        everything = range(len(self.cases))
        if largest * len(self.cases) <= MEMORY_BYTES:
            return list(self._checked(everything, shows)), "in memory"
        name = f"decoded_{self.image_size}_{self.fit}"
        path = (Path(self.cache_dir, f"{name}_{digest_of([os.path.abspath(self.data_dir)])[:12]}") if self.cache_dir
                else Path(self.data_dir, f".{name}"))
        return (self._decode_together if self.together else self._decode_into)(path, shows)

    def _decode_into(self, path, shows):
        """Find the decoded file, or write it, unless another process does."""
        key, kept, everything = self._key(), f"decoded in {path}", range(len(self.cases))
        if opened := self._opened(path, key):
            return self._try_again(opened), kept
        try:
            with decoded_file.locked(path):
                if opened := self._opened(path, key):  # another process may have written it meanwhile
                    return self._try_again(opened), kept
                decoded_file.write(path, key, self._checked(everything, shows, f"decoding into {path}"))
                return decoded_file.DecodedFile(path, key), kept
        except OSError as error:
            deque(self._checked(everything, shows), 0)
            return None, f"decoded at every visit: {path} cannot be written ({error.strerror or error})"

    def _decode_together(self, path, shows):
        """The same for all ranks, each of which decodes a part, while one, or with a cache_dir one of each machine,
        writes."""
        key = dist_util.from_first_rank(self._key)
        opened = self._opened(path, key)
        if all(dist_util.all_gather_objects(opened is not None)):
            return self._try_again(opened), f"decoded in {path}"
        problem, records = None, self._checked(range(len(self.cases)), shows, f"decoding into {path}")
        first = dist_util.local_rank() if self.cache_dir else dist_util.rank()
        if first == 0:
            try:
                with decoded_file.locked(path):
                    decoded_file.write(path, key, records)
            except OSError as error:
                problem = f"{path} cannot be written ({error.strerror or error})"
        deque(records, 0)  # of which the others need this rank's part
        problem = next(filter(None, dist_util.all_gather_objects(problem)), None)
        opened = self._opened(path, key)
        if problem is None and not all(dist_util.all_gather_objects(opened is not None)):
            problem = f"{path} is not there for every process; give --cache_dir, a folder of each machine's own"
        return opened, f"decoded at every visit: {problem}" if problem else f"decoded in {path}"

    def _key(self):
        """A hash of everything that the decoded cases follow from: names, sizes and times of the files, settings."""
        options = {name: self.readers.options[name] for name in sorted(self.readers_used)}
        if settings := self.readers.settings():
            options[""] = settings
        digest = hashlib.sha256(repr((self.image_channels, options)).encode())
        for files in self.cases:
            for path in (*files.images, *files.labels):
                try:
                    status = path.stat()
                    state = status.st_size, status.st_mtime_ns
                except OSError:  # decoding will say what is wrong with it
                    state = None
                digest.update(repr((str(path.relative_to(self.data_dir)), state)).encode())
        return digest.hexdigest()

    def _opened(self, path, key):
        """The DecodedFile of that key; None if there is none."""
        try:
            decoded = decoded_file.DecodedFile(path, key)
        except OSError:
            return None
        return decoded if len(decoded) == len(self.cases) and all(map(self._fits, decoded)) else None

    def _try_again(self, decoded):
        """Check the cases that a DecodedFile lacks; returns it."""
        lacked = [i for i, (image, *_) in enumerate(decoded) if not len(image)]
        if self.together:  # in the file of any machine
            lacked = sorted(set().union(*dist_util.all_gather_objects(lacked)))
        deque(self._checked(lacked), 0)
        return decoded

    def _fits(self, record):
        image, _, size = record
        if not image.size:
            return True
        fitting = Fitting(size, self.image_size, self.fit)
        try:
            fitting.check(self.data_dir)
        except InputError:
            return False
        return (len(image) in (1, self.image_channels) and image.shape[1:] == fitting.fitted
                and math.prod(size) <= MAX_PIXELS)

    def _checked(self, numbers, shows=False, doing=None):
        """Decode these cases on several threads and yield them, _NOTHING where one is wrong; all `problems` are raised
        at the end unless skip_bad.

        What is yielded does not depend on whether labels are needed, so that all runs share one file.
        """
        results = progress(self._attempts([self.cases[i] for i in numbers]),
                           doing or f"checking {self.data_dir}", len(numbers), "case", enabled=shows, leave=False)
        for result, i in zip(results, numbers):
            if isinstance(result, str):
                self.problems[i] = result
            yield _NOTHING if isinstance(result, str) else result
        for i, files in enumerate(self.cases):
            try:
                check_complete(files, self.need_labels)
            except InputError as error:
                self.problems[i] = str(error)
        if not self.skip_bad:
            raise_problems([self.problems[i] for i in sorted(self.problems)], self.data_dir)

    def _attempts(self, cases):
        """_attempt of each case, in order. Ranks that are together attempt a part each, and exchange them."""
        if not self.together:
            yield from read_ahead(self._attempt, cases)
            return
        rank, ranks = dist_util.rank(), dist_util.world_size()
        for start in range(0, len(cases), SHARE * ranks):
            block = cases[start:start + SHARE * ranks]
            mine = block[rank * len(block) // ranks:(rank + 1) * len(block) // ranks]  # slices of a volume together
            records = [[*map(_as_tensor, record)] if isinstance(record, tuple) else record
                       for record in read_ahead(self._attempt, mine)]
            for record in sum(dist_util.all_gather_objects(records), []):
                yield tuple(map(_as_array, record)) if isinstance(record, list) else record

    def _attempt(self, files):
        """_decode, or what is wrong as a string."""
        try:
            return self._decode(files)
        except InputError as error:
            return str(error)

    def _decode(self, files):
        image, raters, *_ = read_case(files, need_labels=False, readers=self.readers)
        if len(image) not in (1, self.image_channels):
            raise InputError(f"{files.images[0]}: {len(image)} channels in the image(s) of this case, but"
                             f" --image_channels is {self.image_channels}; train with --image_channels auto")
        fitting = Fitting(image.shape[1:], self.image_size, self.fit)
        fitting.check(files.images[0])
        image, raters = fitting.there(image, raters)
        return image, masks.pack(raters), fitting.size


def count_channels(data_dir: str | os.PathLike, flag: str = "--data_dir", options: Mapping[str, Any] | None = None
                   ) -> int:
    """How many channels the images of a folder have, what --image_channels auto means: the most among eight cases.

    :raises InputError: if none of them can be read.
    """
    readers = Readers(options)
    cases, counts, problems = find_cases(data_dir, flag, readers), [], []
    for files in cases[::-(-len(cases) // 8)]:
        try:
            counts.append(len(read_case(files, need_labels=False, readers=readers).image))
        except InputError as error:
            problems.append(str(error))
    if not counts:
        raise_problems(problems, data_dir)
    return max(counts)


def _as_tensor(part):
    """An array of a record as other processes may read it; the size of its scan as it is."""
    return torch.from_numpy(np.ascontiguousarray(part)) if isinstance(part, np.ndarray) else part


def _as_array(part):
    return part.numpy() if isinstance(part, torch.Tensor) else part


def _digest_of_contents(records):
    """A hash of records."""
    digest = hashlib.sha256()
    for image, packed, size in records:
        digest.update(repr((image.shape, str(image.dtype), packed.shape, size)).encode())
        digest.update(image.tobytes() + packed.tobytes())
    return digest.hexdigest()


def read_ahead(read: Callable, items: Iterable) -> Iterator:
    """read(item) for each item, in order, a few ahead of the one in use, on threads of their own."""
    workers = min(8, os.cpu_count() or 1)
    waiting = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
