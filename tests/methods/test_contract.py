"""Whatever answers to the contract of methods is trained, saved, gone on with, drawn from and scored as CIMD is."""

import json

import numpy as np
import pytest
import torch
from helpers.loops import logged, make_cases, make_loop
from helpers.models import ENERGY, PROBUNET, MeanOutline, assert_same, make_energy, make_probunet, weights
from helpers.processes import SAMPLE, TRAIN

from guided_diffusion import Segmenter, checkpoint, logger, metrics
from guided_diffusion.data.masks import to_masks
from guided_diffusion.methods.base import join, select
from guided_diffusion.sampling.ensembles import EnsembleSampler
from guided_diffusion.training.resume import resume
from guided_diffusion.training.validation import SCORED, Validation

# each from a seed, or a network that draws
MADE = {"mean outline": MeanOutline, "probunet": make_probunet, "energy": make_energy}
made = pytest.mark.parametrize("make", MADE.values(), ids=MADE)
COMMANDS = {"probunet": PROBUNET, "energy": ENERGY}  # flags of training; all other tests of commands are of cimd


def test_it_trains_and_the_log_splits_its_loss_by_nothing(tmp_path):
    logger.configure(tmp_path)
    method = MeanOutline()
    make_loop(tmp_path, method, make_cases(raters=[1, 4, 2, 3, 5]), lr=0.1, max_steps=40, log_interval=5).run_loop()
    logger.close()
    rows = logged(tmp_path)
    assert len(rows) == 8 and rows[-1]["loss"] < 0.95 * rows[0]["loss"]  # each the mean of two epochs
    assert all([name for name in row if name.startswith("loss")] == ["loss"] for row in rows)
    assert method.examples == 80


@made
def test_it_goes_on_bit_for_bit_with_its_own_state(tmp_path, make):
    def run(name, steps, seed, again=False):
        (tmp_path / name).mkdir(exist_ok=True)
        logger.configure(tmp_path / name, last_step=steps // 2 if again else 0)
        method = make(seed)
        loop = make_loop(tmp_path / name, method, batch_size=3, microbatch=2, max_steps=steps, lr=0.01, log_interval=4,
                         ema_rate="0.5,0.99")
        if again:
            resume(loop, tmp_path / name / checkpoint.NEWEST)
            assert getattr(method, "examples", 9) == 9
        loop.run_loop()
        logger.close()

    run("straight", 6, seed=0)
    run("stopped", 3, seed=0)
    run("stopped", 6, seed=1, again=True)  # whatever it started from is overwritten
    names = {path.name for path in (tmp_path / "straight").glob("*000006.pt")}
    assert len(names) == 4
    for name in names:
        assert_same(*(checkpoint.load(tmp_path / folder / name) for folder in ("straight", "stopped")))
    if make is MeanOutline:
        assert checkpoint.load(tmp_path / "stopped" / "optsavedmodel000006.pt")["outline"] == {"examples": 18}
    rows = [[row for row in logged(tmp_path / name) if row["step"] != 3] for name in ("straight", "stopped")]
    assert rows[0] == rows[1] and [row["step"] for row in rows[0]] == [4, 6]


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_it_draws_in_batches_across_cases_and_sees_a_scan_once(batch_size):
    cases, method, calls, steps = make_cases(), MeanOutline().prepare(), [], []
    method.model.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    sampler = EnsembleSampler(method, batch_size=batch_size)
    drawn = list(sampler.ensembles(cases, 3, lambda members, x, x_start: steps.append((len(members), x.shape))))
    assert calls == [1] * 5 and method.steps == 1
    assert sum(count for count, _ in steps) == 15 and {shape[0] for _, shape in steps} == {batch_size}
    for case, (drawn_case, samples) in zip(cases, drawn, strict=True):
        assert drawn_case is case and samples.shape == (3, 16, 16) and samples.dtype == np.float32
        expected = method.model(torch.from_numpy(case.image)[None]).sigmoid().detach().numpy()[0, 0]
        np.testing.assert_allclose(samples, expected[None].repeat(3, 0), atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_members_that_differ_are_the_same_in_whatever_batch_they_are_drawn(batch_size):
    cases, method, calls = make_cases(), make_probunet().prepare(), []
    method.model.unet.register_forward_hook(lambda module, args, out: calls.append(len(out)))
    drawn = dict((case.name, samples) for case, samples in EnsembleSampler(
        method, batch_size=batch_size).ensembles(cases, 3))
    assert calls == [1] * 5 and len(drawn) == 5
    for case, samples in EnsembleSampler(method, batch_size=2).ensembles(cases[::-1], 2):
        np.testing.assert_allclose(samples, drawn[case.name][:2], atol=1e-6)
        assert abs(samples[0] - samples[1]).max() > 1e-4


@made
def test_it_is_drawn_and_scored_while_it_trains(tmp_path, make):
    """With its present weights at first, then with the averages, once those have forgotten how they began."""
    held_out = make_cases(count=3, seed=1)
    logger.configure(tmp_path)
    loop = make_loop(tmp_path, make(), lr=0.1, max_steps=12, log_interval=100, save_interval=6, ema_rate="0.5",
                     callbacks=[Validation(held_out, lambda network: make(model=network), count=2, interval=6,
                                           scored=True)])
    loop.run_loop()
    logger.close()
    rows = logged(tmp_path)
    assert [row["step"] for row in rows] == [6, 12]
    for row, name in zip(rows, (checkpoint.model_name(6), checkpoint.ema_name("0.5", 12))):
        method = make(seed=1).prepare()
        checkpoint.load_model(method.model, tmp_path / name)
        drawn = EnsembleSampler(method, batch_size=5).ensembles([held_out[0], held_out[2]], SCORED)
        pairs = [metrics.Agreement(to_masks(samples), case.raters) for case, samples in drawn]
        for score in ("GED", "CI", "D_max"):
            assert row[f"val_{score}_16"] == pytest.approx(np.mean([metrics.SCORES[score](pair) for pair in pairs]))
    assert weights(loop.method.model).keys() == checkpoint.load(tmp_path / checkpoint.NEWEST).keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_commands_train_go_on_draw_and_score(run, make_cases, undrawn, tmp_path, name):
    data = make_cases(tmp_path / "data", count=3, raters=[2, 1, 4])
    flags = [word for item in COMMANDS[name].items() for word in (f"--{item[0]}", item[1])]
    where = ["--data_dir", data, "--results_dir", "results"]
    for steps in (1, 3):
        result = run(TRAIN, *where, *flags, "--batch_size", 2, "--max_steps", steps, "--log_interval", 1,
                     "--sample_interval", 3, "--val_dir", data, "--val_cases", 1)
        assert result.code == 0, result.err
    assert "resumed at step 1" in result.out
    rows = logged(tmp_path / "results")
    assert [row["step"] for row in rows] == [1, 2, 3] and 0 <= rows[-1]["val_GED_16"] <= 2
    result = run(SAMPLE, *where, "--num_ensemble", 3, "--batch_size", 4)
    assert result.code == 0, result.err
    assert "3 of them already complete" in run(SAMPLE, *where, "--num_ensemble", 3).out
    result = run("segmentation_evaluate.py", "--data_dir", data, "--samples_dir", "results", "--ensemble_sizes", "2")
    assert result.code == 0, result.err
    scores = json.loads((tmp_path / "results" / "scores.json").read_text())
    assert scores["cases"] == 3 and 0 <= scores["all"]["GED"]["mean"] <= 2
    ensemble = Segmenter.load(tmp_path / "results", device="cpu").sample(data / "case0", 3)
    with np.load(tmp_path / "results" / "case0_ensemble.npz") as drawn:
        np.testing.assert_allclose(ensemble.samples, drawn["samples"], atol=1e-5)


def test_what_was_encoded_is_joined_and_selected_whatever_contains_it():
    scans = [{"deep": [torch.full((1, 2), float(i)), (torch.full((1, 3, 2), float(-i)),)]} for i in range(4)]
    rows = select(join(scans), [2, 0, 2])
    assert_same(rows, {"deep": [torch.tensor([[2.0] * 2, [0.0] * 2, [2.0] * 2]),
                                (torch.tensor([-2.0, 0.0, -2.0]).view(3, 1, 1).expand(3, 3, 2),)]})
