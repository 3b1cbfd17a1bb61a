"""One table of several trained models on a folder of cases: what lidc.py --table runs.

    python benchmarks/lidc.py --table --test_dir LIDC/val results/a/savedmodel.pt pretrained:lidc

Every model draws the same number of independent masks of the same cases, by the flags that its method draws quickly
with, or --sample_flags. A method that can spread its masks draws them spread as well. The table goes to table.md in
--results_dir as soon as a row is there, and the rows to table.json: a row of the same weights, flags and cases is not
computed again.

Core-hours and scans seen are those of progress.json beside the weights, or of the facts core_hours and scans_seen in a
safetensors file; blank where neither is known.
"""

import argparse
import hashlib
import json
import os
import statistics
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from common import fast_bf16
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from guided_diffusion import Segmenter, checkpoint, metrics, pretrained
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.fitting import FITS
from guided_diffusion.data.masks import to_masks
from guided_diffusion.draw.scored import ALL
from guided_diffusion.flags import FLAGS
from guided_diffusion.methods import METHODS
from guided_diffusion.sampling.ensembles import EnsembleSampler, largest_batch
from guided_diffusion.scoring.evaluation import cell, estimate, markdown, sized_scores
from guided_diffusion.script_util import create_method, drawing_flags
from guided_diffusion.system import storage
from guided_diffusion.system.errors import InputError

SHAPES = ("components", "perimeter")  # of metrics.smoothness
SLOW = 20  # seconds; what takes longer is timed once


def main(argv=None):
    args = parse_args(argv)
    storage.make_folder(args.results_dir)
    path = storage.join(args.results_dir, "table.json")
    known = json.loads(storage.read_bytes(path)) if storage.exists(path) else {}
    rows = {}
    for name in args.models:
        model = load(name, args)
        if model.key not in known:
            known[model.key] = row(model, args)
            storage.write_bytes(path, (json.dumps(known, indent=1) + "\n").encode())
        rows[name] = known[model.key]
        text = table(rows, args)
        storage.write_bytes(storage.join(args.results_dir, "table.md"), text.encode())
    print(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", required=True, help="make a table of trained models")
    parser.add_argument("models", nargs="+", metavar="MODEL_PATH", help="weights, or pretrained:NAME")
    parser.add_argument("--test_dir", required=True, help="cases to score on")
    parser.add_argument("--num_cases", type=int, default=0,
                        help="cases to score, spread evenly over the sorted names (0: all; default %(default)s)")
    parser.add_argument("--num_ensemble", type=int, default=16, help="masks a case (default %(default)s)")
    parser.add_argument("--sample_flags", default="", help="flags of segmentation_sample.py to draw with, for the"
                        " models that have them (default: those by which a method draws quickly)")
    parser.add_argument("--fit", choices=FITS, help="what to do with images of another size than a model's (default: as"
                        " it was trained, if that is known, else error)")
    parser.add_argument("--train_cores", type=int, default=1, help="cores that the runs were trained on; progress.json"
                        " knows the hours alone (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the masks (default %(default)s)")
    parser.add_argument("--results_dir", default="results/table", help="default %(default)s")
    return parser.parse_args(argv)


# ---- a model ----

def load(name, args):
    """All about a model before it draws: a namespace of its name, path, network, flags, what to draw with, and a key
    of all that decides its row."""
    path = pretrained.path_of(name)
    segmenter = Segmenter.load(path)
    if os.path.isdir(path):
        path = storage.join(path, checkpoint.NEWEST)
    flags = SimpleNamespace(**segmenter.flags)
    method = METHODS[flags.method]
    own = {flag.name for flag in METHODS.entries[flags.method].flags}
    drawing = {flag: value for flag, value in given(args.sample_flags).items()
               if flag in own or not METHODS.owners(flag)} or method.quick_flags(flags)
    fit = args.fit or checkpoint.load_flags(storage.folder_of(path)).get("fit", "error")
    key = [storage.digest(path), method.__name__, drawing, os.path.abspath(args.test_dir), args.num_cases,
           args.num_ensemble, args.seed, fit, args.train_cores, torch.get_num_threads(), fast_bf16()]
    drawing.pop("spread", None)  # both are drawn
    return SimpleNamespace(name=name, path=path, network=segmenter.model, flags=flags, device=segmenter.device,
                           fit=fit, drawing=drawing, can_spread="spread" in own,
                           key=hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest())


def given(text):
    """"--sampler heun --sampling_steps 5" -> {"sampler": "heun", "sampling_steps": 5}"""
    words = text.split()
    values = dict(zip(words[::2], words[1::2]))
    types = {f"--{flag.name}": flag for flag in FLAGS if flag.group == "sampling"}
    if len(words) % 2 or values.keys() - types.keys():
        raise InputError(f"--sample_flags {text}: needs flags of segmentation_sample.py, each with a value")
    return {types[word].name: value if types[word].choices else value == "True" if types[word].type is bool
            else types[word].type(value) for word, value in values.items()}


def ready(model, **flags):
    """The method, ready to draw."""
    method = create_method(drawing_flags(model.flags, **model.drawing, **flags), model.network, training=False)
    method.to(model.device)
    return method.prepare(torch.bfloat16 if fast_bf16() else None)


# ---- its row ----

def row(model, args):
    """The cells of a model's row, a dict of words by column, and what is said below the table."""
    count = args.num_ensemble
    cases = SegmentationCases(args.test_dir, model.flags.image_size, model.flags.image_channels, model.fit,
                              progress=True)
    number = min(args.num_cases or len(cases), len(cases))
    chosen = [i * len(cases) // number for i in range(number)]
    method = ready(model, **({"spread": False} if model.can_spread else {}))
    if not method.independent:
        raise InputError(f"{model.name}: draws masks that are no independent draws, which the scores need")
    cells = {"method": " ".join([model.flags.method, *(f"--{name} {value}" for name, value in model.drawing.items())]),
             "parameters (M)": f"{sum(p.numel() for p in model.network.parameters()) / 1e6:.2f}",
             **gflop(method, cases[0].image, args.seed), **training(model.path, args.train_cores)}
    names, patients, values, shapes = drawn(model.name, method, cases, chosen, args)
    words = dict(zip(names, interval(values, patients)))
    cells |= {f"GED_{count} independent": words["GED"], f"GED_{count} spread": "", "GED_100": words["GED_100"],
              "GED_unbiased": words["GED_unbiased"], f"HM_IoU_{count}": words["HM_IoU"],
              **{name: words[name] for name in ("D_max", "CI", "presence_Brier")}}
    if model.can_spread:
        _, _, others, _ = drawn(model.name, ready(model, spread=True), cases, chosen, args)
        cells[f"GED_{count} spread"] = interval(others[:, [names.index("GED")]], patients)[0]
    (of_draws, whose), (of_raters, rater_of) = shapes
    for title, draws, raters in zip(SHAPES, interval(of_draws, whose), interval(of_raters, rater_of)):
        cells[f"{title} a mask (raters)"] = f"{draws} ({raters.split()[0]})"
    cells[f"seconds for {count} masks"] = f"{seconds(method, cases[0], count, args.seed):.3g}"
    best = values[:, names.index("rater_diversity")].mean()  # of a perfect model, for exchangeable raters
    floor = best * np.mean([1 / cases[i].raters.shape[0] for i in chosen])
    return {"cells": cells, "cases": number, "patients": len(set(patients)), "command": command(model.path),
            "perfect": {f"GED_{n}": floor + best / n for n in sorted({count, 100})}}


def drawn(name, method, cases, chosen, args):
    """Draw and score: names of scores, patients [N], values [N, S], and of draws and of raters the smoothness [k, 2]
    with the patient of each mask."""
    sampler = EnsembleSampler(method, batch_size=batch(method, cases.image_size, args.num_ensemble), seed=args.seed)
    names, patients, values, shapes = [*metrics.SCORES, "GED_100"], [], [], [[], []]
    with tqdm(total=len(chosen), desc=name, unit=" cases") as bar:
        for case, samples in sampler.ensembles((cases[i] for i in chosen), args.num_ensemble):
            masks = to_masks(samples)
            scores = sized_scores(torch.from_numpy(masks), torch.from_numpy(case.raters))[ALL]
            scores = dict(zip(metrics.SCORES, scores))
            scores["GED_100"] = scores["GED_unbiased"] + scores["diversity"] / 100 \
                + scores["rater_diversity"] / len(case.raters)
            patients.append(metrics.patient_of(case.name))
            values.append([scores[name] for name in names])
            for kind, of in zip(shapes, (masks, case.raters)):
                kind += [(each, patients[-1]) for each in metrics.smoothness(of)]
            bar.update()
    return names, patients, np.array(values), [(np.array([each for each, _ in kind]).reshape(-1, len(SHAPES)),
                                                [patient for _, patient in kind]) for kind in shapes]


def batch(method, side, count):
    return min(largest_batch(next(method.parameters()).device, side ** 2), count)


def interval(values, patients):
    """[N, S] -> S cells of a mean with its interval; blank if there is none."""
    if not len(values):
        return [" "] * values.shape[1]
    return [cell(estimate(*each)) for each in zip(*metrics.bootstrap_interval(values, patients))]


def gflop(method, image, seed):
    """GFLOP of a scan and of a mask, two a multiplication with its addition."""
    def count(function):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            result = function()
        return result, counter.get_total_flops() / 1e9

    images = torch.from_numpy(image)[None].to(next(method.parameters()).device)
    encoded, scan = count(lambda: method.encode(images))
    _, mask = count(lambda: method.evaluate_once(encoded, [(0, "", 0)]))
    return {"GFLOP a scan": f"{scan:.3g}", "GFLOP a mask": f"{mask * max(1, method.cost.mask):.3g}"}


def seconds(method, case, count, seed):
    """Of `count` masks of one scan, the median of three."""
    sampler, times = EnsembleSampler(method, batch_size=batch(method, case.image.shape[-1], count), seed=seed), []
    while len(times) < 4 and not (times and times[0] > SLOW):  # the first one also chooses algorithms
        start = time.perf_counter()
        list(sampler.ensembles([case], count))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:] or times)


# ---- how it was trained ----

def training(path, cores):
    """Core-hours and scans seen, blank where unknown."""
    facts = {}
    if checkpoint.is_safetensors(path):
        facts = checkpoint.metadata_of(path)
    elif log := training_log(path):
        facts = {"core_hours": f"{log[0] * cores / 3600:.2f}", "scans_seen": str(log[1] or "")}
    return {"core-hours": facts.get("core_hours", ""), "scans seen": facts.get("scans_seen", "")}


def training_log(path):
    """Seconds of training and scans seen (None if unknown) of a checkpoint, from progress.json beside it; None without.
    """
    log = storage.join(storage.folder_of(path), "progress.json")
    if not storage.exists(log):
        return None
    entries = [json.loads(line) for line in storage.read_bytes(log).decode().splitlines()]
    step = checkpoint.step_of(path)
    entries = [entry for entry in entries if step is None or entry["step"] <= step]
    clock = [entry["seconds"] for entry in entries]  # starts anew whenever the run was gone on with
    seen = [int(entry["samples"]) for entry in entries if "samples" in entry]
    return sum(now for now, after in zip(clock, [*clock[1:], 0]) if after < now), seen[-1] if seen else None


def command(path):
    """The command that trained it, of the log or of the model card beside it, "" if that is unknown."""
    if checkpoint.is_safetensors(path):
        card = storage.join(storage.folder_of(path), f"{Path(path).stem}.md")
        text = storage.read_bytes(card).decode() if storage.exists(card) else ""
        _, _, section = text.partition("## Training\n")
        lines = [line.strip() for line in section.partition("\n## ")[0].splitlines() if line.startswith("    ")]
        return "; ".join("\n".join(lines).replace("\\\n", "").splitlines())
    log = storage.join(storage.folder_of(path), "log.txt")
    lines = storage.read_bytes(log).decode().splitlines() if storage.exists(log) else []
    return next((line.removeprefix("command: ") for line in lines if line.startswith("command: ")), "")


# ---- the table ----

def table(rows, args):
    """The rows so far in Markdown, with what they were measured on."""
    first = next(iter(rows.values()))
    lines = [["model", *first["cells"]]] + [[name, *row["cells"].values()] for name, row in rows.items()]
    perfect = dict.fromkeys(" and ".join(f"{name} {value:.3f}" for name, value in row["perfect"].items())
                            for row in rows.values())
    notes = [f"A perfect model would have {' or, on other crops, '.join(perfect)}.",
             f"GED_100 follows from {args.num_ensemble} independent masks: GED_unbiased + diversity / 100 +"
             f" rater_diversity / raters. Components and perimeter, in edges of pixels, are means over the masks that"
             f" are not empty. GFLOP: two a multiplication with its addition. Seconds: of one scan, by"
             f" {torch.get_num_threads()} threads{' in bfloat16' * fast_bf16()}, on"
             f" {'CUDA' if torch.cuda.is_available() else 'a CPU'}."]
    commands = [f"- {name}: `{row['command']}`" for name, row in rows.items() if row["command"]]
    return (f"{first['cases']} cases of {first['patients']} patients, {args.num_ensemble} masks a case; mean [95 %"
            f" interval over patients]\n\n{markdown(lines)}\n\n" + "\n\n".join(notes) + "\n"
            + ("\nTrained by:\n\n" + "\n".join(commands) + "\n" if commands else ""))
