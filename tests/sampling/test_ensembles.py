"""Ensembles depend on what they should and on nothing else, and their files say what was drawn."""

import copy

import numpy as np
import pytest
import torch
from helpers.refusals import refusal

from guided_diffusion.data.cases import Case
from guided_diffusion.data.masks import to_masks
from guided_diffusion.data.noise import MemberNoise
from guided_diffusion.methods.cimd import CIMD
from guided_diffusion.samplers import SAMPLERS
from guided_diffusion.sampling import ensembles
from guided_diffusion.sampling.ensembles import EnsembleSampler
from guided_diffusion.script_util import create_gaussian_diffusion, create_model

SIZE = 16


@pytest.fixture(scope="module")
def model():
    """A U-Net whose weights are all random; a fresh one would start with a zero output."""
    generator = torch.Generator().manual_seed(0)
    model = create_model(image_size=SIZE, num_channels=32, channel_mult="1,2", num_res_blocks=1, num_heads=1,
                         attention_resolutions="8").eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1, generator=generator)
    return model


@pytest.fixture(scope="module")
def diffusion():
    return create_gaussian_diffusion(diffusion_steps=100, timestep_respacing="3")


@pytest.fixture(scope="module")
def cases():
    rng = np.random.default_rng(0)
    return [Case(f"case {i}", rng.random((4, SIZE, SIZE), dtype=np.float32), rng.random((2, SIZE, SIZE)) < 0.5)
            for i in range(4)]


def make_sampler(model, diffusion, batch_size=1, seed=0, dtype=None, **options):
    """An EnsembleSampler of CIMD with this denoiser; a dtype leaves the denoiser as it is."""
    method = CIMD(diffusion, copy.deepcopy(model) if dtype else model, **options).prepare(dtype)
    return EnsembleSampler(method, batch_size=batch_size, seed=seed)


def draw(model, diffusion, cases, n=3, **options):
    sampler = make_sampler(model, diffusion, **options)
    return {case.name: samples for case, samples in sampler.ensembles(cases, n)}


def test_ensembles_come_whole_and_in_order(model, diffusion, cases):
    sampler = make_sampler(model, diffusion, batch_size=4)
    result = list(sampler.ensembles(iter(cases), 3))
    assert [case.name for case, _ in result] == [case.name for case in cases]
    for _, samples in result:
        assert samples.shape == (3, SIZE, SIZE) and samples.dtype == np.float32
        assert 0.05 < (samples > 0.5).mean() < 0.95  # the model draws something
        assert len({sample.tobytes() for sample in samples}) == 3
    assert list(sampler.ensembles([], 3)) == []


def test_a_case_is_yielded_before_later_ones_are_read(model, diffusion, cases):
    read = []

    def reading():
        for case in cases:
            read.append(case.name)
            yield case

    ensembles = make_sampler(model, diffusion, batch_size=2).ensembles(reading(), 2)
    assert next(ensembles)[0].name == "case 0" and read == ["case 0"]


@pytest.mark.parametrize("options", [{}, {"sampler": "ddim"}, {"sampler": "ddim", "sampler_options": {"eta": 0.7}},
                                     {"sampler": "dpm++"}, {"sampler": "dpm++sde"}, {"sampler": "heun"},
                                     {"clip_denoised": False}])
def test_batch_size_does_not_change_the_ensembles(model, diffusion, cases, options):
    expected = draw(model, diffusion, cases[:3], batch_size=1, **options)
    for batch_size in (2, 4, 11):
        got = draw(model, diffusion, cases[:3], batch_size=batch_size, **options)
        for name, samples in expected.items():
            np.testing.assert_allclose(got[name], samples, atol=1e-4 * max(1, abs(samples).max()))
            assert np.array_equal(to_masks(got[name]), to_masks(samples))


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_other_cases_their_order_and_padding_do_not_change_a_bit(model, diffusion, cases, batch_size):
    together = draw(model, diffusion, cases, batch_size=batch_size)
    backwards = draw(model, diffusion, cases[::-1], batch_size=batch_size)
    for case in cases:
        alone = draw(model, diffusion, [case], batch_size=batch_size)
        assert np.array_equal(together[case.name], alone[case.name])
        assert np.array_equal(together[case.name], backwards[case.name])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_company_and_padding_do_not_change_a_bit_of_any_sampler(model, diffusion, cases, sampler):
    together = draw(model, diffusion, cases[:3], n=2, batch_size=4, sampler=sampler)
    for case in cases[:3]:
        alone = draw(model, diffusion, [case], n=2, batch_size=4, sampler=sampler)
        assert np.array_equal(together[case.name], alone[case.name])


def test_smaller_ensemble_is_the_beginning_of_a_larger_one(model, diffusion, cases):
    small = draw(model, diffusion, cases[:2], n=2, batch_size=4)
    large = draw(model, diffusion, cases[:2], n=5, batch_size=4)
    for name, samples in small.items():
        assert np.array_equal(large[name][:2], samples)


def test_seed_scan_and_walk_do_change_the_ensembles(model, diffusion, cases):
    case = cases[0]
    expected = draw(model, diffusion, [case])[case.name]
    assert np.array_equal(draw(model, diffusion, [case])[case.name], expected)
    other_scan = case._replace(image=cases[1].image)
    for got in (draw(model, diffusion, [case], seed=1), draw(model, diffusion, [other_scan]),
                draw(model, diffusion, [case], sampler="ddim"), draw(model, diffusion, [case], clip_denoised=False)):
        assert not np.allclose(got[case.name], expected, atol=1e-3)


def test_every_network_call_is_reported_and_of_full_batches(model, diffusion, cases):
    sizes, steps = [], []
    hook = model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    list(make_sampler(model, diffusion, batch_size=4).ensembles(cases[:3], 3, lambda *_: steps.append(1)))
    hook.remove()
    assert sizes == [4] * 9 and len(steps) == 9  # 9 masks in 3 batches of 3 steps


def counted(model, function):
    """The size of the batch of every network call that a function makes."""
    sizes = []
    hook = model.register_forward_hook(lambda module, args, output: sizes.append(len(output)))
    try:
        function()
    finally:
        hook.remove()
    return sizes


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_calls_are_those_that_a_mask_takes(model, diffusion, cases, sampler):
    drawn, steps = make_sampler(model, diffusion, batch_size=2, sampler=sampler), []
    sizes = counted(model, lambda: list(drawn.ensembles(cases[:2], 1, lambda *_: steps.append(1))))
    assert sizes == [2] * drawn.method.cost.mask and drawn.method.cost == (0, 5 if sampler == "heun" else 3)
    assert len(steps) == drawn.method.steps == 3  # of the process, whatever the calls of each


@pytest.mark.parametrize("flags", [{}, {"learn_sigma": True}, {"predict_xstart": True}, {"prediction": "v"},
                                   {"learn_sigma": True, "predict_xstart": True, "rescale_timesteps": True}])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_waits_for_the_device(sampler, flags):
    """Nothing can be read off the meta device; on another, reading waits for all the work that was given to it."""
    channels = 2 if "learn_sigma" in flags else 1

    def network(x, t):
        return torch.randn(len(x), channels, *x.shape[2:], device=x.device)

    def reading(x, t):
        return network(x, t) * network(x, t).mean().item()

    x = torch.randn(2, 1, SIZE, SIZE, device="meta")
    for clip_denoised in (True, False):
        diffusion = create_gaussian_diffusion(timestep_respacing="5", **flags)
        steps = list(SAMPLERS[sampler](diffusion, network, x, clip_denoised=clip_denoised))
        assert len(steps) == 5 and all(part.is_meta and part.shape == x.shape for step in steps for part in step)
        with pytest.raises(RuntimeError, match="meta"):
            list(SAMPLERS[sampler](diffusion, reading, x, clip_denoised=clip_denoised))


def test_every_sampler_draws_something_of_its_own(model, diffusion, cases):
    drawn = [draw(model, diffusion, cases[:1], n=1, clip_denoised=False, sampler=sampler)["case 0"]
             for sampler in SAMPLERS]
    for i, samples in enumerate(drawn):
        assert np.isfinite(samples).all()
        assert not any(np.allclose(samples, other, atol=1e-4) for other in drawn[:i])


def test_samplers_without_noise_follow_from_the_first_noise_alone(model, diffusion, cases, monkeypatch):
    """And the others do not: that is all they differ in from one member to the next."""
    one = MemberNoise(0, [("case 0", 0)])(torch.empty(1, 1, SIZE, SIZE))
    for sampler in SAMPLERS:
        results = []
        for seed in (1, 2):
            calls = []

            def noise(self, like, calls=calls, seed=seed):
                calls.append(1)
                generator = torch.Generator().manual_seed(seed)
                return one.clone() if len(calls) == 1 else torch.randn(like.shape, generator=generator)

            monkeypatch.setattr(MemberNoise, "__call__", noise)
            results.append(draw(model, diffusion, cases[:1], n=1, sampler=sampler)["case 0"])
        assert np.array_equal(*results) == (sampler in ("ddim", "dpm++", "heun"))


def test_eta_makes_ddim_noisy(model, diffusion, cases):
    plain, none, noisy = (draw(model, diffusion, cases[:1], n=1, sampler="ddim", sampler_options=options)["case 0"]
                          for options in ({}, {"eta": 0.0}, {"eta": 0.9}))
    assert np.array_equal(plain, none) and not np.allclose(plain, noisy, atol=1e-3)


def test_option_of_another_sampler_is_an_error(model, diffusion, cases):
    for sampler in set(SAMPLERS) - {"ddim"}:
        with pytest.raises(TypeError, match="eta"):
            draw(model, diffusion, cases[:1], n=1, sampler=sampler, sampler_options={"eta": 0.5})


def test_unknown_sampler_is_an_error(model, diffusion):
    with pytest.raises(KeyError, match="best"):
        make_sampler(model, diffusion, sampler="best")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_call_is_timed_on_full_batches_and_leaves_no_trace(model, diffusion, cases, dtype):
    sampler = make_sampler(model, diffusion, batch_size=3, dtype=dtype, sampler="dpm++sde")
    model = sampler.method.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = [samples for _, samples in sampler.ensembles(cases[:1], 1)]
    image, state, numpy_state = cases[0].image.copy(), torch.get_rng_state(), np.random.get_state()[1].copy()
    seconds = []
    sizes = counted(model, lambda: seconds.append(sampler.seconds_a_call(cases[0].image)))
    assert sizes == [3, 3] and isinstance(seconds[0], float) and 0 < seconds[0] < 60
    assert np.array_equal(cases[0].image, image)
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert np.array_equal([samples for _, samples in sampler.ensembles(cases[:1], 1)], drawn)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_timed_call_is_one_like_those_that_draw(model, diffusion, cases, dtype):
    """On other timesteps, x and scans perhaps, but in the same precision and without a graph."""
    sampler, seen = make_sampler(model, diffusion, batch_size=2, dtype=dtype), []
    model = sampler.method.model

    def look(module, args, kwargs, output):
        arguments = (*args, *kwargs.values())
        seen.append([(value.shape, value.dtype, value.requires_grad) for value in (*arguments, output)])

    inner = model.out.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    hook = model.register_forward_hook(look, with_kwargs=True)
    try:
        sampler.seconds_a_call(cases[0].image)
        list(sampler.ensembles(cases[:1], 2))
    finally:
        hook.remove()
        inner.remove()
    assert len(seen) == 2 * (2 + 3) and seen == seen[:2] * 5


def test_time_of_a_call_leaves_out_the_first(model, diffusion, cases, monkeypatch):
    """Which also chooses algorithms: here it takes 10 seconds, and the second call 2."""
    clock, takes = [0.0], iter([10, 2])
    hook = model.register_forward_hook(lambda module, args, output: clock.append(clock[-1] + next(takes)))
    monkeypatch.setattr(ensembles.time, "perf_counter", lambda: clock[-1])
    try:
        assert make_sampler(model, diffusion).seconds_a_call(cases[0].image) == 2
    finally:
        hook.remove()


def test_bfloat16_draws_nearly_the_same(model, diffusion, cases):
    expected = draw(model, diffusion, cases[:1], sampler="ddim")["case 0"]
    got = draw(model, diffusion, cases[:1], sampler="ddim", dtype=torch.bfloat16)["case 0"]
    assert got.dtype == np.float32 and 0 < np.abs(got - expected).mean() < 0.05


# ---- memory ----

class SmallMemory(torch.nn.Module):
    """A model that runs out of memory on more than `most` rows."""

    def __init__(self, model, most):
        super().__init__()
        self.model, self.most, self.sizes = model, most, []

    def forward(self, x, *args, **kwargs):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError
        return self.model(x, *args, **kwargs)


def test_a_batch_too_large_for_the_memory_is_halved_and_nobody_is_lost(model, diffusion, cases):
    expected = draw(model, diffusion, cases[:3], batch_size=2, sampler="ddim")
    small = SmallMemory(model, 2)
    sampler = make_sampler(small, diffusion, batch_size=8, sampler="ddim")
    got = {case.name: samples for case, samples in sampler.ensembles(cases[:3], 3)}
    assert list(got) == list(expected) and sampler.batch_size == 2
    assert all(np.array_equal(got[name], expected[name]) for name in expected)
    assert small.sizes[:2] == [8, 4] and set(small.sizes[2:]) == {2}


def test_automatic_batch_size_is_what_fits_and_one_row_that_does_not_is_an_error(model, diffusion, cases):
    sampler = make_sampler(SmallMemory(model, 3), diffusion, batch_size=16)
    sampler.fit_batch_size(cases[0].image)
    assert sampler.batch_size == 2
    nothing_fits = make_sampler(SmallMemory(model, 0), diffusion, batch_size=4)
    assert "memory" in refusal(nothing_fits.fit_batch_size, cases[0].image)
    assert "memory" in refusal(lambda: list(nothing_fits.ensembles(cases[:1], 2)))
