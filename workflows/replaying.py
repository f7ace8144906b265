"""A stored sample made again from its recipe, and compared with what the shard holds."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import numpy as np

from generation import registry
from generation.synthesis import attempt, batch_of
from manifests import pictures, shards
from manifests.errors import UsageError
from manifests.schema import Recipe, recipes_from
from manifests.workspace import Workspace, WorkspaceError, part
from workflows.practice import coached
from workflows.rounds import open_round
from workflows.stages import (
    PictureCache,
    Round,
    device_of,
    load_model,
    load_round,
    members_of,
    prepare_process,
    settings_hash,
    with_batch,
)

RECORDED = ("batch", "candidates", "margin")  # measures of how a sample was made; replay cannot find them out


def replay(space: Workspace, sample_id: str) -> dict[str, Any]:
    """Makes an accepted sample again from its stored recipe and compares.

    Returns ``{"identical": bool, "members": list, "differ": int, "largest": float, "path": str}``: whether
    the members are equal byte for byte, which are not, how many pixels (feature tokens) differ and by how
    much at most.

    Raises:
        UsageError: no such accepted sample.
        WorkspaceError: its records are missing or damaged.
    """
    number, shard = _parse_id(sample_id)
    if number not in space.rounds() or shard >= open_round(space, number).shard_count:
        raise UsageError(f"sample {sample_id} is not in the workspace: no shard of that number is planned")
    table = space.read_table(part("samples", number, shard, "parquet"))
    rows = {row["sample_id"]: row for row in table.to_pylist()}
    row = rows.get(sample_id)
    if row is None or row["status"] != "accepted":
        state = "is not in the workspace" if row is None else f"was {row['status']} ({row['reason']})"
        raise UsageError(f"sample {sample_id} {state}; only accepted samples can be replayed")
    round_ = load_round(space.url, number, settings_hash(space, number))
    path = part("shards", number, shard, "tar")
    held = dict(shards.unpack(space.read_bytes(path), space.address(path)))
    if sample_id not in held:
        raise shards.ShardError(f"{space.address(path)} lacks the sample {sample_id}; `flawsmith verify`")
    stored = held[sample_id]
    recipes = {recipe.sample_id: recipe for recipe in recipes_from(table)}
    members = _remake(round_, recipes, rows, sample_id)
    differ, largest = _compare(stored, members)
    return {
        "identical": members == stored and shards.checksum(stored) == row["checksum"],
        "members": sorted(k for k in {*stored, *members} if stored.get(k) != members.get(k)),
        "differ": differ,
        "largest": largest,
        "path": space.address(path),
    }


def _remake(
    round_: Round, recipes: dict[str, Recipe], rows: dict[str, dict[str, Any]], sample_id: str
) -> dict[str, bytes]:
    """The accepted attempt at a sample again, in the batch in which it was made."""
    generator = recipes[sample_id].generator
    own = [recipe for recipe in recipes.values() if recipe.generator == generator]
    attempts = [rows[recipe.sample_id]["attempts"] for recipe in own]
    index = [recipe.sample_id for recipe in own].index(sample_id)
    measures = json.loads(rows[sample_id]["measures"] or "{}")
    batch = batch_of(own, attempts, index, int(measures.get("candidates", 1)))
    cache = PictureCache(round_)
    prepare_process()
    smaller = measures.get("batch")
    found = registry.get(generator)
    model = load_model(generator, round_.traits[generator].params)
    if found.guide is not None:  # a search over draws left its choice in the row, and needs no critic
        model, _ = coached(found, model, round_.critic, round_.generation.practice, device_of(found))
    outcomes = attempt(
        [own[i] if smaller is None else with_batch(own[i], int(smaller)) for i in batch],
        cache.source,
        found,
        model,
        attempts[index] - 1,
    )
    outcome = outcomes[batch.index(index)]
    if outcome.status == "failed":
        raise WorkspaceError(f"sample {sample_id} cannot be made again: {outcome.reason}")
    kept = {name: measures[name] for name in RECORDED if name in measures}
    if kept:
        outcome = replace(outcome, recipe=recipes[sample_id], measures={**outcome.measures, **kept})
    return members_of(outcome, round_, cache)


def _compare(stored: dict[str, bytes], made: dict[str, bytes]) -> tuple[int, float]:
    """(places that differ, largest difference) over the pictures or features of two samples."""
    for name, data in stored.items():
        if name.startswith("image.") or name == "feature.npy":
            old, new = (_array(name, members).astype(float) for members in ({name: data}, made))
            difference = np.abs(old - new).max(axis=0 if name == "feature.npy" else 2)
            return int(np.count_nonzero(difference)), float(difference.max())
    return 0, 0.0


def _array(name: str, members: dict[str, bytes]) -> np.ndarray:
    if name == "feature.npy":
        return np.load(io.BytesIO(members[name]), allow_pickle=False)
    return pictures.decode(members[name], name=name).pixels


def _parse_id(sample_id: str) -> tuple[int, int]:
    parts = sample_id.split("-")
    if len(parts) != 3 or not all(piece.isdigit() for piece in parts):
        raise UsageError(f"{sample_id!r} is no sample id; they read ROUND-SHARD-INDEX, e.g. 000-00001-00042")
    return int(parts[0]), int(parts[1])
