"""CIMD (CVPR 2023): a conditional diffusion model of masks, trained with the two networks of its ambiguity loss.

With --kl_weight 0 it is the plain diffusion ensemble of Wolleb et al. 2022, without AMN and ACN.
"""

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.distributions import kl_divergence

from .. import dist_util
from ..data import masks
from ..data.noise import MemberNoise, step_noise
from ..data.stream import Batch, chosen_masks
from ..gaussian_diffusion import GaussianDiffusion, ModelVarType
from ..networks import NETWORKS
from ..networks.base import Encoded, encodes_scans, freeze
from ..nn import compile_network
from ..resample import ScheduleSampler, UniformSampler, create_named_schedule_sampler
from ..samplers import SAMPLERS, network_calls
from ..system.errors import InputError
from ..system.flag import Flag
from . import METHODS, encoders, process
from .base import Cost, Losses, Method, Row, select

FLAGS = [
    *process.PROCESS_FLAGS, *process.WALK_FLAGS, *encoders.FLAGS,
    Flag("kl_weight", float, encoders.KL_WEIGHT, "weight of KL(AMN || ACN) in the loss; 0 trains the plain diffusion"
         " ensemble, without AMN and ACN", "encoders", least=0),
    Flag("schedule_sampler", ("uniform", "loss-second-moment"), "uniform", "which timesteps training draws: all alike,"
         " or more of those with a large loss", "training"),
]


@METHODS.add("cimd", "the diffusion model of CIMD", FLAGS)
class CIMD(Method):
    """U-Net, AMN and ACN with their joint loss (CIMD, section 3).

    :param model: the denoiser, see networks.base.Denoiser.
    :param posterior: AMN, q(z | image, rater's mask); None trains the denoiser alone.
    :param prior: ACN, p(z | image, predicted mask).
    :param schedule_sampler: which timesteps training draws.
    :param sampler: one of SAMPLERS, which walks over the steps of `diffusion`; sampler_options: its keywords.
    """

    parts, parts_are = ("q0", "q1", "q2", "q3"), "quarter of the timesteps"  # q0 with the least noise

    def __init__(self, diffusion: GaussianDiffusion, model: nn.Module, posterior: nn.Module | None = None,
                 prior: nn.Module | None = None, kl_weight: float = 0.0,
                 schedule_sampler: ScheduleSampler | None = None, sampler: str = "ancestral",
                 clip_denoised: bool = True, sampler_options: dict | None = None):
        super().__init__()
        self.diffusion, self.kl_weight = diffusion, kl_weight
        self.model, self.posterior, self.prior = freeze(model), posterior, prior
        self.schedule_sampler = schedule_sampler or UniformSampler(diffusion.num_timesteps)
        self.walk, self.clip_denoised, self.sampler_options = SAMPLERS[sampler], clip_denoised, sampler_options or {}

    @classmethod
    def from_flags(cls, flags: SimpleNamespace, model: nn.Module | None = None, training: bool = True) -> "CIMD":
        diffusion = process.diffusion_from_flags(flags)
        if model is None:
            model = NETWORKS[flags.network](flags, masks.CHANNELS, masks.CHANNELS * (2 if flags.learn_sigma else 1))
        if not training:
            options = {flag.name.removeprefix(f"{flags.sampler}_"): getattr(flags, flag.name)
                       for flag in SAMPLERS.entries[flags.sampler].flags}
            return cls(diffusion, model, sampler=flags.sampler, clip_denoised=flags.clip_denoised,
                       sampler_options=options)
        amn, acn = encoders.create_encoders(
            flags.image_channels, flags.kl_weight, **{flag.name: getattr(flags, flag.name) for flag in encoders.FLAGS})
        schedule_sampler = create_named_schedule_sampler(flags.schedule_sampler, diffusion.num_timesteps)
        return cls(diffusion, model, amn, acn, flags.kl_weight, schedule_sampler)

    @classmethod
    def settle_flags(cls, flags: SimpleNamespace, given: dict) -> None:
        process.settle_prediction(flags, given)
        if hasattr(flags, "sampler"):
            process.settle_sampler(flags, given)

    @classmethod
    def idle_flags(cls, flags: SimpleNamespace) -> dict[str, str]:
        idle = {}
        if not getattr(flags, "kl_weight", 1):
            idle |= {flag.name: "with --kl_weight 0, which trains without AMN and ACN" for flag in encoders.FLAGS}
        if not flags.learn_sigma:
            idle["rescale_learned_sigmas"] = "without --learn_sigma True"
        return idle

    @classmethod
    def quick_flags(cls, flags: SimpleNamespace) -> dict:
        return {"sampler": "best", "sampling_steps": min(process.BEST["sampling_steps"], flags.diffusion_steps)}

    # ---- training ----

    @property
    def loss_names(self) -> list[str]:
        learned = self.diffusion.model_var_type in (ModelVarType.LEARNED, ModelVarType.LEARNED_RANGE)
        parts = ["vb"] if self.diffusion.loss_type.is_bound() else ["mse"] + ["vb"] * learned
        return ["loss", *parts, *["kl"] * (self.posterior is not None)]

    def forward(self, batch: Batch) -> Losses:
        mask = chosen_masks(batch)  # [N, 1, S, S]
        uniforms, noise = step_noise(batch.seed, batch.places, masks.to_diffusion(mask))
        t, weights = (dist_util.to_device(x, mask.device) for x in self.schedule_sampler.sample(uniforms))
        return Losses(self.losses(batch.image, mask, t, noise), weights, t * 4 // self.diffusion.num_timesteps,
                      {"timestep": t})

    def losses(self, image: Tensor, mask: Tensor, t: Tensor, noise: Tensor) -> dict[str, Tensor]:
        """image [N, C, H, W] and mask [N, 1, H, W] in [0, 1], noise like the mask, timesteps t [N].

        Returns a dict of [N]: loss = mse + vb + kl_weight * kl, and its parts.
        """
        terms = self.diffusion.training_losses(
            self.model, masks.to_diffusion(mask), t, model_kwargs={"image": image}, noise=noise)
        pred_xstart = terms.pop("pred_xstart")
        if self.posterior is not None:
            # the noisier x_t, the wilder the unclipped prediction of a noise-predicting network
            pred_mask = masks.from_diffusion(pred_xstart).clamp(0, 1)
            terms["kl"] = kl_divergence(self.posterior(image, mask), self.prior(image, pred_mask))
            terms["loss"] = terms["loss"] + self.kl_weight * terms["kl"]
        return terms

    def after_step(self, losses: Losses) -> None:
        if self.schedule_sampler.learns:
            self.schedule_sampler.update(dist_util.all_gather_rows(losses.seen["timestep"]),
                                         dist_util.all_gather_rows(losses.terms["loss"]))

    def training_networks(self) -> dict[str, nn.Module]:
        return {} if self.posterior is None else {"posterior": self.posterior, "prior": self.prior}

    def training_state(self) -> dict[str, dict]:
        return {"schedule_sampler": self.schedule_sampler.state_dict()}

    def load_training_state(self, state: dict[str, dict]) -> None:
        if ("posterior" in state) != (self.posterior is not None):
            raise InputError(f"is of a run with{'' if 'posterior' in state else 'out'} AMN and ACN; give the"
                             f" --kl_weight it was trained with")
        self.schedule_sampler.load_state_dict(state["schedule_sampler"])

    # ---- drawing ----

    def prepare(self, dtype: torch.dtype | None = None, compile: bool = False) -> "CIMD":
        self.eval()
        if hasattr(self.model, "convert_for_sampling"):
            self.model.convert_for_sampling(dtype)
        else:
            self.autocast = dtype
        if compile:
            cuda_graphs = {"mode": "reduce-overhead"} if dist_util.dev().type == "cuda" else {}
            compile_network(self.model, dist_util.dev(), **cuda_graphs)
        return self

    @property
    def cost(self) -> Cost:
        return Cost(int(encodes_scans(self.model)), network_calls(self.walk, self.diffusion.num_timesteps))

    @property
    def steps(self) -> int:
        return self.diffusion.num_timesteps

    @property
    def advice(self) -> str:
        best = network_calls(SAMPLERS[process.BEST["sampler"]], process.BEST["sampling_steps"])
        return "" if self.cost.mask <= 4 * best else (
            f"--sampler best takes {best} network calls a mask rather than {self.cost.mask}")

    @torch.no_grad()
    def encode(self, images: Tensor) -> Encoded:
        with self.precision(images.device):
            encoded = self.model.encode(images) if hasattr(self.model, "encode") else images
        return images.new_zeros(len(images), masks.CHANNELS, *images.shape[2:]), encoded  # the first: what x_0 is like

    def draw(self, encoded: Encoded, rows: Sequence[Row], seed: int,
             on_step: Callable[[Tensor, Tensor], None] = lambda *_: None) -> Tensor:
        noise = MemberNoise(seed, [(case, member) for _, case, member in rows])
        like, kwargs = self._rows(encoded, rows)
        with self.precision(like.device):
            for x_t, x_start in self.walk(self.diffusion, self.model, noise(like), noise=noise,
                                          clip_denoised=self.clip_denoised, model_kwargs=kwargs,
                                          **self.sampler_options):
                on_step(masks.from_diffusion(x_t), masks.from_diffusion(x_start))
        return masks.from_diffusion(x_t)[:, 0].cpu()

    @torch.no_grad()
    def evaluate_once(self, encoded: Encoded, rows: Sequence[Row]) -> None:
        like, kwargs = self._rows(encoded, rows)
        with self.precision(like.device):
            self.diffusion.run_model(self.model, like, torch.zeros(len(rows), dtype=torch.long, device=like.device),
                                     kwargs)[0].cpu()

    def _rows(self, encoded, rows):
        """What x_0 of these rows is like, [N, CHANNELS, H, W], and what the denoiser is told of their scans."""
        like, encoded = select(encoded, [scan for scan, _, _ in rows])
        return like, {"encoded": encoded} if hasattr(self.model, "encode") else {"image": encoded}
