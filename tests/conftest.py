"""What the tests share: small data sets, the flags of a small model, and scripts run inside the test's process."""

import io
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import visdom_page as assets
from helpers.files import ROOT
from helpers.models import MODEL
from PIL import Image

from guided_diffusion import checkpoint
from guided_diffusion.script_util import create_model_and_diffusion
from guided_diffusion.system import blobs

torch.set_num_threads(1)  # threads only wait for each other in networks this small, above all on a busy machine


@pytest.fixture
def tiny():
    """The flags of MODEL as words of a command line."""
    return [word for name, value in MODEL.items() for word in (f"--{name}", str(value))]


@pytest.fixture
def make_cases():
    """A maker of data folders: blobs on noise, each rater's a little different.

    make_cases(folder, count=2, raters=2, size=16, suffix=".png") writes case0, case1, ... and returns the folder;
    raters may be a list with one number a case.
    """

    def make(folder, count=2, raters=2, size=16, suffix=".png", seed=0):
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:size, :size]
        for i in range(count):
            case = Path(folder) / f"case{i}"
            case.mkdir(parents=True)
            centre = rng.uniform(0.35, 0.65, 2) * size
            distance = np.hypot(y - centre[0], x - centre[1]) / size
            image = np.clip(200 * (distance < 0.25) + rng.uniform(0, 55, (size, size)), 0, 255)
            save(case / f"image_{i}{suffix}", image)
            for rater in range(raters if isinstance(raters, int) else raters[i]):
                save(case / f"label{rater}_{suffix}", 255 * (distance < 0.2 + 0.05 * rater))
        return Path(folder)

    def save(path, pixels):
        options = {} if path.suffix == ".png" else {"quality": 95}
        Image.fromarray(pixels.astype(np.uint8)).save(path, **options)

    return make


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A results folder with weights that draw something, and its flags."""
    folder = tmp_path_factory.mktemp("trained")
    generator = torch.Generator().manual_seed(0)
    model, _ = create_model_and_diffusion(**MODEL)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1, generator=generator)
    checkpoint.save(folder / "savedmodel.pt", model.state_dict())
    checkpoint.save_flags(folder, MODEL)
    return folder


@pytest.fixture
def environment():
    """The environment for a process of its own that imports the library and tests/helpers from this checkout."""
    env = {name: value for name, value in os.environ.items() if name != "OPENAI_LOGDIR"}
    env["OMP_NUM_THREADS"] = "1"  # as in this process
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tests"), env.get("PYTHONPATH")]))
    return env


@pytest.fixture
def processes(environment, tmp_path):
    """processes(command) runs a command to its end in tmp_path; returns its code, out and err."""
    def call(*command, **env):
        # a session of its own: signals and leftovers stay within it
        process = subprocess.Popen(list(map(str, command)), env={**environment, **env}, cwd=tmp_path, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            pytest.fail(f"still running after {300} seconds: {command}")
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    return call


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """run("segmentation_train.py", *flags) runs a script as its command line would, in this process and in tmp_path.

    Returns code, out and err. Neither Visdom nor validation cases are drawn unless the flags ask for it.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)

    def call(script, *flags):
        path = str(ROOT / "scripts" / script)
        unseen = any(job in Path(script).name for job in ("evaluate", "export", "prepare"))  # without a live view
        quiet = [] if unseen or "--visdom_port" in flags else ["--visdom_port", "0"]
        if "train" in Path(script).name and "--sample_interval" not in flags:
            quiet += ["--sample_interval", "0"]
        monkeypatch.setattr(sys, "argv", [path, *map(str, flags), *quiet])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(path, run_name="__main__")
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture
def undrawn(monkeypatch):
    """Leaves scores.png empty, which takes longer than all the rest of an evaluation."""
    from guided_diffusion.draw import plots

    monkeypatch.setattr(plots, "score_figure", lambda *args: b"")


@pytest.fixture
def no_proxy(monkeypatch):
    """Takes the proxies out of the environment, through which a server on this machine may be out of reach."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def visdom_page():
    """Sees to it that the page of the installed Visdom works in a browser; skips the test where it cannot."""
    visdom = pytest.importorskip("visdom")
    reason = assets.provide(Path(visdom.__file__).parent / "static")
    if reason:
        pytest.skip(reason)


@pytest.fixture
def disk(tmp_path):
    """disk(options) mounts a small file system at tmp_path/results, or again with other options."""
    folder = tmp_path / "results"
    folder.mkdir()

    def mount(options):
        again = "remount," if folder.is_mount() else ""
        result = subprocess.run(["mount", "-t", "tmpfs", "-o", again + options, "tmpfs", folder], capture_output=True)
        if result.returncode:
            pytest.skip(f"nothing can be mounted here: {result.stderr.decode().strip()}")

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True)  # a run that failed may hold a file open


@pytest.fixture
def bucket(monkeypatch):
    """An object store in memory in the place of those that blobfile reaches: url -> bytes."""
    import blobfile

    store = {}

    class Writer(io.BytesIO):
        def __init__(self, path):
            super().__init__()
            self.path = path

        def close(self):  # an object appears when its upload is complete
            store[self.path] = self.getvalue()
            super().close()

    def listdir(path):
        return [name.removeprefix(path + "/") for name in store if name.startswith(path + "/")]

    def open_object(path, mode):
        if mode == "rb" and path not in store:
            raise FileNotFoundError(path)
        return Writer(path) if mode == "wb" else io.BytesIO(store[path])

    monkeypatch.setattr(blobfile, "BlobFile", open_object)
    monkeypatch.setattr(blobfile, "remove", store.pop)
    monkeypatch.setattr(blobs, "write_new", lambda path, data: store.setdefault(path, data) is data)
    monkeypatch.setattr(blobfile, "exists", lambda path: path in store or bool(listdir(path)))
    monkeypatch.setattr(blobfile, "listdir", listdir)
    return store


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A helpers.store.Store."""
    pytest.importorskip("moto", reason="moto, an S3 server, is not installed")
    pytest.importorskip("s3fs", reason="s3fs is not installed")
    from helpers.store import Store

    store = Store(tmp_path_factory.mktemp("store") / "log")
    yield store
    store.close()


@pytest.fixture
def login(store, monkeypatch):
    """login(user, **variables): from now on this process asks the store as that user, at first as its owner."""
    from guided_diffusion.system import s3

    def enter(user="owner", **variables):
        for name, value in {**store.environment(user), **variables}.items():
            monkeypatch.setenv(name, value)
        s3._store.cache_clear()
        type(s3._store()).clear_instance_cache()

    enter()
    yield enter
    s3._store.cache_clear()
