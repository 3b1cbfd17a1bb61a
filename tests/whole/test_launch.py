"""The recipes of scripts/launch, on this machine: each of its processes stands for a host."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from helpers.files import ROOT
from helpers.processes import HERE, PATIENCE, TRAIN, end, free_port, training

from guided_diffusion import checkpoint
from guided_diffusion.commands.cli import parse_flags

LAUNCH = ROOT / "scripts" / "launch"
# srun runs one task, and passes signals on; scontrol notes what it is told; cimd-train is that of this checkout
FAKES = {"srun": """#!/bin/bash
export SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_NUM_TASKS=1
"$@" &
task=$!
trap 'kill -USR1 $task' USR1
wait $task; code=$?
kill -0 $task 2>/dev/null && { wait $task; code=$?; }
exit $code
""", "scontrol": """#!/bin/bash
echo "$@" >> "$TOLD"
""", "cimd-train": f"""#!/bin/sh
exec {shlex.quote(sys.executable)} {shlex.quote(TRAIN)} "$@"
"""}


@pytest.fixture
def recipe(environment, tmp_path):
    """recipe(name, *flags, **variables) starts a recipe of scripts/launch in tmp_path; what is left of it is killed."""
    started = []
    (tmp_path / "bin").mkdir()
    for name, text in FAKES.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), str(HERE), os.environ["PATH"]])

    def call(name, *flags, **variables):
        shell = "bash" if name.endswith("sbatch") else "sh"
        started.append(subprocess.Popen(
            [shell, LAUNCH / name, *map(str, flags)], cwd=tmp_path, text=True, start_new_session=True,
            env={**environment, "PATH": path, "TOLD": str(tmp_path / "told"), **variables}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT))
        return started[-1]

    yield call
    end(started)


def flags_of(data, results, tiny, steps, *more):
    flags = training(data, results, tiny, "--visdom_port", 0, "--save_interval", 5, *more)
    flags[flags.index("--max_steps") + 1] = steps
    return flags


def wait_for_step(folder, step, process):
    until = time.monotonic() + PATIENCE
    while not any(saved >= step for saved in (checkpoint.steps_in(folder) if folder.exists() else ())):
        assert process.poll() is None and time.monotonic() < until, process.communicate()[0]
        time.sleep(0.1)


@pytest.mark.parametrize("path", sorted(LAUNCH.glob("*.s*")), ids=lambda path: path.name)
def test_example_and_shell_of_a_recipe_are_sound(path):
    text = path.read_text(encoding="utf-8")
    subprocess.run(["bash", "-n", path], check=True)
    example, = (line for line in text.splitlines() if line.startswith("#   "))
    words = shlex.split(example.replace("--data_dir ...", ""))
    assert str(path.relative_to(ROOT)) in words
    parse_flags("training", "", words[words.index(str(path.relative_to(ROOT))) + 1:])


@pytest.mark.long
def test_sbatch_recipe_waits_for_the_save_then_queues_again_and_ends_as_asked(recipe, make_cases, tiny, tmp_path):
    data, results = make_cases(tmp_path / "data"), tmp_path / "results"
    job = recipe("slurm.sbatch", *flags_of(data, results, tiny, 100000), SLURM_JOB_ID="77")
    wait_for_step(results, 5, job)
    job.send_signal(signal.SIGUSR1)  # as --signal=B:USR1 does
    assert job.wait(PATIENCE) == 138
    step = checkpoint.steps_in(results)[-1]
    assert step > 5 and (tmp_path / "told").read_text() == "requeue 77\n"
    again = recipe("slurm.sbatch", *flags_of(data, results, tiny, step + 2), SLURM_JOB_ID="77")
    assert again.wait(PATIENCE) == 0 and checkpoint.steps_in(results)[-1] == step + 2
    assert (tmp_path / "told").read_text() == "requeue 77\n"


@pytest.mark.long
@pytest.mark.parametrize("name", ["nodes.sh", "mpi.sh", "one_node.sh"])
def test_recipe_trains_on_two_processes_as_one_process_does(recipe, run, make_cases, tiny, tmp_path, name):
    data = make_cases(tmp_path / "data", count=5)
    flags = [data, "many", tiny, 3, "--global_batch", 4, "--batch_size", 2]
    if name == "nodes.sh":
        variables = {"RENDEZVOUS": f"localhost:{free_port()}", "LOGS": str(tmp_path / "logs")}
        runs = [recipe(name, *flags_of(*flags), **variables) for _ in range(2)]
    elif name == "mpi.sh":
        runs = [recipe(name, *flags_of(*flags), HOSTS="localhost", PROCESSES="2")]
    else:
        runs = [recipe(name, *flags_of(*flags), PROCESSES="2")]
    said = [process.communicate(timeout=PATIENCE)[0] for process in runs]
    assert not any(process.returncode for process in runs), said
    assert run("segmentation_train.py", *flags_of(data, "one", tiny, 3, "--batch_size", 4)).code == 0
    one, many = (checkpoint.load(tmp_path / name / "savedmodel000003.pt") for name in ("one", "many"))
    assert max((one[key] - many[key]).abs().max() for key in one) < 1e-4
    assert "2 process(es)" in (tmp_path / "many" / "log.txt").read_text()


@pytest.mark.long
def test_elastic_recipe_goes_on_with_the_machines_that_are_left(recipe, run, make_cases, tiny, tmp_path):
    """The second of two machines is taken away, and its processes are told so by SIGTERM: all save and leave, and the
    first goes on alone. The global batch and the order of the data stay."""
    data, results = make_cases(tmp_path / "data", count=5), tmp_path / "elastic"
    flags = flags_of(data, results, tiny, 200, "--global_batch", 4, "--batch_size", 2, "--dist_timeout", 10)
    variables = {"RENDEZVOUS": f"localhost:{free_port()}", "NODES": "1:2", "LOGS": str(tmp_path / "logs")}
    first = recipe("nodes.sh", *flags, **variables)
    time.sleep(3)
    second = recipe("nodes.sh", *flags, **variables)
    wait_for_step(results, 5, first)
    second.send_signal(signal.SIGTERM)
    assert first.wait(PATIENCE) == 0, first.communicate()[0]
    log = (results / "log.txt").read_text()
    assert "2 process(es)" in log and "1 process(es)" in log and "resumed at step" in log
    assert log.count("4 in all") == log.count("command:") >= 2
    assert run("segmentation_train.py", *flags_of(data, "one", tiny, 5, "--batch_size", 4)).code == 0
    one, many = (checkpoint.load(folder / "savedmodel000005.pt") for folder in (tmp_path / "one", results))
    assert max((one[key] - many[key]).abs().max() for key in one) < 1e-4
    assert checkpoint.load(results / "optsavedmodel000200.pt")["position"] == 800
