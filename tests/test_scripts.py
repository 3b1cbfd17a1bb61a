"""The two scripts as users run them: what they write, what a second run does, and what they say about bad input."""

import csv
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import MODEL
from PIL import Image

from guided_diffusion import checkpoint, logger, script_util
from guided_diffusion.system import storage

TRAIN, SAMPLE = "segmentation_train.py", "segmentation_sample.py"
KINDS = ["ensemble.npz", "mean.png", "montage.png", "output0.png", "output1.png", "std.png"]  # of 2 members


def read(path):
    return np.asarray(Image.open(path))


def tree(folder):
    """Every file below a folder with its content."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def weights(path):
    return checkpoint.load(path)


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def data(make_cases, tmp_path):
    return make_cases(tmp_path / "data", count=3, raters=[2, 1, 4])


@pytest.fixture
def train(run, data, tiny):
    """train(results, *flags): 3 steps of a small model, unless the flags say otherwise."""
    def call(results, *flags):
        steps = [] if "--max_steps" in flags else ["--max_steps", 3]
        return run(TRAIN, "--data_dir", data, "--results_dir", results, "--batch_size", 2, "--num_filters", "8,16",
                   *tiny, *steps, *flags)

    return call


@pytest.fixture
def sample(run, data, trained):
    """sample(results, *flags): 2 masks a case in 3 steps each."""
    def call(results, *flags, data=data, model=trained / "savedmodel.pt"):
        return run(SAMPLE, "--data_dir", data, "--model_path", model, "--results_dir", results, "--num_ensemble", 2,
                   "--timestep_respacing", 3, *flags)

    return call


# ---- training ----

def test_training_then_sampling_writes_everything_a_user_looks_for(run, train, data, tmp_path):
    results = tmp_path / "results"
    result = train("results", "--save_interval", 2, "--log_interval", 1, "--ema_rate", "0.9,0.99",
                   "--sample_interval", 1000)
    assert result.code == 0 and result.err == ""
    expected = {"savedmodel.pt", "flags.json", "log.txt", "progress.csv", "progress.json", ".training.lock",
                "progress.png", "panel.png"}
    for step in ("000002", "000003"):
        expected |= {f"savedmodel{step}.pt", f"optsavedmodel{step}.pt", f"emasavedmodel_0.9_{step}.pt",
                     f"emasavedmodel_0.99_{step}.pt"}
    assert {path.name for path in results.iterdir()} - {"tensorboard"} == expected
    assert (results / "savedmodel.pt").read_bytes() == (results / "savedmodel000003.pt").read_bytes()
    assert not same_weights(weights(results / "savedmodel000002.pt"), weights(results / "savedmodel000003.pt"))

    log = (results / "log.txt").read_text()
    assert "--max_steps 3" in log and "3 cases" in log and "saved step 3" in log
    with open(results / "progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3"] and [row["samples"] for row in rows] == ["2", "4", "6"]
    assert all(float(row["loss"]) > 0 and float(row["kl"]) >= 0 for row in rows)
    flags = json.loads((results / "flags.json").read_text())
    assert {**MODEL, "latent_dim": 6, "kl_weight": 0.001}.items() <= flags.items() and flags["lr"] == 1e-4

    result = run(SAMPLE, "--data_dir", data, "--results_dir", "results", "--num_ensemble", 2,
                 "--timestep_respacing", 3)  # no flag of the model
    assert result.code == 0 and result.err == ""
    names = {f"case{i}_{kind}" for i in range(3) for kind in KINDS}
    assert {path.name for path in results.iterdir()} - {"tensorboard"} == expected | names
    assert "3 cases, 6 masks" in result.out and "montage" in result.out
    for i in range(3):
        with np.load(results / f"case{i}_ensemble.npz") as stored:
            samples = stored["samples"]
        assert samples.shape == (2, 16, 16) and np.isfinite(samples).all()
        for member in range(2):
            assert np.array_equal(read(results / f"case{i}_output{member}.png"), 255 * (samples[member] > 0.5))


def test_training_again_says_that_there_is_nothing_left_to_do_and_changes_no_checkpoint(train, tmp_path):
    train("results")
    before = {name: when for name, when in times(tmp_path / "results").items() if name.endswith(".pt")}
    result = train("results")
    assert result.code == 0 and result.err == ""
    assert "resumed at step 3" in result.out and "step 3 is reached already" in result.out
    after = {name: when for name, when in times(tmp_path / "results").items() if name.endswith(".pt")}
    assert after == before


def test_training_again_goes_on_as_if_it_had_never_stopped(train, tmp_path):
    assert train("whole", "--max_steps", 5).code == 0
    assert train("parts", "--max_steps", 2).code == 0
    result = train("parts", "--max_steps", 5)
    assert result.code == 0 and "resumed at step 2" in result.out
    for name in ("savedmodel000005.pt", "emasavedmodel_0.9999_000005.pt", "savedmodel.pt"):
        assert same_weights(weights(tmp_path / "whole" / name), weights(tmp_path / "parts" / name))
    log = (tmp_path / "parts" / "log.txt").read_text()
    assert log.count("command:") == 2 and "saved step 2" in log and "saved step 5" in log


def test_training_goes_on_from_a_checkpoint_elsewhere(train, tmp_path):
    train("first", "--max_steps", 2)
    before = tree(tmp_path / "first")
    result = train("second", "--max_steps", 3, "--resume_checkpoint", "first/savedmodel000002.pt")
    assert result.code == 0 and "resumed at step 2" in result.out
    assert checkpoint.steps_in(tmp_path / "second") == [3] and tree(tmp_path / "first") == before


def test_training_goes_on_from_a_checkpoint_of_the_published_code(train, trained, tmp_path):
    """It saves under the same names, but of the optimiser only the U-Net's part, in a form of its own."""
    state = weights(trained / "savedmodel.pt")
    storage.make_folder(tmp_path / "published")
    checkpoint.save(tmp_path / "published" / "savedmodel005000.pt", state)
    checkpoint.save(tmp_path / "published" / "emasavedmodel_0.9999_005000.pt", state)
    parameters = [torch.nn.Parameter(value) for value in state.values()]
    torch.save(torch.optim.AdamW(parameters).state_dict(), tmp_path / "published" / "optsavedmodel005000.pt")
    result = train("results", "--resume_checkpoint", "published/savedmodel005000.pt", "--max_steps", 5001)
    assert result.code == 0 and result.err == ""
    assert "no optsavedmodel005000.pt of this code" in result.out and "start afresh" in result.out
    moved = weights(tmp_path / "results" / "savedmodel005001.pt")
    assert all((moved[name] - value).abs().max() < 2e-4 for name, value in state.items())  # one step at lr 1e-4


@pytest.mark.parametrize("name", ["savedmodel000003.pt", "optsavedmodel000003.pt", "emasavedmodel_0.9999_000003.pt"])
def test_training_again_over_a_damaged_checkpoint_names_the_file_and_goes_on_from_the_one_before(train, tmp_path, name):
    train("results", "--max_steps", 3, "--save_interval", 2)
    path, expected = tmp_path / "results" / name, weights(tmp_path / "results" / "savedmodel000003.pt")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    result = train("results", "--max_steps", 3)
    assert result.code == 0 and f"results/{name}: is truncated, damaged" in result.out
    assert "resumed at step 2" in result.out
    assert same_weights(weights(tmp_path / "results" / "savedmodel000003.pt"), expected)


def test_training_again_over_damaged_checkpoints_alone_is_refused_by_name(train, tmp_path):
    train("results")
    before = {}
    for name in ("savedmodel000003.pt", "optsavedmodel000003.pt"):
        path = tmp_path / "results" / name
        before[path] = path.read_bytes()
        path.write_bytes(before[path][:-1000])
    refused(train("results", "--max_steps", 4), "results/savedmodel000003.pt", "results/optsavedmodel000003.pt",
            "truncated", "--results_dir", lines=3)
    assert checkpoint.steps_in(tmp_path / "results") == [3]
    for path, data in before.items():
        path.write_bytes(data)
    assert train("results", "--max_steps", 4).code == 0


def test_training_again_with_contradicting_flags_is_refused(train, tmp_path):
    train("results")
    before = tree(tmp_path / "results")
    result = train("results", "--learn_sigma", "True", "--latent_dim", 4)
    assert result.code == 2 and result.err.count("\n") == 1
    assert "--learn_sigma True (there: False)" in result.err and "--latent_dim 4 (there: 6)" in result.err
    assert tree(tmp_path / "results") == before


def test_training_another_model_or_seed_into_the_folder_of_a_run_is_refused(train, data, tiny, run, tmp_path):
    """Also by flags that are left away: the folder's are not taken instead of the defaults."""
    train("results", "--learn_sigma", "True", "--seed", 3)
    before = tree(tmp_path / "results")
    for flags, words in (([], ["--learn_sigma False (there: True)", "--seed 0 (there: 3)"]),
                         (["--learn_sigma", "True"], ["--seed 0 (there: 3)"])):
        for name in ("", "auto"):
            result = train("results", *flags, "--resume_checkpoint", name)
            assert result.code == 2 and result.err.count("\n") == 1
            assert all(word in result.err for word in (*words, "another --results_dir to start afresh"))
    assert tree(tmp_path / "results") == before
    (data / "case0").rename(data / "case9")
    refused(train("results", "--learn_sigma", "True", "--seed", 3, "--max_steps", 4), "--data_dir: holds other cases")
    (data / "case9").rename(data / "case0")
    assert train("results", "--learn_sigma", "True", "--seed", 3, "--resume_checkpoint", "auto", "--max_steps", 4,
                 "--lr", "1e-5").code == 0
    assert checkpoint.steps_in(tmp_path / "results") == [3, 4]


def test_leftovers_of_killed_processes_are_removed_and_those_of_others_left(train, tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = socket.gethostname()
    stale = [f".savedmodel000009.pt.{host}.{os.getpid()}.partial",  # of a process before with this one's number
             f".savedmodel000001.pt.{host}.{gone.pid}.partial", f".x_mean.png.{host}.{gone.pid}.partial",
             ".savedmodel.pt.elsewhere.cluster.1.partial"]
    kept = [f".savedmodel.pt.{host}.{os.getppid()}.partial", ".savedmodel.pt.elsewhere.cluster.2.partial", ".partial",
            f"savedmodel.pt.{host}.{gone.pid}.partial", ".savedmodel.pt.partial"]
    for name in stale + kept:
        (results / name).write_bytes(b"part")
    os.utime(results / stale[-1], (0, time.time() - 90000))
    assert train("results", "--max_steps", 1).code == 0
    left = {path.name for path in results.iterdir()}
    assert not left & set(stale) and set(kept) <= left


def test_a_folder_is_trained_into_by_one_run_at_a_time(train, tmp_path):
    storage.make_folder(tmp_path / "results")
    with storage.claim(tmp_path / "results"):
        refused(train("results"), "--results_dir results", "another run is training into it")
    assert train("results", "--max_steps", 1).code == 0


def test_training_goes_on_while_the_disk_is_full_and_more_room_lets_it_end_as_ever(train, disk, tmp_path):
    flags = ["--max_steps", 6, "--save_interval", 1, "--save_patience", 2, "--log_interval", 1]
    assert train("whole", *flags).code == 0
    disk("size=24m")  # room for one checkpoint and a part of the next
    result = train("results", *flags)
    assert result.code == 2 and result.err.count("\n") == 1
    assert "No space left on device" in result.err and "it goes on from step 1" in result.err
    assert "step 2 could not be saved" in result.out and "training goes on" in result.out
    assert checkpoint.steps_in("results") == [1] and not checkpoint.damages("results", 1)
    logger.close()  # as the end of its process would have
    disk("size=24m,ro")
    refused(train("results", *flags), "--results_dir results: cannot be written; give another folder")
    disk("size=200m,rw")
    assert train("results", *flags).code == 0
    for name in ("savedmodel.pt", "emasavedmodel_0.9999_000006.pt"):
        assert same_weights(weights(tmp_path / "whole" / name), weights(tmp_path / "results" / name))


def test_deterministic_training_uses_no_other_algorithms(train, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    try:
        assert train("results", "--deterministic", "True", "--schedule_sampler", "loss-second-moment").code == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_seed_decides_the_weights(train, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(name, "--max_steps", 1, "--seed", seed)
    a, b, c = (weights(tmp_path / name / "savedmodel.pt") for name in "abc")
    assert same_weights(a, b) and not same_weights(a, c)


@pytest.mark.parametrize("flags", [
    ["--learn_sigma", "True", "--rescale_learned_sigmas", "True", "--schedule_sampler", "loss-second-moment"],
    ["--use_bf16", "True", "--use_checkpoint", "True", "--dropout", "0.1", "--microbatch", "1"],
    ["--kl_weight", "0", "--predict_xstart", "True", "--noise_schedule", "cosine", "--lr_anneal_steps", "2"],
    ["--use_kl", "True", "--resblock_updown", "True", "--image_channels", "1", "--num_filters", "4"],
])
def test_every_way_to_train_gives_a_model_that_samples(run, train, data, tmp_path, flags):
    result = train("results", "--max_steps", 2, *flags)
    assert result.code == 0 and result.err == "", result.err
    result = run(SAMPLE, "--data_dir", data, "--results_dir", "results", "--num_ensemble", 2, "--num_samples", 1,
                 "--model_path", "results/emasavedmodel_0.9999_000002.pt", "--timestep_respacing", 3)
    assert result.code == 0 and result.err == "", result.err
    assert (tmp_path / "results" / "case0_output1.png").exists()


# ---- sampling ----

def test_sampling_again_skips_complete_cases_and_redoes_an_incomplete_one_identically(sample, tmp_path):
    results = tmp_path / "results"
    assert sample("results").code == 0
    before, files = times(results), tree(results)
    result = sample("results")
    assert result.code == 0 and "3 cases from" in result.out and "3 of them already complete" in result.out
    assert times(results) == before

    (results / "case1_output0.png").unlink()
    result = sample("results")
    assert result.code == 0 and "2 of them already complete" in result.out
    assert tree(results) == files
    changed = {name for name, when in times(results).items() if before.get(name) != when}
    assert changed == {f"case1_{kind}" for kind in KINDS}


def test_sampling_again_after_a_damaged_file_redoes_that_case(sample, tmp_path):
    sample("results")
    files = tree(tmp_path / "results")
    (tmp_path / "results" / "case2_ensemble.npz").write_bytes(b"")
    result = sample("results")
    assert result.code == 0 and "2 of them already complete" in result.out and tree(tmp_path / "results") == files


@pytest.mark.parametrize("flags", [["--seed", 1], ["--use_ddim", "True"], ["--median_blur", 3],
                                   ["--timestep_respacing", 4], ["--clip_denoised", "False"], ["--num_ensemble", 3]])
def test_sampling_again_with_other_flags_redoes_every_case(sample, tmp_path, flags):
    sample("results", "--num_samples", 2)
    files = tree(tmp_path / "results")
    result = sample("results", "--num_samples", 2, *flags)
    assert result.code == 0 and "0 of them already complete" in result.out
    after = tree(tmp_path / "results")
    assert files["case0_ensemble.npz"] != after["case0_ensemble.npz"]
    if flags[0] == "--num_ensemble":  # one more member beside the same two
        for name in ("case0_output0.png", "case1_output1.png"):
            assert files[name] == after[name]
        assert after.keys() - files.keys() == {"case0_output2.png", "case1_output2.png"}


def test_another_model_or_another_scan_is_sampled_anew(sample, data, trained, tmp_path):
    sample("results")
    shutil.copytree(trained, tmp_path / "other")
    state = weights(trained / "savedmodel.pt")
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
    assert read(tmp_path / "results" / "case1_output1.png").shape == (16, 16)


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


# ---- where results go ----

def test_results_go_to_the_environments_folder_and_the_flag_wins(run, data, tiny, trained, tmp_path, monkeypatch):
    flags = ["--data_dir", data, *tiny, "--max_steps", 1, "--num_filters", "8,16"]
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "from-environment"))
    assert run(TRAIN, *flags).code == 0
    assert (tmp_path / "from-environment" / "savedmodel000001.pt").exists()
    assert (tmp_path / "from-environment" / "log.txt").exists() and not (tmp_path / "results").exists()
    assert run(TRAIN, *flags, "--results_dir", tmp_path / "from-flag").code == 0
    assert (tmp_path / "from-flag" / "savedmodel000001.pt").exists() and (tmp_path / "from-flag" / "log.txt").exists()
    monkeypatch.delenv("OPENAI_LOGDIR")
    assert run(TRAIN, *flags).code == 0
    assert (tmp_path / "results" / "savedmodel000001.pt").exists()


def test_a_bucket_holds_a_whole_run(run, train, data, bucket, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "logs"))
    folder = "gs://bucket/run"
    assert train(folder, "--max_steps", 1).code == 0
    result = train(folder, "--max_steps", 2)
    assert result.code == 0 and "resumed at step 1" in result.out
    result = run(SAMPLE, "--data_dir", data, "--results_dir", folder, "--num_ensemble", 2, "--timestep_respacing", 3)
    assert result.code == 0, result.err
    again = run(SAMPLE, "--data_dir", data, "--results_dir", folder, "--num_ensemble", 2, "--timestep_respacing", 3)
    assert "3 of them already complete" in again.out
    assert {f"{folder}/{name}" for name in ("savedmodel000002.pt", "savedmodel.pt", "flags.json", "case0_montage.png",
                                            "emasavedmodel_0.9999_000001.pt", "case2_output1.png")} <= set(bucket)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "logs"]
    assert "saved step 2" in (tmp_path / "logs" / "log.txt").read_text()


# ---- bad input: exit code 2, one line, and nothing half-written ----

def refused(result, *words, lines=1):
    assert result.code == 2
    assert result.err.count("\n") == lines and result.err.endswith("\n"), result.err
    assert "Traceback" not in result.err + result.out and ": error: " in result.err
    for word in words:
        assert str(word) in result.err, result.err


def damage_data(data, how):
    """Spoil a data folder; returns what the message must say, and what it says in sampling if that differs."""
    if how == "missing":
        shutil.rmtree(data)
        return [f"--data_dir {data}", "no such folder"]
    if how == "empty":
        shutil.rmtree(data)
        data.mkdir()
        return [f"--data_dir {data}", "holds no case"]
    if how == "no image":
        (data / "case1" / "image_1.png").unlink()
        return [data / "case1", "no image"]
    if how == "truncated":
        path = data / "case1" / "image_1.jpg"
        Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path, quality=95)
        path.write_bytes(path.read_bytes()[:-40])
        (data / "case1" / "image_1.png").unlink()
        return [path, "cannot be read"]
    if how == "label of another size":
        Image.fromarray(np.zeros((8, 16), np.uint8)).save(data / "case0" / "label1_.png")
        return [data / "case0" / "label1_.png", "16 x 8 pixels", "image_0.png is 16 x 16"]
    assert how == "image of another size"
    for path in (data / "case2").iterdir():
        Image.fromarray(np.zeros((24, 32), np.uint8)).save(path)
    return [data / "case2" / "image_2.png", "32 x 24", "--image_size is 16", "--fit resize", "--fit crop"]


@pytest.mark.parametrize("how", ["missing", "empty", "no image", "truncated", "label of another size",
                                 "image of another size"])
def test_bad_data_is_refused_by_both_scripts(train, sample, data, tmp_path, how):
    words = damage_data(data, how)
    refused(train("results"), *words)
    assert not (tmp_path / "results").exists()
    refused(sample("results"), *words)  # of one bad case at the end: see test_sampling_faults.py
    assert (tmp_path / "results").exists() == (how not in ("missing", "empty"))


def test_case_without_labels_is_refused_in_training(train, data, tmp_path):
    for path in (data / "case0").glob("label*"):
        path.unlink()
    refused(train("results"), data / "case0", "no labels", "label0_.jpg")
    assert not (tmp_path / "results").exists()


def test_several_problems_make_one_line_each(train, data, tmp_path):
    words = damage_data(data, "no image") + damage_data(data, "image of another size")
    refused(train("results"), "2 problems", *words, lines=3)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("flags, words", [
    (["--image_size", 18, "--channel_mult", "1,1,1"], ["--image_size 18", "multiple of 4"]),
    (["--image_siz", 18], ["unknown flag --image_siz", "--image_size"]),
    (["--attention_resolutions", "7"], ["--attention_resolutions 7", "16, 8"]),
    (["--batch_size", 0], ["--batch_size 0"]),
    (["--class_cond", "True"], ["--class_cond"]),
    (["--num_channels", 48], ["--num_channels 48", "multiple of 32"]),
    (["--num_heads", 3], ["--num_heads 3"]),
    (["--use_fp16", "True", "--use_bf16", "True"], ["choose one"]),
    (["--timestep_respacing", 31], ["--timestep_respacing 31"]),
    (["--ngpu", 2], ["--ngpu 2", "1 process"]),
])
def test_bad_flags_are_refused_by_both_scripts(run, data, tiny, trained, tmp_path, monkeypatch, flags, words):
    if flags[0] == "--ngpu":
        monkeypatch.setenv("WORLD_SIZE", "1")  # as a launcher does; without one, processes would be started
    shutil.copy(trained / "savedmodel.pt", tmp_path / "bare.pt")
    for script, own in ((TRAIN, ["--max_steps", 1]), (SAMPLE, ["--model_path", tmp_path / "bare.pt"])):
        refused(run(script, "--data_dir", data, "--results_dir", "results", *tiny, *own, *flags), *words)
    assert not (tmp_path / "results").exists()


def test_half_precision_on_a_cpu_is_refused_with_the_alternative(train, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(train("results", "--use_fp16", "True"), "--use_fp16", "--use_bf16")
    assert not (tmp_path / "results").exists()


def spoil_checkpoint(path, how):
    """Put something in the place of a checkpoint; returns what the message must say."""
    if how == "missing":
        path.unlink()
        return ["no such file"]
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-5000])
        return ["truncated"]
    if how == "not a checkpoint":
        path.write_text("hello\n" * 100)
        return ["not a checkpoint"]
    assert how == "another architecture"
    other = script_util.create_model(**{name: value for name, value in MODEL.items() if name != "diffusion_steps"}
                                     | {"num_res_blocks": 2})
    checkpoint.save(path, other.state_dict())
    return ["another architecture", "output_blocks."]


@pytest.mark.parametrize("how", ["missing", "truncated", "not a checkpoint", "another architecture"])
def test_bad_checkpoint_is_refused_by_both_scripts(train, sample, trained, tmp_path, how):
    folder = tmp_path / "model"
    shutil.copytree(trained, folder)
    path = folder / "savedmodel.pt"
    words = spoil_checkpoint(path, how)
    refused(sample("results", model=path), f"--model_path {path}", *words)
    refused(train("results", "--resume_checkpoint", path), f"--resume_checkpoint {path}", *words)
    assert not (tmp_path / "results").exists()


def test_broken_stored_flags_are_refused_by_both_scripts(train, sample, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "model")
    path = tmp_path / "model" / "flags.json"
    path.write_text("{")
    refused(sample("results", model=tmp_path / "model" / "savedmodel.pt"), path)
    refused(train("results", "--resume_checkpoint", tmp_path / "model" / "savedmodel.pt"), path)
    assert not (tmp_path / "results").exists()


def test_nothing_to_sample_from_is_refused_by_the_path_that_was_tried(run, data, tiny, tmp_path):
    refused(run(SAMPLE, "--data_dir", data, *tiny), os.path.join("results", "savedmodel.pt"), "no such file")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("path", ["file", "file/below", "file/far/below"])
def test_results_folder_at_or_below_a_file_is_refused_by_both_scripts(train, sample, tmp_path, path):
    (tmp_path / "file").write_text("mine")
    for script in (train, sample):
        refused(script(path), f"--results_dir {path}", "another folder")
    assert (tmp_path / "file").read_text() == "mine"


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


def test_the_next_command_can_be_pasted_from_training_to_scores(run, make_cases, tmp_path, tiny):
    """What training and sampling print last runs as it stands, in folders whose names need quotes, too."""
    data = make_cases(tmp_path / "my scans" / "training", size=20)
    make_cases(tmp_path / "my scans" / "testing", count=3, size=20)
    result = run("segmentation_train.py", "--data_dir", data, "--results_dir", "my results", *tiny, "--max_steps", 1,
                 "--fit", "crop")
    for script in ("segmentation_sample.py", "segmentation_evaluate.py"):
        assert result.code == 0, result.err
        *_, word, line = result.out.strip().splitlines()
        python, path, *flags = shlex.split(line)
        assert word == "next:" and Path(path) == ROOT / "scripts" / script and Path(python).name.startswith("python")
        result = run(script, *flags)
    assert result.code == 0 and (tmp_path / "my results" / "report.html").exists()
    assert json.loads((tmp_path / "my results" / "scores.json").read_text())["cases"] == 3


@pytest.mark.parametrize("flags, words", [
    (["--val_dir", "nowhere", "--sample_interval", 9], "--val_dir nowhere: no such folder"),
    (["--val_dir", "data", "--sample_interval", 0], "--sample_interval 0"),
    (["--val_cases", 3], "--val_dir"), (["--visdom", "start", "--visdom_port", 0], "--visdom_port 0"),
    (["--visdom", "start", "--visdom_server", "https://host"], "--visdom_server")])
def test_flags_of_the_view_that_make_no_sense_are_refused(run, make_cases, tmp_path, tiny, flags, words):
    result = run("segmentation_train.py", "--data_dir", make_cases(tmp_path / "data"), *tiny, "--max_steps", 1, *flags)
    assert result.code == 2 and words in result.err, result.err
