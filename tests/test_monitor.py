"""The Visdom view shows what it is given, and no server, whatever becomes of it, ever holds a run up."""

import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
import requests
import torch

from guided_diffusion import logger
from guided_diffusion.monitor import Monitor

PATIENCE = 60  # seconds until a test gives up; nothing here should need more than a few

SERVER = """
import sys
from visdom.server.run_server import start_server
start_server(port=int(sys.argv[1]), hostname="127.0.0.1", base_url="", env_path=sys.argv[2], bind_local=True)
"""

IMPORTS = """
import sys

connections = []
sys.addaudithook(lambda event, args: connections.append((event, args)) if event.startswith("socket.") else None)

import importlib
import pkgutil
import guided_diffusion

for module in pkgutil.iter_modules(guided_diffusion.__path__):
    importlib.import_module("guided_diffusion." + module.name)
assert "guided_diffusion.monitor" in sys.modules and "guided_diffusion.dist_util" in sys.modules
import torch.distributed

print(sorted({"visdom", "mpi4py", "blobfile"} & set(sys.modules)), torch.distributed.is_initialized(),
      [call for call in connections if call[0] in ("socket.connect", "socket.bind", "socket.getaddrinfo")])
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


class Server:
    """A real Visdom server in a process of its own."""

    def __init__(self, folder):
        self.port = free_port()
        env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        self.process = subprocess.Popen([sys.executable, "-c", SERVER, str(self.port), str(folder)], env=env,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(self.answers, "the Visdom server")

    def answers(self):
        assert self.process.poll() is None, "the Visdom server ended by itself"
        try:
            return urllib.request.urlopen(f"http://127.0.0.1:{self.port}/", timeout=PATIENCE).status == 200
        except OSError:
            return False

    def windows(self, env):
        """Title -> window of an environment, as the server holds them."""
        from visdom import Visdom

        client = Visdom(server="http://127.0.0.1", port=self.port, env=env, use_incoming_socket=False,
                        raise_exceptions=True)
        return {window["title"]: window for window in json.loads(client.get_window_data(env=env)).values()}

    def end(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    yield
    logger.configure()


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("visdom"))
    yield server
    server.end()


@pytest.fixture
def server(tmp_path):
    server = Server(tmp_path)
    yield server
    server.end()


def within_patience(function):
    """Run a function in a thread; fails if it has not returned after PATIENCE seconds."""
    thread = threading.Thread(target=function, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_curves_arrive_with_every_point(shared_server):
    monitor = Monitor(shared_server.port, "curves")
    points = [(10, 0.5, 0.25), (20, 0.375, 0.125), (30, 0.25, 0.0625), (50, 0.125, 1.0)]
    for step, loss, kl in points:
        monitor.curves(step, {"loss": loss, "kl": kl})
    monitor.close(PATIENCE)
    windows = shared_server.windows("curves")
    assert set(windows) == {"loss", "kl"}
    for name, column in (("loss", 1), ("kl", 2)):
        line, = windows[name]["content"]["data"]
        assert line["x"] == [point[0] for point in points]
        assert line["y"] == [point[column] for point in points]


def test_pictures_arrive_as_an_image_window_with_a_caption(shared_server):
    monitor = Monitor(shared_server.port, "pictures")
    monitor.pictures("prediction", torch.rand(3, 1, 16, 16), "of x_0")
    monitor.pictures("image", torch.from_numpy(np.random.default_rng(0).random((2, 3, 16, 16))))
    monitor.close(PATIENCE)
    windows = shared_server.windows("pictures")
    assert set(windows) == {"prediction", "image"}
    for name in ("prediction", "image"):
        assert windows[name]["type"] == "image" and windows[name]["content"]["src"].startswith("data:image/")
    assert windows["prediction"]["content"]["caption"] == "of x_0"


def test_a_window_is_redrawn_not_repeated(shared_server):
    for _ in range(2):
        monitor = Monitor(shared_server.port, "again")
        monitor.pictures("image", torch.rand(1, 1, 8, 8))
        monitor.curves(1, {"loss": 1.0})
        monitor.close(PATIENCE)
    assert set(shared_server.windows("again")) == {"image", "loss"}


def test_training_script_draws_on_the_server(shared_server, run, make_cases, tmp_path, tiny):
    make_cases(tmp_path / "data")
    result = run("segmentation_train.py", "--data_dir", tmp_path / "data", "--results_dir", tmp_path / "my run", *tiny,
                 "--max_steps", 2, "--log_interval", 1, "--visdom_port", shared_server.port)
    assert result.code == 0, result.err
    windows = shared_server.windows("my run")
    assert {"loss", "mse", "kl", "image", "rater's mask", "prediction"} == set(windows)
    assert windows["loss"]["content"]["data"][0]["x"] == [1, 2]


def test_port_0_draws_nothing_and_says_nothing(capsys):
    monitor = Monitor(0)
    monitor.curves(1, {"loss": 1.0})
    monitor.pictures("image", torch.rand(1, 1, 8, 8))
    monitor.close()
    assert not monitor.active and capsys.readouterr() == ("", "")


def test_absent_server_costs_one_line(capsys):
    port = free_port()
    monitor = Monitor(port)
    for step in range(3):
        monitor.curves(step, {"loss": 1.0})
        monitor.pictures("image", torch.rand(1, 1, 8, 8))
    monitor.close()
    out, err = capsys.readouterr()
    assert not monitor.active and err == ""
    assert out.count("\n") == 1 and f"no Visdom server on port {port}" in out


def test_absent_package_costs_one_line(capsys, monkeypatch, shared_server):
    monkeypatch.setitem(sys.modules, "visdom", None)
    monitor = Monitor(shared_server.port)
    monitor.curves(1, {"loss": 1.0})
    out, err = capsys.readouterr()
    assert not monitor.active and err == "" and out.count("\n") == 1 and "visdom is not installed" in out


def test_server_killed_in_the_midst_costs_one_line(server, tmp_path, capsys):
    logger.configure(tmp_path / "log")
    monitor = Monitor(server.port, "killed")
    monitor.curves(1, {"loss": 1.0})
    wait_for(lambda: "loss" in server.windows("killed"), "the first point")
    server.process.send_signal(signal.SIGKILL)
    server.process.wait()

    def calls():
        for step in range(2, 30):
            monitor.curves(step, {"loss": 1.0, "kl": 2.0})
            monitor.pictures("image", torch.rand(1, 1, 8, 8))

    within_patience(calls)
    wait_for(lambda: not monitor.active, "the monitor to give up")
    monitor.curves(99, {"loss": 1.0})
    monitor.close()
    line, = (tmp_path / "log" / "log.txt").read_text().splitlines()
    assert f"Visdom server on port {server.port} stopped answering" in line
    assert "Traceback" not in "".join(capsys.readouterr())


def test_server_lost_between_two_instructions_is_no_error(monkeypatch):
    monitor = Monitor(0)  # as after the sending thread gave up
    monkeypatch.setattr(Monitor, "active", property(lambda self: True))  # but was still there a moment ago
    monitor.curves(1, {"loss": 1.0})
    monitor.pictures("image", torch.rand(1, 1, 8, 8))


def test_server_that_hangs_never_holds_up_a_call(server):
    monitor = Monitor(server.port, "hangs")
    monitor.curves(0, {"loss": 1.0})
    wait_for(lambda: "loss" in server.windows("hangs"), "the first point")
    server.process.send_signal(signal.SIGSTOP)

    def calls():
        for step in range(100):
            monitor.curves(step, {"loss": 1.0, "kl": 2.0})
            monitor.pictures("image", torch.rand(2, 1, 16, 16))

    within_patience(calls)
    within_patience(lambda: monitor.close(timeout=0.2))
    late = []
    within_patience(lambda: late.append(Monitor(server.port, "late")))  # nor that of a run that starts now
    within_patience(lambda: late[0].curves(1, {"loss": 1.0}))
    server.process.send_signal(signal.SIGCONT)
    wait_for(lambda: "loss" in server.windows("late"), "the server to go on")


def test_importing_the_library_loads_and_connects_to_nothing(environment):
    result = subprocess.run([sys.executable, "-c", IMPORTS], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[] False []"


# ---- pictures stay on this machine ----

class Recorder:
    """A real HTTP server that keeps what it is sent: (path, headers, body) of every request.

    :param redirect: from the path on that begins with the first, to the server at the port that comes second.
    """

    def __init__(self, redirect=None, status=307):
        self.received = received = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                received.append((self.path, self.headers, body))
                away = redirect and self.path.startswith(redirect[0])
                self.send_response(status if away else 200)
                if away:
                    self.send_header("Location", f"http://127.0.0.1:{redirect[1]}{self.path}")
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_CONNECT = do_POST

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()


def show(port):
    """A monitor that has sent a picture, or given up."""
    monitor = Monitor(port, "private")
    monitor.pictures("scan", torch.rand(1, 1, 8, 8))
    monitor.curves(1, {"loss": 1.0})
    monitor.close(PATIENCE)
    return monitor


def test_no_proxy_and_no_password_of_the_environment_is_used(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    with Recorder() as proxy, Recorder() as target:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
        requests.post(f"http://127.0.0.1:{target.port}/any", data="ordinary")
        (_, headers, body), = proxy.received  # so the environment does lead there
        assert body == b"ordinary" and "Authorization" in headers and not target.received
        proxy.received.clear()
        assert show(target.port).active
    assert not proxy.received
    paths = [path for path, _, _ in target.received]
    assert paths[0] == "/env/private" and "/events" in paths  # the constructor's request, and the picture
    assert any(b"data:image/" in body for _, _, body in target.received)
    assert not any("Authorization" in headers for _, headers, _ in target.received)


@pytest.mark.parametrize("path, status", [("/env", 307), ("/events", 307), ("/events", 308)])
def test_no_redirect_is_followed(capsys, path, status):
    with Recorder() as elsewhere, Recorder((path, elsewhere.port), status) as server:
        requests.post(f"http://127.0.0.1:{server.port}{path}", data="ordinary")
        assert elsewhere.received  # so the redirect does lead there
        elsewhere.received.clear()
        monitor = Monitor(server.port, "private")
        monitor.pictures("scan", torch.rand(1, 1, 8, 8))
        wait_for(lambda: elsewhere.received or not monitor.active, "the monitor to give up")
    assert not elsewhere.received
    assert f"Visdom server on port {server.port} stopped answering" in capsys.readouterr().out


def test_only_this_machine_is_looked_up_or_connected_to(monkeypatch):
    called = []
    for name in ("create_connection", "getaddrinfo"):
        original = getattr(socket, name)
        monkeypatch.setattr(socket, name, lambda *args, original=original, **kwargs: (
            called.append(args[0] if isinstance(args[0], str) else args[0][0]), original(*args, **kwargs))[1])
    with Recorder() as target:
        assert show(target.port).active
    assert set(called) == {"127.0.0.1"}
