"""How the learning rate grows with the examples of a step."""

from collections.abc import Callable
from typing import NamedTuple


class Scaling(NamedTuple):
    """A rule."""

    factor: Callable[[float], float]  # times as many examples a step -> times the learning rate
    help: str


SCALINGS = {
    "none": Scaling(lambda growth: 1.0, "not at all"),
    # Goyal et al. 2017 (arXiv 1706.02677), section 2.1, with SGD and a warm-up
    "linear": Scaling(lambda growth: growth, "as many times (Goyal et al. 2017; give lr_warmup, too)"),
    # Malladi et al. 2022 (arXiv 2205.10287), for Adam
    "sqrt": Scaling(lambda growth: growth ** 0.5, "by the square root of that (Malladi et al. 2022, for Adam)"),
}
