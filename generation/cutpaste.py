"""CutPaste: a rectangle of the picture, recoloured, pasted elsewhere (Li et al. 2021; core.md 5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from generation.masks import around, place, rectangle, union
from generation.protocol import Box, Edit, Generator, Params, Source, Undrawable
from generation.severity import solved
from manifests.schema import Recipe

AMPLIFIED = 5.0  # most that a jitter is amplified where the severity asks for more than the paste gives


class CutPasteParams(Params):
    """Settings of ``cutpaste``.

    Attributes:
        aspect: largest ratio of the rectangle's sides, drawn log-uniformly in [1/aspect, aspect].
        jitter: largest change of brightness, contrast and tint, as a share.
        calibrate: bring the change to what the severity asks for: a weaker paste is transparent, a stronger
            one recoloured more. False: opaque, recoloured by the jitter, as published.
    """

    aspect: float = 3.3
    jitter: float = 0.4
    calibrate: bool = True


Colours = tuple[tuple[float, ...], tuple[float, ...]]  # gain and offset of each channel


@dataclass(frozen=True)
class Paste:
    """One rectangle: where to, from where (top left corner), and gain and offset of each channel."""

    target: Box
    source: tuple[int, int]
    gain: tuple[float, ...]
    offset: tuple[float, ...]


@dataclass(frozen=True)
class CutPasteDraw:
    pastes: tuple[Paste, ...]
    severity: float
    calibrate: bool
    box: Box
    region: np.ndarray


def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> CutPasteDraw:
    """Rectangles that together have the wanted area, each around an allowed place."""
    params = CutPasteParams(**recipe.settings())
    shape = source.allowed.shape
    shares = rng.uniform(1, 2, recipe.count)
    pastes: list[Paste] = []
    solid: list[tuple[Box, np.ndarray]] = []
    for share in shares / shares.sum():
        pixels = max(share * recipe.area * source.allowed.size, 4.0)
        target = rectangle(rng, source.allowed, pixels, params.aspect)
        height, width = target[1] - target[0], target[3] - target[2]
        corner = around(place(rng, source.allowed), height, width, shape)
        colours = jitter(rng, source.pixels.shape[2], params.jitter)
        pastes.append(Paste(target, corner, *colours))
        solid.append((target, np.ones((height, width), np.bool_)))
    (y0, y1, x0, x1), region = union(solid, shape)
    region &= source.allowed[y0:y1, x0:x1]
    if not region.any():
        raise Undrawable("no room")
    return CutPasteDraw(tuple(pastes), recipe.severity, params.calibrate, (y0, y1, x0, x1), region)


def apply(sources: Sequence[Source], draws: Sequence[CutPasteDraw], _model: Any) -> list[Edit]:
    return [_apply(source, one) for source, one in zip(sources, draws, strict=True)]


def _apply(source: Source, one: CutPasteDraw) -> Edit:
    before = source.crop(one.box)
    keep = one.region[..., None]

    def render(strength: float) -> np.ndarray:
        patch = before.copy()
        for paste in one.pastes:
            y0, y1, x0, x1 = paste.target
            top, left = paste.source
            piece = source.crop((top, top + y1 - y0, left, left + x1 - x0))
            piece = recolour(piece, *amplified(paste.gain, paste.offset, max(strength, 1.0)))
            view = patch[y0 - one.box[0] : y1 - one.box[0], x0 - one.box[2] : x1 - one.box[2]]
            view += np.float32(min(strength, 1.0)) * (piece - view)
        return np.where(keep, patch, before)

    if not one.calibrate:
        return Edit(one.box, render(1.0), one.region)
    return solved(source, one.box, one.region, one.severity, render, limit=AMPLIFIED)


def jitter(rng: np.random.Generator, channels: int, strength: float) -> Colours:
    """Contrast and brightness, and a slight tint: gain and offset a channel.

    The amount is at least half of ``strength`` in one direction or the other, so that a stronger sample is
    a more visible one.
    """
    contrast, brightness = rng.choice([-1, 1], 2) * rng.uniform(0.5, 1, 2) * strength
    tint = rng.uniform(-0.25, 0.25, channels) * strength if channels == 3 else np.zeros(channels)
    gain = 1 + 0.5 * contrast + tint
    return tuple(gain.tolist()), (float(0.5 * brightness),) * channels


def amplified(gain: Sequence[float], offset: Sequence[float], factor: float) -> Colours:
    """The colours that many times as far from no change."""
    return tuple(1 + factor * (g - 1) for g in gain), tuple(factor * o for o in offset)


def recolour(piece: np.ndarray, gain: Sequence[float], offset: Sequence[float]) -> np.ndarray:
    """``gain·(x − mean) + mean + offset`` a channel, clipped to [0, 1]; float32 as given."""
    mean = piece.mean(axis=(0, 1), dtype=np.float64).astype(np.float32)
    scaled = (piece - mean) * np.array(gain, np.float32) + (mean + np.array(offset, np.float32))
    return np.clip(scaled, 0, 1)


GENERATOR = Generator(
    name="cutpaste",
    family="classic",
    summary="a recoloured rectangle of the picture pasted elsewhere: misplaced or foreign parts",
    draw=draw,
    apply=apply,
    params=CutPasteParams,
    defect="misplaced patch",
)
