"""The ensembles drawn while training are those that sampling would draw, whoever draws them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.models import MODEL

from guided_diffusion import metrics, script_util
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.masks import to_masks
from guided_diffusion.methods.cimd import CIMD
from guided_diffusion.sampling.ensembles import EnsembleSampler
from guided_diffusion.training.callback import Stopped
from guided_diffusion.training.validation import SCORED, SHOWN, Validation


@pytest.fixture
def cases(make_cases, tmp_path):
    return SegmentationCases(make_cases(tmp_path / "data", count=6, raters=3), MODEL["image_size"], 4)


@pytest.fixture
def model(trained):
    from guided_diffusion import checkpoint

    network, _ = script_util.create_model_and_diffusion(**MODEL)
    checkpoint.load_model(network, trained / "savedmodel.pt")
    return network.eval()


def method_of(model, sampler="ddim"):
    process = script_util.create_gaussian_diffusion(steps=MODEL["diffusion_steps"], timestep_respacing="4")
    return CIMD(process, model, sampler=sampler).prepare()


def test_cases_are_spread_over_all_and_always_the_same(cases):
    assert [case.name for case in Validation(cases, method_of, count=3).cases] == ["case0", "case2", "case5"]
    assert [case.name for case in Validation(cases, method_of, count=1).cases] == ["case0"]
    assert len(Validation(cases, method_of, count=99).cases) == 6


@pytest.mark.parametrize("scored, members", [(False, SHOWN), (True, SCORED)])
def test_masks_are_those_that_sampling_draws(cases, model, scored, members):
    validation, method = Validation(cases, method_of, count=2, seed=3, scored=scored), method_of(model, "dpm++sde")
    drawn = validation.draw(lambda: method)
    sampler = EnsembleSampler(method, batch_size=5, seed=3)
    wanted = [to_masks(samples) for _, samples in sampler.ensembles([cases[0], cases[5]], members)]
    assert len(drawn) == 2
    for ours, theirs in zip(drawn, wanted):
        assert ours.dtype == bool and ours.shape == theirs.shape
        assert (ours != theirs).mean() < 0.01  # the shape of a batch moves the last bits
    again = validation.draw(lambda: method)
    assert all((a == b).all() for a, b in zip(drawn, again)) and any(masks.any() for masks in drawn)


def test_drawing_leaves_the_randomness_of_training_alone(cases, model):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    Validation(cases, method_of, count=2).draw(lambda: method_of(model, "ancestral"))
    assert (torch.get_rng_state() == state).all() and not model.training


def test_scores_are_the_means_of_the_cases(cases):
    rng = np.random.default_rng(0)
    validation = Validation(cases, method_of, count=6, scored=True)
    masks = [rng.random((SCORED, *case.raters.shape[1:])) < 0.3 for case in validation.cases]
    expected = [metrics.Agreement(drawn, case.raters) for drawn, case in zip(masks, validation.cases)]
    assert validation.means(masks) == pytest.approx({
        "val_GED_16": np.mean([each.ged().item() for each in expected]),
        "val_GED_unbiased_16": np.mean([each.ged_unbiased().item() for each in expected]),
        "val_CI_16": np.mean([each.ci().item() for each in expected]),
        "val_D_max_16": np.mean([each.d_max().item() for each in expected])})
    assert Validation(cases, method_of, count=6).means(masks) == {}


def test_cases_are_drawn_every_so_many_steps_and_at_the_end(cases):
    validation = Validation(cases, method_of, count=1, interval=4)
    due = [step for step in range(1, 11) if validation.due(SimpleNamespace(step=step, end=10))]
    assert due == [4, 8, 10]
    assert not validation.due(SimpleNamespace(step=3, end=0))


def test_drawing_can_be_broken_off(cases, model):
    steps = []

    def on_step(*_):
        steps.append(1)
        if len(steps) == 3:
            raise Stopped

    with pytest.raises(Stopped):
        Validation(cases, method_of, count=2).draw(lambda: method_of(model), on_step)
    assert len(steps) == 3


@pytest.mark.parametrize("fails", ["copy", "call"])
def test_without_memory_nothing_is_drawn_and_a_line_says_so(cases, model, monkeypatch, capsys, fails):
    def no_memory(*args, **kwargs):
        raise torch.OutOfMemoryError

    if fails == "call":
        monkeypatch.setattr(model, "forward", no_memory)
    draw = Validation(cases, method_of, count=2).draw
    assert draw(no_memory if fails == "copy" else lambda: method_of(model)) is None
    assert "memory" in capsys.readouterr().out
