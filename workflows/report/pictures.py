"""Pictures that the page carries: sheets of thumbnails, samples beside their normals, and heat maps."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from PIL import Image as Pillow

from manifests.pictures import eight_bit
from manifests.workspace import Workspace, round_file
from workflows.contact import BEHIND, choose, fit, fit_mask, letterbox
from workflows.report.facts import Row
from workflows.stored import Stored, read_sample

MOST_PICTURES = 1500  # samples that are shown; the table has all
BYTES = 17_500_000  # of the page's characters at most for pictures of samples with their outlines, and
HEATMAP_BYTES = 2_500_000  # for heat maps
ENTRY = 200  # characters of a shown sample beside its pictures and its outline
TILE = 96  # pixels a side of a thumbnail
ACROSS = 10  # thumbnails in a row and in a column of a sheet
SIDES = (320, 256, 192, 160, 128)  # longer side of a sample's picture; the largest that fits is taken
PROBE = 24  # samples that tell which
MARGIN = 1.3  # smaller pictures hold more detail a pixel than the probe's
QUALITY = 75


@dataclass(frozen=True)
class Album:
    """Pictures as base64 of WebP, and where each sample's are.

    Attributes:
        sheets: thumbnails, ACROSS×ACROSS tiles each, in the order of ``shown``.
        pictures: of samples and normals.
        shown: by sample id in the order of the thumbnails: ``picture`` and ``normal`` (places in
            ``pictures``, or None), ``width`` and ``height``, ``mask`` (the outline as the data of an SVG path
            on that width and height), ``features`` (whether the sample is one of features, shown by its
            normal).
    """

    sheets: list[str] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    shown: dict[str, dict[str, Any]] = field(default_factory=dict)


def make_album(space: Workspace, rows: Sequence[Row], room: int = BYTES) -> Album:
    """Pictures of at most :data:`MOST_PICTURES` accepted samples, spread over rounds, categories, generators.

    Args:
        room: characters that they may take. Thumbnails and outlines are there in any case.

    Raises:
        ShardError: a shard is missing or damaged.
    """
    accepted = [row for row in rows if row["outcome"] == "accepted"]
    chosen = choose(accepted, MOST_PICTURES)
    side, room = _plan(space, chosen, room)
    album, tiles, normals = Album(), [], {}
    for row in chosen:
        sample = read_sample(space, row)
        picture, mask = shown_of(sample, side)
        tiles.append(letterbox(fit(picture, TILE), TILE))
        places: dict[str, int | None] = {"picture": None, "normal": None}
        own: dict[str, np.ndarray] = {} if sample.image is None else {"picture": picture}
        if sample.normal is not None and row["image_id"] not in normals:
            own["normal"] = fit(eight_bit(sample.normal), side)
        encoded = {name: encode(pixels) for name, pixels in own.items()}
        size = sum(map(len, encoded.values()))
        if size <= room:  # beyond it a thumbnail must do
            room -= size
            for name, text in encoded.items():
                places[name] = len(album.pictures)
                album.pictures.append(text)
            if "normal" in encoded:
                normals[row["image_id"]] = places["normal"]
            places["normal"] = normals.get(row["image_id"])
        album.shown[row["sample_id"]] = {
            **places,
            "width": picture.shape[1],
            "height": picture.shape[0],
            "mask": outline_path(mask),
            "features": sample.image is None,
        }
        if len(tiles) == ACROSS * ACROSS:
            album.sheets.append(encode(sheet(tiles)))
            tiles = []
    if tiles:
        album.sheets.append(encode(sheet(tiles)))
    return album


def _plan(space: Workspace, chosen: Sequence[Row], room: int) -> tuple[int, int]:
    """(side, room): the largest of :data:`SIDES` at which the pictures of all chosen samples are likely to
    fit, and the characters of ``room`` that they may take beside thumbnails and outlines."""
    probe = [read_sample(space, row) for row in chosen[:: max(1, math.ceil(len(chosen) / PROBE))]]
    if not probe:
        return SIDES[0], room
    shown = [shown_of(sample, SIDES[0]) for sample in probe]
    pictures = [picture for picture, _ in shown]
    tiles = [letterbox(fit(picture, TILE), TILE) for picture in pictures]
    certain = len(encode(sheet(tiles))) + sum(len(outline_path(mask)) + ENTRY for _, mask in shown)
    room -= round(1.1 * certain * len(chosen) / len(tiles))
    each = sum(len(encode(picture)) for picture in pictures) / len(pictures)
    count = len(chosen) + len({row["image_id"] for row in chosen})
    for side in SIDES:
        if count * each * (side / SIDES[0]) ** 2 * (MARGIN if side < SIDES[0] else 1) <= room:
            return side, room
    return SIDES[-1], room


def shown_of(sample: Stored, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(picture, mask) of a sample at ``side``: uint8 H×W×3, bool H×W. One of features shows its normal."""
    picture = sample.image if sample.image is not None else sample.normal
    if picture is None:
        picture = np.full((*sample.mask.shape, 1), BEHIND, np.uint8)
    small = fit(eight_bit(picture), side)
    return small, fit_mask(sample.mask, small.shape[:2])


def outline_path(mask: np.ndarray) -> str:
    """The borders of a mask, holes included, as the data of an SVG path on its pixels.

    Args:
        mask: bool, H×W.
    """
    borders, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    parts = []
    for border in borders:
        points = cv2.approxPolyDP(border, 0.6, True)[:, 0] + 0.5  # centres of pixels
        parts.append("M" + "L".join(f"{x:g} {y:g}" for x, y in points) + "Z")
    return "".join(parts)


def sheet(tiles: Sequence[np.ndarray]) -> np.ndarray:
    """Tiles of TILE×TILE×3 in rows of :data:`ACROSS`, on as many rows as they need."""
    rows = math.ceil(len(tiles) / ACROSS)
    pixels = np.full((rows * TILE, ACROSS * TILE, 3), BEHIND, np.uint8)
    for at, tile in enumerate(tiles):
        top, left = at // ACROSS * TILE, at % ACROSS * TILE
        pixels[top : top + TILE, left : left + TILE] = tile
    return pixels


def encode(pixels: np.ndarray) -> str:
    """Base64 of lossy WebP."""
    sink = io.BytesIO()
    Pillow.fromarray(pixels).save(sink, "WEBP", quality=QUALITY, method=2)
    return base64.b64encode(sink.getvalue()).decode()


def heatmaps(space: Workspace, rows: Sequence[Row]) -> tuple[list[str], list[Row]]:
    """(pictures, the rows that have one), the latest rounds first, as many as there is room for."""
    pictures: list[str] = []
    kept: list[Row] = []
    room = HEATMAP_BYTES
    for row in sorted(rows, key=lambda row: -row["round"]):
        name = round_file(row["round"], row["file"])
        if not space.exists(name):
            continue
        text = base64.b64encode(space.read_bytes(name)).decode()
        room -= len(text)
        if room < 0:
            break
        pictures.append(text)
        kept.append(row)
    return pictures, kept
