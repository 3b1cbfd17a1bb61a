"""The joint loss of U-Net, AMN and ACN, and what is random about it."""

import math

import numpy as np
import pytest
import torch
from helpers.loops import batch, make_cases, make_loop, next_floats
from helpers.models import SIZE, awake, make_cimd
from torch.distributions import kl_divergence

from guided_diffusion.data.noise import draw_rater
from guided_diffusion.data.stream import Batch, ShuffledCases
from guided_diffusion.system.errors import InputError


def examples(n=5, seed=1, steps=1000):
    """image, mask, t and noise for CIMD.losses."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 1, SIZE, SIZE, generator=generator),
            torch.randint(0, 2, (n, 1, SIZE, SIZE), generator=generator).float(),
            torch.randint(0, steps, (n,), generator=generator),
            torch.randn(n, 1, SIZE, SIZE, generator=generator))


# ---- the loss ----

@pytest.mark.parametrize("predict_xstart", [False, True])
def test_loss_adds_the_weighted_divergence_of_amn_and_acn(predict_xstart):
    cimd = awake(make_cimd(kl_weight=0.3, learn_sigma=True, predict_xstart=predict_xstart))
    image, mask, t, noise = examples()
    terms = cimd.losses(image, mask, t, noise)
    diffusion = cimd.diffusion
    alone = diffusion.training_losses(cimd.model, mask, t, {"image": image}, noise)
    predicted = alone["pred_xstart"].clamp(0, 1)
    kl = kl_divergence(cimd.posterior(image, mask), cimd.prior(image, predicted))
    assert terms.keys() == {"loss", "mse", "vb", "kl"} and all(value.shape == (5,) for value in terms.values())
    torch.testing.assert_close(terms["kl"], kl)
    torch.testing.assert_close(terms["loss"], alone["mse"] + alone["vb"] + 0.3 * kl)


def test_amn_sees_the_raters_mask_and_acn_the_predicted_one():
    cimd, seen = awake(make_cimd()), {}
    for name in ("posterior", "prior"):
        getattr(cimd, name).register_forward_pre_hook(lambda module, args, name=name: seen.update({name: args}))
    image, mask, t, noise = examples()
    cimd.losses(image, mask, t, noise)
    abar = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64), 0)[t].view(-1, 1, 1, 1)
    x_t = (abar.sqrt() * mask + (1 - abar).sqrt() * noise).float()
    eps = cimd.model(x_t, t, image=image).double()
    predicted = ((x_t - (1 - abar).sqrt() * eps) / abar.sqrt()).clamp(0, 1).float()
    assert torch.equal(seen["posterior"][0], image) and torch.equal(seen["posterior"][1], mask)
    assert torch.equal(seen["prior"][0], image)
    torch.testing.assert_close(seen["prior"][1], predicted, atol=1e-4, rtol=0)


def test_divergence_alone_reaches_every_network():
    cimd = awake(make_cimd(predict_xstart=True))
    cimd.losses(*examples())["kl"].sum().backward()
    for name in ("model", "posterior", "prior"):
        for parameter in getattr(cimd, name).parameters():
            assert (parameter.grad != 0).any(), name


def test_without_encoders_the_denoiser_is_trained_alone(tmp_path):
    cimd = make_cimd(kl_weight=0)
    assert cimd.losses(*examples()).keys() == {"loss", "mse"} and cimd.training_networks() == {}
    make_loop(tmp_path, cimd, max_steps=1).run_loop()
    assert "posterior" not in torch.load(tmp_path / "optsavedmodel000001.pt", weights_only=True)


@pytest.mark.parametrize("options", [{}, {"learn_sigma": True}, {"kl_weight": 0}, {"use_kl": True},
                                     {"use_kl": True, "kl_weight": 0}])
def test_losses_have_the_names_that_the_method_gives(options):
    cimd = make_cimd(**options)
    losses = cimd(batch())
    assert losses.terms.keys() == set(cimd.loss_names) and cimd.loss_names[0] == "loss"
    assert 0 <= losses.part.min() and losses.part.max() < len(cimd.parts) == 4


@pytest.mark.parametrize("kl_weights", [(0, 0.001), (0.001, 0)])
def test_the_state_of_a_run_with_other_networks_is_refused(kl_weights):
    saved, going_on = (make_cimd(kl_weight=weight) for weight in kl_weights)
    state = {**saved.training_state(), **{name: net.state_dict() for name, net in saved.training_networks().items()}}
    with pytest.raises(InputError, match="AMN and ACN; give the --kl_weight"):
        going_on.load_training_state(state)


# ---- what an example is learnt with ----

def learnt_with(raters, places, seed=0, steps=1000):
    """mask, t and noise that CIMD gives the examples at these places, of which the mask of rater r is filled with r;
    and the Losses."""
    cimd, seen = make_cimd(kl_weight=0, steps=steps), []

    def losses(image, mask, t, noise):
        seen.extend((mask, t, noise))
        return {"loss": torch.zeros(len(t))}

    cimd.losses = losses
    most = max(raters)
    masks = torch.arange(most).float().repeat(len(raters), 1)[..., None, None].expand(-1, -1, 4, 4)
    result = cimd(Batch(torch.zeros(len(raters), 1, 4, 4), masks, torch.arange(most) < torch.tensor(raters)[:, None],
                        list(places), seed))
    return *seen, result


def test_rater_timestep_and_noise_of_an_example_follow_from_seed_and_place_in_whatever_batch():
    raters = [3, 1, 4, 2]
    mask, t, noise, losses = learnt_with(raters, [7, 8, 9, 10])
    parts = [learnt_with(raters[:2], [7, 8]), learnt_with(raters[2:], [9, 10])]
    for i, whole in enumerate((mask, t, noise)):
        assert torch.equal(whole, torch.cat([part[i] for part in parts]))
    assert len(set(t.tolist())) == 4 and not torch.equal(noise[0], noise[1])
    assert torch.equal(losses.seen["timestep"], t) and torch.equal(losses.part, t * 4 // 1000)
    other = learnt_with(raters, [7, 8, 9, 10], seed=1)
    assert not torch.equal(other[1], t) and not torch.equal(other[2], noise)


def test_noise_is_standard_and_timesteps_are_uniform():
    _, t, noise, losses = learnt_with([1] * 2000, range(2000))
    n = noise.numel()
    assert abs(noise.mean().item()) < 5 / math.sqrt(n) and abs(noise.var().item() - 1) < 5 * math.sqrt(2 / n)
    counts = np.histogram(t, bins=10, range=(0, 1000))[0]
    assert np.abs(counts - 200).max() < 5 * math.sqrt(180)
    assert abs(np.corrcoef(t, noise.mean((1, 2, 3)))[0, 1]) < 5 / math.sqrt(2000)
    assert (losses.weights == 1).all()


def test_cases_with_different_numbers_of_raters_are_each_learnt_from_their_own():
    """Rater by rater as the place in the stream says, never from the empty places of a batch."""
    raters = [1, 2, 5, 3, 4]
    places = [*range(100)]
    mask, *_ = learnt_with([raters[place % 5] for place in places], places)
    drawn = mask[:, 0, 0, 0].tolist()
    assert drawn == [draw_rater(0, place, raters[place % 5]) for place in places]
    assert [max(drawn[i::5]) for i in range(5)] == [n - 1 for n in raters]


def test_a_stream_of_different_numbers_of_raters_trains(tmp_path):
    cases = make_cases(raters=[1, 2, 5, 3, 4])
    loop, seen = make_loop(tmp_path, cases=cases, batch_size=5, max_steps=3), []
    losses = loop.method.losses
    loop.method.losses = lambda image, mask, *rest: seen.append((image, mask)) or losses(image, mask, *rest)
    floats = next_floats(ShuffledCases(cases).batches(5))
    assert floats.masks.shape[:2] == floats.present.shape == (5, 5) and sorted(floats.present.sum(1)) == [1, 2, 3, 4, 5]
    loop.run_loop()
    position = 0
    for images, masks in seen:
        for image, mask in zip(images, masks):
            i = int(loop.data.case_name(position).removeprefix("case"))
            rater = draw_rater(0, position, len(cases[i].raters))
            assert torch.equal(mask[0], torch.from_numpy(cases[i].raters[rater]).float())
            torch.testing.assert_close(image, torch.from_numpy(cases[i].image), atol=0.5 / 255 + 1e-6, rtol=0)
            position += 1
    assert position == loop.position == 15
