"""Speaking to a Visdom server: its address, its pages, starting it, and a client.

Pictures go to the server on this machine, or to the one that --visdom_server names, and nowhere else: neither through a
proxy that the environment names nor where a server redirects to.
"""

import contextlib
import json
import logging
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any
from urllib.parse import quote, urlsplit

from .. import logger
from ..system.errors import InputError


def environment_name(name: str) -> str:
    """What Visdom calls an environment that a run would name so: some characters its pages cannot be reached under, and
    what stands before an underscore it takes for a group."""
    return re.sub(r"[^\w.]|_", "-", name) or "main"


def page(url: str, env: str) -> str:
    """Where an environment of the server at this URL is to be seen."""
    return f"{url}/env/{quote(env)}"


def split_address(server: str, port: int) -> tuple[str, int, str]:
    """(scheme://host, port, path) of a server.

    :param server: http:// or https://, host, and optionally :port and /path; "" for this machine's.
    :raises InputError: if it is no such address.
    """
    if not server:
        return "http://127.0.0.1", port, ""
    if "@" in server:  # not shown: it may hold a password
        raise InputError("--visdom_server: holds an @, as after a name and password, which would be kept in flags.json;"
                         " set VISDOM_USERNAME and VISDOM_PASSWORD instead")
    try:
        parts = urlsplit(server)
        port = parts.port or port
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise InputError(f"--visdom_server {server}: must be http:// or https:// and a host, as in"
                         f" https://visdom.example.org:8097/path")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}", port, parts.path.rstrip("/")


def start_server(address: str, port: int, path: str = "", patience: float = 60.0) -> None:
    """Start a Visdom server on this machine that outlives this process, unless one listens already, and wait for it."""
    if listens(port):
        return
    logger.log(f"starting a Visdom server at {address}:{port}, which stays when this has ended")
    with tempfile.TemporaryFile() as said:
        server = subprocess.Popen([sys.executable, "-P", "-m", "guided_diffusion.live.server", str(port)],
                                  stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said,
                                  start_new_session=True)
        end = time.monotonic() + patience
        while not listens(port) and server.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        said.seek(0)
        if words := said.read().decode(errors="replace").strip():
            logger.log("the Visdom server says:", words.splitlines()[-1])


def listens(port: int, timeout: float = 1.0) -> bool:
    """Whether a program of this machine listens on a port; nothing is sent there.

    :param timeout: seconds to wait for an answer, where a firewall gives none.
    """
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout).close()
        return True
    return False


def visdom_client(env: str, address: str, port: int, path: str) -> Any:
    """Visdom's own client, which hands over its messages instead of sending them.

    It logs in with VISDOM_USERNAME and VISDOM_PASSWORD if they are set.
    """
    import requests
    import visdom

    logging.getLogger("visdom").setLevel(logging.CRITICAL)  # what there is to say, the log says

    class Direct(requests.Session):
        """Goes to the server and nowhere else, and does not wait for ever."""

        def __init__(self):
            super().__init__()
            self.trust_env = False  # else http_proxy, ALL_PROXY and .netrc count
            self.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
            self.max_redirects = 0

        def request(self, *args, **kwargs):
            response = super().request(*args, **kwargs, timeout=(3, 10))
            response.raise_for_status()
            return response

    class Client(visdom.Visdom):
        direct = None  # the session, once there is one

        def messages(self, draw):
            self.made = []
            draw(self)
            return self.made

        def _send(self, msg, endpoint="events", **_):
            self.made.append([endpoint, {**msg, "eid": self.env}])

        def has(self, window):
            return self.post("win_exists", {"win": window, "eid": self.env}) == "true"

        def post(self, endpoint, content):
            url = f"{self.server}:{self.port}{self.base_url}"
            direct = self.direct or Direct()
            if self.username and not self.direct:
                direct.post(url, json={"username": self.username, "password": self.password})
            self.direct = None  # after an error it logs in anew
            text = direct.post(f"{url}/{endpoint}", data=json.dumps(content)).text
            self.direct = direct
            return text

    login = {"username": os.environ.get("VISDOM_USERNAME"), "password": os.environ.get("VISDOM_PASSWORD")}
    return Client(server=address, port=port, base_url=path or "/", env=env, offline=True, log_to_filename=os.devnull,
                  **(login if all(login.values()) else {}))
