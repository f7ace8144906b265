"""What a detector is: a module that answers the same few calls, so that one loop drives any of them.

A detector works on the output of its own frozen part (``extract``), which is computed once a picture and
cached; only the rest is trained. Detectors hold no files and no loops: fitting, saving and loading are the
training package's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pydantic import BaseModel, ConfigDict, Field

from manifests.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

ENTRY_POINTS = "flawsmith.detectors"
BUILT_IN = {
    "dfd": "detectors.dfd:METHOD",
    "memory_bank": "detectors.memory_bank:MEMORY_BANK",
    "onenip": "detectors.onenip:ONENIP",
    "residual": "detectors.residual:RESIDUAL",
    "vlad": "detectors.vlad:VLAD",
}

Batch = Mapping[str, Any]


class Settings(BaseModel):
    """What the loop itself reads; a detector adds its own. Unknown names are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(224, ge=32, description="pictures are resized to this many pixels a side")
    steps: int = Field(300, ge=0, description="optimiser steps; 0: `prepare` alone fits it, without samples")
    batch: int = Field(8, ge=1, description="samples a step, over all processes and micro-batches")
    accumulate: int = Field(
        1, ge=1, description="micro-batches a step: less memory; batch norms see one micro-batch at a time"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    weight_decay: float = Field(1e-4, ge=0, description="of AdamW")
    clip: float = Field(0.1, gt=0, description="largest gradient norm")
    patience: int | None = Field(
        None,
        ge=1,
        description="stop when so many evaluations (about 20 in all steps) found no smaller loss on held-out "
        "synthetic samples, and keep the best weights; null: never",
    )

    @property
    def leak(self) -> str | None:
        """Why scores know more than a single picture says, with these settings, and which one to change;
        None: they do not. Figures of such are marked, and what scores pictures as they come refuses them."""
        return None


class Detector(Protocol):
    """The calls of every detector, which is an ``nn.Module``.

    Attributes:
        settings: as built.
        categories: of the training pictures, sorted.
        fingerprint: of the frozen part; a checkpoint is refused on another one.
        calibration: numbers fixed on normal pictures, among them ``threshold``, which a run replaces by that
            of its own quantile; empty before :meth:`calibrate`. Saved as plain text beside the weights.
    """

    @property
    def settings(self) -> Settings: ...

    @property
    def categories(self) -> tuple[str, ...]: ...

    @property
    def fingerprint(self) -> str: ...

    calibration: dict[str, float]

    def extract(self, images: Tensor) -> Tensor:
        """The frozen part: N×3×size×size, uint8 or float in [0, 1], to float32 features of any shape, the
        first axis kept; differentiable in pictures that are floats. The loop keeps them as float16."""

    def prepare(self, normals: Tensor, categories: Sequence[str]) -> None:
        """Closed-form part of the fit, before the first step: features of the train split's normals and the
        category of each."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, as torch's optimisers take it: ``params`` and, where they differ from the
        settings, ``lr`` (the peak) and ``weight_decay``. The loss must reach every parameter."""

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """``loss`` is minimised, the others are reported. Each is a mean over the batch; only one over its
        pictures is the same for any number of micro-batches. Random numbers come from torch's global
        generator.

        Args:
            batch: ``normal``, ``synthetic``, ``prompt``: features (but see :class:`Encoder`), each of B
                pictures: a normal, the anomaly made from it, another normal of the same category; ``mask``:
                float32 B×size×size in {0, 1}; ``category``: list of B names.
        """

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Equals :meth:`loss`: distributed training hooks into it."""

    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Scores (float32, B) and maps (float32, B×size×size), higher = more anomalous.

        Args:
            batch: ``features`` of B pictures; ``category``: list of B names, where the settings need it;
                ``ignore``, not always there: bool B×size×size, places that may raise no score (see
                :func:`counted`).
        """

    def maps(self, batch: Batch) -> Tensor:
        """The maps of :meth:`score` alone, differentiable in the features: what samples are practised on."""

    def calibrate(self, normals: Sequence[Batch]) -> None:
        """Set ``calibration`` from normal pictures alone: batches as :meth:`score` takes them."""

    # of nn.Module
    def parameters(self) -> Iterator[nn.Parameter]: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any: ...
    def train(self) -> Any: ...
    def eval(self) -> Any: ...


@runtime_checkable
class Encoder(Protocol):
    """A detector whose loss sees, in place of features, what can be worked out from them for good once it is
    prepared: that is done once a picture too, not at every step."""

    def encode(self, features: Tensor, categories: Sequence[str]) -> Tensor:
        """N pictures' features and the category of each to what ``normal`` and ``synthetic`` of
        :meth:`Detector.loss` then hold (``prompt`` holds nothing): of any shape, the first axis kept. The
        loop keeps it as float16."""


@dataclass(frozen=True)
class Method:
    """One entry of the registry.

    Attributes:
        name: as in configurations and tables.
        summary: one line.
        settings: its settings with their defaults.
        presets: named settings, e.g. ``paper``.
        build: ``build(settings, categories, device) -> Detector``; untrained.
        open_categories: whether it scores pictures of categories that it was not trained on.
        features: ``features(settings)``: of which backbone's features, as it gives them, it learns:
            ``backbone`` and ``layers`` as :func:`generation.backbones.load_backbone` takes them, and
            ``size``. Samples of such features can train it; None: it makes more of them first, and none can.
    """

    name: str
    summary: str
    settings: type[Settings]
    presets: Mapping[str, Mapping[str, Any]]
    build: Callable[[Any, Sequence[str], Any], Detector]
    open_categories: bool = False
    features: Callable[[Any], dict[str, Any]] | None = None


def counted(maps: Tensor, batch: Batch) -> Tensor:
    """Maps B×size×size from which a picture's score is read: ignored places are as low as the lowest other
    place of their picture."""
    if "ignore" not in batch:
        return maps
    ignore = batch["ignore"].to(maps.device)
    lowest = maps.masked_fill(ignore, float("inf")).amin(dim=(1, 2), keepdim=True)
    return maps.where(~ignore, lowest.where(lowest.isfinite(), maps.amin(dim=(1, 2), keepdim=True)))


def refuse_leak(name: str, settings: Settings) -> None:
    """Before single pictures are scored.

    Raises:
        UsageError: scores depend on what else is scored.
    """
    if settings.leak is not None:
        raise UsageError(
            f"{name}: {settings.leak}: a picture by itself has no score then; set that under "
            "detector.settings and train again"
        )


def names() -> list[str]:
    """Every detector that can be built: the package's own and those of installed third parties."""
    return sorted({*BUILT_IN, *(point.name for point in entry_points(group=ENTRY_POINTS))})


def get(name: str) -> Method:
    """The method called ``name``; its file is imported only now.

    Raises:
        UsageError: there is no such detector.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return getattr(import_module(module), attribute)
    for point in entry_points(group=ENTRY_POINTS, name=name):
        return point.load()
    raise UsageError(f"detector {name!r} is not known; choose one of {', '.join(names())}")
