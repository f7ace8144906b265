"""Scratches, cracks and stains: their cost, and how true their masks are, beside two packages' presets.

    python -m tests.benchmarks.presets --json FILE

One thread, each side in a process of its own, the same pictures in memory; what counts is the CPU time of a
sample, so that other work on the machine does not. The packages are pyimgano and defect-synthesis, at their
defaults. Ours are the generators that imitate the same: ``scar`` for scratches, ``crack`` for cracks,
``perlin`` with drawn textures for stains. A sample of ours has its severity solved for, is composed with its
exact mask, gated, and drawn again where the gates reject it; all is timed.

The packages differ in how many defects a picture gets and how large they are, so each is met by samples like
its own: of each of its samples the area, and as many regions as it draws (``COUNTS``). Beside them stands
what a run plans by default: one to three regions, whatever the size of the picture.

Both sides' masks are judged alike, after the timing, on the picture and the mask that come out: leak is the
share of the changed pixels outside the mask, hollow the share of the mask that changed by at most 2 levels.
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
from generation.compose import VISIBLE, channel_max
from generation.gates import Gates
from generation.protocol import Source
from generation.synthesis import Signatures, synthesise
from manifests.schema import Recipe
from tests.benchmarks.peers import run_peer, run_timed
from tests.benchmarks.synthesis import draw_normals, plan

SIDES = {256: 100, 1024: 30}  # samples a preset at each side
WARM_UP = 5
LEAK, HOLLOW = 0.0, 0.05  # the targets
# Least and most regions, as the packages draw them by default. (pyimgano's stain is wherever noise exceeds a
# threshold.)
COUNTS = {
    "pyimgano": {"scratch": (1, 3), "crack": (1, 2), "stain": (1, 1)},
    "defect-synthesis": {"scratch": (1, 3), "crack": (1, 1), "stain": (1, 1)},
}
PRESETS: dict[str, tuple[str, dict[str, Any], tuple[float, float]]] = {
    "scratch": ("scar", {}, (0.001, 0.01)),
    "crack": ("crack", {}, (0.001, 0.01)),
    "stain": ("perlin", {"texture": "procedural"}, (0.005, 0.08)),
}


def exactness(before: np.ndarray, after: np.ndarray, mask: np.ndarray) -> tuple[float, float, float]:
    """Leak, hollow and area of a finished sample; see the module.

    >>> before, mask = np.zeros((4, 4, 1), np.uint8), np.zeros((4, 4), bool)
    >>> after = before.copy()
    >>> after[0, :3], mask[0, 1:] = 9, True
    >>> [round(float(share), 4) for share in exactness(before, after, mask)]
    [0.3333, 0.3333, 0.1875]
    """
    change = channel_max(cv2.absdiff(after, before).reshape(before.shape))
    inside = mask > 0
    leak = np.count_nonzero(change[~inside]) / max(np.count_nonzero(change), 1)
    hollow = np.count_nonzero(change[inside] <= VISIBLE) / max(np.count_nonzero(inside), 1)
    return leak, hollow, float(inside.mean())


def plans(peers: dict[str, Any], count: int) -> dict[str, list[Recipe]]:
    """The recipes of each of our rows: ``planned`` as a run has them, and like each package's samples."""
    rows = {}
    for preset, (name, params, area) in PRESETS.items():
        planned = plan(name, params, area, WARM_UP + count)
        rows[f"planned: {preset}"] = planned
        for package, counts in COUNTS.items():
            rng, (low, high) = np.random.default_rng(0), counts[preset]
            areas = np.resize(peers[f"{package}: {preset}"]["areas"], len(planned)).tolist()
            rows[f"like {package}: {preset}"] = [
                replace(recipe, area=area, count=int(rng.integers(low, high + 1)))
                for recipe, area in zip(planned, areas, strict=True)
            ]
    return rows


def measure(normals: np.ndarray, peers: dict[str, Any], count: int) -> dict[str, Any]:
    """Our side at one size; runs in a process of its own."""
    cv2.setNumThreads(1)
    allowed = np.ones(normals.shape[1:3], np.bool_)
    rows = {}
    for row, recipes in plans(peers, count).items():
        generator = registry.get(recipes[0].generator)
        seconds, found = [], []
        for judged in (False, True):  # in a pass of its own: to judge a sample leaves the next a cold cache
            signatures = Signatures()
            for index, recipe in enumerate(recipes):
                source = Source(normals[index % len(normals)], allowed, ())
                start = time.process_time()
                (made,) = synthesise([recipe], lambda _, s=source: s, generator, None, Gates(), 6, signatures)
                spent = time.process_time() - start
                if index < WARM_UP:
                    continue
                if not judged:
                    seconds.append(spent)
                elif made.status == "accepted":
                    found.append(exactness(source.pixels, made.pixels, made.mask))
        leak, hollow, share = np.mean(found, axis=0).tolist()
        rows[row] = {
            "seconds": seconds,
            "leak": leak,
            "hollow": hollow,
            "area": share,
            "accepted": len(found) / count,
        }
    return rows


def benchmark() -> dict[str, Any]:
    """All figures; ``passed`` says which targets were met."""
    sides: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for side, count in SIDES.items():
            file, like = Path(folder) / f"{side}.npy", Path(folder) / f"{side}.json"
            np.save(file, np.stack(draw_normals(side)))
            peers = run_peer("peer_presets.py", [file, "--count", str(count)], extra="bench-synthesis")
            like.write_text(json.dumps(peers["rows"]))
            module = [sys.executable, "-m", "tests.benchmarks.presets", "--measure", file, "--like", like]
            rows = run_timed([*module, "--count", str(count)]) | peers["rows"]
            for row in rows.values():
                row["median"] = statistics.median(row.pop("seconds"))
                row.pop("areas", None)
            sides[str(side)] = rows
    return {"sides": sides, "versions": peers["versions"], "passed": passed(sides)}


def passed(sides: dict[str, Any]) -> dict[str, bool]:
    own = [
        row for rows in sides.values() for name, row in rows.items() if name.startswith(("planned", "like"))
    ]
    return {
        "faster": all(
            rows[f"like {package}: {preset}"]["median"] < rows[f"{package}: {preset}"]["median"]
            for rows in sides.values()
            for preset in PRESETS
            for package in COUNTS
        ),
        "leak": all(row["leak"] <= LEAK for row in own),
        "hollow": all(row["hollow"] <= HOLLOW for row in own),
    }


def show(result: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    table = Table(
        title=f"presets: median CPU ms a sample, one thread; leak, hollow and area in %; {versions}"
    )
    table.add_column("preset", no_wrap=True)
    for side in result["sides"]:
        for column in (f"{side} px", "leak", "hollow", "area"):
            table.add_column(column, justify="right")
    sides = [("flawsmith, as planned", "planned")]
    for package in COUNTS:
        sides += [(package, package), (f"flawsmith, like {package}", f"like {package}")]
    for preset in PRESETS:
        for name, row in sides:
            cells = []
            for rows in result["sides"].values():
                found = rows[f"{row}: {preset}"]
                cells.append(f"{1000 * found['median']:.2f}")
                cells += [f"{100 * found[key]:.2f}" for key in ("leak", "hollow", "area")]
            table.add_row(f"{preset}, {name}", *cells)
        table.add_section()
    console = Console(width=max(Console().width, 130))
    console.print(table)
    targets = {
        "faster": "ours faster than either package's at every size",
        "leak": "leak 0",
        "hollow": f"hollow at most {100 * HOLLOW:g} %",
    }
    for name, what in targets.items():
        console.print(f"{what}: {'met' if result['passed'][name] else 'MISSED'}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.presets", description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--measure", type=Path, metavar="NORMALS", help="only our side at one size, as JSON")
    parser.add_argument("--like", type=Path, metavar="ROWS", help="with --measure: the packages' rows")
    parser.add_argument("--count", type=int, default=SIDES[256])
    arguments = parser.parse_args()
    if arguments.measure:
        peers = json.loads(arguments.like.read_text())
        print(json.dumps(measure(np.load(arguments.measure, allow_pickle=False), peers, arguments.count)))
        return
    result = benchmark()
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
