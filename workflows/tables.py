"""Figures of a workspace as plain text, for the terminal and the logs."""

from __future__ import annotations

from typing import Any

from manifests.schema import images_from
from manifests.workspace import Workspace, round_file

IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1max")
PIXEL_METRICS = ("pixel_auroc", "pixel_ap", "pixel_f1max", "aupro")


def figures_table(space: Workspace, split: str) -> str:
    """Metrics of every round on one split, a line a round and category, with intervals."""
    metrics = (*IMAGE_METRICS, *PIXEL_METRICS)
    rows = [["round", "category", *metrics]]
    for number in space.rounds():
        found: dict[str, dict[str, str]] = {}
        for row in metric_rows(space, number):
            if row["split"] == split and row["defect"] == "all" and row["size"] == "all":
                found.setdefault(row["category"], {})[row["metric"]] = _with_interval(row)
        for category in sorted(found, key=lambda name: (name == "mean", name)):
            rows.append([str(number), category, *(found[category].get(m, "–") for m in metrics)])
    return _align(rows) if len(rows) > 1 else f"no figures on the {split} split yet"


def rounds_table(space: Workspace) -> str:
    """One line a round: means on the feedback split, acceptance, seconds a stage."""
    history: dict[int, dict[str, str]] = {}
    if space.exists("history.parquet"):
        for row in space.read_table("history.parquet").to_pylist():
            history.setdefault(row["round"], {})[row["name"]] = row["value"]
    stages = ("generate", "train", "evaluate", "feedback")
    metrics = ("image_auroc", "image_ap", "pixel_ap", "aupro")
    rows = [["round", *(f"{m} (feedback)" for m in metrics), "accepted", *(f"{s} s" for s in stages)]]
    for number in space.rounds():
        means = {
            row["metric"]: _with_interval(row)
            for row in metric_rows(space, number)
            if (row["split"], row["category"], row["size"]) == ("feedback", "mean", "all")
        }
        facts = history.get(number, {})
        rows.append(
            [
                str(number),
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


def _with_interval(row: dict[str, Any]) -> str:
    if row["low"] is None or row["low"] != row["low"]:
        return f"{row['value']:.3f}"
    return f"{row['value']:.3f} [{row['low']:.2f}, {row['high']:.2f}]"


def _align(rows: list[list[str]]) -> str:
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
