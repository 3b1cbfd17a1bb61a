"""Whatever is in a file, on the command line or in a pattern: it is taken, or an InputError says what is wrong."""

import io
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import pick
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from guided_diffusion.commands.cli import JOBS, parse_flags
from guided_diffusion.data.case_files import find_cases
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.flags import FLAGS
from guided_diffusion.networks import NETWORKS
from guided_diffusion.scoring.ensemble_folder import EnsembleFolder, read_scored_case
from guided_diffusion.script_util import create_encoders, create_gaussian_diffusion
from guided_diffusion.system.errors import InputError

SIZE = 16
fuzz = settings(max_examples=200, deadline=None, derandomize=True, database=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def encoded(format, pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010e] = 1, "a scan"
GREY = np.arange(SIZE * SIZE, dtype=np.uint8).reshape(SIZE, SIZE)
VALID = [encoded("PNG", GREY), encoded("PNG", GREY > 99), encoded("PNG", np.stack([GREY] * 4, -1), exif=EXIF),
         encoded("PNG", GREY, save_all=True, append_images=[Image.fromarray(GREY)]),
         encoded("JPEG", GREY, exif=EXIF, dpi=(72, 72)), encoded("JPEG", np.stack([GREY] * 3, -1), progressive=True)]
MAGIC = [data[:12] for data in VALID[::4]] + [b"GIF89a", b"II*\0", b"RIFF\0\0\0\0WEBP", b"\0" * 128 + b"DICM", b"BM"]


@st.composite
def mutated(draw):
    """A valid picture with some bytes replaced, taken out, put in, or cut off."""
    data = bytearray(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 4))):
        place, length = draw(st.integers(0, len(data))), draw(st.sampled_from([0, 1, 1, 4, 40, 10 ** 6]))
        data[place:place + length] = draw(st.binary(max_size=4) if length < 9 else st.just(b""))
    return bytes(data)


@pytest.fixture
def folder(make_cases, tmp_path):
    return make_cases(tmp_path / "data", 1)


# ---- files ----

@pytest.mark.filterwarnings("error", "ignore::UserWarning:PIL")  # as datasets has it, which pytest forgets
@pytest.mark.parametrize("name", ["image_0.png", "label1_.png"])
@fuzz
@given(data=mutated() | st.builds(bytes.__add__, st.sampled_from([b"", *MAGIC]), st.binary(max_size=60)))
def test_any_bytes_are_read_or_refused_by_name(folder, name, data):
    path = folder / "case0" / name
    path.write_bytes(data)
    try:
        case = SegmentationCases(folder, SIZE)[0]
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and len(str(error)) < len(str(path)) + 300
        assert str(error).isprintable()
    else:
        assert case.image.shape == (4, SIZE, SIZE) and case.raters.shape == (2, SIZE, SIZE)
        assert np.isfinite(case.image).all()


names = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="/\0"), min_size=1, max_size=12).filter(
    lambda name: name not in (".", "..")) | st.sampled_from(
    ["image_0.png", "label0_.png", "label٣_.png", "label²_.png", ".hidden", "a\nb", "-x", "Label1_.PNG", "image.jpg",
     os.fsdecode(b"label0_\xe9.png")])


@fuzz
@given(paths=st.lists(st.lists(names, min_size=1, max_size=3), max_size=6))
def test_any_names_of_files_and_folders_make_cases_or_are_refused(tmp_path, paths):
    root = tmp_path / "data"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path in paths:
        *folders, name = path
        try:
            root.joinpath(*folders).mkdir(parents=True, exist_ok=True)
            root.joinpath(*path).write_bytes(VALID[0])
        except OSError:  # a file where a folder should be, or the other way round
            continue
    try:
        cases = SegmentationCases(root, SIZE, need_labels=False).cases
    except InputError as error:
        assert all(str(root) in line for line in str(error).split("\n"))
        assert not re.search(r"[\0-\x09\x0b-\x1f\x7f-\x9f]", str(error))
    else:
        for case in cases:
            assert not re.search(r"[\0-\x1f/]", case.name) and case.name not in ("", ".", "..")
            assert os.path.basename(os.path.normpath(tmp_path / f"{case.name}_output0.png")).startswith(case.name)
        assert len({case.name for case in cases}) == len(cases)


# ---- the command line ----

values = st.one_of(
    st.sampled_from(["", "nan", "inf", "-inf", "-1", "0", "1", "1e400", "-0.0", "True", "auto", "٣", "1_0", "best",
                     "--", "9" * 400, "9" * 5000, "1,2,3", ",", "nan,1", "1," * 50, "{case}", "../..", "a" * 10 ** 5]),
    st.integers().map(str), st.floats().map(str), st.text(max_size=8), st.booleans().map(str))


@st.composite
def argv(draw, job):
    """A command line of real flags, some twice, some unknown, with values of every kind."""
    known = st.sampled_from([flag.name for flag in FLAGS if flag.group in JOBS[job]])
    words = []
    for _ in range(draw(st.integers(0, 4))):
        name = draw(st.one_of(known, known, known, st.text(max_size=6)))
        words += draw(st.sampled_from([["--" + name, draw(values)], [f"--{name}={draw(values)}"], ["--" + name]]))
    return words


@pytest.mark.parametrize("job", JOBS)
@fuzz
@given(data=st.data())
def test_any_command_line_is_parsed_or_refused(job, data):
    words = data.draw(argv(job))
    try:
        args, given_flags = parse_flags(job, "", words)
    except InputError as error:
        assert str(error)
    except SystemExit as stop:  # for help
        assert stop.code == 0 and any(word.startswith(("-h", "--help")) for word in words)
    else:
        assert set(given_flags) <= set(vars(args))
        for flag in FLAGS:
            if flag.group in JOBS[job] and isinstance(getattr(args, flag.name), (int, float)):
                assert abs(getattr(args, flag.name)) <= sys.maxsize  # nor is it nan
                assert flag.least is None or getattr(args, flag.name) >= flag.least


@settings(fuzz, max_examples=80)
@given(words=argv("training"))
@example(words=["--channel_mult", "nan,1"])
@example(words=["--channel_mult", "1,inf"])
@example(words=["--channel_mult", "1,1,1,1e300"])
@example(words=["--num_filters", "1,-1"])
@example(words=["--use_fp16", "True", "--fp16_scale_growth", "-1"])
@example(words=["--use_fp16", "True", "--fp16_scale_growth", "1e9"])
@example(words=["--diffusion_steps", "99999999999"])
def test_what_parses_builds_what_it_describes_or_is_refused(words):
    try:
        args, _ = parse_flags("training", "", words)
        if any(len(str(getattr(args, name))) > 24 for name in ("num_filters", "channel_mult")) or \
                args.num_res_blocks > 4 or args.no_convs_per_block > 4:
            return  # would only take long
        with torch.device("meta"):  # shapes without memory
            NETWORKS[args.network](args, 1, 2 if args.learn_sigma else 1)
            create_encoders(**pick(args, "encoders"), image_channels=args.image_channels)
        create_gaussian_diffusion(**pick(args, "diffusion"))
        torch.amp.GradScaler("cpu", growth_factor=2.0 ** args.fp16_scale_growth)
    except (InputError, SystemExit) as error:
        assert str(error)


# ---- patterns ----

@pytest.fixture(scope="module")
def opened():
    """The paths that are opened or listed, one after another; clear it before a look."""
    paths, here = [], sys.modules[__name__]
    here.watching = True

    def hook(event, args):
        if here.watching and event in ("open", "os.listdir", "os.scandir"):
            paths.append(args[0])

    sys.addaudithook(hook)  # for good, so that it must do nothing afterwards
    yield paths
    here.watching = False


pieces = st.sampled_from(["{case}", "{i}", "{i:03d}", "/", "..", ".", "_", ".png", "*", "[", "(", "\\", "{{", "{",
                          "{case:>99999999999}", "{i:9999999999}", "{i!r}", "{case.__class__}", "{}", "x" * 300, "\0"])
patterns = st.lists(pieces | st.text(max_size=3), max_size=7).map("".join) | st.builds(
    "{}{{case}}{}{{i{}}}{}".format, pieces, pieces, st.sampled_from(["", ":03d", ":2", ":>3", ":,", ":x"]), pieces)


@fuzz
@given(pattern=patterns, skip=st.booleans(),
       files=st.lists(st.tuples(names, st.sampled_from([*VALID, b"", b"x"])), max_size=3))
@example(pattern="{case}_{i}.png", files=[], skip=True)
@example(pattern="../{case}_{i}.png", files=[], skip=True)
@example(pattern="/etc/{case}_{i}.png", files=[], skip=True)
@example(pattern="{case}/../../{case}_{i}.png", files=[], skip=True)
@example(pattern="{case:>99999999999}_{i}.png", files=[], skip=True)
def test_any_pattern_finds_masks_below_its_folder_or_is_refused(folder, tmp_path, opened, pattern, files, skip):
    masks, case = tmp_path / "masks", find_cases(folder)[0]
    shutil.rmtree(masks, ignore_errors=True)
    masks.mkdir()
    for name, data in [*files, *((name, VALID[1]) for name in ("case0_1.png", "case0_2.png", "1case0", "case0..1"))]:
        masks.joinpath(name).write_bytes(data)
    (tmp_path / "case0_1.png").write_bytes(VALID[1])  # what no pattern must reach
    opened.clear()
    try:
        members = EnsembleFolder(masks, pattern).find([case.name], skip)
        read_scored_case(case, members[case.name], "error")
    except InputError as error:
        assert len(str(error)) < 3000
    allowed = masks, folder, Path(np.__file__).parents[1]  # the last for modules that are imported when they are used
    assert [path for path in map(os.path.abspath, opened) if not any(map(Path(path).is_relative_to, allowed))] == []
