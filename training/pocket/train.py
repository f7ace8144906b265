"""The pocket models from nothing: the legs of the training in order, resumed or skipped, then the export."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from manifests.errors import UsageError
from training.pocket import autoencoder, contrastive, diffusion, legs
from training.pocket.export import export
from training.pocket.pictures import Photographs, photographs

STEPS = {"autoencoder": 4500, "diffusion": 12_000, "contrastive": 4000, "decoder": 1500}
SETTINGS = "training.json"  # what a folder's training was begun with


def train_all(out: Path, textures: Path | None = None, seed: int = 0) -> tuple[Path, Path]:
    """Trains what is not trained yet and exports; interrupted at any time, the same call goes on.

    The legs are functions of seed, textures and thread count: an interruption changes nothing.

    Args:
        out: for the checkpoints ``<leg>.pt`` and the finished folders ``sd`` and ``clip``.
        textures: free pictures of surfaces; None: drawn surfaces only.

    Returns:
        The two finished folders.

    Raises:
        UsageError: no pictures in ``textures``, or ``out`` was begun with another seed or other textures.
    """
    photos = photographs(textures)
    out.mkdir(parents=True, exist_ok=True)
    _same_training(out, photos, seed)
    for name, steps in STEPS.items():
        path = out / f"{name}.pt"
        state = legs.load(path)
        if state is not None and state["step"] >= steps:
            print(f"{name} is trained ({steps} steps)", flush=True)
            continue
        LEGS[name](out, steps, seed, photos)
    return export(out, out)


def _decoder(out: Path, steps: int, seed: int, photos: Photographs) -> Path:
    return autoencoder.train(out, steps, seed, photos, decoder_only=True)


LEGS: dict[str, Callable[[Path, int, int, Photographs], Path]] = {
    "autoencoder": autoencoder.train,
    "diffusion": diffusion.train,
    "contrastive": contrastive.train,
    "decoder": _decoder,
}


def _same_training(out: Path, photos: Photographs, seed: int) -> None:
    """Notes seed and textures of a new folder; refuses to go on with others: the result would be neither."""
    digest = hashlib.sha256(b"".join(picture.tobytes() for _, picture in photos)).hexdigest()[:16]
    wanted = {"seed": seed, "textures": digest if photos else None}
    file = out / SETTINGS
    if not file.exists():
        file.write_text(json.dumps(wanted) + "\n", encoding="utf-8")
        return
    begun = json.loads(file.read_text(encoding="utf-8"))
    wrong = [name for name in wanted if begun.get(name) != wanted[name]]
    if wrong:
        raise UsageError(
            f"{out} was begun with another {' and other '.join(wrong)} ({file.name} has {begun}, asked for "
            f"{wanted}); name them again, or another folder"
        )
