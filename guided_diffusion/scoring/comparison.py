"""Two ensembles of the same cases beside each other: paired differences of every score."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from .. import dist_util, metrics
from ..draw.scored import ALL
from ..sampling.files import writing
from ..system import storage
from .evaluation import cell, estimate, markdown, sized_scores
from .volume_scores import VolumeScores

FILE = "comparison.json"


class Comparison:
    """Scores case after case in two folders, A and B.

    :param folders: what to call them; independent: whether the members of each are independent draws. Scores that need
        such are left out unless both are.
    :param sizes, patient_pattern, device, options, patients: as for evaluation.Evaluation.
    :param places: as for VolumeScores, to compare whole volumes, too; slices of one are then added one after another.
    """

    def __init__(self, folders: Sequence[str], independent: Sequence[bool] = (True, True), sizes: Iterable[int] = (),
                 patient_pattern: str = metrics.PATIENT_PATTERN, device: str | torch.device = "cpu",
                 options: Mapping[str, Any] = MappingProxyType({}),
                 patients: Mapping[str, str] = MappingProxyType({}),
                 places: Mapping[str, tuple[str, int]] | None = None):
        self.folders, self.independent, self.sizes = tuple(folders), tuple(independent), tuple(sizes)
        self.patient_pattern, self.device, self.options, self.patients = patient_pattern, device, options, patients
        self.rows: list[tuple] = []  # (case, members [2], scores {size: [2, S]})
        self.places = places or {}
        self.volumes = [VolumeScores(self.places, options, device) for _ in folders] if places else []

    def add(self, name: str, raters: np.ndarray, predictions: Sequence[np.ndarray]) -> None:
        """Score one case: raters [m, H, W] and, of A and of B, predictions [n, H, W] bool arrays.

        :raises InputError: if a score fails.
        """
        y, *both = (torch.from_numpy(np.ascontiguousarray(masks)).to(self.device) for masks in (raters, *predictions))
        a, b = (sized_scores(masks, y, self.sizes, self.options) for masks in both)
        self.rows.append((name, [len(masks) for masks in both], {size: np.stack([a[size], b[size]])
                                                                 for size in a if size in b}))
        for volumes, masks in zip(self.volumes, predictions):
            volumes.add(name, self.patient_of(name), raters, masks)

    def patient_of(self, name: str) -> str:
        """The patient of a case."""
        return self.patients.get(name) or metrics.patient_of(name, self.patient_pattern)

    def gather(self) -> None:
        """Bring together what all ranks scored, on every rank, in the order of names."""
        rows = [(name, members, {size: torch.from_numpy(values) for size, values in scores.items()})
                for name, members, scores in self.rows]
        self.rows = sorted(((name, members, {size: values.numpy() for size, values in scores.items()})
                            for part in dist_util.all_gather_objects(rows) for name, members, scores in part),
                           key=lambda row: row[0])
        for volumes in self.volumes:
            volumes.gather()

    def summary(self) -> dict[str, Any]:
        """As JSON takes it: {"all": {"GED": {"A": {"mean", "low", "high"}, "B": ..., "A less B": ...}, ...}, "4": ...,
        "folders", "members_are", "members", "cases", "patients"}. low and high bound the 95 % bootstrap interval over
        patients; that of "A less B" is of the paired differences. With volumes also "volumes": {"volumes": number,
        "left_out": [names], "scores": {"GED": ..., ...}}.
        """
        names = metrics.score_names(all(self.independent))
        patients = [self.patient_of(name) for name, *_ in self.rows]

        def table(values, patients):  # [N, 2, S]
            parts = {"A": values[:, 0], "B": values[:, 1], "A less B": values[:, 0] - values[:, 1]}
            parts = {part: metrics.bootstrap_interval(of, patients) for part, of in parts.items()}
            return {name: {part: estimate(mean[j], low[j], high[j]) for part, (mean, low, high) in parts.items()}
                    for j, name in enumerate(metrics.SCORES) if name in names and not name.startswith("rater_")}

        sizes = [size for size in self.rows[0][2] if all(size in scores for *_, scores in self.rows)]
        members = list(zip(*(members for _, members, _ in self.rows)))  # of A, of B
        tables = {size: table(np.stack([scores[size] for *_, scores in self.rows]), patients) for size in sizes}
        if self.volumes:
            a, b = ({row.volume: row for row in volumes.rows} for volumes in self.volumes)
            both = [(a[name], b[name]) for name in a if name in b]
            tables["volumes"] = {
                "volumes": len(both), "left_out": sorted({*self.volumes[0].left_out, *self.volumes[1].left_out}),
                "scores": table(np.array([[row.scores for row in pair] for pair in both]),
                                [row.patient for row, _ in both]) if both else {}}
        return {**tables, "folders": list(self.folders),
                "members_are": ["independent" if each else "spread" for each in self.independent],
                "members": [[min(counts), max(counts)] for counts in members], "cases": len(self.rows),
                "patients": len(set(patients))}

    def write(self, folder: str | Path) -> dict[str, Any]:
        """Write comparison.json into a folder, "" for none; returns the summary. :raises InputError: if it cannot."""
        summary = self.summary()
        if folder:
            with writing(storage.join(folder, FILE)) as path:
                storage.write_bytes(path, (json.dumps(summary, indent=1) + "\n").encode())
        return summary


def report(summary: Mapping[str, Any]) -> str:
    """What to print: what was compared, a table of every score, and what to mind."""
    def members(low, high):
        return f"{low}" if low == high else f"{low} to {high}"

    sizes = [size for size in summary if size.isdigit()]
    head = ["score", "A", "B", "A less B", *(f"A less B, {size} masks" for size in sizes)]
    first, second = summary["members_are"]
    ged = {("independent", "independent"): "GED", ("spread", "spread"): "GED spread"}.get(
        (first, second), f"GED (A {first}, B {second})")
    def row(name, score):
        return [ged if name == "GED" else name, *(cell(score[part]) for part in ("A", "B", "A less B"))]

    rows = [head] + [[*row(name, score), *(cell(summary[size][name]["A less B"]) for size in sizes)]
                     for name, score in summary[ALL].items()]
    lines = [f"{letter}: {folder}, {members(*count)} masks a case, {kind}" for letter, folder, count, kind in
             zip("AB", summary["folders"], summary["members"], summary["members_are"])]
    lines += [f"{summary['cases']} cases of {summary['patients']} patients; mean [95 % interval over patients], of"
              f" A less B of the paired differences"]
    if "spread" in summary["members_are"]:
        lines += [f"Masks that are spread evenly over the distribution are no independent draws:"
                  f" {', '.join(metrics.FOR_INDEPENDENT_DRAWS)} are left out"]
    if summary["members"][0] != summary["members"][1]:
        lines += ["A and B differ in the number of masks, on which GED and others depend: compare those of one size,"
                  " --ensemble_sizes"]
    tables = [rows]
    if "volumes" in summary:
        whole = summary["volumes"]
        lost = f", {len(whole['left_out'])} left out" if whole["left_out"] else ""
        tables.append([[f"whole volumes: {whole['volumes']}{lost}", "A", "B", "A less B"],
                       *(row(name, score) for name, score in whole["scores"].items())])
    return "\n\n".join(["\n".join(lines), *map(markdown, tables)])
