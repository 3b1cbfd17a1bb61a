"""Bad input to training and sampling: exit code 2, one line, and nothing half-written."""

import os
import shutil

import numpy as np
import pytest
import torch
from helpers.models import MODEL
from helpers.processes import SAMPLE, TRAIN
from helpers.refusals import refused
from PIL import Image

from guided_diffusion import checkpoint, script_util


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
    (["--predict_xstart", "True", "--prediction", "v"], ["--predict_xstart True and --prediction v: choose one"]),
    (["--rescale_learned_sigmas", "True"], ["--rescale_learned_sigmas True", "--learn_sigma True"]),
    (["--num_head_channels", 16], ["--num_heads 1: has no effect with --num_head_channels"]),
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
    other, _ = script_util.create_model_and_diffusion(**MODEL | {"num_res_blocks": 2})
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
def test_results_or_cache_folder_at_or_below_a_file_is_refused_by_both_scripts(train, sample, tmp_path, path):
    (tmp_path / "file").write_text("mine")
    for script in (train, sample):
        refused(script(path), f"--results_dir {path}", "another folder")
        refused(script("results", "--cache_dir", path), f"--cache_dir {path}", "another folder")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("flags, words", [
    (["--augment", "flips,mirror"], "--augment flips,mirror: there is no 'mirror'; there are flips,rot90,shift"),
    (["--init", "nowhere.pt"], "--init nowhere.pt: no such file"),
    (["--shard", "True"], "--shard True: there is one process"),
    (["--init", "a.pt", "--resume_checkpoint", "b000001.pt"], "--resume_checkpoint and --init: choose one"),
    (["--resume_checkpoint", "results/savedmodel_best.pt"], "start a new run with --init"),
    (["--lr_warmup", -1], "--lr_warmup -1: must be at least 0")])
def test_flags_of_training_that_make_no_sense_are_refused(train, tmp_path, flags, words):
    refused(train("results", *flags), words)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("flags, words", [
    (["--val_dir", "nowhere", "--sample_interval", 9], "--val_dir nowhere: no such folder"),
    (["--val_dir", "data", "--sample_interval", 0], "--sample_interval 0"),
    (["--val_cases", 3], "--val_dir"), (["--visdom", "start", "--visdom_port", 0], "--visdom_port 0"),
    (["--visdom", "start", "--visdom_server", "https://host"], "--visdom_server"),
    (["--visdom", "connect", "--visdom_port", 0], "--visdom connect and --visdom_port 0: choose one"),
    (["--visdom", "off", "--visdom_port", 8000], "--visdom off and --visdom_port 8000: choose one"),
    (["--visdom", "off", "--visdom_server", "https://host"], "--visdom off and --visdom_server https://host: choose"),
    (["--visdom_server", "https://host", "--visdom_port", 0], "--visdom_port 0: choose one")])
def test_flags_of_the_view_that_make_no_sense_are_refused(run, make_cases, tmp_path, tiny, flags, words):
    result = run("segmentation_train.py", "--data_dir", make_cases(tmp_path / "data"), *tiny, "--max_steps", 1, *flags)
    assert result.code == 2 and words in result.err, result.err
