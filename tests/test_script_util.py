"""Flags -> objects: what they build, and what is said about those that cannot be."""

import copy
import inspect
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.refusals import refusal

from guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType
from guided_diffusion.nn import compile_network
from guided_diffusion.predictions import PREDICTIONS
from guided_diffusion.script_util import (
    create_encoders,
    create_gaussian_diffusion,
    create_model,
    create_model_and_diffusion,
    model_and_diffusion_defaults,
)

TINY = dict(image_size=16, num_channels=32, channel_mult="1,2", num_res_blocks=1, attention_resolutions="8",
            num_heads=1)


# the signatures of guided-diffusion; a name without a default is required
REQUIRED = inspect.Parameter.empty
PUBLISHED_MODEL = dict(
    image_size=REQUIRED, num_channels=REQUIRED, num_res_blocks=REQUIRED, channel_mult="", learn_sigma=False,
    class_cond=False, use_checkpoint=False, attention_resolutions="16", num_heads=1, num_head_channels=-1,
    num_heads_upsample=-1, use_scale_shift_norm=False, dropout=0, resblock_updown=False, use_fp16=False,
    use_new_attention_order=False)
PUBLISHED_DIFFUSION = dict(
    steps=1000, learn_sigma=False, sigma_small=False, noise_schedule="linear", use_kl=False, predict_xstart=False,
    rescale_timesteps=False, rescale_learned_sigmas=False, timestep_respacing="")


# ---- published names ----

@pytest.mark.parametrize("function, published, own", [
    (create_model, PUBLISHED_MODEL, {"image_channels": 4, "pixel_unshuffle": 1}),
    (create_gaussian_diffusion, PUBLISHED_DIFFUSION, {"prediction": "", "diffusion_steps": None})])
def test_published_functions_take_the_published_arguments_with_their_defaults(function, published, own):
    parameters = inspect.signature(function).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {**published, **own}
    assert list(parameters)[:len(published)] == list(published)  # those of create_model may be given by place
    kinds = {parameter.kind for parameter in parameters.values()}
    assert kinds == {inspect.Parameter.KEYWORD_ONLY if published is PUBLISHED_DIFFUSION else
                     inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_default_of_published_functions_is_what_they_build():
    """One that says a default and builds another would be worse than none."""
    with torch.device("meta"):
        one = create_model(64, 32, 1)
        other = create_model(64, 32, 1, "1,2,3,4", False, False, False, "16", 1, -1, -1, False, 0.0, False, False,
                             False, 4)
    flags = create_model_and_diffusion(image_size=64, num_channels=32, num_res_blocks=1)[0]
    shapes, same, differ = ({name: value.shape for name, value in model.state_dict().items()}
                            for model in (one, other, flags))
    assert shapes == same and shapes != differ  # the flags' defaults are the published scripts', not these
    assert one.input_blocks[0][0].in_channels == 5 and one.out[2].out_channels == 1
    sides = {"input_blocks.5.1.qkv.weight", "input_blocks.7.1.qkv.weight"}  # of side 16, and of side 8
    assert {name for name in shapes if name in sides} == {"input_blocks.5.1.qkv.weight"}
    assert sides <= differ.keys()
    heads = {module.num_heads for module in one.modules() if hasattr(module, "num_heads")} - {-1}
    assert heads == {1}


def test_model_and_diffusion_together_take_the_flags_defaults():
    defaults = model_and_diffusion_defaults()
    published = dict(image_size=64, num_channels=128, num_res_blocks=2, num_heads=4, num_heads_upsample=-1,
                     num_head_channels=-1, attention_resolutions="16,8", channel_mult="", dropout=0.0,
                     class_cond=False, use_checkpoint=False, use_scale_shift_norm=True, resblock_updown=False,
                     use_fp16=False, use_new_attention_order=False, learn_sigma=False, diffusion_steps=1000,
                     noise_schedule="linear", timestep_respacing="", use_kl=False, predict_xstart=False,
                     rescale_timesteps=False, rescale_learned_sigmas=False)
    assert published.items() <= defaults.items()
    model = create_model_and_diffusion(num_channels=32)[0]
    expected = dict(image_size=64, num_channels=32, num_res_blocks=2, num_heads=4, attention_resolutions="16,8",
                    use_scale_shift_norm=True)
    with torch.device("meta"):
        same = create_model(**expected)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in same.state_dict().items()}


def test_network_and_process_of_one_call_agree_about_the_variance_and_the_prediction():
    for learn_sigma in (False, True):
        for flags, prediction in (({}, "eps"), ({"predict_xstart": True}, "xstart"), ({"prediction": "v"}, "v")):
            model, diffusion = create_model_and_diffusion(**TINY, learn_sigma=learn_sigma, **flags)
            assert model.out[2].out_channels == 1 + learn_sigma
            assert (diffusion.model_var_type == ModelVarType.LEARNED_RANGE) is learn_sigma
            assert diffusion.model_mean_type == prediction and diffusion.prediction is PREDICTIONS[prediction]


def test_both_spellings_of_the_prediction_may_not_contradict_each_other():
    for function, flags in ((create_gaussian_diffusion, {}), (create_model_and_diffusion, TINY)):
        assert refusal(function, **flags, predict_xstart=True, prediction="v") == (
            "--predict_xstart True and --prediction v: choose one")
    assert create_gaussian_diffusion(predict_xstart=True, prediction="xstart").model_mean_type == "xstart"


# ---- the network ----

@pytest.mark.parametrize("image_size, mult", [(64, (1, 2, 3, 4)), (128, (1, 1, 2, 3, 4)), (256, (1, 1, 2, 2, 4, 4)),
                                              (512, (1, 1, 2, 2, 4, 4))])
def test_default_levels_of_the_known_sizes(image_size, mult):
    with torch.device("meta"):
        one, other = (create_model(image_size=image_size, num_channels=32, num_res_blocks=1, num_heads=1,
                                   attention_resolutions="16", channel_mult=text)
                      for text in ("", ",".join(map(str, mult))))
    shapes = {name: value.shape for name, value in one.state_dict().items()}
    assert shapes == {name: value.shape for name, value in other.state_dict().items()}
    assert shapes["middle_block.0.in_layers.2.weight"][0] == 32 * mult[-1]


def test_other_sizes_need_levels_and_the_error_says_so():
    message = refusal(create_model, **{**TINY, "channel_mult": ""})
    assert "--image_size 16" in message and "--channel_mult" in message and "64, 128, 256, 512" in message


def test_levels_may_be_fractions():
    with torch.device("meta"):
        model = create_model(**{**TINY, "num_channels": 64, "channel_mult": "0.5,1"})
    assert model.state_dict()["input_blocks.0.0.weight"].shape[0] == 32


@pytest.mark.parametrize("flags, words", [
    (dict(image_size=18, channel_mult="1,1,1", attention_resolutions=""),
     ["--image_size 18", "multiple of 4", "--channel_mult"]),
    (dict(attention_resolutions="7"), ["--attention_resolutions 7", "no feature map has the side 7", "16, 8"]),
    (dict(attention_resolutions="8,32"), ["--attention_resolutions 8,32", "side 32"]),
    (dict(attention_resolutions="all"), ["--attention_resolutions all"]),
    (dict(num_heads=3), ["--num_heads 3", "64 channels"]),
    (dict(num_heads_upsample=5), ["--num_heads_upsample 5", "64 channels"]),
    (dict(num_heads=0), ["--num_heads 0"]),
    (dict(num_head_channels=48), ["--num_head_channels 48", "64 channels"]),
    (dict(num_head_channels=0), ["--num_head_channels 0"]),
    (dict(num_channels=48), ["--num_channels 48", "multiple of 32"]),
    (dict(channel_mult="0,1"), ["--channel_mult 0,1", "above 0"]),
        (dict(channel_mult="nan,1"), ["--channel_mult nan,1", "above 0"]),
        (dict(channel_mult="1,inf"), ["--channel_mult 1,inf", "at most 1024"]),
    (dict(channel_mult="1;2"), ["--channel_mult 1;2"]),
    (dict(image_size=0), ["--image_size 0"]),
])
def test_impossible_network_is_refused_by_flag(flags, words):
    message = refusal(create_model, **{**TINY, **flags})
    assert all(word in message for word in words), message


def test_network_runs_with_every_architecture_flag():
    x, t, image = torch.randn(2, 1, 16, 16), torch.tensor([1, 5]), torch.rand(2, 3, 16, 16)
    for flags in (dict(learn_sigma=True), dict(num_head_channels=16, resblock_updown=True),
                  dict(use_new_attention_order=True, num_heads=4, num_heads_upsample=2, use_scale_shift_norm=False)):
        model = create_model(**{**TINY, "image_channels": 3, **flags})
        assert model(x, t, image=image).shape == (2, 2 if "learn_sigma" in flags else 1, 16, 16)


def test_class_labels_can_be_used_from_python():
    model = create_model(**{**TINY, "class_cond": True})
    args = torch.randn(2, 1, 16, 16), torch.tensor([1, 5])
    assert model(*args, image=torch.rand(2, 4, 16, 16), y=torch.tensor([0, 999])).shape == (2, 1, 16, 16)


def test_misspelled_python_flag_is_a_type_error():
    for function, flags in ((create_model, TINY), (create_gaussian_diffusion, {}), (create_model_and_diffusion, TINY),
                            (create_encoders, {})):
        with pytest.raises(TypeError, match="imagesize"):
            function(**flags, imagesize=3)


@pytest.mark.parametrize("flags, attribute, value", [
    ({}, "model_mean_type", ModelMeanType.EPSILON),
    ({"predict_xstart": True}, "model_mean_type", ModelMeanType.START_X),
    ({}, "model_var_type", ModelVarType.FIXED_LARGE),
    ({"learn_sigma": True}, "model_var_type", ModelVarType.LEARNED_RANGE),
    ({}, "loss_type", LossType.MSE), ({"use_kl": True}, "loss_type", LossType.RESCALED_KL),
    ({"rescale_learned_sigmas": True}, "loss_type", LossType.RESCALED_MSE),
    ({"rescale_timesteps": True}, "rescale_timesteps", True), ({"steps": 50}, "num_timesteps", 50),
    ({"diffusion_steps": 100, "timestep_respacing": "ddim25"}, "num_timesteps", 25),
    ({"timestep_respacing": "10,15,20"}, "num_timesteps", 45),
])
def test_diffusion_flags_mean_what_they_say(flags, attribute, value):
    assert getattr(create_gaussian_diffusion(**flags), attribute) == value


@pytest.mark.parametrize("flags, words", [
    (dict(diffusion_steps=20), ["--diffusion_steps 20", "more than 20"]),
    (dict(diffusion_steps=100, timestep_respacing="101"), ["--timestep_respacing 101"]),
    (dict(diffusion_steps=100, timestep_respacing="ddim33x"), ["--timestep_respacing ddim33x"]),
    (dict(diffusion_steps=100, timestep_respacing="ddim99"), ["--timestep_respacing ddim99"]),
])
def test_impossible_diffusion_is_refused_by_flag(flags, words):
    message = refusal(create_gaussian_diffusion, **flags)
    assert all(word in message for word in words), message


def test_encoders_follow_their_flags():
    posterior, prior = create_encoders(num_filters="4,8", latent_dim=3, no_convs_per_block=2, input_channels_dist=2)
    q = posterior(torch.rand(2, 4, 16, 16), torch.rand(2, 1, 16, 16))
    assert q.event_shape == (3,) and q.batch_shape == (2,)
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in prior.modules()) == 5
    assert posterior.encoder[0].weight.shape == (4, 3, 3, 3)
    assert not torch.equal(posterior.encoder[0].weight, prior.encoder[0].weight)
    assert create_encoders(kl_weight=0.0) == (None, None)


@pytest.mark.parametrize("flags, word", [(dict(num_filters=""), "--num_filters"), (dict(num_filters="4,0"), "4,0"),
                                         (dict(num_filters="4,x"), "--num_filters"),
                                         (dict(input_channels_dist=5), "--input_channels_dist 5")])
def test_impossible_encoders_are_refused_by_flag(flags, word):
    assert word in refusal(create_encoders, **flags)


# ---- --compile ----

COMPILER = shutil.which(os.environ.get("CXX", "g++"))


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler here, which torch.compile needs on a CPU")
def test_compiled_network_computes_the_same_under_the_same_names(capsys, monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "suppress_errors", False)  # restored afterwards
    torch.manual_seed(0)
    model = create_model(**TINY).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    inputs, names = (torch.rand(2, 1, 16, 16), torch.tensor([3, 5]), torch.rand(2, 4, 16, 16)), list(model.state_dict())
    before = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(*inputs)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        compile_network(model, torch.device("cpu"))
        got = model(*inputs)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs + 1  # the trial's and the network's
        assert "compiles the network" in capsys.readouterr().out and expected.std() > 0.01
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        assert list(model.state_dict()) == names
        copied = copy.deepcopy(model)
        torch.testing.assert_close(copied(*inputs), expected, atol=1e-5, rtol=0)
        copied.out[2].bias.add_(1)
        torch.testing.assert_close(copied(*inputs), expected + 1, atol=1e-5, rtol=0)
        before.load_state_dict(model.state_dict())
        assert torch.equal(model(*inputs), got)  # its copy is another network
    torch._dynamo.reset()


WITHOUT_COMPILER = """
import torch
from guided_diffusion.nn import compile_network
from guided_diffusion.script_util import create_model

model = create_model(image_size=16, num_channels=32, channel_mult="1,2", num_res_blocks=1, num_heads=1,
                     attention_resolutions="8").eval()
for p in model.parameters():
    torch.nn.init.normal_(p, std=0.05)
inputs = torch.rand(2, 1, 16, 16), torch.tensor([3, 5]), torch.rand(2, 4, 16, 16)
with torch.no_grad():
    expected = model(*inputs)
    compile_network(model, torch.device("cpu"))
    assert torch.equal(model(*inputs), expected) and expected.std() > 0.01
"""


@pytest.mark.long
def test_without_a_compiler_the_network_stays_as_it_is_and_one_line_says_so(environment, tmp_path):
    (tmp_path / "bin").mkdir()
    environment.update(CXX="/nonexistent", PATH=str(tmp_path / "bin"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True,
                          timeout=200)
    assert done.returncode == 0, done.stderr
    line, = done.stdout.splitlines()
    assert line.startswith("--compile: goes on without") and done.stderr == ""
