"""Where an anomaly lies: Perlin noise, blobs of a wanted area, soft edges, and the allowed places."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np

from generation.protocol import Box, Undrawable
from manifests.errors import PictureError, UsageError

NOISE_SIDE = 64  # grid on which a small blob's noise is computed, enlarged where needed: the noise is smooth
TRIES = 12  # places and shapes tried for one blob before the draw is given up
STEPS = 6  # of the search for a blob's threshold; nearly always one or two are taken
SMALLEST = 4  # pixels of the smallest blob
MARGIN = 4  # pixels around a region in its box, so that soft edges and filters see their surroundings
SOFT = 0.9  # pixels of width that a lens's soft edges add
CHORDS = 16  # straight pieces of a bent middle line
THINNEST = 0.6  # pixels of a lens's width before its edges are softened; thinner lines would be transparent
STROKE_RATIOS, STROKE_BEND = (5.0, 20.0), 0.12  # length over thickness of a stroke, and its bend
STEEP = 3.0  # how much steeper the edge of a part is than the middle of all places
LOOKED_AT = 256  # pixels of the side at which that edge is looked for
ASPECT = 2.5  # of ellipses and rectangles
Shape = Literal["blob", "stroke", "ellipse", "rectangle", "whole"]
_SQUARE = np.ones((3, 3), np.uint8)
_T = np.linspace(-1, 1, CHORDS + 1)
_CURVE = np.stack([_T, 0.5 - _T * _T, np.ones_like(_T)], axis=1)  # times half a length, a bend, a middle


def perlin(angles: np.ndarray, height: int, width: int) -> np.ndarray:
    """Perlin gradient noise (core.md 5.1), as products of matrices.

    At a pixel the noise is a sum over its four lattice corners of (slope towards the corner) × (fade along
    the other axis), and each factor depends on one coordinate only. In float64, so that the processor's way
    of adding never shows in the result.

    Args:
        angles: float, (cells_y + 1)×(cells_x + 1); directions of the lattice gradients in radians.
        height, width: of the result; if they are no multiples of the cell counts, a larger one is cropped.

    Returns:
        float32, height×width, within about [−1, 1].
    """
    fade_y, slope_y = _basis(angles.shape[0] - 1, height)
    fade_x, slope_x = _basis(angles.shape[1] - 1, width)
    across = np.concatenate([np.sin(angles) @ fade_x.T, np.cos(angles) @ slope_x.T])
    return (np.concatenate([slope_y, fade_y], axis=1) @ (math.sqrt(2) * across)).astype(np.float32)


@lru_cache(maxsize=256)
def _basis(cells: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis: weight of each lattice line at each pixel, and that weight times the distance from the
    line in cells. Both float64, length×(cells + 1)."""
    size = -(-length // cells)
    cell, step = np.divmod(np.arange(length), size)
    t = step / size
    far = t * t * t * (t * (t * 6 - 15) + 10)
    fade = np.zeros((length, cells + 1))
    slope = np.zeros((length, cells + 1))
    pixel = np.arange(length)
    fade[pixel, cell], fade[pixel, cell + 1] = 1 - far, far
    slope[pixel, cell], slope[pixel, cell + 1] = (1 - far) * t, far * (t - 1)
    return fade, slope


def fractal(rng: np.random.Generator, side: int, cells_y: int, cells_x: int, octaves: int = 3) -> np.ndarray:
    """Perlin noise plus finer octaves, each of half the strength: float32, side×side."""
    total = np.zeros((side, side), np.float32)
    for octave in range(octaves):
        shape = [min(cells << octave, max(side // 2, 1)) + 1 for cells in (cells_y, cells_x)]
        total += np.float32(0.5**octave) * perlin(rng.uniform(0, 2 * math.pi, shape), side, side)
    return total


def blobs(rng: np.random.Generator, allowed: np.ndarray, area: float, count: int) -> tuple[Box, np.ndarray]:
    """Perlin-shaped regions that together cover a wanted share of the picture, as one: see
    :func:`blob_parts`.

    Returns:
        A box with a margin of 4 pixels where the picture has them, and the region in it: bool, h×w.
    """
    return union(blob_parts(rng, allowed, area, count), allowed.shape)


def blob_parts(
    rng: np.random.Generator, allowed: np.ndarray, area: float, count: int
) -> list[tuple[Box, np.ndarray]]:
    """Perlin-shaped regions that together cover a wanted share of the picture.

    Each blob is the largest connected part of {noise − elliptical distance > t} around a random allowed
    place, with t such that this part has the wanted size. The noise is fractal Perlin noise with a random,
    anisotropic lattice and a random rotation (core.md 5.1); the falloff, and so a wanted area in place of a
    fixed threshold, is inference. Sizes of several blobs differ by up to a factor of three.

    Args:
        rng: consumed.
        allowed: bool, H×W; the blobs lie within.
        area: wanted share of the picture, in (0, 1]; a blob has at least 4 pixels.
        count: blobs, at least 1; fewer where two grow together.

    Returns:
        Of each blob a tight box and the region in it: bool, h×w.

    Raises:
        Undrawable: no room for one of the blobs.
    """
    shares = rng.uniform(1, 3, count)
    sizes = np.maximum(shares / shares.sum() * area * allowed.size, SMALLEST)
    parts: list[tuple[Box, np.ndarray]] = []
    for size in sizes:
        for _ in range(TRIES):
            part = _blob(rng, allowed, float(size), parts)
            if part is not None:
                parts.append(part)
                break
        else:
            raise Undrawable("no room")
    return parts


def shaped(
    rng: np.random.Generator, allowed: np.ndarray, area: float, count: int, shape: Shape
) -> tuple[Box, np.ndarray]:
    """Regions of one kind; arguments, result and errors as of :func:`blobs`.

    Args:
        shape: ``blob`` (Perlin-shaped), ``stroke`` (a bent lens), ``ellipse``, ``rectangle``, or ``whole``:
            all that is allowed (a given mask, the foreground), whatever the area.
    """
    if shape == "blob":
        return blobs(rng, allowed, area, count)
    if shape == "whole":
        x, y, width, height = cv2.boundingRect(allowed.view(np.uint8))
        box = (y, y + height, x, x + width)
        return union([(box, allowed[y : y + height, x : x + width])], allowed.shape)
    shares = rng.uniform(1, 3, count)
    parts = []
    for size in np.maximum(shares / shares.sum() * area * allowed.size, SMALLEST):
        for _ in range(TRIES):
            box, part = _drawn(rng, allowed, float(size), shape)
            part = part & allowed[box[0] : box[1], box[2] : box[3]]
            if part.sum() >= size / 2:
                parts.append((box, part))
                break
        else:
            raise Undrawable("no room")
    return union(parts, allowed.shape)


def _drawn(
    rng: np.random.Generator, allowed: np.ndarray, size: float, shape: Shape
) -> tuple[Box, np.ndarray]:
    if shape == "stroke":
        box, weight = lens(rng, allowed, size, STROKE_RATIOS, STROKE_BEND)
        return box, weight > 0.5
    box = rectangle(rng, allowed, size * (1 if shape == "rectangle" else 4 / math.pi), ASPECT)
    height, width = box[1] - box[0], box[3] - box[2]
    if shape == "rectangle":
        return box, np.ones((height, width), np.bool_)
    y, x = (2 * np.arange(side) + 1 - side for side in (height, width))
    return box, (y[:, None] / height) ** 2 + (x[None, :] / width) ** 2 <= 1


def rectangle(rng: np.random.Generator, allowed: np.ndarray, pixels: float, aspect: float) -> Box:
    """A rectangle of about that many pixels around an allowed place, within the picture.

    Args:
        aspect: largest ratio of its sides, drawn log-uniformly in [1/aspect, aspect].
    """
    ratio = math.sqrt(math.exp(rng.uniform(-math.log(aspect), math.log(aspect))))
    height = int(np.clip(round(math.sqrt(pixels) * ratio), 1, allowed.shape[0]))
    width = int(np.clip(round(pixels / height), 1, allowed.shape[1]))
    if width == allowed.shape[1]:  # the picture was not wide enough
        height = int(np.clip(round(pixels / width), 1, allowed.shape[0]))
    top, left = around(place(rng, allowed), height, width, allowed.shape)
    return top, top + height, left, left + width


def threshold(
    rng: np.random.Generator, allowed: np.ndarray, lattice: tuple[int, int], rotation: float
) -> tuple[Box, np.ndarray]:
    """Where Perlin noise over the whole picture exceeds 0.5, as DRAEM, DFD and OneNIP mask (core.md 5.1).

    Args:
        lattice: least and largest exponent: 2**e cells a side, e drawn for each axis.
        rotation: at most, in degrees.

    Raises:
        Undrawable: nowhere within the allowed places.
    """
    height, width = allowed.shape
    cells = [2 ** int(rng.integers(lattice[0], lattice[1] + 1)) for _ in range(2)]
    cells = [min(count, side) for count, side in zip(cells, (height, width), strict=True)]
    angles = rng.uniform(0, 2 * math.pi, (cells[0] + 1, cells[1] + 1))
    noise = _turned(perlin(angles, height, width), math.radians(rng.uniform(-rotation, rotation)))
    region = (noise > 0.5) & allowed
    if not region.any():
        raise Undrawable("empty")
    x, y, w, h = cv2.boundingRect(region.view(np.uint8))
    return union([((y, y + h, x, x + w), region[y : y + h, x : x + w])], allowed.shape)


def union(parts: list[tuple[Box, np.ndarray]], shape: tuple[int, ...]) -> tuple[Box, np.ndarray]:
    """Regions in their boxes to one region in one box, with a margin where the picture has it."""
    corners = np.array([box for box, _ in parts])
    y0, x0 = np.maximum(corners[:, [0, 2]].min(axis=0) - MARGIN, 0).tolist()
    y1, x1 = np.minimum(corners[:, [1, 3]].max(axis=0) + MARGIN, shape[:2]).tolist()
    region = np.zeros((y1 - y0, x1 - x0), np.bool_)
    for (top, bottom, left, right), part in parts:
        region[top - y0 : bottom - y0, left - x0 : right - x0] |= part
    return (y0, y1, x0, x1), region


def joined(parts: list[np.ndarray]) -> np.ndarray:
    """Ascending flat indices of the pixels of one or several regions, each once."""
    return parts[0] if len(parts) == 1 else np.unique(np.concatenate(parts))


def _blob(
    rng: np.random.Generator, allowed: np.ndarray, size: float, others: list[tuple[Box, np.ndarray]]
) -> tuple[Box, np.ndarray] | None:
    """One blob of about ``size`` pixels, tightly boxed; None if this place or shape does not serve."""
    height, width = allowed.shape
    stretch = math.sqrt(math.exp(rng.uniform(0, math.log(4))))
    radius = math.sqrt(size / math.pi)
    reach = min(math.ceil(1.9 * radius * stretch) + 2, max(height, width))
    y, x = place(rng, allowed)
    angle = rng.uniform(0, math.pi)
    roughness = rng.uniform(0.4, 1.4)
    cells_y, cells_x = (2 ** rng.integers(1, 4, 2)).tolist()
    if any(y0 <= y < y1 and x0 <= x < x1 for (y0, y1, x0, x1), _ in others):
        return None

    full = 2 * reach + 1
    side = min(full, max(NOISE_SIDE, full // 4))
    axis = np.linspace(-reach, reach, side, dtype=np.float32)
    sine, cosine = np.float32(math.sin(angle)), np.float32(math.cos(angle))
    long = (axis[:, None] * sine + axis * cosine) / np.float32(radius * stretch)
    short = (axis[:, None] * cosine - axis * sine) / np.float32(radius / stretch)
    level = np.float32(roughness) * _turned(fractal(rng, side, cells_y, cells_x), angle)
    level -= cv2.magnitude(long, short)

    # The part of the square that lies in the picture, and what of it is allowed, on the noise's grid.
    top, left = max(y - reach, 0), max(x - reach, 0)
    box = (top, min(y + reach + 1, height), left, min(x + reach + 1, width))
    inside = allowed[box[0] : box[1], box[2] : box[3]]
    open_ = np.zeros((full, full), np.uint8)
    offset_y, offset_x = top - (y - reach), left - (x - reach)
    open_[offset_y : offset_y + inside.shape[0], offset_x : offset_x + inside.shape[1]] = inside
    coarse = open_ if side == full else cv2.resize(open_, (side, side), interpolation=cv2.INTER_NEAREST)

    found = _largest(level, coarse, size * (side / full) ** 2)
    if found is None:
        return None
    threshold, part = found
    if side < full:
        # Other parts sink below the threshold, so that enlarging keeps this one alone.
        sunk = np.minimum(level, threshold - np.float32(0.25))
        level = np.where(cv2.dilate(part, _SQUARE) > 0, level, sunk)
        fine = cv2.resize(level, (full, full), interpolation=cv2.INTER_LINEAR)
        part = (fine >= threshold).view(np.uint8) & open_
    left, top, w, h = cv2.boundingRect(part)
    if w == 0:
        return None
    y0, x0 = y - reach + top, x - reach + left
    return (y0, y0 + h, x0, x0 + w), part[top : top + h, left : left + w] > 0


def _turned(noise: np.ndarray, angle: float) -> np.ndarray:
    """Rotated about its centre; corners are filled by reflection."""
    centre = ((noise.shape[1] - 1) / 2, (noise.shape[0] - 1) / 2)
    turn = cv2.getRotationMatrix2D(centre, math.degrees(angle), 1)
    return cv2.warpAffine(noise, turn, noise.shape[::-1], borderMode=cv2.BORDER_REFLECT_101)


def _largest(level: np.ndarray, open_: np.ndarray, size: float) -> tuple[np.float32, np.ndarray] | None:
    """The threshold whose largest connected part within ``open_`` comes nearest to ``size`` pixels, and that
    part (uint8, 0 or 1); None if none has at least half of them.

    A search by bisection: the part grows with the share of pixels above the threshold, but in jumps where
    two parts meet.
    """
    values = level[open_ > 0]
    wanted = max(size, 1.0)
    least, most, share = 0.0, float(len(values)), wanted
    best, error = None, math.log(2)
    for _ in range(STEPS):
        rank = min(max(round(share), 1), len(values))
        if rank < 1:
            break
        threshold = np.partition(values, len(values) - rank)[len(values) - rank]
        above = (level >= threshold).view(np.uint8) & open_
        labels = cv2.connectedComponents(above, connectivity=8)[1]
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        label = int(sizes.argmax())
        ratio = float(sizes[label]) / wanted
        if abs(math.log(ratio)) <= error:
            best, error = (threshold, (labels == label).astype(np.uint8)), abs(math.log(ratio))
        if 0.85 <= ratio <= 1.2 or (ratio < 1 and rank == len(values)):
            break
        if ratio < 1:
            least = share
            share = min(share / max(ratio, 0.5), (share + most) / 2)
        else:
            most = share
            share = (least + share) / 2
    return best


def lens(
    rng: np.random.Generator, allowed: np.ndarray, pixels: float, ratios: tuple[float, float], bend: float
) -> tuple[Box, np.ndarray]:
    """A bent lens around a random allowed place: the shape of a scratch, and of the place for one.

    Args:
        rng: consumed.
        allowed: bool, H×W; only the lens's centre is sure to lie in it.
        pixels: wanted, about.
        ratios: least and largest of length over thickness.
        bend: of the middle off the straight line, at most, over the length.

    Returns:
        A tight box, and the weight in it: float32 in [0, 1], h×w, its edge soft over one pixel.

    Raises:
        Undrawable: the bend led it off a picture of a few pixels.
    """
    rows, columns, weight = bow(rng, allowed, pixels, ratios, bend)
    y0, y1, x0, x1 = int(rows[0]), int(rows[-1]) + 1, int(columns.min()), int(columns.max()) + 1
    dense = np.zeros((y1 - y0, x1 - x0), np.float32)
    dense[rows - y0, columns - x0] = weight
    return (y0, y1, x0, x1), dense


def bow(
    rng: np.random.Generator, allowed: np.ndarray, pixels: float, ratios: tuple[float, float], bend: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pixels of :func:`lens` alone, in raster order: rows, columns, and float32 weight in (0, 1]."""
    ratio = math.exp(rng.uniform(math.log(ratios[0]), math.log(ratios[1])))
    # A lens has π/4 of its rectangle, and its soft edge shows over another half pixel on each side. It
    # should not leave the picture.
    angle = rng.uniform(0, math.pi)
    longest = 0.8 * min(allowed.shape)
    if ratio * longest < math.sqrt(pixels * ratio * 4 / math.pi):  # a narrow picture: along its longer side
        angle = 0.0 if allowed.shape[1] > allowed.shape[0] else math.pi / 2
        longest = 0.8 * max(allowed.shape)
    length = min(math.sqrt(pixels * ratio * 4 / math.pi), longest)
    thickness = max((pixels / length - SOFT) * 4 / math.pi, THINNEST)
    length = min(length, pixels / (thickness * math.pi / 4 + SOFT))
    arc = rng.uniform(-bend, bend) * length
    y, x = place(rng, allowed)

    # Only pixels near the middle line have a weight: a line drawn along it, a little too thick, finds them.
    sine, cosine = math.sin(angle), math.cos(angle)
    half_x, half_y, rise_x, rise_y = cosine * length / 2, sine * length / 2, -sine * arc, cosine * arc
    corners = np.rint(_CURVE @ (16 * np.array([[half_x, half_y], [rise_x, rise_y], [x, y]]))).astype(np.int32)
    thick = math.ceil(thickness + 2 * abs(arc) / CHORDS**2) + 2
    left, top, w, h = cv2.boundingRect(corners)
    x0, x1 = max(left // 16 - thick, 0), min((left + w) // 16 + thick + 2, allowed.shape[1])
    y0, y1 = max(top // 16 - thick, 0), min((top + h) // 16 + thick + 2, allowed.shape[0])
    near = np.zeros((y1 - y0, x1 - x0), np.uint8)
    cv2.polylines(near, [corners - (16 * x0, 16 * y0)], False, 1, thick, cv2.LINE_8, 4)
    at = np.flatnonzero(near.view(np.bool_))
    rows = at // near.shape[1]
    columns = at - rows * near.shape[1]

    dy, dx = (rows + (y0 - y)).astype(np.float32), (columns + (x0 - x)).astype(np.float32)
    along = dx * np.float32(2 / length * cosine) + dy * np.float32(2 / length * sine)
    square = along * along
    across = dy * np.float32(cosine) - dx * np.float32(sine) + np.float32(arc) * (square - np.float32(0.5))
    half = np.float32(thickness / 2) * np.sqrt(np.maximum(1 - square, 0))
    weight = half - np.abs(across) + np.float32(0.5)
    inside = np.flatnonzero((weight > 0) & (square < 1))
    if len(inside) == 0:
        raise Undrawable("no room")
    return rows[inside] + y0, columns[inside] + x0, np.minimum(weight[inside], 1)


def place(rng: np.random.Generator, allowed: np.ndarray) -> tuple[int, int]:
    """A random allowed pixel: y, x."""
    height, width = allowed.shape
    for _ in range(16):  # cheap where much is allowed
        y, x = int(rng.integers(height)), int(rng.integers(width))
        if allowed[y, x]:
            return y, x
    places = np.flatnonzero(allowed)
    return divmod(int(places[rng.integers(len(places))]), width)


def around(centre: tuple[int, int], height: int, width: int, shape: tuple[int, ...]) -> tuple[int, int]:
    """Top left corner of a rectangle around a place, moved into the picture where it would stand out."""
    y = min(max(centre[0] - height // 2, 0), shape[0] - height)
    x = min(max(centre[1] - width // 2, 0), shape[1] - width)
    return y, x


def feather(region: np.ndarray, width: int) -> np.ndarray:
    """Soft weight that falls to 0 towards the region's edge, from inside, over about ``width`` pixels.

    Args:
        region: bool, h×w; the border of the array counts as continued.

    Returns:
        float32 in [0, 1], h×w; 0 outside the region.
    """
    solid = region.astype(np.float32)
    if width < 1:
        return solid
    size = 2 * width + 1
    mean = cv2.blur(solid, (size, size), borderType=cv2.BORDER_REPLICATE)
    # A straight edge has a mean of one half; a little more keeps thin parts from vanishing.
    return np.clip((mean - np.float32(0.4)) / np.float32(0.6), 0, 1) * solid


def foreground(pixels: np.ndarray) -> np.ndarray:
    """The part, if the picture shows one on a plain background; otherwise everything (core.md 5.6).

    A threshold on the distance in Lab from the median colour of the picture's border, smoothed: between the
    two classes of Otsu's, where the distance changes most steeply, so that a gloss or a shade on the ground,
    whose ends are soft, does not count as the part. The result is taken only if the distance there is at
    least :data:`STEEP` times as steep as in the middle of all places (on a texture, or in uneven light, it is
    not), and if the part covers 5 to 95 % of the picture, lies for nine tenths in pieces of at least 1 % of
    the picture, and holds less than half of the border. Pieces smaller than that, or than a fifth of the
    largest, are dropped, smaller holes filled. All but the distance is inference.

    Args:
        pixels: uint8 or uint16, H×W×C.

    Returns:
        bool, H×W; never empty.
    """
    height, width, channels = pixels.shape
    everything = np.ones((height, width), np.bool_)
    picture = pixels if pixels.dtype == np.uint8 else (pixels // 257).astype(np.uint8)
    picture = cv2.medianBlur(picture, 3).reshape(pixels.shape) if min(height, width) > 2 else picture
    lab = (cv2.cvtColor(picture, cv2.COLOR_RGB2LAB) if channels == 3 else picture).astype(np.float32)
    border = np.concatenate([lab[0], lab[-1], lab[:, 0], lab[:, -1]])
    away = lab - np.median(border, axis=0)
    grey = np.minimum(np.sqrt(np.einsum("hwc,hwc->hw", away, away)), 255).astype(np.uint8)
    level = _steepest(grey)
    if level is None:
        return everything
    size = max(3, min(height, width) // 50 | 1)
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (size, size))
    above = (grey > level).view(np.uint8)
    part = cv2.morphologyEx(cv2.morphologyEx(above, cv2.MORPH_CLOSE, disc), cv2.MORPH_OPEN, disc) > 0
    edge = np.concatenate([part[0], part[-1], part[:, 0], part[:, -1]])
    if _large(part).sum() < 0.9 * part.sum() or not 0.05 <= part.mean() <= 0.95 or edge.mean() > 0.5:
        return everything
    return ~_large(~_large(part, of_largest=0.2))


def _steepest(grey: np.ndarray) -> int | None:
    """The lowest level between Otsu's two classes along which a picture is about as steep as it gets there;
    None if nothing stands out.

    Args:
        grey: uint8, H×W. Looked at no larger than :data:`LOOKED_AT`, in integers: the same on every machine.
    """
    scale = min(LOOKED_AT / max(grey.shape), 1)
    height, width = (max(round(scale * side), 1) for side in grey.shape)
    small = cv2.GaussianBlur(cv2.resize(grey, (width, height), interpolation=cv2.INTER_AREA), (5, 5), 0)
    otsu, _ = cv2.threshold(small, 0, 255, cv2.THRESH_OTSU)
    upper = small > otsu
    if upper.all() or not upper.any():
        return None
    low, high = float(small[~upper].mean()), float(small[upper].mean())
    slopes = [np.abs(cv2.Sobel(small, cv2.CV_16S, dx, 1 - dx)) for dx in (0, 1)]
    steep = slopes[0] + slopes[1]
    around = np.ones(2 * max(1, int(high - low) // 16) + 1)
    counts = np.convolve(np.bincount(small.ravel(), minlength=256), around, "same")
    sums = np.convolve(np.bincount(small.ravel(), steep.ravel(), minlength=256), around, "same")
    quarter = (high - low) / 4
    levels = np.arange(math.ceil(low + quarter), math.floor(high - quarter) + 1)
    levels = levels if len(levels) else np.array([int(otsu)])
    mean = sums[levels] / np.maximum(counts[levels], 1)
    if mean.max() < STEEP * (np.median(steep) + 1):
        return None
    return int(levels[(mean >= 0.9 * mean.max()).argmax()])


def _large(mask: np.ndarray, of_largest: float = 0.0) -> np.ndarray:
    """The connected parts of at least 1 % of the picture and that share of the largest: bool, H×W."""
    labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=4)[1]
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0  # of what is no part
    return (sizes >= max(0.01 * mask.size, of_largest * sizes.max()))[labels]


def resolve_location(
    location: str, pixels: np.ndarray, roi: np.ndarray | None = None, ignore: np.ndarray | None = None
) -> np.ndarray:
    """Where a recipe's anomaly may lie.

    Args:
        location: ``anywhere``, ``foreground`` or ``roi``.
        pixels: uint8 or uint16, H×W×C.
        roi: bool, H×W, for ``roi``.
        ignore: bool, H×W; places excluded whatever the location.

    Returns:
        bool, H×W; never empty.

    Raises:
        UsageError: an unknown location, or ``roi`` without a mask.
        PictureError: nothing is left.
    """
    if location == "anywhere":
        allowed = np.ones(pixels.shape[:2], np.bool_)
    elif location == "foreground":
        allowed = foreground(pixels)
    elif location == "roi":
        if roi is None:
            raise UsageError("location is roi, but the source has no region-of-interest mask: name one (roi)")
        allowed = roi.astype(np.bool_)
    else:
        raise UsageError(f"unknown location {location!r}: use anywhere, foreground or roi")
    if ignore is not None:
        allowed = allowed & ~ignore.astype(np.bool_)
    if not allowed.any():
        raise PictureError(
            f"location {location} leaves no pixel of the picture once the ignored ones are gone"
        )
    return allowed
