"""The single table of all flags, their values, and those that a run has stored.

Flags of an entry of a table (a method, a network, a sampler, ...) are declared in the entry's own file and join here.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

from . import pretrained
from .data.augment import AUGMENTATIONS
from .data.fitting import FITS
from .data.intensities import WORDS
from .data.readers import READERS
from .data.windows import WINDOWS
from .gaussian_diffusion import SCHEDULES
from .learning_rate import SCALINGS
from .methods import METHODS
from .metrics import PATIENT_PATTERN, SCORES
from .networks import NETWORKS
from .predictions import PREDICTIONS
from .presets import PRESETS
from .samplers import SAMPLERS
from .system.errors import InputError
from .system.flag import Flag, check_value, number_or_auto
from .system.registry import load_plugin

TABLES = (METHODS, NETWORKS, PREDICTIONS, SCHEDULES, SAMPLERS, READERS, SCORES)

_COMMON = [
    Flag("method", METHODS, "cimd", "what is trained and drawn from", "model"),
    Flag("network", NETWORKS, "unet", "the network of the method", "model"),
    Flag("image_size", int, 64, "side of images and masks in pixels; the U-Net halves it once a level", "model",
         most=8192),
    Flag("image_channels", number_or_auto, 4, "channels of the scan; a single-channel image is repeated (published: 4;"
         " auto, when training: as many as the data have)", "model", least=1, most=1024),
    Flag("normalise", str, "full", f"the numbers of a scan that are black and white. {WORDS}", "model"),
    Flag("normalise", str, "full", "as for training, for the pictures beside the scores", "evaluation"),
    Flag("context", int, 0, "so many slices before and after that of a volume are further channels of the scan",
         "model", least=0, most=64),
    Flag("use_fp16", bool, False, "half precision with loss scaling, CUDA only", "model"),
    Flag("use_bf16", bool, False, "bfloat16, CUDA or CPU; needs no loss scaling", "model"),

    Flag("preset", PRESETS, "", "a set of flags; of those, the ones of training may be given otherwise", "training"),
    Flag("data_dir", str, "./data/training", "folder with one folder a case: image_<n>.jpg, label0_.jpg, ...",
         "training"),
    Flag("optimizer", ("adamw", "muon"), "adamw", "muon takes steps of orthogonal matrices for the weights of layers,"
         " and AdamW's for the rest: fewer steps to the same loss", "training"),
    Flag("lr", float, 1e-4, "learning rate", "training", least=0),
    Flag("weight_decay", float, 0.0, "weight decay", "training", least=0),
    Flag("lr_anneal_steps", int, 0, "bring the learning rate linearly to 0 over so many steps, then stop (0: constant)",
         "training", least=0),
    Flag("lr_warmup", int, 0, "bring the learning rate linearly from 0 to lr over the first so many steps (0: do not)",
         "training", least=0),
    Flag("max_steps", int, 0, "stop after so many steps (0: go on until stopped with Ctrl-C)", "training", least=0),
    Flag("lr_scaling", tuple(SCALINGS), "none", "how the learning rate grows with the examples of a step, which are so"
         f" many times lr_base_batch. {'; '.join(f'{name}: {rule.help}' for name, rule in SCALINGS.items())}",
         "training"),
    Flag("lr_base_batch", int, 0, "the examples a step, over all processes, that lr is meant for; with lr_scaling",
         "training", least=0, most=10 ** 9),
    Flag("batch_size", int, 1, "examples that a process sees at once", "training", least=1, most=10 ** 6),
    Flag("grad_accumulation", int, 1, "batches of batch_size that each process sees a step", "training", least=1,
         most=10 ** 6),
    Flag("global_batch", int, 0, "examples a step over all processes, however many there are: they share them as evenly"
         " as they can, in batches of batch_size (0: batch_size x grad_accumulation x processes)", "training", least=0,
         most=10 ** 9),
    Flag("wire_dtype", ("float32", "bfloat16"), "float32", "numbers in which processes send each other their gradients;"
         " bfloat16 halves what is sent, and rounds the gradients to 8 bits", "training"),
    Flag("shard", bool, False, "share out weights, gradients, moments of the optimiser and averages among the"
         " processes, each of which then holds a part (FSDP2), for models beyond one GPU. Checkpoints are the same. Not"
         " for --optimizer muon, whose steps need whole matrices, nor for --compile True", "training"),
    Flag("augment", str, "", "change training examples at random, at every visit anew: any of these names, separated by"
         f" commas. {AUGMENTATIONS.words()}", "training"),
    Flag("window", tuple(WINDOWS), "uniform", "with --fit tile, where the window of image_size lies that a scan is seen"
         f" through, at every visit anew. {'; '.join(f'{name}: {words}' for name, words in WINDOWS.items())}",
         "training"),
    Flag("microbatch", int, -1, "split each batch into parts of this size to save memory; the result is the same"
         " (-1: do not)", "training"),
    Flag("ema_rate", str, "0.9999", "rates of the moving averages of the weights, separated by commas", "training"),
    Flag("log_interval", int, 100, "steps between lines of the log", "training", least=1),
    Flag("save_interval", int, 5000, "steps between checkpoints", "training", least=1),
    Flag("sample_interval", int, 1000, "steps between drawings of a few validation cases, to look at in panel.png and"
         " on Visdom (0: never)", "training", least=0),
    Flag("val_dir", str, "", "folder of cases as in data_dir that training does not see: those drawn every"
         " sample_interval steps are of it, and are scored (default: cases of data_dir, not scored)", "training"),
    Flag("val_cases", int, 200, "cases of val_dir to draw 16 masks for and score, spread evenly over all; fewer make"
         " the choice of savedmodel_best.pt less certain. CIMD takes 112 network calls a case, so that a long"
         " sample_interval suits small batches", "training", least=1),
    Flag("keep_checkpoints", int, 0, "checkpoints to leave in the results folder, the newest ones (0: all)", "training",
         least=0),
    Flag("save_patience", int, 3, "go on training while nothing can be saved, for so many save intervals", "training",
         least=1),
    Flag("resume_checkpoint", str, "", 'go on from this savedmodel<step>.pt ("" or auto: from the newest whole one in'
         ' the results folder, if there is one)', "training"),
    Flag("init", str, "", "start from these weights of the same network, such as savedmodel.pt of a run on other data,"
         " a .safetensors file, or pretrained:NAME; flags of the model that are not given are taken from it, or from"
         " flags.json beside it. The same command again goes on with the run and does not start over", "training"),
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
    Flag("model_path", str, "", "weights to sample from: savedmodel*.pt, emasavedmodel*.pt, *.safetensors, or those"
         f" that come with the package: {', '.join(f'{pretrained.PREFIX}{name}' for name in pretrained.names())}"
         ' ("": the newest in the results folder)', "sampling"),
    Flag("num_ensemble", int, 5, "masks to draw for each case", "sampling", least=1, most=10 ** 6),
    Flag("num_samples", int, 0, "sample the first so many cases (0: all)", "sampling", least=0),
    Flag("batch_size", number_or_auto, 1, "masks drawn at once, across cases and members (auto: as many as pay and"
         " fit)", "sampling", least=1, most=10 ** 6),
    Flag("median_blur", int, 0, "smooth each mask with a median filter of this odd side (0: do not)",
         "sampling", least=0, most=8191),
    Flag("evaluate", bool, False, "score the masks against the raters' and write the scores rather than the masks",
         "sampling"),

    Flag("data_dir", str, "./data/testing", "folder with one folder a case: image_<n>.jpg, label0_.jpg, ...",
         "evaluation"),
    Flag("samples_dir", str, "./results", "folder with the masks to score, of this model or any other", "evaluation"),
    Flag("pattern", str, "{case}_output{i}.png", "where in samples_dir the masks of a case are: {case} is the name of"
         " its folder, {i} counts its masks, as in {case}/mask_{i}.png", "evaluation"),
    Flag("skip_missing", bool, False, "score the cases that have masks only, rather than refuse", "evaluation"),
    Flag("output_dir", str, "", "folder for scores.csv, .json, .png, best.png and worst.png (default: samples_dir)",
         "evaluation"),

    Flag("dtype", ("float16", "bfloat16", "float32"), "float16", "of the weights in the file", "export"),
    Flag("facts", str, "", 'what else the file says of itself, as in "data=LIDC-IDRI; licence=MIT"', "export"),
    Flag("calibrate", str, "", "folder of cases that training did not see: bring the probabilities of the model in line"
         " with them, for --method energy", "export"),
    Flag("fit", ("error", "resize", "crop"), "error", "what to do with images of --calibrate of another size than"
         " image_size", "export"),
    Flag("plugin", str, "", "Python file with the method or network, see docs/extending.md", "export"),

    Flag("ensemble_sizes", str, "4,16,50,100", "also score ensembles of these sizes, made of the masks in their order",
         "scoring"),
    Flag("patient_pattern", str, PATIENT_PATTERN, "regular expression for the patient in the name of a case; intervals"
         " resample patients. By default they are those of manifest.csv, else all up to the end of the first number",
         "scoring"),
    Flag("volumes", bool, False, "also score whole volumes, member i of a slice on member i of the next; NIfTI, DICOM"
         " and manifest.csv say which cases are slices of one volume", "scoring"),

    Flag("cache_dir", str, "", "folder on a disk of each machine's own for the decoded cases of data sets above 4 GiB,"
         " which each machine writes once and later runs find again (default: the data set's folder, for all)",
         "decoding"),

    Flag("foreground", str, "", "values of label maps that are foreground, as in 1,2,4 (default: of pictures what is"
         " above half of full scale; of NIfTI, DICOM and .npy what is above 0)", "reading"),

    Flag("compile", bool, False, "let torch.compile fuse the U-Net's operations; meant for CUDA, as the convolutions"
         " of a CPU gain nothing. Goes on without where no compiler works", "speed"),

    Flag("plugin", str, "", "Python file, or several with commas, with methods, networks, predictions, samplers,"
         " readers or scores of your own, see docs/extending.md; each command that needs them needs it named",
         "files and processes"),
    Flag("fit", tuple(FITS), "error", "what to do with scans of another size than image_size, or than the masks to"
         f" score. {'; '.join(f'{name}: {words}' for name, words in FITS.items())}", "files and processes"),
    Flag("seed", int, 0, "seed of everything random", "files and processes", least=0),
    Flag("ngpu", int, 0, "start so many processes on this machine, one a GPU (0: as the launcher did)",
         "files and processes", least=0, most=1024),
    Flag("dist_timeout", float, 600.0,
         "seconds after which a process that hangs ends the others or, when sampling, leaves its cases"
         " to them; and after which a folder whose run shows no sign of life is taken over",
         "files and processes", least=1, most=10 ** 8),
    Flag("local_rank", int, None, "set by old launchers", "files and processes"),

    Flag("results_dir", str, "", "folder for everything written; checkpoints may go to s3://, gs:// or az://"
         " (default: $OPENAI_LOGDIR, else ./results)", "results"),
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


class _Flags:
    """All flags, those of entries that a plugin has just brought, too."""

    def __iter__(self) -> Iterator[Flag]:
        yield from _COMMON
        common, owned = {flag.name for flag in _COMMON}, {}
        for table in TABLES:
            for flag in table.flags():
                file = table.entries[table.owners(flag.name)[0]].file
                if flag.name in common:
                    raise InputError(f"--{flag.name}: is declared in {file}, but is another flag already; rename it"
                                     f" there")
                known, other = owned.setdefault(flag.name, (flag, file))
                if known != flag:
                    raise InputError(f"--{flag.name}: is a flag in {other}, and another one in {file}; rename one")
        yield from (flag for flag, _ in owned.values())


FLAGS = _Flags()

# the groups of flags that say what a model is
_IDENTITY = ("model", "diffusion", "encoders", "method")
# These change how the network is run or trained, not what it is; they may differ from the stored ones.
_FREE = {"dropout", "use_checkpoint", "use_fp16", "use_bf16", "timestep_respacing"}


def identity_flags() -> list[Flag]:
    """What of a run's stored flags the readers of its checkpoints go by."""
    return [flag for flag in FLAGS if flag.group in _IDENTITY and flag.name not in _FREE]


def defaults(*groups: str) -> dict[str, Any]:
    """Defaults of the flags of these groups."""
    return {flag.name: flag.default for flag in FLAGS if flag.group in groups}


def default(group: str, name: str) -> Any:
    """The default of one flag of a group."""
    return defaults(group)[name]


def load_plugins(paths: str) -> None:
    """Run the files that --plugin names. :raises InputError: see load_plugin."""
    for path in filter(None, paths.split(",")):
        load_plugin(path)


def settle(args: SimpleNamespace, given: dict[str, Any]) -> None:
    """Bring the flags of the chosen entries into agreement, in place.

    :param given: those that the user gave, by name.
    :raises InputError: for flags that have no effect, or are of an entry that is not chosen, and as
        Method.settle_flags.
    """
    METHODS[args.method].settle_flags(args, given)
    values = {flag.name: flag.default for table in TABLES for flag in table.flags()}
    for name, why in idle_flags(args).items():
        if given.get(name, values[name]) != values[name]:
            raise InputError(f"--{name} {given[name]}: has no effect {why}; leave it away")
    for table in TABLES:
        chosen = getattr(args, table.flag, None)
        for name in given:
            owners = table.owners(name) if name in values and given[name] != values[name] else []
            if chosen is not None and owners and chosen not in owners:
                raise InputError(f"--{name} {given[name]}: is a flag of --{table.flag} {' and '.join(owners)}, but"
                                 f" --{table.flag} is {chosen}; leave it away, or choose another --{table.flag}")


def idle_flags(args: SimpleNamespace) -> dict[str, str]:
    """The flags of the chosen method and network that have no effect beside the others, each with the reason."""
    network = getattr(NETWORKS[args.network], "idle_flags", lambda _: {})
    return {**METHODS[args.method].idle_flags(args), **network(args)}


# ---- stored flags ----

def stored_flags(args: SimpleNamespace) -> dict[str, Any]:
    """What flags.json holds of a run: all its flags but the rank, which is each process's own."""
    return {name: value for name, value in vars(args).items() if name != "local_rank"}


def apply_stored_flags(args: SimpleNamespace, given: dict[str, Any], stored: dict[str, Any], where: str) -> None:
    """Set those of args that the user did not give to what a stored model was built with.

    :param stored: all its flags, of which those that say what the model is are taken.
    :param where: the results folder, or the safetensors file, that they are from.
    :raises InputError: if a flag was given, and otherwise than stored, or if what is stored is not a flag's value.
    """
    check_stored_flags(stored, where)
    clash = differing(given, stored)
    if clash:
        raise InputError(f"{', '.join(clash)}: not what the model in {where} was built with; leave the flag(s) away,"
                         f" or use another folder")
    fill_flags(args, {}, stored)


def fill_flags(args: SimpleNamespace, given: dict[str, Any], stored: dict[str, Any]) -> None:
    """Set those of args that say what the model is, and that the user did not give, to what is stored."""
    for flag in identity_flags():
        if flag.name in stored and flag.name not in given and hasattr(args, flag.name):
            setattr(args, flag.name, stored[flag.name])


def check_stored_flags(stored: dict[str, Any], where: str) -> None:
    """Raise InputError unless what is stored in a results folder or safetensors file are values that flags can have."""
    file = where if where.endswith(".safetensors") else f"{where}/flags.json"
    for flag in identity_flags():
        if flag.name in stored:
            if stored[flag.name] == "auto":
                raise InputError(f"{file}: {flag.name} 'auto': must be a number")
            check_value(flag, stored[flag.name], f"{file}: {flag.name}")


def differing(given: dict[str, Any], stored: dict[str, Any], *others: str) -> list[str]:
    """Those of identity_flags, and of the other names, that were given otherwise than stored, for a message."""
    return [f"--{name} {given[name]} (there: {stored[name]})"
            for name in (*(flag.name for flag in identity_flags()), *others)
            if name in given and name in stored and given[name] != stored[name]]
