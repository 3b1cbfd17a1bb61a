"""Muon, an optimiser for the matrices of a network, beside AdamW for everything else."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
SMALLEST = 32  # rows and columns of a matrix that is worth it
ITERATIONS = 5
SIZE = 0.4  # of a step; twice that of AdamW's (0.2: Liu et al. 2025), which trained better at the same learning rate
# of the polynomial a x + b x^3 + c x^5, which brings singular values near 1 in a few iterations (Jordan et al. 2024)
COEFFICIENTS = 3.4445, -4.7750, 2.0315


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon takes it: weights of layers, a convolution's being the matrix [out, in * height * width]."""
    return parameter.ndim >= 2 and min(len(parameter), parameter[0].numel()) >= SMALLEST


def orthogonalized(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix U S V^T, by Newton-Schulz iterations in bfloat16: singular values of 0.7 to 1.2."""
    a, b, c = COEFFICIENTS
    wide = matrix if len(matrix) <= matrix.shape[1] else matrix.T
    x = (wide / (wide.norm() + 1e-7)).bfloat16()
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x if wide is matrix else x.T).to(matrix.dtype)


class MuonAdamW(torch.optim.AdamW):
    """AdamW, fused, for vectors and small layers, and Muon for the weights of all others.

    Muon (Jordan et al. 2024) makes the momentum of a matrix orthogonal before it takes a step. The step is scaled by
    AdamW's (Liu et al. 2025, arXiv 2502.16982), so both share a learning rate and a weight decay.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0):
        parameters = list(parameters)
        super().__init__(parameters, lr, weight_decay=weight_decay, fused=True)
        self.matrices = {p for p in parameters if is_matrix(p)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        gradients = {p: p.grad for p in self.matrices if p.grad is not None}
        for p in gradients:
            p.grad = None  # AdamW passes over it
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p in gradients:
                    p.grad = gradients[p]
                    self._step_of_matrix(p, group["lr"], group["weight_decay"])

    def _step_of_matrix(self, p, lr, weight_decay):
        state = self.state[p]
        if not state:
            state.update(momentum=torch.zeros_like(p), step=torch.tensor(0.0))  # AdamW asks every state for a step
        momentum = state["momentum"].lerp(p.grad, 1 - MOMENTUM)
        update = orthogonalized(p.grad.lerp(momentum, MOMENTUM).flatten(1))  # as Nesterov
        size = SIZE * max(update.shape) ** 0.5
        moved = p * (1 - lr * weight_decay) - lr * size * update.view_as(p)
        skip = getattr(self, "found_inf", None)  # as the fused AdamW has it: above 0, nothing changes
        if skip is not None:
            momentum, moved = (torch.where(skip > 0, old, new)
                               for old, new in ((state["momentum"], momentum), (p, moved)))
        state["momentum"].copy_(momentum)
        p.copy_(moved)
