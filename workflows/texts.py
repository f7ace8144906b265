"""Which texts of a prompt bank are drawn more often: a bandit over its prompts and details.

No trial makes samples of a generator that draws by words, for it is slow: what a round made is all there is
to learn from. So each defect's prompts, and its details, are the arms of a bandit, and a round's samples are
its pulls. The shares are multiplied by what their samples are worth (the multiplicative weights of Freund &
Schapire 1997, "A decision-theoretic generalization of on-line learning", with the round's mean worths as
gains): they carry all that earlier rounds found, and the limits leave every text some draws. Worth, trust and
the constants are inference.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from manifests.wording import Prompts, Wording
from manifests.workspace import Workspace
from training.matching import likeness
from workflows.config import Generation
from workflows.probing import Ground
from workflows.rounds import sample_rows, vetoes
from workflows.rules import FACTOR, Decision

PULLS = 5  # recipes of a text, or nothing is said of it
TRUST = 8  # recipes at which a text's worth counts half
LEAST, MOST = 0.2, 5.0  # of a share
UNKNOWN = 0.5  # rank of a sample that no real defect can be compared with
PRIOR = 5  # samples of that rank that count beside a text's own
ROUNDED = 0.005  # of a share: a smaller change is none

Row = Mapping[str, Any]
ByText = dict[str, list[Row]]


@dataclass(frozen=True)
class Pulled:
    """What a round's recipes of one text were worth.

    Attributes:
        recipes: how many there were.
        worth: in [0, 1]: the accepted share of their draws, times how near the samples lie to real defects of
            their category, as a mean rank among the round's samples of it.
    """

    recipes: int
    worth: float

    @property
    def known(self) -> bool:
        return self.recipes >= PULLS


def steer_texts(space: Workspace, ground: Ground, after: Generation) -> tuple[Generation, list[Decision]]:
    """The settings with each prompt and detail drawn as often as its samples of this round were worth, and a
    decision for each entry of a bank in which that changes anything."""
    banks = {name: b for name, b in ground.round_.prompts.items() if after.generators[name].share > 0}
    if not banks:
        return after, []
    ranks, vetoed = _ranks(ground), vetoes(space)
    rows = [row for row in sample_rows(space, ground.round_.number) if row["generator"] in banks]
    generators, decisions = dict(after.generators), []
    for name, bank in banks.items():
        shares = dict(generators[name].texts)
        own = (row for row in rows if row["generator"] == name)
        for entry, fields in _by_text(bank, own).items():
            pulled = [{t: _pulled(drawn, vetoed, ranks) for t, drawn in one.items()} for one in fields]
            before = [{text: shares.get(text, 1.0) for text in one} for one in fields]
            learned = [from_worths(*pair) for pair in zip(pulled, before, strict=True)]
            if learned != before:
                of = f" of {', '.join(entry.categories)}" if entry.categories else ""
                setting = f"generators.{name}.texts.{entry.defect}{of}"
                decisions.append(Decision(setting, _told(before), _told(learned), _reason(pulled)))
                for new, old in zip(learned, before, strict=True):
                    shares |= {text: share for text, share in new.items() if share != old[text]}
        generators[name] = generators[name].model_copy(update={"texts": shares})
    return after.model_copy(update={"generators": generators}), decisions


def from_worths(pulled: Mapping[str, Pulled], present: Mapping[str, float]) -> dict[str, float]:
    """The shares of the prompts, or of the details, of one entry; of the same sum, but for limits.

    A text of more than the mean worth of all is drawn up to ``FACTOR`` times as often as before, beside the
    others, the surer the more recipes say so. One of fewer than ``PULLS`` keeps its share; where fewer than
    two have as many, all do, and so does one of share 0.
    """
    known = {text: own for text, own in pulled.items() if own.known and present[text] > 0}
    if len(known) < 2:
        return dict(present)
    mean = float(np.mean([own.worth for own in known.values()]))
    moved = {}
    for text, own in known.items():
        trust = own.recipes / (own.recipes + TRUST)
        moved[text] = present[text] * FACTOR ** float(np.clip(2 * trust * (own.worth - mean), -1, 1))
    scale = sum(present[text] for text in known) / sum(moved.values())
    return {**present, **{text: _limited(scale * share, present[text]) for text, share in moved.items()}}


def _limited(share: float, before: float) -> float:
    """Of three digits, within the limits, which give way to what a user has set beyond them."""
    share = min(max(share, min(LEAST, before)), max(MOST, before))
    return before if abs(share / before - 1) < ROUNDED else float(f"{share:.3g}")


def _by_text(bank: Prompts, rows: Iterable[Row]) -> dict[Wording, tuple[ByText, ByText]]:
    """By entry: of its prompts, and of its details, the rows that each worded. Entries of one defect for
    other categories are apart, for they are never drawn beside each other."""
    found: dict[Wording, tuple[ByText, ByText]] = {
        entry: ({text: [] for text in entry.prompts}, {text: [] for text in entry.details})
        for entry in bank.entries
    }
    for row in rows:
        worded = bank.source(row["category"], row["defect"], row["prompt"], row["detail"])
        if worded is not None:
            entry, prompt, detail = worded
            found[entry][0][prompt].append(row)
            found[entry][1][detail].append(row)
    return found


def _ranks(ground: Ground) -> dict[str, float]:
    """By sample_id, of the samples that the proxy read: the share of those of its category that are less
    like real defects, half of its equals counted; without categories where there is nothing to compare."""
    ranks: dict[str, float] = {}
    for category, real in ground.real.items():
        own = [k for k, recipe in enumerate(ground.recipes) if recipe["category"] == category]
        if own:
            near = likeness(real.directions, real.groups, ground.directions[own])
            below = (near[:, None] > near).mean(axis=1) + 0.5 * (near[:, None] == near).mean(axis=1)
            ranks |= {ground.recipes[k]["sample_id"]: float(r) for k, r in zip(own, below, strict=True)}
    return ranks


def _pulled(rows: Sequence[Row], vetoed: Collection[str], ranks: Mapping[str, float]) -> Pulled:
    """Of the rows that one text worded, rejected ones among them."""
    judged = [ranks[row["sample_id"]] for row in rows if row["sample_id"] in ranks]
    rank = (sum(judged) + PRIOR * UNKNOWN) / (len(judged) + PRIOR)
    kept = sum(row["status"] == "accepted" and row["sample_id"] not in vetoed for row in rows)
    return Pulled(len(rows), rank * kept / max(1, sum(row["attempts"] for row in rows)))


def _told(shares: Sequence[Mapping[str, float]]) -> str:
    fields = [", ".join(f"{share:g}" for share in own.values()) for own in shares]
    return f"prompts {fields[0]}; details {fields[1]}"


def _reason(pulled: Sequence[Mapping[str, Pulled]]) -> str:
    """The best and the worst text of either field, where two are known."""
    told = []
    for own in pulled:
        known = sorted((one.worth, text) for text, one in own.items() if one.known)
        if len(known) > 1:
            ends = (known[-1], known[0])
            words = [f"{worth:.2f} for {text!r} ({own[text].recipes} recipes)" for worth, text in ends]
            told.append(" against ".join(words))
    what = "worth of a text's samples (accepted share, times likeness to real defects; 0 to 1)"
    return f"{what}: {'; '.join(told)}"
