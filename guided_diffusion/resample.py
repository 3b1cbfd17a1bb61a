"""Which timesteps training draws, and the weights that keep the loss unbiased."""

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor


def create_named_schedule_sampler(name: str, num_timesteps: int) -> "ScheduleSampler":
    """A timestep sampler by its flag: "uniform" or "loss-second-moment"."""
    if name == "uniform":
        return UniformSampler(num_timesteps)
    if name == "loss-second-moment":
        return LossSecondMomentResampler(num_timesteps)
    raise ValueError(f"no schedule sampler is called {name!r}: use uniform or loss-second-moment")


class ScheduleSampler:
    """A distribution over timesteps. Subclasses say with what `probabilities`, [T] float64, each is drawn."""

    learns = False  # whether `update` changes anything

    def __init__(self, num_timesteps: int):
        self.num_timesteps = num_timesteps

    def probabilities(self) -> np.ndarray:
        raise NotImplementedError

    def sample(self, uniforms: ArrayLike) -> tuple[Tensor, Tensor]:
        """Turn uniform random numbers in [0, 1), [N], into timesteps [N] and importance weights [N] float32.

        The mean of weight * loss estimates the loss under uniform timesteps, whatever the distribution.
        """
        p = self.probabilities()
        t = np.searchsorted(np.cumsum(p), np.asarray(uniforms, dtype=np.float64), side="right")
        t = np.minimum(t, self.num_timesteps - 1)  # the cumulated sum may end a rounding error below 1
        return torch.from_numpy(t), torch.from_numpy(1 / (self.num_timesteps * p[t])).float()

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over the state of a sampler of the same kind; that of another is left alone."""


class UniformSampler(ScheduleSampler):
    def probabilities(self) -> np.ndarray:
        return np.full(self.num_timesteps, 1 / self.num_timesteps)


class LossSecondMomentResampler(ScheduleSampler):
    """Importance sampling by the root mean square of each timestep's latest losses (Nichol & Dhariwal 2021, eq. 18).

    Uniform until every timestep has been seen `history_per_term` times.

    :param uniform_prob: share of draws that stays uniform, so that no weight explodes.
    """

    learns = True

    def __init__(self, num_timesteps: int, history_per_term: int = 10, uniform_prob: float = 0.001):
        super().__init__(num_timesteps)
        self.uniform_prob = uniform_prob
        self.history = np.zeros((num_timesteps, history_per_term))  # the latest losses, oldest first
        self.counts = np.zeros(num_timesteps, dtype=np.int64)

    def probabilities(self) -> np.ndarray:
        uniform = np.full(self.num_timesteps, 1 / self.num_timesteps)
        p = np.sqrt((self.history ** 2).mean(axis=1))
        if (self.counts < self.history.shape[1]).any() or p.sum() == 0:
            return uniform
        return (1 - self.uniform_prob) * p / p.sum() + self.uniform_prob * uniform

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in the losses [N] at timesteps t [N] of all ranks; every rank must be given the same."""
        for step, loss in zip(t.tolist(), losses.tolist()):
            if not math.isfinite(loss):
                continue
            self.history[step] = np.roll(self.history[step], -1)
            self.history[step, -1] = loss
            self.counts[step] += 1

    def state_dict(self) -> dict[str, Tensor]:
        return {"history": torch.from_numpy(self.history.copy()), "counts": torch.from_numpy(self.counts.copy())}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state and state["history"].shape == self.history.shape and state["counts"].shape == self.counts.shape:
            self.history = state["history"].numpy().astype(self.history.dtype)
            self.counts = state["counts"].numpy().astype(self.counts.dtype)
