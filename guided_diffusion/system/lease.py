"""Leases: files that say which process works at something, for all machines that share a folder or a bucket.

A lease is written only if there is none, renewed while it is held, and removed when it is given back. It is taken away
from a process that has died, at once on the machine that this is seen from, else when nobody has seen it renewed for a
time. What counts is the time of the one that looks on: clocks of machines are not compared.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from typing import NamedTuple

from . import storage
from .errors import InputError

MOST_BYTES = 4096  # of a lease that is read


class Lost(InputError):
    """Another process has taken over what this one held: it must not write any more."""


class Holder(NamedTuple):
    """What a lease says of the process that holds it."""

    host: str = "another process"
    pid: int = 0
    since: str = "?"  # when it took the lease, by its own clock
    machine: str = ""  # within which its number is a process's own, "" if that is not known
    job: str = ""  # one whose processes never run twice at a time takes over from itself, "" for none
    doing: str = ""  # a word for what it does
    generation: str = ""  # a word of its own for each start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since})" if self.pid else self.host


class _Sight(NamedTuple):
    """How a lease was seen last."""

    what: tuple
    since: float  # when it was first seen to be that
    renewed: bool  # whether it was another before


def _machine():
    """What tells one table of processes from another: containers of one name may have their own."""
    with contextlib.suppress(OSError):
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


class Leases:
    """The leases that this process holds, renewed by a thread of its own until `close`.

    :param timeout: seconds without renewal after which a lease may be taken away.
    :param job: a name that all starts of one elastic job share, of which the launcher lets only the newest run.
    :param doing: a word for what is done, for others to read.
    """

    def __init__(self, timeout: float, job: str = "", doing: str = ""):
        self.timeout, self.interval = timeout, min(5.0, timeout / 10)
        self.me = Holder(socket.gethostname(), os.getpid(), time.strftime("%Y-%m-%d %H:%M:%S %Z"), _machine(), job,
                         doing, secrets.token_hex(8))
        self.renewals = 0
        self.lost: set[str] = set()  # those that were found to be others' when they were to be renewed
        self._held: set[str] = set()
        self._seen: dict[str, _Sight] = {}  # others' leases
        self._busy, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def take(self, path: storage.AnyPath) -> Holder | None:
        """Take a lease; None, or the process that has it. That may be found to be gone at a later call.

        :raises OSError: if no file can be written there.
        """
        path = str(path)
        if not storage.is_remote(path):
            storage.replace_link(path)
        while not storage.write_new(path, self._text()):
            seen = self._look(path)
            if seen is None:
                continue  # given back meanwhile
            holder = _read(seen[0])
            if holder.generation == self.me.generation:  # written by an attempt that was thought to have failed
                break
            if not self._is_gone(holder, path, seen):
                return holder
            if storage.write_over(path, seen[0], self._text()):
                break
        self._seen.pop(path, None)
        with self._busy:
            self._held.add(path)
        return None

    def holds(self, path: storage.AnyPath) -> bool:
        """Whether a lease that was taken is still this process's."""
        holder = self.holder(path)
        return holder is not None and holder.generation == self.me.generation

    def renewed(self, path: storage.AnyPath) -> bool:
        """Whether another process was seen to renew a lease that could not be taken."""
        return self._seen[str(path)].renewed

    def holder(self, path: storage.AnyPath) -> Holder | None:
        """The process that has a lease now."""
        seen = self._look(str(path))
        return seen and _read(seen[0])

    def give_back(self, path: storage.AnyPath) -> None:
        """Remove a lease, if it is this process's."""
        with self._busy:
            self._held.discard(str(path))
        with contextlib.suppress(OSError):
            if self.holds(path):
                storage.remove(path)

    def close(self) -> None:
        """Give back all leases."""
        self._closed.set()
        self._thread.join()
        for path in sorted(self._held):
            self.give_back(path)

    def _text(self):
        return json.dumps({**self.me._asdict(), "renewals": self.renewals}).encode()

    def _look(self, path):
        """A lease's bytes and, on a disk, when it was renewed by the disk's clock; None if there is none."""
        try:
            if storage.is_remote(path):
                return storage.read_bytes(path), 0
            with open(path, "rb") as file:
                return file.read(MOST_BYTES), os.fstat(file.fileno()).st_mtime_ns
        except FileNotFoundError:
            return None

    def _is_gone(self, holder, path, seen):
        before = self._seen.get(path)
        if before is None or before.what != seen:
            before = self._seen[path] = _Sight(seen, time.monotonic(), renewed=before is not None)
        if holder.job and holder.job == self.me.job:
            return True
        if holder.machine == self.me.machine and (holder.pid == os.getpid() or not storage.runs(holder.pid)):
            return True  # numbers come round again: that of this process was another's
        return time.monotonic() - before.since > self.timeout

    def _run(self):
        while not self._closed.wait(self.interval):
            self.renewals += 1
            with self._busy:
                for path in self._held:
                    with contextlib.suppress(Exception):  # a disk that fails for a while; a bucket raises anything
                        self._renew(path)

    def _renew(self, path):
        seen = self._look(path)
        if seen is None or _read(seen[0]).generation != self.me.generation:
            self.lost.add(path)
        elif storage.is_remote(path):
            storage.write_over(path, seen[0], self._text())
        else:
            os.utime(path)


class OneWriter(contextlib.AbstractContextManager):
    """That this process alone writes into a folder, within its `with`.

    A process that others take for gone may still run, and reach the folder when they have gone on without it: each of
    its writes asks first, and then raises Lost.

    :param name: of the lease in the folder; flag: that the folder comes from; doing: what is done, for the message.
    :param timeout: seconds after which one that does not renew its lease is taken for gone.
    :param job: as Leases takes it.
    :raises InputError: if another process has the folder, or nothing can be written there.
    """

    def __init__(self, folder: storage.AnyPath, name: str, flag: str, doing: str, timeout: float, job: str = ""):
        self.folder, self.path = folder, storage.join(folder, name)
        self.leases = Leases(timeout, job)
        try:
            self._take(flag, doing)
        except OSError as error:
            self.leases.close()
            raise InputError(f"{flag} {folder}: {name} cannot be written ({error.strerror or error}); mend that, or"
                             f" give another folder") from None
        except BaseException:
            self.leases.close()
            raise
        storage.fence(folder, self.check)

    def _take(self, flag, doing):
        told = False
        while holder := self.leases.take(self.path):
            if holder.machine == self.leases.me.machine or self.leases.renewed(self.path):
                raise InputError(f"{flag} {self.folder}: {holder} {doing} into it; give another folder, or stop that"
                                 f" run")
            if not told:
                print(f"{self.path} is held by {holder}, and is taken over unless that renews it within"
                      f" {self.leases.timeout:g} seconds", flush=True)
                told = True
            time.sleep(self.leases.interval / 5)

    def check(self) -> None:
        """:raises Lost: if another process has taken over."""
        if not self.leases.holds(self.path):
            by = self.leases.holder(self.path) or "another run"
            raise Lost(f"{self.folder}: {by} has gone on with this run, since this process had not been heard of;"
                       f" nothing more is written")

    def __exit__(self, *exception: object) -> None:
        storage.fence(self.folder, None)
        self.leases.close()


def _read(data):
    """The Holder that a lease's bytes name, as far as they do."""
    try:
        stored = json.loads(data)
        kinds = {"host": str, "pid": int, "since": str, "machine": str, "job": str, "doing": str,
                 "generation": str}
        return Holder(**{name: kind(stored[name]) for name, kind in kinds.items()})
    except (ValueError, TypeError, KeyError, RecursionError):  # empty for a moment, or no lease at all
        return Holder()
