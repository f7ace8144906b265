"""Accepted samples out of shards, read with plain ``webdataset``; every decoder is named, none is pickle.

A shard is read whole, from a folder or an object store, and its bytes are compared with its record before the
first of its samples is handed out; meanwhile the samples of those before it are worked on.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from webdataset.tariterators import group_by_keys

from manifests.ahead import in_order
from manifests.pictures import decode, decode_mask, eight_bit
from manifests.plain import from_json
from manifests.shards import IMAGE_FORMATS, ShardError, check_plain
from manifests.storage import read_file

_REMEDY = "`flawsmith verify` notes all that is damaged, then `flawsmith run` makes it again"


@dataclass(frozen=True)
class ShardFile:
    """A shard and what its manifest row says of it.

    Attributes:
        path: local file or fsspec URL.
        accepted: samples it must hold.
        bytes: its size; None: not known.
        sha256: of its bytes, in hexadecimal; None: not known.
    """

    path: str
    accepted: int
    bytes: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Sample:
    """One synthetic anomaly.

    Attributes:
        image: uint8, H×W×C.
        mask: bool, H×W.
        normal: uint8, H×W×C; the picture it was made from, None if the shard does not hold it.
        recipe: every field of ``Recipe``.
        scores: the gates' figures.
    """

    sample_id: str
    image: np.ndarray
    mask: np.ndarray
    normal: np.ndarray | None
    recipe: dict[str, Any]
    scores: dict[str, float]

    @property
    def category(self) -> str:
        return self.recipe["category"]

    @property
    def image_id(self) -> str:
        """Of the normal it was made from."""
        return self.recipe["image_id"]


@dataclass(frozen=True)
class FeatureSample:
    """A synthetic anomaly of features, of which there is no picture; else as :class:`Sample`.

    Attributes:
        feature: float16, C×h×w.
        mask: bool, h×w.
        backbone: fingerprint of the frozen network whose features they are.
    """

    sample_id: str
    feature: np.ndarray
    mask: np.ndarray
    normal: np.ndarray | None
    backbone: str
    recipe: dict[str, Any]
    scores: dict[str, float]

    @property
    def category(self) -> str:
        return self.recipe["category"]

    @property
    def image_id(self) -> str:
        return self.recipe["image_id"]


def read_samples(
    shards: Iterable[ShardFile],
    excluded: Collection[str] = frozenset(),
    *,
    wanted: Callable[[dict[str, Any]], bool] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Sample]:
    """The picture samples of some shards, in their order, decoded in threads.

    Samples that hold features in place of a picture are counted and skipped.

    Args:
        shards: with the counts of their manifest.
        excluded: sample ids a person rejected.
        wanted: asked with a sample's recipe, before its pictures are decoded.
        rank, ranks: only this share of what is left: the ``rank``-th and every ``ranks``-th after it.

    Raises:
        ShardError: a shard is missing or damaged, holds another number of samples than its manifest says,
            or a sample lacks its mask.
        PictureError: a picture in it is damaged.
    """
    chosen = _chosen(shards, excluded, wanted, features=False)
    return in_order(_sample, islice(chosen, rank, None, ranks))


def read_all_samples(
    shards: Iterable[ShardFile],
    excluded: Collection[str] = frozenset(),
    *,
    wanted: Callable[[dict[str, Any]], bool] | None = None,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[Sample | FeatureSample]:
    """As :func:`read_samples`, with those that hold features.

    Raises:
        ShardError: also where features are damaged or have no mask of their size.
    """
    chosen = _chosen(shards, excluded, wanted, features=True)
    return in_order(_either, islice(chosen, rank, None, ranks))


def read_members(shards: Iterable[ShardFile]) -> Iterator[tuple[ShardFile, Iterator[dict[str, Any]]]]:
    """Each shard with its samples: raw bytes by member name, the sample's name as ``__key__``.

    Raises:
        ShardError: a shard is missing, or its bytes are not those of its record.
        StorageError, Unreachable: the object store refuses, or does not answer.
    """
    known: deque[ShardFile] = deque()

    def noted() -> Iterator[ShardFile]:
        for shard in shards:
            known.append(shard)
            yield shard

    for data in in_order(_whole, noted(), threads=2, ahead=4):
        shard = known.popleft()
        yield shard, _members(shard.path, data)


def _whole(shard: ShardFile) -> bytes:
    """The bytes of a shard. One on an object store that is not as recorded is read once more: the way may be
    at fault."""
    tries = 1 if "://" not in shard.path else 2
    try:
        for _ in range(tries):
            data = read_file(shard.path)
            if not (problem := _difference(shard, data)):
                return data
    except FileNotFoundError as error:
        raise ShardError(f"{shard.path} is missing; {_REMEDY}") from error
    raise ShardError(f"{shard.path} is cut short or damaged: {problem}; {_REMEDY}")


def _difference(shard: ShardFile, data: bytes) -> str:
    """Between a shard's bytes and its record; empty if there is none that can be told."""
    if shard.bytes is not None and len(data) != shard.bytes:
        return f"it has {len(data)} bytes, its manifest says {shard.bytes}"
    if shard.sha256 is not None and hashlib.sha256(data).hexdigest() != shard.sha256:
        return "its sha256 is not that of its manifest"
    return ""


def _members(path: str, data: bytes) -> Iterator[dict[str, Any]]:
    try:
        # The stream is opened here: webdataset's own opener would run the commands of "pipe:" addresses.
        yield from group_by_keys(_files(data, path))
    except Exception as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path} cannot be read ({type(error).__name__}: {error}); {_REMEDY}") from error


def _files(shard: bytes, path: str) -> Iterator[dict[str, Any]]:
    """Name and bytes of every member, as webdataset's own reader gives them. That one also unpacks compressed
    and sparse tars, of which a few bytes can stand for more than fits into memory."""
    with tarfile.open(fileobj=io.BytesIO(shard), mode="r:") as tar:
        for info in tar:
            tar.members = []  # type: ignore[attr-defined]  # it would keep every header
            check_plain(info, path)
            data = shard[info.offset_data : info.offset_data + info.size]
            if len(data) < info.size:
                raise tarfile.ReadError("unexpected end of data")
            yield {"fname": info.name, "data": data, "__url__": path}


def _chosen(
    shards: Iterable[ShardFile],
    excluded: Collection[str],
    wanted: Callable[[dict[str, Any]], bool] | None,
    *,
    features: bool,
) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, raw members and record of the samples that are asked for, those of features only if ``features``;
    every shard is counted."""
    for shard, samples in read_members(shards):
        count = 0
        for members in samples:
            count += 1
            name = f"{shard.path}: sample {members['__key__']}"
            if "json" not in members:
                raise ShardError(f"{name} has no .json; {_REMEDY}")
            if members["__key__"] in excluded or ("feature.npy" in members and not features):
                continue
            record = _record(name, members["json"])
            if wanted is None or wanted(record["recipe"]):
                yield name, members, record
        if count != shard.accepted:
            raise ShardError(
                f"{shard.path}: {count} samples can be read, its manifest says {shard.accepted}: it is cut "
                f"short or damaged; {_REMEDY}"
            )


def _record(name: str, data: bytes) -> dict[str, Any]:
    """The ``json`` member: a mapping with the recipe, the scores and the provenance."""
    try:
        record = from_json(data)
    except ValueError as error:
        raise ShardError(f"{name}.json cannot be read ({error}); {_REMEDY}") from error
    parts = ("recipe", "scores", "provenance")
    if not isinstance(record, dict) or not all(isinstance(record.get(part), dict) for part in parts):
        raise ShardError(f"{name}.json lacks one of {', '.join(parts)}; {_REMEDY}")
    return record


def _either(chosen: tuple[str, dict[str, Any], dict[str, Any]]) -> Sample | FeatureSample:
    return _feature_sample(chosen) if "feature.npy" in chosen[1] else _sample(chosen)


def _feature_sample(chosen: tuple[str, dict[str, Any], dict[str, Any]]) -> FeatureSample:
    name, members, record = chosen
    if "mask.png" not in members:
        raise ShardError(f"{name} has no mask.png; {_REMEDY}")
    try:
        feature = np.load(io.BytesIO(members["feature.npy"]), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ShardError(f"{name}.feature.npy cannot be read ({error}); {_REMEDY}") from error
    if feature.ndim != 3 or feature.dtype != np.float16 or not np.isfinite(feature).all():
        raise ShardError(f"{name}.feature.npy is no finite float16 C×h×w; {_REMEDY}")
    return FeatureSample(
        sample_id=members["__key__"],
        feature=feature,
        mask=decode_mask(members["mask.png"], name=f"{name}.mask.png", shape=feature.shape[1:]),
        normal=_picture(name, members, "normal"),
        backbone=record["provenance"]["backbone"],
        recipe=record["recipe"],
        scores=record["scores"],
    )


def _sample(chosen: tuple[str, dict[str, Any], dict[str, Any]]) -> Sample:
    name, members, record = chosen
    if "mask.png" not in members:
        raise ShardError(f"{name} has no mask.png; {_REMEDY}")
    image = _picture(name, members, "image")
    if image is None:
        raise ShardError(f"{name} has no image; {_REMEDY}")
    return Sample(
        sample_id=members["__key__"],
        image=image,
        mask=decode_mask(members["mask.png"], name=f"{name}.mask.png", shape=image.shape[:2]),
        normal=_picture(name, members, "normal"),
        recipe=record["recipe"],
        scores=record["scores"],
    )


def _picture(name: str, members: dict[str, Any], stem: str) -> np.ndarray | None:
    for suffix in IMAGE_FORMATS:
        if data := members.get(f"{stem}.{suffix}"):
            return eight_bit(decode(data, name=f"{name}.{stem}.{suffix}").pixels)
    return None
