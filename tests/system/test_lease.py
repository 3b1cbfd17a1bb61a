"""A lease is held by one process; of one that is gone, it is taken over."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from guided_diffusion.system import lease, storage
from guided_diffusion.system.lease import Leases

HOLD = """
import sys, time
from guided_diffusion.system import lease
if len(sys.argv) > 3:
    lease._machine = lambda: sys.argv[3]
    lease.socket.gethostname = lambda: sys.argv[3]
leases = lease.Leases(float(sys.argv[2]))
while time.time() % 1 > 0.05:  # many that start in one second try at the same moment
    pass
print("has" if leases.take(sys.argv[1]) is None else "has not", flush=True)
sys.stdin.read()
leases.close()
"""


@pytest.fixture
def hold(environment, tmp_path):
    """hold(timeout, machine) starts a process that tries to take tmp_path/lease; one that ends when its input does."""
    started = []

    def call(timeout=60, *machine):
        command = [sys.executable, "-c", HOLD, tmp_path / "lease", str(timeout), *machine]
        started.append(subprocess.Popen(command, text=True, env=environment, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def leases():
    """leases(timeout, job): Leases that end with the test."""
    made = []

    def make(*args):
        made.append(Leases(*args))
        return made[-1]

    yield make
    for each in made:
        each.close()


def said(process):
    return process.stdout.readline().strip()


def test_of_many_processes_one_takes_it_and_the_next_when_that_gives_it_back(hold, tmp_path):
    many = [hold() for _ in range(4)]
    answers = [said(process) for process in many]
    assert sorted(answers) == ["has", *["has not"] * 3]
    first = many[answers.index("has")]
    assert json.loads((tmp_path / "lease").read_bytes())["pid"] == first.pid
    first.communicate("")
    assert not (tmp_path / "lease").exists() and said(hold()) == "has"


def test_what_a_killed_process_of_this_machine_held_is_taken_at_once(hold, leases, tmp_path):
    process, mine = hold(), leases(60)
    assert said(process) == "has"
    holder = mine.take(tmp_path / "lease")
    assert holder.pid == process.pid and f"process {process.pid} on {os.uname().nodename} (since 20" in str(holder)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert mine.take(tmp_path / "lease") is None and mine.holds(tmp_path / "lease")
    assert [path.name for path in tmp_path.iterdir()] == ["lease"]


def test_another_machines_lease_is_taken_once_it_is_renewed_no_more(hold, leases, tmp_path):
    process, mine, path = hold(1, "elsewhere"), leases(1), tmp_path / "lease"
    assert said(process) == "has"
    end = time.monotonic() + 2
    while time.monotonic() < end:
        assert mine.take(path).host == "elsewhere"
        time.sleep(0.05)
    assert mine.renewed(path)
    os.kill(process.pid, signal.SIGSTOP)
    begin = time.monotonic()
    while mine.take(path) is not None:
        time.sleep(0.05)
    assert time.monotonic() - begin > 0.8
    os.kill(process.pid, signal.SIGCONT)
    process.communicate("")
    assert mine.holds(path)  # the other gave back nothing that is not its own


def held_by(**facts):
    return json.dumps({**lease.Holder("far", 1, "then", "its own", "", "", "first")._asdict(), **facts}).encode()


def test_a_later_start_of_the_same_job_takes_over_at_once_and_the_earlier_one_knows(leases, tmp_path):
    first, other, later = leases(60, "job"), leases(60, "another"), leases(60, "job")
    for each in (first, other, later):
        each.me = each.me._replace(machine=each.me.generation)
    assert first.take(tmp_path / "lease") is None and other.take(tmp_path / "lease").job == "job"
    assert first.holds(tmp_path / "lease")
    assert later.take(tmp_path / "lease") is None
    assert later.holds(tmp_path / "lease") and not first.holds(tmp_path / "lease")


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 2000, b"\xff", held_by(pid="one"), held_by(pid=[1])])
def test_what_is_no_lease_is_anothers_until_it_has_not_changed_for_the_time(leases, tmp_path, content):
    (tmp_path / "lease").write_bytes(content)
    mine = leases(0.3)
    assert "process" in str(mine.take(tmp_path / "lease"))
    time.sleep(0.4)
    assert mine.take(tmp_path / "lease") is None


def test_a_bucket_tells_leases_apart_too(leases, bucket):
    path, mine, other = "gs://bucket/run/.lease", leases(1), leases(1)
    other.me = other.me._replace(machine="elsewhere")
    assert other.take(path) is None and mine.take(path).machine == "elsewhere"
    time.sleep(0.5)
    assert mine.take(path) and mine.renewed(path)
    other.close()
    assert not bucket and mine.take(path) is None
    bucket[path] = held_by()
    assert not mine.holds(path) and other.take(path).host == "far"
    mine.give_back(path)
    assert bucket[path] == held_by()


@pytest.mark.parametrize("store, path, status, method, url, condition", [
    ("_gcp", "gs://bucket/a/b", 200, "POST", "https://storage.googleapis.com/upload/storage/v1/b/bucket/o",
     {"params": {"uploadType": "media", "name": "a/b", "ifGenerationMatch": "0"}}),
    ("_azure", "az://account/box/a/b", 201, "PUT", "https://account.blob.core.windows.net/box/a%2Fb",
     {"headers": {"x-ms-blob-type": "BlockBlob", "If-None-Match": "*"}})])
def test_a_bucket_is_asked_to_write_only_what_is_absent(monkeypatch, store, path, status, method, url, condition):
    module = pytest.importorskip(f"blobfile.{store}")
    requests, answers = [], [status, 412]

    def execute(conf, request):
        requests.append(request)
        return type("Response", (), {"status": answers.pop(0)})

    monkeypatch.setattr(module, "execute_api_request", execute)
    assert storage.write_new(path, b"me") and not storage.write_new(path, b"me")
    request = requests[0]
    assert (request.method, request.url, request.data) == (method, url, b"me") and 412 in request.success_codes
    assert all(getattr(request, name) == value for name, value in condition.items())


def test_only_what_was_seen_is_removed(tmp_path):
    (tmp_path / "a").write_bytes(b"another's")
    storage.remove_exactly(tmp_path / "a", b"seen")
    assert (tmp_path / "a").read_bytes() == b"another's"
    storage.remove_exactly(tmp_path / "a", b"another's")
    storage.remove_exactly(tmp_path / "a", b"another's")
    assert not [*tmp_path.iterdir()]
