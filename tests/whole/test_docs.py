"""What the pages of documentation say stays true: links, commands, flags, files, moved imports, and lines of Python."""

import argparse
import ast
import pkgutil
import re
import shlex
import shutil

import numpy as np
import pytest
from helpers.files import ROOT
from helpers.models import MODEL
from torch.distributed.run import get_args_parser

from guided_diffusion import Segmenter, __version__
from guided_diffusion.commands.cli import parse_flags
from guided_diffusion.commands.phantoms import create_argparser
from guided_diffusion.flags import FLAGS
from guided_diffusion.prepare import SOURCES

PAGES = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in (
    *(ROOT / f"{name}.md" for name in ("README", "SECURITY", "CONTRIBUTING", "CHANGELOG")), ROOT / "data" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")))}
README = PAGES["README.md"]
JOBS = {"segmentation_train": "training", "segmentation_sample": "sampling", "segmentation_evaluate": "evaluation",
        "visdom_replay": "replay", "make_phantoms": "phantoms", "segmentation_export": "export"}
JOBS |= {f"cimd-{name}": job
         for name, job in zip(("train", "sample", "evaluate", "replay", "phantoms", "export"), JOBS.values())}

BLOCK = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^(?:python|torchrun|mpiexec|cimd-).*", re.MULTILINE)
OURS = re.compile(rf"(?:\bscripts/)?\b({'|'.join(JOBS)})(?:\.py)? ([^#]*)")
VARIABLES = dict(re.findall(r'^([A-Z]+_FLAGS)="(.*)"$', README, re.MULTILINE))
EXTENDING = "docs/extending.md"  # whose commands test_extending.py runs, with the files that they name
COMMANDS = [(page, *found.groups()) for page, text in PAGES.items() if page != EXTENDING
            for block in BLOCK.findall(text)
            for line in COMMAND.findall(block.replace("\\\n", "")) if (found := OURS.search(line))]


def anchors(text):
    """The anchors that GitHub gives the headings of a page."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE):
        words = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).strip().lower()  # of a link, its text
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found.append(anchor + f"-{found.count(anchor)}" * (anchor in found))
    return found


def flags_of(parser):
    return {option[2:].replace("-", "_") for action in parser._actions for option in action.option_strings
            if option.startswith("--")}


def known_flags():
    """Every flag of the commands, the benchmarks and torchrun, as their own code has it."""
    benchmarks = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
    return {"version", *flags_of(argparse.ArgumentParser()), *flags_of(create_argparser()),
            *flags_of(get_args_parser()), *(flag.name for flag in [*FLAGS, *SOURCES.flags()]),
            *re.findall(r'add_argument\("--(\w+)"', benchmarks), *re.findall(r'Flag\("(\w+)"', PAGES[EXTENDING])}


def test_readme_is_short():
    assert len(README.splitlines()) <= 130


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading(page):
    links = re.findall(r"\]\((?!https?://)(.*?)\)", BLOCK.sub("", PAGES[page]))
    broken = []
    for link in links:
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or anchor and anchor not in anchors(target.read_text(encoding="utf-8")):
            broken.append(link)
    assert not broken


def test_readme_leads_to_every_page():
    links = set(re.findall(r"\]\(([\w./-]+)\)", README))
    assert {page for page in PAGES if page not in ("README.md", "data/README.md")} <= links


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_of_a_page_exists(page):
    code = BLOCK.findall(PAGES[page]) + re.findall(r"`[^`]+`", BLOCK.sub("", PAGES[page]))
    named = {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", "\n".join(code))}
    assert named <= known_flags()


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_the_repository_that_a_page_names_exists(page):
    named = re.findall(r"`((?:tests|benchmarks|guided_diffusion|scripts|docs|data|\.ci)/[\w./-]+)`", PAGES[page])
    assert not [path for path in named if not (ROOT / path).exists()]


def test_the_pages_show_the_commands_that_these_tests_read():
    assert VARIABLES.keys() == {"MODEL_FLAGS", "DIFFUSION_FLAGS", "TRAIN_FLAGS"}
    assert {name for _, name, _ in COMMANDS} >= JOBS.keys() - {"visdom_replay", "make_phantoms", "segmentation_export"}


@pytest.mark.parametrize("page, name, flags", COMMANDS, ids=[f"{page}: {name}" for page, name, _ in COMMANDS])
def test_every_command_of_a_page_is_understood(page, name, flags):
    for variable, value in VARIABLES.items():
        flags = flags.replace(f"${variable}", value)
    words = [word for word in shlex.split(flags) if word != "..."]
    if JOBS[name] == "phantoms":
        create_argparser().parse_args(words)
    else:
        parse_flags(JOBS[name], "", words)


def test_moved_imports_are_where_the_changelog_says():
    moved = re.findall(r"^\| `(guided_diffusion\.[\w.]+)` \| `(guided_diffusion\.[\w.]+)`", PAGES["CHANGELOG.md"], re.M)
    assert len(moved) > 30
    for old, new in moved:
        pkgutil.resolve_name(new)
        with pytest.raises((ImportError, AttributeError)):
            pkgutil.resolve_name(old)


def test_changelog_and_citation_are_of_this_version():
    assert re.search(r"^## (\S+)", PAGES["CHANGELOG.md"], re.MULTILINE)[1] == __version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (\S+)$", citation, re.MULTILINE)[1] == __version__


def run_lines(code, names):
    """Execute Python with these names, as it stands; returns the values of its bare expressions, by their text."""
    values = {}
    for statement in ast.parse(code).body:
        if isinstance(statement, ast.Expr):
            values[ast.unparse(statement)] = eval(ast.unparse(statement), names)
        else:
            exec(ast.unparse(statement), names)
    return values


def test_the_python_of_the_readme_runs_as_it_stands_with_no_training(monkeypatch):
    code, = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(ROOT)
    names = {}
    run_lines(code, names)
    assert len(names["ensemble"]) == 16 and 0 < names["ensemble"].mean.max() <= 1


def test_the_first_python_of_its_page_runs_as_it_stands(trained, monkeypatch, tmp_path):
    code = re.search(r"^```python\n(.*?)^```$", PAGES["docs/python.md"], re.MULTILINE | re.DOTALL)[1]
    shutil.copytree(trained, tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    side = MODEL["image_size"]
    names = {"image": np.random.default_rng(0).integers(0, 256, (side, side), dtype=np.uint8)}
    values = run_lines(code, names)

    assert isinstance(names["segmenter"], Segmenter)
    masks = values["ensemble.masks"]
    assert masks.shape == (16, side, side) and masks.dtype == bool and 0 < masks.mean() < 1
    mean, std = values["(ensemble.mean, ensemble.std)"]
    assert mean.shape == std.shape == (side, side)
    assert np.array_equal(mean, masks.mean(0)) and np.array_equal(std, masks.std(0))
    lines = values["ensemble.outline_at(0.5)"]
    assert lines and all(line.ndim == 2 and line.shape[1] == 2 and -0.5 <= line.min() and line.max() <= side - 0.5
                         for line in lines)
    low, median, high = (names[name] for name in ("low", "median", "high"))
    assert 0 <= low <= median <= high <= side ** 2 and median == np.median(masks.sum((1, 2)))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(f"image_output{i}.png" for i in range(16)), "image_mean.png", "image_std.png", "image_montage.png",
        "image_ensemble.npz"}
    assert {path.name for path in tmp_path.iterdir()} == {"results", "out"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == {path.name for path in trained.iterdir()}
