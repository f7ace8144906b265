"""Paired tests of two detectors: against brute force, against resampling, and at the command line."""

import itertools
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import cv2
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from detectors.protocol import counted
from manifests.errors import UsageError
from manifests.schema import GOOD, IMAGES, Image, to_table
from manifests.sources import SourceSettings, scan
from manifests.workspace import Workspace
from training import evaluation
from training.comparison import (
    compare,
    delong,
    holm,
    mean_aurocs,
    normal_test,
    paired_bootstrap,
    placements,
)
from training.evaluation import Judged
from training.intervals import Estimate, evaluate_images, evaluate_pixels
from training.metrics import MetricsError
from workflows import comparing
from workflows.cli import app
from workflows.tables import categories_table, comparison_table, parts_table


def brute_force(first, second, labels):
    """DeLong's definition spelt out: the kernel of every pair, components as its means, their covariances."""

    def components(scores):
        kernel = np.array(
            [[(a > n) + 0.5 * (a == n) for n in scores[~labels]] for a in scores[labels]], float
        )
        return kernel.mean(axis=1), kernel.mean(axis=0), kernel.mean()

    (x1, y1, auc1), (x2, y2, auc2) = components(first), components(second)
    s10, s01 = np.cov([x1, x2]), np.cov([y1, y2])
    s = s10 / labels.sum() + s01 / (~labels).sum()
    return auc1, auc2, s[0, 0] + s[1, 1] - 2 * s[0, 1]


few = st.sampled_from([0.0, 0.25, 1.0, 2.0]) | st.floats(-5, 5)


@given(st.lists(st.tuples(few, few, st.booleans()), min_size=4, max_size=25))
def test_delong_equals_its_definition_with_ties(rows):
    first, second, labels = (np.array(column) for column in zip(*rows, strict=True))
    assume(2 <= labels.sum() <= labels.size - 2)
    found = delong(first, second, labels, range(len(rows)))
    assert found == pytest.approx(brute_force(first, second, labels), abs=1e-10)
    for kind in (labels, ~labels):
        assert placements(first, labels)[kind].mean() == pytest.approx(roc_auc_score(labels, first))


def scored(rng, parts, each=1, correlation=0.7, shift=(1.0, 1.0)):
    """Scores of two detectors on ``parts`` parts of ``each`` pictures; noise shared within a part."""
    labels = np.repeat(np.arange(parts) % 2 == 1, each)
    groups = np.repeat(np.arange(parts), each)
    common = rng.standard_normal(parts)
    own = rng.standard_normal((2, parts))
    scores = correlation * common + np.sqrt(1 - correlation**2) * own
    noise = 0.1 * rng.standard_normal((2, parts * each))
    return *(scores[k][groups] + noise[k] + shift[k] * labels for k in (0, 1)), labels, groups


@pytest.mark.parametrize("each", [1, 4])
def test_delongs_variance_agrees_with_resampled_groups(each):
    first, second, labels, groups = scored(np.random.default_rng(2), 160, each)
    estimates = [
        evaluate_images(s, labels, groups.tolist(), resamples=2000)["image_auroc"] for s in (first, second)
    ]
    resampled = (estimates[1].resamples - estimates[0].resamples).std()
    found = delong(first, second, labels, groups.tolist())
    assert np.sqrt(found.variance) == pytest.approx(resampled, rel=0.08)
    if each > 1:  # taken for independent pictures, copies of a part would look like evidence
        alone = delong(first, second, labels, range(labels.size))
        assert np.sqrt(alone.variance) < 0.65 * resampled


def test_false_alarms_of_both_tests_are_as_rare_as_they_say():
    """Two equally good detectors: p < 0.05 in about one case in twenty."""
    rng = np.random.default_rng(5)
    alarms = np.zeros(2)
    for seed in range(150):
        first, second, labels, groups = scored(rng, 60)
        estimates = [
            evaluate_images(s, labels, groups.tolist(), resamples=199, seed=seed) for s in (first, second)
        ]
        alarms += [
            normal_test(delong(first, second, labels, groups.tolist())).p < 0.05,
            paired_bootstrap(*(e["image_ap"] for e in estimates)).p < 0.05,
        ]
    assert (alarms <= 17).all(), alarms  # 7.5 expected; 17 has a chance of 0.1 %


@pytest.mark.parametrize("parts", [1, 4, 5])
def test_few_parts_with_defects_are_no_ground_for_a_test(parts):
    rng = np.random.default_rng(0)
    both = []
    for _ in range(2):
        judged = []
        for number in range(8 + 2 * parts):
            bad = number >= 8
            group = f"bad{number % parts}" if bad else f"good{number}"
            fields = dict.fromkeys(Image.__dataclass_fields__) | {"category": "a", "group": group}
            image = Image(**fields | {"image_id": str(number), "defect": "hole" if bad else GOOD})
            judged.append(Judged(image, float(rng.normal(bad)), np.zeros((8, 8), np.float32), None, None))
        both.append(judged)
    rows = compare(*both, resamples=99)
    assert {row["metric"] for row in rows} >= {"image_auroc", "image_ap"}
    assert all(np.isnan(row["p"]) == (parts < 5) for row in rows)


def test_a_mean_over_categories_of_few_parts_is_tested_and_rarely_wrong():
    """Three categories of two parts with defects: of each nothing is said, of the mean no more than holds."""

    def pair(rng, shift):
        both = [[], []]
        for category, number in itertools.product("abc", range(16)):
            fields = dict.fromkeys(Image.__dataclass_fields__) | {"category": category}
            fields |= {"image_id": f"{category}{number}", "group": f"{number // 2}"}
            image = Image(**fields | {"defect": "hole" if number < 4 else GOOD})
            for k, judged in enumerate(both):
                score = float(rng.normal((1 + k * shift) * (number < 4)))
                judged.append(Judged(image, score, np.zeros((8, 8), np.float32), None, None))
        return both

    rng = np.random.default_rng(3)
    wrong, found = Counter(), Counter()
    for _ in range(60):
        rows = compare(*pair(rng, 0), resamples=99, parts=False)
        assert all(np.isnan(row["p"]) for row in rows if row["category"] != "mean")
        wrong.update(row["metric"] for row in rows if row["p"] < 0.05)
        rows = compare(*pair(rng, 4), resamples=99, parts=False)
        found.update(row["metric"] for row in rows if row["low"] > 0)
    for metric in ("image_ap", "image_auroc"):  # 3 expected at 5 %; more than 6 have a chance of 3 %
        assert wrong[metric] <= 6 and found[metric] >= 20, (metric, wrong, found)


def test_a_mean_over_types_is_no_better_known_than_its_rarest_type():
    """As MVTec LOCO has it: twelve parts with one type, two with the other."""
    both = [[], []]
    rng = np.random.default_rng(0)
    for judged in both:
        for number in range(26):
            defect = "good" if number < 12 else "logical" if number < 24 else "structural"
            fields = dict.fromkeys(Image.__dataclass_fields__) | {"category": "a", "group": str(number)}
            image = Image(**fields | {"image_id": str(number), "defect": defect, "width": 32, "height": 32})
            mask = np.zeros((32, 32), bool)
            mask[4:9, 4:9] = number >= 12
            scores = (rng.standard_normal((32, 32)) + mask).astype(np.float32)
            judged.append(Judged(image, float(scores.max()), scores, mask, None))

    def defects(image):
        own = both[0][int(image.image_id)]
        return [(own.mask, 10)] if own.anomalous else []

    with (
        mock.patch.object(evaluation, "has_saturations", return_value=True),
        mock.patch.object(evaluation, "load_defects", defects),
    ):
        rows = compare(*both, resamples=50)
    found = {tuple(row[key] for key in ("defect", "metric")): row for row in rows}
    for place, tested in {
        ("all", "image_auroc"): True, ("logical", "spro"): True, ("structural", "spro"): False,
        ("all", "spro"): False, ("mean", "image_auroc"): False,
    }.items():  # fmt: skip
        assert np.isnan(found[place]["low"]) != tested, place


def test_two_perfect_detectors_are_not_proven_equal():
    labels = np.array([False, False, True, True, True])
    found = delong(np.arange(5.0), np.array([1.0, 0, 4, 3, 2]), labels, list("abcde"))
    assert found.first == found.second == 1 and np.isnan(normal_test(found).p)


def test_pairing_finds_what_two_intervals_cannot():
    """Both detectors meet the same hard parts: each interval is wide, that of the difference is not."""
    first, second, labels, groups = scored(np.random.default_rng(1), 120, correlation=0.97, shift=(1.0, 1.4))
    pair = [evaluate_images(s, labels, groups.tolist())["image_auroc"] for s in (first, second)]
    assert pair[0].interval[1] > pair[1].interval[0]
    for found in (paired_bootstrap(*pair), normal_test(delong(first, second, labels, groups.tolist()))):
        assert found.low > 0
        assert found.p < 0.01


def test_p_and_interval_of_the_bootstrap_agree():
    gaps = np.arange(1, 1001) / 1000.0
    for shift in (0.02, 0.024, 0.026, 0.03, 0.5, 0.98):
        found = paired_bootstrap(Estimate(0.0, np.zeros(1000)), Estimate(0.5 - shift, gaps - shift))
        assert (found.p < 0.05) == (found.low > 0 or found.high < 0), shift
    unknown = paired_bootstrap(Estimate(0.1, np.full(9, np.nan)), Estimate(0.2, np.full(9, np.nan)))
    assert np.isnan(unknown.p)


def test_a_detector_does_not_differ_from_itself_or_from_a_rescaled_self():
    first, _, labels, groups = scored(np.random.default_rng(0), 20)
    found = normal_test(delong(first, np.exp(first), labels, groups.tolist()))
    assert (found.low, found.high, found.p) == (0, 0, 1)
    one_part = delong(first, -first, labels, ["a"] * labels.size)
    assert np.isnan(normal_test(one_part).p)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_rejects_as_its_steps_do(values):
    """The procedure itself: in rising order, stop at the first p above level / tests left."""
    adjusted = holm(values)
    for level in (0.01, 0.05, 0.3):
        rejected, left = set(), len(values)
        for k in sorted(range(len(values)), key=values.__getitem__):
            if values[k] * left > level:
                break
            rejected.add(k)
            left -= 1
        near = any(abs(value * n - level) < 1e-9 for value, n in itertools.product(values, range(1, 13)))
        assert near or {k for k, p in enumerate(adjusted) if p <= level} == rejected


def test_the_mean_over_categories_is_tested_as_independent():
    rng = np.random.default_rng(4)
    parts = []
    for _ in range(3):
        first, second, labels, groups = scored(rng, 40)
        parts.append(delong(first, second, labels, groups.tolist()))
    mean = mean_aurocs([*parts, delong(np.ones(3), np.ones(3), np.ones(3, bool), "abc")])
    assert mean.first == pytest.approx(np.mean([part.first for part in parts]))
    assert mean.variance == pytest.approx(sum(part.variance for part in parts) / 9)


def picture(category, number, defect="good"):
    return Image(
        image_id=f"{category}{number}", path=f"{category}{number}.png", sha256="", category=category,
        defect=defect, mask_path=None, width=32, height=32, mode="L", bits=8, group=f"g{number // 2}",
        split="feedback",
    )  # fmt: skip


def judged_by(rng, signal, categories=("a", "b"), pictures=16):
    """What a detector that sees squares with ``signal`` says of the same pictures each time."""
    result = []
    for category in categories:
        for number in range(pictures):
            mask = np.zeros((32, 32), bool)
            if number % 2:
                mask[4 + number : 10 + number, 6:12] = True
            scores = rng.standard_normal((32, 32)).astype(np.float32) + signal * mask
            image = picture(category, number, "hole" if number % 2 else "good")
            result.append(Judged(image, float(scores.max()), scores.astype(np.float32), mask, None))
    return result


def test_a_comparison_has_a_row_a_category_and_metric_and_the_right_sign():
    weak, strong = (judged_by(np.random.default_rng(k), signal) for k, signal in enumerate((0.5, 2.5)))
    rows = compare(weak, strong, resamples=200, parts=False)
    by_place = {(row["category"], row["metric"]): row for row in rows}
    metrics = {
        "image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "aupro",
    }  # fmt: skip
    assert set(by_place) == set(itertools.product(("a", "b", "mean"), metrics))
    for name in ("pixel_ap", "aupro"):
        row = by_place["mean", name]
        assert row["low"] > 0 and row["p"] < 0.02 and row["second"] > row["first"]
        assert by_place["a", name]["holm"] >= by_place["a", name]["p"]
        assert np.isnan(row["holm"])
    own = [entry for entry in strong if entry.image.category == "a"]
    exact = evaluate_pixels(
        [e.map for e in own], [e.mask for e in own], [e.image.group for e in own], resamples=5
    )
    assert by_place["a", "pixel_ap"]["second"] == pytest.approx(exact["pixel_ap"].value)

    same = compare(weak, weak, resamples=50)
    assert {(row["difference"], row["p"]) for row in same} == {(0.0, 1.0)}
    turned = compare(strong, weak, resamples=200, parts=False)
    back = {(row["category"], row["metric"]): row for row in turned}
    for place, row in by_place.items():
        assert back[place]["difference"] == -row["difference"]
        assert back[place]["low"] == pytest.approx(-row["high"])
        assert back[place]["p"] == pytest.approx(row["p"])


def test_a_comparison_tells_at_which_defects():
    """B sees the scratches, all tiny, and A does not; either sees the holes alike. A type or a size has its
    exact figures, its own tests and corrections."""
    both: list[list[Judged]] = [[], []]
    rng = np.random.default_rng(0)
    for category, number in itertools.product("ab", range(60)):
        defect = ("good", "hole", "scratch")[number % 3]
        mask = np.zeros((64, 64), bool)
        if defect == "hole":
            mask[8:24, 8:24] = True
        elif defect == "scratch":
            mask[40, 20:23] = True
        noise = rng.standard_normal((2, 64, 64)).astype(np.float32)
        image = replace(picture(category, number, defect), group=f"g{number // 6}")
        for judged, own, signal in zip(both, noise, (0.0, 6.0), strict=True):
            scores = own + np.float32(6.0 if defect == "hole" else signal) * mask
            judged.append(Judged(image, float(scores.max()), scores, mask, None))
    rows = compare(*both, resamples=400)
    found = {tuple(row[key] for key in ("category", "defect", "size", "metric")): row for row in rows}
    slices = {("all", "all"), ("all", "tiny"), ("all", "large")}
    types = {("hole", "all"), ("scratch", "all")}
    assert {place[1:3] for place in found if place[0] == "mean"} == slices
    assert {place[1:3] for place in found if place[0] == "a"} == slices | types
    for category, (slice_, gains) in itertools.product(
        "ab", {("scratch", "all"): True, ("hole", "all"): False, ("all", "tiny"): True}.items()
    ):
        row = found[category, *slice_, "pixel_ap"]
        assert (row["low"] > 0.2 and row["holm"] < 0.05) == gains
        assert gains or row["p"] > 0.05
    assert ("a", "all", "tiny", "image_auroc") not in found  # a picture may have defects of several sizes

    own = [entry for entry in both[1] if entry.image.category == "a" and entry.image.defect != "hole"]
    labels = np.array([entry.anomalous for entry in own])
    groups = [entry.image.group for entry in own]
    exact = evaluate_pixels([e.map for e in own], [e.mask for e in own], groups, resamples=5)
    assert found["a", "scratch", "all", "aupro"]["second"] == pytest.approx(exact["aupro"].value)
    first = [entry for entry in both[0] if entry.image.category == "a" and entry.image.defect != "hole"]
    tested = normal_test(delong(*(np.array([e.score for e in j]) for j in (first, own)), labels, groups))
    row = found["a", "scratch", "all", "image_auroc"]
    assert (row["first"], row["second"], row["p"]) == pytest.approx((tested.first, tested.second, tested.p))
    family = [found[c, t, "all", "image_ap"] for c in "ab" for t in ("hole", "scratch")]
    assert [row["holm"] for row in family] == pytest.approx(holm([row["p"] for row in family]))

    few = [
        [e for e in judged if e.image.defect != "hole" or int(e.image.image_id[1:]) < 18] for judged in both
    ]
    for row in compare(*few, resamples=50):  # three groups with holes, ten with scratches
        untested = row["defect"] == "hole" or row["size"] == "large"  # but for the mean of both categories
        assert np.isnan(row["low"]) == (untested and row["category"] != "mean"), row
    table = parts_table(rows).splitlines()
    assert [line.split()[:2] for line in table] == [
        ["category", "defects"], ["a", "hole"], ["a", "scratch"], ["b", "hole"], ["b", "scratch"],
        ["a", "large"], ["a", "tiny"], ["b", "large"], ["b", "tiny"], ["mean", "large"], ["mean", "tiny"],
    ]  # fmt: skip
    assert "*" in table[2] and "*" not in table[1]
    assert parts_table(compare(*both, resamples=5, parts=False)) == ""


def test_results_on_other_pictures_are_no_pair():
    both = judged_by(np.random.default_rng(0), 1.0)
    other = [replace(both[0], image=replace(both[0].image, image_id="other")), *both[1:]]
    with pytest.raises(MetricsError, match="same pictures"):
        compare(both, other)
    with pytest.raises(MetricsError, match="same pictures"):
        compare(both, both[:-1])


# -- the command ----------------------------------------------------------------------------------------


def brightness(size, signal, categories=("part",)):
    """Its map is the picture's brightness, shown faintly under noise where ``signal`` is small."""

    def score(batch):
        values = batch["features"].float().mean(dim=1) / 255
        noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(len(values)))
        maps = signal * values + noise
        return counted(maps, batch).amax(dim=(1, 2)), maps

    return SimpleNamespace(
        settings=SimpleNamespace(size=size, leak=None), categories=categories, calibration={"threshold": 0.5},
        extract=lambda images: images.float(), score=score,
    )  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A source, a workspace of it with two checkpoints, and the notes that each was trained with."""
    root = tmp_path / "part"
    for number in range(30):
        pixels = np.full((64, 96), 60, np.uint8)
        pixels[0, 0] = number
        defect = number >= 18
        where = root / ("train/good" if number < 6 else "test/good" if not defect else "test/spot")
        where.mkdir(parents=True, exist_ok=True)
        if defect:
            masks = root / "ground_truth/spot"
            masks.mkdir(parents=True, exist_ok=True)
            mask = np.zeros((64, 96), np.uint8)
            mask[20:40, number : number + 20] = 255
            pixels[mask > 0] = 200
            cv2.imwrite(str(masks / f"{number}_mask.png"), mask)
        cv2.imwrite(str(where / f"{number}.png"), pixels)
    images = scan([SourceSettings(path=str(root))]).images
    folders = [tmp_path / "w/rounds" / name / "detectors/brightness" for name in ("000", "001")]
    Workspace(str(tmp_path / "w")).write_table("images.parquet", to_table(images, IMAGES))
    notes = {folder: {} for folder in folders}
    detectors = dict(zip(folders, [brightness(32, 1.0), brightness(48, 8.0)], strict=True))
    monkeypatch.setattr(comparing, "load", lambda folder, device: detectors[folder])
    facts = {"detector": "brightness", "seed": 0}
    monkeypatch.setattr(comparing, "read_config", lambda folder: {**facts, "notes": notes[folder]})
    method = SimpleNamespace(open_categories=False)
    monkeypatch.setattr(comparing, "get", lambda name: method)
    return SimpleNamespace(
        method=method,
        root=root,
        images=images,
        folders=folders,
        notes=notes,
        detectors=detectors,
    )


def test_rounds_are_compared_on_feedback_pictures_and_the_test_split_is_not_read(place):
    for image in place.images:
        if image.split == "test":
            Path(image.path).unlink()
    rows = comparing.compare(*place.folders, resamples=50)
    found = {row["metric"]: row for row in rows if (row["defect"], row["size"]) == ("all", "all")}
    assert {row["category"] for row in rows} == {"part"}
    assert {(row["defect"], row["size"]) for row in rows} == {
        ("all", "all"),
        ("spot", "all"),
        ("all", "large"),
    }
    assert found["pixel_ap"]["difference"] > 0.2 and found["pixel_ap"]["low"] > 0
    table = comparison_table(rows)
    assert len(table.splitlines()) == 1 + len(found) and "image_auroc" in table


def test_a_folder_with_pictures_of_the_test_split_loses_them(place, capsys):
    seen = []
    scorer = place.detectors[place.folders[0]]
    extract = scorer.extract
    scorer.extract = lambda images: seen.append(len(images)) or extract(images)
    comparing.compare(*place.folders, data=place.root, resamples=20)
    splits = [image.split for image in place.images]
    assert sum(seen) == splits.count("feedback")
    said = " ".join(capsys.readouterr().err.split())
    assert f"{splits.count('test')} of {24} pictures are left out" in said


def test_figures_of_a_folder_leave_out_what_the_workspace_keeps(place, capsys):
    rows = comparing.evaluate_on(place.folders[1], place.root, resamples=20)
    found = {row["metric"]: row["value"] for row in rows if row["category"] == "part"}
    ours = comparing.compare(*place.folders, resamples=20)  # on the feedback pictures
    assert found["image_auroc"] == next(row["second"] for row in ours if row["metric"] == "image_auroc")
    assert found["pixel_ap"] > 0.5
    assert "are left out" in " ".join(capsys.readouterr().err.split())
    assert "part" in categories_table("round", {"0": rows})


def test_masks_of_a_folder_say_what_does_not_count(place, tmp_path, capsys):
    """All defects lie on one side: on the other alone, good and bad parts are alike."""
    loose = tmp_path / "loose"
    place.detectors[loose], place.notes[loose] = brightness(32, 8.0), {"places": True}
    right = np.zeros((64, 96), np.uint8)
    right[:, 60:] = 255
    cv2.imwrite(str(tmp_path / "right.png"), right)

    def auroc(**masks: Path) -> float:
        rows = comparing.evaluate_on(loose, place.root, resamples=0, **masks)
        return next(row["value"] for row in rows if row["metric"] == "image_auroc")

    assert auroc() > 0.95
    assert "name their masks with --data, --roi and --ignore" in " ".join(capsys.readouterr().err.split())
    assert auroc(ignore=tmp_path / "right.png") > 0.95
    assert auroc(roi=tmp_path / "right.png") < 0.8
    assert "--roi and --ignore" not in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UsageError, match=r"--roi .*none\.png: there is no such file"):
        auroc(roi=tmp_path / "none.png")


@pytest.mark.parametrize("option", ["--roi", "--ignore", "--category"])
def test_what_is_said_of_other_pictures_belongs_to_data(tmp_path, option):
    for arguments in (["evaluate", str(tmp_path)], ["compare", "A", "B"]):
        found = CliRunner().invoke(app, [*arguments, option, "mask.png"])
        assert isinstance(found.exception, UsageError) and "--data" in str(found.exception)


def test_the_command_compares_where_its_masks_say(place, tmp_path, monkeypatch):
    """A mask that is named stands in place of the workspace's own of that kind alone."""
    for name, level in (("roi", 255), ("ignore", 0), ("known", 0)):
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((64, 96), level, np.uint8))
    known = [replace(image, ignore_path=str(tmp_path / "known.png")) for image in place.images]
    Workspace(str(tmp_path / "w")).write_table("images.parquet", to_table(known, IMAGES))
    seen: list[tuple[str | None, ...]] = []

    def paths(one, other, resamples):
        kept = [(entry.image.roi_path, entry.image.ignore_path) for entry in (*one, *other)]
        seen.extend(tuple(path and Path(path).name for path in pair) for pair in kept)
        return []

    monkeypatch.setattr(
        comparing, "judge", lambda _detector, images, *_, **__: [SimpleNamespace(image=i) for i in images]
    )
    monkeypatch.setattr(comparing, "compare_results", paths)
    arguments = [
        "compare",
        *map(str, place.folders),
        "--data",
        str(place.root),
        "--roi",
        str(tmp_path / "roi.png"),
    ]
    monkeypatch.setattr(comparing, "load", lambda folder, device: place.detectors[Path(folder)])
    monkeypatch.setattr(comparing, "read_config", lambda folder: {"detector": "brightness", "notes": {}})
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert set(seen) == {("roi.png", "known.png")}
    seen.clear()
    CliRunner().invoke(app, [*arguments, "--ignore", str(tmp_path / "ignore.png")], catch_exceptions=False)
    assert set(seen) == {("roi.png", "ignore.png")}


def test_figures_that_leak_are_marked(place, capsys):
    place.detectors[place.folders[0]].settings.leak = "it has seen them all"
    comparing.compare(*place.folders, resamples=20)
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("it has seen them all: its figures leak") == 1
    rows = {name: comparing.evaluate_on(name, place.root, resamples=20) for name in place.folders}
    leaking, clean = (rows[name] for name in place.folders)
    assert {row["detector"] for row in leaking} == {"brightness (leaking)"}
    assert {row["detector"] for row in clean} == {"brightness"}
    assert "brightness (leaking)" in categories_table("round", {"0": leaking})


def test_a_category_that_was_not_trained_on_is_judged_if_the_detector_speaks_of_such(place, tmp_path):
    """Protocol Z: trained on nuts, judged on parts."""
    loose = tmp_path / "loose"
    place.detectors[loose], place.notes[loose] = brightness(32, 8.0, categories=("nut",)), {}
    with pytest.raises(UsageError, match="trained on nut, not on part"):
        comparing.evaluate_on(loose, place.root)
    place.method.open_categories = True
    rows = comparing.evaluate_on(loose, place.root, resamples=20)
    assert {row["category"] for row in rows} == {"part", "mean"}
    assert next(row["value"] for row in rows if row["metric"] == "image_auroc") > 0.9


def test_new_categories_are_not_averaged_with_trained_ones(place, tmp_path, capsys):
    """Trained on parts alone, judged on parts and bolts; compared with one that knows both."""
    place.method.open_categories = True
    shutil.copytree(place.root, tmp_path / "both/part")
    for picture in place.root.rglob("*.png"):
        there = tmp_path / "both/bolt" / picture.relative_to(place.root)
        there.parent.mkdir(parents=True, exist_ok=True)
        pixels = cv2.imread(str(picture))
        cv2.imwrite(str(there), pixels if "ground_truth" in str(picture) else np.maximum(pixels, 3) - 3)
    knows = {"part": ("part",), "bolt": ("bolt",), "both": ("bolt", "part"), "none": ("nut",)}
    for name, categories in knows.items():
        place.detectors[tmp_path / name] = brightness(32, 8.0, categories=categories)
        place.notes[tmp_path / name] = {}
    capsys.readouterr()
    rows = comparing.evaluate_on(tmp_path / "part", tmp_path / "both", resamples=0)
    assert {row["category"] for row in rows} == {"bolt", "mean"}
    said = " ".join(capsys.readouterr().err.split())
    assert "not trained on bolt; part, trained on, left out" in said

    def compared(first: str, second: str) -> set[str]:
        found = comparing.compare(tmp_path / first, tmp_path / second, tmp_path / "both", resamples=20)
        return {row["category"] for row in found}

    assert compared("both", "part") == {"bolt"}
    assert compared("both", "both") == compared("none", "none") == {"bolt", "part", "mean"}
    with pytest.raises(UsageError, match="several kinds"):
        compared("part", "bolt")


def test_a_folder_of_another_name_is_judged_as_the_category_that_it_is_of(place, tmp_path, monkeypatch):
    """Trained on nuts, which lie in a folder called part."""
    place.detectors |= {folder: brightness(32, 8.0, categories=("nut",)) for folder in place.folders}
    with pytest.raises(UsageError, match=r"trained on nut, not on part; .* --category NAME"):
        comparing.evaluate_on(place.folders[0], place.root)
    rows = comparing.evaluate_on(place.folders[0], place.root, resamples=20, category="nut")
    assert {row["category"] for row in rows} == {"nut", "mean"}
    assert next(row["value"] for row in rows if row["metric"] == "image_auroc") > 0.9
    monkeypatch.setattr(comparing, "load", lambda folder, device: place.detectors[Path(folder)])
    monkeypatch.setattr(comparing, "read_config", lambda _folder: {"detector": "brightness"})
    words = ["compare", *map(str, place.folders), "--data", str(place.root), "--category"]
    assert "nut" in CliRunner().invoke(app, [*words, "nut"], catch_exceptions=False).output
    with pytest.raises(UsageError, match="trained on nut, not on part"):
        CliRunner().invoke(app, [*words, "part"], catch_exceptions=False)


def test_a_name_for_several_categories_is_refused(place):
    shutil.copytree(place.root, place.root.parent / "both/part")
    shutil.copytree(place.root / "test/spot", place.root.parent / "both/other/train/good")
    for picture in (place.root.parent / "both/other/train/good").iterdir():
        cv2.imwrite(str(picture), cv2.imread(str(picture)) + 1)
    with pytest.raises(UsageError, match=r"--category part: .* 2 categories \(other, part\)"):
        comparing.evaluate_on(place.folders[0], place.root.parent / "both", category="part")


def test_what_cannot_be_compared_is_a_usage_error(place, tmp_path):
    first, second = place.folders
    loose = tmp_path / "loose"
    place.detectors[loose], place.notes[loose] = brightness(32, 1.0), {}
    with pytest.raises(UsageError, match="--data FOLDER"):
        comparing.compare(loose, first)
    place.detectors[second] = brightness(32, 1.0, categories=("nut",))
    with pytest.raises(UsageError, match="trained on nut, not on part"):
        comparing.compare(first, second)
    other = tmp_path / "v/rounds/000/detectors/brightness"
    swapped = [replace(i, split="test") if i.split == "feedback" else i for i in place.images]
    Workspace(str(tmp_path / "v")).write_table("images.parquet", to_table(swapped, IMAGES))
    place.detectors[other], place.notes[other] = brightness(32, 1.0), {}
    with pytest.raises(UsageError, match="in the test split for the second"):
        comparing.compare(first, other)


@pytest.mark.parametrize("tiles", [(None, None), (0.25, None), (0.25, 0.5)])
def test_maps_are_compared_at_one_size(place, tiles, monkeypatch):
    for folder, overlap in zip(place.folders, tiles, strict=True):
        place.notes[folder] = {"tiles": overlap, "max_side": 80}
    shapes = []
    monkeypatch.setattr(
        comparing,
        "compare_results",
        lambda a, b, resamples: shapes.extend((e.map.shape, e.mask.shape) for e in (*a, *b)) or [],
    )
    comparing.compare(*place.folders)
    expected = (48, 48) if tiles == (None, None) else (53, 80)
    assert set(shapes) == {(expected, expected)}
