"""A cheap stand-in for a detector, so that dozens of generation settings can be compared in seconds.

Tokens of a frozen backbone are described by how they differ from the nearest normal token of their category;
a linear head tells synthetic anomalies from normals. The head is a closed form over sums that add up sample
by sample, so any mixture of the samples at hand is a weighted sum and one solve: no picture is made and no
feature computed for a trial (inference: our own construction).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch

from training.metrics import image_metrics, pixel_metrics

BANK = 1024  # normal tokens kept a category
RIDGE = 1e-2  # relative to the mean squared feature
FINER = 4  # maps are judged at this multiple of the token grid


def normal_bank(features: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A random choice of at most ``BANK`` tokens of normals: N×C×h×w to M×C float32."""
    tokens = features.float().permute(0, 2, 3, 1).reshape(-1, features.shape[1])
    chosen = rng.permutation(len(tokens))[:BANK]
    return tokens[torch.from_numpy(chosen)]


def residuals(features: torch.Tensor, bank: torch.Tensor) -> np.ndarray:
    """|f − nearest normal token| for every token: N×C×h×w to N×h×w×C float32."""
    count, channels, height, width = features.shape
    out = np.empty((count, height, width, channels), np.float32)
    for index in range(count):
        tokens = features[index].float().permute(1, 2, 0).reshape(-1, channels)
        nearest = bank[torch.cdist(tokens, bank).argmin(dim=1)]
        out[index] = (tokens - nearest).abs().reshape(height, width, channels).numpy()
    return out


@dataclass(frozen=True)
class Evidence:
    """What the head is solved from.

    Attributes:
        squares: float32 S×D×D; sum of x·xᵀ over a sample's anomalous tokens (x ends in a constant 1).
        sums: float32 S×D; sum of x over them.
        counts: float32 S; how many.
        normal_square, normal_sum, normal_count: the same over all normal tokens together.
        scale: float32 C; mean residual of normals a channel, by which residuals are divided.
    """

    squares: np.ndarray
    sums: np.ndarray
    counts: np.ndarray
    normal_square: np.ndarray
    normal_sum: np.ndarray
    normal_count: float
    scale: np.ndarray


def described(tokens: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Residuals to the head's input: scaled, tempered against outliers, with a constant 1 at the end."""
    x = np.sqrt(tokens / scale)
    return np.concatenate([x, np.ones((*x.shape[:-1], 1), np.float32)], axis=-1)


def gather(samples: Sequence[np.ndarray], masks: Sequence[np.ndarray], normals: np.ndarray) -> Evidence:
    """Sums over synthetic samples and normals.

    Args:
        samples: residuals of each sample, h×w×C.
        masks: bool H×W of each; a token is anomalous if a quarter of its place is, or the most covered one.
        normals: residuals of normal pictures, N×h×w×C.
    """
    scale = normals.reshape(-1, normals.shape[-1]).mean(axis=0) + 1e-6
    rest = described(normals.reshape(-1, normals.shape[-1]), scale)
    size = rest.shape[1]
    squares = np.empty((len(samples), size, size), np.float32)
    sums = np.empty((len(samples), size), np.float32)
    counts = np.empty(len(samples), np.float32)
    for index, (sample, mask) in enumerate(zip(samples, masks, strict=True)):
        height, width = sample.shape[:2]
        cover = cv2.resize(mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
        x = described(sample[cover >= min(0.25, float(cover.max()))], scale)
        squares[index], sums[index], counts[index] = x.T @ x, x.sum(axis=0), len(x)
    return Evidence(squares, sums, counts, rest.T @ rest, rest.sum(axis=0), float(len(rest)), scale)


def solve(evidence: Evidence, weights: np.ndarray) -> np.ndarray:
    """The head for a weighting of the samples (S, >= 0): float32 D. Both classes weigh the same.

    Raises:
        ValueError: no weight is positive.
    """
    return np.linalg.solve(*system(evidence, weights)).astype(np.float32)


def system(evidence: Evidence, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(A, b), float64 D×D and D: the head θ of :func:`solve` is that of A·θ = b."""
    total = float(weights @ evidence.counts)
    if total <= 0:
        raise ValueError("no sample has a positive weight")
    square = np.tensordot(weights, evidence.squares, axes=1) / total
    square = square + evidence.normal_square / evidence.normal_count
    moment = weights @ evidence.sums / total - evidence.normal_sum / evidence.normal_count
    square += RIDGE * np.trace(square) / len(square) * np.eye(len(square), dtype=np.float32)
    return square.astype(np.float64), moment.astype(np.float64)


def score_maps(residual: np.ndarray, scale: np.ndarray, head: np.ndarray) -> np.ndarray:
    """Maps at ``FINER`` times the token grid: N×h×w×C to N×(4h)×(4w) float32; higher = more anomalous."""
    coarse = described(residual, scale) @ head
    height, width = coarse.shape[1] * FINER, coarse.shape[2] * FINER
    return np.stack([cv2.resize(m, (width, height), interpolation=cv2.INTER_LINEAR) for m in coarse])


def shrink_mask(mask: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """A bool mask at the maps' size; a place is anomalous if any of it is, so that thin defects survive."""
    size = (grid[1] * FINER, grid[0] * FINER)
    return cv2.resize(mask.astype(np.float32), size, interpolation=cv2.INTER_AREA) > 0


@dataclass(frozen=True)
class Judged:
    """Real pictures of one category that a head is judged on.

    Attributes:
        residual: N×h×w×C.
        labels: bool N, True = anomalous.
        masks: bool N×(4h)×(4w), or None where the category has no masks.
        ignore: bool N×(4h)×(4w), True where nothing counts.
    """

    residual: np.ndarray
    labels: np.ndarray
    masks: np.ndarray | None
    ignore: np.ndarray


def objective(evidence: Evidence, weights: np.ndarray, judged: Mapping[str, Judged]) -> float:
    """What a trial maximises: per category the mean of pixel AP and AUPRO where there are masks, else image
    AP; averaged over the categories that have both kinds of pictures. NaN if there is none."""
    head = solve(evidence, weights)
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a category without anomalous pictures is NaN and left out
        for group in judged.values():
            maps = score_maps(group.residual, evidence.scale, head)
            if group.masks is not None:
                found = pixel_metrics(list(maps), list(group.masks), list(group.ignore))
                values.append((found["pixel_ap"] + found["aupro"]) / 2)
            else:
                counted = np.where(group.ignore, maps.min(), maps)
                values.append(image_metrics(counted.max(axis=(1, 2)), group.labels)["image_ap"])
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")


def left_out_objective(
    evidence: Evidence,
    weights: np.ndarray,
    generators: np.ndarray,
    samples: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
) -> float:
    """Without labelled real anomalies: pixel AP on each generator's samples, with that generator left out of
    the head; the mean over generators. NaN with fewer than two generators."""
    values = []
    for name in sorted(set(generators.tolist())):
        kept = weights * (generators != name)
        if kept.sum() <= 0:
            continue
        head = solve(evidence, kept)
        held = np.flatnonzero(generators == name)[:64]
        maps = [score_maps(samples[i][None], evidence.scale, head)[0] for i in held]
        values.append(pixel_metrics(maps, [masks[i] for i in held])["pixel_ap"])
    return float(np.mean(values)) if values else float("nan")
