"""The contract between a model and everything around it: training, checkpoints, sampling, the Python door."""

import abc
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..data.cases import Case
from ..data.stream import Batch
from ..networks.base import Encoded
from ..networks.tiles import Tiled
from ..system.errors import InputError

Row = tuple[int, str, int]  # a member to draw: which of the encoded scans, the name of its case, its number


class Losses(NamedTuple):
    """What a method makes of a batch of N examples."""

    terms: dict[str, Tensor]  # [N] each; "loss" is what is minimised, the others are its parts
    weights: Tensor  # [N], importance weights: the mean of weights * loss is minimised
    part: Tensor | None = None  # [N] int64, under which of `Method.parts` the log also counts an example
    seen: dict[str, Tensor] = {}  # [N] each, what messages say of an example, as in {"timestep": t}


class Cost(NamedTuple):
    """Network evaluations that drawing takes."""

    scan: int  # once a scan, whatever the number of its masks
    mask: int  # a mask


class Method(nn.Module, abc.ABC):
    """A model of the masks that experts would draw.

    `model` is the network that draws. It is trained and averaged, and its weights are what savedmodel*.pt and
    emasavedmodel*.pt hold. Other networks that are trained are submodules as well, and named by `training_networks`.

    :cvar parts: names of the parts that the log splits losses by; () for none. parts_are: what one is, in words.
    :cvar independent: whether the members of a case are independent draws; False where they are spread evenly over the
        distribution, each of them being a draw. Scores that need independent draws are then left out.
    """

    model: nn.Module
    parts: tuple[str, ...] = ()
    parts_are: str = "part"
    independent: bool = True

    # ---- from flags ----

    @classmethod
    @abc.abstractmethod
    def from_flags(cls, flags: SimpleNamespace, model: nn.Module | None = None, training: bool = True) -> "Method":
        """Build it from all flags of the command line.

        :param model: the network that draws, if there is one already.
        :param training: False for one that only draws.
        :raises InputError: for flags that make no such method, naming them.
        """

    @classmethod
    def settle_flags(cls, flags: SimpleNamespace, given: dict) -> None:
        """Bring the flags into agreement with each other, in place.

        :param given: those that the user gave, by name.
        :raises InputError: for flags that contradict each other.
        """

    @classmethod
    def idle_flags(cls, flags: SimpleNamespace) -> dict[str, str]:
        """The method's flags that have no effect beside the others, each with the reason, as in "without --x"."""
        return {}

    @classmethod
    def quick_flags(cls, flags: SimpleNamespace) -> dict:
        """Sampling flags that draw well and soon, by name; validation cases are drawn so."""
        return {}

    # ---- training ----

    @property
    @abc.abstractmethod
    def loss_names(self) -> list[str]:
        """The names of Losses.terms, "loss" first."""

    @abc.abstractmethod
    def forward(self, batch: Batch) -> Losses:
        """The losses of a batch on the device, image and masks being floats in [0, 1]. Whatever is random follows from
        batch.seed and the examples' batch.places, so that a run does not depend on how it is shared or interrupted."""

    def after_step(self, losses: Losses) -> None:
        """Called on every rank after a step of the optimiser with the detached losses of this rank's examples."""

    def training_networks(self) -> dict[str, nn.Module]:
        """Networks beside `model` that are trained, by the names under which optsavedmodel*.pt keeps their weights."""
        return {}

    def training_state(self) -> dict[str, dict]:
        """What else an exact continuation needs, as entries of optsavedmodel*.pt: dicts of tensors and numbers."""
        return {}

    def load_training_state(self, state: dict[str, dict]) -> None:
        """Take over what training_state returned, out of all entries of a file, of which some may be of networks.

        :raises InputError: if the file is of another kind of run: what is wrong with it, and the remedy. Almost any
            other exception for what is none.
        """

    # ---- drawing ----

    def calibrate(self, cases: Iterable[Case]) -> str:
        """Bring its probabilities in line with cases that training did not see, in place; ready to draw, see `prepare`.

        :returns: what changed, in words.
        :raises InputError: if the method has nothing to calibrate.
        """
        raise InputError("--calibrate: this --method gives no probabilities of its own; leave it away")

    autocast: torch.dtype | None = None  # that of `precision`, for `prepare` to set

    def precision(self, device: torch.device) -> AbstractContextManager:
        """Inside, networks on this device compute in `autocast`, or as their weights are."""
        return torch.autocast(device.type, self.autocast) if self.autocast else nullcontext()

    @abc.abstractmethod
    def prepare(self, dtype: torch.dtype | None = None, compile: bool = False) -> "Method":
        """Make ready to draw, in this dtype (None: that of the weights), compiled if asked to; returns the method."""

    def tile(self, side: int) -> None:
        """From now on draw scans that are larger than this side by tiles of it, see networks.tiles.

        Overwrite it where `model` is not itself a network that is called as denoisers are.

        :raises InputError: if it cannot.
        """
        self.model = Tiled(self.model, side)

    @property
    @abc.abstractmethod
    def cost(self) -> Cost:
        """How many network evaluations a scan and a mask take."""

    @property
    def steps(self) -> int:
        """How often `draw` calls on_step, at least once."""
        return max(1, self.cost.mask)

    @property
    def advice(self) -> str:
        """A flag that would draw much sooner, as half a sentence; "" if there is none."""
        return ""

    @abc.abstractmethod
    def encode(self, images: Tensor) -> Encoded:
        """What drawing needs of scans, computed once each: [S, C, H, W] in [0, 1] on the device -> a tensor [S, ...],
        or a tuple, list or dict of such."""

    @abc.abstractmethod
    def draw(self, encoded: Encoded, rows: Sequence[Row], seed: int, on_step: Callable[[Tensor, Tensor], None]
             ) -> Tensor:
        """One mask a row, [N, H, W] float32 before the threshold of data.masks.

        A row's mask follows from its scan and from (seed, case, member) alone.

        :param encoded: of one or more scans, which rows[i][0] counts.
        :param on_step: told after each of `steps` steps what there is, and what it leads to as far as can be seen: x_t
            and the predicted x_0, [N, 1, H, W] in the scaling of masks.
        """

    def evaluate_once(self, encoded: Encoded, rows: Sequence[Row]) -> None:
        """One network evaluation of as much as `draw` does at once, to see what time and memory it takes."""
        self.draw(encoded, rows, 0, lambda *_: None)


# ---- what `encode` returns ----

def select(encoded: Encoded, scans: Sequence[int]) -> Encoded:
    """Those scans out of what Method.encode returned, in this order."""
    if isinstance(encoded, dict):
        return {key: select(value, scans) for key, value in encoded.items()}
    if isinstance(encoded, (tuple, list)):
        return type(encoded)(select(value, scans) for value in encoded)
    return encoded[torch.as_tensor(scans, device=encoded.device)]


def join(parts: Sequence[Encoded]) -> Encoded:
    """What Method.encode returned for several scans, as if it had been asked for all of them at once."""
    first = parts[0]
    if isinstance(first, dict):
        return {key: join([part[key] for part in parts]) for key in first}
    if isinstance(first, (tuple, list)):
        return type(first)(join(values) for values in zip(*parts))
    return torch.cat(parts)
