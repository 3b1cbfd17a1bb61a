"""The benchmark whose right answer is known: train on phantoms, compare what is drawn with the true distribution.

    python benchmarks/phantom.py --methods cimd,energy,probunet --minutes 20

Phantoms are synthetic nodules for which every outline an expert could draw, and its probability, are known. Each method
is trained on 4 raters a case, for about as many core-minutes as the others, and scored on other phantoms, at several
points of its training, from independent draws; those of diffusion also with several numbers of sampling steps. Scores:

    excess GED       GED to the truth less that of an oracle that draws from the truth, both without bias: 0 is perfect
    nearest outline  the same after every mask is replaced by its nearest true outline: what is left of it are wrong
                     frequencies; the difference to excess GED are edges that are some pixels off
    total variation  between the shares of outlines drawn and their probabilities; 0 is perfect, but the oracle's own is
                     not 0 with a finite ensemble
    ECE              expected calibration error of the ensemble's mean against the true probability of each pixel

beside the oracle and two samplers that are wrong on purpose: always the most likely outline, and always the mean. The
same seed gives the same numbers on the same machine. Draws come from the averaged weights, or from the weights
themselves while the average still holds 1 % of the random ones. Writes table.md, results.json and benchmark.png; a
folder of --results_dir a method holds its training. Run again, it goes on where it was stopped. Core-minutes are
minutes by the clock times threads, so nothing else should run on those cores.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
from common import fast_bf16, load_sampler, run_script
from table import training_log
from tqdm import tqdm

from guided_diffusion import checkpoint, metrics
from guided_diffusion.commands.cli import run_script as run_main
from guided_diffusion.data import phantoms
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.masks import to_masks
from guided_diffusion.presets import PRESETS
from guided_diffusion.scoring.evaluation import cell, markdown
from guided_diffusion.system import storage
from guided_diffusion.system.errors import InputError

SIZE, CROP = 64, 32  # pixels of a phantom, and of its central part, which holds every outline
ORACLE, MOST_LIKELY, MEAN = "oracle: draws of the truth", "always the most likely outline", "always the mean, cut"
COLUMNS = {"excess_GED": "excess GED", "excess_GED_nearest": "nearest outline", "total_variation": "total variation",
           "ECE": "ECE"}
TICKS = 0, 0.02, 0.05, 0.1, 0.2, 0.5, 1  # of excess GED
E_FOLDINGS = 5  # e-foldings of an average after which less than 1 % of it is the random weights


def flags_of(preset, **changes):
    """The flags of a preset, for the central part of phantoms, with these changes: {"--name": value}."""
    words = PRESETS[preset].split()
    changes = {"image_size": CROP, "fit": "crop", **changes}
    flags = dict(zip(words[::2], words[1::2])) | {f"--{name}": str(value) for name, value in changes.items()}
    if changes.get("kl_weight") == 0:
        del flags["--num_filters"]  # of AMN and ACN, which there are none of then
    return flags


# method: (flags of training, the steps that one core of an AMD EPYC with AVX-512 bf16 takes in a minute)
METHODS = {
    "cimd": (flags_of("cpu-32"), 360),
    "energy": (flags_of("energy", field_of_view=0, pixel_unshuffle=1, num_channels=32, batch_size=8, lr=2e-3,
                        augment="flips,rot90"), 260),  # contrast says how likely a choice is, so it has to stay
    "probunet": (flags_of("probunet"), 900),
    "plain": (flags_of("cpu-32", kl_weight=0), 360),
}


def main():
    args = parse_args()
    folder = Path(args.results_dir)
    train_dir = make(folder / "train", args.num_train, args.seed)
    test_dir = make(folder / "test", args.num_cases, args.seed + 1000)
    cases = SegmentationCases(test_dir, CROP, 1, "crop")
    truths = [true_distribution(test_dir / case.name) for case in cases]
    known = folder / "scores.json"  # of what was drawn before, by all that decides it
    scores = json.loads(known.read_text()) if known.exists() else {}
    rows = []  # dicts

    def score(ensembles):
        values = [metrics.truth_scores(masks, *truth) for masks, truth in zip(ensembles, truths)]
        table = sum(metrics.truth_calibration(masks, *truth) for masks, truth in zip(ensembles, truths))
        return {"values": [[s[c] for c in COLUMNS] for s in values], "calibration": table.tolist()}

    for method in args.methods:
        train(args, method, train_dir, folder / method)
        for row in jobs(args, method, folder / method):
            weights = folder / method / row.pop("weights")
            key = f"{storage.digest(weights)} {row['sampling_steps']} {args.seed} {args.num_cases} {args.num_ensemble}"
            if key not in scores:
                sampler = load_sampler(weights, str(row["sampling_steps"] or ""), args.seed, spread=False)
                drawn = tqdm(sampler.ensembles(cases, args.num_ensemble), row["name"], len(cases))
                scores[key] = score([to_masks(samples) for _, samples in drawn])
                storage.write_bytes(known, json.dumps(scores).encode())
            rows.append({**row, **scores[key]})
    for name, draw in ((ORACLE, oracle), (MOST_LIKELY, most_likely), (MEAN, mean)):
        rows.append({"name": name, **score([draw(args, i, *truth) for i, truth in enumerate(truths)])})
    report(args, folder, rows)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default="cimd,energy,probunet",
                        help=f"which to compare, of {', '.join(METHODS)} (default %(default)s)")
    parser.add_argument("--num_train", type=int, default=4000, help="phantoms to train on (default %(default)s)")
    parser.add_argument("--num_cases", type=int, default=100, help="phantoms to score on (default %(default)s)")
    parser.add_argument("--num_ensemble", type=int, default=16, help="masks a case (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=20, help="about how many core-minutes each method is trained;"
                        " the steps are those that the machine of the table took so long for (default %(default)s)")
    parser.add_argument("--max_steps", type=int, default=0, help="training steps of each method, instead of --minutes")
    parser.add_argument("--points", type=int, default=4, help="points of the training to score (default %(default)s)")
    parser.add_argument("--sampling_steps", default="10,2,5,25", help="numbers of network evaluations a mask of"
                        " diffusion; the first is used for all points of the training, the others for its end (default"
                        " %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of phantoms, training and sampling (default %(default)s)")
    parser.add_argument("--results_dir", default="results/phantom", help="default %(default)s")
    args = parser.parse_args()
    args.sampling_steps = [int(word) for word in args.sampling_steps.split(",")]
    args.methods = args.methods.split(",")
    if unknown := [method for method in args.methods if method not in METHODS]:
        raise InputError(f"--methods {','.join(args.methods)}: there is no {unknown[0]!r}; there are"
                         f" {', '.join(METHODS)}")
    return args


def make(data_dir, count, seed):
    """Phantoms on disk, unless they are there from an earlier run."""
    if len(list(data_dir.glob("*"))) != count:
        phantoms.write_cases(data_dir, count, seed, SIZE, progress=lambda n: tqdm(n, f"making {data_dir}"))
    return data_dir


def plan(args, method):
    """Steps from one line of the log to the next, from one point to the next, and in all: a point has a line, which
    knows what it has cost."""
    between = (args.max_steps or args.minutes * METHODS[method][1]) / args.points
    lines = math.ceil(between / 100)
    interval = math.ceil(between / lines)
    return interval, interval * lines, interval * lines * args.points


def train(args, method, data_dir, folder):
    """Train a method, or go on."""
    log_interval, save_interval, steps = plan(args, method)
    flags = {**METHODS[method][0], "--use_bf16": fast_bf16(), "--seed": args.seed, "--log_interval": log_interval,
             "--save_interval": save_interval, "--lr_anneal_steps": steps, "--data_dir": data_dir,
             "--results_dir": folder}
    run_script("segmentation_train.py", *(word for flag in flags.items() for word in flag))


def jobs(args, method, folder):
    """What is drawn of a training: rows with the name of the file of weights, without their scores."""
    stored = checkpoint.load_flags(folder)
    rate = stored["ema_rate"].split(",")[0]
    _, between, last = plan(args, method)
    points = range(between, last + 1, between)
    usual, *others = args.sampling_steps if stored["method"] == "cimd" else [None]
    for step, sampling in [(step, usual) for step in points] + [(last, n) for n in others]:
        averaged = step * (1 - float(rate)) >= E_FOLDINGS
        seconds, seen = training_log(folder / checkpoint.model_name(step))
        yield {"name": f"{method}, step {step}" + (f", {sampling} sampling steps" if sampling else ""),
               "method": method, "training_steps": step, "sampling_steps": sampling,
               "core_minutes": seconds * torch.get_num_threads() / 60, "scans_seen": seen,
               "weights": checkpoint.ema_name(rate, step) if averaged else checkpoint.model_name(step)}


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

def report(args, folder, rows):
    lines = [["", "core-minutes", "scans seen", *COLUMNS.values(), "ECE of all pixels"]]
    stored = {}
    for row in rows:
        mean, low, high = metrics.bootstrap_interval(np.array(row.pop("values")))
        scores = {c: {"mean": m, "low": lo, "high": hi} for c, m, lo, hi in zip(COLUMNS, mean, low, high)}
        pooled = metrics.calibration_error(torch.tensor(row["calibration"])).item()
        cost = [f"{row['core_minutes']:.1f}", str(row["scans_seen"])] if "method" in row else ["", ""]
        lines.append([row["name"], *cost, *(cell(scores[c]) for c in COLUMNS), f"{pooled:.4f}"])
        stored[row.pop("name")] = {**row, **scores, "ECE_pooled": pooled}
    text = f"{args.num_cases} phantoms, {args.num_ensemble} masks a case; mean [95 % interval over cases]\n\n" \
        + markdown(lines) + "\n"
    for name, data in (("table.md", text.encode()), ("results.json", json.dumps(stored, indent=1).encode()),
                       ("benchmark.png", draw(stored, args.sampling_steps[0]))):
        storage.write_bytes(folder / name, data)
    print(f"\n{text}\nwritten to {folder}: table.md, results.json, benchmark.png")


def draw(stored, usual):
    from matplotlib.figure import Figure

    from guided_diffusion.draw.plots import png
    from guided_diffusion.draw.style import BLUE, GREEN, GREY, ORANGE, PURPLE, VERMILLION

    figure = Figure(figsize=(18, 5), layout="constrained")
    axes = figure.subplots(1, 4)
    methods = {}  # name: its rows
    for name, scores in stored.items():
        if "method" in scores:
            methods.setdefault(scores["method"], []).append(scores)
    colours = dict(zip(METHODS, (BLUE, VERMILLION, ORANGE, PURPLE)))

    def line(panel, rows, x, column, colour, label=None, style="o-"):
        points = sorted((row[x], row[column]["mean"], row[column]["low"], row[column]["high"]) for row in rows)
        x, mean, low, high = zip(*points)
        panel.plot(x, mean, style, color=colour, label=label)
        panel.fill_between(x, low, high, color=colour, alpha=0.15)

    for panel, column in ((axes[0], "excess_GED"), (axes[2], "total_variation")):
        for method, rows in methods.items():
            line(panel, [row for row in rows if row["sampling_steps"] in (None, usual)], "core_minutes", column,
                 colours[method], method)
        panel.set(xlabel="core-minutes of training", ylabel=COLUMNS[column])
        panel.set_xlim(left=0)
    axes[0].plot([], [], "--", color=GREY, label="if outlines were exact")
    for method, rows in methods.items():
        line(axes[0], [row for row in rows if row["sampling_steps"] in (None, usual)], "core_minutes",
             "excess_GED_nearest", colours[method], style="--")
        last = max(row["training_steps"] for row in rows)
        rows = [row for row in rows if row["training_steps"] == last]
        if rows[0]["sampling_steps"]:
            line(axes[1], rows, "sampling_steps", "excess_GED", colours[method])
            axes[1].set_xscale("log")
            axes[1].set_xticks(*[sorted(row["sampling_steps"] for row in rows)] * 2)
        else:
            axes[1].axhline(rows[0]["excess_GED"]["mean"], color=colours[method])
        predicted_and_true(axes[3], rows[0], colours[method])
    axes[1].set(xlabel="network evaluations a mask", ylabel=COLUMNS["excess_GED"])
    for panel, column in zip(axes, ("excess_GED", "excess_GED", "total_variation")):
        for name, colour, style in ((ORACLE, GREEN, "-"), (MOST_LIKELY, GREY, "-."), (MEAN, GREY, ":")):
            panel.axhline(stored[name][column]["mean"], color=colour, linestyle=style, label=name, linewidth=1)
        if column == "excess_GED":  # logarithmic, and linear about the 0 of a perfect model
            panel.set_yscale("symlog", linthresh=TICKS[1], linscale=0.3)
            panel.set_ylim(bottom=-TICKS[1] / 2)
            panel.set_yticks(TICKS, TICKS)
        panel.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(METHODS) + 4)
    predicted_and_true(axes[3], stored[ORACLE], GREEN)
    axes[3].plot([0, 1], [0, 1], color=GREY, linewidth=1)
    axes[3].set(xlabel="share of the ensemble that marks a pixel", ylabel="true probability")
    titles = "Training", "Sampling at the end (level lines: one pass)", "Training", "Calibration at the end"
    for panel, title in zip(axes, titles):
        panel.set_title(title)
        panel.grid(alpha=0.3)
    return png(figure)


def predicted_and_true(panel, row, colour):
    pixels, predicted, true = np.array(row["calibration"])
    used = pixels > 0
    panel.plot(predicted[used] / pixels[used], true[used] / pixels[used], "o-", color=colour, markersize=4)


if __name__ == "__main__":
    run_main(main)
