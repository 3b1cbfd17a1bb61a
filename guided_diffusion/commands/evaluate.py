"""Score ensembles of masks against the masks of several raters.

    python scripts/segmentation_evaluate.py --data_dir ./data/testing --samples_dir ./results

Scores what segmentation_sample.py wrote, or any other model's masks: --pattern says how their files are called. Prints
a table and writes, into --output_dir:

    scores.csv   a row a case, a column a score
    scores.json  means over cases, with 95 % bootstrap intervals over patients
    scores.png   how the scores are distributed, whether the probabilities are right, GED against number of masks
    best.png     the cases with the lowest GED; worst.png: those with the highest
    report.html  all cases in one page, which needs no network: to sort, search and print; a click shows all masks

Two predictors that need no model stand beside it: raters drawn with replacement from those of the case (about the best
that can be measured with so few raters) and the empty mask.
"""

from .. import dist_util
from ..data.case_files import find_cases
from ..data.cases import read_ahead
from ..data.readers.base import Readers, refuse_unused
from ..scoring.ensemble_folder import EnsembleFolder, read_scored_case
from ..scoring.evaluation import Evaluation, parse_ensemble_sizes, report
from ..system import storage
from ..system.errors import InputError, raise_problems
from ..system.terminal import progress
from .cli import run_script, start_script


def main() -> None:
    args, given = start_script("evaluation", __doc__)
    rank, world_size = dist_util.rank(), dist_util.world_size()
    folder = args.output_dir or args.samples_dir

    with dist_util.all_ranks_or_none():
        readers = Readers(vars(args))
        cases = find_cases(args.data_dir, readers=readers)
        refuse_unused(vars(args), readers.used(cases), args.data_dir)
        members = EnsembleFolder(args.samples_dir, args.pattern).find([case.name for case in cases], args.skip_missing)
        fewest = min(map(len, members.values()))
        sizes = parse_ensemble_sizes(args.ensemble_sizes, fewest, required="ensemble_sizes" in given)
        evaluation = Evaluation(sizes, args.seed, args.patient_pattern, dist_util.dev(), vars(args))
        storage.make_folder(folder, "--output_dir")

    cases = [case for case in cases if case.name in members]
    problems = []

    def read(case):
        try:
            return case.name, read_scored_case(case, members[case.name], args.fit, readers)
        except InputError as error:
            return case.name, str(error)

    mine = cases[rank::world_size]
    for name, what in progress(read_ahead(read, mine), "scoring", len(mine), "case", enabled=rank == 0):
        if isinstance(what, str):
            problems.append(what)
        else:
            evaluation.add(name, *what)
    with dist_util.all_ranks_or_none():
        raise_problems(sum(dist_util.all_gather_objects(problems), []), args.samples_dir)

    evaluation.gather()
    if rank == 0:
        print(report(evaluation.write(folder), folder))


def run() -> None:
    run_script(main)
