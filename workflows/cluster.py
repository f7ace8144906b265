"""Dask: opening a cluster, sending one task a shard, and reporting how far it is."""

from __future__ import annotations

import errno
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import dask
from distributed import Client, LocalCluster, WorkerPlugin, as_completed

from manifests.errors import FlawsmithError
from manifests.workspace import Workspace
from workflows.config import Cluster
from workflows.console import say
from workflows.stages import (
    Job,
    Round,
    generators_of,
    load_model,
    load_round,
    make_shard,
    prepare_process,
    settings_hash,
    shard_record,
)

RETRIES = 3  # of a task whose worker was lost or that met an I/O error

# What a local cluster's processes are told before they start.
LOCAL = {
    "distributed.nanny.pre-spawn-environ": {
        "OMP_NUM_THREADS": 1,
        "OPENBLAS_NUM_THREADS": 1,
        "MKL_NUM_THREADS": 1,
        # Dask has the C library give freed memory back at once; pictures then come from fresh pages, array
        # by array, which takes a third of a worker's time. These bounds keep up to 256 MB a worker instead.
        "MALLOC_TRIM_THRESHOLD_": 256 * 2**20,
        "MALLOC_MMAP_THRESHOLD_": 32 * 2**20,
    },
    # Dask looks after itself every few milliseconds, which here would cost more than all its scheduling.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "2s",
    # Its logs of the last thousand events grow by 10 MB before they are full, and nobody reads them.
    "distributed.admin.low-level-log-length": 100,
    "distributed.worker.memory.monitor-interval": "500ms",
    # Errors come back with the shard's result; a worker's own traceback tells a user nothing more.
    "distributed.logging.distributed": "critical",
}


class Prepare(WorkerPlugin):
    """Once a worker: fixes its threads and loads the models of the round, so that no task does."""

    name = "flawsmith-prepare"

    def __init__(self, workspace: str, number: int, settings: str):
        self.args = (workspace, number, settings)

    def setup(self, worker: Any) -> None:
        prepare_process()
        round_ = load_round(*self.args)
        for name, trait in round_.traits.items():
            if round_.generation.generators[name].share > 0:
                load_model(name, trait.params)


@contextmanager
def open_client(settings: Cluster) -> Iterator[Client]:
    """A client of the configured scheduler, or of a local cluster: one single-threaded worker a core."""
    if settings.address:
        try:
            client = Client(settings.address, timeout="10s")
        except (OSError, TimeoutError, ValueError) as error:
            raise FlawsmithError(
                f"no Dask scheduler answers at {settings.address}: {error}; start one with `dask scheduler` "
                "and `dask worker`, or leave --scheduler out to use this machine"
            ) from error
        with client:
            yield client
        return
    with (
        dask.config.set(LOCAL),
        LocalCluster(
            n_workers=settings.workers or os.cpu_count() or 1,
            threads_per_worker=1,
            processes=True,
            memory_limit=settings.memory_limit,
            dashboard_address="127.0.0.1:0",
            silence_logs="CRITICAL",
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@dataclass(frozen=True)
class RoundResult:
    """Rows of the shards that are finished, and the errors of those that are not."""

    records: list[dict[str, Any]]
    errors: dict[int, str]


def unfinished(
    space: Workspace, number: int, count: int, damaged: set[int]
) -> tuple[list[dict[str, Any]], list[int]]:
    """(records of finished shards, numbers of those to make), by record and size; nothing is hashed."""
    records, todo = [], []
    for shard in range(count):
        record = None if shard in damaged else shard_record(space, number, shard)
        if record is not None and space.size(record["path"]) == record["bytes"]:
            records.append(record)
        else:
            todo.append(shard)
    return records, todo


def make_round(
    space: Workspace,
    number: int,
    todo: list[int],
    settings: Cluster,
    progress: Callable[[dict[str, Any]], None] = lambda record: None,
) -> RoundResult:
    """Makes shards of a round on Dask workers, a bounded number at a time: any plan fits the scheduler.

    Raises:
        FlawsmithError: the disk is full, or an error that no retry mends. Finished shards stay.
    """
    digest = settings_hash(space, number)
    with open_client(settings) as client:
        client.register_plugin(Prepare(space.url, number, digest))
        workers = client.scheduler_info(n_workers=-1)["workers"]
        if not workers:
            say("no worker has joined the scheduler yet; waiting for `dask worker` to do so")
        window = 2 * max(1, len(workers))
        round_ = load_round(space.url, number, digest)
        try:
            return _submit_all(
                client, space, round_, todo, digest, window, _resources(round_, workers), progress
            )
        finally:
            client.unregister_worker_plugin(Prepare.name)


def _resources(round_: Round, workers: dict[str, Any]) -> dict[str, float]:
    """One GPU a task, if a generator of the mix wants one and workers offer any (`--resources GPU=1`)."""
    wanted = any(generator.gpu for generator in generators_of(round_.generation))
    offered = any("GPU" in worker.get("resources", {}) for worker in workers.values())
    return {"GPU": 1} if wanted and offered else {}


def _submit_all(
    client: Client,
    space: Workspace,
    round_: Round,
    todo: list[int],
    digest: str,
    window: int,
    resources: dict[str, float],
    progress: Callable[[dict[str, Any]], None],
) -> RoundResult:
    records: list[dict[str, Any]] = []
    errors: dict[int, str] = {}
    waiting = iter(todo)
    running = as_completed()
    shard_of: dict[Any, int] = {}

    def submit() -> None:
        shard = next(waiting, None)
        if shard is not None:
            job = Job(space.url, round_.number, shard, digest)
            future = client.submit(
                _run_job,
                job,
                key=f"shard-{digest[:8]}-{round_.number}-{shard}-{time.time_ns()}",
                resources=resources,
                retries=RETRIES,
                pure=False,
            )
            shard_of[future.key] = shard
            running.add(future)

    for _ in range(window):
        submit()
    for future in running:
        shard = shard_of.pop(future.key)
        if future.status == "finished":
            record = future.result()
            if isinstance(record, BaseException):
                raise _explain(record, space) from record
            record["fingerprint"] = sys.intern(record["fingerprint"])  # one text for a million shards
            records.append(record)
            progress(record)
        else:
            error = future.exception()
            errors[shard] = f"{type(error).__name__}: {error}"
        future.release()
        submit()
    return RoundResult(records, errors)


def _run_job(job: Job) -> dict[str, Any] | BaseException:
    """The task. An error that no retry mends is handed back as a value, for Dask retries what is raised."""
    try:
        return make_shard(job)
    except (FlawsmithError, OSError) as error:
        if _is_fatal(error):
            return error
        raise


def _is_fatal(error: BaseException) -> bool:
    return isinstance(error, FlawsmithError) or getattr(error, "errno", None) in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
    )


def _explain(error: BaseException, space: Workspace) -> FlawsmithError:
    if isinstance(error, FlawsmithError):
        return error
    return FlawsmithError(
        f"cannot write to the workspace {space.path('')}: {error}. Finished shards are kept: "
        "make room and run the same command again to go on"
    )
