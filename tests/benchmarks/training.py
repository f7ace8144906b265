"""The training loop against a straightforward one: samples a second, and where a step's time goes.

    python -m tests.benchmarks.training --json FILE
    python -m tests.benchmarks.training --detectors onenip

Both train a detector with its default settings on the same drawn pictures, on one thread, in turns in one
process. The straightforward loop runs the frozen part on every picture that a step's loss looks at, and
computes in float32; its pictures lie decoded and resized in memory. Ours draws from cached features, whose
cost is shared out over the default steps of a round of 300 samples. Times are those of the processor, so
that other jobs on the machine count little.

Both start from one state and draw the same samples, noise and rates, so that their losses can be compared,
step by step: cached features are rounded to float16, and ours may compute in bfloat16. How much another order
of the samples changes them is told beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from detectors import protocol
from detectors.protocol import Batch, Detector, Encoder
from generation.backbones import to_batch
from training.examples import Examples, Normal, collect, encoded, gather, order
from training.fitting import NOISE, fast_bf16, fit, learning_rate, spawn
from training.loading import Sample

DETECTORS = ("onenip", "dfd", "residual")
SAMPLES, SIDE = 96, 224
STEPS, RUNS = 6, 4  # of one run, of each side
FASTER = 2.0  # the target, of OneNIP and DFD
ROUND = 300  # samples
SEEN = {"onenip": ("normal", "synthetic", "prompt")}  # what a loss looks at, where it is not the next
PAIR = ("normal", "synthetic")
PARTS = {  # of a step, by what the operations of torch are called
    "scaled_dot_product": "attention",
    "mm": "linear layers",
    "convolution": "convolutions",
    "batch_norm": "convolutions",
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
    once: float  # seconds a picture, of what is then cached


def draw_case(detector: Detector) -> Case:
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
    once = (time.process_time() - began) / len(samples) / 2
    detector.prepare(examples.normals[: examples.pure], examples.categories[: examples.pure])
    if isinstance(detector, Encoder):
        began = time.process_time()
        encoded(detector, examples, range(len(samples)))
        once += (time.process_time() - began) / len(samples) / 2
    side = detector.settings.size
    images = to_batch([sample.image for sample in samples], side)
    return Case(images, to_batch([n.pixels for n in normals], side), examples, once)


def seen(name: str, detector: Detector, case: Case, rows: list[int], prompts: list[int]) -> Batch:
    """A batch from the decoded pictures on, as far as the loss looks at it."""
    pictures = {"normal": case.normals[rows], "synthetic": case.images[rows], "prompt": case.normals[prompts]}
    batch: dict[str, Any] = {key: detector.extract(pictures[key]) for key in SEEN.get(name, PAIR)}
    categories = ["a"] * len(rows)
    if isinstance(detector, Encoder):
        batch = {key: detector.encode(features, categories) for key, features in batch.items()}
    return {**batch, "mask": case.examples.masks[rows].float(), "category": categories}


def straightforward(name: str, detector: Any, case: Case, seed: int = 0) -> list[float]:
    """The loop that one writes first: float32, the backbone in every step. The loss of each of the settings'
    steps; schedule, order and noise are those of ours."""
    s = detector.settings
    optimizer = torch.optim.AdamW(detector.parameter_groups(), lr=s.lr, weight_decay=s.weight_decay)
    peaks = [group["lr"] for group in optimizer.param_groups]
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    detector.train()
    drawn = order(case.examples, s, seed)
    losses = []
    for step in range(s.steps):
        batch = seen(name, detector, case, *next(drawn))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * learning_rate(step, s.steps)
        torch.manual_seed(spawn(seed, NOISE, 0, step))
        optimizer.zero_grad()
        loss = detector.loss(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, s.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def ours(detector: Detector, case: Case, precision: str) -> tuple[list[float], list[float], str]:
    """The product's loop: each step's loss, the processor's clock after it, and the loop's last words."""
    losses: list[float] = []
    marks: list[float] = []
    lines: list[str] = []

    def on_step(_step: int, _steps: int, found: dict[str, float]) -> None:
        losses.append(found["loss"])
        marks.append(time.process_time())

    fit(detector, case.examples, _accelerator(precision), seed=0, on_step=on_step, say=lines.append)
    return losses, marks, lines[-1]


def apart(losses: Sequence[float], others: Sequence[float]) -> float:
    """The largest difference of a step's loss, as a share of it."""
    first, second = np.array(losses), np.array(others)
    return float((np.abs(second - first) / np.abs(first)).max())


def shares(detector: Any, case: Case, bfloat16: bool) -> dict[str, float]:
    """Shares of a step by its parts."""
    detector.train()
    optimizer = torch.optim.AdamW(detector.parameters(), fused=True)
    drawn = order(case.examples, detector.settings, 0)
    examples = case.examples
    if isinstance(detector, Encoder):
        examples = encoded(detector, examples, range(SAMPLES))
    batch = gather(examples, *next(drawn))

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


def benchmark(names: Sequence[str]) -> dict[str, Any]:
    """All figures; ``passed`` says whether the target was met, by detector."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    found = {name: measure(name) for name in names}
    return {"detectors": found, "passed": {name: one["passed"] for name, one in found.items()}}


def measure(detector_name: str) -> dict[str, Any]:
    torch.manual_seed(0)
    method = protocol.get(detector_name)
    settings = method.settings(steps=STEPS)
    detector = method.build(settings, ["a"], "cpu")
    case = draw_case(detector)
    state = detector.state_dict()
    bfloat16 = fast_bf16(torch.device("cpu"))
    times: dict[str, list[float]] = {"straightforward": [], "ours": [], "ours, float32": []}
    losses: dict[str, list[float]] = {}

    def fresh() -> Any:
        """Accelerate wraps a module once."""
        made = method.build(settings, ["a"], "cpu")
        made.load_state_dict(state)
        return made

    line = ""
    for run in range(RUNS + 1):  # the first warms up
        for name, spent in times.items():
            one = fresh()
            if name == "straightforward":
                began = time.process_time()
                losses[name] = straightforward(detector_name, one, case)
                seconds = (time.process_time() - began) / STEPS
            else:
                precise = name == "ours, float32" or not bfloat16
                losses[name], marks, line = ours(one, case, "no" if precise else "bf16")
                seconds = (marks[-1] - marks[0]) / (STEPS - 1)
            if run:
                spent.append(seconds)
    losses["straightforward, in another order"] = straightforward(detector_name, fresh(), case, seed=1)
    difference = {name: apart(losses["straightforward"], own) for name, own in losses.items()}
    best = {name: min(spent) for name, spent in times.items()}
    pictures = ROUND * len(SEEN.get(detector_name, PAIR))  # samples, their normals, and prompts
    once = case.once * pictures / method.settings().steps
    rates = {name: settings.batch / seconds for name, seconds in best.items()}
    rates["ours, features included"] = settings.batch / (best["ours"] + once)
    ratios = {name: rate / rates["straightforward"] for name, rate in rates.items()}
    return {
        "case": {"samples": SAMPLES, "side": settings.size, "batch": settings.batch, "bfloat16": bfloat16},
        "milliseconds_a_step": {name: 1e3 * seconds for name, seconds in best.items()},
        "all_runs": times,
        "samples_a_second": rates,
        "ratio": ratios,
        "losses": losses,
        "difference_of_losses": difference,
        "cached_milliseconds_a_picture": 1e3 * case.once,
        "loader": line,
        "parts": {
            "float32": shares(detector, case, False),
            **({"bfloat16": shares(detector, case, True)} if bfloat16 else {}),
        },
        "passed": ratios["ours, features included"] >= FASTER,
    }


def _accelerator(precision: str) -> Accelerator:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, mixed_precision=precision)


def show(detector: str, result: dict[str, Any]) -> None:
    case = result["case"]
    table = Table(title=f"training {detector}, defaults, batch {case['batch']}, {case['side']}², one thread")
    for column in ("what", "samples/s", "× straightforward"):
        table.add_column(column)
    for name, rate in result["samples_a_second"].items():
        table.add_row(name, f"{rate:.1f}", f"{result['ratio'][name]:.2f}")
    table.add_section()
    table.add_row("target, features included", "", f"≥ {FASTER:g}: {'met' if result['passed'] else 'MISSED'}")
    table.add_row("loader (last run)", "", result["loader"].split(", ")[-1])
    table.add_section()
    for name, share in result["difference_of_losses"].items():
        if name != "straightforward":
            table.add_row(f"largest difference of a step's loss: {name}", "", f"{share:.2%}")
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
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=DETECTORS, help="default: all")
    arguments = parser.parse_args()
    result = benchmark(arguments.detectors)
    for name, found in result["detectors"].items():
        show(name, found)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
