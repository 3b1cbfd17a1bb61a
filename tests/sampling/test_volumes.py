"""Masks of NIfTI and DICOM scans come back in files of their format, voxel by voxel where the scan has them."""

import numpy as np
import pytest
from helpers.dicom import write_series
from helpers.files import save
from helpers.refusals import refusal

from guided_diffusion.data import manifest
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.prepare import SOURCES
from guided_diffusion.prepare.runner import Job, prepare
from guided_diffusion.sampling import volumes
from guided_diffusion.sampling.segmenter import Segmenter

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")
pytest.importorskip("highdicom")

AFFINES = {"as shown": np.diag([-0.7, -0.8, 2.5, 1]), "turned": np.array(
    [[0.1, 0.2, 3, -9], [0.7, 0.05, 0.1, 4], [0.1, -0.8, 0.3, 7], [0, 0, 0, 1.0]])}


def write_nifti(path, shape, affine, codes=(1, 4), seed=0):
    """A file of 0 and 255; returns where it is 255."""
    marked = np.random.default_rng(seed).random(shape) < 0.5
    image = nibabel.Nifti1Image(marked.astype(np.uint8) * 255, None)
    image.set_qform(affine, codes[0])
    image.set_sform(affine, codes[1])
    image.header["descrip"] = b"Jane Doe"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.to_filename(path)
    return marked


def bright(cases, numbers):
    """What write_volume takes: two members, the first is where the scan is bright and the second its opposite."""
    for i in numbers:
        mask = cases.whole(i).image[0] > 0.5
        yield cases.facts(i).info, np.stack([mask, ~mask])


@pytest.mark.parametrize("order", AFFINES)
@pytest.mark.parametrize("shape", [(16, 16, 16), (16, 16)])
def test_a_nifti_volume_has_its_masks_where_its_voxels_are(tmp_path, order, shape):
    marked = write_nifti(tmp_path / "d" / "a.nii", shape, AFFINES[order])
    cases = SegmentationCases(tmp_path / "d", 16, 1, "pad", need_labels=False)
    numbers = range(len(cases))[::-1]
    slices = [(info, masks) for info, masks in bright(cases, numbers)]
    volumes.write_volume(tmp_path, "a", slices)
    source = nibabel.load(tmp_path / "d" / "a.nii")
    written = {kind: nibabel.load(tmp_path / f"a_{kind}.nii.gz") for kind in ("ensemble", "probability", "spread")}
    members = np.asarray(written["ensemble"].dataobj)
    assert members.dtype == np.uint8 and members.shape == (*shape, 1)[:3] + (2,)
    assert np.array_equal(members[..., 0].reshape(shape), marked)
    assert np.array_equal(members[..., 1].reshape(shape), ~marked)
    for kind, image in written.items():
        for form in ("qform", "sform"):
            own, code = getattr(image, f"get_{form}")(coded=True)
            theirs, their_code = getattr(source, f"get_{form}")(coded=True)
            assert np.allclose(own, theirs, atol=1e-6) and code == their_code
        assert b"Jane" not in image.header["descrip"].tobytes()
    assert written["probability"].shape == shape and (np.asarray(written["probability"].dataobj) == 0.5).all()
    assert (np.asarray(written["spread"].dataobj) == 0.5).all()


def frames_of(seg):
    """(number of the segment, UID of the slice) of every frame of a DICOM SEG object."""
    shared = seg.SharedFunctionalGroupsSequence[0]
    for group in seg.PerFrameFunctionalGroupsSequence:
        source = group.DerivationImageSequence[0].SourceImageSequence[0]
        segment = (group if "SegmentIdentificationSequence" in group else shared).SegmentIdentificationSequence[0]
        yield segment.ReferencedSegmentNumber, source.ReferencedSOPInstanceUID


def test_dicom_seg_objects_have_the_masks_of_each_slice_of_the_series(tmp_path):
    marked = write_series(tmp_path / "scan")
    cases = SegmentationCases(tmp_path / "scan", 20, 1, "pad", need_labels=False)
    slices = []
    for info, masks in bright(cases, range(3)):  # the last slice is not drawn
        slices.append((info, np.stack([masks[0], masks[0], masks[0] & False])))
    volumes.write_volume(tmp_path, "a", slices)
    members, probability = (pydicom.dcmread(tmp_path / f"a_{kind}.dcm") for kind in ("members", "probability"))
    assert members.SegmentationType == "BINARY" and probability.SegmentationType == "FRACTIONAL"
    assert [segment.SegmentLabel for segment in members.SegmentSequence] == [
        "member 0", "member 1", "member 2", "probability of at least 0.5"]
    assert members.SOPInstanceUID != probability.SOPInstanceUID
    drawn = {info["sop_uid"] for info, _ in slices}
    assert len(drawn) == 3 and drawn < marked.keys()
    for seg in (members, probability):
        pixels, frames = seg.pixel_array, [*frames_of(seg)]
        assert {uid for _, uid in frames} == drawn and seg.PatientID == "7"
        for (segment, uid), frame in zip(frames, pixels):
            expected = marked[uid] * (1 if seg is members else 170)  # 2/3 of 255
            assert np.array_equal(frame, expected), segment
    assert {segment for segment, _ in frames_of(members)} == {1, 2, 4}  # empty frames are left out
    again = tmp_path / "again"
    again.mkdir()
    volumes.write_volume(again, "a", slices)
    assert pydicom.dcmread(again / "a_members.dcm").SOPInstanceUID == members.SOPInstanceUID


def test_sampling_writes_volumes_once_and_again_when_a_slice_is_drawn(run, trained, tmp_path):
    write_nifti(tmp_path / "d" / "brain.nii.gz", (20, 18, 2), AFFINES["as shown"])
    write_series(tmp_path / "d" / "chest", slices=2)

    def sample():
        result = run("segmentation_sample.py", "--data_dir", "d", "--model_path", trained / "savedmodel.pt", "--fit",
                     "crop", "--num_ensemble", 2, "--sampler", "best", "--sampling_steps", 2, "--batch_size", 8)
        assert result.code == 0, result.err
        return {name: (tmp_path / "results" / name).stat().st_mtime_ns for name in (
            "brain_ensemble.nii.gz", "brain_probability.nii.gz", "brain_spread.nii.gz", "chest_members.dcm",
            "chest_probability.dcm")}

    first = sample()
    members = np.asarray(nibabel.load(tmp_path / "results" / "brain_ensemble.nii.gz").dataobj)
    assert members.shape == (20, 18, 2, 2) and members.any() and not members[0].any()  # cropped away
    assert sample() == first
    (tmp_path / "results" / "brain_000_output1.png").unlink()
    (tmp_path / "results" / "chest_members.dcm").unlink()
    second = sample()
    assert all((second[name] != first[name]) for name in first)
    assert np.array_equal(np.asarray(nibabel.load(tmp_path / "results" / "brain_ensemble.nii.gz").dataobj), members)


def test_the_python_door_gives_the_same_geometry(trained, tmp_path):
    write_nifti(tmp_path / "brain.nii", (20, 18, 2), AFFINES["as shown"])
    segmenter = Segmenter.load(trained, device="cpu")
    ensembles = segmenter.sample(tmp_path / "brain.nii", 2, 2, fit="tile")
    volumes.save_volumes(tmp_path / "out", ensembles)
    members = np.asarray(nibabel.load(tmp_path / "out" / "brain_ensemble.nii.gz").dataobj)
    assert np.array_equal(members[:, :, 1, 0].T, ensembles[1].masks[0])
    assert ensembles[0].spacing == pytest.approx((0.8, 0.7))
    assert ensembles[0].area_interval()[1] == pytest.approx(0.56 * np.median(ensembles[0].masks.sum((1, 2))))
    voxels = members.sum((0, 1, 2))
    assert volumes.volume_interval(ensembles, 1) == pytest.approx(
        [0.7 * 0.8 * 2.5 / 1000 * each for each in (voxels.min(), np.median(voxels), voxels.max())])


def changed(path, *names):
    """A DICOM file without some of its elements."""
    data = pydicom.dcmread(path)
    for name in names:
        delattr(data, name)
    data.save_as(path)
    return path


def test_masks_of_a_dicom_picture_without_a_place_refer_to_it_alone(trained, tmp_path):
    write_series(tmp_path, slices=1, shape=(16, 16))
    path = changed(tmp_path / "0.dcm", "ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID")
    ensemble = Segmenter.load(trained, device="cpu").sample(path, 2, 2)
    ensemble.masks[:] = np.random.default_rng(0).random((2, 16, 16)) < 0.5
    ensemble.save(tmp_path / "out")
    seg = pydicom.dcmread(tmp_path / "out" / "0_members.dcm")
    assert np.array_equal(seg.pixel_array[:2] > 0, ensemble.masks)
    assert "PlanePositionSequence" not in seg.PerFrameFunctionalGroupsSequence[0]
    assert {uid for _, uid in frames_of(seg)} == {ensemble.info["sop_uid"]}


def test_a_picture_that_dicom_seg_cannot_refer_to_is_saved_with_a_warning_and_the_others_are_written(trained, tmp_path):
    write_series(tmp_path / "a", slices=1, shape=(16, 16))
    write_series(tmp_path / "b", slices=2, shape=(16, 16))
    path = changed(tmp_path / "a" / "0.dcm", "StudyInstanceUID")
    segmenter = Segmenter.load(trained, device="cpu")
    ensemble, series = segmenter.sample(path, 2, 2), segmenter.sample(tmp_path / "b", 2, 2)
    with pytest.warns(UserWarning, match="0.dcm: masks cannot be written in its format"):
        ensemble.save(tmp_path / "out")
    assert {"0_output0.png", "0_output1.png", "0_montage.png"} < {each.name for each in (tmp_path / "out").iterdir()}
    assert "0.dcm: masks cannot be written" in refusal(volumes.save_volumes, tmp_path / "all", [ensemble, *series])
    assert sorted(each.name for each in (tmp_path / "all").iterdir()) == ["b_members.dcm", "b_probability.dcm"]


def test_prepared_slices_have_the_geometry_of_the_manifest(trained, tmp_path):
    rng, sizes = np.random.default_rng(0), ("0.5 2", "0.5 2", "", "x 1")
    for i in range(4):
        save(tmp_path / "data" / "train" / f"p_{i}" / "image_0.png", rng.integers(0, 256, (16, 16), np.uint8))
    manifest.write(tmp_path / "data" / manifest.FILE, [
        {"case": f"p_{i}", "part": "train", "volume": "p", "slice": i, "spacing": spacing, "slice_spacing": 3.0}
        for i, spacing in enumerate(sizes)])
    paths = [tmp_path / "data" / "train" / f"p_{i}" for i in range(4)]
    ensembles = Segmenter.load(trained, device="cpu").sample(paths, 3, 2)
    assert [each.spacing for each in ensembles] == [(0.5, 2), (0.5, 2), None, None]
    assert ensembles[1].info["slice"] == 1
    cases = SegmentationCases(tmp_path / "data" / "train", 16, need_labels=False)
    assert [cases.facts(i) for i in range(4)] == [(each.spacing, each.info) for each in ensembles]
    areas = ensembles[0].masks.sum((1, 2)) + ensembles[1].masks.sum((1, 2))
    assert volumes.volume_interval(ensembles[:2])[1] == pytest.approx(np.median(areas) * 3 / 1000)
    for wrong, words in ((ensembles, "p_2: the distance"), ([], "not of the slices of one volume")):
        with pytest.raises(ValueError, match=words):
            volumes.volume_interval(wrong)
    with pytest.raises(ValueError, match="level is 90"):
        volumes.volume_interval(ensembles[:2], 90)


@pytest.mark.parametrize("axis, spacing", [("axial", 0), ("coronal", 0), ("sagittal", 0), ("axial", 0.5)])
def test_masks_of_prepared_slices_come_back_into_their_volume(tmp_path, axis, spacing):
    shape = 22, 14, 18
    write_nifti(tmp_path / "in" / "p.nii.gz", shape, AFFINES["turned"])
    marked = np.linalg.norm(np.indices(shape) - np.array([12, 6, 9])[:, None, None, None], axis=0) < 5
    image = nibabel.Nifti1Image(marked.astype(np.uint8), AFFINES["turned"])
    image.to_filename(tmp_path / "in" / "p_mask1.nii.gz")
    flags = {flag.name: flag.default for flag in SOURCES.entries["nifti"].flags}
    prepare(Job("nifti", tmp_path / "in", {**flags, "axis": axis, "spacing": spacing}), tmp_path / "out")
    cases = SegmentationCases(tmp_path / "out", 128, 1, "pad")
    assert {*cases.volumes} == {("p", "nifti")}
    volumes.write_volume(tmp_path, "p", [(cases.facts(i).info, cases.whole(i).raters) for i in range(len(cases))])
    written = nibabel.load(tmp_path / "p_ensemble.nii.gz")
    assert written.shape == (*shape, 1) and np.allclose(written.affine, AFFINES["turned"], atol=1e-6)
    found = np.asarray(written.dataobj)[..., 0] > 0
    assert np.array_equal(found, marked) if not spacing else (found & marked).sum() > 0.9 * (found | marked).sum()
    (tmp_path / "in" / "p.nii.gz").unlink()
    gone = SegmentationCases(tmp_path / "out", 128, 1, "pad")
    assert gone.volumes[0] == ("", "") and "format" not in gone.facts(0).info


def test_sampling_puts_prepared_slices_into_their_volume(run, trained, tmp_path):
    write_nifti(tmp_path / "in" / "p.nii.gz", (16, 16, 2), AFFINES["as shown"])
    write_nifti(tmp_path / "in" / "p_mask1.nii.gz", (16, 16, 2), AFFINES["as shown"])
    flags = {flag.name: flag.default for flag in SOURCES.entries["nifti"].flags}
    prepare(Job("nifti", tmp_path / "in", flags), tmp_path / "out")
    result = run("segmentation_sample.py", "--data_dir", "out", "--model_path", trained / "savedmodel.pt",
                 "--num_ensemble", 2, "--sampler", "best", "--sampling_steps", 2)
    assert result.code == 0 and "in the nifti scan's geometry" in result.out, result.err
    members = np.asarray(nibabel.load(tmp_path / "results" / "p_ensemble.nii.gz").dataobj)
    drawn = volumes.read_masks(tmp_path / "results", "p_001", 2)
    assert members.shape == (16, 16, 2, 2) and np.array_equal(members[:, :, 1, 1].T > 0, drawn[1])


def test_a_missing_package_is_named_before_anything_is_drawn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    assert "pip install highdicom" in refusal(volumes.refuse_missing_packages, {"pictures", "dicom"})
    volumes.refuse_missing_packages({"pictures", "nifti"})


def test_a_source_without_geometry_is_named(tmp_path):
    path = tmp_path / "gone.nii"
    info = {"format": "nifti", "path": str(path), "slices": 1, "slice": 0, "axes": [[0, 1], [1, 1], [2, 1]]}
    message = refusal(volumes.write_volume, tmp_path, "a", [(info, np.zeros((2, 4, 4), bool))])
    assert message.startswith(f"{path}: masks cannot be written in its format") and "a*_output<i>.png" in message
