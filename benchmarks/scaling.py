"""How training scales: images a second on one process and on several, and what the start asks of a file system.

Started by speed.py --scaling. Each process trains the published U-Net, AMN and ACN on --train_batch_size images of its
own, with --threads threads. A step is timed as it is, and without the exchange of gradients; what the exchange adds,
behind a backward pass that hides some of it, is its share. The file operations under --data_dir until the end of the
first step are counted by strace, for a small data set and one twice as large.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
from common import ROOT

from guided_diffusion import dist_util, script_util
from guided_diffusion.data import phantoms, stream
from guided_diffusion.methods.cimd import CIMD
from guided_diffusion.system.errors import InputError
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.settings import Settings

PROCESSES, TRACED = (1, 2), (1, 2, 4)
ON_CPU = {"image_size": 64, "num_channels": 32, "threads": 1}  # of the U-Net; the published one takes minutes a step
WIRES = ("float32", "bfloat16")
FEWEST = 8  # cases of the smaller data set that is traced
TINY = ("--image_size 16 --fit resize --num_channels 32 --channel_mult 1,2 --num_res_blocks 1 --num_heads 1"
        " --attention_resolutions 8 --num_filters 8,16 --diffusion_steps 30 --sample_interval 0 --max_steps 1").split()


def launched(count, *words):
    """The words that start so many processes of a Python program."""
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *words]


def measure_steps(args):
    """A table as those of speed.py: a row a number of processes and kind of wire."""
    rows, flags = [], [f"--{name}={getattr(args, name)}" for name in (
        "rounds", "threads", "image_size", "num_channels", "train_batch_size")]
    for count in PROCESSES:
        for wire in WIRES[:1] if count == 1 else WIRES:
            out = subprocess.check_output(launched(count, str(ROOT / "benchmarks" / "speed.py"), "--only-steps", wire,
                                                   *flags), text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            rows.append({"variant": f"{count} process(es), gradients as {wire}" if count > 1 else "1 process",
                         **json.loads(out.splitlines()[-1])})
    for row in rows:
        row["efficiency"] = row["images/s"] / rows[0]["images/s"] / row.pop("processes")
    cores = len(os.sched_getaffinity(0))
    return "A training step", rows, f"{args.train_batch_size} images a process; {cores} core(s) for all of them."


def timed_steps(args):
    """What one process of measure_steps has seen, as JSON."""
    dist_util.setup_dist()
    torch.set_num_threads(args.threads)
    n, size, device = args.train_batch_size, args.image_size, dist_util.dev()
    model, diffusion = script_util.create_model_and_diffusion(
        image_size=size, num_channels=args.num_channels, num_res_blocks=2, num_heads=1, attention_resolutions="16",
        use_scale_shift_norm=False, learn_sigma=True)
    method = CIMD(diffusion, model, *script_util.create_encoders(), kl_weight=1e-3).to(device).train()
    loop = TrainLoop(method, None, Settings(batch_size=n, wire_dtype=args.only_steps))
    image, masks = (torch.rand(n, channels, size, size, device=device).round() for channels in (4, 1))
    batch = stream.Batch(image, masks, torch.ones(n, 1, dtype=torch.bool), list(range(n)), seed=0)

    def seconds(exchange):
        if dist.is_initialized():
            dist.barrier()
            loop.ddp.require_backward_grad_sync = exchange
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        loop.run_step(batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    turns = [(seconds(True), seconds(False)) for _ in range(args.rounds + 1)][1:]  # the first one warms up
    whole, alone = map(median, zip(*turns))
    if dist_util.rank() == 0:
        count = dist_util.world_size()
        sent = sum(p.numel() for p in loop.trained) * (2 if args.only_steps == "bfloat16" else 4)
        print(json.dumps({"processes": count, "images/s": count * n / whole, "ms a step": 1e3 * whole,
                          "ms without exchange": 1e3 * alone if count > 1 else 1e3 * whole,
                          "share of exchange": max(0.0, 1 - alone / whole) if count > 1 else 0.0,
                          "MB of gradients": sent / 1e6 if count > 1 else 0.0}))
    dist_util.cleanup()


def measure_files(args):
    """A table as those of speed.py: a row a number of processes."""
    if not shutil.which("strace"):
        raise InputError("--scaling: counts file operations with strace, which is missing; install it")
    rows = []
    for count in TRACED:
        seen = [operations(count, cases) for cases in (FEWEST, 2 * FEWEST)]
        slope = (seen[1] - seen[0]) / FEWEST
        rows.append({"variant": f"{count} process(es)", f"{FEWEST} cases": seen[0], f"{2 * FEWEST} cases": seen[1],
                     "a case": slope, "whatever the cases": seen[0] - FEWEST * slope})

    def of(processes, column):
        one, several = rows[0][column], rows[-1][column]
        return one + (processes - 1) * (several - one) / (TRACED[-1] - 1)

    return "File operations under --data_dir until the end of the first step", rows, (
        f"By these, 64 processes would make {of(64, 'a case'):.0f} a case, and {of(64, 'whatever the cases'):.0f}"
        f" whatever the number of cases (calculated).")


def operations(count, cases):
    """System calls that name a file under --data_dir, of all processes of a start with so many cases."""
    with tempfile.TemporaryDirectory() as folder:
        data, trace = Path(folder, "the_cases"), Path(folder, "trace")
        phantoms.write_cases(data, cases, 0, 32)
        subprocess.run(["strace", "-f", "--seccomp-bpf", "-qq", "-s", "300", "-e", "trace=%file", "-o", trace,
                        *launched(count, str(ROOT / "scripts" / "segmentation_train.py"), "--data_dir", str(data),
                                  "--results_dir", f"{folder}/results", *TINY)], check=True, stdout=subprocess.DEVNULL)
        return len(re.findall(r"\w+\(.*the_cases", trace.read_text(errors="replace")))


# ---- on paper ----

FLOP = 412e9  # of an image of the published training step, forwards and backwards, as --parts training counts it
RATE = 300e12  # FLOP/s that a GPU is ASSUMED to keep up: 30 % of the 989e12 of an H100's data sheet for bfloat16
HIDDEN = 2 / 3  # of a step is its backward pass, behind which gradients are sent
GPUS = 8  # a machine
BUCKET = 25e6  # bytes, at which DistributedDataParallel sends gradients
LINKS = {  # bytes/s out of a machine, as their names say, and seconds that a message is ASSUMED to take
    "8 x InfiniBand 400 Gb/s": (400e9, 5e-6), "Ethernet 100 Gb/s": (12.5e9, 30e-6),
    "Ethernet 25 Gb/s": (3.125e9, 30e-6)}


def efficiency(gpus, images, numbers, width, bandwidth, latency):
    """Images a second of so many GPUs, over those of as many GPUs that need not talk.

    A step computes for c = images FLOP / RATE. Gradients of `numbers` parameters, `width` bytes each, leave every one
    of n machines 2 (n - 1) / n times, and each bucket passes up and down a tree of log2(n) levels. What of that lasts
    longer than the backward pass is waited for.
    """
    machines, size = gpus / GPUS, numbers * width
    step = images * FLOP / RATE
    exchange = 2 * (machines - 1) / machines * size / bandwidth
    exchange += 2 * math.log2(machines) * math.ceil(size / BUCKET) * latency
    return step / (step + max(0.0, exchange - HIDDEN * step))


def on_paper(args):
    """A table as those of speed.py: a row a link and kind of wire, a column a number of GPUs."""
    numbers = sum(p.numel() for network in (script_util.create_model_and_diffusion(
        image_size=128, num_channels=128, num_res_blocks=2, num_heads=1, attention_resolutions="16", learn_sigma=True,
        use_scale_shift_norm=False)[0], *script_util.create_encoders()) for p in network.parameters())
    rows = [{"variant": f"{link}, {images} images a GPU, {wire}", **{
        f"{gpus} GPUs": efficiency(gpus, images, numbers, width, *speed) for gpus in (8, 16, 32, 64, 128, 256, 512)}}
        for link, speed in LINKS.items() for images in (20, 4) for wire, width in (("float32", 4), ("bfloat16", 2))]
    return "Efficiency on paper", rows, (
        f"{numbers / 1e6:.1f} million gradients; {1e3 * 20 * FLOP / RATE:.0f} ms a step of 20 images at an ASSUMED"
        f" {RATE / 1e12:.0f} TFLOP/s a GPU; {GPUS} GPUs a machine.")
