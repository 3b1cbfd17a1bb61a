"""Tensors and text about them as safetensors: 8 bytes with the length of a JSON header, the header, the numbers."""

import hashlib
import json
import struct
from collections.abc import Mapping

import safetensors.torch
from torch import Tensor

MAX_HEADER_BYTES = 1 << 24


def pack(state: Mapping[str, Tensor], said: Mapping[str, str]) -> bytes:
    """The bytes of a file with these tensors, which lie on the CPU, and what it says of itself, text by name; the same
    bytes for the same. It says the SHA-256 of its numbers, too."""
    header, numbers = _split(safetensors.torch.save(dict(state)))
    said = {**said, "format": "pt", "sha256": hashlib.sha256(numbers).hexdigest()}
    # which safetensors itself writes in another order each time
    text = json.dumps({"__metadata__": dict(sorted(said.items())), **header}).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + numbers


def unpack(data: bytes) -> dict[str, Tensor]:
    """The tensors of a file. :raises Exception: of many kinds for what is none, or disagrees with its SHA-256."""
    _, numbers = _split(data)
    if said_in(data).get("sha256") not in (None, hashlib.sha256(numbers).hexdigest()):
        raise ValueError("its weights do not agree with their checksum")
    return safetensors.torch.load(data)


def said_in(data: bytes) -> dict[str, str]:
    """What a file says of itself, text by name. :raises ValueError: for what is none."""
    said = _split(data)[0].get("__metadata__", {})
    if not isinstance(said, dict) or not all(isinstance(value, str) for value in said.values()):
        raise ValueError("its header holds no text by name")
    return said


def _split(data):
    """The header of a file, a dict, and the bytes of its numbers."""
    if len(data) < 8:
        raise ValueError("it has no header")
    length, = struct.unpack("<Q", data[:8])
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header is longer than {MAX_HEADER_BYTES} bytes")
    try:
        header = json.loads(data[8:8 + length])
    except RecursionError as error:
        raise ValueError(f"its header is no JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no dict")
    return header, data[8 + length:]
