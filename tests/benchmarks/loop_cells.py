"""One cell of the loop's benchmark: an arm with one seed, steered by one part of the pictures and judged on
another; in a process of its own.

Every arm but the ceiling is a configuration of the product, run in a workspace: what the product learns to
steer by enters here by its settings alone. What cells have in common of their first rounds is made once.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import dask
import numpy as np
from distributed import LocalCluster

from detectors.protocol import Detector, get
from manifests.pictures import load, load_mask, small_mask
from manifests.schema import GOOD, Image, canonical_json
from manifests.searching import Search
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
from training.loading import Sample
from workflows.config import DEFAULT_MIX, Config, Generation, parse_config
from workflows.detecting import calibration_normals, checkpoint_folder, held_out, load_detector, samples_of
from workflows.loop import run
from workflows.machines import LOCAL
from workflows.rounds import accepted_samples, begin, open_round, write_settings
from workflows.searching import REACH, Verdict
from workflows.space import at_place, place_of, present_values, search_space
from workflows.stages import Round, device, read_settings
from workflows.steering import decide, judgeable, spelled_out
from workflows.weighing import TABLE as WEIGHTS

METRICS = ("pixel_ap", "aupro")
RESAMPLES = 1000
SHARD = 8  # so that a round has several of `cut`, whose settings vary between shards
VARY = 0.25  # of cut's searched numbers, in arms of several rounds: no trial makes samples of it
FEW = 4  # categories of the arms that are measured on few
FOLDS = (0, 1)  # of the feedback split: one steers, the other judges
WHOLE = 2  # the part that steers in place of them under --final: all of the feedback split
PARTS = ("first", "second", "whole")
REAL = 0.5  # share of the ceiling's draws that are real anomalies
FILLED = 5  # pixels by which a real defect is grown before it is filled
CHANCE = 3  # spawn key of random settings
FAMILIES = {  # that an arm may have beside the default mix, or be without; `cut` varies where it is steered
    "cut": ("cut",),
    "feature": ("feature-noise", "feature-ascent"),
    "frequency": ("band",),
}
# Of the standard recipe's textures, from faint to strong; the second is published.
OPACITIES = ((0.1, 0.5), (0.2, 1.0), (0.5, 1.0))


@dataclass(frozen=True)
class Arm:
    """A row of the table.

    Attributes:
        base: name of the workspace it works in; arms of one base share its rounds.
        rounds: how many; judged is the one that is best on the pictures that steer.
        chance: the settings of the rounds after the first are drawn at random; see :func:`drawn_by_chance`.
        standard: the standard recipe, in place of our generators.
        real: the real anomalies of the pictures that steer are trained on, too.
        few: on four categories, one a data set.
        samples: a round's recipes, as a share of the plan's.
        beside: a family of generators beside the default mix; features, for a detector that reads them.
        without: a family of it that is left out.
        settings: of the product, by section, that differ from the defaults.
    """

    base: str
    rounds: int = 1
    chance: bool = False
    standard: bool = False
    real: bool = False
    few: bool = False
    samples: float = 1.0
    beside: str | None = None
    without: str | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """What all cells of a run have in common.

    Attributes:
        samples: recipes a category and round.
        detector: name in the registry; ``settings`` are its own, with the steps.
        final: steered by the whole feedback split, judged on ``test``.
        cluster: where samples are made; a section of the product's configuration.
    """

    case: Case
    detector: str
    settings: Mapping[str, Any]
    samples: int
    final: bool = False
    cluster: Mapping[str, Any] = field(default_factory=lambda: {"workers": THREADS})

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
    config = config_of(plan, arm, seed, source, rounds, opacity)
    if not space.rounds():
        with space.writing():
            begin(config, space, new_round=False)
    lend(plan, arm, part, space)
    run(config, space)
    lend(plan, arm, part, space, back=True)
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
    sections: dict[str, dict[str, Any]] = {
        "detector": {"name": plan.detector, "settings": dict(plan.settings)},
        "output": {"shard_size": SHARD},
        "evaluation": {"resamples": 0},  # of figures that nobody reads here
        "feedback": {"patience": None},
        "cluster": dict(plan.cluster),
    }
    for name, own in arm.settings.items():
        sections[name] = {**sections.get(name, {}), **own}
    made = standard_mix(plan, opacity) if arm.standard else {"generators": our_mix(arm, sections["detector"])}
    sections["generation"] = {**made, **sections.get("generation", {})}
    return parse_config(
        {
            "source": [{"path": str(source), "layout": "list", "group": "group"}],
            "samples": recipes(plan, arm),
            "rounds": rounds,
            "seed": seed,
            **sections,
        },
        name=arm.base,
    )


def recipes(plan: Plan, arm: Arm) -> int:
    """Of a round."""
    return max(1, round(arm.samples * plan.samples * len(plan.categories(arm))))


def standard_mix(plan: Plan, opacity: Any) -> dict[str, Any]:
    """The section ``generation`` of the standard recipe."""
    perlin = {"texture": "folder", "mask": "threshold", "lattice": [1, 5], "rotation": 5}
    paste = {"share": 0.5, "params": {"published": True, "jitter": 0.4}}
    mix = {"perlin": {"params": {**perlin, "opacity": list(opacity)}}, "cutpaste": paste, "scar": paste}
    return {"preset": "onenip", "generators": mix, "textures": str(textures_folder(plan.case))}


def our_mix(arm: Arm, detector: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The default mix with what the arm has beside it and without what it lacks, by name; features at the
    detector's input size."""
    mix = {name: own.model_dump(exclude_unset=True) for name, own in DEFAULT_MIX.items()}
    more: dict[str, Any] = {}
    if arm.beside == "cut" and arm.rounds > 1:
        more = {"vary": VARY}
    if arm.beside == "feature":
        size = get(detector["name"]).settings.model_validate(detector["settings"]).size
        more = {"params": {"size": size}}
    mix |= dict.fromkeys(FAMILIES.get(arm.beside or "", ()), more)
    return {name: own for name, own in mix.items() if name not in FAMILIES.get(arm.without or "", ())}


@contextmanager
def own_worker() -> Iterator[dict[str, Any]]:
    """A worker in a thread of this process, which then imports nothing and loads no model a second time, as
    a section ``cluster``. One that is named so is also asked for no memory: the batch of `cut` stays as it is
    set, in every cell."""
    with (
        dask.config.set(LOCAL),
        LocalCluster(
            n_workers=1,
            threads_per_worker=THREADS,
            processes=False,
            dashboard_address="127.0.0.1:0",
            memory_limit=0,
        ) as cluster,
    ):
        yield {"address": cluster.scheduler_address}


# -- what cells have in common --------------------------------------------------------------------------


def lend(plan: Plan, arm: Arm, part: int, space: Workspace, *, back: bool = False) -> None:
    """Copies what another cell made of the same first round into a workspace or, with ``back``, keeps what
    this one made for others: its samples and, if nothing of it depends on the pictures that steer but
    through the weights, its detector. Each is kept under everything that decides it."""
    round_ = open_round(space, 0)
    made = made_of(round_)
    learned: list[Any] = [round_.config.detector.model_dump(), round_.config.training.model_dump()]
    if round_.config.training.weigh:
        learned.append(sorted(image.image_id for image in plan.steering(arm, part)))
    trained = checkpoint_folder(0, round_.config.detector.name)
    samples = [round_file(0, name) for name in ("recipes", "shards", "samples", "shards.parquet")]
    weights = [round_file(0, WEIGHTS)] if round_.config.training.weigh else []
    for what, names in ((made, samples), ([made, learned], [*weights, trained])):
        kept = plan.case.work / "made" / hashlib.sha256(canonical_json(what).encode()).hexdigest()[:16]
        source, target = (Path(space.path("")), kept) if back else (kept, Path(space.path("")))
        if all((source / name).exists() for name in names):
            copy_once(source, target, names)


def made_of(round_: Round) -> list[Any]:
    """What decides the samples of a first round, which practises against nothing."""
    told = json.loads(round_.fingerprint())
    del told["generation"]["practice"]
    normals = [image.image_id for own in round_.pool.normals.values() for image in own]
    return [told, normals, [texture.image_id for texture in round_.pool.textures]]


def copy_once(source: Path, target: Path, names: Sequence[str]) -> None:
    """Files and folders that ``target`` lacks, each whole or not at all."""
    for name in names:
        if (target / name).exists():
            continue
        aside = target / f"{name}.part"
        aside.parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.rmtree(aside, ignore_errors=True)
            shutil.copytree(source / name, aside)
        else:
            shutil.copy(source / name, aside)
        aside.rename(target / name)


# -- chance ---------------------------------------------------------------------------------------------


def run_by_chance(plan: Plan, arm: Arm, seed: int, part: int) -> Workspace:
    """The arm's rounds; before each but the first its settings are drawn."""
    for number in range(1, arm.rounds):
        space = run_rounds(plan, arm, seed, part, number)
        if not space.exists(round_file(number, "settings.yaml")):
            config, _, began = read_settings(space, 0)
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(CHANCE, part, number)))
            write_settings(space, number, config, drawn_by_chance(space, number - 1, rng), first=began)
    return run_rounds(plan, arm, seed, part, arm.rounds)


def drawn_by_chance(space: Workspace, number: int, rng: np.random.Generator) -> Generation:
    """The settings of the round after ``number``, as if one of the search's trials were applied whatever it
    is worth: every setting that the search may change is drawn evenly from where a trial may lie, numbers
    within its reach of their present place, choices from all. Drawing as many as the loop tries and picking
    one without asking the real pictures would be the same draw, so none of them is measured."""
    round_ = open_round(space, number)
    generation = spelled_out(round_.generation, round_.pool.normals, accepted_samples(space, number))
    present = present_values(generation)
    settings = judgeable(search_space(generation), generation, round_)
    values = {path: near(search, present[path], rng) for path, search in settings.items()}
    after, _ = decide(generation, values, {}, {}, Verdict(values, "drawn at random", "drawn at random"))
    return after


def near(search: Search, value: Any, rng: np.random.Generator) -> Any:
    """A value drawn evenly from those that a trial may have beside this one."""
    if search.choices:
        return at_place(search, rng.random())
    place = place_of(search, value) + rng.uniform(-REACH, REACH)
    return at_place(search, min(max(place, 0.0), 1.0))


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
    the standard recipe's that did best there with the first seed.
    """
    sets = {category: plan.case.data_set(category) for category in plan.categories(arm)}
    note: dict[str, Any] = {}
    if arm.standard:
        tried = {str(o): standing(run_rounds(plan, arm, 0, part, 1, o), 0, sets) for o in OPACITIES}
        opacity = max(OPACITIES, key=lambda o: tried[str(o)])
        space = run_rounds(plan, arm, seed, part, 1, opacity)
        note = {"opacity": opacity, "tried": tried}
    elif arm.chance:
        space = run_by_chance(plan, arm, seed, part)
    else:
        space = run_rounds(plan, arm, seed, part, arm.rounds)
    if arm.real:
        detector, count = ceiling(plan, arm, seed, part, space)
    else:
        judged_rounds = [n for n in range(arm.rounds) if space.exists(round_file(n, "found.parquet"))]
        standings = [standing(space, number, sets) for number in judged_rounds]
        number = int(np.argmax(standings))
        learned = range(number + 1) if arm.rounds > 1 else [number]
        detector = load_detector(space, number)[0]
        count = sum(len(accepted_samples(space, one)) for one in learned)
        note |= {"round": number, "standings": standings}
    max_side = open_round(space, 0).config.output.max_side
    judged = judge(detector, plan.judging(arm, part), max_side)
    resized = [at_side(one.image, one.score, one.map) for one in judged]
    return {**note, "samples": count, "categories": figures(plan.case.categories, resized, part)}


def figures(categories: Sequence[str], judged: Sequence[Judged], part: int) -> dict[str, Any]:
    """By category the number of ``groups``, and by metric the value and its packed resamples. A category's
    draws of groups are the same in every cell of that part; one whose pictures are of one group is left
    out."""
    found: dict[str, Any] = {}
    for number, category in enumerate(categories):
        own = [entry for entry in judged if entry.image.category == category]
        masks = [entry.mask for entry in own if entry.mask is not None]
        groups = [entry.image.group for entry in own]
        if not any(mask.any() for mask in masks) or len(set(groups)) < 2:
            continue
        estimates = evaluate_pixels(
            [entry.map for entry in own],
            masks,
            groups,
            [entry.ignore for entry in own],
            resamples=RESAMPLES,
            seed=np.random.SeedSequence(0, spawn_key=(number, part)),
        )
        found[category] = {"groups": len(set(groups))}
        for metric in METRICS:
            drawn = packed(redrawn(estimates[metric]).resamples)
            found[category][metric] = {"value": estimates[metric].value, "resamples": drawn}
    return found
