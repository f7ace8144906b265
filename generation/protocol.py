"""What a generator is: a ``draw`` that holds all randomness and a pure ``apply``.

The split makes replay, tests, provenance and batching simple: the same source and the same draw give the
same edit, whatever else is in the batch. A generator that runs a model declares ``load`` (called once a
worker) and a ``batch_size``; everything else about it is the same.

Conventions: a picture is ``H×W×C`` with C = 1 (grey) or 3 (RGB). Stored pixels are uint8 or uint16;
arithmetic is float32 in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal, NamedTuple, Self, cast

import numpy as np
from pydantic import BaseModel, ConfigDict

from generation.critic import Critic
from manifests.recipes import GeneratorSettings
from manifests.schema import Recipe
from manifests.wording import Prompts


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out. Beside torch's own class, its allocator for the CPU raises a bare
    ``RuntimeError``, which its text alone tells apart."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"  # torch's; not imported for generators without a model
        or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))
    )


Box = tuple[int, int, int, int]  # y0, y1, x0, x1, half open


# Marks a setting as a path: `bank: str | None = Field(None, json_schema_extra=PATH)`. A relative one in a
# configuration is relative to the configuration's folder.
PATH: dict[str, Any] = {"format": "path"}


class Params(BaseModel):
    """Base of a generator's own settings. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """A recipe's settings. Recipes of one generator mostly have the same, which are checked once."""
        return cast(Self, _checked(cls, recipe.params))


@lru_cache(maxsize=256)
def _checked(kind: type[Params], text: str) -> Params:
    return kind.model_validate_json(text)


@dataclass(frozen=True)
class Source:
    """What a generator may look at: one normal picture and where it may change it.

    Attributes:
        pixels: uint8 or uint16, H×W×C.
        allowed: bool, H×W; the location of the recipe (everywhere, the foreground, a region of interest)
            without the ignored places. Never empty.
        donors: pictures named by the recipe, in its order; same dtype and channel count, any size.
        find_part: what :func:`generation.masks.foreground` gives for the picture, for the asking: it takes
            longer than a sample does, and a run keeps it. None: it is worked out.
    """

    pixels: np.ndarray
    allowed: np.ndarray
    donors: tuple[np.ndarray, ...] = ()
    find_part: Callable[[], np.ndarray] | None = None

    @property
    def levels(self) -> int:
        """The largest value of a stored pixel: 255 or 65535."""
        return 255 if self.pixels.dtype == np.uint8 else 65535

    @cached_property
    def image(self) -> np.ndarray:
        """float32 in [0, 1], H×W×C."""
        return self.pixels.astype(np.float32) / np.float32(self.levels)

    def crop(self, box: Box) -> np.ndarray:
        """float32 in [0, 1] of one box, without converting the rest."""
        y0, y1, x0, x1 = box
        return self.pixels[y0:y1, x0:x1].astype(np.float32) / np.float32(self.levels)

    def at(self, outer: np.ndarray) -> np.ndarray:
        """float32 in [0, 1], N×C, of some pixels, by their flat indices."""
        return stored(self.pixels, outer).astype(np.float32) / np.float32(self.levels)


class Places(NamedTuple):
    """A region and its N pixels, in raster order. A thin defect fills a small part of its box, so that what
    is worked out for its pixels alone costs what the defect is large.

    Attributes:
        box: where ``region`` lies in the picture.
        region: bool, h×w.
        inner, outer: flat indices of its pixels in the box and in the picture, ascending.
    """

    box: Box
    region: np.ndarray
    inner: np.ndarray
    outer: np.ndarray


def places_of(box: Box, region: np.ndarray, width: int) -> Places:
    """The pixels of a region of a picture of that width."""
    inner = np.flatnonzero(region)
    rows = inner // region.shape[1]
    return Places(box, region, inner, inner + rows * (width - region.shape[1]) + (box[0] * width + box[2]))


def places_at(outer: np.ndarray, width: int) -> Places:
    """The pixels at ascending flat indices of a picture of that width, at least one, in their tight box."""
    rows = outer // width
    columns = outer - rows * width
    y0, y1, x0, x1 = int(rows[0]), int(rows[-1]) + 1, int(columns.min()), int(columns.max()) + 1
    region = np.zeros((y1 - y0, x1 - x0), np.bool_)
    inner = outer - rows * (width - region.shape[1]) - (y0 * region.shape[1] + x0)
    region.reshape(-1)[inner] = True
    return Places((y0, y1, x0, x1), region, inner, outer)


def stored(pixels: np.ndarray, outer: np.ndarray) -> np.ndarray:
    """Some pixels of a picture H×W×C, by their flat indices: N×C."""
    return pixels.reshape(-1, pixels.shape[2]).take(outer, axis=0)


class Measured(NamedTuple):
    """What an edit does to the N pixels of its region.

    Attributes:
        places: of the region.
        after: the stored pixels' type, N×C; the new content in whole levels.
        change: largest difference over the channels in raw steps, N.
        visible, inside: bool, N; whether it changed by more than 2 levels; the mask.
        level: mean change inside the mask, in 8-bit levels.
        elsewhere: changed pixels of the box outside the region.
        variation: of the source around the region; see :func:`generation.compose.local_variation`.
    """

    places: Places
    after: np.ndarray
    change: np.ndarray
    visible: np.ndarray
    inside: np.ndarray
    level: float
    elsewhere: int
    variation: float


@dataclass(frozen=True)
class Edit:
    """A changed box of the picture.

    Attributes:
        box: where ``patch`` belongs.
        patch: float32 in [0, 1]; the new content, already blended with the source: h×w×C, or, of a generator
            that changes nothing else, the region's pixels alone, N×C, as ``content[region]`` has them.
        region: bool, h×w; the only places that may end up in the mask.
        measures: the generator's own figures, by name; finite. They are stored with the sample, and the gates
            know some of them.
        measured: what :func:`generation.compose.measure` gives for this very edit, where it was asked already
            (a severity is solved for by asking); None: it is asked then.
    """

    box: Box
    patch: np.ndarray
    region: np.ndarray
    measures: Mapping[str, float] = field(default_factory=dict)
    measured: Measured | None = None


@dataclass(frozen=True)
class FeatureEdit:
    """Perturbed backbone features instead of pixels.

    Attributes:
        feature: float16, C×h×w.
        mask: bool, h×w.
        clean: float16, C×h×w; the unperturbed features, for the gates.
        layers: names of the backbone's layers that were concatenated.
        backbone: fingerprint of the backbone; a reader refuses features of another one.
        measures: as of :class:`Edit`.
    """

    feature: np.ndarray
    mask: np.ndarray
    clean: np.ndarray
    layers: tuple[str, ...]
    backbone: str
    measures: Mapping[str, float] = field(default_factory=dict)


class Undrawable(ValueError):
    """This draw cannot give an anomaly (e.g. an empty mask after the location): the attempt is rejected
    with ``reason`` and drawn again."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


DrawFunction = Callable[[Recipe, Source, np.random.Generator], Any]
ApplyFunction = Callable[[Sequence[Source], Sequence[Any], Any], list[Edit] | list[FeatureEdit]]
LoadFunction = Callable[[Mapping[str, Any], str], Any]
FitFunction = Callable[[Mapping[str, Any], int, str], tuple[dict[str, Any], int]]
GuideFunction = Callable[[Any, Critic, float], Any]
PromptsFunction = Callable[[Any, GeneratorSettings], Prompts]
Donors = Literal["none", "texture", "normal", "foreign"]


@dataclass(frozen=True)
class Generator:
    """One way to make anomalies.

    Attributes:
        name, family: as in recipes and tables. summary: one line, what it imitates. draw: ``draw(recipe,
        source, rng) -> draw``; all randomness; may raise :class:`Undrawable`. apply: ``apply(sources, draws,
        model) -> edits``; pure; one edit a source. params: the generator's own settings with their defaults.
        donors: what the recipe must name for it: nothing, a texture, another normal picture, or one of
        another
            category (foreign); a function of its params if they decide.
        defect: the word for what it draws when the configuration names none.
        load: ``load(params, device) -> model``; called once a worker; None if no model is needed.
        identify: ``identify(params) -> dict``; id, revision and licence of the model for provenance.
        batch_size: samples given to ``apply`` at once, planned with the recipes; a function of its params if
            they decide.
        gpu: whether it wants an accelerator (a resource annotation of its tasks).
        seconds: what a sample of 256 px takes one core, roughly: the search weighs it, and tries out nothing
            that takes long.
        prompts: ``prompts(params, settings) -> Prompts``; the texts its recipes are worded with, once the
            configuration's ``defect``, ``prompt`` and ``detail`` (``settings``) are taken into account; may
            read a file that ``params`` names. None: the configuration's texts are taken as they are.
        fit: ``fit(params, available, device) -> (params, need)``; the params with a batch that fits into
            ``available`` bytes of one process, and the bytes it will need, found without running anything.
            None: batches are taken as they are.
        guide: ``guide(model, critic, strength) -> model``; the model, to draw what a detector does not find
            (see :mod:`generation.critic`). None: its recipes' draws are searched for it instead.
    """

    name: str
    family: Literal["classic", "frequency", "feature", "cut"]
    summary: str
    draw: DrawFunction
    apply: ApplyFunction
    params: type[Params] = Params
    donors: Donors | Callable[[Any], Donors] = "none"
    defect: str = "defect"
    load: LoadFunction | None = None
    identify: Callable[[Mapping[str, Any]], dict[str, str]] = field(default=lambda _params: {})
    batch_size: int | Callable[[Any], int] = 1
    gpu: bool = False
    seconds: float = 0.01
    prompts: PromptsFunction | None = None
    fit: FitFunction | None = None
    guide: GuideFunction | None = None
