"""CutPaste-scar: a thin, turned strip of the picture, recoloured, pasted elsewhere (core.md 5.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from generation.cutpaste import jitter, recolour
from generation.masks import around, place
from generation.protocol import Box, Edit, Generator, Params, Source, Undrawable
from manifests.schema import Recipe

SOFT = 0.9  # pixels of width that the soft edges add
THINNEST = 0.6  # pixels of width before the edges are softened; thinner lines would be transparent


class ScarParams(Params):
    """Settings of ``scar``.

    Attributes:
        ratio_low, ratio_high: length over width, drawn log-uniformly.
        bend: largest sideways bend, as a share of the length.
        jitter: largest change of brightness, contrast and tint at severity 1, as a share.
    """

    ratio_low: float = 6.0
    ratio_high: float = 30.0
    bend: float = 0.12
    jitter: float = 0.6


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
    opacity: float
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
        target, weight = _stroke(rng, source.allowed, pixels, params)
        corner = around(place(rng, source.allowed), weight.shape[0], weight.shape[1], source.allowed.shape)
        colours = jitter(rng, source.pixels.shape[2], (0.2 + 0.8 * recipe.severity) * params.jitter)
        strokes.append(Stroke(target, weight, corner, *colours))
    corners = np.array([stroke.target for stroke in strokes])
    (y0, x0), (y1, x1) = corners[:, [0, 2]].min(axis=0), corners[:, [1, 3]].max(axis=0)
    allowed = source.allowed[y0:y1, x0:x1]
    if not any((_part(allowed, stroke.target, y0, x0) & (stroke.weight > 0)).any() for stroke in strokes):
        raise Undrawable("no room")
    return ScarDraw(
        tuple(strokes), 0.4 + 0.6 * recipe.severity, (int(y0), int(y1), int(x0), int(x1)), allowed
    )


def apply(sources: Sequence[Source], draws: Sequence[ScarDraw], _model: Any) -> list[Edit]:
    return [_apply(source, one) for source, one in zip(sources, draws, strict=True)]


def _apply(source: Source, one: ScarDraw) -> Edit:
    patch = source.crop(one.box)
    region = np.zeros(one.allowed.shape, np.bool_)
    for stroke in one.strokes:
        height, width = stroke.weight.shape
        top, left = stroke.source
        piece = source.crop((top, top + height, left, left + width))
        piece = recolour(piece, stroke.gain, stroke.offset)
        view = _part(patch, stroke.target, one.box[0], one.box[2])
        inside = _part(one.allowed, stroke.target, one.box[0], one.box[2])
        weight = stroke.weight * inside * np.float32(one.opacity)
        view += weight[..., None] * (piece - view)
        _part(region, stroke.target, one.box[0], one.box[2])[:] |= weight > 0
    return Edit(one.box, patch, region)


def _part(array: np.ndarray, box: Box, top: int, left: int) -> np.ndarray:
    return array[box[0] - top : box[1] - top, box[2] - left : box[3] - left]


def _stroke(
    rng: np.random.Generator, allowed: np.ndarray, pixels: float, params: ScarParams
) -> tuple[Box, np.ndarray]:
    """A bent lens of about that many pixels, with edges softened over one pixel, tightly boxed."""
    ratio = math.exp(rng.uniform(math.log(params.ratio_low), math.log(params.ratio_high)))
    # A lens has π/4 of its rectangle, and its soft edge shows over another half pixel on each side. It
    # should not leave the picture.
    length = min(math.sqrt(pixels * ratio * 4 / math.pi), 0.8 * min(allowed.shape))
    thickness = max((pixels / length - SOFT) * 4 / math.pi, THINNEST)
    length = min(length, pixels / (thickness * math.pi / 4 + SOFT))
    angle = rng.uniform(0, math.pi)
    bend = rng.uniform(-params.bend, params.bend) * length
    y, x = place(rng, allowed)

    reach = math.ceil(length / 2 + abs(bend)) + 2
    y0, y1 = max(y - reach, 0), min(y + reach + 1, allowed.shape[0])
    x0, x1 = max(x - reach, 0), min(x + reach + 1, allowed.shape[1])
    dy = np.arange(y0 - y, y1 - y, dtype=np.float32)[:, None]
    dx = np.arange(x0 - x, x1 - x, dtype=np.float32)[None, :]
    sine, cosine = np.float32(math.sin(angle)), np.float32(math.cos(angle))
    along = (dx * cosine + dy * sine) * np.float32(2 / length)
    across = dy * cosine - dx * sine + np.float32(bend) * (along * along - np.float32(0.5))
    half = np.float32(thickness / 2) * np.sqrt(np.maximum(1 - along * along, 0))
    weight = np.where(np.abs(along) < 1, np.clip(half - np.abs(across) + np.float32(0.5), 0, 1), 0)
    rows, columns = np.flatnonzero(weight.any(axis=1)), np.flatnonzero(weight.any(axis=0))
    if len(rows) == 0:  # the bend led the stroke off a picture of a few pixels
        raise Undrawable("no room")
    box = (y0 + int(rows[0]), y0 + int(rows[-1]) + 1, x0 + int(columns[0]), x0 + int(columns[-1]) + 1)
    return box, weight[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(np.float32)


GENERATOR = Generator(
    name="scar",
    family="classic",
    summary="a thin strip of the picture, recoloured and turned: scratches, hairs, threads",
    draw=draw,
    apply=apply,
    params=ScarParams,
    defect="scratch",
)
