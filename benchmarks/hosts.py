"""Several hosts on this machine, cut off and slowed down: is anything lost, wrong, or written by one left behind?

    python benchmarks/hosts.py                  # all of it
    python benchmarks/hosts.py --rounds 1       # a short version, in some minutes
    python benchmarks/hosts.py --parts cut0     # the shortest: the host of rank 0 is cut off

A host is a set of Linux namespaces (network, UTS, PID, mount): it has an address, a name and a list of processes of its
own, and shares the disk with the others. Frames between hosts go through a switch, a thread of this program between
their TAP devices, with --delay seconds each way and --loss of the frames lost, and cuts hosts off. All of it is removed
at the end: a host's processes die with its first one.

equal: torchrun over two hosts with a process each trains the weights of two local processes, to the bit, without and
with delay and loss; two hosts that share a results folder draw the masks of one, to the byte. cut0, cut1: the host of
that rank is cut off in the middle of a step; the processes of both must end, with a message that names it. rounds: of
two hosts one, that of rank 0 too, is cut off at a random moment, and two others go on at once, as an elastic launcher
lets them: the one that was left behind must write nothing from then on, and end; the weights must be those of an
undisturbed run, to the bit. elastic: scripts/launch/nodes.sh with NODES=2:3 on three hosts, its rendezvous on a fourth;
one of them is cut off, the others must go on from the last checkpoint, and the host must be taken in when it is back;
batch and order of the data stay. mpi: scripts/launch/mpi.sh with the mpiexec of MPICH on two hosts, where a script that
enters a host takes the place of ssh; to the bit as two local processes.

What is random follows from --seed, but for the machine's own timing. Needs root, or user namespaces. Exit code 1 if
anything was wrong, 77 where this kernel permits no namespaces.
"""

import argparse
import contextlib
import ctypes
import heapq
import json
import multiprocessing
import os
import random
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from common import ROOT
from torture import differences

from guided_diffusion import checkpoint
from guided_diffusion.data import phantoms
from guided_diffusion.scoring.evaluation import markdown
from guided_diffusion.training.ownership import LOCK

SCRIPTS = ROOT / "scripts"
STEPS, CASES, PORT = 24, 8, 29500
ELASTIC_STEPS = 60  # more than are done before the file "go" is there
TIMEOUT, PATIENCE = 6, 600  # seconds: --dist_timeout; until a run counts as hanging
MODEL = dict(image_size=16, image_channels=1, num_channels=32, channel_mult="1,2", num_res_blocks=1, num_heads=1,
             attention_resolutions="8")
TRAINING = dict(MODEL, diffusion_steps=10, noise_schedule="cosine", num_filters="8,16", dropout=0.1, lr=1e-3,
                batch_size=2, max_steps=STEPS, save_interval=2, log_interval=10, sample_interval=0,
                dist_timeout=TIMEOUT)
FORKS = multiprocessing.get_context("forkserver")
# the first process of a host: sets it up, hands its TAP device out, and takes in orphans until this program is gone
FIRST = """
import contextlib, fcntl, os, select, socket, struct, subprocess, sys
name, address, door, hosts_file = sys.argv[1:]
socket.sethostname(name)
tap = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"tap0", 0x0002 | 0x1000))  # TUNSETIFF; a TAP, bare frames
for words in ("ip link set lo up", "ip link set tap0 mtu 9000 up", f"ip addr add {address}/24 dev tap0",
              f"mount --bind {hosts_file} /etc/hosts"):
    subprocess.run(words.split(), check=True)
door = socket.socket(fileno=int(door))
socket.send_fds(door, [b"tap"], [tap])
os.close(tap)
while not select.select([door], [], [], 0.2)[0]:
    with contextlib.suppress(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
"""


# rank 0's store of a rendezvous, on a host where no process trains
RENDEZVOUS = """
import time
from torch.distributed import TCPStore
store = TCPStore("0.0.0.0", 29400, is_master=True, wait_for_workers=False)
time.sleep(3600)
"""
# cimd-train, but a step takes a moment until the file "go" is there
STEPPING = """#!{python}
import os, runpy, sys, time
sys.path.insert(0, {root!r})
from guided_diffusion.train_util import TrainLoop
step = TrainLoop.run_step
TrainLoop.run_step = lambda *args: (os.path.exists({go!r}) or time.sleep(2), step(*args))[1]
sys.argv[0] = {script!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# what is called in the place of ssh: ssh [-x] HOST COMMAND; the program outside the hosts enters that host
SSH = """#!{python} -S
import json, socket, sys
host, *command = [word for word in sys.argv[1:] if word != "-x"]
with socket.socket(socket.AF_UNIX) as door:
    door.connect({door!r})
    socket.send_fds(door, [json.dumps([host, " ".join(command)]).encode()], [0, 1, 2])
    sys.exit(int(door.recv(10) or 255))
"""


class Wrong(Exception):
    """What should not have happened."""


class Switch:
    """Passes frames on between TAP devices by the addresses it has learnt; `cut` holds those that are cut off.

    :param delay: seconds of a frame on its way; loss: the share of frames that are lost.
    """

    def __init__(self, seed, delay=0.0, loss=0.0):
        self.random, self.delay, self.loss = random.Random(seed), delay, loss
        self.taps, self.cut, self.places, self.waiting, self.count = [], set(), {}, [], 0
        self.closed = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while not self.closed.is_set():
            left = self.waiting[0][0] - time.monotonic() if self.waiting else 0.1
            for tap in select.select(list(self.taps), [], [], min(max(left, 0), 0.1))[0]:
                with contextlib.suppress(OSError):
                    self._receive(tap, os.read(tap, 65536))
            while self.waiting and self.waiting[0][0] <= time.monotonic():
                _, _, tap, frame = heapq.heappop(self.waiting)
                if tap not in self.cut:
                    with contextlib.suppress(OSError):  # the host is gone
                        os.write(tap, frame)

    def _receive(self, tap, frame):
        if tap in self.cut:
            return
        target, self.places[frame[6:12]] = frame[:6], tap
        for other in [self.places[target]] if target in self.places else self.taps:
            if other != tap and self.random.random() >= self.loss:
                self.count += 1
                heapq.heappush(self.waiting, (time.monotonic() + self.delay, self.count, other, frame))


class Host:
    """A host of the network 10.77.0.0/24, number 1 and up; gone when `close` was called, with all its processes."""

    def __init__(self, number, switch, hosts_file):
        self.name, self.address = f"host{number}", f"10.77.0.{number}"
        self.door, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                ["unshare", *(["-U", "-r"] if os.geteuid() else []), "-n", "-u", "-p", "-m", "--fork", "--mount-proc",
                 "--kill-child", sys.executable, "-S", "-c", FIRST, self.name, self.address, str(theirs.fileno()),
                 str(hosts_file)], pass_fds=[theirs.fileno()])
        _, (self.tap,), _, _ = socket.recv_fds(self.door, 10, 1)
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        self.first = int(children.read_text().split()[0])
        switch.taps.append(self.tap)
        self.switch = switch

    def start(self, command, folder, pipes=None, **env):
        """Start a command on the host; its output goes to the end of <host>.txt in a folder, or to (stdin, stdout,
        stderr)."""
        user = ["--user", "--preserve-credentials"] if os.geteuid() else []
        enter = ["nsenter", "--target", str(self.first), *user, "--net", "--uts", "--pid", "--mount", "--"]
        kept = {name: value for name, value in os.environ.items() if name not in ("OPENAI_LOGDIR", "http_proxy",
                                                                                  "https_proxy")}
        kept.update(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME="tap0", **env)
        with open(folder / f"{self.name}.txt", "ab") as output:
            stdin, stdout, stderr = pipes or (subprocess.DEVNULL, output, subprocess.STDOUT)
            return subprocess.Popen([*enter, *map(str, command)], env=kept, cwd=folder, stdin=stdin, stdout=stdout,
                                    stderr=stderr)

    def processes(self):
        """Command lines of the host's processes, but for its first one."""
        listed = subprocess.run(["nsenter", "--target", str(self.first), "--pid", "--mount", "--", "ps", "-eo",
                                 "pid=,stat=,args="], capture_output=True, text=True).stdout.splitlines()
        each = (line.split(maxsplit=2) for line in listed)
        return [line for number, state, *line in each if number != "1" and state[0] != "Z" and "ps" not in line[0][:3]]

    def cut(self, off=True):
        (self.switch.cut.add if off else self.switch.cut.discard)(self.tap)

    def end_all(self):
        """Kill all processes of the host but its first one."""
        subprocess.run(["nsenter", "--target", str(self.first), "--pid", "--mount", "--", sys.executable, "-S", "-c",
                        "import os; os.kill(-1, 9)"], capture_output=True)

    def close(self):
        self.switch.taps.remove(self.tap)
        self.process.kill()  # the first process of the host dies with it, and so do all
        self.process.wait()
        self.door.close()
        os.close(self.tap)


def permitted():
    """Why there can be no hosts on this machine; "" if there can."""
    flags = 0x40000000 | 0x04000000 | 0x20000000 | 0x00020000  # CLONE_NEWNET, NEWUTS, NEWPID, NEWNS
    child = os.fork()
    if child == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        os._exit(libc.unshare(flags | (0x10000000 if os.geteuid() else 0)) and ctypes.get_errno())
    error = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if error:
        return f"no namespaces are permitted here ({os.strerror(error)})"
    if missing := [name for name in ("unshare", "nsenter", "ip", "ps") if not shutil.which(name)]:
        return f"{', '.join(missing)} not found; install util-linux, iproute2 and procps"
    return "" if os.access("/dev/net/tun", os.R_OK | os.W_OK) else "/dev/net/tun is not there"


@contextlib.contextmanager
def hosts(count, folder, seed, delay=0.0, loss=0.0):
    """So many hosts behind a switch."""
    table = folder / "hosts"
    table.write_text("127.0.0.1 localhost\n" + "".join(f"10.77.0.{i} host{i}\n" for i in range(1, count + 1)))
    switch, made = Switch(seed, delay, loss), []
    try:
        for number in range(1, count + 1):
            made.append(Host(number, switch, table))
        yield made
    finally:
        switch.closed.set()
        for host in made:
            host.close()


# ---- runs ----

def words(**flags):
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def training(data, results, **others):
    return [SCRIPTS / "segmentation_train.py", *words(data_dir=data, fit="resize", results_dir=results, visdom_port=0,
                                                      **{**TRAINING, **others})]


def torchrun(rank, port=PORT):
    """Of two hosts, the first of which is host1."""
    return [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}",
            "--master_addr=10.77.0.1", f"--master_port={port}"]


def finish(processes, seconds=PATIENCE):
    """Wait for processes; their exit codes."""
    end = time.monotonic() + seconds
    codes = []
    for process in processes:
        try:
            codes.append(process.wait(max(end - time.monotonic(), 0.01)))
        except subprocess.TimeoutExpired:
            raise Wrong(f"still running after {seconds} seconds") from None
    return codes


def local(command, folder):
    """Run a command on this machine itself to its end."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*map(str, command)], env=env, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise Wrong(f"undisturbed, exit code {done.returncode}: {done.stderr[-2000:]}")


def same_weights(results, reference, step=STEPS):
    """:raises Wrong: unless the last checkpoint of a run is that of another, to the bit."""
    for name in (checkpoint.model_name(step), checkpoint.opt_name(step), checkpoint.ema_name("0.9999", step)):
        if found := differences(*(checkpoint.load(folder / name) for folder in (results, reference)), name):
            raise Wrong(f"not as undisturbed: {found[:3]}")


def read(path):
    return path.read_text(errors="replace") if path.exists() else ""


def wait_until(condition, what, seconds=PATIENCE):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise Wrong(f"{what} did not happen in {seconds} seconds")
        time.sleep(0.02)


# ---- parts ----

def equal(args, root, delay, loss):
    """Two hosts train as two local processes, and share cases as one process draws them; returns a row of the table."""
    folder = root / f"equal-{delay:g}-{loss:g}"
    folder.mkdir()
    with hosts(2, folder, args.seed, delay, loss) as two:
        begin = time.monotonic()
        runs = [host.start([*torchrun(rank), *training(root / "data", folder / "results")], folder)
                for rank, host in enumerate(two)]
        if any(codes := finish(runs)):
            raise Wrong(f"exit codes {codes}: {read(folder / 'host1.txt')[-2000:]}")
        seconds = time.monotonic() - begin
        same_weights(folder / "results", root / "reference")
        for word in ("Traceback", "Error"):
            if word in read(folder / "host1.txt") + read(folder / "host2.txt"):
                raise Wrong(f"{word} in the output")
        command = sampling(root, folder / "masks")
        if any(finish([host.start(command, folder) for host in two])):
            raise Wrong(read(folder / "host1.txt")[-2000:])
    different = [path.name for path in (root / "masks").iterdir()
                 if not (folder / "masks" / path.name).exists()
                 or path.read_bytes() != (folder / "masks" / path.name).read_bytes()]
    if different or len([*(root / "masks").iterdir()]) != len([*(folder / "masks").iterdir()]):
        raise Wrong(f"other masks: {different}")
    return [f"equal, {1000 * delay:g} ms delay, {100 * loss:g} % loss",
            "2 x 1 as 2 local, to the bit; masks to the byte", f"{seconds:.0f}"]


def sampling(root, results):
    return [sys.executable, SCRIPTS / "segmentation_sample.py", *words(
        data_dir=root / "data", fit="resize", model_path=root / "reference" / checkpoint.NEWEST, results_dir=results,
        num_ensemble=3, batch_size=4, visdom_port=0, dist_timeout=TIMEOUT)]


def cut(args, root, rank):
    """A host is cut off in the middle of a step; the processes of both end and say why."""
    folder = root / f"cut-{rank}"
    folder.mkdir()
    with hosts(2, folder, args.seed) as two:
        runs = [host.start([*torchrun(number), *training(root / "data", folder / "results")], folder)
                for number, host in enumerate(two)]
        wait_until(lambda: checkpoint.steps_in(folder / "results"), "the first checkpoint")
        two[rank].cut()
        begin, other = time.monotonic(), folder / f"{two[1 - rank].name}.txt"
        fault = f"on {two[rank].name}) has not answered for"
        wait_until(lambda: fault in read(other), f"a message that names {two[rank].name}", TIMEOUT + 30)
        seconds = time.monotonic() - begin
        line = next(line for line in read(other).splitlines() if fault in line)
        finish(runs, 120)
        if left := [line for host in two for line in host.processes()]:
            raise Wrong(f"left running: {left}")
    return [f"cut, rank {rank}'s host", line.split("error: ")[1].split(". ")[0], f"{seconds:.1f}"]


def rank_on(host, root, folder, rank, address, port):
    """One rank of two on a host, as an elastic launcher named "job" would start it. It is forked off a process that has
    imported torch, which takes longer than all the rest of a round."""
    env = dict(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="tap0", RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK="0",
               LOCAL_WORLD_SIZE="1", MASTER_ADDR=address, MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="job")
    command = [*map(str, training(root / "data", folder / "results"))]
    process = FORKS.Process(target=enter_and_run, args=(host.first, host.name, command, folder, env), daemon=True)
    process.start()
    return process


def enter_and_run(first, name, command, folder, env):
    """Enter the host of a first process and run a script there; each file that it renames into place is noted, as time
    and name, in writes-<host>."""
    libc = ctypes.CDLL(None, use_errno=True)
    files = [os.open(f"/proc/{first}/ns/{kind}", os.O_RDONLY)
             for kind in (["user"] if os.geteuid() else []) + ["net", "uts", "pid", "mnt"]]
    for file in files:
        if libc.setns(file, 0):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(file)
    if child := os.fork():  # which is in the host's list of processes
        os.waitpid(child, 0)
        return
    output = os.open(folder / f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    os.environ.update(env)
    replace = os.replace

    def noted(source, target, **more):
        replace(source, target, **more)
        with open(folder / f"writes-{name}", "a") as log:
            log.write(f"{time.time()} {target}\n")

    os.replace, sys.argv, code = noted, command, 0
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)
    try:
        runpy.run_path(command[0], run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    finally:
        os._exit(code)


def one_round(args, root, number):
    """Returns the rank whose host was cut off, and the step that the others went on from."""
    rng, folder = random.Random(f"{args.seed} {number}"), root / f"round{number}"
    folder.mkdir()
    results, victim = folder / "results", rng.randrange(2)
    with hosts(3, folder, args.seed + number) as three:
        for rank in range(2):
            rank_on(three[rank], root, folder, rank, three[0].address, PORT)
        wait_until(lambda: (results / LOCK).exists(), "the start")
        goal = rng.randrange(2, STEPS - 8, 2)
        wait_until(lambda: (checkpoint.steps_in(results) or [0])[-1] >= goal, f"step {goal}")
        time.sleep(rng.uniform(0, 0.3))
        three[victim].cut()
        others = [host for host in three if host is not three[victim]]
        others[0].end_all()  # the launcher ends what is left of the first start
        for rank, host in enumerate(others):
            rank_on(host, root, folder, rank, others[0].address, PORT + 1)
        first = json.loads((results / LOCK).read_bytes())["generation"]
        wait_until(lambda: not (results / LOCK).exists() or generation(results) not in ("", first), "a new start")
        taken = time.time()
        wait_until(lambda: (results / checkpoint.model_name(STEPS)).exists() and not (results / LOCK).exists(),
                   "the end")
        wait_until(lambda: not any(host.processes() for host in three), "the end of all processes", 60)
        late = [line for line in read(folder / f"writes-{three[victim].name}").splitlines()
                if float(line.split()[0]) > taken]
        if late:
            raise Wrong(f"{three[victim].name} was left behind, and wrote {late}")
        said = read(folder / f"{others[0].name}.txt")
        same_weights(results, root / "reference")
        if left := [path.name for path in results.iterdir() if path.name.endswith(".partial")]:
            raise Wrong(f"left over: {left}")
    return victim, int(said.split("resumed at step ")[1].split()[0])


def generation(results):
    with contextlib.suppress(OSError, ValueError, KeyError):
        return json.loads((results / LOCK).read_bytes())["generation"]
    return ""


def program(path, text, **values):
    """Write a program."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text.format(python=sys.executable, root=str(ROOT), script=str(SCRIPTS / "segmentation_train.py"),
                                **values))
    path.chmod(0o755)


def path_with(folder):
    """PATH with programs of a folder and those that belong to this Python."""
    return os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])


def elastic(args, root):
    """torchrun's own restarts on 2:3 hosts, of which one is cut off and comes back."""
    folder, rng = root / "elastic", random.Random(f"{args.seed} elastic")
    folder.mkdir()
    results, go, log = folder / "results", folder / "go", folder / "results" / "log.txt"
    program(folder / "bin" / "cimd-train", STEPPING, go=str(go))
    flags = training(root / "data", results, max_steps=ELASTIC_STEPS, global_batch=6, dropout=0.0,
                     dist_timeout=20)[1:]
    with hosts(4, folder, args.seed) as four:
        four[3].start([sys.executable, "-c", RENDEZVOUS], folder)

        def launch(host):
            host.start(["sh", ROOT / "scripts" / "launch" / "nodes.sh", *flags], folder, NODES="2:3",
                       RENDEZVOUS="host4:29400", RESTARTS="5", PATH=path_with(folder / "bin"))

        def of(count):
            return f"{count} process(es)"

        def saved():
            return (checkpoint.steps_in(results) or [0])[-1]

        for host in four[:3]:
            launch(host)
        wait_until(lambda: of(3) in read(log) and saved() >= 4, "a run of three hosts")
        victim, before = rng.choice(four[:3]), read(log).count("command:")
        time.sleep(rng.uniform(0, 1))
        victim.cut()
        begin = time.monotonic()
        wait_until(lambda: of(2) in read(log), f"a run of the two hosts but {victim.name}")
        alone = time.monotonic() - begin
        victim.end_all()
        step = saved()
        wait_until(lambda: saved() > step, "a checkpoint of two hosts")
        victim.cut(False)
        launch(victim)
        begin = time.monotonic()
        wait_until(lambda: read(log).count(of(3)) > 1, f"that {victim.name} is taken in")
        back = time.monotonic() - begin
        go.touch()
        wait_until(lambda: (results / checkpoint.model_name(ELASTIC_STEPS)).exists() and not (results / LOCK).exists(),
                   "the end")
        wait_until(lambda: not any(host.processes() for host in four[:3]), "the end of all processes", 60)
    if read(log).count("6 in all") != read(log).count("command:") or read(log).count("command:") < before + 2:
        raise Wrong(read(log)[-2000:])
    position = checkpoint.load(results / checkpoint.opt_name(ELASTIC_STEPS))["position"]
    if position != 6 * ELASTIC_STEPS:
        raise Wrong(f"{position} examples were seen, not {6 * ELASTIC_STEPS}")
    straight, name = folder / "straight", checkpoint.model_name(ELASTIC_STEPS)
    local([sys.executable, SCRIPTS / "segmentation_train.py", *flags, "--results_dir", straight, "--ngpu", 2], root)
    one, other = (checkpoint.load(where / name) for where in (results, straight))
    largest = max(float((one[key] - other[key]).abs().max()) for key in one)
    if largest > 0.01:
        raise Wrong(f"weights differ from those of an undisturbed run by up to {largest:g}")
    steps = [line.split("resumed at step ")[1].split()[0] for line in read(log).splitlines() if "resumed at" in line]
    return [f"elastic, {victim.name} cut off", f"two others went on {alone:.0f} seconds later, three {back:.0f} seconds"
            f" after it was back, from steps {' and '.join(steps)}; weights as undisturbed within {largest:.1g}",
            f"{alone + back:.0f}"]


def doorkeeper(path, made):
    """Start on a host what SSH asks for at a socket; returns what closes it."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()

    def enter(door):
        text, pipes, _, _ = socket.recv_fds(door, 65536, 3)
        name, command = json.loads(text)
        host = next((host for host in made if name in (host.name, host.address)), None)
        code = host.start(["sh", "-c", command], path.parent, pipes).wait() if host else 255
        for pipe in pipes:
            os.close(pipe)
        door.sendall(str(code).encode())
        door.close()

    def serve():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=enter, args=[server.accept()[0]], daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return server


def mpi(args, root):
    """mpiexec over two hosts trains as two local processes do."""
    if not (mpiexec := shutil.which("mpiexec", path=path_with(""))):
        raise Wrong("no mpiexec is installed")
    folder = root / "mpi"
    folder.mkdir()
    program(folder / "bin" / "cimd-train", STEPPING, go=str(root))
    program(folder / "bin" / "ssh", SSH, door=str(folder / "door"))
    with hosts(2, folder, args.seed) as two, doorkeeper(folder / "door", two):
        begin = time.monotonic()
        run = two[0].start(["sh", ROOT / "scripts" / "launch" / "mpi.sh", *training(root / "data",
                                                                                   folder / "results")[1:]], folder,
                           HOSTS="host1,host2", HYDRA_LAUNCHER="ssh", HYDRA_LAUNCHER_EXEC=str(folder / "bin" / "ssh"),
                           MPIR_CVAR_CH4_NETMOD="ofi", FI_PROVIDER="tcp",  # UCX in PyPI's mpich knows no TCP
                           PATH=path_with(folder / "bin"))
        code, = finish([run])
        said = read(folder / "host1.txt")
        if code or "Traceback" in said or "2 process(es)" not in said:
            raise Wrong(f"exit code {code}: {said[-2000:]}")
        seconds = time.monotonic() - begin
        same_weights(folder / "results", root / "reference")
    return [f"mpi, {Path(mpiexec).name} over 2 hosts", "as 2 local processes, to the bit", f"{seconds:.0f}"]


def rounds(args, root):
    found = []
    begin = time.monotonic()
    for number in range(args.rounds):
        try:
            found.append(one_round(args, root, number))
        except Wrong as error:
            raise Wrong(f"round {number}: {error}") from None
        print(f"round {number}: the host of rank {found[-1][0]} was cut off, the others went on from step"
              f" {found[-1][1]}", flush=True)
    ranks = [victim for victim, _ in found]
    return [f"rounds, {args.rounds}", f"rank 0's host cut off: {ranks.count(0)}, rank 1's: {ranks.count(1)}; gone on"
            f" from steps {min(step for _, step in found)} to {max(step for _, step in found)}; none wrong",
            f"{(time.monotonic() - begin) / args.rounds:.0f} a round"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="equal,cut0,cut1,rounds,elastic,mpi",
                        help="any of them, with commas (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=20, help="default %(default)s")
    parser.add_argument("--delay", type=float, default=0.05, help="seconds of a frame on its way (default %(default)s)")
    parser.add_argument("--loss", type=float, default=0.01, help="share of frames that are lost (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default %(default)s")
    args = parser.parse_args()
    if reason := permitted():
        print(f"nothing was done: {reason}")
        sys.exit(77)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ["OMP_NUM_THREADS"] = "1"
    FORKS.set_forkserver_preload(["guided_diffusion.commands.train"])
    root, rows = Path(tempfile.mkdtemp(prefix="hosts-")), []
    phantoms.write_cases(root / "data", CASES, args.seed, 32)
    parts = {"equal": [lambda: equal(args, root, 0, 0), lambda: equal(args, root, args.delay, args.loss)],
             "cut0": [lambda: cut(args, root, 0)], "cut1": [lambda: cut(args, root, 1)],
             "rounds": [lambda: rounds(args, root)], "elastic": [lambda: elastic(args, root)],
             "mpi": [lambda: mpi(args, root)]}
    wrong, wanted = [], args.parts.split(",")
    if {"equal", "rounds", "mpi"} & {*wanted}:
        local([sys.executable, *training(root / "data", root / "reference"), "--ngpu", 2], root)
    if "equal" in wanted:
        local(sampling(root, root / "masks"), root)
    for part in wanted:
        for job in parts[part]:
            try:
                rows.append(job())
                print(" | ".join(rows[-1]), flush=True)
            except Wrong as error:
                wrong.append(f"{part}: {error}")
                print(f"wrong: {wrong[-1]}", flush=True)
    print(markdown([["part", "what came of it", "seconds"], *rows]))
    if wrong:
        print(f"{len(wrong)} wrong; all that was written is kept in {root}")
        sys.exit(1)
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
