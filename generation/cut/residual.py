"""From twin pictures to an edit: where the anomaly is, how strong, and how it joins the untouched source.

Everything here is plain array arithmetic on one crop (core.md 1.11, 1.16; what is not marked there is
inference).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from generation.cut.chain import Twins
from generation.cut.settings import CutParams
from generation.poisson import blend_gradients

FLOOR = 0.3  # of the strongest difference; weaker places are no part of the anomaly
PEAK = 0.995  # quantile over the allowed places that counts as the strongest difference
ROBUST = 4.0  # deviations above the median of the whole crop (by MAD) that a place must stand out by
STRONGEST = 3.0  # limit of the residual's gain
SPECKS = 0.04  # parts of the mask below this share of it are dropped


@dataclass(frozen=True)
class Anomaly:
    """Attributes: ``patch`` float32 in [0, 1], h×w×C; ``region`` bool, h×w; ``measures`` figures of the
    generation, by name."""

    patch: np.ndarray
    region: np.ndarray
    measures: dict[str, float]


def compose_twins(
    crop: np.ndarray,
    twins: Twins,
    allowed: np.ndarray,
    wanted: float,
    contrast: float,
    severity: float,
    settings: CutParams,
) -> Anomaly:
    """The anomaly of a pair of twins, put into its crop.

    Args:
        crop: float32 in [0, 1], h×w×C; the untouched source. twins: of any size; brought to the crop's.
        allowed: bool, h×w; where the anomaly may be. wanted: size of its mask in pixels. contrast: mean
        change inside the mask that is just visible, in [0, 1]. severity: in [0, 1]; the residual is scaled so
        that the mean change goes from ``contrast`` at 0 to what
            was drawn at 1. What was hardly there is inflated three times at most.
        settings: ``composition`` and ``mask``.

    Returns:
        The new crop. ``measures``: ``concentration``, mean of the strongest 3 % of |difference| over its
        median (1.16: 10–20 where the word took hold); ``strength``, the mean difference inside the mask
        before scaling, in levels; ``spread``, deviation of the generated picture over its twin's.
    """
    shape = crop.shape[:2]
    generated, twin = (_fit(picture, crop.shape) for picture in (twins.anomaly, twins.normal))
    residual = generated - twin
    size = np.abs(residual).max(axis=2)
    score = _score(
        size, np.abs(generated - crop).mean(axis=2), _resize(twins.attention, shape), settings.mask
    )
    region = locate(score, allowed, wanted)
    inside = size[region]
    strength = float(inside.mean()) if inside.size else 0.0
    asked = contrast + severity * max(strength - contrast, 0.0)
    gain = np.float32(min(asked / max(strength, 1e-6), STRONGEST))
    weight = soften(region, allowed)[..., None]
    if settings.composition == "paste":
        patch = crop * (1 - weight) + generated * weight
    elif settings.composition == "gradient":
        # Plus 0 times the residual: NaN, which no mask holds, stays and fails the sample.
        patch = crop + blend_gradients(gain * residual, weight[..., 0] > 0) + 0 * residual
    else:
        patch = crop + gain * weight * residual
    ordered = np.sort(size, axis=None)
    measures = {
        "concentration": float(
            ordered[-max(1, len(ordered) * 3 // 100) :].mean() / max(float(np.median(size)), 1e-4)
        ),
        "strength": strength * 255,
        "spread": float(generated.std() / max(float(twin.std()), 1e-4)),
    }
    return Anomaly(np.clip(patch, 0, 1).astype(np.float32), weight[..., 0] > 0, measures)


def locate(score: np.ndarray, allowed: np.ndarray, wanted: float) -> np.ndarray:
    """The mask: the strongest places within the allowed ones, as many as wanted, as far as they stand out.

    A place stands out if its score is above the crop's median by 4 robust deviations and above 0.3 of the
    strongest. Specks are dropped, gaps of a pixel closed.

    Args:
        score: float32, h×w, >= 0.

    Returns:
        bool, h×w; may be empty.
    """
    inside = score * allowed
    values = inside[allowed]
    if not values.size or values.max() <= 0:
        return np.zeros_like(allowed)
    count = int(np.clip(round(wanted), 1, values.size))
    kept = float(np.partition(values, values.size - count)[values.size - count])
    middle = float(np.median(score))
    spread = 1.4826 * float(np.median(np.abs(score - middle)))
    threshold = max(kept, FLOOR * float(np.quantile(values, PEAK)), middle + ROBUST * spread)
    mask = ((inside >= threshold) & allowed).astype(np.uint8)
    mask = cv2.morphologyEx(mask, cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8)) & allowed
    labels = cv2.connectedComponents(mask, connectivity=8)[1]
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes >= max(3.0, SPECKS * sizes.sum()))[labels] & (labels > 0)


def soften(region: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Weight of the anomaly: 1 inside, falling to 0 just outside the region, 0 where nothing is allowed."""
    reach = max(1, round(min(region.shape) / 64))
    size = 2 * reach + 1
    wide = cv2.dilate(region.astype(np.float32), cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size)))
    soft = cv2.GaussianBlur(wide, (0, 0), reach / 1.5)
    weight = np.maximum(soft, region) * wide * allowed
    return np.where(weight > 0.05, weight, 0).astype(np.float32)


def _score(size: np.ndarray, change: np.ndarray, attention: np.ndarray, source: str) -> np.ndarray:
    """``twin``: |difference of the twins|; ``attention``: the word's map × |generated − source| (core.md
    1.11); ``product``: the map × |difference of the twins|."""
    scale = max(min(size.shape) / 128, 1.0)
    if source == "twin":
        return cv2.GaussianBlur(size, (0, 0), 0.7 * scale)
    low, high = float(attention.min()), float(attention.max())
    seen = (attention - low) / max(high - low, 1e-6)
    return seen * cv2.GaussianBlur(change if source == "attention" else size, (0, 0), 1.5 * scale)


def _fit(picture: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A generated RGB picture at the size and channel count of the crop."""
    picture = picture.mean(axis=2, keepdims=True) if shape[2] == 1 else picture
    return _resize(picture, shape[:2]).reshape(shape)


def _resize(picture: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if picture.shape[:2] == tuple(shape[:2]):
        return picture
    shrinks = picture.shape[0] >= shape[0] and picture.shape[1] >= shape[1]
    way = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(picture), shape[1::-1], interpolation=way)
