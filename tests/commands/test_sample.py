"""Sampling as users run it: what a second run draws again, and what decides the masks."""

import shutil

import numpy as np
import pytest
from helpers.files import read, times, tree
from helpers.refusals import refused
from PIL import Image

from guided_diffusion import checkpoint, script_util
from guided_diffusion.commands.cli import parse_flags
from guided_diffusion.sampling import files

KINDS = ["ensemble.npz", "mean.png", "montage.png", "output0.png", "output1.png", "std.png"]  # of 2 members


def test_a_flag_of_a_method_needs_no_name_of_the_method_that_the_weights_are_of(sample, tmp_path):
    args, given = parse_flags("sampling", "", ["--spread", "False"])
    assert given == {"spread": False} and not args.spread
    for flags in ([], ["--method", "cimd"]):  # but these weights are of another
        refused(sample("results", "--spread", "False", *flags), "--spread False: is a flag of --method energy")
    assert not (tmp_path / "results").exists()


def test_sampling_again_skips_complete_cases_and_redoes_an_incomplete_one_identically(sample, tmp_path):
    results = tmp_path / "results"
    assert sample("results").code == 0
    before, written = times(results), tree(results)
    result = sample("results")
    assert result.code == 0 and "3 cases from" in result.out and "3 of them already complete" in result.out
    assert times(results) == before

    (results / "case1_output0.png").unlink()
    result = sample("results")
    assert result.code == 0 and "2 of them already complete" in result.out
    assert tree(results) == written
    changed = {name for name, when in times(results).items() if before.get(name) != when}
    assert changed == {f"case1_{kind}" for kind in KINDS}


def test_sampling_again_after_a_damaged_file_redoes_that_case(sample, tmp_path):
    sample("results")
    written = tree(tmp_path / "results")
    (tmp_path / "results" / "case2_ensemble.npz").write_bytes(b"")
    result = sample("results")
    assert result.code == 0 and "2 of them already complete" in result.out and tree(tmp_path / "results") == written


@pytest.mark.parametrize("flags", [["--seed", 1], ["--use_ddim", "True"], ["--median_blur", 3],
                                   ["--timestep_respacing", 4], ["--clip_denoised", "False"], ["--num_ensemble", 3]])
def test_sampling_again_with_other_flags_redoes_every_case(sample, tmp_path, flags):
    sample("results", "--num_samples", 2)
    written = tree(tmp_path / "results")
    result = sample("results", "--num_samples", 2, *flags)
    assert result.code == 0 and "0 of them already complete" in result.out
    after = tree(tmp_path / "results")
    assert written["case0_ensemble.npz"] != after["case0_ensemble.npz"]
    if flags[0] == "--num_ensemble":  # one more member beside the same two
        for name in ("case0_output0.png", "case1_output1.png"):
            assert written[name] == after[name]
        assert after.keys() - written.keys() == {"case0_output2.png", "case1_output2.png"}


def test_folder_of_an_earlier_release_stays_finished(sample, tmp_path, monkeypatch):
    drawing_settings = files.drawing_settings
    with monkeypatch.context() as earlier:  # whose fingerprints held the flags that only training knows
        earlier.setattr(files, "drawing_settings", lambda *args: drawing_settings(*args)[1:])
        assert sample("results", "--dropout", 0.3).code == 0
    before = times(tmp_path / "results")
    assert "3 of them already complete" in sample("results", "--dropout", 0.3).out
    assert times(tmp_path / "results") == before
    assert sample("new", "--dropout", 0.3).code == 0
    assert "3 of them already complete" in sample("new", "--use_checkpoint", "True").out


def test_another_model_or_another_scan_is_sampled_anew(sample, data, trained, tmp_path):
    sample("results")
    shutil.copytree(trained, tmp_path / "other")
    state = checkpoint.load(trained / "savedmodel.pt")
    state["out.2.bias"] += 0.1
    checkpoint.save(tmp_path / "other" / "savedmodel.pt", state)
    assert "0 of them already" in sample("results", model=tmp_path / "other" / "savedmodel.pt").out
    Image.fromarray(np.full((16, 16), 7, np.uint8)).save(data / "case1" / "image_1.png")
    assert "2 of them already" in sample("results", model=tmp_path / "other" / "savedmodel.pt").out


def test_masks_do_not_depend_on_batch_size_or_other_cases(sample, data, tmp_path):
    sample("one", "--batch_size", 1)
    sample("many", "--batch_size", 4)
    (tmp_path / "alone").mkdir()
    (data / "case2").rename(tmp_path / "alone" / "case2")
    sample("alone-results", data=tmp_path / "alone")
    for name in tree(tmp_path / "one"):
        if "output" in name:
            assert np.array_equal(read(tmp_path / "one" / name), read(tmp_path / "many" / name))
            if name.startswith("case2"):
                assert np.array_equal(read(tmp_path / "one" / name), read(tmp_path / "alone-results" / name))


def test_scans_without_labels_and_of_another_size_can_be_sampled(sample, make_cases, tmp_path):
    scans = make_cases(tmp_path / "scans", 2, raters=0, size=20)
    result = sample("results", "--fit", "crop", data=scans)
    assert result.code == 0 and result.err == ""
    for name in ("output1", "mean", "std"):
        assert read(tmp_path / "results" / f"case1_{name}.png").shape == (20, 20)
    with np.load(tmp_path / "results" / "case1_ensemble.npz") as stored:
        assert stored["samples"].shape[1:] == (20, 20)
        old = {**stored, "samples": stored["samples"][:, 2:-2, 2:-2]}  # as earlier releases wrote them
    before = read(tmp_path / "results" / "case1_output1.png")
    np.savez_compressed(tmp_path / "results" / "case1_ensemble.npz", **old)
    Image.fromarray(before[2:-2, 2:-2]).save(tmp_path / "results" / "case1_output1.png")
    assert "1 of them already complete" in sample("results", "--fit", "crop", data=scans).out
    assert np.array_equal(read(tmp_path / "results" / "case1_output1.png"), before)


def test_num_samples_takes_the_first_cases(sample, tmp_path):
    assert sample("results", "--num_samples", 1).code == 0
    assert {name.split("_")[0] for name in tree(tmp_path / "results")} == {"case0"}


def test_published_flags_may_be_given_beside_the_stored_ones(sample, tiny, tmp_path):
    assert sample("results", *tiny).code == 0
    result = sample("elsewhere", "--num_heads", 2)
    assert result.code == 2 and "--num_heads 2 (there: 1)" in result.err and not (tmp_path / "elsewhere").exists()


def test_checkpoint_without_stored_flags_takes_them_from_the_command_line(sample, trained, tiny, tmp_path):
    shutil.copy(trained / "savedmodel.pt", tmp_path / "published.pt")
    assert sample("given", *tiny, model=tmp_path / "published.pt").code == 0
    assert sample("stored").code == 0
    for name, content in tree(tmp_path / "stored").items():
        if name.endswith("png"):
            assert tree(tmp_path / "given")[name] == content


def test_batch_size_auto_takes_as_many_masks_as_there_are(run, trained, make_cases, tmp_path):
    make_cases(tmp_path / "d")
    result = run("segmentation_sample.py", "--data_dir", "d", "--model_path", trained / "savedmodel.pt", "--batch_size",
                 "auto", "--num_ensemble", 3, "--sampler", "best", "--sampling_steps", 2)
    assert result.code == 0 and "--batch_size auto: 6" in result.out, result.err
    assert len(list(tmp_path.glob("results/*_output?.png"))) == 6


def test_a_long_run_says_beforehand_how_long_and_what_is_faster(run, trained, make_cases, tmp_path, monkeypatch):
    make_cases(tmp_path / "d")
    flags = ["--data_dir", "d", "--model_path", trained / "savedmodel.pt", "--num_ensemble", 1, "--batch_size", 2]
    monkeypatch.setitem(script_util.BEST, "sampling_steps", 2)
    result = run("segmentation_sample.py", *flags, "--results_dir", "long")
    assert result.code == 0 and "this will take about 0:00:0" in result.out and "--sampler best takes 2" in result.out
    assert "this will take" not in run("segmentation_sample.py", *flags, "--sampler", "best", "--results_dir", "r").out
