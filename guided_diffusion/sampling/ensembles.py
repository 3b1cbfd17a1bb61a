"""Drawing ensembles of masks for many cases in full batches."""

import itertools
import time

import numpy as np
import torch

from .. import dist_util, samplers
from ..data.noise import MemberNoise
from ..system.errors import InputError


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
