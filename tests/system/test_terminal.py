"""How far a run is: a bar in a terminal, few lines in a log; and what it says at its end."""

import os
import pty
import shlex
import subprocess
import sys
import termios

import pytest

from guided_diffusion.system import terminal
from guided_diffusion.system.terminal import duration, progress, summary


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still: clock.now, in seconds."""

    class Clock:
        now = 1000.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(terminal, "monotonic", clock)
    return clock


@pytest.fixture
def lines(capsys):
    """lines(): what went to stderr since the last call, as lines; nothing ever goes to stdout."""

    def read():
        out, err = capsys.readouterr()
        assert out == "" and "\r" not in err
        return err.splitlines()

    return read


# ---- where there is no terminal ----

def test_what_takes_less_than_ten_seconds_says_nothing(clock, lines):
    with progress(desc="checking", total=100) as bar:
        for _ in range(100):
            clock.now += 0.099
            bar.update()
    assert lines() == []


def test_lines_say_how_much_how_fast_and_how_long_still(clock, lines):
    with progress(desc="sampling", total=960, unit="mask") as bar:
        clock.now += 37
        bar.update(120)
        assert lines() == ["sampling: 120 of 960 masks (12 %), 0.31 s a mask, 4 min left"]
        bar.update(0)
        clock.now += 9
        bar.update(30)
        assert lines() == []
        clock.now += 254
        bar.update(810)
        assert lines() == ["sampling: 960 of 960 masks (100 %), 0.31 s a mask, 0 s left"]
    assert lines() == []  # which was all


def test_lines_come_at_growing_intervals_and_at_least_every_ten_minutes(clock, lines):
    times = []
    with progress(desc="training", total=10 ** 6) as bar:
        for second in range(5, 86400, 5):
            clock.now = 1000.0 + second
            bar.update()
            times += [second] * len(lines())
    gaps = [after - before for before, after in zip(times, times[1:])]
    assert times[0] == 10 and gaps[0] == 10 and gaps[-1] == 600 and gaps == sorted(gaps)
    assert sum(time <= 3600 for time in times) < 50 and len(times) < 200


@pytest.mark.parametrize("seconds, count, speed", [
    (20, 2, "10 s a case"), (20, 80, "0.25 s a case"), (20, 4000, "200 cases a second"), (1000, 2, "8 min a case"),
    (199.2, 2, "2 min a case")])
def test_speed_is_in_the_unit_that_reads_best(clock, lines, seconds, count, speed):
    bar = progress(desc="x", total=10 ** 6, unit="case")
    clock.now += seconds
    bar.update(count)
    assert lines()[0].split(", ")[1] == speed


def test_without_an_end_the_number_is_told_with_the_figures_beside_it(clock, lines):
    bar = progress(desc="training", initial=4000)
    bar.set_postfix({"images/s": 3.2}, refresh=False, loss=0.12345678)
    clock.now += 100
    bar.update(200)
    assert lines() == ["training: step 4200, 0.5 s a step, images/s 3.2, loss 0.1235"]


def test_what_was_done_before_counts_as_done_but_not_as_speed(clock, lines):
    bar = progress(desc="training", total=5000, initial=4000)
    clock.now += 100
    bar.update(0)
    assert lines() == ["training: 4000 of 5000 steps (80 %)"]  # nothing is known yet
    clock.now += 100
    bar.update(500)
    assert lines() == ["training: 4500 of 5000 steps (90 %), 0.4 s a step, 3 min left"]


def test_the_end_is_told_if_anything_was(clock, lines):
    with pytest.raises(KeyboardInterrupt), progress(desc="scoring", total=1500, unit="case") as bar:
        clock.now += 10
        bar.update(10)
        clock.now += 7
        bar.update(5)
        raise KeyboardInterrupt
    assert lines() == ["scoring: 10 of 1500 cases (0 %), 1 s a case, 25 min left",
                       "scoring: 15 of 1500 cases (1 %), 1.1 s a case, ended after 17 s"]


def test_iterating_passes_everything_on_and_counts_it(clock, lines):
    def slow(items):
        for item in items:
            clock.now += 6
            yield item

    assert list(progress(slow("abc"), "reading", unit="file", total=3)) == ["a", "b", "c"]
    assert lines() == ["reading: 2 of 3 files (66 %), 6 s a file, 6 s left",
                       "reading: 3 of 3 files (100 %), 6 s a file, ended after 18 s"]
    bar = progress(range(5), "reading")
    assert bar.total == 5 and list(progress([], "nothing")) == [] and progress(iter(()), "unknown").total is None


def test_units_that_take_long_are_counted_in_fractions(clock, lines):
    with progress(desc="sampling", total=2, unit="mask") as bar:
        for _ in range(1994):
            clock.now += 1
            bar.update(1 / 997)  # steps of a sampler
    told = lines()
    assert told[0] == "sampling: 0 of 2 masks (0 %), 17 min a mask, 33 min left"
    assert told[-1] == "sampling: 2 of 2 masks (100 %), 17 min a mask, ended after 33 min" and len(told) < 50


def test_nothing_is_shown_on_other_ranks(clock, lines):
    for bar in (progress(range(3), "x", enabled=False), progress(desc="x", total=3, enabled=False)):
        clock.now += 100
        bar.set_postfix(loss=1.0, refresh=False)
        bar.update(2)
        bar.close()
    assert list(progress("abc", enabled=False)) == ["a", "b", "c"] and lines() == []


@pytest.mark.parametrize("seconds, words", [
    (0, "0 s"), (35.4, "35 s"), (99.4, "99 s"), (99.6, "2 min"), (75 * 60, "75 min"), (5 * 3600 + 1200, "5 h 20 min"),
    (7199.9, "2 h 0 min"), (3 * 86400 + 4 * 3600, "3 d 4 h"), (2 * 86400 - 1, "2 d 0 h")])
def test_durations_read_well(seconds, words):
    assert duration(seconds) == words


def test_a_full_disk_costs_lines_not_the_run(clock, monkeypatch):
    class Full:
        def isatty(self):
            return False

        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    bar = progress(desc="x")
    clock.now += 100
    bar.update()
    assert bar.n == 1


# ---- processes of their own ----

RUN = """
import time
from guided_diffusion import logger
from guided_diffusion.system import terminal

terminal.FIRST = 0.05
with terminal.progress(desc="sampling", total=4, unit="mask") as bar:
    for i in range(4):
        time.sleep(0.06)
        bar.set_postfix(loss=0.5, refresh=False)
        bar.update()
        logger.log("case", i)
"""


def test_a_pipe_gets_whole_lines_on_stderr_and_the_log_on_stdout(processes):
    result = processes(sys.executable, "-c", RUN)
    assert result.returncode == 0 and result.stdout == "".join(f"case {i}\n" for i in range(4))
    lines = result.stderr.splitlines()
    assert 2 <= len(lines) <= 4 and all(line.startswith("sampling: ") for line in lines)
    assert lines[0].startswith("sampling: 1 of 4 masks (25 %), ") and lines[0].endswith(" left, loss 0.5")
    assert "\r" not in result.stderr and "\x1b" not in result.stderr


def test_a_terminal_gets_a_bar_that_lines_of_the_log_do_not_break(environment):
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 100))
    process = subprocess.Popen([sys.executable, "-c", RUN], env=environment, stdin=theirs, stdout=theirs,
                               stderr=theirs, start_new_session=True)
    os.close(theirs)
    text = b""
    try:
        while part := os.read(ours, 4096):
            text += part
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(ours)
        assert process.wait(60) == 0
    text = text.decode()
    assert "| 4 of 4 masks [" in text and "mask/s, loss=0.5]" in text and "s a mask" not in text
    assert text.count("\n") <= 6  # the bar is drawn over itself: 4 lines of the log, and its own
    for i in range(4):
        assert f"\rcase {i}\r\n" in text.replace("\x1b[A", "")


# ---- at the end ----

def test_summary_tells_what_is_where_and_the_next_command_stands_alone():
    text = summary("trained to step 1200", [("weights", "results/savedmodel.pt"), ("curves", "results/progress.png")],
                   ["python", "sample.py", "--data_dir", "my scans", "--num_ensemble", 16])
    *table, word, command = text.splitlines()
    assert table == ["-" * 32, "| trained to step 1200", "| weights  results/savedmodel.pt",
                     "| curves   results/progress.png", "-" * 32]
    assert word == "next:" and command == "python sample.py --data_dir 'my scans' --num_ensemble 16"


def test_summary_of_long_paths_stays_a_table_and_the_command_survives_the_shell():
    words = ["python", "a b's", "/".join(["long"] * 60), "größer", "$HOME;*"]
    text = summary("done", [("all of it", words[2]), ("x", "y")], words)
    lines = text.splitlines()
    assert lines[0] == lines[4] == "-" * 100 and lines[2] == f"| all of it  {words[2]}" and lines[3] == "| x          y"
    assert shlex.split(lines[-1]) == words and text.isascii() is False
    echoed = subprocess.run(["sh", "-c", f"printf '%s\\n' {shlex.join(words[1:])}"], capture_output=True, text=True)
    assert echoed.stdout.splitlines() == words[1:]


def test_summary_without_rows_or_command_is_a_line_in_rules():
    assert summary("nothing to do", []) == "---------------\n| nothing to do\n---------------"
