"""Metrics with bootstrap intervals. Whole groups are resampled: pictures of one part belong together.

The values are the exact ones of ``training/metrics.py``. Resamples of picture scores are exact too.
Resamples of pixels are computed from histograms: ``BINS`` bins, whose edges are quantiles of the anomalous
and of the defect-free pixels, half of each; what shares a bin counts as tied. So a resample costs a matrix
product instead of a sort.

Error of the binned metrics: no bin holds more than a share ``q = 2 / BINS`` of either kind of pixels (but for
equal scores, which are tied anyhow), and chords replace a rising curve only within a bin. On the sample
itself this bounds the error of AUROC by ``q / 2`` (2.4e-4) and that of AUPRO by ``q / (2 * 0.3)`` (8.1e-4).
AP and F1 depend on few pixels and have no such bound; measured, they stay below 3e-4 (and at 0 with fewer
anomalous pixels than bins for them).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from manifests.schema import GOOD
from training.components import Size
from training.metrics import (
    IMAGE_METRICS,
    PIXEL_METRICS,
    SPRO_FPR_LIMIT,
    MetricsError,
    SaturatedPixels,
    check_maps,
    check_scores,
    image_metrics,
    rank_saturated,
    ranked_metrics,
    spro_name,
)
from training.ranking import (
    FPR_LIMIT,
    Figures,
    Ranked,
    figures,
    picture_pixels,
    rank_pixels,
    steps_from_counts,
    unpack,
)

BINS = 4096
RESAMPLES = 1000
LEVEL = 0.95
CHUNK = 50  # resamples computed at once
Seed = int | np.random.SeedSequence


@dataclass(frozen=True, eq=False)
class Estimate:
    """A metric's value and what resampling says about it.

    Attributes:
        value: the exact metric; NaN if it is undefined.
        resamples: float64, R; the metric of each resample, NaN where it is undefined (no defect was drawn).
    """

    value: float
    resamples: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        """Both ends of the 95 % percentile interval; NaN if under half of the resamples are defined."""
        valid = self.resamples[~np.isnan(self.resamples)]
        if np.isnan(self.value) or not valid.size or 2 * valid.size < self.resamples.size:
            return float("nan"), float("nan")
        low, high = np.quantile(valid, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return float(low), float(high)


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """Unweighted mean, e.g. over categories; undefined ones are left out (core.md 6.1 and 6.6).

    The estimates must come from different seeds (a spawn key each), or from the same draws of the same
    groups, and equally many resamples.

    >>> mean_estimate([Estimate(0.5, np.array([0.4, 0.6])), Estimate(1.0, np.array([1.0, 1.0]))]).value
    0.75
    """
    defined = [estimate for estimate in estimates if not np.isnan(estimate.value)]
    if not defined:
        return Estimate(float("nan"), np.empty(0))
    value = float(np.mean([estimate.value for estimate in defined]))
    return Estimate(value, np.mean([estimate.resamples for estimate in defined], axis=0))


def group_indices(groups: Sequence[Hashable], pictures: int) -> tuple[np.ndarray, int]:
    """The group (0, 1, ...) of each picture, numbered as first met, and how many there are."""
    if len(groups) != pictures:
        raise MetricsError(f"expected {pictures} groups, one a picture, found {len(groups)}")
    number: dict[Hashable, int] = {}
    indices = np.array([number.setdefault(group, len(number)) for group in groups], dtype=np.intp)
    return indices, len(number)


def draw_counts(groups: int, resamples: int, seed: Seed) -> np.ndarray:
    """How often each group is drawn, with replacement, in each resample: float64, R×G, rows sum to G."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(groups, np.full(groups, 1 / groups), size=resamples).astype(np.float64)


def _resampled(
    counts: np.ndarray,
    anomalous: np.ndarray,
    normal: np.ndarray,
    regions: np.ndarray,
    fpr_limit: float = FPR_LIMIT,
) -> Iterator[Figures]:
    """Figures of the resamples, some at a time.

    Args:
        counts: R×G draws of the groups.
        anomalous, normal: units of each group per bin, G×B, bins in rising order of score.
        regions: overlap of each group's components per bin, G×B; a component adds 1 in all.
    """
    for start in range(0, len(counts), CHUNK):
        part = counts[start : start + CHUNK]
        found, false, overlap = part @ anomalous, part @ normal, part @ regions
        totals = [kind.sum(axis=1, keepdims=True) for kind in (found, false, overlap)]
        defined = (totals[0] > 0) & (totals[1] > 0)
        found_all, false_all, components = (np.where(defined, total, 1.0) for total in totals)
        steps = steps_from_counts(found, false, overlap / np.maximum(components, 1e-12))
        result = figures(steps, found_all, false_all, fpr_limit)
        yield Figures(*(np.where(defined[:, 0], values, np.nan) for values in result))


def _estimates(names: Sequence[str], values: dict[str, float], parts: list[Figures]) -> dict[str, Estimate]:
    return {
        name: Estimate(values[name], np.concatenate([np.empty(0), *(part[k] for part in parts)]))
        for k, name in enumerate(names)
    }


def _without_intervals(values: dict[str, float], resamples: int) -> dict[str, Estimate]:
    return {name: Estimate(value, np.full(resamples, np.nan)) for name, value in values.items()}


def evaluate_images(
    scores: np.ndarray,
    labels: np.ndarray,
    groups: Sequence[Hashable],
    *,
    counted: np.ndarray | None = None,
    resamples: int = RESAMPLES,
    seed: Seed = 0,
) -> dict[str, Estimate]:
    """Picture metrics with intervals.

    Args:
        scores: N finite numbers, higher = more anomalous.
        labels: bool, N; True = anomalous.
        groups: N group names; drawn whole, with replacement. Under two groups there is no interval.
        counted: bool N; the other pictures' groups are drawn too, so that subsets of the same pictures have
            the same draws, but nothing else is asked of them. None: all count.
        resamples: how many.
        seed: of the resampling.

    Returns:
        Estimates named as in :func:`training.metrics.image_metrics`.

    Raises:
        MetricsError: lengths differ or a score is not finite.

    >>> result = evaluate_images(np.array([1, 2, 3, 2.5]), np.array([0, 0, 1, 1]), ["a", "b", "c", "d"])
    >>> result["image_auroc"].value, result["image_auroc"].interval
    (1.0, (1.0, 1.0))
    """
    values, positive = check_scores(scores, labels)
    index, count = group_indices(groups, values.size)
    if counted is not None:
        values, positive, index = values[counted], positive[counted], index[counted]
    exact = image_metrics(values, positive)
    if count < 2 or np.isnan(exact["image_auroc"]):
        return _without_intervals(exact, resamples)
    distinct, rank = np.unique(values, return_inverse=True)
    table = np.zeros((2, count, distinct.size))
    np.add.at(table, (positive.astype(np.intp), index, rank), 1.0)
    parts = list(_resampled(draw_counts(count, resamples, seed), table[1], table[0], np.zeros_like(table[0])))
    return _estimates(IMAGE_METRICS, exact, parts)


def bin_edges(ranked: Ranked, bins: int = BINS) -> np.ndarray:
    """Lower edges of the bins, float32, rising: quantiles of both kinds of pixels, half of the bins each."""
    normal_at = np.linspace(0, ranked.normal.size, bins // 2, endpoint=False).astype(np.intp)
    anomalous_at = np.linspace(0, ranked.anomalous.size, bins // 2, endpoint=False).astype(np.intp)
    anomalous, _ = unpack(ranked.anomalous[ranked.anomalous.size - 1 - anomalous_at])
    return np.unique(np.concatenate([ranked.normal[normal_at], anomalous]))


def _binned(scores: np.ndarray, edges: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Count, or sum of weights, per bin. Sorting one picture and looking up the edges is several times faster
    than looking up every pixel."""
    if weights is None:
        ends = np.append(np.searchsorted(np.sort(scores), edges), scores.size)
        return np.diff(ends)
    order = np.argsort(scores)
    ends = np.append(np.searchsorted(scores[order], edges), scores.size)
    return np.diff(np.concatenate([[0.0], weights[order].cumsum()])[ends])


def evaluate_pixels(
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    groups: Sequence[Hashable],
    ignore: Sequence[np.ndarray | None] | None = None,
    *,
    size: Size = "all",
    resamples: int = RESAMPLES,
    seed: Seed = 0,
    names: Sequence[str] | None = None,
) -> dict[str, Estimate]:
    """Pixel metrics with intervals: exact values, binned resamples (error: see the module).

    Args:
        maps, masks, ignore, size, names: as for :func:`training.metrics.pixel_metrics`.
        groups: N group names; drawn whole, with replacement. Under two groups there is no interval.
        resamples: how many.
        seed: of the resampling.

    Returns:
        Estimates named as in :func:`training.metrics.pixel_metrics`.

    Raises:
        MetricsError: as there, or there is not one group a picture.
    """
    check_maps(maps, masks, ignore, names)
    index, count = group_indices(groups, len(maps))
    ranked = rank_pixels(maps, masks, ignore, size)
    exact = ranked_metrics(ranked)
    if count < 2 or np.isnan(exact["aupro"]):
        return _without_intervals(exact, resamples)
    edges = bin_edges(ranked)
    anomalous, normal, regions = np.zeros((3, count, edges.size))
    for k, group in enumerate(index):
        pixels = picture_pixels(maps[k], masks[k], None if ignore is None else ignore[k], size)
        normal[group] += _binned(pixels.normal, edges)
        anomalous[group] += _binned(pixels.anomalous, edges)
        regions[group] += _binned(pixels.anomalous, edges, 1 / pixels.areas[pixels.component])
    parts = list(_resampled(draw_counts(count, resamples, seed), anomalous, normal, regions))
    return _estimates(PIXEL_METRICS, exact, parts)


def evaluate_spro(
    pictures: Sequence[SaturatedPixels],
    defects: Sequence[str],
    groups: Sequence[Hashable],
    limits: Sequence[float] = (SPRO_FPR_LIMIT,),
    *,
    resamples: int = RESAMPLES,
    seed: Seed = 0,
) -> dict[str, dict[str, Estimate]]:
    """sPRO with intervals, as MVTec LOCO reports it: of each defect type against all good pictures, and the
    types' unweighted mean (core.md 6.5).

    Args:
        pictures: see :func:`training.metrics.saturated_pixels`.
        defects: the defect name of each picture; ``good`` for normal ones.
        limits: where the area ends, each in (0, 1].
        groups, resamples, seed: as for :func:`evaluate_pixels`.

    Returns:
        By defect name, and the mean as ``all``: estimates named by :func:`training.metrics.spro_name`; exact
        values, binned resamples.
    """
    index, count = group_indices(groups, len(pictures))
    draws = draw_counts(count, resamples, seed)
    found = {}
    for name in sorted(set(defects) - {GOOD}):
        own = [k for k, defect in enumerate(defects) if defect in (GOOD, name)]
        ranked = rank_saturated([pictures[k] for k in own])
        values = {limit: ranked_metrics(ranked, limit)["aupro"] for limit in limits}
        if count < 2 or np.isnan(list(values.values())).any():
            named = {spro_name(limit): value for limit, value in values.items()}
            found[name] = _without_intervals(named, resamples)
            continue
        edges = bin_edges(ranked)
        anomalous, normal, regions = np.zeros((3, count, edges.size))
        for k in own:
            normal[index[k]] += _binned(pictures[k].normal, edges)
            for top in pictures[k].tops:
                share = _binned(top, edges)
                anomalous[index[k]] += share
                regions[index[k]] += share / top.size
        found[name] = {}
        for limit, value in values.items():
            parts = _resampled(draws, anomalous, normal, regions, limit)
            drawn = np.concatenate([np.empty(0), *(part.aupro for part in parts)])
            found[name][spro_name(limit)] = Estimate(value, drawn)
    names = [spro_name(limit) for limit in limits]
    return found | {"all": {name: mean_estimate([own[name] for own in found.values()]) for name in names}}


def evaluate_rate(
    hits: np.ndarray, groups: Sequence[Hashable], *, resamples: int = RESAMPLES, seed: Seed = 0
) -> Estimate:
    """The share of pictures of which something holds, e.g. that they raise an alarm.

    Args:
        hits: bool, N.
        groups, resamples, seed: as for :func:`evaluate_images`. There is no interval where it holds of all or
            of none: resamples could not say anything else, which is no certainty.

    >>> evaluate_rate(np.array([True, False, False, False]), "abcd").value
    0.25
    """
    if not len(hits):
        return Estimate(float("nan"), np.full(resamples, np.nan))
    index, count = group_indices(groups, len(hits))
    value = float(np.mean(hits))
    if count < 2 or value in (0, 1):
        return Estimate(value, np.full(resamples, np.nan))
    draws = draw_counts(count, resamples, seed)
    pictures = draws @ np.bincount(index, minlength=count)
    return Estimate(value, draws @ np.bincount(index, weights=hits, minlength=count) / pictures)
