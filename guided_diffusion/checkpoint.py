"""What a run saves, how it is saved and read back.

In a results folder (a local path, or gs:// or az:// through blobfile), step in 6 digits:

    savedmodel<step>.pt            weights of the U-Net
    emasavedmodel_<rate>_<step>.pt their exponential moving average at that rate
    optsavedmodel<step>.pt         the rest: AMN, ACN, optimiser, gradient scaler, timestep sampler, place in the data
    savedmodel.pt                  the newest weights of the U-Net
    savedmodel_best.pt             those that drew the validation cases best, and of which step they are
    frozenmodel.pt                 weights that are never trained, of a network that has such
    flags.json                     the flags the run was started with

A .safetensors file holds a whole network instead, and the flags that it is built from.
"""

import hashlib
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import shards
from .networks.base import frozen_state, trained_state
from .system import storage, tensor_file
from .system.errors import InputError

FLAGS_FILE = "flags.json"
MAX_FLAGS_BYTES = 1 << 20
LISTED = 5  # weights that a message names of those that do not fit
NEWEST, FROZEN, BEST = "savedmodel.pt", "frozenmodel.pt", "savedmodel_best.pt"
FACTS = "about these weights"  # the entry of savedmodel_best.pt that is no weight; see save_best


def model_name(step: int) -> str:
    return f"savedmodel{step:06d}.pt"


def ema_name(rate: str, step: int) -> str:
    return f"emasavedmodel_{rate}_{step:06d}.pt"


def opt_name(step: int) -> str:
    return f"optsavedmodel{step:06d}.pt"


# ---- checkpoints ----

def save(path: storage.AnyPath, state: Any) -> None:
    """Write tensors, numbers, strings and containers of them, as torch.save does."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    storage.write_bytes(path, buffer.getvalue())


def load(path: storage.AnyPath, flag: str = "--model_path") -> Any:
    """Read what `save`, any torch.save or `export` wrote, onto the CPU; weights only, so no code in the file can run.

    :raises InputError: if the file is missing, truncated, not a checkpoint, or does not agree with its checksums.
    """
    if not storage.exists(path):
        raise InputError(f"{flag} {path}: no such file")
    if not storage.is_remote(path) and os.path.isdir(path):
        raise InputError(f"{flag} {path}: is a folder; name the .pt file in it")
    try:
        data = io.BytesIO(storage.read_bytes(path))
        if is_safetensors(path):
            return tensor_file.unpack(data.getvalue())
        if zipfile.is_zipfile(data):  # as all that torch has saved since 2020: with a CRC-32 of every tensor
            with zipfile.ZipFile(data) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("holds compressed parts, which may be of any size and which torch never writes")
                if sum(entry.file_size for entry in archive.infolist()) > data.getbuffer().nbytes:
                    raise ValueError("its parts overlap")
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"{damaged} does not agree with its checksum")
        data.seek(0)
        return torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises almost anything on a damaged file
        reason = str(error).strip().split("\n")[0].split(". ")[0][:150]
        raise InputError(f"{flag} {path}: is truncated, damaged, or not a checkpoint of weights"
                         f" ({type(error).__name__}: {reason}); name another, or remove it") from None


def load_model(model: nn.Module, path: storage.AnyPath, flag: str = "--model_path", optional: Sequence[str] = ()
               ) -> list[str]:
    """Load a network's weights saved here, by the published code or by openai/guided-diffusion, with strict names; and
    those of its frozen parts, if it has any, from the folder's frozenmodel.pt. A safetensors file holds all of them.

    :param optional: names of submodules that the file may lack, which then stay as they are, or have beside.
    :returns: those that it lacked.
    :raises InputError: if they are another architecture's, naming what differs.
    """
    state, whole, lacked = load(path, flag), is_safetensors(path), []
    if isinstance(state, dict):
        state.pop(FACTS, None)
        for part in optional:
            own, stored = ({name: value for name, value in weights.items() if str(name).startswith(f"{part}.")}
                           for weights in (model.state_dict(), state))
            if own and not stored:
                lacked.append(part)
            if not own or not stored:
                state = {name: value for name, value in state.items() if name not in stored} | own
    load_state(model, state, f"{flag} {path}", None if whole else trained_state(model))
    if not whole and (frozen := frozen_state(model)):
        frozen_path = storage.join(storage.folder_of(path), FROZEN)
        load_state(model, load(frozen_path, flag), f"{flag} {frozen_path}", frozen)
    return lacked


def save_best(folder: storage.AnyPath, weights: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write savedmodel_best.pt: weights, and their step, their score and a digest of the cases that it is of, which are
    the facts {"step": int, "GED_unbiased": float, "cases": str}."""
    save(storage.join(folder, BEST), {**weights, FACTS: dict(facts)})


def best_facts(path: storage.AnyPath) -> dict[str, Any]:
    """The facts that save_best was told; {} of another file of weights.

    :raises InputError: if it cannot be read.
    """
    state = load(path, "best weights")
    return facts_in(state.get(FACTS)) if isinstance(state, dict) else {}


def facts_in(stored: Any) -> dict[str, Any]:
    """What was stored, if it is facts as save_best takes them, else {}."""
    kinds = {"step": int, "GED_unbiased": float, "cases": str}
    alike = isinstance(stored, dict) and {name: type(value) for name, value in stored.items()} == kinds
    return dict(stored) if alike else {}


def load_state(model: nn.Module, state: Any, what: str, wanted: Mapping[str, Tensor] | None = None) -> None:
    """Load a state dict, with or without DDP's "module." before each name; InputError if it does not fit.

    :param wanted: the part of model.state_dict() that it must hold, by default all.
    """
    if not isinstance(state, dict) or not state or not all(isinstance(name, str) and is_plain(value)
                                                           for name, value in state.items()):
        raise InputError(f"{what}: holds no model weights")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    own = model.state_dict() if wanted is None else wanted
    wrong = [f"{name} is {list(state[name].shape)}, not {list(own[name].shape)}"
             for name in own if name in state and state[name].shape != own[name].shape]
    missing, extra = own.keys() - state.keys(), state.keys() - own.keys()
    parts = [f"{len(names)} {kind} ({', '.join(names[:LISTED])}{', ...' if len(names) > LISTED else ''})"
             for names, kind in ((wrong, "of another shape"), (sorted(missing), "missing"), (sorted(extra), "unknown"))
             if names]
    if parts:
        raise InputError(f"{what}: holds another architecture than the model flags describe: weights"
                         f" {', '.join(parts)}; give the flags it was trained with")
    model.load_state_dict({name: shards.as_held(value, own[name]) for name, value in state.items()},
                          strict=wanted is None)


def load_moments(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> None:
    """Load the moments of an optimiser, not its flags; almost any exception if they are not those of its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {number: dict(entry) for number, entry in stored["state"].items()}
    if state and state.keys() != set(range(len(parameters))):
        raise ValueError(f"moments of {len(state)} parameters, not {len(parameters)}")
    for number, entry in state.items():
        matrix = parameters[number] in getattr(optimizer, "matrices", ())
        for name in ("momentum",) if matrix else ("exp_avg", "exp_avg_sq"):
            if not is_plain(entry[name]) or entry[name].shape != parameters[number].shape:
                raise ValueError(f"moments of another shape or kind for parameter {number}")
            # a fused step takes their memory to be laid out like the parameter's, and looks no further
            entry[name] = torch.empty_like(parameters[number]).copy_(shards.as_held(entry[name], parameters[number]))
        if float(entry["step"]) < 0:
            raise ValueError(f"a step below 0 for parameter {number}")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def is_plain(value: Any) -> bool:
    """Whether this is a tensor of real numbers that lie in memory."""
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.device.type == "cpu" \
        and not value.is_complex() and not value.is_quantized


def steps_in(folder: storage.AnyPath) -> list[int]:
    """The steps of all complete checkpoints of a folder, ascending."""
    names = storage.names_in(folder)
    steps = [int(match[1]) for name in names if (match := re.fullmatch(r"savedmodel(\d{6,})\.pt", name))]
    return sorted(step for step in steps if opt_name(step) in names)


def damages(folder: storage.AnyPath, step: int) -> list[str]:
    """What is wrong with the files of a checkpoint, as a list of strings."""
    problems = []
    for name in sorted(files_of(folder, step)):
        try:
            load(storage.join(folder, name), "checkpoint")
        except InputError as error:
            problems.append(str(error))
    return problems


def files_of(folder: storage.AnyPath, step: int) -> set[str]:
    kinds = re.compile(rf"(opt|ema)?savedmodel(_.+_)?{step:06d}\.pt")
    return set(filter(kinds.fullmatch, storage.names_in(folder)))


def step_of(path: storage.AnyPath) -> int | None:
    """The step in a checkpoint's name; for savedmodel.pt, the newest beside it; for savedmodel_best.pt, that which it
    holds; None if there is none, or if the file holds weights alone, as a safetensors file does."""
    match, name = re.search(r"(\d{6,})\.pt$", str(path)), os.path.basename(path)
    if match:
        return int(match[1])
    if name == BEST:
        return best_facts(path).get("step")
    steps = steps_in(storage.folder_of(path)) if name == NEWEST else []
    return steps[-1] if steps else None


# ---- flags ----

def save_flags(folder: storage.AnyPath, flags: Mapping[str, Any]) -> None:
    storage.write_bytes(storage.join(folder, FLAGS_FILE), (_flags_text(flags, indent=2) + "\n").encode())


def load_flags(folder: storage.AnyPath) -> dict[str, Any]:
    """The flags stored in a results folder, {} if there are none.

    :raises InputError: if they cannot be read, or do not agree with the checksum among them, if there is one.
    """
    path = storage.join(folder, FLAGS_FILE)
    if not storage.exists(path):
        return {}
    try:
        if not storage.is_remote(path) and os.path.getsize(path) > MAX_FLAGS_BYTES:
            raise ValueError(f"it is longer than {MAX_FLAGS_BYTES} bytes")
        text = storage.read_bytes(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); repair it, or remove it and give the model flags"
                         ) from None
    return _parse_flags(text, path)


def flags_of(path: storage.AnyPath) -> tuple[dict[str, Any], str]:
    """The flags of the model whose weights these are, {} if they are not stored, and where they would be: in a
    safetensors file itself, else in the results folder.

    :raises InputError: as load_flags.
    """
    if is_safetensors(path) and "flags" in (said := metadata_of(path)):
        return _parse_flags(said["flags"], path), str(path)
    folder = storage.folder_of(path)
    return load_flags(folder), folder


def _flags_text(flags, indent=None):
    return json.dumps({**flags, "checksum": _checksum(flags)}, indent=indent)


def _checksum(flags):
    return zlib.crc32(json.dumps(flags, sort_keys=True).encode())


def _parse_flags(text, path):
    try:
        flags = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: is not JSON ({error}); repair it, or remove it and give the model flags") from None
    if not isinstance(flags, dict):
        raise InputError(f"{path}: does not hold flags; repair it, or remove it and give the model flags")
    if flags.pop("checksum", None) not in (None, _checksum(flags)):
        raise InputError(f"{path}: does not agree with its checksum; repair it, or take the line of the checksum out if"
                         f" it was changed on purpose")
    if "predict_xstart" in flags:  # of a run from before there were other predictions
        flags.setdefault("prediction", "xstart" if flags["predict_xstart"] is True else "eps")
    return flags


# ---- safetensors ----

def is_safetensors(path: storage.AnyPath) -> bool:
    return str(path).endswith(".safetensors")


def export(path: storage.AnyPath, network: nn.Module, flags: Mapping[str, Any], dtype: torch.dtype = torch.float16,
           facts: Mapping[str, str] | None = None) -> float:
    """Write all of a network, frozen parts too, and what it is, as safetensors; and its SHA-256 beside it, in a file
    that sha256sum -c reads. The same network gives the same bytes.

    :param path: of the file, <name>.safetensors; the checksum goes to <name>.sha256.
    :param flags: those that the network is built from.
    :param dtype: of the weights in the file; whole numbers stay as they are.
    :param facts: what else the file says of itself, text by name.
    :returns: how far the rounding has moved the weights, as a share of their norm.
    :raises InputError: if a weight is beyond what this dtype can hold.
    """
    state, moved, norm = {}, 0.0, 0.0
    for name, value in network.state_dict().items():
        value = value.cpu()
        state[name] = value.to(dtype if value.is_floating_point() else value.dtype, copy=True).contiguous()
        if not state[name].isfinite().all():
            raise InputError(f"--dtype {str(dtype).removeprefix('torch.')}: cannot hold {name}, which reaches"
                             f" {value.abs().max().item():.3g}; give another")
        moved += (state[name].double() - value.double()).square().sum().item()
        norm += value.double().square().sum().item()
    data = tensor_file.pack(state, {**(facts or {}), "flags": _flags_text(flags)})
    storage.write_bytes(storage.digest_path(path), f"{hashlib.sha256(data).hexdigest()}  {Path(path).name}\n".encode())
    storage.write_bytes(path, data)
    return (moved / norm) ** 0.5 if norm else 0.0


def metadata_of(path: storage.AnyPath, flag: str = "--model_path") -> dict[str, str]:
    """What a safetensors file says of itself, text by name.

    :raises InputError: if it is none.
    """
    if not storage.exists(path):
        raise InputError(f"{flag} {path}: no such file")
    try:
        return tensor_file.said_in(storage.read_bytes(path))
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {path}: is truncated, damaged, or not safetensors ({error}); name another") from None
