"""What a person sees of a long run: how far it is, and at its end what was written where and what to do next."""

import contextlib
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from time import monotonic

from tqdm import tqdm

FIRST, RARELY = 10, 600  # seconds before the first line of a log, and the most between two


def program_name() -> str:
    """What this program is called, without the folder that it lies in."""
    return os.path.basename(sys.argv[0]).removesuffix(".exe")


def progress(iterable: Iterable | None = None, desc: str = "", total: int | None = None, unit: str = "step",
             enabled: bool = True, initial: int = 0, leave: bool = True) -> "tqdm | _Lines":
    """How far a long thing is, on stderr: a tqdm bar in a terminal, elsewhere (the log of a job, a pipe) a line now and
    then, and none at all for what takes less than ten seconds.

    Like a tqdm: to iterate over, or in a `with` with update(n), of fractions too, where a unit takes long;
    set_postfix(loss=0.1, refresh=False) adds figures.

    :param total: of the units, len(iterable) by default; None for what goes on without an end.
    :param unit: one of what is counted, in the singular.
    :param enabled: False shows nothing, as on ranks above 0.
    :param initial: units done before, which do not count as speed.
    :param leave: whether a bar stays when it is done.
    """
    if total is None:
        with contextlib.suppress(TypeError):
            total = len(iterable)
    if enabled and not sys.stderr.isatty():
        return _Lines(iterable, desc, total, unit, initial)
    count = "{desc}: {unit} {n:.0f} [{elapsed}, {rate_fmt}{postfix}]" if total is None else (
        "{l_bar}{bar}| {n:.0f} of {total_fmt} {unit}s [{elapsed}<{remaining}, {rate_fmt}{postfix}]")
    return tqdm(iterable, desc, total, leave, initial=initial, unit=unit, bar_format=count, dynamic_ncols=True,
                disable=not enabled)


class _Lines:
    """What a tqdm does, as lines of a log: "sampling: 120 of 960 masks (12 %), 0.31 s a mask, 4 min left".

    The time to the next line is a tenth of the time since the start, so that an hour and a week are both readable.
    """

    def __init__(self, iterable, desc, total, unit, initial):
        self.iterable, self.desc, self.total, self.unit, self.n, self.initial = (
            iterable, desc, total, unit, initial, initial)
        self.start, self.due, self.told, self.figures = monotonic(), FIRST, None, {}

    def __iter__(self):
        with self:
            for item in self.iterable:
                yield item
                self.update()

    def update(self, n=1):
        self.n += n
        elapsed = monotonic() - self.start
        if elapsed >= self.due:
            self.due = elapsed + min(max(FIRST, elapsed / 10), RARELY)
            self._tell(elapsed)

    def set_postfix(self, ordered_dict=None, refresh=True, **figures):
        self.figures = {**(ordered_dict or {}), **figures}

    def close(self):
        """Say where it ended, if anything was said before."""
        if self.told not in (None, self.n):
            self._tell(monotonic() - self.start, ended=True)
        self.told = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _tell(self, elapsed, ended=False):
        self.told, done = self.n, self.n - self.initial
        whole = int(self.n + 1e-6)  # fractions hardly ever add up to one
        parts = [f"{self.unit} {whole}" if self.total is None else
                 f"{whole} of {self.total} {self.unit}s ({int(100 * self.n / (self.total or 1) + 1e-6)} %)"]
        if done > 0:
            pace = elapsed / done
            parts.append(f"{1 / pace:.0f} {self.unit}s a second" if pace < 0.1 else
                         f"{pace:.2g} s a {self.unit}" if pace < 10 else f"{duration(pace)} a {self.unit}")
        if ended:
            parts.append(f"ended after {duration(elapsed)}")
        elif self.total is not None and done > 0:
            parts.append(f"{duration(pace * max(0, self.total - self.n))} left")
        parts += [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                  for name, value in self.figures.items()]
        with contextlib.suppress(OSError):  # a full disk costs a line of the log, not the run
            print(f"{self.desc}: {', '.join(parts)}", file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds in words of one or two units: "35 s", "75 min", "5 h 20 min", "3 d 4 h"."""
    minutes = round(seconds / 60)
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def summary(title: str, rows: Sequence[tuple[str, str]], next_command: Sequence[str] = ()) -> str:
    """What a script says at its end.

    :param title: what was done, in a line.
    :param rows: pairs of words: what was written, and where.
    :param next_command: the words of a command line; it stands alone on the last line, ready to be pasted.
    """
    width = max((len(what) for what, _ in rows), default=0)
    lines = [title, *(f"{what:<{width}}  {where}" for what, where in rows)]
    rule = "-" * min(100, 2 + max(map(len, lines)))  # nothing closes a line, so that long paths may run on
    text = "\n".join([rule, *(f"| {line}" for line in lines), rule])
    return f"{text}\nnext:\n{shlex.join(map(str, next_command))}" if next_command else text
