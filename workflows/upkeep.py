"""Looking after a workspace: what is damaged, what a person rejects, and what a run would cost."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Sequence

import pyarrow as pa

from manifests.errors import FlawsmithError, UsageError
from manifests.schema import IMAGES, to_table
from manifests.sources import scan_textures
from manifests.verify import DAMAGED, Finding, verify_round
from manifests.workspace import Workspace, WorkspaceError, round_file
from workflows.config import Config
from workflows.console import progress
from workflows.detecting import JUDGED, load_detector
from workflows.machines import job_script
from workflows.practice import pinned_files
from workflows.room import fitted
from workflows.rounds import accepted_samples, open_round, read_sources, vetoes, write_settings
from workflows.rounds import sweep as sweep_round
from workflows.stages import PICTURE_TABLES, Job, make_shard, read_settings, round_from, settings_hash
from workflows.weighing import TABLE as WEIGHTS

PROBE = 32  # samples, at most, that a dry run makes to measure their cost


def verify(space: Workspace, *, sweep: bool = False, note: bool = True) -> list[Finding]:
    """Checks every round byte by byte.

    Args:
        sweep: removes files that belong to no planned shard, in place of reporting them.
        note: writes down what is damaged, so that the next `run` makes it again.
    """
    findings = []
    for number in space.rounds():
        try:
            round_ = open_round(space, number)
        except WorkspaceError as error:
            findings.append(Finding(number, -1, f"rounds/{number:03d}", str(error)))
            continue
        started = space.names(f"rounds/{number:03d}/samples")
        if not started and not space.exists(round_file(number, "shards.parquet")):
            continue  # nothing was made yet
        with progress(f"round {number}: verifying", round_.shard_count, "shards") as advance:
            if sweep:
                sweep_round(space, number, round_.shard_count)
            found = verify_round(space, number, round_.shard_count, advance)
        bad = [vars(finding) for finding in found if finding.shard >= 0]
        name = round_file(number, "damaged.parquet")
        if bad and note:
            space.write_table(name, pa.Table.from_pylist(bad, schema=DAMAGED))
        elif note:
            space.remove(name)
        findings += [*found, *_missing_tables(space, number), *_damaged_files(space, number)]
    if space.rounds() and not space.exists("images.parquet"):
        findings.append(Finding(-1, -1, "images.parquet", "missing"))
    return findings + _damaged_tables(space, -1, "")


def _missing_tables(space: Workspace, number: int) -> list[Finding]:
    """Of a judged round, tables that were there when it was judged."""
    names = space.names(f"rounds/{number:03d}")
    if JUDGED[-1] not in names:
        return []
    again = f"missing; `flawsmith evaluate --round {number}` makes it again"
    wanted = {"shards.parquet": "missing", **dict.fromkeys(JUDGED, again)}
    return [
        Finding(number, -1, round_file(number, name), what)
        for name, what in wanted.items()
        if name not in names
    ]


def _damaged_tables(space: Workspace, number: int, folder: str) -> list[Finding]:
    """Tables in a folder of the workspace that cannot be read."""
    findings = []
    for name in space.names(folder):
        path = f"{folder}/{name}" if folder else name
        if name.endswith(".parquet"):
            try:
                space.read_table(path)
            except WorkspaceError as error:
                findings.append(Finding(number, -1, path, f"damaged: {error}"))
    return findings


def _damaged_files(space: Workspace, number: int) -> list[Finding]:
    """Tables and detectors of a round that cannot be read, and a critic that is not the one it names."""
    own = f"rounds/{number:03d}"
    findings = [*_damaged_tables(space, number, own), *_damaged_tables(space, number, f"{own}/recipes")]
    if space.names(f"rounds/{number:03d}/detectors"):
        try:
            load_detector(space, number)
        except FlawsmithError as error:
            what = f"{error}; `flawsmith train --round {number}` makes it again"
            findings.append(Finding(number, -1, f"rounds/{number:03d}/detectors", what))
    if critic := open_round(space, number).critic:
        try:
            pinned_files(critic)
        except WorkspaceError as error:
            findings.append(Finding(number, -1, critic.folder, str(error)))
    return findings


def review(space: Workspace, reject: Sequence[str], restore: Sequence[str] = ()) -> str:
    """Changes a person's vetoes in ``review.parquet``: adds some and takes others back.

    Raises:
        UsageError: an id is not that of an accepted sample, one to restore is not rejected, or one is in
            both; nothing is stored then.
    """
    already = vetoes(space)
    known = already | {
        row["sample_id"]
        for number in space.rounds()
        if space.exists(round_file(number, "shards.parquet"))
        for row in accepted_samples(space, number)
    }
    for wrong, why in (
        ([i for i in (*reject, *restore) if i not in known], "no accepted samples here"),
        ([i for i in restore if i not in already], "not rejected, so nothing to restore"),
        ([i for i in reject if i in restore], "to reject and to restore at once"),
    ):
        if wrong:
            raise UsageError(f"{why}: {', '.join(wrong[:10])}; nothing was stored")
    rejected = (already | set(reject)) - set(restore)
    changed = already ^ rejected
    for number in {int(sample_id.partition("-")[0]) for sample_id in changed}:
        space.remove(round_file(number, WEIGHTS))  # they were learned among other samples
    space.write_table("review.parquet", pa.table({"sample_id": pa.array(sorted(rejected), pa.string())}))
    counts = {"rejected": len(rejected - already), "restored": len(already - rejected)}
    said = [f"{n} {'sample' if n == 1 else 'samples'} {done}" for done, n in counts.items() if n]
    text = (
        f"{', '.join(said) or 'nothing changed'}; {len(rejected)} rejected in all, which training, export "
        "and contact sheets leave out"
    )
    first = read_settings(space, space.rounds()[-1])[2]
    if any(int(sample_id.partition("-")[0]) < first for sample_id in changed):
        text += (
            f". `run` trains the detectors of its own configuration again, those from round {first} on; an "
            "earlier one by `flawsmith train --round N` and `evaluate --round N`"
        )
    return text


def estimate(config: Config) -> str:
    """What a round will cost, measured on a few of its own samples; nothing is written.

    Raises:
        UsageError: the sources have a problem without remedy.
    """
    found = read_sources(config, [])
    if found.fatal:
        listed = "\n  ".join(f"{p.path}: {p.what}; {p.remedy}" for p in found.problems if p.level == "error")
        raise UsageError(f"the sources cannot be used as they are:\n  {listed}")
    textures = scan_textures(config.generation.textures) if config.generation.textures else []
    generation, notes = fitted(config.generation, config.cluster)
    round_ = round_from(0, config, generation, found.images, textures)
    slurm = config.cluster.slurm
    workers = slurm.jobs[1] * slurm.cores if slurm else config.cluster.workers or os.cpu_count() or 1
    probed = min(PROBE, config.samples)
    with tempfile.TemporaryDirectory() as folder:
        probe = config.model_copy(
            update={"samples": probed, "output": config.output.model_copy(update={"shard_size": probed})}
        )
        space = Workspace(folder)
        for name, table in zip(PICTURE_TABLES, (found.images, textures), strict=True):
            space.write_table(round_file(0, name), to_table(table, IMAGES))
        write_settings(space, 0, probe, generation, first=0)
        digest, shards = settings_hash(space, 0), open_round(space, 0).shard_count
        records = [make_shard(Job(space.url, 0, shard, digest)) for shard in range(shards)]
    total = {name: sum(record[name] for record in records) for name in ("seconds", "bytes", "accepted")}
    each = total["seconds"] / probed
    size = total["bytes"] / max(total["accepted"], 1)
    accepted = total["accepted"] / probed
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    in_hand = size * config.output.shard_size * 2
    return "\n".join(
        [
            f"pictures      {len(found.images)} in {len(round_.pool.normals)} categories, "
            f"{sum(map(len, round_.pool.normals.values()))} normals to work on",
            f"samples       {config.samples} recipes a round in {round_.shard_count} shards, {config.rounds} "
            f"rounds; about {accepted:.0%} accepted",
            f"bytes         about {size * accepted * config.samples / 1e6:,.1f} MB a round "
            f"({size / 1e3:,.1f} kB a sample)",
            f"time          about {each * config.samples / workers / 60:,.1f} minutes a round for the "
            f"samples on {workers} workers ({each * 1000:,.1f} ms a sample and core), without training",
            f"memory        about {(memory + in_hand) / 1e6:,.0f} MB a worker",
            *(f"predicted     {note}" for note in notes),
            f"measured on {probed} samples of the plan; nothing was written",
            *(["", "each of SLURM's jobs:", job_script(slurm).rstrip()] if slurm else []),
        ]
    )
