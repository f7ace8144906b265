"""Accepted samples as they lie in a workspace's shards: read by offset, never written anywhere."""

from __future__ import annotations

import io
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from manifests.errors import UsageError
from manifests.pictures import decode, decode_mask
from manifests.schema import Image, images_from
from manifests.shards import BROKEN, IMAGE_FORMATS, ShardError, checksum
from manifests.workspace import Workspace, part, round_file
from workflows.rounds import accepted_samples, vetoes

_REMEDY = "`flawsmith verify` lists what is damaged, `flawsmith run` makes it again"


@dataclass(frozen=True)
class Stored:
    """One accepted sample.

    Attributes:
        row: of the samples table.
        image: uint8 or uint16, H×W×C; None for a sample that holds features in place of a picture.
        mask: bool, H×W; h×w of the features where there is no picture.
        normal: the picture it was made from, H×W×C; None if the shard does not hold it.
    """

    row: dict[str, Any]
    image: np.ndarray | None
    mask: np.ndarray
    normal: np.ndarray | None


def accepted_rows(space: Workspace, rounds: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """Rows of the accepted samples that nobody rejected, by round and in plan order.

    Args:
        rounds: which ones; None: all whose shards are there.

    Raises:
        UsageError: a round that the workspace does not have, or that has no samples yet.
    """
    known = space.rounds()
    if rounds is None:
        rounds = [number for number in known if space.exists(round_file(number, "shards.parquet"))]
    for number in rounds:
        if number not in known:
            have = ", ".join(map(str, known)) or "none"
            raise UsageError(f"{space.address('')} has no round {number}; rounds that are there: {have}")
        if not space.exists(round_file(number, "shards.parquet")):
            raise UsageError(f"round {number} has no samples yet: `flawsmith run` makes them")
    return [row for number in rounds for row in accepted_samples(space, number)]


def some_accepted(space: Workspace, rounds: Sequence[int] | None = None) -> list[dict[str, Any]]:
    """As :func:`accepted_rows`, but none is an error.

    Raises:
        UsageError: no such round, or no accepted sample.
    """
    rows = accepted_rows(space, rounds)
    vetoed = {int(sample_id.partition("-")[0]) for sample_id in vetoes(space)}
    if not rows and vetoed.intersection(vetoed if rounds is None else rounds):
        raise UsageError(
            f"{space.address('')}: every accepted sample"
            + (f" of round {', '.join(map(str, rounds))}" if rounds else "")
            + " is rejected by hand; `flawsmith review DIR --restore ID` takes that back"
        )
    if not rows:
        raise UsageError(
            f"{space.address('')} holds no accepted sample"
            + (f" of round {', '.join(map(str, rounds))}" if rounds else "")
            + "; `flawsmith run CONFIG --workspace DIR` makes some"
        )
    return rows


def read_sample(space: Workspace, row: dict[str, Any]) -> Stored:
    """The pictures of one accepted sample.

    Raises:
        ShardError: its shard is missing, or its bytes are not those that were recorded.
        PictureError: a picture in it cannot be read.
    """
    members, name = read_members(space, row), row["sample_id"]
    image, normal = _picture(members, "image", name), _picture(members, "normal", name)
    if image is not None:
        shape = image.shape[:2]
    else:  # features have a mask of their own size
        shape = np.load(io.BytesIO(members["feature.npy"]), allow_pickle=False).shape[-2:]
    mask = decode_mask(members["mask.png"], name=f"{name}.mask.png", shape=shape)
    return Stored(row, image, mask, normal)


def read_members(space: Workspace, row: dict[str, Any]) -> dict[str, bytes]:
    """Members of one accepted sample by extension, checked against the recorded checksum.

    Raises:
        ShardError: the shard is missing, or the bytes are not those that were recorded.
    """
    name = part("shards", row["round"], row["shard"], "tar")
    path = space.address(name)
    members: dict[str, bytes] = {}
    try:
        with space.open(name) as file:
            file.seek(row["offset"])  # a tar may be read from any header on
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    key, _, extension = info.name.partition(".")
                    stream = tar.extractfile(info) if key == row["sample_id"] else None
                    if stream is None:
                        break
                    members[extension] = stream.read()
    except FileNotFoundError as error:
        raise ShardError(f"{path} is missing; {_REMEDY}") from error
    except BROKEN as error:
        raise ShardError(f"{path} is damaged at sample {row['sample_id']} ({error}); {_REMEDY}") from error
    if checksum(members) != row["checksum"]:
        raise ShardError(f"{path} is damaged at sample {row['sample_id']}; {_REMEDY}")
    return members


def source_images(space: Workspace) -> list[Image]:
    """Every real picture and texture that the workspace knows."""
    return [
        image
        for name in ("images.parquet", "textures.parquet")
        if space.exists(name)
        for image in images_from(space.read_table(name))
    ]


def short_name(path: str) -> str:
    """A picture's file and folder."""
    return "/".join(path.partition("::")[0].split("/")[-2:])


def licences(images: Sequence[Image]) -> dict[str, list[str]]:
    """By licence, the sorted categories whose pictures have it. Pictures without a licence are left out."""
    found: dict[str, set[str]] = defaultdict(set)
    for image in images:
        if image.licence:
            found[image.licence].add(image.category)
    return {licence: sorted(found[licence]) for licence in sorted(found)}


def _picture(members: dict[str, bytes], stem: str, name: str) -> np.ndarray | None:
    for suffix in IMAGE_FORMATS:
        if data := members.get(f"{stem}.{suffix}"):
            return decode(data, name=f"{name}.{stem}.{suffix}").pixels
    return None
