"""The joint loss of U-Net, AMN and ACN."""

import pytest
import torch
from helpers.loops import batch, make_loop
from helpers.models import awake, make_cimd
from torch.distributions import kl_divergence


@pytest.mark.parametrize("predict_xstart", [False, True])
def test_loss_adds_the_weighted_divergence_of_amn_and_acn(predict_xstart):
    cimd = awake(make_cimd(kl_weight=0.3, learn_sigma=True, predict_xstart=predict_xstart))
    image, mask, t, _, noise = batch()
    terms = cimd(image, mask, t, noise)
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
    image, mask, t, _, noise = batch()
    cimd(image, mask, t, noise)
    abar = torch.cumprod(1 - torch.linspace(0.0001, 0.02, 1000, dtype=torch.float64), 0)[t].view(-1, 1, 1, 1)
    x_t = (abar.sqrt() * mask + (1 - abar).sqrt() * noise).float()
    eps = cimd.model(x_t, t, image=image).double()
    predicted = ((x_t - (1 - abar).sqrt() * eps) / abar.sqrt()).clamp(0, 1).float()
    assert torch.equal(seen["posterior"][0], image) and torch.equal(seen["posterior"][1], mask)
    assert torch.equal(seen["prior"][0], image)
    torch.testing.assert_close(seen["prior"][1], predicted, atol=1e-4, rtol=0)


def test_divergence_alone_reaches_every_network():
    cimd = awake(make_cimd(predict_xstart=True))
    image, mask, t, _, noise = batch()
    cimd(image, mask, t, noise)["kl"].sum().backward()
    for name in ("model", "posterior", "prior"):
        for parameter in getattr(cimd, name).parameters():
            assert (parameter.grad != 0).any(), name


def test_without_encoders_the_denoiser_is_trained_alone(tmp_path):
    cimd = make_cimd(kl_weight=0)
    image, mask, t, _, noise = batch()
    assert cimd(image, mask, t, noise).keys() == {"loss", "mse"}
    make_loop(tmp_path, cimd, max_steps=1).run_loop()
    assert "posterior" not in torch.load(tmp_path / "optsavedmodel000001.pt", weights_only=True)
