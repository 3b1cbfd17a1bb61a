"""Ranks that open a folder together ask the file system as much as one process would, and hold the same cases."""

import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.operations import count_operations
from helpers.pictures import SIZE
from helpers.processes import PATIENCE, free_port

from guided_diffusion import checkpoint
from guided_diffusion.data.case_files import CaseFiles, find_cases, from_words, to_words
from guided_diffusion.data.cases import SegmentationCases

FEW, MANY = 16, 32

OPEN = """import os, sys
""" + inspect.getsource(count_operations) + """
import torch
from guided_diffusion import checkpoint, dist_util
from guided_diffusion.data import cases as data_cases, decoded_file
from guided_diffusion.system.errors import InputError

base, few, many, size = sys.argv[1], *map(int, sys.argv[2:])
seen = count_operations(base)
dist_util.setup_dist()
rank, said = dist_util.rank(), {}
reads, read_case = [], data_cases.read_case
data_cases.read_case = lambda *args, **named: reads.append(1) or read_case(*args, **named)

def opened(folder, **options):
    seen.clear(), reads.clear()
    cases = data_cases.SegmentationCases(f"{base}/{folder}", size, together=True, **options)
    return cases, len(seen), len(reads)

def contents(cases):
    return [[*map(torch.from_numpy, cases.compact(i))] for i in range(len(cases))]

def refused(folder, **options):
    try:
        opened(folder, **options)
    except InputError as error:
        return str(error)

for large, limit in (("in memory", 1 << 30), ("written", 0), ("found", 0)):
    data_cases.MEMORY_BYTES, data_cases.SHARE = limit, 3
    said[large] = [opened(folder)[1:] for folder in (few, many)]
    cases = opened("uneven")[0]
    said[large] += [cases.kept, contents(cases), [case.name for case in cases]]

os.environ["LOCAL_RANK"] = "0"  # as on two machines
cases, _, said["decoded by a machine"] = opened("other", cache_dir=f"{base}/disk{rank}")
said["cached"] = cases.kept, os.listdir(f"{base}/disk{rank}"), contents(cases), opened(
    "other", cache_dir=f"{base}/disk{rank}")[2]
write = decoded_file.write
def full(path, key, records):
    next(records)
    raise OSError(28, "No space left on device")
decoded_file.write = full
cases = opened("full")[0]
said["full"] = cases.kept, contents(cases)
data_cases.MEMORY_BYTES = 1 << 30
cases = opened("bad", skip_bad=True)[0]
said["bad"] = cases.problems, refused("bad")
said["empty"] = refused("empty")
os.chdir(f"{base}/machine{rank}")
base = "."
said["unlike"] = [refused(folder) for folder in ("contents", "entries", "missing")]
checkpoint.save(f"{sys.argv[1]}.rank{rank}", said)
dist_util.cleanup()
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("together") / "data"


@pytest.fixture
def ranks(data, make_cases, environment):
    """What both ranks have seen; run once."""
    if not data.exists():
        for name, count, seed in ((FEW, FEW, 0), (MANY, MANY, 0), ("uneven", 7, 0), ("other", 7, 1), ("full", 3, 1),
                                  ("bad", 5, 0),
                                  ("machine0/contents", 3, 0), ("machine1/contents", 3, 1), ("machine0/entries", 3, 0),
                                  ("machine1/entries", 2, 0), ("machine0/missing", 2, 0)):
            make_cases(data / str(name), count, seed=seed)
        (data / "bad" / "case3" / "label1_.png").write_bytes(b"no picture")
        for name in ("disk0", "disk1", "empty"):
            (data / name).mkdir()
        env = {**environment, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        words = [sys.executable, "-c", OPEN, str(data), *map(str, (FEW, MANY, SIZE))]
        started = [subprocess.Popen(words, stderr=subprocess.PIPE, text=True,
                                    env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
        errors = [process.communicate(timeout=PATIENCE)[1] for process in started]
        assert [process.returncode for process in started] == [0, 0], errors
    return [checkpoint.load(f"{data}.rank{rank}") for rank in range(2)]


def test_operations_are_linear_in_cases_not_in_cases_times_ranks(ranks, data, monkeypatch):
    for name in ("stat", "lstat", "readlink"):
        monkeypatch.setattr(os, name, getattr(os, name))  # which puts them back at the end
    seen, alone = count_operations(str(data)), []
    for count in (FEW, MANY):
        seen.clear()
        SegmentationCases(data / str(count), SIZE)
        alone.append(len(seen))
    slope = alone[1] - alone[0]
    assert slope >= 4 * (MANY - FEW)  # the folder and three files of each
    for kind in ("in memory", "written"):
        few, many = ([sum(numbers) for numbers in zip(*(seen[kind][i] for seen in ranks))] for i in range(2))
        sizes = (MANY - FEW) * 3 * (kind == "written")  # whose file goes by the size and time of each file
        assert many[0] - few[0] == slope + sizes
        assert many[1] - few[1] == MANY - FEW  # each case is decoded once


def test_all_ranks_hold_the_cases_of_one_process_whether_in_memory_or_in_a_file(ranks, data):
    alone = SegmentationCases(data / "uneven", SIZE)
    for seen in ranks:
        for kind, kept in (("in memory", "in memory"), ("written", "decoded in "), ("found", "decoded in ")):
            *_, where, contents, names = seen[kind]
            assert where.startswith(kept) and names == [f"case{i}" for i in range(7)]
            assert_contents(contents, alone)
        assert seen["found"][1][1] == 8  # the sample that every rank decodes at each opening


def assert_contents(contents, cases):
    assert len(contents) == len(cases)
    for i, parts in enumerate(contents):
        assert all(np.array_equal(part.numpy(), kept) for part, kept in zip(parts, cases.compact(i)))


def test_with_a_cache_each_machine_writes_a_file_of_its_own_and_finds_it_again(ranks, data):
    for rank, seen in enumerate(ranks):
        kept, names, contents, again = seen["cached"]
        file, = [name for name in names if not name.endswith(".lock")]
        assert kept == f"decoded in {data}/disk{rank}/{file}" and file.startswith(f"decoded_{SIZE}_error_")
        assert_contents(contents, SegmentationCases(data / "other", SIZE))
        assert again == 7  # the samples alone


def test_a_disk_that_is_full_leaves_all_ranks_with_cases_decoded_at_every_visit(ranks, data):
    for seen in ranks:
        kept, contents = seen["full"]
        assert kept == (f"decoded at every visit: {data}/full/.decoded_{SIZE}_error cannot be written (No space left on"
                        f" device)")
        assert_contents(contents, SegmentationCases(data / "full", SIZE))


def test_a_listing_leads_to_the_same_files_below_the_folder_of_another_machine(make_cases, tmp_path):
    here, there = (make_cases(tmp_path / name / "data") for name in ("here", "there"))
    assert from_words(to_words(find_cases(here), here), there) == find_cases(there)
    files = tuple(here / "ct" / f"{i}.dcm" for i in range(3))
    ct = CaseFiles("ct_001", here / "ct", [files[1]], [], "ct", 1, files, "no pixels")
    assert from_words(to_words([ct], here), here) == [ct]


def test_what_is_wrong_with_a_case_or_a_folder_is_said_by_all_ranks(ranks, data):
    for seen in ranks:
        problems, refusal = seen["bad"]
        assert list(problems) == [3] and "case3/label1_.png: cannot be read" in problems[3] and problems[3] == refusal
        contents, entries, missing = seen["unlike"]
        assert "contents of cases (" in contents and contents.endswith("must hold the same for every process")
        assert "number of entries (3 on rank 0, 2 on rank 1)" in entries
        assert missing == "on rank 1: --data_dir ./missing: no such folder"
        assert seen["empty"].startswith(f"--data_dir {data}/empty: holds no case")
