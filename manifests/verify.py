"""Does a workspace hold what its records say? Every byte is read; every problem is named."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pyarrow as pa

from manifests.shards import ShardError, checksum, missing_members, record_of, unpack
from manifests.workspace import Workspace, WorkspaceError, part


@dataclass(frozen=True)
class Finding:
    """One problem. ``shard`` is -1 for a file that belongs to no planned shard, ``round`` for one of none."""

    round: int
    shard: int
    path: str
    what: str


DAMAGED = pa.schema(
    [("round", pa.int32()), ("shard", pa.int32()), ("path", pa.string()), ("what", pa.string())]
)


def verify_round(
    space: Workspace, number: int, shard_count: int, progress: Callable[[int], None] = lambda count: None
) -> list[Finding]:
    """Truncated, damaged, missing and extra shards, and samples without a member, of one round."""
    extra = extra_files(space, number, shard_count)
    sizes = space.sizes(f"rounds/{number:03d}/shards")
    findings = [Finding(number, -1, path, "extra: not in the plan") for path in extra]
    for shard in range(shard_count):
        problems = _shard_problems(space, number, shard, sizes)
        findings += [Finding(number, shard, *problem) for problem in problems]
        progress(1)
    return findings


def extra_files(space: Workspace, number: int, shard_count: int) -> list[str]:
    """Files in a round's shard, sample and recipe folders that no planned shard has."""
    extra = []
    for folder, suffix in (("shards", "tar"), ("samples", "parquet"), ("recipes", "parquet")):
        planned = {f"part-{shard:05d}.{suffix}" for shard in range(shard_count)}
        names = space.names(f"rounds/{number:03d}/{folder}")
        extra += [f"rounds/{number:03d}/{folder}/{name}" for name in names if name not in planned]
    return extra


def _shard_problems(
    space: Workspace, number: int, shard: int, sizes: Mapping[str, int]
) -> list[tuple[str, str]]:
    samples_path = part("samples", number, shard, "parquet")
    shard_path = part("shards", number, shard, "tar")
    try:
        table = space.read_table(samples_path)
        record = record_of(table.schema, shard_path)
    except (WorkspaceError, ValueError) as error:
        missing = not space.exists(samples_path)
        return [(samples_path, "missing: the shard is not finished" if missing else f"damaged: {error}")]
    counts = Counter(table["status"].to_pylist())
    if any(counts[status] != record[status] for status in ("accepted", "rejected", "failed")):
        return [(samples_path, f"damaged: it holds {dict(counts)}, its record says otherwise")]
    size = sizes.get(shard_path.rpartition("/")[2])
    if size is None:
        return [(shard_path, "missing")]
    if size != record["bytes"]:
        word = "truncated" if size < record["bytes"] else "damaged"
        return [(shard_path, f"{word}: {size} bytes, expected {record['bytes']}")]
    data = space.read_bytes(shard_path, size)
    expected = {row["sample_id"]: row["checksum"] for row in table.to_pylist() if row["status"] == "accepted"}
    problems = []
    found = set()
    try:
        for key, members in unpack(data, shard_path):
            found.add(key)
            lacking = missing_members(members)
            if lacking:
                problems.append((shard_path, f"sample {key} lacks its {' and '.join(lacking)}"))
            elif key not in expected:
                problems.append((shard_path, f"extra sample {key}"))
            elif checksum(members) != expected[key]:
                problems.append((shard_path, f"sample {key} is damaged: its checksum differs"))
    except ShardError as error:
        problems.append((shard_path, str(error)))
    absent = sorted(set(expected) - found)
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        problems.append((shard_path, f"lacks {len(absent)} samples: {', '.join(absent[:5])}{more}"))
    if not problems and hashlib.sha256(data).hexdigest() != record["sha256"]:
        problems.append((shard_path, "damaged: its sha256 differs"))
    return problems
