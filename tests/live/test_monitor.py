"""The Visdom view shows what it is given, and no server, whatever becomes of it, ever holds a run up."""

import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.visdom import PATIENCE, Server, free_port, points, wait_for, windows_of
from PIL import Image

from guided_diffusion import logger
from guided_diffusion.live import server as visdom_server
from guided_diffusion.live.client import visdom_client
from guided_diffusion.live.monitor import Monitor, recorded
from guided_diffusion.live.windows import Curves, Picture, Text
from guided_diffusion.system.packages import install_command


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
    port = {"port": server.port} if server else {}
    return *windows, Monitor(env, windows, **{"mode": "connect", **port, **options})


def red():
    return Image.new("RGB", (20, 10), "red")


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
    client = visdom_client("any", "http://127.0.0.1", 1, "")
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


def test_off_sends_and_records_nothing_but_says_how_to_reach_a_server_that_listens(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        _, curves, _, monitor = view("off", port=port, folder=tmp_path, mode="off")
        curves.add(1, {"loss": 1.0})
        monitor.close()
        listening.settimeout(PATIENCE)
        assert listening.accept()[0].recv(1) == b""  # it was looked for, and sent nothing
        listening.settimeout(0.1)
        with pytest.raises(TimeoutError):
            listening.accept()
    out, err = capsys.readouterr()
    assert err == "" and out.count("\n") == 1 and f"port {port}" in out and "--visdom connect" in out
    assert not monitor.active and not list(tmp_path.iterdir())
    assert not view("off", port=port, mode="off")[-1].active and capsys.readouterr() == ("", "")


def test_absent_package_costs_one_line(capsys, monkeypatch, shared_server):
    monkeypatch.setitem(sys.modules, "visdom", None)
    _, curves, _, monitor = view("absent", shared_server)
    curves.add(1, {"loss": 1.0})
    monitor.close()
    out, err = capsys.readouterr()
    assert not monitor.active and err == "" and out.count("\n") == 1
    assert f"--visdom connect needs the package visdom: {install_command('visdom')}" in out


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
    assert err == "" and out.count("\n") == 1 and f"127.0.0.1:{port} does not answer" in out and "--visdom start" in out
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


@pytest.mark.long
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


@pytest.mark.long
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
    (tmp_path / "guided_diffusion.py").write_text("raise SystemExit('a module of the working directory')")
    code = f"""
from guided_diffusion.live.monitor import Monitor
from guided_diffusion.live.windows import Curves
curves = Curves("loss", ["loss"])
monitor = Monitor("started", [curves], port={port}, mode="start")
curves.add(1, {{"loss": 1.0}})
monitor.close({PATIENCE})
monitor.close({PATIENCE})
"""
    result = subprocess.run([sys.executable, "-P", "-c", code], env={**environment, "HOME": str(tmp_path)},
                            cwd=tmp_path, capture_output=True, text=True, timeout=2 * PATIENCE)
    try:
        assert result.returncode == 0 and f"watch it at http://127.0.0.1:{port}/env/started" in result.stdout, result
        assert points(windows_of(port, "started")["loss"]) == [(1, 1.0)]
        outside = [address for address in addresses() if not address.startswith("127.")]
        for address in outside:
            with pytest.raises(OSError):
                socket.create_connection((address, port), timeout=2)
    finally:
        for process in processes_with("guided_diffusion.live.server", str(port)):
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


@pytest.mark.long
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
    monitor = Monitor("full", [picture], tmp_path / "results", port=free_port(), mode="connect")
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


def test_replaying_and_the_server_name_the_package_that_is_missing(run, tmp_path, monkeypatch):
    view("kept", port=free_port(), folder=tmp_path)[-1].close(PATIENCE)
    monkeypatch.setitem(sys.modules, "visdom", None)
    result = run("visdom_replay.py", "--results_dir", tmp_path, "--visdom_port", free_port())
    assert result.code == 2 and install_command("visdom") in result.err, result.err
    monkeypatch.setattr(sys, "argv", ["server"])
    with pytest.raises(SystemExit, match="visdom") as stop:
        visdom_server.main()
    assert install_command("visdom") in str(stop.value)
