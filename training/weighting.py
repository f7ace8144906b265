"""How much each sample should count: weights learned from a few labelled real anomalies, so that samples that
do not help fade.

A problem on two levels: the inner one fits a head to the weighted samples, the outer one asks how well that
head does on real pictures, and the weights follow its gradient (Ren et al. 2018, "Learning to reweight
examples for robust deep learning"; Franceschi et al. 2018, "Bilevel programming for hyperparameter
optimization and meta-learning"). The inner problem is :mod:`training.proxy`'s, whose head θ solves
A(w)·θ = b(w); so the gradient is no meta-step but exact, by the implicit function theorem (Pedregosa 2016):

    dL/dwᵢ = uᵀ(∂b/∂wᵢ − ∂A/∂wᵢ·θ)  with  A·u = ∇L(θ)

Weights move by exponentiated gradient (Kivinen & Warmuth 1997), are drawn back to 1, and are cross-fitted:
each fold of parts learns them without itself, and how far they move is what does best on the fold left out.
The loss, the folds and every constant here are inference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.proxy import FINER, RIDGE, Evidence, Judged, described, system

SPREAD = 1.0  # of the anomalies in the head's scatter: what makes one sample more useful than another
FOLDS = 4
STEPS, RATE = 15, 0.25  # rate: of a step along a gradient of root mean square 1, in log weight
PULL = 0.05  # share of its log weight that a sample loses a step
LOWEST, HIGHEST = 0.05, 4.0
ALARM = 3.0  # deviations of normal tokens above which one counts as found
ERRORS, SHARE, SMALL = 2.0, 0.05, 0.02  # what the folds left out must gain at least before any weight moves:
# standard errors, a share of the loss, and a loss a token


@dataclass(frozen=True)
class Labelled:
    """Tokens of one real picture, as the head sees them.

    Attributes:
        group: the part that it shows; pictures of one part are in one fold.
        anomalous, normal: float32 M×D and K×D; either may be empty.
    """

    group: str
    anomalous: np.ndarray
    normal: np.ndarray


def labelled(category: str, judged: Judged, scale: np.ndarray) -> list[Labelled]:
    """The tokens of a category's pictures; of a category without masks, none of its anomalous pictures.

    A token is anomalous as in :func:`training.proxy.with_samples`; one that an anomaly only touches, or that
    does not count, is neither.

    Args:
        category: its name, for groups of one name in two categories are two.
        scale: of the evidence.
    """
    found = []
    for at, group in enumerate(judged.groups):
        tokens = described(judged.residual[at], scale)
        height, width = tokens.shape[:2]
        counts = ~_coarse(judged.ignore[at], height, width).astype(np.bool_)
        cover = np.zeros((height, width))
        if judged.labels[at]:
            if judged.masks is None:
                continue
            cover = _coarse(judged.masks[at], height, width)
        anomalous = (cover > 0) & (cover >= min(0.25, float(cover.max()))) & counts
        found.append(Labelled(f"{category}/{group}", tokens[anomalous], tokens[(cover == 0) & counts]))
    return found


def _coarse(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    """Share of each token's place in a mask of the maps' size: float64 h×w."""
    return mask.reshape(height, FINER, width, FINER).mean(axis=(1, 3))


def loss(head: np.ndarray, pictures: Sequence[Labelled]) -> tuple[float, np.ndarray]:
    """How far anomalies fall short of ``ALARM`` deviations above normal tokens, and its gradient in the head.

    With z the score less the mean of normal tokens' scores, in their deviations: the mean over pictures, and
    in each over its anomalous tokens, of log(1 + exp(ALARM − z)). A head's scale and offset, which an alarm
    threshold takes away, count nothing, and every picture counts the same, however large its anomaly is.

    Returns:
        The loss, and float64 D.
    """
    normals = np.concatenate([p.normal for p in pictures]).astype(np.float64)
    middle = normals.mean(axis=0)
    rest = normals - middle
    bent = rest.T @ (rest @ head) / len(normals)  # covariance · head
    deviation = np.sqrt(max(float(head @ bent), 1e-12))
    anomalies = [p.anomalous - middle for p in pictures if len(p.anomalous)]
    value, gradient = 0.0, np.zeros(len(head))
    for tokens in anomalies:
        z = tokens @ head / deviation
        value += float(np.logaddexp(0, ALARM - z).mean())
        pull = -1 / (1 + np.exp(np.clip(z - ALARM, -50, 50))) / len(z)
        gradient += pull @ tokens / deviation - float(pull @ z) * bent / deviation**2
    return value / len(anomalies), gradient / len(anomalies)


def hypergradient(
    evidence: Evidence, weights: np.ndarray, pictures: Sequence[Labelled]
) -> tuple[np.ndarray, np.ndarray]:
    """The head for ``weights`` (S, > 0), and the gradient of its loss in them: float64, D and S."""
    square, moment, mean_square = system(evidence, weights, SPREAD)
    head = np.linalg.solve(square, moment)
    _, outer = loss(head, pictures)
    u = np.linalg.solve(square, outer)
    total = float(weights @ evidence.counts)
    squares, sums, counts = evidence.squares, evidence.sums, evidence.counts
    assert squares is not None and mean_square is not None  # or there were no system
    mean_sum = weights @ sums / total
    bent = (squares @ head) @ u - counts * float(u @ mean_square @ head)
    traces = np.trace(squares, axis1=1, axis2=2) - counts * float(np.trace(mean_square))
    ridge = RIDGE / len(head) * traces * float(u @ head)
    return head, ((sums @ u - counts * float(mean_sum @ u)) - SPREAD * (bent + ridge)) / total


def learn(evidence: Evidence, pictures: Sequence[Labelled]) -> np.ndarray:
    """Weights of the samples, float64 S in [``LOWEST``, ``HIGHEST``] with mean 1: all 1 where no other ones
    do better on parts that they were not learned from, or where there are too few parts to tell."""
    folds = _folds(pictures)
    even = np.ones(len(evidence.counts))
    if folds is None:
        return even
    kept, held = (
        [[p for p, f in zip(pictures, folds, strict=True) if (f == k) == out] for k in range(FOLDS)]
        for out in (False, True)
    )
    paths = [_path(evidence, own) for own in kept]
    losses = np.array(
        [[loss(head, own)[0] for _, head in path] for path, own in zip(paths, held, strict=True)]
    )
    gain = losses[:, :1] - losses
    errors = gain.std(axis=0, ddof=1) / np.sqrt(FOLDS)
    best = int(gain.mean(axis=0).argmax())
    if gain[:, best].mean() <= max(ERRORS * errors[best], SHARE * losses[:, 0].mean(), SMALL):
        return even
    return _bounded(np.mean([path[best][0] for path in paths], axis=0))


def _path(evidence: Evidence, pictures: Sequence[Labelled]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The weights before each step and after the last, each with its head."""
    weights = np.ones(len(evidence.counts))
    found, scale = [], 0.0
    for _ in range(STEPS):
        head, gradient = hypergradient(evidence, weights, pictures)
        found.append((weights, head))
        slope = weights * gradient  # in log weight
        slope -= slope.mean()
        scale = scale or float(np.sqrt(np.mean(slope**2)))
        if scale == 0:
            return [(weights, head)] * (STEPS + 1)
        moved = (1 - PULL) * np.log(weights) - RATE * slope / scale
        weights = _bounded(np.exp(moved))
    square, moment, _ = system(evidence, weights, SPREAD)
    return [*found, (weights, np.linalg.solve(square, moment))]


def _bounded(weights: np.ndarray) -> np.ndarray:
    """Within the bounds and of mean 1, by the factor that brings both about."""
    low, high = LOWEST / weights.max(), HIGHEST / weights.min()
    for _ in range(60):  # the mean grows with the factor
        factor = np.sqrt(low * high)
        low, high = (factor, high) if np.clip(factor * weights, LOWEST, HIGHEST).mean() < 1 else (low, factor)
    return np.clip(np.sqrt(low * high) * weights, LOWEST, HIGHEST)


def _folds(pictures: Sequence[Labelled]) -> list[int] | None:
    """A fold for every picture: parts with an anomaly are dealt out evenly, then the others. None where a
    fold would have no anomaly, or its rest no normal token."""
    bad = {p.group for p in pictures if len(p.anomalous)}
    if len(bad) < FOLDS or not any(len(p.normal) for p in pictures):
        return None
    order = [*sorted(bad), *sorted({p.group for p in pictures} - bad)]
    fold = {group: at % FOLDS for at, group in enumerate(order)}
    return [fold[p.group] for p in pictures]
