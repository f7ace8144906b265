"""A foreign texture within a Perlin-shaped mask (DRAEM, Zavrtanik et al. 2021; core.md 5.1 and 5.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from generation.masks import blobs, feather, threshold
from generation.protocol import Box, Donors, Edit, Generator, Params, Source
from generation.severity import solved
from generation.textures import KINDS, augment, cut, procedural
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
    """Attributes: ``texture`` uint8, h×w×C, as large as ``box``; ``opacity`` = 1 − β, its weight; None if
    it is solved for."""

    box: Box
    region: np.ndarray
    texture: np.ndarray
    severity: float
    opacity: float | None
    edge: int


def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> PerlinDraw:
    """A mask and a texture for it.

    Raises:
        UsageError: the recipe names no donor although its texture setting needs one.
        Undrawable: no room for the mask.
    """
    params = PerlinParams(**recipe.settings())
    if params.mask == "area":
        box, region = blobs(rng, source.allowed, recipe.area, recipe.count)
    else:
        box, region = threshold(rng, source.allowed, params.lattice, params.rotation)
    height, width = region.shape
    channels = source.pixels.shape[2]
    if params.texture == "procedural":
        kind = list(KINDS)[rng.integers(len(KINDS))]
        texture = np.rint(procedural(kind, rng, height, width, channels) * 255).astype(np.uint8)
    elif not source.donors:
        raise UsageError(
            f"perlin with texture: {params.texture} needs a donor picture, recipe {recipe.sample_id} names "
            "none: set generation.textures to a folder of pictures, or texture to 'procedural'"
        )
    else:
        texture = cut(rng, source.donors[rng.integers(len(source.donors))], height, width)
    if params.augment and params.texture != "procedural":
        texture = augment(rng, texture)
    opacity = None if params.opacity is None else float(rng.uniform(*params.opacity))
    edge = EDGE if params.mask == "area" else 0
    return PerlinDraw(box, region, texture, recipe.severity, opacity, edge)


def apply(sources: Sequence[Source], draws: Sequence[PerlinDraw], _model: Any) -> list[Edit]:
    return [_apply(source, one) for source, one in zip(sources, draws, strict=True)]


def _apply(source: Source, one: PerlinDraw) -> Edit:
    """I' = I + opacity·soft mask·(A − I)."""
    weight = feather(one.region, one.edge)[..., None]
    before = source.crop(one.box)
    change = weight * (one.texture.astype(np.float32) / np.float32(255) - before)
    if one.opacity is not None:
        return Edit(one.box, before + np.float32(one.opacity) * change, one.region)
    return solved(
        source,
        one.box,
        one.region,
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
