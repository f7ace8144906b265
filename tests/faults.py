"""Faults to inject, each a function: Dask servers of one's own to kill and stop, generators that misbehave on
demand, and pictures that no decoder should open."""

import contextlib
import datetime
import ipaddress
import json
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent


def wait_for(condition: Callable[[], Any], seconds: float = 60, *alive: subprocess.Popen) -> Any:
    """What ``condition`` gives once it is true. ``alive``: processes that must not end before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        for process in alive:
            assert process.poll() is None, f"{process.args} ended with {process.returncode}"
        time.sleep(0.01)
    raise AssertionError("nothing happened in time")


# -- servers --------------------------------------------------------------------------------------------


@dataclass
class Servers:
    """A scheduler and its workers, each a process of its own as a user starts them.

    Attributes:
        folder: for their files.
        environment: of every process; e.g. DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL.
        security: the flags --tls-… of every process.
        prefix: what a process is started by, e.g. ip netns exec NAME.
    """

    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    security: Sequence[str] = ()
    processes: list[subprocess.Popen] = field(default_factory=list)
    address: str = ""

    def scheduler(self, *flags: str, host: str = "127.0.0.1", prefix: Sequence[str] = ()) -> str:
        """Starts it; its address."""
        file = self.folder / f"scheduler-{len(self.processes)}.json"
        protocol = "tls" if self.security else "tcp"
        command = ["scheduler", "--host", host, "--port", "0", "--protocol", protocol, "--no-dashboard"]
        process = self._start([*command, "--scheduler-file", str(file), *flags], prefix)
        self.address = wait_for(lambda: _address(file), 60, process)
        return self.address

    def worker(self, *flags: str, prefix: Sequence[str] = ()) -> subprocess.Popen:
        """Starts one with its nanny, a thread and no limit of memory but the machine's."""
        command = ["worker", self.address, "--nthreads", "1", "--no-dashboard", "--local-directory"]
        return self._start([*command, str(self.folder), *flags], prefix)

    def _start(self, command: Sequence[str], prefix: Sequence[str]) -> subprocess.Popen:
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "dask", *command, *self.security],
            env={**os.environ, "OMP_NUM_THREADS": "1", **self.environment},
            cwd=ROOT,
            stderr=open(self.folder / f"log-{len(self.processes)}.txt", "wb"),  # noqa: SIM115
            start_new_session=True,
        )
        self.processes.append(process)
        return process


def _address(file: Path) -> str | None:
    try:
        return json.loads(file.read_text())["address"]
    except (OSError, json.JSONDecodeError):  # not there, or half written yet
        return None


@contextlib.contextmanager
def servers(folder: Path, **settings: Any) -> Iterator[Servers]:
    folder.mkdir(parents=True, exist_ok=True)
    started = Servers(folder, **settings)
    try:
        yield started
    finally:
        for process in started.processes:
            kill(process)


def kill(process: subprocess.Popen) -> None:
    """SIGKILL to a process and all of its children, at once: a machine that is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)


def working(process: subprocess.Popen) -> int | None:
    """The process id of the worker behind a nanny, None while there is none."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            if "spawn_main" in " ".join(child.cmdline()):
                return child.pid
    return None


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """SIGSTOP for a while: a machine that hangs, or swaps itself to death."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def command_line(*arguments: str | Path, environment: dict[str, str] | None = None) -> subprocess.Popen:
    """`flawsmith ARGUMENTS` as a process of its own, with what it says in ``stdout``."""
    return subprocess.Popen(
        [sys.executable, "-c", "from workflows.cli import main; main()", *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def certificates(folder: Path, name: str = "flawsmith test") -> dict[str, str]:
    """Paths of an authority's certificate (``ca``), and of a ``cert`` with its ``key`` that it signed."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)
    keys = {role: ec.generate_private_key(ec.SECP256R1()) for role in ("ca", "own")}
    names = {role: x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} {role}")]) for role in keys}
    paths = {}
    for role, file in (("ca", "ca"), ("own", "cert")):
        made = (
            x509.CertificateBuilder()
            .subject_name(names[role])
            .issuer_name(names["ca"])
            .public_key(keys[role].public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(hours=1))
            .add_extension(x509.BasicConstraints(ca=role == "ca", path_length=None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
            )
            .sign(keys["ca"], hashes.SHA256())
        )
        paths[file] = folder / f"{file}.pem"
        paths[file].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths["key"] = folder / "key.pem"
    paths["key"].write_bytes(
        keys["own"].private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return {name: str(path) for name, path in paths.items()}


def tls_flags(paths: dict[str, str]) -> list[str]:
    """For `dask scheduler` and `dask worker`."""
    return ["--tls-ca-file", paths["ca"], "--tls-cert", paths["cert"], "--tls-key", paths["key"]]


# -- generators -----------------------------------------------------------------------------------------

PACKAGE = """
import os
import time
from pathlib import Path

import numpy as np

from generation.protocol import Edit, Generator, Params

FAULT = Path(__file__).with_name("fault")  # what is wrong just now; nothing if it is not there


class Settings(Params):
    batch: int = 4
    seconds: float = 0.0  # that a sample takes


def fault():
    return FAULT.read_text() if FAULT.exists() else ""


def draw(recipe, source, rng):
    settings = recipe.settings()
    time.sleep(settings["seconds"])
    word = fault()
    while fault() == "wait":
        time.sleep(0.02)
    if word == f"hang {recipe.shard}":
        time.sleep(3600)
    if word == "memory" or word == "batch" and settings["batch"] > 2:
        hoard = []
        while True:
            hoard.append(np.ones(2**22))
            time.sleep(0.02)
    if word == "raise" and recipe.seed % 3 == 0:
        raise ZeroDivisionError("no reason")
    return rng.uniform(0, 0.2), word if recipe.seed % 3 == 0 else ""


def apply(sources, draws, model):
    edits = []
    for source, (level, word) in zip(sources, draws):
        box = (28, 36, 28, 36)
        patch = np.full_like(source.crop(box), level)
        if word == "nan":
            patch[3, 3] = np.nan
        if word == "shape":
            patch = patch[:-1]
        if word == "dtype":
            patch = (patch * 255).astype(np.uint8)
        edits.append(Edit(box, patch, np.ones((8, 8), bool)))
    return edits[:-1] if any(word == "count" for _, word in draws) else edits


def apply_on_gpu(sources, draws, model):
    return [Edit(e.box, e.patch, e.region, {"pid": os.getpid()}) for e in apply(sources, draws, model)]


FAULTY = Generator("faulty", "classic", "a dark square, or what FAULT says", draw, apply, Settings)
LAMP = Generator("lamp", "classic", "the same, made on GPUs only", draw, apply_on_gpu, Settings, gpu=True)
"""
GATES = {"area_low": 0, "area_high": 1000, "contrast_min": 0, "duplicate": 0}


@dataclass(frozen=True)
class Faulty:
    """An installed package with the generators `faulty` and `lamp`, which do as they are told."""

    folder: Path

    def say(self, fault: str) -> None:
        """From now on: wait (until something else is said), hang N (shard N for good), memory, batch (memory
        unless it is 2 or smaller), raise, nan, shape, dtype, count; "" for nothing."""
        file = self.folder / "fault"
        file.write_text(fault) if fault else file.unlink(missing_ok=True)


def write_package(folder: Path) -> Faulty:
    """Writes it. To be found by this process it goes into ``sys.path``, by others into PYTHONPATH."""
    info = folder / "faulty-1.dist-info"
    info.mkdir(parents=True)
    (folder / "faulty.py").write_text(PACKAGE)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: faulty\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[flawsmith.generators]\nfaulty = faulty:FAULTY\nlamp = faulty:LAMP\n"
    )
    return Faulty(folder)


# -- clocks ---------------------------------------------------------------------------------------------

SITE = """
import os
import time

JUMP = os.path.join(os.path.dirname(__file__), "jump")
told, told_ns = time.time, time.time_ns


def jump():
    try:
        with open(JUMP) as file:
            return int(file.read() or 0)
    except OSError:
        return 0


time.time = lambda: told() + jump()
time.time_ns = lambda: told_ns() + jump() * 10**9
"""


@dataclass(frozen=True)
class Clock:
    """``time.time`` of every Python process that is started with ``folder`` in PYTHONPATH."""

    folder: Path

    def jump(self, seconds: int) -> None:
        """From now on it is that much later than it was; 0: the true time."""
        file = self.folder / "jump"
        aside = file.with_suffix(".aside")
        aside.write_text(str(seconds))
        aside.rename(file)


def write_clock(folder: Path) -> Clock:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE)
    return Clock(folder)


# -- pictures -------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    """Half of a picture's file."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def bomb(path: Path, side: int = 60_000) -> None:
    """A PNG of a few kilobytes whose header promises gigabytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(2**20)))
        + chunk(b"IEND", b"")
    )
