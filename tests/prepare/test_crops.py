"""The crops as the Hierarchical Probabilistic U-Net published them."""

import numpy as np
from helpers.files import save
from helpers.refusals import refusal

from guided_diffusion.prepare.runner import Job, prepare, said


def write(folder, patients, seed=0):
    """patients: {name: slices}; returns {case: (image, masks)}."""
    rng, cases = np.random.default_rng(seed), {}
    for patient, slices in patients.items():
        for i in range(slices):
            name = f"z-{i}5.0_c0"
            image = rng.integers(0, 256, (18, 18), np.uint8)
            masks = rng.random((4, 18, 18)) > 0.7
            masks[3] = False
            save(folder / "images" / patient / f"{name}.png", image)
            for k, mask in enumerate(masks):
                save(folder / "gt" / patient / f"{name}_l{k}.png", mask.astype(np.uint8) * 255)
            cases[f"{patient}_{name}"] = image, masks
    return cases


def test_crops_are_read_back_exactly_in_the_split_that_they_came_in(tmp_path, prepared):
    written = {part: write(tmp_path / "crops" / part, {f"LIDC-IDRI-000{i}": 2}, i)
               for i, part in enumerate(("train", "val", "test"))}
    outcome = prepare(Job("crops", tmp_path / "crops", {}), tmp_path / "out")
    assert outcome.parts == {"LIDC-IDRI-0000": "train", "LIDC-IDRI-0001": "val", "LIDC-IDRI-0002": "test"}
    for part, cases in written.items():
        found = prepared(tmp_path / "out" / part)
        assert found.keys() == cases.keys()
        for name, (image, masks) in cases.items():
            assert np.array_equal(found[name][0], image[None]) and np.array_equal(found[name][1], masks)
            assert found[name][2]["patient"] == name[:14]


def test_one_broken_crop_costs_no_other_of_its_patient(tmp_path):
    folder = tmp_path / "crops"
    write(folder, {"a1": 4})
    (folder / "images/a1/z-05.0_c0.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for k in range(4):
        (folder / f"gt/a1/z-15.0_c0_l{k}.png").unlink()
    (folder / "images/a1/z-25.0_c0.png").unlink()
    outcome = prepare(Job("crops", folder, {}), tmp_path / "out")
    assert [row["case"] for row in outcome.rows] == ["a1_z-35.0_c0"]
    lines = "\n".join(map(said, outcome.left_out))
    assert "z-05.0_c0.png: cannot be read" in lines and "z-15.0_c0.png: has no masks" in lines
    assert "z-25.0_c0_l0.png: is a mask without its image" in lines


def test_a_folder_of_something_else_is_refused(tmp_path):
    assert "holds no folder images" in refusal(prepare, Job("crops", tmp_path, {}), tmp_path / "out")
