"""Which texts of a prompt bank are drawn more often: a bandit over its prompts and details.

No trial makes samples of a generator that draws by words, for it is slow: what a round made is all there is
to learn from. So each defect's prompts, and its details, are the arms of a bandit, and a round's samples are
its pulls. The shares are multiplied by what their samples are worth (the multiplicative weights of Freund &
Schapire 1997, "A decision-theoretic generalization of on-line learning", with the round's mean worths as
gains): they carry all that earlier rounds found, and the limits leave every text some draws. Worth, trust and
the constants are inference.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from manifests.wording import Prompts
from manifests.workspace import Workspace
from training.matching import likeness
from workflows.config import Generation
from workflows.probing import Ground
from workflows.rounds import accepted_samples, sample_rows
from workflows.rules import FACTOR, Decision

PULLS = 5  # samples of a text, or nothing is said of it
TRUST = 8  # samples at which a text's worth counts half
LEAST, MOST = 0.2, 5.0  # share of a text, beside a mean of 1
UNKNOWN = 0.5  # worth of an accepted sample where no real defect can be compared


@dataclass(frozen=True)
class Pulled:
    """What a round's samples of one text were worth.

    Attributes:
        samples: how many were judged.
        worth: their mean, in [0, 1]: how near they lie to real defects of their category, as a rank among the
            round's accepted samples of it, times the draws that were accepted.
    """

    samples: int
    worth: float


def steer_texts(space: Workspace, ground: Ground, after: Generation) -> tuple[Generation, list[Decision]]:
    """The settings with each prompt and detail drawn as often as its samples of this round were worth, and a
    decision for each defect in which that changes anything."""
    prompts = ground.round_.prompts
    if not prompts:
        return after, []
    ranks = _ranks(ground)
    rows = sample_rows(space, ground.round_.number)
    kept = {row["sample_id"] for row in accepted_samples(space, ground.round_.number)}
    generators, decisions = dict(after.generators), []
    for name, bank in prompts.items():
        shares = dict(generators[name].texts)
        own = [row for row in rows if row["generator"] == name]
        for defect, fields in _by_text(bank, own).items():
            changes = []
            for by_text in fields:
                pulled = {text: _pulled(drawn, kept, ranks) for text, drawn in by_text.items()}
                before = {text: shares.get(text, 1.0) for text in by_text}
                learned = from_worths(pulled, before)
                if learned != before:
                    shares |= learned
                    changes.append((before, learned, pulled))
            if changes:
                decisions.append(_decision(f"generators.{name}.texts.{defect}", changes))
        generators[name] = generators[name].model_copy(update={"texts": shares})
    return after.model_copy(update={"generators": generators}), decisions


def from_worths(pulled: Mapping[str, Pulled], present: Mapping[str, float]) -> dict[str, float]:
    """The shares of the texts of one defect's prompts, or of its details; of the same sum, but for limits.

    A text of more than the mean worth of all is drawn up to ``FACTOR`` times as often as before, the surer
    the more samples say so. One of fewer than ``PULLS`` samples keeps its share; where fewer than two have as
    many, all do, and so does one of share 0.
    """
    known = _known(pulled)
    if len(known) < 2:
        return dict(present)
    mean = float(np.mean([own.worth for own in known.values()]))
    shares = dict(present)
    for text, own in known.items():
        trust = own.samples / (own.samples + TRUST)
        shares[text] *= FACTOR ** float(np.clip(2 * trust * (own.worth - mean), -1, 1))
    scale = sum(present.values()) / sum(shares.values())
    return {text: _limited(scale * share, present[text]) for text, share in shares.items()}


def _known(pulled: Mapping[str, Pulled]) -> dict[str, Pulled]:
    return {text: own for text, own in pulled.items() if own.samples >= PULLS}


def _limited(share: float, before: float) -> float:
    """Of three digits, within the limits, which give way to what a user has set beyond them."""
    return float(f"{min(max(share, min(LEAST, before)), max(MOST, before)):.3g}")


Row = Mapping[str, Any]


def _by_text(bank: Prompts, rows: Sequence[Row]) -> dict[str, tuple[dict[str, list[Row]], ...]]:
    """By defect: of its prompts, then of its details, the rows that each text worded."""
    found: dict[str, tuple[dict[str, list[Row]], ...]] = {}
    for entry in bank.entries:
        fields = found.setdefault(entry.defect, ({}, {}))
        for by_text, texts in zip(fields, (entry.prompts, entry.details), strict=True):
            by_text.update((text, []) for text in texts)
    for row in rows:
        texts = bank.templates(row["category"], row["defect"], row["prompt"], row["detail"])
        for by_text, text in zip(found.get(row["defect"], ()), texts, strict=False):
            if text in by_text:
                by_text[text].append(row)
    return found


def _ranks(ground: Ground) -> dict[str, float]:
    """By sample_id, of the accepted samples that the proxy read: the share of those of its category that are
    less like real defects, half of its equals counted; ``UNKNOWN`` where there is nothing to compare."""
    ranks = {recipe["sample_id"]: UNKNOWN for recipe in ground.recipes}
    for category, real in ground.real.items():
        own = [k for k, recipe in enumerate(ground.recipes) if recipe["category"] == category]
        near = likeness(real.directions, real.groups, ground.directions[own])
        below = (near[:, None] > near).mean(axis=1) + 0.5 * (near[:, None] == near).mean(axis=1)
        ranks |= {ground.recipes[k]["sample_id"]: float(rank) for k, rank in zip(own, below, strict=True)}
    return ranks


def _pulled(rows: Sequence[Row], kept: Collection[str], ranks: Mapping[str, float]) -> Pulled:
    """Of the rows that one text worded, rejected ones among them; ``kept`` names the accepted ones."""
    judged = [ranks[row["sample_id"]] for row in rows if row["sample_id"] in ranks]
    draws = sum(row["attempts"] for row in rows)
    accepted = sum(row["sample_id"] in kept for row in rows) / draws if draws else 0.0
    return Pulled(len(judged) or len(rows), accepted * float(np.mean(judged or [UNKNOWN])))


def _decision(
    setting: str, changes: Sequence[tuple[Mapping[str, float], Mapping[str, float], Mapping[str, Pulled]]]
) -> Decision:
    before, after = (
        "; ".join(", ".join(f"{share:g}" for share in change[at].values()) for change in changes)
        for at in (0, 1)
    )
    told = []
    for _, _, pulled in changes:
        known = _known(pulled)
        ends = [f(known, key=lambda text: known[text].worth) for f in (max, min)]
        words = [f"{known[text].worth:.2f} for {text!r} ({known[text].samples} samples)" for text in ends]
        told.append(" against ".join(words))
    return Decision(
        setting,
        before,
        after,
        "samples accepted, times their likeness to real defects (0 to 1, 0.5 where none is labelled): "
        + "; ".join(told),
    )
