"""The detector of the round before as the critic of a round's samples: named by its hash, loaded once.

A round that practises keeps a copy of the detector that it began with, for a veto may train the round before
anew, and says in its settings which one it is. A copy that is no longer the same is refused: samples would
not be what their recipes say.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from generation.critic import Critic, Search
from generation.protocol import Generator
from manifests.errors import FlawsmithError
from manifests.workspace import Workspace, WorkspaceError, round_file

if TYPE_CHECKING:
    from workflows.config import Practice


@dataclass(frozen=True)
class Pinned:
    """A detector by its place and its content: ``sha256`` (hex) of its weights and of its configuration."""

    workspace: str
    folder: str
    sha256: str


def pin(space: Workspace, number: int, detector: str) -> dict[str, str]:
    """Copies the detector of the round before into round ``number``; how that round's settings name it.

    Raises:
        FlawsmithError: it is not there.
    """
    files = _files(space, f"rounds/{number - 1:03d}/detectors/{detector}")
    folder = round_file(number, "critic")
    for name, data in files.items():
        space.write_bytes(f"{folder}/{name}", data)
    return {"folder": folder, "sha256": _sha256(files)}


def pinned_files(pinned: Pinned) -> dict[str, bytes]:
    """The files of a critic by name.

    Raises:
        WorkspaceError: they are no longer those that the round began with.
    """
    files = _files(Workspace(pinned.workspace), pinned.folder)
    if (found := _sha256(files)) != pinned.sha256:
        raise WorkspaceError(
            f"{pinned.folder} is no longer the detector that the round began to practise against (sha256 "
            f"{found[:12]}, its settings say {pinned.sha256[:12]}): restore it, or delete the round that "
            "practises and run again"
        )
    return files


@lru_cache(maxsize=2)  # of a GPU, and of generators that want none
def load_critic(pinned: Pinned, device: str) -> Critic:
    """The critic, ready, where the samples are made; read once a process.

    Raises:
        WorkspaceError: its files are no longer those that the round began with.
        FlawsmithError: they cannot be used, or the detector cannot be practised against.
    """
    import tempfile
    from pathlib import Path

    import torch

    from detectors.critic import as_critic
    from training import checkpoints

    torch.set_num_threads(1)  # part of what makes bytes equal; generators without a model fix none
    files = pinned_files(pinned)
    with tempfile.TemporaryDirectory() as aside:
        for name, data in files.items():
            (Path(aside) / name).write_bytes(data)
        notes = checkpoints.read_config(aside).get("notes", {})
        if notes.get("tiles") is not None:
            raise FlawsmithError(
                "generation.practice: a detector of tiles never sees a whole picture and cannot be practised "
                "against; set detector.tiles to null, or leave practice out"
            )
        return as_critic(checkpoints.load(aside, device), notes["map_thresholds"])


def coached(
    generator: Generator, model: Any, pinned: Pinned | None, practice: Practice, device: str
) -> tuple[Any, Search | None]:
    """How a generator on ``device`` practises: its model with a guide, or a search over draws; neither
    without a critic."""
    if pinned is None:
        return model, None
    if generator.guide is not None and practice.guidance:
        return generator.guide(model, load_critic(pinned, device), practice.guidance), None
    if generator.guide is None and practice.candidates > 1:
        return model, Search(load_critic(pinned, device), practice.candidates)
    return model, None


def _files(space: Workspace, folder: str) -> dict[str, bytes]:
    from training.checkpoints import CONFIG, WEIGHTS

    missing = [name for name in (WEIGHTS, CONFIG) if not space.exists(f"{folder}/{name}")]
    if missing:
        raise WorkspaceError(
            f"generation.practice: {folder} lacks {', '.join(missing)}; `flawsmith train` makes them"
        )
    return {name: space.read_bytes(f"{folder}/{name}") for name in (WEIGHTS, CONFIG)}


def _sha256(files: dict[str, bytes]) -> str:
    return hashlib.sha256(b"".join(files.values())).hexdigest()
