"""One Dask task a shard: submitting, what becomes of it, and reporting how far a round is."""

from __future__ import annotations

import errno
import json
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future as Outcome
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from distributed import Client, Future, KilledWorker, WorkerPlugin

from manifests.errors import FlawsmithError
from manifests.recipes import Section
from manifests.workspace import Workspace
from workflows.config import Cluster
from workflows.console import say
from workflows.finished import finished_record
from workflows.machines import open_client
from workflows.stages import (
    KINDS,
    Job,
    Round,
    generators_of,
    load_model,
    load_round,
    make_samples,
    make_shard,
    prepare_process,
    settings_hash,
)

RETRIES = 3  # of a shard that met an I/O error
REFRESH = 10.0  # seconds after which workers are counted again
MEMORY_KILLS = "worker-restart-memory"  # Dask's name for them, in its scheduler's events
PROBE = 16  # samples that tell how long one takes

T = TypeVar("T")


class Prepare(WorkerPlugin):
    """Once a worker: fixes its threads and loads the models of the round, so that no task does. Beside
    workers with a GPU, those without load nothing that wants one."""

    name = "flawsmith-prepare"

    def __init__(self, workspace: str, number: int, settings: str, gpu_workers: bool):
        self.args = (workspace, number, settings)
        self.gpu_workers = gpu_workers

    def setup(self, worker: Any) -> None:
        prepare_process()
        round_ = load_round(*self.args)
        spared = self.gpu_workers and not worker.state.total_resources.get("GPU")
        for generator in generators_of(round_.generation):
            if not (spared and generator.gpu):
                load_model(generator.name, round_.traits[generator.name].params)


@dataclass(frozen=True)
class RoundResult:
    """Rows of the shards that are finished, and the errors of those that are not."""

    records: list[dict[str, Any]]
    errors: dict[int, str]


def make_round(
    space: Workspace,
    number: int,
    todo: list[int],
    settings: Cluster,
    progress: Callable[[dict[str, Any]], None] = lambda record: None,
    client: Client | None = None,
) -> RoundResult:
    """Makes shards of a round on Dask workers, a bounded number at a time: any plan fits the scheduler.

    Args:
        client: of the workers to use; None: one is opened.

    Raises:
        FlawsmithError: the disk is full, the scheduler is lost, or an error that no retry mends. Finished
            shards stay.
    """
    digest = settings_hash(space, number)
    round_ = load_round(space.url, number, digest)
    with nullcontext(client) if client else open_client(settings, gpus=wants_gpu(round_)) as client:
        workers = workers_of(client)
        if not workers and not settings.slurm:
            say("no worker has joined the scheduler yet; waiting for `dask worker` to do so")
        client.register_plugin(Prepare(space.url, number, digest, _offered(workers, settings) > 0))
        try:
            return _submit_all(client, space, round_, todo, digest, settings, progress)
        finally:
            if client.status == "running":
                client.unregister_worker_plugin(Prepare.name)


def wants_gpu(round_: Round) -> bool:
    return any(generator.gpu for generator in generators_of(round_.generation))


def _offered(workers: dict[str, Any], settings: Cluster) -> float:
    """GPUs that workers have (`--resources GPU=1`), or that jobs will."""
    found = sum(worker.get("resources", {}).get("GPU", 0) for worker in workers.values())
    return max(found, settings.slurm.jobs[1] if settings.slurm and settings.slurm.gpu else 0)


def _threads(workers: dict[str, Any], settings: Cluster) -> int:
    found = sum(worker["nthreads"] for worker in workers.values())
    return max(found, settings.slurm.jobs[1] * settings.slurm.cores if settings.slurm else 1)


@dataclass
class Lane:
    """Shards of a round that wait for one kind of worker."""

    gpu: bool
    waiting: Iterator[Job]
    again: deque[Job] = field(default_factory=deque)
    running: int = 0

    def next(self) -> Job | None:
        return self.again.popleft() if self.again else next(self.waiting, None)


def workers_of(client: Client) -> dict[str, dict[str, Any]]:
    """All workers that the scheduler knows, by address. It is asked itself: what ``Client.scheduler_info``
    gives is now and then overwritten before it returns, by the client's own poll, which asks for none.

    Raises:
        OSError: the scheduler does not answer.
    """
    if client.scheduler is None:
        raise OSError("the connection was closed")
    return client.sync(client.scheduler.identity, n_workers=-1)["workers"]


def _submit_all(
    client: Client,
    space: Workspace,
    round_: Round,
    todo: list[int],
    digest: str,
    settings: Cluster,
    progress: Callable[[dict[str, Any]], None],
) -> RoundResult:
    """Twice as many tasks as there are threads, and for GPUs twice as many as there are GPUs."""
    records: list[dict[str, Any]] = []
    errors: dict[int, str] = {}
    tries: dict[int, int] = {}
    running: dict[Any, tuple[Lane, Job, float]] = {}  # with the time at which each was submitted
    done: SimpleQueue[Future] = SimpleQueue()
    lanes = [
        Lane(section.gpu, _jobs_of(section, space, round_.number, todo, digest))
        for section in round_.sections
    ]
    threads, gpus, counted, joined, missed = 0, 0.0, 0.0, False, False

    def count() -> None:
        nonlocal threads, gpus, counted, joined, missed
        try:
            workers = workers_of(client)
        except OSError:  # whether it comes back, the tasks tell
            if not counted:
                raise
            return
        if joined and not workers:
            say("no worker is left; waiting for others to join")
        joined = bool(workers)
        offered = _offered(workers, settings)
        if gpus and not offered and not missed and any(lane.gpu and lane.running for lane in lanes):
            missed = True
            say("no worker with a GPU is left; the shards that want one wait for another (--resources GPU=1)")
        # The most that were offered: a GPU that is away for a moment does not send its shards to a CPU.
        threads, gpus, counted = _threads(workers, settings), max(gpus, offered), time.monotonic()

    def top_up() -> None:
        for lane in lanes:
            held = lane.gpu and gpus > 0
            while lane.running < 2 * (gpus if held else threads) and (job := lane.next()) is not None:
                future = client.submit(
                    _run_job,
                    job,
                    settings.time_limit,
                    key=f"shard-{digest[:8]}-{job.round}-{job.shard}-{time.time_ns()}",
                    resources={"GPU": 1} if held else {},
                    priority=int(lane.gpu),  # these take longest
                    pure=False,
                )
                running[future.key] = lane, job, time.time()
                lane.running += 1
                future.add_done_callback(done.put)

    def judge(error: BaseException, job: Job, submitted: float) -> Job | str:
        """What to try again, or what to say."""
        if isinstance(error, KilledWorker):
            short = _ran_short(error, submitted, client.get_events(MEMORY_KILLS))
            if short and (1 << job.halvings) < _largest_batch(round_, job):
                return replace(job, halvings=job.halvings + 1)
            return _died(error, settings, short)
        if isinstance(error, HungShard):
            return str(error)
        if _is_fatal(error):
            raise _explain(error, space) from error
        tries[job.shard] = tries.get(job.shard, 0) + 1
        return job if tries[job.shard] <= RETRIES else f"{type(error).__name__}: {error}"

    try:
        count()
        top_up()
        while running:
            try:
                future = done.get(timeout=REFRESH)
            except Empty:
                count()
                top_up()
                continue
            lane, job, submitted = running.pop(future.key)
            lane.running -= 1
            if future.status == "finished":
                record = future.result()
                record["fingerprint"] = sys.intern(record["fingerprint"])  # one text for a million shards
                records.append(record)
                progress(record)
            elif future.status == "error":
                found = judge(future.exception(), job, submitted)
                if isinstance(found, Job):
                    lane.again.append(found)
                else:
                    errors[job.shard] = found
            else:
                raise OSError("the connection was lost")
            future.release()
            if time.monotonic() - counted > REFRESH:
                count()
            top_up()
    except (OSError, TimeoutError) as error:
        raise FlawsmithError(
            f"the Dask scheduler{f' at {settings.address}' if settings.address else ''} does not answer any "
            f"more ({error}). Finished shards are kept: start it and run the same command again to go on"
        ) from error
    return RoundResult(records, errors)


def _jobs_of(section: Section, space: Workspace, number: int, todo: list[int], digest: str) -> Iterator[Job]:
    return (Job(space.url, number, shard, digest) for shard in todo if shard in section.shards)


def _ran_short(error: KilledWorker, submitted: float, kills: Iterable[tuple[float, Any]]) -> bool:
    """Whether the last worker that a task had was ended because it exceeded its memory limit.

    Args:
        submitted: when the task was; an earlier worker may have had the same address.
        kills: what the scheduler tells of :data:`MEMORY_KILLS`: (time, what), the latest.
    """
    address = error.last_worker.address
    return any(at > submitted and what["worker"] == address for at, what in kills)


def _largest_batch(round_: Round, job: Job) -> int:
    """Of the generators that the shard's recipes are made by; 1 if none takes a smaller one."""
    names = {recipe.generator for recipe in round_.plan(job.shard)}
    return max(int(json.loads(round_.traits[name].params).get("batch", 1)) for name in names)


def _died(error: KilledWorker, settings: Cluster, short: bool) -> str:
    times = error.allowed_failures + 1
    if not short:
        return f"{times} workers that made it were lost (killed, or out of memory)"
    limit = f" {settings.memory_limit}" if not (settings.address or settings.slurm) else ""
    return (
        f"{times} workers that made it needed more memory than their limit{limit} and were ended: give them "
        "more (cluster.memory_limit, cluster.slurm.memory, `dask worker --memory-limit`) or fewer to a "
        "machine, or make smaller pictures (output.max_side)"
    )


# -- on a worker ----------------------------------------------------------------------------------------


class HungShard(Exception):
    """A shard took longer than its time limit; its worker is ended, for no thread can be."""


def _run_job(job: Job, time_limit: float | None) -> dict[str, Any]:
    """The task: the record of a shard, made unless a worker that was lost since had finished it."""
    space = Workspace(job.workspace)
    if record := finished_record(space, job.round, job.shard):
        return record
    return _limited(lambda begun: make_shard(job, begun), time_limit)


def _limited(make: Callable[[Callable[[str], None]], T], time_limit: float | None) -> T:
    """What ``make`` gives, which tells of each generator as it begins.

    Raises:
        HungShard: it was not done in ``time_limit`` seconds.
    """
    made: Outcome[T] = Outcome()
    at: list[str] = []

    def work() -> None:
        try:
            made.set_result(make(at.append))
        except BaseException as error:
            made.set_exception(error)

    thread = threading.Thread(target=work, name="shard", daemon=True)
    thread.start()
    thread.join(time_limit)
    if made.done():
        return made.result()
    frame = sys._current_frames()[thread.ident or 0]
    threading.Timer(2.0, os._exit, (1,)).start()  # once this error is on its way; the nanny starts another
    what = f"generator {at[-1]}" if at else "the plan of a shard"
    raise HungShard(
        f"{what} was not done after {time_limit:g} s (in {frame.f_code.co_filename}, line "
        f"{frame.f_lineno}) and its worker was ended. If it only needs longer, raise cluster.time_limit; "
        "output.shard_size makes shards smaller"
    )


def _measure(job: Job, time_limit: float | None) -> float:
    """The task: seconds that a sample of a shard takes once models are loaded; nothing is written."""
    prepare_process()
    return _limited(lambda begun: _seconds_a_sample(job, begun), time_limit)


def _seconds_a_sample(job: Job, begun: Callable[[str], None]) -> float:
    round_ = load_round(job.workspace, job.round, job.settings)
    recipes = round_.plan(job.shard)[:PROBE]
    for name in sorted({recipe.generator for recipe in recipes}):
        begun(name)
        load_model(name, round_.traits[name].params)
    started = time.perf_counter()
    make_samples(round_, recipes, begun=begun)
    return (time.perf_counter() - started) / len(recipes)


def measure(client: Client, space: Workspace, number: int, settings: Cluster) -> dict[str, float]:
    """Seconds a sample by kind of worker, of a few samples of each section on a worker of its kind.

    Raises:
        FlawsmithError: it took longer than ``time_limit``, its workers were lost, or an error stayed.
    """
    digest = settings_hash(space, number)
    held = bool(settings.slurm and settings.slurm.gpu)
    submitted = time.time()
    found = {
        KINDS[section.gpu]: client.submit(
            _measure,
            Job(space.url, number, section.first, digest),
            settings.time_limit,
            resources={"GPU": 1} if held and section.gpu else {},
            pure=False,
        )
        for section in load_round(space.url, number, digest).sections
    }
    return {kind: _result(client, future, space, settings, submitted) for kind, future in found.items()}


def _result(client: Client, future: Future, space: Workspace, settings: Cluster, submitted: float) -> float:
    for left in reversed(range(RETRIES + 1)):
        try:
            return float(future.result())
        except KilledWorker as error:
            found = _died(error, settings, _ran_short(error, submitted, client.get_events(MEMORY_KILLS)))
        except HungShard as error:
            found = str(error)
        except Exception as error:
            if _is_fatal(error):
                raise _explain(error, space) from error
            found = f"{type(error).__name__}: {error}"
            if left:
                client.retry(future)
                continue
        break
    raise FlawsmithError(
        f"cannot measure how long a sample takes, which the size of shards follows from: {found}. "
        "Nothing was made: mend it and run the same command again"
    )


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
        f"cannot write to the workspace {space.address('')}: {error}. Finished shards are kept: "
        "make room and run the same command again to go on"
    )
