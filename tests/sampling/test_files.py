"""What is written for a case, and when it is complete."""

import hashlib
import json
import os
import threading
import zipfile

import numpy as np
import pytest
from PIL import Image

from guided_diffusion.commands.cli import parse_flags
from guided_diffusion.data.cases import Case
from guided_diffusion.data.masks import to_masks
from guided_diffusion.sampling import files
from guided_diffusion.sampling.files import is_complete, write_case

SIZE = 16


@pytest.fixture(scope="module")
def cases():
    rng = np.random.default_rng(0)
    return [Case(f"case {i}", rng.random((4, SIZE, SIZE), dtype=np.float32), rng.random((2, SIZE, SIZE)) < 0.5)
            for i in range(4)]


@pytest.fixture
def written(tmp_path, cases):
    samples = np.random.default_rng(1).normal(0.5, 1, (3, SIZE, SIZE)).astype(np.float32)
    write_case(tmp_path, cases[0], samples, to_masks(samples), "abc")
    return tmp_path, samples


def test_files_of_a_case_hold_its_masks_mean_spread_and_samples(written):
    folder, samples = written
    names = ["ensemble.npz", "mean.png", "montage.png", "output0.png", "output1.png", "output2.png", "std.png"]
    assert sorted(os.listdir(folder)) == [f"case 0_{name}" for name in names]
    masks = samples > 0.5
    for i, mask in enumerate(masks):
        picture = Image.open(folder / f"case 0_output{i}.png")
        assert picture.mode == "L" and np.array_equal(np.asarray(picture), mask * 255)
    for kind, expected in (("mean", 255 * masks.mean(0)), ("std", 255 * 2 * masks.std(0))):
        picture = Image.open(folder / f"case 0_{kind}.png")
        assert picture.mode == "L" and np.abs(np.asarray(picture) - expected).max() <= 0.5
    assert Image.open(folder / "case 0_montage.png").size[0] > 5 * 160
    with np.load(folder / "case 0_ensemble.npz", allow_pickle=False) as stored:
        assert np.array_equal(stored["samples"], samples) and stored["samples"].dtype == np.float32
        assert str(stored["fingerprint"]) == "abc"


def test_median_blur_smooths_the_masks_but_not_the_samples(tmp_path, cases):
    samples = np.random.default_rng(1).random((2, SIZE, SIZE)).astype(np.float32)
    write_case(tmp_path, cases[0], samples, to_masks(samples, 3))
    stored = np.asarray(Image.open(tmp_path / "case 0_output1.png")) > 0
    assert np.array_equal(stored, to_masks(samples, 3)[1])
    assert np.array_equal(np.load(tmp_path / "case 0_ensemble.npz")["samples"], samples)


def test_members_of_a_larger_older_ensemble_are_removed_and_no_other_file(written, cases):
    folder, samples = written
    others = ["case 0_output3.png.txt", "case 0_outputx.png", "case 00_output7.png", "case 0_b_output7.png", "notes"]
    for name in others:
        (folder / name).write_text("mine")
    write_case(folder, cases[0], samples[:1], to_masks(samples[:1]))
    assert {"case 0_output0.png", *others} < set(os.listdir(folder))
    assert not {"case 0_output1.png", "case 0_output2.png"} & set(os.listdir(folder))
    assert all((folder / name).read_text() == "mine" for name in others)


def test_case_names_with_special_characters_are_taken_literally(tmp_path, cases):
    name = "a+(b) [größer] 病例"
    case = cases[0]._replace(name=name)
    samples = np.zeros((2, SIZE, SIZE), np.float32)
    write_case(tmp_path, case, samples, samples > 0.5, "f")
    write_case(tmp_path, case, samples[:1], samples[:1] > 0.5, "f")
    assert is_complete(tmp_path, name, (1, SIZE, SIZE), "f") and not (tmp_path / f"{name}_output1.png").exists()


# ---- what is already done ----

def test_written_case_is_complete_for_its_own_fingerprint_and_size_only(written):
    folder, _ = written
    assert is_complete(folder, "case 0", (3, SIZE, SIZE), "abc")
    assert not is_complete(folder, "case 0", (3, SIZE, SIZE), "abd")
    assert not is_complete(folder, "case 0", (2, SIZE, SIZE), "abc")
    assert not is_complete(folder, "case 0", (4, SIZE, SIZE), "abc")
    assert not is_complete(folder, "case 1", (3, SIZE, SIZE), "abc")
    assert not is_complete(folder / "nowhere", "case 0", (3, SIZE, SIZE), "abc")


@pytest.mark.parametrize("kind", ["output0.png", "output2.png", "mean.png", "std.png", "montage.png", "ensemble.npz"])
def test_case_that_lacks_a_file_is_incomplete(written, kind):
    folder, _ = written
    (folder / f"case 0_{kind}").unlink()
    assert not is_complete(folder, "case 0", (3, SIZE, SIZE), "abc")


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 0x5A]) + data[position + 1:]


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: b"hello", lambda data: data[:len(data) // 2], lambda data: data[:-1],
    lambda data: flip(data, 0), lambda data: flip(data, len(data) // 3), lambda data: flip(data, 120),
], ids=["empty", "text", "half", "last byte", "first byte", "middle", "header"])
def test_case_whose_samples_are_damaged_is_incomplete(written, damage):
    folder, _ = written
    path = folder / "case 0_ensemble.npz"
    path.write_bytes(damage(path.read_bytes()))
    assert is_complete(folder, "case 0", (3, SIZE, SIZE), "abc") is False


def test_no_damage_to_a_single_byte_is_an_error(written):
    folder, _ = written
    path = folder / "case 0_ensemble.npz"
    data = path.read_bytes()
    answers = []
    for position in range(0, len(data), 19):
        path.write_bytes(flip(data, position))
        answers.append(is_complete(folder, "case 0", (3, SIZE, SIZE), "abc"))
    assert set(answers) <= {True, False} and np.mean(answers) < 0.1


def test_other_arrays_do_not_count_as_samples(written):
    folder, samples = written
    path = folder / "case 0_ensemble.npz"
    np.savez(path, samples=samples)
    assert not is_complete(folder, "case 0", (3, SIZE, SIZE), "abc")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("samples.npy", "no array")
        file.writestr("fingerprint.npy", "no array")
    assert not is_complete(folder, "case 0", (3, SIZE, SIZE), "abc")


def test_fingerprint_changes_with_the_scan_and_every_setting(cases):
    case = cases[0]
    settings = {"seed": 0, "image_size": 16, "model": "0" * 64, "sampler": "ancestral"}
    fingerprint = files.fingerprint(case, **settings)
    assert files.fingerprint(case, **dict(reversed(settings.items()))) == fingerprint
    assert files.fingerprint(case._replace(raters=case.raters[:0]), **settings) == fingerprint
    brighter = case.image.copy()
    brighter[0, 3, 3] += 1 / 255
    others = [files.fingerprint(case._replace(image=brighter), **settings)]
    for name, value in (("seed", 1), ("image_size", 32), ("model", "1" * 64), ("sampler", "ddim"), ("new", 1)):
        others.append(files.fingerprint(case, **{**settings, name: value}))
    assert len({fingerprint, *others}) == 1 + len(others)


# what fingerprints held before there were methods and predictions, beside the digest of the weights
FIRST_SETTINGS = [
    "image_size", "image_channels", "num_channels", "num_res_blocks", "channel_mult", "num_heads", "num_heads_upsample",
    "num_head_channels", "attention_resolutions", "dropout", "class_cond", "use_checkpoint", "use_scale_shift_norm",
    "resblock_updown", "use_new_attention_order", "use_fp16", "use_bf16", "learn_sigma", "diffusion_steps",
    "noise_schedule", "timestep_respacing", "use_kl", "predict_xstart", "rescale_timesteps", "rescale_learned_sigmas",
    "seed", "sampler", "ddim_eta", "clip_denoised", "median_blur"]


def fingerprints(case, text):
    """Those of the masks of a case with these flags that are good, the first being today's; and the first ever."""
    args, _ = parse_flags("sampling", "", text.split())
    first = {"model": "d" * 64, **{name: getattr(args, name) for name in FIRST_SETTINGS}}
    digest = hashlib.sha256(json.dumps(first, sort_keys=True).encode() + case.image.tobytes()).hexdigest()
    return [files.fingerprint(case, **settings) for settings in files.drawing_settings(args, "d" * 64)], digest


@pytest.mark.parametrize("text", [
    "", "--dropout 0.3", "--use_checkpoint True", "--dropout 0.1 --use_checkpoint True --seed 3",
    "--predict_xstart True", "--prediction xstart --dropout 0.5", "--sampler best", "--use_ddim True --ddim_eta 0.5",
    "--learn_sigma True --image_size 16 --channel_mult 1,2 --median_blur 3 --batch_size 7 --num_ensemble 9",
    "--timestep_respacing ddim25 --noise_schedule cosine --clip_denoised False --use_bf16 True --num_samples 2"])
def test_masks_with_the_fingerprints_of_the_first_releases_stay_good(cases, text):
    good, first = fingerprints(cases[0], text)
    assert first in good


def test_fingerprint_does_not_follow_what_only_training_knows(cases):
    expected = fingerprints(cases[0], "")[0]
    for text in ("--dropout 0.3", "--use_checkpoint True", "--dropout 0.3 --use_checkpoint True"):
        assert fingerprints(cases[0], text)[0][0] == expected[0]  # so that either run finds the masks of the other
    assert set(expected) == {expected[0]}


def test_fingerprint_follows_every_flag_that_decides_the_masks_and_no_other(cases):
    expected = fingerprints(cases[0], "")[0]
    for text in ("--batch_size 7", "--num_ensemble 9", "--num_samples 1", "--evaluate True", "--use_ddim False",
                 "--prediction eps", "--method cimd", "--network unet", "--predict_xstart False", "--compile True"):
        assert fingerprints(cases[0], text)[0] == expected, text
    others = ["--prediction v", "--prediction xstart", "--sampler ddim", "--sampler ddim --ddim_eta 0.5",
              "--sampler best", "--sampler best --sampling_steps 3", "--seed 1", "--median_blur 3",
              "--learn_sigma True", "--use_bf16 True", "--clip_denoised False", "--num_heads 2",
              "--noise_schedule cosine"]
    seen = {*expected}
    for text in others:
        assert not seen & {*(good := fingerprints(cases[0], text)[0])}, text
        seen |= {*good}
    assert fingerprints(cases[0], "--predict_xstart True") == fingerprints(cases[0], "--prediction xstart")


# ---- beside the drawing ----

def test_writer_runs_everything_in_order_beside_the_caller():
    done, gate = [], threading.Event()
    with files.BackgroundWriter(most_waiting=5) as write:
        write(gate.wait)
        for i in range(3):
            write(done.append, i)
        assert done == []  # the caller went on while the first one waited
        gate.set()
        for i in range(3, 50):
            write(done.append, i)
    assert done == list(range(50))


def test_an_error_of_the_writer_reaches_the_caller():
    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), files.BackgroundWriter() as write:
        write(fail)
    with pytest.raises(OSError, match="disk full"), files.BackgroundWriter(most_waiting=1) as write:
        for _ in range(10):
            write(fail)
