"""The contact sheet: picture with mask outline, mask, normal and caption of some samples, on one PNG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from manifests.errors import UsageError
from manifests.pictures import eight_bit
from manifests.workspace import Workspace
from workflows.stored import Stored, licences, read_sample, some_accepted, source_images

TILE = 168  # pixels a side of one picture
GAP = 4  # between the pictures of a sample
MARGIN = 20  # between samples
COLUMNS = 3
FONT_SIZE = 14
LINE = 18
PAPER, INK, FAINT = (255, 255, 255), (24, 24, 24), (96, 96, 96)
BEHIND = 205  # grey level around pictures that do not fill their tile
# Yellow beside black is told apart on any background and by every kind of colour vision (Okabe and Ito).
YELLOW = (240, 228, 66)


def contact_sheet(
    space: Workspace, out: Path, *, rounds: Sequence[int] | None = None, samples: int = 24, seed: int = 0
) -> list[str]:
    """Writes a PNG of accepted samples, spread over rounds, categories and generators.

    The same workspace and seed give the same choice. Licences of the sources stand at the foot.

    Returns:
        Ids of the samples shown, in the order of the sheet.

    Raises:
        UsageError: no such round, no accepted sample, or ``out`` has another ending.
        ShardError: a shard is damaged.
    """
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: a contact sheet is written as .png")
    rows = choose(some_accepted(space, rounds), samples, seed)
    foot = [f"{licence}: {', '.join(names)}" for licence, names in licences(source_images(space)).items()]
    sheet = arrange([(triptych(read_sample(space, row)), caption(row)) for row in rows], foot)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, format="PNG")
    return [row["sample_id"] for row in rows]


def choose(rows: Sequence[dict[str, Any]], count: int, seed: int = 0) -> list[dict[str, Any]]:
    """At most ``count`` rows, the next always of what was chosen least so far; sorted by round, category,
    generator and id."""
    order = np.random.default_rng(np.random.SeedSequence(seed)).permutation(len(rows))
    groups: dict[tuple[int, str, str], list[dict[str, Any]]] = {}
    for row in (rows[index] for index in order):
        groups.setdefault((row["round"], row["category"], row["generator"]), []).append(row)
    used: Counter[Any] = Counter()
    chosen: list[dict[str, Any]] = []
    while groups and len(chosen) < count:
        group = min(groups, key=lambda g: (used[g], sum(used[axis] for axis in enumerate(g))))
        used.update([group, *enumerate(group)])
        chosen.append(groups[group].pop())
        if not groups[group]:
            del groups[group]
    return sorted(chosen, key=lambda r: (r["round"], r["category"], r["generator"], r["sample_id"]))


def caption(row: dict[str, Any]) -> list[str]:
    """Two lines: what it is, and its measures."""
    return [
        f"{row['sample_id']} · {row['category']} · {row['generator']} · {row['defect']}",
        f"area {row['area']:.2%} · severity {row['severity']:.2f} · contrast {row['contrast']:.2f}",
    ]


def triptych(sample: Stored, tile: int = TILE) -> np.ndarray:
    """Picture with mask outline, mask, normal side by side: uint8, tile×(3·tile + 2·GAP)×3.

    A sample that holds features shows the normal in place of its picture, with the mask enlarged.
    """
    picture = sample.image if sample.image is not None else sample.normal
    shape = sample.mask.shape if picture is None else picture.shape[:2]
    blank = np.full((*shape, 1), BEHIND, np.uint8)
    shown = fit(blank if picture is None else eight_bit(picture), tile)
    mask = fit_mask(sample.mask, shown.shape[:2])
    normal = fit(blank if sample.normal is None else eight_bit(sample.normal), tile)
    flat = np.repeat(np.where(mask, np.uint8(255), np.uint8(0))[:, :, None], 3, axis=2)
    gap = np.full((tile, GAP, 3), 255, np.uint8)
    tiles = [letterbox(pixels, tile) for pixels in (outline(shown, mask), flat, normal)]
    return np.concatenate([tiles[0], gap, tiles[1], gap, tiles[2]], axis=1)


def outline(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """A copy of an RGB picture with a yellow line just outside the mask and a black one outside that.

    Args:
        picture: uint8, H×W×3.
        mask: bool, H×W.
    """
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    near = cv2.dilate(mask.astype(np.uint8), cross)
    far = cv2.dilate(near, cross)
    drawn = picture.copy()
    drawn[far > near] = 0
    drawn[near > mask] = YELLOW
    return drawn


def fit(pixels: np.ndarray, side: int) -> np.ndarray:
    """uint8 H×W×C to RGB whose longer side is ``side``; the shape of things is kept."""
    scale = side / max(pixels.shape[:2])
    height, width = (max(1, round(scale * length)) for length in pixels.shape[:2])
    method = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    small = cv2.resize(pixels, (width, height), interpolation=method).reshape(height, width, -1)
    return small if small.shape[2] == 3 else np.repeat(small, 3, axis=2)


def fit_mask(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A bool mask at another size. A pixel that holds any defect stays one, so thin defects never vanish."""
    shrinks = mask.shape[0] > shape[0]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST_EXACT
    return cv2.resize(mask.astype(np.float32), (shape[1], shape[0]), interpolation=method) > 0


def letterbox(pixels: np.ndarray, side: int) -> np.ndarray:
    """An RGB picture in the middle of a grey square."""
    square = np.full((side, side, 3), BEHIND, np.uint8)
    top, left = (side - pixels.shape[0]) // 2, (side - pixels.shape[1]) // 2
    square[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return square


def arrange(cells: Sequence[tuple[np.ndarray, Sequence[str]]], foot: Sequence[str]) -> Pillow.Image:
    """Cells of picture and caption in rows, a heading above and the licences below."""
    font = ImageFont.load_default(FONT_SIZE)
    height, width = cells[0][0].shape[:2]
    columns = min(COLUMNS, len(cells))
    rows = -(-len(cells) // columns)
    cell_height = height + 2 * LINE + MARGIN
    page_width = MARGIN + columns * (width + MARGIN)
    heading = _wrap(
        "Synthetic anomalies: picture with the mask outlined, mask, normal picture", font, page_width
    )
    licence_lines = [
        line for entry in foot for line in _wrap(f"Licence of the pictures: {entry}", font, page_width)
    ]
    top = MARGIN + len(heading) * LINE + MARGIN // 2
    page_height = top + rows * cell_height + len(licence_lines) * LINE + MARGIN
    sheet = Pillow.new("RGB", (page_width, page_height), PAPER)
    draw = ImageDraw.Draw(sheet)
    _write(draw, heading, MARGIN, MARGIN, INK, font)
    for index, (picture, lines) in enumerate(cells):
        x = MARGIN + index % columns * (width + MARGIN)
        y = top + index // columns * cell_height
        sheet.paste(Pillow.fromarray(picture), (x, y))
        _write(draw, [_shorten(line, font, width) for line in lines], x, y + height + 2, INK, font)
    _write(draw, licence_lines, MARGIN, top + rows * cell_height, FAINT, font)
    return sheet


def _write(
    draw: ImageDraw.ImageDraw, lines: Sequence[str], x: int, y: int, colour: tuple[int, int, int], font: Any
) -> None:
    for number, line in enumerate(lines):
        draw.text((x, y + number * LINE), line, fill=colour, font=font)


def _shorten(text: str, font: Any, width: float) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def _wrap(text: str, font: Any, page_width: int) -> list[str]:
    """Lines that fit between the margins, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= page_width - 2 * MARGIN:
            lines[-1] = longer
        else:
            lines.append(word)
    return [_shorten(line, font, page_width - 2 * MARGIN) for line in lines if line]
