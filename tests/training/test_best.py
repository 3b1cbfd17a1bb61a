"""savedmodel_best.pt holds the weights that drew the validation cases best, whatever interrupts the run."""

import pytest
import torch
from helpers.loops import callback, make_cases, make_loop, saver_of
from helpers.models import MeanOutline, same_weights, weights

from guided_diffusion import checkpoint, logger
from guided_diffusion.data.cases import digest_of
from guided_diffusion.system import storage
from guided_diffusion.training.best import Best
from guided_diffusion.training.callback import Callback
from guided_diffusion.training.resume import resume
from guided_diffusion.training.validation import Validation

SCORES = [0.5, 0.3, 0.4, 0.3, 0.2, 0.6]  # behind steps 1, 2, ...
BEST_OF = [1, 2, 2, 2, 5, 5]


class Scored(Callback):
    """A validation whose scores are known."""

    def __init__(self, values, cases):
        self.values, self.cases = values, cases

    def scores(self, loop):
        scores = {"val_GED_unbiased_16": self.values[loop.step - 1]}
        loop.tell("validated", self.cases, scores)
        return scores


class Killed(BaseException):
    """As if the process had died."""


class Kill(Callback):
    def __init__(self, step):
        self.step = step

    def turned(self, loop, logs):
        if loop.step == self.step:
            saver_of(loop).wait()
            raise Killed


class History(Callback):
    """The network's weights behind every step."""

    def __init__(self):
        self.weights = {}

    def turned(self, loop, logs):
        self.weights[loop.step] = weights(loop.method.model)


def run(folder, steps, again=False, values=SCORES, also=(), cases=(), **settings):
    """Train for some steps, or go on; returns the loop."""
    folder.mkdir(exist_ok=True)
    loop = make_loop(folder, MeanOutline(), max_steps=steps, callbacks=[
        Scored(values, cases or make_cases()), Best(folder), *also], **{"lr": 0.01, "save_interval": 2, **settings})
    if again:
        resume(loop, folder / checkpoint.NEWEST)
    loop.run_loop()
    return loop


def facts(folder):
    return checkpoint.best_facts(folder / checkpoint.BEST)


def kept(folder):
    """The weights of savedmodel_best.pt, as sampling loads them."""
    model = MeanOutline(seed=9).model
    checkpoint.load_model(model, folder / checkpoint.BEST)
    return weights(model)


def test_the_best_weights_are_kept_with_their_step_and_the_earliest_of_equal_ones(tmp_path):
    history = History()
    for steps in range(1, 7):
        loop = run(tmp_path / str(steps), steps, also=[history])
        assert facts(tmp_path / str(steps)) == callback(loop, Best).facts
        assert facts(tmp_path / str(steps))["step"] == checkpoint.step_of(
            tmp_path / str(steps) / checkpoint.BEST) == BEST_OF[steps - 1]
        assert same_weights(kept(tmp_path / str(steps)), history.weights[BEST_OF[steps - 1]])
    assert facts(tmp_path / "6")["GED_unbiased"] == 0.2


def test_averaged_weights_are_kept_as_soon_as_they_are_of_use(tmp_path):
    loop = run(tmp_path, 5, ema_rate="0.05,0.9")
    assert facts(tmp_path)["step"] == 5 and loop.rate_to_use() == ("0.05", False)
    assert same_weights(kept(tmp_path), weights(loop.method.model))
    loop = run(tmp_path, 6, again=True, ema_rate="0.05,0.9", values=[*SCORES[:5], 0.1])
    assert facts(tmp_path)["step"] == 6 and loop.rate_to_use() == ("0.05", True)
    assert same_weights(kept(tmp_path), weights(loop.ema["0.05"]))


@pytest.mark.parametrize("stops", range(1, 6))
def test_resuming_keeps_score_and_step_exactly(tmp_path, stops):
    run(tmp_path / "straight", 6)
    run(tmp_path / "parts", stops)
    loop = run(tmp_path / "parts", 6, again=True)
    assert callback(loop, Best).facts == facts(tmp_path / "parts") == facts(tmp_path / "straight")
    assert same_weights(kept(tmp_path / "parts"), kept(tmp_path / "straight"))
    stored = [checkpoint.load(tmp_path / name / checkpoint.opt_name(6))["best"] for name in ("parts", "straight")]
    assert stored[0] == stored[1] == facts(tmp_path / "straight")


@pytest.mark.parametrize("step", [3, 5])
def test_a_run_killed_between_checkpoints_ends_with_the_same_best_weights(tmp_path, step):
    run(tmp_path / "straight", 6)
    with pytest.raises(Killed):
        run(tmp_path / "killed", 6, also=[Kill(step)])
    assert checkpoint.steps_in(tmp_path / "killed")[-1] == step - 1
    assert facts(tmp_path / "killed")["step"] == BEST_OF[step - 1]
    run(tmp_path / "killed", 6, again=True)
    assert facts(tmp_path / "killed") == facts(tmp_path / "straight")
    assert same_weights(kept(tmp_path / "killed"), kept(tmp_path / "straight"))


def test_a_run_killed_behind_a_drawing_that_its_checkpoint_does_not_know_of_has_the_best_weights(tmp_path):
    """As where a signal broke off the drawing, the next run made up for it, and was killed before it had saved."""
    run(tmp_path, 2)
    path = tmp_path / checkpoint.opt_name(2)
    checkpoint.save(path, {**checkpoint.load(path), "best": {}})
    loop = run(tmp_path, 3, again=True)
    assert callback(loop, Best).facts["step"] == facts(tmp_path)["step"] == 2


def test_a_run_killed_while_the_best_weights_are_written_keeps_those_before(tmp_path, monkeypatch):
    run(tmp_path, 4)
    before, write = kept(tmp_path), storage.os.replace

    def killed(source, target):
        if str(target).endswith(checkpoint.BEST):
            raise Killed
        write(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "replace", killed)
        with pytest.raises(Killed):
            run(tmp_path, 6, again=True)
    assert same_weights(kept(tmp_path), before) and facts(tmp_path)["step"] == 2
    run(tmp_path, 6, again=True)
    assert facts(tmp_path)["step"] == 5


def test_a_full_disk_costs_the_best_weights_of_a_step_not_the_run(tmp_path, monkeypatch, capsys):
    save = checkpoint.save_best
    monkeypatch.setattr(checkpoint, "save_best", lambda folder, state, facts: save(
        folder / "nowhere" if facts["step"] == 2 else folder, state, facts))
    run(tmp_path, 3)
    assert "savedmodel_best.pt of step 2 could not be saved" in capsys.readouterr().out
    assert facts(tmp_path)["step"] == 3 and checkpoint.steps_in(tmp_path) == [2, 3]


def test_scores_of_other_cases_are_not_compared(tmp_path, capsys):
    run(tmp_path, 2)
    others = make_cases(count=3)
    run(tmp_path, 4, again=True, cases=others)
    assert "not those of step 2" in capsys.readouterr().out
    assert (facts(tmp_path)["step"], facts(tmp_path)["GED_unbiased"]) == (4, 0.3)
    assert facts(tmp_path)["cases"] == digest_of(case.name for case in others)


@pytest.mark.parametrize("spoil", [lambda path: path.unlink(), lambda path: path.write_bytes(b"no weights")])
def test_without_its_file_the_best_is_chosen_anew(tmp_path, capsys, spoil):
    run(tmp_path, 2)
    spoil(tmp_path / checkpoint.BEST)
    run(tmp_path, 4, again=True)
    assert "does not hold those of step 2" in capsys.readouterr().out and facts(tmp_path)["step"] == 4


def test_the_best_weights_are_never_the_newest_nor_pruned(tmp_path):
    run(tmp_path, 4, save_interval=1, keep_checkpoints=1)
    assert checkpoint.steps_in(tmp_path) == [4] and facts(tmp_path)["step"] == 2
    assert checkpoint.BEST not in checkpoint.files_of(tmp_path, 2) | checkpoint.files_of(tmp_path, 4)
    assert checkpoint.step_of(tmp_path / checkpoint.NEWEST) == 4
    resumed = make_loop(tmp_path, MeanOutline(1))
    resume(resumed, tmp_path / checkpoint.NEWEST)
    assert resumed.step == 4 and not same_weights(weights(resumed.method.model), kept(tmp_path))


def test_validation_that_scores_tells_of_its_scores_before_they_are_logged(tmp_path):
    logger.configure(tmp_path)
    loop = make_loop(tmp_path, MeanOutline(), max_steps=2, callbacks=[Best(tmp_path), Validation(
        make_cases(), lambda network: MeanOutline(model=network), count=2, interval=1, scored=True)])
    loop.run_loop()
    rows = [row["val_GED_unbiased_16"] for row in logger.history()]
    logger.close()
    assert facts(tmp_path)["GED_unbiased"] == min(rows) and rows[facts(tmp_path)["step"] - 1] == min(rows)
    assert all(isinstance(value, torch.Tensor) for value in kept(tmp_path).values())
