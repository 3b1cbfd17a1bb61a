"""Flags -> objects."""

from types import SimpleNamespace

import numpy as np
import torch

from . import logger
from .flags import defaults, parse_numbers
from .gaussian_diffusion import LossType, ModelMeanType, ModelVarType, get_named_beta_schedule
from .methods.encoders import AxisAlignedConvGaussian
from .respace import SpacedDiffusion, space_timesteps
from .system.errors import InputError
from .unet import SegmentationUNet

NUM_CLASSES = 1000  # class labels of a class-conditional model, as in guided-diffusion


def model_and_diffusion_defaults():
    """Defaults of everything that create_model_and_diffusion takes."""
    return defaults("model", "diffusion")


def _complete(flags, known):
    unknown = flags.keys() - known.keys()
    if unknown:
        raise TypeError(f"unknown flags: {', '.join(sorted(unknown))}")
    return SimpleNamespace(**{**known, **flags})


_CHANNEL_MULTS = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}


def create_model(**flags):
    """The segmentation U-Net from the model flags and learn_sigma; those left out take their defaults.

    :returns: a SegmentationUNet, called as model(x_t, timesteps, image=image).
    :raises InputError: for flags that make no U-Net, naming them.
    """
    f = _complete(flags, {**defaults("model"), "learn_sigma": False})
    mult = parse_numbers(float, f.channel_mult, "channel_mult") or _CHANNEL_MULTS.get(f.image_size)
    if not mult:
        raise InputError(f"--image_size {f.image_size}: only {', '.join(map(str, sorted(_CHANNEL_MULTS)))} have a"
                         f" default --channel_mult; give it, as in 1,2,3,4")
    if not all(0 < m <= 1024 for m in mult):
        raise InputError(f"--channel_mult {f.channel_mult}: every number must be above 0 and at most 1024")
    factor = 2 ** (len(mult) - 1)
    if f.image_size < 1 or f.image_size % factor:
        raise InputError(f"--image_size {f.image_size}: a U-Net of {len(mult)} levels needs a multiple of {factor};"
                         f" change it or --channel_mult")
    widths = [int(m * f.num_channels) for m in mult]
    if any(width < 32 or width % 32 for width in widths):
        raise InputError(f"--num_channels {f.num_channels} with --channel_mult {','.join(f'{m:g}' for m in mult)}:"
                         f" every level needs a multiple of 32 channels")
    sides = [f.image_size >> level for level in range(len(mult))]
    attention = parse_numbers(int, f.attention_resolutions, "attention_resolutions")
    never = [side for side in attention if side not in sides]
    if never:
        raise InputError(f"--attention_resolutions {f.attention_resolutions}: no feature map has the side {never[0]};"
                         f" they are {', '.join(map(str, sides))}")
    attended = [w for w, side in zip(widths, sides) if side in attention] + widths[-1:]
    for width in attended:
        heads = {f.num_heads, f.num_heads if f.num_heads_upsample == -1 else f.num_heads_upsample}
        if f.num_head_channels != -1:
            if f.num_head_channels < 1 or width % f.num_head_channels:
                raise InputError(f"--num_head_channels {f.num_head_channels}: does not divide {width} channels")
        elif any(h < 1 or width % h for h in heads):
            raise InputError(f"--num_heads {f.num_heads}, --num_heads_upsample {f.num_heads_upsample}: do not divide"
                             f" {width} channels")
    return SegmentationUNet(
        image_size=f.image_size, in_channels=f.image_channels + 1, model_channels=f.num_channels,
        out_channels=2 if f.learn_sigma else 1, num_res_blocks=f.num_res_blocks,
        attention_resolutions=[f.image_size // side for side in attention], dropout=f.dropout, channel_mult=mult,
        num_classes=NUM_CLASSES if f.class_cond else None, use_checkpoint=f.use_checkpoint, num_heads=f.num_heads,
        num_head_channels=f.num_head_channels, num_heads_upsample=f.num_heads_upsample,
        use_scale_shift_norm=f.use_scale_shift_norm, resblock_updown=f.resblock_updown,
        use_new_attention_order=f.use_new_attention_order)


# What --sampler best means: the fewest network calls at no loss of GED; measured in docs/benchmarks.md
BEST = {"sampler": "dpm++sde", "sampling_steps": 7, "timestep_spacing": "logsnr"}


def choose_sampler(args, given):
    """Settle sampler and timestep_respacing of args from all the flags that bear on them.

    :raises InputError: for flags that contradict each other.
    """
    def refuse(*names):
        clash = [f"--{name}" for name in names if name in given]
        if len(clash) == len(names):
            raise InputError(f"{' and '.join(clash)}: choose one")

    refuse("sampling_steps", "timestep_respacing")
    if args.use_ddim and args.sampler != "ddim":
        refuse("sampler", "use_ddim")
        args.sampler = "ddim"
    if args.sampler == "best":
        refuse("sampler", "timestep_respacing")
        refuse("sampler", "timestep_spacing")
        args.sampler, args.timestep_spacing = BEST["sampler"], BEST["timestep_spacing"]
        args.sampling_steps = args.sampling_steps or BEST["sampling_steps"]
    elif "timestep_spacing" in given and not args.sampling_steps:
        raise InputError("--timestep_spacing: says where --sampling_steps lie; give that, too")
    if args.sampler != "ddim" and "ddim_eta" in given:
        raise InputError("--ddim_eta: only DDIM has it; give --sampler ddim, too")
    if args.sampling_steps:
        args.timestep_respacing = f"{args.timestep_spacing}{args.sampling_steps}"


def autocast_dtype(args):
    """The dtype of --use_fp16 or --use_bf16, None for float32; InputError for float16 without CUDA."""
    if args.use_fp16 and not torch.cuda.is_available():
        raise InputError("--use_fp16 True: half precision needs CUDA; on a CPU give --use_bf16 True instead")
    return torch.float16 if args.use_fp16 else torch.bfloat16 if args.use_bf16 else None


def compile_network(network, device, **options):
    """Compile a network in place for inputs of fixed shapes; where no compiler works, log that and leave it as it is.

    :param options: of torch.compile.
    """
    try:
        torch.compile(torch.nn.SiLU())(torch.zeros(8, device=device))
    except Exception as error:  # almost anything
        logger.log(f"--compile: goes on without, since no compiler works here"
                   f" ({type(error).__name__}: {str(error).strip().splitlines()[0]})")
        return
    torch._dynamo.config.suppress_errors = True  # a part that cannot be compiled runs as it is
    network.compile(dynamic=False, **options)
    logger.log("--compile: the first pass compiles the U-Net, which takes minutes on a CPU")


def create_gaussian_diffusion(**flags):
    """The diffusion process of masks from the diffusion flags; those left out take their defaults.

    `steps` is accepted for diffusion_steps.

    :raises InputError: for flags that make no process, naming them.
    """
    if "steps" in flags:
        flags["diffusion_steps"] = flags.pop("steps")
    f = _complete(flags, defaults("diffusion"))
    try:
        betas = get_named_beta_schedule(f.noise_schedule, f.diffusion_steps)
    except ValueError as error:
        raise InputError(f"--diffusion_steps {f.diffusion_steps}: {error}") from None
    try:
        use_timesteps = space_timesteps(f.diffusion_steps, f.timestep_respacing, np.cumprod(1 - np.asarray(betas)))
    except ValueError as error:
        raise InputError(f"--timestep_respacing {f.timestep_respacing}: {error}") from None
    if f.use_kl:
        loss_type = LossType.RESCALED_KL
    else:
        loss_type = LossType.RESCALED_MSE if f.rescale_learned_sigmas else LossType.MSE
    return SpacedDiffusion(
        use_timesteps, betas=betas, loss_type=loss_type, rescale_timesteps=f.rescale_timesteps,
        model_mean_type=ModelMeanType.START_X if f.predict_xstart else ModelMeanType.EPSILON,
        model_var_type=ModelVarType.LEARNED_RANGE if f.learn_sigma else ModelVarType.FIXED_LARGE)


def create_model_and_diffusion(**flags):
    """Both of the above from all model and diffusion flags."""
    f = vars(_complete(flags, model_and_diffusion_defaults()))
    model = create_model(**{name: f[name] for name in defaults("model")}, learn_sigma=f["learn_sigma"])
    return model, create_gaussian_diffusion(**{name: f[name] for name in defaults("diffusion")})


def create_encoders(**flags):
    """AMN (posterior) and ACN (prior) from the encoder flags and image_channels; (None, None) if kl_weight is 0."""
    f = _complete(flags, {**defaults("encoders"), "image_channels": defaults("model")["image_channels"]})
    if not f.kl_weight:
        return None, None
    if f.input_channels_dist > f.image_channels:
        raise InputError(f"--input_channels_dist {f.input_channels_dist}: the image has --image_channels"
                         f" {f.image_channels}")
    filters = parse_numbers(int, f.num_filters, "num_filters")
    if not filters or not all(0 < number <= 65536 for number in filters):
        raise InputError(f"--num_filters {f.num_filters}: needs a number a block, above 0 and at most 65536")
    return tuple(AxisAlignedConvGaussian(f.input_channels_dist, filters, f.no_convs_per_block, f.latent_dim)
                 for _ in range(2))
