"""Scratches, cracks and stains: their cost, and how true their masks are, beside two packages' presets.

    python -m tests.benchmarks.presets --json FILE

One thread, each side in a process of its own, the same pictures in memory; what counts is the CPU time of a
sample, so that other work on the machine does not. The packages are pyimgano and defect-synthesis, at their
defaults. Ours are the generators that imitate the same: ``scar`` for scratches; ``scar`` drawn out and bent
for cracks (it does not branch); ``perlin`` with drawn textures for stains. A sample of ours has its severity
solved for, is composed with its exact mask, gated, and drawn again where the gates reject it; all is timed.

Both sides' masks are judged alike, on the picture and the mask that come out: leak is the share of the
changed pixels outside the mask, hollow the share of the mask that changed by at most 2 levels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
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
from tests.benchmarks.peers import run_peer, run_timed
from tests.benchmarks.synthesis import draw_normals, plan

SIDES = {256: 100, 1024: 30}  # samples a preset at each side
WARM_UP = 5
LEAK, HOLLOW = 0.0, 0.05  # the targets
PACKAGES = ("pyimgano", "defect-synthesis")
PRESETS: dict[str, tuple[str, dict[str, Any], tuple[float, float]]] = {
    "scratch": ("scar", {}, (0.001, 0.01)),
    "crack": ("scar", {"ratio_low": 30.0, "ratio_high": 100.0, "bend": 0.3}, (0.001, 0.01)),
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


def measure(normals: np.ndarray, count: int) -> dict[str, Any]:
    """Our side at one size; runs in a process of its own."""
    cv2.setNumThreads(1)
    allowed = np.ones(normals.shape[1:3], np.bool_)
    rows = {}
    for preset, (name, params, area) in PRESETS.items():
        generator, signatures = registry.get(name), Signatures()
        seconds, found = [], []
        for index, recipe in enumerate(plan(name, params, area, WARM_UP + count)):
            source = Source(normals[index % len(normals)], allowed, ())
            start = time.process_time()
            (made,) = synthesise([recipe], lambda _, s=source: s, generator, None, Gates(), 6, signatures)
            spent = time.process_time() - start
            if index >= WARM_UP:
                seconds.append(spent)
                if made.status == "accepted":
                    found.append(exactness(source.pixels, made.pixels, made.mask))
        leak, hollow, share = np.mean(found, axis=0).tolist()
        rows[preset] = {
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
            file = Path(folder) / f"{side}.npy"
            np.save(file, np.stack(draw_normals(side)))
            module = [sys.executable, "-m", "tests.benchmarks.presets", "--measure", file]
            ours = run_timed([*module, "--count", str(count)])
            peers = run_peer("peer_presets.py", [file, "--count", str(count)], extra="bench-synthesis")
            rows = {f"flawsmith: {name}": row for name, row in ours.items()} | peers["rows"]
            for row in rows.values():
                row["median"] = statistics.median(row.pop("seconds"))
            sides[str(side)] = rows
    return {"sides": sides, "versions": peers["versions"], "passed": passed(sides)}


def passed(sides: dict[str, Any]) -> dict[str, bool]:
    own = [(rows, preset, rows[f"flawsmith: {preset}"]) for rows in sides.values() for preset in PRESETS]
    return {
        "faster": all(
            row["median"] < rows[f"{package}: {preset}"]["median"]
            for rows, preset, row in own
            for package in PACKAGES
        ),
        "leak": all(row["leak"] <= LEAK for _, _, row in own),
        "hollow": all(row["hollow"] <= HOLLOW for _, _, row in own),
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
    for preset, (generator, *_) in PRESETS.items():
        for name in ("flawsmith", *PACKAGES):
            cells = []
            for rows in result["sides"].values():
                row = rows[f"{name}: {preset}"]
                cells.append(f"{1000 * row['median']:.2f}")
                cells += [f"{100 * row[key]:.2f}" for key in ("leak", "hollow", "area")]
            note = f" ({generator})" if name == "flawsmith" else ""
            table.add_row(f"{preset}, {name}{note}", *cells)
        table.add_section()
    console = Console(width=max(Console().width, 120))
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
    parser.add_argument("--count", type=int, default=SIDES[256])
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(np.load(arguments.measure, allow_pickle=False), arguments.count)))
        return
    result = benchmark()
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
