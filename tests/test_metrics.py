"""Scores of masks against raters' masks: their definitions in loops, their properties, intervals over cases."""

import itertools
import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guided_diffusion import metrics
from guided_diffusion.metrics import Agreement, bootstrap_interval, patient_of, truth_calibration, truth_scores

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]
examples = settings(max_examples=50, deadline=None, derandomize=True)


# the definitions once more, pixel by pixel and pair by pair

def compare(a, b):
    """(IoU, Dice) of two masks."""
    both = either = 0
    for row_a, row_b in zip(a.tolist(), b.tolist()):
        for p, y in zip(row_a, row_b):
            both, either = both + (p and y), either + (p or y)
    return (both / either, 2 * both / (both + either)) if either else (1.0, 1.0)


def mean_distance(first, second, measure=0, diagonal=True):
    pairs = itertools.product(enumerate(first), enumerate(second))
    distances = [1 - compare(a, b)[measure] for (i, a), (j, b) in pairs if diagonal or i != j]
    return sum(distances) / len(distances) if distances else 0.0


def best_matching(iou, times):
    """Mean of the best matching of the repeated sets: of all permutations if few, else by the units left to match."""
    p, y = list(range(len(iou))) * (times // len(iou)), list(range(len(iou[0]))) * (times // len(iou[0]))
    if times <= 5:
        return max(sum(iou[i][j] for i, j in zip(p, order)) for order in itertools.permutations(y)) / times

    @lru_cache(None)
    def best(place, left):
        return max((iou[p[place]][j] + best(place + 1, left[:j] + (k - 1,) + left[j + 1:])
                    for j, k in enumerate(left) if k), default=0.0)

    return best(0, (times // len(iou[0]),) * len(iou[0])) / times


def variances(masks):
    """Over the pairs of different members, the variance over pixels of p - p'."""
    differences = [(a.astype(float) - b).ravel() for a, b in itertools.combinations(masks, 2)]
    return [sum((x - sum(d) / len(d)) ** 2 for x in d) / len(d) for d in differences] or [0.0]


def share(masks):
    """By pixel, the share of the masks that mark it, as a fraction."""
    return [Fraction(sum(pixel), len(masks)) for pixel in masks.reshape(len(masks), -1).T.tolist()]


def soft_dice(p, y, tenths=(1, 3, 5, 7, 9)):
    dice = []
    for cut in [Fraction(k, 10) for k in tenths]:
        hit, total = sum(a > cut and b > cut for a, b in zip(p, y)), sum((a > cut) + (b > cut) for a, b in zip(p, y))
        dice.append(2 * hit / total if total else 1.0)
    return sum(dice) / len(dice)


def reliability(p, y, bins):
    table = [[0.0] * bins for _ in range(3)]
    for a, b in zip(p, y):
        place = max(k for k in range(bins) if Fraction(k, bins) <= a)
        for row, value in zip(table, (1, a, b)):
            row[place] += float(value)
    return table


def calibration_error(p, y, bins=10):
    _, of_p, of_y = reliability(p, y, bins)
    return sum(abs(a - b) for a, b in zip(of_p, of_y)) / len(p)


def by_definition(p, y):
    """Every score of metrics.SCORES, and some with other options."""
    result = {}
    for measure, suffix in enumerate(("", " Dice")):
        across, within = 2 * mean_distance(p, y, measure), [mean_distance(x, x, measure) for x in (p, y)]
        different = [mean_distance(x, x, measure, diagonal=False) for x in (p, y)]
        result |= {"GED" + suffix: across - sum(within), "GED_unbiased" + suffix: across - sum(different),
                   "diversity" + suffix: different[0], "rater_diversity" + suffix: different[1]}
    mean_p, mean_y, v_p, v_y = share(p), share(y), variances(p), variances(y)
    in_p, in_y = [v > 0 for v in mean_p], [v > 0 for v in mean_y]
    s_c = sum(a and b for a, b in zip(in_p, in_y)) / sum(in_y) if any(in_y) else float(not any(in_p))
    d_max = sum(max(compare(a, b)[1] for a in p) for b in y) / len(y)
    d_a = 1 - (abs(max(v_p) - max(v_y)) + abs(min(v_p) - min(v_y))) / 2
    any_p, any_y = (sum(mask.any() for mask in masks) / len(masks) for masks in (p, y))
    return result | {
        "probability_of_any": any_p, "rater_probability_of_any": any_y,
        "presence_Brier": (any_p - any_y) ** 2 - any_p * (1 - any_p) / max(len(p) - 1, 1),
        "HM_IoU": best_matching([[compare(a, b)[0] for b in y] for a in p], math.lcm(len(p), len(y))),
        "D_max": d_max, "S_c": s_c, "D_a": d_a,
        "CI": 3 * s_c * d_max * d_a / (s_c + d_max + d_a) if s_c + d_max + d_a else 0.0,
        "soft_Dice": soft_dice(mean_p, mean_y), "ECE": calibration_error(mean_p, mean_y),
        "soft_Dice at 0.2 and 0.6": soft_dice(mean_p, mean_y, (2, 6)),
        "ECE in 7": calibration_error(mean_p, mean_y, 7)}


def truth_by_definition(p, outlines, probabilities):
    n, known = len(p), list(zip(outlines, probabilities))

    def excess(p):
        return (2 * sum(q * (1 - compare(a, y)[0]) for a in p for y, q in known) / n
                - mean_distance(p, p, diagonal=False)
                - sum(q * r * (1 - compare(y, z)[0]) for y, q in known for z, r in known))

    drawn, nearest = [0] * (len(outlines) + 1), []  # the last: something else
    for a in p:
        iou = [compare(a, y)[0] for y in outlines]
        nearest.append(outlines[iou.index(max(iou))])
        drawn[iou.index(max(iou)) if max(iou) >= 0.5 else -1] += 1
    truth = [sum(q * pixel for q, pixel in zip(probabilities, column)) for column in zip(*map(np.ravel, outlines))]
    return {"excess_GED": excess(p), "excess_GED_nearest": excess(nearest), "ECE": calibration_error(share(p), truth),
            "total_variation": sum(abs(a / n - q) for a, q in zip(drawn, [*probabilities, 0])) / 2}, truth


def unpack(numbers, height, width):
    """Masks whose pixels are the bits of whole numbers."""
    bits = [[number >> i & 1 for i in range(height * width)] for number in numbers]
    return np.array(bits, bool).reshape(-1, height, width)


@st.composite
def mask_sets(draw):
    """Predictions and raters' masks out of a few masks, so that many are equal, empty or full."""
    height, width = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    full = 2 ** (height * width) - 1
    pool = draw(st.lists(st.one_of(st.just(0), st.just(full), *[st.integers(0, full)] * 3), min_size=1, max_size=6))
    members = st.lists(st.sampled_from(pool), min_size=1, max_size=5)
    return [unpack(draw(members), height, width) for _ in range(2)]


def random_masks(*shape, seed=0):
    return np.random.default_rng(seed).random(shape) < 0.4


THREE = unpack([0b111100000, 0b011110000, 0b000000111], 3, 3)  # two that overlap and one apart
CHANCES = np.array([0.5, 0.3, 0.2])


def draws(size):
    """All draws of so many of THREE, [draws, size, 3, 3], and the probability of each."""
    places = list(itertools.product(range(3), repeat=size))
    return THREE[np.array(places)], CHANCES[np.array(places)].prod(1)


def assert_equal(result, expected):
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert float(result[name]) == pytest.approx(float(value), abs=1e-12, rel=0), name


@pytest.mark.parametrize("device", DEVICES)
@examples
@given(mask_sets())
@example([unpack([0b0011, 0b1100], 2, 2), np.zeros((1, 2, 2), bool)])  # S_c = D_max = D_a = 0, so CI is 0 / 0
@example([random_masks(5, 9, 7), random_masks(4, 9, 7, seed=1)])  # errors of both signs in many bins
def test_scores_follow_their_definitions(device, sets):
    agreement = Agreement(*(torch.from_numpy(masks).to(device) for masks in sets))
    result = {name: score(agreement) for name, score in metrics.SCORES.items()}
    result |= {"GED Dice": agreement.ged("Dice"), "GED_unbiased Dice": agreement.ged("Dice", unbiased=True),
               "diversity Dice": agreement.diversity("Dice"), "ECE in 7": agreement.ece(7),
               "rater_diversity Dice": agreement.rater_diversity("Dice"),
               "soft_Dice at 0.2 and 0.6": agreement.soft_dice((0.2, 0.6))}
    assert_equal(result, by_definition(*sets))


@examples
@given(mask_sets(), st.lists(st.integers(1, 9), min_size=5, max_size=5), st.integers(1, 12))
def test_scores_against_the_truth_follow_their_definitions(sets, weights, bins):
    p, outlines = sets[0], np.unique(sets[1], axis=0)
    probabilities = np.array(weights[:len(outlines)]) / sum(weights[:len(outlines)])
    expected, truth = truth_by_definition(p, outlines, probabilities)
    assert_equal(truth_scores(p, outlines, probabilities), expected)
    np.testing.assert_allclose(truth_calibration(p, outlines, probabilities, bins),
                               reliability(share(p), truth, bins), rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
def test_shares_exactly_on_a_threshold_or_between_two_bins_are_placed_as_stated(device):
    for n in range(1, 31):  # 3 of 10 are not above 0.3, though 3 * (1 / 10) is in floating point
        p = np.arange(n + 1)[None, None, :] > np.arange(n)[:, None, None]  # pixel i is marked by i of n masks
        for y in (p[:1], np.ones((1, 1, n + 1), bool)):
            for a, b in ((p, y), (y, p)):
                agreement = Agreement(torch.from_numpy(a).to(device), b)
                assert agreement.soft_dice().item() == pytest.approx(soft_dice(share(a), share(b)), abs=1e-12), n
                for bins in (10, n):  # 15 / 22 * 22 is below 15 in floating point
                    np.testing.assert_allclose(agreement.calibration(bins).cpu(), reliability(share(a), share(b), bins),
                                               rtol=0, atol=1e-12)


@examples
@given(mask_sets(), st.randoms(use_true_random=False), st.integers(2, 4))
def test_order_does_not_matter_nor_how_often_all_predictions_are_repeated(sets, random, times):
    p, y = sets
    shuffled = [masks[random.sample(range(len(masks)), len(masks))] for masks in sets]
    once, repeated = metrics.scores(p, y), metrics.scores(np.tile(p, (times, 1, 1)), y)
    assert_equal(metrics.scores(*shuffled), once)
    names = ("GED", "HM_IoU", "D_max", "S_c", "soft_Dice", "ECE")  # the others take the number of masks into account
    assert_equal({name: repeated[name] for name in names}, {name: once[name] for name in names})


@examples
@given(mask_sets())
def test_scores_stay_in_their_ranges_and_a_perfect_ensemble_has_the_best(sets):
    p, y = sets
    outlines = np.unique(y, axis=0)
    truth = truth_scores(p, outlines, np.full(len(outlines), 1 / len(outlines)))
    ranges, agreement = {"GED": (0, 2), "GED_unbiased": (-2, 2), "excess_GED": (-2, 2),
                         "excess_GED_nearest": (-2, 2), "presence_Brier": (-0.25, 1)}, Agreement(p, y)
    dice = {"GED": agreement.ged("Dice"), "GED_unbiased": agreement.ged("Dice", unbiased=True)}
    for name, value in [*metrics.scores(p, y).items(), *truth.items(), *dice.items()]:
        low, high = ranges.get(name, (0, 1))
        assert low - 1e-12 <= float(value) <= high + 1e-12, name
    best = {"GED": 0, "ECE": 0, "HM_IoU": 1, "D_max": 1, "S_c": 1, "D_a": 1, "CI": 1, "soft_Dice": 1}
    assert_equal({name: value for name, value in metrics.scores(p, p).items() if name in best}, best)


def test_cases_together_score_as_each_by_itself_be_it_arrays_or_tensors():
    p, y = random_masks(3, 2, 4, 5, 6), random_masks(3, 1, 3, 5, 6, seed=1)
    p[0, 0], y[0] = False, False  # a case without foreground among others

    def everything(p, y):
        agreement = Agreement(p, y)
        return metrics.scores(p, y) | {"table": agreement.calibration(), "best": agreement.best_dice()}

    together, ungrouped = everything(p, y), everything(p[:, 0], y[:, 0])  # raters broadcast against groups
    for (i, j), name in itertools.product(np.ndindex(3, 2), together):
        alone = everything(p[i, j], torch.from_numpy(y[i, 0]))[name]
        assert alone.dtype == torch.float64 and together[name].shape == (3, 2, *alone.shape), name
        assert torch.equal(together[name][i, j], alone) and torch.equal(ungrouped[name], together[name][:, 0]), name


@pytest.mark.parametrize("device", DEVICES)
def test_scores_are_on_the_device_of_the_predictions_wherever_the_raters_masks_are(device):
    p, y = random_masks(10, 64, 64), random_masks(4, 64, 64, seed=1)
    known = np.full(4, 0.25)
    for raters in (y, torch.from_numpy(y).to(device)):
        result = metrics.scores(torch.from_numpy(p).to(device), raters)
        assert {values.device.type for values in result.values()} == {device}
        assert_equal(result, metrics.scores(p, y))
        assert_equal(truth_scores(torch.from_numpy(p).to(device), raters, known), truth_scores(p, y, known))


@pytest.mark.parametrize("device", DEVICES)
def test_counts_of_large_pictures_are_exact(device):
    masks = np.concatenate([random_masks(3, 1024, 1024), np.ones((1, 1024, 1024), bool)])
    agreement = Agreement(torch.from_numpy(masks).to(device), masks[:1])
    masks = masks[[0, 1, 2, 3, 0]]
    expected = [[int(np.count_nonzero(a & b)) for b in masks] for a in masks]
    assert agreement.intersection.tolist() == expected
    assert agreement.area.tolist() == [expected[i][i] for i in range(5)]


def test_unbiased_ged_of_draws_from_one_distribution_is_0_in_expectation():
    for n, m, kind in itertools.product((2, 3), (2, 3), ("IoU", "Dice")):
        (p, weight_p), (y, weight_y) = draws(n), draws(m)
        biased, unbiased = (Agreement(p[:, None], y[None]).ged(kind, flag).numpy() for flag in (False, True))
        assert weight_p @ unbiased @ weight_y == pytest.approx(0, abs=1e-12) and weight_p @ biased @ weight_y > 0.1


def test_the_number_of_masks_does_not_matter_to_the_expected_brier_score_of_presence():
    nothing, mask = unpack([0, 0b1011], 2, 2)
    for chance, raters in itertools.product((0, 0.3, 0.9), ([nothing] * 4, [mask, nothing, nothing], [mask])):
        share = sum(rater.any() for rater in raters) / len(raters)
        for n in (2, 3, 7):  # every set of draws, by how many mark anything
            expectation = sum(math.comb(n, k) * chance ** k * (1 - chance) ** (n - k) * Agreement(
                np.stack([mask] * k + [nothing] * (n - k)), np.stack(raters)).presence_brier().item()
                              for k in range(n + 1))
            assert expectation == pytest.approx((chance - share) ** 2, abs=1e-12)
    # over raters, too: what a perfect model scores against m of them
    chance, m, n = 0.3, 3, 4
    sets = np.array(list(itertools.product((False, True), repeat=m + n)))[..., None, None]
    weight = np.where(sets, chance, 1 - chance).prod((1, 2, 3))
    score = Agreement(sets[:, :n], sets[:, n:]).presence_brier().numpy()
    assert weight @ score == pytest.approx(chance * (1 - chance) / m, abs=1e-12)


def test_smoothness_counts_components_and_edges_of_masks_that_are_not_empty():
    square, cross, full, speck = (np.zeros((5, 6), bool) for _ in range(4))
    square[1:3, 1:3] = True  # 2 x 2, and a pixel that touches its corner
    square[3, 3] = True
    cross[[0, 4], [0, 5]] = cross[2, 2:4] = True  # two corners of the picture and a bar
    full[:] = True
    speck[2, 2] = True
    masks = np.stack([square, np.zeros_like(square), cross, full, speck])
    expected = [[1, 12], [3, 4 + 4 + 6], [1, 22], [1, 4]]
    assert metrics.smoothness(masks).tolist() == expected
    assert metrics.smoothness(masks.reshape(1, 5, 5, 6)[:, ::-1]).tolist() == expected[::-1]
    assert metrics.smoothness(masks[1:2]).shape == (0, 2)


def test_excess_ged_is_0_in_expectation_for_draws_from_the_truth_and_above_for_others():
    for n, truth, excess in ((2, CHANCES, 0), (3, CHANCES, 0), (2, [0.2, 0.3, 0.5], None)):
        p, weight = draws(n)
        expectation = weight @ [truth_scores(masks, THREE, truth)["excess_GED"] for masks in p]
        assert expectation > 0.01 if excess is None else expectation == pytest.approx(0, abs=1e-12)
    for i in range(3):
        assert truth_scores(THREE[[i] * 4], THREE, CHANCES)["excess_GED"] > 0.1


def test_total_variation_counts_members_far_from_all_outlines_as_something_else():
    outlines = unpack([0b1111 << 12, 0b1111], 4, 4)
    near, half, far = unpack([0b111, 0b11, 0b1], 4, 4)  # IoU 3/4, 1/2 and 1/4 with the second outline
    for members, expected in (([outlines[0], outlines[0], near, half], 0), ([far, far], 1),
                              ([outlines[0], outlines[0], near, far], 0.25), ([half], 0.5)):
        assert truth_scores(np.stack(members), outlines, [0.5, 0.5])["total_variation"] == expected


def test_interval_matches_resampling_in_loops():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 12, 40)  # clusters of unequal size
    values = rng.normal(size=(40, 2)) + labels[:, None] * [0.3, 0]
    mean, low, high = bootstrap_interval(values, labels, level=0.8, resamples=20_000)
    means, groups = [], [values[labels == label] for label in np.unique(labels)]
    for _ in range(5000):
        means.append(np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))]).mean(0))
    np.testing.assert_allclose(mean, values.mean(0), rtol=0, atol=1e-15)
    assert (low < mean).all() and (mean < high).all()
    assert (abs(np.quantile(means, [0.1, 0.9], axis=0) - [low, high]) < 0.06 * np.std(means, axis=0)).all()


def test_clusters_of_unequal_size_keep_their_weight_in_a_resample():
    values, clusters = np.array([[0.0], [1], [1], [1]]), ["a", "b", "b", "b"]
    for level, expected in ((0.9, (0, 1)), (0.4, (0.75, 0.75))):
        mean, low, high = bootstrap_interval(values, clusters, level)  # aa, ab, ba, bb: means 0, 3/4, 3/4 and 1
        assert (mean, low, high) == (0.75, *expected)


def test_interval_has_the_width_and_coverage_that_normal_values_should_give():
    values = np.random.default_rng(1).normal(size=(200, 200))  # each column an experiment
    for level, z in ((0.95, 1.96), (0.6827, 1)):
        _, low, high = bootstrap_interval(values, level=level)
        np.testing.assert_allclose((high - low) / 2 / z / values.std(0), 200 ** -0.5, rtol=0.15)
    covered = []
    for seed in range(3):
        _, low, high = bootstrap_interval(np.random.default_rng(seed).normal(size=(50, 200)), seed=seed)
        covered += ((low < 0) & (0 < high)).tolist()
    assert 0.90 < np.mean(covered) < 0.98
    # nine alike count as one if they share a cluster
    _, low, high = bootstrap_interval(np.repeat(values, 9, axis=0), np.repeat(np.arange(200), 9))
    np.testing.assert_allclose((high - low) / 2 / 1.96 / values.std(0), 200 ** -0.5, rtol=0.15)


def test_interval_depends_hardly_on_the_seed_or_the_order_of_clusters_and_not_on_their_names():
    rng = np.random.default_rng(4)
    labels, values = rng.integers(0, 30, 90), rng.normal(size=(90, 3))
    first = bootstrap_interval(values, labels)
    np.testing.assert_array_equal(first, bootstrap_interval(values, [f"patient {label:02}" for label in labels]))
    for other in (bootstrap_interval(values, rng.permutation(30)[labels]), bootstrap_interval(values, labels, seed=1)):
        assert (other[1] != first[1]).all()
        np.testing.assert_allclose(other, first, rtol=0, atol=0.15 * (first[2] - first[1]).min())


def test_a_single_cluster_has_a_mean_but_no_interval():
    for values, clusters in (([[1.0, 2]], None), ([[1.0, 2], [3, 4]], ["a", "a"])):
        np.testing.assert_array_equal(bootstrap_interval(values, clusters), [np.mean(values, 0), *[[np.nan] * 2] * 2])


def test_patient_is_what_the_pattern_matches_at_the_start_or_else_the_whole_name():
    for name, patient in (("LIDC-IDRI-0314-2-57", "LIDC-IDRI-0314"), ("0003-0-12", "0003"), ("case12", "case12"),
                          ("a1b2", "a1"), ("no digit", "no digit"), ("", "")):
        assert patient_of(name) == patient
    assert patient_of("ab-3_left-1", r"[^_]+") == "ab-3"
    assert patient_of("x-12", r"\d+") == "x-12"


@pytest.mark.parametrize("what", ["predictions", "raters"])
def test_a_refusal_names_the_masks_that_do_not_fit(what):
    good = random_masks(2, 5, 6)
    for bad, words in ((good.astype(np.uint8), "uint8"), (good.astype(float), "0.5"), (good[0], r"\[5, 6\]"),
                       (good[:0], r"\[0, 5, 6\]"), (good[:, :, :0], r"\[2, 5, 0\]")):
        with pytest.raises(ValueError, match=f"^{what} are .*{words}"):
            Agreement(**({"predictions": good, "raters": good} | {what: bad}))
    with pytest.raises(ValueError, match=r"predictions are \[5, 6\] pixels, but raters \[6, 5\]"):
        metrics.scores(good, random_masks(2, 6, 5))
