"""How scores are ranked: the one computation behind every metric, exact or resampled.

Every ranking metric here is a sum over the thresholds at which anomalous units (pictures or pixels) are
passed on the way down the scores. Such a passage is a step: some anomalous units and, if scores tie, some
normal ones. ``Steps`` holds them and ``figures`` turns them into numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from training.components import Size, label_components, size_class

FPR_LIMIT = 0.3  # of AUPRO
BLOCK = 1 << 16  # anomalous pixels whose steps are in memory at once


class Steps(NamedTuple):
    """Thresholds in falling order, along the last axis; all float64 or int64, of one shape (..., T).

    Attributes:
        passed: anomalous units that this step passes.
        regions: by how much it raises the mean overlap of the components (PRO), in [0, 1].
        found: anomalous units at or above the threshold.
        false_before: normal units strictly above the threshold.
        false: normal units at or above the threshold.
    """

    passed: np.ndarray
    regions: np.ndarray
    found: np.ndarray
    false_before: np.ndarray
    false: np.ndarray


class Figures(NamedTuple):
    """AUROC, average precision, largest F1 and AUPRO; all in [0, 1], of shape (...)."""

    auroc: np.ndarray
    ap: np.ndarray
    f1max: np.ndarray
    aupro: np.ndarray


def _width_to_come(low: np.ndarray, high: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Mean of max(limit - x, 0) over x in [low, high]: what a rise spread evenly over that range adds to the
    area under a curve that ends at ``limit``. This is the trapezoid rule with linear interpolation at the
    limit, summed by rises instead of by widths."""
    left, right = np.maximum(limit - low, 0.0), np.maximum(limit - high, 0.0)
    width = high - low
    inside = np.divide(left - right, width, out=np.ones_like(left), where=width > 0)
    return inside * (left + right) / 2


def figures(steps: Steps, anomalous: np.ndarray, normal: np.ndarray, fpr_limit: float = FPR_LIMIT) -> Figures:
    """The metrics' terms, summed over the steps given (for F1: their largest); never above 1.

    Args:
        steps: of shape (..., T); all steps, or some of them (then the caller adds up).
        anomalous, normal: units in all, float64 of shape (..., 1), above 0.
        fpr_limit: where AUPRO ends, in (0, 1].

    Source: core.md 6.1 (trapezoidal AUROC, step-wise AP, F1 with 0/0 = 0) and 6.3, step 5.
    """
    auroc = steps.passed * _width_to_come(steps.false_before, steps.false, normal)
    aupro = steps.regions * _width_to_come(steps.false_before, steps.false, fpr_limit * normal)
    at_or_above = steps.found + steps.false
    precision = np.divide(steps.found, at_or_above, out=np.zeros(at_or_above.shape), where=at_or_above > 0)
    f1 = 2 * steps.found / (anomalous + at_or_above)
    return Figures(
        auroc=np.minimum((auroc / (anomalous * normal)).sum(axis=-1), 1.0),
        ap=np.minimum((steps.passed * precision / anomalous).sum(axis=-1), 1.0),
        f1max=f1.max(axis=-1, initial=0.0),
        aupro=np.minimum((aupro / (fpr_limit * normal)).sum(axis=-1), 1.0),
    )


def steps_from_counts(anomalous: np.ndarray, normal: np.ndarray, regions: np.ndarray) -> Steps:
    """Steps from counts per bin of score; what shares a bin counts as tied.

    Args:
        anomalous, normal: units per bin, (..., B), bins in rising order of score.
        regions: rise of the mean overlap per bin, (..., B).
    """
    passed, negatives, rises = (np.flip(a, axis=-1).astype(np.float64) for a in (anomalous, normal, regions))
    false = negatives.cumsum(axis=-1)
    return Steps(passed, rises, passed.cumsum(axis=-1), false - negatives, false)


class PicturePixels(NamedTuple):
    """The counted pixels of one picture.

    Attributes:
        normal: float32 scores of the defect-free pixels.
        anomalous: float32 scores of the pixels of the chosen components.
        component: uint32, the component (0, 1, ...) of each of ``anomalous``.
        areas: int64, counted pixels of each component, above 0.
    """

    normal: np.ndarray
    anomalous: np.ndarray
    component: np.ndarray
    areas: np.ndarray


def picture_pixels(
    scores: np.ndarray, mask: np.ndarray, ignore: np.ndarray | None = None, size: Size = "all"
) -> PicturePixels:
    """Split a map by its mask: defect-free pixels, and the pixels of each component of the size class.

    Components are formed before ignored pixels are taken away, so that an ignored strip across a defect
    does not make two of it. Components of other size classes count nowhere.
    """
    values = np.asarray(scores, np.float32)
    normal = mask == 0 if ignore is None else (mask == 0) & ~ignore
    labels, areas = label_components(mask)
    chosen = np.array([size in ("all", size_class(area / mask.size)) for area in areas], bool)
    inside = np.concatenate([[False], chosen])[labels]
    if ignore is not None:
        inside &= ~ignore
    component = labels[inside]
    counted, component = np.unique(component, return_inverse=True)
    return PicturePixels(
        values[normal],
        values[inside] + np.float32(0),  # -0.0 becomes 0.0, so that equal scores have equal bits
        component.astype(np.uint32),
        np.bincount(component, minlength=counted.size),
    )


class Ranked(NamedTuple):
    """All counted pixels, ranked: what every pixel metric is computed from.

    Attributes:
        normal: float32, N; scores of defect-free pixels, rising.
        anomalous: uint64, M; score and component of each anomalous pixel, packed so that falling scores rise.
        weights: float64; by how much a pixel of each component raises the mean overlap.
    """

    normal: np.ndarray
    anomalous: np.ndarray
    weights: np.ndarray


def pack(scores: np.ndarray, component: np.ndarray) -> np.ndarray:
    """uint64 keys: the upper half falls as the score rises, the lower half is the component."""
    bits = scores.view(np.uint32)
    falling = np.where(bits >> 31, bits, ~bits & np.uint32(0x7FFFFFFF))
    return (falling.astype(np.uint64) << np.uint64(32)) | component


def unpack(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores (float32) and components of packed keys; the inverse of ``pack``."""
    falling = (keys >> np.uint64(32)).astype(np.uint32)
    bits = np.where(falling >> 31, falling, ~falling & np.uint32(0x7FFFFFFF))
    return bits.view(np.float32), (keys & np.uint64(0xFFFFFFFF)).astype(np.intp)


def rank_pixels(
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    ignore: Sequence[np.ndarray | None] | None = None,
    size: Size = "all",
) -> Ranked:
    """Sort all counted pixels once.

    Memory: 4 bytes a defect-free pixel and 8 an anomalous one, sorted in place, plus one picture's pixels;
    so at most twice the bytes of float32 maps beside the maps themselves.
    """
    skipped = ignore if ignore is not None else [None] * len(maps)
    counted = [
        mask.size if skip is None else int((~skip).sum()) for mask, skip in zip(masks, skipped, strict=True)
    ]
    positive = [
        int(np.count_nonzero(mask if skip is None else (mask != 0) & ~skip))
        for mask, skip in zip(masks, skipped, strict=True)
    ]
    normal = np.empty(sum(counted) - sum(positive), np.float32)
    anomalous = np.empty(sum(positive), np.uint64)
    areas: list[np.ndarray] = []
    n = m = components = 0
    for scores, mask, skip in zip(maps, masks, skipped, strict=True):
        pixels = picture_pixels(scores, mask, skip, size)
        normal[n : n + pixels.normal.size] = pixels.normal
        keys = pack(pixels.anomalous, pixels.component + np.uint32(components))
        anomalous[m : m + keys.size] = keys
        n, m, components = n + pixels.normal.size, m + keys.size, components + pixels.areas.size
        areas.append(pixels.areas)
    anomalous = anomalous[:m]  # fewer than reserved if a size class was chosen
    normal.sort()
    anomalous.sort()
    return Ranked(normal, anomalous, 1.0 / (max(components, 1) * np.concatenate([*areas, [1]])[:components]))


def ranked_steps(ranked: Ranked) -> Iterator[Steps]:
    """The exact steps of ranked pixels, a block at a time.

    Only scores of anomalous pixels are thresholds: between two of them nothing but normal pixels is passed,
    where no area rises, no precision counts and F1 only falls.
    """
    normal, pixels = ranked.normal, ranked.anomalous.size
    counted = reached = 0.0  # anomalous pixels and mean overlap at the last threshold
    carried = 0.0  # mean overlap after the last block, whose end may lie within a tie
    for start in range(0, pixels, BLOCK):
        size = min(BLOCK, pixels - start)
        scores, component = unpack(ranked.anomalous[start : start + size + 1])  # one more, to see a tie
        overlap = ranked.weights[component[:size]].cumsum() + carried
        carried = overlap[-1]
        complete = np.ones(size, bool)
        complete[: scores.size - 1] = scores[:-1] != scores[1:]
        ends = np.flatnonzero(complete)
        if not ends.size:
            continue
        found, regions = ends + (start + 1.0), overlap[ends]
        yield Steps(
            passed=np.diff(found, prepend=counted),
            regions=np.diff(regions, prepend=reached),
            found=found,
            false_before=normal.size - np.searchsorted(normal, scores[ends], side="right").astype(np.float64),
            false=normal.size - np.searchsorted(normal, scores[ends], side="left").astype(np.float64),
        )
        counted, reached = found[-1], regions[-1]
