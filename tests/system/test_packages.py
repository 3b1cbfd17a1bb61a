"""Packages that are missing are named where they are needed, with the command that brings them."""

import sys

import pytest
from helpers.refusals import refusal

from guided_diffusion import dist_util
from guided_diffusion.system import packages, s3, storage


@pytest.mark.parametrize("package, what, use", [
    ("blobfile", "a path with ://", lambda: storage.exists("gs://bucket/run")),
    ("s3fs", "a path with s3://", lambda: storage.exists("s3://bucket/run")),
    ("mpi4py", "mpiexec", dist_util.setup_dist)])
def test_what_needs_a_missing_package_names_it_and_the_command_that_brings_it(monkeypatch, package, what, use):
    monkeypatch.setitem(sys.modules, package, None)
    s3._store.cache_clear()
    monkeypatch.setenv("PMI_SIZE", "2")  # as under mpiexec
    assert refusal(use) == f"{what} needs the package {package}: pip install {package}"


def test_a_package_that_is_there_but_broken_says_what_is_wrong(monkeypatch, tmp_path):
    (tmp_path / "broken_package.py").write_text("raise ImportError('libfoo.so: not found')")
    monkeypatch.syspath_prepend(tmp_path)
    message = refusal(packages.require, "broken_package", "this")
    assert "cannot be imported (libfoo.so: not found)" in message and "pip install broken_package" in message


@pytest.mark.parametrize("version, command", [
    ((3, 11), 'pip install "setuptools<81" wheel "tornado<6.5" && pip install --no-build-isolation visdom'),
    ((3, 12), "pip install visdom")])
def test_the_command_for_visdom_is_one_that_works_on_this_python(monkeypatch, version, command):
    monkeypatch.setattr(sys, "version_info", version)
    assert packages.install_command("visdom") == command
