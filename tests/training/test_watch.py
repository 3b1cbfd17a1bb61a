"""Steps that go wrong are skipped, counted and named, and too many of them end the run."""

import copy

import numpy as np
import pytest
import torch
from helpers.loops import bad_steps, batch, make_cases, make_loop, saver_of, spoil, watch_steps
from helpers.models import MeanOutline, assert_same, awake, make_cimd, weights
from helpers.refusals import refusal

from guided_diffusion import checkpoint
from guided_diffusion.methods.base import Losses
from guided_diffusion.resample import LossSecondMomentResampler
from guided_diffusion.system.errors import InputError
from guided_diffusion.training.resume import resume
from guided_diffusion.training.watch import BadSteps, Later, Meter


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_step_without_a_finite_gradient_changes_no_weight_and_is_named(tmp_path, capsys, dtype, value):
    loop = make_loop(tmp_path, max_steps=3, dtype=dtype, lr=1e-2, ema_rate="0.9")
    states = []
    watch_steps(spoil(loop, {2}, value=value), lambda: states.append(
        (weights(loop.method), copy.deepcopy(loop.optimizer.state_dict()["state"]))))
    loop.run_loop()
    (first, adam), (second, adam_then), (third, _) = states
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(adam[i][key], adam_then[i][key]) for i in adam for key in adam[i])
    assert any(not torch.equal(first[name], third[name]) for name in first)
    assert all(value.isfinite().all() for value in [*third.values(), *loop.ema["0.9"].state_dict().values()])
    assert loop.step == 3 and loop.position == 6 and bad_steps(loop) == 1
    line, = [line for line in capsys.readouterr().out.splitlines() if "is skipped" in line]
    assert line.startswith("step 2 is skipped: the loss is not finite for ")
    assert f"{loop.data.case_name(3)} at timestep " in line and line.endswith(" on rank 0") and line.count("rank") == 1


def test_the_skipped_step_is_as_if_it_had_not_been_for_the_steps_after(tmp_path):
    """AdamW's state, its own count of steps included, is that of a run that never saw the example."""
    one, other = (make_loop(tmp_path, awake(make_cimd()), lr=1e-2, ema_rate="0.5") for _ in range(2))
    for i, examples in enumerate(batch(2, seed=seed) for seed in range(3)):
        if i == 1:
            one.run_step(examples._replace(image=examples.image * float("nan")))
        else:
            one.run_step(examples)
            other.run_step(examples)
    assert_same(weights(one.method), weights(other.method))
    assert_same(weights(one.ema["0.5"]), weights(other.ema["0.5"]))


@pytest.mark.parametrize("bad", [{2}, {3}, {2, 3}])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_skipped_step_before_a_checkpoint_leaves_the_saved_averages_alone(tmp_path, dtype, bad):
    """Also where the run goes on from there, bit for bit; with float16, the gradient scaler does the skipping."""
    def loop(name, steps):
        (tmp_path / name).mkdir(exist_ok=True)
        made = make_loop(tmp_path / name, MeanOutline(), max_steps=steps, save_interval=1, lr=1e-2, ema_rate="0.5",
                         dtype=dtype)
        made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1, enabled=dtype == torch.float16)
        return spoil(made, bad)

    straight = loop("straight", 5)
    straight.run_loop()
    loop("stopped", 3).run_loop()
    resumed = loop("stopped", 5)
    resume(resumed, tmp_path / "stopped" / checkpoint.NEWEST)
    resumed.run_loop()
    assert bad_steps(straight) == bad_steps(resumed) == len(bad)
    for step in range(1, 6):
        names = checkpoint.ema_name("0.5", step), checkpoint.model_name(step), checkpoint.opt_name(step)
        for name in names:
            assert_same(*(checkpoint.load(tmp_path / folder / name) for folder in ("straight", "stopped")))
        if step > 1:
            averages, models = ([checkpoint.load(tmp_path / "straight" / name(at)) for at in (step - 1, step)]
                                for name in (lambda at: checkpoint.ema_name("0.5", at), checkpoint.model_name))
            for name, value in averages[1].items():
                if step in bad:
                    assert torch.equal(value, averages[0][name]) and torch.equal(models[1][name], models[0][name])
                else:
                    torch.testing.assert_close(value, (averages[0][name] + models[1][name]) / 2)
            assert any(not torch.equal(models[1][name], models[0][name]) for name in models[0]) == (step not in bad)


def test_too_many_in_a_row_end_the_run_and_leave_its_checkpoints_alone(tmp_path, capsys):
    loop = spoil(make_loop(tmp_path, max_steps=20, max_bad_steps=3, save_interval=2, lr=1e-3), {3, 4, 6, 7, 8, 9, 10})
    with pytest.raises(InputError) as error:
        loop.run_loop()
    for word in ("step 8", "3 in a row", "--lr", "--grad_clip", loop.data.case_name(15)):
        assert word in str(error.value)
    saver_of(loop).wait()
    assert bad_steps(loop) == 5 and capsys.readouterr().out.count("is skipped") == 5
    newest = checkpoint.steps_in(tmp_path)[-1]
    for name in (checkpoint.model_name(newest), checkpoint.ema_name("0.9999", newest)):
        assert all(value.isfinite().all() for value in checkpoint.load(tmp_path / name).values())
    resumed = make_loop(tmp_path, max_steps=newest + 1)
    resume(resumed, tmp_path / checkpoint.NEWEST)
    assert resumed.run_loop() is None and resumed.step == newest + 1


def test_bad_steps_that_are_not_in_a_row_do_not_add_up(tmp_path):
    loop = spoil(make_loop(tmp_path, max_steps=8, max_bad_steps=2), {1, 3, 5, 7, 8})
    assert "2 in a row" in refusal(loop.run_loop)
    (tmp_path / "more").mkdir()
    loop = spoil(make_loop(tmp_path / "more", max_steps=8, max_bad_steps=2), {1, 3, 5, 7})
    loop.run_loop()
    assert loop.step == 8 and bad_steps(loop) == 4


def test_a_gradient_alone_that_is_not_finite_is_skipped_too(tmp_path, capsys):
    loop = make_loop(tmp_path, max_steps=2)
    parameter = loop.method.model.out[2].weight
    parameter.register_hook(lambda gradient: gradient * float("inf") if loop.step == 0 else gradient)
    before, states = weights(loop.method), []
    watch_steps(loop, lambda: states.append(weights(loop.method))).run_loop()
    assert_same(states[0], before)
    assert any(not torch.equal(value, before[name]) for name, value in states[1].items())
    assert "step 1 is skipped: the gradient is not finite" in capsys.readouterr().out
    assert all(value.isfinite().all() for value in loop.method.state_dict().values())


@pytest.mark.parametrize("norm", [1e-3, 1e6])
def test_a_gradient_longer_than_asked_for_is_shortened_and_no_other(tmp_path, norm):
    plain, clipped = (make_loop(tmp_path, awake(make_cimd()), grad_clip=clip) for clip in (0, norm))
    lengths = []
    for loop in (plain, clipped):
        loop.forward_backward(batch(2))
        before = {name: p.grad.clone() for name, p in loop.method.named_parameters()}
        loop.optimize()
        lengths.append(np.sqrt(sum(p.grad.double().square().sum().item() for p in loop.method.parameters())))
    factor = min(1, norm / lengths[0])
    assert lengths[1] == pytest.approx(factor * lengths[0], rel=1e-4)
    for name, p in clipped.method.named_parameters():
        torch.testing.assert_close(p.grad, before[name] * factor, rtol=1e-3, atol=1e-12)


def test_losses_that_are_not_finite_enter_no_mean():
    meter = Meter(("q0", "q1", "q2", "q3"), torch.device("cpu"))
    meter.add(Losses({"loss": torch.tensor([1.0, float("nan"), 5.0]), "mse": torch.tensor([3.0, 7.0, float("inf")])},
                     torch.ones(3), torch.tensor([0, 0, 3])))
    values = meter.read()
    assert values["loss"] == values["loss_q0"] == 1 and values["mse"] == 3 and "loss_q3" not in values


def test_the_loss_aware_sampler_forgets_losses_that_are_not_finite():
    sampler = LossSecondMomentResampler(3, history_per_term=2)
    for t, loss in [(0, 1.0), (0, float("nan")), (0, 2.0), (1, 1.0), (1, float("inf")), (1, 1.0), (2, 3.0), (2, 3.0)]:
        sampler.update(torch.tensor([t]), torch.tensor([loss]))
    assert np.isfinite(sampler.probabilities()).all() and sampler.counts.tolist() == [2, 2, 2]
    assert sampler.history.tolist() == [[1, 2], [1, 1], [3, 3]]


def test_what_a_message_says_of_an_example_is_what_the_method_says(tmp_path, capsys):
    loop, steps = make_loop(tmp_path), BadSteps(3)
    for bad in (False, True):
        steps.stepped(loop, batch(2), Losses({"loss": torch.tensor([1.0, float("nan")])}, torch.ones(2),
                                             seen={"site": torch.tensor([7, 8])}), Later(torch.tensor(bad)))
        assert steps.count == 0  # until the step after it, when nobody has to wait for the device
    steps.check(loop.data)
    steps.check(loop.data)
    assert steps.count == 1
    assert f"step 1 is skipped: the loss is not finite for {loop.data.case_name(3)} at site 8 on rank 0" in (
        capsys.readouterr().out)


def test_names_are_those_of_the_cases_at_their_places(tmp_path):
    data = make_loop(tmp_path, cases=make_cases(7)).data
    for position in (0, 5, 8, 30, 3):
        image, _ = data[position]
        assert np.array_equal(image, data.cases.compact(int(data.case_name(position).removeprefix("case")))[0])
