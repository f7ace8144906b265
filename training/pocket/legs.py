"""One training leg: a schedule, an average of the weights, checkpoints to resume from, progress."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

SAVE_SECONDS = 120  # between checkpoints
SHOW_SECONDS = 20  # between lines of progress
AVERAGED = 0.998  # decay of the average of the weights

State = dict[str, Any]  # of a checkpoint: network, average, optimiser, step, and what a leg adds


class Loss(NamedTuple):
    """Of one step: what is minimised, and the figure that progress shows (its mean over the last steps)."""

    total: Tensor
    figure: float


def run(
    path: Path,
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    steps: int,
    peak: float,
    batch: int,
    batches: Callable[[int], Iterator[Any]],
    loss: Callable[[Any, int], Loss],
    shown: Callable[[float], str],
    extra: State | None = None,
) -> Path:
    """Trains a network, or goes on training it, until ``steps``.

    Args:
        path: of the checkpoint; read if it exists, written every two minutes and at the end.
        optimiser: a group's ``scale``, where it has one, multiplies its learning rate.
        peak: learning rate after the warm-up.
        batch: pictures a step, for the pace.
        batches: what the steps from a number on learn from.
        loss: of one batch at one step.
        shown: the mean figure in words.
        extra: written into the checkpoint beside what the loop keeps.

    Returns:
        ``path``.
    """
    average, step = snapshot(network), 0
    state = load(path)
    if state is not None:
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        average, step = state["average"], state["step"]
    source = batches(step) if step < steps else iter(())
    started = spoken = saved = time.perf_counter()
    first, figures = step, []
    while step < steps:
        for group in optimiser.param_groups:
            group["lr"] = rate(step, steps, peak) * group.get("scale", 1.0)
        found = loss(next(source), step)
        optimiser.zero_grad(set_to_none=True)
        found.total.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimiser.step()
        step += 1
        blend(average, network, min(AVERAGED, 1 - 1 / (step + 1)))
        figures.append(found.figure)
        now = time.perf_counter()
        if now - spoken > SHOW_SECONDS or step == steps:
            pace = (step - first) * batch / (now - started)
            mean = sum(figures) / len(figures)
            print(f"{path.stem} {step}/{steps}  {shown(mean)}  {pace:.1f} pictures/s", flush=True)
            spoken, figures = now, []
        if now - saved > SAVE_SECONDS or step == steps:
            kept = {"network": network.state_dict(), "optimiser": optimiser.state_dict()}
            save(path, {**kept, "average": average, "step": step, **(extra or {})})
            saved = now
    return path


def rate(step: int, steps: int, peak: float, warm: int = 200) -> float:
    """Linear warm-up, then half a cosine down to a fiftieth of the peak."""
    if step < warm:
        return peak * (step + 1) / warm
    done = min((step - warm) / max(steps - warm, 1), 1.0)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


@torch.no_grad()
def blend(average: dict[str, Tensor], network: nn.Module, decay: float) -> None:
    """Exponential moving average of a network's state, in place."""
    for key, value in network.state_dict().items():
        if value.dtype.is_floating_point:
            average[key].lerp_(value.float(), 1 - decay)
        else:
            average[key].copy_(value)


def snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {key: value.detach().float().clone() for key, value in network.state_dict().items()}


def save(path: Path, state: State) -> None:
    """Written aside, then renamed: a killed leg finds the last whole checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    torch.save(state, aside)
    os.replace(aside, path)


def load(path: Path) -> State | None:
    return torch.load(path, weights_only=True) if path.exists() else None
