"""Missing material: a piece broken off the part, and what lies behind it shows.

No paper of core.md draws it; the shapes and every number here are inference, for chips, bites and gaps at the
edge of a part, and for holes in a material that fills the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import cv2
import numpy as np
from pydantic import Field

from generation.masks import SMALLEST, foreground, place
from generation.protocol import Edit, Generator, Params, Places, Source, Undrawable, places_at
from generation.severity import solved
from manifests.schema import Recipe
from manifests.searching import Search

TRIES = 12  # places and shapes tried for one piece
CORNERS = 28  # of an outline
ROUGH = 0.22  # deviation of an outline's radius, as a share of it
JAG = 0.1  # deviation of a gap's sides, as a share of its width, at the coarsest scale
SEEN = 0.5  # of how much the part differs from the ground: what a piece's loss changes at least
LOOKED_AT = 1024  # pixels of the part that tell that difference
LEAN = 0.6  # radians between a gap and the shortest way into the part, at most
SHIFTS = 48  # places of the ground that are tried for what shows at one piece, the nearest first
BLOCKS = (16, 4, 1)  # pixels
DARK, LIGHT = 0.05, 0.9  # tones behind a material that fills the picture
SHADE = (0.0, 0.5)  # how much darker the ground is where the part stands over it
FALL = 3.0  # pixels over which that shadow fades


class ChipParams(Params):
    """Settings of ``chip``.

    Attributes:
        gaps: share of the pieces that run into the part like a wedge; the others are bites, half round.
        ratio_low, ratio_high: depth over width of a gap, drawn log-uniformly.
    """

    gaps: Annotated[float, Search(0, 1), Field(ge=0, le=1)] = 0.5
    ratio_low: Annotated[float, Search(1, 3, log=True), Field(gt=0)] = 1.5
    ratio_high: Annotated[float, Search(3, 10, log=True), Field(gt=0)] = 5.0


@dataclass(frozen=True)
class ChipDraw:
    """Attributes: ``ground`` float32 N×C, what shows at each of the places; ``weight`` float32 in (0, 1], N,
    soft where the part goes on."""

    places: Places
    ground: np.ndarray
    weight: np.ndarray
    severity: float


def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> ChipDraw:
    """Pieces that together have the wanted area, each at an edge of the part or, where the picture shows no
    ground beside it, anywhere."""
    params = ChipParams.of(recipe)
    part = foreground(source.pixels) if source.find_part is None else source.find_part()
    allowed = part & source.allowed
    if not allowed.any():
        raise Undrawable("no room")
    rim = _rim(part) & allowed
    shares = rng.uniform(1, 3, recipe.count)
    sizes = np.maximum(shares / shares.sum() * recipe.area * part.size, SMALLEST).tolist()
    free = cv2.erode((~part).view(np.uint8), np.ones((3, 3), np.uint8))
    least = SEEN * np.array(_differences(source, part, free))
    found = [
        _missing(rng, source, partial(_piece, rng, part, allowed, rim, size, params), free, least)
        for size in sizes
    ]
    pieces, ground = [piece for piece, _ in found], np.concatenate([shown for _, shown in found])
    outer, first = np.unique(np.concatenate(pieces), return_index=True)
    places = places_at(outer, part.shape[1])
    away = _from_the_part(part, places)
    shade = np.float32(rng.uniform(*SHADE)) * np.exp(-away / np.float32(FALL))
    return ChipDraw(places, ground[first] * (1 - shade[:, None]), np.minimum(away / 2, 1), recipe.severity)


def _rim(part: np.ndarray) -> np.ndarray:
    """The part's outermost pixels, but for those at the picture's border: bool, H×W."""
    inner = cv2.erode(part.view(np.uint8), np.ones((3, 3), np.uint8), borderType=cv2.BORDER_REPLICATE)
    return part & (inner == 0)


def _differences(source: Source, part: np.ndarray, free: np.ndarray) -> tuple[float, float]:
    """How much the part differs from the ground, and from the ground in a shadow: of tones in [0, 1]; 0
    without ground.

    Those of the upper quartile, for what is taken for the part may hold shadows and ground.

    Args:
        free: uint8, H×W, where ground lies.
    """
    spots = np.flatnonzero(free)
    if len(spots) == 0:
        return 0.0, 0.0
    own = np.flatnonzero(part)
    ground, tones = (source.at(at[:: -(-len(at) // LOOKED_AT)]) for at in (spots, own))
    middle = np.median(ground, axis=0)[None]
    plain, shaded = (np.abs(tones - one).max(axis=1) for one in (middle, _shaded(middle, tones)))
    return float(np.quantile(plain, 0.75)), float(np.quantile(shaded, 0.75))


def _shaded(ground: np.ndarray, tones: np.ndarray) -> np.ndarray:
    """The ground, as dark as comes nearest to the tones: float32, N×C. A shadow keeps the ground's hue."""
    light = (ground * tones).sum(axis=1) / np.maximum((ground * ground).sum(axis=1), 1e-6)
    return ground * np.clip(light, 0, 1)[:, None].astype(np.float32)


def _missing(
    rng: np.random.Generator,
    source: Source,
    drawn: Callable[[], np.ndarray],
    free: np.ndarray,
    least: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """A piece, as flat indices, N, and the ground in its place, float32 N×C, whose loss is seen: where a
    shadow passes for the part, there is nothing to lose.

    Args:
        drawn: gives one piece, uint8, H×W. free: uint8, H×W, where ground lies. least: the mean change, and
            that from the ground in a shadow, of tones in [0, 1].

    Raises:
        Undrawable: no room, or nowhere is it seen.
    """
    for _ in range(TRIES):
        piece = np.flatnonzero(drawn())
        ground = _ground(rng, source, free, piece)
        tones = source.at(piece)
        changes = (np.abs(tones - one).max(axis=1).mean() for one in (ground, _shaded(ground, tones)))
        if all(change >= wanted for change, wanted in zip(changes, least, strict=True)):
            return piece, ground
    raise Undrawable("not seen")


def _piece(
    rng: np.random.Generator,
    part: np.ndarray,
    allowed: np.ndarray,
    rim: np.ndarray,
    size: float,
    params: ChipParams,
) -> np.ndarray:
    """What of the allowed places one piece takes: uint8, H×W.

    Raises:
        Undrawable: no room.
    """
    edge = bool(rim.any())
    for _ in range(TRIES):
        y, x = place(rng, rim if edge else allowed)
        if edge and rng.random() < params.gaps:
            outline = _gap(rng, _inwards(part, y, x), size, params)
        else:
            outline = _bite(rng, 2 * size if edge else size)
        drawn = np.zeros(part.shape, np.uint8)
        corners = np.rint(16 * (outline + np.array([x, y]))).astype(np.int32)
        cv2.fillPoly(drawn, [corners], 1, cv2.LINE_8, 4)
        drawn &= allowed.view(np.uint8)
        if size / 2 <= np.count_nonzero(drawn) <= 2 * size:
            return drawn
    raise Undrawable("no room")


def _bite(rng: np.random.Generator, size: float) -> np.ndarray:
    """A rough, round outline of about that area around 0: x and y, CORNERS×2."""
    angles = np.linspace(0, 2 * math.pi, CORNERS, endpoint=False)
    waves = rng.standard_normal((2, 3)) / np.array([1, 2, 3])
    phases = np.outer(np.arange(1, 4), angles)
    rough = 1 + ROUGH * (waves[0] @ np.cos(phases) + waves[1] @ np.sin(phases))
    rough += ROUGH / 3 * rng.standard_normal(CORNERS)
    radius = math.sqrt(size / math.pi) * np.maximum(rough, 0.3)
    return radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _gap(rng: np.random.Generator, heading: float, size: float, params: ChipParams) -> np.ndarray:
    """A wedge from 0 into the part, jagged on both sides: x and y, N×2."""
    ratio = params.ratio_low * (params.ratio_high / params.ratio_low) ** rng.random()
    width = math.sqrt(2 * size / ratio)
    depth = ratio * width
    heading += rng.uniform(-LEAN, LEAN)
    along = np.linspace(-0.3, 1, CORNERS) * depth  # from outside the part on
    bend = rng.uniform(-0.5, 0.5) * width * (along / depth) ** 2
    half = width / 2 * np.clip(1 - along / depth, 0.04, 1)
    left = np.stack([along, bend - half + width * _jags(rng)], axis=1)
    right = np.stack([along, bend + half + width * _jags(rng)], axis=1)[::-1]
    sine, cosine = math.sin(heading), math.cos(heading)
    return np.concatenate([left, right]) @ np.array([[cosine, sine], [-sine, cosine]])


def _jags(rng: np.random.Generator) -> np.ndarray:
    """How far a side of width 1 runs beside its line, CORNERS: rough at every scale, as what breaks is."""
    places = np.linspace(0, 1, CORNERS)
    found = np.zeros(CORNERS)
    for k in range(3):
        count = 6 * 2**k
        found += JAG / 2**k * np.interp(places, np.linspace(0, 1, count), rng.standard_normal(count))
    return found


def _inwards(part: np.ndarray, y: int, x: int) -> float:
    """The direction from a pixel of the rim to the middle of what is around it of the part, in radians."""
    reach = max(3, min(part.shape) // 16)
    top, left = max(y - reach, 0), max(x - reach, 0)
    rows, columns = np.nonzero(part[top : y + reach + 1, left : x + reach + 1])
    return math.atan2(rows.mean() + top - y, columns.mean() + left - x)


def _ground(rng: np.random.Generator, source: Source, free: np.ndarray, piece: np.ndarray) -> np.ndarray:
    """What shows where a piece is missing, float32, N×C: the ground from elsewhere, or a tone where there is
    none. It is moved here from near by as a whole or, where so much does not lie free, block by block.

    Args:
        free: uint8, H×W, where ground lies. piece: flat indices, N, ascending.
    """
    spots = np.flatnonzero(free)
    if len(spots) == 0:
        tone = DARK if rng.random() < float(source.at(piece).mean()) else LIGHT
        return np.full((len(piece), source.pixels.shape[2]), tone, np.float32)
    return source.at(_moved(rng, free, spots, piece, BLOCKS))


def _moved(
    rng: np.random.Generator, free: np.ndarray, spots: np.ndarray, piece: np.ndarray, blocks: Sequence[int]
) -> np.ndarray:
    """Where the ground of each place of a piece is taken from: flat indices, N.

    Args:
        free: uint8, H×W, where ground lies; ``spots`` are its flat indices.
        blocks: sides of the blocks that it is cut into if it does not fit anywhere as a whole, one after the
            other; the last is one pixel, which always fits.
    """
    height, width = free.shape
    rows, columns = np.divmod(piece, width)
    chosen = np.divmod(rng.choice(spots, SHIFTS), width)
    dy, dx = chosen[0] - rows[len(rows) // 2], chosen[1] - columns[len(columns) // 2]
    for k in np.argsort(dy**2 + dx**2, kind="stable"):
        y, x = rows + dy[k], columns + dx[k]
        inside = y[0] >= 0 and y[-1] < height and x.min() >= 0 and x.max() < width
        if inside and free[y, x].all():
            return y * width + x
    found = np.empty_like(piece)
    block = (rows // blocks[0]) * width + columns // blocks[0]
    for one in np.unique(block):
        own = block == one
        found[own] = _moved(rng, free, spots, piece[own], blocks[1:])
    return found


def _from_the_part(part: np.ndarray, places: Places) -> np.ndarray:
    """How far each place is from what stays of the part, in pixels: float32, N."""
    y0, y1, x0, x1 = places.box
    stays = np.pad(part, 1)[y0 : y1 + 2, x0 : x1 + 2]
    stays[1:-1, 1:-1] &= ~places.region
    away = cv2.distanceTransform((~stays).view(np.uint8), cv2.DIST_L2, 3)
    return away[1:-1, 1:-1].reshape(-1)[places.inner]


def apply(sources: Sequence[Source], draws: Sequence[ChipDraw], _model: Any) -> list[Edit]:
    return [_apply(source, one) for source, one in zip(sources, draws, strict=True)]


def _apply(source: Source, one: ChipDraw) -> Edit:
    before = source.at(one.places.outer)
    change = one.weight[:, None] * (one.ground - before)

    def gone(strength: float) -> np.ndarray:
        """At 1 the ground as it is; below it shimmers through, as through a thin rest."""
        return before + np.float32(strength) * change

    return solved(source, one.places, before, one.severity, gone, limit=1.0, whole=True)


GENERATOR = Generator(
    name="chip",
    family="classic",
    summary="a piece is missing and the ground shows: chips, broken edges, gaps, holes",
    draw=draw,
    apply=apply,
    params=ChipParams,
    defect="chip",
)
