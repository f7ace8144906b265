"""Foreign matter: textures drawn by code, pieces of given pictures, and the augmenters that vary both."""

from __future__ import annotations

import math
from collections.abc import Callable

import cv2
import numpy as np

from generation.masks import fractal

# Colours that contamination and wear tend to have (RGB): oil, rust, chalk, dust, soot, verdigris, paint.
TINTS = np.array(
    [
        (0.16, 0.12, 0.08),
        (0.52, 0.27, 0.12),
        (0.90, 0.88, 0.82),
        (0.55, 0.52, 0.48),
        (0.08, 0.08, 0.09),
        (0.30, 0.47, 0.38),
        (0.62, 0.10, 0.12),
        (0.12, 0.22, 0.52),
    ],
    np.float32,
)


def procedural(kind: str, rng: np.random.Generator, height: int, width: int, channels: int) -> np.ndarray:
    """A texture drawn by code.

    Args:
        kind: one of :data:`KINDS`.
        rng: decides colours, scale and detail.
        height, width, channels: of the result; 1 channel is grey, 3 is RGB.

    Returns:
        float32 in [0, 1], height×width×channels.

    Raises:
        ValueError: unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown texture {kind!r}: use one of {', '.join(KINDS)}")
    return coloured(rng, KINDS[kind](rng, height, width), channels)


def textured(pixels: np.ndarray, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A picture, uint8 or uint16 H×W×C, with a texture drawn by code over a region, bool H×W, of which half
    shows (GLASS draws that share around one half [inferred])."""
    y, x = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
    box = slice(y[0], y[-1] + 1), slice(x[0], x[-1] + 1)
    before, chosen = pixels[box], region[box]
    texture = procedural(list(KINDS)[rng.integers(len(KINDS))], rng, *before.shape)
    texture *= np.iinfo(pixels.dtype).max
    changed = pixels.copy()
    changed[box][chosen] = np.rint((before[chosen] + texture[chosen]) / 2)
    return changed


def coloured(rng: np.random.Generator, pattern: np.ndarray, channels: int) -> np.ndarray:
    """A drawn pattern, in [0, 1] and of any shape, in 256 steps between two colours of matter: float32 in
    [0, 1], the pattern's shape×channels."""
    if channels == 1:
        dark, light = np.sort(rng.uniform(0, 1, (2, 1)), axis=0)
    else:
        dark = TINTS[rng.integers(len(TINTS))] * rng.uniform(0.7, 1.1)
        light = np.clip(dark + rng.uniform(0.05, 0.45) * (1 - dark), 0, 1)
    steps = np.clip(dark + (light - dark) * (np.arange(256) / 255)[:, None], 0, 1).astype(np.float32)
    return steps.take(np.rint(np.float32(255) * pattern).astype(np.uint8), axis=0)


def _noise(rng: np.random.Generator, height: int, width: int, cells: float, octaves: int = 3) -> np.ndarray:
    """Fractal noise in about [0, 1] with that many lattice cells along the longer side."""
    side = max(height, width, 2)
    count = int(np.clip(round(cells), 1, max(side // 2, 1)))
    return np.clip(0.5 + 0.6 * fractal(rng, side, count, count, octaves)[:height, :width], 0, 1)


def _grain(rng: np.random.Generator, height: int, width: int, blur_y: int, blur_x: int) -> np.ndarray:
    """White noise, box-blurred twice, brought to mean 0.5 and deviation 0.2; in [0, 1]."""
    noise = rng.random((height, width), np.float32)
    for _ in range(2):
        noise[:] = cv2.blur(noise, (blur_x, blur_y), borderType=cv2.BORDER_REFLECT_101)
    spread = max(float(noise.std()), 1e-6)
    return np.clip(0.5 + np.float32(0.2 / spread) * (noise - noise.mean()), 0, 1)


def _axes(rng: np.random.Generator, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel coordinates along two perpendicular, randomly turned directions."""
    angle = rng.uniform(0, math.pi)
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)[None, :]
    sine, cosine = np.float32(math.sin(angle)), np.float32(math.cos(angle))
    return x * cosine + y * sine, y * cosine - x * sine


def _concrete(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    base = _noise(rng, height, width, max(height, width) / rng.uniform(16, 48), 4)
    return np.clip(base + 0.25 * (_grain(rng, height, width, 1, 1) - 0.5), 0, 1)


def _stain(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    base = _noise(rng, height, width, max(height, width) / rng.uniform(40, 120), 2)
    return base * base * (3 - 2 * base)


def _speckle(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    grain = _grain(rng, height, width, size := int(rng.integers(1, 4)), size)
    return np.clip((grain - rng.uniform(0.4, 0.7)) * 6 + 0.5, 0, 1).astype(np.float32)


def _brushed(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    long = int(rng.integers(15, 60)) | 1
    return _grain(rng, height, width, *((1, long) if rng.random() < 0.5 else (long, 1)))


def _wood(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    along, across = _axes(rng, height, width)
    bend = _noise(rng, height, width, max(height, width) / rng.uniform(50, 120), 2)
    rings = across / np.float32(rng.uniform(5, 14)) + 4 * bend + along / np.float32(200)
    return np.float32(0.7) * (rings % 1) + np.float32(0.3) * _grain(rng, height, width, 1, 1)


def _stripes(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    along, _ = _axes(rng, height, width)
    return 0.5 + 0.5 * np.sin(along * np.float32(2 * math.pi / rng.uniform(4, 16)))


def _weave(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    along, across = _axes(rng, height, width)
    step = np.float32(math.pi / rng.uniform(3, 9))
    warp, weft = np.abs(np.sin(along * step)), np.abs(np.sin(across * step))
    over = (np.floor(along * step / math.pi) + np.floor(across * step / math.pi)) % 2 < 1
    return np.where(over, warp, weft)


def _cells(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    seeds = np.full((height, width), 255, np.uint8)
    count = max(2, round(height * width / rng.uniform(8, 24) ** 2))
    seeds[rng.integers(height, size=count), rng.integers(width, size=count)] = 0
    distance = cv2.distanceTransform(seeds, cv2.DIST_L2, 3)
    return distance / max(float(distance.max()), 1e-6)


KINDS: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "concrete": _concrete,
    "stain": _stain,
    "speckle": _speckle,
    "brushed": _brushed,
    "wood": _wood,
    "stripes": _stripes,
    "weave": _weave,
    "cells": _cells,
}


def cut(rng: np.random.Generator, picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """A random piece of a picture, at a random scale between 1/2 and 2.

    Args:
        picture: uint8 or uint16, H×W×C, any size. If it is too small for the piece it is enlarged.

    Returns:
        uint8, height×width×C.
    """
    zoom = math.exp(rng.uniform(-math.log(2), math.log(2)))
    source_h = int(np.clip(round(height * zoom), 1, picture.shape[0]))
    source_w = int(np.clip(round(width * zoom), 1, picture.shape[1]))
    top = int(rng.integers(picture.shape[0] - source_h + 1))
    left = int(rng.integers(picture.shape[1] - source_w + 1))
    piece = picture[top : top + source_h, left : left + source_w]
    if piece.dtype != np.uint8:
        piece = (piece // 257).astype(np.uint8)
    if piece.shape[:2] != (height, width):
        # Exact integer arithmetic: the same bytes on any processor.
        piece = cv2.resize(piece, (width, height), interpolation=cv2.INTER_LINEAR_EXACT)
    return piece.reshape(height, width, picture.shape[2])


LEVELS = np.arange(256, dtype=np.float64)


def _gamma(rng: np.random.Generator, table: np.ndarray) -> np.ndarray:
    power = np.exp(rng.uniform(math.log(0.5), math.log(2), len(table)))
    return 255 * (table / 255) ** power[:, None]


def _brightness(rng: np.random.Generator, table: np.ndarray) -> np.ndarray:
    return table * rng.uniform(0.8, 1.2) + rng.uniform(-30, 30)


def _solarize(rng: np.random.Generator, table: np.ndarray) -> np.ndarray:
    threshold = rng.uniform(32, 128)
    return np.where(table > threshold, 255 - table, table)


def _posterize(rng: np.random.Generator, table: np.ndarray) -> np.ndarray:
    step = 2.0 ** rng.integers(3, 7)
    return np.floor(table / step) * step + step / 2


def _invert(_rng: np.random.Generator, table: np.ndarray) -> np.ndarray:
    return 255 - table


def _contrast(rng: np.random.Generator, table: np.ndarray) -> np.ndarray:
    return 128 + (table - 128) * rng.uniform(1.2, 2.0)


def _tint(rng: np.random.Generator, table: np.ndarray) -> np.ndarray:
    return table + rng.uniform(-50, 50, (len(table), 1))


AUGMENTERS = (_gamma, _brightness, _solarize, _posterize, _invert, _contrast, _tint)


def augment(rng: np.random.Generator, piece: np.ndarray) -> np.ndarray:
    """Three different random changes (core.md 5.2), then a random flip of each axis.

    The changes are those of DRAEM that act on each channel's levels: gamma, brightness, solarize,
    posterize, invert, contrast, tint. Their composition is one table of 256 levels a channel, so that the
    cost is that of one look-up. (DRAEM's rotation is a flip here; its sharpening and equalising are left
    out.)

    Args:
        piece: uint8, H×W×C.

    Returns:
        uint8, H×W×C, contiguous.
    """
    channels = piece.shape[2]
    table = np.repeat(LEVELS[None], channels, axis=0)
    for index in rng.permutation(len(AUGMENTERS))[:3]:
        table = np.clip(AUGMENTERS[index](rng, table), 0, 255)
    lookup = np.rint(table.T).astype(np.uint8).reshape(1, 256, channels)
    piece = cv2.LUT(piece, lookup).reshape(piece.shape)
    flip = int(rng.integers(4))
    return np.ascontiguousarray(piece[:: -1 if flip & 1 else 1, :: -1 if flip & 2 else 1])
