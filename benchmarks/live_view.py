"""What the live view costs training: the time of its steps with a Visdom server that answers, hangs or is absent.

    python benchmarks/live_view.py

One training loop takes blocks of 10 steps, each behind a line of its log, ten times as many lines as by default. The
kinds of server, and none, take turns block by block, in an order drawn anew each round. A ratio is that of a block to
the one without a view in the same round; shown are the median of the rounds and its 95 % bootstrap interval.
"""

import argparse
import contextlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from common import fast_bf16
from tqdm import tqdm

from guided_diffusion import flags, logger, script_util
from guided_diffusion.data import phantoms
from guided_diffusion.data.cases import SegmentationCases
from guided_diffusion.data.stream import ShuffledCases
from guided_diffusion.live import views
from guided_diffusion.methods.cimd import CIMD
from guided_diffusion.scoring import evaluation
from guided_diffusion.train_util import TrainLoop
from guided_diffusion.training.settings import Settings

STEPS = 10
KINDS = {"no view": None, "absent": None, "hung": signal.SIGSTOP, "answers": signal.SIGCONT}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="default %(default)s")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        logger.configure(folder)
        loop = make_loop(folder)
        batches = loop.data.batches(loop.settings.batch_size)
        servers = {kind: start_server(stop) for kind, stop in KINDS.items() if stop}
        shown = {kind: make_view(f"{folder}/{kind}", servers[kind][1] if kind in servers else free_port())
                 for kind in KINDS if kind != "no view"}
        time.sleep(3)  # until the views have found their servers, or not
        seconds = {kind: [] for kind in KINDS}
        loop.run_step(loop._next(batches))
        for _ in tqdm(range(args.rounds), unit="round"):
            for kind in random.sample(list(KINDS), len(KINDS)):
                loop.callbacks = [shown[kind]] if kind in shown else []
                start = time.perf_counter()
                with contextlib.redirect_stdout(None):
                    loop.log({})
                for _ in range(STEPS):
                    loop.run_step(loop._next(batches))
                seconds[kind].append(time.perf_counter() - start)
        for server, _ in servers.values():
            server.kill()
        logger.close()
    base = np.array(seconds["no view"])
    rows = [[kind, f"{np.median(own) / STEPS:.3f}", *interval(np.array(own) / base)] for kind, own in seconds.items()]
    print(f"{torch.get_num_threads()} CPU threads, {args.rounds} rounds\n\n" + evaluation.markdown(
        [["server", "seconds a step", "ratio", "95 %"], *rows]))


def interval(ratios):
    """The median and its bootstrap interval, in words."""
    drawn = np.random.default_rng(0).choice(ratios, (2000, len(ratios)))
    return f"{np.median(ratios):.3f}", "[{:.3f}, {:.3f}]".format(*np.quantile(np.median(drawn, 1), (0.025, 0.975)))


def make_loop(folder):
    """A TrainLoop of make demo's model."""
    phantoms.write_cases(f"{folder}/data", 64, 0)
    model, diffusion = script_util.create_model_and_diffusion(
        image_size=64, image_channels=1, num_channels=32, channel_mult="1,1,2,4", num_res_blocks=1, num_heads=1,
        attention_resolutions="8", predict_xstart=True)
    encoders = script_util.create_encoders(image_channels=1, num_filters="8,16,32")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return TrainLoop(
        CIMD(diffusion, model, *encoders, kl_weight=1e-3).to(device).train(),
        ShuffledCases(SegmentationCases(f"{folder}/data", 64, 1, "crop")),
        Settings(batch_size=4, log_interval=STEPS, image_channels=1, dtype=torch.bfloat16 if fast_bf16() else None))


def make_view(folder, port):
    defaults = flags.defaults("model", "encoders", "diffusion", "training", "results", "visdom", "server")
    return views.TrainingView(folder, {**defaults, "visdom": "connect", "visdom_port": port}, None, end=0,
                              global_batch=4, losses=["loss", "mse", "kl"], splits=["q0", "q1", "q2", "q3"],
                              split_by="quarter of the timesteps")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_server(stop):
    """A Visdom server that gets this signal once it answers, and its port."""
    port = free_port()
    server = subprocess.Popen([sys.executable, "-m", "guided_diffusion.live.server", str(port)],
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while socket.socket().connect_ex(("127.0.0.1", port)):
        time.sleep(0.1)
    server.send_signal(stop)
    return server, port


if __name__ == "__main__":
    main()
