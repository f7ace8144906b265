"""The state of a training that was broken off: what it takes to go on as if nothing had happened.

One file: the sha256 of what follows, then safetensors. Noise and order of a step follow from the seed and the
step's number (see ``training.fitting``), so no random state is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

EVERY = 60.0  # seconds between two states
TIME_SHARE = 0.02  # of the training that writing them may take; beyond it they come less often
_DIGEST = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Slot:
    """Where the state lies between two runs.

    Attributes:
        read: its bytes, None if there is none.
        write: replaces it, whole or not at all.
    """

    read: Callable[[], bytes | None]
    write: Callable[[bytes], None]


@dataclass(frozen=True)
class State:
    """Attributes:
    step: how many steps were done.
    weights: ``state_dict`` of the detector.
    moments: of the optimiser, by parameter's number and name.
    best: weights with the smallest held-out loss so far; empty without ``patience``.
    held_out: the held-out loss at every evaluation so far.
    """

    step: int
    weights: Mapping[str, Tensor]
    moments: Mapping[str, Tensor]
    best: Mapping[str, Tensor]
    held_out: tuple[float, ...]


class StateError(Exception):
    """A state that is damaged or belongs to another training; the message says which."""


def pack(state: State, identity: str) -> bytes:
    """The file; ``identity`` names all that decides the training."""
    tensors = {
        f"{part}/{name}": tensor.detach().cpu().contiguous()
        for part in ("weights", "moments", "best")
        for name, tensor in getattr(state, part).items()
    }
    note = {"identity": identity, "step": state.step, "held_out": state.held_out}
    tensors["note"] = torch.frombuffer(bytearray(json.dumps(note).encode()), dtype=torch.uint8)
    body = save_tensors(tensors)
    return hashlib.sha256(body).digest() + body


def unpack(data: bytes, identity: str) -> State:
    """The state in a file.

    Raises:
        StateError: it is damaged, or was written by a training of another ``identity``.
    """
    body = data[_DIGEST:]
    if hashlib.sha256(body).digest() != data[:_DIGEST]:
        raise StateError("is damaged")
    try:
        tensors = load_tensors(body)
        note: dict[str, Any] = json.loads(bytes(tensors.pop("note").tolist()))
    except (SafetensorError, KeyError, ValueError) as error:
        raise StateError(f"is no state of a training ({error})") from error
    if note["identity"] != identity:
        raise StateError("belongs to other settings, samples or versions")
    parts: dict[str, dict[str, Tensor]] = {"weights": {}, "moments": {}, "best": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    return State(step=note["step"], held_out=tuple(note["held_out"]), **parts)


def moments_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The tensors of an optimiser's state, by ``NUMBER.NAME``."""
    return {
        f"{number}.{name}": value
        for number, values in optimizer.state_dict()["state"].items()
        for name, value in values.items()
    }


def restore_moments(optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """What :func:`moments_of` took, into an optimiser of the same groups."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
