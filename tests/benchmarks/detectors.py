"""Detectors on real defects: ours on their own papers' synthesis and on our mix, and anomalib's beside them.

    python -m tests.benchmarks.detectors --data DIR --json FILE
    python -m tests.benchmarks.detectors --data DIR --json FILE --arms onenip-mix anomalib-padim --seeds 0

DIR holds data sets: folders of categories in the layout of MVTec AD; DIR/textures, if it is there, textures.
A cell is an arm trained with one seed, in a process of its own. FILE is written after every cell: the same
command goes on where it was stopped, and what is not measured is printed as missing. So are, as stale, cells
of samples whose settings were others, of other shots, or of another share of patches than those of the arm
now: take them out of FILE, and they are measured again. FILE.work/ keeps the synthetic data sets, made once a
synthesis and seed; what that took is reported apart from the training. It holds pictures derived from those
of DIR: keep it out of the repository.

The same for every arm: pictures, split, one compute thread, and metrics at 256 px (maps bilinear, masks by
nearest neighbour); all train one model on all categories, but for anomalib's PatchCore and PaDiM, which fit
one a category; ours see the pictures at their own input size, anomalib's at 256 px. Training aims at
--minutes of CPU time in all, so that other work on the machine shortens none; what learns by steps takes as
many as fit by the pace of the first few (the pace may change: `fit s` says what it came to), but `residual`
its default of 600 (some 2,000 fit, by which it would know these few samples by heart); closed-form methods
take what they need. An epoch is as many draws as there are samples (of anomalib's models: a pass over their
pictures), of closed-form methods the whole fit. Seconds a picture are wall-clock: read them from a quiet
machine. anomalib's models have the weights of our backbone, DRAEM none.

Judged on the feedback split; --final judges on the test split, for the last time: every such look is noted in
test_looks.json beside this file. Means: over the categories of a data set first, then over data sets.
Intervals: bootstrap (95 %) over groups of pictures, of the mean over seeds; ± is the deviation over seeds.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from detectors import protocol
from manifests.errors import FlawsmithError, UsageError
from manifests.sources import SourceSettings, scan
from tests.benchmarks import detector_cells
from tests.benchmarks.detector_cells import (
    CORESET,
    METRICS,
    SIDE,
    THREADS,
    Arm,
    Case,
    epoch_seconds,
    make,
    round_of,
    synthesis_digest,
)
from tests.benchmarks.paired import difference
from tests.benchmarks.peers import run_timed
from tests.benchmarks.pocket_case import described, shown, table
from tests.benchmarks.resumed import open_file, plain, product_code, write_file
from training.intervals import Estimate
from workflows.stages import prepare_process

ARMS = {
    "onenip-own": Arm("onenip", "onenip"),
    "onenip-mix": Arm("onenip", "mix"),
    "dfd-own": Arm("dfd", "dfd"),
    "dfd-mix": Arm("dfd", "mix"),
    **{
        f"dfd-{name}-{shots}shot": Arm("dfd", synthesis, shots=shots)
        for shots in (1, 2, 4, 8)
        for name, synthesis in (("own", "dfd"), ("mix", "mix"))
    },
    "vlad-own": Arm("vlad", "cut"),
    "vlad-mix": Arm("vlad", "mix"),
    "residual-mix": Arm("residual", "mix", steps=600),
    "memory_bank": Arm("memory_bank"),
    "anomalib-patchcore": Arm("patchcore", peer=True),
    "anomalib-padim": Arm("padim", peer=True),
    "anomalib-supersimplenet-own": Arm("supersimplenet", peer=True),
    "anomalib-supersimplenet-mix": Arm("supersimplenet", "mix", peer=True),
    "anomalib-draem-own": Arm("draem", peer=True, most=2),
    "anomalib-draem-mix": Arm("draem", "mix", peer=True, most=2),
}
PAIRS = (  # of arms that are compared, the first with the second
    ("residual-mix", "anomalib-patchcore"),
    ("residual-mix", "anomalib-padim"),
    ("residual-mix", "memory_bank"),
    ("onenip-mix", "onenip-own"),
    ("dfd-mix", "dfd-own"),
    *((f"dfd-mix-{shots}shot", f"dfd-own-{shots}shot") for shots in (1, 2, 4, 8)),
)
SEEDS = (0, 1, 2)
SHOT_SEEDS = (0, 1, 2, 3, 4)  # of arms of few shots, which the draw of the shots decides too
MINUTES = 5.0
STALE = {
    "synthesis": "stale, samples of other settings",
    "shots": "stale, other shots",
    "coreset": "stale, another share of patches",
}
UNKNOWN = {
    "synthesis": "settings of samples not known",
    "shots": "of the old draw of shots",
    "coreset": "share of patches not known",
}
LOOKS = Path(__file__).with_name("test_looks.json")
GROUPS = r"([^/]+?)(?:_r\d+c\d+|_\d)\.\w+$"  # name_r0c1.png, name_2.png: tiles of one photograph
TITLES = {"pixel_ap": "pixel AP", "aupro": "AUPRO (0.3)", "image_auroc": "image AUROC"}


def read_case(data: Path, work: Path, split: str, minutes: float) -> Case:
    found = scan([SourceSettings(path=str(data.resolve()), layout="mvtec", group=GROUPS)])
    if found.fatal:
        raise UsageError("\n".join(f"{p.path}: {p.what}; {p.remedy}" for p in found.problems))
    return Case(data.resolve(), found.images, work, split, minutes)


def identity(case: Case) -> dict[str, Any]:
    """What the cells of one file have in common."""
    placed = sorted(f"{image.image_id} {image.split} {image.group}" for image in case.images)
    return {
        "pictures": hashlib.sha256("\n".join(placed).encode()).hexdigest()[:16],
        "minutes": case.minutes,
        "threads": THREADS,
        "side": SIDE,
        "samples_a_category": detector_cells.SAMPLES,
        "torch": torch.__version__,
    }


def seeds_of(arm: Arm, given: Sequence[int] | None) -> tuple[int, ...]:
    """Those that were asked for, or an arm's own."""
    if given is not None:
        return tuple(given)
    return SEEDS if arm.shots is None else SHOT_SEEDS


def registered(arm: Arm) -> bool:
    return arm.peer or arm.detector in protocol.names()


def note_look(arm: str, seed: int) -> None:
    """Before a cell is judged on the test split: which, and when."""
    looks = json.loads(LOOKS.read_text()) if LOOKS.exists() else []
    when = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_file(LOOKS, [*looks, {"when": when, "arm": arm, "seed": seed}])


def measure(case: Case, name: str, seed: int, result: dict[str, Any], path: Path, console: Console) -> None:
    """One cell that is not there: its samples, then the cell in a process of its own."""
    arm = ARMS[name]
    if arm.synthesis is not None:
        shots = f", {arm.shots} shots" if arm.shots else ""
        result["synthesis"][f"{arm.synthesis}{shots}, seed {seed}"] = make(case, arm, seed)
        write_file(path, result)
    if case.split == "test":
        note_look(name, seed)
    started = time.perf_counter()
    module = [sys.executable, "-m", "tests.benchmarks.detectors", "--cell", name, "--seeds", str(seed)]
    place = ["--data", case.data, "--json", path, "--minutes", str(case.minutes)]
    found = run_timed([*module, *place, *(["--final"] if case.split == "test" else [])], THREADS)
    seconds = time.perf_counter() - started
    cells = result["cells"].setdefault(case.split, {})
    cells.setdefault(name, {})[str(seed)] = {
        **plain(found),
        "cell_seconds": seconds,
        "code": product_code(detector_cells),
        **made_of(case, arm, seed),
    }
    write_file(path, result)
    console.print(f"{name}, seed {seed}: {seconds:.0f} s", highlight=False)


def made_of(case: Case, arm: Arm, seed: int) -> dict[str, Any]:
    """What a cell is of beside the code: its samples' settings as a digest, the few shots' pictures, and the
    share of patches that PatchCore keeps."""
    found: dict[str, Any] = {}
    if arm.synthesis is not None:
        found["synthesis"] = synthesis_digest(round_of(case, arm, seed))
    if arm.shots is not None:
        found["shots"] = case.shots(arm, seed)
    if arm.detector == "patchcore":
        found["coreset"] = CORESET
    return found


def notes_of(case: Case, name: str, cells: Mapping[str, dict[str, Any]]) -> list[str]:
    """Which cells of an arm are of others of these than it has now, or of which nobody knows."""
    found: dict[str, list[str]] = {}
    for seed, cell in cells.items():
        now = made_of(case, ARMS[name], int(seed))
        for key, value in now.items():
            if cell.get(key) != value:
                found.setdefault((STALE if key in cell else UNKNOWN)[key], []).append(seed)
    return [f"{what}: seed {', '.join(seeds)}" for what, seeds in found.items()]


# -- tables ---------------------------------------------------------------------------------------------


def over_seeds(cells: Sequence[dict[str, Any]], metric: str) -> str:
    """ "0.512 [0.401, 0.607] ±0.012": mean over seeds, its interval over groups, deviation over seeds."""
    found = mean_over_seeds(cells, metric)
    if found is None:
        return "–"
    values = [cell["means"][metric]["mean"] for cell in cells]
    text = shown(described(found))
    return f"{text} ±{np.std(values, ddof=1):.3f}" if len(values) > 1 else text


def mean_over_seeds(cells: Sequence[dict[str, Any]], metric: str) -> Estimate | None:
    """Its resamples are of the same groups in every arm, so that two may be subtracted; None if a cell lacks
    the figure."""
    means = [cell["means"][metric] for cell in cells]
    if not means or any(mean["mean"] is None for mean in means):
        return None
    resamples = np.mean([np.array(mean["resamples"], np.float64) for mean in means], axis=0)
    return Estimate(float(np.mean([mean["mean"] for mean in means])), resamples)


def leads_table(case: Case, result: dict[str, Any], seeds: Sequence[int] | None) -> Table:
    """How far the first arm of each pair is above the second, over the seeds that both have."""
    own = dict(each_arm(case, result, seeds))
    rows = table(f"leads, {case.split} split, paired", "arm", "over", *TITLES.values(), "seeds")
    for first, second in PAIRS:
        shared = sorted(own[first].keys() & own[second].keys(), key=int)
        cells = []
        for metric in TITLES:
            of = [mean_over_seeds([own[arm][seed] for seed in shared], metric) for arm in (first, second)]
            known = [one for one in of if one is not None]
            cells.append(shown(described(difference(*known)), "+.3f") if len(known) == 2 else "–")
        rows.add_row(first, second, *cells, ", ".join(shared) or "missing")
    return rows


def why_missing(name: str, seeds: Sequence[int]) -> str:
    if not registered(ARMS[name]):
        return f"missing: no detector {ARMS[name].detector} is registered"
    return f"missing: seed {', '.join(map(str, seeds))}"


def means_table(case: Case, result: dict[str, Any], seeds: Sequence[int] | None) -> Table:
    data_sets = {case.data_set(category) for category in case.categories}
    title = (
        f"detectors on the {case.split} split: {len(case.categories)} categories of {len(data_sets)} data "
        f"sets, {case.minutes:g} min of training on one thread, metrics at {SIDE} px"
    )
    cost = ("fit s", "steps", "ms a step", "s an epoch", "ms a picture", "peak MB", "input px", "samples")
    rows = table(title, "arm", *(TITLES[metric] for metric in METRICS), *cost, "")
    for name, cells in each_arm(case, result, seeds):
        missing = [seed for seed in seeds_of(ARMS[name], seeds) if str(seed) not in cells]
        notes = [why_missing(name, missing)] if missing else []
        if not cells:
            rows.add_row(name, *["–"] * (len(METRICS) + len(cost)), *notes)
            continue
        own = [with_epoch(name, cell) for cell in cells.values()]
        if ARMS[name].most is not None:
            notes.append(f"{', '.join(own[0]['categories'])} alone")
        notes += notes_of(case, name, cells)
        figures = [over_seeds(own, metric) for metric in METRICS]
        rows.add_row(
            name,
            *figures,
            middle(own, "fit_seconds", 1, ".0f"),
            middle(own, "steps", 1, ".0f"),
            middle(own, "step_seconds", 1e3, ".0f"),
            middle(own, "epoch_seconds", 1, ".0f"),
            middle(own, "picture_seconds", 1e3, ".1f"),
            middle(own, "peak_bytes", 1e-6, ".0f"),
            middle(own, "input", 1, ".0f"),
            middle(own, "samples", 1, ".0f"),
            "; ".join(notes),
        )
    return rows


def with_epoch(name: str, cell: dict[str, Any]) -> dict[str, Any]:
    """A cell that knows what an epoch takes. Earlier ones of ours do not: their batch was the default, which
    has been one number ever since."""
    if "epoch_seconds" in cell:
        return cell
    batch = protocol.get(ARMS[name].detector).settings().batch
    spent = epoch_seconds(cell["fit_seconds"], cell["step_seconds"], cell["samples"], batch)
    return {**cell, "epoch_seconds": spent}


def each_arm(
    case: Case, result: dict[str, Any], seeds: Sequence[int] | None
) -> list[tuple[str, dict[str, dict[str, Any]]]]:
    stored = result["cells"].get(case.split, {})
    found = []
    for name, arm in ARMS.items():
        own = stored.get(name, {})
        found.append((name, {str(s): own[str(s)] for s in seeds_of(arm, seeds) if str(s) in own}))
    return found


def middle(cells: Sequence[dict[str, Any]], key: str, unit: float, form: str) -> str:
    values = [cell[key] for cell in cells]
    return "–" if None in values else f"{unit * float(np.median(values)):{form}}"


def category_table(case: Case, result: dict[str, Any], seeds: Sequence[int] | None, metric: str) -> Table:
    rows = table(f"{TITLES[metric]}, {case.split} split, mean over seeds", "arm", *case.categories)
    for name, cells in each_arm(case, result, seeds):
        if not cells:
            continue
        shown_: list[str] = []
        for category in case.categories:
            found = [cell["categories"].get(category, {}).get(metric) for cell in cells.values()]
            known = [one["mean"] for one in found if one is not None and one["mean"] is not None]
            shown_.append(f"{np.mean(known):.3f}" if known else "–")
        rows.add_row(name, *shown_)
    return rows


def synthesis_table(result: dict[str, Any]) -> Table:
    rows = table("synthetic data sets, CPU time", "synthesis", "accepted", "recipes", "s", "ms a recipe")
    for name, made in sorted(result["synthesis"].items()):
        pace = 1e3 * made["seconds"] / made["recipes"]
        counts = (str(made["accepted"]), str(made["recipes"]))
        rows.add_row(name, *counts, f"{made['seconds']:.0f}", f"{pace:.1f}")
    return rows


def show(case: Case, result: dict[str, Any], seeds: Sequence[int] | None, console: Console) -> None:
    console.print(means_table(case, result, seeds))
    console.print(leads_table(case, result, seeds))
    for metric in METRICS:
        console.print(category_table(case, result, seeds, metric))
    if result["synthesis"]:
        console.print(synthesis_table(result))


# -- the command ----------------------------------------------------------------------------------------


def arguments_of(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.detectors",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of data sets")
    parser.add_argument("--json", type=Path, required=True, help="all figures; goes on from what is there")
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS), help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2, of few shots 0 to 4")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of training a cell (default 5)")
    parser.add_argument("--final", action="store_true", help="judge on the test split, and note it")
    parser.add_argument("--cell", choices=list(ARMS), help=argparse.SUPPRESS)  # one cell, as JSON
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    arguments = arguments_of(given)
    console = Console(width=max(Console().width, 260))
    work = arguments.json.with_name(f"{arguments.json.name}.work").resolve()
    work.mkdir(parents=True, exist_ok=True)
    try:
        split = "test" if arguments.final else "feedback"
        case = read_case(arguments.data, work, split, arguments.minutes)
        if arguments.cell:
            prepare_process(THREADS)
            torch.set_num_threads(THREADS)
            found = detector_cells.measure(case, ARMS[arguments.cell], arguments.seeds[0])
            print(json.dumps(found))
            return 0
        result = open_file(arguments.json, identity(case), synthesis={}, cells={})
    except FlawsmithError as error:
        console.print(str(error), style="bold", markup=False)
        return 2
    prepare_process()
    # Threads that wait shall sleep: spinning would count as work, and stalls beside other work.
    os.environ["OMP_WAIT_POLICY"] = "passive"
    failed = False
    for seed in arguments.seeds or SHOT_SEEDS:
        for name in arguments.arms:
            there = result["cells"].get(split, {}).get(name, {})
            wanted = seed in seeds_of(ARMS[name], arguments.seeds)
            if str(seed) in there or not wanted or not registered(ARMS[name]):
                continue
            try:
                measure(case, name, seed, result, arguments.json, console)
            except (FlawsmithError, RuntimeError) as error:
                failed = True
                console.print(f"{name}, seed {seed}: {error}", style="bold", markup=False)
    show(case, result, arguments.seeds, console)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
