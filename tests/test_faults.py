"""Dask servers killed, stopped and starved in the middle of a run: what is left is what nobody disturbed."""

import contextlib
import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import pytest

from manifests.errors import FlawsmithError
from manifests.schema import canonical_json
from manifests.shards import unpack
from manifests.workspace import Workspace
from tests import faults
from tests.test_pipeline import contents, draw_pictures, make, samples
from workflows import cluster, rounds
from workflows.cluster import RoundResult, make_round
from workflows.config import Config, parse_config
from workflows.machines import open_client
from workflows.replaying import replay
from workflows.stages import Job, make_shard, settings_hash
from workflows.upkeep import verify

pytestmark = pytest.mark.fault
SAMPLES, SIZE, SHARDS = 24, 4, 6


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Iterator[faults.Faulty]:
    made = faults.write_package(tmp_path_factory.mktemp("package") / "faulty")
    patch = pytest.MonkeyPatch()
    patch.syspath_prepend(str(made.folder))
    patch.setenv("PYTHONPATH", str(made.folder))
    yield made
    patch.undo()
    sys.modules.pop("faulty", None)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("source") / "disc")


def config(
    pictures: Path, cluster: dict[str, Any] | None = None, seconds: float = 0.05, **params: Any
) -> Config:
    raw = {
        "source": str(pictures),
        "samples": SAMPLES,
        "generation": {
            "generators": {"faulty": {"params": {"seconds": seconds, **params}}, "scar": {"share": 0.5}},
            "gates": faults.GATES,
            "attempts": 1,
        },
        "output": {"shard_size": SIZE},
        "cluster": cluster or {"workers": 1},
    }
    return parse_config(raw, name="test")


@pytest.fixture(scope="module")
def undisturbed(package, pictures, tmp_path_factory) -> dict[str, Any]:
    return contents(make(config(pictures), tmp_path_factory.mktemp("undisturbed")))


def disturbed(settings: Config, folder: Path, fault: Any, after: int = 1) -> tuple[Workspace, RoundResult]:
    """A run in which ``fault()`` happens once ``after`` shards are there."""
    space = Workspace(str(folder))
    number = rounds.begin(settings, space, new_round=False)
    done: list[int] = []

    def progress(record: dict[str, Any]) -> None:
        done.append(record["shard"])
        if len(done) == after:
            fault()

    return space, make_round(space, number, list(range(SHARDS)), settings.cluster, progress)


def finish(space: Workspace, pictures: Path, **params: Any) -> dict[str, Any]:
    """The same command again, on this machine; what the workspace then holds."""
    make(config(pictures, **params), Path(space.url))
    assert verify(space, sweep=True) == []
    assert [path for path in Path(space.url).rglob("*") if ".part" in path.suffixes] == []
    planned = [r.sample_id for shard in range(SHARDS) for r in rounds.open_round(space, 0).plan(shard)]
    assert [row["sample_id"] for row in samples(space)] == planned
    return contents(space)


def tables_aside(stored: dict[str, Any]) -> dict[str, Any]:
    """Pictures and masks of the shards only: `seconds`, a setting here, is in every recipe."""
    return {
        (name, key, member): data
        for name, tar in stored.items()
        if name.startswith("shards/")
        for key, members in unpack(tar, name)
        for member, data in members.items()
        if member != "json"
    }


# -- servers --------------------------------------------------------------------------------------------


def test_all_workers_killed_and_others_join_an_encrypted_scheduler(package, pictures, undisturbed, tmp_path):
    paths = faults.certificates(tmp_path / "tls")
    with faults.servers(tmp_path / "dask", security=faults.tls_flags(paths)) as dask_servers:
        address = dask_servers.scheduler()
        assert address.startswith("tls://")
        workers = [dask_servers.worker(), dask_servers.worker()]

        def kill_all() -> None:
            for worker in workers:
                faults.kill(worker)
            dask_servers.worker()

        settings = config(pictures, {"address": address, "tls": paths}, seconds=0.05)
        space, result = disturbed(settings, tmp_path / "ws", kill_all)
        assert result.errors == {}
        other = faults.certificates(tmp_path / "other", "somebody else")
        with pytest.raises(FlawsmithError, match=r"no Dask scheduler answers.*cluster.tls"):
            make(config(pictures, {"address": address, "tls": other}), tmp_path / "unused")
    assert finish(space, pictures) == undisturbed


def test_a_killed_scheduler_is_said_and_costs_no_finished_shard(package, pictures, undisturbed, tmp_path):
    with faults.servers(tmp_path / "dask") as dask_servers:
        dask_servers.scheduler()
        dask_servers.worker()
        settings = config(pictures, {"address": dask_servers.address})
        with pytest.raises(FlawsmithError, match=r"scheduler at tcp://.* does not answer.*run the same"):
            disturbed(settings, tmp_path / "ws", lambda: faults.kill(dask_servers.processes[0]), after=2)
    space = Workspace(str(tmp_path / "ws"))
    before = {path: path.stat().st_mtime_ns for path in Path(space.url).rglob("samples/*.parquet")}
    assert 2 <= len(before) < SHARDS
    assert finish(space, pictures) == undisturbed
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_stopped_worker_is_replaced_and_may_wake_up_again(package, pictures, undisturbed, tmp_path):
    # The shortest that Dask allows: it waits for ten heartbeats of half a second in any case.
    patient = {"DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "2s"}
    with faults.servers(tmp_path / "dask", environment=patient) as dask_servers:
        dask_servers.scheduler()
        slow = dask_servers.worker("--no-nanny")
        settings = config(pictures, {"address": dask_servers.address})
        with contextlib.ExitStack() as asleep:

            def stop() -> None:
                asleep.enter_context(faults.stopped(slow.pid))
                dask_servers.worker()

            space, result = disturbed(settings, tmp_path / "ws", stop)
        assert result.errors == {}
        slow.wait(30)  # it wakes up, finishes what it was at, and finds itself dismissed
    assert finish(space, pictures) == undisturbed


def test_a_worker_whose_time_is_up_leaves_without_a_failure(package, pictures, undisturbed, tmp_path):
    """As SLURM workers do before their walltime. One unexpected loss would be an error here."""
    strict = {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}
    with faults.servers(tmp_path / "dask", environment=strict) as dask_servers:
        dask_servers.scheduler()
        first = dask_servers.worker("--lifetime", "3s", "--no-nanny")
        settings = config(pictures, {"address": dask_servers.address}, seconds=0.4)

        def replaced() -> int:
            status = first.wait()
            dask_servers.worker()
            return status

        with ThreadPoolExecutor() as aside:  # on a busy machine it may leave before it has made a shard
            left = aside.submit(replaced)
            space, result = disturbed(settings, tmp_path / "ws", lambda: None)
            assert left.result(30) == 0
        assert result.errors == {}
    assert sorted(record["shard"] for record in result.records) == list(range(SHARDS))
    assert tables_aside(finish(space, pictures, seconds=0.4)) == tables_aside(undisturbed)


def test_generators_for_gpus_run_where_a_gpu_is_and_the_others_beside_them(package, pictures, tmp_path):
    raw = {
        "source": str(pictures),
        "samples": SAMPLES,
        "generation": {
            "generators": {"lamp": {"params": {"seconds": 0.2}}, "faulty": {"params": {"seconds": 0.2}}},
            "gates": faults.GATES,
            "attempts": 1,
        },
        "output": {"shard_size": SIZE},
    }
    with faults.servers(tmp_path / "dask") as dask_servers:
        dask_servers.scheduler()
        holder = dask_servers.worker("--resources", "GPU=1", "--no-nanny")
        dask_servers.worker()
        settings = parse_config(raw | {"cluster": {"address": dask_servers.address}}, name="test")
        space = Workspace(str(tmp_path / "ws"))
        rounds.begin(settings, space, new_round=False)
        with open_client(settings.cluster) as client:  # without a worker with a GPU, any would do
            client.wait_for_workers(2, timeout=60)
        result = make_round(space, 0, list(range(SHARDS)), settings.cluster)
    assert result.errors == {}
    by_shard: dict[str, set[int]] = {}
    for row in samples(space):
        by_shard.setdefault(row["generator"], set()).add(row["shard"])
    assert by_shard["lamp"].isdisjoint(by_shard["faulty"])
    lamps = [row for row in samples(space) if row["generator"] == "lamp"]
    assert {row["measures"] for row in lamps} == {canonical_json({"pid": holder.pid})}


def test_shards_for_gpus_wait_for_another_gpu(package, pictures, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(cluster, "REFRESH", 0.2)
    raw = config(pictures).model_dump(mode="json")
    raw["generation"]["generators"] = {"lamp": {"params": {"seconds": 0.05}}}
    with faults.servers(tmp_path / "dask") as dask_servers:
        dask_servers.scheduler()
        holders = [dask_servers.worker("--resources", "GPU=1", "--no-nanny")]
        settings = parse_config(raw | {"cluster": {"address": dask_servers.address}}, name="test")

        def replace_it() -> None:
            faults.kill(holders[0])
            dask_servers.worker()
            later = lambda: holders.append(dask_servers.worker("--resources", "GPU=1", "--no-nanny"))  # noqa: E731
            threading.Timer(4, later).start()

        with open_client(settings.cluster) as client:
            client.wait_for_workers(1, timeout=60)
        space, result = disturbed(settings, tmp_path / "ws", replace_it)
    assert result.errors == {}
    made_by = {json.loads(row["measures"])["pid"] for row in samples(space)}
    assert made_by == {holder.pid for holder in holders}
    assert capfd.readouterr().err.count("no worker with a GPU is left") == 1


# -- generators -----------------------------------------------------------------------------------------


def test_a_generator_that_hangs_is_named_and_its_shard_made_by_the_next_run(
    package, pictures, undisturbed, tmp_path
):
    package.say("hang 1")
    try:
        with pytest.raises(
            rounds.PartialResult, match=r"(?s)1 of 6 shards.*shard 1: generator faulty.*5 s .*time_limit"
        ):
            make(config(pictures, {"workers": 1, "time_limit": 5}), tmp_path / "ws")
    finally:
        package.say("")
    assert finish(Workspace(str(tmp_path / "ws")), pictures) == undisturbed


def test_measuring_gives_up_as_a_shard_does(package, pictures, tmp_path):
    space = Workspace(str(tmp_path / "ws"))
    settings = config(pictures, {"workers": 1, "time_limit": 5}, seconds=60)
    rounds.begin(settings, space, new_round=False)
    with (
        open_client(settings.cluster) as client,
        pytest.raises(FlawsmithError, match=r"cannot measure.*generator faulty.*5 s.*time_limit"),
    ):
        cluster.measure(client, space, 0, settings.cluster)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raise", "ZeroDivisionError: no reason"),
        ("nan", "ValueError: patch holds values that are not finite"),
        ("shape", r"ValueError: patch is \(7, 8, \d\), its box needs \(8, 8, \d\)"),
        ("dtype", "ValueError: patch is uint8, not float32"),
        ("count", "ValueError: generator faulty gave 0 edits for 1 draws"),
    ],
)
def test_what_a_generator_gets_wrong_fails_its_own_samples_only(package, pictures, tmp_path, fault, reason):
    space = Workspace(str(tmp_path / "ws"))
    rounds.begin(config(pictures, seconds=0), space, new_round=False)
    package.say(fault)
    try:
        for shard in range(3):
            make_shard(Job(space.url, 0, shard, settings_hash(space, 0)))
    finally:
        package.say("")
    rows = samples(space)
    for row in rows:
        wrong = row["generator"] == "faulty" and row["seed"] % 3 == 0
        assert (row["status"] == "failed") == wrong, row["reason"]
        if wrong:
            assert re.match(reason, row["reason"]), row["reason"]
    assert Counter(row["status"] for row in rows)["failed"] > 0


def test_memory_that_runs_out_gives_smaller_batches_and_in_the_end_a_clear_error(package, pictures, tmp_path):
    """The nanny ends the worker; nothing in the process can react. Both shards are lost with it."""
    cluster = {"workers": 1, "memory_limit": "700MB"}
    try:
        with dask.config.set({"distributed.scheduler.allowed-failures": 0}):
            package.say("batch")
            settings = config(pictures, cluster, seconds=0).model_copy(update={"samples": 2 * SIZE})
            space = make(settings, tmp_path / "smaller")
            rows = [row for row in samples(space) if row["generator"] == "faulty"]
            assert {row["measures"] for row in rows} == {canonical_json({"batch": 2})}
            package.say("memory")
            with pytest.raises(rounds.PartialResult, match=r"(?s)shard 0: .*memory.*limit 700MB.*cluster"):
                make(settings, tmp_path / "never")
    finally:
        package.say("")
    accepted = next(row for row in rows if row["status"] == "accepted")
    assert replay(space, accepted["sample_id"])["identical"]


# -- pictures -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [faults.truncate, faults.bomb])
def test_a_poisoned_picture_fails_its_own_samples_only(package, tmp_path, poison):
    pictures = draw_pictures(tmp_path / "disc")
    space = Workspace(str(tmp_path / "ws"))
    rounds.begin(config(pictures, seconds=0), space, new_round=False)
    victim = next(iter(rounds.open_round(space, 0).pool.normals["disc"]))
    poison(Path(victim.path))
    for shard in range(SHARDS):
        make_shard(Job(space.url, 0, shard, settings_hash(space, 0)))
    rows = samples(space)
    failed = [row for row in rows if row["status"] == "failed"]
    assert failed
    assert [row for row in rows if row["image_id"] == victim.image_id] == failed
    assert all(victim.path in row["reason"] for row in failed)
