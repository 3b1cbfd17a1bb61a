"""One training step, and the loop around it."""

import contextlib
import copy
import itertools
import math
import operator
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import checkpoint, dist_util, logger
from .data import stream
from .nn import update_ema
from .system import storage
from .system.errors import InputError
from .system.terminal import progress
from .training import saver
from .training.validation import Stopped
from .training.watch import BadSteps, Meter, SignalsNoted


class TrainLoop:
    """Trains a CIMD module on a stream of batches, logs, and saves.

    Everything random in a step (order, rater, timestep, noise) follows from the seed and the examples' places in the
    stream, so a run does not depend on how many processes share it, and resumes as if it had never stopped. The
    moving averages cover the U-Net, the only network that sampling uses.

    :param cimd: the CIMD module, on its device.
    :param data: a stream.ShuffledCases.
    :param validation: a validation.Validation, whose cases are drawn every sample_interval steps and at the end; None
        for never.
    :param batch_size: examples of this process in one step; microbatch: -1 or the size of the parts it is split into.
    :param ema_rates: rates as strings, as they appear in file names.
    :param max_steps, lr_anneal_steps: 0 for no end and no annealing; the loop ends at the first that is not 0.
    :param dtype: torch.float16 or bfloat16 for autocast, None for float32.
    :param fp16_scale_growth: log2 of the loss scale's growth each step (float16 only).
    :param keep_checkpoints: checkpoints to leave in the folder, the newest ones; 0 for all.
    :param save_patience: stop when nothing could be saved for so many save intervals.
    :param grad_clip: the largest norm of the gradient, 0 for any.
    :param max_bad_steps: give up after so many steps in a row whose gradient was not finite; such steps are skipped.
    """

    def __init__(self, *, cimd, data, schedule_sampler, batch_size, results_dir, validation=None, microbatch=-1,
                 lr=1e-4, weight_decay=0.0, lr_anneal_steps=0, max_steps=0, ema_rates=("0.9999",), log_interval=100,
                 sample_interval=1000, save_interval=5000, keep_checkpoints=0, save_patience=3, dtype=None,
                 fp16_scale_growth=1e-3, grad_clip=0.0, max_bad_steps=50, seed=0):
        self.cimd, self.data, self.schedule_sampler = cimd, data, schedule_sampler
        self.batch_size, self.microbatch = batch_size, microbatch if microbatch > 0 else batch_size
        self.global_batch = batch_size * dist_util.world_size()
        self.results_dir, self.validation, self.view = results_dir, validation, None
        self.lr, self.weight_decay, self.lr_anneal_steps = lr, weight_decay, lr_anneal_steps
        self.end = min([n for n in (max_steps, lr_anneal_steps) if n], default=0)
        self.log_interval, self.sample_interval, self.save_interval = log_interval, sample_interval, save_interval
        self.dtype, self.grad_clip, self.seed = dtype, grad_clip, seed
        self.device = next(cimd.parameters()).device

        if self.device.type == "cuda":
            cimd.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(cimd.parameters(), lr=lr, weight_decay=weight_decay, fused=True)
        # float16 as in guided-diffusion: a scale of 2**20 that grows a little each step and halves on overflow
        self.scaler = torch.amp.GradScaler(
            self.device.type, init_scale=2.0 ** 20, growth_factor=2.0 ** fp16_scale_growth, growth_interval=1,
            enabled=dtype == torch.float16)
        self.ema = {rate: copy.deepcopy(cimd.model).requires_grad_(False).eval() for rate in ema_rates}
        self.step = 0
        self.position = 0  # of the next example in the stream
        self._places = 0  # see _at
        self.ddp = cimd
        if dist.is_initialized():
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.ddp = DistributedDataParallel(cimd, device_ids=ids, gradient_as_bucket_view=True)
        self.saver, self.save_patience = saver.Saver(results_dir, keep_checkpoints), save_patience
        self.meter = Meter(cimd.diffusion.num_timesteps, self.device)
        self.bad_steps = BadSteps(max_bad_steps)

    # ---- one step ----

    def run_step(self, image, mask, position):
        """One optimiser step on this rank's batch: image [N, C, H, W] and mask [N, 1, H, W], floats in [0, 1] on the
        device, and the N places of the examples in the stream."""
        uniforms, noise = stream.randomness(self.seed, position, mask)
        t, weights = (dist_util.to_device(x, self.device) for x in self.schedule_sampler.sample(uniforms))
        losses = self.forward_backward(image, mask, t, weights, noise)
        bad = self.optimize()
        self.bad_steps.check(self.data)
        self.bad_steps.note(bad, self.step + 1, position, t, losses)
        if self.schedule_sampler.learns:
            self.schedule_sampler.update(dist_util.all_gather(t), dist_util.all_gather(losses))
        self.step += 1
        self.position += self.global_batch

    def forward_backward(self, image, mask, t, weights, noise):
        """Accumulate the gradient of the mean loss of the batch, one microbatch at a time. Returns losses [N]."""
        self.optimizer.zero_grad()
        losses = []
        for start in range(0, len(image), self.microbatch):
            part = slice(start, start + self.microbatch)
            last = start + self.microbatch >= len(image)
            wait = self.ddp.no_sync() if self.ddp is not self.cimd and not last else contextlib.nullcontext()
            with wait:
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    terms = self.ddp(image[part], mask[part], t[part], noise[part])
                loss = (terms["loss"] * weights[part]).sum() / len(image)
                self.scaler.scale(loss).backward()
            self.meter.add(t[part], {name: (value * weights[part]).detach() for name, value in terms.items()})
            losses.append(terms["loss"].detach())
        return torch.cat(losses)

    def optimize(self):
        """Take one step, unless the gradient is not finite; whether that is so, as a tensor that nobody waits for."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.cimd.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if self.grad_clip:
            nn.utils.clip_grads_with_norm_(parameters, self.grad_clip, norm)
        self.meter.add_norm(norm)
        bad = ~norm.isfinite()
        if not self.scaler.is_enabled():  # which looks for itself
            if self.optimizer.defaults.get("fused"):
                self.optimizer.found_inf = bad.float()  # the step then changes nothing
            elif bad:  # asking waits for the device
                return bad
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for rate, ema in self.ema.items():
            update_ema(list(ema.parameters()), list(self.cimd.model.parameters()), float(rate))
        return bad

    def learning_rate(self):
        """The learning rate of the next step."""
        left = 1 - self.step / self.lr_anneal_steps if self.lr_anneal_steps else 1
        return self.lr * max(left, 0)

    # ---- the loop ----

    def run_loop(self):
        """Train until the end, or until a signal asks to stop, and save what was reached.

        Returns the signal that stopped it, or None.
        """
        batches = self.data.batches(self.batch_size, dist_util.rank(), dist_util.world_size(), self.position)
        overdue = self._overdue()
        if self.end and self.step >= self.end and not overdue:
            logger.log(f"step {self.step} is reached already; more --max_steps (or --lr_anneal_steps) would go on")
        stop_agreed = dist_util.StopFlag()
        self.saver.last = self.step - overdue
        if dist_util.rank() == 0:
            self.saver.prune(self.step)  # which the end of the run before may not have come to
        if dist_util.watch:
            dist_util.watch.before_exit = self.saver.finish
        bar = progress(desc="training", total=self.end or None, initial=self.step, enabled=dist_util.rank() == 0)
        self.cimd.train()
        with SignalsNoted() as signals, bar:
            self.meter.start_clock()
            while (overdue or not self.end or self.step < self.end) and not stop_agreed(self._wants_to_stop(signals)):
                if not overdue:
                    self.run_step(*self._next(batches))
                    bar.update()
                overdue = False
                try:
                    scores = self.look(signals) if self._draws() else {}
                except Stopped:  # on every rank
                    logger.log(f"the validation cases of step {self.step} are not drawn; the next run begins with them")
                    break
                logs = self.step % self.log_interval == 0 or self.step == self.end
                if logs or scores:
                    figures = self.log(scores, losses=logs)
                    bar.set_postfix(figures, refresh=False)
                self.saver.poll()
                if self.step % self.save_interval == 0 or logs and self.saver.problem:
                    self.save()
            dist_util.at(None)  # the last checkpoint may take its time
            self.saver.wait()
            if any(dist_util.all_gather_objects(self.step > self.saver.last)):
                self.save()
                self.saver.wait()
        if self.saver.problem:
            raise InputError(f"{self.saver.problem}. Free space, or make the folder writable, and run the same command"
                             f" again: it goes on from step {self.saver.last}")
        return signals.received

    def _draws(self):
        """Whether the validation's cases are drawn after this step."""
        return bool(self.validation) and (self.step == self.end or self.step % self.sample_interval == 0)

    def _overdue(self):
        """Whether a signal broke off the drawing after this step, where the run resumes: its line is not logged."""
        logged, waiting = dist_util.all_gather_objects(
            (any(row["step"] == self.step for row in logger.history()), bool(self.meter.sums)))[0]
        if logged and self.step % self.log_interval == 0:
            self.meter.restart()  # the line was made up for, and the checkpoint after it lost
        return self._draws() and waiting and not logged

    def _wants_to_stop(self, signals):
        unsaved = (self.step - self.saver.last) / self.save_interval
        return bool(signals.received) or bool(self.saver.problem) and unsaved > self.save_patience

    def _at(self, doing):
        """Tell the other ranks how far this one is; within a step, all do the same things in the same order."""
        self._places += 1
        dist_util.at((self.step, self._places), doing)

    def _next(self, batches):
        self._at("waiting for data")
        start = time.perf_counter()
        image, mask, position = next(batches)
        self.meter.waited += time.perf_counter() - start
        self._at(f"in step {self.step + 1}")
        channels = self.cimd.model.in_channels - mask.shape[1]
        return *stream.to_floats(image, mask, channels, self.device), position

    def log(self, scores, losses=True):
        """Log scores and, if asked to, the means of the losses; returns what fits beside a progress bar."""
        values = {}
        if losses:
            self.bad_steps.check(self.data)
            values = self.meter.read(restart=self.step % self.log_interval == 0)  # what a longer run logs is the same
            values["param_norm"] = nn.utils.get_total_norm([p.detach() for p in self.cimd.parameters()]).item()
            values.update(lr=self.learning_rate(), samples=self.position, bad_steps=self.bad_steps.count)
            if self.scaler.is_enabled():
                values["grad_scale"] = self.scaler.get_scale()
        logger.dump({**values, **scores}, self.step)
        if self.view:
            self.view.update()
        return {name: values[name] for name in ("loss", "images_per_second") if name in values}

    def look(self, signals):
        """Draw and show the validation's cases; returns their scores, a dict. :raises Stopped: by a signal."""
        start = time.perf_counter()
        rate, averaged = self.rate_to_use()
        words = f"weights averaged at the rate {rate}" if averaged else "present weights"
        steps = itertools.count(1)

        def on_step(*_):
            if signals.received:
                raise Stopped
            dist_util.at((self.step, self._places, next(steps)), f"drawing the validation cases at step {self.step}")

        def network():  # a copy, for sampling
            copied = copy.deepcopy(self.ema[rate])
            if not averaged:
                copied.load_state_dict(self.cimd.model.state_dict())
            return copied.convert_for_sampling(self.dtype)

        masks = self.validation.draw(network, on_step)
        self._at(f"in step {self.step}")
        self.meter.since += time.perf_counter() - start  # the speed is that of training
        if masks is None:
            return {}
        if self.view:
            self.view.show_cases(self.validation.cases, masks, f"{self.validation.name} at step {self.step}, {words}")
        return self.validation.scores(masks)

    def rate_to_use(self):
        """The first rate of the averages, and whether they are of use yet: less than 1 % of them is the random weights
        that training began with."""
        rate = next(iter(self.ema))
        return rate, self.step * (1 - float(rate)) >= 5

    # ---- checkpoints ----

    def save(self):
        """Begin to write the checkpoint of this step; savedmodel<step>.pt, which says that it is whole, comes last.

        Every rank calls this, but for a second attempt right after a line of the log, when there are no sums of losses
        to gather.
        """
        self.bad_steps.check(self.data)
        meters = dist_util.all_gather_objects(self.meter.state_dict()) if self.meter.sums else []
        if dist_util.rank() > 0:
            self.saver.last = self.step
            return
        rest = {"step": self.step, "position": self.position, "data": self.data.digest(), "meters": meters,
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "schedule_sampler": self.schedule_sampler.state_dict(),
                "bad_steps": [self.bad_steps.count, self.bad_steps.in_a_row]}
        if self.cimd.posterior is not None:
            rest.update(posterior=self.cimd.posterior.state_dict(), prior=self.cimd.prior.state_dict())
        weights = self.cimd.model.state_dict()
        self.saver.begin(self.step, {
            checkpoint.opt_name(self.step): rest,
            **{checkpoint.ema_name(rate, self.step): ema.state_dict() for rate, ema in self.ema.items()},
            checkpoint.NEWEST: weights, checkpoint.model_name(self.step): weights})

    def resume(self, model_path, same_run=False):
        """Go on from savedmodel<step>.pt and the files of the same step beside it.

        Weights alone (of the published code, say) start with fresh optimiser, encoders and averages, and say so.

        :param same_run: refuse a checkpoint of a run on other cases.
        :raises InputError: for files that are damaged, or do not fit this loop.
        """
        folder, step = storage.folder_of(model_path), checkpoint.step_of(model_path)
        if step is not None and str(model_path).rsplit("/", 1)[-1] == checkpoint.NEWEST:
            # a run killed while it saved may have left it one save behind the rest
            model_path = storage.join(folder, checkpoint.model_name(step))
        checkpoint.load_model(self.cimd.model, model_path, "--resume_checkpoint")
        for rate, ema in self.ema.items():
            ema_path = storage.join(folder, checkpoint.ema_name(rate, step or 0))
            if step is not None and storage.exists(ema_path):
                checkpoint.load_model(ema, ema_path, "--resume_checkpoint")
            else:
                logger.log(f"no moving average at rate {rate} beside {model_path}: it starts from the weights")
                ema.load_state_dict(self.cimd.model.state_dict())
        opt_path = storage.join(folder, checkpoint.opt_name(step or 0))
        rest = None
        if step is not None and storage.exists(opt_path):
            rest = checkpoint.load(opt_path, "--resume_checkpoint")
        if not isinstance(rest, dict) or "position" not in rest:  # none, or the published code's for its U-Net alone
            logger.log(f"no {checkpoint.opt_name(step or 0)} of this code beside {model_path}: optimiser, AMN and ACN"
                       f" start afresh")
            self.step = step or 0
            self.position = self.step * self.global_batch
            return
        if "posterior" in rest and self.cimd.posterior is not None:
            checkpoint.load_state(self.cimd.posterior, rest["posterior"], opt_path)
            checkpoint.load_state(self.cimd.prior, rest.get("prior"), opt_path)
        elif "posterior" in rest or self.cimd.posterior is not None:
            raise InputError(f"{opt_path}: is of a run with{'' if 'posterior' in rest else 'out'} AMN and ACN; give the"
                             f" --kl_weight it was trained with")
        try:
            self._restore(rest)
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{opt_path}: does not hold what a run like this one saves ({type(error).__name__}:"
                             f" {str(error).splitlines()[0] if str(error) else ''}); name another checkpoint") from None
        if same_run and rest.get("data", self.data.digest()) != self.data.digest():
            raise InputError(f"--data_dir: holds other cases than the run in {folder} is trained on; give them to go"
                             f" on, another --results_dir to start afresh, or --resume_checkpoint {model_path} to go on"
                             f" with these")
        logger.log(f"resumed at step {self.step} from {model_path}")

    def _restore(self, rest):
        """Take over the optimiser and all else of a checkpoint; raises almost anything for what is none."""
        self.step, self.position = operator.index(rest["step"]), operator.index(rest["position"])
        if not (0 <= self.step < 2 ** 62 and 0 <= self.position < 2 ** 62):
            raise ValueError("a step or position that none can be at")
        checkpoint.load_moments(self.optimizer, rest["optimizer"])
        if self.scaler.is_enabled() and rest["scaler"]:
            if not all(0 <= float(value) < math.inf for value in rest["scaler"].values()):
                raise ValueError("a scale of gradients that is none")
            self.scaler.load_state_dict(rest["scaler"])
        self.schedule_sampler.load_state_dict(rest["schedule_sampler"])
        self.meter.load_state_dicts(rest.get("meters", []))
        self.bad_steps.count, self.bad_steps.in_a_row = map(operator.index, rest.get("bad_steps", (0, 0)))
