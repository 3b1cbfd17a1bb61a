"""Real faults against real runs of the two scripts: is anything ever lost, wrong, or left running?

    python benchmarks/torture.py                # everything: 100 kills of training on one process, 100 on two, ...
    python benchmarks/torture.py --rounds 4     # the same in two minutes; --parts train1,damage for some of it

train1, train2: training on one and on two processes, killed at random moments, half of them while it saves, and
started again until it ends by itself; weights, averages, optimiser and the rows of progress.json must be those of a run
that nobody disturbed, bit for bit. Of two processes, all are killed, or one rank, or the launcher; the others must
leave. sampling: the same with masks and with scores. damage: a file of the newest checkpoint truncated, or one bit of
it turned; a rerun must name it, or end as if nothing had been. ranks: of three processes one dies or hangs; the others
must leave in time and say why. disk: a small file system runs full while training saves (if mounting one is permitted).

What is random follows from --seed and the number of a sequence of runs, but for the machine's own timing: with the seed
printed beside what was wrong, that sequence comes first. For Linux. Exit code 1 if anything was wrong.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from common import ROOT
from tqdm import tqdm

from guided_diffusion import checkpoint, script_util
from guided_diffusion.commands.cli import run_script as run_main
from guided_diffusion.data import phantoms
from guided_diffusion.scoring.evaluation import markdown
from guided_diffusion.system import storage
from guided_diffusion.system.errors import InputError

TRAIN, SAMPLE = (ROOT / "scripts" / f"segmentation_{job}.py" for job in ("train", "sample"))
STEPS, CASES = 24, 12
MODEL = dict(image_size=16, image_channels=1, num_channels=32, channel_mult="1,2", num_res_blocks=1, num_heads=1,
             attention_resolutions="8")
# few timesteps, so that their sampler soon has losses enough to learn from
TRAINING = dict(MODEL, diffusion_steps=4, noise_schedule="cosine", num_filters="8,16", dropout=0.1, lr=1e-3,
                batch_size=4, ema_rate="0.9,0.99", schedule_sampler="loss-second-moment", log_interval=4,
                max_steps=STEPS, sample_interval=6, val_cases=4)
SAMPLING = dict(num_ensemble=3, batch_size=4)
# they hold times and paths
NOT_COMPARED = {"log.txt", "progress.csv", "progress.json", "progress.png", "tensorboard", "flags.json"}
WALL_CLOCK = {"seconds", "images_per_second", "waiting_for_data", "memory_gb"}
RUN_SECONDS, LEAVE_SECONDS = 300, 60  # until a run counts as hanging; until what a kill left alive does
DIST_TIMEOUT = 10
REFERENCE = threading.Lock()


class Wrong(Exception):
    """What should not have happened."""


class Part:
    """One part at work: sequences of runs, each in a folder of its own, until `rounds` faults have been made."""

    def __init__(self, name, root, args, place):
        self.name, self.root, self.folder, self.place, self.seed = name, root, root / name, place, args.seed
        self.sequence, rounds = PARTS[name]
        self.rounds, self.counts, self.wrong, self.skipped = rounds(args.rounds), Counter(), [], ""
        self.folder.mkdir()

    def run(self):
        """Call sequence(part, its folder, its random numbers) as often as needed; returns a row of the table."""
        begin = time.perf_counter()
        with tqdm(total=self.rounds, desc=self.name, unit=" faults", position=self.place) as self.bar:
            while self.counts["faults"] < self.rounds and len(self.wrong) < 10 and not self.skipped:
                folder = self.folder / f"seed{self.seed}"
                folder.mkdir()
                try:
                    self.sequence(self, folder, random.Random(f"{self.name} {self.seed}"))
                    self.counts["completed"] += not self.skipped
                    shutil.rmtree(folder)
                except Wrong as error:
                    end_all(self.folder)
                    self.wrong.append(f"{self.name}: {error}\nagain: --parts {self.name} --seed {self.seed}; kept in"
                                      f" {folder}, with this last output:\n{tail(folder)}\n")
                    tqdm.write(self.wrong[-1])
                self.seed += 1
        counts = Counter(self.counts)
        faults, inside, completed = (counts.pop(name, 0) for name in ("faults", "inside", "completed"))
        pace = (time.perf_counter() - begin) / max(faults, 1)
        return [self.name, str(faults), str(inside), str(completed), str(len(self.wrong)), f"{pace:.1f}",
                self.skipped or ", ".join(f"{kind}: {n}" for kind, n in sorted(counts.items()))]

    def fault(self, kind, inside=False):
        self.counts.update({"faults": 1, "inside": int(inside), kind: 1})
        self.bar.update()


def main():
    args = parse_args()
    root = Path(tempfile.mkdtemp(prefix="torture-"))
    parts = [Part(name, root, args, place) for place, name in enumerate(args.parts)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        phantoms.write_cases(root / "data", CASES, args.seed, 32)
        rows = list(ThreadPoolExecutor(args.jobs).map(Part.run, parts))
    except BaseException:  # Ctrl-C, too: the threads of other parts would go on
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # once is enough
        traceback.print_exc()
        end_all(root)
        for mount in filter(os.path.ismount, root.glob("disk/*/results")):
            subprocess.run(["umount", mount])
        os._exit(1)
    wrong = sum((part.wrong for part in parts), [])
    if not wrong:
        shutil.rmtree(root)
    table = [["part", "faults", "inside saving", "sequences completed", "wrong", "seconds a fault", "by kind"], *rows]
    print(markdown(table))
    if args.output:
        storage.write_bytes(args.output, "\n\n".join([markdown(table), *wrong, ""]).encode())
    sys.exit(1 if wrong else 0)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="any of them, with commas (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=100,
                        help="kills of train1 and of train2; the others take a share of it (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="parts at work at the same time (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    parser.add_argument("--output", default="", help="file for the table and all that was wrong")
    args = parser.parse_args()
    args.parts = args.parts.split(",")
    if not PARTS.keys() >= set(args.parts) or min(args.rounds, args.jobs) < 1:
        parser.error(f"--parts are of {','.join(PARTS)}; --rounds and --jobs must be at least 1")
    return args


# ---- processes ----

def processes_of(folder):
    """{pid: rank, None without one} of all other processes whose command line holds a folder."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if os.fsencode(folder) in (entry / "cmdline").read_bytes() and int(entry.name) != os.getpid():
                rank = re.search(rb"(?:^|\0)RANK=(\d+)", (entry / "environ").read_bytes())
                found[int(entry.name)] = int(rank[1]) if rank else None
    return found


def send(number, pids):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end_all(folder):
    """Kill all runs in a folder, with what they still start meanwhile."""
    while left := processes_of(folder):
        send(signal.SIGKILL, left)
        time.sleep(0.01)


def start(command, folder):
    """Start a command in a session of its own; its output goes to the end of output.txt in its folder."""
    env = {name: value for name, value in os.environ.items() if name != "OPENAI_LOGDIR"}
    env.update(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")])))
    with open(folder / "output.txt", "ab") as output:
        return subprocess.Popen([*map(str, command)], env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=output,
                                stderr=subprocess.STDOUT, start_new_session=True)


def finish(process, folder, seconds=RUN_SECONDS):
    """Wait for a run in a folder; its exit code. :raises Wrong: if any process of it is still there after so long."""
    end = time.monotonic() + seconds
    while process.poll() is None or processes_of(folder):  # the launcher may be gone, and its ranks not
        if time.monotonic() > end:
            left = processes_of(folder)
            end_all(folder)
            raise Wrong(f"after {seconds} s there still were, as {{process: rank}}, {left}")
        time.sleep(0.02)
    return process.returncode


def undisturbed(command, folder):
    """Run a command to its end, which must be exit code 0. Returns the seconds it took."""
    begin = time.perf_counter()
    if code := finish(start(command, folder), folder):
        raise Wrong(f"exit code {code}, undisturbed: {tail(folder)}")
    return time.perf_counter() - begin


def command_line(script, part, folder, flags, processes=1, ngpu=False):
    """Of a script that writes to `results` in a folder."""
    flags = {"data_dir": part.root / "data", "fit": "resize", "visdom_port": 0, "results_dir": folder / "results",
             **({"ngpu": processes} if ngpu else {}), **flags}
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [sys.executable, *(launcher if processes > 1 and not ngpu else []), script,
            *(word for name, value in flags.items() for word in (f"--{name}", value))]


def training(part, folder, processes=1, ngpu=False, **flags):
    return command_line(TRAIN, part, folder, {**TRAINING, "val_dir": part.root / "data", **flags}, processes, ngpu)


def read(path):
    return path.read_text(errors="replace") if path.exists() else ""


def tail(folder):
    """The last lines of the runs of a folder, and, of those before, what looks like errors."""
    lines = read(folder / "output.txt").splitlines()
    return "\n".join([line for line in lines[-60:-12] if re.search("(rror|Exception): ", line)] + lines[-12:])


# ---- faults ----

def kill_until_it_ends(part, folder, rng, command, unfinished, seconds, most_files, check=lambda results: []):
    """Kill runs of a command until one ends by itself, with exit code 0; the last one when all faults are made.

    :param command: makes the command line; unfinished(names): those of files that are not whole.
    :param seconds, most_files: see `strike`; check: what is wrong with the results after a kill, as strings.
    """
    results, killed = folder / "results", True
    while killed:
        before = unfinished_files(results, unfinished)
        process = start(command(), folder)
        killed = part.counts["faults"] < part.rounds and strike(process, folder, rng, unfinished, seconds, most_files)
        code = finish(process, folder, LEAVE_SECONDS if killed else RUN_SECONDS)
        if killed:
            part.fault(killed, bool(unfinished_files(results, unfinished) - before))
            if problems := check(results):
                raise Wrong(f"after {killed}: {'; '.join(problems)}")
    if code:
        raise Wrong(f"exit code {code}, undisturbed")


def strike(process, folder, rng, unfinished, seconds, most_files):
    """Kill a run or a part of it; returns what was killed, "" where it ended before.

    :param seconds: kill within so many after the start, or, in half of the cases, within some milliseconds after
        one of the first `most_files` unfinished files appears (0: never).
    """
    delay = rng.uniform(0, seconds)
    if rng.random() < 0.5 and most_files:
        seen = unfinished_files(folder / "results", unfinished)
        goal, delay = len(seen) + rng.randint(1, most_files), rng.uniform(0, 0.01)
        while process.poll() is None and len(seen) < goal:
            seen |= unfinished_files(folder / "results", unfinished)
            time.sleep(0.0005)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
        return ""
    alive = processes_of(folder)
    ranks = [pid for pid, rank in alive.items() if rank is not None]
    target = rng.choice(["all", "one rank", "launcher"]) if ranks else "all"
    if target == "all":
        end_all(folder)
    else:
        send(signal.SIGKILL, [rng.choice(ranks)] if target == "one rank" else alive.keys() - ranks)
    return f"{target} killed"


def unfinished_files(results, others=lambda names: []):
    """{(name, inode)} of temporary files, and of others that are chosen of all names; a new file has a new inode."""
    inodes = {}
    with contextlib.suppress(FileNotFoundError):
        inodes = {entry.name: entry.inode() for entry in os.scandir(results)}
    return {(name, inodes[name]) for name in [*(n for n in inodes if n.endswith(".partial")), *others(inodes)]}


def incomplete_checkpoints(names):
    """The files of checkpoints that are not whole: the weights of the U-Net come last."""
    steps = {name: match[1] for name in names if (match := re.search(r"savedmodel.*?(\d{6})\.pt$", name))}
    return [name for name, step in steps.items() if f"savedmodel{step}.pt" not in names]


def incomplete_cases(names):
    """The files of cases that are not whole: the ensemble comes last."""
    return [name for name in names if name.endswith(".png") and f"{name.rsplit('_', 1)[0]}_ensemble.npz" not in names]


# ---- checks ----

def differences(a, b, where=""):
    """Where two nests of dicts, lists, tensors, numbers and words differ in any bit, as strings."""
    if type(a) is not type(b):
        return [f"{where}: {type(a).__name__}, not {type(b).__name__}"]
    if isinstance(a, dict):
        odd = [f"{where}: {key} is in one only" for key in a.keys() ^ b.keys()]
        return odd + [text for key in a.keys() & b.keys() for text in differences(a[key], b[key], f"{where} {key}")]
    if isinstance(a, (list, tuple)):
        odd = [f"{where}: {len(a)} items, not {len(b)}"] if len(a) != len(b) else []
        return odd + [text for i, (x, y) in enumerate(zip(a, b)) for text in differences(x, y, f"{where} [{i}]")]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [f"{where}: another tensor"]
    return [] if repr(a) == repr(b) else [f"{where}: {a!r}, not {b!r}"]  # nan is nan, and -0.0 is not 0.0


def file_differences(results, reference, expected):
    """Files of a folder that are missing, left over, or not those of the reference; some need only be there."""
    names = {path.name for path in results.iterdir()}
    problems = [f"{name} is {'missing' if name in expected else 'left over'}" for name in sorted(names ^ expected)]
    for name in sorted(names & expected - NOT_COMPARED):
        if (results / name).read_bytes() != (reference / name).read_bytes():
            try:
                weights = name.endswith(".pt") and [checkpoint.load(folder / name) for folder in (results, reference)]
                problems += differences(*weights, name)[:3] if weights else [f"{name} differs"]
            except InputError as error:
                problems.append(str(error))
    return problems


def row_differences(results, reference):
    """Where the rows of progress.json differ, but for the values that depend on the machine."""
    rows = []
    for folder in (results, reference):
        lines = [json.loads(line) for line in read(folder / "progress.json").splitlines() if line.endswith("}")]
        rows.append([{key: line[key] for key in line.keys() - WALL_CLOCK} for line in lines])
    steps = [[row["step"] for row in own] for own in rows]
    return [f"progress.json has the steps {steps[0]}"] if steps[0] != steps[1] else differences(*rows, "progress.json")


def check_training(folder, reference, kept, rows=True):
    """:raises Wrong: if the files of a run are not those of one that saved every step, and kept these ones."""
    steps = {path.name: re.search(r"(\d{6})\.pt$", path.name) for path in reference.iterdir()}
    expected = {name for name, step in steps.items() if step is None or int(step[1]) in kept}
    found = file_differences(folder / "results", reference, expected)
    if found := found + (row_differences(folder / "results", reference) if rows else []):
        raise Wrong(f"did not end as if undisturbed: {'; '.join(found[:9])}")


def broken_checkpoint(results):
    """What is wrong with flags.json, savedmodel.pt and the newest complete checkpoint, where they are there."""
    try:
        checkpoint.load_flags(results)
        if (results / checkpoint.NEWEST).exists():
            checkpoint.load(results / checkpoint.NEWEST)
    except InputError as error:
        return [str(error)]
    return [text for step in checkpoint.steps_in(results)[-1:] for text in checkpoint.damages(results, step)]


# ---- parts ----

def reference_run(part, name, command):
    """The results of an undisturbed run, and the seconds it took; made once for all parts."""
    folder = part.root / f"reference-{name}"
    with REFERENCE:
        if not (folder / "seconds").exists():
            folder.mkdir(exist_ok=True)
            (folder / "seconds").write_text(str(undisturbed(command(folder), folder)))
    return folder / "results", float(read(folder / "seconds"))


def trained(part, processes=1):
    return reference_run(part, processes, lambda folder: training(part, folder, processes, save_interval=1))


def kill_training(part, folder, rng, processes):
    reference, seconds = trained(part, processes)
    interval, keep = rng.randint(1, 3), rng.choice([0, 2])
    kill_until_it_ends(
        part, folder, rng, lambda: training(part, folder, processes, processes > 1 and rng.random() < 0.3,
                                            save_interval=interval, keep_checkpoints=keep),
        incomplete_checkpoints, 0.8 * seconds, most_files=60, check=broken_checkpoint)
    others = checkpoint.steps_in(folder / "results") if processes > 1 else ()  # what one left alone saves as it leaves
    check_training(folder, reference, sorted({*range(interval, STEPS, interval), STEPS, *others})[-keep:])


def kill_sampling(part, folder, rng):
    model = part.folder / checkpoint.NEWEST
    if not model.exists():
        torch.manual_seed(0)
        network, _ = script_util.create_model_and_diffusion(**MODEL)
        for p in network.parameters():
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5 if p.ndim > 1 else 0.1)
        checkpoint.save_flags(part.folder, {**MODEL, "diffusion_steps": 50})
        checkpoint.save(model, network.state_dict())
    processes, evaluate = rng.choice([1, 1, 2]), rng.random() < 0.3

    def sampling(folder):
        return command_line(SAMPLE, part, folder, {**SAMPLING, "model_path": model, "evaluate": evaluate}, processes)

    reference, seconds = reference_run(part, f"sampling-{processes}-{evaluate}", sampling)
    kill_until_it_ends(part, folder, rng, partial(sampling, folder), incomplete_cases, seconds, 0 if evaluate else 60)
    if found := file_differences(folder / "results", reference, {path.name for path in reference.iterdir()}):
        raise Wrong(f"--evaluate {evaluate} of {processes} did not end as if undisturbed: {'; '.join(found[:9])}")


def damage(part, folder, rng):
    """Two checkpoints, of which the newer is damaged, and two steps to go."""
    reference, _ = trained(part)
    results, newest = folder / "results", STEPS - 2
    shutil.copytree(reference, results)
    for path in results.glob("*savedmodel*0*.pt"):
        if int(path.stem[-6:]) not in (newest - 1, newest):
            path.unlink()
    shutil.copy(results / checkpoint.model_name(newest), results / checkpoint.NEWEST)
    name = [checkpoint.model_name(newest), checkpoint.ema_name(0.99, newest), checkpoint.opt_name(newest),
            "flags.json"][part.seed % 4]
    data = bytearray((results / name).read_bytes())
    place, bit = rng.randrange(len(data)), rng.randrange(8)
    if rng.random() < 2 / 7:
        data, what = data[:place], f"{name} truncated to {place} bytes"
    else:
        data[place] ^= 1 << bit
        what = f"{name} with bit {bit} of byte {place} turned"
    (results / name).write_bytes(data)
    code, said = finish(start(training(part, folder, save_interval=1), folder), folder), read(folder / "output.txt")
    part.fault("refused" if code else "passed over" if f"resumed at step {newest - 1}" in said else "harmless")
    # a loaded file may be named, or the folder that holds flags of another model than those of the command line
    named = re.search(rf"(error: |passed over: ).*{results}(/{name}|.*not what the)", said)
    if code not in (0, 2) or not named and f"resumed at step {newest} " not in said:
        raise Wrong(f"{what}: exit code {code}, and no word of it")
    if not code:
        try:
            check_training(folder, reference, range(newest - 1, STEPS + 1))
        except Wrong as error:
            raise Wrong(f"{what}: {error}") from None


def lose_rank(part, folder, rng):
    fault = ("killed", "stopped", "launcher killed")[part.seed % 3]
    command = partial(training, part, folder, 3, save_interval=2, keep_checkpoints=2, dist_timeout=DIST_TIMEOUT)
    process = start(command(max_steps=0), folder)
    while process.poll() is None and "step" not in read(folder / "results" / "progress.json"):
        time.sleep(0.1)
    time.sleep(rng.uniform(0, 3))
    if process.poll() is not None:
        raise Wrong(f"exit code {process.poll()} before anything was done to it")
    alive = processes_of(folder)
    victim = rng.choice([pid for pid, rank in alive.items() if (rank is None) == (fault == "launcher killed")])
    send(signal.SIGSTOP if fault == "stopped" else signal.SIGKILL, [victim])
    part.fault(fault)
    begin = time.perf_counter()
    finish(process, folder, DIST_TIMEOUT + 40)
    part.counts["longest time to leave"] = max(part.counts["longest time to leave"], round(time.perf_counter() - begin))
    errors = [line for line in read(folder / "output.txt").splitlines() if f"{TRAIN.name}: error: " in line]
    if alive[victim] is not None and not (len(errors) == 1 and re.search(rf"\brank {alive[victim]}\b", errors[0])):
        raise Wrong(f"rank {alive[victim]} was {fault}, but the messages are {errors}")
    if found := broken_checkpoint(folder / "results"):
        raise Wrong("; ".join(found))
    undisturbed(command(max_steps=max(checkpoint.steps_in(folder / "results"), default=0) + 2), folder)


def fill_disk(part, folder, rng):
    reference, _ = trained(part)
    size = sum(path.stat().st_size for path in reference.glob(f"*{STEPS:06d}.pt"))
    results, ballast = folder / "results", folder / "results" / "ballast"
    results.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={8 * size}", "torture", results], text=True,
                             stderr=subprocess.PIPE)
    if mounted.returncode:
        part.skipped = f"skipped: {mounted.stderr.strip()}"
        return
    try:
        with open(ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(results).free - int(rng.uniform(0.3, 2.7) * size))
        command = training(part, folder, save_interval=2, keep_checkpoints=2)
        code, said = finish(start(command, folder), folder), read(folder / "output.txt")
        saved = max(checkpoint.steps_in(results), default=0)
        part.fault("full")
        if code != 2 or said.count("training goes on") < 2 or f"it goes on from step {saved}" not in said:
            raise Wrong(f"on a full disk, with step {saved} saved, exit code {code}")
        if found := broken_checkpoint(results):
            raise Wrong(f"on a full disk: {'; '.join(found)}")
        ballast.unlink()
        undisturbed(command, folder)
        check_training(folder, reference, (STEPS - 2, STEPS), rows=False)
    finally:
        end_all(folder)
        subprocess.run(["umount", results])


# name: what it does in a sequence, and how many faults it makes for --rounds; those that wait the longest come first
PARTS = {
    "ranks": (lose_rank, lambda rounds: max(2, rounds // 20)),
    "train1": (partial(kill_training, processes=1), lambda rounds: rounds),
    "train2": (partial(kill_training, processes=2), lambda rounds: rounds),
    "sampling": (kill_sampling, lambda rounds: max(1, rounds // 2)),
    "damage": (damage, lambda rounds: max(2, 7 * rounds // 10)),
    "disk": (fill_disk, lambda rounds: max(1, rounds // 20)),
}


if __name__ == "__main__":
    run_main(main)
