"""The settings that may change, as a flat space: what is marked :class:`manifests.searching.Search`.

A point is a mapping of dotted paths below ``generation`` to plain values, e.g. ``{"area.low": 0.004,
"generators.band.params.phase": 0.5}``. Both ends of a range are ``.low`` and ``.high``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pydantic import BaseModel

from generation import registry
from manifests.searching import Search
from workflows.config import Generation

ENDS = ("low", "high")


@dataclass(frozen=True)
class _Place:
    """One searched value: ``keys`` lead to its setting in the settings' tree, ``end`` is the index of a
    range's end, None if the setting is no range."""

    keys: tuple[str, ...]
    end: int | None
    search: Search
    value: Any

    @property
    def path(self) -> str:
        return ".".join([*self.keys, *([] if self.end is None else [ENDS[self.end]])])


def search_space(generation: Generation) -> dict[str, Search]:
    """Every setting that may change, by its path, in a fixed order.

    Limits and choices are widened to hold the present value. Generators of share 0 and settings that are
    null are left out, and so is the location ``roi``, which only some sources know. Of mappings, what they
    name is in.
    """
    return {place.path: place.search for place in _places(generation)}


def present_values(generation: Generation) -> dict[str, Any]:
    """The point of the space at which the settings are now."""
    return {place.path: place.value for place in _places(generation)}


def apply_values(generation: Generation, values: Mapping[str, Any]) -> Generation:
    """The settings with some values in place of theirs.

    The ends of a range, and a pair ``NAME_low`` and ``NAME_high``, are put in order; numbers are rounded to
    four digits.

    Raises:
        KeyError: a path that is not in the space.
        pydantic.ValidationError: a value that its setting does not take.
    """
    places = {place.path: place for place in _places(generation)}
    if unknown := sorted(set(values) - set(places)):
        raise KeyError(f"not in the search space: {', '.join(unknown)}")
    changed = {path: plain(places[path].search, value) for path, value in values.items()}
    changed = {path: value for path, value in changed.items() if value != places[path].value}
    if not changed:
        return generation
    tree = generation.model_dump()
    for path, value in changed.items():
        place = places[path]
        at = tree
        for key in place.keys[:-1]:
            at = at[key]
        if place.end is None:
            at[place.keys[-1]] = value
        else:
            ends = (f"{'.'.join(place.keys)}.{end}" for end in ENDS)
            at[place.keys[-1]] = tuple(sorted(changed.get(end, places[end].value) for end in ends))
    for name, settings in tree["generators"].items():
        own = registry.get(name).params
        settings["params"] = _in_order(settings["params"], own(**generation.generators[name].params))
        own.model_validate(settings["params"])
    return Generation.model_validate(tree)


def random_values(space: Mapping[str, Search], rng: np.random.Generator) -> dict[str, Any]:
    """A point drawn evenly from the space: numbers on their scale, choices equally often."""
    return {path: at_place(search, float(rng.random())) for path, search in space.items()}


def vary(
    generation: Generation, generators: Sequence[str], rng: np.random.Generator
) -> dict[str, dict[str, Any]]:
    """By generator: its searched numbers, each drawn evenly within ``vary`` of its place now; a pair
    ``NAME_low`` and ``NAME_high`` is put in order."""
    present = present_values(generation)
    result: dict[str, dict[str, Any]] = {name: {} for name in generators}
    for name in generators:
        reach = generation.generators[name].vary
        for path, search in numbers_of(generation, name).items():
            place = place_of(search, present[path]) + rng.uniform(-reach, reach)
            result[name][path.rpartition(".")[2]] = at_place(search, min(max(place, 0.0), 1.0))
        result[name] = _in_order(
            result[name], registry.get(name).params(**generation.generators[name].params)
        )
    return result


def numbers_of(generation: Generation, generator: str) -> dict[str, Search]:
    """The searched numbers among a generator's own settings, by their paths."""
    start = f"generators.{generator}.params."
    space = search_space(generation)
    return {path: search for path, search in space.items() if path.startswith(start) and not search.choices}


def place_of(search: Search, value: Any) -> float:
    """Where a value lies between the limits, on its scale, in [0, 1]; of a choice, the middle of its part."""
    if search.choices:
        return (search.choices.index(value) + 0.5) / len(search.choices)
    low, high, at = (float(np.log(v)) if search.log else float(v) for v in (search.low, search.high, value))
    return float(np.clip((at - low) / max(high - low, 1e-12), 0, 1))


def at_place(search: Search, place: float) -> Any:
    """The value at a place in [0, 1]: the inverse of :func:`place_of`."""
    if search.choices:
        return search.choices[min(int(place * len(search.choices)), len(search.choices) - 1)]
    low, high = (float(np.log(v)) if search.log else float(v) for v in (search.low, search.high))
    value = low + place * (high - low)
    return plain(search, np.exp(value) if search.log else value)


def plain(search: Search, value: Any) -> Any:
    """A value as settings hold it: numbers of four digits within the limits, choices as they are declared
    (lists, as JSON has them, become tuples)."""
    if search.choices:
        return _tuples(value)
    value = min(max(float(value), search.low), search.high)
    return round(value) if search.whole else float(f"{value:.4g}")


def _places(generation: Generation) -> Iterator[_Place]:
    for place in _marked(generation, ()):
        if place.keys != ("location",) or place.value != "roi":
            yield place
    for name, settings in generation.generators.items():
        if settings.share > 0:
            yield from _marked(settings, ("generators", name))
            params = registry.get(name).params.model_validate(settings.params)
            yield from _marked(params, ("generators", name, "params"))


def _marked(model: BaseModel, keys: tuple[str, ...]) -> Iterator[_Place]:
    """The searched values of one model's own fields."""
    for name, field in type(model).model_fields.items():
        search = next((mark for mark in field.metadata if isinstance(mark, Search)), None)
        value = getattr(model, name)
        if search is None or value is None:
            continue
        if isinstance(value, Mapping):
            for key, item in value.items():
                if item > 0:
                    yield _Place((*keys, name, key), None, _widened(search, item), item)
        elif search.choices:
            yield _Place((*keys, name), None, _widened(search, value), value)
        elif isinstance(value, tuple):
            for end, item in enumerate(value):
                yield _Place((*keys, name), end, _widened(search, item), item)
        else:
            yield _Place((*keys, name), None, _widened(search, value), value)


def _widened(search: Search, value: Any) -> Search:
    if search.choices:
        return search if value in search.choices else replace(search, choices=(*search.choices, value))
    return replace(search, low=min(search.low, value), high=max(search.high, value))


def _in_order(params: Mapping[str, Any], before: BaseModel) -> dict[str, Any]:
    """The params with each pair ``NAME_low``, ``NAME_high`` in order."""
    result = dict(params)
    for name in type(before).model_fields:
        other = f"{name.removesuffix('low')}high"
        if name.endswith("_low") and other in type(before).model_fields:
            low, high = (result.get(key, getattr(before, key)) for key in (name, other))
            if low > high:
                result[name], result[other] = high, low
    return result


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, (list, tuple)) else value
