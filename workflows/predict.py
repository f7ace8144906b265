"""A trained detector on pictures that belong to no workspace: scores, verdicts and heat maps.

What is written does not depend on how the detector runs, see ``workflows.runtimes``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from manifests.errors import PictureError, UsageError
from manifests.layouts import walk
from manifests.pictures import EXTENSIONS, apply_window, decode, encode, load_location, read_bytes, shrink
from manifests.sources import check_masks, location_of
from training.tiling import scored_shape
from workflows.console import progress, say
from workflows.export import safe_names
from workflows.heatmaps import overlay
from workflows.runtimes import alarm, open_detector

FIELDS = (
    *("path", "score", "threshold", "anomalous", "heat_map", "map", "error", "category", "ignored"),
    *("sha256", "detector"),  # never empty in a row of a scored picture, so that one cut short shows
)
TABLE, LIST = "scores.csv", "scores.json"
ODD_NAMES = "surrogateescape"  # file names that are no UTF-8 keep their bytes
Window = tuple[int, int]
Shape = tuple[int, int]
Row = dict[str, Any]
Masks = tuple[str | None, str | None]  # files: region of interest, ignore mask


def predict(
    checkpoint: str | Path,
    pictures: Sequence[Path],
    out: Path,
    *,
    category: str | None = None,
    roi: Path | None = None,
    ignore: Path | None = None,
    device: str = "cpu",
) -> list[Row]:
    """Scores pictures and writes, below ``out``, ``scores.csv``, ``scores.json`` and for each picture:

    * ``NAME.png``: the picture under its heat map. Colours run from half the threshold (none) to one and a
      half (bright), the same for every picture, so a good part stays as it is; an outline holds what lies
      above the threshold (inference: for detectors whose maps have the scale of their scores, as those here
      do).
    * ``NAME.npy``: the raw map, without pickle: float32 at the detector's input size, or, for a picture that
      was scored in tiles, at the picture's.

    Pictures are read as those trained on were: the same window of grey levels, the same largest side, and in
    tiles if the detector learned from tiles. A row joins ``scores.csv`` as soon as its picture is done; the
    same call again goes on behind the rows that are there, which stand if picture, detector, category,
    threshold and ignored places are still the same. Rows of other pictures stay behind those of this call,
    if the detector is the same and the pictures are still there. What lies below ``out`` is no picture to
    score.

    Args:
        checkpoint: folder of a trained detector, or an exported file.
        pictures: files, or folders whose pictures are taken, subfolders and what links lead to included.
        out: made if need be; files of the same name are replaced.
        category: of the pictures, for a detector of several; its own threshold then decides.
        roi, ignore: masks, or folders with ``<stem>.png``, as of a run's source: what lies outside the first
            or inside the second raises no picture's score and shows no heat; the raw map holds it all.

    Returns:
        One row a picture in the order given, as in ``scores.csv``: ``path``, ``score``, ``threshold``,
        ``anomalous`` (score above threshold), ``heat_map`` and ``map`` (files), ``error``, ``sha256`` (of the
        picture's file), ``detector`` (sha256 of its files), ``category``, ``ignored`` (sha256 of the files of
        ``roi`` and ``ignore``, a dash for none; None without either). A picture that cannot be read has an
        ``error`` and None elsewhere; the others are scored.

    Raises:
        UsageError: no picture is named, one would be overwritten, ``out`` is a file or a folder of pictures
            to score, or holds another table, the detector needs to know the category, or there is no such
            mask.
        FlawsmithError: the detector cannot be used.
    """
    check_masks(roi, ignore)
    masked = roi is not None or ignore is not None
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    if any(path.is_dir() and path.resolve() == out.resolve() for path in pictures):
        raise UsageError(f"--out {out}: heat maps would lie among the pictures; name another folder")
    files = _files(pictures, [path for path in (out, roi, ignore) if path is not None])
    detector = open_detector(checkpoint, device)
    if masked and not detector.ignores:
        raise UsageError(
            f"{checkpoint} has no input for places to ignore; export it again, or give the checkpoint"
        )
    notes, size = detector.facts.get("notes", {}), detector.facts["settings"]["size"]
    category, threshold = alarm(detector.facts, category)
    _warn(category, masked, notes.get("places"))
    # One mask may serve all pictures.
    read_mask, hashed = lru_cache(4)(load_location), lru_cache(4)(_sha256_of)
    window = tuple(notes["window"]) if notes.get("window") else None
    names = safe_names([name for _, name in files])
    rows: list[Row] = [dict.fromkeys(FIELDS) | {"path": str(path)} for path, _ in files]
    planned = {str(out / f"{name}.npy"): str(path) for name, (path, _) in zip(names, files, strict=True)}
    written = {(out / f"{name}{end}").resolve() for name in names for end in (".png", ".npy")}
    if taken := [path for path, _ in files if path.resolve() in written]:
        raise UsageError(f"--out {out}: a heat map would replace the picture {taken[0]}; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    # A row whose files are about to become another picture's says nothing any more.
    stored = [row for row in _stored(out / TABLE) if planned.get(row["map"], row["path"]) == row["path"]]
    _write_table(out / TABLE, stored)
    kept = {row["map"]: row for row in stored}
    waiting: deque[tuple[int, np.ndarray, np.ndarray | None]] = deque()
    skipped: deque[np.ndarray | None] = deque()  # of the pictures handed out, for the detector to take

    with (
        progress("scoring", len(files), "pictures") as advance,
        open(out / TABLE, "a", encoding="utf-8", errors=ODD_NAMES, newline="") as log,
    ):

        def done(row: Row, new: bool = True) -> None:
            if new:
                csv.DictWriter(log, FIELDS).writerow(row)
                log.flush()
            advance(1)

        def unscored() -> Iterator[np.ndarray]:
            for index, (path, _) in enumerate(files):
                row = rows[index]
                try:
                    data = read_bytes(str(path))
                    row |= {"threshold": threshold, "detector": detector.identity, "category": category}
                    row |= {
                        "sha256": hashlib.sha256(data).hexdigest(),
                        "map": str(out / f"{names[index]}.npy"),
                    }
                    masks = _masks_of(path, roi, ignore)
                    digests = " ".join(hashed(mask) if mask else "-" for mask in masks)
                    row |= {"ignored": digests if masked else None}
                    before = kept.get(row["map"])
                    if before and _same(row, before):
                        row |= before
                        done(row, new=False)
                        continue
                    pixels = _pixels(data, path, window, notes.get("max_side"))
                    shapes = pixels.shape[:2], scored_shape(pixels.shape[:2], size, notes.get("tiles"))
                    places = _ignored(path, masks, *shapes, read_mask) if masked else None
                except (PictureError, OSError) as error:
                    rows[index] = dict.fromkeys(FIELDS) | {"path": str(path), "error": str(error)}
                    done(rows[index])
                    continue
                waiting.append((index, pixels, places))
                skipped.append(places)
                yield pixels

        places_in_turn = (skipped.popleft() for _ in repeat(None)) if masked else None
        for score, scores in detector.score(unscored(), category, places_in_turn):
            index, pixels, places = waiting.popleft()
            heat, raw = out / f"{names[index]}.png", io.BytesIO()
            seen = scores if places is None else np.where(places, min(threshold / 2, scores.min()), scores)
            _replace(heat, encode(overlay(pixels, seen, threshold), "png"))
            np.save(raw, scores.astype(np.float32), allow_pickle=False)
            _replace(Path(rows[index]["map"]), raw.getvalue())
            rows[index] |= {"score": score, "anomalous": score > threshold, "heat_map": str(heat)}
            done(rows[index])
    given = {row["path"] for row in rows}
    others = [row for row in stored if row["path"] not in given and _stands(row, detector.identity)]
    _write_table(out / TABLE, [*rows, *others])
    told = {"detector": detector.facts, "pictures": [*rows, *others]}
    text = json.dumps(told, ensure_ascii=False, indent=1)
    _replace(out / LIST, text.encode("utf-8", "backslashreplace"))
    return rows


def _write_table(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, FIELDS)
    writer.writeheader()
    writer.writerows(rows)
    _replace(path, text.getvalue().encode("utf-8", ODD_NAMES))


def _replace(path: Path, data: bytes) -> None:
    """Whole or not at all; a link is replaced, not followed."""
    aside = path.with_name(f".{path.name}.part")
    aside.unlink(missing_ok=True)
    aside.write_bytes(data)
    os.replace(aside, path)


def _same(row: Row, before: Row) -> bool:
    """Whether an earlier row holds for a picture, and its files are there."""
    same = ("path", "threshold", "detector", "sha256", "category", "ignored")
    told = all(row[name] == before[name] for name in same)
    return told and Path(before["heat_map"]).is_file() and Path(before["map"]).is_file()


def _stands(row: Row, detector: str) -> bool:
    """Whether the row of a picture that an earlier call named may stay."""
    return row["detector"] == detector and all(
        Path(row[name]).is_file() for name in ("path", "heat_map", "map")
    )


def _stored(table: Path) -> list[Row]:
    """Rows of pictures that were scored before; a line cut short is none.

    Raises:
        UsageError: it is no such table.
    """
    if not table.is_file():
        return []
    try:
        with open(table, encoding="utf-8", errors=ODD_NAMES, newline="") as file:
            lines = [{"ignored": "", **line} for line in csv.DictReader(file)]  # once there were no masks
        return [
            {name: line[name] or None for name in FIELDS}
            | {name: float(line[name]) for name in ("score", "threshold")}
            | {"anomalous": line["anomalous"] == "True"}
            for line in lines
            if {*FIELDS} == {*line} and None not in line.values() and line["score"] and line["detector"]
        ]
    except (csv.Error, ValueError) as error:
        raise UsageError(
            f"{table} is no table that predict wrote ({error}); name another folder with --out"
        ) from error


def _files(given: Sequence[Path], others: Sequence[Path]) -> list[tuple[Path, str]]:
    """Every picture with the name of its results: below a folder, its place there. What lies below ``others``
    (results of earlier calls, masks) is none, unless all of the folder does."""
    files: list[tuple[Path, str]] = []
    for path in given:
        if path.is_dir():
            below = (folder / name for folder, names in walk(path) for name in names)
            inside = sorted(p for p in below if p.suffix.lower() in EXTENSIONS and p.is_file())
            for other in (other.resolve() for other in others):
                if not path.resolve().is_relative_to(other):
                    inside = [p for p in inside if not p.resolve().is_relative_to(other)]
            files += [(p, str(p.relative_to(path).with_suffix(""))) for p in inside]
        else:
            files.append((path, path.stem))
    if not files:
        named = ", ".join(map(str, given)) or "nothing"
        raise UsageError(
            f"no pictures in {named}; name files, or folders with {', '.join(sorted(EXTENSIONS))}"
        )
    return files


def _masks_of(path: Path, roi: Path | None, ignore: Path | None) -> Masks:
    """A picture's region of interest and ignore mask."""
    found = [location_of(None if mask is None else str(mask), str(path)) for mask in (roi, ignore)]
    return found[0], found[1]


def _sha256_of(mask: str) -> str:
    return hashlib.sha256(read_bytes(mask)).hexdigest()


def _ignored(
    path: Path, masks: Masks, shape: Shape, map_shape: Shape, read_mask: Callable[[str, Shape], np.ndarray]
) -> np.ndarray:
    """Where nothing counts, at the size of the map.

    Raises:
        PictureError: at the size of the picture, nothing would.
    """

    def at(size: Shape) -> np.ndarray:
        roi, ignore = (None if mask is None else read_mask(mask, size) for mask in masks)
        skipped = np.zeros(size, bool) if roi is None else ~roi
        return skipped if ignore is None else skipped | ignore

    if at(shape).all():
        raise PictureError(f"{path}: its region of interest and ignore mask leave no place; draw them anew")
    return at(map_shape)


def _warn(category: str | None, masked: bool, places: bool | None) -> None:
    """Of scores that are not as those that the threshold was set on. ``places``: whether some did not count
    then; None: unknown."""
    if category is None:
        say(
            "warning: the detector knows several categories and none is named; its threshold was set on "
            "pictures whose category was known, so --category NAME decides better"
        )
    if places and not masked:
        say(
            "warning: in training some places did not count (region of interest, ignore mask), here all do; "
            "name the masks with --roi and --ignore"
        )
    if masked and places is False:
        say(
            "warning: in training all places counted, and the threshold was set so; with --roi and --ignore "
            "fewer pictures exceed it than its quantile says"
        )


def _pixels(data: bytes, path: Path, window: Window | None, max_side: int | None) -> np.ndarray:
    pixels = decode(data, name=str(path)).pixels
    if pixels.dtype == np.uint8:
        return shrink(pixels, max_side)
    if window is None:
        raise PictureError(
            f"{path}: 16 bits, but the detector was not trained on 16-bit pictures of one window of grey "
            "levels; convert the picture to 8 bits as the training pictures were"
        )
    return shrink(apply_window(pixels, window, 8), max_side)
