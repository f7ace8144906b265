"""Which shards of a round are finished: told by listings and records; nothing is hashed.

A round may have a million shards, and an object store takes milliseconds a request: two listings and the
round's own table answer for all that an earlier run recorded. Only what it had not yet is asked for singly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.shards import record_of
from manifests.storage import Unreachable
from manifests.workspace import Workspace, WorkspaceError, part, round_file

Record = dict[str, Any]


def unfinished(
    space: Workspace, number: int, count: int, damaged: set[int]
) -> tuple[list[Record], list[int]]:
    """(records of finished shards in order, numbers of those to make).

    A shard is finished if its tar and its samples table have as many bytes as its record says.
    """
    tars = space.sizes(f"rounds/{number:03d}/shards")
    tables = space.sizes(f"rounds/{number:03d}/samples")

    def is_whole(record: Record | None) -> bool:
        return (
            record is not None
            and tars.get(_base(record["path"])) == record["bytes"]
            and tables.get(_table(record["shard"])) == record["samples_bytes"]
        )

    recorded = {record["shard"]: record for record in _recorded(space, number)}
    candidates = [shard for shard in range(count) if shard not in damaged and _table(shard) in tables]
    unknown = [shard for shard in candidates if not is_whole(recorded.get(shard))]
    for record in _from_tables(space, number, unknown):
        recorded[record["shard"]] = {**record, "samples_bytes": tables[_table(record["shard"])]}
    finished = [shard for shard in candidates if is_whole(recorded.get(shard))]
    return [recorded[shard] for shard in finished], sorted(set(range(count)) - set(finished))


def finished_record(space: Workspace, number: int, shard: int) -> Record | None:
    """The record of one shard, if it is finished."""
    record = _record(space, number, shard)
    if record is None or space.size(record["path"]) != record["bytes"]:
        return None
    return {**record, "samples_bytes": space.size(part("samples", number, shard, "parquet"))}


def _base(path: str) -> str:
    return path.rpartition("/")[2]


def _table(shard: int) -> str:
    return _base(part("samples", 0, shard, "parquet"))


def _recorded(space: Workspace, number: int) -> list[Record]:
    """The rows of ``shards.parquet``, if it is there and can be read: the samples tables say the same."""
    try:
        return space.read_table(round_file(number, "shards.parquet")).to_pylist()
    except WorkspaceError:
        return []


def _from_tables(space: Workspace, number: int, shards: list[int]) -> Iterator[Record]:
    """Records from the metadata of samples tables; a table that is damaged has none."""
    found = space.read_many(shards, lambda shard: _record(space, number, shard))
    return (record for record in found if record)


def _record(space: Workspace, number: int, shard: int) -> Record | None:
    try:
        with space.open(part("samples", number, shard, "parquet")) as file:
            return record_of(pq.read_schema(file), part("shards", number, shard, "tar"))
    except Unreachable:
        raise
    except (OSError, pa.ArrowException, ValueError):
        return None  # missing or damaged: not finished either way
