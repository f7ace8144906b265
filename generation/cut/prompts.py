"""The prompts of ``cut``: a bank of anomaly prompts, its checks, and the anomaly word of a prompt (core.md
1.10).

Published: a normal prompt ("a photo of a {object}"), an anomaly prompt that adds one anomaly word, and a
detailed description of at most 30 words that begins alike. The authors' list was never released; the shipped
bank is the offline fallback that the specification recommends, in the few words that a small text encoder
knows.

A recipe carries all that was drawn from a bank, so no bank is needed to make its sample again:
:func:`anomaly_word` finds the word from the recipe's prompt, defect and params.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from generation.protocol import PATH, Params
from manifests.errors import UsageError
from manifests.plain import from_json, from_yaml
from manifests.recipes import GeneratorSettings
from manifests.schema import Recipe
from manifests.wording import (
    SEVERITIES,
    SIZES,
    SLOTS,
    Prompts,
    Wording,
    fill_template,
    noun_of,
    plain,
    write,
)

VERSION = 1
HEAD = "a photo of a {object}"
LONGEST = 30  # words of a prompt or description, a slot counted as one
TOKENS = 77  # that a CLIP text encoder reads, with begin and end of text
MOST_BYTES = 4 * 2**20  # of a bank file

SizeWord = Literal["tiny", "small", "short", "medium", "large", "long", "wide"]
SeverityWord = Literal["faint", "slight", "clear", "strong", "deep"]
Name = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=60, pattern=r"^[^{}]*$")
]
Template = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=400)]
Kind = Literal["texture", "object"]

_SLOT = re.compile(r"\{[^{}]*\}")
_SIGNS = {name: f"{{{name}}}" for name in SLOTS}


class Entry(BaseModel):
    """One defect of a bank."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    defect: Name = Field(description="the name in tables")
    word: Name = Field(description="the anomaly word or words, as they stand in every prompt")
    synonyms: tuple[Name, ...] = Field((), description="other words that mean this defect in a typed prompt")
    kinds: tuple[Kind, ...] = Field(("texture", "object"), min_length=1, description="what it is seen on")
    categories: tuple[Name, ...] = Field((), description="the only categories it is for; empty: all")
    place: Literal["blob", "line"] = Field("blob", description="its form: compact, or long and narrow")
    prompts: tuple[Template, ...] = Field(min_length=1, description="short texts with {object} and the word")
    details: tuple[Template, ...] = Field(
        min_length=1, description=f"one sentence each, begins with {HEAD!r}"
    )
    size: tuple[SizeWord, ...] = Field((), description="words for {size}")
    shape: tuple[Name, ...] = Field((), description="words for {shape}")
    severity: tuple[SeverityWord, ...] = Field((), description="words for {severity}")

    @model_validator(mode="after")
    def _fits(self) -> Entry:
        for field in ("prompts", "details"):
            for at, template in enumerate(getattr(self, field)):
                problem = _problem(template, self, HEAD if field == "details" else "{object}")
                if problem is None and field == "prompts" and not _occurs(_literal(template), self.word):
                    problem = f"does not hold the word {self.word!r} (field word) as whole words"
                if problem:
                    raise ValueError(f"{field}[{at}] {template!r} {problem}")
        return self

    def wording(self) -> Wording:
        """As planning uses it."""
        return Wording(
            self.defect, self.prompts, self.details, self.size, self.shape, self.severity, self.categories
        )


class Bank(BaseModel):
    """Prompts by defect; the content of a bank file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1]
    origin: str = Field("", max_length=400, description="who or what wrote it")
    entries: tuple[Entry, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _once(self) -> Bank:
        seen = set()
        for entry in self.entries:
            for category in entry.categories or ("",):
                key = (plain(entry.defect), category)
                if key in seen:
                    of = f" of category {category!r}" if category else ""
                    raise ValueError(f"the defect {entry.defect!r}{of} has two entries: join them")
                seen.add(key)
        return self


class PromptParams(Params):
    """Settings of ``cut`` that choose its prompts.

    Attributes:
        bank: a bank file (JSON or YAML) of one's own, e.g. written by ``flawsmith prompts``; None: the
            shipped one. Only planning reads it; the params of a recipe name none.
        kind: what the pictures show; ``any`` takes only entries that fit textures and objects alike.
        defects: the only entries used; named ones are taken whatever their kind.
        nouns: what to call the object, by category; default: the category's name.
        words: the anomaly words of a defect, where neither its name nor a word of the shipped bank stands in
            its prompts; those of a bank are added by themselves.
        lines: defects whose place is long and narrow; those of a bank are added by themselves.
    """

    bank: str | None = Field(None, json_schema_extra=PATH)
    kind: Literal["any", "texture", "object"] = "any"
    defects: tuple[str, ...] = ()
    nouns: dict[str, Name] = Field(default_factory=dict)
    words: dict[str, tuple[Name, ...]] = Field(default_factory=dict)
    lines: tuple[str, ...] = ()


class Texts(NamedTuple):
    """The three texts of one sample."""

    normal: str
    prompt: str
    detail: str


# -- files ----------------------------------------------------------------------------------------------


def load_bank(path: str | Path | None = None) -> Bank:
    """A bank file, checked. None: the shipped bank, read once a process.

    Raises:
        UsageError: the file is missing, too large, no JSON or YAML, or an entry is wrong; every problem at
            once, with the file, the entry and the field.
    """
    if path is None:
        return _shipped()
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise UsageError(f"prompt bank {path} has {size} bytes, at most {MOST_BYTES} are read: split it")
        text = path.read_text(encoding="utf-8")
        raw = from_json(text) if path.suffix == ".json" else from_yaml(text)
    except FileNotFoundError:
        raise UsageError(
            f"prompt bank {path} does not exist: correct params.bank, leave it out (the shipped bank), or "
            "let `flawsmith prompts` write it"
        ) from None
    except (OSError, ValueError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise UsageError(f"prompt bank {path} cannot be read as {kind}: {error}") from error
    return parse_bank(raw, f"prompt bank {path}")


@cache
def _shipped() -> Bank:
    text = files("generation.cut").joinpath("prompts.json").read_text(encoding="utf-8")
    return parse_bank(json.loads(text), "the shipped prompt bank")


def parse_bank(raw: Any, name: str) -> Bank:
    """Plain values to a bank.

    Raises:
        UsageError: as :func:`load_bank`; ``name`` begins each line.
    """
    if not isinstance(raw, dict):
        raise UsageError(
            f"{name} must be a mapping with `version: {VERSION}` and `entries`, found {type(raw).__name__}"
        )
    try:
        return Bank.model_validate(raw)
    except ValidationError as error:
        raise UsageError("\n".join(f"{name}: {line}" for line in _lines(error, raw))) from None


def _lines(error: ValidationError, raw: Mapping[str, Any]) -> Iterable[str]:
    for item in error.errors():
        loc = list(item["loc"])
        place = ""
        if loc[:1] == ["entries"] and len(loc) > 1:
            entry = raw["entries"][loc[1]]
            named = entry.get("defect") if isinstance(entry, dict) else None
            place = f"entry {loc[1]}" + (f" ({named})" if isinstance(named, str) else "") + ": "
            loc = loc[2:]
        field = f"{loc[0]}{''.join(f'[{part}]' for part in loc[1:])}: " if loc else ""
        model = Entry if place else Bank
        if item["type"] == "extra_forbidden":
            yield f"{place}{field}no such field; known here: {', '.join(model.model_fields)}"
        elif item["type"] == "missing":
            yield f"{place}{field}is missing; add it"
        elif item["type"] == "value_error":
            yield f"{place}{item['ctx']['error']}"
        else:
            yield f"{place}{field}{item['msg']}, found {_short(item['input'])}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _problem(template: str, entry: Entry | Wording, start: str) -> str | None:
    """What is wrong with a template, or None. ``start``: how it must begin; "{object}": it must be in it;
    "": neither."""
    rest = template
    for name, sign in _SIGNS.items():
        if sign not in template:
            continue
        rest = rest.replace(sign, "")
        if name != "object" and not getattr(entry, name):
            return f"uses {sign}, but there are no words for it: fill the field {name}, or leave the slot out"
    if "{" in rest or "}" in rest:
        return f"has braces besides {', '.join(_SIGNS.values())}: correct or remove them"
    if not template.isprintable():
        return "has line breaks or control characters: remove them"
    if start == "{object}" and start not in template:
        return "lacks {object}: add it"
    if start == HEAD and not template.startswith(HEAD):
        return f"must begin with {HEAD!r}"
    words = len(template.split())
    return f"has {words} words, at most {LONGEST} are allowed: shorten it" if words > LONGEST else None


def too_long(bank: Bank, nouns: Iterable[str]) -> list[str]:
    """Which texts of a bank have more than ``TOKENS`` CLIP tokens in their longest filling; one line each."""
    from open_clip.tokenizer import SimpleTokenizer  # imports torch, which planning does without

    encode = SimpleTokenizer().encode

    def longest(words: Iterable[str]) -> str:
        return max(words, key=lambda word: len(encode(word)), default="")

    noun = longest(nouns)
    lines = []
    for at, entry in enumerate(bank.entries):
        words = [longest(entry.size), longest(entry.shape), longest(entry.severity)]
        for field in ("prompts", "details"):
            for number, template in enumerate(getattr(entry, field)):
                count = len(encode(fill_template(template, noun, *words))) + 2  # begin and end of text
                if count > TOKENS:
                    lines.append(
                        f"entry {at} ({entry.defect}): {field}[{number}] has up to {count} CLIP tokens, "
                        f"at most {TOKENS} are read: shorten it"
                    )
    return lines


# -- the anomaly word -----------------------------------------------------------------------------------


def find_word(prompt: str, word: str) -> tuple[int, int]:
    """(start, end) of the word in the prompt, in characters: whole words, any case. Of several places the
    last, because the noun, which may hold the word too ("a screw thread with a thread on it"), mostly comes
    first.

    CLIP's tokens never span a word's border, so the word's tokens are those between ``1 +
    tokens(prompt[:start])`` and ``1 + tokens(prompt[:end])``.

    Raises:
        UsageError: the word is empty, or not in the prompt.
    """
    places = [found.span() for found in _pattern(word).finditer(prompt)] if word.strip() else []
    if not places:
        what = f"the anomaly word {word!r}" if word.strip() else "an anomaly word"
        raise UsageError(
            f"the prompt {prompt!r} does not hold {what} as whole words: write it into the prompt, e.g. "
            "'a photo of a {object} with a crack on it', or name the word that stands there "
            "(params.words: {DEFECT: [WORD]})"
        )
    return places[-1]


def word_of(prompt: str, bank: Bank | None = None) -> str:
    """The anomaly word of a free prompt: the longest defect, word or synonym of the bank that occurs in it.

    Args:
        bank: None: the shipped one.

    Raises:
        UsageError: none does.
    """
    return _known_word(prompt, (bank or load_bank()).entries)[0]


def anomaly_word(prompt: str, defect: str, words: Mapping[str, Iterable[str]] | None = None) -> str:
    """The anomaly word of a recipe, from the recipe alone; the sampler's guidance is pointed at it.

    Args:
        prompt, defect: of the recipe.
        words: ``params.words`` of the recipe; the longest of the defect's that occurs is taken. Without one:
            the defect's name; without that, :func:`word_of` in the shipped bank.

    Raises:
        UsageError: none of them occurs in the prompt.
    """
    named = [word for word in (words or {}).get(defect, ()) if _occurs(prompt, word)]
    if named:
        return max(named, key=len)
    if _occurs(prompt, plain(defect)):
        return plain(defect)
    return word_of(prompt)


def _known_word(prompt: str, entries: Sequence[Entry]) -> tuple[str, Entry]:
    """(word, its entry); of equally long words the first in the bank."""
    text = _literal(prompt)
    found = [(word, e) for e in entries for word in (*_words(e), plain(e.defect)) if _occurs(text, word)]
    if not found:
        known = ", ".join(dict.fromkeys(entry.word for entry in entries))
        raise UsageError(
            f"the prompt {prompt!r} holds no anomaly word; known are {known} and their forms: write one of "
            "them into the prompt, or name your own (defect: NAME and params.words: {NAME: [WORD]})"
        )
    return max(found, key=lambda pair: len(pair[0]))


def _words(entry: Entry) -> tuple[str, ...]:
    return (entry.word, *entry.synonyms)


def _occurs(prompt: str, word: str) -> bool:
    return bool(word) and _pattern(word).search(prompt) is not None


@cache
def _pattern(word: str) -> re.Pattern[str]:
    """The word as whole words; a word next to a dash is part of a longer one ("crack-free")."""
    text = r"\s+".join(map(re.escape, word.split()))
    return re.compile(rf"(?<![\w-]){text}(?![\w-])", re.IGNORECASE)


def _literal(template: str) -> str:
    """What stands in a template besides its slots."""
    return _SLOT.sub("\x00", template)


# -- filling --------------------------------------------------------------------------------------------


def normal_prompt(noun: str) -> str:
    """ "a photo of a bottle", "a photo of an engine"."""
    return fill_template(HEAD, noun)


def fill(
    entry: Entry,
    noun: str,
    *,
    area: float,
    severity: float,
    draws: tuple[float, float, float, float, float] = (0.0, 0.0, 0.0, 0.0, 0.0),
) -> Texts:
    """The texts of an entry; see :func:`manifests.wording.write` for how words follow ``area`` (share of the
    picture) and ``severity`` (in [0, 1]).

    Args:
        draws: in [0, 1): which prompt, detail, size, shape and severity word.

    Raises:
        UsageError: the anomaly prompt does not hold the entry's word.
    """
    texts = Texts(normal_prompt(noun), *write(entry.wording(), noun, area, severity, draws))
    find_word(texts.prompt, entry.word)
    return texts


def texts_of(recipe: Recipe) -> tuple[Texts, str]:
    """The texts of a recipe and their anomaly word, from the recipe alone (params of a ``PromptParams``).

    Raises:
        UsageError: the prompt holds no anomaly word; see :func:`anomaly_word`.
    """
    settings = recipe.settings()
    noun = settings["nouns"].get(recipe.category) or noun_of(recipe.category)
    word = anomaly_word(recipe.prompt, recipe.defect, settings["words"])
    return Texts(normal_prompt(noun), recipe.prompt, recipe.detail), word


def prompts_of(params: PromptParams, settings: GeneratorSettings) -> Prompts:
    """What a plan draws from: the bank, restricted by ``params``, overridden by the configuration's
    ``defect`` (the only entry), ``prompt`` and ``detail`` (in place of the bank's). For
    ``Generator.prompts``.

    Raises:
        UsageError: the bank cannot be read, nothing of it is left, or a typed text has no anomaly word or a
            slot without words.
    """
    bank = load_bank(params.bank)
    if settings.prompt:
        worded = [_typed(bank, params, settings)]
    else:
        chosen = _chosen(bank, params, settings.defect)
        worded = [(_overridden(entry, settings), entry.word) for entry in chosen]
    words = _spoken(worded, params.words)
    known = (*bank.entries, *_shipped().entries)
    narrow = (
        wording.defect
        for wording, _ in worded
        if any(entry.place == "line" for entry in _entries(known, wording.defect))
    )
    lines = list(dict.fromkeys([*params.lines, *narrow]))
    return Prompts(
        tuple(wording for wording, _ in worded),
        dict(params.nouns),
        {"bank": None, "words": words, "lines": lines},
    )


def _chosen(bank: Bank, params: PromptParams, defect: str | None) -> tuple[Entry, ...]:
    names = (defect,) if defect else params.defects
    known = {plain(entry.defect): entry.defect for entry in bank.entries}
    for name in names:
        if plain(name) not in known:
            near = get_close_matches(plain(name), known, n=1, cutoff=0.6)
            hint = f"did you mean {known[near[0]]!r}?" if near else f"known: {', '.join(known.values())}"
            raise UsageError(
                f"{'defect' if defect else 'params.defects'}: the prompt bank has no {name!r}; {hint}"
                + ("; or give the generator a `prompt` of its own" if defect else "")
            )
    wanted = {plain(name) for name in names}
    kinds = ("texture", "object") if params.kind == "any" else (params.kind,)
    entries = tuple(
        entry
        for entry in bank.entries
        if (plain(entry.defect) in wanted if wanted else set(kinds) <= set(entry.kinds))
    )
    if not entries:
        raise UsageError(
            f"params.kind: no entry of the prompt bank is for {' and '.join(kinds)}; set params.kind to "
            + " or ".join(sorted({kind for entry in bank.entries for kind in entry.kinds}))
        )
    return entries


def _overridden(entry: Entry, settings: GeneratorSettings) -> Wording:
    """The entry under the configuration's spelling of the defect, and with its detail."""
    wording = entry.wording()
    details = (_checked(settings.detail, "detail", wording),) if settings.detail else wording.details
    return replace(wording, defect=settings.defect or wording.defect, details=details)


def _typed(bank: Bank, params: PromptParams, settings: GeneratorSettings) -> tuple[Wording, str]:
    """A prompt that a user typed, and its anomaly word.

    It is for every category, and has the slot words and descriptions of the bank's entries for its defect. A
    defect that no bank knows has the usual size and severity words, and its prompt is its description.
    """
    known = (*bank.entries, *_shipped().entries)
    if settings.defect:
        defect = settings.defect
        said = (word for entry in _entries(known, defect) for word in _words(entry))
        words = {defect: (*params.words.get(defect, ()), *said)}
        word = anomaly_word(_literal(settings.prompt), defect, words)
    else:
        word, entry = _known_word(settings.prompt, known)
        defect = entry.defect
    entries = _entries(bank.entries, defect) or _entries(known, defect)

    def union(field: str) -> tuple[str, ...]:
        return tuple(dict.fromkeys(text for entry in entries for text in getattr(entry, field)))

    wording = Wording(
        defect,
        (settings.prompt,),
        (settings.detail,) if settings.detail else union("details") or (settings.prompt,),
        union("size") or tuple(words[0] for words in SIZES),
        union("shape"),
        union("severity") or tuple(words[0] for words in SEVERITIES),
    )
    _checked(settings.prompt, "prompt", wording)
    _checked(wording.details[0], "detail", wording)
    return wording, word


def _entries(entries: Iterable[Entry], defect: str) -> list[Entry]:
    return [entry for entry in entries if plain(entry.defect) == plain(defect)]


def _checked(text: str, field: str, wording: Wording) -> str:
    problem = _problem(text, wording, "")
    if problem:
        raise UsageError(f"{field}: {text!r} {problem}")
    return text


def _spoken(worded: Iterable[tuple[Wording, str]], own: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """``params.words`` with the words added that a recipe does not show by itself."""
    words = {name: list(known) for name, known in own.items()}
    for wording, word in worded:
        if not all(_shows(_literal(prompt), wording.defect, word, words) for prompt in wording.prompts):
            words.setdefault(wording.defect, []).append(word)
    return words


def _shows(prompt: str, defect: str, word: str, words: Mapping[str, Iterable[str]]) -> bool:
    try:
        return plain(anomaly_word(prompt, defect, words)) == plain(word)
    except UsageError:
        return False
