"""The Python door: load a checkpoint, hand it scans, get ensembles of masks that say what is uncertain about them."""

import collections
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self, overload

import numpy as np
import torch
from PIL import Image
from torch import nn

from .. import checkpoint, pretrained, script_util
from ..data import manifest, masks, pictures, scaling
from ..data.case_files import CaseContents, CaseFiles, cases_of, read_case, slices_of
from ..data.cases import Case
from ..data.fitting import Fitting, fits_between
from ..data.masks import to_masks
from ..data.readers.base import Readers, refuse_unused
from ..flags import FLAGS, apply_stored_flags, defaults, settle
from ..system import packages, storage
from ..system.errors import InputError
from ..system.flag import check_value
from . import volumes
from .ensembles import EnsembleSampler, largest_batch
from .files import write_case

AnyScan = np.ndarray | torch.Tensor | Image.Image | str | os.PathLike  # see Segmenter.sample
Scans = list[Any] | tuple[Any, ...]  # of AnyScan each
Spacing = tuple[float, float]  # (row, column) distance of pixels in mm


class Ensemble:
    """Plausible masks of one scan. Where an array is expected it is that of its masks; len() and [i] are theirs, too.

    name     of the case; files are called by it
    image    [C, H, W] float32 in [0, 1], at the scan's own size, which masks have, too
    raters   [R, H, W] bool, the labels of a case folder; R = 0 without any
    samples  [n, H, W] float32, before the threshold at 0.5
    masks    [n, H, W] bool
    mean     [H, W] float in [0, 1], the probability of foreground
    std      [H, W] float in [0, 0.5], the spread over the members
    probability_of_any  float in [0, 1], how likely an expert marks anything at all: the share of masks that do
    independent         whether the masks are independent draws, see methods.base.Method
    spacing  (row, column) distance of the masks' pixels in mm, or None
    info     what else the file says of the scan, as its reader has it, a dict
    """

    def __init__(self, case: Case, samples: np.ndarray, spacing: Spacing | None = None,
                 info: Mapping[str, Any] | None = None, independent: bool = True):
        self.name, self.image, self.raters = case
        self.samples, self.spacing, self.info, self.independent = samples, spacing, dict(info or {}), independent
        self.masks = to_masks(samples)
        self.mean, self.std = self.masks.mean(0), self.masks.std(0)
        self.probability_of_any = float(self.masks.any((1, 2)).mean())

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, i: int | slice) -> np.ndarray:
        return self.masks[i]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.masks, dtype=dtype, copy=copy)

    def outline_at(self, p: float = 0.5) -> list[np.ndarray]:
        """Outlines of where the probability of foreground is at least p, 0 < p <= 1.

        :returns: closed contours, a list of [k, 2] float arrays of (x, y) in pixels, the first point again at the end;
            holes are contours of their own, and the list is empty if no pixel is that probable. (0, 0) is the centre
            of the first pixel, and the picture spans -0.5 to W - 0.5. The mean is interpolated between centres.
        :raises InputError: without the package contourpy, which comes with matplotlib.
        """
        if not 0 < p <= 1:
            raise ValueError(f"p is {p}, but must be a probability above 0")
        contourpy = packages.require("contourpy", "outline_at")
        agree = max(1, math.ceil(p * len(self) - 1e-9))  # so many members, wherever the mean is at least p
        level = (agree - 0.5) / len(self)  # no pixel has it, so every pixel is inside or outside
        lines = contourpy.contour_generator(z=np.pad(self.mean, 1)).lines(level)
        return [np.clip(line - 1, -0.5, np.array(self.mean.shape[::-1]) - 0.5) for line in lines]

    def area_interval(self, level: float = 0.9) -> tuple[float, float, float]:
        """(low, median, high) of the foreground's area over the members: `level` of them lie from low to high, as many
        below as above. In mm2 if the spacing is known, else in pixels of the masks."""
        if not 0 <= level <= 1:
            raise ValueError(f"level is {level}, but must be a share from 0 to 1")
        areas = self.masks.sum((1, 2)) * math.prod(self.spacing or (1,))
        return tuple(np.quantile(areas, [(1 - level) / 2, 0.5, (1 + level) / 2]).tolist())

    def save(self, folder: storage.AnyPath, name: str | None = None) -> None:
        """Write the files of segmentation_sample.py, see files.write_case, into a folder, which is made; for a NIfTI or
        DICOM scan of one slice also those of volumes.write_volume. Slices of a volume: see volumes.save_volumes.

        A DICOM picture that does not say where it lies gets the pictures alone, with a warning.

        :param name: of the files, <name>_output0.png, ... (default: that of the ensemble).
        :raises InputError: if they cannot be written.
        """
        storage.make_folder(folder, "folder")
        name = name or self.name
        write_case(folder, Case(name, self.image, self.raters), self.samples, self.masks, independent=self.independent)
        if self.info.get("format") in volumes.FORMATS and self.info["slices"] == 1:
            try:
                volumes.write_volume(folder, name, [(self.info, self.masks)])
            except volumes.NoGeometry as error:
                warnings.warn(str(error), stacklevel=2)


class Segmenter:
    """A trained model, ready to outline scans.

        segmenter = Segmenter.load("results")  # or Segmenter.pretrained("phantoms")
        ensemble = segmenter.sample(image, num_ensemble=16)
        ensemble.masks, ensemble.mean, ensemble.outline_at(0.5), ensemble.area_interval(0.9)
    """

    def __init__(self, model: nn.Module, flags: Mapping[str, Any], device: torch.device | str,
                 dtype: torch.dtype | None = None):
        self.model, self.flags, self.device, self.dtype = model.to(device), dict(flags), torch.device(device), dtype

    @classmethod
    def load(cls, path: storage.AnyPath, device: torch.device | str | None = None, bf16: bool = False, **flags: Any
             ) -> Self:
        """Load savedmodel*.pt, emasavedmodel*.pt or *.safetensors.

        :param path: a local path, gs:// or az://, or a results folder, whose savedmodel.pt is meant, or
            pretrained:NAME. The flags of the model are read from the safetensors file, or from flags.json beside it.
        :param device: default CUDA if there is one, else the CPU.
        :param bf16: compute in bfloat16.
        :param flags: model and diffusion flags, needed for a checkpoint that comes without them.
        :raises InputError: if the file is no checkpoint, or of another architecture than the flags describe, or the
            flags given contradict those stored.
        """
        path = pretrained.path_of(path)
        if os.path.isdir(path) or (storage.is_remote(path) and not path.endswith((".pt", ".safetensors"))):
            path = storage.join(path, checkpoint.NEWEST)
        known = defaults("model", "diffusion", "method")
        if unknown := flags.keys() - known.keys():
            raise TypeError(f"unknown flags: {', '.join(sorted(unknown))}")
        args = SimpleNamespace(**{**known, **flags})
        apply_stored_flags(args, flags, *checkpoint.flags_of(path))
        args.use_bf16 = args.use_bf16 or bf16
        settle(args, flags)
        model = script_util.create_method(script_util.drawing_flags(args), training=False).model
        checkpoint.load_model(model, path, "checkpoint")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        return cls(model, vars(args), device, script_util.autocast_dtype(args))

    @classmethod
    def pretrained(cls, name: str, device: torch.device | str | None = None, bf16: bool = False) -> Self:
        """Load weights that come with the package; docs/weights.md says what they are.

        :param device, bf16: as for `load`.
        :raises InputError: for a name that there is not, naming those there are.
        """
        return cls.load(f"{pretrained.PREFIX}{name}", device, bf16)

    @overload
    def sample(self, image: AnyScan, num_ensemble: int = 16, steps: int | None = None, seed: int = 0,
               batch_size: int | str = "auto", name: str | None = None, *,
               sampler: str = "best", fit: str = "error", spacing: Spacing | None = None,
               data_dir: storage.AnyPath | None = None, options: Mapping[str, Any] | None = None) -> Ensemble: ...

    @overload
    def sample(self, image: Scans, num_ensemble: int = 16, steps: int | None = None, seed: int = 0,
               batch_size: int | str = "auto", name: Sequence[str] | None = None, *,
               sampler: str = "best", fit: str = "error", spacing: Spacing | Sequence[Spacing] | None = None,
               data_dir: storage.AnyPath | None = None, options: Mapping[str, Any] | None = None) -> list[Ensemble]: ...

    def sample(self, image: AnyScan | Scans, num_ensemble: int = 16, steps: int | None = None, seed: int = 0,
               batch_size: int | str = "auto", name: str | Sequence[str] | None = None, *,
               sampler: str = "best", fit: str = "error", spacing: Spacing | Sequence[Spacing] | None = None,
               data_dir: storage.AnyPath | None = None, options: Mapping[str, Any] | None = None
               ) -> Ensemble | list[Ensemble]:
        """Draw an Ensemble of masks for a scan, or a list of them for a list or tuple of scans.

        :param image: an array or tensor [H, W] or [C, H, W], uint8 or uint16 spanning their range, or floats in
            [0, 1]; a PIL image; the path of a PNG or JPEG file, or one of another reader; or that of a case folder,
            with its labels if any, or of a DICOM series. A volume or series gives a list, an Ensemble a slice.
            With --normalise other than full, arrays may hold any numbers.
            H = W = the model's image_size, C is its number of channels, or 1, which is repeated.
        :param steps: of the sampler (default: as many as script_util.BEST says, or all for another sampler).
        :param seed: the same seed gives the same masks: member i follows from (seed, name, i) and the scan.
        :param batch_size: masks drawn at once, across scans (auto: as many as pay and fit). Members do not depend on
            it, but for rounding.
        :param name: of the case, one a scan; masks are then those that segmentation_sample.py draws for it. Default:
            that of the file or folder; other scans have none, so the same noise, and are saved as image, image0, ...
        :param data_dir: the --data_dir that case folders lie in. Those that lie deeper than one level are called by
            their path below it, as segmentation_sample.py calls them, and by their last folder without it.
        :param sampler: best, or another that segmentation_sample.py has.
        :param fit: what to do with scans of another size: "error"; "resize", whatever the aspect ratio (floats with 16
            bits); "crop", the central square; "pad", a smaller scan's edge repeated; "tile", a larger scan by
            overlapping tiles. Masks come back in the scan's own size and place, see data.fitting.
        :param spacing: (row, column) distance of the scan's pixels in mm, or one such pair a scan (default: what its
            file says, or manifest.csv above its case folder).
        :param options: flags of the readers of the files, by name.
        :raises ValueError: for scans it cannot use; InputError: for such files, or options.
        """
        args = self._settings(num_ensemble=num_ensemble, sampling_steps=steps or 0, seed=seed, batch_size=batch_size,
                              sampler=sampler, fit=fit)
        many = isinstance(image, (list, tuple))
        scans, names = (list(image), name) if many else ([image], [name])
        labels = [f"image{i}" for i in range(len(scans))] if many else ["image"]
        names = [None] * len(scans) if names is None else names
        if isinstance(names, str) or len(names) != len(scans):
            raise ValueError(f"name is {names!r}, but must be a list of {len(scans)} names, one for each image")
        readers = Readers({**(options or {}), "normalise": args.normalise, "context": args.context})
        each = [_read(*scan, data_dir, readers) for scan in zip(scans, names, labels)]
        labels = [label for label, slices in zip(labels, each) for _ in slices]
        many, read = many or len(labels) > 1, _with_places(sum(each, []))
        cases = [Case(name, contents.image, contents.raters) for name, contents, _ in read]
        refuse_unused(options or {}, readers.used(files for *_, files in read if files), "the images")
        twice = [case for case, count in collections.Counter(case.name for case in cases).items() if case and count > 1]
        if twice:
            raise ValueError(f"two images are called {twice[0]}; give each a name of its own, name=[...]")
        spacings = self._spacings(spacing, [contents for _, contents, _ in read])
        prepared = [self._prepare(case, case.name or label, fit) for case, label in zip(cases, labels)]
        drawn_from, cases, ways = zip(*prepared) if prepared else ((), (), ())

        method = script_util.create_method(args, self.model, training=False).prepare(self.dtype)
        if fit == "tile":
            method.tile(args.image_size)
        pixels = max((math.prod(way.fitted) for way in ways), default=1)
        largest = largest_batch(self.device, pixels) if batch_size == "auto" else int(batch_size)
        sampler = EnsembleSampler(method, batch_size=min(largest, max(1, len(cases)) * num_ensemble), seed=args.seed)
        ensembles = [Ensemble(case._replace(name=case.name or label), way.back(samples), spacing, contents.info,
                              method.independent)
                     for label, case, way, spacing, (_, contents, _), (_, samples) in
                     zip(labels, cases, ways, spacings, read, sampler.ensembles(drawn_from, num_ensemble))]
        return ensembles if many else ensembles[0]

    def _settings(self, **given):
        """Flags of the model, of sampling, and these; InputError for values that they cannot have."""
        given = {name: value.item() if isinstance(value, np.generic) else value for name, value in given.items()}
        for flag in FLAGS:
            if flag.group in ("sampling", "files and processes") and flag.name in given:
                check_value(flag, given[flag.name], flag.name)
        return script_util.drawing_flags(SimpleNamespace(**self.flags), **given)

    def _prepare(self, case, what, fit):
        """The Case as the model takes it, its image [C, S, S] float32 in [0, 1]; at its own size; and its Fitting.
        ValueError if there is none."""
        side, channels = self.flags["image_size"], self.flags["image_channels"]
        image, raters = case.image, case.raters
        if len(image) not in (1, channels):
            remedy = "image[..., 0], or image.transpose(2, 0, 1)" if image.shape[2] in (1, 3, 4) else "image[0]"
            raise ValueError(f"{what} is {list(image.shape)}, but the model takes [{side}, {side}] or"
                             f" [{channels}, {side}, {side}], channels first; give it as grey, as in {remedy}")
        way = Fitting(image.shape[1:], side, fit)
        if fit == "error" and way.changes:
            values = " or ".join(f'fit="{name}"' for name in fits_between(way.size, side))
            raise ValueError(f"{what} has {image.shape[1]} rows and {image.shape[2]} columns, but the model takes"
                             f" {side} of each; give {values}")
        way.check(what)
        fitted = way.there(scaling.to_16_bits(image) if fit == "resize" and way.changes else image, raters)
        return *(Case(case.name, scaling.repeat_channel(scaling.to_unit(pixels), channels), outlines)
                 for pixels, outlines in (fitted, (image, raters))), way

    def _spacings(self, spacing, scans):
        """(row, column) distance of the masks' pixels, for each of these CaseContents; None where it is unknown."""
        pairs = [contents.spacing for contents in scans]
        if spacing is not None:
            given = np.asarray(spacing, dtype=float)
            if given.shape not in ((2,), (len(scans), 2)) or not ((given > 0) & (given < np.inf)).all():
                raise ValueError(f"spacing is {spacing}, but must be (row, column) in mm, or one such pair an image")
            pairs = np.broadcast_to(given, (len(scans), 2)).tolist()
        return [pair and tuple(pair) for pair in pairs]


# ---- scans of any kind ----

def _read(source, name, label, data_dir, readers):
    """A scan -> a list, one of each slice of a volume: its name, "" for none; its CaseContents, the image as it is,
    uint8, uint16 or float32 in [0, 1]; the CaseFiles that it comes from, None for none. `label` is for messages."""
    if isinstance(source, (str, os.PathLike)):
        return [((name or files.name) if not files.volume else (name or files.volume) +
                 files.name.removeprefix(files.volume), read_case(files, need_labels=False, readers=readers), files)
                for files in _files(Path(os.path.abspath(source)), data_dir, readers)]
    if isinstance(source, Image.Image):
        source = _pixels(source, label)
    elif torch.is_tensor(source):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    image = np.asarray(source)
    if image.ndim not in (2, 3) or not image.size:
        raise ValueError(f"{label} is {list(image.shape)}, but must be [H, W] or [C, H, W]")
    image = image.reshape(-1, *image.shape[-2:])
    image = image.astype(image.dtype.newbyteorder("="), copy=False)
    if str(readers.normalise) != "full":
        try:
            image = readers.normalise.apply(image, readers.normalise.limits(image))
        except ValueError as error:
            raise ValueError(f"{label} is {error}") from None
    kind = image.dtype.kind
    if image.dtype not in (np.uint8, np.uint16) and not (kind == "f" and ((image >= 0) & (image <= 1)).all()):
        extent = f" from {image.min():g} to {image.max():g}" if kind in "iuf" else ""
        raise ValueError(f"{label} is {image.dtype}{extent}; give uint8, uint16, or floats and scale it to [0, 1]")
    image = image.astype(np.float32, copy=False) if kind == "f" else image
    return [(name or "", CaseContents(image, np.zeros((0, *image.shape[1:]), masks.DTYPE), None, {}), None)]


def _with_places(read):
    """What _read gave, with what manifests say of the scans whose files say nothing of their place."""
    rows = iter(manifest.rows_in_order(files for *_, files in read if files))
    found = []
    for name, contents, files in read:
        spacing, info = manifest.with_place(contents.spacing, contents.info, next(rows) if files else {})
        found.append((name, contents._replace(spacing=spacing, info=info), files))
    return found


def _files(path, data_dir, readers):
    """The cases of a folder, or of this one picture or volume."""
    if not path.is_dir():
        return slices_of(CaseFiles(readers.stem_of(path), path.parent, [path], []), readers.slices(path))
    root = Path(os.path.abspath(data_dir or path.parent))
    if root not in path.parents:
        raise InputError(f"data_dir {data_dir}: does not hold {path}; give the folder that its cases lie in")
    return cases_of(path, root, [file for file in path.iterdir() if file.name[0] != "."], readers)


def _pixels(picture, label):
    """A PIL picture -> [H, W] or [C, H, W], by the rules for files; one whose channels are all equal is grey."""
    if picture.getexif().get(0x0112, 1) != 1:
        raise ValueError(f"{label} is stored turned or mirrored (EXIF orientation); give"
                         f" PIL.ImageOps.exif_transpose(image)")
    low, high = picture.getextrema() if picture.mode == "I" else (0, 0)
    if low < 0 or high > 65535:
        raise ValueError(f"{label} holds numbers from {low} to {high}; scale it to 0 to 65535, or to floats in [0, 1]")
    pixels = pictures.pixels_of(picture, label)
    if pixels.ndim == 2:
        return pixels
    return pixels[..., 0] if (pixels == pixels[..., :1]).all() else np.moveaxis(pixels, -1, 0)
