"""NIfTI: each axial slice is a case, whatever the axes of the file."""

import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.refusals import refusal

from guided_diffusion.data.case_files import find_cases, read_case
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.readers import nifti
from guided_diffusion.data.readers.base import Readers

nibabel = pytest.importorskip("nibabel")
SCAN = np.random.default_rng(0).integers(0, 256, (3, 5, 4)).astype(np.uint8)  # slices, rows, columns as shown


def save(path, shown, order=(0, 1, 2), flips=(1, 1, 1), spacing=(2.0, 0.5, 0.7)):
    """Write slices [D, H, W, ...], as they are shown, to a file whose axes are in this order, some against it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([-spacing[2], -spacing[1], spacing[0], 1.0])  # of (column, row, slice): left, back, up
    affine[:3, 3] = 10, 20, 30
    numbers = shown.transpose(2, 1, 0, *range(3, shown.ndim))
    turn = np.array([[order.index(i), flips[order.index(i)]] for i in range(3)])
    own = nibabel.orientations.apply_orientation(numbers, turn)
    affine = affine @ nibabel.orientations.inv_ornt_aff(turn, numbers.shape[:3])
    nibabel.save(nibabel.Nifti1Image(own, affine), path)
    return path


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_slices_are_axial_whatever_the_axes_and_lead_back(tmp_path, order):
    for flips in itertools.product((1, -1), repeat=3):
        path = save(tmp_path / "a.nii", SCAN, order, flips)
        readers = Readers()
        assert readers.slices(path) == 3
        scans = [readers.read(path, i) for i in range(3)]
        assert np.array_equal(np.concatenate([scan.pixels for scan in scans]), SCAN)
        assert scans[2].spacing == pytest.approx((0.5, 0.7)) and scans[2].info["slice"] == 2
        assert scans[0].info["slice_spacing"] == pytest.approx(2)
        back = nifti.to_file_axes(SCAN[..., None], scans[1].info)
        assert np.array_equal(back[..., 0], np.asanyarray(nibabel.load(path).dataobj))


def test_volumes_and_raters_of_a_case_folder_become_cases(tmp_path):
    label = np.random.default_rng(1).integers(0, 3, SCAN.shape).astype(np.int16)
    for name in ("flair", "t1"):
        save(tmp_path / "p1" / f"image_{name}.nii.gz", SCAN if name == "t1" else 255 - SCAN)
    save(tmp_path / "p1" / "label0_.nii.gz", label, (2, 0, 1), (-1, 1, 1))
    save(tmp_path / "p1" / "label1_.nii.gz", label * 0)
    cases = SegmentationCases(tmp_path, 4, 2, fit="crop")
    assert [case.name for case in cases] == ["p1_000", "p1_001", "p1_002"]
    for i, files in enumerate(cases.cases):
        found = read_case(files, readers=Readers())
        assert np.array_equal(found.image, [255 - SCAN[i], SCAN[i]])
        assert np.array_equal(found.raters, [label[i] > 0, label[i] < 0])
        assert found.info["volume"] == "p1" and found.info["slice"] == i
    assert np.array_equal(read_case(cases.cases[1], readers=Readers({"foreground": "2"})).raters[0], label[1] == 2)


def test_intensities_are_those_of_the_volume_and_neighbours_are_channels(tmp_path):
    save(tmp_path / "a.nii", SCAN.astype(np.float32) * 10)
    cases = find_cases(tmp_path)
    assert [case.name for case in cases] == ["a_000", "a_001", "a_002"]
    assert "--normalise minmax" in refusal(read_case, cases[0], need_labels=False)
    readers = Readers({"normalise": "minmax", "context": 2})
    scaled = (SCAN - SCAN.min()) / np.ptp(SCAN)
    for case, slices in zip(cases, ([0, 0, 1, 0, 2], [1, 0, 2, 0, 2], [2, 1, 2, 0, 2])):
        image = read_case(case, need_labels=False, readers=readers).image
        assert np.abs(image / 65535 - scaled[slices]).max() < 1e-4


def test_a_fourth_axis_holds_channels(tmp_path):
    readers = Readers()
    path = save(tmp_path / "a.nii", np.stack([SCAN, 255 - SCAN], -1), (1, 2, 0))
    assert np.array_equal(readers.read(path, 1).pixels, [SCAN[1], 255 - SCAN[1]])


def test_a_file_of_one_slice_is_a_case_of_its_own_name(tmp_path):
    save(tmp_path / "a.nii", SCAN[:1])
    assert [case.name for case in find_cases(tmp_path)] == ["a"]


def test_rater_volumes_of_another_shape_or_place_are_refused(tmp_path):
    save(tmp_path / "p" / "image_0.nii", SCAN)
    for label, words, spacing in ((SCAN[:2], "has 2 slices", 2.0), (SCAN[:, :4], "is 4 x 4 pixels, but its image", 2.0),
                                  (SCAN, "affines differ; resample it to that image", 3.0)):
        path = save(tmp_path / "p" / "label0_.nii", label, spacing=(spacing, 0.5, 0.7))
        message = refusal(read_case, find_cases(tmp_path)[0])
        assert words in message and str(path) in message


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_volumes_that_are_cut_off_are_named_in_one_line(tmp_path, name):
    path = save(tmp_path / name, np.random.default_rng(0).integers(0, 256, (9, 16, 16)).astype(np.uint8))
    whole = path.read_bytes()
    for length in (0, 100, 400, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:length])
        message = refusal(SegmentationCases, tmp_path, 16, need_labels=False)
        assert str(path) in message and "\n" not in message


def test_what_cannot_be_read_is_named_once_however_many_its_slices(tmp_path):
    path = save(tmp_path / "bad.nii.gz", np.random.default_rng(0).integers(0, 256, (9, 64, 64)).astype(np.uint8))
    save(tmp_path / "good.nii.gz", SCAN)
    path.write_bytes(path.read_bytes()[:20000])
    message = refusal(SegmentationCases, tmp_path, 4, fit="resize", need_labels=False)
    assert message.startswith(f"{path}: cannot be read")
    cases = SegmentationCases(tmp_path, 4, fit="resize", need_labels=False, skip_bad=True)
    assert [case.name for _, case in cases.readable(i for i in range(len(cases)) if i not in cases.problems)] == [
        "good_000", "good_001", "good_002"]


def test_without_nibabel_the_command_that_brings_it_is_named(tmp_path, monkeypatch):
    path = save(tmp_path / "p" / "image_0.nii", SCAN)
    monkeypatch.setitem(sys.modules, "nibabel", None)
    message = refusal(SegmentationCases, tmp_path, 4, need_labels=False)
    assert str(path) in message and "pip install nibabel" in message


def test_the_examples_of_nibabel_are_read():
    folder = nibabel.__path__[0] + "/tests/data/"
    readers = Readers({"normalise": "percentile"})
    for name, slices, shape in (("anatomical.nii", 25, (1, 41, 33)), ("example4d.nii.gz", 24, (2, 96, 128)),
                                ("example_nifti2.nii.gz", 12, (2, 20, 32)), ("standard.nii.gz", 7, (1, 5, 4))):
        path = Path(folder, name)
        assert readers.slices(path) == slices and readers.read(path, slices - 1).pixels.shape == shape
