"""A run whose data and results lie in a bucket."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers.files import tree
from helpers.models import assert_same
from helpers.processes import PATIENCE, SAMPLE, TRAIN, end, read_until, training

from guided_diffusion import checkpoint

STEPS = 8
# as scripts/segmentation_train.py, but it goes no further than step 5
WAITING = """
import runpy, sys, time
from guided_diffusion.train_util import TrainLoop
step = TrainLoop.run_step
def waiting(loop, *args):
    while loop.step == 5:
        time.sleep(0.2)
        [callback.saver.poll() for callback in loop.callbacks if hasattr(callback, "saver")]
    return step(loop, *args)
TrainLoop.run_step = waiting
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def start(store, environment, tmp_path):
    """start(words, user=) starts a program that reaches the store and keeps copies in tmp_path/cache."""
    started = []

    def call(*words, user="owner", **variables):
        env = {**environment, **store.environment(user), "XDG_CACHE_HOME": str(tmp_path / "cache"), **variables}
        started.append(subprocess.Popen([sys.executable, *map(str, words)], env=env, cwd=tmp_path, text=True,
                                        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True))
        return started[-1]

    yield call
    end(started)


def upload(store, folder, to):
    s3 = store.client()
    for name, data in tree(folder).items():
        s3.put_object(Bucket="shared", Key=f"{to}/{name}", Body=data)


def flags(data, results, tiny, *more):
    words = training(data, results, tiny, "--save_interval", 2, *more)
    words[words.index("--max_steps") + 1] = STEPS
    return words


@pytest.mark.long
def test_of_two_runs_in_a_bucket_one_is_refused_and_the_other_is_killed_goes_on_and_samples_as_on_a_disk(
        start, store, make_cases, tiny, tmp_path):
    data = make_cases(tmp_path / "data", count=3)
    upload(store, data, "data")
    both = [start("-uc", WAITING, TRAIN, *flags("s3://shared/data", "s3://shared/run", tiny)) for _ in range(2)]
    until = time.monotonic() + PATIENCE
    while all(process.poll() is None for process in both):
        assert time.monotonic() < until
        time.sleep(0.1)
    winner, refused = sorted(both, key=lambda process: process.poll() is not None)
    said = refused.communicate()[1]
    assert refused.returncode == 2 and said.count("\n") == 1, said
    assert f"--results_dir s3://shared/run: process {winner.pid} on " in said
    read_until(winner.stdout, "saved step 4")
    os.killpg(winner.pid, signal.SIGKILL)
    winner.wait()
    on = start(TRAIN, *flags("s3://shared/data", "s3://shared/run", tiny))
    straight = start(TRAIN, *flags(data, tmp_path / "straight", tiny))
    out, err = on.communicate()
    assert on.returncode == 0 and "resumed at step 4" in out and "Traceback" not in err, err
    assert straight.communicate() and straight.returncode == 0
    names = {found["Key"].removeprefix("run/") for found in
             store.client().list_objects_v2(Bucket="shared", Prefix="run/")["Contents"]}
    assert {checkpoint.opt_name(STEPS), checkpoint.NEWEST, "flags.json"} <= names and ".training.lock" not in names
    for name in (checkpoint.model_name(STEPS), checkpoint.opt_name(STEPS), checkpoint.ema_name("0.9999", STEPS)):
        store.client().download_file("shared", f"run/{name}", str(tmp_path / name))
        assert_same(*(checkpoint.load(path) for path in (tmp_path / name, tmp_path / "straight" / name)))
    shutil.rmtree(tmp_path / "cache")
    draws = {results: start(SAMPLE, "--data_dir", source, "--model_path", f"{model}/{checkpoint.NEWEST}",
                            "--results_dir", results, "--num_ensemble", 2)
             for source, model, results in ((data, tmp_path / "straight", tmp_path / "masks"),
                                            ("s3://shared/data", "s3://shared/run", "s3://shared/masks"))}
    for process in draws.values():
        assert "Traceback" not in process.communicate()[1] and process.returncode == 0
    expected = tree(tmp_path / "masks")
    s3 = store.client()
    got = {found["Key"].removeprefix("masks/"): s3.get_object(Bucket="shared", Key=found["Key"])["Body"].read()
           for found in s3.list_objects_v2(Bucket="shared", Prefix="masks/")["Contents"]}
    pictures = {name for name in expected if name.endswith((".png", ".npz"))}
    assert pictures and {name: got[name] for name in pictures} == {name: expected[name] for name in pictures}


@pytest.mark.long
@pytest.mark.parametrize("user, flag, path, said", [
    ("owner", "--results_dir", "s3://absent/run", "there is no bucket absent"),
    ("guest", "--results_dir", "s3://shared/run", "the store gives no rights to it"),
    ("guest", "--data_dir", "s3://shared/data", "the store gives no rights to it")])
def test_a_run_that_a_bucket_refuses_ends_with_one_line(start, make_cases, tiny, tmp_path, user, flag, path, said):
    data = make_cases(tmp_path / "data", count=2)
    process = start(TRAIN, *flags(data, tmp_path / "run", tiny, flag, path), user=user)
    error = process.communicate()[1]
    assert process.returncode == 2 and path in error and said in error and error.count("\n") == 1, error
