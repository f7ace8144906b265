"""Residual: patches less their nearest normal ones, and a small head that learns which differences matter.

Two known parts put together [inferred]. A memory bank says, for every patch, the most similar normal one
(PatchCore; Roth et al., CVPR 2022); what is left of a patch when that is taken away hardly depends on the
category, so one head serves all of them (residual features: ResAD; Yao et al., NeurIPS 2024). The head is a
few convolutions that learn from synthetic anomalies with their masks, as SuperSimpleNet's does (Rolih et
al., ICPR 2024). The frozen part and the bank do not change in training: it learns in seconds, and what it
learns it has from the samples.

* the residual of a channel is √(|p − m| / s), with s its mean over normals: tempered against outliers, in
  units of what normal patches differ by; the distance ‖p − m‖, in units of its median over normals, is one
  more channel [inferred];
* a patch that is in the bank itself is compared with its next like in training, or normals would be told by
  a residual of 0 [inferred];
* targets are the share of a patch that the mask covers, in cross-entropy and dice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from detectors.coreset import k_centre, random_projection
from detectors.onenip import dice_loss
from detectors.patches import (
    CHUNK,
    STRIDES,
    bank_rows,
    neighbourhood_means,
    normals_of,
    on_one_grid,
    pack,
    statistics_of,
    tap_shapes,
    to_maps,
    unpack,
)
from detectors.protocol import Batch, Method, Settings, counted
from generation.backbones import DEFAULT, Backbone, load_backbone
from manifests.errors import UsageError

CANDIDATES = 8000  # patches of a category, drawn at random, from which its bank is chosen
ITSELF = 0.3  # of the median distance of normals; what is nearer in training is the patch itself
QUANTILE = 0.99  # of the scores of normals: the threshold


class ResidualSettings(Settings):
    """The defaults learn in well under a minute on a CPU core."""

    size: int = Field(256, ge=32, description="pictures are resized to this many pixels a side")
    steps: int = Field(150, ge=1, description="optimiser steps")
    lr: float = Field(2e-3, gt=0, description="peak learning rate")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    backbone: str = Field(DEFAULT, description="a timm model or a folder")
    layers: tuple[str, ...] | None = Field(None, description="modules to tap; default: strides 8 and 16")
    coreset: int = Field(500, ge=1, description="normal patches kept for each category")
    width: int = Field(64, ge=1, description="channels of the head")
    dice_weight: float = Field(1.0, ge=0)
    bce_weight: float = Field(1.0, ge=0)


class Head(nn.Sequential):
    """Residuals N×C×h×w to logits N×1×h×w; sees a patch and its eight neighbours."""

    def __init__(self, channels: int, width: int):
        super().__init__(
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 1, 1),
        )


class Residual(nn.Module):
    """The detector; its calls are those of ``detectors.protocol.Detector``.

    Args:
        settings: see :class:`ResidualSettings`.
        categories: names of the training categories.
        backbone: frozen.
    """

    mean: Tensor
    deviation: Tensor
    bank: Tensor
    scale: Tensor
    median: Tensor

    def __init__(self, settings: ResidualSettings, categories: Sequence[str], backbone: Backbone):
        super().__init__()
        self.settings = settings
        self.categories = tuple(sorted(categories))
        self.fingerprint = backbone.fingerprint
        self.calibration: dict[str, float] = {}
        self._backbone = backbone
        self.shapes = tap_shapes(backbone, settings.size)
        self.grid = self.shapes[0][1:]
        channels, rows = backbone.channels, len(self.categories)
        self.head = Head(channels + 1, settings.width)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))
        self.register_buffer("bank", torch.zeros(rows, settings.coreset, channels, dtype=torch.float16))
        self.register_buffer("scale", torch.ones(rows, channels))
        self.register_buffer("median", torch.ones(rows))

    def extract(self, images: Tensor) -> Tensor:
        """N×3×size×size, uint8 or float in [0, 1], to the packed taps, float32 N×P."""
        return pack(self._backbone.taps(images))

    @torch.no_grad()
    def prepare(self, normals: Tensor, categories: Sequence[str]) -> None:
        """Statistics of the normals' patches; for each category its bank, repeated if there are too few
        patches, and what normal patches differ from it by.

        The patches to choose from and the projection come from torch's global generator.

        Raises:
            UsageError: a category has no normal.
        """
        mean, deviation = statistics_of(self._raw(part) for part in normals.split(CHUNK))
        self.mean.copy_(mean)
        self.deviation.copy_(deviation)
        projection = random_projection(self.bank.shape[2]).to(self.bank.device)
        for row, category in enumerate(self.categories):
            own = normals_of(category, normals, categories)
            patches = torch.cat([self._patches(part).flatten(0, 1).half() for part in own.split(CHUNK)])
            patches = patches[torch.randperm(len(patches))[:CANDIDATES].to(patches.device)]
            kept = k_centre(patches.float() @ projection, self.settings.coreset)
            repeated = [kept[k % len(kept)] for k in range(self.settings.coreset)]
            self.bank[row] = patches[repeated]
            others = torch.ones(len(patches), dtype=torch.bool)
            others[kept] = False
            if others.any():
                rest, bank = patches[others].float(), patches[kept].float()
                distance, nearest = torch.cdist(rest, bank).min(dim=1)
                self.median[row] = distance.median().clamp_min(1e-6)
                self.scale[row] = (rest - bank[nearest]).abs().mean(dim=0).clamp_min(1e-6)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.head.parameters())}]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and dice of samples with their masks and of normals with empty ones."""
        names, mask = batch["category"], batch["mask"]
        with torch.no_grad(), torch.autocast(mask.device.type, enabled=False):
            both = torch.cat([batch["synthetic"], batch["normal"]])
            residuals = self._residuals(both, [*names, *names], itself=ITSELF)
            cover = F.interpolate(mask[:, None], self.grid, mode="area")[:, 0]
        logits = self.head(residuals)[:, 0].float()
        target = torch.cat([cover, torch.zeros_like(cover)])
        bce = F.binary_cross_entropy_with_logits(logits, target)
        dice = dice_loss(logits.sigmoid(), target)
        s = self.settings
        return {"loss": s.bce_weight * bce + s.dice_weight * dice, "bce": bce, "dice": dice}

    forward = loss

    @torch.inference_mode()
    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The head's logits, smoothed, and the largest of them."""
        maps = self.maps(batch)
        return counted(maps, batch).amax(dim=(1, 2)), maps

    def maps(self, batch: Batch) -> Tensor:
        """Those of :meth:`score`, float32 N×size×size; differentiable in the features."""
        residuals = self._residuals(batch["features"], batch.get("category"))
        return to_maps(self.head(residuals)[:, 0], self.settings.size)

    @torch.inference_mode()
    def calibrate(self, normals: Sequence[Batch]) -> None:
        """``threshold`` = 99 % quantile of the scores of normals."""
        if not normals:
            raise UsageError("no normal pictures to calibrate on")
        scores = torch.cat([self.score(batch)[0] for batch in normals])
        self.calibration = {"threshold": torch.quantile(scores, QUANTILE).item()}

    def _residuals(self, features: Tensor, names: Sequence[str] | None, itself: float = 0.0) -> Tensor:
        """float32 N×(C+1)×h×w; bank patches nearer than ``itself`` medians are passed over."""
        found = []
        for place, patches in enumerate(self._patches(features)):
            bank, row = self._bank(names[place] if names is not None else None)
            distances = torch.cdist(patches, bank)
            if itself:
                distances = distances.masked_fill(distances < itself * self.median[row], float("inf"))
            distance, nearest = distances.min(dim=1)
            own = row[nearest]
            residual = ((patches - bank[nearest]).abs() / self.scale[own] + 1e-12).sqrt()
            found.append(torch.cat([residual, (distance / self.median[own])[:, None]], dim=1))
        return torch.stack(found).transpose(1, 2).unflatten(2, self.grid)

    def _raw(self, features: Tensor) -> Tensor:
        """N×P packed taps to float32 patch features N×T×C."""
        return on_one_grid(neighbourhood_means(unpack(features.to(self.bank.device).float(), self.shapes)))

    def _patches(self, features: Tensor) -> Tensor:
        """The same, standardised."""
        return (self._raw(features) - self.mean) / self.deviation

    def _bank(self, category: str | None) -> tuple[Tensor, Tensor]:
        """Patches of the category, or of all: float32 M×C, and the row of each: M."""
        rows = torch.tensor(bank_rows(category, self.categories), device=self.bank.device)
        return self.bank[rows].flatten(0, 1).float(), rows.repeat_interleave(self.settings.coreset)


def build(
    settings: ResidualSettings, categories: Sequence[str], device: str | torch.device = "cpu"
) -> Residual:
    """An untrained detector with an empty bank on ``device``."""
    backbone = load_backbone(settings.backbone, settings.layers, device, STRIDES)
    return Residual(settings, categories, backbone).to(device)


RESIDUAL = Method(
    name="residual",
    summary="takes the nearest normal patch away; a small head learns from samples which differences matter",
    settings=ResidualSettings,
    presets={},
    build=build,
)
