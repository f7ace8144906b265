"""A trained detector as the critic of the next samples (:mod:`generation.critic`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from detectors.protocol import Detector
from generation.critic import Critic
from manifests.errors import UsageError


def as_critic(detector: Detector, thresholds: Mapping[str, float]) -> Critic:
    """The detector, frozen. It is differentiated end to end: pictures to features to maps.

    Args:
        thresholds: of map values, by category; another category has their mean (inference).

    Raises:
        UsageError: the detector gives no maps that are differentiable in its pictures.
    """
    for parameter in detector.parameters():
        parameter.requires_grad_(False)
    size = detector.settings.size
    probe = torch.full((1, 3, size, size), 0.5, requires_grad=True)
    try:
        seen = detector.extract(probe)
        traced = detector.maps({"features": seen, "category": [detector.categories[0]]}).requires_grad
    except (AttributeError, RuntimeError):
        traced = False
    if not traced:
        raise UsageError(
            f"generation.practice: detector {type(detector).__name__} gives no maps that are differentiable "
            "in its pictures; let it (detectors.protocol, Detector.maps and extract), or leave practice out"
        )
    maps = partial(_margins, detector=detector, thresholds=dict(thresholds))

    def of_pictures(pictures: Tensor, categories: Sequence[str]) -> Tensor:
        return maps(detector.extract(pictures), categories)

    return Critic(size, of_pictures, maps if seen.dim() == 4 else None, detector.fingerprint)


def _margins(
    features: Tensor, categories: Sequence[str], detector: Detector, thresholds: Mapping[str, float]
) -> Tensor:
    other = sum(thresholds.values()) / len(thresholds)
    alarms = [thresholds.get(category, other) for category in categories]
    found = detector.maps({"features": features, "category": list(categories)}).float()
    return found - found.new_tensor(alarms)[:, None, None]
