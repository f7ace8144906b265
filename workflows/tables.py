"""Figures of a workspace as plain text, for the terminal and the logs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from manifests.schema import images_from
from manifests.workspace import Workspace, round_file
from workflows import history

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")


def figures_table(space: Workspace, split: str) -> str:
    """Metrics of every round on one split, a line a round and category, with intervals."""
    stored = {
        str(number): [row for row in metric_rows(space, number) if row["split"] == split]
        for number in space.rounds()
    }
    return categories_table("round", stored) or f"no figures on the {split} split"


def categories_table(title: str, named: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Rows of the metrics table, by the name that stands in the column ``title``: a line a name and category,
    of all defects together, with intervals; empty without figures."""
    stored = {
        name: [row for row in rows if row["defect"] == "all" and row["size"] == "all"]
        for name, rows in named.items()
    }
    saturated = any(row["metric"] == "spro" for own in stored.values() for row in own)
    metrics = (*IMAGE_METRICS, *PIXEL_METRICS, *(["spro"] if saturated else []))
    rows = [[title, "detector", "category", *metrics]]
    for label, own in stored.items():
        found: dict[tuple[str, str], dict[str, str]] = {}
        for row in own:
            found.setdefault((row["detector"], row["category"]), {})[row["metric"]] = _with_interval(row)
        for key in sorted(found, key=lambda key: (key[0], key[1] == "mean", key[1])):
            rows.append([label, *key, *(found[key].get(m, "–") for m in metrics)])
    return _align(rows) if len(rows) > 1 else ""


def alarms_lines(space: Workspace, split: str) -> str:
    """A line a round: how often good pictures raised an alarm, and how many defect pictures did; means over
    categories. ``heldout_synthetic`` holds the calibration normals that the thresholds were set on."""
    lines = []
    for number in space.rounds():
        found = {
            (row["split"], row["metric"]): f"{row['value']:.1%}" + _percent_interval(row)
            for row in metric_rows(space, number)
            if row["category"] == "mean" and row["defect"] == "all" and row["size"] == "all"
        }
        if (split, "image_fpr") in found or (split, "image_recall") in found:
            quantile = space.read_yaml(round_file(number, "settings.yaml"))["config"]["evaluation"][
                "quantile"
            ]
            lines.append(
                f"round {number}: alarms at the {quantile:g} quantile of calibration normals: "
                f"{found.get(('heldout_synthetic', 'image_fpr'), '–')} of calibration normals, "
                f"{found.get((split, 'image_fpr'), '–')} of {split} normals, "
                f"{found.get((split, 'image_recall'), '–')} of {split} defect pictures"
            )
    return "\n".join(lines)


def stress_table(rows: list[dict[str, Any]]) -> str:
    """The curves of one round, means over categories: a line a metric and kind, a column a level, then the
    mean over the disturbed levels and by how much it lies beside level 0, as a share of it."""
    means = [row for row in rows if row["category"] == "mean"]
    curves: dict[tuple[str, str], dict[int, float]] = {}
    for row in means:
        curves.setdefault((row["metric"], row["kind"]), {})[row["level"]] = row["value"]
    levels = sorted({row["level"] for row in means})
    lines = [["metric", "stress", *(f"level {level}" for level in levels), "mean of 1 and up", "change"]]
    worst: tuple[float, str] = (0.0, "")
    for (metric, kind), curve in sorted(curves.items()):
        mean = sum(curve.get(level, math.nan) for level in levels[1:]) / max(1, len(levels) - 1)
        change = mean / curve[0] - 1 if curve.get(0) else math.nan
        if metric == "image_auroc" and change < worst[0]:
            worst = (change, f"image AUROC suffers most from {kind}")
        cells = [f"{curve[level]:.3f}" if level in curve else "–" for level in levels]
        lines.append([metric, kind, *cells, f"{mean:.3f}", f"{change:+.1%}"])
    if len(lines) == 1:
        return "no figures under stress: the feedback split has no defect pictures"
    return _align(lines) + (f"\n{worst[1]}" if worst[1] else "")


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Two detectors, as :func:`training.comparison.compare` gives them, all defects of a category together:
    a line a metric and category."""
    lines = [["metric", "category", "A", "B", "B − A", "95 % interval", "p", "p (Holm)"]]
    for row in rows:
        if row["size"] != "all" or row["defect"] not in ("all", "mean"):
            continue
        lines.append(
            [
                row["metric"] + (" (mean of types)" if row["defect"] == "mean" else ""),
                row["category"],
                f"{row['first']:.3f}",
                f"{row['second']:.3f}",
                f"{row['difference']:+.3f}",
                _ends(row) or "–",
                *("–" if math.isnan(row[name]) else f"{row[name]:.2g}" for name in ("p", "holm")),
            ]
        )
    return _align(lines)


def parts_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The same by defect type, then by size of defects: a line each, in a column a metric A's figure, B − A
    with its interval, and a star where Holm's p is below 5 %; empty without any."""
    columns = ("image_auroc", "pixel_ap", "aupro", "spro")
    found: dict[tuple[bool, str, str], dict[str, str]] = {}
    for row in rows:
        if row["size"] == "all" and row["defect"] in ("all", "mean"):
            continue
        sized = row["size"] != "all"
        cell = f"{row['first']:.3f} {row['difference']:+.3f} {_ends(row)}"
        star = " *" if row["holm"] < 0.05 else ""
        place = found.setdefault((sized, row["category"], row["size"] if sized else row["defect"]), {})
        place[row["metric"]] = cell.rstrip() + star
    if not found:
        return ""
    shown = [metric for metric in columns if any(metric in own for own in found.values())]
    order = sorted(found, key=lambda place: (place[0], place[1] == "mean", place[1]))
    lines = [[*place[1:], *(found[place].get(metric, "–") for metric in shown)] for place in order]
    return _align([["category", "defects", *shown], *lines])


def _ends(row: Mapping[str, Any]) -> str:
    return "" if math.isnan(row["low"]) else f"[{row['low']:+.3f}, {row['high']:+.3f}]"


def rounds_table(space: Workspace) -> str:
    """One line a round: means on the feedback split, acceptance, seconds a stage."""
    kept: dict[int, dict[str, str]] = {}
    for row in history.read(space):
        kept.setdefault(row["round"], {})[row["name"]] = row["value"]
    stages = ("generate", "train", "evaluate", "feedback")
    metrics = ("image_auroc", "image_ap", "pixel_ap", "aupro")
    head = ["round", "detector", *(f"{m} (feedback)" for m in metrics), "accepted"]
    rows = [[*head, *(f"{s} s" for s in stages)]]
    for number in space.rounds():
        stored = metric_rows(space, number)
        judged = [
            row
            for row in stored
            if [row[key] for key in ("split", "category", "defect", "size")]
            == ["feedback", "mean", "all", "all"]
        ]
        means = {row["metric"]: _with_interval(row) for row in judged}
        facts = kept.get(number, {})
        rows.append(
            [
                str(number),
                stored[0]["detector"] if stored else "–",
                *(means.get(metric, "–") for metric in metrics),
                facts.get("acceptance", "–"),
                *(facts.get(stage, "–") for stage in stages),
            ]
        )
    return _align(rows)


def metric_rows(space: Workspace, number: int) -> list[dict[str, Any]]:
    name = round_file(number, "metrics.parquet")
    return space.read_table(name).to_pylist() if space.exists(name) else []


def licences(space: Workspace) -> str:
    """The licences of the pictures, each once."""
    images = images_from(space.read_table("images.parquet"))
    return "; ".join(sorted({image.licence for image in images if image.licence})) or "not stated"


def _percent_interval(row: Mapping[str, Any]) -> str:
    if row["low"] is None or math.isnan(row["low"]):
        return ""
    return f" [{row['low']:.1%}, {row['high']:.1%}]"


def _with_interval(row: Mapping[str, Any]) -> str:
    if row["low"] is None or row["low"] != row["low"]:
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} [{row['low']:.2f}, {row['high']:.2f}]"


def _align(rows: list[list[str]]) -> str:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
