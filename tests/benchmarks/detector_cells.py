"""One cell of the detectors' benchmark: an arm trained with one seed and judged; in a process of its own.

What all arms share is here: which pictures, which samples, at which resolution maps and masks meet, and how
figures are averaged.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from detectors import protocol
from generation.backbones import square
from manifests import shards
from manifests.layouts import Found
from manifests.pictures import load, small_mask
from manifests.schema import GOOD, Image, canonical_json
from manifests.shots import choose_shots
from manifests.sources import scan_textures
from tests.benchmarks.peers import SCRIPTS, run_peer
from tests.benchmarks.resumed import write_file
from training.evaluation import Judged, at_size, ignored, judge, predict, truth
from training.fitting import Normal, train
from training.intervals import Estimate, evaluate_images, evaluate_pixels, mean_estimate
from training.loading import Sample, ShardFile, read_samples
from workflows.config import Config, parse_config
from workflows.detecting import calibration_normals
from workflows.stages import Round, make_samples, round_from

SIDE = 256  # pixels; every arm's maps are brought to it, the masks too, and anomalib's models work at it
METRICS = ("pixel_ap", "aupro", "image_auroc")
RESAMPLES = 300
THREADS = 1
SAMPLES = 40  # recipes a category
SHARD = 32  # small, so that little is lost when slow samples are broken off
# Share of a category's patches that anomalib's PatchCore keeps: its default. A hundredth took 223 to 254 s of
# CPU time a cell; choosing ten times as many takes ten times as long, so at most 42 minutes [inferred].
CORESET = 0.1
PROBED = 6  # steps that are timed before the number of steps is chosen
TIMED = 20  # pictures, one by one
# The sections `generation` of the synthetic data sets: those of the papers, and the default.
SYNTHESES: dict[str, dict[str, Any]] = {
    "draem": {"preset": "draem"},
    "onenip": {"preset": "onenip"},
    "dfd": {"preset": "dfd"},
    "cut": {"generators": {"cut": {}}},
    "mix": {},
}


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        detector: name in the registry, or of anomalib's model.
        synthesis: one of ``SYNTHESES``; None if it learns from normals, or from what it makes itself.
        shots: normals a category that it may see, chosen by the seed; None: train and calibration split.
        peer: anomalib's.
        most: categories at most, one a data set; None: all.
        steps: optimiser steps; None: as many as fit.
    """

    detector: str
    synthesis: str | None = None
    shots: int | None = None
    peer: bool = False
    most: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Case:
    """What a run measures on.

    Attributes:
        data: folder of the data sets; ``images`` are those found in it.
        work: folder for samples and textures.
        split: on which arms are judged: feedback or test.
        minutes: of training a cell, all categories together; see :func:`busy_seconds`.
    """

    data: Path
    images: Sequence[Image]
    work: Path
    split: str
    minutes: float

    @property
    def categories(self) -> list[str]:
        return sorted({image.category for image in self.images})

    def data_set(self, category: str) -> str:
        """The folder below ``data`` in which a category lies; in a folder of categories, itself."""
        return self.relative(next(i for i in self.images if i.category == category)).split("/")[0]

    def of(self, category: str, split: str) -> list[Image]:
        return [image for image in self.images if image.category == category and image.split == split]

    def categories_of(self, arm: Arm) -> list[str]:
        """All, or the first ones with masks of the first data sets."""
        if arm.most is None:
            return self.categories
        first: dict[str, str] = {}
        for category in self.categories:
            bad = [image for image in self.of(category, self.split) if image.defect != GOOD]
            if bad and all(image.mask_path for image in bad):
                first.setdefault(self.data_set(category), category)
        return sorted(first.values())[: arm.most]

    def learned(self, arm: Arm, seed: int) -> list[Image]:
        """What an arm may learn from: train and calibration split, or few of them, all to train, as a run of
        the product with these shots and this seed chooses them."""
        normals = [
            i for split in ("train", "calibration") for c in self.categories for i in self.of(c, split)
        ]
        if arm.shots is None:
            return normals
        listed = [(0, Found(i.path, self.relative(i), i.category, i.defect, i.split)) for i in normals]
        chosen = {found.path for _, found in choose_shots(listed, arm.shots, seed)}
        return [replace(image, split="train") for image in normals if image.path in chosen]

    def shots(self, arm: Arm, seed: int) -> dict[str, list[str]]:
        """By category, the paths below ``data`` of the pictures that an arm of few shots learns from."""
        found: dict[str, list[str]] = {}
        for image in self.learned(arm, seed):
            found.setdefault(image.category, []).append(self.relative(image))
        return {category: sorted(own) for category, own in sorted(found.items())}

    def relative(self, image: Image) -> str:
        """Its path below ``data``."""
        return Path(image.path).relative_to(self.data).as_posix()


# -- samples --------------------------------------------------------------------------------------------


def round_of(case: Case, arm: Arm, seed: int) -> Round:
    """The samples of an arm as a round of the product plans them; nothing is made yet."""
    section = dict(SYNTHESES[arm.synthesis or "mix"])
    textures = []
    if "preset" in section:
        textures = textures_in(str(textures_folder(case)))
        section["textures"] = str(textures_folder(case))
    raw = {
        "source": str(case.data),
        "samples": SAMPLES * len(case.categories),
        "seed": seed,
        "generation": section,
        "output": {"shard_size": SHARD},
    }
    config: Config = parse_config(raw, name=arm.synthesis or "mix")
    return round_from(0, config, config.generation, case.learned(arm, seed), textures)


textures_in = functools.cache(scan_textures)


def textures_folder(case: Case) -> Path:
    """``textures`` beside the data sets, or textures that the code draws."""
    if (case.data / "textures").is_dir():
        return case.data / "textures"
    drawn = case.work / "textures"
    if not drawn.exists():
        from tests.benchmarks.synthesis import draw_textures

        drawn.mkdir(parents=True)
        draw_textures(drawn)
    return drawn


def synthesis_digest(round_: Round) -> str:
    """Which samples an arm learns from: of the mix's settings with their defaults, its models, prompts and
    seed, the textures and the pictures. The code that makes them is not in it: see ``code`` of a cell."""
    told = json.loads(round_.fingerprint())
    told["generation"]["textures"] = sorted(round_.textures)  # in place of where they lie
    parts = ("generation", "models", "output", "prompts", "samples", "seed")
    settings = {name: told[name] for name in parts if name in told}
    return hashlib.sha256(canonical_json([settings, sorted(round_.images)]).encode()).hexdigest()[:16]


def samples_folder(case: Case, arm: Arm, seed: int, round_: Round) -> Path:
    """Named by everything that decides the samples, so that a stale set is never taken for a fresh one."""
    ids = "".join(sorted(round_.images))
    digest = hashlib.sha256((round_.fingerprint() + ids).encode()).hexdigest()[:8]
    shots = f"-{arm.shots}shot" if arm.shots else ""
    return case.work / f"{arm.synthesis}{shots}-{seed}-{digest}"


def make(case: Case, arm: Arm, seed: int) -> dict[str, Any]:
    """The samples of an arm, made once, a shard at a time: how many ``recipes`` and ``accepted``, and the
    ``seconds`` of CPU time that they took."""
    round_ = round_of(case, arm, seed)
    folder = samples_folder(case, arm, seed, round_)
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "made.json"
    made: list[dict[str, Any]] = json.loads(record.read_text()) if record.exists() else []
    for shard in range(len(made), round_.shard_count):
        started = time.process_time()
        recipes = round_.plan(shard)
        accepted = [one for one in make_samples(round_, recipes) if one.members]
        packed = shards.pack((one.outcome.recipe.sample_id, one.members) for one in accepted)
        (folder / f"{shard:05d}.tar").write_bytes(packed.data)
        seconds = time.process_time() - started
        made.append({"recipes": len(recipes), "accepted": len(accepted), "seconds": seconds})
        write_file(record, made)
    return {key: sum(one[key] for one in made) for key in ("recipes", "accepted", "seconds")}


@dataclass(frozen=True)
class Made:
    """The samples of an arm on disk; iterating reads them, so that they are never all in memory."""

    files: Sequence[ShardFile]

    def __iter__(self) -> Iterator[Sample]:
        return read_samples(self.files)

    def __len__(self) -> int:
        return sum(file.accepted for file in self.files)


def samples(case: Case, arm: Arm, seed: int) -> Made:
    """What :func:`make` made; nothing for an arm that takes none."""
    if arm.synthesis is None:
        return Made([])
    folder = samples_folder(case, arm, seed, round_of(case, arm, seed))
    made = json.loads((folder / "made.json").read_text())
    return Made([ShardFile(str(folder / f"{k:05d}.tar"), one["accepted"]) for k, one in enumerate(made)])


# -- training -------------------------------------------------------------------------------------------


def busy_seconds() -> float:
    """CPU time of this process, a thread: what has passed on a machine without other work if all threads
    were busy. Budgets and costs of training are in it, so that other work shortens no arm's training."""
    return time.process_time() / THREADS


class Clock:
    """A training's ``on_step``: when which step was over."""

    def __init__(self) -> None:
        self.ends: list[tuple[int, float]] = []

    def __call__(self, step: int, _steps: int, _losses: dict[str, float]) -> None:
        self.ends.append((step, busy_seconds()))

    @property
    def pace(self) -> float:
        """Busy seconds a step, the first one left out."""
        (first, start), (last, end) = self.ends[0], self.ends[-1]
        return (end - start) / (last - first)


def measure(case: Case, arm: Arm, seed: int) -> dict[str, Any]:
    """Everything of one cell; plain values of JSON."""
    judged, cost = _measure_peer(case, arm, seed) if arm.peer else _measure_own(case, arm, seed)
    return {**cost, **figures(case, judged)}


def _measure_own(case: Case, arm: Arm, seed: int) -> tuple[list[Judged], dict[str, Any]]:
    round_ = round_of(case, arm, seed)
    max_side = round_.config.output.max_side
    normals = normals_of(round_)
    calibration = calibration_normals(round_, normals, None, lambda _count: None)
    made = samples(case, arm, seed)
    settings = protocol.get(arm.detector).settings()
    if arm.steps is not None:
        settings = settings.model_copy(update={"steps": arm.steps})
    elif settings.steps:
        steps = steps_within(60 * case.minutes, arm.detector, settings, made, normals, calibration)
        settings = settings.model_copy(update={"steps": steps})
    clock = Clock()
    started = busy_seconds()
    detector = train(
        arm.detector,
        settings,
        made,
        normals,
        calibration,
        seed=seed,
        on_step=clock,
    )
    fitted = busy_seconds() - started
    images = [image for image in case.images if image.split == case.split]
    seconds = []
    for image in images[:TIMED]:
        small = square(load(image, max_side=max_side), settings.size)
        start = time.perf_counter()
        next(predict(detector, [small], [image.category]))
        seconds.append(time.perf_counter() - start)
    cost = {
        "fit_seconds": fitted,
        "steps": settings.steps,
        "step_seconds": clock.pace if settings.steps else None,
        "epoch_seconds": epoch_seconds(
            fitted, clock.pace if settings.steps else None, len(made), settings.batch
        ),
        "picture_seconds": statistics.median(seconds),
        "peak_bytes": peak_bytes(),
        "input": settings.size,
        "samples": len(made),
    }
    found = judge(detector, images, max_side)
    return [at_side(one.image, one.score, one.map) for one in found], cost


def epoch_seconds(fitted: float, step: float | None, samples: int, batch: int) -> float:
    """Of as many draws as there are samples; of what takes no steps, the whole fit."""
    return fitted if step is None else step * samples / batch


def normals_of(round_: Round) -> list[Normal]:
    """The train split's, as the samples' pictures were read."""
    max_side = round_.config.output.max_side
    return [
        Normal(image.image_id, image.category, load(image, max_side=max_side))
        for image in round_.images.values()
        if image.split == "train"
    ]


def steps_within(
    budget: float,
    name: str,
    settings: protocol.Settings,
    made: Made,
    normals: Sequence[Normal],
    calibration: Sequence[Normal],
) -> int:
    """As many steps as fit into ``budget`` seconds beside what else a fit takes, at least ``PROBED``.

    A few steps are timed on few pictures and on twice as many: what a fit takes without its steps is partly
    the same for any number (models are loaded), partly grows with it (features, closed-form parts).
    """
    categories = sorted({normal.category for normal in normals})

    def probe(times: int) -> tuple[int, float, float]:
        """Pictures, busy seconds without the steps, and busy seconds a step."""
        few = [normal for c in categories for normal in [n for n in normals if n.category == c][: 2 * times]]
        part = list(islice(made, 2 * times * settings.batch))
        clock = Clock()
        started = busy_seconds()
        train(
            name,
            settings.model_copy(update={"steps": PROBED}),
            part,
            few,
            calibration[: len(categories)],
            seed=0,
            on_step=clock,
        )
        return len(few) + 2 * len(part), busy_seconds() - started - PROBED * clock.pace, clock.pace

    probe(1)  # what only the first fit of a process takes
    (small, rest, _), (large, more, pace) = probe(1), probe(2)
    growth = max(more - rest, 0.0) / max(large - small, 1)
    rest = more + growth * (len(normals) + 2 * len(made) - large)
    return max(PROBED, int((budget - rest) / pace))


def _measure_peer(case: Case, arm: Arm, seed: int) -> tuple[list[Judged], dict[str, Any]]:
    """anomalib's: pictures there and maps back as ``.npz``, in a folder that stays until the cell is done, so
    that one that was stopped goes on with the models that are not fitted yet."""
    categories = case.categories_of(arm)
    made = samples(case, arm, seed)
    pairs: dict[str, list[tuple[np.ndarray, ...]]] = {category: [] for category in categories}
    for sample in made:
        if sample.category in pairs:
            assert sample.normal is not None
            image, normal = square(sample.image, SIDE), square(sample.normal, SIDE)
            pairs[sample.category].append((image, small_mask(sample.mask, SIDE), normal))
    learned = [image for image in case.learned(arm, seed) if image.split == "train"]
    judged: list[Judged] = []
    options = ["--model", arm.detector, "--seed", str(seed), "--textures", textures_folder(case)]
    options += ["--seconds", str(60 * case.minutes), "--coreset", str(CORESET)]
    options += ["--pairs"] if arm.synthesis else []
    script = SCRIPTS / "peer_detectors.py"
    shown = [image.image_id for image in (*learned, *case.images)]
    what = [case.split, *map(str, options), script.read_text(), shown, [one.sample_id for one in made]]
    folder = case.work / f"peer-{hashlib.sha256(canonical_json(what).encode()).hexdigest()[:16]}"
    folder.mkdir(exist_ok=True)
    for category in categories:
        arrays = {
            "train": _stack([image for image in learned if image.category == category]),
            "judged": _stack(case.of(category, case.split)),
        }
        if own := pairs[category]:
            parts = zip(*own, strict=True)
            arrays |= dict(zip(("image", "mask", "normal"), map(np.stack, parts), strict=True))
        np.savez(folder / f"{category}.npz", **arrays)
    found = run_peer(script.name, [folder, *options], THREADS)
    for category in categories:
        with np.load(folder / f"{category}.found.npz", allow_pickle=False) as stored:
            maps, scores = stored["maps"], stored["scores"].tolist()
        judged += map(at_side, case.of(category, case.split), scores, maps)
    shutil.rmtree(folder)
    rows = found["models"]
    steps = sum(row["steps"] for row in rows)
    cost = {
        "fit_seconds": sum(row["fit_seconds"] for row in rows),
        "steps": steps,
        "step_seconds": sum(row["steps"] * row["step_seconds"] for row in rows) / steps if steps else None,
        "epoch_seconds": sum(row["epoch_seconds"] for row in rows),
        "picture_seconds": statistics.median(row["picture_seconds"] for row in rows),
        "peak_bytes": found["peak_bytes"],
        "input": SIDE,
        "samples": len(made),
        "version": found["version"],
    }
    return judged, cost


def _stack(images: Sequence[Image]) -> np.ndarray:
    """uint8, N×SIDE×SIDE×3."""
    return np.stack([square(load(image, max_side=1024), SIDE) for image in images])


def peak_bytes() -> int:
    """Resident memory of this process, the highest so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


# -- figures --------------------------------------------------------------------------------------------


def at_side(image: Image, score: float, scores: np.ndarray) -> Judged:
    return Judged(image, score, at_size(scores, SIDE, SIDE), truth(image, SIDE), ignored(image, SIDE))


def figures(case: Case, judged: Sequence[Judged]) -> dict[str, Any]:
    """Each category's figures and their means; see :func:`mean_of_data_sets`.

    The resamples of the means are kept: they are of the same groups in every cell, so cells can be compared
    pair by pair.
    """
    categories: dict[str, dict[str, Estimate]] = {}
    for number, category in enumerate(case.categories):  # the same resamples for every arm
        own = [entry for entry in judged if entry.image.category == category]
        good = [entry for entry in own if not entry.anomalous]
        if not good or len(good) == len(own):
            continue
        groups = [entry.image.group for entry in own]
        seed = np.random.SeedSequence(0, spawn_key=(number,))
        labels = np.array([entry.anomalous for entry in own])
        scores = np.array([entry.score for entry in own])
        found = evaluate_images(scores, labels, groups, resamples=RESAMPLES, seed=seed)
        masks = [entry.mask for entry in own if entry.mask is not None]
        if len(masks) == len(own):
            maps, skipped = [entry.map for entry in own], [entry.ignore for entry in own]
            found |= evaluate_pixels(maps, masks, groups, skipped, resamples=RESAMPLES, seed=seed)
        categories[category] = {metric: redrawn(found[metric]) for metric in METRICS if metric in found}
    sets = {category: case.data_set(category) for category in categories}
    means = {
        metric: mean_of_data_sets({c: row[metric] for c, row in categories.items() if metric in row}, sets)
        for metric in METRICS
    }
    return {
        "categories": {c: {m: told(e) for m, e in row.items()} for c, row in categories.items()},
        "means": {m: {**told(e), "resamples": np.round(e.resamples, 5).tolist()} for m, e in means.items()},
    }


def mean_of_data_sets(estimates: Mapping[str, Estimate], data_set: Mapping[str, str]) -> Estimate:
    """The mean over data sets of the mean over the categories of each: near-identical categories of one data
    set count once.

    >>> rows = {"a": 0.2, "b": 0.4, "c": 0.9}
    >>> found = {name: Estimate(value, np.array([value])) for name, value in rows.items()}
    >>> round(mean_of_data_sets(found, {"a": "papers", "b": "papers", "c": "nuts"}).value, 3)
    0.6
    """
    sets: dict[str, list[Estimate]] = {}
    for category, estimate in estimates.items():
        sets.setdefault(data_set[category], []).append(estimate)
    return mean_estimate([mean_estimate(own) for own in sets.values()])


def redrawn(estimate: Estimate) -> Estimate:
    """Resamples that are undefined (no good picture was drawn, or no defect) give way to others that are, as
    if drawn again: or one small category would leave the mean without an interval."""
    undefined = np.isnan(estimate.resamples)
    if undefined.all() or not undefined.any():
        return estimate
    again = np.resize(estimate.resamples[~undefined], undefined.sum())
    resamples = estimate.resamples.copy()
    resamples[undefined] = again
    return Estimate(estimate.value, resamples)


def told(estimate: Estimate) -> dict[str, Any]:
    low, high = estimate.interval
    return {"mean": estimate.value, "low": low, "high": high}
