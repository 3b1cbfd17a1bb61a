"""Real Visdom servers for the tests of what is shown on them."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

PATIENCE = 60  # seconds until a test gives up; nothing here should need more than a few
SERVER = """
import sys
from visdom.server.run_server import start_server
from visdom.utils.server_utils import hash_password
_, port, folder, base_url, *login = sys.argv
login = login and {"username": login[0], "password": hash_password(hash_password(login[1]))}
start_server(port=int(port), hostname="127.0.0.1", base_url=base_url, env_path=folder, bind_local=True,
             user_credential=login or None)
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(condition, what):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def windows_of(port, env):
    """Title -> window of an environment, as the server holds them."""
    from visdom import Visdom

    client = Visdom(server="http://127.0.0.1", port=port, env=env, use_incoming_socket=False, raise_exceptions=True)
    return {window["title"]: window for window in json.loads(client.get_window_data(env=env)).values()}


class Server:
    """A real Visdom server in a process of its own; login: a name and a password."""

    def __init__(self, folder, port=None, path="", login=()):
        self.port, self.path = port or free_port(), path
        env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        self.process = subprocess.Popen([sys.executable, "-c", SERVER, str(self.port), str(folder), path, *login],
                                        env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self.answers, "the Visdom server")

    def answers(self):
        assert self.process.poll() is None, "the Visdom server ended by itself"
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}{self.path}/", timeout=PATIENCE).status == 200
        except OSError:
            return False

    def windows(self, env):
        return windows_of(self.port, env)

    def end(self):
        self.process.kill()
        self.process.wait()


def points(window, curve=0):
    data = window["content"]["data"][curve]
    return list(zip(data["x"], data["y"]))
