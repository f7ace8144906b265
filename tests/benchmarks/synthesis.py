"""Milliseconds a sample for every generator, and `perlin` with textures against anomalib's.

    python -m tests.benchmarks.synthesis --json FILE

A sample is drawn, applied, composed with its exact mask, gated, and drawn again where the gates reject it.
One compute thread, each side in a process of its own, the same folder of textures. Our pictures and textures
are in memory, as the pipeline's cache holds them; a second row decodes the texture file for every sample, as
anomalib does. The first row does what anomalib's generator does, one region and a drawn opacity; the others
are recipes as the default configuration plans them, with up to three regions and a solved severity, and one
with masks of a fifth of the picture.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import resources
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
from manifests.workspace import Workspace
from tests.benchmarks.peers import run_peer, run_timed
from workflows import rounds
from workflows.config import Config
from workflows.gallery import render
from workflows.stages import Job, make_shard, settings_hash
from workflows.trying import read_source

# At a fixed strength, where each operator's change is plainly seen.
STRENGTHS = {
    "band": 4.0, "fda": 1.0, "fact": 1.0, "apr": 0.5, "laplacian": 3.0, "wavelet": 4.0, "notch": 1.0,
    "peak": 0.1, "blur": 3.0, "sharpen": 3.0, "shift": 3.0, "highpass": 1.0,
}  # fmt: skip
FREQUENCY = tuple(STRENGTHS)
LIMITS = {256: 2.0, 1024: 40.0}  # ms a grey sample at a fixed strength
WAVELET_LIMITS = {256: 4.0, 1024: 150.0}
RGB_LIMIT, SOLVER_LIMIT = 3.2, 6.0  # times the grey sample, and times the fixed strength
FEATURES = ("noise", "jitter", "flow", "copy", "shuffle", "insert", "local", "ascent", "adversarial")
GRADIENTS = ("ascent", "adversarial")
FORWARD = 0.9  # wanted share of the backbone's forward pass in a feature shard's time
SIDES = (256, 1024)
COUNTS = {256: 300, 1024: 60}
PEER_COUNTS = {256: 100, 1024: 10}
WARM_UP = 10
PICTURES = "docs/generators"  # beside the README
BEGIN, END = "<!-- generators -->", "<!-- end of generators -->"  # around the table in the README
FASTER = 20.0  # the target, at 256 px, for LIKE_ANOMALIB
DEFAULT_AREA = (0.002, 0.08)
LARGE_AREA = (0.2, 0.2)
LIKE_ANOMALIB = "perlin, textures, one region, drawn opacity"  # anomalib solves no severity, one noise field
CASES: tuple[tuple[str, str, dict[str, Any], tuple[float, float], bool], ...] = (
    (LIKE_ANOMALIB, "perlin", {"texture": "folder", "opacity": (0.2, 1.0)}, DEFAULT_AREA, False),
    ("perlin, textures", "perlin", {"texture": "folder"}, DEFAULT_AREA, False),
    ("perlin, textures decoded each time", "perlin", {"texture": "folder"}, DEFAULT_AREA, True),
    ("perlin, textures, a fifth of the picture", "perlin", {"texture": "folder"}, LARGE_AREA, False),
    ("perlin, procedural", "perlin", {"texture": "procedural"}, DEFAULT_AREA, False),
    ("perlin, other normals", "perlin", {"texture": "normals"}, DEFAULT_AREA, False),
    ("cutpaste", "cutpaste", {}, DEFAULT_AREA, False),
    ("scar", "scar", {}, DEFAULT_AREA, False),
    ("crack", "crack", {}, DEFAULT_AREA, False),
    ("chip", "chip", {}, DEFAULT_AREA, False),
    ("fibre", "fibre", {}, DEFAULT_AREA, False),
    ("poisson", "poisson", {}, DEFAULT_AREA, False),
    *((name, name, {}, DEFAULT_AREA, False) for name in FREQUENCY),
)


def draw_textures(folder: Path) -> None:
    """Sixteen PNG textures of 512 px, two of each kind that the code draws."""
    for index, kind in enumerate([*KINDS, *KINDS]):
        texture = procedural(kind, np.random.default_rng(index), 512, 512, 3)
        cv2.imwrite(str(folder / f"{index:02d}-{kind}.png"), np.rint(texture * 255).astype(np.uint8))


def draw_normals(side: int, count: int = 8) -> list[np.ndarray]:
    """Pictures of one surface under shifting light: uint8, side×side×3."""
    pictures = []
    for seed in range(count):
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
            return Source(normals[number % len(normals)], allowed, (donor,), lambda: allowed)

        recipes = plan(generator, params, area, COUNTS[side])
        if name == LIKE_ANOMALIB:
            recipes = [replace(recipe, count=1) for recipe in recipes]
        for recipe in recipes[:WARM_UP]:
            synthesise([replace(recipe, seed=-1 - recipe.seed & 0xFFFF)], source, found, None, Gates(), 6, {})
        seconds: list[float] = []
        outcomes: list[Outcome] = []
        signatures: Signatures = {}
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


def measure_operators(side: int) -> dict[str, Any]:
    """The frequency family at one size: grey and RGB at a fixed strength, grey at a solved one; median
    seconds a sample, drawing, exact mask and gates included."""
    cv2.setNumThreads(1)
    colour = draw_normals(side)
    kinds = {
        "grey": ([picture[..., :1].copy() for picture in colour], True),
        "rgb": (colour, True),
        "solved": ([picture[..., :1].copy() for picture in colour], False),
    }
    allowed, gates = np.ones((side, side), np.bool_), Gates(severity_error=1e9)
    rows: dict[str, Any] = {}
    for name in FREQUENCY:
        generator = registry.get(name)
        rows[name] = {}
        for kind, (pictures, fixed) in kinds.items():
            params = {"strength": STRENGTHS[name]} if fixed else {}
            seconds = []
            for number, recipe in enumerate(plan(name, params, DEFAULT_AREA, WARM_UP + COUNTS[side] // 3)):
                source = Source(pictures[number % 8], allowed, (pictures[(number + 1) % 8],))
                start = time.perf_counter()
                synthesise([recipe], lambda _, source=source: source, generator, None, gates, 1, {})
                seconds.append(time.perf_counter() - start)
            rows[name][kind] = statistics.median(seconds[WARM_UP:])
    return rows


def measure_features() -> dict[str, Any]:
    """The feature family and `cut` at 256 px, whole shards as a run makes them (read, drawn, gated, encoded,
    packed): seconds a sample, and the share of them, and of the synthesis alone, that the backbone took."""
    import torch

    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, _timed_backbone() as forward:
        folder = Path(name)
        _write_normals(folder / "pictures")
        for operator in FEATURES:
            passes, records = [], []
            for record in _shards(folder, f"feature-{operator}", 32):
                passes.append(sum(forward))
                records.append(record)
                forward.clear()
            busy, whole = sum(passes[1:]), sum(record["seconds"] for record in records[1:])
            synthesis = sum(record["synthesis_seconds"] for record in records[1:])
            rows[operator] = {
                "seconds": _pace(records[1:]),
                "forward": busy / whole,
                "of_synthesis": busy / synthesis,
            }
        rows["cut"] = {"seconds": _pace(list(_shards(folder, "cut", 8))[1:])}
    return rows


def _write_normals(folder: Path) -> None:
    """Two categories of twenty pictures of 256 px, none of which is in both."""
    for turned, category in enumerate(("one", "other")):
        good = folder / category / "train" / "good"
        good.mkdir(parents=True)
        for number, normal in enumerate(draw_normals(256, 20)):
            cv2.imwrite(str(good / f"{number}.png"), np.rot90(normal, turned))


def _shards(folder: Path, generator: str, size: int) -> Iterator[dict[str, Any]]:
    """The records of three shards of a generator; the first of them warms up."""
    config = Config.model_validate(
        {
            "source": str(folder / "pictures"),
            "samples": 3 * size,
            "output": {"shard_size": size},
            "generation": {"generators": {generator: {}}, "location": "anywhere"},
        }
    )
    space = Workspace(str(folder / generator))
    number = rounds.begin(config, space, new_round=False)
    digest = settings_hash(space, number)
    for shard in range(rounds.open_round(space, number).shard_count):
        yield make_shard(Job(str(folder / generator), number, shard, digest))


def _pace(records: Sequence[dict[str, Any]]) -> float:
    """Seconds a sample, of those that were accepted in the end."""
    return sum(r["seconds"] for r in records) / sum(r["accepted"] for r in records)


@contextmanager
def _timed_backbone() -> Iterator[list[float]]:
    """The seconds of each forward pass of any backbone in this process."""
    from generation.backbones import Backbone

    seconds: list[float] = []
    plain = Backbone.taps

    def timed(self: Backbone, images: Any) -> Any:
        start = time.perf_counter()
        found = plain(self, images)
        seconds.append(time.perf_counter() - start)
        return found

    Backbone.taps = timed  # type: ignore[method-assign]
    try:
        yield seconds
    finally:
        Backbone.taps = plain  # type: ignore[method-assign]


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
            operators = run_timed([*module, "--operators", "--side", str(side)])
            speedup = {name: peer["median"] / row["median"] for name, row in ours.items()}
            sides[str(side)] = {"ours": ours, "anomalib": peer, "speedup": speedup, "operators": operators}
        features = run_timed([*module, "--features"])
    return {"sides": sides, "features": features, "passed": passed(sides, features)}


def passed(sides: dict[str, Any], features: dict[str, Any]) -> dict[str, bool]:
    """Target by target, whether it is met at every size and by every operator that it is for."""
    rows = [
        (int(side), name, row) for side, found in sides.items() for name, row in found["operators"].items()
    ]
    return {
        "speed": sides["256"]["speedup"][LIKE_ANOMALIB] >= FASTER,
        "operators": all(
            1000 * row["grey"] <= (WAVELET_LIMITS if name == "wavelet" else LIMITS)[side]
            for side, name, row in rows
        ),
        "rgb": all(row["rgb"] <= RGB_LIMIT * row["grey"] for _, _, row in rows),
        "solver": all(row["solved"] <= SOLVER_LIMIT * row["grey"] for _, _, row in rows),
        "features": all(features[name]["forward"] >= FORWARD for name in FEATURES if name not in GRADIENTS),
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
    console.print(operators_table(result))
    table = Table(
        title="feature family at 256 px, batches of 8, whole shards: ms a sample; share of the backbone's "
        "forward pass in them, and in the synthesis alone"
    )
    for column in ("generator", "ms", "forward", "of synthesis"):
        table.add_column(column, justify="left" if column == "generator" else "right")
    for name in FEATURES:
        row = result["features"][name]
        note = " (gradients)" if name in GRADIENTS else ""
        table.add_row(
            f"feature-{name}{note}",
            f"{1000 * row['seconds']:.1f}",
            *(f"{100 * row[key]:.0f} %" for key in ("forward", "of_synthesis")),
        )
    console.print(table)
    targets = {
        "speed": f"{LIKE_ANOMALIB} at 256 px at least {FASTER:g} times as fast as anomalib",
        "operators": "a grey sample at most 2 ms at 256 px (wavelets 4), 40 ms at 1024 px (150)",
        "rgb": f"RGB at most {RGB_LIMIT:g} times grey",
        "solver": f"a solved strength at most {SOLVER_LIMIT:g} times a fixed one",
        "features": f"the backbone at least {100 * FORWARD:.0f} % of a feature shard without gradients",
    }
    for name, what in targets.items():
        console.print(f"{what}: {'met' if result['passed'][name] else 'MISSED'}")


def operators_table(result: dict[str, Any]) -> Table:
    table = Table(title="frequency family: ms a grey sample at a fixed strength; RGB and solved, times that")
    table.add_column("generator", no_wrap=True)
    for side in result["sides"]:
        for column in (f"{side} px", "RGB", "solved"):
            table.add_column(column, justify="right")
    for name in FREQUENCY:
        cells = []
        for figures in result["sides"].values():
            row = figures["operators"][name]
            cells += [
                f"{1000 * row['grey']:.2f}",
                *(f"{row[k] / row['grey']:.1f} ×" for k in ("rgb", "solved")),
            ]
        table.add_row(name, *cells)
    return table


def readme_table(result: dict[str, Any]) -> str:
    """The table of generators of the README: from the registry, with the median cost measured here."""
    lines = [
        "| | generator | family | imitates | settings | ms a sample at 256 px, 1024 px |",
        "|---|---|---|---|---|---|",
    ]
    found = result["features"]
    cost = {f"feature-{name}": [1000 * found[name]["seconds"]] for name in FEATURES}
    cost["cut"] = [1000 * found["cut"]["seconds"]]
    for name, generator, *_ in CASES:
        if generator not in cost or name == "perlin, procedural":
            cost[generator] = [1000 * side["ours"][name]["median"] for side in result["sides"].values()]
    families = ("classic", "frequency", "feature", "cut")
    for name in sorted(registry.BUILT_IN, key=lambda n: (families.index(registry.get(n).family), n)):
        pace = ", ".join(f"{milliseconds:.1f}" for milliseconds in cost[name]) if name in cost else ""
        lines.append(f"{readme_row(name)} {pace} |")
    return "\n".join(lines)


def readme_row(name: str) -> str:
    """A generator's row of the table, up to its cost."""
    generator = registry.get(name)
    settings = ", ".join(f"`{field}`" for field in generator.params.model_fields)
    picture = f"![{name}]({PICTURES}/{name}.png)" if generator.family != "feature" else ""
    return f"| {picture} | `{name}` | {generator.family} | {generator.summary} | {settings} |"


def write_pictures(folder: Path) -> None:
    """A small picture of each generator that has one, on the gravel and the brick that scikit-image ships."""
    shipped = Path(str(resources.files("skimage"))) / "data"
    sources = [read_source(shipped / f"{name}.png", None) for name in ("brick", "gravel")]
    brick, gravel = (Source(one.pixels[128:384, 128:384], one.allowed[128:384, 128:384]) for one in sources)
    brick = replace(brick, donors=(gravel.pixels,))
    folder.mkdir(parents=True, exist_ok=True)
    for name in registry.BUILT_IN:
        generator = registry.get(name)
        if generator.family == "feature":
            continue
        rows = (render(generator, Path("brick"), brick, 0.06, seed) for seed in range(4))
        shown = [
            tile for row in rows for tile, reason in zip(row.tiles, row.reasons, strict=True) if not reason
        ]
        if not shown:
            raise SystemExit(f"{name}: no accepted sample to show on the brick")
        small = cv2.resize(shown[-1], (80, 80), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / f"{name}.png"), small[..., ::-1])


def write_readme(path: Path, result: dict[str, Any]) -> None:
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    write_pictures(path.parent / PICTURES)
    path.write_text(f"{before}{BEGIN}\n{readme_table(result)}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.synthesis", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--readme", type=Path, help="write the table of generators into this file")
    parser.add_argument("--features", action="store_true", help="only the feature family, as JSON")
    parser.add_argument("--operators", action="store_true", help="only the frequency family, as JSON")
    parser.add_argument("--textures", type=Path, help="folder of textures; default: drawn by code")
    parser.add_argument("--measure", type=Path, metavar="TEXTURES", help="only our side at one size, as JSON")
    parser.add_argument("--side", type=int, default=256)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.side)))
        return
    if arguments.features:
        print(json.dumps(measure_features()))
        return
    if arguments.operators:
        print(json.dumps(measure_operators(arguments.side)))
        return
    result = benchmark(arguments.textures)
    show(result)
    if arguments.readme:
        write_readme(arguments.readme, result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
