"""Surfaces and parts drawn by code: the normal pictures that the pocket models learn from.

A scene is float32 in [0, 1], side×side×3, RGB. Every surface is a function of a random stream alone; what
varies within a surface (scale, direction, contrast, colour) varies widely on purpose, because the pictures
that users bring look like none of these.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np

Rng = np.random.Generator
GENERIC_NOUNS = ("surface", "object", "part", "material", "texture", "product", "piece", "sample")


@dataclass(frozen=True)
class Scene:
    """A normal picture.

    Attributes:
        pixels: float32 in [0, 1], side×side×3.
        part: bool, side×side; where the part is; everything on a texture.
        noun: what a caption calls it.
        kind: ``texture`` or ``object``.
    """

    pixels: np.ndarray
    part: np.ndarray
    noun: str
    kind: str


# -- noise ------------------------------------------------------------------------------------------------


def noise(rng: Rng, side: int, cell_y: float, cell_x: float) -> np.ndarray:
    """Smooth noise of unit deviation with features of about ``cell`` pixels: float32, side×side."""
    shape = [max(2, math.ceil(side / max(cell, 1)) + 2) for cell in (cell_y, cell_x)]
    coarse = rng.standard_normal(shape, np.float32)
    size = (math.ceil(shape[1] * max(cell_x, 1)), math.ceil(shape[0] * max(cell_y, 1)))
    fine = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)
    top, left = rng.integers(0, size[1] - side + 1), rng.integers(0, size[0] - side + 1)
    fine = fine[top : top + side, left : left + side]
    return (fine - fine.mean()) / max(float(fine.std()), 1e-6)


def octaves(
    rng: Rng, side: int, cell: float, count: int = 4, fall: float = 0.6, stretch: float = 1.0
) -> np.ndarray:
    """Noise over several scales, each half the size and ``fall`` times the strength: unit deviation."""
    total = sum(
        fall**k * noise(rng, side, cell / 2**k / math.sqrt(stretch), cell / 2**k * math.sqrt(stretch))
        for k in range(count)
        if cell / 2**k >= 1
    )
    total = np.asarray(total, np.float32)
    return (total - total.mean()) / max(float(total.std()), 1e-6)


def turned(rng: Rng, draw: Callable[[int], np.ndarray], side: int) -> np.ndarray:
    """A pattern turned by a random angle, often by none."""
    if rng.random() < 0.4:
        pattern = draw(side)
        return np.ascontiguousarray(np.rot90(pattern)) if rng.random() < 0.5 else pattern
    big = math.ceil(side * 1.45)
    centre = (big - 1) / 2
    matrix = cv2.getRotationMatrix2D((centre, centre), rng.uniform(0, 360), 1)
    pattern = cv2.warpAffine(draw(big), matrix, (big, big), borderMode=cv2.BORDER_REFLECT_101)
    at = (big - side) // 2
    return pattern[at : at + side, at : at + side]


def colour(
    rng: Rng, hue: tuple[float, float], saturation: tuple[float, float], value: tuple[float, float]
) -> np.ndarray:
    """A random colour, hue in turns: float32, (3,)."""
    hsv = np.array(
        [[[rng.uniform(*hue) % 1 * 360, rng.uniform(*saturation), rng.uniform(*value)]]], np.float32
    )
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0]


def painted(
    level: np.ndarray, base: np.ndarray, contrast: float, other: np.ndarray | None = None
) -> np.ndarray:
    """A pattern of unit deviation as brightness around ``base``, or as a blend towards ``other``."""
    if other is None:
        return base * (1 + contrast * level[..., None])
    weight = np.clip(0.5 + level * contrast, 0, 1)[..., None]
    return base * (1 - weight) + other * weight


def gradient(rng: Rng, side: int) -> np.ndarray:
    """Slow change of light across the picture: float32, side×side, about 1."""
    y, x = np.mgrid[:side, :side].astype(np.float32) / side - 0.5
    angle = rng.uniform(0, 2 * math.pi)
    light = 1 + rng.uniform(0, 0.35) * (y * math.sin(angle) + x * math.cos(angle))
    if rng.random() < 0.3:
        light = light * (1 - rng.uniform(0, 0.6) * (y * y + x * x))
    return light.astype(np.float32)


# -- surfaces -----------------------------------------------------------------------------------------------


def metal(rng: Rng, side: int) -> np.ndarray:
    base = colour(rng, (0.05, 0.65), (0.0, 0.12), (0.3, 0.85))
    way = rng.random()
    if way < 0.55:  # brushed
        length = rng.uniform(20, 120)
        level = turned(
            rng,
            lambda n: (
                0.8 * noise(rng, n, rng.uniform(1, 2), length)
                + 0.5 * noise(rng, n, rng.uniform(2, 6), length)
            ),
            side,
        )
    elif way < 0.8:  # cast or blasted
        level = octaves(rng, side, rng.uniform(2, 10), 3)
    else:  # polished
        level = 0.3 * octaves(rng, side, rng.uniform(20, 80), 3)
    sheen = turned(rng, lambda n: noise(rng, n, n, rng.uniform(n / 4, n)), side)
    return painted(level, base, rng.uniform(0.01, 0.12)) * (1 + rng.uniform(0, 0.15) * sheen[..., None])


def concrete(rng: Rng, side: int) -> np.ndarray:
    base = colour(rng, (0.05, 0.15), (0.0, 0.12), (0.4, 0.8))
    level = octaves(rng, side, rng.uniform(10, 60), 5, rng.uniform(0.5, 0.9))
    picture = painted(level, base, rng.uniform(0.03, 0.12))
    pores = np.clip(noise(rng, side, rng.uniform(2, 5), rng.uniform(2, 5)) - rng.uniform(1.8, 2.6), 0, 1)
    return picture * (1 - rng.uniform(0, 0.6) * pores[..., None])


def fabric(rng: Rng, side: int) -> np.ndarray:
    base = colour(rng, (0, 1), (0, 0.6), (0.25, 0.9))
    period = rng.uniform(3, 16)
    shift = rng.integers(1, 4)
    other = base * rng.uniform(0.5, 1.2)

    def weave(n: int) -> np.ndarray:
        y, x = np.mgrid[:n, :n].astype(np.float32)
        wander = rng.uniform(0, 0.25) * period
        x = x + wander * noise(rng, n, 30, 30)
        y = y + wander * noise(rng, n, 30, 30)
        u, v = x / period, y / period
        warp = np.abs(np.sin(math.pi * u))
        weft = np.abs(np.sin(math.pi * v))
        over = (np.floor(u) + shift * np.floor(v)) % (shift + 1) == 0
        fibre = 0.25 * noise(rng, n, 1, 4)
        return np.where(over, warp, weft * rng.uniform(0.6, 1)) + fibre

    level = turned(rng, weave, side)
    level = (level - level.mean()) / level.std()
    way = other if rng.random() < 0.5 else None
    return painted(level, base, rng.uniform(0.05, 0.3), way)


def knit(rng: Rng, side: int) -> np.ndarray:
    base = colour(rng, (0, 1), (0, 0.7), (0.3, 0.9))
    period = rng.uniform(6, 18)

    def loops(n: int) -> np.ndarray:
        y, x = np.mgrid[:n, :n].astype(np.float32)
        u = x / period
        v = (y + 0.5 * period * np.abs(((u * 2) % 2) - 1)) / (period * 0.6)
        return np.sin(2 * math.pi * v) * 0.7 + np.cos(2 * math.pi * u) * 0.6 + 0.3 * noise(rng, n, 1.5, 1.5)

    return painted(turned(rng, loops, side), base, rng.uniform(0.08, 0.25))


def wood(rng: Rng, side: int) -> np.ndarray:
    dark = colour(rng, (0.04, 0.1), (0.3, 0.7), (0.2, 0.5))
    light = colour(rng, (0.06, 0.12), (0.2, 0.55), (0.55, 0.9))
    rings = rng.uniform(6, 40)

    def grain(n: int) -> np.ndarray:
        y, _ = np.mgrid[:n, :n].astype(np.float32)
        bend = rng.uniform(3, 14) * noise(rng, n, rng.uniform(20, 60), rng.uniform(60, 200))
        wave = np.sin(2 * math.pi * (y + bend) / rings)
        return 0.6 * wave + 0.5 * noise(rng, n, 1.3, rng.uniform(20, 80)) + 0.3 * noise(rng, n, 4, 120)

    return painted(turned(rng, grain, side), dark, rng.uniform(0.15, 0.4), light)


def plastic(rng: Rng, side: int) -> np.ndarray:
    base = colour(rng, (0, 1), (0, 0.8), (0.1, 0.95))
    level = octaves(rng, side, rng.uniform(1.5, 5), 2) if rng.random() < 0.6 else noise(rng, side, 40, 40)
    return painted(level, base, rng.uniform(0.005, 0.05))


def leather(rng: Rng, side: int) -> np.ndarray:
    base = colour(rng, (0.0, 0.12), (0.1, 0.7), (0.15, 0.7))
    cell = rng.uniform(3, 10)
    level = -np.abs(noise(rng, side, cell, cell)) - 0.6 * np.abs(noise(rng, side, cell * 1.7, cell * 1.7))
    level = (level - level.mean()) / level.std()
    return painted(level, base, rng.uniform(0.06, 0.25)) * (1 + 0.05 * octaves(rng, side, 40, 3)[..., None])


def paper(rng: Rng, side: int) -> np.ndarray:
    base = colour(rng, (0.05, 0.2), (0.0, 0.2), (0.6, 0.97))
    level = octaves(rng, side, rng.uniform(2, 8), 3, 0.8) + 0.4 * noise(rng, side, 1.5, rng.uniform(3, 12))
    return painted(level, base, rng.uniform(0.008, 0.06))


def tile(rng: Rng, side: int) -> np.ndarray:
    base = colour(rng, (0, 1), (0, 0.4), (0.4, 0.95))
    body = painted(octaves(rng, side, rng.uniform(5, 50), 4), base, rng.uniform(0.01, 0.12))
    width, height = rng.uniform(30, 120, 2)
    grout = rng.uniform(1.5, 5)
    running = rng.choice([0.0, 0.5])

    def joints(n: int) -> np.ndarray:
        y, x = np.mgrid[:n, :n].astype(np.float32) + rng.uniform(0, 100)
        row = np.floor(y / height)
        dx = (x + running * width * (row % 2)) % width
        return ((dx < grout) | (y % height < grout)).astype(np.float32)

    joint = cv2.GaussianBlur(turned(rng, joints, side), (0, 0), rng.uniform(0.5, 1))[..., None]
    filler = colour(rng, (0, 1), (0, 0.15), (0.15, 0.9))
    return body * (1 - joint) + filler * joint * (1 + 0.08 * noise(rng, side, 2, 2)[..., None])


def stone(rng: Rng, side: int) -> np.ndarray:
    """Granite or terrazzo: specks of a few colours; or marble: veins."""
    base = colour(rng, (0, 1), (0, 0.3), (0.3, 0.9))
    if rng.random() < 0.4:
        vein = np.abs(octaves(rng, side, rng.uniform(30, 100), 5, 0.7))
        picture = painted(octaves(rng, side, 60, 4), base, 0.04)
        return picture * (1 - rng.uniform(0.2, 0.6) * np.exp(-((vein / 0.15) ** 2)))[..., None]
    picture = painted(octaves(rng, side, 30, 4), base, 0.06)
    for _ in range(rng.integers(2, 4)):
        cell = rng.uniform(2, 8)
        speck = np.clip((noise(rng, side, cell, cell) - rng.uniform(0.6, 1.5)) * 3, 0, 1)[..., None]
        picture = picture * (1 - speck) + speck * colour(rng, (0, 1), (0, 0.4), (0.05, 0.95))
    return picture


def rubber(rng: Rng, side: int) -> np.ndarray:
    base = colour(rng, (0, 1), (0, 0.3), (0.06, 0.4))
    return painted(octaves(rng, side, rng.uniform(1.5, 8), 3), base, rng.uniform(0.03, 0.2))


def carpet(rng: Rng, side: int) -> np.ndarray:
    base = colour(rng, (0, 1), (0, 0.6), (0.2, 0.8))
    cell = rng.uniform(1.5, 5)
    level = noise(rng, side, cell, cell) + 0.6 * noise(rng, side, cell * 2, cell * 2)
    return painted(level, base, rng.uniform(0.1, 0.3))


def mesh(rng: Rng, side: int) -> np.ndarray:
    """A regular grid or perforated sheet."""
    base = colour(rng, (0, 1), (0, 0.3), (0.3, 0.9))
    behind = colour(rng, (0, 1), (0, 0.3), (0.02, 0.5))
    period, open_ = rng.uniform(8, 26), rng.uniform(0.25, 0.42)
    round_ = rng.random() < 0.5

    def holes(n: int) -> np.ndarray:
        y, x = np.mgrid[:n, :n].astype(np.float32) / period
        u, v = np.abs(x % 1 - 0.5), np.abs(y % 1 - 0.5)
        inside = np.hypot(u, v) < open_ if round_ else np.maximum(u, v) < open_
        return inside.astype(np.float32)

    hole = cv2.GaussianBlur(turned(rng, holes, side), (0, 0), rng.uniform(0.6, 1.2))[..., None]
    front = painted(octaves(rng, side, 10, 3), base, rng.uniform(0.01, 0.08))
    return front * (1 - hole) + behind * hole


def printed(rng: Rng, side: int) -> np.ndarray:
    """Lines and rectangles on a plain ground: boards, panels, cells, labels."""
    ground = colour(rng, (0, 1), (0, 0.7), (0.05, 0.9))
    ink = colour(rng, (0, 1), (0, 0.5), (0.1, 1.0))
    sheet: np.ndarray = np.zeros((side, side), np.float32)
    for _ in range(rng.integers(3, 14)):
        x, y = rng.integers(0, side, 2)
        if rng.random() < 0.5:
            w, h = rng.integers(2, side // 2, 2)
            cv2.rectangle(sheet, (int(x), int(y)), (int(x + w), int(y + h)), 1.0, int(rng.choice([-1, 1, 2])))
        elif rng.random() < 0.5:
            cv2.line(sheet, (0, int(y)), (side, int(y)), 1.0, int(rng.integers(1, 4)))
        else:
            cv2.line(sheet, (int(x), 0), (int(x), side), 1.0, int(rng.integers(1, 4)))
    sheet = cv2.GaussianBlur(sheet, (0, 0), rng.uniform(0.4, 1.0))
    picture = painted(octaves(rng, side, 8, 3), ground, rng.uniform(0.01, 0.1))
    weight = (sheet * rng.uniform(0.3, 1))[..., None]
    return picture * (1 - weight) + ink * weight


def spectral(rng: Rng, side: int) -> np.ndarray:
    """Noise of a random power law and anisotropy: statistics of a surface without its meaning."""
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None, :]
    angle, stretch = rng.uniform(0, math.pi), math.exp(rng.uniform(0, 2))
    u = fx * math.cos(angle) + fy * math.sin(angle)
    v = (fy * math.cos(angle) - fx * math.sin(angle)) * stretch
    radius = np.sqrt(u * u + v * v) + 1 / side
    spectrum = (
        rng.standard_normal(radius.shape) + 1j * rng.standard_normal(radius.shape)
    ) * radius ** -rng.uniform(0.6, 2)
    level = np.fft.irfft2(spectrum, s=(side, side)).astype(np.float32)
    level = (level - level.mean()) / level.std()
    first, second = (colour(rng, (0, 1), (0, 0.5), (0.1, 0.95)) for _ in range(2))
    return painted(level, first, rng.uniform(0.05, 0.35), second if rng.random() < 0.5 else None)


SURFACES: dict[str, tuple[Callable[[Rng, int], np.ndarray], tuple[str, ...]]] = {
    "metal": (metal, ("metal", "steel", "metal plate", "aluminium")),
    "concrete": (concrete, ("concrete", "cement", "wall")),
    "fabric": (fabric, ("fabric", "cloth", "textile")),
    "knit": (knit, ("knitted fabric", "knit")),
    "wood": (wood, ("wood", "wooden board", "plank")),
    "plastic": (plastic, ("plastic", "plastic part", "painted surface")),
    "leather": (leather, ("leather",)),
    "paper": (paper, ("paper", "sheet of paper", "cardboard")),
    "tile": (tile, ("tile", "tiles", "bricks")),
    "stone": (stone, ("stone", "granite", "marble")),
    "rubber": (rubber, ("rubber",)),
    "carpet": (carpet, ("carpet", "felt")),
    "mesh": (mesh, ("mesh", "grid", "perforated sheet")),
    "printed": (printed, ("circuit board", "printed sheet", "panel")),
    "spectral": (spectral, GENERIC_NOUNS),
}


# -- parts --------------------------------------------------------------------------------------------------


def _disc(rng: Rng, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return 1 - np.hypot(u, v * rng.uniform(1, 1.3))


def _ring(rng: Rng, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    inner = rng.uniform(0.2, 0.65)
    radius = np.hypot(u, v)
    return np.minimum(1 - radius, radius - inner) * (1 / (1 - inner))


def _plate(rng: Rng, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    round_ = rng.uniform(0.05, 0.4)
    tall = rng.uniform(0.3, 1)
    x, y = np.maximum(np.abs(u) - 1 + round_, 0), np.maximum(np.abs(v) - tall + round_, 0)
    inside = np.minimum(1 - np.abs(u), tall - np.abs(v))
    return np.minimum(inside, round_ - np.hypot(x, y))


def _capsule(rng: Rng, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    radius = rng.uniform(0.25, 0.6)
    return radius - np.hypot(np.maximum(np.abs(u) - 1 + radius, 0), v)


def _nut(rng: Rng, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    angle = np.arctan2(v, u)
    count = int(rng.integers(4, 9))
    folded = (angle % (2 * math.pi / count)) - math.pi / count
    radius = np.hypot(u, v)
    body = 1 - radius * np.cos(folded)
    return np.minimum(body, radius - rng.uniform(0.2, 0.5)) if rng.random() < 0.6 else body


def _lump(rng: Rng, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    angle, radius = np.arctan2(v, u), np.hypot(u, v)
    edge = 0.9 + sum(rng.normal(0, 0.12 / k) * np.cos(k * angle + rng.uniform(0, 6.3)) for k in range(1, 6))
    return edge - radius * rng.uniform(1, 1.3)


def _gear(rng: Rng, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    angle, radius = np.arctan2(v, u), np.hypot(u, v)
    teeth = np.clip(2 * np.sin(angle * int(rng.integers(8, 22))), -1, 1)
    return np.minimum(0.9 + 0.08 * teeth - radius, radius - rng.uniform(0.1, 0.4))


PARTS: dict[str, tuple[Callable[[Rng, np.ndarray, np.ndarray], np.ndarray], tuple[str, ...]]] = {
    "disc": (_disc, ("disc", "cap", "button", "lid", "coin")),
    "ring": (_ring, ("ring", "washer", "seal", "gasket")),
    "plate": (_plate, ("plate", "block", "card", "board", "tray")),
    "capsule": (_capsule, ("capsule", "pill", "tube", "pin")),
    "nut": (_nut, ("nut", "bolt", "knob")),
    "lump": (_lump, ("stone", "nut", "biscuit", "bean", "piece", "fruit")),
    "gear": (_gear, ("gear", "wheel")),
}


def part(rng: Rng, side: int) -> Scene:
    """A part of a random shape and material, lit from a side, on a plain ground."""
    shape, nouns = PARTS[str(rng.choice(list(PARTS)))]
    surface, names = SURFACES[
        str(
            rng.choice(
                ["metal", "plastic", "wood", "stone", "rubber", "leather", "spectral", "printed", "concrete"]
            )
        )
    ]
    y, x = np.mgrid[:side, :side].astype(np.float32)
    radius = side * rng.uniform(0.28, 0.62)
    cy, cx = side / 2 + rng.normal(0, 0.08 * side, 2)
    angle = rng.uniform(0, 2 * math.pi) if rng.random() < 0.7 else 0.0
    u = ((x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)) / radius
    v = ((y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)) / radius
    depth = shape(rng, u, v).astype(np.float32)
    inside = depth > 0
    if not 0.08 < inside.mean() < 0.98:
        return part(rng, side)
    skin = surface(rng, side)
    # Roundness: a height that rises over ``bevel``, shaded by its slope towards the light.
    bevel = rng.uniform(0.05, 0.9)
    height = np.sqrt(np.clip(depth / bevel, 0, 1) * (2 - np.clip(depth / bevel, 0, 1)))
    height = cv2.GaussianBlur(height.astype(np.float32), (0, 0), 1.0)
    light = rng.uniform(0, 2 * math.pi)
    slope_y, slope_x = np.gradient(height * radius * bevel)
    shade = 1 + rng.uniform(0.05, 0.35) * np.clip(
        slope_y * math.sin(light) + slope_x * math.cos(light), -1.5, 1.5
    )
    skin = skin * shade[..., None]
    ground = colour(rng, (0, 1), (0, 0.25), (0.0, 1.0))
    back = painted(octaves(rng, side, rng.uniform(2, 40), 3), ground, rng.uniform(0.0, 0.08))
    if rng.random() < 0.5:  # cast shadow
        shadow = cv2.GaussianBlur(inside.astype(np.float32), (0, 0), rng.uniform(1, 5))
        back = back * (1 - rng.uniform(0.1, 0.6) * np.roll(shadow, rng.integers(-4, 5, 2), (0, 1)))[..., None]
    soft = cv2.GaussianBlur(inside.astype(np.float32), (0, 0), rng.uniform(0.5, 0.9))[..., None]
    noun = str(rng.choice(nouns))
    if rng.random() < 0.5:
        noun = f"{rng.choice(names)} {noun}" if surface is not spectral else noun
    return Scene((back * (1 - soft) + skin * soft).astype(np.float32), inside, noun, "object")


# -- scenes -------------------------------------------------------------------------------------------------


def texture_crop(rng: Rng, side: int, picture: np.ndarray) -> np.ndarray:
    """A random piece of a photograph, of random zoom, turn and mirror: float32 in [0, 1], side×side×3.

    Args:
        picture: uint8, H×W×3.
    """
    height, width = picture.shape[:2]
    limit = min(height, width)
    piece = int(np.clip(side * math.exp(rng.uniform(math.log(0.5), math.log(2.5))), 32, limit))
    top, left = rng.integers(0, height - piece + 1), rng.integers(0, width - piece + 1)
    crop = picture[top : top + piece, left : left + piece]
    way = cv2.INTER_AREA if piece > side else cv2.INTER_CUBIC
    crop = cv2.resize(crop, (side, side), interpolation=way).astype(np.float32) / 255
    crop = np.rot90(crop, int(rng.integers(4)))
    return np.ascontiguousarray(crop[:, ::-1] if rng.random() < 0.5 else crop)


def scene(rng: Rng, side: int, photographs: Sequence[tuple[str, np.ndarray]] = ()) -> Scene:
    """A random normal picture: a drawn surface, a piece of a photograph, or a part.

    Args:
        side: in pixels.
        photographs: (noun, uint8 H×W×3) of free textures; a third of the scenes with them, none without.
    """
    everything = np.ones((side, side), np.bool_)
    draw = rng.random()
    if draw < 0.3:
        found = part(rng, side)
        pixels, noun = found.pixels, found.noun
        everything, kind = found.part, "object"
    elif photographs and draw < 0.65:
        noun, picture = photographs[int(rng.integers(len(photographs)))]
        pixels, kind = texture_crop(rng, side, picture), "texture"
    else:
        surface, nouns = SURFACES[str(rng.choice(list(SURFACES)))]
        zoom = rng.random() < 0.35  # small pieces enlarged: what the crop around a small defect looks like
        small = int(side / rng.uniform(1.3, 3)) if zoom else side
        pixels, noun, kind = surface(rng, small), str(rng.choice(nouns)), "texture"
        if zoom:
            pixels = cv2.resize(np.asarray(pixels, np.float32), (side, side), interpolation=cv2.INTER_CUBIC)
    pixels = _varied(rng, np.float32(pixels) * gradient(rng, side)[..., None])
    return Scene(pixels, everything, noun, kind)


def _varied(rng: Rng, pixels: np.ndarray) -> np.ndarray:
    """Exposure, contrast, tint, grey, blur and sensor noise as cameras give them."""
    pixels = np.clip(pixels, 0, 1) ** np.float32(math.exp(rng.normal(0, 0.25)))
    if rng.random() < 0.35:
        pixels = np.repeat(pixels.mean(axis=2, keepdims=True), 3, axis=2)
    elif rng.random() < 0.3:
        pixels = pixels * rng.uniform(0.8, 1.2, 3).astype(np.float32)
    if rng.random() < 0.4:
        mean = pixels.mean()
        pixels = mean + (pixels - mean) * np.float32(rng.uniform(0.5, 1.3)) + np.float32(rng.normal(0, 0.08))
    if rng.random() < 0.25:
        pixels = cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.4, 1.3))
    if rng.random() < 0.5:
        grain = rng.standard_normal(pixels.shape[:2], np.float32)[..., None]
        pixels = pixels + np.float32(rng.uniform(0.002, 0.02)) * grain
    return np.clip(pixels, 0, 1).astype(np.float32)
