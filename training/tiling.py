"""Large pictures in overlapping tiles of the detector's input size, so that thin defects survive.

A whole picture that is resized to a detector's input loses what is thinner than a pixel there. Tiles are cut
at the picture's own scale (that of ``max_side``) instead; a detector learns from tiles and scores tiles, and
the maps of the tiles are blended into one of the picture's size.

What tiles do not do: a detector that looks at tiles never sees how the parts of a large picture belong
together (a missing part, a wrong order), and where it remembers some normals, it now remembers some tiles.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np

if TYPE_CHECKING:  # both import torch, which an exported detector does without
    from training.examples import Normal
    from training.loading import Sample


class Window(NamedTuple):
    """Where a tile lies in its picture, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, picture: np.ndarray) -> np.ndarray:
        """The tile of an array H×W×… ."""
        return picture[self.top : self.top + self.height, self.left : self.left + self.width]


def is_tiled(shape: tuple[int, int], size: int) -> bool:
    """Whether a picture is larger than the detector's input; others are scored whole, as without tiles."""
    return max(shape) > size


def scored_shape(shape: tuple[int, int], size: int, tiles: float | None) -> tuple[int, int]:
    """(h, w) of the map of a picture: size×size, or the picture's own (H, W) where it is scored in tiles."""
    return shape if tiles is not None and is_tiled(shape, size) else (size, size)


def windows(shape: tuple[int, int], size: int, overlap: float) -> list[Window]:
    """Tiles of size×size that cover a picture, evenly spread, neighbours sharing at least ``overlap``.

    A picture that is smaller than ``size`` along one side has tiles of that length there.

    Args:
        shape: (H, W) of the picture.
        overlap: share of a tile's side, in [0, 1).

    >>> windows((100, 150), 100, 0.25)
    [Window(top=0, left=0, height=100, width=100), Window(top=0, left=50, height=100, width=100)]
    """
    height, width = (min(side, size) for side in shape)
    return [
        Window(top, left, height, width)
        for top in _starts(shape[0], height, overlap)
        for left in _starts(shape[1], width, overlap)
    ]


def _starts(length: int, size: int, overlap: float) -> list[int]:
    count = 1 + math.ceil((length - size) / max(1, math.floor(size * (1 - overlap))))
    return np.rint(np.linspace(0, length - size, count)).astype(int).tolist()


def worst(scores: Sequence[float], ignore: Sequence[np.ndarray] | None) -> float:
    """A picture's score: that of its worst tile, of those that ``ignore`` (bool, one a tile) leaves a place;
    of all if it leaves none."""
    counted = [not mask.all() for mask in ignore] if ignore is not None else [True]
    if ignore is None or not any(counted):
        return max(scores)
    return max(score for score, counts in zip(scores, counted, strict=True) if counts)


def blend(maps: Iterable[np.ndarray], at: Sequence[Window], shape: tuple[int, int]) -> np.ndarray:
    """One map out of those of the tiles, weighted by a raised cosine that falls towards a tile's edges.

    Args:
        maps: float32, of any size; each is brought to its window's.
        at: their windows, which cover the picture.
        shape: (H, W) of the picture.

    Returns:
        float32 H×W. Where tiles agree it is what they say; it has no step where one ends.
    """
    total, weight = np.zeros((2, *shape), np.float32)
    for scores, window in zip(maps, at, strict=True):
        if scores.shape != (window.height, window.width):
            scores = cv2.resize(scores, (window.width, window.height), interpolation=cv2.INTER_LINEAR)
        share = np.outer(_raised_cosine(window.height), _raised_cosine(window.width))
        window.of(total)[:] += share * scores
        window.of(weight)[:] += share
    return total / weight


def _raised_cosine(length: int) -> np.ndarray:
    """float32, above 0 everywhere, largest in the middle."""
    return (np.sin(np.pi * (np.arange(length) + 0.5) / length) ** 2).astype(np.float32)


def tile_normals(normals: Iterable[Normal], size: int, overlap: float) -> Iterator[Normal]:
    """Each tile a picture of its own."""
    for normal in normals:
        for number, window in enumerate(windows(normal.pixels.shape[:2], size, overlap)):
            ignore = None if normal.ignore is None else window.of(normal.ignore)
            image_id = f"{normal.image_id}@{number}"
            yield replace(normal, image_id=image_id, pixels=window.of(normal.pixels), ignore=ignore)


def tile_samples(samples: Iterable[Sample], size: int, overlap: float) -> Iterator[Sample]:
    """The tiles of each sample that hold some of its mask; each names its normal's tile as its source."""
    for sample in samples:
        for number, window in enumerate(windows(sample.mask.shape, size, overlap)):
            mask = window.of(sample.mask)
            if mask.any():
                yield replace(
                    sample,
                    sample_id=f"{sample.sample_id}@{number}",
                    image=window.of(sample.image),
                    mask=mask,
                    normal=None if sample.normal is None else window.of(sample.normal),
                    recipe={**sample.recipe, "image_id": f"{sample.image_id}@{number}"},
                )
