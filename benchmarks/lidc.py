"""Train on one folder of real cases, score on another: one row of a table a preset.

    python benchmarks/lidc.py --train_dir LIDC/train --test_dir LIDC/val --preset cpu-32

The folders are in the layout that segmentation_train.py reads. Everything goes to --results_dir: the checkpoints, the
log, the scores (scores.csv, .json, .png, report.html, best.png, worst.png) and the row (table.md). Run again, it trains
no further and scores anew, so another --sampler needs no other training.

With --table it makes one table of models that are trained already instead, see table.py:

    python benchmarks/lidc.py --table --test_dir LIDC/val MODEL_PATH ...
"""

import argparse
import json
import shlex
import sys
import time

import table
from common import fast_bf16, load_sampler, run_script
from tqdm import tqdm

from guided_diffusion import checkpoint
from guided_diffusion.commands.cli import run_script as run_main
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.masks import to_masks
from guided_diffusion.presets import PRESETS
from guided_diffusion.samplers import SAMPLERS
from guided_diffusion.scoring.evaluation import BACKGROUND, RATERS, Evaluation, cell, markdown
from guided_diffusion.script_util import BEST
from guided_diffusion.system import storage

COLUMNS = ("GED", "HM_IoU", "D_max", "S_c", "D_a", "CI", "soft_Dice", "ECE")


def main():
    if "--table" in sys.argv:
        return table.main()
    args = parse_args()
    train(args)
    evaluation, cost = sample(args)
    summary = evaluation.write(args.results_dir)
    head = ["", *(f"{name}_{args.num_ensemble}" if name in ("GED", "HM_IoU") else name for name in COLUMNS), *cost]
    nothing = {name: "" for name in cost}
    rows = [head]
    for who, scores, costs in ((f"{args.preset}, {args.sampler} {args.timestep_respacing}", summary["all"], cost),
                               (RATERS, summary["references"][RATERS]["all"], nothing),
                               (BACKGROUND, summary["references"][BACKGROUND]["all"], nothing)):
        rows.append([who, *(cell(scores[name]) for name in COLUMNS), *costs.values()])
    text = (f"{summary['cases']} cases of {summary['patients']} patients, {args.num_ensemble} masks a case; mean"
            f" [95 % interval over patients]\n\n{markdown(rows)}\n")
    storage.write_bytes(storage.join(args.results_dir, "table.md"), text.encode())
    print(text)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_dir", required=True, help="cases to train on")
    parser.add_argument("--test_dir", required=True, help="cases to score on, of other patients")
    parser.add_argument("--preset", choices=PRESETS, default="cpu-32",
                        help="as for segmentation_train.py (default %(default)s)")
    parser.add_argument("--train_flags", default="", help="further flags of segmentation_train.py")
    parser.add_argument("--num_cases", type=int, default=300,
                        help="cases to score, spread evenly over the sorted names (0: all; default %(default)s)")
    parser.add_argument("--num_ensemble", type=int, default=16, help="masks a case (default %(default)s)")
    parser.add_argument("--sampler", choices=SAMPLERS, default=BEST["sampler"], help="default %(default)s")
    parser.add_argument("--timestep_respacing", default=f"{BEST['timestep_spacing']}{BEST['sampling_steps']}",
                        help="which timesteps it visits (default %(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="masks drawn at once (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of training and sampling (default %(default)s)")
    parser.add_argument("--results_dir", help="default: results/<preset>")
    args = parser.parse_args()
    args.results_dir = args.results_dir or f"results/{args.preset}"
    return args


def train(args):
    run_script("segmentation_train.py", "--preset", args.preset, "--use_bf16", fast_bf16(), "--seed", args.seed,
               "--data_dir", args.train_dir, "--results_dir", args.results_dir, *shlex.split(args.train_flags))


def sample(args):
    """Returns the Evaluation and what it cost, a dict of words."""
    step = checkpoint.steps_in(args.results_dir)[-1]
    flags = checkpoint.load_flags(args.results_dir)
    rate = flags["ema_rate"].split(",")[0]
    sampler = load_sampler(storage.join(args.results_dir, checkpoint.ema_name(rate, step)),
                           args.timestep_respacing, args.seed, args.batch_size, args.sampler)
    cases = SegmentationCases(args.test_dir, flags["image_size"], flags["image_channels"], flags["fit"], progress=True)
    count = min(args.num_cases or len(cases), len(cases))
    chosen = [cases[i * len(cases) // count] for i in range(count)]
    evaluation = Evaluation(device=sampler.device)
    seconds, calls = 0.0, sampler.method.cost.mask
    with tqdm(total=count, desc="sampling", unit=" cases") as bar:
        start = time.perf_counter()
        for case, samples in sampler.ensembles(chosen, args.num_ensemble):
            seconds += time.perf_counter() - start
            evaluation.add(*case, to_masks(samples))
            bar.update()
            start = time.perf_counter()
    return evaluation, {
        "network evaluations a mask": str(calls), "seconds a mask": f"{seconds / count / args.num_ensemble:.3g}",
        "training images seen": str(images_seen(args.results_dir, step))}


def images_seen(folder, step):
    """From the log of the training run."""
    with open(storage.join(folder, "progress.json"), encoding="utf-8") as log:
        entries = [json.loads(line) for line in log]
    return next(int(entry["samples"]) for entry in reversed(entries) if entry["step"] <= step)


if __name__ == "__main__":
    run_main(main)
