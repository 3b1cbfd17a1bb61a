"""Draw an ensemble of plausible outlines for every case of a folder, and write masks and pictures.

    python scripts/segmentation_sample.py --data_dir ./data/testing --num_ensemble 4

The flags of the model are read from flags.json beside the checkpoint, or from a .safetensors file itself. Cases that
are already complete from the same model, flags and seed are skipped. Those whose files cannot be read are left out and
named at the end, with exit code 2.

Started on several GPUs, or several times with the same flags on machines that share the folder, each process takes the
next case that no other has. What one that dies had taken is drawn by the others.

With --evaluate True nothing but scores is written: those of segmentation_evaluate.py. Until then every case's masks are
kept in a hidden file, so that a run that was stopped goes on.
"""

import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
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
from ..sampling.sharing import SharedCases
from ..scoring.evaluation import Evaluation, parse_ensemble_sizes, report
from ..scoring.volume_scores import VolumeScores, by_volume, places_of
from ..script_util import autocast_dtype, create_method
from ..system import storage
from ..system.errors import InputError, raise_problems
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


def write_volumes(cases: SegmentationCases, drawn: set[int], args: SimpleNamespace, folder: str, shared: SharedCases
                  ) -> list[str]:
    """Put the masks of volumes into files in their geometry, where a file is missing or older than a slice of it, or
    one of the cases `drawn` is such in a bucket; each volume by one of all processes. Returns which have no geometry, a
    message each."""
    slices, problems = {}, []
    for i in range(len(cases)):
        if i not in cases.problems and cases.volumes[i][1] in volumes.FORMATS:
            slices.setdefault(cases.volumes[i], []).append(i)

    def is_complete(volume):
        paths = [storage.join(folder, name) for name in volumes.names(*volume)]
        if not all(map(storage.exists, paths)):
            return False
        if storage.is_remote(folder):
            return not drawn & {*slices[volume]}
        masks = [os.path.join(folder, files.result_names(cases.cases[i].name, 0)[-1]) for i in slices[volume]]
        return min(map(os.path.getmtime, paths)) >= max(map(os.path.getmtime, masks))

    left = [volume for volume in slices if not is_complete(volume)]
    while left:
        for volume in [*left]:
            if not shared.take_lease(volume[0]):
                continue
            left.remove(volume)
            try:
                if storage.is_remote(folder) or not is_complete(volume):
                    volumes.write_volume(folder, volume[0], [
                        (cases.facts(i).info, volumes.read_masks(folder, cases.cases[i].name, args.num_ensemble))
                        for i in slices[volume]])
            except volumes.NoGeometry as error:
                problems.append(str(error))
            finally:
                shared.leases.give_back(shared.path(volume[0]))
        if left:
            shared.wait()
            left = [volume for volume in left if not is_complete(volume)]
    return problems


class Scores:
    """The scores of all cases, brought together by one of the processes that have drawn them.

    :param volumes: for those of whole volumes, too. find: find_masks of a case by its number.
    """

    def __init__(self, folder: str, cases: SegmentationCases, evaluation: Evaluation, volumes: VolumeScores | None,
                 find: Callable[[int], bool | tuple[Case, np.ndarray]]):
        self.folder, self.cases, self.evaluation, self.volumes, self.find = folder, cases, evaluation, volumes, find
        self.path = storage.join(folder, "scores.json")
        self.before = self._written()

    def _written(self):
        if not storage.exists(self.path):
            return None
        return storage.read_bytes(self.path) if storage.is_remote(self.path) else os.stat(self.path).st_mtime_ns

    def by_another(self) -> bool:
        """Whether another process has written them, since this one started."""
        return self._written() != self.before

    def write(self, shared: SharedCases, complete: bool) -> dict[str, Any]:
        """Write the scores, unless another process does; returns their summary.

        :param complete: whether no case is left out; then the masks are kept no longer.
        """
        while not self.by_another():
            if not shared.take_lease("scores"):
                shared.wait()
                continue
            try:
                if not self.by_another():
                    return self._bring_together(complete)
            finally:
                shared.leases.give_back(shared.path("scores"))
        return json.loads(storage.read_bytes(self.path))

    def _bring_together(self, complete):
        known = {row.case for row in self.evaluation.rows}
        names = {self.cases.cases[i].name: i for i in range(len(self.cases)) if i not in self.cases.problems}
        for name, i in names.items():
            if name not in known and not self.evaluation.add_state(files.kept_scores(self.folder, name)):
                case, masks = self.find(i)
                self.evaluation.add(*case, masks)
        for name in self.evaluation.sort():
            case, masks = self.find(names[name])
            self.evaluation.show(*case, masks)
        whole = self._of_volumes(names) if self.volumes else None
        summary = self.evaluation.write(self.folder, whole)
        for name in names if complete else ():
            with contextlib.suppress(OSError):
                storage.remove(files.kept_file(self.folder, name))
        return summary

    def _of_volumes(self, names):
        """Score the volumes of these cases, {name: number}, from the masks that are kept."""
        for group in by_volume([self.cases.cases[i] for i in names.values()], self.volumes.places):
            for name in [case.name for case in group if case.name in self.volumes.places]:
                case, masks = self.find(names[name])
                self.volumes.add(name, self.evaluation.patient_of(name), case.raters, masks)
        self.volumes.finish()
        return self.volumes.write(self.folder, self.evaluation.names)


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
        formats = {kind for _, kind in cases.volumes}
        if not args.evaluate:
            volumes.refuse_missing_packages(formats)
        sizes = parse_ensemble_sizes(args.ensemble_sizes, args.num_ensemble, required="ensemble_sizes" in given)
        evaluation = Evaluation(sizes, args.seed, args.patient_pattern, dist_util.dev(), vars(args),
                                method.independent, known_patients(cases.cases, given)) if args.evaluate else None
        whole = VolumeScores(places_of(cases.cases), vars(args), dist_util.dev()) if args.volumes else None
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
    scores = Scores(folder, cases, evaluation, whole, look) if evaluation else None
    looked = progress(cases.readable(mine, look), "looking for masks", len(mine), "case", enabled=rank == 0,
                      leave=False)
    todo = sorted(sum(dist_util.all_gather_objects([i for i, found in looked if not found]), []))
    problems = shared_problems(cases)
    before = len(cases) - len(problems) - len(todo)

    def is_complete(i):
        if scores and scores.by_another():
            return True
        return any(found for _, found in cases.readable([i], look))

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
    share = -(-len(todo) // world_size)  # of this process, about
    announce_time(sampler, -(-share * args.num_ensemble // batch_size), blank)
    view = SamplingView(folder, vars(args), None if storage.is_remote(folder) else folder, share,
                        method.steps, enabled=rank == 0)
    start = time.perf_counter()
    dist_util.part()
    first = rank * len(todo) // world_size
    order = {i: cases.cases[i].name for i in (*todo[first:], *todo[:first])}
    shared = SharedCases(folder, order, is_complete, args.dist_timeout, files.digest_of(
        settings[0], num_ensemble=args.num_ensemble, evaluate=args.evaluate))
    with shared, files.BackgroundWriter() as write, \
            progress(desc="sampling", total=share * args.num_ensemble, unit="mask", enabled=rank == 0) as bar:
        def on_step(members, x, x_start):
            bar.update(len(set(members)) / method.steps)
            view.on_step(members, x, x_start)

        def begun():
            for i in shared.take():
                try:
                    case, ways[case.name] = cases[i], (i, cases.whole(i), cases.fitting(i))
                except InputError as error:
                    cases.problems[i] = str(error)
                    shared.drop(i)
                    continue
                view.begin(case)
                yield case

        ways = {}
        while shared.left:
            for case, samples in sampler.ensembles(begun(), args.num_ensemble, on_step):
                i, whole, fitting = ways.pop(case.name)
                fingerprint = files.fingerprint(case, **settings[0])
                samples = fitting.back(samples)
                masks = to_masks(samples, args.median_blur)
                if evaluation:
                    evaluation.add(*whole, masks)
                    written = partial(files.keep_masks, folder, whole.name, masks, fingerprint, evaluation.state())
                else:
                    written = partial(files.write_case, folder, whole, samples, masks, fingerprint, method.independent)
                write(shared.finish, i, written)
                view.show_case(whole, masks)
            write.wait()
            if shared.left:
                shared.wait()
        view.close()
        unplaced = [] if evaluation else write_volumes(cases, {*todo}, args, folder, shared)
        problems = [cases.problems[i] for i in sorted(cases.problems)]
        after = len(cases) - len(problems)
        scored = scores.write(shared, complete=not problems) if evaluation and after else None
        shared.clean(name for i, case in enumerate(cases.cases) if i not in cases.problems
                     for name in filter(None, (case.name, cases.volumes[i][0])))

    if rank > 0:  # one of each launch says what has become of it
        return
    for problem in unplaced:
        logger.log(problem)
    seconds, drawn = time.perf_counter() - start, (after - before) * args.num_ensemble
    done = f"{after - before} cases, {drawn} masks" + (f", {seconds / drawn:.3g} seconds per mask" if drawn else "")
    if evaluation:
        logger.log(done)
        if after:
            logger.log(report(scored, folder))
    elif after:
        logger.log(what_is_where(args, folder, done, formats))
    others = f"all other cases ({after}) are complete in {folder}"
    if len(problems) == 1:
        problems = [f"{problems[0]}; {others}"]
    raise_problems(problems, f"{args.data_dir}; {others}")


def run() -> None:
    run_script(main)
