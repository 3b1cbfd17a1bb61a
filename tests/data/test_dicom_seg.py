"""DICOM SEG files beside a series are its raters' labels, whatever the order of their frames."""

import numpy as np
import pytest
from helpers.dicom import write_series
from helpers.refusals import refusal

from guided_diffusion.data.case_files import find_cases, read_case
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.readers.base import Readers
from guided_diffusion.sampling import volumes

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")
MASKS = np.random.default_rng(3).random((3, 5, 20, 17)) < 0.3  # [members, D, H, W]
MASKS[1, 2], MASKS[:, 4] = False, False  # what has nothing has no frame


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory):
    """A folder with a series of 5 slices in scan/, and an ensemble of MASKS for it as DICOM SEG."""
    folder = tmp_path_factory.mktemp("seg")
    write_series(folder / "scan", slices=5, shape=(20, 17))
    cases = SegmentationCases(folder, 20, 1, "pad", need_labels=False)
    volumes.write_volume(folder, "scan", [(cases.facts(i).info, MASKS[:, i]) for i in range(5)])
    return folder


@pytest.fixture
def labelled(ensemble, tmp_path):
    """A folder of the same series, beside which labels may be put."""
    folder = tmp_path / "data" / "scan"
    folder.mkdir(parents=True)
    for path in (ensemble / "scan").iterdir():
        (folder / path.name).hardlink_to(path)
    return folder


def raters(folder, **options):
    """The raters' masks of all slices, [R, D, H, W]."""
    cases = find_cases(folder.parent)
    assert [case.name for case in cases] == [f"scan_00{i}" for i in range(5)]
    readers = Readers(options)
    return np.stack([read_case(case, readers=readers).raters for case in cases], axis=1)


def changed(ensemble, change):
    """The ensemble's file, changed."""
    data = pydicom.dcmread(ensemble / "scan_members.dcm")
    change(data)
    return data


def shuffled(data):
    """Its frames in another order."""
    order = np.random.default_rng(0).permutation(data.NumberOfFrames)
    frames = data.pixel_array[order]
    data.PerFrameFunctionalGroupsSequence = [data.PerFrameFunctionalGroupsSequence[i] for i in order]
    bits = np.packbits(frames.ravel(), bitorder="little").tobytes()
    data.PixelData = bits + b"\0" * (len(bits) % 2)


def placed(data):
    """Its frames refer to no image, and have places alone."""
    for group in data.PerFrameFunctionalGroupsSequence:
        del group.DerivationImageSequence


@pytest.mark.parametrize("change", [lambda data: None, shuffled, placed])
def test_an_ensemble_comes_back_as_labels_a_segment_a_rater(ensemble, labelled, change):
    changed(ensemble, change).save_as(labelled / "labels_members.dcm")
    found = raters(labelled)
    assert np.array_equal(found[:3], MASKS) and np.array_equal(found[3], MASKS.mean(0) >= 0.5)
    assert np.array_equal(raters(labelled, foreground="1,3"), MASKS[[0, 2]])


def test_a_file_a_rater_marks_what_any_of_its_segments_marks(ensemble, labelled):
    for k in range(2):
        (labelled / f"label{k}_.dcm").hardlink_to(ensemble / "scan_members.dcm")
    assert np.array_equal(raters(labelled), [MASKS.any(0)] * 2)
    assert np.array_equal(raters(labelled, foreground="2"), [MASKS[1]] * 2)


def test_training_takes_a_series_with_such_labels(ensemble, labelled):
    (labelled / "labels_.dcm").hardlink_to(ensemble / "scan_members.dcm")
    cases = SegmentationCases(labelled.parent, 20, 1, "pad")
    assert len(cases) == 5 and np.array_equal(cases[1].raters[:3, :, 1:18], MASKS[:, 1])


def other_images(data):
    for group in data.PerFrameFunctionalGroupsSequence:
        group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID = "1.2.3"
        group.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 1.0]


@pytest.mark.parametrize("change, flags, words", [
    (other_images, {}, "its frame 1 is of no slice of the scan beside it"),
    (lambda data: setattr(data, "SegmentationType", "FRACTIONAL"), {}, "of the type FRACTIONAL"),
    (lambda data: setattr(data, "Rows", 10), {}, "is 17 x 10 pixels, but its image"),
    (lambda data: setattr(data, "PixelData", data.PixelData[:100]), {}, "cannot be read"),
    (lambda data: None, {"foreground": "1,9"}, "none of the number 9 of --foreground"),
])
def test_labels_that_do_not_fit_the_series_are_named(ensemble, labelled, change, flags, words):
    changed(ensemble, change).save_as(labelled / "label0_.dcm")
    case = find_cases(labelled.parent)[0]
    message = refusal(read_case, case, readers=Readers(flags))
    assert words in message and str(labelled / "label0_.dcm") in message


def test_a_label_that_is_cut_off_is_named_in_one_line(ensemble, labelled):
    whole = (ensemble / "scan_members.dcm").read_bytes()
    for length in (0, 100, 200, len(whole) // 2, len(whole) - 100):
        (labelled / "label0_.dcm").write_bytes(whole[:length])
        message = refusal(read_case, find_cases(labelled.parent)[0])
        assert str(labelled / "label0_.dcm") in message and "\n" not in message


def test_channels_of_a_volume_are_raters_in_a_file_called_labels(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    folder, affine = tmp_path / "p", np.diag([-0.6, -0.7, 2.5, 1.0])
    folder.mkdir()
    nibabel.save(nibabel.Nifti1Image(np.arange(17 * 20 * 5, dtype=np.float32).reshape(17, 20, 5), affine),
                 folder / "image_0.nii.gz")
    members = nibabel.Nifti1Image(MASKS.transpose(3, 2, 1, 0).astype(np.uint8), affine)
    nibabel.save(nibabel.as_closest_canonical(members), folder / "labels_ensemble.nii.gz")
    (folder / "labels_.png").write_bytes(b"of something else")
    readers = Readers({"normalise": "minmax"})
    for i, case in enumerate(find_cases(tmp_path)):
        assert np.array_equal(read_case(case, readers=readers).raters, MASKS[:, i])
