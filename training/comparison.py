"""Is one detector better than another? Paired tests on the same pictures.

Image AUROC: DeLong's test, for pictures in groups (Obuchowski's extension; with one picture a group it is
DeLong's own). Every other figure: the bootstrap over groups, with the same draws for both detectors. Several
categories: Holm's correction, for each metric by itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm, rankdata

from training.evaluation import Judged, mean_estimates, spro_figures, whole_category
from training.intervals import LEVEL, RESAMPLES, Estimate, group_indices
from training.metrics import MetricsError, check_scores

DELONG = "image_auroc"  # the metric that has a test of its own
FEWEST = 5  # groups of good and of defect pictures without which no difference is tested


class Difference(NamedTuple):
    """A metric of two detectors on the same pictures.

    Attributes:
        first, second: its values.
        low, high: both ends of the 95 % interval of second − first; NaN if it is undefined.
        p: two-sided, that there is no difference; NaN if it is undefined.
    """

    first: float
    second: float
    low: float
    high: float
    p: float


class Aurocs(NamedTuple):
    """The AUROCs of two detectors, and the variance of their difference (NaN if there are too few groups)."""

    first: float
    second: float
    variance: float


def placements(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The structural components of the AUROC, float64 N: of an anomalous picture the share of normal ones
    below it, of a normal one the share of anomalous ones above it; ties count half. Their mean over either
    kind is the AUROC. From ranks (DeLong et al. 1988; Sun and Xu 2014).

    >>> placements(np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])).tolist()
    [1.0, 0.5, 0.5, 1.0]
    """
    values, positive = check_scores(scores, labels)
    others_below = rankdata(values)
    for kind in (positive, ~positive):
        others_below[kind] -= rankdata(values[kind])
    anomalous = max(1, int(positive.sum()))
    normal = max(1, int((~positive).sum()))
    return np.where(positive, others_below / normal, 1 - others_below / anomalous)


def delong(first: np.ndarray, second: np.ndarray, labels: np.ndarray, groups: Sequence[Hashable]) -> Aurocs:
    """The AUROCs of two detectors on the same pictures and the variance of their difference.

    Args:
        first, second: N finite scores of each detector.
        labels: bool, N; True = anomalous.
        groups: N group names; pictures of one group are no independent evidence.

    Raises:
        MetricsError: lengths differ or a score is not finite.

    Source: DeLong et al. 1988; for groups Obuchowski 1997, which equals it where every picture is its own.
    """
    positive = np.asarray(labels).astype(bool)
    index, count = group_indices(groups, positive.size)
    parts = [placements(scores, positive) for scores in (first, second)]
    if positive.all() or not positive.any():
        return Aurocs(float("nan"), float("nan"), float("nan"))
    auroc, other = (float(part[positive].mean()) for part in parts)
    gap = parts[1] - parts[0] - (other - auroc)
    sums = [np.bincount(index[kind], gap[kind], minlength=count) for kind in (positive, ~positive)]
    present = [np.unique(index[kind]).size for kind in (positive, ~positive)]
    if min(present) < 2:
        return Aurocs(auroc, other, float("nan"))
    sizes = [int(positive.sum()), int((~positive).sum())]
    variance = sum(
        n / (n - 1) * (part**2).sum() / size**2 for n, part, size in zip(present, sums, sizes, strict=True)
    )
    variance += 2 * count / (count - 1) * (sums[0] * sums[1]).sum() / (sizes[0] * sizes[1])
    return Aurocs(auroc, other, max(0.0, float(variance)))


def mean_aurocs(categories: Iterable[Aurocs]) -> Aurocs:
    """Unweighted mean over categories, whose pictures are independent; undefined ones are left out."""
    defined = [found for found in categories if not np.isnan(found.first)]
    if not defined:
        return Aurocs(float("nan"), float("nan"), float("nan"))
    first, second, variance = np.transpose(defined)
    return Aurocs(float(first.mean()), float(second.mean()), float(variance.sum()) / len(defined) ** 2)


def normal_test(found: Aurocs) -> Difference:
    """The difference of two AUROCs against a normal distribution; undefined where nothing varies, as between
    two detectors that both separate all pictures."""
    gap, deviation = found.second - found.first, np.sqrt(found.variance)
    if gap == 0 and found.variance == 0 and 0 < found.first < 1:  # the same ranking: nothing to test
        return Difference(found.first, found.second, 0.0, 0.0, 1.0)
    if not deviation > 0:
        return Difference(found.first, found.second, float("nan"), float("nan"), float("nan"))
    reach = norm.ppf((1 + LEVEL) / 2) * deviation
    p = 2 * norm.sf(abs(gap) / deviation)
    return Difference(found.first, found.second, float(gap - reach), float(gap + reach), float(p))


def paired_bootstrap(first: Estimate, second: Estimate) -> Difference:
    """The difference of two estimates that resampled the same draws of the same groups.

    ``p`` is twice the smaller share of resamples that lie on one side of 0, of all and one more, so it agrees
    with the percentile interval and is never 0.
    """
    gaps = second.resamples - first.resamples
    defined = gaps[~np.isnan(gaps)]
    low, high = Estimate(second.value - first.value, gaps).interval
    if np.isnan(low):
        return Difference(first.value, second.value, low, high, float("nan"))
    sides = (1 + np.count_nonzero(defined <= 0), 1 + np.count_nonzero(defined >= 0))
    return Difference(first.value, second.value, low, high, min(1.0, 2 * min(sides) / (defined.size + 1)))


def untested(first: Estimate, second: Estimate) -> Difference:
    """A difference of which nothing is known but its size."""
    return Difference(first.value, second.value, float("nan"), float("nan"), float("nan"))


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p values, in the order given; NaN stays NaN and counts as no test.

    >>> [round(value, 6) for value in holm([0.01, 0.04, 0.03, float("nan")])]
    [0.03, 0.06, 0.06, nan]
    """
    values = np.asarray(p, float)
    order = [int(k) for k in np.argsort(values) if not np.isnan(values[k])]
    adjusted, largest = np.full(values.size, np.nan), 0.0
    for rank, k in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * float(values[k])))
        adjusted[k] = largest
    return adjusted.tolist()


def compare(
    first: Sequence[Judged], second: Sequence[Judged], resamples: int = RESAMPLES
) -> list[dict[str, Any]]:
    """Two detectors on the same pictures.

    Args:
        first, second: what each says of the same pictures, in the same order, maps of the same sizes.

    Returns:
        A row for each metric and category, and, if several categories have the metric, for their mean
        (``category='mean'``): ``category, metric, first, second, difference, low, high, p, holm``. ``holm``
        is adjusted over the categories that have the metric; NaN for the mean. ``low``, ``high`` and ``p``
        are NaN with fewer than :data:`FEWEST` groups of good or of defect pictures in a category: resampling
        so few finds differences where there are none (with one group of defects in 43 of 100 cases, with
        three in 9 [measured: AP, equal detectors, 5 % nominal]).

    Raises:
        MetricsError: the pictures differ.
    """
    if [a.image.image_id for a in first] != [b.image.image_id for b in second]:
        raise MetricsError("a comparison needs both detectors' results on the same pictures, in one order")
    categories = sorted({entry.image.category for entry in first})
    figures: tuple[list[dict[str, Estimate]], ...] = ([], [])
    aurocs: list[Aurocs] = []
    enough: list[bool] = []
    for number, category in enumerate(categories):
        own = [[entry for entry in judged if entry.image.category == category] for judged in (first, second)]
        for found, judged in zip(figures, own, strict=True):
            spro = spro_figures(judged, number, resamples)
            whole = whole_category(judged, number, resamples)
            found.append(whole | ({"spro": spro["all"]} if spro else {}))
        scores, others = (np.array([entry.score for entry in judged]) for judged in own)
        labels = np.array([entry.anomalous for entry in own[0]])
        groups = np.array([entry.image.group for entry in own[0]])
        aurocs.append(delong(scores, others, labels, groups.tolist()))
        enough.append(min(np.unique(groups[kind]).size for kind in (labels, ~labels)) >= FEWEST)
    rows: list[dict[str, Any]] = []
    for metric in dict.fromkeys(metric for found in figures[0] for metric in found):
        tested = {
            category: untested(a[metric], b[metric])
            if not known
            else normal_test(auroc)
            if metric == DELONG
            else paired_bootstrap(a[metric], b[metric])
            for category, known, auroc, a, b in zip(categories, enough, aurocs, *figures, strict=True)
            if metric in a and not np.isnan(a[metric].value)
        }
        adjusted = dict(zip(tested, holm([gap.p for gap in tested.values()]), strict=True))
        if len(tested) > 1:
            first_mean, second_mean = (mean_estimates(found)[metric] for found in figures)
            testable = all(known for name, known in zip(categories, enough, strict=True) if name in tested)
            if not testable:
                tested["mean"] = untested(first_mean, second_mean)
            elif metric == DELONG:
                tested["mean"] = normal_test(mean_aurocs(aurocs))
            else:
                tested["mean"] = paired_bootstrap(first_mean, second_mean)
        rows += [
            {"category": category, "metric": metric, "difference": gap.second - gap.first}
            | gap._asdict()
            | {"holm": adjusted.get(category, float("nan"))}
            for category, gap in tested.items()
        ]
    return rows
