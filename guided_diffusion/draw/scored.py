"""A scored case, as tables, charts and the report take it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..metrics import SCORES

MODEL, RATERS, BACKGROUND = "model", "resampled raters", "all background"  # who predicted
ALL = "all"  # members of a case, rather than groups of some size


class ScoredCase(NamedTuple):
    """What is kept of a case once it is scored."""

    case: str
    raters: int
    members: int
    scores: dict[tuple[str, str], np.ndarray]  # (predictor, ALL or a size of ensembles) -> [S], in the order of SCORES
    calibration: np.ndarray  # [3, bins]
    pictures: dict[str, Any]  # of report.pictures

    def score(self, name: str, size: str = ALL) -> float | None:
        """A score of the model's ensembles of this size; None if the case has too few members."""
        values = self.scores.get((MODEL, size))
        return None if values is None else float(values[list(SCORES).index(name)])


def ensemble_sizes(cases: Sequence[ScoredCase]) -> list[str]:
    """The sizes of ensembles that some case has scores of, ascending."""
    return sorted({size for case in cases for _, size in case.scores if size != ALL}, key=int)
