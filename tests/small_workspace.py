"""A workspace of two rounds with real shards and tables, made in a moment: for what reads workspaces."""

import io
from dataclasses import replace

import cv2
import numpy as np

from manifests import pictures, shards
from manifests.schema import (
    DECISIONS,
    HISTORY,
    IMAGES,
    METRICS,
    SAMPLES,
    SHARDS,
    Image,
    images_from,
    to_table,
)
from manifests.workspace import Workspace, part, round_file
from training.evaluation import Judged
from workflows.config import parse_config
from workflows.detecting import FOUND
from workflows.heatmaps import write_heatmaps

LICENCE = "CC BY-NC-SA 4.0 (non-commercial use only)"
NASTY = "../../<script>alert(1)</script>"


def sample_row(round_, index, category, generator, defect, image, offset, checksum):
    return {
        "sample_id": f"{round_:03d}-00000-{index:05d}", "round": round_, "image_id": image.image_id,
        "category": category, "generator": generator, "defect": defect, "prompt": "", "detail": "",
        "wanted_area": 0.05, "area": 0.05, "severity": 0.5, "count": 1, "location": "anywhere", "donors": [],
        "params": "{}", "seed": index, "batch": 0, "shard": 0, "status": "accepted", "reason": "",
        "leak": 0.0, "hollow": 0.0, "contrast": 1.5, "measures": "", "attempts": 1, "offset": offset,
        "checksum": checksum, "seconds": 0.01, "device": "cpu", "versions": "{}",
    }  # fmt: skip


def defect_mask(rng, shape):
    """A ring with a hole and a single pixel: two components."""
    mask = np.zeros(shape, np.uint8)
    cv2.circle(mask, (int(rng.integers(10, 14)), int(rng.integers(10, 14))), 7, 1, 3)
    mask[-2, -2] = 1
    return mask > 0


def write_workspace(tmp_path):
    """Two rounds; a grey and a colour category of other sizes; one sample of features a round."""
    rng = np.random.default_rng(3)
    space = Workspace(str(tmp_path / "ws"))
    images, normals = [], {}
    for category, shape in (("bolt", (32, 40, 1)), ("cloth", (36, 32, 3))):
        for index, split in enumerate(("train", "train", "calibration", "test")):
            pixels = rng.integers(0, 255, shape, np.uint8)
            path = tmp_path / f"{category}{index}.png"
            path.write_bytes(pictures.encode(pixels, "png"))
            image = Image(
                pictures.pixel_hash(pixels), str(path), pictures.sha256(path.read_bytes()), category, "good",
                None, shape[1], shape[0], "L" if shape[2] == 1 else "RGB", 8, str(index), split,
                LICENCE if category == "bolt" else None,
            )  # fmt: skip
            images.append(image)
            normals[image.image_id] = pixels
    for name in ("images.parquet", round_file(0, "images.parquet")):
        space.write_table(name, to_table(images, IMAGES))
    config = parse_config({"source": str(tmp_path), "samples": 7}, name="test").model_dump(mode="json")
    for round_ in (0, 1):
        space.write_yaml(
            round_file(round_, "settings.yaml"),
            {"round": round_, "first": 0, "config": config, "generation": config["generation"]},
        )
        write_round(space, round_, images, normals, rng)
    return space


def write_round(space, round_, images, normals, rng):
    samples, facts = [], []
    trained = [image for image in images if image.split == "train"]
    kinds = [("perlin", "good"), ("perlin", NASTY), ("scar", "Scratch"), ("scar", "scratch")]
    for index in range(7):
        image = trained[index % len(trained)]
        generator, defect = kinds[index % 4] if index < 6 else ("feature-noise", "noise")
        normal = normals[image.image_id]
        mask = defect_mask(rng, normal.shape[:2])
        picture = np.where(mask[:, :, None], 255 - normal, normal)
        members = {"image.webp": pictures.encode(picture, "webp")}
        if generator == "feature-noise":
            sink = io.BytesIO()
            np.save(sink, np.ones((4, 5, 3), np.float16))
            mask = np.eye(5, 3, dtype=bool)
            members = {"feature.npy": sink.getvalue()}
        members |= {"mask.png": pictures.encode_mask(mask), "normal.webp": pictures.encode(normal, "webp")}
        members["json"] = shards.sample_json({}, {}, {})
        samples.append((f"{round_:03d}-00000-{index:05d}", members))
        facts.append((image.category, generator, defect, image))
    packed = shards.pack(samples)
    space.write_bytes(part("shards", round_, 0, "tar"), packed.data)
    rows = [
        sample_row(round_, index, *fact, offset, checksum)
        for index, (fact, offset, checksum) in enumerate(
            zip(facts, packed.offsets, packed.checksums, strict=True)
        )
    ]
    refused = {**rows[0], "sample_id": f"{round_:03d}-00000-00007", "status": "rejected", "offset": -1}
    rows.append(refused | {"reason": "contrast below 1", "checksum": ""})
    space.write_table(part("samples", round_, 0, "parquet"), to_table(rows, SAMPLES))
    record = {
        "round": round_, "shard": 0, "path": part("shards", round_, 0, "tar"), "sha256": packed.sha256,
        "bytes": len(packed.data), "samples_bytes": 0, "accepted": 7, "rejected": 1, "failed": 0,
        "fingerprint": "{}", "seconds": 1.0, "host": "here", "lossy": False,
    }  # fmt: skip
    space.write_table(round_file(round_, "shards.parquet"), to_table([record], SHARDS))


HOSTILE = (
    "</script><script>window.owned = 1</script><img src=https://evil.test/x onerror=owned=1> $$x$$ & \"'"
)


def metric_row(round_, split, category, name, value, **other):
    row = {
        "round": round_, "detector": "onenip", "seed": 0, "category": category, "defect": "all",
        "size": "all", "split": split, "metric": name, "value": value,
        "low": value - 0.1, "high": value + 0.05,
    }  # fmt: skip
    return row | other


def found_row(image, component, hit, area=0.02):
    return {
        "image_id": image.image_id, "category": image.category, "defect": image.defect,
        "group": image.group, "component": component, "area": area, "contrast": 2.0, "hit": hit,
    }  # fmt: skip


def write_judgement(space):
    """Figures, findings, heat maps, decisions and seconds of both rounds, with hostile words in all of them.

    Of three defects of the type HOSTILE round 0 finds none, round 1 the first; of two scratches round 0 finds
    both, round 1 the second. Each round has a false alarm.
    """
    images = images_from(space.read_table("images.parquet"))
    good = replace(images[3], split="feedback")
    flawed = [replace(images[0], defect=HOSTILE, split="feedback", image_id=f"flawed{i}") for i in range(3)]
    scratched = [replace(images[1], defect="scratch", split="feedback", image_id=f"scratch{i}") for i in "ab"]
    thresholds = {"bolt": (0.5, 0.5), "cloth": (0.5, 0.5)}
    hits = {0: [0.1, 0.0, 0.2, 0.9, 0.8], 1: [0.9, 0.0, 0.3, 0.2, 0.7]}
    earlier = []
    for round_, own in hits.items():
        shape = (24, 24)
        mask = np.zeros(shape, bool)
        mask[4:10, 6:12] = True
        heat = np.linspace(0, 1, 24 * 24, dtype=np.float32).reshape(shape)
        judged = [Judged(good, 0.9, heat, np.zeros(shape, bool), None)]
        judged += [Judged(image, 0.4, heat, mask, None) for image in flawed + scratched]
        found = [found_row(image, 1, hit) for image, hit in zip(flawed + scratched, own, strict=True)]
        write_heatmaps(space, round_, "feedback", judged, found, thresholds, earlier)
        space.write_table(round_file(round_, "found.parquet"), to_table(found, FOUND))
        earlier = found
        rows = [
            metric_row(round_, split, category, name, 0.4 + 0.1 * round_)
            for split in ("feedback", "test", "heldout_synthetic")
            for category in ("mean", "bolt", "cloth")
            for name in ("image_auroc", "image_ap", "pixel_ap", "aupro")
        ]
        rows.append(metric_row(round_, "feedback", "bolt", "image_auroc", 0.66, defect=HOSTILE))
        space.write_table(round_file(round_, "metrics.parquet"), to_table(rows, METRICS))
    decisions = [
        {"round": 0, "setting": "area", "before": "[0.1, 0.2]", "after": "[0.05, 0.1]", "reason": HOSTILE},
        {"round": 0, "setting": "severity", "before": "[0, 1]", "after": "[0, 1]", "reason": "chance"},
    ]
    space.write_table(round_file(0, "decisions.parquet"), to_table(decisions, DECISIONS))
    history = [
        {"round": n, "kind": "seconds.train", "name": "train", "value": value}
        for n, value in enumerate(("61.25", "50.5"))
    ]
    space.write_table("history.parquet", to_table(history, HISTORY))
    name = part("samples", 1, 0, "parquet")
    rows = [
        {**row, "prompt": HOSTILE, "params": '{"note":"</script>"}'}
        for row in space.read_table(name).to_pylist()
    ]
    space.write_table(name, to_table(rows, SAMPLES))
