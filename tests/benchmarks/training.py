"""The training loop against a straightforward one: samples a second, and where a step's time goes.

    python -m tests.benchmarks.training --json FILE

Both train OneNIP with its default settings on the same drawn pictures, on one thread, in turns in one
process. The straightforward loop runs the backbone on every picture of every step and computes in float32;
its pictures lie decoded and resized in memory. Ours draws from cached features. Times are those of the
processor, so that other jobs on the machine count little.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from detectors.onenip import OneNIP, OneNIPSettings, build
from generation.backbones import to_batch
from training.examples import Examples, Normal, collect, gather, order
from training.fitting import fast_bf16, fit
from training.loading import Sample

SAMPLES, SIDE = 96, 224
STEPS, RUNS = 5, 4  # of one run, of each side
FASTER = 2.0  # the target
ROUND = 300, 500  # samples and steps of a round with default settings, over which features are shared
PARTS = {  # of a step, by what the operations of torch are called
    "scaled_dot_product": "attention",
    "mm": "linear layers",
    "convolution": "refiner's convolutions",
    "batch_norm": "refiner's convolutions",
    "log_sigmoid": "cross-entropy",
    "upsample": "enlarging the mask",
    "normal_": "feature noise",
    "AdamW": "optimiser",
    "adam": "optimiser",
}


@dataclass(frozen=True)
class Case:
    """Pictures uint8 N×3×SIDE×SIDE, the samples' and their normals'; and the same as features."""

    images: torch.Tensor
    normals: torch.Tensor
    examples: Examples
    extraction: float  # seconds a picture


def draw_case(detector: OneNIP) -> Case:
    rng = np.random.default_rng(0)
    normals, samples = [], []
    for k in range(SAMPLES):
        pixels = rng.integers(60, 190, (SIDE, SIDE, 3), dtype=np.uint8)
        image, mask = pixels.copy(), np.zeros((SIDE, SIDE), bool)
        y, x, h, w = rng.integers(10, 60, 4)
        mask[y : y + h, x : x + w] = True
        image[mask] //= 2
        normals.append(Normal(f"n{k}", "a", pixels))
        samples.append(Sample(f"s{k}", image, mask, pixels, {"category": "a", "image_id": f"n{k}"}, {}))
    began = time.process_time()
    examples = collect(detector, samples, normals)
    seconds = time.process_time() - began
    images = to_batch([sample.image for sample in samples], SIDE)
    return Case(images, to_batch([n.pixels for n in normals], SIDE), examples, seconds / len(images) / 3)


def straightforward(detector: OneNIP, case: Case, steps: int) -> None:
    """The loop that one writes first: float32, the backbone in every step."""
    optimizer = torch.optim.AdamW(detector.parameters(), lr=detector.settings.lr)
    detector.train()
    drawn = order(case.examples, detector.settings, 0)
    for _ in range(steps):
        rows, prompts = next(drawn)
        batch = {
            "normal": detector.extract(case.normals[rows]),
            "synthetic": detector.extract(case.images[rows]),
            "prompt": detector.extract(case.normals[prompts]),
            "mask": case.examples.masks[rows].float(),
        }
        optimizer.zero_grad()
        detector.loss(batch)["loss"].backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), detector.settings.clip)
        optimizer.step()


def seconds_a_step(work: Any, steps: int) -> float:
    began = time.process_time()
    work()
    return (time.process_time() - began) / steps


def shares(detector: OneNIP, case: Case, bfloat16: bool) -> dict[str, float]:
    """Shares of a step by its parts."""
    optimizer = torch.optim.AdamW(detector.parameters(), fused=True)
    drawn = order(case.examples, detector.settings, 0)
    batch = gather(case.examples, *next(drawn))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = detector.loss(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(STEPS):
            step()
    found: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        part = next((part for key, part in PARTS.items() if key in event.key), "the rest, element by element")
        found[part] += event.self_cpu_time_total
    total = sum(found.values())
    return {part: spent / total for part, spent in sorted(found.items(), key=lambda item: -item[1])}


def benchmark() -> dict[str, Any]:
    """All figures; ``passed`` says whether the target was met."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    torch.manual_seed(0)
    settings = OneNIPSettings(steps=STEPS)
    detector = build(settings, ["a"])
    case = draw_case(detector)
    detector.prepare(case.examples.normals, case.examples.categories)
    bfloat16 = fast_bf16(torch.device("cpu"))
    times: dict[str, list[float]] = {"straightforward": [], "ours": [], "ours, float32": []}
    lines: list[str] = []
    for run in range(RUNS + 1):  # the first warms up
        for name, spent in times.items():
            if name == "straightforward":
                seconds = seconds_a_step(lambda: straightforward(detector, case, STEPS), STEPS)
            else:
                precise = name == "ours, float32" or not bfloat16
                fresh = build(settings, ["a"])  # accelerate wraps a module once
                fresh.prepare(case.examples.normals, case.examples.categories)
                work = partial(fit, fresh, case.examples, _accelerator("no" if precise else "bf16"))
                seconds = seconds_a_step(lambda: work(seed=0, say=lines.append), STEPS)  # noqa: B023 - called here
            if run:
                spent.append(seconds)
    best = {name: min(spent) for name, spent in times.items()}
    samples, steps = ROUND
    once = case.extraction * 3 * samples / steps  # features of samples, their normals and prompts
    rates = {name: settings.batch / seconds for name, seconds in best.items()}
    rates["ours, features included"] = settings.batch / (best["ours"] + once)
    ratios = {name: rate / rates["straightforward"] for name, rate in rates.items()}
    return {
        "case": {"samples": SAMPLES, "side": SIDE, "batch": settings.batch, "bfloat16": bfloat16},
        "milliseconds_a_step": {name: 1e3 * seconds for name, seconds in best.items()},
        "all_runs": times,
        "samples_a_second": rates,
        "ratio": ratios,
        "backbone_milliseconds_a_picture": 1e3 * case.extraction,
        "loader": lines[-1],
        "parts": {
            "float32": shares(detector, case, False),
            **({"bfloat16": shares(detector, case, True)} if bfloat16 else {}),
        },
        "passed": {"speed": ratios["ours, features included"] >= FASTER},
    }


def _accelerator(precision: str) -> Accelerator:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, mixed_precision=precision)


def show(result: dict[str, Any]) -> None:
    case = result["case"]
    table = Table(title=f"OneNIP's training, defaults, batch {case['batch']}, {case['side']}², one thread")
    for column in ("what", "samples/s", "× straightforward"):
        table.add_column(column)
    for name, rate in result["samples_a_second"].items():
        table.add_row(name, f"{rate:.1f}", f"{result['ratio'][name]:.2f}")
    table.add_section()
    table.add_row(
        "target, features included", "", f"≥ {FASTER:g}: {'met' if result['passed']['speed'] else 'MISSED'}"
    )
    table.add_row("loader (last run)", "", result["loader"].split(", ")[-1])
    Console(width=max(Console().width, 110)).print(table)
    table = Table(title="where a step's time goes")
    for column in ("part", *result["parts"]):
        table.add_column(column)
    for part in result["parts"]["float32"]:
        table.add_row(part, *[f"{parts.get(part, 0):.0%}" for parts in result["parts"].values()])
    Console(width=max(Console().width, 110)).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.training", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures here")
    arguments = parser.parse_args()
    result = benchmark()
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
