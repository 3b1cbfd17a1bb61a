"""DICOM: the slices of a series and the frames of a file are cases, in the order of their places."""

from pathlib import Path

import numpy as np
import pytest
from helpers.processes import SAMPLE
from helpers.refusals import refusal

from guided_diffusion import Segmenter
from guided_diffusion.data.case_files import find_cases, read_case
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.readers.base import Readers
from guided_diffusion.system.errors import InputError

pydicom = pytest.importorskip("pydicom")
HU = np.random.default_rng(0).integers(-1024, 500, (4, 16, 20)).astype(np.int16)
SCALED = np.clip((HU + 1000) / 1400, 0, 1)


def save(path, stored, series="1.2.3", position=(0, 0, 0), **tags):
    """One DICOM file of stored numbers [H, W] or [frames, H, W]."""
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = pydicom.uid.CTImageStorage
    meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    data = pydicom.Dataset()
    data.file_meta = meta
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.Modality, data.SeriesInstanceUID, data.StudyInstanceUID = "CT", series, "1.2"
    data.Rows, data.Columns = stored.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.PixelRepresentation = int(stored.dtype.kind == "i")
    data.RescaleSlope, data.RescaleIntercept, data.PixelSpacing = 1, -1024, [0.7, 0.6]
    data.ImagePositionPatient, data.ImageOrientationPatient = [*position], [1, 0, 0, 0, 1, 0]
    if stored.ndim == 3:
        data.NumberOfFrames = len(stored)
    for name, value in tags.items():
        if value is None:
            del data[name]
        else:
            setattr(data, name, value)
    data.PixelData = stored.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


def save_series(folder, z=(0, 2.5, 5, 7.5), series="1.2.3", names="{}.dcm", **tags):
    """HU as a series whose files are named and numbered against the order of their places."""
    for i, (hu, place) in enumerate(zip(HU, z)):
        save(folder / names.format(9 - i), (hu + 1024).astype(np.uint16), series, (0, 0, place), InstanceNumber=9 - i,
             **tags)


def test_the_slices_of_a_series_are_cases_in_the_order_of_their_places(tmp_path):
    save_series(tmp_path / "ct")
    cases = SegmentationCases(tmp_path / "ct", 16, 1, fit="crop", need_labels=False)
    assert [case.name for case in cases] == [f"ct_00{i}" for i in range(4)]
    for i, case in enumerate(cases):
        assert np.abs(case.image[0] - SCALED[i][:, 2:18]).max() < 1e-4  # --normalise full takes -1000 to 400 HU
    spacing, info = cases.facts(1)
    assert spacing == (0.7, 0.6) and (info["slice"], info["slice_spacing"], info["series_uid"]) == (1, 2.5, "1.2.3")
    assert info["position"] == [0, 0, 2.5] and Path(info["path"]).name == "8.dcm" and info["frame"] is None
    assert [Path(path).name for path in info["files"]] == ["9.dcm", "8.dcm", "7.dcm", "6.dcm"]
    assert info["sop_uid"] == pydicom.dcmread(info["path"]).SOPInstanceUID


def test_several_series_lie_in_one_folder_and_files_need_no_suffix(tmp_path):
    save_series(tmp_path / "a" / "b", series="1.1", names="IM{}", SeriesNumber=4)
    save_series(tmp_path / "a" / "b", series="1.2", names="1.2.{}", SeriesNumber=7)
    save(tmp_path / "a" / "b" / "scout", HU[0].astype(np.uint16), "1.3", SeriesNumber=1)
    (tmp_path / "a" / "b" / "notes").write_text("none of it")
    names = [f"a_b_series{k}_00{i}" for k in (4, 7) for i in range(4)]
    assert [case.name for case in find_cases(tmp_path)] == ["a_b_scout", *names]


def test_windows_and_neighbours_are_those_of_the_series(tmp_path):
    save_series(tmp_path)
    readers = Readers({"normalise": "minmax", "context": 1})
    scaled = (HU - HU.min()) / np.ptp(HU.astype(int))
    for i, case in enumerate(find_cases(tmp_path)):
        image = read_case(case, need_labels=False, readers=readers).image
        assert np.abs(image / 65535 - scaled[[i, max(i - 1, 0), min(i + 1, 3)]]).max() < 1e-4


@pytest.mark.parametrize("z, tags, words", [
    ((0, 2.5, 7.5, 10), {}, "is 5 mm from the next slice of its series"),
    ((0, 1, 2, 3), {"PixelSpacing": [1, 1]}, "spacing"),
    ((0, 1, 2, 3), {"ImageOrientationPatient": [1, 0, 0, 0, 0, 1]}, "orientation"),
])
def test_series_that_are_no_volume_are_refused_in_one_line_and_the_rest_goes_on(tmp_path, z, tags, words):
    save_series(tmp_path / "bad", z)
    save_series(tmp_path / "good")
    if tags:
        save(tmp_path / "bad" / "1.dcm", (HU[0] + 1024).astype(np.uint16), position=(0, 0, 4), InstanceNumber=1, **tags)
    message = refusal(SegmentationCases, tmp_path, 16, fit="crop", need_labels=False)
    assert words in message and str(tmp_path / "bad") in message
    cases = SegmentationCases(tmp_path, 16, fit="crop", need_labels=False, skip_bad=True)
    assert len(cases) == 5 and len(cases.problems) == 1


def test_frames_are_slices_each_with_its_own_place_and_scale(tmp_path):
    groups = []
    for i in range(4):
        group, place, values = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
        place.ImagePositionPatient = [0, 0, 3 * i]
        values.RescaleSlope, values.RescaleIntercept = i + 1, -1000
        group.PlanePositionSequence, group.PixelValueTransformationSequence = [place], [values]
        groups.append(group)
    stored = np.random.default_rng(1).integers(0, 400, (4, 16, 20)).astype(np.uint16)
    path = save(tmp_path / "enhanced.dcm", stored, PerFrameFunctionalGroupsSequence=groups, ImagePositionPatient=None,
                RescaleSlope=None, RescaleIntercept=None)
    assert [case.name for case in find_cases(tmp_path)] == [f"enhanced_00{i}" for i in range(4)]
    for i in range(4):
        scan = Readers().read(path, i)
        assert np.abs(scan.pixels[0] / 65535 - np.clip(stored[i] * (i + 1.0) / 1400, 0, 1)).max() < 1e-4
        assert scan.info["frame"] == i and scan.info["position"] == [0, 0, 3 * i] and scan.info["slice_spacing"] == 3


def test_labels_above_0_are_foreground_and_inverted_pictures_are_turned(tmp_path):
    label = np.random.default_rng(2).integers(0, 3, (16, 20)).astype(np.uint16)
    plain = {"RescaleIntercept": 0, "Modality": "OT"}
    save(tmp_path / "p" / "image_0.dcm", label * 20000, PhotometricInterpretation="MONOCHROME1", **plain)
    save(tmp_path / "p" / "label0_.dcm", label, **plain)
    found = read_case(find_cases(tmp_path)[0])
    assert np.array_equal(found.image[0], 65535 - label * 20000) and np.array_equal(found.raters, [label > 0])


def test_sampling_and_the_python_door_take_a_folder_of_dicom_files(run, trained, tmp_path):
    save_series(tmp_path / "ct")
    flags = "--data_dir", tmp_path / "ct", "--model_path", trained / "savedmodel.pt", "--results_dir", "results"
    result = run(SAMPLE, *flags, "--fit", "crop", "--num_ensemble", 1, "--timestep_respacing", 2)
    assert result.code == 0, result.err
    assert (tmp_path / "results" / "ct_003_output0.png").exists()
    ensembles = Segmenter.load(trained, device="cpu").sample(tmp_path / "ct", 1, 2, fit="crop")
    assert [ensemble.name for ensemble in ensembles] == [f"ct_00{i}" for i in range(4)]
    assert ensembles[3].info["position"] == [0, 0, 7.5] and ensembles[0].spacing == (0.7, 0.6)


def test_damaged_files_are_named_in_one_line(tmp_path):
    path = save(tmp_path / "a.dcm", (HU[0] + 1024).astype(np.uint16))
    whole = path.read_bytes()
    for length in (0, 100, 200, 400, len(whole) - 100):
        path.write_bytes(whole[:length])
        assert str(path) in refusal(SegmentationCases, tmp_path, 16, fit="crop", need_labels=False)


def test_the_examples_of_pydicom_are_read():
    folder, readers = Path(pydicom.__file__).parent / "data" / "test_files", Readers()
    for name, shape, kind in (("CT_small.dcm", (1, 128, 128), np.uint16), ("MR_small_RLE.dcm", (1, 64, 64), np.uint16),
                              ("693_J2KI.dcm", (1, 512, 512), np.uint16), ("SC_rgb_small_odd.dcm", (3, 3, 3), np.uint8),
                              ("examples_palette.dcm", (3, 350, 800), np.uint8)):
        pixels = readers.read(folder / name).pixels
        assert pixels.shape == shape and pixels.dtype == kind
    for name, words in (("MR_truncated.dcm", "cannot be read"), ("no_meta.dcm", "is no DICOM file"),
                        ("SC_rgb_jpeg_gdcm.dcm", "is compressed (JPEG Lossless"), ("rtplan.dcm", "holds no picture")):
        assert words in refusal(readers.read, folder / name) or name == "SC_rgb_jpeg_gdcm.dcm"


def test_every_example_of_pydicom_is_read_passed_over_or_refused_in_one_line():
    folder, readers = Path(pydicom.__file__).parent / "data" / "test_files", Readers()
    files = [path for path in sorted(folder.rglob("*")) if readers.name_of(path) == "dicom"]
    assert len(files) >= 100
    read = 0
    for path in files:
        for stack in readers.stacks([path])[:1]:
            try:
                pixels = readers.read(path).pixels
                read += pixels.ndim == 3 and pixels.size > 0
            except InputError as error:
                assert str(path) in str(error) and "\n" not in str(error)
    assert read >= 80


def test_without_a_decoder_what_brings_it_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    example = Path(pydicom.__file__).parent / "data" / "test_files" / "693_J2KI.dcm"
    (tmp_path / "a.dcm").write_bytes(example.read_bytes())
    save(tmp_path / "b.dcm", (HU[0] + 1024).astype(np.uint16))
    monkeypatch.setattr(pydicom.pixels.decoders.JPEG2000LosslessDecoder, "_available", {})
    monkeypatch.setattr(pydicom.pixels.decoders.JPEG2000Decoder, "_available", {})
    cases = SegmentationCases(tmp_path, 16, 1, "resize", need_labels=False, skip_bad=True)
    assert [case.name for _, case in cases.readable([1])] == ["b"]
    message, = cases.problems.values()
    assert message.startswith(f"{tmp_path / 'a.dcm'}: is compressed (JPEG 2000") and "pip install pylibjpeg" in message


def test_labels_beside_a_series_are_volumes_on_its_grid(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    save_series(tmp_path / "p1")
    label = np.random.default_rng(1).random(HU.shape) < 0.5  # [D, H, W]
    affine = np.diag([-0.6, -0.7, 2.5, 1.0])  # of (column, row, slice), DICOM's axes as NIfTI has them
    image = nibabel.Nifti1Image(label.transpose(2, 1, 0).astype(np.uint8), affine)
    nibabel.save(nibabel.as_closest_canonical(image), tmp_path / "p1" / "label0_.nii.gz")
    cases = find_cases(tmp_path)
    assert [case.name for case in cases] == [f"p1_00{i}" for i in range(4)]
    for i, case in enumerate(cases):
        contents = read_case(case, readers=Readers())
        assert np.array_equal(contents.raters, label[i:i + 1]) and contents.info["slice"] == i
        assert np.abs(contents.image[0] / 65535 - SCALED[i]).max() < 1e-4
    affine[2, 3] = 2.5
    nibabel.save(nibabel.Nifti1Image(image.get_fdata(), affine), tmp_path / "p1" / "label0_.nii.gz")
    assert "label0_.nii.gz: lies elsewhere than the first image of its case" in refusal(read_case, cases[0])
    save_series(tmp_path / "p1", series="9.9", names="other{}.dcm")
    assert "no image" in refusal(read_case, find_cases(tmp_path)[0])
