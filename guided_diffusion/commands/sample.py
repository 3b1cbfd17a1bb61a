"""Draw an ensemble of plausible outlines for every case of a folder, and write masks and pictures.

    python scripts/segmentation_sample.py --data_dir ./data/testing --num_ensemble 4

The flags of the model are read from flags.json beside the checkpoint, or from a .safetensors file itself. Started on
several GPUs, each takes its share of the cases. Cases that are already complete from the same model, flags and seed are
skipped. Those whose files cannot be read are left out and named at the end, with exit code 2.

With --evaluate True nothing but scores is written: those of segmentation_evaluate.py. Until then every case's masks are
kept in a hidden file, so that a run that was stopped goes on.
"""

import contextlib
import itertools
import math
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np

from .. import checkpoint, dist_util, logger, pretrained
from ..data.cases import Case, SegmentationCases
from ..data.masks import to_masks
from ..data.readers.base import refuse_unused
from ..flags import apply_stored_flags, settle
from ..live.views import SamplingView
from ..networks.tiles import tiles
from ..sampling import ensembles, files, volumes
from ..scoring.evaluation import Evaluation, parse_ensemble_sizes, report
from ..script_util import autocast_dtype, create_method
from ..system import storage
from ..system.errors import raise_problems
from ..system.terminal import progress, summary
from .cli import results_folder, run_script, start_script
from .evaluate import known_patients
from .program import command


def shared_problems(cases: SegmentationCases) -> list[str]:
    """What is wrong with the cases that some rank cannot read, as a list; no rank reads these any more."""
    for problems in dist_util.all_gather_objects(cases.problems):
        cases.problems.update(problems)
    return [cases.problems[i] for i in sorted(cases.problems)]


def announce_time(sampler: ensembles.EnsembleSampler, batches: int, scan: np.ndarray) -> None:
    """Say how long so many batches will take, if something else would be much faster."""
    method = sampler.method
    if method.advice and batches:
        seconds = sampler.seconds_a_call(scan) * method.cost.mask * batches
        logger.log(f"this will take about {timedelta(seconds=round(seconds))}; {method.advice}")


def find_masks(cases: SegmentationCases, i: int, folder: str, num_ensemble: int, settings: Sequence[dict[str, Any]],
               kept: bool) -> bool | tuple[Case, np.ndarray]:
    """Whether the masks of case i are there, at its own size and from one of these settings; for those that are `kept`
    to be scored, the case at that size and the masks."""
    case, shape = cases[i], (num_ensemble, *cases.fitting(i).size)
    fingerprints = [files.fingerprint(case, **each) for each in settings]
    if not kept:
        return files.is_complete(folder, case.name, shape, *fingerprints)
    masks = files.kept_masks(folder, case.name, shape, *fingerprints)
    return masks is not None and (cases.whole(i), masks)


def write_volumes(cases: SegmentationCases, drawn: set[int], args: SimpleNamespace, folder: str) -> list[str]:
    """Put the masks of this rank's share of the volumes into files in their geometry, where one of the cases `drawn` is
    a slice of it or a file is missing. Returns which have no geometry, a message each."""
    slices, problems = {}, []
    for i, case in enumerate(cases.cases):
        if case.volume and i not in cases.problems:
            slices.setdefault(case.volume, []).append(i)
    for volume in [*slices][dist_util.rank()::dist_util.world_size()]:
        numbers = slices[volume]
        kind = cases.readers.name_of(cases.cases[numbers[0]].images[0])
        files_there = all(storage.exists(storage.join(folder, name)) for name in volumes.names(volume, kind))
        if kind not in volumes.FORMATS or (files_there and not drawn & {*numbers}):
            continue
        try:
            volumes.write_volume(folder, volume, [
                (cases.facts(i).info, volumes.read_masks(folder, cases.cases[i].name, args.num_ensemble))
                for i in numbers])
        except volumes.NoGeometry as error:
            problems.append(str(error))
    return problems


def what_is_where(args: SimpleNamespace, folder: str, done: str, formats: set[str]) -> str:
    """What sampling has left of files of these formats, and the command that scores it."""
    rows = [(what, storage.join(folder, f"<case>_{name}")) for what, name in (
        ("to look at", "montage.png"), ("masks", f"output0.png .. {args.num_ensemble - 1}"),
        ("probability of foreground", "mean.png"), ("spread", "std.png"), ("before the threshold", "ensemble.npz"))]
    rows += [(f"in the {kind} scan's geometry", storage.join(folder, name)) for kind in sorted(formats)
             if kind in volumes.FORMATS for name in volumes.names("<volume>", kind)]
    flags = ["--data_dir", args.data_dir, "--samples_dir", folder]
    for name, default in (("plugin", ""), ("foreground", ""), ("normalise", "full")):
        if getattr(args, name) != default:
            flags += [f"--{name}", getattr(args, name)]
    if args.num_samples:
        flags += ["--skip_missing", "True"]
    return summary(done, rows, command("segmentation_evaluate.py", flags))


def main() -> None:
    args, given = start_script("sampling", __doc__)
    rank, world_size = dist_util.rank(), dist_util.world_size()

    with dist_util.all_ranks_or_none():
        folder = results_folder(args)
        model_path = pretrained.path_of(args.model_path) or storage.join(folder, checkpoint.NEWEST)
        apply_stored_flags(args, given, *checkpoint.flags_of(model_path))
        settle(args, given)
        dtype = autocast_dtype(args)
        method = create_method(args, training=False)
        checkpoint.load_model(method.model, model_path)
        cases = SegmentationCases(args.data_dir, args.image_size, args.image_channels, args.fit,
                                  need_labels=args.evaluate, limit=args.num_samples, progress=rank == 0, skip_bad=True,
                                  options=vars(args))
        refuse_unused(vars(args), cases.readers_used, args.data_dir)
        if not args.evaluate:
            volumes.refuse_missing_packages(cases.readers_used)
        sizes = parse_ensemble_sizes(args.ensemble_sizes, args.num_ensemble, required="ensemble_sizes" in given)
        evaluation = Evaluation(sizes, args.seed, args.patient_pattern, dist_util.dev(), vars(args),
                                method.independent, known_patients(cases.cases, given)) if args.evaluate else None
    problems = shared_problems(cases)
    with dist_util.all_ranks_or_none():
        if len(problems) == len(cases):
            raise_problems(problems, args.data_dir)
        storage.make_folder(folder)
        if rank == 0:
            storage.remove_partial(folder)

    settings = files.drawing_settings(args, storage.digest(model_path))
    mine = [i for i in range(len(cases)) if i not in cases.problems][rank::world_size]
    look = partial(find_masks, cases, folder=folder, num_ensemble=args.num_ensemble, settings=settings,
                   kept=args.evaluate)
    todo = []
    for i, found in progress(cases.readable(mine, look), "looking for masks", len(mine), "case", enabled=rank == 0,
                             leave=False):
        if not found:
            todo.append(i)
        elif evaluation:
            whole, masks = found
            evaluation.add(*whole, masks)
    problems = shared_problems(cases)
    before = len(cases) - len(problems) - sum(dist_util.all_gather_objects(len(todo)))

    # no batch is larger than all there is to draw, whatever is already done and however many processes share it
    auto = args.batch_size == "auto"
    size = (args.image_size,) * 2 if args.fit != "tile" else max(
        (cases.fitting(i).fitted for i in range(len(cases)) if i not in cases.problems), key=math.prod)
    largest = ensembles.largest_batch(dist_util.dev(), math.prod(size)) if auto else args.batch_size
    batch_size = min(largest, len(cases) * args.num_ensemble)
    sampler = ensembles.EnsembleSampler(method.to(dist_util.dev()), batch_size=batch_size, seed=args.seed)
    logger.configure(enabled=rank == 0)
    logger.log("command:", shlex.join(sys.argv))
    once = f" and {method.cost.scan} a scan" if method.cost.scan else ""
    logger.log(f"{len(cases) - len(problems)} cases from {args.data_dir}, {before} of them already complete in"
               f" {folder}; {args.num_ensemble} masks each, {method.cost.mask} network calls a mask{once},"
               f" {world_size} process(es) on {dist_util.dev()}")
    if problems:
        logger.log(f"{len(problems)} more are left out, since their files cannot be read; all are named at the end")
    method.prepare(dtype, args.compile)
    if args.fit == "tile":
        method.tile(args.image_size)
        logger.log(f"scans are drawn by tiles of {args.image_size} pixels, the largest by"
                   f" {len(tiles(*size, args.image_size))}, each of which takes these network calls")
    blank = np.zeros((args.image_channels, *size), np.float32)
    if auto:
        sampler.fit_batch_size(blank)
        batch_size = sampler.batch_size
        logger.log(f"--batch_size auto: {batch_size}")
    batches = -(-len(todo) * args.num_ensemble // batch_size)
    announce_time(sampler, batches, blank)
    view = SamplingView(folder, vars(args), None if storage.is_remote(folder) else folder, len(todo),
                        method.steps, enabled=rank == 0)
    start = time.perf_counter()
    with dist_util.all_ranks_or_none(), files.BackgroundWriter() as write, \
            progress(desc="sampling", total=len(todo) * args.num_ensemble, unit="mask", enabled=rank == 0) as bar:
        def on_step(members, x, x_start):
            dist_util.at((next(steps),), "drawing")
            bar.update(len(set(members)) / method.steps)
            view.on_step(members, x, x_start)

        def begun():
            for i, (case, whole) in cases.readable(todo, lambda i: (cases[i], cases.whole(i))):
                ways[case.name] = whole, cases.fitting(i)
                view.begin(case)
                yield case

        steps, ways = itertools.count(1), {}
        for case, samples in sampler.ensembles(begun(), args.num_ensemble, on_step):
            fingerprint = files.fingerprint(case, **settings[0])
            whole, fitting = ways.pop(case.name)
            samples = fitting.back(samples)
            masks = to_masks(samples, args.median_blur)
            if evaluation:
                evaluation.add(*whole, masks)
                write(files.keep_masks, folder, whole.name, masks, fingerprint)
            else:
                write(files.write_case, folder, whole, samples, masks, fingerprint, method.independent)
            view.show_case(whole, masks)
        dist_util.at(None)
    view.close()
    problems = shared_problems(cases)
    if not evaluation:
        drawn = {i for part in dist_util.all_gather_objects(todo) for i in part}
        with dist_util.all_ranks_or_none():
            unplaced = write_volumes(cases, drawn, args, folder)
        for problem in sum(dist_util.all_gather_objects(unplaced), []):
            logger.log(problem)

    after = len(cases) - len(problems)
    seconds, drawn = time.perf_counter() - start, (after - before) * args.num_ensemble
    done = f"{after - before} cases, {drawn} masks" + (f", {seconds / drawn:.3g} seconds per mask" if drawn else "")
    if evaluation:
        logger.log(done)
        evaluation.gather()
    elif after:
        logger.log(what_is_where(args, folder, done, cases.readers_used))
    with dist_util.all_ranks_or_none():
        if evaluation and rank == 0 and after:
            logger.log(report(evaluation.write(folder), folder))
    with dist_util.all_ranks_or_none():
        others = f"all other cases ({after}) are complete in {folder}"
        if len(problems) == 1:
            problems = [f"{problems[0]}; {others}"]
        raise_problems(problems, f"{args.data_dir}; {others}")
    if evaluation:
        for i in mine:
            with contextlib.suppress(OSError):
                storage.remove(files.kept_file(folder, cases.cases[i].name))


def run() -> None:
    run_script(main)
