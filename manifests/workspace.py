"""One folder or object-store prefix that holds everything a run makes.

Nothing is ever visible half written: a file is written aside, flushed to the disk and renamed (local), or
put as one object (object stores). What a killed writer leaves behind ends in ``.part`` and is swept when the
next writer takes the lock.
"""

from __future__ import annotations

import fcntl
import io
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from fsspec.implementations.local import LocalFileSystem

from manifests.errors import FlawsmithError
from manifests.plain import from_yaml
from manifests.schema import as_declared, declared

ASIDE = ".part"
_ORPHAN = re.compile(rf"\.[0-9a-f]{{32}}{re.escape(ASIDE)}$")


class WorkspaceError(FlawsmithError):
    """The workspace lacks something, is in use, or holds what it should not."""


@dataclass(frozen=True)
class Workspace:
    """``url`` is a folder or an fsspec URL; paths below it are given relative, with forward slashes."""

    url: str

    @cached_property
    def _fs_root(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return fsspec.core.url_to_fs(self.url)

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return self._fs_root[0]

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    def path(self, name: str) -> str:
        """The full path of ``name`` on its file system. Names that leave the workspace are refused."""
        if name.startswith("/") or ".." in name.split("/"):
            raise WorkspaceError(f"{name!r} is not a path inside a workspace")
        root = self._fs_root[1].rstrip("/")
        return f"{root}/{name}" if name else root

    # -- bytes ------------------------------------------------------------------------------------------

    def exists(self, name: str) -> bool:
        return bool(self.fs.exists(self.path(name)))

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if there is none."""
        try:
            return int(self.fs.size(self.path(name)))
        except FileNotFoundError:
            return None

    def read_bytes(self, name: str) -> bytes:
        try:
            return self.fs.cat_file(self.path(name))
        except FileNotFoundError:
            raise WorkspaceError(f"{self.path(name)} is missing; `flawsmith run` makes it") from None

    def read_range(self, name: str, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path(name), start=start, end=end)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Whole or not at all. A rename that a power cut undoes is noticed by the next run and done again."""
        path = self.path(name)
        if not self.is_local:
            self.fs.pipe_file(path, data)
            return
        os.makedirs(os.path.dirname(path), exist_ok=True)
        aside = f"{path}.{uuid.uuid4().hex}{ASIDE}"
        try:
            with open(aside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                # What was written is not read again by this process; keeping a copy of every shard in
                # memory cost more time than all other work of committing it (measured).
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            os.replace(aside, path)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise

    def remove(self, name: str) -> None:
        if self.exists(name):
            self.fs.rm_file(self.path(name))

    def names(self, folder: str) -> list[str]:
        """Sorted base names in one folder of the workspace; empty if there is no such folder."""
        try:
            entries = self.fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)

    # -- tables and settings ----------------------------------------------------------------------------

    def write_table(self, name: str, table: pa.Table) -> None:
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        self.write_bytes(name, sink.getvalue())

    def read_table(self, name: str) -> pa.Table:
        try:
            table = pq.read_table(io.BytesIO(self.read_bytes(name)), page_checksum_verification=True)
            table.validate(full=True)  # texts that are no text are found here and not where they are shown
            return as_declared(table, declared(name))
        except (pa.ArrowException, OSError, ValueError) as error:
            raise WorkspaceError(
                f"{self.path(name)} is damaged ({error}); `flawsmith verify` lists what is, "
                "`flawsmith run` repairs it"
            ) from error

    def append_table(self, name: str, table: pa.Table, replace: dict[str, Any]) -> None:
        """Adds rows after dropping those that equal ``replace``, so that a rerun adds nothing twice."""
        if self.exists(name):
            old = self.read_table(name).cast(table.schema).to_pylist()
            kept = [row for row in old if any(row[key] != value for key, value in replace.items())]
            table = pa.concat_tables([pa.Table.from_pylist(kept, schema=table.schema), table])
        self.write_table(name, table)

    def write_yaml(self, name: str, value: Any) -> None:
        self.write_bytes(name, yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode())

    def read_yaml(self, name: str) -> Any:
        try:
            return from_yaml(self.read_bytes(name))
        except ValueError as error:
            raise WorkspaceError(f"{self.path(name)} is damaged: {error}; restore it") from error

    # -- rounds -----------------------------------------------------------------------------------------

    def rounds(self) -> list[int]:
        """Numbers of the rounds that have settings, in order."""
        return [
            int(name)
            for name in self.names("rounds")
            if name.isdecimal() and self.exists(f"rounds/{name}/settings.yaml")
        ]

    # -- one writer -------------------------------------------------------------------------------------

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Holds the workspace's lock; a second writer gets a clear error, a dead one leaves no lock behind.

        The lock is the kernel's (``flock``), so it ends with its process. Object stores have none yet.
        """
        if not self.is_local:
            yield
            return
        root = Path(self.path(""))
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock = open(root / ".lock", "a+")  # noqa: SIM115 - held for the whole run
        except OSError as error:
            raise WorkspaceError(
                f"cannot write to the workspace {root}: {error.strerror}; "
                "choose another folder with --workspace"
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
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            _sweep(root)
            yield


def part(folder: str, round_: int, index: int, suffix: str) -> str:
    """``rounds/000/shards/part-00000.tar`` and its like."""
    return f"rounds/{round_:03d}/{folder}/part-{index:05d}.{suffix}"


def round_file(round_: int, name: str) -> str:
    return f"rounds/{round_:03d}/{name}"


def _sweep(root: Path) -> None:
    """Removes what killed writers left, and nothing else that a user may keep in the same folder."""
    folders = [root.glob("*"), (root / "rounds").rglob("*"), (root / "report").rglob("*")]
    for path in (path for paths in folders for path in paths):
        if _ORPHAN.search(path.name):
            path.unlink(missing_ok=True)
