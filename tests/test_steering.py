"""A feedback step on drawn surfaces with planted defects: the settings move towards what the defects are."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from generation.backbones import to_batch
from manifests.recipes import GeneratorSettings
from manifests.schema import SHARDS, to_table
from manifests.workspace import Workspace, round_file
from workflows import probing, steering
from workflows.config import Generation, parse_config
from workflows.detecting import ALARMS, FOUND, evaluate_final
from workflows.rounds import begin, open_round
from workflows.rules import Likeness
from workflows.searching import Verdict
from workflows.space import apply_values, present_values
from workflows.stages import Job, make_shard, settings_hash

SIDE = 64


@pytest.fixture(autouse=True)
def small_probes(monkeypatch):
    monkeypatch.setattr(probing, "SIZE", 96)
    monkeypatch.setattr(probing, "SHARD", 16)


def surface(rng):
    noise = cv2.GaussianBlur(rng.normal(0, 1, (SIDE, SIDE)).astype(np.float32), (0, 0), 1.5)
    return np.clip(128 + 10 * noise / noise.std(), 0, 255)


def blob(rng, area, contrast):
    """(change in levels, mask): a soft disc."""
    y, x = np.mgrid[:SIDE, :SIDE]
    radius = np.sqrt(area * SIDE * SIDE / np.pi)
    cy, cx = rng.uniform(8, SIDE - 8, 2)
    distance = np.hypot(y - cy, x - cx)
    return contrast * rng.choice([-1, 1]) * np.clip(radius + 0.5 - distance, 0, 1), distance <= radius


def stripes(rng, area, contrast):
    """(change in levels, mask): a patch of fine parallel lines."""
    _, mask = blob(rng, area, 1)
    y, x = np.mgrid[:SIDE, :SIDE]
    angle = rng.uniform(0, np.pi)
    wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / rng.uniform(4, 7))  # pixels
    return contrast * wave * mask, mask


def save(path, levels):
    cv2.imwrite(str(path), np.clip(levels, 0, 255).astype(np.uint8))


def write(folder, damage, *, shuffled=False, bad=36):
    rng = np.random.default_rng(3)
    root = folder / "cloth"
    for place in ("train/good", "test/good", *(["test/odd", "ground_truth/odd"] if bad else [])):
        (root / place).mkdir(parents=True)
    for at in range(16):
        save(root / f"train/good/{at:02d}.png", surface(rng))
    for at in range(bad):
        save(root / f"test/good/{at:02d}.png", surface(rng))
        change, mask = damage(rng)
        picture = surface(rng) + (0 if shuffled else change)
        save(root / f"test/odd/{at:02d}.png", picture)
        save(root / f"ground_truth/odd/{at:02d}_mask.png", 255 * mask)
    return root.parent


def workspace(tmp_path, damage, generation, **changes) -> Workspace:
    """Round 0 made and judged by a detector that misses everything."""
    source = write(tmp_path / "pictures", damage, **changes)
    raw = {
        "source": str(source), "samples": 48, "output": {"shard_size": 48}, "generation": generation,
        "feedback": {"trials": 18}, "seed": 1,
    }  # fmt: skip
    space = Workspace(str(tmp_path / "ws"))
    begin(parse_config(raw, name="test", folder=tmp_path), space, new_round=False)
    record = make_shard(Job(space.url, 0, 0, settings_hash(space, 0)))
    space.write_table(round_file(0, "shards.parquet"), to_table([record], SHARDS))
    rows = [
        {
            "image_id": image.image_id, "category": image.category, "defect": image.defect,
            "group": image.group, "component": 0, "area": np.nan, "contrast": np.nan, "hit": 0.0,
        }
        for image in open_round(space, 0).images.values()
        if image.split == "feedback" and image.defect != "good"
    ]  # fmt: skip
    space.write_table(round_file(0, "found.parquet"), to_table(rows, FOUND))
    return space


def without_search(space):
    name = round_file(0, "settings.yaml")
    stored = space.read_yaml(name)
    space.write_yaml(name, {**stored, "config": {**stored["config"], "feedback": {"trials": 0}}})


def steered(space):
    steering.feedback(space, 0)
    return open_round(space, 1).generation


MIX = {"generators": {"perlin": {}, "peak": {}, "blur": {}}}


def test_tiny_defects_ask_for_smaller_anomalies(tmp_path):
    """Of about their contrast, so that the size alone is wrong."""
    wide = {"area": [0.05, 0.3], "severity": [0.2, 0.5], **MIX}
    space = workspace(tmp_path, lambda rng: blob(rng, rng.uniform(0.0012, 0.003), 40), wide)
    after = steered(space)
    assert after.area[0] < 0.05, steering.explain(space, 0)
    assert "gains +" in steering.explain(space, 0)


def test_defects_of_one_generators_kind_ask_for_more_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SIDE", 96)  # fine lines take more detail, and more samples
    monkeypatch.setattr(probing, "SIZE", 128)
    monkeypatch.setattr(probing, "SHARD", 24)
    monkeypatch.setattr(steering, "matched", lambda *_: None)  # which would ask for it before the search does
    two = {"generators": {"peak": {}, "blur": {}}}
    space = workspace(tmp_path, lambda rng: stripes(rng, rng.uniform(0.01, 0.04), 20), two)
    after = steered(space)
    shares = {name: s.share for name, s in after.generators.items()}
    assert shares["peak"] > 1.5 * shares["blur"], steering.explain(space, 0)


def test_a_category_is_made_by_what_its_defects_look_like(tmp_path):
    two = {"generators": {"peak": {}, "perlin": {}}, "severity": [0.6, 1.0]}
    space = workspace(tmp_path, lambda rng: stripes(rng, rng.uniform(0.02, 0.06), 60), two)
    round_ = open_round(space, 0)
    ground = probing.prepare(space, round_, lambda _count: None)
    after, (decision,) = steering._as_matched(ground, round_.generation, lambda _count: None)
    often = {name: s.categories["cloth"] for name, s in after.generators.items()}
    assert often["peak"] > 2 * often["perlin"] and sum(often.values()) == pytest.approx(2, abs=0.02)
    assert "asked for are peak" in decision.reason and "as its real defects look" in decision.reason
    drawn = [recipe.generator for recipe in replace(round_, generation=after).plan(0)]
    assert drawn.count("peak") > 2 * drawn.count("perlin")


def test_what_is_confirmed_is_what_is_made(tmp_path, monkeypatch):
    """A trial that raises a share is judged beside the mix that the category was matched to; both hold."""
    two = {"generators": {"peak": {}, "perlin": {}}}
    space = workspace(tmp_path, lambda rng: stripes(rng, rng.uniform(0.02, 0.06), 60), two)
    values, judged = {"generators.perlin.share": 2.5}, []

    def verdict(_rows, confirm, labelled):
        assert labelled
        confirm(values, 0)
        return Verdict(values, "planted", "planted")

    monkeypatch.setattr(steering, "search", lambda *_given, **_named: [])
    monkeypatch.setattr(steering, "verdict", verdict)
    monkeypatch.setattr(
        steering, "_confirmed", lambda _ground, base, asked, _fold: judged.append((base, asked))
    )
    monkeypatch.setattr(steering, "matched", lambda *_: np.array([0.8, 0.2]))

    def mix(generation):
        own = {n: s.share * s.categories.get("cloth", 1.0) for n, s in generation.generators.items()}
        return {name: often / sum(own.values()) for name, often in own.items()}

    made = mix(steered(space))
    ((base, asked),) = judged
    assert mix(base) == pytest.approx({"peak": 0.8, "perlin": 0.2}, abs=0.01)
    assert made == pytest.approx(mix(apply_values(base, asked)), abs=0.01)
    assert made["perlin"] == pytest.approx(0.5 / 1.3, abs=0.01)


def test_a_mix_that_makes_samples_too_dear_is_not_taken(monkeypatch):
    """Of two categories, that which asks for most of the slow generator stays as it is."""
    mix = Generation(generators={"perlin": GeneratorSettings(share=15), "cut": GeneratorSettings(share=1)})
    asked = {"bolt": [0.92, 0.08], "nut": [0.1, 0.9]}
    real = {c: probing.Defects(np.full((4, 3), at, np.float32), tuple("abcd")) for at, c in enumerate(asked)}
    ground = SimpleNamespace(
        round_=SimpleNamespace(generation=mix, number=0, config=SimpleNamespace(seed=0)),
        real=real, banks=dict.fromkeys(asked),
    )  # fmt: skip
    monkeypatch.setattr(steering, "directions_of", lambda *_: {category: {} for category in asked})
    monkeypatch.setattr(steering, "matched", lambda own, *_: np.array(asked[list(asked)[int(own[0, 0])]]))
    after, decisions = steering._as_matched(ground, mix, lambda _count: None)
    taken, left = decisions
    assert (taken.setting, left.setting) == tuple(f"generators.*.categories.{category}" for category in asked)
    assert (left.before, left.after) == ("perlin 1, cut 1",) * 2 and taken.after != taken.before
    assert "asked for are cut 90%" in left.reason and "cost over 2 times as much" in left.reason
    assert all(set(own.categories) == {"bolt"} for own in after.generators.values())
    categories = list(asked)
    assert probing.cost_of(after, categories) <= 2 * probing.cost_of(mix, categories)


def test_no_samples_are_made_for_a_category_whose_mix_cannot_be_told(monkeypatch):
    """Of two parts with defects nothing is concluded; of three something may be."""
    mix = Generation(generators={"perlin": GeneratorSettings(params={"texture": "procedural"})})
    real = {
        category: probing.Defects(np.zeros((len(parts), 3), np.float32), tuple(parts))
        for category, parts in {"bolt": "aab", "nut": "abc"}.items()
    }
    ground = SimpleNamespace(real=real, recipes=[], directions=[], banks=dict.fromkeys(real))
    asked = []
    monkeypatch.setattr(probing, "fresh", lambda _ground, even, *_: asked.append(even.categories) or [])
    assert probing.directions_of(ground, mix, lambda _count: None) == {"nut": {}}
    assert asked and all(shares == {"bolt": 0.0, "nut": 1.0} for shares in asked)


def test_without_trials_nothing_is_searched_for_and_the_rest_is_decided(tmp_path):
    space = workspace(tmp_path, lambda rng: blob(rng, 0.01, 30), MIX)
    without_search(space)
    row = {"category": "cloth", "excess": 9.0, "y": 0.5, "x": 0.5, "split": "train"}
    row["image_id"] = next(i.image_id for i in open_round(space, 0).images.values() if i.split == "train")
    space.write_table(round_file(0, "alarms.parquet"), to_table([row], ALARMS))
    before, after = open_round(space, 0).generation, steered(space)
    assert after.area == before.area and after.severity == before.severity
    assert row["image_id"] in after.normals
    assert not space.exists(round_file(0, "trials.parquet"))
    told = steering.explain(space, 0)
    assert "because feedback.trials is 0: nothing was searched for" in told


def test_random_labels_change_nothing_and_the_table_goes_on(tmp_path):
    space = workspace(tmp_path, lambda rng: blob(rng, 0.01, 30), MIX, shuffled=True, bad=60)
    alarm = {"category": "cloth", "excess": 9.0, "y": 0.5, "x": 0.5}
    images = open_round(space, 0).images.values()
    hard = {split: next(i.image_id for i in images if i.split == split) for split in ("train", "calibration")}
    rows = [{**alarm, "split": split, "image_id": image_id} for split, image_id in hard.items()]
    space.write_table(round_file(0, "alarms.parquet"), to_table(rows, ALARMS))
    before, after = open_round(space, 0).generation, steered(space)
    assert present_values(after) == present_values(before)
    assert not any(own.categories for own in after.generators.values())
    decisions = space.read_table(round_file(0, "decisions.parquet")).to_pylist()
    assert all(row["reason"] for row in decisions)
    # False alarms become hard normals, of the train split only, and are drawn more often.
    train = {i.image_id for i in images if i.split == "train"}
    assert hard["train"] in after.normals and set(after.normals) <= train
    drawn = [recipe.image_id for recipe in open_round(space, 1).plan(0)]
    assert drawn.count(hard["train"]) / len(drawn) > 1.5 / len(train)
    name = Path(open_round(space, 0).images[hard["train"]].path).name
    told = steering.explain(space, 0)
    assert f"  normals.good/{name}: 1 → 4\n    because hard normal" in told and hard["train"] not in told
    assert set(after.nearest) <= set(after.normals) and set(after.nearest.values()) <= set(MIX["generators"])
    # What was cut goes on from the rows that are there.
    kept = steering.stored_trials(space, 0)
    file = round_file(0, "trials.parquet")
    space.write_table(file, space.read_table(file).slice(0, len(kept) // 2))
    space.remove(round_file(1, "settings.yaml"))
    steering.feedback(space, 0)
    again = steering.stored_trials(space, 0)
    assert [(t.trial, t.params, t.figures) for t in again] == [(t.trial, t.params, t.figures) for t in kept]
    assert space.read_table(round_file(0, "decisions.parquet")).to_pylist() == decisions


def test_however_many_normals_alarm_each_picture_is_read_once(tmp_path, monkeypatch):
    space = workspace(tmp_path, None, MIX, bad=0)
    round_ = open_round(space, 0)
    own = {
        split: [i for i in round_.images.values() if i.split == split] for split in ("train", "calibration")
    }
    rows = [
        {"category": "cloth", "excess": 9.0 - 0.1 * at, "y": 0.9, "x": 0.1 * at, "split": "calibration",
         "image_id": image.image_id}
        for at, image in enumerate(own["calibration"])
    ]  # fmt: skip
    assert len(rows) > 1
    ground = probing.prepare(space, round_, lambda _count: None)
    read = []

    def features_of(backbone, images, *more):
        read.extend(image.image_id for image in images)
        return probing.features_of(backbone, images, *more)

    def alarms(rows):
        space.write_table(round_file(0, "alarms.parquet"), to_table(rows, ALARMS))
        return steering._alarms(space, round_, ground)

    alone = [alarm for row in rows for alarm in alarms([row])]
    monkeypatch.setattr(steering, "features_of", features_of)
    assert alarms(rows) == alone
    assert {alarm.image_id for alarm in alone} <= {image.image_id for image in own["train"]}
    assert sorted(read) == sorted(image.image_id for images in own.values() for image in images)


def test_a_place_looks_like_what_made_it(tmp_path):
    """Places of samples are told by their generator much oftener than by chance, which is a third."""
    space = workspace(tmp_path, None, {**MIX, "severity": [0.8, 1.0]}, bad=0)
    ground = probing.prepare(space, open_round(space, 0), lambda _count: None)
    right = []
    for sample in probing.all_samples_of(space, 0):
        feature = ground.backbone.features(to_batch([sample.image], probing.SIZE))[0]
        height, width = feature.shape[1:]
        cover = cv2.resize(sample.mask.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
        y, x = np.unravel_index(cover.argmax(), cover.shape)
        found = steering.looks_like(ground, "cloth", feature[:, y, x])
        right.append(found == sample.recipe["generator"])
    assert len(right) > 30 and np.mean(right) > 0.55, np.mean(right)
    assert steering.looks_like(ground, "cloth", ground.banks["cloth"][7]) == ""


def test_nothing_is_logged_as_scored_where_there_are_no_test_pictures(tmp_path, capsys):
    space = workspace(tmp_path, None, MIX, bad=0)
    evaluate_final(space)
    assert "no test pictures" in capsys.readouterr().err and not space.exists("looks.parquet")


def test_without_anomalies_generators_that_teach_nothing_fade(tmp_path, monkeypatch):
    space = workspace(tmp_path, None, MIX, bad=0)
    plain = {"perlin": Likeness(0.3, 2.0, 1.0, 0.9), "peak": Likeness(0.3, 30.0, 1.0, 1.0)}
    real = steering.likeness
    seen = {}

    def planted(ground):
        seen.update(real(ground))
        return {**plain, "blur": Likeness(0.1, 1.0, 1.0, 0.5)}

    monkeypatch.setattr(steering, "likeness", planted)
    after = steered(space)
    shares = {name: s.share for name, s in after.generators.items()}
    assert shares["perlin"] > shares["peak"] and shares["perlin"] > shares["blur"]
    words = steering.explain(space, 0)
    assert "too alien" in words and "indistinguishable" in words
    decisions = {
        row["setting"]: row for row in space.read_table(round_file(0, "decisions.parquet")).to_pylist()
    }
    reasons = {name: decisions[f"generators.{name}.share"]["reason"] for name in shares}
    assert decisions["search"]["after"] == "settings at present"
    assert reasons["perlin"].startswith("others change, and the sum of the shares stays; the rule asks")
    assert reasons["peak"].startswith("no labelled defect contradicts the rule; the rule asks for less")
    assert "parts with defects" not in decisions["search"]["reason"]
    assert set(seen) == {"perlin", "peak", "blur"}
    assert all(seen[name].inside > 1.2 * seen[name].outside for name in ("perlin", "peak"))
    assert seen["blur"].told_apart < min(seen["perlin"].told_apart, seen["peak"].told_apart)
