"""CutPaste-scar: a thin, turned strip of the picture, recoloured, pasted elsewhere (core.md 5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from generation.cutpaste import AMPLIFIED, amplified, jitter, recolour
from generation.masks import around, lens, place
from generation.protocol import Box, Edit, Generator, Params, Source, Undrawable
from generation.severity import solved
from manifests.schema import Recipe


class ScarParams(Params):
    """Settings of ``scar``.

    Attributes:
        ratio_low, ratio_high: length over width, drawn log-uniformly.
        bend: largest sideways bend, as a share of the length.
        jitter: largest change of brightness, contrast and tint, as a share.
        calibrate: as of ``cutpaste``.
    """

    ratio_low: float = 6.0
    ratio_high: float = 30.0
    bend: float = 0.12
    jitter: float = 0.6
    calibrate: bool = True


@dataclass(frozen=True)
class Stroke:
    """One scar: its soft weight (float32, h×w) in a box, where its content comes from, and the colours."""

    target: Box
    weight: np.ndarray
    source: tuple[int, int]
    gain: tuple[float, ...]
    offset: tuple[float, ...]


@dataclass(frozen=True)
class ScarDraw:
    strokes: tuple[Stroke, ...]
    severity: float
    calibrate: bool
    box: Box
    allowed: np.ndarray


def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> ScarDraw:
    """Strokes that together have the wanted area, each around an allowed place.

    The published sizes (2–16 × 10–25 px at a side of 256) follow from the areas and ratios drawn here; the
    lens shape and the slight bend are inference, for the look of a scratch.
    """
    params = ScarParams(**recipe.settings())
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
    return ScarDraw(tuple(strokes), recipe.severity, params.calibrate, box, allowed)


def apply(sources: Sequence[Source], draws: Sequence[ScarDraw], _model: Any) -> list[Edit]:
    return [_apply(source, one) for source, one in zip(sources, draws, strict=True)]


def _apply(source: Source, one: ScarDraw) -> Edit:
    before = source.crop(one.box)
    region = np.zeros(one.allowed.shape, np.bool_)
    for stroke in one.strokes:
        inside = _part(one.allowed, stroke.target, one.box[0], one.box[2]) & (stroke.weight > 0)
        _part(region, stroke.target, one.box[0], one.box[2])[:] |= inside

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

    if not one.calibrate:
        return Edit(one.box, render(1.0), region)
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
