"""Pictures stay on this machine, or go to the server that was named and nowhere else."""

import http.server
import json
import socket
import ssl
import subprocess
import threading

import pytest
import requests
from helpers.visdom import PATIENCE, Server, points
from PIL import Image

from guided_diffusion.live.client import environment_name, split_address, visdom_client
from guided_diffusion.live.monitor import Monitor
from guided_diffusion.live.windows import Curves, Picture, Text

pytestmark = pytest.mark.usefixtures("no_proxy")


@pytest.fixture(scope="module")
def shared_server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("visdom"))
    yield server
    server.end()


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
    """Send a picture and a curve, or give up."""
    _, curves, picture = windows = [Text("run"), Curves("loss", ["loss"]), Picture("cases", width=110, height=36)]
    monitor = Monitor("private", windows, port=port, server=server, mode="connect")
    picture.show(lambda: Image.new("RGB", (20, 10), "red"))
    curves.add(1, {"loss": 1.0})
    monitor.close(PATIENCE)


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


def test_name_and_password_of_the_environment_log_in(login, monkeypatch, capsys):
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
    client = visdom_client("private", "http://127.0.0.1", login.port, "/views")
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


@pytest.mark.parametrize("server", ["https://reader:horse@host", "reader:horse@host", "https://reader:horse@host:x"])
def test_a_password_in_the_address_is_refused_and_not_shown(run, server):
    result = run("segmentation_train.py", "--visdom_server", server)
    assert result.code == 2 and "VISDOM_PASSWORD" in result.err and "horse" not in result.err


@pytest.mark.parametrize("name", ["a run", "a/b", "a+b", "50%", "läsion", "..", "", "a\\b", "#1?"])
def test_every_name_of_a_run_is_that_of_a_page(shared_server, name):
    env = environment_name(name)
    assert env and not set(env) & set("/+%#?\\_'&")
    curves = Curves("loss", ["loss"])
    monitor = Monitor(name, [curves], port=shared_server.port, mode="connect")
    curves.add(1, {"loss": 1.0})
    monitor.close(PATIENCE)
    assert "loss" in shared_server.windows(env)
