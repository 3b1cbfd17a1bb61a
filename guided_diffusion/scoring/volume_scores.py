"""Scores of whole volumes: the masks of their slices, one on another."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import dist_util, metrics
from ..data import manifest, masks
from ..data.case_files import CaseFiles
from ..sampling.files import writing
from ..system import storage
from ..system.errors import InputError
from .evaluation import VOLUMES_FILE, estimate


class ScoredVolume(NamedTuple):
    """What is kept of a volume once it is scored."""

    volume: str
    patient: str
    slices: int  # that were scored
    raters: int
    members: int
    scores: Sequence[float]  # in the order of SCORES


class VolumeScores:
    """Stacks the masks of slices, and scores each stack as one mask. Member i of a slice lies on member i of the next,
    and rater k on rater k.

    Slices of a volume are added one after another. Volumes whose slices differ in size, or in the number of masks or
    raters, are left out; `left_out` has their names.

    :param places: (volume, slice) by the name of the case, see places_of.
    :param options, device: as for evaluation.Evaluation.
    """

    def __init__(self, places: Mapping[str, tuple[str, int]], options: Mapping[str, Any], device: str | torch.device):
        self.places, self.options, self.device = places, options, device
        self.rows: list[ScoredVolume] = []
        self.left_out: list[str] = []
        self._volume, self._patient, self._slices = "", "", []

    def add(self, name: str, patient: str, raters: np.ndarray, predictions: np.ndarray) -> None:
        """One slice: raters [m, H, W] and predictions [n, H, W] bool arrays. Cases of no volume are passed over.

        :raises InputError: if a score fails.
        """
        if name not in self.places:
            return
        volume, number = self.places[name]
        if volume != self._volume:
            self._score()
        self._volume, self._patient = volume, patient
        self._slices.append((number, [(each.shape, masks.pack(each)) for each in (predictions, raters)]))

    def _score(self):
        """Score the volume whose slices are all there."""
        if not self._slices:
            return
        slices = [pair for _, pair in sorted(self._slices, key=lambda item: item[0])]
        if len({(p[0], y[0]) for p, y in slices}) > 1 or len({number for number, _ in self._slices}) < len(slices):
            self.left_out.append(self._volume)
        else:
            p, y = (torch.from_numpy(np.concatenate([masks.unpack(packed, *shape[1:]) for shape, packed in each], 1))
                    .to(self.device) for each in zip(*slices))  # [n, D * H, W], [m, D * H, W]
            scores = [score.item() for score in metrics.scores(p, y, self.options).values()]
            self.rows.append(ScoredVolume(self._volume, self._patient, len(slices), len(y), len(p), scores))
        self._slices = []

    def finish(self) -> None:
        """Score the last volume, and bring the volumes into the order of names."""
        self._score()
        self.rows.sort()
        self.left_out.sort()

    def gather(self) -> None:
        """Score the last volume, and bring together what all ranks scored, in the order of names."""
        self._score()
        parts = dist_util.all_gather_objects(([tuple(row) for row in self.rows], self.left_out))
        self.rows = sorted(ScoredVolume(*row) for rows, _ in parts for row in rows)
        self.left_out = sorted(name for _, names in parts for name in names)

    def summary(self, names: Iterable[str]) -> dict[str, Any]:
        """As JSON takes it: {"volumes": number, "left_out": [names], "scores": {"GED": {"mean", "low", "high"}, ...}}.

        :param names: of the scores.
        """
        scores = {}
        if self.rows:
            mean, low, high = metrics.bootstrap_interval(np.array([row.scores for row in self.rows]),
                                                         [row.patient for row in self.rows])
            scores = {name: estimate(mean[i], low[i], high[i]) for i, name in enumerate(metrics.SCORES)
                      if name in names}
        return {"volumes": len(self.rows), "left_out": self.left_out, "scores": scores}

    def write(self, folder: str | Path, names: Iterable[str]) -> dict[str, Any]:
        """Write scores_volumes.csv, a row a volume, with these scores; returns the summary.

        :raises InputError: if the file cannot be written.
        """
        chosen = [i for i, name in enumerate(metrics.SCORES) if name in names]
        table = manifest.table([[*ScoredVolume._fields[:-1], *(list(metrics.SCORES)[i] for i in chosen)],
                                *([*row[:-1], *(row.scores[i] for i in chosen)] for row in self.rows)])
        with writing(storage.join(folder, VOLUMES_FILE)) as path:
            storage.write_bytes(path, table)
        return self.summary(names)


def places_of(cases: Iterable[CaseFiles]) -> dict[str, tuple[str, int]]:
    """The volume that a case is a slice of and its number there, by the name of the case, as volumes of NIfTI and DICOM
    or manifest.csv tell; cases of no volume are not there.

    :raises InputError: if a manifest cannot be read, or no case is of a volume.
    """
    cases = [*cases]
    rows = manifest.rows_of(cases)
    places = {case.name: (case.volume, case.slice) for case in cases if case.volume}
    for name, row in rows.items():
        if place := manifest.place_of(row):
            places[name] = place["volume"], place["slice"]
    if not places:
        raise InputError("--volumes True: neither the files of --data_dir nor its manifest.csv say which cases are"
                         " slices of one volume; leave it away")
    return places


def by_volume(cases: Iterable[CaseFiles], places: Mapping[str, tuple[str, int]]) -> list[list[CaseFiles]]:
    """Cases, those of one volume in a list of their own, others each by itself."""
    groups: dict[tuple[str, ...], list[CaseFiles]] = {}
    for case in cases:
        groups.setdefault(places[case.name][:1] if case.name in places else (case.name, ""), []).append(case)
    return [*groups.values()]
