"""What a round's figures change in the next round's settings, and why.

A change is a :class:`Move`: a few numbers in [−1, 1] that tilt the wanted areas, the severities and the mix.
A deterministic rule proposes one from what the detector missed; trials on the cheap proxy then compare it
with the present settings and with moves near it; the best is applied. The trials refine the rule and cannot
overrule it by far: they know the pictures at hand, the rule knows the detector. Pictures of the ``test``
split never come here.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from manifests.schema import canonical_json
from workflows.config import Generation

SIGNIFICANT = 1.64  # |z| below which a difference between found and missed counts as chance
AREA_LIMITS = (0.0003, 0.3)
SHIFT = 0.35  # of a range's width, the most a range moves in one round
SHARE_FACTOR = 2.5  # the most a share is multiplied or divided by in one round
SHARE_LIMITS = (0.04, 0.7)
FEW_MISSED = 8  # shares move at half strength when so many defects were missed
FEW_GROUPS = 8  # parts with masked defects below which nothing is concluded from sizes or contrasts
MARGIN = 0.005  # of the objective; a smaller gain of a trial counts as noise
REACH = 0.35  # how far from the rule's proposal a trial may go, each number


@dataclass(frozen=True)
class Found:
    """One real defect of the feedback split and whether the detector found it.

    ``group`` names the part it is on: defects of one part are no independent evidence. ``area`` is its share
    of the picture and ``contrast`` its difference to the surroundings in units of their local variation; both
    NaN where there is no mask. ``hit`` is in [0, 1]: the share of it above the alarm threshold.
    """

    category: str
    group: str
    area: float
    contrast: float
    hit: float


@dataclass(frozen=True)
class Move:
    """A change of settings; every number is in [−1, 1] and 0 changes nothing.

    ``area`` > 0 asks for larger defects, ``severity`` > 0 for stronger ones; ``shares`` > 0 for more of a
    generator.
    """

    area: float = 0.0
    severity: float = 0.0
    shares: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        return {
            "area": self.area,
            "severity": self.severity,
            **{f"share.{k}": v for k, v in self.shares.items()},
        }

    @staticmethod
    def from_dict(values: Mapping[str, float]) -> Move:
        shares = {k.removeprefix("share."): v for k, v in values.items() if k.startswith("share.")}
        return Move(values["area"], values["severity"], shares)


@dataclass(frozen=True)
class Decision:
    """A row of ``decisions.parquet``."""

    setting: str
    before: str
    after: str
    reason: str


def propose(found: Sequence[Found], learnable: Mapping[str, float]) -> tuple[Move, dict[str, str]]:
    """The rule: a move and, by setting, the reason in words.

    Args:
        found: the real defects of the feedback split.
        learnable: by generator, the share of the *missed* defects that the proxy finds when it learns from
            that generator alone (missed and learnable gets more).

    Areas and severities follow the difference between missed and found defects, if it is larger than chance
    explains; what the detector already finds, or nobody learns, changes nothing.
    """
    reasons = {}
    area, reasons["area"] = _tilt(found, "area", "size")
    severity, reasons["severity"] = _tilt(found, "contrast", "contrast")
    missed = sum(1 for item in found if item.hit < 0.5)
    trust = missed / (missed + FEW_MISSED)
    shares = {}
    mean = float(np.mean(list(learnable.values()))) if learnable else 0.0
    for name, value in learnable.items():
        shares[name] = float(np.clip(2 * trust * (value - mean), -1, 1))
        reasons[f"share.{name}"] = (
            f"learning from {name} alone, the proxy finds {value:.0%} of the {missed} missed defects "
            f"(mean of the generators {mean:.0%})"
            if missed
            else "nothing was missed"
        )
    return Move(area, severity, shares), reasons


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


def apply_move(generation: Generation, move: Move) -> Generation:
    """The settings after a move; the same settings after none. Ranges keep their width on their scale unless
    a limit stops them, and present values beyond a limit stay allowed."""
    if not any(move.as_dict().values()):
        return generation
    smallest = math.log(min(AREA_LIMITS[0], generation.area[0]))
    largest = math.log(max(AREA_LIMITS[1], generation.area[1]))
    low, high = (math.log(value) for value in generation.area)
    step = SHIFT * move.area * max(high - low, 0.5)
    area = tuple(float(np.exp(np.clip(value + step, smallest, largest))) for value in (low, high))
    step = SHIFT * move.severity * max(generation.severity[1] - generation.severity[0], 0.2)
    severity = tuple(float(np.clip(value + step, 0, 1)) for value in generation.severity)
    used = {name: s.share for name, s in generation.generators.items() if s.share > 0}
    before = {name: share / sum(used.values()) for name, share in used.items()}
    moved = {name: share * SHARE_FACTOR ** move.shares.get(name, 0.0) for name, share in before.items()}
    total = sum(moved.values())
    shares = {
        name: float(
            np.clip(value / total, min(SHARE_LIMITS[0], before[name]), max(SHARE_LIMITS[1], before[name]))
        )
        for name, value in moved.items()
    }
    generators = {
        name: settings.model_copy(update={"share": round(shares.get(name, 0.0), 4)})
        for name, settings in generation.generators.items()
    }
    return generation.model_copy(
        update={
            "area": tuple(round(value, 6) for value in area),
            "severity": tuple(round(value, 4) for value in severity),
            "generators": generators,
        }
    )


def sample_weights(
    generation: Generation, move: Move, generators: np.ndarray, areas: np.ndarray, severities: np.ndarray
) -> np.ndarray:
    """How much each sample at hand weighs if the settings moved: float64 S, mean 1.

    ``areas`` and ``severities`` are the wanted ones; a tilt weighs a sample by its place in the range, from
    exp(−2·tilt) at the low end to exp(2·tilt) at the high end.
    """

    def place(values: np.ndarray, low: float, high: float) -> np.ndarray:
        return np.clip((values - low) / max(high - low, 1e-9), 0, 1) * 2 - 1

    low, high = np.log(generation.area)
    tilt = 2 * move.area * place(np.log(areas), low, high)
    tilt = tilt + 2 * move.severity * place(severities, *generation.severity)
    share = np.array([move.shares.get(name, 0.0) for name in generators]) * math.log(SHARE_FACTOR)
    weights = np.exp(tilt + share)
    return weights / weights.mean()


@dataclass(frozen=True)
class Trial:
    """A row of ``trials.parquet``."""

    trial: int
    origin: str
    params: str
    value: float
    seconds: float


def search(
    value_of: Callable[[Move], float],
    proposal: Move,
    names: Sequence[str],
    *,
    trials: int,
    seed: int,
    round_: int,
    earlier: Sequence[Trial] = (),
    keep: Callable[[Trial], None] = lambda trial: None,
) -> list[Trial]:
    """Compares the present settings, the rule's proposal and moves that a sampler draws.

    The study is rebuilt from ``earlier`` (rows of ``trials.parquet``) and nothing else; the sampler is seeded
    from the root seed, the round and the number of trials, so a search that was cut goes on as if it had not
    been. ``keep`` is called after each trial.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rule = Move(proposal.area, proposal.severity, {name: proposal.shares.get(name, 0.0) for name in names})
    # Wide enough to hold the present settings (all 0), which every study starts from.
    space: dict[str, Any] = {
        name: optuna.distributions.FloatDistribution(
            max(-1.0, min(0.0, value - REACH)), min(1.0, max(0.0, value + REACH))
        )
        for name, value in rule.as_dict().items()
    }
    done = list(earlier)
    while len(done) < trials:
        at = len(done)
        started = time.perf_counter()
        sampler_seed = np.random.SeedSequence(seed, spawn_key=(round_, at)).generate_state(1)[0]
        study = optuna.create_study(
            direction="maximize",
            sampler=optuna.samplers.TPESampler(seed=int(sampler_seed), n_startup_trials=8, multivariate=True),
        )
        for trial in done:
            params = {name: float(value) for name, value in json.loads(trial.params).items()}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=trial.value))
        if at == 0:
            origin, move = "current", Move(shares=dict.fromkeys(names, 0.0))
        elif at == 1:
            origin, move = "rule", rule
        else:
            origin, move = "sampler", Move.from_dict(study.ask(space).params)
        value = value_of(move)
        if not math.isfinite(value):
            break  # nothing to judge by
        trial = Trial(at, origin, canonical_json(move.as_dict()), value, time.perf_counter() - started)
        done.append(trial)
        keep(trial)
    return done


def decide(
    generation: Generation, trials: Sequence[Trial], proposal: Move, reasons: Mapping[str, str]
) -> tuple[Generation, list[Decision]]:
    """Settings of the next round and the reason of every change.

    The best trial is taken if it gains at least ``MARGIN`` over the present settings. Otherwise the rule's
    proposal is, unless the proxy finds it worse by as much; then everything stays. Without trials (nothing
    to judge by) the rule's proposal is applied as it is.
    """
    move, verdict = _chosen(trials, proposal)
    after = apply_move(generation, move)
    total = sum(settings.share for settings in generation.generators.values())
    rows = [
        (name, name, str(list(getattr(generation, name))), str(list(getattr(after, name))))
        for name in ("area", "severity")
    ]
    new_total = sum(settings.share for settings in after.generators.values())
    rows += [
        (
            f"generators.{name}.share",
            f"share.{name}",
            f"{generation.generators[name].share / total:.4f}",
            f"{settings.share / new_total:.4f}",
        )
        for name, settings in after.generators.items()
        if settings.share > 0
    ]
    asked, taken = proposal.as_dict(), move.as_dict()
    decisions = [
        Decision(
            setting,
            before,
            then,
            f"{reasons.get(key, 'no rule')}; the rule asks for {asked.get(key, 0.0):+.2f}, "
            f"taken is {taken.get(key, 0.0):+.2f}: {verdict}",
        )
        for setting, key, before, then in rows
    ]
    return after, decisions


def _chosen(trials: Sequence[Trial], proposal: Move) -> tuple[Move, str]:
    if not trials:
        return proposal, "the proxy had nothing to judge by"
    best = max(trials, key=lambda trial: (trial.value, -trial.trial))
    current, rule = trials[0].value, trials[min(1, len(trials) - 1)].value
    if best.value - current >= MARGIN:
        move = Move.from_dict(json.loads(best.params))
        return move, f"best of {len(trials)} proxy trials, {best.value:.4f} against {current:.4f} at present"
    if current - rule >= MARGIN:
        return (
            Move(),
            f"the proxy finds the rule worse, {rule:.4f} against {current:.4f}, and no trial better",
        )
    return proposal, f"no proxy trial differs from the present settings ({current:.4f}) by {MARGIN} or more"
