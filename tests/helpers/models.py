"""Networks that train and sample in a moment, and what is equal to the last bit."""

import torch

from guided_diffusion.methods.cimd import CIMD
from guided_diffusion.script_util import create_encoders, create_gaussian_diffusion, create_model

# flags of a U-Net and a diffusion process that train and sample in a moment
MODEL = dict(image_size=16, num_channels=32, channel_mult="1,2", num_res_blocks=1, attention_resolutions="8",
             num_heads=1, diffusion_steps=30)
SIZE = 16  # pixels a side


def make_cimd(seed=0, kl_weight=0.001, num_channels=32, dropout=0.0, use_scale_shift_norm=True, schedule_sampler=None,
              **diffusion):
    """CIMD with small networks; `diffusion` are options of create_gaussian_diffusion."""
    torch.manual_seed(seed)
    model = create_model(image_size=SIZE, image_channels=1, num_channels=num_channels, channel_mult="1,2",
                         num_res_blocks=1, num_heads=1, attention_resolutions="8", dropout=dropout,
                         use_scale_shift_norm=use_scale_shift_norm, learn_sigma=diffusion.get("learn_sigma", False))
    encoders = create_encoders(num_filters="8,16", no_convs_per_block=2, kl_weight=kl_weight, image_channels=1)
    return CIMD(create_gaussian_diffusion(**diffusion), model, *encoders, kl_weight, schedule_sampler)


def awake(cimd, seed=0):
    """Without the zeros of the initialisation, behind which no gradient flows."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in cimd.model.parameters():
        with torch.no_grad():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return cimd


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_same(a, b):
    """Equal to the last bit: nested containers of tensors and numbers."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b
