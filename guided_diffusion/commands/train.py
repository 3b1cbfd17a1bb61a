"""Train a diffusion model that draws as many plausible expert outlines of a scan as you ask for.

Alone, or on several GPUs:

    python scripts/segmentation_train.py --data_dir ./data/training --image_size 128 --max_steps 1000 ...
    python scripts/segmentation_train.py --ngpu 2 ...

Running the same command again goes on where it stopped. Ctrl-C, SIGTERM and SIGUSR1 save before they leave, with exit
code 128 + the number of the signal.
"""

import contextlib
import os
import shlex
import sys
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .. import checkpoint, dist_util, logger
from ..data import manifest
from ..data.augment import parse_kinds
from ..data.cases import SegmentationCases, count_channels
from ..data.readers.base import refuse_unused
from ..data.stream import ShuffledCases
from ..flags import (
    apply_stored_flags,
    check_stored_flags,
    default,
    differing,
    fill_flags,
    identity_flags,
    idle_flags,
    settle,
    stored_flags,
)
from ..live.views import TrainingView
from ..methods import METHODS
from ..methods.base import Method
from ..nn import compile_network
from ..pretrained import path_of
from ..script_util import autocast_dtype, create_method, drawing_flags
from ..system import storage
from ..system.errors import InputError
from ..system.terminal import summary
from ..train_util import TrainLoop
from ..training.best import Best
from ..training.ownership import Ownership
from ..training.resume import Checkpoints, resume, start_from
from ..training.settings import Settings
from ..training.validation import SHOWN, Validation
from ..training.watch import BadSteps, RanksWatched
from .cli import results_folder, run_script, start_script
from .program import command


def main() -> None:
    with contextlib.ExitStack() as held:
        stopped_by = train(held)
    if stopped_by:
        dist_util.cleanup()
        sys.exit(128 + stopped_by)


def train(held: contextlib.ExitStack) -> int | None:
    """Train; returns the signal that ended it. What this process `held` is given back by the caller."""
    args, given = start_script("training", __doc__)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    with dist_util.all_ranks_or_none():
        if 0 < args.global_batch < dist_util.world_size():
            raise InputError(f"--global_batch {args.global_batch}: is less than an example for each of the"
                             f" {dist_util.world_size()} processes; give more, or start fewer")
        refuse_to_share_out(args)
        folder = results_folder(args)
        resume_from, stored, passed_over = find_run(args, folder)
    dist_util.refuse_unlike({"the checkpoint to go on from": str(resume_from and os.path.basename(resume_from))},
                            f"--results_dir {folder} must be the same folder for every process")
    with dist_util.all_ranks_or_none():
        check_stored_flags(stored, storage.folder_of(resume_from) if resume_from else folder)
        if args.image_channels == "auto":
            args.image_channels = given["image_channels"] = dist_util.from_first_rank(
                lambda: count_channels(args.data_dir, options=vars(args)))
        refuse_another_run(args, given, stored, folder)
        apply_stored_flags(args, given, stored, storage.folder_of(resume_from) if resume_from else folder)
        init = path_of(args.init) if args.init and not resume_from else ""
        unlike = take_flags(args, given, init) if init else []
        dtype, augment = autocast_dtype(args), parse_kinds(args.augment)
        if "window" in given and args.fit != "tile":
            raise InputError(f"--window {args.window}: is for scans larger than --image_size with --fit tile; give"
                             f" that, too, or leave it away")
        window = args.window if args.fit == "tile" else None
        torch.manual_seed(args.seed)
        method = create_method(args)
        started = start(method, init, unlike) if init else ""
        if resume_from:  # once more below, with all that belongs to it; here so that a bad file leaves no trace
            checkpoint.load_model(method.model, resume_from, "--resume_checkpoint")
        if args.cache_dir:
            storage.make_folder(args.cache_dir, "--cache_dir")
    first = dist_util.rank() == 0
    read = partial(SegmentationCases, image_size=args.image_size, image_channels=args.image_channels, fit=args.fit,
                   progress=first, together=True, cache_dir=args.cache_dir, options=vars(args))
    held_out = read(args.val_dir, flag="--val_dir") if args.val_dir else None
    cases = read(args.data_dir)
    if held_out:
        dist_util.from_first_rank(
            lambda: manifest.refuse_shared(cases.cases, held_out.cases, args.data_dir, args.val_dir))
    with dist_util.all_ranks_or_none():
        refuse_unused(vars(args), cases.readers_used | (held_out.readers_used if held_out else set()), args.data_dir)
        storage.make_folder(folder)
        owned = [held.enter_context(Ownership(folder, args.dist_timeout))] if first else []
        storage.remove_partial(folder)

    logger.configure(local_folder(folder), enabled=first,
                     last_step=resume_from and checkpoint.step_of(resume_from) or 0)
    world_size = dist_util.world_size()
    logger.log("command:", shlex.join(sys.argv))
    for problem in passed_over:
        logger.log(f"passed over: {problem}")
    if started:
        logger.log(started)
    network = "U-Net" if args.network == "unet" else args.network
    logger.log(f"{len(cases)} cases from {args.data_dir}, {cases.kept}; {network} of {count(method.model):.1f} million"
               f" parameters; {world_size} process(es) on {dist_util.dev()}")

    validation = make_validation(args, cases, held_out, dtype) if args.sample_interval else None
    checkpoints = Checkpoints(folder, args.save_interval, args.keep_checkpoints, args.save_patience)
    held.callback(checkpoints.saver.finish)
    examples = ShuffledCases(cases, args.seed, augment, window)
    loop = TrainLoop(method if args.shard else method.to(dist_util.dev()), examples, Settings.from_flags(args, dtype), [
        RanksWatched(), *owned, BadSteps(args.max_bad_steps), *filter(None, [validation]), Best(folder),
        checkpoints])
    logger.log(what_a_step_takes(loop))
    if resume_from:
        with dist_util.all_ranks_or_none():
            resume(loop, resume_from, same_run=not args.resume_checkpoint)
    if first:
        checkpoint.save_flags(folder, stored_flags(args))
    view = TrainingView(folder, vars(args), local_folder(folder), loop.end, loop.global_batch, method.loss_names,
                        method.parts, method.parts_are, validation.cases if validation else (), enabled=first)
    loop.callbacks.append(view)

    if validation:
        announce_drawing(validation, loop)
    if args.compile:
        compile_network(method.model, dist_util.dev())
    try:
        stopped_by = loop.run_loop()
    finally:
        view.close()
    logger.log(what_is_where(args, folder, loop))
    logger.close()
    return stopped_by


def refuse_to_share_out(args: SimpleNamespace) -> None:
    """:raises InputError: if --shard True cannot be done."""
    ranks = dist_util.world_size()
    for impossible, why in (
            (ranks == 1, "there is one process, which holds all of the model; start several (--ngpu, or a launcher), or"
                         " leave it away: checkpoints are the same"),
            (args.optimizer == "muon", "--optimizer muon makes steps of whole matrices, of which each process would"
                                       " hold a part; give --optimizer adamw"),
            (args.compile, "was not made to work with --compile True; leave one of them away"),
            (args.global_batch % ranks, f"all {ranks} processes must see as many examples a step, but --global_batch is"
                                        f" {args.global_batch}; give a multiple of {ranks}")):
        if args.shard and impossible:
            raise InputError(f"--shard True: {why}")


def make_validation(args: SimpleNamespace, cases: SegmentationCases, held_out: SegmentationCases | None,
                    dtype: torch.dtype | None) -> Validation:
    """The cases to draw while training: some of --val_dir, which are scored, else of the training cases."""
    flags = drawing_flags(args, **METHODS[args.method].quick_flags(args))
    return Validation(held_out or cases, lambda network: create_method(flags, network, training=False), dtype,
                      args.val_cases if held_out else SHOWN, args.seed, args.sample_interval, scored=bool(held_out),
                      window=args.window if args.fit == "tile" else None)


def what_a_step_takes(loop: TrainLoop) -> str:
    """The batches and the learning rate of a step, in words."""
    settings, processes = loop.settings, dist_util.world_size()
    shares = sorted({loop.global_batch // processes, -(-loop.global_batch // processes)})
    words = [f"batch size {settings.batch_size} per process"]
    if shares != [settings.batch_size]:
        words.append(f"{' or '.join(map(str, shares))} examples of each process a step, in parts of at most"
                     f" {loop.microbatch}")
    words.append(f"{loop.global_batch} in all")
    if settings.lr_scaling != "none":
        words.append(f"the learning rate of {settings.lr:g} for {settings.lr_base_batch} is {loop.lr:g}"
                     f" ({settings.lr_scaling})")
    if settings.wire_dtype == "bfloat16":
        words.append("gradients sent as bfloat16" if processes > 1 else
                     "--wire_dtype has no effect, since one process sends no gradients")
    return ", ".join(words)


def announce_drawing(validation: Validation, loop: TrainLoop) -> None:
    """Say so if a large part of the time will go into drawing the validation cases."""
    cost, cases = validation.method(loop.method.model).cost, len(validation.cases)
    calls = cases * (cost.scan + validation.members * cost.mask)
    learning = 3 * validation.interval * loop.global_batch  # a backward pass takes twice as long as a forward pass
    if calls > learning / 3:
        logger.log(f"drawing the {cases} {validation.name} takes {calls:,} network calls every {validation.interval}"
                   f" steps, about {100 * calls / (calls + learning):.0f} % of the time; a longer --sample_interval"
                   f"{' or fewer --val_cases' if validation.scored else ''} would save it")


def what_is_where(args: SimpleNamespace, folder: str, loop: TrainLoop) -> str:
    """What training has left, and the command that samples from it."""
    rate, averaged = loop.rate_to_use()
    chosen = checkpoint.ema_name(rate, loop.step) if averaged else checkpoint.NEWEST
    best, rows = storage.join(folder, checkpoint.BEST), []
    with contextlib.suppress(InputError):  # another program may have spoilt it
        if args.val_dir and storage.exists(best) and (facts := checkpoint.best_facts(best)):
            chosen, rows = checkpoint.BEST, [(f"best on --val_dir, step {facts['step']}", best)]
    rows = [*rows, ("weights", storage.join(folder, checkpoint.NEWEST)),
            *((f"averaged at {rate}", storage.join(folder, checkpoint.ema_name(rate, loop.step))) for rate in loop.ema),
            *((what, os.path.join(local_folder(folder) or "", name)) for what, name in (
                ("losses and scores", "progress.png"), ("cases drawn", "panel.png"), ("numbers", "progress.csv"),
                ("live view, to replay", "visdom.log")))]
    rows = [(what, path) for what, path in rows if storage.exists(path)]
    beside = os.path.join(os.path.dirname(os.path.abspath(args.data_dir)), "testing")
    scans = args.val_dir or (os.path.relpath(beside) if os.path.isdir(beside) else args.data_dir)
    flags = ["--data_dir", scans, "--model_path", storage.join(folder, chosen), "--results_dir", folder,
             "--num_ensemble", "16", "--batch_size", "auto"]
    if "sampler" in METHODS[args.method].quick_flags(args):
        flags += ["--sampler", METHODS[args.method].quick_flags(args)["sampler"]]
    for name in ("fit", "plugin"):
        if getattr(args, name) != default("files and processes", name):
            flags += [f"--{name}", getattr(args, name)]
    return summary(f"trained to step {loop.step}", rows, command("segmentation_sample.py", flags))


def find_run(args: SimpleNamespace, folder: str) -> tuple[str | None, dict[str, Any], list[str]]:
    """The checkpoint to go on from (None: start anew), the flags beside it, and what is wrong with newer ones."""
    if args.resume_checkpoint == "auto":
        args.resume_checkpoint = ""
    if args.resume_checkpoint and args.init:
        raise InputError("--resume_checkpoint and --init: choose one; the first goes on with a run, the second starts a"
                         " new one from its weights")
    if os.path.basename(args.resume_checkpoint) == checkpoint.BEST:
        raise InputError(f"--resume_checkpoint {args.resume_checkpoint}: holds weights to sample from, not all that"
                         f" going on needs; name a savedmodel<step>.pt, or start a new run with --init")
    if args.resume_checkpoint:
        return args.resume_checkpoint, checkpoint.flags_of(args.resume_checkpoint)[0], []
    steps, problems = checkpoint.steps_in(folder), []
    for step in reversed(steps):
        found = checkpoint.damages(folder, step)
        if not found:
            return storage.join(folder, checkpoint.model_name(step)), checkpoint.load_flags(folder), problems
        problems += found
    if steps:
        raise InputError(f"{folder} holds no whole checkpoint to go on from; start afresh in another --results_dir:\n"
                         + "\n".join(problems))
    return None, {}, []


def refuse_another_run(args: SimpleNamespace, given: dict[str, Any], stored: dict[str, Any], folder: str) -> None:
    """InputError if the run in a folder, with these stored flags, is not the one that the flags describe."""
    if args.resume_checkpoint:
        return
    out = {*idle_flags(args)}
    if args.init:  # flags of the model that are left away are those that the run took from beside these weights
        out |= {flag.name for flag in identity_flags()} - given.keys()
    chosen = {name: value for name, value in vars(args).items() if name not in out}
    if clash := differing(chosen, stored, "seed", "timestep_respacing", "init", "optimizer"):
        raise InputError(f"{', '.join(clash)}: not what the run in {folder} was started with; give the same flags"
                         f" to go on with it, or another --results_dir to start afresh")


def take_flags(args: SimpleNamespace, given: dict[str, Any], path: str) -> list[str]:
    """Take the flags of the model that were not given from those stored beside the weights of --init.

    :returns: those that were given otherwise than stored, for a message.
    """
    stored, where = checkpoint.flags_of(path)
    check_stored_flags(stored, where)
    fill_flags(args, given, stored)
    settle(args, given)
    return differing(given, stored)


def start(method: Method, path: str, unlike: list[str]) -> str:
    """Start from the weights of --init; returns what was taken in words. `unlike`: flags unlike those stored there."""
    otherwise = f" (flags unlike those of --init: {', '.join(unlike)})" if unlike else ""
    try:
        return start_from(method, path) + otherwise
    except InputError as error:
        raise InputError(f"{error}{otherwise}") from None


def local_folder(folder: str) -> str | None:
    """Where the log goes: beside the checkpoints, or to $OPENAI_LOGDIR if those go to a bucket; None for nowhere."""
    return os.environ.get("OPENAI_LOGDIR") if storage.is_remote(folder) else folder


def count(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def run() -> None:
    run_script(main)
