"""What a trial is measured with: fresh samples of its settings, the proxy that learns from them, and the real
pictures that judge it.

All trials of a round share pictures and random numbers, so that their difference is that of their settings.
Generators that take too long for it (``Generator.seconds``) take part with the round's own samples, weighted
as the settings would have drawn them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from generation import registry
from generation.backbones import Backbone, load_backbone, to_batch
from generation.synthesis import Outcome, Signatures, synthesise
from manifests.errors import FlawsmithError
from manifests.pictures import load
from manifests.recipes import GeneratorSettings, Section, shares_of
from manifests.schema import GOOD, Image, Recipe
from manifests.workspace import Workspace, round_file
from training import matching, proxy
from training.evaluation import ignored, truth
from training.examples import at_once, chunks
from training.loading import FeatureSample, Sample
from workflows.config import Generation
from workflows.detecting import all_samples_of
from workflows.space import numbers_of, place_of, present_values
from workflows.stages import PictureCache, Round, evenly, load_model, traits_of

SIZE = 256  # side of the proxy's pictures, and of those that a probe's samples are made on
SHARD = 48  # samples of a probe's shard
ATTEMPTS = 2  # draws of one recipe of a probe
ALIKE = 16  # recipes of a generator and category, on average, that are compared with its real defects
SLOW = 0.2  # seconds a sample above which a generator is not probed
MOST_SAMPLES, MOST_NORMALS, MOST_JUDGED = 600, 48, 120  # the last two a category
NEAR = 0.15  # of the limits: deviation of the weights of settings that vary
OFF_RANGE = 0.1  # weight of a sample at hand that lies outside the ranges asked for


@dataclass(frozen=True)
class Defects:
    """Real ones of one category: ``directions`` R×C, of :func:`training.matching.direction`, one a picture
    with a mask, and the ``groups`` of the pictures."""

    directions: np.ndarray
    groups: tuple[str, ...]


@dataclass(frozen=True)
class Ground:
    """What the trials of a round stand on; computed once.

    Attributes:
        round_: with small pictures. cache: of them. backbone, banks: features, and normal ones by category.
        normals: evidence of normals alone.
        recipes, residuals, masks: of the round's own samples, as far as the proxy reads them; the masks at
            the size of its maps.
        evidence: of them and of normals.
        judged: what judges a head, by category: real feedback pictures or, where no defect among them is
            labelled, the round's own samples, by family.
        images: the pictures behind ``judged``, in order; empty for samples.
        held: calibration normals by the same names.
        labelled: whether real defects judge.
        directions: S×C, of the round's own samples; ``real`` are those of real defects, by category.
        kin: by generator, what ``Judged.family`` calls it: its family or, where all are of one, itself.
        made: evidence and generators of the probes' shards so far, by their settings.
    """

    round_: Round
    cache: PictureCache
    backbone: Backbone
    banks: dict[str, torch.Tensor]
    normals: proxy.Evidence
    recipes: list[dict[str, Any]]
    residuals: list[np.ndarray]
    masks: list[np.ndarray]
    evidence: proxy.Evidence
    judged: dict[str, proxy.Judged]
    images: dict[str, list[Image]]
    held: dict[str, proxy.Normals]
    labelled: bool
    directions: np.ndarray
    real: dict[str, Defects]
    kin: dict[str, str]
    made: dict[tuple[str, int, int], tuple[proxy.Evidence, list[str]]] = field(default_factory=dict)

    @property
    def generators(self) -> np.ndarray:
        return np.array([recipe["generator"] for recipe in self.recipes])


def prepare(
    space: Workspace, round_: Round, advance: Callable[[int], None], *, squares: bool = False
) -> Ground:
    """Features of normals, samples and feedback pictures, as distances to the nearest normal token.

    Args:
        squares: whether the samples' evidence holds those.

    Raises:
        FlawsmithError: no sample of the round is left.
    """
    backbone = backbone_of(round_.generation)
    rng = np.random.default_rng(np.random.SeedSequence(round_.config.seed, spawn_key=(round_.number, 1)))
    max_side = round_.config.output.max_side
    banks, negatives, held = {}, [], {}
    for category, pictures in round_.pool.normals.items():
        own = evenly(pictures, MOST_NORMALS)
        calibration = [
            image
            for image in round_.images.values()
            if image.category == category and image.split == "calibration" and image.defect == GOOD
        ][:MOST_NORMALS]
        # Half of the train normals are the bank, the other half are what the head learns as normal.
        known = features_of(backbone, own[::2], max_side, advance)
        out = [ignored(image, SIZE) for image in own[::2]]
        banks[category] = proxy.normal_bank(known, rng, _ignored(out, known))

        def against_bank(images: Sequence[Image], bank: torch.Tensor = banks[category]) -> proxy.Normals:
            found = features_of(backbone, images, max_side, advance)
            skipped = [ignored(image, SIZE) for image in images]
            return proxy.Normals(proxy.residuals(found, bank), _ignored(skipped, found))

        others = against_bank(own[1::2] or own)
        negatives.append(others.tokens)
        held[category] = against_bank(calibration) if calibration else others
    accepted = sum(
        row["accepted"] for row in space.read_table(round_file(round_.number, "shards.parquet")).to_pylist()
    )
    step = max(1, -(-accepted // MOST_SAMPLES))
    samples = (sample for at, sample in enumerate(all_samples_of(space, round_.number)) if at % step == 0)
    recipes, residuals, masks, directions = [], [], [], []
    for sample, difference in _differences(samples, backbone, banks, advance):
        recipes.append(sample.recipe)
        residuals.append(np.abs(difference))
        masks.append(sample.mask)
        directions.append(matching.direction(difference, sample.mask))
    if not recipes:
        raise FlawsmithError(
            f"round {round_.number}: the proxy can read none of its samples (rejected by hand, or features "
            "of another backbone); nothing to learn from"
        )
    normals = proxy.of_normals(np.concatenate(negatives))
    evidence = proxy.with_samples(normals, residuals, masks, squares=squares)
    small = [proxy.shrink_mask(m, r.shape[:2]) for m, r in zip(masks, residuals, strict=True)]
    judged, images, real = _real(round_, backbone, banks, advance)
    labelled = any(group.labels.any() for group in judged.values())
    kin: dict[str, str] = {
        name: registry.get(name).family for name in sorted({recipe["generator"] for recipe in recipes})
    }
    if len(set(kin.values())) < 2:
        kin = {name: name for name in kin}
    if not labelled:
        judged, images = _by_family([kin[r["generator"]] for r in recipes], recipes, residuals, small), {}
        together = proxy.Normals(*map(np.concatenate, zip(*held.values(), strict=True)))
        held = dict.fromkeys(judged or ("",), together)
    output = round_.config.output.model_copy(update={"max_side": SIZE, "bits": 8})
    probed = replace(round_, config=round_.config.model_copy(update={"output": output}))
    return Ground(
        probed, PictureCache(probed), backbone, banks, normals, recipes, residuals, small, evidence, judged,
        images, held, labelled, np.stack(directions), real, kin,
    )  # fmt: skip


def backbone_of(generation: Generation) -> Backbone:
    """The proxy's: that of the samples of features, so that it can read them, if they have one; else the
    default one."""
    wanted = {
        (params["backbone"], params["layers"])
        for name, own in generation.generators.items()
        if own.share > 0 and registry.get(name).family == "feature"
        for params in [registry.get(name).params.model_validate(own.params).model_dump()]
    }
    if len(wanted) != 1:
        return load_backbone()
    ((name, layers),) = wanted
    return load_backbone(name, layers)


def _real(
    round_: Round, backbone: Backbone, banks: Mapping[str, torch.Tensor], advance: Callable[[int], None]
) -> tuple[dict[str, proxy.Judged], dict[str, list[Image]], dict[str, Defects]]:
    judged, images, real = {}, {}, {}
    for category in round_.pool.normals:
        own = [i for i in round_.images.values() if i.category == category and i.split == "feedback"]
        own = evenly(own, MOST_JUDGED)
        if not own:
            continue
        features = features_of(backbone, own, round_.config.output.max_side, advance)
        differences = proxy.differences(features, banks[category])
        residual = np.abs(differences)
        labels = np.array([image.defect != GOOD for image in own])
        truths = [truth(image, SIZE) for image in own]
        grid = (residual.shape[1], residual.shape[2])
        with_masks = [proxy.shrink_mask(t, grid) for t in truths if t is not None]
        masked = np.stack(with_masks) if len(with_masks) == len(own) else None
        skipped = [ignored(image, SIZE) for image in own]
        groups = tuple(image.group for image in own)
        fold = proxy.folds([category] * len(own), groups, labels)
        judged[category] = proxy.Judged(residual, labels, masked, _ignored(skipped, features), groups, fold)
        images[category] = own
        found = {}
        for k, (mask, no) in enumerate(zip(truths, skipped, strict=True)):
            seen = mask if mask is None or no is None else mask & ~no
            if labels[k] and seen is not None and seen.any():
                found[k] = matching.direction(differences[k], seen)
        if found:
            real[category] = Defects(np.stack(list(found.values())), tuple(groups[k] for k in found))
    return judged, images, real


def _ignored(skipped: Sequence[np.ndarray | None], features: torch.Tensor) -> np.ndarray:
    """Where nothing counts, as :func:`training.evaluation.ignored` says of each picture, at the size of the
    maps: bool N×(4h)×(4w)."""
    grid = (features.shape[2], features.shape[3])
    nothing = np.zeros((SIZE, SIZE), bool)
    return np.stack([proxy.shrink_mask(nothing if no is None else no, grid) for no in skipped])


def _by_family(
    families: Sequence[str],
    recipes: Sequence[dict[str, Any]],
    residuals: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
) -> dict[str, proxy.Judged]:
    """The round's samples, to judge heads that their family took no part in; none of a single family.

    Samples of one normal picture are a group. Those of another grid than the most are left out.
    """
    shapes = [residual.shape for residual in residuals]
    usual = max(set(shapes), key=shapes.count)
    judged = {}
    for name in sorted(set(families)):
        own = [k for k, family in enumerate(families) if family == name and shapes[k] == usual][:96]
        if not own or len(set(families)) < 2:
            continue
        stacked = np.stack([masks[k] for k in own])
        groups = tuple(recipes[k]["image_id"] for k in own)
        labels = np.ones(len(own), bool)
        fold = proxy.folds([name] * len(own), groups, labels)
        residual = np.stack([residuals[k] for k in own])
        judged[name] = proxy.Judged(residual, labels, stacked, np.zeros_like(stacked), groups, fold, name)
    return judged


def is_probed(generator: str) -> bool:
    return registry.get(generator).seconds <= SLOW


def judge_settings(ground: Ground, generation: Generation, shards: range, stream: int) -> proxy.Maps:
    """Maps of the head that settings teach, from ``SHARD`` samples a shard.

    Args:
        shards: numbers of the probe's shards; equal numbers of one stream have equal random numbers.
        stream: 0 for trials, 1 to confirm; 2 is for :func:`directions_of`.
    """
    evidence, weights, generators = learned_from(ground, generation, shards, stream)
    families = np.array([ground.kin.get(name, name) for name in generators])
    return proxy.all_maps(evidence, weights, families, ground.judged, ground.held)


def learned_from(
    ground: Ground, generation: Generation, shards: range, stream: int
) -> tuple[proxy.Evidence, np.ndarray, list[str]]:
    """(evidence, weight a sample, generator a sample) of settings: fresh samples, then those at hand."""
    shares = shares_of(generation.generators, ground.banks, generation.categories)
    used = {name: s for name, s in generation.generators.items() if shares[name] > 0}
    total = sum(shares.values())
    probed = {name: settings for name, settings in used.items() if is_probed(name)}
    evidence, weights = ground.normals, np.empty(0)
    generators: list[str] = []
    if probed:
        for shard in shards:
            more, names = _shard(ground, generation, probed, shard, stream)
            evidence = proxy.joined(evidence, more, range(len(names)))
            generators = generators + names
        share = sum(shares[name] for name in probed) / total
        weights = np.full(len(generators), share / max(len(generators), 1))
    slow = [k for k, recipe in enumerate(ground.recipes) if not is_probed(recipe["generator"])]
    if slow and len(probed) < len(used):
        evidence = proxy.joined(evidence, ground.evidence, slow)
        own = [ground.recipes[k] for k in slow]
        drawn = ground.round_.generation
        generators += [recipe["generator"] for recipe in own]
        weights = np.concatenate([weights, weights_at_hand(generation, drawn, own, shares) / total])
    return evidence, weights, generators


def _shard(
    ground: Ground,
    generation: Generation,
    probed: Mapping[str, GeneratorSettings],
    shard: int,
    stream: int,
) -> tuple[proxy.Evidence, list[str]]:
    """(evidence, generator a sample) of one shard of fresh samples; made once."""
    key = (generation.model_dump_json(), shard, stream)
    if key not in ground.made:
        made = list(fresh(ground, generation, probed, shard, stream))
        residuals, masks = [np.abs(m[1]) for m in made], [m[2] for m in made]
        evidence = proxy.with_samples(ground.normals, residuals, masks)
        ground.made[key] = evidence, [recipe.generator for recipe, _, _ in made]
    return ground.made[key]


def directions_of(
    ground: Ground, generation: Generation, advance: Callable[[int], None]
) -> dict[str, dict[str, np.ndarray]]:
    """Directions of samples, S×C, by category and generator, for the categories with real defects on enough
    parts to be matched: of the round's own and, of what is probed, of at least ``ALIKE`` fresh recipes each
    on average."""
    enough = [c for c, real in ground.real.items() if len(set(real.groups)) >= matching.FEWEST]
    found: dict[str, dict[str, list[np.ndarray]]] = {category: {} for category in enough}
    for recipe, own in zip(ground.recipes, ground.directions, strict=True):
        if recipe["category"] in found:
            found[recipe["category"]].setdefault(recipe["generator"], []).append(own)
    shares = {name: float(name in found) for name in ground.banks}
    even = generation.model_copy(update={"categories": shares})
    for name, settings in generation.generators.items():
        if settings.share > 0 and is_probed(name) and found:
            alone = {name: settings.model_copy(update={"categories": {}})}
            for shard in range(-(-ALIKE * len(found) // SHARD)):
                for made, difference, mask in fresh(ground, even, alone, shard, 2):
                    own = matching.direction(difference, mask)
                    found[made.category].setdefault(name, []).append(own)
                    advance(1)
    return {
        category: {name: np.stack(own) for name, own in by_name.items()}
        for category, by_name in found.items()
    }


def weights_at_hand(
    generation: Generation,
    drawn: Generation,
    recipes: Sequence[Mapping[str, Any]],
    shares: Mapping[str, float],
) -> np.ndarray:
    """How much samples that were made with the settings ``drawn`` weigh for others: float64 S.

    A generator's samples weigh its share (``shares``, by name) in all. Among them, one outside the ranges of
    area or severity weighs ``OFF_RANGE`` for each, and each weighs as much more as its category and its
    defect are drawn more often and, where its generator's settings ``vary``, by a Gaussian of their distance
    to the settings (``NEAR`` of the limits).
    """
    weights = np.array([_weight(generation, drawn, recipe) for recipe in recipes], np.float64)
    present = present_values(generation)
    for name, own in generation.generators.items():
        if own.share > 0 and own.vary > 0:
            for path, search in numbers_of(generation, name).items():
                key, here = path.rpartition(".")[2], place_of(search, present[path])
                for k, recipe in enumerate(recipes):
                    if recipe["generator"] == name:
                        there = place_of(search, json.loads(recipe["params"])[key])
                        weights[k] *= np.exp(-0.5 * ((there - here) / NEAR) ** 2)
    names = np.array([recipe["generator"] for recipe in recipes])
    for name in set(names.tolist()):
        own = names == name
        weights[own] *= shares.get(name, 0.0) / max(weights[own].sum(), 1e-12)
    return weights


def _weight(generation: Generation, drawn: Generation, recipe: Mapping[str, Any]) -> float:
    own = generation.generators.get(recipe["generator"]) or GeneratorSettings()
    weight = _often(generation, recipe) / max(_often(drawn, recipe), 1e-9)
    for name in ("area", "severity"):
        low, high = getattr(own, name) or getattr(generation, name)
        weight *= 1.0 if low <= recipe[name] <= high else OFF_RANGE
    return weight


def _often(generation: Generation, recipe: Mapping[str, Any]) -> float:
    """How often settings draw a recipe's defect and category, beside others."""
    own = generation.generators.get(recipe["generator"]) or GeneratorSettings()
    category = recipe["category"]
    often = generation.categories.get(category, 1.0) * own.categories.get(category, 1.0)
    return often * own.defects.get(recipe["defect"], 1.0)


def cost_of(generation: Generation, categories: Collection[str]) -> float:
    """Seconds that a sample of the mix takes, by what the generators say of themselves."""
    shares = shares_of(generation.generators, categories, generation.categories)
    return sum(share * registry.get(name).seconds for name, share in shares.items()) / sum(shares.values())


def fresh(
    ground: Ground,
    generation: Generation,
    probed: Mapping[str, GeneratorSettings],
    shard: int,
    stream: int,
) -> Iterator[tuple[Recipe, np.ndarray, np.ndarray]]:
    """(recipe, difference of its tokens from the nearest normal ones, mask) of a probe's accepted samples."""
    round_ = ground.round_
    spawn = (round_.number, 2, stream)
    seed = np.random.SeedSequence(round_.config.seed, spawn_key=spawn).generate_state(1)[0]
    probe = generation.model_copy(update={"generators": dict(probed)})
    asked = replace(
        round_,
        config=round_.config.model_copy(update={"seed": int(seed)}),
        generation=probe,
        traits=traits_of(probe, round_.prompts),
    )
    section = Section(probe.generators, gpu=False, samples=SHARD * (shard + 1), shard_size=SHARD, first=0)
    recipes = asked.plan_section(section, shard)
    outcomes: list[Outcome] = []
    signatures: Signatures = {}
    for name in sorted({recipe.generator for recipe in recipes}):
        mine = [recipe for recipe in recipes if recipe.generator == name]
        model = load_model(name, asked.traits[name].params)
        outcomes += synthesise(
            mine, ground.cache.source, registry.get(name), model, probe.gates, ATTEMPTS, signatures
        )
    pictures = [o for o in outcomes if o.status == "accepted" and o.pixels is not None]
    for chunk in chunks(pictures, at_once(ground.backbone.device.type)):
        batch = to_batch([o.pixels for o in chunk if o.pixels is not None], SIZE)
        for outcome, feature in zip(chunk, ground.backbone.features(batch), strict=True):
            yield _probed(ground, outcome, feature)
    for outcome in outcomes:
        features = outcome.feature if outcome.status == "accepted" else None
        if features is not None and features.backbone == ground.backbone.fingerprint:
            yield _probed(ground, outcome, torch.from_numpy(features.feature))


def _probed(ground: Ground, outcome: Outcome, feature: torch.Tensor) -> tuple[Recipe, np.ndarray, np.ndarray]:
    assert outcome.mask is not None  # accepted samples have one
    difference = proxy.differences(feature[None], ground.banks[outcome.recipe.category])[0]
    return outcome.recipe, difference, outcome.mask > 0


def _differences(
    samples: Iterator[Sample | FeatureSample],
    backbone: Backbone,
    banks: Mapping[str, torch.Tensor],
    advance: Callable[[int], None],
) -> Iterator[tuple[Sample | FeatureSample, np.ndarray]]:
    """Samples with how their tokens differ from the nearest normal ones, h×w×C; those of another backbone's
    features are left out."""
    for chunk in chunks(samples, at_once(backbone.device.type)):
        pictures = [sample.image for sample in chunk if isinstance(sample, Sample)]
        features = iter(backbone.features(to_batch(pictures, SIZE)) if pictures else ())
        for sample in chunk:
            if isinstance(sample, Sample):
                feature = next(features)
            elif sample.backbone == backbone.fingerprint:
                feature = torch.from_numpy(sample.feature)
            else:
                continue
            yield sample, proxy.differences(feature[None], banks[sample.category])[0]
        advance(len(chunk))


def features_of(
    backbone: Backbone, images: Sequence[Image], max_side: int | None, advance: Callable[[int], None]
) -> torch.Tensor:
    parts = []
    for chunk in chunks(images, at_once(backbone.device.type)):
        parts.append(backbone.features(to_batch([load(image, max_side=max_side) for image in chunk], SIZE)))
        advance(len(chunk))
    return torch.cat(parts)
