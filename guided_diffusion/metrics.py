"""Scores of an ensemble of masks against the masks of several raters.

P = {p_1 .. p_n} are the predictions, Y = {y_1 .. y_m} the raters' masks of one scan, n and m any number from 1 up.
Everything that compares two masks follows from their areas and their intersection, so one matrix product of all masks
with all masks serves all scores. Two empty masks agree fully: their IoU and Dice are 1.

    scores = metrics.scores(predictions, raters)             # every score, by its name
    ged = metrics.Agreement(predictions, raters).ged()       # one of them

Another score is a function of an Agreement that gives one number for each set of masks. Registered, it is in every
table, chart and file of scores:

    @SCORES.add("area_error", "mean area of the masks less that of the raters, in pixels; 0 is best")
    def area_error(agreement):
        return agreement.area[..., :agreement.n].mean(-1) - agreement.area[..., agreement.n:].mean(-1)
"""

import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch

from .system.errors import InputError
from .system.registry import Registry, place_of

SCORES = Registry("score")  # functions of an Agreement; a score's own flags are their keyword arguments
PATIENT_PATTERN = r"\D*\d+"  # the patient in the name of a case: all up to the end of the first number
SOFT_DICE_THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
ECE_BINS = 10
# What these say in expectation holds for independent draws only, not for members that are spread over the distribution
FOR_INDEPENDENT_DRAWS = ("GED_unbiased", "ECE", "diversity", "presence_Brier")

Masks = np.ndarray | torch.Tensor  # bool [..., number of masks, H, W]
Distance = Literal["IoU", "Dice"]


class Agreement:
    """What two sets of masks have in common; every score is a method, and returns float64 of the leading shape.

    :param predictions: bool [..., n, H, W], an array or a tensor on any device.
    :param raters: bool [..., m, H, W]; the leading axes (cases, say) broadcast against those of the predictions.
    :raises ValueError: for masks that are not bool, an empty set, or sizes that differ.

    For scores to use, all on the device of the predictions:

    shape: the leading one, of every score; n, m: how many predictions and raters; pixels: of a mask
    masks: bool [..., n + m, H, W], predictions first
    area: float64 [..., n + m], in pixels; intersection: float64 [..., n + m, n + m], of every pair
    votes_p, votes_y: int64 [..., pixels], how many predictions, or raters, mark each pixel
    """

    def __init__(self, predictions: Masks, raters: Masks):
        predictions, raters = _masks(predictions, "predictions"), _masks(raters, "raters")
        if predictions.shape[-2:] != raters.shape[-2:]:
            raise ValueError(f"predictions are {list(predictions.shape[-2:])} pixels, but raters"
                             f" {list(raters.shape[-2:])}")
        self.shape = torch.broadcast_shapes(predictions.shape[:-3], raters.shape[:-3])
        self.n, self.m = predictions.shape[-3], raters.shape[-3]
        self.masks = torch.cat([x.expand(*self.shape, *x.shape[-3:])
                                for x in (predictions, raters.to(predictions.device))], -3)  # [..., n + m, H, W]
        masks = self.masks.flatten(-2)  # [..., n + m, pixels]
        self.pixels = masks.shape[-1]
        # sums of up to 2**24 ones are exact in float32, in TF32 as well
        ones = masks.to(torch.float32 if self.pixels <= 1 << 24 else torch.float64)
        with torch.autocast(ones.device.type, enabled=False):
            self.intersection = (ones @ ones.mT).double()  # [..., n + m, n + m]
        self.area = self.intersection.diagonal(dim1=-2, dim2=-1)
        self.votes_p = masks[..., :self.n, :].sum(-2)  # [..., pixels]
        self.votes_y = masks[..., self.n:, :].sum(-2)

    # ---- pairs of masks ----

    def similarity(self, kind: Distance = "IoU") -> torch.Tensor:
        """IoU or Dice of every pair, [..., n + m, n + m], predictions first."""
        areas = self.area[..., :, None] + self.area[..., None, :]
        above, below = {"IoU": (self.intersection, areas - self.intersection),
                        "Dice": (2 * self.intersection, areas)}[kind]
        return torch.where(below > 0, above / below.clamp(min=1), 1.0)

    def distances(self, kind: Distance = "IoU") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """d = 1 - IoU (or 1 - Dice) within P [..., n, n], across [..., n, m] and within Y [..., m, m]."""
        d, n = 1 - self.similarity(kind), self.n
        return d[..., :n, :n], d[..., :n, n:], d[..., n:, n:]

    # ---- scores, in the order of tables and files ----

    @SCORES.add("GED", "squared generalised energy distance of masks and raters; 0 is best")
    def ged(self, kind: Distance = "IoU", unbiased: bool = False) -> torch.Tensor:
        """Squared generalised energy distance: 2 mean d(p, y) - mean d(p, p') - mean d(y, y'); lower is better.

        Kohl et al. 2018 (arXiv 1806.05034), eq. 6 and appendix B. Each mean is over all ordered pairs, a mask with
        itself included, as published results are: in [0, 2], 0 for equal sets, but it shrinks as n grows even when
        the distribution stays the same. `unbiased` leaves a mask with itself out: in [-2, 2], 0 in expectation for
        draws of the raters' distribution at any n and m from 2 up, below 0 by chance. A set of one mask, whose spread
        is unknown, counts as without any, so its score is too high.
        """
        within_p, across, within_y = self.distances(kind)
        return 2 * across.mean((-2, -1)) - _pair_mean(within_p, not unbiased) - _pair_mean(within_y, not unbiased)

    @SCORES.add("GED_unbiased", "GED that compares no mask with itself; 0 in expectation for draws of the raters'"
                " distribution, may be below 0")
    def ged_unbiased(self) -> torch.Tensor:
        """Squared generalised energy distance without bias: see ged."""
        return self.ged(unbiased=True)

    @SCORES.add("HM_IoU", "Hungarian-matched IoU: mean IoU of the best one-to-one matching; 1 is best")
    def hm_iou(self) -> torch.Tensor:
        """Hungarian-matched IoU, in [0, 1]: the mean IoU of the best one-to-one matching of P with Y.

        Kohl et al. 2019 (arXiv 1905.13077). Both sets are repeated to the least common multiple of n and m, so that
        every mask counts as often as the others of its set. (To match only min(n, m) of each, as some do, rewards
        many predictions for hitting few raters; to repeat the smaller set and cut it off weighs raters unequally.)
        """
        from scipy.optimize import linear_sum_assignment

        similarity = self.similarity()[..., :self.n, self.n:].cpu().numpy()
        times = math.lcm(self.n, self.m)
        result = np.empty(similarity.shape[:-2])
        for place in np.ndindex(result.shape):
            iou = np.tile(similarity[place], (times // self.n, times // self.m))
            result[place] = iou[linear_sum_assignment(iou, maximize=True)].mean()
        return torch.from_numpy(result).to(self.area.device)

    def best_dice(self) -> torch.Tensor:
        """For each rater the best Dice among the predictions, [..., m] in [0, 1]."""
        return self.similarity("Dice")[..., :self.n, self.n:].amax(-2)

    @SCORES.add("D_max", "mean over raters of the best Dice among the masks; 1 is best")
    def d_max(self) -> torch.Tensor:
        """Maximum Dice matching: mean of best_dice, in [0, 1] (CIMD, arXiv 2304.04745, section 4)."""
        return self.best_dice().mean(-1)

    @SCORES.add("S_c", "combined sensitivity: share of the raters' union that the masks' union covers; 1 is best")
    def s_c(self) -> torch.Tensor:
        """Combined sensitivity, in [0, 1]: the share of the union of Y that the union of P covers (CIMD, section 4).

        Where no rater marks anything it is 1 if no prediction does either, else 0.
        """
        union_p, union_y = self.votes_p > 0, self.votes_y > 0
        hit, all_y = (union_p & union_y).sum(-1).double(), union_y.sum(-1).double()
        return torch.where(all_y > 0, hit / all_y.clamp(min=1), (~union_p.any(-1)).double())

    @SCORES.add("D_a", "diversity agreement: whether the masks differ as much as the raters; 1 is best")
    def d_a(self) -> torch.Tensor:
        """Diversity agreement, in [0, 1] (CIMD, section 4).

        1 - (|Vmax_P - Vmax_Y| + |Vmin_P - Vmin_Y|) / 2, V the variance over pixels of p - p' (values -1, 0, 1) for a
        pair of different members, its largest and smallest over the pairs; 0 for a set of one. It is the variance
        that divides by the number of pixels (by one less would be larger by a share of 1 / pixels). (The variance of
        |p - p'| would not tell growth from displacement.)
        """
        share = self.area / self.pixels
        mean = share[..., :, None] - share[..., None, :]  # of p - p'
        square = share[..., :, None] + share[..., None, :] - 2 * self.intersection / self.pixels
        variance = square - mean ** 2
        low_p, high_p = _extremes(variance[..., :self.n, :self.n])
        low_y, high_y = _extremes(variance[..., self.n:, self.n:])
        return 1 - ((high_p - high_y).abs() + (low_p - low_y).abs()) / 2

    @SCORES.add("CI", "collective insight, of S_c, D_max and D_a; 1 is best")
    def ci(self) -> torch.Tensor:
        """Collective insight, 3 S_c D_max D_a / (S_c + D_max + D_a), in [0, 1]; 0 if all three are 0.

        CIMD, section 4. As published: it is no harmonic mean, which would be 3 / (1/S_c + 1/D_max + 1/D_a).
        """
        s_c, d_max, d_a = self.s_c(), self.d_max(), self.d_a()
        return 3 * s_c * d_max * d_a / (s_c + d_max + d_a).clamp(min=torch.finfo(torch.float64).tiny)

    @SCORES.add("soft_Dice", "Dice of the masks' mean with the raters' mean, over thresholds; 1 is best")
    def soft_dice(self, thresholds: Sequence[float] = SOFT_DICE_THRESHOLDS) -> torch.Tensor:
        """Dice of the mean of P with the mean of Y, both cut above each threshold, averaged; in [0, 1].

        Ji et al. 2021 (MRNet, CVPR), with their thresholds; QUBIQ takes 0.1, 0.2 .. 0.9.
        """
        cuts = self.votes_p.new_tensor(thresholds, dtype=torch.float64)[:, None]  # [thresholds, 1]
        # divided by tensors: CUDA multiplies by the reciprocal of a number, and 3 of 10 would come out above 0.3
        p, y = (votes.double() / torch.full_like(cuts[0], size)
                for votes, size in ((self.votes_p, self.n), (self.votes_y, self.m)))
        p, y = p[..., None, :] > cuts, y[..., None, :] > cuts  # [..., thresholds, pixels]
        hit, areas = (p & y).sum(-1).double(), (p.sum(-1) + y.sum(-1)).double()
        return torch.where(areas > 0, 2 * hit / areas.clamp(min=1), 1.0).mean(-1)

    def calibration(self, bins: int = ECE_BINS) -> torch.Tensor:
        """Pixels by their probability of foreground, the mean of P: a table [..., 3, bins] of sums over the pixels
        of each bin, of 1, of the mean of P and of the mean of Y. Bin b holds b / bins <= probability < (b + 1) / bins,
        the last one 1 as well.
        """
        return _calibration(self.votes_p, self.n, self.votes_y.double() / self.m, bins)

    @SCORES.add("ECE", "expected calibration error of the masks' mean, over all pixels; 0 is best")
    def ece(self, bins: int = ECE_BINS) -> torch.Tensor:
        """Expected calibration error of the mean of P against the mean of Y over all pixels, in [0, 1].

        Guo et al. 2017 (arXiv 1706.04599), eq. 3, with bins of equal width. All pixels count, so the background, mostly
        certain and right, makes it small: compare it between models on the same data, not between data sets.
        """
        return calibration_error(self.calibration(bins))

    @SCORES.add("diversity", "mean of 1 - IoU over pairs of masks; best as large as rater_diversity")
    def diversity(self, kind: Distance = "IoU") -> torch.Tensor:
        """Mean d(p, p') over pairs of different members, in [0, 1]; 0 for one prediction.

        It does not depend on n by itself, so it compares with rater_diversity. (GED's own term counts a mask with
        itself, too: it is this times (n - 1) / n.)
        """
        return _pair_mean(self.distances(kind)[0], diagonal=False)

    @SCORES.add("rater_diversity", "mean of 1 - IoU over pairs of raters")
    def rater_diversity(self, kind: Distance = "IoU") -> torch.Tensor:
        """Mean d(y, y') over pairs of different raters, in [0, 1]; 0 for one rater."""
        return _pair_mean(self.distances(kind)[2], diagonal=False)


    @SCORES.add("presence_Brier", "squared error of the probability that an expert marks anything at all, against the"
                " share of raters who do, less what comes from drawing few masks; 0 is best")
    def presence_brier(self) -> torch.Tensor:
        """Brier score of probability_of_any, (p - y)^2 - p (1 - p) / (n - 1), y the raters' share; in [-1/4, 1].

        For independent draws of a model that marks anything with probability q, the expectation is (q - y)^2 for any n
        from 2 up, since E (p - y)^2 = (q - y)^2 + q (1 - q) / n and E p (1 - p) = q (1 - q) (n - 1) / n (Ferro 2014,
        Fair scores for ensemble forecasts). So it may be below 0 by chance. One mask alone gets no correction.
        The raters' share is taken as it is: it is the mean Brier score over raters less y (1 - y), which no model
        changes. Over raters drawn at random, each of whom marks anything with probability r, a perfect model scores
        r (1 - r) / m: compare it between models on the same raters.
        """
        p, y = self.presence()
        return (p - y) ** 2 - p * (1 - p) / max(self.n - 1, 1)

    @SCORES.add("probability_of_any", "share of masks that mark anything; best as large as rater_probability_of_any")
    def probability_of_any(self) -> torch.Tensor:
        """How likely an expert marks anything at all: the share of P that is not empty, in [0, 1]."""
        return self.presence()[0]

    @SCORES.add("rater_probability_of_any", "share of raters who mark anything")
    def rater_probability_of_any(self) -> torch.Tensor:
        """The share of Y that is not empty, in [0, 1]."""
        return self.presence()[1]

    def presence(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The share of P and the share of Y that is not empty, each [...] in [0, 1]."""
        marked = (self.area > 0).double()
        return marked[..., :self.n].mean(-1), marked[..., self.n:].mean(-1)


def score_names(independent: bool = True) -> list[str]:
    """The names of SCORES that say something of ensembles whose members are independent draws, or are not."""
    return [name for name in SCORES if independent or name not in FOR_INDEPENDENT_DRAWS]


def scores(predictions: Masks, raters: Masks, options: Mapping[str, Any] = MappingProxyType({})
           ) -> dict[str, torch.Tensor]:
    """Every score of SCORES by name, each float64 of the leading shape; predictions and raters as for Agreement.

    :param options: values of the scores' own flags, by name; the others have their defaults.
    :raises InputError: if a score fails, or gives something else than one finite number for each set of masks.
    """
    agreement = Agreement(predictions, raters)
    return {name: _score(name, agreement, options) for name in SCORES}


def _score(name, agreement, options):
    score, _, flags, file = SCORES.entries[name]
    try:
        value = score(agreement, **{flag.name: options.get(flag.name, flag.default) for flag in flags})
        value = torch.as_tensor(value, dtype=torch.float64, device=agreement.area.device)
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(f"the score {name}, in {file}, {place_of(error, file)}") from error
    if value.shape != agreement.shape:
        raise InputError(f"the score {name}, in {file}, gave values of the shape {list(value.shape)}, not"
                         f" {list(agreement.shape)}: return one number for each set of masks")
    if not value.isfinite().all():
        raise InputError(f"the score {name}, in {file}, gave a value that is not finite: return a number for every set"
                         f" of masks, empty ones too")
    return value


def _masks(masks, what):
    masks = masks if isinstance(masks, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(masks))
    if masks.dtype != torch.bool:
        raise ValueError(f"{what} are {masks.dtype}; masks are bool: cut probabilities at 0.5, say")
    if masks.ndim < 3 or 0 in masks.shape[-3:]:
        raise ValueError(f"{what} are {list(masks.shape)}; needs [..., number of masks, H, W], none of them 0")
    return masks


def _pair_mean(distance, diagonal):
    """Mean of [..., k, k] over all ordered pairs, or over those off the diagonal (which is 0); 0 if there are none."""
    k = distance.shape[-1]
    return distance.sum((-2, -1)) / (k * k if diagonal else max(k * (k - 1), 1))


def _extremes(variance):
    """Smallest and largest of [..., k, k] off the diagonal (which is 0); 0 if there are none."""
    k = variance.shape[-1]
    if k == 1:
        return variance[..., 0, 0], variance[..., 0, 0]
    same = torch.eye(k, dtype=torch.bool, device=variance.device)
    return variance.masked_fill(same, math.inf).amin((-2, -1)), variance.amax((-2, -1))


def calibration_error(table: torch.Tensor) -> torch.Tensor:
    """The expected calibration error of a table [..., 3, bins] that Agreement.calibration made, or a sum of such."""
    pixels, p, y = table.unbind(-2)
    return (p - y).abs().sum(-1) / pixels.sum(-1)


def _calibration(votes, n, target, bins):
    """votes [..., pixels] of n members, target [..., pixels] in [0, 1] -> [..., 3, bins]."""
    lead = votes.shape[:-1]
    votes, target = votes.reshape(-1, votes.shape[-1]), target.reshape(-1, votes.shape[-1])
    place = (votes * bins // n).clamp(max=bins - 1)  # in whole numbers, so that rounding moves nothing
    place = (place + bins * torch.arange(len(votes), device=votes.device)[:, None]).flatten()
    sums = [torch.bincount(place, values.double().flatten(), bins * len(votes))
            for values in (torch.ones_like(votes), votes, target)]
    pixels, p, y = (total.reshape(*lead, bins) for total in sums)
    return torch.stack([pixels, p / n, y], -2)


# ---- against a distribution that is known ----

def truth_scores(predictions: Masks, outlines: Masks, probabilities: np.ndarray | torch.Tensor) -> dict[str, float]:
    """Scores of draws against the distribution they should come from.

    :param predictions: bool [n, H, W]; outlines: bool [K, H, W], all different; probabilities: [K], sum 1.
    :returns: a dict of floats.
        excess_GED: GED between P and the truth less that of an oracle that draws from the truth, both without bias
            (no mask is compared with itself), so for n from 2 up 0 in expectation if and only if P comes from the
            truth; see Agreement.ged. That of the oracle is 0 in expectation, so nothing is left to subtract.
        excess_GED_nearest: the same after each member is replaced by its nearest outline (by IoU, the first of
            several): what is left if only the frequencies of outlines are wrong.
        total_variation: between the share of members nearest to each outline and the probabilities, in [0, 1].
            Members with IoU below 0.5 with every outline are draws of something else. With few members it is above 0
            by chance: compare it with that of as many draws from the truth.
        ECE: expected calibration error of the mean of P against the true probability of each pixel.
    """
    agreement = Agreement(predictions, outlines)
    probabilities = torch.as_tensor(probabilities, dtype=torch.float64, device=agreement.area.device)
    within_p, across, within_y = agreement.distances()
    distance, nearest = across.min(-1)

    def excess(within, across):
        return (2 * (across @ probabilities).mean() - _pair_mean(within, diagonal=False)
                - probabilities @ within_y @ probabilities).item()

    drawn = torch.bincount(nearest[distance <= 0.5], minlength=agreement.m).double() / agreement.n
    other = 1 - drawn.sum()
    return {"excess_GED": excess(within_p, across),
            "excess_GED_nearest": excess(within_y[nearest][:, nearest], within_y[nearest]),
            "total_variation": (((drawn - probabilities).abs().sum() + other) / 2).item(),
            "ECE": calibration_error(truth_calibration(predictions, outlines, probabilities)).item()}


def truth_calibration(predictions: Masks, outlines: Masks, probabilities: np.ndarray | torch.Tensor,
                      bins: int = ECE_BINS) -> torch.Tensor:
    """The table [3, bins] of Agreement.calibration with the true probability of each pixel in the place of mean Y."""
    predictions, outlines = _masks(predictions, "predictions"), _masks(outlines, "outlines")
    probabilities = torch.as_tensor(probabilities, dtype=torch.float64, device=predictions.device)
    truth = probabilities @ outlines.to(predictions.device).flatten(1).double()
    return _calibration(predictions.flatten(1).sum(0), len(predictions), truth, bins)


# ---- shapes ----

def smoothness(masks: np.ndarray) -> np.ndarray:
    """How smooth masks [..., H, W] bool are: components and perimeter of each that is not empty, float64 [k, 2].

    Components are connected through edges or corners of pixels. The perimeter counts the edges of pixels between
    foreground and background, which is outside the picture, too: a square of side a has 4a.
    """
    from scipy import ndimage

    masks = masks.reshape(-1, *masks.shape[-2:])
    masks = masks[masks.any((1, 2))]
    parts = [ndimage.label(mask, np.ones((3, 3)))[1] for mask in masks]
    framed = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    edges = sum(np.diff(framed, axis=axis).sum((1, 2)) for axis in (1, 2))
    return np.stack([parts, edges], 1).astype(np.float64)


# ---- over cases ----

def presence_calibration(predicted: np.ndarray, observed: np.ndarray, members: np.ndarray, bins: int = ECE_BINS
                         ) -> np.ndarray:
    """Cases by the probability that an expert marks anything: a table [3, bins] of sums over the cases of each bin, of
    1, of the masks' share and of the raters'; bins as of Agreement.calibration.

    :param predicted, observed: [N], probability_of_any and rater_probability_of_any; members: [N], masks of each case.
    """
    votes = np.round(predicted * members).astype(int)
    place = np.minimum(votes * bins // members, bins - 1)
    return np.stack([np.bincount(place, weights, bins) for weights in (np.ones(len(place)), predicted, observed)])


def bootstrap_interval(values: np.ndarray, clusters: Sequence | None = None, level: float = 0.95, resamples: int = 1000,
                       seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means over cases with their bootstrap percentile intervals (Efron and Tibshirani 1993, chapter 13).

    :param values: [N, S], a row a case and a column a score. clusters: N labels; cases that share one (a patient) are
        resampled together, since they are no independent evidence. Default: every case by itself.
    :returns: mean, low, high, each float64 [S]. With a single cluster there is nothing to resample: low and high are
        then NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    labels = np.arange(len(values)) if clusters is None else np.unique(clusters, return_inverse=True)[1]
    if values.ndim != 2 or len(labels) != len(values) or not len(values):
        raise ValueError(f"values {list(values.shape)} with {len(labels)} clusters; needs [N, S] and N, not 0")
    count = labels.max() + 1
    sizes = np.bincount(labels, minlength=count)  # [G]
    sums = np.zeros((count, values.shape[1]))
    np.add.at(sums, labels, values)
    mean = values.mean(0)
    if count == 1:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    times = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)  # [resamples, G]
    means = (times @ sums) / (times @ sizes)[:, None]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return mean, low, high


def patient_of(case_name: str, pattern: str = PATIENT_PATTERN) -> str:
    """The patient in a case's name: what the regular expression matches at its start, else the whole name.

    By default all up to the end of the first number: LIDC-IDRI-0314-2-57 -> LIDC-IDRI-0314, 0003-0-12 -> 0003.
    """
    found = re.match(pattern, case_name)
    return found[0] if found and found[0] else case_name
