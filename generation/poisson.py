"""A patch of another good picture, blended in the gradient domain (NSA, Schlüter et al. 2022; core.md 5.4).

The changed box is a rectangle, so the Poisson equation is solved exactly by two sine transforms instead of
an iteration.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any

import cv2
import numpy as np
from scipy import sparse
from scipy.fft import dstn, idstn, next_fast_len
from scipy.sparse.linalg import splu

from generation.masks import around, feather, place
from generation.protocol import Box, Edit, Generator, Params, Source, Undrawable, places_of, stored
from generation.severity import solved
from manifests.errors import UsageError
from manifests.schema import Recipe
from manifests.searching import Search

LARGEST = 8.0  # most that a blended change is scaled up


class PoissonParams(Params):
    """Settings of ``poisson``.

    Attributes:
        mixed: keep, per pixel step, the stronger of the two gradients ("mixed clone", for textures);
            otherwise the donor's alone ("normal clone").
        resize_low, resize_high: the patch's zoom, drawn from N(1, 0.5) and clipped.
        shade: height of the dome of light or dark that is added, as a share of full scale; 0 for the
            published method. Like content replaced by like shows nothing on a plain surface
            (inference).
        shift: deviation of the patch's place in the donor from its target, as a share of the side.
        published: sizes, number and strength as in the paper, whatever area and severity the recipe asks for:
            half sides of 0.03 + Gamma(2, 0.05) of the picture's, up to ``count`` patches, each further one
            with probability one half, content from anywhere in the donor, rectangles, as blended. Otherwise
            the visible part is an ellipse, and the change is scaled to what the severity asks for.
    """

    mixed: Annotated[bool, Search(choices=(False, True))] = False
    resize_low: float = 0.7
    resize_high: float = 1.3
    shade: Annotated[float, Search(0, 0.5)] = 0.2
    shift: Annotated[float, Search(0, 0.5)] = 0.25
    published: bool = False


@dataclass(frozen=True)
class Clone:
    """One patch: its target, its content (float32 in [0, 1], as large as the target), and the signed height
    of its dome."""

    target: Box
    content: np.ndarray
    shade: float


@dataclass(frozen=True)
class PoissonDraw:
    clones: tuple[Clone, ...]
    severity: float
    published: bool
    mixed: bool
    box: Box
    allowed: np.ndarray


def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> PoissonDraw:
    """Rectangles around allowed places, and for each a piece of the donor from near the same place.

    Raises:
        UsageError: the recipe names no donor.
        Undrawable: the picture is too small for a patch.
    """
    params = PoissonParams.of(recipe)
    if not source.donors:
        raise UsageError(
            f"poisson needs another good picture, but recipe {recipe.sample_id} names no donor: "
            "a source needs at least two good pictures"
        )
    if min(source.allowed.shape) < 4:
        raise Undrawable("no room")
    donor = source.donors[rng.integers(len(source.donors))]
    clones = []
    for target in _targets(rng, recipe, source.allowed, params.published):
        shade = float(rng.choice([-1, 1]) * rng.uniform(0.6, 1)) * params.shade
        clones.append(Clone(target, _piece(rng, donor, target, source, params), shade))
    corners = np.array([clone.target for clone in clones])
    (y0, x0), (y1, x1) = corners[:, [0, 2]].min(axis=0).tolist(), corners[:, [1, 3]].max(axis=0).tolist()
    allowed = source.allowed[y0:y1, x0:x1]
    return PoissonDraw(
        tuple(clones), recipe.severity, params.published, params.mixed, (y0, y1, x0, x1), allowed
    )


def _targets(rng: np.random.Generator, recipe: Recipe, allowed: np.ndarray, published: bool) -> Iterator[Box]:
    if not published:
        shares = rng.uniform(1, 2, recipe.count)
        for share in shares / shares.sum():
            # The visible part is the inner ellipse.
            yield _rectangle(rng, allowed, 4 / math.pi * share * recipe.area * allowed.size)
        return
    for number in range(recipe.count):
        if number and rng.random() < 0.5:
            return
        half = 0.03 + rng.gamma(2, 0.05, 2)
        height, width = (min(max(round(2 * h * n), 4), n) for h, n in zip(half, allowed.shape, strict=True))
        top, left = around(place(rng, allowed), height, width, allowed.shape)
        yield top, top + height, left, left + width


def apply(sources: Sequence[Source], draws: Sequence[PoissonDraw], _model: Any) -> list[Edit]:
    return [_apply(source, one) for source, one in zip(sources, draws, strict=True)]


def _apply(source: Source, one: PoissonDraw) -> Edit:
    before = source.crop(one.box)
    patch = before.copy()
    region = np.zeros(one.allowed.shape, np.bool_)
    for clone in one.clones:
        y0, y1, x0, x1 = clone.target
        part = np.s_[y0 - one.box[0] : y1 - one.box[0], x0 - one.box[2] : x1 - one.box[2]]
        dome = ellipse(y1 - y0, x1 - x0)
        inside = one.allowed[part] & ((dome > 0) | one.published)
        # Flat inside, soft at the ellipse's edge and where the allowed places end.
        weight = feather(one.allowed[part], 2)
        if not one.published:
            weight = weight * np.minimum(4 * dome, 1)
        change = clone_gradients(patch[part], clone.content, one.mixed)
        patch[part] += weight[..., None] * (change + np.float32(clone.shade) * dome[..., None])
        region[part] |= inside
    if one.published:
        return Edit(one.box, np.clip(patch, 0, 1), region)
    places = places_of(one.box, region, source.pixels.shape[1])
    start, change = stored(before, places.inner), stored(patch - before, places.inner)
    return solved(
        source,
        places,
        start,
        one.severity,
        lambda strength: start + np.float32(strength) * change,
        limit=LARGEST,
    )


def clone_gradients(target: np.ndarray, content: np.ndarray, mixed: bool) -> np.ndarray:
    """What to add to ``target`` so that it gets ``content``'s gradients but keeps its own border pixels.

    Solves Δg = div(v − ∇target) on the inner pixels with g = 0 on the border, v the gradient of ``content``
    or, if ``mixed``, at each step between two pixels the larger of the two gradients.

    Args:
        target, content: float32, h×w×C, h and w at least 3.

    Returns:
        float32, h×w×C; zero on the border.
    """
    divergence = np.zeros_like(target[1:-1, 1:-1])
    for axis in (0, 1):
        own, new = np.diff(target, axis=axis), np.diff(content, axis=axis)
        step = new - own
        if mixed:
            step[np.abs(own) >= np.abs(new)] = 0
        step = step[:, 1:-1] if axis == 0 else step[1:-1]
        divergence += np.diff(step, axis=axis)
    change = np.zeros_like(target)
    spectrum = dstn(divergence, type=1, axes=(0, 1)) / _eigenvalues(*divergence.shape[:2])[..., None]
    change[1:-1, 1:-1] = idstn(spectrum, type=1, axes=(0, 1))
    return change


def blend_gradients(change: np.ndarray, region: np.ndarray) -> np.ndarray:
    """What keeps the gradients of ``change`` within a region of any shape and is 0 outside it.

    Solves Δf = Δ(change) in the region with f = 0 around it (Pérez et al. 2003, equation 4, for the
    difference of source and target). Nothing is known beyond the border of the picture: no gradient crosses
    it.

    Args:
        change: float32, h×w×C.
        region: bool, h×w.

    Returns:
        float32, h×w×C.
    """
    blended = np.zeros_like(change)
    places = np.flatnonzero(region)
    if not len(places):
        return blended
    number = np.full(region.shape, -1)
    number[region] = np.arange(len(places))
    diagonal = np.zeros(len(places))
    wanted = np.zeros((len(places), change.shape[2]))
    rows, columns = [], []
    for axis in (0, 1):
        low, high = (np.take(number, range(start, region.shape[axis] - 1 + start), axis) for start in (0, 1))
        step = np.diff(change, axis=axis).astype(np.float64)
        for here, there, sign in ((low, high, -1.0), (high, low, 1.0)):
            inside = here >= 0
            np.add.at(diagonal, here[inside], 1)
            np.add.at(wanted, here[inside], sign * step[inside])
            both = inside & (there >= 0)
            rows.append(here[both])
            columns.append(there[both])
    row, column = np.concatenate(rows), np.concatenate(columns)
    # A region that fills the picture has no border to meet: a trace of the identity keeps the system regular.
    system = sparse.diags(diagonal + 1e-9) - sparse.csc_matrix(
        (np.ones(len(row)), (row, column)), [len(places)] * 2
    )
    solved = splu(system.tocsc()).solve(wanted)
    blended.reshape(-1, change.shape[2])[places] = solved
    return blended


def ellipse(height: int, width: int) -> np.ndarray:
    """1 − ρ² in the ellipse that fills the rectangle, 0 outside: float32, height×width."""
    y = (np.arange(height, dtype=np.float32) - np.float32((height - 1) / 2)) / np.float32(height / 2)
    x = (np.arange(width, dtype=np.float32) - np.float32((width - 1) / 2)) / np.float32(width / 2)
    return np.maximum(1 - (y * y)[:, None] - (x * x)[None, :], 0)


@lru_cache(maxsize=256)
def _eigenvalues(height: int, width: int) -> np.ndarray:
    """Of the five-point Laplacian with a border of zeros, in the basis of the sine transform (type 1)."""
    y = 2 * np.cos(np.pi * np.arange(1, height + 1) / (height + 1)) - 2
    x = 2 * np.cos(np.pi * np.arange(1, width + 1) / (width + 1)) - 2
    return (y[:, None] + x[None, :]).astype(np.float32)


def _rectangle(rng: np.random.Generator, allowed: np.ndarray, pixels: float) -> Box:
    """Around an allowed place, within the picture, of a size that the sine transform likes."""
    ratio = math.sqrt(math.exp(rng.uniform(-math.log(2), math.log(2))))
    height = _fast(math.sqrt(pixels) * ratio, allowed.shape[0])
    width = _fast(pixels / height, allowed.shape[1])
    top, left = around(place(rng, allowed), height, width, allowed.shape)
    return top, top + height, left, left + width


def _fast(side: float, limit: int) -> int:
    """The next side that transforms fast: n pixels have n − 2 inner ones, an FFT of 2(n − 1)."""
    wanted = next_fast_len(max(round(side), 4) - 1, real=True) + 1
    return min(wanted, limit)


def _piece(
    rng: np.random.Generator, donor: np.ndarray, target: Box, source: Source, params: PoissonParams
) -> np.ndarray:
    height, width = target[1] - target[0], target[3] - target[2]
    zoom = float(np.clip(rng.normal(1, 0.5), params.resize_low, params.resize_high))
    tall = int(np.clip(round(height / zoom), 1, donor.shape[0]))
    wide = int(np.clip(round(width / zoom), 1, donor.shape[1]))
    shift = (0, 0) if params.published else rng.normal(0, params.shift, 2)
    corner: list[int] = []
    for axis, length in enumerate((tall, wide)):
        side, full = donor.shape[axis], source.pixels.shape[axis]
        near = (target[2 * axis] / full + shift[axis]) * side
        most = side - length
        corner.append(int(rng.integers(most + 1)) if params.published else int(np.clip(round(near), 0, most)))
    piece = donor[corner[0] : corner[0] + tall, corner[1] : corner[1] + wide]
    if (tall, wide) != (height, width):
        piece = cv2.resize(piece, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)
    return piece.reshape(height, width, -1).astype(np.float32) / np.float32(source.levels)


GENERATOR = Generator(
    name="poisson",
    family="classic",
    summary="a patch of another good picture, blended without a seam: deformed, missing or doubled parts",
    draw=draw,
    apply=apply,
    params=PoissonParams,
    donors="normal",
    defect="deformation",
)
