"""Every sample of a workspace as columns for the page: recipe, outcome, measures and where it came from."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

from manifests.schema import SAMPLES, Image
from manifests.workspace import Workspace, round_file
from workflows.report.facts import Row

MOST_ROWS = 20_000
LEFT_OUT = ("offset", "status")  # of the stored columns; the status is told by ``outcome``
REJECTED_BY_HAND = "rejected by hand"


def read_rows(space: Workspace, rounds: Sequence[int], vetoed: frozenset[str]) -> tuple[list[Row], int]:
    """(rows of the samples tables with their ``outcome``, how many there are in all).

    By round and in plan order; of more than :data:`MOST_ROWS` every n-th.

    Raises:
        WorkspaceError: a table is damaged.
    """
    names = [
        f"{round_file(number, 'samples')}/{name}"
        for number in rounds
        for name in space.names(round_file(number, "samples"))
    ]
    total = sum(space.read_many(names, lambda name: space.read_table(name).num_rows))
    step = max(1, math.ceil(total / MOST_ROWS))
    rows, passed = [], 0
    for table in space.read_many(names, space.read_table):
        rows += table.take(list(range(-passed % step, table.num_rows, step))).to_pylist()
        passed += table.num_rows
    for row in rows:
        row["outcome"] = REJECTED_BY_HAND if row["sample_id"] in vetoed else row["status"]
    return rows, total


def columns(rows: Sequence[Row], images: Sequence[Image], *, paths: bool) -> dict[str, Any]:
    """The rows by column: a list of values, or ``{"values": …, "codes": …}`` where many are equal.

    Args:
        paths: whether to say which file a sample was made from.
    """
    known = {image.image_id: image for image in images}
    found: dict[str, list[Any]] = {
        name: [_plain(row[name]) for row in rows]
        for name in [*SAMPLES.names, "outcome"]
        if name not in LEFT_OUT
    }
    sources = [known.get(row["image_id"]) for row in rows]
    found["licence"] = [(source.licence or "") if source else "" for source in sources]
    if paths:
        found["source"] = [source.path if source else "" for source in sources]
    return {name: _coded(values) for name, values in found.items()}


def replay_command(space: Workspace, *, paths: bool) -> str:
    """What makes a sample again, up to its id.

    Args:
        paths: whether to say where the workspace is, or only what its folder is called.
    """
    url = space.url.rstrip("/")
    return f"flawsmith replay {shlex.quote(url if paths else url.rsplit('/', 1)[-1])}"


def _plain(value: Any) -> Any:
    """As JSON holds it and a reader needs it: six digits; whole numbers beyond 2⁵³ as text."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, int) and abs(value) > 2**53:
        return str(value)
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else value


def _coded(values: list[Any]) -> Any:
    keys = [(type(value), value) for value in values]  # 0, 0.0 and False are equal, but read otherwise
    distinct = list(dict.fromkeys(keys))
    if len(distinct) > len(values) / 2:
        return values
    codes = {key: code for code, key in enumerate(distinct)}
    return {"values": [value for _, value in distinct], "codes": [codes[key] for key in keys]}
