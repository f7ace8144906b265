"""The rounds: pictures to samples to detector to figures to the next round's settings.

Every stage writes its result whole and is skipped when it is there, so the same command goes on where it
stopped. Nothing but the workspace is needed to continue. The run ends with its rounds, when they bring
nothing any more, or when its time is spent.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from manifests.workspace import Workspace, round_file
from workflows import history
from workflows.config import Cluster, Config
from workflows.console import say
from workflows.rounds import begin, damaged_shards, generate, open_round, write_settings
from workflows.space import present_values
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
        best, idle = first, 0
        for number in range(first, first + config.rounds):
            _run_round(config, space, number, best if number > first else None)
            if number > first:
                better = gained(space, best, number)
                if better is not None:  # without anything to judge by, no round is idle
                    best, idle = (number, 0) if better else (best, idle + 1)
            stop = why_stop(config, space, first, number, best, idle)
            if stop:
                if not space.exists(round_file(number + 1, "found.parquet")):  # else it went on once
                    history.remember(space, number, "stop", {"reason": stop})
                say(f"stopped after round {number}: {stop}")
                break
            history.forget(space, {(number, "stop")})
            timed(space, number, "feedback", partial(next_round, config, space, number))
        say(f"report: {space.address(write_report(space))}")


def _run_round(config: Config, space: Workspace, number: int, best: int | None) -> None:
    from workflows import detecting

    make_samples(space, number, config.cluster)
    timed(space, number, "train", lambda: detecting.train(space, number))
    timed(space, number, "evaluate", lambda: detecting.evaluate(space, number, best))
    say(rounds_table(space))


def make_samples(space: Workspace, number: int, cluster: Cluster) -> None:
    """The shards of a round that are not there yet; what came of them goes into the history."""
    timed(space, number, "generate", lambda: generate(space, number, cluster))
    _remember_yield(space, number)


def gained(space: Workspace, best: int, number: int) -> bool | None:
    """Whether a round's detector beats that of the best round before it beyond chance on the feedback split:
    the interval of the difference of their pixel AP (image AP without masks), by paired bootstrap over
    groups, lies above 0; None where there is no interval. Kept in the history, and not computed again."""
    from workflows import detecting

    if history.facts_of(history.read(space), number, "gain").get("against") != str(best):
        detecting.compare_rounds(space, best, number)
    kept = [row for row in history.read(space) if row["kind"] == "gain"]
    for line in history.in_words(kept, number):
        say(f"round {number} {line}")
    low = float(history.facts_of(kept, number, "gain").get("low", "nan"))
    return low > 0 if math.isfinite(low) else None


def why_stop(config: Config, space: Workspace, first: int, number: int, best: int, idle: int) -> str | None:
    """Why no further round follows, in words; None if one does.

    Args:
        best: the last round that gained; idle: rounds since then.
    """
    patience, minutes = config.feedback.patience, config.feedback.minutes
    if number + 1 == first + config.rounds:
        return f"all {config.rounds} rounds are done"
    if patience is not None and idle >= patience:
        return f"no significant gain over round {best} in {idle} rounds (feedback.patience)"
    seconds = history.spent(space, "seconds.", range(first, number + 1))
    if minutes is not None and seconds >= 60 * minutes:
        return f"{seconds / 60:.1f} minutes are spent (feedback.minutes: {minutes:g})"
    return None


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


def timed(space: Workspace, number: int, stage: str, work: Callable[[], bool]) -> None:
    """Runs a stage and adds the seconds that it took, broken off or not, to the stage's in the history.

    A stage that was skipped adds nothing; the last try of one that is killed outright is lost.
    """
    started = time.perf_counter()

    def add() -> None:
        kind = f"seconds.{stage}"
        total = history.spent(space, kind, range(number, number + 1)) + time.perf_counter() - started
        history.remember(space, number, kind, {stage: f"{total:.1f}"})

    try:
        done = work()
    except BaseException:
        # What broke the stage off is told, even where it keeps this from being written.
        with suppress(Exception):
            add()
        raise
    if done:
        add()


def _remember_yield(space: Workspace, number: int) -> None:
    """Settings and acceptance of a round, into the history."""
    rows = space.read_table(round_file(number, "shards.parquet")).to_pylist()
    accepted = sum(row["accepted"] for row in rows)
    total = sum(row["accepted"] + row["rejected"] + row["failed"] for row in rows)
    history.remember(space, number, "yield", {"acceptance": f"{accepted / total:.1%}", "accepted": accepted})
    generation = open_round(space, number).generation
    shares = {f"generators.{name}.share": s.share for name, s in generation.generators.items()}
    ranges = {name: list(getattr(generation, name)) for name in ("area", "severity", "count")}
    others = {
        path: value
        for path, value in present_values(generation).items()
        if ".params." in path or path.startswith("categories.")
    }
    often = {
        f"generators.{name}.categories.{category}": value
        for name, own in generation.generators.items()
        for category, value in own.categories.items()
    }
    facts = {**shares, **often, **ranges, "location": generation.location, **others}
    history.remember(space, number, "setting", facts)
