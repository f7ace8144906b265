"""CUT: training-free anomalies by Stable Diffusion, as a generator (core.md section 1).

A crop around each spot is brought to the model's size, its twin chains are run, and their difference is added
to the untouched pixels: small defects keep their detail, and outside the mask nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from generation.compose import local_variation
from generation.cut.prompts import Texts, prompts_of, texts_of
from generation.cut.settings import CutParams
from generation.masks import blobs, lens
from generation.protocol import Box, Edit, Generator, Source, out_of_memory
from manifests.pictures import eight_bit
from manifests.schema import Recipe

if TYPE_CHECKING:  # torch is imported by load alone, so that planning does not wait for it
    from generation.critic import Critic
    from generation.cut.attention import MapReader
    from generation.cut.chain import Twins
    from generation.cut.clip import Clip
    from generation.cut.guidance import Guide, Scene
    from generation.cut.models import StableDiffusion
    from generation.cut.residual import Anomaly

ROOM = 2.2  # area of the place that is given to an anomaly, over the area of the mask that is wanted
RATIOS, BEND = (4.0, 7.0), 0.15  # length over thickness of a line's place, and its bend
STRIPS = 6  # tries at such a place
SMALLEST_CROP = 48  # pixels; below it a crop shows too little to be a material
FAINT = 1.6  # contrast at severity 0, in local variations; the gate stands at 1


@dataclass(frozen=True)
class Model:
    """Attributes: ``judge`` measures the CLIP gain; it may be ``clip`` itself, or None; ``guide`` of a round
    that practises."""

    sd: StableDiffusion
    reader: MapReader
    clip: Clip | None
    judge: Clip | None
    guide: Guide | None = None


@dataclass(frozen=True)
class Spot:
    """One anomaly: its crop, the allowed places in it (bool, h×w), its size in pixels, its noise's seed."""

    crop: Box
    allowed: np.ndarray
    wanted: float
    seed: int


@dataclass(frozen=True)
class CutDraw:
    spots: tuple[Spot, ...]
    texts: Texts
    word: str
    severity: float
    settings: CutParams
    category: str = ""


def load(params: Mapping[str, Any], device: str) -> Model:
    """The checkpoint, its map reader and the CLIP models, ready on ``device``.

    Raises:
        ModelError: a model cannot be loaded; the message says how to mend it.
    """
    from generation.cut.attention import MapReader
    from generation.cut.clip import load_clip
    from generation.cut.models import load_sd

    settings = CutParams(**params)
    sd = load_sd(settings.model, device, settings.dtype)
    guide, referee = settings.guide, settings.referee
    clip = load_clip(guide, device) if guide else None
    judge = clip if referee == guide else load_clip(referee, device) if referee else None
    return Model(sd, MapReader(sd), clip, judge)


def identify(params: Mapping[str, Any]) -> dict[str, str]:
    """Id, revision, weights and licence of every model a sample depends on, for provenance."""
    from generation.cut.checkpoints import identify as identify_sd
    from generation.cut.clip import identify_clip

    settings = CutParams(**params)
    found = identify_sd(settings.model)
    for role, name in (("clip", settings.guide), ("judge", settings.referee)):
        if name:
            found |= {f"{role}_{key}": value for key, value in identify_clip(name).items()}
    return found


def fit(params: Mapping[str, Any], available: int, device: str) -> tuple[dict[str, Any], int]:
    """The params with the largest batch that fits, and the bytes that its process will need.

    Raises:
        ModelError: a model does not exist or is of another kind.
    """
    from generation.cut.memory import fitting_batch, predict

    settings = CutParams(**params)
    batch = fitting_batch(available, settings, device)
    fitting = dict(params) if batch == settings.batch else {**params, "batch": batch}
    return fitting, predict(settings, device, batch).total


def draw(recipe: Recipe, source: Source, rng: np.random.Generator) -> CutDraw:
    """The places and noises of a recipe's spots, and its texts.

    Raises:
        UsageError: the prompt holds no anomaly word.
        Undrawable: no room for a spot.
    """
    settings = CutParams.of(recipe)
    texts, word = texts_of(recipe)
    wanted = recipe.area * source.allowed.size / recipe.count
    narrow = recipe.defect in settings.lines
    spots = [_spot(rng, source.allowed, wanted, settings, narrow) for _ in range(recipe.count)]
    return CutDraw(tuple(spots), texts, word, recipe.severity, settings, recipe.category)


def _spot(
    rng: np.random.Generator, allowed: np.ndarray, wanted: float, settings: CutParams, narrow: bool
) -> Spot:
    if settings.free:
        box, region = (0, allowed.shape[0], 0, allowed.shape[1]), allowed
    else:
        box, region = _place(rng, allowed, min(ROOM * wanted, 0.9 * int(allowed.sum())), narrow)
    crop = crop_around(box, allowed.shape, settings.zoom)
    inside = np.zeros((crop[1] - crop[0], crop[3] - crop[2]), np.bool_)
    inside[box[0] - crop[0] : box[1] - crop[0], box[2] - crop[2] : box[3] - crop[2]] = region
    return Spot(crop, inside, wanted, int(rng.integers(2**63)))


def _place(
    rng: np.random.Generator, allowed: np.ndarray, room: float, narrow: bool
) -> tuple[Box, np.ndarray]:
    """Where an anomaly may be: a bent strip, where one fits, or a blob; at least half of ``room`` pixels."""
    for _ in range(STRIPS if narrow else 0):
        box, weight = lens(rng, allowed, room, RATIOS, BEND)
        region = (weight > 0) & allowed[box[0] : box[1], box[2] : box[3]]
        labels = cv2.connectedComponents(region.astype(np.uint8), connectivity=8)[1]
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        if sizes.max() >= room / 2:
            return box, labels == sizes.argmax()
    return blobs(rng, allowed, max(room, 1.0) / allowed.size, 1)


def crop_around(box: Box, shape: tuple[int, ...], zoom: float) -> Box:
    """A square around a box, which takes ``zoom`` of its side, moved into the picture and cut to it."""
    side = max(round(max(box[1] - box[0], box[3] - box[2]) / zoom), SMALLEST_CROP)
    corners: list[int] = []
    for low, high, full in ((box[0], box[1], shape[0]), (box[2], box[3], shape[1])):
        length = min(side, full)
        start = min(max((low + high - length) // 2, 0), full - length)
        corners += [start, start + length]
    return corners[0], corners[1], corners[2], corners[3]


def apply(sources: Sequence[Source], draws: Sequence[CutDraw], model: Model) -> list[Edit]:
    """Every spot's chain, in batches of ``settings.batch`` chains, and the edits they give.

    Where memory runs out, the whole batch is made again with half as many chains at a time; the smaller
    number is in the edit's measures, and replay uses it.
    """
    import torch

    batch = draws[0].settings.batch
    while True:
        try:
            return _apply(sources, draws, model, batch)
        except (RuntimeError, MemoryError) as error:
            if batch == 1 or not out_of_memory(error):
                raise
            batch //= 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _apply(sources: Sequence[Source], draws: Sequence[CutDraw], model: Model, batch: int) -> list[Edit]:
    return edits(sources, draws, chains(sources, draws, model, batch), model, batch)


def chains(
    sources: Sequence[Source], draws: Sequence[CutDraw], model: Model, batch: int
) -> list[list[Twins]]:
    """The twins of every spot, one list a draw; ``batch`` chains at a time, by the first draw's settings."""
    from generation.cut.chain import Request, sample

    tasks = [(i, spot) for i, one in enumerate(draws) for spot in one.spots]
    requests = [
        Request(
            *_fitted(sources[i].crop(spot.crop), spot.allowed, model.sd, draws[i].settings),
            draws[i].texts.normal,
            draws[i].texts.prompt,
            draws[i].texts.detail,
            draws[i].word,
            spot.seed,
            None if model.guide is None else _scene(sources[i], spot, draws[i].category, model.guide.critic),
        )
        for i, spot in tasks
    ]
    twins: dict[int, Twins] = {}
    order = sorted(range(len(tasks)), key=lambda k: requests[k].image.shape)
    for _, same in groupby(order, key=lambda k: requests[k].image.shape):
        alike = list(same)
        for at in range(0, len(alike), batch):
            chosen = alike[at : at + batch]
            found = sample(
                [requests[k] for k in chosen],
                model.sd,
                model.reader,
                model.clip,
                draws[0].settings,
                model.guide,
            )
            twins |= dict(zip(chosen, found, strict=True))
    return [[twins[k] for k, (owner, _) in enumerate(tasks) if owner == i] for i in range(len(draws))]


def guide(model: Model, critic: Critic, strength: float) -> Model:
    """The model, to draw what a critic does not find yet."""
    from generation.cut.guidance import Guide

    return replace(model, guide=Guide(critic, strength))


def _scene(source: Source, spot: Spot, category: str, critic: Critic) -> Scene:
    """The source as a critic sees it, and where in it the spot's crop lies: a pixel at least."""
    from generation.backbones import in_unit, to_batch
    from generation.cut.guidance import Scene

    picture = in_unit(to_batch([eight_bit(source.pixels)], critic.size)[0])
    height, width = source.pixels.shape[:2]
    y0, y1, x0, x1 = spot.crop
    top, left = (min(low * critic.size // side, critic.size - 1) for low, side in ((y0, height), (x0, width)))
    bottom = max(top + 1, round(y1 * critic.size / height))
    right = max(left + 1, round(x1 * critic.size / width))
    return Scene(picture, (top, bottom, left, right), category)


def edits(
    sources: Sequence[Source],
    draws: Sequence[CutDraw],
    twins: Sequence[Sequence[Twins]],
    model: Model,
    batch: int,
) -> list[Edit]:
    """The edits that the twins of :func:`chains` give."""
    from generation.cut.residual import compose_twins

    made = []
    for source, one, mine in zip(sources, draws, twins, strict=True):
        anomalies = []
        for spot, found in zip(one.spots, mine, strict=True):
            faint, crop = _faint(source, spot), source.crop(spot.crop)
            anomalies.append(
                compose_twins(crop, found, spot.allowed, spot.wanted, faint, one.severity, one.settings)
            )
        made.append(_merged(source, one, anomalies, [found.trace for found in mine], model, batch))
    return made


def _faint(source: Source, spot: Spot) -> float:
    """The mean change that is just visible, in [0, 1]."""
    return FAINT * local_variation(source.pixels, spot.crop, spot.allowed) / 255


def _fitted(
    crop: np.ndarray, allowed: np.ndarray, sd: StableDiffusion, settings: CutParams
) -> tuple[np.ndarray, np.ndarray]:
    """A crop and its allowed places at the model's size: about ``size``² pixels, its aspect kept as nearly as
    multiples of the stride allow, three channels."""
    size = settings.size or sd.size
    height, width = crop.shape[:2]
    ratio = math.sqrt(height / width)
    tall, wide = (max(1, round(size * factor / sd.stride)) * sd.stride for factor in (ratio, 1 / ratio))
    way = cv2.INTER_AREA if height >= tall and width >= wide else cv2.INTER_CUBIC
    picture = cv2.resize(np.ascontiguousarray(crop), (wide, tall), interpolation=way).reshape(tall, wide, -1)
    picture = picture if picture.shape[2] == 3 else np.repeat(picture, 3, axis=2)
    place = cv2.resize(allowed.astype(np.float32), (wide, tall), interpolation=cv2.INTER_AREA) > 0
    return np.clip(picture, 0, 1), place


def _merged(
    source: Source,
    one: CutDraw,
    anomalies: Sequence[Anomaly],
    traces: Sequence[Mapping[str, float]],
    model: Model,
    batch: int,
) -> Edit:
    """The spots of one sample in one box; where two overlap, the stronger change stays."""
    corners = np.array([spot.crop for spot in one.spots])
    y0, x0 = corners[:, [0, 2]].min(axis=0).tolist()
    y1, x1 = corners[:, [1, 3]].max(axis=0).tolist()
    before = source.crop((y0, y1, x0, x1))
    change = np.zeros_like(before)
    region = np.zeros(before.shape[:2], np.bool_)
    for spot, found in zip(one.spots, anomalies, strict=True):
        part = np.s_[spot.crop[0] - y0 : spot.crop[1] - y0, spot.crop[2] - x0 : spot.crop[3] - x0]
        new = found.patch - before[part]
        # Written so that NaN, which no comparison holds for, stays and fails the sample.
        stronger = ~(np.abs(new).max(axis=2) <= np.abs(change[part]).max(axis=2))
        change[part] = np.where(stronger[..., None], new, change[part])
        region[part] |= found.region
    patch = np.clip(before + change, 0, 1)
    measures = {
        name: float(np.min([found.measures[name] for found in anomalies])) for name in anomalies[0].measures
    }
    measures["attention"] = float(np.mean([trace["attention"] for trace in traces]))
    if model.guide is not None:
        measures["margin"] = float(np.mean([trace["margin"] for trace in traces]))
    if model.judge is not None:
        measures["clip_gain"] = _gain(source, one, patch, (y0, x0), model.judge)
    if batch < one.settings.batch:
        measures["batch"] = batch
    kept = {name: value for name, value in measures.items() if math.isfinite(value)}
    return Edit((y0, y1, x0, x1), patch, region, kept)


def _gain(source: Source, one: CutDraw, patch: np.ndarray, corner: tuple[int, int], judge: Clip) -> float:
    """Cosine to the detailed description after the edit minus before it, mean over the spots' crops."""
    import torch

    pictures = []
    for spot in one.spots:
        y0, y1, x0, x1 = spot.crop
        after = patch[y0 - corner[0] : y1 - corner[0], x0 - corner[1] : x1 - corner[1]]
        pictures += [source.crop(spot.crop), after]
    detail = judge.text([one.texts.detail])
    with torch.no_grad():
        found = [
            float(judge.similarity(torch.from_numpy(_rgb(picture)).permute(2, 0, 1)[None], detail)[0])
            for picture in pictures
        ]
    return float(np.mean(found[1::2]) - np.mean(found[0::2]))


def _rgb(picture: np.ndarray) -> np.ndarray:
    return picture if picture.shape[2] == 3 else np.repeat(picture, 3, axis=2)


GENERATOR = Generator(
    name="cut",
    family="cut",
    summary="what a prompt says, drawn by Stable Diffusion: cracks, dents, stains, missing pieces…",
    draw=draw,
    apply=apply,
    params=CutParams,
    defect="defect",
    load=load,
    identify=identify,
    batch_size=lambda params: params.batch,
    gpu=True,
    seconds=5.0,
    prompts=prompts_of,
    fit=fit,
    guide=guide,
)
