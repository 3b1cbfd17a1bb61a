"""Phantoms: a known distribution over outlines, and files that hold it."""


import numpy as np
import pytest
from helpers.files import ROOT
from PIL import Image

from guided_diffusion.data.phantoms import (
    CHOICES,
    choice_probabilities,
    load_truth,
    make_phantom,
    write_case,
    write_cases,
)
from guided_diffusion.system.errors import InputError

EXAMPLES = {"training": (24, 3), "testing": (8, 8)}  # folder: (cases, seed), as in scripts/make_phantoms.py


@pytest.fixture(scope="module")
def phantoms():
    return [make_phantom(7, index) for index in range(200)]


def read_labels(folder):
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.glob("label*_.jpg"))])


def number_of_distinct(masks):
    return len({mask.tobytes() for mask in masks})


def same(a, b):
    return (np.array_equal(a.image, b.image) and np.array_equal(a.outlines, b.outlines)
            and np.array_equal(a.probabilities, b.probabilities) and a.features == b.features)


def test_phantom_depends_on_seed_and_index_only(phantoms):
    assert same(make_phantom(7, 5), phantoms[5])
    assert not same(make_phantom(7, 6), phantoms[5])
    assert not same(make_phantom(8, 5), phantoms[5])


def test_outlines_are_distinct_and_probabilities_sum_to_one(phantoms):
    for phantom in phantoms:
        count = len(phantom.outlines)
        assert 1 <= count <= 12 and phantom.probabilities.shape == (count,)
        assert number_of_distinct(phantom.outlines) == count
        assert abs(phantom.probabilities.sum() - 1) < 1e-12
        assert (np.diff(phantom.probabilities) <= 0).all()


def test_mean_is_the_probability_weighted_outline(phantoms):
    for phantom in phantoms[:20]:
        expected = sum(p * outline for p, outline in zip(phantom.probabilities, phantom.outlines))
        assert phantom.mean.dtype == np.float64
        np.testing.assert_allclose(phantom.mean, expected, atol=1e-12)


def test_experts_draw_outlines_as_often_as_stated():
    n = 20_000
    for index in range(5):
        phantom = make_phantom(7, index, size=32)
        drawn = phantom.draw(n, np.random.default_rng(0))
        assert drawn.shape == (n, 32, 32) and drawn.dtype == bool
        keys, p = [outline.tobytes() for outline in phantom.outlines], phantom.probabilities
        counts = dict.fromkeys(keys, 0)
        for mask in drawn:
            counts[mask.tobytes()] += 1
        frequency = np.array([counts[key] for key in keys]) / n
        assert (np.abs(frequency - p) <= 5 * np.sqrt(p * (1 - p) / n)).all()


def test_probability_of_an_empty_outline_is_the_chance_of_not_marking(phantoms):
    for phantom in phantoms:
        empty = phantom.probabilities[~phantom.outlines.any((1, 2))].sum()
        assert empty == pytest.approx(1 - choice_probabilities(phantom.features)["mark"], abs=0.02)


def test_an_expert_is_undecided_at_the_midpoint_of_a_choice():
    features = {feature: midpoint for feature, midpoint, _ in CHOICES.values()}
    assert choice_probabilities(features) == pytest.approx(dict.fromkeys(CHOICES, 0.5))


@pytest.mark.parametrize("size", [128, 64])
def test_outlines_lie_in_the_central_half_with_two_pixels_to_spare(size):
    inner = slice(size // 4 + 2, 3 * size // 4 - 2)
    for index in range(200):
        outlines = make_phantom(7, index, size).outlines
        assert outlines[:, inner, inner].sum() == outlines.sum() > 0


def test_small_phantoms_show_the_same_case(phantoms):
    for index in range(30):
        small = make_phantom(7, index, size=64)
        assert small.features == phantoms[index].features
        shrunk = phantoms[index].mean.reshape(64, 2, 64, 2).mean((1, 3))
        assert np.abs(small.mean - shrunk).sum() < 0.25 * shrunk.sum()


def test_contrasts_that_decide_are_visible_in_the_image(phantoms):
    core, halo = [], []  # pairs: grey levels above the lung as measured in the image, contrast as stated
    for phantom in phantoms:
        outlines = phantom.outlines[phantom.outlines.any((1, 2))]
        inner, outer = outlines.all(0), outlines.any(0)
        lung = np.median(phantom.image[34:94, 34:94][~outer[34:94, 34:94]])
        features = phantom.features
        core.append((phantom.image[inner].mean() - lung, features["core_contrast"]))
        if features["halo_contrast"] and not features["spicule_length"] and not features["vessel_ratio"]:
            halo.append((np.median(phantom.image[outer & ~inner]) - lung, features["halo_contrast"]))
    assert len(halo) > 15
    for measured, stated in (np.transpose(core), np.transpose(halo)):
        assert np.corrcoef(measured, stated)[0, 1] > 0.95


def test_most_phantoms_are_ambiguous_and_some_are_not(phantoms):
    likeliest = np.array([phantom.probabilities[0] for phantom in phantoms])
    assert (likeliest < 0.7).mean() > 0.35
    assert (likeliest > 0.95).mean() > 0.03
    empty = np.array([phantom.probabilities[~phantom.outlines.any((1, 2))].sum() for phantom in phantoms])
    assert ((empty > 0.1) & (empty < 0.9)).mean() > 0.15


def test_including_the_halo_changes_the_area_much():
    ratios = []
    for index in range(200):
        phantom = make_phantom(7, index)
        if phantom.features["halo_contrast"]:
            areas = phantom.outlines.sum((1, 2))
            ratios.append(areas[areas > 0].min() / areas.max())
    assert len(ratios) > 60 and 0.3 < np.quantile(ratios, 0.1) and np.quantile(ratios, 0.9) < 0.75


def test_labels_survive_jpeg_and_truth_survives_packing(phantoms, tmp_path):
    for index, phantom in enumerate(phantoms[:60]):
        write_case(tmp_path / str(index), phantom, 4, rng=index, number=index)
        labels = read_labels(tmp_path / str(index))
        assert np.array_equal(labels > 127, phantom.draw(4, index))
        assert np.minimum(labels, 255 - labels).max() < 64  # far from half of full scale
        outlines, probabilities = load_truth(tmp_path / str(index))
        assert outlines.dtype == bool and np.array_equal(outlines, phantom.outlines)
        assert np.array_equal(probabilities, phantom.probabilities)


def test_rewriting_a_case_with_fewer_raters_leaves_no_old_label(phantoms, tmp_path):
    write_case(tmp_path, phantoms[0], 4, rng=0)
    write_case(tmp_path, phantoms[0], 2, rng=0)
    assert len(read_labels(tmp_path)) == 2


def test_cases_added_later_equal_cases_made_at_once(tmp_path):
    write_cases(tmp_path / "once", 3, seed=1, size=32)
    write_cases(tmp_path / "later", 1, seed=1, size=32, first_index=2)
    for path in (tmp_path / "later" / "phantom-000002").iterdir():
        assert path.read_bytes() == (tmp_path / "once" / "phantom-000002" / path.name).read_bytes()


@pytest.mark.parametrize("split", EXAMPLES)
def test_example_data_are_what_the_generator_makes(split, tmp_path):
    count, seed = EXAMPLES[split]
    stored = sorted(path for path in (ROOT / "data" / split).iterdir() if path.is_dir())
    made = write_cases(tmp_path, count, seed)
    assert [path.name for path in stored] == [path.name for path in made]
    for old, new in zip(stored, made):
        for a, b in zip(load_truth(old), load_truth(new)):
            np.testing.assert_allclose(a, b, atol=1e-12)
        assert np.array_equal(read_labels(old) > 127, read_labels(new) > 127)
        image = f"image_{int(new.name[-6:])}.jpg"
        a, b = (np.array(Image.open(folder / image)).astype(int) for folder in (old, new))
        assert np.abs(a - b).max() <= 3


@pytest.mark.parametrize("split", EXAMPLES)
def test_example_data_show_agreement_disagreement_and_empty_labels(split):
    labels = [read_labels(folder) > 127 for folder in (ROOT / "data" / split).iterdir() if folder.is_dir()]
    silent = [int((~masks.any((1, 2))).sum()) for masks in labels]
    distinct = [number_of_distinct(masks) for masks in labels]
    assert min(silent) == 0 and any(0 < n < 4 for n in silent)
    assert min(distinct) == 1 and max(distinct) == 4


@pytest.mark.parametrize("size", [0, 16, 100])
def test_impossible_size_is_refused(size):
    with pytest.raises(InputError, match=f"size {size} "):
        make_phantom(0, 0, size)
