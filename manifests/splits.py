"""Which pictures train, calibrate, steer the loop and judge at the end (design.md, section 3)."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from manifests.schema import Image

_SHARES = {"train": {"train": 8, "calibration": 2}, "test": {"feedback": 5, "test": 5}}  # tenths
_STEERS = {"train": "train", "test": "feedback"}  # the split of each side that the loop has seen


def side(split: str) -> str:
    """``train`` for what a detector may learn or calibrate from, ``test`` for what judges it."""
    return "train" if split in _SHARES["train"] else "test"


def assign_splits(
    images: Sequence[Image], previous: Sequence[Image] = (), final: frozenset[str] = frozenset()
) -> list[Image]:
    """Divide the train side into train and calibration (8 : 2), the test side into feedback and test (1 : 1).

    A group never falls apart within its category and side. A category's groups are dealt in the order of the
    sha256 of their names, each to the split furthest below its share; so halves are equal within one group,
    however the files were ordered. Labels play no part: relabelling a test picture moves nothing. A group
    that ``previous`` placed, by its name or by one of its pictures, keeps its split; a group with pictures
    of both keeps the one that has steered (``feedback`` before ``test``, ``train`` before ``calibration``).

    Args:
        images: ``split`` says the side, ``train`` or ``test``.
        final: image_ids whose split stands already.

    Returns:
        The images in the same order, with their split.
    """
    placed = [*previous, *(image for image in images if image.image_id in final and image.group)]
    by_picture = {(image.image_id, side(image.split)): image.split for image in placed}
    by_group = {(image.category, side(image.split), image.group): image.split for image in placed}
    split: dict[tuple[str, str, str], str] = {}
    groups: dict[tuple[str, str], set[str]] = defaultdict(set)
    for image in images:
        which = side(image.split)
        key = (image.category, which, image.group)
        groups[image.category, which].add(image.group)
        for known in (by_picture.get((image.image_id, which)), by_group.get(key)):
            if known is not None and split.get(key) != _STEERS[which]:
                split[key] = known
    for (category, which), names in sorted(groups.items()):
        shares = _SHARES[which]
        counts = dict.fromkeys(shares, 0)
        for name in names:
            if (category, which, name) in split:
                counts[split[category, which, name]] += 1
        new = [name for name in names if (category, which, name) not in split]
        for name in sorted(new, key=lambda name: hashlib.sha256(f"{category}/{name}".encode()).digest()):
            total = sum(counts.values()) + 1
            chosen = max(shares, key=lambda s: shares[s] * total - 10 * counts[s])
            counts[chosen] += 1
            split[category, which, name] = chosen
    return [
        image
        if image.image_id in final
        else replace(image, split=split[image.category, side(image.split), image.group])
        for image in images
    ]
