"""Where shards are made: what a configuration may say, SLURM's job script and jobs, GPUs, Kubernetes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import dask
import pytest
import yaml
from distributed import KilledWorker, Nanny
from distributed.nanny import WorkerProcess

from manifests.errors import UsageError
from manifests.workspace import Workspace
from tests import faults
from tests.test_cli import flawsmith
from tests.test_pipeline import contents, draw_pictures, make
from workflows import machines, rounds, stages
from workflows.cluster import _ran_short, workers_of
from workflows.config import Cluster, Config, at_scheduler, parse_config
from workflows.machines import job_script, lifetime, open_client
from workflows.stages import load_round, settings_hash, without_device

ROOT = Path(__file__).parent.parent
JOBS = {"cores": 2, "memory": "4GB", "walltime": "0:05:00"}


def cluster(**settings: Any) -> Cluster:
    return parse_config({"source": "x", "cluster": settings}, name="test").cluster


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return draw_pictures(tmp_path_factory.mktemp("source") / "disc")


def config(pictures: Path, **settings: Any) -> Config:
    raw = {
        "source": str(pictures),
        "samples": 24,
        "generation": {"generators": {"cutpaste": {}, "scar": {}}},
        "output": {"shard_size": 6},
        "cluster": settings,
    }
    return parse_config(raw, name="test")


# -- what a configuration may say -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"address": "tcp://h:1", "slurm": JOBS}, "address and slurm exclude each other"),
        ({"address": "tls://h:1"}, r"tls: \{ca"),
        ({"tls": {"ca": "a", "cert": "b", "key": "c"}}, "tls needs an address that begins with tls://"),
        ({"slurm": {**JOBS, "walltime": "soon"}}, r"slurm.walltime: .*H:MM:SS.*'soon'"),
        ({"slurm": {**JOBS, "walltime": "0:04:59"}}, "slurm.walltime: .*5 minutes"),
        ({"slurm": {**JOBS, "jobs": [3, 2]}}, r"slurm.jobs.*write \[2, 3\]"),
        ({"slurm": {**JOBS, "core": 2}}, "slurm.core: no such setting; did you mean 'cores'"),
        ({"slurm": {"cores": 2, "walltime": "1:00:00"}}, "slurm.memory: is missing"),
        ({"worker": 2}, "did you mean 'workers'"),
        ({"time_limit": 0}, "time_limit: .*greater than 0"),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(settings, message):
    with pytest.raises(UsageError, match=message):
        cluster(**settings)


def test_a_walltime_means_the_same_quoted_or_not():
    for written in ("02:30:00", "'02:30:00'", "'0-02:30:00'", "'150:00'"):
        slurm = cluster(slurm={**JOBS, "walltime": yaml.safe_load(written)}).slurm
        assert slurm is not None and slurm.seconds == 9000, written


def test_a_scheduler_of_the_command_line_takes_the_place_of_jobs_and_needs_its_certificates():
    assert at_scheduler(cluster(slurm=JOBS), "tcp://h:1").slurm is None
    with pytest.raises(UsageError, match=r"--scheduler tls://h:1: .*cert"):
        at_scheduler(cluster(slurm=JOBS), "tls://h:1")


# -- SLURM ----------------------------------------------------------------------------------------------


def test_the_job_script_says_what_the_configuration_does():
    settings = cluster(
        slurm={
            "cores": 8,
            "memory": "32GB",
            "walltime": "2:00:00",
            "queue": "gpu",
            "account": "lab",
            "gpu": True,
            "directives": ["--qos=long"],
            "prologue": ["module load cuda"],
        }
    ).slurm
    assert settings is not None
    script = job_script(settings)
    lines = script.splitlines()
    for line in (
        "-p gpu",
        "-A lab",
        "--cpus-per-task=8",
        "--mem=30G",
        "-t 2:00:00",
        "--gres=gpu:1",
        "--qos=long",
    ):
        assert f"#SBATCH {line}" in lines, line
    command = lines[-1].split() if lines[-1] else lines[-2].split()
    assert command[0] == sys.executable
    for flags in ("--nthreads 8", "--resources GPU=1", "--lifetime 6300s", "--lifetime-stagger 300s"):
        assert flags in script
    assert lines.index("module load cuda") < lines.index(" ".join(command))
    assert "export OMP_NUM_THREADS=1" in lines
    life, stagger = lifetime(settings)
    assert life + stagger <= settings.seconds - 60


def test_jobs_without_a_gpu_hold_single_threaded_workers():
    settings = cluster(slurm={**JOBS, "cores": 6}).slurm
    assert settings is not None
    assert "--nthreads 1" in job_script(settings) and "--nworkers 6" in job_script(settings)
    assert "GPU" not in job_script(settings)


def test_a_dry_run_prints_the_script_where_there_is_no_slurm(pictures, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"source": str(pictures), "samples": 40, "cluster": {"slurm": JOBS}}))
    done = flawsmith("run", file, "-w", tmp_path / "ws", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --cpus-per-task=2" in done.stdout and "tcp://SCHEDULER:PORT" in done.stdout
    assert not (tmp_path / "ws").exists()
    done = flawsmith("generate", file, "-w", tmp_path / "ws")
    assert done.returncode == 1 and "no sbatch on this machine" in done.stderr


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Path:
    """`sbatch` and `scancel` that run a job on this machine at once; the folder of submitted scripts."""
    folder, scripts = tmp_path / "bin", tmp_path / "submitted"
    folder.mkdir()
    scripts.mkdir()
    (folder / "sbatch").write_text(
        f'#!/bin/sh\nscript=$(mktemp {scripts}/XXXXXX)\ncp "$1" $script\n'
        'setsid sh $script > $script.log 2>&1 &\necho "Submitted batch job $!"\n'
    )
    (folder / "scancel").write_text('#!/bin/sh\nkill -- "-$1"\n')
    for file in folder.iterdir():
        file.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return scripts


@pytest.mark.fault
def test_jobs_make_the_same_bytes(pictures, tmp_path, sbatch):
    jobs = {"slurm": {**JOBS, "cores": 1, "interface": "lo"}}
    space = make(config(pictures, **jobs), tmp_path / "jobs")
    assert len(list(sbatch.glob("*.log"))) == 1
    assert space.read_yaml("rounds/000/settings.yaml")["shard_sizes"] == {"cpu": 6}
    assert contents(space) == contents(make(config(pictures, workers=1), tmp_path / "here"))


def test_shards_are_small_enough_for_the_walltime_and_stay_so(pictures, tmp_path, monkeypatch):
    """10 s a sample, of 210 s that a worker has: two samples take a tenth of it."""
    monkeypatch.setattr(rounds, "measure", lambda *_: {"cpu": 10.0})
    slow = config(pictures, slurm=JOBS)
    space = Workspace(str(tmp_path / "ws"))
    number = rounds.begin(slow, space, new_round=False)
    assert rounds._is_untouched(space, number)
    rounds._fit_walltime(space, number, slow.cluster, client=None)  # type: ignore[arg-type]
    assert not rounds._is_untouched(space, number)
    round_ = rounds.open_round(space, number)
    assert [len(round_.plan(shard)) for shard in range(round_.shard_count)] == [2] * 12

    make(config(pictures, workers=2), tmp_path / "ws")  # goes on here, with the shards as they were planned
    assert len(space.names("rounds/000/shards")) == 12
    assert rounds._seconds(space, 0)["cpu"] > 0


def test_seconds_of_the_last_round_count_only_where_samples_cost_the_same(pictures, tmp_path, monkeypatch):
    slow = config(pictures, slurm=JOBS)
    space = Workspace(str(tmp_path / "ws"))
    rounds.begin(slow, space, new_round=False)
    monkeypatch.setattr(rounds, "measure", lambda *_: {"cpu": 10.0})
    monkeypatch.setattr(rounds, "open_round", lambda *_: load_round(space.url, 0, settings_hash(space, 0)))
    first = space.read_yaml("rounds/000/settings.yaml")
    rarer = {**first["generation"], "area": [0.01, 0.02]}
    for changes, found, size in (
        ({}, {"cpu": 5.0}, 4),
        ({"critic": {"name": "onenip"}}, {"cpu": 5.0}, 2),
        ({"generation": rarer}, {"cpu": 5.0}, 2),
        ({}, {"gpu": 5.0}, 2),
    ):
        monkeypatch.setattr(rounds, "_seconds", lambda *_, found=found: found)
        space.write_yaml("rounds/001/settings.yaml", {**first, "round": 1, **changes})
        monkeypatch.setattr(
            rounds, "open_round", lambda *_: load_round(space.url, 0, settings_hash(space, 0))
        )
        rounds._fit_walltime(space, 1, slow.cluster, client=None)  # type: ignore[arg-type]
        assert space.read_yaml("rounds/001/settings.yaml")["shard_sizes"] == {"cpu": size}, changes


# -- what became of a shard -----------------------------------------------------------------------------


def test_every_shard_that_a_worker_took_with_it_for_lack_of_memory_is_told_so():
    """Two in one worker's hands; another worker's, and one that had its address before, tell nothing."""
    lost = [KilledWorker(f"shard-{n}", SimpleNamespace(address="tcp://h:1"), 3) for n in (1, 2)]  # type: ignore[arg-type]
    kills = [(5.0, {"worker": "tcp://h:2"}), (6.0, {"worker": "tcp://h:1"})]
    assert [_ran_short(error, 5.5, kills) for error in lost] == [True, True]
    assert not _ran_short(lost[0], 6.5, kills)
    assert not _ran_short(lost[0], 4.0, kills[:1])


def test_the_device_is_that_of_the_shard_and_no_other_version(pictures, tmp_path, monkeypatch):
    space = Workspace(str(tmp_path / "ws"))
    rounds.begin(config(pictures), space, new_round=False)
    round_ = rounds.open_round(space, 0)
    here = round_.fingerprint()
    monkeypatch.setattr(stages, "device_of", lambda generator: "cuda")
    monkeypatch.setattr(stages, "_gpu_name", lambda: "a GPU")
    there = round_.fingerprint(["scar"])
    assert json.loads(here)["device"] == "cpu" and json.loads(there)["device"] == "a GPU"
    assert without_device(here) == without_device(there)


# -- GPUs of this machine -------------------------------------------------------------------------------


@pytest.mark.parametrize("dask_cuda", [False, True])
def test_each_gpu_has_a_worker_of_its_own_and_the_others_see_none(monkeypatch, capfd, dask_cuda):
    """GPUs need not exist for it: what matters is what each process is told."""
    monkeypatch.setattr(machines, "_devices", lambda: ["4", "5"])
    package = ModuleType("dask_cuda.worker_spec")

    def worker_spec(CUDA_VISIBLE_DEVICES):  # as dask-cuda 26.10 writes it
        rotated = {int(d): CUDA_VISIBLE_DEVICES[i:] + CUDA_VISIBLE_DEVICES[:i] for i, d in enumerate("45")}
        return {
            d: {"cls": Nanny, "options": {"env": {"CUDA_VISIBLE_DEVICES": ",".join(order)}, "nthreads": 1}}
            for d, order in rotated.items()
        }

    package.worker_spec = worker_spec  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dask_cuda", ModuleType("dask_cuda") if dask_cuda else None)
    monkeypatch.setitem(sys.modules, "dask_cuda.worker_spec", package if dask_cuda else None)
    with open_client(Cluster(workers=1), gpus=True) as client:
        workers = workers_of(client)
        told = client.run(os.getenv, "CUDA_VISIBLE_DEVICES")
    found = {told[address]: worker["resources"].get("GPU", 0) for address, worker in workers.items()}
    assert capfd.readouterr().err == ""  # what Dask has to say to itself
    assert found == ({"": 0, "4,5": 1, "5,4": 1} if dask_cuda else {"": 0, "4": 1, "5": 1})


# -- hosts ----------------------------------------------------------------------------------------------


@pytest.fixture
def two_hosts(tmp_path) -> Iterator[list[str]]:
    """Names of two network namespaces that reach this one, at 10.87.1.1 and 10.87.2.1, and nothing else."""
    names = [f"flaw{os.getpid() % 10000}{letter}" for letter in "ab"]
    try:
        for at, name in enumerate(names, 1):
            for command in (
                f"ip netns add {name}",
                f"ip link add {name} type veth peer name eth0 netns {name}",
                f"ip addr add 10.87.{at}.1/24 dev {name}",
                f"ip link set {name} up",
                f"ip -n {name} addr add 10.87.{at}.2/24 dev eth0",
                f"ip -n {name} link set eth0 up",
                f"ip -n {name} link set lo up",
                f"ip -n {name} route add default via 10.87.{at}.1",
            ):
                done = subprocess.run(command.split(), capture_output=True, text=True)
                if done.returncode:
                    pytest.skip(f"needs the right to make network namespaces: {done.stderr.strip()}")
        yield names
    except FileNotFoundError:
        pytest.skip("needs the command ip")
    finally:
        for name in names:
            subprocess.run(["ip", "link", "del", name], capture_output=True)
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.fault
def test_workers_of_two_hosts_make_the_same_bytes(pictures, tmp_path, two_hosts):
    with faults.servers(tmp_path / "dask") as dask_servers:
        address = dask_servers.scheduler(host="0.0.0.0")
        port = address.rsplit(":", 1)[1]
        for at, name in enumerate(two_hosts, 1):
            dask_servers.address = f"tcp://10.87.{at}.1:{port}"
            dask_servers.worker(prefix=["ip", "netns", "exec", name])
        settings = config(pictures, address=f"tcp://127.0.0.1:{port}")
        with open_client(settings.cluster) as client:
            client.wait_for_workers(2, timeout=60)
            workers = workers_of(client).values()
            assert {worker["host"] for worker in workers} == {"10.87.1.2", "10.87.2.2"}
        space = make(settings, tmp_path / "hosts")
    assert contents(space) == contents(make(config(pictures, workers=1), tmp_path / "here"))


# -- Kubernetes -----------------------------------------------------------------------------------------


def test_the_kubernetes_manifest_holds_together():
    text = (ROOT / "deploy/kubernetes.yaml").read_text()
    documents = list(yaml.safe_load_all(text))
    assert "--labels app=flawsmith" in text  # those that the NetworkPolicy lets in
    by_name = {(d["kind"], d["metadata"]["name"]): d for d in documents}
    assert len(by_name) == len(documents)
    service = by_name["Service", "flawsmith-scheduler"]["spec"]
    claims = {name for kind, name in by_name if kind == "PersistentVolumeClaim"}
    deployments = {name: d["spec"] for (kind, name), d in by_name.items() if kind == "Deployment"}
    commands = {}
    for name, spec in deployments.items():
        labels, pod = spec["template"]["metadata"]["labels"], spec["template"]["spec"]
        assert spec["selector"]["matchLabels"] == labels
        (container,) = pod["containers"]
        assert container["image"] == "flawsmith:0.1.0"
        assert container["resources"]["limits"]["memory"]
        volumes = {
            volume["name"]: volume["persistentVolumeClaim"]["claimName"] for volume in pod.get("volumes", [])
        }
        assert set(volumes.values()) <= claims
        assert {mount["name"] for mount in container.get("volumeMounts", [])} == set(volumes)
        commands[name] = container["command"]
        if labels.items() >= service["selector"].items():
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            assert ports[service["ports"][0]["targetPort"]] == service["ports"][0]["port"]
            assert str(service["ports"][0]["port"]) in container["command"]
    gpu = deployments["flawsmith-gpu-worker"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert ("GPU=1" in commands["flawsmith-gpu-worker"]) and gpu["nvidia.com/gpu"] == 1
    assert "GPU=1" not in commands["flawsmith-worker"]
    for name, command in commands.items():
        assert command[0] == "dask"
        known = subprocess.run([sys.executable, "-m", *command[:2], "--help"], capture_output=True, text=True)
        for flag in [word for word in command if word.startswith("--")]:
            assert flag in known.stdout, f"{name}: dask {command[1]} has no {flag}"
        if command[1] == "worker":
            assert deployments[name]["template"]["spec"]["securityContext"]["fsGroup"] == 1000
            assert command[2] == f"tcp://flawsmith-scheduler:{service['ports'][0]['port']}"


def test_the_image_sets_what_a_local_cluster_sets():
    recipe = (ROOT / "deploy/Dockerfile").read_text()
    for name, value in machines.ENVIRONMENT.items():
        assert f"{name}={value}" in recipe
    assert "USER flawsmith" in recipe and "--uid 1000" in recipe


def test_a_worker_that_ends_late_is_no_error_of_the_work(monkeypatch):
    """On a heavily loaded machine Dask's nanny gives up waiting for a worker that it has killed; an error of
    the work itself still comes out."""
    kill = WorkerProcess.kill

    async def late(self, *given, **named):
        await kill(self, *given, **named)
        raise TimeoutError

    monkeypatch.setattr(WorkerProcess, "kill", late)
    with open_client(Cluster(workers=1)) as client:
        assert client.submit(pow, 2, 5).result() == 32
    with pytest.raises(ZeroDivisionError), open_client(Cluster(workers=1)) as client:
        client.submit(divmod, 2, 0).result()


def test_workers_are_counted_while_the_client_asks_for_none():
    """Its own poll, every two seconds, asks how the scheduler is without its workers."""
    with (
        dask.config.set({"distributed.client.scheduler-info-interval": "1ms"}),
        open_client(Cluster(workers=1)) as client,
    ):
        client.wait_for_workers(1, timeout=60)
        assert [len(workers_of(client)) for _ in range(300)] == [1] * 300
