"""What hooks into the training loop is called in the documented order, and heard."""

import itertools

import pytest
import torch
from helpers.loops import logged, make_cases, make_loop
from helpers.models import MeanOutline
from helpers.refusals import refusal

from guided_diffusion import checkpoint, logger
from guided_diffusion.data.stream import Batch
from guided_diffusion.methods.base import Losses
from guided_diffusion.training.callback import Callback, Stopped
from guided_diffusion.training.resume import resume
from guided_diffusion.training.validation import Validation

HOOKS = [name for name in vars(Callback) if not name.startswith("_")]


class Recorder(Callback):
    """Notes every call as (hook, step) and all that it was called with."""

    def __init__(self, log=None, name=""):
        self.calls, self.log, self.name = [], [] if log is None else log, name


def recording(hook):
    def call(self, *args, **kwargs):
        loop = None if hook == "load_state" else args[0]
        self.calls.append((hook, loop.step if loop else None, args, kwargs))
        self.log.append((hook, self.name))
        return getattr(Callback, hook)(self, *args, **kwargs)

    return call


for hook in HOOKS:
    setattr(Recorder, hook, recording(hook))


def order(calls):
    """The hooks with their steps; what is told again and again while cases are drawn, once."""
    return [key for key, _ in itertools.groupby(call[:2] for call in calls)]


def step(number):
    return [("wants_to_stop", number), ("doing", number), ("stepped", number), ("scores", number + 1)]


def test_every_hook_is_called_in_its_order(tmp_path):
    recorder = Recorder()
    loop = make_loop(tmp_path, MeanOutline(), max_steps=4, log_interval=2, save_interval=3, callbacks=[
        recorder, Validation(make_cases(), lambda network: MeanOutline(model=network), count=1, interval=4,
                             scored=True)])
    loop.run_loop()
    assert order(recorder.calls) == [
        ("overdue", 0), ("begin", 0),
        *step(0), ("turned", 1),
        *step(1), ("figures", 2), ("logged", 2), ("turned", 2),
        *step(2), ("turned", 3), ("state", 3),  # a checkpoint
        *step(3), ("doing", 4), ("drawn", 4), ("validated", 4), ("figures", 4), ("logged", 4), ("turned", 4),
        ("end", 4), ("state", 4)]
    assert {name for name, *_ in recorder.calls} == set(HOOKS) - {"load_state"}
    again = Recorder()
    loop = make_loop(tmp_path, MeanOutline(), max_steps=4, callbacks=[again])
    resume(loop, tmp_path / checkpoint.NEWEST)
    loop.run_loop()
    assert order(again.calls) == [("load_state", None), ("overdue", 4), ("begin", 4), ("end", 4)]


def test_hooks_are_told_what_they_are_documented_to_be_told(tmp_path):
    recorder = Recorder()
    loop = make_loop(tmp_path, MeanOutline(), batch_size=3, microbatch=2, max_steps=2, log_interval=2, callbacks=[
        recorder, Validation(make_cases(), lambda network: MeanOutline(model=network), count=2, interval=2)])
    loop.run_loop()
    told = {}
    for hook, _, args, kwargs in recorder.calls:
        told.setdefault(hook, []).append((args[1:], kwargs))
        assert args[0] is loop
    words = ["waiting for data", "in step 1", "waiting for data", "in step 2",
             *["drawing the validation cases at step 2"], "in step 2"]
    assert [args[0] for args, _ in told["doing"]] == words
    assert [kwargs.get("within") for _, kwargs in told["doing"]] == [None] * 4 + [[1]] + [None]
    for i, ((batch, losses, bad), _) in enumerate(told["stepped"]):
        assert isinstance(batch, Batch) and batch.places == [*range(3 * i, 3 * i + 3)] and not bad
        assert isinstance(losses, Losses) and losses.terms["loss"].shape == losses.seen["raters"].shape == (3,)
        assert not losses.terms["loss"].requires_grad
    (cases, masks, title), _ = told["drawn"][0]
    assert [case.name for case in cases] == ["case0", "case4"] and [len(drawn) for drawn in masks] == [4, 4]
    assert masks[0].dtype == bool and title == "training cases at step 2, present weights"
    assert [args for args, _ in told["turned"]] == [(False,), (True,)]


def test_callbacks_are_told_one_after_the_other(tmp_path):
    log = []
    make_loop(tmp_path, MeanOutline(), max_steps=2, log_interval=1,
              callbacks=[Recorder(log, "first"), Recorder(log, "second")]).run_loop()
    assert log[::2] == [(hook, "first") for hook, _ in log[1::2]]
    assert {name for _, name in log[1::2]} == {"second"} and len(log) > 20


def test_scores_and_figures_are_logged_scores_at_once_and_figures_beside_the_losses(tmp_path):
    class Numbers(Callback):
        def scores(self, loop):
            return {"val_x": loop.step / 2} if loop.step == 1 else {}

        def figures(self, loop):
            return {"queue": 10 * loop.step}

    logger.configure(tmp_path)
    make_loop(tmp_path, MeanOutline(), max_steps=3, log_interval=2, callbacks=[Numbers()]).run_loop()
    logger.close()
    first, *others = logged(tmp_path)
    assert first == {"step": 1, "val_x": 0.5}
    assert [(row["step"], row["queue"], "loss" in row, "val_x" in row) for row in others] == [
        (2, 20, True, False), (3, 30, True, False)]


def test_a_callback_ends_the_loop_and_what_was_reached_is_saved(tmp_path):
    class Enough(Callback):
        def wants_to_stop(self, loop):
            return loop.step == 2

    loop = make_loop(tmp_path, MeanOutline(), max_steps=9, callbacks=[Enough()])
    assert loop.run_loop() is None and loop.step == 2 and checkpoint.steps_in(tmp_path) == [2]


def test_scores_that_are_broken_off_end_the_loop_and_are_made_up_for(tmp_path):
    class Scores(Callback):
        stops, seen = True, []

        def overdue(self, loop):
            return loop.step == 2

        def scores(self, loop):
            self.seen.append(loop.step)
            if loop.step == 2 and self.stops:
                raise Stopped
            return {}

    scores = Scores()
    make_loop(tmp_path, MeanOutline(), max_steps=4, callbacks=[scores]).run_loop()
    assert scores.seen == [1, 2] and checkpoint.steps_in(tmp_path) == [2]
    scores.stops, loop = False, make_loop(tmp_path, MeanOutline(), max_steps=4, callbacks=[scores])
    resume(loop, tmp_path / checkpoint.NEWEST)
    before = []
    loop.run_step = lambda batch, run=loop.run_step: (before.append(list(scores.seen)), run(batch))
    loop.run_loop()
    assert scores.seen == [1, 2, 2, 3, 4] and before[0] == [1, 2, 2] and loop.step == 4


def test_the_state_of_a_callback_goes_into_the_checkpoint_and_comes_back(tmp_path):
    class Counting(Callback):
        def __init__(self):
            self.count, self.total = 0, torch.zeros(2)

        def stepped(self, loop, batch, losses, bad):
            self.count, self.total = self.count + 1, self.total + losses.terms["loss"].sum()

        def state(self, loop):
            return {"counting": {"count": self.count, "total": self.total}}

        def load_state(self, state):
            self.count, self.total = state["counting"]["count"], state["counting"]["total"]

    first, second = Counting(), Counting()
    make_loop(tmp_path, MeanOutline(), max_steps=3, callbacks=[first]).run_loop()
    resume(make_loop(tmp_path, MeanOutline(), callbacks=[second]), tmp_path / checkpoint.NEWEST)
    assert second.count == first.count == 3 and torch.equal(second.total, first.total) and first.total[0] > 0


@pytest.mark.parametrize("state, words", [({"counting": 3}, "TypeError"), ({}, "KeyError")])
def test_a_callback_that_finds_no_state_of_its_own_refuses_the_file_by_name(tmp_path, state, words):
    class Needing(Callback):
        def load_state(self, state):
            self.count = state["counting"]["count"]

    make_loop(tmp_path, MeanOutline(), max_steps=1).run_loop()
    path = tmp_path / checkpoint.opt_name(1)
    torch.save({**checkpoint.load(path), **state}, path)
    message = refusal(resume, make_loop(tmp_path, MeanOutline(), callbacks=[Needing()]), tmp_path / checkpoint.NEWEST)
    assert str(path) in message and words in message
