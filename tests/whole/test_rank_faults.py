"""A rank that dies, hangs or was started wrongly ends the run on all ranks, soon and with one message."""

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from helpers.loops import WALL_CLOCK, logged
from helpers.models import MODEL, assert_same, same_weights
from helpers.processes import MPIEXEC, PATIENCE, TRAIN, end, free_port, read_until, training

from guided_diffusion import checkpoint, dist_util, script_util
from guided_diffusion.system import rank_watch
from guided_diffusion.system.errors import InputError

WORKER = """
import sys, time
import torch
import torch.distributed as dist
from guided_diffusion import dist_util
from guided_diffusion.commands import cli

def main():
    dist_util.setup_dist(timeout=float(sys.argv[1]))
    hanging = [int(rank) for rank in sys.argv[2:]]
    print("joined", flush=True)
    for step in range(10 ** 9):
        dist_util.at((step, 0), "waiting for data")
        if step == 3 and dist_util.rank() in hanging:
            time.sleep(1000)
        dist_util.at((step, 1), f"in step {step}")
        dist.all_reduce(torch.ones(10))
        time.sleep(0.01)

cli.run_script(main)
"""


@pytest.fixture
def start(environment, tmp_path):
    """start(count, *arguments): ranks without a launcher, each of them a process that says "joined"; all end here."""
    started = []

    def call(count, *arguments, script=("-c", WORKER), wait=True, **env):
        env = {**environment, "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
               "OMP_NUM_THREADS": "1", **env}
        ranks = [subprocess.Popen([sys.executable, *script, *map(str, arguments)], text=True, cwd=tmp_path,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                  env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(count)]
        started.extend(ranks)
        if wait:
            assert [rank.stdout.readline() for rank in ranks] == ["joined\n"] * count
        return ranks

    yield call
    for process in started:
        process.kill()
        process.communicate()


def errors(ranks):
    """What ranks printed to stderr before they ended."""
    return [rank.communicate(timeout=PATIENCE)[1] for rank in ranks]


@pytest.mark.parametrize("signal_, victim, what", [
    (signal.SIGKILL, 2, "has died"), pytest.param(signal.SIGKILL, 0, "has died", marks=pytest.mark.long),
    pytest.param(signal.SIGSTOP, 0, "has not answered for 2 seconds", marks=pytest.mark.long),
    pytest.param(signal.SIGSTOP, 1, "has not answered for 2 seconds", marks=pytest.mark.long)])
def test_a_rank_that_dies_or_stops_ends_the_others_with_one_message(start, signal_, victim, what):
    ranks = start(3, 2)
    time.sleep(1)
    os.kill(ranks[victim].pid, signal_)
    since = time.monotonic()
    others = [rank for rank in ranks if rank is not ranks[victim]]
    said = "".join(errors(others))
    assert time.monotonic() - since < 20  # of which 2 are the timeout
    assert [rank.returncode for rank in others] == [1, 1]
    line, = said.splitlines()
    assert f"error: rank {victim} (process {ranks[victim].pid} on {socket.gethostname()}) {what}" in line


@pytest.mark.parametrize("hanging", [[0], pytest.param([1, 2], marks=pytest.mark.long)])
def test_a_rank_that_lives_but_gets_stuck_is_named_with_what_it_did(start, hanging):
    ranks = start(3, 2, *hanging)
    line, = "".join(errors(ranks)).splitlines()
    assert f"error: rank {hanging[0]} (process {ranks[hanging[0]].pid} " in line
    assert "has been waiting for data for 2 seconds" in line
    assert [rank.returncode for rank in ranks] == [1, 1, 1]


@pytest.mark.long
def test_a_run_that_is_stopped_as_a_whole_may_go_on(start):
    ranks = start(2, 2)
    time.sleep(1)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for rank in ranks:
            os.kill(rank.pid, number)
        time.sleep(3)
    assert [rank.poll() for rank in ranks] == [None, None]


@pytest.mark.long
def test_processes_that_never_come_are_reported_within_the_timeout(start):
    first, absent = start(2, 3, wait=False)
    absent.kill()
    said, _ = errors([first, absent])
    assert first.returncode == 2 and "Traceback" not in said
    assert "the processes could not join at 127.0.0.1:" in said and "--dist_timeout 3 seconds" in said


def test_a_port_that_is_taken_is_reported(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        first, _ = start(2, 2, wait=False, MASTER_PORT=str(port))
        said, = errors([first])
    assert first.returncode == 2 and "Traceback" not in said
    assert f"--master_port: 127.0.0.1:{port} is taken by another program; give another port" in said


def test_a_stranger_at_the_watchs_door_is_sent_away():
    """Rank 0 takes in only who knows the token that went through the processes' own connection."""
    barrier, told, answers = threading.Barrier(2), {}, {}

    def gather(rank):
        def call(value):
            told[rank] = value
            barrier.wait(30)
            values = [told[0], told[1]]
            barrier.wait(30)
            if rank == 1 and "knocked" not in answers:
                answers["knocked"] = True
                for word in (b"hello 1\n", b"\xff\xff\n", b"", secrets.token_hex(16).encode() + b" 1\n"):
                    with socket.create_connection(("127.0.0.1", values[0][0])) as stranger:
                        stranger.sendall(word)
            return values
        return call

    with ThreadPoolExecutor(2) as pool:
        watches = list(pool.map(lambda rank: rank_watch.connect(rank, 2, "127.0.0.1", gather(rank), 60), range(2)))
    time.sleep(0.3)
    assert watches[0]._states[1]["name"].startswith("rank 1") and watches[1]._states[0]["name"].startswith("rank 0")
    for watch in watches:
        watch.close()
        assert not watch.found.is_set() and not watch._thread.is_alive()


def test_a_rank_that_failed_may_wait_for_the_others(monkeypatch):
    """Those may draw on for hours before they hear of it."""
    places = []
    monkeypatch.setattr(dist_util, "watch", SimpleNamespace(at=lambda place, doing="": places.append(place)))
    with pytest.raises(InputError, match="disk full"), dist_util.all_ranks_or_none():
        dist_util.at((3,), "drawing")
        raise InputError("disk full")
    assert places == [(3,), None]


EVIL = """
import sys
import torch
from guided_diffusion import dist_util

class Evil:
    def __reduce__(self):
        return open, (sys.argv[1], "w")

dist_util.setup_dist()
dist_util.all_gather_objects({"fine": [1, "x", None, 2.5, True, torch.ones(2)]})
dist_util.all_gather_objects(Evil() if dist_util.rank() else 0)
"""


def test_objects_of_other_ranks_run_no_code(start, tmp_path):
    ranks = start(2, tmp_path / "marker", script=("-c", EVIL), wait=False)
    said = errors(ranks)
    assert all("UnpicklingError" in text for text in said) and not (tmp_path / "marker").exists()


# ---- wrong from the start, under the launchers ----

def launch(processes, *flags_of_ranks):
    """mpiexec with other flags for each process; returns what was said."""
    command = [MPIEXEC]
    for flags in flags_of_ranks:
        command += [*([":"] if len(command) > 1 else []), "-n", 1, sys.executable, TRAIN, *flags]
    result = processes(*command)
    assert result.returncode == 2, result
    said = result.stdout + result.stderr
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if "error: " in line]
    assert len(lines) == 1, said
    return lines[0]


@pytest.mark.long
def test_flags_that_ranks_do_not_share_are_named(processes, make_cases, tiny, tmp_path):
    data = make_cases(tmp_path / "data")
    flags = training(data, "results", tiny, "--visdom_port", 0)
    line = launch(processes, flags, [*flags, "--batch_size", 2])
    assert "--batch_size (1 on rank 0, 2 on rank 1): give every process the same flags" in line
    line = launch(processes, flags, [*flags, "--learning_rate", 2])
    assert "on rank 1: unknown flag --learning_rate" in line
    assert not (tmp_path / "results").exists()


@pytest.mark.long
def test_a_rank_without_data_is_named(processes, make_cases, tiny, tmp_path):
    """Two machines, the second without the data: the same relative path from another folder."""
    make_cases(tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    flags = training("data", tmp_path / "results", tiny, "--visdom_port", 0)
    command = [MPIEXEC, "-n", 1, sys.executable, TRAIN, *flags, ":", "-wdir", tmp_path / "elsewhere", "-n", 1,
               sys.executable, TRAIN, *flags]
    result = processes(*command)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    line, = [line for line in result.stderr.splitlines() if "error: " in line]
    assert "on rank 1: --data_dir data: no such folder" in line
    make_cases(tmp_path / "elsewhere" / "data", count=1)
    line, = [line for line in processes(*command).stderr.splitlines() if "error: " in line]
    assert "number of entries (2 on rank 0, 1 on rank 1), " in line and "--data_dir data must hold the same" in line
    shutil.rmtree(tmp_path / "elsewhere" / "data")
    make_cases(tmp_path / "elsewhere" / "data", seed=1)
    line, = [line for line in processes(*command).stderr.splitlines() if "error: " in line]
    assert "names of entries" not in line and "contents of cases (" in line and not (tmp_path / "results").exists()


@pytest.mark.long
def test_a_rank_that_sees_another_results_folder_is_named(processes, run, make_cases, tiny, tmp_path):
    data = make_cases(tmp_path / "data")
    flags = training(data, "results", tiny, "--visdom_port", 0)
    assert run("segmentation_train.py", *flags).code == 0
    (tmp_path / "elsewhere").mkdir()
    result = processes(MPIEXEC, "-n", 1, sys.executable, TRAIN, *flags, ":", "-wdir", tmp_path / "elsewhere", "-n", 1,
                       sys.executable, TRAIN, *flags)
    line, = [line for line in result.stderr.splitlines() if "error: " in line]
    assert "the checkpoint to go on from (savedmodel000003.pt on rank 0, None on rank 1)" in line
    assert result.returncode == 2 and "--results_dir results must be the same folder" in line


# ---- whole runs ----

def endless(data, results, tiny, *flags):
    flags = training(data, results, tiny, "--visdom_port", 0, "--save_interval", 5, *flags)
    flags[flags.index("--max_steps") + 1] = 100000
    return list(map(str, flags))


def ranks_of(folder):
    """Process ids of the ranks whose command line names a folder, {rank: pid}."""
    found = {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = open(f"/proc/{name}/cmdline", "rb").read().split(b"\0")
            variables = open(f"/proc/{name}/environ", "rb").read().split(b"\0")
            state = open(f"/proc/{name}/stat").read().rpartition(")")[2].split()[0]
        except OSError:
            continue
        rank = [v[5:] for v in variables if v.startswith(b"RANK=")]
        if str(folder).encode() in command and rank and state != "Z":
            found[int(rank[0])] = int(name)
    return found


def wait_until(condition, what, seconds=90):
    for _ in range(int(seconds / 0.1)):
        if condition():
            return
        time.sleep(0.1)
    pytest.fail(f"{what} did not happen in {seconds} seconds")


@pytest.fixture
def background(environment, tmp_path):
    """background(command) starts a run; whatever is left of it at the end is killed."""
    started = []

    def call(*command, **env):
        started.append(subprocess.Popen(list(map(str, command)), env={**environment, **env}, cwd=tmp_path, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True))
        return started[-1]

    yield call
    end(started)


@pytest.mark.parametrize("number, code", [
    (signal.SIGINT, 130), pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.long)])
def test_ngpu_passes_signals_on_and_leaves_with_a_code_to_requeue_on(background, make_cases, tiny, tmp_path, number,
                                                                     code):
    data, results = make_cases(tmp_path / "data"), tmp_path / "results"
    run = background(sys.executable, TRAIN, "--ngpu", 2, *endless(data, results, tiny))
    read_until(run.stdout, "saved step 5")
    run.send_signal(number)
    assert run.wait(PATIENCE) == code
    assert checkpoint.steps_in(results)[-1] > 5 and not ranks_of(results)


@pytest.mark.long
def test_ngpu_leaves_with_the_code_of_a_refusal_and_without_a_traceback(processes, tiny, tmp_path):
    result = processes(sys.executable, TRAIN, "--ngpu", 2, *training("nowhere", "results", tiny))
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert result.stderr.count("error: --data_dir nowhere: no such folder") == 1


@pytest.mark.long
def test_ranks_whose_launcher_was_killed_save_and_leave(background, make_cases, tiny, tmp_path):
    data, results = make_cases(tmp_path / "data"), tmp_path / "results"
    run = background(sys.executable, TRAIN, "--ngpu", 2, *endless(data, results, tiny))
    read_until(run.stdout, "saved step 5")
    assert len(ranks_of(results)) == 2
    run.kill()
    wait_until(lambda: not ranks_of(results), "the end of the ranks")
    assert checkpoint.steps_in(results)[-1] > 5


@pytest.mark.long
def test_a_run_that_a_signal_stops_while_it_draws_ends_as_if_nothing_had_happened(background, processes, make_cases,
                                                                                  tiny, tmp_path):
    """Of the two ranks, only the one that does not write gets the signal."""
    val = make_cases(tmp_path / "val", count=24, seed=1)
    data = make_cases(tmp_path / "data", count=5, raters=3)

    def command(results):
        flags = training(data, results, tiny, "--visdom_port", 0, "--log_interval", 2, "--val_dir", val, "--val_cases",
                         24, "--sample_interval", 4)
        flags[flags.index("--max_steps") + 1] = 4
        return [sys.executable, TRAIN, "--ngpu", 2, *flags]

    results, straight = tmp_path / "results", tmp_path / "straight"
    run = background(*command(results))
    wait_until(lambda: (results / "progress.json").exists() and rows_of(results), "the first line")
    time.sleep(0.5)  # drawing takes seconds
    os.kill(ranks_of(results)[1], signal.SIGTERM)
    run.wait(PATIENCE)
    assert "the validation cases of step 4 are not drawn" in (results / "log.txt").read_text()
    assert checkpoint.steps_in(results) == [4] and [row["step"] for row in rows_of(results)] == [2]
    assert not (results / "panel.png").exists()

    for folder, words in ((results, "resumed at step 4"), (straight, "saved step 4")):
        result = processes(*command(folder))
        assert result.returncode == 0 and words in result.stdout and "reached already" not in result.stdout
    assert {path.name for path in results.iterdir()} == {path.name for path in straight.iterdir()}
    assert (results / "panel.png").read_bytes() == (straight / "panel.png").read_bytes()
    assert logged(results) == logged(straight)
    assert [row["step"] for row in logged(results)] == [2, 4] and "val_GED_16" in logged(results)[-1]
    for name in (checkpoint.model_name(4), checkpoint.opt_name(4)):
        assert_same(*(checkpoint.load(folder / name) for folder in (results, straight)))


@pytest.mark.long
@pytest.mark.parametrize("seconds", [1, 3])
def test_ranks_whose_launcher_is_killed_before_they_have_joined_leave(background, make_cases, tiny, tmp_path, seconds):
    data, results = make_cases(tmp_path / "data"), tmp_path / "results"
    run = background(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", TRAIN,
                     *endless(data, results, tiny))
    wait_until(lambda: len(ranks_of(results)) == 2, "the start of the ranks")
    time.sleep(seconds - 1)
    run.kill()
    wait_until(lambda: not ranks_of(results), "the end of the ranks", 40)


@pytest.mark.long
def test_torchrun_restarts_a_run_that_lost_a_rank_and_it_ends_as_if_nothing_had_happened(
        background, processes, make_cases, tiny, tmp_path):
    data = make_cases(tmp_path / "data", count=5, raters=3)

    def command(results, *more):
        flags = training(data, results, tiny, "--visdom_port", 0, "--save_interval", 5, "--log_interval", 4, *more)
        flags[flags.index("--max_steps") + 1] = 40
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=1",
                TRAIN, *flags]

    result = processes(*command(tmp_path / "straight"))
    assert result.returncode == 0, result.stderr
    run = background(*command(tmp_path / "results"))
    read_until(run.stdout, "saved step 5")
    os.kill(ranks_of(tmp_path / "results")[1], signal.SIGKILL)
    assert run.wait(PATIENCE) == 0
    log = (tmp_path / "results" / "log.txt").read_text()
    assert log.count("command:") == 2 and re.search(r"resumed at step \d+", log)
    for name in ("savedmodel000040.pt", "emasavedmodel_0.9999_000040.pt"):
        assert same_weights(*(checkpoint.load(tmp_path / folder / name) for folder in ("straight", "results")))
    assert logged(tmp_path / "results") == logged(tmp_path / "straight")
    assert [row["step"] for row in logged(tmp_path / "results")] == list(range(4, 41, 4))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "progress.json").read_text().splitlines()]


@pytest.mark.long
def test_a_run_goes_on_with_another_number_of_processes(processes, run, make_cases, tiny, tmp_path):
    """The same order of examples; two processes, then one, then two again end within rounding of one alone."""
    data = make_cases(tmp_path / "data", count=5, raters=[2, 1, 3, 2, 2])

    def flags(results, steps, batch):
        words = training(data, tmp_path / results, tiny, "--batch_size", batch, "--log_interval", 4, "--visdom_port", 0)
        words[words.index("--max_steps") + 1] = steps
        return words

    assert run("segmentation_train.py", *flags("one", 9, 4)).code == 0
    for steps, count in ((3, 2), (6, 1), (9, 2)):
        words = flags("mixed", steps, 4 // count)
        if count == 1:
            assert run("segmentation_train.py", *words).code == 0
        else:
            result = processes(sys.executable, TRAIN, "--ngpu", count, *words)
            assert result.returncode == 0, result.stderr
    one, mixed = (checkpoint.load(tmp_path / name / "savedmodel000009.pt") for name in ("one", "mixed"))
    torch.manual_seed(5)
    fresh = script_util.create_model_and_diffusion(**MODEL, learn_sigma=True)[0].state_dict()
    moved, apart = (sum((one[name] - other[name]).abs().sum() for name in one) for other in (fresh, mixed))
    assert apart < 0.01 * moved  # Adam turns the rounding of a gradient near 0 into steps, here and there
    alike = [[row for row in rows_of(tmp_path / name) if row["step"] in (4, 8)] for name in ("one", "mixed")]
    for expected, row in zip(*alike, strict=True):
        for name in expected.keys() - WALL_CLOCK:
            assert row[name] == pytest.approx(expected[name], rel=2e-3), name
    rest = [checkpoint.load(tmp_path / name / "optsavedmodel000009.pt") for name in ("one", "mixed")]
    assert (rest[0]["step"], rest[0]["position"]) == (rest[1]["step"], rest[1]["position"]) == (9, 36)
