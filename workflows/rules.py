"""What a detector's errors ask for, without any trial: points of the search space, and the reasons in
words.

More of what is missed and can be learned, less of what is solved or never learned. With labelled defects
these points are two of the search's trials; without any, they are applied as they are.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from manifests.recipes import GeneratorSettings
from manifests.searching import Search
from workflows.space import at_place, place_of

SIGNIFICANT = 1.64  # |z| below which a difference between found and missed counts as chance
SHIFT = 0.3  # of the limits: the most that a range moves
FACTOR = 2.5  # the most that a share is multiplied or divided by
FEW_MISSED = 8  # shares move at half strength when so many defects were missed
FEW_GROUPS = 8  # parts with masked defects below which nothing is concluded from sizes or contrasts
MISSED = 0.5  # share of a defect above the alarm threshold below which it counts as missed

EASY, HIDDEN, OUTSIDE, ALIEN = 0.9, 0.6, 1.5, 2.0
"""Limits of :func:`synthetic_label`: detection AP, AUROC of the distances, distance outside the mask, and
distance inside it over that of the generators' median (inference: our own)."""
FADE = 0.4  # factor of the share of a generator that teaches nothing


@dataclass(frozen=True)
class Found:
    """One real defect of the feedback split and whether the detector found it.

    ``group`` names the part it is on: defects of one part are no independent evidence. ``area`` is its share
    of the picture and ``contrast`` its difference to the surroundings in units of their local variation; both
    NaN where there is no mask. ``hit`` is in [0, 1]: the share of it above the alarm threshold. ``learned``
    names the generators from which alone the proxy learns to find it; empty if there is none, or if that was
    not tried.
    """

    category: str
    defect: str
    group: str
    area: float
    contrast: float
    hit: float
    learned: frozenset[str] = frozenset()

    @property
    def missed(self) -> bool:
        return self.hit < MISSED


@dataclass(frozen=True)
class Decision:
    """A row of ``decisions.parquet``."""

    setting: str
    before: str
    after: str
    reason: str


def from_errors(
    found: Sequence[Found], space: Mapping[str, Search], present: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the errors ask for: values, and by setting (a range without its end) the reason.

    Areas and severities follow the difference between missed and found defects, if it is larger than chance
    explains. A generator's share follows how many of the missed defects the proxy learns from it; a
    category's, how many of its defects are missed and learned from some generator. What is already found, and
    what nobody learns, asks for nothing.
    """
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for setting, attribute, word in (("area", "area", "size"), ("severity", "contrast", "contrast")):
        tilt, reasons[setting] = _tilt(found, attribute, word)
        for path in (f"{setting}.low", f"{setting}.high"):
            if tilt and path in space:
                place = place_of(space[path], present[path]) + SHIFT * tilt
                values[path] = at_place(space[path], min(max(place, 0.0), 1.0))
    missed = [item for item in found if item.missed]
    trust = len(missed) / (len(missed) + FEW_MISSED)
    types = _types_in_words(found)
    names = [path.split(".")[1] for path in space if path.endswith(".share")]
    learned = {name: _share(name in item.learned for item in missed) for name in names}
    mean = float(np.mean(list(learned.values()))) if learned else 0.0
    for name, value in learned.items():
        path = f"generators.{name}.share"
        reasons[path] = (
            f"learning from {name} alone, the proxy finds {value:.0%} of the {len(missed)} missed defects "
            f"(mean of the generators {mean:.0%}); {types}"
            if missed
            else "nothing was missed"
        )
        values[path] = present[path] * FACTOR ** float(np.clip(2 * trust * (value - mean), -1, 1))
    categories = [path for path in space if path.startswith("categories.")]
    wanted = {path: _learnable_misses(found, path.removeprefix("categories.")) for path in categories}
    mean = float(np.mean(list(wanted.values()))) if wanted else 0.0
    for path, value in wanted.items():
        reasons[path] = (
            f"{value:.0%} of its defects are missed and learnable (mean of the categories {mean:.0%})"
        )
        values[path] = present[path] * FACTOR ** float(np.clip(2 * trust * (value - mean), -1, 1))
    return values, reasons


def _share(hits: Any) -> float:
    values = list(hits)
    return float(np.mean(values)) if values else 0.0


def _learnable_misses(found: Sequence[Found], category: str) -> float:
    own = [item for item in found if item.category == category]
    return _share(item.missed and bool(item.learned) for item in own)


def _types_in_words(found: Sequence[Found]) -> str:
    """Missed defects by type, those learned from no generator apart."""
    kinds = {
        "missed and learnable": Counter(i.defect for i in found if i.missed and i.learned),
        "never learned": Counter(i.defect for i in found if i.missed and not i.learned),
    }
    return "; ".join(
        f"{words}: " + ", ".join(f"{name} ({count})" for name, count in kind.most_common(4))
        for words, kind in kinds.items()
        if kind
    )


def _tilt(found: Sequence[Found], attribute: str, word: str) -> tuple[float, str]:
    """(tilt, reason): the correlation of a miss with log ``attribute``, 0 if chance explains it.

    One value a group (the means of its defects), compared within its category, so that neither many specks
    on one part nor one hard category pass for evidence.
    """
    parts: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for item in found:
        value = getattr(item, attribute)
        if value > 0:  # NaN and 0 say nothing
            parts.setdefault((item.category, item.group), []).append((math.log(value), item.hit))
    if len(parts) < FEW_GROUPS:
        return 0.0, f"{len(parts)} parts with masked defects: too few to judge by {word}"
    means = np.array([np.mean(rows, axis=0) for rows in parts.values()])
    names = [category for category, _ in parts]
    centred = means.copy()
    for name in set(names):
        own = [other == name for other in names]
        centred[own] -= means[own].mean(axis=0)
    values, hits = centred.T
    if values.std() < 1e-9 or hits.std() < 1e-9:
        return 0.0, f"found and missed defects do not differ in {word}"
    r = float(np.corrcoef(values, -hits)[0, 1])
    z = r * math.sqrt(max(len(parts) - len(set(names)), 1))
    typical = [math.exp(np.average(means[:, 0], weights=w + 1e-9)) for w in (1 - means[:, 1], means[:, 1])]
    facts = f"typical {word} of missed defects {typical[0]:.3g}, of found ones {typical[1]:.3g} (z {z:+.1f})"
    if abs(z) < SIGNIFICANT:
        return 0.0, f"{facts}: no more than chance"
    return float(np.clip(r, -1, 1)), facts


# -- what real defects look like ------------------------------------------------------------------------

ROUNDED = 0.01  # what values of three digits may be off


def from_matches(
    matched: Mapping[str, Mapping[str, float]],
    drawn: Mapping[str, GeneratorSettings],
    generators: Mapping[str, GeneratorSettings],
) -> tuple[dict[str, dict[str, float]], list[Decision]]:
    """How often each generator makes a sample of each category, beside its share; and a decision for each
    category whose mix changes. As many samples of a category are made as before.

    Args:
        matched: the shares of the generators, of sum 1, by category and name; a category of which nothing is
            concluded is not among them and stays as it is. A generator that makes none of one is not named.
        drawn: the generators with the settings of the round that was judged. generators: of the next.
    """
    mix = {name: own.share for name, own in generators.items() if own.share > 0}
    found = {name: dict(own.categories) for name, own in generators.items()}
    decisions = []
    for category in sorted({*matched, *(c for own in generators.values() for c in own.categories)}):
        before = {name: generators[name].categories.get(category, 1.0) for name in mix}
        shares = matched.get(category)
        wanted = before
        if shares is not None:
            wanted = {name: shares.get(name, 0.0) / share for name, share in mix.items()}
        volume = sum(mix[name] * value for name, value in wanted.items()) / sum(mix.values())
        scale = _volume(drawn, category) / volume if volume > 0 else 1.0
        if shares is None and abs(scale - 1) < ROUNDED:
            continue
        after = {name: float(f"{scale * value:.3g}") for name, value in wanted.items()}
        for name, value in after.items():
            found[name][category] = value
        if shares is not None:
            first = sorted(shares, key=lambda name: (-shares[name], name))[:3]
            told = ", ".join(f"{name} {shares[name]:.0%}" for name in first)
            reason = (
                f"asked for are {told}: three quarters as its real defects look, those of parts left out as "
                "well, and a quarter by the shares alone"
            )
            words = [", ".join(f"{name} {value:g}" for name, value in own.items()) for own in (before, after)]
            decisions.append(Decision(f"generators.*.categories.{category}", words[0], words[1], reason))
    return found, decisions


def _volume(generators: Mapping[str, GeneratorSettings], category: str) -> float:
    """How many samples of a category generators make, over what their shares alone would."""
    used = [own for own in generators.values() if own.share > 0]
    return sum(own.share * own.categories.get(category, 1.0) for own in used) / sum(own.share for own in used)


# -- without labelled anomalies -------------------------------------------------------------------------


@dataclass(frozen=True)
class Likeness:
    """What a generator's samples look like to the frozen features.

    Attributes:
        detection: pixel AP on its samples of a head that learned from the other families.
        inside, outside: mean distance of tokens inside and outside the masks to the nearest normal one, in
            units of what held-out normals have.
        told_apart: AUROC of that distance, tokens inside the masks against tokens of held-out normals.
    """

    detection: float
    inside: float
    outside: float
    told_apart: float


def synthetic_label(one: Likeness, typical: float) -> str:
    """``too easy``, ``too alien``, ``indistinguishable`` or ``useful``; ``typical``: the median of the
    generators' ``inside``."""
    if one.told_apart < HIDDEN:
        return "indistinguishable"
    if one.outside > OUTSIDE or one.inside > ALIEN * typical:
        return "too alien"
    return "too easy" if one.detection > EASY else "useful"


def from_likeness(
    found: Mapping[str, Likeness], present: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Without labelled anomalies: generators that teach nothing fade; values and reasons by setting."""
    typical = float(np.median([one.inside for one in found.values()])) if found else 0.0
    values, reasons = {}, {}
    for name, one in found.items():
        path = f"generators.{name}.share"
        label = synthetic_label(one, typical)
        reasons[path] = (
            f"no labelled real anomaly; its samples are {label}: a head of the other families reaches pixel "
            f"AP {one.detection:.2f} on them, tokens inside the mask are {one.inside:.1f} times as far from "
            f"normal as normals' own (median of the generators {typical:.1f}), {one.outside:.1f} times "
            f"outside it, AUROC against normals {one.told_apart:.2f}"
        )
        values[path] = present[path] * (1.0 if label == "useful" else FADE)
    return values, reasons


# -- false alarms on normals ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Alarm:
    """A normal picture of the train split in, or next to, whose places the detector sees an anomaly.

    Attributes:
        image_id: the picture that is drawn more often.
        excess: share of the alarming picture above the alarm threshold, over what the threshold's quantile
            lets expect; > 1.
        words: which picture alarmed, for the reason.
        nearest: the generator whose anomalies look most like the alarming place; empty: none is told.
    """

    image_id: str
    excess: float
    words: str
    nearest: str = ""


PER_PICTURE = "normals."  # begins the settings of decisions on single pictures; their image_id follows
MOST_HARD, HARD_FACTOR, HARD_EXCESS = 16, 4.0, 3.0  # pictures a round; most weight; least excess


def hard_normals(
    alarms: Sequence[Alarm], present: Mapping[str, float], own: Mapping[str, float]
) -> tuple[dict[str, float], dict[str, str], list[Decision]]:
    """Pictures drawn more often, the generators nearest to their alarms, and a decision each; weights that no
    alarm renews halve their distance to 1 and then go. ``own`` weights, of the configuration, stay."""
    worst: dict[str, Alarm] = {}
    for alarm in sorted(alarms, key=lambda alarm: (-alarm.excess, alarm.image_id)):
        if alarm.excess >= HARD_EXCESS and len(worst) < MOST_HARD and alarm.image_id not in own:
            worst.setdefault(alarm.image_id, alarm)
    weights, decisions = dict(own), []
    for image_id in [*worst, *(name for name in present if name not in worst and name not in own)]:
        before = present.get(image_id, 1.0)
        if image_id in worst:
            alarm = worst[image_id]
            after = round(min(HARD_FACTOR, max(before, alarm.excess / 2)), 2)
            reason = f"hard normal: {alarm.words}, {alarm.excess:.1f} times the alarming places of a normal"
            if alarm.nearest:
                reason += f"; the place looks most like an anomaly of {alarm.nearest}, which draws it most"
        else:
            after = round((1 + before) / 2, 2) if before > 1.5 else 1.0
            reason = (
                f"not among the {MOST_HARD} with the worst false alarms, of {HARD_EXCESS:g} times a normal's "
                "alarming places or more"
            )
        if after != 1.0:
            weights[image_id] = after
        decisions.append(Decision(f"{PER_PICTURE}{image_id}", f"{before:g}", f"{after:g}", reason))
    nearest = {image_id: alarm.nearest for image_id, alarm in worst.items() if alarm.nearest}
    return weights, nearest, decisions
