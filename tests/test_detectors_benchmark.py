"""The detectors' benchmark: its file of cells, its choice of pictures, and its means."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from manifests.errors import UsageError
from manifests.layouts import Found
from manifests.schema import Image
from manifests.shots import choose_shots
from tests.benchmarks import detector_cells, detectors
from tests.benchmarks.detector_cells import (
    Arm,
    Case,
    figures,
    mean_of_data_sets,
    redrawn,
    round_of,
    synthesis_digest,
)
from tests.benchmarks.resumed import open_file, write_file
from training.evaluation import Judged
from training.intervals import Estimate

SPLITS = ("train",) * 6 + ("calibration",) + ("feedback",) * 4


def images(category: str, masks: bool = True) -> list[Image]:
    found = []
    for k, split in enumerate(SPLITS):
        defect = "crack" if split == "feedback" and k % 2 else "good"
        mask = "mask.png" if defect == "crack" and masks else None
        path, name = f"/data/{category}/{k}.png", f"{category}{k}"
        found.append(Image(name, path, name, Path(category).name, defect, mask, 8, 8, "RGB", 8, name, split))
    return found


@pytest.fixture
def case(tmp_path) -> Case:
    found = [
        *images("papers/white"),
        *images("papers/brown"),
        *images("nuts/nut"),
        *images("cells/cell", False),
    ]
    return Case(Path("/data"), found, tmp_path, "feedback", 5.0)


def judged(case: Case, right: dict[str, bool]) -> list[Judged]:
    """Scores and maps that are all right or all wrong in a category."""
    found = []
    for image in case.images:
        if image.split != "feedback":
            continue
        bad = image.defect != "good"
        mask = np.zeros((16, 16), bool)
        mask[4:8, 4:8] = bad
        scores = mask if right[image.category] else ~mask
        known = mask if not bad or image.mask_path else None
        score = float(bad == right[image.category])
        found.append(Judged(image, score, scores.astype(np.float32), known, None))
    return found


def test_near_identical_categories_count_once(case):
    found = figures(case, judged(case, {"white": False, "brown": False, "nut": True, "cell": True}))
    assert found["means"]["image_auroc"]["mean"] == pytest.approx((0 + 1 + 1) / 3)
    assert found["means"]["pixel_ap"]["mean"] == pytest.approx(
        (found["categories"]["white"]["pixel_ap"]["mean"] + 1) / 2
    )
    assert "pixel_ap" not in found["categories"]["cell"]
    assert np.isfinite(found["means"]["image_auroc"]["resamples"]).all()


def test_a_mean_of_one_data_set_is_that_of_its_categories():
    found = {name: Estimate(value, np.array([value, 0.5])) for name, value in (("a", 0.2), ("b", 0.6))}
    mean = mean_of_data_sets(found, {"a": "one", "b": "one"})
    assert mean.value == pytest.approx(0.4)
    np.testing.assert_allclose(mean.resamples, [0.4, 0.5])


def test_undefined_resamples_are_drawn_again():
    nan = float("nan")
    again = redrawn(Estimate(0.5, np.array([0.1, nan, 0.3, nan, nan])))
    np.testing.assert_array_equal(again.resamples, [0.1, 0.1, 0.3, 0.3, 0.1])
    assert np.isnan(redrawn(Estimate(nan, np.array([nan, nan]))).resamples).all()


def test_few_shots_are_those_that_a_run_of_the_product_chooses(case):
    few = [case.learned(Arm("dfd", "mix", shots=4), seed) for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]
    assert {image.split for image in few[0]} == {"train"}
    assert [sum(i.category == c for i in few[0]) for c in case.categories] == [4] * 4
    shots = case.shots(Arm("dfd", "mix", shots=4), 0)
    listed = [
        (0, Found(i.path, i.path.removeprefix("/data/"), i.category, i.defect, "train"))
        for i in case.images
        if i.split in ("train", "calibration")
    ]
    chosen = {found.relative for _, found in choose_shots(listed, 4, 0)}
    assert {name for own in shots.values() for name in own} == chosen
    fewer = case.shots(Arm("dfd", "mix", shots=2), 0)
    assert all(set(own) < set(shots[category]) for category, own in fewer.items())
    everything = case.learned(Arm("dfd", "mix"), 0)
    assert {image.split for image in everything} == {"train", "calibration"}
    assert case.categories_of(Arm("draem", peer=True, most=2)) == ["brown", "nut"]


def test_a_digest_of_samples_is_of_settings_and_pictures_wherever_they_lie(case):
    def digest(name: str, seed: int = 0, of: Case = case) -> str:
        return synthesis_digest(round_of(of, detectors.ARMS[name], seed))

    elsewhere = replace(case, work=case.work / "elsewhere")
    elsewhere.work.mkdir()
    assert digest("onenip-own") == digest("onenip-own", of=elsewhere)
    assert digest("dfd-mix") == digest("onenip-mix"), "one set of samples"
    different = {digest(name) for name in ("dfd-own", "dfd-mix", "dfd-mix-4shot", "dfd-mix-1shot")}
    assert len(different | {digest("dfd-mix", 1)}) == 5


def test_the_command_goes_on_where_it_was_stopped(case, tmp_path, monkeypatch):
    ran = []

    def cell(command, threads):
        name, seed = command[4], int(command[6])
        ran.append((name, seed))
        if len(ran) == 3:
            raise RuntimeError("killed")
        names = ("fit_seconds", "step_seconds", "epoch_seconds", "picture_seconds", "peak_bytes", "input")
        cost = dict.fromkeys(names, 1.0)
        found = figures(case, judged(case, dict.fromkeys(case.categories, True)))
        return {**cost, "steps": 3, "samples": 0, **found}

    monkeypatch.setattr(detectors, "run_timed", cell)
    monkeypatch.setattr(detectors, "read_case", lambda *_: case)
    monkeypatch.setattr(detectors, "make", lambda *_: {"recipes": 4, "accepted": 4, "seconds": 1.0})
    file = tmp_path / "figures.json"
    arms = ["onenip-mix", "anomalib-padim"]
    given = ["--data", "x", "--json", str(file), "--seeds", "0", "1", "--arms", *arms]
    assert detectors.main(given) == 1
    assert ran == [(arms[0], 0), (arms[1], 0), (arms[0], 1), (arms[1], 1)]
    stored = json.loads(file.read_text())["cells"]["feedback"]
    assert {name: sorted(cells) for name, cells in stored.items()} == {
        "onenip-mix": ["0"],
        "anomalib-padim": ["0", "1"],
    }
    assert detectors.main(given) == 0
    assert ran[4:] == [("onenip-mix", 1)]
    assert stored["onenip-mix"]["0"]["synthesis"] == detectors.made_of(case, Arm("x", "mix"), 0)["synthesis"]
    assert "synthesis" not in stored["anomalib-padim"]["0"]
    with pytest.raises(UsageError, match="minutes"):
        open_file(file, {"minutes": 1.0})


def test_leads_are_named_and_of_the_seeds_that_both_arms_have(case):
    good = figures(case, judged(case, dict.fromkeys(case.categories, True)))
    bad = figures(case, judged(case, dict.fromkeys(case.categories, False)))
    cells = {"onenip-mix": {"0": good, "1": bad}, "onenip-own": {"0": bad}}
    rows = detectors.leads_table(case, {"cells": {"feedback": cells}}, [0, 1])
    console = Console(width=250, record=True)
    console.print(rows)
    lines = {tuple(line.split("│")[1:3]): line for line in console.export_text().splitlines() if "│" in line}
    found = next(line for key, line in lines.items() if "onenip-mix" in key[0])
    lead = good["means"]["pixel_ap"]["mean"] - bad["means"]["pixel_ap"]["mean"]
    shown = [cell.strip() for cell in found.split("│")[1:-1]]
    assert shown[:2] == ["onenip-mix", "onenip-own"] and shown[-1] == "0"
    assert [column.header for column in rows.columns][2:4] == ["pixel AP", "AUPRO (0.3)"]
    assert shown[2].startswith(f"{lead:+.3f} [") and shown[4] == "+1.000 [+1.000, +1.000]"
    other = next(line for key, line in lines.items() if "dfd-mix " in key[0])
    assert "missing" in other


def shown(case: Case, cells: dict[str, Any], seeds: list[int] | None = None) -> dict[str, list[str]]:
    """The rows of the table of means, by arm; its heads as ``arm``."""
    rows = detectors.means_table(case, {"cells": {"feedback": cells}}, seeds)
    columns = [[str(column.header), *map(str, column.cells)] for column in rows.columns]
    return {line[0]: list(line[1:]) for line in zip(*columns, strict=True)}


def test_what_is_missing_is_said(case):
    console = Console(width=250, record=True)
    detectors.show(case, {"synthesis": {}, "cells": {}}, [0, 1], console)
    text = console.export_text()
    assert "missing: seed 0, 1" in text
    assert not detectors.registered(Arm("no-such-detector"))
    rows = shown(case, {})
    assert rows["dfd-mix"][-1] == "missing: seed 0, 1, 2"
    for shots in (1, 2, 4, 8):
        assert rows[f"dfd-own-{shots}shot"][-1] == "missing: seed 0, 1, 2, 3, 4"


def test_cells_of_other_samples_or_shots_are_marked(case):
    plain = figures(case, judged(case, dict.fromkeys(case.categories, True)))
    cost = {"fit_seconds": 30.0, "steps": 20, "step_seconds": 0.5, "picture_seconds": 0.1, "peak_bytes": 1e9}
    cell = {**plain, **cost, "input": 160, "samples": 80}
    now = detectors.made_of(case, detectors.ARMS["dfd-mix-4shot"], 0)
    cells = {
        "dfd-mix": {"0": cell, "1": {**cell, "synthesis": "another"}},
        "dfd-mix-4shot": {"0": {**cell, **now}, "1": cell, "2": {**cell, **now}},
        "memory_bank": {"0": {**cell, "steps": 0, "step_seconds": None, "samples": 0}},
        "anomalib-patchcore": {"0": {**cell, "epoch_seconds": 9.0, "coreset": 0.01}},
    }
    rows = shown(case, cells, [0, 1, 2])
    assert rows["dfd-mix"][-1].split("; ") == [
        "missing: seed 2",
        "settings of samples not known: seed 0",
        "stale, samples of other settings: seed 1",
    ]
    assert rows["dfd-mix-4shot"][-1].split("; ") == [
        "settings of samples not known: seed 1",
        "of the old draw of shots: seed 1",
        "stale, samples of other settings: seed 2",
        "stale, other shots: seed 2",
    ]
    assert rows["memory_bank"][-1] == "missing: seed 1, 2"
    assert rows["anomalib-patchcore"][-1].endswith("; stale, another share of patches: seed 0")
    heads = rows["arm"]
    assert [rows["dfd-mix"][heads.index(name)] for name in ("s an epoch", "input px")] == ["5", "160"]
    assert rows["memory_bank"][heads.index("s an epoch")] == "30", "the whole fit"


def test_a_look_at_the_test_split_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(detectors, "LOOKS", tmp_path / "looks.json")
    detectors.note_look("onenip-mix", 0)
    detectors.note_look("vlad-own", 2)
    looks = json.loads((tmp_path / "looks.json").read_text())
    assert [(look["arm"], look["seed"]) for look in looks] == [("onenip-mix", 0), ("vlad-own", 2)]


def test_a_file_is_whole_or_not_there(tmp_path):
    file = tmp_path / "a.json"
    write_file(file, {"value": 1.0})
    with pytest.raises(TypeError):
        write_file(file, {"value": object()})
    assert json.loads(file.read_text()) == {"value": 1.0}
    write_file(file, {"value": float("nan")})
    assert json.loads(file.read_text()) == {"value": None}


def test_a_peer_that_was_stopped_goes_on_in_its_folder(case, monkeypatch):
    """And in another one where anything is different."""
    folders = []

    def run_peer(script, arguments, threads):
        folder = arguments[0]
        folders.append(folder)
        done = sorted(file.name for file in folder.glob("*.found.npz"))
        for category in case.categories:
            count = len(case.of(category, "feedback"))
            np.savez(folder / f"{category}.found.npz", maps=np.zeros((count, 4, 4)), scores=np.zeros(count))
            if not done:
                raise RuntimeError("killed")
        cost = {"steps": 0, "fit_seconds": 1.0, "epoch_seconds": 1.0, "picture_seconds": 0.1}
        return {"models": [cost] * len(case.categories), "peak_bytes": 1, "version": "0"}

    monkeypatch.setattr(detector_cells, "run_peer", run_peer)
    monkeypatch.setattr(detector_cells, "textures_folder", lambda _case: Path("/textures"))
    monkeypatch.setattr(detector_cells, "_stack", lambda found: np.zeros((len(found), 4, 4, 3), np.uint8))
    monkeypatch.setattr(detector_cells, "at_side", lambda image, score, scores: image.image_id)
    arm = Arm("padim", peer=True)
    with pytest.raises(RuntimeError, match="killed"):
        detector_cells._measure_peer(case, arm, 0)
    found, cost = detector_cells._measure_peer(case, arm, 0)
    assert found == [i.image_id for c in case.categories for i in case.of(c, "feedback")]
    assert cost["fit_seconds"] == 4.0 and folders[0] == folders[1] and not folders[0].exists()
    with pytest.raises(RuntimeError, match="killed"):
        detector_cells._measure_peer(case, arm, 1)
    assert folders[2] != folders[0]
