"""Volumes of NIfTI become cases, a slice each, whatever the axes of the files."""

import gzip

import numpy as np
import pytest
from helpers.refusals import refusal

from guided_diffusion.prepare import SOURCES
from guided_diffusion.prepare.nifti import Nifti
from guided_diffusion.prepare.runner import Job, prepare, said

nibabel = pytest.importorskip("nibabel")
SHAPE = 5, 6, 4  # of the volumes, in the axes of nibabel's canonical form: right, front, up
SPACING = 0.75, 0.5, 2.0
RNG = np.random.default_rng(0)
MASK = RNG.random((2, *SHAPE)) < 0.4
MASK[..., 2] = False  # nobody marks axial slice 2
DEFAULTS = {flag.name: flag.default for flag in SOURCES.entries["nifti"].flags}


def save(path, canonical, codes="RAS", shift=0.0):
    """Write an array that is in canonical axes to a file in other ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*SPACING, 1.0])
    affine[:3, 3] = -10 + shift, 20, 30
    image = nibabel.Nifti1Image(canonical, affine)
    ras, wanted = (nibabel.orientations.axcodes2ornt(each) for each in ("RAS", codes))
    nibabel.save(image.as_reoriented(nibabel.orientations.ornt_transform(ras, wanted)), path)
    return path


def scan(seed):
    return np.random.default_rng(seed).integers(0, 65536, SHAPE).astype(np.uint16)


def shown(path, axis):
    """The slices of a file as they should be shown, by way of nibabel's own canonical form."""
    data = np.asanyarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj)[::-1, ::-1]  # left, back, up
    return {"axial": data.transpose(2, 1, 0), "coronal": data[:, :, ::-1].transpose(1, 2, 0),
            "sagittal": data[:, :, ::-1].transpose(0, 2, 1)}[axis]


@pytest.fixture
def job(tmp_path):
    """job(flag=value, ...) -> the Job of tmp_path/in; split=... is that of the Job."""
    def make(split="", **flags):
        return Job("nifti", tmp_path / "in", {**DEFAULTS, "normalise": "full", **flags}, split=split)

    return make


@pytest.mark.parametrize("axis", ["axial", "coronal", "sagittal"])
def test_modalities_and_raters_in_any_axes_are_read_back_exactly(job, tmp_path, prepared, axis):
    folder = tmp_path / "in"
    codes = iter(["LPS", "RAS", "SRP", "PIL", "AIR", "LAI", "IPR", "RSA"])
    for seed, patient in enumerate(("p1", "p2")):
        for k, name in enumerate(("FLAIR_pp", "t1_pp")):
            save(folder / patient / "scans" / f"{patient}_01_{name}.nii.gz", scan(10 * seed + k), next(codes))
        for k in (1, 2):
            save(folder / patient / "masks" / f"{patient}_01_mask{k}.nii", MASK[k - 1].astype(np.uint8), next(codes))
    outcome = prepare(job("1:1:0", modalities="t1,flair", axis=axis), tmp_path / "out")
    assert outcome.left_out == [] and outcome.split_by == "patient"
    found = {**prepared(tmp_path / "out" / "train"), **prepared(tmp_path / "out" / "val")}
    across = {"axial": 2, "coronal": 1, "sagittal": 0}[axis]
    assert len(found) == 2 * SHAPE[across]
    for patient in ("p1", "p2"):
        volumes = [shown(folder / patient / "scans" / f"{patient}_01_{name}.nii.gz", axis) for name in (
            "t1_pp", "FLAIR_pp")]
        raters = [shown(folder / patient / "masks" / f"{patient}_01_mask{k}.nii", axis) > 0 for k in (1, 2)]
        for i in range(SHAPE[across]):
            image, masks, row = found[f"{patient}_01_{i:03}"]
            assert image.dtype == np.uint16 and np.array_equal(image, [volume[i] for volume in volumes])
            assert np.array_equal(masks, [rater[i] for rater in raters])
            assert row["patient"] == patient and row["slice"] == str(i) and row["volume"] == f"{patient}_01"
            between, rows, columns = {"axial": (2, 0.5, 0.75), "coronal": (0.5, 2, 0.75),
                                      "sagittal": (0.75, 2, 0.5)}[axis]
            assert row["spacing"] == f"{rows:g} {columns:g}" and row["slice_spacing"] == f"{between:g}"


def test_bids_names_say_whose_a_scan_is_and_neighbours_are_as_those_of_volumes(job, tmp_path, prepared):
    folder = tmp_path / "in"
    for name in ("sub-01_ses-a", "sub-01_ses-b", "sub-2"):
        save(folder / "sub" / f"{name}_FLAIR.nii.gz", scan(1))
        for k in (1, 2):
            save(folder / "derivatives" / f"{name}_space-x_desc-rater{k}_mask.nii.gz", MASK[k - 1].astype(np.uint8))
    outcome = prepare(job("1:1:0", context=1), tmp_path / "out")
    assert {*outcome.parts} == {"sub-01", "sub-2"} and len(outcome.rows) == 3 * SHAPE[2]
    part = outcome.parts["sub-2"]
    image, _, row = prepared(tmp_path / "out" / part)["sub-2_003"]
    volume = shown(folder / "sub" / "sub-2_FLAIR.nii.gz", "axial")
    assert np.array_equal(image, volume[[3, 2, 3]]) and row["patient"] == "sub-2"


def test_a_missing_rater_is_left_out_or_empty_or_skipped_as_said(job, tmp_path, prepared):
    for name in ("p1", "p2"):
        save(tmp_path / "in" / f"{name}.nii", scan(1))
        save(tmp_path / "in" / f"{name}_mask1.nii", MASK[0].astype(np.uint8))
    save(tmp_path / "in" / "p1_mask2.nii", MASK[1].astype(np.uint8))
    for missing, cases in (("leave_out", {"p1": 2}), ("empty", {"p1": 2, "p2": 2}), ("skip", {"p1": 2, "p2": 1})):
        outcome = prepare(job(missing_masks=missing), tmp_path / missing)
        raters = {name[:2]: masks for name, (_, masks, _) in prepared(tmp_path / missing).items() if name[3:] == "000"}
        assert {name: len(masks) for name, masks in raters.items()} == cases and outcome.split_by == "series"
        assert "masks of 1 of 2 raters" in said(outcome.left_out[0]) if missing == "leave_out" else not outcome.left_out
    assert not prepared(tmp_path / "empty")["p2_000"][1][1].any()


@pytest.mark.parametrize("empty, slices", [("keep", [*range(8)]), ("drop", [1, 2, 4]), ("2", [0, 1, 2, 4, 7]),
                                           ("9", [*range(8)])])
def test_empty_slices_are_kept_dropped_or_thinned(job, tmp_path, empty, slices):
    mask = np.zeros((4, 4, 8), np.uint8)
    mask[1, 1, [1, 2, 4]] = 1, 2, 3
    save(tmp_path / "in" / "p.nii", np.arange(128, dtype=np.uint16).reshape(4, 4, 8))
    save(tmp_path / "in" / "p_mask1.nii", mask)
    rows = prepare(job(empty=empty), tmp_path / "out").rows
    assert [row["slice"] for row in rows] == slices
    rows = prepare(job(empty="drop", foreground="2,3"), tmp_path / "labels").rows
    assert [row["slice"] for row in rows] == [2, 4]


def test_intensities_are_those_of_the_volume_and_pixels_have_the_spacing_asked_for(job, tmp_path, prepared):
    numbers = RNG.normal(100, 30, (6, 8, 4)).astype(np.float32)
    save(tmp_path / "in" / "p.nii", numbers)
    save(tmp_path / "in" / "p_mask1.nii", np.ones((6, 8, 4), np.uint8))
    prepare(job(normalise="zscore"), tmp_path / "z")
    wanted = ((numbers - numbers.mean()) / numbers.std() / 6 + 0.5).clip(0, 1)[::-1, ::-1].transpose(2, 1, 0)
    for i, (image, *_) in enumerate(prepared(tmp_path / "z").values()):
        assert np.abs(image / 65535 - wanted[i]).max() < 1e-4
    prepare(job(normalise="percentile", spacing=1.0), tmp_path / "mm")
    for image, masks, row in prepared(tmp_path / "mm").values():
        assert image.shape == (1, 4, 4) and masks.all() and row["spacing"] == "1 1"  # 8 x 0.5 mm by 6 x 0.75


def test_what_cannot_be_used_is_left_out_by_name_and_the_rest_goes_on(job, tmp_path):
    folder = tmp_path / "in"
    for name in ("good", "flat", "cut", "shape", "place", "bare", "single"):
        save(folder / f"{name}_a.nii.gz", scan(1) * (name != "flat"))
        if name != "single":
            save(folder / f"{name}_b.nii.gz", scan(2))
        if name != "bare":
            label = MASK[0].astype(np.uint8)
            save(folder / f"{name}_mask1.nii.gz", label[:, :4] if name == "shape" else label,
                 shift=3.0 if name == "place" else 0.0)
    broken = folder / "cut_b.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-60])
    save(folder / "twice" / "x" / "t_a.nii", scan(1))
    save(folder / "twice" / "y" / "t_a.nii", scan(1))
    outcome = prepare(job(modalities="a,b"), tmp_path / "out")
    assert {row["volume"] for row in outcome.rows} == {"good"}
    lines = {left.what: said(left) for left in outcome.left_out}
    for name, words in {"flat": f"{folder / 'flat_a.nii.gz'}: is of one grey value", "cut": f"{broken}: cannot be read",
                        "shape": f"{folder / 'shape_mask1.nii.gz'}: is 5 x 4 voxels a slice, but",
                        "place": f"{folder / 'place_mask1.nii.gz'}: lies elsewhere", "bare": "no rater's mask has its",
                        "single": "has no file for the modality b (single_a.nii.gz)",
                        "t": "twice/x/t_a.nii and twice/y/t_a.nii are the same of it"}.items():
        assert words in lines[name], lines
    assert len(lines) == 7


def test_scans_of_one_name_are_told_apart_by_their_folders(job, tmp_path):
    for patient in ("p1", "p2", "p3"):
        save(tmp_path / "in" / patient / "brain_scan.nii.gz", scan(1))
        save(tmp_path / "in" / patient / "task01_seg01.nii.gz", MASK[0].astype(np.uint8))
    outcome = prepare(job("1:1:1", modalities="scan", raters=["task01_seg{k}.nii.gz"]), tmp_path / "out")
    assert {*outcome.parts} == {"p1", "p2", "p3"} and not outcome.left_out and outcome.split_by == "patient"
    assert {row["volume"] for row in outcome.rows} == {"p1", "p2", "p3"}


@pytest.mark.parametrize("flags, words", [
    ({"modalities": "a,t9"}, "--modalities t9: no file below"), ({"raters": ["*_{rater}"]}, "--raters *_{rater}"),
    ({"raters": ["m{k}/{k}"]}, "at most once"), ({"empty": "some"}, "--empty some: must be keep, drop"),
    ({"normalise": "window:5,1"}, "--normalise window:5,1"), ({"foreground": "x"}, "--foreground x"),
    ({"spacing": 0.01}, "--spacing 0.01"), ({"patient_pattern": "("}, "--patient_pattern (")])
def test_flags_that_cannot_be_are_refused(job, tmp_path, flags, words):
    save(tmp_path / "in" / "p_a.nii", scan(1))
    assert words in refusal(prepare, job(**flags), tmp_path / "out")


def test_a_folder_without_volumes_is_refused(job, tmp_path):
    assert "no such folder" in refusal(prepare, job(), tmp_path / "out")
    (tmp_path / "in").mkdir()
    assert "holds nothing to prepare as nifti" in refusal(prepare, job(), tmp_path / "out")
    assert issubclass(SOURCES["nifti"], Nifti)
    (tmp_path / "in" / "a.nii.gz").write_bytes(gzip.compress(b"no volume"))
    (tmp_path / "in" / "a_mask1.nii.gz").write_bytes(gzip.compress(b"no volume"))
    assert "a.nii.gz: cannot be read" in refusal(prepare, job(), tmp_path / "out")
