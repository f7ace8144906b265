"""A picture to its map and score: eager torch in float32 and bfloat16 against the exported file.

    python -m tests.benchmarks.export --json FILE
    python -m tests.benchmarks.export --detectors residual onenip

One thread, batch 1, from the decoded picture on, resize included; the ways take turns, so that they share
what else the machine does. ``wall`` is the median time, ``cpu`` the median of the processor's time for it,
which other processes hardly change. Each detector has its defaults and has seen pictures drawn here, but is
not trained: the time does not depend on the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import cv2
import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from detectors import protocol
from generation.backbones import to_batch
from training import checkpoints
from training.fitting import Normal, batches, extract
from workflows.runtimes import export_model, open_detector

SIDES, RUNS = (224, 448, 700, 1024), 41
FASTER, AGREEMENT = 2.0, 1e-3  # the targets


def draw(side: int, seed: int) -> np.ndarray:
    """A brushed surface: uint8, side×side×3."""
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.normal(0, 60, (side, side, 3)), (0, 0), sigmaX=8, sigmaY=1)
    return np.clip(128 + noise, 0, 255).astype(np.uint8)


def write_checkpoint(name: str, folder: Path) -> None:
    method = protocol.get(name)
    torch.manual_seed(0)
    normals = [Normal(str(seed), "surface", draw(256, seed)) for seed in range(8)]
    detector = method.build(method.settings(), ["surface"])
    detector.prepare(extract(detector, [normal.pixels for normal in normals]), ["surface"] * len(normals))
    detector.eval()
    detector.calibrate(list(batches(detector, normals)))
    checkpoints.save(folder, name, detector, seed=0)


def benchmark(names: Sequence[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"detectors": {name: measure(name) for name in names}, "versions": versions}


def measure(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as aside:
        folder, file = Path(aside) / name, Path(aside) / f"{name}.onnx"
        write_checkpoint(name, folder)
        seconds = time.perf_counter()
        export_model(folder, file, "onnx", None)
        seconds = time.perf_counter() - seconds
        size = file.stat().st_size
        detector = checkpoints.load(folder)
        eager, exported = open_detector(folder), open_detector(file)

    def half(picture: np.ndarray) -> tuple[float, np.ndarray]:
        with torch.autocast("cpu", torch.bfloat16):
            features = detector.extract(to_batch([picture], detector.settings.size))
            score, maps = detector.score({"features": features.half(), "category": ["surface"]})
        return score.item(), maps[0].float().numpy()

    ways: dict[str, Callable[[np.ndarray], tuple[float, np.ndarray]]] = {
        "eager float32": lambda picture: next(eager.score([picture], "surface", None)),
        "eager bfloat16": half,
        "ONNX Runtime": lambda picture: next(exported.score([picture], None, None)),
    }
    cases = []
    for side in SIDES:
        picture = draw(side, 99)
        wanted_score, wanted = ways["eager float32"](picture)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        case: dict[str, Any] = {"side": side, "ways": {}}
        for run in range(RUNS + 3):
            for name, way in ways.items():
                wall, cpu = time.perf_counter(), time.thread_time()
                way(picture)
                if run >= 3:  # the first ones pay for what is made once
                    taken[name].append((time.perf_counter() - wall, time.thread_time() - cpu))
        for name, way in ways.items():
            score, scores = way(picture)
            walls, cpus = zip(*taken[name], strict=True)
            case["ways"][name] = {
                "wall": statistics.median(walls),
                "cpu": statistics.median(cpus),
                "score_difference": abs(score - wanted_score),
                "map_difference": float(np.abs(scores - wanted).max()),
                "map_largest": float(wanted.max()),
            }
        cases.append(case)
    return {"cases": cases, "export_seconds": seconds, "file_bytes": size}


def show(name: str, result: dict[str, Any]) -> None:
    columns = ("picture", "way", "wall ms", "cpu ms", "times as fast", "map differs by", "target")
    table = Table(*columns, title=name)
    for case in result["cases"]:
        slowest = case["ways"]["eager float32"]
        for name, found in case["ways"].items():
            speed = slowest["wall"] / found["wall"], slowest["cpu"] / found["cpu"]
            target = ""
            if name == "ONNX Runtime":
                met = speed[0] >= FASTER and found["map_difference"] <= AGREEMENT
                target = f"≥ {FASTER:g} and ≤ {AGREEMENT:g}: {'met' if met else 'MISSED'}"
            table.add_row(
                f"{case['side']}×{case['side']}×3",
                name,
                f"{1e3 * found['wall']:.1f}",
                f"{1e3 * found['cpu']:.1f}",
                f"{speed[0]:.2f} (cpu {speed[1]:.2f})",
                f"{found['map_difference']:.1e} of {found['map_largest']:.2f}",
                target,
            )
    console = Console(width=max(Console().width, 120))
    console.print(table)
    console.print(f"export: {result['export_seconds']:.0f} s, {result['file_bytes'] / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.export", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures here")
    names = protocol.names()
    parser.add_argument("--detectors", nargs="+", choices=names, default=names, help="default: all")
    arguments = parser.parse_args()
    result = benchmark(arguments.detectors)
    for name, found in result["detectors"].items():
        show(name, found)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
