"""How a round's detector holds when viewpoint, light or focus change: curves on the feedback pictures."""

from __future__ import annotations

import warnings
from typing import Any

from manifests.schema import STRESS, to_table
from manifests.workspace import Workspace, round_file
from training.evaluation import (
    UNDISTURBED,
    Judged,
    ends,
    judge,
    mean_estimates,
    spro_figures,
    whole_category,
)
from training.intervals import Estimate
from training.stress import LEVELS, STRENGTHS, Stress
from workflows.console import progress
from workflows.detecting import load_detector, marked
from workflows.rounds import open_round

FILE = "stress.parquet"


def stress(space: Workspace, number: int) -> list[dict[str, Any]]:
    """The rows of the round's ``stress.parquet``, made if it is not there: every metric of the feedback
    split, by category and in the mean, at each level of each kind. Level 0 holds the figures of
    ``metrics.parquet``.

    The test split is not touched.

    Raises:
        FlawsmithError: the round has no trained detector.
    """
    name = round_file(number, FILE)
    if space.exists(name):
        return space.read_table(name).to_pylist()
    round_ = open_round(space, number)
    detector, _ = load_detector(space, number)
    images = [image for image in round_.images.values() if image.split == "feedback"]
    labels = {"round": number, "detector": marked(round_.config.detector.name, detector.settings)}
    labels["seed"] = round_.config.seed
    levels = [Stress(kind, level) for kind in STRENGTHS for level in LEVELS[1:]]
    rows: list[dict[str, Any]] = []
    with progress(f"round {number}: stress", len(images) * (1 + len(levels)), "pictures") as advance:

        def figures(under: Stress) -> dict[str, dict[str, Estimate]]:
            judged = judge(
                detector,
                images,
                round_.config.output.max_side,
                lambda _done, _total: advance(1),
                tiles=round_.config.detector.tiles,
                stress=under,
            )
            return by_category(judged, round_.config.evaluation.resamples, under)

        plain = figures(UNDISTURBED)
        found = {Stress(kind, 0): plain for kind in STRENGTHS} | {under: figures(under) for under in levels}
    for under, categories in found.items():
        place = {"kind": under.kind, "level": under.level, "strength": under.strength}
        for category, estimates in categories.items():
            for metric, estimate in estimates.items():
                if estimate.value == estimate.value:
                    low, high = ends(estimate)
                    rows.append(
                        {**labels, **place, "category": category, "metric": metric}
                        | {"value": estimate.value, "low": low, "high": high}
                    )
    table = to_table(rows, STRESS)
    space.write_table(name, table)
    return table.to_pylist()


def by_category(judged: list[Judged], resamples: int, under: Stress) -> dict[str, dict[str, Estimate]]:
    """Figures of every category of pictures that were judged under stress, all its defects together, and
    their mean as ``mean``."""
    names = sorted({entry.image.category for entry in judged})
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # undefined figures give no row
        for number, name in enumerate(names):
            own = [entry for entry in judged if entry.image.category == name]
            found[name] = whole_category(own, number, resamples)
            found[name] |= spro_figures(own, number, resamples, under).get("all", {})
    return found | {"mean": mean_estimates(list(found.values()))}
