"""The energy score of masks: what training on GED itself minimises.

For draws p_1 .. p_n of a model and the masks y_1 .. y_m of the raters, with a distance d,

    2 mean d(p_i, y_j) - mean over i != j of d(p_i, p_j)

is a proper score where d is of negative type (Gneiting and Raftery 2007): on average over raters it is least for their
own distribution. The Jaccard distance is (Bouchard, Jousselme and Dore 2013), and with it the score is GED_unbiased
plus the raters' mean distance, which no model changes.

Masks are [N, n, P]: N scans, n masks of each, P pixels; draws are soft, in [0, 1], and raters' masks 0 or 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def soft_jaccard(a: Tensor, b: Tensor, dummy: float = 0.0) -> Tensor:
    """Distances of every mask of [N, n, P] from every one of [N, m, P]: [N, n, m].

    1 - (sum min(a, b) + dummy) / (sum max(a, b) + dummy), the Jaccard distance of masks that share one more element,
    of weight `dummy` pixels. It makes the gradient finite where both masks are empty. 0 is the distance of the metric:
    two empty masks are 0 apart.
    """
    total = a.sum(-1)[:, :, None] + b.sum(-1)[:, None]
    apart = torch.cdist(a, b, p=1.0)  # sum max - sum min
    return _jaccard(total, apart, dummy)


def soft_jaccard_to_binary(a: Tensor, binary: Tensor, dummy: float = 0.0) -> Tensor:
    """The same where the masks of the second set are 0 or 1, sooner."""
    total = a.sum(-1)[:, :, None] + binary.sum(-1)[:, None]
    return _jaccard(total, total - 2 * a @ binary.transpose(1, 2), dummy)


def _jaccard(total, apart, dummy):
    union = total + apart + 2 * dummy
    return 2 * apart / (union if dummy else union.clamp_min(torch.finfo(union.dtype).tiny))


class Energy(NamedTuple):
    """The energy score of N scans and its two parts, [N] each."""

    score: Tensor  # 2 * to_raters - among_draws
    to_raters: Tensor  # mean distance of a draw from a rater's mask
    among_draws: Tensor  # mean distance of two draws


def energy_score(draws: Tensor, raters: Tensor, present: Tensor, dummy: float = 0.0) -> Energy:
    """The energy score of independent draws against the masks of several raters.

    :param draws: [N, n, P] in [0, 1], n >= 2.
    :param raters: [N, m, P], 0 or 1.
    :param present: [N, m] bool, which raters count. Where none does, their distance is 0.
    :param dummy: see soft_jaccard; above 0 for a gradient that is finite everywhere.
    """
    n = draws.shape[1]
    counted = present.sum(1).clamp_min(1)
    to_raters = (soft_jaccard_to_binary(draws, raters, dummy).mean(1) * present).sum(1) / counted
    among_draws = soft_jaccard(draws, draws, dummy).sum((1, 2)) / (n * (n - 1))  # the diagonal is 0
    return Energy(2 * to_raters - among_draws, to_raters, among_draws)
