"""Cracks: dark, jagged lines that branch and thin out towards their ends.

No paper of core.md draws them; the shape and every number here are inference, for the look of a crack in
concrete, ceramics or castings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import cv2
import numpy as np
from pydantic import Field

from generation.masks import place
from generation.protocol import Edit, Generator, Params, Places, Source, Undrawable, places_of
from generation.severity import solved
from manifests.schema import Recipe
from manifests.searching import Search

BENDS = 24  # corners of a line
FORK = (0.4, 1.1)  # radians between a branch and the line that it leaves
BRANCH = (0.15, 0.5)  # length of a branch, as a share of the trunk's
LONGEST = 0.7  # of the picture's shorter side: a trunk that has more pixels than that allows is thicker
SOFT = 1.3  # pixels by which what is seen of an antialiased line is wider than its thickness
DARK, LIGHT = np.float32(0.04), np.float32(0.9)  # tones of a crack
DIM = 0.25  # mean of a surface below which its cracks are light
HARD = 16.0  # strength at most: what is covered by a sixteenth is then covered whole


class CrackParams(Params):
    """Settings of ``crack``.

    Attributes:
        ratio_low, ratio_high: length of the trunk over its width, drawn log-uniformly.
        kink: deviation of the change of direction from corner to corner, in radians.
        branches: at most.
    """

    ratio_low: Annotated[float, Search(10, 60, log=True), Field(gt=1)] = 30.0
    ratio_high: Annotated[float, Search(60, 200, log=True), Field(gt=1)] = 100.0
    kink: Annotated[float, Search(0, 0.6), Field(ge=0)] = 0.3
    branches: Annotated[int, Search(0, 5, whole=True), Field(ge=0, le=16)] = 3


@dataclass(frozen=True)
class Crack:
    """Attributes: ``lines``, the trunk first: corners in sixteenths of a pixel, x and y, int32, N×2;
    ``thickness`` of the trunk's middle in pixels. The trunk's ends and the branches are half as thick."""

    lines: list[np.ndarray]
    thickness: int


@dataclass(frozen=True)
class CrackDraw:
    """Attributes: ``weight`` float32 in (0, 1], N: how much of each of the places is covered."""

    places: Places
    weight: np.ndarray
    severity: float


def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> CrackDraw:
    """Cracks that together have the wanted area, each around an allowed place."""
    params = CrackParams.of(recipe)
    allowed = source.allowed
    shares = rng.uniform(1, 2, recipe.count).tolist()
    whole = recipe.area * allowed.size / sum(shares)
    cracks = [_crack(rng, allowed, max(share * whole, 4.0), params) for share in shares]

    corners = [line for crack in cracks for line in crack.lines]
    left, top, width, height = cv2.boundingRect(np.concatenate(corners))
    margin = max(crack.thickness for crack in cracks) + 1
    x0, x1 = max(left // 16 - margin, 0), min((left + width) // 16 + margin + 1, allowed.shape[1])
    y0, y1 = max(top // 16 - margin, 0), min((top + height) // 16 + margin + 1, allowed.shape[0])
    cover = np.zeros((y1 - y0, x1 - x0), np.uint8)
    corner = np.array([16 * x0, 16 * y0], np.int32)
    for crack in cracks:
        lines, thin = [line - corner for line in crack.lines], _thin(crack.thickness)
        cv2.polylines(cover, lines, False, 255, thin, cv2.LINE_AA, 4)
        if thin < crack.thickness:
            middle = lines[0][BENDS // 4 : -BENDS // 4]
            cv2.polylines(cover, [middle], False, 255, crack.thickness, cv2.LINE_AA, 4)
    cover *= allowed[y0:y1, x0:x1]
    places = places_of((y0, y1, x0, x1), cover.astype(np.bool_), allowed.shape[1])
    if not len(places.inner):
        raise Undrawable("no room")
    weight = cover.reshape(-1)[places.inner] * np.float32(1 / 255)
    return CrackDraw(places, weight, recipe.severity)


def _thin(thickness: int) -> int:
    return (thickness + 1) // 2


def _crack(rng: np.random.Generator, allowed: np.ndarray, pixels: float, params: CrackParams) -> Crack:
    """Trunk and branches of about that many pixels."""
    ratio = params.ratio_low * (params.ratio_high / params.ratio_low) ** rng.random()
    angle = 2 * math.pi * rng.random()
    branches = int(rng.integers(params.branches + 1))
    starts, shares, forks = rng.random((3, branches)).tolist()
    shares = [BRANCH[0] + (BRANCH[1] - BRANCH[0]) * share for share in shares]
    turns = (params.kink * rng.standard_normal(BENDS * (1 + branches))).tolist()
    centre = place(rng, allowed)

    forked = sum(shares)
    longest = LONGEST * min(allowed.shape)
    # Half of the trunk is as thick as it gets; the other half and the branches are half as thick.
    broad = (pixels / longest - SOFT * (1 + forked)) / (0.75 + 0.5 * forked)
    thickness = max(1, round(max(math.sqrt(pixels / ratio) - SOFT, broad)))
    thin = _thin(thickness)
    wide = (thickness + thin) / 2 + SOFT + forked * (thin + SOFT)
    step = min(pixels / wide, longest) / BENDS

    trunk = _walk(0.0, 0.0, angle, step, turns[:BENDS])
    x, y = centre[1] - trunk[BENDS // 2][0], centre[0] - trunk[BENDS // 2][1]
    lines = [[(x + dx, y + dy) for dx, dy, _ in trunk]]
    for number, (start, share, fork) in enumerate(zip(starts, shares, forks, strict=True), 1):
        dx, dy, heading = trunk[int(start * BENDS)]
        fork = 2 * fork - 1
        heading += math.copysign(FORK[0] + (FORK[1] - FORK[0]) * abs(fork), fork)
        own = turns[number * BENDS :][: math.ceil(share * BENDS)]
        lines.append([(px, py) for px, py, _ in _walk(x + dx, y + dy, heading, step, own)])
    return Crack([np.rint(16 * np.array(line)).astype(np.int32) for line in lines], thickness)


def _walk(
    x: float, y: float, heading: float, step: float, turns: list[float]
) -> list[tuple[float, float, float]]:
    """Places and headings of a line whose direction both drifts and jitters: bent from afar, jagged from
    near. It begins at x, y and has a step a turn."""
    found = [(x, y, heading)]
    for turn in turns:
        heading += turn / 2
        x, y = x + step * math.cos(heading + turn), y + step * math.sin(heading + turn)
        found.append((x, y, heading))
    return found


def apply(sources: Sequence[Source], draws: Sequence[CrackDraw], _model: Any) -> list[Edit]:
    return [_apply(source, one) for source, one in zip(sources, draws, strict=True)]


def _apply(source: Source, one: CrackDraw) -> Edit:
    before, weight = source.at(one.places.outer), one.weight[:, None]
    tone = LIGHT if cv2.mean(before.reshape(-1))[0] < DIM else DARK
    room = tone - before

    def cover(strength: float) -> np.ndarray:
        """Up to 1 the crack fades in; beyond it, its soft edges fill up."""
        share = np.float32(strength) * weight
        return before + (share if strength <= 1 else np.minimum(share, 1)) * room

    return solved(source, one.places, before, one.severity, cover, limit=HARD)


GENERATOR = Generator(
    name="crack",
    family="classic",
    summary="a dark, jagged line that branches: cracks, fissures",
    draw=draw,
    apply=apply,
    params=CrackParams,
    defect="crack",
)
