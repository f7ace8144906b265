"""CutPaste: a rectangle of the picture, recoloured, pasted elsewhere (Li et al. 2021; core.md 5.3)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import cv2
import numpy as np

from generation.masks import around, place, rectangle, union
from generation.protocol import Box, Edit, Generator, Params, Source, Undrawable, places_of, stored
from generation.severity import solved
from manifests.schema import Recipe
from manifests.searching import Search

PUBLISHED_AREA, PUBLISHED_ASPECT = (0.02, 0.15), (0.3, 1 / 0.3)  # share of the picture; height over width
HUE = 0.1  # of the published colour jitter, in turns
AMPLIFIED = 5.0  # most that a jitter is amplified where the severity asks for more than the paste gives


class CutPasteParams(Params):
    """Settings of ``cutpaste``.

    Attributes:
        aspect: largest ratio of the rectangle's sides, drawn log-uniformly in [1/aspect, aspect]. jitter:
        largest change of brightness, contrast and tint, as a share. published: as in the paper, whatever
        area, count and severity the recipe asks for: one opaque rectangle
            of 2 to 15 % of the picture, anywhere, its brightness, contrast, saturation (each by ``jitter``)
            and hue (by 0.1) varied. Otherwise the change is brought to what the severity asks for: a weaker
            paste is transparent, a stronger one recoloured more.
    """

    aspect: Annotated[float, Search(1, 10, log=True)] = 3.3
    jitter: Annotated[float, Search(0, 1)] = 0.4
    published: bool = False


Colours = tuple[tuple[float, ...], tuple[float, ...]]  # gain and offset of each channel
Factors = tuple[float, float, float, float]  # of brightness, contrast, saturation; turns of the hue


@dataclass(frozen=True)
class Paste:
    """One rectangle: where to, from where (top left corner), and gain and offset of each channel, or the
    factors of :func:`colour_jitter`."""

    target: Box
    source: tuple[int, int]
    gain: tuple[float, ...]
    offset: tuple[float, ...]
    factors: Factors | None = None


@dataclass(frozen=True)
class CutPasteDraw:
    pastes: tuple[Paste, ...]
    severity: float
    box: Box
    region: np.ndarray


def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> CutPasteDraw:
    """Rectangles that together have the wanted area, each around an allowed place."""
    params = CutPasteParams.of(recipe)
    shape = source.allowed.shape
    if params.published:
        return _published(rng, source.allowed, params.jitter)
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
    return CutPasteDraw(tuple(pastes), recipe.severity, (y0, y1, x0, x1), region)


def _published(rng: np.random.Generator, allowed: np.ndarray, strength: float) -> CutPasteDraw:
    aspect = math.exp(rng.uniform(*np.log(PUBLISHED_ASPECT)))
    pixels = rng.uniform(*PUBLISHED_AREA) * allowed.size
    height = int(np.clip(round(math.sqrt(pixels * aspect)), 1, allowed.shape[0]))
    width = int(np.clip(round(math.sqrt(pixels / aspect)), 1, allowed.shape[1]))
    target, corner = (within(rng, height, width, allowed.shape) for _ in range(2))
    box = (target[0], target[0] + height, target[1], target[1] + width)
    region = allowed[box[0] : box[1], box[2] : box[3]].copy()
    if not region.any():
        raise Undrawable("no room")
    return CutPasteDraw((Paste(box, corner, (), (), factors(rng, strength)),), 1.0, box, region)


def within(rng: np.random.Generator, height: int, width: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """Top left corner of a rectangle, uniformly among all that lie in the picture."""
    return int(rng.integers(shape[0] - height + 1)), int(rng.integers(shape[1] - width + 1))


def apply(sources: Sequence[Source], draws: Sequence[CutPasteDraw], _model: Any) -> list[Edit]:
    return [_apply(source, one) for source, one in zip(sources, draws, strict=True)]


def _apply(source: Source, one: CutPasteDraw) -> Edit:
    before = source.crop(one.box)

    if (published := one.pastes[0].factors) is not None:
        (y, x), (height, width) = one.pastes[0].source, one.region.shape
        piece = colour_jitter(source.crop((y, y + height, x, x + width)), published)
        return Edit(one.box, np.where(one.region[..., None], piece, before), one.region)

    places = places_of(one.box, one.region, source.pixels.shape[1])

    def paste(factor: float) -> np.ndarray:
        patch = before.copy()
        for paste in one.pastes:
            y0, y1, x0, x1 = paste.target
            top, left = paste.source
            piece = source.crop((top, top + y1 - y0, left, left + x1 - x0))
            piece = recolour(piece, *amplified(paste.gain, paste.offset, factor))
            patch[y0 - one.box[0] : y1 - one.box[0], x0 - one.box[2] : x1 - one.box[2]] = piece
        return stored(patch, places.inner)

    start = stored(before, places.inner)
    return solved(source, places, start, one.severity, faded(start, paste), limit=AMPLIFIED)


def faded(before: np.ndarray, paste: Callable[[float], np.ndarray]) -> Callable[[float], np.ndarray]:
    """What a paste looks like at a strength: transparent below 1, recoloured that much more above it.

    Args:
        before: float32, N×C.
        paste: ``factor -> patch``; opaque, its recolouring amplified by the factor.
    """
    change = paste(1.0) - before
    return lambda strength: before + np.float32(strength) * change if strength <= 1 else paste(strength)


def jitter(rng: np.random.Generator, channels: int, strength: float) -> Colours:
    """Contrast and brightness, and a slight tint: gain and offset a channel.

    The amount is at least half of ``strength`` in one direction or the other, so that a stronger sample is
    a more visible one.
    """
    contrast, brightness = (
        strength * (u + 1) / 2 if u >= 0 else strength * (u - 1) / 2 for u in rng.uniform(-1, 1, 2).tolist()
    )
    tint = (rng.uniform(-0.25, 0.25, channels) * strength).tolist() if channels == 3 else [0.0]
    return tuple(1 + 0.5 * contrast + t for t in tint), (0.5 * brightness,) * channels


def factors(rng: np.random.Generator, strength: float) -> Factors:
    """As published: factors from U(1 − s, 1 + s), turns of the hue from U(−0.1, 0.1)."""
    brightness, contrast, saturation = rng.uniform(max(1 - strength, 0), 1 + strength, 3).tolist()
    return brightness, contrast, saturation, float(rng.uniform(-HUE, HUE))


def colour_jitter(piece: np.ndarray, by: Factors) -> np.ndarray:
    """Brightness, contrast, saturation and hue, one after the other, as torchvision's ``ColorJitter``, which
    puts them in a random order.

    Args:
        piece: float32 in [0, 1], h×w×C; grey has no saturation and no hue.
    """
    brightness, contrast, saturation, hue = by
    piece = np.clip(piece * np.float32(brightness), 0, 1)
    mean = np.float32(_grey(piece).mean())
    piece = np.clip(mean + np.float32(contrast) * (piece - mean), 0, 1)
    if piece.shape[2] == 1:
        return piece
    grey = _grey(piece)
    hsv = cv2.cvtColor(np.clip(grey + np.float32(saturation) * (piece - grey), 0, 1), cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + np.float32(360 * hue)) % 360
    return np.clip(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB), 0, 1)


def _grey(piece: np.ndarray) -> np.ndarray:
    """Luma, h×w×1."""
    weights = np.array([0.299, 0.587, 0.114], np.float32) if piece.shape[2] == 3 else np.ones(1, np.float32)
    return (piece @ weights)[..., None]


def amplified(gain: Sequence[float], offset: Sequence[float], factor: float) -> Colours:
    """The colours that many times as far from no change."""
    return tuple(1 + factor * (g - 1) for g in gain), tuple(factor * o for o in offset)


def recolour(piece: np.ndarray, gain: Sequence[float], offset: Sequence[float]) -> np.ndarray:
    """``gain·(x − mean) + mean + offset`` a channel, clipped to [0, 1].

    Args:
        piece: float32, h×w×C or N×C.
    """
    channels = piece.shape[-1]
    mean = np.array(cv2.mean(piece.reshape(1, -1, channels))[:channels], np.float32)
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
