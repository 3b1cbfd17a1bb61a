"""Networks that train and sample in a moment, and what is equal to the last bit."""

import operator
from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

from guided_diffusion.flags import defaults, settle
from guided_diffusion.methods.base import Cost, Losses, Method, select
from guided_diffusion.methods.cimd import CIMD
from guided_diffusion.networks.base import Denoiser
from guided_diffusion.script_util import create_encoders, create_gaussian_diffusion, create_method, create_model

# flags of a U-Net and a diffusion process that train and sample in a moment
MODEL = dict(image_size=16, num_channels=32, channel_mult="1,2", num_res_blocks=1, attention_resolutions="8",
             num_heads=1, diffusion_steps=30)
# of --method probunet
PROBUNET = dict(method="probunet", network="conv_unet", image_size=16, conv_unet_filters="4,8", conv_unet_convs=1,
                probunet_filters="4,8", probunet_convs=1, probunet_latent_dim=3)
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


def make_probunet(seed=0, model=None, training=True, **flags):
    """The Probabilistic U-Net with small networks and these flags."""
    torch.manual_seed(seed)
    args = SimpleNamespace(**{**defaults("model", "method", "training"), **PROBUNET, "image_channels": 1, **flags})
    return create_method(args, model, training)


# flags of --method energy with a network that trains and draws in a moment
ENERGY = dict(method="energy", image_size=SIZE, image_channels=1, num_channels=32, channel_mult="1", num_res_blocks=1,
              attention_resolutions="", pixel_unshuffle=2, latent_size=4, head_channels=8, head_width=16)


def energy_flags(**changed):
    """All flags of the training and the drawing of ENERGY, settled."""
    flags = SimpleNamespace(**{**defaults("model", "diffusion", "method", "training", "sampling"), **ENERGY, **changed})
    settle(flags, changed)
    return flags


def make_energy(seed=0, model=None, **changed):
    """The energy method; to draw with independent members, of a network that draws."""
    torch.manual_seed(seed)
    return create_method(energy_flags(spread=False, **changed), model, training=model is None)


class MeanOutline(Method):
    """A method without diffusion: one convolution that predicts which share of the raters marks a pixel. Every member
    is the same, and a scan is seen once. It counts the examples that it has learnt from."""

    def __init__(self, seed=0, model=None):
        super().__init__()
        torch.manual_seed(seed)
        self.model = nn.Conv2d(1, 1, 3, padding=1) if model is None else model
        self.examples = 0

    @classmethod
    def from_flags(cls, flags, model=None, training=True):
        return cls(flags.seed, model)

    @property
    def loss_names(self):
        return ["loss"]

    def forward(self, batch):
        raters = batch.present.sum(1)
        share = batch.masks.sum(1, keepdim=True) / raters.view(-1, 1, 1, 1)  # [N, 1, S, S]
        losses = F.binary_cross_entropy_with_logits(self.model(batch.image), share, reduction="none").mean((1, 2, 3))
        return Losses({"loss": losses}, torch.ones(len(losses)), seen={"raters": raters})

    def after_step(self, losses):
        self.examples += len(losses.terms["loss"])

    def training_state(self):
        return {"outline": {"examples": self.examples}}

    def load_training_state(self, state):
        self.examples = operator.index(state["outline"]["examples"])

    def prepare(self, dtype=None, compile=False):
        return self.eval()

    @property
    def cost(self):
        return Cost(1, 0)

    @torch.no_grad()
    def encode(self, images):
        return self.model(images)[:, 0].sigmoid()  # [S, H, W]

    def draw(self, encoded, rows, seed, on_step=lambda *_: None):
        masks = select(encoded, [scan for scan, _, _ in rows])
        on_step(masks[:, None], masks[:, None])
        return masks


class WithFrozenEncoder(Denoiser):
    """A denoiser that sees a scan through features which are never trained, and a batch norm whose statistics stay."""

    frozen = ("encoder",)

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Tanh())
        self.encoder[1].running_mean.normal_()
        self.head = nn.Conv2d(5, 1, 3, padding=1)
        nn.init.normal_(self.head.weight, std=0.3)
        self.time = nn.Linear(1, 1)

    def encode(self, image):
        return {"features": self.encoder(image)}

    def denoise(self, x, timesteps, encoded):
        shift = self.time(timesteps.float()[:, None] / 1000)[..., None, None]
        return self.head(torch.cat([x, encoded["features"]], 1)) + shift


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


def pick(args, *groups):
    """The flags of these groups out of a namespace, as a dict."""
    return {name: getattr(args, name) for name in defaults(*groups)}
