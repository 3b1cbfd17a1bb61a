"""The benchmark whose right answer is known: train on phantoms, compare what is drawn with the true distribution.

    python benchmarks/phantom.py                  # on two CPU cores, about a quarter of an hour of training

Phantoms are synthetic nodules for which every outline an expert could draw, and its probability, are known. A small
model is trained on 4 raters a case and scored on other phantoms, at several points of its training and with several
numbers of sampling steps, by

    excess GED       GED to the truth less that of an oracle that draws from the truth, both without bias: 0 is perfect
    total variation  between the shares of outlines drawn and their probabilities; 0 is perfect, but the oracle's own is
                     not 0 with a finite ensemble
    ECE              expected calibration error of the ensemble's mean against the true probability of each pixel

beside the oracle and two samplers that are wrong on purpose: always the most likely outline, and always the mean. The
same seed gives the same numbers on the same machine. Writes table.md, results.json and benchmark.png.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from common import fast_bf16, load_sampler, run_script
from tqdm import tqdm

from guided_diffusion import checkpoint, metrics
from guided_diffusion.commands.cli import run_script as run_main
from guided_diffusion.data import phantoms
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.masks import to_masks
from guided_diffusion.scoring.evaluation import cell, markdown
from guided_diffusion.system import storage

SIZE, CROP = 64, 32  # pixels of a phantom, and of its central part, which holds every outline
ORACLE, MOST_LIKELY, MEAN = "oracle: draws of the truth", "always the most likely outline", "always the mean, cut"
COLUMNS = {"excess_GED": "excess GED", "total_variation": "total variation", "ECE": "ECE"}


def main():
    args = parse_args()
    folder = Path(args.results_dir)
    train_dir = make(folder / "train", args.num_train, args.seed)
    test_dir = make(folder / "test", args.num_cases, args.seed + 1000)
    train(args, train_dir)

    cases = SegmentationCases(test_dir, CROP, 1, "crop")
    truths = [true_distribution(test_dir / case.name) for case in cases]
    results = []  # (name, training steps, sampling steps, values [cases, columns], calibration [3, bins])

    def add(name, training, sampling, ensembles):
        scores = [metrics.truth_scores(masks, *truth) for masks, truth in zip(ensembles, truths)]
        table = sum(metrics.truth_calibration(masks, *truth) for masks, truth in zip(ensembles, truths))
        results.append((name, training, sampling, np.array([[s[c] for c in COLUMNS] for s in scores]), table))

    steps = checkpoint.steps_in(folder)
    usual, *others = args.sampling_steps
    jobs = [(step, usual) for step in steps] + [(steps[-1], n) for n in others]
    for step, n in jobs:
        sampler = load_sampler(folder / checkpoint.ema_name("0.999", step), str(n), args.seed)
        drawn = tqdm(sampler.ensembles(cases, args.num_ensemble), f"step {step}, {n} sampling steps", len(cases))
        add(model_row(step, n), step, n, [to_masks(samples) for _, samples in drawn])
    for name, draw in ((ORACLE, oracle), (MOST_LIKELY, most_likely), (MEAN, mean)):
        add(name, None, None, [draw(args, i, *truth) for i, truth in enumerate(truths)])
    report(args, folder, results)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_train", type=int, default=4000, help="phantoms to train on (default %(default)s)")
    parser.add_argument("--num_cases", type=int, default=100, help="phantoms to score on (default %(default)s)")
    parser.add_argument("--num_ensemble", type=int, default=16, help="masks a case (default %(default)s)")
    parser.add_argument("--max_steps", type=int, default=6000, help="training steps (default %(default)s)")
    parser.add_argument("--points", type=int, default=4, help="points of the training to score (default %(default)s)")
    parser.add_argument("--sampling_steps", default="10,2,5,25", help="numbers of network evaluations a mask; the"
                        " first is used for all points of the training, the others for its end (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of phantoms, training and sampling (default %(default)s)")
    parser.add_argument("--results_dir", default="results/phantom", help="default %(default)s")
    args = parser.parse_args()
    args.sampling_steps = [int(word) for word in args.sampling_steps.split(",")]
    return args


def make(data_dir, count, seed):
    """Phantoms on disk, unless they are there from an earlier run."""
    if len(list(data_dir.glob("*"))) != count:
        phantoms.write_cases(data_dir, count, seed, SIZE, progress=lambda n: tqdm(n, f"making {data_dir}"))
    return data_dir


def train(args, data_dir):
    run_script("segmentation_train.py", "--preset", "cpu-32", "--use_bf16", fast_bf16(), "--data_dir", data_dir,
               "--results_dir", args.results_dir, "--seed", args.seed, "--lr_anneal_steps", args.max_steps,
               "--save_interval", -(-args.max_steps // args.points))


def true_distribution(case_folder):
    """Outlines [K, CROP, CROP] bool and probabilities [K] of the central part of a phantom."""
    outlines, probabilities = phantoms.load_truth(case_folder)
    edge = (SIZE - CROP) // 2
    return outlines[:, edge:-edge, edge:-edge], probabilities


# ---- samplers that need no model: masks [n, H, W] of case i from its truth ----

def oracle(args, i, outlines, probabilities):
    rng = np.random.default_rng([args.seed, i])
    return outlines[rng.choice(len(outlines), args.num_ensemble, p=probabilities)]


def most_likely(args, i, outlines, probabilities):
    return outlines[[probabilities.argmax()] * args.num_ensemble]


def mean(args, i, outlines, probabilities):
    cut = np.tensordot(probabilities, outlines, 1) > 0.5
    return np.repeat(cut[None], args.num_ensemble, axis=0)


# ---- the table and the picture ----

def report(args, folder, results):
    rows = [["", *COLUMNS.values(), "ECE of all pixels"]]
    stored = {}
    for name, training, sampling, values, table in results:
        mean, low, high = metrics.bootstrap_interval(values)
        scores = {c: {"mean": m, "low": lo, "high": hi} for c, m, lo, hi in zip(COLUMNS, mean, low, high)}
        pooled = metrics.calibration_error(table).item()
        rows.append([name, *(cell(scores[c]) for c in COLUMNS), f"{pooled:.4f}"])
        stored[name] = {"training_steps": training, "sampling_steps": sampling, **scores, "ECE_pooled": pooled,
                        "calibration": table.tolist()}
    text = f"{args.num_cases} phantoms, {args.num_ensemble} masks a case; mean [95 % interval over cases]\n\n" \
        + markdown(rows) + "\n"
    picture = draw(stored, args.sampling_steps[0])
    for name, data in (("table.md", text.encode()), ("results.json", json.dumps(stored, indent=1).encode()),
                       ("benchmark.png", picture)):
        storage.write_bytes(folder / name, data)
    print(f"\n{text}\nwritten to {folder}: table.md, results.json, benchmark.png")


def model_row(training, sampling):
    return f"step {training}, {sampling} sampling steps"


def draw(stored, usual):
    from matplotlib.figure import Figure

    from guided_diffusion.draw.plots import png
    from guided_diffusion.draw.style import BLUE, GREEN, GREY, VERMILLION

    figure = Figure(figsize=(16, 4.5), layout="constrained")
    axes = figure.subplots(1, 4)
    models = [scores for scores in stored.values() if scores["training_steps"]]
    last = max(scores["training_steps"] for scores in models)
    for panel, column, key, fixed, value in (
            (axes[0], "excess_GED", "training_steps", "sampling_steps", usual),
            (axes[1], "excess_GED", "sampling_steps", "training_steps", last),
            (axes[2], "total_variation", "training_steps", "sampling_steps", usual)):
        points = sorted((scores[key], scores[column]) for scores in models if scores[fixed] == value)
        x, mean, low, high = zip(*((x, s["mean"], s["low"], s["high"]) for x, s in points))
        panel.plot(x, mean, "o-", color=BLUE, label="model")
        panel.fill_between(x, low, high, color=BLUE, alpha=0.2)
        for (name, colour), style in zip(((ORACLE, GREEN), (MOST_LIKELY, VERMILLION), (MEAN, GREY)), ("-", "--", ":")):
            panel.axhline(stored[name][column]["mean"], color=colour, linestyle=style, label=name)
        panel.set(xlabel=key.replace("_", " "), ylabel=COLUMNS[column], title=f"{value} {fixed.replace('_', ' ')}",
                  xscale="log" if key == "sampling_steps" else "linear")
        panel.set_xticks(x, x)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0].legend(fontsize="small")
    for name, colour in ((ORACLE, GREEN), (model_row(last, usual), BLUE)):
        pixels, predicted, true = np.array(stored[name]["calibration"])
        used = pixels > 0
        axes[3].plot(predicted[used] / pixels[used], true[used] / pixels[used], "o-", color=colour, label=name)
    axes[3].plot([0, 1], [0, 1], color=GREY, linewidth=1)
    axes[3].set(xlabel="share of the ensemble that marks a pixel", ylabel="true probability", title="Calibration")
    axes[3].grid(alpha=0.3)
    axes[3].legend(fontsize="small")
    return png(figure)


if __name__ == "__main__":
    run_main(main)
