"""A few faults of `make soak`, and that its judgement can fail."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manifests.workspace import Workspace
from tests import soak
from tests.soak_faults import Bench, Scene, bench, kinds

pytestmark = pytest.mark.fault
TABLE = "rounds/000/samples/part-00003.parquet"


@pytest.fixture(scope="module")
def tools(tmp_path_factory) -> Iterator[Bench]:
    with bench(tmp_path_factory.mktemp("soak")) as made:
        yield made


@pytest.fixture(scope="module")
def undisturbed(tools) -> soak.Reference:
    return soak.reference(tools)


def test_what_strikes_a_run_costs_nothing(tools, undisturbed):
    names = ["worker killed", "client of a scheduler killed", "generator gives NaN"]
    tallies: dict[str, soak.Tally] = {}
    soak.play(tools, 0, "folder", names, undisturbed, tallies)
    assert {name: (tally.injected, tally.survived) for name, tally in tallies.items()} == dict.fromkeys(
        names, (1, 1)
    )


DAMAGE = {
    "lock": (lambda space: space.write_bytes("lock.json", b"{}"), "the lock was not released"),
    "orphan": (
        lambda space: space.write_bytes("rounds/000/shards/part-00099.tar", b""),
        "verify finds .*part-00099.tar: extra",
    ),
    "gone": (lambda space: space.remove(TABLE), "verify finds .*part-00003.parquet: missing"),
    "recipe": (
        lambda space: space.write_bytes(
            "rounds/000/recipes/part-00002.parquet", space.read_bytes("rounds/000/recipes/part-00001.parquet")
        ),
        "recipes/part-00002.parquet differs",
    ),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_the_first_property_that_does_not_hold_is_named(tools, undisturbed, tmp_path, what):
    damage, said = DAMAGE[what]
    original = (tools.disk or tools.folder) / "undisturbed"
    space = Workspace(str(shutil.copytree(original, tmp_path / "ws")))
    scene = Scene(tools, space, random.Random(0))
    soak.check(scene, undisturbed)
    damage(space)
    with pytest.raises(AssertionError, match=said):
        soak.check(scene, undisturbed)


def test_a_failed_sample_is_excused_for_the_injected_reason_only(tools, undisturbed, tmp_path):
    failed = [dict(row) for row in undisturbed.rows]
    failed[5] |= {"status": "failed", "reason": "ZeroDivisionError: no reason"}
    scene = Scene(tools, Workspace(str(tmp_path)), random.Random(0))
    with pytest.raises(AssertionError, match=rf"sample {failed[5]['sample_id']} differs"):
        soak.same_samples(scene, undisturbed.files, failed, undisturbed)
    scene.excused.append("ZeroDivisionError: no reason")
    soak.same_samples(scene, undisturbed.files, failed, undisturbed)


def test_every_kind_is_dealt_before_any_comes_again(tools):
    for at, store in enumerate(soak.STORES):
        names = list(kinds(tools, store))
        dealt = [name for seed in range(at, 60, 2) for name in soak.drawn(tools, seed)[1]]
        assert sorted(dealt[: len(names)]) == sorted(names)
        assert soak.drawn(tools, at) == soak.drawn(tools, at)


def test_a_violation_is_told_with_the_seed_that_replays_it(monkeypatch, tmp_path, capsys):
    def fails(*_: Any, **__: Any) -> None:
        raise soak.Violation(7, ["two runs", "disk full"], "an orphan")

    monkeypatch.setattr(soak, "soak", fails)
    monkeypatch.setattr("sys.argv", ["soak", "--json", str(tmp_path / "soak.json")])
    assert soak.main() == 1
    said = "after two runs, disk full: an orphan\nagain: python -m tests.soak --seed 7 --faults 3"
    assert said in capsys.readouterr().out
    assert json.loads(Path(tmp_path / "soak.json").read_text())["violation"] == said
