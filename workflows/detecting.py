"""A round's detector: trained on its samples, judged on real pictures."""

from __future__ import annotations

import datetime
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from detectors.protocol import Detector
from generation.backbones import square
from manifests.errors import FlawsmithError
from manifests.pictures import load
from manifests.schema import GOOD, METRICS, SCORES, Image, to_table
from manifests.workspace import Workspace, round_file
from training import checkpoints
from training.components import component_contrast, component_recall, label_components
from training.evaluation import Judged, figures, judge, predict, score_rows
from training.fitting import Normal
from training.fitting import train as fit_detector
from training.loading import Sample, ShardFile, read_samples, small_mask
from workflows.console import progress, say
from workflows.heatmaps import remove_heatmaps, write_heatmaps
from workflows.rounds import open_round, remember, vetoes
from workflows.stages import Round, device

FEW = 5  # below so many calibration normals, augmented train pictures serve too
HELD_OUT = 10  # one sample in so many is kept from training, to be judged as heldout_synthetic

FOUND = pa.schema(
    [
        ("image_id", pa.string()),
        ("category", pa.string()),
        ("defect", pa.string()),
        ("group", pa.string()),
        ("component", pa.int32()),  # label in the mask at the detector's size; 0 = the whole picture
        ("area", pa.float64()),  # share of the picture; NaN without a mask
        ("contrast", pa.float64()),
        ("hit", pa.float64()),  # share above the alarm threshold
    ]
)


def checkpoint_folder(number: int, name: str) -> str:
    return f"rounds/{number:03d}/detectors/{name}"


def train(space: Workspace, number: int) -> bool:
    """Trains the round's detector from its shards and the train split's normals; whether it did.

    Skipped if a detector is there that can be loaded and that no later veto concerns. A new detector makes
    the old one's figures void, so they are removed.

    Raises:
        UsageError: the settings are wrong, or there is nothing to train on.
    """
    round_ = open_round(space, number)
    name = round_.config.detector.name
    vetoed = sorted(sample_id for sample_id in vetoes(space) if sample_id.startswith(f"{number:03d}-"))
    if _is_current(space, number, vetoed):
        say(f"round {number}: {name} is trained")
        return False
    max_side = round_.config.output.max_side
    images = [image for image in round_.images.values() if image.split == "train" and image.defect == GOOD]
    with progress(f"round {number}: reading normals", None, "pictures") as advance:
        normals = _normals(images, max_side, advance)
        calibration = calibration_normals(round_, normals, advance)
    _, settings = round_.config.detector.resolved()
    with progress(f"round {number}: training {name}", settings.steps, "steps") as advance:
        detector = fit_detector(
            name,
            settings,
            (sample for sample in samples_of(space, number) if not held_out(sample.sample_id)),
            normals,
            calibration,
            seed=round_.config.seed,
            device=device(),
            on_step=lambda _step, _steps, _losses: advance(1),
        )
    for stale in ("found.parquet", "metrics.parquet", "scores.parquet"):
        space.remove(round_file(number, stale))
    remove_heatmaps(space, number)
    licences = [image.licence for image in round_.images.values() if image.licence]
    thresholds = alarm_thresholds(round_, detector, calibration)
    windows = {image.window for image in round_.images.values() if image.window}
    notes = {
        "max_side": max_side,
        "window": list(windows.pop()) if len(windows) == 1 else None,
        "vetoed": vetoed,
        "thresholds": {category: score for category, (score, _) in thresholds.items()},
        "map_thresholds": {category: value for category, (_, value) in thresholds.items()},
    }
    folder = checkpoint_folder(number, name)
    with tempfile.TemporaryDirectory() as aside:
        checkpoints.save(aside, name, detector, seed=round_.config.seed, licences=licences, notes=notes)
        for file in (checkpoints.WEIGHTS, checkpoints.CONFIG):
            space.write_bytes(f"{folder}/{file}", (Path(aside) / file).read_bytes())
    return True


def _is_current(space: Workspace, number: int, vetoed: list[str]) -> bool:
    try:
        _, notes = load_detector(space, number)
    except FlawsmithError:
        return False
    return notes.get("vetoed") == vetoed


def held_out(sample_id: str) -> bool:
    """Whether a sample is kept from training; by its place in the plan, so that vetoes move nothing."""
    return int(sample_id.rsplit("-", 1)[-1]) % HELD_OUT == 0


def samples_of(space: Workspace, number: int) -> Iterator[Sample]:
    """The picture samples of a round that nobody rejected, in plan order.

    Raises:
        FlawsmithError: the round has no shards yet.
    """
    if not space.exists(round_file(number, "shards.parquet")):
        raise FlawsmithError(f"round {number} has no samples yet: `flawsmith run` or `generate` makes them")
    rows = space.read_table(round_file(number, "shards.parquet")).to_pylist()
    prefix = "" if space.is_local else f"{space.url.partition('://')[0]}://"
    shards = [ShardFile(prefix + space.path(row["path"]), row["accepted"]) for row in rows]
    return read_samples(shards, vetoes(space))


def calibration_normals(round_: Round, train_normals: Sequence[Normal], advance: Any) -> list[Normal]:
    """Normals of the calibration split; a category with fewer than ``FEW`` gets mirrored train ones."""
    images = [i for i in round_.images.values() if i.split == "calibration" and i.defect == GOOD]
    normals = _normals(images, round_.config.output.max_side, advance)
    for category in round_.pool.normals:
        have = sum(normal.category == category for normal in normals)
        own = [normal for normal in train_normals if normal.category == category]
        for k in range(max(0, FEW - have)):
            source = own[k % len(own)]
            flip = source.pixels[:, ::-1] if k // len(own) % 2 == 0 else source.pixels[::-1]
            normals.append(Normal(source.image_id, category, np.ascontiguousarray(flip)))
    return normals


def _normals(images: Sequence[Image], max_side: int | None, advance: Any) -> list[Normal]:
    normals = []
    for image in images:
        normals.append(Normal(image.image_id, image.category, load(image, max_side=max_side)))
        advance(1)
    return normals


def load_detector(space: Workspace, number: int) -> tuple[Detector, dict[str, Any]]:
    """The trained detector of a round, and the notes of its training.

    Raises:
        FlawsmithError: it is not there or cannot be used.
    """
    name = open_round(space, number).config.detector.name
    folder = checkpoint_folder(number, name)
    if not space.exists(f"{folder}/{checkpoints.CONFIG}"):
        raise FlawsmithError(f"round {number} has no trained {name} yet: `flawsmith train` makes it")
    with tempfile.TemporaryDirectory() as aside:
        for file in (checkpoints.WEIGHTS, checkpoints.CONFIG):
            (Path(aside) / file).write_bytes(space.read_bytes(f"{folder}/{file}"))
        return checkpoints.load(aside, device()), checkpoints.read_config(aside).get("notes", {})


# -- judging --------------------------------------------------------------------------------------------


def evaluate(space: Workspace, number: int) -> bool:
    """Judges a round's detector on the feedback split and on held-out samples; whether it did.

    Writes ``scores.parquet``, ``metrics.parquet``, the aggregates to the history, and heat maps of the worst
    pictures; ``found.parquet`` (what was found of each defect) comes last and is the mark that the round was
    judged.
    """
    if space.exists(round_file(number, "found.parquet")):
        return False
    round_ = open_round(space, number)
    detector, notes = load_detector(space, number)
    judged = _judge(round_, detector, "feedback", f"round {number}: judging feedback pictures")
    metric_rows = _write_figures(space, round_, judged, "feedback")
    _write_figures(space, round_, _judge_samples(space, round_, detector), "heldout_synthetic")
    means = {r["metric"]: r["value"] for r in metric_rows if r["category"] == "mean" and r["size"] == "all"}
    remember(space, number, "metric", {f"feedback.{name}": f"{value:.4f}" for name, value in means.items()})
    thresholds = _stored_thresholds(notes)
    found = what_was_found(round_, judged, thresholds)
    before = round_file(number - 1, "found.parquet")
    earlier = space.read_table(before).to_pylist() if number and space.exists(before) else []
    write_heatmaps(
        space, number, "feedback", judged, found, thresholds, earlier, round_.config.output.max_side
    )
    space.write_table(round_file(number, "found.parquet"), to_table(found, FOUND))
    return True


def evaluate_final(space: Workspace) -> None:
    """Scores the test split for every judged round that was not scored yet, and logs each look."""
    for number in space.rounds():
        round_ = open_round(space, number)
        metrics = round_file(number, "metrics.parquet")
        if not space.exists(metrics):
            say(f"round {number}: not judged yet, left out")
            continue
        if "test" in space.read_table(metrics)["split"].to_pylist():
            say(f"round {number}: the test split was scored before; the stored figures stand")
            continue
        detector, notes = load_detector(space, number)
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        judged = _judge(round_, detector, "test", f"round {number}: scoring the test split")
        look = {"round": number, "when": when, "pictures": len(judged)}
        space.append_table("looks.parquet", pa.Table.from_pylist([look]), {"round": number, "when": when})
        thresholds = _stored_thresholds(notes)
        found = what_was_found(round_, judged, thresholds)
        write_heatmaps(
            space, number, "test", judged, found, thresholds, max_side=round_.config.output.max_side
        )
        _write_figures(space, round_, judged, "test")


def _stored_thresholds(notes: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """By category: the alarm thresholds of (picture scores, map values)."""
    on_maps = notes["map_thresholds"]
    return {category: (score, on_maps[category]) for category, score in notes["thresholds"].items()}


def _judge(round_: Round, detector: Detector, split: str, title: str) -> list[Judged]:
    images = [image for image in round_.images.values() if image.split == split]
    with progress(title, len(images), "pictures") as advance:
        return judge(detector, images, round_.config.output.max_side, lambda _done, _total: advance(1))


def _judge_samples(space: Workspace, round_: Round, detector: Detector) -> list[Judged]:
    """The samples kept from training beside the calibration normals: synthetic figures, labelled so."""
    size = detector.settings.size
    held = [sample for sample in samples_of(space, round_.number) if held_out(sample.sample_id)]
    found = predict(detector, [s.image for s in held], [s.category for s in held])
    judged = []
    for sample, (score, scores) in zip(held, found, strict=True):
        source = round_.images[sample.image_id]
        image = Image(
            **{
                **{name: getattr(source, name) for name in Image.__dataclass_fields__},
                "image_id": sample.sample_id,
                "defect": sample.recipe["generator"],
            }
        )
        judged.append(Judged(image, score, scores, small_mask(sample.mask, size), None))
    normals = [i for i in round_.images.values() if i.split == "calibration" and i.defect == GOOD]
    return judged + judge(detector, normals, round_.config.output.max_side)


def _write_figures(space: Workspace, round_: Round, judged: list[Judged], split: str) -> list[dict[str, Any]]:
    labels: dict[str, Any] = {
        "round_": round_.number,
        "detector": round_.config.detector.name,
        "split": split,
        "training_seed": round_.config.seed,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # undefined figures give no row, which the tables show as "–"
        rows = figures(judged, **labels, resamples=round_.config.evaluation.resamples)
    replace = {"split": split}
    scores = to_table(score_rows(judged, **labels), SCORES)
    space.append_table(round_file(round_.number, "scores.parquet"), scores, replace)
    space.append_table(round_file(round_.number, "metrics.parquet"), to_table(rows, METRICS), replace)
    return rows


def alarm_thresholds(
    round_: Round, detector: Detector, normals: Sequence[Normal]
) -> dict[str, tuple[float, float]]:
    """By category: the stated quantile of calibration normals' (picture scores, map values)."""
    quantile = round_.config.evaluation.quantile
    found = list(predict(detector, [n.pixels for n in normals], [n.category for n in normals]))
    thresholds = {}
    for category in sorted({normal.category for normal in normals}):
        own = [result for normal, result in zip(normals, found, strict=True) if normal.category == category]
        maps = np.stack([scores for _, scores in own])
        thresholds[category] = (
            float(np.quantile([score for score, _ in own], quantile)),
            float(np.quantile(maps, quantile)),
        )
    return thresholds


def what_was_found(
    round_: Round, judged: Sequence[Judged], thresholds: dict[str, tuple[float, float]]
) -> list[dict[str, Any]]:
    """One row a real defect: each component of a mask, or the whole picture where there is no mask."""
    rows = []
    for entry in judged:
        if not entry.anomalous:
            continue
        image = entry.image
        row = {"image_id": image.image_id, "category": image.category, "defect": image.defect}
        row["group"] = image.group
        on_picture, on_map = thresholds[image.category]
        if entry.mask is None:
            hit = float(entry.score > on_picture)
            rows.append({**row, "component": 0, "area": np.nan, "contrast": np.nan, "hit": hit})
            continue
        size = entry.map.shape[0]
        pixels = square(load(image, max_side=round_.config.output.max_side), size)
        labels, _ = label_components(entry.mask)
        for found in component_recall([entry.map], [entry.mask], on_map, [entry.ignore]):
            contrast = component_contrast(pixels, labels == found.label)
            rows.append(
                {
                    **row,
                    "component": found.label,
                    "area": found.area,
                    "contrast": contrast,
                    "hit": found.overlap,
                }
            )
    return rows
