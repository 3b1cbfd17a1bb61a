"""Parameters that are shared out among ranks, each of which holds a part of every one (FSDP2 of PyTorch; Zhao et al.
2023, arXiv 2304.11277).

Beside them, gradients, moments of the optimiser and moving averages are shared out in the same way. For what a unit of
a network computes, its parameters come together on every rank, and are let go again.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import dist_util


def share_out(network: nn.Module, units: Iterable[nn.Module], reduce_dtype: torch.dtype | None = None) -> nn.Module:
    """Share out the parameters of a network in place, of which every rank has the same copy; returns it, on the device
    of this process. Parameters that get no gradient stay whole if they are of `frozen` parts.

    :param units: modules of it that are called, and whose parameters come together at a time; all the others do when
        the network itself is called.
    :param reduce_dtype: in which gradients are sent; None: as they are.
    """
    from torch.distributed.device_mesh import init_device_mesh  # a second of importing
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # networks here change nothing in place while there are gradients
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    device = dist_util.dev()
    kept = {p for module in network.modules() for name in getattr(module, "frozen", ())
            for p in module.get_submodule(name).parameters()}
    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
                               "mp_policy": MixedPrecisionPolicy(reduce_dtype=reduce_dtype)}
    if kept:
        options["ignored_params"] = kept
    for p in network.parameters():
        p.data = p.data.contiguous()  # which FSDP asks for
    for unit in (*units, network):
        fully_shard(unit, **options)
    for p in kept:
        p.data = p.data.to(device)
    return network


def is_shared(tensor: Tensor) -> bool:
    """Whether a rank holds only a part of it."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor, which shares its memory."""
    return tensor.to_local() if is_shared(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor; every rank calls this for the same tensors in the same order."""
    return tensor.full_tensor() if is_shared(tensor) else tensor


def as_held(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every rank has whole, held as another of its shape is."""
    if not is_shared(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def on_first_rank(state: Any) -> Any:
    """Containers of tensors with all that is shared out brought together on the CPU of rank 0; others get none of that.
    Every rank calls this. What is not shared out stays as it is."""
    if isinstance(state, Tensor):
        if not is_shared(state):
            return state
        together = whole(state)
        return together.to("cpu", copy=True) if dist_util.rank() == 0 else None
    if isinstance(state, dict):
        return {key: on_first_rank(value) for key, value in state.items()}
    return type(state)(map(on_first_rank, state)) if isinstance(state, (list, tuple)) else state


def bytes_held(tensors: Iterable[Tensor]) -> int:
    """Bytes of what this rank holds of them."""
    return sum(local(tensor).nbytes for tensor in tensors)
