"""Steps that go wrong are skipped, counted and named, and too many of them end the run."""

import copy

import numpy as np
import pytest
import torch
from helpers.loops import batch, make_cases, make_loop, spoil
from helpers.models import awake, make_cimd, weights
from helpers.refusals import refusal

from guided_diffusion import checkpoint
from guided_diffusion.resample import LossSecondMomentResampler
from guided_diffusion.system.errors import InputError
from guided_diffusion.training.watch import BadSteps, Meter


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_step_without_a_finite_gradient_changes_no_weight_and_is_named(tmp_path, capsys, dtype, value):
    loop = make_loop(tmp_path, max_steps=3, dtype=dtype, lr=1e-2, ema_rates=("0.9",))
    states, run_step = [], spoil(loop, {2}, value=value).run_step

    def watched(*args):
        run_step(*args)
        states.append((weights(loop.cimd), copy.deepcopy(loop.optimizer.state_dict()["state"])))

    loop.run_step = watched
    loop.run_loop()
    (first, adam), (second, adam_then), (third, _) = states
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(adam[i][key], adam_then[i][key]) for i in adam for key in adam[i])
    assert any(not torch.equal(first[name], third[name]) for name in first)
    assert all(value.isfinite().all() for value in [*third.values(), *loop.ema["0.9"].state_dict().values()])
    assert loop.step == 3 and loop.position == 6 and loop.bad_steps.count == 1
    line, = [line for line in capsys.readouterr().out.splitlines() if "is skipped" in line]
    assert line.startswith("step 2 is skipped: the loss is not finite for ")
    assert f"{loop.data.case_name(3)} at timestep " in line and line.endswith(" on rank 0") and line.count("rank") == 1


def test_the_skipped_step_is_as_if_it_had_not_been_for_the_steps_after(tmp_path):
    """AdamW's state, its own count of steps included, is that of a run that never saw the example."""
    one, other = (make_loop(tmp_path, cimd=awake(make_cimd()), lr=1e-2) for _ in range(2))
    data = [batch(2, seed=seed) for seed in range(3)]
    for i, (image, mask, *_) in enumerate(data):
        if i == 1:
            one.run_step(image * float("nan"), mask, [10, 11])
        else:
            one.run_step(image, mask, [2 * i, 2 * i + 1])
            other.run_step(image, mask, [2 * i, 2 * i + 1])
    for name, value in one.cimd.state_dict().items():
        assert torch.equal(value, other.cimd.state_dict()[name])


def test_any_other_optimiser_is_spared_such_a_gradient_too(tmp_path):
    loop = make_loop(tmp_path, max_steps=3)
    loop.optimizer = torch.optim.SGD(loop.cimd.parameters(), lr=1e-2)
    spoil(loop, {2}).run_loop()
    assert loop.bad_steps.count == 1 and all(value.isfinite().all() for value in loop.cimd.state_dict().values())


def test_too_many_in_a_row_end_the_run_and_leave_its_checkpoints_alone(tmp_path, capsys):
    loop = spoil(make_loop(tmp_path, max_steps=20, max_bad_steps=3, save_interval=2, lr=1e-3), {3, 4, 6, 7, 8, 9, 10})
    with pytest.raises(InputError) as error:
        loop.run_loop()
    for word in ("step 8", "3 in a row", "--lr", "--grad_clip", loop.data.case_name(15)):
        assert word in str(error.value)
    loop.saver.wait()
    assert loop.bad_steps.count == 5 and capsys.readouterr().out.count("is skipped") == 5
    newest = checkpoint.steps_in(tmp_path)[-1]
    for name in (checkpoint.model_name(newest), checkpoint.ema_name("0.9999", newest)):
        assert all(value.isfinite().all() for value in checkpoint.load(tmp_path / name).values())
    resumed = make_loop(tmp_path, max_steps=newest + 1)
    resumed.resume(tmp_path / checkpoint.NEWEST)
    assert resumed.run_loop() is None and resumed.step == newest + 1


def test_bad_steps_that_are_not_in_a_row_do_not_add_up(tmp_path):
    loop = spoil(make_loop(tmp_path, max_steps=8, max_bad_steps=2), {1, 3, 5, 7, 8})
    assert "2 in a row" in refusal(loop.run_loop)
    (tmp_path / "more").mkdir()
    loop = spoil(make_loop(tmp_path / "more", max_steps=8, max_bad_steps=2), {1, 3, 5, 7})
    loop.run_loop()
    assert loop.step == 8 and loop.bad_steps.count == 4


def test_a_gradient_alone_that_is_not_finite_is_skipped_too(tmp_path, capsys):
    loop = make_loop(tmp_path, max_steps=2)
    parameter = loop.cimd.model.out[2].weight
    parameter.register_hook(lambda gradient: gradient * float("inf") if loop.step == 0 else gradient)
    before = weights(loop.cimd)
    run_step = loop.run_step

    def watched(*args):
        run_step(*args)
        if loop.step == 1:
            assert all(torch.equal(value, before[name]) for name, value in loop.cimd.state_dict().items())

    loop.run_step = watched
    loop.run_loop()
    assert "step 1 is skipped: the gradient is not finite" in capsys.readouterr().out
    assert all(value.isfinite().all() for value in loop.cimd.state_dict().values())


@pytest.mark.parametrize("norm", [1e-3, 1e6])
def test_a_gradient_longer_than_asked_for_is_shortened_and_no_other(tmp_path, norm):
    plain, clipped = (make_loop(tmp_path, cimd=awake(make_cimd()), grad_clip=clip) for clip in (0, norm))
    lengths = []
    for loop in (plain, clipped):
        loop.forward_backward(*batch(2))
        before = {name: p.grad.clone() for name, p in loop.cimd.named_parameters()}
        loop.optimize()
        lengths.append(np.sqrt(sum(p.grad.double().square().sum().item() for p in loop.cimd.parameters())))
    factor = min(1, norm / lengths[0])
    assert lengths[1] == pytest.approx(factor * lengths[0], rel=1e-4)
    for name, p in clipped.cimd.named_parameters():
        torch.testing.assert_close(p.grad, before[name] * factor, rtol=1e-3, atol=1e-12)


def test_losses_that_are_not_finite_enter_no_mean():
    meter = Meter(1000, torch.device("cpu"))
    meter.add(torch.tensor([10, 20, 900]), {"loss": torch.tensor([1.0, float("nan"), 5.0]),
                                            "mse": torch.tensor([3.0, 7.0, float("inf")])})
    values = meter.read()
    assert values["loss"] == values["loss_q0"] == 1 and values["mse"] == 3 and "loss_q3" not in values


def test_the_loss_aware_sampler_forgets_losses_that_are_not_finite():
    sampler = LossSecondMomentResampler(3, history_per_term=2)
    for t, loss in [(0, 1.0), (0, float("nan")), (0, 2.0), (1, 1.0), (1, float("inf")), (1, 1.0), (2, 3.0), (2, 3.0)]:
        sampler.update(torch.tensor([t]), torch.tensor([loss]))
    assert np.isfinite(sampler.probabilities()).all() and sampler.counts.tolist() == [2, 2, 2]
    assert sampler.history.tolist() == [[1, 2], [1, 1], [3, 3]]


def test_nothing_noted_is_nothing_bad():
    steps = BadSteps(1)
    steps.check(None)
    steps.note(torch.tensor(False), 1, [0], torch.tensor([5]), torch.tensor([1.0]))
    steps.check(None)
    assert steps.count == 0


def test_names_are_those_of_the_cases_at_their_places(tmp_path):
    data = make_loop(tmp_path, cases=make_cases(7)).data
    for position in (0, 5, 8, 30, 3):
        image, _ = data[position]
        assert np.array_equal(image, data.cases.compact(int(data.case_name(position).removeprefix("case")))[0])
