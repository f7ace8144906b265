"""Exact image and pixel metrics of anomaly detection (core.md, section 6)."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from manifests.errors import FlawsmithError
from manifests.schema import GOOD
from training.components import Size
from training.ranking import (
    FPR_LIMIT,
    Ranked,
    figures,
    pack,
    rank_pixels,
    ranked_steps,
    steps_from_counts,
    unpack,
)

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")
SPRO_FPR_LIMIT = 0.05  # headline of MVTec LOCO
SPRO_FPR_LIMITS = (0.01, SPRO_FPR_LIMIT, 0.1, 0.3, 1.0)  # all that its tool reports (core.md 6.5)


class MetricsError(FlawsmithError, ValueError):
    """Maps, masks or scores from which no metric can be computed."""


def check_scores(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scores and labels of pictures, checked.

    Raises:
        MetricsError: lengths differ, or a score is not finite (its index is named).
    """
    values, positive = np.asarray(scores, np.float64), np.asarray(labels).astype(bool)
    if values.ndim != 1 or values.shape != positive.shape:
        raise MetricsError(
            f"expected one score and one label a picture, found {values.shape} and {positive.shape}"
        )
    if not np.isfinite(values).all():
        index = int(np.flatnonzero(~np.isfinite(values))[0])
        raise MetricsError(
            f"picture {index}: its score is {values[index]}; the detector must return a finite one"
        )
    return values, positive


def image_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """AUROC, average precision and largest F1 of picture scores (core.md 6.1).

    Args:
        scores: N finite numbers, higher = more anomalous.
        labels: bool, N; True = anomalous.

    Returns:
        ``image_auroc``, ``image_ap``, ``image_f1max``, each in [0, 1]; all NaN, with a warning, if there is
        no normal or no anomalous picture.

    Raises:
        MetricsError: lengths differ or a score is not finite.

    >>> image_metrics(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True]))
    {'image_auroc': 0.75, 'image_ap': 0.8333333333333333, 'image_f1max': 0.8}
    """
    values, positive = check_scores(scores, labels)
    if not _both_present(positive.sum(), (~positive).sum(), "pictures"):
        return dict.fromkeys(IMAGE_METRICS, float("nan"))
    distinct, rank = np.unique(values, return_inverse=True)
    anomalous, normal = (np.bincount(rank[kind], minlength=distinct.size) for kind in (positive, ~positive))
    steps = steps_from_counts(anomalous, normal, np.zeros(distinct.size))
    result = figures(steps, anomalous.sum(keepdims=True), normal.sum(keepdims=True))
    return dict(zip(IMAGE_METRICS, map(float, result[:3]), strict=True))


def _both_present(anomalous: int, normal: int, units: str) -> bool:
    if anomalous and normal:
        return True
    missing = "anomalous" if not anomalous else "normal"
    warnings.warn(f"there are no {missing} {units}: the metrics are NaN", stacklevel=3)
    return False


def check_maps(
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    ignore: Sequence[np.ndarray | None] | None,
    names: Sequence[str] | None,
) -> None:
    """Raise MetricsError, naming the picture, if maps and masks do not fit or a map is not finite."""
    for what, items in (("masks", masks), ("ignore masks", ignore), ("names", names)):
        if items is not None and len(items) != len(maps):
            raise MetricsError(f"expected {len(maps)} {what}, one a map, found {len(items)}")
    for index, scores in enumerate(maps):
        name = f"picture {index}" if names is None else names[index]
        skipped = None if ignore is None else ignore[index]
        for what, other in (("mask", masks[index]), ("ignore mask", skipped)):
            if other is not None and other.shape != scores.shape:
                raise MetricsError(
                    f"{name}: its {what} is {other.shape}, its map {scores.shape}; resize the map to fit"
                )
        if skipped is not None and skipped.dtype != bool:
            raise MetricsError(
                f"{name}: its ignore mask is {skipped.dtype}; expected bool, True = not counted"
            )
        if scores.ndim != 2 or not np.isfinite(np.asarray(scores, np.float32)).all():
            raise MetricsError(f"{name}: its map must be H×W and finite in float32; the detector broke that")


def ranked_metrics(ranked: Ranked, fpr_limit: float = FPR_LIMIT) -> dict[str, float]:
    """The four pixel metrics of ranked pixels; see :func:`pixel_metrics`."""
    if not _both_present(ranked.anomalous.size, ranked.normal.size, "pixels"):
        return dict.fromkeys(PIXEL_METRICS, float("nan"))
    anomalous, normal = np.array([float(ranked.anomalous.size)]), np.array([float(ranked.normal.size)])
    parts = [figures(steps, anomalous, normal, fpr_limit) for steps in ranked_steps(ranked)]
    # Rounding may lift a sum a hair above 1.
    sums = {
        name: min(1.0, float(sum(getattr(part, name) for part in parts))) for name in ("auroc", "ap", "aupro")
    }
    f1max = max(float(part.f1max) for part in parts)
    return {
        "pixel_auroc": sums["auroc"],
        "pixel_ap": sums["ap"],
        "pixel_f1max": f1max,
        "aupro": sums["aupro"],
    }


def pixel_metrics(
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    ignore: Sequence[np.ndarray | None] | None = None,
    *,
    size: Size = "all",
    fpr_limit: float = FPR_LIMIT,
    names: Sequence[str] | None = None,
) -> dict[str, float]:
    """Exact pixel metrics over all pixels of all pictures, the good ones included, from one sort.

    Args:
        maps: float32 H×W each (other floats are rounded to it); a list, or an array N×H×W. Sizes may differ.
        masks: bool or number H×W each, of their map's size; anomalous where not zero, as nowhere in a good
            picture.
        ignore: bool H×W each, or None; True pixels count nowhere.
        size: only components of this class (``tiny`` < 0.1 % of the picture, ``small`` < 1 %, ``large``)
            count as defects; the pixels of others count nowhere, defect-free pixels all do.
        fpr_limit: where AUPRO ends, in (0, 1].
        names: of the pictures, for error messages.

    Returns:
        ``pixel_auroc``, ``pixel_ap``, ``pixel_f1max`` and ``aupro`` (normalised by the limit), each in
        [0, 1]. All NaN, with a warning, if there is no anomalous or no normal pixel.

    Raises:
        MetricsError: a map is not finite or does not fit its mask; the message names the picture.

    Source: core.md 6.2 and 6.3 (exact version: all thresholds, ties collapsed, interpolated at the limit).
    Memory: see :func:`training.ranking.rank_pixels`.

    >>> mask = np.zeros((20, 20), bool)
    >>> mask[4:8, 4:8] = True
    >>> pixel_metrics([mask.astype(np.float32)], [mask])
    {'pixel_auroc': 1.0, 'pixel_ap': 1.0, 'pixel_f1max': 1.0, 'aupro': 1.0}
    """
    check_maps(maps, masks, ignore, names)
    return ranked_metrics(rank_pixels(maps, masks, ignore, size), fpr_limit)


def aupro_cflow(
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    thresholds: int = 200,
    fpr_limit: float = FPR_LIMIT,
) -> float:
    """AUPRO as CFLOW, DFD and APRIL-GAN compute it; for comparisons with their figures only.

    ``thresholds`` equidistant in score, points with FPR below the limit kept, their FPR stretched to [0, 1],
    area by trapezoids (core.md 6.4). Not interpolated at the limit, and sensitive to outliers of the score:
    differences to ``aupro`` of some points are usual. NaN, with a warning, if fewer than two different FPRs
    are kept.

    Args:
        maps, masks: as for :func:`pixel_metrics`.

    >>> mask = np.zeros((20, 20), bool)
    >>> mask[4:8, 4:8] = True
    >>> ramp = np.arange(400, dtype=np.float32).reshape(20, 20) + 500 * mask
    >>> round(aupro_cflow([ramp], [mask]), 6)
    1.0
    """
    check_maps(maps, masks, None, None)
    ranked = rank_pixels(maps, masks)
    if not _both_present(ranked.anomalous.size, ranked.normal.size, "pixels"):
        return float("nan")
    scores, component = unpack(ranked.anomalous[::-1])
    lowest = float(min(ranked.normal[0], scores[0]))
    highest = float(max(ranked.normal[-1], scores[-1]))
    levels = lowest + (highest - lowest) * np.arange(thresholds) / thresholds
    overlap = np.concatenate([[0.0], ranked.weights[component].cumsum()])
    pro = overlap[-1] - overlap[np.searchsorted(scores, levels, side="right")]
    fpr = 1 - np.searchsorted(ranked.normal, levels, side="right") / ranked.normal.size
    fpr, pro = fpr[fpr < fpr_limit], pro[fpr < fpr_limit]
    if fpr.size < 2 or np.ptp(fpr) == 0:
        warnings.warn("too few thresholds below the FPR limit: aupro_cflow is NaN", stacklevel=2)
        return float("nan")
    return float(np.trapezoid(pro[::-1], (fpr[::-1] - fpr.min()) / np.ptp(fpr)))


class LogicalDefect(NamedTuple):
    """One defect of a picture: bool H×W mask (defects may overlap), and the area in pixels at which it counts
    as found (at least 1)."""

    mask: np.ndarray
    saturation: int


class SaturatedPixels(NamedTuple):
    """The counted pixels of one picture for sPRO.

    Attributes:
        normal: float32, rising; scores where no defect is.
        tops: float32, rising, one a defect: the highest scores in it, as many as saturate it.
    """

    normal: np.ndarray
    tops: tuple[np.ndarray, ...]


def saturated_pixels(
    scores: np.ndarray, defects: Sequence[LogicalDefect], ignore: np.ndarray | None = None
) -> SaturatedPixels:
    """Split a map by the defects of its picture (core.md 6.5).

    Args:
        scores: float32 H×W, at the size of the defects' masks.
        defects: none for a good picture.
        ignore: bool H×W, or None; True pixels count nowhere. A wholly ignored defect is left out, and one
            with fewer counted pixels than its saturation is found when all of them are (inference).

    Raises:
        MetricsError: the map is not finite or does not fit a mask.
    """
    for defect in defects or [LogicalDefect(np.zeros(scores.shape, bool), 1)]:
        check_maps([scores], [defect.mask], [ignore], None)
    values = np.asarray(scores, np.float32)
    counted = np.ones(values.shape, bool) if ignore is None else ~ignore
    free = counted.copy()
    tops = []
    for defect in defects:
        free &= ~defect.mask
        inside = np.sort(values[defect.mask & counted]) + np.float32(0)
        if inside.size:
            tops.append(inside[-max(1, min(defect.saturation, inside.size)) :])
    return SaturatedPixels(np.sort(values[free]), tuple(tops))


def rank_saturated(pictures: Sequence[SaturatedPixels]) -> Ranked:
    """All pictures' pixels, ranked for sPRO: a defect's overlap saturates, so of its pixels only the
    ``saturation`` highest-scoring ones raise the curve.

    Memory: one copy of the defect-free pixels beside those given.
    """
    tops = [top for picture in pictures for top in picture.tops]
    keys = [pack(top, np.full(top.size, number, np.uint32)) for number, top in enumerate(tops)]
    normal = np.concatenate([np.empty(0, np.float32), *(picture.normal for picture in pictures)])
    normal.sort()
    anomalous = np.sort(np.concatenate([np.empty(0, np.uint64), *keys]))
    return Ranked(normal, anomalous, np.array([1.0 / (top.size * len(tops)) for top in tops]))


def spro(
    maps: Sequence[np.ndarray], defects: Sequence[Sequence[LogicalDefect]], fpr_limit: float = SPRO_FPR_LIMIT
) -> float:
    """Area under the saturated per-region overlap, of MVTec LOCO (core.md 6.5), exact.

    Args:
        maps: float32 H×W each; resized to the original size of the picture first.
        defects: the defects of each picture; none for a good one.
        fpr_limit: where the area ends, in (0, 1].

    Returns:
        In [0, 1]; NaN, with a warning, if there is no defect or no defect-free pixel.

    >>> whole, found = np.ones((2, 4), bool), np.zeros((4, 4), np.float32)
    >>> mask = np.vstack([whole, ~whole])
    >>> found[0] = 1  # half of the defect
    >>> spro([found], [[LogicalDefect(mask, saturation=4)]])
    1.0
    """
    parts = [saturated_pixels(scores, of) for scores, of in zip(maps, defects, strict=True)]
    return ranked_metrics(rank_saturated(parts), fpr_limit)["aupro"]


def spro_name(fpr_limit: float) -> str:
    """Of the metric up to a limit.

    >>> spro_name(SPRO_FPR_LIMIT), spro_name(0.3)
    ('spro', 'spro@0.3')
    """
    return "spro" if fpr_limit == SPRO_FPR_LIMIT else f"spro@{fpr_limit:g}"


def defect_subsets(defects: Sequence[str]) -> dict[str, np.ndarray]:
    """Which pictures judge which defect type: those of the type, and all good ones.

    Args:
        defects: the defect name of each picture; ``good`` for normal ones.

    Returns:
        Defect name -> indices (int64, rising); ``all`` for every picture, then the types by name.

    >>> {name: indices.tolist() for name, indices in defect_subsets(["good", "dent", "hole"]).items()}
    {'all': [0, 1, 2], 'dent': [0, 1], 'hole': [0, 2]}
    """
    names = np.asarray(defects, dtype=str)
    types = sorted(set(names.tolist()) - {GOOD})
    return {"all": np.arange(names.size)} | {t: np.flatnonzero((names == t) | (names == GOOD)) for t in types}
