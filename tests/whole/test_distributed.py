"""Several processes make the same run as one, however they were started, and end together."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers.loops import make_loop
from helpers.models import make_cimd
from helpers.processes import MPIEXEC, PATIENCE, SAMPLE, TRAIN, free_port, read_until, training
from PIL import Image

from guided_diffusion import checkpoint, dist_util, script_util
from guided_diffusion.system.errors import InputError

WORKER = """
import sys
import numpy as np
import torch
from guided_diffusion import checkpoint, dist_util
from guided_diffusion.system.errors import InputError
from guided_diffusion.resample import create_named_schedule_sampler

dist_util.setup_dist()
rank, size = dist_util.rank(), dist_util.world_size()
assert size == 2 and dist_util.all_gather_objects(rank) == [0, 1]
assert dist_util.all_gather(torch.tensor([[rank, 7]])).tolist() == [[0, 7], [1, 7]]

sampler = create_named_schedule_sampler("loss-second-moment", 20)
rng = np.random.default_rng(rank)  # each rank draws its own
for _ in range(60):
    t, weights = sampler.sample(rng.random(8))
    losses = (t.float() + 1) * (2 if rank else 1)
    sampler.update(dist_util.all_gather(t), dist_util.all_gather(losses))
p = torch.from_numpy(sampler.probabilities())
checkpoint.save(f"{sys.argv[1]}/sampler{rank}.pt", {**sampler.state_dict(), "p": p})

stop, steps = dist_util.StopFlag(), 0
while not stop(rank == 1 and steps >= 3):
    steps += 1
try:
    with dist_util.all_ranks_or_none():
        if rank == 1:
            raise InputError("only rank 1 sees this")
    message = "nothing was raised"
except InputError as error:
    message = str(error)
try:
    dist_util.refuse_unlike({"torch": f"2.{rank}", "cases": "7"}, "give both the same")
except InputError as error:
    message += f"; {error}"
open(f"{sys.argv[1]}/rank{rank}.txt", "w").write(f"{steps} {message}")
dist_util.cleanup()
"""


def watched(data):
    """Flags that change examples at random, and draw and score validation cases on the way."""
    return ["--augment", "flips,rot90,shift,intensity", "--val_dir", data, "--val_cases", 3, "--sample_interval", 2]


def launchers():
    launch = [sys.executable, "-m", "torch.distributed.launch", "--nproc_per_node=2", f"--master_port={free_port()}"]
    return {"launch": [*launch, TRAIN], "mpiexec": [MPIEXEC, "-n", 2, sys.executable, TRAIN],
            "ngpu": [sys.executable, TRAIN, "--ngpu", 2],
            "shard": [sys.executable, TRAIN, "--ngpu", 2, "--shard", "True"]}


@pytest.mark.parametrize("names", [["ngpu"], pytest.param(["launch", "mpiexec", "shard"], marks=pytest.mark.long)])
def test_two_processes_train_as_one_with_twice_the_batch_under_every_launcher(processes, run, make_cases, tiny,
                                                                              tmp_path, names):
    data, expected = make_cases(tmp_path / "data", count=5, raters=[2, 1, 3, 2, 2]), tmp_path / "one"
    result = run("segmentation_train.py", *training(data, expected, tiny, "--batch_size", 4, *watched(data)))
    assert result.code == 0, result.err
    fresh = script_util.create_model(image_size=16, num_channels=32, channel_mult="1,2", num_res_blocks=1, num_heads=1,
                                     attention_resolutions="8", learn_sigma=True).state_dict()
    moved = checkpoint.load(expected / "savedmodel000003.pt")
    assert (moved["out.2.weight"] - fresh["out.2.weight"]).abs().max() > 5e-4  # 5 times what may differ below
    for launcher in names:
        flags = training(data, launcher, tiny, "--batch_size", 2, "--visdom_port", 0, *watched(data))
        result = processes(*launchers()[launcher], *flags)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("saved step 3") == 1
        assert_as_of_one(tmp_path / launcher, expected)


def assert_as_of_one(folder, expected):
    """The results of two processes are those of one: rank 0 alone has written, and of everything the same."""
    for name in ("savedmodel000003.pt", "emasavedmodel_0.9999_000003.pt"):
        one, two = checkpoint.load(expected / name), checkpoint.load(folder / name)
        assert one.keys() == two.keys()
        for key in one:
            torch.testing.assert_close(two[key], one[key], atol=1e-4, rtol=0)
    before = checkpoint.load(expected / "optsavedmodel000003.pt")
    after = checkpoint.load(folder / "optsavedmodel000003.pt")
    assert (before["step"], before["position"]) == (after["step"], after["position"]) == (3, 12)
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}
    log = (folder / "log.txt").read_text()
    assert log.count("command:") == 1 and log.count("saved step 3") == 1 and "2 process(es)" in log
    rows = [[json.loads(line) for line in (path / "progress.json").read_text().splitlines()]
            for path in (expected, folder)]
    assert [row["step"] for row in rows[1]] == [1, 2, 3]
    assert len((folder / "progress.csv").read_text().splitlines()) == 4
    for one, two in zip(*rows):  # the validation cases are shared among the processes, too
        names = [name for name in one if name.startswith(("val_", "grad_", "param_", "loss"))]
        assert ("val_GED_16" in names) == (one["step"] > 1) and one.keys() == two.keys()
        assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, abs=0.02)


def test_two_processes_draw_the_same_masks_as_one(processes, run, make_cases, trained, tmp_path):
    data = make_cases(tmp_path / "data", count=5)
    flags = ["--data_dir", data, "--model_path", trained / "savedmodel.pt", "--timestep_respacing", 4,
             "--num_ensemble", 3, "--batch_size", 4, "--visdom_port", 0]
    assert run("segmentation_sample.py", *flags, "--results_dir", tmp_path / "one").code == 0
    result = processes(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", SAMPLE,
                       *flags, "--results_dir", "two")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("5 cases, 15 masks") == 1
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == names and len(names) == 5 * 7
    for name in names:
        one, two = tmp_path / "one" / name, tmp_path / "two" / name
        if "output" in name:
            assert np.array_equal(np.asarray(Image.open(one)), np.asarray(Image.open(two)))
        if name.endswith("npz"):
            np.testing.assert_allclose(np.load(one)["samples"], np.load(two)["samples"], atol=1e-5)
    again = run("segmentation_sample.py", *flags, "--results_dir", tmp_path / "two")
    assert "5 of them already complete" in again.out  # by one process, of what two have drawn


INTERRUPTED = """
import runpy, signal, sys, time
from guided_diffusion.data import cases as data_cases

signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
read = data_cases.SegmentationCases.compact
data_cases.SegmentationCases.compact = lambda self, i: (time.sleep(1), read(self, i))[1]
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ctrl_c_while_training_waits_for_a_slow_disk_saves_and_a_rerun_goes_on(run, make_cases, environment, tiny,
                                                                               tmp_path):
    """As from a terminal, all processes of the run get the signal."""
    data = make_cases(tmp_path / "data")
    flags = training(data, tmp_path / "results", tiny, "--visdom_port", 0)
    flags[flags.index("--max_steps") + 1] = 0
    process = subprocess.Popen([sys.executable, "-c", INTERRUPTED, TRAIN, *map(str, flags)], env=environment,
                               text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
    read_until(process.stdout, "| step   ")
    time.sleep(0.5)  # the training now waits for a slow reader
    os.killpg(process.pid, signal.SIGINT)
    err = process.stderr.read()
    assert process.wait(PATIENCE) == 130, err
    assert err == ""
    step, = checkpoint.steps_in(tmp_path / "results")
    assert step >= 1
    result = run("segmentation_train.py", *flags, "--max_steps", step + 1)
    assert result.code == 0 and f"resumed at step {step}" in result.out
    assert checkpoint.steps_in(tmp_path / "results") == [step, step + 1]


def test_an_input_error_of_all_processes_is_printed_once_and_ends_the_run(processes, tiny, tmp_path):
    (tmp_path / "data").mkdir()
    result = processes(MPIEXEC, "-n", 2, sys.executable, TRAIN, *training("data", "results", tiny))
    assert result.returncode == 2
    assert (result.stdout + result.stderr).count("holds no case") == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "results").exists()


def test_ranks_of_slurm_share_losses_stop_together_and_fail_together(environment, tmp_path):
    env = {**environment, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost",
           "SLURM_STEP_TASKS_PER_NODE": "2", "MASTER_PORT": str(free_port())}
    ranks = [subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stderr=subprocess.PIPE, text=True,
                              env={**env, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}) for rank in range(2)]
    errors = [process.communicate(timeout=PATIENCE)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    first, second = (checkpoint.load(tmp_path / f"sampler{rank}.pt") for rank in range(2))
    for name in first:
        assert torch.equal(first[name], second[name])
    assert first["counts"].sum() == 60 * 8 * 2 and first["counts"].min() >= 10
    seen = first["history"]  # losses of both ranks, each the timestep + 1, once or twice
    steps = torch.arange(1, 21).double()[:, None]
    assert ((seen == steps) | (seen == 2 * steps)).all() and (seen == steps).any() and (seen == 2 * steps).any()
    assert first["p"][-1] > 5 * first["p"][0]
    notes = [(tmp_path / f"rank{rank}.txt").read_text() for rank in range(2)]
    assert notes[0] == notes[1] and notes[0].endswith(
        " only rank 1 sees this; torch (2.0 on rank 0, 2.1 on rank 1): give both the same")
    assert int(notes[0].split()[0]) >= 3


SPOILT = """
import sys
import torch
from helpers.loops import bad_steps, make_loop, spoil
from guided_diffusion import checkpoint, dist_util, logger

dist_util.setup_dist()
logger.configure(enabled=dist_util.rank() == 0)
folder = sys.argv[1]
loop = spoil(make_loop(folder, max_steps=4, ema_rate="0.5"), {2} if dist_util.rank() else set(), rows=(0,))
loop.run_loop()
checkpoint.save(f"{folder}/rank{dist_util.rank()}.pt", {
    **loop.method.state_dict(), **{f"average {name}": value for name, value in loop.ema["0.5"].state_dict().items()},
    "bad": bad_steps(loop)})
print(loop.data.case_name(6))
dist_util.cleanup()
"""


def test_a_loss_that_is_not_finite_on_one_rank_skips_the_step_on_all(environment, tmp_path):
    env = {**environment, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [subprocess.Popen([sys.executable, "-c", SPOILT, str(tmp_path)], stdout=subprocess.PIPE, text=True,
                              env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    outs = [process.communicate(timeout=PATIENCE)[0] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0]
    first, second = (checkpoint.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first.pop("bad") == second.pop("bad") == 1
    assert all(torch.equal(first[name], second[name]) and first[name].isfinite().all() for name in first)
    line, = [line for line in outs[0].splitlines() if "is skipped" in line]
    assert line.startswith(f"step 2 is skipped: the loss is not finite for {outs[0].split()[-1]} at timestep")
    assert line.endswith("on rank 1") and line.count("rank") == 1 and "is skipped" not in outs[1]


SHARED = """
import sys
from helpers.loops import make_loop
from helpers.models import make_cimd
from guided_diffusion import checkpoint, dist_util, logger

dist_util.setup_dist()
logger.configure(enabled=False)
for name, settings in (("uneven", {}), ("rounded", {"wire_dtype": "bfloat16"})):
    loop = make_loop(sys.argv[1], make_cimd(), global_batch=5, max_steps=2, lr=1e-3, **settings)
    places, run_step = [], loop.run_step
    loop.run_step = lambda batch, run_step=run_step: (places.append(batch.places), run_step(batch))
    loop.callbacks = []
    loop.run_loop()
    checkpoint.save(f"{sys.argv[1]}/{name}{dist_util.rank()}.pt", {
        "weights": loop.method.state_dict(), "gradient": [p.grad for p in loop.trained],
        "places": places})
dist_util.cleanup()
"""


def test_a_global_batch_that_ranks_cannot_share_evenly_trains_as_in_one_process_also_with_gradients_sent_as_bf16(
        environment, tmp_path):
    env = {**environment, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [subprocess.Popen([sys.executable, "-c", SHARED, str(tmp_path)], stderr=subprocess.PIPE, text=True,
                              env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    errors = [process.communicate(timeout=PATIENCE)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], errors
    one = make_loop(tmp_path, make_cimd(), global_batch=5, max_steps=2, lr=1e-3)
    before = {name: value.clone() for name, value in one.method.state_dict().items()}
    one.callbacks = []
    one.run_loop()
    expected = one.method.state_dict()
    for name in ("uneven", "rounded"):
        first, second = (checkpoint.load(tmp_path / f"{name}{rank}.pt") for rank in range(2))
        assert (first["places"], second["places"]) == ([[0, 1], [5, 6]], [[2, 3, 4], [7, 8, 9]])
        assert all(torch.equal(first["weights"][key], second["weights"][key]) for key in expected)
        moved, apart = (sum((first["weights"][key] - other[key]).abs().sum() for key in expected)
                        for other in (before, expected))
        assert apart < (1e-3 if name == "uneven" else 0.1) * moved  # Adam makes steps of gradients near 0, too
        sent = all(torch.equal(grad, grad.bfloat16().float()) for grad in first["gradient"])
        assert sent == (name == "rounded")


@pytest.mark.parametrize("rank", [0, 1])
def test_more_processes_than_gpus_is_refused_by_every_rank(monkeypatch, rank):
    for name, value in {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="2 processes .* 1 GPU"):
        dist_util.setup_dist()


def test_alone_there_is_nothing_to_join(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    dist_util.setup_dist(ngpu=1)
    assert not torch.distributed.is_initialized()
    assert (dist_util.rank(), dist_util.world_size()) == (0, 1)
    assert dist_util.all_gather_objects("x") == ["x"]
    assert torch.equal(dist_util.all_gather(torch.arange(3)), torch.arange(3))
    assert not dist_util.StopFlag()(False) and dist_util.StopFlag()(True)
