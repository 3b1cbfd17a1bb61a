"""One training step and the loop around it, in one process."""

import copy
import csv
import itertools
import os
import signal
import time

import numpy as np
import pytest
import torch
from helpers.loops import Memory, batch, logged, make_cases, make_loop, next_floats, saver_of, spoil, watch_steps
from helpers.models import SIZE, MeanOutline, assert_same, awake, make_cimd, weights
from torch import nn

from guided_diffusion import checkpoint, dist_util, logger
from guided_diffusion.data.cases import Case
from guided_diffusion.data.stream import ShuffledCases
from guided_diffusion.methods.base import Losses
from guided_diffusion.resample import LossSecondMomentResampler, UniformSampler
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.system import storage
from guided_diffusion.system.errors import InputError
from guided_diffusion.training.callback import Stopped
from guided_diffusion.training.resume import resume
from guided_diffusion.training.validation import Validation
from guided_diffusion.training.watch import Meter


def gradients(module):
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def uneven_sampler(steps=1000):
    """A timestep sampler that has learnt, so that its importance weights differ."""
    sampler = LossSecondMomentResampler(steps, history_per_term=1)
    sampler.update(torch.arange(steps), torch.linspace(0.5, 2, steps))
    return sampler


# ---- one step ----

@pytest.mark.parametrize("microbatch", [1, 2, 3, 5, 8])
def test_microbatches_give_the_gradient_of_the_whole_batch(tmp_path, microbatch):
    cimd = awake(make_cimd(learn_sigma=True, schedule_sampler=uneven_sampler())).double()
    examples = batch(dtype=torch.float64)
    losses = make_loop(tmp_path, cimd, batch_size=5).forward_backward(examples)
    expected = gradients(cimd)
    parts = make_loop(tmp_path, cimd, batch_size=5, microbatch=microbatch).forward_backward(examples)
    assert losses.terms.keys() == parts.terms.keys() == {"loss", "mse", "vb", "kl"}
    for name, values in losses.terms.items():
        torch.testing.assert_close(parts.terms[name], values, rtol=1e-6, atol=1e-8)
    assert torch.equal(parts.weights, losses.weights) and len(losses.weights.unique()) == 5
    assert torch.equal(parts.seen["timestep"], losses.seen["timestep"])
    for name, grad in gradients(cimd).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_microbatch_is_the_most_that_the_network_sees_at_once(tmp_path):
    cimd, sizes = make_cimd(), []
    cimd.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    make_loop(tmp_path, cimd, batch_size=5, microbatch=2).forward_backward(batch())
    make_loop(tmp_path, cimd, batch_size=5).forward_backward(batch())
    assert sizes == [2, 2, 1, 5]


def test_accumulated_batches_train_as_one_of_all_their_examples_and_resume_exactly(tmp_path):
    """Bit for bit as microbatches of one large batch; the network never sees more than one batch."""
    def train(name, steps, again=False, **settings):
        cimd, sizes, folder = make_cimd(), set(), tmp_path / name
        cimd.model.register_forward_pre_hook(lambda module, args: sizes.add(len(args[0])))
        folder.mkdir(exist_ok=True)
        loop = make_loop(folder, cimd, max_steps=steps, lr=1e-3, **settings)
        if again:
            resume(loop, folder / "savedmodel.pt")
        loop.run_loop()
        return loop, sizes

    one, _ = train("one", 4, batch_size=6, microbatch=2)
    many, sizes = train("many", 4, batch_size=2, grad_accumulation=3)
    assert sizes == {2} and many.position == one.position == 24
    train("stopped", 2, batch_size=2, grad_accumulation=3)
    resumed, _ = train("stopped", 4, again=True, batch_size=3, grad_accumulation=2, microbatch=2)
    fixed, sizes = train("fixed", 4, batch_size=2, global_batch=6)
    assert sizes == {2}
    for other in (many, resumed, fixed):
        assert_same(weights(other.method), weights(one.method))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_a_global_batch_is_shared_as_evenly_as_can_be(tmp_path, monkeypatch, ranks):
    monkeypatch.setattr(dist_util, "world_size", lambda: ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(dist_util, "rank", lambda rank=rank: rank)
        loop = make_loop(tmp_path, MeanOutline(), global_batch=5)
        assert loop.global_batch == 5
        shares.append(loop.share)
    assert [place for share in shares for place in share] == list(range(5))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("rule, rate", [("none", 1e-3), ("linear", 4e-3), ("sqrt", 2e-3)])
def test_learning_rate_follows_the_examples_of_a_step_by_the_rule(tmp_path, rule, rate):
    loop = make_loop(tmp_path, lr=1e-3, batch_size=2, grad_accumulation=4, lr_scaling=rule, lr_warmup=2,
                     lr_base_batch=0 if rule == "none" else 2)
    assert [loop.learning_rate(step) for step in range(3)] == pytest.approx([rate / 2, rate, rate])


def test_gradient_is_that_of_the_mean_of_weight_times_loss(tmp_path):
    cimd = awake(make_cimd(schedule_sampler=uneven_sampler())).double()
    examples = batch(dtype=torch.float64)
    loop = make_loop(tmp_path, cimd, batch_size=5)
    for _ in range(2):  # nothing of the first is left in the second
        losses = loop.forward_backward(examples)
    result = gradients(cimd)
    cimd.zero_grad()
    again = cimd(examples)
    torch.testing.assert_close(losses.terms["loss"], again.terms["loss"].detach())
    assert not any(value.requires_grad for value in losses.terms.values()) and len(losses.weights.unique()) == 5
    (again.terms["loss"] * again.weights).mean().backward()
    for name, grad in gradients(cimd).items():
        torch.testing.assert_close(result[name], grad, rtol=1e-6, atol=1e-10)


def test_every_weight_of_unet_amn_and_acn_moves(tmp_path):
    cimd = make_cimd(num_channels=64, learn_sigma=True)
    before = weights(cimd)
    make_loop(tmp_path, cimd, max_steps=4, lr=1e-3).run_loop()
    still = [name for name, value in cimd.state_dict().items() if torch.equal(value, before[name])]
    assert still == [] and any(name.startswith("prior") for name in before)


def test_one_step_is_one_step_of_the_optimiser(tmp_path, monkeypatch):
    loop = make_loop(tmp_path, batch_size=3, microbatch=1, max_steps=4)
    calls = []
    original = loop.optimizer.step
    monkeypatch.setattr(loop.optimizer, "step", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    loop.run_loop()
    assert len(calls) == loop.step == 4 and loop.position == 12
    assert {state["step"].item() for state in loop.optimizer.state.values()} == {4}


def test_optimiser_takes_adamw_steps_at_the_flags_rate_and_decay(tmp_path):
    """Adam's first step has the length of the learning rate, after the weights have decayed by lr * decay."""
    cimd = awake(make_cimd())
    loop = make_loop(tmp_path, cimd, batch_size=5, lr=0.01, weight_decay=0.5)
    before = weights(cimd)
    loop.forward_backward(batch())
    loop.optimize()
    for name, parameter in cimd.named_parameters():
        clear = parameter.grad.abs() > 1e-5
        expected = before[name] * (1 - 0.01 * 0.5) - 0.01 * parameter.grad.sign()
        torch.testing.assert_close(parameter.detach()[clear], expected[clear], atol=2e-5, rtol=0)


@pytest.mark.parametrize("bad", [(), (2,), (1, 3, 4)])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_moving_averages_follow_their_closed_form_over_the_steps_that_were_not_skipped(tmp_path, dtype, bad):
    loop = make_loop(tmp_path, ema_rate="0.5, 0.9,0.9999", lr=1e-2, dtype=dtype)
    loop.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, enabled=dtype == torch.float16)
    start, history = weights(loop.method.model), []

    def taken():
        if loop.step not in bad:
            history.append(weights(loop.method.model))

    spoil(watch_steps(loop, taken), bad)
    batches = loop.data.batches(2)
    for _ in range(4):
        loop.run_step(next_floats(batches))
    assert len(history) == 4 - len(bad)
    for rate in (0.5, 0.9, 0.9999):
        average = loop.ema[str(rate)].state_dict()
        for name, value in average.items():
            expected = rate ** len(history) * start[name].double()
            for age, state in enumerate(reversed(history)):
                expected += (1 - rate) * rate ** age * state[name].double()
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert_same(weights(loop.ema["0.5"]), weights(loop.ema["0.5"]))  # asking again takes no step in twice
    assert not any(p.requires_grad for p in loop.ema["0.5"].parameters())


def test_averages_have_the_statistics_of_a_batch_norm(tmp_path):
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3, padding=1))
    loop = make_loop(tmp_path, MeanOutline(model=model), max_steps=3, ema_rate="0.5")
    loop.run_loop()
    average = checkpoint.load(tmp_path / checkpoint.ema_name("0.5", 3))
    assert average["0.num_batches_tracked"] == 3 and abs(average["0.running_mean"]).max() > 0.01
    for name, value in model.named_buffers():
        assert torch.equal(average[name], value)
    assert not torch.equal(average["1.weight"], model[1].weight)


# ---- randomness ----

def test_same_seed_trains_the_same_weights_and_another_seed_others(tmp_path):
    states = []
    for seed in (0, 0, 1):
        loop = make_loop(tmp_path / str(len(states)), make_cimd(dropout=0.2), seed=seed, max_steps=3)
        os.makedirs(tmp_path / str(len(states)))
        torch.manual_seed(len(states))  # the state of the global generator does not matter
        loop.run_loop()
        states.append(weights(loop.method))
    assert_same(states[0], states[1])
    assert any(not torch.equal(value, states[2][name]) for name, value in states[0].items())


def test_batches_of_two_ranks_are_together_those_of_one_with_twice_the_size():
    cases = make_cases(count=7)
    one = ShuffledCases(cases, seed=3).batches(6, start=12)
    two = [ShuffledCases(cases, seed=3).batches(3, start=12 + 3 * rank, stride=6) for rank in range(2)]
    for step in range(5):
        whole = next(one)
        parts = [next(part) for part in two]
        for name in ("image", "masks", "present"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert whole.places == parts[0].places + parts[1].places == [*range(12 + 6 * step, 18 + 6 * step)]


# ---- the loop ----

def test_learning_rate_falls_linearly_to_zero_and_the_loop_ends_there(tmp_path, monkeypatch):
    logger.configure(tmp_path)
    loop = make_loop(tmp_path, lr=4e-4, lr_anneal_steps=5, log_interval=1)
    rates = []
    original = loop.optimizer.step
    monkeypatch.setattr(loop.optimizer, "step", lambda *args, **kwargs: (
        rates.append(loop.optimizer.param_groups[0]["lr"]), original(*args, **kwargs)))
    loop.run_loop()
    logger.close()
    assert rates == pytest.approx([4e-4, 3.2e-4, 2.4e-4, 1.6e-4, 8e-5]) and loop.learning_rate(5) == 0
    assert [row["lr"] for row in logged(tmp_path)] == rates  # that of the step just taken


@pytest.mark.parametrize("max_steps, lr_anneal_steps, end", [(2, 0, 2), (0, 3, 3), (2, 5, 2), (5, 2, 2)])
def test_loop_ends_at_the_first_of_max_steps_and_lr_anneal_steps(tmp_path, max_steps, lr_anneal_steps, end):
    loop = make_loop(tmp_path, max_steps=max_steps, lr_anneal_steps=lr_anneal_steps, batch_size=1)
    batches = loop.data.batches
    loop.data.batches = lambda *args, **kwargs: itertools.islice(batches(*args, **kwargs), 9)  # to fail, not to hang
    assert loop.run_loop() is None
    assert loop.step == end


def test_learning_rate_rises_linearly_at_first_and_reaches_its_height_at_the_last_step_of_the_warmup(tmp_path):
    loop = make_loop(tmp_path, lr=4e-4, lr_warmup=4)
    assert [loop.learning_rate(step) for step in range(6)] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 4e-4, 4e-4])
    loop = make_loop(tmp_path, lr=4e-4, lr_warmup=2, lr_anneal_steps=4)
    assert [loop.learning_rate(step) for step in range(5)] == pytest.approx([2e-4, 3e-4, 2e-4, 1e-4, 0])


def test_learning_rate_is_constant_without_annealing(tmp_path):
    loop = make_loop(tmp_path, lr=0.3, max_steps=10)
    assert loop.learning_rate(0) == loop.learning_rate(9) == loop.learning_rate(10 ** 6) == 0.3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_ends_the_loop_after_the_step_and_saves(tmp_path, number):
    loop = make_loop(tmp_path)
    before = signal.getsignal(number)
    watch_steps(loop, before=lambda: loop.step == 1 and os.kill(os.getpid(), number))
    assert loop.run_loop() == number
    assert loop.step == 2 and (tmp_path / "savedmodel000002.pt").exists()
    assert signal.getsignal(number) is before


def test_log_has_means_of_each_loss_and_of_its_quartiles(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("guided_diffusion.logger.dump", lambda values, step: lines.append((step, values)))
    loop = make_loop(tmp_path, make_cimd(learn_sigma=True), batch_size=4, log_interval=2, max_steps=5)
    loop.run_loop()
    assert [step for step, _ in lines] == [2, 4, 5]
    for step, values in lines:
        assert {"loss", "mse", "vb", "kl", "lr", "images_per_second"} <= values.keys()
        assert 0 <= values["waiting_for_data"] <= 1
        assert values["samples"] == 4 * step
        assert values["loss"] == pytest.approx(values["mse"] + values["vb"] + 0.001 * values["kl"], rel=1e-5)
        assert min(v for k, v in values.items() if k.startswith("mse_q")) <= values["mse"]


def test_log_has_the_share_of_the_time_spent_waiting_for_data(tmp_path, monkeypatch):
    loop = make_loop(tmp_path, batch_size=1, log_interval=4, max_steps=12)
    times, slept, shares = [time.perf_counter()], [0.0], []
    batches = loop.data.batches

    def slow(*args):
        for i, cases in enumerate(batches(*args)):
            start = time.perf_counter()
            time.sleep(0.02 if i < 8 else 0.2)
            slept[-1] += time.perf_counter() - start
            yield cases

    def dump(values, step):
        times.append(time.perf_counter())
        slept.append(0.0)
        shares.append(values["waiting_for_data"])

    monkeypatch.setattr(loop.data, "batches", slow)
    monkeypatch.setattr("guided_diffusion.logger.dump", dump)
    loop.run_loop()
    expected = np.array(slept[:3]) / np.diff(times)
    np.testing.assert_allclose(shares, expected, atol=0.15)
    assert 0 < shares[1] < shares[2] < 1


def test_meter_averages_weighted_losses_by_part():
    meter = Meter(("low", "middle", "high"), torch.device("cpu"))
    meter.add(Losses({"mse": torch.tensor([1.0, 1.0, 2.0, 9.0])}, torch.tensor([1.0, 2.0, 2.0, 1.0]),
                     torch.tensor([0, 0, 2, 2])))
    meter.add(Losses({"mse": torch.tensor([5.0])}, torch.ones(1), torch.tensor([2])))
    values = meter.read()
    assert [values.get(f"mse_{part}") for part in meter.parts] == [1.5, None, 6.0]
    assert values["mse"] == pytest.approx(21 / 5)
    meter.add(Losses({"mse": torch.tensor([3.0])}, torch.ones(1), torch.tensor([1])))
    assert meter.read()["mse"] == 3.0


def test_meter_of_a_method_without_parts_averages_over_all():
    meter = Meter((), torch.device("cpu"))
    meter.add(Losses({"loss": torch.tensor([1.0, 3.0])}, torch.tensor([1.0, 2.0])))
    values = meter.read()
    assert values["loss"] == 3.5 and [name for name in values if name.startswith("loss")] == ["loss"]


def test_loss_aware_sampler_learns_from_the_unweighted_losses(tmp_path):
    sampler = LossSecondMomentResampler(4, history_per_term=1)
    loop = make_loop(tmp_path, make_cimd(timestep_respacing="4", schedule_sampler=sampler), batch_size=4)
    drawn, uneven = [], []
    original = loop.forward_backward

    def forward_backward(batch):
        unweighted = loop.method(batch).terms["loss"]
        losses = original(batch)
        torch.testing.assert_close(losses.terms["loss"], unweighted.detach())
        drawn.extend(zip(losses.seen["timestep"].tolist(), losses.terms["loss"].tolist()))
        uneven.append((losses.weights != 1).any().item())
        return losses

    loop.forward_backward = forward_backward
    batches = loop.data.batches(4)
    for _ in range(8):
        loop.run_step(next_floats(batches))
    assert {t: sampler.history[t, 0] for t in range(4)} == dict(drawn)  # the last loss of each timestep
    assert any(uneven)


# ---- checkpoints ----

def test_saves_are_named_by_the_number_of_steps_taken(tmp_path):
    make_loop(tmp_path, batch_size=1, max_steps=5, save_interval=2, ema_rate="0.9,0.99").run_loop()
    expected = {"savedmodel.pt"}
    for step in ("000002", "000004", "000005"):
        expected |= {f"savedmodel{step}.pt", f"optsavedmodel{step}.pt", f"emasavedmodel_0.9_{step}.pt",
                     f"emasavedmodel_0.99_{step}.pt"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert (tmp_path / "savedmodel.pt").read_bytes() == (tmp_path / "savedmodel000005.pt").read_bytes()
    assert checkpoint.load(tmp_path / "optsavedmodel000004.pt")["step"] == 4


def test_saved_files_hold_unet_averages_and_encoders(tmp_path):
    loop = make_loop(tmp_path, max_steps=2, ema_rate="0.9")
    loop.run_loop()
    assert_same(dict(checkpoint.load(tmp_path / "savedmodel000002.pt")), dict(loop.method.model.state_dict()))
    assert_same(dict(checkpoint.load(tmp_path / "emasavedmodel_0.9_000002.pt")), dict(loop.ema["0.9"].state_dict()))
    rest = checkpoint.load(tmp_path / "optsavedmodel000002.pt")
    assert_same(dict(rest["posterior"]), dict(loop.method.posterior.state_dict()))
    assert_same(dict(rest["prior"]), dict(loop.method.prior.state_dict()))
    assert rest["position"] == 4


@pytest.mark.parametrize("loss_aware", [False, True])
def test_resume_continues_bit_for_bit(tmp_path, loss_aware):
    def loop(folder, steps, seed):
        sampler = LossSecondMomentResampler(4, history_per_term=1) if loss_aware else UniformSampler(4)
        cimd = make_cimd(seed, dropout=0.2, timestep_respacing="4", learn_sigma=True, schedule_sampler=sampler)
        return make_loop(folder, cimd, batch_size=4, microbatch=3, max_steps=steps, lr=1e-3,
                         ema_rate="0.5,0.99", weight_decay=0.1)

    for name in ("straight", "stopped"):
        (tmp_path / name).mkdir()
    straight = loop(tmp_path / "straight", 6, 0)
    straight.run_loop()
    loop(tmp_path / "stopped", 3, 0).run_loop()
    resumed = loop(tmp_path / "stopped", 6, 1)  # whatever it started from is overwritten
    resume(resumed, tmp_path / "stopped" / "savedmodel.pt")
    assert (resumed.step, resumed.position) == (3, 12)
    resumed.run_loop()
    names = {path.name for path in (tmp_path / "straight").iterdir() if "000006" in path.name}
    assert len(names) == 4
    for name in names:
        assert_same(*(checkpoint.load(tmp_path / folder / name) for folder in ("straight", "stopped")))


@pytest.mark.parametrize("stop", [3, 4])  # with a line of the log, and between two
def test_resume_continues_the_log_bit_for_bit(tmp_path, stop):
    """Means over an interval that was interrupted, and the count of bad steps, included."""
    def run(folder, steps, again=False):
        folder.mkdir(exist_ok=True)
        logger.configure(folder, last_step=stop if again else 0)
        loop = make_loop(folder, make_cimd(timestep_respacing="8"), batch_size=3, max_steps=steps, log_interval=3)
        if again:
            resume(loop, folder / "savedmodel.pt")
        spoil(loop, {3, 6}).run_loop()
        logger.close()

    run(tmp_path / "straight", 9)
    run(tmp_path / "stopped", stop)
    run(tmp_path / "stopped", 9, again=True)
    straight, stopped = (logged(tmp_path / name) for name in ("straight", "stopped"))
    assert [row["step"] for row in straight] == [3, 6, 9] and straight[-1]["bad_steps"] == 2
    assert [row for row in stopped if row["step"] % 3 == 0] == straight  # and one where the first run ended
    assert [row["step"] for row in stopped] == sorted({3, 6, 9, stop})
    rows = list(csv.DictReader((tmp_path / "stopped" / "progress.csv").open()))
    assert [row["step"] for row in rows] == [str(row["step"]) for row in stopped]
    assert [row["loss"] for row in rows] == [repr(row["loss"]) for row in stopped]


@pytest.mark.parametrize("saved", [False, True])
def test_line_of_a_drawing_that_was_broken_off_is_made_up_for(tmp_path, saved):
    """Also where the run is killed between that line and the checkpoint that follows it."""
    class Drawing(Validation):
        stops = False

        def draw(self, method, on_step):
            if self.stops:
                raise Stopped
            return []

        def means(self, masks):
            return {"val_GED_16": 0.5}

    drawing, folder = Drawing(make_cases(), None, interval=4), tmp_path / "stopped"

    def run(folder, steps, again=False):
        folder.mkdir(exist_ok=True)
        logger.configure(folder, last_step=checkpoint.steps_in(folder)[-1] if again else 0)
        loop = make_loop(folder, make_cimd(timestep_respacing="8"), batch_size=3, max_steps=steps, log_interval=2,
                         callbacks=[drawing])
        if again:
            resume(loop, folder / "savedmodel.pt")
        loop.run_loop()
        logger.close()

    run(tmp_path / "straight", 8)
    drawing.stops = True
    run(folder, 8)
    assert [row["step"] for row in logged(folder)] == [2] and checkpoint.steps_in(folder) == [4]
    drawing.stops, before = False, (folder / "optsavedmodel000004.pt").read_bytes()
    run(folder, 4, again=True)
    assert logged(folder) == logged(tmp_path / "straight")[:2]
    assert (folder / "optsavedmodel000004.pt").read_bytes() != before
    if not saved:
        (folder / "optsavedmodel000004.pt").write_bytes(before)
    run(folder, 8, again=True)
    assert logged(folder) == logged(tmp_path / "straight")
    assert [row["step"] for row in logged(folder) if "val_GED_16" in row] == [4, 8]
    run(folder, 8, again=True)
    assert logged(folder) == logged(tmp_path / "straight")


def test_run_on_other_cases_is_refused_unless_asked_for(tmp_path):
    make_loop(tmp_path, max_steps=1).run_loop()
    others = make_loop(tmp_path, cases=make_cases(count=6))
    with pytest.raises(InputError, match="--data_dir: holds other cases .* --results_dir to start afresh"):
        resume(others, tmp_path / "savedmodel.pt", same_run=True)
    resume(others, tmp_path / "savedmodel.pt")
    resume(make_loop(tmp_path), tmp_path / "savedmodel.pt", same_run=True)


def test_weight_decay_is_that_of_the_flags_not_of_the_checkpoint(tmp_path):
    make_loop(tmp_path, max_steps=1, weight_decay=0.5).run_loop()
    loop = make_loop(tmp_path, weight_decay=0.25)
    resume(loop, tmp_path / "savedmodel.pt")
    assert [group["weight_decay"] for group in loop.optimizer.param_groups] == [0.25]


def test_run_killed_while_it_saved_its_last_step_leaves_no_older_weights_behind(tmp_path, monkeypatch):
    """Killed before each of the files of step 2, and started again."""
    (tmp_path / "undisturbed").mkdir()
    make_loop(tmp_path / "undisturbed", max_steps=2, save_interval=1).run_loop()
    expected = checkpoint.load(tmp_path / "undisturbed" / "savedmodel.pt")
    names = [checkpoint.opt_name(2), checkpoint.ema_name("0.9999", 2), "savedmodel.pt", checkpoint.model_name(2)]
    for name in names:
        folder = tmp_path / f"before {name}"
        folder.mkdir()
        make_loop(folder, max_steps=1).run_loop()
        loop = make_loop(folder, max_steps=2)
        resume(loop, folder / "savedmodel.pt")
        with monkeypatch.context() as patch:
            patch.setattr(saver_of(loop), "_remove", lambda names: None)  # nor would a killed process tidy up

            def killed_before(path, data, name=name, write=storage.write_bytes):
                if path.endswith("/" + name):
                    raise OSError("killed")
                write(path, data)

            patch.setattr(storage, "write_bytes", killed_before)
            with pytest.raises(InputError, match="killed"):
                loop.run_loop()
        again = make_loop(folder, max_steps=2)
        resume(again, folder / checkpoint.model_name(checkpoint.steps_in(folder)[-1]))
        again.run_loop()
        assert_same(dict(checkpoint.load(folder / "savedmodel.pt")), dict(expected))


def test_resume_from_the_newest_takes_weights_and_optimiser_of_one_step(tmp_path):
    make_loop(tmp_path, max_steps=2, save_interval=1, lr=1e-2).run_loop()
    (tmp_path / "savedmodel.pt").write_bytes((tmp_path / "savedmodel000001.pt").read_bytes())  # killed before the copy
    resumed = make_loop(tmp_path)
    resume(resumed, tmp_path / "savedmodel.pt")
    assert resumed.step == 2
    assert_same(dict(resumed.method.model.state_dict()), checkpoint.load(tmp_path / "savedmodel000002.pt"))


def test_optimiser_of_other_networks_is_refused_by_name(tmp_path):
    make_loop(tmp_path, max_steps=1).run_loop()
    plain = make_loop(tmp_path, make_cimd(kl_weight=0))
    with pytest.raises(InputError, match=r"optsavedmodel000001.pt: is of a run with AMN and ACN.*--kl_weight"):
        resume(plain, tmp_path / "savedmodel.pt")


def test_annealed_learning_rate_resumes_where_it_was(tmp_path):
    make_loop(tmp_path, lr=4e-4, lr_anneal_steps=4, max_steps=1).run_loop()
    loop = make_loop(tmp_path, lr=4e-4, lr_anneal_steps=4)
    resume(loop, tmp_path / "savedmodel000001.pt")
    assert loop.learning_rate(loop.step) == pytest.approx(3e-4)
    loop.run_loop()
    assert loop.step == 4


def test_weights_alone_resume_with_fresh_averages_and_encoders_and_say_so(tmp_path, capsys):
    source = awake(make_cimd(seed=5))
    checkpoint.save(tmp_path / "savedmodel000007.pt", source.model.state_dict())
    loop = make_loop(tmp_path)
    encoders = weights(loop.method.posterior)
    resume(loop, tmp_path / "savedmodel000007.pt")
    printed = capsys.readouterr().out
    assert "moving average" in printed and "start afresh" in printed
    assert (loop.step, loop.position) == (7, 14)
    assert_same(weights(loop.method.model), weights(source.model))
    assert_same(weights(loop.ema["0.9999"]), weights(source.model))
    assert_same(weights(loop.method.posterior), encoders)


def test_run_that_is_already_over_trains_and_saves_nothing(tmp_path):
    make_loop(tmp_path, max_steps=1).run_loop()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    loop = make_loop(tmp_path, max_steps=1)
    resume(loop, tmp_path / "savedmodel000001.pt")
    loop.run_loop()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


# ---- it learns ----

def test_bfloat16_trains_float32_weights(tmp_path):
    cimd = make_cimd(num_channels=64, learn_sigma=True)
    exact = copy.deepcopy(cimd)
    half = make_loop(tmp_path, cimd, batch_size=5, dtype=torch.bfloat16)
    full = make_loop(tmp_path, exact, batch_size=5)
    kinds = []
    cimd.model.middle_block[0].in_layers[2].register_forward_hook(lambda module, args, out: kinds.append(out.dtype))
    before = weights(cimd)
    losses = [loop.forward_backward(batch()).terms["loss"] for loop in (half, full)]
    torch.testing.assert_close(*losses, rtol=0.02, atol=0.02)
    batches = half.data.batches(5)
    for _ in range(4):
        half.run_step(next_floats(batches))
    assert set(kinds) == {torch.bfloat16}
    for name, value in cimd.state_dict().items():
        assert value.dtype == torch.float32 and value.isfinite().all()
        assert not torch.equal(value, before[name]), name


def dice(a, b):
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_a_hundred_steps_learn_the_outline_of_a_single_case(tmp_path):
    y, x = np.mgrid[:SIZE, :SIZE]
    outline = np.hypot(y - 6, x - 9) < 4.5
    image = np.where(outline, 0.8, 0.2).astype(np.float32)[None]
    cimd = make_cimd(predict_xstart=True, noise_schedule="cosine", steps=100)
    loop = make_loop(tmp_path, cimd, Memory([Case("disc", image, outline[None])]), batch_size=2, lr=1e-3,
                     max_steps=100, log_interval=1000)
    loop.run_loop()
    sampling = create_gaussian_diffusion(predict_xstart=True, noise_schedule="cosine", steps=100,
                                         timestep_respacing="10")
    torch.manual_seed(1)
    x = sampling.p_sample_loop(cimd.model.eval(), (4, 1, SIZE, SIZE),
                               model_kwargs={"image": torch.from_numpy(image).expand(4, 1, SIZE, SIZE)})
    masks = x[:, 0].numpy() > 0.5
    assert np.mean([dice(mask, outline) for mask in masks]) > 0.9
