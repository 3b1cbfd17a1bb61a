"""A results folder has one writer; one that was left behind writes no more."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.files import tree
from helpers.loops import make_loop, watch_steps
from helpers.models import assert_same
from helpers.processes import PATIENCE, TRAIN, read_until, training
from helpers.refusals import refusal

from guided_diffusion import checkpoint
from guided_diffusion.system import storage
from guided_diffusion.system.lease import Lost
from guided_diffusion.training.ownership import LOCK, Ownership


def elsewhere(owner):
    """Let an owner be of another machine."""
    owner.leases.me = owner.leases.me._replace(machine="elsewhere", host="elsewhere", pid=7)
    owner.leases.give_back(owner.path)
    assert owner.leases.take(owner.path) is None
    return owner


def test_a_second_run_is_refused_with_who_has_the_folder_and_what_to_do(tmp_path, capsys):
    with elsewhere(Ownership(tmp_path, 1)):
        said = refusal(Ownership, tmp_path, 1)
    assert said.startswith(f"--results_dir {tmp_path}: process 7 on elsewhere (since 20")
    assert said.endswith(" is training into it; give another folder, or stop that run")
    assert "is held by process 7 on elsewhere" in capsys.readouterr().out and not (tmp_path / LOCK).exists()


def test_a_folder_whose_run_is_gone_is_taken_over_after_the_time(tmp_path):
    gone = elsewhere(Ownership(tmp_path, 0.5))
    gone.leases._closed.set()  # renewed no more
    with Ownership(tmp_path, 0.5) as now:
        now.check()
        with pytest.raises(Lost, match=f"{tmp_path}: process {os.getpid()} on .* has gone on with this run"):
            gone.check()


@pytest.mark.parametrize("change", [lambda path: storage.write_bytes(path, b"new"), storage.remove])
def test_one_that_was_left_behind_changes_no_file(tmp_path, change):
    path = tmp_path / "savedmodel.pt"
    path.write_bytes(b"old")
    with Ownership(tmp_path / ".", 60) as owner:
        storage.write_bytes(tmp_path / "b", b"its own")
        (tmp_path / LOCK).write_bytes(b"another's")
        before = tree(tmp_path)
        with pytest.raises(Lost):
            change(path)
        assert tree(tmp_path) == before
    assert owner.leases.take(owner.path)  # what is another's stays


def test_training_ends_at_the_first_save_or_renewal_after_it_was_left_behind(tmp_path):
    for part in ("save", "renewal"):
        folder = tmp_path / part
        folder.mkdir()
        with Ownership(folder, 1) as owner:
            loop = make_loop(folder, max_steps=500, save_interval=1 if part == "save" else 10 ** 6,
                             callbacks=[owner] if part == "renewal" else [])

            def taken(loop=loop, folder=folder, part=part):
                if loop.step == 3:
                    loop.callbacks[-1].saver.wait()
                    (folder / LOCK).write_bytes(b"another's")
                if part == "renewal":
                    time.sleep(0.01)

            with pytest.raises(Lost, match="nothing more is written"):
                watch_steps(loop, taken).run_loop()
            assert 3 <= loop.step < 60 and checkpoint.steps_in(folder) == ([1, 2] if part == "save" else [])


ELSEWHERE = """
import runpy, sys, time
from guided_diffusion.system import lease
from guided_diffusion.train_util import TrainLoop
lease._machine = lambda: "elsewhere"
step = TrainLoop.run_step
TrainLoop.run_step = lambda *args: (time.sleep(2), step(*args))[1]  # it is not done before it is stopped
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.long
def test_a_run_that_wakes_up_after_another_machine_has_gone_on_leaves_its_work_alone(environment, processes, make_cases,
                                                                                    tiny, tmp_path):
    data = make_cases(tmp_path / "data", count=3)

    def flags(folder, steps):
        words = [TRAIN, *training(data, folder, tiny, "--visdom_port", 0, "--save_interval", 3, "--dist_timeout", 2)]
        words[words.index("--max_steps") + 1] = steps
        return words

    command = [sys.executable, "-uc", ELSEWHERE, *flags("results", 40)]
    asleep = subprocess.Popen(list(map(str, command)), env=environment, cwd=tmp_path, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    read_until(asleep.stdout, "saved step 3")
    refused = processes(sys.executable, *flags("results", 40))
    assert refused.returncode == 2 and f": process {asleep.pid} on " in refused.stderr, refused
    os.kill(asleep.pid, signal.SIGSTOP)
    for folder in ("results", "straight"):
        done = processes(sys.executable, *flags(folder, 40))
        assert done.returncode == 0, done.stderr
    before = {name: data for name, data in tree(tmp_path / "results").items()
              if not name.endswith(f".{asleep.pid}.partial")}  # it may have been stopped while it wrote
    os.kill(asleep.pid, signal.SIGCONT)
    said = asleep.stderr.read()
    assert asleep.wait(PATIENCE) == 2 and "another run has gone on with this run" in said and "Traceback" not in said
    after = tree(tmp_path / "results")
    for files in (before, after):  # the log of a process that did not know yet
        [files.pop(name) for name in [*files] if name.startswith(("progress.", "log.", "tensorboard"))]
    assert before == after
    for name in (checkpoint.model_name(40), checkpoint.opt_name(40)):
        assert_same(*(checkpoint.load(tmp_path / folder / name) for folder in ("results", "straight")))
