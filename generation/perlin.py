"""A foreign texture within a Perlin-shaped mask (DRAEM, Zavrtanik et al. 2021; core.md 5.1 and 5.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from generation.masks import blobs, feather
from generation.protocol import Box, Donors, Edit, Generator, Params, Source
from generation.textures import KINDS, augment, cut, procedural
from manifests.errors import UsageError
from manifests.schema import Recipe

EDGE = 1  # pixels over which the texture fades in


class PerlinParams(Params):
    """Settings of ``perlin``.

    Attributes:
        texture: ``folder`` (pictures of the texture folder), ``normals`` (other good pictures of the
            source) or ``procedural`` (drawn by code).
        augment: vary a texture's levels by three of DRAEM's augmenters.
    """

    texture: Literal["folder", "normals", "procedural"] = "procedural"
    augment: bool = True


@dataclass(frozen=True)
class PerlinDraw:
    """Attributes: ``texture`` uint8, h×w×C, as large as ``box``; ``opacity`` = 1 − β, its weight."""

    box: Box
    region: np.ndarray
    texture: np.ndarray
    opacity: float


def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> PerlinDraw:
    """A mask of the wanted area and a texture for it. Opacity follows severity, from 0.2 to 1 (the range
    of DRAEM, which draws it uniformly).

    Raises:
        UsageError: the recipe names no donor although its texture setting needs one.
        Undrawable: no room for the mask.
    """
    params = PerlinParams(**recipe.settings())
    box, region = blobs(rng, source.allowed, recipe.area, recipe.count)
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
    return PerlinDraw(box, region, texture, 0.2 + 0.8 * recipe.severity)


def apply(sources: Sequence[Source], draws: Sequence[PerlinDraw], _model: Any) -> list[Edit]:
    return [_apply(source, one) for source, one in zip(sources, draws, strict=True)]


def _apply(source: Source, one: PerlinDraw) -> Edit:
    """I' = I + opacity·soft mask·(A − I)."""
    weight = feather(one.region, EDGE) * np.float32(one.opacity)
    patch = source.crop(one.box)
    texture = one.texture.astype(np.float32) / np.float32(255)
    patch += weight[..., None] * (texture - patch)
    return Edit(one.box, patch, one.region)


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
