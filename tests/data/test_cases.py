"""What is wrong with the cases of a folder is said at once, file by file, and batches of them are their items."""

import itertools
import random
import threading

import numpy as np
import pytest
import torch
from helpers.files import save
from helpers.pictures import SIZE, as_label
from helpers.refusals import problems_of

from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.stream import ShuffledCases, to_floats
from guided_diffusion.system import errors
from guided_diffusion.system.errors import InputError


def test_labels_are_optional_only_where_they_are_not_needed(make_cases, tmp_path):
    make_cases(tmp_path, 2, raters=[0, 2])
    cases = SegmentationCases(tmp_path, SIZE, need_labels=False)
    assert [case.raters.shape for case in cases] == [(0, SIZE, SIZE), (2, SIZE, SIZE)]
    message = problems_of(tmp_path, SIZE)
    assert "case0" in message and "no labels" in message and "case1" not in message


def test_limit_takes_the_first_cases_and_looks_at_no_others(make_cases, tmp_path):
    make_cases(tmp_path, 3)
    (tmp_path / "case2" / "image_2.png").write_bytes(b"")
    assert [case.name for case in SegmentationCases(tmp_path, SIZE, limit=2)] == ["case0", "case1"]


def test_data_dir_that_is_missing_empty_or_itself_a_case_is_refused(make_cases, tmp_path):
    assert "no such folder" in problems_of(tmp_path / "nowhere", SIZE)
    (tmp_path / "empty").mkdir()
    assert "holds no case" in problems_of(tmp_path / "empty", SIZE)
    make_cases(tmp_path / "data", 1)
    assert "each case is a folder" in problems_of(tmp_path / "data" / "case0", SIZE)
    (tmp_path / "file").write_text("")
    assert "no such folder" in problems_of(tmp_path / "file", SIZE)


def test_every_problem_is_reported_at_once_file_by_file(make_cases, tmp_path, grey):
    make_cases(tmp_path, 6, suffix=".jpg")
    truncated = tmp_path / "case0" / "image_0.jpg"
    truncated.write_bytes(truncated.read_bytes()[:200])
    save(tmp_path / "case1" / "label1_.jpg", as_label(grey[:8] > 60))
    (tmp_path / "case2" / "image_2.jpg").unlink()
    for label in (tmp_path / "case3").glob("label*"):
        label.unlink()
    save(tmp_path / "case4" / "image_4.jpg", np.zeros((24, 32), np.uint8))
    for label in (tmp_path / "case4").glob("label*"):
        save(label, np.zeros((24, 32), np.uint8))
    first, *lines = problems_of(tmp_path, SIZE).split("\n")
    assert first == f"5 problems in {tmp_path}:"
    expected = [(truncated, "cannot be read"), (tmp_path / "case1" / "label1_.jpg", "16 x 8 pixels"),
                (tmp_path / "case2", "no image"), (tmp_path / "case3", "no labels"),
                (tmp_path / "case4" / "image_4.jpg", "is 32 x 24 pixels, but --image_size is 16")]
    assert len(lines) == len(expected)
    for line, (path, reason) in zip(lines, expected):
        assert line.strip().startswith(f"{path}:") and reason in line
    assert "--fit resize" in lines[4] and "--fit crop" in lines[4]


def test_a_flood_of_problems_is_cut_and_counted(make_cases, tmp_path, monkeypatch):
    monkeypatch.setattr(errors, "MAX_PROBLEMS_SHOWN", 3)
    make_cases(tmp_path, 8, raters=0)
    first, *lines = problems_of(tmp_path, SIZE).split("\n")
    assert first.startswith("8 problems") and len(lines) == 4 and lines[-1].strip() == "... and 5 more"


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_damaged_pictures_are_named_never_a_traceback(make_cases, tmp_path, suffix):
    make_cases(tmp_path, 1, suffix=suffix)
    path = tmp_path / "case0" / f"image_0{suffix}"
    whole, rng = path.read_bytes(), random.Random(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] = rng.randrange(256)
        path.write_bytes(damaged[:rng.choice([len(whole), rng.randrange(len(whole))])])
        try:
            SegmentationCases(tmp_path, SIZE)
        except InputError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused > 50


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 11])
def test_batches_as_floats_are_the_items(mixed, open_large, large, batch_size):
    cases = (open_large if large else SegmentationCases)(mixed, SIZE)
    by_image = {np.round(case.image * 65535).astype(np.uint16).tobytes(): case for case in cases}
    kinds, seen = set(), set()
    for batch in itertools.islice(ShuffledCases(cases, 2).batches(batch_size), 33 // batch_size):
        kinds.add((batch.image.dtype, batch.image.shape[1]))
        floats = to_floats(batch, 4, torch.device("cpu"))
        assert floats.image.dtype == floats.masks.dtype == torch.float32 and batch.masks.dtype == torch.uint8
        assert floats.image.shape == (batch_size, 4, SIZE, SIZE)
        for image, masks, present in zip(floats.image, floats.masks, floats.present):
            case = by_image[(image * 65535).round().numpy().astype(np.uint16).tobytes()]
            np.testing.assert_allclose(image, case.image, atol=1e-6)
            assert present.tolist() == [rater < len(case.raters) for rater in range(len(masks))]
            assert np.array_equal(masks[present], case.raters) and not masks[~present].any()
            seen.add(case.name)
    assert len(seen) == 11 and len(kinds) == {1: 4, 2: len(kinds), 11: 1}[batch_size]
    assert (torch.uint16, 4) in kinds


def test_training_batches_end_their_threads_when_closed(mixed):
    before = set(threading.enumerate())
    batches = ShuffledCases(SegmentationCases(mixed, SIZE)).batches(2)
    next(batches)
    batches.close()
    assert set(threading.enumerate()) <= before
