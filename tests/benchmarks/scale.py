"""A million recipes on one machine, what a second worker brings, and what reading shards costs.

    python -m tests.benchmarks.scale [--parts million workers reading] [--recipes N] [--json FILE]

``million``: a round of ``N`` recipes with a generator that makes nothing, on a local cluster, through the
stages of ``flawsmith run``: rows alone, then samples with members of about 1 kB each. The resident memory of
the process that holds client and scheduler is read every second; it is flat if its second half is not above
its first. Then the finished round is started again in a new process.

``workers``: real generators with one worker and with two, from :mod:`tests.benchmarks.pipeline`, and where
the rest of the second one goes.

``reading``: samples out of shards as training reads them, every byte compared with the manifest's checksum,
beside webdataset's own reader.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from rich.console import Console
from rich.table import Table

from manifests.pictures import encode
from manifests.shards import pack, sample_json
from manifests.workspace import Workspace
from tests.benchmarks import null_generator
from tests.benchmarks.peers import run_timed
from tests.benchmarks.pipeline import _cpu_seconds, _resident
from training.loading import ShardFile, read_members
from workflows import rounds
from workflows.cluster import make_round
from workflows.config import Config
from workflows.demo import write_drawn

Row = dict[str, Any]
RECIPES = 1_000_000
TARGETS = {"null-rows": 10_000, "null-members": 3_000}  # outcomes a second
AGAIN, SCALING = 30.0, 1.7  # seconds, times
SOURCES = 64
SHARD_SIZE = 1000  # a committed file costs a flush to the disk, however small it is
PAIRS, SAMPLES = 3, 3_000


# -- a million ------------------------------------------------------------------------------------------


def million(recipes: int) -> list[Row]:
    """Two runs, each followed by a start of the finished round."""
    rows = []
    for generator, wanted in TARGETS.items():
        with tempfile.TemporaryDirectory() as folder:
            null_generator.register(Path(folder) / "packages")
            write_sources(Path(folder) / "pictures")
            made = _apart("--make", folder, generator, recipes)
            again = _apart("--again", folder, generator, recipes)
        flat = made["late_bytes"] <= 1.02 * made["early_bytes"]
        passed = made["rows_per_second"] >= wanted and again["seconds"] <= AGAIN and flat
        rows.append(
            {"part": "million", "case": generator, **made, "again_seconds": again["seconds"]}
            | {"target": f"≥ {wanted:,}/s, flat, again ≤ {AGAIN:g} s", "passed": passed}
        )
    return rows


def write_sources(folder: Path) -> None:
    rng = np.random.default_rng(0)
    side = null_generator.SIDE
    (folder / "train" / "good").mkdir(parents=True)
    for index in range(SOURCES):
        pixels = rng.integers(0, 256, (side, side, 3), np.uint8)
        (folder / "train" / "good" / f"{index:03d}.png").write_bytes(encode(pixels, "png"))


def configured(folder: Path, generator: str, recipes: int) -> Config:
    gates = {"contrast_min": 0, "hollow_max": 1, "area_low": 0, "area_high": 1000, "duplicate": 0}
    return Config.model_validate(
        {
            "source": str(folder / "pictures"),
            "samples": recipes,
            "rounds": 1,
            "output": {"shard_size": SHARD_SIZE},
            "generation": {
                "generators": {generator: {}},
                "location": "anywhere",
                "attempts": 1,
                "gates": gates,
            },
        }
    )


def make(folder: Path, generator: str, recipes: int) -> Row:
    """Makes the round; the rate is that of the steady state, after the first two shards of every worker."""
    config = configured(folder, generator, recipes)
    space = Workspace(str(folder / "workspace"))
    marks: list[tuple[float, int]] = []
    done = 0

    def mark(record: Row) -> None:
        nonlocal done
        done += record["accepted"] + record["rejected"] + record["failed"]
        marks.append((time.perf_counter(), done))

    started = time.perf_counter()
    with space.writing(), Memory() as memory:
        number = rounds.begin(config, space, new_round=False)
        todo = list(range(rounds.open_round(space, number).shard_count))
        result = make_round(space, number, todo, config.cluster, mark)
        rounds.generate(space, number, config.cluster)  # the table of shards
    seconds = time.perf_counter() - started
    if result.errors or done != recipes:
        raise RuntimeError(f"{done} outcomes of {recipes} recipes, errors: {result.errors}")
    first, last = marks[2 * (os.cpu_count() or 1) - 1], marks[-1]
    own = ("plan_seconds", "synthesis_seconds", "encode_seconds", "write_seconds", "seconds")
    return {
        "recipes": recipes,
        "shards": len(result.records),
        "accepted": sum(record["accepted"] for record in result.records),
        "bytes": sum(record["bytes"] for record in result.records),
        "wall_seconds": seconds,
        "rows_per_second": (last[1] - first[1]) / (last[0] - first[0]),
        "task_seconds": {name: sum(record[name] for record in result.records) for name in own},
        "client_cpu_seconds": _cpu_seconds(),
        **memory.figures(),
    }


def start_again(folder: Path, generator: str, recipes: int) -> Row:
    """What ``flawsmith run`` does with a finished round before it goes on to train."""
    space = Workspace(str(folder / "workspace"))
    config = configured(folder, generator, recipes)
    started = time.perf_counter()
    with space.writing():
        number = rounds.begin(config, space, new_round=False)
        if rounds.generate(space, number, config.cluster):
            raise RuntimeError("the finished round was not taken as finished")
    return {"seconds": time.perf_counter() - started}


class Memory:
    """Resident bytes of this process, read every second in a thread."""

    def __enter__(self) -> Memory:
        self.samples: list[int] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(1.0):
            self.samples.append(_resident("VmRSS"))

    def figures(self) -> Row:
        """``early_bytes``: the most in the second fifth of the run, when all is loaded; ``late_bytes``: in
        the last fifth."""
        fifth = max(1, len(self.samples) // 5)
        return {
            "early_bytes": max(self.samples[fifth : 2 * fifth] or self.samples),
            "late_bytes": max(self.samples[-fifth:]),
            "most_bytes": max(self.samples),
            "bytes_by_tenth": [int(part.max()) for part in np.array_split(self.samples, 10) if len(part)],
        }


# -- a second worker ------------------------------------------------------------------------------------


def workers(_: int) -> list[Row]:
    """One worker and two in turn, several times; the rows are the middle pair, the rest by where it went."""
    with tempfile.TemporaryDirectory() as folder:
        write_drawn(Path(folder), train=100, good=2, each=1)
        pairs = [
            tuple(
                run_timed(
                    [sys.executable, "-m", "tests.benchmarks.pipeline", "--run", folder, *map(str, wanted)]
                )
                for wanted in ((SAMPLES, 128, 1), (SAMPLES, 128, 2))
            )
            for _ in range(PAIRS)
        ]
    pairs.sort(key=lambda pair: pair[1]["samples_per_second"] / pair[0]["samples_per_second"])
    one, two = pairs[(len(pairs) - 1) // 2]
    ratio = two["samples_per_second"] / one["samples_per_second"]
    rows = [
        {
            "part": "workers",
            "case": "1 to 2 workers",
            "times": ratio,
            "all_pairs": [b["samples_per_second"] / a["samples_per_second"] for a, b in pairs],
            "rates": [one["samples_per_second"], two["samples_per_second"]],
            "target": f"≥ {SCALING:g} times",
            "passed": ratio >= SCALING,
        }
    ]
    for name in one["core_seconds"]:
        before, after = (1000 * run["core_seconds"][name] / run["samples"] for run in (one, two))
        rows.append({"part": "workers", "case": name, "ms_a_sample": [before, after], "more": after - before})
    return rows


# -- reading --------------------------------------------------------------------------------------------

TURNS = 7
READING = 0.95  # of webdataset's own speed, the target
KINDS = {"pictures of 64 kB": (64_000, 24), "pictures of 1 kB": (1_000, 64)}  # (bytes, shards)
SHARD = 128  # samples


def reading(_: int) -> list[Row]:
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
            ratios = [turn[_verified] / turn[_raw] for turn in turns]
            ratio = statistics.median(ratios)
            rows.append(
                {
                    "part": "reading",
                    "case": f"{kind}, verified against webdataset",
                    "times": ratio,
                    "all_pairs": ratios,
                    "rates": [max(turn[read] for turn in turns) for read in (_raw, _verified)],
                    "target": f"≥ {READING:g} times",
                    "passed": ratio >= READING,
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


# -- all of it ------------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[int], list[Row]]] = {"million": million, "workers": workers, "reading": reading}


def _apart(what: str, folder: str, generator: str, recipes: int) -> Row:
    path = os.pathsep.join(filter(None, [str(Path(folder) / "packages"), os.environ.get("PYTHONPATH")]))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path
    try:
        return run_timed(
            [sys.executable, "-m", "tests.benchmarks.scale", what, folder, generator, str(recipes)]
        )
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def show(rows: Sequence[Row]) -> None:
    console = Console(width=max(Console().width, 130))
    table = Table(title=f"scale, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")
    for column in ("part", "case", "measured", "target"):
        table.add_column(column)
    for row in rows:
        target = f"{row['target']}: {'met' if row['passed'] else 'MISSED'}" if "target" in row else ""
        table.add_row(row["part"], row["case"], _measured(row), target)
    console.print(table)


def _measured(row: Row) -> str:
    if "rows_per_second" in row:
        memory = ", ".join(f"{value / 1e6:.0f}" for value in row["bytes_by_tenth"])
        return (
            f"{row['recipes']:,} recipes, {row['shards']:,} shards: {row['rows_per_second']:,.0f} outcomes/s "
            f"({row['wall_seconds']:.0f} s in all); {row['bytes'] / max(row['accepted'], 1) / 1e3:.1f} kB an "
            f"accepted sample\nstarted again: {row['again_seconds']:.1f} s\n"
            f"client and scheduler, MB resident by tenth: {memory}"
        )
    if "times" in row:
        pairs = ", ".join(f"{ratio:.2f}" for ratio in row["all_pairs"])
        return f"{row['times']:.2f} times ({row['rates'][0]:.1f} → {row['rates'][1]:.1f} samples/s; {pairs})"
    before, after = row["ms_a_sample"]
    return f"{before:.3f} → {after:.3f} ms of core time a sample ({row['more']:+.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.scale", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--recipes", type=int, default=RECIPES, help="of the million (default %(default)s)")
    for name in ("make", "again"):
        parser.add_argument(f"--{name}", nargs=3, metavar=("FOLDER", "GENERATOR", "RECIPES"), help="as JSON")
    arguments = parser.parse_args()
    for run, given in ((make, arguments.make), (start_again, arguments.again)):
        if given:
            print(json.dumps(run(Path(given[0]), given[1], int(given[2]))))
            return
    rows = [row for part in arguments.parts for row in PARTS[part](arguments.recipes)]
    show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
