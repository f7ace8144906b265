"""A round's detector: trained on its samples, judged on real pictures."""

from __future__ import annotations

import datetime
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from detectors.protocol import Detector, Settings
from generation.backbones import square
from manifests.ahead import in_order
from manifests.errors import FlawsmithError, PictureError
from manifests.pictures import load, small_mask
from manifests.schema import DECISIONS, GOOD, LEAKING, METRICS, SCORES, Image, to_table
from manifests.workspace import Workspace, round_file
from training import checkpoints
from training.comparison import compare
from training.components import component_contrast, component_recall, label_components
from training.evaluation import Judged, figures, ignored, judge, predict, score_rows
from training.examples import Normal
from training.fitting import processes
from training.fitting import train as fit_detector
from training.loading import (
    FeatureSample,
    Sample,
    ShardFile,
    read_all_samples,
    read_samples,
)
from training.resuming import Slot
from training.tiling import is_tiled, scored_shape, tile_normals, tile_samples
from workflows import history
from workflows.console import progress, say
from workflows.heatmaps import remove_heatmaps, write_heatmaps
from workflows.rounds import open_round, vetoes
from workflows.stages import Round, device, evenly, read_settings

STATE = "training.state"  # in a round's folder while its detector is trained
FEW = 5  # below so many calibration normals, augmented train pictures serve too
HELD_OUT = 10  # one sample in so many is kept from training, to be judged as heldout_synthetic
HELD_OUT_STEP = 3  # prime to it, so that shards of any size keep as many

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

ALARMS = pa.schema(
    [
        ("image_id", pa.string()),
        ("category", pa.string()),
        ("split", pa.string()),  # train | calibration
        ("excess", pa.float64()),  # share above the alarm threshold, over what its quantile lets expect
        ("y", pa.float64()),  # of the highest place, as shares of the sides
        ("x", pa.float64()),
    ]
)
MOST_NORMALS = 100  # a category and split that are searched for false alarms


JUDGED = ("scores.parquet", "metrics.parquet", "alarms.parquet", "found.parquet")  # tables, as they come


def checkpoint_folder(number: int, name: str) -> str:
    return f"rounds/{number:03d}/detectors/{name}"


def train(space: Workspace, number: int) -> bool:
    """Trains the round's detector from its shards and the train split's normals; whether it did.

    Skipped if a detector is there that can be loaded and that no later veto concerns. A new detector makes
    void what rested on the old one, so that is removed. Of several processes (``accelerate launch``) each
    works on its share of the samples, and the first alone writes.

    Raises:
        UsageError: the settings are wrong, or there is nothing to train on.
    """
    round_ = open_round(space, number)
    name = round_.config.detector.name
    first_process = processes()[0] == 0
    vetoed = _vetoed(space, round_)
    state = round_file(number, STATE)
    before = _trained_without(space, number)
    if before == vetoed:
        if first_process:
            space.remove(state)
        say(f"round {number}: {name} is trained")
        return False
    _, settings = round_.config.detector.resolved()
    max_side, tiles = round_.config.output.max_side, round_.config.detector.tiles
    shrunk = settings.size if tiles is None else None
    images = [image for image in round_.images.values() if image.split == "train" and image.defect == GOOD]
    with progress(f"round {number}: reading normals", None, "pictures") as advance:
        normals = _normals(images, max_side, shrunk, advance)
        calibration = calibration_normals(round_, normals, shrunk, advance)
    samples = _mix(space, round_, held=settings.patience is not None)
    learned = _learned(space, round_, write=first_process)
    with progress(f"round {number}: training {name}", settings.steps, "steps") as advance:
        done = 0

        def on_step(step: int, _steps: int, _losses: dict[str, float]) -> None:
            nonlocal done
            advance(step - done)
            done = step

        detector = fit_detector(
            name,
            settings,
            samples if tiles is None else tile_samples(_pictures(samples), settings.size, tiles),
            normals if tiles is None else list(tile_normals(normals, settings.size, tiles)),
            calibration if tiles is None else list(tile_normals(calibration, settings.size, tiles)),
            seed=round_.config.seed,
            device=device(),
            weight=partial(_weight, round_=round_, learned=learned),
            slot=Slot(
                read=lambda: space.read_bytes(state) if space.exists(state) else None,
                write=lambda data: space.write_bytes(state, data),
            ),
            folder=space.path("") if space.is_local else None,
            on_step=on_step,
            say=lambda line: say(f"round {number}: training {name}: {line}"),
        )
    if not first_process:
        return True
    remove_results(space, number)
    if before is not None:
        _mark_decisions(space, number, vetoed)
    licences = [image.licence for image in round_.images.values() if image.licence]
    # Its own one is of the quantile that it fixes, and of single tiles.
    thresholds, detector.calibration["threshold"] = alarm_thresholds(round_, detector, calibration)
    windows = {image.window for image in round_.images.values() if image.window}
    notes = {
        "max_side": max_side,
        "tiles": tiles,
        "window": list(windows.pop()) if len(windows) == 1 else None,
        "places": any(image.roi_path or image.ignore_path for image in images),  # some do not count
        "vetoed": vetoed,
        "thresholds": {category: score for category, (score, _) in thresholds.items()},
        "map_thresholds": {category: value for category, (_, value) in thresholds.items()},
    }
    folder = checkpoint_folder(number, name)
    with tempfile.TemporaryDirectory() as aside:
        checkpoints.save(aside, name, detector, seed=round_.config.seed, licences=licences, notes=notes)
        for file in (checkpoints.WEIGHTS, checkpoints.CONFIG):
            space.write_bytes(f"{folder}/{file}", (Path(aside) / file).read_bytes())
    space.remove(state)
    return True


def _mixed_rounds(space: Workspace, round_: Round) -> list[int]:
    """The rounds whose samples the round's detector learns from: its own and, where they have a weight, the
    earlier ones of the same configuration."""
    if round_.config.training.earlier == 0:
        return [round_.number]
    _, _, first = read_settings(space, round_.number)
    return list(range(first, round_.number + 1))


def _vetoed(space: Workspace, round_: Round) -> list[str]:
    """The rejected ones of the samples that the round's detector learns from."""
    mixed = [f"{number:03d}-" for number in _mixed_rounds(space, round_)]
    return sorted(sample_id for sample_id in vetoes(space) if sample_id[:4] in mixed)


def _mix(space: Workspace, round_: Round, *, held: bool) -> Iterator[Sample | FeatureSample]:
    """This process's share of the samples to train on, with the held-out ones if ``held``."""
    generators = round_.config.training.generators

    def wanted(recipe: dict[str, Any]) -> bool:
        return generators.get(recipe["generator"], 1.0) > 0 and (held or not held_out(recipe["sample_id"]))

    rank, ranks = processes()
    shards = [shard for number in _mixed_rounds(space, round_) for shard in _shards(space, number)]
    return read_all_samples(shards, vetoes(space), wanted=wanted, rank=rank, ranks=ranks)


def _pictures(samples: Iterator[Sample | FeatureSample]) -> Iterator[Sample]:
    """Without those of features, which have no tiles."""
    return (sample for sample in samples if isinstance(sample, Sample))


def _learned(space: Workspace, round_: Round, *, write: bool) -> dict[str, float]:
    """By sample id, the learned weights of the rounds that are mixed; none where they are not asked for."""
    if not round_.config.training.weigh:
        return {}
    from workflows.weighing import sample_weights  # it asks the proxy, whose stage imports this one

    mixed = [open_round(space, number) for number in _mixed_rounds(space, round_)]
    return {k: v for one in mixed for k, v in sample_weights(space, one, write=write).items()}


def _weight(sample: Sample | FeatureSample, round_: Round, learned: Mapping[str, float]) -> float:
    """Of a sample in the round's mix; 0 for the held-out ones."""
    if held_out(sample.recipe["sample_id"]):  # a tile's own name says more
        return 0.0
    training = round_.config.training
    age = round_.number - sample.recipe["round"]
    weight = training.earlier**age * training.generators.get(sample.recipe["generator"], 1.0)
    return weight * learned.get(sample.recipe["sample_id"], 1.0)


def _trained_without(space: Workspace, number: int) -> list[str] | None:
    """The rejected samples that the round's detector knew of; None if there is none that can be loaded."""
    try:
        _, notes = load_detector(space, number)
    except FlawsmithError:
        return None
    return notes.get("vetoed")


def remove_results(space: Workspace, number: int) -> None:
    """Removes what rests on a round's detector: its figures, findings and gains, gains over it, what the next
    round was judged beside (its heat maps show what this one had missed), and the trials for a next round
    that has not begun."""
    for name in ("found.parquet", "alarms.parquet", "metrics.parquet", "scores.parquet", "stress.parquet"):
        space.remove(round_file(number, name))
    remove_heatmaps(space, number)
    space.remove(round_file(number + 1, "found.parquet"))
    if not space.exists(round_file(number + 1, "settings.yaml")):
        space.remove(round_file(number, "trials.parquet"))
        space.remove(round_file(number, "decisions.parquet"))
    rows = history.read(space)
    over = {row["round"] for row in rows if (row["name"], row["value"]) == ("against", str(number))}
    history.forget(space, {(number, "metric"), *((each, "gain") for each in {number, *over})})


def _mark_decisions(space: Workspace, number: int, vetoed: Sequence[str]) -> None:
    """Says beside decisions that a begun round rests on that they knew a detector which is no more."""
    name = round_file(number, "decisions.parquet")
    if not space.exists(name):
        return
    row = {
        "round": number,
        "setting": "review",
        "before": "as it was",
        "after": f"{len(vetoed)} {'sample' if len(vetoed) == 1 else 'samples'} rejected",
        "reason": "the round's detector was trained again, without what is rejected, after these decisions, "
        "which the next round keeps",
    }
    space.append_table(name, to_table([row], DECISIONS), {"setting": "review"})


def held_out(sample_id: str) -> bool:
    """Whether a sample is kept from training; by its place in the plan, so that vetoes move nothing, and
    begun elsewhere in every shard, so that small shards lose no more than large ones."""
    shard, index = map(int, sample_id.split("-")[-2:])
    return (index + HELD_OUT_STEP * shard) % HELD_OUT == 0


def samples_of(
    space: Workspace, number: int, wanted: Callable[[dict[str, Any]], bool] | None = None
) -> Iterator[Sample]:
    """The picture samples of a round that nobody rejected, in plan order. ``wanted`` is
    asked with their recipes, if given.

    Raises:
        FlawsmithError: the round has no shards yet.
    """
    return read_samples(_shards(space, number), vetoes(space), wanted=wanted)


def all_samples_of(space: Workspace, number: int) -> Iterator[Sample | FeatureSample]:
    """As :func:`samples_of`, with the samples of features."""
    return read_all_samples(_shards(space, number), vetoes(space))


def _shards(space: Workspace, number: int) -> list[ShardFile]:
    if not space.exists(round_file(number, "shards.parquet")):
        raise FlawsmithError(f"round {number} has no samples yet: `flawsmith run` or `generate` makes them")
    rows = space.read_table(round_file(number, "shards.parquet")).to_pylist()
    return [
        ShardFile(space.address(row["path"]), row["accepted"], row["bytes"], row["sha256"]) for row in rows
    ]


def calibration_normals(
    round_: Round, train_normals: Sequence[Normal], size: int | None, advance: Any
) -> list[Normal]:
    """Normals of the calibration split; a category with fewer than ``FEW`` gets train ones too, each in as
    few views (:func:`view`) as will do."""
    images = [i for i in round_.images.values() if i.split == "calibration" and i.defect == GOOD]
    normals = _normals(images, round_.config.output.max_side, size, advance)
    for category in round_.pool.normals:
        have = sum(normal.category == category for normal in normals)
        own = [normal for normal in train_normals if normal.category == category]
        normals += [view(own[k % len(own)], k // len(own)) for k in range(max(0, FEW - have))]
    return normals


def view(normal: Normal, number: int) -> Normal:
    """A normal as another part might look, in one of the ``FEW`` views; no two are equal, and none is what
    was trained on, unless the picture is its own mirror image.

    They are: mirrored left to right, mirrored top to bottom, turned by half; moved down and to the right by a
    32nd of the sides and lighter by a twentieth; moved the other way and darker [inferred; core.md 3.8 says
    no more than "augmented"]. What comes in at a border is mirrored. ``ignore`` goes with the picture.
    """
    move, gain = VIEWS[number]
    pixels = np.rint(move(normal.pixels) * gain).clip(0, 255).astype(np.uint8)
    ignore = None if normal.ignore is None else np.ascontiguousarray(move(normal.ignore))
    return replace(normal, pixels=np.ascontiguousarray(pixels), ignore=ignore)


def _moved(pixels: np.ndarray, way: int) -> np.ndarray:
    """H×W or H×W×C, down and to the right (``way`` 1) or up and to the left (−1)."""
    height, width = pixels.shape[:2]
    steps = max(1, round(height / 32)), max(1, round(width / 32))
    sides = [(step, 0) if way > 0 else (0, step) for step in steps]
    padded = np.pad(pixels, [*sides, *[(0, 0)] * (pixels.ndim - 2)], mode="symmetric")
    return padded[:height, :width] if way > 0 else padded[-height:, -width:]


VIEWS: tuple[tuple[Callable[[np.ndarray], np.ndarray], float], ...] = (  # and by what light is multiplied
    (lambda pixels: pixels[:, ::-1], 1.0),
    (lambda pixels: pixels[::-1], 1.0),
    (lambda pixels: pixels[::-1, ::-1], 1.0),
    (partial(_moved, way=1), 1.05),
    (partial(_moved, way=-1), 0.95),
)


def _normals(images: Sequence[Image], max_side: int | None, size: int | None, advance: Any) -> list[Normal]:
    """Read in threads; kept at the detector's input size, so that many fit into memory. ``size`` None: as
    they are, to be cut in tiles."""

    def read(image: Image) -> Normal:
        pixels = load(image, max_side=max_side)
        pixels = pixels if size is None else square(pixels, size)
        return Normal(image.image_id, image.category, pixels, ignored(image, pixels.shape[:2]))

    normals = []
    for normal in in_order(read, images):
        normals.append(normal)
        advance(1)
    return normals


def trained(space: Workspace, number: int) -> str:
    """Path or URL of the folder of a round's trained detector.

    Raises:
        FlawsmithError: it is not there.
    """
    name = open_round(space, number).config.detector.name
    folder = checkpoint_folder(number, name)
    if not space.exists(f"{folder}/{checkpoints.CONFIG}"):
        raise FlawsmithError(f"round {number} has no trained {name} yet: `flawsmith train` makes it")
    return space.address(folder)


def load_detector(space: Workspace, number: int) -> tuple[Detector, dict[str, Any]]:
    """The trained detector of a round, and the notes of its training.

    Raises:
        FlawsmithError: it is not there or cannot be used.
    """
    stored = trained(space, number)
    return checkpoints.load(stored, device()), checkpoints.read_config(stored).get("notes", {})


# -- judging --------------------------------------------------------------------------------------------


def warn_of_leak(name: str, settings: Settings) -> None:
    """Wherever figures of real pictures are worked out or shown."""
    if settings.leak is not None:
        say(f"warning: {name}: {settings.leak}: its figures leak, compare them with such alone")


def warn_of_vetoes(space: Workspace, round_: Round) -> None:
    """Where a round's figures are of a detector that learned before samples were rejected or restored."""
    stored = checkpoint_folder(round_.number, round_.config.detector.name)
    if not space.exists(f"{stored}/{checkpoints.CONFIG}"):
        return
    knew = checkpoints.read_config(space.address(stored)).get("notes", {}).get("vetoed")
    if knew is not None and knew != _vetoed(space, round_):
        say(
            f"warning: round {round_.number}: its detector and figures are from before samples were rejected "
            "or restored; `flawsmith run`, or `train` and `evaluate`, make them anew"
        )


def marked(name: str, settings: Settings) -> str:
    """A detector's name as it stands beside its figures, in tables, charts and files of them."""
    return name if settings.leak is None else f"{name} {LEAKING}"


def evaluate(space: Workspace, number: int, against: int | None = None) -> bool:
    """Judges a round's detector on the feedback split and on held-out samples; whether it did. ``against``
    is a round whose detector it is compared with too (:func:`compare_rounds`), while the scores are at hand.

    Writes ``scores.parquet``, ``metrics.parquet``, the aggregates to the history, and heat maps of the worst
    pictures; ``found.parquet`` (what was found of each defect) comes last and is, beside them, the mark that
    the round was judged.
    """
    round_ = open_round(space, number)
    warn_of_leak(round_.config.detector.name, round_.config.detector.resolved()[1])
    if all(space.exists(round_file(number, name)) for name in JUDGED):
        warn_of_vetoes(space, round_)
        return False
    detector, notes = load_detector(space, number)
    judged = _judge(round_, detector, "feedback", f"round {number}: judging feedback pictures")
    alarms = notes["thresholds"]
    metric_rows = _write_figures(space, round_, judged, "feedback", alarms)
    normals = [i for i in round_.images.values() if i.split == "calibration" and i.defect == GOOD]
    tiles, max_side = round_.config.detector.tiles, round_.config.output.max_side
    calibration = judge(detector, normals, max_side, tiles=tiles)
    held = _judge_samples(space, round_, detector)
    _write_figures(space, round_, held + calibration, "heldout_synthetic", alarms)
    means = {
        row["metric"]: row["value"]
        for row in metric_rows
        if (row["category"], row["defect"], row["size"]) == ("mean", "all", "all")
    }
    shown = {f"feedback.{name}": f"{value:.4f}" for name, value in means.items()}
    history.remember(space, number, "metric", shown)
    thresholds = _stored_thresholds(notes)
    found = what_was_found(round_, judged, thresholds)
    before = round_file(number - 1, "found.parquet")
    earlier = space.read_table(before).to_pylist() if number and space.exists(before) else []
    write_heatmaps(space, number, "feedback", judged, found, thresholds, earlier, max_side)
    rows = false_alarms(round_, detector, thresholds, calibration)
    space.write_table(round_file(number, "alarms.parquet"), to_table(rows, ALARMS))
    if against is not None:
        compare_rounds(space, against, number, judged)
    space.write_table(round_file(number, "found.parquet"), to_table(found, FOUND))
    return True


def compare_rounds(
    space: Workspace, first: int, second: int, judged: Sequence[Judged] | None = None
) -> dict[str, str]:
    """How much better one round's detector is than another's on the feedback pictures of the later, as it is
    kept in the history (kind ``gain``): ``against`` (the first round), ``metric`` (pixel AP, image AP without
    masks), ``difference``, ``low`` and ``high`` of its interval, each for the mean over categories;
    ``against`` alone where there is nothing to compare on.

    Args:
        judged: these pictures as the second detector has scored them; None: they are scored again.
    """
    round_ = open_round(space, second)

    def again(number: int) -> list[Judged]:
        return _judge(round_, load_detector(space, number)[0], "feedback", f"round {number}: scoring again")

    one, other = again(first), judged if judged is not None else again(second)
    found = {"against": str(first)} | _difference(one, other, round_.config.evaluation.resamples)
    history.remember(space, second, "gain", found)
    return found


def _difference(one: Sequence[Judged], other: Sequence[Judged], resamples: int) -> dict[str, str]:
    """The part of a gain that :func:`compare_rounds` works out."""
    if not any(entry.anomalous for entry in one):
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # undefined figures give no row
        rows = compare(one, other, resamples=resamples, parts=False)
    for metric in ("pixel_ap", "image_ap"):
        own = {row["category"]: row for row in rows if row["metric"] == metric}
        row = own.get("mean") or next(iter(own.values()), None)
        if row is not None:
            return {"metric": metric} | {name: str(row[name]) for name in ("difference", "low", "high")}
    return {}


def evaluate_final(space: Workspace) -> None:
    """Scores the test split for every judged round that was not scored yet, and logs each look.

    Raises:
        PictureError: pictures of some rounds cannot be read; the others are scored.
    """
    unread: list[str] = []
    for number in space.rounds():
        round_ = open_round(space, number)
        if not any(image.split == "test" for image in round_.images.values()):
            say(f"round {number}: its sources have no test pictures (test/good, test/DEFECT) to score")
            continue
        metrics = round_file(number, "metrics.parquet")
        if not space.exists(metrics):
            say(f"round {number}: not judged yet, left out")
            continue
        if "test" in space.read_table(metrics)["split"].to_pylist():
            say(f"round {number}: the test split was scored before; the stored figures stand")
            continue
        detector, notes = load_detector(space, number)
        warn_of_leak(round_.config.detector.name, detector.settings)
        when = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        try:
            judged = _judge(round_, detector, "test", f"round {number}: scoring the test split")
        except PictureError as error:  # of an earlier configuration, perhaps
            unread.append(f"round {number} is not scored: {error}")
            continue
        look = {"round": number, "when": when, "pictures": len(judged)}
        space.append_table("looks.parquet", pa.Table.from_pylist([look]), {"round": number, "when": when})
        thresholds = _stored_thresholds(notes)
        found = what_was_found(round_, judged, thresholds)
        write_heatmaps(
            space, number, "test", judged, found, thresholds, max_side=round_.config.output.max_side
        )
        _write_figures(space, round_, judged, "test", notes["thresholds"])
    if unread:
        raise PictureError("; ".join(unread))


def _stored_thresholds(notes: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """By category: the alarm thresholds of (picture scores, map values)."""
    on_maps = notes["map_thresholds"]
    return {category: (score, on_maps[category]) for category, score in notes["thresholds"].items()}


def _judge(round_: Round, detector: Detector, split: str, title: str) -> list[Judged]:
    images = [image for image in round_.images.values() if image.split == split]
    with progress(title, len(images), "pictures") as advance:
        return judge(
            detector,
            images,
            round_.config.output.max_side,
            lambda _done, _total: advance(1),
            tiles=round_.config.detector.tiles,
        )


def _judge_samples(space: Workspace, round_: Round, detector: Detector) -> list[Judged]:
    """The samples kept from training, labelled by their generators; by category."""
    tiles = round_.config.detector.tiles
    own = samples_of(space, round_.number, lambda recipe: held_out(recipe["sample_id"]))
    held = sorted(own, key=lambda sample: sample.category)
    shapes = [scored_shape(s.image.shape[:2], detector.settings.size, tiles) for s in held]
    places = [ignored(round_.images[s.image_id], shape) for s, shape in zip(held, shapes, strict=True)]
    found = predict(detector, [s.image for s in held], [s.category for s in held], tiles, places)
    judged = []
    for sample, (score, scores), skipped in zip(held, found, places, strict=True):
        source = round_.images[sample.image_id]
        image = Image(
            **{
                **{name: getattr(source, name) for name in Image.__dataclass_fields__},
                "image_id": sample.sample_id,
                "defect": sample.recipe["generator"],
            }
        )
        judged.append(Judged(image, score, scores, small_mask(sample.mask, scores.shape), skipped))
    return judged


def _write_figures(
    space: Workspace, round_: Round, judged: list[Judged], split: str, thresholds: dict[str, float]
) -> list[dict[str, Any]]:
    labels: dict[str, Any] = {
        "round_": round_.number,
        "detector": marked(round_.config.detector.name, round_.config.detector.resolved()[1]),
        "split": split,
        "training_seed": round_.config.seed,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # undefined figures give no row, which the tables show as "–"
        resamples = round_.config.evaluation.resamples
        rows = figures(judged, **labels, resamples=resamples, thresholds=thresholds)
    replace = {"split": split}
    scores = to_table(score_rows(judged, **labels), SCORES)
    space.append_table(round_file(round_.number, "scores.parquet"), scores, replace)
    space.append_table(round_file(round_.number, "metrics.parquet"), to_table(rows, METRICS), replace)
    return rows


def alarm_thresholds(
    round_: Round, detector: Detector, normals: Sequence[Normal]
) -> tuple[dict[str, tuple[float, float]], float]:
    """The stated quantile of calibration normals' (picture scores, map values) by category, and that of the
    picture scores of all categories together, for pictures of none that is known."""
    quantile, tiles = round_.config.evaluation.quantile, round_.config.detector.tiles
    size = detector.settings.size
    thresholds, every = {}, []
    for category in sorted({normal.category for normal in normals}):
        own = [normal for normal in normals if normal.category == category]
        places: list[np.ndarray | None] = []
        for normal in own:
            shape, ignore = scored_shape(normal.pixels.shape[:2], size, tiles), normal.ignore
            places.append(ignore if ignore is None else small_mask(ignore, shape))
        scores, values = [], []
        pictures = (normal.pixels for normal in own)
        found = predict(detector, pictures, [category] * len(own), tiles, places)
        for (score, scored), skip in zip(found, places, strict=True):
            scores.append(score)
            values.append(scored.ravel() if skip is None else scored[~skip])
        on_maps = np.quantile(np.concatenate(values), quantile)
        thresholds[category] = (float(np.quantile(scores, quantile)), float(on_maps))
        every += scores
    return thresholds, float(np.quantile(every, quantile))


def false_alarms(
    round_: Round,
    detector: Detector,
    thresholds: Mapping[str, tuple[float, float]],
    calibration: Sequence[Judged],
) -> list[dict[str, Any]]:
    """One row for each normal of the train and calibration splits (at most ``MOST_NORMALS`` a category) that
    has more places above its category's map threshold than the quantile says.

    Args:
        calibration: the calibration normals, as the detector has scored them.
    """
    tiles, max_side = round_.config.detector.tiles, round_.config.output.max_side
    normals = [i for i in round_.images.values() if i.split == "train" and i.defect == GOOD]
    quantile = round_.config.evaluation.quantile
    rows = []
    for category in round_.pool.normals:
        own = evenly([image for image in normals if image.category == category], MOST_NORMALS)
        rows += _alarming(judge(detector, own, max_side, tiles=tiles), thresholds[category][1], quantile)
    for category in round_.pool.normals:
        judged = evenly([entry for entry in calibration if entry.image.category == category], MOST_NORMALS)
        rows += _alarming(judged, thresholds[category][1], quantile)
    return rows


def _alarming(judged: Sequence[Judged], threshold: float, quantile: float) -> list[dict[str, Any]]:
    """Rows of the normals with more places above a threshold than its quantile says."""
    rows = []
    for entry in judged:
        counts = np.ones(entry.map.shape, bool) if entry.ignore is None else ~entry.ignore
        if not counts.any():
            continue
        above = (entry.map > threshold) & counts
        excess = float(above[counts].mean()) / (1 - quantile)
        if excess <= 1:
            continue
        y, x = np.unravel_index(np.where(above, entry.map, -np.inf).argmax(), above.shape)
        rows.append(
            {
                "image_id": entry.image.image_id,
                "category": entry.image.category,
                "split": entry.image.split,
                "excess": excess,
                "y": (y + 0.5) / above.shape[0],
                "x": (x + 0.5) / above.shape[1],
            }
        )
    return rows


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
        pixels = load(image, max_side=round_.config.output.max_side)
        size = round_.config.detector.resolved()[1].size
        if round_.config.detector.tiles is None or not is_tiled(pixels.shape[:2], size):
            pixels = square(pixels, size)
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
