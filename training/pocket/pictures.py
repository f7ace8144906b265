"""Endless training pictures, each a function of its number, and the free photographs among them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import resources, util
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from manifests.errors import UsageError
from training.pocket.damage import damage
from training.pocket.materials import Scene, scene

SIDE = 128  # pixels of a training picture
LARGEST = 768  # pixels of a photograph's longer side, after shrinking
# Surfaces that scikit-image's wheel ships under CC0 (its data registry names the licence of each).
SKIMAGE = {"brick.png": "bricks", "grass.png": "grass", "gravel.png": "gravel"}

Photographs = Sequence[tuple[str, np.ndarray]]


def photographs(folder: Path | None) -> Photographs:
    """Free textures: what scikit-image ships (where it is installed) and every picture in ``folder``.

    Args:
        folder: pictures of surfaces without defects; None for none. Their file names are not read: what a
            picture shows is called by a generic noun.

    Returns:
        (noun, uint8 H×W×3 RGB), in the order of file names.

    Raises:
        UsageError: the folder does not exist or holds no picture that can be read.
    """
    found: list[tuple[str, np.ndarray]] = []
    if util.find_spec("skimage") is not None:
        shipped = Path(str(resources.files("skimage"))) / "data"
        found += [
            (noun, picture)
            for name, noun in SKIMAGE.items()
            if (picture := _read(shipped / name)) is not None
        ]
    if folder is not None:
        paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
        free = [("surface", picture) for path in paths if (picture := _read(path)) is not None]
        found += free
        if not free:
            raise UsageError(f"{folder}: no pictures (jpg, png, webp); name a folder of free textures")
    return found


def _read(path: Path) -> np.ndarray | None:
    picture = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB)
    if picture is None or min(picture.shape[:2]) < 64:
        return None
    scale = LARGEST / max(picture.shape[:2])
    return (
        cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else picture
    )


def numbered(seed: int, number: int, photos: Photographs) -> tuple[np.random.Generator, Scene]:
    """The scene of one number and the stream that goes on after it."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(number,)))
    return rng, scene(rng, SIDE, photos)


class Pictures(IterableDataset[torch.Tensor]):
    """uint8 side×side×3 pictures from ``start`` on, half of them damaged."""

    def __init__(self, seed: int, start: int, photos: Photographs):
        self.seed, self.start, self.photos = seed, start, photos

    def __iter__(self) -> Iterator[torch.Tensor]:
        cv2.setNumThreads(0)
        number = self.start
        while True:
            rng, found = numbered(self.seed, number, self.photos)
            pixels = damage(rng, found).pixels if rng.random() < 0.5 else found.pixels
            yield torch.from_numpy((pixels * 255 + 0.5).astype(np.uint8))
            number += 1


def batches(seed: int, start: int, size: int, photos: Photographs) -> Iterator[torch.Tensor]:
    """Batches of float32 N×3×side×side in [0, 1], drawn by one process beside the training."""
    loader = DataLoader(Pictures(seed, start, photos), batch_size=size, num_workers=1, prefetch_factor=8)
    for batch in loader:
        yield batch.permute(0, 3, 1, 2).float() / 255
