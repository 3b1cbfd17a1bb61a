"""The published network: the U-Net of guided-diffusion that sees the scan beside the noisy mask, from its flags."""

from types import SimpleNamespace

from ..system.errors import InputError
from ..system.flag import Flag, parse_numbers
from ..unet import SegmentationUNet
from . import NETWORKS

NUM_CLASSES = 1000  # class labels of a class-conditional model, as in guided-diffusion
CHANNEL_MULTS = {512: (1, 1, 2, 2, 4, 4), 256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4)}

FLAGS = [
    Flag("num_channels", int, 128, "channels at full resolution, a multiple of 32; the cost grows with its square",
         "model", most=16384),
    Flag("num_res_blocks", int, 2, "residual blocks a level", "model", least=1, most=1024),
    Flag("channel_mult", str, "", "channels of each level as multiples of num_channels, as in 1,2,3,4; sizes 64, 128,"
         " 256 and 512 have a default", "model"),
    Flag("pixel_unshuffle", int, 1, "see blocks of so many pixels a side as one place, so that all layers work at a"
         " lower resolution: 2 is about 4 times as fast (1: as published)", "model", least=1, most=64),
    Flag("num_heads", int, 4, "attention heads", "model", least=1),
    Flag("num_heads_upsample", int, -1, "attention heads on the way up (-1: num_heads)", "model"),
    Flag("num_head_channels", int, -1, "channels of one attention head, instead of num_heads (-1: off)", "model"),
    Flag("attention_resolutions", str, "16,8", "sides of the feature maps that get attention", "model"),
    Flag("dropout", float, 0.0, "dropout in the residual blocks, 0 to 1", "model", least=0),
    Flag("class_cond", bool, False, "condition on a class label; from Python only, since the data hold no classes",
         "model"),
    Flag("use_checkpoint", bool, False, "recompute activations in the backward pass: less memory, more time", "model"),
    Flag("use_scale_shift_norm", bool, True, "let the timestep scale and shift the norms (else it is added)", "model"),
    Flag("resblock_updown", bool, False, "change resolution in residual blocks, not by strided convolutions", "model"),
    Flag("use_new_attention_order", bool, False, "order of q, k, v in attention weights; must be the checkpoint's",
         "model"),
]


@NETWORKS.add("unet", "the U-Net of guided-diffusion, as published", FLAGS)
def unet(flags: SimpleNamespace, x_channels: int = 1, out_channels: int = 1) -> SegmentationUNet:
    """The segmentation U-Net from its flags.

    :raises InputError: for flags that make no U-Net, naming them.
    """
    f = flags
    block = f.pixel_unshuffle
    mult = parse_numbers(float, f.channel_mult, "channel_mult") or CHANNEL_MULTS.get(f.image_size)
    if not mult:
        raise InputError(f"--image_size {f.image_size}: only {', '.join(map(str, sorted(CHANNEL_MULTS)))} have a"
                         f" default --channel_mult; give it, as in 1,2,3,4")
    if not all(0 < m <= 1024 for m in mult):
        raise InputError(f"--channel_mult {f.channel_mult}: every number must be above 0 and at most 1024")
    factor = 2 ** (len(mult) - 1) * block
    if f.image_size < 1 or f.image_size % factor:
        unshuffled = f" and --pixel_unshuffle {block}" if block > 1 else ""
        raise InputError(f"--image_size {f.image_size}: a U-Net of {len(mult)} levels{unshuffled} needs a multiple of"
                         f" {factor}; change it or --channel_mult")
    widths = [int(m * f.num_channels) for m in mult]
    if any(width < 32 or width % 32 for width in widths):
        raise InputError(f"--num_channels {f.num_channels} with --channel_mult {','.join(f'{m:g}' for m in mult)}:"
                         f" every level needs a multiple of 32 channels")
    sides = [f.image_size // block >> level for level in range(len(mult))]
    attention = parse_numbers(int, f.attention_resolutions, "attention_resolutions")
    never = [side for side in attention if side not in sides]
    if never:
        raise InputError(f"--attention_resolutions {f.attention_resolutions}: no feature map has the side {never[0]};"
                         f" they are {', '.join(map(str, sides))}")
    _check_heads(f, [w for w, side in zip(widths, sides) if side in attention] + widths[-1:])
    return SegmentationUNet(
        image_size=f.image_size, in_channels=f.image_channels + x_channels, model_channels=f.num_channels,
        out_channels=out_channels, num_res_blocks=f.num_res_blocks,
        attention_resolutions=[f.image_size // block // side for side in attention], dropout=f.dropout,
        channel_mult=mult, num_classes=NUM_CLASSES if f.class_cond else None, use_checkpoint=f.use_checkpoint,
        num_heads=f.num_heads, num_head_channels=f.num_head_channels, num_heads_upsample=f.num_heads_upsample,
        unshuffle=block, use_scale_shift_norm=f.use_scale_shift_norm, resblock_updown=f.resblock_updown,
        use_new_attention_order=f.use_new_attention_order)


def _idle_flags(flags: SimpleNamespace) -> dict[str, str]:
    if flags.num_head_channels == -1:
        return {}
    return dict.fromkeys(("num_heads", "num_heads_upsample"), "with --num_head_channels")


unet.idle_flags = _idle_flags


def _check_heads(f, attended):
    """InputError unless the attention heads divide the channels of every feature map that is attended to."""
    for width in attended:
        heads = {f.num_heads, f.num_heads if f.num_heads_upsample == -1 else f.num_heads_upsample}
        if f.num_head_channels != -1:
            if f.num_head_channels < 1 or width % f.num_head_channels:
                raise InputError(f"--num_head_channels {f.num_head_channels}: does not divide {width} channels")
        elif any(h < 1 or width % h for h in heads):
            raise InputError(f"--num_heads {f.num_heads}, --num_heads_upsample {f.num_heads_upsample}: do not divide"
                             f" {width} channels")


def create_model(
    image_size: int, num_channels: int, num_res_blocks: int, channel_mult: str = "", learn_sigma: bool = False,
    class_cond: bool = False, use_checkpoint: bool = False, attention_resolutions: str = "16", num_heads: int = 1,
    num_head_channels: int = -1, num_heads_upsample: int = -1, use_scale_shift_norm: bool = False,
    dropout: float = 0.0, resblock_updown: bool = False, use_fp16: bool = False, use_new_attention_order: bool = False,
    image_channels: int = 4, pixel_unshuffle: int = 1,
) -> SegmentationUNet:
    """The segmentation U-Net, with the names and defaults of the published function; those of the flags differ.

    :param use_fp16: accepted for the published calls; the dtype is chosen when the model is used, by autocast in
        training and by convert_for_sampling in sampling.
    :returns: a SegmentationUNet, called as model(x_t, timesteps, image=image).
    :raises InputError: for flags that make no U-Net, naming them.
    """
    return unet(SimpleNamespace(**locals()), 1, 2 if learn_sigma else 1)
