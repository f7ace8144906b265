"""What the training legs share: a schedule, an average of the weights, checkpoints to resume from."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

SAVE_SECONDS = 120  # between checkpoints
SHOW_SECONDS = 20  # between lines of progress


def rate(step: int, steps: int, peak: float, warm: int = 200) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth of the peak."""
    if step < warm:
        return peak * (step + 1) / warm
    done = min((step - warm) / max(steps - warm, 1), 1.0)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def blend(average: dict[str, torch.Tensor], network: nn.Module, decay: float) -> None:
    """Exponential moving average of a network's state, in place."""
    for key, value in network.state_dict().items():
        if value.dtype.is_floating_point:
            average[key].lerp_(value.float(), 1 - decay)
        else:
            average[key].copy_(value)


def snapshot(network: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.detach().float().clone() for key, value in network.state_dict().items()}


def save(path: Path, state: dict[str, Any]) -> None:
    """Written aside, then renamed: a killed leg finds the last whole checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    torch.save(state, aside)
    os.replace(aside, path)


def load(path: Path) -> dict[str, Any] | None:
    return torch.load(path, weights_only=True) if path.exists() else None
