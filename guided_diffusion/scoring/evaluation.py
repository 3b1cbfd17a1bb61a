"""Scoring ensembles against raters over a whole set of cases: intervals, tables, files."""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from .. import dist_util, metrics
from ..draw import montage
from ..draw.report import page, pictures
from ..draw.scored import ALL, BACKGROUND, MODEL, RATERS, ScoredCase, ensemble_sizes
from ..sampling.files import writing
from ..system import packages, storage, terminal
from ..system.errors import InputError
from ..system.flag import parse_numbers

VOLUMES_FILE = "scores_volumes.csv"  # that volume_scores writes
EXTREMES = 4  # cases in best.png and in worst.png


class Evaluation:
    """Scores case after case, beside two predictors that need no model: raters drawn with replacement from those of the
    case (how well a finite set of raters can be met at all) and a single empty mask.

    :param sizes: also score ensembles of so many members: those of a case in their order, cut into groups of that
        size, the scores averaged over the groups and a remainder left out.
    :param seed: of the resampled raters, which follow from (seed, case name) alone.
    :param patient_pattern: see metrics.patient_of, for cases whose patient `patients` does not know.
    :param device: where to count.
    :param options: values of the scores' own flags, by name, see metrics.scores; other names are passed over.
    :param independent: whether the members of a case are independent draws; if not, the scores of
        metrics.FOR_INDEPENDENT_DRAWS, and calibration, are left out.
    :param patients: by the names of cases, as data.manifest.patients_of has them.
    :raises InputError: for a pattern that is no regular expression, or a score that fails on empty masks.
    """

    def __init__(self, sizes: Iterable[int] = (), seed: int = 0, patient_pattern: str = metrics.PATIENT_PATTERN,
                 device: str | torch.device = "cpu", options: Mapping[str, Any] = MappingProxyType({}),
                 independent: bool = True, patients: Mapping[str, str] = MappingProxyType({})):
        try:
            re.compile(patient_pattern)
        except re.error as error:
            raise InputError(f"--patient_pattern {patient_pattern}: is no regular expression ({error})") from None
        self.sizes, self.seed, self.patient_pattern, self.device = tuple(sizes), seed, patient_pattern, device
        self.options, self.independent, self.known_patients = options, independent, patients
        self.names = metrics.score_names(independent)
        self.rows: list[ScoredCase] = []
        self.shown: list[tuple] = []  # (GED, name, image, raters, predictions) of the best and the worst, best first
        empty = torch.zeros(1, 1, 64, 64, dtype=torch.bool, device=device)
        metrics.scores(empty, empty, options)  # rather now than after hours of drawing

    def add(self, name: str, image: np.ndarray, raters: np.ndarray, predictions: np.ndarray) -> None:
        """Score one case: image [C, H, W] in [0, 1], raters [m, H, W] and predictions [n, H, W] bool arrays.

        :raises InputError: if a score fails, see metrics.scores.
        """
        n, m = len(predictions), len(raters)
        draws = np.random.default_rng([self.seed, *os.fsencode(name)]).integers(m, size=n)
        p, y = (torch.from_numpy(np.ascontiguousarray(masks)).to(self.device) for masks in (predictions, raters))
        table = {}
        for predictor, masks in ((MODEL, p), (RATERS, y[torch.from_numpy(draws).to(y.device)])):
            for size, values in sized_scores(masks, y, self.sizes, self.options).items():
                table[predictor, size] = values
        table[BACKGROUND, ALL] = sized_scores(torch.zeros_like(y[:1]), y, (), self.options)[ALL]
        calibration = metrics.Agreement(p, y).calibration().cpu().numpy()
        case = ScoredCase(name, m, n, table, calibration, pictures(image, raters, predictions))
        self.rows.append(case)
        self.shown = _best_and_worst([*self.shown, (case.score("GED"), name, image, raters, predictions)])

    def state(self) -> dict[str, Any]:
        """What is known of the case that was added last, and how it was scored: strings, numbers and tensors, for
        `add_state` of another process."""
        return {"settings": self._settings(), "row": _as_tensors(self.rows[-1])}

    def add_state(self, state: Any) -> bool:
        """Take a case over from what `state` returned, without its masks (see `show`); whether it could be, since it
        was scored as this process scores."""
        try:
            if state["settings"] != self._settings():
                return False
            self.rows.append(_as_row(state["row"]))
        except (AttributeError, LookupError, TypeError, ValueError):  # damaged, or none
            return False
        return True

    def _settings(self):
        options = {flag.name: repr(self.options.get(flag.name, flag.default)) for flag in metrics.SCORES.flags()}
        return json.dumps([self.sizes, self.seed, self.independent, list(metrics.SCORES), options], sort_keys=True)

    def sort(self) -> list[str]:
        """Bring the cases into the order of names; returns those that are among the best or the worst and of which
        `show` needs the masks, since they were added by `add_state`."""
        rows = {row.case: row for row in self.rows}  # one that was taken for gone may have drawn a case twice
        self.rows = [rows[name] for name in sorted(rows)]
        extremes = {name for _, name in _best_and_worst([(row.score("GED"), row.case) for row in self.rows])}
        self.shown = [*{case[1]: case for case in self.shown if case[1] in extremes}.values()]
        return sorted(extremes - {case[1] for case in self.shown})

    def show(self, name: str, image: np.ndarray, raters: np.ndarray, predictions: np.ndarray) -> None:
        """Put a case that was added by `add_state` among the best and the worst; arrays as `add` takes them."""
        ged = next(row.score("GED") for row in self.rows if row.case == name)
        self.shown = _best_and_worst([*self.shown, (ged, name, image, raters, predictions)])

    def gather(self) -> None:
        """Bring together what all ranks scored, on every rank, in the order of names."""
        rows = [_as_tensors(row) for row in self.rows]
        shown = [(*case[:2], *map(torch.from_numpy, case[2:])) for case in self.shown]
        parts = dist_util.all_gather_objects((rows, shown))
        self.rows = sorted((_as_row(row) for rows, _ in parts for row in rows), key=lambda row: row.case)
        self.shown = _best_and_worst((*case[:2], *(tensor.numpy() for tensor in case[2:]))
                                     for _, shown in parts for case in shown)

    def patients(self) -> list[str]:
        """The patient of each row."""
        return [self.patient_of(row.case) for row in self.rows]

    def patient_of(self, name: str) -> str:
        """The patient of a case."""
        return self.known_patients.get(name) or metrics.patient_of(name, self.patient_pattern)

    def summary(self) -> dict[str, Any]:
        """All of it as JSON takes it: {"all": {"GED": {"mean", "low", "high"}, ...}, "4": ..., "references": ...,
        "members_are": "independent" or "spread", ...}.

        Sub-ensembles that some case has too few members for are left out. low and high bound the 95 % bootstrap
        interval over patients, None if there is one patient only.
        """
        keys = [key for key in self.rows[0].scores if all(key in row.scores for row in self.rows)]
        patients = self.patients()
        values = np.concatenate([[row.scores[key] for row in self.rows] for key in keys], 1)  # [N, keys * S]
        mean, low, high = (x.reshape(len(keys), -1) for x in metrics.bootstrap_interval(values, patients))

        def table(i, names=metrics.SCORES):
            return {name: estimate(mean[i, j], low[i, j], high[i, j]) for j, name in enumerate(metrics.SCORES)
                    if name in names}

        summary = {size: table(i, self.names) for i, (predictor, size) in enumerate(keys) if predictor == MODEL}
        summary["references"] = {reference: {size: table(i) for i, (predictor, size) in enumerate(keys)
                                             if predictor == reference} for reference in (RATERS, BACKGROUND)}
        if self.independent:
            calibration = sum(row.calibration for row in self.rows)
            summary["calibration"] = dict(zip(("pixels", "predicted", "observed"), calibration.tolist()))
            presence = metrics.presence_calibration(*(np.array([row.score(name) for row in self.rows]) for name in (
                "probability_of_any", "rater_probability_of_any")), np.array([row.members for row in self.rows]))
            summary["presence_calibration"] = dict(zip(("cases", "predicted", "observed"), presence.tolist()))
        summary |= {"members_are": "independent" if self.independent else "spread"}
        summary |= {"cases": len(self.rows), "patients": len(set(patients)),
                    **{kind: [min(counts), max(counts)] for kind, counts in (
                        ("members", [row.members for row in self.rows]),
                        ("raters", [row.raters for row in self.rows]))}}
        return summary

    def write(self, folder: str | Path, volumes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Write scores.csv, scores.json, scores.png, best.png, worst.png and report.html; returns the summary.

        Without matplotlib there is no scores.png, and no figure in report.html; one of earlier scores is removed. So is
        scores_volumes.csv without `volumes`.

        :param volumes: VolumeScores.summary, which joins the summary.
        :raises InputError: if a file cannot be written.
        """
        summary = self.summary() | ({"volumes": volumes} if volumes else {})
        figure = None
        if packages.is_installed("matplotlib"):
            from ..draw.plots import score_figure

            figure = score_figure(self.rows, self.patients(), summary)
        files = {"scores.csv": self._csv().encode(), "scores.json": (json.dumps(summary, indent=1) + "\n").encode(),
                 "scores.png": figure}
        for name, cases in (("best.png", self.shown[:EXTREMES]), ("worst.png", self.shown[:-EXTREMES - 1:-1])):
            pages = [montage.case_montage(case, image, raters, predictions, max_members=8)
                     for _, case, image, raters, predictions in cases]
            files[name] = montage.png(montage.stack(pages))
        files["report.html"] = page(self.rows, self.patients(), f"{counted(summary)}{left_out(summary)}",
                                    score_rows(summary), figure, self.independent)
        if not volumes:
            files[VOLUMES_FILE] = None
        for name, data in files.items():
            with writing(storage.join(folder, name)) as path:
                if data is not None:
                    storage.write_bytes(path, data)
                elif storage.exists(path):
                    storage.remove(path)
        return summary

    def _csv(self):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        sizes = ensemble_sizes(self.rows)
        names = [*metrics.SCORES, *(f"{name}_{size}" for size in sizes for name in metrics.SCORES)]
        writer.writerow(["case", "patient", "raters", "members", *names])
        nothing = [""] * len(metrics.SCORES)
        for row, patient in zip(self.rows, self.patients()):
            values = [value if name in self.names else "" for size in (ALL, *sizes)
                      for name, value in zip(metrics.SCORES, row.scores.get((MODEL, size), nothing))]
            writer.writerow([row.case, patient, row.raters, row.members, *values])
        return text.getvalue()


def sized_scores(masks: torch.Tensor, raters: torch.Tensor, sizes: Iterable[int] = (),
                 options: Mapping[str, Any] = MappingProxyType({})) -> dict[str, np.ndarray]:
    """Scores of all masks of a case, and the means of those of sub-ensembles, see Evaluation.

    :param masks: [n, H, W] bool; raters: [m, H, W] bool, on the same device. Sizes above n are left out.
    :returns: {ALL: [S], "4": [S], ...}, S in the order of SCORES.
    """
    def scores(predictions):  # [..., n, H, W] -> [..., S]
        return torch.stack(list(metrics.scores(predictions, raters, options).values()), -1).cpu().numpy()

    return {ALL: scores(masks),
            **{str(size): scores(masks[:len(masks) // size * size].unflatten(0, (-1, size))).mean(0)  # [groups, size]
               for size in sizes if size <= len(masks)}}


def score_table(summary: Mapping[str, Any]) -> str:
    """The tables of score_rows in Markdown."""
    return "\n\n".join(map(markdown, score_rows(summary)))


def score_rows(summary: Mapping[str, Any]) -> list[list[list[str]]]:
    """The summary as tables, each a list of rows of words: every score with its interval beside the references', and
    the means of sub-ensembles and the scores of volumes, if there are any."""
    references = summary["references"]
    columns = {MODEL: summary[ALL], **{name: references[name][ALL] for name in references}}
    spread = {"GED": ged_title(summary)}
    rows = [["score", *columns]] + [[spread.get(name, name), *(cell(scores[name]) for scores in columns.values())]
                                    for name in summary[ALL]]
    tables = [rows]
    sizes = [size for size in summary if size.isdigit()]
    if sizes:
        names = [name for name in summary[ALL] if not name.startswith("rater_")]
        rows = [["members", *(spread.get(name, name) for name in names)]]
        for size in sizes:
            rows += [[who, *(f"{scores[name]['mean']:.3f}" for name in names)] for who, scores in (
                (size, summary[size]), (f"{size} {RATERS}", references[RATERS][size]))]
        tables.append(rows)
    if "volumes" in summary:
        whole = summary["volumes"]
        lost = f", {len(whole['left_out'])} left out" if whole["left_out"] else ""
        tables.append([[f"whole volumes: {whole['volumes']}{lost}", MODEL],
                       *([spread.get(name, name), cell(score)] for name, score in whole["scores"].items())])
    return tables


def ged_title(summary: Mapping[str, Any]) -> str:
    """What GED is called: that of spread masks is none of independent draws."""
    return "GED" if summary["members_are"] == "independent" else "GED spread"


def left_out(summary: Mapping[str, Any]) -> str:
    """Half a sentence that says which scores are not there, and why; "" if all are."""
    return "" if summary["members_are"] == "independent" else (
        f". The masks of a case are spread evenly over the distribution. {', '.join(metrics.FOR_INDEPENDENT_DRAWS)} and"
        f" calibration need independent draws, and are left out")


def counted(summary: Mapping[str, Any]) -> str:
    """How many cases, patients, masks and raters were scored, in words."""
    def span(kind):
        low, high = summary[kind]
        return f"{low}" if low == high else f"{low} to {high}"

    return (f"{summary['cases']} cases of {summary['patients']} patients, {span('members')} masks and"
            f" {span('raters')} raters a case")


def report(summary: Mapping[str, Any], folder: str | Path) -> str:
    """What to print at the end: what was scored, the tables, the files, and how to look at them."""
    charts = packages.is_installed("matplotlib")
    files = [(what, storage.join(folder, name)) for what, name in (
        ("all cases, to look at", "report.html"), ("those of lowest GED", "best.png"),
        ("those of highest GED", "worst.png"), *[("charts", "scores.png")] * charts, ("every score", "scores.csv"),
        *[("those of volumes", VOLUMES_FILE)] * ("volumes" in summary), ("means and intervals", "scores.json"))]
    to_open = () if storage.is_remote(folder) else (
        "python", "-m", "webbrowser", Path(files[0][1]).absolute().as_uri())
    no_charts = "" if charts else f"no charts in {folder}: {packages.missing('scores.png', 'matplotlib')}\n\n"
    return (f"{counted(summary)}; mean [95 % interval over patients]{left_out(summary)}\n\n{score_table(summary)}\n\n"
            f"{no_charts}"
            f"{terminal.summary('scores written', files, to_open)}")


def cell(score: Mapping[str, float | None]) -> str:
    """{"mean", "low", "high"} -> "0.123 [0.100, 0.150]"."""
    interval = "" if score["low"] is None else f" [{score['low']:.3f}, {score['high']:.3f}]"
    return f"{score['mean']:.3f}{interval}"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows of words, the head first, as a table in Markdown."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(word.ljust(width) for word, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def _as_tensors(row):
    """A ScoredCase as other processes may read it."""
    return (*row[:3], {key: torch.from_numpy(values) for key, values in row.scores.items()},
            torch.from_numpy(row.calibration), row.pictures)


def _as_row(state):
    """What _as_tensors returned as a ScoredCase again."""
    *row, scores, calibration, pictures = state
    return ScoredCase(*row, {key: values.numpy() for key, values in scores.items()}, calibration.numpy(), pictures)


def _best_and_worst(cases):
    """The EXTREMES best and as many worst, best first."""
    cases = sorted(cases, key=lambda case: case[:2])
    return cases if len(cases) <= 2 * EXTREMES else cases[:EXTREMES] + cases[-EXTREMES:]


def estimate(mean: float, low: float, high: float) -> dict[str, float | None]:
    """A mean and its interval as JSON takes them; NaN, an interval of one patient, becomes None."""
    return {"mean": float(mean), **{name: None if np.isnan(value) else float(value)
                                    for name, value in (("low", low), ("high", high))}}


def parse_ensemble_sizes(text: str, fewest: int, required: bool = True) -> list[int]:
    """The numbers of --ensemble_sizes, of ensembles of `fewest` masks or more; larger ones are refused if they were
    required, else left out."""
    sizes = parse_numbers(int, text, "ensemble_sizes")
    if any(size < 1 or (required and size > fewest) for size in sizes):
        raise InputError(f"--ensemble_sizes {text}: sizes of sub-ensembles go from 1 to {fewest}, the fewest masks that"
                         f" a case has")
    return [size for size in sizes if size <= fewest]
