"""What is scored, summed up, drawn and written about a set of cases."""

import io
import itertools
import json
import random
import re
import shlex
import sys
import warnings
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pytest
from helpers.refusals import refusal
from helpers.scoring import gather_into
from PIL import Image

from guided_diffusion import metrics
from guided_diffusion.draw import montage, plots
from guided_diffusion.scoring import evaluation
from guided_diffusion.scoring.evaluation import Evaluation, parse_ensemble_sizes, report
from guided_diffusion.system.registry import load_plugin

SIDE = 12
NAMES = ["GED", "GED_unbiased", "HM_IoU", "D_max", "S_c", "D_a", "CI", "soft_Dice", "ECE", "diversity",
         "rater_diversity", "presence_Brier", "probability_of_any", "rater_probability_of_any"]


def discs(rng, count, side=SIDE):
    """Discs of random place and size, bool [count, side, side]."""
    y, x = np.mgrid[:side, :side]
    centre, radius = rng.uniform(0.3, 0.7, (2, count, 1, 1)) * side, rng.uniform(1.5, 4, (count, 1, 1))
    return np.hypot(y - centre[0], x - centre[1]) < radius


def make_case(name, raters=3, members=6, seed=0):
    """What Evaluation.add takes."""
    rng = np.random.default_rng([seed, *name.encode()])
    return name, rng.random((1, SIDE, SIDE)), discs(rng, raters), discs(rng, members)


def evaluated(cases, **options):
    result = Evaluation(**options)
    for case in cases:
        result.add(*case)
    return result


def read_csv(text):
    header, *rows = [line.split(",") for line in text.splitlines()]
    return header, rows


def strict_json(text):
    """JSON of the standard, which knows no NaN."""
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def ragged():
    """Five cases of three patients, with 2 to 5 raters and 5 to 9 members."""
    return [make_case(name, raters, members) for name, raters, members in (
        ("a1-0", 3, 6), ("a1-1", 2, 9), ("b2", 5, 7), ("c3-0", 4, 5), ("c3-1", 3, 8))]


@pytest.fixture
def drawn(monkeypatch):
    """The figures that score_figure made, in order; none is turned into pixels."""
    figures = []
    monkeypatch.setattr(plots, "png", figures.append)
    return figures


def curves(drawn, evaluation):
    """The lines of the right-hand chart, {label: (x, y)}, and its axes."""
    plots.score_figure(evaluation.rows, evaluation.patients(), evaluation.summary())
    axes = next(axes for axes in drawn[-1].axes if axes.get_xlabel() == "masks drawn")
    return {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in axes.lines}, axes


# ---- the numbers ----

def test_a_row_of_the_csv_is_a_case_and_its_sub_ensembles(ragged, undrawn, tmp_path):
    evaluated(ragged, sizes=[2, 4]).write(tmp_path)
    header, rows = read_csv((tmp_path / "scores.csv").read_text())
    assert header == ["case", "patient", "raters", "members", *NAMES, *(f"{name}_2" for name in NAMES),
                      *(f"{name}_4" for name in NAMES)]
    assert [row[:4] for row in rows] == [
        ["a1-0", "a1", "3", "6"], ["a1-1", "a1", "2", "9"], ["b2", "b2", "5", "7"], ["c3-0", "c3", "4", "5"],
        ["c3-1", "c3", "3", "8"]]
    for (_, _, raters, predictions), row in zip(ragged, rows):
        n = len(predictions)
        groups = [[predictions]] + [[predictions[start:start + size] for start in range(0, n - size + 1, size)]
                                    for size in (2, 4)]  # consecutive; what is left over is not scored
        expected = [np.mean([metrics.scores(group, raters)[name] for group in part]) for part in groups
                    for name in NAMES]
        np.testing.assert_allclose(np.array(row[4:], float), expected, rtol=1e-12, atol=1e-15)


def test_summary_holds_means_of_the_columns_within_their_intervals(ragged, undrawn, tmp_path):
    summary = evaluated(ragged, sizes=[4, 2]).write(tmp_path)
    assert strict_json((tmp_path / "scores.json").read_text()) == summary
    assert list(summary) == ["all", "4", "2", "references", "calibration", "presence_calibration", "members_are",
                             "cases", "patients", "members", "raters"]
    assert summary["members_are"] == "independent"
    assert (summary["cases"], summary["patients"], summary["members"], summary["raters"]) == (5, 3, [5, 9], [2, 5])
    assert list(summary["references"]) == ["resampled raters", "all background"]
    assert list(summary["references"]["resampled raters"]) == ["all", "4", "2"]
    assert list(summary["references"]["all background"]) == ["all"]
    header, rows = read_csv((tmp_path / "scores.csv").read_text())
    columns = dict(zip(header, zip(*rows)))
    for size in ("all", "4", "2"):
        assert list(summary[size]) == NAMES
        for name, value in summary[size].items():
            cells = np.array(columns[name if size == "all" else f"{name}_{size}"], float)
            assert value["mean"] == pytest.approx(cells.mean(), rel=1e-12)
            assert cells.min() <= value["low"] <= value["mean"] <= value["high"] <= cells.max()
    assert summary["all"]["GED"]["low"] < summary["all"]["GED"]["high"]


def test_intervals_resample_patients_not_cases():
    cases = [(name, image, raters, predictions) for (_, image, raters, predictions), name in zip(
        [make_case("x", seed=i // 4) for i in range(8)], ("a1-0 a1-1 a1-2 a1-3 b2-0 b2-1 b2-2 b2-3").split())]
    by_patient, by_case = (evaluated(cases, patient_pattern=pattern).summary()["all"]["GED"]
                           for pattern in (r"\D*\d+", ".*"))
    assert by_patient["high"] - by_patient["low"] > 1.3 * (by_case["high"] - by_case["low"]) > 0


def test_a_single_patient_has_no_intervals(undrawn, tmp_path):
    summary = evaluated([make_case("a1-0"), make_case("a1-1")], sizes=[2]).write(tmp_path)
    assert strict_json((tmp_path / "scores.json").read_text()) == summary
    assert (summary["cases"], summary["patients"]) == (2, 1)
    for table in (summary["all"], summary["2"], summary["references"]["all background"]["all"]):
        assert all(value["low"] is None and value["high"] is None for value in table.values())
    assert "[" not in evaluation.score_table(summary)


def test_calibration_adds_the_pixels_of_all_cases(ragged):
    table = evaluated(ragged).summary()["calibration"]
    assert {name: len(values) for name, values in table.items()} == {"pixels": 10, "predicted": 10, "observed": 10}
    assert sum(table["pixels"]) == 5 * SIDE * SIDE
    assert sum(table["predicted"]) == pytest.approx(sum(p.mean(0).sum() for *_, p in ragged))
    assert sum(table["observed"]) == pytest.approx(sum(y.mean(0).sum() for *_, y, _ in ragged))


@pytest.mark.parametrize("raters, members", [(1, 1), (1, 4), (4, 1), (2, 3)])
def test_any_number_of_raters_and_members_can_be_scored(raters, members, undrawn, tmp_path):
    summary = evaluated([make_case("a1", raters, members), make_case("b2", 2, 4)], sizes=[1]).write(tmp_path)
    assert summary["1"].keys() == summary["all"].keys()
    assert all(np.isfinite(value["mean"]) for value in summary["all"].values())


def test_sub_ensembles_too_large_for_some_case_are_left_out_of_the_summary(ragged, undrawn, tmp_path):
    summary = evaluated(ragged, sizes=[5, 6]).write(tmp_path)  # c3-0 has 5 members
    assert "5" in summary and "6" not in summary and "6" not in summary["references"]["resampled raters"]
    header, rows = read_csv((tmp_path / "scores.csv").read_text())
    cells = [row[header.index("GED_6")] for row in rows]
    assert [cell == "" for cell in cells] == [False, False, False, True, False]
    assert all(len(row) == len(header) for row in rows)


def test_sizes_that_nobody_has_members_for_are_in_no_table(undrawn, tmp_path):
    summary = evaluated([make_case("a1"), make_case("b2")], sizes=[7]).write(tmp_path)
    assert "7" not in summary and "GED_7" not in (tmp_path / "scores.csv").read_text()
    assert "members" not in evaluation.score_table(summary)


# ---- masks that are no independent draws ----

def test_scores_that_need_independent_draws_are_left_out_of_spread_ensembles(ragged, tmp_path):
    usual, spread = (evaluated(ragged, sizes=[2], independent=independent) for independent in (True, False))
    summary = spread.write(tmp_path)
    assert strict_json((tmp_path / "scores.json").read_text()) == summary and summary["members_are"] == "spread"
    kept = [name for name in NAMES if name not in ("GED_unbiased", "ECE", "diversity", "presence_Brier")]
    assert "calibration" not in summary and "presence_calibration" not in summary
    assert [summary[size] for size in ("all", "2")] == [{name: usual.summary()[size][name] for name in kept}
                                                        for size in ("all", "2")]
    header, rows = read_csv((tmp_path / "scores.csv").read_text())
    assert header[4:] == [*NAMES, *(f"{name}_2" for name in NAMES)]
    for row in rows:
        assert {name.removesuffix("_2") for name, cell in zip(header[4:], row[4:]) if cell == ""} == {*NAMES} - {*kept}
    text = report(summary, "")
    left_out = "GED_unbiased, ECE, diversity, presence_Brier and calibration need independent draws, and are left out"
    assert left_out in text.splitlines()[0] and "| GED spread" in text and "| ECE " not in text
    page = (tmp_path / "report.html").read_text()
    assert left_out in page and "ECE</button>" not in page and '"GED_unbiased":' not in page
    assert "spread evenly" not in report(usual.summary(), "")


def test_presence_is_calibrated_by_case(drawn):
    mask, nothing = np.ones((1, SIDE, SIDE), bool), np.zeros((1, SIDE, SIDE), bool)

    def case(name, raters, members):  # how many mark anything, of how many
        return name, np.zeros((1, SIDE, SIDE)), *(np.concatenate([mask] * marked + [nothing] * (count - marked))
                                                  for marked, count in (raters, members))

    result = evaluated([case("a1", (1, 4), (1, 10)), case("b2", (3, 4), (2, 10)), case("c3", (2, 2), (29, 100)),
                        case("d4", (4, 4), (5, 5))])
    table = result.summary()["presence_calibration"]
    assert table["cases"] == [0, 1, 2, *[0] * 6, 1]
    assert np.array(table["predicted"])[[1, 2, 9]] == pytest.approx([0.1, 0.2 + 0.29, 1])
    assert np.array(table["observed"])[[1, 2, 9]] == pytest.approx([0.25, 1.75, 1])
    plots.score_figure(result.rows, result.patients(), result.summary())
    line, = (line for axes in drawn[-1].axes for line in axes.lines if line.get_label() == "anything at all, by case")
    np.testing.assert_allclose(line.get_xydata(), [[0.1, 0.25], [0.245, 0.875], [1, 1]])


# ---- predictors without a model ----

def reference(evaluation, i=0, name="resampled raters"):
    return evaluation.rows[i].scores[name, "all"]


def test_resampled_raters_follow_from_seed_and_case_name_alone():
    names = [f"case{i}" for i in range(8)]
    cases = [(name, image, raters, predictions) for name in names for _, image, raters, predictions in [make_case("x")]]
    first = evaluated(cases)
    other = evaluated([(name, image, raters, ~predictions) for name, image, raters, predictions in cases[::-1]])
    other.gather()
    rows = np.array([reference(first, i) for i in range(8)])
    assert np.array_equal(rows, [reference(other, i) for i in range(8)])
    assert len(np.unique(rows[:, 0])) > 3  # cases with the same raters, but other draws
    seeded = evaluated(cases, seed=1)
    assert not np.array_equal(rows, [reference(seeded, i) for i in range(8)])


def test_resampled_raters_are_drawn_with_replacement_from_all_raters():
    _, image, raters, predictions = make_case("x", raters=3, members=2)
    possible = {draw: metrics.Agreement(raters[list(draw)], raters).ged().item()
                for draw in itertools.product(range(3), repeat=2)}
    seen = [reference(evaluated([(f"case{i}", image, raters, predictions)]))[0] for i in range(40)]
    values = set(np.round(list(possible.values()), 9))
    assert set(np.round(seen, 9)) == values and len(values) > 4  # every draw occurs, nothing else
    assert np.mean(seen) == pytest.approx(np.mean(list(possible.values())), abs=4 * np.std(seen) / 40 ** 0.5)


def test_resampled_raters_who_all_agree_are_perfect():
    name, image, raters, predictions = make_case("x")
    scores = dict(zip(NAMES, reference(evaluated([(name, image, raters[[0, 0, 0]], predictions)]))))
    assert scores == pytest.approx({**dict.fromkeys(NAMES, 1), **dict.fromkeys(
        ("GED", "GED_unbiased", "ECE", "diversity", "rater_diversity", "presence_Brier"), 0)}, abs=1e-12)


def test_the_background_reference_is_one_empty_mask(ragged):
    result = evaluated(ragged)
    for i, (_, _, raters, _) in enumerate(ragged):
        expected = metrics.scores(np.zeros((1, SIDE, SIDE), bool), raters)
        assert reference(result, i, "all background").tolist() == [expected[name].item() for name in NAMES]


# ---- GED against ensemble size ----

def test_curve_of_the_model_is_the_mean_ged_of_all_sub_ensembles(drawn):
    cases = [make_case("a1", raters=3, members=5), make_case("b2", raters=2, members=6)]
    (x, y) = curves(drawn, evaluated(cases))[0]["model, 95 % interval"]
    assert x.tolist() == [1, 2, 3, 4, 5]
    expected = [np.mean([np.mean([metrics.Agreement(predictions[list(group)], raters).ged().item()
                                  for group in itertools.combinations(range(len(predictions)), int(k))])
                         for _, _, raters, predictions in cases]) for k in x]
    np.testing.assert_allclose(y, expected, atol=1e-12)


def test_curve_of_resampled_raters_is_the_mean_over_all_draws(drawn):
    cases = [make_case("a1", raters=3, members=4), make_case("b2", raters=2, members=4)]
    (x, y) = curves(drawn, evaluated(cases))[0]["resampled raters"]
    expected = [np.mean([metrics.Agreement(raters[list(itertools.product(range(len(raters)), repeat=int(k)))],
                                           raters).ged().mean().item() for _, _, raters, _ in cases]) for k in x]
    np.testing.assert_allclose(y, expected, atol=1e-12)


@pytest.mark.parametrize("how", ["usual", "worse than nothing"])
def test_the_models_curve_lies_within_its_chart(drawn, how):
    cases = [make_case(name) for name in ("a1", "b2")]
    if how == "worse than nothing":
        nothing = np.zeros((2, SIDE, SIDE), bool)
        cases = [(name, image, np.concatenate([raters[:1], nothing]), ~raters) for name, image, raters, _ in cases]
    lines, axes = curves(drawn, evaluated(cases))
    assert lines["model, 95 % interval"][1].max() <= axes.get_ylim()[1]


# ---- charts ----

@pytest.mark.parametrize("cases", [
    [make_case(f"case{i}", 1 + i % 4, 40 + i) for i in range(6)],
    [make_case("case0")],
    [make_case(f"case{i}", 1, 1) for i in range(2)],
    [(f"case{i}", np.zeros((1, SIDE, SIDE)), *np.zeros((2, 3, SIDE, SIDE), bool)) for i in range(2)],
    [(f"case{i}", image, raters, raters) for i in range(2) for _, image, raters, _ in [make_case(str(i))]],
], ids=["usual", "one case", "one member each", "all empty", "perfect"])
def test_charts_can_be_drawn_of_anything(cases):
    for independent, width in ((True, 1500), (False, 750)):
        result = evaluated(cases, sizes=[2], independent=independent)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            png = plots.score_figure(result.rows, result.patients(), result.summary())
        assert Image.open(io.BytesIO(png)).size == (width, 500)


# ---- the best and the worst ----

@pytest.fixture
def titles(monkeypatch):
    """The titles of the cases on each page, in order."""
    pages = []
    monkeypatch.setattr(montage, "case_montage", lambda name, *args, **options: name)
    monkeypatch.setattr(montage, "stack", lambda names: pages.append(names) or Image.new("RGB", (1, 1)))
    return pages


@pytest.mark.parametrize("count", [1, 3, 5, 8, 9, 14])
@pytest.mark.parametrize("ranks", [1, 2])
def test_best_and_worst_are_the_ends_of_the_order_by_ged(titles, undrawn, tmp_path, monkeypatch, count, ranks):
    cases = [make_case(f"case{i}") for i in range(count)]
    order = sorted((metrics.Agreement(case[3], case[2]).ged().item(), case[0]) for case in cases)
    random.Random(count).shuffle(cases)
    parts = [evaluated([]) for _ in range(ranks)]
    for i, case in enumerate(cases):
        parts[i % ranks].add(*case)
        assert len(parts[i % ranks].shown) <= 8  # pictures of thousands of cases would fill the memory
    gather_into(parts[0], parts, monkeypatch, tmp_path)
    assert len(parts[0].shown) <= 8 and [row.case for row in parts[0].rows] == sorted(case[0] for case in cases)
    parts[0].write(tmp_path)
    expected = [name for _, name in order]
    assert titles == [expected[:4], expected[::-1][:4]]


def test_best_and_worst_show_scan_raters_and_the_first_eight_members(tmp_path):
    cases = {name: make_case(name, members=9) for name in ("a1", "b2")}
    result = evaluated(cases.values())
    result.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"scores.csv", "scores.json", "scores.png", "best.png",
                                                          "worst.png", "report.html"}
    ged = {name: metrics.Agreement(case[3], case[2]).ged().item() for name, case in cases.items()}
    pages = [montage.case_montage(*cases[name], max_members=8) for name in sorted(ged, key=ged.get)]
    for name, expected in (("best.png", pages), ("worst.png", pages[::-1])):
        with Image.open(tmp_path / name) as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(montage.stack(expected)))


# ---- what is said ----

def test_report_tells_what_was_scored_and_where_it_is_and_how_to_look_at_it(ragged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    summary = evaluated(ragged, sizes=[4]).summary()
    text = report(summary, "some/folder of mine")
    assert text.startswith("5 cases of 3 patients, 5 to 9 masks and 2 to 5 raters a case")
    files = re.findall(r"some/folder of mine/([a-z.]+)$", text, re.M)
    assert sorted(files) == ["best.png", "report.html", "scores.csv", "scores.json", "scores.png", "worst.png"]
    *_, opens, url = shlex.split(text.splitlines()[-1])
    assert opens == "webbrowser"
    assert Path(url2pathname(urlsplit(url).path)) == tmp_path / "some/folder of mine/report.html"
    assert "webbrowser" not in report(summary, "gs://bucket/folder")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[-1:] == "|"]
    first = lines.index(["members", *(name for name in NAMES if not name.startswith("rater_"))])
    assert [line[0] for line in lines[2:first]] == NAMES and lines[0][1:] == ["model", "resampled raters",
                                                                              "all background"]
    value = summary["all"]["GED"]
    assert lines[2][1] == f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    assert [line[0] for line in lines[first + 2:]] == ["4", "4 resampled raters"]
    assert lines[first + 2][1] == f"{summary['4']['GED']['mean']:.3f}"
    assert "6 masks and 3 raters a case" in report(evaluated([make_case("a1")]).summary(), "")


def test_sizes_of_sub_ensembles_are_refused_if_asked_for_and_impossible():
    assert parse_ensemble_sizes("4,16", 16) == [4, 16] and parse_ensemble_sizes("", 3) == []
    assert parse_ensemble_sizes("4,16,50", 16, required=False) == [4, 16]
    assert "--ensemble_sizes 4,17: " in refusal(parse_ensemble_sizes, "4,17", 16)
    assert "1 to 16" in refusal(parse_ensemble_sizes, "0", 16, required=False)
    assert "--ensemble_sizes 4,many" in refusal(parse_ensemble_sizes, "4,many", 16)


def test_without_matplotlib_all_but_the_charts_is_written_and_the_report_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "scores.png").write_bytes(b"of earlier scores")
    evaluation = Evaluation()
    mask = np.ones((1, 8, 8), bool)
    evaluation.add("case1", np.zeros((1, 8, 8)), mask, mask)
    summary = evaluation.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"scores.csv", "scores.json", "best.png", "worst.png",
                                                          "report.html"}
    assert 'class="figure"' not in (tmp_path / "report.html").read_text()
    said = report(summary, tmp_path)
    assert said.count("scores.png") == 1 and "scores.png needs the package matplotlib: pip install matplotlib" in said


def test_patient_pattern_must_be_a_regular_expression():
    assert "--patient_pattern a(b: " in refusal(Evaluation, patient_pattern="a(b")


# ---- a score of the user's ----

AREA = """
from guided_diffusion.metrics import SCORES
from guided_diffusion.system.flag import Flag

@SCORES.add("area_error", "area of the masks less that of the raters", [Flag("area_unit", float, 1.0, "", "scoring")])
def area_error(agreement, area_unit):
    return (agreement.area[..., :agreement.n].mean(-1) - agreement.area[..., agreement.n:].mean(-1)) / area_unit
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """plugin(text): run a file of this text as --plugin does; its scores are there until the end of the test."""
    monkeypatch.setattr(metrics.SCORES, "_entries", dict(metrics.SCORES.entries))

    def load(text):
        file = tmp_path / "mine.py"
        file.write_text(text)
        load_plugin(str(file))
        return file

    return load


def test_a_score_in_a_plugin_is_in_every_table_chart_and_file(plugin, drawn, ragged, tmp_path, monkeypatch):
    plugin(AREA)
    result = evaluated(ragged, sizes=[2], options={"area_unit": 2.0, "another flag": "x"})
    summary = result.summary()
    expected = [(predictions.sum((1, 2)).mean() - raters.sum((1, 2)).mean()) / 2 for *_, raters, predictions in ragged]
    assert summary["all"]["area_error"]["mean"] == pytest.approx(np.mean(expected))
    assert [row.score("area_error") for row in result.rows] == pytest.approx(expected)
    (tmp_path / "scores").mkdir()
    plots.score_figure(result.rows, result.patients(), summary)
    assert "area_error" in [label.get_text() for label in drawn[-1].axes[0].get_yticklabels()]
    monkeypatch.setattr(plots, "png", lambda figure: b"")
    result.write(tmp_path / "scores")
    header, rows = read_csv((tmp_path / "scores" / "scores.csv").read_text())
    assert [float(row[header.index("area_error")]) for row in rows] == pytest.approx(expected)
    assert "area_error_2" in header and list(strict_json((tmp_path / "scores" / "scores.json").read_text())["2"]) == [
        *NAMES, "area_error"]
    page = (tmp_path / "scores" / "report.html").read_text()
    assert "area_error</button>" in page and '"area_error":' in page
    assert report(summary, "").count("area_error") == 2


@pytest.mark.parametrize("body, words", [
    ("return agreement.no_such", "line 4: AttributeError: "),
    ("return agreement.area", "gave values of the shape [1, 2], not [1]"),
    ("return agreement.area.sum(-1) / 0", "not finite"),
    ("return None", "TypeError")])
def test_a_score_that_fails_is_named_with_its_file_before_anything_is_scored(plugin, body, words):
    file = plugin("from guided_diffusion.metrics import SCORES\n@SCORES.add('mine')\n"
                  f"def mine(agreement):\n    {body}\n")
    message = refusal(Evaluation)
    assert message.startswith(f"the score mine, in {file}, ") and words in message


def test_two_scores_of_one_name_are_refused_with_both_files(plugin):
    message = refusal(plugin, "from guided_diffusion.metrics import SCORES\n@SCORES.add('GED')\ndef mine(a): pass\n")
    assert message.startswith("score GED: is in ") and metrics.__file__ in message and "mine.py" in message
