"""HDF5 files in the layout of PHiSeg."""

import numpy as np
import pytest
from helpers.refusals import refusal

from guided_diffusion.prepare import hdf5
from guided_diffusion.prepare.runner import Job, prepare, said

h5py = pytest.importorskip("h5py")


def write(path, uids, raters=4, size=6):
    """uids: {part: numbers}; returns {part: (images of 16 bits, labels)}."""
    rng, written = np.random.default_rng(0), {}
    with h5py.File(path, "w") as file:
        for part, numbers in uids.items():
            images = rng.integers(0, 65536, (len(numbers), size, size))
            labels = rng.integers(0, 2, (len(numbers), size, size, raters), np.uint8)
            group = file.create_group(part)
            for name, values in (("images", images / 65535 - 0.5), ("labels", labels), ("uids", numbers)):
                group.create_dataset(name, data=values)
            written[part] = images, labels
    return written


def test_a_file_is_read_back_exactly_in_pieces_and_in_its_own_split(tmp_path, prepared, monkeypatch):
    monkeypatch.setattr(hdf5, "PIECE", 3)
    uids = {"train": [11, 11, 11, 11, -5, 11], "val": [8, 8], "test": [9]}
    written = write(tmp_path / "data.hdf5", uids)
    outcome = prepare(Job("hdf5", tmp_path / "data.hdf5", {}), tmp_path / "out")
    assert outcome.parts == {"11": "train", "-5": "train", "8": "val", "9": "test"} and outcome.units == 6
    for part, (images, labels) in written.items():
        found = sorted(prepared(tmp_path / "out" / part).values(), key=lambda case: int(case[2]["slice"]))
        assert len(found) == len(images)
        for (image, masks, row), pixels, label, uid in zip(found, images, labels, uids[part]):
            assert np.array_equal(image[0], pixels) and np.array_equal(masks, label.transpose(2, 0, 1) > 0)
            assert row["series"] == str(uid)


def test_a_series_has_one_name_by_which_scores_know_it(tmp_path):
    from guided_diffusion.metrics import patient_of

    write(tmp_path / "data.hdf5", {"train": [11, 7, 11]})
    outcome = prepare(Job("hdf5", tmp_path / "data.hdf5", {}), tmp_path / "out")
    assert {patient_of(row["case"]): row["series"] for row in outcome.rows} == {"series0000": "11", "series0001": "7"}


def change(file, how, other):
    del file["val/images" if how != "group" else "val"]
    file["val/images" if how != "group" else "val"] = {
        "external": h5py.ExternalLink(str(other), "val/images"), "soft": h5py.SoftLink("/train/images"),
        "group": h5py.ExternalLink(str(other), "val")}[how]


@pytest.mark.parametrize("how", ["external", "soft", "group"])
def test_links_to_elsewhere_are_refused(tmp_path, how):
    write(tmp_path / "other.hdf5", {"val": [2]})
    write(tmp_path / "data.hdf5", {"train": [1], "val": [2]})
    with h5py.File(tmp_path / "data.hdf5", "a") as file:
        change(file, how, tmp_path / "other.hdf5")
    message = refusal(prepare, Job("hdf5", tmp_path / "data.hdf5", {}), tmp_path / "out")
    assert "leads elsewhere" in message and "val" in message


@pytest.mark.parametrize("how", ["external", "virtual"])
def test_pixels_that_lie_in_other_files_are_refused(tmp_path, how):
    write(tmp_path / "other.hdf5", {"val": [2]})
    write(tmp_path / "data.hdf5", {"val": [2]})
    (tmp_path / "secret").write_bytes(bytes(8 * 36))
    with h5py.File(tmp_path / "data.hdf5", "a") as file:
        del file["val/images"]
        if how == "external":
            file.create_dataset("val/images", (1, 6, 6), "f8", external=[(str(tmp_path / "secret"), 0, 288)])
        else:
            layout = h5py.VirtualLayout((1, 6, 6), "f8")
            layout[:] = h5py.VirtualSource(str(tmp_path / "other.hdf5"), "val/images", (1, 6, 6))
            file.create_virtual_dataset("val/images", layout)
    assert "lies in another file" in refusal(prepare, Job("hdf5", tmp_path / "data.hdf5", {}), tmp_path / "out")


def test_a_file_that_is_cut_off_is_named(tmp_path):
    path = tmp_path / "data.hdf5"
    write(path, {"train": [1, 1, 2, 2]})
    whole = path.read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        message = refusal(prepare, Job("hdf5", path, {}), tmp_path / "out")
        assert str(path) in message and "\n" not in message


def test_what_is_wrong_is_named(tmp_path):
    path = tmp_path / "data.hdf5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(90))
    assert "cannot be read as HDF5" in refusal(prepare, Job("hdf5", path, {}), tmp_path / "out")
    write(path, {"other": [1]})
    assert "no group train" in refusal(prepare, Job("hdf5", path, {}), tmp_path / "out")
    write(path, {"train": [1, 1, 2, 2]})
    with h5py.File(path, "a") as file:
        file["train/images"][0] = 700
        file["train/labels"][2] = 5
    outcome = prepare(Job("hdf5", path, {}), tmp_path / "out")
    assert [row["slice"] for row in outcome.rows] == [1, 3]
    assert ["train/images 0", "train/labels 2"] == [left.what for left in outcome.left_out]
    assert "700" in said(outcome.left_out[0])
    with h5py.File(path, "a") as file:
        del file["train/labels"]
    assert "has no train/labels" in refusal(prepare, Job("hdf5", path, {}), tmp_path / "b")
