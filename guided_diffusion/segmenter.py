"""The Python door: load a checkpoint, hand it a scan, get an ensemble of masks."""

from types import SimpleNamespace

import numpy as np
import torch

from . import checkpoint, script_util, storage
from .flags import apply_stored_flags, defaults
from .sample_util import EnsembleSampler, to_masks
from .script_util import BEST


class Segmenter:
    """A trained model, ready to outline scans.

        segmenter = Segmenter.load("results/savedmodel.pt")
        masks = segmenter.sample(image, num_ensemble=16)  # [16, H, W] bool
        probability = masks.mean(0)
    """

    def __init__(self, model, flags, device):
        self.model, self.flags, self.device = model.to(device).eval(), flags, device

    @classmethod
    def load(cls, path, device=None, **flags):
        """Load savedmodel*.pt or emasavedmodel*.pt.

        :param path: a local path, gs:// or az://. The flags of the model are read from flags.json beside it.
        :param device: default CUDA if there is one, else the CPU.
        :param flags: model and diffusion flags, needed for a checkpoint without flags.json beside it.
        :raises InputError: if the file is no checkpoint, or of another architecture than the flags describe, or the
            flags given contradict those stored.
        """
        folder = storage.folder_of(path)
        args = SimpleNamespace(**{**script_util.model_and_diffusion_defaults(), **flags})
        apply_stored_flags(args, flags, checkpoint.load_flags(folder), folder)
        model, _ = script_util.create_model_and_diffusion(**vars(args))
        checkpoint.load_model(model, path, "checkpoint")
        return cls(model, vars(args), torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))

    def sample(self, image, num_ensemble=16, steps=None, seed=0, batch_size=None, name=""):
        """Draw an ensemble of masks for one scan, [num_ensemble, H, W] bool.

        :param image: [H, W], or [C, H, W] with the model's number of channels; uint8 or uint16 spanning their range,
            or floats in [0, 1]. H = W = the model's image_size.
        :param steps: network calls a mask, of the sampler that script_util.BEST names (default: as many as it says).
        :param seed: the same seed gives the same masks.
        :param name: of the case; its masks are then those that segmentation_sample.py draws for it.
        :param batch_size: masks drawn at once (default: all).
        """
        image = self._prepare(image)
        respacing = f"{BEST['timestep_spacing']}{steps or BEST['sampling_steps']}"
        diffusion_flags = {name: self.flags[name] for name in defaults("diffusion")}
        diffusion = script_util.create_gaussian_diffusion(**{**diffusion_flags, "timestep_respacing": respacing})
        sampler = EnsembleSampler(self.model, diffusion, seed=seed, sampler=BEST["sampler"])
        batch_size = batch_size or num_ensemble
        parts = []
        for start in range(0, num_ensemble, batch_size):
            members = [(name, i) for i in range(start, min(start + batch_size, num_ensemble))]
            parts.append(sampler.draw(image.expand(len(members), -1, -1, -1), members))
        return to_masks(torch.cat(parts).numpy())

    def _prepare(self, image):
        """-> [1, C, S, S] float32 in [0, 1]."""
        image = np.asarray(image)
        if image.dtype in (np.uint8, np.uint16):
            image = image / np.iinfo(image.dtype).max
        elif not (np.issubdtype(image.dtype, np.floating) and ((image >= 0) & (image <= 1)).all()):
            raise ValueError(f"image is {image.dtype} from {image.min():g} to {image.max():g}; give uint8, uint16, or"
                             f" floats and scale it to [0, 1]")
        side, channels = self.flags["image_size"], self.flags["image_channels"]
        if image.ndim == 2:
            image = image[None].repeat(channels, axis=0)
        if image.shape != (channels, side, side):
            raise ValueError(f"image is {list(image.shape)}, but the model takes [{side}, {side}] or"
                             f" [{channels}, {side}, {side}]")
        return torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None]
