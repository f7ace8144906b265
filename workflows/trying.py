"""One anomaly on one picture with the generator ``cut``, by the code of a run and without a workspace."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import ValidationError

from generation import registry
from generation.cut.prompts import HEAD, find_word, load_bank, normal_prompt, prompts_of, word_of
from generation.cut.settings import CutParams
from generation.gates import Gates
from generation.masks import resolve_location
from generation.protocol import Generator, Source
from generation.synthesis import Outcome, synthesise
from manifests.errors import FlawsmithError, UsageError
from manifests.pictures import (
    apply_window,
    decode,
    encode,
    encode_mask,
    load_location,
    pixel_hash,
    read_bytes,
)
from manifests.recipes import GeneratorSettings
from manifests.schema import Recipe, canonical_json
from manifests.wording import DRAWS, fill_template, noun_of
from workflows.config import explain
from workflows.console import late
from workflows.contact import GAP, fit, fit_mask, outline
from workflows.stages import load_model, prepare_process

RESULTS = ("anomaly.png", "mask.png", "side_by_side.png")
NOTE = "recipe.json"  # written last; a folder that holds a trial's is a trial's own
WORDED = 0, 0, 0  # spawn key of the words; those of attempts have one number
TILE_SMALLEST, TILE_LARGEST = 256, 768  # pixels of a picture's longer side in side_by_side.png
SHOWN = ("strength", "concentration", "attention", "clip_gain")  # of the generator's own figures


@dataclass(frozen=True)
class Wish:
    """What the command line asks for.

    Attributes:
        prompt: holds the anomaly word.
        detail, normal: the other two texts; "": found from the prompt and the prompt bank.
        word: the anomaly word; "": the one that the prompt bank knows.
        area: wanted share of the picture, in (0, 0.5].
        severity: in [0, 1].
        count: spots.
        params: settings of ``cut``.
    """

    prompt: str
    detail: str = ""
    normal: str = ""
    word: str = ""
    area: float = 0.02
    severity: float = 0.7
    count: int = 1
    seed: int = 0
    params: Mapping[str, Any] | None = None


def try_picture(picture: Path, wish: Wish, *, mask: Path | None = None, out: Path | None = None) -> str:
    """Makes one sample and writes ``anomaly.png``, ``mask.png``, ``side_by_side.png`` (picture, anomaly with
    the mask outlined, mask) and ``recipe.json`` (all that decided it).

    What the gates of a run would reject is written all the same, and the answer says so. A folder in which an
    earlier trial wrote is written over; other files are never replaced.

    Args:
        picture: any that a run reads; of 16 bits, it is mapped to 8 by its own range of levels.
        mask: where the anomaly may be: non-zero. None: anywhere.
        out: None: ``<picture's stem>-cut`` in the current folder.

    Returns:
        One line: where it is, its measures and what the gates say.

    Raises:
        UsageError: the texts, the settings, or a folder that holds files of somebody else.
        PictureError: picture or mask cannot be read.
        FlawsmithError: no anomaly could be made; nothing is written.
    """
    out = out or Path(f"{picture.stem}-cut")
    _refuse_others(out)
    source = read_source(picture, mask)
    recipe, normal = recipe_of(wish, pixel_hash(source.pixels), located=mask is not None)
    prepare_process()
    model_name = recipe.settings()["model"]
    with late(f"loading the model {model_name}…"):
        model = load_model("cut", recipe.params)
    with late(f"drawing {wish.count} spot(s) from {normal!r} to {recipe.prompt!r}…"):
        (outcome,) = synthesise([recipe], lambda _: source, _worded(normal), model, Gates(), 1, {})
    if outcome.pixels is None or outcome.mask is None:
        remedy = "try another --seed, a smaller --area or a wider --mask"
        raise FlawsmithError(f"{picture}: no anomaly could be made ({outcome.reason}); {remedy}")
    _write(out, source, outcome, normal)
    return _line(out, outcome)


def read_source(picture: Path, mask: Path | None) -> Source:
    """The picture at 8 bits and where it may be changed.

    Raises:
        PictureError: one of the files cannot be read.
        UsageError: the mask is black everywhere.
    """
    pixels = decode(read_bytes(str(picture)), name=str(picture)).pixels
    if pixels.dtype == np.uint16:
        low, high = int(pixels.min()), int(pixels.max())
        pixels = apply_window(pixels, (low, max(high, low + 1)), 8)
    allowed = None if mask is None else load_location(str(mask), pixels.shape[:2])
    if allowed is not None and not allowed.any():
        raise UsageError(f"--mask {mask}: no pixel is set; paint where the anomaly may be in white")
    return Source(pixels, resolve_location("roi" if mask is not None else "anywhere", pixels, roi=allowed))


def recipe_of(wish: Wish, image_id: str, *, located: bool = False) -> tuple[Recipe, str]:
    """The recipe of a wish as planning would write it, and the normal prompt.

    A normal prompt that is not "a photo of a NOUN" has no place in a recipe; it is given to the generator
    beside it.

    Raises:
        UsageError: a text or a setting is wrong.
    """
    params = _params(wish)
    word = _word(wish)
    normal = wish.normal or normal_of(wish.prompt, word)
    noun = noun_in(normal)
    typed = GeneratorSettings(defect=wish.word or None, prompt=wish.prompt, detail=wish.detail)
    prompts = prompts_of(params, typed)
    draws = np.random.default_rng(np.random.SeedSequence(wish.seed, spawn_key=WORDED)).random(DRAWS).tolist()
    defect, prompt, detail = replace(prompts, nouns={noun: noun}).words(noun, wish.area, wish.severity, draws)
    settings = {**params.model_dump(mode="json"), **prompts.params, "nouns": {noun: noun}}
    recipe = Recipe(
        sample_id="000-00000-00000",
        round=0,
        image_id=image_id,
        category=noun,
        generator="cut",
        defect=defect,
        prompt=prompt,
        detail=detail,
        area=wish.area,
        severity=wish.severity,
        count=wish.count,
        location="roi" if located else "anywhere",
        donors=(),
        params=canonical_json(settings),
        seed=wish.seed,
        batch=0,
        shard=0,
    )
    return recipe, normal


def normal_of(prompt: str, word: str) -> str:
    """The prompt without its anomaly: what stands before the clause that holds the word.

    >>> normal_of("a photo of a steel plate with a deep scratch on it", "scratch")
    'a photo of a steel plate'
    >>> normal_of("a photo of a scratched plate", "scratched")
    'a photo of an object'
    """
    before = prompt[: find_word(prompt, word)[0]]
    clauses = list(re.finditer(r",|\s(?:with|that|which|having|showing)\s", before))
    return before[: clauses[-1].start()].strip(" ,") if clauses else normal_prompt("object")


def noun_in(normal: str) -> str:
    """What a normal prompt shows: NOUN of "a photo of a NOUN", else "object".

    >>> noun_in("a photo of an old bottle"), noun_in("macro shot, steel")
    ('old bottle', 'object')
    """
    head = HEAD.replace("a {object}", "")
    found = re.fullmatch(rf"{head}an? ([^{{}}]{{1,60}})", normal.strip())
    return found[1].strip() if found else "object"


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` each, the value read as in a configuration.

    Raises:
        UsageError: no ``=``, or a value that is no YAML.
    """
    found = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise UsageError(f"--set {pair}: expected NAME=VALUE, e.g. --set steps=30")
        try:
            found[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {pair}: the value cannot be read as YAML: {error}") from error
    return found


def _params(wish: Wish) -> CutParams:
    given = dict(wish.params or {})
    if wish.word:
        given["words"] = {wish.word: [wish.word]}
    try:
        return CutParams.model_validate(given)
    except ValidationError as error:
        raise UsageError(explain(error, given, "--set", CutParams)) from None


def _word(wish: Wish) -> str:
    """The anomaly word; the remedy of the errors is the command line's, not a configuration's."""
    try:
        word = wish.word or word_of(wish.prompt)
        find_word(wish.prompt, word)
    except UsageError:
        if wish.word:
            raise UsageError(
                f"--word {wish.word}: does not stand in the prompt {wish.prompt!r} as whole words; write it "
                "there, or name a word that does"
            ) from None
        known = ", ".join(dict.fromkeys(entry.word for entry in load_bank().entries))
        raise UsageError(
            f"the prompt {wish.prompt!r} holds no known word for an anomaly ({known}, and their forms); "
            "write one of them into it, or say with --word which of its words is the anomaly"
        ) from None
    return word


def _worded(normal: str) -> Generator:
    """``cut`` with this normal prompt; the same generator where the recipe gives the same."""
    generator = registry.get("cut")

    def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> Any:
        drawn = generator.draw(recipe, source, rng)
        return replace(drawn, texts=drawn.texts._replace(normal=normal))

    return replace(generator, draw=draw)


def _refuse_others(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; name a folder")
    there = [name for name in (*RESULTS, NOTE) if (out / name).exists()]
    if there and not _is_note(out / NOTE):
        raise UsageError(
            f"{out} holds {', '.join(there)}, but no {NOTE} of an earlier trial: they may be somebody's; "
            "name another folder with --out"
        )


def _is_note(path: Path) -> bool:
    """Whether a file is what :func:`_write` leaves of a trial."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and {"normal", "recipe", "model", "measures", "status"} <= set(told)


def _write(out: Path, source: Source, outcome: Outcome, normal: str) -> None:
    assert outcome.pixels is not None and outcome.mask is not None
    note = {
        "normal": normal,
        "recipe": {name: getattr(outcome.recipe, name) for name in Recipe.__dataclass_fields__}
        | {"params": outcome.recipe.settings()},
        "model": registry.get("cut").identify(outcome.recipe.settings()),
        "measures": _measures(outcome),
        "status": outcome.status,
        "reason": outcome.reason,
    }
    sheet = side_by_side(source.pixels, outcome.pixels, outcome.mask > 0)
    files = {
        NOTE: (json.dumps(note, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode(),
        "anomaly.png": encode(outcome.pixels, "png"),
        "mask.png": encode_mask(outcome.mask),
        "side_by_side.png": encode(sheet, "png"),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():  # the note first: what follows is then known as a trial's
        aside = out / f".{name}.part"
        aside.write_bytes(data)
        os.replace(aside, out / name)


def side_by_side(before: np.ndarray, after: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Picture, anomaly with the mask outlined, mask: uint8, h×(3·w + 2·GAP)×3.

    Args:
        before, after: uint8, H×W×C with C = 1 or 3.
        mask: bool, H×W.
    """
    side = min(max(*before.shape[:2], TILE_SMALLEST), TILE_LARGEST)
    shown = fit(after, side)
    small = fit_mask(mask, shown.shape[:2])
    flat = np.repeat(np.where(small, np.uint8(255), np.uint8(0))[:, :, None], 3, axis=2)
    gap = np.full((shown.shape[0], GAP, 3), 255, np.uint8)
    return np.concatenate([fit(before, side), gap, outline(shown, small), gap, flat], axis=1)


def _measures(outcome: Outcome) -> dict[str, float]:
    own = {name: getattr(outcome, name) for name in ("contrast", "leak", "hollow")}
    found = {"area": outcome.mask_area, **own, **outcome.measures}
    return {name: round(float(value), 6) for name, value in found.items() if math.isfinite(value)}


def _line(out: Path, outcome: Outcome) -> str:
    found = _measures(outcome)
    shown = [f"{name} {found[name]:.2f}" for name in ("contrast", "leak", "hollow", *SHOWN) if name in found]
    verdict = (
        "passes the gates" if outcome.status == "accepted" else f"a run would reject it: {outcome.reason}"
    )
    return f"{out}: {outcome.recipe.defect}, area {found['area']:.2%}, {', '.join(shown)}; {verdict}"


def missing_prompt(picture: Path) -> UsageError:
    """The error of a trial without a prompt, with an example for this picture."""
    example = fill_template("a photo of a {object} with a crack on it", noun_of(picture.stem))
    return UsageError(
        "--prompt is missing: say what to draw, with the word for the anomaly in it, e.g. "
        f'flawsmith try {picture} --prompt "{example}"'
    )
