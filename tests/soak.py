"""Faults on end: whatever strikes a run, the same command again makes what nobody disturbed.

    python -m tests.soak [--faults 100] [--seed 0] [--long] [--json FILE]

Scenes are drawn from consecutive seeds, by turns in a folder and on an S3 server of this process. A scene is
a small workspace and :data:`BATCH` faults, each injected into a run of its own (``tests.soak_faults``); then
the run is started until it ends, and the workspace is checked:

- the bytes of shards and recipes are those of an undisturbed run, and so are the rows of their tables but for
  the seconds. Excused are samples whose row says a smaller batch, and those that a misbehaving generator or a
  poisoned picture made fail, with its reason; the other samples of their shards are not;
- every recipe has exactly one outcome;
- ``verify`` finds nothing damaged and nothing that belongs to no shard;
- the lock is free.

A seed replays what was drawn; when exactly a fault strikes is up to the machine.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from manifests.lock import CLOCK, LOCK
from manifests.shards import unpack
from manifests.workspace import part
from tests.soak_faults import OK, SHARDS, Bench, Scene, bench, ended, kinds, workspace
from tests.test_pipeline import contents, samples
from workflows import rounds
from workflows.console import console
from workflows.upkeep import verify

FAULTS = 100
BATCH = 3  # faults a scene
STARTS = 3  # of the undisturbed command, the most that may be needed
STORES = ("folder", "s3")
MEASURED = ("seconds",)  # columns that differ from run to run


class Violation(AssertionError):
    """A property that does not hold, of a scene and its faults so far."""

    def __init__(self, seed: int, done: Sequence[str], what: object) -> None:
        super().__init__(
            f"after {', '.join(done)}: {what}\nagain: python -m tests.soak --seed {seed} --faults {BATCH}"
        )


@dataclass
class Tally:
    injected: int = 0
    survived: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Reference:
    """What an undisturbed run left: bytes by name, rows of samples, and recipes in order."""

    files: dict[str, Any]
    rows: list[dict[str, Any]]
    planned: list[str]


def reference(tools: Bench) -> Reference:
    scene = Scene(tools, workspace(tools, "folder", "undisturbed"), random.Random(0))
    ended(scene.start(servers=True), OK)
    round_ = rounds.open_round(scene.space, 0)
    planned = [recipe.sample_id for shard in range(SHARDS) for recipe in round_.plan(shard)]
    return Reference(contents(scene.space), samples(scene.space), planned)


# -- one scene ------------------------------------------------------------------------------------------


def drawn(tools: Bench, seed: int) -> tuple[str, list[str]]:
    """The store of a scene and the kinds of its faults. Scenes of one store deal them like cards: all come
    before any comes again."""
    store = STORES[seed % len(STORES)]
    names = list(kinds(tools, store))
    first = seed // len(STORES) * BATCH
    dealt = [
        random.Random(at // len(names)).sample(names, len(names))[at % len(names)]
        for at in range(first, first + BATCH)
    ]
    return store, dealt


def play(
    tools: Bench,
    seed: int,
    store: str,
    names: Sequence[str],
    undisturbed: Reference,
    tallies: dict[str, Tally],
) -> None:
    """Injects faults into one workspace and judges what is left.

    Raises:
        Violation: a property that does not hold.
    """
    scene = Scene(tools, workspace(tools, store, f"scene-{seed}"), random.Random(seed))
    done: list[str] = []
    try:
        for name in names:
            done.append(name)
            tally = tallies.setdefault(name, Tally())
            make_room(scene)
            began = time.perf_counter()
            tally.injected += 1
            kinds(tools, store)[name](scene)
            tally.seconds += time.perf_counter() - began
        finish(scene)
        check(scene, undisturbed)
    except Exception as error:
        raise Violation(seed, done, str(error) or repr(error)) from error
    for name in names:
        tallies[name].survived += 1
    scene.space.fs.rm(scene.space.path(""), recursive=True)


def make_room(scene: Scene) -> None:
    """Takes shards away, so that the next fault strikes in the middle of a run."""
    there = scene.finished()
    for shard in scene.rng.sample(there, max(0, len(there) - SHARDS // 3)):
        scene.space.remove(part("samples", 0, shard, "parquet"))


def finish(scene: Scene) -> None:
    """The same command until it ends well."""
    for _ in range(STARTS):
        run = scene.start(servers=True)
        text, _ = run.communicate(timeout=180)
        if run.returncode == OK:
            return
    raise AssertionError(f"{STARTS} starts after the last fault the run still fails: {text[-2000:]}")


# -- what must hold -------------------------------------------------------------------------------------


def check(scene: Scene, undisturbed: Reference) -> None:
    """Raises:
    AssertionError: it names the first property that does not hold.
    """
    space = scene.space
    assert not {LOCK, CLOCK} & set(space.names("")), "the lock was not released"
    with space.writing():  # or of the kernel
        pass
    findings = [f"{finding.path}: {finding.what}" for finding in verify(space)]
    assert not findings, f"verify finds {findings}"
    orphans = [name for name in space.fs.find(space.path("")) if name.endswith(".part")]
    assert not orphans, f"orphans are left: {orphans}"
    rows = samples(space)
    assert [row["sample_id"] for row in rows] == undisturbed.planned, "a recipe has not exactly one outcome"
    same_samples(scene, contents(space), rows, undisturbed)


def same_samples(
    scene: Scene, files: dict[str, Any], rows: list[dict[str, Any]], undisturbed: Reference
) -> None:
    excused: dict[int, set[str]] = {}
    for row, expected in zip(rows, undisturbed.rows, strict=True):
        smaller = scene.smaller and '"batch":' in row["measures"]
        failed = row["status"] == "failed" and any(reason in row["reason"] for reason in scene.excused)
        if smaller or failed:
            excused.setdefault(row["shard"], set()).add(row["sample_id"])
        else:
            differ = [
                name for name in row if name not in (*MEASURED, "offset") and row[name] != expected[name]
            ]
            told = {name: (row[name], expected[name]) for name in differ}
            assert not differ, f"sample {row['sample_id']} differs (found, undisturbed): {told}"
    assert files.keys() == undisturbed.files.keys(), "there are files that an undisturbed run does not leave"
    for name, data in files.items():
        shard = int(re.findall(r"part-(\d+)", name)[0])
        if shard not in excused or name.startswith("recipes"):
            assert data == undisturbed.files[name], f"{name} differs from the undisturbed run's"
        elif name.startswith("shards"):
            found, expected = (dict(unpack(tar, name)) for tar in (data, undisturbed.files[name]))
            for key in expected.keys() - excused[shard]:
                assert found.get(key) == expected[key], f"{name}: sample {key} differs"


# -- many -----------------------------------------------------------------------------------------------


def soak(folder: Path, count: int, seed: int, *, long: bool, tallies: dict[str, Tally]) -> None:
    """Scenes from ``seed`` on until ``count`` faults are injected; fills ``tallies`` by kind.

    Raises:
        Violation: the first property that does not hold.
    """
    with bench(folder, long=long) as tools:
        undisturbed = reference(tools)
        while sum(tally.injected for tally in tallies.values()) < count:
            store, names = drawn(tools, seed)
            began = time.perf_counter()
            play(tools, seed, store, names, undisturbed, tallies)
            print(
                f"seed {seed}, {store}: {', '.join(names)}: {time.perf_counter() - began:.0f} s", flush=True
            )
            seed += 1


def show(tallies: dict[str, Tally]) -> None:
    table = Table(title="injected faults", show_footer=True)
    total = Tally(*(sum(getattr(t, name) for t in tallies.values()) for name in vars(Tally())))
    table.add_column("kind", "all")
    for name, value in vars(total).items():
        table.add_column(name, f"{value:.0f}", justify="right")
    for kind, tally in sorted(tallies.items()):
        table.add_row(kind, str(tally.injected), str(tally.survived), f"{tally.seconds:.0f}")
    Console(width=max(Console().width, 80)).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=FAULTS, help="at least (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first scene")
    parser.add_argument("--long", action="store_true", help="workers are stopped for a minute")
    parser.add_argument("--json", type=Path, help="write the counts here")
    arguments = parser.parse_args()
    term = signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that no server outlives this process
    console.quiet = True  # what it says of every check
    tallies: dict[str, Tally] = {}
    folder = Path(tempfile.mkdtemp(prefix="flawsmith-soak-"))
    violation = None
    try:
        soak(folder, arguments.faults, arguments.seed, long=arguments.long, tallies=tallies)
    except Violation as error:
        violation = error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        console.quiet = False
        signal.signal(signal.SIGTERM, term)
    show(tallies)
    if arguments.json:
        told = str(violation) if violation else None
        counts = {kind: vars(tally) for kind, tally in tallies.items()}
        arguments.json.write_text(json.dumps({"kinds": counts, "violation": told}, indent=2))
    if violation:
        print(violation)
    return 1 if violation else 0


if __name__ == "__main__":
    sys.exit(main())
