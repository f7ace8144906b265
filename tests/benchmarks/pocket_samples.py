"""What becomes of samples: acceptance, the ways of composing them, and sheets to look at.

Compositions and mask sources share the same chains: they are run once and composed again for every cell.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pillow
from PIL import ImageDraw, ImageFont
from rich.table import Table

from generation import registry
from generation.backbones import square
from generation.cut import generator as cut
from generation.cut.chain import Twins
from generation.cut.settings import CutParams
from generation.protocol import Edit, Generator, Source
from generation.synthesis import Outcome, synthesise
from manifests.pictures import small_mask
from manifests.schema import Recipe
from tests.benchmarks.pocket_case import (
    Case,
    Part,
    Units,
    by_category,
    described,
    estimate,
    shown,
    table,
    verdict,
)
from workflows.contact import GAP, LINE, fit, fit_mask, letterbox, outline
from workflows.stages import Round

ACCEPTED = 0.6  # wanted share
COMPOSITIONS, MASKS = ("residual", "gradient", "paste"), ("twin", "attention", "product")
CELLS = {f"{c}/{m}": {"composition": c, "mask": m} for c, m in product(COMPOSITIONS, MASKS)}
DEFAULT = f"{CutParams().composition}/{CutParams().mask}"
PLAIN = "plain chain"  # what the publication describes: generated pixels, attention's mask, the empty prompt
PLAIN_PARAMS = {"composition": "paste", "mask": "attention", "twin": "empty"}
CLASSIC = ("perlin", "cutpaste")
ROWS = (*CELLS, PLAIN, *CLASSIC)
FIGURES = ("leak", "hollow", "contrast", "clip_gain")
SIDE = 224  # of the proxy's pictures, as in a run
TILE = 168


class Kept:
    """The generator ``cut`` that remembers the twins of each draw, so that chains are run once."""

    def __init__(self) -> None:
        self._twins: dict[int, Twins] = {}

    def generator(self, **changes: Any) -> Generator:
        """With other settings of composition and mask: the chains stay."""

        def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> cut.CutDraw:
            drawn = cut.draw(recipe, source, rng)
            return replace(drawn, settings=drawn.settings.model_copy(update=changes))

        def apply(sources: Sequence[Source], draws: Sequence[cut.CutDraw], model: cut.Model) -> list[Edit]:
            twins = self.twins(sources, draws, model)
            return cut.edits(sources, draws, twins, model, draws[0].settings.batch)

        return replace(cut.GENERATOR, draw=draw, apply=apply)

    def twins(
        self, sources: Sequence[Source], draws: Sequence[cut.CutDraw], model: cut.Model
    ) -> list[list[Twins]]:
        new = [k for k, one in enumerate(draws) if any(s.seed not in self._twins for s in one.spots)]
        if new:
            chosen = [draws[k] for k in new]
            found = cut.chains([sources[k] for k in new], chosen, model, draws[0].settings.batch)
            for one, own in zip(chosen, found, strict=True):
                self._twins |= {spot.seed: twins for spot, twins in zip(one.spots, own, strict=True)}
        return [[self._twins[spot.seed] for spot in one.spots] for one in draws]


def made(case: Case, round_: Round, generator: Generator, attempts: int) -> list[Outcome]:
    """The recipes of a round's first shard, by the code and with the gates of a run."""
    model = case.model if generator.load is not None else None
    gates = round_.generation.gates
    return synthesise(round_.plan(0), round_.pictures.source, generator, model, gates, attempts, {})


# -- acceptance -----------------------------------------------------------------------------------------


def acceptance(case: Case, category: str) -> dict[str, Any]:
    """Gates at their defaults, after the first draw of each recipe and after all redraws."""
    round_ = case.plan(category, case.count(24))
    generator = Kept().generator()
    _ = case.model  # loaded before the clock starts
    started = time.perf_counter()
    first = made(case, round_, generator, 1)
    once = time.perf_counter() - started
    last = made(case, round_, generator, round_.generation.attempts)
    seconds = time.perf_counter() - started
    return {
        "first": [float(outcome.status == "accepted") for outcome in first],
        "last": [float(outcome.status == "accepted") for outcome in last],
        "first_reasons": dict(Counter(outcome.reason for outcome in first if outcome.reason)),
        "last_reasons": dict(Counter(outcome.reason for outcome in last if outcome.reason)),
        "by_defect": [(outcome.recipe.defect, outcome.status) for outcome in first],
        "draws": sum(outcome.attempts for outcome in last),
        "spots": sum(outcome.recipe.count for outcome in first),
        "seconds_a_draw": once / len(first),
        "seconds_a_sample": seconds / max(1, sum(outcome.status == "accepted" for outcome in last)),
    }


def acceptance_summary(units: Units) -> dict[str, Any]:
    rows = {
        name: {
            "first": described(estimate([unit["first"]])),
            "last": described(estimate([unit["last"]])),
            **{key: unit[key] for key in ("first_reasons", "seconds_a_draw", "seconds_a_sample")},
        }
        for name, unit in units.items()
    }
    defects: dict[str, list[float]] = {}
    for unit in units.values():
        for defect, status in unit["by_defect"]:
            defects.setdefault(defect, []).append(float(status == "accepted"))
    reasons: dict[str, Counter[str]] = {"first": Counter(), "last": Counter()}
    for kind, counts in reasons.items():
        for unit in units.values():
            counts.update(unit[f"{kind}_reasons"])
    return {
        "categories": rows,
        "defects": {name: described(estimate([hits])) for name, hits in sorted(defects.items())},
        "reasons": {kind: dict(counts.most_common()) for kind, counts in reasons.items()},
        "first": described(estimate([unit["first"] for unit in units.values()])),
        "last": described(estimate([unit["last"] for unit in units.values()])),
        "seconds_a_draw": float(np.mean([unit["seconds_a_draw"] for unit in units.values()])),
        "seconds_a_sample": float(np.mean([unit["seconds_a_sample"] for unit in units.values()])),
        "missed": [name for name, row in rows.items() if row["last"]["mean"] < ACCEPTED],
    }


def acceptance_tables(summary: dict[str, Any]) -> list[Table]:
    title = (
        f"acceptance: default gates, wanted {ACCEPTED:.2f} a category after all draws: "
        f"{verdict(not summary['missed'])}"
    )
    rows = table(
        title, "category", "first draw", "all draws", "s a draw", "s a sample", "why not, first draw"
    )
    for name, row in summary["categories"].items():
        why = ", ".join(f"{reason} {count}" for reason, count in row["first_reasons"].items())
        seconds = [f"{row[key]:.2f}" for key in ("seconds_a_draw", "seconds_a_sample")]
        rows.add_row(name, shown(row["first"], ".2f"), shown(row["last"], ".2f"), *seconds, why)
    seconds = [f"{summary[key]:.2f}" for key in ("seconds_a_draw", "seconds_a_sample")]
    why = ", ".join(f"{reason} {count}" for reason, count in summary["reasons"]["first"].items())
    rows.add_row("mean", shown(summary["first"], ".2f"), shown(summary["last"], ".2f"), *seconds, why)
    defects = table("acceptance: first draws by defect", "defect", "accepted")
    for name, found in summary["defects"].items():
        defects.add_row(name, shown(found, ".2f"))
    reasons = table("acceptance: reasons of rejection", "reason", "first draw", "all draws")
    counts = summary["reasons"]
    for reason in sorted({*counts["first"], *counts["last"]}):
        reasons.add_row(reason, *(str(counts[kind].get(reason, 0)) for kind in ("first", "last")))
    return [rows, defects, reasons]


# -- composition ----------------------------------------------------------------------------------------


def composition(case: Case, category: str) -> dict[str, Any]:
    """First draws of the same recipes under every composition, and of the classic generators beside them.

    Accepted samples are left in ``case.samples`` for ``usefulness``.
    """
    count = case.count(6)
    kept, shared = Kept(), case.plan(category, count)
    runs = {name: (shared, kept.generator(**cell)) for name, cell in CELLS.items()}
    runs[PLAIN] = (case.plan(category, count, params=PLAIN_PARAMS), cut.GENERATOR)
    for name in CLASSIC:
        runs[name] = (case.plan(category, count, name), registry.get(name))
    rows: dict[str, list[dict[str, Any]]] = {}
    arrays: dict[str, np.ndarray] = {"recipes": np.array(count)}
    for name, (round_, generator) in runs.items():
        rows[name] = []
        for at, outcome in enumerate(made(case, round_, generator, 1)):
            # A mask that is empty has no figures: they would read as perfect ones.
            found = {key: getattr(outcome, key) for key in FIGURES[:3]} | dict(outcome.measures)
            figures = {k: found.get(k, np.nan) if outcome.mask_area > 0 else np.nan for k in FIGURES}
            rows[name].append({"status": outcome.status, "reason": outcome.reason, **figures})
            if outcome.status == "accepted":
                assert outcome.pixels is not None and outcome.mask is not None
                arrays[f"{name}|{at}|image"] = square(outcome.pixels, SIDE)
                arrays[f"{name}|{at}|mask"] = small_mask(outcome.mask > 0, SIDE)
    case.samples.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(case.samples / f"{category}.npz", **arrays)
    return {"rows": rows}


def composition_summary(units: Units) -> dict[str, Any]:
    def values(name: str, key: str) -> list[list[float]]:
        return [[row[key] for row in unit["rows"][name]] for unit in units.values()]

    result = {}
    for name in ROWS:
        hits = [[float(r["status"] == "accepted") for r in unit["rows"][name]] for unit in units.values()]
        reasons = Counter(r["reason"] for unit in units.values() for r in unit["rows"][name] if r["reason"])
        result[name] = {
            "accepted": described(estimate(hits)),
            **{key: described(estimate(values(name, key))) for key in FIGURES},
            "reasons": dict(reasons.most_common()),
            "recipes": sum(map(len, hits)),
        }
    return {"rows": result, "default": DEFAULT}


def composition_tables(summary: dict[str, Any]) -> list[Table]:
    title = "composition: first draws of the same recipes; the gain is judged by the CLIP that guided them"
    rows = table(title, "composition/mask", "accepted", *FIGURES, "most often", "n")
    for name, row in summary["rows"].items():
        label = f"{name} (default)" if name == summary["default"] else name
        why = ", ".join(f"{reason} {count}" for reason, count in list(row["reasons"].items())[:2])
        figures = [shown(row[key], ".3f" if key != "contrast" else ".2f") for key in FIGURES]
        rows.add_row(label, shown(row["accepted"], ".2f"), *figures, why, str(row["recipes"]))
    return [rows]


# -- sheets ---------------------------------------------------------------------------------------------

COLUMNS = ("source", "anomaly", "mask", "twin normal", "twin anomaly", "4 x |difference|", "attention")


def write_sheet(case: Case, category: str, folder: Path) -> Path:
    """One PNG of a category's first draws, one spot each, seen in its crop; one that is there is kept."""
    path = folder / f"{category}.png"
    if path.exists():
        return path
    round_ = case.plan(category, case.count(8), count=(1, 1))
    recipes, kept = round_.plan(0), Kept()
    generator = kept.generator()
    outcomes = made(case, round_, generator, 1)
    rows = []
    for recipe, outcome in zip(recipes, outcomes, strict=True):
        if outcome.pixels is None or outcome.mask is None:
            continue
        source = round_.pictures.source(recipe)
        drawn = generator.draw(recipe, source, recipe.rng(0))
        twins = kept.twins([source], [drawn], case.model)[0][0]
        rows.append((_tiles(source, drawn.spots[0], outcome, twins), _caption(outcome)))
    folder.mkdir(parents=True, exist_ok=True)
    _stack(category, rows).save(path, format="PNG")
    return path


def _tiles(source: Source, spot: cut.Spot, outcome: Outcome, twins: Twins) -> list[np.ndarray]:
    assert outcome.pixels is not None and outcome.mask is not None
    y0, y1, x0, x1 = spot.crop
    after = fit(outcome.pixels[y0:y1, x0:x1], TILE)
    mask = fit_mask(outcome.mask[y0:y1, x0:x1] > 0, after.shape[:2])
    difference = np.abs(twins.anomaly - twins.normal).max(axis=2, keepdims=True) * 4
    low, high = float(twins.attention.min()), float(twins.attention.max())
    seen = (twins.attention[..., None] - low) / max(high - low, 1e-6)
    levels = [twins.normal, twins.anomaly, difference, seen]
    return [
        fit(source.pixels[y0:y1, x0:x1], TILE),
        outline(after, mask),
        np.repeat(np.where(mask, np.uint8(255), np.uint8(0))[..., None], 3, axis=2),
        *(fit(np.rint(np.clip(level, 0, 1) * 255).astype(np.uint8), TILE) for level in levels),
    ]


def _caption(outcome: Outcome) -> str:
    found, recipe = outcome.measures, outcome.recipe
    figures = ", ".join(
        f"{name} {found[name]:.2f}" for name in ("strength", "concentration", "clip_gain") if name in found
    )
    return (
        f"{recipe.prompt}  [{outcome.reason or 'accepted'}; area {outcome.mask_area:.2%} of "
        f"{recipe.area:.2%}, severity {recipe.severity:.2f}, contrast {outcome.contrast:.2f}, {figures}]"
    )


def _stack(title: str, rows: Sequence[tuple[list[np.ndarray], str]]) -> Pillow.Image:
    width = len(COLUMNS) * (TILE + GAP) + GAP
    step = TILE + LINE + 2 * GAP
    sheet = Pillow.new("RGB", (width, 2 * LINE + max(1, len(rows)) * step), (255, 255, 255))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    pen.text((GAP, 0), title if rows else f"{title}: nothing could be made", fill=(0, 0, 0), font=font)
    for at, name in enumerate(COLUMNS):
        pen.text((GAP + at * (TILE + GAP), LINE), name, fill=(0, 0, 0), font=font)
    for number, (tiles, caption) in enumerate(rows):
        top = 2 * LINE + number * step
        for at, tile in enumerate(tiles):
            sheet.paste(Pillow.fromarray(letterbox(tile, TILE)), (GAP + at * (TILE + GAP), top))
        pen.text((GAP, top + TILE + 2), caption, fill=(0, 0, 0), font=font)
    return sheet


SAMPLE_PARTS = {
    "acceptance": Part(by_category, acceptance, acceptance_summary, acceptance_tables),
    "composition": Part(by_category, composition, composition_summary, composition_tables),
}
