"""CutPaste-scar: a thin, turned strip of the picture, recoloured, pasted elsewhere (core.md 5.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from generation.cutpaste import (
    AMPLIFIED,
    Factors,
    amplified,
    colour_jitter,
    factors,
    faded,
    jitter,
    recolour,
    within,
)
from generation.masks import around, bow, joined, place
from generation.protocol import Box, Edit, Generator, Params, Places, Source, Undrawable, places_at
from generation.severity import solved
from manifests.schema import Recipe
from manifests.searching import Search

PUBLISHED_WIDTH, PUBLISHED_LENGTH = (2.0, 16.0), (10.0, 25.0)  # pixels at a side of 256
PUBLISHED_TURN = 45.0  # degrees, at most


class ScarParams(Params):
    """Settings of ``scar``.

    Attributes:
        ratio_low, ratio_high: length over width, drawn log-uniformly.
        bend: largest sideways bend, as a share of the length.
        jitter: largest change of brightness, contrast and tint, as a share.
        published: as in the paper, whatever area, count and severity the recipe asks for: one opaque strip,
            2–16 × 10–25 pixels at a side of 256, turned by at most 45°, anywhere, its colours varied as of
            ``cutpaste``.
    """

    ratio_low: Annotated[float, Search(2, 10, log=True)] = 6.0
    ratio_high: Annotated[float, Search(10, 60, log=True)] = 30.0
    bend: Annotated[float, Search(0, 0.4)] = 0.12
    jitter: Annotated[float, Search(0, 1)] = 0.6
    published: bool = False


@dataclass(frozen=True)
class Stroke:
    """One scar: flat indices of its pixels and their soft weights (float32), both N; how far on in the flat
    picture its content comes from; and the colours as of :class:`generation.cutpaste.Paste`."""

    outer: np.ndarray
    weight: np.ndarray
    shift: int
    gain: tuple[float, ...]
    offset: tuple[float, ...]


@dataclass(frozen=True)
class ScarDraw:
    strokes: tuple[Stroke, ...]
    severity: float
    places: Places


@dataclass(frozen=True)
class Strip:
    """The published scar: ``region`` (bool, h×w) of a box, and where the box's content comes from."""

    box: Box
    region: np.ndarray
    source: tuple[int, int]
    factors: Factors


def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> ScarDraw | Strip:
    """Strokes that together have the wanted area, each around an allowed place.

    The lens shape and the slight bend are inference, for the look of a scratch.
    """
    params = ScarParams.of(recipe)
    allowed = source.allowed
    if params.published:
        return _published(rng, allowed, params.jitter)
    shares = rng.uniform(1, 2, recipe.count)
    strokes = []
    for share in shares / shares.sum():
        pixels = max(share * recipe.area * allowed.size, 4.0)
        rows, columns, weight = bow(rng, allowed, pixels, (params.ratio_low, params.ratio_high), params.bend)
        top, left = int(rows[0]), int(columns.min())
        height, width = int(rows[-1]) + 1 - top, int(columns.max()) + 1 - left
        y, x = around(place(rng, allowed), height, width, allowed.shape)
        colours = jitter(rng, source.pixels.shape[2], params.jitter)
        outer = rows * allowed.shape[1] + columns
        inside = np.flatnonzero(allowed.reshape(-1)[outer])
        shift = (y - top) * allowed.shape[1] + x - left
        strokes.append(Stroke(outer[inside], weight[inside], shift, *colours))
    places = joined([stroke.outer for stroke in strokes])
    if not len(places):
        raise Undrawable("no room")
    return ScarDraw(tuple(strokes), recipe.severity, places_at(places, allowed.shape[1]))


def _published(rng: np.random.Generator, allowed: np.ndarray, strength: float) -> Strip:
    scale = min(allowed.shape) / 256
    width, length = rng.uniform(*PUBLISHED_WIDTH) * scale, rng.uniform(*PUBLISHED_LENGTH) * scale
    angle = math.radians(rng.uniform(-PUBLISHED_TURN, PUBLISHED_TURN))
    sine, cosine = abs(math.sin(angle)), math.cos(angle)
    sides = (math.ceil(length * cosine + width * sine), math.ceil(length * sine + width * cosine))
    height, wide = (min(max(side, 1), full) for side, full in zip(sides, allowed.shape, strict=True))
    y, x = (np.arange(side) - (side - 1) / 2 for side in (height, wide))
    along = y[:, None] * math.cos(angle) + x[None] * math.sin(angle)
    across = x[None] * math.cos(angle) - y[:, None] * math.sin(angle)
    strip = (np.abs(along) <= length / 2) & (np.abs(across) <= width / 2)
    (top, left), corner = (within(rng, height, wide, allowed.shape) for _ in range(2))
    region = allowed[top : top + height, left : left + wide] & strip
    if not region.any():
        raise Undrawable("no room")
    return Strip((top, top + height, left, left + wide), region, corner, factors(rng, strength))


def apply(sources: Sequence[Source], draws: Sequence[ScarDraw | Strip], _model: Any) -> list[Edit]:
    return [_apply(source, one) for source, one in zip(sources, draws, strict=True)]


def _apply(source: Source, one: ScarDraw | Strip) -> Edit:
    if isinstance(one, Strip):
        (y, x), (height, width) = one.source, one.region.shape
        piece = colour_jitter(source.crop((y, y + height, x, x + width)), one.factors)
        return Edit(one.box, np.where(one.region[..., None], piece, source.crop(one.box)), one.region)

    before = source.at(one.places.outer)
    pieces = [source.at(stroke.outer + stroke.shift) for stroke in one.strokes]
    targets = [np.searchsorted(one.places.outer, stroke.outer) for stroke in one.strokes]

    def paste(factor: float) -> np.ndarray:
        values = before.copy()
        for stroke, piece, target in zip(one.strokes, pieces, targets, strict=True):
            if len(target):
                new, old = recolour(piece, *amplified(stroke.gain, stroke.offset, factor)), values[target]
                values[target] = old + stroke.weight[:, None] * (new - old)
        return values

    return solved(source, one.places, before, one.severity, faded(before, paste), limit=AMPLIFIED)


GENERATOR = Generator(
    name="scar",
    family="classic",
    summary="a thin strip of the picture, recoloured and turned: scratches, hairs, threads",
    draw=draw,
    apply=apply,
    params=ScarParams,
    defect="scratch",
)
