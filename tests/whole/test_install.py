"""The package as pip installs it, away from its checkout."""

import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers.files import ROOT
from helpers.processes import training

from guided_diffusion import __version__
from guided_diffusion.commands.program import SCRIPTS

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with the package, its commands in bin/; built from a copy of the checkout, which stays as it is."""
    copy, folder = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("installed")
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "guided_diffusion", copy / "guided_diffusion", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation",
               "--no-compile", "--target", folder, copy]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture
def distribution(installed):
    found, = importlib.metadata.distributions(name="guided-diffusion-segmentation", path=[str(installed)])
    return found


def test_every_file_of_the_package_is_installed(installed):
    expected = {path.relative_to(ROOT) for path in (ROOT / "guided_diffusion").rglob("*")
                if path.is_file() and "__pycache__" not in path.parts}
    assert {path.name for path in expected} >= {"py.typed", "report.html", "report.css", "report.js"}
    assert expected == {path.relative_to(installed) for path in (installed / "guided_diffusion").rglob("*")
                        if path.is_file() and "__pycache__" not in path.parts}


def test_only_what_everything_needs_is_required_and_the_rest_are_extras(distribution):
    required = {"": set()}
    for line in distribution.requires:
        package, _, condition = line.partition(";")
        extra = condition.split("extra ==")[-1].strip(" \"'") if "extra" in condition else ""
        name = package.strip().split("<")[0].split(">")[0]
        required.setdefault(extra, set()).add(name)
    assert required[""] == {"torch", "numpy", "pillow", "tqdm", "scipy", "safetensors"}
    medical = {"pydicom", "nibabel", "highdicom", "h5py"}
    optional = {*medical, "matplotlib", "visdom", "blobfile", "s3fs", "mpi4py"}
    for extra, packages in (("plots", {"matplotlib"}), ("visdom", {"visdom"}), ("cloud", {"blobfile"}),
                            ("s3", {"s3fs"}), ("mpi", {"mpi4py", "mpich"}), ("medical", medical),
                            ("all", optional), ("dev", {*optional, "pytest", "ruff"})):
        assert packages <= required[extra], extra


def test_every_console_command_runs_its_module(distribution, installed):
    assert distribution.version == __version__
    commands = {point.name: point.value for point in distribution.entry_points if point.group == "console_scripts"}
    assert commands == {f"cimd-{name}": f"guided_diffusion.commands.{name}:run" for name in SCRIPTS}
    assert set(commands) <= {path.stem for path in (installed / "bin").iterdir()}


def test_an_installed_command_trains_in_two_processes_and_prints_one_that_samples(processes, installed, make_cases,
                                                                                 tmp_path, tiny):
    data = make_cases(tmp_path / "scans" / "training")
    make_cases(tmp_path / "scans" / "testing", count=1)
    (tmp_path / "guided_diffusion.py").write_text("raise SystemExit('a module of the working directory')")
    environment = {"PYTHONPATH": str(installed), "PATH": os.pathsep.join([str(installed / "bin"), os.environ["PATH"]])}
    result = processes(installed / "bin" / "cimd-train", "--ngpu", 2, *training(data, "results", tiny), **environment)
    assert result.returncode == 0 and "2 process(es)" in result.stdout, result.stderr
    for following, final in (("cimd-sample", ["--num_ensemble", 2]), ("cimd-evaluate", ["--ensemble_sizes", "2"])):
        name, *flags = shlex.split(result.stdout.strip().splitlines()[-1])
        assert name == following
        result = processes(installed / "bin" / name, *flags, *final, **environment)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "results" / "report.html").exists()
    refused = processes(installed / "bin" / "cimd-evaluate", "--data_dir", "nowhere", **environment)
    assert refused.returncode == 2 and refused.stderr.startswith("cimd-evaluate: error: --data_dir nowhere")
