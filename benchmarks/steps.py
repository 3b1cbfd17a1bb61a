"""Scores against network calls a mask, for every sampler: what do fewer calls cost?

    python benchmarks/steps.py --model_path results/cpu-32/emasavedmodel_0.999_010000.pt --data_dir LIDC/val --fit crop

GED and HM-IoU against the raters; on phantoms, which come with their true distribution, excess GED as well (see
phantom.py). All settings draw for the same cases, so each is also compared case by case with --reference: the mean
difference, with its interval, is far sharper than the intervals of both. Rows are kept in --output_dir as they
come (steps.json), so a run that was stopped goes on; at the end table.md and steps.png are written.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from common import load_sampler
from tqdm import tqdm

from guided_diffusion import checkpoint, metrics, pretrained
from guided_diffusion.commands.cli import run_script as run_main
from guided_diffusion.data import phantoms
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.fitting import FITS
from guided_diffusion.data.masks import to_masks
from guided_diffusion.respace import SPACINGS
from guided_diffusion.samplers import SAMPLERS, network_calls
from guided_diffusion.scoring.evaluation import cell, markdown
from guided_diffusion.system import storage


def main():
    args = parse_args()
    folder = Path(args.output_dir)
    storage.make_folder(folder, "--output_dir")
    stored = folder / "steps.json"
    rows = json.loads(stored.read_text()) if stored.exists() else {}
    flags, _ = checkpoint.flags_of(pretrained.path_of(args.model_path))
    cases = SegmentationCases(args.data_dir, flags["image_size"], flags["image_channels"], args.fit, progress=True)
    for sampler in args.samplers.split(","):
        for spacing in args.spacings.split(","):
            for calls in map(int, args.calls.split(",")):
                steps = (calls + 1) // 2 if sampler == "heun" else calls
                shown, walk = sampler + (" float32" if args.float32 else ""), f"{spacing}{steps}"
                name = f"{shown} {walk}"
                count = args.num_cases if calls < 100 else min(args.num_cases, args.long_cases)
                if name not in rows:
                    made = network_calls(SAMPLERS[sampler], steps)
                    rows[name] = {"sampler": shown, "spacing": spacing, "calls": made,
                                  **score(args, cases, count, sampler, walk, name)}
                    storage.write_bytes(stored, json.dumps(rows, indent=1).encode())
                    print(name, {k: cell(v) for k, v in rows[name].items() if k in ("GED", "HM_IoU", "excess_GED")},
                          flush=True)
    report(args, folder, rows)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path", required=True, help="as for segmentation_sample.py")
    parser.add_argument("--data_dir", required=True, help="cases to score on")
    parser.add_argument("--fit", choices=FITS, default="error", help="as for segmentation_sample.py")
    parser.add_argument("--num_cases", type=int, default=100,
                        help="cases, spread evenly over the sorted names (default %(default)s)")
    parser.add_argument("--long_cases", type=int, default=100,
                        help="of which settings of 100 calls or more use the first ones (default %(default)s)")
    parser.add_argument("--num_ensemble", type=int, default=16, help="masks a case (default %(default)s)")
    parser.add_argument("--samplers", default=",".join(SAMPLERS), help="default %(default)s")
    parser.add_argument("--spacings", default="uniform", help=f"of {','.join(SPACINGS)} (default %(default)s)")
    parser.add_argument("--calls", default="1,2,4,5,10,20,50,100,250,1000",
                        help="network calls a mask (default %(default)s)")
    parser.add_argument("--reference", default="ancestral uniform100",
                        help="row that the others are compared with (default %(default)s)")
    parser.add_argument("--float32", action="store_true", help="compute in float32 where the machine is faster in bf16")
    parser.add_argument("--batch_size", type=int, default=64, help="masks drawn at once (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--output_dir", default="results/steps", help="default %(default)s")
    return parser.parse_args()


def score(args, cases, count, sampler, respacing, name):
    chosen = [i * len(cases) // args.num_cases for i in range(args.num_cases)]
    chosen = [chosen[i * args.num_cases // count] for i in range(count)]
    drawn = load_sampler(args.model_path, respacing, args.seed, args.batch_size, sampler=sampler,
                         bf16=False if args.float32 else None)
    values = {}
    bar = tqdm(drawn.ensembles((cases[i] for i in chosen), args.num_ensemble), name, count, unit=" cases", leave=False)
    patients = []
    for i, (case, samples) in zip(chosen, bar):
        masks = to_masks(samples)
        agreement = metrics.Agreement(masks, case.raters)
        scores = {"GED": agreement.ged().item(), "HM_IoU": agreement.hm_iou().item()}
        folder = cases.cases[i].folder
        if (folder / "truth.npz").exists():
            outlines, probabilities = phantoms.load_truth(folder)
            edge = (outlines.shape[1] - masks.shape[1]) // 2  # the crop holds every outline
            outlines = outlines[:, edge:outlines.shape[1] - edge, edge:outlines.shape[2] - edge]
            scores["excess_GED"] = metrics.truth_scores(masks, outlines, probabilities)["excess_GED"]
        for key, value in scores.items():
            values.setdefault(key, []).append(value)
        patients.append(metrics.patient_of(case.name))
    return {"patients": patients, "case": chosen, "values": values, **intervals(values, patients)}


def intervals(values, patients):
    """Lists of one number a case -> {"mean", "low", "high"} by the same keys."""
    found = metrics.bootstrap_interval(np.array(list(values.values())).T, patients)
    return {key: {"mean": float(m), "low": float(lo), "high": float(hi)} for key, m, lo, hi in zip(values, *found)}


def against(reference, row, key):
    """Mean of a row's scores less the reference's over the cases that both have, as a word."""
    theirs = dict(zip(reference["case"], reference["values"][key]))
    pairs = [(patient, value - theirs[case]) for patient, case, value in zip(
        row["patients"], row["case"], row["values"][key]) if case in theirs]
    patients, differences = zip(*pairs)
    found = intervals({"difference": differences}, patients)["difference"]
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def report(args, folder, rows):
    keys = [key for key in ("GED", "HM_IoU", "excess_GED") if key in next(iter(rows.values()))]
    whole = [key for key in keys[:2] if all(key in row["values"] for row in rows.values())]
    compared = whole if args.reference in rows else []
    table = [["sampler", "timesteps", "network calls a mask", "cases",
              *(f"{key}_{args.num_ensemble}" if key != "excess_GED" else "excess GED" for key in keys),
              *(f"{key} less that of {args.reference}" for key in compared)]]
    for row in rows.values():
        table.append([row["sampler"], row["spacing"], str(row["calls"]), str(len(row["case"])),
                      *(cell(row[key]) for key in keys),
                      *(against(rows[args.reference], row, key) for key in compared)])
    for name, data in (("table.md", (markdown(table) + "\n").encode()), ("steps.png", draw(rows, keys))):
        storage.write_bytes(folder / name, data)
    print(f"{markdown(table)}\n\nwritten to {folder}: steps.json, table.md, steps.png")


def draw(rows, keys):
    from matplotlib.figure import Figure

    from guided_diffusion.draw.plots import png
    from guided_diffusion.draw.style import CURVES

    figure = Figure(figsize=(6 * len(keys), 5.5), layout="constrained")
    colours = dict(zip(SAMPLERS, CURVES))
    most = max(len(row["case"]) for row in rows.values())
    for axes, key in zip(figure.subplots(1, len(keys)), keys):
        for sampler, colour in colours.items():
            for spacing, line in zip(SPACINGS, ("-", "--", ":", "-.")):
                for whole in (True, False):  # rows of fewer cases compare with no other: hollow, and not joined
                    chosen = sorted((row["calls"], *(row[key][part] for part in ("mean", "low", "high")))
                                    for row in rows.values() if (row["sampler"], row["spacing"]) == (sampler, spacing)
                                    and (len(row["case"]) == most) == whole)
                    if chosen:
                        calls, mean, low, high = np.array(chosen).T
                        axes.errorbar(calls, mean, (mean - low, high - mean), fmt="o" + line if whole else "o",
                                      markerfacecolor=None if whole else "white", markersize=4, color=colour,
                                      elinewidth=0.3, label=f"{sampler}, {spacing}" if whole else None)
        axes.set(xscale="log", xlabel="network calls a mask", ylabel=key)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    return png(figure)


if __name__ == "__main__":
    run_main(main)
