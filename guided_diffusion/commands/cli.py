"""The command line of the scripts: reading flags, and ending well when they are wrong."""

import argparse
import difflib
import hashlib
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy as np
import torch

from .. import __version__, dist_util
from ..flags import FLAGS, defaults, identity_flags, idle_flags, load_plugins, settle
from ..live.client import split_address
from ..methods import METHODS
from ..metrics import SCORES
from ..presets import PRESETS
from ..system import storage
from ..system.errors import InputError
from ..system.flag import Flag, check_value, parse_numbers, several
from ..system.launchers import launch_rank
from ..system.terminal import program_name
from .program import add_version, again, as_called

# the groups of flags that a script takes
JOBS = {
    "training": ("model", "encoders", "diffusion", "method", "training", "reading", "speed", "files and processes",
                 "results", "visdom", "server"),
    "sampling": ("model", "diffusion", "method", "sampling", "reading", "scoring", "speed", "files and processes",
                 "results", "visdom", "server"),
    "evaluation": ("evaluation", "reading", "scoring", "files and processes"),
    "replay": ("replay", "server"),
    "export": ("export", "model", "diffusion", "method"),
}
_WORDS = {  # what is given without a flag: its name, how many (None: one), what --help calls it and says of it
    "evaluation": (("folders", "*", "FOLDER", "the --samples_dir, or two of them, to be compared"),),
    "export": (("checkpoint", None, "CHECKPOINT",
                "savedmodel*.pt, emasavedmodel*.pt, or weights of the published code"),
               ("output", None, "OUT.safetensors", "the file to write; its SHA-256 goes beside it, to OUT.sha256")),
}
_OLD_NAMES = {"evaluation": {"num_samples": "ensemble_sizes"}}  # still taken, but not in --help
_GROUP_TITLES = {
    "model": "the network", "reading": "reading files", "encoders": "AMN and ACN, the encoders of the ambiguity loss",
    "diffusion": "the diffusion process", "visdom": "the live view", "server": "the live view",
    "scoring": "scores (when sampling: with --evaluate True)",
}


class Parser(argparse.ArgumentParser):
    """What is wrong with a command line is an InputError."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Leaves descriptions as they are, and flags room."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=34, width=110)


def _boolean(text):
    if text.lower() in ("true", "t", "yes", "y", "1"):
        return True
    if text.lower() in ("false", "f", "no", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def _parser(job, description):
    words = _WORDS.get(job, ())
    usage = " ".join(["%(prog)s", *(f"[{shown} ...]" if count else shown for _, count, shown, _ in words),
                      "[--flag VALUE ...]"])
    parser = Parser(program_name(), description=as_called(description), formatter_class=HelpFormatter,
                     allow_abbrev=False, usage=usage)
    add_version(parser)
    for name, count, shown, help in words:
        parser.add_argument(name, metavar=shown, help=help, nargs=count, default=argparse.SUPPRESS)
    groups = {}
    for flag in sorted(FLAGS, key=lambda flag: [*JOBS[job], flag.group].index(flag.group)):
        if flag.group not in JOBS[job]:
            continue
        title = _GROUP_TITLES.get(flag.group, flag.group)
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        add_flag(groups[title], flag)
    for old in _OLD_NAMES.get(job, ()):
        parser.add_argument("--" + old, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    if "scoring" in JOBS[job]:
        words = (textwrap.wrap(f"{name}: {score.help}", 106, subsequent_indent="  ")
                 for name, score in SCORES.entries.items())
        parser.add_argument_group("what the scores say", "\n".join(sum(words, [])))
    return parser


def add_flag(parser: argparse.ArgumentParser | argparse._ArgumentGroup, flag: Flag) -> None:
    """Let a parser, or a group of one, take a flag; it leaves nothing where the flag is not given."""
    words = f": {flag.type.words()}" if hasattr(flag.type, "words") else ""
    options = {"default": argparse.SUPPRESS, "help": (flag.help + words).replace("%", "%%")}
    if flag.default not in ("", None, []):
        options["help"] += f" (default: {flag.default})"
    if flag.choices:
        options["choices"] = flag.choices
    else:
        options["type"] = _boolean if flag.type is bool else flag.type
        options["metavar"] = {int: "N", float: "X", bool: "BOOL"}.get(flag.type, "TEXT")
    if flag.type is several:
        options["nargs"] = "+"
    names = ["--local_rank", "--local-rank"] if flag.name == "local_rank" else ["--" + flag.name]
    parser.add_argument(*names, **options)


def parse_flags(job: str, description: str, argv: Sequence[str] | None = None
                ) -> tuple[SimpleNamespace, dict[str, Any]]:
    """Read the command line of a script.

    :param job: one of JOBS.
    :returns: all flags as a namespace, and the dict of those that were given.
    :raises InputError: for a flag that does not exist, naming the nearest that does, or a bad value.
    """
    plugins = Parser(add_help=False, allow_abbrev=False)
    plugins.add_argument("--plugin", default="")
    load_plugins(plugins.parse_known_args(argv)[0].plugin)  # first, since they bring flags and choices
    parser = _parser(job, description)
    known, unknown = parser.parse_known_intermixed_args(argv)
    refuse_unknown(parser, unknown)
    given = vars(known)
    if given.get("preset"):
        given = _with_preset(given, vars(parser.parse_args(PRESETS[given["preset"]].split())), defaults(*JOBS[job]))
    for old, new in _OLD_NAMES.get(job, {}).items():
        if old in given and new in given:
            raise InputError(f"--{old} is the old name of --{new}: give one of them")
        if old in given:
            given[new] = given.pop(old)
    args = SimpleNamespace(**{**defaults(*JOBS[job]), **given})
    if job == "evaluation":
        _settle_folders(args, given)
    _check_ranges(job, args, given)
    if "visdom" in JOBS[job]:
        args.visdom = _view(args, given)
    return args, given


def refuse_unknown(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> None:
    """InputError if a parser did not know some words, naming the flag that is nearest to the first."""
    if unknown:
        word = unknown[0].split("=")[0]
        flags = [option for action in parser._actions if action.help != argparse.SUPPRESS
                 for option in action.option_strings]
        near = difflib.get_close_matches(word, flags, 1, 0.6)
        raise InputError(f"unknown flag {word}" + (f"; did you mean {near[0]}?" if near else "; see --help"))


def _with_preset(given, preset, others):
    """Flags that were given, with those of their preset that have an effect beside them.

    InputError if one that says what the model is was given otherwise than the preset has it.
    """
    clash = [f"--{flag.name} {given[flag.name]} (there: {preset[flag.name]})" for flag in identity_flags()
             if flag.name in preset and given.get(flag.name, preset[flag.name]) != preset[flag.name]]
    if clash:
        raise InputError(f"--preset {given['preset']} and {', '.join(clash)}: choose one; only how it is trained, not"
                         f" what the model is, may differ from a preset")
    idle = idle_flags(SimpleNamespace(**{**others, **preset, **given}))
    return {**{name: value for name, value in preset.items() if name not in idle}, **given}


def start_script(job: str, description: str) -> tuple[SimpleNamespace, dict[str, Any]]:
    """Read the command line of a script and join the processes that the launcher started, with the same flags.

    Returns as parse_flags does.
    """
    args, given, problem = SimpleNamespace(ngpu=0, local_rank=None, dist_timeout=600.0), {}, None
    try:
        args, given = parse_flags(job, description)
    except InputError as error:
        problem = error
    dist_util.setup_dist(args.ngpu, args.local_rank, args.dist_timeout, again(), apart=job == "sampling")
    with dist_util.all_ranks_or_none():
        if problem:
            raise problem
    if dist_util.world_size() > 1:
        dist_util.refuse_unlike(installation(getattr(args, "plugin", "")), "give every process the same installation")
        dist_util.refuse_unlike({f"--{name}": str(value) for name, value in vars(args).items() if name != "local_rank"},
                                "give every process the same flags")
    return args, given


def installation(plugins: str = "") -> dict[str, str]:
    """What this process runs, by name: versions, and digests of the code of this package and of --plugin."""
    code = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        code.update(repr((path.relative_to(root).as_posix(), path.read_bytes())).encode())
    own = hashlib.sha256(b"".join(Path(path).read_bytes() for path in filter(None, plugins.split(","))))
    return {"torch": str(torch.__version__), "numpy": np.__version__, "guided_diffusion": __version__,
            "code of guided_diffusion": code.hexdigest()[:12], "code of --plugin": own.hexdigest()[:12]}


def _check_ranges(job, args, given):
    values = vars(args)
    for flag in FLAGS:
        if flag.group in JOBS[job] and flag.name in given:
            check_value(flag, given[flag.name], f"--{flag.name}")
    if values.get("median_blur") and values["median_blur"] % 2 == 0:
        raise InputError(f"--median_blur {args.median_blur}: must be odd, or 0 for no filter")
    if "method" in values:
        settle(args, {name: value for name, value in given.items() if not _is_early(job, name, args, given)})
    if "fp16_scale_growth" in given and not args.use_fp16 and given["fp16_scale_growth"] != defaults(
            "training")["fp16_scale_growth"]:
        raise InputError(f"--fp16_scale_growth {args.fp16_scale_growth}: only --use_fp16 True scales the loss; give"
                         f" that, or leave it away")
    if job == "sampling":
        unused = [f"--{flag.name}" for flag in FLAGS if flag.group == "scoring" and flag.name in given]
        if unused and not args.evaluate:
            raise InputError(f"{', '.join(unused)}: for scores only; give --evaluate True, too")
    if values.get("image_channels") == "auto" and job != "training":
        raise InputError("--image_channels auto: is found from the data of training; leave it away")
    if values.get("dropout", 0) >= 1:
        raise InputError(f"--dropout {args.dropout}: must be below 1")
    if values.get("fp16_scale_growth", 1) <= 0:
        raise InputError(f"--fp16_scale_growth {args.fp16_scale_growth}: must be above 0")
    if values.get("microbatch", -1) != -1 and values["microbatch"] < 1:
        raise InputError(f"--microbatch {args.microbatch}: must be at least 1, or -1 for whole batches")
    if values.get("global_batch") and args.grad_accumulation != 1:
        raise InputError(f"--global_batch {args.global_batch} and --grad_accumulation {args.grad_accumulation}: choose"
                         f" one; the first takes as many batches as it needs")
    if "lr_scaling" in values and (args.lr_scaling == "none") != (args.lr_base_batch == 0):
        raise InputError(f"--lr_scaling {args.lr_scaling} and --lr_base_batch {args.lr_base_batch}: give both, the rule"
                         f" and the examples a step that --lr is meant for, or neither")
    if values.get("class_cond"):
        raise InputError("--class_cond True: cases hold no class labels; use create_model(class_cond=True) from Python")
    if values.get("visdom_server"):
        split_address(args.visdom_server, args.visdom_port)
        if args.visdom == "start":
            raise InputError("--visdom start and --visdom_server: choose one; a server is started on this machine only")
    if values.get("val_dir") and not args.sample_interval:
        raise InputError("--val_dir with --sample_interval 0: its cases would never be drawn")
    if "val_cases" in given and not values.get("val_dir"):
        raise InputError("--val_cases: counts cases of --val_dir; give that, too")
    if values.get("use_fp16") and values.get("use_bf16"):
        raise InputError("--use_fp16 and --use_bf16: choose one")
    if "ema_rate" in values:
        rates = parse_numbers(float, args.ema_rate, "ema_rate")
        if not rates or not all(0 <= rate < 1 for rate in rates):
            raise InputError(f"--ema_rate {args.ema_rate}: every rate must be at least 0 and below 1")


def _is_early(job, name, args, given):
    """Whether a flag is of another method, which the flags stored with the weights may still turn out to name; sampling
    and --init settle all flags again when they have read them."""
    owners = METHODS.owners(name)
    reads_weights = job == "sampling" or bool(given.get("init"))
    return reads_weights and "method" not in given and bool(owners) and args.method not in owners


def _settle_folders(args, given):
    """Bring the folders that were named without a flag, [] for none, into agreement with --samples_dir."""
    args.folders = given.get("folders", [])
    if args.folders and "samples_dir" in given:
        raise InputError(f"--samples_dir {args.samples_dir} and {args.folders[0]}: name the folders to score or compare"
                         f" once, as in {program_name()} A B")
    if len(args.folders) > 2:
        raise InputError(f"{' '.join(args.folders)}: one folder is scored, or two are compared; name no more")
    if len(args.folders) == 1:
        args.samples_dir, = args.folders


def _view(args, given):
    """Whether to draw on a Visdom server, off, connect or start: what --visdom says; else a server or a port that was
    given asks to connect, but port 0 does not."""
    asks = [f"--{name} {given[name]}" for name in ("visdom_server", "visdom_port") if given.get(name)]
    if "visdom" in given:
        if given["visdom"] == "off" and asks:
            raise InputError(f"--visdom off and {asks[0]}: choose one")
        if given["visdom"] != "off" and not args.visdom_port:
            raise InputError(f"--visdom {given['visdom']} and --visdom_port 0: choose one")
    elif args.visdom_server and not args.visdom_port:
        raise InputError(f"--visdom_server {args.visdom_server} and --visdom_port 0: choose one")
    return given.get("visdom", "connect" if asks else "off")


def results_folder(args: SimpleNamespace) -> str:
    """The folder to write to: --results_dir, else $OPENAI_LOGDIR, else ./results.

    :raises InputError: if it is plain beforehand that nothing can be written there. Creates nothing.
    """
    folder = args.results_dir or os.environ.get("OPENAI_LOGDIR") or "./results"
    if not storage.is_remote(folder):
        parent = os.path.abspath(folder)
        while not os.path.exists(parent):
            parent = os.path.dirname(parent)
        if not os.path.isdir(parent) or not os.access(parent, os.W_OK):
            raise InputError(f"--results_dir {folder}: cannot be written; give another folder")
    return folder


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main(); an InputError becomes one line on stderr and exit code 2."""
    try:
        main()
    except InputError as error:
        if launch_rank() == 0 or not error.on_every_rank:
            print(f"{program_name()}: error: {error}", file=sys.stderr, flush=True)
        dist_util.cleanup(failed=not error.on_every_rank)
        sys.exit(2)
    except RuntimeError:
        if not dist_util.run_has_ended():
            raise
        dist_util.cleanup()  # the watch then ends this process at once: leaving in order, gloo aborts at times
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    dist_util.cleanup()
