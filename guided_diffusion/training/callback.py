"""What hooks into the training loop: saving, watching, drawing validation cases, the live view."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.cases import Case
from ..data.stream import Batch
from ..methods.base import Losses

Loop = Any  # a TrainLoop, whose module imports this one


class Stopped(Exception):
    """Drawing was broken off by a signal; raised on every rank."""


class Callback:
    """All of it does nothing, until overridden. `loop` is the TrainLoop; every rank calls everything in the same order.
    """

    def overdue(self, loop: Loop) -> bool:
        """Whether, where the run resumes, something that belongs behind the step is still to be done."""
        return False

    def begin(self, loop: Loop) -> None:
        """Before the first step of this process."""

    def doing(self, loop: Loop, words: str, within: Sequence[int] = ()) -> None:
        """What this rank does from now on, in words; `within` counts up where ranks do different amounts of it."""

    def stepped(self, loop: Loop, batch: Batch, losses: Losses, bad: Any) -> None:
        """Behind the optimiser's step, with the batch of this rank; bad: a watch.Later of whether it was skipped."""

    def scores(self, loop: Loop) -> dict[str, float]:
        """Behind a step: what is to be logged of it at once. :raises Stopped: to end the loop."""
        return {}

    def figures(self, loop: Loop) -> dict[str, float]:
        """What joins the losses in a line of the log."""
        return {}

    def logged(self, loop: Loop) -> None:
        """Behind a line of the log."""

    def drawn(self, loop: Loop, cases: Sequence[Case], masks: Sequence[np.ndarray], title: str) -> None:
        """Ensembles [n, H, W] bool were drawn of these cases."""

    def validated(self, loop: Loop, cases: Sequence[Case], scores: dict[str, float]) -> None:
        """The weights of loop.rate_to_use have drawn these validation cases, with these mean scores, as
        {"val_GED_16": ..., ...}."""

    def turned(self, loop: Loop, logs: bool) -> None:
        """At the end of each turn of the loop; logs: whether losses were logged in it."""

    def wants_to_stop(self, loop: Loop) -> bool:
        """Whether the loop should end."""
        return False

    def state(self, loop: Loop) -> dict:
        """What goes into optsavedmodel<step>.pt: numbers, tensors, and lists and dicts of them."""
        return {}

    def load_state(self, state: dict) -> None:
        """Take over what `state` returned, out of all that the file holds; raises almost anything if it cannot."""

    def end(self, loop: Loop) -> None:
        """Behind the last step, also when a signal ended the loop."""
