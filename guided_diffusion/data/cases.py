"""From files on disk to images and raters' masks.

Layout: one folder a case, `<data_dir>/.../<case>/image_<n>.jpg label0_.jpg label1_.jpg ...`. A file's kind is the part
of its name before the first underscore; JPEG and PNG both count, other files are ignored. Several image files of a
case are its channels, in the order of their names. Any number of raters from 1 up; cases may differ in it.
"""

import contextlib
import hashlib
import os
import re
import unicodedata
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from .. import dist_util
from ..system.errors import InputError, raise_problems
from ..system.terminal import progress
from . import decoded_file, masks, pictures, scaling

SUFFIXES = {".jpg", ".jpeg", ".png"}
FITS = ("error", "resize", "crop")
MEMORY_BYTES = 4 << 30  # decoded data sets up to this size are kept in memory, larger ones in a file beside the data
JPEG_RINGING = 32  # an empty JPEG label may hold values up to about this, of 255
MAX_NAME_BYTES = 200  # of a case, so that the names of its results are none too long for a file system
_NOTHING = np.empty((0, 0, 0), np.uint8), np.empty((0, 0), np.uint8)  # in the place of a case that cannot be read
_UNSAFE = re.compile(r"[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # control characters, bytes that are no UTF-8


class Case(NamedTuple):
    name: str
    image: np.ndarray  # [C, H, W] float32 in [0, 1]
    raters: np.ndarray  # [R, H, W] bool, the mask of each rater


class CaseFiles(NamedTuple):
    name: str
    folder: Path
    images: list
    labels: list


class SegmentationCases:
    """All cases of a folder, checked when opened. Item i is a Case, sorted by name.

    Every file is decoded once, here. What comes out, a byte a pixel and a bit a pixel of a mask, is kept in memory, or
    if that would take more than MEMORY_BYTES in `.decoded_<image_size>_<fit>` in data_dir, which all processes share
    and later runs find again until a file changes; where that cannot be written, files are decoded at every visit.

    :param data_dir: folder as described above; case folders may be nested, and are then named by their path.
    :param image_size: side of the images in pixels.
    :param image_channels: channels of the result; a single-channel image is repeated.
    :param fit: what to do with images of another size: "error", "resize" (to image_size x image_size, whatever the
        aspect ratio) or "crop" (the central square).
    :param need_labels: False for scans nobody has outlined; cases without labels then have raters [0, H, W].
    :param limit: take the first cases only (0: all).
    :param progress: show how far checking is. Of several processes, the one that writes the file shows it anyhow.
    :param skip_bad: keep the places of cases whose files are wrong rather than refuse the folder: reading such an item
        raises InputError, and `problems` says what is wrong with it, {number: message}; see `readable`.
    :param flag: that the folder comes from, for messages.
    :raises InputError: naming everything that is wrong, file by file.
    """

    def __init__(self, data_dir, image_size, image_channels=4, fit="error", need_labels=True, limit=0, progress=False,
                 skip_bad=False, flag="--data_dir"):
        if fit not in FITS:
            raise InputError(f"--fit {fit} is none of {', '.join(FITS)}")
        self.data_dir, self.image_size, self.image_channels = data_dir, image_size, image_channels
        self.fit, self.need_labels, self.skip_bad, self.problems = fit, need_labels, skip_bad, {}
        self.cases = find_cases(data_dir, flag)
        if limit:
            self.cases = self.cases[:limit]
        self.decoded, self.kept = self._decode_all(progress)

    def __len__(self):
        return len(self.cases)

    def __getitem__(self, i):
        image, packed = self.compact(i)
        return Case(self.cases[i].name, scaling.repeat_channel(scaling.to_unit(image), self.image_channels),
                    masks.unpack(packed, self.image_size, self.image_size))

    def readable(self, numbers):
        """Yields (number, Case) of these; those that cannot be read, or not any more, join `problems` instead."""
        for i in numbers:
            try:
                case = self[i]
            except InputError as error:
                self.problems[i] = str(error)
            else:
                yield i, case

    def compact(self, i):
        """Case i as it is kept: image [c, S, S] uint8 or uint16, c 1 or image_channels, and masks as packed bits,
        [R, ceil(S * S / 8)] uint8."""
        image, packed = _NOTHING if self.decoded is None else self.decoded[i]
        return (image, packed) if len(image) else self._decode(self.cases[i])

    def _decode_all(self, shows):
        """Check every case; returns the decoded ones, None if they are not kept, and words for where they are."""
        sample = [self._attempt(files) for files in self.cases[::-(-len(self.cases) // 8)]]
        largest = max((sum(part.nbytes for part in case) for case in sample if not isinstance(case, str)), default=0)
        everything = range(len(self.cases))
        if largest * len(self.cases) <= MEMORY_BYTES:
            return list(self._checked(everything, shows)), "in memory"
        path, key = Path(self.data_dir, f".decoded_{self.image_size}_{self.fit}"), self._key()
        kept = f"decoded in {path}"
        with contextlib.suppress(OSError):
            return self._decoded_file(path, key), kept
        try:
            with decoded_file.locked(path):
                with contextlib.suppress(OSError):  # another process may have written it meanwhile
                    return self._decoded_file(path, key), kept
                several = dist_util.world_size() > 1  # then it may be any of them that writes, while the others wait
                decoded_file.write(path, key, self._checked(everything, shows or several, f"decoding into {path}"))
                return decoded_file.DecodedFile(path, key), kept
        except OSError as error:
            deque(self._checked(everything, shows), 0)
            return None, f"decoded at every visit: {path} cannot be written ({error.strerror or error})"

    def _key(self):
        """A hash of everything that the decoded cases follow from: names, sizes and times of the files, settings."""
        digest = hashlib.sha256(repr((self.image_channels, self.need_labels)).encode())
        for files in self.cases:
            for path in (*files.images, *files.labels):
                try:
                    status = path.stat()
                    state = status.st_size, status.st_mtime_ns
                except OSError:  # decoding will say what is wrong with it
                    state = None
                digest.update(repr((str(path.relative_to(self.data_dir)), state)).encode())
        return digest.hexdigest()

    def _decoded_file(self, path, key):
        """The DecodedFile of that key; the cases that it lacks are tried again."""
        decoded = decoded_file.DecodedFile(path, key)
        sizes = {(0, 0, 0), *((c, self.image_size, self.image_size) for c in (1, self.image_channels))}
        if len(decoded) != len(self.cases) or not {image.shape for image, _ in decoded} <= sizes:
            raise OSError(f"{path}: is of other cases")
        deque(self._checked([i for i, (image, _) in enumerate(decoded) if not len(image)]), 0)
        return decoded

    def _checked(self, numbers, shows=False, doing=None):
        """Decode these cases on several threads and yield them, _NOTHING where one is wrong; all `problems` are raised
        at the end unless skip_bad."""
        results = progress(read_ahead(self._attempt, [self.cases[i] for i in numbers]),
                           doing or f"checking {self.data_dir}", len(numbers), "case", enabled=shows, leave=False)
        for result, i in zip(results, numbers):
            if isinstance(result, str):
                self.problems[i] = result
            yield _NOTHING if i in self.problems else result
        if not self.skip_bad:
            raise_problems([*self.problems.values()], self.data_dir)

    def _attempt(self, files):
        """_decode, or what is wrong as a string."""
        try:
            return self._decode(files)
        except InputError as error:
            return str(error)

    def _decode(self, files):
        image, raters = read_case(files, self.need_labels)
        if len(image) not in (1, self.image_channels):
            raise InputError(f"{files.images[0]}: {len(image)} channels in the image(s) of this case, but"
                             f" --image_channels is {self.image_channels}")
        if image.shape[1:] != (self.image_size,) * 2:
            if self.fit == "error":
                raise InputError(f"{files.images[0]}: is {image.shape[2]} x {image.shape[1]} pixels, but --image_size"
                                 f" is {self.image_size}; give --fit resize or --fit crop, or another --image_size")
            image, raters = fit_case(image, raters, self.image_size, self.fit, files.images[0])
        return image, masks.pack(raters)


def read_ahead(read, items):
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


def find_cases(data_dir, flag="--data_dir"):
    """The case folders under data_dir, sorted by name: every folder that holds files or nothing at all.

    :param flag: that the folder comes from, for messages.
    :raises InputError: naming every folder that cannot be listed, and every name that results cannot be called by.
    """
    root = Path(data_dir)
    if not os.path.isdir(data_dir):
        raise InputError(f"{flag} {data_dir}: no such folder")
    cases, problems = {}, []

    def unlisted(error):
        problems.append(f"{error.filename}: cannot be listed ({error.strerror}); make it readable, or remove it")

    for folder, subfolders, names in os.walk(root, onerror=unlisted, followlinks=True):
        folder = Path(folder)
        if folder.is_symlink() and any(folder.samefile(parent) for parent in folder.parents):
            problems.append(f"{folder}: is a link to a folder that it lies in; remove it")
            subfolders.clear()
            continue
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        paths = sorted(folder / name for name in names if not name.startswith("."))
        files = [path for path in paths if path.suffix.lower() in SUFFIXES]
        problems += [f"{path}: is a link to nothing; mend it, or remove it" for path in paths
                     if path.suffix.lower() not in SUFFIXES and path.is_symlink() and not path.exists()]
        if folder == root or (subfolders and not files):
            continue
        case = case_files("_".join(folder.relative_to(root).parts), folder, files)
        problems += _wrong_names(case)
        same = cases.setdefault(unicodedata.normalize("NFC", case.name), case)
        if same is not case:
            problems.append(f"{folder}: names the same case as {same.folder}; rename one")
    raise_problems(problems, data_dir)
    if not cases:
        raise InputError(f"{flag} {data_dir}: holds no case; each case is a folder with an image_<n>.jpg and"
                         f" label0_.jpg, label1_.jpg, ...")
    return sorted(cases.values(), key=lambda case: case.name)


def case_files(name, folder, paths):
    """The images and labels among the files of a case folder, in their order."""
    labels = [path for path in paths if re.fullmatch(r"label\d+", _kind(path))]
    return CaseFiles(name, folder, sorted(path for path in paths if _kind(path) == "image"),
                     sorted(labels, key=lambda path: (int(_kind(path)[5:]), path)))


def _wrong_names(case):
    """What is wrong with the names of a case and its files."""
    wrong = [case.folder] if _UNSAFE.search(case.name) else [path for path in (*case.images, *case.labels)
                                                             if _UNSAFE.search(path.name)]
    if not wrong and len(case.name.encode()) > MAX_NAME_BYTES:
        return [f"{case.folder}: names its case by {len(case.name.encode())} bytes; rename it, since the files of"
                f" results need names of at most {MAX_NAME_BYTES}"]
    return [f"{str(path)!r}: has control characters in its name, or bytes that are not UTF-8; rename it"
            for path in wrong]  # quoted, so that the message stays one line


def read_case(files, need_labels=True):
    """Decode the files of one case: image [C, H, W] uint8 or uint16, and raters [R, H, W] bool, at their own size.

    :raises InputError: naming the file that is missing or wrong.
    """
    if not files.images:
        raise InputError(f"{files.folder}: no image (a file called image_<n>.jpg or .png)")
    if not files.labels and need_labels:
        raise InputError(f"{files.folder}: no labels (files called label0_.jpg, label1_.jpg, ... or .png)")
    image = _join_channels([_read_image(path) for path in files.images], files.images)
    for first, second in zip(files.labels, files.labels[1:]):
        if _kind(first) == _kind(second):
            raise InputError(f"{second}: is a second {_kind(second)} of its case, beside {first.name}; give every"
                             f" rater a number of their own")
    size = image.shape[1:]
    raters = [_read_label(path, size, files.images[0]) for path in files.labels]
    return image, np.array(raters, dtype=bool).reshape(len(raters), *size)


def fit_case(image, raters, side, fit, path):
    """Bring image [C, H, W] and raters [R, H, W] bool to side x side by `fit`, "resize" or "crop".

    :param path: of the image, for messages.
    :raises InputError: for an image too small to crop.
    """
    height, width = image.shape[1:]
    if fit == "resize":
        raters = [masks.from_pixels(_resize(masks.to_pixels(mask), side)) for mask in raters]
        return (np.stack([_resize(channel, side) for channel in image]),
                np.array(raters, dtype=bool).reshape(len(raters), side, side))
    if min(height, width) < side:
        raise InputError(f"{path}: is {width} x {height} pixels, too small for --fit crop to --image_size {side}; use"
                         f" --fit resize")
    top, left = (height - side) // 2, (width - side) // 2
    window = np.s_[:, top:top + side, left:left + side]
    return image[window].copy(), raters[window].copy()  # a view would keep the whole picture


def _kind(path):
    return path.stem.split("_")[0].lower()


def _read_image(path):
    """[c, H, W], uint8 or uint16; a colour picture whose channels are all equal counts as grey."""
    pixels = pictures.decode(path)
    if pixels.ndim == 3:
        if (pixels == pixels[..., :1]).all():
            return pixels[None, ..., 0]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return pixels[None]


def _join_channels(parts, paths):
    """The pictures [c, H, W] of one case -> one, [C, H, W]."""
    for part, path in zip(parts, paths):
        if part.shape[1:] != parts[0].shape[1:]:
            raise InputError(f"{path}: is {part.shape[2]} x {part.shape[1]} pixels, but the first image of its case,"
                             f" {paths[0].name}, is {parts[0].shape[2]} x {parts[0].shape[1]}")
    return np.concatenate(scaling.widen(parts))


def _read_label(path, size, image_path):
    """[H, W] bool: foreground is above half of full scale."""
    pixels = pictures.decode(path)
    if pixels.ndim == 3:
        pixels = pixels.max(axis=2)
    if pixels.shape != size:
        raise InputError(f"{path}: is {pixels.shape[1]} x {pixels.shape[0]} pixels, but its image"
                         f" {image_path.name} is {size[1]} x {size[0]}")
    full = scaling.full_scale(pixels.dtype)
    mask = masks.from_pixels(pixels)
    brightest = int(pixels.max(initial=0))
    if brightest and not mask.any() and brightest > (JPEG_RINGING if pictures.format_of(path) == "JPEG" else 0):
        raise InputError(f"{path}: its brightest value is {brightest} of {full}, so nothing of it is foreground"
                         f" (above half); write masks as 0 and {full}")
    return mask


def _resize(pixels, side):
    """[H, W] -> [side, side], bilinear with antialiasing, same dtype."""
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))
    picture = Image.fromarray(pixels.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(picture).round().astype(pixels.dtype)
