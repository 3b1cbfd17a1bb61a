"""What is random about an example follows from seed and place, about a member from seed, case and number."""

import numpy as np
import pytest
import torch

from guided_diffusion.data.noise import MemberNoise, draw_rater, seed_dropout, spread_noise, step_noise


def test_noise_follows_from_seed_case_and_number_alone():
    shape = torch.empty(1, 1, 8, 8)
    alone = MemberNoise(3, [("b", 1)])
    first, second = alone(shape), alone(shape)
    among = MemberNoise(3, [("a", 0), ("b", 0), ("b", 1), ("c", 1)])
    for expected in (first, second):
        assert torch.equal(among(torch.empty(4, 1, 8, 8))[2:3], expected)
    assert not torch.equal(first, second)
    for seed, member in ((4, ("b", 1)), (3, ("b", 2)), (3, ("a", 1)), (3, ("", "b1"))):
        assert not torch.equal(MemberNoise(seed, [member])(shape), first)


def test_noise_is_standard_normal_and_takes_the_dtype_asked_for():
    noise = MemberNoise(0, [("a", i) for i in range(100)])(torch.empty(100, 1, 32, 32))
    assert abs(noise.mean()) < 5 / np.sqrt(noise.numel()) and abs(noise.var() - 1) < 5 * np.sqrt(2 / noise.numel())
    assert MemberNoise(0, [("a", 1)])(torch.empty(1, 1, 2, 2, dtype=torch.float64)).dtype == torch.float64


def test_raters_are_drawn_uniformly_and_afresh_at_every_place():
    raters, visits = 4, 20_000
    drawn = np.array([draw_rater(0, place, raters) for place in range(visits)])
    expected = visits / raters
    assert np.abs(np.bincount(drawn) - expected).max() < 5 * np.sqrt(expected * (1 - 1 / raters))
    for apart in (1, 5):  # neither the next example nor the next visit in an epoch of 5 repeats one more often
        repeats = (drawn[apart:] == drawn[:-apart]).mean()
        assert abs(repeats - 1 / raters) < 5 * np.sqrt(raters - 1) / raters / np.sqrt(visits)
    assert [draw_rater(1, place, raters) for place in range(50)] != drawn[:50].tolist()


def test_the_noise_of_a_step_follows_from_seed_and_place_whatever_its_batch():
    like = torch.empty(3, 1, 8, 8)
    uniforms, noise = step_noise(7, [4, 5, 6], like)
    assert all(0 <= u < 1 for u in uniforms) and len(set(uniforms)) == 3
    alone = step_noise(7, [5], like[:1])
    assert alone[0] == uniforms[1:2] and torch.equal(alone[1], noise[1:2])
    for seed, place in ((8, 5), (7, 6)):
        other = step_noise(seed, [place], like[:1])
        assert other[0] != alone[0] and not torch.equal(other[1], alone[1])


def test_the_randomness_of_a_step_is_that_of_earlier_versions():
    uniforms, noise = step_noise(3, [10, 11], torch.empty(2, 1, 2, 1))
    seed_dropout(3, 10)
    assert torch.rand(2).tolist() == pytest.approx([0.8120242357254028, 0.3169823884963989])
    assert [draw_rater(3, place, 4) for place in range(10, 18)] == [2, 2, 2, 3, 1, 2, 3, 0]
    assert uniforms == [0.459646544063218, 0.8385906306895627]
    assert noise.flatten().tolist() == pytest.approx(
        [0.6585034132003784, -0.45953765511512756, -0.12392956763505936, -1.3362317085266113])


def test_spread_members_are_points_of_one_sequence_a_case():
    """Whatever batch a member is in, and however long the ensemble."""
    whole = spread_noise(3, [("a", i) for i in range(16)], 5)
    assert whole.shape == (16, 5) and whole.dtype == torch.float32
    mixed = spread_noise(3, [("b", 2), ("a", 7), ("a", 0), ("b", 2)], 5)
    assert torch.equal(mixed[[1, 2]], whole[[7, 0]]) and torch.equal(mixed[0], mixed[3])
    for other in (spread_noise(4, [("a", 7)], 5), spread_noise(3, [("b", 7)], 5)):
        assert not torch.isclose(other[0], whole[7]).any()


def test_each_spread_member_is_normal_over_seeds():
    for member in (0, 1, 5):
        values = np.sort(np.concatenate([spread_noise(seed, [("a", member)], 4).numpy() for seed in range(500)]), 0)
        assert np.isfinite(values).all()
        uniform = normal_share(values)  # [500, 4], sorted
        distance = np.abs(uniform - (np.arange(500)[:, None] + 0.5) / 500).max(0)
        assert (distance < 1.9 / np.sqrt(500)).all()  # Kolmogorov-Smirnov, one in a thousand
        assert np.abs(np.corrcoef(np.stack([spread_noise(s, [("a", member)], 4)[0] for s in range(500)]).T)
                      - np.eye(4)).max() < 5 / np.sqrt(500)


def test_the_first_powers_of_two_fill_all_parts_of_each_number_alike():
    for count in (2, 4, 16, 64):
        uniform = normal_share(spread_noise(1, [("a", i) for i in range(count)], 6).double().numpy())
        assert (np.sort((uniform * count).astype(int), 0) == np.arange(count)[:, None]).all()


def normal_share(values):
    return torch.special.ndtr(torch.from_numpy(np.asarray(values, np.float64))).numpy()
