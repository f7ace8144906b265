"""Shards made by real Dask workers: the same bytes however they are made, and nothing lost on the way."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import psutil
import pytest
from distributed import default_client

from manifests.errors import FlawsmithError, ReadOnlyError, UsageError
from manifests.schema import canonical_json
from manifests.shards import unpack
from manifests.workspace import Workspace, part
from tests.test_cli import flawsmith
from workflows import replaying, rounds
from workflows.cluster import make_round
from workflows.config import Cluster, Config, parse_config
from workflows.replaying import replay
from workflows.stages import Job, make_shard, settings_hash
from workflows.upkeep import verify

SAMPLES, SIZE, SHARDS = 120, 10, 12
GENERATION: dict[str, Any] = {
    "generators": {
        "cutpaste": {},
        "scar": {},
        "poisson": {},
        "band": {},
        "apr": {},
    },  # apr is at times refused
    "attempts": 1,  # what the gates refuse stays refused: both outcomes occur
}


def draw_pictures(folder: Path, count: int = 12) -> Path:
    """Discs on a striped ground, 64 px, every other one grey."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[:64, :64].astype(np.float32)
    for index in range(count):
        rng = np.random.default_rng(index)
        level = 60 + 20 * np.sin(x / rng.uniform(2, 5)) + rng.normal(0, 4, (64, 64))
        level = np.where(np.hypot(y - 32, x - 32) < rng.uniform(18, 26), level + 90, level)
        colour = level if index % 2 else level[..., None] * np.array([0.8, 1.0, 0.9])
        cv2.imwrite(str(folder / f"{index:02d}.png"), colour.clip(0, 255).astype(np.uint8))
    return folder


def config(pictures: Path, workers: int = 2, **changes: Any) -> Config:
    raw: dict[str, Any] = {
        "source": str(pictures),
        "samples": SAMPLES,
        "generation": GENERATION,
        "output": {"shard_size": SIZE},
        "cluster": {"workers": workers},
    }
    return parse_config(raw | changes, name="test")


def make(settings: Config, folder: Path) -> Workspace:
    """What `flawsmith generate` does."""
    space = Workspace(str(folder))
    with space.writing():
        rounds.generate(space, rounds.begin(settings, space, new_round=False), settings.cluster)
    return space


def contents(space: Workspace) -> dict[str, Any]:
    """All that must be the same for equal settings: bytes of shards and recipes, and the samples tables
    without how long it took."""
    found: dict[str, Any] = {}
    for folder in ("shards", "recipes"):
        for name in space.names(f"rounds/000/{folder}"):
            found[f"{folder}/{name}"] = space.read_bytes(f"rounds/000/{folder}/{name}")
    for name in space.names("rounds/000/samples"):
        table = space.read_table(f"rounds/000/samples/{name}")
        found[f"samples/{name}"] = str(table.drop_columns(["seconds"]).to_pylist())
    return found


def mtimes(space: Workspace) -> dict[str, int]:
    return {path.name + path.parent.name: path.stat().st_mtime_ns for path in parts(space)}


def parts(space: Workspace) -> list[Path]:
    return sorted(Path(space.url).glob("rounds/*/*/part-*"))


def samples(space: Workspace) -> list[dict[str, Any]]:
    names = space.names("rounds/000/samples")
    return [row for name in names for row in space.read_table(f"rounds/000/samples/{name}").to_pylist()]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("source") / "disc")


@pytest.fixture(scope="module")
def undisturbed(pictures, tmp_path_factory) -> Workspace:
    """One worker, never interrupted. Tests that write take a copy."""
    return make(config(pictures, workers=1), tmp_path_factory.mktemp("undisturbed"))


def copy_of(space: Workspace, folder: Path) -> Workspace:
    return Workspace(str(shutil.copytree(space.url, folder)))


# -- what a round holds ---------------------------------------------------------------------------------


def test_every_recipe_has_exactly_one_outcome(undisturbed):
    round_ = rounds.open_round(undisturbed, 0)
    planned = [recipe.sample_id for shard in range(round_.shard_count) for recipe in round_.plan(shard)]
    assert len(planned) == SAMPLES
    rows = samples(undisturbed)
    assert [row["sample_id"] for row in rows] == planned
    counts = Counter(row["status"] for row in rows)
    assert counts["accepted"] > 0
    assert counts["rejected"] > 0
    assert all((row["reason"] == "") == (row["status"] == "accepted") for row in rows)

    table = undisturbed.read_table("rounds/000/shards.parquet")
    assert {status: sum(table[status].to_pylist()) for status in ("accepted", "rejected", "failed")} == {
        "failed": 0,
        **counts,
    }
    stored = [
        key for path in table["path"].to_pylist() for key, _ in unpack(undisturbed.read_bytes(path), path)
    ]
    assert stored == [row["sample_id"] for row in rows if row["status"] == "accepted"]
    assert verify(undisturbed) == []


def test_a_finished_run_makes_nothing_again(undisturbed, pictures):
    before = mtimes(undisturbed)
    make(config(pictures, workers=1), Path(undisturbed.url))
    assert mtimes(undisturbed) == before


def test_replay_makes_the_same_bytes(undisturbed):
    accepted = [row for row in samples(undisturbed) if row["status"] == "accepted"]
    by_generator = {row["generator"]: row["sample_id"] for row in accepted}
    assert len(by_generator) == len(GENERATION["generators"])
    for sample_id in by_generator.values():
        result = replay(undisturbed, sample_id)
        assert (result["identical"], result["differ"], result["members"]) == (True, 0, []), sample_id


def test_replay_names_what_differs_and_what_was_never_planned(undisturbed, monkeypatch):
    remake = replaying._remake
    monkeypatch.setattr(replaying, "_remake", lambda *given: {**remake(*given), "mask.png": b""})
    sample_id = next(row["sample_id"] for row in samples(undisturbed) if row["status"] == "accepted")
    result = replay(undisturbed, sample_id)
    assert (result["identical"], result["members"], result["differ"]) == (False, ["mask.png"], 0)
    for wrong in ("000-99999-00000", "007-00000-00000", "000-00000-99999", "bottle"):
        with pytest.raises(UsageError, match=r"is not in the workspace|no sample id"):
            replay(undisturbed, wrong)


# -- the same bytes however they are made ---------------------------------------------------------------


def test_a_killed_worker_costs_nothing_but_time(undisturbed, pictures, tmp_path):
    """Two workers in another workspace, one of them killed in the middle of the run."""
    settings = config(pictures)
    space = Workspace(str(tmp_path / "killed"))
    number = rounds.begin(settings, space, new_round=False)
    pids: list[int] = []

    def kill_one(record: dict[str, Any]) -> None:
        if not pids:
            pids.extend(default_client().run(os.getpid).values())
            os.kill(pids[0], signal.SIGKILL)

    result = make_round(space, number, list(range(SHARDS)), Cluster(workers=2), kill_one)
    assert len(set(pids)) == 2
    assert result.errors == {}
    assert sorted(record["shard"] for record in result.records) == list(range(SHARDS))
    with space.writing():  # sweeps what the killed worker left behind
        rounds.generate(space, number, settings.cluster)
    assert contents(space) == contents(undisturbed)
    assert list(Path(space.url).rglob("*.part")) == []


def test_a_killed_run_goes_on_where_it_stopped(undisturbed, pictures, tmp_path):
    settings = tmp_path / "config.yaml"
    settings.write_text(canonical_json(config(pictures).model_dump(mode="json")))  # JSON is YAML
    folder = tmp_path / "ws"
    command = "from workflows.cli import main; main()"
    run = subprocess.Popen([sys.executable, "-c", command, "generate", str(settings), "-w", str(folder)])
    wait_for(lambda: list(folder.glob("rounds/000/samples/*.parquet")), run)
    processes = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []  # workers end with their client

    space = Workspace(str(folder))
    tables = (path for path in parts(space) if path.parent.name == "samples")
    finished = {path.stem for path in tables if path.suffix == ".parquet"}  # not what a worker was writing
    assert 0 < len(finished) < SHARDS
    before = {path: path.stat().st_mtime_ns for path in parts(space) if path.stem in finished}
    (folder / "rounds/000/shards/part-00011.tar.0123.part").write_bytes(b"half of a sha")
    make(config(pictures), folder)
    assert contents(space) == contents(undisturbed)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert list(folder.rglob("*.part")) == []


def wait_for(condition: Any, process: subprocess.Popen, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        assert process.poll() is None, f"the process ended with {process.returncode}"
        time.sleep(0.002)
    raise AssertionError("nothing happened in time")


@pytest.fixture
def scheduler(tmp_path) -> Iterator[str]:
    """A scheduler and a worker with two threads, as a user starts them."""
    file = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    common = ["--no-dashboard", "--scheduler-file", str(file)]
    processes = []
    try:
        first = [*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", *common]
        processes.append(subprocess.Popen(first, stderr=subprocess.DEVNULL))
        address = wait_for(lambda: file.exists() and _address(file), processes[0])
        second = [*dask, "worker", "--nthreads", "2", *common, "--local-directory", str(tmp_path)]
        processes.append(subprocess.Popen(second, stderr=subprocess.DEVNULL))
        yield address
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(20)


def _address(file: Path) -> str | None:
    try:
        return json.loads(file.read_text())["address"]
    except json.JSONDecodeError:  # half written yet
        return None


def test_a_running_scheduler_makes_the_same_bytes(undisturbed, pictures, tmp_path, scheduler):
    assert scheduler.startswith("tcp://127.0.0.1:")
    space = make(config(pictures, cluster={"address": scheduler}), tmp_path / "ws")
    assert contents(space) == contents(undisturbed)


def test_an_unknown_scheduler_is_an_error_with_a_remedy(pictures, tmp_path):
    with pytest.raises(
        FlawsmithError, match=r"no Dask scheduler answers at tcp://127.0.0.1:1.*`dask scheduler`"
    ):
        make(config(pictures, cluster={"address": "tcp://127.0.0.1:1"}), tmp_path / "ws")


# -- damage and repair ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["images.parquet", "rounds/000/recipes/part-00002.parquet"])
def test_verify_names_a_table_of_which_one_byte_changed(undisturbed, tmp_path, name):
    space = copy_of(undisturbed, tmp_path / "damaged")
    whole = space.read_bytes(name)
    space.write_bytes(name, whole[:99] + bytes([whole[99] ^ 1]) + whole[100:])
    assert [finding.path for finding in verify(space)] == [name]


def test_an_archive_that_cannot_be_written_to_is_verified(undisturbed, tmp_path, monkeypatch):
    space = copy_of(undisturbed, tmp_path / "archive")
    name = part("shards", 0, 3, "tar")
    space.write_bytes(name, space.read_bytes(name)[:-700])

    def refused(*_given: Any) -> Any:
        raise ReadOnlyError("cannot write to the workspace: Read-only file system")

    for write in ("writing", "write_bytes", "write_table", "remove"):
        monkeypatch.setattr(Workspace, write, refused)
    done = flawsmith("verify", space.url)
    assert done.returncode == 1 and f"{name}: truncated" in done.stdout
    assert "cannot be written to" in done.stderr
    done = flawsmith("verify", "--sweep", space.url)
    assert done.returncode == 1 and "Read-only file system" in done.stderr


def test_verify_names_damage_and_the_next_run_repairs_exactly_that(undisturbed, pictures, tmp_path):
    space = copy_of(undisturbed, tmp_path / "damaged")
    before = mtimes(space)
    truncated, flipped, missing, extra = (
        Path(space.path(part("shards", 0, n, "tar"))) for n in (1, 3, 5, 99)
    )
    truncated.write_bytes(truncated.read_bytes()[:-700])
    data = bytearray(flipped.read_bytes())
    data[700] ^= 1
    flipped.write_bytes(data)
    missing.unlink()
    shutil.copy(truncated, extra)
    unmasked = part("shards", 0, 7, "tar")
    space.write_bytes(unmasked, _without_one_mask(space.read_bytes(unmasked)))

    found = {finding.path: finding for finding in verify(space)}
    expected = {1: "truncated", 3: "damaged", 5: "missing", 7: "lacks its mask", 99: "extra"}
    assert set(found) == {part("shards", 0, shard, "tar") for shard in expected}
    for shard, word in expected.items():
        finding = found[part("shards", 0, shard, "tar")]
        assert word in finding.what
        assert finding.shard == (shard if shard < SHARDS else -1)
    orphan = Path(space.path("rounds/000/samples/part-00004.parquet.0123.part"))
    orphan.write_bytes(b"half")
    assert {finding.shard for finding in verify(space, sweep=True)} == {1, 3, 5, 7}
    assert not extra.exists() and not orphan.exists()

    make(config(pictures, workers=1), tmp_path / "damaged")
    assert contents(space) == contents(undisturbed)
    assert verify(space) == []
    after = mtimes(space)
    remade = {name for name in after if after[name] != before[name]}
    assert remade == {
        f"part-{shard:05d}.{suffix}{folder}"
        for shard in (1, 3, 5, 7)
        for folder, suffix in (("shards", "tar"), ("samples", "parquet"), ("recipes", "parquet"))
    }


def _without_one_mask(data: bytes) -> bytes:
    """The same shard, of the same size, with the first mask under another name."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=sink, mode="w") as new:
        first = next(info.name for info in old if info.name.endswith(".mask.png"))
        for info in old:
            content = old.extractfile(info)
            info.name = info.name.replace("mask", "mark") if info.name == first else info.name
            new.addfile(info, content)
    return sink.getvalue()


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=640k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a small disk: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_stops_the_run_and_keeps_what_is_finished(undisturbed, pictures, small_disk):
    settings = config(pictures, workers=1)
    with pytest.raises(
        FlawsmithError, match=r"(?s)cannot write to the workspace.*No space left.*run the same"
    ):
        make(settings, small_disk)
    space = Workspace(str(small_disk))
    tables = (path for path in parts(space) if path.parent.name == "samples")
    finished = {path.stem for path in tables if path.suffix == ".parquet"}  # not what a worker was writing
    assert 0 < len(finished) < SHARDS
    before = {path: path.stat().st_mtime_ns for path in parts(space) if path.stem in finished}

    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    make(settings, small_disk)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert contents(space) == contents(undisturbed)


# -- other settings, other pictures ---------------------------------------------------------------------


def test_other_settings_are_refused_with_the_difference_unless_a_new_round_is_asked_for(
    undisturbed, pictures, tmp_path
):
    space = copy_of(undisturbed, tmp_path / "ws")
    other = config(pictures, samples=SAMPLES + 1, seed=9)
    with pytest.raises(UsageError, match=r"(?s)samples: 120 → 121.*seed: 0 → 9.*--new-round"):
        rounds.begin(other, space, new_round=False)
    assert space.rounds() == [0]
    assert rounds.begin(other, space, new_round=True) == 1
    assert space.rounds() == [0, 1]
    assert rounds.begin(other, space, new_round=False) == 1
    machines = config(pictures, workers=7, rounds=9, samples=SAMPLES + 1, seed=9)
    assert rounds.begin(machines, space, new_round=False) == 1


def test_a_picture_that_changed_or_vanished_fails_its_recipes_with_the_reason(tmp_path):
    pictures = draw_pictures(tmp_path / "disc")
    space = Workspace(str(tmp_path / "ws"))
    rounds.begin(config(pictures), space, new_round=False)
    round_ = rounds.open_round(space, 0)
    gone, changed = (Path(image.path) for image in round_.pool.normals["disc"][:2])
    gone.unlink()
    cv2.imwrite(str(changed), np.zeros((64, 64), np.uint8))
    digest = settings_hash(space, 0)
    records = [make_shard(Job(space.url, 0, shard, digest)) for shard in range(4)]

    by_path = {image.image_id: Path(image.path) for image in round_.images.values()}
    touched: Counter[Path] = Counter()
    for row in samples(space):
        used = [by_path[image_id] for image_id in (row["image_id"], *row["donors"])]
        bad = [path for path in used if path in (gone, changed)]
        assert (row["status"] == "failed") == bool(bad)
        if bad:
            assert any(str(path) in row["reason"] for path in bad)
            touched[bad[0]] += 1
    assert set(touched) == {gone, changed}
    assert sum(record["failed"] for record in records) == touched.total()


# -- a generator of another package ---------------------------------------------------------------------

PLUGIN = """
from pathlib import Path

import numpy as np

from generation.protocol import Edit, Generator

BUSY = Path(__file__).with_name("busy")


def draw(recipe, source, rng):
    if BUSY.exists():
        raise TimeoutError(f"{BUSY} does not answer")
    if rng.random() < 0.5:
        raise ValueError("this one always fails")
    return rng.uniform(0, 0.2)


def apply(sources, draws, model):
    box = (28, 36, 28, 36)
    patches = [np.full_like(s.crop(box), level) for s, level in zip(sources, draws)]
    return [Edit(box, patch, np.ones((8, 8), bool)) for patch in patches]


GENERATOR = Generator("brittle", "classic", "a dark square, or an error", draw, apply)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch) -> Iterator[Path]:
    """An installed package that declares the generator `brittle` by an entry point."""
    (tmp_path / "brittle.py").write_text(PLUGIN)
    info = tmp_path / "brittle-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brittle\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[flawsmith.generators]\nbrittle = brittle:GENERATOR\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("brittle", None)


def test_what_always_fails_is_recorded_and_what_may_pass_is_tried_again(pictures, plugin):
    loose = {"area_low": 0, "area_high": 1000, "contrast_min": 0}
    generation = {"generators": {"brittle": {}}, "gates": loose}
    settings = config(pictures, workers=1, samples=20, generation=generation)
    (plugin / "busy").touch()
    with pytest.raises(rounds.PartialResult, match=r"(?s)2 of 2 shards.*TimeoutError: .*does not answer"):
        make(settings, plugin / "ws")
    space = Workspace(str(plugin / "ws"))
    assert samples(space) == []

    (plugin / "busy").unlink()
    make(settings, plugin / "ws")
    rows = samples(space)
    assert len(rows) == 20
    assert {row["reason"] for row in rows if row["status"] == "failed"} == {
        "ValueError: this one always fails"
    }
    assert any(row["status"] == "accepted" for row in rows)
