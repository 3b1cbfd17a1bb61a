"""Checkpoints are written beside training, from copies, and a disk that fails costs no more than it must."""

import os
import resource
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers.loops import make_loop, saver_of, watch_steps
from helpers.models import make_cimd, weights

from guided_diffusion import checkpoint
from guided_diffusion.system import storage
from guided_diffusion.system.errors import InputError
from guided_diffusion.training.resume import resume
from guided_diffusion.training.saver import Saver


def files(step, value):
    state = {"w": torch.full((1000,), float(value)), "deep": [{"x": torch.ones(3)}, (torch.zeros(2), "text")], "n": 3}
    return {checkpoint.opt_name(step): {"step": step}, checkpoint.ema_name("0.9", step): state,
            checkpoint.NEWEST: state, checkpoint.model_name(step): state}


@pytest.fixture
def slow(monkeypatch):
    """Writing that waits until it is let go; the names in the order they were written."""
    gate, names, write = threading.Event(), [], storage.write_bytes

    def wait_and_write(path, data):
        assert gate.wait(60)
        names.append(os.path.basename(path))
        write(path, data)

    monkeypatch.setattr(storage, "write_bytes", wait_and_write)
    return gate, names


def test_what_was_copied_is_written_whatever_becomes_of_the_original(tmp_path, slow):
    gate, names = slow
    saver, states = Saver(tmp_path), files(3, 1)
    saver.begin(3, states)
    saver.poll()
    assert saver.last == 0 and not names
    states[checkpoint.NEWEST]["w"].zero_()
    states[checkpoint.NEWEST]["deep"][0]["x"].zero_()
    gate.set()
    saver.wait()
    assert saver.last == 3 and not saver.problem
    assert names == [checkpoint.opt_name(3), checkpoint.ema_name("0.9", 3), checkpoint.NEWEST, checkpoint.model_name(3)]
    for name in names[1:]:
        back = checkpoint.load(tmp_path / name)
        assert (back["w"] == 1).all() and (back["deep"][0]["x"] == 1).all() and back["deep"][1][1] == "text"


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, slow):
    gate, names = slow
    loop = make_loop(tmp_path, max_steps=6, save_interval=4)
    seen = []

    def after():
        seen.append(len(names))
        if loop.step == 6:
            gate.set()

    watch_steps(loop, after).run_loop()
    assert seen == [0] * 6 and checkpoint.steps_in(tmp_path) == [4, 6]
    assert saver_of(loop).last == 6


@pytest.mark.parametrize("keep, left", [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4]), (9, [1, 2, 3, 4])])
def test_the_newest_checkpoints_are_kept(tmp_path, keep, left):
    make_loop(tmp_path, max_steps=4, save_interval=1, keep_checkpoints=keep, ema_rate="0.9,0.99").run_loop()
    assert checkpoint.steps_in(tmp_path) == left
    assert len([path for path in tmp_path.iterdir() if path.suffix == ".pt"]) == 4 * len(left) + 1


def test_pruning_that_was_interrupted_is_made_up_for(tmp_path, monkeypatch):
    """Killed after each of the files of step 1 that a new checkpoint makes superfluous."""
    for removed in range(4):
        folder, remove = tmp_path / str(removed), storage.remove
        folder.mkdir()
        saver = Saver(folder, keep=1)
        saver.begin(1, files(1, 1))
        saver.wait()
        left = [removed]

        def killed_after(path, left=left, remove=remove):
            left[0] -= 1
            if left[0] >= 0:
                remove(path)

        monkeypatch.setattr(storage, "remove", killed_after)
        saver.begin(2, files(2, 2))
        saver.wait()
        monkeypatch.setattr(storage, "remove", remove)
        assert len(list(folder.glob("*000001*"))) == 3 - removed
        saver.begin(3, files(3, 3))
        saver.wait()
        assert not list(folder.glob("*000001*")) and checkpoint.steps_in(folder) == [3]


def test_pruning_leaves_what_a_run_went_on_from_when_the_newest_was_damaged(tmp_path):
    make_loop(tmp_path, max_steps=4, save_interval=1).run_loop()
    for step in (3, 4):
        (tmp_path / checkpoint.model_name(step)).write_bytes(b"damaged")
    loop = make_loop(tmp_path, make_cimd(1), max_steps=3, keep_checkpoints=1)
    resume(loop, tmp_path / checkpoint.model_name(2))
    saver_of(loop).prune(loop.step)  # as the loop does first
    assert checkpoint.steps_in(tmp_path) == [2, 3, 4]
    loop.run_loop()
    assert checkpoint.steps_in(tmp_path) == [3, 4] and not checkpoint.damages(tmp_path, 3)


def test_older_checkpoints_stay_until_the_new_one_is_whole(tmp_path, monkeypatch):
    saver = Saver(tmp_path, keep=1)
    saver.begin(1, files(1, 1))
    saver.wait()
    write = storage.write_bytes

    def full(path, data):
        if os.path.basename(path) == checkpoint.model_name(2):
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(storage, "write_bytes", full)
    saver.begin(2, files(2, 2))
    saver.wait()
    assert saver.last == 1 and "step 2 could not be saved" in saver.problem and "No space left" in saver.problem
    assert checkpoint.steps_in(tmp_path) == [1] and not list(tmp_path.glob("*000002*"))  # nor does a part take space
    assert (checkpoint.load(tmp_path / checkpoint.NEWEST)["w"] == 2).all()
    monkeypatch.setattr(storage, "write_bytes", write)
    saver.begin(3, files(3, 3))
    saver.wait()
    assert saver.last == 3 and not saver.problem and checkpoint.steps_in(tmp_path) == [3]


def test_weights_that_are_never_trained_stay_when_the_rest_of_their_checkpoint_fails(tmp_path, monkeypatch):
    """The next checkpoint, which may have been asked for before that failed, does not bring them again."""
    write = storage.write_bytes

    def full(path, data):
        if os.path.basename(path) == checkpoint.model_name(1):
            raise OSError(28, "No space left on device")
        write(path, data)

    monkeypatch.setattr(storage, "write_bytes", full)
    saver = Saver(tmp_path)
    saver.begin(1, {checkpoint.FROZEN: {"frozen": torch.ones(3)}, **files(1, 1)})
    saver.begin(2, files(2, 2))
    saver.wait()
    assert checkpoint.steps_in(tmp_path) == [2] and not list(tmp_path.glob("*000001*"))
    assert (checkpoint.load(tmp_path / checkpoint.FROZEN)["frozen"] == 1).all()


def test_a_folder_that_comes_back_is_saved_to_at_the_next_line_of_the_log(tmp_path, capsys):
    folder, away = tmp_path / "results", tmp_path / "away"
    folder.mkdir()
    loop = make_loop(folder, max_steps=9, save_interval=4, log_interval=1)

    def after():
        if loop.step == 3:
            folder.rename(away)
        if loop.step == 6:
            saver_of(loop).wait()
            away.rename(folder)
        saver_of(loop).wait()

    watch_steps(loop, after).run_loop()
    out = capsys.readouterr().out
    assert "step 4 could not be saved" in out and "saving is tried again" in out
    assert checkpoint.steps_in(folder)[-1] == 9 and {6, 7} & set(checkpoint.steps_in(folder))


def test_training_gives_up_when_nothing_can_be_saved_for_long(tmp_path, capsys):
    folder = tmp_path / "results"
    folder.mkdir()
    loop = make_loop(folder, max_steps=100, save_interval=2, log_interval=5, save_patience=3)

    def after():
        if loop.step == 5:
            saver_of(loop).wait()
            folder.rename(tmp_path / "away")
        time.sleep(0.01)

    watch_steps(loop, after)
    with pytest.raises(InputError, match=r"could not be saved .* goes on from step 4"):
        loop.run_loop()
    assert 10 < loop.step < 20
    resumed = make_loop(tmp_path / "away", make_cimd(1))
    resume(resumed, tmp_path / "away" / checkpoint.NEWEST)
    assert resumed.step == 4


LIMITED = """
import resource, sys
from helpers.loops import make_loop
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
make_loop(sys.argv[1], max_steps=4, save_interval=2).run_loop()
"""


def test_a_file_that_the_system_refuses_to_write_leaves_what_was_there(tmp_path, environment):
    """A real limit of the system on the size of files, between that of the weights and that of the optimiser."""
    make_loop(tmp_path, max_steps=1).run_loop()
    before = checkpoint.load(tmp_path / checkpoint.NEWEST)
    limit = (tmp_path / checkpoint.opt_name(1)).stat().st_size - 1000
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path), str(limit)], text=True, capture_output=True,
                          env=environment)
    assert done.returncode == 1 and "InputError: step 4 could not be saved" in done.stderr
    assert "step 2 could not be saved" in done.stdout and "File too large" in done.stdout
    assert checkpoint.steps_in(tmp_path) == [1] and not [p for p in tmp_path.iterdir() if p.name.startswith(".")]
    after = checkpoint.load(tmp_path / checkpoint.NEWEST)
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def test_a_saved_run_holds_what_the_loop_holds(tmp_path):
    loop = make_loop(tmp_path, max_steps=2)
    loop.run_loop()
    stored = checkpoint.load(tmp_path / checkpoint.NEWEST)
    assert all(torch.equal(value, stored[name]) for name, value in weights(loop.method.model).items())
