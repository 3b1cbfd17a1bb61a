"""From files on disk to images and raters' masks.

Layout: one folder a case, `<data_dir>/.../<case>/image_<n>.jpg label0_.jpg label1_.jpg ...`. A file's kind is the part
of its name before the first underscore; JPEG and PNG both count, other files are ignored. Several image files of a
case are its channels, in the order of their names. Any number of raters from 1 up; cases may differ in it.
"""

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from .errors import InputError, raise_problems

SUFFIXES = {".jpg", ".jpeg", ".png"}
FITS = ("error", "resize", "crop")
CACHE_BYTES = 4 << 30  # data sets up to this size are decoded once and kept in memory
JPEG_RINGING = 32  # an empty JPEG label may hold values up to about this, of 255


class Case(NamedTuple):
    name: str
    image: np.ndarray  # [C, H, W] float32 in [0, 1]
    masks: np.ndarray  # [R, H, W] bool, one per rater


class _Files(NamedTuple):
    name: str
    folder: Path
    images: list
    labels: list


class SegmentationCases(torch.utils.data.Dataset):
    """All cases of a folder, checked when opened. Item i is a Case, sorted by name.

    :param data_dir: folder as described above; case folders may be nested, and are then named by their path.
    :param image_size: side of the images in pixels.
    :param image_channels: channels of the result; a single-channel image is repeated.
    :param fit: what to do with images of another size: "error", "resize" (to image_size x image_size, whatever the
        aspect ratio) or "crop" (the central square).
    :param need_labels: False for scans nobody has outlined; cases without labels then have masks [0, H, W].
    :param limit: take the first cases only (0: all).
    :param progress: show a bar while checking.
    :raises InputError: naming everything that is wrong, file by file.
    """

    def __init__(self, data_dir, image_size, image_channels=4, fit="error", need_labels=True, limit=0, progress=False):
        if fit not in FITS:
            raise InputError(f"--fit {fit} is none of {', '.join(FITS)}")
        self.image_size, self.image_channels = image_size, image_channels
        self.fit, self.need_labels = fit, need_labels
        self.cases = find_cases(data_dir)
        if limit:
            self.cases = self.cases[:limit]
        self._cache = {}
        self._check(data_dir, progress)

    def __len__(self):
        return len(self.cases)

    def __getitem__(self, i):
        image, packed, raters = self._cache.get(i) or self._read(self.cases[i])
        scale = np.float32(1 / np.iinfo(image.dtype).max)
        image = image * scale
        if len(image) == 1:
            image = np.repeat(image, self.image_channels, axis=0)
        masks = np.unpackbits(packed, count=raters * self.image_size ** 2).astype(bool)
        return Case(self.cases[i].name, image, masks.reshape(raters, self.image_size, self.image_size))

    @property
    def in_memory(self):
        return len(self._cache) == len(self.cases)

    def _check(self, data_dir, progress):
        """Decode every file once, in parallel; keep what was decoded if all of it fits into CACHE_BYTES."""
        problems, kept = [], 0

        def attempt(files):
            try:
                return self._read(files)
            except InputError as error:
                return str(error)

        with ThreadPoolExecutor(min(32, 4 + (os.cpu_count() or 1))) as pool:
            results = tqdm(pool.map(attempt, self.cases), f"checking {data_dir}", len(self.cases), leave=False,
                           disable=None if progress else True, unit=" cases")
            for i, result in enumerate(results):
                if isinstance(result, str):
                    problems.append(result)
                elif kept <= CACHE_BYTES:
                    self._cache[i] = result
                    kept += result[0].nbytes + result[1].nbytes
        if kept > CACHE_BYTES:
            self._cache.clear()
        raise_problems(problems, data_dir)

    def _read(self, files):
        """Decode one case: image [c, S, S] uint8 or uint16, masks as packed bits, number of raters."""
        image, masks = read_case(files, self.need_labels)
        if len(image) not in (1, self.image_channels):
            raise InputError(f"{files.images[0]}: {len(image)} channels in the image(s) of this case, but"
                             f" --image_channels is {self.image_channels}")
        if image.shape[1:] != (self.image_size,) * 2:
            if self.fit == "error":
                raise InputError(f"{files.images[0]}: is {image.shape[2]} x {image.shape[1]} pixels, but --image_size"
                                 f" is {self.image_size}; give --fit resize or --fit crop, or another --image_size")
            image, masks = fit_case(image, masks, self.image_size, self.fit, files.images[0])
        return image, np.packbits(masks), len(masks)


class ShuffledCases(torch.utils.data.Dataset):
    """The endless training stream: position p -> image, one rater's mask, p.

    Position p is place p % n of epoch p // n; every epoch is a fresh permutation of the n cases, and every visit
    draws one of the raters at random. Both follow from (seed, position) alone, so the stream is the same however
    many processes share it, and goes on exactly where it stopped.
    """

    def __init__(self, cases, seed=0):
        self.cases, self.seed = cases, seed
        self._epoch, self._order = None, None

    def __getitem__(self, position):
        epoch, place = divmod(position, len(self.cases))
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = np.random.default_rng([self.seed, 0, epoch]).permutation(len(self.cases))
        case = self.cases[int(self._order[place])]
        rater = np.random.default_rng([self.seed, 1, position]).integers(len(case.masks))
        return (torch.from_numpy(case.image),  # [C, H, W]
                torch.from_numpy(case.masks[rater][None].astype(np.float32)),  # [1, H, W]
                position)

    def batches(self, batch_size, rank=0, world_size=1, start=0, pin_memory=False):
        """Endless batches of this rank: image [N, C, H, W], mask [N, 1, H, W], position [N] (int64).

        `start` is the position of the first global batch; rank r takes the r-th part of each global batch.
        """
        def positions():
            first = start + rank * batch_size
            while True:
                yield range(first, first + batch_size)
                first += world_size * batch_size

        workers = 0 if self.cases.in_memory else min(4, os.cpu_count() or 1)
        return iter(torch.utils.data.DataLoader(self, batch_sampler=positions(), num_workers=workers,
                                                pin_memory=pin_memory, worker_init_fn=_ignore_interrupts))


def _ignore_interrupts(worker):
    """Ctrl-C reaches every process of a terminal; what to do about it is the training loop's decision."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def find_cases(data_dir):
    """The case folders under data_dir, sorted by name: every folder that holds files or nothing at all."""
    root = Path(data_dir)
    if not root.is_dir():
        raise InputError(f"--data_dir {data_dir}: no such folder")
    cases = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        files = sorted(Path(folder, name) for name in names
                       if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES)
        if Path(folder) == root or (subfolders and not files):
            continue
        images = [path for path in files if _kind(path) == "image"]
        labels = [path for path in files if re.fullmatch(r"label\d+", _kind(path))]
        labels.sort(key=lambda path: int(_kind(path)[5:]))
        cases.append(_Files("_".join(Path(folder).relative_to(root).parts), Path(folder), images, labels))
    if not cases:
        raise InputError(f"--data_dir {data_dir}: holds no case; each case is a folder with an image_<n>.jpg and"
                         f" label0_.jpg, label1_.jpg, ...")
    cases.sort(key=lambda files: files.name)
    raise_problems([f"{second.folder}: names the same case as {first.folder}; rename one"
                    for first, second in zip(cases, cases[1:]) if first.name == second.name], data_dir)
    return cases


def read_case(files, need_labels=True):
    """Decode the files of one case: image [C, H, W] uint8 or uint16, and masks [R, H, W] bool, at their own size.

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
    masks = [_read_label(path, size, files.images[0]) for path in files.labels]
    return image, np.array(masks, dtype=bool).reshape(len(masks), *size)


def fit_case(image, masks, side, fit, path):
    """Bring image [C, H, W] and masks [R, H, W] to side x side by `fit`, "resize" or "crop"; `path` names the image.

    :raises InputError: for an image too small to crop.
    """
    height, width = image.shape[1:]
    if fit == "resize":
        masks = [_resize(mask.astype(np.uint8) * 255, side) > 127 for mask in masks]
        return (np.stack([_resize(channel, side) for channel in image]),
                np.array(masks, dtype=bool).reshape(len(masks), side, side))
    if min(height, width) < side:
        raise InputError(f"{path}: is {width} x {height} pixels, too small for --fit crop to --image_size {side}; use"
                         f" --fit resize")
    top, left = (height - side) // 2, (width - side) // 2
    window = np.s_[:, top:top + side, left:left + side]
    return image[window].copy(), masks[window].copy()  # a view would keep the whole picture


def _kind(path):
    return path.stem.split("_")[0].lower()


def decode(path):
    """One picture as an array: [H, W] or [H, W, 3], uint8 or uint16."""
    try:
        with Image.open(path) as picture:
            picture.load()
            if picture.mode == "F":
                raise InputError(f"{path}: holds floating-point numbers; write it with 8 or 16 bits")
            if picture.mode.startswith("I"):  # 16-bit grey; Pillow holds some of it in 32 bits
                return np.asarray(picture).clip(0, 65535).astype(np.uint16)
            if picture.mode in ("1", "L", "LA"):
                return np.asarray(picture.convert("L"))
            return np.asarray(picture.convert("RGB"))
    except Image.DecompressionBombError:
        raise InputError(f"{path}: claims to be larger than any image this reads; replace it") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read ({error}); replace it or remove its case") from None


def _read_image(path):
    """[c, H, W], uint8 or uint16; a colour picture whose channels are all equal counts as grey."""
    pixels = decode(path)
    if pixels.ndim == 3:
        if (pixels == pixels[..., :1]).all():
            return pixels[None, ..., 0]
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return pixels[None]


def _join_channels(parts, paths):
    """The pictures [c, H, W] of one case -> one, [C, H, W]; 8 bits beside 16 are widened, 255 becoming 65535."""
    for part, path in zip(parts, paths):
        if part.shape[1:] != parts[0].shape[1:]:
            raise InputError(f"{path}: is {part.shape[2]} x {part.shape[1]} pixels, but the first image of its case,"
                             f" {paths[0].name}, is {parts[0].shape[2]} x {parts[0].shape[1]}")
    if len({part.dtype for part in parts}) > 1:
        parts = [part * np.uint16(257) if part.dtype == np.uint8 else part for part in parts]
    return np.concatenate(parts)


def _read_label(path, size, image_path):
    """[H, W] bool: foreground is above half of full scale."""
    pixels = decode(path)
    if pixels.ndim == 3:
        pixels = pixels.max(axis=2)
    if pixels.shape != size:
        raise InputError(f"{path}: is {pixels.shape[1]} x {pixels.shape[0]} pixels, but its image"
                         f" {image_path.name} is {size[1]} x {size[0]}")
    full = np.iinfo(pixels.dtype).max
    mask = pixels > full // 2
    brightest = int(pixels.max(initial=0))
    if not mask.any() and brightest > (JPEG_RINGING if path.suffix.lower() != ".png" else 0):
        raise InputError(f"{path}: its brightest value is {brightest} of {full}, so nothing of it is foreground"
                         f" (above half); write masks as 0 and {full}")
    return mask


def _resize(pixels, side):
    """[H, W] -> [side, side], bilinear with antialiasing, same dtype."""
    if pixels.dtype == np.uint8:
        return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.BILINEAR))
    picture = Image.fromarray(pixels.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(picture).round().astype(pixels.dtype)
