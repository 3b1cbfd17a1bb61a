"""Jobs of a moment."""

import pytest
from helpers.processes import SAMPLE, TRAIN


@pytest.fixture
def data(make_cases, tmp_path):
    return make_cases(tmp_path / "data", count=3, raters=[2, 1, 4])


@pytest.fixture
def train(run, data, tiny):
    """train(results, *flags): 3 steps of a small model, unless the flags say otherwise."""
    def call(results, *flags):
        steps = [] if "--max_steps" in flags else ["--max_steps", 3]
        filters = [] if "--kl_weight" in flags else ["--num_filters", "8,16"]  # without AMN and ACN it is refused
        return run(TRAIN, "--data_dir", data, "--results_dir", results, "--batch_size", 2, *filters, *tiny, *steps,
                   *flags)

    return call


@pytest.fixture
def sample(run, data, trained):
    """sample(results, *flags): 2 masks a case in 3 steps each."""
    def call(results, *flags, data=data, model=trained / "savedmodel.pt"):
        return run(SAMPLE, "--data_dir", data, "--model_path", model, "--results_dir", results, "--num_ensemble", 2,
                   "--timestep_respacing", 3, *flags)

    return call
