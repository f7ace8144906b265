"""A trained detector to score pictures with, however it is kept: a checkpoint's folder or an exported file.

An exported file runs on ONNX Runtime; torch is imported for a checkpoint only.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from manifests.errors import FlawsmithError, UsageError
from manifests.pictures import small_mask
from training.tiling import blend, is_tiled, windows, worst

EXPORTED = ".onnx"
PREFIX = "flawsmith."  # of the metadata's keys, as training.graph writes them
Places = Iterable[np.ndarray | None]
Score = Callable[[Iterable[np.ndarray], str | None, Places | None], Iterator[tuple[float, np.ndarray]]]


class RuntimeFileError(FlawsmithError):
    """An exported detector that is missing, damaged or no detector."""


@dataclass(frozen=True)
class Runtime:
    """A detector that is ready.

    Attributes:
        facts: what it says of itself: the contents of a checkpoint's ``config.yaml``, and more if exported.
        identity: sha256 (hex) of its files.
        score: ``score(pictures, category, ignore)`` gives (score, map), one a picture in order; pictures are
            uint8 H×W×C with C = 1 or 3 and consumed a few at a time, maps are float32. ``ignore`` is None, or
            one a picture, None or bool of the map's shape: true places raise no picture's score.
        ignores: whether it takes ``ignore``.
    """

    facts: Mapping[str, Any]
    identity: str
    score: Score
    ignores: bool = True


def open_detector(path: str | Path, device: str = "cpu") -> Runtime:
    """A detector from a checkpoint's folder, or from a file of ``flawsmith export-model --format onnx``.

    Args:
        path: of a checkpoint it may be an fsspec URL.

    Raises:
        FlawsmithError: it cannot be used, or a package is missing.
        UsageError: its scores depend on what else is scored (``Settings.leak``).
    """
    suffix = PurePath(path).suffix
    if suffix == ".pt2":
        raise UsageError(
            f"{path}: such files can run code when they are read; give the checkpoint or an .onnx"
        )
    return _exported(Path(path)) if suffix == EXPORTED else _checkpoint(path, device)


def alarm(facts: Mapping[str, Any], category: str | None) -> tuple[str | None, float]:
    """The category (the only one there is, if none is named) and the threshold of its scores; that over all
    categories if there are several. With none named, a file that was exported for a category has that one's.

    Raises:
        UsageError: the detector does not know the category.
    """
    categories = facts["categories"]
    if category is None and facts.get("category") is not None:
        return facts["category"], float(facts["threshold"])
    category = category or (categories[0] if len(categories) == 1 else None)
    overall = facts["calibration"]["threshold"]
    if category is None:
        return None, float(overall)
    if category not in categories and not facts.get("open_categories", False):
        raise UsageError(f"--category {category}: the detector was trained on {', '.join(categories)}")
    return category, float(facts.get("notes", {}).get("thresholds", {}).get(category, overall))


def export_model(checkpoint: str | Path, out: Path, format: str, category: str | None) -> dict[str, Any]:
    """Write a checkpoint as one file, see ``training.graph.export``; the category's own threshold decides, or
    that over all for one that it was not trained on."""
    from detectors.protocol import get
    from training import checkpoints, graph

    facts = checkpoints.read_config(checkpoint)
    facts["open_categories"] = get(facts["detector"]).open_categories
    category, threshold = alarm(facts, category)
    return graph.export(checkpoint, out, format, threshold, category)


def _checkpoint(folder: str | Path, device: str) -> Runtime:
    from detectors.protocol import get, refuse_leak
    from training import checkpoints
    from training.evaluation import predict

    facts = checkpoints.read_config(folder)
    detector = checkpoints.load(folder, device)
    refuse_leak(str(folder), detector.settings)
    facts["open_categories"] = get(facts["detector"]).open_categories

    def score(
        pictures: Iterable[np.ndarray], category: str | None, ignore: Places | None
    ) -> Iterator[tuple[float, np.ndarray]]:
        tiles = facts.get("notes", {}).get("tiles")
        return predict(detector, pictures, repeat(category) if category else None, tiles, ignore)

    digest = hashlib.sha256()
    for name in (checkpoints.WEIGHTS, checkpoints.CONFIG):
        digest.update(checkpoints.read_part(folder, name))
    return Runtime(facts, digest.hexdigest(), score)


def _exported(file: Path) -> Runtime:
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(f"{file} needs the package onnxruntime: pip install 'flawsmith[export]'") from error
    try:
        data = file.read_bytes()
    except OSError as error:
        raise RuntimeFileError(
            f"{file}: {error.strerror}; `flawsmith export-model` makes such files"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # which torch heeds as well
    options.intra_op_num_threads = int(threads) if threads.isdecimal() else 0  # 0: all cores
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map
        facts = {
            key.removeprefix(PREFIX): json.loads(value)
            for key, value in metadata.items()
            if key.startswith(PREFIX)
        }
    except Exception as error:  # its errors have no common class
        raise RuntimeFileError(f"{file} is damaged ({error}); export it again") from error
    if not {"calibration", "categories", "input", "settings"} <= facts.keys():
        raise RuntimeFileError(f"{file} is no detector that `flawsmith export-model` wrote")

    def score(
        pictures: Iterable[np.ndarray], category: str | None, ignore: Places | None
    ) -> Iterator[tuple[float, np.ndarray]]:
        made_for = facts["input"]["category"]
        if made_for not in (None, category):
            raise UsageError(
                f"{file} scores pictures of {made_for} only; leave --category out, or export again with it"
            )
        size, tiles = facts["settings"]["size"], facts.get("notes", {}).get("tiles")
        each = iter(ignore) if ignore is not None else repeat(None)
        for picture in pictures:
            places = next(each)
            shape = picture.shape[:2]
            if tiles is None or not is_tiled(shape, size):
                yield run(picture, places)
                continue
            at = windows(shape, size, tiles)
            skipped = None if places is None else [small_mask(window.of(places), size) for window in at]
            parts = [window.of(picture) for window in at]
            found = [run(*both) for both in zip(parts, skipped or repeat(None), strict=False)]
            yield worst([value for value, _ in found], skipped), blend((m for _, m in found), at, shape)

    def run(picture: np.ndarray, places: np.ndarray | None) -> tuple[float, np.ndarray]:
        colour = np.ascontiguousarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))
        given = {facts["input"]["name"]: colour[None]} | ({} if places is None else {"ignore": places})
        scores, maps = session.run(["score", "map"], given)
        return float(scores[0]), maps[0]

    return Runtime(facts, hashlib.sha256(data).hexdigest(), score, bool(facts["input"].get("ignore")))
