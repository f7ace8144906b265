"""Where shards are made: this machine's processes, a running scheduler, or SLURM jobs; a client of each."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import dask
from distributed import Client, Nanny, Scheduler, Security, SpecCluster

from manifests.errors import FlawsmithError, UsageError
from workflows.config import Cluster, Slurm

# What worker processes are told before they start.
ENVIRONMENT = {
    "OMP_NUM_THREADS": 1,
    "OPENBLAS_NUM_THREADS": 1,
    "MKL_NUM_THREADS": 1,
    # Dask has the C library give freed memory back at once; pictures then come from fresh pages, array
    # by array, which takes a third of a worker's time. These bounds keep up to 256 MB a worker instead.
    "MALLOC_TRIM_THRESHOLD_": 256 * 2**20,
    "MALLOC_MMAP_THRESHOLD_": 32 * 2**20,
}
LOCAL = {
    "distributed.nanny.pre-spawn-environ": ENVIRONMENT,
    # Dask looks after itself every few milliseconds, which here would cost more than all its scheduling.
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "2s",
    # Its logs of the last thousand events grow by 10 MB before they are full; only the latest are read.
    "distributed.admin.low-level-log-length": 100,
    "distributed.worker.memory.monitor-interval": "500ms",
    # Errors come back with the shard's result; a worker's own traceback tells a user nothing more.
    "distributed.logging.distributed": "critical",
}


@contextmanager
def open_client(settings: Cluster, *, gpus: bool = False) -> Iterator[Client]:
    """A client of the configured scheduler, of SLURM jobs, or of this machine.

    Args:
        gpus: whether any generator wants one; this machine's get a worker each then.

    Raises:
        FlawsmithError: no scheduler answers, or there is no SLURM here.
    """
    if settings.address:
        with _running(settings) as client:
            yield client
        return
    with dask.config.set(LOCAL), ExitStack() as opened:
        cluster = opened.enter_context(_jobs(settings.slurm) if settings.slurm else _local(settings, gpus))
        client = opened.enter_context(Client(cluster))
        try:
            yield client
        finally:
            # On a heavily loaded machine a worker may still be there nine seconds after it was told to end;
            # it was killed meanwhile, and what it was there for is done.
            with suppress(TimeoutError):
                opened.close()


def _running(settings: Cluster) -> Client:
    tls = settings.tls
    try:
        security = tls and Security(
            tls_ca_file=tls.ca, tls_client_cert=tls.cert, tls_client_key=tls.key, require_encryption=True
        )
        return Client(settings.address, timeout="10s", security=security)
    except (OSError, TimeoutError, ValueError) as error:
        raise FlawsmithError(
            f"no Dask scheduler answers at {settings.address}: {error}; start one with `dask scheduler` "
            "and `dask worker`"
            + (", check that cluster.tls names its certificates" if tls else "")
            + ", or leave --scheduler out to use this machine"
        ) from error


def _local(settings: Cluster, gpus: bool) -> SpecCluster:
    """Workers of one thread a core, and beside them one a GPU, which the others do not see."""
    devices = _devices() if gpus else []
    common = {
        "host": "127.0.0.1",
        "memory_limit": settings.memory_limit,
        "dashboard": False,
        "silence_logs": logging.CRITICAL,
    }
    options = common | {"nthreads": settings.threads}
    if devices:
        options["env"] = {"CUDA_VISIBLE_DEVICES": ""}
    count = settings.workers or os.cpu_count() or 1
    workers: dict[Any, dict[str, Any]] = {n: {"cls": Nanny, "options": options} for n in range(count)}
    for device, spec in _gpu_workers(devices).items():
        workers[f"gpu-{device}"] = {
            "cls": spec["cls"],
            "options": {**spec["options"], **common, "nthreads": 1, "resources": {"GPU": 1}},
        }
    scheduler = {"host": "127.0.0.1", "port": 0, "dashboard_address": "127.0.0.1:0"}
    return SpecCluster(
        workers, {"cls": Scheduler, "options": scheduler}, silence_logs=logging.CRITICAL, name="flawsmith"
    )


def _devices() -> list[str]:
    """This machine's GPUs, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return named or [str(index) for index in range(torch.cuda.device_count())]


def _gpu_workers(devices: list[str]) -> dict[Any, dict[str, Any]]:
    """A worker a GPU; by dask-cuda, which keeps it on the cores beside its GPU, where that is installed."""
    try:
        from dask_cuda.worker_spec import worker_spec
    except ImportError:
        return {d: {"cls": Nanny, "options": {"env": {"CUDA_VISIBLE_DEVICES": d}}} for d in devices}
    return worker_spec(CUDA_VISIBLE_DEVICES=devices) if devices else {}


def _jobs(settings: Slurm) -> Any:
    """SLURM jobs; those that end are submitted again while there is work."""
    if shutil.which("sbatch") is None:
        raise FlawsmithError(
            "cluster.slurm: there is no sbatch on this machine; run on a login node of the cluster "
            "(--dry-run prints the job script anywhere)"
        )
    cluster = _jobqueue().SLURMCluster(
        **_job_options(settings),
        scheduler_options={"dashboard_address": ":0"},
        silence_logs=logging.CRITICAL,
    )
    fewest, most = settings.jobs
    cluster.adapt(minimum_jobs=fewest, maximum_jobs=most)
    return cluster


def job_script(settings: Slurm) -> str:
    """What `sbatch` is given for each job, but for the scheduler's address; nothing is submitted."""
    job = _jobqueue().slurm.SLURMJob("tcp://SCHEDULER:PORT", name="flawsmith", **_job_options(settings))
    return job.job_script()


def lifetime(settings: Slurm) -> tuple[int, int]:
    """Seconds after which a job's workers leave, give or take how many.

    They count from a worker's own start. A tenth of the walltime (one minute at least, ten at most) is left
    for what comes before, the prologue and the start, and for leaving.
    """
    margin = min(max(settings.seconds // 10, 60), 600)
    return settings.seconds - margin * 3 // 2, margin // 2


def _job_options(settings: Slurm) -> dict[str, Any]:
    life, stagger = lifetime(settings)
    arguments = ["--lifetime", f"{life}s", "--lifetime-stagger", f"{stagger}s", "--no-dashboard"]
    return {
        "cores": settings.cores,
        "processes": 1 if settings.gpu else settings.cores,
        "memory": settings.memory,
        "walltime": settings.walltime,
        "queue": settings.queue,
        "account": settings.account,
        "interface": settings.interface,
        "job_name": "flawsmith",
        "job_extra_directives": [*(["--gres=gpu:1"] if settings.gpu else []), *settings.directives],
        "job_script_prologue": [
            *(f"export {name}={value}" for name, value in ENVIRONMENT.items()),
            *settings.prologue,
        ],
        "worker_extra_args": [*arguments, *(["--resources", "GPU=1"] if settings.gpu else [])],
    }


def _jobqueue() -> Any:
    try:
        import dask_jobqueue
    except ImportError:
        raise UsageError("cluster.slurm needs dask-jobqueue: pip install 'flawsmith[slurm]'") from None
    return dask_jobqueue
