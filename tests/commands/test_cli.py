"""The command line: the published flags with their defaults, and what is said about those that cannot be."""

import shlex
from types import SimpleNamespace

import pytest
import torch
from helpers.models import pick
from helpers.refusals import refusal

from guided_diffusion import checkpoint
from guided_diffusion.commands import cli
from guided_diffusion.commands.cli import parse_flags
from guided_diffusion.flags import apply_stored_flags, settle, stored_flags
from guided_diffusion.gaussian_diffusion import ModelVarType
from guided_diffusion.methods.process import settle_sampler
from guided_diffusion.metrics import SCORES
from guided_diffusion.networks import NETWORKS
from guided_diffusion.predictions import PREDICTIONS
from guided_diffusion.respace import SPACINGS
from guided_diffusion.samplers import SAMPLERS, network_calls
from guided_diffusion.script_util import BEST, autocast_dtype, create_gaussian_diffusion

TRAINING, SAMPLING, EVALUATION = "training", "sampling", "evaluation"

PUBLISHED = {
    "both": dict(
        image_size=64, num_channels=128, num_res_blocks=2, num_heads=4, num_heads_upsample=-1, num_head_channels=-1,
        attention_resolutions="16,8", channel_mult="", dropout=0.0, class_cond=False, use_checkpoint=False,
        use_scale_shift_norm=True, resblock_updown=False, use_fp16=False, use_new_attention_order=False,
        learn_sigma=False, diffusion_steps=1000, noise_schedule="linear", timestep_respacing="", use_kl=False,
        predict_xstart=False, rescale_timesteps=False, rescale_learned_sigmas=False, ngpu=0, local_rank=None),
    TRAINING: dict(
        input_channels_dist=1, num_filters="32,64,128,192", no_convs_per_block=3, latent_dim=6,
        data_dir="./data/training", schedule_sampler="uniform", lr=1e-4, weight_decay=0.0, lr_anneal_steps=0,
        batch_size=1, microbatch=-1, ema_rate="0.9999", log_interval=100, save_interval=5000, resume_checkpoint="",
        fp16_scale_growth=1e-3),
    SAMPLING: dict(
        data_dir="./data/testing", model_path="", num_ensemble=5, num_samples=0, batch_size=1, clip_denoised=True,
        use_ddim=False),
}
OWN = {
    "both": dict(method="cimd", network="unet", prediction="eps", image_channels=4, use_bf16=False, plugin="", seed=0,
                 fit="error", visdom_port=8097, results_dir="", normalise="full", foreground="", context=0),
    TRAINING: dict(max_steps=0, kl_weight=0.001),
    SAMPLING: dict(ddim_eta=0.0, median_blur=0, evaluate=False, sampler="ancestral", sampling_steps=0,
                   timestep_spacing="uniform"),
}
EVALUATION_FLAGS = dict(
    data_dir="./data/testing", samples_dir="./results", pattern="{case}_output{i}.png", ensemble_sizes="4,16,50,100",
    skip_missing=False, volumes=False, patient_pattern=r"\D*\d+", output_dir="", plugin="", fit="error", seed=0, ngpu=0,
    local_rank=None, dist_timeout=600.0, normalise="full", foreground="")

MODEL_FLAGS = ("--image_size 128 --num_channels 128 --class_cond False --num_res_blocks 2 --num_heads 1"
               " --learn_sigma True --use_scale_shift_norm False --attention_resolutions 16")
DIFFUSION_FLAGS = ("--diffusion_steps 1000 --noise_schedule linear --rescale_learned_sigmas False"
                   " --rescale_timesteps False")
TRAIN_FLAGS = "--lr 1e-4 --batch_size 20"


def parse(job, text=""):
    return parse_flags(job, "", shlex.split(text))


# ---- the table ----

@pytest.mark.parametrize("job", [TRAINING, SAMPLING])
@pytest.mark.parametrize("table", [PUBLISHED, OWN])
def test_every_flag_exists_with_its_default(job, table):
    args, given = parse(job)
    assert given == {}
    for name, default in {**table["both"], **table[job]}.items():
        value = getattr(args, name)
        assert value == default and type(value) is type(default), name


@pytest.mark.parametrize("job", [TRAINING, SAMPLING])
def test_every_flag_takes_a_value_of_its_own_kind(job):
    flags = {**PUBLISHED["both"], **PUBLISHED[job], **OWN["both"], **OWN[job]}
    other = {"method": "cimd", "network": "unet", "prediction": "xstart", "noise_schedule": "cosine",
             "schedule_sampler": "loss-second-moment", "fit": "crop", "local_rank": 1,
             "ema_rate": "0.5,0.9", "median_blur": 3, "microbatch": 2, "dropout": 0.5, "class_cond": False,
             "use_ddim": True, "ddim_eta": 0.5, "use_fp16": False, "sampler": "ddim"}
    # not with timestep_respacing, with num_head_channels, and without use_fp16; a plugin must be there
    for name in ("sampling_steps", "timestep_spacing", "num_heads", "num_heads_upsample", "fp16_scale_growth",
                 "plugin"):
        flags.pop(name, None)
    for name, default in flags.items():
        if name not in other:
            other[name] = {bool: not default, int: 3, float: 0.25, str: "7"}[type(default)]
    text = " ".join(f"--{name} {value}" for name, value in other.items() if name in flags)
    args, given = parse(job, text)
    assert given == {name: value for name, value in other.items() if name in flags}
    assert vars(args) == {**vars(args), **given}


def test_evaluation_has_flags_of_its_own_and_none_of_the_model():
    args, given = parse(EVALUATION)
    assert vars(args) == {**EVALUATION_FLAGS, "folders": []} and given == {}
    assert all(type(getattr(args, name)) is type(default) for name, default in EVALUATION_FLAGS.items())
    args, given = parse(EVALUATION, "--ensemble_sizes 2,8 --pattern {case}/{i:03d}.png --skip_missing yes --fit crop"
                                    " --local-rank=1")
    assert given == {"ensemble_sizes": "2,8", "pattern": "{case}/{i:03d}.png", "skip_missing": True, "fit": "crop",
                     "local_rank": 1}
    assert vars(args) == {**EVALUATION_FLAGS, "folders": [], **given}
    assert "did you mean --samples_dir?" in refusal(parse, EVALUATION, "--sample_dir x")


def test_the_old_name_of_ensemble_sizes_is_taken_but_not_shown(capsys):
    assert parse(EVALUATION, "--num_samples 2,8") == parse(EVALUATION, "--ensemble_sizes 2,8")
    assert "--num_samples is the old name of --ensemble_sizes" in refusal(
        parse, EVALUATION, "--num_samples 2 --ensemble_sizes 2")
    assert parse(SAMPLING, "--num_samples 2")[0].num_samples == 2  # cases, as published
    with pytest.raises(SystemExit):
        parse(EVALUATION, "--help")
    shown = capsys.readouterr().out
    assert "--ensemble_sizes" in shown and "--num_samples" not in shown


def test_help_of_scoring_says_what_each_score_is(capsys):
    with pytest.raises(SystemExit):
        parse(EVALUATION, "--help")
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f" {name}: {score.help}" in shown for name, score in SCORES.entries.items()) and len(SCORES) > 10


@pytest.mark.parametrize("flags", ["--ensemble_sizes 2", "--patient_pattern x"])
def test_sampling_refuses_flags_of_scores_without_scores(flags):
    assert refusal(parse, SAMPLING, flags) == f"{flags.split()[0]}: for scores only; give --evaluate True, too"
    assert parse(SAMPLING, f"{flags} --evaluate True")[1]["evaluate"]


@pytest.mark.parametrize("job, text, expected", [
    (TRAINING, f"--data_dir ./data/training {TRAIN_FLAGS} {MODEL_FLAGS} {DIFFUSION_FLAGS}",
     dict(batch_size=20, lr=1e-4, image_size=128, learn_sigma=True, use_scale_shift_norm=False, num_heads=1,
          attention_resolutions="16", class_cond=False, rescale_timesteps=False)),
    (TRAINING, f"--local-rank=1 --data_dir ./data/training {TRAIN_FLAGS}", dict(local_rank=1)),
    (TRAINING, "--local_rank=1", dict(local_rank=1)),
    (SAMPLING, f"--data_dir ./data/testing --model_path ./results/savedmodel.pt --num_ensemble=4 {MODEL_FLAGS}"
               f" {DIFFUSION_FLAGS}", dict(num_ensemble=4, model_path="./results/savedmodel.pt", image_size=128)),
])
def test_published_command_lines_parse(job, text, expected):
    args, given = parse(job, text)
    assert expected.items() <= vars(args).items() and set(expected) <= set(given)


def test_published_model_flags_build_the_published_network():
    args, _ = parse(SAMPLING, f"{MODEL_FLAGS} {DIFFUSION_FLAGS}")
    with torch.device("meta"):  # shapes without memory
        model = NETWORKS[args.network](args, 1, 2)
    diffusion = create_gaussian_diffusion(**pick(args, "diffusion"))
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(85.6, abs=0.05)
    assert model.state_dict()["input_blocks.0.0.weight"].shape == (128, 5, 3, 3)
    assert model.state_dict()["out.2.weight"].shape == (2, 128, 3, 3)
    assert diffusion.num_timesteps == 1000 and diffusion.model_var_type == ModelVarType.LEARNED_RANGE


@pytest.mark.parametrize("text, value", [("True", True), ("true", True), ("1", True), ("yes", True), ("T", True),
                                         ("False", False), ("false", False), ("0", False), ("no", False)])
def test_booleans_may_be_spelled_as_people_do(text, value):
    assert parse(TRAINING, f"--learn_sigma {text}")[0].learn_sigma is value
    assert parse(TRAINING, f"--learn_sigma={text}")[0].learn_sigma is value


def test_other_words_are_no_booleans():
    message = refusal(parse, TRAINING, "--learn_sigma maybe")
    assert "--learn_sigma" in message and "'maybe' is neither True nor False" in message


@pytest.mark.parametrize("job, text, near", [
    (TRAINING, "--imagesize 64", "--image_size"), (TRAINING, "--batchsize=4", "--batch_size"),
    (SAMPLING, "--num_ensembles 4", "--num_ensemble"), (TRAINING, "--learning_sigma True", "--learn_sigma"),
    (TRAINING, "--image_siz 64", "--image_size"),
])
def test_unknown_flag_suggests_the_nearest(job, text, near):
    message = refusal(parse, job, text)
    assert f"unknown flag {text.replace('=', ' ').split()[0]}" in message and f"did you mean {near}?" in message


def test_unknown_flag_like_no_other_points_to_the_help():
    assert refusal(parse, TRAINING, "--xyzzy 3") == "unknown flag --xyzzy; see --help"
    assert "see --help" in refusal(parse, TRAINING, "stray")


def test_flag_of_the_other_script_is_unknown():
    assert "unknown flag --num_ensemble" in refusal(parse, TRAINING, "--num_ensemble 4")
    assert "unknown flag --latent_dim" in refusal(parse, SAMPLING, "--latent_dim 6")
    assert "unknown flag --samples_dir" in refusal(parse, SAMPLING, "--samples_dir x")
    for flag in ("--image_size", "--num_ensemble", "--lr", "--results_dir", "--visdom_port"):
        assert f"unknown flag {flag}" in refusal(parse, EVALUATION, f"{flag} 1")


@pytest.mark.parametrize("script, job", [("segmentation_train.py", TRAINING), ("segmentation_sample.py", SAMPLING)])
def test_help_is_grouped_and_mentions_every_flag_with_its_default(run, script, job):
    result = run(script, "--help")
    assert result.code == 0 and result.err == ""
    headings = [line[:-1] for line in result.out.splitlines() if line and line[0] != " " and line.endswith(":")]
    assert {"the network", "the diffusion process", job, "files and processes", "results"} <= set(headings)
    assert ("AMN and ACN, the encoders of the ambiguity loss" in headings) == (job == TRAINING)
    flags = {**PUBLISHED["both"], **PUBLISHED[job], **OWN["both"], **OWN[job]}
    words = " ".join(result.out.split())
    for name, default in flags.items():
        assert f" --{name} " in result.out or f" --{name}," in result.out, name
        if default not in ("", None, False, 0):
            assert f"(default: {default})" in words, name


def test_help_of_the_evaluation_mentions_its_flags_and_files_only(run):
    result = run("segmentation_evaluate.py", "--help")
    assert result.code == 0 and result.err == ""
    headings = [line[:-1] for line in result.out.splitlines() if line and line[0] != " " and line.endswith(":")]
    assert {EVALUATION, "files and processes"} <= set(headings)
    assert not {"the network", "the diffusion process", "results"} & set(headings)
    words = " ".join(result.out.split())
    for name, default in EVALUATION_FLAGS.items():
        assert f" --{name} " in result.out or f" --{name}," in result.out, name
        if default not in ("", None, False, 0):
            assert f"(default: {default})" in words, name
    assert all(name in words for name in ("scores.csv", "scores.json", "scores.png", "best.png", "worst.png",
                                        "report.html"))


# ---- values that cannot be ----

@pytest.mark.parametrize("job, text, word", [
    (TRAINING, "--batch_size 0", "--batch_size 0: must be at least 1"),
    (SAMPLING, "--batch_size -3", "--batch_size -3: must be at least 1"),
    (SAMPLING, "--num_ensemble 0", "--num_ensemble 0: must be at least 1"),
    (TRAINING, "--batch_size many", "--batch_size"),
    (TRAINING, "--batch_size 1.5", "--batch_size"),
    (TRAINING, "--microbatch 0", "--microbatch 0"),
    (TRAINING, "--grad_accumulation 0", "--grad_accumulation 0: must be at least 1"),
    (TRAINING, "--grad_accumulation 2 --global_batch 8", "--global_batch 8 and --grad_accumulation 2: choose one"),
    (TRAINING, "--lr_scaling sqrt", "--lr_scaling sqrt and --lr_base_batch 0: give both"),
    (TRAINING, "--lr_base_batch 20", "--lr_scaling none and --lr_base_batch 20: give both"),
    (TRAINING, "--lr_scaling cubic", "--lr_scaling"),
    (TRAINING, "--wire_dtype float16", "--wire_dtype"),
    (TRAINING, "--lr nan", "--lr nan"),
    (TRAINING, "--lr=-1e-4", "--lr -0.0001"),
    (TRAINING, "--dropout 1", "--dropout"),
    (TRAINING, "--noise_schedule exponential", "--noise_schedule"),
    (TRAINING, "--schedule_sampler best", "--schedule_sampler"),
    (TRAINING, "--ema_rate 0.9,fast", "--ema_rate 0.9,fast"),
    (TRAINING, "--ema_rate 1", "--ema_rate 1"),
    (TRAINING, "--ema_rate ''", "--ema_rate"),
    (SAMPLING, "--median_blur 4", "--median_blur 4: must be odd"),
    (SAMPLING, "--ddim_eta 0.5", "--sampler ddim"),
    (SAMPLING, "--use_ddim True --ddim_eta 1.5", "--ddim_eta"),
    (SAMPLING, "--fit stretch", "--fit"),
    (TRAINING, "--image_size", "--image_size"),
    (TRAINING, "--seed -1", "--seed"),
    (TRAINING, "--class_cond True", "--class_cond True"),
    (SAMPLING, "--class_cond True", "--class_cond True"),
    (TRAINING, "--use_fp16 True --use_bf16 True", "--use_fp16 and --use_bf16"),
    (EVALUATION, "--seed -1", "--seed -1: must be at least 0"),
    (EVALUATION, "--fit stretch", "--fit"),
    (EVALUATION, "--skip_missing maybe", "--skip_missing"),
])
def test_impossible_value_is_refused_by_flag(job, text, word):
    assert word in refusal(parse, job, text)


def test_half_precision_without_cuda_names_the_alternative(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--use_bf16 True" in refusal(autocast_dtype, parse(TRAINING, "--use_fp16 True")[0])
    assert autocast_dtype(parse(TRAINING, "--use_bf16 True")[0]) == torch.bfloat16
    assert autocast_dtype(parse(TRAINING)[0]) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert autocast_dtype(parse(TRAINING, "--use_fp16 True")[0]) == torch.float16


@pytest.mark.parametrize("text, mode", [
    ("", "off"), ("--visdom off", "off"), ("--visdom_port 0", "off"), ("--visdom off --visdom_port 0", "off"),
    ("--visdom connect", "connect"), ("--visdom_port 8097", "connect"), ("--visdom_server https://host", "connect"),
    ("--visdom start", "start"), ("--visdom start --visdom_port 8000", "start")])
def test_the_view_is_off_unless_it_or_a_server_is_asked_for(text, mode):
    for job in (TRAINING, SAMPLING):
        assert parse(job, text)[0].visdom == mode


# ---- what the network predicts ----

@pytest.mark.parametrize("text, prediction", [
    ("", "eps"), ("--predict_xstart True", "xstart"), ("--predict_xstart False", "eps"),
    *((f"--prediction {name}", name) for name in PREDICTIONS),
    ("--prediction xstart --predict_xstart True", "xstart"), ("--prediction v --predict_xstart False", "v"),
    ("--predict_xstart False --prediction eps", "eps")])
def test_both_spellings_of_the_prediction_agree(text, prediction):
    for job in (TRAINING, SAMPLING):
        args, _ = parse(job, text)
        assert args.prediction == prediction and args.predict_xstart is (prediction == "xstart")
        assert create_gaussian_diffusion(**pick(args, "diffusion")).model_mean_type == prediction


@pytest.mark.parametrize("predict_xstart, prediction", [(True, "eps"), (True, "v"), (False, "xstart")])
def test_both_spellings_of_the_prediction_given_unlike_are_refused(predict_xstart, prediction):
    for job in (TRAINING, SAMPLING):
        assert refusal(parse, job, f"--prediction {prediction} --predict_xstart {predict_xstart}") == (
            f"--predict_xstart {predict_xstart} and --prediction {prediction}: choose one")


def test_prediction_that_is_none_is_refused_with_those_there_are():
    message = refusal(parse, TRAINING, "--prediction score")
    assert "--prediction" in message and all(f"'{name}'" in message for name in PREDICTIONS)


@pytest.mark.parametrize("stored, prediction", [(True, "xstart"), (False, "eps")])
def test_flags_of_a_run_from_before_there_were_other_predictions_say_what_it_predicts(tmp_path, stored, prediction):
    checkpoint.save_flags(tmp_path, {"image_size": 16, "predict_xstart": stored})
    for text in ("", f"--predict_xstart {stored}", f"--prediction {prediction}"):
        args, given = parse(SAMPLING, text)
        apply_stored_flags(args, given, checkpoint.load_flags(tmp_path), "run")
        settle(args, given)
        assert (args.prediction, args.predict_xstart) == (prediction, stored)
    for text in (f"--prediction {'eps' if stored else 'xstart'}", "--prediction v", f"--predict_xstart {not stored}"):
        args, given = parse(SAMPLING, text)
        message = refusal(apply_stored_flags, args, given, checkpoint.load_flags(tmp_path), "run")
        assert f"{text} (there: " in message and "not what the model in run was built with" in message


def test_stored_prediction_of_velocity_is_taken_over_and_no_other_may_be_given(tmp_path):
    stored = stored_flags(parse(TRAINING, "--prediction v")[0])
    args, given = parse(SAMPLING)
    apply_stored_flags(args, given, stored, "run")
    settle(args, given)
    assert args.prediction == "v" and args.predict_xstart is False
    args, given = parse(SAMPLING, "--predict_xstart True")
    assert "--predict_xstart True (there: False)" in refusal(apply_stored_flags, args, given, stored, "run")


# ---- flags without effect ----

@pytest.mark.parametrize("text, words", [
    ("--kl_weight 0 --latent_dim 3", ["--latent_dim 3", "--kl_weight 0"]),
    ("--kl_weight 0 --num_filters 8,16", ["--num_filters 8,16", "--kl_weight 0"]),
    ("--rescale_learned_sigmas True", ["--rescale_learned_sigmas True", "--learn_sigma True"]),
    ("--fp16_scale_growth 0.01", ["--fp16_scale_growth 0.01", "--use_fp16 True"]),
    ("--num_heads 2 --num_head_channels 32", ["--num_heads 2: has no effect with --num_head_channels"]),
])
def test_flag_without_effect_is_refused_and_the_message_says_beside_which(text, words):
    message = refusal(parse, TRAINING, text)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("text", [
    "--kl_weight 0 --latent_dim 6 --num_filters 32,64,128,192", "--rescale_learned_sigmas False",
    "--rescale_learned_sigmas True --learn_sigma True", "--fp16_scale_growth 0.001",
    "--num_heads 2 --num_head_channels -1"])
def test_defaults_written_out_have_no_effect_to_be_refused(text):
    assert parse(TRAINING, text)[1].keys() == {word[2:] for word in text.split() if word.startswith("--")}


# ---- which sampler ----

@pytest.mark.parametrize("text, sampler, respacing", [
    ("", "ancestral", ""),
    ("--timestep_respacing 10,15,20", "ancestral", "10,15,20"),
    ("--sampler heun --timestep_respacing ddim25", "heun", "ddim25"),
    ("--sampler heun", "heun", ""),
    ("--sampling_steps 250", "ancestral", "uniform250"),
    ("--sampler dpm++ --sampling_steps 7", "dpm++", "uniform7"),
    ("--sampler dpm++ --sampling_steps 7 --timestep_spacing logsnr", "dpm++", "logsnr7"),
    ("--timestep_spacing trailing --sampling_steps 1", "ancestral", "trailing1"),
    ("--sampler best", BEST["sampler"], f"{BEST['timestep_spacing']}{BEST['sampling_steps']}"),
    ("--sampler best --sampling_steps 25", BEST["sampler"], f"{BEST['timestep_spacing']}25"),
    ("--use_ddim True", "ddim", ""),
    ("--sampler ddim", "ddim", ""),
    ("--use_ddim True --sampler ddim", "ddim", ""),
    ("--use_ddim True --timestep_respacing ddim25", "ddim", "ddim25"),
    ("--use_ddim True --sampling_steps 25 --ddim_eta 0.5", "ddim", "uniform25"),
    ("--sampler ddim --ddim_eta 0.5", "ddim", ""),
    ("--use_ddim False", "ancestral", ""),
    ("--use_ddim False --sampler heun", "heun", ""),
    ("--use_ddim False --sampler best", BEST["sampler"], f"{BEST['timestep_spacing']}{BEST['sampling_steps']}"),
])
def test_flags_of_the_sampler_settle_the_walk_and_its_steps(text, sampler, respacing):
    args, given = parse(SAMPLING, text)
    assert (args.sampler, args.timestep_respacing) == (sampler, respacing)
    assert given.keys() == {word[2:] for word in text.split()[::2]}
    steps = create_gaussian_diffusion(**pick(args, "diffusion")).num_timesteps
    assert steps == {"": 1000, "10,15,20": 45, "ddim25": 25}.get(respacing) or respacing.endswith(str(steps))


@pytest.mark.parametrize("text, flags", [
    ("--sampler best --timestep_respacing 50", ["sampler", "timestep_respacing"]),
    ("--sampler best --timestep_spacing logsnr", ["sampler", "timestep_spacing"]),
    ("--sampler best --timestep_spacing uniform --sampling_steps 5", ["sampler", "timestep_spacing"]),
    ("--sampling_steps 10 --timestep_respacing 50", ["sampling_steps", "timestep_respacing"]),
    ("--sampler heun --sampling_steps 10 --timestep_respacing 50", ["sampling_steps", "timestep_respacing"]),
    ("--sampler best --sampling_steps 10 --timestep_respacing 50", ["sampling_steps", "timestep_respacing"]),
    ("--use_ddim True --sampler heun", ["sampler", "use_ddim"]),
    ("--use_ddim True --sampler ancestral", ["sampler", "use_ddim"]),
    ("--use_ddim True --sampler best", ["sampler", "use_ddim"]),
    ("--ddim_eta 0.5", ["ddim_eta", "sampler ddim"]),
    ("--sampler dpm++sde --ddim_eta 0", ["ddim_eta", "sampler ddim"]),
    ("--sampler best --ddim_eta 0.5", ["ddim_eta", "sampler ddim"]),
    ("--timestep_spacing logsnr", ["timestep_spacing", "sampling_steps"]),
    ("--timestep_spacing uniform", ["timestep_spacing", "sampling_steps"]),
    ("--sampler heun --timestep_spacing quadratic --timestep_respacing 9", ["timestep_spacing", "sampling_steps"]),
])
def test_contradictions_about_the_sampler_are_refused_by_both_flags(text, flags):
    message = refusal(parse, SAMPLING, text)
    assert all(f"--{flag}" in message for flag in flags)
    known = {"sampler", "use_ddim", "ddim_eta", "sampling_steps", "timestep_spacing", "timestep_respacing"}
    assert {name for name in known if f"--{name}" in message} == {flag.split()[0] for flag in flags}


def test_sampler_spacing_and_steps_outside_their_range_are_refused():
    for flag, words in (("sampler", [*SAMPLERS, "best"]), ("timestep_spacing", SPACINGS)):
        message = refusal(parse, SAMPLING, f"--{flag} fast")
        assert f"--{flag}" in message and all(f"'{word}'" in message for word in words)
    assert "--sampling_steps -1: must be at least 0" in refusal(parse, SAMPLING, "--sampling_steps -1")
    args, _ = parse(SAMPLING, "--sampling_steps 1001")
    assert "1001 of 1000 steps" in refusal(create_gaussian_diffusion, **pick(args, "diffusion"))


def test_every_sampler_and_spacing_can_be_asked_for():
    for sampler in SAMPLERS:
        for spacing in SPACINGS:
            args, _ = parse(SAMPLING, f"--sampler {sampler} --sampling_steps 5 --timestep_spacing {spacing}")
            assert (args.sampler, args.timestep_respacing) == (sampler, f"{spacing}5")


def test_best_is_a_sampler_that_can_be_had_at_a_fiftieth_of_the_calls():
    assert BEST["sampler"] in SAMPLERS and BEST["timestep_spacing"] in SPACINGS
    args, _ = parse(SAMPLING, "--sampler best")
    steps = create_gaussian_diffusion(**pick(args, "diffusion")).num_timesteps
    assert 1 <= network_calls(SAMPLERS[args.sampler], steps) <= 20


def test_best_keeps_to_what_it_stands_for(monkeypatch):
    monkeypatch.setattr("guided_diffusion.methods.process.BEST",
                        {"sampler": "heun", "sampling_steps": 6, "timestep_spacing": "logsnr"})
    args = parse(SAMPLING, "--sampler best")[0]
    assert (args.sampler, args.timestep_respacing) == ("heun", "logsnr6")
    args = parse(SAMPLING, "--sampler best --sampling_steps 3")[0]
    assert (args.sampler, args.timestep_respacing) == ("heun", "logsnr3")


def test_training_and_evaluation_choose_no_sampler():
    assert parse(TRAINING, "--timestep_respacing 50")[0].timestep_respacing == "50"
    for job in (TRAINING, EVALUATION):
        for flag in ("--sampler best", "--sampling_steps 5", "--timestep_spacing uniform"):
            assert f"unknown flag {flag.split()[0]}" in refusal(parse, job, flag)


def test_stored_flags_leave_the_steps_of_the_sampler_alone():
    args, given = parse(SAMPLING, "--sampler dpm++ --sampling_steps 8")
    stored = stored_flags(parse(TRAINING, "--timestep_respacing 50 --diffusion_steps 200")[0])
    apply_stored_flags(args, given, stored, "run")
    assert args.timestep_respacing == "uniform8"
    diffusion = create_gaussian_diffusion(**pick(args, "diffusion"))
    assert (diffusion.num_timesteps, diffusion.original_num_steps) == (8, 200)


def test_sampler_may_be_chosen_without_a_command_line():
    args = SimpleNamespace(sampler="ancestral", sampling_steps=5, timestep_spacing="trailing", timestep_respacing="",
                           use_ddim=True, ddim_eta=0.0)
    settle_sampler(args, {"sampling_steps": 5, "timestep_spacing": "trailing", "use_ddim": True})
    assert (args.sampler, args.timestep_respacing) == ("ddim", "trailing5")


# ---- stored flags ----

def test_stored_flags_fill_in_what_was_not_given():
    args, given = parse(SAMPLING, "--num_ensemble 3 --image_size 16")
    apply_stored_flags(args, given, {"image_size": 16, "num_channels": 32, "learn_sigma": True, "latent_dim": 4}, "run")
    assert (args.image_size, args.num_channels, args.learn_sigma, args.num_ensemble) == (16, 32, True, 3)
    assert not hasattr(args, "latent_dim")


def test_contradiction_of_stored_flags_names_every_flag_and_both_values():
    args, given = parse(SAMPLING, "--image_size 32 --channel_mult 1,1 --num_heads 2")
    message = refusal(apply_stored_flags, args, given, {"image_size": 16, "channel_mult": "1,2", "num_heads": 2}, "run")
    assert "--image_size 32 (there: 16)" in message and "--channel_mult 1,1 (there: 1,2)" in message
    assert "--num_heads" not in message and "run" in message


def test_flags_of_how_a_network_runs_are_stored_but_not_taken_over():
    args, _ = parse(TRAINING, "--use_bf16 True --dropout 0.5 --image_size 16 --latent_dim 4 --seed 3 --batch_size 7")
    stored = stored_flags(args)
    assert {"image_size": 16, "latent_dim": 4, "kl_weight": 0.001, "dropout": 0.5, "seed": 3}.items() <= stored.items()
    assert "local_rank" not in stored
    args, given = parse(SAMPLING, "--use_bf16 False --seed 4")
    apply_stored_flags(args, given, stored, "run")
    assert (args.image_size, args.dropout, args.use_bf16, args.seed, args.batch_size) == (16, 0.0, False, 4, 1)


@pytest.mark.parametrize("name, value", [
    ("image_size", "16"), ("image_size", 16.0), ("image_size", True), ("image_size", None), ("image_size", [16]),
    ("image_size", 10 ** 9), ("kl_weight", float("nan")), ("kl_weight", float("inf")), ("kl_weight", "0.001"),
    ("learn_sigma", 1), ("learn_sigma", "True"), ("channel_mult", 1), ("noise_schedule", "quadratic"),
    ("noise_schedule", ["linear"]), ("num_res_blocks", 0), ("num_res_blocks", -2)])
def test_stored_values_of_a_wrong_type_are_refused_by_name(name, value):
    args, given = parse(TRAINING)
    message = refusal(apply_stored_flags, args, given, {name: value}, "run")
    assert message.startswith(f"run/flags.json: {name} {value!r}: must be")


def test_stored_channel_multiples_of_any_kind_are_refused_by_name():
    for mult in ("nan", "inf,1", "-1,2", "1e300"):
        args, given = parse(SAMPLING)
        apply_stored_flags(args, given, {"channel_mult": mult, "image_size": 16}, "run")
        assert f"--channel_mult {mult}" in refusal(NETWORKS[args.network], args)


# ---- the results folder ----

def test_results_folder_is_the_flag_else_the_environment_else_results(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_LOGDIR", raising=False)
    assert cli.results_folder(SimpleNamespace(results_dir="")) == "./results"
    monkeypatch.setenv("OPENAI_LOGDIR", str(tmp_path / "logs"))
    assert cli.results_folder(SimpleNamespace(results_dir="")) == str(tmp_path / "logs")
    assert cli.results_folder(SimpleNamespace(results_dir=str(tmp_path / "mine"))) == str(tmp_path / "mine")
    assert cli.results_folder(SimpleNamespace(results_dir="gs://bucket/run")) == "gs://bucket/run"
    assert not list(tmp_path.iterdir())


def test_results_folder_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "a" / "b"):
        assert f"--results_dir {path}" in refusal(cli.results_folder, SimpleNamespace(results_dir=str(path)))
