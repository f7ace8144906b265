"""Trained detectors on real pictures of any folder: how good one is, and which of two is better."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from detectors.protocol import Detector, get
from manifests.errors import UsageError
from manifests.schema import GOOD, Image, images_from
from manifests.sources import SourceSettings, check_masks, scan
from manifests.splits import side
from manifests.workspace import Workspace
from training.checkpoints import load, read_config
from training.comparison import compare as compare_results
from training.evaluation import Judged, Shape, figures, judge, map_shape
from training.intervals import RESAMPLES
from workflows.console import progress, say
from workflows.detecting import marked, warn_of_leak
from workflows.stages import device


def evaluate_on(
    checkpoint: str | Path,
    data: Path,
    resamples: int = RESAMPLES,
    roi: Path | None = None,
    ignore: Path | None = None,
    category: str | None = None,
) -> list[dict[str, Any]]:
    """Rows of :func:`training.evaluation.figures` (``split='test'``) on the test pictures of ``data``, a
    folder in MVTec AD layout; what its workspace trained on or keeps for its test split is left out. Nothing
    is written. Categories that the detector was not trained on are judged if it scores such, as `vlad` does
    (protocol Z of core.md 2.3); those that it was trained on are then left out, so that no mean is of both.

    Args:
        checkpoint: folder of a trained detector, or fsspec URL of one.
        roi, ignore: masks, or folders with ``<stem>.png`` of every picture in ``data``, as of a run's
            source. Where they are not named, the workspace's hold for the pictures that it knows.
        category: of the pictures in ``data``, which then are of one; None: its folder's name.

    Raises:
        UsageError: there are no pictures to judge on, there is no such mask, ``category`` is named for
            several, or the detector does not know their categories.
        CheckpointError: the checkpoint cannot be used.
    """
    check_masks(roi, ignore)
    detector, facts = load(checkpoint, device()), read_config(checkpoint)
    images = _from_data(data, [_workspace_images(checkpoint)], roi, ignore, category)
    _refuse_unknown(checkpoint, detector, images)
    images = _new_apart([checkpoint], [detector], images)
    judged = _results(checkpoint, detector, facts.get("notes", {}), images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # undefined figures give no row
        return figures(
            judged,
            round_=0,
            detector=marked(facts["detector"], detector.settings),
            split="test",
            training_seed=facts.get("seed", 0),
            resamples=resamples,
        )


def compare(
    first: str | Path,
    second: str | Path,
    data: Path | None = None,
    resamples: int = RESAMPLES,
    roi: Path | None = None,
    ignore: Path | None = None,
    category: str | None = None,
) -> list[dict[str, Any]]:
    """Rows of :func:`training.comparison.compare` for two checkpoints.

    The pictures are the feedback split of the workspace that ``first`` lies in, or those under test in
    ``data``, a folder in MVTec AD layout. What either workspace keeps for its test split is never looked at,
    nor anything it trained on: such pictures are left out of ``data``.

    Where categories are new to a detector that scores such, those that both were trained on are left out, as
    in :func:`evaluate_on`.

    Both maps are compared at one size: that of the larger input, or the picture's own if a detector scores in
    tiles.

    Args:
        first, second: folders of trained detectors, or fsspec URLs of such.
        roi, ignore, category: of the pictures in ``data``; as of :func:`evaluate_on`.

    Raises:
        UsageError: there are no pictures to compare on, there is no such mask, ``category`` is named for
            several, a detector does not know their categories, or some are new to one detector and others
            to the other or to both.
        CheckpointError: a checkpoint cannot be used.
    """
    check_masks(roi, ignore)
    folders = (first, second)
    detectors = [load(folder, device()) for folder in folders]
    notes = [read_config(folder).get("notes", {}) for folder in folders]
    kept = [_workspace_images(folder) for folder in folders]
    images = _feedback(first, kept) if data is None else _from_data(data, kept, roi, ignore, category)
    for folder, detector in zip(folders, detectors, strict=True):
        _refuse_unknown(folder, detector, images)
    images = _new_apart(folders, detectors, images)
    tiled = any(note.get("tiles") is not None for note in notes)
    size = max(detector.settings.size for detector in detectors)
    limits = [note.get("max_side") for note in notes]
    limit = None if None in limits else max(limits)

    def shape_of(image: Image) -> Shape:
        return map_shape(image, size, limit, 0.0 if tiled else None)

    one, other = (_results(*given, images, shape_of) for given in zip(folders, detectors, notes, strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # undefined figures give no row
        return compare_results(one, other, resamples=resamples)


def _results(
    folder: str | Path,
    detector: Detector,
    note: dict[str, Any],
    images: Sequence[Image],
    shape_of: Callable[[Image], Shape] | None = None,
) -> list[Judged]:
    """Read as the pictures that the detector was trained on, by what its checkpoint notes of them."""
    warn_of_leak(str(folder), detector.settings)
    if note.get("places") and not any(image.roi_path or image.ignore_path for image in images):
        say(
            f"warning: {folder}: in training some places did not count (region of interest, ignore mask); of "
            "these pictures all do; name their masks with --data, --roi and --ignore"
        )
    own = [_with_window(image, note.get("window")) for image in images]
    with progress(f"scoring with {folder}", len(own), "pictures") as advance:
        return judge(
            detector,
            own,
            note.get("max_side"),
            lambda _done, _total: advance(1),
            tiles=note.get("tiles"),
            shape_of=shape_of,
        )


def _refuse_unknown(folder: str | Path, detector: Detector, images: Sequence[Image]) -> None:
    unknown = sorted({image.category for image in images} - set(detector.categories))
    if unknown and not get(read_config(folder)["detector"]).open_categories:
        raise UsageError(
            f"{folder}: trained on {', '.join(detector.categories)}, not on {', '.join(unknown)}; where the "
            "pictures of --data are of one that it was trained on, name that with --category NAME, else name "
            "a detector of these categories, or another folder with --data"
        )


def _new_apart(
    folders: Sequence[str | Path], detectors: Sequence[Detector], images: Sequence[Image]
) -> list[Image]:
    """The pictures of categories that are new to the same detectors, if there are some; else all.

    Raises:
        UsageError: categories are new to different detectors, or have no defect.
    """
    new_to = {
        category: tuple(
            str(folder)
            for folder, detector in zip(folders, detectors, strict=True)
            if category not in detector.categories
        )
        for category in sorted({image.category for image in images})
    }
    kinds = {to for to in new_to.values() if to}
    if not kinds:
        return list(images)
    new = [category for category, to in new_to.items() if to]
    if len(kinds) > 1:
        told = "; ".join(f"{category} to {' and '.join(new_to[category])}" for category in new)
        raise UsageError(
            f"new: {told}; a mean over these would be of several kinds: name the folder of one with --data"
        )
    known = [category for category, to in new_to.items() if not to]
    apart = f"; {', '.join(known)}, trained on, left out: no mean is of both kinds" if known else ""
    say(f"zero-shot: {' and '.join(*kinds)} not trained on {', '.join(new)}{apart}")
    chosen = [image for image in images if new_to[image.category]]
    if not any(image.defect != GOOD for image in chosen):
        raise UsageError(f"no defect picture of {', '.join(new)}; name another folder with --data")
    return chosen


def _workspace_images(checkpoint: str | Path) -> list[Image] | None:
    """All pictures of the workspace that a checkpoint lies in; None if it lies in none."""
    place = str(checkpoint) if "://" in str(checkpoint) else str(Path(checkpoint).resolve())
    parts = place.rstrip("/").rsplit("/", 4)  # WORKSPACE/rounds/000/detectors/NAME
    if len(parts) < 5 or not parts[0]:
        return None
    space = Workspace(parts[0])
    return images_from(space.read_table("images.parquet")) if space.exists("images.parquet") else None


def _feedback(first: str | Path, kept: Sequence[list[Image] | None]) -> list[Image]:
    if kept[0] is None:
        raise UsageError(
            f"{first} lies in no workspace, whose feedback pictures would be compared on: name the pictures "
            "with --data FOLDER"
        )
    images = [image for image in kept[0] if image.split == "feedback"]
    images.sort(key=lambda image: image.category)  # some scores are of a category's pictures together
    other = {image.image_id: image.split for image in kept[1] or []}
    seen = [image for image in images if other.get(image.image_id, "feedback") != "feedback"]
    if seen:
        raise UsageError(
            f"{seen[0].path}: a feedback picture for the first detector, in the {other[seen[0].image_id]} "
            f"split for the second ({len(seen)} such pictures); compare on others with --data FOLDER"
        )
    if not any(image.defect != GOOD for image in images):
        raise UsageError("the feedback split has no defect picture to compare on; name some with --data")
    return images


def _from_data(
    data: Path,
    kept: Sequence[list[Image] | None],
    roi: Path | None,
    ignore: Path | None,
    category: str | None,
) -> list[Image]:
    masks = [None if path is None else str(path) for path in (roi, ignore)]
    found = scan([SourceSettings(path=str(data), roi=masks[0], ignore=masks[1])])
    for problem in found.problems:
        say(f"{problem.level}: {problem.path}: {problem.what}; {problem.remedy}")
    if any(images is None for images in kept):
        say(
            "warning: a detector lies in no workspace: pictures that it trained on, or that a test split "
            "keeps, cannot be told and left out"
        )
    # What belongs together, and where nothing counts, a workspace knows and a folder alone does not.
    known = {image.image_id: image for images in kept for image in images or []}
    images = found.images if category is None else _named(found.images, category, data)
    judged = [_as_known(image, known.get(image.image_id)) for image in images if side(image.split) == "test"]
    held = {image.image_id for images in kept for image in images or [] if image.split != "feedback"}
    chosen = [image for image in judged if image.image_id not in held]
    if len(chosen) < len(judged):
        say(
            f"{len(judged) - len(chosen)} of {len(judged)} pictures are left out: a workspace keeps them for "
            "its test split (`evaluate --final`) or trained on them"
        )
    if not any(image.defect != GOOD for image in chosen):
        raise UsageError(f"{data}: no defect picture is left to judge on; name another folder with --data")
    return chosen


def _named(images: Sequence[Image], category: str, data: Path) -> list[Image]:
    """The same pictures as of ``category``, whatever their folder is called."""
    names = sorted({image.category for image in images})
    if len(names) > 1:
        raise UsageError(
            f"--category {category}: {data} holds {len(names)} categories ({', '.join(names)}); name the "
            "folder of one of them with --data"
        )
    return [replace(image, category=category) for image in images]


def _as_known(image: Image, known: Image | None) -> Image:
    if known is None:
        return image
    return replace(
        image,
        group=known.group,
        roi_path=image.roi_path or known.roi_path,
        ignore_path=image.ignore_path or known.ignore_path,
    )


def _with_window(image: Image, window: Sequence[int] | None) -> Image:
    """16-bit pictures are read as those that the detector was trained on."""
    if image.bits != 16 or window is None:
        return image
    return replace(image, window_low=window[0], window_high=window[1])
