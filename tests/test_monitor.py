"""The Visdom view shows what it is given, and no server, whatever becomes of it, ever holds a run up."""

import base64
import contextlib
import http.server
import io
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import requests
from PIL import Image

from guided_diffusion import logger
from guided_diffusion import monitor as monitor_module
from guided_diffusion.monitor import Curves, Monitor, Picture, Text, environment_name, recorded, split_address

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


@pytest.fixture(autouse=True)
def afterwards(no_proxy):
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


def view(env, server=None, **options):
    """A text, a curve and a picture window, and a Monitor that draws them."""
    windows = [Text("run"), Curves("loss", ["loss", "kl"], log=True), Picture("cases", width=110, height=36)]
    return *windows, Monitor(env, windows, **({"port": server.port} if isinstance(server, Server) else {}), **options)


def red():
    return Image.new("RGB", (20, 10), "red")


def points(window, curve=0):
    data = window["content"]["data"][curve]
    return list(zip(data["x"], data["y"]))


def test_curves_arrive_with_every_point(shared_server):
    _, curves, _, monitor = view("curves", shared_server)
    rows = [(10, 0.5, 0.25), (20, 0.375, 0.125), (30, 0.25, 0.0625), (50, 0.125, 1.0)]
    for step, loss, kl in rows:
        curves.add(step, {"loss": loss, "kl": kl, "other": 3})
        time.sleep(2 * Monitor.tick)  # so that some are sent by themselves
    monitor.close(PATIENCE)
    window = shared_server.windows("curves")["loss"]
    assert [trace["name"] for trace in window["content"]["data"]] == ["loss", "kl"]
    assert points(window) == [row[:2] for row in rows] and points(window, 1) == [row[::2] for row in rows]
    assert window["content"]["layout"]["yaxis"]["type"] == "log"


def test_values_that_a_logarithmic_axis_cannot_show_leave_a_gap(shared_server):
    _, curves, _, monitor = view("gaps", shared_server)
    for step, loss in enumerate((1.0, float("nan"), float("inf"), 0.0, -1.0, 2.0)):
        curves.add(step, {"loss": loss, "kl": 0.5})
    curves.add(9, {"loss": float("nan")})
    curves.add(10, {"other": 1.0})
    monitor.close(PATIENCE)
    window = shared_server.windows("gaps")["loss"]
    assert points(window) == [(0, 1.0), (1, None), (2, None), (3, None), (4, None), (5, 2.0)]
    assert points(window, 1) == [(step, 0.5) for step in range(6)]


def test_windows_keep_the_order_of_the_page_whenever_they_are_filled(shared_server):
    text, curves, picture, monitor = view("order", shared_server)
    picture.show(red)
    time.sleep(2 * Monitor.tick)
    text.show("<b>a run</b>")
    time.sleep(2 * Monitor.tick)
    curves.add(1, {"loss": 1.0})
    monitor.close(PATIENCE)
    windows = shared_server.windows("order")
    assert sorted(windows, key=lambda title: windows[title]["i"]) == ["run", "loss", "cases"]
    assert windows["run"]["content"] == "<b>a run</b>" and windows["loss"]["type"] == "plot"
    assert windows["cases"]["content"]["src"].startswith("data:image/")


def test_pictures_are_made_on_the_thread_of_the_view_and_only_if_their_turn_comes(shared_server):
    _, _, _, monitor = view("pictures", shared_server)
    picture = Picture("cases", every=1000, width=110, height=36)
    monitor.windows.append(picture)
    made = []
    for i in range(50):
        picture.show(lambda i=i: made.append((i, threading.current_thread())) or red())
        time.sleep(Monitor.tick / 5)
    assert len(made) <= 1
    monitor.close(PATIENCE)  # the last one is shown at the end
    assert made[-1][0] == 49 and threading.main_thread() not in [thread for _, thread in made]


@pytest.mark.parametrize("size", [(100, 34), (30, 20), (400, 60), (50, 500)])
def test_pictures_are_shown_as_they_are_or_whole(size):
    picture = Picture("cases", width=110, height=36)
    picture.show(lambda: Image.new("RGB", size, "red"))
    client = monitor_module.visdom_client("any", "http://127.0.0.1", 1, "")
    (endpoint, message), = picture.update(client)
    data = base64.b64decode(message["data"][0]["content"]["src"].partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert pixels.shape == (51, 100, 3) and (pixels[-17:] == 255).all()
    red_box = Image.fromarray((pixels != 255).any(2)).getbbox()
    scale = min(1, 100 / size[0], 34 / size[1])
    assert np.abs(np.subtract(red_box, (0, 0, size[0] * scale, size[1] * scale))).max() <= 1


def test_a_view_that_goes_on_shows_no_point_twice(shared_server):
    rows = [(1, {"loss": 1.0}), (2, {"loss": 0.5})]
    for count in (1, 2):
        _, curves, _, monitor = view("again", shared_server)
        for row in rows[:count]:
            curves.add(*row)
        monitor.close(PATIENCE)
    windows = shared_server.windows("again")
    assert set(windows) == {"run", "loss", "cases"} and points(windows["loss"]) == [(1, 1.0), (2, 0.5)]


def test_long_curves_are_thinned_on_the_page_and_whole_in_the_log(shared_server, tmp_path):
    _, curves, _, monitor = view("long", shared_server, folder=tmp_path)
    for start in range(0, 2500, 500):
        for step in range(start, start + 500):
            curves.add(step, {"loss": 1 / (step + 1)})
        time.sleep(2 * Monitor.tick)
    monitor.close(PATIENCE)
    shown = points(shared_server.windows("long")["loss"])
    assert 800 < len(shown) <= 1000 and shown[-1] == (2499, 1 / 2500)
    assert set(shown) <= {(step, 1 / (step + 1)) for step in range(2500)}
    whole = {content["win"]: content for content in recorded(tmp_path / "visdom.log")}
    assert whole["loss"]["data"][0]["x"] == list(range(2500))


def test_port_0_draws_nothing_and_says_nothing(capsys, tmp_path):
    text, curves, picture, monitor = view("none", port=0, folder=tmp_path)
    curves.add(1, {"loss": 1.0})
    picture.show(red)
    monitor.close()
    assert not monitor.active and capsys.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_absent_package_costs_one_line(capsys, monkeypatch, shared_server):
    monkeypatch.setitem(sys.modules, "visdom", None)
    _, curves, _, monitor = view("absent", shared_server)
    curves.add(1, {"loss": 1.0})
    monitor.close()
    out, err = capsys.readouterr()
    assert not monitor.active and err == "" and out.count("\n") == 1 and "visdom is not installed" in out


def test_a_package_that_lacks_something_costs_one_line(capsys, monkeypatch, shared_server):
    monkeypatch.setitem(sys.modules, "requests", None)
    _, curves, _, monitor = view("broken", shared_server)
    curves.add(1, {"loss": 1.0})
    monitor.close(PATIENCE)
    out, err = capsys.readouterr()
    assert not monitor.active and err == "" and out.count("\n") == 1 and "cannot be imported" in out


# ---- servers that come and go ----

@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(Monitor, "patience", 0.3)


def test_absent_server_costs_one_line_and_gets_all_once_it_is_there(capsys, impatient, tmp_path):
    port = free_port()
    text, curves, picture, monitor = view("late", port=port, folder=tmp_path)
    for step in range(3):
        curves.add(step, {"loss": 1.0})
        time.sleep(3 * Monitor.patience)
    picture.show(red)
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1 and f"127.0.0.1:{port} does not answer" in out and "make visdom" in out
    server = Server(tmp_path, port)
    try:
        wait_for(lambda: "cases" in server.windows("late"), "the view")
        assert points(server.windows("late")["loss"]) == [(step, 1.0) for step in range(3)]
        assert server.windows("late")["cases"]["type"] == "image"
        monitor.close(PATIENCE)
    finally:
        server.end()
    assert capsys.readouterr().out.count("\n") == 1  # says that it is there


def test_server_killed_in_the_midst_costs_a_line_and_gets_all_when_it_is_back(tmp_path, capsys, impatient):
    logger.configure(tmp_path / "log")
    server = Server(tmp_path)
    text, curves, picture, monitor = view("killed", server)
    picture.show(red)
    curves.add(0, {"loss": 1.0})
    wait_for(lambda: server.windows("killed").get("cases", {}).get("type") == "image", "the view")
    time.sleep(2 * Monitor.tick)  # until that is known to have arrived
    server.end()
    for step in range(1, 5):
        curves.add(step, {"loss": 1.0, "kl": 2.0})
        time.sleep(Monitor.patience)
    assert monitor.active
    server = Server(tmp_path, server.port)
    try:
        wait_for(lambda: len(server.windows("killed")) == 3, "the view to come back")
        assert points(server.windows("killed")["loss"]) == [(step, 1.0) for step in range(5)]
        assert server.windows("killed")["cases"]["type"] == "image"
        monitor.close(PATIENCE)
    finally:
        server.end()
    lines = (tmp_path / "log" / "log.txt").read_text().splitlines()
    assert ["watch it at" in lines[0], "stopped answering" in lines[1], "caught up" in lines[2]] == [True] * 3
    assert len(lines) == 3 and "Traceback" not in "".join(capsys.readouterr())


def test_server_that_was_started_anew_between_two_points_gets_all(tmp_path):
    server = Server(tmp_path)
    text, curves, picture, monitor = view("anew", server)
    picture.show(red)
    curves.add(0, {"loss": 1.0})
    wait_for(lambda: server.windows("anew").get("cases", {}).get("type") == "image", "the view")
    server.end()
    server = Server(tmp_path, server.port)
    try:
        curves.add(1, {"loss": 0.5})
        monitor.close(PATIENCE)
        windows = server.windows("anew")
        assert points(windows["loss"]) == [(0, 1.0), (1, 0.5)] and windows["cases"]["type"] == "image"
    finally:
        server.end()


def test_server_that_hangs_holds_nothing_up_and_gets_all_when_it_goes_on(server, impatient):
    text, curves, picture, monitor = view("hangs", server)
    curves.add(0, {"loss": 1.0})
    wait_for(lambda: "loss" in server.windows("hangs"), "the first point")
    server.process.send_signal(signal.SIGSTOP)

    start = time.thread_time()
    for step in range(1, 2000):
        curves.add(step, {"loss": 1.0, "kl": 2.0})
        picture.show(red)
        text.show(str(step))
    assert time.thread_time() - start < 1  # of this thread's work, however busy the machine is
    late = view("late", server)  # nor is a run held up that starts now
    late[1].add(1, {"loss": 1.0})
    start = time.monotonic()
    late[-1].close(timeout=0.2)
    assert time.monotonic() - start < PATIENCE / 2
    server.process.send_signal(signal.SIGCONT)
    wait_for(lambda: server.windows("hangs")["run"]["content"] == "1999", "the server to go on")
    monitor.close(PATIENCE)
    assert server.windows("hangs")["loss"]["content"]["data"][0]["x"][-1] == 1999


def test_a_server_is_started_if_asked_for_and_stays(environment, tmp_path):
    port = free_port()
    code = f"""
from guided_diffusion.monitor import Curves, Monitor
curves = Curves("loss", ["loss"])
monitor = Monitor("started", [curves], port={port}, start=True)
curves.add(1, {{"loss": 1.0}})
monitor.close({PATIENCE})
monitor.close({PATIENCE})
"""
    result = subprocess.run([sys.executable, "-c", code], env={**environment, "HOME": str(tmp_path)}, cwd=tmp_path,
                            capture_output=True, text=True, timeout=2 * PATIENCE)
    try:
        assert result.returncode == 0 and f"watch it at http://127.0.0.1:{port}/env/started" in result.stdout, result
        assert points(windows_of(port, "started")["loss"]) == [(1, 1.0)]
        outside = [address for address in addresses() if not address.startswith("127.")]
        for address in outside:
            with pytest.raises(OSError):
                socket.create_connection((address, port), timeout=2)
    finally:
        for process in processes_with("guided_diffusion.visdom_server", str(port)):
            os.kill(process, signal.SIGKILL)


def addresses():
    """Addresses of this machine."""
    with contextlib.suppress(OSError):
        return {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)}
    return set()


def processes_with(*words):
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if set(words) <= set((folder / "cmdline").read_text().split("\0")):
                yield int(folder.name)


# ---- visdom.log ----

def logged_view(env, server, folder):
    text, curves, picture, monitor = view(env, server, folder=folder)
    for step in range(3):
        text.show(f"step {step}")
        curves.add(step, {"loss": 1 / (step + 1), "kl": 0.5} if step != 1 else {"loss": 0.5})
        time.sleep(2 * Monitor.tick)
    picture.show(red)
    monitor.close(PATIENCE)
    return {title: (window["type"], window["content"]) for title, window in server.windows(env).items()}


def test_the_log_replays_what_was_shown_with_our_script_and_with_visdom_itself(tmp_path, run):
    first, second, third = (Server(tmp_path) for _ in range(3))
    try:
        shown = logged_view("run-1", first, tmp_path)
        assert shown["run"] == ("text", "step 2") and shown["cases"][0] == "image"
        result = run("visdom_replay.py", "--results_dir", tmp_path, "--visdom_port", second.port)
        assert result.code == 0 and f"http://127.0.0.1:{second.port}/env/run-1" in result.out
        from visdom import Visdom

        Visdom(port=third.port, use_incoming_socket=False, raise_exceptions=True).replay_log(tmp_path / "visdom.log")
        for server in (second, third):
            windows = server.windows("run-1")
            assert {title: (window["type"], window["content"]) for title, window in windows.items()} == shown
    finally:
        for server in (first, second, third):
            server.end()


def test_the_log_is_kept_without_a_server_and_goes_on_behind_a_line_that_was_cut_off(tmp_path):
    for text in ("first", "second"):
        window, _, _, monitor = view("cut", port=free_port(), folder=tmp_path)
        window.show(text)
        monitor.close(PATIENCE)
        with open(tmp_path / "visdom.log", "a") as file:
            file.write('["events", {"data": [{"con' * 5000)
    monitor = view("cut", port=free_port(), folder=tmp_path)[-1]
    monitor.close(PATIENCE)
    assert all(json.loads(line) for line in (tmp_path / "visdom.log").read_text().splitlines())
    contents = [json.loads(line)[1]["data"][0].get("content") for line in open(tmp_path / "visdom.log")]
    assert "first" in contents and "second" in contents


def test_a_full_disk_costs_lines_of_the_log_only(tmp_path, disk):
    disk("size=64k")
    picture = Picture("noise", width=310, height=291)
    monitor = Monitor("full", [picture], tmp_path / "results", port=free_port())
    for size in (8, 300, 8, 300, 8):
        noise = np.random.default_rng(0).integers(0, 255, (size, size, 3), np.uint8)
        picture.show(lambda noise=noise: Image.fromarray(noise))
        time.sleep(3 * Monitor.tick)
    monitor.close(PATIENCE)
    lines = (tmp_path / "results" / "visdom.log").read_text().splitlines()
    assert len(lines) >= 3 and all(json.loads(line)[0] == "events" for line in lines)


def test_a_link_in_the_place_of_the_log_is_replaced_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "visdom.log").symlink_to(tmp_path / "precious")
    view("link", port=free_port(), folder=tmp_path)[-1].close(PATIENCE)
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "visdom.log").is_symlink()


@pytest.mark.parametrize("content, words", [
    (None, "cannot be read"), ("", "holds nothing"), ("nonsense\n[1, 2]\n[]\n", "holds nothing"),
    ('["events", {"win": "a"}]\n', "holds nothing")])
def test_replaying_what_is_no_log_is_refused(run, tmp_path, content, words):
    if content is not None:
        (tmp_path / "visdom.log").write_text(content)
    result = run("visdom_replay.py", "--results_dir", tmp_path, "--visdom_port", free_port())
    assert result.code == 2 and words in result.err and "visdom.log" in result.err


def test_replaying_to_no_server_says_how_to_start_one(run, tmp_path):
    view("nobody", port=free_port(), folder=tmp_path)[-1].close(PATIENCE)
    result = run("visdom_replay.py", "--results_dir", tmp_path, "--visdom_port", free_port())
    assert result.code == 2 and "no Visdom server" in result.err and "--visdom start" in result.err


def test_importing_the_library_loads_and_connects_to_nothing(environment):
    result = subprocess.run([sys.executable, "-c", IMPORTS], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[] False []"


# ---- pictures stay on this machine ----

class Recorder:
    """A real HTTP server that keeps what it is sent: (path, headers, body) of every request.

    :param redirect: from the path on that begins with the first, to the server at the port that comes second.
    :param tls: an SSLContext, for https.
    """

    def __init__(self, redirect=None, status=307, tls=None):
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
        if tls:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()


def show(port, server=""):
    """A monitor that has sent a picture, or given up."""
    _, curves, picture = windows = [Text("run"), Curves("loss", ["loss"]), Picture("cases", width=110, height=36)]
    monitor = Monitor("private", windows, port=port, server=server)
    picture.show(red)
    curves.add(1, {"loss": 1.0})
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
        show(target.port)
    assert not proxy.received
    assert [path for path, _, _ in target.received] == 3 * ["/events"]
    assert any(b"data:image/" in body for _, _, body in target.received)
    assert not any("Authorization" in headers for _, headers, _ in target.received)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(capsys, status):
    with Recorder() as elsewhere, Recorder(("/events", elsewhere.port), status) as server:
        requests.post(f"http://127.0.0.1:{server.port}/events", data="ordinary")
        assert elsewhere.received  # so the redirect does lead there
        elsewhere.received.clear()
        show(server.port)
    assert server.received and not elsewhere.received
    assert f"the Visdom server at http://127.0.0.1:{server.port} does not answer" in capsys.readouterr().out


def test_only_this_machine_is_looked_up_or_connected_to(monkeypatch):
    called = []
    for name in ("create_connection", "getaddrinfo"):
        original = getattr(socket, name)
        monkeypatch.setattr(socket, name, lambda *args, original=original, **kwargs: (
            called.append(args[0] if isinstance(args[0], str) else args[0][0]), original(*args, **kwargs))[1])
    with Recorder() as target:
        show(target.port)
    assert target.received and set(called) == {"127.0.0.1"}


# ---- a server that --visdom_server names ----

@pytest.fixture
def login(monkeypatch, tmp_path):
    """Start a server that asks for a login; visdom keeps the secret of its cookies in the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".visdom").mkdir()
    (tmp_path / ".visdom" / "COOKIE_SECRET").write_text("secret of cookies")
    server = Server(tmp_path, path="/views", login=("reader", "correct horse"))
    yield server
    server.end()


def test_name_and_password_of_the_environment_log_in(login, monkeypatch, capsys, impatient):
    for name, password in (("", ""), ("reader", ""), ("reader", "wrong")):
        monkeypatch.setenv("VISDOM_USERNAME", name)
        monkeypatch.setenv("VISDOM_PASSWORD", password)
        show(1, f"http://127.0.0.1:{login.port}/views")
        out = capsys.readouterr().out
        assert "VISDOM_USERNAME" in out and out.count("\n") == 1
    monkeypatch.setenv("VISDOM_PASSWORD", "correct horse")
    show(1, f"http://127.0.0.1:{login.port}/views")
    out = capsys.readouterr().out
    assert f"watch it at http://127.0.0.1:{login.port}/views/env/private" in out and "correct" not in out
    client = monitor_module.visdom_client("private", "http://127.0.0.1", login.port, "/views")
    held = json.loads(client.post("win_data", {"win": None, "eid": "private"}))
    assert points({window["title"]: window for window in held.values()}["loss"]) == [(1, 1.0)]


def test_https_is_used_and_its_certificate_checked(tmp_path, monkeypatch, capsys):
    made = subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                           "-subj", "/CN=here", "-addext", "subjectAltName=IP:127.0.0.1",
                           "-keyout", tmp_path / "key.pem", "-out", tmp_path / "cert.pem"], capture_output=True)
    assert made.returncode == 0, made.stderr
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    with Recorder(tls=context) as server:
        monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
        show(1, f"https://127.0.0.1:{server.port}")
        assert not server.received and "SSLError" in capsys.readouterr().out
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "cert.pem"))
        show(1, f"https://127.0.0.1:{server.port}/path/")
        assert [path for path, _, _ in server.received] == 3 * ["/path/events"]


@pytest.mark.parametrize("server, address", [
    ("", ("http://127.0.0.1", 8097, "")), ("https://host", ("https://host", 8097, "")),
    ("http://host:80/a/b/", ("http://host", 80, "/a/b")), ("https://[::1]:9", ("https://[::1]", 9, ""))])
def test_addresses_are_taken_apart(server, address):
    assert split_address(server, 8097) == address


@pytest.mark.parametrize("server", ["host", "host:8097", "ftp://host", "https://", "https://host:port", "https://h?a=b",
                                    "https://host:99999", "file:///etc/passwd"])
def test_what_is_no_address_is_refused(run, server):
    for script in ("segmentation_train.py", "segmentation_sample.py", "visdom_replay.py"):
        result = run(script, "--visdom_server", server)
        assert result.code == 2 and "--visdom_server" in result.err, result


def test_a_password_in_the_address_is_refused_and_not_shown(run):
    result = run("segmentation_train.py", "--visdom_server", "https://reader:horse@host")
    assert result.code == 2 and "VISDOM_PASSWORD" in result.err and "horse" not in result.err


@pytest.mark.parametrize("name", ["a run", "a/b", "a+b", "50%", "läsion", "..", "", "a\\b", "#1?"])
def test_every_name_of_a_run_is_that_of_a_page(shared_server, name):
    env = environment_name(name)
    assert env and not set(env) & set("/+%#?\\_'&")
    curves = Curves("loss", ["loss"])
    monitor = Monitor(name, [curves], port=shared_server.port)
    curves.add(1, {"loss": 1.0})
    monitor.close(PATIENCE)
    assert "loss" in shared_server.windows(env)
