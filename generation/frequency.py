"""Perturbed amplitude and phase of one band of frequencies, localised by a mask (core.md 5.5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import Field
from scipy.fft import irfft2, next_fast_len, rfft2

from generation.compose import local_variation
from generation.masks import blobs, feather
from generation.protocol import Box, Edit, Generator, Params, Source, Undrawable
from manifests.schema import Recipe

RINGS = ((0.0, 0.1), (0.1, 0.3), (0.3, 1.0))  # radius over Nyquist, as published
CONTEXT = 16  # pixels around the mask that the transform sees
QUIET = 4.0  # levels; a picture's variation counts at least that much
EDGE = 3  # pixels of the mask's soft edge; less in small blobs


class FrequencyParams(Params):
    """Settings of ``frequency``.

    Attributes:
        amplitude: deviation σ_a of the logarithm of the amplitudes at severity 1.
        phase: deviation σ_p of the phases at severity 1, in radians.
        visible: bring the change inside the mask to a deviation of (2 + 4·severity) times the local variation
            of the picture, at least 4 levels (inference: the published perturbation is invisible where the
            picture has no energy in the band). False: the perturbation as published.
        rings: bands to choose from, as (low, high) radii over Nyquist.
    """

    amplitude: float = Field(1.0, ge=0)
    phase: float = Field(1.0, ge=0)
    visible: bool = True
    rings: tuple[tuple[float, float], ...] = RINGS


@dataclass(frozen=True)
class FrequencyDraw:
    """Attributes: ``outer`` the box that is transformed; ``gain`` and ``turn`` float32, the noises on its
    half spectrum, zero outside the ring; ``box`` and ``region`` of the mask; ``target`` the wanted change in
    local variations, 0 for the change as it comes; ``edge`` the width of the soft edge in pixels."""

    box: Box
    region: np.ndarray
    outer: Box
    gain: np.ndarray
    turn: np.ndarray
    target: float
    edge: int


def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> FrequencyDraw:
    """A Perlin-shaped mask and the noise of one ring. All channels get the same noise: the colours hold."""
    params = FrequencyParams(**recipe.settings())
    box, region = blobs(rng, source.allowed, recipe.area, recipe.count)
    outer = _outer(box, source.allowed.shape)
    height, width = outer[1] - outer[0], outer[3] - outer[2]
    radius = _radius(height, width)
    rings = [(radius >= low) & (radius < high) & (radius > 0) for low, high in params.rings]
    rings = [ring for ring in rings if ring.any()]  # a small box has no lowest frequencies
    if not rings:
        raise Undrawable("empty ring")
    ring = rings[rng.integers(len(rings))]
    strength = np.float32(recipe.severity)
    gain = ring * hermitian(rng, height, width, sign=1) * np.float32(params.amplitude) * strength
    turn = ring * hermitian(rng, height, width, sign=-1) * np.float32(params.phase) * strength
    target = (2 + 4 * recipe.severity) * params.visible
    radius_of_blob = math.sqrt(recipe.area * source.allowed.size / recipe.count / math.pi)
    edge = round(min(max(radius_of_blob / 4, 1), EDGE))
    return FrequencyDraw(box, region, outer, gain, turn, target, edge)


def apply(sources: Sequence[Source], draws: Sequence[FrequencyDraw], _model: Any) -> list[Edit]:
    return [_apply(source, one) for source, one in zip(sources, draws, strict=True)]


def _apply(source: Source, one: FrequencyDraw) -> Edit:
    """I'' = (1 − soft mask)·I + soft mask·I'."""
    changed = perturb(source.crop(one.outer), one.gain, one.turn)
    y0, y1, x0, x1 = one.box
    top, left = one.outer[0], one.outer[2]
    inner = changed[y0 - top : y1 - top, x0 - left : x1 - left]
    patch = source.crop(one.box)
    change = inner - patch
    deviation = math.sqrt(float(np.square(change[one.region]).mean()))
    if one.target and deviation > 0:
        variation = local_variation(source.pixels, one.box, one.region.view(np.uint8))
        change *= np.float32(one.target * max(variation, QUIET) / 255 / deviation)
    patch += feather(one.region, one.edge)[..., None] * change
    return Edit(one.box, np.clip(patch, 0, 1), one.region)


def perturb(image: np.ndarray, gain: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Amplitude · exp(gain), phase + turn.

    Args:
        image: float32, H×W×C.
        gain, turn: float32, H×(W // 2 + 1), Hermitian (even and odd, see :func:`hermitian`).

    Returns:
        float32, H×W×C, not clipped.
    """
    factor = np.exp(gain) * (np.cos(turn) + 1j * np.sin(turn))
    spectrum = rfft2(image, axes=(0, 1)) * factor[..., None].astype(np.complex64)
    return irfft2(spectrum, s=image.shape[:2], axes=(0, 1)).astype(np.float32)


def hermitian(rng: np.random.Generator, height: int, width: int, sign: int) -> np.ndarray:
    """White noise on the half spectrum of a real picture, even (sign 1) or odd (sign −1) under negation.

    The columns of frequency 0 and, for an even width, Nyquist hold both k and −k: the second half mirrors
    the first, and in the odd case what mirrors itself is 0.

    Returns:
        float32, height×(width // 2 + 1).
    """
    noise = rng.standard_normal((height, width // 2 + 1), np.float32)
    mirror = -np.arange(height) % height
    for column in (0, width // 2) if width % 2 == 0 else (0,):
        late = np.arange(height) > mirror
        noise[late, column] = sign * noise[mirror[late], column]
        if sign < 0:
            noise[np.arange(height) == mirror, column] = 0
    return noise


def _radius(height: int, width: int) -> np.ndarray:
    """Radius of each frequency of the half spectrum over Nyquist: float, height×(width // 2 + 1)."""
    return np.hypot(2 * np.fft.fftfreq(height)[:, None], 2 * np.fft.rfftfreq(width)[None, :])


def _outer(box: Box, shape: tuple[int, ...]) -> Box:
    """A box with context, of sides that transform fast, within the picture."""
    sides = []
    for (low, high), full in zip((box[:2], box[2:]), shape, strict=True):
        length = min(next_fast_len(high - low + 2 * CONTEXT, real=True), full)
        start = int(np.clip(low - (length - (high - low)) // 2, 0, full - length))
        sides += [start, start + length]
    return sides[0], sides[1], sides[2], sides[3]


GENERATOR = Generator(
    name="frequency",
    family="frequency",
    summary="perturbed amplitudes and phases of one band: disturbed weave, grain, gloss and print",
    draw=draw,
    apply=apply,
    params=FrequencyParams,
    defect="disturbed texture",
)
