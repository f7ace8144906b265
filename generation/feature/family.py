"""The generators of the feature family: each an operator on a backbone's features, within a mask of tokens.

A severity is a separability: at 0 a linear probe on the backbone's features of normal surfaces tells 60 % of
the changed tokens, at 1 it tells 80 % (core.md 5.7). A token that was moved is as clean as any; it is told by
how it differs from those around it (:func:`generation.feature.statistics.beside_others`), and its strength is
the weight with which it takes the other's place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import cv2
import numpy as np
from pydantic import Field

from generation.masks import Shape, shaped
from generation.protocol import Donors, FeatureEdit, Generator, Params, Source
from generation.textures import textured
from manifests.errors import UsageError
from manifests.pictures import eight_bit
from manifests.schema import Recipe
from manifests.searching import Search

if TYPE_CHECKING:  # torch is imported by load alone, so that planning does not wait for it
    from generation.backbones import Backbone
    from generation.feature.statistics import Perturb, Statistics


class FeatureParams(Params):
    """Settings of every feature generator.

    Attributes:
        backbone, layers: as :func:`generation.backbones.load_backbone` takes them.
        size: side in pixels to which pictures are brought. Where a configuration names none of the three,
            they are those that its detector looks at.
        shape: of the mask, as of the frequency family.
        strength: of the operator, the same for all samples; null: by the severity.
    """

    backbone: str = "tf_efficientnet_lite0"
    layers: tuple[str, ...] | None = None
    size: int = Field(256, ge=32)
    shape: Annotated[Shape, Search(choices=("blob", "stroke", "ellipse", "rectangle"))] = "blob"
    strength: Annotated[float | None, Search(0.1, 4, log=True)] = Field(None, ge=0)


class MovedParams(FeatureParams):
    """Settings of ``feature-copy`` and ``feature-shuffle``.

    Attributes:
        attended: of a place twice as large, change the half that stands out most: where the class token of
            a vision transformer looks (of timm's own class), or else what is least like the picture's mean.
    """

    attended: Annotated[bool, Search(choices=(True, False))] = True


class AscentParams(FeatureParams):
    """Settings of ``feature-ascent``.

    Attributes:
        projection: of what to keep a distance: the token itself (``manifold``), or the centre of the normal
            tokens (``hypersphere``).
    """

    projection: Annotated[Literal["manifold", "hypersphere"], Search(choices=("manifold", "hypersphere"))] = (
        "manifold"
    )


@dataclass(frozen=True)
class Operator:
    """Attributes: ``name`` among the stored strengths; ``bind(statistics, params, other)`` an operator of
    :mod:`generation.feature.operators` with all but features, mask, strength and random numbers given;
    ``limit`` its largest strength; ``moves`` whether it puts clean tokens elsewhere; ``other`` the second
    picture whose features it needs, if any: one of another category, or the same with a texture over it."""

    name: str
    bind: Callable[[Statistics, Any, Any], Perturb]
    limit: float
    moves: bool = False
    other: Literal["foreign", "textured"] | None = None


@dataclass(frozen=True)
class Model:
    """Attributes: ``range`` the strengths of severity 0 and 1."""

    backbone: Backbone
    size: int
    statistics: Statistics
    range: tuple[float, float]


@dataclass(frozen=True)
class FeatureDraw:
    """Attributes: ``region`` bool, H×W of the source; ``seed`` of the noise, whose shape only the backbone
    knows; ``other`` H×W×C as the source's pixels or None, the second picture."""

    region: np.ndarray
    severity: float
    seed: int
    params: Any
    other: np.ndarray | None


def load(params: Mapping[str, Any], device: str, operator: Operator, kind: type[FeatureParams]) -> Model:
    """The frozen backbone, ready on ``device``, its statistics, and the operator's strengths on them."""
    from generation.feature.statistics import statistics, stored, strengths_key

    settings = kind(**params)
    backbone = _backbone(settings.backbone, settings.layers, device)
    known = statistics(backbone)
    strengths = stored(backbone).get(strengths_key(variant(operator, settings)))
    if strengths is not None:
        found = (float(strengths[0]), float(strengths[1]))
    else:
        found = calibrated(backbone, known, operator, settings)
    return Model(backbone, settings.size, known, found)


@lru_cache(maxsize=2)
def _backbone(name: str, layers: tuple[str, ...] | None, device: str) -> Backbone:
    """Once a process: models differ in their settings, one for each point that a search tries."""
    from generation.backbones import load_backbone

    return load_backbone(name, layers, device)


def calibrated(
    backbone: Backbone, known: Statistics, operator: Operator, params: FeatureParams
) -> tuple[float, float]:
    """An operator's strengths at severity 0 and 1, found on the backbone's features (seconds)."""
    from generation.feature.statistics import normal_features, separable

    features, other, mask = normal_features(backbone), None, None
    if operator.other == "foreign":
        other = features.roll(1, 0)  # the next one is of another kind of surface
    elif operator.other == "textured":
        other, mask = _textured_features(backbone)
    perturb = operator.bind(known, params, other)
    return separable(features, known, perturb, operator.limit, beside=operator.moves, mask=mask)


def _textured_features(backbone: Backbone) -> tuple[Any, Any]:
    """Features of the drawn surfaces with textures over a quarter of each, in places as they are drawn for
    samples, and the tokens there: N×C×h×w and bool N×h×w."""
    import torch

    from generation.feature.statistics import features_of, normal_pictures

    changed, regions = [], []
    for number, picture in enumerate(normal_pictures(backbone)):
        rng = np.random.default_rng((number, 1))
        region = _region(rng, np.ones(picture.shape[:2], np.bool_), 0.25, 4, "blob")
        changed.append(textured(picture, region, rng))
        regions.append(region)
    features = features_of(backbone, changed)
    masks = [tokens(region, *features.shape[2:]) for region in regions]
    return features, torch.from_numpy(np.stack(masks))


def variant(operator: Operator, params: FeatureParams) -> str:
    """Under which name an operator's strengths are stored: its own, and the projection that changes them."""
    return f"{operator.name} {params.projection}" if isinstance(params, AscentParams) else operator.name


def draw(
    recipe: Recipe, source: Source, rng: np.random.Generator, operator: Operator, kind: type[FeatureParams]
) -> FeatureDraw:
    """A mask and a seed.

    Raises:
        UsageError: the recipe names no donor although the operator needs one.
        Undrawable: no room for the mask.
    """
    params = kind.of(recipe)
    if operator.other == "foreign" and not source.donors:
        raise UsageError(
            f"{recipe.generator} needs a picture of another category, but recipe {recipe.sample_id} names "
            "none: add a category to the source, or set its share to 0"
        )
    wider = 2 if isinstance(params, MovedParams) and params.attended else 1
    area = min(wider * recipe.area, 0.9)
    region = _region(rng, source.allowed, area, recipe.count, params.shape)
    other = None
    if operator.other == "foreign":
        other = source.donors[rng.integers(len(source.donors))]
    elif operator.other == "textured":
        other = textured(source.pixels, region, rng)
    return FeatureDraw(region, recipe.severity, int(rng.integers(2**63)), params, other)


def _region(
    rng: np.random.Generator, allowed: np.ndarray, area: float, count: int, shape: Shape
) -> np.ndarray:
    """A mask of the places that are allowed: bool, H×W."""
    (y0, y1, x0, x1), part = shaped(rng, allowed, area, count, shape)
    region = np.zeros(allowed.shape, np.bool_)
    region[y0:y1, x0:x1] = part
    return region


def apply(
    sources: Sequence[Source], draws: Sequence[FeatureDraw], model: Model, operator: Operator
) -> list[FeatureEdit]:
    """The features of all pictures in one pass of the backbone, each changed in its mask."""
    looked = any(isinstance(one.params, MovedParams) and one.params.attended for one in draws)
    features, attention = _features([source.pixels for source in sources], model, looked)
    seconds = [one.other for one in draws if one.other is not None]
    others = _features(seconds, model, attention=False)[0] if seconds else None
    edits = []
    for at, one in enumerate(draws):
        own = slice(at, at + 1)
        looks = None if attention is None else attention[own]
        other = None if others is None else others[own]
        edits.append(_apply(features[own], looks, one, other, model, operator))
    return edits


def _features(pictures: Sequence[np.ndarray], model: Model, attention: bool) -> tuple[Any, Any]:
    """Features and, if it is asked for and there is one, the class token's attention, on the CPU."""
    from generation.backbones import to_batch

    batch = to_batch([eight_bit(picture) for picture in pictures], model.size)
    if not attention:
        return model.backbone.features(batch).cpu(), None
    features, looks = model.backbone.features_and_attention(batch)
    return features.cpu(), None if looks is None else looks.cpu()


def _apply(
    features: Any, attention: Any, one: FeatureDraw, other: Any, model: Model, operator: Operator
) -> FeatureEdit:
    import torch

    from generation.feature.operators import attended

    random = torch.Generator().manual_seed(one.seed)
    mask = torch.from_numpy(tokens(one.region, *features.shape[2:]))[None]
    if isinstance(one.params, MovedParams) and one.params.attended:
        count = max(2, int(mask.sum()) // 2)  # one alone has no other to go to
        mask = attended(features, mask, count, attention, random)
    low, high = model.range
    strength = low * (high / low) ** one.severity if one.params.strength is None else one.params.strength
    perturb = operator.bind(model.statistics, one.params, other)
    changed = perturb(features, mask, strength, random)[0].numpy().astype(np.float16)
    clean, where = features[0].numpy().astype(np.float16), mask[0].numpy()
    measures = {"solved_strength": strength} if one.params.strength is None else {}
    if one.params.shape == "whole":
        measures["wanted_area"] = float(one.region.mean())
    backbone = model.backbone
    return FeatureEdit(
        np.where(where, changed, clean), where, clean, backbone.layers, backbone.fingerprint, measures
    )


def tokens(region: np.ndarray, height: int, width: int) -> np.ndarray:
    """A region at feature resolution. Of each connected part, so that no small spot and no thin line is
    lost, as many tokens as its area is worth, and at least one: those that it covers most.

    Args:
        region: bool, H×W; not empty.

    Returns:
        bool, height×width.
    """
    count, labels = cv2.connectedComponents(region.view(np.uint8), connectivity=8)
    y, x = np.nonzero(region)
    token = y * height // region.shape[0] * width + x * width // region.shape[1]
    places = height * width
    part = np.bincount((labels[y, x] - 1) * places + token, minlength=(count - 1) * places)
    chosen = np.zeros(places, np.bool_)
    for covered in part.reshape(-1, places):
        most = max(1, round(covered.sum() * places / region.size))
        chosen[np.argsort(-covered, kind="stable")[:most]] = True
    return chosen.reshape(height, width)


# -- the operators with what they need to know -------------------------------------------------------------


def _gaussian(known: Statistics, _params: FeatureParams, _other: Any) -> Perturb:
    from generation.feature.operators import gaussian

    return partial(gaussian, deviation=known.deviation)


def _jitter(_known: Statistics, _params: FeatureParams, _other: Any) -> Perturb:
    from generation.feature.operators import jitter

    return jitter


def _ascent(known: Statistics, params: AscentParams, _other: Any) -> Perturb:
    from generation.feature.operators import ascent

    return partial(
        ascent,
        deviation=known.deviation,
        centre=known.centre,
        gradient=known.gradient,
        manifold=params.projection == "manifold",
    )


def _local(known: Statistics, _params: FeatureParams, other: Any) -> Perturb:
    from generation.feature.operators import local

    return partial(local, deviation=known.deviation, centre=known.centre, textured=other)


def _adversarial(known: Statistics, _params: FeatureParams, _other: Any) -> Perturb:
    from generation.feature.operators import adversarial

    return partial(adversarial, deviation=known.deviation, gradient=known.gradient)


def _flow_shift(known: Statistics, _params: FeatureParams, _other: Any) -> Perturb:
    from generation.feature.operators import flow_shift

    return partial(flow_shift, centre=known.centre, basis=known.basis, spread=known.spread)


def _copy_out(_known: Statistics, _params: MovedParams, _other: Any) -> Perturb:
    from generation.feature.operators import copy_out

    return copy_out


def _shuffle(_known: Statistics, _params: MovedParams, _other: Any) -> Perturb:
    from generation.feature.operators import shuffle

    return shuffle


def _insert(_known: Statistics, _params: FeatureParams, other: Any) -> Perturb:
    from generation.feature.operators import insert

    return partial(insert, foreign=other)


def _generator(
    name: str, operator: Operator, params: type[FeatureParams], defect: str, summary: str
) -> Generator:
    donors: Donors = "foreign" if operator.other == "foreign" else "none"
    return Generator(
        name=name,
        family="feature",
        summary=summary,
        draw=partial(draw, operator=operator, kind=params),
        apply=partial(apply, operator=operator),
        params=params,
        donors=donors,
        defect=defect,
        load=partial(load, operator=operator, kind=params),
        identify=lambda given: {"backbone": params(**given).backbone},
        batch_size=8,
        gpu=True,
        seconds=0.05,
    )


GAUSSIAN = _generator(
    "feature-noise",
    Operator("gaussian", _gaussian, 4.0),
    FeatureParams,
    "feature noise",
    "Gaussian noise on features (SimpleNet, DFD): any unusual local appearance",
)
JITTER = _generator(
    "feature-jitter",
    Operator("jitter", _jitter, 400.0),
    FeatureParams,
    "feature jitter",
    "noise in proportion to the token's length (UniAD, OneNIP)",
)
ASCENT = _generator(
    "feature-ascent",
    Operator("ascent", _ascent, 6.0),
    AscentParams,
    "near anomaly",
    "gradient ascent away from normal, at a kept distance (GLASS): anomalies close to the boundary",
)
LOCAL = _generator(
    "feature-local",
    Operator("local", _local, 1.0, other="textured"),
    FeatureParams,
    "textured feature",
    "tokens of a textured place, kept away from normal (GLASS, local): stains, foreign matter",
)
ADVERSARIAL = _generator(
    "feature-adversarial",
    Operator("adversarial", _adversarial, 4.0),
    FeatureParams,
    "worst perturbation",
    "the perturbation of a given length that looks least normal",
)
FLOW = _generator(
    "feature-flow",
    Operator("flow", _flow_shift, 8.0),
    FeatureParams,
    "outlying feature",
    "whitened features pushed outward: unusual in how channels go together",
)
COPY = _generator(
    "feature-copy",
    Operator("copy", _copy_out, 1.0, moves=True),
    MovedParams,
    "misplaced feature",
    "tokens replaced by others of the picture (GeneralAD): misplaced or missing parts",
)
SHUFFLE = _generator(
    "feature-shuffle",
    Operator("shuffle", _shuffle, 1.0, moves=True),
    MovedParams,
    "disordered features",
    "tokens permuted (GeneralAD): wrong order, broken structure",
)
INSERT = _generator(
    "feature-insert",
    Operator("insert", _insert, 1.0, moves=True, other="foreign"),
    FeatureParams,
    "foreign feature",
    "tokens of another category's picture: foreign objects and materials",
)
