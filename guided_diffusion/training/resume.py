"""Checkpoints of a training run: written beside it, gone on from, and started from."""

import math
import operator

from .. import checkpoint, dist_util, logger, shards
from ..methods.base import Method
from ..networks.base import frozen_state, trained_state
from ..system import storage
from ..system.errors import InputError
from .callback import Callback, Loop
from .saver import Saver


class Checkpoints(Callback):
    """Saves every `interval` steps and at the end.

    :param keep: checkpoints to leave in the folder, the newest ones; 0 for all.
    :param patience: stop when nothing could be saved for so many intervals.
    """

    def __init__(self, folder: str, interval: int, keep: int, patience: int):
        self.folder, self.interval, self.patience = folder, interval, patience
        self.saver = Saver(folder, keep)

    def begin(self, loop: Loop) -> None:
        self.saver.last = loop.step - loop.overdue
        if dist_util.rank() == 0:
            self.saver.prune(loop.step)  # which the end of the run before may not have come to
        if dist_util.watch:
            dist_util.watch.before_exit = self.saver.finish

    def turned(self, loop: Loop, logs: bool) -> None:
        self.saver.poll()
        if loop.step % self.interval == 0 or logs and any(dist_util.all_gather_objects(bool(self.saver.problem))):
            self.save(loop)

    def wants_to_stop(self, loop: Loop) -> bool:
        return bool(self.saver.problem) and (loop.step - self.saver.last) / self.interval > self.patience

    def end(self, loop: Loop) -> None:
        self.saver.wait()
        if any(dist_util.all_gather_objects(loop.step > self.saver.last)):
            self.save(loop)
            self.saver.wait()
        if self.saver.problem:
            raise InputError(f"{self.saver.problem}. Free space, or make the folder writable, and run the same command"
                             f" again: it goes on from step {self.saver.last}")

    def save(self, loop: Loop) -> None:
        """Begin to write the checkpoint of this step; savedmodel<step>.pt, which says that it is whole, comes last.

        Every rank calls this.
        """
        state, weights = state_of(loop), shards.on_first_rank(trained_state(loop.method.model))
        averages = {checkpoint.ema_name(rate, loop.step): shards.on_first_rank(trained_state(ema))
                    for rate, ema in loop.ema.items()}
        if dist_util.rank() > 0:
            self.saver.last = loop.step
            return
        frozen = frozen_state(loop.method.model)
        once = {checkpoint.FROZEN: frozen} if frozen and not storage.exists(
            storage.join(self.folder, checkpoint.FROZEN)) else {}
        self.saver.begin(loop.step, {
            **once, checkpoint.opt_name(loop.step): state, **averages,
            checkpoint.NEWEST: weights, checkpoint.model_name(loop.step): weights})


def resume(loop: Loop, model_path: str, same_run: bool = False) -> None:
    """Let a TrainLoop go on from savedmodel<step>.pt and the files of the same step beside it.

    Weights alone (of the published code, say) start with all else afresh, and say so.

    :param same_run: refuse a checkpoint of a run on other cases.
    :raises InputError: for files that are damaged, or do not fit this loop.
    """
    flag = "--resume_checkpoint"
    folder, step = storage.folder_of(model_path), checkpoint.step_of(model_path)
    if step is not None and str(model_path).rsplit("/", 1)[-1] == checkpoint.NEWEST:
        # a run killed while it saved may have left it one save behind the rest
        model_path = storage.join(folder, checkpoint.model_name(step))
    method = loop.method
    checkpoint.load_model(method.model, model_path, flag)
    for rate, ema in loop.ema.items():
        ema_path = storage.join(folder, checkpoint.ema_name(rate, step or 0))
        if step is not None and storage.exists(ema_path):
            checkpoint.load_model(ema, ema_path, flag)
        else:
            logger.log(f"no moving average at rate {rate} beside {model_path}: it starts from the weights")
            ema.load_state_dict(method.model.state_dict())
    opt_path = storage.join(folder, checkpoint.opt_name(step or 0))
    rest = None
    if step is not None and storage.exists(opt_path):
        rest = checkpoint.load(opt_path, flag)
    if not isinstance(rest, dict) or "position" not in rest:  # none, or the published code's for its U-Net alone
        also = method.training_networks()
        logger.log(f"no {checkpoint.opt_name(step or 0)} of this code beside {model_path}: the optimiser"
                   f"{' and ' + ', '.join(also) if also else ''} start{'' if also else 's'} afresh")
        loop.step = step or 0
        loop.position = loop.step * loop.global_batch
        return
    try:
        restore(loop, rest)
    except InputError as error:
        raise InputError(f"{opt_path}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"{opt_path}: does not hold what a run like this one saves ({type(error).__name__}:"
                         f" {str(error).splitlines()[0] if str(error) else ''}); name another checkpoint") from None
    if same_run and rest.get("data", loop.data.digest()) != loop.data.digest():
        raise InputError(f"--data_dir: holds other cases than the run in {folder} is trained on; give them to go"
                         f" on, another --results_dir to start afresh, or --resume_checkpoint {model_path} to go on"
                         f" with these")
    logger.log(f"resumed at step {loop.step} from {model_path}")


def start_from(method: Method, path: str) -> str:
    """Let a new run start from weights of its network, those of --init, and from what optsavedmodel of their step has
    of the networks that are trained along, if it is beside them.

    :returns: what was taken, and what starts afresh, in words.
    :raises InputError: for weights of another architecture, naming what differs.
    """
    lacked = checkpoint.load_model(method.model, path, "--init", getattr(method.model, "optional", ()))
    step, also = checkpoint.step_of(path), method.training_networks()
    beside = storage.join(storage.folder_of(path), checkpoint.opt_name(step or 0))
    stored = checkpoint.load(beside, "--init") if also and step is not None and storage.exists(beside) else {}
    stored = stored if isinstance(stored, dict) else {}
    taken, afresh = [], ["the optimiser", *(f"{name} (not in {path})" for name in lacked)]
    for name, network in also.items():
        try:
            checkpoint.load_state(network, stored.get(name), f"its {name}")
            taken.append(name)
        except InputError as error:
            afresh.append(f"{name} ({error})" if name in stored else name)
    words = [f"{'the other' if lacked else 'all'} weights of the network are those of {path}"]
    if taken:
        words.append(f"{' and '.join(taken)} {'is' if len(taken) == 1 else 'are'} of {beside}")
    return "; ".join([*words, f"{', '.join(afresh)} start{'s' if len(afresh) == 1 else ''} afresh"])


def state_of(loop: Loop) -> dict:
    """What optsavedmodel<step>.pt holds: all that going on needs beside the network that draws."""
    meters = dist_util.all_gather_objects(loop.meter.state_dict()) if loop.meter.sums else []
    state = {"step": loop.step, "position": loop.position, "data": loop.data.digest(), "meters": meters,
             "optimizer": loop.optimizer.state_dict(), "scaler": loop.scaler.state_dict(),
             **loop.method.training_state()}
    for part in loop.tell("state"):
        state.update(part)
    return shards.on_first_rank({
        **state, **{name: part.state_dict() for name, part in loop.method.training_networks().items()}})


def restore(loop: Loop, state: dict) -> None:
    """Take over what state_of returned.

    :raises InputError: if it is of another kind of run; almost any other exception for what is none.
    """
    loop.method.load_training_state(state)
    for name, network in loop.method.training_networks().items():
        checkpoint.load_state(network, state.get(name), f"its {name}")
    loop.step, loop.position = operator.index(state["step"]), operator.index(state["position"])
    if not (0 <= loop.step < 2 ** 62 and 0 <= loop.position < 2 ** 62):
        raise ValueError("a step or position that none can be at")
    checkpoint.load_moments(loop.optimizer, state["optimizer"])
    if loop.scaler.is_enabled() and state["scaler"]:
        if not all(0 <= float(value) < math.inf for value in state["scaler"].values()):
            raise ValueError("a scale of gradients that is none")
        loop.scaler.load_state_dict(state["scaler"])
    loop.meter.load_state_dicts(state.get("meters", []))
    for callback in loop.callbacks:
        callback.load_state(state)
