"""Does the loop help: standard synthesis, ours, ours steered by chance and by the loop, and the ceiling.

    python -m tests.benchmarks.loop --data DIR --json FILE
    python -m tests.benchmarks.loop --data DIR --json FILE --arms standard ours loop ceiling --seeds 0

DIR holds data sets: folders of categories in the layout of MVTec AD; DIR/textures, if it is there, textures.
A cell is an arm with one seed and one part of the pictures, in a process of its own. FILE is written after
every cell: the same command goes on where it was stopped, within a cell too, and what is not measured is
printed as missing. Cells of another code, of other settings or of an arm that is now another are refused.
FILE.work/ keeps the workspaces; they hold pictures derived from those of DIR: keep them out of the
repository.

The arms (one multi-category model each; equal recipes in all rounds together, steps and settings of the
detector):

* A standard: Perlin textures and CutPaste as published, the textures' weight chosen once on what steers;
* B ours: one round of the default mix at its default settings;
* C loop: the product's rounds, each detector learning from all samples so far (``training.earlier: 1``), with
  what it steers by, and weights of samples; without practice against the detector of the round before;
* C0 chance: the loop in everything (rounds, samples, first round, weights, the round that is judged) but one:
  each later round's settings are drawn evenly from those that the loop's search can reach from the present
  ones, in place of being chosen, no category has a mix of its own, and no normal picture counts as hard. A
  pick at random from as many such settings as the loop tries is one such setting, so no trials are run;
* D ceiling: ours, and the real anomalies of the pictures that steer, as half of what is drawn;
* few-loop, few-loop-no-…: the loop on four categories, and the same without feedback, weights or the
  frequency family;
* few-loop-cut: the same with `cut` beside the default mix, whose settings vary between shards, for no trial
  makes samples of it; few-loop-cut-practice: that, practising against the detector of the round before, which
  guides `cut`, too;
* few-onenip-loop, few-onenip-loop-feature: the loop of `onenip`, which alone learns from features that a
  generator made, without them and with two kinds of them beside the default mix; the first is few-loop, and
  not measured once more, where --detector is `onenip` at its default settings;
* few-ours, few-loop-half, -third, -sixth: ours in one round of as many samples as all rounds of few-loop
  have together, and the loop with that share of them in as many rounds.

Of the rounds of an arm, that which does best on the pictures that steer is judged; an earlier one of a loop
has fewer samples. All but CPU time for making samples and steering is equal; it is told beside the figures,
but what several cells have in common (samples of a first round, and a detector trained on them) is made, and
counted, in the first of them.

Development is on the feedback split, cross-fitted: its groups are dealt to two folds, one steers (is the
``feedback`` split of the workspace, and the ceiling's), the other judges, both ways round. --final steers by
the whole feedback split and judges on the test split; every such look is noted in test_looks.json beside this
file.

Figures: pixel AP and AUPRO at 256 px, each way round a fold, averaged over both, over seeds, over the
categories of a data set, and over data sets; a category whose judging pictures are of one group has no
interval and is left out. Intervals: paired bootstrap (95 %) over seeds and groups of pictures. Gap closed:
Σ(loop − standard) / Σ(ceiling − standard) over the categories where the interval of ceiling − standard lies
above 0; the others are listed as no gap, those where it lies below 0 once more. Behind: one-sided, Holm over
categories. Fewer samples: those of all rounds of few-ours by those that the loop needs, in all its rounds,
to reach the AUPRO of few-ours, read between its four sizes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from manifests.errors import FlawsmithError, UsageError
from tests.benchmarks import detector_cells, loop_cells, paired
from tests.benchmarks.detector_cells import SIDE, mean_of_data_sets
from tests.benchmarks.detectors import TITLES, note_look, read_case
from tests.benchmarks.loop_cells import METRICS, PARTS, RESAMPLES, Arm, Plan, recipes
from tests.benchmarks.paired import Runs, difference
from tests.benchmarks.peers import run_timed
from tests.benchmarks.pocket_case import described, shown, table
from tests.benchmarks.resumed import open_file, plain, product_code, write_file
from training.intervals import Estimate
from workflows.stages import prepare_process

ROUNDS = 3
# What the arms that are steered by the product set, by section. `earlier` is the default: it is said here so
# that it stands with the figures.
POOLED: dict[str, dict[str, Any]] = {"training": {"earlier": 1.0}}
STEERED: dict[str, dict[str, Any]] = {"training": {**POOLED["training"], "weigh": True}}
PRACTICE: dict[str, dict[str, Any]] = {"generation": {"practice": {"candidates": 4, "guidance": 0.3}}}
UNFED: dict[str, dict[str, Any]] = {"feedback": {"enabled": False}}
FEW_LOOP = Arm("few-loop", rounds=ROUNDS, few=True, settings=STEERED)
FEW_CUT = replace(FEW_LOOP, base="few-cut", beside="cut")
ONENIP: dict[str, dict[str, Any]] = {"detector": {"name": "onenip", "settings": {}}}
FEW_ONENIP = replace(FEW_LOOP, base="few-onenip", settings={**STEERED, **ONENIP})
ARMS = {
    "ours": Arm("ours", samples=ROUNDS),
    "standard": Arm("standard", standard=True, samples=ROUNDS),
    "ceiling": Arm("ours", real=True, samples=ROUNDS),
    "loop": Arm("loop", rounds=ROUNDS, settings=STEERED),
    "chance": Arm("chance", rounds=ROUNDS, chance=True, settings=STEERED),
    "few-ours": Arm("few-ours", few=True, samples=ROUNDS),
    "few-loop": FEW_LOOP,
    "few-loop-half": replace(FEW_LOOP, base="few-half", samples=1 / 2),
    "few-loop-third": replace(FEW_LOOP, base="few-third", samples=1 / 3),
    "few-loop-sixth": replace(FEW_LOOP, base="few-sixth", samples=1 / 6),
    "few-loop-no-feedback": replace(FEW_LOOP, base="few-no-feedback", settings={**STEERED, **UNFED}),
    "few-loop-no-weights": replace(FEW_LOOP, base="few-no-weights", settings=POOLED),
    "few-loop-no-frequency": replace(FEW_LOOP, base="few-no-frequency", without="frequency"),
    "few-loop-cut": FEW_CUT,
    "few-loop-cut-practice": replace(FEW_CUT, base="few-practice", settings={**STEERED, **PRACTICE}),
    "few-onenip-loop": FEW_ONENIP,
    "few-onenip-loop-feature": replace(FEW_ONENIP, base="few-onenip-feature", beside="feature"),
}
EFFICIENCY = ("few-loop-sixth", "few-loop-third", "few-loop-half", "few-loop")
COMPARED = {  # arms on four categories, each with the one that it differs from in one thing
    "few-loop-no-feedback": "few-loop",
    "few-loop-no-weights": "few-loop",
    "few-loop-no-frequency": "few-loop",
    "few-loop-cut": "few-loop",
    "few-loop-cut-practice": "few-loop-cut",
    "few-onenip-loop-feature": "few-onenip-loop",
}
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
        "code": product_code(loop_cells, detector_cells),
        "final": plan.final,
    }


def workplace(folder: Path, own: Mapping[str, Any]) -> Path:
    """Where cells of this identity work: what others left behind is never gone on with."""
    named = folder / hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
    named.mkdir(parents=True, exist_ok=True)
    return named


def told_arm(name: str) -> dict[str, Any]:
    """An arm's definition, as the file of figures keeps it."""
    return json.loads(json.dumps(asdict(ARMS[name])))


def check_arms(path: Path, result: Mapping[str, Any]) -> None:
    """
    Raises:
        UsageError: the file holds cells of an arm that is now defined otherwise.
    """
    if other := [name for name, own in result["arms"].items() if name in ARMS and own != told_arm(name)]:
        raise UsageError(
            f"{path} holds cells of other arms of the name {', '.join(other)}: name another file"
        )


def key(seed: int, part: int) -> str:
    return f"seed {seed}, {PARTS[part]}"


def measure(arguments: argparse.Namespace, name: str, seed: int, part: int) -> dict[str, Any]:
    """One cell, in a process of its own, and the minutes of CPU time that it and all its workers took."""
    module = [sys.executable, "-m", "tests.benchmarks.loop", "--cell", name, "--seeds", str(seed)]
    given = ["--part", str(part), "--data", arguments.data, "--json", arguments.json, *passed_on(arguments)]
    before = children_seconds()
    found = run_timed([*module, *given], 1)
    return {**plain(found), "cpu_minutes": (children_seconds() - before) / 60}


def passed_on(arguments: argparse.Namespace) -> list[str]:
    given = ["--detector", arguments.detector, "--samples", str(arguments.samples)]
    given += ["--settings", json.dumps(arguments.settings)]
    return [*given, *(["--final"] if arguments.final else [])]


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


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
            np.array([one[c]["groups"] for one in rows[0]]),
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
            cells.append(told(mean(plan, known[name], metric)))
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


def verdicts(plan: Plan, known: Mapping[str, Figures]) -> list[str]:
    """Gap closed, and where the loop is behind; a line a metric and question."""
    lines = []
    for metric in METRICS:
        if all(name in known for name in ("standard", "loop", "ceiling")):
            low, arm, high = (known[name][metric] for name in ("standard", "loop", "ceiling"))
            ratio, without = paired.gap_closed(low, arm, high)
            by_sets, _ = paired.gap_closed(low, arm, high, {c: plan.case.data_set(c) for c in low})
            below = [c for c in without if paired.above_zero(difference(low[c], high[c]))]
            lines.append(
                f"{TITLES[metric]}: gap closed {told(ratio)}, each data set once {told(by_sets)}; no gap: "
                f"{', '.join(without) or 'none'}; below standard: ceiling in {', '.join(below) or 'none'}"
            )
        for other in ("standard", "chance"):
            if "loop" in known and other in known:
                pairs = {c: (known["loop"][metric][c], known[other][metric][c]) for c in known[other][metric]}
                late = paired.behind({c: difference(*pair) for c, pair in pairs.items()})
                lines.append(
                    f"{TITLES[metric]}: significantly behind {other}: {', '.join(late) or 'nowhere'}"
                )
    return lines


def counterpart(plan: Plan, name: str) -> str:
    """The arm whose cells tell what an arm of four categories differs from; "" for one that stands alone."""
    other = COMPARED.get(name, "")
    return "few-loop" if repeated(plan.detector, plan.settings, other) else other


def repeated(detector: str, settings: Mapping[str, Any], name: str) -> bool:
    """Whether an arm is few-loop once more: same seeds, same bytes."""
    return name == "few-onenip-loop" and {"name": detector, "settings": dict(settings)} == ONENIP["detector"]


def few_table(plan: Plan, known: Mapping[str, Figures]) -> Table:
    """The loop on four categories with one thing changed, each with its lead over the arm that it changes."""
    rows = table("four categories: the loop, and what a part of it brings", "arm", "over")
    for metric in METRICS:
        rows.add_column(TITLES[metric])
        rows.add_column("lead")
    others = {name: counterpart(plan, name) for name in COMPARED}
    wholes = [name for name in dict.fromkeys(others.values()) if name not in COMPARED]
    for name in (*wholes, *COMPARED):
        whole = others.get(name, "")
        figures = []
        for metric in METRICS:
            figures.append(told(mean(plan, known[name], metric)) if name in known else "–")
            both = name in known and whole in known
            figures.append(signed(lead(plan, known[name], known[whole], metric)) if both else "")
        rows.add_row(name, whole, *figures)
    return rows


def mean(plan: Plan, own: Figures, metric: str) -> Estimate:
    """Over data sets."""
    return mean_of_data_sets(own[metric], {c: plan.case.data_set(c) for c in own[metric]})


def samples_in_all(plan: Plan, name: str) -> int:
    """Recipes of all rounds of an arm together."""
    arm = ARMS[name]
    return arm.rounds * recipes(plan, arm)


def efficiency_table(plan: Plan, known: Mapping[str, Figures]) -> Table:
    rows = table(
        "four categories: samples in all rounds of a run", "arm", "samples", *(TITLES[m] for m in METRICS)
    )
    for name in (*EFFICIENCY, "few-ours"):
        own = [told(mean(plan, known[name], m)) if name in known else "–" for m in METRICS]
        rows.add_row(name, str(samples_in_all(plan, name)), *own)
    return rows


def efficiency(plan: Plan, known: Mapping[str, Figures]) -> str:
    """How many times fewer samples, in all rounds, the loop needs to reach the AUPRO of ``few-ours``."""
    if any(name not in known for name in (*EFFICIENCY, "few-ours")):
        return "samples needed: missing"
    counts = [samples_in_all(plan, name) for name in EFFICIENCY]
    curve = [mean(plan, known[name], "aupro") for name in EFFICIENCY]
    times = paired.fewer_samples(counts, curve, mean(plan, known["few-ours"], "aupro"))
    return (
        f"samples of few-ours by those that the loop needs for its AUPRO: {shown(described(times), '.1f')} "
        f"(0: not reached with as many; at most {counts[-1] / counts[0]:.1f}, the smallest loop measured)"
    )


def show(plan: Plan, result: Mapping[str, Any], seeds: Sequence[int], console: Console) -> None:
    found = {name: estimates(plan, result, name, seeds) for name in ARMS}
    known = {name: own for name, own in found.items() if own is not None}
    console.print(means_table(plan, known, result))
    if any(name in known for name in MAIN):
        for metric in METRICS:
            console.print(category_table(plan, known, metric))
    for line in verdicts(plan, known):
        console.print(line, highlight=False)
    console.print(few_table(plan, known))
    console.print(efficiency_table(plan, known))
    console.print(efficiency(plan, known), highlight=False)
    for name in ARMS:
        if repeated(plan.detector, plan.settings, name):
            continue
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
        own = identity(plan)
        plan = replace(plan, case=replace(case, work=workplace(work, own)))
        if arguments.cell:
            prepare_process()
            torch.set_num_threads(1)
            with loop_cells.own_worker() as cluster:
                plan = replace(plan, cluster=cluster)
                found = loop_cells.measure(plan, ARMS[arguments.cell], arguments.seeds[0], arguments.part)
            print(json.dumps(found))
            return 0
        result = open_file(arguments.json, own, arms={}, cells={})
        check_arms(arguments.json, result)
    except FlawsmithError as error:
        console.print(str(error), style="bold", markup=False)
        return 2
    failed = False
    for seed in arguments.seeds:
        for name in arguments.arms:
            if repeated(plan.detector, plan.settings, name):
                continue
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
                result["arms"][name] = told_arm(name)
                result["cells"].setdefault(name, {})[key(seed, part)] = found
                write_file(arguments.json, result)
                console.print(f"{name}, {key(seed, part)}: {found['cpu_minutes']:.1f} min", highlight=False)
    show(plan, result, arguments.seeds, console)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
