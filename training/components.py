"""The ground truth's defects one by one: components, their size classes, and how much of each was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

from generation.compose import local_variation

Size = Literal["all", "tiny", "small", "large"]
SIZE_LIMITS = {"tiny": 0.001, "small": 0.01, "large": float("inf")}  # upper ends, as shares of the picture


def size_class(share: float) -> Size:
    """The size class of a component that covers ``share`` of its picture (in (0, 1]).

    ``tiny`` below 0.1 %, ``small`` below 1 %, else ``large`` (the ``size`` column of the metrics table).

    >>> size_class(0.0005), size_class(0.001), size_class(0.01)
    ('tiny', 'small', 'large')
    """
    for name in ("tiny", "small"):
        if share < SIZE_LIMITS[name]:
            return name
    return "large"


def label_components(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 8-connected components of a mask (core.md 6.3, step 1).

    Args:
        mask: bool or number, H×W; anomalous where not zero.

    Returns:
        labels: int32, H×W; 0 is defect-free, component ``c`` has label ``c + 1``.
        areas: int64, one a component, in pixels.

    >>> labels, areas = label_components(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0]]))
    >>> areas.tolist()
    [2, 1]
    """
    binary = (np.asarray(mask) != 0).astype(np.uint8)
    if not binary.any():  # the good pictures, usually the most
        return np.zeros(binary.shape, np.int32), np.zeros(0, np.int64)
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(binary, connectivity=8, ltype=cv2.CV_32S)
    return labels, statistics[1:, cv2.CC_STAT_AREA].astype(np.int64)


@dataclass(frozen=True, slots=True)
class ComponentRecall:
    """One real defect and how much of it lies above a threshold.

    Attributes:
        picture: index into the maps.
        label: its label in ``label_components`` of that picture's mask.
        area: share of the picture that it covers, in (0, 1].
        size: its size class.
        overlap: share of its counted pixels that score above the threshold, in [0, 1].
    """

    picture: int
    label: int
    area: float
    size: Size
    overlap: float


def component_recall(
    maps: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    threshold: float,
    ignore: Sequence[np.ndarray | None] | None = None,
) -> list[ComponentRecall]:
    """How much of every ground-truth component scores above ``threshold``; what feedback learns from.

    Args:
        maps: anomaly maps, float H×W each; sizes may differ.
        masks: bool H×W each, of the same size as their map.
        threshold: of the maps' scores; set on normal pictures only.
        ignore: bool H×W each or None; pixels that count nowhere. A wholly ignored component is left out.

    Returns:
        One record a component, by picture, then by label.

    >>> mask = np.zeros((10, 10), bool)
    >>> mask[0, :4] = True
    >>> found = np.zeros((10, 10), np.float32)
    >>> found[0, :3] = 1
    >>> component_recall([found], [mask], threshold=0.5)
    [ComponentRecall(picture=0, label=1, area=0.04, size='large', overlap=0.75)]
    """
    records = []
    for picture, (scores, mask) in enumerate(zip(maps, masks, strict=True)):
        labels, areas = label_components(mask)
        skipped = ignore[picture] if ignore is not None else None
        counted = labels if skipped is None else np.where(skipped, 0, labels)
        pixels = np.bincount(counted.ravel(), minlength=areas.size + 1)[1:]
        above = np.bincount(counted[np.asarray(scores) > threshold], minlength=areas.size + 1)[1:]
        for index in np.flatnonzero(pixels):
            share = float(areas[index] / labels.size)
            overlap = float(above[index] / pixels[index])
            records.append(ComponentRecall(picture, int(index) + 1, share, size_class(share), overlap))
    return records


def component_contrast(pixels: np.ndarray, component: np.ndarray, ring: int = 8) -> float:
    """How much a real defect differs from what surrounds it, in units of the surroundings' local variation.

    The largest channel of |mean inside − mean of a ring around it|, over the mean of |I − box5(I)| in its
    padded box (at least 1 level), as the gates measure generated anomalies (inference: the ring stands in for
    the normal picture, which real defects do not have).

    Args:
        pixels: uint8, H×W×C.
        component: bool, H×W; one defect.
        ring: width of the surroundings, in pixels.
    """
    inside = component.astype(np.uint8)
    near = cv2.dilate(inside, np.ones((5, 5), np.uint8))
    around = cv2.dilate(near, np.ones((2 * ring + 1, 2 * ring + 1), np.uint8)) > near
    if not around.any():
        return float("nan")
    values = pixels.astype(np.float32)
    change = float(np.abs(values[component].mean(axis=0) - values[around].mean(axis=0)).max())
    return change / local_variation(pixels, (0, pixels.shape[0], 0, pixels.shape[1]), component)
