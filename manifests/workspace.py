"""One folder or object-store prefix that holds everything a run makes.

Nothing is ever visible half written: a file is written aside, flushed to the disk and renamed (local), or
put as one object (object stores). What a killed writer leaves behind ends in ``.part`` and is swept when the
next writer takes the lock. Requests to object stores are tried again as ``manifests.storage`` says.
"""

from __future__ import annotations

import io
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from manifests import lock, storage
from manifests.ahead import in_order
from manifests.errors import WorkspaceError
from manifests.plain import from_yaml
from manifests.schema import as_declared, declared

Item = TypeVar("Item")
Read = TypeVar("Read")
READERS = 16  # requests to an object store at a time, where many small files are read
ASIDE = ".part"
_ORPHAN = re.compile(rf"\.[0-9a-f]{{32}}{re.escape(ASIDE)}$")


@dataclass(frozen=True)
class Workspace:
    """``url`` is a folder or an fsspec URL; paths below it are given relative, with forward slashes."""

    url: str
    _leases: list[lock.Lease] = field(default_factory=list, init=False, repr=False, compare=False)

    @cached_property
    def _fs_root(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return storage.open_system(self.url)

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        return self._fs_root[0]

    @property
    def is_local(self) -> bool:
        return storage.is_local(self.fs)

    def path(self, name: str) -> str:
        """The full path of ``name`` on its file system. Names that leave the workspace are refused."""
        if name.startswith("/") or ".." in name.split("/"):
            raise WorkspaceError(f"{name!r} is not a path inside a workspace")
        root = self._fs_root[1].rstrip("/")
        return f"{root}/{name}" if name else root

    def address(self, name: str) -> str:
        """What a person, or another program, calls ``name``: a path, or a URL on an object store."""
        path = self.path(name)
        if self.is_local:
            return path
        root = self.url.rstrip("/")
        return f"{root}/{name}" if name else root

    # -- bytes ------------------------------------------------------------------------------------------

    def exists(self, name: str) -> bool:
        return bool(self._steady(name, lambda: self.fs.exists(self.path(name))))

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None if there is none."""
        try:
            return int(self._steady(name, lambda: self.fs.size(self.path(name))))
        except FileNotFoundError:
            return None

    def sizes(self, folder: str) -> dict[str, int]:
        """Bytes of every file in one folder by base name, from one listing; empty if there is no such
        folder."""
        try:
            entries = self._steady(folder, lambda: self.fs.ls(self.path(folder), detail=True))
        except FileNotFoundError:
            return {}
        return {_base(entry["name"]): int(entry["size"]) for entry in entries if entry["type"] == "file"}

    def read_bytes(self, name: str, size: int | None = None) -> bytes:
        """``size``: bytes that the file must have, where that is known."""
        path = self.path(name)
        try:
            return storage.read_whole(self.fs, path, self.address(name), size)
        except FileNotFoundError:
            raise WorkspaceError(
                f"{self.address(name)} is missing; `flawsmith run` makes it again, but for what a run began "
                "with (pictures, prompts, settings): restore that"
            ) from None

    def open(self, name: str) -> IO[bytes]:
        """A file to read from any place on.

        Raises:
            FileNotFoundError: there is no such file.
        """
        return storage.open_file(self.address(name))

    def read_many(self, names: Iterable[Item], read: Callable[[Item], Read]) -> Iterator[Read]:
        """``read`` of each item, in order; on an object store :data:`READERS` at a time."""
        yield from map(read, names) if self.is_local else in_order(read, names, READERS)

    def _steady(self, name: str, work: Callable[[], Any]) -> Any:
        return work() if self.is_local else storage.steady(self.address(name), work)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Whole or not at all. A rename that a power cut undoes is noticed by the next run and done again."""
        path = self.path(name)
        self._check_lock()
        if not self.is_local:
            storage.put(self.fs, path, self.address(name), data, self._check_lock)
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
            self._check_lock()  # writing may have taken long
            os.replace(aside, path)
        except BaseException as error:
            Path(aside).unlink(missing_ok=True)
            if isinstance(error, OSError):  # a full disk names no file
                error.filename = path
            raise

    def remove(self, name: str) -> None:
        self._check_lock()
        if self.exists(name):
            with suppress(FileNotFoundError):  # an earlier try did it, whose answer was lost
                self._steady(name, lambda: self.fs.rm_file(self.path(name)))

    def names(self, folder: str) -> list[str]:
        """Sorted base names in one folder of the workspace; empty if there is no such folder."""
        try:
            entries = self._steady(folder, lambda: self.fs.ls(self.path(folder), detail=False))
        except FileNotFoundError:
            return []
        return sorted(map(_base, entries))

    # -- tables and settings ----------------------------------------------------------------------------

    def write_table(self, name: str, table: pa.Table) -> int:
        """Bytes written."""
        sink = io.BytesIO()
        pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
        self.write_bytes(name, sink.getvalue())
        return sink.tell()

    def read_table(self, name: str) -> pa.Table:
        data = self.read_bytes(name)
        try:
            table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
            table.validate(full=True)  # texts that are no text are found here and not where they are shown
            return as_declared(table, declared(name))
        except (pa.ArrowException, OSError, ValueError) as error:  # Parquet's reader calls damage an OSError
            raise WorkspaceError(
                f"{self.address(name)} is damaged ({error}); `flawsmith verify` lists what is, "
                "`flawsmith run` makes shards and detectors again; restore or remove another table"
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
            raise WorkspaceError(f"{self.address(name)} is damaged: {error}; restore it") from error

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
        """Holds the workspace's lock, see ``manifests.lock``. A second writer gets a clear error; a dead one
        leaves no lock behind that holds for long.

        Raises:
            WorkspaceError: another writer holds the lock, nothing can be written here, or the lock was lost.
        """
        if not self.is_local:
            with self._leased():
                yield
            return
        root = Path(self.path(""))
        with lock.folder_lock(root):
            if not lock.is_network(root):
                _sweep(root)
                yield
                return
            with self._leased():
                _sweep(root)
                yield

    @contextmanager
    def _leased(self) -> Iterator[None]:
        with lock.lease(self.address("")) as lease:
            self._leases.append(lease)
            try:
                yield
            finally:
                self._leases.remove(lease)

    def _check_lock(self) -> None:
        for lease in self._leases:
            lease.check()


def part(folder: str, round_: int, index: int, suffix: str) -> str:
    """``rounds/000/shards/part-00000.tar`` and its like."""
    return f"rounds/{round_:03d}/{folder}/part-{index:05d}.{suffix}"


def round_file(round_: int, name: str) -> str:
    return f"rounds/{round_:03d}/{name}"


def _base(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1]


def _sweep(root: Path) -> None:
    """Removes what killed writers left, and nothing else that a user may keep in the same folder."""
    folders = [root.glob("*"), (root / "rounds").rglob("*"), (root / "report").rglob("*")]
    for path in (path for paths in folders for path in paths):
        if _ORPHAN.search(path.name):
            path.unlink(missing_ok=True)
