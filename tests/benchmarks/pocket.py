"""What the small models can do on real pictures, and which way of composing their anomalies is best.

    python -m tests.benchmarks.pocket --data DIR --json FILE
    python -m tests.benchmarks.pocket --data DIR --json FILE --only clip acceptance --pictures 12
    python -m tests.benchmarks.pocket --data DIR --json FILE --only --sheets FOLDER

DIR holds categories in the layout of MVTec AD, at any depth. Parts: ``autoencoder``, ``clip``, ``attention``,
``acceptance``, ``composition``, ``usefulness`` (of the samples of ``composition``, by the proxy of a run).
FILE is written after every unit of a part, mostly a category: the same command goes on where it was stopped,
and what is there is kept. ``--sheets`` writes source, anomaly, mask, both twins, their difference and the
word's attention, for a person to judge. The sheets, and ``FILE.samples/`` beside FILE, hold pictures derived
from those of DIR: keep them out of the repository.

Real defects: only the feedback split is looked at; ``--final`` judges CLIP on the test split as well.
Intervals are bootstrap ones (95 %) over samples within their category, or over groups of pictures.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from generation.cut import generator as cut
from generation.cut.checkpoints import POCKET
from manifests.errors import FlawsmithError, UsageError
from manifests.sources import SourceSettings, scan
from tests.benchmarks.pocket_case import Case, Part
from tests.benchmarks.pocket_models import MODEL_PARTS
from tests.benchmarks.pocket_samples import SAMPLE_PARTS, write_sheet
from tests.benchmarks.pocket_usefulness import USE_PARTS
from tests.benchmarks.resumed import open_file, plain, write_file
from workflows.stages import prepare_process

PARTS: dict[str, Part] = {**MODEL_PARTS, **SAMPLE_PARTS, **USE_PARTS}
TILES = r"([^/]+?)(?:_r\d+c\d+|_\d)\.\w+$"  # name_r0c1.png, name_2.png: tiles of one photograph


def read_case(arguments: argparse.Namespace) -> Case:
    """The pictures, once read, and what to measure them with."""
    source = SourceSettings(path=str(arguments.data), layout="mvtec", group=arguments.group)
    found = scan([source])
    if found.fatal:
        raise UsageError("\n".join(f"{p.path}: {p.what}; {p.remedy}" for p in found.problems))
    chosen = arguments.categories or sorted({image.category for image in found.images})
    images = [image for image in found.images if image.category in chosen]
    if unknown := set(chosen) - {image.category for image in images}:
        raise UsageError(f"--categories: {', '.join(sorted(unknown))} not found in {arguments.data}")
    given = {"model": arguments.model, "clip": arguments.clip, "judge": arguments.clip}
    params = {**given, **arguments.params}
    samples = arguments.json.with_name(f"{arguments.json.name}.samples")
    return Case(source, images, params, arguments.pictures, arguments.seed, arguments.final, samples)


def identity(case: Case) -> dict[str, Any]:
    """What the figures of one file have in common."""
    named = {key: value for key, value in case.params.items() if key not in ("model", "clip", "judge")}
    return {
        "models": cut.identify(case.params),
        "params": named,
        "seed": case.seed,
        "final": case.final,
        "group": case.source.group,
    }


def measure(case: Case, name: str, result: dict[str, Any], path: Path, console: Console) -> None:
    """The units of a part that are not there, then its summary."""
    part = PARTS[name]
    stored = result["parts"].setdefault(name, {"units": {}})
    other = {unit["measuring"]["pictures"] for unit in stored["units"].values()} - {case.pictures}
    if other:
        console.print(f"{name}: what is there was measured with --pictures {other.pop() or '(default)'}")
    for unit in part.units(case):
        if unit in stored["units"]:
            continue
        started = time.perf_counter()
        figures = part.measure(case, unit)
        seconds = time.perf_counter() - started
        stored["units"][unit] = {
            **plain(figures),
            "measuring": {"seconds": round(seconds, 2), "pictures": case.pictures, "threads": threads()},
        }
        write_file(path, result)
        console.print(f"{name}: {unit}, {seconds:.0f} s", highlight=False)
    if stored["units"]:
        stored["summary"] = plain(part.summary(stored["units"]))
        write_file(path, result)


def threads() -> int:
    return torch.get_num_threads()


def missing(case: Case, name: str, result: dict[str, Any]) -> list[str]:
    """Units of a part that are not measured."""
    there = result["parts"].get(name, {"units": {}})["units"]
    return [unit for unit in PARTS[name].units(case) if unit not in there]


def show(case: Case, result: dict[str, Any], console: Console) -> None:
    for name in PARTS:
        summary = result["parts"].get(name, {}).get("summary")
        for table in PARTS[name].tables(summary) if summary else ():
            console.print(table)
        if units := missing(case, name, result):
            rest = f" for {', '.join(units)}" if summary else ""
            console.print(f"[bold]{name}: missing{rest}[/bold]")


def arguments_of(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.pocket",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of categories in MVTec layout")
    parser.add_argument("--json", type=Path, required=True, help="all figures; goes on from what is there")
    parser.add_argument("--model", default=POCKET, help="checkpoint (default %(default)s)")
    parser.add_argument("--clip", default=POCKET, help="CLIP that guides and judges (default %(default)s)")
    parser.add_argument("--params", type=json.loads, default={}, help="other settings of cut, as JSON")
    parser.add_argument("--pictures", type=int, help="or recipes a unit, in place of each part's own number")
    parser.add_argument("--categories", nargs="+", help="only these")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), help="parts (default: all)")
    parser.add_argument("--sheets", type=Path, help="folder for a sheet of pictures a category")
    parser.add_argument("--group", default=TILES, help="which pictures belong together (default: tiles)")
    parser.add_argument("--final", action="store_true", help="judge CLIP on the test split too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="compute threads (default %(default)s)")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    arguments = arguments_of(given)
    prepare_process(arguments.threads)
    torch.set_num_threads(arguments.threads)
    console = Console(width=max(Console().width, 190))
    try:
        case = read_case(arguments)
        result = open_file(arguments.json, identity(case), parts={})
    except FlawsmithError as error:
        console.print(str(error), style="bold", markup=False)
        return 2
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    chosen = list(PARTS) if arguments.only is None else arguments.only
    failed = False
    for name in [name for name in PARTS if name in chosen]:
        try:
            measure(case, name, result, arguments.json, console)
        except FlawsmithError as error:
            failed = True
            console.print(f"{name}: {error}", style="bold", markup=False)
    for category in case.categories if arguments.sheets else ():
        console.print(str(write_sheet(case, category, arguments.sheets)), markup=False)
    show(case, result, console)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
