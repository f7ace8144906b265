"""A trained detector on real pictures: scores and maps, and their figures as rows of the tables.

Maps and masks are compared at the detector's input size; masks get there by nearest neighbour (core.md 6.2),
and a mask that would vanish keeps every pixel it touches (inference: its picture is no normal one). With
tiles, pictures larger than that are compared at their own size (that of ``max_side``). sPRO wants the
original size: :func:`at_size` brings a map there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, repeat
from typing import Any

import cv2
import numpy as np
import torch

from detectors.protocol import Detector
from manifests.pictures import (
    has_saturations,
    load,
    load_defects,
    load_location,
    load_mask,
    shrunk,
    small_mask,
)
from manifests.schema import GOOD, Image
from training.components import SIZE_LIMITS, Size, label_components, size_class
from training.examples import CHUNK, chunks, extract
from training.intervals import (
    Estimate,
    evaluate_images,
    evaluate_pixels,
    evaluate_rate,
    evaluate_spro,
    mean_estimate,
)
from training.metrics import SPRO_FPR_LIMIT, SPRO_FPR_LIMITS, LogicalDefect, saturated_pixels
from training.stress import Stress, disturb, place
from training.tiling import blend, is_tiled, scored_shape, windows, worst

Shape = tuple[int, int]
UNDISTURBED = Stress("blur", 0)


@dataclass(frozen=True)
class Judged:
    """One real picture and what the detector says of it.

    Attributes:
        score: higher = more anomalous.
        map: float32, h×w; size×size unless the picture was scored in tiles.
        mask: bool, h×w; None if a defect picture has no mask.
        ignore: bool, h×w; True where nothing counts; None if everything does.
    """

    image: Image
    score: float
    map: np.ndarray
    mask: np.ndarray | None
    ignore: np.ndarray | None

    @property
    def anomalous(self) -> bool:
        return self.image.defect != GOOD

    @property
    def sizes(self) -> set[Size]:
        """The size classes of its defects; none without a mask."""
        if self.mask is None:
            return set()
        return {size_class(area / self.mask.size) for area in label_components(self.mask)[1]}


def predict(
    detector: Detector,
    pictures: Iterable[np.ndarray],
    categories: Iterable[str] | None = None,
    tiles: float | None = None,
    ignore: Iterable[np.ndarray | None] | None = None,
) -> Iterator[tuple[float, np.ndarray]]:
    """Scores and maps (float32, size×size), one a picture, in order.

    Args:
        pictures: uint8, H×W×C with C = 1 or 3, any sizes; consumed a few at a time.
        categories: one a picture; needed by some settings of some detectors. Where scores depend on what else
            is scored (``Settings.leak``), pictures of one category that follow each other are one batch, and
            their features in memory at once.
        tiles: overlap of the tiles in which pictures larger than the input are scored: the picture's score is
            then that of its worst tile, its map has the picture's size. None: whole pictures, resized.
        ignore: bool, of the map's shape, or None; one a picture: True places raise no picture's score.
    """
    sizes: Iterable[int] = repeat(CHUNK)
    if categories is not None and tiles is None and detector.settings.leak is not None:
        categories = list(categories)
        sizes = [len(list(run)) for _, run in groupby(categories)]
    names = iter(categories) if categories is not None else None
    skipped = iter(ignore) if ignore is not None else None
    if tiles is not None:
        for picture in pictures:
            name = next(names) if names is not None else None
            yield _predict_tiled(detector, picture, name, tiles, next(skipped) if skipped else None)
        return
    nothing = np.zeros((detector.settings.size,) * 2, bool)
    rest = iter(pictures)
    for size in sizes:
        parts = [extract(detector, chunk) for chunk in chunks(islice(rest, size), CHUNK)]
        if not parts:
            return
        features = torch.cat(parts)
        batch: dict[str, Any] = {"features": features}
        if names is not None:
            batch["category"] = list(islice(names, len(features)))
        places = list(islice(skipped, len(features))) if skipped is not None else []
        if any(mask is not None for mask in places):
            stacked = np.stack([nothing if mask is None else mask for mask in places])
            batch["ignore"] = torch.from_numpy(stacked)
        scores, maps = detector.score(batch)
        yield from zip(scores.tolist(), maps.float().cpu().numpy(), strict=True)


def _predict_tiled(
    detector: Detector,
    picture: np.ndarray,
    category: str | None,
    overlap: float,
    ignore: np.ndarray | None,
) -> tuple[float, np.ndarray]:
    shape, size = picture.shape[:2], detector.settings.size
    categories = [category] if category is not None else None
    if not is_tiled(shape, size):
        return next(predict(detector, [picture], categories, ignore=[ignore]))
    at = windows(shape, size, overlap)
    skipped = None if ignore is None else [small_mask(window.of(ignore), size) for window in at]
    tiles = (window.of(picture) for window in at)
    found = list(predict(detector, tiles, categories and categories * len(at), ignore=skipped))
    return worst([score for score, _ in found], skipped), blend((scores for _, scores in found), at, shape)


def at_size(scores: np.ndarray, height: int, width: int) -> np.ndarray:
    """A map at the size of its picture: float32 H×W, bilinear."""
    return cv2.resize(scores, (width, height), interpolation=cv2.INTER_LINEAR)


def map_shape(image: Image, size: int, max_side: int | None, tiles: float | None) -> Shape:
    """(h, w) of the map that :func:`judge` gives a picture."""
    return scored_shape(shrunk((image.height, image.width), max_side), size, tiles)


def judge(
    detector: Detector,
    images: Sequence[Image],
    max_side: int | None = None,
    on_picture: Callable[[int, int], None] | None = None,
    *,
    tiles: float | None = None,
    stress: Stress = UNDISTURBED,
    shape_of: Callable[[Image], Shape] | None = None,
) -> list[Judged]:
    """Score real pictures.

    Args:
        images: rows of the images table; those of one category after each other, see :func:`predict`.
        max_side: as the samples were made with, so that training and test pictures have equal detail.
        on_picture: ``on_picture(done, total)``.
        tiles: see :func:`predict`.
        stress: what is done to the pictures first; their masks move with them.
        shape_of: (h, w) at which a picture's map is compared with its mask, where two detectors of different
            input sizes are; None: the map's own.

    Raises:
        PictureError: a picture or mask cannot be used.
    """
    size = detector.settings.size
    pictures = (disturb(load(image, max_side=max_side), stress, image.image_id) for image in images)
    skipped = [ignored(image, map_shape(image, size, max_side, tiles), stress) for image in images]
    found = predict(detector, pictures, [image.category for image in images], tiles, skipped)
    judged = []
    for image, ignore, (score, scores) in zip(images, skipped, found, strict=True):
        shape = shape_of(image) if shape_of is not None else scores.shape
        if scores.shape != shape:
            scores, ignore = at_size(scores, *shape), ignored(image, shape, stress)
        judged.append(Judged(image, score, scores, truth(image, shape, stress), ignore))
        if on_picture:
            on_picture(len(judged), len(images))
    return judged


def truth(image: Image, size: int | Shape, stress: Stress = UNDISTURBED) -> np.ndarray | None:
    """The mask at size×size, or h×w, by nearest neighbour, bool; None for a defect picture without one."""
    if image.defect == GOOD:
        return np.zeros(_shape(size), bool)
    if image.mask_path is None:
        return None
    return small_mask(place(load_mask(image), stress, image.image_id), size)


def ignored(image: Image, size: int | Shape, stress: Stress = UNDISTURBED) -> np.ndarray | None:
    """Where nothing counts: outside the region of interest, inside the ignore mask, or beyond the picture's
    border where stress moved it; bool, size×size or h×w."""
    moved = stress.kind == "viewpoint" and stress.strength > 0
    if image.roi_path is None and image.ignore_path is None and not moved:
        return None
    shape = (image.height, image.width) if moved else _shape(size)  # moved in the picture's aspect
    skipped = np.zeros(shape, bool)
    if image.roi_path is not None:
        skipped |= ~load_location(image.roi_path, shape)
    if image.ignore_path is not None:
        skipped |= load_location(image.ignore_path, shape)
    return small_mask(place(skipped, stress, image.image_id, outside=True), size) if moved else skipped


def _shape(size: int | Shape) -> Shape:
    return (size, size) if isinstance(size, int) else size


def figures(
    judged: Sequence[Judged],
    *,
    round_: int,
    detector: str,
    split: str,
    training_seed: int,
    resamples: int = 300,
    thresholds: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Rows of the metrics table.

    For each category: all defects; each defect type against all good pictures; each size class of defects
    (pixel metrics only). Then ``category='mean'``: the unweighted mean over categories of the figures for all
    defects and for each size. Pixel figures are given where every defect picture of a category has a mask, so
    that they speak of the same pictures as the image figures. Undefined figures (no defect, no good picture)
    give no row. Intervals resample the images' ``group``.

    Where all defects of a category have saturation thresholds (MVTec LOCO), ``spro`` (up to an FPR of 0.05;
    ``spro@0.3`` and so on up to the others of ``SPRO_FPR_LIMITS``) is given for each type, their mean as
    ``defect='all'``, and, with ``defect='mean'``, the types' mean of ``image_auroc`` (core.md 6.5).

    With alarm ``thresholds`` of picture scores by category: ``image_fpr``, the share of good pictures above
    it, and ``image_recall``, the share of defect pictures above it.
    """
    rows: dict[tuple[str, str, str], dict[str, Estimate]] = {}
    categories = sorted({entry.image.category for entry in judged})
    for number, category in enumerate(categories):
        own = [entry for entry in judged if entry.image.category == category]
        estimates_by = category_figures(own, number, resamples, spro_limits=SPRO_FPR_LIMITS)
        for (defect, size), estimates in estimates_by.items():
            rows[category, defect, size] = estimates
        if thresholds is not None:
            for defect, estimates in _alarms(own, thresholds[category], number, resamples).items():
                key = (category, defect, "all")
                rows[key] = rows.get(key, {}) | estimates
    for defect, size in (("all", "all"), *(("all", size) for size in SIZE_LIMITS), ("mean", "all")):
        shares = [rows[name, defect, size] for name in categories if (name, defect, size) in rows]
        rows["mean", defect, size] = mean_estimates(shares)
    table = []
    for (category, defect, size), estimates in rows.items():
        for metric, estimate in estimates.items():
            if np.isnan(estimate.value):
                continue
            low, high = ends(estimate)
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


def ends(estimate: Estimate) -> tuple[float | None, float | None]:
    """Of the interval, as tables store it: null where it is undefined."""
    low, high = estimate.interval
    return (None, None) if np.isnan(low) else (low, high)


def mean_estimates(shares: Sequence[Mapping[str, Estimate]]) -> dict[str, Estimate]:
    """By metric, the mean over those of ``shares`` that have it."""
    metrics = sorted({metric for share in shares for metric in share})
    return {
        metric: mean_estimate([share[metric] for share in shares if metric in share]) for metric in metrics
    }


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


def whole_category(own: Sequence[Judged], number: int, resamples: int) -> dict[str, Estimate]:
    """Image and pixel figures of one category, all its defects together; empty without a defect.

    Args:
        number: of the category; keeps the categories' resamples apart. The same pictures in the same order
            have the same draws, whatever the detector.
    """
    if not any(entry.anomalous for entry in own):
        return {}
    return _whole(_good_first(own), _masked(own), resamples, _seed(number))


def spro_figures(
    own: Sequence[Judged],
    number: int,
    resamples: int,
    stress: Stress = UNDISTURBED,
    limits: Sequence[float] = (SPRO_FPR_LIMIT,),
) -> dict[str, dict[str, Estimate]]:
    """sPRO of one category up to each of ``limits``, by defect type and metric, the types' mean as ``all``;
    empty unless all defects have thresholds.

    Under ``stress``, with which the pictures were judged, defects move with them, and their saturation areas
    shrink as they do [inferred].

    Maps are brought to the pictures' original sizes, one picture at a time. Memory: twice the bytes of the
    defect-free pixels as float32.
    """
    bad = [entry for entry in own if entry.anomalous]
    if not bad or not all(has_saturations(entry.image) for entry in bad):
        return {}
    own = _good_first(own)
    pixels = []
    for entry in own:
        shape = (entry.image.height, entry.image.width)
        defects = [_moved(*defect, stress, entry.image.image_id) for defect in load_defects(entry.image)]
        skipped = ignored(entry.image, shape, stress)
        pixels.append(saturated_pixels(at_size(entry.map, *shape), defects, skipped))
    return evaluate_spro(
        pixels,
        [entry.image.defect for entry in own],
        [entry.image.group for entry in own],
        limits,
        resamples=resamples,
        seed=_seed(number),
    )


def _moved(mask: np.ndarray, saturation: int, stress: Stress, name: str) -> LogicalDefect:
    moved = place(mask, stress, name)
    return LogicalDefect(moved, max(1, round(saturation * moved.sum() / mask.sum())))


def _good_first(own: Sequence[Judged]) -> list[Judged]:
    """The order in which groups are numbered, and so drawn."""
    return sorted(own, key=lambda entry: entry.anomalous)


def _seed(number: int) -> np.random.SeedSequence:
    return np.random.SeedSequence(0, spawn_key=(number,))


def _masked(own: Sequence[Judged]) -> bool:
    return all(entry.mask is not None for entry in own)


def category_figures(
    own: Sequence[Judged],
    number: int,
    resamples: int,
    parts: bool = True,
    spro_limits: Sequence[float] = (SPRO_FPR_LIMIT,),
) -> dict[tuple[str, str], dict[str, Estimate]]:
    """Estimates of one category by (defect, size): all defects; with ``parts`` each defect type against all
    good pictures, each size class of defects too, and ``mean`` (see :func:`figures`). Empty without a defect.

    Args:
        number: see :func:`whole_category`.
    """
    found: dict[tuple[str, str], dict[str, Estimate]] = {}
    own = _good_first(own)
    good = [entry for entry in own if not entry.anomalous]
    bad = [entry for entry in own if entry.anomalous]
    if not bad:
        return found
    seed, masked = _seed(number), _masked(own)
    for defect in ["all", *(sorted({entry.image.defect for entry in bad}) if parts else [])]:
        chosen = good + [entry for entry in bad if defect in ("all", entry.image.defect)]
        found[defect, "all"] = _whole(chosen, masked, resamples, seed)
    if masked and parts:
        for size in sorted({size for entry in bad for size in entry.sizes}):
            found["all", size] = _pixels(own, size, resamples, seed)
    saturated = spro_figures(own, number, resamples, limits=spro_limits)
    for defect, estimates in saturated.items():
        if (defect, "all") in found:
            found[defect, "all"] |= estimates
    if saturated and good and parts:
        defects = np.array([entry.image.defect for entry in own])
        types = [
            _images(own, resamples, seed, (defects == GOOD) | (defects == name))["image_auroc"]
            for name in sorted(set(defects) - {GOOD})
        ]
        found["mean", "all"] = {"image_auroc": mean_estimate(types)}
    return found


def _alarms(
    own: Sequence[Judged], threshold: float, number: int, resamples: int
) -> dict[str, dict[str, Estimate]]:
    """By defect name: shares of good (all) and of defect pictures that score above the threshold."""

    def rate(chosen: Sequence[Judged]) -> Estimate:
        return evaluate_rate(
            np.array([entry.score > threshold for entry in chosen]),
            [entry.image.group for entry in chosen],
            resamples=resamples,
            seed=_seed(number),
        )

    bad = [entry for entry in own if entry.anomalous]
    found = {"all": {"image_fpr": rate([entry for entry in own if not entry.anomalous])}}
    found["all"]["image_recall"] = rate(bad)
    for defect in sorted({entry.image.defect for entry in bad}):
        found[defect] = {"image_recall": rate([entry for entry in bad if entry.image.defect == defect])}
    return found


def _whole(
    chosen: Sequence[Judged], masked: bool, resamples: int, seed: np.random.SeedSequence
) -> dict[str, Estimate]:
    """Image figures where there is a good picture, pixel figures where there are masks."""
    estimates: dict[str, Estimate] = {}
    if not all(entry.anomalous for entry in chosen):
        estimates |= _images(chosen, resamples, seed)
    if masked:
        estimates |= _pixels(chosen, "all", resamples, seed)
    return estimates


def _images(
    chosen: Sequence[Judged],
    resamples: int,
    seed: np.random.SeedSequence,
    counted: np.ndarray | None = None,
) -> dict[str, Estimate]:
    return evaluate_images(
        np.array([entry.score for entry in chosen]),
        np.array([entry.anomalous for entry in chosen]),
        [entry.image.group for entry in chosen],
        counted=counted,
        resamples=resamples,
        seed=seed,
    )


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
