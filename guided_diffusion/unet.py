"""The denoiser: the U-Net of guided-diffusion (Dhariwal & Nichol 2021, arXiv 2105.05233), with its parameter names."""

from collections.abc import Collection, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .nn import SiLU, normalization, timestep_embedding, zero_module


class TimestepEmbedSequential(nn.Sequential):
    """A sequence that hands the timestep embedding to those of its layers that take one."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResBlock) else layer(x)
        return x


class Upsample(nn.Module):
    """Double the height and width (nearest neighbour), then convolve if `use_conv`."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if use_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Downsample(nn.Module):
    """Halve the height and width: by a strided convolution if `use_conv`, else by average pooling."""

    def __init__(self, channels: int, use_conv: bool):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if use_conv else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class ResBlock(nn.Module):
    """Two convolutions around the timestep embedding, plus a skip connection; may also halve or double the sides.

    With `use_scale_shift_norm` the embedding scales and shifts the second norm, else it is added before it.
    x: [N, channels, H, W], emb: [N, emb_channels] -> [N, out_channels, H', W'].
    """

    def __init__(self, channels: int, emb_channels: int, out_channels: int, dropout: float = 0.0,
                 use_scale_shift_norm: bool = False, up: bool = False, down: bool = False,
                 use_checkpoint: bool = False):
        super().__init__()
        self.use_scale_shift_norm = use_scale_shift_norm
        self.use_checkpoint = use_checkpoint
        resample = Upsample if up else Downsample if down else None
        self.h_upd = resample(channels, use_conv=False) if resample else nn.Identity()
        self.x_upd = resample(channels, use_conv=False) if resample else nn.Identity()
        self.in_layers = nn.Sequential(
            normalization(channels), SiLU(), nn.Conv2d(channels, out_channels, 3, padding=1))
        self.emb_layers = nn.Sequential(
            nn.SiLU(), nn.Linear(emb_channels, 2 * out_channels if use_scale_shift_norm else out_channels))
        self.out_layers = nn.Sequential(
            normalization(out_channels), SiLU(), nn.Dropout(dropout),
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)))
        same = channels == out_channels
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.use_checkpoint and self.training:
            return checkpoint(self._forward, x, emb, use_reentrant=False)
        return self._forward(x, emb)

    def _forward(self, x, emb):
        norm, act, conv = self.in_layers
        h = conv(self.h_upd(act(norm(x))))
        emb = self.emb_layers(emb).to(h.dtype)[:, :, None, None]
        norm, *rest = self.out_layers
        if self.use_scale_shift_norm:
            scale, shift = emb.chunk(2, dim=1)
            h = torch.addcmul(shift, norm(h), 1 + scale)
        else:
            h = norm(h.add_(emb))
        for layer in rest:
            h = layer(h)
        return h.add_(self.skip_connection(self.x_upd(x)))


class AttentionBlock(nn.Module):
    """Self-attention over all positions of a feature map, [N, C, H, W] -> the same shape.

    The 3C channels of `qkv` are ordered (head, q/k/v, channel), or (q/k/v, head, channel) with
    `use_new_attention_order`; a checkpoint must be read with the order it was trained with.
    """

    def __init__(self, channels: int, num_heads: int = 1, use_new_attention_order: bool = False,
                 use_checkpoint: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.use_new_attention_order = use_new_attention_order
        self.use_checkpoint = use_checkpoint
        self.norm = normalization(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.use_checkpoint and self.training:
            return checkpoint(self._forward, x, use_reentrant=False)
        return self._forward(x)

    def _forward(self, x):
        n, c, h, w = x.shape
        flat = x.reshape(n, c, h * w)
        qkv = self.qkv(self.norm(flat))  # [N, 3C, HW]
        if self.use_new_attention_order:
            qkv = qkv.view(n, 3, self.num_heads, -1, h * w).transpose(1, 2)
        else:
            qkv = qkv.view(n, self.num_heads, 3, -1, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(2)  # each [N, heads, HW, C / heads]
        a = F.scaled_dot_product_attention(q, k, v)
        a = a.transpose(-1, -2).reshape(n, c, h * w)
        return (flat + self.proj_out(a)).reshape(n, c, h, w)


class UNetModel(nn.Module):
    """The full U-Net with attention and timestep embedding.

    :param image_size: side of the input that it is made for, by which convert_for_sampling chooses the layout of
        memory; the network itself takes any side it can halve.
    :param in_channels, out_channels: channels of x and of the prediction.
    :param model_channels: base channel count, a multiple of 32.
    :param num_res_blocks: residual blocks a level.
    :param attention_resolutions: downsampling factors (not sides) at which attention is used.
    :param channel_mult: multiple of model_channels for each level; each level but the last halves the sides.
    :param num_classes: if given, forward needs class labels y, [N].
    :param num_head_channels: channels of one attention head; -1 means `num_heads` heads everywhere.
    :param num_heads_upsample: heads on the way up; -1 means `num_heads`.
    :param resblock_updown: change resolution inside residual blocks rather than by strided convolutions.
    :param use_checkpoint: recompute activations in the backward pass: less memory, more time.
    """

    def __init__(self, image_size: int, in_channels: int, model_channels: int, out_channels: int, num_res_blocks: int,
                 attention_resolutions: Collection[int], dropout: float = 0.0,
                 channel_mult: Sequence[float] = (1, 2, 4, 8), num_classes: int | None = None,
                 use_checkpoint: bool = False, num_heads: int = 1, num_head_channels: int = -1,
                 num_heads_upsample: int = -1, use_scale_shift_norm: bool = False, resblock_updown: bool = False,
                 use_new_attention_order: bool = False):
        super().__init__()
        self.image_size = image_size
        self.in_channels = in_channels
        self.model_channels = model_channels
        self.num_classes = num_classes
        widths = [int(mult * model_channels) for mult in channel_mult]
        emb_channels = 4 * model_channels

        def residual(channels, out_channels, **updown):
            return ResBlock(channels, emb_channels, out_channels, dropout, use_scale_shift_norm,
                            use_checkpoint=use_checkpoint, **updown)

        def attention(channels, heads):
            heads = heads if num_head_channels == -1 else channels // num_head_channels
            return AttentionBlock(channels, heads, use_new_attention_order, use_checkpoint)

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels))
        if num_classes is not None:
            self.label_emb = nn.Embedding(num_classes, emb_channels)

        ch, factor, last = widths[0], 1, len(widths) - 1
        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(nn.Conv2d(in_channels, ch, 3, padding=1))])
        skips = [ch]
        for level, width in enumerate(widths):
            for _ in range(num_res_blocks):
                layers = [residual(ch, width)]
                ch = width
                if factor in attention_resolutions:
                    layers.append(attention(ch, num_heads))
                self.input_blocks.append(TimestepEmbedSequential(*layers))
                skips.append(ch)
            if level < last:
                down = residual(ch, ch, down=True) if resblock_updown else Downsample(ch, use_conv=True)
                self.input_blocks.append(TimestepEmbedSequential(down))
                skips.append(ch)
                factor *= 2

        self.middle_block = TimestepEmbedSequential(residual(ch, ch), attention(ch, num_heads), residual(ch, ch))

        heads_up = num_heads if num_heads_upsample == -1 else num_heads_upsample
        self.output_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(num_res_blocks + 1):
                layers = [residual(ch + skips.pop(), width)]
                ch = width
                if factor in attention_resolutions:
                    layers.append(attention(ch, heads_up))
                if level and i == num_res_blocks:
                    layers.append(residual(ch, ch, up=True) if resblock_updown else Upsample(ch, use_conv=True))
                    factor //= 2
                self.output_blocks.append(TimestepEmbedSequential(*layers))

        self.out = nn.Sequential(
            normalization(ch), SiLU(), zero_module(nn.Conv2d(ch, out_channels, 3, padding=1)))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        """x: [N, in_channels, H, W]; timesteps: [N]; y: [N] class labels, only for a class-conditional model.

        Returns [N, out_channels, H, W].
        """
        if (y is None) != (self.num_classes is None):
            raise ValueError("class labels y are needed for a class-conditional model, and only for one")
        emb = self.time_embed(timestep_embedding(timesteps, self.model_channels).to(self.time_embed[0].weight.dtype))
        if y is not None:
            emb = emb + self.label_emb(y)
        torso = self.middle_block[0].in_layers[2].weight.dtype
        x, emb = x.to(torso), emb.to(torso)
        skips = []
        for block in self.input_blocks:
            x = block(x, emb)
            skips.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), emb)
        return self.out(x.to(self.out[2].weight.dtype))

    def convert_for_sampling(self, dtype: torch.dtype | None = None) -> Self:
        """Keep the weights in this dtype (None: as they are) and channels last, once, rather than cast them at every
        call; returns the model. (On CPUs, maps below 64 x 64 are faster with channels first.)

        Norms, the timestep embedding and the output layer stay as they are: they are a thousandth of the work, and the
        rounding of the last would go straight into x_0. Training in 16 bits needs autocast and float32 weights instead.
        """
        for blocks in (self.input_blocks, self.middle_block, self.output_blocks):
            for module in blocks.modules():
                if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
                    module.to(dtype=dtype)
        last = self.out[2].weight.is_cuda or self.image_size >= 64
        return self.to(memory_format=torch.channels_last) if last else self


class SegmentationUNet(UNetModel):
    """The U-Net that sees the scan: image channels and noisy mask stacked on the channel axis (CIMD, section 3).

    :param unshuffle: blocks of so many pixels a side become channels of one place before the first layer, and one place
        becomes such a block behind the last (Shi et al. 2016): all layers work at a lower resolution. Then three maps
        of the distance from the centre join the input.
    :param in_channels, out_channels, image_size: of the whole, before and behind that.
    """

    def __init__(self, image_size: int, in_channels: int, model_channels: int, out_channels: int, *,
                 unshuffle: int = 1, **options: Any):
        place = unshuffle ** 2
        super().__init__(image_size // unshuffle, in_channels * place + (len(CENTRE_WIDTHS) if unshuffle > 1 else 0),
                         model_channels, out_channels * place, **options)
        self.unshuffle = unshuffle

    def forward(self, x: Tensor, timesteps: Tensor, image: Tensor, y: Tensor | None = None) -> Tensor:
        """x: [N, 1, H, W] noisy mask x_t; image: [N, C, H, W] in [0, 1]. Returns [N, out_channels, H, W]."""
        x = torch.cat([image.to(x.dtype), x], dim=1)
        if self.unshuffle == 1:
            return super().forward(x, timesteps, y)
        x = F.pixel_unshuffle(x, self.unshuffle)
        x = torch.cat([x, _centre_maps(*x.shape[2:], x).expand(len(x), -1, -1, -1)], dim=1)
        return F.pixel_shuffle(super().forward(x, timesteps, y), self.unshuffle)


CENTRE_WIDTHS = 0.35, 0.16, 0.7  # of bells around the centre, in halves of a side


def _centre_maps(height, width, like):
    """exp(-r^2 / (2 width^2)) of the distance r from the centre: [1, 3, H, W]."""
    y, x = (torch.linspace(-1, 1, side, device=like.device, dtype=torch.float32) for side in (height, width))
    squares = y[:, None] ** 2 + x ** 2
    return torch.stack([torch.exp(squares / (-2 * width ** 2)) for width in CENTRE_WIDTHS])[None].to(like.dtype)
