"""The feedback stage: a round's figures to the next round's settings, with trials on the cheap proxy."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from generation import registry
from manifests.errors import FlawsmithError, UsageError
from manifests.recipes import check_donors
from manifests.schema import DECISIONS, TRIALS, to_table
from manifests.searching import Search
from manifests.workspace import Workspace, round_file
from training import proxy
from training.components import label_components
from training.evaluation import map_shape, truth
from training.intervals import Estimate
from training.matching import matched
from training.metrics import pixel_metrics
from training.proxy import Figures
from workflows import history
from workflows.config import Generation
from workflows.console import progress, say
from workflows.detecting import warn_of_vetoes
from workflows.probing import (
    MOST_NORMALS,
    Ground,
    cost_of,
    directions_of,
    features_of,
    is_probed,
    judge_settings,
    prepare,
)
from workflows.rounds import open_round, write_settings
from workflows.rules import (
    HARD_EXCESS,
    MISSED,
    PER_PICTURE,
    Alarm,
    Decision,
    Found,
    Likeness,
    from_errors,
    from_likeness,
    from_matches,
    hard_normals,
)
from workflows.searching import COST, SURE, Point, Trial, Verdict, search, verdict
from workflows.space import ENDS, apply_values, numbers_of, present_values, search_space
from workflows.stages import Round, evenly, read_settings, traits_of
from workflows.stored import short_name, source_images
from workflows.texts import steer_texts

FALSE_ALARMS = 0.99  # quantile of normals above which the proxy counts something as found
TOO_DEAR = (
    f", but the mixes asked for would make a sample cost over {COST:g} times as much, this one not least"
)
MATCH = 4  # spawn key of what decides by chance whether a mix is matched
CONFIRM = range(4)  # shards of the probe that confirms a winner
RESAMPLES = 400  # of the groups, behind a confirmed gain
ROUNDING = 0.01  # of the mean distance of normals; what is nearer to the bank is in it
LEARNED_FROM = 64  # samples of a generator, evenly chosen, that its samples are judged by without anomalies


def feedback(space: Workspace, number: int) -> bool:
    """Writes the next round's settings, the trials and the decisions; whether it did: skipped if the next
    round is there.

    Raises:
        FlawsmithError: the round was not evaluated yet.
    """
    if space.exists(round_file(number + 1, "settings.yaml")):
        return False
    if not space.exists(round_file(number, "found.parquet")):
        raise FlawsmithError(f"round {number} was not evaluated yet: `flawsmith evaluate` does it")
    round_ = open_round(space, number)
    warn_of_vetoes(space, round_)
    _, _, first = read_settings(space, number)
    found_rows = space.read_table(round_file(number, "found.parquet")).to_pylist()
    with progress(f"round {number}: features for the proxy", None, "pictures") as advance:
        ground = prepare(space, round_, advance)
    plain = generation = spelled_out(round_.generation, ground.banks, ground.recipes)
    mixes: list[Decision] = []
    if ground.labelled:  # before the search, which looks for what is better than these mixes
        with progress(f"round {number}: samples beside real defects", None, "samples") as advance:
            generation, mixes = _as_matched(ground, plain, advance)
    settings = judgeable(search_space(generation), generation, round_)
    present = present_values(generation)
    if ground.labelled:
        found = _with_learned(round_, ground, found_rows)
        fold = _fold_of(ground)
        parts = [[f for f in found if fold.get((f.category, f.group), k) == k] for k in (0, 1)]
        rules: list[Point] = [from_errors(part, settings, present)[0] for part in parts]
        asked, reasons = from_errors(found, settings, present)
    else:
        rules = []
        asked, reasons = from_likeness(likeness(ground), present)
    result = Verdict({}, "feedback.trials is 0: nothing was searched for", "feedback.trials is 0")
    if round_.config.feedback.trials:
        result = _searched(space, ground, generation, settings, rules)
    values = dict(result.values)
    if not ground.labelled:  # nothing real contradicts the rule
        values |= {
            path: value * values.get(path, present[path]) / present[path] for path, value in asked.items()
        }
    after, decisions = decide(generation, values, asked, reasons, result)
    if ground.labelled:  # other shares would change how many samples of a category are made
        after, _ = _mixed(round_.generation, after, {})
    if after == plain:
        after = round_.generation
    after, texts = steer_texts(space, ground, after)
    hard, nearest, normals = hard_normals(
        _alarms(space, round_, ground), round_.generation.normals, round_.config.generation.normals
    )
    after = after.model_copy(update={"normals": hard, "nearest": nearest})
    decisions = [*mixes, *decisions, *texts, *normals]
    rows_out = [{"round": number, **asdict(decision)} for decision in decisions]
    space.write_table(round_file(number, "decisions.parquet"), to_table(rows_out, DECISIONS))
    write_settings(space, number + 1, round_.config, after, first=first)
    say(explain(space, number))
    return True


def _searched(
    space: Workspace,
    ground: Ground,
    generation: Generation,
    settings: Mapping[str, Search],
    rules: Sequence[Point],
) -> Verdict:
    """What the trials of a round come to; those that its table holds are not made again."""
    number, config = ground.round_.number, ground.round_.config
    trials_file = round_file(number, "trials.parquet")
    with progress(f"round {number}: trials", None, "trials") as advance:

        def keep(trial: Trial) -> None:
            replaced = {"trial": trial.trial, "shards": trial.shards}
            space.append_table(trials_file, to_table([_trial_row(number, trial)], TRIALS), replaced)
            advance(1)

        rows = search(
            lambda values, shards: _measured(ground, apply_values(generation, values), shards),
            settings,
            present_values(generation),
            rules,
            trials=config.feedback.trials,
            seed=config.seed,
            round_=number,
            earlier=stored_trials(space, number),
            keep=keep,
        )
        return verdict(
            rows,
            lambda values, fold: _confirmed(ground, generation, values, fold),
            labelled=ground.labelled,
        )


def explain(space: Workspace, number: int) -> str:
    """What was concluded from a round, and its stored decisions on settings, in words."""
    lines = [f"round {number}: {line}" for line in history.in_words(history.read(space), number)]
    name = round_file(number, "decisions.parquet")
    if not space.exists(name):
        return "\n".join([*lines, f"round {number}: no settings were decided on; {_why_none(space, number)}"])
    lines.append(f"What round {number} changes in round {number + 1}:")
    files = {f"{PER_PICTURE}{i.image_id}": f"{PER_PICTURE}{short_name(i.path)}" for i in source_images(space)}
    for row in space.read_table(name).to_pylist():
        change = (
            "stays " + row["before"] if row["before"] == row["after"] else f"{row['before']} → {row['after']}"
        )
        setting = files.get(row["setting"], row["setting"])
        lines.append(f"  {setting}: {change}\n    because {row['reason']}")
    return "\n".join(lines)


def _why_none(space: Workspace, number: int) -> str:
    after = number + 1
    if space.exists(round_file(after, "settings.yaml")) and read_settings(space, after)[2] == after:
        return f"round {after} began with a configuration of its own"
    if not open_round(space, number).config.feedback.enabled:
        return "feedback.enabled is false"
    if not space.exists(round_file(number, "found.parquet")):
        return "its detector was not judged yet: `flawsmith run` goes on"
    if space.exists(round_file(number, "trials.parquet")):
        return "its feedback was broken off: `flawsmith run` goes on"
    return "the last round of a run decides on none; `flawsmith feedback` does"


def spelled_out(
    generation: Generation, categories: Collection[str], recipes: Sequence[Mapping[str, Any]]
) -> Generation:
    """The settings with every category named, if there are several, and, for generators with a prompt bank,
    the defects that the round's samples show: so they are in the search space."""
    shares = {}
    if len(categories) > 1:
        shares = {name: generation.categories.get(name, 1.0) for name in categories}
    generators = dict(generation.generators)
    for name, settings in generators.items():
        if registry.get(name).prompts is not None:
            shown = sorted({r["defect"] for r in recipes if r["generator"] == name})
            defects = {**dict.fromkeys(shown, 1.0), **settings.defects}
            generators[name] = settings.model_copy(update={"defects": defects})
    return generation.model_copy(update={"categories": shares, "generators": generators})


def judgeable(space: Mapping[str, Search], generation: Generation, round_: Round) -> dict[str, Search]:
    """The part of a space that a trial can say something of: of generators that are not probed only the
    numbers that vary among their samples, and no choice that asks for pictures which are not there."""
    result = {}
    for path, mark in space.items():
        name = path.split(".")[1] if path.startswith("generators.") else None
        if name is not None and ".params." in path and not is_probed(name):
            varies = generation.generators[name].vary > 0 and path in numbers_of(generation, name)
        else:
            varies = True
        if not varies:
            continue
        if mark.choices and any(not _drawable(generation, {path: c}, round_) for c in mark.choices):
            continue
        result[path] = mark
    return result


def _drawable(generation: Generation, values: Point, round_: Round) -> bool:
    changed = apply_values(generation, values)
    try:
        check_donors(changed.generators, traits_of(changed, round_.prompts), round_.pool)
    except UsageError:
        return False
    return True


def _measured(ground: Ground, generation: Generation, shards: int) -> tuple[tuple[Figures, Figures], float]:
    maps = judge_settings(ground, generation, range(shards), 0)
    first, second = (proxy.measure(maps, ground.judged, fold) for fold in (0, 1))
    return (first, second), cost_of(generation, ground.banks)


def _confirmed(ground: Ground, generation: Generation, values: Point, fold: int) -> Estimate:
    after, before = (
        judge_settings(ground, settings, CONFIRM, 1)
        for settings in (apply_values(generation, values), generation)
    )
    seed = ground.round_.config.seed
    return proxy.gain(after, before, ground.judged, fold, level=SURE, resamples=RESAMPLES, seed=seed)


def decide(
    generation: Generation,
    values: Point,
    asked: Point,
    reasons: Mapping[str, str],
    result: Verdict,
) -> tuple[Generation, list[Decision]]:
    """Settings of the next round, and the decisions: what the search came to, then a row for each setting
    that changes or that a rule speaks of. Shares of generators keep their sum.
    """
    after = apply_values(generation, values)
    shares = [{n: s.share for n, s in g.generators.items() if s.share > 0} for g in (generation, after)]
    totals = [sum(part.values()) for part in shares]
    generators = {
        name: settings.model_copy(update={"share": float(f"{settings.share * totals[0] / totals[1]:.4g}")})
        if settings.share > 0 and shares[0] != shares[1]
        else settings
        for name, settings in after.generators.items()
    }
    after = after.model_copy(update={"generators": generators})
    before_values, after_values = present_values(generation), present_values(after)
    outcome = ("settings at present", "as confirmed" if result.values else "settings at present")
    decisions = [Decision("search", *outcome, result.reason)]
    for setting in dict.fromkeys(_setting(path) for path in before_values):
        before, then = (_shown(setting, values_) for values_ in (before_values, after_values))
        if setting.startswith("generators.") and setting.endswith(".share"):
            name = setting.split(".")[1]
            before, then = (f"{part[name] / total:.4f}" for part, total in zip(shares, totals, strict=True))
        if before == then and setting not in reasons:
            continue
        rule = ""
        if setting in reasons:
            rule = f"; the rule asks for {_asked(setting, asked, before_values)}: {reasons[setting]}"
        why = _decided(setting, before_values, values, result) or (
            result.short if before == then else "others change, and the sum of the shares stays"
        )
        decisions.append(Decision(setting, before, then, f"{why}{rule}"))
    return after, decisions


def _decided(setting: str, present: Point, values: Point, result: Verdict) -> str:
    """What moved a setting, in words; empty if nothing did."""
    moved = [p for p in present if _setting(p) == setting and values.get(p, present[p]) != present[p]]
    if not moved:
        return ""
    if any(p in result.values for p in moved):
        return result.short
    return "no labelled defect contradicts the rule"


def _mixed(
    drawn: Generation, generation: Generation, matches: Mapping[str, Mapping[str, float]]
) -> tuple[Generation, list[Decision]]:
    """Settings with the mixes of :func:`workflows.rules.from_matches`, and the decisions."""
    often, decisions = from_matches(matches, drawn.generators, generation.generators)
    generators = {
        name: own.model_copy(update={"categories": often[name]})
        for name, own in generation.generators.items()
    }
    return generation.model_copy(update={"generators": generators}), decisions


def _as_matched(
    ground: Ground, generation: Generation, advance: Callable[[int], None]
) -> tuple[Generation, list[Decision]]:
    """The settings with each category made by the generators whose samples look like its real defects, and
    the decisions. Where a sample would cost more than ``COST`` times as much for it, the dearest categories
    stay as they are, and a decision says so."""
    with_mixes = partial(_mixed, ground.round_.generation, generation)
    found: dict[str, dict[str, float]] = {}
    for at, (category, samples) in enumerate(directions_of(ground, generation, advance).items()):
        real = ground.real[category]
        mix = generation.generators
        made = {name: one.share * one.categories.get(category, 1.0) for name, one in mix.items()}
        made = {name: often for name, often in made.items() if often > 0}
        shares = np.array([mix[name].share for name in made])
        own = [samples.get(name, real.directions[:0]) for name in made]
        spawn = (ground.round_.number, MATCH, at)
        rng = np.random.default_rng(np.random.SeedSequence(ground.round_.config.seed, spawn_key=spawn))
        best = matched(real.directions, real.groups, own, shares, np.array(list(made.values())), rng)
        if best is not None:
            found[category] = dict(zip(made, best.tolist(), strict=True))

    plain, _ = with_mixes({})
    settings, decisions = with_mixes(found)
    dear: dict[str, Decision] = {}
    most = COST * cost_of(plain, ground.banks)
    for category in sorted(found, key=lambda c: -cost_of(with_mixes({c: found[c]})[0], ground.banks)):
        if cost_of(settings, ground.banks) <= most:
            break
        _, (wish,) = with_mixes({category: found.pop(category)})
        dear[category] = wish
        settings, decisions = with_mixes(found)
    for category, wish in dear.items():  # its numbers may still change, beside other shares
        used = {name: one.categories for name, one in settings.generators.items() if one.share > 0}
        stays = ", ".join(f"{name} {often.get(category, 1.0):g}" for name, often in used.items())
        decisions.append(replace(wish, after=stays, reason=wish.reason + TOO_DEAR))
    return settings, decisions


def _asked(setting: str, asked: Point, present: Point) -> str:
    """What a rule asks of a setting, in words."""
    path = next((p for p in asked if _setting(p) == setting and asked[p] != present[p]), None)
    if path is None:
        return "nothing"
    return "more" if asked[path] > present[path] else "less"


def _setting(path: str) -> str:
    """The setting of a path: a range without its end."""
    stem, _, end = path.rpartition(".")
    return stem if end in ENDS and stem != "categories" else path


def _shown(setting: str, values: Mapping[str, Any]) -> str:
    if f"{setting}.low" in values:
        return str([values[f"{setting}.{end}"] for end in ENDS])
    return str(values[setting])


def _fold_of(ground: Ground) -> dict[tuple[str, str], int]:
    return {
        (category, group): int(fold)
        for category, judged in ground.judged.items()
        for group, fold in zip(judged.groups, judged.fold, strict=True)
    }


def _with_learned(round_: Round, ground: Ground, rows: Sequence[dict[str, Any]]) -> list[Found]:
    """The real defects, with the generators from which alone a head learns to find them."""
    size, tiles = round_.config.detector.resolved()[1].size, round_.config.detector.tiles
    max_side = round_.config.output.max_side
    missed: dict[str, list[int]] = {}
    for at, row in enumerate(rows):
        if row["hit"] < MISSED:
            missed.setdefault(row["image_id"], []).append(at)
    places: dict[int, np.ndarray | None] = {}  # of the missed defects; None: known by picture alone
    for category, group in ground.judged.items():
        for image in ground.images[category]:
            for at in missed.get(image.image_id, []):
                component = rows[at]["component"]
                mask = truth(image, map_shape(image, size, max_side, tiles)) if component else None
                places[at] = None
                if mask is not None:
                    labels, _ = label_components(mask)
                    places[at] = proxy.shrink_mask(labels == component, group.residual.shape[1:3])
    learned: dict[int, set[str]] = {}
    for name in sorted(set(ground.generators.tolist())):
        weights = (ground.generators == name).astype(float)
        if weights @ ground.evidence.counts <= 0:
            continue
        head = proxy.solve(ground.evidence, weights)
        for category, group in ground.judged.items():
            normal = ground.held[category].scores(ground.evidence.scale, head)
            on_map = np.quantile(np.concatenate(normal), FALSE_ALARMS)
            on_picture = np.quantile([scores.max() for scores in normal], FALSE_ALARMS)
            maps = proxy.score_maps(group.residual, ground.evidence.scale, head)
            for image, scores in zip(ground.images[category], maps, strict=True):
                for at in missed.get(image.image_id, []):
                    place = places[at]
                    if place is None:
                        hit = scores.max() > on_picture
                    else:
                        hit = scores[place].max(initial=-np.inf) > on_map
                    if hit:
                        learned.setdefault(at, set()).add(name)
    return [
        Found(
            row["category"], row["defect"], row["group"], row["area"], row["contrast"], row["hit"],
            frozenset(learned.get(at, ())),
        )
        for at, row in enumerate(rows)
    ]  # fmt: skip


def likeness(ground: Ground) -> dict[str, Likeness]:
    """What each generator's samples look like; see :class:`workflows.rules.Likeness`."""
    scale = ground.evidence.scale
    normal = np.concatenate([proxy.distances(held.tokens, scale) for held in ground.held.values()])
    typical = max(float(normal.mean()), 1e-6)  # one normal compared with itself differs by nothing
    normal.sort()
    names = ground.generators
    kin = np.array([ground.kin[name] for name in names])
    result = {}
    for name in sorted(set(names.tolist())):
        own = evenly(np.flatnonzero(names == name).tolist(), LEARNED_FROM)
        inside, outside = [], []
        for k in own:
            mask = ground.masks[k]
            near, far = proxy.split_distances(ground.residuals[k], mask, scale)
            inside.append(near)
            outside.append(far)
        within, without = np.concatenate(inside), np.concatenate(outside)
        others = (kin != ground.kin[name]).astype(float)
        detection = 0.0
        if others @ ground.evidence.counts > 0:
            head = proxy.solve(ground.evidence, others)
            maps = [proxy.score_maps(ground.residuals[k][None], scale, head)[0] for k in own]
            detection = pixel_metrics(maps, [ground.masks[k] for k in own])["pixel_ap"]
        told_apart = float(np.searchsorted(normal, within).mean() / len(normal))
        result[name] = Likeness(
            detection,
            float(within.mean()) / typical,
            float(without.mean()) / typical if without.size else 1.0,
            told_apart,
        )
    return result


def _alarms(space: Workspace, round_: Round, ground: Ground) -> list[Alarm]:
    """The train normals to draw more often: those that alarmed, and those most like the place of a
    calibration normal that did (calibration pictures are for thresholds; nothing is made from them)."""
    name = round_file(round_.number, "alarms.parquet")
    rows = space.read_table(name).to_pylist() if space.exists(name) else []
    alarms = []
    for category in round_.pool.normals:
        # Of the others no picture is read: they change nothing.
        own = [row for row in rows if row["category"] == category and row["excess"] >= HARD_EXCESS]
        places = _places(round_, ground, own)
        held = [p for row, p in zip(own, places, strict=True) if row["split"] == "calibration"]
        alike = iter(_most_alike(round_, ground, category, held))
        for row, place in zip(own, places, strict=True):
            if row["split"] == "train":
                image_id, words = row["image_id"], f"false alarms on this {category}"
            else:
                image_id = next(alike)
                words = f"of the train normals of {category} the most like a false alarm on a calibration one"
            alarms.append(Alarm(image_id, row["excess"], words, looks_like(ground, category, place)))
    return alarms


def _places(round_: Round, ground: Ground, rows: Sequence[Mapping[str, Any]]) -> list[torch.Tensor]:
    """The token, of C, of each alarming place."""
    if not rows:
        return []
    images = [round_.images[row["image_id"]] for row in rows]
    found = []
    features = features_of(ground.backbone, images, round_.config.output.max_side, _unsaid)
    for row, alarming in zip(rows, features, strict=True):
        height, width = alarming.shape[1:]
        y, x = min(int(row["y"] * height), height - 1), min(int(row["x"] * width), width - 1)
        found.append(alarming[:, y, x])
    return found


def looks_like(ground: Ground, category: str, token: torch.Tensor) -> str:
    """The generator whose anomalies differ from normal tokens most in the direction in which a token does:
    the largest mean cosine. Empty if the token is one of the bank's own.

    Args:
        token: of C.
    """
    residual = proxy.residuals(token[None, :, None, None], ground.banks[category])[0, 0, 0]
    evidence = ground.evidence
    if proxy.distances(residual, evidence.scale) < ROUNDING:
        return ""
    usual = evidence.normal_sum / evidence.normal_count
    samples = evidence.sums / np.maximum(evidence.counts, 1)[:, None] - usual
    away = proxy.described(residual, evidence.scale) - usual
    lengths = np.linalg.norm(samples, axis=1) * np.linalg.norm(away)
    cosines = samples @ away / np.maximum(lengths, 1e-12)
    names = ground.generators
    return max(sorted(set(names.tolist())), key=lambda name: float(cosines[names == name].mean()))


def _most_alike(round_: Round, ground: Ground, category: str, places: Sequence[torch.Tensor]) -> list[str]:
    """For each alarming place of other pictures of a category, the train normal that holds the token nearest
    to it."""
    if not places:
        return []
    own = evenly(round_.pool.normals[category], MOST_NORMALS)
    tokens = features_of(ground.backbone, own, round_.config.output.max_side, _unsaid)
    found = []
    for place in places:
        nearest = torch.linalg.vector_norm(tokens - place[None, :, None, None], dim=1).amin(dim=(1, 2))
        found.append(own[int(nearest.argmin())].image_id)
    return found


def _unsaid(_count: int) -> None:
    """Progress of what takes a moment."""


def _trial_row(number: int, trial: Trial) -> dict[str, Any]:
    row = {
        "round": number, "trial": trial.trial, "origin": trial.origin, "fold": trial.fold,
        "shards": trial.shards, "params": trial.params,
    }  # fmt: skip
    for name in Figures._fields:
        row[name] = [getattr(found, name) for found in trial.figures]
    return {**row, "cost": trial.cost, "seconds": trial.seconds}


def stored_trials(space: Workspace, number: int) -> list[Trial]:
    """The rows of ``trials.parquet``, in their order."""
    name = round_file(number, "trials.parquet")
    if not space.exists(name):
        return []
    rows = sorted(space.read_table(name).to_pylist(), key=lambda row: (row["trial"], row["shards"]))
    return [
        Trial(
            row["trial"], row["origin"], row["fold"], row["shards"], row["params"],
            (_figures(row, 0), _figures(row, 1)), row["cost"], row["seconds"],
        )
        for row in rows
    ]  # fmt: skip


def _figures(row: Mapping[str, Any], fold: int) -> Figures:
    return Figures(*(row[name][fold] for name in Figures._fields))
