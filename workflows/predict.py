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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from manifests.errors import PictureError, UsageError
from manifests.pictures import EXTENSIONS, apply_window, decode, encode, read_bytes, shrink
from workflows.console import progress
from workflows.export import safe_names
from workflows.heatmaps import overlay
from workflows.runtimes import alarm, open_detector

FIELDS = (
    *("path", "score", "threshold", "anomalous", "heat_map", "map", "error", "sha256", "detector"),
    "category",
)
TABLE, LIST = "scores.csv", "scores.json"
ODD_NAMES = "surrogateescape"  # file names that are no UTF-8 keep their bytes
Window = tuple[int, int]
Row = dict[str, Any]


def predict(
    checkpoint: str | Path,
    pictures: Sequence[Path],
    out: Path,
    *,
    category: str | None = None,
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
    same call again goes on behind the rows that are there, which stand if picture, detector, category and
    threshold are still the same. What lies below ``out`` is no picture to score.

    Args:
        checkpoint: folder of a trained detector, or an exported file.
        pictures: files, or folders whose pictures are taken, subfolders included.
        out: made if need be; files of the same name are replaced.
        category: of the pictures, for a detector of several; its own threshold then decides.

    Returns:
        One row a picture in the order given, as in ``scores.csv``: ``path``, ``score``, ``threshold``,
        ``anomalous`` (score above threshold), ``heat_map`` and ``map`` (files), ``error``, ``sha256`` (of the
        picture's file), ``detector`` (sha256 of its files), ``category``. A picture that cannot be read has
        an ``error`` and None elsewhere; the others are scored.

    Raises:
        UsageError: no picture is named, one would be overwritten, ``out`` holds another table, or the
            detector needs to know the category.
        FlawsmithError: the detector cannot be used.
    """
    files = _files(pictures, out)
    detector = open_detector(checkpoint, device)
    notes = detector.facts.get("notes", {})
    category, threshold = alarm(detector.facts, category)
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
    waiting: deque[tuple[int, np.ndarray]] = deque()

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
                    before = kept.get(row["map"])
                    if before and _same(row, before):
                        row |= before
                        done(row, new=False)
                        continue
                    pixels = _pixels(data, path, window, notes.get("max_side"))
                except (PictureError, OSError) as error:
                    rows[index] = dict.fromkeys(FIELDS) | {"path": str(path), "error": str(error)}
                    done(rows[index])
                    continue
                waiting.append((index, pixels))
                yield pixels

        for score, scores in detector.score(unscored(), category):
            index, pixels = waiting.popleft()
            heat, raw = out / f"{names[index]}.png", io.BytesIO()
            _replace(heat, encode(overlay(pixels, scores, threshold), "png"))
            np.save(raw, scores.astype(np.float32), allow_pickle=False)
            _replace(Path(rows[index]["map"]), raw.getvalue())
            rows[index] |= {"score": score, "anomalous": score > threshold, "heat_map": str(heat)}
            done(rows[index])
    _write_table(out / TABLE, rows)
    text = json.dumps({"detector": detector.facts, "pictures": rows}, ensure_ascii=False, indent=1)
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
    told = all(row[name] == before[name] for name in ("path", "threshold", "detector", "sha256", "category"))
    return told and Path(before["heat_map"]).is_file() and Path(before["map"]).is_file()


def _stored(table: Path) -> list[Row]:
    """Rows of pictures that were scored before; a line cut short is none.

    Raises:
        UsageError: it is no such table.
    """
    if not table.is_file():
        return []
    try:
        with open(table, encoding="utf-8", errors=ODD_NAMES, newline="") as file:
            lines = [line for line in csv.DictReader(file) if tuple(line) == FIELDS]
        return [
            {name: line[name] or None for name in FIELDS}
            | {name: float(line[name]) for name in ("score", "threshold")}
            | {"anomalous": line["anomalous"] == "True"}
            for line in lines
            if line["score"] and line["detector"]
        ]
    except (csv.Error, ValueError) as error:
        raise UsageError(
            f"{table} is no table that predict wrote ({error}); name another folder with --out"
        ) from error


def _files(given: Sequence[Path], out: Path) -> list[tuple[Path, str]]:
    """Every picture with the name of its results: below a folder, its place there. Results of earlier calls,
    below ``out``, are none."""
    files: list[tuple[Path, str]] = []
    for path in given:
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
            if not path.resolve().is_relative_to(out.resolve()):
                inside = [p for p in inside if not p.resolve().is_relative_to(out.resolve())]
            files += [(p, str(p.relative_to(path).with_suffix(""))) for p in inside]
        else:
            files.append((path, path.stem))
    if not files:
        named = ", ".join(map(str, given)) or "nothing"
        raise UsageError(
            f"no pictures in {named}; name files, or folders with {', '.join(sorted(EXTENSIONS))}"
        )
    return files


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
