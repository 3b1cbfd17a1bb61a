"""The denoiser: guided-diffusion's architecture and parameter names, attention, and the scan beside the mask."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from guided_diffusion import checkpoint
from guided_diffusion.script_util import create_model
from guided_diffusion.system.errors import InputError
from guided_diffusion.unet import AttentionBlock, ResBlock, UNetModel

SMALL = dict(image_size=16, num_channels=32, channel_mult="1,2", num_res_blocks=1, num_heads=2,
             attention_resolutions="8", use_scale_shift_norm=True)
PUBLISHED = dict(image_size=128, num_channels=128, class_cond=False, num_res_blocks=2, num_heads=1, learn_sigma=True,
                 use_scale_shift_norm=False, attention_resolutions="16")

# What SMALL is made of, block by block: 5 channels come in (4 of the scan), widths are 32 at side 16 and 64 at side 8.
# An upward block takes what the matching downward block gave, stacked on what comes from below.
DOWN = ["conv 5 32", "res 32 32", "down 32", "res 32 64, attention 64"]
MIDDLE = ["res 64 64", "attention 64", "res 64 64"]
UP = ["res 128 64, attention 64", "res 96 64, attention 64, up 64", "res 96 32", "res 64 32"]
# As SMALL with 2 residual blocks a level, 3 levels of widths 32, 64, 64 and attention at side 4.
DEEP = {**SMALL, "num_res_blocks": 2, "channel_mult": "1,2,2", "attention_resolutions": "4"}
DEEP_DOWN = ["conv 5 32", "res 32 32", "res 32 32", "down 32", "res 32 64", "res 64 64", "down 64",
             "res 64 64, attention 64", "res 64 64, attention 64"]
DEEP_UP = ["res 128 64, attention 64", "res 128 64, attention 64", "res 128 64, attention 64, up 64", "res 128 64",
           "res 128 64", "res 96 64, up 64", "res 96 32", "res 64 32", "res 64 32"]


def layer_shapes(name, layer, scale_shift, updown):
    """Yields (parameter name, shape) of a layer described as above; timestep embeddings have 4 * 32 numbers."""
    kind, *channels = layer.split()
    first, last = int(channels[0]), int(channels[-1])
    if kind in ("down", "up") and updown:
        kind = "res"
    weights = {
        "conv": {"": (last, first, 3, 3)},
        "down": {".op": (first, first, 3, 3)},
        "up": {".conv": (first, first, 3, 3)},
        "attention": {".norm": (first,), ".qkv": (3 * first, first, 1), ".proj_out": (first, first, 1)},
        "res": {".in_layers.0": (first,), ".in_layers.2": (last, first, 3, 3),
                ".emb_layers.1": (2 * last if scale_shift else last, 128), ".out_layers.0": (last,),
                ".out_layers.3": (last, last, 3, 3),
                **({".skip_connection": (last, first, 1, 1)} if first != last else {})},
    }[kind]
    for suffix, shape in weights.items():
        yield f"{name}{suffix}.weight", shape
        yield f"{name}{suffix}.bias", shape[:1]


def expected_shapes(down, up, outputs=1, scale_shift=True, updown=False, classes=0):
    shapes = {"time_embed.0.weight": (128, 32), "time_embed.0.bias": (128,),
              "time_embed.2.weight": (128, 128), "time_embed.2.bias": (128,),
              "out.0.weight": (32,), "out.0.bias": (32,),
              "out.2.weight": (outputs, 32, 3, 3), "out.2.bias": (outputs,)}
    if classes:
        shapes["label_emb.weight"] = (classes, 128)
    for part, blocks in (("input_blocks", down), ("output_blocks", up)):
        for i, block in enumerate(blocks):
            for j, layer in enumerate(block.split(", ")):
                shapes.update(layer_shapes(f"{part}.{i}.{j}", layer, scale_shift, updown))
    for j, layer in enumerate(MIDDLE):
        shapes.update(layer_shapes(f"middle_block.{j}", layer, scale_shift, updown))
    return shapes


def small_model(**flags):
    """An evaluated U-Net without the zeros of its initialisation, the same every time."""
    model = create_model(**{**SMALL, **flags})
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=1 / math.sqrt(max(parameter[0].numel(), 16)), generator=generator)
    return model.eval()


def inputs(n=2, side=16, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    height, width = (side, side) if isinstance(side, int) else side
    x, image = torch.randn(n, 5, height, width, generator=generator, dtype=dtype).split([1, 4], dim=1)
    return x, torch.randint(0, 1000, (n,), generator=generator), image


# ---- architecture ----

def test_published_flags_give_85_6_million_parameters():
    with torch.device("meta"):
        model = create_model(**PUBLISHED)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 85.6


def test_published_flags_cost_132_gflop_a_forward_pass():
    with torch.device("meta"):
        model = create_model(**PUBLISHED)
        x, t, image = torch.zeros(1, 1, 128, 128), torch.zeros(1), torch.zeros(1, 4, 128, 128)
        with FlopCounterMode(display=False) as counter:
            assert model(x, t, image=image).shape == (1, 2, 128, 128)
    assert round(counter.get_total_flops() / 1e9) == 132


@pytest.mark.parametrize("size, widths", [
    (64, [128, 256, 384, 512]), (128, [128, 128, 256, 384, 512]), (256, [128, 128, 256, 256, 512, 512]),
    (512, [128, 128, 256, 256, 512, 512])])
def test_channel_mult_follows_image_size(size, widths):
    with torch.device("meta"):
        model = create_model(image_size=size, num_channels=128, num_res_blocks=1, attention_resolutions="16")
    downs = [block[0].op.in_channels for block in model.input_blocks if hasattr(block[0], "op")]
    assert downs + [model.middle_block[0].in_layers[2].in_channels] == widths


@pytest.mark.parametrize("flags, down, up, expected", [
    ({}, DOWN, UP, {}),
    ({"use_scale_shift_norm": False}, DOWN, UP, {"scale_shift": False}),
    ({"resblock_updown": True}, DOWN, UP, {"updown": True}),
    ({"learn_sigma": True}, DOWN, UP, {"outputs": 2}),
    ({"class_cond": True}, DOWN, UP, {"classes": 1000}),
    (DEEP, DEEP_DOWN, DEEP_UP, {}),
    ({**DEEP, "resblock_updown": True, "use_scale_shift_norm": False}, DEEP_DOWN, DEEP_UP,
     {"updown": True, "scale_shift": False}),
], ids=["plain", "added embedding", "updown", "learn_sigma", "class_cond", "deep", "deep updown"])
def test_parameters_have_guided_diffusions_names_and_shapes(flags, down, up, expected):
    with torch.device("meta"):
        model = create_model(**{**SMALL, **flags})
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == expected_shapes(
        down, up, **expected)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_state_dict_with_these_names_loads_with_and_without_ddp_prefix(prefix):
    generator = torch.Generator().manual_seed(0)
    state = {prefix + name: torch.randn(shape, generator=generator)
             for name, shape in expected_shapes(DOWN, UP).items()}
    model = create_model(**SMALL)
    checkpoint.load_state(model, state, "test")
    assert all(torch.equal(value, state[prefix + name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("spoil", [lambda s: s.pop("out.2.bias"), lambda s: s.update(more=torch.zeros(1))],
                         ids=["missing", "unknown"])
def test_state_dict_loads_strictly(spoil):
    state = {name: torch.zeros(shape) for name, shape in expected_shapes(DOWN, UP).items()}
    spoil(state)
    with pytest.raises(InputError, match="another architecture"):
        checkpoint.load_state(create_model(**SMALL), state, "test")


@pytest.mark.parametrize("flags", [{}, {"learn_sigma": True}, {"resblock_updown": True}])
def test_output_is_zero_at_initialisation(flags):
    x, t, image = inputs()
    assert (create_model(**SMALL, **flags)(x, t, image=image) == 0).all()


@pytest.mark.parametrize("updown", [False, True])
@pytest.mark.parametrize("side", [8, 24, (12, 20), 2])
def test_any_side_that_can_be_halved_works(side, updown):
    x, t, image = inputs(side=side)
    output = small_model(learn_sigma=True, resblock_updown=updown)(x, t, image=image)
    assert output.shape == (2, 2, *x.shape[2:]) and output.isfinite().all()


def test_examples_of_a_batch_do_not_mix():
    x, t, image = inputs(3, dtype=torch.float64)
    model = small_model().double()
    together = model(x, t, image=image)
    apart = torch.cat([model(x[i:i + 1], t[i:i + 1], image=image[i:i + 1]) for i in range(3)])
    torch.testing.assert_close(together, apart, rtol=1e-9, atol=1e-9)


# ---- what goes in ----

def test_image_is_stacked_before_the_noisy_mask():
    model, seen = small_model(), []
    model.input_blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x, t, image = inputs()
    model(x, t, image=image)
    assert torch.equal(seen[0], torch.cat([image, x], dim=1))


def test_every_input_matters():
    model = small_model()
    x, t, image = inputs()
    output = model(x, t, image=image)
    for other in (model(x + 0.1, t, image=image), model(x, t // 2, image=image), model(x, t, image=image.flip(1))):
        assert (other - output).abs().amax() > 1e-3


def test_class_conditional_model_needs_labels_and_uses_them():
    model = small_model(class_cond=True)
    x, t, image = inputs()
    with pytest.raises(ValueError, match="class labels"):
        model(x, t, image=image)
    outputs = [model(x, t, image=image, y=torch.tensor(y)) for y in ([3, 4], [3, 5])]
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert (outputs[0][1] - outputs[1][1]).abs().amax() > 1e-3
    with pytest.raises(ValueError, match="class labels"):
        small_model()(x, t, image=image, y=torch.tensor([3, 4]))


def test_plain_unet_takes_its_input_as_it_is():
    model = UNetModel(16, 3, 32, 4, 1, [], channel_mult=(1, 2))
    assert model(torch.zeros(2, 3, 16, 16), torch.tensor([1, 2])).shape == (2, 4, 16, 16)


# ---- attention ----

def attention_reference(weights, x, heads, new_order):
    """x + proj(softmax(q k^T / sqrt(d)) v), pixel by pixel and head by head; x is [C, H, W] float64."""
    channels = len(x)
    flat = x.reshape(channels, -1)
    groups = flat.reshape(32, -1)
    normed = (groups - groups.mean(1, keepdims=True)) / np.sqrt(groups.var(1, keepdims=True) + 1e-5)
    weights = {name: value.detach().numpy() for name, value in weights.items()}
    normed = normed.reshape(flat.shape) * weights["norm.weight"][:, None] + weights["norm.bias"][:, None]
    mixed = weights["qkv.weight"][:, :, 0] @ normed + weights["qkv.bias"][:, None]
    width = channels // heads
    result = np.zeros_like(flat)
    for head in range(heads):
        if new_order:  # all q, then all k, then all v
            q, k, v = (mixed[i * channels + head * width:][:width] for i in range(3))
        else:  # q, k, v of the first head, then of the second
            q, k, v = (mixed[(3 * head + i) * width:][:width] for i in range(3))
        for position in range(flat.shape[1]):
            score = np.array([q[:, position] @ k[:, other] for other in range(flat.shape[1])]) / math.sqrt(width)
            share = np.exp(score - score.max())
            result[head * width:(head + 1) * width, position] = v @ (share / share.sum())
    out = weights["proj_out.weight"][:, :, 0] @ result + weights["proj_out.bias"][:, None]
    return (flat + out).reshape(x.shape)


def attention_block(heads, new_order, channels=64):
    block = AttentionBlock(channels, heads, new_order).double()
    generator = torch.Generator().manual_seed(heads)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return block


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 4, 8])
def test_attention_agrees_with_softmax_loops(heads, new_order):
    block = attention_block(heads, new_order)
    x = torch.randn(2, 64, 4, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    result = block(x).detach().numpy()
    for row, output in zip(x.numpy(), result):
        expected = attention_reference(dict(block.named_parameters()), row, heads, new_order)
        np.testing.assert_allclose(output, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("heads, same", [(1, True), (2, False), (4, False)])
def test_attention_orders_differ_as_soon_as_there_are_two_heads(heads, same):
    x = torch.randn(1, 64, 4, 4, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    old, new = (attention_block(heads, order)(x) for order in (False, True))
    assert torch.allclose(old, new) == same


def test_attention_order_flag_reaches_every_block():
    x, t, image = inputs()
    model, other = small_model(), small_model(use_new_attention_order=True)
    output = model(x, t, image=image)
    assert (other(x, t, image=image) - output).abs().amax() > 1e-3
    for module in other.modules():
        if isinstance(module, AttentionBlock):
            module.use_new_attention_order = False
    torch.testing.assert_close(other(x, t, image=image), output)


def silence_attention(model, part):
    for name, module in model.named_modules():
        if isinstance(module, AttentionBlock) and name.startswith(part):
            nn.init.zeros_(module.proj_out.weight)
    return model


def test_num_heads_upsample_sets_the_heads_on_the_way_up_only():
    x, t, image = inputs(dtype=torch.float64)

    def output(silent, **flags):
        return silence_attention(small_model(**flags), silent).double()(x, t, image=image)

    mixed = dict(num_heads=2, num_heads_upsample=4)
    torch.testing.assert_close(output("output_blocks", **mixed), output("output_blocks", num_heads=2))
    for silent in ("input_blocks", "middle_block"):
        assert not torch.allclose(output(silent, **mixed), output(silent, num_heads=2))
    below = [silence_attention(silence_attention(small_model(**flags), "input_blocks"), "middle_block").double()(
        x, t, image=image) for flags in (mixed, dict(num_heads=4))]
    torch.testing.assert_close(*below)


def test_num_head_channels_replaces_num_heads_everywhere():
    x, t, image = inputs(dtype=torch.float64)
    outputs = [small_model(**flags).double()(x, t, image=image)
               for flags in (dict(num_heads=1, num_heads_upsample=2, num_head_channels=16), dict(num_heads=4))]
    torch.testing.assert_close(*outputs)


def test_attention_sits_at_the_sides_asked_for():
    def sides(**flags):
        found = set()
        model = small_model(**flags)
        for name, module in model.named_modules():
            if isinstance(module, AttentionBlock) and not name.startswith("middle_block"):
                module.register_forward_pre_hook(lambda module, args: found.add(args[0].shape[-1]))
        x, t, image = inputs()
        model(x, t, image=image)
        return found

    assert sides(attention_resolutions="8") == {8}
    assert sides(attention_resolutions="16,8") == {16, 8}
    assert sides(attention_resolutions="") == set()


# ---- residual blocks ----

def silu(h):
    return h / (1 + (-h).exp())


def norm_reference(h, weight, bias):
    groups = h.reshape(len(h), 32, -1)
    spread = (groups.var(2, unbiased=False, keepdim=True) + 1e-5).sqrt()
    h = ((groups - groups.mean(2, keepdim=True)) / spread).reshape(h.shape)
    return h * weight[:, None, None] + bias[:, None, None]


def residual_reference(weights, x, emb, scale_shift, change):
    """A residual block from its weights: norm, SiLU, (change of size,) conv; embedding; norm, SiLU, conv; skip."""
    def layer(name):
        return weights[name + ".weight"], weights[name + ".bias"]

    h = change(silu(norm_reference(x, *layer("in_layers.0"))))
    h = F.conv2d(h, *layer("in_layers.2"), padding=1)
    e = silu(emb) @ weights["emb_layers.1.weight"].T + weights["emb_layers.1.bias"]
    if scale_shift:
        scale, shift = e[:, :h.shape[1], None, None], e[:, h.shape[1]:, None, None]
        h = norm_reference(h, *layer("out_layers.0")) * (1 + scale) + shift
    else:
        h = norm_reference(h + e[:, :, None, None], *layer("out_layers.0"))
    h = F.conv2d(silu(h), *layer("out_layers.3"), padding=1)
    skip = change(x)
    if skip.shape[1] != h.shape[1]:
        skip = F.conv2d(skip, *layer("skip_connection"))
    return skip + h


CHANGES = {
    "same": ({}, lambda x: x),
    "up": ({"up": True}, lambda x: x.repeat_interleave(2, -1).repeat_interleave(2, -2)),
    "down": ({"down": True}, lambda x: (x[..., ::2, ::2] + x[..., 1::2, ::2] + x[..., ::2, 1::2]
                                        + x[..., 1::2, 1::2]) / 4),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize("scale_shift", [False, True])
def test_residual_block_agrees_with_its_formula(scale_shift, channels, change):
    flags, change = CHANGES[change]
    block = ResBlock(channels, 20, 64, use_scale_shift_norm=scale_shift, **flags).double()
    generator = torch.Generator().manual_seed(9)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    x = torch.randn(2, channels, 6, 4, generator=generator, dtype=torch.float64)
    emb = torch.randn(2, 20, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(block(x, emb), residual_reference(
        dict(block.named_parameters()), x, emb, scale_shift, change), rtol=1e-9, atol=1e-9)


def test_plain_levels_halve_by_strided_convolution_and_double_by_nearest_neighbour():
    model = small_model().double()
    x = torch.randn(1, 32, 6, 8, generator=torch.Generator().manual_seed(10), dtype=torch.float64)
    down, up = model.input_blocks[2][0], model.output_blocks[1][2]
    full = F.conv2d(x, down.op.weight, down.op.bias, padding=1)
    torch.testing.assert_close(down(x), full[..., ::2, ::2])
    x = x.repeat(1, 2, 1, 1)
    doubled = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(up(x), F.conv2d(doubled, up.conv.weight, up.conv.bias, padding=1))


# ---- the whole ----

def unet_reference(state, down, up, x, t, heads, y=None, scale_shift=True, updown=False):
    """The network from its weights and its description: what each upward block gets is [from below, from across]."""
    def under(name):
        return {key.removeprefix(name): value for key, value in state.items() if key.startswith(name)}

    angles = t.double()[:, None] * torch.tensor([10000 ** (-i / 16) for i in range(16)], dtype=torch.float64)
    emb = torch.cat([angles.cos(), angles.sin()], dim=1) @ state["time_embed.0.weight"].T + state["time_embed.0.bias"]
    emb = silu(emb) @ state["time_embed.2.weight"].T + state["time_embed.2.bias"]
    if y is not None:
        emb = emb + state["label_emb.weight"][y]

    def run(name, block, x):
        for j, layer in enumerate(block.split(", ")):
            weights, kind = under(f"{name}.{j}."), layer.split()[0]
            if kind == "attention":
                x = torch.from_numpy(np.stack([attention_reference(weights, row, heads, False) for row in x.numpy()]))
            elif kind == "conv":
                x = F.conv2d(x, weights["weight"], weights["bias"], padding=1)
            elif kind == "res" or updown:
                change = CHANGES["same" if kind == "res" else kind][1]
                x = residual_reference(weights, x, emb, scale_shift, change)
            elif kind == "down":
                x = F.conv2d(x, weights["op.weight"], weights["op.bias"], stride=2, padding=1)
            else:
                x = F.conv2d(CHANGES["up"][1](x), weights["conv.weight"], weights["conv.bias"], padding=1)
        return x

    across = []
    for i, block in enumerate(down):
        x = run(f"input_blocks.{i}", block, x)
        across.append(x)
    x = run("middle_block", ", ".join(MIDDLE), x)
    for i, block in enumerate(up):
        x = run(f"output_blocks.{i}", block, torch.cat([x, across.pop()], dim=1))
    x = silu(norm_reference(x, state["out.0.weight"], state["out.0.bias"]))
    return F.conv2d(x, state["out.2.weight"], state["out.2.bias"], padding=1)


@pytest.mark.parametrize("flags, down, up, options", [
    ({}, DOWN, UP, {}),
    ({"use_scale_shift_norm": False}, DOWN, UP, {"scale_shift": False}),
    ({"resblock_updown": True}, DOWN, UP, {"updown": True}),
    ({"class_cond": True}, DOWN, UP, {"y": torch.tensor([3, 999])}),
    (DEEP, DEEP_DOWN, DEEP_UP, {}),
], ids=["plain", "added embedding", "updown", "class_cond", "deep"])
def test_network_agrees_with_its_formula_in_float64(flags, down, up, options):
    model = small_model(**flags).double()
    x, t, image = inputs(dtype=torch.float64)
    t = t // 100  # they are embedded in float32, with an error in proportion
    expected = unet_reference(model.state_dict(), down, up, torch.cat([image, x], dim=1), t, 2, **options)
    with torch.no_grad():
        output = model(x, t, image=image, y=options.get("y"))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)


# ---- training ----

def gradients(model, seed=0):
    x, t, image = inputs(dtype=torch.float64)
    torch.manual_seed(seed)
    output = model(x, t, image=image)
    (output ** 2).sum().backward()
    return output.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}


def test_gradient_checkpointing_gives_equal_gradients_also_with_dropout():
    plain, recomputed = (gradients(small_model(use_checkpoint=flag, dropout=0.3).double().train())
                         for flag in (False, True))
    torch.testing.assert_close(recomputed[0], plain[0])
    assert all(grad.abs().amax() > 0 for grad in plain[1].values())
    for name, grad in plain[1].items():
        torch.testing.assert_close(recomputed[1][name], grad, msg=lambda text, name=name: f"{name}: {text}")


def test_gradient_checkpointing_recomputes_residual_and_attention_blocks(monkeypatch):
    calls = {ResBlock: 0, AttentionBlock: 0}
    for kind in calls:
        def counted(self, *args, kind=kind, original=kind._forward):
            calls[kind] += 1
            return original(self, *args)

        monkeypatch.setattr(kind, "_forward", counted)

    def count(flag):
        calls.update(dict.fromkeys(calls, 0))
        gradients(small_model(use_checkpoint=flag).double().train())
        return tuple(calls.values())

    once = count(False)
    assert once == (8, 4)
    assert count(True) == (16, 8)


def test_dropout_acts_in_training_only():
    x, t, image = inputs()
    plain, model = small_model(dropout=0.0), small_model(dropout=0.5)
    assert torch.equal(model(x, t, image=image), plain(x, t, image=image))
    model.train()
    torch.manual_seed(0)
    first, second = model(x, t, image=image), model(x, t, image=image)
    assert not torch.allclose(first, second)
    assert torch.equal(plain.train()(x, t, image=image), plain.eval()(x, t, image=image))


def test_bfloat16_autocast_stays_close_to_float32():
    x, t, image = inputs()
    model = small_model()
    exact = model(x, t, image=image)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(x, t, image=image)
    assert ((rough.float() - exact).norm() / exact.norm()).item() < 0.03


# ---- sampling in 16 bits ----

@pytest.mark.parametrize("scale_shift", [True, False])
def test_converted_network_agrees_and_keeps_what_must_stay_exact(scale_shift):
    model = small_model(use_scale_shift_norm=scale_shift)
    x, t, image = inputs()
    with torch.no_grad():
        plain = model(x, t, image=image)
        same = model.convert_for_sampling()(x, t, image=image)
        half = model.convert_for_sampling(torch.bfloat16)(x, t, image=image)
    np.testing.assert_allclose(same, plain, atol=1e-4 * plain.abs().max())
    assert half.dtype == torch.float32 and 0 < (half - plain).abs().mean() < 0.02 * plain.abs().mean()
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    norms = {f"{name}.{kind}" for name, module in model.named_modules() if isinstance(module, nn.GroupNorm)
             for kind in ("weight", "bias")}
    assert wide == norms | {name for name, _ in model.named_parameters() if name.startswith(("time_embed", "out."))}


def test_networks_of_large_maps_are_converted_to_channels_last():
    for size, last in ((32, False), (64, True)):
        model = small_model(image_size=size, attention_resolutions=str(size // 2)).convert_for_sampling()
        weight = model.middle_block[0].in_layers[2].weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == last


# ---- lower resolution ----

def test_unshuffled_blocks_of_pixels_are_places_and_come_back_as_pixels():
    """Beside three maps of the distance from the centre. The network's last layer is made to return the blocks of x."""
    model = small_model(image_size=32, pixel_unshuffle=2, image_channels=1)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    expected = expected_shapes(["conv 11 32", *DOWN[1:]], UP, outputs=4)
    assert shapes == expected  # 4 * (1 + 1) + 3 channels, at the sides that SMALL has
    x, t, image = inputs(side=32)
    seen = []
    model.out.register_forward_hook(lambda module, args, out: F.pixel_unshuffle(x, 2))
    model.input_blocks[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        assert torch.equal(model(x, t, image=image[:, :1]), x)
    stacked, bells = seen[0].split([8, 3], 1)
    assert torch.equal(stacked, F.pixel_unshuffle(torch.cat([image[:, :1], x], 1), 2))
    assert torch.equal(bells, bells.flip(2)) and torch.equal(bells, bells.transpose(2, 3))  # round and in the middle
    assert (bells[..., 8, 8:].diff() < 0).all() and bells.max() <= 1 and bells.min() >= 0


def test_half_the_resolution_takes_a_quarter_of_the_work():
    flops = []
    for block in (1, 2):
        model = small_model(image_size=64 * block, attention_resolutions="", pixel_unshuffle=block)
        x, t, image = inputs(n=1, side=64 * block)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, t, image=image)
        flops.append(counter.get_total_flops())
    assert flops[0] < flops[1] < 1.3 * flops[0]  # four times as many pixels for about the same work


def test_a_side_that_no_blocks_fill_is_refused():
    with pytest.raises(InputError, match="--pixel_unshuffle 4 needs a multiple of 8"):
        create_model(**{**SMALL, "image_size": 20, "pixel_unshuffle": 4})
