"""Accepted samples out of shards, read with plain ``webdataset``; every decoder is named, none is pickle."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from manifests.pictures import decode, decode_mask, open_file
from manifests.shards import IMAGE_FORMATS, ShardError

_REMEDY = "`flawsmith verify` notes all that is damaged, then `flawsmith run` makes it again"


@dataclass(frozen=True)
class ShardFile:
    """A shard and what its manifest row says of it.

    Attributes:
        path: local file or fsspec URL.
        accepted: samples it must hold.
    """

    path: str
    accepted: int


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


def read_samples(shards: Iterable[ShardFile], excluded: Collection[str] = frozenset()) -> Iterator[Sample]:
    """The picture samples of some shards, in their order.

    Samples that hold features in place of a picture are counted and skipped.

    Args:
        shards: with the counts of their manifest.
        excluded: sample ids a person rejected.

    Raises:
        ShardError: a shard is missing or damaged, holds another number of samples than its manifest says,
            or a sample lacks its mask.
        PictureError: a picture in it is damaged.
    """
    for shard in shards:
        count = 0
        for members in _members(shard.path):
            count += 1
            if members["__key__"] not in excluded and (sample := _sample(shard.path, members)):
                yield sample
        if count != shard.accepted:
            raise ShardError(
                f"{shard.path}: {count} samples can be read, its manifest says {shard.accepted}: it is cut "
                f"short or damaged; {_REMEDY}"
            )


def small_mask(mask: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """A mask at size×size, or h×w, by nearest neighbour (core.md 6.2); one that would vanish keeps every
    pixel it touches.

    Args:
        mask: bool, H×W.
    """
    levels = mask.astype(np.float32)
    side = (size, size) if isinstance(size, int) else size[::-1]
    small = cv2.resize(levels, side, interpolation=cv2.INTER_NEAREST_EXACT) > 0
    if mask.any() and not small.any():
        return cv2.resize(levels, side, interpolation=cv2.INTER_AREA) > 0
    return small


def _members(path: str) -> Iterator[dict[str, Any]]:
    """Raw bytes by member name, one dict a sample."""
    try:
        # Opened here: webdataset's own opener would run the commands of "pipe:" addresses.
        with open_file(path) as stream:
            yield from group_by_keys(tar_file_expander([{"url": path, "stream": stream}]))
    except FileNotFoundError as error:
        raise ShardError(f"{path} is missing; {_REMEDY}") from error
    except Exception as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path} cannot be read ({type(error).__name__}: {error}); {_REMEDY}") from error


def _sample(path: str, members: dict[str, Any]) -> Sample | None:
    name = f"{path}: sample {members['__key__']}"
    if "json" not in members:
        raise ShardError(f"{name} has no .json; {_REMEDY}")
    if "feature.npy" in members:
        return None
    if "mask.png" not in members:
        raise ShardError(f"{name} has no mask.png; {_REMEDY}")
    image = _picture(name, members, "image")
    if image is None:
        raise ShardError(f"{name} has no image; {_REMEDY}")
    record = json.loads(members["json"])
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
            pixels = decode(data, name=f"{name}.{stem}.{suffix}").pixels
            return (
                pixels
                if pixels.dtype == np.uint8
                else ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
            )
    return None
