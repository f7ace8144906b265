"""The kinds of faults that `make soak` draws from, each a function that injects one into a run of its own.

A run is `flawsmith generate` as a process. A fault strikes it once a drawn number of shards are there, and
waits for its end; what it left broken besides (a disk, a picture, a clock) is mended before it returns. That
the workspace then comes to what nobody disturbed is for ``tests.soak`` to say.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from manifests import lock
from manifests.workspace import Workspace, part
from tests import faults
from tests.faults import wait_for
from tests.faulty_store import BUCKET, Faults, s3_server
from tests.test_pipeline import draw_pictures, samples
from workflows import rounds

SAMPLES, SIZE, SHARDS = 96, 4, 24
PATIENCE = 180  # seconds after which a run counts as one that never ends
PAUSE, LONG_PAUSE = 3.0, 60.0  # seconds that a worker is stopped
OK, FAILED, PARTIAL = 0, 1, 3  # exit codes


# -- what runs need -------------------------------------------------------------------------------------


@dataclass
class Bench:
    """What all runs share: pictures, generators that misbehave on demand, a clock, Dask servers and an S3
    server.

    Attributes:
        disk: a small file system of its own for local workspaces; None where none can be mounted.
        long: worker stops last :data:`LONG_PAUSE`.
    """

    folder: Path
    pictures: Path
    package: faults.Faulty
    clock: faults.Clock
    store: Faults
    disk: Path | None
    long: bool = False
    servers: faults.Servers | None = None
    workers: list[subprocess.Popen] = field(default_factory=list)
    started: int = 0  # schedulers

    def settings(self, **cluster: Any) -> Path:
        """A configuration file; runs that differ in ``cluster`` only make the same bytes."""
        generators = {"faulty": {"params": {"seconds": 0.05}}, "scar": {"share": 0.5}}
        raw = {
            "source": str(self.pictures),
            "samples": SAMPLES,
            "generation": {"generators": generators, "gates": faults.GATES, "attempts": 1},
            "output": {"shard_size": SIZE},
            "cluster": {"workers": 2} | cluster,
        }
        text = json.dumps(raw)
        file = self.folder / f"{uuid.uuid5(uuid.NAMESPACE_OID, text)}.yaml"  # JSON is YAML
        file.write_text(text)
        return file

    def address(self) -> str:
        """Of a scheduler with two workers; what an earlier fault killed is replaced."""
        if self.servers is None or self.servers.processes[0].poll() is not None:
            self.close()
            self.started += 1
            folder = self.folder / f"dask-{self.started}"
            folder.mkdir()
            self.servers, self.workers = faults.Servers(folder), []
            self.servers.scheduler()
        self.workers = [worker for worker in self.workers if worker.poll() is None]
        while len(self.workers) < 2:
            self.workers.append(self.servers.worker())
        return self.servers.address

    def close(self) -> None:
        for process in self.servers.processes if self.servers else ():
            faults.kill(process)
        self.servers = None


@contextlib.contextmanager
def bench(folder: Path, *, long: bool = False) -> Iterator[Bench]:
    package = faults.write_package(folder / "package")
    clock = faults.write_clock(folder / "clock")
    paths = [str(package.folder), str(clock.folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch, s3_server() as store, _small_disk(folder / "disk") as disk:
        patch.syspath_prepend(str(package.folder))
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        made = Bench(folder, draw_pictures(folder / "disc"), package, clock, store, disk, long)
        try:
            yield made
        finally:
            made.close()
            sys.modules.pop("faulty", None)


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[Path | None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@dataclass
class Scene:
    """A workspace that faults are injected into, one after the other.

    Attributes:
        excused: what the reasons of samples that a fault made fail begin with.
        smaller: whether a shard may have been made in smaller batches.
    """

    bench: Bench
    space: Workspace
    rng: random.Random
    excused: list[str] = field(default_factory=list)
    smaller: bool = False

    def finished(self) -> list[int]:
        """Shards whose samples table is there."""
        names = self.space.names("rounds/000/samples")
        return [int(name[5:10]) for name in names if name.endswith(".parquet")]

    def unfinished(self) -> list[int]:
        """In the order in which they are made."""
        return sorted(set(range(SHARDS)) - set(self.finished()))

    def start(
        self, *, servers: bool = False, environment: dict[str, str] | None = None, **cluster: Any
    ) -> Any:
        """The run as a process: on the bench's servers, or on two workers of its own."""
        words = ["generate", self.bench.settings(**cluster), "-w", self.space.url]
        words += ["--scheduler", self.bench.address()] if servers else []
        return faults.command_line(*words, environment=environment)

    @contextlib.contextmanager
    def struck(self, *codes: int, says: str = "", servers: bool = False, **options: Any) -> Iterator[Any]:
        """A run in which one to three more shards are there. It must end with one of ``codes``, and where it
        does not end well what it says must match ``says``."""
        before = len(self.finished())
        run = self.start(servers=servers, **options)
        try:
            more = self.rng.randint(1, 3)
            wait_for(lambda: len(self.finished()) >= before + more, PATIENCE, run)
            yield run
            ended(run, *codes, says=says)
        finally:
            faults.kill(run)


def ended(run: subprocess.Popen, *codes: int, says: str = "") -> str:
    """What a run said, once it ended as it should."""
    try:
        text, _ = run.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"the run did not end in {PATIENCE} s") from None
    assert run.returncode in codes, f"the run ended with {run.returncode}, not {codes}: {text[-2000:]}"
    plain = " ".join(text.split())
    assert run.returncode == OK or re.search(says, plain, re.IGNORECASE), (
        f"the run does not say {says!r}: {text[-2000:]}"
    )
    return plain


def _workers_of(run: subprocess.Popen) -> list[int]:
    found = []
    for child in psutil.Process(run.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # or a zombie by now
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found


# -- processes ------------------------------------------------------------------------------------------


def worker_killed(scene: Scene) -> None:
    """With its nanny or without."""
    with scene.struck(OK, servers=True):
        worker = scene.rng.choice(scene.bench.workers)
        pid = faults.working(worker)
        if pid and scene.rng.random() < 0.5:
            os.kill(pid, signal.SIGKILL)
        else:
            faults.kill(worker)


def all_workers_killed(scene: Scene) -> None:
    with scene.struck(OK, servers=True):
        for worker in scene.bench.workers:
            faults.kill(worker)
        scene.bench.address()  # others join


def scheduler_killed(scene: Scene) -> None:
    says = "run the same command again|no Dask scheduler answers"
    with scene.struck(FAILED, says=says, servers=True):
        assert scene.bench.servers is not None
        faults.kill(scene.bench.servers.processes[0])


def client_killed(scene: Scene) -> None:
    """The run's own process only: its workers must end by themselves."""
    with scene.struck(-signal.SIGKILL) as run:
        others = psutil.Process(run.pid).children(recursive=True)
        run.kill()
        _, alive = psutil.wait_procs(others, timeout=30)
        assert not alive, f"{len(alive)} processes outlive their run"


def client_of_a_scheduler_killed(scene: Scene) -> None:
    """Its workers go on with what they were at while the next run begins."""
    with scene.struck(-signal.SIGKILL, servers=True) as run:
        run.kill()


def worker_stopped(scene: Scene) -> None:
    with scene.struck(OK, servers=True):
        pid = wait_for(lambda: faults.working(scene.rng.choice(scene.bench.workers)))
        with faults.stopped(pid):
            time.sleep(LONG_PAUSE if scene.bench.long else PAUSE)


def memory_short(scene: Scene) -> None:
    """A worker takes memory until its nanny ends it."""
    options = {"environment": {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0"}, "memory_limit": "700MB"}
    scene.smaller = True
    with scene.struck(OK, PARTIAL, says="run the same command again", **options) as run:
        before = set(_workers_of(run))
        scene.bench.package.say("batch")
        wait_for(lambda: before - set(_workers_of(run)), PATIENCE, run)
        scene.bench.package.say("")


def clock_jumps(scene: Scene) -> None:
    """Of client, scheduler and workers: ``time.time`` and nothing else."""
    with scene.struck(OK):
        scene.bench.clock.jump(scene.rng.choice([-400 * 86400, -3600, 3600, 400 * 86400]))
    scene.bench.clock.jump(0)


# -- disks and stores -----------------------------------------------------------------------------------


def disk_full(scene: Scene) -> None:
    """Filled to the last byte by something else."""
    disk = scene.bench.disk
    assert disk is not None
    ballast = disk / "ballast"
    try:
        with (
            scene.struck(FAILED, says="No space left"),
            contextlib.suppress(OSError),
            open(ballast, "wb", buffering=0) as file,
        ):
            while True:
                file.write(bytes(4096))
    finally:
        ballast.unlink()


def files_limited(scene: Scene) -> None:
    """Workers that may not write files of more than 1,000 bytes, as by a quota."""
    with scene.struck(FAILED, PARTIAL, says="File too large") as run:
        for pid in _workers_of(run):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, 1000))


def _requests_failing(*kinds: str) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        store = scene.bench.store
        with scene.struck(OK, FAILED, PARTIAL, says="run the same command again", servers=True):
            rate = 0.05 if "hang" in kinds else 0.15
            with store.failing(rate, scene.rng.randrange(2**32), kinds) as injected:
                wait_for(lambda: len(scene.finished()) >= SHARDS - 2 or injected.total() >= 10, PATIENCE)
                assert injected

    return inject


# -- generators and pictures ----------------------------------------------------------------------------


def _samples_failing(word: str, reason: str) -> Callable[[Scene], None]:
    def inject(scene: Scene) -> None:
        scene.excused.append(reason)
        try:
            with scene.struck(OK, servers=True):
                scene.bench.package.say(word)
        finally:
            scene.bench.package.say("")
        assert any(reason in row["reason"] for row in samples(scene.space)), f"no sample failed by {word}"

    return inject


def generator_hangs(scene: Scene) -> None:
    try:
        with scene.struck(PARTIAL, says="time_limit", servers=True, time_limit=3):
            scene.bench.package.say(f"hang {scene.rng.choice(scene.unfinished()[SHARDS // 4 :])}")
    finally:
        scene.bench.package.say("")


def picture_poisoned(scene: Scene) -> None:
    """Cut or a bomb, before workers that have not read it yet begin."""
    if not scene.space.rounds():  # pictures are counted when a workspace begins
        with scene.struck(-signal.SIGKILL) as run:
            faults.kill(run)
    round_ = rounds.open_round(scene.space, 0)
    used = {recipe.image_id for shard in scene.unfinished()[:-4] for recipe in round_.plan(shard)}
    victim = Path(round_.images[scene.rng.choice(sorted(used))].path)
    data = victim.read_bytes()
    scene.excused.append(str(victim))
    scene.rng.choice([faults.truncate, faults.bomb])(victim)
    try:
        with scene.struck(OK):
            pass
    finally:
        victim.write_bytes(data)
    assert any(str(victim) in row["reason"] for row in samples(scene.space)), "no sample tells of the picture"


# -- workspaces -----------------------------------------------------------------------------------------


def two_runs(scene: Scene) -> None:
    """The second is refused by name, whatever the first is at."""
    try:
        with scene.struck(OK, servers=True) as first:
            scene.bench.package.say("wait")
            second = scene.start(servers=True)
            try:
                text = ended(second, FAILED, says="in use by process")
            finally:
                faults.kill(second)
            assert f"process {first.pid}" in text, text
            scene.bench.package.say("")
    finally:
        scene.bench.package.say("")


def stale_lock(scene: Scene) -> None:
    """Of a machine that is gone, and what it was writing."""
    token = uuid.UUID(int=scene.rng.getrandbits(128)).hex
    half = f"{part('shards', 0, scene.rng.randrange(SHARDS), 'tar')}.{token}"
    if scene.space.is_local:
        root = Path(scene.space.url)
        (root / "rounds/000/shards").mkdir(parents=True, exist_ok=True)
        (root / ".lock").write_text("4194304")
        (root / f"{half}.part").write_bytes(b"half of a sha")
    else:
        held = {"host": "elsewhere", "pid": 7, "started": "2026-01-01", "token": "t", "lease": -10.0}
        scene.space.write_bytes(lock.LOCK, json.dumps(held).encode())
    with scene.struck(OK, servers=True):
        pass


def files_lost(scene: Scene) -> None:
    """A few files of finished shards, cut or gone."""
    with scene.struck(-signal.SIGKILL, servers=True) as run:
        run.kill()
    for shard in scene.finished()[:2]:
        folder, suffix = scene.rng.choice([("shards", "tar"), ("samples", "parquet")])
        name = part(folder, 0, shard, suffix)
        if scene.rng.random() < 0.5:
            scene.space.remove(name)
        else:
            scene.space.write_bytes(name, scene.space.read_bytes(name)[:-100])


# -- all of them ----------------------------------------------------------------------------------------

PROCESSES = {
    "worker killed": worker_killed,
    "all workers killed": all_workers_killed,
    "scheduler killed": scheduler_killed,
    "client killed": client_killed,
    "client of a scheduler killed": client_of_a_scheduler_killed,
    "worker stopped": worker_stopped,
    "out of memory": memory_short,
    "clock jumps": clock_jumps,
    "generator raises": _samples_failing("raise", "ZeroDivisionError: no reason"),
    "generator gives NaN": _samples_failing("nan", "ValueError: patch holds values that are not finite"),
    "generator gives a wrong shape": _samples_failing("shape", "ValueError: patch is (7, 8, "),
    "generator hangs": generator_hangs,
    "picture poisoned": picture_poisoned,
    "two runs": two_runs,
    "stale lock": stale_lock,
    "files lost": files_lost,
}
DISK = {"disk full": disk_full, "file size limited": files_limited}
STORE = {
    "requests answered 500": _requests_failing("500"),
    "requests answered 503": _requests_failing("503"),
    "requests timed out": _requests_failing("hang"),
    "answers cut short": _requests_failing("cut", "short"),
    "answers lost": _requests_failing("lost"),
}


def kinds(bench: Bench, store: str) -> dict[str, Callable[[Scene], None]]:
    """What can be injected here into a workspace in a ``folder`` or on ``s3``."""
    if store == "s3":
        return PROCESSES | STORE
    return PROCESSES | {name: inject for name, inject in DISK.items() if bench.disk or name != "disk full"}


def workspace(bench: Bench, store: str, name: str) -> Workspace:
    return Workspace(f"s3://{BUCKET}/{name}" if store == "s3" else str((bench.disk or bench.folder) / name))
