"""A cheap stand-in for a detector, so that dozens of generation settings can be compared in seconds.

Tokens of a frozen backbone are described by how they differ from the nearest normal token of their category;
a linear head tells synthetic anomalies from normals: Fisher's discriminant. Settings are compared by the one
with the scatter of normals alone (``spread`` 0): of the samples it takes a mean and nothing else, so that a
few dozen of them say what hundreds would [measured over 14 settings: the ranks by two draws of 144 samples
correlate by 0.96, with the anomalies' scatter by 0.78; those of either draw with the ranks by the head of the
detector ``residual``, trained from as many samples, by 0.79 and 0.77, with their scatter by 0.92 and 0.80:
the price is that it does not see what a detector short of samples gains from larger anomalies]. The sums add
up sample by sample, so any mixture is a weighted sum and one solve (inference: our own construction).
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from scipy.stats import norm, t

from training.comparison import FEWEST
from training.intervals import Estimate, evaluate_images, evaluate_pixels, mean_estimate
from training.metrics import image_metrics, pixel_metrics

BANK = 1024  # normal tokens kept a category
RIDGE = 1e-3  # relative to the mean squared feature
FINER = 4  # maps are judged at this multiple of the token grid


def normal_bank(
    features: torch.Tensor, rng: np.random.Generator, ignore: np.ndarray | None = None
) -> torch.Tensor:
    """A random choice of at most ``BANK`` tokens of normals: N×C×h×w to M×C float32; without those that
    ``ignore``, N×4h×4w, has :func:`skipped`."""
    tokens = features.float().permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    if ignore is not None:
        tokens = tokens[torch.from_numpy(~skipped(ignore)).reshape(-1)]
    chosen = rng.permutation(len(tokens))[:BANK]
    return tokens[torch.from_numpy(chosen)]


def residuals(features: torch.Tensor, bank: torch.Tensor) -> np.ndarray:
    """|f − nearest normal token| for every token: N×C×h×w to N×h×w×C float32."""
    return np.abs(differences(features, bank))


def differences(features: torch.Tensor, bank: torch.Tensor) -> np.ndarray:
    """f − nearest normal token for every token: N×C×h×w to N×h×w×C float32."""
    count, channels, height, width = features.shape
    out = np.empty((count, height, width, channels), np.float32)
    for index in range(count):
        tokens = features[index].float().permute(1, 2, 0).reshape(-1, channels)
        nearest = bank[torch.cdist(tokens, bank).argmin(dim=1)]
        out[index] = (tokens - nearest).reshape(height, width, channels).numpy()
    return out


@dataclass(frozen=True)
class Evidence:
    """What the head is solved from.

    Attributes:
        sums: float32 S×D; sum of x over a sample's anomalous tokens (x ends in a constant 1).
        counts: float32 S; how many.
        squares: float32 S×D×D; sum of x·xᵀ over them. Only a head with ``spread`` needs these, the largest of
            all; None: left out.
        normal_square: float32 D×D; sum of x·xᵀ over all normal tokens together.
        normal_sum, normal_count: as ``sums`` and ``counts``.
        scale: float32 C; mean residual of normals a channel, by which residuals are divided.
    """

    sums: np.ndarray
    counts: np.ndarray
    normal_square: np.ndarray
    normal_sum: np.ndarray
    normal_count: float
    scale: np.ndarray
    squares: np.ndarray | None = None


def described(tokens: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Residuals to the head's input: scaled, tempered against outliers, with a constant 1 at the end."""
    x = np.sqrt(tokens / scale)
    return np.concatenate([x, np.ones((*x.shape[:-1], 1), np.float32)], axis=-1)


def of_normals(normals: np.ndarray) -> Evidence:
    """Sums over normals alone.

    Args:
        normals: residuals of tokens of normal pictures, …×C.
    """
    scale = normals.reshape(-1, normals.shape[-1]).mean(axis=0) + 1e-6
    rest = described(normals.reshape(-1, normals.shape[-1]), scale)
    size = rest.shape[1]
    nothing = np.empty((0, size), np.float32), np.empty(0, np.float32)
    return Evidence(*nothing, rest.T @ rest, rest.sum(axis=0), float(len(rest)), scale)


def with_samples(
    evidence: Evidence,
    samples: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    *,
    squares: bool = False,
) -> Evidence:
    """The evidence of normals alone with synthetic samples beside them.

    Args:
        samples: residuals of each, h×w×C.
        masks: bool H×W of each; a token is anomalous if a quarter of its place is, or the most covered one.
        squares: whether to hold those, too.
    """
    size = len(evidence.normal_sum)
    sums = np.empty((len(samples), size), np.float32)
    counts = np.empty(len(samples), np.float32)
    scatter = np.empty((len(samples), size, size), np.float32) if squares else None
    for index, (sample, mask) in enumerate(zip(samples, masks, strict=True)):
        x = described(sample[covered(mask, sample.shape)], evidence.scale)
        sums[index], counts[index] = x.sum(axis=0), len(x)
        if scatter is not None:
            scatter[index] = x.T @ x
    return replace(evidence, sums=sums, counts=counts, squares=scatter)


def joined(evidence: Evidence, other: Evidence, chosen: Sequence[int]) -> Evidence:
    """The evidence with some samples of another one of the same normals after its own, without squares."""
    rows = list(chosen)
    return replace(
        evidence,
        squares=None,
        sums=np.concatenate([evidence.sums, other.sums[rows]]),
        counts=np.concatenate([evidence.counts, other.counts[rows]]),
    )


def covered(mask: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Which tokens of an h×w grid a mask makes anomalous: bool h×w."""
    cover = cv2.resize(mask.astype(np.float32), (shape[1], shape[0]), interpolation=cv2.INTER_AREA)
    return cover >= min(0.25, float(cover.max()))


def distances(sample: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """How far each token is from the nearest normal one, in units of what normals are on average: h×w×C to
    h×w."""
    return (sample / scale).mean(axis=-1)


def split_distances(sample: np.ndarray, mask: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """:func:`distances` of a sample's tokens (inside its mask, where the mask does not reach at all)."""
    height, width = sample.shape[:2]
    touched = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) > 0
    far = distances(sample, scale)
    return far[covered(mask, sample.shape)], far[~touched]


def solve(evidence: Evidence, weights: np.ndarray, spread: float = 0.0) -> np.ndarray:
    """The head for a weighting of the samples (S, >= 0): float32 D; (Σ + ρI)⁻¹(μ − μₙ) with the means μ of
    the weighted anomalous tokens and μₙ of normal ones, and the sum Σ of the second moments of normal tokens
    and ``spread`` times those of anomalous ones.

    Raises:
        ValueError: no weight is positive, or squares are missing.
    """
    square, moment, _ = system(evidence, weights, spread)
    return np.linalg.solve(square, moment).astype(np.float32)


def system(
    evidence: Evidence, weights: np.ndarray, spread: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(A, b, M), float64 D×D, D and D×D: the head θ of :func:`solve` is that of A·θ = b; M are the second
    moments of the weighted anomalous tokens, None without ``spread``."""
    total = float(weights @ evidence.counts)
    if total <= 0:
        raise ValueError("no sample has a positive weight")
    square = evidence.normal_square / evidence.normal_count
    mean_square = None
    if spread:
        if evidence.squares is None:
            raise ValueError("a head with spread needs the squares of the samples")
        mean_square = np.tensordot(weights, evidence.squares, axes=1) / total
        square = square + spread * mean_square
    moment = weights @ evidence.sums / total - evidence.normal_sum / evidence.normal_count
    square = square + RIDGE * np.trace(square) / len(square) * np.eye(len(square), dtype=np.float32)
    return square.astype(np.float64), moment.astype(np.float64), mean_square


def score_maps(residual: np.ndarray, scale: np.ndarray, head: np.ndarray) -> np.ndarray:
    """Maps at ``FINER`` times the token grid: N×h×w×C to N×(4h)×(4w) float32; higher = more anomalous."""
    coarse = described(residual, scale) @ head
    height, width = coarse.shape[1] * FINER, coarse.shape[2] * FINER
    return np.stack([cv2.resize(m, (width, height), interpolation=cv2.INTER_LINEAR) for m in coarse])


def shrink_mask(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """A bool mask at the maps' size; a place is anomalous if any of it is, so that thin defects survive."""
    size = (grid[1] * FINER, grid[0] * FINER)
    return cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0


def skipped(ignore: np.ndarray) -> np.ndarray:
    """Which tokens do not count: bool N×4h×4w of places that do not to N×h×w. Those of which most places do
    not; all that have a place that counts do where that would leave none, as in a narrow strip; and every one
    where no place counts at all."""
    count, height, width = ignore.shape
    blocks = ignore.reshape(count, height // FINER, FINER, width // FINER, FINER)
    out = blocks.mean(axis=(2, 4))
    for least in (0.5, 1 - 1e-9):
        if (out <= least).any():
            return np.asarray(out > least)
    return np.zeros(out.shape, np.bool_)


class Normals(NamedTuple):
    """Normal pictures that a head's scores are held against.

    Attributes:
        residual: N×h×w×C.
        ignore: bool N×(4h)×(4w), True where nothing counts.
    """

    residual: np.ndarray
    ignore: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """The residuals that count, M×C."""
        return self.residual[~skipped(self.ignore)]

    def scores(self, scale: np.ndarray, head: np.ndarray) -> list[np.ndarray]:
        """A head's scores of each picture's places that count, of pictures that have such; of all places
        where no picture has."""
        maps = score_maps(self.residual, scale, head)
        found = [scores[~no] for scores, no in zip(maps, self.ignore, strict=True) if not no.all()]
        return found or [scores.ravel() for scores in maps]


@dataclass(frozen=True)
class Judged:
    """Pictures of one category that a head is judged on.

    Attributes:
        residual: N×h×w×C.
        labels: bool N, True = anomalous.
        masks: bool N×(4h)×(4w), or None where the category has no masks.
        ignore: bool N×(4h)×(4w), True where nothing counts.
        groups: of each picture: the part it shows.
        fold: 0 or 1 of each picture; a group is in one fold.
        family: of the generators that its head must not have learned from; None: it may know all.
    """

    residual: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None
    ignore: np.ndarray
    groups: tuple[str, ...]
    fold: np.ndarray
    family: str | None = None

    def part(self, fold: int) -> np.ndarray:
        """Indices of the pictures of one fold."""
        return np.flatnonzero(self.fold == fold)


class Figures(NamedTuple):
    """What a head is worth: means over the categories that have both kinds of pictures; NaN without any.

    ``false_positives`` is the share of held-out normals' places that score above the median place of the
    defects (without masks: of pictures, by their highest place). A category without masks has the AP of its
    pictures as ``pixel_ap`` and as ``aupro``.
    """

    pixel_ap: float
    aupro: float
    false_positives: float

    @property
    def score(self) -> float:
        """What is gained or lost: the mean of pixel AP and AUPRO."""
        return (self.pixel_ap + self.aupro) / 2


def folds(names: Sequence[str], groups: Sequence[str], labels: np.ndarray) -> np.ndarray:
    """0 or 1 for each picture: groups with a defect, and those without, are dealt in turn, in the order of a
    hash of their names, so that each fold has half of either kind."""
    anomalous: dict[str, bool] = {}
    for name, group, label in zip(names, groups, labels, strict=True):
        anomalous[f"{name}/{group}"] = anomalous.get(f"{name}/{group}", False) or bool(label)
    order = sorted(anomalous, key=lambda key: hashlib.sha256(key.encode()).digest())
    dealt: dict[str, int] = {}
    for kind in (True, False):
        dealt |= {key: at % 2 for at, key in enumerate(key for key in order if anomalous[key] is kind)}
    return np.array([dealt[f"{name}/{group}"] for name, group in zip(names, groups, strict=True)], np.int8)


Maps = Mapping[str, tuple[np.ndarray, list[np.ndarray]]]


def all_maps(
    evidence: Evidence,
    weights: np.ndarray,
    families: np.ndarray,
    judged: Mapping[str, Judged],
    held: Mapping[str, Normals],
) -> dict[str, tuple[np.ndarray, list[np.ndarray]]]:
    """What the head that a weighting of the samples gives says, by category: maps of its pictures, and
    :meth:`Normals.scores` of its held-out normals.

    Args:
        weights, families: of the samples, S each.

    A category whose family leaves no sample to learn from has no maps.
    """
    heads: dict[str | None, np.ndarray] = {}
    maps = {}
    for name, group in judged.items():
        own = weights if group.family is None else weights * (families != group.family)
        if float(own @ evidence.counts) <= 0:
            continue
        if group.family not in heads:
            heads[group.family] = solve(evidence, own)
        head = heads[group.family]
        maps[name] = (
            score_maps(group.residual, evidence.scale, head),
            held[name].scores(evidence.scale, head),
        )
    return maps


def measure(maps: Maps, judged: Mapping[str, Judged], fold: int) -> Figures:
    """The figures of one fold."""
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a category without anomalous pictures is NaN and left out
        for name, (scores, normal) in maps.items():
            group, chosen = judged[name], judged[name].part(fold)
            own, ignore, labels = scores[chosen], group.ignore[chosen], group.labels[chosen]
            if not labels.any() or (labels.all() and group.masks is None):
                continue
            if group.masks is not None:
                masks = group.masks[chosen]
                found = pixel_metrics(list(own), list(masks), list(ignore))
                places = own[masks & ~ignore]
                if not places.size:
                    continue
                alarms = float(np.mean(np.concatenate(normal) > np.median(places)))
                rows.append((found["pixel_ap"], found["aupro"], alarms))
            else:
                highest = np.where(ignore, own.min(), own).max(axis=(1, 2))
                ap = image_metrics(highest, labels)["image_ap"]
                alarms = float(
                    np.mean(np.array([places.max() for places in normal]) > np.median(highest[labels]))
                )
                rows.append((ap, ap, alarms))
    rows = [row for row in rows if np.isfinite(row).all()]
    return Figures(*(float(value) for value in np.mean(rows, axis=0))) if rows else Figures(*[np.nan] * 3)


def gain(
    maps: Maps,
    before: Maps,
    judged: Mapping[str, Judged],
    fold: int,
    *,
    level: float,
    resamples: int,
    seed: int,
) -> Estimate:
    """How much the score of one fold rises from ``before`` to ``maps``, by paired bootstrap over groups.

    The resamples are spread, so that few groups with defects are not taken for many: by √(n/(n − 1)) in a
    category with n of them, for resampled groups vary less than new ones, and by Student's over the
    normal distribution's quantile at ``level`` (after Hesterberg 2015, who moves the quantile instead).
    Without it, a test at 1.25 % found gains in 5.5 % of cases without any where there were five groups,
    in 9.8 % with three categories of two, in 3 to 4 % with eight to twenty groups; with it in 1.8 to
    2.8 % [measured]. Categories with one group of defects are left out.

    NaN with fewer than :data:`training.comparison.FEWEST` groups of defects (or, without masks, of either
    kind) in all categories together: so few are no evidence. A draw of groups in which a category's figure
    is not defined is replaced by another of its draws.
    """
    differences, counted, degrees = [], np.zeros(2, int), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for at, name in enumerate(sorted(set(maps) & set(before))):
            group, chosen = judged[name], judged[name].part(fold)
            groups = [group.groups[k] for k in chosen]
            labels = group.labels[chosen]
            kinds = (labels,) if group.masks is not None else (labels, ~labels)
            present = [len({groups[k] for k in np.flatnonzero(kind)}) for kind in kinds]
            if min(present) < 2:  # of one part nothing says how much another would differ
                continue
            options: dict[str, Any] = {
                "resamples": resamples,
                "seed": np.random.SeedSequence(seed, spawn_key=(at,)),
            }
            both = []
            for scores in (maps[name][0][chosen], before[name][0][chosen]):
                ignore = group.ignore[chosen]
                if group.masks is not None:
                    found = evaluate_pixels(
                        list(scores), list(group.masks[chosen]), groups, list(ignore), **options
                    )
                    both.append(_mean(found["pixel_ap"], found["aupro"]))
                else:
                    highest = np.where(ignore, scores.min(), scores).max(axis=(1, 2))
                    both.append(evaluate_images(highest, labels, groups, **options)["image_ap"])
            resamples_ = both[0].resamples - both[1].resamples
            undefined = np.isnan(resamples_)
            if undefined.all():
                continue
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(at, 1)))
            resamples_[undefined] = rng.choice(resamples_[~undefined], undefined.sum())
            value, fewest = both[0].value - both[1].value, min(present)
            spread = np.sqrt(fewest / (fewest - 1))
            differences.append(Estimate(value, value + spread * (resamples_ - value)))
            counted += (present[0], present[-1])
            degrees += fewest - 1
    if counted.min() < FEWEST:
        return mean_estimate([])
    mean = mean_estimate(differences)
    student = t.ppf(level, degrees) / norm.ppf(level)
    return Estimate(mean.value, mean.value + student * (mean.resamples - mean.value))


def _mean(first: Estimate, second: Estimate) -> Estimate:
    return Estimate((first.value + second.value) / 2, (first.resamples + second.resamples) / 2)
