"""--method energy: what it learns from, what it draws, and that it is trained and drawn from as any method."""


import numpy as np
import pytest
import torch
from helpers.loops import make_cases, make_loop
from helpers.models import energy_flags, make_energy
from scipy import ndimage

from guided_diffusion import logger
from guided_diffusion.data.masks import to_masks
from guided_diffusion.data.stream import Batch
from guided_diffusion.energy_score import energy_score
from guided_diffusion.methods import METHODS
from guided_diffusion.metrics import Agreement
from guided_diffusion.sampling.ensembles import EnsembleSampler
from guided_diffusion.script_util import create_method
from guided_diffusion.system.errors import InputError


def drawer(method, **sampling):
    return create_method(energy_flags(**sampling), method.model, training=False).prepare()


def test_every_example_has_a_loss_of_its_own_that_follows_from_its_place():
    method = make_energy(energy_draws=3, energy_dummy=0.5)
    loop = make_loop("unused", method, make_cases(raters=[1, 4, 2, 3, 5]))
    batch = next(loop.data.batches(4))
    batch = batch._replace(image=batch.image / 255.0, masks=batch.masks.float())
    losses = method(batch)
    assert set(losses.terms) == set(method.loss_names) and losses.terms["loss"].shape == (4,)
    torch.testing.assert_close(losses.terms["loss"], losses.terms["whether"] + losses.terms["where"])
    for i in range(4):  # what an example gets does not depend on the rest of its batch
        torch.testing.assert_close(method(batch.rows(slice(i, i + 1))).terms["loss"], losses.terms["loss"][i:i + 1])
    again = method(batch._replace(places=[place + 5 for place in batch.places])).terms["loss"]
    assert (again != losses.terms["loss"]).all()


def test_it_learns_how_often_and_where_raters_mark(tmp_path):
    """Two scans that only a number in them tells apart: one that a quarter of the raters mark, one that all do."""
    cases = make_cases(count=2, raters=4)
    for case, marked in zip(cases, (1, 4)):
        case.image[:] = marked / 4
        case.raters[:] = False
        case.raters[:marked, 4:10, 3:9] = True
    logger.configure(tmp_path)
    method = make_energy()
    make_loop(tmp_path, method, cases, lr=0.01, max_steps=200, log_interval=100).run_loop()
    logger.close()
    drawn = EnsembleSampler(drawer(method, spread=False), batch_size=50).ensembles(cases, 100)
    shares = []
    for case, samples in drawn:
        masks = to_masks(samples)
        shares.append(masks.any((1, 2)).mean())
        assert (masks[masks.any((1, 2))] == case.raters[0]).mean() > 0.94
        assert Agreement(masks, case.raters).ged_unbiased() < 0.05
    assert abs(shares[0] - 0.25) < 0.2 and shares[1] > 0.9


def test_calibration_finds_how_much_too_sure_it_is():
    method = drawer(make_energy())
    rng = np.random.default_rng(0)
    cases = make_cases(count=60, raters=4)

    def logits():
        return torch.cat([method.encode(torch.from_numpy(case.image)[None])[-1] for case in cases])

    with torch.no_grad():
        for parameter in method.model.parameters():
            parameter.normal_(0, 0.2)
        method.model.head.empty.weight *= 3 / logits().std()
        method.model.head.empty.bias -= logits().mean()
    before = logits()
    for case, logit in zip(cases, before):  # raters mark nothing as often as a model half as sure would say
        case.raters[:] = rng.random(4)[:, None, None] > (logit / 2).sigmoid().item()
    said = method.calibrate(cases)
    ratio = (before / logits()).mean().item()
    assert said == f"temperature {ratio:.2f} of the probability of an empty mask, from 60 cases"
    assert 1.5 < ratio < 2.7


@pytest.mark.parametrize("spread", [True, False])
def test_a_mask_follows_from_its_scan_seed_case_and_number(spread):
    method = drawer(make_energy(), spread=spread)
    assert method.independent is not spread
    method.model.head.out.weight.data *= 30  # drawn apart from each other
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    encoded = method.encode(images)
    rows = [(scan, f"case{scan}", member) for scan in range(3) for member in range(6)]
    drawn = method.draw(encoded, rows, seed=1)
    some = [11, 3, 0, 17]
    torch.testing.assert_close(method.draw(encoded, [rows[i] for i in some], seed=1), drawn[some])
    assert (method.draw(encoded, rows, seed=2) != drawn).flatten(1).any(1).sum() > 9
    assert len({tuple(mask.flatten().tolist()) for mask in to_masks(drawn.numpy())}) > 6


def test_masks_are_empty_as_often_as_the_head_says_and_evenly_if_spread():
    method = make_energy()
    method.model.head.empty.bias.data.fill_(float(np.log(3)))  # three in four
    method.model.head.out.bias.data.fill_(9.0)
    for spread, apart in ((True, 0.26 / 16), (False, 5 * np.sqrt(0.75 * 0.25 / 64))):
        sampler = EnsembleSampler(drawer(method, spread=spread), batch_size=64)
        samples = next(sampler.ensembles(make_cases(count=1), 64))[1]
        assert abs((to_masks(samples).any((1, 2))).mean() - 0.25) < apart


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_the_loss_is_two_scores_of_all_raters(dtype):
    """Of binary draws, all the same: the cross-entropy of the share of raters who mark nothing, and the mean distance
    from the others' masks, counted as often as there are such."""
    method = make_energy(energy_dummy=2.0)
    method.model.head.empty.bias.data.fill_(float(np.log(3)))  # empty in three of four
    method.model.head.out.bias.data.fill_(90.0)  # else everything
    masks = torch.zeros(3, 4, 16, 16)
    masks[0, 1, :8], masks[0, 2, :4], masks[1, 0, 2:6, 2:6] = 1, 1, 1
    present = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        losses = method(Batch(torch.rand(3, 1, 16, 16), masks, present, [5, 6, 7], 0))
    distances = [1 - (128 + 2) / 258, 1 - (64 + 2) / 258], [1 - (16 + 2) / 258], []
    for i, (d, raters) in enumerate(zip(distances, (4, 2, 3))):
        share = len(d) / raters
        assert losses.terms["whether"][i].item() == pytest.approx(
            -(1 - share) * np.log(0.75) - share * np.log(0.25), rel=1e-2)
        assert losses.terms["where"][i].item() == pytest.approx(2 * sum(d) / raters, rel=1e-5, abs=1e-7)


def test_a_field_of_view_sees_and_draws_the_middle_and_counts_what_lies_outside():
    torch.manual_seed(0)
    method = create_method(energy_flags(field_of_view=8))
    method.model.head.empty.bias.data.fill_(-30.0)
    method.model.head.out.bias.data.fill_(9.0)
    cases = make_cases(count=2)
    stream = make_loop("unused", method, cases).data
    batch = next(stream.batches(2))
    batch = batch._replace(image=batch.image / 255.0, masks=batch.masks.float())
    changed = batch.image.clone()
    changed[..., :4, :] = 0
    assert torch.equal(method(batch).terms["loss"], method(batch._replace(image=changed)).terms["loss"])
    samples = drawer(method).draw(drawer(method).encode(batch.image), [(0, "a", 0), (1, "b", 3)], 0)
    assert samples.shape == (2, 16, 16) and samples[:, 4:12, 4:12].all()
    assert samples.sum() == samples[:, 4:12, 4:12].sum()

    inside = batch.masks[..., 4:12, 4:12].flatten(2)
    draws = torch.rand(2, 3, 64)
    whole = torch.nn.functional.pad(draws.unflatten(2, (8, 8)), (4, 4, 4, 4)).flatten(2)
    unseen = batch.masks.sum((2, 3)) - inside.sum(2)
    assert unseen.any()
    torch.testing.assert_close(
        energy_score(torch.nn.functional.pad(draws, (0, 1)), torch.cat([inside, unseen[..., None]], 2), batch.present),
        energy_score(whole, batch.masks.flatten(2), batch.present))


@pytest.mark.parametrize("wrong, words", [
    (dict(energy_draws=1), ["--energy_draws 1", "2 or more"]),
    (dict(energy_dummy=0.0), ["--energy_dummy 0", "above 0"]),
    (dict(field_of_view=32), ["--field_of_view 32", "--image_size 16"]),
    (dict(field_of_view=7), ["--field_of_view 7", "even"]),
])
def test_flags_that_make_no_such_method_are_refused(wrong, words):
    with pytest.raises(InputError) as refused:
        create_method(energy_flags(**wrong))
    assert all(word in str(refused.value) for word in words)


def test_it_is_a_method_of_the_table_that_draws_in_one_pass():
    method = METHODS["energy"].from_flags(energy_flags())
    assert method.cost == (1, 0) and method.steps == 1 and method.advice == ""
    assert METHODS["energy"].quick_flags(energy_flags()) == {"spread": False}


def test_no_pattern_of_the_blocks_of_pixels_is_left_in_a_mask():
    """The four pixels of a block are four channels of the last layer; a constant that differs between them would be a
    chequerboard."""
    head = make_energy().model.head
    head.out.weight.data.zero_()
    for bias, expected in (([3.0, -3.0, -3.0, 3.0], 0.0), ([3.0, 3.0, -3.0, -3.0], 0.0), ([2.0] * 4, 2.0)):
        head.out.bias.data.copy_(torch.tensor(bias))
        logits = head.draw(torch.randn(2, 8, 8, 8), torch.randn(2, 16), torch.randn(2, 4), torch.randn(2, 3, 8, 8))
        torch.testing.assert_close(logits[:, 1:-1, 1:-1], torch.full((2, 14, 14), expected))


def of_part(model, part):
    return {name: value.clone() for name, value in model.state_dict().items() if name.startswith(f"{part}.")}


def test_presence_has_a_network_of_its_own_whose_loss_reaches_no_other(tmp_path):
    """Two scans that only a number in them tells apart: one that a quarter of the raters mark, one that all do."""
    cases = make_cases(count=2, raters=4)
    for case, marked in zip(cases, (1, 4)):
        case.image[:] = marked / 4
        case.raters[:marked], case.raters[marked:] = True, False
    logger.configure(tmp_path)
    method = make_energy(presence_channels=8, energy_loss="whether")
    before = {part: of_part(method.model, part) for part in ("network", "head", "presence")}
    make_loop(tmp_path, method, cases, lr=0.01, max_steps=150, log_interval=50).run_loop()
    logger.close()
    for part, weights in before.items():
        same = [torch.equal(value, method.model.state_dict()[name]) for name, value in weights.items()]
        assert not any(same) if part == "presence" else all(same)
    method.eval()
    logits = method.model.whether(torch.stack([torch.from_numpy(case.image) for case in cases]))
    assert abs(logits[0].sigmoid().item() - 0.75) < 0.1 and logits[1].sigmoid().item() < 0.1

    method = make_energy(presence_channels=8, energy_loss="both").eval()
    batch = next(make_loop("unused", method, cases).data.batches(2))
    batch = batch._replace(image=batch.image / 255.0, masks=batch.masks.float())
    method(batch).terms["whether"].sum().backward()
    assert {name.split(".")[0] for name, p in method.model.named_parameters() if p.grad is not None} == {"presence"}
    where = make_energy(presence_channels=8, energy_loss="where").eval()
    torch.testing.assert_close(where(batch).terms["loss"], method(batch).terms["where"])


def test_presence_can_be_the_mean_over_flips_and_turns():
    method = make_energy(presence_channels=8, presence_views=True)
    for parameter in method.model.presence.parameters():
        torch.nn.init.normal_(parameter, 0, 0.1)
    image = torch.rand(2, 1, 16, 16)
    views = [np.rot90(part, k, (2, 3)).copy() for part in (image.numpy(), image.numpy()[..., ::-1]) for k in range(4)]
    model = method.model.eval()
    each = torch.stack([model.presence(torch.from_numpy(view)) for view in views])
    assert each.std(0).min() > 0
    for view in views:
        torch.testing.assert_close(model.whether(torch.from_numpy(view)), each.mean(0))


def test_drawn_masks_have_no_crumbs():
    method = make_energy()
    method.model.head.empty.bias.data.fill_(-30.0)
    method.model.head.out.weight.data *= 300  # ragged
    images = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    rows = [(scan, f"case{scan}", member) for scan in range(2) for member in range(8)]

    def drawn(**flags):
        method_ = drawer(method, **flags)
        return method_.draw(method_.encode(images), rows, seed=1).numpy()

    as_it_is, cleaned = drawn(), drawn(smallest_part=0.3)
    for before, after in zip(as_it_is, cleaned):
        parts, count = ndimage.label(before > 0.5, np.ones((3, 3)))
        sizes = np.bincount(parts.ravel())[1:]
        small = np.isin(parts, 1 + np.flatnonzero(sizes < 0.3 * sizes.max()))
        assert not after[small].any() and (after[~small] == before[~small]).all()
    assert ((as_it_is > 0.5) & (cleaned < 0.5)).any((1, 2)).sum() > 2


@pytest.mark.parametrize("flags, words", [
    (dict(presence_channels=12), "--presence_channels 12: must be a multiple of 8, or 0"),
    (dict(presence_views=True), "--presence_views True: .* without --presence_channels"),
    (dict(energy_loss="whether"), "--energy_loss whether: the head says whether and where"),
    (dict(energy_loss="whether", presence_channels=8, energy_draws=4), "--energy_draws 4")])
def test_flags_of_presence_that_do_not_fit_are_refused(flags, words):
    with pytest.raises(InputError, match=words):
        make_energy(**flags)
