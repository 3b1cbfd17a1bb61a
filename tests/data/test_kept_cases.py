"""Data sets too large for the memory are decoded once, into one file that all runs and processes share."""

import hashlib
import itertools
import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers.files import save
from helpers.pictures import SIZE, same
from PIL import Image

from guided_diffusion.data import cases as data_cases
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.decoded_file import DecodedFile
from guided_diffusion.data.stream import ShuffledCases
from guided_diffusion.system import terminal
from guided_diffusion.system.errors import InputError


@pytest.fixture
def decoded_names(monkeypatch):
    """The names of the cases that are decoded, one after another."""
    names, original = [], data_cases.read_case
    monkeypatch.setattr(data_cases, "read_case",
                        lambda files, **args: names.append(files.name) or original(files, **args))
    return names


SAMPLES = 6  # of 11 cases, decoded to learn how large they are


def left_behind(folder):
    return sorted(path.name for path in folder.iterdir()
                  if path.name.startswith(".decoded") and not path.name.endswith(".lock"))


def assert_same_cases(one, other):
    assert len(one) == len(other) and all(map(same, one, other))


def assert_same_batches(one, other, batch_size=4, count=12):
    one, other = (ShuffledCases(cases, seed=7).batches(batch_size, start=4) for cases in (one, other))
    for batch, expected in itertools.islice(zip(one, other), count):
        assert batch.image.dtype == expected.image.dtype and torch.equal(batch.image, expected.image)
        assert torch.equal(batch.masks, expected.masks) and torch.equal(batch.present, expected.present)
        assert (batch.places, batch.seed) == (expected.places, expected.seed)


@pytest.mark.parametrize("side, fit", [(SIZE, "error"), (SIZE - 1, "crop"), (SIZE + 3, "resize")])
def test_large_data_sets_give_the_same_items_and_stream_from_a_file(mixed, open_large, side, fit):
    small = SegmentationCases(mixed, side, fit=fit)
    assert small.kept == "in memory" and left_behind(mixed) == []
    for _ in range(2):  # written, and found again
        large = open_large(mixed, side, fit=fit)
        assert isinstance(large.decoded, DecodedFile) and large.kept == f"decoded in {mixed / f'.decoded_{side}_{fit}'}"
        assert_same_cases(large, small)
        assert_same_batches(large, small)
    assert left_behind(mixed) == [f".decoded_{side}_{fit}"]


def test_data_sets_up_to_the_limit_are_kept_in_memory(make_cases, tmp_path, monkeypatch):
    make_cases(tmp_path, 9, raters=3)
    needed = 9 * (SIZE ** 2 + 3 * SIZE ** 2 // 8)
    for limit, kept in ((needed, "in memory"), (needed - 1, f"decoded in {tmp_path}")):
        monkeypatch.setattr(data_cases, "MEMORY_BYTES", limit)
        assert SegmentationCases(tmp_path, SIZE).kept.startswith(kept)


@pytest.fixture
def bars(monkeypatch):
    """(what it says, cases counted) of every progress that is shown."""
    shown = []

    def record(iterable, desc, total, unit, enabled=True, leave=True):
        count = 0
        for count, item in enumerate(iterable, 1):
            yield item
        if enabled and total:
            shown.append((desc, count, total, unit))

    monkeypatch.setattr(data_cases, "progress", record)
    return shown


def test_checking_and_writing_the_file_show_how_far_they_are(make_cases, tmp_path, open_large, bars):
    make_cases(tmp_path, 9)
    SegmentationCases(tmp_path, SIZE)
    assert bars == []
    SegmentationCases(tmp_path, SIZE, progress=True)
    open_large(tmp_path, SIZE, progress=True)
    open_large(tmp_path, SIZE, progress=True)  # which finds the file
    assert bars == [(f"checking {tmp_path}", 9, 9, "case"),
                    (f"decoding into {tmp_path / f'.decoded_{SIZE}_error'}", 9, 9, "case")]


def test_long_checking_tells_every_case_in_the_end(make_cases, tmp_path, monkeypatch, capsys):
    make_cases(tmp_path, 5)
    monkeypatch.setattr(terminal, "FIRST", 0)
    SegmentationCases(tmp_path, SIZE, progress=True)
    assert f"checking {tmp_path}: 5 of 5 cases (100 %)" in capsys.readouterr().err


def test_cases_in_memory_need_their_files_no_more(mixed, open_large):
    small, large = SegmentationCases(mixed, SIZE), open_large(mixed, SIZE)
    expected = list(small)
    for case in mixed.glob("case*"):
        shutil.rmtree(case)
    assert_same_cases(expected, small)
    assert_same_cases(expected, large)


def test_a_second_opening_of_an_unchanged_folder_decodes_but_a_sample(mixed, open_large, decoded_names):
    open_large(mixed, SIZE)
    assert len(decoded_names) == SAMPLES + 11 and len(set(decoded_names)) == 11
    decoded_names.clear()
    cases = open_large(mixed, SIZE)
    assert len(decoded_names) <= SAMPLES
    decoded_names.clear()
    assert len(list(cases)) == 11 and decoded_names == []


def touch(path, nanoseconds=10 ** 6):
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + nanoseconds))


def repaint(path):
    """Other pixels in as many bytes."""
    before = path.stat()
    save(path, 255 - np.asarray(Image.open(path)), compress_level=0)
    assert path.stat().st_size == before.st_size
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 10 ** 6))


def lengthen(path):
    """More bytes, at the same time as before."""
    before = path.stat()
    path.write_bytes(path.read_bytes() + b"tail")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = {
    **{f"{change.__name__} {file}": lambda folder, change=change, file=file: change(folder / file)
       for change in (touch, repaint, lengthen)
       for file in ("case00/image_0.png", "case03/label2_.png", "case10/label0_.png")},
    "label added": lambda folder: shutil.copy2(folder / "case00/label0_.png", folder / "case00/label1_.png"),
    "label removed": lambda folder: (folder / "case03/label0_.png").unlink(),
    "label renamed": lambda folder: (folder / "case03/label0_.png").rename(folder / "case03/label8_.png"),
    "images added": lambda folder: [shutil.copy2(folder / "case00/image_0.png", folder / f"case00/image_{i}.png")
                                    for i in (1, 2, 3)],
    "case added": lambda folder: shutil.copytree(folder / "case05", folder / "case05b"),
    "case removed": lambda folder: shutil.rmtree(folder / "case07"),
    "case renamed": lambda folder: (folder / "case07").rename(folder / "case7"),
    "cases swapped": lambda folder: [(folder / a).rename(folder / b) for a, b in (
        ("case01", "case1"), ("case05", "case01"), ("case1", "case05"))],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_whatever_changes_in_the_folder_is_decoded_again(mixed, open_large, decoded_names, change):
    open_large(mixed, SIZE)
    change(mixed)
    decoded_names.clear()
    cases = open_large(mixed, SIZE)
    assert len(decoded_names) == len(cases.cases[::2]) + len(cases)
    assert_same_cases(cases, SegmentationCases(mixed, SIZE))
    decoded_names.clear()
    open_large(mixed, SIZE)
    assert len(decoded_names) <= SAMPLES


def test_other_settings_are_decoded_afresh(make_cases, tmp_path, open_large):
    make_cases(tmp_path, 10, raters=2, size=20)
    settings = dict(image_size=SIZE, image_channels=4, fit="crop", need_labels=True, limit=0)
    for name, value in (("limit", 0), ("limit", 9), ("image_size", 15), ("image_channels", 1), ("fit", "resize"),
                        ("limit", 0)):
        for changed in ({**settings, name: value}, settings):
            cases = open_large(tmp_path, **changed)
            assert isinstance(cases.decoded, DecodedFile)
            assert_same_cases(cases, SegmentationCases(tmp_path, **changed))


def test_runs_that_need_labels_and_those_that_do_not_share_one_file(make_cases, tmp_path, open_large, decoded_names):
    make_cases(tmp_path, 10, raters=2)
    for label in (tmp_path / "case4").glob("label*"):
        label.unlink()
    path = tmp_path / f".decoded_{SIZE}_error"
    with pytest.raises(InputError, match="case4: no labels"):
        open_large(tmp_path, SIZE)
    assert [len(case.raters) for case in open_large(tmp_path, SIZE, need_labels=False)] == [2] * 4 + [0] + [2] * 5
    whole = path.read_bytes()
    decoded_names.clear()
    with pytest.raises(InputError, match="^[^\\n]*case4: no labels[^\\n]*$"):
        open_large(tmp_path, SIZE)
    scored = open_large(tmp_path, SIZE, skip_bad=True)
    assert list(scored.problems) == [4] and len(list(scored.readable(range(10)))) == 9
    assert len(decoded_names) == 2 * 5 and path.read_bytes() == whole  # the samples that tell how large cases are
    shutil.rmtree(tmp_path / "case4")
    open_large(tmp_path, SIZE)
    decoded_names.clear()
    assert len(open_large(tmp_path, SIZE, need_labels=False)) == 9 and len(decoded_names) == 5


def test_a_file_cut_off_or_of_rubbish_is_written_again(mixed, open_large):
    small = SegmentationCases(mixed, SIZE)
    open_large(mixed, SIZE)
    path, rng = mixed / f".decoded_{SIZE}_error", random.Random(1)
    whole = path.read_bytes()
    damaged = [whole[:n] for n in (0, 1, 15, 16, 17, len(whole) - 17, len(whole) - 16, len(whole) - 8, len(whole) - 1)]
    damaged += [whole[:rng.randrange(len(whole))] for _ in range(8)]
    damaged += [rng.randbytes(len(whole)), bytes(len(whole)), whole + b"x", whole[:-9] + b"\xff" + whole[-8:],
                b"{}" + (2).to_bytes(8, "little") + whole[-8:], b"\xff" + (1).to_bytes(8, "little") + whole[-8:]]
    for data in damaged:
        path.write_bytes(data)
        cases = open_large(mixed, SIZE)
        assert path.read_bytes() == whole and isinstance(cases.decoded, DecodedFile)
        assert_same_cases(cases, small)


@pytest.mark.parametrize("suffix", ["", ".lock"])
def test_where_no_file_can_be_written_each_visit_decodes(mixed, open_large, decoded_names, suffix):
    small = SegmentationCases(mixed, SIZE)
    (mixed / f".decoded_{SIZE}_error{suffix}").mkdir()
    cases = open_large(mixed, SIZE)
    assert cases.decoded is None and "\n" not in cases.kept
    assert "decoded at every visit" in cases.kept and str(mixed / f".decoded_{SIZE}_error") in cases.kept
    assert "directory" in cases.kept  # why
    assert_same_cases(cases, small)
    assert_same_batches(cases, small)
    decoded_names.clear()
    for _ in range(3):
        assert cases[2].name == "case02"
    assert decoded_names == ["case02"] * 3
    assert not list(mixed.glob(".*.part"))
    (mixed / "case03" / "image_0.png").unlink()
    with pytest.raises(InputError, match="case03"):
        open_large(mixed, SIZE)


def test_a_bad_picture_among_good_ones_leaves_no_file_and_each_is_named(mixed, open_large):
    bad = [mixed / "case03" / "image_0.png", mixed / "case04" / "label1_.png", mixed / "case10" / "image_0.png"]
    for path in bad:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError) as caught:
        open_large(mixed, SIZE)
    first, *lines = str(caught.value).split("\n")
    assert first == f"3 problems in {mixed}:" and len(lines) == 3
    assert all(line.strip().startswith(f"{path}: cannot be read") for line, path in zip(lines, bad))
    assert left_behind(mixed) == []


OPEN = """
import hashlib, sys
from guided_diffusion.data import cases as data_cases

reads, original = [], data_cases.read_case
data_cases.read_case = lambda *args, **named: reads.append(1) or original(*args, **named)
data_cases.MEMORY_BYTES = 0
print("ready", flush=True)
sys.stdin.readline()
cases = data_cases.SegmentationCases(sys.argv[1], int(sys.argv[2]))
digest = hashlib.sha256()
for case in cases:
    digest.update(case.name.encode() + case.image.tobytes() + case.raters.tobytes())
print(len(reads), digest.hexdigest(), cases.kept)
"""

def test_processes_that_open_one_folder_at_once_share_one_file(mixed, environment):
    digest = hashlib.sha256()
    for case in SegmentationCases(mixed, SIZE):
        digest.update(case.name.encode() + case.image.tobytes() + case.raters.tobytes())
    workers = [subprocess.Popen([sys.executable, "-c", OPEN, str(mixed), str(SIZE)], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 3
    for worker in workers:
        worker.stdin.write("\n")
        worker.stdin.flush()
    answers = [worker.communicate(timeout=120)[0].split(maxsplit=2) for worker in workers]
    assert all(answer[1:] == [digest.hexdigest(), f"decoded in {mixed / f'.decoded_{SIZE}_error'}\n"]
               for answer in answers)
    assert sorted(int(reads) for reads, *_ in answers) == [SAMPLES, SAMPLES, SAMPLES + 11]  # one of them wrote it
    assert left_behind(mixed) == [f".decoded_{SIZE}_error"]


def test_nothing_written_to_an_item_reaches_the_file(mixed, open_large):
    cases, expected = open_large(mixed, SIZE), list(SegmentationCases(mixed, SIZE))
    whole = (mixed / f".decoded_{SIZE}_error").read_bytes()
    for part in cases.compact(3):
        with pytest.raises(ValueError, match="read-only"):
            part[...] = 1
    case = cases[3]
    case.image[...] = 0.5
    case.raters[...] = True
    for tensor in next(ShuffledCases(cases).batches(11))[:2]:
        tensor.zero_()
    assert_same_cases(cases, expected)
    assert (mixed / f".decoded_{SIZE}_error").read_bytes() == whole
