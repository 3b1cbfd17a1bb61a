"""Processes that share a folder draw each case once; those of one that is gone are drawn by the others."""

import os
import signal
import subprocess
import sys
import time

import pytest
from helpers.files import tree
from helpers.processes import PATIENCE, SAMPLE, end
from helpers.refusals import refusal

from guided_diffusion.sampling.sharing import SharedCases

NAMES = {i: f"case{i}" for i in range(6)}


@pytest.fixture
def share(tmp_path):
    """share(machine, settings): the six cases, shared by a process of that machine; results are files of their name."""
    made = []

    def make(machine="a", settings="same", timeout=60):
        def is_complete(i):
            return (tmp_path / NAMES[i]).exists()

        made.append(SharedCases(tmp_path, NAMES, is_complete, timeout, settings))
        made[-1].leases.me = made[-1].leases.me._replace(machine=machine, host=machine)
        return made[-1]

    yield make
    for each in made:
        each.leases.close()


def finish(shared, i, text=b""):
    shared.finish(i, lambda: (shared.folder / NAMES[i]).write_bytes(text))


def test_each_case_is_drawn_once_and_every_process_sees_the_end(share, tmp_path):
    first, second, drawn = share("a"), share("b"), []
    takers = [first.take(), second.take()]
    for shared in (first, second, first, first):
        drawn.append(next(takers[shared is second]))
        if len(drawn) > 1:
            finish(shared, drawn[-1])
    assert drawn == [0, 1, 2, 3]
    for i in second.take():  # of what the first has done, nothing is left to it; 0 is still the first's
        assert i in (4, 5)
        finish(second, i)
    assert [*second.left] == [0] and [*second.take()] == []
    finish(first, 0)
    assert [*second.take()] == [*first.take()] == [] and not first.left and not second.left
    assert sorted(path.name for path in tmp_path.iterdir()) == [*NAMES.values()]  # and no lease


def test_what_was_taken_over_is_not_written_by_the_one_that_was_taken_for_gone(share, tmp_path):
    slow, other = share("a", timeout=0.4), share("b", timeout=0.4)
    slow.leases._closed.set()  # renewed no more
    assert next(slow.take()) == 0
    begin = time.monotonic()
    while 0 not in [i for i in other.take()]:
        other.wait()
    assert time.monotonic() - begin > 0.3
    finish(other, 0, b"other's")
    finish(slow, 0, b"late")
    assert (tmp_path / "case0").read_bytes() == b"other's" and 0 in slow.left
    assert 0 not in [*slow.take()] and 0 not in slow.left


def test_a_case_that_one_cannot_read_is_left_to_the_others(share):
    blind, other = share("a"), share("b")
    blind.drop(next(blind.take()))
    assert next(other.take()) == 0 and 0 not in blind.left


def test_masks_of_other_flags_are_not_drawn_into_the_same_folder_at_a_time(share, tmp_path):
    first, other = share("a", "seed 0", 1), share("b", "seed 1", 1)
    next(first.take())
    assert next(other.take()) == 1  # the first may be gone
    time.sleep(0.3)
    said = refusal(lambda: [*other.take()])
    assert said.startswith(f"--results_dir {tmp_path}: process {os.getpid()} on a (since ")
    assert "draws other masks into it" in said and "give another folder" in said


# ---- whole runs ----

@pytest.fixture
def runs(environment, make_cases, trained, tmp_path):
    """runs(folder, *flags) starts sampling of 24 cases, some seconds of it, on one machine of several."""
    started, data = [], make_cases(tmp_path / "data", count=24)

    def start(folder, *flags):
        command = [sys.executable, SAMPLE, "--data_dir", data, "--model_path", trained / "savedmodel.pt",
                   "--timestep_respacing", 30, "--num_ensemble", 3, "--batch_size", 4, "--visdom_port", 0,
                   "--results_dir", tmp_path / folder, *flags]
        started.append(subprocess.Popen(list(map(str, command)), env=environment, cwd=tmp_path, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True))
        return started[-1]

    yield start
    end(started)


def wait_for(condition, process):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)


def leases_of(folder, process):
    return [path for path in folder.glob(".*.lease") if f'"pid": {process.pid},' in path.read_text(errors="replace")]


@pytest.mark.long
def test_launches_that_share_a_folder_outlive_one_that_is_killed_and_one_that_stops(runs, tmp_path):
    folder = tmp_path / "shared"
    for number in (signal.SIGKILL, signal.SIGSTOP):
        process = runs("shared", "--dist_timeout", 2)
        wait_for(lambda process=process: leases_of(folder, process), process)
        os.kill(process.pid, number)
    said, wrong = runs("shared", "--dist_timeout", 2).communicate(timeout=PATIENCE)
    assert "rror" not in wrong and "24 cases from" in said and "segmentation_evaluate.py" in said
    assert runs("alone").wait(PATIENCE) == 0
    assert tree(folder) == tree(tmp_path / "alone")
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(PATIENCE) == 0 and tree(folder) == tree(tmp_path / "alone")


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_of_ngpu_processes_one_that_is_killed_costs_no_case_and_no_score(runs, tmp_path, rank):
    run = runs("two", "--ngpu", 2, "--evaluate", "True")
    alone = runs("alone", "--evaluate", "True")
    wait_for(lambda: len([*(tmp_path / "two").glob(".drawn*")]) > 4, run)
    children = open(f"/proc/{run.pid}/task/{run.pid}/children").read().split()
    os.kill(int(children[rank]), signal.SIGKILL)
    said, wrong = run.communicate(timeout=PATIENCE)
    assert alone.wait(PATIENCE) == 0 and f"rank {rank} (process {children[rank]}) did not end by itself" in wrong
    assert (run.returncode, "24 cases of 24 patients" in said) == ((137, False) if rank == 0 else (0, True))
    assert tree(tmp_path / "two") == tree(tmp_path / "alone")
