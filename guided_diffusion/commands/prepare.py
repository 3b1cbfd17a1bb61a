"""Bring data into the folders that training, sampling and scoring read; or check such folders.

    python scripts/prepare_data.py KIND INPUT OUT --split 60:20:20

Each case becomes a folder with an image and one mask a rater. Beside them lie manifest.csv (what is known of each
case), split.json, and left_out.csv (what became no case, and why). The same command again goes on where it was stopped.
`python scripts/prepare_data.py KIND --help` says what is read, and what further flags there are.
"""

import argparse
import inspect
import os
import shutil
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from ..flags import FLAGS, load_plugins
from ..prepare import SOURCES
from ..prepare.folder import LEFT_OUT, SPLIT
from ..prepare.runner import SAMPLE, Job, Outcome, estimate, pieces, prepare, said
from ..scoring import contents
from ..system.errors import InputError
from ..system.flag import Flag, check_value
from ..system.terminal import program_name, summary
from .cli import HelpFormatter, Parser, add_flag, refuse_unknown, run_script
from .program import add_version, as_called, command

CHECK = "check"
_COMMON = [
    Flag("split", str, "", "shares of train, val and test, as in 60:20:20, drawn at random by patient, or by series"
         " where the source knows no patients; the cases then lie in OUT/train, OUT/val and OUT/test", "the split"),
    Flag("folds", int, 0, "parts of equal size for cross-validation: train on OUT/without_fold1, validate on OUT/fold1,"
         " and so on (0: none)", "the split", least=0, most=1000),
    Flag("seed", int, 0, "of the split", "the split", least=0),
    Flag("num_workers", int, 0, "processes to work in (0: one a processor core)", "running", least=0, most=1024),
    Flag("dry_run", bool, False, f"say what would be written, and how much disk it takes, from a sample of {SAMPLE}"
         " files or series", "running"),
]
_PLUGIN = Flag("plugin", str, "", "Python file, or several with commas, with sources or readers of your own, see"
               " docs/extending.md", "running")
_CHECK_WORDS = "what is in a data set, and what is wrong with it: a table, and a page of pictures"
_CHECK_HELP = """Reads any folder that training reads, or one that holds such folders (train, val, test; training,
testing; fold1, ...), and says what is in each and what is wrong: numbers of cases, patients and raters, sizes, grey
values, areas, how far raters agree, the best GED that a model can reach, files that cannot be read, patients and
pictures on both sides of a split. OUT gets check.png, check.csv (a row a case) and check.json."""


def create_argparser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and those of each KIND."""
    parser = Parser(program_name(), description=as_called(__doc__), formatter_class=HelpFormatter, allow_abbrev=False)
    add_version(parser)
    add_flag(parser, _PLUGIN)
    kinds = parser.add_subparsers(title="KIND, one of", dest="kind", metavar="KIND", required=True, parser_class=Parser)
    parsers = {}
    for name, entry in SOURCES.entries.items():
        about = inspect.cleandoc(entry.value.__doc__ or "").split("\n\n")[0].split(":param")[0]
        example = entry.value.example and f"\n\n    {program_name()} {name} {entry.value.example}"
        parsers[name] = _kind_parser(kinds, name, entry.help, about + example, [*entry.flags, *_COMMON, _PLUGIN])
    reading = [flag for flag in FLAGS if flag.group == "reading" or flag.name == "patient_pattern"
               or flag.name in ("normalise", "context") and flag.group == "model"]
    example = f"\n\n    {program_name()} {CHECK} data results/check"
    parsers[CHECK] = _kind_parser(kinds, CHECK, _CHECK_WORDS, _CHECK_HELP + example, [*reading, _PLUGIN])
    return parser, parsers


def _kind_parser(kinds, name, help, description, flags):
    parser = kinds.add_parser(name, help=help, description=description, formatter_class=HelpFormatter,
                              allow_abbrev=False, usage="%(prog)s INPUT OUT [--flag VALUE ...]")
    parser.add_argument("input", metavar="INPUT", help="the file or folder to read")
    parser.add_argument("out", metavar="OUT", help="the folder to write; made if missing")
    groups = {}
    for flag in flags:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        add_flag(groups[flag.group], flag)
    parser.set_defaults(flags=flags)
    return parser


def parse(argv: Sequence[str] | None = None) -> SimpleNamespace:
    """The command line, with the defaults of the flags of its KIND.

    :raises InputError: for a flag that does not exist, or a bad value.
    """
    plugins = Parser(add_help=False, allow_abbrev=False)
    plugins.add_argument("--plugin", default="")
    load_plugins(plugins.parse_known_args(argv)[0].plugin)  # first, since they bring kinds and flags
    parser, parsers = create_argparser()
    known, unknown = parser.parse_known_args(argv)
    refuse_unknown(parsers[known.kind], unknown)
    given = vars(known)
    for flag in known.flags:
        if flag.name in given:
            check_value(flag, given[flag.name], f"--{flag.name}")
    args = SimpleNamespace(**{**{flag.name: flag.default for flag in known.flags}, **given})
    if "seed" in given and not (args.split or args.folds):
        raise InputError(f"--seed {args.seed}: only a split is drawn at random; give --split or --folds, or leave it"
                         f" away")
    return args


def job_of(args: SimpleNamespace) -> Job:
    """What a command line asks to be prepared."""
    flags = {flag.name: getattr(args, flag.name) for flag in SOURCES.entries[args.kind].flags}
    path = Path(args.input)
    if not path.exists():
        raise InputError(f"INPUT {path}: no such file or folder")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Job(args.kind, path, flags, [*filter(None, args.plugin.split(","))], args.split, args.folds, args.seed,
               args.num_workers or cores)


def report(outcome: Outcome, args: SimpleNamespace) -> str:
    """What was written, or would be."""
    about, rows = "about " if args.dry_run else "", []
    cases = outcome.cases if args.dry_run else len(outcome.rows)
    if outcome.parts:
        by = {"patient": "by patient", "series": "by series, since the source knows no patients",
              "case": "every case by itself, since nothing says whose it is"}[outcome.split_by]
        rows.append(("split", by))
        for part, (count, patients) in pieces(outcome).items():
            many = {"patient": "patients", "series": "series", "case": "cases"}[outcome.split_by]
            whole = args.dry_run or outcome.split_by == "case"
            rows.append((part, f"{patients} {many}" if whole else f"{count} cases of {patients} {many}"))
    elif outcome.split_by == "patient":
        rows.append(("patients", str(outcome.patients)))
    if args.dry_run:
        free = shutil.disk_usage(next(path for path in Path(args.out).absolute().parents if path.exists())).free
        rows += [("disk", f"about {outcome.size / 1e6:.3g} MB, of {free / 1e6:.0f} MB that are free"),
                 ("from a sample of", f"{min(SAMPLE, outcome.units)} of {outcome.units} units")]
        return summary(f"would write about {cases:.0f} cases to {args.out}", rows + _left_out(outcome, about))
    if outcome.done_before:
        rows.append(("done before", f"{outcome.done_before} of {outcome.units} units"))
    names = ["manifest.csv", *([SPLIT] if outcome.parts else []), LEFT_OUT]
    rows += [*_left_out(outcome, about), ("tables", ", ".join(os.path.join(args.out, name) for name in names))]
    return summary(f"{cases} cases in {args.out}", rows,
                   command("prepare_data.py", [CHECK, args.out, os.path.join("results", "check")]))


def _left_out(outcome, about):
    """Lines of what became no case, the first ten in full."""
    shown = [("", textwrap.shorten(said(left), 300)) for left in outcome.left_out[:10]]
    more = [("", f"... and {len(outcome.left_out) - 10} more")] if outcome.left_out[10:] else []
    return [("left out", f"{about}{len(outcome.left_out)}"), *shown, *more] if outcome.left_out else []


def main() -> None:
    args = parse()
    if args.kind == CHECK:
        print(contents.check(Path(args.input), Path(args.out), vars(args)))
    elif args.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            print(report(estimate(job_of(args), Path(folder)), args))
    else:
        print(report(prepare(job_of(args), Path(args.out)), args))


def run() -> None:
    run_script(main)
