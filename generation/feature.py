"""Gaussian noise on backbone features within a mask (SimpleNet, DFD, UniAD; core.md 5.7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from pydantic import Field

from generation.masks import blobs
from generation.protocol import FeatureEdit, Generator, Params, Source
from manifests.schema import Recipe

if TYPE_CHECKING:  # torch is imported by load alone, so that planning does not wait for it
    from generation.backbones import Backbone


class FeatureParams(Params):
    """Settings of ``feature``.

    Attributes:
        backbone: as :func:`generation.backbones.load_backbone` takes it.
        size: side in pixels to which pictures are brought.
        sigma: deviation of the noise at severity 1, in units of each channel's deviation over the picture.
    """

    backbone: str = "tf_efficientnet_lite0"
    size: int = Field(256, ge=32)
    sigma: float = Field(1.0, ge=0)


@dataclass(frozen=True)
class Model:
    backbone: Backbone
    size: int


@dataclass(frozen=True)
class FeatureDraw:
    """Attributes: ``region`` bool, H×W of the source; ``sigma`` in channel deviations; ``seed`` of the noise,
    whose shape only the backbone knows."""

    region: np.ndarray
    sigma: float
    seed: int


def load(params: Mapping[str, Any], device: str) -> Model:
    """The frozen backbone, ready on ``device``."""
    from generation.backbones import load_backbone

    settings = FeatureParams(**params)
    return Model(load_backbone(settings.backbone, device=device), settings.size)


def identify(params: Mapping[str, Any]) -> dict[str, str]:
    return {"backbone": FeatureParams(**params).backbone}


def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> FeatureDraw:
    params = FeatureParams(**recipe.settings())
    (y0, y1, x0, x1), part = blobs(rng, source.allowed, recipe.area, recipe.count)
    region = np.zeros(source.allowed.shape, np.bool_)
    region[y0:y1, x0:x1] = part
    # A tenth of the strength remains at severity 0: no noise is no anomaly.
    sigma = params.sigma * (0.1 + 0.9 * recipe.severity)
    return FeatureDraw(region, sigma, int(rng.integers(2**63)))


def apply(sources: Sequence[Source], draws: Sequence[FeatureDraw], model: Model) -> list[FeatureEdit]:
    from generation.backbones import to_batch

    pictures = [
        source.pixels if source.levels == 255 else (source.pixels // 257).astype(np.uint8)
        for source in sources
    ]
    features = model.backbone.features(to_batch(pictures, model.size)).cpu().numpy()
    return [_noisy(clean, one, model.backbone) for clean, one in zip(features, draws, strict=True)]


def _noisy(features: np.ndarray, one: FeatureDraw, backbone: Backbone) -> FeatureEdit:
    """Noise N(0, (σ·std_c)²) on the masked tokens; std_c over all tokens of the picture."""
    clean = features.astype(np.float16)
    mask = tokens(one.region, *clean.shape[1:])
    spread = features.std(axis=(1, 2), keepdims=True)
    noise = np.random.default_rng(one.seed).standard_normal(features.shape, np.float32)
    noisy = (features + np.float32(one.sigma) * spread * noise).astype(np.float16)
    return FeatureEdit(np.where(mask, noisy, clean), mask, clean, backbone.layers, backbone.fingerprint)


def tokens(region: np.ndarray, height: int, width: int) -> np.ndarray:
    """A region at feature resolution: the tokens it covers by half, and at least the one it covers most.

    Args:
        region: bool, H×W; not empty.

    Returns:
        bool, height×width.
    """
    shrinks = region.shape[0] >= height and region.shape[1] >= width
    way = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    share = cv2.resize(region.astype(np.float32), (width, height), interpolation=way)
    return share >= min(np.float32(0.5), share.max())


GENERATOR = Generator(
    name="feature",
    family="feature",
    summary="Gaussian noise on backbone features: any unusual local appearance",
    draw=draw,
    apply=apply,
    params=FeatureParams,
    defect="feature noise",
    load=load,
    identify=identify,
    batch_size=8,
    gpu=True,
)
