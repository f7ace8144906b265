"""Residual: a memory bank, and a small head that learns which differences from its normals matter.

Known parts put together [inferred]. A memory bank says, for every patch, the most similar normal one
(PatchCore; Roth et al., CVPR 2022); what is left of a patch when that is taken away hardly depends on the
category, so one head serves all of them (residual features: ResAD; Yao et al., NeurIPS 2024). The head is a
few convolutions that learn from synthetic anomalies with their masks, as SuperSimpleNet's does (Rolih et
al., ICPR 2024). The bank does not change in training: it learns in a minute or two, and what it learns it has
from the samples.

* the residual of a channel is √(|p − m| / s), with s its mean over normals: tempered against outliers, in
  units of what normal patches differ by; the distance ‖p − m‖, in units of its median over normals, is one
  more channel [inferred];
* a patch that is in the bank itself is compared with its next like in training, or normals would be told by
  a residual of 0 [inferred];
* targets are the share of a patch that the mask covers, in cross-entropy and dice;
* a map adds up what bank and head say: by how many deviations the logarithm of the bank's distance (see
  ``memory_bank``) exceeds that of normals, and −log(1 − p), with p the head's probability of an anomaly. So
  where the head sees nothing the map is the bank's, and the head lifts what it has learned to know
  [inferred].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from detectors.memory_bank import TAPPED, MemoryBank, MemoryBankSettings, geometric_mean
from detectors.onenip import dice_loss
from detectors.patches import bank_rows, normals_of, to_maps
from detectors.protocol import Batch, Method, Settings, counted
from generation.backbones import DEFAULT, Backbone, load_backbone
from manifests.errors import UsageError

SEEN = 32  # normals of a category, at most, that statistics of its distances are taken from
BARELY = 0.01  # of a patch's length; what is nearer is the patch itself, up to rounding
ITSELF = 0.3  # of the median distance of normals; what is nearer in training is the patch itself
LOWEST = -3.0  # deviations; lower, a patch that is in the bank would also lower those around it
QUANTILE = 0.99  # of the scores of normals: the threshold


class ResidualSettings(Settings):
    """The defaults learn in a minute or two on a CPU core."""

    size: int = Field(256, ge=32, description="pictures are resized to this many pixels a side")
    steps: int = Field(600, ge=1, description="optimiser steps")
    lr: float = Field(2e-3, gt=0, description="peak learning rate")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    backbone: str = Field(DEFAULT, description="a timm model or a folder")
    layers: tuple[str, ...] | None = Field(None, description="modules to tap; default: strides 4, 8 and 16")
    coreset: int = Field(1000, ge=1, description="normal patches kept for each category")
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

    scale: Tensor
    median: Tensor
    usual: Tensor
    spread: Tensor

    def __init__(self, settings: ResidualSettings, categories: Sequence[str], backbone: Backbone):
        super().__init__()
        self.settings = settings
        self.calibration: dict[str, float] = {}
        shared = settings.model_dump(include={"size", "backbone", "layers", "coreset"})
        self.bank = MemoryBank(MemoryBankSettings(**shared), categories, backbone)
        self.categories, self.fingerprint = self.bank.categories, self.bank.fingerprint
        channels, rows = backbone.channels, len(self.categories)
        self.head = Head(channels + 1, settings.width)
        self.register_buffer("scale", torch.ones(rows, channels))
        self.register_buffer("median", torch.ones(rows))
        self.register_buffer("usual", torch.zeros(rows))
        self.register_buffer("spread", torch.ones(()))

    def extract(self, images: Tensor) -> Tensor:
        """Those of ``memory_bank``."""
        return self.bank.extract(images)

    @torch.no_grad()
    def prepare(self, normals: Tensor, categories: Sequence[str]) -> None:
        """Fills the bank, and for each category takes what its normals' patches differ from the nearest ones
        kept by: a channel's mean, the median distance, and mean and deviation of the bank's log distance.

        Raises:
            UsageError: a category has no normal.
        """
        self.bank.prepare(normals, categories)
        variances = []
        for row, category in enumerate(self.categories):
            own = normals_of(category, normals, categories)
            kept = self.bank.kept([row])
            away, distances, judged = [], [], []
            for features in own[:: -(-len(own) // SEEN)]:
                patches = self.bank.around(features[None])[0]
                distance, nearest = torch.cdist(patches, kept).min(dim=1)
                away.append((patches - kept[nearest]).abs())
                judged.append(geometric_mean(self.bank.to_places(features[None], row).flatten(), distance))
                distances.append(distance.masked_fill(distance < BARELY * patches.norm(dim=1), 0.0))
            distance, both = torch.cat(distances), torch.cat(judged)
            others = distance > 0
            if others.any():
                self.median[row] = distance[others].median()
                self.scale[row] = torch.cat(away)[others].mean(dim=0).clamp_min(1e-6)
            logs = both[others & (both > 0)].log()
            if len(logs) > 1:
                self.usual[row] = logs.mean()
                variances.append(logs.var())
        if variances:
            self.spread.copy_(torch.stack(variances).mean().sqrt().clamp_min(1e-3))

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.head.parameters())}]

    @torch.no_grad()
    def encode(self, features: Tensor, categories: Sequence[str]) -> Tensor:
        """Residuals as the head sees them in training, N×(C+1)×h×w."""
        rows = [bank_rows(category, self.categories) for category in categories]
        compared = (self._compared(*one, itself=ITSELF)[0] for one in zip(features, rows, strict=True))
        return torch.stack(list(compared))

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy and dice of samples with their masks and of normals with empty ones."""
        cover = F.interpolate(batch["mask"][:, None], self.bank.grid, mode="area")[:, 0]
        # float32 before they are joined: under autocast to bfloat16 `cat` refuses float16
        residuals = torch.cat([batch["synthetic"].float(), batch["normal"].float()])
        logits = self.head(residuals)[:, 0].float()
        target = torch.cat([cover, torch.zeros_like(cover)])
        bce = F.binary_cross_entropy_with_logits(logits, target)
        dice = dice_loss(logits.sigmoid(), target)
        s = self.settings
        return {"loss": s.bce_weight * bce + s.dice_weight * dice, "bce": bce, "dice": dice}

    forward = loss

    @torch.inference_mode()
    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Maps as the module says, smoothed, and the largest value of each."""
        maps = self.maps(batch)
        return counted(maps, batch).amax(dim=(1, 2)), maps

    def maps(self, batch: Batch) -> Tensor:
        """Those of :meth:`score`, float32 N×size×size; differentiable in the features."""
        residuals, deviations = self._seen(batch["features"], batch.get("category"))
        logits = self.head(residuals)[:, 0]
        return to_maps(deviations + F.softplus(logits), self.settings.size)

    @torch.inference_mode()
    def calibrate(self, normals: Sequence[Batch]) -> None:
        """``threshold`` = 99 % quantile of the scores of normals."""
        if not normals:
            raise UsageError("no normal pictures to calibrate on")
        scores = torch.cat([self.score(batch)[0] for batch in normals])
        self.calibration = {"threshold": torch.quantile(scores, QUANTILE).item()}

    def _seen(self, features: Tensor, names: Sequence[str] | None) -> tuple[Tensor, Tensor]:
        """What the head sees of pictures, N×(C+1)×h×w, and by how many deviations of normals the bank's log
        distance exceeds theirs, N×h×w: of several categories to the one that it exceeds the least."""
        residuals, deviations = [], []
        for place, one in enumerate(features):
            rows = bank_rows(names[place] if names is not None else None, self.categories)
            residual, distances = self._compared(one, rows)
            residuals.append(residual)
            each = []
            for row, own in zip(rows, distances.chunk(len(rows), dim=1), strict=True):
                to_patches = own.amin(dim=1).view(self.bank.grid)
                both = geometric_mean(self.bank.to_places(one[None], row), to_patches)
                each.append(both.clamp_min(1e-12).log() - self.usual[row])
            deviations.append(torch.stack(each).amin(dim=0) / self.spread)
        return torch.stack(residuals), torch.stack(deviations).clamp_min(LOWEST)

    def _compared(self, one: Tensor, rows: Sequence[int], itself: float = 0.0) -> tuple[Tensor, Tensor]:
        """A picture's patches less the nearest ones kept of some categories: the residuals, (C+1)×h×w, and
        the distances to all that are kept, T×M, category by category. Kept patches nearer than ``itself``
        medians are passed over."""
        patches, kept = self.bank.around(one[None])[0], self.bank.kept(rows)
        of = torch.tensor(list(rows), device=kept.device).repeat_interleave(self.settings.coreset)
        distances = torch.cdist(patches, kept)
        if itself:
            distances = distances.masked_fill(distances < itself * self.median[of], float("inf"))
        distance, nearest = distances.min(dim=1)
        own = of[nearest]
        residual = ((patches - kept[nearest]).abs() / self.scale[own] + 1e-12).sqrt()
        found = torch.cat([residual, (distance / self.median[own])[:, None]], dim=1)
        return found.T.unflatten(1, self.bank.grid), distances


def build(
    settings: ResidualSettings, categories: Sequence[str], device: str | torch.device = "cpu"
) -> Residual:
    """An untrained detector with an empty bank on ``device``."""
    backbone = load_backbone(settings.backbone, settings.layers, device, TAPPED["both"])
    return Residual(settings, categories, backbone).to(device)


RESIDUAL = Method(
    name="residual",
    summary="a memory bank; a small head learns from samples which differences from its normals matter",
    settings=ResidualSettings,
    presets={},
    build=build,
)
