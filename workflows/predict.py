"""A trained detector on pictures that belong to no workspace: scores, verdicts and heat maps."""

from __future__ import annotations

import csv
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detectors.protocol import Detector
from manifests.errors import PictureError, UsageError
from manifests.pictures import EXTENSIONS, apply_window, decode, encode, read_bytes, shrink
from training.checkpoints import load, read_config
from training.evaluation import predict as score_pictures
from workflows.console import progress
from workflows.export import safe_names
from workflows.heatmaps import overlay

FIELDS = ("path", "score", "threshold", "anomalous", "heat_map", "map", "error")
Window = tuple[int, int]


def predict(
    checkpoint: Path, pictures: Sequence[Path], out: Path, *, category: str | None = None, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Scores pictures and writes, below ``out``, ``scores.csv`` and for each picture two files:

    * ``NAME.png``: the picture under its heat map. Colours run from half the threshold (none) to one and a
      half (bright), the same for every picture, so a good part stays as it is; an outline holds what lies
      above the threshold (inference: for detectors whose maps have the scale of their scores, as those here
      do).
    * ``NAME.npy``: the raw map, float32 at the detector's input size, without pickle.

    Pictures are read as those trained on were: the same window of grey levels, the same largest side.

    Args:
        checkpoint: folder of a trained detector.
        pictures: files, or folders whose pictures are taken, subfolders included.
        out: made if need be; files of the same name are replaced.
        category: of the pictures, for a detector of several; its own threshold then decides.

    Returns:
        One row a picture in the order given, as in ``scores.csv``: ``path``, ``score``, ``threshold``,
        ``anomalous`` (score above threshold), ``heat_map`` and ``map`` (files), ``error``. A picture that
        cannot be read has an ``error`` and None elsewhere; the others are scored.

    Raises:
        UsageError: no picture is named, or the detector needs to know the category.
        CheckpointError: the checkpoint cannot be used.
    """
    files = _files(pictures)
    paths = [path for path, _ in files]
    detector = load(checkpoint, device)
    notes = read_config(checkpoint).get("notes", {})
    category = category or (detector.categories[0] if len(detector.categories) == 1 else None)
    threshold = _threshold(category, notes, detector)
    window = tuple(notes["window"]) if notes.get("window") else None
    names = safe_names([name for _, name in files])
    rows = [dict.fromkeys(FIELDS) | {"path": str(path)} for path in paths]
    waiting: deque[tuple[int, np.ndarray]] = deque()

    def readable() -> Iterator[np.ndarray]:
        for index, path in enumerate(paths):
            try:
                pixels = _read(path, window, notes.get("max_side"))
            except (PictureError, OSError) as error:
                rows[index]["error"] = str(error)
                continue
            waiting.append((index, pixels))
            yield pixels

    out.mkdir(parents=True, exist_ok=True)
    categories = [category] * len(paths) if category else None
    with progress("scoring", len(paths), "pictures") as advance:
        for score, scores in score_pictures(detector, readable(), categories):
            index, pixels = waiting.popleft()
            advance(1)
            heat, raw = out / f"{names[index]}.png", out / f"{names[index]}.npy"
            heat.write_bytes(encode(overlay(pixels, scores, threshold), "png"))
            np.save(raw, scores.astype(np.float32), allow_pickle=False)
            rows[index] |= {
                "score": score,
                "threshold": threshold,
                "anomalous": score > threshold,
                "heat_map": str(heat),
                "map": str(raw),
            }
    with open(out / "scores.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    return rows


def _files(given: Sequence[Path]) -> list[tuple[Path, str]]:
    """Every picture with the name of its results: below a folder, its place there."""
    files: list[tuple[Path, str]] = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            files += [(p, str(p.relative_to(path).with_suffix(""))) for p in inside]
        else:
            files.append((path, path.stem))
    if not files:
        named = ", ".join(map(str, given)) or "nothing"
        raise UsageError(
            f"no pictures in {named}; name files, or folders with {', '.join(sorted(EXTENSIONS))}"
        )
    return files


def _threshold(category: str | None, notes: Mapping[str, Any], detector: Detector) -> float:
    """The category's alarm threshold, or the one over all categories if none is named."""
    thresholds = notes.get("thresholds", {})
    if category is None:
        return float(detector.calibration["threshold"])
    if category not in detector.categories:
        raise UsageError(
            f"--category {category}: the detector was trained on {', '.join(detector.categories)}"
        )
    return float(thresholds.get(category, detector.calibration["threshold"]))


def _read(path: Path, window: Window | None, max_side: int | None) -> np.ndarray:
    pixels = decode(read_bytes(str(path)), name=str(path)).pixels
    if pixels.dtype == np.uint8:
        return shrink(pixels, max_side)
    if window is None:
        raise PictureError(
            f"{path}: 16 bits, but the detector was not trained on 16-bit pictures of one window of grey "
            "levels; convert the picture to 8 bits as the training pictures were"
        )
    return shrink(apply_window(pixels, window, 8), max_side)
