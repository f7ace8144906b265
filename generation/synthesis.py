"""Recipes to samples: draw, apply, compose, gate, and draw again what was rejected.

The result is a function of the recipes, the sources and the settings. A generator without a model works
sample by sample, so its bytes do not depend on what else is in the call. A generator with a model works in
the planned batches (consecutive recipes of equal ``batch``); what they reject is drawn again by attempt
number, in plan order, in batches of the planned size.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from time import perf_counter
from typing import Any, Literal

import numpy as np

from generation.compose import Composite, compose, compose_features
from generation.critic import Search, mean_margins
from generation.gates import Gates, judge
from generation.protocol import Edit, FeatureEdit, Generator, Source, Undrawable, out_of_memory
from manifests.errors import FlawsmithError, PictureError
from manifests.schema import Recipe

Sources = Callable[[Recipe], Source]
Signatures = dict[str, list[np.ndarray]]  # of the accepted samples, by image_id of their source


@dataclass(frozen=True)
class Outcome:
    """What became of one recipe.

    Attributes:
        recipe: as planned.
        status: ``accepted``, ``rejected`` (by the gates, after the last attempt) or ``failed`` (a
            deterministic error).
        reason: of the last attempt; "" if accepted.
        pixels: the picture, dtype and shape of the source; None for features and where there is none.
        feature: the features, reset to the clean ones outside the mask; None for pictures.
        mask: uint8, 0 or 255, H×W (features: h×w); None where the last attempt gave none.
        leak, hollow, contrast, mask_area: measures of the last attempt; NaN where it gave none.
        measures: the generator's own figures of the last attempt.
        attempts: how often it was drawn.
        seconds: time spent on it; the time of a batch is shared equally.
    """

    recipe: Recipe
    status: Literal["accepted", "rejected", "failed"]
    reason: str
    pixels: np.ndarray | None = None
    feature: FeatureEdit | None = None
    mask: np.ndarray | None = None
    leak: float = math.nan
    hollow: float = math.nan
    contrast: float = math.nan
    mask_area: float = math.nan
    measures: Mapping[str, float] = field(default_factory=dict)
    attempts: int = 1
    seconds: float = 0.0


def synthesise(
    recipes: Sequence[Recipe],
    sources: Sources,
    generator: Generator,
    model: Any,
    gates: Gates,
    attempts: int,
    signatures: Signatures,
    search: Search | None = None,
) -> list[Outcome]:
    """Make the samples of some recipes, all of ``generator``.

    Args:
        recipes: in plan order. For a generator with a model: all of its recipes in the shard.
        sources: reads the source of a recipe; called once a recipe.
        generator: see :mod:`generation.protocol`.
        model: what ``generator.load`` returned; None if it has no ``load``.
        gates: limits of the quality gates.
        attempts: the most draws a recipe gets, at least 1.
        signatures: of the samples accepted before in the same shard; those accepted here are added. The
            near-duplicate gate compares samples of the same source picture, in the order of acceptance.
        search: draws to choose among by a detector; those beyond them are taken as they come.

    Returns:
        One outcome a recipe, in plan order. A deterministic error of source or generator (``ValueError``, a
        damaged picture, a patch that holds NaN…) gives ``failed`` with the reason ``TypeName: message``.

    Raises:
        FlawsmithError: the configuration is wrong (e.g. a recipe lacks its texture): nothing can be made.
        OSError, or lack of memory (:func:`generation.protocol.out_of_memory`): transient; the caller may try
            again later.
    """
    if attempts < 1:
        raise ValueError(f"attempts must be at least 1, found {attempts}")
    groups = [[recipe] for recipe in recipes] if generator.load is None else [list(recipes)]
    return [
        outcome
        for group in groups
        for outcome in _settle(group, sources, generator, model, gates, attempts, signatures, search)
    ]


def attempt(
    recipes: Sequence[Recipe], sources: Sources, generator: Generator, model: Any, number: int
) -> list[Outcome]:
    """One attempt at one batch, for replay: as :func:`synthesise`, but without gates.

    Args:
        recipes: one batch as it was made; :func:`batch_of` tells which.
        number: of the attempt, from 0.
    """
    loaded = {recipe.sample_id: _read(sources, recipe) for recipe in recipes}
    made = _attempt(recipes, loaded, generator, model, number)
    return [replace(m.outcome, attempts=number + 1) for m in made]


def batch_of(
    recipes: Sequence[Recipe], attempts: Sequence[int], index: int, candidates: int = 1
) -> list[int]:
    """Which recipes were in the batch of the last attempt at ``recipes[index]``.

    Args:
        recipes: those of one generator in one shard, in plan order.
        attempts: how often each was drawn in the end.
        index: of the recipe in question.
        candidates: draws that were made of every recipe, to choose among.

    Returns:
        Indices into ``recipes``, in the order of the batch.
    """
    number = attempts[index] - 1
    pending = [i for i, count in enumerate(attempts) if count > number]
    batches = _batches(recipes, pending, 0 if number < candidates else number)
    return next(batch for batch in batches if index in batch)


@dataclass(frozen=True)
class _Made:
    """One attempt at one recipe, not judged yet; ``composite`` is None if there is nothing to judge."""

    outcome: Outcome
    composite: Composite | None = None


def _batches(recipes: Sequence[Recipe], pending: Sequence[int], number: int) -> list[list[int]]:
    """Indices in batches: as planned for the first attempt, of the largest planned size after it."""
    planned = [list(group) for _, group in groupby(range(len(recipes)), key=lambda i: recipes[i].batch)]
    if number == 0:
        return planned
    size = max(len(batch) for batch in planned)
    return [list(pending[i : i + size]) for i in range(0, len(pending), size)]


def _settle(
    recipes: list[Recipe],
    sources: Sources,
    generator: Generator,
    model: Any,
    gates: Gates,
    attempts: int,
    signatures: Signatures,
    search: Search | None,
) -> list[Outcome]:
    """Attempt after attempt over the recipes that are still pending."""
    outcomes: dict[int, Outcome] = {}
    spent = [0.0] * len(recipes)
    loaded: dict[str, Source | Exception] = {}
    pending = list(range(len(recipes)))
    first = 0
    if search is not None and not _judges(search, generator, model):
        search = None
    if search is not None:
        first = search.candidates
        for batch in _batches(recipes, pending, 0):
            start = perf_counter()
            group = [recipes[i] for i in batch]
            loaded |= {r.sample_id: _read(sources, r) for r in group}
            drawn = [_attempt(group, loaded, generator, model, number) for number in range(first)]
            found = _hardest(drawn, search, gates, signatures)
            share = (perf_counter() - start) / len(batch)
            for i, outcome in zip(batch, found, strict=True):
                outcomes[i], spent[i] = replace(outcome, seconds=share), share
                if outcome.status != "rejected":
                    del loaded[recipes[i].sample_id]
        pending = [i for i in pending if outcomes[i].status == "rejected"]
    for number in range(first, attempts):
        if not pending:
            break
        for batch in _batches(recipes, pending, number):
            start = perf_counter()
            group = [recipes[i] for i in batch]
            loaded |= {r.sample_id: _read(sources, r) for r in group if r.sample_id not in loaded}
            made = _attempt(group, loaded, generator, model, number)
            share = (perf_counter() - start) / len(batch)
            for i, one in zip(batch, made, strict=True):
                start = perf_counter()
                outcome = _judged(one, gates, signatures)
                spent[i] += share + perf_counter() - start
                if search is not None:
                    outcome = _searched(outcome, search, math.nan)
                outcomes[i] = replace(outcome, attempts=number + 1, seconds=spent[i])
                if outcome.status != "rejected":
                    del loaded[recipes[i].sample_id]
        pending = [i for i in pending if outcomes[i].status == "rejected"]
    return [outcomes[i] for i in range(len(recipes))]


def _judges(search: Search, generator: Generator, model: Any) -> bool:
    """Whether a critic can judge what a generator makes: features only of the backbone that it looks at."""
    if generator.family != "feature":
        return True
    backbone = getattr(getattr(model, "backbone", None), "fingerprint", None)
    return search.critic.of_features is not None and search.critic.backbone == backbone


def _hardest(
    drawn: Sequence[Sequence[_Made]], search: Search, gates: Gates, signatures: Signatures
) -> list[Outcome]:
    """Of each recipe's draws the accepted one that the critic finds least; else what became of the last.

    Args:
        drawn: the attempts at one batch, each in plan order.
    """
    passed = []
    for number, attempted in enumerate(drawn):
        for at, made in enumerate(attempted):
            composite, recipe = made.composite, made.outcome.recipe
            if composite is not None and not judge(
                composite, recipe.area, gates, measures=made.outcome.measures
            ):
                passed.append((at, number, composite, recipe.category))
    margins: dict[tuple[int, int], float] = {}
    if passed:
        places, numbers, composites, categories = zip(*passed, strict=True)
        contents, masks = [c.content for c in composites], [c.mask for c in composites]
        found = mean_margins(search.critic, contents, masks, categories)
        margins = dict(zip(zip(places, numbers, strict=True), found, strict=True))
    outcomes = []
    for at in range(len(drawn[0])):
        order = sorted((margin, number) for (place, number), margin in margins.items() if place == at)
        for _, number in order:
            outcome = _judged(drawn[number][at], gates, signatures)
            if outcome.status == "accepted":
                break
        else:  # nothing is left of it but its last draw
            number = len(drawn) - 1
            outcome = _judged(drawn[number][at], gates, signatures)
        margin = margins[at, number] if outcome.status == "accepted" else math.nan
        outcomes.append(replace(_searched(outcome, search, margin), attempts=number + 1))
    return outcomes


def _searched(outcome: Outcome, search: Search, margin: float) -> Outcome:
    """With the measures that replay needs, since it asks no critic."""
    margins = {"margin": margin} if math.isfinite(margin) else {}
    return replace(outcome, measures={**outcome.measures, "candidates": search.candidates, **margins})


def _judged(made: _Made, gates: Gates, signatures: Signatures) -> Outcome:
    composite, recipe = made.composite, made.outcome.recipe
    if composite is None:
        return made.outcome
    earlier = signatures.setdefault(recipe.image_id, [])
    reason = judge(composite, recipe.area, gates, earlier, made.outcome.measures)
    if reason:
        return replace(made.outcome, status="rejected", reason=reason)
    earlier.append(composite.signature)
    return made.outcome


def _read(sources: Sources, recipe: Recipe) -> Source | Exception:
    """The source, or the deterministic error that it gives."""
    try:
        return sources(recipe)
    except Exception as error:
        return _deterministic(error)


def _attempt(
    recipes: Sequence[Recipe],
    loaded: dict[str, Source | Exception],
    generator: Generator,
    model: Any,
    number: int,
) -> list[_Made]:
    """Draw, apply and compose one batch. A draw that fails does not keep its neighbours from being made."""
    results: dict[str, _Made] = {}
    drawn: list[tuple[Recipe, Source, Any]] = []
    for recipe in recipes:
        source = loaded[recipe.sample_id]
        if isinstance(source, Exception):
            results[recipe.sample_id] = _failed(recipe, source)
            continue
        try:
            drawn.append((recipe, source, generator.draw(recipe, source, recipe.rng(number))))
        except Undrawable as undrawable:
            results[recipe.sample_id] = _Made(Outcome(recipe, "rejected", undrawable.reason))
        except Exception as error:
            results[recipe.sample_id] = _failed(recipe, _deterministic(error))
    for (recipe, source, _), edit in zip(drawn, _apply(drawn, generator, model), strict=True):
        results[recipe.sample_id] = _composed(recipe, source, edit)
    return [results[recipe.sample_id] for recipe in recipes]


def _apply(
    drawn: list[tuple[Recipe, Source, Any]], generator: Generator, model: Any
) -> list[Edit | FeatureEdit | Exception]:
    """One edit or deterministic error a draw. A batch that fails is applied one by one to find which."""
    if not drawn:
        return []
    try:
        edits = generator.apply([source for _, source, _ in drawn], [draw for _, _, draw in drawn], model)
        if len(edits) != len(drawn):
            raise ValueError(f"generator {generator.name} gave {len(edits)} edits for {len(drawn)} draws")
        return list(edits)
    except Exception as error:
        error = _deterministic(error)
        if len(drawn) == 1:
            return [error]
        return [edit for one in drawn for edit in _apply([one], generator, model)]


def _composed(recipe: Recipe, source: Source, edit: Edit | FeatureEdit | Exception) -> _Made:
    if isinstance(edit, Exception):
        return _failed(recipe, edit)
    try:
        if isinstance(edit, FeatureEdit):
            composite = compose_features(edit)
            feature = replace(edit, feature=composite.content)
            content: dict[str, Any] = {"feature": feature}
        else:
            composite = compose(source.pixels, edit)
            content = {"pixels": composite.content}
    except Exception as error:
        return _failed(recipe, _deterministic(error))
    outcome = Outcome(
        recipe,
        "accepted",
        "",
        mask=composite.mask,
        leak=composite.leak,
        hollow=composite.hollow,
        contrast=composite.contrast,
        mask_area=composite.area,
        measures=dict(edit.measures),
        **content,
    )
    return _Made(outcome, composite)


def _failed(recipe: Recipe, error: Exception) -> _Made:
    message = " ".join(str(error).split())
    return _Made(Outcome(recipe, "failed", f"{type(error).__name__}: {message}"))


def _deterministic(error: Exception) -> Exception:
    """Gives the error back if the same inputs would raise it again, and raises it otherwise.

    Transient: I/O, lack of memory, a broken device, a missing package. A wrong configuration is for the
    user to correct before anything else is made.
    """
    if isinstance(error, PictureError):
        return error
    if out_of_memory(error) or isinstance(error, (FlawsmithError, OSError, ImportError)):
        raise error
    torch = sys.modules.get("torch")  # a generator without a model need not import it
    if torch is not None and isinstance(error, torch.AcceleratorError):
        raise error
    return error
