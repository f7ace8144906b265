"""From a generator's edit to the finished picture and its exact mask (docs/formats.md, "The mask is exact").

The mask is measured, not believed: it covers the pixels that changed, closed and filled, within the places
that the generator named, and the picture outside it is the source, byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from generation.protocol import Box, Edit, FeatureEdit, Measured, Places, places_of, stored

VISIBLE = 2  # 8-bit levels; a change above this belongs to the mask
HOLE = 16  # pixels; unchanged islands up to this size belong to the mask
PAD = 8  # pixels around the region in which the picture's local variation is measured
QUIET = 4.0  # 8-bit levels; the least local variation: on a plain part what nobody sees would have contrast
GRID = 16  # cells a side of the signature

_SQUARE = np.ones((3, 3), np.uint8)


@dataclass(frozen=True)
class Composite:
    """A finished sample and what was measured on it.

    Attributes:
        content: the picture, dtype and shape of the source's pixels; or the features, float16, C×h×w.
        mask: uint8, 0 or 255, H×W (features: h×w).
        leak: share of the changed places that lay outside the mask before they were reset, in [0, 1].
        hollow: share of the mask that did not change visibly (at most 2 levels), in [0, 1].
        contrast: ``change`` relative to the local variation of the source around the region, >= 0.
        area: share of the picture that the mask covers, in [0, 1].
        change: mean change inside the mask, in 8-bit levels (features: mean distance of the tokens).
        signature: float32, (256,); the change summed over a 16×16 grid, for the near-duplicate gate.
    """

    content: np.ndarray
    mask: np.ndarray
    leak: float
    hollow: float
    contrast: float
    area: float
    change: float
    signature: np.ndarray


def compose(pixels: np.ndarray, edit: Edit) -> Composite:
    """Put an edit into the picture.

    With D the largest difference over the channels in 8-bit levels (16-bit pictures: difference / 257), the
    mask is {D > 2} within ``edit.region``, closed 3×3, holes of at most 16 pixels filled, within
    ``edit.region`` again. Outside the mask the picture is the source. Contrast is the mean of D inside the
    mask over the mean of max_c |I − box5(I)| in the region's bounding box padded by 8 pixels, both in 8-bit
    levels, the latter at least 4 (inference: the specification leaves the local variation open).

    Args:
        pixels: uint8 or uint16, H×W×C.
        edit: a changed box; ``patch`` finite, float32, h×w×C or N×C; ``region`` bool, h×w.

    Raises:
        ValueError: the edit does not fit the picture or holds a value that is not finite.
    """
    check_edit(pixels, edit)
    found = measure(pixels, edit) if edit.measured is None else edit.measured
    kept = found.change[found.inside]
    outer = found.places.outer[found.inside]
    covered, total = len(kept), found.elsewhere + int(np.count_nonzero(found.change))
    content = pixels.copy()
    whole(content)[outer] = whole(found.after)[found.inside]
    mask = np.zeros(pixels.shape[:2], np.uint8)
    mask.reshape(-1)[outer] = 255
    return Composite(
        content=content,
        mask=mask,
        leak=(total - int(np.count_nonzero(kept))) / max(total, 1),
        hollow=(covered - int(np.count_nonzero(found.visible & found.inside))) / max(covered, 1),
        contrast=found.level / found.variation,
        area=covered / mask.size,
        change=found.level,
        signature=signature(kept, outer, mask.shape),
    )


def measure(pixels: np.ndarray, edit: Edit) -> Measured:
    """Mask and size of an edit's change; arguments as of :func:`compose`."""
    places = places_of(edit.box, edit.region, pixels.shape[1])
    after = quantise(edit.patch, pixels.dtype)
    elsewhere = 0
    if after.ndim == 3:
        y0, y1, x0, x1 = edit.box
        anywhere = channel_max(cv2.absdiff(after, pixels[y0:y1, x0:x1]).reshape(after.shape)).reshape(-1)
        elsewhere = int(np.count_nonzero(anywhere) - np.count_nonzero(anywhere[places.inner]))
        after = stored(after, places.inner)
    found = changed(stored(pixels, places.outer), after, places)
    variation = local_variation(pixels, edit.box, edit.region) if len(after) else QUIET
    return Measured(places, after, *found, elsewhere, variation)


class Changed(NamedTuple):
    """As of :class:`generation.protocol.Measured`."""

    change: np.ndarray
    visible: np.ndarray
    inside: np.ndarray
    level: float


def changed(before: np.ndarray, after: np.ndarray, places: Places) -> Changed:
    """Mask and size of a change; see :func:`compose`.

    Args:
        before, after: uint8 or uint16, N×C; the region's pixels.
    """
    if not len(before):
        nothing = np.zeros(0, np.bool_)
        return Changed(np.zeros(0, before.dtype), nothing, nothing, 0.0)
    change = channel_max(cv2.absdiff(after, before).reshape(1, *before.shape)).reshape(-1)
    unit = 1 if before.dtype == np.uint8 else 257  # raw steps a level
    visible = change > VISIBLE * unit
    box = np.zeros(places.region.shape, np.uint8)
    box.reshape(-1)[places.inner] = visible.view(np.uint8)
    inside = fill(box).reshape(-1)[places.inner].view(np.bool_)
    level = int((change * inside).sum(dtype=np.int64)) / max(int(np.count_nonzero(inside)), 1) / unit
    return Changed(change, visible, inside, level)


def compose_features(edit: FeatureEdit) -> Composite:
    """The same measures for features: a place is a token, its change the Euclidean distance over channels.

    A token has changed if any channel differs. Tokens outside ``edit.mask`` are reset to the clean ones.
    ``hollow`` is the share of masked tokens that did not change; contrast is the mean change inside the
    mask over the mean distance between neighbouring clean tokens (inference: the analogue for features).

    Raises:
        ValueError: shapes or types do not agree, or a value is not finite.
    """
    shape = edit.clean.shape
    if edit.clean.ndim != 3 or edit.feature.shape != shape or edit.mask.shape != shape[1:]:
        raise ValueError(f"features {edit.feature.shape}, clean {shape} and mask {edit.mask.shape} disagree")
    if edit.feature.dtype != np.float16 or edit.clean.dtype != np.float16 or edit.mask.dtype != np.bool_:
        raise ValueError(
            f"features are {edit.feature.dtype} with a {edit.mask.dtype} mask, not float16 and bool"
        )
    if not np.isfinite(edit.feature).all():
        raise ValueError("features hold values that are not finite")
    clean = edit.clean.astype(np.float32)
    distance = np.linalg.norm(edit.feature.astype(np.float32) - clean, axis=0)
    moved = distance > 0
    covered = int(edit.mask.sum())
    kept = distance * edit.mask
    level = float(kept.sum()) / max(covered, 1)
    steps = [np.linalg.norm(np.diff(clean, axis=axis), axis=0).ravel() for axis in (1, 2)]
    variation = float(np.concatenate(steps).mean()) if edit.mask.size > 1 else 0.0
    return Composite(
        content=np.where(edit.mask, edit.feature, edit.clean),
        mask=edit.mask.astype(np.uint8) * np.uint8(255),
        leak=int((moved & ~edit.mask).sum()) / max(int(moved.sum()), 1),
        hollow=int((edit.mask & ~moved).sum()) / max(covered, 1),
        contrast=level / max(variation, 1e-6),
        area=covered / edit.mask.size,
        change=level,
        signature=signature(kept.ravel(), np.arange(kept.size), edit.mask.shape),
    )


def check_edit(pixels: np.ndarray, edit: Edit) -> None:
    """Refuse an edit that does not fit ``pixels``.

    Raises:
        ValueError: see :func:`compose`.
    """
    y0, y1, x0, x1 = edit.box
    height, width, channels = pixels.shape
    count = np.count_nonzero(edit.region)
    if not (0 <= y0 < y1 <= height and 0 <= x0 < x1 <= width):
        raise ValueError(f"box {edit.box} lies outside the picture of {height}×{width}")
    if edit.patch.shape not in ((y1 - y0, x1 - x0, channels), (count, channels)):
        raise ValueError(
            f"patch is {edit.patch.shape}, its box needs {(y1 - y0, x1 - x0, channels)} or its region "
            f"{(count, channels)}"
        )
    if edit.patch.dtype != np.float32:
        raise ValueError(f"patch is {edit.patch.dtype}, not float32")
    if edit.region.shape != (y1 - y0, x1 - x0) or edit.region.dtype != np.bool_:
        raise ValueError(
            f"region is {edit.region.dtype} {edit.region.shape}, its box needs bool {y1 - y0, x1 - x0}"
        )
    if edit.patch.size and not cv2.checkRange(flat(edit.patch))[0]:
        raise ValueError("patch holds values that are not finite")


def quantise(patch: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float32 in [0, 1] to whole levels of ``dtype`` (uint8 or uint16): rounded to nearest, saturated."""
    if not patch.size:
        return patch.astype(dtype)
    depth = cv2.CV_8U if dtype == np.uint8 else cv2.CV_16U
    # One channel, because OpenCV applies a scalar to the first channel of several only.
    scale = float(np.iinfo(dtype).max)
    levels = cv2.multiply(flat(patch), scale, dtype=depth)  # type: ignore[call-overload]  # scalars are missing
    return levels.reshape(patch.shape)


def fill(mask: np.ndarray) -> np.ndarray:
    """Close a mask 3×3 and fill its holes of at most 16 pixels (4-connected; a hole touches no border).

    Args:
        mask: uint8, 0 or 1, H×W. Everything beyond its border counts as 0.

    Returns:
        uint8, 0 or 1, H×W.
    """
    # The border of zeros makes the result independent of how tightly the box was cut, and keeps the outside
    # from being taken for a hole.
    padded = cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    closed = cv2.morphologyEx(padded, cv2.MORPH_CLOSE, _SQUARE)
    closed[0], closed[-1], closed[:, 0], closed[:, -1] = 0, 0, 0, 0
    # Contours cost a twentieth of labelled components where the mask is thin.
    contours, tree = cv2.findContours(closed, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if len(contours) > 1:
        for index in np.flatnonzero(tree[0, :, 3] >= 0).tolist():
            # The pixels around a hole are the corners of a polygon on a lattice, those of the hole the points
            # in it (Pick's theorem). At most 16 of them have at most 16 around them.
            around = contours[index]
            if len(around) <= 2 * HOLE and cv2.contourArea(around) - len(around) / 2 + 1 <= HOLE:
                cv2.drawContours(closed, contours, index, 1, cv2.FILLED)
    return np.ascontiguousarray(closed[1:-1, 1:-1])


def local_variation(pixels: np.ndarray, box: Box, region: np.ndarray) -> float:
    """Mean of max_c |I − box5(I)| around a region, in 8-bit levels, at least ``QUIET``.

    Args:
        pixels: uint8 or uint16, H×W×C.
        box: place of ``region`` in the picture.
        region: bool, h×w; not empty.
    """
    x, y, width, height = cv2.boundingRect(region.view(np.uint8))
    top, left = max(box[0] + y - PAD, 0), max(box[2] + x - PAD, 0)
    bottom, right = box[0] + y + height + PAD, box[2] + x + width + PAD
    window = pixels[top:bottom, left:right]
    smooth = cv2.blur(window, (5, 5), borderType=cv2.BORDER_REFLECT_101).reshape(window.shape)
    variation = cv2.mean(channel_max(cv2.absdiff(window, smooth).reshape(window.shape)))[0]
    return max(variation / (1 if pixels.dtype == np.uint8 else 257), QUIET)


def signature(change: np.ndarray, outer: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Change summed over the cells of a 16×16 grid laid over the picture: float32, (256,).

    Args:
        change: of N places, at the flat indices ``outer`` of a picture of that shape.
    """
    rows = outer // shape[1]
    cells = rows * GRID // shape[0] * GRID + (outer - rows * shape[1]) * GRID // shape[1]
    return np.bincount(cells, weights=change, minlength=GRID * GRID).astype(np.float32)


def whole(pixels: np.ndarray) -> np.ndarray:
    """…×C, contiguous, as a flat array of opaque pixels, which numpy moves several times as fast as rows."""
    return pixels.view(f"V{pixels.itemsize * pixels.shape[-1]}").reshape(-1)


def flat(array: np.ndarray) -> np.ndarray:
    """H×W×C as H×(W·C), so that OpenCV sees one channel."""
    return np.ascontiguousarray(array).reshape(array.shape[0], -1)


def channel_max(array: np.ndarray) -> np.ndarray:
    """H×W×C to H×W: the largest channel. (OpenCV, because numpy's reduction of a short last axis is slow.)"""
    channels = cv2.split(array)
    largest = channels[0]
    for channel in channels[1:]:
        largest = cv2.max(largest, channel)
    return largest
