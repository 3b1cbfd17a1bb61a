"""Cases are prepared whatever is broken in between, no unit twice, and into one part of a split for each patient."""

import json
import shutil

import numpy as np
import pytest
from helpers.files import tree
from helpers.refusals import refusal

from guided_diffusion.data import manifest
from guided_diffusion.prepare.folder import JOURNAL
from guided_diffusion.prepare.runner import Job, estimate, prepare, said


@pytest.fixture
def job(listed, tmp_path):
    """job(*lines, **fields) -> a Job of these lines."""
    def make(*lines, **fields):
        path = tmp_path / "list.txt"
        path.write_text("\n".join(lines))
        return Job("listed", path, **{"flags": {}, **fields})

    return make


def places(out):
    return sorted(str(path.parent.relative_to(out)) for path in out.rglob("image_0.png"))


def test_the_folders_are_those_that_training_reads_and_the_manifest_says_what_is_known(job, tmp_path, prepared):
    outcome = prepare(job("u1 p1 a b", "u2 p2 c"), tmp_path / "out")
    cases = prepared(tmp_path / "out")
    assert [*cases] == ["a", "b", "c"] and outcome.units == 2 and not outcome.parts
    image, raters, row = cases["a"]
    assert image.shape == (1, 4, 6) and raters.shape == (2, 4, 6) and raters.all()
    assert {name: row[name] for name in ("part", "patient", "source", "spacing", "slice", "raters", "areas")} == {
        "part": "", "patient": "p1", "source": "listed", "spacing": "0.5 0.7", "slice": "3", "raters": "2",
        "areas": "24 24"}


def test_one_broken_unit_stops_nothing_and_all_that_is_left_out_is_listed(job, tmp_path):
    outcome = prepare(job("- is", "u1 p1 a !input", "u2 p1 !left b", "u3 p2 !error", "u4 p2 c"), tmp_path / "out")
    assert places(tmp_path / "out") == ["b", "c"]
    assert [said(left) for left in outcome.left_out] == [
        "-: is no unit", "u1: is broken; mend it", "u2: left", "u3: cannot be read (ValueError: of a library)"]
    assert (tmp_path / "out" / "left_out.csv").read_text().splitlines()[2] == "u1,is broken; mend it"


def test_what_was_stopped_goes_on_and_does_nothing_twice(job, listed, tmp_path):
    lines = ["u1 p1 a !left", "u2 p1 !input", "u3 p2 b !stop", "u4 p3 c"]
    with pytest.raises(KeyboardInterrupt):
        prepare(job(*lines), tmp_path / "out")
    lines[2] = "u3 p2 b"
    (tmp_path / "out" / "b").mkdir()  # as if it had been killed between a case and its line in the journal
    outcome = prepare(job(*lines), tmp_path / "out")
    assert listed.seen == ["u1", "u2", "u3", "u2", "u3", "u4"]  # what was broken is tried again
    assert outcome.done_before == 1 and places(tmp_path / "out") == ["a", "b", "c"]
    assert [said(left) for left in outcome.left_out] == ["u1: left", "u2: is broken; mend it"]

    prepare(job(*lines), tmp_path / "whole")
    names = manifest.FILE, "left_out.csv"
    assert all(tree(tmp_path / "out")[name] == tree(tmp_path / "whole")[name] for name in names)
    listed.seen.clear()
    before = tree(tmp_path / "out")
    prepare(job(*lines), tmp_path / "out")
    assert listed.seen == ["u2"] and tree(tmp_path / "out") == before


def test_a_journal_that_was_cut_off_is_read_up_to_there(job, listed, tmp_path):
    prepare(job("u1 p1 a", "u2 p2 b"), tmp_path / "out")
    journal = tmp_path / "out" / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-20])
    listed.seen.clear()
    prepare(job("u1 p1 a", "u2 p2 b"), tmp_path / "out")
    assert listed.seen == ["u2"] and places(tmp_path / "out") == ["a", "b"]


def test_other_options_and_folders_of_others_are_refused_by_name(job, tmp_path):
    prepare(job("u1 p1 a", "u2 p2 b", flags={"grey": 1}), tmp_path / "out")
    message = refusal(prepare, job("u1 p1 a", "u2 p2 b", flags={"grey": 2}), tmp_path / "out")
    assert "--grey 2 (there: 1)" in message and str(tmp_path / "out") in message
    assert "--folds 2 (there: 0)" in refusal(prepare, job("u1 p1 a", "u2 p2 b", flags={"grey": 1}, folds=2),
                                             tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    assert "holds notes.txt" in refusal(prepare, job("u1 p1 a"), tmp_path / "mine")


@pytest.mark.parametrize("name", ["..", "a/b", ".hidden", "x" * 201, "manifest.csv", "a\tb"])
def test_two_cases_of_one_name_and_names_that_no_folder_can_have_are_left_out(job, listed, tmp_path, monkeypatch, name):
    cases = listed.cases
    monkeypatch.setattr(listed, "cases", lambda self, unit: (
        case._replace(name=name) if case.name == "odd" else case for case in cases(self, unit)))
    outcome = prepare(job("u1 p1 a a", "u2 p2 a odd"), tmp_path / "out")
    assert places(tmp_path / "out") == ["a"] and len(outcome.rows) == 1
    twice, other, odd = map(said, outcome.left_out)
    assert "names its case a, as u1 does" in twice and "names its case a, as u1 does" in other and "u2: " in odd


def test_a_split_parts_patients_and_not_their_cases(job, tmp_path):
    lines = [f"u{i} p{i // 2} case{i}" for i in range(40)]
    outcome = prepare(job(*lines, split="60:20:20", seed=3), tmp_path / "out")
    split = json.loads((tmp_path / "out" / "split.json").read_text())
    assert [(part, len(names["patients"])) for part, names in split["parts"].items()] == [
        ("train", 12), ("val", 4), ("test", 4)]
    for place in places(tmp_path / "out"):
        part, case = place.split("/")
        assert outcome.parts[f"p{int(case[4:]) // 2}"] == part and case in split["parts"][part]["cases"]
    again = prepare(job(*lines, split="60:20:20", seed=3), tmp_path / "again")
    other = prepare(job(*lines, split="60:20:20", seed=4), tmp_path / "other")
    assert again.parts == outcome.parts != other.parts
    more = prepare(job(*lines, *(f"v{i} q{i} new{i}" for i in range(10)), split="60:20:20", seed=3), tmp_path / "out")
    assert more.parts.items() > outcome.parts.items()  # patients that came later move no others


def test_folds_are_folders_to_validate_on_with_links_to_train_on(job, tmp_path, prepared):
    prepare(job(*(f"u{i} p{i} case{i}" for i in range(6)), folds=3), tmp_path / "out")
    for fold in range(1, 4):
        inside, others = (prepared(tmp_path / "out" / name) for name in (f"fold{fold}", f"without_fold{fold}"))
        assert len(inside) == 2 and len(others) == 4
        patients = [{row["patient"] for *_, row in cases.values()} for cases in (inside, others)]
        assert not patients[0] & patients[1] and len(patients[0] | patients[1]) == 6


@pytest.mark.parametrize("fields, message", [
    ({"split": "60:40"}, "--split 60:40"), ({"split": "a:b:c"}, "--split a:b:c"),
    ({"split": "-1:1:1"}, "--split -1:1:1"),
    ({"split": "0:0:0"}, "--split 0:0:0"), ({"split": "1:1:1", "folds": 2}, "--folds"), ({"folds": 1}, "--folds 1"),
    ({"split": "60:20:20"}, "too few"), ({"folds": 3}, "too few")])
def test_splits_that_cannot_be_are_refused(job, tmp_path, fields, message):
    assert message in refusal(prepare, job("u1 p1 a", "u2 p2 b", **fields), tmp_path / "out")
    assert prepare(job("u1 p1 a", "u2 p2 b"), tmp_path / "out").rows  # and the folder takes other options


def test_a_split_of_the_source_is_kept_unless_a_patient_is_on_both_sides(job, listed, tmp_path, monkeypatch):
    units = listed.units
    monkeypatch.setattr(listed, "units", lambda self: (unit._replace(part=unit.name[:-1]) for unit in units(self)))
    outcome = prepare(job("train1 p1 a", "val1 p2 b", "train2 p1 c"), tmp_path / "out")
    assert places(tmp_path / "out") == ["train/a", "train/c", "val/b"] and outcome.parts == {"p1": "train", "p2": "val"}
    both = job("train1 p1 a", "val1 p1 b")
    assert "patient p1 both in train and in val" in refusal(prepare, both, tmp_path / "both")
    prepare(both._replace(split="1:0:0"), tmp_path / "anew")
    assert places(tmp_path / "anew") == ["train/a", "train/b"]


def test_an_estimate_is_exact_where_it_sees_everything_and_writes_nothing_else(job, tmp_path):
    one = job(*(f"u{i} p{i} a{i} b{i}" for i in range(5)), split="3:1:1")
    outcome = estimate(one, tmp_path / "sample")
    prepare(one, tmp_path / "out")
    pictures = [path for path in (tmp_path / "out").rglob("*.png")]
    assert outcome.cases == 10 and outcome.size >= 4096 * len(pictures)
    many = estimate(job(*(f"u{i} p{i} a{i} b{i}" for i in range(800))), tmp_path / "more")
    assert many.cases == 1600 and len(many.rows) == 16


def test_nothing_at_all_is_refused(job, tmp_path):
    assert "holds nothing to prepare as listed" in refusal(prepare, job("- is"), tmp_path / "out")
    assert "nothing of it became a case (u1: left)" in refusal(prepare, job("u1 p1 !left"), tmp_path / "out")


def test_a_full_disk_ends_the_run_and_blames_no_input(job, tmp_path, monkeypatch):
    from PIL import Image

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", full)
        message = refusal(prepare, job("u1 p1 a", "u2 p2 b"), tmp_path / "out")
    assert "No space left on device" in message and "go on" in message
    assert len(prepare(job("u1 p1 a", "u2 p2 b"), tmp_path / "out").rows) == 2


PLUGIN = """
import os
import numpy as np
from guided_diffusion.prepare import SOURCES
from guided_diffusion.prepare.base import PreparedCase, Source, Unit

@SOURCES.add("deadly", "ends the process that reads it")
class Deadly(Source):
    def units(self):
        return (Unit(name, name) for name in "abc")

    def cases(self, unit):
        if unit.name == "b":
            os._exit(1)
        yield PreparedCase(unit.name, np.full((1, 4, 4), ord(unit.name), np.uint8), np.ones((1, 4, 4), bool), {})
"""


@pytest.mark.long
def test_other_processes_do_the_same_and_one_that_dies_costs_its_unit_alone(tmp_path, monkeypatch, prepared, listed):
    from guided_diffusion.system.registry import load_plugin

    plugin = tmp_path / "deadly.py"
    plugin.write_text(PLUGIN)
    load_plugin(str(plugin))
    outcome = prepare(Job("deadly", tmp_path, {}, [str(plugin)], workers=2), tmp_path / "out")
    assert [row["case"] for row in outcome.rows] == ["a", "c"]
    assert [left.what for left in outcome.left_out] == ["b"] and "process" in outcome.left_out[0].reason
    assert {name: int(image[0, 0, 0]) for name, (image, *_) in prepared(tmp_path / "out").items()} == {
        "a": 97, "c": 99}


@pytest.mark.parametrize("image", [np.zeros((3, 5, 4), np.uint8), np.zeros((3, 5, 4), np.uint16),
                                   np.zeros((2, 5, 4), np.uint8), np.zeros((1, 5, 4), np.uint16)])
def test_every_kind_of_image_comes_back_exactly(job, listed, tmp_path, monkeypatch, prepared, image):
    rng = np.random.default_rng(0)
    image = rng.integers(0, np.iinfo(image.dtype).max, image.shape, image.dtype, endpoint=True)
    raters = rng.random((7, 5, 4)) > 0.5
    cases = listed.cases
    monkeypatch.setattr(listed, "cases", lambda self, unit: (
        case._replace(image=image, raters=raters) for case in cases(self, unit)))
    prepare(job("u1 p1 a"), tmp_path / "out")
    (found, masks, _), = prepared(tmp_path / "out").values()
    assert np.array_equal(found, image) and found.dtype == image.dtype and np.array_equal(masks, raters)
    assert len(list((tmp_path / "out" / "a").glob("image_*"))) == (1 if image.dtype == np.uint8 and len(image) == 3
                                                                   else len(image))


@pytest.mark.parametrize("wrong", [{"image": np.zeros((4, 6), np.uint8)}, {"image": np.zeros((1, 4, 6))},
                                   {"raters": np.ones((2, 4, 5), bool)}, {"raters": np.ones((0, 4, 6), bool)},
                                   {"raters": np.ones((2, 4, 6))}])
def test_a_source_that_gives_something_else_is_told_so(job, listed, tmp_path, monkeypatch, wrong):
    cases = listed.cases
    monkeypatch.setattr(listed, "cases", lambda self, unit: (case._replace(**wrong) for case in cases(self, unit)))
    assert "its image is" in (message := refusal(prepare, job("u1 p1 a"), tmp_path / "out")) or "masks are" in message


def test_two_folders_that_share_a_patient_are_told_from_each_other_by_their_manifests(job, tmp_path):
    from guided_diffusion.data.case_files import find_cases

    out = tmp_path / "out"
    prepare(job(*(f"u{i} p{i} case{i}" for i in range(4)), split="2:1:1", seed=1), out)
    train, val, test = (find_cases(out / part) for part in ("train", "val", "test"))
    manifest.refuse_shared(train, val, "a", "b")
    shutil.copytree(out / "train" / train[0].name, out / "val" / train[0].name)  # without a row: nothing is known
    manifest.refuse_shared(train, find_cases(out / "val"), "a", "b")
    prepare(job(*(f"u{i} p{i} case{i}" for i in range(4))), tmp_path / "whole")
    message = refusal(manifest.refuse_shared, train, find_cases(tmp_path / "whole"), "one", "other")
    assert "--val_dir other: shares patient p" in message and "--data_dir one" in message
    (out / "manifest.csv").write_text("my,own\n1,2\n")
    manifest.refuse_shared(train, find_cases(tmp_path / "whole"), "one", "other")
