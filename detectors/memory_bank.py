"""Memory bank: how far patches lie from those of normal pictures (PatchCore; Roth et al., CVPR 2022).

Nothing is trained. Patch features of the normals are thinned to a coreset, the bank of their category; a
picture's patches are compared with it. The peer every trained detector has to beat.

What differs from the released code, and why:

* a patch feature is the mean of its 3×3 neighbours, channel by channel, without pooling across channels
  [inferred: an EfficientNet's levels are narrow];
* the bank has a fixed number of patches a category in place of a share of all patches, so that its cost is
  known before; the paper's 10 % of a category of MVTec AD are about 20 000;
* the whole picture is used, without the paper's centre crop;
* one detector serves several categories: each has its own bank, and a picture without category is compared
  with all of them [inferred].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from detectors.coreset import k_centre
from detectors.patches import CHUNK, STRIDES, pack, tap_shapes, to_maps, unpack
from detectors.protocol import Batch, Method, Settings
from generation.backbones import DEFAULT, Backbone, load_backbone
from manifests.errors import UsageError

PROJECTED = 128  # dimensions in which the coreset is chosen (as released)
QUANTILE = 0.99  # of the scores of normals: the threshold


class MemoryBankSettings(Settings):
    """``paper`` is the published backbone and bank."""

    steps: int = Field(0, ge=0, le=0, description="none: the bank is filled, not trained")
    backbone: str = Field(DEFAULT, description="a timm model or a folder")
    layers: tuple[str, ...] | None = Field(None, description="modules to tap; default: strides 8 and 16")
    coreset: int = Field(1000, ge=1, description="patches kept for each category")
    neighbours: int = Field(9, ge=0, description="in the bank, that re-weight a score; below 2: none do")


PAPER = {"backbone": "wide_resnet50_2", "coreset": 20_000}


def neighbourhood_means(taps: Sequence[Tensor]) -> Tensor:
    """Locally aware patch features: the mean of 3×3 neighbours, all levels on the grid of the finest.

    Args:
        taps: N×C×h×w, the finest first.

    Returns:
        N×(h·w)×ΣC.

    Source: PatchCore, section 3.1.
    """
    means = [F.avg_pool2d(tap, 3, stride=1, padding=1, count_include_pad=False) for tap in taps]
    grid = taps[0].shape[2:]
    return torch.cat([F.interpolate(m, grid, mode="bilinear") for m in means], 1).flatten(2).transpose(1, 2)


class MemoryBank(nn.Module):
    """The detector; its calls are those of ``detectors.protocol.Detector``.

    Args:
        settings: see :class:`MemoryBankSettings`.
        categories: names of the training categories.
        backbone: frozen.
    """

    bank: Tensor
    filled: Tensor

    def __init__(self, settings: MemoryBankSettings, categories: Sequence[str], backbone: Backbone):
        super().__init__()
        self.settings = settings
        self.categories = tuple(sorted(categories))
        self.fingerprint = backbone.fingerprint
        self.calibration: dict[str, float] = {}
        self._backbone = backbone
        self.shapes = tap_shapes(backbone, settings.size)
        self.grid = self.shapes[0][1:]
        channels, rows = backbone.channels, len(self.categories)
        self.register_buffer("bank", torch.zeros(rows, settings.coreset, channels, dtype=torch.float16))
        self.register_buffer("filled", torch.zeros(rows, dtype=torch.int64))  # patches in each row of bank

    def extract(self, images: Tensor) -> Tensor:
        """N×3×size×size, uint8 or float in [0, 1], to the packed taps, float32 N×P."""
        return pack(self._backbone.taps(images))

    @torch.no_grad()
    def prepare(self, normals: Tensor, categories: Sequence[str]) -> None:
        """For each category the coreset of its patches: greedy k-centre on a random projection, which comes
        from torch's global generator.

        Raises:
            UsageError: a category has no normal.
        """
        self.bank.zero_()
        projection = torch.randn(self.bank.shape[2], PROJECTED).to(self.bank.device) / PROJECTED**0.5
        for row, category in enumerate(self.categories):
            own = normals[[i for i, name in enumerate(categories) if name == category]]
            if not len(own):
                raise UsageError(
                    f"category {category}: no normal picture in the train split to fill its bank"
                )
            patches = torch.cat([self._patches(part).flatten(0, 1).half() for part in own.split(CHUNK)])
            projected = torch.cat([part.float() @ projection for part in patches.split(CHUNK * 1024)])
            kept = k_centre(projected, self.settings.coreset)
            self.bank[row, : len(kept)] = patches[kept]
            self.filled[row] = len(kept)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        raise UsageError("memory_bank has nothing to train; leave its steps at 0")

    forward = loss

    def parameter_groups(self) -> list[dict[str, Any]]:
        return []

    @torch.inference_mode()
    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Distances to the nearest patches of the bank, and the largest of them, re-weighted.

        Pictures are compared one by one, so that none depends on what it is scored with.
        """
        names = batch.get("category") or [None] * len(batch["features"])
        ignored = batch["ignore"].to(self.bank.device) if "ignore" in batch else [None] * len(names)
        skipped = [None if one is None else patches_in(one, self.grid) for one in ignored]
        found = [
            self._score(row[None], name, skip)
            for row, name, skip in zip(batch["features"], names, skipped, strict=True)
        ]
        scores, distances = (torch.stack(parts) for parts in zip(*found, strict=True))
        return scores, to_maps(distances, self.settings.size)

    def maps(self, batch: Batch) -> Tensor:
        """Those of :meth:`score`, float32 N×size×size; differentiable in the features."""
        names = batch.get("category") or [None] * len(batch["features"])
        found = [
            torch.cdist(self._patches(row[None])[0], self._bank(name)).amin(dim=1).view(self.grid)
            for row, name in zip(batch["features"], names, strict=True)
        ]
        return to_maps(torch.stack(found), self.settings.size)

    @torch.inference_mode()
    def calibrate(self, normals: Sequence[Batch]) -> None:
        """``threshold`` = 99 % quantile of the scores of normals."""
        if not normals:
            raise UsageError("no normal pictures to calibrate on")
        scores = torch.cat([self.score(batch)[0] for batch in normals])
        self.calibration = {"threshold": torch.quantile(scores, QUANTILE).item()}

    def _score(
        self, features: Tensor, category: str | None, skip: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Score and distances h×w of one picture; no score comes from the patches ``skip``, bool h×w."""
        patches, bank = self._patches(features)[0], self._bank(category)
        distances, nearest = torch.cdist(patches, bank).min(dim=1)
        place = distances.argmax()
        if skip is not None:  # where nothing counts, as low as can be
            skipped = skip.flatten()
            place = distances.argmin() if skipped.all() else distances.masked_fill(skipped, -1.0).argmax()
        score = distances[place]
        count = min(self.settings.neighbours, len(bank))
        if count > 1:
            score = score * novelty(patches[place], bank[nearest[place]], bank, count)
        return score, distances.view(self.grid)

    def _patches(self, features: Tensor) -> Tensor:
        """N×P packed taps to float32 patch features N×T×C."""
        return neighbourhood_means(unpack(features.to(self.bank.device).float(), self.shapes))

    def _bank(self, category: str | None) -> Tensor:
        """float32, M×C: the category's patches, or those of all."""
        if category is None:
            return torch.cat([self.bank[row, :count] for row, count in enumerate(self.filled)]).float()
        if category not in self.categories:
            raise UsageError(
                f"category {category!r}: the bank holds {', '.join(self.categories)}; name one of these, or "
                "none to compare with all of them"
            )
        row = self.categories.index(category)
        return self.bank[row, : self.filled[row]].float()


def patches_in(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """The patches all of whose pixels lie in a mask: bool H×W to bool h×w."""
    outside = F.adaptive_max_pool2d((~mask).float()[None, None], grid)[0, 0]
    return outside == 0


def novelty(patch: Tensor, nearest: Tensor, bank: Tensor, count: int) -> Tensor:
    """1 − exp(‖p − m*‖) / Σ exp(‖p − m‖) over the ``count`` patches m of the bank nearest to m*, itself
    included: near 1 where m* is at home among its like, less where it is rare (PatchCore, equation 7).

    Args:
        patch, nearest: C: p and m*.
        bank: M×C.
    """
    around = bank[torch.cdist(nearest[None], bank)[0].topk(count, largest=False).indices]
    return 1 - torch.exp((patch - nearest).norm() - (patch - around).norm(dim=1).logsumexp(0))


def build(
    settings: MemoryBankSettings, categories: Sequence[str], device: str | torch.device = "cpu"
) -> MemoryBank:
    """An empty bank on ``device``."""
    backbone = load_backbone(settings.backbone, settings.layers, device, STRIDES)
    return MemoryBank(settings, categories, backbone).to(device)


MEMORY_BANK = Method(
    name="memory_bank",
    summary="compares patches with those of normal pictures; nothing is trained",
    settings=MemoryBankSettings,
    presets={"paper": PAPER},
    build=build,
)
