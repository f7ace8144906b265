"""One shard from plan to commit: the fused task that workers run, and what it needs to know of its round."""

from __future__ import annotations

import hashlib
import importlib.metadata
import io
import json
import os
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache, partial
from typing import Any

import cv2
import numpy as np
from pydantic import ValidationError

from generation import registry
from generation.masks import foreground, resolve_location
from generation.protocol import Generator, Source
from generation.synthesis import Outcome, Signatures, synthesise
from manifests import pictures, shards
from manifests.plain import from_json
from manifests.recipes import Pool, Section, Trait, plan_shard, pool_from, sections, shares_of
from manifests.schema import (
    RECIPES,
    SAMPLES,
    Image,
    Recipe,
    as_row,
    canonical_json,
    images_from,
    to_table,
)
from manifests.wording import Prompts, from_plain, to_plain
from manifests.workspace import Workspace, WorkspaceError, part, round_file
from workflows.config import Config, Generation
from workflows.practice import Pinned, coached
from workflows.space import vary

CACHE_BYTES = 512 * 2**20  # decoded pictures kept a worker
PICTURE_TABLES = ("images.parquet", "textures.parquet")  # in the folder of a configuration's first round
PROMPTS = "prompts.json"  # there too, if a generator of the configuration has prompts
KINDS = {True: "gpu", False: "cpu"}  # of workers; the names in settings.yaml, shard_sizes
PACKAGES = ("flawsmith", "numpy", "opencv-python-headless", "pillow", "scipy")
MODEL_PACKAGES = ("torch", "timm", "diffusers", "transformers", "open_clip_torch")


@dataclass(frozen=True)
class Job:
    """What crosses the scheduler: a few words. ``settings`` is the sha256 of the round's settings, so that a
    worker never serves a round from a stale cache; ``halvings`` of the batch, where whole workers were lost
    for lack of memory."""

    workspace: str
    round: int
    shard: int
    settings: str
    halvings: int = 0


@dataclass(frozen=True)
class Round:
    """Everything a worker needs of one round, read once from the workspace."""

    number: int
    config: Config
    generation: Generation
    pool: Pool
    images: dict[str, Image]
    textures: dict[str, Image]
    traits: dict[str, Trait]
    sizes: dict[str, int]  # the most samples a shard, by kind of worker; those that are missing: shard_size
    critic: Pinned | None = None

    @cached_property
    def pictures(self) -> PictureCache:
        """Decoded once a process, not once a shard."""
        return PictureCache(self)

    @property
    def prompts(self) -> dict[str, Prompts]:
        """By generator, of those that draw from words."""
        return {name: trait.prompts for name, trait in self.traits.items() if trait.prompts is not None}

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        size = self.config.output.shard_size
        return sections(
            self.config.samples,
            self.generation.generators,
            [name for name in self.generation.generators if registry.get(name).gpu],
            {gpu: min(size, self.sizes.get(kind, size)) for gpu, kind in KINDS.items()},
            shares_of(self.generation.generators, self.pool.normals, self.generation.categories),
        )

    @property
    def shard_count(self) -> int:
        return self.sections[-1].shards.stop

    def plan(self, shard: int) -> list[Recipe]:
        section = next((s for s in self.sections if shard in s.shards), self.sections[-1])
        return self.plan_section(section, shard)

    def plan_section(self, section: Section, shard: int) -> list[Recipe]:
        return plan_shard(
            seed=self.config.seed,
            samples=section.samples,
            shard_size=section.shard_size,
            first=section.first,
            generators=section.generators,
            traits=self._traits(shard),
            area=self.generation.area,
            severity=self.generation.severity,
            count=self.generation.count,
            location=self.generation.location,
            pool=self.pool,
            round_=self.number,
            shard=shard,
            category_shares=self.generation.categories,
            normal_weights=self.generation.normals,
            nearest=self.generation.nearest,
        )

    def _traits(self, shard: int) -> dict[str, Trait]:
        """The traits, with the searched numbers of generators that ``vary`` drawn anew for each shard, evenly
        around the present ones (spawn key ``(round, shard, 2)``)."""
        varied = {name: s for name, s in self.generation.generators.items() if s.share > 0 and s.vary > 0}
        if not varied:
            return self.traits
        seeds = np.random.SeedSequence(self.config.seed, spawn_key=(self.number, shard, 2))
        drawn = vary(self.generation, sorted(varied), np.random.default_rng(seeds))
        return self.traits | {
            name: replace(
                self.traits[name],
                params=canonical_json({**json.loads(self.traits[name].params), **drawn[name]}),
            )
            for name in varied
        }

    def fingerprint(self, generators: Iterable[str] = ()) -> str:
        """What the bytes of a shard depend on besides the pictures, as canonical JSON; ``device`` is what
        these generators run on in this process."""
        on_gpu = any(device_of(registry.get(name)) == "cuda" for name in generators)
        names = [name for name, s in self.generation.generators.items() if s.share > 0]
        models = {
            name: registry.get(name).identify(self.generation.generators[name].params)
            for name in names
            if registry.get(name).load is not None
        }
        packages = PACKAGES + (MODEL_PACKAGES if models or self.critic else ())
        prompts = prompts_bytes(self.traits)
        return canonical_json(
            {
                **({"critic": self.critic.sha256} if self.critic else {}),
                **({"prompts": hashlib.sha256(prompts).hexdigest()} if prompts else {}),
                "seed": self.config.seed,
                "samples": self.config.samples,
                "output": self.config.output.model_dump(mode="json"),
                **({"shard_sizes": self.sizes} if self.sizes else {}),
                "generation": self.generation.model_dump(mode="json"),
                "models": models,
                "device": _gpu_name() if on_gpu else "cpu",
                "threads": 1,
                "packages": {name: _version(name) for name in packages},
            }
        )


def without_device(fingerprint: str) -> str:
    """The part of a fingerprint that whoever asks for a round can tell: its workers' GPUs are not here."""
    return canonical_json(
        {name: value for name, value in json.loads(fingerprint).items() if name != "device"}
    )


def traits_of(generation: Generation, stored: Mapping[str, Prompts] | None = None) -> dict[str, Trait]:
    """What planning must know of each generator in the mix.

    Args:
        stored: prompts that a workspace keeps, by generator; those that it lacks are read from their bank.

    Raises:
        UsageError: a prompt bank cannot be read, or does not hold what the configuration asks for.
    """
    traits = {}
    for name, settings in generation.generators.items():
        generator = registry.get(name)
        params = generator.params.model_validate(settings.params)
        prompts = (stored or {}).get(name)
        if prompts is None and generator.prompts is not None:
            prompts = generator.prompts(params, settings)
        traits[name] = Trait(
            donors=generator.donors(params) if callable(generator.donors) else generator.donors,
            defect=generator.defect,
            batch_size=generator.batch_size(params)
            if callable(generator.batch_size)
            else generator.batch_size,
            params=canonical_json({**params.model_dump(mode="json"), **(prompts.params if prompts else {})}),
            prompts=prompts,
        )
    return traits


def prompts_bytes(traits: Mapping[str, Trait]) -> bytes:
    """Content of ``prompts.json``: what the recipes of each generator are worded with; b"" if none is."""
    prompts = {name: to_plain(trait.prompts) for name, trait in traits.items() if trait.prompts is not None}
    return canonical_json(prompts).encode() if prompts else b""


def stored_prompts(space: Workspace, first: int) -> dict[str, Prompts]:
    """Prompts by generator, as the configuration that began with round ``first`` found them.

    Raises:
        WorkspaceError: the file is damaged.
    """
    name = round_file(first, PROMPTS)
    if not space.exists(name):
        return {}
    try:
        return {key: from_plain(value) for key, value in from_json(space.read_bytes(name)).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkspaceError(f"{space.address(name)} is damaged: {error}; restore it") from error


def round_from(
    number: int,
    config: Config,
    generation: Generation,
    images: Sequence[Image],
    textures: Sequence[Image],
    prompts: Mapping[str, Prompts] | None = None,
    sizes: Mapping[str, int] | None = None,
) -> Round:
    """``prompts``: see :func:`traits_of`; ``sizes``: see :class:`Round`."""
    return Round(
        number,
        config,
        generation,
        pool_from(images, textures),
        {image.image_id: image for image in images},
        {texture.image_id: texture for texture in textures},
        traits_of(generation, prompts),
        dict(sizes or {}),
    )


def _inputs(space: Workspace, number: int) -> list[bytes]:
    """The settings of a round, and the pictures and prompts that its configuration began with."""
    settings = space.read_bytes(round_file(number, "settings.yaml"))
    first = space.read_yaml(round_file(number, "settings.yaml"))["first"]
    worded = [PROMPTS] if space.exists(round_file(first, PROMPTS)) else []
    return [settings, *(space.read_bytes(round_file(first, name)) for name in [*PICTURE_TABLES, *worded])]


def settings_hash(space: Workspace, number: int) -> str:
    """sha256 over everything that :func:`load_round` reads."""
    digests = [hashlib.sha256(data).digest() for data in _inputs(space, number)]
    return hashlib.sha256(b"".join(digests)).hexdigest()


@lru_cache(maxsize=2)
def load_round(workspace: str, number: int, settings: str) -> Round:
    """Reads a round's settings, pictures and prompts; cached a process.

    Raises:
        WorkspaceError: the settings changed since the job was made, or are not of this version.
    """
    space = Workspace(workspace)
    if settings_hash(space, number) != settings:
        raise WorkspaceError(f"round {number}: its settings changed while the run was under way; run again")
    config, generation, first = read_settings(space, number)
    images, textures = (images_from(space.read_table(round_file(first, name))) for name in PICTURE_TABLES)
    prompts, sizes = stored_prompts(space, first), shard_sizes(space, number)
    critic = space.read_yaml(round_file(number, "settings.yaml")).get("critic")
    round_ = round_from(number, config, generation, images, textures, prompts, sizes)
    return replace(round_, critic=Pinned(workspace, **critic) if critic else None)


def read_settings(space: Workspace, number: int) -> tuple[Config, Generation, int]:
    """(configuration, generation settings of the round, round at which the configuration began).

    Raises:
        WorkspaceError: the file is missing, damaged, or was written by another version.
    """
    name = round_file(number, "settings.yaml")
    stored = space.read_yaml(name)
    try:
        config = Config.model_validate(stored["config"])
        return config, Generation.model_validate(stored["generation"]), int(stored["first"])
    except (ValidationError, KeyError, TypeError) as error:
        raise WorkspaceError(
            f"{space.address(name)} does not fit this version of flawsmith: {error}; use the version that "
            "wrote it, or another workspace"
        ) from error


def shard_sizes(space: Workspace, number: int) -> dict[str, int]:
    """The most samples a shard, by kind of worker, where a walltime made them smaller than the setting."""
    return dict(space.read_yaml(round_file(number, "settings.yaml")).get("shard_sizes") or {})


# -- one shard ------------------------------------------------------------------------------------------


def make_shard(job: Job, begun: Callable[[str], None] = lambda generator: None) -> dict[str, Any]:
    """Plans, makes, writes and records one shard; returns its row of ``shards.parquet``.

    ``begun`` is told of each generator as its samples begin.

    The samples table is written last and is the mark that the shard is whole. Deterministic errors become
    failed recipes; I/O errors, lack of memory and interrupts leave nothing behind and propagate.
    """
    started = time.perf_counter()
    space = Workspace(job.workspace)
    round_ = load_round(job.workspace, job.round, job.settings)
    recipes = round_.plan(job.shard)
    space.write_table(part("recipes", job.round, job.shard, "parquet"), to_table(recipes, RECIPES))
    planned = time.perf_counter()

    made = make_samples(round_, recipes, job.halvings, begun)
    done = time.perf_counter()

    accepted = [sample for sample in made if sample.members]
    packed = shards.pack((sample.outcome.recipe.sample_id, sample.members) for sample in accepted)
    path = part("shards", job.round, job.shard, "tar")
    space.write_bytes(path, packed.data)
    status = [sample.outcome.status for sample in made]
    record = {
        "round": job.round,
        "shard": job.shard,
        "path": path,
        "sha256": packed.sha256,
        "bytes": len(packed.data),
        "accepted": status.count("accepted"),
        "rejected": status.count("rejected"),
        "failed": status.count("failed"),
        "fingerprint": round_.fingerprint({recipe.generator for recipe in recipes}),
        "host": socket.gethostname(),
        "lossy": round_.config.output.format == "jpg",
        "plan_seconds": planned - started,
        "synthesis_seconds": sum(sample.outcome.seconds for sample in made),
        "encode_seconds": sum(sample.encode_seconds for sample in made),
        "seconds": 0.0,
    }
    where = {
        sample.outcome.recipe.sample_id: (offset, checksum)
        for sample, offset, checksum in zip(accepted, packed.offsets, packed.checksums, strict=True)
    }
    rows = [_row(sample.outcome, *where.get(sample.outcome.recipe.sample_id, (-1, ""))) for sample in made]
    table = to_table(rows, SAMPLES)
    record["write_seconds"] = time.perf_counter() - done
    record["seconds"] = time.perf_counter() - started
    table = table.replace_schema_metadata({shards.SHARD_KEY: canonical_json(record)})
    size = space.write_table(part("samples", job.round, job.shard, "parquet"), table)
    return {**record, "samples_bytes": size}


@dataclass(frozen=True)
class Made:
    """An outcome and, if it was accepted, the members of its sample."""

    outcome: Outcome
    members: dict[str, bytes]
    encode_seconds: float


def make_samples(
    round_: Round,
    recipes: Sequence[Recipe],
    halvings: int = 0,
    begun: Callable[[str], None] = lambda generator: None,
) -> list[Made]:
    """Synthesises recipes, generator by generator, and encodes what was accepted; in plan order.

    With ``halvings``, generators whose settings have a ``batch`` run that many times smaller ones, and the
    measures say so; replay then does the same.
    Pictures are encoded as soon as their generator is done, so that a shard's pixels are never all in memory.
    """
    cache = round_.pictures
    signatures: Signatures = {}
    made: dict[str, Made] = {}
    for name in sorted({recipe.generator for recipe in recipes}):
        generator = registry.get(name)
        begun(name)
        mine = [recipe for recipe in recipes if recipe.generator == name]
        batch = mine[0].settings().get("batch") if halvings else None
        smaller = batch and max(1, batch >> halvings)
        model = load_model(name, round_.traits[name].params)
        model, search = coached(
            generator, model, round_.critic, round_.generation.practice, device_of(generator)
        )
        outcomes = synthesise(
            [with_batch(recipe, smaller) for recipe in mine] if smaller else mine,
            cache.source,
            generator,
            model,
            round_.generation.gates,
            round_.generation.attempts,
            signatures,
            search,
        )
        for outcome, recipe in zip(outcomes, mine, strict=True):
            started = time.perf_counter()
            if smaller:
                measures = {"batch": smaller, **outcome.measures}
                outcome = replace(outcome, recipe=recipe, measures=measures)
            members = members_of(outcome, round_, cache) if outcome.status == "accepted" else {}
            light = replace(outcome, pixels=None, mask=None, feature=None)
            made[outcome.recipe.sample_id] = Made(light, members, time.perf_counter() - started)
    return [made[recipe.sample_id] for recipe in recipes]


def with_batch(recipe: Recipe, batch: int) -> Recipe:
    """The recipe with the smaller batch that its row tells of where memory ran out."""
    return replace(recipe, params=canonical_json({**recipe.settings(), "batch": batch}))


@cache
def load_model(generator: str, params: str) -> Any:
    """The generator's model, loaded once a process; None if it needs none."""
    found = registry.get(generator)
    if found.load is None:
        return None
    import torch

    torch.set_num_threads(1)  # part of what makes a model's bytes equal
    return found.load(json.loads(params), device_of(found))


class PictureCache:
    """Decoded pictures and resolved locations of one round, least recently used first out.

    A worker that was started with several threads shares it among them.
    """

    def __init__(self, round_: Round):
        self._round = round_
        self._entries: OrderedDict[tuple[str, str], Any] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def source(self, recipe: Recipe) -> Source:
        """What the generator sees of a recipe's picture and donors.

        Raises:
            PictureError: a picture is missing, damaged or has changed since it was read.
        """
        pixels = self.pixels(recipe.image_id)
        donors = tuple(pictures.with_channels(self.pixels(donor), pixels.shape[2]) for donor in recipe.donors)
        allowed = self.allowed(recipe.image_id, recipe.location)
        return Source(pixels, allowed, donors, partial(self.part, recipe.image_id))

    def _image(self, image_id: str) -> Image:
        return self._round.images.get(image_id) or self._round.textures[image_id]

    def pixels(self, image_id: str) -> np.ndarray:
        output = self._round.config.output
        return self._get(
            ("pixels", image_id),
            lambda: pictures.load(self._image(image_id), bits=output.bits, max_side=output.max_side),
        )

    def allowed(self, image_id: str, location: str) -> np.ndarray:
        return self._get((location, image_id), lambda: self._resolve(image_id, location))

    def part(self, image_id: str) -> np.ndarray:
        return self._get(("part", image_id), lambda: foreground(self.pixels(image_id)))

    def encoded_normal(self, image_id: str) -> bytes:
        return self._get(
            ("encoded", image_id),
            lambda: pictures.encode(self.pixels(image_id), self._round.config.output.format),
        )

    def _resolve(self, image_id: str, location: str) -> np.ndarray:
        image, pixels = self._round.images[image_id], self.pixels(image_id)
        shape = pixels.shape[:2]
        roi = pictures.load_location(image.roi_path, shape) if image.roi_path else None
        ignore = pictures.load_location(image.ignore_path, shape) if image.ignore_path else None
        return resolve_location(location, pixels, roi, ignore)

    def _get(self, key: tuple[str, str], make: Callable[[], Any]) -> Any:
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        value = make()
        with self._lock:
            if key not in self._entries:
                self._entries[key] = value
                self._bytes += _size(value)
            while self._bytes > CACHE_BYTES and len(self._entries) > 1:
                self._bytes -= _size(self._entries.popitem(last=False)[1])
        return value


def _size(value: Any) -> int:
    return int(getattr(value, "nbytes", 0)) or len(value)


def members_of(outcome: Outcome, round_: Round, cache: PictureCache) -> dict[str, bytes]:
    """The members of an accepted sample, in the order in which they lie in the tar."""
    recipe, output = outcome.recipe, round_.config.output
    image = round_.images[recipe.image_id]
    members: dict[str, bytes] = {}
    provenance: dict[str, Any] = {
        "image_sha256": image.sha256,
        "licence": image.licence,
        "mode": image.mode,
        "bits": output.bits,
        "lossy": output.format == "jpg",
        "attempt": outcome.attempts - 1,
        "generator": registry.get(recipe.generator).identify(recipe.settings()),
        **({"critic": round_.critic.sha256} if round_.critic else {}),
    }
    if outcome.feature is not None:
        sink = io.BytesIO()
        np.save(sink, outcome.feature.feature, allow_pickle=False)
        members["feature.npy"] = sink.getvalue()
        provenance |= {"layers": list(outcome.feature.layers), "backbone": outcome.feature.backbone}
    elif outcome.pixels is not None:
        members[f"image.{output.format}"] = pictures.encode(outcome.pixels, output.format)
    if outcome.mask is not None:
        members["mask.png"] = pictures.encode_mask(outcome.mask)
    if output.normals:
        members[f"normal.{output.format}"] = cache.encoded_normal(recipe.image_id)
    scores = {
        "leak": outcome.leak,
        "hollow": outcome.hollow,
        "contrast": outcome.contrast,
        "area": outcome.mask_area,
        **outcome.measures,
    }
    members["json"] = shards.sample_json(as_row(recipe), scores, provenance)
    return members


def _row(outcome: Outcome, offset: int, checksum: str) -> dict[str, Any]:
    recipe = as_row(outcome.recipe)
    return {
        **recipe,
        "wanted_area": recipe["area"],
        "area": outcome.mask_area,
        "status": outcome.status,
        "reason": outcome.reason,
        "leak": outcome.leak,
        "hollow": outcome.hollow,
        "contrast": outcome.contrast,
        "measures": canonical_json(dict(outcome.measures)) if outcome.measures else "",
        "attempts": outcome.attempts,
        "offset": offset,
        "checksum": checksum,
        "seconds": outcome.seconds,
        "device": device_of(registry.get(outcome.recipe.generator)),
        "versions": _versions(),
    }


@cache
def _versions() -> str:
    return canonical_json({name: _version(name) for name in PACKAGES})


@cache
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@cache
def device() -> str:
    """What models run on; decided once a process."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@cache
def _gpu_name() -> str:
    import torch

    return str(torch.cuda.get_device_name())


def device_of(generator: Generator) -> str:
    """What a generator runs on: never a GPU that it did not ask for, so that any worker makes its shards."""
    return device() if generator.load is not None and generator.gpu else "cpu"


def prepare_process(threads: int = 1) -> None:
    """Fixes the thread counts of a worker process: they are part of what makes bytes equal."""
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    cv2.setNumThreads(threads)


def generators_of(generation: Generation) -> list[Generator]:
    return [registry.get(name) for name, s in generation.generators.items() if s.share > 0]


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of some items, spread evenly over them."""
    step = max(1, -(-len(items) // most))
    return list(items[::step])
