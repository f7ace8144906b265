"""What the small models can do by themselves: the autoencoder, CLIP, and attention in the diffusion model.

See ``pocket.py`` for the command.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from rich.table import Table

from generation.backbones import square
from generation.cut import generator as cut
from generation.cut.clip import Clip
from generation.cut.prompts import load_bank
from manifests.pictures import load, load_mask
from manifests.schema import GOOD, Image
from manifests.wording import noun_of, plain
from tests.benchmarks.pocket_case import (
    Case,
    Part,
    Units,
    by_category,
    described,
    estimate,
    evenly,
    picture_tensor,
    shown,
    table,
    verdict,
)
from training.components import label_components
from training.intervals import Estimate, evaluate_images, mean_estimate
from training.pocket.captions import NOUNS
from training.pocket.contrastive import DEFECTS, prompts
from training.pocket.damage import damage
from training.pocket.materials import GENERIC_NOUNS
from training.pocket.pictures import numbered

UNSEEN = 1_000_000_007  # seed of drawn pictures; no leg of the training uses it
CHUNK = 16  # pictures a pass
NATIVE_DB, WEAK_DB = 30.0, 27.0  # wanted mean, and what a category is named below
TOLD = 0.85  # wanted accuracy
ATTENTION_SHARE, PEAK_SHARE = 0.10, 0.03  # strongest places compared; those of the concentration
ATTENTION_RATIO = 2.0  # wanted IoU over that of shuffled pairs
SMOOTHING = 1 / 32  # deviation of the smoothing of the twins' difference, of the picture's side
# Real defect names that the bank does not know, by the bank's nearest word. Any other is judged by the mean
# over all words.
NEAREST = {"impurity": "contamination", "colour": "discoloration", "color": "discoloration"}
DRAWN = "drawn pictures"


# -- autoencoder ----------------------------------------------------------------------------------------


@torch.no_grad()
def autoencoder(case: Case, category: str) -> dict[str, Any]:
    """PSNR of the round trip at the model's native side."""
    sd, values = case.model.sd, []
    for image in evenly(case.of(category, "train", "calibration", "feedback"), case.count(20)):
        picture = picture_tensor(square(load(image), sd.size)).to(sd.device)
        error = (sd.decode(sd.encode(picture)).clamp(0, 1) - picture).square().mean()
        values.append(float(-10 * torch.log10(error.clamp(min=1e-10))))
    return {"psnr": values}


def autoencoder_summary(units: Units) -> dict[str, Any]:
    rows = {name: described(estimate([unit["psnr"]])) for name, unit in units.items()}
    mean = described(estimate([unit["psnr"] for unit in units.values()]))
    weak = [name for name, row in rows.items() if row["mean"] < WEAK_DB]
    return {"categories": rows, "mean": mean, "weak": weak, "reached": mean["mean"] >= NATIVE_DB}


def autoencoder_tables(summary: dict[str, Any]) -> list[Table]:
    title = f"autoencoder: PSNR of the round trip, wanted {NATIVE_DB:.0f} dB: {verdict(summary['reached'])}"
    made = table(title, "category", "dB", f"below {WEAK_DB:.0f}")
    for name, row in summary["categories"].items():
        made.add_row(name, shown(row, ".1f"), "weak" if name in summary["weak"] else "")
    made.add_row("mean", shown(summary["mean"], ".1f"), str(len(summary["weak"])))
    return [made]


# -- clip -----------------------------------------------------------------------------------------------


def clip_units(case: Case) -> list[str]:
    judged = [
        category
        for category in case.categories
        if {image.defect == GOOD for image in case.of(category, *_judged(case))} == {True, False}
    ]
    return [DRAWN, *judged]


def _judged(case: Case) -> tuple[str, ...]:
    return ("feedback", "test") if case.final else ("feedback",)


def clip(case: Case, unit: str) -> dict[str, Any]:
    model = case.model.clip
    assert model is not None, "the part needs a CLIP"
    return _drawn(model, case.count(1200)) if unit == DRAWN else _real(case, model, unit)


@torch.no_grad()
def _drawn(model: Clip, count: int) -> dict[str, Any]:
    """Which word CLIP reads off drawn pictures that nobody trained on, under their noun and a generic one."""
    words: dict[str, torch.Tensor] = {}
    rows: list[dict[str, str]] = []
    for start in range(0, count, CHUNK):
        pictures, nouns, defects = [], [], []
        for number in range(start, min(start + CHUNK, count)):
            rng, scene = numbered(UNSEEN, number, ())
            found = damage(rng, scene)
            pictures.append(torch.from_numpy(found.pixels).permute(2, 0, 1))
            nouns.append((scene.noun, GENERIC_NOUNS[number % len(GENERIC_NOUNS)]))
            defects.append(found.defect)
        seen = model.image(torch.stack(pictures))
        for embedding, pair, defect in zip(seen, nouns, defects, strict=True):
            told = []
            for noun in pair:
                if noun not in words:
                    words[noun] = model.text(prompts(noun)[: len(DEFECTS)])
                told.append(DEFECTS[int((words[noun] @ embedding).argmax())])
            rows.append({"defect": defect, "noun": told[0], "generic": told[1]})
    return {"rows": rows}


@torch.no_grad()
def _real(case: Case, model: Clip, category: str) -> dict[str, Any]:
    """Likeness to the anomaly prompt minus likeness to the normal one, of pictures and of crops."""
    images = case.of(category, *_judged(case))
    noun = noun_of(category)
    texts = model.text(prompts(noun))
    groups = {group: number for number, group in enumerate(sorted({image.group for image in images}))}
    rng = np.random.default_rng([case.seed, zlib.crc32(category.encode())])
    goods = [image for image in images if image.defect == GOOD]
    result: dict[str, Any] = {}
    for defect in sorted({image.defect for image in images} - {GOOD}):
        word = word_for(defect)
        rows = [DEFECTS.index(word)] if word else list(range(len(DEFECTS)))
        direction = texts[rows].mean(dim=0) - texts[-1]

        def score(pixels: np.ndarray, towards: torch.Tensor = direction) -> float:
            return float(model.image(picture_tensor(pixels))[0] @ towards)

        bad = [image for image in images if image.defect == defect]
        judged = [(image, score(load(image))) for image in (*goods, *bad)]
        result[defect] = {"word": word or "all words", "pictures": _scored(judged, groups)}
        crops = [(image, *_defect_crop(image)) for image in bad if image.mask_path is not None]
        if crops:
            judged = [(image, score(pixels)) for image, pixels, _ in crops]
            for number in range(len(goods) * -(-2 * len(crops) // len(goods))):
                image = goods[number % len(goods)]
                side = crops[number % len(crops)][2]
                judged.append((image, score(_random_crop(rng, load(image), side))))
            result[defect]["crops"] = _scored(judged, groups)
    return {"defects": result}


def _scored(judged: Sequence[tuple[Image, float]], groups: Mapping[str, int]) -> dict[str, list[Any]]:
    return {
        "score": [value for _, value in judged],
        "anomalous": [image.defect != GOOD for image, _ in judged],
        "group": [groups[image.group] for image, _ in judged],
    }


def word_for(defect: str) -> str | None:
    """The word of the bank that is nearest to a real defect's name, or None.

    >>> word_for("cracked"), word_for("impurity"), word_for("anomaly")
    ('crack', 'contamination', None)
    """
    name = plain(defect)
    for entry in load_bank().entries:
        if name in (plain(entry.defect), entry.word, *entry.synonyms):
            return entry.defect
    return NEAREST.get(name)


def _defect_crop(image: Image) -> tuple[np.ndarray, int]:
    """A square around the largest component, as the generator cuts it, and its side."""
    labels, areas = label_components(load_mask(image))
    rows, columns = np.nonzero(labels == 1 + int(areas.argmax()))
    box = (int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1)
    y0, y1, x0, x1 = cut.crop_around(box, labels.shape, 0.55)
    return load(image)[y0:y1, x0:x1], max(y1 - y0, x1 - x0)


def _random_crop(rng: np.random.Generator, pixels: np.ndarray, side: int) -> np.ndarray:
    height, width = (min(side, full) for full in pixels.shape[:2])
    y = int(rng.integers(pixels.shape[0] - height + 1))
    x = int(rng.integers(pixels.shape[1] - width + 1))
    return pixels[y : y + height, x : x + width]


def clip_summary(units: Units) -> dict[str, Any]:
    result: dict[str, Any] = {}
    if DRAWN in units:
        rows = units[DRAWN]["rows"]
        right = {kind: [float(row[kind] == row["defect"]) for row in rows] for kind in ("noun", "generic")}
        words = {}
        for name in DEFECTS:
            at = [k for k, row in enumerate(rows) if row["defect"] == name]
            wrong = Counter(rows[k]["noun"] for k in at if rows[k]["noun"] != name)
            words[name] = {
                "pictures": len(at),
                "taken_for": wrong.most_common(1)[0][0] if wrong else "",
                **{kind: described(estimate([[hits[k] for k in at]])) for kind, hits in right.items()},
            }
        all_words = {kind: described(estimate([hits])) for kind, hits in right.items()}
        result["drawn"] = {"words": words, "pictures": len(rows), **all_words}
        result["drawn"]["reached"] = min(found["mean"] for found in all_words.values()) >= TOLD
    real: dict[str, Any] = {}
    means: dict[str, list[Estimate]] = {"pictures": [], "crops": []}
    for number, (category, unit) in enumerate((n, u) for n, u in units.items() if n != DRAWN):
        for defect, found in unit["defects"].items():
            row: dict[str, Any] = {"word": found["word"]}
            for kind in [kind for kind in means if kind in found]:
                auroc = evaluate_images(
                    np.array(found[kind]["score"]),
                    np.array(found[kind]["anomalous"]),
                    found[kind]["group"],
                    seed=np.random.SeedSequence(0, spawn_key=(number,)),
                )["image_auroc"]
                means[kind].append(auroc)
                row[kind] = {**described(auroc), "of": len(found[kind]["score"])}
            real[f"{category}: {defect}"] = row
    result["real"] = real
    result["mean"] = {kind: described(mean_estimate(found)) for kind, found in means.items()}
    return result


def clip_tables(summary: dict[str, Any]) -> list[Table]:
    made = []
    if "drawn" in summary:
        drawn = summary["drawn"]
        title = (
            f"clip: words told on {drawn['pictures']} unseen drawn pictures (of {len(DEFECTS)}, chance "
            f"{1 / len(DEFECTS):.2f}), wanted {TOLD:.2f}: {verdict(drawn['reached'])}"
        )
        told = table(title, "word", "n", "own noun", "generic noun", "most often taken for")
        for name, row in drawn["words"].items():
            cells = [str(row["pictures"]), shown(row["noun"]), shown(row["generic"]), row["taken_for"]]
            told.add_row(NOUNS[name][0], *cells)
        told.add_row("all", str(drawn["pictures"]), shown(drawn["noun"]), shown(drawn["generic"]), "")
        made.append(told)
    title = "clip: real pictures, AUROC of likeness to the anomaly prompt over the normal one (chance 0.5)"
    real = table(title, "category: defect", "word", "pictures", "margin", "crops", "margin")
    for name, row in [*summary["real"].items(), ("mean", {"word": "", **summary["mean"]})]:
        cells = []
        for kind in ("pictures", "crops"):
            found = row.get(kind)
            cells += [shown(found), _margin(found)] if found else ["–", "–"]
        real.add_row(name, row["word"], *cells)
    return [*made, real]


def _margin(found: Mapping[str, Any]) -> str:
    """Distance to chance; a question mark where the interval holds chance."""
    if found["mean"] is None or not np.isfinite(found["mean"]):
        return "–"
    beyond = found["low"] is not None and (found["low"] > 0.5 or found["high"] < 0.5)
    return f"{found['mean'] - 0.5:+.3f}{'' if beyond else ' ?'}"


# -- attention ------------------------------------------------------------------------------------------


def attention(case: Case, category: str) -> dict[str, Any]:
    """Whether the anomaly is drawn where the word looks: free places, no mask, whole pictures."""
    plan = {"params": {"free": True}, "location": "anywhere", "count": (1, 1)}
    round_ = case.plan(category, max(2, case.count(8)), **plan)
    recipes = round_.plan(0)
    sources = [round_.pictures.source(recipe) for recipe in recipes]
    draws = [cut.draw(r, source, r.rng(0)) for r, source in zip(recipes, sources, strict=True)]
    twins = [found[0] for found in cut.chains(sources, draws, case.model, draws[0].settings.batch)]
    differences = [np.abs(one.anomaly - one.normal).max(axis=2) for one in twins]
    places = []
    for difference in differences:
        smooth = cv2.GaussianBlur(difference, (0, 0), SMOOTHING * min(difference.shape))
        places.append(strongest(smooth, ATTENTION_SHARE))
    maps = [one.attention for one in twins]
    rows = []
    for at, (difference, place) in enumerate(zip(differences, places, strict=True)):
        height, width = place.shape
        overlaps = [
            overlap(strongest(cv2.resize(found, (width, height)), ATTENTION_SHARE), place) for found in maps
        ]
        ordered = np.sort(difference, axis=None)
        peak = float(ordered[-max(1, int(len(ordered) * PEAK_SHARE)) :].mean())
        rows.append(
            {
                "defect": recipes[at].defect,
                "iou": overlaps[at],
                "shuffled": float(np.mean(overlaps[:at] + overlaps[at + 1 :])),
                "concentration": peak / max(float(np.median(difference)), 1e-4),
                "difference": float(difference.mean() * 255),
            }
        )
    return {"rows": rows}


def strongest(values: np.ndarray, share: float) -> np.ndarray:
    """The strongest places, exactly a share of them; bool."""
    chosen = np.zeros(values.size, np.bool_)
    chosen[np.argsort(values, axis=None, kind="stable")[-max(1, round(share * values.size)) :]] = True
    return chosen.reshape(values.shape)


def overlap(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / max(1, (one | other).sum()))


def attention_summary(units: Units) -> dict[str, Any]:
    def row(chosen: Sequence[dict[str, Any]]) -> dict[str, Any]:
        columns = ("iou", "shuffled", "concentration", "difference")
        found = {name: estimate([[r[name] for r in unit["rows"]] for unit in chosen]) for name in columns}
        ratio = Estimate(
            found["iou"].value / max(found["shuffled"].value, 1e-6),
            found["iou"].resamples / np.maximum(found["shuffled"].resamples, 1e-6),
        )
        return {name: described(value) for name, value in (found | {"ratio": ratio}).items()}

    mean = row(list(units.values()))
    return {
        "categories": {name: row([unit]) for name, unit in units.items()},
        "mean": mean,
        "reached": mean["ratio"]["mean"] >= ATTENTION_RATIO,
    }


def attention_tables(summary: dict[str, Any]) -> list[Table]:
    title = (
        f"attention: IoU of the word's map and the twins' difference, strongest {ATTENTION_SHARE:.0%}; "
        f"wanted {ATTENTION_RATIO:.0f} × that of shuffled pairs: {verdict(summary['reached'])}"
    )
    made = table(title, "category", "IoU", "shuffled", "ratio", "concentration", "mean difference, levels")
    for name, row in [*summary["categories"].items(), ("mean", summary["mean"])]:
        cells = [shown(row["iou"]), shown(row["shuffled"]), shown(row["ratio"], ".2f")]
        made.add_row(name, *cells, shown(row["concentration"], ".1f"), shown(row["difference"], ".1f"))
    return [made]


MODEL_PARTS = {
    "autoencoder": Part(by_category, autoencoder, autoencoder_summary, autoencoder_tables),
    "clip": Part(clip_units, clip, clip_summary, clip_tables),
    "attention": Part(by_category, attention, attention_summary, attention_tables),
}
