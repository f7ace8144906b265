"""Does the loop help: standard synthesis, ours, ours steered by chance and by the loop, and the ceiling.

    python -m tests.benchmarks.loop --data DIR --json FILE
    python -m tests.benchmarks.loop --data DIR --json FILE --arms standard ours loop ceiling --seeds 0

DIR holds data sets: folders of categories in the layout of MVTec AD; DIR/textures, if it is there, textures.
A cell is an arm with one seed and one part of the pictures, in a process of its own. FILE is written after
every cell: the same command goes on where it was stopped, within a cell too, and what is not measured is
printed as missing. FILE.work/ keeps the workspaces; they hold pictures derived from those of DIR: keep them
out of the repository.

The arms (one multi-category model each; equal recipes a round, steps and settings of the detector):

* standard: Perlin textures and CutPaste as published, the textures' weight chosen once on what steers;
* ours: one round of our generators at their default settings;
* chance: as many rounds as the loop, their settings drawn at random from the declared search space;
* loop: the product's rounds;
* ceiling: ours, and the real anomalies of the pictures that steer, as half of what is drawn;
* few-…: the same on four categories, and the loop there without one of its parts, or with fewer samples.

Of the rounds of chance and loop, that which does best on the pictures that steer is judged. All but CPU time
for making samples and steering is equal; it is told beside the figures.

Development is on the feedback split, cross-fitted: its groups are dealt to two folds, one steers (is the
``feedback`` split of the workspace, and the ceiling's), the other judges, both ways round. --final steers by
the whole feedback split and judges on the test split; every such look is noted in test_looks.json beside this
file.

Figures: pixel AP and AUPRO at 256 px, each way round a fold, averaged over both, over seeds, over the
categories of a data set, and over data sets. Intervals: paired bootstrap (95 %) over seeds and groups of
pictures. Gap closed: Σ(loop − standard) / Σ(ceiling − standard) over the categories where the interval of
ceiling − standard lies above 0. Behind: one-sided, Holm over categories.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from manifests.errors import FlawsmithError
from tests.benchmarks import loop_cells, paired
from tests.benchmarks.detector_cells import SIDE, mean_of_data_sets
from tests.benchmarks.detectors import TITLES, note_look, read_case
from tests.benchmarks.loop_cells import METRICS, PARTS, RESAMPLES, Arm, Plan
from tests.benchmarks.paired import Runs, difference
from tests.benchmarks.peers import run_timed
from tests.benchmarks.pocket_case import described, shown, table
from tests.benchmarks.resumed import open_file, plain, write_file
from training.intervals import Estimate
from workflows.stages import prepare_process

ROUNDS = 3
# What the arms that are steered by the product set beyond its defaults, by section.
WEIGHED: dict[str, dict[str, Any]] = {"training": {"weigh": True}}
STEERED = {**WEIGHED, "generation": {"practice": {"candidates": 4, "guidance": 0.3}}}
FEW_LOOP = Arm("few-loop", rounds=ROUNDS, few=True, settings=STEERED)
ARMS = {
    "ours": Arm("ours"),
    "standard": Arm("standard", standard=True),
    "ceiling": Arm("ours", real=True),
    "loop": Arm("loop", rounds=ROUNDS, settings=STEERED),
    "chance": Arm("chance", rounds=ROUNDS, chance=True),
    "few-ours": Arm("few", few=True),  # the loop without feedback
    "few-loop": FEW_LOOP,
    "few-loop-half": replace(FEW_LOOP, base="few-half", samples=1 / 2),
    "few-loop-third": replace(FEW_LOOP, base="few-third", samples=1 / 3),
    "few-loop-sixth": replace(FEW_LOOP, base="few-sixth", samples=1 / 6),
    "few-loop-no-guidance": replace(FEW_LOOP, base="few-no-guidance", settings=WEIGHED),
    "few-loop-no-weights": replace(
        FEW_LOOP, base="few-no-weights", settings={"generation": STEERED["generation"]}
    ),
    "few-loop-no-cut": replace(FEW_LOOP, base="few-no-cut", without="cut"),
    "few-loop-no-frequency": replace(FEW_LOOP, base="few-no-frequency", without="frequency"),
}
EFFICIENCY = ("few-loop-sixth", "few-loop-third", "few-loop-half", "few-loop")
ABLATED = ("few-ours", *(name for name in ARMS if "-no-" in name))
MAIN = ("standard", "ours", "chance", "loop", "ceiling")
SEEDS = (0, 1, 2)
DETECTOR = "residual"
SAMPLES = 24  # recipes a category and round


def identity(plan: Plan) -> dict[str, Any]:
    """What the cells of one file have in common."""
    placed = sorted(f"{image.image_id} {image.split} {image.group}" for image in plan.case.images)
    return {
        "pictures": hashlib.sha256("\n".join(placed).encode()).hexdigest()[:16],
        "detector": plan.detector,
        "settings": dict(plan.settings),
        "samples_a_category": plan.samples,
        "rounds": ROUNDS,
        "side": SIDE,
        "resamples": RESAMPLES,
        "torch": torch.__version__,
    }


def key(seed: int, part: int) -> str:
    return f"seed {seed}, {PARTS[part]}"


def measure(arguments: argparse.Namespace, name: str, seed: int, part: int) -> dict[str, Any]:
    """One cell, in a process of its own."""
    module = [sys.executable, "-m", "tests.benchmarks.loop", "--cell", name, "--seeds", str(seed)]
    given = ["--part", str(part), "--data", arguments.data, "--json", arguments.json, *passed_on(arguments)]
    found: dict[str, Any] = plain(run_timed([*module, *given], 1))
    return found


def passed_on(arguments: argparse.Namespace) -> list[str]:
    given = ["--detector", arguments.detector, "--samples", str(arguments.samples)]
    given += ["--settings", json.dumps(arguments.settings)]
    return [*given, *(["--final"] if arguments.final else [])]


# -- figures --------------------------------------------------------------------------------------------


def runs_of(
    cells: Mapping[str, Any], seeds: Sequence[int], parts: Sequence[int], metric: str
) -> dict[str, Runs]:
    """By category; the cells of all seeds and parts must be there."""
    rows = [[cells[key(seed, part)]["categories"] for part in parts] for seed in seeds]
    shared = [c for c in rows[0][0] if all(c in one for row in rows for one in row)]
    return {
        c: Runs(
            np.array([[one[c][metric]["value"] for one in row] for row in rows]),
            np.array([[paired.unpacked(one[c][metric]["resamples"]) for one in row] for row in rows]),
        )
        for c in shared
    }


Figures = dict[str, dict[str, Estimate]]  # by metric and category


def estimates(plan: Plan, result: Mapping[str, Any], name: str, seeds: Sequence[int]) -> Figures | None:
    """None if a cell is missing."""
    cells = result["cells"].get(name, {})
    if any(key(seed, part) not in cells for seed in seeds for part in plan.parts):
        return None
    found = {metric: runs_of(cells, seeds, plan.parts, metric) for metric in METRICS}
    return {metric: {c: paired.over_seeds(runs) for c, runs in own.items()} for metric, own in found.items()}


def lead(plan: Plan, first: Figures, second: Figures, metric: str) -> Estimate:
    """The mean over data sets of ``first`` − ``second``."""
    shared = [c for c in first[metric] if c in second[metric]]
    leads = {c: difference(first[metric][c], second[metric][c]) for c in shared}
    return mean_of_data_sets(leads, {c: plan.case.data_set(c) for c in shared})


# -- tables ---------------------------------------------------------------------------------------------


def told(found: Estimate) -> str:
    return shown(described(found))


def signed(found: Estimate) -> str:
    return shown(described(found), "+.3f")


def means_table(plan: Plan, known: Mapping[str, Figures], result: Mapping[str, Any]) -> Table:
    split = "test split" if plan.final else "feedback split, cross-fitted"
    columns = [f"{TITLES[m]}{more}" for m in METRICS for more in ("", ", over standard", ", over chance")]
    rows = table(f"{split}: {plan.detector}, {plan.samples} recipes a category", "arm", *columns, "CPU min")
    for name in MAIN:
        if name not in known:
            rows.add_row(name, *["–"] * len(columns), "missing")
            continue
        cells: list[str] = []
        for metric in METRICS:
            sets = {c: plan.case.data_set(c) for c in known[name][metric]}
            cells.append(told(mean_of_data_sets(known[name][metric], sets)))
            for other in ("standard", "chance"):
                there = other in known and other != name
                cells.append(signed(lead(plan, known[name], known[other], metric)) if there else "")
        rows.add_row(name, *cells, minutes(result, name))
    return rows


def minutes(result: Mapping[str, Any], name: str) -> str:
    return f"{np.mean([cell['cpu_minutes'] for cell in result['cells'][name].values()]):.1f}"


def category_table(plan: Plan, known: Mapping[str, Figures], metric: str) -> Table:
    """Each arm's figure, the gap, and what the loop gains of it."""
    there = [name for name in MAIN if name in known]
    columns = ["ceiling − standard", "loop − standard", "loop − chance"]
    rows = table(f"{TITLES[metric]} by category", "category", *there, *columns)
    for c in known[there[0]][metric]:
        cells = [f"{known[name][metric][c].value:.3f}" for name in there]
        for pair in columns:
            first, second = pair.split(" − ")
            both = first in known and second in known
            cells.append(
                signed(difference(known[first][metric][c], known[second][metric][c])) if both else ""
            )
        rows.add_row(c, *cells)
    return rows


def verdicts(known: Mapping[str, Figures]) -> list[str]:
    """Gap closed, and where the loop is behind; a line a metric and question."""
    lines = []
    for metric in METRICS:
        if all(name in known for name in ("standard", "loop", "ceiling")):
            arms = [known[name][metric] for name in ("standard", "loop", "ceiling")]
            ratio, without = paired.gap_closed(*arms)
            lines.append(
                f"{TITLES[metric]}: gap closed {told(ratio)}; no gap: {', '.join(without) or 'none'}"
            )
        for other in ("standard", "chance"):
            if "loop" in known and other in known:
                pairs = {c: (known["loop"][metric][c], known[other][metric][c]) for c in known[other][metric]}
                late = paired.behind({c: difference(*pair) for c, pair in pairs.items()})
                lines.append(
                    f"{TITLES[metric]}: significantly behind {other}: {', '.join(late) or 'nowhere'}"
                )
    return lines


def few_table(plan: Plan, known: Mapping[str, Figures]) -> Table:
    rows = table("four categories: the loop, and without a part of it", "arm", *(TITLES[m] for m in METRICS))
    for name in ("few-loop", *ABLATED):
        if name not in known:
            rows.add_row(name, *["–"] * len(METRICS))
            continue
        cells = []
        for metric in METRICS:
            sets = {c: plan.case.data_set(c) for c in known[name][metric]}
            own = told(mean_of_data_sets(known[name][metric], sets))
            less = name != "few-loop" and "few-loop" in known
            cells.append(
                own + (f" ({signed(lead(plan, known[name], known['few-loop'], metric))})" if less else "")
            )
        rows.add_row(name, *cells)
    return rows


def efficiency(plan: Plan, known: Mapping[str, Figures]) -> str:
    """How many times fewer samples the loop needs to reach the AUPRO of ``few-ours``."""
    if any(name not in known for name in (*EFFICIENCY, "few-ours")):
        return "samples needed: missing"
    sets = {c: plan.case.data_set(c) for c in known["few-ours"]["aupro"]}
    curve = [mean_of_data_sets(known[name]["aupro"], sets) for name in EFFICIENCY]
    counts = [max(1, round(1000 * ARMS[name].samples)) for name in EFFICIENCY]
    times = paired.fewer_samples(counts, curve, mean_of_data_sets(known["few-ours"]["aupro"], sets))
    return f"samples needed for the AUPRO of few-ours: {shown(described(times), '.1f')} times fewer"


def show(plan: Plan, result: Mapping[str, Any], seeds: Sequence[int], console: Console) -> None:
    found = {name: estimates(plan, result, name, seeds) for name in ARMS}
    known = {name: own for name, own in found.items() if own is not None}
    console.print(means_table(plan, known, result))
    if any(name in known for name in MAIN):
        for metric in METRICS:
            console.print(category_table(plan, known, metric))
    for line in verdicts(known):
        console.print(line, highlight=False)
    console.print(few_table(plan, known))
    console.print(efficiency(plan, known), highlight=False)
    for name in ARMS:
        cells = result["cells"].get(name, {})
        if missing := [k for s in seeds for p in plan.parts if (k := key(s, p)) not in cells]:
            console.print(f"{name}: missing: {'; '.join(missing)}", highlight=False)


# -- the command ----------------------------------------------------------------------------------------


def arguments_of(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets")
    parser.add_argument("--json", type=Path, required=True, help="all figures; goes on from what is there")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), help="default: 0 1 2")
    parser.add_argument("--detector", default=DETECTOR, help=f"default: {DETECTOR}")
    parser.add_argument("--settings", type=json.loads, default={}, help="the detector's, as JSON")
    parser.add_argument("--samples", type=int, default=SAMPLES, help=f"a category and round ({SAMPLES})")
    parser.add_argument("--final", action="store_true", help="judge on the test split, and note it")
    parser.add_argument("--cell", choices=list(ARMS), help=argparse.SUPPRESS)  # one cell, as JSON
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    arguments = arguments_of(given)
    console = Console(width=max(Console().width, 200))
    work = arguments.json.with_name(f"{arguments.json.name}.work").resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        case = read_case(arguments.data, work, "test" if arguments.final else "feedback", 0.0)
        plan = Plan(case, arguments.detector, arguments.settings, arguments.samples, arguments.final)
        if arguments.cell:
            prepare_process()
            torch.set_num_threads(1)
            found = loop_cells.measure(plan, ARMS[arguments.cell], arguments.seeds[0], arguments.part)
            print(json.dumps(found))
            return 0
        result = open_file(arguments.json, {**identity(plan), "final": plan.final}, cells={})
    except FlawsmithError as error:
        console.print(str(error), style="bold", markup=False)
        return 2
    failed = False
    for seed in arguments.seeds:
        for name in arguments.arms:
            for part in plan.parts:
                if key(seed, part) in result["cells"].get(name, {}):
                    continue
                if plan.final:
                    note_look(f"loop: {name}", seed)
                try:
                    found = measure(arguments, name, seed, part)
                except RuntimeError as error:
                    failed = True
                    console.print(f"{name}, {key(seed, part)}: {error}", style="bold", markup=False)
                    continue
                result["cells"].setdefault(name, {})[key(seed, part)] = found
                write_file(arguments.json, result)
                console.print(f"{name}, {key(seed, part)}: {found['cpu_minutes']:.1f} min", highlight=False)
    show(plan, result, arguments.seeds, console)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
