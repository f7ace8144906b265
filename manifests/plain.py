"""YAML and JSON from outside to plain values, of bounded depth and size; any damage is a ``ValueError``.

YAML's own parser has more ways to fail (a date that no calendar has, a nesting too deep for the stack), and
its aliases make a few bytes mean billions of values, for which whoever walks or prints them would pay.
"""

from __future__ import annotations

import json
import re
from itertools import accumulate
from typing import Any

import yaml

MOST_VALUES = 1_000_000
DEEPEST = 100  # brackets within brackets; the parser's time grows with the square of their number


class _Loader(yaml.SafeLoader):
    """That of plain values, which takes no key twice: all but the last would be lost without a word."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As it is written: later, what it merges in (``<<``) stands beside the keys that override it."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        "while reading a mapping", node.start_mark, f"{key.value!r} twice", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


def from_yaml(text: str | bytes) -> Any:
    """A YAML document; ``None`` of an empty one. Only plain values: no tag makes an object.

    Raises:
        ValueError: not YAML, a key twice, nested too deeply, a value that contains itself, or more than
            ``MOST_VALUES``.
    """
    if _depth(text) > DEEPEST:
        raise ValueError("it is nested too deeply")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (AttributeError, TypeError, IndexError, OverflowError, KeyError) as error:
        # What the parser's own constructors make of e.g. `!!timestamp x` or `!!int _`.
        raise ValueError(f"a value does not fit its tag ({type(error).__name__}: {error})") from error
    if _count(value, {}) > MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {MOST_VALUES:,} values")
    return value


def from_json(text: str | bytes) -> Any:
    """A JSON document.

    Raises:
        ValueError: not JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _depth(text: str | bytes) -> int:
    """The most brackets that are open at once, wherever they stand."""
    found = re.findall(r"[][{}]", text if isinstance(text, str) else text.decode("latin-1"))
    return max(accumulate((1 if bracket in "[{" else -1 for bracket in found), initial=0))


def _count(value: Any, known: dict[int, int]) -> int:
    """Values in a tree, those behind an alias as often as they are named."""
    if not isinstance(value, (dict, list, tuple, set)):
        return 1
    if id(value) in known:
        if not known[id(value)]:
            raise ValueError("a value contains itself")
        return known[id(value)]
    known[id(value)] = 0  # being counted
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    known[id(value)] = 1 + sum(_count(one, known) for one in inner)
    return known[id(value)]
