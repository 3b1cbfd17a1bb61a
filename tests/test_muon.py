"""Muon: steps of orthogonal matrices, beside AdamW's for all else."""

import pytest
import torch
from helpers.loops import make_loop
from helpers.models import make_energy
from torch import nn

from guided_diffusion import checkpoint, logger
from guided_diffusion.muon import MuonAdamW, is_matrix, orthogonalized
from guided_diffusion.training.resume import resume


@pytest.mark.parametrize("shape", [(40, 40), (32, 90), (200, 48)])
def test_a_matrix_keeps_its_directions_and_loses_its_sizes(shape):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(shape, generator=generator)
    u, sizes, v = torch.linalg.svd(matrix, full_matrices=False)
    rank = min(shape)
    matrix = u @ torch.diag(torch.linspace(0.2, 5, rank)) @ v
    made = orthogonalized(matrix)
    assert made.shape == shape and made.dtype == matrix.dtype
    values = torch.linalg.svdvals(made)
    assert 0.6 < values.min() and values.max() < 1.3
    cosine = (made * (u @ v)).sum() / made.norm() / (u @ v).norm()
    assert cosine > 0.97
    torch.testing.assert_close(orthogonalized(matrix * 1e-6), made, atol=0.05, rtol=0)


def layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(4, 32, 3), nn.GroupNorm(8, 32), nn.Conv2d(32, 40, 3, bias=False),
                         nn.Conv2d(40, 4, 1))


def gradients(network, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


def test_matrices_step_by_muon_and_the_rest_by_adamw():
    network, plain = layers(), layers()
    matrices = [name for name, p in network.named_parameters() if is_matrix(p)]
    assert matrices == ["0.weight", "2.weight"]
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = MuonAdamW(network.parameters(), 0.01, weight_decay=0.1)
    adamw = torch.optim.AdamW(plain.parameters(), 0.01, weight_decay=0.1)
    momentum = {name: torch.zeros_like(start[name]) for name in matrices}
    for step in range(3):
        for one in (network, plain):
            gradients(one, step)
        grads = {name: p.grad.clone() for name, p in network.named_parameters()}
        optimizer.step()
        adamw.step()
        for name in matrices:
            momentum[name] = 0.95 * momentum[name] + 0.05 * grads[name]
            update = orthogonalized((0.05 * grads[name] + 0.95 * momentum[name]).flatten(1))
            size = 0.4 * max(update.shape) ** 0.5
            start[name] = start[name] * (1 - 0.01 * 0.1) - 0.01 * size * update.view_as(start[name])
    for (name, p), (_, other) in zip(network.named_parameters(), plain.named_parameters()):
        torch.testing.assert_close(p, start[name] if name in matrices else other, rtol=2e-3, atol=2e-4)
        assert p.grad is not None


def test_a_skipped_step_changes_nothing():
    network = layers()
    optimizer = MuonAdamW(network.parameters(), 0.01, weight_decay=0.1)
    gradients(network, 0)
    optimizer.step()
    before = [p.detach().clone() for p in network.parameters()]
    momentum = [optimizer.state[p]["momentum"].clone() for p in network.parameters() if is_matrix(p)]
    gradients(network, 1)
    network[2].weight.grad[0, 0] = float("nan")
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(network.parameters(), before))
    after = [optimizer.state[p]["momentum"] for p in network.parameters() if is_matrix(p)]
    assert all(map(torch.equal, momentum, after))


def test_a_run_goes_on_bit_for_bit_and_not_with_another_optimiser(tmp_path):
    def run(name, steps, again=False, optimizer="muon"):
        (tmp_path / name).mkdir(exist_ok=True)
        logger.configure(tmp_path / name, last_step=2 if again else 0)
        loop = make_loop(tmp_path / name, make_energy(), max_steps=steps, lr=0.01, ema_rate="0.5", optimizer=optimizer)
        if again:
            resume(loop, tmp_path / name / checkpoint.NEWEST)
        loop.run_loop()
        logger.close()
        return checkpoint.load(tmp_path / name / checkpoint.model_name(steps))

    straight = run("straight", 4)
    run("stopped", 2)
    again = run("stopped", 4, again=True)
    assert all(torch.equal(straight[name], again[name]) for name in straight)
    assert any(not torch.equal(straight[name], value) for name, value in run("adamw", 4, optimizer="adamw").items())
    with pytest.raises(Exception, match="optsavedmodel000004.pt"):
        run("adamw", 6, again=True)
