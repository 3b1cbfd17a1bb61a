"""Machines that are not there are named before anything starts."""

import socket
import subprocess
import sys
import threading
import time

import pytest
from helpers.processes import free_port
from helpers.refusals import refusal

from guided_diffusion.system import machines


def test_hosts_come_from_a_list_or_a_file(tmp_path):
    assert machines.hosts_of("localhost, 127.0.0.1") == ["localhost", "127.0.0.1"]
    (tmp_path / "hosts").write_text("# two\nlocalhost\n\n127.0.0.1  # the same\n")
    assert machines.hosts_of(str(tmp_path / "hosts")) == ["localhost", "127.0.0.1"]


@pytest.mark.parametrize("text, said", [
    ("localhost\nlocal host\n", "hosts, line 2: 'local host' is no name of a machine"),
    ("localhost:4\n", "hosts, line 1: 'localhost:4' is no name of a machine"),
    ("# two\nlocalhost\nnowhere.invalid", "hosts, line 3: nowhere.invalid does not resolve on"),
    ("localhost\nlocalhost\n", "hosts, line 2: localhost is there twice"),
    ("\n# none\n", "names no machine")])
def test_a_hosts_file_with_a_typo_is_refused_by_its_line(tmp_path, text, said):
    (tmp_path / "hosts").write_text(text)
    assert said in refusal(machines.hosts_of, str(tmp_path / "hosts"))
    if "line" in said:
        names = ",".join(line for line in text.splitlines() if not line.startswith("#"))
        assert refusal(machines.hosts_of, names).startswith("HOSTS: ")


@pytest.mark.parametrize("endpoint", ["node1", "node1:", ":29500", "node1:x", "node1:70000"])
def test_a_meeting_point_is_a_host_and_a_port(endpoint):
    assert f"RENDEZVOUS {endpoint}: is not HOST:PORT" in refusal(machines.wait_for_meeting, endpoint, 0)


def test_a_meeting_point_is_waited_for_and_named_where_it_cannot_be_reached(monkeypatch):
    port = free_port()
    machines.wait_for_meeting(f"localhost:{port}", 0)  # of this machine: its own launcher will listen
    monkeypatch.setattr(machines, "interfaces", dict)
    monkeypatch.setattr(machines, "addresses_of", lambda *args: {"192.0.2.7"})
    message = refusal(machines.wait_for_meeting, f"localhost:{port}", 0)
    assert message.startswith(f"RENDEZVOUS localhost:{port}: could not be reached from {socket.gethostname()} within 0")
    assert "(Connection refused); start the recipe on localhost, too" in message

    def listen():
        time.sleep(0.3)
        with socket.create_server(("127.0.0.1", port)) as server:
            server.accept()

    thread = threading.Thread(target=listen)
    thread.start()
    machines.wait_for_meeting(f"127.0.0.1:{port}", 20)
    thread.join()


def test_a_recipe_is_told_in_one_line(environment):
    for words, code, out in ((["hosts", "localhost"], 0, "localhost\n"), (["hosts", "nowhere.invalid"], 2, ""),
                             (["meeting", "nowhere.invalid:1", "0"], 2, "")):
        done = subprocess.run([sys.executable, "-m", "guided_diffusion.system.machines", *words], env=environment,
                              capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (code, out) and done.stderr.count("\n") == (code != 0)
