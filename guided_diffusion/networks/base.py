"""What a diffusion method asks of its network, and the parts of a network that are never trained."""

import abc
import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..unet import TimestepEmbedSequential

Encoded = Any  # a tensor with a row a scan, or a tuple, list or dict of such


class Denoiser(nn.Module, abc.ABC):
    """A base for denoisers; any nn.Module that is called likewise will do, such as unet.SegmentationUNet.

    It is called as model(x_t, timesteps, image=image), or, where one scan is drawn for many times, as
    model(x_t, timesteps, encoded=model.encode(image)).

    :cvar frozen: names of submodules that are never trained, such as a pretrained encoder: they get no gradient, are
        in no average, and are saved once a run.
    :cvar optional: names of submodules that the weights of --init may lack, which then start afresh, or have beside.
    """

    frozen: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()

    def encode(self, image: Tensor) -> Encoded:
        """What can be computed once a scan: image [N, C, H, W] in [0, 1] -> a tensor [N, ...], or a tuple, list or dict
        of such. Here: the scan itself."""
        return image

    @abc.abstractmethod
    def denoise(self, x: Tensor, timesteps: Tensor, encoded: Encoded) -> Tensor:
        """x [N, x_channels, H, W], timesteps [N], and what `encode` returned -> [N, out_channels, H, W]."""

    def forward(self, x: Tensor, timesteps: Tensor, image: Tensor | None = None, encoded: Encoded = None) -> Tensor:
        return self.denoise(x, timesteps, self.encode(image) if encoded is None else encoded)


def encodes_scans(network: nn.Module) -> bool:
    """Whether a denoiser has work to do once a scan."""
    return getattr(type(network), "encode", Denoiser.encode) is not Denoiser.encode


def freeze(network: nn.Module) -> nn.Module:
    """Take the gradient from the frozen parts of a network; returns it."""
    for name in getattr(network, "frozen", ()):
        network.get_submodule(name).requires_grad_(False).eval()
    return network


def train_mode(module: nn.Module) -> None:
    """module.train(), but for the frozen parts of the networks in it."""
    module.train()
    for network in module.modules():
        freeze(network)


def copy_sharing_frozen(network: nn.Module) -> nn.Module:
    """A deep copy that has the frozen parts in common with the original."""
    frozen = [network.get_submodule(name) for name in getattr(network, "frozen", ())]
    return copy.deepcopy(network, {id(module): module for module in frozen})


def without_weights(network: nn.Module) -> nn.Module:
    """A deep copy whose parameters take no memory, for load_state_dict(..., assign=True); in eval mode, without
    gradients."""
    nothing = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False)
               for p in network.parameters()}
    return copy.deepcopy(network, nothing).eval()


def units_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network, of which one is computed after the other: those in lists of modules, and the U-Net's.
    Of blocks within each other, the outer ones."""
    found, inner = [], set()
    for module in network.modules():
        blocks = [*module] if isinstance(module, nn.ModuleList) else (
            [module] if isinstance(module, TimestepEmbedSequential) else [])
        for block in blocks:
            if block not in inner and any(p.requires_grad for p in block.parameters()):
                found.append(block)
                inner.update(block.modules())
    return found


def is_frozen(network: nn.Module, name: str) -> bool:
    """Whether a name of network.state_dict() belongs to a frozen part."""
    return any(name.startswith(f"{part}.") for part in getattr(network, "frozen", ()))


def trained_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict without the frozen parts."""
    return {name: value for name, value in network.state_dict().items() if not is_frozen(network, name)}


def frozen_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of the frozen parts."""
    return {name: value for name, value in network.state_dict().items() if is_frozen(network, name)}
