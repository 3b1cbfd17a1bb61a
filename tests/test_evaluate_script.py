"""Masks on disk are found and read as meant, and the scripts that score them agree, or say what is wrong."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import refusal
from PIL import Image

from guided_diffusion import metrics
from guided_diffusion.data.cases import SegmentationCases, find_cases
from guided_diffusion.draw import plots
from guided_diffusion.scoring.ensemble_folder import EnsembleFolder, read_scored_case
from guided_diffusion.system import terminal
from guided_diffusion.system.errors import InputError

SCRIPT = Path(__file__).parents[1] / "scripts" / "segmentation_evaluate.py"
FILES = ["best.png", "report.html", "scores.csv", "scores.json", "scores.png", "worst.png"]


def save(path, pixels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def predict(data, folder, members=4, pattern="{case}_output{i}.png"):
    """Masks for every case of a data folder: the first rater's, moved about."""
    for case in sorted(data.iterdir()):
        mask = np.asarray(Image.open(case / "label0_.png"))
        for i in range(members):
            save(folder / pattern.format(case=case.name, i=i), np.roll(mask, (i, -i), (0, 1)))
    return folder


def tree(folder):
    return {str(path.relative_to(folder)): path.is_dir() or path.read_bytes() for path in folder.rglob("*")}


@pytest.fixture
def data(make_cases, tmp_path):
    return make_cases(tmp_path / "data", count=3, raters=[2, 1, 4])


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves scores.png empty, which takes longer than all the rest."""
    monkeypatch.setattr(plots, "score_figure", lambda *args: b"")


@pytest.fixture
def evaluate(run, data):
    """evaluate(*flags) scores the masks in "masks" and writes to "scores"."""
    return lambda *flags: run(SCRIPT.name, "--data_dir", data, "--samples_dir", "masks", "--output_dir", "scores",
                              *flags)


# ---- finding masks ----

def listed(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()
    return folder


def found(folder, pattern, *cases, **options):
    """{case: names of its members}"""
    paths = EnsembleFolder(folder, pattern).find(cases, **options)
    return {case: [str(path.relative_to(folder)) for path in members] for case, members in paths.items()}


@pytest.mark.parametrize("pattern", ["{case}_output{i}.png", "{case}/mask_{i}.png", "{i:03d}-of-{case}.jpg",
                                     "all/{case}/x{{1}}/{i:03d}.png"])
@pytest.mark.parametrize("first", [0, 1])
def test_members_are_found_in_the_order_of_their_numbers(tmp_path, pattern, first):
    names = [pattern.format(case="case1", i=i) for i in range(first, 12)]
    listed(tmp_path, *names[::-1], "case1_mean.png", "case1_output3.png.partial", "case1_output.png", "scores.csv")
    assert found(tmp_path, pattern, "case1") == {"case1": names}


@pytest.mark.parametrize("names", [("case1", "case10"), ("a", "a_output1"), ("a.c", "abc"), ("a+(b", "a[0]^$"),
                                   ("x", "x_"), ("{i}", "{case}")])
def test_masks_of_cases_with_similar_or_odd_names_are_kept_apart(tmp_path, names):
    files = {name: [f"{name}_output{i}.png" for i in range(2)] for name in names}
    assert found(listed(tmp_path, *sum(files.values(), [])), "{case}_output{i}.png", *names) == files
    folders = {name: [f"{name}/0.png"] for name in names}
    assert found(listed(tmp_path, *sum(folders.values(), [])), "{case}/{i}.png", *names) == folders


def test_a_gap_is_refused_by_case_even_if_cases_may_be_missing(tmp_path):
    listed(tmp_path, "a_output0.png", "b_output0.png", "b_output2.png")
    for skip in (False, True):
        message = refusal(found, tmp_path, "{case}_output{i}.png", "a", "b", skip_missing=skip)
        assert message.startswith("b: has member 0 and b_output2.png")


def test_cases_without_masks_are_all_named_or_left_out(tmp_path):
    listed(tmp_path, "b_output0.png")
    with pytest.raises(InputError) as caught:
        found(tmp_path, "{case}_output{i}.png", "a", "b", "c")
    first, *lines = str(caught.value).split("\n  ")
    assert first.startswith("2 problems") and lines[0].startswith("a: no masks") and lines[1].startswith("c: no masks")
    assert "a_output0.png" in lines[0] and "--skip_missing True" in lines[0]
    assert found(tmp_path, "{case}_output{i}.png", "a", "b", "c", skip_missing=True) == {"b": ["b_output0.png"]}


@pytest.mark.parametrize("skip", [False, True])
def test_a_pattern_that_matches_nothing_is_told_what_there_is(tmp_path, skip):
    folder = EnsembleFolder(tmp_path, "{case}/{i}.png")
    message = refusal(folder.find, ["a", "b"], skip)
    assert message.startswith("--pattern {case}/{i}.png: ") and message.endswith("which is empty")
    listed(tmp_path, "d.png", "a1.png", "c.png", "b.png")
    assert refusal(folder.find, ["a", "b"], skip).endswith("which holds a1.png, b.png, c.png ...")


@pytest.mark.parametrize("pattern", ["", "{case}.png", "{i}.png", "{case}{case}{i}", "{case}/{i}{i}.png", "{case}_{i",
                                     "{case}_i}", "{case}_{}", "{case.__class__}_{i}.png", "{case}_{i[0]}.png",
                                     "{i}/{case}.png", "{case}_{i}_{x}.png"])
def test_patterns_must_hold_case_and_number_once_each(tmp_path, pattern):
    assert refusal(EnsembleFolder, tmp_path, pattern).startswith(f"--pattern {pattern}: ")


@pytest.mark.parametrize("pattern", ["{case:d}/{i}.png", "{case!z}/{i}.png", "{case}_{i:zz}.png", "{case}_{i:{w}}.png",
                                     "{i}/{case}_{{i}}.png"])
def test_patterns_that_cannot_be_formatted_are_refused(tmp_path, pattern):
    message = refusal(lambda: EnsembleFolder(tmp_path, pattern).find(["a"]))
    assert message.startswith(f"--pattern {pattern}: must")


# ---- reading masks ----

MASK = np.zeros((16, 16), bool)
MASK[4:9, 3:12] = True


def scored(data, *files, fit="error", case=0):
    return read_scored_case(find_cases(data)[case], list(files), fit)


@pytest.mark.parametrize("pixels", [MASK * np.uint8(255), MASK * np.uint8(1), MASK * np.uint16(65535),
                                    MASK * np.uint16(1), MASK, MASK[..., None] * np.uint8([0, 200, 90]),
                                    MASK[..., None] * np.uint8([255, 255, 255, 255])],
                         ids=["255", "1", "16 bits", "16 bits, 1", "1 bit", "colour", "with alpha"])
def test_any_two_values_make_a_mask(data, tmp_path, pixels):
    save(tmp_path / "0.png", pixels)
    save(tmp_path / "1.png", np.full_like(pixels, pixels.max()))  # nothing but foreground
    save(tmp_path / "2.png", np.zeros_like(pixels))
    *_, predictions = scored(data, *(tmp_path / f"{i}.png" for i in range(3)))
    assert predictions.dtype == bool and np.array_equal(predictions, [MASK, ~MASK | True, MASK & False])


def test_ringing_of_a_jpeg_is_no_third_value(data, tmp_path):
    disc = np.hypot(*(np.mgrid[:16, :16] - 7.5)) < 5
    for i, mask in enumerate((disc, disc & False)):
        save(tmp_path / f"{i}.jpg", mask * np.uint8(255), quality=85)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "0.jpg")))) > 4
    *_, predictions = scored(data, tmp_path / "0.jpg", tmp_path / "1.jpg")
    assert np.array_equal(predictions, [disc, disc & False])


@pytest.mark.parametrize("name", ["m.png", "m.jpg"])
def test_probabilities_are_no_masks(data, tmp_path, name):
    save(tmp_path / name, np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16))
    message = refusal(scored, data, tmp_path / name, case=1)
    assert message.startswith(f"case1: {tmp_path / name} is no binary mask") and "one half" in message
    save(tmp_path / "m.png", MASK * np.uint8(2) + ~MASK * np.uint8(1))
    assert "holds the values 1, 2 besides 0" in refusal(scored, data, tmp_path / "m.png")


def test_masks_of_different_sizes_are_refused_by_case_and_file(data, tmp_path):
    for name, shape in (("0.png", (16, 16)), ("1.png", (8, 16)), ("2.png", (12, 12)), ("3.png", (8, 16))):
        save(tmp_path / name, np.zeros(shape, np.uint8))
    message = refusal(scored, data, tmp_path / "0.png", tmp_path / "1.png", case=2)
    assert message == f"case2: {tmp_path / '1.png'} is 16 x 8 pixels, but 0.png is 16 x 16"
    message = refusal(scored, data, tmp_path / "2.png")
    assert message.startswith(f"case0: {tmp_path / '2.png'} is 12 x 12 pixels, but its raters' masks are 16 x 16")
    assert "--fit crop or --fit resize" in message
    assert refusal(scored, data, tmp_path / "3.png", fit="resize").startswith("case0: ")


@pytest.mark.parametrize("fit", ["crop", "resize"])
def test_raters_and_scan_are_fitted_as_they_were_for_sampling(data, tmp_path, fit):
    scan = data / "case2" / "image_2.png"
    save(scan, np.asarray(Image.open(scan)) * np.uint16(200))  # of 16 bits
    save(tmp_path / "m.png", np.zeros((10, 10), np.uint8))
    save(tmp_path / "large.png", np.zeros((20, 20), np.uint8))
    expected = SegmentationCases(data, 10, image_channels=1, fit=fit)[2]
    image, raters, predictions = scored(data, tmp_path / "m.png", fit=fit, case=2)
    assert np.array_equal(raters, expected.masks) and raters.any() and predictions.shape == (1, 10, 10)
    np.testing.assert_allclose(image, expected.image, atol=1e-6)
    if fit == "crop":
        assert "--fit crop does not lead from one" in refusal(scored, data, tmp_path / "large.png", fit=fit)


@pytest.mark.parametrize("name, pixels, word", [
    ("m.tif", MASK * np.float32(0.7), "floating-point"), ("m.jpg", MASK * np.uint8(30), "black but for values up to")])
def test_foreground_is_not_lost_in_formats_that_hide_it(data, tmp_path, name, pixels, word):
    save(tmp_path / name, pixels)
    message = refusal(scored, data, tmp_path / name)
    assert name in message and word in message


def test_two_files_of_one_member_are_refused(tmp_path):
    listed(tmp_path, "a_1.png", "a_001.png")
    assert "both its member 1" in refusal(EnsembleFolder(tmp_path, "{case}_{i}.png").find, ["a"])


def test_a_tiff_of_0_and_1_is_a_mask(data, tmp_path):
    save(tmp_path / "m.tif", MASK * np.uint8(1))
    assert np.array_equal(scored(data, tmp_path / "m.tif")[2], [MASK])


# ---- the scripts ----

def test_masks_of_any_model_are_scored_by_their_pattern(evaluate, data, tmp_path, undrawn):
    predict(data, tmp_path / "masks", 5, "{case}/mask_{i:02d}.png")
    before = tree(tmp_path / "masks")
    result = evaluate("--pattern", "{case}/mask_{i:02d}.png", "--num_samples", "2")
    assert result.code == 0 and result.err == "" and tree(tmp_path / "masks") == before
    assert sorted(tree(tmp_path / "scores")) == FILES
    assert "3 cases of 3 patients, 5 masks and 1 to 4 raters" in result.out and "| GED " in result.out
    header, *rows = [line.split(",") for line in (tmp_path / "scores" / "scores.csv").read_text().splitlines()]
    for i, row in enumerate(rows):
        case = SegmentationCases(data, 16)[i]
        masks = [np.asarray(Image.open(tmp_path / "masks" / case.name / f"mask_0{k}.png")) > 0 for k in range(5)]
        expected = [score.item() for score in metrics.scores(np.stack(masks), case.masks).values()]
        assert row[0] == case.name and [float(cell) for cell in row[4:15]] == pytest.approx(expected, abs=1e-12)
    assert len(rows) == 3 and header[15] == "GED_2"


def test_scoring_says_how_far_it_is_and_then_how_to_look_at_the_scores(evaluate, data, tmp_path, undrawn, monkeypatch):
    monkeypatch.setattr(terminal, "FIRST", 0)
    predict(data, tmp_path / "masks", 2)
    result = evaluate()
    assert result.err.splitlines()[-1].startswith("scoring: 3 of 3 cases (100 %)")
    assert result.out.endswith(f"\npython -m webbrowser {(tmp_path / 'scores' / 'report.html').as_uri()}\n")
    assert f"| means and intervals    {Path('scores', 'scores.json')}\n" in result.out


def test_scores_go_beside_the_masks_by_default_and_again_over_the_old_ones(evaluate, data, tmp_path, undrawn):
    predict(data, tmp_path / "masks")
    assert evaluate("--output_dir", "").code == 0
    first = tree(tmp_path / "masks")
    assert set(FILES) < set(first) and not (tmp_path / "scores").exists()
    assert evaluate("--output_dir", "", "--num_samples", "", "--seed", 1).code == 0
    second = tree(tmp_path / "masks")
    assert second.keys() == first.keys() and second["scores.csv"] != first["scores.csv"]


def test_sampling_and_scoring_give_what_sampling_with_scores_gives(run, evaluate, undrawn, data, trained, tmp_path):
    flags = ["--data_dir", data, "--model_path", trained / "savedmodel.pt", "--num_ensemble", 5, "--batch_size", 4,
             "--timestep_respacing", 3, "--seed", 7]
    assert run("segmentation_sample.py", *flags, "--results_dir", "masks").code == 0
    assert evaluate("--seed", 7).code == 0
    result = run("segmentation_sample.py", *flags, "--results_dir", "direct", "--evaluate", "True")
    assert result.code == 0 and "3 cases of 3 patients, 5 masks" in result.out and "montage" not in result.out
    assert tree(tmp_path / "direct") == tree(tmp_path / "scores") and sorted(tree(tmp_path / "scores")) == FILES
    assert "GED_4" in (tmp_path / "scores" / "scores.csv").read_text()
    again = run("segmentation_sample.py", *flags, "--results_dir", "masks", "--evaluate", "True")
    assert "0 of them already complete" in again.out  # masks that are there may be another model's
    assert (tmp_path / "masks" / "scores.csv").read_bytes() == (tmp_path / "scores" / "scores.csv").read_bytes()


def test_sampling_with_scores_needs_raters_before_it_draws_anything(run, make_cases, trained, tmp_path):
    scans = make_cases(tmp_path / "scans", raters=[0, 0])
    result = run("segmentation_sample.py", "--data_dir", scans, "--model_path", trained / "savedmodel.pt",
                 "--results_dir", "results", "--evaluate", "True")
    assert result.code == 2 and f"{scans / 'case1'}: no labels" in result.err and result.err.count("\n") == 3
    assert result.out == "" and not (tmp_path / "results").exists()


def test_two_processes_write_what_one_writes(evaluate, make_cases, environment, data, tmp_path):
    for folder in make_cases(tmp_path / "more", 6, seed=1).iterdir():
        folder.rename(data / f"more-{folder.name}")
    predict(data, tmp_path / "masks")
    assert evaluate().code == 0
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                             SCRIPT, "--data_dir", data, "--samples_dir", "masks", "--output_dir", "two"],
                            env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("9 cases of 9 patients") == 1
    one, two = tree(tmp_path / "scores"), tree(tmp_path / "two")
    assert one == two and sorted(one) == FILES


# ---- bad input: exit code 2, a line each, and nothing written ----

def damage(how, data, masks):
    """Spoil data or masks; returns the flags to give, and what the message must say."""
    if how == "no masks":
        (masks / "case1_output0.png").unlink()
        (masks / "case1_output1.png").unlink()
        return [], ["case1: no masks to score"]
    if how == "another size":
        save(masks / "case1_output1.png", np.zeros((8, 8), np.uint8))
        return [], [f"case1: {Path('masks', 'case1_output1.png')} is 8 x 8"]
    if how == "no raters":
        (data / "case1" / "label0_.png").unlink()
        return [], [data / "case1", "no labels"]
    if how == "no binary masks":
        save(masks / "case0_output0.png", np.arange(256, dtype=np.uint8).reshape(16, 16))
        return [], ["case0: ", "case0_output0.png is no binary mask"]
    if how == "unreadable":
        (masks / "case1_output1.png").write_bytes(b"PNG")
        return [], ["case1_output1.png: cannot be read"]
    (masks.parent / "file").touch()
    return {"pattern": (["--pattern", "{case}/{i}.png"], ["--pattern {case}/{i}.png: matches no file", "masks"]),
            "samples_dir": (["--samples_dir", "gone"], ["--samples_dir gone"]),
            "output_dir": (["--output_dir", "file/x"], ["--output_dir file/x: cannot be written"]),
            "too many": (["--num_samples", "2,3"], ["--num_samples 2,3: ", "1 to 2"]),
            "too few": (["--num_samples", "0"], ["--num_samples 0: "]),
            "no numbers": (["--num_samples", "2,all"], ["--num_samples 2,all: "]),
            "patients": (["--patient_pattern", "(\\d"], ["--patient_pattern (\\d: "])}[how]


@pytest.mark.parametrize("how", ["no masks", "another size", "no raters", "no binary masks", "unreadable", "pattern",
                                 "samples_dir", "output_dir", "too many", "too few", "no numbers", "patients"])
def test_what_cannot_be_scored_is_refused_in_one_line(evaluate, data, tmp_path, how):
    masks = predict(data, tmp_path / "masks", 2)
    flags, words = damage(how, data, masks)
    before = tree(tmp_path)
    before.pop("scores", None)
    result = evaluate(*flags)
    assert result.code == 2 and result.err.count("\n") == 1 and ": error: " in result.err and result.out == ""
    assert all(str(word) in result.err for word in words), result.err
    after = tree(tmp_path)
    after.pop("scores", None)  # may be there, empty
    assert after == before


def test_all_bad_cases_are_listed_together(evaluate, data, tmp_path):
    masks = predict(data, tmp_path / "masks", 2)
    words = [word for how in ("another size", "no binary masks") for word in damage(how, data, masks)[1]]
    result = evaluate()
    assert result.code == 2 and result.err.count("\n") == 3 and "2 problems in masks:" in result.err
    assert all(str(word) in result.err for word in words) and not list((tmp_path / "scores").iterdir())


def test_missing_masks_may_be_skipped_but_no_size_of_ensemble(evaluate, data, tmp_path, undrawn):
    masks = predict(data, tmp_path / "masks", 2)
    damage("no masks", data, masks)
    result = evaluate("--skip_missing", "True")
    assert result.code == 0 and "2 cases of 2 patients" in result.out
    (masks / "case2_output1.png").unlink()
    assert "1 to 1, the fewest masks" in evaluate("--skip_missing", "True", "--num_samples", 2).err


def test_two_folders_of_one_case_name_are_refused(evaluate, data, tmp_path, undrawn):
    predict(data, tmp_path / "masks", 2)
    shutil.copytree(data / "case0", data / "a" / "b")
    shutil.copytree(data / "case0", data / "a_b")
    for i in range(2):
        shutil.copy(tmp_path / "masks" / f"case0_output{i}.png", tmp_path / "masks" / f"a_b_output{i}.png")
    result = evaluate()
    assert result.code == 2 and "names the same case" in result.err
