"""Defects drawn on a scene, with the words that describe them.

A defect follows what is there: a crack darkens the material and catches light on one edge, a dent bends
its shading and pattern, a bite out of a part shows the ground behind it. None of this is shared with the
generators of ``generation``; it only teaches the pocket models what the words look like.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from training.pocket.materials import Rng, Scene, colour, noise, octaves

VISIBLE = 3 / 255  # a change above this belongs to the defect
SEVERITIES = ("faint", "slight", "clear", "strong", "deep")
SEVERITY_STEPS = (0.1, 0.18, 0.35)  # mean change inside the defect, in full scale
FLOOR = 14 / 255  # mean change below which a defect is drawn again: nobody could learn from it


@dataclass(frozen=True)
class Damage:
    """Attributes: ``pixels`` float32 in [0, 1], side×side×3; ``mask`` bool, side×side; ``defect`` the name;
    ``words`` what the drawing's own numbers say of it: ``shape``, ``colour`` (either may be empty), ``size``,
    ``severity`` and ``place``."""

    pixels: np.ndarray
    mask: np.ndarray
    defect: str
    words: dict[str, str]


Drawn = tuple[np.ndarray, str, str]  # picture, shape word, colour word
Drawer = Callable[[Rng, Scene, float], Drawn]


# -- strokes and blobs --------------------------------------------------------------------------------------


def spot(rng: Rng, part: np.ndarray, margin: int = 6) -> tuple[float, float]:
    """A place on the part, away from the border of the picture where it can be: (y, x).

    Of two at random the more central one: synthesis crops around the place of its defect.
    """
    inner = part.copy()
    inner[:margin], inner[-margin:], inner[:, :margin], inner[:, -margin:] = False, False, False, False
    places = np.flatnonzero(inner if inner.any() else part)
    two = [divmod(int(at), part.shape[1]) for at in places[rng.integers(len(places), size=2)]]
    y, x = min(two, key=lambda at: (at[0] - part.shape[0] / 2) ** 2 + (at[1] - part.shape[1] / 2) ** 2)
    return float(y), float(x)


def path(
    rng: Rng, start: tuple[float, float], length: float, heading: float, wander: float, jag: float
) -> np.ndarray:
    """Points of a line that keeps its direction on the whole: float32, n×2 as (x, y), a step of 2 pixels."""
    count = max(3, int(length / 2))
    bend = np.cumsum(rng.normal(0, wander, count))
    headings = heading + bend - bend.mean() + rng.normal(0, jag, count)
    steps = np.stack([np.cos(headings), np.sin(headings)], axis=1) * 2
    points = np.concatenate([[[0.0, 0.0]], np.cumsum(steps, axis=0)])
    points -= points[count // 2]
    return (points + np.array(start[::-1])).astype(np.float32)


def stroke(side: int, points: np.ndarray, width: np.ndarray | float) -> np.ndarray:
    """An antialiased line of varying width: float32 in [0, 1], side×side. Drawn at four times the size."""
    scale = 4
    sheet = np.zeros((side * scale, side * scale), np.uint8)
    fixed = np.rint(points * scale * 16).astype(np.int32)
    widths = np.broadcast_to(np.asarray(width, np.float32), (len(points) - 1,))
    for a, b, w in zip(fixed[:-1], fixed[1:], widths, strict=True):
        cv2.line(
            sheet,
            (int(a[0]), int(a[1])),
            (int(b[0]), int(b[1])),
            255,
            max(1, round(float(w) * scale)),
            cv2.LINE_8,
            4,
        )
    return cv2.resize(sheet, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def taper(count: int, width: float, rng: Rng, ends: bool = True) -> np.ndarray:
    """Widths of a line that thins towards its end, or both ends: float32, (count,)."""
    t = np.linspace(0, 1, count)
    shape = np.sqrt(np.clip(4 * t * (1 - t), 0.02, 1)) if ends else np.sqrt(1 - 0.9 * t)
    return (width * shape * np.exp(rng.normal(0, 0.25, count))).astype(np.float32)


def blob(
    rng: Rng, side: int, centre: tuple[float, float], radius: float, rough: float, stretch: float = 1.0
) -> np.ndarray:
    """Signed depth of an irregular blob in units of its radius: positive inside; float32, side×side."""
    y, x = np.mgrid[:side, :side].astype(np.float32)
    angle = rng.uniform(0, math.pi)
    u = ((x - centre[1]) * math.cos(angle) + (y - centre[0]) * math.sin(angle)) / (
        radius * math.sqrt(stretch)
    )
    v = ((y - centre[0]) * math.cos(angle) - (x - centre[1]) * math.sin(angle)) / (
        radius / math.sqrt(stretch)
    )
    edge = rough * octaves(rng, side, max(radius * 0.9, 3), 3)
    return 1 - np.hypot(u, v) - edge


def soft(depth: np.ndarray, width: float) -> np.ndarray:
    """0 outside, 1 inside, over ``width``."""
    return np.clip(depth / max(width, 1e-3) + 0.5, 0, 1)


def offset(weight: np.ndarray, angle: float, distance: float) -> np.ndarray:
    matrix = np.array([[1, 0, math.cos(angle) * distance], [0, 1, math.sin(angle) * distance]], np.float32)
    return cv2.warpAffine(weight, matrix, weight.shape[::-1])


def mix(pixels: np.ndarray, weight: np.ndarray, other: np.ndarray) -> np.ndarray:
    w = weight[..., None]
    return pixels * (1 - w) + other * w


def tinted(rng: Rng) -> tuple[np.ndarray, str]:
    """A colour and its word."""
    word = str(
        rng.choice(
            ["black", "dark", "brown", "white", "grey", "red", "blue", "green", "yellow", "rusty"],
            p=[0.17, 0.2, 0.16, 0.16, 0.06, 0.06, 0.05, 0.04, 0.05, 0.05],
        )
    )
    ranges = {
        "black": ((0, 1), (0, 0.3), (0.0, 0.1)),
        "dark": ((0, 0.15), (0, 0.4), (0.08, 0.25)),
        "brown": ((0.04, 0.1), (0.4, 0.8), (0.2, 0.5)),
        "white": ((0, 1), (0, 0.08), (0.88, 1.0)),
        "grey": ((0, 1), (0, 0.1), (0.4, 0.65)),
        "red": ((-0.03, 0.03), (0.6, 0.95), (0.4, 0.85)),
        "blue": ((0.55, 0.68), (0.5, 0.9), (0.3, 0.8)),
        "green": ((0.25, 0.42), (0.4, 0.9), (0.25, 0.7)),
        "yellow": ((0.12, 0.17), (0.5, 0.9), (0.7, 0.95)),
        "rusty": ((0.03, 0.08), (0.6, 0.9), (0.35, 0.6)),
    }[word]
    return colour(rng, *ranges), word


# -- the defects ----------------------------------------------------------------------------------------


def crack(rng: Rng, scene: Scene, size: float) -> Drawn:
    side = len(scene.pixels)
    length = size * rng.uniform(1.6, 3.5)
    heading, width = rng.uniform(0, 2 * math.pi), np.clip(size * rng.uniform(0.05, 0.18), 1.4, 7)
    jag = rng.uniform(0.25, 0.75)
    main = path(rng, spot(rng, scene.part), length, heading, 0.12, jag)
    lines = [(main, taper(len(main) - 1, width, rng))]
    branches = int(rng.choice([0, 0, 0, 1, 2, 3]))
    for _ in range(branches):
        at = rng.integers(len(main) // 5, max(len(main) * 4 // 5, len(main) // 5 + 1))
        turn = heading + rng.choice([-1, 1]) * rng.uniform(0.4, 1.2)
        twig = path(rng, (0, 0), length * rng.uniform(0.15, 0.5), turn, 0.12, jag)
        twig = twig - twig[0] + main[at]
        lines.append((twig, taper(len(twig) - 1, width * 0.7, rng, ends=False)))
    weight = np.maximum.reduce([stroke(side, points, widths) for points, widths in lines])
    weight = cv2.GaussianBlur(weight, (0, 0), 0.5)
    light = rng.uniform(0, 2 * math.pi)
    edge = np.clip(offset(weight, light, max(1.0, width * 0.7)) - weight, 0, 1)
    pixels = scene.pixels * (1 + rng.uniform(0, 0.5) * edge[..., None])
    deep = rng.uniform(0.5, 0.97)
    floor = scene.pixels * rng.uniform(0.05, 0.35)
    pixels = mix(pixels, weight * deep, floor)
    shape = (
        "branching" if branches >= 2 else "jagged" if jag > 0.5 else "thin" if width < 2.2 else "irregular"
    )
    return pixels, shape, ""


def scratch(rng: Rng, scene: Scene, size: float) -> Drawn:
    side = len(scene.pixels)
    heading, count = rng.uniform(0, 2 * math.pi), int(rng.choice([1, 1, 1, 1, 2, 3]))
    bend = rng.choice([0.0, 0.0, 0.02, 0.05])
    y, x = spot(rng, scene.part)
    bright = rng.random() < 0.6
    weight: np.ndarray = np.zeros((side, side), np.float32)
    for _ in range(count):
        start = (y + rng.normal(0, size * 0.25) * (count > 1), x + rng.normal(0, size * 0.25) * (count > 1))
        points = path(rng, start, size * rng.uniform(1.6, 3.6), heading + rng.normal(0, 0.06), bend, 0.01)
        line = stroke(side, points, np.clip(rng.uniform(0.8, 2.0) * (1 + size / 50), 0.8, 6))
        line = line * np.clip(1 + 0.35 * noise(rng, side, 4, 4), 0.2, 1)
        weight = np.maximum(weight, line * rng.uniform(0.6, 1))
    weight = cv2.GaussianBlur(weight, (0, 0), 0.45)
    strength = rng.uniform(0.4, 0.95)
    target = np.clip(scene.pixels * 0.4 + 0.62, 0, 1) if bright else scene.pixels * rng.uniform(0.1, 0.4)
    pixels = mix(scene.pixels, weight * strength, target)
    if rng.random() < 0.5:  # the raised lip of a scratch throws a shadow
        lip = np.clip(offset(weight, rng.uniform(0, 6.28), 1.3) - weight, 0, 1)[..., None]
        pixels = pixels * (1 - (0.4 if bright else -0.3) * lip)
    return (
        pixels,
        "curved" if bend >= 0.05 else "thin" if count == 1 else "straight",
        "bright" if bright else "dark",
    )


def hole(rng: Rng, scene: Scene, size: float) -> Drawn:
    side = len(scene.pixels)
    rough = rng.choice([0.02, 0.12, 0.25])
    radius = size * rng.uniform(0.35, 0.7)
    depth = blob(rng, side, spot(rng, scene.part), radius, rough, rng.uniform(1, 1.8))
    inside = soft(depth, 1.6 / radius)
    light = rng.uniform(0, 2 * math.pi)
    floor = colour(rng, (0, 0.15), (0, 0.3), (0.0, 0.16))
    wall = np.clip(offset(inside, light, radius * rng.uniform(0.1, 0.35)), 0, 1)
    bottom = floor * (1 + 0.2 * noise(rng, side, 3, 3)[..., None]) + 0.25 * scene.pixels.mean((0, 1)) * (
        1 - wall[..., None]
    )
    rim = np.exp(-((depth * radius / rng.uniform(1, 2.5)) ** 2)) * (depth < 0.4)
    lit = np.clip(
        offset(rim.astype(np.float32), light, 1) - offset(rim.astype(np.float32), light + math.pi, 1), -1, 1
    )
    pixels = scene.pixels * (1 + rng.uniform(0.1, 0.6) * lit[..., None])
    return mix(pixels, inside * rng.uniform(0.85, 1), bottom), "round" if rough < 0.1 else "irregular", ""


def dent(rng: Rng, scene: Scene, size: float) -> Drawn:
    side = len(scene.pixels)
    y, x = spot(rng, scene.part)
    radius = size * rng.uniform(0.5, 0.9)
    stretch = rng.choice([1.0, 1.3, 2.5])
    depth = blob(rng, side, (y, x), radius, rng.uniform(0, 0.1), stretch)
    bowl = cv2.GaussianBlur(np.clip(depth, 0, 1) ** 0.7, (0, 0), max(0.8, radius * 0.12))
    slope_y, slope_x = np.gradient(bowl * radius)
    light = rng.uniform(0, 2 * math.pi)
    shade = slope_y * math.sin(light) + slope_x * math.cos(light)
    gy, gx = np.mgrid[:side, :side].astype(np.float32)
    pull = rng.uniform(0.5, 2.5)
    warped = cv2.remap(
        scene.pixels,
        gx + pull * slope_x.astype(np.float32) * 2,
        gy + pull * slope_y.astype(np.float32) * 2,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    strength = rng.uniform(0.35, 0.8)
    pixels = warped * (1 + strength * shade[..., None]) * (1 - rng.uniform(0, 0.25) * bowl[..., None])
    pixels = pixels + 0.25 * strength * np.clip(shade, 0, 1)[..., None] ** 2
    return pixels, "elongated" if stretch > 2 else "round", ""


def stain(rng: Rng, scene: Scene, size: float) -> Drawn:
    side = len(scene.pixels)
    radius = size * rng.uniform(0.5, 1.0)
    depth = blob(rng, side, spot(rng, scene.part), radius, rng.uniform(0.1, 0.35), rng.uniform(1, 2.5))
    tint, word = tinted(rng)
    inside = soft(depth, rng.uniform(0.05, 0.5))
    body = inside * np.clip(rng.uniform(0.35, 0.85) * (1 + 0.25 * octaves(rng, side, radius, 3)), 0, 1)
    if rng.random() < 0.5:  # a dried edge
        body = np.clip(body * 0.8 + 0.5 * np.exp(-((depth / 0.12) ** 2)) * (inside > 0), 0, 1)
    if word == "white" or rng.random() < 0.3:
        return mix(scene.pixels, body * 0.9, np.broadcast_to(tint, scene.pixels.shape)), "irregular", word
    wet = scene.pixels * (
        0.25 + 0.75 * tint / max(float(tint.max()), 0.2) * min(1.0, float(tint.max()) + 0.25)
    )
    return mix(scene.pixels, body, wet), "irregular", word


def speck(rng: Rng, scene: Scene, size: float) -> Drawn:
    """A spot: small, round, sharp."""
    side = len(scene.pixels)
    tint, word = tinted(rng)
    pixels, count = scene.pixels, int(rng.choice([1, 1, 1, 2, 4]))
    for _ in range(count):
        radius = max(1.5, size * rng.uniform(0.3, 0.6) / math.sqrt(count))
        depth = blob(rng, side, spot(rng, scene.part), radius, 0.04, rng.uniform(1, 1.3))
        pixels = mix(
            pixels,
            soft(depth, rng.uniform(1.2, 3) / radius) * rng.uniform(0.6, 1),
            np.broadcast_to(tint, pixels.shape),
        )
    return pixels, "round", word


def discoloration(rng: Rng, scene: Scene, size: float) -> Drawn:
    side = len(scene.pixels)
    depth = blob(
        rng,
        side,
        spot(rng, scene.part),
        size * rng.uniform(0.9, 1.5),
        rng.uniform(0.1, 0.35),
        rng.uniform(1, 2),
    )
    weight = cv2.GaussianBlur(soft(depth, rng.uniform(0.4, 0.9)), (0, 0), 1.5)
    way = rng.random()
    if way < 0.35:
        other, word = scene.pixels * rng.uniform(0.45, 0.75), "dark"
    elif way < 0.65:
        other, word = scene.pixels * 0.55 + rng.uniform(0.35, 0.45), "bright"
    else:
        tint, word = tinted(rng)
        level = scene.pixels.mean(axis=2, keepdims=True)
        other = level * tint / max(float(tint.mean()), 0.15)
    return mix(scene.pixels, weight * rng.uniform(0.5, 1), np.clip(other, 0, 1)), "irregular", word


def contamination(rng: Rng, scene: Scene, size: float) -> Drawn:
    side = len(scene.pixels)
    y, x = spot(rng, scene.part)
    tint, word = tinted(rng)
    pixels, light = scene.pixels, rng.uniform(0, 2 * math.pi)
    for _ in range(int(rng.integers(2, 12))):
        at = (y + rng.normal(0, size * 0.5), x + rng.normal(0, size * 0.5))
        radius = max(1.2, size * rng.uniform(0.08, 0.35))
        depth = blob(rng, side, at, radius, 0.3, rng.uniform(1, 3))
        weight = soft(depth, 1.4 / radius)
        pixels = pixels * (1 - 0.5 * np.clip(offset(weight, light, 1.5) - weight, 0, 1)[..., None])
        grain = np.clip(
            tint * (1 + rng.normal(0, 0.12)) * (1 + 0.12 * noise(rng, side, 2, 2)[..., None]), 0, 1
        )
        pixels = mix(pixels, weight, grain)
    return pixels, "irregular", word


def fold(rng: Rng, scene: Scene, size: float) -> Drawn:
    side = len(scene.pixels)
    heading = rng.uniform(0, 2 * math.pi)
    points = path(
        rng, spot(rng, scene.part), size * rng.uniform(1.8, 4), heading, rng.choice([0.0, 0.03, 0.08]), 0.02
    )
    width = max(1.2, size * rng.uniform(0.08, 0.2))
    line = stroke(side, points, taper(len(points) - 1, width, rng))
    ridge = cv2.GaussianBlur(line, (0, 0), width * 0.7)
    slope_y, slope_x = np.gradient(ridge)
    shade = -slope_y * math.cos(heading) + slope_x * math.sin(heading)
    shade = shade / max(float(np.abs(shade).max()), 1e-4)
    pixels = scene.pixels * (1 + rng.uniform(0.25, 0.6) * shade[..., None])
    crease = cv2.GaussianBlur(stroke(side, points, 0.8), (0, 0), 0.6)[..., None]
    pixels = pixels * (1 - rng.uniform(-0.3, 0.5) * crease)
    return pixels, "long" if len(points) > size * 2 else "curved", ""


def broken_edge(rng: Rng, scene: Scene, size: float) -> Drawn:
    """A bite out of the rim: the ground shows, and the fresh fracture is rough and lighter."""
    contour = scene.part & ~(cv2.erode(scene.part.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0)
    contour[:5], contour[-5:], contour[:, :5], contour[:, -5:] = False, False, False, False
    if not contour.any():
        raise ValueError("the part has no edge in the picture")
    return _removed(rng, scene, spot(rng, contour), size * rng.uniform(0.5, 0.9))


def missing_piece(rng: Rng, scene: Scene, size: float) -> Drawn:
    if scene.kind == "object":
        return _removed(rng, scene, spot(rng, scene.part), size * rng.uniform(0.7, 1.2))
    # A flake off a surface: another layer shows, a step lower.
    side = len(scene.pixels)
    radius = size * rng.uniform(0.6, 1.1)
    depth = blob(rng, side, spot(rng, scene.part), radius, rng.uniform(0.15, 0.35), rng.uniform(1, 1.8))
    inside = soft(depth, 1.2 / radius)
    below = np.clip(
        scene.pixels.mean((0, 1)) * rng.uniform(0.35, 1.5, 1) + rng.normal(0, 0.06, 3), 0.02, 0.98
    )
    layer = below * (1 + 0.15 * octaves(rng, side, 6, 3)[..., None])
    light = rng.uniform(0, 2 * math.pi)
    step = np.clip(inside - offset(inside, light, 2), 0, 1)[..., None]
    return np.clip(mix(scene.pixels, inside, layer), 0, 1) * (1 - 0.65 * step), "irregular", ""


def _removed(rng: Rng, scene: Scene, centre: tuple[float, float], radius: float) -> Drawn:
    side = len(scene.pixels)
    depth = blob(rng, side, centre, radius, rng.uniform(0.1, 0.3), rng.uniform(1, 1.8))
    outside = ~(cv2.dilate(scene.part.astype(np.uint8), np.ones((7, 7), np.uint8)) > 0)
    ground = np.median(scene.pixels[outside], axis=0) if outside.sum() > 50 else np.zeros(3, np.float32)
    here = scene.part.astype(np.float32)
    gone = soft(depth, 1.5 / radius) * here
    fresh = np.clip(soft(depth + rng.uniform(0.1, 0.35), 1.5 / radius) * here - gone, 0, 1)
    rough = np.clip(scene.pixels.mean((0, 1)) * rng.uniform(0.7, 1.5), 0, 1) * (
        1 + 0.18 * noise(rng, side, 2, 2)[..., None]
    )
    pixels = mix(scene.pixels, fresh, rough)
    return mix(pixels, gone, ground * (1 + 0.03 * noise(rng, side, 2, 2)[..., None])), "irregular", ""


def bent(rng: Rng, scene: Scene, size: float) -> Drawn:
    """The pattern, or the edge of the part, is pushed aside."""
    side = len(scene.pixels)
    if scene.kind == "object":
        contour = scene.part & ~(cv2.erode(scene.part.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0)
        y, x = spot(rng, contour if contour.any() else scene.part)
    else:
        y, x = spot(rng, scene.part)
    gy, gx = np.mgrid[:side, :side].astype(np.float32)
    radius = size * rng.uniform(0.7, 1.2)
    bump = np.exp(-(((gy - y) ** 2 + (gx - x) ** 2) / (2 * (radius * 0.5) ** 2))).astype(np.float32)
    angle, push = rng.uniform(0, 2 * math.pi), radius * rng.uniform(0.3, 0.6)
    pixels = cv2.remap(
        scene.pixels,
        gx + np.float32(push * math.cos(angle)) * bump,
        gy + np.float32(push * math.sin(angle)) * bump,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT_101,
    )
    slope_y, slope_x = np.gradient(bump * radius)
    shade = slope_y * math.sin(angle) + slope_x * math.cos(angle)
    return pixels * (1 + rng.uniform(0.05, 0.35) * shade[..., None]), "curved", ""


def thread(rng: Rng, scene: Scene, size: float) -> Drawn:
    side = len(scene.pixels)
    tint, word = tinted(rng)
    wander = rng.choice([0.03, 0.12, 0.25])
    points = path(
        rng, spot(rng, scene.part), size * rng.uniform(1.8, 4), rng.uniform(0, 2 * math.pi), wander, 0.0
    )
    weight = cv2.GaussianBlur(stroke(side, points, rng.uniform(1.0, 2.4) * (1 + size / 60)), (0, 0), 0.45)
    shadow = cv2.GaussianBlur(offset(weight, rng.uniform(0, 6.28), rng.uniform(1, 3)), (0, 0), 0.9)[..., None]
    pixels = scene.pixels * (1 - rng.uniform(0, 0.5) * shadow)
    return (
        mix(pixels, weight * rng.uniform(0.75, 1), np.broadcast_to(tint, pixels.shape)),
        "curved" if wander > 0.1 else "thin",
        word,
    )


def burn(rng: Rng, scene: Scene, size: float) -> Drawn:
    side = len(scene.pixels)
    depth = blob(
        rng,
        side,
        spot(rng, scene.part),
        size * rng.uniform(0.6, 1.1),
        rng.uniform(0.15, 0.35),
        rng.uniform(1, 2),
    )
    halo, core = soft(depth + 0.25, 0.8), soft(depth - 0.25, 0.6)
    brown = np.array([0.45, 0.28, 0.14], np.float32) * rng.uniform(0.6, 1.2)
    pixels = mix(scene.pixels, halo * rng.uniform(0.4, 0.8), scene.pixels * brown * 1.4)
    soot = np.full(3, rng.uniform(0.0, 0.1), np.float32) * (1 + 0.3 * noise(rng, side, 2, 2)[..., None])
    return mix(pixels, core * rng.uniform(0.6, 0.95), soot), "irregular", "dark"


DRAWERS: dict[str, Drawer] = {
    "crack": crack,
    "scratch": scratch,
    "hole": hole,
    "dent": dent,
    "stain": stain,
    "spot": speck,
    "discoloration": discoloration,
    "contamination": contamination,
    "fold": fold,
    "broken edge": broken_edge,
    "missing piece": missing_piece,
    "bent": bent,
    "thread": thread,
    "burn": burn,
}


def damage(rng: Rng, scene: Scene, defect: str | None = None) -> Damage:
    """Draws a visible defect on a scene.

    Args:
        defect: one of :data:`DRAWERS`; None draws one that the scene can have.
    """
    names = [name for name in DRAWERS if name != "broken edge" or scene.kind == "object"]
    side = len(scene.pixels)
    while True:
        name = defect or str(rng.choice(names))
        size = side * math.exp(rng.uniform(math.log(0.09), math.log(0.36)))
        try:
            drawn, shape, tint = DRAWERS[name](rng, scene, size)
        except ValueError:
            if defect:
                raise
            continue
        keep = cv2.GaussianBlur(scene.part.astype(np.float32), (0, 0), 0.7)[..., None]
        reaches = name in ("thread", "contamination", "bent")
        pixels = drawn if reaches else scene.pixels * (1 - keep) + drawn * keep
        pixels = np.clip(pixels, 0, 1).astype(np.float32)
        change = np.abs(pixels - scene.pixels).max(axis=2)
        mask = change > VISIBLE
        area = float(mask.mean())
        if mask.sum() < 12 or float(change[mask].mean()) < FLOOR or area > 0.5:
            continue
        return Damage(pixels, mask, name, _words(mask, area, float(change[mask].mean()), shape, tint))


def _words(mask: np.ndarray, area: float, level: float, shape: str, tint: str) -> dict[str, str]:
    side = len(mask)
    ys, xs = np.nonzero(mask)
    extent = max(np.ptp(ys), np.ptp(xs)) / side
    size = "tiny" if extent < 0.14 else "small" if extent < 0.28 else "medium" if extent < 0.5 else "large"
    if shape in ("thin", "straight", "curved", "long", "branching", "jagged") and size != "medium":
        size = "long" if size == "large" else "short" if size == "tiny" else size
    y, x = ys.mean() / side, xs.mean() / side
    rows = "top" if y < 0.36 else "bottom" if y > 0.64 else ""
    columns = "left" if x < 0.36 else "right" if x > 0.64 else ""
    return {
        "shape": "" if shape == "long" else shape,
        "colour": tint,
        "size": size,
        # Two words for the strongest: which one makes no difference, so the size of the mask decides.
        "severity": SEVERITIES[
            bisect_right(SEVERITY_STEPS, level) + (level >= SEVERITY_STEPS[-1]) * (len(ys) % 2)
        ],
        "place": f"{rows} {columns}".strip() or "centre",
    }
