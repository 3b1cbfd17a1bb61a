"""How long scoring takes, beside the double loop over pairs of masks that it replaces.

    python benchmarks/scores.py                  # 1,500 cases of 128 x 128, 100 masks against 4 raters

The two alternate over the same cases, so that other work on the machine weighs on both; the loop takes a few of them
only. Both compute the scores that compare pairs of masks (GED, HM-IoU, D_max, D_a); they must agree to 1e-12. Reading
masks from disk is not part of it.
"""

import argparse
import math
import statistics
import time

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from tqdm import tqdm

from guided_diffusion import metrics


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1500, help="default %(default)s")
    parser.add_argument("--loop_cases", type=int, default=10, help="of which the loop does (default %(default)s)")
    parser.add_argument("--predictions", type=int, default=100, help="masks a case (default %(default)s)")
    parser.add_argument("--raters", type=int, default=4, help="raters a case (default %(default)s)")
    parser.add_argument("--size", type=int, default=128, help="side in pixels (default %(default)s)")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fast, slow = [], []
    for i in tqdm(range(args.cases), unit=" cases"):
        p, y = (discs(rng, count, args.size) for count in (args.predictions, args.raters))
        start = time.perf_counter()
        scores = {name: value.item() for name, value in metrics.scores(*(torch.from_numpy(x).to(device)
                                                                        for x in (p, y))).items()}
        fast.append(time.perf_counter() - start)
        if i < args.loop_cases:
            start = time.perf_counter()
            expected = double_loop(p, y)
            slow.append(time.perf_counter() - start)
            for name, value in expected.items():
                assert abs(scores[name] - value) < 1e-12, (name, scores[name], value)
    ratio = statistics.median(s / f for f, s in zip(fast, slow)) if slow else math.nan
    print(f"{args.cases} cases of {args.size} x {args.size}, {args.predictions} masks x {args.raters} raters, {device}"
          f" ({torch.get_num_threads()} threads): {sum(fast):.1f} s for all, {1e3 * statistics.median(fast):.1f} ms a"
          f" case; double loop {1e3 * statistics.median(slow or [math.nan]):.0f} ms a case; ratio {ratio:.0f}")


def discs(rng, count, size):
    """Plausible masks [count, size, size] bool: discs of varied place and radius, some empty."""
    y, x = np.mgrid[:size, :size]
    centre, radius = rng.normal(size / 2, size / 32, (2, count, 1, 1)), rng.normal(size / 8, size / 32, (count, 1, 1))
    return (y - centre[0]) ** 2 + (x - centre[1]) ** 2 < radius ** 2 * (rng.random((count, 1, 1)) < 0.8)


def double_loop(predictions, raters):
    """The same scores, pair by pair."""
    def mean_distance(a, b):
        return sum(1 - iou(p, q) for p in a for q in b) / (len(a) * len(b))

    times = math.lcm(len(predictions), len(raters))
    table = np.array([[iou(p, y) for y in raters] for p in predictions])
    table = np.tile(table, (times // len(predictions), times // len(raters)))
    low_p, high_p = variance_range(predictions)
    low_y, high_y = variance_range(raters)
    return {
        "GED": 2 * mean_distance(predictions, raters) - mean_distance(predictions, predictions)
        - mean_distance(raters, raters),
        "HM_IoU": table[linear_sum_assignment(table, maximize=True)].mean(),
        "D_max": sum(max(dice(p, y) for p in predictions) for y in raters) / len(raters),
        "D_a": 1 - (abs(high_p - high_y) + abs(low_p - low_y)) / 2,
    }


def iou(a, b):
    union = (a | b).sum()
    return (a & b).sum() / union if union else 1.0


def dice(a, b):
    areas = a.sum() + b.sum()
    return 2 * (a & b).sum() / areas if areas else 1.0


def variance_range(masks):
    values = [np.var(a.astype(float) - b) for i, a in enumerate(masks) for b in masks[i + 1:]]
    return min(values, default=0.0), max(values, default=0.0)


if __name__ == "__main__":
    main()
