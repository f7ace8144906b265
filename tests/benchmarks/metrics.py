"""Exact metrics against anomalib's AUPRO: time, agreement and memory.

    python -m tests.benchmarks.metrics --json FILE

Either side runs in a process of its own on the same files, first with one compute thread, then with its
libraries' default. Ours computes all four exact pixel metrics in the time given, anomalib only AUPRO.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from tests.benchmarks.peers import run_peer, run_timed
from training.intervals import evaluate_pixels
from training.metrics import pixel_metrics

PICTURES, SIDE = 80, 256
RUNS, PEER_RUNS, RESAMPLES = 31, 5, 200
FASTER, AGREEMENT, MEMORY = 10.0, 1e-4, 3.0  # the targets


def draw_case(folder: Path, pictures: int, side: int, share: float, seed: int = 0) -> None:
    """Write ``maps.npy`` and ``masks.npy``: maps as smooth as a detector's, every second picture with one to
    four blobs that cover about ``share`` of it and are answered with differing strength."""
    rng = np.random.default_rng(seed)
    maps = np.lib.format.open_memmap(folder / "maps.npy", "w+", np.float32, (pictures, side, side))
    masks = np.lib.format.open_memmap(folder / "masks.npy", "w+", np.bool_, (pictures, side, side))
    for k in range(pictures):
        mask = np.zeros((side, side), np.uint8)
        count = int(rng.integers(1, 5)) * (k % 2)
        for _ in range(count):
            radius = side * np.sqrt(share / count / np.pi) * rng.uniform(0.5, 1.4)
            axes = max(1, round(radius * rng.uniform(0.5, 1))), max(1, round(radius))
            centre = tuple(map(int, rng.integers(0, side, 2)))
            cv2.ellipse(mask, centre, axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
        noise = cv2.resize(rng.standard_normal((side // 8, side // 8)).astype(np.float32), (side, side))
        answer = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), side / 64) * rng.uniform(0.5, 4)
        maps[k], masks[k] = cv2.GaussianBlur(noise, (0, 0), side / 64) + answer, mask
    maps.flush()
    masks.flush()


def measure(folder: Path) -> dict[str, Any]:
    """Our times, metrics and memory on one case; runs in a process of its own."""
    maps, masks = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("maps", "masks"))
    groups = range(len(maps))
    pixel_metrics(maps[:2], masks[:2])  # what is loaded or reserved once counts neither as time nor as memory
    before = psutil.Process().memory_info().rss
    metrics = pixel_metrics(maps, masks)
    resident = _highest_resident() - before
    tracemalloc.start()
    pixel_metrics(maps, masks)
    allocated = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    seconds = [_seconds(lambda: pixel_metrics(maps, masks)) for _ in range(RUNS)]
    intervals = [
        _seconds(lambda: evaluate_pixels(maps, masks, groups, resamples=RESAMPLES)) for _ in range(3)
    ]
    return {
        "metrics": metrics,
        "seconds": seconds,
        "interval_seconds": intervals,
        "extra_memory": {"resident": resident / maps.nbytes, "allocated": allocated / maps.nbytes},
        "maps_megabytes": maps.nbytes / 1e6,
        "anomalous_share": float(masks.mean()),
    }


def _highest_resident() -> int:
    """Bytes; the highest so far, so never too low."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measured(folder: Path, threads: int | None = 1) -> dict[str, Any]:
    return run_timed([sys.executable, "-m", "tests.benchmarks.metrics", "--measure", folder], threads)


def benchmark() -> dict[str, Any]:
    """All figures; ``passed`` says which targets were met."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_case(folder, PICTURES, SIDE, share=0.02)
        sides = {
            threads or "default": (
                measured(folder, threads),
                run_peer("peer_aupro.py", [folder, str(PEER_RUNS)], threads),
            )
            for threads in (1, None)
        }
        draw_case(folder, PICTURES, 2 * SIDE, share=0.02)
        large = measured(folder)
        draw_case(folder, PICTURES, 2 * SIDE, share=1.5)
        worst = measured(folder)
    ours, peer = sides[1]
    speedups = {k: min(theirs["seconds"]) / min(own["seconds"]) for k, (own, theirs) in sides.items()}
    difference = abs(ours["metrics"]["aupro"] - peer["aupro"])
    memory = {
        f"{PICTURES} x {side}², {100 * case['anomalous_share']:.1f} % anomalous": case["extra_memory"]
        for side, case in ((SIDE, ours), (2 * SIDE, large), (2 * SIDE, worst))
    }
    highest = max(max(case.values()) for case in memory.values())
    return {
        "case": {"pictures": PICTURES, "side": SIDE, "cpus": os.cpu_count(), "anomalib": peer["version"]},
        "seconds": {
            str(k): {"ours": _summary(own["seconds"]), "anomalib": _summary(theirs["seconds"])}
            for k, (own, theirs) in sides.items()
        },
        "speedup": {str(k): value for k, value in speedups.items()},
        "interval_seconds": {"resamples": RESAMPLES, **_summary(ours["interval_seconds"])},
        "metrics": ours["metrics"],
        "aupro_anomalib": peer["aupro"],
        "difference": difference,
        "extra_memory_of_maps": memory,
        "passed": {
            "speed": speedups[1] >= FASTER,
            "agreement": difference <= AGREEMENT,
            "memory": highest <= MEMORY,
        },
    }


def _summary(seconds: list[float]) -> dict[str, float]:
    return {"min": min(seconds), "median": statistics.median(seconds)}


def show(result: dict[str, Any]) -> None:
    case, passed = result["case"], result["passed"]
    table = Table(title=f"metrics: {case['pictures']} maps of {case['side']}², anomalib {case['anomalib']}")
    for column in ("what", "figure", "target"):
        table.add_column(column, no_wrap=True)
    for threads, seconds in result["seconds"].items():
        label = "1 thread" if threads == "1" else "default threads"
        for side, work in (("ours", "all pixel metrics"), ("anomalib", "AUPRO")):
            times = seconds[side]
            table.add_row(
                f"{side}, {work}, {label}", f"{times['min']:.3f} s (median {times['median']:.3f})", ""
            )
        target = f"≥ {FASTER:g}: {_word(passed['speed'])}" if threads == "1" else ""
        table.add_row(f"times as fast, {label}", f"{result['speedup'][threads]:.1f}", target)
    times = result["interval_seconds"]
    table.add_row(
        f"values and intervals, {times['resamples']} resamples, 1 thread", f"{times['min']:.3f} s", ""
    )
    table.add_row(
        "AUPRO ours / anomalib, difference",
        f"{result['metrics']['aupro']:.6f} / {result['aupro_anomalib']:.6f}, {result['difference']:.1e}",
        f"≤ {AGREEMENT:g}: {_word(passed['agreement'])}",
    )
    for name, memory in result["extra_memory_of_maps"].items():
        table.add_row(
            f"extra memory, {name}",
            f"{memory['resident']:.2f} × the maps (arrays {memory['allocated']:.2f})",
            f"≤ {MEMORY:g}: {_word(passed['memory'])}",
        )
    Console(width=max(Console().width, 120)).print(table)


def _word(passed: bool) -> str:
    return "met" if passed else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.metrics", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help="only our side of one case, as JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    result = benchmark()
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
