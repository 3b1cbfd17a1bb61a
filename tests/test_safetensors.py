"""A safetensors file holds all that draws and says what it is; what is damaged in it is refused by name."""

import hashlib
import json
import random
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.models import MODEL, MeanOutline, WithFrozenEncoder, assert_same, make_cimd, weights
from helpers.refusals import refusal
from torch import nn

from guided_diffusion import Segmenter, checkpoint
from guided_diffusion.flags import defaults, identity_flags
from guided_diffusion.methods import METHODS
from guided_diffusion.script_util import create_method, drawing_flags
from guided_diffusion.system.errors import InputError

FLAGS = {"image_size": 16, "noise_schedule": "linear"}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def network(width=3):
    torch.manual_seed(width)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Conv2d(width, 1, 1))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a.safetensors"


def test_float32_comes_back_to_the_last_bit_with_whole_numbers_and_frozen_parts(path):
    counted = network()
    counted(torch.randn(2, 1, 5, 5))  # its batch norm counts batches
    for model in (counted, WithFrozenEncoder(), MeanOutline().model, make_cimd().model):
        before = weights(model)
        assert checkpoint.export(path, model, FLAGS, torch.float32) == 0
        with torch.no_grad():
            for value in model.state_dict().values():
                value.zero_()
        checkpoint.load_model(model, path)  # with no frozenmodel.pt beside it
        assert_same(weights(model), before)


def test_half_precision_takes_half_the_bytes_and_float16_rounds_less(path):
    model = make_cimd().model
    moved, sizes = {}, {}
    for dtype in DTYPES:
        moved[dtype] = checkpoint.export(path, model, FLAGS, dtype)
        sizes[dtype] = path.stat().st_size
        other = make_cimd(seed=1).model
        checkpoint.load_model(other, path)
        before, after = (torch.cat([p.flatten() for p in net.parameters()]) for net in (model, other))
        assert ((after - before).norm() / before.norm()).item() == pytest.approx(moved[dtype], rel=1e-3, abs=1e-12)
    assert moved[torch.float16] < moved[torch.bfloat16] / 6 < 1e-3
    assert sizes[torch.float16] == pytest.approx(sizes[torch.float32] / 2, rel=0.1)


def test_what_float16_cannot_hold_is_refused_and_bfloat16_takes_it(path):
    model = network()
    with torch.no_grad():
        model[2].weight[0, 0] = 1e5
    message = refusal(checkpoint.export, path, model, FLAGS)
    assert message.startswith("--dtype float16: cannot hold 2.weight, which reaches 1e+05") and not path.exists()
    assert checkpoint.export(path, model, FLAGS, torch.bfloat16) > 0


def test_the_same_network_gives_the_same_bytes_and_a_checksum_as_sha256sum_writes_it(path):
    facts, written = {"step": "7", "data": "none", "licence": "MIT"}, set()
    for _ in range(5):
        checkpoint.export(path, network(), FLAGS, facts=facts)
        written.add(path.read_bytes())
    data, = written
    assert path.with_suffix(".sha256").read_text() == f"{hashlib.sha256(data).hexdigest()}  a.safetensors\n"
    said = checkpoint.metadata_of(path)
    assert {name: said[name] for name in facts} == facts and said["format"] == "pt"
    with safetensors.safe_open(path, "pt") as file:  # any other reader sees the same
        assert file.metadata() == said and set(file.keys()) == network().state_dict().keys()


@pytest.mark.parametrize("name", METHODS)
def test_every_method_draws_the_same_from_its_export(name, tmp_path):
    every = defaults(*{flag.group for table in (METHODS,) for flag in table.flags()}, "model", "encoders", "diffusion",
                     "files and processes")
    args = drawing_flags(SimpleNamespace(**{**every, **MODEL, "method": name}))
    torch.manual_seed(0)
    model = create_method(args, training=False).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    flags = {flag.name: getattr(args, flag.name) for flag in identity_flags()}
    checkpoint.save(tmp_path / "savedmodel.pt", model.state_dict())
    checkpoint.save_flags(tmp_path, flags)
    checkpoint.export(tmp_path / "away.safetensors", model, flags, torch.float32)
    (tmp_path / "moved").mkdir()
    (tmp_path / "away.safetensors").rename(tmp_path / "moved" / "away.safetensors")
    image = np.random.default_rng(0).random((16, 16))
    drawn = [Segmenter.load(path, device="cpu").sample(image, 3, steps=2).samples
             for path in (tmp_path, tmp_path / "moved" / "away.safetensors")]
    assert np.array_equal(*drawn) and drawn[0].std() > 0


def test_flags_come_from_the_file_itself_and_from_the_folder_where_it_has_none(path, tmp_path):
    checkpoint.save_flags(tmp_path, {"image_size": 32})
    checkpoint.export(path, network(), FLAGS)
    assert checkpoint.flags_of(path) == (FLAGS, str(path))
    safetensors.torch.save_file(network().state_dict(), path)  # of another program
    assert checkpoint.flags_of(path) == ({"image_size": 32}, str(tmp_path))
    assert checkpoint.flags_of(tmp_path / "savedmodel.pt") == ({"image_size": 32}, str(tmp_path))
    other = network()
    nn.init.zeros_(other[0].weight)
    checkpoint.load_model(other, path)
    assert_same(weights(other), weights(network()))
    (tmp_path / "optsavedmodel000003.pt").touch()
    (tmp_path / "savedmodel000003.pt").touch()
    assert checkpoint.step_of(tmp_path / "savedmodel.pt") == 3 and checkpoint.step_of(path) is None


# ---- what is refused ----

def rewritten(data, change):
    """The bytes of a file after change(header), a dict, in place."""
    length, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length:]


def test_a_flipped_bit_is_refused_or_does_no_harm(path):
    checkpoint.export(path, network(), FLAGS, torch.float32)
    data, rng, refusals = path.read_bytes(), random.Random(0), 0
    expected = weights(network())
    for _ in range(400):
        place = rng.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1:])
        try:
            flags, _ = checkpoint.flags_of(path)
            model = network(3)
            checkpoint.load_model(model, path)
        except InputError as error:
            assert str(path) in str(error)
            refusals += 1
        else:
            assert_same(weights(model), expected)
            assert flags == {} or FLAGS.items() <= flags.items()  # the word flags, or the name of their checksum
    assert refusals > 200


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 100, struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9),
                                     struct.pack("<Q", 10 ** 6) + b"[" * 10 ** 6])
def test_other_files_are_refused(path, content):
    path.write_bytes(content)
    for read in (checkpoint.load, checkpoint.flags_of):
        message = refusal(read, path)
        assert str(path) in message and "damaged" in message


@pytest.mark.parametrize("change, words", [
    (lambda header: header["0.weight"].update(dtype="F64"), "truncated, damaged"),
    (lambda header: header["0.weight"].update(shape=[3, 1, 3, 2]), "truncated, damaged"),
    (lambda header: header["0.weight"].update(shape=[1, 3, 3, 3]), "1 of another shape (0.weight"),
    (lambda header: header.update({"other": header.pop("0.weight")}), "1 missing (0.weight), 1 unknown (other)"),
    (lambda header: header.update({"__metadata__": {"sha256": "0" * 64}}), "do not agree with their checksum")])
def test_a_header_that_does_not_fit_is_refused(path, change, words):
    checkpoint.export(path, network(), FLAGS, torch.float32)
    path.write_bytes(rewritten(path.read_bytes(), change))
    assert words in refusal(checkpoint.load_model, network(), path)


@pytest.mark.parametrize("flags", ["{", "[1]", '{"image_size": 16, "checksum": 1}'])
def test_flags_in_it_that_are_none_are_refused_by_its_name(path, flags):
    checkpoint.export(path, network(), FLAGS)
    path.write_bytes(rewritten(path.read_bytes(), lambda header: header["__metadata__"].update(flags=flags)))
    assert refusal(checkpoint.flags_of, path).startswith(f"{path}: ")


def test_a_bucket_holds_one(bucket):
    path = "gs://bucket/run/a.safetensors"
    checkpoint.export(path, network(), FLAGS)
    assert sorted(bucket) == ["gs://bucket/run/a.safetensors", "gs://bucket/run/a.sha256"]
    checkpoint.load_model(network(), path)
    assert checkpoint.flags_of(path) == (FLAGS, path)
    assert "no such file" in refusal(checkpoint.flags_of, "gs://bucket/b.safetensors")
