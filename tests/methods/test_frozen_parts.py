"""Parts of a network that are never trained, averaged or saved twice; and what is encoded once a scan."""

import numpy as np
import pytest
import torch
from helpers.files import times
from helpers.loops import make_cases, make_loop
from helpers.models import WithFrozenEncoder, assert_same, weights
from helpers.refusals import refusal

from guided_diffusion import checkpoint
from guided_diffusion.data.masks import to_masks
from guided_diffusion.methods.cimd import CIMD
from guided_diffusion.sampling.ensembles import EnsembleSampler
from guided_diffusion.script_util import create_gaussian_diffusion
from guided_diffusion.training.resume import resume
from guided_diffusion.training.validation import SHOWN, Validation


def make_method(network, **options):
    return CIMD(create_gaussian_diffusion(timestep_respacing="4", predict_xstart=True), network, **options)


def encoder_calls(network):
    """How many scans the encoder saw at each of its calls from now on."""
    sizes = []
    network.encoder.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    return sizes


def test_frozen_parts_get_no_gradient_and_stay_as_they_are(tmp_path):
    network = WithFrozenEncoder()
    before, calls = weights(network), encoder_calls(network)
    loop = make_loop(tmp_path, make_method(network), max_steps=3, lr=0.1)
    loop.run_loop()
    after = weights(network)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"head.weight", "head.bias", "time.weight", "time.bias"}  # nor did the batch norm count the batches
    assert all(p.grad is None for p in network.encoder.parameters()) and calls == [2, 2, 2]
    assert {id(p) for p in loop.trained} == {id(p) for part in (network.head, network.time) for p in part.parameters()}
    assert network.head.training and not network.encoder.training


def test_averages_share_the_frozen_parts_and_follow_the_others(tmp_path):
    network = WithFrozenEncoder()
    start = weights(network)
    loop = make_loop(tmp_path, make_method(network), max_steps=1, lr=0.1, ema_rate="0.5,0.9")
    loop.run_loop()
    for rate, average in loop.ema.items():
        assert average.encoder is network.encoder and average.head is not network.head
        for name in ("head.weight", "time.bias"):
            expected = float(rate) * start[name] + (1 - float(rate)) * network.state_dict()[name]
            torch.testing.assert_close(average.state_dict()[name], expected)


def test_frozen_parts_are_saved_once_beside_all_checkpoints(tmp_path):
    network = WithFrozenEncoder()
    make_loop(tmp_path, make_method(network), max_steps=1).run_loop()
    frozen = times(tmp_path)[checkpoint.FROZEN]
    loop = make_loop(tmp_path, make_method(network), max_steps=3, save_interval=1, keep_checkpoints=1)
    resume(loop, tmp_path / checkpoint.NEWEST)
    loop.run_loop()
    assert checkpoint.steps_in(tmp_path) == [3] and times(tmp_path)[checkpoint.FROZEN] == frozen
    stored = {name: checkpoint.load(tmp_path / name) for name in (
        checkpoint.FROZEN, checkpoint.NEWEST, checkpoint.model_name(3), checkpoint.ema_name("0.9999", 3))}
    assert all(name.startswith("encoder.") for name in stored[checkpoint.FROZEN])
    for name in list(stored)[1:]:
        assert stored[name].keys() == {"head.weight", "head.bias", "time.weight", "time.bias"}
    assert_same({**stored[checkpoint.FROZEN], **stored[checkpoint.NEWEST]}, weights(network))


def test_a_run_with_frozen_parts_goes_on_bit_for_bit(tmp_path):
    def loop(name, steps, seed):
        (tmp_path / name).mkdir(exist_ok=True)
        return make_loop(tmp_path / name, make_method(WithFrozenEncoder(seed)), max_steps=steps, lr=0.1, ema_rate="0.5")

    straight = loop("straight", 6, 0)
    straight.run_loop()
    loop("stopped", 3, 0).run_loop()
    resumed = loop("stopped", 6, 1)  # whatever it started from is overwritten
    resume(resumed, tmp_path / "stopped" / checkpoint.NEWEST)
    resumed.run_loop()
    assert_same(weights(resumed.method.model), weights(straight.method.model))
    names = {path.name for path in (tmp_path / "straight").glob("*000006.pt")} | {checkpoint.FROZEN}
    assert len(names) == 4
    for name in names:
        assert_same(*(checkpoint.load(tmp_path / folder / name) for folder in ("straight", "stopped")))


def test_weights_without_their_frozen_parts_are_refused_by_name(tmp_path):
    make_loop(tmp_path, make_method(WithFrozenEncoder()), max_steps=1).run_loop()
    path = tmp_path / checkpoint.FROZEN
    network = WithFrozenEncoder(1)
    checkpoint.load_model(network, tmp_path / checkpoint.model_name(1))
    assert_same(weights(network), {**checkpoint.load(path), **checkpoint.load(tmp_path / checkpoint.NEWEST)})
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: is truncated" in refusal(checkpoint.load_model, network, tmp_path / checkpoint.model_name(1))
    path.unlink()
    assert f"{path}: no such file" in refusal(checkpoint.load_model, network, tmp_path / checkpoint.model_name(1))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 20])
@pytest.mark.parametrize("sampler", ["ancestral", "heun"])
def test_a_scan_is_encoded_once_whatever_the_number_of_its_masks(batch_size, sampler):
    network, cases = WithFrozenEncoder(), make_cases(count=3)
    method = make_method(network, sampler=sampler).prepare()
    calls = encoder_calls(network)
    masks = dict((case.name, samples) for case, samples in EnsembleSampler(
        method, batch_size=batch_size).ensembles(cases, 5))
    assert calls == [1] * 3 and method.cost.scan == 1
    alone = dict((case.name, samples) for case, samples in EnsembleSampler(method, batch_size=1).ensembles(cases, 5))
    for name, samples in masks.items():
        np.testing.assert_allclose(samples, alone[name], atol=1e-5)
        assert np.array_equal(to_masks(samples), to_masks(alone[name])) and len(np.unique(samples, axis=0)) == 5


def test_what_is_drawn_depends_on_the_scan_that_was_encoded():
    method = make_method(WithFrozenEncoder()).prepare()
    first, second = (case._replace(name="one name") for case in make_cases(count=2))
    drawn = [samples for _, samples in EnsembleSampler(method, batch_size=4).ensembles([first, second], 2)]
    assert abs(drawn[0] - drawn[1]).max() > 0.01
    image, x, t = torch.from_numpy(first.image)[None], torch.randn(1, 1, 16, 16), torch.tensor([500])
    model = method.model
    assert torch.equal(model(x, t, image=image), model(x, t, encoded=model.encode(image)))
    assert not torch.equal(model(x, t, image=image), model(x, t, image=torch.from_numpy(second.image)[None]))


def test_drawing_while_training_leaves_the_frozen_parts_alone(tmp_path):
    network, cases = WithFrozenEncoder(), make_cases()
    before = weights(network.encoder)

    def altered(network):
        network.encoder[1].running_mean += 1  # as a conversion to another dtype would
        return make_method(network)

    loop = make_loop(tmp_path, make_method(network), cases, max_steps=2,
                     callbacks=[Validation(cases, altered, count=2, interval=1)])
    drawn = []
    loop.callbacks[0].drawn = lambda loop, cases, masks, title: drawn.extend(map(len, masks))
    loop.run_loop()
    assert drawn == [SHOWN] * 4
    assert_same(weights(network.encoder), before)
    assert all(average.encoder is network.encoder for average in loop.ema.values())
