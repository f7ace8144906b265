"""A round's beginning, plan and samples, and what the other stages ask of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pyarrow as pa
from distributed import Client

from manifests.errors import FlawsmithError, UsageError
from manifests.recipes import check_categories, check_donors, check_pictures, check_prompts
from manifests.schema import (
    IMAGES,
    RECIPES,
    SHARDS,
    Image,
    images_from,
    to_table,
)
from manifests.sources import Scan, scan, scan_textures
from manifests.verify import extra_files
from manifests.workspace import Workspace, WorkspaceError, part, round_file
from workflows.cluster import make_round, measure
from workflows.config import Cluster, Config, Generation, differences
from workflows.console import progress, say
from workflows.finished import unfinished
from workflows.machines import lifetime, open_client
from workflows.practice import pin
from workflows.room import fitted
from workflows.stages import (
    KINDS,
    PICTURE_TABLES,
    PROMPTS,
    Round,
    load_round,
    prompts_bytes,
    read_settings,
    round_from,
    settings_hash,
    traits_of,
    without_device,
)

SHARE = 0.1  # of a worker's lifetime that a shard may take


class PartialResult(FlawsmithError):
    """Some shards could not be made; the rest is there (exit code 3)."""


# -- starting -------------------------------------------------------------------------------------------


def begin(config: Config, space: Workspace, *, new_round: bool) -> int:
    """Makes the workspace ready for a configuration; returns the number of the latest round.

    The first time, it reads every picture of the sources. Later it only compares settings and prompts.

    Raises:
        UsageError: the workspace was made with other settings (they are listed), or the sources have a
            problem without remedy.
    """
    rounds = space.rounds()
    if rounds:
        stored, _, first = read_settings(space, rounds[-1])
        changed = differences(stored.identity(), config.identity())
        if not changed and _prompts_changed(space, first, config.generation):
            if new_round:
                changed = [f"{PROMPTS}: the prompts changed"]
            else:
                say(
                    f"the prompts are no longer those in {space.address(round_file(first, PROMPTS))}, which "
                    "this run keeps to; --new-round starts a round with the new ones"
                )
        unfinished = not space.exists(round_file(rounds[-1], "found.parquet"))
        if not changed and (unfinished or not new_round):
            if new_round:
                say(
                    f"round {rounds[-1]} has begun and is not judged yet: --new-round begins no other, and "
                    "its pictures stay those that it began with. Once it is judged (which takes "
                    f"rounds: {rounds[-1] - first + 1} or more), --new-round reads the sources again"
                )
            return rounds[-1]
        began, latest = (read_settings(space, one)[1] for one in (first, rounds[-1]))
        if new_round and latest != began:
            say(
                f"round {rounds[-1] + 1} begins with the settings of the configuration; what feedback "
                f"changed from round {first} to {rounds[-1]} (see `feedback --explain`) is not taken over"
            )
        if not new_round:
            listed = "\n  ".join(changed)
            raise UsageError(
                f"the workspace {space.address('')} was made with other settings:\n  {listed}\n"
                "Go on with the old ones, choose another workspace, or start a round with these: --new-round"
            )
    previous = space.read_table("images.parquet") if space.exists("images.parquet") else to_table([], IMAGES)
    found = read_sources(config, images_from(previous))
    for problem in found.problems:
        say(f"{problem.level}: {problem.path}: {problem.what}; {problem.remedy}")
    if found.fatal:
        raise UsageError("the sources cannot be used as they are (see above); nothing was started")
    textures = scan_textures(config.generation.textures) if config.generation.textures else []
    number = rounds[-1] + 1 if rounds else 0
    generation, notes = fitted(config.generation, config.cluster)
    for note in notes:
        say(note)
    round_ = round_from(number, config, generation, found.images, textures)
    check_categories(generation.generators, generation.categories, round_.pool)
    check_pictures(generation.generators, generation.normals, generation.nearest, round_.pool)
    check_donors(generation.generators, round_.traits, round_.pool)
    check_prompts(generation.generators, round_.traits, round_.pool)

    # Earlier rounds keep the pictures they were made from: each configuration has tables of its own, and the
    # workspace's holds all pictures that were ever used. The settings come last; they make the round exist.
    for name, table in zip(PICTURE_TABLES, (found.images, textures), strict=True):
        space.write_table(round_file(number, name), to_table(table, IMAGES))
    known = {image.image_id for image in found.images}
    gone = [row for row in previous.to_pylist() if row["image_id"] not in known]
    space.write_table("images.parquet", to_table([*found.images, *gone], IMAGES))
    if prompts := prompts_bytes(round_.traits):
        space.write_bytes(round_file(number, PROMPTS), prompts)
    else:
        space.remove(round_file(number, PROMPTS))  # of a start that was broken off before its settings
    write_settings(space, number, config, generation, first=number)
    for licence, count in sorted(Counter(image.licence for image in found.images if image.licence).items()):
        say(f"licence of {count} pictures: {licence}")
    return number


def _prompts_changed(space: Workspace, first: int, generation: Generation) -> bool:
    name = round_file(first, PROMPTS)
    return space.exists(name) and space.read_bytes(name) != prompts_bytes(traits_of(generation))


def read_sources(config: Config, previous: list[Image]) -> Scan:
    """Every picture of the sources, read once, with the problems found."""
    with progress("reading pictures", None, "pictures") as advance:
        done = 0

        def report(count: int, total: int) -> None:
            nonlocal done
            advance(count - done, total)
            done = count

        return scan(config.source, previous, report, shots=config.shots, seed=config.seed)


def write_settings(
    space: Workspace, number: int, config: Config, generation: Generation, *, first: int
) -> None:
    """``first`` is the round at which this configuration began. The settings of a later one that practises
    name the detector of the round before as it is now, of which the round keeps a copy.

    Raises:
        FlawsmithError: there is none.
    """
    critic = None
    if generation.practice.wanted and number > first:
        critic = pin(space, number, config.detector.name)
    space.write_yaml(
        round_file(number, "settings.yaml"),
        {
            "round": number,
            "first": first,
            "critic": critic,
            "config": config.model_dump(mode="json"),
            "generation": generation.model_dump(mode="json"),
        },
    )


def open_round(space: Workspace, number: int) -> Round:
    return load_round(space.url, number, settings_hash(space, number))


# -- stages ---------------------------------------------------------------------------------------------


def plan(space: Workspace, number: int) -> int:
    """Writes the recipes of a round, a shard at a time; returns how many."""
    round_ = open_round(space, number)
    total = 0
    with progress(f"round {number}: planning", round_.config.samples, "recipes") as advance:
        for shard in range(round_.shard_count):
            recipes = round_.plan(shard)
            space.write_table(part("recipes", number, shard, "parquet"), to_table(recipes, RECIPES))
            total += len(recipes)
            advance(len(recipes))
    return total


def generate(space: Workspace, number: int, cluster: Cluster) -> bool:
    """Makes the shards of a round that are not there, and ``shards.parquet``; whether there was any to make.

    Raises:
        PartialResult: some shards failed after all retries; running again tries them again.
        FlawsmithError: no sample at all was accepted, or the disk is full.
    """
    with ExitStack() as stack:
        client = None
        if cluster.slurm and _is_untouched(space, number):
            client = stack.enter_context(open_client(cluster))
            _fit_walltime(space, number, cluster, client)
        round_ = open_round(space, number)
        damaged = damaged_shards(space, number)
        for shard in damaged:  # its samples table is the mark that a shard is whole
            space.remove(part("samples", number, shard, "parquet"))
        records, todo = unfinished(space, number, round_.shard_count, damaged)
        errors: dict[int, str] = {}
        if todo:
            kept = f", {len(records)} of {round_.shard_count} shards are there" if records else ""
            say(f"round {number}: making {len(todo)} shards{kept}")
            samples = min(len(todo) * round_.config.output.shard_size, round_.config.samples)
            with progress(f"round {number}: generating", samples, "samples") as advance:
                result = make_round(
                    space,
                    number,
                    todo,
                    cluster,
                    lambda record: advance(record["accepted"] + record["rejected"] + record["failed"]),
                    client,
                )
            records, errors = records + result.records, result.errors
    records.sort(key=lambda record: record["shard"])
    made = {record["fingerprint"] for record in records}
    if {without_device(each) for each in made} - {without_device(round_.fingerprint())}:
        say(
            f"round {number}: some shards were made by other versions of the packages (shards.parquet, "
            "column fingerprint); they are kept, and replay of their samples may differ"
        )
    table = to_table(records, SHARDS)
    if todo or not _holds(space, round_file(number, "shards.parquet"), table):
        space.write_table(round_file(number, "shards.parquet"), table)
    sweep(space, number, round_.shard_count)
    if errors:
        listed = "\n  ".join(f"shard {shard}: {text}" for shard, text in sorted(errors.items()))
        raise PartialResult(
            f"round {number}: {len(errors)} of {round_.shard_count} shards could not be made:\n  {listed}\n"
            "Run the same command again to try them again"
        )
    if damaged:
        space.remove(round_file(number, "damaged.parquet"))
    accepted = sum(record["accepted"] for record in records)
    total = sum(record["accepted"] + record["rejected"] + record["failed"] for record in records)
    say(f"round {number}: {accepted} of {total} recipes accepted")
    if not accepted:
        reasons = Counter(
            row["reason"]
            for record in records
            for row in space.read_table(part("samples", number, record["shard"], "parquet")).to_pylist()
        )
        raise FlawsmithError(
            f"round {number}: no sample was accepted; reasons: "
            + ", ".join(f"{reason} ({count})" for reason, count in reasons.most_common(5))
            + ". Loosen generation.gates, or widen generation.area and generation.severity"
        )
    return bool(todo)


def _is_untouched(space: Workspace, number: int) -> bool:
    """Whether nothing of a round was made yet and how many samples its shards hold is still open."""
    stored = space.read_yaml(round_file(number, "settings.yaml"))
    return "shard_sizes" not in stored and not space.names(f"rounds/{number:03d}/samples")


def _fit_walltime(space: Workspace, number: int, cluster: Cluster, client: Client) -> None:
    """Settles, once and before a round's first shard, how many samples its shards hold, so that each takes
    a small part of a SLURM job's time: a worker that leaves at its end then loses little. Stored with the
    round's settings, and kept by runs that go on elsewhere."""
    if cluster.slurm is None:
        return
    stored = space.read_yaml(round_file(number, "settings.yaml"))
    round_ = open_round(space, number)
    seconds = _seconds(space, number - 1) if number > stored["first"] and _is_alike(space, number) else {}
    if {KINDS[section.gpu] for section in round_.sections} - set(seconds):
        seconds = measure(client, space, number, cluster)
    most = SHARE * lifetime(cluster.slurm)[0]
    size = round_.config.output.shard_size
    sizes = {kind: min(size, max(1, int(most / each))) for kind, each in seconds.items()}
    space.write_yaml(round_file(number, "settings.yaml"), {**stored, "shard_sizes": sizes})
    for kind, each in seconds.items():
        say(f"round {number}: {each:.3g} s a sample ({kind}): {sizes[kind]} samples a shard")


def _is_alike(space: Workspace, number: int) -> bool:
    """Whether a sample costs what it did in the round before: the same settings, and practice in both or
    in neither."""
    before, now = (space.read_yaml(round_file(each, "settings.yaml")) for each in (number - 1, number))
    return before["generation"] == now["generation"] and bool(before.get("critic")) == bool(now.get("critic"))


def _seconds(space: Workspace, number: int) -> dict[str, float]:
    """Measured seconds a sample of a finished round, by kind of worker; of those that made any."""
    rows = space.read_table(round_file(number, "shards.parquet")).to_pylist()
    found = {}
    for section in open_round(space, number).sections:
        mine = [row for row in rows if row["shard"] in section.shards]
        count = sum(row["accepted"] + row["rejected"] + row["failed"] for row in mine)
        if count:
            found[KINDS[section.gpu]] = sum(row["seconds"] for row in mine) / count
    return found


def _holds(space: Workspace, name: str, table: pa.Table) -> bool:
    """Whether a table is there, whole and with these rows."""
    try:
        return space.exists(name) and space.read_table(name).equals(table)
    except WorkspaceError:
        return False


def damaged_shards(space: Workspace, number: int) -> set[int]:
    """Shards that `verify` found damaged and that were not made again since."""
    name = round_file(number, "damaged.parquet")
    return set(space.read_table(name)["shard"].to_pylist()) if space.exists(name) else set()


def sweep(space: Workspace, number: int, count: int) -> None:
    """Removes files beyond the plan: an extra shard would be read by whoever globs the folder."""
    for name in extra_files(space, number, count):
        say(f"round {number}: removing {name}, which is not in the plan")
        space.remove(name)


def sample_rows(space: Workspace, number: int) -> Iterator[dict[str, Any]]:
    """Rows of all samples of a round, rejected ones among them, in plan order."""
    shards = space.read_table(round_file(number, "shards.parquet"))["shard"].to_pylist()
    names = [part("samples", number, shard, "parquet") for shard in shards]
    for table in space.read_many(names, space.read_table):
        yield from table.to_pylist()


def accepted_samples(space: Workspace, number: int) -> list[dict[str, Any]]:
    """Rows of a round's samples that were accepted and not rejected by a person, in plan order."""
    vetoed = vetoes(space)
    return [
        row
        for row in sample_rows(space, number)
        if row["status"] == "accepted" and row["sample_id"] not in vetoed
    ]


def vetoes(space: Workspace) -> set[str]:
    """Samples that a person rejected (`flawsmith review`)."""
    if not space.exists("review.parquet"):
        return set()
    return set(space.read_table("review.parquet")["sample_id"].to_pylist())
