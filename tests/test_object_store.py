"""Workspaces on an S3 server: the bytes of a local run, one writer, and nothing lost where requests fail."""

import json
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from detectors import protocol
from manifests import lock, storage
from manifests.errors import WorkspaceError
from manifests.schema import canonical_json
from manifests.storage import StorageError, Unreachable
from manifests.workspace import Workspace
from tests.faulty_store import BUCKET, Faults, s3_server
from tests.plain_detector import NAME, PLACE
from tests.test_cli import flawsmith
from tests.test_pipeline import config as pipeline_config
from tests.test_pipeline import contents, draw_pictures, wait_for
from training.loading import ShardFile, read_samples
from workflows import probing, rounds
from workflows.demo import write_drawn
from workflows.detecting import _shards
from workflows.replaying import replay
from workflows.upkeep import verify

SAMPLES, SIZE, SHARDS = 32, 4, 8
HELD = "import sys, time; from manifests.workspace import Workspace\nwith Workspace({url!r}).writing(): "
HELD += "print('held', flush=True); time.sleep(60)"


@pytest.fixture(scope="module")
def server() -> Any:
    with s3_server() as faults:
        yield faults


@pytest.fixture
def url(server, request) -> str:
    return f"s3://{BUCKET}/{request.node.name}"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("source") / "disc")


def config(pictures: Path, workers: int = 2, **changes: Any) -> Any:
    return pipeline_config(pictures, workers, samples=SAMPLES, output={"shard_size": SIZE}, **changes)


def make(settings: Any, url: str) -> Workspace:
    space = Workspace(url)
    with space.writing():
        rounds.generate(space, rounds.begin(settings, space, new_round=False), settings.cluster)
    return space


@pytest.fixture(scope="module")
def local(pictures, tmp_path_factory) -> Workspace:
    return make(config(pictures, workers=1), str(tmp_path_factory.mktemp("local")))


@pytest.fixture(scope="module")
def stored(server, pictures) -> Workspace:
    """Made by two worker processes, undisturbed."""
    return make(config(pictures), f"s3://{BUCKET}/stored")


def tree(space: Workspace) -> dict[str, str]:
    """Every object with its version."""
    found = space.fs.find(space.path(""), detail=True)
    return {name: f"{entry['ETag']} {entry['LastModified']}" for name, entry in found.items()}


# -- runs -----------------------------------------------------------------------------------------------


def test_a_run_on_s3_makes_the_bytes_of_a_local_one(stored, local):
    assert contents(stored) == contents(local)
    assert verify(stored) == []
    accepted = stored.read_table("rounds/000/samples/part-00003.parquet").to_pylist()
    sample_id = next(row["sample_id"] for row in accepted if row["status"] == "accepted")
    assert replay(stored, sample_id)["identical"]
    assert not [name for name in tree(stored) if "lock" in name or name.endswith(".part")]


def test_a_finished_run_is_told_by_listings_and_makes_nothing_again(stored, server, pictures):
    before = tree(stored)
    server.requests.clear()
    make(config(pictures), stored.url)
    assert tree(stored) == before
    named = [path for _, path in server.requests if "part-" in path]
    assert named == [], "no request for a single shard"


def test_a_record_that_was_not_written_yet_is_read_from_its_table(stored, local):
    space = Workspace("memory://unrecorded")
    for name in stored.names("rounds/000/samples"):
        space.write_bytes(f"rounds/000/samples/{name}", stored.read_bytes(f"rounds/000/samples/{name}"))
        tar = name.replace("parquet", "tar")
        space.write_bytes(f"rounds/000/shards/{tar}", stored.read_bytes(f"rounds/000/shards/{tar}"))
    space.write_bytes("rounds/000/samples/part-00002.parquet", b"PAR1 damaged PAR1")
    space.write_bytes("rounds/000/shards/part-00005.tar", b"cut")
    records, todo = rounds.unfinished(space, 0, SHARDS + 1, damaged={7})
    assert todo == [2, 5, 7, 8]
    known = {row["shard"]: row for row in stored.read_table("rounds/000/shards.parquet").to_pylist()}
    assert [{name: record[name] for name in known[0]} for record in records] == [
        known[shard] for shard in (0, 1, 3, 4, 6)
    ]


def test_a_killed_run_goes_on_where_it_stopped(url, local, pictures, tmp_path):
    settings = tmp_path / "config.yaml"
    settings.write_text(canonical_json(config(pictures).model_dump(mode="json")))
    command = "from workflows.cli import main; main()"
    run = subprocess.Popen([sys.executable, "-c", command, "generate", str(settings), "-w", url])
    space = Workspace(url)
    wait_for(lambda: space.names("rounds/000/samples"), run)
    workers = psutil.Process(run.pid).children(recursive=True)
    run.kill()
    run.wait()
    psutil.wait_procs(workers, timeout=30)
    before = tree(space)
    finished = [name for name in before if "/samples/" in name]
    assert 0 < len(finished) < SHARDS
    make(config(pictures), url)  # at once: the dead process of this machine holds no lock
    assert contents(space) == contents(local)
    assert {name: tree(space)[name] for name in finished} == {name: before[name] for name in finished}


def test_a_run_through_failing_requests_makes_the_same_bytes(url, server, local, pictures):
    settings = config(pictures)
    with server.failing(rate=0.12, seed=4) as injected:
        space = make(settings, url)
        assert {s.sample_id for s in read_samples(_shards(space, 0))}
        done = Counter(injected)
    assert contents(space) == contents(local)
    assert verify(space) == []
    assert sum(done.values()) >= 10 and len(done) >= 4, done


def test_every_command_works_on_an_object_store(url, monkeypatch, tmp_path):
    monkeypatch.setitem(protocol.BUILT_IN, NAME, PLACE)
    monkeypatch.setattr(probing, "SHARD", 6)
    monkeypatch.setattr(probing, "SIZE", 64)
    pictures = tmp_path / "pictures"
    write_drawn(pictures, train=8, good=6, each=3)
    shutil.rmtree(pictures / "cloth")
    raw = {
        "source": str(pictures),
        "samples": 12,
        "rounds": 1,
        "output": {"shard_size": 6},
        "detector": {"name": NAME},
        "evaluation": {"resamples": 10},
        "feedback": {"enabled": False, "trials": 16},
        "cluster": {"workers": 1},
    }
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(raw))
    checkpoint = f"{url}/rounds/000/detectors/{NAME}"
    picture = next((pictures / "ring/test/good").glob("*.png"))

    def done(*words: object) -> str:
        ended = flawsmith(*words)
        assert ended.returncode == 0, (words, ended)
        return ended.stdout

    done("run", file, "-w", url)
    assert done("verify", url) == "every shard is whole\n"
    samples = Workspace(url).read_table("rounds/000/samples/part-00000.parquet").to_pylist()
    accepted = [row["sample_id"] for row in samples if row["status"] == "accepted"]
    assert "the same bytes as in s3://" in done("replay", url, accepted[0])
    assert "1 sample rejected; 1 rejected in all" in done("review", url, "--reject", accepted[1])
    done("evaluate", url, "--final")
    done("feedback", url)
    assert f"{url}/report/index.html" in done("report", url)
    done("show", url, "--out", tmp_path / "sheet.png")
    done("export", url, tmp_path / "out")
    done("compare", checkpoint, checkpoint)
    done("predict", checkpoint, picture, "--out", tmp_path / "found")
    assert (tmp_path / "found/scores.csv").exists() and (tmp_path / "sheet.png").exists()


# -- one writer -----------------------------------------------------------------------------------------


def holder(url: str) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HELD.format(url=url)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def write_lock(space: Workspace, **changes: Any) -> None:
    """As of a process on another machine."""
    written = {"host": "elsewhere", "pid": 7, "started": "2026-01-01", "token": "t", "lease": 60.0}
    space.write_bytes(lock.LOCK, json.dumps(written | changes).encode())


def test_a_second_writer_is_refused_by_name_and_a_dead_one_leaves_no_lock(url):
    with holder(url) as other:
        said = rf"in use by process {other.pid} on .*renewed \d+ s ago"
        with pytest.raises(WorkspaceError, match=said), Workspace(url).writing():
            pass
        other.kill()
    space = Workspace(url)
    with space.writing():
        assert space.exists(lock.LOCK)
    assert space.names("") == []


@pytest.mark.parametrize("started", ["1999-01-01", "2199-01-01"])
def test_only_the_stores_clock_tells_a_stale_lock(url, started):
    space = Workspace(url)
    write_lock(space, started=started)
    said = r"process 7 on elsewhere .*takes the lock over in \d+ s"
    with pytest.raises(WorkspaceError, match=said), space.writing():
        pass
    write_lock(space, started=started, lease=1.0)
    time.sleep(2.2)  # S3 tells whole seconds
    with space.writing():
        space.write_bytes("a", b"")
    assert space.names("") == ["a"]


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_exactly_one_gets_the_lock(url, stale):
    space = Workspace(url)
    if stale:
        write_lock(space, lease=-10.0)
    leases = [lock.Lease(url) for _ in range(6)]
    ready = threading.Barrier(len(leases))

    def acquire(lease: lock.Lease) -> bool:
        ready.wait()
        try:
            lease.acquire()
        except WorkspaceError:
            return False
        return True

    with ThreadPoolExecutor(len(leases)) as pool:
        got = list(pool.map(acquire, leases))
    assert sum(got) == 1
    leases[got.index(True)].release()
    assert not space.exists(lock.LOCK)


def write_after_the_loss(url: str, write: Callable[[Workspace], None]) -> None:
    space = Workspace(url)
    with space.writing():
        write_lock(Workspace(url))
        write(space)


def test_a_writer_that_lost_its_lock_stops(url, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 1.0)
    with pytest.raises(WorkspaceError, match=r"was lost to process 7 on elsewhere"):
        write_after_the_loss(url, lambda space: time.sleep(20))  # is interrupted
    left = json.loads(Workspace(url).read_bytes(lock.LOCK))
    assert left["host"] == "elsewhere", "another's lock is left alone"


def test_a_writer_that_stood_still_writes_nothing_more(url, monkeypatch):
    def late(space: Workspace) -> None:
        monkeypatch.setattr(lock, "LEASE", 0.0)  # as after a long stop: the thread did not run yet
        space.write_bytes("late", b"")

    with pytest.raises(WorkspaceError, match="was lost to"):
        write_after_the_loss(url, late)
    assert not Workspace(url).exists("late")


def test_a_renewed_lock_outlives_its_lease(url, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 1.0)
    space = Workspace(url)
    with space.writing():
        time.sleep(3)
        with pytest.raises(WorkspaceError, match="in use"), Workspace(url).writing():
            pass
        space.write_bytes("a", b"")


def test_a_network_folder_has_the_lock_object_too(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "is_network", lambda folder: True)
    monkeypatch.setattr(lock.fcntl, "flock", lambda *_: None)  # one that does not reach the other machine
    space, other = Workspace(str(tmp_path)), Workspace(str(tmp_path))
    with space.writing():
        assert json.loads((tmp_path / lock.LOCK).read_bytes())["host"]
        with pytest.raises(WorkspaceError, match="in use by process"), other.writing():
            pass
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


# -- errors ---------------------------------------------------------------------------------------------


def test_every_try_is_bounded_and_named(url, server, monkeypatch):
    monkeypatch.setattr(storage, "PAUSE", 0.001)
    space = Workspace(url)
    space.write_bytes("a", b"x" * 1000)
    with server.failing(rate=1, seed=0, kinds=("503", "500")) as injected:
        with pytest.raises(Unreachable, match=r"all of 8 tries failed: 1\. .*; 8\. .*again to go on"):
            space.read_bytes("a")
        assert 8 <= sum(injected.values()) <= 16
    failing = server.failing(rate=1, seed=0, kinds=("short",))
    with failing, pytest.raises(Unreachable, match="500 bytes came of 1000"):
        space.read_bytes("a")
    assert space.read_bytes("a") == b"x" * 1000


def test_bytes_other_than_the_recorded_are_not_trained_on(stored):
    (good,) = _shards(stored, 0)[:1]
    wrong = Workspace(f"s3://{BUCKET}/wrong")
    data = bytearray(stored.read_bytes(stored.read_table("rounds/000/shards.parquet")["path"][0].as_py()))
    data[700] ^= 1
    wrong.write_bytes("a.tar", bytes(data))
    bad = ShardFile(wrong.address("a.tar"), good.accepted, good.bytes, good.sha256)
    with pytest.raises(Exception, match=r"a\.tar is cut short or damaged: its sha256"):
        next(read_samples([bad]))
    assert next(read_samples([good])).image.size


def test_what_is_missing_is_said_with_the_remedy(server, monkeypatch):
    absent = Workspace("s3://absent/run")
    with pytest.raises(StorageError, match="no such bucket; make it first"), absent.writing():
        pass
    with pytest.raises(StorageError, match="name a folder, or a URL"):
        Workspace("nowhere://x").exists("a")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID"):
        Workspace(f"s3://{BUCKET}/run").write_bytes("a", b"")
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(StorageError, match=r"pip install 'flawsmith\[gcs\]'"):
        Workspace("gs://bucket/run").exists("a")


def test_a_lost_answer_to_a_conditional_write_is_no_refusal(url, server):
    """The server did what was asked and answered 500: the second try finds the lock, and it is its own."""
    space = Workspace(url)
    with server.failing(rate=0.6, seed=1, kinds=("lost",), methods=("PUT",)) as injected, space.writing():
        assert injected["lost"]
    assert Faults and datetime.now(UTC)
