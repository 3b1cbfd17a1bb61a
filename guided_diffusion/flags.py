"""The single table of all flags, their values, and those that a run has stored."""

import sys
from typing import Any, NamedTuple

from .respace import SPACINGS
from .samplers import SAMPLERS
from .system.errors import InputError


class Flag(NamedTuple):
    name: str
    type: Any  # int, float, str, bool, or a tuple of the words allowed
    default: Any
    help: str
    group: str
    least: Any = None  # the smallest value allowed
    most: Any = sys.maxsize  # the largest; below that of 64 bits where larger ones would end in want of memory


def number_or_auto(text):
    return text if text == "auto" else int(text)


FLAGS = [
    Flag("image_size", int, 64, "side of images and masks in pixels; the U-Net halves it once a level", "model",
         most=8192),
    Flag("image_channels", int, 4, "channels of the scan; a single-channel image is repeated (published: 4)",
         "model", least=1, most=1024),
    Flag("num_channels", int, 128, "channels at full resolution, a multiple of 32; the cost grows with its square",
         "model", most=16384),
    Flag("num_res_blocks", int, 2, "residual blocks a level", "model", least=1, most=1024),
    Flag("channel_mult", str, "", "channels of each level as multiples of num_channels, as in 1,2,3,4; sizes 64, 128,"
         " 256 and 512 have a default", "model"),
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
    Flag("use_fp16", bool, False, "half precision with loss scaling, CUDA only", "model"),
    Flag("use_bf16", bool, False, "bfloat16, CUDA or CPU; needs no loss scaling", "model"),

    Flag("input_channels_dist", int, 1, "image channels that AMN and ACN see (the first ones)", "encoders", least=1),
    Flag("num_filters", str, "32,64,128,192", "filters of each block of AMN and ACN", "encoders"),
    Flag("no_convs_per_block", int, 3, "convolutions a block of AMN and ACN", "encoders", least=1, most=1024),
    Flag("latent_dim", int, 6, "dimensions of their latent Gaussian", "encoders", least=1, most=65536),
    Flag("kl_weight", float, 0.001, "weight of KL(AMN || ACN) in the loss; 0 trains the plain diffusion ensemble,"
         " without AMN and ACN", "encoders", least=0),

    Flag("learn_sigma", bool, False, "learn the variance of each denoising step, too", "diffusion"),
    Flag("diffusion_steps", int, 1000, "timesteps of the diffusion process", "diffusion", least=1, most=10 ** 6),
    Flag("noise_schedule", ("linear", "cosine"), "linear", "how noise grows with the timestep", "diffusion"),
    Flag("timestep_respacing", str, "", 'use fewer timesteps: "250" evenly, "10,15,20" a third each, "ddim25" at a'
         ' whole stride, "trailing10", "quadratic10", "logsnr10" as --timestep_spacing; "" uses all', "diffusion"),
    Flag("use_kl", bool, False, "train on the variational bound instead of the squared error", "diffusion"),
    Flag("predict_xstart", bool, False, "predict the mask instead of the noise", "diffusion"),
    Flag("rescale_timesteps", bool, False, "hand the U-Net timesteps scaled to 0..1000", "diffusion"),
    Flag("rescale_learned_sigmas", bool, False, "scale the variance's loss by diffusion_steps / 1000", "diffusion"),

    Flag("data_dir", str, "./data/training", "folder with one folder a case: image_<n>.jpg, label0_.jpg, ...",
         "training"),
    Flag("schedule_sampler", ("uniform", "loss-second-moment"), "uniform", "which timesteps training draws: all alike,"
         " or more of those with a large loss", "training"),
    Flag("lr", float, 1e-4, "learning rate of AdamW", "training", least=0),
    Flag("weight_decay", float, 0.0, "weight decay of AdamW", "training", least=0),
    Flag("lr_anneal_steps", int, 0, "bring the learning rate linearly to 0 over so many steps, then stop (0: constant)",
         "training", least=0),
    Flag("max_steps", int, 0, "stop after so many steps (0: go on until stopped with Ctrl-C)", "training", least=0),
    Flag("batch_size", int, 1, "examples per process and step", "training", least=1, most=10 ** 6),
    Flag("microbatch", int, -1, "split each batch into parts of this size to save memory; the result is the same"
         " (-1: do not)", "training"),
    Flag("ema_rate", str, "0.9999", "rates of the moving averages of the weights, separated by commas", "training"),
    Flag("log_interval", int, 100, "steps between lines of the log", "training", least=1),
    Flag("save_interval", int, 5000, "steps between checkpoints", "training", least=1),
    Flag("sample_interval", int, 1000, "steps between drawings of a few validation cases, to look at in panel.png and"
         " on Visdom (0: never)", "training", least=0),
    Flag("val_dir", str, "", "folder of cases as in data_dir that training does not see: those drawn every"
         " sample_interval steps are of it, and are scored (default: cases of data_dir, not scored)", "training"),
    Flag("val_cases", int, 16, "cases of val_dir to draw 16 masks for and score, spread evenly over all; each takes 112"
         " network calls, so that few cases or a long sample_interval suit small batches", "training", least=1),
    Flag("keep_checkpoints", int, 0, "checkpoints to leave in the results folder, the newest ones (0: all)", "training",
         least=0),
    Flag("save_patience", int, 3, "go on training while nothing can be saved, for so many save intervals", "training",
         least=1),
    Flag("resume_checkpoint", str, "", 'go on from this savedmodel<step>.pt ("" or auto: from the newest whole one in'
         ' the results folder, if there is one)', "training"),
    Flag("deterministic", bool, False, "the same to the last bit each time, on CUDA too, which is slower there",
         "training"),
    Flag("grad_clip", float, 0.0, "the largest norm of the gradient; a longer one is shortened to it (0: any)",
         "training", least=0),
    Flag("max_bad_steps", int, 50, "steps whose gradient is not finite are skipped; give up after so many in a row",
         "training", least=1),
    Flag("fp16_scale_growth", float, 1e-3, "growth of the loss scale a step with --use_fp16, as a power of 2",
         "training", most=16),

    Flag("data_dir", str, "./data/testing", "folder with one folder a case: image_<n>.jpg, and labels if there are any",
         "sampling"),
    Flag("model_path", str, "", 'weights to sample from: savedmodel*.pt or emasavedmodel*.pt ("": the newest in the'
         ' results folder)', "sampling"),
    Flag("num_ensemble", int, 5, "masks to draw for each case", "sampling", least=1, most=10 ** 6),
    Flag("num_samples", int, 0, "sample the first so many cases (0: all)", "sampling", least=0),
    Flag("batch_size", number_or_auto, 1, "masks drawn at once, across cases and members (auto: as many as pay and"
         " fit)", "sampling", least=1, most=10 ** 6),
    Flag("clip_denoised", bool, True, "clip the predicted mask to its range at every step", "sampling"),
    Flag("sampler", (*SAMPLERS, "best"), "ancestral", "how to walk from noise to a mask: ancestral, as published; ddim;"
         " dpm++ and heun, of second order; dpm++sde, dpm++ with noise; best, the fewest calls that lose nothing",
         "sampling"),
    Flag("sampling_steps", int, 0, "steps of the sampler (0: those of timestep_respacing, every one by default)",
         "sampling", least=0),
    Flag("timestep_spacing", SPACINGS, "uniform", "where sampling_steps puts them: evenly down to 0; evenly, the last"
         " call a whole step before 0; evenly in the square root of t; evenly in the log-SNR where masks are decided",
         "sampling"),
    Flag("use_ddim", bool, False, "the published spelling of --sampler ddim", "sampling"),
    Flag("ddim_eta", float, 0.0, "noise of DDIM: 0 deterministic, 1 as much as ancestral steps", "sampling",
         least=0, most=1),
    Flag("median_blur", int, 0, "smooth each mask with a median filter of this odd side (0: do not)",
         "sampling", least=0, most=8191),
    Flag("evaluate", bool, False, "score the masks against the raters' and write the scores rather than the masks",
         "sampling"),

    Flag("data_dir", str, "./data/testing", "folder with one folder a case: image_<n>.jpg, label0_.jpg, ...",
         "evaluation"),
    Flag("samples_dir", str, "./results", "folder with the masks to score, of this model or any other", "evaluation"),
    Flag("pattern", str, "{case}_output{i}.png", "where in samples_dir the masks of a case are: {case} is the name of"
         " its folder, {i} counts its masks, as in {case}/mask_{i}.png", "evaluation"),
    Flag("num_samples", str, "4,16,50,100", "also score ensembles of these sizes, made of the masks in their order",
         "evaluation"),
    Flag("skip_missing", bool, False, "score the cases that have masks only, rather than refuse", "evaluation"),
    Flag("patient_pattern", str, r"\D*\d+", "regular expression for the patient in the name of a case; intervals"
         " resample patients. By default all up to the end of the first number", "evaluation"),
    Flag("output_dir", str, "", "folder for scores.csv, .json, .png, best.png and worst.png (default: samples_dir)",
         "evaluation"),

    Flag("compile", bool, False, "let torch.compile fuse the U-Net's operations; meant for CUDA, as the convolutions"
         " of a CPU gain nothing. Goes on without where no compiler works", "speed"),

    Flag("fit", ("error", "resize", "crop"), "error", "what to do with images of another size than image_size, or than"
         " the masks to score", "files and processes"),
    Flag("seed", int, 0, "seed of everything random", "files and processes", least=0),
    Flag("ngpu", int, 0, "start so many processes on this machine, one a GPU (0: as the launcher did)",
         "files and processes", least=0, most=1024),
    Flag("dist_timeout", float, 600.0, "seconds after which a process that died or hangs ends the others",
         "files and processes", least=1, most=10 ** 8),
    Flag("local_rank", int, None, "set by old launchers", "files and processes"),

    Flag("results_dir", str, "", "folder for everything written; checkpoints may go to gs:// or az:// (default:"
         " $OPENAI_LOGDIR, else ./results)", "results"),
    Flag("results_dir", str, "", "results folder with the visdom.log to show (default: $OPENAI_LOGDIR, else ./results)",
         "replay"),

    Flag("visdom", ("connect", "start"), "connect", "send it to the Visdom server on this machine, or start one, which"
         " stays when this has ended", "replay"),

    Flag("visdom", ("off", "connect", "start"), "off", "show the run on the Visdom server on this machine, or start"
         " one, which stays when the run has ended; a port or server that is given asks to connect", "visdom"),
    Flag("visdom_env", str, "", "name of the run on Visdom's page (default: that of the results folder)", "visdom"),
    Flag("visdom_port", int, 8097, "port of the Visdom server (0: show nothing)", "server", least=0, most=65535),
    Flag("visdom_server", str, "", "send the view, scans and masks included, to another machine's Visdom server, as in"
         " https://host:port/path; VISDOM_USERNAME and VISDOM_PASSWORD log in (default: send nothing elsewhere)",
         "server"),
]

# These change how the network is run or trained, not what it is; they may differ from the stored ones.
_FREE = {"dropout", "use_checkpoint", "use_fp16", "use_bf16", "timestep_respacing"}
# What of a run's stored flags the readers of its checkpoints go by.
STORED = [flag for flag in FLAGS if flag.group in ("model", "diffusion", "encoders") and flag.name not in _FREE]


def defaults(*groups):
    """Defaults of the flags of these groups, as a dict."""
    return {flag.name: flag.default for flag in FLAGS if flag.group in groups}


def pick(args, *groups):
    """The flags of these groups out of a namespace, as a dict for the functions above."""
    return {name: getattr(args, name) for name in defaults(*groups)}


def parse_numbers(kind, text, flag):
    """"1,2,3" -> [1, 2, 3] of type `kind`; [] for an empty text; InputError naming the flag for anything else."""
    try:
        return [kind(part) for part in str(text).split(",")] if text else []
    except ValueError:
        raise InputError(f"--{flag} {text}: is not a list of numbers separated by commas") from None


# ---- stored flags ----

def stored_flags(args):
    """What flags.json holds of a run: all its flags but the rank, which is each process's own."""
    return {name: value for name, value in vars(args).items() if name != "local_rank"}


def check_value(flag, value, name):
    """InputError, calling the flag `name`, unless this is a value of its type and within its limits."""
    kinds = {float: (int, float), number_or_auto: (int, str)}.get(flag.type, (flag.type,))
    if isinstance(flag.type, tuple):
        if value not in flag.type:
            raise InputError(f"{name} {value!r}: must be one of {', '.join(flag.type)}")
    elif type(value) not in kinds:
        raise InputError(f"{name} {value!r}: must be of the type {kinds[-1].__name__}")
    if type(value) in (int, float):
        if flag.least is not None and not value >= flag.least:
            raise InputError(f"{name} {value}: must be at least {flag.least}")
        if not abs(value) <= flag.most:  # nor is nan
            raise InputError(f"{name} {value}: must be a number of at most {flag.most}")


def apply_stored_flags(args, given, stored, where):
    """Set those of args that the user did not give to what the run in the results folder `where` was started with.

    :param stored: all its flags, of which those of the model, the encoders and the process are taken.
    :raises InputError: if a flag was given, and otherwise than stored, or if what is stored is not a flag's value.
    """
    check_stored_flags(stored, where)
    clash = differing(given, stored)
    if clash:
        raise InputError(f"{', '.join(clash)}: not what the model in {where} was built with; leave the flag(s) away,"
                         f" or use another folder")
    for flag in STORED:
        if flag.name in stored and hasattr(args, flag.name):
            setattr(args, flag.name, stored[flag.name])


def check_stored_flags(stored, where):
    """Raise InputError unless what is stored in the results folder `where` are values that its flags can have."""
    for flag in STORED:
        if flag.name in stored:
            check_value(flag, stored[flag.name], f"{where}/flags.json: {flag.name}")


def differing(given, stored, *others):
    """Those of STORED, and of the other names, that were given otherwise than stored, as strings for a message."""
    return [f"--{name} {given[name]} (there: {stored[name]})" for name in (*(flag.name for flag in STORED), *others)
            if name in given and name in stored and given[name] != stored[name]]
