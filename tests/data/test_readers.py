"""A file format is one file with one entry of READERS: all that reads files goes by it."""

import sys

import numpy as np
import pytest
from helpers.refusals import refusal

from guided_diffusion import Segmenter
from guided_diffusion.data.case_files import find_cases, read_case
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.readers import READERS
from guided_diffusion.data.readers.base import Reader, Readers, Scan, foreground, refuse_unused
from guided_diffusion.scoring.ensemble_folder import EnsembleFolder, read_scored_case
from guided_diffusion.system.errors import InputError
from guided_diffusion.system.flag import Flag
from guided_diffusion.system.registry import load_plugin

SIZE = 16
RAW = '''
import json
import numpy as np
from guided_diffusion.data.readers import READERS
from guided_diffusion.data.readers.base import Reader, Scan
from guided_diffusion.system.flag import Flag

@READERS.add("raw", "arrays of CT numbers", [Flag("hu_width", float, 400.0, "width of the window, in HU", "data")])
class Raw(Reader):
    suffixes = ".ct.npz",

    def __init__(self, hu_width):
        self.window = hu_width

    def read(self, path):
        with np.load(path) as file:
            pixels = np.clip(file["hu"] / self.window, 0, 1)
            return Scan(pixels[None], tuple(file["mm"].tolist()), {"id": str(file["id"])})

    def read_mask(self, path):
        with np.load(path) as file:
            return file["label"] == 1
'''


@pytest.fixture
def own_readers():
    """Entries that a test adds are gone after it."""
    known = dict(READERS.entries)
    yield
    READERS._entries.clear()
    READERS._entries.update(known)


@pytest.fixture
def raw(own_readers, tmp_path):
    """A folder of two cases in a format of the user's, and what they hold."""
    (tmp_path / "raw.py").write_text(RAW)
    load_plugin(str(tmp_path / "raw.py"))
    rng = np.random.default_rng(0)
    hu, labels = rng.uniform(-100, 500, (2, 20, 20)), rng.integers(0, 2, (2, 3, 20, 20))
    for i, name in enumerate(("a", "b")):
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        np.savez(folder / "image_0.CT.npz", hu=hu[i], mm=np.array([0.5, 0.7]), id=name * 3)
        for rater, label in enumerate(labels[i]):
            np.savez(folder / f"label{rater}_.ct.npz", label=label)
    yield tmp_path / "data", hu, labels
    del sys.modules["guided_diffusion_plugin_raw"]


def test_a_format_of_the_users_is_read_with_its_flags_spacing_and_facts(raw):
    folder, hu, labels = raw
    for options, window in (({}, 400), ({"hu_width": 250.0, "lr": 1}, 250)):
        cases = SegmentationCases(folder, 20, 1, options=options)
        for i, case in enumerate(cases):
            assert np.abs(case.image[0] - np.clip(hu[i] / window, 0, 1)).max() < 1e-5
            assert np.array_equal(case.raters, labels[i])
        assert cases.readers_used == {"raw"} and [case.name for case in cases] == ["a", "b"]
    assert cases.facts(1) == ((0.5, 0.7), {"id": "bbb"})
    assert SegmentationCases(folder, 10, fit="crop").facts(0).spacing == (0.5, 0.7)
    assert SegmentationCases(folder, 10, fit="resize").facts(0).spacing == (0.5, 0.7)  # that of masks, put back


def test_cases_decoded_with_other_flags_are_decoded_again(raw, monkeypatch):
    folder, hu, _ = raw
    monkeypatch.setattr("guided_diffusion.data.cases.MEMORY_BYTES", 0)
    for window in (400.0, 250.0):
        case = SegmentationCases(folder, 20, 1, options={"hu_width": window})[0]
        assert np.abs(case.image[0] - np.clip(hu[0] / window, 0, 1)).max() < 1e-5


def test_the_python_door_takes_the_spacing_of_the_file(raw, trained):
    folder, hu, labels = raw
    segmenter = Segmenter.load(trained, device="cpu")
    ensemble = segmenter.sample(folder / "b", 2, 2, fit="resize", options={"hu_width": 250.0})
    assert ensemble.spacing == (0.5, 0.7) and ensemble.info == {"id": "bbb"} and ensemble.masks.shape == (2, 20, 20)
    assert ensemble.name == "b" and len(ensemble.raters) == 3
    assert ensemble.image.mean() == pytest.approx(np.clip(hu[1] / 250, 0, 1).mean(), abs=0.01)
    alone = segmenter.sample(folder / "b" / "image_0.CT.npz", 2, 2, fit="resize", spacing=(2, 2))
    assert alone.name == "image_0" and alone.spacing == (2, 2)
    assert "--hu_width 3" in refusal(segmenter.sample, np.zeros((16, 16)), 2, 2, options={"hu_width": 3})


def test_masks_of_an_ensemble_may_be_of_that_format(raw):
    folder, _, labels = raw
    members = EnsembleFolder(folder, "{case}/label{i}_.ct.npz").find(["a"])
    _, raters, predictions = read_scored_case(find_cases(folder)[0], members["a"], "error")
    assert np.array_equal(raters, labels[0]) and np.array_equal(predictions, labels[0])


def test_flags_of_readers_that_no_file_needs_are_refused(raw):
    refuse_unused({"hu_width": 3.0}, {"raw", "pictures"}, "data")
    refuse_unused({"hu_width": 400.0, "lr": 1}, {"pictures"}, "data")
    message = refusal(refuse_unused, {"hu_width": 3.0}, {"pictures"}, "./data")
    assert message == "--hu_width 3.0: is a flag of the reader raw, which no file of ./data needs; leave it away"


def test_the_longest_suffix_counts_in_letters_of_any_size(own_readers, tmp_path):
    for name, ending in (("long", ".x.gz"), ("short", ".gz")):
        READERS.add(name)(type(name, (Pixels,), {"suffixes": (ending,)}))
    readers = Readers()
    paths = {path: tmp_path / path for path in ("a.b.X.GZ", "a.gz", "x.gz", "gz", "a.x", "label0.Jpg")}
    assert [readers.name_of(path) for path in paths.values()] == ["long", "short", "short", None, None, "pictures"]
    assert [readers.stem_of(path) for path in paths.values()] == ["a.b", "a", "x", "gz", "a.x", "label0"]


def test_two_readers_of_one_suffix_are_refused_by_their_files(raw, tmp_path):
    READERS.add("other")(type("Other", (Pixels,), {"suffixes": (".ct.npz",)}))
    message = refusal(Readers)
    assert "*.ct.npz" in message and str(tmp_path / "raw.py") in message and __file__ in message


class Pixels(Reader):
    """Files that hold what `pixels` says."""

    suffixes, pixels, spacing = (".test",), np.ones((1, 2, 2), np.uint8), None

    def read(self, path):
        if isinstance(self.pixels, Exception):
            raise self.pixels
        return Scan(self.pixels, self.spacing, {})


@pytest.mark.parametrize("pixels, words", [
    (np.ones((2, 2), np.uint8), "gives pixels [2, 2], not [channels, rows, columns]"),
    (np.full((1, 2, 2), -3, np.int16), "gives int16 from -3 to -3, not uint8, uint16 or floats in [0, 1]"),
    (np.full((1, 2, 2), 1.5), "gives float64 from 1.5 to 1.5"), (np.full((1, 2, 2), np.nan), "not all of them finite"),
    (KeyError("hu"), "cannot be read (KeyError: 'hu'); replace it or remove its case"),
    (InputError("image_0.test: is of the future"), "image_0.test: is of the future"),
])
def test_what_a_reader_cannot_read_or_gives_wrongly_is_named(own_readers, tmp_path, pixels, words):
    READERS.add("test")(type("Test", (Pixels,), {"pixels": pixels}))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "image_0.test").touch()
    message = refusal(SegmentationCases, tmp_path, 2, need_labels=False)
    assert "image_0.test: " in message and words in message


def test_images_of_a_case_must_agree_in_their_spacing(own_readers, tmp_path):
    READERS.add("test")(type("Test", (Pixels,), {"spacing": (0.5, 2)}))
    READERS.add("unspaced")(type("Test", (Pixels,), {"suffixes": (".none",)}))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "image_0.test").touch()
    (tmp_path / "a" / "image_1.none").touch()
    message = refusal(read_case, find_cases(tmp_path)[0], need_labels=False)
    assert message == (f"{tmp_path / 'a' / 'image_1.none'}: its pixels are of unknown distance, but those of the first"
                       f" image of its case, image_0.test, are 0.5 x 2 mm; give all the same spacing")


def test_labels_are_cut_at_half_of_full_scale_in_any_channel(tmp_path):
    floats = np.array([[[0.2, 0.51]], [[0.6, 0.0]], [[0.0, 0.5]]])
    assert foreground(floats, tmp_path).tolist() == [[True, True]]
    assert "its brightest value is 0.4 of 1" in refusal(foreground, np.full((1, 2, 2), 0.4), tmp_path)
    assert not foreground(np.zeros((1, 2, 2)), tmp_path).any()


def test_the_flags_of_readers_are_known(raw):
    assert READERS.flags() == [Flag("hu_width", float, 400.0, "width of the window, in HU", "data")]
