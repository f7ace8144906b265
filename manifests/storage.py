"""Files on every file system that fsspec knows: opening them, and errors that may pass.

A remote file system (an object store) fails now and then: 500, 503, a request that never ends, an answer cut
short. Every request is tried :data:`TRIES` times with growing pauses; the error of the last try names those
of all. The clients' own retries are switched off where they can be, so that there is one bound.
"""

from __future__ import annotations

import errno
import io
import random
import time
from collections.abc import Callable
from typing import IO, Any, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem

from manifests.errors import FlawsmithError

Result = TypeVar("Result")

TRIES = 8
PAUSE = 0.2  # seconds after the first failure; doubled after each, and cut by up to a half at random
BUFFER = 2**20  # bytes of a remote file that are asked for at least
BLOCK = 16 * 2**20  # bytes of a large remote file that one request asks for
STALLED = 30  # seconds without a byte after which a request to S3 counts as failed
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs"}

# What object stores' clients make of 500 and the like, of 503 and 409, and of the network.
_PASSING = {
    errno.EREMOTEIO, errno.EIO, errno.EBUSY, errno.EAGAIN, errno.EPIPE, errno.ETIMEDOUT, errno.ECONNRESET,
    errno.ECONNREFUSED, errno.ECONNABORTED, errno.ENETUNREACH, errno.EHOSTUNREACH,
}  # fmt: skip
# By name, because these packages are optional: (first part of the module, class).
_PASSING_KINDS = {
    ("aiohttp", "ClientError"),
    ("botocore", "HTTPClientError"),
    ("botocore", "ConnectionError"),
    ("botocore", "ResponseParserError"),
    ("requests", "ConnectionError"),
}
_CREDENTIALS = {
    ("botocore", "NoCredentialsError"),
    ("botocore", "CredentialRetrievalError"),
    ("botocore", "PartialCredentialsError"),
    ("botocore", "ProfileNotFound"),
    ("google", "GoogleAuthError"),
}
_FINAL = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


class StorageError(FlawsmithError):
    """A file system that cannot be used as it is: its package, credentials, rights or bucket are missing."""


class Unreachable(OSError):
    """Every try failed, each with an error that may pass: the same command may succeed later."""


class ShortRead(OSError):
    """Fewer bytes came than the file has; one try's failure."""

    def __init__(self, text: str) -> None:
        super().__init__(errno.EIO, text)


def open_system(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of an fsspec URL or local path, and the path on it.

    Raises:
        StorageError: the URL names no known file system, or one whose package is not installed.
    """
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {}
    if protocol in EXTRAS and "::" not in url:
        options["use_listings_cache"] = False  # workers in other processes write there too
        if EXTRAS[protocol] == "s3":
            options["config_kwargs"] = _s3_config(protocol)
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        if extra := EXTRAS.get(protocol):
            raise StorageError(f"{url}: {error}; pip install 'flawsmith[{extra}]'") from error
        raise StorageError(f"{url}: {error}; name a folder, or a URL as s3://bucket/folder") from error
    if options.get("config_kwargs"):
        fs.retries = 1
    return fs, path


def is_local(fs: fsspec.AbstractFileSystem) -> bool:
    return isinstance(fs, LocalFileSystem)


def _s3_config(protocol: str) -> dict[str, Any]:
    """What botocore is told, under what fsspec's own configuration says."""
    own = fsspec.config.conf.get(protocol, {}).get("config_kwargs", {})
    return {"read_timeout": STALLED, "connect_timeout": 10, "retries": {"total_max_attempts": 1}, **own}


def steady(url: str, work: Callable[[], Result]) -> Result:
    """The result of ``work``, a request about ``url``, tried again after errors that may pass.

    Raises:
        FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError: as ``work`` does.
        StorageError: an error that no later try mends.
        Unreachable: no try succeeded.
    """
    failures: list[str] = []
    while True:
        try:
            return work()
        except (FlawsmithError, Unreachable):
            raise
        except Exception as error:
            if isinstance(error, _FINAL):
                raise
            if not _may_pass(error):
                raise StorageError(f"{url}: {_plain(error)}; {_remedy(error)}") from error
            failures.append(_plain(error))
            if len(failures) == TRIES:
                listed = "; ".join(f"{at}. {text}" for at, text in enumerate(failures, 1))
                text = f"all of {TRIES} tries failed: {listed}; run the same command again to go on"
                raise Unreachable(errno.EIO, text, url) from error
        time.sleep(PAUSE * 2 ** (len(failures) - 1) * random.uniform(0.5, 1))


def _may_pass(error: Exception) -> bool:
    status = getattr(error, "code", None) or getattr(error, "status", None)  # of gcsfs, of web servers
    if status is not None:
        return str(status) in ("408", "429") or str(status).startswith("5")
    if isinstance(error, TimeoutError | ConnectionError) or _kinds(error) & _PASSING_KINDS:
        return True
    return isinstance(error, OSError) and error.errno in _PASSING


def _kinds(error: Exception) -> set[tuple[str, str]]:
    return {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__}


def _plain(error: Exception) -> str:
    """One line: the kind of error, unless it is but an ``OSError``, and what it says."""
    kind = "" if type(error) in (OSError, ShortRead) else type(error).__name__
    text = " ".join(str(error).split())
    return ": ".join(part for part in (kind, text) if part)


def _remedy(error: Exception) -> str:
    if _kinds(error) & _CREDENTIALS:
        return (
            "set credentials as the store's own tools read them (AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, a profile, a role; GOOGLE_APPLICATION_CREDENTIALS)"
        )
    if isinstance(error, PermissionError):
        return "check the credentials and their rights to list, read, write and delete there"
    return "check the URL, and the endpoint and region that the store's client is set to"


# -- reading --------------------------------------------------------------------------------------------


def read_whole(fs: fsspec.AbstractFileSystem, path: str, url: str, size: int | None = None) -> bytes:
    """Every byte of a file; of a remote one, as many as ``size`` or else as the store says it has.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError, Unreachable: see :func:`steady`.
    """
    if is_local(fs):
        return fs.cat_file(path)

    def whole() -> bytes:
        expected = fs.size(path) if size is None else size
        if expected is not None and expected > BLOCK:
            starts = list(range(0, expected, BLOCK))
            ends = [min(start + BLOCK, expected) for start in starts]
            data = b"".join(fs.cat_ranges([path] * len(starts), starts, ends, on_error="raise"))
        else:
            data = fs.cat_file(path)
        if expected is not None and len(data) != expected:
            raise ShortRead(f"{len(data)} bytes came of {expected}")
        return data

    return steady(url, whole)


def read_file(url: str) -> bytes:
    """Every byte of a local file or an fsspec URL, see :func:`read_whole`."""
    return read_whole(*open_system(url), url)


def open_file(path: str) -> IO[bytes]:
    """A binary reader of a local file or an fsspec URL; that of a remote file seeks without reading.

    Raises:
        FileNotFoundError: there is no such file.
        StorageError, Unreachable: see :func:`steady`; also while it is read.
    """
    if "://" not in path:
        return open(path, "rb")
    fs, inner = open_system(path)
    if is_local(fs):
        return open(inner, "rb")
    size = steady(path, lambda: fs.size(inner))
    if size is None:  # some web servers do not say
        return cast("IO[bytes]", fs.open(inner, "rb"))
    return io.BufferedReader(_Remote(fs, inner, path, size), BUFFER)


class _Remote(io.RawIOBase):
    """A remote file by ranges, each tried again by itself."""

    def __init__(self, fs: fsspec.AbstractFileSystem, path: str, url: str, size: int) -> None:
        self._fs, self._path, self._url, self._size, self._at = fs, path, url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        return self._at

    def readall(self) -> bytes:
        data = bytearray(max(0, self._size - self._at))
        self.readinto(data)
        return bytes(data)

    def readinto(self, buffer: Any) -> int:
        start, end = self._at, min(self._at + len(buffer), self._size)
        if start >= end:
            return 0
        data = steady(self._url, lambda: _part(self._fs, self._path, start, end))
        buffer[: end - start] = data
        self._at = end
        return end - start


def _part(fs: fsspec.AbstractFileSystem, path: str, start: int, end: int) -> bytes:
    data = fs.cat_file(path, start=start, end=end)
    if len(data) != end - start:
        raise ShortRead(f"{len(data)} bytes came of {end - start}, from {start} on")
    return data


# -- writing --------------------------------------------------------------------------------------------


def put(
    fs: fsspec.AbstractFileSystem,
    path: str,
    url: str,
    data: bytes,
    check: Callable[[], None] = lambda: None,
) -> None:
    """One object, which appears whole or not at all. ``check`` is called before every try; what it raises
    ends them.

    Raises:
        StorageError: there is no such bucket, and as :func:`steady`.
        Unreachable: see :func:`steady`.
    """

    def once() -> None:
        check()
        fs.pipe_file(path, data)

    try:
        steady(url, once)
    except FileNotFoundError as error:
        raise no_bucket(url) from error


def no_bucket(url: str) -> StorageError:
    return StorageError(f"{url}: there is no such bucket; make it first, or correct its name")
