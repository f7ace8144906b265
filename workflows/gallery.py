"""Every generator at several severities on given pictures, on one page: what a user chooses from."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont

from generation import registry
from generation.gates import Gates
from generation.protocol import Generator, Source
from generation.synthesis import Outcome, synthesise
from manifests.errors import UsageError
from manifests.pictures import pixel_hash, with_channels
from manifests.recipes import GeneratorSettings
from manifests.schema import Recipe, canonical_json
from manifests.wording import DRAWS
from workflows.console import progress
from workflows.contact import FAINT, GAP, INK, LINE, MARGIN, PAPER, fit, fit_mask, letterbox, outline
from workflows.stages import load_model, prepare_process
from workflows.trying import read_source

SEVERITIES = (0.0, 0.5, 1.0)
TILE = 160  # pixels a side
LABEL = 250  # pixels of the first column
ATTEMPTS = 6
TALL = 10  # rows beyond which a sheet has two columns


@dataclass(frozen=True)
class Row:
    """One generator on one picture: tiles by severity, uint8 TILE×TILE×3, and why a sample was rejected."""

    generator: Generator
    picture: str
    tiles: tuple[np.ndarray, ...]
    reasons: tuple[str, ...]


def gallery(
    pictures: Sequence[Path], out: Path, *, names: Sequence[str] = (), area: float = 0.03, seed: int = 0
) -> Path:
    """Renders every generator × severity on every picture into a PNG or an HTML page that holds its pictures.

    The same place and noise serve all severities of a row: the first of six at which the gates of a run
    accept all of them, or else accept most; a sample that they would reject is shown all the same, with the
    reason. A generator that needs a second picture gets the next one; name at least two.

    Args:
        names: of generators; empty: all but those of features, which have no picture.
        out: ``*.png`` or ``*.html``.

    Raises:
        UsageError: no picture, an unknown generator, one of features, another ending, or ``out`` is one of
            the pictures.
        PictureError: a picture cannot be read.
    """
    if not pictures:
        raise UsageError("name at least one picture of a good part, e.g. flawsmith gallery plate.png")
    if out.suffix not in (".png", ".html"):
        raise UsageError(f"--out {out}: a gallery is written as .png or .html")
    if out.resolve() in [picture.resolve() for picture in pictures]:
        raise UsageError(f"--out {out}: the gallery would replace the picture; name another file")
    chosen = [registry.get(name) for name in names or registry.names()]
    features = [generator.name for generator in chosen if generator.family == "feature"]
    if names and features:
        raise UsageError(f"{', '.join(features)}: changes features, of which there is no picture to show")
    chosen = sorted(
        (generator for generator in chosen if generator.family != "feature"),
        key=lambda generator: (("classic", "frequency", "cut").index(generator.family), generator.name),
    )
    prepare_process()
    sources = [read_source(picture, None) for picture in pictures]
    rows = []
    with progress("gallery", len(chosen) * len(pictures), "rows") as advance:
        for generator in chosen:
            for at, picture in enumerate(pictures):
                donor = sources[(at + 1) % len(sources)].pixels
                donor = with_channels(donor, sources[at].pixels.shape[2])
                source = Source(sources[at].pixels, sources[at].allowed, (donor,))
                rows.append(render(generator, picture, source, area, seed))
                advance(1)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        sheet(rows).save(out, format="PNG")
    else:
        out.write_text(page(rows), encoding="utf-8")
    return out


def render(generator: Generator, picture: Path, source: Source, area: float, seed: int) -> Row:
    """One generator on one picture at every severity."""
    best: list[Outcome] = []
    model = None
    for place in range(ATTEMPTS):
        drawn = int(np.random.SeedSequence(seed, spawn_key=(place,)).generate_state(1)[0])
        recipes = [recipe_of(generator, source, picture.stem, area, level, drawn) for level in SEVERITIES]
        if generator.load is not None and model is None:
            model = load_model(generator.name, recipes[0].params)
        outcomes = [synthesise([r], lambda _: source, generator, model, Gates(), 1, {})[0] for r in recipes]
        if not best or _accepted(outcomes) > _accepted(best):
            best = outcomes
        if _accepted(best) == len(SEVERITIES):
            break
    tiles = tuple(_tile(source, outcome) for outcome in best)
    return Row(generator, picture.name, tiles, tuple(outcome.reason for outcome in best))


def _accepted(outcomes: Sequence[Outcome]) -> int:
    return sum(outcome.status == "accepted" for outcome in outcomes)


def recipe_of(
    generator: Generator, source: Source, noun: str, area: float, severity: float, seed: int
) -> Recipe:
    """A recipe of default settings, worded by the generator's prompts where it has any."""
    params = generator.params()
    settings, defect, prompt, detail = params.model_dump(mode="json"), generator.defect, "", ""
    if generator.prompts is not None:
        prompts = generator.prompts(params, GeneratorSettings())
        draws = np.random.default_rng(seed).random(DRAWS).tolist()
        defect, prompt, detail = prompts.words(noun, area, severity, draws)
        settings |= prompts.params
    return Recipe(
        sample_id="000-00000-00000",
        round=0,
        image_id=pixel_hash(source.pixels),
        category=noun,
        generator=generator.name,
        defect=defect,
        prompt=prompt,
        detail=detail,
        area=area,
        severity=severity,
        count=1,
        location="anywhere",
        donors=(),
        params=canonical_json(settings),
        seed=seed,
        batch=0,
        shard=0,
    )


def _tile(source: Source, outcome: Outcome) -> np.ndarray:
    pixels = source.pixels if outcome.pixels is None else outcome.pixels
    shown = fit(pixels, TILE)
    if outcome.mask is not None and outcome.mask.any():
        shown = outline(shown, fit_mask(outcome.mask > 0, shown.shape[:2]))
    return letterbox(shown, TILE)


def sheet(rows: Sequence[Row]) -> Pillow.Image:
    """One line a row: what it is, then its tiles; in two columns where there are many."""
    font = ImageFont.load_default(13)
    columns = 2 if len(rows) > TALL else 1
    deep = -(-len(rows) // columns)
    width = LABEL + len(SEVERITIES) * (TILE + GAP) + MARGIN
    top = MARGIN + LINE + GAP
    paper = Pillow.new("RGB", (columns * width + MARGIN, top + deep * (TILE + GAP) + MARGIN), PAPER)
    draw = ImageDraw.Draw(paper)
    for at, row in enumerate(rows):
        left, y = MARGIN + at // deep * width, top + at % deep * (TILE + GAP)
        draw.text((left, y), row.generator.name, fill=INK, font=font)
        for line, text in enumerate([row.generator.family, *_broken(row.generator.summary), row.picture]):
            draw.text((left, y + (line + 1) * LINE), text, fill=FAINT, font=font)
        for number, (severity, tile, reason) in enumerate(
            zip(SEVERITIES, row.tiles, row.reasons, strict=True)
        ):
            x = left + LABEL + number * (TILE + GAP)
            if at % deep == 0:
                draw.text((x, MARGIN), f"severity {severity:g}", fill=INK, font=font)
            paper.paste(Pillow.fromarray(tile), (x, y))
            if reason:
                draw.text((x + 3, y + 2), reason, fill=INK, font=font, stroke_width=2, stroke_fill=PAPER)
    return paper


def _broken(text: str, width: int = 34) -> list[str]:
    """A summary on at most four lines."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) < width:
            lines[-1] = f"{lines[-1]} {word}".strip()
        else:
            lines.append(word)
    return lines[:4]


def page(rows: Sequence[Row]) -> str:
    """A page of its own: pictures inside, every text escaped."""
    heads = "".join(f"<th>severity {severity:g}</th>" for severity in SEVERITIES)
    lines = []
    for row in rows:
        name, family, summary, picture = (
            html.escape(text)
            for text in (row.generator.name, row.generator.family, row.generator.summary, row.picture)
        )
        cells = "".join(
            f'<td><img alt="{name}" src="data:image/png;base64,{_encoded(tile)}"><br>{html.escape(reason)}'
            for tile, reason in zip(row.tiles, row.reasons, strict=True)
        )
        lines.append(f"<tr><th>{name}</th><td>{family}<br>{summary}<br>{picture}</td>{cells}</tr>")
    style = "body{font:14px sans-serif}td,th{text-align:left;vertical-align:top;padding:4px;max-width:16em}"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Generators</title>'
        f"<style>{style}</style><table><tr><th>generator</th><th>imitates</th>{heads}</tr>"
        + "".join(lines)
        + "</table></html>\n"
    )


def _encoded(tile: np.ndarray) -> str:
    data = io.BytesIO()
    Pillow.fromarray(tile).save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()
