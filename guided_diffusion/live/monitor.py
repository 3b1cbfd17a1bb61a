"""The live view of a run on a Visdom server, and its record, visdom.log.

A run says what its windows show. A thread of its own records that, in the format of Visdom's own log, and sends it.
What waits is at most the newest state of every window, so nothing piles up: a server that is absent, slow, hung or dead
costs the run no time, and once it answers it is sent every window whole.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

from .. import logger
from ..system import packages, storage
from ..system.errors import InputError
from .client import environment_name, listens, page, split_address, start_server, visdom_client
from .windows import Text


class Monitor:
    """Draws windows on a Visdom server and keeps them in a log.

    :param env: the Visdom environment, named after the run.
    :param windows: Text, Picture and Curves objects in the order of the page.
    :param folder: where visdom.log goes; None for none.
    :param server: address of the server, see split_address; "" for this machine's.
    :param port: its port.
    :param mode: "connect" draws on the server; "start" starts one on this machine before, if none listens there; "off"
        draws and records nothing, but says how to, if a server listens on this port of this machine. So does port 0,
        which says nothing.
    """

    tick = 0.2  # seconds between two looks at the windows
    patience = 10.0  # seconds until a server that does not answer is asked again

    def __init__(self, env: str, windows: Sequence[Text], folder: str | None = None, server: str = "", port: int = 8097,
                 mode: str = "off"):
        self.env, self.windows = environment_name(env), windows
        self.active = False
        if not port:
            return
        if mode == "off":
            if listens(port, timeout=0.2):
                logger.log(f"a program listens on port {port} of this machine: if it is a Visdom server, --visdom"
                           f" connect shows the run there")
            return
        if not packages.is_installed("visdom"):
            logger.log(packages.missing(f"--visdom {mode}", "visdom") + "; going on without")
            return
        self.active, self.address = True, split_address(server, port)
        self.url = "{}:{}{}".format(*self.address)
        self._start, self._file = mode == "start", folder and Record(folder)
        self._connected, self._missed, self._retry_at = False, False, 0.0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self, timeout: float = 3.0) -> None:
        """Record and send what is still to be sent, but wait no longer than `timeout` seconds for it."""
        if self.active:
            self._closed.set()
            self._thread.join(timeout)

    # ---- the thread ----

    def _run(self):
        try:
            client = visdom_client(self.env, *self.address)
        except ImportError as error:  # something that it needs
            self.active = False
            return logger.log(f"the package visdom cannot be imported ({error}); going on without")
        if self._start:
            start_server(*self.address)
        while not self._closed.wait(self.tick):
            self._look(client)
        self._look(client, last=True)

    def _look(self, client, last=False):
        """Record the windows that have changed and send them; all of them to a server that is new or was away."""
        now = time.monotonic()
        fresh = [window for window in self.windows if window.changed and (last or now >= window.next_time)]
        for window in fresh:
            window.changed, window.next_time = False, now + window.every
            window.unrecorded = window.update(client)
        for window in self.windows:
            if self._file and window.unrecorded and (last or now >= window.next_record):
                self._file.write(window.unrecorded)
                window.unrecorded, window.next_record = [], now + 30 * window.every
        if not self._connected and now < self._retry_at or not fresh and self._connected:
            return
        try:
            if self._connected and not client.has(self.windows[-1].title):  # it was started anew
                self._connected = False
            for window in fresh if self._connected else self.windows:
                for message in window.whole:
                    client.post(*message)
        except OSError as error:  # requests' errors are such
            self._retry_at = time.monotonic() + self.patience
            if self._connected or not self._missed:
                self._report(error)
            self._connected, self._missed = False, True
        else:
            if not self._connected:
                logger.log(f"watch it at {page(self.url, self.env)}" if not self._missed else
                           f"the Visdom server at {self.url} answers; the view has caught up")
            self._connected = True

    def _report(self, error):
        why = "asks for a login: set VISDOM_USERNAME and VISDOM_PASSWORD" if _status(error) == 400 else (
            "stopped answering" if self._connected else "does not answer")
        hint = "" if self._connected else "; --visdom start starts one"
        logger.log(f"the Visdom server at {self.url} {why} ({type(error).__name__}); going on without it{hint}")


class Record:
    """visdom.log in a folder: a line of JSON a message, [endpoint, content], as Visdom keeps them and replays them.

    What cannot be written, or was cut off, leaves no trace.
    """

    def __init__(self, folder: str):
        self.path = os.path.join(folder, "visdom.log")
        storage.replace_link(self.path)
        with contextlib.suppress(OSError), open(self.path, "ab+") as file:
            file.truncate(_end_of_lines(file))

    def write(self, messages: Iterable[list]) -> None:
        data = "".join(json.dumps(message) + "\n" for message in messages).encode()
        if not data:
            return
        with contextlib.suppress(OSError), open(self.path, "ab", buffering=0) as file:
            start = file.tell()
            try:
                written = file.write(data)
            except OSError:
                written = 0
            if written < len(data):
                file.truncate(start)


def _end_of_lines(file):
    """The place behind the last newline of a binary file."""
    end = file.seek(0, os.SEEK_END)
    while end:
        start = max(0, end - 65536)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def recorded(path: str) -> list[dict[str, Any]]:
    """What a visdom.log shows in the end: the content of every window, as Visdom's endpoint "events" takes it.

    :raises InputError: if the file cannot be read, or holds none.
    """
    windows = {}
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                with contextlib.suppress(ValueError, LookupError, TypeError):  # a line that was cut off
                    endpoint, content = json.loads(line)
                    place = content["eid"], content["win"]
                    if endpoint == "events":
                        windows[place] = content
                    elif endpoint == "update" and content["append"]:
                        for whole, new in zip(windows[place]["data"], content["data"], strict=True):
                            whole["x"] += new["x"]
                            whole["y"] += new["y"]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    if not windows:
        raise InputError(f"{path}: holds nothing that Visdom has shown")
    return [*windows.values()]


def _status(error):
    return getattr(getattr(error, "response", None), "status_code", None)
