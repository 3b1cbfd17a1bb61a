"""Records come back from a file as they went in, or not at all."""

import select
import subprocess
import sys

import numpy as np
import pytest

from guided_diffusion.data import decoded_file
from guided_diffusion.data.decoded_file import DecodedFile


def random_records(count=20, seed=0, largest=9):
    """Images of both dtypes, odd sides, 1 to 4 channels; packed masks of 0 to 5 raters; sizes of scans."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        dtype, (height, width) = rng.choice([np.uint8, np.uint16]), rng.integers(1, largest, 2)
        image = rng.integers(0, np.iinfo(dtype).max, (rng.integers(1, 5), height, width), dtype, endpoint=True)
        masks = rng.random((rng.integers(0, 6), height * width)) < 0.5
        yield image, np.packbits(masks, axis=1), tuple(rng.integers(1, 1000, 2).tolist())


def assert_holds(file, records):
    records = list(records)
    assert len(file) == len(records)
    for got, expected in zip(file, records):
        assert got[2] == expected[2]
        for part, other in zip(got[:2], expected):
            assert part.dtype == other.dtype and part.shape == other.shape and np.array_equal(part, other)


@pytest.mark.parametrize("seed", range(5))
def test_records_come_back_as_they_were_written(tmp_path, seed):
    decoded_file.write(tmp_path / "a", "key", random_records(seed=seed))
    file = DecodedFile(tmp_path / "a", "key")
    assert_holds(file, random_records(seed=seed))
    assert 0 in {len(masks) for _, masks, _ in file} and {image.itemsize for image, *_ in file} == {1, 2}
    assert all(image.flags.aligned for image, *_ in file)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_no_records_are_a_file_too(tmp_path):
    decoded_file.write(tmp_path / "a", "key", [])
    assert len(DecodedFile(tmp_path / "a", "key")) == 0


def test_records_are_read_only(tmp_path):
    decoded_file.write(tmp_path / "a", "key", random_records())
    for part in DecodedFile(tmp_path / "a", "key")[0][:2]:
        with pytest.raises(ValueError, match="read-only"):
            part[...] = 0


def test_another_key_or_no_file_is_refused(tmp_path):
    decoded_file.write(tmp_path / "a", "key", random_records())
    for path, key in (("a", "kez"), ("a", ""), ("b", "key"), (".", "key")):
        with pytest.raises(OSError):
            DecodedFile(tmp_path / path, key)


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    path = tmp_path / "a"
    decoded_file.write(path, "key", random_records(count=4, largest=5))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises((OSError, ValueError, KeyError)):
            DecodedFile(path, "key")
    path.write_bytes(whole)
    assert_holds(DecodedFile(path, "key"), random_records(count=4, largest=5))


def test_a_failed_write_leaves_what_was_there(tmp_path):
    def failing():
        yield from random_records(count=5)
        raise RuntimeError("bad record")

    for before in (set(), {"a"}):
        assert {path.name for path in tmp_path.iterdir()} == before
        with pytest.raises(RuntimeError, match="bad record"):
            decoded_file.write(tmp_path / "a", "new", failing())
        assert {path.name for path in tmp_path.iterdir()} == before
        decoded_file.write(tmp_path / "a", "old", random_records(seed=3))
    assert_holds(DecodedFile(tmp_path / "a", "old"), random_records(seed=3))


def test_an_open_file_keeps_its_records_when_another_takes_its_place(tmp_path):
    decoded_file.write(tmp_path / "a", "old", random_records(seed=1))
    old = DecodedFile(tmp_path / "a", "old")
    decoded_file.write(tmp_path / "a", "new", random_records(seed=2))
    assert_holds(old, random_records(seed=1))
    assert_holds(DecodedFile(tmp_path / "a", "new"), random_records(seed=2))


LOCK = """
import sys
from guided_diffusion.data import decoded_file

print("ready", flush=True)
with decoded_file.locked(sys.argv[1]):
    print("inside", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def locking(environment, tmp_path):
    """A maker of processes that lock tmp_path/<name> until they get a line; they are ready when it returns."""
    started = []

    def start(name):
        process = subprocess.Popen([sys.executable, "-c", LOCK, str(tmp_path / name)], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, env=environment)
        started.append(process)
        assert process.stdout.readline() == b"ready\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_waits_for_the_lock(locking, tmp_path):
    with decoded_file.locked(tmp_path / "a"):
        second, elsewhere = locking("a"), locking("b")
        assert elsewhere.stdout.readline() == b"inside\n"  # by then the second one has tried too
        assert select.select([second.stdout], [], [], 0.3)[0] == []  # it says nothing
    assert second.stdout.readline() == b"inside\n"


def test_a_killed_process_holds_no_lock(locking, tmp_path):
    first = locking("a")
    assert first.stdout.readline() == b"inside\n"
    first.kill()
    first.wait()
    with decoded_file.locked(tmp_path / "a"):
        pass
