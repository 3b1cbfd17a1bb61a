"""The Python door: load a checkpoint, hand it a scan, get an ensemble."""

import shutil

import numpy as np
import pytest
from helpers import MODEL
from PIL import Image

from guided_diffusion import Segmenter
from guided_diffusion.errors import InputError
from guided_diffusion.script_util import BEST


def test_segmenter_gives_the_same_masks_for_integers_and_floats_every_time(trained):
    segmenter = Segmenter.load(trained / "savedmodel.pt", device="cpu")
    image = np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)
    masks = segmenter.sample(image, num_ensemble=3, steps=4)
    assert masks.shape == (3, 16, 16) and masks.dtype == bool and 0 < masks.mean() < 1
    assert len({mask.tobytes() for mask in masks}) == 3
    for other in (image, image / 255, (image / 255).astype(np.float32), image.astype(np.uint16) * 257,
                  np.repeat(image[None], 4, 0)):
        assert np.array_equal(segmenter.sample(other, num_ensemble=3, steps=4), masks)
    again = Segmenter.load(str(trained / "savedmodel.pt"), device="cpu")
    assert np.array_equal(again.sample(image, num_ensemble=3, steps=4, batch_size=2), masks)
    assert not np.array_equal(segmenter.sample(image, num_ensemble=3, steps=4, seed=1), masks)
    assert np.array_equal(segmenter.sample(image, num_ensemble=2, steps=4), masks[:2])


def test_segmenter_uses_the_best_sampler_and_its_steps_by_default(trained):
    segmenter, calls = Segmenter.load(trained / "savedmodel.pt", device="cpu"), []
    segmenter.model.register_forward_hook(lambda *args: calls.append(1))
    segmenter.sample(np.zeros((16, 16)), num_ensemble=1)
    assert len(calls) == BEST["sampling_steps"]
    segmenter.sample(np.zeros((16, 16)), num_ensemble=1, steps=5)
    assert len(calls) == BEST["sampling_steps"] + 5


def test_segmenter_draws_what_the_sampling_script_draws(trained, run, make_cases, tmp_path):
    case = make_cases(tmp_path / "d", count=1) / "case0"
    result = run("segmentation_sample.py", "--data_dir", "d", "--model_path", trained / "savedmodel.pt",
                 "--sampler", "best", "--num_ensemble", 2, "--batch_size", 2)
    assert result.code == 0, result.err
    image = np.asarray(Image.open(case / "image_0.png"))
    segmenter = Segmenter.load(trained / "savedmodel.pt", device="cpu")
    masks = segmenter.sample(image, 2, name="case0")
    for i, mask in enumerate(masks):
        assert np.array_equal(np.asarray(Image.open(tmp_path / "results" / f"case0_output{i}.png")) > 127, mask)


@pytest.mark.parametrize("image, words", [
    (np.zeros((16, 17)), r"\[4, 16, 17\]"), (np.zeros((3, 16, 16)), r"\[3, 16, 16\].*\[4, 16, 16\]"),
    (np.full((16, 16), 200.0), r"scale it to \[0, 1\]"), (np.full((16, 16), -1.0), r"scale it to \[0, 1\]"),
    (np.full((16, 16), 200), "int64"), (np.full((16, 16), np.nan), "nan"),
])
def test_segmenter_refuses_scans_it_cannot_use(trained, image, words):
    with pytest.raises(ValueError, match=words):
        Segmenter.load(trained / "savedmodel.pt").sample(image, steps=2)


def test_segmenter_takes_flags_for_a_checkpoint_without_them_and_refuses_other_architectures(trained, tmp_path):
    shutil.copy(trained / "savedmodel.pt", tmp_path / "bare.pt")
    image = np.random.default_rng(0).random((16, 16))
    expected = Segmenter.load(trained / "savedmodel.pt").sample(image, 2, steps=3)
    assert np.array_equal(Segmenter.load(tmp_path / "bare.pt", **MODEL).sample(image, 2, steps=3), expected)
    with pytest.raises(InputError, match="another architecture"):
        Segmenter.load(tmp_path / "bare.pt", **{**MODEL, "channel_mult": "1,1"})
    with pytest.raises(InputError, match="no such file"):
        Segmenter.load(tmp_path / "gone.pt", **MODEL)
