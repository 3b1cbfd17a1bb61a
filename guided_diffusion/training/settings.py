"""How a run is trained."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from ..flags import default


@dataclass
class Settings:
    """How a run is trained; the defaults are those of the flags, which say what each one means."""

    batch_size: int = default("training", "batch_size")  # of this process
    grad_accumulation: int = default("training", "grad_accumulation")
    global_batch: int = default("training", "global_batch")
    microbatch: int = default("training", "microbatch")
    optimizer: str = default("training", "optimizer")
    lr: float = default("training", "lr")
    lr_scaling: str = default("training", "lr_scaling")
    lr_base_batch: int = default("training", "lr_base_batch")
    weight_decay: float = default("training", "weight_decay")
    lr_anneal_steps: int = default("training", "lr_anneal_steps")
    lr_warmup: int = default("training", "lr_warmup")
    max_steps: int = default("training", "max_steps")
    ema_rate: str = default("training", "ema_rate")
    log_interval: int = default("training", "log_interval")
    wire_dtype: str = default("training", "wire_dtype")
    shard: bool = default("training", "shard")
    grad_clip: float = default("training", "grad_clip")
    fp16_scale_growth: float = default("training", "fp16_scale_growth")
    init: str = default("training", "init")  # weights that the run started from
    seed: int = default("files and processes", "seed")
    image_channels: int = default("model", "image_channels")
    dtype: torch.dtype | None = None  # of autocast: float16, bfloat16, or None for float32

    @classmethod
    def from_flags(cls, args: SimpleNamespace, dtype: torch.dtype | None = None) -> "Settings":
        """Out of the flags of a training."""
        return cls(dtype=dtype, **{name: getattr(args, name) for name in cls.__dataclass_fields__ if name != "dtype"})
