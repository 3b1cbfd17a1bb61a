"""The ensembles drawn while training are those that sampling would draw, whoever draws them."""

import numpy as np
import pytest
import torch
from helpers.models import MODEL

from guided_diffusion import metrics, script_util
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.masks import to_masks
from guided_diffusion.sampling import ensembles
from guided_diffusion.training.validation import SCORED, SHOWN, Stopped, Validation


@pytest.fixture
def cases(make_cases, tmp_path):
    return SegmentationCases(make_cases(tmp_path / "data", count=6, raters=3), MODEL["image_size"],
                             4)


@pytest.fixture
def model(trained):
    from guided_diffusion import checkpoint

    network, _ = script_util.create_model_and_diffusion(**MODEL)
    checkpoint.load_model(network, trained / "savedmodel.pt")
    return network.eval()


def process():
    flags = {name: value for name, value in MODEL.items() if name == "diffusion_steps"}
    return script_util.create_gaussian_diffusion(**flags, timestep_respacing="4")


def test_cases_are_spread_over_all_and_always_the_same(cases):
    assert [case.name for case in Validation(cases, process(), "ddim", 3).cases] == ["case0", "case2", "case5"]
    assert [case.name for case in Validation(cases, process(), "ddim", 1).cases] == ["case0"]
    assert len(Validation(cases, process(), "ddim", 99).cases) == 6


@pytest.mark.parametrize("scored, members", [(False, SHOWN), (True, SCORED)])
def test_masks_are_those_that_sampling_draws(cases, model, scored, members):
    validation = Validation(cases, process(), "dpm++sde", 2, seed=3, scored=scored)
    drawn = validation.draw(lambda: model)
    sampler = ensembles.EnsembleSampler(model, process(), batch_size=5, seed=3, sampler="dpm++sde")
    wanted = [to_masks(samples) for _, samples in sampler.ensembles([cases[0], cases[5]], members)]
    assert len(drawn) == 2
    for ours, theirs in zip(drawn, wanted):
        assert ours.dtype == bool and ours.shape == theirs.shape
        assert (ours != theirs).mean() < 0.01  # the shape of a batch moves the last bits
    again = validation.draw(lambda: model)
    assert all((a == b).all() for a, b in zip(drawn, again)) and any(masks.any() for masks in drawn)


def test_drawing_leaves_the_randomness_of_training_alone(cases, model):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    Validation(cases, process(), "ancestral", 2).draw(lambda: model)
    assert (torch.get_rng_state() == state).all() and not model.training


def test_scores_are_the_means_of_the_cases(cases):
    rng = np.random.default_rng(0)
    validation = Validation(cases, process(), "ddim", 6, scored=True)
    masks = [rng.random((SCORED, *case.raters.shape[1:])) < 0.3 for case in validation.cases]
    expected = [metrics.Agreement(drawn, case.raters) for drawn, case in zip(masks, validation.cases)]
    assert validation.scores(masks) == pytest.approx({
        "val_GED_16": np.mean([each.ged().item() for each in expected]),
        "val_CI_16": np.mean([each.ci().item() for each in expected]),
        "val_D_max_16": np.mean([each.d_max().item() for each in expected])})
    assert Validation(cases, process(), "ddim", 6).scores(masks) == {}


def test_drawing_can_be_broken_off(cases, model):
    steps = []

    def on_step(*_):
        steps.append(1)
        if len(steps) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        Validation(cases, process(), "ddim", 2).draw(lambda: model, on_step)
    assert len(steps) == 3


@pytest.mark.parametrize("fails", ["copy", "call"])
def test_without_memory_nothing_is_drawn_and_a_line_says_so(cases, model, monkeypatch, capsys, fails):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError

    if fails == "call":
        monkeypatch.setattr(model, "forward", no_memory)
    assert Validation(cases, process(), "ddim", 2).draw(no_memory if fails == "copy" else lambda: model) is None
    assert "memory" in capsys.readouterr().out
