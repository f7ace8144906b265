"""What a workspace says about its rounds, read once; what a stopped run lacks is left empty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow.compute as pc

from manifests.schema import Image
from manifests.workspace import Workspace, round_file
from workflows import history
from workflows.heatmaps import FOUND_FROM, TABLE, defect_key
from workflows.rounds import vetoes
from workflows.stored import source_images

Row = dict[str, Any]
STATUSES = ("accepted", "rejected", "failed")
HIDDEN = "…"  # in place of what names a file


@dataclass(frozen=True)
class Facts:
    """Tables of a workspace.

    Attributes:
        images: every real picture and texture.
        rounds: numbers of the rounds that have settings.
        settings: by round, the stored ``settings.yaml``.
        metrics: rows of every round; where there are several seeds, the detector's name says which.
        outcomes: one row a round, generator, status and reason, with ``count``, ``attempts`` and ``seconds``.
        found: by judged round, what was found of each real defect of the feedback split.
        decisions, heatmaps, stress: rows of every round; heat maps have their ``round``.
        history: what was kept of every round (:mod:`workflows.history`).
        seconds: by (stage, round).
        bytes: of the shards, by round.
        vetoed: samples that a person rejected.
    """

    images: Sequence[Image]
    rounds: Sequence[int]
    settings: Mapping[int, Row]
    metrics: Sequence[Row]
    outcomes: Sequence[Row]
    found: Mapping[int, Sequence[Row]]
    decisions: Sequence[Row]
    heatmaps: Sequence[Row]
    stress: Sequence[Row]
    history: Sequence[Row]
    seconds: Mapping[tuple[str, int], float]
    bytes: Mapping[int, int]
    vetoed: frozenset[str]


@dataclass(frozen=True)
class TypeOutcome:
    """What a round found of one type of defect on the feedback split.

    ``gained`` were misses in the round before and ``lost`` were found there; both are 0 where there is no
    round before, or none of these defects in it, as where its detector's input has another size (``compared``
    is false).
    """

    round: int
    category: str
    defect: str
    defects: int
    found: int
    gained: int
    lost: int
    compared: bool

    @property
    def missed(self) -> int:
        return self.defects - self.found


def read_facts(space: Workspace) -> Facts:
    """Everything that the page says besides the samples one by one.

    Raises:
        WorkspaceError: a table is damaged.
    """
    rounds = space.rounds()
    judged = [number for number in rounds if space.exists(round_file(number, "found.parquet"))]
    made = [number for number in rounds if space.exists(round_file(number, "shards.parquet"))]
    kept = history.read(space)
    return Facts(
        images=source_images(space),
        rounds=rounds,
        settings={number: space.read_yaml(round_file(number, "settings.yaml")) for number in rounds},
        metrics=_metrics(space, rounds),
        outcomes=[row for number in rounds for row in _outcomes(space, number)],
        found={
            number: space.read_table(round_file(number, "found.parquet")).to_pylist() for number in judged
        },
        decisions=_rows(space, rounds, "decisions.parquet"),
        heatmaps=[{"round": number, **row} for number in rounds for row in _rows(space, [number], TABLE)],
        stress=_rows(space, rounds, "stress.parquet"),
        history=kept,
        seconds=_seconds(kept),
        bytes={
            number: pc.sum(space.read_table(round_file(number, "shards.parquet"))["bytes"]).as_py() or 0
            for number in made
        },
        vetoed=frozenset(vetoes(space)),
    )


def without_paths(facts: Facts) -> Facts:
    """Without what says where a file lies: paths of pictures and in the settings, and the messages of failed
    recipes, which name files."""
    return replace(
        facts,
        images=[replace(image, path=HIDDEN) for image in facts.images],
        settings={number: _hidden(settings) for number, settings in facts.settings.items()},
        outcomes=[row_without_paths(row) for row in facts.outcomes],
    )


def row_without_paths(row: Row) -> Row:
    """The same of a sample's row."""
    hidden = {"reason": row["reason"].partition(":")[0]} if row["status"] == "failed" else {}
    return row | hidden | ({"params": HIDDEN} if _is_path(row.get("params")) else {})


def _hidden(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _hidden(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_hidden(inner) for inner in value]
    return HIDDEN if _is_path(value) else value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool({"/", "\\"} & set(value))


def type_outcomes(found: Mapping[int, Sequence[Row]]) -> list[TypeOutcome]:
    """By judged round and type of defect, sorted by round, category and type."""
    results = []
    for number in sorted(found):
        before = {defect_key(row): row["hit"] >= FOUND_FROM for row in found.get(number - 1, ())}
        compared = any(defect_key(row) in before for row in found[number])
        counts: dict[tuple[str, str], Counter[str]] = {}
        for row in found[number]:
            own = counts.setdefault((row["category"], row["defect"]), Counter())
            now, then = row["hit"] >= FOUND_FROM, before.get(defect_key(row))
            own.update(defects=1, found=now, gained=then is False and now, lost=then is True and not now)
        results += [
            TypeOutcome(number, *key, own["defects"], own["found"], own["gained"], own["lost"], compared)
            for key, own in sorted(counts.items())
        ]
    return results


def matching(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows that have every one of these values."""
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _rows(space: Workspace, rounds: Iterable[int], name: str) -> list[Row]:
    """The rows of one table of every round that has it."""
    paths = [round_file(number, name) for number in rounds]
    return [row for path in paths if space.exists(path) for row in space.read_table(path).to_pylist()]


def _metrics(space: Workspace, rounds: Iterable[int]) -> list[Row]:
    rows = _rows(space, rounds, "metrics.parquet")
    if len({row["seed"] for row in rows}) > 1:
        rows = [row | {"detector": f"{row['detector']}, seed {row['seed']}"} for row in rows]
    return rows


def _outcomes(space: Workspace, number: int) -> list[Row]:
    """Recipes of the shards that are finished, counted."""
    keys = ["generator", "status", "reason"]
    sums: dict[tuple[str, ...], Counter[str]] = {}
    folder = round_file(number, "samples")
    names = [f"{folder}/{name}" for name in space.names(folder)]
    for table in space.read_many(names, space.read_table):
        grouped = table.group_by(keys).aggregate([([], "count_all"), ("attempts", "sum"), ("seconds", "sum")])
        for row in grouped.to_pylist():
            sums.setdefault(tuple(row[key] for key in keys), Counter()).update(
                count=row["count_all"], attempts=row["attempts_sum"] or 0, seconds=row["seconds_sum"] or 0
            )
    return [
        {"round": number, **dict(zip(keys, group, strict=True)), **own} for group, own in sorted(sums.items())
    ]


def _seconds(history: Sequence[Row]) -> dict[tuple[str, int], float]:
    """Of each stage, all its tries together."""
    return {
        (row["name"], row["round"]): float(row["value"])
        for row in history
        if row["kind"].split(".")[0] == "seconds"
    }
