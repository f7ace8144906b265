"""The feedback stage: a round's figures to the next round's settings, with trials on the cheap proxy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from generation.backbones import Backbone, load_backbone, to_batch
from manifests.errors import FlawsmithError
from manifests.pictures import load
from manifests.schema import DECISIONS, GOOD, TRIALS, Image, to_table
from manifests.workspace import Workspace, round_file
from training import proxy
from training.components import label_components
from training.evaluation import ignored, map_shape, truth
from training.examples import CHUNK, chunks
from workflows.console import progress, say
from workflows.detecting import samples_of
from workflows.feedback import Found, Move, Trial, decide, propose, sample_weights, search
from workflows.rounds import open_round, write_settings
from workflows.stages import Round, read_settings

SIZE = 224  # side of the proxy's pictures
MOST_SAMPLES, MOST_NORMALS, MOST_JUDGED = 600, 48, 120  # the last two a category
FALSE_ALARMS = 0.99  # quantile of normals above which the proxy counts something as found


@dataclass(frozen=True)
class Table:
    """What the trials work on; computed once a round.

    Attributes:
        evidence: sums of the samples and of normals.
        ids: of the samples, one each.
        generators, areas, severities: of the samples, one each; areas and severities as wanted.
        judged: real feedback pictures by category.
        samples, masks: the samples' residuals and masks, for the case without labelled anomalies.
        thresholds_from: residuals of calibration normals by category; the proxy's alarms are set on them and
            nothing else is.
        label_shape: (h, w) of the mask in which a picture's defects were counted (that of its map).
        images: the feedback pictures behind ``judged``, in order.
    """

    evidence: proxy.Evidence
    ids: list[str]
    generators: np.ndarray
    areas: np.ndarray
    severities: np.ndarray
    judged: dict[str, proxy.Judged]
    samples: list[np.ndarray]
    masks: list[np.ndarray]
    thresholds_from: dict[str, np.ndarray]
    label_shape: Callable[[Image], tuple[int, int]]
    images: dict[str, list[Image]]


def feedback(space: Workspace, number: int) -> bool:
    """Writes the next round's settings, the trials and the decisions; whether it did: skipped if the next
    round is there.

    Raises:
        FlawsmithError: the round was not evaluated yet.
    """
    if space.exists(round_file(number + 1, "settings.yaml")):
        return False
    if not space.exists(round_file(number, "found.parquet")):
        raise FlawsmithError(f"round {number} was not evaluated yet: `flawsmith evaluate` does it")
    round_ = open_round(space, number)
    _, _, first = read_settings(space, number)
    found_rows = space.read_table(round_file(number, "found.parquet")).to_pylist()
    found = [
        Found(row["category"], row["group"], row["area"], row["contrast"], row["hit"]) for row in found_rows
    ]
    with progress(f"round {number}: features for the proxy", None, "pictures") as advance:
        table = prepare(space, round_, advance)
    names = sorted(set(table.generators.tolist()))
    learnable = _learnable(table, names, found_rows) if found else _hard_to_find(table, names)
    proposal, reasons = propose(found, learnable) if found else _without_anomalies(learnable)

    trials_file = round_file(number, "trials.parquet")
    earlier = _earlier_trials(space, trials_file)
    count = round_.config.feedback.trials
    with progress(f"round {number}: trials", count - len(earlier), "trials") as advance:

        def keep(trial: Trial) -> None:
            row = {"round": number, **asdict(trial)}
            space.append_table(trials_file, to_table([row], TRIALS), {"trial": trial.trial})
            advance(1)

        trials = search(
            _value(round_, table),
            proposal,
            names,
            trials=count,
            seed=round_.config.seed,
            round_=number,
            earlier=earlier,
            keep=keep,
        )
    generation, decisions = decide(round_.generation, trials, proposal, reasons)
    rows = [{"round": number, **asdict(decision)} for decision in decisions]
    space.write_table(round_file(number, "decisions.parquet"), to_table(rows, DECISIONS))
    write_settings(space, number + 1, round_.config, generation, first=first)
    say(explain(space, number))
    return True


def explain(space: Workspace, number: int) -> str:
    """The stored decisions of a round, in words."""
    name = round_file(number, "decisions.parquet")
    if not space.exists(name):
        return f"round {number}: no decisions are stored (the last round of a run takes none)"
    lines = [f"What round {number} changes in round {number + 1}:"]
    for row in space.read_table(name).to_pylist():
        change = (
            "stays " + row["before"] if row["before"] == row["after"] else f"{row['before']} → {row['after']}"
        )
        lines.append(f"  {row['setting']}: {change}\n    because {row['reason']}")
    return "\n".join(lines)


def prepare(space: Workspace, round_: Round, advance: Callable[[int], None]) -> Table:
    """Features of normals, samples and feedback pictures, as distances to the nearest normal token."""
    backbone = load_backbone()
    rng = np.random.default_rng(np.random.SeedSequence(round_.config.seed, spawn_key=(round_.number, 1)))
    max_side = round_.config.output.max_side
    banks, negatives, thresholds_from = {}, [], {}
    for category, pictures in round_.pool.normals.items():
        own = _evenly(pictures, MOST_NORMALS)
        held = [
            image
            for image in round_.images.values()
            if image.category == category and image.split == "calibration" and image.defect == GOOD
        ][:MOST_NORMALS]
        # Half of the train normals are the bank, the other half are what the head learns as normal.
        banks[category] = proxy.normal_bank(_features(backbone, own[::2], max_side, advance), rng)
        others = _features(backbone, own[1::2] or own, max_side, advance)
        negatives.append(proxy.residuals(others, banks[category]))
        thresholds_from[category] = (
            proxy.residuals(_features(backbone, held, max_side, advance), banks[category])
            if held
            else negatives[-1]
        )
    samples, masks, kept = [], [], []
    accepted = sum(
        row["accepted"] for row in space.read_table(round_file(round_.number, "shards.parquet")).to_pylist()
    )
    step = max(1, -(-accepted // MOST_SAMPLES))
    chosen = (sample for at, sample in enumerate(samples_of(space, round_.number)) if at % step == 0)
    for chunk in chunks(chosen, CHUNK):
        features = backbone.features(to_batch([sample.image for sample in chunk], SIZE))
        for sample, feature in zip(chunk, features, strict=True):
            samples.append(proxy.residuals(feature[None], banks[sample.category])[0])
            masks.append(sample.mask)
            kept.append(sample)
        advance(len(chunk))
    if not samples:
        raise FlawsmithError(
            f"round {round_.number}: every sample was rejected by hand; nothing to learn from"
        )
    evidence = proxy.gather(samples, masks, np.concatenate(negatives))
    judged, images = {}, {}
    for category in round_.pool.normals:
        own_images = [i for i in round_.images.values() if i.category == category and i.split == "feedback"]
        own_images = _evenly(own_images, MOST_JUDGED)
        if not own_images:
            continue
        residual = proxy.residuals(_features(backbone, own_images, max_side, advance), banks[category])
        labels = np.array([image.defect != GOOD for image in own_images])
        truths = [truth(image, SIZE) for image in own_images]
        grid = (residual.shape[1], residual.shape[2])
        with_masks = [proxy.shrink_mask(t, grid) for t in truths if t is not None]
        masked = np.stack(with_masks) if len(with_masks) == len(own_images) else None
        skipped = [ignored(image, SIZE) for image in own_images]
        nothing = np.zeros((SIZE, SIZE), bool)
        ignore = np.stack([proxy.shrink_mask(nothing if i is None else i, grid) for i in skipped])
        judged[category] = proxy.Judged(residual, labels, masked, ignore)
        images[category] = own_images
    size, tiles = round_.config.detector.resolved()[1].size, round_.config.detector.tiles

    def label_shape(image: Image) -> tuple[int, int]:
        return map_shape(image, size, max_side, tiles)

    return Table(
        evidence,
        [sample.sample_id for sample in kept],
        np.array([sample.recipe["generator"] for sample in kept]),
        np.array([sample.recipe["area"] for sample in kept]),
        np.array([sample.recipe["severity"] for sample in kept]),
        judged,
        samples,
        [proxy.shrink_mask(mask, samples[0].shape[:2]) for mask in masks],
        thresholds_from,
        label_shape,
        images,
    )


def _value(round_: Round, table: Table) -> Callable[[Move], float]:
    """What a trial is worth: on labelled real pictures, or on left-out generators where there are none."""
    labelled = any(group.labels.any() for group in table.judged.values())

    def value(move: Move) -> float:
        weights = sample_weights(round_.generation, move, table.generators, table.areas, table.severities)
        if labelled:
            return proxy.objective(table.evidence, weights, table.judged)
        return proxy.left_out_objective(table.evidence, weights, table.generators, table.samples, table.masks)

    return value


def _learnable(table: Table, names: Sequence[str], found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """By generator: the share of the missed real defects that a head learned from it alone finds."""
    missed: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        if row["hit"] < 0.5:
            missed.setdefault(row["image_id"], []).append(row)
    result = {}
    for name in names:
        head = proxy.solve(table.evidence, (table.generators == name).astype(float))
        hits: list[bool] = []
        for category, group in table.judged.items():
            normal = proxy.score_maps(table.thresholds_from[category], table.evidence.scale, head)
            on_map = np.quantile(normal, FALSE_ALARMS)
            on_picture = np.quantile(normal.max(axis=(1, 2)), FALSE_ALARMS)
            maps = proxy.score_maps(group.residual, table.evidence.scale, head)
            for image, scores in zip(table.images[category], maps, strict=True):
                for row in missed.get(image.image_id, []):
                    mask = truth(image, table.label_shape(image)) if row["component"] else None
                    if mask is not None:
                        labels, _ = label_components(mask)
                        place = proxy.shrink_mask(labels == row["component"], group.residual.shape[1:3])
                        hits.append(bool(scores[place].max(initial=-np.inf) > on_map))
                    else:
                        hits.append(bool(scores.max() > on_picture))
        result[name] = float(np.mean(hits)) if hits else 0.0
    return result


def _hard_to_find(table: Table, names: Sequence[str]) -> dict[str, float]:
    """Without labelled anomalies: by generator, 1 − pixel AP on its samples of a head of the others.

    What the others already teach is redundant; what they do not is asked for more.
    """
    result = {}
    for name in names:
        chosen = table.generators == name
        others = (~chosen).astype(float)
        if not others.any():
            return dict.fromkeys(names, 0.0)
        head = proxy.solve(table.evidence, others)
        held = np.flatnonzero(chosen)[:64]
        maps = [proxy.score_maps(table.samples[i][None], table.evidence.scale, head)[0] for i in held]
        result[name] = 1 - proxy.pixel_metrics(maps, [table.masks[i] for i in held])["pixel_ap"]
    return result


def _without_anomalies(hard: dict[str, float]) -> tuple[Move, dict[str, str]]:
    mean = float(np.mean(list(hard.values()))) if hard else 0.0
    shares = {name: float(np.clip(2 * (value - mean), -1, 1)) for name, value in hard.items()}
    reasons = dict.fromkeys(("area", "severity"), "no labelled real anomaly to judge by")
    for name, value in hard.items():
        reasons[f"share.{name}"] = (
            f"no labelled real anomaly; a head learned from the other generators reaches pixel AP "
            f"{1 - value:.2f} on the samples of {name} (mean {1 - mean:.2f})"
        )
    return Move(0.0, 0.0, shares), reasons


def _earlier_trials(space: Workspace, name: str) -> list[Trial]:
    if not space.exists(name):
        return []
    rows = sorted(space.read_table(name).to_pylist(), key=lambda row: row["trial"])
    return [Trial(r["trial"], r["origin"], r["params"], r["value"], r["seconds"]) for r in rows]


def _features(
    backbone: Backbone, images: Sequence[Image], max_side: int | None, advance: Callable[[int], None]
) -> torch.Tensor:
    parts = []
    for chunk in chunks(images, CHUNK):
        parts.append(backbone.features(to_batch([load(image, max_side=max_side) for image in chunk], SIZE)))
        advance(len(chunk))
    return torch.cat(parts)


def _evenly(items: Sequence[Any], most: int) -> list[Any]:
    step = max(1, -(-len(items) // most))
    return list(items[::step])
