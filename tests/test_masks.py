"""Where anomalies lie: shapes against their formulas, wanted areas, and the part that a picture shows."""

import math

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from generation.masks import SOFT, THINNEST, blobs, foreground, lens, perlin, place, resolve_location
from generation.protocol import Undrawable
from manifests.errors import PictureError, UsageError
from tests.test_generators import picture


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    height=st.integers(3, 60),
    width=st.integers(3, 200),
    pixels=st.floats(4, 2000),
    ratio=st.floats(1, 100),
    bend=st.floats(0, 0.5),
)
def test_a_lens_is_its_formula_at_every_pixel(seed, height, width, pixels, ratio, bend):
    """What the line that finds its pixels leaves out has no weight. The draw is made again to know it."""
    rng, again = (np.random.default_rng(seed) for _ in range(2))
    allowed = np.ones((height, width), bool)
    try:
        (y0, y1, x0, x1), weight = lens(rng, allowed, pixels, (ratio, ratio), bend)
    except Undrawable:
        assume(False)
    again.uniform(0, 1)  # the ratio
    angle, longest = again.uniform(0, math.pi), 0.8 * min(height, width)
    side = math.sqrt(pixels * ratio * 4 / math.pi)
    if ratio * longest < side:
        angle, longest = 0.0 if width > height else math.pi / 2, 0.8 * max(height, width)
    length = min(side, longest)
    thickness = max((pixels / length - SOFT) * 4 / math.pi, THINNEST)
    length = min(length, pixels / (thickness * math.pi / 4 + SOFT))
    arc = again.uniform(-bend, bend) * length
    y, x = place(again, allowed)
    dy, dx = np.mgrid[:height, :width] - np.array([y, x])[:, None, None]
    along = 2 / length * (dx * math.cos(angle) + dy * math.sin(angle))
    across = dy * math.cos(angle) - dx * math.sin(angle) + arc * (along**2 - 0.5)
    half = thickness / 2 * np.sqrt(np.maximum(1 - along**2, 0))
    expected = np.where(np.abs(along) < 1, np.clip(half - np.abs(across) + 0.5, 0, 1), 0)
    found = np.zeros((height, width))
    found[y0:y1, x0:x1] = weight
    tips = np.abs(np.abs(along) - 1) < 1e-4  # where rounding decides
    np.testing.assert_allclose(found[~tips], expected[~tips], atol=5e-3)


def literal_perlin(angles, height, width):
    """The formula of core.md 5.1, one pixel at a time."""
    cells_y, cells_x = angles.shape[0] - 1, angles.shape[1] - 1
    size_y, size_x = math.ceil(height / cells_y), math.ceil(width / cells_x)

    def fade(t):
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    def corner(i, j, dy, dx):
        return math.sin(angles[i, j]) * dy + math.cos(angles[i, j]) * dx

    result = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            i, j = y // size_y, x // size_x
            v, u = (y % size_y) / size_y, (x % size_x) / size_x
            top = corner(i, j, v, u) * (1 - fade(u)) + corner(i, j + 1, v, u - 1) * fade(u)
            low = corner(i + 1, j, v - 1, u) * (1 - fade(u)) + corner(i + 1, j + 1, v - 1, u - 1) * fade(u)
            result[y, x] = math.sqrt(2) * (top * (1 - fade(v)) + low * fade(v))
    return result


@pytest.mark.parametrize(("height", "width", "cells"), [(16, 16, (4, 2)), (13, 21, (3, 4)), (8, 9, (1, 1))])
def test_perlin_noise_is_the_formula(height, width, cells):
    angles = np.random.default_rng(0).uniform(0, 2 * math.pi, (cells[0] + 1, cells[1] + 1))
    noise = perlin(angles, height, width)
    np.testing.assert_allclose(noise, literal_perlin(angles, height, width), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    side=st.integers(20, 300),
    area=st.floats(0.002, 0.2),
    count=st.integers(1, 4),
)
def test_blobs_have_the_wanted_area_within_the_allowed_places(seed, side, area, count):
    allowed = np.zeros((side, side + 7), bool)
    allowed[:, side // 3 :] = True
    (y0, y1, x0, x1), region = blobs(np.random.default_rng(seed), allowed, area, count)
    assert region.shape == (y1 - y0, x1 - x0)
    assert not (region & ~allowed[y0:y1, x0:x1]).any()
    wanted = max(area * allowed.size, 4 * count)
    assert 0.6 * wanted <= region.sum() <= 1.4 * wanted + 4
    assert cv2.connectedComponents(region.astype(np.uint8), connectivity=8)[0] - 1 <= count + 2


def test_foreground_finds_a_part_and_takes_a_texture_whole():
    part = np.full((90, 100, 3), 40, np.uint8)
    cv2.ellipse(part, (50, 45), (30, 20), 15, 0, 360, (180, 120, 60), -1)
    truth = part[..., 0] > 100
    noisy = np.clip(part + np.random.default_rng(0).normal(0, 6, part.shape), 0, 255).astype(np.uint8)
    found = foreground(noisy)
    assert (found & truth).sum() / (found | truth).sum() > 0.95
    assert foreground(np.random.default_rng(0).integers(80, 160, (90, 100, 1)).astype(np.uint8)).all()
    assert foreground(np.full((9, 8, 1), 7, np.uint16)).all()
    for shape in ((1, 1, 1), (2, 3000, 3), (3000, 1, 1)):
        assert foreground(np.random.default_rng(0).integers(0, 256, shape, np.uint8)).shape == shape[:2]


def _lit(height: int, width: int, spot: tuple[float, float], spread: float, light: float) -> np.ndarray:
    """Light that fades around a spot: float, H×W×1."""
    y, x = np.mgrid[:height, :width]
    away = np.hypot(y - spot[0], x - spot[1])
    return (light * np.exp(-0.5 * (away / spread) ** 2))[..., None]


def test_a_gloss_on_the_ground_is_not_the_part():
    ground, truth = np.full((160, 120, 3), 45.0), np.zeros((160, 120), np.uint8)
    cv2.circle(truth, (60, 90), 34, 1, -1)
    glossy = ground + _lit(160, 120, (35, 60), 18, 110)  # as bright as two thirds of the part, and touches it
    drawn = np.where(truth[..., None] > 0, np.array([205.0, 160, 110]), glossy)
    noisy = np.clip(drawn + np.random.default_rng(1).normal(0, 4, drawn.shape), 0, 255).astype(np.uint8)
    found = foreground(noisy)
    assert (found & (truth > 0)).sum() / (found | (truth > 0)).sum() > 0.95


@pytest.mark.parametrize("spread", [40, 80])
def test_uneven_light_on_a_material_is_no_part(spread: int):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        y, x = rng.uniform(20, 108, 2)
        lit = 90 + _lit(128, 128, (y, x), spread, 70) + rng.normal(0, 5, (128, 128, 1))
        assert foreground(np.clip(lit, 0, 255).astype(np.uint8)).all()


def test_parts_of_a_size_count_all_and_crumbs_beside_them_do_not():
    drawn = np.full((200, 300, 1), 230, np.uint8)
    for x in (60, 150, 240):
        cv2.circle(drawn, (x, 80), 34, 60, -1)
    cv2.circle(drawn, (150, 165), 14, 60, -1)  # over 1 % of the picture
    found = foreground(drawn)
    assert [bool(found[80, x]) for x in (60, 150, 240)] == [True] * 3
    assert not found[140:, :].any()


def test_location_needs_its_mask_and_a_place():
    pixels = picture(20, 20)
    left = np.zeros((20, 20), bool)
    left[:, :10] = True
    assert (resolve_location("roi", pixels, left, ~left) == left).all()
    with pytest.raises(UsageError, match="region-of-interest"):
        resolve_location("roi", pixels)
    with pytest.raises(PictureError, match="no pixel"):
        resolve_location("anywhere", pixels, None, np.ones((20, 20), bool))
    with pytest.raises(UsageError, match="anywhere, foreground or roi"):
        resolve_location("everywhere", pixels)
