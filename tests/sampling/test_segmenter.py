"""The Python door: load a checkpoint, hand it a scan, get an ensemble."""

import shutil
import sys

import matplotlib.path
import numpy as np
import pytest
import torch
from helpers.models import MODEL
from helpers.refusals import refusal
from PIL import Image

from guided_diffusion import Segmenter
from guided_diffusion.data.cases import Case
from guided_diffusion.methods.cimd import CIMD
from guided_diffusion.sampling.files import draws_are_independent
from guided_diffusion.sampling.segmenter import Ensemble
from guided_diffusion.script_util import BEST
from guided_diffusion.system.errors import InputError


@pytest.fixture
def segmenter(trained):
    return Segmenter.load(trained, device="cpu")


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (16, 16), dtype=np.uint8)


def ensemble_of(masks, spacing=None):
    masks = np.asarray(masks)
    return Ensemble(Case("case", np.zeros((4, *masks.shape[1:]), np.float32), masks[:0]), masks.astype(float), spacing)


def test_ensembles_say_how_likely_anything_is_marked_and_whether_masks_are_independent(segmenter, image, monkeypatch,
                                                                                       tmp_path):
    masks = np.zeros((4, 6, 6), bool)
    masks[0, 2, 2] = masks[3, 1:4] = True
    assert ensemble_of(masks).probability_of_any == 0.5 and ensemble_of(masks).independent
    for independent in (True, False):
        monkeypatch.setattr(CIMD, "independent", independent)
        ensemble = segmenter.sample(image, num_ensemble=2, steps=1)
        ensemble.save(tmp_path, name="scan")
        assert ensemble.independent == draws_are_independent(tmp_path, "scan") == independent


def test_segmenter_gives_the_same_masks_for_integers_and_floats_every_time(trained, segmenter, image):
    masks = segmenter.sample(image, num_ensemble=3, steps=4).masks
    assert masks.shape == (3, 16, 16) and masks.dtype == bool and 0 < masks.mean() < 1
    assert len({mask.tobytes() for mask in masks}) == 3
    for other in (image / 255, (image / 255).astype(np.float32), image.astype(np.uint16) * 257,
                  image.astype(">u2") * 257, image[None], np.repeat(image[None], 4, 0), torch.from_numpy(image),
                  torch.from_numpy(image / 255).expand(4, 16, 16).requires_grad_()):
        assert np.array_equal(segmenter.sample(other, num_ensemble=3, steps=4), masks)
    again = Segmenter.load(str(trained / "savedmodel.pt"), device="cpu")
    assert np.array_equal(again.sample(image, num_ensemble=3, steps=4, batch_size=2), masks)
    assert not np.array_equal(segmenter.sample(image, num_ensemble=3, steps=4, seed=1), masks)
    assert np.array_equal(segmenter.sample(image, num_ensemble=2, steps=4, seed=np.int64(0)), masks[:2])


def test_ensemble_is_an_array_of_its_masks_with_their_mean_and_spread():
    masks = np.zeros((4, 16, 16), bool)
    masks[0, :4], masks[1, :2] = True, True
    ensemble = ensemble_of(masks)
    assert len(ensemble) == 4 and np.array_equal(ensemble, masks) and np.array_equal(ensemble[1], masks[1])
    assert np.asarray(ensemble, dtype=float).sum() == masks.sum()
    assert np.array_equal(ensemble.mean[:6, 0], [0.5, 0.5, 0.25, 0.25, 0, 0])
    assert np.allclose(ensemble.std[:6, 0], [0.5, 0.5, 3 ** 0.5 / 4, 3 ** 0.5 / 4, 0, 0])


def test_area_interval_is_central_and_in_mm2_where_the_spacing_is_known():
    masks = np.zeros((21, 16, 16), bool)
    for i, mask in enumerate(masks):
        mask.flat[:i * i % 23] = True  # areas in no order
    low, median, high = np.percentile([i * i % 23 for i in range(21)], [5, 50, 95])
    assert low < median < high
    assert ensemble_of(masks).area_interval() == pytest.approx((low, median, high))
    assert ensemble_of(masks, (0.5, 3)).area_interval(0.9) == pytest.approx((1.5 * low, 1.5 * median, 1.5 * high))
    assert ensemble_of(masks).area_interval(1)[::2] == (0, max(i * i % 23 for i in range(21)))
    with pytest.raises(ValueError, match="level is 90"):
        ensemble_of(masks).area_interval(90)


@pytest.mark.parametrize("p", [1e-12, 0.2, 0.25, 0.5, 0.6, 1])
def test_outline_runs_between_the_pixels_that_are_so_probable_and_the_others(p):
    y, x = np.mgrid[:16, :20]
    distance = np.hypot(y - 6, x - 12)
    ring = [(distance < 6 + i) & (distance > 2) for i in range(9)]  # has a hole; the larger ones leave the picture
    ensemble = ensemble_of([*ring, np.ones((16, 20), bool)])
    outlines = ensemble.outline_at(p)
    inside = np.zeros(16 * 20, int)
    for line in outlines:
        assert line.ndim == 2 and line.shape[1] == 2 and np.array_equal(line[0], line[-1])
        assert line.min() >= -0.5 and (line.max(0) <= (19.5, 15.5)).all()
        inside += matplotlib.path.Path(line).contains_points(np.stack([x.ravel(), y.ravel()], 1))
    assert np.array_equal(inside.reshape(16, 20) % 2 == 1, ensemble.mean >= p)
    assert len(outlines) == (1 if p < 0.2 else 2)


def test_outline_names_the_package_that_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "contourpy", None)
    message = refusal(ensemble_of(np.ones((1, 16, 16), bool)).outline_at)
    assert message == "outline_at needs the package contourpy: pip install contourpy"


def test_outline_of_one_pixel_is_around_its_centre_and_that_of_nothing_is_empty():
    masks = np.zeros((1, 16, 16), bool)
    masks[0, 3, 7] = True
    line, = ensemble_of(masks).outline_at(0.5)
    assert {tuple(point) for point in line} == {(7, 2.5), (7, 3.5), (6.5, 3), (7.5, 3)}
    assert ensemble_of(np.zeros((2, 16, 16))).outline_at(0.5) == []
    for p in (0, 1.5, np.nan):
        with pytest.raises(ValueError, match=f"p is {p}"):
            ensemble_of(masks).outline_at(p)


def test_pictures_and_their_files_give_the_masks_of_their_array(segmenter, image, tmp_path):
    grey, deep = Image.fromarray(image), Image.fromarray(image.astype(np.uint16) * 257)
    grey.save(tmp_path / "scan.png")
    deep.save(tmp_path / "deep.png")
    masks = segmenter.sample(image, 2, 3, name="scan").masks
    rgba = grey.convert("RGBA")
    for other in (grey, deep, deep.convert("I"), grey.convert("RGB"), rgba, Image.fromarray(image / np.float32(255)),
                  Image.open(tmp_path / "deep.png"), tmp_path / "scan.png", str(tmp_path / "deep.png")):
        assert np.array_equal(segmenter.sample(other, 2, 3, name="scan"), masks)
    ensemble = segmenter.sample(tmp_path / "scan.png", 2, 3)
    assert ensemble.name == "scan" and np.array_equal(ensemble, masks)


def test_many_scans_of_all_kinds_are_drawn_together_as_each_alone(segmenter, image, make_cases, tmp_path):
    make_cases(tmp_path / "d", count=2, raters=[3, 0])
    scans = [image, tmp_path / "d" / "case0", Image.fromarray(image.T), str(tmp_path / "d" / "case1"), image[::-1]]
    calls = []
    hook = segmenter.model.register_forward_hook(lambda model, args, out: calls.append(len(out)))
    ensembles = segmenter.sample(scans, 4, 2, batch_size=3)
    hook.remove()
    assert calls == [3] * 2 * 7  # 20 masks in full batches
    assert [ensemble.name for ensemble in ensembles] == ["image0", "case0", "image2", "case1", "image4"]
    assert [len(ensemble.raters) for ensemble in ensembles] == [0, 3, 0, 0, 0]
    for scan, ensemble in zip(scans, ensembles):
        assert np.array_equal(segmenter.sample(scan, 4, 2, batch_size=3).samples, ensemble.samples)
    named = segmenter.sample((image, image), 4, 2, name=["a", "b"], spacing=[(1, 1), (2, 2)], batch_size=3)
    assert not np.array_equal(*named) and [ensemble.spacing for ensemble in named] == [(1, 1), (2, 2)]
    assert np.array_equal(segmenter.sample(image, 4, 2, name="b", batch_size=3).samples, named[1].samples)
    assert segmenter.sample([], 3) == [] and len(segmenter.sample([image], 4, 2)) == 1


def test_segmenter_uses_the_best_sampler_and_its_steps_by_default(segmenter):
    calls = []
    segmenter.model.register_forward_hook(lambda *args: calls.append(1))
    segmenter.sample(np.zeros((16, 16)), num_ensemble=1)
    assert len(calls) == BEST["sampling_steps"]
    segmenter.sample(np.zeros((16, 16)), num_ensemble=1, steps=5)
    assert len(calls) == BEST["sampling_steps"] + 5
    segmenter.sample(np.zeros((16, 16)), num_ensemble=1, sampler="ancestral")
    assert len(calls) == BEST["sampling_steps"] + 5 + MODEL["diffusion_steps"]


def test_case_folders_give_the_files_that_the_sampling_script_writes(segmenter, trained, run, make_cases, tmp_path):
    make_cases(tmp_path / "d", count=2, raters=[2, 3], size=20)
    result = run("segmentation_sample.py", "--data_dir", "d", "--model_path", trained / "savedmodel.pt", "--seed", 3,
                 "--sampler", "best", "--num_ensemble", 2, "--batch_size", "auto", "--fit", "resize")
    assert result.code == 0, result.err
    for ensemble in segmenter.sample([tmp_path / "d" / "case0", tmp_path / "d" / "case1"], 2, seed=3, fit="resize"):
        ensemble.save(tmp_path / "mine")
        assert np.array_equal(np.load(tmp_path / "results" / f"{ensemble.name}_ensemble.npz")["samples"],
                              ensemble.samples)
    theirs, mine = ({path.name: path.read_bytes() for path in (tmp_path / folder).glob("case?_*.png")}
                    for folder in ("results", "mine"))
    assert len(mine) == 10 and theirs == mine


def test_nested_case_folders_are_called_as_the_script_calls_them(segmenter, trained, run, make_cases, tmp_path):
    make_cases(tmp_path / "d" / "patient", count=1, raters=0)
    result = run("segmentation_sample.py", "--data_dir", "d", "--model_path", trained / "savedmodel.pt",
                 "--sampler", "best", "--num_ensemble", 2, "--batch_size", 2)
    assert result.code == 0, result.err
    folder = tmp_path / "d" / "patient" / "case0"
    ensemble = segmenter.sample(folder, 2, data_dir=tmp_path / "d", batch_size=2)
    assert ensemble.name == "patient_case0"
    assert np.array_equal(np.load(tmp_path / "results" / "patient_case0_ensemble.npz")["samples"], ensemble.samples)
    assert segmenter.sample(folder, 1, 2).name == "case0"
    assert segmenter.sample(folder, 1, 2, data_dir=tmp_path / "d", name="x").name == "x"
    assert f"data_dir {tmp_path / 'results'}: does not hold {folder}" in refusal(
        segmenter.sample, folder, 1, 2, data_dir=tmp_path / "results")


def test_saved_files_are_called_by_the_name_given_or_by_what_they_are_of(segmenter, image, tmp_path):
    ensemble = segmenter.sample(image, 1, 2)
    ensemble.save(tmp_path / "new" / "folder")
    ensemble.save(str(tmp_path), name="other")
    for path in (tmp_path / "new" / "folder" / "image_output0.png", tmp_path / "other_output0.png"):
        assert np.array_equal(np.asarray(Image.open(path)) > 127, ensemble.masks[0])
    assert "leads to another folder" in refusal(ensemble.save, tmp_path, "../other")
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(ensemble.save, tmp_path / "file")


def test_masks_of_scans_of_another_size_come_back_in_their_size_and_place(segmenter, image, make_cases, tmp_path):
    wide, plain = np.pad(image, ((2, 2), (8, 8)), mode="edge"), segmenter.sample(image, 2, 2)  # [20, 32]
    cropped = segmenter.sample(wide, 2, 2, fit="crop", spacing=(1, 0.5))
    assert np.array_equal(cropped, np.pad(plain, ((0, 0), (2, 2), (8, 8)))) and cropped.image.shape == (4, 20, 32)
    assert plain.masks.any() and cropped.spacing == (1, 0.5)
    assert cropped.area_interval(1) == pytest.approx([area / 2 for area in plain.area_interval(1)])  # mm2
    inner = segmenter.sample(np.pad(image[3:-3, 2:-3], ((3, 3), (2, 3)), mode="edge"), 2, 2)
    padded = segmenter.sample(image[3:-3, 2:-3], 2, 2, fit="pad")
    assert np.array_equal(padded.samples, inner.samples[:, 3:-3, 2:-3])
    resized = segmenter.sample(wide, 2, 2, fit="resize", spacing=(1, 0.5))
    assert resized.masks.shape == resized.samples.shape == (2, 20, 32) and resized.mean.shape == (20, 32)
    floats = segmenter.sample(wide / 255, 2, 2, fit="resize")
    assert np.abs(floats.samples - resized.samples).max() < 0.1
    make_cases(tmp_path, count=1, raters=2, size=24)
    assert segmenter.sample(tmp_path / "case0", 2, 2, fit="crop").raters.shape == (2, 24, 24)


def test_segmenter_in_bfloat16_draws_about_the_same_masks(segmenter, trained, image):
    rough, exact = Segmenter.load(trained, bf16=True).sample(image, 4, 2), segmenter.sample(image, 4, 2)
    assert not np.array_equal(rough.samples, exact.samples) and (rough.masks == exact.masks).mean() > 0.9


@pytest.mark.parametrize("scan, words", [
    (np.zeros((16, 17)), r"image has 16 rows and 17 columns.*takes 16 of each.*fit=.resize"),
    (np.zeros((3, 16, 16)), r"\[3, 16, 16\].*\[4, 16, 16\].*image\[0\]"),
    (np.zeros((16, 16, 3)), r"\[16, 16, 3\].*channels first.*image\.transpose\(2, 0, 1\)"),
    (np.zeros(16), r"\[16\].*\[C, H, W\]"), (np.zeros((0, 16)), r"\[0, 16\]"), (None, r"\[\]"),
    (np.full((16, 16), 200.0), r"scale it to \[0, 1\]"), (np.full((16, 16), -1.0), r"scale it to \[0, 1\]"),
    (np.full((16, 16), 200), "int64"), (np.full((16, 16), np.nan), "nan"), (torch.ones(16, 16) > 0, "bool"),
    (Image.new("RGB", (16, 16), "red"), r"\[3, 16, 16\].*grey"), (Image.new("I", (16, 16), -1000), "from -1000"),
    (Image.new("F", (16, 16), 3), "scale it"), ([np.zeros((16, 16)), np.ones((16, 16)) * 2], "image1 is float64"),
])
def test_segmenter_refuses_scans_it_cannot_use(segmenter, scan, words):
    with pytest.raises(ValueError, match=words):
        segmenter.sample(scan, steps=2)


def test_segmenter_refuses_turned_pictures_and_files_that_are_no_scan(segmenter, image, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(image).save(tmp_path / "turned.png", exif=exif)
    with pytest.raises(ValueError, match="exif_transpose"):
        segmenter.sample(Image.open(tmp_path / "turned.png"))
    assert "turned.png: is stored turned" in refusal(segmenter.sample, tmp_path / "turned.png")
    assert "gone.png: cannot be read" in refusal(segmenter.sample, tmp_path / "gone.png")
    assert f"{tmp_path}: no image" in refusal(segmenter.sample, tmp_path)


@pytest.mark.parametrize("options, words", [
    ({"num_ensemble": 0}, "num_ensemble 0"), ({"steps": -1}, "sampling_steps -1"), ({"steps": 31}, "31"),
    ({"batch_size": 0}, "batch_size 0"), ({"batch_size": "x"}, "batch_size 'x': must be a whole number, or auto"),
    ({"sampler": "worst"}, "sampler 'worst'.*best"), ({"seed": 0.5}, "seed 0.5"),
    ({"fit": "stretch"}, "fit 'stretch'.*crop"), ({"spacing": 1}, "spacing is 1"),
    ({"spacing": (1, 0)}, "spacing is"), ({"name": ["a"]}, "2 names"), ({"name": "ab"}, "2 names"),
    ({"name": ["a", "a"]}, "two images are called a"),
])
def test_segmenter_refuses_options_that_mean_nothing(segmenter, image, options, words):
    with pytest.raises((ValueError, InputError), match=words):
        segmenter.sample([image, image], **options)


def test_segmenter_takes_flags_for_a_checkpoint_without_them_and_refuses_other_architectures(trained, image,
                                                                                              tmp_path):
    shutil.copy(trained / "savedmodel.pt", tmp_path / "bare.pt")
    expected = Segmenter.load(trained / "savedmodel.pt").sample(image, 2, steps=3)
    assert np.array_equal(Segmenter.load(tmp_path / "bare.pt", **MODEL).sample(image, 2, steps=3), expected)
    with pytest.raises(InputError, match="another architecture"):
        Segmenter.load(tmp_path / "bare.pt", **{**MODEL, "channel_mult": "1,1"})
    with pytest.raises(InputError, match="savedmodel.pt: no such file"):
        Segmenter.load(tmp_path, **MODEL)
    with pytest.raises(InputError, match="no such file"):
        Segmenter.load(tmp_path / "gone.pt", **MODEL)
