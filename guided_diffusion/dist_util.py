"""Processes, ranks and devices: one script under python, torch.distributed.launch, torchrun, mpiexec or srun."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import logger
from .system import launchers, rank_watch
from .system.errors import InputError
from .system.terminal import program_name

watch: rank_watch.RankWatch | None = None  # that of this process, if it is one of several
_FOREVER = timedelta(days=365)  # ends a collective: never, since it is the watch that looks for ranks that hang


def setup_dist(ngpu: int = 0, local_rank: int | None = None, timeout: float = 600,
               program: Sequence[str] | None = None, apart: bool = False) -> None:
    """Join the processes that the launcher started; alone, do nothing.

    Understands torchrun and torch.distributed.launch (RANK, WORLD_SIZE, ... in the environment), mpiexec (through
    mpi4py, imported only then) and srun. NCCL with CUDA, gloo without.

    :param ngpu: the number of processes the user asked for, 0 for as many as there are. Started alone with more
        than 1, the script starts itself again that many times, and leaves with their exit code.
    :param local_rank: what old launchers pass as a flag; newer ones set LOCAL_RANK, which wins.
    :param timeout: seconds to wait for processes to join, and later until one that hangs ends the run.
    :param apart: for those: one that dies does not end the others.
    :param program: the words that start this program again with all its flags; None for python and this script.
    :raises InputError: if they do not join, their launchers contradict each other, or there are more of them than
        GPUs.
    """
    global watch
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    launchers.complete_environment()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if ngpu > 1 and "WORLD_SIZE" not in os.environ:
        launch = _launch_apart if apart else _launch
        sys.exit(launch(ngpu, program or [sys.executable, "-u", *sys.argv]))
    if ngpu and ngpu != world_size:
        raise InputError(f"--ngpu {ngpu}, but the launcher started {world_size} process(es); leave --ngpu away",
                         on_every_rank=True)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        # asked of the number of processes, not of this one's own GPU: rank 0, which speaks to the user, must see it too
        processes = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), local_rank + 1)
        if os.environ.get("SLURM_GPUS_PER_TASK") == "1" and torch.cuda.device_count() == 1:
            local_rank, processes = 0, 1  # each task sees its own GPU alone
        if processes > torch.cuda.device_count():
            raise InputError(f"{processes} processes on a machine with {torch.cuda.device_count()} GPU(s) visible;"
                             f" start at most that many (--nproc_per_node, or --ngpu)", on_every_rank=True)
        torch.cuda.set_device(local_rank)
    elif world_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun sets 1 where the user sets none
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        torch.set_num_threads(max(1, _cpus() // local_size))
    if world_size > 1 and not dist.is_initialized():
        _join(timeout)
        watch = rank_watch.connect(rank(), world_size, launchers.known_address(os.environ["MASTER_ADDR"]),
                                   all_gather_objects, timeout)
        if watch is None and rank() == 0:
            logger.log("ranks cannot reach rank 0 on a port of its own: one that hangs will not be noticed")


def _join(timeout):
    if os.environ.get("MASTER_ADDR"):
        launchers.refuse_unknown_host(os.environ["MASTER_ADDR"])
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    apart = (f"the processes could not join at {where} within --dist_timeout {timeout:g} seconds; was each of them"
             f" started, with the same address, and does no firewall stand between them?")

    joined = threading.Event()

    def look_after():
        end = time.monotonic() + timeout + 5  # for what has no timeout of its own
        while not joined.wait(0.5):
            if time.monotonic() > end or rank_watch.orphaned():
                print(f"{program_name()}: error: {apart}", file=sys.stderr, flush=True)
                os._exit(2)

    threading.Thread(target=look_after, daemon=True).start()
    try:
        store, number, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
        if os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") != "1":
            # torchrun keeps its store when it starts the processes again, and with it the addresses of those before
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store,
                                rank=number, world_size=size, timeout=_FOREVER)
    except (KeyError, ValueError, RuntimeError) as error:  # dist.DistError is a RuntimeError
        if "EADDRINUSE" in str(error):
            raise InputError(f"--master_port: {where} is taken by another program; give another port") from None
        raise InputError(f"{apart} ({str(error).strip().splitlines()[0]})") from None
    finally:
        joined.set()


def _launch_apart(ngpu, program):
    """Run the words of a program in so many processes that end by themselves; returns the exit code of rank 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {**os.environ, "WORLD_SIZE": str(ngpu), "LOCAL_WORLD_SIZE": str(ngpu), "MASTER_ADDR": "127.0.0.1",
           "MASTER_PORT": str(port), rank_watch.LAUNCHED_APART: "1"}
    # in sessions of their own, so that Ctrl-C reaches them once
    processes = [subprocess.Popen(program, env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                                  start_new_session=True) for rank in range(ngpu)]

    def pass_on(number, frame):
        for process in processes:
            process.send_signal(number)

    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), pass_on)
    while any([process.poll() is None for process in processes]):  # each: one that is not asked stays among the running
        time.sleep(0.2)
    codes = [process.returncode for process in processes]
    if killed := [f"rank {rank} (process {processes[rank].pid})" for rank, code in enumerate(codes) if code < 0]:
        print(f"{program_name()}: {', '.join(killed)} did not end by itself", file=sys.stderr, flush=True)
    return codes[0] if codes[0] >= 0 else 128 - codes[0]


def _launch(ngpu, program):
    """Run the words of a program in so many processes under torchrun; returns the exit code of the run."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    def pass_on(number, frame):
        raise SignalException(f"signal {number}", signal.Signals(number))

    if hasattr(signal, "SIGUSR1"):  # torchrun passes on the others by itself
        signal.signal(signal.SIGUSR1, pass_on)
    try:
        run(parse_args(["--standalone", f"--nproc_per_node={ngpu}", "--no-python", *program]))
    except SignalException as stop:
        return 128 + stop.sigval
    except ChildFailedError as error:
        return max(1, *(failure.exitcode for failure in error.failures.values()))
    return 0


def _cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cleanup(failed: bool = False) -> None:
    """Leave the process group, if there is one; `failed` ends the other ranks, too."""
    global watch
    if watch:
        watch.close(failed)
        watch = None
    if dist.is_initialized():
        dist.destroy_process_group()


def part() -> None:
    """Leave the other processes, from which this one needs nothing any more; only its launcher's death still ends it.
    `rank` and `world_size` are those of a process alone from here on."""
    cleanup()

    def look_after():
        while not rank_watch.orphaned():
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    if rank_watch.PARENT is not None:
        threading.Thread(target=look_after, daemon=True).start()


def at(place: Sequence[int] | None, doing: str = "") -> None:
    """Tell the other ranks how far this one is, see RankWatch.at."""
    if watch:
        watch.at(place, doing)


def run_has_ended() -> bool:
    """Whether a collective has just failed because another rank ended, which the watch has then reported."""
    return watch is not None and watch.found.wait(5)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def dev() -> torch.device:
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_of(module: torch.nn.Module) -> torch.device:
    """The device that a module's parameters are on."""
    return next(module.parameters()).device


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on a device, without waiting for what that is busy with."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def refuse_unlike(facts: dict[str, str], remedy: str) -> None:
    """Compare what every rank says, by name, with what rank 0 says.

    :raises InputError: on every rank, naming the first rank that says otherwise, its machine if it is another, and what
        differs.
    """
    (home, first), *others = all_gather_objects([socket.gethostname(), facts])
    for number, (host, other) in enumerate(others, 1):
        where = "" if host == home else f" of {host}"
        unlike = [f"{name} ({first.get(name)} on rank 0, {other.get(name)} on rank {number}{where})"
                  for name in {**first, **other} if other.get(name) != first.get(name)]
        if unlike:
            raise InputError(f"{', '.join(unlike)}: {remedy}", on_every_rank=True)


def all_gather_objects(value: Any) -> list[Any]:
    """`value` of every rank, as a list in the order of ranks: numbers, strings, tensors, and lists and dicts of them.

    What comes from the network is read as weights only, so that it cannot run code.
    """
    if not dist.is_initialized():
        return [value]
    data = _packed(value)
    sizes = all_gather(torch.tensor([len(data)])).tolist()
    padded = torch.zeros(max(sizes), dtype=torch.uint8)
    padded[:len(data)] = data
    parts = all_gather(padded).split(max(sizes))
    return [_unpacked(part[:size]) for part, size in zip(parts, sizes)]


def from_first_rank(work: Callable[[], Any]) -> Any:
    """What `work`, which rank 0 alone calls, returns there: as `all_gather_objects` takes it.

    :raises InputError: on every rank, if `work` raised it.
    """
    if not dist.is_initialized():
        return work()
    said = None
    if dist.get_rank() == 0:
        try:
            said = [work(), None]
        except InputError as error:
            said = [None, str(error)]
    data = _packed(said)
    size = torch.tensor([len(data)])
    dist.broadcast(size, 0)
    if dist.get_rank() > 0:
        data = torch.empty(size.item(), dtype=torch.uint8)
    dist.broadcast(data, 0)
    result, problem = _unpacked(data)
    if problem is not None:
        raise InputError(problem, on_every_rank=True)
    return result


def _packed(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _unpacked(data):
    return torch.load(io.BytesIO(data.numpy()), map_location="cpu", weights_only=True)


def all_gather(tensor: Tensor) -> Tensor:
    """Equally shaped tensors of every rank, concatenated along the first axis in the order of ranks."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def all_gather_rows(tensor: Tensor) -> Tensor:
    """Tensors of every rank on the CPU, concatenated in the order of ranks; the first axis may be of any length."""
    return torch.cat(all_gather_objects(tensor.cpu()))


def all_reduce_in_bf16(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A communication hook for DistributedDataParallel: the mean over ranks of a bucket of gradients, sent as bfloat16.

    As torch's own bf16_compress_hook, which DDP takes with NCCL only; gloo can do the same.
    """
    gradients = bucket.buffer()
    sent = gradients.to(torch.bfloat16).div_(dist.get_world_size())
    return dist.all_reduce(sent, async_op=True).get_future().then(lambda done: gradients.copy_(done.value()[0]))


@contextlib.contextmanager
def all_ranks_or_none() -> Iterator[None]:
    """An InputError that any rank meets inside is raised on every rank, so that none waits for one that left; it names
    the rank if not all of them met it."""
    error = None
    try:
        yield
    except InputError as caught:
        error = caught
        at(None)  # the others may take their time to get here
    messages = all_gather_objects(error and str(error))
    first = next((message for message in messages if message), None)
    if first:
        where = "" if set(messages) == {first} else f"on rank {messages.index(first)}: "
        raise InputError(where + first, on_every_rank=True)


class StopFlag:
    """Whether any rank wants to stop, agreed by all at the same step, without waiting for the slowest twice.

    The answer to each call's question is read at the next call, when it has long arrived.
    """

    def __init__(self):
        self.group = dist.new_group(backend="gloo", timeout=_FOREVER) if dist.is_initialized() else None
        self.pending = None

    def __call__(self, wanted: bool) -> bool:
        """Called once a step by every rank with its own wish; returns what all agree on."""
        if self.group is None:
            return wanted
        agreed = False
        if self.pending:
            flag, work = self.pending
            work.wait()
            agreed = bool(flag.item())
        flag = torch.tensor([int(wanted)])
        self.pending = flag, dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        return agreed
