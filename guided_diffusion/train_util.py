"""One training step, and the loop around it."""

import contextlib
import copy
import signal
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import dist_util, logger, shards
from .data.noise import seed_dropout
from .data.stream import Batch, ShuffledCases, to_floats
from .learning_rate import SCALINGS
from .methods.base import Losses, Method
from .muon import MuonAdamW
from .networks.base import copy_sharing_frozen, train_mode, units_of, without_weights
from .nn import update_ema
from .system.terminal import progress
from .training.callback import Callback, Stopped
from .training.settings import Settings
from .training.watch import Later, Meter, SignalsNoted


class TrainLoop:
    """Trains a method on a stream of batches, and logs.

    Everything random in a step follows from the seed and the examples' places in the stream, so a run does not depend
    on how many processes share it, and resumes as if it had never stopped. The moving averages cover the network that
    draws.

    :param method: on its device; with --shard True it may be on the CPU, and only this rank's part goes to the device.
    :param callbacks: what else happens, in this order; see training.callback.
    """

    def __init__(self, method: Method, data: ShuffledCases, settings: Settings, callbacks: Sequence[Callback] = ()):
        self.method, self.data, self.settings, self.callbacks = method, data, settings, list(callbacks)
        self.microbatch = min(size for size in (settings.batch_size, settings.microbatch) if size > 0)
        rank, ranks = dist_util.rank(), dist_util.world_size()
        self.global_batch = settings.global_batch or settings.batch_size * settings.grad_accumulation * ranks
        # this rank's part of a global batch, as even as can be
        self.share = range(rank * self.global_batch // ranks, (rank + 1) * self.global_batch // ranks)
        growth = self.global_batch / (settings.lr_base_batch or self.global_batch)
        self.lr = settings.lr * SCALINGS[settings.lr_scaling].factor(growth)
        self.end = min([n for n in (settings.max_steps, settings.lr_anneal_steps) if n], default=0)
        if dist_util.device_of(method).type == "cuda" and not settings.shard:
            method.model.to(memory_format=torch.channels_last)
        self._ema = {rate: copy_sharing_frozen(method.model).requires_grad_(False).eval()
                     for rate in settings.ema_rate.replace(" ", "").split(",")}
        self.ddp = method
        if settings.shard:
            self._empty = without_weights(method.model)
            self._share_out()
        elif dist.is_initialized():
            self.ddp = DistributedDataParallel(method, gradient_as_bucket_view=True)
            if settings.wire_dtype == "bfloat16":
                self.ddp.register_comm_hook(None, dist_util.all_reduce_in_bf16)
        self.trained = [p for p in method.parameters() if p.requires_grad]
        self.device = self.trained[0].device
        kind = {"adamw": partial(torch.optim.AdamW, fused=True), "muon": MuonAdamW}[settings.optimizer]
        self.optimizer = kind(self.trained, settings.lr, weight_decay=settings.weight_decay)
        # float16 as in guided-diffusion: a scale of 2**20 that grows a little each step and halves on overflow
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=2.0 ** 20, growth_factor=2.0 ** settings.fp16_scale_growth, growth_interval=1,
            enabled=settings.dtype == torch.float16)
        self._unaveraged: Later | None = None  # whether the newest step was skipped, until the averages have it
        self.step = 0
        self.position = 0  # of the next example in the stream
        self.overdue = False  # whether something that belongs behind self.step is still to be done
        self.signals = SignalsNoted()
        self.meter = Meter(method.parts, self.device)

    def _share_out(self):
        """Share out the parameters of the method and of the averages among the ranks, as FSDP2 does."""
        reduced = torch.bfloat16 if self.settings.wire_dtype == "bfloat16" else None
        for network in (*self._ema.values(), self.method):
            shards.share_out(network, units_of(network), reduced)

    def tell(self, event: str, *args: Any, **kwargs: Any) -> list:
        """Call a method of every callback; returns what they return."""
        return [getattr(callback, event)(self, *args, **kwargs) for callback in self.callbacks]

    # ---- one step ----

    def run_step(self, batch: Batch) -> None:
        """One optimiser step on this rank's batch, floats on the device."""
        seed_dropout(batch.seed, batch.places[0])
        losses = self.forward_backward(batch)
        self.tell("stepped", batch, losses, self.optimize())
        self.method.after_step(losses)
        self.step += 1
        self.position += self.global_batch

    def forward_backward(self, batch: Batch) -> Losses:
        """Accumulate the gradient of the mean loss of the global batch, one microbatch at a time. Returns detached
        losses of this rank's part."""
        self.optimizer.zero_grad()
        parts, size = [], len(batch.places)
        mean = self.global_batch / dist_util.world_size()  # over ranks, of which DDP takes the mean, shares may differ
        for start in range(0, size, self.microbatch):
            last = start + self.microbatch >= size
            wait = self.ddp.no_sync() if self.ddp is not self.method and not last else contextlib.nullcontext()
            with wait:
                with torch.autocast(self.device.type, self.settings.dtype, enabled=self.settings.dtype is not None):
                    losses = self.ddp(batch.rows(slice(start, start + self.microbatch)))
                loss = (losses.terms["loss"] * losses.weights).sum() / mean
                self.scaler.scale(loss).backward()
            self.meter.add(losses)
            parts.append(losses)
        return Losses({name: torch.cat([part.terms[name].detach() for part in parts]) for name in parts[0].terms},
                      torch.cat([part.weights for part in parts]),
                      seen={name: torch.cat([part.seen[name] for part in parts]) for name in parts[0].seen})

    def optimize(self) -> Later:
        """Take one step, unless the gradient is not finite; returns whether that is so."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.trained if p.grad is not None]
        norm = shards.whole(nn.utils.get_total_norm([p.grad for p in parameters]))
        if self.settings.grad_clip:
            nn.utils.clip_grads_with_norm_(parameters, self.settings.grad_clip, norm)
        self.meter.add_norm(norm)
        self._average()
        bad = ~norm.isfinite()
        if not self.scaler.is_enabled():  # which looks for itself
            self.optimizer.found_inf = bad.float()  # the fused step then changes nothing
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._unaveraged = Later(bad)
        return self._unaveraged

    def learning_rate(self, step: int) -> float:
        """The learning rate of the step that follows so many."""
        warmup, anneal = self.settings.lr_warmup, self.settings.lr_anneal_steps
        rising = min((step + 1) / warmup, 1) if warmup else 1
        return self.lr * rising * max(1 - step / anneal if anneal else 1, 0)

    def _average(self):
        """Take the newest weights into the averages, unless the step that should have made them was skipped. It is done
        before the next step, when it is known without waiting for the device."""
        skipped, self._unaveraged = self._unaveraged, None
        if skipped is not None and not skipped:
            for rate, ema in self._ema.items():
                pairs = [(mean, p) for mean, p in zip(ema.parameters(), self.method.model.parameters())
                         if p.requires_grad]
                update_ema(*([shards.local(p.detach()) for p in side] for side in zip(*pairs)), float(rate))
                for kept, buffer in zip(ema.buffers(), self.method.model.buffers()):
                    kept.copy_(buffer)  # statistics, of a batch norm say, which are means themselves

    @property
    def ema(self) -> dict[str, nn.Module]:
        """The averaged networks by their rates, as they are in the names of files."""
        self._average()
        return self._ema

    def network_to_draw(self) -> nn.Module:
        """A copy of the averaged network, or of the present one while the average is of no use yet, see `rate_to_use`;
        whole on every rank, which all call this."""
        rate, averaged = self.rate_to_use()
        source = self.ema[rate] if averaged else self.method.model
        if not self.settings.shard:
            network = copy.deepcopy(self._ema[rate])
            network.load_state_dict(source.state_dict())
            return network
        network = copy.deepcopy(self._empty)
        network.load_state_dict({name: shards.whole(value) for name, value in source.state_dict().items()}, assign=True)
        return network

    def rate_to_use(self) -> tuple[str, bool]:
        """The first rate of the averages, and whether they are of use yet: less than 1 % of them is the random
        weights that training began with, or it began with trained ones."""
        rate = next(iter(self._ema))
        return rate, bool(self.settings.init) or self.step * (1 - float(rate)) >= 5

    # ---- the loop ----

    def run_loop(self) -> signal.Signals | None:
        """Train until the end, or until a signal asks to stop. Returns the signal that stopped it, on whatever rank."""
        self.overdue = any(self.tell("overdue"))
        if self.end and self.step >= self.end and not self.overdue:
            logger.log(f"step {self.step} is reached already; more --max_steps (or --lr_anneal_steps) would go on")
        stop_agreed = dist_util.StopFlag()
        self.tell("begin")
        batches = self.data.batches(len(self.share), self.position + self.share.start, self.global_batch)
        bar = progress(desc="training", total=self.end or None, initial=self.step, enabled=dist_util.rank() == 0)
        train_mode(self.method)
        with self.signals, bar:
            self.meter.start_clock()
            while ((self.overdue or not self.end or self.step < self.end)
                   and not stop_agreed(bool(self.signals.received) or any(self.tell("wants_to_stop")))):
                if not self.overdue:
                    self.run_step(self._next(batches))
                    bar.update()
                self.overdue = False
                try:
                    scores = {name: value for part in self.tell("scores") for name, value in part.items()}
                except Stopped:
                    logger.log(f"the validation cases of step {self.step} are not drawn; the next run begins with them")
                    break
                logs = self.step % self.settings.log_interval == 0 or self.step == self.end
                if logs or scores:
                    bar.set_postfix(self.log(scores, losses=logs), refresh=False)
                self.tell("turned", logs)
            asked = max(dist_util.all_gather_objects(int(self.signals.received or 0)))
            self.tell("end")
        return signal.Signals(asked) if asked else None

    def _next(self, batches):
        self.tell("doing", "waiting for data")
        start = time.perf_counter()
        batch = next(batches)
        self.meter.waited += time.perf_counter() - start
        self.tell("doing", f"in step {self.step + 1}")
        return to_floats(batch, self.settings.image_channels, self.device)

    def log(self, scores: dict[str, float], losses: bool = True) -> dict[str, float]:
        """Log scores and, if asked to, the means of the losses; returns what fits beside a progress bar."""
        values = {}
        if losses:
            figures = {name: value for part in self.tell("figures") for name, value in part.items()}
            # what a longer run logs is the same
            values = self.meter.read(restart=self.step % self.settings.log_interval == 0)
            values["param_norm"] = shards.whole(nn.utils.get_total_norm([p.detach() for p in self.trained])).item()
            values.update(lr=self.learning_rate(self.step - 1), samples=self.position, **figures)
            if self.scaler.is_enabled():
                values["grad_scale"] = self.scaler.get_scale()
        logger.dump({**values, **scores}, self.step)
        self.tell("logged")
        return {name: values[name] for name in ("loss", "images_per_second") if name in values}
