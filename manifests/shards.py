"""WebDataset shards: plain tar files, the same bytes for the same samples, read by member name only."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pyarrow as pa

from manifests.errors import FlawsmithError
from manifests.plain import from_json
from manifests.schema import SHARDS, canonical_json, to_table

IMAGE_FORMATS = ("webp", "png", "jpg")
# What the standard library makes of a tar's damaged headers; the last two are slips of its own.
BROKEN = (tarfile.TarError, ValueError, OverflowError)
SHARD_KEY = b"flawsmith.shard"  # schema metadata of samples/part-N.parquet: the shard's row as json


class ShardError(FlawsmithError):
    """A shard is truncated, damaged or not what its record says."""


@dataclass(frozen=True)
class Packed:
    """A shard in memory: its bytes, and per sample the offset of its first header and its checksum."""

    data: bytes
    offsets: tuple[int, ...]
    checksums: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def pack(samples: Iterable[tuple[str, dict[str, bytes]]]) -> Packed:
    """Samples (key, {extension: bytes}) to a tar. Members keep the given order; metadata is fixed.

    Raises:
        ValueError: a key or an extension that WebDataset would split wrongly.
    """
    pieces: list[bytes] = []
    offsets, checksums = [], []
    size = 0
    for key, members in samples:
        if "." in key or "/" in key:
            raise ValueError(f"sample key {key!r} must hold neither dots nor slashes")
        offsets.append(size)
        for extension, data in members.items():
            padding = -len(data) % tarfile.BLOCKSIZE
            pieces += (_header(f"{key}.{extension}", len(data)), data, b"\0" * padding)
            size += tarfile.BLOCKSIZE + len(data) + padding
        checksums.append(checksum(members))
    # The end mark: two empty blocks, and zeros up to a whole record, as tar programs write it.
    end = 2 * tarfile.BLOCKSIZE
    pieces.append(b"\0" * (end + -(size + end) % tarfile.RECORDSIZE))
    return Packed(b"".join(pieces), tuple(offsets), tuple(checksums))


def _header(name: str, size: int) -> bytes:
    """What ``TarInfo.tobuf`` gives for a plain file of mode 644 in the ustar format, at a fifth of its cost:
    only name, size and checksum differ from member to member."""
    encoded = name.encode()
    if len(encoded) > 100 or size >= 8**11:  # these take other fields as well
        info = tarfile.TarInfo(name)
        info.size, info.mode = size, 0o644
        return info.tobuf(tarfile.USTAR_FORMAT)
    block = bytearray(_blank_header())
    block[: len(encoded)] = encoded
    block[124:135] = b"%011o" % size
    block[148:155] = b"%06o\0" % (sum(block[:148]) + 8 * 32 + sum(block[156:345]))
    return bytes(block)


@cache
def _blank_header() -> bytes:
    info = tarfile.TarInfo("")
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def check_plain(info: tarfile.TarInfo, name: str) -> None:
    """Only plain files without folders make up a shard.

    A sparse member may claim any size, a negative size sends :mod:`tarfile` round in circles.

    Raises:
        ShardError: it is something else.
    """
    if not info.isreg() or info.issparse() or info.size < 0 or "/" in info.name:
        raise ShardError(f"{name} holds {info.name!r}, which is not a member of a sample")


def checksum(members: dict[str, bytes]) -> str:
    """CRC-32 over extension, length and bytes of every member, in tar order, as eight hexadecimal digits.

    It locates damage; that the whole shard is the one recorded is what its sha256 says. (A second sha256 of
    every byte was a sixth of the cost of committing a shard.)
    """
    value = 0
    for extension, data in members.items():
        value = zlib.crc32(data, zlib.crc32(f"{extension}:{len(data)}:".encode(), value))
    return f"{value:08x}"


def unpack(data: bytes, name: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The samples of a shard in tar order. Members are read by name and never written anywhere.

    Raises:
        ShardError: the tar is truncated or damaged, a member is not a plain file, or a sample's members
            are not contiguous.
    """
    if len(data) % tarfile.BLOCKSIZE or not data.endswith(b"\0" * (2 * tarfile.BLOCKSIZE)):
        raise ShardError(f"{name} is truncated: it ends after {len(data)} bytes without a tar's end mark")
    current: str | None = None
    members: dict[str, bytes] = {}
    seen: set[str] = set()
    try:
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
            for info in tar:
                key, _, extension = info.name.partition(".")
                check_plain(info, name)
                if not key or not extension:
                    raise ShardError(f"{name} holds {info.name!r}, which is not a member of a sample")
                if key != current:
                    if current is not None:
                        yield current, members
                    if key in seen:
                        raise ShardError(f"{name}: the members of sample {key} do not lie together")
                    seen.add(key)
                    current, members = key, {}
                stream = tar.extractfile(info)
                content = stream.read() if stream else b""
                if len(content) != info.size:
                    raise ShardError(f"{name} is truncated in {info.name}")
                members[extension] = content
            # A damaged header reads as the end of the archive: nothing but zeros may follow it.
            if data[tar.offset :].strip(b"\0"):
                raise ShardError(f"{name} is damaged at byte {tar.offset}")
    except BROKEN as error:
        raise ShardError(f"{name} is damaged: {error}") from error
    if current is not None:
        yield current, members


def record_of(schema: pa.Schema, path: str) -> dict[str, Any]:
    """The shard's row that a samples table holds in its metadata.

    Args:
        path: of the shard, below the workspace.

    Raises:
        ValueError: there is none, or it is not that of this shard.
    """
    record = from_json((schema.metadata or {}).get(SHARD_KEY, b""))
    if not isinstance(record, dict) or record.get("path") != path:
        named = record.get("path") if isinstance(record, dict) else None
        raise ValueError(f"it names the shard {named!r}, expected {path!r}")
    try:
        to_table([{"samples_bytes": 0, **record}], SHARDS)  # a table cannot hold its own size
    except (KeyError, pa.ArrowException) as error:
        raise ValueError(f"its record does not fit the table of shards: {error}") from error
    return record


def missing_members(members: dict[str, bytes]) -> list[str]:
    """What a sample lacks of ``image`` (or ``feature``), ``mask`` and ``json``."""
    stems = {extension.partition(".")[0] for extension in members}
    lacking = [stem for stem in ("mask", "json") if stem not in stems]
    if not stems & {"image", "feature"}:
        lacking.insert(0, "image")
    return lacking


def sample_json(recipe: dict[str, Any], scores: dict[str, Any], provenance: dict[str, Any]) -> bytes:
    """The ``json`` member: what was wanted, what was measured, and where it comes from."""
    value = {"recipe": recipe, "scores": scores, "provenance": provenance}
    return canonical_json(value).encode()  # json writes line breaks ten times as slowly (measured)
