"""The product's diffusion sampler against the released AnomalyAny loop (core.md 1.2–1.8, 1.14).

    python -m tests.benchmarks.cut --json FILE
    python -m tests.benchmarks.cut --model FOLDER --clip FOLDER --json FILE

Both make the same recipes on the same weights: pictures drawn by code, texts of the shipped bank, one place
where an anomaly may be. Each side runs in a process of its own, with one compute thread. Measured: seconds
and peak memory a picture (most bytes in use above those after loading, over the batch), and what comes out,
read alike for both from the finished pictures:

* objective: the largest value of the anomaly word's map within the place, words only (core.md 7);
  "as released": the same with all tokens in the softmax, anywhere in the picture;
* gain: cosine of the picture with the detailed description, minus that of the normal picture. Where --judge
  is left out, the judge is the very CLIP that guided both sides, which flatters them.

Means have bootstrap intervals over recipes. Operations are counted for Stable Diffusion 1.5 at 512 px, see
``flops.py``; the seconds beside them are estimates.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from generation.cut import chain
from generation.cut.attention import MapReader, anomaly_map, words_of
from generation.cut.checkpoints import POCKET
from generation.cut.clip import Clip, load_clip
from generation.cut.models import StableDiffusion, load_sd
from generation.cut.prompts import fill, load_bank
from generation.cut.settings import CutParams
from tests.benchmarks import flops
from tests.benchmarks.peers import run_timed
from tests.benchmarks.released_cut import read_objective, released
from training.intervals import RESAMPLES, Estimate, draw_counts
from training.pocket.damage import spot
from training.pocket.materials import scene

RECIPES, RELEASED_RECIPES, BATCH = 64, 8, 4
READ_AT = 1  # timestep at which finished pictures are read: the end of every chain
ABLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "no attention steps": {"attention": 0},
    "no refinement": {"refinement": 0},
    "neither": {"attention": 0, "refinement": 0},
    "alignment of the embedding": {"align": True},
    "attention at every step": {"every": 1},
    "five inner steps": {"inner": 5},
    "shared twin": {"twin": "shared"},
    "empty prompt": {"twin": "empty"},
}
FIGURES = ("objective", "objective_released", "gain")


# -- recipes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One recipe.

    Attributes:
        image: float32 in [0, 1], side×side×3.
        location: bool, side×side; where the anomaly may be.
    """

    image: np.ndarray
    location: np.ndarray
    normal: str
    prompt: str
    detail: str
    word: str
    seed: int

    def tensor(self) -> Tensor:
        """1×3×side×side."""
        return torch.from_numpy(self.image).permute(2, 0, 1)[None]


def cases(count: int, side: int) -> list[Case]:
    """Recipes drawn by code, the same for every run; a longer list begins with the shorter one."""
    return [_case(number, side) for number in range(count)]


def _case(number: int, side: int) -> Case:
    rng = np.random.default_rng([7, number])
    drawn = scene(rng, side)
    entries = [e for e in load_bank().entries if drawn.kind in e.kinds and not e.categories]
    entry = entries[rng.integers(len(entries))]
    texts = fill(
        entry,
        drawn.noun,
        area=float(rng.uniform(0.01, 0.06)),
        severity=float(rng.uniform(0.4, 1)),
        draws=tuple(rng.random(5)),
    )
    y, x = spot(rng, drawn.part)
    axes = [round(side * rng.uniform(0.15, 0.3)) for _ in range(2)]
    place = np.zeros((side, side), np.uint8)
    cv2.ellipse(place, (round(x), round(y)), axes, float(rng.uniform(0, 180)), 0, 360, 1, -1)
    location = (place > 0) & drawn.part
    return Case(
        np.clip(drawn.pixels, 0, 1).astype(np.float32),
        location if location.any() else place > 0,
        texts.normal,
        texts.prompt,
        texts.detail,
        entry.word,
        number,
    )


# -- both sides -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """What a measuring process has loaded; ``reader`` is attached to ``sd``."""

    sd: StableDiffusion
    clip: Clip
    judge: Clip
    reader: MapReader


def ours(side: Side, batch: Sequence[Case], overrides: dict[str, Any]) -> tuple[list[Tensor], list[float]]:
    """The product's sampler, one batch.

    Returns:
        pictures, each 1×3×H×W in [0, 1], before any composition; the sampler's own attention objective at the
        end of its chain.
    """
    settings = CutParams(**overrides)
    requests = [
        chain.Request(c.image, c.location, c.normal, c.prompt, c.detail, c.word, c.seed) for c in batch
    ]
    twins = chain.sample(requests, side.sd, side.reader, side.clip, settings)
    pictures = [torch.from_numpy(np.ascontiguousarray(t.anomaly)).permute(2, 0, 1)[None] for t in twins]
    return pictures, [t.trace["attention"] for t in twins]


def our_calls(settings: CutParams) -> dict[str, int]:
    """How often :func:`ours` uses each of ``flops.blocks`` for one picture."""
    steps = int(settings.steps * settings.gamma)
    late = max(1, round(settings.window * steps)) if settings.refinement and settings.guide else 0
    guided = len(range(0, steps, settings.every)) * settings.inner if settings.attention else 0
    calls = {
        "unet": steps * {"shared": 2, "normal": 3, "empty": 4}[settings.twin],
        "unet_maps_grad": guided,
        "encode": 1,
        "decode": 2,
        "decode_grad": late,
        "image_grad": late,
        "clip_text": 1 if late else 0,
        "text": 2 + settings.align + (settings.twin == "empty"),
    }
    return {name: number for name, number in calls.items() if number}


def theirs(side: Side, batch: Sequence[Case], overrides: dict[str, Any]) -> tuple[list[Tensor], list[float]]:
    """The released loop; it takes one picture at a time. Returns what :func:`ours` does."""
    pictures, objectives = [], []
    for case in batch:
        found = released(
            side.sd,
            side.clip,
            case.tensor(),
            case.prompt,
            case.normal,
            case.detail,
            case.word,
            torch.Generator(side.sd.device).manual_seed(case.seed),
            mask=torch.from_numpy(case.location.astype(np.float32))[None, None],
            **overrides,
        )
        pictures.append(found.image.cpu())
        objectives.append(found.trace.attention[-1])
    return pictures, objectives


SIDES = {"ours": ours, "released": theirs}


# -- measuring ------------------------------------------------------------------------------------------


@torch.no_grad()
def read(side: Side, case: Case, picture: Tensor) -> dict[str, float]:
    """Figures of a finished picture, the same for whatever made it.

    Args:
        picture: 1×3×H×W in [0, 1].
    """
    sd = side.sd
    latents = sd.encode(picture)
    t = torch.full((1,), READ_AT, device=sd.device)
    text, words = sd.embed([case.prompt]), words_of(sd, [case.prompt], [case.word])
    found = anomaly_map(side.reader.maps(latents, t, text), words)
    place = torch.from_numpy(case.location.astype(np.float32))[None, None]
    inside = F.adaptive_max_pool2d(place, found.shape[-2:])[:, 0].to(found.device)
    described = side.judge.text([case.detail])
    cosine = [float(side.judge.similarity(x, described)) for x in (picture, case.tensor())]
    return {
        "objective": float((found * inside).max()),
        "objective_released": read_objective(sd, latents, case.prompt, case.word, READ_AT)[0],
        "gain": cosine[0] - cosine[1],
    }


def measure(
    name: str, model: str, clip: str, judge: str, count: int, batch: int, overrides: dict[str, Any]
) -> dict[str, Any]:
    """One side on the first ``count`` recipes; runs in a process of its own.

    Seconds leave loading and warming up out: a shortened batch is made before.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sd = load_sd(model, device, "float32" if name == "released" or device == "cpu" else "auto")
    guide = load_clip(clip, device)
    side = Side(sd, guide, guide if judge == clip else load_clip(judge, device), MapReader(sd))
    run = SIDES[name]
    todo = cases(count, sd.size)
    base = _in_use(sd.device)
    run(side, todo[:batch], overrides | {"steps": 4, "gamma": 0.5})
    rows: list[dict[str, float]] = []
    seconds, peaks = [], []
    for start in range(0, count, batch):
        part = todo[start : start + batch]
        with _peak(sd.device, base) as peak:
            began = time.perf_counter()
            pictures, objectives = run(side, part, overrides)
            seconds.append((time.perf_counter() - began) / len(part))
        peaks.append(peak[0] / len(part) if len(part) == min(batch, count) else 0.0)
        for case, picture, objective in zip(part, pictures, objectives, strict=True):
            own = {} if math.isnan(objective) else {"own_objective": objective}
            rows.append(read(side, case, picture) | own)
    normals = [read(side, case, case.tensor()) for case in todo]
    return {
        "side": name,
        "overrides": overrides,
        "batch": batch,
        "device": str(sd.device),
        "seconds": seconds,
        "bytes_a_picture": max(peaks),
        "rows": rows,
        "normal_rows": normals,
        "model": sd.identity,
        "clip": guide.identity,
        "judge": side.judge.identity,
    }


def _in_use(device: torch.device) -> int:
    """Bytes of the GPU's allocator, or resident ones."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else psutil.Process().memory_info().rss


@contextmanager
def _peak(device: torch.device, base: int) -> Iterator[list[float]]:
    """Most bytes in use above ``base`` meanwhile; resident ones are looked at every 2 ms."""
    result = [0.0]
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        yield result
        result[0] = float(torch.cuda.max_memory_allocated() - base)
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            result[0] = max(result[0], float(_in_use(device) - base))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield result
    finally:
        done.set()
        thread.join()


# -- all of it ------------------------------------------------------------------------------------------


def mean_of(values: Sequence[float]) -> dict[str, float]:
    """Mean and the ends of its 95 % bootstrap interval over recipes."""
    numbers = np.asarray(values, np.float64)
    drawn = draw_counts(len(numbers), RESAMPLES, 0) @ numbers / len(numbers)
    low, high = Estimate(float(numbers.mean()), drawn).interval
    return {"mean": float(numbers.mean()), "low": low, "high": high}


def summary(run: dict[str, Any], count: int | None = None) -> dict[str, Any]:
    """Figures of one run over its first ``count`` recipes; ``rise`` is over the normal picture."""
    rows, normals = run["rows"][:count], run["normal_rows"][:count]
    rises = {
        f"{name}_rise": [row[name] - normal[name] for row, normal in zip(rows, normals, strict=True)]
        for name in ("objective", "objective_released")
    }
    own = ("own_objective",) if all("own_objective" in row for row in rows) else ()
    values = {name: [row[name] for row in rows] for name in (*FIGURES, *own)}
    return {
        "recipes": len(rows),
        "batch": run["batch"],
        "seconds": float(np.median(run["seconds"])),
        "bytes_a_picture": run["bytes_a_picture"],
        **{name: mean_of(found) for name, found in (values | rises).items()},
    }


def count_operations() -> dict[str, Any]:
    """Operations of both sides for one picture at Stable Diffusion 1.5's size; estimated seconds."""
    once = flops.blocks(flops.sd15())
    calls = {"released": flops.released_calls(), "ours": our_calls(CutParams())}
    totals = {name: flops.total(once, numbers) for name, numbers in calls.items()}
    return {
        "blocks": once,
        "calls": calls,
        "totals": totals,
        "ratio": totals["released"] / totals["ours"],
        "estimated_seconds": {
            card: {name: flops.seconds_on(card, number) for name, number in totals.items()}
            for card in flops.PEAK
        },
        "assumed_utilisation": flops.UTILISATION,
    }


def benchmark(arguments: argparse.Namespace) -> dict[str, Any]:
    def run(name: str, count: int, batch: int, overrides: dict[str, Any]) -> dict[str, Any]:
        task = {
            **{key: getattr(arguments, key) for key in ("model", "clip", "judge")},
            "name": name,
            "count": count,
            "batch": batch,
            "overrides": overrides,
        }
        command = [sys.executable, "-m", "tests.benchmarks.cut", "--run", json.dumps(task)]
        return run_timed(command, arguments.threads)

    shared = min(arguments.recipes, arguments.released_recipes)
    load = os.getloadavg()[0]
    theirs_ = run(
        "released", arguments.released_recipes, 1, {"steps": arguments.steps} if arguments.steps else {}
    )
    chosen = ABLATIONS if not arguments.only else {name: ABLATIONS[name] for name in arguments.only}
    runs = {name: run("ours", arguments.recipes, arguments.batch, o) for name, o in chosen.items()}
    rows = {name: summary(found) for name, found in runs.items()}
    first = next(iter(runs.values()))
    pair = {"released": summary(theirs_, shared), "ours": summary(first, shared)}
    return {
        "case": {
            "model": first["model"],
            "clip": first["clip"],
            "judge": first["judge"],
            "judge_guided": arguments.judge == arguments.clip,
            "device": first["device"],
            "cpus": os.cpu_count(),
            "load_before": load,
        },
        "same_recipes": pair,
        "times_as_fast": pair["released"]["seconds"] / pair["ours"]["seconds"],
        "times_the_memory": pair["released"]["bytes_a_picture"] / pair["ours"]["bytes_a_picture"],
        "ablations": rows,
        "operations": count_operations(),
        "runs": {"released": theirs_, **runs},
    }


def show(result: dict[str, Any]) -> None:
    console = Console(width=max(Console().width, 160))
    operations = result["operations"]
    flops.show(operations["blocks"], operations["calls"]["released"], console)
    totals = ", ".join(f"{name} {number / 1e12:,.1f}" for name, number in operations["totals"].items())
    console.print(f"TFLOP a picture: {totals}: {operations['ratio']:.1f} × fewer")
    case = result["case"]
    where = f"{case['model']['id']} on {case['device']}, load {case['load_before']:.1f} before"
    _print(console, f"the same recipes: {where}", result["same_recipes"])
    _print(console, "settings of ours", result["ablations"])
    if case["judge_guided"]:
        console.print("gain: judged by the CLIP that guided the pictures")
    console.print(
        f"{result['times_as_fast']:.1f} × as fast, {result['times_the_memory']:.1f} × less memory a picture, "
        "the first row of settings against the released loop"
    )


def _print(console: Console, title: str, rows: dict[str, Any]) -> None:
    table = Table(title=title)
    columns = ("s a picture", "MB a picture", "objective", "rise", "as released", "gain", "n")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, row in rows.items():
        figures = (
            _interval(row[key]) for key in ("objective", "objective_rise", "objective_released", "gain")
        )
        memory = f"{row['bytes_a_picture'] / 1e6:.0f}"
        table.add_row(name, f"{row['seconds']:.2f}", memory, *figures, str(row["recipes"]))
    console.print(table)


def _interval(found: dict[str, float]) -> str:
    return f"{found['mean']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cut", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--model", default=POCKET, help="checkpoint (default %(default)s)")
    parser.add_argument("--clip", default=POCKET, help="CLIP that guides (default %(default)s)")
    parser.add_argument("--judge", help="CLIP that judges (default: the one that guides)")
    parser.add_argument("--recipes", type=int, default=RECIPES, help="of ours (default %(default)s)")
    parser.add_argument(
        "--released-recipes", type=int, default=RELEASED_RECIPES, help="of the loop (default %(default)s)"
    )
    parser.add_argument("--batch", type=int, default=BATCH, help="of ours (default %(default)s)")
    parser.add_argument("--steps", type=int, help="of the released loop (default 200, as released)")
    parser.add_argument("--threads", type=int, default=1, help="a process (default %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(ABLATIONS), help="rows of the ablation table")
    parser.add_argument("--flops", action="store_true", help="count operations only")
    parser.add_argument("--run", type=json.loads, help="one run only, as JSON")
    arguments = parser.parse_args()
    arguments.judge = arguments.judge or arguments.clip
    if arguments.run:
        print(json.dumps(measure(**arguments.run)))
    elif arguments.flops:
        operations = count_operations()
        flops.show(operations["blocks"], operations["calls"]["released"], Console(width=120))
        print(json.dumps({"totals": operations["totals"], "ratio": operations["ratio"]}))
    else:
        result = benchmark(arguments)
        show(result)
        if arguments.json:
            arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
