"""Prompts of a recipe: templates of a prompt bank, filled with words that follow the recipe's numbers.

A template holds ``{object}`` and, if it likes, ``{size}``, ``{shape}`` and ``{severity}``. What planning
needs of a bank is here as plain data, because a plan is made without the generator that will use it.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from manifests.errors import UsageError

SLOTS = ("object", "size", "shape", "severity")
SIZES = (("tiny",), ("small", "short"), ("medium",), ("large", "long", "wide"))
SIZE_STEPS = (0.001, 0.01, 0.04)  # share of the picture; the first two divide the tables' sizes as well
SEVERITIES = (("faint",), ("slight",), ("clear",), ("strong", "deep"))
SEVERITY_STEPS = (0.25, 0.5, 0.75)
DRAWS = 6  # numbers in [0, 1) that one recipe's words take: entry, prompt, detail, size, shape, severity

_SLOT = re.compile(r"(?:\b([Aa])n? )?\{(\w+)\}")
# Vowel letters that sound like consonants (a uniform, a used, a European, a one-way), and the reverse.
_LIKE_CONSONANT = re.compile(r"uni(?!n|m)|us[aeib]|ut[ei]|u-|eu|ewe|one\b|once\b", re.IGNORECASE)
_LIKE_VOWEL = re.compile(r"hour|honest|honou?r|heir|x-ray|led\b", re.IGNORECASE)


@dataclass(frozen=True)
class Wording:
    """One entry of a bank, as planning uses it.

    Attributes:
        defect: the name in tables.
        prompts, details: templates; never empty.
        size, shape, severity: words for the slots; empty if no template has the slot. ``size`` and
            ``severity`` hold words of ``SIZES`` and ``SEVERITIES`` only.
        categories: the only ones it is for; empty: all.
    """

    defect: str
    prompts: tuple[str, ...]
    details: tuple[str, ...]
    size: tuple[str, ...] = ()
    shape: tuple[str, ...] = ()
    severity: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()

    @cached_property
    def sizes(self) -> tuple[tuple[str, ...], ...]:
        """Words to choose from, one tuple a step of ``SIZE_STEPS``."""
        return _by_step(self.size, SIZES)

    @cached_property
    def severities(self) -> tuple[tuple[str, ...], ...]:
        """Words to choose from, one tuple a step of ``SEVERITY_STEPS``."""
        return _by_step(self.severity, SEVERITIES)


@dataclass(frozen=True)
class Prompts:
    """What the recipes of one generator are worded with.

    Attributes:
        entries: what is drawn from, equally often.
        nouns: what the object is called, by category; other categories see :func:`noun_of`.
        params: settings of the generator that follow from the bank and must be in the recipe; they replace
            those of the configuration.
    """

    entries: tuple[Wording, ...]
    nouns: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def _found(self) -> dict[str, tuple[str, tuple[Wording, ...]]]:
        return {}

    def of(self, category: str) -> tuple[str, tuple[Wording, ...]]:
        """(noun, entries) of a category; found once.

        Raises:
            UsageError: no entry is for this category.
        """
        if category not in self._found:
            entries = tuple(e for e in self.entries if not e.categories or category in e.categories)
            if not entries:
                named = sorted({name for entry in self.entries for name in entry.categories})
                raise UsageError(
                    f"no prompt is for the category {category!r}, only for {', '.join(named)}: add entries "
                    "for it to the bank (params.bank), or entries without `categories`, which are for all"
                )
            self._found[category] = (self.nouns.get(category) or noun_of(category), entries)
        return self._found[category]

    def words(
        self,
        category: str,
        area: float,
        severity: float,
        draws: Sequence[float],
        shares: Mapping[str, float] = MappingProxyType({}),
        texts: Mapping[str, float] = MappingProxyType({}),
    ) -> tuple[str, str, str]:
        """(defect, prompt, detail) of one recipe.

        Args:
            area, severity: of the recipe; see :func:`write` for the words they give.
            draws: ``DRAWS`` numbers in [0, 1).
            shares: how often a defect's entries are drawn, ≥ 0; 1 if not named. All 0: equally often.
            texts: the same of an entry's prompts and of its details, by template.
        """
        noun, entries = self.of(category)
        entry = pick(entries, draws[0], [shares.get(e.defect, 1.0) for e in entries] if shares else ())
        return (entry.defect, *write(entry, noun, area, severity, draws[1:], texts))

    def source(self, category: str, defect: str, prompt: str, detail: str) -> tuple[Wording, str, str] | None:
        """The entry that worded a recipe, and its prompt and detail before their slots were filled; None if
        none fits."""
        noun, entries = self.of(category)
        for entry in entries:
            if entry.defect == defect:
                used = [
                    next((t for t in own if _fills(t, noun, entry, text)), None)
                    for own, text in ((entry.prompts, prompt), (entry.details, detail))
                ]
                if used[0] is not None and used[1] is not None:
                    return entry, used[0], used[1]
        return None


def write(
    entry: Wording,
    noun: str,
    area: float,
    severity: float,
    draws: Sequence[float],
    texts: Mapping[str, float] = MappingProxyType({}),
) -> tuple[str, str]:
    """(prompt, detail) of an entry, both with the same words.

    The size word follows the area, as a share of the picture: tiny below 0.1 %, small (short) below 1 %,
    medium below 4 %, large (long, wide) from there on. The severity word follows the severity: faint below
    0.25, slight below 0.5, clear below 0.75, strong (deep) from there on. Where an entry lacks the word, its
    nearest is taken.

    Args:
        draws: ``DRAWS - 1`` numbers in [0, 1): which prompt, detail, size, shape and severity word.
        texts: how often a prompt or a detail is drawn beside the entry's others, ≥ 0; 1 if not named.
    """
    size = pick(entry.sizes[bisect_right(SIZE_STEPS, area)], draws[2])
    shape = pick(entry.shape, draws[3])
    strength = pick(entry.severities[bisect_right(SEVERITY_STEPS, severity)], draws[4])

    def text(templates: Sequence[str], draw: float) -> str:
        often = [texts.get(template, 1.0) for template in templates] if texts else ()
        return fill_template(pick(templates, draw, often), noun, size, shape, strength)

    return text(entry.prompts, draws[0]), text(entry.details, draws[1])


def pick(items: Sequence[Any], draw: float, shares: Sequence[float] = ()) -> Any:
    """The item at a share ``draw`` in [0, 1) of the list; "" of an empty one. With ``shares``, one an item,
    ≥ 0, an item is as long as its share; all 0: equally long."""
    total = sum(shares)
    if total > 0:
        ends = accumulate(share / total for share in shares)
        return next((item for item, end in zip(items, ends, strict=True) if draw < end), items[-1])
    return items[int(draw * len(items))] if items else ""


@lru_cache(maxsize=2**15)
def fill_template(template: str, noun: str, size: str = "", shape: str = "", severity: str = "") -> str:
    """The template with its slots filled; an article right before a slot fits the word that comes after it.

    >>> fill_template("a photo of a {object} with a {shape} crack on it", "metal nut", shape="irregular")
    'a photo of a metal nut with an irregular crack on it'
    """
    words = {"object": noun, "size": size, "shape": shape, "severity": severity}

    def word(found: re.Match[str]) -> str:
        text = words[found[2]]
        return text if found[1] is None else f"{found[1]}{'n' if _takes_an(text) else ''} {text}"

    return _SLOT.sub(word, template)


def _fills(template: str, noun: str, entry: Wording, text: str) -> bool:
    """Whether the template, filled with words of its entry, is the text."""
    return _filling(template, noun, entry.size, entry.shape, entry.severity).fullmatch(text) is not None


@lru_cache(maxsize=2**12)
def _filling(template: str, noun: str, *words: tuple[str, ...]) -> re.Pattern[str]:
    known = dict(zip(SLOTS, ((noun,), *words), strict=True))
    parts, at = [], 0
    for slot in _SLOT.finditer(template):
        article = "" if slot[1] is None else f"{slot[1]}n? "
        parts += [re.escape(template[at : slot.start()]), article]
        parts.append(f"(?:{'|'.join(map(re.escape, known[slot[2]] or ('',)))})")
        at = slot.end()
    return re.compile("".join(parts) + re.escape(template[at:]))


def _takes_an(word: str) -> bool:
    if _LIKE_VOWEL.match(word):
        return True
    return word[:1].lower() in ("a", "e", "i", "o", "u") and not _LIKE_CONSONANT.match(word)


def noun_of(category: str) -> str:
    """What to call the object of a category: its name without digits, underscores and dashes, in lower case;
    "object" if nothing is left.

    >>> noun_of("Metal_nut-02"), noun_of("0815")
    ('metal nut', 'object')
    """
    return plain(re.sub(r"\d+", " ", category)) or "object"


def plain(name: str) -> str:
    """A name as words: underscores, dashes and other signs become spaces, in lower case."""
    return " ".join(re.sub(r"[\W_]+", " ", name).lower().split())


def _by_step(words: Sequence[str], steps: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """For every step the words of the nearest step that has any; of two equally near ones, the smaller."""
    own = [tuple(word for word in words if word in step) for step in steps]
    known = [at for at, step in enumerate(own) if step]
    return tuple(own[min(known, key=lambda k: (abs(k - at), k))] if known else () for at in range(len(steps)))


def to_plain(prompts: Prompts) -> dict[str, Any]:
    """As values of JSON."""
    return {
        "entries": [asdict(entry) for entry in prompts.entries],
        "nouns": dict(prompts.nouns),
        "params": dict(prompts.params),
    }


def from_plain(value: Mapping[str, Any]) -> Prompts:
    """What :func:`to_plain` gave, also after a way through JSON.

    Raises:
        KeyError, TypeError, AttributeError, ValueError: it is not of that form.
    """
    entries = tuple(
        Wording(entry.pop("defect"), **{name: tuple(texts) for name, texts in entry.items()})
        for entry in map(dict, value["entries"])
    )
    for template in (text for entry in entries for text in (*entry.prompts, *entry.details)):
        unknown = {found[2] for found in _SLOT.finditer(template)} - set(SLOTS)
        if unknown:
            raise ValueError(f"the prompt {template!r} has the slots {', '.join(sorted(unknown))}")
    return Prompts(entries, dict(value["nouns"]), dict(value["params"]))
