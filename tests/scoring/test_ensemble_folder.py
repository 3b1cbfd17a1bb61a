"""Masks on disk are found and read as meant, or it is said what is wrong."""


import numpy as np
import pytest
from helpers.files import save
from helpers.refusals import refusal
from PIL import Image

from guided_diffusion.data.case_files import find_cases
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.scoring.ensemble_folder import EnsembleFolder, read_scored_case
from guided_diffusion.system.errors import InputError


@pytest.fixture
def data(make_cases, tmp_path):
    return make_cases(tmp_path / "data", count=3, raters=[2, 1, 4])


# ---- finding masks ----
def listed(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).touch()
    return folder


def found(folder, pattern, *cases, **options):
    """{case: names of its members}"""
    paths = EnsembleFolder(folder, pattern).find(cases, **options)
    return {case: [str(path.relative_to(folder)) for path in members] for case, members in paths.items()}


@pytest.mark.parametrize("pattern", ["{case}_output{i}.png", "{case}/mask_{i}.png", "{i:03d}-of-{case}.jpg",
                                     "all/{case}/x{{1}}/{i:03d}.png"])
@pytest.mark.parametrize("first", [0, 1])
def test_members_are_found_in_the_order_of_their_numbers(tmp_path, pattern, first):
    names = [pattern.format(case="case1", i=i) for i in range(first, 12)]
    listed(tmp_path, *names[::-1], "case1_mean.png", "case1_output3.png.partial", "case1_output.png", "scores.csv")
    assert found(tmp_path, pattern, "case1") == {"case1": names}


@pytest.mark.parametrize("names", [("case1", "case10"), ("a", "a_output1"), ("a.c", "abc"), ("a+(b", "a[0]^$"),
                                   ("x", "x_"), ("{i}", "{case}")])
def test_masks_of_cases_with_similar_or_odd_names_are_kept_apart(tmp_path, names):
    files = {name: [f"{name}_output{i}.png" for i in range(2)] for name in names}
    assert found(listed(tmp_path, *sum(files.values(), [])), "{case}_output{i}.png", *names) == files
    folders = {name: [f"{name}/0.png"] for name in names}
    assert found(listed(tmp_path, *sum(folders.values(), [])), "{case}/{i}.png", *names) == folders


def test_whether_masks_are_independent_draws_is_read_beside_them(tmp_path):
    listed(tmp_path, "of/a_output0.png", "of/b_output0.png")
    folder = EnsembleFolder(tmp_path, "of/{case}_output{i}.png")
    members = folder.find(["a", "b"])
    assert folder.independent(members)  # as those of other programs
    np.savez(tmp_path / "of" / "a_ensemble.npz", samples=np.zeros(3), spread=np.array(True))
    message = refusal(folder.independent, members)
    assert "the masks of b are independent draws, and those of a are spread" in message
    np.savez(tmp_path / "of" / "b_ensemble.npz", spread=np.array(True))
    assert not folder.independent(members)
    (tmp_path / "of" / "b_ensemble.npz").write_bytes(b"PK")
    assert f"{tmp_path / 'of' / 'b_ensemble.npz'}: cannot be read" in refusal(folder.independent, members)


def test_a_gap_is_refused_by_case_even_if_cases_may_be_missing(tmp_path):
    listed(tmp_path, "a_output0.png", "b_output0.png", "b_output2.png")
    for skip in (False, True):
        message = refusal(found, tmp_path, "{case}_output{i}.png", "a", "b", skip_missing=skip)
        assert message.startswith("b: has member 0 and b_output2.png")


def test_cases_without_masks_are_all_named_or_left_out(tmp_path):
    listed(tmp_path, "b_output0.png")
    with pytest.raises(InputError) as caught:
        found(tmp_path, "{case}_output{i}.png", "a", "b", "c")
    first, *lines = str(caught.value).split("\n  ")
    assert first.startswith("2 problems") and lines[0].startswith("a: no masks") and lines[1].startswith("c: no masks")
    assert "a_output0.png" in lines[0] and "--skip_missing True" in lines[0]
    assert found(tmp_path, "{case}_output{i}.png", "a", "b", "c", skip_missing=True) == {"b": ["b_output0.png"]}


@pytest.mark.parametrize("skip", [False, True])
def test_a_pattern_that_matches_nothing_is_told_what_there_is(tmp_path, skip):
    folder = EnsembleFolder(tmp_path, "{case}/{i}.png")
    message = refusal(folder.find, ["a", "b"], skip)
    assert message.startswith("--pattern {case}/{i}.png: ") and message.endswith("which is empty")
    listed(tmp_path, "d.png", "a1.png", "c.png", "b.png")
    assert refusal(folder.find, ["a", "b"], skip).endswith("which holds a1.png, b.png, c.png ...")


@pytest.mark.parametrize("pattern", ["", "{case}.png", "{i}.png", "{case}{case}{i}", "{case}/{i}{i}.png", "{case}_{i",
                                     "{case}_i}", "{case}_{}", "{case.__class__}_{i}.png", "{case}_{i[0]}.png",
                                     "{i}/{case}.png", "{case}_{i}_{x}.png"])
def test_patterns_must_hold_case_and_number_once_each(tmp_path, pattern):
    assert refusal(EnsembleFolder, tmp_path, pattern).startswith(f"--pattern {pattern}: ")


@pytest.mark.parametrize("pattern", ["{case:d}/{i}.png", "{case!z}/{i}.png", "{case}_{i:zz}.png", "{case}_{i:{w}}.png",
                                     "{i}/{case}_{{i}}.png"])
def test_patterns_that_cannot_be_formatted_are_refused(tmp_path, pattern):
    message = refusal(lambda: EnsembleFolder(tmp_path, pattern).find(["a"]))
    assert message.startswith(f"--pattern {pattern}: must")


# ---- reading masks ----

MASK = np.zeros((16, 16), bool)
MASK[4:9, 3:12] = True


def scored(data, *files, fit="error", case=0):
    return read_scored_case(find_cases(data)[case], list(files), fit)


@pytest.mark.parametrize("pixels", [MASK * np.uint8(255), MASK * np.uint8(1), MASK * np.uint16(65535),
                                    MASK * np.uint16(1), MASK, MASK[..., None] * np.uint8([0, 200, 90]),
                                    MASK[..., None] * np.uint8([255, 255, 255, 255])],
                         ids=["255", "1", "16 bits", "16 bits, 1", "1 bit", "colour", "with alpha"])
def test_any_two_values_make_a_mask(data, tmp_path, pixels):
    save(tmp_path / "0.png", pixels)
    save(tmp_path / "1.png", np.full_like(pixels, pixels.max()))  # nothing but foreground
    save(tmp_path / "2.png", np.zeros_like(pixels))
    *_, predictions = scored(data, *(tmp_path / f"{i}.png" for i in range(3)))
    assert predictions.dtype == bool and np.array_equal(predictions, [MASK, ~MASK | True, MASK & False])


def test_ringing_of_a_jpeg_is_no_third_value(data, tmp_path):
    disc = np.hypot(*(np.mgrid[:16, :16] - 7.5)) < 5
    for i, mask in enumerate((disc, disc & False)):
        save(tmp_path / f"{i}.jpg", mask * np.uint8(255), quality=85)
    assert len(np.unique(np.asarray(Image.open(tmp_path / "0.jpg")))) > 4
    *_, predictions = scored(data, tmp_path / "0.jpg", tmp_path / "1.jpg")
    assert np.array_equal(predictions, [disc, disc & False])


@pytest.mark.parametrize("name", ["m.png", "m.jpg"])
def test_probabilities_are_no_masks(data, tmp_path, name):
    save(tmp_path / name, np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16))
    message = refusal(scored, data, tmp_path / name, case=1)
    assert message.startswith(f"case1: {tmp_path / name} is no binary mask") and "one half" in message
    save(tmp_path / "m.png", MASK * np.uint8(2) + ~MASK * np.uint8(1))
    assert "holds the values 1, 2 besides 0" in refusal(scored, data, tmp_path / "m.png")


def test_masks_of_different_sizes_are_refused_by_case_and_file(data, tmp_path):
    for name, shape in (("0.png", (16, 16)), ("1.png", (8, 16)), ("2.png", (12, 12)), ("3.png", (8, 16))):
        save(tmp_path / name, np.zeros(shape, np.uint8))
    message = refusal(scored, data, tmp_path / "0.png", tmp_path / "1.png", case=2)
    assert message == f"case2: {tmp_path / '1.png'} is 16 x 8 pixels, but 0.png is 16 x 16"
    message = refusal(scored, data, tmp_path / "2.png")
    assert message.startswith(f"case0: {tmp_path / '2.png'} is 12 x 12 pixels, but its raters' masks are 16 x 16")
    assert "give --fit resize or --fit crop if it was sampled with that" in message
    assert refusal(scored, data, tmp_path / "3.png", fit="resize").startswith("case0: ")


@pytest.mark.parametrize("fit", ["crop", "resize"])
def test_masks_of_the_size_of_the_model_are_put_back_into_the_scan(data, tmp_path, fit):
    small = np.zeros((8, 8), bool)
    small[2:5, 1:6] = True
    save(tmp_path / "m.png", small * np.uint8(255))
    save(tmp_path / "large.png", np.zeros((20, 20), np.uint8))
    image, raters, predictions = scored(data, tmp_path / "m.png", fit=fit, case=2)
    whole = SegmentationCases(data, 16, image_channels=1)[2]
    assert np.array_equal(raters, whole.raters) and np.array_equal(image, whole.image)
    expected = np.pad(small, 4) if fit == "crop" else small.repeat(2, 0).repeat(2, 1)
    assert (predictions[0] != expected).sum() <= (0 if fit == "crop" else 4)  # corners of the larger mask are rounded
    if fit == "crop":
        assert "--fit crop does not lead from one" in refusal(scored, data, tmp_path / "large.png", fit=fit)


@pytest.mark.parametrize("name, pixels, word", [
    ("m.tif", MASK * np.float32(0.7), "floating-point"), ("m.jpg", MASK * np.uint8(30), "black but for values up to")])
def test_foreground_is_not_lost_in_formats_that_hide_it(data, tmp_path, name, pixels, word):
    save(tmp_path / name, pixels)
    message = refusal(scored, data, tmp_path / name)
    assert name in message and word in message


def test_two_files_of_one_member_are_refused(tmp_path):
    listed(tmp_path, "a_1.png", "a_001.png")
    assert "both its member 1" in refusal(EnsembleFolder(tmp_path, "{case}_{i}.png").find, ["a"])


def test_a_tiff_of_0_and_1_is_a_mask(data, tmp_path):
    save(tmp_path / "m.tif", MASK * np.uint8(1))
    assert np.array_equal(scored(data, tmp_path / "m.tif")[2], [MASK])
