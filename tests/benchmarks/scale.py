"""What a large run costs beside its samples, part by part.

    python -m tests.benchmarks.scale --json FILE [--parts reading]

A part is a function of no arguments that returns rows: ``{"what": …, "value": …, "unit": …}``, and ``target``
and ``met`` where there is one. Its docstring says what it measures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from rich.console import Console
from rich.table import Table

from manifests.shards import pack, sample_json
from training.loading import ShardFile, read_members

Row = dict[str, Any]


# -- reading --------------------------------------------------------------------------------------------

TURNS = 7
READING = 0.95  # of webdataset's own speed, the target
KINDS = {"pictures of 64 kB": (64_000, 24), "pictures of 1 kB": (1_000, 64)}  # (bytes, shards)
SHARD = 128  # samples


def reading() -> list[Row]:
    """Samples out of shards as raw bytes: webdataset's own reader against ours, which compares every byte
    with the manifest's sha256 first. In turns over the same local files, which lie in memory; the median of
    the turns' ratios, and the best rate of each."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, (size, count) in KINDS.items():
            shards = [_write_shard(Path(folder), index, size) for index in range(count)]
            for read in (_raw, _verified):  # once unmeasured
                read(shards)
            turns = [{read: _rate(read, shards) for read in _shuffled(turn)} for turn in range(TURNS)]
            ratio = statistics.median(turn[_verified] / turn[_raw] for turn in turns)
            for what, read in (("webdataset", _raw), ("verified", _verified)):
                best = max(turn[read] for turn in turns)
                rows.append({"what": f"{kind}, {what}", "value": best, "unit": "samples/s"})
            rows.append(
                {
                    "what": f"{kind}, verified against webdataset",
                    "value": ratio,
                    "unit": "×",
                    "target": READING,
                    "met": ratio >= READING,
                }
            )
    return rows


def _write_shard(folder: Path, index: int, size: int) -> ShardFile:
    rng = np.random.default_rng(index)
    note = sample_json({"generator": "none"}, {}, {})
    names = ("image.webp", "mask.png", "normal.webp")
    samples = (
        (f"000-{index:05d}-{at:05d}", {name: rng.bytes(size) for name in names} | {"json": note})
        for at in range(SHARD)
    )
    packed = pack(samples)
    path = folder / f"{size}-{index:05d}.tar"
    path.write_bytes(packed.data)
    return ShardFile(str(path), SHARD, len(packed.data), hashlib.sha256(packed.data).hexdigest())


def _raw(shards: list[ShardFile]) -> int:
    return sum(1 for _ in webdataset.WebDataset([shard.path for shard in shards], shardshuffle=False))


def _verified(shards: list[ShardFile]) -> int:
    return sum(1 for _, samples in read_members(shards) for _ in samples)


def _rate(read: Callable[[list[ShardFile]], int], shards: list[ShardFile]) -> float:
    started = time.perf_counter()
    count = read(shards)
    seconds = time.perf_counter() - started
    if count != SHARD * len(shards):
        raise RuntimeError(f"{count} samples of {SHARD * len(shards)} were read")
    return count / seconds


def _shuffled(turn: int) -> Iterator[Callable[[list[ShardFile]], int]]:
    return iter(random.Random(turn).sample([_raw, _verified], 2))


# -- all ------------------------------------------------------------------------------------------------

PARTS: Mapping[str, Callable[[], list[Row]]] = {"reading": reading}


def show(part: str, rows: list[Row]) -> None:
    table = Table(title=part)
    for column in ("what", "value", "unit", "target"):
        table.add_column(column)
    for row in rows:
        told = f"≥ {row['target']:g}: {'met' if row['met'] else 'MISSED'}" if "target" in row else ""
        table.add_row(row["what"], f"{row['value']:,.4g}", row["unit"], told)
    Console(width=max(Console().width, 110)).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scale", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    result = {}
    for part in arguments.parts:
        result[part] = PARTS[part]()
        show(part, result[part])
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
