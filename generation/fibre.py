"""Fibres: long, smoothly bent strands with soft edges, darker, lighter or of another colour, through which
the surface shows.

No paper of core.md draws them; the shape and every number here are inference, for the look of hairs, threads
and folds in or on paper, fabric, leather and coatings, and of drips.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import cv2
import numpy as np
from pydantic import Field, model_validator

from generation.masks import place
from generation.protocol import Edit, Generator, Params, Places, Source, Undrawable, places_of
from generation.severity import solved
from generation.textures import TINTS
from manifests.schema import Recipe
from manifests.searching import Search

PIECES, CORNERS = 8, 6  # of a strand, each as thick as it is there; straight lines of a piece
LONGEST = 1.2  # of the picture's longer side
WAVES, WAVE = (0.5, 2.0), 0.5  # how often a strand swings to and fro, and by how many radians at most
TAPER = 0.3  # least thickness of the thin end, as a share of the thick one
SHARPEST = 1  # pixels of blur, at least: between two pieces the thickness changes by whole pixels
# What is seen of a strand is wider than it was drawn: by pixels of its antialiased edge, and by as many times
# the reach of its blur.
EDGE, SEEN = 1.5, 1.4
LEAST = 0.3  # share of a strand that lies on allowed places; one with less counts as having so much
OWN, DARK = 0.6, 0.7  # share of strands that have the surface's own hue; of these, of darker ones
DEEP = 0.5  # nearest that an own tone comes to the surface's, as a share of the way from black or white
DIM = 0.25  # mean of a surface below which its own strands are lighter; from as near to white on, darker


class FibreParams(Params):
    """Settings of ``fibre``.

    Attributes:
        ratio_low, ratio_high: length over width, drawn log-uniformly.
        bend: turn from end to end, at most, in radians.
        softness: reach of the blur over the width, at most.
    """

    ratio_low: Annotated[float, Search(4, 15, log=True), Field(gt=1, allow_inf_nan=False)] = 8.0
    ratio_high: Annotated[float, Search(15, 80, log=True), Field(gt=1, allow_inf_nan=False)] = 40.0
    bend: Annotated[float, Search(0, 4), Field(ge=0, allow_inf_nan=False)] = 2.5
    softness: Annotated[float, Search(0, 1), Field(ge=0, le=1)] = 0.8

    @model_validator(mode="after")
    def _ordered(self) -> FibreParams:
        if self.ratio_low > self.ratio_high:
            raise ValueError(f"ratio_low {self.ratio_low:g} exceeds ratio_high {self.ratio_high:g}")
        return self


@dataclass(frozen=True)
class Strand:
    """Attributes: ``pieces``: corners in sixteenths of a pixel, x and y, int32, N×2, with the thickness in
    pixels; ``blur``, its reach to each side in pixels."""

    pieces: list[tuple[np.ndarray, int]]
    blur: int


@dataclass(frozen=True)
class FibreDraw:
    """Attributes: ``weight`` float32 in (0, 1], N: how much of each of the places is covered; ``colour``
    float32 in [0, 1], C."""

    places: Places
    weight: np.ndarray
    colour: np.ndarray
    severity: float


def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> FibreDraw:
    """Strands of one colour that together have the wanted area, each through an allowed place.

    Raises:
        Undrawable: none of them shows there.
    """
    params = FibreParams.of(recipe)
    allowed = source.allowed
    shares = rng.uniform(1, 2, recipe.count)
    sizes = np.maximum(shares / shares.sum() * recipe.area * allowed.size, 4.0).tolist()
    cover = np.zeros(allowed.shape, np.uint8)
    for size in sizes:
        _lay(cover, _strand(rng, allowed, size, params))
    cover *= allowed
    x, y, width, height = cv2.boundingRect(cover)
    if not width:
        raise Undrawable("no room")
    box = (y, y + height, x, x + width)
    cover = cover[y : y + height, x : x + width]
    places = places_of(box, cover > 0, allowed.shape[1])
    weight = cover.reshape(-1)[places.inner] * np.float32(1 / 255)
    return FibreDraw(places, weight, _colour(rng, source.at(places.outer)), recipe.severity)


def _lay(cover: np.ndarray, strand: Strand) -> None:
    """Draws a strand into what is covered, uint8, H×W, where it covers more."""
    left, top, width, height = cv2.boundingRect(np.concatenate([corners for corners, _ in strand.pieces]))
    margin = max(thickness for _, thickness in strand.pieces) // 2 + strand.blur + 2
    x0, x1 = max(left // 16 - margin, 0), min((left + width) // 16 + margin, cover.shape[1])
    y0, y1 = max(top // 16 - margin, 0), min((top + height) // 16 + margin, cover.shape[0])
    around = strand.blur + 1  # beyond the picture, so that its border does not bend what is soft
    drawn = np.zeros((y1 - y0 + 2 * around, x1 - x0 + 2 * around), np.uint8)
    for corners, thickness in strand.pieces:
        at = corners - (16 * (x0 - around), 16 * (y0 - around))
        cv2.polylines(drawn, [at], False, 255, thickness, cv2.LINE_AA, 4)
    side = 2 * strand.blur + 1
    drawn = cv2.stackBlur(drawn, (side, side))[around:-around, around:-around]
    np.maximum(cover[y0:y1, x0:x1], drawn, out=cover[y0:y1, x0:x1])


def _strand(rng: np.random.Generator, allowed: np.ndarray, pixels: float, params: FibreParams) -> Strand:
    """A strand that shows about that many pixels, a random point of which lies on an allowed place."""
    ratio = math.exp(rng.uniform(math.log(params.ratio_low), math.log(params.ratio_high)))
    softness = rng.uniform(0, params.softness)
    y, x = place(rng, allowed)
    start, bend = rng.uniform(0, 2 * math.pi), rng.uniform(-params.bend, params.bend)
    wave, waves, phase = rng.uniform(0, WAVE), rng.uniform(*WAVES), rng.uniform(0, 2 * math.pi)
    taper, through = rng.uniform(TAPER, 1), rng.integers(PIECES * CORNERS + 1)

    along = np.linspace(0, 1, PIECES * CORNERS + 1)
    heading = start + bend * along + wave * np.sin(2 * math.pi * waves * along + phase)
    line = np.cumsum(np.stack([np.cos(heading), np.sin(heading)], axis=1), axis=0) / len(along)
    line -= line[through]
    length = min(math.sqrt(pixels * ratio), LONGEST * max(allowed.shape))
    pixels /= max(_share(allowed, line * length + (x, y)), LEAST)
    # As thick as leaves room for its soft edges, and its round ends; where that is too thin, it is shorter.
    wide = pixels / (length + pixels / length)
    width = max((wide - EDGE) / (1 + SEEN * softness), 1.0)
    blur = max(round(softness * width), SHARPEST)
    seen = max(wide, width + SEEN * blur + EDGE)
    length = min(length, max(pixels / seen - seen, 1.0))

    corners = np.rint(16 * (line * length + (x, y))).astype(np.int32)
    # The mean of what the thick end and the thin one have is the width.
    each = np.linspace(1, taper, PIECES) * width * 2 / (1 + taper)
    pieces = [
        (corners[k * CORNERS : (k + 1) * CORNERS + 1], max(round(float(t)), 1)) for k, t in enumerate(each)
    ]
    return Strand(pieces, blur)


def _share(allowed: np.ndarray, line: np.ndarray) -> float:
    """The share of a line's corners (x, y; float, N×2) that are on allowed places."""
    x, y = np.rint(line).astype(np.int64).T
    inside = (x >= 0) & (y >= 0) & (x < allowed.shape[1]) & (y < allowed.shape[0])
    return float(allowed[y[inside], x[inside]].sum()) / len(line)


def _colour(rng: np.random.Generator, before: np.ndarray) -> np.ndarray:
    """The surface's own hue, darker or lighter, or that of some matter: float32 in [0, 1], C.

    Args:
        before: float32 in [0, 1], N×C; the surface.
    """
    own, dark, share = rng.random() < OWN, rng.random() < DARK, rng.uniform(0, DEEP)
    tint = TINTS[rng.integers(len(TINTS))] * rng.uniform(0.7, 1.1)
    if own:
        mean = before.mean(axis=0, dtype=np.float64)
        dark = (dark or mean.mean() > 1 - DIM) and mean.mean() >= DIM
        return (share * mean if dark else 1 - share * (1 - mean)).astype(np.float32)
    return np.minimum(tint if before.shape[1] == 3 else tint.mean(keepdims=True), 1).astype(np.float32)


def apply(sources: Sequence[Source], draws: Sequence[FibreDraw], _model: Any) -> list[Edit]:
    return [_apply(source, one) for source, one in zip(sources, draws, strict=True)]


def _apply(source: Source, one: FibreDraw) -> Edit:
    """I' = I + opacity·weight·(colour − I)."""
    before = source.at(one.places.outer)
    change = one.weight[:, None] * (one.colour - before)
    return solved(
        source,
        one.places,
        before,
        one.severity,
        lambda opacity: before + np.float32(opacity) * change,
        limit=1.0,
        bounded=True,
    )


GENERATOR = Generator(
    name="fibre",
    family="classic",
    summary="a long, soft, bent strand through which the surface shows: hairs, threads, folds, drips",
    draw=draw,
    apply=apply,
    params=FibreParams,
    defect="fibre",
)
