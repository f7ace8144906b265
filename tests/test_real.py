"""Real pictures of real defects, where a folder of them is at hand (marker ``data``)."""

import os
from pathlib import Path

import pytest

from manifests.sources import SourceSettings, scan
from manifests.workspace import Workspace
from workflows import rounds
from workflows.config import parse_config
from workflows.detecting import evaluate, train

DATA = Path(os.environ.get("FLAWSMITH_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
CATEGORIES = ("hazelnut_toy", "hsst", "piped/paper_bft01_tl")

pytestmark = [
    pytest.mark.data,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no pictures in {DATA}; set FLAWSMITH_DATA"),
]


def config(steps: int):
    settings = {
        "source": [str(DATA / name) for name in CATEGORIES],
        "samples": 120,
        "rounds": 1,
        "output": {"shard_size": 60, "max_side": 256},
        "detector": {"name": "onenip", "settings": {"steps": steps, "size": 160}},
        "evaluation": {"resamples": 0},
    }
    return parse_config(settings, name="test", folder=DATA)


def test_every_real_category_can_be_read():
    found = scan([SourceSettings(path=str(DATA))])
    assert not [problem for problem in found.problems if problem.level == "error"]
    assert len({image.category for image in found.images}) >= 10


def test_most_recipes_are_accepted_and_onenip_learns_from_them(tmp_path):
    """Pixel AP on real defects (feedback split) with trained weights against the same network untrained."""
    values = {}
    for steps in (0, 200):
        space = Workspace(str(tmp_path / str(steps)))
        number = rounds.begin(config(steps), space, new_round=False)
        rounds.generate(space, number, config(steps).cluster)
        train(space, number)
        evaluate(space, number)
        rows = space.read_table("rounds/000/metrics.parquet").to_pylist()
        values[steps] = {
            row["metric"]: row["value"]
            for row in rows
            if (row["split"], row["category"], row["size"]) == ("feedback", "mean", "all")
        }
    accepted = sum(space.read_table("rounds/000/shards.parquet")["accepted"].to_pylist())
    assert accepted >= 0.9 * 120
    assert values[200]["pixel_ap"] > values[0]["pixel_ap"] + 0.05, values
    assert values[200]["aupro"] > values[0]["aupro"], values
