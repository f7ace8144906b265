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
    jitter,
    recolour,
    within,
)
from generation.masks import around, lens, place
from generation.protocol import Box, Edit, Generator, Params, Source, Undrawable
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
    """One scar: its soft weight (float32, h×w) in a box, where its content comes from, and the colours as of
    :class:`generation.cutpaste.Paste`."""

    target: Box
    weight: np.ndarray
    source: tuple[int, int]
    gain: tuple[float, ...]
    offset: tuple[float, ...]
    factors: Factors | None = None


@dataclass(frozen=True)
class ScarDraw:
    strokes: tuple[Stroke, ...]
    severity: float
    box: Box
    allowed: np.ndarray


def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> ScarDraw:
    """Strokes that together have the wanted area, each around an allowed place.

    The lens shape and the slight bend are inference, for the look of a scratch.
    """
    params = ScarParams(**recipe.settings())
    if params.published:
        return _published(rng, source.allowed, params.jitter)
    shares = rng.uniform(1, 2, recipe.count)
    strokes = []
    for share in shares / shares.sum():
        pixels = max(share * recipe.area * source.allowed.size, 4.0)
        target, weight = lens(rng, source.allowed, pixels, (params.ratio_low, params.ratio_high), params.bend)
        corner = around(place(rng, source.allowed), weight.shape[0], weight.shape[1], source.allowed.shape)
        colours = jitter(rng, source.pixels.shape[2], params.jitter)
        strokes.append(Stroke(target, weight, corner, *colours))
    corners = np.array([stroke.target for stroke in strokes])
    (y0, x0), (y1, x1) = corners[:, [0, 2]].min(axis=0), corners[:, [1, 3]].max(axis=0)
    allowed = source.allowed[y0:y1, x0:x1]
    if not any((_part(allowed, stroke.target, y0, x0) & (stroke.weight > 0)).any() for stroke in strokes):
        raise Undrawable("no room")
    box = (int(y0), int(y1), int(x0), int(x1))
    return ScarDraw(tuple(strokes), recipe.severity, box, allowed)


def _published(rng: np.random.Generator, allowed: np.ndarray, strength: float) -> ScarDraw:
    scale = min(allowed.shape) / 256
    width, length = rng.uniform(*PUBLISHED_WIDTH) * scale, rng.uniform(*PUBLISHED_LENGTH) * scale
    angle = math.radians(rng.uniform(-PUBLISHED_TURN, PUBLISHED_TURN))
    sine, cosine = abs(math.sin(angle)), math.cos(angle)
    sides = (math.ceil(length * cosine + width * sine), math.ceil(length * sine + width * cosine))
    height, wide = (min(max(side, 1), full) for side, full in zip(sides, allowed.shape, strict=True))
    y, x = (np.arange(side) - (side - 1) / 2 for side in (height, wide))
    along = y[:, None] * math.cos(angle) + x[None] * math.sin(angle)
    across = x[None] * math.cos(angle) - y[:, None] * math.sin(angle)
    weight = ((np.abs(along) <= length / 2) & (np.abs(across) <= width / 2)).astype(np.float32)
    (top, left), corner = (within(rng, height, wide, allowed.shape) for _ in range(2))
    box = (top, top + height, left, left + wide)
    part = allowed[top : top + height, left : left + wide]
    if not (part & (weight > 0)).any():
        raise Undrawable("no room")
    return ScarDraw((Stroke(box, weight, corner, (), (), factors(rng, strength)),), 1.0, box, part)


def apply(sources: Sequence[Source], draws: Sequence[ScarDraw], _model: Any) -> list[Edit]:
    return [_apply(source, one) for source, one in zip(sources, draws, strict=True)]


def _apply(source: Source, one: ScarDraw) -> Edit:
    before = source.crop(one.box)
    region = np.zeros(one.allowed.shape, np.bool_)
    for stroke in one.strokes:
        inside = _part(one.allowed, stroke.target, one.box[0], one.box[2]) & (stroke.weight > 0)
        _part(region, stroke.target, one.box[0], one.box[2])[:] |= inside

    if (published := one.strokes[0].factors) is not None:
        (y, x), (height, width) = one.strokes[0].source, one.strokes[0].weight.shape
        piece = colour_jitter(source.crop((y, y + height, x, x + width)), published)
        return Edit(one.box, np.where(region[..., None], piece, before), region)

    def render(strength: float) -> np.ndarray:
        patch = before.copy()
        for stroke in one.strokes:
            height, width = stroke.weight.shape
            top, left = stroke.source
            piece = source.crop((top, top + height, left, left + width))
            piece = recolour(piece, *amplified(stroke.gain, stroke.offset, max(strength, 1.0)))
            view = _part(patch, stroke.target, one.box[0], one.box[2])
            inside = _part(one.allowed, stroke.target, one.box[0], one.box[2])
            view += (stroke.weight * inside * np.float32(min(strength, 1.0)))[..., None] * (piece - view)
        return patch

    return solved(source, one.box, region, one.severity, render, limit=AMPLIFIED)


def _part(array: np.ndarray, box: Box, top: int, left: int) -> np.ndarray:
    return array[box[0] - top : box[1] - top, box[2] - left : box[3] - left]


GENERATOR = Generator(
    name="scar",
    family="classic",
    summary="a thin strip of the picture, recoloured and turned: scratches, hairs, threads",
    draw=draw,
    apply=apply,
    params=ScarParams,
    defect="scratch",
)
