"""Generators that make nothing: what a run costs beside its samples. A benchmark registers them by an entry
point of its own (:func:`register`), as any package would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from generation.protocol import Edit, Generator, Source, Undrawable
from manifests.schema import Recipe

SIDE = 16  # pixels of the picture that the cheapest accepted sample has: about 1 kB a member
SPOT = 5
ENTRY_POINTS = """[flawsmith.generators]
null-rows = tests.benchmarks.null_generator:ROWS
null-members = tests.benchmarks.null_generator:MEMBERS
"""


def register(folder: Path) -> None:
    """An installed package's metadata; ``folder`` belongs on the ``PYTHONPATH``."""
    info = folder / "flawsmith_null-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flawsmith-null\nVersion: 0\n")
    (info / "entry_points.txt").write_text(ENTRY_POINTS)


def _nothing(recipe: Recipe, source: Source, rng: np.random.Generator) -> tuple[int, int]:
    """One sample in a thousand is made, for a run without any is an error."""
    if recipe.seed % 1000:
        raise Undrawable("nothing was asked for")
    return _corner(recipe, source, rng)


def _corner(recipe: Recipe, source: Source, _: np.random.Generator) -> tuple[int, int]:
    height, width, _ = source.pixels.shape
    place = recipe.seed % ((height - SPOT) * (width - SPOT))
    return divmod(place, width - SPOT)


def _inverted(sources: Any, draws: Any, _: Any) -> list[Edit]:
    edits = []
    for source, (y, x) in zip(sources, draws, strict=True):
        box = (y, y + SPOT, x, x + SPOT)
        edits.append(Edit(box, (source.crop(box) + np.float32(0.5)) % 1, np.ones((SPOT, SPOT), bool)))
    return edits


ROWS = Generator("null-rows", "classic", "nothing, as a row", _nothing, _inverted)
MEMBERS = Generator("null-members", "classic", "a square of other pixels", _corner, _inverted)
