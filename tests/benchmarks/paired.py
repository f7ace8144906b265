"""Differences between arms of a benchmark: paired bootstrap over seeds and over groups of pictures.

A cell keeps, for each category and metric, the value and its resamples: the metric of the same draws of
groups in every arm and seed (:func:`packed`, two bytes each). From these alone come intervals of means, of
differences and of what is made of them: the seeds of an arm are drawn with replacement too, the same ones in
every arm, and everything is linear up to the ratios.

Seeds are three and groups often four. Drawing n of n spreads a mean by (n − 1)/n of its variance, so one
seed less is drawn (Rao & Wu 1988), and what groups spread is widened by √(n/(n − 1)). What is left is that
percentiles know no t-distribution: of a mean over four normal groups, a 95 % interval covers the truth in
85 %, without widening in 80 % (simulated).
"""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from training.intervals import Estimate

LEVELS = 65535  # of a packed value, over [0, 1]
SEEDS = 1  # spawn key of the draws of seeds
ALPHA = 0.05


def packed(values: np.ndarray) -> str:
    """Numbers in [0, 1] to text, two bytes each; exact to 8e-6."""
    return base64.b64encode(np.round(np.asarray(values) * LEVELS).astype("<u2").tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    """float64; the inverse of :func:`packed`."""
    return np.frombuffer(base64.b64decode(text), "<u2") / LEVELS


@dataclass(frozen=True)
class Runs:
    """One metric of one category in all runs of an arm.

    Attributes:
        values: float64, S×F: seeds, and the parts in which the pictures were judged.
        resamples: float64, S×F×R. A part's draws of groups are those of every seed and arm.
        groups: F; how many were drawn, 2 at least.
    """

    values: np.ndarray
    resamples: np.ndarray
    groups: np.ndarray


def over_seeds(runs: Runs) -> Estimate:
    """The mean over seeds and parts. Each resample draws one seed less than there are, with replacement: the
    same ones in every arm and category, so that estimates may be subtracted and averaged."""
    seeds, parts, resamples = runs.resamples.shape
    centre = runs.resamples.mean(axis=2, keepdims=True)
    wider = np.sqrt(runs.groups / (runs.groups - 1))[:, None]
    drawn = max(1, seeds - 1)
    rng = np.random.default_rng(np.random.SeedSequence(0, spawn_key=(SEEDS,)))
    counts = rng.multinomial(drawn, np.full(seeds, 1 / seeds), size=resamples) / drawn
    means = np.einsum("rs,sfr->r", counts, centre + wider * (runs.resamples - centre)) / parts
    return Estimate(float(runs.values.mean()), means)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """``first`` − ``second``, resample by resample."""
    return Estimate(first.value - second.value, first.resamples - second.resamples)


def above_zero(estimate: Estimate) -> bool:
    return estimate.interval[0] > 0


def gap_closed(
    low: Mapping[str, Estimate],
    arm: Mapping[str, Estimate],
    high: Mapping[str, Estimate],
    data_set: Mapping[str, str] | None = None,
) -> tuple[Estimate, list[str]]:
    """Σ(arm − low) / Σ(high − low) over the categories whose interval of high − low lies above 0. Which
    these are counts as given: the interval does not hold that other pictures would have chosen others.

    Args:
        data_set: of each category; the sums are then over data sets, of the means of their categories.

    Returns:
        The ratio, NaN without such a category, and the other categories: there is no gap to close.

    >>> flat = lambda value: Estimate(value, np.full(8, value))
    >>> low, high = {"a": flat(0.2), "b": flat(0.5)}, {"a": flat(0.6), "b": flat(0.5)}
    >>> ratio, without = gap_closed(low, {"a": flat(0.5), "b": flat(0.9)}, high)
    >>> round(ratio.value, 3), without
    (0.75, ['b'])
    """
    gaps = {name: difference(high[name], low[name]) for name in low}
    with_gap = [name for name, gap in gaps.items() if above_zero(gap)]
    without = [name for name in gaps if name not in with_gap]
    if not with_gap:
        return Estimate(float("nan"), np.empty(0)), without
    sets = [name if data_set is None else data_set[name] for name in with_gap]
    shares = [1 / Counter(sets)[own] for own in sets]
    gained, gap = (
        Estimate(
            sum(share * one.value for share, one in zip(shares, own, strict=True)),
            np.sum([share * one.resamples for share, one in zip(shares, own, strict=True)], axis=0),
        )
        for own in ([difference(arm[name], low[name]) for name in with_gap], [gaps[n] for n in with_gap])
    )
    return Estimate(gained.value / gap.value, gained.resamples / gap.resamples), without


def p_behind(lead: Estimate) -> float:
    """One-sided bootstrap p-value against "not behind": how rarely the lead is drawn at 0 or above."""
    return float((1 + np.sum(lead.resamples >= 0)) / (1 + lead.resamples.size))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p-values adjusted for their number (Holm, 1979): the k-th smallest of m by m − k + 1, never falling.

    >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'c': 0.06, 'b': 0.06}
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return adjusted


def behind(leads: Mapping[str, Estimate]) -> list[str]:
    """The categories that are significantly behind, after Holm over all of them.

    Raises:
        ValueError: none of so many could ever be: the least p-value of its resamples, by their number, is not
            below ``ALPHA``.
    """
    for name, lead in leads.items():
        if len(leads) / (1 + lead.resamples.size) >= ALPHA:
            raise ValueError(f"{name}: {lead.resamples.size} resamples are too few for {len(leads)} tests")
    adjusted = holm({name: p_behind(lead) for name, lead in leads.items()})
    return sorted(name for name, p in adjusted.items() if p < ALPHA)


def fewer_samples(counts: Sequence[int], curve: Sequence[Estimate], target: Estimate) -> Estimate:
    """How many times fewer samples a steered run needs than the largest count, to reach ``target``.

    The curve is read linearly in the logarithm of the count, from the largest count at which it still is
    below the target. 1 / (times fewer) would be the share of samples; 0 times: the target is not reached at
    the largest count. A curve that is nowhere below answers with its smallest count, the least it can be.

    Args:
        counts: of samples in all rounds together, rising; the last one is the unsteered run's.
        curve: the steered run's metric at each.
        target: the unsteered run's metric at the last count.

    >>> flat = lambda value: Estimate(value, np.full(8, value))
    >>> found = fewer_samples([10, 20, 40], [flat(0.5), flat(0.7), flat(0.8)], flat(0.7))
    >>> round(found.value, 3)
    2.0
    """
    at = np.log(np.asarray(counts, np.float64))

    def times(values: np.ndarray, wanted: float) -> float:
        below = np.flatnonzero(values < wanted)
        if not below.size:
            return float(np.exp(at[-1] - at[0]))
        last = below[-1]
        if last == len(values) - 1:
            return 0.0
        share = (wanted - values[last]) / (values[last + 1] - values[last])
        return float(np.exp(at[-1] - (at[last] + share * (at[last + 1] - at[last]))))

    drawn = np.stack([one.resamples for one in curve], axis=1)
    resamples = [times(values, wanted) for values, wanted in zip(drawn, target.resamples, strict=True)]
    return Estimate(times(np.array([one.value for one in curve]), target.value), np.array(resamples))
