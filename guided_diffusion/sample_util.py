"""Drawing ensembles of masks for many cases in full batches, and writing them."""

import collections
import concurrent.futures
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import re
import time

import numpy as np
import torch
from PIL import Image, ImageFilter

from . import checkpoint, dist_util, montage, samplers, storage
from .errors import InputError

THRESHOLD = 0.5  # the middle of the mask scaling


class MemberNoise:
    """Gaussian noise for a batch of ensemble members, each row from a generator of its own.

    A member's noise follows from (seed, case name, number of the member) alone, so neither the batch size nor the
    other rows nor the device change it.

    :param members: one (case name, number) a row.
    """

    def __init__(self, seed, members):
        digests = [hashlib.sha256(repr((seed, *member)).encode()).digest() for member in members]
        self.generators = [np.random.default_rng(int.from_bytes(digest, "big")) for digest in digests]

    def __call__(self, like):
        """Fresh noise with the shape, dtype and device of `like`, [N, ...]."""
        rows = [generator.standard_normal(like.shape[1:], dtype=np.float32) for generator in self.generators]
        return dist_util.to_device(torch.from_numpy(np.stack(rows)), like.device).to(like.dtype)


def largest_batch(device, image_size):
    """The most masks that pay to be drawn at once, if the memory holds them: on a CPU, those that its caches hold."""
    return max(1, 2 ** 16 // image_size ** 2) if device.type == "cpu" else 256


class OutOfMemory(InputError, torch.OutOfMemoryError):
    """Not even one network call fits."""


class EnsembleSampler:
    """Draws masks for scans from a denoiser.

    :param model, diffusion: the U-Net in evaluation mode, on its device, and the (respaced) process to walk. It
        computes in the dtype of its weights, see UNetModel.convert_for_sampling.
    :param batch_size: rows of every network call. A batch that is not full is padded to it, since a network's
        rounding depends on the shape of its batch: so a member is the same to the last bit whatever it is drawn with.
        A batch that does not fit into the device's memory is halved, and so are all that follow.
    :param sampler: one of samplers.SAMPLERS; ddim_eta is for "ddim".
    """

    def __init__(self, model, diffusion, *, batch_size=1, seed=0, sampler="ancestral", ddim_eta=0.0,
                 clip_denoised=True):
        self.model, self.diffusion = model, diffusion
        self.batch_size, self.seed = batch_size, seed
        self.walk, self.calls_of = samplers.SAMPLERS[sampler]
        self.options = {"eta": ddim_eta} if sampler == "ddim" else {}
        self.clip_denoised = clip_denoised
        self.device = next(model.parameters()).device

    @property
    def calls(self):
        """Network calls a mask."""
        return self.calls_of(self.diffusion.num_timesteps)

    @torch.no_grad()
    def seconds_a_call(self, image):
        """How long the network takes for one batch of scans like this one, [C, H, W]."""
        x = torch.zeros(self.batch_size, 1, *image.shape[1:], device=self.device)
        images = torch.from_numpy(image).to(self.device).repeat(self.batch_size, 1, 1, 1)
        t = torch.zeros(self.batch_size, dtype=torch.long, device=self.device)
        for _ in range(2):  # the first call also chooses algorithms
            start = time.perf_counter()
            self.diffusion.run_model(self.model, x, t, {"image": images})[0].cpu()
        return time.perf_counter() - start

    def fit_batch_size(self, image):
        """Halve batch_size until a network call on scans like this one, [C, H, W], fits into the device's memory."""
        while True:
            try:
                self.seconds_a_call(image)
                return
            except torch.OutOfMemoryError:
                self._halve_batch_size()

    def _halve_batch_size(self):
        if self.batch_size == 1:
            raise OutOfMemory("the device's memory does not hold one network call; try --use_bf16 True") from None
        self.batch_size //= 2
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def draw(self, images, members, on_step=lambda *_: None):
        """x_0 of one batch, [N, H, W] float32 on the CPU; foreground is above 0.5.

        :param images: [N, C, H, W] float in [0, 1]; members: one (case name, number) a row.
        :param on_step: called after every step of the sampler with the members, x_t and the predicted x_0, both
            [N, 1, H, W] on the device; rows beyond the members repeat the last.
        """
        noise = MemberNoise(self.seed, members)
        images = dist_util.to_device(images, self.device)
        x = noise(torch.empty(len(images), 1, *images.shape[2:], device=self.device))
        for x_t, x_start in self.walk(self.diffusion, self.model, x, noise=noise, clip_denoised=self.clip_denoised,
                                model_kwargs={"image": images}, **self.options):
            on_step(members, x_t, x_start)
        return x_t[:, 0].cpu()

    def ensembles(self, cases, num_ensemble, on_step=lambda *_: None):
        """Draw num_ensemble members for each Case of an iterable; yields (case, samples [n, H, W] float32 array)
        in the same order, each as soon as it is whole. Batches run across cases. on_step as in `draw`."""
        waiting = []  # cases begun, each with the samples it has so far

        def jobs():
            for case in cases:
                waiting.append((case, []))
                for i in range(num_ensemble):
                    yield waiting[-1], i

        jobs = jobs()
        batch = list(itertools.islice(jobs, self.batch_size))
        while batch:
            rows = batch + [batch[-1]] * (self.batch_size - len(batch))
            images = torch.from_numpy(np.stack([case.image for (case, _), _ in rows]))
            try:
                x = self.draw(images, [(case.name, i) for (case, _), i in rows], on_step).numpy()
            except torch.OutOfMemoryError:
                self._halve_batch_size()
                jobs = itertools.chain(batch, jobs)
                x = ()
            for ((_, samples), _), row in zip(batch, x):
                samples.append(row)
            while waiting and len(waiting[0][1]) == num_ensemble:
                case, samples = waiting.pop(0)
                yield case, np.stack(samples)
            batch = list(itertools.islice(jobs, self.batch_size))


class BackgroundWriter:
    """Runs functions one after another on a thread, so that files are written while the next batch is drawn.

    Leaving its `with` waits for all; an error of one is raised at the next call, or then.
    """

    def __init__(self, most_waiting=8):
        self.most_waiting, self.waiting = most_waiting, collections.deque()
        self.pool = concurrent.futures.ThreadPoolExecutor(1)

    def __call__(self, function, *args):
        self.waiting.append(self.pool.submit(function, *args))
        while self.waiting and (self.waiting[0].done() or len(self.waiting) > self.most_waiting):
            self.waiting.popleft().result()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.pool.shutdown()
        if exception[0] is None:
            while self.waiting:
                self.waiting.popleft().result()


def to_masks(samples, median_blur=0):
    """Samples [n, H, W] float -> masks [n, H, W] bool, each median-filtered with this odd side if it is above 1."""
    masks = samples > THRESHOLD
    if median_blur > 1:
        smooth = ImageFilter.MedianFilter(median_blur)
        masks = np.stack([np.asarray(_grey(mask).filter(smooth)) > 127 for mask in masks])
    return masks


# ---- files of a case ----

def _grey(values):
    """[H, W] in [0, 1] or bool -> an 8-bit picture."""
    return Image.fromarray(np.round(np.clip(values, 0, 1) * 255.0).astype(np.uint8))


def case_files(case_name, num_ensemble):
    """Names of all files of a case; the last one is written last.

    :raises InputError: for a name that would lead out of a folder.
    """
    if os.path.basename(case_name) != case_name:
        raise InputError(f"{case_name!r}: is no name of a case, since it leads to another folder; rename it")
    return [*(f"{case_name}_output{i}.png" for i in range(num_ensemble)),
            *(f"{case_name}_{kind}" for kind in ("mean.png", "std.png", "montage.png", "ensemble.npz"))]


def write_case(folder, case, samples, median_blur=0, fingerprint=""):
    """Write the ensemble of one case:

    <case>_output<i>.png   member i, 0 or 255
    <case>_mean.png        probability of foreground: 255 is 1
    <case>_std.png         spread, the standard deviation over members: 255 is 0.5, the largest possible
    <case>_montage.png     all of it, to look at
    <case>_ensemble.npz    samples [n, H, W] float32 before the threshold, and the fingerprint of what drew them

    :param samples: [n, H, W] float32. Members of an older, larger ensemble of the case are removed.
    :raises InputError: if a file cannot be written.
    """
    masks = to_masks(samples, median_blur)
    pictures = [*map(_grey, masks), _grey(masks.mean(0)), _grey(2 * masks.std(0)),
                montage.case_montage(case.name, case.image, case.masks, masks)]
    *names, ensemble = case_files(case.name, len(masks))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, samples=samples.astype(np.float32), fingerprint=np.array(fingerprint))
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
def writing(path):
    """Inside, an OSError becomes an InputError that names this file and the remedy."""
    try:
        yield path
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); mend that and give the same command"
                         f" again: cases that are complete are kept") from None


def fingerprint(case, **settings):
    """A hash of a case's image and of everything else that decides its samples."""
    text = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    text.update(case.image.tobytes())
    return text.hexdigest()


def is_complete(folder, case_name, shape, wanted):
    """Whether all files of a case are there, its samples of this shape (n, H, W) and from the settings with the
    fingerprint `wanted`."""
    paths = [storage.join(folder, name) for name in case_files(case_name, shape[0])]
    if not all(map(storage.exists, paths)):
        return False
    most = 5 * math.prod(shape) + 4096  # bytes, packed or not: 4 a pixel, and some around them
    try:
        if not storage.is_remote(folder) and os.path.getsize(paths[-1]) > most:
            return False
        with np.load(io.BytesIO(storage.read_bytes(paths[-1])), allow_pickle=False) as stored:
            if sum(member.file_size for member in stored.zip.infolist()) > most:  # no more than that is unpacked
                return False
            return str(stored["fingerprint"]) == wanted and stored["samples"].shape == shape
    except Exception:  # numpy, zipfile and zlib raise almost anything on a damaged file
        return False


# ---- masks that are kept until all cases are scored ----

def kept_file(folder, case_name):
    return storage.join(folder, f".drawn_{case_name}.pt")


def keep_masks(folder, case_name, masks, fingerprint):
    """Keep masks [n, H, W] bool, and the fingerprint of what drew them, for a run that goes on after this one.

    :raises InputError: if the file cannot be written.
    """
    packed = torch.from_numpy(np.packbits(masks.reshape(len(masks), -1), axis=1))
    with writing(kept_file(folder, case_name)) as path:
        checkpoint.save(path, {"fingerprint": fingerprint, "masks": packed})


def kept_masks(folder, case_name, shape, wanted):
    """What keep_masks has kept: masks of this shape (n, H, W), None unless they are whole and of the fingerprint
    `wanted`."""
    path = kept_file(folder, case_name)
    if not storage.exists(path):
        return None
    try:
        kept = checkpoint.load(path)
        packed, pixels = kept["masks"], math.prod(shape[1:])
        if kept["fingerprint"] != wanted or packed.shape != (shape[0], -(-pixels // 8)):
            return None
        return np.unpackbits(packed.numpy(), axis=1, count=pixels).astype(bool).reshape(shape)
    except (InputError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # damaged, or another's
        return None
