"""A trained detector on real pictures: scores and maps, and their figures as rows of the tables.

Maps and masks are compared at the detector's input size; masks get there by nearest neighbour (core.md 6.2),
and a mask that would vanish keeps every pixel it touches (inference: its picture is no normal one).
Official figures of some data sets want the original size: :func:`at_size` brings a map there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from detectors.protocol import Detector
from manifests.pictures import load, load_location, load_mask
from manifests.schema import GOOD, Image
from training.components import SIZE_LIMITS, Size, label_components, size_class
from training.examples import CHUNK, chunks, extract
from training.intervals import Estimate, evaluate_images, evaluate_pixels, mean_estimate
from training.loading import small_mask


@dataclass(frozen=True)
class Judged:
    """One real picture and what the detector says of it.

    Attributes:
        score: higher = more anomalous.
        map: float32, size×size.
        mask: bool, size×size; None if a defect picture has no mask.
        ignore: bool, size×size; True where nothing counts; None if everything does.
    """

    image: Image
    score: float
    map: np.ndarray
    mask: np.ndarray | None
    ignore: np.ndarray | None

    @property
    def anomalous(self) -> bool:
        return self.image.defect != GOOD


def predict(
    detector: Detector, pictures: Iterable[np.ndarray], categories: Iterable[str] | None = None
) -> Iterator[tuple[float, np.ndarray]]:
    """Scores and maps (float32, size×size), one a picture, in order.

    Args:
        pictures: uint8, H×W×C with C = 1 or 3, any sizes; consumed a few at a time.
        categories: one a picture; needed by some settings of some detectors.
    """
    names = iter(categories) if categories is not None else None
    for chunk in chunks(pictures, CHUNK):
        batch: dict[str, Any] = {"features": extract(detector, chunk)}
        if names is not None:
            batch["category"] = [next(names) for _ in chunk]
        scores, maps = detector.score(batch)
        yield from zip(scores.tolist(), maps.float().cpu().numpy(), strict=True)


def at_size(scores: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map at the size of its picture: float32 H×W, bilinear."""
    return cv2.resize(scores, (width, height), interpolation=cv2.INTER_LINEAR)


def judge(
    detector: Detector,
    images: Sequence[Image],
    max_side: int | None = None,
    on_picture: Callable[[int, int], None] | None = None,
) -> list[Judged]:
    """Score real pictures.

    Args:
        images: rows of the images table.
        max_side: as the samples were made with, so that training and test pictures have equal detail.
        on_picture: ``on_picture(done, total)``.

    Raises:
        PictureError: a picture or mask cannot be used.
    """
    size = detector.settings.size
    pictures = (load(image, max_side=max_side) for image in images)
    found = predict(detector, pictures, [image.category for image in images])
    judged = []
    for image, (score, scores) in zip(images, found, strict=True):
        judged.append(Judged(image, score, scores, truth(image, size), ignored(image, size)))
        if on_picture:
            on_picture(len(judged), len(images))
    return judged


def truth(image: Image, size: int) -> np.ndarray | None:
    """The mask at size×size by nearest neighbour, bool; None for a defect picture without one."""
    if image.defect == GOOD:
        return np.zeros((size, size), bool)
    if image.mask_path is None:
        return None
    return small_mask(load_mask(image), size)


def ignored(image: Image, size: int) -> np.ndarray | None:
    """Where nothing counts: outside the region of interest or inside the ignore mask; bool, size×size."""
    if image.roi_path is None and image.ignore_path is None:
        return None
    skipped = np.zeros((size, size), bool)
    if image.roi_path is not None:
        skipped |= ~load_location(image.roi_path, (size, size))
    if image.ignore_path is not None:
        skipped |= load_location(image.ignore_path, (size, size))
    return skipped


def figures(
    judged: Sequence[Judged],
    *,
    round_: int,
    detector: str,
    split: str,
    training_seed: int,
    resamples: int = 300,
) -> list[dict[str, Any]]:
    """Rows of the metrics table.

    For each category: all defects; each defect type against all good pictures; each size class of defects
    (pixel metrics only). Then ``category='mean'``: the unweighted mean over categories of the figures for all
    defects and for each size. Pixel figures are given where every defect picture of a category has a mask, so
    that they speak of the same pictures as the image figures. Undefined figures (no defect, no good picture)
    give no row. Intervals resample the images' ``group``.
    """
    rows: dict[tuple[str, str, str], dict[str, Estimate]] = {}
    categories = sorted({entry.image.category for entry in judged})
    for number, category in enumerate(categories):
        own = [entry for entry in judged if entry.image.category == category]
        for (defect, size), estimates in _category(own, number, resamples).items():
            rows[category, defect, size] = estimates
    for size in ("all", *SIZE_LIMITS):
        shares = [rows[name, "all", size] for name in categories if (name, "all", size) in rows]
        metrics = sorted({metric for share in shares for metric in share})
        rows["mean", "all", size] = {
            metric: mean_estimate([share[metric] for share in shares if metric in share])
            for metric in metrics
        }
    table = []
    for (category, defect, size), estimates in rows.items():
        for metric, estimate in estimates.items():
            if np.isnan(estimate.value):
                continue
            low, high = estimate.interval
            table.append(
                {
                    "round": round_,
                    "detector": detector,
                    "seed": training_seed,
                    "category": category,
                    "defect": defect,
                    "size": size,
                    "split": split,
                    "metric": metric,
                    "value": estimate.value,
                    "low": low,
                    "high": high,
                }
            )
    return table


def score_rows(
    judged: Sequence[Judged], *, round_: int, detector: str, split: str, training_seed: int
) -> list[dict[str, Any]]:
    """Rows of the scores table, one a picture."""
    return [
        {
            "round": round_,
            "detector": detector,
            "seed": training_seed,
            "image_id": entry.image.image_id,
            "category": entry.image.category,
            "split": split,
            "label": int(entry.anomalous),
            "score": entry.score,
        }
        for entry in judged
    ]


def _category(
    own: Sequence[Judged], number: int, resamples: int
) -> Mapping[tuple[str, str], dict[str, Estimate]]:
    """Estimates of one category by (defect, size). ``number`` keeps the categories' resamples apart."""
    found: dict[tuple[str, str], dict[str, Estimate]] = {}
    good = [entry for entry in own if not entry.anomalous]
    bad = [entry for entry in own if entry.anomalous]
    if not bad:
        return found
    seed = np.random.SeedSequence(0, spawn_key=(number,))
    masked = all(entry.mask is not None for entry in bad)
    for defect in ["all", *sorted({entry.image.defect for entry in bad})]:
        chosen = good + [entry for entry in bad if defect in ("all", entry.image.defect)]
        estimates: dict[str, Estimate] = {}
        if good:
            estimates |= evaluate_images(
                np.array([entry.score for entry in chosen]),
                np.array([entry.anomalous for entry in chosen]),
                [entry.image.group for entry in chosen],
                resamples=resamples,
                seed=seed,
            )
        if masked:
            estimates |= _pixels(chosen, "all", resamples, seed)
        found[defect, "all"] = estimates
    if masked:
        masks = [entry.mask for entry in bad if entry.mask is not None]
        areas = [area / mask.size for mask in masks for area in label_components(mask)[1]]
        for size in sorted({size_class(area) for area in areas}):
            found["all", size] = _pixels(own, size, resamples, seed)
    return found


def _pixels(
    chosen: Sequence[Judged], size: Size, resamples: int, seed: np.random.SeedSequence
) -> dict[str, Estimate]:
    return evaluate_pixels(
        [entry.map for entry in chosen],
        [entry.mask for entry in chosen if entry.mask is not None],
        [entry.image.group for entry in chosen],
        [entry.ignore for entry in chosen],
        size=size,
        resamples=resamples,
        seed=seed,
        names=[entry.image.path for entry in chosen],
    )
