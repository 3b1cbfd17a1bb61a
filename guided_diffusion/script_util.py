"""Flags -> objects, by the published names."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .data import masks
from .flags import defaults, settle
from .methods import METHODS
from .methods.base import Method
from .methods.encoders import create_encoders
from .methods.process import BEST, create_gaussian_diffusion, diffusion_from_flags, settle_prediction
from .networks import NETWORKS
from .networks.unet import create_model
from .respace import SpacedDiffusion
from .system.errors import InputError

__all__ = ["BEST", "autocast_dtype", "create_encoders", "create_gaussian_diffusion", "create_method", "create_model",
           "create_model_and_diffusion", "drawing_flags", "model_and_diffusion_defaults"]


def model_and_diffusion_defaults() -> dict:
    """Defaults of everything that create_model_and_diffusion takes: those of the flags."""
    return defaults("model", "diffusion")


def create_model_and_diffusion(**flags: Any) -> tuple[nn.Module, SpacedDiffusion]:
    """The network and the diffusion process from model and diffusion flags; those left out take the flags' defaults.

    :raises TypeError: for a name that is none of them; InputError: for values that make none, naming their flags.
    """
    known = model_and_diffusion_defaults()
    if unknown := flags.keys() - known.keys():
        raise TypeError(f"unknown flags: {', '.join(sorted(unknown))}")
    f = SimpleNamespace(**{**known, **flags})
    settle_prediction(f, {})
    channels = masks.CHANNELS
    return NETWORKS[f.network](f, channels, channels * (2 if f.learn_sigma else 1)), diffusion_from_flags(f)


def create_method(flags: SimpleNamespace, model: nn.Module | None = None, training: bool = True) -> Method:
    """The method that --method names, from all flags; see Method.from_flags."""
    return METHODS[flags.method].from_flags(flags, model, training)


def drawing_flags(flags: SimpleNamespace, **sampling: Any) -> SimpleNamespace:
    """Flags to draw with: those of a model, and of sampling these; all others take their defaults.

    :raises InputError: for flags that contradict each other.
    """
    args = SimpleNamespace(**{**vars(flags), **defaults("sampling"), **sampling})
    settle(args, {})
    return args


def autocast_dtype(args: SimpleNamespace) -> torch.dtype | None:
    """The dtype of --use_fp16 or --use_bf16, None for float32; InputError for float16 without CUDA."""
    if args.use_fp16 and not torch.cuda.is_available():
        raise InputError("--use_fp16 True: half precision needs CUDA; on a CPU give --use_bf16 True instead")
    return torch.float16 if args.use_fp16 else torch.bfloat16 if args.use_bf16 else None
