"""MVTec LOCO: its layout is read, and its saturation thresholds reach the figures."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from manifests.errors import PictureError
from manifests.pictures import has_saturations, load_defects, load_mask
from manifests.sources import SourceSettings, scan
from training.comparison import compare
from training.evaluation import Judged, at_size, figures, ignored, truth
from training.intervals import evaluate_images, evaluate_spro, mean_estimate
from training.metrics import LogicalDefect, pixel_metrics, saturated_pixels, spro

SHAPE = (60, 90)
CONFIG = [
    {"defect_name": "missing", "pixel_value": 255, "saturation_threshold": 40, "relative_saturation": False},
    {"defect_name": "dent", "pixel_value": 251, "saturation_threshold": 0.5, "relative_saturation": True},
]


def square(top, left, side=10):
    mask = np.zeros(SHAPE, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), pixels)


@pytest.fixture
def loco(tmp_path):
    """One category: logical anomalies with two defects (of which one is small), structural ones with one."""
    root = tmp_path / "box"
    counts = {"train/good": 6, "validation/good": 3, "test/good": 6}
    counts |= {"test/logical_anomalies": 6, "test/structural_anomalies": 6}
    rng = np.random.default_rng(0)
    for place, count in counts.items():
        for number in range(count):
            write(root / place / f"{number:03d}.png", rng.integers(0, 256, SHAPE, dtype=np.uint8))
    for number in range(6):
        folder = root / "ground_truth"
        write(folder / "logical_anomalies" / f"{number:03d}" / "000.png", np.uint8(255) * square(5, 5, 20))
        write(folder / "logical_anomalies" / f"{number:03d}" / "001.png", np.uint8(251) * square(40, 60, 8))
        write(folder / "structural_anomalies" / f"{number:03d}" / "000.png", np.uint8(251) * square(20, 50))
    (root / "defects_config.json").write_text(json.dumps(CONFIG))
    return root


def found_in(loco):
    result = scan([SourceSettings(path=str(loco))])
    assert not result.problems, result.problems
    return result.images


def test_the_layout_is_read_as_it_is_published(loco):
    images = found_in(loco)
    assert {image.category for image in images} == {"box"}
    splits = [image.split for image in images]
    assert (splits.count("train"), splits.count("calibration")) == (6, 3), "validation/good calibrates"
    assert splits.count("feedback") + splits.count("test") == 18
    logical = next(image for image in images if image.defect == "logical_anomalies")
    np.testing.assert_array_equal(load_mask(logical), square(5, 5, 20) | square(40, 60, 8))
    assert has_saturations(logical) and not has_saturations(images[0])
    (large, small), areas = zip(*load_defects(logical), strict=True)
    np.testing.assert_array_equal(large, square(5, 5, 20))
    np.testing.assert_array_equal(small, square(40, 60, 8))
    assert areas == (40, 32)  # pixels, and half of 64
    assert load_defects(images[0]) == []


def test_what_is_wrong_with_a_category_is_named(loco):
    write(loco / "ground_truth/structural_anomalies/002/000.png", np.uint8(7) * square(20, 50))
    image = next(i for i in found_in(loco) if i.path.endswith("structural_anomalies/002.png"))
    with pytest.raises(PictureError, match=r"002/000\.png: pixels of value 7.* 251, 255"):
        load_defects(image)
    (loco / "ground_truth/structural_anomalies/002/000.png").unlink()
    problems = scan([SourceSettings(path=str(loco))]).problems
    assert any("structural_anomalies/002.png" in problem.path for problem in problems)


def judged(images, hit, rng, size=48):
    """Maps that mark the named share of each picture's defects, under noise."""
    result = []
    for image in images:
        mask = truth(image, size)
        scores = rng.random((size, size), dtype=np.float32)
        scores += 3 * (mask & (rng.random(mask.shape) < hit))
        result.append(Judged(image, float(scores.max()), scores, mask, ignored(image, size)))
    return result


def rows_of(entries):
    rows = figures(entries, round_=0, detector="d", split="feedback", training_seed=0, resamples=60)
    return {(row["category"], row["defect"], row["size"], row["metric"]): row for row in rows}


def test_saturation_thresholds_reach_the_figures(loco):
    images = [image for image in found_in(loco) if image.split in ("feedback", "test")]
    entries = judged(images, 0.6, np.random.default_rng(1))
    rows = rows_of(entries)
    values = {}
    for name in ("logical_anomalies", "structural_anomalies"):
        own = [entry for entry in entries if entry.image.defect in ("good", name)]
        maps = [at_size(entry.map, *SHAPE) for entry in own]
        defects = [[LogicalDefect(m, a) for m, a in load_defects(entry.image)] for entry in own]
        values[name] = spro(maps, defects)
        row = rows["box", name, "all", "spro"]
        assert row["value"] == pytest.approx(values[name])
        assert row["low"] <= row["value"] + 0.02 and row["value"] <= row["high"] + 0.02
        for limit in (0.01, 0.1, 0.3, 1.0):
            row = rows["box", name, "all", f"spro@{limit:g}"]
            assert row["value"] == pytest.approx(spro(maps, defects, limit))
            assert row["low"] <= row["value"] + 0.02 and row["value"] <= row["high"] + 0.02
        plain = pixel_metrics(maps, [load_mask(entry.image) for entry in own], fpr_limit=0.05)["aupro"]
        assert values[name] > plain + 0.05, "a defect is found at its saturation, not at its whole area"
    mean = np.mean(list(values.values()))
    assert rows["box", "all", "all", "spro"]["value"] == pytest.approx(mean)
    assert rows["mean", "all", "all", "spro"]["value"] == pytest.approx(mean)
    types = [rows["box", name, "all", "image_auroc"]["value"] for name in values]
    assert rows["box", "mean", "all", "image_auroc"]["value"] == pytest.approx(np.mean(types))
    assert rows["mean", "mean", "all", "image_auroc"]["value"] == pytest.approx(np.mean(types))

    (loco / "defects_config.json").unlink()
    assert not any(metric.startswith("spro") for _, _, _, metric in rows_of(entries))


def test_comparisons_know_the_headline_alone(loco):
    images = [image for image in found_in(loco) if image.split in ("feedback", "test")]
    first, second = (judged(images, hit, np.random.default_rng(1)) for hit in (0.4, 0.8))
    found = {row["metric"] for row in compare(first, second, resamples=20)}
    assert {metric for metric in found if metric.startswith("spro")} == {"spro"}


def test_ignored_places_count_in_no_saturated_figure(loco, tmp_path):
    images = [image for image in found_in(loco) if image.split in ("feedback", "test")]
    roi = np.zeros(SHAPE, np.uint8)
    roi[:, 45:] = 255  # the large logical defect lies outside
    write(tmp_path / "roi.png", roi)
    images = [replace(image, roi_path=str(tmp_path / "roi.png")) for image in images]
    entries = judged(images, 1.0, np.random.default_rng(1))
    expected = rows_of(entries)
    for entry in entries:
        entry.map[:, :23] = np.random.default_rng(2).random((48, 23)) * 100  # false alarms and misses outside
    for key, row in rows_of(entries).items():
        if key[-1] in ("spro", "pixel_ap", "aupro"):
            assert row["value"] == pytest.approx(expected[key]["value"], abs=1e-9), key
    assert expected["box", "all", "all", "spro"]["value"] > 0.95


def test_spro_resamples_equal_those_of_the_pictures_drawn(monkeypatch):
    rng = np.random.default_rng(0)
    pixels, names, pictures = [], ["good", "good", "logical", "structural", "logical", "structural"], []
    for name in names:
        scores = rng.standard_normal((120, 120)).astype(np.float32)
        defects = []
        if name != "good":
            mask = np.zeros((120, 120), bool)
            mask[20:80, 30:90] = True
            defects = [LogicalDefect(mask, 1500), LogicalDefect(np.roll(mask, 25, axis=1), 400)]
            scores += 1.5 * mask
        pictures.append((scores, defects))
        pixels.append(saturated_pixels(scores, defects))
    groups = ["a", "b", "a", "b", "c", "c"]
    draws = np.array([[1, 1, 1], [2, 1, 0], [0, 2, 1], [0, 3, 0]], float)
    monkeypatch.setattr("training.intervals.draw_counts", lambda *_: draws)
    found = evaluate_spro(pixels, names, groups, (0.05, 1.0))
    for row, counts in enumerate(draws):
        for name in ("logical", "structural"):
            drawn = [
                pictures[k] for k in range(6) if names[k] in ("good", name)
                for _ in range(int(counts["abc".index(groups[k])]))
            ]  # fmt: skip
            if any(defects for _, defects in drawn):
                exact = spro(*zip(*drawn, strict=True))
                assert found[name]["spro"].resamples[row] == pytest.approx(exact, abs=6e-3)
                whole = spro(*zip(*drawn, strict=True), fpr_limit=1.0)
                assert found[name]["spro@1"].resamples[row] == pytest.approx(whole, abs=6e-3)
            else:
                assert np.isnan(found[name]["spro"].resamples[row])
    for metric in ("spro", "spro@1"):
        logical, structural, mean = (
            found[name][metric].resamples for name in ("logical", "structural", "all")
        )
        np.testing.assert_array_equal(mean, (logical + structural) / 2)


def test_subsets_of_the_same_pictures_share_their_draws():
    """The mean over types whose good pictures are the same is as wide as its pictures make it."""
    rng = np.random.default_rng(3)
    kinds = np.arange(120) % 3
    scores, labels = rng.standard_normal(120) + (kinds > 0), kinds > 0
    parts = [
        evaluate_images(scores, labels, range(120), counted=(kinds == 0) | (kinds == kind), resamples=1500)
        for kind in (1, 2)
    ]
    mean = mean_estimate([part["image_auroc"] for part in parts])
    pooled = evaluate_images(scores, labels, range(120), resamples=1500)["image_auroc"]
    assert mean.value == pytest.approx(pooled.value)  # as many pictures of each type
    assert mean.resamples.std() == pytest.approx(pooled.resamples.std(), rel=0.05)
