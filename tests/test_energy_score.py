"""The energy score against the metric, its definition, finite differences, and all distributions of three pixels."""

import itertools

import numpy as np
import pytest
import torch

from guided_diffusion.energy_score import energy_score, soft_jaccard, soft_jaccard_to_binary
from guided_diffusion.metrics import Agreement


def random_masks(generator, *shape, share=0.3):
    masks = torch.rand(*shape, generator=generator, dtype=torch.float64) < share
    masks[..., 0, :] &= torch.rand(masks[..., 0, :1].shape, generator=generator) < 0.5  # some are empty
    return masks


def everyone(raters):
    return torch.ones(raters.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize("dummy", [0.0, 2.5])
def test_the_distance_is_jaccards_with_one_shared_element(dummy):
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 3, 7, generator=generator, dtype=torch.float64), random_masks(generator, 2, 4, 7).double()
    b[0, 0] = 0
    expected = np.empty((2, 3, 4))
    for scan, i, j in np.ndindex(2, 3, 4):
        p, q = a[scan, i].numpy(), b[scan, j].numpy()
        expected[scan, i, j] = 1 - (np.minimum(p, q).sum() + dummy) / (np.maximum(p, q).sum() + dummy)
    np.testing.assert_allclose(soft_jaccard(a, b, dummy), expected, atol=1e-12)
    np.testing.assert_allclose(soft_jaccard_to_binary(a, b, dummy), expected, atol=1e-12)


def test_binary_draws_get_ged_unbiased_plus_the_raters_distance():
    generator = torch.Generator().manual_seed(1)
    for n, m in ((2, 1), (5, 4), (8, 2)):
        draws, raters = random_masks(generator, 6, n, 20), random_masks(generator, 6, m, 20)
        draws[0], raters[1] = False, False
        energy = energy_score(draws.double(), raters.double(), everyone(raters))
        for scan in range(6):
            agreement = Agreement(draws[scan].reshape(n, 4, 5), raters[scan].reshape(m, 4, 5))
            among_raters = soft_jaccard(*[raters[scan:scan + 1].double()] * 2).sum() / max(1, m * (m - 1))
            assert energy.score[scan].item() == pytest.approx(float(agreement.ged_unbiased() + among_raters), abs=1e-12)
            assert energy.score[scan] == 2 * energy.to_raters[scan] - energy.among_draws[scan]


def test_raters_who_are_not_there_do_not_count():
    generator = torch.Generator().manual_seed(3)
    draws, raters = torch.rand(2, 3, 9, generator=generator), random_masks(generator, 2, 4, 9).float()
    present = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)
    score = energy_score(draws, raters, present, 1.0).score
    alone = energy_score(draws[:1], raters[:1, :2], present[:1, :2], 1.0).score
    torch.testing.assert_close(score[:1], alone)
    raters[0, 2:] = 1
    torch.testing.assert_close(energy_score(draws, raters, present, 1.0).score, score)
    nobody = energy_score(draws, raters, torch.zeros_like(present), 1.0)
    assert (nobody.to_raters == 0).all() and torch.equal(nobody.score, -nobody.among_draws)


@pytest.mark.parametrize("dummy", [0.0, 1.0, 4.0])
def test_the_truth_is_the_only_minimiser(dummy):
    """All eight masks of three pixels: the score of a distribution is quadratic in its probabilities. Its matrix is
    negative definite where they sum to 0, which is what a strictly proper score needs; so the truth alone is least."""
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64)[None]
    distances = soft_jaccard(masks, masks, dummy)[0]
    contrasts = torch.linalg.qr(torch.cat([torch.ones(8, 1), torch.eye(8)[:, 1:]], 1).double())[0][:, 1:]
    assert torch.linalg.eigvalsh(contrasts.T @ distances @ contrasts).max() < -1e-3

    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.dirichlet(np.full(8, 0.5)))

    def score(p):
        return 2 * p @ distances @ truth - p @ distances @ p

    others = torch.from_numpy(rng.dirichlet(np.full(8, 0.5), size=200))
    assert all(score(other) > score(truth) + 1e-9 for other in others)
    # and the estimate from draws has this mean
    draws = torch.from_numpy(rng.choice(8, p=truth.numpy(), size=(4000, 4)))
    raters = torch.from_numpy(rng.choice(8, p=truth.numpy(), size=(4000, 3)))
    estimates = energy_score(masks[0][draws], masks[0][raters], everyone(raters), dummy=dummy).score
    assert abs(estimates.mean() - score(truth)) < 4 * estimates.std() / 4000 ** 0.5


def test_gradients_match_finite_differences_and_are_finite_at_empty_masks():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    raters = random_masks(generator, 2, 4, 5).double()
    assert torch.autograd.gradcheck(
        lambda x: energy_score(x.sigmoid(), raters, everyone(raters), 0.5).score, (logits,))

    for draws in (torch.zeros(1, 4, 6), torch.ones(1, 4, 6)):
        for masks in (torch.zeros(1, 2, 6), torch.ones(1, 2, 6)):
            x = draws.clone().requires_grad_()
            energy_score(x, masks, everyone(masks), 1e-3).score.sum().backward()
            assert x.grad.isfinite().all()
