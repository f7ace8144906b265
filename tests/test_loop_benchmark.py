"""The loop's benchmark: folds, what an arm may see, its file of cells, and one small run of every arm."""

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from detectors.protocol import get
from manifests.schema import GOOD
from manifests.searching import Search
from manifests.workspace import Workspace
from tests.benchmarks import loop, loop_cells
from tests.benchmarks.detectors import read_case
from tests.benchmarks.loop import ARMS, COMPARED, EFFICIENCY, estimates, key, samples_in_all
from tests.benchmarks.loop_cells import (
    FAMILIES,
    FOLDS,
    OPACITIES,
    WHOLE,
    Arm,
    Plan,
    config_of,
    figures,
    fold_of,
    measure,
    near,
    own_worker,
    real_samples,
    run_rounds,
    workspace,
)
from tests.benchmarks.paired import packed
from training.evaluation import Judged
from workflows import probing
from workflows.config import Generation
from workflows.demo import write_drawn
from workflows.searching import REACH

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
    """Chance is the loop but for the settings of its second round; the ceiling stands on ours."""
    monkeypatch.setattr(loop_cells, "THREADS", 1)
    monkeypatch.setattr(probing, "SHARD", 6)  # samples a trial
    short = {**loop.STEERED, **loop.PRACTICE, "feedback": {"trials": 16}}
    small = {name: replace(ARMS[name], rounds=2, settings=short) for name in ("chance", "loop")}
    small["ceiling"] = ARMS["ceiling"]
    with own_worker() as cluster:
        found = {name: measure(replace(plan, cluster=cluster), arm, 0, 0) for name, arm in small.items()}
    for cell in found.values():
        json.dumps(cell)
        assert set(cell["categories"]) == {"ring"}
        assert 0 < cell["samples"] <= 12 + len(plan.steering(small["ceiling"], 0))
    steered, chance = (workspace(plan, name, 0, 0) for name in ("loop", "chance"))
    assert steered.rounds() == chance.rounds() == [0, 1]
    detector = "detectors/residual/model.safetensors"
    for name in ("shards/part-00000.tar", detector, "weights.parquet"):
        first = [space.read_bytes(f"rounds/000/{name}") for space in (steered, chance)]
        assert first[0] == first[1]
        assert chance.exists(f"rounds/001/{name}")
    assert found["loop"]["standings"][0] == found["chance"]["standings"][0]
    before, after = (chance.read_yaml(f"rounds/00{n}/settings.yaml") for n in (0, 1))
    chosen = steered.read_yaml("rounds/001/settings.yaml")
    assert after["config"] == before["config"] and after["critic"]["sha256"] == chosen["critic"]["sha256"]
    assert after["generation"]["practice"] == chosen["generation"]["practice"]
    assert after["generation"]["generators"] != before["generation"]["generators"]
    assert steered.exists("rounds/000/decisions.parquet") and not chance.exists(
        "rounds/000/decisions.parquet"
    )
    judged = {image.image_id for image in plan.judging(small["loop"], 0)}
    for space in (steered, chance):
        assert not judged & set(space.read_table("images.parquet")["image_id"].to_pylist())


def test_what_is_lent_is_what_would_have_been_made(plan, tmp_path):
    """Samples of a first round, and a detector without weights, are those of the other fold; of one with
    weights only the samples are."""
    files = ("rounds/000/shards/part-00000.tar", "rounds/000/detectors/residual/model.safetensors")

    def made(where, arm, part):
        space = run_rounds(where, arm, 5, part, 1)
        stages = {row["kind"] for row in space.read_table("history.parquet").to_pylist()}
        return [space.read_bytes(file) for file in files], stages

    arm = Arm("plain")
    with own_worker() as cluster:
        shared = replace(plan, cluster=cluster, case=replace(plan.case, work=tmp_path / "shared"))
        apart = replace(shared, case=replace(plan.case, work=tmp_path / "apart"))
        for one in (shared, apart):
            one.case.work.mkdir()
        made(shared, arm, 0)
        lent, stages = made(shared, arm, 1)
        assert not {"seconds.generate", "seconds.train"} & stages
        alone, stages = made(apart, arm, 1)
        assert {"seconds.generate", "seconds.train"} <= stages
        assert lent == alone
        weighed = replace(arm, base="weighed", settings=loop.STEERED)
        (samples, _), stages = made(shared, weighed, 0)
    assert samples == alone[0]
    assert "seconds.generate" not in stages and "seconds.train" in stages


def test_chance_draws_evenly_from_what_a_trial_can_reach():
    rng = np.random.default_rng(0)
    wide = Search(0, 10)
    drawn = np.array([near(wide, 5.0, rng) for _ in range(2000)])
    assert drawn.min() == pytest.approx(5 - 10 * REACH, abs=0.05)
    assert drawn.max() == pytest.approx(5 + 10 * REACH, abs=0.05)
    assert np.histogram(drawn, 4)[0].min() > 400
    assert {near(wide, 0.0, rng) for _ in range(50)} & {0.0}  # at a limit, not beyond it
    names = [near(Search(choices=("a", "b")), "a", rng) for _ in range(400)]
    assert 150 < names.count("a") < 250


def changed(one: dict, other: dict, path: str = "") -> set[str]:
    """Dotted paths of what differs."""
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return set() if one == other else {path}
    keys = one.keys() | other.keys()
    return set().union(*(changed(one.get(k), other.get(k), f"{path}.{k}".strip(".")) for k in keys))


def test_arms_differ_in_what_they_are_named_for(plan):
    """And in nothing else."""

    def config(name, opacity=None):
        return config_of(plan, ARMS[name], 1, Path("/a.csv"), 3, opacity).model_dump(mode="json")

    mix = "generation.generators"
    changes = {
        "few-loop-no-feedback": {"feedback.enabled"},
        "few-loop-no-weights": {"training.weigh"},
        "few-loop-no-frequency": {f"{mix}.band"},
        "few-loop-cut": {f"{mix}.cut"},
        "few-loop-cut-practice": {"generation.practice.candidates", "generation.practice.guidance"},
        "few-onenip-loop-feature": {f"{mix}.{name}" for name in FAMILIES["feature"]},
    }
    assert set(changes) == set(COMPARED)
    for name, parts in changes.items():
        assert changed(config(COMPARED[name]), config(name)) == parts, name
        alike = {"base": "", "beside": None, "without": None, "settings": {}}
        assert replace(ARMS[name], **alike) == replace(ARMS[COMPARED[name]], **alike)
    assert changed(config("loop"), config("chance")) == set()
    assert ARMS["chance"] == replace(ARMS["loop"], base="chance", chance=True)
    assert changed(config("loop"), config("ours")) == {"training.weigh", "samples"}
    assert config("ours")["generation"]["generators"] == Generation().model_dump(mode="json")["generators"]
    assert config("few-loop-cut")["generation"]["generators"]["cut"]["vary"] > 0
    size = config("few-onenip-loop-feature")["generation"]["generators"]["feature-ascent"]["params"]["size"]
    assert size == get("onenip").settings().size
    faint, strong = (config("standard", opacity) for opacity in (OPACITIES[0], OPACITIES[2]))
    weights = [one["generation"]["generators"]["perlin"]["params"]["opacity"] for one in (faint, strong)]
    assert weights == [[0.1, 0.5], [0.5, 1.0]]
    assert set(faint["generation"]["generators"]) == {"perlin", "cutpaste", "scar"}
    assert {path.split(".")[0] for path in changed(faint, config("ours"))} == {"generation"}


def test_samples_are_those_of_all_rounds(data, tmp_path):
    """The loop and the run that it is compared with make as many; the smaller loops are whole loops."""
    plan = Plan(read_case(data, tmp_path, "feedback", 0.0), "residual", SETTINGS, 24)
    assert {samples_in_all(plan, name) for name in loop.MAIN} == {24 * 3 * len(plan.categories(ARMS["loop"]))}
    assert samples_in_all(plan, "few-ours") == samples_in_all(plan, "few-loop") == 72
    assert [samples_in_all(plan, name) for name in EFFICIENCY] == [12, 24, 36, 72]
    for name in EFFICIENCY:
        arm = ARMS[name]
        assert replace(arm, base="few-loop", samples=1.0) == ARMS["few-loop"]


def cell(level: float) -> dict:
    row = {"value": level, "resamples": packed(np.full(loop.RESAMPLES, level))}
    return {"samples": 8, "categories": {"ring": {"groups": 4, "pixel_ap": row, "aupro": row}}}


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
    assert "gap closed 0.750 [0.750, 0.750], each data set once 0.750 [0.750, 0.750]; no gap: none" in text
    assert "significantly behind chance: nowhere" in text


def test_cells_of_another_code_or_another_arm_are_refused(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "run_timed", lambda *_: cell(0.5))
    file = tmp_path / "figures.json"
    given = ["--data", str(data), "--json", str(file), "--seeds", "0", "--arms", "ours"]
    assert loop.main(given) == 0
    assert loop.main([*given[:-1], "standard"]) == 0
    with monkeypatch.context() as other:
        other.setattr(loop, "product_code", lambda *_: "other")
        assert loop.main(given) == 2
    with monkeypatch.context() as other:
        other.setitem(ARMS, "ours", replace(ARMS["ours"], samples=2.0))
        assert loop.main(given) == 2
    text = " ".join(capsys.readouterr().out.split())
    assert "figures of another code" in text
    assert "cells of other arms of the name ours" in text
    assert loop.main(given) == 0


def test_a_category_of_one_group_is_left_out(plan):
    """It would have no spread, and any lead there would look sure."""
    images = plan.judging(ARMS["ours"], 0)
    rng = np.random.default_rng(0)
    masks = [rng.random((32, 32)) < (0.1 if image.defect != GOOD else 0) for image in images]
    maps = [rng.random((32, 32), np.float32) for _ in images]

    def judged(group):
        return [
            Judged(replace(image, group=group(k)), 0.0, scores, mask, None)
            for k, (image, scores, mask) in enumerate(zip(images, maps, masks, strict=True))
        ]

    assert figures(["ring"], judged(lambda k: "one"), 0) == {}
    assert figures(["ring"], judged(lambda k: str(k % 3)), 0)["ring"]["groups"] == 3


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


def test_parts_of_the_loop_are_told_beside_what_they_change(plan):
    levels = {"few-loop": 0.5, "few-loop-cut": 0.6, "few-loop-cut-practice": 0.55}
    cells = {name: {key(0, part): cell(level) for part in FOLDS} for name, level in levels.items()}
    known = {name: estimates(plan, {"cells": cells}, name, [0]) for name in levels}
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(loop.few_table(plan, known))
    rows = {line.split("│")[1].strip(): line for line in console.export_text().splitlines() if "│" in line}
    assert set(COMPARED) | set(COMPARED.values()) <= set(rows)
    assert rows["few-loop-cut"].count("+0.100") == 6 and rows["few-loop-cut-practice"].count("-0.050") == 6
    assert "0.500" in rows["few-loop"] and "+" not in rows["few-loop"]
    assert "–" in rows["few-loop-no-weights"]


def test_the_loop_of_onenip_is_not_measured_twice(plan, data, tmp_path, monkeypatch):
    """It is few-loop where the file's detector is `onenip`, and config says so, too."""
    same = replace(plan, detector="onenip", settings={})
    alike = [
        config_of(same, ARMS[name], 1, Path("/a.csv"), 3, None) for name in ("few-loop", "few-onenip-loop")
    ]
    assert alike[0] == alike[1]
    assert loop.counterpart(same, "few-onenip-loop-feature") == "few-loop"
    assert loop.counterpart(plan, "few-onenip-loop-feature") == "few-onenip-loop"
    monkeypatch.setattr(loop, "run_timed", lambda *_: cell(0.5))
    file = tmp_path / "figures.json"
    arms = ["few-loop", "few-onenip-loop"]
    given = [
        "--data",
        str(data),
        "--json",
        str(file),
        "--seeds",
        "0",
        "--detector",
        "onenip",
        "--arms",
        *arms,
    ]
    assert loop.main(given) == 0
    assert set(json.loads(file.read_text())["cells"]) == {"few-loop"}
