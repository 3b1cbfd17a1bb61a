"""A study in the form in which LIDC-IDRI is shipped becomes the cases that were placed in it, and what is broken in it
stops nothing else."""

import shutil

import numpy as np
import pytest
from helpers import lidc
from helpers.lidc import SIZE, box, flooded, nodule, non_nodule, reading, roi, write_series, write_slice

from guided_diffusion.prepare import SOURCES
from guided_diffusion.prepare.base import LeftOut, PreparedCase
from guided_diffusion.prepare.lidc import FLAGS, crop, resample
from guided_diffusion.system import packages
from guided_diffusion.system.errors import InputError

pytest.importorskip("pydicom")

A, B, OTHER, X_RAY = "1.9.1", "1.9.2", "1.9.3", "1.9.4"
POSITIONS = [0, 2.5, 5, 5, 7.5, 10, 12.5]  # of the slices of A, mm; one is there twice
LEFT, RIGHT = box(20, 20, 25, 25), box(26, 20, 31, 25)  # lesions side by side, whose outlines cross
# what is on A: (nodule, number of it, reader) -> outlines (points, inclusion) by slice
MARKS = {
    ("round", 1, 0): {1: [(box(5, 5, 12, 12), True)], 2: [(box(5, 5, 12, 12), True)], 3: [(box(6, 5, 12, 12), True)]},
    ("round", 1, 1): {2: [(box(5, 5, 12, 12), True), (box(7, 7, 8, 9), False)]},
    ("round", 1, 2): {3: [(box(5, 5, 8, 8), True), (box(10, 9, 12, 12), True)]},
    ("round", 1, 3): {2: [([(4, 4), (13, 4), (13, 13), (4, 13)], True)]},  # open, and with gaps
    ("edge", 2, 0): {2: [(box(44, 30, 47, 39), True)]},
    ("left", 3, 0): {4: [(LEFT, True)]},
    ("right", 4, 0): {4: [(RIGHT, True)]},
    ("left", 3, 1): {4: [(box(20, 20, 25, 24), True)]},
    ("right", 4, 1): {4: [(RIGHT, True)]},
    ("right", 4, 2): {4: [(box(27, 21, 31, 25), True)]},
    ("pair", 5, 1): {5: [(box(30, 5, 35, 9), True)]},
    ("pair", 5, 3): {4: [([(32, 7)], True)], 5: [(box(30, 4, 34, 9), True)]},
    ("point", None, 3): {5: [([(20, 35)], True)]},
    ("unrated", 6, 1): {6: [(box(36, 30, 38, 33), True)]},
    ("unrated", 6, 2): {6: [(box(36, 30, 38, 32), True)]},
}


def session(reader, ratings=3):
    """The XML of what a reader marked on A."""
    texts = [nodule(f"{name}-{reader}", *(roi(f"{A}.{place + 1}", points, inclusion)
                                          for place, outlines in marks.items() for points, inclusion in outlines),
                    ratings=3 if name != "unrated" else {1: 0, 2: None}[who])
             for (name, _, who), marks in MARKS.items() if who == reader]
    return "".join(texts) + non_nodule(f"{A}.1", 3, 3)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """The folder, and the stored pixels of each slice of A and B."""
    folder = tmp_path_factory.mktemp("lidc")
    mixed = folder / "LIDC-IDRI-0001" / "1.2.3" / "both"
    pixels = {A: write_series(mixed, A, POSITIONS), B: write_series(mixed, B, [0, 2, 4])}
    (mixed / "069.xml").write_text(reading(A, *map(session, range(4))))
    (mixed / "LICENSE").write_text("CC BY 3.0")
    drawn = [nodule(str(reader), roi(f"{B}.2", box(10, 10, 14 + reader, 15))) for reader in range(8)]
    for name, sessions in (("a/1.xml", drawn[:2]), ("b/2.xml", drawn[2:]), ("c/3.xml", drawn[:2])):
        (folder / name).parent.mkdir()
        (folder / name).write_text(reading(B, *sessions))
    write_series(folder / "other", OTHER, [0, 2], patient="Jane-1950")
    (folder / "other" / "1.xml").write_text(reading(OTHER, nodule("1", roi(f"{OTHER}.1", box(3, 3, 6, 6)))))
    write_slice(folder / "x-ray" / "1.dcm", X_RAY, f"{X_RAY}.1", 0, 1, modality="DX")
    (folder / "x-ray" / "1.xml").write_text(reading(X_RAY, root="IdriReadMessage", namespace="http://www.nih.gov/idri"))
    return folder, pixels


@pytest.fixture
def copy(study, tmp_path):
    """A copy of the study, to be broken."""
    return shutil.copytree(study[0], tmp_path / "copy")


def prepare(folder, **flags):
    """(cases by name, what is left out) of a folder."""
    source = SOURCES["lidc"](folder, **{flag.name: flag.default for flag in FLAGS} | flags)
    cases, left_out = {}, []
    for unit in source.units():
        try:
            items = [unit] if isinstance(unit, LeftOut) else list(source.cases(unit))
        except InputError as error:
            items = [LeftOut(unit.name, str(error))]
        for item in items:
            if isinstance(item, PreparedCase):
                assert item.name not in cases
                cases[item.name] = item
            else:
                left_out.append(item)
    return cases, left_out


def lesions(number, place):
    """What the four readers drew of a nodule on a slice of A, [4, H, W]."""
    raters = np.zeros((4, *SIZE), bool)
    for (_, which, reader), marks in MARKS.items():
        if which == number and place in marks:
            raters[reader] |= flooded(SIZE, *marks[place])
    return raters


def grey(stored, low=-1000, high=400):
    units = stored.astype(float) * lidc.SLOPE + lidc.INTERCEPT
    return (np.clip((units - low) / (high - low), 0, 1) * 65535).round()


MARKED = [(1, 1), (1, 2), (1, 3), (2, 2), (3, 4), (4, 4), (5, 5), (6, 6)]  # (nodule, slice) of A


def test_a_case_is_a_nodule_on_a_slice_with_the_lesion_of_each_reader(study):
    folder, pixels = study
    cases, _ = prepare(folder, size=24)
    names = {f"LIDC-IDRI-0001-s1-n{number:02}-{place:04}": (number, place) for number, place in MARKED}
    assert {name for name in cases if name.startswith("LIDC-IDRI-0001-s1")} == names.keys()
    for name, (number, place) in names.items():
        top, left = np.add(cases[name].facts["top_left"], 24)
        window = np.s_[..., top:top + 24, left:left + 24]
        around = (24, 24), (24, 24)
        assert np.array_equal(cases[name].raters, np.pad(lesions(number, place), ((0, 0), *around))[window]), name
        assert cases[name].image.dtype == np.uint16
        assert np.array_equal(cases[name].image[0], np.pad(grey(pixels[A][place]), around)[window]), name
    assert cases["LIDC-IDRI-0001-s1-n01-0002"].facts["top_left"] == [-3, -3]  # the nodule's centre is at 8.5, 8.5
    assert not lesions(2, 2)[1:].any()  # who did not mark it has an empty mask


def test_a_whole_slice_has_all_that_its_readers_drew(study):
    folder, pixels = study
    cases, _ = prepare(folder, size=0)
    assert sorted(cases) == [*(f"LIDC-IDRI-0001-s1-{place:04}" for place in range(1, 7)), "LIDC-IDRI-0001-s2-0001",
                           "patient-0001-s1-0000"]
    for place in range(1, 7):
        case = cases[f"LIDC-IDRI-0001-s1-{place:04}"]
        numbers = [number for number, other in MARKED if other == place]
        assert case.facts["nodules"] == numbers
        assert np.array_equal(case.raters, np.any([lesions(number, place) for number in numbers], axis=0))
        assert np.array_equal(case.image, [grey(pixels[A][place])])


def test_the_manifest_says_what_was_taken_and_merged(study):
    cases, _ = prepare(study[0])
    facts = cases["LIDC-IDRI-0001-s1-n03-0004"].facts
    assert facts["series"] == A and facts["image_uid"] == f"{A}.5" and facts["slice"] == 4
    assert facts["spacing"] == list(lidc.SPACING) and facts["window"] == [-1000, 400] and facts["position"] == 7.5
    assert facts["xml"] == "069.xml" and facts["sessions"] == 4
    assert facts["marked_by"] == [0, 1] and facts["tolerance"] == 2.5
    said = facts["merges"].split("; ")
    assert said[0] == "0:left-0 + 1:left-1 (0 mm apart, IoU 0.83)" and len(said) == 5
    assert all(" not " in words and "right" in words for words in said[1:])
    assert "Doe" not in str(cases) and "Jane" not in str(cases)


def test_all_readings_of_a_series_are_taken_but_a_copy(study):
    cases, left_out = prepare(study[0], size=0)
    case = cases["LIDC-IDRI-0001-s2-0001"]
    assert case.raters.sum((1, 2)).tolist() == [6 * (5 + reader) for reader in range(8)]
    assert case.facts["sessions"] == 8 and case.facts["xml"] == "1.xml; 2.xml"
    assert LeftOut("c/3.xml", "says the same as a/1.xml") in left_out
    few, _ = prepare(study[0], size=0, max_raters=3)
    assert np.array_equal(few["LIDC-IDRI-0001-s2-0001"].raters, case.raters[:3])


def test_an_x_ray_is_listed(study):
    _, left_out = prepare(study[0])
    assert {each.what: each.reason for each in left_out} == {
        "x-ray/1.xml": "is the reading of an X-ray, not of a CT", "c/3.xml": "says the same as a/1.xml",
        f"series {X_RAY}": "is of the modality DX, not a CT"}


def test_other_patients_than_the_source_numbers_get_a_number(study):
    source = SOURCES["lidc"](study[0], **{flag.name: flag.default for flag in FLAGS})
    units = [unit for unit in source.units() if not isinstance(unit, LeftOut)]
    assert {unit.name: unit.patient for unit in units} == {
        "patient-0001-s1": "patient-0001", "LIDC-IDRI-0001-s1": "LIDC-IDRI-0001", "LIDC-IDRI-0001-s2": "LIDC-IDRI-0001"}


def test_one_slice_a_nodule_is_that_of_the_largest_area(study):
    cases, _ = prepare(study[0], slices="largest")
    assert [name[-8:] for name in cases if "0001-s1-" in name and "LIDC" in name] == [
        "n01-0002", "n02-0002", "n03-0004", "n04-0004", "n05-0005", "n06-0006"]


def test_nodules_without_characteristics_count_unless_told(study):
    cases, left_out = prepare(study[0], unrated=False)
    assert not [name for name in cases if "-n06-" in name]
    assert [each.reason for each in left_out if "characteristics" in each.reason] == [
        f"nodule unrated-{reader} of reader {reader} has no characteristics, or zeros; --unrated True counts it"
        for reader in (1, 2)]


def test_single_points_count_as_marks_if_told(study):
    cases, _ = prepare(study[0], point_marks=True, size=0)
    assert cases["LIDC-IDRI-0001-s1-0004"].facts["nodules"] == [3, 4, 5]  # the point of the pair's third reader
    assert cases["LIDC-IDRI-0001-s1-0004"].facts["marked_by"] == [0, 1, 2, 3]
    assert np.array_equal(cases["LIDC-IDRI-0001-s1-0004"].raters, lesions(3, 4) | lesions(4, 4))
    alone = [case for case in prepare(study[0], point_marks=True)[0].values() if "point-3" in case.facts["merges"]]
    assert len(alone) == 1 and not alone[0].raters.any() and alone[0].facts["marked_by"] == [3]


def test_slices_before_and_after_are_channels(study):
    folder, pixels = study
    cases, _ = prepare(folder, context=2, size=0)
    stored = pixels[A]
    expected = {1: [0, 0, 1, 2, 4], 2: [0, 1, 2, 4, 5], 3: [0, 1, 3, 4, 5], 6: [4, 5, 6, 6, 6]}  # 2 and 3 are at 5 mm
    for place, places in expected.items():
        assert np.array_equal(cases[f"LIDC-IDRI-0001-s1-{place:04}"].image, [grey(stored[each]) for each in places])


def test_a_window_and_a_spacing_are_applied(study):
    folder, pixels = study
    cases, _ = prepare(folder, window="-200,100", spacing=0.5, size=0)
    case = cases["LIDC-IDRI-0001-s1-0002"]
    assert case.image.shape == (1, 60, 48) and case.raters.shape == (4, 60, 48)  # 40 rows of 0.75 mm
    assert case.facts["spacing"] == [0.5, 0.5] and case.facts["window"] == [-200, 100]
    rows = grey(pixels[A][2], -200, 100)  # row 1 of those of 0.5 mm lies in the middle of rows 0 and 1 of 0.75 mm
    assert np.abs(case.image[0, 1::3] - (rows[::2] + rows[1::2]) / 2).max() <= 1
    cropped, _ = prepare(folder, spacing=0.5, size=24)
    top, left = cropped["LIDC-IDRI-0001-s1-n01-0002"].facts["top_left"]
    assert (top, left) == (1, -3)  # row 8.5 of 0.75 mm is at 13.5 of those of 0.5 mm's 13.25


def test_resampling_keeps_what_is_linear_in_its_place():
    ramp = np.tile(np.arange(0, 40000, 1000, dtype=np.uint16), (30, 1))  # [30, 40]
    half = resample(ramp, (1.0, 1.0), 0.5)
    assert half.shape == (60, 80) and half.dtype == np.uint16
    assert np.array_equal(half[0, 1:-1], (np.arange(1, 79) * 500 - 250))
    odd = resample(ramp, (1.0, 1.0), 0.7)  # new pixel j has its middle at 0.7 (j + 0.5) - 0.5
    assert odd.shape == (42, 57) and np.abs(odd[5, 1:-1] - (0.7 * (np.arange(1, 56) + 0.5) - 0.5) * 1000).max() <= 1
    assert np.array_equal(resample(ramp, (0.7, 0.7), 0.7), ramp)


def test_a_crop_is_padded_beyond_the_edge():
    pixels = np.arange(1, 13).reshape(1, 3, 4)
    assert crop(pixels, -1, 2, 3).tolist() == [[[0, 0, 0], [3, 4, 0], [7, 8, 0]]]
    assert not crop(pixels, 10, 0, 2).any()


# ---- what is broken ----

def test_pixels_without_their_decoder_leave_out_their_cases(copy, whole):
    pydicom = pytest.importorskip("pydicom")
    path, = series_files(copy, "002")
    data = pydicom.dcmread(path)
    data.file_meta.TransferSyntaxUID = pydicom.uid.JPEGLSLossless
    data.PixelData = pydicom.encaps.encapsulate([b"\xff\xd8\xff\xf7" + bytes(40)])
    data.save_as(path)
    cases, left_out = prepare(copy)
    assert len(cases) == len(whole) - 1
    assert one_line(left_out, "slice 1", path.name, "pixels cannot be decoded", "pip install pylibjpeg")



def one_line(left_out, *words):
    found = [each for each in left_out if all(word in f"{each.what}: {each.reason}" for word in words)]
    assert len(found) == 1 and "\n" not in found[0].reason, left_out
    return True


def rest(cases):
    return {name for name in cases if not name.startswith("LIDC-IDRI-0001-s1-")}


@pytest.fixture(scope="module")
def whole(study):
    return prepare(study[0])[0].keys()


def series_files(folder, number=None):
    return sorted((folder / "LIDC-IDRI-0001" / "1.2.3" / "both").glob(f"{A}-{number or '*'}.dcm"))


def test_dicom_without_xml_and_xml_without_dicom(copy, whole):
    (copy / "LIDC-IDRI-0001" / "1.2.3" / "both" / "069.xml").unlink()
    shutil.rmtree(copy / "other")
    (copy / "lost.xml").write_text(reading("1.9.9"))
    cases, left_out = prepare(copy)
    assert cases.keys() == {"LIDC-IDRI-0001-s2-n01-0001"}
    assert one_line(left_out, A, "no XML file names it", "--xml")
    assert one_line(left_out, "lost.xml", "names the series 1.9.9, which is not there; download it")


def test_xml_files_may_lie_in_a_folder_of_their_own(copy, whole, tmp_path):
    moved = tmp_path / "xml"
    moved.mkdir()
    for number, path in enumerate(sorted(copy.rglob("*.xml"))):
        path.rename(moved / f"{number}.xml")
    assert prepare(copy, xml=str(moved))[0].keys() == whole
    shutil.move(moved, copy / "xml")
    assert prepare(copy, xml=str(copy / "xml"))[0].keys() == whole


def test_a_missing_slice_leaves_out_its_cases(copy, whole):
    series_files(copy, "006")[0].unlink()
    cases, left_out = prepare(copy)
    assert len(cases) == len(whole) - 1 and f"{A}.6" not in {case.facts["image_uid"] for case in cases.values()}
    assert one_line(left_out, f"the slice {A}.6 is marked, but missing; download the series again")
    _, left_out = prepare(copy, context=1)
    assert one_line(left_out, "slice 4: a slice is missing within 1 of it")
    assert one_line(left_out, "slice 5: a slice is missing within 1 of it")


@pytest.mark.parametrize("options, words", [
    ({"spacing": (0.75, 0.6)}, "differ in size or in the spacing of pixels"),
    ({"pixels": np.zeros((40, 40), np.int16)}, "differ in size or in the spacing of pixels"),
    ({"orientation": (0, 1, 0, 1, 0, 0)}, "differ in orientation")])
def test_a_series_of_mixed_slices_is_left_out(copy, whole, options, words):
    write_slice(series_files(copy)[3], A, f"{A}.4", 5, 4, **options)
    cases, left_out = prepare(copy)
    assert cases.keys() == rest(whole) and one_line(left_out, "LIDC-IDRI-0001-s1", words)


def test_a_series_that_is_not_axial_is_left_out(copy, whole):
    for number, path in enumerate(series_files(copy), 1):
        write_slice(path, A, f"{A}.{number}", number, number, orientation=(1, 0, 0, 0, 0, -1))
    cases, left_out = prepare(copy)
    assert cases.keys() == rest(whole) and one_line(left_out, "LIDC-IDRI-0001-s1", "is not axial")


def test_an_outline_off_its_slice_leaves_out_the_slice(copy, whole):
    path = copy / "LIDC-IDRI-0001" / "1.2.3" / "both" / "069.xml"
    path.write_text(path.read_text().replace("<xCoord>48</xCoord>", "<xCoord>60</xCoord>"))
    cases, left_out = prepare(copy)
    assert {case.facts["slice"] for name, case in cases.items() if "LIDC-IDRI-0001-s1" in name} == {1, 3, 4, 5, 6}
    assert one_line(left_out, "slice 2: nodule edge-0 of reader 0: an outline leaves its slice of 48 x 40 pixels")


@pytest.mark.parametrize("size, words", [(100, "is no DICOM, or cut short"), (500, "is damaged"),
                                         (-100, "is damaged")])
def test_a_truncated_slice_leaves_out_its_cases(copy, whole, size, words):
    path, = series_files(copy, "002")
    path.write_bytes(path.read_bytes()[:size])
    cases, left_out = prepare(copy)
    assert one_line(left_out, path.name, words)
    assert rest(cases) == rest(whole) and len(cases) == len(whole) - 1


@pytest.mark.parametrize("damage, words", [
    (lambda text: text[:150], "is damaged or cut short"),
    (lambda text: text[:-300], "is damaged or cut short"),
    (lambda text: text.replace("<inclusion>TRUE", "<inclusion>", 1), "points and the inclusion ''"),
    (lambda text: text.replace("<yCoord>4</yCoord>", "", 1), "a edgeMap has no yCoord"),
    (lambda text: text.replace("LidcReadMessage", "Message").replace("SeriesInstanceUid", "Uid"),
     "is no LidcReadMessage")])
def test_a_damaged_xml_leaves_out_its_series(copy, whole, damage, words):
    path = copy / "LIDC-IDRI-0001" / "1.2.3" / "both" / "069.xml"
    path.write_text(damage(path.read_text()))
    cases, left_out = prepare(copy)
    assert rest(cases) == rest(whole) == cases.keys() and one_line(left_out, "069.xml", words)


def test_a_slice_that_is_there_twice_is_taken_once(copy, whole):
    shutil.copy(series_files(copy)[1], copy / "again.dcm")
    cases, left_out = prepare(copy)
    assert cases.keys() == whole and one_line(left_out, "again.dcm", "is the same slice as")


def test_a_folder_of_other_things_is_refused_and_flags_are_checked(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(InputError, match="holds neither DICOM nor XML files"):
        prepare(tmp_path)
    with pytest.raises(InputError, match="INPUT .*none: is no folder"):
        prepare(tmp_path / "none")
    with pytest.raises(InputError, match="--xml none: is no folder"):
        prepare(tmp_path, xml="none")
    with pytest.raises(InputError, match="--spacing 0.001: must be 0, or at least"):
        prepare(tmp_path, spacing=0.001)
    for window in ("400,-1000", "1", "a,b", "0,inf", "nan,1"):
        with pytest.raises(InputError, match="--window"):
            prepare(tmp_path, window=window)


def test_pydicom_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    monkeypatch.setattr(packages, "is_installed", lambda package: False)
    with pytest.raises(InputError, match="pip install pydicom"):
        prepare(tmp_path)
