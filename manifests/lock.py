"""One writer a workspace.

A folder of this machine has the kernel's lock (``flock``), which ends with its process. Object stores, and
network folders besides, have a small object, ``lock.json``, that says who writes. Its holder renews it; one
that was not renewed for as long as it says is stale, and the next writer takes it over. Age is told by the
store's own times alone: no clock of the machines that share it counts.

Where the store knows conditional writes (S3: ``If-None-Match`` and ``If-Match``; GCS: ``ifGenerationMatch``),
of two writers at the same instant exactly one gets the lock. Elsewhere the lock is read again after a pause,
which tells all but two that interrupt each other within it; the loser learns of it when it renews.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec

from manifests.errors import ReadOnlyError, WorkspaceError
from manifests.storage import ShortRead, is_local, no_bucket, open_system, put, steady

LOCK, CLOCK = "lock.json", "lock.clock"
LEASE = 60.0  # seconds that a lock counts without renewal
RENEWALS = 4  # in that time
SETTLE = 0.2  # seconds before a lock is read again where writes have no conditions
NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "ceph",
    "lustre",
    "gpfs",
    "beegfs",
    "glusterfs",
    "afs",
    "9p",
}


# -- folders --------------------------------------------------------------------------------------------


@contextmanager
def folder_lock(root: Path) -> Iterator[None]:
    """Holds the kernel's lock of a folder, which is made if need be.

    Raises:
        WorkspaceError: another process holds it, or nothing can be written there (``ReadOnlyError`` if that
            is not allowed).
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = open(root / ".lock", "a+")  # noqa: SIM115 - held for the whole run
    except OSError as error:
        kind = ReadOnlyError if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) else WorkspaceError
        raise kind(
            f"cannot write to the workspace {root}: {error.strerror}; make it writable or name another folder"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise WorkspaceError(
                f"the workspace {root} is in use by process {lock.read().strip() or '?'}; "
                "wait for it to end or choose another workspace"
            ) from None
        except OSError as error:
            if not is_network(root):
                raise WorkspaceError(f"{root} cannot be locked: {error.strerror}") from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def is_network(folder: Path) -> bool:
    """Whether a folder lies on a file system that other machines may write to, where ``flock`` need not reach
    them. User-space file systems count as such."""
    kinds = {}
    for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
        mount, _, rest = line.partition(" - ")
        kinds[mount.split()[4].replace("\\040", " ")] = rest.split()[0]
    resolved = folder.resolve()
    nearest = next(str(path) for path in (resolved, *resolved.parents) if str(path) in kinds)
    return kinds[nearest] in NETWORK or kinds[nearest].startswith("fuse")


# -- leases ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A lock as it was read.

    Attributes:
        holder: what it says; empty if it cannot be read.
        data: its bytes.
        version: the store's name for exactly these bytes, None where it has none.
        modified: by the store's clock.
    """

    holder: dict[str, Any]
    data: bytes
    version: str | None
    modified: datetime

    @property
    def lease(self) -> float:
        """Seconds that the lock counts; those of ours where it says none that make sense."""
        told = self.holder.get("lease")
        return float(told) if isinstance(told, int | float) and told <= 3600 else LEASE


class Lease:
    """A held lock that a thread renews. Once it is lost, nothing more is written through it."""

    def __init__(self, root: str) -> None:
        self.root = root.rstrip("/")
        self.fs, path = open_system(self.root)
        self.path, self._clock = f"{path}/{LOCK}", f"{path}/{CLOCK}"
        self.url = f"{self.root}/{LOCK}"
        self._me = {
            **_process(), "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "token": uuid.uuid4().hex, "lease": LEASE,
        }  # fmt: skip
        self._beat = 0
        self._renewed = _now()
        self._lost: WorkspaceError | None = None
        self._guard = threading.RLock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="flawsmith-lock", daemon=True)
        self._main = threading.current_thread() is threading.main_thread()

    def acquire(self) -> None:
        """Raises:
        WorkspaceError: another writer holds the lock, or was as quick.
        """
        seen = self._read()
        if seen is not None and not self._is_stale(seen):
            raise self._in_use(seen)
        if not self._write(seen):
            raise self._in_use(self._read())
        if not _has_conditions(self.fs):
            time.sleep(SETTLE)
        now = self._read()
        if now is None or now.holder.get("token") != self._me["token"]:
            raise self._in_use(now)
        self._thread.start()

    def check(self) -> None:
        """Asked before every write: is the lock still held?

        Raises:
            WorkspaceError: it was lost.
        """
        with self._guard:
            if self._lost is None and _now() - self._renewed > LEASE / 2:
                self._renew()  # this process stood still, and so did its thread
            if self._lost is not None:
                raise self._lost

    def release(self) -> None:
        with self._guard:
            self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._lost is None:
            with suppress(Exception):  # what remains of a lock grows stale by itself
                if (seen := self._read()) and seen.holder.get("token") == self._me["token"]:
                    self.fs.rm_file(self.path)
                self.fs.rm_file(self._clock)

    @property
    def lost(self) -> WorkspaceError | None:
        return self._lost

    # -- the lock's object --

    def _read(self) -> Seen | None:
        return steady(self.url, lambda: _read(self.fs, self.path))

    def _write(self, seen: Seen | None) -> bool:
        """Whether the lock, unchanged since it was ``seen``, is now this process's."""
        self._beat += 1
        data = json.dumps({**self._me, "beat": self._beat}, indent=1).encode()
        asked = _now()
        written = steady(self.url, lambda: _write_if(self.fs, self.path, self.url, data, seen))
        if not written:  # by another writer, or by an earlier try of this very write whose answer was lost?
            now = self._read()
            written = now is not None and now.data == data
        if written:
            self._renewed = asked
        return written

    def _is_stale(self, seen: Seen) -> bool:
        return _is_gone(seen.holder) or self._age(seen) > seen.lease

    def _age(self, seen: Seen) -> float:
        """Seconds since a lock was renewed, by the store's clock."""
        put(self.fs, self._clock, f"{self.root}/{CLOCK}", uuid.uuid4().hex.encode())
        now = steady(self.url, lambda: _modified(self.fs, self._clock, self.fs.info(self._clock)))
        return (now - seen.modified).total_seconds()

    def _in_use(self, seen: Seen | None) -> WorkspaceError:
        holder = seen.holder if seen else {}
        renewed = ""
        if seen is not None:
            lease, age = seen.lease, self._age(seen)
            renewed = (
                f" Its lock, {self.url}, was renewed {age:.0f} s ago; if that process is dead, the same "
                f"command takes the lock over in {max(0.0, lease - age) + 1:.0f} s"
            )
        return WorkspaceError(
            f"the workspace {self.root} is in use by {_told(holder)}; wait for it to end or choose another "
            f"workspace.{renewed}"
        )

    # -- the thread --

    def _keep(self) -> None:
        while not self._ended.wait(LEASE / RENEWALS):
            with suppress(Exception):  # a store that does not answer: the next beat tries again
                self._renew()
            with self._guard:
                if self._lost is not None:
                    if self._main and not self._ended.is_set():
                        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return

    def _renew(self) -> None:
        with self._guard:
            seen = self._read()
            if seen is not None and seen.holder.get("token") == self._me["token"] and self._write(seen):
                return
            seen = self._read()
            self._lost = WorkspaceError(
                f"the lock of the workspace {self.root} was lost to {_told(seen.holder if seen else {})}: "
                f"this process did not renew it in {LEASE:.0f} s. It stopped, so that there is one writer; "
                "what was finished is kept"
            )


@contextmanager
def lease(root: str) -> Iterator[Lease]:
    """Holds the lock object of a workspace. Where it is lost, the main thread is interrupted.

    Raises:
        WorkspaceError: another writer holds it, or took it over meanwhile.
    """
    held = Lease(root)
    held.acquire()
    try:
        try:
            with _interruptible():
                yield held
        finally:
            held.release()
    except KeyboardInterrupt:
        if held.lost is not None:
            raise held.lost from None
        raise


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT is Python's ``KeyboardInterrupt``: a shell starts what it puts into the background (`run … &`)
    with it ignored, and libraries leave handlers of their own behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


def _read(fs: fsspec.AbstractFileSystem, path: str) -> Seen | None:
    try:
        data = fs.cat_file(path)
        info = fs.info(path)  # only now, so that version and time are never older than the bytes
        modified = _modified(fs, path, info)
    except FileNotFoundError:
        return None
    if info["size"] != len(data):  # cut short, or renewed just now
        raise ShortRead(f"{len(data)} bytes came of {info['size']}")
    version = {"s3": info.get("ETag"), "gcs": info.get("generation")}.get(_store(fs))
    try:
        holder = json.loads(data)
    except ValueError:
        holder = None
    return Seen(holder if isinstance(holder, dict) else {}, data, version, modified)


def _store(fs: fsspec.AbstractFileSystem) -> str:
    protocols = {fs.protocol} if isinstance(fs.protocol, str) else set(fs.protocol)
    return "s3" if "s3" in protocols else "gcs" if "gs" in protocols else "other"


def _has_conditions(fs: fsspec.AbstractFileSystem) -> bool:
    return _store(fs) != "other"


def _modified(fs: fsspec.AbstractFileSystem, path: str, info: dict[str, Any]) -> datetime:
    when = info.get("LastModified") or info.get("mtime")  # of S3, of GCS; of a folder, a number
    when = when if isinstance(when, datetime) else fs.modified(path)
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def _write_if(fs: fsspec.AbstractFileSystem, path: str, url: str, data: bytes, seen: Seen | None) -> bool:
    """Puts a lock if it is as ``seen`` (None: if there is none); whether it did."""
    try:
        if _store(fs) == "s3":
            condition = {"mode": "create"} if seen is None else {"IfMatch": seen.version}
            fs.pipe_file(path, data, **condition)
        elif _store(fs) == "gcs":
            bucket, key, _ = fs.split_path(path)
            fs.call(
                "POST", f"{fs._location}/upload/storage/v1/b/{quote(bucket)}/o", data=data, name=key,
                uploadType="media", ifGenerationMatch=seen.version if seen else "0",
            )  # fmt: skip
        else:
            now = _read(fs, path)
            if (now and now.data) != (seen and seen.data):
                return False
            _plain_write(fs, path, data)
    except FileExistsError:
        return False
    except FileNotFoundError as error:
        raise no_bucket(url) from error
    except OSError as error:
        if _code(error) in ("PreconditionFailed", "412"):
            return False
        raise
    return True


def _plain_write(fs: fsspec.AbstractFileSystem, path: str, data: bytes) -> None:
    if not is_local(fs):
        fs.pipe_file(path, data)
        return
    aside = f"{path}.{uuid.uuid4().hex}.part"
    Path(aside).write_bytes(data)
    os.replace(aside, path)


def _code(error: BaseException) -> str:
    """Of the S3 error behind an ``OSError``."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


# -- processes ------------------------------------------------------------------------------------------


def _now() -> float:
    """Seconds that no clock setting moves and that go on while the machine sleeps."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _process() -> dict[str, Any]:
    """Who this is, for people and for other processes of this machine."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "born": _born(os.getpid()),
        "machine": _machine(),
    }


def _machine() -> str:
    """This boot of this machine, as far as it sees the same processes (containers do not)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def _born(pid: int) -> str | None:
    """When a process began, in clock ticks since boot; None if there is none (any more)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else fields[19]


def _is_gone(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that has ended. Of another one nothing is known."""
    pid = holder.get("pid")
    return holder.get("machine") == _machine() and isinstance(pid, int) and _born(pid) != holder.get("born")


def _told(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} (since {holder.get('started')})"
