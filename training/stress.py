"""The nuisances that RAD names (viewpoint, uneven light, blur), put on pictures at stated levels.

Each is a pure function of (picture, level, the picture's name): good and defective pictures are changed by
the same rule, a picture keeps its direction over all levels, and level 0 is the picture itself
(companions.md, section 12; strengths after its proposal, the combination inferred).
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

Kind = Literal["viewpoint", "light", "blur"]
LEVELS = (0, 1, 2, 3, 4)
STRENGTHS: dict[Kind, tuple[float, ...]] = {
    "viewpoint": (0.0, 0.02, 0.04, 0.08, 0.12),  # most a corner moves, as a share of the sides
    "light": (0.0, 0.15, 0.3, 0.45, 0.6),  # most the gain differs from 1
    "blur": (0.0, 0.7, 1.3, 2.2, 3.5),  # deviation in pixels, on a picture of BLUR_SIDE
}
BLUR_SIDE = 256  # shorter side for which blur is stated; larger pictures are blurred in proportion
TURN = 100.0  # degrees of rotation for a corner that moves by a whole side: 12 degrees at most


@dataclass(frozen=True)
class Stress:
    """One nuisance at one level of ``LEVELS``."""

    kind: Kind
    level: int

    @property
    def strength(self) -> float:
        return STRENGTHS[self.kind][self.level]


def disturb(pixels: np.ndarray, stress: Stress, name: str) -> np.ndarray:
    """A picture under stress; the same array at level 0.

    Args:
        pixels: uint8, H×W×C.
        name: of the picture; decides where corners move and light falls.

    Returns:
        uint8, H×W×C.
    """
    if not stress.strength:
        return pixels
    if stress.kind == "viewpoint":
        # Mirrored beyond the border: a plain edge there would look like a defect.
        changed = _warp(pixels, stress.strength, name, cv2.INTER_LINEAR, cv2.BORDER_REFLECT_101)
    elif stress.kind == "light":
        gain = light_field(pixels.shape[:2], stress.strength, name)
        changed = np.rint((pixels * gain[:, :, None]).clip(0, 255)).astype(np.uint8)
    else:
        changed = cv2.GaussianBlur(pixels, (0, 0), stress.strength * min(pixels.shape[:2]) / BLUR_SIDE)
    return changed.reshape(pixels.shape)


def place(mask: np.ndarray, stress: Stress, name: str, outside: bool = False) -> np.ndarray:
    """A mask that belongs to a picture under stress: moved as the picture is, nearest neighbour.

    Args:
        mask: bool H×W, of the picture's aspect.
        outside: what holds where the picture is mirrored beyond its border.
    """
    if stress.kind != "viewpoint" or not stress.strength:
        return mask
    levels = mask.astype(np.uint8)
    moved = _warp(levels, stress.strength, name, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT, border=int(outside))
    if mask.any() and not moved.any():  # a mask thinner than the pixel grid it meets
        moved = _warp(255 * levels, stress.strength, name, cv2.INTER_LINEAR, cv2.BORDER_CONSTANT, border=0)
    return moved > 0


def corners(aspect: float, strength: float, name: str) -> np.ndarray:
    """Where a picture's corners go: float32 4×2, (x, y) in shares of the sides, clockwise from the first.

    A turn and a shift of each corner; then all are drawn towards the middle as far as is needed for none to
    leave the frame, so that no defect does and every label stays true.

    Args:
        aspect: width over height.
        strength: share of a side by which a corner is shifted at most.
    """
    rng = _rng(name, "viewpoint")
    shift = rng.uniform(-1, 1, (4, 2)) * strength
    angle = np.deg2rad(rng.uniform(-1, 1) * strength * TURN)
    scale = np.array([aspect, 1.0])  # turn in units of the height, where x and y are alike
    start = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    turned = (
        (start * scale) @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / scale
    )
    moved = turned + shift
    return (moved / max(1.0, 2 * np.abs(moved).max()) + 0.5).astype(np.float32)


def light_field(shape: tuple[int, int], strength: float, name: str) -> np.ndarray:
    """Gains of uneven light: float32 H×W in [1 − strength, 1 + strength], a tilt and a soft bright spot."""
    rng = _rng(name, "light")
    angle, spot = rng.uniform(0, 2 * np.pi), rng.uniform(-0.5, 0.5, 2)
    y, x = (np.linspace(-1, 1, side, dtype=np.float32) for side in shape)
    tilt = np.cos(angle) * x[None, :] + np.sin(angle) * y[:, None]
    bump = np.exp(-2 * ((x[None, :] - spot[0]) ** 2 + (y[:, None] - spot[1]) ** 2))
    field = tilt + bump
    low, high = field.min(), field.max()
    return (1 + strength * (2 * (field - low) / (high - low) - 1)).astype(np.float32)


def _rng(name: str, kind: Kind) -> np.random.Generator:
    return np.random.default_rng(
        np.random.SeedSequence(zlib.crc32(name.encode()), spawn_key=(sorted(STRENGTHS).index(kind),))
    )


def _warp(
    pixels: np.ndarray, strength: float, name: str, interpolation: int, mode: int, border: int = 0
) -> np.ndarray:
    height, width = pixels.shape[:2]
    sides = np.array([width, height], np.float32)
    start = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32) * sides - 0.5  # edges, not centres
    end = corners(width / height, strength, name) * sides - 0.5
    matrix = cv2.getPerspectiveTransform(start, end)
    return cv2.warpPerspective(
        pixels, matrix, (width, height), flags=interpolation, borderMode=mode, borderValue=(border,) * 4
    )
