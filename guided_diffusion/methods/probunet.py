"""The Probabilistic U-Net (Kohl et al. 2018, arXiv 1806.05034): a conditional variational autoencoder of masks.

A U-Net sees the scan once. A vector z, drawn from a Gaussian that the scan decides, picks one mask. As published with
--network conv_unet; any other network of the package may stand in its place.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Independent, kl_divergence
from torch.nn import functional as F

from .. import dist_util
from ..data import masks
from ..data.noise import MemberNoise, step_noise
from ..data.stream import Batch, chosen_masks
from ..networks import NETWORKS
from ..networks.base import freeze
from ..networks.tiles import blend, cut
from ..nn import compile_network
from ..system.errors import InputError
from ..system.flag import Flag, parse_filters
from . import METHODS
from .base import Cost, Losses, Method, Row, select
from .encoders import AxisAlignedConvGaussian

FLAGS = [
    Flag("probunet_filters", str, "32,64,128,192", "filters of each block of prior and posterior; the first is also the"
         " number of features that the network returns", "method"),
    Flag("probunet_convs", int, 3, "convolutions a block of prior and posterior", "method", least=1, most=1024),
    Flag("probunet_latent_dim", int, 6, "dimensions of z", "method", least=1, most=65536),
    Flag("beta", float, 10.0, "weight of KL(posterior || prior) beside the cross-entropy, which is summed over the"
         " pixels (published for LIDC-IDRI: 10)", "training", least=0),
]
COMBINING = 3  # 1 x 1 convolutions with ReLU that combine features and z, before the one that returns the logit


class FeaturesAndLatent(nn.Module):
    """The networks that draw: U-Net, prior, and the 1 x 1 convolutions that combine the features with z.

    :param unet: returns `features` channels of a scan.
    :param prior: p(z | image), with z of `latent_dim` dimensions.
    """

    def __init__(self, unet: nn.Module, prior: AxisAlignedConvGaussian, features: int, latent_dim: int):
        super().__init__()
        self.frozen = tuple(f"unet.{name}" for name in getattr(unet, "frozen", ()))
        self.unet, self.prior = unet, prior
        widths = [features + latent_dim, *[features] * COMBINING]
        layers = [layer for i, o in zip(widths, widths[1:]) for layer in (nn.Conv2d(i, o, 1), nn.ReLU())]
        self.combine = nn.Sequential(*layers, nn.Conv2d(features, masks.CHANNELS, 1))
        for layer in self.combine:
            if isinstance(layer, nn.Conv2d):
                nn.init.orthogonal_(layer.weight)
                nn.init.trunc_normal_(layer.bias, std=0.001)

    def features(self, image: Tensor) -> Tensor:
        """image [N, C, H, W] in [0, 1] -> [N, features, H, W]."""
        no_mask, no_step = image[:, :0], torch.zeros(len(image), device=image.device)
        return self.unet(no_mask, no_step, image=image)

    def logits(self, features: Tensor, z: Tensor) -> Tensor:
        """features [N, features, H, W] and z [N, latent_dim] -> [N, 1, H, W] float32; a pixel is marked above 0."""
        z = z.to(features.dtype)[:, :, None, None].expand(-1, -1, *features.shape[2:])
        return self.combine(torch.cat([features, z], dim=1)).float()

    def forward(self, image: Tensor, z: Tensor) -> tuple[Tensor, Independent]:
        """image [N, C, H, W] in [0, 1], z [N, latent_dim] -> logits [N, 1, H, W], and the prior p(z | image)."""
        return self.logits(self.features(image), z), self.prior(image)


@METHODS.add("probunet", "the Probabilistic U-Net, with --network conv_unet as published", FLAGS)
class ProbUNet(Method):
    """U-Net, prior and posterior, trained on the evidence lower bound (section 2).

    :param posterior: q(z | image, rater's mask); None for one that only draws.
    :param beta: weight of the KL term.
    """

    loss_names = ["loss", "ce", "kl"]
    cost = Cost(scan=1, mask=0)  # a mask takes no more than the 1 x 1 convolutions

    def __init__(self, model: FeaturesAndLatent, posterior: AxisAlignedConvGaussian | None = None, beta: float = 10.0):
        super().__init__()
        self.model, self.posterior, self.beta, self.side = freeze(model), posterior, beta, 0
        self.to(memory_format=torch.channels_last)  # convolutions at full resolution are faster so, on CPUs too

    @classmethod
    def from_flags(cls, flags: SimpleNamespace, model: nn.Module | None = None, training: bool = True) -> "ProbUNet":
        filters = parse_filters(flags.probunet_filters, "probunet_filters")

        def encoder(sees_mask):
            return AxisAlignedConvGaussian(flags.image_channels, filters, flags.probunet_convs,
                                           flags.probunet_latent_dim, sees_mask)

        if model is None:
            unet = NETWORKS[flags.network](flags, 0, filters[0])
            model = FeaturesAndLatent(unet, encoder(sees_mask=False), filters[0], flags.probunet_latent_dim)
        return cls(model, encoder(sees_mask=True), flags.beta) if training else cls(model)

    @classmethod
    def settle_flags(cls, flags: SimpleNamespace, given: dict) -> None:
        if given.get("beta") == 0:
            raise InputError("--beta 0: the prior would not be trained, which masks are drawn with; give a number"
                             " above 0")

    # ---- training ----

    def forward(self, batch: Batch) -> Losses:
        terms = self.losses(batch.image, chosen_masks(batch), batch.seed, batch.places)
        return Losses(terms, weights=torch.ones_like(terms["loss"]))

    def losses(self, image: Tensor, mask: Tensor, seed: int, places: Sequence[int]) -> dict[str, Tensor]:
        """The negative evidence lower bound (Kohl et al. 2018, eq. 4), with z drawn once from the posterior.

        image [N, C, H, W] and mask [N, 1, H, W] in [0, 1]; z follows from the seed and the N places.

        Returns a dict of [N] float32, in nats: loss = ce + beta * kl, ce the cross-entropy summed over the pixels, and
        kl = KL(posterior || prior).
        """
        posterior = self.posterior(image, mask)
        _, noise = step_noise(seed, places, posterior.mean)  # [N, latent_dim]
        logits, prior = self.model(image, posterior.mean + posterior.stddev * noise)
        ce = F.binary_cross_entropy_with_logits(logits, mask.float(), reduction="none").sum((1, 2, 3))
        kl = kl_divergence(posterior, prior)
        return {"loss": ce + self.beta * kl, "ce": ce, "kl": kl}

    def training_networks(self) -> dict[str, nn.Module]:
        return {"posterior": self.posterior}

    # ---- drawing ----

    def prepare(self, dtype: torch.dtype | None = None, compile: bool = False) -> "ProbUNet":
        self.eval()
        self.autocast = dtype
        if compile:
            compile_network(self.model.unet, dist_util.dev())
        return self

    def tile(self, side: int) -> None:
        """Logits are blended. z has the same noise in all tiles of a mask."""
        self.side = side

    @torch.no_grad()
    def encode(self, images: Tensor) -> dict[str, Any]:
        """features [S, features, H, W], and mean and std [S, latent_dim] of the prior; or those of each tile, and what
        a mask is like."""
        if self.side:
            return {"like": images[:, :1], "tiles": [self._encode(part) for part in cut(images, self.side)]}
        return self._encode(images)

    def _encode(self, images):
        with self.precision(images.device):
            prior = self.model.prior(images)
            return {"features": self.model.features(images), "mean": prior.mean, "std": prior.stddev}

    @torch.no_grad()
    def draw(self, encoded: dict[str, Any], rows: Sequence[Row], seed: int,
             on_step: Callable[[Tensor, Tensor], None] = lambda *_: None) -> Tensor:
        """The probability that a pixel is marked, given z; cut at 0.5 it is the most likely mask, as published."""
        encoded = select(encoded, [scan for scan, _, _ in rows])
        parts = encoded["tiles"] if self.side else [encoded]
        noise = MemberNoise(seed, [(case, member) for _, case, member in rows])(parts[0]["mean"])
        with self.precision(noise.device):
            logits = (self.model.logits(part["features"], part["mean"] + part["std"] * noise) for part in parts)
            samples = (blend(logits, *encoded["like"].shape[2:], self.side) if self.side else next(logits)).sigmoid()
        on_step(samples, samples)
        return samples[:, 0].cpu()
