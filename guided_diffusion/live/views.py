"""What training and sampling show while they run: windows of a Visdom page, and pictures in the results folder."""

import html
import math
import os
import shlex
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from torch import Tensor

from .. import logger, metrics
from ..data.cases import Case
from ..data.masks import to_masks
from ..draw import montage
from ..system import packages, storage
from ..system.lease import Lost
from ..system.terminal import duration
from ..training import validation
from ..training.callback import Callback, Loop
from .monitor import Monitor
from .windows import Curves, Picture, Text

# pixels of windows, see windows.Picture; three curves fill a row of a page that is at least 1280 wide
LARGE, SMALL = {"width": 405, "height": 336}, {"width": 405, "height": 276}
FRAMES = 8  # of a film strip


def environment(flags: Mapping[str, Any], folder: str) -> str:
    """The name of a run's Visdom environment: that of --visdom_env, or of its results folder."""
    return flags["visdom_env"] or os.path.basename(os.path.abspath(folder))


class TrainingView(Callback):
    """Is it learning? Curves of all that is logged, and what the network makes of a few cases.

    :param folder: the results folder; flags: all flags of the run, a dict.
    :param log_folder: where visdom.log, progress.png and panel.png go; None for nowhere.
    :param end: the last step, 0 for none; global_batch: examples in a step.
    :param losses: the names of the losses in the log, that which is trained on first.
    :param splits: of the parts that the log splits each loss by, as in loss_q0; () for none.
    :param split_by: what such a part is, in words.
    :param cases: the Cases that will be drawn.
    :param enabled: False shows nothing, as on ranks above 0.
    """

    def __init__(self, folder: str, flags: Mapping[str, Any], log_folder: str | None, end: int, global_batch: int,
                 losses: Sequence[str], splits: Sequence[str] = (), split_by: str = "part", cases: Sequence[Case] = (),
                 enabled: bool = True):
        self.flags, self.log_folder, self.last_step, self.global_batch = flags, log_folder, end, global_batch
        self.enabled, self.seen = enabled, 0
        self.run = Text("run", every=2, **LARGE)
        self.panel, shown = Picture("cases", width=1240, height=666), cases[:validation.SHOWN]
        parts = [Curves(f"{name} by {split_by}", {f"{name}_{part}": part for part in splits}, log=True, **SMALL)
                 for name in losses if splits]
        scores = [Curves("scores of the validation cases",
                         {f"val_{name}_{validation.SCORED}": f"{name}_{validation.SCORED}"
                          for name in validation.LOGGED}, **SMALL)] if flags["val_dir"] else []
        for window in [*scores, *parts][:1]:  # stands in the first row
            window.opts.update(LARGE)
        self.curves = [
            Curves("losses", losses, log=True, first_width=4, **LARGE),  # which its parts may cover
            *scores, *parts,
            Curves("norms", {"grad_norm": "gradient", "param_norm": "parameters"}, log=True, **SMALL),
            Curves("learning rate", ["lr"], log=True, **SMALL),
            Curves("images per second", ["images_per_second"], **SMALL),
            Curves("share of time waiting for data", ["waiting_for_data"], **SMALL),
            Curves("memory in GB", ["memory_gb"], **SMALL),
        ]
        self._read_log()
        if enabled and shown:
            blank = [case.raters[:0] for case in shown]
            self.panel.show(lambda: montage.panel(shown, blank, "the cases to be drawn, as they are outlined"))
        windows = [self.run, *self.curves[:2], self.panel, *self.curves[2:]]
        self.monitor = Monitor(environment(flags, folder), windows, log_folder if enabled else None,
                               **monitor_flags(flags, enabled))
        self.progress = ProgressPicture(log_folder if enabled else None, losses)

    def logged(self, loop: Loop = None) -> None:
        """Show what was logged since the last call."""
        self._read_log()
        self.progress.draw()

    def drawn(self, loop: Loop, cases: Sequence[Case], masks: Sequence[np.ndarray], title: str) -> None:
        """Show the ensembles, [n, H, W] bool, of Cases, and keep the picture as panel.png."""
        if self.enabled:
            shown = validation.SHOWN
            picture = montage.panel(cases[:shown], [drawn[:shown] for drawn in masks[:shown]], title)
            self.panel.show(lambda: picture)
            if self.log_folder:
                with suppress(OSError):
                    storage.write_bytes(os.path.join(self.log_folder, "panel.png"), montage.png(picture))

    def close(self) -> None:
        self.progress.draw(last=True)
        self.monitor.close()

    def _read_log(self):
        rows = logger.history()
        for row in rows[self.seen:]:
            for window in self.curves:
                window.add(row["step"], row)
        self.seen = len(rows)

        row = next((row for row in reversed(rows) if "lr" in row), {"step": 0})
        step, speed = row["step"], row.get("images_per_second")
        facts = [f"step {step:,} of {self.last_step:,}" if self.last_step else f"step {step:,}, until it is stopped"]
        if speed:
            facts.append(f"{speed:.3g} images a second")
        if self.last_step and step >= self.last_step:
            facts.append("done")
        elif self.last_step and speed:
            facts.append(f"{duration((self.last_step - step) * self.global_batch / speed)} left")
        if row.get("bad_steps"):
            facts.append(f"{row['bad_steps']} steps skipped: their gradient was not finite")
        self.run.show(_page(facts, self.flags))


class SamplingView:
    """What is drawn at the moment: x_t and the predicted x_0 on the way, the case with its masks, scores so far.

    :param total: cases that this process will draw; steps: of the sampler.
    """

    def __init__(self, folder: str, flags: Mapping[str, Any], log_folder: str | None, total: int, steps: int,
                 enabled: bool = True):
        self.flags, self.total, self.start = flags, total, time.monotonic()
        self.ged, self.done, self.masks = [], 0, 0
        self.steps, self.shown_steps = steps, set(np.linspace(1, steps, FRAMES).round().astype(int).tolist())
        self.begun = {}  # name -> a case and its samples so far
        self.members, self.step, self.frames, self.filmed = None, 0, None, -math.inf
        self.run = Text("run", every=2, **LARGE)
        self.scores = Curves("mean GED of the cases so far", ["GED"], xlabel="cases", width=820, height=336)
        self.film = Picture("from noise to a mask", every=2, width=1240, height=381)
        self.case = Picture("case", every=2, width=1240, height=891)
        self._describe()
        self.monitor = Monitor(environment(flags, folder) + "-sampling", [self.run, self.scores, self.film, self.case],
                               log_folder if enabled else None, **monitor_flags(flags, enabled))

    def begin(self, case: Case) -> None:
        """Take note that a Case is being drawn."""
        if self.monitor.active:
            self.begun[case.name] = case, []

    def on_step(self, members: Sequence[tuple[str, int]], x: Tensor, x_start: Tensor) -> None:
        """Show a step of the sampler, see EnsembleSampler.draw, and after the last one the masks."""
        if not self.monitor.active:
            return
        if members is not self.members:  # the next batch
            self.members, self.step = members, 0
            if time.monotonic() - self.filmed >= self.film.every:  # waiting for the device takes time
                self.filmed, self.frames = time.monotonic(), []
            else:
                self.frames = None
        self.step += 1
        if self.step in self.shown_steps and self.frames is not None:
            self.frames.append((self.step, *(z[0, 0].float().cpu().numpy() for z in (x, x_start))))
            frames, title = list(self.frames), f"{members[0][0]}, mask {members[0][1]}"
            self.film.show(lambda: montage.film(title, frames))
        if self.step == self.steps:
            for (name, _), sample in dict(zip(members, x[:, 0].cpu().numpy())).items():
                self.begun[name][1].append(sample)
            case, samples = self.begun[members[-1][0]]
            samples, median_blur = np.stack(samples), self.flags["median_blur"]
            # cut only if it is drawn, which most are not: whole ensembles come cut to show_case
            self.case.show(lambda: montage.case_montage(*case, to_masks(samples, median_blur)))

    def show_case(self, case: Case, masks: np.ndarray) -> None:
        """Show a Case with its ensemble, [n, H, W] bool."""
        if self.monitor.active:
            self.begun.pop(case.name)
            self.done, self.masks = self.done + 1, self.masks + len(masks)
            self.case.show(lambda: montage.case_montage(*case, masks))
            if len(case.raters):
                self.ged.append(metrics.Agreement(masks, case.raters).ged().item())
                self.scores.add(len(self.ged), {"GED": np.mean(self.ged)})
            self._describe()

    def close(self) -> None:
        self.monitor.close()

    def _describe(self):
        facts = [f"{self.done:,} of {self.total:,} cases"]
        if self.done:
            seconds = time.monotonic() - self.start
            facts.append(f"{seconds / self.masks:.2g} s a mask")
            facts.append(f"{duration(seconds / self.done * (self.total - self.done))} left"
                         if self.done < self.total else "done")
        if self.ged:
            facts.append(f"mean GED {np.mean(self.ged):.3f} of {len(self.ged)} cases with raters")
        self.run.show(_page(facts, self.flags))


class ProgressPicture:
    """progress.png, the curves of a run for those without Visdom, drawn on a thread of its own.

    :param folder: where it goes; None for nowhere.
    :param losses: see TrainingView.
    """

    share = 0.01  # of the time may go there

    def __init__(self, folder: str | None, losses: Sequence[str], delay: float = 5.0):
        self.losses = losses
        if folder and not packages.is_installed("matplotlib"):
            logger.log(packages.missing("progress.png", "matplotlib") + "; going on without")
            folder = None
        self.path = folder and os.path.join(folder, "progress.png")
        self.thread, self.next_time = None, time.monotonic() + delay

    def draw(self, last: bool = False) -> None:
        """Draw what is logged, unless too much time has just gone there; the last one is waited for."""
        if last and self.thread:
            self.thread.join()
        if not self.path or not last and (self.thread and self.thread.is_alive() or time.monotonic() < self.next_time):
            return
        self.thread = threading.Thread(target=self._draw, args=[list(logger.history())], daemon=True)
        self.thread.start()
        if last:
            self.thread.join()

    def _draw(self, rows):
        start = time.monotonic()
        with suppress(OSError, ImportError, Lost):  # training does without, even where matplotlib is broken
            from ..draw.plots import progress_figure

            if rows:
                storage.write_bytes(self.path, progress_figure(rows, self.losses))
        self.next_time = time.monotonic() + (time.monotonic() - start) / self.share


def monitor_flags(flags: Mapping[str, Any], enabled: bool = True) -> dict[str, Any]:
    """What a Monitor takes of the flags; of the ranks, one draws."""
    return {"server": flags["visdom_server"], "port": flags["visdom_port"] if enabled else 0, "mode": flags["visdom"]}


def _page(facts, flags):
    """HTML of a run: facts, its command, its flags."""
    facts = "".join(f"<h4>{html.escape(fact)}</h4>" for fact in facts)
    rows = "".join(f"<tr><td>--{name}</td><td>{html.escape(str(value))}</td></tr>"
                   for name, value in flags.items() if value not in ("", None))
    return (f'<div style="padding: 8px; color: black">{facts}'
            f'<pre style="white-space: pre-wrap">{html.escape(shlex.join(sys.argv))}</pre>'
            f'<table class="table table-condensed">{rows}</table></div>')
