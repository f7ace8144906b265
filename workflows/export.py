"""Accepted samples as plain files, in the layouts other tools read: MVTec AD, COCO, YOLO segmentation.

Pictures become PNG: the same pixels as in the shards, and the same bytes where these hold PNG already.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from manifests import pictures
from manifests.errors import UsageError
from manifests.schema import GOOD, Image, images_from
from manifests.workspace import Workspace, round_file
from workflows.rounds import sample_rows
from workflows.stored import Stored, licences, read_sample, some_accepted, source_images

FORMATS = ("mvtec", "coco", "yolo")
MANIFEST = ("file", "mask", "sample_id", "round", "category", "defect", "generator", "image_id", "licence")
VALIDATION = 10  # YOLO: every tenth normal's samples are for validation


@dataclass(frozen=True)
class Chosen:
    """What is exported: rows of the samples tables, and the real pictures by ``image_id``."""

    space: Workspace
    rows: list[dict[str, Any]]
    images: dict[str, Image]

    def samples(self) -> Iterator[tuple[Stored, bytes]]:
        """Samples that hold a picture, with that picture as PNG (grey if its source is)."""
        for row in self.rows:
            sample = read_sample(self.space, row)
            if sample.image is not None:
                grey = self.images[row["image_id"]].mode == "L"
                yield sample, pictures.encode(sample.image[:, :, :1] if grey else sample.image, "png")


def export(space: Workspace, format: str, out: Path, rounds: Sequence[int] | None = None) -> dict[str, int]:
    """Writes a new folder with pictures, annotations, ``manifest.csv`` and ``README.md``.

    The folder appears whole or not at all. Samples that a person rejected are left out, and so are samples
    that hold features in place of a picture (they are counted).

    * ``mvtec``: ``CATEGORY/train/good`` the real normals of the train split, ``CATEGORY/test/good`` those of
      the calibration split, ``CATEGORY/test/DEFECT`` and ``CATEGORY/ground_truth/DEFECT`` the synthetic
      anomalies. Real defects are never exported.
    * ``coco``: ``images/`` and ``annotations.json``, one instance a connected component (8 neighbours), with
      ``iscrowd`` 0 and uncompressed run lengths as segmentation, because polygons cannot be exact.
    * ``yolo``: ``images/`` and ``labels/``, both with ``train`` and ``val``, and ``data.yaml``; one polygon
      a component.

    Args:
        format: one of ``FORMATS``.
        out: missing or empty.
        rounds: None for all.

    Returns:
        How many pictures of each kind were written: ``anomalies``, ``normals``, ``instances`` as the format
        has them, and ``features_left_out``.

    Raises:
        UsageError: unknown format, ``out`` holds something, or there is no sample with a picture.
        PictureError: a real normal is gone or has changed (mvtec).
        ShardError: a shard is damaged.
    """
    if format not in FORMATS:
        raise UsageError(f"--format {format}: unknown; choose one of {', '.join(FORMATS)}")
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UsageError(f"{out} holds something already; name a new or an empty folder")
    rows = some_accepted(space, rounds)
    chosen = Chosen(space, rows, {image.image_id: image for image in source_images(space)})
    if any(row["image_id"] not in chosen.images for row in rows):
        raise UsageError(
            f"{space.address('images.parquet')} lacks pictures that samples were made from; restore it"
        )
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        counts, entries = {"mvtec": _mvtec, "coco": _coco, "yolo": _yolo}[format](chosen, aside)
        if not counts["anomalies"]:
            raise UsageError("the samples hold features in place of pictures: there is nothing to export")
        _describe(chosen, aside, format, entries)
        aside.replace(out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    counts["features_left_out"] = len(rows) - counts["anomalies"]
    return counts


def safe_names(words: Sequence[str]) -> list[str]:
    """A file name for each word: letters, digits, ``_ . -`` only, no leading dot, and no two alike.

    Names differ in more than case, and equal words get ``-2``, ``-3``… after the first.

    >>> safe_names(["scratch", "../Scratch", "con/tact", ""])
    ['scratch', 'Scratch-2', 'con_tact', 'unnamed']
    """
    taken: set[str] = set()
    names = []
    for word in words:
        plain = re.sub(r"[^\w.-]+", "_", unicodedata.normalize("NFKC", word)).strip("._-")[:60] or "unnamed"
        name, number = plain, 1
        while name.casefold() in taken:
            number += 1
            name = f"{plain}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


# -- MVTec AD ---------------------------------------------------------------------------------------------


def _mvtec(chosen: Chosen, out: Path) -> tuple[dict[str, int], list[dict[str, Any]]]:
    categories = sorted({row["category"] for row in chosen.rows})
    folders = dict(zip(categories, safe_names(categories), strict=True))
    words = sorted({row["defect"] for row in chosen.rows})
    # "good" comes first, so that no synthetic defect of that name is taken for a normal picture
    defects = dict(zip(words, safe_names([GOOD, *words])[1:], strict=True))
    entries = []
    for sample, png in chosen.samples():
        row = sample.row
        base, defect = folders[row["category"]], defects[row["defect"]]
        picture = f"{base}/test/{defect}/{row['sample_id']}.png"
        mask = f"{base}/ground_truth/{defect}/{row['sample_id']}_mask.png"
        _put(out / picture, png)
        _put(out / mask, pictures.encode_mask(sample.mask))
        entries.append({**row, "file": picture, "mask": mask})
    anomalies = len(entries)
    for image, output in _normals(chosen):
        place = {"train": "train", "calibration": "test"}.get(image.split)
        if place is None or image.defect != GOOD:
            continue
        stem = safe_names([Path(image.path.partition("::")[0]).stem])[0]
        picture = f"{folders[image.category]}/{place}/{GOOD}/{stem}-{image.image_id[:12]}.png"
        pixels = pictures.load(image, bits=output["bits"], max_side=output["max_side"])
        _put(out / picture, pictures.encode(pixels, "png"))
        entries.append(
            {"file": picture, "category": image.category, "defect": GOOD, "image_id": image.image_id}
        )
    return {"anomalies": anomalies, "normals": len(entries) - anomalies}, entries


def _normals(chosen: Chosen) -> Iterator[tuple[Image, dict[str, Any]]]:
    """The real pictures of each category as the newest round that has it knows them, for a source may have
    lost some since an earlier one; with the settings of that round's output."""
    left = {row["category"] for row in chosen.rows}
    for number in sorted({row["round"] for row in chosen.rows}, reverse=True):
        settings = chosen.space.read_yaml(round_file(number, "settings.yaml"))
        known = images_from(chosen.space.read_table(round_file(settings["first"], "images.parquet")))
        own = [image for image in known if image.category in left]
        left -= {image.category for image in own}
        yield from ((image, settings["config"]["output"]) for image in own)


def defect_names(space: Workspace) -> list[str]:
    """The defects of all samples in the workspace: a round's new ones by name, behind those of the rounds
    before. So a defect has the same number whichever rounds are exported, and in later exports, too."""
    names: dict[str, None] = {}
    for number in space.rounds():
        if space.exists(round_file(number, "shards.parquet")):
            names |= dict.fromkeys(sorted({row["defect"] for row in sample_rows(space, number)}))
    return list(names)


# -- COCO -------------------------------------------------------------------------------------------------


def _coco(chosen: Chosen, out: Path) -> tuple[dict[str, int], list[dict[str, Any]]]:
    numbers = {name: number for number, name in enumerate(defect_names(chosen.space), start=1)}
    names = licences(list(chosen.images.values()))
    licence_ids = {licence: number for number, licence in enumerate(names, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    entries = []
    for number, (sample, png) in enumerate(chosen.samples(), start=1):
        row = sample.row
        file = f"images/{row['sample_id']}.png"
        _put(out / file, png)
        entries.append({**row, "file": file})
        height, width = sample.mask.shape
        image = {"id": number, "file_name": f"{row['sample_id']}.png", "width": width, "height": height}
        licence = chosen.images[row["image_id"]].licence
        images.append(image | ({"license": licence_ids[licence]} if licence else {}))
        for component in components(sample.mask):
            ys, xs = np.nonzero(component)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": numbers[row["defect"]],
                    "iscrowd": 0,
                    "area": len(ys),
                    "bbox": [int(v) for v in (xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)],
                    "segmentation": {"size": [height, width], "counts": run_lengths(component)},
                }
            )
    document = {
        "info": {"description": "Synthetic anomalies on pictures of good parts, made by flawsmith"},
        "licenses": [{"id": i, "name": name, "url": ""} for name, i in licence_ids.items()],
        "categories": [{"id": i, "name": n, "supercategory": "anomaly"} for n, i in numbers.items()],
        "images": images,
        "annotations": annotations,
    }
    _put(out / "annotations.json", json.dumps(document, ensure_ascii=False).encode())
    return {"anomalies": len(images), "instances": len(annotations)}, entries


def components(mask: np.ndarray) -> Iterator[np.ndarray]:
    """The connected parts (8 neighbours) of a bool mask, each a bool mask of the same size."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=8)
    for label in range(1, count):
        yield labels == label


def run_lengths(mask: np.ndarray) -> list[int]:
    """COCO's uncompressed run lengths: column by column, alternately of 0 and 1, beginning with 0.

    >>> run_lengths(np.array([[True, False], [True, True]]))
    [0, 2, 1, 1]
    """
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff([0, *changes, len(flat)]).tolist()
    return [0, *runs] if flat[0] else runs


# -- YOLO -------------------------------------------------------------------------------------------------


def _yolo(chosen: Chosen, out: Path) -> tuple[dict[str, int], list[dict[str, Any]]]:
    numbers = {name: number for number, name in enumerate(defect_names(chosen.space))}
    # samples of one normal stay on one side; a single normal has to serve both
    normals = sorted({row["image_id"] for row in chosen.rows})
    validation = set(normals[1::VALIDATION])
    entries, instances = [], 0
    for sample, png in chosen.samples():
        row = sample.row
        place = "val" if row["image_id"] in validation else "train"
        defect = numbers[row["defect"]]
        lines = [
            " ".join([str(defect), *(f"{value:.6f}" for value in polygon(part).ravel())])
            for part in components(sample.mask)
        ]
        file = f"images/{place}/{row['sample_id']}.png"
        _put(out / file, png)
        _put(out / f"labels/{place}/{row['sample_id']}.txt", "".join(f"{line}\n" for line in lines).encode())
        entries.append({**row, "file": file})
        instances += len(lines)
    settings = {
        "train": "images/train",
        "val": "images/val" if (out / "images/val").exists() else "images/train",
        "names": {number: name for name, number in numbers.items()},
    }
    _put(out / "data.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode())
    return {"anomalies": len(entries), "instances": instances}, entries


def polygon(component: np.ndarray) -> np.ndarray:
    """The outline of one connected component: float64, N×2 of (x, y) in [0, 1], N ≥ 3.

    Points are centres of the component's own pixels, so that filling the polygon with its border (as
    ultralytics does) gives the component back. A hole is joined to the outline by a line there and back.
    """
    height, width = component.shape
    contours, hierarchy = cv2.findContours(
        component.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE
    )
    rings = [contour[:, 0].astype(np.int64) for contour in contours]
    outer = next(index for index, links in enumerate(hierarchy[0]) if links[3] < 0)
    points = rings[outer]
    for hole in (ring for index, ring in enumerate(rings) if index != outer):
        distance = np.abs(points[:, None] - hole[None]).sum(axis=2)
        at, start = np.unravel_index(distance.argmin(), distance.shape)
        around = np.concatenate([np.roll(hole, -start, axis=0), hole[start : start + 1]])
        points = np.concatenate([points[: at + 1], around, points[at:]])
    while len(points) < 3:
        points = np.concatenate([points, points[-1:]])
    return (points + 0.5) / (width, height)


# -- common -----------------------------------------------------------------------------------------------


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _describe(chosen: Chosen, out: Path, format: str, entries: Sequence[dict[str, Any]]) -> None:
    """``manifest.csv``, one line a picture, and ``README.md``: what is synthetic, and the licences."""
    with open(out / "manifest.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [*MANIFEST, "synthetic"], restval="", extrasaction="ignore")
        writer.writeheader()
        for entry in entries:
            licence = chosen.images[entry["image_id"]].licence or ""
            writer.writerow({**entry, "licence": licence, "synthetic": int("sample_id" in entry)})
    notes = {
        "mvtec": "`CATEGORY/train/good` and `CATEGORY/test/good` hold real pictures of good parts (the train "
        "and the calibration split). Everything in the other folders of `test` is **synthetic**: use it for "
        "training or for trying things out, and judge a detector on real defects.",
        "coco": "Every picture is **synthetic**. Segmentations are uncompressed run lengths (COCO's RLE), "
        "exact to the pixel; each connected part of a mask is one instance.",
        "yolo": "Every picture is **synthetic**, those for validation too: put real pictures in `val` before "
        "you believe its figures. Each connected part of a mask is one polygon through the centres of its "
        "border pixels. Samples of one normal picture are never on both sides.",
    }
    lines = ["# Synthetic anomalies, exported by flawsmith", "", notes[format], ""]
    lines += ["`manifest.csv` says of every picture what it is and where it comes from.", ""]
    for licence, categories in licences(list(chosen.images.values())).items():
        lines.append(f"- licence of the pictures of {', '.join(categories)}: {licence}")
    _put(out / "README.md", ("\n".join(lines).rstrip() + "\n").encode())
