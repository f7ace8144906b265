"""What planning, tar, Parquet and Dask cost beside the samples themselves, and what a second worker brings.

    python -m tests.benchmarks.pipeline --json FILE

Each run is a process of its own: the client, with the scheduler inside it as ``flawsmith run`` has it, and
worker processes with one compute thread each. Start-up is over when every worker has finished a shard; all
figures but its seconds are of the steady state after that. Source pictures are drawn by code.

Core time is what the run keeps busy: workers times wall-clock, and the CPU of client and scheduler on top.
Its share that is neither synthesis (reading, decoding and gates included) nor encoding is the overhead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from manifests.schema import GOOD, Image
from manifests.workspace import Workspace
from tests.benchmarks.peers import run_timed
from workflows import rounds
from workflows.cluster import make_round
from workflows.config import Cluster, Config, Output
from workflows.demo import write_drawn
from workflows.stages import round_from

SAMPLES, RECIPES, PAIRS = 5_000, 10_000_000, 3
PICTURES = 100  # of either of the two drawn categories; four fifths of them are worked on
SIZES = (32, 64, 128, 256)
DEFAULT_SIZE = Output().shard_size
OVERHEAD, SCALING, MEMORY = 0.15, 1.7, 300e6  # the targets


# -- one run --------------------------------------------------------------------------------------------


def measure_run(pictures: Path, samples: int, shard_size: int, workers: int) -> dict[str, Any]:
    """Makes one round with the default mix and gates; seconds of its steady state, by what they went to."""
    marks: list[tuple[float, float, dict[str, Any]]] = []

    def mark(record: dict[str, Any]) -> None:
        marks.append((time.perf_counter(), _cpu_seconds(), record))

    with tempfile.TemporaryDirectory() as folder:
        space = Workspace(folder)
        config = _config(pictures, samples, shard_size)
        number = rounds.begin(config, space, new_round=False)
        todo = list(range(rounds.open_round(space, number).shard_count))
        started = time.perf_counter()
        result = make_round(space, number, todo, Cluster(workers=workers), mark)
    if result.errors or len(marks) <= workers:
        raise RuntimeError(f"{len(marks)} shards for {workers} workers, errors: {result.errors}")
    first, last = marks[workers - 1], marks[-1]
    records = [record for _, _, record in marks[workers:]]
    spent = {
        name: sum(record[name] for record in records)
        for name in ("plan_seconds", "synthesis_seconds", "encode_seconds", "write_seconds", "seconds")
    }
    wall, client = last[0] - first[0], last[1] - first[1]
    core = workers * wall + client
    made = sum(record["accepted"] + record["rejected"] + record["failed"] for record in records)
    useful = spent["synthesis_seconds"] + spent["encode_seconds"]
    inside = useful + spent["plan_seconds"] + spent["write_seconds"]
    return {
        "workers": workers,
        "shard_size": shard_size,
        "startup_seconds": first[0] - started,
        "wall_seconds": wall,
        "samples": made,
        "accepted": sum(record["accepted"] for record in records),
        "samples_per_second": made / wall,
        "core_seconds": {
            "synthesis": spent["synthesis_seconds"],
            "encoding": spent["encode_seconds"],
            "planning": spent["plan_seconds"],
            "tar and hashes": spent["write_seconds"],
            "rest of the task": spent["seconds"] - inside,
            "samples table, Dask": workers * wall - spent["seconds"],
            "client and scheduler": client,
        },
        "overhead": (core - useful) / core,
    }


def _config(pictures: Path, samples: int, shard_size: int) -> Config:
    raw = {"source": str(pictures), "samples": samples, "output": {"shard_size": shard_size}}
    return Config.model_validate(raw)


def _cpu_seconds() -> float:
    """Of this process: client, scheduler and nannies."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


# -- planning -------------------------------------------------------------------------------------------


def measure_plan(recipes: int) -> dict[str, Any]:
    """Plans shard after shard and keeps nothing: speed, and resident bytes on the way."""
    images = [_picture(index) for index in range(1000)]
    config = _config(Path("pictures"), recipes, DEFAULT_SIZE)
    round_ = round_from(0, config, config.generation, images, [])
    early, planned = 0, 0
    started = time.perf_counter()
    for shard in range(round_.shard_count):
        planned += len(round_.plan(shard))
        if not early and planned >= recipes // 10:
            early = _resident("VmRSS")
    seconds = time.perf_counter() - started
    return {
        "recipes": planned,
        "seconds": seconds,
        "recipes_per_second": planned / seconds,
        "resident_after_a_tenth": early,
        "resident_at_the_end": _resident("VmRSS"),
        "resident_most": _resident("VmHWM"),
    }


def _picture(index: int) -> Image:
    digest = hashlib.sha256(str(index).encode()).hexdigest()
    category = f"part{index % 4}"
    return Image(digest, f"{index}.png", digest, category, GOOD, None, 256, 256, "RGB", 8, digest, "train")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


# -- all of it ------------------------------------------------------------------------------------------


def benchmark(samples: int, recipes: int, pairs: int) -> dict[str, Any]:
    """All figures; ``passed`` says which targets were met.

    A machine with other work on it slows single runs down; so runs come in pairs, one worker then two, and
    the best of several pairs counts.
    """
    plan = _apart("--plan", recipes)
    with tempfile.TemporaryDirectory() as folder:
        write_drawn(Path(folder), train=PICTURES, good=2, each=1)
        load = os.getloadavg()
        runs = [
            tuple(_apart("--run", folder, samples, DEFAULT_SIZE, workers) for workers in (1, 2))
            for _ in range(pairs)
        ]
        sizes = [_apart("--run", folder, max(samples // 4, 5 * size), size, 1) for size in SIZES]
    ratios = [two["samples_per_second"] / one["samples_per_second"] for one, two in runs]
    single = min((one for one, _ in runs), key=lambda run: run["overhead"])
    return {
        "case": {
            "samples": samples,
            "side": 256,
            "pictures": 2 * PICTURES,
            "shard_size": DEFAULT_SIZE,
            "cpus": os.cpu_count(),
            "load_before": load[0],
        },
        "runs": [run for pair in runs for run in pair],
        "shard_sizes": sizes,
        "overhead": single["overhead"],
        "ratios": ratios,
        "plan": plan,
        "passed": {
            "overhead": single["overhead"] <= OVERHEAD,
            "scaling": max(ratios) >= SCALING,
            "planning memory": plan["resident_most"] <= MEMORY,
        },
    }


def _apart(*arguments: Any) -> dict[str, Any]:
    return run_timed([sys.executable, "-m", "tests.benchmarks.pipeline", *map(str, arguments)])


def show(result: dict[str, Any]) -> None:
    case, passed, plan = result["case"], result["passed"], result["plan"]
    console = Console(width=max(Console().width, 120))
    one, two = _best(result["runs"])
    table = Table(
        title=f"pipeline: {case['samples']} samples at {case['side']} px, shards of {case['shard_size']}, "
        f"{case['cpus']} cores, load {case['load_before']:.1f} before"
    )
    for column in ("steady state", "1 worker", "2 workers", "target"):
        table.add_column(column, no_wrap=True)
    table.add_row("samples/s", f"{one['samples_per_second']:.1f}", f"{two['samples_per_second']:.1f}", "")
    for name in one["core_seconds"]:
        table.add_row(f"{name}, ms a sample", *(f"{_each(run, name):.3f}" for run in (one, two)), "")
    table.add_row(
        "client and scheduler, CPU s",
        *(f"{run['core_seconds']['client and scheduler']:.2f}" for run in (one, two)),
        "",
    )
    table.add_row(
        "overhead, share of core time",
        *(f"{100 * run['overhead']:.1f} %" for run in (one, two)),
        f"1 worker ≤ {100 * OVERHEAD:g} %: {_word(passed['overhead'])}",
    )
    table.add_row(
        "times as fast, each pair",
        "",
        ", ".join(f"{ratio:.2f}" for ratio in result["ratios"]),
        f"≥ {SCALING:g}: {_word(passed['scaling'])}",
    )
    table.add_row("start-up, s", *(f"{run['startup_seconds']:.1f}" for run in (one, two)), "apart")
    console.print(table)
    table = Table(title="shard sizes, 1 worker")
    for column in ("samples a shard", "samples/s", "overhead"):
        table.add_column(column)
    for run in result["shard_sizes"]:
        table.add_row(
            str(run["shard_size"]), f"{run['samples_per_second']:.1f}", f"{100 * run['overhead']:.1f} %"
        )
    console.print(table)
    console.print(
        f"planning {plan['recipes']:,} recipes: {plan['recipes_per_second']:,.0f}/s, resident "
        f"{plan['resident_after_a_tenth'] / 1e6:.0f} MB after a tenth, "
        f"{plan['resident_at_the_end'] / 1e6:.0f} MB at the end, "
        f"{plan['resident_most'] / 1e6:.0f} MB at most "
        f"(≤ {MEMORY / 1e6:g} MB: {_word(passed['planning memory'])})"
    )


def _best(runs: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fastest run with one worker and the fastest with two."""
    fastest = [
        max((run for run in runs if run["workers"] == count), key=lambda run: run["samples_per_second"])
        for count in (1, 2)
    ]
    return fastest[0], fastest[1]


def _each(run: dict[str, Any], name: str) -> float:
    return 1000 * run["core_seconds"][name] / run["samples"]


def _word(passed: bool) -> str:
    return "met" if passed else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.pipeline", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of a run (default %(default)s)")
    parser.add_argument("--recipes", type=int, default=RECIPES, help="to plan (default %(default)s)")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="of runs (default %(default)s)")
    parser.add_argument(
        "--run", nargs=4, metavar=("PICTURES", "SAMPLES", "SIZE", "WORKERS"), help="one run only, as JSON"
    )
    parser.add_argument("--plan", type=int, metavar="RECIPES", help="planning only, as JSON")
    arguments = parser.parse_args()
    if arguments.run:
        pictures, *numbers = arguments.run
        print(json.dumps(measure_run(Path(pictures), *map(int, numbers))))
    elif arguments.plan:
        print(json.dumps(measure_plan(arguments.plan)))
    else:
        result = benchmark(arguments.samples, arguments.recipes, arguments.pairs)
        show(result)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
