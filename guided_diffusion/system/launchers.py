"""What launchers tell a process: torchrun and torch.distributed.launch, MPI, SLURM, each in variables of its own.

Of those of the others, the ones that torchrun would have set are made: RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE,
MASTER_ADDR and MASTER_PORT. An address or a port that the user has set stays.
"""

import contextlib
import os
import re
import socket
import struct
import sys
from collections.abc import Mapping

from . import packages
from .errors import InputError

ELSEWHERE = "192.0.2.1"  # an address for examples (RFC 5737), which no machine has: the way there is the default one


def launch_rank() -> int:
    """The rank the launcher gave this process, known before the processes have joined."""
    names = ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"]
    if by_slurm(os.environ):
        names.insert(0, "SLURM_PROCID")
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


def complete_environment() -> None:
    """Set the variables that torchrun sets, where another launcher started this process.

    :raises InputError: if launchers contradict each other.
    """
    refuse_contradictions(os.environ)
    if "WORLD_SIZE" not in os.environ:
        if _mpi_size() > 1:
            _take_from_mpi()
        elif by_slurm(os.environ):
            for name, value in variables_from_slurm(os.environ).items():
                os.environ.setdefault(name, value)
    if _several_machines() and "GLOO_SOCKET_IFNAME" not in os.environ:
        # else gloo takes the address that /etc/hosts has for this machine's name, which may be its own loopback
        with contextlib.suppress(OSError, KeyError):
            names = {address: name for name, address in interfaces().items()}
            os.environ["GLOO_SOCKET_IFNAME"] = names[routed_address(os.environ.get("MASTER_ADDR", ELSEWHERE))]


def _several_machines():
    ranks = os.environ.get("WORLD_SIZE", "1")
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks)) < int(ranks)


# ---- addresses ----

def routed_address(other: str = ELSEWHERE) -> str:
    """The IPv4 address that this machine has on its way to another one; nothing is sent.

    To itself that is the address others know, not what /etc/hosts may have for its name: the one on the way out, or its
    only one. OSError if there is none.
    """
    for host in (other, ELSEWHERE):
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            address = probe.getsockname()[0]
            if not address.startswith("127."):
                return address
    outside = [address for address in interfaces().values() if not address.startswith("127.")]
    if len(outside) != 1:
        raise OSError(f"no way from {socket.gethostname()} to {other}, and {len(outside)} addresses to choose from")
    return outside[0]


def interfaces() -> dict[str, str]:
    """The IPv4 address of each network interface that has one, by its name; {} off Linux."""
    found = {}
    if sys.platform.startswith("linux"):
        import fcntl

        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for _, name in socket.if_nameindex():
                with contextlib.suppress(OSError):  # one without an address
                    answer = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name.encode()))  # SIOCGIFADDR
                    found[name] = socket.inet_ntoa(answer[20:24])
    return found


def known_address(name: str) -> str:
    """This machine's own name; or an address that others know, where it is one of several and its /etc/hosts has the
    name for itself alone."""
    with contextlib.suppress(OSError):
        if _several_machines() and socket.gethostbyname(name).startswith("127."):
            return routed_address(name)
    return name


def refuse_unknown_host(address: str) -> None:
    """InputError if the name of rank 0's machine does not resolve here."""
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        raise InputError(f"MASTER_ADDR (or --master_addr, --rdzv_endpoint) {address}: does not resolve on"
                         f" {socket.gethostname()} ({error.strerror or error}); give rank 0's machine by a name that"
                         f" all others know, or by its IP address") from None


# ---- MPI ----

def _mpi_size():
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):  # Open MPI; MPICH, Intel MPI and their kin
        if name in os.environ:
            return int(os.environ[name])
    return 1


def _take_from_mpi():
    packages.require("mpi4py", "mpiexec")
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED)  # the ranks of this machine
    own, names = bytearray(MPI.Get_processor_name().encode()[:255].ljust(256)), bytearray(256 * world.size)
    world.Allgather(own, names)  # as bytes, which need no pickle
    address = port = None
    if world.rank == 0:
        hosts = [bytes(names[i:i + 256]).decode().strip() for i in range(0, len(names), 256)]
        address = "127.0.0.1"
        if local.size < world.size:
            other = next((host for host in hosts if host != hosts[0]), ELSEWHERE)
            try:
                address = routed_address(other)
            except OSError:
                address = hosts[0]
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
    where = bytearray(f"{address} {port}".encode().ljust(300))
    world.Bcast(where)
    address, port = where.decode().split()
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(local.rank),
                      LOCAL_WORLD_SIZE=str(local.size))
    os.environ.setdefault("MASTER_ADDR", address)
    os.environ.setdefault("MASTER_PORT", port)


# ---- SLURM ----

def by_slurm(variables: Mapping[str, str]) -> bool:
    """Whether srun itself started this process, rather than a shell, torchrun or MPI under it."""
    others = ("TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
    return "SLURM_STEP_ID" in variables and "SLURM_PROCID" in variables and not any(n in variables for n in others)


def _tasks(variables):
    """The tasks of the step, not of the job: a shell in a job is a step of one task."""
    return int(variables.get("SLURM_STEP_NUM_TASKS", variables.get("SLURM_NTASKS", "1")))


def variables_from_slurm(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables of torchrun out of srun's; {} of a step of one task."""
    tasks = _tasks(variables)
    if tasks == 1:
        return {}
    nodes = next((variables[name] for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST")
                  if name in variables), "127.0.0.1")
    counts = tasks_of_nodes(variables.get("SLURM_STEP_TASKS_PER_NODE", variables.get("SLURM_TASKS_PER_NODE", "")))
    node = int(variables.get("SLURM_NODEID", "0"))
    job, step = (int(variables.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return {"RANK": variables["SLURM_PROCID"], "WORLD_SIZE": str(tasks),
            "LOCAL_RANK": variables.get("SLURM_LOCALID", "0"),
            "LOCAL_WORLD_SIZE": str(counts[node] if node < len(counts) else tasks),
            "MASTER_ADDR": first_host(nodes),
            # the same in all tasks; below the ports that systems give out by themselves
            "MASTER_PORT": str(20000 + (7 * job + step) % 10000)}


def first_host(nodes: str) -> str:
    """The first host of a list as SLURM writes it: "gpu[007-009,12],login" -> "gpu007"."""
    first = re.match(r"(?:[^,\[]|\[[^]]*])*", nodes)[0]
    return re.sub(r"\[(\w+)[^]]*]", r"\1", first)


def tasks_of_nodes(text: str) -> list[int]:
    """Tasks a node as SLURM writes them: "4(x2),3" -> [4, 4, 3]."""
    return sum(([int(tasks)] * int(times or 1) for tasks, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", text)), [])


def refuse_contradictions(variables: Mapping[str, str]) -> None:
    """InputError if SLURM and what else started this process do not agree on the processes there are."""
    if "SLURM_STEP_ID" not in variables or "SLURM_PROCID" not in variables:
        return
    tasks = _tasks(variables)
    if "TORCHELASTIC_RUN_ID" in variables:
        if tasks > 1 and variables.get("GROUP_WORLD_SIZE") == "1" and variables.get("TORCHELASTIC_MAX_RESTARTS") == "0":
            raise InputError(f"srun started {tasks} tasks, and torchrun in each of them a run of its own, all with the"
                             f" same results folder; give torchrun --nnodes={tasks} and --rdzv_endpoint, or srun"
                             f" --ntasks=1, or leave torchrun away", on_every_rank=True)
    elif by_slurm(variables):
        for name, own, value in (("RANK", "SLURM_PROCID", variables["SLURM_PROCID"]),
                                 ("WORLD_SIZE", "SLURM_NTASKS", str(tasks))):
            if variables.get(name, value) != value:
                raise InputError(f"{name} is {variables[name]}, but srun's {own} is {value}; unset RANK, WORLD_SIZE and"
                                 f" LOCAL_RANK, which come from SLURM by themselves", on_every_rank=True)
