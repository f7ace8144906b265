"""What a workspace keeps of its rounds beside their tables: settings, figures, yields, the seconds of stages,
and how it went on. One table, ``history.parquet``: a row a fact.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from typing import Any

from manifests.schema import HISTORY, to_table
from manifests.workspace import Workspace

TABLE = "history.parquet"


def read(space: Workspace) -> list[dict[str, Any]]:
    """All rows; none before the first."""
    return space.read_table(TABLE).to_pylist() if space.exists(TABLE) else []


def remember(space: Workspace, number: int, kind: str, facts: Mapping[str, Any]) -> None:
    """Writes facts of a round, in place of earlier ones of the same kind."""
    rows = [{"round": number, "kind": kind, "name": name, "value": str(v)} for name, v in facts.items()]
    space.append_table(TABLE, to_table(rows, HISTORY), {"round": number, "kind": kind})


def forget(space: Workspace, stale: Container[tuple[int, str]]) -> None:
    """Removes facts, by round and kind."""
    rows = read(space)
    kept = [row for row in rows if (row["round"], row["kind"]) not in stale]
    if len(kept) < len(rows):
        space.write_table(TABLE, to_table(kept, HISTORY))


def facts_of(rows: Sequence[Mapping[str, Any]], number: int, kind: str) -> dict[str, str]:
    """Of one round and kind, by name."""
    return {row["name"]: row["value"] for row in rows if (row["round"], row["kind"]) == (number, kind)}


def spent(space: Workspace, kind: str, rounds: range) -> float:
    """The seconds of some rounds under kinds that begin with ``kind``: ``seconds.`` of all stages,
    ``seconds.train`` of one."""
    return sum(
        float(row["value"]) for row in read(space) if row["round"] in rounds and row["kind"].startswith(kind)
    )


def in_words(rows: Sequence[Mapping[str, Any]], number: int) -> list[str]:
    """What was concluded from a round besides its decisions on settings: how its samples were weighed, its
    gain over the best round before it, and why the run stopped after it."""
    said = []
    weighed = facts_of(rows, number, "weighing")
    if weighed:
        said.append(weighed["result"])
    gain = facts_of(rows, number, "gain")
    if "metric" in gain:
        difference, low, high = (float(gain[name]) for name in ("difference", "low", "high"))
        chance = "" if low > 0 or high < 0 else ", no more than chance"
        interval = "without an interval" if math.isnan(low) else f"[{low:+.3f}, {high:+.3f}]{chance}"
        said.append(f"against round {gain['against']}: {gain['metric']} {difference:+.3f} {interval}")
    stop = facts_of(rows, number, "stop")
    if stop:
        said.append(f"the run stopped after it: {stop['reason']}")
    return said
