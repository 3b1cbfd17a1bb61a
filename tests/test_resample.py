"""Which timesteps training draws."""

import math

import numpy as np
import pytest
import torch

from guided_diffusion.resample import LossSecondMomentResampler, UniformSampler, create_named_schedule_sampler

JUST_BELOW_ONE = math.nextafter(1, 0)


def warmed_up(num_timesteps=8, history=3, seed=0, **kwargs):
    """A loss-aware sampler that has seen each timestep often enough, and the losses it saw last, [T, history]."""
    sampler = LossSecondMomentResampler(num_timesteps, history_per_term=history, **kwargs)
    rng = np.random.default_rng(seed)
    losses = rng.lognormal(0, 1.5, (num_timesteps, history + 4))
    for column in losses.T:
        order = rng.permutation(num_timesteps)
        sampler.update(torch.from_numpy(order), torch.from_numpy(column[order]))
    return sampler, losses[:, -history:]


def both():
    return [UniformSampler(8), warmed_up()[0]]


@pytest.mark.parametrize("sampler", both(), ids=["uniform", "loss-second-moment"])
def test_draws_follow_the_probabilities(sampler):
    n = 100_000
    t, _ = sampler.sample((np.arange(n) + 0.5) / n)  # evenly spread, so that shares are exact to 1 / n
    np.testing.assert_allclose(np.bincount(t, minlength=8) / n, sampler.probabilities(), atol=1.01 / n)
    assert sampler.probabilities().sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("sampler", both(), ids=["uniform", "loss-second-moment"])
def test_weighted_loss_has_the_mean_of_uniform_timesteps(sampler):
    p = sampler.probabilities()
    t, weights = sampler.sample(np.cumsum(p) - p / 2)  # the middle of each timestep's share: every one once
    assert t.tolist() == list(range(8))
    loss = np.random.default_rng(1).normal(size=8)
    assert (p * weights.numpy() * loss).sum() == pytest.approx(loss.mean(), rel=1e-6)


def test_weighted_loss_of_random_draws_has_the_mean_of_uniform_timesteps():
    sampler, _ = warmed_up(seed=2)
    rng = np.random.default_rng(3)
    loss = rng.uniform(1, 2, size=8)
    t, weights = sampler.sample(rng.random(50_000))
    terms = weights.numpy() * loss[t.numpy()]
    assert abs(terms.mean() - loss.mean()) < 5 * terms.std() / math.sqrt(len(terms))


@pytest.mark.parametrize("sampler", [*both(), UniformSampler(1000), UniformSampler(1), UniformSampler(49)])
def test_first_and_last_numbers_draw_first_and_last_timesteps(sampler):
    t, weights = sampler.sample([0.0, JUST_BELOW_ONE])
    assert t.tolist() == [0, sampler.num_timesteps - 1]
    assert weights.isfinite().all()


def test_each_timestep_has_its_left_end_but_not_its_right_one():
    assert UniformSampler(4).sample([0, 0.25, 0.5, 0.75])[0].tolist() == [0, 1, 2, 3]


def test_uniform_weights_are_one():
    t, weights = UniformSampler(5).sample([0.1, 0.3, 0.5, 0.7, 0.9])
    assert t.tolist() == [0, 1, 2, 3, 4] and t.dtype == torch.int64
    assert weights.tolist() == [1] * 5 and weights.dtype == torch.float32


def test_loss_aware_sampler_is_uniform_until_every_timestep_was_seen_often_enough():
    sampler = LossSecondMomentResampler(3, history_per_term=2)
    everything, rest = torch.tensor([0, 1, 2]), torch.tensor([0, 1])
    for t in (everything, rest, rest, rest):
        sampler.update(t, 10.0 ** t)
        assert sampler.probabilities().tolist() == [1 / 3] * 3
    sampler.update(torch.tensor([2]), torch.tensor([100.0]))
    assert sampler.probabilities()[2] > 0.8


@pytest.mark.parametrize("uniform_prob", [0.001, 0.2, 0.0])
def test_warmed_up_probabilities_are_proportional_to_the_root_mean_square_of_the_latest_losses(uniform_prob):
    sampler, latest = warmed_up(uniform_prob=uniform_prob)
    rms = [math.sqrt(sum(value ** 2 for value in row) / len(row)) for row in latest]
    expected = [(1 - uniform_prob) * r / sum(rms) + uniform_prob / len(rms) for r in rms]
    np.testing.assert_allclose(sampler.probabilities(), expected, rtol=1e-12)


def test_share_of_uniform_draws_is_a_thousandth_and_bounds_the_weights():
    sampler = LossSecondMomentResampler(4, history_per_term=1)
    sampler.update(torch.arange(4), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    np.testing.assert_allclose(sampler.probabilities(), [0.99925, 0.00025, 0.00025, 0.00025])
    assert sampler.sample([JUST_BELOW_ONE])[1].item() == pytest.approx(1000)


def test_a_timestep_seen_twice_in_a_batch_keeps_both_losses():
    sampler = LossSecondMomentResampler(2, history_per_term=2)
    sampler.update(torch.tensor([0, 1, 0, 1]), torch.tensor([3.0, 1.0, 4.0, 1.0]))
    p = sampler.probabilities()
    assert p[0] / p[1] == pytest.approx(5 / math.sqrt(2), rel=1e-2)


def test_losses_of_zero_leave_the_draws_uniform():
    sampler = LossSecondMomentResampler(3, history_per_term=1)
    sampler.update(torch.arange(3), torch.zeros(3))
    assert sampler.probabilities().tolist() == [1 / 3] * 3


def test_state_goes_on_where_it_was_saved():
    sampler, _ = warmed_up()
    state = {name: value.clone() for name, value in sampler.state_dict().items()}
    restored = LossSecondMomentResampler(8, history_per_term=3)
    restored.load_state_dict(state)
    sampler.update(torch.tensor([1, 2]), torch.tensor([9.0, 7.0]))
    assert not np.array_equal(restored.probabilities(), sampler.probabilities())
    restored.update(torch.tensor([1, 2]), torch.tensor([9.0, 7.0]))
    assert np.array_equal(restored.probabilities(), sampler.probabilities())


def test_saved_state_counts_what_was_seen_while_warming_up():
    sampler = LossSecondMomentResampler(2, history_per_term=2)
    sampler.update(torch.tensor([0, 1]), torch.tensor([1.0, 5.0]))
    restored = LossSecondMomentResampler(2, history_per_term=2)
    restored.load_state_dict(sampler.state_dict())
    restored.update(torch.tensor([0, 1]), torch.tensor([1.0, 5.0]))
    assert restored.probabilities()[1] > 0.8


def test_saved_state_does_not_change_with_the_sampler():
    sampler, _ = warmed_up()
    state = sampler.state_dict()
    before = state["history"].clone()
    sampler.update(torch.tensor([0]), torch.tensor([1e6]))
    assert torch.equal(state["history"], before)


def test_state_of_another_kind_is_left_alone():
    learned, _ = warmed_up()
    before = learned.probabilities()
    learned.load_state_dict(UniformSampler(8).state_dict())
    assert np.array_equal(learned.probabilities(), before)
    uniform = UniformSampler(8)
    uniform.load_state_dict(learned.state_dict())
    assert uniform.sample([0.5])[1].item() == 1


@pytest.mark.parametrize("num_timesteps", [4, 20])
def test_state_for_another_number_of_timesteps_is_left_alone(num_timesteps):
    """As when a run goes on with another --timestep_respacing."""
    sampler = LossSecondMomentResampler(num_timesteps, history_per_term=3)
    sampler.load_state_dict(warmed_up(num_timesteps=8)[0].state_dict())
    assert sampler.sample([0.0, JUST_BELOW_ONE])[0].tolist() == [0, num_timesteps - 1]
    sampler.update(torch.arange(num_timesteps), torch.ones(num_timesteps))
    assert sampler.probabilities().tolist() == [1 / num_timesteps] * num_timesteps


def test_samplers_go_by_their_flag():
    assert not create_named_schedule_sampler("uniform", 10).learns
    sampler = create_named_schedule_sampler("loss-second-moment", 10)
    assert sampler.learns and sampler.num_timesteps == 10
    with pytest.raises(ValueError, match="uniform or loss-second-moment"):
        create_named_schedule_sampler("best", 10)
