"""Score ensembles of masks against the masks of several raters.

    python scripts/segmentation_evaluate.py --data_dir ./data/testing --samples_dir ./results

Scores what segmentation_sample.py wrote, or any other model's masks: --pattern says how their files are called. Prints
a table and writes, into --output_dir:

    scores.csv   a row a case, a column a score
    scores.json  means over cases, with 95 % bootstrap intervals over patients
    scores.png   how the scores are distributed, whether the probabilities are right, GED against number of masks
    best.png     the cases with the lowest GED; worst.png: those with the highest
    scores_volumes.csv  with --volumes True: a row a volume, whose slices are scored as one
    report.html  all cases in one page, which needs no network: to sort, search and print; a click shows all masks

With two folders, as in segmentation_evaluate.py A B --data_dir ./data/testing, it prints how much each score of A is
above that of B, with intervals of the paired differences, and writes comparison.json if there is an --output_dir. Cases
that only one of them has are counted and left out.

Two predictors that need no model stand beside it: raters drawn with replacement from those of the case (about the best
that can be measured with so few raters) and the empty mask.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from .. import dist_util
from ..data import manifest
from ..data.case_files import CaseFiles, find_cases
from ..data.cases import read_ahead
from ..data.readers.base import Readers, refuse_unused
from ..scoring import comparison
from ..scoring.ensemble_folder import EnsembleFolder, read_scored_case
from ..scoring.evaluation import Evaluation, parse_ensemble_sizes, report
from ..scoring.volume_scores import VolumeScores, by_volume, places_of
from ..system import storage
from ..system.errors import InputError, raise_problems
from ..system.terminal import progress
from .cli import run_script, start_script


def score(args: SimpleNamespace, given: dict[str, Any]) -> None:
    """Score one folder, and write all about it."""
    folder = args.output_dir or args.samples_dir
    with dist_util.all_ranks_or_none():
        readers = Readers(vars(args))
        cases = find_cases(args.data_dir, readers=readers)
        refuse_unused(vars(args), readers.used(cases), args.data_dir)
        ensembles = EnsembleFolder(args.samples_dir, args.pattern)
        members = ensembles.find([case.name for case in cases], args.skip_missing)
        sizes = sizes_of(args, given, members)
        evaluation = Evaluation(sizes, args.seed, args.patient_pattern, dist_util.dev(), vars(args),
                                ensembles.independent(members), known_patients(cases, given))
        volumes = VolumeScores(places_of(cases), vars(args), dist_util.dev()) if args.volumes else None
        storage.make_folder(folder, "--output_dir")

    def read(case):
        return read_scored_case(case, members[case.name], args.fit, readers)

    def add(case, scored):
        evaluation.add(case.name, *scored)
        if volumes:
            volumes.add(case.name, evaluation.patient_of(case.name), *scored[1:])

    cases = [case for case in cases if case.name in members]
    each_case(by_volume(cases, volumes.places if volumes else {}), read, add, args.samples_dir)
    evaluation.gather()
    if volumes:
        volumes.gather()
    if dist_util.rank() == 0:
        whole = volumes.write(folder, evaluation.names) if volumes else None
        print(report(evaluation.write(folder, whole), folder))


def compare(args: SimpleNamespace, given: dict[str, Any]) -> None:
    """Score two folders case by case, and say how they differ."""
    with dist_util.all_ranks_or_none():
        readers = Readers(vars(args))
        cases = find_cases(args.data_dir, readers=readers)
        refuse_unused(vars(args), readers.used(cases), args.data_dir)
        folders = [EnsembleFolder(folder, args.pattern) for folder in args.folders]
        found = [folder.find([case.name for case in cases], skip_missing=True) for folder in folders]
        both, only = in_common(args, cases, found)
        found = [{case.name: members[case.name] for case in both} for members in found]
        sizes = sizes_of(args, given, *found)
        independent = [folder.independent(members) for folder, members in zip(folders, found)]
        compared = comparison.Comparison(args.folders, independent, sizes, args.patient_pattern, dist_util.dev(),
                                         vars(args), known_patients(both, given),
                                         places_of(both) if args.volumes else None)
        if args.output_dir:
            storage.make_folder(args.output_dir, "--output_dir")

    def read(case):
        (_, raters, first), (_, _, second) = (read_scored_case(case, members[case.name], args.fit, readers)
                                              for members in found)
        return raters, (first, second)

    each_case(by_volume(both, compared.places), read, lambda case, scored: compared.add(case.name, *scored),
              " and ".join(args.folders))
    compared.gather()
    if dist_util.rank() == 0:
        print("".join(f"{line}\n" for line in only) + comparison.report(compared.write(args.output_dir)))
        if args.output_dir:
            print(f"\nwritten to {storage.join(args.output_dir, comparison.FILE)}")


def in_common(args: SimpleNamespace, cases: list[CaseFiles], found: list[dict[str, list]]
              ) -> tuple[list[CaseFiles], list[str]]:
    """The cases that both folders have masks of, and lines that name those which one of them has alone.

    :raises InputError: if there are none, or a case has masks in neither and is not to be skipped.
    """
    neither = [case.name for case in cases if not any(case.name in members for members in found)]
    if neither and not args.skip_missing:
        more = f" and {len(neither) - 1} more" if neither[1:] else ""
        raise InputError(f"{neither[0]}{more}: no masks to compare in {' or '.join(args.folders)}; sample them, or give"
                         f" --skip_missing True")
    both = [case for case in cases if all(case.name in members for members in found)]
    if not both:
        raise InputError(f"{' and '.join(args.folders)}: have masks of no case in common; sample the same cases")
    lines = []
    for folder, members in zip(args.folders, found):
        if alone := sorted(members.keys() - {case.name for case in both}):
            lines += [f"left out, since only {folder} has their masks: {len(alone)} cases, {', '.join(alone[:3])}"
                      f"{' ...' if alone[3:] else ''}"]
    return both, lines


def known_patients(cases: list[CaseFiles], given: dict[str, Any]) -> dict[str, str]:
    """The patients that manifests name, by the names of the cases; none where --patient_pattern is given."""
    return {} if "patient_pattern" in given else manifest.patients_of(cases)


def sizes_of(args: SimpleNamespace, given: dict[str, Any], *members: dict[str, list]) -> list[int]:
    """The sizes of sub-ensembles to score, which the smallest of all ensembles has the masks for."""
    fewest = min(len(paths) for folder in members for paths in folder.values())
    return parse_ensemble_sizes(args.ensemble_sizes, fewest, required="ensemble_sizes" in given)


def each_case(cases: list[list[CaseFiles]], read: Callable[[CaseFiles], Any],
              add: Callable[[CaseFiles, Any], None], where: str) -> None:
    """Read this rank's share of the cases while others are scored, and `add` what `read` returned.

    :param cases: in groups, each of which one rank reads, one case after another.
    :raises InputError: on every rank, with all that is wrong with any case.
    """
    def attempt(case):
        try:
            return case, read(case), None
        except InputError as error:
            return case, None, str(error)

    problems, rank = [], dist_util.rank()
    mine = sum(cases[rank::dist_util.world_size()], [])
    for case, scored, problem in progress(read_ahead(attempt, mine), "scoring", len(mine), "case", enabled=rank == 0):
        if problem is not None:
            problems.append(problem)
        else:
            add(case, scored)
    with dist_util.all_ranks_or_none():
        raise_problems(sum(dist_util.all_gather_objects(problems), []), where)


def main() -> None:
    args, given = start_script("evaluation", __doc__)
    (compare if len(args.folders) == 2 else score)(args, given)


def run() -> None:
    run_script(main)
