"""The hosts of benchmarks/hosts.py: what their switch does to frames, and one that is cut off."""

import socket
import sys
import time

import pytest
from helpers.files import ROOT


@pytest.fixture
def wires(monkeypatch):
    """wires(count, ...): a Switch with these options, and the ends of so many wires that lead to it."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import hosts

    made = []

    def make(count, *options):
        switch, ends = hosts.Switch(0, *options), []
        for _ in range(count):
            inner, outer = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            switch.taps.append(inner.fileno())
            outer.settimeout(5)
            ends.append(outer)
            made.extend([inner, outer])
        made.append(switch.closed)
        return switch, ends

    yield make
    for each in reversed(made):
        each.set() if hasattr(each, "set") else each.close()


def frame(target, source, text=b""):
    return bytes([target] * 6 + [source] * 6) + text


def heard(end):
    """Everything that arrives at an end until nothing does for a while."""
    found = []
    end.settimeout(0.5)
    try:
        while True:
            found.append(end.recv(100))
    except TimeoutError:
        return found


def test_the_switch_learns_where_hosts_are_and_cuts_them_off(wires):
    switch, (a, b, c) = wires(3)
    a.send(frame(255, 1))
    assert heard(b) == heard(c) == [frame(255, 1)] and heard(a) == []
    b.send(frame(1, 2))
    assert heard(a) == [frame(1, 2)] and heard(c) == []
    switch.cut.add(switch.taps[1])
    a.send(frame(2, 1))
    b.send(frame(1, 2))
    assert heard(b) == heard(a) == []
    switch.cut.clear()
    a.send(frame(2, 1))
    assert heard(b) == [frame(2, 1)]


def test_the_switch_delays_frames_and_loses_the_same_share_of_them_for_a_seed(wires):
    _, (a, b) = wires(2, 0.2, 0.25)
    begin = time.monotonic()
    a.send(frame(255, 1))
    b.recv(100)
    assert time.monotonic() - begin > 0.19
    got = []
    for _ in range(2):
        _, (a, b) = wires(2, 0.0, 0.25)
        for i in range(100):
            a.send(frame(255, 1, bytes([i])))
            time.sleep(0.001)
        got.append([data[-1] for data in heard(b)])
    assert got[0] == got[1] == sorted(got[0]) and 60 < len(got[0]) < 90


@pytest.mark.long
def test_a_host_that_is_cut_off_is_named_by_the_other_and_nothing_is_left_running(processes):
    result = processes(sys.executable, ROOT / "benchmarks" / "hosts.py", "--parts", "cut0")
    if result.returncode == 77:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| cut, rank 0's host | rank 0 (process" in result.stdout
