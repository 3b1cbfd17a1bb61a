"""Text and numbers of a run: to the terminal, log.txt, progress.csv, progress.json (JSON lines) and TensorBoard.

Only rank 0 writes. Nothing here is set up by importing it; before `configure`, `log` prints. A full disk costs lines of
the files, not the run.
"""

import contextlib
import csv
import io
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from .system import storage


class Logger:
    def __init__(self, folder: str | os.PathLike | None = None, enabled: bool = True, last_step: int | None = None):
        self.enabled = enabled
        self.folder = Path(folder) if folder else None
        self._text = self._json = self._board = None
        self._start = time.time()
        self.history: list[dict[str, float]] = []  # rows of this run, from before it was resumed, too
        if enabled and folder:
            os.makedirs(folder, exist_ok=True)
            for name in ("log.txt", "progress.json", "progress.csv"):
                storage.replace_link(self.folder / name)
            self._text = open(self.folder / "log.txt", "a", encoding="utf-8")
            if last_step is not None:
                self._forget_after(last_step)
            self._json = open(self.folder / "progress.json", "a", encoding="utf-8")
            self._board = _tensorboard(self.folder / "tensorboard", last_step)

    def log(self, *parts: object) -> None:
        if self.enabled:
            self._say(" ".join(map(str, parts)))

    def dump(self, values: Mapping[str, float], step: int) -> None:
        """Write a dict of numbers for one step."""
        if not self.enabled:
            return
        values = {"step": step, "seconds": round(time.time() - self._start, 3), **values}
        self.history.append(values)
        self._say(_table(values))
        with contextlib.suppress(OSError):
            if self._json:
                self._json.write(json.dumps(values) + "\n")
                self._json.flush()
                self._append_csv(values)
            if self._board:
                for name, value in values.items():
                    self._board.add_scalar(name, value, step)

    def close(self) -> None:
        for file in (self._text, self._json, self._board):
            with contextlib.suppress(OSError):
                if file:
                    file.close()
        self._text = self._json = self._board = None

    def _say(self, text):
        with tqdm.external_write_mode():  # beside any progress bar
            print(text, flush=True)
        with contextlib.suppress(OSError):
            if self._text:
                self._text.write(text + "\n")
                self._text.flush()

    def _forget_after(self, last_step):
        """Drop the rows of later steps, which will be trained again, and a line that was cut off."""
        lines = []
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / "progress.json").read_text(encoding="utf-8").splitlines()
        self.history = kept = [row for row in map(_parsed, lines) if row and row["step"] <= last_step]
        with contextlib.suppress(OSError):
            storage.write_bytes(self.folder / "progress.json", "".join(json.dumps(row) + "\n" for row in kept).encode())
            self._write_csv(list(dict.fromkeys(name for row in kept for name in row)), kept)

    def _append_csv(self, values):
        """Append a row; a column not seen before rewrites the file with it."""
        path = self.folder / "progress.csv"
        rows = []
        if path.exists():
            with open(path, newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                columns = list(reader.fieldnames or [])
                if set(values) <= set(columns):
                    rows = None
                else:
                    rows = list(reader)
                    columns += [name for name in values if name not in columns]
        else:
            columns = list(values)
        if rows is None:
            with open(path, "a", newline="", encoding="utf-8") as file:
                csv.DictWriter(file, columns).writerow(values)
            return
        self._write_csv(columns, [*rows, values])

    def _write_csv(self, columns, rows):
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, columns)
        writer.writeheader()
        writer.writerows(rows)
        storage.write_bytes(self.folder / "progress.csv", table.getvalue().encode())


def _parsed(line):
    """A row of progress.json, None if it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            return row
    return None


def _tensorboard(folder, last_step):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=None if last_step is None else last_step + 1)


def _table(values):
    cells = [(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in values.items()]
    left, right = (max(len(cell[i]) for cell in cells) for i in (0, 1))
    rule = "-" * (left + right + 7)
    return "\n".join([rule, *(f"| {name:<{left}} | {value:<{right}} |" for name, value in cells), rule])


_current = Logger()


def configure(folder: str | os.PathLike | None = None, enabled: bool = True, last_step: int | None = None) -> None:
    """Send everything from here on to `folder` (None: the terminal only); `enabled` is False on ranks above 0.

    :param last_step: rows of progress.* for later steps are dropped, since a run goes on from this one (None: none).
    """
    global _current
    _current.close()
    _current = Logger(folder, enabled, last_step)


def log(*parts: object) -> None:
    _current.log(*parts)


def dump(values: Mapping[str, float], step: int) -> None:
    _current.dump(values, step)


def history() -> list[dict[str, float]]:
    """The rows of progress.json so far, dicts of numbers by name; a run that was resumed has those before, too."""
    return _current.history


def close() -> None:
    """Close the files; later lines go to the terminal."""
    configure(enabled=_current.enabled)
