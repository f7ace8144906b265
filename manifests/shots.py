"""The k-shot protocol: a run may use k normal pictures of each category and no other (core.md 2.3, 3.7)."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from manifests.layouts import Found, Problem
from manifests.schema import Image
from manifests.splits import side

Listed = tuple[int, Found]  # number of its source, and a picture there


def choose_shots(found: Sequence[Listed], shots: int, seed: int) -> list[Listed]:
    """The pictures of the test side, and ``shots`` of each category's train side, all of them in ``train``.

    It happens before any picture is read: what the others show cannot matter. The choice follows from the
    names of the category's own pictures and ``seed``; of one seed, fewer shots are among more.
    """
    categories: dict[str, list[Listed]] = defaultdict(list)
    for listed in found:
        if side(listed[1].split) == "train":
            categories[listed[1].category].append(listed)
    chosen = [listed for listed in found if side(listed[1].split) == "test"]
    for category, own in categories.items():
        own.sort(key=lambda listed: (listed[0], listed[1].relative))
        name = int.from_bytes(hashlib.sha256(category.encode()).digest()[:8], "big")
        order = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(name,))).permutation(len(own))
        picked = [own[place] for place in order[:shots]]
        chosen += [(source, replace(item, split="train", final=True)) for source, item in picked]
    return chosen


def missing_shots(images: Sequence[Image], shots: int) -> list[Problem]:
    """One error for each category in which some shot is wanting or cannot be used."""
    counts: dict[str, int] = dict.fromkeys((image.category for image in images), 0)
    for image in images:
        counts[image.category] += side(image.split) == "train"
    remedy = "lower shots, add normal pictures, or mend those that are named here"
    problems = []
    for category, count in sorted(counts.items()):
        if count < shots:
            what = f"the category has {count} usable normal pictures for {shots} shots"
            problems.append(Problem("error", category, what, remedy))
    return problems
