"""Milliseconds a sample for every generator, and `perlin` with textures against anomalib's.

    python -m tests.benchmarks.synthesis --json FILE

A sample is drawn, applied, composed with its exact mask, gated, and drawn again where the gates reject it.
One compute thread, each side in a process of its own, the same folder of textures. Our pictures and textures
are in memory, as the pipeline's cache holds them; a second row decodes the texture file for every sample, as
anomalib does. Recipes as the default configuration plans them, and one row with masks of a fifth of the
picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from generation import registry
from generation.gates import Gates
from generation.protocol import Source
from generation.synthesis import Outcome, Signatures, synthesise
from generation.textures import KINDS, procedural
from manifests.schema import Recipe, canonical_json
from tests.benchmarks.peers import run_peer, run_timed

SIDES = (256, 1024)
COUNTS = {256: 300, 1024: 60}
PEER_COUNTS = {256: 100, 1024: 10}
WARM_UP = 10
FASTER = 10.0  # the target, at 256 px
DEFAULT_AREA = (0.002, 0.08)
LARGE_AREA = (0.2, 0.2)
CASES: tuple[tuple[str, str, dict[str, Any], tuple[float, float], bool], ...] = (
    ("perlin, textures", "perlin", {"texture": "folder"}, DEFAULT_AREA, False),
    ("perlin, textures decoded each time", "perlin", {"texture": "folder"}, DEFAULT_AREA, True),
    ("perlin, textures, a fifth of the picture", "perlin", {"texture": "folder"}, LARGE_AREA, False),
    ("perlin, procedural", "perlin", {"texture": "procedural"}, DEFAULT_AREA, False),
    ("perlin, other normals", "perlin", {"texture": "normals"}, DEFAULT_AREA, False),
    ("cutpaste", "cutpaste", {}, DEFAULT_AREA, False),
    ("scar", "scar", {}, DEFAULT_AREA, False),
    ("poisson", "poisson", {}, DEFAULT_AREA, False),
    ("frequency", "frequency", {}, DEFAULT_AREA, False),
)


def draw_textures(folder: Path) -> None:
    """Sixteen PNG textures of 512 px, two of each kind that the code draws."""
    for index, kind in enumerate([*KINDS, *KINDS]):
        texture = procedural(kind, np.random.default_rng(index), 512, 512, 3)
        cv2.imwrite(str(folder / f"{index:02d}-{kind}.png"), np.rint(texture * 255).astype(np.uint8))


def draw_normals(side: int) -> list[np.ndarray]:
    """Pictures of one surface under shifting light: uint8, side×side×3."""
    pictures = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        light = cv2.resize(rng.uniform(90, 170, (5, 5, 3)).astype(np.float32), (side, side))
        pictures.append(np.clip(light + rng.normal(0, 4, light.shape), 0, 255).astype(np.uint8))
    return pictures


def plan(generator: str, params: dict[str, Any], area: tuple[float, float], count: int) -> list[Recipe]:
    rng = np.random.default_rng(0)
    recipes = []
    for index in range(count):
        recipes.append(
            Recipe(
                sample_id=f"{index:05d}",
                round=0,
                image_id=str(index % 8),
                category="drawn",
                generator=generator,
                defect="defect",
                prompt="",
                detail="",
                area=float(np.exp(rng.uniform(*np.log(area)))),
                severity=float(rng.uniform(0.2, 1)),
                count=int(rng.integers(1, 4)),
                location="anywhere",
                donors=(str(index),),
                params=canonical_json(params),
                seed=index,
                batch=index,
                shard=0,
            )
        )
    return recipes


def measure(textures: Path, side: int) -> dict[str, Any]:
    """Our times at one size; runs in a process of its own."""
    cv2.setNumThreads(1)
    normals = draw_normals(side)
    allowed = np.ones((side, side), np.bool_)
    files = sorted(textures.iterdir())
    pictures = [_read(file) for file in files]
    rows = {}
    for name, generator, params, area, decode in CASES:
        found = registry.get(generator)

        def source(recipe: Recipe, found=found, decode=decode, params=params) -> Source:
            number = int(recipe.donors[0])
            if params.get("texture") == "folder":
                donor = _read(files[number % len(files)]) if decode else pictures[number % len(files)]
            else:
                donor = normals[(number + 1) % len(normals)]
            return Source(normals[number % len(normals)], allowed, (donor,))

        recipes = plan(generator, params, area, COUNTS[side])
        for recipe in recipes[:WARM_UP]:
            synthesise([replace(recipe, seed=-1 - recipe.seed & 0xFFFF)], source, found, None, Gates(), 6, [])
        seconds: list[float] = []
        outcomes: list[Outcome] = []
        signatures: Signatures = []
        for recipe in recipes:
            start = time.perf_counter()
            outcomes += synthesise([recipe], source, found, None, Gates(), 6, signatures)
            seconds.append(time.perf_counter() - start)
        accepted = sum(outcome.status == "accepted" for outcome in outcomes)
        rows[name] = {
            "mean": statistics.mean(seconds),
            "median": statistics.median(seconds),
            "min": min(seconds),
            "accepted": accepted / len(outcomes),
            "accepted_per_draw": accepted / sum(outcome.attempts for outcome in outcomes),
            "area": statistics.mean(outcome.mask_area for outcome in outcomes),
        }
    return rows


def _read(file: Path) -> np.ndarray:
    picture = cv2.imread(str(file), cv2.IMREAD_COLOR)
    if picture is None:
        sys.exit(f"{file}: cannot be read as a picture; name a folder that holds textures only")
    return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)


def benchmark(textures: Path | None = None) -> dict[str, Any]:
    """All figures; ``passed`` says whether the target was met."""
    with tempfile.TemporaryDirectory() as name:
        folder = textures or Path(name)
        if textures is None:
            draw_textures(folder)
        sides: dict[str, Any] = {}
        for side in SIDES:
            module = [sys.executable, "-m", "tests.benchmarks.synthesis"]
            ours = run_timed([*module, "--measure", folder, "--side", str(side)])
            options = ["--textures", str(folder), "--count", str(PEER_COUNTS[side]), "--size", str(side)]
            peer = run_peer("peer_synthesis.py", options)
            speedup = {name: peer["median"] / row["median"] for name, row in ours.items()}
            sides[str(side)] = {"ours": ours, "anomalib": peer, "speedup": speedup}
    return {
        "sides": sides,
        "passed": {"speed": sides["256"]["speedup"]["perlin, textures"] >= FASTER},
    }


def show(result: dict[str, Any]) -> None:
    version = result["sides"]["256"]["anomalib"]["version"]
    table = Table(
        title=f"synthesis: ms a sample (median, mean), one thread; anomalib {version} by its median"
    )
    table.add_column("generator", no_wrap=True)
    for side in result["sides"]:
        for column in (f"{side} px", "accepted", "× anomalib"):
            table.add_column(column, justify="right")
    for name, *_ in CASES:
        cells = []
        for figures in result["sides"].values():
            row = figures["ours"][name]
            times = f"{figures['speedup'][name]:.1f}" if name.startswith("perlin") else ""
            pace = f"{1000 * row['median']:.2f} ({1000 * row['mean']:.2f})"
            cells += [pace, f"{100 * row['accepted_per_draw']:.0f} %", times]
        table.add_row(name, *cells)
    cells = []
    for figures in result["sides"].values():
        peer = figures["anomalib"]
        cells += [f"{1000 * peer['median']:.2f} ({1000 * peer['seconds_per_picture']:.2f})", "", ""]
    table.add_row("anomalib PerlinAnomalyGenerator, textures", *cells)
    console = Console(width=max(Console().width, 130))
    console.print(table)
    word = "met" if result["passed"]["speed"] else "MISSED"
    console.print(f"perlin with textures at 256 px at least {FASTER:g} times as fast as anomalib: {word}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.synthesis", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--textures", type=Path, help="folder of textures; default: drawn by code")
    parser.add_argument("--measure", type=Path, metavar="TEXTURES", help="only our side at one size, as JSON")
    parser.add_argument("--side", type=int, default=256)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.side)))
        return
    result = benchmark(arguments.textures)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
