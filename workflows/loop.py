"""The rounds: pictures to samples to detector to figures to the next round's settings.

Every stage writes its result whole and is skipped when it is there, so the same command goes on where it
stopped. Nothing but the workspace is needed to continue.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from manifests.workspace import Workspace, round_file
from workflows.config import Config
from workflows.console import say
from workflows.rounds import begin, damaged_shards, generate, open_round, remember, write_settings
from workflows.stages import read_settings
from workflows.tables import rounds_table


def run(config: Config, space: Workspace, *, new_round: bool = False) -> None:
    """Runs every round of a configuration that is not done, and writes the report.

    Raises:
        FlawsmithError: see the stages; what was finished stays, and the same call goes on from there.
    """
    from workflows.report.page import write_report

    with space.writing():
        number = begin(config, space, new_round=new_round)
        _, _, first = read_settings(space, number)
        for earlier in space.rounds():
            if earlier < first and damaged_shards(space, earlier):
                generate(space, earlier, config.cluster)
        for number in range(first, first + config.rounds):
            _run_round(config, space, number, last=number + 1 == first + config.rounds)
        say(f"report: {space.address(write_report(space))}")


def _run_round(config: Config, space: Workspace, number: int, *, last: bool) -> None:
    from workflows import detecting

    _timed(space, number, "generate", lambda: generate(space, number, config.cluster))
    _remember_yield(space, number)
    _timed(space, number, "train", lambda: detecting.train(space, number))
    _timed(space, number, "evaluate", lambda: detecting.evaluate(space, number))
    say(rounds_table(space))
    if not last:
        _timed(space, number, "feedback", lambda: next_round(config, space, number))


def next_round(config: Config, space: Workspace, number: int) -> bool:
    """The settings of the next round: decided by feedback, or the same again; whether it wrote them."""
    from workflows import steering

    if config.feedback.enabled:
        return steering.feedback(space, number)
    if space.exists(round_file(number + 1, "settings.yaml")):
        return False
    _, generation, first = read_settings(space, number)
    write_settings(space, number + 1, config, generation, first=first)
    return True


def _timed(space: Workspace, number: int, stage: str, work: Callable[[], bool]) -> None:
    """Runs a stage and keeps its seconds in the history, unless the stage was skipped."""
    started = time.perf_counter()
    if work():
        seconds = time.perf_counter() - started
        remember(space, number, f"seconds.{stage}", {stage: f"{seconds:.1f}"})


def _remember_yield(space: Workspace, number: int) -> None:
    """Settings and acceptance of a round, into the history."""
    rows = space.read_table(round_file(number, "shards.parquet")).to_pylist()
    accepted = sum(row["accepted"] for row in rows)
    total = sum(row["accepted"] + row["rejected"] + row["failed"] for row in rows)
    remember(space, number, "yield", {"acceptance": f"{accepted / total:.1%}", "accepted": accepted})
    generation = open_round(space, number).generation
    shares = {f"generators.{name}.share": s.share for name, s in generation.generators.items()}
    ranges = {name: list(getattr(generation, name)) for name in ("area", "severity", "count")}
    remember(space, number, "setting", {**shares, **ranges, "location": generation.location})
