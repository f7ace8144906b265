"""The report page of a large workspace: how big it is and how soon it answers, in a real browser.

``python -m tests.benchmarks.report --json report.json``. The workspace is fabricated: 5,000 rows, of which
4,500 are accepted, with real shards of grainy pictures of 256 px, which encode badly.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np

from manifests import pictures, shards
from manifests.schema import IMAGES, SAMPLES, SHARDS, Image, to_table
from manifests.workspace import Workspace, part, round_file
from tests.small_workspace import sample_row
from workflows.config import parse_config
from workflows.report.page import write_report

SHARD, SIDE, NORMALS = 500, 256, 60
GENERATORS = ("perlin", "cutpaste", "scar", "poisson", "band", "cut")
DEFECTS = ("stain", "misplaced patch", "scratch", "deformation", "disturbed texture", "crack")
READY = "performance.getEntriesByName('interactive')[0].startTime"


def fabricate(folder: Path, rows: int) -> Workspace:
    """A workspace of two rounds with ``rows`` recipes in all."""
    rng = np.random.default_rng(0)
    space = Workspace(str(folder / "ws"))
    normals, images = [], []
    for at in range(NORMALS):
        grain = cv2.GaussianBlur(rng.normal(0, 40, (SIDE, SIDE, 3)), (0, 0), 1.2)
        pixels = np.clip(120 + grain + rng.normal(0, 4, grain.shape), 0, 255).astype(np.uint8)
        path, category = f"{folder}/{at}.png", ("bolt", "cloth", "ring")[at % 3]
        image = Image(
            pictures.pixel_hash(pixels), path, "", category, "good", None, SIDE, SIDE, "RGB", 8, str(at),
            "train",
        )  # fmt: skip
        normals.append(pixels)
        images.append(image)
    space.write_table("images.parquet", to_table(images, IMAGES))
    config = parse_config({"source": str(folder), "samples": rows // 2}, name="bench").model_dump(mode="json")
    for round_ in (0, 1):
        settings = {"round": round_, "config": config, "generation": config["generation"]}
        space.write_yaml(round_file(round_, "settings.yaml"), settings)
        records = []
        for shard in range(rows // 2 // SHARD):
            facts, members = [], []
            for index in range(SHARD):
                at = int(rng.integers(NORMALS))
                accepted = index % 10 != 9
                facts.append((at, accepted))
                if accepted:
                    sample_id = f"{round_:03d}-{shard:05d}-{index:05d}"
                    members.append((sample_id, sample_members(normals[at], rng)))
            packed = shards.pack(members)
            space.write_bytes(part("shards", round_, shard, "tar"), packed.data)
            places = iter(zip(packed.offsets, packed.checksums, strict=True))
            table = []
            for index, (at, accepted) in enumerate(facts):
                kind = index % len(GENERATORS)
                offset, checksum = next(places) if accepted else (-1, "")
                image, generator, defect = images[at], GENERATORS[kind], DEFECTS[kind]
                row = sample_row(round_, index, image.category, generator, defect, image, offset, checksum)
                row |= {
                    "sample_id": f"{round_:03d}-{shard:05d}-{index:05d}", "shard": shard,
                    "seed": int(rng.integers(2**62)), "params": json.dumps({"strength": rng.random()}),
                    "prompt": f"a photo of a {image.category} with a {defect}, number {index}",
                    "area": float(rng.random()), "contrast": float(rng.random() * 6),
                }  # fmt: skip
                table.append(row if accepted else row | {"status": "rejected", "reason": "contrast"})
            space.write_table(part("samples", round_, shard, "parquet"), to_table(table, SAMPLES))
            made = sum(accepted for _, accepted in facts)
            records.append(
                {
                    "round": round_,
                    "shard": shard,
                    "path": part("shards", round_, shard, "tar"),
                    "sha256": packed.sha256,
                    "bytes": len(packed.data),
                    "samples_bytes": 0,
                    "accepted": made,
                    "rejected": SHARD - made,
                    "failed": 0,
                    "fingerprint": "{}",
                    "seconds": 1.0,
                    "host": "here",
                    "lossy": False,
                }
            )
        space.write_table(round_file(round_, "shards.parquet"), to_table(records, SHARDS))
    return space


def sample_members(normal: np.ndarray, rng: np.random.Generator) -> dict[str, bytes]:
    mask = np.zeros((SIDE, SIDE), np.uint8)
    x, y = (int(value) for value in rng.integers(30, SIDE - 30, 2))
    cv2.circle(mask, (x, y), int(rng.integers(5, 25)), 1, -1)
    picture = np.where(mask[:, :, None] > 0, 255 - normal, normal)
    return {
        "image.webp": pictures.encode(picture, "webp"),
        "mask.png": pictures.encode_mask(mask > 0),
        "normal.webp": pictures.encode(normal, "webp"),
        "json": shards.sample_json({}, {}, {}),
    }


def measure(address: str, runs: int) -> dict[str, float]:
    """Milliseconds of loading the page and of using it, medians; the browser's processor seconds too."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("needs a browser: apt-get install chromium")
    found: dict[str, list[float]] = {}
    with sync_playwright() as api:
        browser = api.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for _ in range(runs):
            page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
            page.set_default_timeout(300_000)
            metrics = page.context.new_cdp_session(page)
            metrics.send("Performance.enable")
            page.goto(address, timeout=300_000)
            page.wait_for_load_state("load")
            figures = {"interactive": page.evaluate(READY)}
            figures["loaded"] = page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd")
            used = {m["name"]: m["value"] for m in metrics.send("Performance.getMetrics")["metrics"]}
            figures["processor"] = 1000 * used["ProcessTime"]
            for name, act in {
                "filter": "document.querySelector('#filters select').value = '1';"
                "document.querySelector('#filters select').dispatchEvent(new Event('change'))",
                "table": "document.getElementById('view-table').click()",
                "sort": "document.querySelector('[data-sort=contrast]').click()",
                "open": "document.querySelector('#sample-table [data-row]').click()",
            }.items():
                figures[name] = page.evaluate(
                    f"(() => {{ const from = performance.now(); {act}; document.body.offsetHeight;"
                    "return performance.now() - from; })()"
                )
            for name, value in figures.items():
                found.setdefault(name, []).append(value)
            page.context.close()
        browser.close()
    return {f"{name}_ms": round(statistics.median(values), 1) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        space = fabricate(Path(folder), options.rows)
        results: dict[str, float] = {"rows": options.rows}
        for name, with_pictures in (("no_pictures", False), ("pictures", True)):
            started, worked = time.perf_counter(), time.process_time()
            report = write_report(space, with_pictures=with_pictures)
            results[f"{name}_write_s"] = round(time.perf_counter() - started, 1)
            results[f"{name}_write_processor_s"] = round(time.process_time() - worked, 1)
            results[f"{name}_mb"] = round((space.size(report) or 0) / 1e6, 2)
        results |= measure("file://" + space.path(report), options.runs)
    for name, value in results.items():
        print(f"{name:<28} {value:>10,}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
