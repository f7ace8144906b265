"""The demonstration's two sources: real solar cells from a package, and parts that this file draws.

The drawn parts carry exact masks, so that the demonstration can show pixel figures too. Their defects are
drawn by rules of their own (strokes, blobs, shading, missing material), which share nothing with the
generators, and everything made from them is labelled synthetic.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import resources
from pathlib import Path

import cv2
import numpy as np

from manifests.errors import UsageError

SOLAR_LICENCE = "CC BY-NC-SA 4.0 (non-commercial use only), elpv-dataset"
DRAWN_LICENCE = "Apache-2.0, drawn by code (synthetic)"
SIDE = 256


def write_demo(folder: Path) -> Path:
    """Writes pictures and configuration of the demonstration to ``folder``; returns the configuration's path.

    What is there already stays. The pictures are the same on every machine.

    Raises:
        UsageError: the package with the solar cells is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in (("solar", write_solar), ("drawn", write_drawn)):
        done = folder / "pictures" / name / ".complete"
        if not done.exists():
            write(done.parent)
            done.touch()
    config = folder / "demo.yaml"
    config.write_text((resources.files("workflows") / "demo.yaml").read_text(encoding="utf-8"))
    return config


# -- real: solar cells ----------------------------------------------------------------------------------


def write_solar(folder: Path, train: int = 80, good: int = 40, defective: int = 60) -> None:
    """Mono- and polycrystalline cells as two categories in MVTec AD layout, without masks.

    Of the package's defect probabilities only 0 (good) and 1 (defective) are used.
    """
    try:
        from elpv_dataset.utils import load_dataset
    except ImportError:
        raise UsageError(
            "the demonstration needs the package elpv-dataset: pip install 'flawsmith[demo]'"
        ) from None
    images, probabilities, types = load_dataset()
    for kind in ("mono", "poly"):
        for name, probability, places in (
            ("good", 0.0, (("train/good", train), ("test/good", good))),
            ("defective", 1.0, (("test/defective", defective),)),
        ):
            found = iter(np.flatnonzero((types == kind) & (probabilities == probability)))
            for place, count in places:
                for _ in range(count):
                    index = next(found)
                    _write(folder / f"solar_{kind}" / place / f"{name}_{index:04d}.png", images[index])


# -- drawn: a metal ring and a woven cloth --------------------------------------------------------------


def write_drawn(folder: Path, train: int = 60, good: int = 30, each: int = 20, seed: int = 20) -> None:
    """Two categories in MVTec AD layout with exact masks: an object (ring) and a texture (cloth)."""
    for at, (category, draw, defects) in enumerate((("ring", _ring, RING), ("cloth", _cloth, CLOTH))):
        streams = np.random.SeedSequence(seed, spawn_key=(at,)).spawn(train + good + each * len(defects))
        rngs = iter(np.random.default_rng(stream) for stream in streams)
        for place, count in (("train", train), ("test", good)):
            for index in range(count):
                _write(folder / category / place / "good" / f"{index:03d}.png", draw(next(rngs))[0])
        for name, damage in defects.items():
            for index in range(each):
                rng = next(rngs)
                picture, material = draw(rng)
                damaged, mask = _damage(picture, material, damage, rng)
                _write(folder / category / "test" / name / f"{index:03d}.png", damaged)
                _write(folder / category / "ground_truth" / name / f"{index:03d}_mask.png", mask)


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.ndim == 3 else pixels
    if not cv2.imwrite(str(path), stored):
        raise OSError(f"cannot write {path}")


def _noise(rng: np.random.Generator, sigma: tuple[float, float]) -> np.ndarray:
    """Gaussian noise blurred by sigma (x, y), brought to unit deviation; float32 SIDE×SIDE."""
    noise = cv2.GaussianBlur(
        rng.standard_normal((SIDE, SIDE)).astype(np.float32), (0, 0), sigma[0], sigmaY=sigma[1]
    )
    return (noise - noise.mean()) / noise.std()


def _grid() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    return y, x


def _finish(levels: np.ndarray, tint: tuple[float, float, float], rng: np.random.Generator) -> np.ndarray:
    picture = levels[..., None] * np.array(tint, np.float32) + rng.normal(0, 1.5, (SIDE, SIDE, 3))
    return np.clip(picture, 0, 255).astype(np.uint8)


def _ring(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A turned metal ring with bolt holes on a dark belt: (RGB picture, where the metal is)."""
    y, x = _grid()
    cy, cx = SIDE / 2 + rng.uniform(-4, 4, 2)
    dy, dx = y - cy, x - cx
    radius, angle = np.hypot(dy, dx), np.arctan2(dy, dx)
    metal = (radius < 104) & (radius > 44)
    turn = rng.uniform(0, np.pi / 3)
    for k in range(6):
        hole = turn + k * np.pi / 3
        metal &= np.hypot(dy - 74 * np.sin(hole), dx - 74 * np.cos(hole)) > 9
    grooves = np.interp(radius, np.arange(120), rng.normal(0, 5, 120))  # the lathe's marks
    sheen = 22 * np.cos(2 * (angle - rng.uniform(0, np.pi)))  # anisotropic highlight of turned metal
    level = 150 + sheen + grooves + 3 * _noise(rng, (1, 1)) + rng.uniform(-8, 8)
    belt = 42 + 5 * _noise(rng, (6, 1)) + 3 * _noise(rng, (1, 1))
    edge = cv2.GaussianBlur(metal.astype(np.float32), (0, 0), 0.8)
    return _finish(belt + (level - belt) * edge, (0.97, 1.0, 1.03), rng), metal


def _cloth(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A plain weave with slightly wandering threads: (RGB picture, all of it material)."""
    y, x = _grid()
    warp = x + 1.2 * _noise(rng, (24, 24)) + rng.uniform(0, 8)
    weft = y + 1.2 * _noise(rng, (24, 24)) + rng.uniform(0, 8)
    over = np.sin(np.pi * warp / 4) * np.sin(np.pi * weft / 4)
    threads = np.where(over > 0, np.abs(np.sin(np.pi * warp / 4)), np.abs(np.sin(np.pi * weft / 4)))
    level = 95 + 70 * threads + 6 * _noise(rng, (0.8, 6)) + 6 * _noise(rng, (6, 0.8)) + rng.uniform(-6, 6)
    return _finish(level, (0.72, 0.86, 1.05), rng), np.ones((SIDE, SIDE), bool)


Damage = Callable[[np.ndarray, np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def _damage(
    picture: np.ndarray, material: np.ndarray, damage: Damage, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Applies a defect until it changes something; the mask is where levels differ by more than 2."""
    inner = cv2.erode(material.astype(np.uint8), np.ones((13, 13), np.uint8), borderValue=0)
    while True:
        changed, where = damage(picture.astype(np.float32), inner.astype(bool), rng)
        result = np.clip(np.rint(changed), 0, 255).astype(np.uint8)
        difference = np.abs(result.astype(int) - picture).max(axis=2)
        mask = cv2.morphologyEx(
            ((difference > 2) & where).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 3), np.uint8)
        )
        if mask.sum() >= 20:
            return np.where(mask[..., None] > 0, result, picture), mask * 255


def _spot(inner: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    ys, xs = np.nonzero(inner)
    at = rng.integers(len(ys))
    return int(ys[at]), int(xs[at])


def _blob(y: int, x: int, size: float, rng: np.random.Generator) -> np.ndarray:
    """An irregular soft-edged blob in [0, 1] around one place."""
    gy, gx = _grid()
    angle = rng.uniform(0, np.pi)
    u = (gx - x) * np.cos(angle) + (gy - y) * np.sin(angle)
    v = (gy - y) * np.cos(angle) - (gx - x) * np.sin(angle)
    distance = np.hypot(u / rng.uniform(0.8, 1.6), v) / size + 0.25 * _noise(rng, (5, 5))
    return np.clip((1.1 - distance) / 0.25, 0, 1)


def _scratch(picture: np.ndarray, inner: np.ndarray, rng: np.random.Generator):
    y, x = _spot(inner, rng)
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(25, 80)
    bend = rng.normal(0, 0.006)
    steps = np.arange(0, length)
    headings = angle + bend * steps
    points = np.stack([x + np.cumsum(np.cos(headings)), y + np.cumsum(np.sin(headings))], axis=1)
    line = np.zeros((SIDE, SIDE), np.uint8)
    cv2.polylines(
        line, [np.rint(points * 16).astype(np.int32)], False, 255, int(rng.integers(1, 3)), cv2.LINE_AA, 4
    )
    weight = (line / 255.0 * inner)[..., None]
    return picture + weight * rng.choice([-1, 1]) * rng.uniform(25, 70), weight[..., 0] > 0


def _stain(picture: np.ndarray, inner: np.ndarray, rng: np.random.Generator):
    weight = (_blob(*_spot(inner, rng), rng.uniform(6, 22), rng) * inner)[..., None]
    colour = np.array([0.75, 0.6, 0.4]) + rng.normal(0, 0.05, 3)
    return picture * (1 - weight * rng.uniform(0.25, 0.7) * (1 - colour)), weight[..., 0] > 0


def _dent(picture: np.ndarray, inner: np.ndarray, rng: np.random.Generator):
    """Shading of a shallow pit: bright on one side, dark on the other."""
    y, x = _spot(inner, rng)
    gy, gx = _grid()
    size, light = rng.uniform(5, 12), rng.uniform(0, 2 * np.pi)
    bowl = np.exp(-((gy - y) ** 2 + (gx - x) ** 2) / (2 * size**2))
    slope = ((gx - x) * np.cos(light) + (gy - y) * np.sin(light)) / size * bowl * inner
    return picture + (slope * rng.uniform(30, 70))[..., None], np.abs(slope) > 0.02


def _hole(picture: np.ndarray, inner: np.ndarray, rng: np.random.Generator):
    weight = (_blob(*_spot(inner, rng), rng.uniform(3, 9), rng) * inner)[..., None]
    return picture * (1 - weight) + weight * rng.uniform(15, 40), weight[..., 0] > 0


def _slub(picture: np.ndarray, inner: np.ndarray, rng: np.random.Generator):
    """A thick or missing thread: a straight band along the weave, a few threads long."""
    y, x = _spot(inner, rng)
    length, width = int(rng.integers(30, 110)), int(rng.integers(3, 6))
    band = np.zeros((SIDE, SIDE), np.float32)
    if rng.random() < 0.5:
        band[max(0, y - width) : y + width, max(0, x - length // 2) : x + length // 2] = 1
    else:
        band[max(0, y - length // 2) : y + length // 2, max(0, x - width) : x + width] = 1
    weight = cv2.GaussianBlur(band, (0, 0), 0.7)[..., None]
    thread = picture.mean(axis=(0, 1)) + rng.choice([-1, 1]) * rng.uniform(20, 45)
    return picture * (1 - 0.75 * weight) + 0.75 * weight * thread, weight[..., 0] > 0.01


RING: dict[str, Damage] = {"scratch": _scratch, "stain": _stain, "dent": _dent}
CLOTH: dict[str, Damage] = {"slub": _slub, "stain": _stain, "hole": _hole}
