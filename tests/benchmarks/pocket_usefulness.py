"""Of what use to a detector the samples of each composition are, by the proxy of a run.

A linear head on frozen features learns from a row's accepted samples and is judged on real defects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table

from generation.backbones import Backbone, load_backbone, to_batch
from manifests.errors import FlawsmithError
from manifests.pictures import load
from manifests.schema import GOOD, Image
from tests.benchmarks.pocket_case import Case, Part, Units, described, evenly, shown, table
from tests.benchmarks.pocket_samples import DEFAULT, ROWS, SIDE
from training import proxy
from training.evaluation import truth
from training.examples import chunks
from training.intervals import Estimate, draw_counts

MOST_NORMALS = 48  # a category, as in a run
RESAMPLES = 100  # of recipes and pictures together; each solves a head a row


def usefulness_units(case: Case) -> list[str]:
    return ["proxy"]


def judged_categories(case: Case) -> list[str]:
    """Those whose feedback pictures are of both kinds, every defect with its mask."""
    chosen = []
    for category in case.categories:
        images = case.of(category, "feedback")
        bad = [image for image in images if image.defect != GOOD]
        if bad and len(bad) < len(images) and all(image.mask_path is not None for image in bad):
            chosen.append(category)
    return chosen


def usefulness(case: Case, _unit: str) -> dict[str, Any]:
    """Pixel AP on the feedback split of a linear head that learned from a row's accepted samples.

    The head and its features are those of the trials inside a run. Resamples draw recipes and groups of
    pictures together, the same ones for every row.
    """
    categories = judged_categories(case)
    files = {category: case.samples / f"{category}.npz" for category in categories}
    missing = [category for category, file in files.items() if not file.exists()]
    if missing or not categories:
        raise FlawsmithError(
            f"usefulness needs the samples of `composition` for {', '.join(missing) or 'some category'} in "
            f"{case.samples} and categories with masks; measure that part first (delete it from the file if "
            "its samples are gone)"
        )
    backbone = load_backbone()
    rng = np.random.default_rng(case.seed)
    banks, negatives, judged = {}, [], {}
    for category in categories:
        own = evenly(case.of(category, "train"), MOST_NORMALS)
        banks[category] = proxy.normal_bank(_features(backbone, [load(i) for i in own[::2]]), rng)
        rest = _features(backbone, [load(image) for image in own[1::2] or own])
        negatives.append(proxy.residuals(rest, banks[category]))
        judged[category] = _Judged(case.of(category, "feedback"), backbone, banks[category])
    normals = np.concatenate(negatives)

    recipes: dict[str, int] = {}
    evidence: dict[str, proxy.Evidence] = {}
    places: dict[str, list[tuple[str, int]]] = {}
    for name in ROWS:
        residuals, masks, places[name] = [], [], []
        for category in categories:
            with np.load(files[category]) as stored:
                recipes[category] = int(stored["recipes"])
                numbers = sorted({int(k.split("|")[1]) for k in stored if k.startswith(f"{name}|")})
                pictures = [stored[f"{name}|{at}|image"] for at in numbers]
                masks += [stored[f"{name}|{at}|mask"] for at in numbers]
            if numbers:
                residuals += list(proxy.residuals(_features(backbone, pictures), banks[category]))
                places[name] += [(category, at) for at in numbers]
        if residuals:
            evidence[name] = proxy.with_samples(proxy.of_normals(normals), residuals, masks, squares=True)

    spawned = [np.random.SeedSequence(case.seed, spawn_key=(k,)) for k in range(2 * len(categories))]
    drawn = {
        category: draw_counts(recipes[category], RESAMPLES, spawned[2 * k])
        for k, category in enumerate(categories)
    }
    groups = {
        category: draw_counts(judged[category].group_count, RESAMPLES, spawned[2 * k + 1])
        for k, category in enumerate(categories)
    }
    result = {}
    for name in ROWS:
        if name not in evidence:
            result[name] = {"samples": 0, "value": None, "categories": {}, "resamples": []}
            continue
        ones = np.ones(len(places[name]))
        head = proxy.solve(evidence[name], ones, spread=1)
        values = {c: judged[c].score(evidence[name].scale, head) for c in categories}
        again = []
        for k in range(RESAMPLES):
            weights = np.array([drawn[category][k, at] for category, at in places[name]])
            if weights.sum() == 0:
                again.append(float("nan"))
                continue
            head = proxy.solve(evidence[name], weights, spread=1)
            scores = [judged[c].score(evidence[name].scale, head, groups[c][k]) for c in categories]
            again.append(float(np.nanmean(scores)) if np.isfinite(scores).any() else float("nan"))
        result[name] = {
            "samples": len(places[name]),
            "value": float(np.mean(list(values.values()))),
            "categories": values,
            "resamples": again,
        }
    return {"rows": result}


class _Judged:
    """The feedback pictures of one category."""

    def __init__(self, images: Sequence[Image], backbone: Backbone, bank: torch.Tensor):
        self._residual = proxy.residuals(_features(backbone, [load(image) for image in images]), bank)
        grid = (self._residual.shape[1], self._residual.shape[2])
        masks = []
        for image in images:
            mask = truth(image, SIDE)
            assert mask is not None
            masks.append(proxy.shrink_mask(mask, grid))
        self._masks = np.stack(masks)
        names = sorted({image.group for image in images})
        self._group = np.array([names.index(image.group) for image in images])
        self.group_count = len(names)

    def score(self, scale: np.ndarray, head: np.ndarray, counts: np.ndarray | None = None) -> float:
        """Pixel AP; ``counts``: how often each group was drawn."""
        maps = proxy.score_maps(self._residual, scale, head)
        times = np.ones(len(maps)) if counts is None else counts[self._group]
        weights = np.broadcast_to(times[:, None, None], maps.shape)
        return average_precision(maps.ravel(), self._masks.ravel(), weights.ravel())


def average_precision(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray) -> float:
    """Weighted average precision, ties collapsed; NaN if nothing positive has a weight.

    >>> average_precision(np.array([3.0, 2.0, 1.0]), np.array([True, False, True]), np.ones(3))
    0.8333333333333333
    """
    order = np.argsort(-scores)
    scores, weights = scores[order], weights[order]
    hits, all_ = np.cumsum(weights * positive[order]), np.cumsum(weights)
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    hits, all_ = hits[last], all_[last]
    if hits[-1] == 0:
        return float("nan")
    return float((np.diff(hits, prepend=0) * hits / np.maximum(all_, 1e-12)).sum() / hits[-1])


def _features(backbone: Backbone, pictures: Sequence[np.ndarray]) -> torch.Tensor:
    return torch.cat([backbone.features(to_batch(chunk, SIDE)).cpu() for chunk in chunks(pictures, 16)])


def usefulness_summary(units: Units) -> dict[str, Any]:
    if not units:
        return {"rows": {}, "default": DEFAULT}
    rows = next(iter(units.values()))["rows"]

    def found(name: str) -> Estimate:
        row = rows[name]
        value = float("nan") if row["value"] is None else row["value"]
        return Estimate(value, np.asarray(row["resamples"] or [float("nan")], np.float64))

    base = found(DEFAULT)
    result = {}
    for name in rows:
        own = found(name)
        result[name] = {
            "pixel_ap": described(own),
            "gain": described(Estimate(own.value - base.value, own.resamples - base.resamples)),
            "samples": rows[name]["samples"],
            "categories": rows[name]["categories"],
        }
    return {"rows": result, "default": DEFAULT}


def usefulness_tables(summary: dict[str, Any]) -> list[Table]:
    title = "usefulness: pixel AP on feedback pictures of a head that learned from a row's accepted samples"
    rows = table(title, "samples of", "pixel AP", "against the default, paired", "samples")
    for name, row in summary["rows"].items():
        label = f"{name} (default)" if name == summary["default"] else name
        rows.add_row(label, shown(row["pixel_ap"]), shown(row["gain"], "+.3f"), str(row["samples"]))
    return [rows]


USE_PARTS = {"usefulness": Part(usefulness_units, usefulness, usefulness_summary, usefulness_tables)}
