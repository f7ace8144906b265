"""What the parts of ``pocket.py`` share: the case they measure, what a part is, and how figures are told."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from generation.cut import generator as cut
from manifests.recipes import GeneratorSettings
from manifests.schema import Image
from manifests.sources import SourceSettings
from training.intervals import RESAMPLES, Estimate, draw_counts, mean_estimate
from workflows.config import Config, Generation
from workflows.stages import Round, device, round_from

Units = Mapping[str, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """What a run measures on.

    Attributes:
        source: of the pictures; ``images`` are those found in it.
        params: settings of ``cut`` that differ from the defaults.
        pictures: a unit, in place of each part's own number.
        final: CLIP is judged on the test split too, not only on feedback.
        samples: folder for what a part leaves to the next.
    """

    source: SourceSettings
    images: Sequence[Image]
    params: Mapping[str, Any] = field(default_factory=dict)
    pictures: int | None = None
    seed: int = 0
    final: bool = False
    samples: Path = Path("samples")

    @cached_property
    def model(self) -> cut.Model:
        return cut.load(self.params, device())

    @property
    def categories(self) -> list[str]:
        return sorted({image.category for image in self.images})

    def of(self, category: str, *splits: str) -> list[Image]:
        return [i for i in self.images if i.category == category and i.split in splits]

    def count(self, default: int) -> int:
        return self.pictures or default

    def plan(self, category: str, samples: int, generator: str = "cut", **generation: Any) -> Round:
        """A round of one category and one generator, at the defaults of the settings."""
        params = {**self.params, **generation.pop("params", {})} if generator == "cut" else {}
        params |= {"texture": "procedural"} if generator == "perlin" else {}
        config = Config(
            source=(self.source,),
            samples=samples,
            seed=self.seed + zlib.crc32(category.encode()),
            generation=Generation(generators={generator: GeneratorSettings(params=params)}, **generation),
        )
        images = [image for image in self.images if image.category == category]
        return round_from(0, config, config.generation, images, [])


@dataclass(frozen=True)
class Part:
    """One measurement.

    Attributes:
        units: what it is made of, mostly categories.
        measure: figures of one unit, plain values of JSON.
        summary: figures of the whole, from those of the units alone.
        tables: what to print of a summary.
    """

    units: Callable[[Case], list[str]]
    measure: Callable[[Case, str], dict[str, Any]]
    summary: Callable[[Units], dict[str, Any]]
    tables: Callable[[dict[str, Any]], list[Table]]


# -- figures --------------------------------------------------------------------------------------------


def estimate(values: Sequence[Sequence[float]]) -> Estimate:
    """Mean over categories of the mean of each; samples are resampled within their category, the same ones
    for equally many samples. Values that are None or NaN are left out."""
    found = []
    for number, own in enumerate(values):
        row = np.asarray(own, np.float64)
        known = np.isfinite(row)
        if not known.any():
            continue
        counts = draw_counts(len(row), RESAMPLES, np.random.SeedSequence(0, spawn_key=(number,)))
        with np.errstate(invalid="ignore"):
            drawn = counts[:, known] @ row[known] / counts[:, known].sum(axis=1)
        found.append(Estimate(float(row[known].mean()), drawn))
    return mean_estimate(found)


def described(found: Estimate) -> dict[str, float]:
    low, high = found.interval
    return {"mean": found.value, "low": low, "high": high}


def shown(found: Mapping[str, Any], form: str = ".3f") -> str:
    """ "0.512 [0.401, 0.607]"; a dash for what is not defined."""
    value, low, high = (found[key] for key in ("mean", "low", "high"))
    if value is None or not np.isfinite(value):
        return "–"
    ends = "" if low is None or not np.isfinite(low) else f" [{low:{form}}, {high:{form}}]"
    return f"{value:{form}}{ends}"


def table(title: str, *columns: str) -> Table:
    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left")
    return made


def verdict(reached: bool) -> str:
    return "reached" if reached else "[bold]missed[/bold]"


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many, spread over the list."""
    if len(items) <= most:
        return list(items)
    return [items[at] for at in np.linspace(0, len(items) - 1, most).round().astype(int)]


def picture_tensor(pixels: np.ndarray) -> torch.Tensor:
    """uint8 H×W×C to float32 1×3×H×W in [0, 1]."""
    colour = pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)
    return torch.from_numpy(np.ascontiguousarray(colour)).permute(2, 0, 1)[None].float() / 255


def by_category(case: Case) -> list[str]:
    return case.categories
