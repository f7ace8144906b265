"""A few points that cover many: greedy k-centre selection (Sener and Savarese, ICLR 2018; PatchCore)."""

from __future__ import annotations

import torch
from torch import Tensor

PROJECTED = 128  # dimensions in which a coreset is chosen (PatchCore, as released)


def random_projection(channels: int) -> Tensor:
    """float32 C×``PROJECTED`` from torch's global generator, which keeps distances in expectation."""
    return torch.randn(channels, PROJECTED) / PROJECTED**0.5


def k_centre(points: Tensor, count: int) -> list[int]:
    """Indices of the chosen points: each is the farthest from those before it.

    The first is the one nearest to the mean, so that the choice depends on the points alone [inferred;
    PatchCore begins with a random one]. Time grows with N·``count``.

    Args:
        points: float32, N×D, N > 0.

    Returns:
        ``count`` different indices; fewer if there are no more different points.
    """
    chosen = [int(_distance(points, points.mean(dim=0)).argmin())]
    nearest = _distance(points, points[chosen[0]])
    while len(chosen) < count and nearest.max() > 0:
        chosen.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, _distance(points, points[chosen[-1]]))
    return chosen


def _distance(points: Tensor, one: Tensor) -> Tensor:
    return (points - one).norm(dim=1)
