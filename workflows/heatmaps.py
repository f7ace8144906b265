"""Heat maps of the pictures that a detector judged worst: a few a round, small, stored beside its figures."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
import pyarrow as pa
from PIL import Image as Pillow

from manifests.pictures import load
from manifests.schema import to_table
from manifests.workspace import Workspace, round_file
from workflows.contact import GAP, fit, fit_mask, outline

if TYPE_CHECKING:  # imports torch, which scoring with an exported detector does without
    from training.evaluation import Judged

Kind = Literal["miss", "gain", "false_alarm"]
FOLDER, TABLE = "heatmaps", "heatmaps.parquet"
MOST = 12  # pictures a kind
SIDE = 256  # longer side of each picture, in pixels
FOUND_FROM = 0.5  # share of a defect above the alarm threshold from which it counts as found

DARKEST = 0.35  # where the colours begin: below it they are black, which reads as shadow
STRONGEST = 0.7  # share of colour where the map is highest

HEATMAPS = pa.schema(
    [
        ("split", pa.string()),  # feedback, or test once `evaluate --final` has looked at it
        ("kind", pa.string()),  # miss | gain | false_alarm
        ("image_id", pa.string()),
        ("category", pa.string()),
        ("defect", pa.string()),
        ("score", pa.float64()),
        ("threshold", pa.float64()),  # of the category's scores
        ("hit", pa.float64()),  # share found of the defect that is meant; NaN for a good picture
        ("before", pa.float64()),  # the same in the round before; NaN if unknown
        ("file", pa.string()),  # below rounds/NNN/
    ]
)


@dataclass(frozen=True)
class Pick:
    """One picture worth looking at, and why; ``badness`` orders those of a kind, the largest first."""

    kind: Kind
    image_id: str
    defect: tuple[str, str]  # category and type
    badness: tuple[float, float]
    hit: float = float("nan")
    before: float = float("nan")


def write_heatmaps(
    space: Workspace,
    number: int,
    split: str,
    judged: Sequence[Judged],
    found: Sequence[Mapping[str, Any]],
    thresholds: Mapping[str, tuple[float, float]],
    earlier: Sequence[Mapping[str, Any]] = (),
    max_side: int | None = None,
) -> None:
    """Writes ``heatmaps.parquet`` and its pictures in place of earlier ones of the same split.

    Each file is WebP: the picture with the true defects outlined, and beside it the picture under its heat
    map, :data:`GAP` pixels between them.

    Args:
        found, earlier: rows of ``found.parquet`` of this round and of the one before.
        thresholds: by category, of (picture scores, map values).
        max_side: as the pictures were judged with.
    """
    own = {entry.image.image_id: entry for entry in judged}
    rows = []
    for pick, name in pick_worst(judged, found, thresholds, earlier):
        entry = own[pick.image_id]
        on_picture, on_map = thresholds[entry.image.category]
        file = f"{FOLDER}/{split}-{name}.webp"
        pixels = fit(load(entry.image, max_side=max_side), SIDE)
        space.write_bytes(round_file(number, file), _webp(side_by_side(pixels, entry, on_map)))
        rows.append(
            {
                "split": split,
                "kind": pick.kind,
                "image_id": pick.image_id,
                "category": entry.image.category,
                "defect": entry.image.defect,
                "score": entry.score,
                "threshold": on_picture,
                "hit": pick.hit,
                "before": pick.before,
                "file": file,
            }
        )
    space.append_table(round_file(number, TABLE), to_table(rows, HEATMAPS), {"split": split})


def remove_heatmaps(space: Workspace, number: int) -> None:
    """Those of a detector that is no more."""
    space.remove(round_file(number, TABLE))
    for name in space.names(round_file(number, FOLDER)):
        space.remove(round_file(number, f"{FOLDER}/{name}"))


def pick_worst(
    judged: Sequence[Judged],
    found: Sequence[Mapping[str, Any]],
    thresholds: Mapping[str, tuple[float, float]],
    earlier: Sequence[Mapping[str, Any]] = (),
) -> list[tuple[Pick, str]]:
    """At most :data:`MOST` pictures a kind with their names, worst first, every type of defect before one
    comes twice.

    A miss is a defect of which less than half was found, the larger the worse; a gain is one that was a miss
    in the round before; a false alarm is a good picture that scores above its threshold.
    """
    picks = []
    for entry in judged:
        over = entry.score - thresholds[entry.image.category][0]
        if not entry.anomalous and over > 0:
            key = (entry.image.category, entry.image.defect)
            picks.append(Pick("false_alarm", entry.image.image_id, key, (over, 0.0)))
    known = {defect_key(row): row["hit"] for row in earlier}
    for row in found:
        before = known.get(defect_key(row), float("nan"))
        key = (row["category"], row["defect"])
        if row["hit"] < FOUND_FROM:
            badness = (-row["hit"], float(np.nan_to_num(row["area"])))
            picks.append(Pick("miss", row["image_id"], key, badness, row["hit"], before))
        elif before < FOUND_FROM:
            badness = (row["hit"] - before, 0.0)
            picks.append(Pick("gain", row["image_id"], key, badness, row["hit"], before))
    named = []
    for kind in ("miss", "gain", "false_alarm"):
        chosen = _in_turn([pick for pick in picks if pick.kind == kind])[:MOST]
        named += [(pick, f"{kind}-{at:02d}") for at, pick in enumerate(chosen)]
    return named


def defect_key(row: Mapping[str, Any]) -> tuple[str, int, str]:
    """Which defect a row of ``found.parquet`` means. Labels count from the mask at the detector's size; the
    area tells whether two rounds, perhaps of different sizes, mean the same one."""
    return row["image_id"], row["component"], f"{row['area']:.9f}"


def _in_turn(picks: Sequence[Pick]) -> list[Pick]:
    """One a picture, the worst; then the worst of every type of defect, the second worst of each, …"""
    ordered = sorted(picks, key=lambda pick: (-pick.badness[0], -pick.badness[1], pick.image_id))
    first = {pick.image_id: pick for pick in reversed(ordered)}
    turn: dict[tuple[str, str], int] = defaultdict(int)
    ranked: list[tuple[int, int, Pick]] = []
    for pick in ordered:
        if first[pick.image_id] is pick:
            ranked.append((turn[pick.defect], len(ranked), pick))
            turn[pick.defect] += 1
    return [pick for _, _, pick in sorted(ranked, key=lambda item: item[:2])]


def side_by_side(pixels: np.ndarray, entry: Judged, threshold: float) -> np.ndarray:
    """The picture with the true mask outlined and the picture under its heat map: uint8, H×(2·W+GAP)×3.

    Args:
        pixels: uint8, H×W×3.
        threshold: of the map.
    """
    height = pixels.shape[0]
    mask = entry.mask if entry.mask is not None else np.zeros(pixels.shape[:2], bool)
    left = outline(pixels, fit_mask(mask, pixels.shape[:2]))
    gap = np.full((height, GAP, 3), 255, np.uint8)
    return np.concatenate([left, gap, overlay(pixels, entry.map, threshold)], axis=1)


def overlay(picture: np.ndarray, scores: np.ndarray, threshold: float) -> np.ndarray:
    """The picture under its heat map: uint8 H×W×3.

    Args:
        picture: uint8, H×W×C with C = 1 or 3.
        scores: float32, h×w; brought to the picture's size.
        threshold: above 0; colours run from half of this to one and a half.
    """
    scores = cv2.resize(scores, picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    level = np.clip(scores / max(threshold, 1e-12) - 0.5, 0, 1)[:, :, None]
    shade = np.rint(255 * (DARKEST + (1 - DARKEST) * level)).astype(np.uint8)
    colours = cv2.applyColorMap(shade, cv2.COLORMAP_INFERNO)[:, :, ::-1]
    strength = STRONGEST * level
    mixed = (1 - strength) * picture + strength * colours
    return outline(np.rint(mixed).astype(np.uint8), scores > threshold)


def _webp(pixels: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Pillow.fromarray(pixels).save(sink, "WEBP", quality=80)
    return sink.getvalue()
