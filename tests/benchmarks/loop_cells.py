"""One cell of the loop's benchmark: an arm with one seed, steered by one part of the pictures and judged on
another; in a process of its own.

Every arm but the ceiling is a configuration of the product, run in a workspace: what the product learns to
steer by enters here by its settings alone.
"""

from __future__ import annotations

import csv
import hashlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from detectors.protocol import Detector, get
from manifests.pictures import load, load_mask
from manifests.schema import GOOD, Image
from manifests.workspace import Workspace, round_file
from tests.benchmarks.detector_cells import (
    THREADS,
    Case,
    at_side,
    mean_of_data_sets,
    normals_of,
    redrawn,
    textures_folder,
)
from tests.benchmarks.paired import packed
from training.evaluation import Judged, judge
from training.fitting import train
from training.intervals import Estimate, evaluate_pixels
from training.loading import Sample, small_mask
from workflows.config import Config, parse_config
from workflows.detecting import calibration_normals, held_out, load_detector, samples_of
from workflows.loop import run, spent
from workflows.rounds import accepted_samples, open_round, write_settings
from workflows.space import apply_values, random_values, search_space
from workflows.stages import device, read_settings

METRICS = ("pixel_ap", "aupro")
RESAMPLES = 400
SHARD = 64
FEW = 4  # categories of the arms that are measured on few
FOLDS = (0, 1)  # of the feedback split: one steers, the other judges
WHOLE = 2  # the part that steers in place of them under --final: all of the feedback split
PARTS = ("first", "second", "whole")
REAL = 0.5  # share of the ceiling's draws that are real anomalies
FILLED = 5  # pixels by which a real defect is grown before it is filled
CHANCE = 3  # spawn key of random settings
# Our generators, one or more of each family, their settings at the defaults.
OURS: dict[str, dict[str, Any]] = {
    "perlin": {"params": {"texture": "procedural"}},
    "cutpaste": {},
    "scar": {},
    "poisson": {},
    "band": {},
    "wavelet": {},
    "cut": {},
}
FAMILIES = {"cut": ("cut",), "frequency": ("band", "wavelet")}
# Of the standard recipe's textures, from faint to strong; the second is published.
OPACITIES = ((0.1, 0.5), (0.2, 1.0), (0.5, 1.0))


@dataclass(frozen=True)
class Arm:
    """A row of the table.

    Attributes:
        base: name of the workspace it works in; arms of one base share its rounds.
        rounds: how many at most; judged is the one that is best on the pictures that steer.
        chance: the first round is that of ``ours``; the settings of the others are drawn at random from the
            declared search space.
        standard: the standard recipe, in place of our generators.
        real: the real anomalies of the pictures that steer are trained on, too.
        few: on four categories, one a data set.
        samples: share of a round's recipes.
        without: families of generators that are left out.
        settings: of the product, by section, that differ from the defaults.
    """

    base: str
    rounds: int = 1
    chance: bool = False
    standard: bool = False
    real: bool = False
    few: bool = False
    samples: float = 1.0
    without: str | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What all cells of a run have in common.

    Attributes:
        samples: recipes a category and round.
        detector: name in the registry; ``settings`` are its own, with the steps.
        final: steered by the whole feedback split, judged on ``test``.
    """

    case: Case
    detector: str
    settings: Mapping[str, Any]
    samples: int
    final: bool = False

    @property
    def parts(self) -> tuple[int, ...]:
        return (WHOLE,) if self.final else FOLDS

    def categories(self, arm: Arm) -> list[str]:
        """Those with masks of all defects; of ``few`` arms the first one of each of four data sets."""
        masked = [
            category
            for category in self.case.categories
            if all(image.mask_path for image in self.case.of(category, "feedback") if image.defect != GOOD)
        ]
        if not arm.few:
            return masked
        first: dict[str, str] = {}
        for category in masked:
            first.setdefault(self.case.data_set(category), category)
        return sorted(first.values())[:FEW]

    def steering(self, arm: Arm, part: int) -> list[Image]:
        """The pictures that an arm may learn from beyond normal ones."""
        folds = fold_of(self.case.images)
        return [i for i in self._of(arm, "feedback") if part in (WHOLE, folds[i.category, i.group])]

    def judging(self, arm: Arm, part: int) -> list[Image]:
        """The pictures that judge it: the other fold, or the test split."""
        if part == WHOLE:
            return self._of(arm, "test")
        folds = fold_of(self.case.images)
        return [i for i in self._of(arm, "feedback") if part != folds[i.category, i.group]]

    def normals(self, arm: Arm) -> list[Image]:
        return [i for i in self._of(arm, "train", "calibration") if i.defect == GOOD]

    def _of(self, arm: Arm, *splits: str) -> list[Image]:
        return [i for c in self.categories(arm) for split in splits for i in self.case.of(c, split)]


def fold_of(images: Sequence[Image]) -> dict[tuple[str, str], int]:
    """The fold of each (category, group) of the feedback split.

    Groups with a defect are dealt to the folds in turns, in the order of the hashes of their names, and so
    are those without, beginning with the other fold: each fold gets both kinds, where there are two of each.
    """
    bad: dict[tuple[str, str], bool] = {}
    for image in images:
        if image.split == "feedback":
            key = image.category, image.group
            bad[key] = bad.get(key, False) or image.defect != GOOD
    folds = {}
    for category in {name for name, _ in bad}:
        for kind in (True, False):
            own = [key for key, has in bad.items() if key[0] == category and has == kind]
            own.sort(key=lambda key: hashlib.sha256("/".join(key).encode()).digest())
            folds |= {key: (turn + (not kind)) % 2 for turn, key in enumerate(own)}
    return folds


# -- workspaces -----------------------------------------------------------------------------------------


def run_rounds(plan: Plan, arm: Arm, seed: int, part: int, rounds: int, opacity: Any = None) -> Workspace:
    """The arm's workspace with so many rounds done; what is there already stays."""
    name = arm.base if opacity is None else f"{arm.base}-{opacity[0]:g}-{opacity[1]:g}"
    space = workspace(plan, name, seed, part)
    source = plan.case.work / f"{'few' if arm.few else 'all'}-{PARTS[part]}.csv"
    write_list(source, [*plan.normals(arm), *plan.steering(arm, part)])
    run(config_of(plan, arm, seed, source, rounds, opacity), space)
    return space


def workspace(plan: Plan, name: str, seed: int, part: int) -> Workspace:
    return Workspace(str(plan.case.work / f"{name}-{seed}-{PARTS[part]}"))


def write_list(path: Path, images: Sequence[Image]) -> None:
    """A source of the product with every split final: a workspace never sees what is not in it."""
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("path", "mask_path", "category", "defect", "split", "group"))
        for i in images:
            writer.writerow((i.path, i.mask_path or "", i.category, i.defect, i.split, i.group))


def config_of(plan: Plan, arm: Arm, seed: int, source: Path, rounds: int, opacity: Any) -> Config:
    left_out = FAMILIES[arm.without] if arm.without else ()
    generation: dict[str, Any] = {"generators": {k: v for k, v in OURS.items() if k not in left_out}}
    if arm.standard:
        perlin = {"texture": "folder", "mask": "threshold", "lattice": [1, 5], "rotation": 5}
        paste = {"share": 0.5, "params": {"published": True, "jitter": 0.4}}
        mix = {"perlin": {"params": {**perlin, "opacity": list(opacity)}}, "cutpaste": paste, "scar": paste}
        generation = {"preset": "onenip", "generators": mix, "textures": str(textures_folder(plan.case))}
    sections: dict[str, dict[str, Any]] = {
        "generation": generation,
        "detector": {"name": plan.detector, "settings": dict(plan.settings)},
        "output": {"shard_size": SHARD},
        "cluster": {"workers": THREADS},
    }
    for name, own in arm.settings.items():
        sections[name] = {**sections.get(name, {}), **own}
    return parse_config(
        {
            "source": [{"path": str(source), "layout": "list", "group": "group"}],
            "samples": max(1, round(arm.samples * plan.samples * len(plan.categories(arm)))),
            "rounds": rounds,
            "seed": seed,
            **sections,
        },
        name=arm.base,
    )


def first_of(arm: Arm) -> Arm:
    """The arm whose round is the first one of settings drawn by chance."""
    return replace(arm, base="few" if arm.few else "ours")


def run_by_chance(plan: Plan, arm: Arm, seed: int, part: int) -> Workspace:
    """Rounds whose settings are drawn from the search space; the first is that of our generators."""
    space = workspace(plan, arm.base, seed, part)
    if not space.exists(round_file(0, "found.parquet")):
        first = run_rounds(plan, first_of(arm), seed, part, 1)
        aside = space.path("000.part")  # whole or not at all
        shutil.copytree(first.path("rounds/000"), aside, dirs_exist_ok=True)
        shutil.copy(first.path("images.parquet"), space.path("images.parquet"))
        Path(space.path("rounds")).mkdir(exist_ok=True)
        Path(aside).rename(space.path("rounds/000"))
    for number in range(1, arm.rounds):
        if not space.exists(round_file(number, "settings.yaml")):
            config, generation, began = read_settings(space, 0)
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(CHANCE, part, number)))
            drawn = apply_values(generation, random_values(search_space(generation), rng))
            write_settings(space, number, config, drawn, first=began)
        run_rounds(plan, arm, seed, part, number + 1)
    return space


def standing(space: Workspace, number: int, data_set: Mapping[str, str]) -> float:
    """How a round's detector does on the pictures that steer: the mean of pixel AP and AUPRO, averaged over
    data sets."""
    rows = space.read_table(round_file(number, "metrics.parquet")).to_pylist()
    found: dict[str, dict[str, Estimate]] = {metric: {} for metric in METRICS}
    for row in rows:
        whole = (row["split"], row["defect"], row["size"]) == ("feedback", "all", "all")
        if whole and row["category"] in data_set and row["metric"] in METRICS:
            found[row["metric"]][row["category"]] = Estimate(row["value"], np.empty(0))
    return float(np.mean([mean_of_data_sets(own, data_set).value for own in found.values()]))


# -- the ceiling ----------------------------------------------------------------------------------------


def real_samples(images: Sequence[Image], max_side: int | None) -> list[Sample]:
    """Real anomalies as samples; the normal of each is the picture with its defect filled from around it
    (Telea), for want of a picture of the part before."""
    found = []
    for image in images:
        if image.defect == GOOD:
            continue
        pixels = load(image, max_side=max_side)
        mask = small_mask(load_mask(image), pixels.shape[:2])
        grown = cv2.dilate(mask.astype(np.uint8), np.ones((FILLED, FILLED), np.uint8))
        filled = cv2.inpaint(np.ascontiguousarray(pixels), grown, FILLED, cv2.INPAINT_TELEA)
        recipe = {"category": image.category, "image_id": f"filled-{image.image_id}", "generator": "real"}
        normal = filled.reshape(pixels.shape)
        found.append(Sample(f"real-{image.image_id}", pixels, mask, normal, recipe, {}))
    return found


def ceiling(plan: Plan, arm: Arm, seed: int, part: int, space: Workspace) -> tuple[Detector, int]:
    """The detector that learns from round 0's samples and from the real anomalies that steer, which make up
    ``REAL`` of what is drawn; and how many both are."""
    round_ = open_round(space, 0)
    normals = normals_of(round_)
    made = [sample for sample in samples_of(space, 0) if not held_out(sample.sample_id)]
    real = real_samples(plan.steering(arm, part), round_.config.output.max_side)
    weight = REAL / (1 - REAL) * len(made) / max(1, len(real))
    detector = train(
        plan.detector,
        get(plan.detector).settings.model_validate(plan.settings),
        [*made, *real],
        normals,
        calibration_normals(round_, normals, None, lambda _count: None),
        seed=seed,
        device=device(),
        weight=lambda sample: weight if sample.recipe["generator"] == "real" else 1.0,
    )
    return detector, len(made) + len(real)


# -- a cell ---------------------------------------------------------------------------------------------


def measure(plan: Plan, arm: Arm, seed: int, part: int) -> dict[str, Any]:
    """Everything of one cell; plain values of JSON.

    ``round`` is the one that was judged, ``standings`` how each did on the pictures that steer, ``opacity``
    the standard recipe's that did best there with the first seed, ``cpu_minutes`` the CPU time that the cell
    would take alone: of the stages of every round that it stands on, whichever cell ran them and in however
    many tries, and of what it did beside them.
    """
    sets = {category: plan.case.data_set(category) for category in plan.categories(arm)}
    note: dict[str, Any] = {}
    if arm.standard:
        tuned = [run_rounds(plan, arm, 0, part, 1, o) for o in OPACITIES]
        tried = {str(o): standing(each, 0, sets) for o, each in zip(OPACITIES, tuned, strict=True)}
        opacity = max(OPACITIES, key=lambda o: tried[str(o)])
        space = run_rounds(plan, arm, seed, part, 1, opacity)
        note = {"opacity": opacity, "tried": tried}
        stood_on = dict.fromkeys([*tuned, space], 1)
    elif arm.chance:
        space = run_by_chance(plan, arm, seed, part)
        stood_on = {workspace(plan, first_of(arm).base, seed, part): 1, space: arm.rounds}
    else:
        space = run_rounds(plan, arm, seed, part, arm.rounds)
        stood_on = {space: arm.rounds}
    started = time.process_time()
    if arm.real:
        detector, count = ceiling(plan, arm, seed, part, space)
    else:
        judged_rounds = [n for n in range(arm.rounds) if space.exists(round_file(n, "found.parquet"))]
        standings = [standing(space, number, sets) for number in judged_rounds]
        number = int(np.argmax(standings))
        detector, count = load_detector(space, number)[0], len(accepted_samples(space, number))
        note |= {"round": number, "standings": standings}
    max_side = open_round(space, 0).config.output.max_side
    judged = judge(detector, plan.judging(arm, part), max_side)
    resized = [at_side(one.image, one.score, one.map) for one in judged]
    categories = figures(plan.case.categories, resized, part)
    cpu = sum(
        spent(each, "cpu.", range(arm.rounds)) for each in {each.url: each for each in stood_on}.values()
    )
    minutes = (cpu + time.process_time() - started) / 60
    return {**note, "samples": count, "categories": categories, "cpu_minutes": minutes}


def figures(categories: Sequence[str], judged: Sequence[Judged], part: int) -> dict[str, Any]:
    """By category and metric, the value and its packed resamples. A category's draws of groups are the same
    in every cell of that part; one group alone has no spread."""
    found: dict[str, Any] = {}
    for number, category in enumerate(categories):
        own = [entry for entry in judged if entry.image.category == category]
        masks = [entry.mask for entry in own if entry.mask is not None]
        if not any(mask.any() for mask in masks):
            continue
        estimates = evaluate_pixels(
            [entry.map for entry in own],
            masks,
            [entry.image.group for entry in own],
            [entry.ignore for entry in own],
            resamples=RESAMPLES,
            seed=np.random.SeedSequence(0, spawn_key=(number, part)),
        )
        found[category] = {}
        for metric in METRICS:
            resamples = redrawn(estimates[metric]).resamples
            known = np.where(np.isnan(resamples), estimates[metric].value, resamples)
            found[category][metric] = {"value": estimates[metric].value, "resamples": packed(known)}
    return found
