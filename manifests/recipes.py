"""Planning: settings and images to recipes, one shard at a time, without ever holding the whole plan.

``plan_shard`` is a pure function of (settings, pictures, round, shard), so a plan of any length needs no
central table: whoever makes a shard plans it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from manifests.errors import UsageError
from manifests.schema import GOOD, Image, Recipe
from manifests.searching import Search
from manifests.wording import DRAWS, Prompts

Donors = Literal["none", "texture", "normal", "foreign"]
Number = TypeVar("Number", int, float)


def ordered(value: tuple[Number, Number]) -> tuple[Number, Number]:
    if value[0] > value[1]:
        raise ValueError(f"the range {list(value)} is upside down; write [{value[1]}, {value[0]}]")
    return value


Share = Annotated[float, Field(ge=0, allow_inf_nan=False)]
UnitRange = Annotated[
    tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]], AfterValidator(ordered)
]
AreaRange = Annotated[
    tuple[Annotated[float, Field(gt=0, le=0.5)], Annotated[float, Field(gt=0, le=0.5)]],
    AfterValidator(ordered),
]
CountRange = Annotated[
    tuple[Annotated[int, Field(ge=1, le=32)], Annotated[int, Field(ge=1, le=32)]], AfterValidator(ordered)
]


class GeneratorSettings(BaseModel):
    """One generator's part in a round."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: Annotated[Share, Search(0.1, 10, log=True)] = Field(
        1.0, description="weight in the mix; 0 leaves the generator out"
    )
    defect: str | None = Field(None, description="word for the defect; default: the generator's own")
    prompt: str = Field(
        "", description="short text of the anomaly (text-to-image generators); may hold {object}"
    )
    detail: str = Field("", description="detailed description of the anomaly (text-to-image generators)")
    area: Annotated[AreaRange | None, Search(0.0003, 0.3, log=True)] = Field(
        None, description="its own range; null: generation.area"
    )
    severity: Annotated[UnitRange | None, Search(0, 1)] = Field(
        None, description="its own range; null: generation.severity"
    )
    vary: float = Field(
        0.0,
        ge=0,
        le=0.5,
        description="how far its searched numbers differ between shards, as a share of their limits; a slow "
        "generator, of which no trial makes samples, can only so be steered in its own settings",
    )
    defects: Annotated[dict[str, Share], Search(0.2, 5, log=True)] = Field(
        default_factory=dict,
        description="how often defects of its prompt bank are drawn, by name; 1 if not named",
    )
    texts: dict[str, Share] = Field(
        default_factory=dict,
        description="how often prompts and details of its prompt bank are drawn, beside others of their "
        "defect, by the text with its slots; 1 if not named. Feedback names those that turn out well, and "
        "those that do not",
    )
    categories: dict[str, Share] = Field(
        default_factory=dict,
        description="how often it makes a sample of a category, beside its share; 1 if not named. Feedback "
        "names those whose real defects its samples look like, or do not",
    )
    params: dict[str, Any] = Field(default_factory=dict, description="the generator's own settings")


@dataclass(frozen=True)
class Trait:
    """What planning must know of a generator: made from the registry by the caller.

    ``params`` is the full, validated settings as canonical JSON. ``prompts`` words the recipes (defect,
    prompt and detail), with what the configuration says of them already in it; None: the configuration's own
    are taken as they are.
    """

    donors: Donors
    defect: str
    batch_size: int
    params: str
    prompts: Prompts | None = None


@dataclass(frozen=True)
class Pool:
    """The pictures a plan draws from: normals of the train split by category, and textures."""

    normals: dict[str, tuple[Image, ...]]
    textures: tuple[Image, ...] = ()


def pool_from(images: Sequence[Image], textures: Sequence[Image] = ()) -> Pool:
    """Only good pictures of the train split take part: calibration, feedback and test stay unseen.

    Raises:
        UsageError: there is no such picture.
    """
    normals: dict[str, list[Image]] = {}
    for image in images:
        if image.split == "train" and image.defect == GOOD:
            normals.setdefault(image.category, []).append(image)
    if not normals:
        raise UsageError("no good picture in the train split: add pictures of good parts to the source")
    ordered = {name: tuple(sorted(normals[name], key=lambda i: i.image_id)) for name in sorted(normals)}
    return Pool(ordered, tuple(sorted(textures, key=lambda i: i.image_id)))


def shard_count(samples: int, shard_size: int) -> int:
    return -(-samples // shard_size)


NEAREST = 2.0  # how much more often than others a generator draws the pictures named for it


def shares_of(
    generators: Mapping[str, GeneratorSettings],
    categories: Collection[str],
    category_shares: Mapping[str, float] = MappingProxyType({}),
) -> dict[str, float]:
    """How often each generator makes a sample, relative to the others: its share and, where it has such for
    categories, the mean of those, weighted by how often a category is drawn."""
    often = {name: category_shares.get(name, 1.0) for name in categories}
    total = sum(often.values())
    return {
        name: own.share * sum(n * own.categories.get(c, 1.0) for c, n in often.items()) / total
        if total > 0 and any(c in often for c in own.categories)
        else own.share
        for name, own in generators.items()
    }


@dataclass(frozen=True)
class Section:
    """The shards of a round whose generators want the same kind of worker, so that a GPU is never held by a
    shard that has no use for it.

    Attributes:
        generators: those of the mix that its recipes are made by.
        gpu: whether they want one.
        samples: recipes in all its shards. shard_size: the most in one. first: number of its first shard.
    """

    generators: Mapping[str, GeneratorSettings]
    gpu: bool
    samples: int
    shard_size: int
    first: int

    @property
    def shards(self) -> range:
        return range(self.first, self.first + shard_count(self.samples, self.shard_size))


def sections(
    samples: int,
    generators: Mapping[str, GeneratorSettings],
    gpu: Collection[str],
    sizes: Mapping[bool, int],
    shares: Mapping[str, float],
) -> tuple[Section, ...]:
    """A round's shards: first those for GPUs, which take longest, then the others.

    Args:
        samples: of the round; divided by the generators' shares. A mix of one kind is one section.
        gpu: names of the generators that want a GPU.
        sizes: the most samples a shard, with and without one.
        shares: of :func:`shares_of`.

    Raises:
        UsageError: none is above 0.
    """
    found: list[Section] = []
    total = sum(shares.values())
    left, first = samples, 0
    for kind in (True, False):
        mine = {name: s for name, s in generators.items() if shares[name] > 0 and (name in gpu) == kind}
        share = sum(shares[name] for name in mine)
        count = min(left, round(samples * share / total)) if kind and total else left
        if mine and count:
            found.append(Section(mine, kind, count, sizes[kind], first))
            left, first = left - count, found[-1].shards.stop
    if not found:
        raise UsageError("generation.generators: no generator has a share above 0 for any category")
    return tuple(found)


def plan_shard(
    *,
    seed: int,
    samples: int,
    shard_size: int,
    generators: Mapping[str, GeneratorSettings],
    traits: Mapping[str, Trait],
    area: tuple[float, float],
    severity: tuple[float, float],
    count: tuple[int, int],
    location: str,
    pool: Pool,
    round_: int,
    shard: int,
    first: int = 0,
    category_shares: Mapping[str, float] = MappingProxyType({}),
    normal_weights: Mapping[str, float] = MappingProxyType({}),
    nearest: Mapping[str, str] = MappingProxyType({}),
) -> list[Recipe]:
    """The recipes of one shard, in plan order. ``first`` is the shard with which the ``samples`` begin.

    Generators appear in proportion to their shares (:func:`shares_of`; systematic sampling, so that even a
    small shard keeps the mix), categories and their pictures in proportion to theirs (1 if not named), and
    categories also to those that the generator has for them, in expectation, area log-uniformly, severity and
    count uniformly in their ranges. All numbers come from ``SeedSequence(seed, spawn_key=(round, shard))``;
    each recipe carries a seed of its own, from which every attempt spawns its stream. Prompts are drawn from
    a stream of their own (spawn key ``(round, shard, 0)``), and so are categories if any has a share
    (``(round, shard, 1)``), so that no other number depends on whether there are any.

    Args:
        category_shares: by category.
        normal_weights: how often a picture is drawn, by ``image_id``.
        nearest: the generator that draws a picture ``NEAREST`` times as often as others do, by ``image_id``.

    Raises:
        UsageError: no generator has a share, no category has one, a generator needs donors that the pool
            lacks, or its prompts leave out a category.
    """
    size = min(shard_size, samples - (shard - first) * shard_size)
    if size <= 0 or shard < first:
        raise IndexError(f"shard {shard} is beyond a plan of {samples} samples in shards of {shard_size}")
    categories = list(pool.normals)
    every = shares_of(generators, categories, category_shares)
    names = [name for name in sorted(generators) if every[name] > 0]
    if not names:
        raise UsageError("generation.generators: no generator has a share above 0")
    shares = np.array([every[name] for name in names])
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(round_, shard)))

    places = (rng.random() + np.arange(size)) / size
    chosen = np.searchsorted(np.cumsum(shares / shares.sum())[:-1], places, side="right")
    rng.shuffle(chosen)
    category_draw = rng.integers(len(categories), size=size)
    named = {*category_shares, *(c for name in names for c in generators[name].categories)}
    if named & set(categories):
        weights = np.array([category_shares.get(name, 1.0) for name in categories])
        if not weights.any():
            raise UsageError("generation.categories: no category has a share above 0")
        own = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(round_, shard, 1)))
        draws = own.random(size)
        for at, name in enumerate(names):
            mine = weights * [generators[name].categories.get(c, 1.0) for c in categories]
            category_draw[chosen == at] = _weighted(mine, draws[chosen == at])
    often = {
        name: np.array([normal_weights.get(image.image_id, 1.0) for image in pictures])
        for name, pictures in pool.normals.items()
        if any(image.image_id in normal_weights or image.image_id in nearest for image in pictures)
    }
    oftener = {
        (category, name): weights
        * np.array([NEAREST if nearest.get(i.image_id) == name else 1.0 for i in pool.normals[category]])
        for category, weights in often.items()
        for name in set(nearest.values())
    }
    picture_draw = rng.random(size)
    donor_draw = rng.random(size)
    ranges = np.log([generators[names[at]].area or area for at in chosen])
    areas = np.exp(rng.uniform(ranges[:, 0], ranges[:, 1]))
    strengths = np.array([generators[names[at]].severity or severity for at in chosen])
    severities = rng.uniform(strengths[:, 0], strengths[:, 1])
    counts = rng.integers(count[0], count[1] + 1, size)
    seeds = rng.integers(2**63 - 1, size=size)
    word_draws: list[list[float]] = []
    if any(traits[name].prompts is not None for name in names):
        words = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(round_, shard, 0)))
        word_draws = words.random((size, DRAWS)).tolist()

    used = dict.fromkeys(names, 0)
    first_batch = {name: at * size for at, name in enumerate(names)}
    recipes = []
    for index in range(size):
        name = names[chosen[index]]
        trait = traits[name]
        settings = generators[name]
        category = categories[category_draw[index]]
        pictures = pool.normals[category]
        place = picture_draw[index]
        weighted = oftener.get((category, name), often.get(category))
        image = pictures[int(place * len(pictures) if weighted is None else _weighted(weighted, place))]
        defect, prompt, detail = settings.defect or trait.defect, settings.prompt, settings.detail
        if trait.prompts is not None:
            defect, prompt, detail = trait.prompts.words(
                category, areas[index], severities[index], word_draws[index], settings.defects, settings.texts
            )
        recipes.append(
            Recipe(
                sample_id=f"{round_:03d}-{shard:05d}-{index:05d}",
                round=round_,
                image_id=image.image_id,
                category=category,
                generator=name,
                defect=defect,
                prompt=prompt,
                detail=detail,
                area=float(areas[index]),
                severity=float(severities[index]),
                count=int(counts[index]),
                location=location,
                donors=_donors(trait.donors, name, image, pool, float(donor_draw[index])),
                params=trait.params,
                seed=int(seeds[index]),
                batch=first_batch[name] + used[name] // trait.batch_size,
                shard=shard,
            )
        )
        used[name] += 1
    return recipes


def _weighted(weights: np.ndarray, draws: Any) -> Any:
    """Indices drawn in proportion to ``weights`` (≥ 0, one > 0), one for each number in [0, 1)."""
    return np.searchsorted(np.cumsum(weights / weights.sum())[:-1], draws, side="right")


def check_donors(
    generators: Mapping[str, GeneratorSettings], traits: Mapping[str, Trait], pool: Pool
) -> None:
    """Asks for every donor that any plan could need, so that a plan cannot fail half-way.

    Raises:
        UsageError: as :func:`plan_shard`.
    """
    for name, settings in generators.items():
        if settings.share > 0:
            for pictures in pool.normals.values():
                _donors(traits[name].donors, name, pictures[0], pool, 0.0)


def check_categories(
    generators: Mapping[str, GeneratorSettings], category_shares: Mapping[str, float], pool: Pool
) -> None:
    """
    Raises:
        UsageError: a share is of a category that no picture is of.
    """
    of = {"generation.categories": category_shares}
    of |= {f"generation.generators.{name}.categories": own.categories for name, own in generators.items()}
    known = list(pool.normals)
    for setting, shares in of.items():
        for name in shares:
            if name not in known:
                near = get_close_matches(name, known, n=1, cutoff=0.0)
                raise UsageError(f"{setting}: no category is called {name!r}; did you mean {near[0]!r}?")


def check_pictures(
    generators: Mapping[str, GeneratorSettings],
    normal_weights: Mapping[str, float],
    nearest: Mapping[str, str],
    pool: Pool,
) -> None:
    """
    Raises:
        UsageError: a weight or a nearest generator is of a picture that no sample is made from, or that
            generator is not in the mix.
    """
    known = {image.image_id for own in pool.normals.values() for image in own}
    for setting, own in (("generation.normals", normal_weights), ("generation.nearest", nearest)):
        if unknown := [image_id for image_id in own if image_id not in known]:
            raise UsageError(
                f"{setting}: no normal picture of the train split has the image_id {unknown[0]!r}; those of "
                "a workspace stand in its images.parquet"
            )
    for image_id, name in nearest.items():
        if name not in generators:
            raise UsageError(f"generation.nearest.{image_id}: {name!r} is none of the mix's generators")


def check_prompts(
    generators: Mapping[str, GeneratorSettings], traits: Mapping[str, Trait], pool: Pool
) -> None:
    """Asks for the prompts of every category, so that a plan cannot fail half-way.

    Raises:
        UsageError: as :func:`plan_shard`.
    """
    for name, settings in generators.items():
        prompts = traits[name].prompts
        if settings.share > 0 and prompts is not None:
            for category in pool.normals:
                try:
                    prompts.of(category)
                except UsageError as error:
                    raise UsageError(f"generation.generators.{name}: {error}") from None


def _donors(kind: Donors, generator: str, image: Image, pool: Pool, draw: float) -> tuple[str, ...]:
    if kind == "none":
        return ()
    if kind == "texture":
        if not pool.textures:
            raise UsageError(
                f"generator {generator!r} takes its textures from a folder: set generation.textures to a "
                "folder of pictures, or let it take others (params.texture: procedural for perlin, "
                "params.other: normals for the frequency family)"
            )
        return (pool.textures[int(draw * len(pool.textures))].image_id,)
    if kind == "foreign":
        foreign = [name for name in pool.normals if name != image.category]
        if not foreign:
            raise UsageError(
                f"generator {generator!r} takes pictures of another category, but the source has only "
                f"{image.category!r}: add one, or set generation.generators.{generator}.share to 0"
            )
        place = draw * len(foreign)
        pictures = pool.normals[foreign[int(place)]]
        return (pictures[int(place % 1 * len(pictures))].image_id,)
    # Another good picture of the same kind; with a single one, of any kind. The draw picks among all
    # pictures but this one by skipping its place, which needs no copy of the list.
    same = pool.normals[image.category]
    if len(same) > 1:
        at = int(draw * (len(same) - 1))
        return (same[at + (same[at].image_id >= image.image_id)].image_id,)
    others = [other for name, images in pool.normals.items() if name != image.category for other in images]
    if not others:
        raise UsageError(
            f"generator {generator!r} takes patches from another good picture, but category "
            f"{image.category!r} has only one: add pictures, or name the other generators, without it, under "
            "generation.generators"
        )
    return (others[int(draw * len(others))].image_id,)
