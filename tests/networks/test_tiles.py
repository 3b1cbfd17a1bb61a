"""Scans larger than a network's are drawn by tiles that leave no trace."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.refusals import refusal
from torch import nn

from guided_diffusion.data.cases import Case
from guided_diffusion.data.masks import to_masks
from guided_diffusion.flags import FLAGS
from guided_diffusion.methods import METHODS
from guided_diffusion.methods.cimd import CIMD
from guided_diffusion.methods.energy import EnergyMethod, MaskGenerator, MaskHead
from guided_diffusion.methods.process import create_gaussian_diffusion
from guided_diffusion.networks.tiles import Tiled, starts, tiles
from guided_diffusion.sampling.ensembles import EnsembleSampler
from guided_diffusion.sampling.segmenter import Segmenter

SIDE = 16


@pytest.mark.parametrize("length", [16, 18, 24, 26, 40, 100])
def test_tiles_reach_both_ends_and_overlap_by_half_or_more(length):
    found = starts(length, SIDE)
    assert found[0] == 0 and found[-1] == length - SIDE
    assert all(0 < step <= SIDE // 2 + 2 and step % 2 == 0 for step in np.diff(found))
    covered = np.zeros((length, 20), int)
    for place in tiles(length, 20, SIDE):
        covered[place] += 1
    assert covered.min() >= 1


class Pixels(nn.Module):
    """Sees no further than a pixel; or, if `biased`, errs by another number in every tile."""

    def __init__(self, biased=False):
        super().__init__()
        self.biased, self.calls = biased, 0

    def forward(self, x, timesteps, image):
        self.calls += 1
        assert x.shape[2:] == image.shape[2:] == (SIDE, SIDE)
        return x + 2 * image[:, :1] + timesteps[:, None, None, None] + self.biased * self.calls


class EncodesFirst(nn.Module):
    def encode(self, image):
        return image[:, :1], {"double": 2 * image}

    def forward(self, x, timesteps, encoded):
        return x + encoded[0] + encoded[1]["double"][:, 1:]


def test_what_does_not_depend_on_the_tile_is_as_if_drawn_at_once():
    x, image, t = torch.randn(3, 1, 40, 30), torch.rand(3, 2, 40, 30), torch.arange(3.0)
    torch.testing.assert_close(Tiled(Pixels(), SIDE)(x, t, image=image), x + 2 * image[:, :1] + t[:, None, None, None])
    network = Tiled(EncodesFirst(), SIDE)
    torch.testing.assert_close(network(x, t, encoded=network.encode(image)), x + image[:, :1] + 2 * image[:, 1:])
    assert not hasattr(Tiled(Pixels(), SIDE), "encode")


def test_tiles_that_disagree_are_blended_without_a_step():
    """Nine tiles along an axis return 1 to 9; from pixel to pixel the blend changes by a small part of that."""
    zeros = torch.zeros(1, 1, SIDE, 5 * SIDE)
    out = Tiled(Pixels(biased=True), SIDE)(zeros, torch.zeros(1), image=zeros)[0, 0]
    assert out.min() == pytest.approx(1, abs=1e-4) and out.max() == pytest.approx(9, abs=1e-4)
    assert out.diff(dim=1).abs().max() < 0.25  # steps of 1 are spread over 8 pixels


@pytest.fixture(scope="module")
def segmenter(trained):
    return Segmenter.load(trained, device="cpu")


class Disagreeing(nn.Module):
    """Predicts a smoothed x_t, the brighter the more of the tile is bright: as far as tiles can differ."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x, timesteps, image):
        return 0.5 + nn.functional.avg_pool2d(x - 0.5, 5, 1, 2, count_include_pad=False) + (
            image.mean((1, 2, 3), keepdim=True) - 0.5) * self.gain


@pytest.mark.parametrize("weighing", ["as it is", "all alike"])
def test_the_probability_differs_at_borders_of_tiles_no_more_than_inside(monkeypatch, weighing):
    """Unless all pixels of a tile count alike, which shows that the measure sees seams."""
    if weighing == "all alike":
        monkeypatch.setattr("guided_diffusion.networks.tiles.weights", lambda side, like: torch.ones(side, side))
    scan = np.where(np.arange(64) // 20 % 2, 1, 0) * np.ones((64, 1))  # stripes of another width than the tiles
    method = CIMD(create_gaussian_diffusion(steps=1000, prediction="xstart", timestep_respacing="3"), Disagreeing())
    method.tile(SIDE)
    case = Case("a", scan[None].astype(np.float32), np.zeros((0, 64, 64), bool))
    (_, samples), = EnsembleSampler(method, batch_size=64).ensembles([case], 256)
    probability = to_masks(samples).mean(0)
    steps = np.abs(np.diff(probability.mean(0)))  # between columns i and i + 1
    borders = sorted({column - 1 for left in starts(64, SIDE) for column in (left, left + SIDE)} - {-1, 63})
    inside = np.delete(steps, borders)
    assert probability.mean(0).min() < 0.3 and probability.mean(0).max() > 0.7 and len(borders) == 7
    seamless = steps[borders].mean() <= inside.mean() and steps[borders].max() <= inside.max()
    assert seamless == (weighing == "as it is")


def test_a_scan_of_one_tile_is_drawn_as_without_tiles(segmenter):
    image = np.random.default_rng(0).random((16, 16))
    plain, tiled = (segmenter.sample(image, 2, 2, fit=fit) for fit in ("error", "tile"))
    np.testing.assert_allclose(plain.samples, tiled.samples, atol=1e-5)
    assert not any(isinstance(module, Tiled) for module in segmenter.model.modules())


def test_scans_of_different_sizes_are_drawn_in_one_go_with_masks_of_their_sizes(segmenter):
    rng = np.random.default_rng(0)
    scans = [rng.random(size) for size in ((16, 16), (21, 35), (7, 20), (21, 35))]
    together = segmenter.sample(scans, 3, 2, fit="tile", name=["a", "b", "c", "d"], batch_size=4)
    assert [ensemble.masks.shape[1:] for ensemble in together] == [scan.shape for scan in scans]
    alone = segmenter.sample(scans[1], 3, 2, fit="tile", name="b", batch_size=4)
    np.testing.assert_allclose(together[1].samples, alone.samples, atol=1e-3)


@pytest.mark.parametrize("name", ["energy", "probunet"])
def test_methods_with_one_latent_a_mask_draw_by_tiles(name):


    flags = SimpleNamespace(**{flag.name: flag.default for flag in FLAGS} | {
        "image_size": SIDE, "network": "conv_unet", "conv_filters": "8,16", "head_channels": 8, "head_width": 8,
        "probunet_filters": "8,16", "image_channels": 1})
    torch.manual_seed(0)
    method = METHODS[name].from_flags(flags, training=False).prepare()
    sampler = EnsembleSampler(method, batch_size=2)
    case = Case("a", np.random.default_rng(0).random((1, 40, 26), np.float32), np.zeros((0, 40, 26), bool))
    small = case._replace(image=case.image[:, 4:20, 6:22])
    (_, at_once), = sampler.ensembles([small], 2)
    method.tile(SIDE)
    (_, samples), (_, one_tile) = sampler.ensembles([case, small], 2)
    assert samples.shape == (2, 40, 26) and np.isfinite(samples).all()
    np.testing.assert_allclose(one_tile, at_once, atol=1e-5)


def test_the_head_of_energy_sees_in_every_tile_the_noise_of_its_place_and_decides_smoothly(monkeypatch):
    """Whether a member is empty changes from tile to tile; where it does, more and more members are."""
    method = EnergyMethod(MaskGenerator(nn.Identity(), MaskHead(4, 8, 4, 8)), spread=False)
    method.tile(SIDE)
    monkeypatch.setattr(method.model.head, "draw", lambda features, summary, latent, noise: noise[:, :1].repeat(
        1, 4, 1, 1).reshape(-1, 2, 2, SIDE // 2, SIDE // 2).permute(0, 3, 1, 4, 2).reshape(-1, SIDE, SIDE))
    noise = torch.arange(2 * 3 * 20 * 16.0).reshape(2, 3, 20, 16)
    count = len(tiles(40, 32, SIDE))
    parts = [(None, None, torch.full((2,), float(i))) for i in range(count)]
    logits, empty = method._blended(parts, torch.zeros(2, 4), noise)
    torch.testing.assert_close(logits, noise[:, 0].repeat_interleave(2, 1).repeat_interleave(2, 2))
    assert empty.shape == (2, 40, 32) and empty.min() < 0.1 and empty.max() > count - 1.1
    assert empty.diff(dim=2).abs().max() < 0.25  # tiles beside each other differ by 1


def test_a_model_that_sees_the_centre_alone_is_not_tiled():
    method = EnergyMethod(MaskGenerator(nn.Identity(), MaskHead(4, 8, 4, 8), field_of_view=8))
    assert "--field_of_view" in refusal(method.tile, SIDE)
