"""The inner loop: which settings, near the present ones, teach the cheap proxy best.

A trial is a point of the space of :mod:`workflows.space`. Every trial gets a small probe of fresh samples;
only those that do no worse than the median of the trials before them get the larger one (successive halving,
one trial at a time). The real pictures are in two folds: each fold guides half of the trials and has its own
winner, which is then confirmed on the other fold with samples that no trial saw. Nothing is changed unless
the confirmed gain is beyond chance.

The search is a function of its rows (``trials.parquet``) and the seed: one that was cut goes on as if it had
not been.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from manifests.schema import canonical_json
from manifests.searching import Search
from training.intervals import Estimate
from training.proxy import Figures
from workflows.space import at_place, place_of, plain

SMALL, LARGE = 1, 3  # shards of the probe: of every trial, of the better half
REACH = 0.35  # of a setting's limits, the furthest a number moves in one round
STEP = 0.25  # of its limits: the moves that are tried one at a time
KEEP = 0.5  # share of the settings that a sampled trial takes from the best one so far
ALARMS = (1.25, 0.01)  # false positives that a winner may have: factor, and a little more
COST = 2.0  # that a winner may have, a factor
SURE = 0.05  # level of the one-sided test of either fold's winner: of both together, twice that
QUANTITY = "the mean of pixel AP and AUPRO (image AP without masks)"  # of training.proxy.gain, in words

Point = Mapping[str, Any]


@dataclass(frozen=True)
class Trial:
    """A row of ``trials.parquet``: one point on one probe.

    Attributes:
        trial: number of the point. origin: where it comes from: ``current``, ``rule``, ``move`` (one setting
            or range), ``combined`` (the moves that gained), ``sampler``. fold: whose pictures it was chosen
            by; -1: none. shards: of the probe. params: the values that differ from the present ones, as JSON.
            figures: on either fold. cost: seconds a sample.
    """

    trial: int
    origin: str
    fold: int
    shards: int
    params: str
    figures: tuple[Figures, Figures]
    cost: float
    seconds: float

    @cached_property
    def values(self) -> dict[str, Any]:
        return json.loads(self.params)

    def objectives(self, fold: int) -> tuple[float, float, float, float]:
        """What is maximised: pixel AP, AUPRO, less false positives, less cost."""
        found = self.figures[fold]
        return found.pixel_ap, found.aupro, -found.false_positives, -self.cost


Measure = Callable[[Point, int], tuple[tuple[Figures, Figures], float]]
"""``(values, shards)`` to the figures of both folds and the cost a sample."""


def search(
    measure: Measure,
    space: Mapping[str, Search],
    present: Point,
    rules: Sequence[Point],
    *,
    trials: int,
    seed: int,
    round_: int,
    earlier: Sequence[Trial] = (),
    keep: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """All rows of a search; ``earlier`` ones are not measured again.

    Args:
        present: the values at present; trials are near them (``REACH``).
        rules: for each fold, what its errors ask for.
        keep: called with each new row.
    """
    rows = {(row.trial, row.shards): row for row in earlier}

    def row(at: int, origin: str, fold: int, values: Point, shards: int) -> Trial:
        if (at, shards) not in rows:
            started = time.perf_counter()
            figures, cost = measure(values, shards)
            params = canonical_json(dict(values))
            made = Trial(at, origin, fold, shards, params, figures, cost, time.perf_counter() - started)
            rows[at, shards] = made
            keep(made)
        return rows[at, shards]

    moves = _moves(space, present)[: trials // 2]
    planned: list[tuple[str, int, Point]] = [("current", -1, {})]
    planned += [("rule", fold, _within(space, present, values)) for fold, values in enumerate(rules)]
    planned += [("move", -1, values) for values in moves]
    small: list[Trial] = []
    for at in range(trials):
        if at < len(planned):
            origin, fold, values = planned[at]
        elif at < len(planned) + 2:
            origin, fold = "combined", (at - len(planned)) % 2
            values = _combined(small, fold, space, present)
        else:
            origin, fold = "sampler", (at - len(planned)) % 2
            values = _sampled(small, fold, space, present, (seed, round_, at))
        done = row(at, origin, fold, values, SMALL)
        if at == 0 and not all(math.isfinite(found.score) for found in done.figures):
            return []  # nothing to judge by, or to confirm by
        small.append(done)
        if any(_promising(small, done, k) for k in ((0, 1) if fold < 0 else (fold,))):
            row(at, origin, fold, values, LARGE)
    return [rows[key] for key in sorted(rows)]


def _promising(small: Sequence[Trial], done: Trial, fold: int) -> bool:
    scores = [trial.figures[fold].score for trial in small]
    return len(small) == 1 or bool(done.figures[fold].score >= np.nanmedian(scores))


def _moves(space: Mapping[str, Search], present: Point) -> list[Point]:
    """One setting at a time: a share doubled or so, a range shifted, either way; shares first."""
    result: list[Point] = []
    shares = [path for path in space if path.startswith("generators.") and path.endswith(".share")]
    for path in shares:
        result.append({path: _moved(space[path], present[path], STEP)})
    ranges = [p for p in space if p.endswith(".low") and p.count(".") == 1 and f"{p[:-3]}high" in space]
    for path in ranges:
        stem = path.removesuffix("low")
        for step in (-STEP, STEP):
            result.append({p: _moved(space[p], present[p], step) for p in (f"{stem}low", f"{stem}high")})
    return [move for move in result if any(move[path] != present[path] for path in move)]


def _moved(search: Search, value: Any, step: float) -> Any:
    return at_place(search, min(max(place_of(search, value) + step, 0.0), 1.0))


def _within(space: Mapping[str, Search], present: Point, values: Point) -> Point:
    """Values no further from the present ones than ``REACH``."""
    result = {}
    for path, value in values.items():
        search = space[path]
        if not search.choices:
            step = place_of(search, value) - place_of(search, present[path])
            value = (
                plain(search, value)
                if abs(step) <= REACH
                else _moved(search, present[path], float(np.clip(step, -REACH, REACH)))
            )
        result[path] = value
    return {path: value for path, value in result.items() if value != present[path]}


def _combined(small: Sequence[Trial], fold: int, space: Mapping[str, Search], present: Point) -> Point:
    """All moves that gained on a fold together; of two that change the same setting, the better one."""
    base = small[0].figures[fold].score
    better = [t for t in small if t.origin == "move" and t.figures[fold].score > base]
    result: dict[str, Any] = {}
    for trial in sorted(better, key=lambda t: (t.figures[fold].score, t.trial)):
        result |= trial.values
    return _within(space, present, result)


def _sampled(
    small: Sequence[Trial],
    fold: int,
    space: Mapping[str, Search],
    present: Point,
    seeds: tuple[int, int, int],
) -> Point:
    """What Optuna's multi-objective sampler proposes after the trials of a fold, half of it exchanged for the
    best trial's values: of many settings at once, most would be changed to no purpose (inference)."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed, round_, at = seeds
    sampler_seed, mix_seed = np.random.SeedSequence(seed, spawn_key=(round_, at)).generate_state(2)
    known = [
        trial for trial in small if trial.fold in (fold, -1) and math.isfinite(trial.figures[fold].score)
    ]
    distributions: dict[str, Any] = {}
    for path, search in space.items():
        if search.choices:
            names = [canonical_json(choice) for choice in search.choices]
            distributions[path] = optuna.distributions.CategoricalDistribution(names)
        else:
            places = [place_of(search, {**present, **trial.values}[path]) for trial in known]
            here = place_of(search, present[path])
            low, high = max(0.0, here - REACH), min(1.0, here + REACH)
            distributions[path] = optuna.distributions.FloatDistribution(
                min([low, *places]), max([high, *places])
            )
    study = optuna.create_study(
        directions=["maximize"] * 4,
        sampler=optuna.samplers.TPESampler(seed=int(sampler_seed), n_startup_trials=8, multivariate=True),
    )
    for trial in known:
        point = {**present, **trial.values}
        params = {path: _named(search, point[path]) for path, search in space.items()}
        study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=distributions, values=list(trial.objectives(fold))
            )
        )
    asked = study.ask(distributions).params
    best = max(known, key=lambda trial: (trial.figures[fold].score, -trial.trial)).values
    kept = np.random.default_rng(mix_seed).random(len(space)) < KEEP
    result = {}
    for (path, search), keep in zip(space.items(), kept, strict=True):
        if keep:
            result[path] = best.get(path, present[path])
        else:
            value = asked[path]
            result[path] = json.loads(value) if search.choices else at_place(search, value)
    return {
        path: value
        for path, value in result.items()
        if _named(space[path], value) != _named(space[path], present[path])
    }


def _named(search: Search, value: Any) -> Any:
    """A value as the study knows it."""
    return canonical_json(value) if search.choices else place_of(search, value)


def winner(rows: Sequence[Trial], fold: int) -> Trial:
    """The best trial of a fold: of those on the large probe's Pareto front over pixel AP, AUPRO, false
    positives and cost, that with the highest mean of pixel AP and AUPRO, among those whose false positives
    are at most a quarter above the present settings' and whose samples cost at most twice as much."""
    mine = [row for row in rows if row.shards == LARGE and row.fold in (fold, -1)]
    current = mine[0]
    alarms = ALARMS[0] * current.figures[fold].false_positives + ALARMS[1]
    allowed = [
        row
        for row in mine
        if row is current or (row.figures[fold].false_positives <= alarms and row.cost <= COST * current.cost)
    ]
    allowed = [row for row in allowed if math.isfinite(row.figures[fold].score)] or [current]
    front = [row for row in allowed if not any(_dominates(other, row, fold) for other in mine)]
    return max(front or [current], key=lambda row: (row.figures[fold].score, -row.trial))


def _dominates(one: Trial, other: Trial, fold: int) -> bool:
    pairs = list(zip(one.objectives(fold), other.objectives(fold), strict=True))
    return all(a >= b for a, b in pairs) and any(a > b for a, b in pairs)


@dataclass(frozen=True)
class Verdict:
    """What the search came to.

    Attributes:
        values: to be applied; empty: the settings stay.
        reason: in words. short: of the same, for each setting's own decision.
    """

    values: Point
    reason: str
    short: str


def verdict(
    rows: Sequence[Trial], confirm: Callable[[Point, int], Estimate], *, labelled: bool = True
) -> Verdict:
    """The winner to apply, or none.

    Each fold's winner is tested once, one-sided: its gain must be above 0 in all but ``SURE`` of the
    resamples.

    Args:
        confirm: ``(values, fold)`` to the gain over the present settings on that fold's pictures, with fresh
            samples.
        labelled: whether these are real; else they are samples of the round.
    """
    if not rows:
        return Verdict({}, "the proxy had nothing to judge by", "nothing to judge by")
    count = len({row.trial for row in rows})
    sure: list[tuple[float, Trial, str]] = []
    doubts = []
    for fold in (0, 1):
        best = winner(rows, fold)
        if not best.values:
            doubts.append(f"none of {count} trials beat the present settings on fold {fold}")
            continue
        found = confirm(best.values, 1 - fold)
        resamples = found.resamples[~np.isnan(found.resamples)]
        low = float(np.quantile(resamples, SURE)) if resamples.size else -math.inf
        judged = "pictures" if labelled else "samples"
        words = (
            f"trial {best.trial} ({best.origin}), the best of fold {fold}, gains {found.value:+.3f} in "
            f"{QUANTITY} on the other fold's {judged} (at least {low:+.3f} by a one-sided test at "
            f"{SURE:.2%}, one for either fold)"
        )
        if not resamples.size:
            few = "parts with defects" if labelled else "pictures with samples"
            doubts.append(f"the other fold has too few {few} to confirm the best of fold {fold}")
        elif low > 0:
            sure.append((low, best, words))
        else:
            doubts.append(f"{words}: no more than chance")
    if not sure:
        return Verdict({}, "; ".join(doubts), "no trial was confirmed")
    _, best, words = max(sure, key=lambda item: item[0])
    return Verdict(best.values, f"of {count} trials, {words}", f"as trial {best.trial} has it")
