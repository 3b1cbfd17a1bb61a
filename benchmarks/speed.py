"""How fast this machine trains, samples and loads, beside the published way of doing the same: the speed ruler.

    python benchmarks/speed.py               # everything, on CUDA if there is one; --parts unet,loader for some of it

ceilings: what the machine can do at most; unet: one pass of the published U-Net, each improvement apart, then
together; profile: which operations the time of a pass goes to; training: one step; ensemble: masks of a phantom, the
published way against --sampler best; one_pass: 16 masks by --preset energy against one pass of the published U-Net;
memory: the peak of sampling 16 masks at once; loader: examples as the training loop gets them against decoding their
files at every visit. Variants alternate, so that other work on the machine weighs on all of them. Times are medians
over --rounds; a ratio is the median of the rounds' own ratios to the first variant, above 1 if better. unet and
training measure the ceilings (products, and 3x3 convolutions with channels last) in their rounds, too, for their
shares. With --scaling instead: efficiency on paper, a training step on 1 and 2 processes, and what 1, 2 and 4 ask of a
file system at their start, see scaling.py; written to scaling.md and scaling.json. On a CPU that is a U-Net of 32
channels at 64 x 64, a thread a process, unless told otherwise. Weights are random. Written to
--output_dir: speed.md, speed.json (all rounds), speed.png (the ratios).
"""

import argparse
import copy
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import scaling
import torch
from matplotlib.figure import Figure
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from guided_diffusion import samplers, script_util
from guided_diffusion.commands.cli import parse_flags
from guided_diffusion.commands.cli import run_script as run_main
from guided_diffusion.data import phantoms, stream
from guided_diffusion.data.case_files import read_case
from guided_diffusion.data.cases import Case, SegmentationCases
from guided_diffusion.draw import plots
from guided_diffusion.methods.cimd import CIMD
from guided_diffusion.nn import compile_network
from guided_diffusion.sampling.ensembles import EnsembleSampler, largest_batch
from guided_diffusion.scoring import evaluation
from guided_diffusion.system import storage
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.settings import Settings

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
NCHW, NHWC = torch.contiguous_format, torch.channels_last
SECONDS = 0.2  # shorter calls are repeated for about so long a round
STEPS, MEASURED = 1000, 20  # of a published mask, and how many of them are run
ENSEMBLES = (4, 16)


def main():
    args = parse_args()
    torch.set_num_threads(args.threads)
    if args.only_memory:
        return print(json.dumps(peak_of_sampling(args)))
    if args.only_steps:
        return scaling.timed_steps(args)
    storage.make_folder(args.output_dir, "--output_dir")
    text, parts, known = machine(args), {}, SCALING if args.scaling else PARTS
    name = "scaling" if args.scaling else "speed"
    print(text)
    for part in known if args.scaling else args.parts:
        title, parts[part], remark = known[part](args)
        names = [name for name in parts[part][0] if name != "rounds"]
        table = evaluation.markdown([["", *names[1:]], *([cell(row[name]) for name in names] for row in parts[part])])
        print(f"\n## {title}\n\n{table}\n\n{remark}", flush=True)
        text += f"\n\n## {title}\n\n{table}\n\n{remark}"
        data = json.dumps({"machine": machine(args), "flags": vars(args), "parts": parts}, indent=1).encode()
        files = {f"{name}.md": f"{text}\n".encode(), f"{name}.json": data}
        if not args.scaling:
            files["speed.png"] = draw(parts)
        for file, content in files.items():
            storage.write_bytes(Path(args.output_dir, file), content)
    print(f"\nwritten to {args.output_dir}: {', '.join(files)}")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="any of them, with commas (default %(default)s)")
    for name, default, text in (
            ("rounds", 3, "measurements of each variant"), ("threads", torch.get_num_threads(), "CPU threads"),
            ("image_size", 128, "side in pixels"), ("num_channels", 128, "channels of the U-Net at full resolution"),
            ("batch_size", 16 if CUDA else 4, "images of a batched U-Net pass; on CUDA more than on a CPU"),
            ("train_batch_size", 20 if CUDA else 4, "images of a training step; likewise")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default %(default)s)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=CUDA,
                        help="also measure torch.compile, in the unet part (default: on CUDA only)")
    parser.add_argument("--scaling", action="store_true", help="measure how training scales, and nothing else")
    parser.add_argument("--only-steps", choices=scaling.WIRES, help="as one process of --scaling, print its step")
    parser.add_argument("--output_dir", default="results/speed", help="default %(default)s")
    parser.add_argument("--only-memory", choices=DTYPES, help="print bytes before and at the peak of 16 masks, no more")
    args = parser.parse_args()
    if args.scaling and not CUDA:
        parser.set_defaults(**scaling.ON_CPU)
        args = parser.parse_args()
    args.parts = args.parts.split(",")
    if not PARTS.keys() >= set(args.parts) or min(n for n in vars(args).values() if type(n) is int) < 1:
        parser.error(f"--parts are of {','.join(PARTS)}; all numbers must be at least 1")
    return args


def machine(args):
    name = torch.cuda.get_device_name() if CUDA else torch.backends.cpu.get_cpu_capability() + " CPU"
    if not CUDA and (info := Path("/proc/cpuinfo")).exists():
        name = re.search(r"(model name\s*: |$)(.*)", info.read_text())[2] or name
    tf32 = (f"; TF32 in float32 convolutions: {torch.backends.cudnn.allow_tf32}, products:"
            f" {torch.backends.cuda.matmul.allow_tf32}" if CUDA else "")
    return (f"{name}, torch {torch.__version__}, {args.threads} CPU threads{tf32}; images of {args.image_size} x"
            f" {args.image_size}, {args.num_channels} channels; median of {args.rounds} round(s)")


def timed(call, repeats=1):
    """Seconds of one call, with all that it starts on the device."""
    wait = torch.cuda.synchronize if CUDA else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - start) / repeats


def race(args, variants, warm_up=True):
    """{name: seconds a unit in each round} of {name: (call, its units)}, which take turns once all are warm."""
    seconds, repeats = {name: [] for name in variants}, dict.fromkeys(variants, 1)
    turns = [(i, name) for i in range(1 - warm_up, args.rounds + 1) for name in variants]
    for i, name in (bar := tqdm(turns, leave=False)):
        bar.set_description(name if i else f"warming up {name}")
        call, units = variants[name]
        if i:
            seconds[name].append(timed(call, repeats[name]) / units)
        elif timed(call) < SECONDS or CUDA:  # the first call also chooses algorithms
            repeats[name] = 1 + int(SECONDS / timed(call))
    return seconds


def ratio(base, values):
    return median(b / v for b, v in zip(base, values))


def as_rows(rounds, columns):
    """Rows of a table from {name: a value a round}; columns: {title: function of name and values}."""
    return [{"variant": name, **{title: column(name, own) for title, column in columns.items()},
             "ratio": ratio(next(iter(rounds.values())), own), "rounds": own} for name, own in rounds.items()]


def cell(value):
    return value if isinstance(value, str) else f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def race_ceilings(args, variants, count):
    """FLOP of an image, counted in a call, and rows; variants with bf16 in their name meet the bf16 ceilings."""
    with FlopCounterMode(display=False) as counter:
        count()
    flop, seconds = counter.get_total_flops(), race(args, {**ceilings(args), **variants})
    columns = {"ms an image": lambda _, own: 1e3 * median(own), "TFLOP/s": lambda _, own: 1e-12 * flop / median(own)}
    for kind in ("convolution", "product"):
        columns[f"% of {kind}"] = lambda name, own, kind=kind: 100 * flop * ratio(
            seconds[f"{kind}, {'bf16' if 'bf16' in name else 'float32'}"], own)
    return flop, as_rows({name: seconds[name] for name in variants}, columns)


def ceilings(args):
    """Variants whose unit is a FLOP."""
    width, size, variants = args.num_channels, args.image_size, {}
    side, batch = width * (64 if CUDA else 16), 16 if CUDA else 4
    for name, dtype in DTYPES.items():
        a, b = torch.randn(2, side, side, device=DEVICE, dtype=dtype)
        x, w = (torch.randn(*shape, device=DEVICE, dtype=dtype).to(memory_format=NHWC)
                for shape in ((batch, width, size, size), (width, width, 3, 3)))
        variants[f"product, {name}"] = partial(torch.mm, a, b), 2 * side ** 3
        variants[f"convolution, {name}"] = partial(torch.conv2d, x, w, padding=1), 18 * width * x.numel()
    return variants


def measure_ceilings(args):
    a = torch.ones((1 << 30 if CUDA else 1 << 28) // 4, device=DEVICE)
    seconds = race(args, {**ceilings(args), "copy of memory": (partial(torch.empty_like(a).copy_, a), 2 * a.nbytes)})
    rows = [row for kind in ("product", "convolution", "copy") for row in as_rows(
        {name: own for name, own in seconds.items() if name.startswith(kind)},
        {"TFLOP/s or TB/s": lambda _, own: 1e-12 / median(own)})]
    return "Ceilings of this machine", rows, "Ratios are to float32; the copy counts bytes read and written."


def build(args, **more):
    """The published U-Net, with random weights where a fresh one has zeros, and its diffusion process."""
    torch.manual_seed(0)
    model, diffusion = script_util.create_model_and_diffusion(
        image_size=args.image_size, num_channels=args.num_channels, num_res_blocks=2, num_heads=1, learn_sigma=True,
        channel_mult="" if args.image_size in (64, 128, 256, 512) else "1,2,3,4", use_scale_shift_norm=False,
        attention_resolutions=str(args.image_size // 8), **more)
    for p in model.parameters():
        if p.ndim > 1 and not p.any():
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return model.to(DEVICE), diffusion


@torch.no_grad()
def measure_unet(args):
    n, size = args.batch_size, args.image_size
    image, x = (torch.rand(n, channels, size, size, device=DEVICE) for channels in (4, 1))
    plain = build(args)[0].eval()
    package = copy.deepcopy(plain).convert_for_sampling(torch.bfloat16)
    last, half, half_last = (copy.deepcopy(model).to(memory_format=order) for model, order in (
        (plain, NHWC), (package, NCHW), (package, NHWC)))
    cast = torch.autocast(DEVICE.type, torch.bfloat16)(plain.forward)

    def variant(model, n=1):
        return partial(model, x[:n], torch.full((n,), 500, device=DEVICE), image[:n]), n

    together = f"bf16 weights, channels last, batch {n}"
    variants = {"published: float32, NCHW, batch 1": variant(plain), "channels last": variant(last),
                f"batch {n}": variant(plain, n), "bf16 autocast": variant(cast), "bf16 weights": variant(half),
                together: variant(half_last, n), f"the package: bf16, batch {n}": variant(package, n)}
    expected, other = (variant(model)[0]() for model in (plain, last))
    change = ((other - expected).abs().max() / expected.abs().max()).item()
    remark = f"Channels last changes the float32 output by at most {change:.1e} of its largest value."
    if args.compile:
        compile_network(compiled := copy.deepcopy(package), DEVICE)
        remark += f" The first pass with --compile took {timed(variant(compiled, n)[0]):.0f} s."
        variants[f"the package with --compile: bf16, batch {n}"] = variant(compiled, n)
    flop, rows = race_ceilings(args, variants, variant(plain)[0])
    return "A pass of the U-Net", rows, f"{flop / 1e9:.3g} GFLOP an image. The package: convert_for_sampling. {remark}"


OPERATIONS = {"convolutions": "convolution", "activations": "silu", "normalisation": "norm",
              "products, attention": "mm|attention|softmax"}


@torch.no_grad()
def measure_profile(args):
    """Time by kind of operation, of the published pass and of the package's."""
    n, size = args.batch_size, args.image_size
    plain = build(args)[0].eval()
    package = copy.deepcopy(plain).convert_for_sampling(torch.bfloat16)
    clock = "self_device_time_total" if CUDA else "self_cpu_time_total"
    columns = {"published: float32, NCHW, batch 1": (plain, 1), f"the package: bf16, batch {n}": (package, n)}
    spent = {name: {} for name in columns}  # ms an image of each kind of operation, a list over the rounds
    for turn in range(args.rounds + 1):  # the first warms up
        for name, (model, count) in columns.items():
            images, x = (torch.rand(count, channels, size, size, device=DEVICE) for channels in (4, 1))
            t = torch.full((count,), 500, device=DEVICE)
            with torch.profiler.profile() as profiler:
                timed(partial(model, x, t, images))
            totals = dict.fromkeys(["all", *OPERATIONS, "everything else"], 0.0)
            for event in profiler.key_averages():
                kind = next((kind for kind, words in OPERATIONS.items() if re.search(words, event.key)),
                            "everything else")
                for key in ("all", kind):
                    totals[key] += getattr(event, clock) / 1e3 / count
            for kind, ms in totals.items():
                spent[name].setdefault(kind, []).extend([ms] if turn else [])
    rows = []
    for kind in next(iter(spent.values())):
        before, after = (own[kind] for own in spent.values())
        rows.append({"variant": kind, **{f"ms an image, {name}": median(own[kind]) for name, own in spent.items()},
                     "ratio": ratio(before, after), "rounds": after})
    return "Where the time of a pass goes", rows, "By torch.profiler, which slows both a little."


def measure_training(args):
    n, size, bf16 = args.train_batch_size, args.image_size, torch.bfloat16
    image, masks = (torch.rand(n, channels, size, size, device=DEVICE).round() for channels in (4, 1))
    batch = stream.Batch(image, masks, torch.ones(n, 1, dtype=torch.bool), list(range(n)), seed=0)

    class AdamW(torch.optim.AdamW):
        """As the published code calls it: no kernel looks whether the gradient is finite."""

        found_inf = property(lambda self: None, lambda self, value: None)

    def loop(order=None, dtype=None):
        """A TrainLoop; given an order of memory, with that and with AdamW as the published code calls it."""
        model, diffusion = build(args)
        cimd = CIMD(diffusion, model, *script_util.create_encoders(), kl_weight=1e-3).to(DEVICE).train()
        made = TrainLoop(cimd, None, Settings(batch_size=n, dtype=dtype))
        if order is not None:
            for module in (cimd, *made.ema.values()):
                module.to(memory_format=order)
            made.optimizer = AdamW(cimd.parameters(), lr=made.settings.lr, weight_decay=0.0)
        return made

    loops = {"published: float32, NCHW": loop(NCHW), "bf16 autocast": loop(NCHW, bf16),
             "bf16 autocast, channels last": loop(NHWC, bf16), "the package: --use_bf16 True": loop(None, bf16)}
    variants = {name: (partial(made.run_step, batch), n) for name, made in loops.items()}
    one = partial(loops["bf16 autocast"].run_step, batch.rows(slice(1)))
    flop, rows = race_ceilings(args, variants, one)
    return (f"A training step of {n} images (U-Net, AMN, ACN, AdamW, EMA)", rows,
            f"{flop / 1e9:.3g} GFLOP an image. The last row is TrainLoop as it is, its AdamW and order of memory, too.")


def phantom(args):
    image = phantoms.make_phantom(0, 0, args.image_size).image / np.float32(255)
    return Case("phantom", np.stack([image] * 4), np.zeros((0, *image.shape), bool))


def measure_ensemble(args):
    best, case, (plain, slow) = script_util.BEST, phantom(args), build(args)
    half = copy.deepcopy(plain.eval()).convert_for_sampling(torch.bfloat16)
    images = torch.from_numpy(case.image)[None].to(DEVICE)

    def published(steps):
        walk = samplers.ancestral(slow, plain, torch.randn_like(images[:, :1]), model_kwargs={"image": images})
        list(zip(range(steps), walk))

    def batch_of(n):
        return min(n, largest_batch(DEVICE, args.image_size ** 2))

    def drawn(n, steps):
        diffusion = script_util.create_gaussian_diffusion(
            learn_sigma=True, timestep_respacing=f"{best['timestep_spacing']}{steps}")
        method = CIMD(diffusion, half, sampler=best["sampler"])
        list(EnsembleSampler(method, batch_size=batch_of(n)).ensembles([case], n))

    way = f"{STEPS} ancestral steps, float32, mask by mask"
    variants, rows = {way: (partial(published, MEASURED), MEASURED / STEPS)}, []
    published(1)  # warm up
    for n in ENSEMBLES:
        variants[f"--sampler best, bf16 weights, {n} masks"] = partial(drawn, n, best["sampling_steps"]), n
        drawn(n, 2)
    seconds = race(args, variants, warm_up=False)
    columns = {"seconds": lambda _, own: median(own), "how found": lambda name, _: (
        f"EXTRAPOLATED from {MEASURED} steps" if way in name else "run whole")}
    for n, name in zip(ENSEMBLES, list(variants)[1:]):
        shown = f"--sampler best, bf16 weights, --batch_size auto ({batch_of(n)})"
        rows += as_rows({f"{n} masks, {text}": [n * s for s in seconds[key]]
                         for key, text in ((way, way), (name, shown))}, columns)
    return "An ensemble for one phantom", rows, f"--sampler best: {best['sampler']}, {best['sampling_steps']} steps."


def measure_one_pass(args):
    """16 masks of a scan by --preset energy, whatever the flags of the published U-Net are."""
    flags = script_util.drawing_flags(parse_flags("training", "", ["--preset", "energy"])[0])
    torch.manual_seed(0)
    method = script_util.create_method(flags, training=False).to(DEVICE).prepare(torch.bfloat16)
    sampler = EnsembleSampler(method, batch_size=ENSEMBLES[-1])
    image = phantoms.make_phantom(0, 0, flags.image_size).image[None] / np.float32(255)
    case = Case("phantom", image, np.zeros((0, *image.shape[1:]), bool))
    half = copy.deepcopy(build(args)[0].eval()).convert_for_sampling(torch.bfloat16)
    images = torch.from_numpy(phantom(args).image)[None].to(DEVICE)

    def one_pass():
        with torch.no_grad():
            half(images[:, :1], torch.zeros(1, device=DEVICE), image=images)

    variants = {"one pass of the published U-Net, bf16 weights": (one_pass, 1),
                "16 masks by --preset energy, bf16": (lambda: list(sampler.ensembles([case], ENSEMBLES[-1])), 1)}
    rows = as_rows(race(args, variants), {"ms": lambda _, own: 1e3 * median(own)})
    return "16 masks of one scan in one pass", rows, ""


def peak_of_sampling(args):
    """Bytes before and at the peak of sampling 16 masks at once, which the sampler's first steps show."""
    before = peak_memory()
    model, diffusion = build(args, timestep_respacing="uniform2")
    method = CIMD(diffusion, model).eval()
    if args.only_memory == "bf16":
        method.prepare(torch.bfloat16)
    list(EnsembleSampler(method, batch_size=ENSEMBLES[-1]).ensembles([phantom(args)], ENSEMBLES[-1]))
    return [before, peak_memory()]


def peak_memory():
    """The most bytes that this process has held so far."""
    status = Path("/proc/self/status")
    if CUDA or not status.exists():  # macOS counts in bytes; on Linux, getrusage would count the parent's peak, too
        return torch.cuda.max_memory_allocated() if CUDA else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", status.read_text())[1])


def measure_memory(args):
    peaks, flags = {}, [f"--{name}={getattr(args, name)}" for name in ("threads", "image_size", "num_channels")]
    for kind, name in (("float32", "float32, NCHW"), ("bf16", "the package: bf16")):
        peaks[name] = json.loads(subprocess.check_output([sys.executable, __file__, "--only-memory", kind, *flags]))
    rows = as_rows({name: [peak - before] for name, (before, peak) in peaks.items()}, {
        "MiB": lambda name, own: own[0] / 2 ** 20, "MiB with PyTorch": lambda name, _: peaks[name][1] / 2 ** 20})
    return (f"Peak of sampling {ENSEMBLES[-1]} masks", rows, "Allocated on the device." if CUDA else
            "Resident memory; ratios are of what a process takes on top of having imported PyTorch and this package.")


def measure_loader(args):
    count, batch = 64, 16
    with tempfile.TemporaryDirectory() as folder:
        phantoms.write_cases(folder, count, 0, args.image_size)
        cases = SegmentationCases(folder, args.image_size)

        def decode():
            for i in range(0, count, batch):
                read = [read_case(files) for files in cases.cases[i:i + batch]]
                np.stack([np.repeat(case.image / np.float32(255), 4, axis=0) for case in read])
                np.stack([case.raters[:1].astype(np.float32) for case in read])

        def streamed(cases):
            batches = stream.ShuffledCases(cases).batches(batch)

            def load():
                for _ in range(count // batch):
                    stream.chosen_masks(stream.to_floats(next(batches), 4, DEVICE))

            return load

        variants = {"decoding the files of a case at every visit": (decode, count),
                    "the package, from memory": (streamed(cases), count)}
        cases.MEMORY_BYTES = 0
        variants["the package, from the file beside a larger data set"] = (
            streamed(SegmentationCases(folder, args.image_size)), count)
        rows = as_rows(race(args, variants), {"examples/s": lambda _, own: 1 / median(own)})
    return "Loading training examples", rows, f"{count} phantoms, five JPEG files each; one process."


SCALING = {"paper": scaling.on_paper, "steps": scaling.measure_steps, "files": scaling.measure_files}
PARTS = {"ceilings": measure_ceilings, "unet": measure_unet, "profile": measure_profile, "training": measure_training,
         "ensemble": measure_ensemble, "one_pass": measure_one_pass, "memory": measure_memory, "loader": measure_loader}


def draw(parts):
    """PNG bytes: bars of all ratios, one colour a part."""
    bars = [(f"{part}: {row['variant']}", row["ratio"], f"C{i}") for i, part in enumerate(parts) for row in parts[part]]
    names, ratios, colours = zip(*bars)
    figure = Figure(figsize=(11, 1 + 0.27 * len(bars)), layout="constrained")
    axes = figure.subplots()
    axes.bar_label(axes.barh(range(len(bars)), [value - 1 for value in ratios], left=1, color=colours),
                   [f" {cell(value)} " for value in ratios])
    axes.set(yticks=range(len(bars)), yticklabels=names, xscale="log", xlabel="times better", xmargin=0.1)
    axes.invert_yaxis()
    return plots.png(figure)


if __name__ == "__main__":
    run_main(main)
