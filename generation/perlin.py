"""A foreign texture within a Perlin-shaped mask (DRAEM, Zavrtanik et al. 2021; core.md 5.1 and 5.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from generation.masks import blob_parts, feather, joined, threshold, union
from generation.protocol import Donors, Edit, Generator, Params, Places, Source, places_at, places_of
from generation.severity import solved
from generation.textures import KINDS, augment, coloured, cut
from manifests.errors import UsageError
from manifests.schema import Recipe
from manifests.searching import Search

EDGE = 1  # pixels over which the texture fades in


class PerlinParams(Params):
    """Settings of ``perlin``.

    Attributes:
        texture: ``folder`` (pictures of the texture folder), ``normals`` (other good pictures of the
            source) or ``procedural`` (drawn by code).
        augment: vary a texture's levels by three of DRAEM's augmenters.
        mask: ``area``, a blob of the wanted size with a soft edge of a pixel; ``threshold``, wherever Perlin
            noise over the whole picture exceeds 0.5, as published, whatever its size, its edge hard.
        lattice: least and largest exponent of the threshold mask's cells a side.
        rotation: of the threshold mask, at most, in degrees.
        opacity: range from which the texture's weight is drawn, as published; null: solved for each sample,
            so that the change is what the severity asks for.
    """

    texture: Annotated[
        Literal["folder", "normals", "procedural"], Search(choices=("normals", "procedural"))
    ] = "procedural"
    augment: bool = True
    mask: Literal["area", "threshold"] = "area"
    lattice: tuple[int, int] = (0, 5)
    rotation: float = Field(90.0, ge=0, le=180)
    opacity: tuple[float, float] | None = None


@dataclass(frozen=True)
class PerlinDraw:
    """Attributes: ``weight`` float32 in [0, 1], N, and ``texture`` float32 in [0, 1], N×C, at the N places;
    ``opacity`` = 1 − β, its weight; None if it is solved for."""

    places: Places
    weight: np.ndarray
    texture: np.ndarray
    severity: float
    opacity: float | None


def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> PerlinDraw:
    """A mask and a texture for it. Every blob shows the texture's beginning.

    Raises:
        UsageError: the recipe names no donor although its texture setting needs one.
        Undrawable: no room for the mask.
    """
    params = PerlinParams.of(recipe)
    shape = source.allowed.shape
    if params.mask == "area":
        parts = [union([part], shape) for part in blob_parts(rng, source.allowed, recipe.area, recipe.count)]
    else:
        parts = [threshold(rng, source.allowed, params.lattice, params.rotation)]
    height, width = (max(region.shape[axis] for _, region in parts) for axis in (0, 1))
    texture = _texture(rng, recipe, source, params, height, width)

    each = [places_of(box, region, shape[1]) for box, region in parts]
    outer = joined([one.outer for one in each])
    weight, shown = np.zeros(len(outer), np.float32), np.zeros((len(outer), *texture.shape[2:]), np.float32)
    edge = EDGE if params.mask == "area" else 0
    for one in each:
        at = np.searchsorted(outer, one.outer) if len(each) > 1 else slice(None)
        soft = feather(one.region, edge).reshape(-1)[one.inner]
        weight[at] = np.maximum(weight[at], soft)  # two blobs may touch
        tall, wide = one.region.shape
        shown[at] = texture[:tall, :wide].reshape(tall * wide, *texture.shape[2:]).take(one.inner, axis=0)
    if params.texture == "procedural":
        shown = coloured(rng, shown, source.pixels.shape[2])
    else:
        shown *= np.float32(1 / 255)
    opacity = None if params.opacity is None else float(rng.uniform(*params.opacity))
    return PerlinDraw(places_at(outer, shape[1]), weight, shown, recipe.severity, opacity)


def _texture(
    rng: np.random.Generator, recipe: Recipe, source: Source, params: PerlinParams, height: int, width: int
) -> np.ndarray:
    """A piece of a donor, uint8, height×width×C; or a drawn pattern, in [0, 1], height×width."""
    if params.texture == "procedural":
        return KINDS[list(KINDS)[rng.integers(len(KINDS))]](rng, height, width)
    if not source.donors:
        raise UsageError(
            f"perlin with texture: {params.texture} needs a donor picture, recipe {recipe.sample_id} names "
            "none: set generation.textures to a folder of pictures, or texture to 'procedural'"
        )
    texture = cut(rng, source.donors[rng.integers(len(source.donors))], height, width)
    if params.augment:
        texture = augment(rng, texture)
    return texture


def apply(sources: Sequence[Source], draws: Sequence[PerlinDraw], _model: Any) -> list[Edit]:
    return [_apply(source, one) for source, one in zip(sources, draws, strict=True)]


def _apply(source: Source, one: PerlinDraw) -> Edit:
    """I' = I + opacity·soft mask·(A − I)."""
    before = source.at(one.places.outer)
    change = one.texture - before
    soft = np.flatnonzero(one.weight < 1)
    change[soft] *= one.weight[soft, None]
    if one.opacity is not None:
        return Edit(one.places.box, before + np.float32(one.opacity) * change, one.places.region)
    return solved(
        source,
        one.places,
        before,
        one.severity,
        lambda opacity: before + np.float32(opacity) * change,
        limit=1.0,
    )


def donors(params: PerlinParams) -> Donors:
    kinds: dict[str, Donors] = {"folder": "texture", "normals": "normal", "procedural": "none"}
    return kinds[params.texture]


GENERATOR = Generator(
    name="perlin",
    family="classic",
    summary="a foreign texture in a Perlin-shaped region: stains, deposits, worn coatings",
    draw=draw,
    apply=apply,
    params=PerlinParams,
    donors=donors,
    defect="stain",
)
