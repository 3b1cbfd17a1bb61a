"""The files of an ensemble: written, found again, and kept until all cases are scored."""

import collections
import concurrent.futures
import contextlib
import hashlib
import io
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Self

import numpy as np
import torch
from PIL import Image

from .. import checkpoint
from ..data.cases import Case
from ..data.masks import pack, packed_size, to_pixels, unpack
from ..draw import montage
from ..flags import FLAGS
from ..system import storage
from ..system.errors import InputError


class BackgroundWriter:
    """Runs functions one after another on a thread, so that files are written while the next batch is drawn.

    `wait`, or leaving its `with`, waits for all; an error of one is raised at the next call, or then.
    """

    def __init__(self, most_waiting: int = 8):
        self.most_waiting, self.waiting = most_waiting, collections.deque()
        self.pool = concurrent.futures.ThreadPoolExecutor(1)

    def __call__(self, function: Callable, *args: Any) -> None:
        self.waiting.append(self.pool.submit(function, *args))
        while self.waiting and (self.waiting[0].done() or len(self.waiting) > self.most_waiting):
            self.waiting.popleft().result()

    def wait(self) -> None:
        while self.waiting:
            self.waiting.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.pool.shutdown()
        if exception[0] is None:
            self.wait()


# ---- files of a case ----

def _grey(values):
    """[H, W] in [0, 1] -> an 8-bit picture."""
    return Image.fromarray(np.round(np.clip(values, 0, 1) * 255.0).astype(np.uint8))


def result_names(case_name: str, num_ensemble: int) -> list[str]:
    """Names of all files of the results of a case; the last one is written last.

    :raises InputError: for a name that would lead out of a folder.
    """
    if os.path.basename(case_name) != case_name:
        raise InputError(f"{case_name!r}: is no name of a case, since it leads to another folder; rename it")
    return [*(f"{case_name}_output{i}.png" for i in range(num_ensemble)),
            *(f"{case_name}_{kind}" for kind in ("mean.png", "std.png", "montage.png", "ensemble.npz"))]


def write_case(folder: storage.AnyPath, case: Case, samples: np.ndarray, masks: np.ndarray, fingerprint: str = "",
               independent: bool = True) -> None:
    """Write the ensemble of one case:

    <case>_output<i>.png   member i, 0 or 255
    <case>_mean.png        probability of foreground: 255 is 1
    <case>_std.png         spread, the standard deviation over members: 255 is 0.5, the largest possible
    <case>_montage.png     all of it, to look at
    <case>_ensemble.npz    samples [n, H, W] float32 before the threshold, the fingerprint of what drew them, and, if
                           they are no independent draws, an entry `spread`, see draws_are_independent

    :param samples: [n, H, W] float32; masks: [n, H, W] bool, cut from them. Members of an older, larger ensemble of
        the case are removed.
    :param independent: what Method.independent says of them.
    :raises InputError: if a file cannot be written.
    """
    pictures = [*map(Image.fromarray, to_pixels(masks)), _grey(masks.mean(0)), _grey(2 * masks.std(0)),
                montage.case_montage(case.name, case.image, case.raters, masks)]
    *names, ensemble = result_names(case.name, len(masks))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, samples=samples.astype(np.float32), fingerprint=np.array(fingerprint),
                        **({} if independent else {"spread": np.array(True)}))
    with writing(storage.join(folder, ensemble)) as path:
        if storage.exists(path):  # of an older ensemble, which is not whole once the first picture is another's
            storage.remove(path)
        for name in () if storage.is_remote(folder) else os.listdir(folder):
            match = re.fullmatch(re.escape(case.name) + r"_output(\d+)\.png", name)
            if match and int(match[1]) >= len(masks):
                os.unlink(os.path.join(folder, name))
    for name, data in zip((*names, ensemble), (*map(montage.png, pictures), buffer.getvalue())):
        with writing(storage.join(folder, name)) as path:
            storage.write_bytes(path, data)


@contextlib.contextmanager
def writing(path: str) -> Iterator[str]:
    """Inside, an OSError becomes an InputError that names this file and the remedy."""
    try:
        yield path
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); mend that and give the same command"
                         f" again: cases that are complete are kept") from None


# Flags that the first fingerprints held; others join where they are not as they were then, so that these stay good
_FIRST = {"image_size", "image_channels", "num_channels", "num_res_blocks", "channel_mult", "num_heads",
          "num_heads_upsample", "num_head_channels", "attention_resolutions", "dropout", "class_cond", "use_checkpoint",
          "use_scale_shift_norm", "resblock_updown", "use_new_attention_order", "use_fp16", "use_bf16", "learn_sigma",
          "diffusion_steps", "noise_schedule", "timestep_respacing", "use_kl", "predict_xstart", "rescale_timesteps",
          "rescale_learned_sigmas", "sampler", "ddim_eta", "clip_denoised", "median_blur"}
_ONLY_IN_TRAINING = {"dropout": 0.0, "use_checkpoint": False}
# these say which cases and how many masks are drawn, or are settled in other flags
_NO_MATTER = {"data_dir", "model_path", "num_ensemble", "num_samples", "batch_size", "evaluate", "sampling_steps",
              "timestep_spacing", "use_ddim"}


def drawing_settings(args: SimpleNamespace, model_digest: str) -> list[dict[str, Any]]:
    """What of all flags and the weights decides the masks of a case, as `fingerprint` takes it.

    :returns: settings that mean the same; masks with the fingerprint of any are good. The first are today's.
    """
    settings = {"model": model_digest, "seed": args.seed}
    for flag in FLAGS:
        if flag.group in ("model", "diffusion", "method", "sampling") and flag.name not in _NO_MATTER:
            value = getattr(args, flag.name)
            if flag.name in _FIRST or value != flag.default:
                settings[flag.name] = value
    if settings["predict_xstart"]:
        del settings["prediction"]  # says the same
    return [{**settings, **_ONLY_IN_TRAINING}, settings]


def digest_of(settings: Mapping[str, Any], **more: Any) -> str:
    """A hash of settings that decide masks, and of more."""
    return hashlib.sha256(json.dumps({**settings, **more}, sort_keys=True).encode()).hexdigest()


def fingerprint(case: Case, **settings: Any) -> str:
    """A hash of a case's image and of everything else that decides its samples."""
    text = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    text.update(case.image.tobytes())
    return text.hexdigest()


def is_complete(folder: str, case_name: str, shape: tuple[int, int, int], *wanted: str) -> bool:
    """Whether all files of a case are there, its samples of this shape (n, H, W) and from settings with one of the
    fingerprints `wanted`."""
    paths = [storage.join(folder, name) for name in result_names(case_name, shape[0])]
    if not all(map(storage.exists, reversed(paths))):  # the last one is written last
        return False
    most = 5 * math.prod(shape) + 4096  # bytes, packed or not: 4 a pixel, and some around them
    try:
        if not storage.is_remote(folder) and os.path.getsize(paths[-1]) > most:
            return False
        with np.load(io.BytesIO(storage.read_bytes(paths[-1])), allow_pickle=False) as stored:
            if sum(member.file_size for member in stored.zip.infolist()) > most:  # no more than that is unpacked
                return False
            return str(stored["fingerprint"]) in wanted and stored["samples"].shape == shape
    except Exception:  # numpy, zipfile and zlib raise almost anything on a damaged file
        return False


def draws_are_independent(folder: str | os.PathLike, case_name: str) -> bool:
    """Whether the members of a case in a local folder are independent draws; those are that no file says it of.

    :raises InputError: if the file that would say it cannot be read.
    """
    path = os.path.join(folder, f"{case_name}_ensemble.npz")
    try:
        with zipfile.ZipFile(path) as archive:  # what its entries hold is not unpacked
            return "spread.npy" not in archive.namelist()
    except FileNotFoundError:
        return True
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: cannot be read ({error}), but says whether the masks are independent draws; sample"
                         f" the case again, or remove the file if they are") from None


# ---- masks that are kept until all cases are scored ----

def kept_file(folder: str, case_name: str) -> str:
    return storage.join(folder, f".drawn_{case_name}.pt")


def keep_masks(folder: str, case_name: str, masks: np.ndarray, fingerprint: str, scored: dict[str, Any] | None = None
               ) -> None:
    """Keep masks [n, H, W] bool, the fingerprint of what drew them and how they were scored, for the process that
    brings all scores together, and for a run that goes on after this one.

    :param scored: what Evaluation.state said of them.
    :raises InputError: if the file cannot be written.
    """
    packed = torch.from_numpy(pack(masks))
    with writing(kept_file(folder, case_name)) as path:
        checkpoint.save(path, {"fingerprint": fingerprint, "masks": packed, **({"scored": scored} if scored else {})})


def kept_scores(folder: str, case_name: str) -> dict[str, Any] | None:
    """What keep_masks was told of the scores of masks that kept_masks returns."""
    return checkpoint.load(kept_file(folder, case_name)).get("scored")


def kept_masks(folder: str, case_name: str, shape: tuple[int, int, int], *wanted: str
               ) -> np.ndarray | None:
    """What keep_masks has kept: masks of this shape (n, H, W), None unless they are whole and of one of the
    fingerprints `wanted`."""
    path = kept_file(folder, case_name)
    if not storage.exists(path):
        return None
    try:
        kept = checkpoint.load(path)
        packed = kept["masks"]
        if kept["fingerprint"] not in wanted or packed.shape != (shape[0], packed_size(*shape[1:])):
            return None
        return unpack(packed.numpy(), *shape[1:])
    except (InputError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # damaged, or another's
        return None
