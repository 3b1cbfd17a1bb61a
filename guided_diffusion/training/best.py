"""The weights that drew the validation cases best."""

from collections.abc import Sequence

from .. import checkpoint, dist_util, logger, shards
from ..data.cases import Case, digest_of
from ..networks.base import trained_state
from ..system import storage
from ..system.errors import InputError
from ..system.lease import Lost
from .callback import Callback, Loop
from .validation import SCORED

SCORE = "GED_unbiased"  # lower is better


class Best(Callback):
    """Keeps as savedmodel_best.pt the weights with the lowest GED_unbiased of the validation cases, the earliest of
    equal ones. Scores of other cases are not compared: the choice then begins anew.

    The file is written at once, with its step and score inside. A run that was killed goes on from an earlier step, and
    finds later weights again. Those up to its step count as found, even if its checkpoint does not know of them.

    :param folder: the results folder.
    """

    def __init__(self, folder: str):
        self.folder = folder
        self.facts: dict = {}  # see checkpoint.save_best; {} before there is a best

    def begin(self, loop: Loop) -> None:
        path, known = storage.join(self.folder, checkpoint.BEST), self.facts
        if dist_util.rank() > 0:
            return
        try:
            found = checkpoint.best_facts(path) if storage.exists(path) else {}
        except InputError as error:
            logger.log(str(error))
            found = {}
        if found.get("step", 0) <= loop.step:
            self.facts = found
        if known and not found:
            logger.log(f"{path} does not hold those of step {known['step']}: the best weights are chosen anew")

    def validated(self, loop: Loop, cases: Sequence[Case], scores: dict[str, float]) -> None:
        rate, averaged = loop.rate_to_use()
        weights = shards.on_first_rank(trained_state(loop.ema[rate] if averaged else loop.method.model))
        if dist_util.rank() > 0:
            return
        facts = {"step": loop.step, SCORE: scores[f"val_{SCORE}_{SCORED}"],
                 "cases": digest_of(case.name for case in cases)}
        if self.facts and self.facts["cases"] != facts["cases"]:
            logger.log(f"the validation cases are not those of step {self.facts['step']}: the best weights are chosen"
                       f" anew")
        elif self.facts and not facts[SCORE] < self.facts[SCORE]:
            return
        try:
            checkpoint.save_best(self.folder, {name: value.cpu() for name, value in weights.items()}, facts)
        except Lost:
            raise
        except Exception as error:  # a bucket raises almost anything
            logger.log(f"{checkpoint.BEST} of step {loop.step} could not be saved in {self.folder} ({error}); training"
                       f" goes on")
            return
        self.facts = facts
        logger.log(f"step {loop.step} has the best {SCORE} of the validation cases so far, {facts[SCORE]:.4f}: its"
                   f" weights{f', averaged at the rate {rate},' if averaged else ''} are"
                   f" {storage.join(self.folder, checkpoint.BEST)}")

    def state(self, loop: Loop) -> dict:
        return {"best": dict(self.facts)}

    def load_state(self, state: dict) -> None:
        self.facts = checkpoint.facts_in(state.get("best"))
