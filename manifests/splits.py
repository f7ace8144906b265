"""Which pictures train, calibrate, steer the loop and judge at the end (design.md, section 3)."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from manifests.schema import Image

_SHARES = {"train": {"train": 8, "calibration": 2}, "test": {"feedback": 5, "test": 5}}  # tenths


def side(split: str) -> str:
    """``train`` for what a detector may learn or calibrate from, ``test`` for what judges it."""
    return "train" if split in _SHARES["train"] else "test"


def assign_splits(
    images: Sequence[Image], previous: Sequence[Image] = (), final: frozenset[str] = frozenset()
) -> list[Image]:
    """Divide the train side into train and calibration (8 : 2), the test side into feedback and test (1 : 1).

    A group never falls apart within its category and side. Groups are dealt within a stratum (the train
    side, or the test groups that show the same set of defects), in the order of the sha256 of their names,
    each to the split furthest below its share; so a stratum's halves are equal within one group, however
    the files were ordered. Ties go to the split that is behind in the whole category, so that many small
    strata do not all favour one. Groups that ``previous`` placed keep their split.

    Args:
        images: ``split`` says the side, ``train`` or ``test``.
        final: image_ids whose split stands already.

    Returns:
        The images in the same order, with their split.
    """
    members: dict[tuple[str, str, str], list[Image]] = defaultdict(list)
    for image in images:
        members[image.category, side(image.split), image.group].append(image)
    split = {(image.category, side(image.split), image.group): image.split for image in previous}
    split.update(
        {(i.category, side(i.split), i.group): i.split for i in images if i.image_id in final and i.group}
    )
    strata: dict[tuple[str, str, tuple[str, ...]], list[str]] = defaultdict(list)
    for (category, which, group), some in members.items():
        defects = tuple(sorted({image.defect for image in some})) if which == "test" else ()
        strata[category, which, defects].append(group)

    overall: dict[tuple[str, str], int] = defaultdict(int)  # (category, split) -> groups
    for key in members.keys() & split.keys():
        overall[key[0], split[key]] += 1
    for (category, which, _), groups in sorted(strata.items()):
        shares = _SHARES[which]
        counts = dict.fromkeys(shares, 0)
        for group in groups:
            if (category, which, group) in split:
                counts[split[category, which, group]] += 1
        new = [group for group in groups if (category, which, group) not in split]
        for group in sorted(new, key=lambda name: hashlib.sha256(name.encode()).digest()):
            total = sum(counts.values()) + 1
            chosen = max(shares, key=lambda s: (shares[s] * total - 10 * counts[s], -overall[category, s]))
            counts[chosen] += 1
            overall[category, chosen] += 1
            split[category, which, group] = chosen
    return [
        image
        if image.image_id in final
        else replace(image, split=split[image.category, side(image.split), image.group])
        for image in images
    ]
