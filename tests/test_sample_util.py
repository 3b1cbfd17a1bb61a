"""Ensembles depend on what they should and on nothing else, and their files say what was drawn."""

import copy
import os
import threading
import zipfile

import numpy as np
import pytest
import torch
from helpers import refusal
from PIL import Image

from guided_diffusion.data.cases import Case
from guided_diffusion.data.masks import to_masks
from guided_diffusion.data.noise import MemberNoise
from guided_diffusion.samplers import SAMPLERS
from guided_diffusion.sampling import ensembles, files
from guided_diffusion.sampling.ensembles import EnsembleSampler
from guided_diffusion.sampling.files import is_complete, write_case
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


def draw(model, diffusion, cases, n=3, dtype=None, **options):
    if dtype:
        model = copy.deepcopy(model).convert_for_sampling(dtype)
    sampler = EnsembleSampler(model, diffusion, **options)
    return {case.name: samples for case, samples in sampler.ensembles(cases, n)}


# ---- noise ----

def test_noise_follows_from_seed_case_and_number_alone():
    shape = torch.empty(1, 1, 8, 8)
    alone = MemberNoise(3, [("b", 1)])
    first, second = alone(shape), alone(shape)
    among = MemberNoise(3, [("a", 0), ("b", 0), ("b", 1), ("c", 1)])
    for expected in (first, second):
        assert torch.equal(among(torch.empty(4, 1, 8, 8))[2:3], expected)
    assert not torch.equal(first, second)
    for seed, member in ((4, ("b", 1)), (3, ("b", 2)), (3, ("a", 1)), (3, ("", "b1"))):
        assert not torch.equal(MemberNoise(seed, [member])(shape), first)


def test_noise_is_standard_normal_and_takes_the_dtype_asked_for():
    noise = MemberNoise(0, [("a", i) for i in range(100)])(torch.empty(100, 1, 32, 32))
    assert abs(noise.mean()) < 5 / np.sqrt(noise.numel()) and abs(noise.var() - 1) < 5 * np.sqrt(2 / noise.numel())
    assert MemberNoise(0, [("a", 1)])(torch.empty(1, 1, 2, 2, dtype=torch.float64)).dtype == torch.float64


# ---- ensembles ----

def test_ensembles_come_whole_and_in_order(model, diffusion, cases):
    sampler = EnsembleSampler(model, diffusion, batch_size=4)
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

    ensembles = EnsembleSampler(model, diffusion, batch_size=2).ensembles(reading(), 2)
    assert next(ensembles)[0].name == "case 0" and read == ["case 0"]


@pytest.mark.parametrize("options", [{}, {"sampler": "ddim"}, {"sampler": "ddim", "ddim_eta": 0.7},
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
    list(EnsembleSampler(model, diffusion, batch_size=4).ensembles(cases[:3], 3, lambda *_: steps.append(1)))
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
    drawn, steps = EnsembleSampler(model, diffusion, batch_size=2, sampler=sampler), []
    sizes = counted(model, lambda: list(drawn.ensembles(cases[:2], 1, lambda *_: steps.append(1))))
    assert sizes == [2] * drawn.calls and drawn.calls == (5 if sampler == "heun" else 3)
    assert len(steps) == 3  # of the process, whatever the calls of each


@pytest.mark.parametrize("flags", [{}, {"learn_sigma": True}, {"predict_xstart": True},
                                   {"learn_sigma": True, "predict_xstart": True, "rescale_timesteps": True}])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_sampler_waits_for_the_device(sampler, flags):
    """Nothing can be read off the meta device; on another, reading waits for all the work that was given to it."""
    channels = 2 if "learn_sigma" in flags else 1

    def network(x, t):
        return torch.randn(len(x), channels, *x.shape[2:], device=x.device)

    def reading(x, t):
        return network(x, t) * network(x, t).mean().item()

    walk, _ = SAMPLERS[sampler]
    x = torch.randn(2, 1, SIZE, SIZE, device="meta")
    for clip_denoised in (True, False):
        diffusion = create_gaussian_diffusion(timestep_respacing="5", **flags)
        steps = list(walk(diffusion, network, x, clip_denoised=clip_denoised))
        assert len(steps) == 5 and all(part.is_meta and part.shape == x.shape for step in steps for part in step)
        with pytest.raises(RuntimeError, match="meta"):
            list(walk(diffusion, reading, x, clip_denoised=clip_denoised))


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


def test_eta_is_for_ddim_only(model, diffusion, cases):
    for sampler in SAMPLERS:
        plain, noisy = (draw(model, diffusion, cases[:1], n=1, sampler=sampler, ddim_eta=eta)["case 0"]
                        for eta in (0.0, 0.9))
        assert np.array_equal(plain, noisy) == (sampler != "ddim")


def test_unknown_sampler_is_an_error(model, diffusion):
    with pytest.raises(KeyError, match="best"):
        EnsembleSampler(model, diffusion, sampler="best")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_call_is_timed_on_full_batches_and_leaves_no_trace(model, diffusion, cases, dtype):
    model = copy.deepcopy(model).convert_for_sampling(dtype)
    sampler = EnsembleSampler(model, diffusion, batch_size=3, sampler="dpm++sde")
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
    model = copy.deepcopy(model).convert_for_sampling(dtype)
    sampler, seen = EnsembleSampler(model, diffusion, batch_size=2), []

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
        assert EnsembleSampler(model, diffusion).seconds_a_call(cases[0].image) == 2
    finally:
        hook.remove()


def test_bfloat16_draws_nearly_the_same(model, diffusion, cases):
    expected = draw(model, diffusion, cases[:1], sampler="ddim")["case 0"]
    got = draw(model, diffusion, cases[:1], sampler="ddim", dtype=torch.bfloat16)["case 0"]
    assert got.dtype == np.float32 and 0 < np.abs(got - expected).mean() < 0.05


# ---- masks ----

def brute_median(mask, side):
    padded = np.pad(mask.astype(int), side // 2, mode="edge")
    height, width = mask.shape
    return np.array([[np.median(padded[y:y + side, x:x + side]) for x in range(width)] for y in range(height)]) > 0.5


def test_masks_are_above_the_middle():
    samples = np.array([[[0.0, 0.5, np.nextafter(np.float32(0.5), np.float32(1)), 1.0]]], np.float32)
    assert to_masks(samples).tolist() == [[[False, False, True, True]]]


@pytest.mark.parametrize("side", [3, 5, 7])
def test_median_blur_is_the_median_of_each_neighbourhood(side):
    samples = np.random.default_rng(side).random((3, 13, 17)).astype(np.float32)
    samples[2, :, :9] = 1
    masks = to_masks(samples, side)
    assert masks.dtype == bool
    for mask, sample in zip(masks, samples):
        assert np.array_equal(mask, brute_median(sample > 0.5, side))


@pytest.mark.parametrize("side", [0, 1])
def test_no_median_blur_changes_nothing(side):
    samples = np.random.default_rng(0).random((2, 9, 9)).astype(np.float32)
    assert np.array_equal(to_masks(samples, side), samples > 0.5)


# ---- files ----

@pytest.fixture
def written(tmp_path, cases):
    samples = np.random.default_rng(1).normal(0.5, 1, (3, SIZE, SIZE)).astype(np.float32)
    write_case(tmp_path, cases[0], samples, fingerprint="abc")
    return tmp_path, samples


def test_files_of_a_case_hold_its_masks_mean_spread_and_samples(written):
    folder, samples = written
    names = ["ensemble.npz", "mean.png", "montage.png", "output0.png", "output1.png", "output2.png", "std.png"]
    assert sorted(os.listdir(folder)) == [f"case 0_{name}" for name in names]
    masks = samples > 0.5
    for i, mask in enumerate(masks):
        picture = Image.open(folder / f"case 0_output{i}.png")
        assert picture.mode == "L" and np.array_equal(np.asarray(picture), mask * 255)
    for kind, expected in (("mean", 255 * masks.mean(0)), ("std", 255 * 2 * masks.std(0))):
        picture = Image.open(folder / f"case 0_{kind}.png")
        assert picture.mode == "L" and np.abs(np.asarray(picture) - expected).max() <= 0.5
    assert Image.open(folder / "case 0_montage.png").size[0] > 5 * 160
    with np.load(folder / "case 0_ensemble.npz", allow_pickle=False) as stored:
        assert np.array_equal(stored["samples"], samples) and stored["samples"].dtype == np.float32
        assert str(stored["fingerprint"]) == "abc"


def test_median_blur_smooths_the_masks_but_not_the_samples(tmp_path, cases):
    samples = np.random.default_rng(1).random((2, SIZE, SIZE)).astype(np.float32)
    write_case(tmp_path, cases[0], samples, median_blur=3)
    stored = np.asarray(Image.open(tmp_path / "case 0_output1.png")) > 0
    assert np.array_equal(stored, brute_median(samples[1] > 0.5, 3))
    assert np.array_equal(np.load(tmp_path / "case 0_ensemble.npz")["samples"], samples)


def test_members_of_a_larger_older_ensemble_are_removed_and_no_other_file(written, cases):
    folder, samples = written
    others = ["case 0_output3.png.txt", "case 0_outputx.png", "case 00_output7.png", "case 0_b_output7.png", "notes"]
    for name in others:
        (folder / name).write_text("mine")
    write_case(folder, cases[0], samples[:1])
    assert {"case 0_output0.png", *others} < set(os.listdir(folder))
    assert not {"case 0_output1.png", "case 0_output2.png"} & set(os.listdir(folder))
    assert all((folder / name).read_text() == "mine" for name in others)


def test_case_names_with_special_characters_are_taken_literally(tmp_path, cases):
    name = "a+(b) [größer] 病例"
    case = cases[0]._replace(name=name)
    samples = np.zeros((2, SIZE, SIZE), np.float32)
    write_case(tmp_path, case, samples, fingerprint="f")
    write_case(tmp_path, case, samples[:1], fingerprint="f")
    assert is_complete(tmp_path, name, (1, SIZE, SIZE), "f") and not (tmp_path / f"{name}_output1.png").exists()


# ---- what is already done ----

def test_written_case_is_complete_for_its_own_fingerprint_and_size_only(written):
    folder, _ = written
    assert is_complete(folder, "case 0", (3, SIZE, SIZE), "abc")
    assert not is_complete(folder, "case 0", (3, SIZE, SIZE), "abd")
    assert not is_complete(folder, "case 0", (2, SIZE, SIZE), "abc")
    assert not is_complete(folder, "case 0", (4, SIZE, SIZE), "abc")
    assert not is_complete(folder, "case 1", (3, SIZE, SIZE), "abc")
    assert not is_complete(folder / "nowhere", "case 0", (3, SIZE, SIZE), "abc")


@pytest.mark.parametrize("kind", ["output0.png", "output2.png", "mean.png", "std.png", "montage.png", "ensemble.npz"])
def test_case_that_lacks_a_file_is_incomplete(written, kind):
    folder, _ = written
    (folder / f"case 0_{kind}").unlink()
    assert not is_complete(folder, "case 0", (3, SIZE, SIZE), "abc")


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 0x5A]) + data[position + 1:]


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: b"hello", lambda data: data[:len(data) // 2], lambda data: data[:-1],
    lambda data: flip(data, 0), lambda data: flip(data, len(data) // 3), lambda data: flip(data, 120),
], ids=["empty", "text", "half", "last byte", "first byte", "middle", "header"])
def test_case_whose_samples_are_damaged_is_incomplete(written, damage):
    folder, _ = written
    path = folder / "case 0_ensemble.npz"
    path.write_bytes(damage(path.read_bytes()))
    assert is_complete(folder, "case 0", (3, SIZE, SIZE), "abc") is False


def test_no_damage_to_a_single_byte_is_an_error(written):
    folder, _ = written
    path = folder / "case 0_ensemble.npz"
    data = path.read_bytes()
    answers = []
    for position in range(0, len(data), 19):
        path.write_bytes(flip(data, position))
        answers.append(is_complete(folder, "case 0", (3, SIZE, SIZE), "abc"))
    assert set(answers) <= {True, False} and np.mean(answers) < 0.1


def test_other_arrays_do_not_count_as_samples(written):
    folder, samples = written
    path = folder / "case 0_ensemble.npz"
    np.savez(path, samples=samples)
    assert not is_complete(folder, "case 0", (3, SIZE, SIZE), "abc")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("samples.npy", "no array")
        file.writestr("fingerprint.npy", "no array")
    assert not is_complete(folder, "case 0", (3, SIZE, SIZE), "abc")


def test_fingerprint_changes_with_the_scan_and_every_setting(cases):
    case = cases[0]
    settings = {"seed": 0, "image_size": 16, "model": "0" * 64, "sampler": "ancestral"}
    fingerprint = files.fingerprint(case, **settings)
    assert files.fingerprint(case, **dict(reversed(settings.items()))) == fingerprint
    assert files.fingerprint(case._replace(masks=case.masks[:0]), **settings) == fingerprint
    brighter = case.image.copy()
    brighter[0, 3, 3] += 1 / 255
    others = [files.fingerprint(case._replace(image=brighter), **settings)]
    for name, value in (("seed", 1), ("image_size", 32), ("model", "1" * 64), ("sampler", "ddim"), ("new", 1)):
        others.append(files.fingerprint(case, **{**settings, name: value}))
    assert len({fingerprint, *others}) == 1 + len(others)


# ---- memory and threads ----

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
    sampler = EnsembleSampler(small, diffusion, batch_size=8, sampler="ddim")
    got = {case.name: samples for case, samples in sampler.ensembles(cases[:3], 3)}
    assert list(got) == list(expected) and sampler.batch_size == 2
    assert all(np.array_equal(got[name], expected[name]) for name in expected)
    assert small.sizes[:2] == [8, 4] and set(small.sizes[2:]) == {2}


def test_automatic_batch_size_is_what_fits_and_one_row_that_does_not_is_an_error(model, diffusion, cases):
    sampler = EnsembleSampler(SmallMemory(model, 3), diffusion, batch_size=16)
    sampler.fit_batch_size(cases[0].image)
    assert sampler.batch_size == 2
    nothing_fits = EnsembleSampler(SmallMemory(model, 0), diffusion, batch_size=4)
    assert "memory" in refusal(nothing_fits.fit_batch_size, cases[0].image)
    assert "memory" in refusal(lambda: list(nothing_fits.ensembles(cases[:1], 2)))


def test_writer_runs_everything_in_order_beside_the_caller():
    done, gate = [], threading.Event()
    with files.BackgroundWriter(most_waiting=5) as write:
        write(gate.wait)
        for i in range(3):
            write(done.append, i)
        assert done == []  # the caller went on while the first one waited
        gate.set()
        for i in range(3, 50):
            write(done.append, i)
    assert done == list(range(50))


def test_an_error_of_the_writer_reaches_the_caller():
    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), files.BackgroundWriter() as write:
        write(fail)
    with pytest.raises(OSError, match="disk full"), files.BackgroundWriter(most_waiting=1) as write:
        for _ in range(10):
            write(fail)
