"""Checkpoints appear whole, come back as they were, and whatever else is found in their place is refused by name."""

import json
import multiprocessing
import os
import pickle
import random
import signal
import time
import zipfile

import pytest
import torch
from helpers.refusals import refusal
from torch import nn

from guided_diffusion import checkpoint
from guided_diffusion.system import storage
from guided_diffusion.system.errors import InputError


def network(width=3):
    torch.manual_seed(width)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 1, 1))


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- round trip and names ----

def test_what_is_saved_comes_back(tmp_path):
    state = {"step": 7, "rate": "0.99", "loss": 0.5, "nested": {"list": [torch.arange(3), None]},
             "half": torch.ones(2, dtype=torch.bfloat16)}
    checkpoint.save(tmp_path / "a.pt", state)
    back = checkpoint.load(tmp_path / "a.pt")
    assert back["step"] == 7 and back["rate"] == "0.99" and back["loss"] == 0.5
    assert torch.equal(back["nested"]["list"][0], torch.arange(3)) and back["nested"]["list"][1] is None
    assert back["half"].dtype == torch.bfloat16
    assert os.listdir(tmp_path) == ["a.pt"]


def test_model_round_trip_restores_every_weight_and_buffer(tmp_path):
    model, other = network(), network()
    model(torch.randn(2, 1, 5, 5))
    checkpoint.save(tmp_path / "a.pt", model.state_dict())
    checkpoint.load_model(other, tmp_path / "a.pt")
    assert equal(model.state_dict(), other.state_dict()) and other[1].num_batches_tracked == 1


def test_plain_torch_files_are_read_too(tmp_path):
    model = network()
    torch.save(model.state_dict(), tmp_path / "new.pt")
    torch.save(model.state_dict(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("new.pt", "old.pt"):
        assert equal(checkpoint.load(tmp_path / name), model.state_dict())


def test_names_are_the_published_ones():
    assert checkpoint.model_name(42) == "savedmodel000042.pt"
    assert checkpoint.ema_name("0.9999", 5000) == "emasavedmodel_0.9999_005000.pt"
    assert checkpoint.opt_name(1234567) == "optsavedmodel1234567.pt"
    assert checkpoint.NEWEST == "savedmodel.pt" and checkpoint.FLAGS_FILE == "flags.json"


def test_names_with_and_without_module_prefix_load(tmp_path):
    model = network()
    checkpoint.save(tmp_path / "ddp.pt", {f"module.{name}": value for name, value in model.state_dict().items()})
    other = network()
    nn.init.zeros_(other[0].weight)
    checkpoint.load_model(other, tmp_path / "ddp.pt")
    assert equal(model.state_dict(), other.state_dict())


# ---- files appear whole ----

def _write_forever(folder, ready):
    number = 0
    while True:
        number += 1
        for name in (checkpoint.model_name(1), checkpoint.NEWEST):
            checkpoint.save(storage.join(folder, name),
                            {"number": number, "weights": torch.full((400_000,), float(number))})
        if number > 1:  # files were replaced, not only written once
            ready.set()


def test_a_process_killed_while_saving_leaves_a_loadable_checkpoint(tmp_path):
    context, rng = multiprocessing.get_context("forkserver"), random.Random(0)  # one clean process forks the writers
    context.set_forkserver_preload(["guided_diffusion.checkpoint"])
    for _ in range(8):
        ready = context.Event()
        writer = context.Process(target=_write_forever, args=(str(tmp_path), ready), daemon=True)
        writer.start()
        assert ready.wait(120)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        for name in (checkpoint.NEWEST, checkpoint.model_name(1)):
            state = checkpoint.load(tmp_path / name)
            assert state["number"] > 1 and (state["weights"] == state["number"]).all()
    assert checkpoint.step_of(tmp_path / checkpoint.NEWEST) is None  # no optsavedmodel: not a whole checkpoint


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "a.pt").write_bytes(b"old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError):
        storage.write_bytes(tmp_path / "a.pt", b"new")
    assert (tmp_path / "a.pt").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.pt"]


def test_old_and_new_content_never_mix_when_a_write_is_shorter(tmp_path):
    storage.write_bytes(tmp_path / "a", b"x" * 100)
    storage.write_bytes(tmp_path / "a", b"y")
    assert (tmp_path / "a").read_bytes() == b"y" and os.listdir(tmp_path) == ["a"]


# ---- what is refused ----

@pytest.mark.parametrize("share", [0, 0.001, 0.2, 0.5, 0.9, 0.999])
def test_truncated_checkpoint_is_refused(tmp_path, share):
    path = tmp_path / "a.pt"
    checkpoint.save(path, network().state_dict())
    data = path.read_bytes()
    path.write_bytes(data[:int(len(data) * share)])
    message = refusal(checkpoint.load, path)
    assert f"--model_path {path}" in message and "truncated" in message


def test_a_flipped_bit_is_refused_or_does_no_harm(tmp_path):
    """Wherever it is: in a tensor its checksum tells, and elsewhere it is at most a date."""
    path, rng, refusals = tmp_path / "a.pt", random.Random(0), 0
    checkpoint.save(path, network().state_dict())
    data = path.read_bytes()
    expected = checkpoint.load(path)
    for _ in range(300):
        place = rng.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1:])
        try:
            assert equal(checkpoint.load(path), expected)
        except InputError as error:
            assert f"--model_path {path}: is truncated, damaged" in str(error)
            refusals += 1
    assert refusals > 100


def test_damage_to_any_file_of_a_step_is_found(tmp_path):
    names = [checkpoint.model_name(12), checkpoint.opt_name(12), checkpoint.ema_name("0.9", 12),
             checkpoint.model_name(112), checkpoint.opt_name(5), checkpoint.ema_name("0.000012", 5)]
    for name in names:
        checkpoint.save(tmp_path / name, {"a": torch.ones(3)})
    assert checkpoint.damages(tmp_path, 12) == [] and checkpoint.damages(tmp_path, 7) == []
    for name in names:
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:50])
        problems = checkpoint.damages(tmp_path, 12)
        assert len(problems) == (name in names[:3]) and all(name in problem for problem in problems)
        (tmp_path / name).write_bytes(whole)


@pytest.mark.parametrize("content", [b"", b"hello, I am text\n" * 50, b"\x80", b"\x89PNG\r\n\x1a\n" + bytes(100)])
def test_other_files_are_refused(tmp_path, content):
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    assert f"--resume_checkpoint {path}" in refusal(checkpoint.load, path, "--resume_checkpoint")


def test_other_zip_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.txt", "hello")
    assert str(path) in refusal(checkpoint.load, path)


class Attack:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("write", [
    lambda thing, path: path.write_bytes(pickle.dumps(thing, 2)),
    lambda thing, path: torch.save(thing, path),
    lambda thing, path: torch.save({"input_blocks.0.0.weight": torch.ones(2), "x": thing}, path),
    lambda thing, path: torch.save(thing, path, _use_new_zipfile_serialization=False),
])
def test_code_in_a_checkpoint_is_refused_and_never_runs(tmp_path, write):
    path, trace = tmp_path / "a.pt", tmp_path / "it-ran"
    write(Attack(f"touch '{trace}'"), path)
    assert str(path) in refusal(checkpoint.load, path)
    assert not trace.exists()
    if zipfile.is_zipfile(path):
        return
    pickle.loads(pickle.dumps(Attack(f"touch '{trace}'")))
    assert trace.exists()  # so the file could have done harm


def test_missing_file_and_folder_are_refused(tmp_path):
    path = tmp_path / "gone.pt"
    assert f"{path}: no such file" in refusal(checkpoint.load, path)
    assert f"{tmp_path}: is a folder" in refusal(checkpoint.load, tmp_path)


@pytest.mark.parametrize("state", [{}, [1, 2], {"weight": 1}, torch.ones(3), {"step": 3, "optimizer": {}}])
def test_file_without_weights_is_no_model(tmp_path, state):
    checkpoint.save(tmp_path / "a.pt", state)
    message = refusal(checkpoint.load_model, network(), tmp_path / "a.pt")
    assert "no model weights" in message and str(tmp_path / "a.pt") in message


def test_other_shape_is_refused_naming_the_first_weight_that_differs(tmp_path):
    checkpoint.save(tmp_path / "a.pt", network(5).state_dict())
    message = refusal(checkpoint.load_model, network(3), tmp_path / "a.pt")
    assert "0.weight is [5, 1, 3, 3], not [3, 1, 3, 3]" in message and "another architecture" in message


def test_missing_and_unknown_weights_are_refused_by_name_and_nothing_is_loaded(tmp_path):
    state = network().state_dict()
    state["added.bias"] = torch.ones(1)
    del state["2.weight"]
    checkpoint.save(tmp_path / "a.pt", state)
    model = network(3)
    nn.init.zeros_(model[0].weight)
    message = refusal(checkpoint.load_model, model, tmp_path / "a.pt")
    assert "1 missing (2.weight)" in message and "1 unknown (added.bias)" in message
    assert not model[0].weight.any()


# ---- which checkpoints a folder holds ----

def touch(folder, *names):
    for name in names:
        (folder / name).write_bytes(b"")


def test_only_complete_checkpoints_count_in_order_of_steps(tmp_path):
    touch(tmp_path, "savedmodel000010.pt", "optsavedmodel000010.pt", "savedmodel000002.pt", "optsavedmodel000002.pt",
          "savedmodel1000000.pt", "optsavedmodel1000000.pt",
          "savedmodel000020.pt", "optsavedmodel000030.pt",  # halves
          "savedmodel.pt", "savedmodel5.pt", "emasavedmodel_0.9_000040.pt", ".savedmodel000050.pt.7.partial")
    assert checkpoint.steps_in(tmp_path) == [2, 10, 1000000]
    assert checkpoint.steps_in(tmp_path / "nowhere") == []


def test_step_of_a_name_or_of_the_newest_beside_it(tmp_path):
    touch(tmp_path, "savedmodel000010.pt", "optsavedmodel000010.pt")
    assert checkpoint.step_of(tmp_path / "savedmodel000003.pt") == 3
    assert checkpoint.step_of(tmp_path / "emasavedmodel_0.9999_000004.pt") == 4
    assert checkpoint.step_of(tmp_path / "savedmodel.pt") == 10
    (tmp_path / "optsavedmodel000010.pt").unlink()
    assert checkpoint.step_of(tmp_path / "savedmodel.pt") is None


# ---- flags.json ----

def test_flags_round_trip(tmp_path):
    flags = {"image_size": 16, "channel_mult": "1,2", "learn_sigma": True, "kl_weight": 0.001}
    checkpoint.save_flags(tmp_path, flags)
    stored = json.loads((tmp_path / "flags.json").read_text())
    assert checkpoint.load_flags(tmp_path) == flags == {n: v for n, v in stored.items() if n != "checksum"}
    assert checkpoint.load_flags(tmp_path / "nowhere") == {}


def test_flags_with_a_flipped_byte_are_refused_and_edited_ones_taken(tmp_path):
    checkpoint.save_flags(tmp_path, {"image_size": 16, "noise_schedule": "linear", "lr": 1e-4})
    path = tmp_path / "flags.json"
    text = path.read_bytes()
    for place in range(len(text)):
        for bit in range(8):
            path.write_bytes(text[:place] + bytes([text[place] ^ 1 << bit]) + text[place + 1:])
            try:
                flags = checkpoint.load_flags(tmp_path)
            except InputError as error:
                assert str(path) in str(error)
            else:  # white space, or the name of the checksum
                assert {n: v for n, v in flags.items() if n in ("image_size", "noise_schedule", "lr")} == {
                    "image_size": 16, "noise_schedule": "linear", "lr": 1e-4}
    path.write_text('{"image_size": 32}')  # as the message says
    assert checkpoint.load_flags(tmp_path) == {"image_size": 32}


@pytest.mark.parametrize("content", [b"{", b"", b"[1, 2]", b"3", b"\xff\xfe\x00", b'{"image_size": 16'])
def test_broken_flags_are_refused_by_name(tmp_path, content):
    (tmp_path / "flags.json").write_bytes(content)
    message = refusal(checkpoint.load_flags, tmp_path)
    assert str(tmp_path / "flags.json") in message and "remove it" in message


def test_digest_tells_files_apart(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"1")
    assert storage.digest(tmp_path / "a") == storage.digest(tmp_path / "b")
    (tmp_path / "b").write_bytes(b"2")
    assert storage.digest(tmp_path / "a") != storage.digest(tmp_path / "b")


# ---- folders ----

def test_folder_is_made_with_its_parents_and_probed_without_a_trace(tmp_path):
    storage.make_folder(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and not os.listdir(tmp_path / "a" / "b")


def test_file_in_the_place_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        message = refusal(storage.make_folder, path)
        assert f"--results_dir {path}" in message
    assert (tmp_path / "file").read_text() == "mine"


# ---- buckets ----

@pytest.mark.parametrize("root", ["gs://bucket", "az://account/container"])
def test_bucket_holds_checkpoints_and_flags(bucket, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = root + "/run/1"
    model = network()
    storage.make_folder(folder)
    assert checkpoint.steps_in(folder) == [] and checkpoint.load_flags(folder) == {}
    path = storage.join(folder + "/", checkpoint.model_name(3))
    assert path == f"{folder}/savedmodel000003.pt" and storage.folder_of(path) == folder
    checkpoint.save(path, model.state_dict())
    checkpoint.save(storage.join(folder, checkpoint.opt_name(3)), {"step": 3})
    for _ in range(2):  # the second time over the first
        checkpoint.save(storage.join(folder, checkpoint.NEWEST), model.state_dict())
    checkpoint.save_flags(folder, {"image_size": 16})
    assert sorted(bucket) == [f"{folder}/{name}" for name in ("flags.json", "optsavedmodel000003.pt", "savedmodel.pt",
                                                              "savedmodel000003.pt")]
    assert checkpoint.steps_in(folder) == [3] and checkpoint.load_flags(folder) == {"image_size": 16}
    assert checkpoint.step_of(f"{folder}/savedmodel.pt") == 3
    other = network(3)
    nn.init.zeros_(other[0].weight)
    checkpoint.load_model(other, f"{folder}/savedmodel.pt")
    assert equal(model.state_dict(), other.state_dict())
    assert storage.digest(path) == storage.digest(f"{folder}/savedmodel.pt")
    assert not os.listdir(tmp_path)


def test_damaged_or_missing_object_is_refused_by_its_url(bucket):
    path = "gs://bucket/a.pt"
    assert f"{path}: no such file" in refusal(checkpoint.load, path)
    checkpoint.save(path, network().state_dict())
    bucket[path] = bucket[path][:300]
    assert path in refusal(checkpoint.load, path) and "truncated" in refusal(checkpoint.load, path)
