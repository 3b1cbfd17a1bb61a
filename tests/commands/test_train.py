"""Training as users run it: what it writes, and what a second run does."""

import csv
import json
import os
import shlex
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers.files import read, times, tree
from helpers.models import MODEL, same_weights
from helpers.processes import SAMPLE
from helpers.refusals import refused

from guided_diffusion import checkpoint, logger
from guided_diffusion.system import storage

KINDS = ["ensemble.npz", "mean.png", "montage.png", "output0.png", "output1.png", "std.png"]  # of 2 members


def test_training_then_sampling_writes_everything_a_user_looks_for(run, train, data, tmp_path):
    results = tmp_path / "results"
    result = train("results", "--save_interval", 2, "--log_interval", 1, "--ema_rate", "0.9,0.99",
                   "--sample_interval", 1000)
    assert result.code == 0 and result.err == ""
    expected = {"savedmodel.pt", "flags.json", "log.txt", "progress.csv", "progress.json", "progress.png", "panel.png"}
    for step in ("000002", "000003"):
        expected |= {f"savedmodel{step}.pt", f"optsavedmodel{step}.pt", f"emasavedmodel_0.9_{step}.pt",
                     f"emasavedmodel_0.99_{step}.pt"}
    assert {path.name for path in results.iterdir()} - {"tensorboard"} == expected
    assert (results / "savedmodel.pt").read_bytes() == (results / "savedmodel000003.pt").read_bytes()
    second, third = (checkpoint.load(results / f"savedmodel00000{step}.pt") for step in (2, 3))
    assert not same_weights(second, third)

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
    augment = ["--augment", "flips,rot90,shift,intensity"]
    assert train("whole", "--max_steps", 5, *augment).code == 0
    assert train("parts", "--max_steps", 2, *augment).code == 0
    result = train("parts", "--max_steps", 5, *augment)
    assert result.code == 0 and "resumed at step 2" in result.out
    for name in ("savedmodel000005.pt", "emasavedmodel_0.9999_000005.pt", "savedmodel.pt"):
        assert same_weights(checkpoint.load(tmp_path / "whole" / name), checkpoint.load(tmp_path / "parts" / name))
    log = (tmp_path / "parts" / "log.txt").read_text()
    assert log.count("command:") == 2 and "saved step 2" in log and "saved step 5" in log


def test_training_says_where_the_best_weights_are_and_sampling_takes_them(train, data, run, tmp_path):
    result = train("results", "--val_dir", data, "--sample_interval", 1, "--max_steps", 2)
    assert result.code == 0 and result.err == ""
    step = checkpoint.best_facts(tmp_path / "results" / checkpoint.BEST)["step"]
    assert f"step {step} has the best GED_unbiased of the validation cases so far" in result.out
    assert f"best on --val_dir, step {step}" in result.out
    assert "drawing the 3 validation cases takes 336 network calls every 1 steps, about 98 % of the time" in result.out
    words = shlex.split(result.out.splitlines()[-1])[2:]
    assert words[words.index("--model_path") + 1] == os.path.join("results", checkpoint.BEST)
    words[words.index("--num_ensemble") + 1] = 1
    assert run(SAMPLE, *words).code == 0 and (tmp_path / "results" / "case0_output0.png").exists()


def test_training_goes_on_from_a_checkpoint_elsewhere(train, tmp_path):
    train("first", "--max_steps", 2)
    before = tree(tmp_path / "first")
    result = train("second", "--max_steps", 3, "--resume_checkpoint", "first/savedmodel000002.pt")
    assert result.code == 0 and "resumed at step 2" in result.out
    assert checkpoint.steps_in(tmp_path / "second") == [3] and tree(tmp_path / "first") == before


def test_training_goes_on_from_a_checkpoint_of_the_published_code(train, trained, tmp_path):
    """It saves under the same names, but of the optimiser only the U-Net's part, in a form of its own."""
    state = checkpoint.load(trained / "savedmodel.pt")
    storage.make_folder(tmp_path / "published")
    checkpoint.save(tmp_path / "published" / "savedmodel005000.pt", state)
    checkpoint.save(tmp_path / "published" / "emasavedmodel_0.9999_005000.pt", state)
    parameters = [torch.nn.Parameter(value) for value in state.values()]
    torch.save(torch.optim.AdamW(parameters).state_dict(), tmp_path / "published" / "optsavedmodel005000.pt")
    result = train("results", "--resume_checkpoint", "published/savedmodel005000.pt", "--max_steps", 5001)
    assert result.code == 0 and result.err == ""
    assert "no optsavedmodel005000.pt of this code" in result.out and "start afresh" in result.out
    moved = checkpoint.load(tmp_path / "results" / "savedmodel005001.pt")
    assert all((moved[name] - value).abs().max() < 2e-4 for name, value in state.items())  # one step at lr 1e-4


@pytest.mark.parametrize("name", ["savedmodel000003.pt", "optsavedmodel000003.pt", "emasavedmodel_0.9999_000003.pt"])
def test_training_again_over_a_damaged_checkpoint_names_the_file_and_goes_on_from_the_one_before(train, tmp_path, name):
    train("results", "--max_steps", 3, "--save_interval", 2)
    path, expected = tmp_path / "results" / name, checkpoint.load(tmp_path / "results" / "savedmodel000003.pt")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    result = train("results", "--max_steps", 3)
    assert result.code == 0 and f"results/{name}: is truncated, damaged" in result.out
    assert "resumed at step 2" in result.out
    assert same_weights(checkpoint.load(tmp_path / "results" / "savedmodel000003.pt"), expected)


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
        assert same_weights(checkpoint.load(tmp_path / "whole" / name), checkpoint.load(tmp_path / "results" / name))


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
    a, b, c = (checkpoint.load(tmp_path / name / "savedmodel.pt") for name in "abc")
    assert same_weights(a, b) and not same_weights(a, c)


@pytest.mark.parametrize("flags", [
    ["--learn_sigma", "True", "--rescale_learned_sigmas", "True", "--schedule_sampler", "loss-second-moment"],
    ["--use_bf16", "True", "--use_checkpoint", "True", "--dropout", "0.1", "--microbatch", "1"],
    ["--kl_weight", "0", "--predict_xstart", "True", "--noise_schedule", "cosine", "--lr_anneal_steps", "2"],
    ["--use_kl", "True", "--resblock_updown", "True", "--image_channels", "1", "--num_filters", "4"],
    ["--prediction", "v", "--learn_sigma", "True", "--noise_schedule", "cosine"],
])
def test_every_way_to_train_gives_a_model_that_samples(run, train, data, tmp_path, flags):
    result = train("results", "--max_steps", 2, *flags)
    assert result.code == 0 and result.err == "", result.err
    result = run(SAMPLE, "--data_dir", data, "--results_dir", "results", "--num_ensemble", 2, "--num_samples", 1,
                 "--model_path", "results/emasavedmodel_0.9999_000002.pt", "--timestep_respacing", 3)
    assert result.code == 0 and result.err == "", result.err
    assert (tmp_path / "results" / "case0_output1.png").exists()


def test_scans_larger_than_the_model_are_trained_on_by_windows_and_drawn_by_tiles(run, train, make_cases, tmp_path):
    scans = make_cases(tmp_path / "large", 3, size=40)
    result = train("results", "--data_dir", scans, "--fit", "tile", "--window", "lesion", "--val_dir", scans,
                   "--val_cases", 2, "--sample_interval", 3)
    assert result.code == 0 and "val_GED_16" in result.out, result.err
    result = run("segmentation_sample.py", "--data_dir", scans, "--num_ensemble", 1, "--sampler", "best",
                 "--sampling_steps", 2, "--fit", "tile", "--batch_size", "auto")
    assert result.code == 0 and "the largest by 16" in result.out, result.err
    assert read(tmp_path / "results" / "case0_output0.png").shape == (40, 40)
    refused(train("other", "--window", "lesion"), "--window lesion: is for scans larger", "--fit tile")
