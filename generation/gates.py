"""Which samples are good enough to keep. Every limit is a setting, every rejection has a reason."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from generation.compose import Composite


class Gates(BaseModel):
    """Limits of the quality gates; the measures are those of :class:`generation.compose.Composite`.

    The defaults were set on twelve categories of real pictures (inference): good samples stay clear of
    them, and a generator that edits in the wrong place, or nowhere visibly, does not.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    leak_max: float = Field(0.15, ge=0, le=1, description="share of the change outside the mask")
    hollow_max: float = Field(0.25, ge=0, le=1, description="share of the mask without a visible change")
    contrast_min: float = Field(
        1.0, ge=0, description="mean change in units of the local variation; not of features"
    )
    area_low: float = Field(0.25, ge=0, le=1, description="smallest mask, relative to the requested area")
    area_high: float = Field(4.0, ge=1, description="largest mask, relative to the requested area")
    pixels_min: int = Field(4, ge=1, description="smallest mask in pixels, whatever was requested")
    change_min: float = Field(4.0, ge=0, description="mean change in 8-bit levels; below it nothing is seen")
    severity_error: float = Field(
        0.15, ge=0, description="error of the change that the severity asks for, relative to it"
    )
    duplicate: float = Field(0.1, ge=0, le=1, description="distance below which two samples are the same")
    strength_min: float = Field(
        2.0, ge=0, description="what a text-to-image model drew before scaling, in 8-bit levels"
    )
    spread_min: float = Field(
        0.2, ge=0, description="deviation of a generated picture over its normal twin's: constant below it"
    )
    clip_gain_min: float = Field(
        0.0, ge=-2, le=2, description="rise of the likeness to the detailed prompt; -2 lets everything pass"
    )


def judge(
    composite: Composite,
    area: float,
    gates: Gates,
    earlier: Sequence[np.ndarray] = (),
    measures: Mapping[str, float] = MappingProxyType({}),
) -> str:
    """The reason to reject a sample, or "" to accept it.

    Args:
        composite: the finished sample.
        area: the requested share of the picture; 0 if none was requested. A generator that ignores it says
            so by its measure ``wanted_area``.
        gates: the limits.
        earlier: signatures of the samples accepted before from the same source picture in the same shard.
        measures: the generator's own figures; those that no gate knows are ignored.

    Returns:
        ``constant`` (the model's picture), ``no anomaly`` (the word took no hold), ``severity_unreachable``
        (no strength gives the change that was asked for), ``empty``, ``area``, ``leak``, ``hollow``,
        ``contrast``, ``duplicate of the source``, ``clip``, ``duplicate of a sample``, or "".
    """
    for name, limit, reason in (
        ("spread", gates.spread_min, "constant"),
        ("strength", gates.strength_min, "no anomaly"),
    ):
        if measures.get(name, limit) < limit:
            return reason
    asked = measures.get("wanted_change", composite.change)
    if abs(composite.change - asked) > gates.severity_error * asked:
        return "severity_unreachable"
    area = measures.get("wanted_area", area)
    places = composite.mask.size
    covered = composite.area * places
    if covered < 1:
        return "empty"
    # A request below the smallest mask is met by the smallest mask.
    smallest = gates.pixels_min if composite.content.dtype != np.float16 else 1
    wanted = max(area * places, smallest)
    largest = gates.area_high * wanted if area else places
    if not max(smallest, gates.area_low * wanted) <= covered <= largest:
        return "area"
    if composite.leak > gates.leak_max:
        return "leak"
    if composite.hollow > gates.hollow_max:
        return "hollow"
    features = composite.content.dtype == np.float16
    if not features and composite.contrast < gates.contrast_min:
        return "contrast"
    if not features and composite.change < gates.change_min:
        return "duplicate of the source"
    if measures.get("clip_gain", 2.0) <= gates.clip_gain_min:
        return "clip"
    if len(earlier) and nearest(composite.signature, earlier) < gates.duplicate:
        return "duplicate of a sample"
    return ""


def nearest(signature: np.ndarray, earlier: Sequence[np.ndarray]) -> float:
    """Smallest Σ|a − b| / (Σa + Σb) to the earlier signatures, in [0, 1]: 0 the same change, 1 disjoint."""
    others = np.asarray(earlier)
    total = np.maximum(signature.sum() + others.sum(axis=1), np.finfo(np.float32).tiny)
    return float((np.abs(others - signature).sum(axis=1) / total).min())
