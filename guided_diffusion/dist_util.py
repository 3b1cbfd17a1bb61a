"""Processes, ranks and devices: one script under python, torch.distributed.launch, torchrun or mpiexec."""

import contextlib
import os
import socket
import sys

import torch
import torch.distributed as dist

from .errors import InputError


def setup_dist(ngpu=0, local_rank=None):
    """Join the processes that the launcher started; alone, do nothing.

    Understands torchrun and torch.distributed.launch (RANK, WORLD_SIZE, ... in the environment) and mpiexec (through
    mpi4py, imported only then). NCCL with CUDA, gloo without.

    :param ngpu: the number of processes the user asked for, 0 for as many as there are. Started alone with more
        than 1, the script starts itself again that many times with torchrun.
    :param local_rank: what old launchers pass as a flag; newer ones set LOCAL_RANK, which wins.
    """
    if local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(local_rank))
    if "WORLD_SIZE" not in os.environ and _mpi_size() > 1:
        _environment_from_mpi()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if ngpu > 1 and "WORLD_SIZE" not in os.environ:
        os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                  f"--nproc_per_node={ngpu}", *sys.argv])
    if ngpu and ngpu != world_size:
        raise InputError(f"--ngpu {ngpu}, but the launcher started {world_size} process(es); leave --ngpu away")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        # asked of the number of processes, not of this one's own GPU: rank 0, which speaks to the user, must see it too
        processes = max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), local_rank + 1)
        if processes > torch.cuda.device_count():
            raise InputError(f"{processes} processes on a machine with {torch.cuda.device_count()} GPU(s) visible;"
                             f" start at most that many (--nproc_per_node, or --ngpu)")
        torch.cuda.set_device(local_rank)
    elif world_size > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun sets 1 where the user sets none
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        torch.set_num_threads(max(1, _cpus() // local_size))
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def launch_rank():
    """The rank the launcher gave this process, known before the processes have joined."""
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def _mpi_size():
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):  # Open MPI; MPICH, Intel MPI and their kin
        if name in os.environ:
            return int(os.environ[name])
    return 1


def _environment_from_mpi():
    """Set the variables that torchrun would have set."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)
    if world.rank == 0:
        one_machine = local.size == world.size
        address = "127.0.0.1" if one_machine else socket.gethostbyname(socket.getfqdn())
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
    else:
        address = port = None
    address, port = world.bcast((address, port))
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(local.rank),
                      LOCAL_WORLD_SIZE=str(local.size), MASTER_ADDR=address, MASTER_PORT=str(port))


def _cpus():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cleanup():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def dev():
    """The device of this process."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def to_device(tensor, device):
    """A CPU tensor on a device, without waiting for what that is busy with."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def all_gather_objects(value):
    """`value` of every rank, as a list in the order of ranks."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather(tensor):
    """Equally shaped tensors of every rank, concatenated along the first axis in the order of ranks."""
    if not dist.is_initialized():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


@contextlib.contextmanager
def all_ranks_or_none():
    """An InputError that any rank meets inside is raised on every rank, so that none waits for one that left."""
    error = None
    try:
        yield
    except InputError as caught:
        error = caught
    first = next((message for message in all_gather_objects(error and str(error)) if message), None)
    if first:
        raise InputError(first, on_every_rank=True)


class StopFlag:
    """Whether any rank wants to stop, agreed by all at the same step, without waiting for the slowest twice.

    The answer to each call's question is read at the next call, when it has long arrived.
    """

    def __init__(self):
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.pending = None

    def __call__(self, wanted):
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
