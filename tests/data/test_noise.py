"""The noise of a member follows from seed, case and number alone."""


import numpy as np
import torch

from guided_diffusion.data.noise import MemberNoise


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
