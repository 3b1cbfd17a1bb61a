"""Training on the score itself: one pass over a scan, then one small head a mask.

A network turns the scan into features. A head turns the features and fresh noise into the mask of an expert who marks
something: a latent z, alike over the whole mask, and smooth noise at a few scales. How probable it is that an expert
marks nothing is said by the head too, or by a small network of its own. Nothing is diffused. All raters of a scan count
in every step, by two proper scores:

    whether    the cross-entropy of the probability of an empty mask
    where      the energy score of draws against the masks that are not empty, see energy_score.py

Whether an expert marks anything decides most of GED on LIDC-IDRI. With a probability of its own, its gradient has no
noise, and no draw has to be half a mask. It is also what a large network learns by heart first, which is why a small
one may say it.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace

import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.cases import Case
from ..data.masks import without_crumbs
from ..data.noise import MemberNoise, spread_noise, step_noise
from ..data.stream import Batch
from ..dist_util import dev, device_of
from ..energy_score import energy_score
from ..networks import NETWORKS
from ..networks.base import Encoded, freeze
from ..networks.presence import GROUPS, PresenceNetwork
from ..networks.tiles import blend, cut, tiles
from ..nn import compile_network, zero_module
from ..system.errors import InputError
from ..system.flag import Flag
from . import METHODS
from .base import Cost, Losses, Method, Row, select

NOISE_SPACINGS = 4, 8, 16  # pixels between the grid points of the smooth noise
BLOCK = 2  # the head works at half resolution, and each of its places draws BLOCK x BLOCK pixels
POOLS = 4  # weighted means over the scan

FLAGS = [
    Flag("field_of_view", int, 0, "see and draw the central so many pixels of a side only, for scans centred on"
         " what is outlined; beyond them masks are empty (0: the whole scan)", "method", least=0),
    Flag("latent_size", int, 16, "numbers of noise that shape a whole mask", "method", least=1, most=1024),
    Flag("head_channels", int, 32, "channels of the head that draws a mask", "method", least=1, most=1024),
    Flag("head_width", int, 256, "width of the head's fully connected layers", "method", least=1, most=65536),
    Flag("presence_channels", int, 0, "channels of a small network of its own that says how probable an empty mask is,"
         f" a multiple of {GROUPS} (0: the head says it)", "method", least=0, most=1024),
    Flag("presence_views", bool, False, "in drawing, take the mean of that network's logits over the 8 flips and turns"
         " of a scan; for models trained with --augment flips,rot90", "method"),
    Flag("smallest_part", float, 0.0, "leave out the parts of a drawn mask that are smaller than this share of its"
         " largest part (0: keep all)", "method", least=0, most=1),
    Flag("energy_loss", ("both", "whether", "where"), "both", "what is trained: whether (the network of"
         " --presence_channels), where (all others), or both", "training"),
    Flag("energy_draws", int, 8, "masks drawn of each scan in a step", "training", least=1, most=1024),
    Flag("energy_dummy", float, 2.0, "pixels of the element that all masks share in the Jaccard distance of training;"
         " above 0, so that the gradient is finite at empty masks", "training"),
    Flag("spread", bool, True, "spread the members of a case evenly over the distribution (Sobol points): each alone is"
         " still an exact draw, together they show it better. False: independent draws", "sampling"),
]


class MaskHead(nn.Module):
    """Features of a scan -> the probability of an empty mask, and the logits of the mask of one draw.

    :param features: channels of the features, [N, features, H, W] with even H and W.
    :param whether: whether it gives that probability.
    """

    def __init__(self, features: int, channels: int = 32, latent: int = 16, width: int = 256, whether: bool = True):
        super().__init__()
        self.latent = latent
        wide = features * BLOCK ** 2
        self.attend = nn.Conv2d(wide, POOLS, 1)
        self.summary = nn.Sequential(nn.Linear(POOLS * wide, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.empty = zero_module(nn.Linear(width, 1)) if whether else None
        self.features = nn.Conv2d(wide, channels, 1)
        self.modulation = nn.Sequential(nn.Linear(latent + width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                        nn.Linear(width, 2 * channels))
        self.noise = nn.Conv2d(len(NOISE_SPACINGS), channels, 1, bias=False)
        self.out = nn.Conv2d(channels, BLOCK ** 2, 1)

    def encode(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Once a scan: [N, features, H, W] -> features of the head [N, channels, H/2, W/2] and the scan's summary
        [N, width]."""
        x = F.pixel_unshuffle(features, BLOCK)
        weights = self.attend(x).flatten(2).float().softmax(-1).to(x.dtype)  # [N, POOLS, H/2 W/2]
        summary = self.summary((weights @ x.flatten(2).transpose(1, 2)).flatten(1))
        return self.features(x), summary

    def draw(self, features: Tensor, summary: Tensor, latent: Tensor, noise: Tensor) -> Tensor:
        """Logits of one mask a row, [N, H, W] float32: latent [N, latent], noise [N, 3, H/2, W/2]
        as of smooth_noise."""
        scale, shift = self.modulation(torch.cat([latent, summary], 1))[:, :, None, None].chunk(2, 1)
        x = features * (1 + scale) + shift + self.noise(noise)
        logits = F.pixel_shuffle(self.out(F.silu(x)), BLOCK).float()
        # weights 1 2 1 along both axes take away what alternates from pixel to pixel: the pattern of the blocks
        return F.avg_pool2d(F.avg_pool2d(F.pad(logits, (1, 1, 1, 1), mode="replicate"), 2, 1), 2, 1)[:, 0]


class MaskGenerator(nn.Module):
    """The networks that draw: one that sees the scan alone, the head, and that of presence.

    :param field_of_view: the side of the central part of scans that is seen and drawn; 0: all.
    :param presence: gives the logit of an empty mask; None: the head gives it.
    :param views: whether that is a mean over the flips and turns of a scan, but for training.
    """

    def __init__(self, network: nn.Module, head: MaskHead, field_of_view: int = 0,
                 presence: PresenceNetwork | None = None, views: bool = False):
        super().__init__()
        self.network, self.head, self.field_of_view = network, head, field_of_view
        self.presence, self.views = presence, views
        self.frozen = tuple(f"network.{part}" for part in getattr(network, "frozen", ()))
        self.optional = "presence", "head.empty"

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scans [N, C, H, W] in [0, 1] -> what MaskHead.encode returns, and the logit of an empty mask [N] float32."""
        features, summary = self.encode(image)
        return features, summary, self.whether(image, summary)

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Scans [N, C, H, W] in [0, 1] -> what MaskHead.encode returns."""
        image = self.seen(image)
        no_mask, no_step = image[:, :0], torch.zeros(len(image), device=image.device)
        return self.head.encode(self.network(no_mask, no_step, image=image))

    def whether(self, image: Tensor, summary: Tensor | None = None) -> Tensor:
        """The logit of an empty mask, [N] float32; of scans [N, C, H, W] in [0, 1], or of their summary without a
        network of presence."""
        if not self.presence:
            return self.head.empty(summary).float()[:, 0]
        seen = self.seen(image)
        if self.training or not self.views:
            return self.presence(seen)
        flips = (), (-1,), (-2,), (-1, -2)
        return sum(self.presence(view.flip(axes)) for view in (seen, seen.mT) for axes in flips) / (2 * len(flips))

    @property
    def empty(self) -> nn.Linear:
        """The layer that returns the logit of an empty mask."""
        return self.presence.out if self.presence else self.head.empty

    def seen(self, x: Tensor) -> Tensor:
        """The part of scans or masks [..., H, W] that is seen."""
        top, left = ((side - self.field_of_view) // 2 if self.field_of_view else 0 for side in x.shape[-2:])
        return x[..., top:x.shape[-2] - top, left:x.shape[-1] - left]


def noise_sizes(height: int, width: int) -> list[tuple[int, int]]:
    """The grids of the smooth noise of a mask, from fine to coarse."""
    return [(math.ceil(height / spacing) + 1, math.ceil(width / spacing) + 1) for spacing in NOISE_SPACINGS]


def smooth_noise(normal: Tensor, height: int, width: int) -> Tensor:
    """Standard normal numbers, as many as the grids have points, [N, points] -> [N, 3, H/2, W/2]."""
    sizes = noise_sizes(height, width)
    grids = normal.split([math.prod(size) for size in sizes], 1)
    return torch.cat([F.interpolate(grid.unflatten(1, (1, *size)), (height // BLOCK, width // BLOCK), mode="bicubic")
                      for grid, size in zip(grids, sizes)], 1)


@METHODS.add("energy", "one pass a scan, trained on the energy score, which GED is", FLAGS)
class EnergyMethod(Method):
    """A generator of masks that is trained on whether experts mark something, and where.

    :param draws: masks drawn of each scan in a step; dummy: see energy_score.soft_jaccard.
    :param trained: "whether", "where", or "both"; the weights of the other stay as they are.
    :param spread: whether the members of a case are spread evenly over the distribution, see data.noise.spread_noise.
    :param smallest_part: of a drawn mask that is kept, as a share of its largest part.
    """

    loss_names = ["loss", "whether", "where"]
    cost = Cost(scan=1, mask=0)

    def __init__(self, model: MaskGenerator, draws: int = 8, dummy: float = 2.0, trained: str = "both",
                 spread: bool = True, smallest_part: float = 0.0):
        super().__init__()
        if trained != "both":
            self.loss_names = ["loss", trained]
            for part in {"whether": (model.network, model.head), "where": (model.presence,)}[trained]:
                part.requires_grad_(False)
        self.model, self.draws, self.dummy = freeze(model), draws, dummy
        self.independent, self.smallest_part, self.side = not spread, smallest_part, 0

    @classmethod
    def from_flags(cls, flags: SimpleNamespace, model: nn.Module | None = None, training: bool = True
                   ) -> "EnergyMethod":
        if (flags.image_size - flags.field_of_view) % 2 or flags.image_size % BLOCK:
            raise InputError(f"--image_size {flags.image_size}, --field_of_view {flags.field_of_view}: --method"
                             f" energy needs even numbers")
        if flags.field_of_view > flags.image_size:
            raise InputError(f"--field_of_view {flags.field_of_view}: is larger than --image_size {flags.image_size}")
        if model is None:
            seen = SimpleNamespace(**{**vars(flags), "image_size": flags.field_of_view or flags.image_size})
            features = flags.head_channels * 2 // BLOCK ** 2
            head = MaskHead(features, flags.head_channels, flags.latent_size, flags.head_width,
                            whether=not flags.presence_channels)
            presence = (PresenceNetwork(flags.image_channels, flags.presence_channels) if flags.presence_channels
                        else None)
            model = MaskGenerator(NETWORKS[flags.network](seen, 0, features), head, flags.field_of_view, presence,
                                  flags.presence_views)
        return (cls(model, flags.energy_draws, flags.energy_dummy, flags.energy_loss) if training
                else cls(model, spread=flags.spread, smallest_part=flags.smallest_part))

    @classmethod
    def settle_flags(cls, flags: SimpleNamespace, given: dict) -> None:
        if flags.presence_channels % GROUPS:
            raise InputError(f"--presence_channels {flags.presence_channels}: must be a multiple of {GROUPS}, or 0")
        if getattr(flags, "energy_loss", "both") != "both" and not flags.presence_channels:
            raise InputError(f"--energy_loss {flags.energy_loss}: the head says whether and where, and both are trained"
                             f" together; give --presence_channels above 0, or --energy_loss both")
        if getattr(flags, "energy_draws", 2) < 2:
            raise InputError("--energy_draws 1: the energy score compares the draws of a scan; give 2 or more")
        if getattr(flags, "energy_dummy", 1) <= 0:
            raise InputError(f"--energy_dummy {flags.energy_dummy:g}: the gradient at empty masks needs a number above"
                             f" 0")

    @classmethod
    def idle_flags(cls, flags: SimpleNamespace) -> dict[str, str]:
        idle = {} if flags.presence_channels else {"presence_views": "without --presence_channels"}
        if getattr(flags, "energy_loss", "both") == "whether":
            idle |= dict.fromkeys(("energy_draws", "energy_dummy"), "with --energy_loss whether")
        return idle

    @classmethod
    def quick_flags(cls, flags: SimpleNamespace) -> dict:
        return {"spread": False}  # scores that choose a checkpoint need independent draws

    # ---- training ----

    def forward(self, batch: Batch) -> Losses:
        area = batch.masks.sum((2, 3))  # [N, R]
        present = batch.present.to(area.device)
        marked = present & (area > 0)
        share = marked.sum(1) / present.sum(1)
        terms, summary = {}, None
        if "where" in self.loss_names:
            features, summary = self.model.encode(batch.image)
            terms["where"] = share * self._where(batch, features, summary, marked)
        if "whether" in self.loss_names:
            terms["whether"] = F.binary_cross_entropy_with_logits(self.model.whether(batch.image, summary), 1 - share,
                                                                  reduction="none")
        return Losses({"loss": sum(terms.values()), **terms}, torch.ones_like(share))

    def _where(self, batch, features, summary, marked):
        """The energy score of draws against the masks that are marked, [N]."""
        raters = self.model.seen(batch.masks)
        (scans, _, height, width), draws = raters.shape, self.draws
        like = batch.image.new_empty(scans, draws, self._noise_numbers(height, width))
        normal = step_noise(batch.seed, batch.places, like)[1]
        logits = self.model.head.draw(*(x.repeat_interleave(draws, 0) for x in (features, summary)),
                                      *self._noise(normal.flatten(0, 1), height, width))
        # what lies outside counts as one more pixel, which no draw fills
        unseen = batch.masks.sum((2, 3)) - raters.sum((2, 3))
        with torch.autocast(logits.device.type, enabled=False):
            return energy_score(F.pad(logits.sigmoid().reshape(scans, draws, -1), (0, 1)),
                                torch.cat([raters.flatten(2), unseen[:, :, None]], 2), marked, self.dummy).score

    def _noise_numbers(self, height, width):
        return self.model.head.latent + sum(map(math.prod, noise_sizes(height, width)))

    def _noise(self, normal, height, width):
        """Standard normal numbers [N, _noise_numbers] -> the latent, uniform of variance 1, and the smooth noise of N
        draws. A latent without tails: the head has met all of its range in training."""
        latent = math.sqrt(3) * torch.erf(normal[:, :self.model.head.latent] / math.sqrt(2))
        return latent, smooth_noise(normal[:, self.model.head.latent:], height, width)

    # ---- drawing ----

    def prepare(self, dtype: torch.dtype | None = None, compile: bool = False) -> "EnergyMethod":
        self.eval()
        self.autocast = dtype
        self.model.to(memory_format=torch.channels_last)
        if compile:
            compile_network(self.model, dev())
        return self

    def tile(self, side: int) -> None:
        """Logits are blended, of a pixel and of an empty mask: each tile has its own, so that a mask may be empty in a
        part of a scan. Noise and latent are the same for all."""
        if self.model.field_of_view:
            raise InputError(f"--fit tile: the model sees the central {self.model.field_of_view} pixels of a side alone"
                             f" (--field_of_view), so it cannot draw others; give --fit crop")
        self.side = side

    @torch.no_grad()
    def calibrate(self, cases: Iterable[Case]) -> str:
        """Temperature scaling (Guo et al. 2017) of the probability of an empty mask, of which training makes a network
        too sure: the logit is divided by what makes the cross-entropy of these cases smallest."""
        seen = [(self.encode(torch.from_numpy(case.image)[None].to(device_of(self)))[-1].item(),
                 1 - case.raters.any((1, 2)).mean()) for case in cases]
        logits, shares = torch.tensor(seen, dtype=torch.float64).T

        def whether(log_temperature):
            return F.binary_cross_entropy_with_logits(logits / math.exp(log_temperature), shares).item()

        temperature = math.exp(minimize_scalar(whether, bounds=(-3, 3), method="bounded").x)
        for parameter in self.model.empty.parameters():
            parameter /= temperature
        return f"temperature {temperature:.2f} of the probability of an empty mask, from {len(seen)} cases"

    @torch.no_grad()
    def encode(self, images: Tensor) -> Encoded:
        with self.precision(images.device):
            if self.side:
                return images[:, 0], [self.model(part) for part in cut(images, self.side)]
            return images[:, 0], *self.model(images)  # the first: how large a mask is

    @torch.no_grad()
    def draw(self, encoded: Encoded, rows: Sequence[Row], seed: int,
             on_step: Callable[[Tensor, Tensor], None] = lambda *_: None) -> Tensor:
        like, *parts = select(encoded, [scan for scan, _, _ in rows])
        members = [(case, member) for _, case, member in rows]
        height, width = self.model.seen(like).shape[1:]
        normal = MemberNoise(seed, members)(like.new_empty(len(rows), 1 + self._noise_numbers(height, width)))
        if not self.independent:
            normal[:, :1 + self.model.head.latent] = spread_noise(seed, members, 1 + self.model.head.latent)
        with self.precision(like.device):
            noise = self._noise(normal[:, 1:], height, width)
            logits, empty = self._blended(parts[0], *noise) if self.side else self._logits(*parts, *noise)
        nothing = torch.special.ndtr(normal[:, :1, None].double()) < empty.double().sigmoid()  # [N, 1 or H, 1 or W]
        samples = torch.zeros_like(like)
        self.model.seen(samples).copy_(logits.sigmoid() * ~nothing)
        on_step(samples[:, None], samples[:, None])
        samples = samples.cpu()
        return torch.from_numpy(without_crumbs(samples.numpy(), self.smallest_part)) if self.smallest_part else samples

    def _logits(self, features, summary, empty, latent, noise):
        """Logits of the pixels [N, H, W], and of an empty mask [N, 1, 1]."""
        return self.model.head.draw(features, summary, latent, noise), empty[:, None, None]

    def _blended(self, parts, latent, noise):
        """The same of tiles, both [N, H, W]."""
        height, width = (side * BLOCK for side in noise.shape[2:])

        def drawn():
            for part, place in zip(parts, tiles(height, width, self.side)):
                there = (slice(axis.start // BLOCK, axis.stop // BLOCK) for axis in place)
                yield torch.stack(torch.broadcast_tensors(*self._logits(*part, latent, noise[:, :, *there])), 1)

        return blend(drawn(), height, width, self.side).unbind(1)
