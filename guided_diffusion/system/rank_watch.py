"""Whether all processes of a distributed run are alive and get on.

A collective waits for a rank that hangs for as long as it is let. Here every rank tells rank 0 once a second how far
it is, on a thread and a TCP connection of its own, and rank 0 answers. A rank that falls silent, breaks off, or stays
where it is for too long ends the run on every rank, with one message that names it.
"""

import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

from .terminal import program_name

LAUNCHED_APART = "GUIDED_DIFFUSION_LAUNCHED"  # in the environment of processes that dist_util starts without torchrun
# set by launchers that outlive their processes: torchrun, Open MPI, MPICH and its kin
_LAUNCHED = ("TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", LAUNCHED_APART)
PARENT = os.getppid() if any(name in os.environ for name in _LAUNCHED) else None


def orphaned() -> bool:
    """Whether the launcher of this process has died."""
    if PARENT == 1:  # init took over before this module was read, or the launcher is process 1 of a container
        with contextlib.suppress(OSError), open("/proc/1/cmdline", "rb") as file:
            return b"python" not in file.read()
    return PARENT is not None and os.getppid() != PARENT


class _Fault(Exception):
    """What ends the run, in words; "" if it has been reported already."""


class RankWatch:
    """The watch of one rank, on a thread of its own until `close`.

    Time is counted in ticks of that thread, so that a run that was stopped as a whole (Ctrl-Z) may go on afterwards.

    :param peers: this rank's connections: rank 0's to each other rank, {rank: socket}; theirs to it, {0: socket}.
    :param timeout: seconds of silence, or of standing still (see `at`), after which a rank counts as hanging.
    """

    state: dict[str, Any]  # what it says of itself

    def __init__(self, rank: int, peers: dict[int, socket.socket], timeout: float):
        self.rank, self.peers, self.timeout = rank, peers, timeout
        self.tick = min(1.0, timeout / 10)
        self.found = threading.Event()  # set when the run has to end
        self.before_exit = lambda: None  # called before the end of a process that cannot leave by itself
        self.state = {"name": f"rank {rank} (process {os.getpid()} on {socket.gethostname()})", "place": None,
                      "doing": "", "done": False}
        self._states = {}  # what each rank said last
        self._silent = dict.fromkeys(peers, 0)  # ticks since then
        self._still = dict.fromkeys([rank, *peers], 0)  # ticks since its place changed
        self._unread = dict.fromkeys(peers, b"")
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def at(self, place: Sequence[int] | None, doing: str = "") -> None:
        """Say how far this rank is, and in words what it does there.

        :param place: a tuple that grows; of ranks that stand still, the others wait for the one with the smallest.
            None lets this rank take its time.
        """
        self.state = {**self.state, "place": place and list(place), "doing": doing}

    def close(self, failed: bool = False) -> None:
        """Leave, without alarming the others; or, if this rank has failed and said why, end them, too."""
        self.state = {"fault": ""} if failed else {**self.state, "done": True}
        self._closed.set()
        self._thread.join()

    # ---- the thread ----

    def _run(self):
        try:
            while not self._closed.is_set():
                self._tell(self.state)
                self._listen(time.monotonic() + self.tick)
                self._judge()
                if orphaned():
                    os.kill(os.getpid(), signal.SIGTERM)
                    self._closed.wait()
            self._tell(self.state)
        except _Fault as fault:
            self._end(str(fault))
        for peer in self.peers.values():
            peer.close()

    def _tell(self, message):
        line = json.dumps(message).encode() + b"\n"
        for peer in self.peers.values():
            with contextlib.suppress(OSError):  # reading will show it
                peer.sendall(line)

    def _listen(self, end):
        """Hear what the others say, until a time or until this rank leaves."""
        while (left := end - time.monotonic()) > 0 and not self._closed.wait(0 if self.peers else left):
            for peer in wait(self.peers.values(), min(left, 0.1)):
                rank = next(rank for rank in self.peers if self.peers[rank] is peer)
                try:
                    data = peer.recv(1 << 16)
                except OSError:
                    data = b""
                *lines, self._unread[rank] = (self._unread[rank] + data).split(b"\n")
                for line in lines:
                    self._note(rank, json.loads(line))
                if not data:
                    self.peers.pop(rank).close()
                    del self._silent[rank]
                    if not self._states.get(rank, {}).get("done"):
                        raise _Fault(f"{self._name(rank)} has died; what it had to say is above")

    def _note(self, rank, state):
        if "fault" in state:
            raise _Fault(state["fault"])
        if state["place"] != self._states.get(rank, {}).get("place"):
            self._still[rank] = 0
        self._states[rank], self._silent[rank] = state, 0

    def _judge(self):
        """Look for ranks that hang; only rank 0 knows how far all of them are."""
        for ticks in (self._silent, self._still):
            ticks.update({rank: n + 1 for rank, n in ticks.items()})
        most = self.timeout / self.tick
        for rank, ticks in self._silent.items():
            if ticks > most:
                raise _Fault(f"{self._name(rank)} has not answered for {self.timeout:g} seconds")
        if self.rank == 0:
            self._note(0, self.state)
            del self._silent[0]
            still = [(self._still[rank], state["place"], rank) for rank, state in self._states.items()
                     if state["place"] and not state["done"]]
            if any(ticks > most for ticks, _, _ in still):
                _, rank = min((place, rank) for ticks, place, rank in still if ticks > most / 2)
                raise _Fault(f"{self._name(rank)} has been {self._states[rank]['doing']} for {self.timeout:g} seconds")

    def _name(self, rank):
        return self._states.get(rank, {}).get("name", f"rank {rank}")

    def _end(self, fault):
        """End this process and, through rank 0, all others."""
        if fault and self.rank <= 1:  # what the others find by themselves is that rank 0 is gone, as rank 1 does
            print(f"{program_name()}: error: {fault}. The run ends; the same command goes on from what is saved",
                  file=sys.stderr, flush=True)
        self._tell({"fault": ""})
        self.found.set()
        self._closed.wait(2)  # a collective that failed lets the main thread leave by itself
        self.before_exit()
        os._exit(1)


def connect(rank: int, world_size: int, address: str, gather: Callable[[Any], list[Any]], timeout: float
            ) -> RankWatch | None:
    """Start the watch of a rank; None where the ranks cannot reach rank 0's machine.

    :param address: of rank 0's machine, as rank 0 knows it; gather: what gathers an object from every rank.
    """
    listener, port, token = None, None, secrets.token_hex(16)
    with contextlib.suppress(OSError):
        if rank == 0:
            family, _, _, _, where = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
            listener = socket.create_server(where, family=family, backlog=world_size)
            port = listener.getsockname()[1]
    port, token, address = gather((port, token, address))[0]
    peers = {}
    with contextlib.suppress(OSError):
        if rank > 0 and port:
            peers[0] = socket.create_connection((address, port), timeout=10)
            peers[0].sendall(f"{token} {rank}\n".encode())
        while listener and len(peers) < world_size - 1:  # whoever else knocks knows no token
            listener.settimeout(20)
            peer, _ = listener.accept()
            peer.settimeout(10)
            word, _, number = peer.makefile("rb").readline(100).partition(b" ")
            if secrets.compare_digest(word, token.encode()):
                peers[int(number)] = peer
    if listener:
        listener.close()
    if not all(gather(len(peers) == (world_size - 1 if rank == 0 else 1))):
        return None
    return RankWatch(rank, peers, timeout)
