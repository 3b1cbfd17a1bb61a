"""The Probabilistic U-Net: its bound, its prior, and what is random about it."""

import math

import pytest
import torch
from helpers.loops import batch
from helpers.models import PROBUNET, awake, make_probunet, weights
from helpers.refusals import refusal
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.nn import functional as F

from guided_diffusion.commands.cli import parse_flags
from guided_diffusion.data.noise import draw_rater
from guided_diffusion.data.stream import Batch
from guided_diffusion.methods.base import join, select

GRID = torch.linspace(-40, 40, 40_001, dtype=torch.float64)  # of a z of one dimension


def few_pixels(seed=0, **flags):
    """A method whose z matters, and an image and a mask of 2 x 3 pixels."""
    method = awake(make_probunet(seed, probunet_latent_dim=1, beta=1.0, **flags)).double()
    generator = torch.Generator().manual_seed(seed)
    return (method, torch.rand(1, 1, 2, 3, generator=generator, dtype=torch.float64),
            torch.randint(0, 2, (1, 1, 2, 3), generator=generator).double())


def log_probability(mask, logits):
    return torch.where(mask == 1, F.logsigmoid(logits), F.logsigmoid(-logits)).sum((1, 2, 3))


def on_grid(method, image, mask):
    """log p(mask | z) for every z of GRID, and the posterior and the prior."""
    logits = method.model.logits(method.model.features(image).expand(len(GRID), -1, -1, -1), GRID[:, None]).double()
    log_likelihood = log_probability(mask, logits)
    q, p = (Normal(dist.mean.double().item(), dist.stddev.double().item())
            for dist in (method.posterior(image, mask), method.model.prior(image)))
    return log_likelihood, q, p


def integral(log_values):
    return (log_values.exp().sum() * (GRID[1] - GRID[0])).item()


# ---- the bound ----

@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_loss_is_a_bound_on_the_likelihood_and_short_of_it_by_the_divergence_from_the_true_posterior(seed):
    """With beta 1. Both sides by quadrature, the loss by Monte Carlo over places."""
    method, image, mask = few_pixels(seed)
    log_likelihood, q, p = on_grid(method, image, mask)
    assert integral(q.log_prob(GRID)) == pytest.approx(1) and integral(p.log_prob(GRID)) == pytest.approx(1)
    log_marginal = math.log(integral(p.log_prob(GRID) + log_likelihood))
    expected = (q.log_prob(GRID).exp() * log_likelihood).sum().item() * (GRID[1] - GRID[0]).item()
    bound = expected - kl_divergence(q, p).item()
    true_posterior = p.log_prob(GRID) + log_likelihood - log_marginal
    gap = (q.log_prob(GRID).exp() * (q.log_prob(GRID) - true_posterior)).sum().item() * (GRID[1] - GRID[0]).item()
    assert bound < log_marginal and log_marginal - bound == pytest.approx(gap, abs=1e-6)
    n = 20_000
    losses = method.losses(image.expand(n, -1, -1, -1), mask.expand(n, -1, -1, -1), 0, range(n))["loss"]
    assert abs(-losses.mean() - bound) < 5 * losses.std() / n ** 0.5 and losses.std() > 0.01


@torch.no_grad()
def test_likelihood_by_importance_sampling_from_the_posterior_is_that_by_quadrature():
    """So the posterior, the prior and the decoder of the loss are of one model."""
    method, image, mask = few_pixels()
    log_likelihood, q, p = on_grid(method, image, mask)
    wide = Normal(q.mean, 2 * max(q.stddev, p.stddev))
    torch.manual_seed(0)
    z = wide.sample((20_000, 1)).double()
    logits = method.model.logits(method.model.features(image).expand(len(z), -1, -1, -1), z).double()
    ratio = (p.log_prob(z[:, 0]) - wide.log_prob(z[:, 0]) + log_probability(mask, logits)).exp()
    assert abs(ratio.mean() - integral(p.log_prob(GRID) + log_likelihood)) < 5 * ratio.std() / len(z) ** 0.5


@pytest.mark.parametrize("beta", [0.5, 10.0])
@torch.no_grad()
def test_terms_are_cross_entropy_summed_over_pixels_and_the_divergence_from_posterior_to_prior(beta):
    method = awake(make_probunet(beta=beta))
    examples = batch()
    terms = method(examples).terms
    assert terms.keys() == set(method.loss_names) and all(value.shape == (5,) for value in terms.values())
    mask = examples.masks  # of one rater each
    q, p = (MultivariateNormal(dist.mean, torch.diag_embed(dist.variance))
            for dist in (method.posterior(examples.image, mask), method.model.prior(examples.image)))
    torch.testing.assert_close(terms["kl"], kl_divergence(q, p), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["loss"], terms["ce"] + beta * terms["kl"])
    method.model.combine[-1].weight.zero_(), method.model.combine[-1].bias.fill_(1.0)  # every pixel with p = 0.73
    p = 1 / (1 + math.exp(-1))
    expected = -(mask * math.log(p) + (1 - mask) * math.log(1 - p)).sum((1, 2, 3))
    torch.testing.assert_close(method(examples).terms["ce"], expected)


def test_losses_are_taken_in_float32_under_bfloat16():
    method = awake(make_probunet())
    exact = method(batch()).terms
    with torch.autocast("cpu", torch.bfloat16):
        rounded = method(batch()).terms  # the sum over 256 pixels, had it been rounded, would be a multiple of 0.5
    assert all(value.dtype == torch.float32 for value in rounded.values())
    torch.testing.assert_close(rounded["ce"], exact["ce"], rtol=0.02, atol=0)
    assert not torch.equal(rounded["ce"], exact["ce"])


def test_loss_reaches_every_parameter():
    method = make_probunet()
    method(batch()).terms["loss"].sum().backward()
    assert all(parameter.grad is not None and (parameter.grad != 0).any() for parameter in method.parameters())
    method.zero_grad()
    method(batch()).terms["kl"].sum().backward()
    trained = {name.split(".")[0] + "." + name.split(".")[1] for name, parameter in method.named_parameters()
               if parameter.grad is not None and (parameter.grad != 0).any()}
    assert trained == {"model.prior", "posterior.encoder", "posterior.conv_layer"}


# ---- what is random ----

def test_rater_and_latent_of_an_example_follow_from_seed_and_place_in_whatever_batch():
    method, seen = awake(make_probunet()), []
    method.model.register_forward_pre_hook(lambda module, args: seen.append(args[1].detach()))
    image = torch.rand(1, 1, 16, 16).expand(4, -1, -1, -1)
    present = torch.tensor([[True, True, True]] * 4)
    examples = Batch(image, torch.rand(1, 3, 16, 16).expand(4, -1, -1, -1).round(), present, [3, 4, 5, 6], 7)
    whole = method(examples).terms["loss"]
    parts = torch.cat([method(examples.rows(slice(i, i + 2))).terms["loss"] for i in (0, 2)])
    torch.testing.assert_close(whole, parts)
    torch.testing.assert_close(seen[0], torch.cat(seen[1:]))
    raters = [draw_rater(7, place, 3) for place in examples.places]
    assert len(set(raters)) > 1
    q = method.posterior(image, torch.stack([examples.masks[i, r:r + 1] for i, r in enumerate(raters)]))
    noise = ((seen[0] - q.mean) / q.stddev).detach()
    assert len({tuple(row) for row in noise.round(decimals=3).tolist()}) == 4  # a draw of its own each
    assert not torch.allclose(method(examples._replace(seed=8)).terms["loss"], whole)


def latents(method, encoded, rows, seed=0):
    """What z `draw` gives these rows."""
    seen = []
    hook = method.model.combine.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    method.draw(encoded, rows, seed)
    hook.remove()
    dimensions = encoded["mean"].shape[1]
    assert (seen[0][:, -dimensions:] == seen[0][:, -dimensions:, :1, :1]).all()  # the same at every pixel
    return seen[0][:, -dimensions:, 0, 0]


def test_latents_of_members_have_the_moments_of_the_prior():
    method = awake(make_probunet()).prepare()
    images = torch.rand(2, 1, 2, 2)
    encoded = method.encode(images)
    prior, n = method.model.prior(images), 4_000
    torch.testing.assert_close(encoded["mean"], prior.mean)
    for scan in range(2):
        z = latents(method, encoded, [(scan, "case", i) for i in range(n)])
        error = prior.stddev[scan] / n ** 0.5
        assert ((z.mean(0) - prior.mean[scan]).abs() < 5 * error).all()
        assert ((z.std(0) - prior.stddev[scan]).abs() < 5 * error / 2 ** 0.5).all()
        correlations = torch.corrcoef(z.T) - torch.eye(z.shape[1])
        assert (correlations.abs() < 5 / n ** 0.5).all()


def test_a_draw_follows_from_seed_case_and_member_whatever_else_is_drawn():
    method = awake(make_probunet()).prepare()
    scans = [method.encode(image[None]) for image in torch.rand(2, 1, 16, 16)]
    rows = [(0, "a", 0), (1, "b", 0), (0, "a", 1), (1, "a", 0)]
    steps = []
    drawn = method.draw(join(scans), rows, 0, lambda x, x_start: steps.append((x.shape, x_start.shape)))
    assert drawn.shape == (4, 16, 16) and drawn.dtype == torch.float32 and (0 < drawn).all() and (drawn < 1).all()
    assert steps == [((4, 1, 16, 16),) * 2] and method.steps == 1 and method.cost == (1, 0)
    for row, mask in zip(rows, drawn):
        torch.testing.assert_close(method.draw(scans[row[0]], [(0, *row[1:])], 0)[0], mask, rtol=1e-4, atol=1e-5)
    z = [latents(method, select(join(scans), [0]), [(0, *what)], seed)[0] for what, seed in (
        (("a", 0), 0), (("a", 1), 0), (("b", 0), 0), (("a", 0), 1))]
    assert len({tuple(row.tolist()) for row in z}) == 4


def test_drawing_in_bfloat16_rounds_the_masks_and_not_the_latents():
    exact, rounded = (awake(make_probunet()).prepare(dtype) for dtype in (None, torch.bfloat16))
    image, rows = torch.rand(1, 1, 16, 16), [(0, "a", i) for i in range(8)]
    one, other = (method.draw(method.encode(image), rows, 0) for method in (exact, rounded))
    assert other.dtype == torch.float32 and not torch.equal(one, other)
    assert (one - other).abs().mean() < 0.02
    assert rounded.encode(image)["mean"].dtype == torch.float32


# ---- from flags ----

def test_what_draws_has_no_posterior_and_takes_the_weights_of_a_run():
    trained = make_probunet(seed=1)
    assert trained.training_networks() == {"posterior": trained.posterior}
    drawing = make_probunet(seed=2, training=False)
    assert drawing.posterior is None
    drawing.model.load_state_dict(weights(trained.model))
    image, rows = torch.rand(1, 1, 16, 16), [(0, "a", 0)]
    masks = [method.prepare().draw(method.encode(image), rows, 0) for method in (trained, drawing)]
    assert torch.equal(*masks)


def test_any_network_may_stand_in_for_the_convolutional_one():
    method = make_probunet(network="unet", num_channels=32, channel_mult="1,1", num_res_blocks=1,
                           attention_resolutions="", num_heads=1)
    method(batch()).terms["loss"].sum().backward()
    assert method.model.unet.out[2].weight.grad.abs().sum() > 0
    assert method.prepare().draw(method.encode(torch.rand(1, 1, 16, 16)), [(0, "a", 0)], 0).shape == (1, 16, 16)


@pytest.mark.parametrize("text, words", [
    ("--beta 0", "--beta 0: the prior would not be trained"), ("--probunet_filters 8,x", "--probunet_filters"),
    ("--kl_weight 0.1", "--kl_weight 0.1: is a flag of --method cimd, but --method is probunet"),
    ("--prediction xstart", "--prediction xstart: is a flag of --method cimd")])
def test_flags_that_make_none_are_refused_by_name(text, words):
    def build():
        args, _ = parse_flags("training", "", [*words_of(PROBUNET), *text.split()])
        make_probunet(**{**vars(args), "image_channels": 1})

    assert words in refusal(build)


def words_of(flags):
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def test_its_flags_need_its_method():
    assert "--beta 2.0: is a flag of --method probunet, but --method is cimd" in refusal(
        parse_flags, "training", "", ["--beta", "2"])
