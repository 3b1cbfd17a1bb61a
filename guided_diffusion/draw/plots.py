"""Charts of scores (matplotlib); importing this module needs matplotlib."""

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from ..metrics import bootstrap_interval
from .scored import ALL, BACKGROUND, RATERS, ScoredCase
from .style import BLUE, CURVES, GREEN, GREY, PALE_BLUE, VERMILLION


def score_figure(rows: Sequence[ScoredCase], patients: Sequence[str], summary: Mapping[str, Any]) -> bytes:
    """PNG bytes: the scores of all cases, the calibration of the ensemble's mean, GED against ensemble size.

    Of masks that are no independent draws the scores alone.

    :param rows, patients, summary: those of an evaluation.Evaluation.
    """
    independent = summary["members_are"] == "independent"
    figure = Figure(figsize=(15 if independent else 7.5, 5), layout="constrained")
    left, *others = figure.subplots(1, 3, width_ratios=(1.3, 1, 1)) if independent else [figure.subplots()]
    _distributions(left, np.array([[row.score(name) for name in summary[ALL]] for row in rows]), list(summary[ALL]),
                   summary["references"])
    if independent:
        _calibration(others[0], summary["calibration"], summary["presence_calibration"])
        _ged_against_members(others[1], rows, patients, summary)
    counts = "–".join(map(str, sorted(set(summary["members"]))))
    figure.suptitle(f"{summary['cases']} cases of {summary['patients']} patients, {counts}"
                    f" {'' if independent else 'spread '}masks a case")
    return png(figure)


def progress_figure(rows: Sequence[Mapping[str, float]], losses: Sequence[str]) -> bytes:
    """PNG bytes: losses, scores of the validation cases, and norms over the steps of a training run.

    :param rows: of progress.json, dicts of numbers by name.
    :param losses: the names of the losses, that which is trained on first.
    """
    scored = any(name.startswith("val_") for row in rows for name in row)
    columns = 3 if scored else 2
    figure = Figure(figsize=(5 * columns, 4.5))
    # a layout that finds its margins by itself takes as long as all else
    axes = figure.subplots(1, columns, gridspec_kw={"left": 0.2 / columns, "right": 1 - 0.05 / columns, "bottom": 0.12,
                                                    "top": 0.85, "wspace": 0.25})
    panels = [("losses", losses, "log"),
              ("norms of gradient and parameters", ["grad_norm", "param_norm"], "log")]
    if scored:
        names = dict.fromkeys(name for row in rows for name in row if name.startswith("val_"))
        panels.insert(1, ("scores of the validation cases", names, "linear"))
    for ax, (title, names, scale) in zip(axes, panels):
        for name, colour in zip(names, itertools.cycle(CURVES)):
            points = np.array([(row["step"], row[name]) for row in rows if name in row]).reshape(-1, 2)
            if len(points):
                ax.plot(*points.T, "." if len(points) == 1 else "-", color=colour, label=name,
                        linewidth=4 if name == losses[0] else 1.5)  # which its parts may cover
        ax.set(title=title, xlabel="step", yscale=scale)
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize="small")
    figure.suptitle(f"step {rows[-1]['step']:,}")
    return png(figure)


def contents_figure(rows: Sequence[Any]) -> bytes:
    """PNG bytes: how areas, the raters' agreement, grey values and the number of raters who mark are distributed.

    :param rows: contents.CaseFacts, or what has the same attributes.
    """
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots(2, 2).flat
    areas = np.array([area for row in rows for area in row.areas if area] or [1])
    axes[0].hist(areas, np.geomspace(areas.min(), areas.max() + 1, 30), color=BLUE)
    axes[0].set(xscale="log", xlabel="pixels", ylabel="masks", title="Areas of masks that are not empty")
    axes[1].hist([row.distance for row in rows if row.distance is not None], np.linspace(0, 1, 30), color=BLUE)
    axes[1].set(xlabel="mean 1 - IoU of raters", ylabel="cases", title="How far raters disagree")
    axes[2].hist([row.mean for row in rows], np.linspace(0, 1, 30), color=BLUE)
    axes[2].set(xlabel="mean grey value", ylabel="cases", title="Grey values, 0 to 1")
    marked = [sum(area > 0 for area in row.areas) for row in rows]
    axes[3].bar(*np.unique(marked, return_counts=True), color=BLUE)
    axes[3].set(xlabel="raters who mark anything", ylabel="cases", title="Raters who mark", xticks=sorted(set(marked)))
    return png(figure)


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def _distributions(axes, values, names, references):
    """values [N, S] of S names: a box a score, over cases."""
    places = np.arange(len(names))[::-1]
    axes.boxplot(values, orientation="horizontal", positions=places, widths=0.55, whis=(5, 95), showfliers=False,
                 patch_artist=True, boxprops={"facecolor": PALE_BLUE, "edgecolor": BLUE}, medianprops={"color": BLUE},
                 whiskerprops={"color": BLUE}, capprops={"color": BLUE})
    axes.plot(values.mean(0), places, "o", color=BLUE, label="mean of the model")
    for (name, scores), marker, colour in zip(references.items(), ("D", "x"), (GREEN, VERMILLION)):
        axes.plot([scores[ALL][score]["mean"] for score in names], places, marker, color=colour,
                  label=f"mean of {name}")
    axes.set(yticks=places, yticklabels=names, xlabel="score", title="Cases: quartiles, and 5 to 95 %")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="best", fontsize="small")


def _calibration(axes, of_pixels, of_presence):
    """Tables of a summary: sums over the pixels, or cases, of each bin."""
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, label="calibrated")
    for table, style, colour, label in ((of_pixels, "o-", BLUE, "a pixel"), (of_presence, "s--", VERMILLION,
                                                                            "anything at all, by case")):
        counts, predicted, observed = map(np.array, table.values())
        used = counts > 0
        axes.plot(predicted[used] / counts[used], observed[used] / counts[used], style, color=colour, label=label)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="share of the ensemble that marks",
             ylabel="share of raters that mark", title="Calibration")
    pixels = np.array(of_pixels["pixels"])
    axes.legend(loc="upper left", fontsize="small")
    axes.grid(alpha=0.3)
    counts = axes.twinx()
    counts.bar((np.arange(len(pixels)) + 0.5) / len(pixels), pixels, 0.9 / len(pixels), color=GREY, alpha=0.2)
    counts.set(yscale="log", ylabel="pixels (bars)", ylim=(1, 1e3 * pixels.max()))


def _ged_against_members(axes, rows, patients, summary):
    """Expected GED of k members, for each k: GED_unbiased + diversity / k + rater_diversity / m."""
    unbiased, spread, rater_spread = (np.array([row.score(name) for row in rows])[:, None]
                                      for name in ("GED_unbiased", "diversity", "rater_diversity"))
    m = np.array([row.raters for row in rows])[:, None]
    members = np.unique(np.geomspace(1, summary["members"][0], 40).round())  # [K]
    mean, low, high = bootstrap_interval(unbiased + spread / members + rater_spread / m, patients)
    axes.plot(members, mean, "o-", color=BLUE, markersize=3, label="model, 95 % interval")
    axes.fill_between(members, low, high, color=BLUE, alpha=0.2)
    axes.plot(members, (rater_spread * (m - 1) / m).mean() / members, "D-", color=GREEN, markersize=3,
              label=RATERS)
    empty = summary["references"][BACKGROUND][ALL]["GED"]["mean"]  # may lie far above the rest
    axes.axhline(empty, color=VERMILLION, linestyle="--", label=f"{BACKGROUND}: {empty:.2f}")
    axes.set(xscale="log", xlabel="masks drawn", ylabel="GED", title="GED against ensemble size",
             ylim=(0, 1.5 * np.nanmax([mean, high]) or 1))
    axes.xaxis.set_major_locator(FixedLocator(sorted({1, 2, 4, 8, 16, 32, 50, 100} & set(range(int(members[-1]))))
                                              + [members[-1]]))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
