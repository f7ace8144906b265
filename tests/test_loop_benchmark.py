"""The loop's benchmark: folds, what an arm may see, its file of cells, and one small run of every arm."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from manifests.schema import GOOD
from manifests.workspace import Workspace
from tests.benchmarks import loop, loop_cells
from tests.benchmarks.detectors import read_case
from tests.benchmarks.loop import ARMS, estimates, key
from tests.benchmarks.loop_cells import (
    FOLDS,
    OPACITIES,
    WHOLE,
    Plan,
    config_of,
    fold_of,
    measure,
    real_samples,
    workspace,
)
from tests.benchmarks.paired import packed
from workflows.demo import write_drawn
from workflows.loop import spent

SETTINGS = {"size": 64, "steps": 4, "batch": 4, "coreset": 30, "width": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_drawn(folder / "drawn", train=6, good=8, each=4)
    shutil.rmtree(folder / "drawn" / "cloth")
    return folder


@pytest.fixture(scope="module")
def plan(data, tmp_path_factory) -> Plan:
    return Plan(read_case(data, tmp_path_factory.mktemp("work"), "feedback", 0.0), "residual", SETTINGS, 4)


def test_folds_part_groups_and_both_kinds(plan):
    folds = fold_of(plan.case.images)
    for category in plan.case.categories:
        own = plan.case.of(category, "feedback")
        for fold in FOLDS:
            part = [image for image in own if folds[category, image.group] == fold]
            assert {image.defect == GOOD for image in part} == {True, False}
        sizes = [sum(folds[category, image.group] == fold for image in own) for fold in FOLDS]
        assert abs(sizes[0] - sizes[1]) <= 1


def test_what_steers_never_judges(plan):
    arm = ARMS["loop"]
    for part in FOLDS:
        steering, judging = ({i.image_id for i in f(arm, part)} for f in (plan.steering, plan.judging))
        assert steering and judging and not steering & judging
        assert steering == {i.image_id for i in plan.judging(arm, 1 - part)}
    final = replace(plan, final=True)
    assert {i.split for i in final.steering(arm, WHOLE)} == {"feedback"}
    assert {i.split for i in final.judging(arm, WHOLE)} == {"test"}


def test_a_real_anomaly_as_a_sample(plan):
    images = plan.steering(ARMS["ceiling"], 0)
    samples = real_samples(images, None)
    assert len(samples) == sum(image.defect != GOOD for image in images)
    for sample in samples:
        assert sample.mask.any() and sample.image.shape == sample.normal.shape
        changed = (sample.image != sample.normal).any(axis=2)
        assert changed[sample.mask].any()
        far = ~sample.mask
        far[1:-1, 1:-1] &= ~sample.mask[2:, 1:-1] & ~sample.mask[:-2, 1:-1]
        assert changed.mean() < 2.5 * sample.mask.mean() + 0.02  # little beyond the defect is filled


def test_arms_run_in_small(plan, monkeypatch):
    """The ceiling and the loop share a workspace here; chance begins with a copy of its first round."""
    monkeypatch.setattr(loop_cells, "THREADS", 1)
    small = {"ceiling": replace(ARMS["ceiling"], without="cut")}
    small |= {name: replace(ARMS[name], without="cut", rounds=2) for name in ("chance", "loop")}
    small["loop"] = replace(small["loop"], base="ours", settings={})
    found = {name: measure(plan, arm, 0, 0) for name, arm in small.items()}
    for cell in found.values():
        json.dumps(cell)
        assert set(cell["categories"]) == {"ring"}
        assert 0 < cell["samples"] <= 8 + len(plan.steering(small["ceiling"], 0))
    ours, chance = (workspace(plan, name, 0, 0) for name in ("ours", "chance"))
    shared = spent(ours, "cpu.", range(1))
    assert 0 < shared < 60 * found["ceiling"]["cpu_minutes"]
    assert shared + spent(chance, "cpu.", range(2)) < 60 * found["chance"]["cpu_minutes"]
    assert spent(ours, "cpu.", range(2)) < 60 * found["loop"]["cpu_minutes"], "with the round made before"
    assert ours.rounds() == chance.rounds() == [0, 1]
    for name in ("model.safetensors", "config.yaml"):
        file = f"rounds/000/detectors/residual/{name}"
        assert ours.read_bytes(file) == chance.read_bytes(file)
    first, drawn = (chance.read_yaml(f"rounds/00{n}/settings.yaml") for n in (0, 1))
    assert first["generation"] != drawn["generation"] and first["config"] == drawn["config"]
    assert ours.exists("rounds/000/decisions.parquet") and not chance.exists("rounds/000/decisions.parquet")
    judged = {image.image_id for image in plan.judging(small["loop"], 0)}
    for space in (ours, chance):
        assert not judged & set(space.read_table("images.parquet")["image_id"].to_pylist())
    assert found["loop"]["standings"][0] == found["chance"]["standings"][0]


def test_arms_differ_in_what_they_are_named_for(plan):
    """And in nothing else: samples, seed and detector are equal."""

    def config(name, opacity=None):
        return config_of(plan, ARMS[name], 1, Path("/a.csv"), 3, opacity).model_dump(mode="json")

    ours, faint, strong = config("loop"), *(config("standard", o) for o in (OPACITIES[0], OPACITIES[2]))
    for other in (faint, config("ours"), config("chance"), config("few-loop-no-cut")):
        for part in ("samples", "seed", "detector", "output"):
            assert other[part] == ours[part]
    assert ours["training"] == config("few-loop-no-cut")["training"] != config("chance")["training"]
    assert not config("few-loop-no-guidance")["generation"]["practice"]["guidance"]
    weights = [one["generation"]["generators"]["perlin"]["params"]["opacity"] for one in (faint, strong)]
    assert weights == [[0.1, 0.5], [0.5, 1.0]]
    assert set(faint["generation"]["generators"]) == {"perlin", "cutpaste", "scar"}
    left = set(ours["generation"]["generators"]) - set(config("few-loop-no-cut")["generation"]["generators"])
    assert left == {"cut"}
    assert config("few-loop-sixth")["samples"] * 6 == pytest.approx(ours["samples"], abs=3)


def cell(level: float) -> dict:
    row = {"value": level, "resamples": packed(np.full(loop.RESAMPLES, level))}
    return {"samples": 8, "categories": {c: {"pixel_ap": row, "aupro": row} for c in ("ring",)}}


def test_the_command_goes_on_where_it_was_stopped(data, tmp_path, monkeypatch, capsys):
    ran = []
    levels = {"standard": 0.4, "ours": 0.5, "chance": 0.5, "loop": 0.7, "ceiling": 0.8}

    def one(command, threads):
        name, part = command[4], int(command[8])
        ran.append((name, part))
        if len(ran) == 2:
            raise RuntimeError("killed")
        return cell(levels[name])

    monkeypatch.setattr(loop, "run_timed", one)
    monkeypatch.setattr(loop, "note_look", lambda *_: pytest.fail("development looks at no test split"))
    file = tmp_path / "figures.json"
    given = ["--data", str(data), "--json", str(file), "--seeds", "0", "--arms", *levels]
    assert loop.main(given) == 1
    assert len(json.loads(file.read_text())["cells"]["standard"]) == 1
    assert loop.main(given) == 0
    assert len(ran) == 2 * len(levels) + 1
    text = " ".join(capsys.readouterr().out.split())
    assert "gap closed 0.750 [0.750, 0.750]; no gap: none" in text
    assert "significantly behind chance: nowhere" in text


def test_a_look_at_the_test_split_is_noted_before_it(data, tmp_path, monkeypatch):
    looks = []
    monkeypatch.setattr(loop, "note_look", lambda name, seed: looks.append((name, seed)))

    def one(command, threads):
        assert len(looks) == 1 and "--final" in command
        return cell(0.5)

    monkeypatch.setattr(loop, "run_timed", one)
    file = tmp_path / "figures.json"
    final = ["--data", str(data), "--json", str(file), "--seeds", "2", "--arms", "ours", "--final"]
    assert loop.main(final) == 0
    assert looks == [("loop: ours", 2)]


def test_an_arm_with_a_cell_missing_has_no_figures(plan):
    result = {"cells": {"ours": {key(0, 0): cell(0.5)}}}
    assert estimates(plan, result, "ours", [0]) is None
    result["cells"]["ours"][key(0, 1)] = cell(0.7)
    found = estimates(plan, result, "ours", [0])
    assert found is not None and found["aupro"]["ring"].value == pytest.approx(0.6)
    assert isinstance(workspace(plan, "ours", 0, 0), Workspace)
