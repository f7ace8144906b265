"""Memory bank: how far patches lie from those of normal pictures. Nothing is trained.

The bank holds two things, and by default a patch is judged by both: the geometric mean of two distances, so
that what stands out must be strange at its place and strange anywhere, and neither distance's unit matters
[inferred]. ``entries`` chooses one of them.

**Places**: for each one the Gaussian of what the normals show there, as in PaDiM (Defard et al., ICPR
workshops 2021). A picture's patch is compared with the Gaussians of the places around it, and the nearest
counts. What differs from the paper, and why:

* covariances are shrunk towards one multiple of the identity for all places, by the intensity of Ledoit and
  Wolf (2004), in place of adding 0.01 to every variance: the normals are fewer than the channels, and how
  far to trust them is in the data. One multiple for all, or places where nothing ever varies would drown
  the others [inferred];
* of each covariance the ``directions`` of largest variance are kept (a probabilistic PCA; Tipping and Bishop,
  1999): all channels at a fraction of the memory, where the paper draws channels at random;
* the nearest of the places within ``window``, because parts do not lie in the same place to the pixel
  [inferred; the paper: the same place alone];
* levels meet at stride 8: finer ones are averaged onto it.

**Patches**, as in PatchCore (Roth et al., CVPR 2022): patch features, thinned to a coreset, and the nearest
neighbour. What differs from the released code, and why:

* a patch feature is the mean of its 3×3 neighbours, channel by channel, without pooling across channels
  [inferred: an EfficientNet's levels are narrow];
* the bank has a fixed number of patches a category in place of a share of all patches, so that its cost is
  known before; the paper's 10 % of a category of MVTec AD are about 20 000. It is chosen among at most
  ``candidates`` of them, drawn at random, or the choice would take minutes for a category of many pictures;
* the whole picture is used, without the paper's centre crop.

One detector serves several categories: each has its own bank, and a picture without category is compared with
all of them [inferred].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from detectors.coreset import k_centre, random_projection
from detectors.patches import (
    CHUNK,
    STRIDES,
    bank_rows,
    neighbourhood_means,
    normals_of,
    on_one_grid,
    pack,
    tap_shapes,
    to_maps,
    unpack,
)
from detectors.protocol import Batch, Method, Settings, counted
from generation.backbones import DEFAULT, Backbone, load_backbone
from manifests.errors import UsageError

GRID_STRIDE = 8  # pixels a place
# PaDiM taps layer1 to layer3, PatchCore the last two.
TAPPED = {"both": (4, *STRIDES), "places": (4, *STRIDES), "patches": STRIDES}
# Of the variance over all places: the least noise, where one or two normals or equal ones show none.
FLOOR = 0.01
PLACES = 64  # whose decompositions are in memory at once
QUANTILE = 0.99  # of the scores of normals: the threshold


class MemoryBankSettings(Settings):
    """``paper`` is PatchCore's published backbone and bank."""

    size: int = Field(256, ge=32, description="pictures are resized to this many pixels a side")
    steps: int = Field(0, ge=0, le=0, description="none: the bank is filled, not trained")
    backbone: str = Field(DEFAULT, description="a timm model or a folder")
    layers: tuple[str, ...] | None = Field(
        None, description="modules to tap; default: strides 4, 8 and 16, for patches alone 8 and 16"
    )
    entries: Literal["both", "places", "patches"] = Field(
        "both", description="what the bank holds: a Gaussian for each place, a coreset of patches, or both"
    )
    directions: int = Field(8, ge=0, description="of a place's Gaussian, in which it is not round")
    window: int = Field(2, ge=0, description="places, to each side, in which the nearest is looked for")
    coreset: int = Field(1000, ge=1, description="patches kept for each category")
    candidates: int = Field(20_000, ge=1, description="patches of a category that these are chosen from")
    neighbours: int = Field(
        9, ge=0, description="patches that re-weight a score, for patches alone; below 2: none do"
    )


PAPER = {
    "entries": "patches",
    "backbone": "wide_resnet50_2",
    "size": 224,
    "coreset": 20_000,
    "candidates": 1_000_000,
}


# -- places ---------------------------------------------------------------------------------------------


class Gaussians(NamedTuple):
    """One Gaussian a place, of T places: its covariance is ``noise``·(1 − WᵀW)⁻¹ with the rows W of
    ``directions``.

    Attributes:
        means: T×C.
        directions: T×R×C.
        noise: the variance in all other directions, the same for all places.
    """

    means: Tensor
    directions: Tensor
    noise: Tensor


def fit_gaussians(tokens: Tensor, directions: int) -> Gaussians:
    """Mean and shrunk covariance of each place, of which the largest ``directions`` are kept.

    (1 − δ)·S + δ·μ·1, with S the covariance at the place over the normals, μ the mean variance over all
    places, and δ = Σ ‖error of S‖² / Σ ‖S − μ·1‖², sums over places: equations 14 of Ledoit and Wolf (2004),
    for places together. Every direction that is not kept has the variance δ·μ.

    Args:
        tokens: N×T×C, N > 0.
    """
    count, places, channels = tokens.shape
    means = tokens.float().mean(dim=0)
    spread, axes, fourth = [], [], torch.zeros((), dtype=torch.float64)
    for part, mean in zip(tokens.split(PLACES, dim=1), means.split(PLACES), strict=True):
        away = (part.float() - mean).transpose(0, 1)
        values, vectors = principal_axes(away)
        spread.append(values.double() / count)
        axes.append(vectors[:, :directions])
        fourth = fourth + away.double().square().sum(dim=2).square().sum().cpu()
    variances = torch.cat(spread).cpu()  # T×min(N, C), the largest first
    traces, squares = variances.sum(), variances.square().sum()
    mean_variance = traces / (places * channels)
    error = (fourth / count - squares) / count
    away_from_round = squares - mean_variance * traces
    shrinkage = (error / away_from_round).clamp(0, 1).item() if away_from_round > 0 else 1.0
    overall = tokens.float().var(dim=(0, 1), correction=0).mean().item()
    noise = max(shrinkage * mean_variance.item(), FLOOR * overall, torch.finfo(torch.float16).tiny)
    kept = ((1 - shrinkage) * variances[:, :directions]).to(means)
    weights = (kept / (kept + noise)).sqrt()
    return Gaussians(means, torch.cat(axes) * weights[:, :, None], torch.tensor(noise))


def principal_axes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues P×k and unit eigenvectors P×k×C of XᵀX, the largest first, for X of P×N×C and the smaller k
    of N and C. By way of XXᵀ where that is smaller: many times as fast as a singular value decomposition."""
    turned = rows.transpose(1, 2)
    if rows.shape[1] > rows.shape[2]:
        values, vectors = torch.linalg.eigh(turned @ rows)
        return values.flip(1).clamp(min=0), vectors.transpose(1, 2).flip(1)
    values, vectors = torch.linalg.eigh(rows @ turned)
    return values.flip(1).clamp(min=0), F.normalize(vectors.transpose(1, 2) @ rows, dim=2).flip(1)


def nearest_gaussian(tokens: Tensor, places: Gaussians, window: int) -> Tensor:
    """Mahalanobis distances of tokens to the nearest Gaussian of the places around: float32 h×w.

    Args:
        tokens: h×w×C, as many as there are places.
        window: places to each side that are compared.
    """
    h, w, channels = tokens.shape
    side = 2 * window + 1
    padded = F.pad(tokens, [0, 0, window, window, window, window])
    around = padded.unfold(0, side, 1).unfold(1, side, 1).permute(0, 1, 3, 4, 2)
    away = around.reshape(h * w, side**2, channels) - places.means[:, None]
    known = away @ places.directions.transpose(1, 2)
    squared = (away.square().sum(dim=2) - known.square().sum(dim=2)).view(h, w, side**2)
    # Entry (y, x, k) is of the place (y, x) and a token near it; turned: of a token and a place near it.
    beyond = F.pad(squared.permute(2, 0, 1), [window] * 4, value=float("inf"))
    turned = [
        beyond[dy * side + dx, 2 * window - dy :, 2 * window - dx :][:h, :w]
        for dy in range(side)
        for dx in range(side)
    ]
    nearest = torch.stack(turned).amin(dim=0) / places.noise
    apart = nearest > 0  # a root of 0 has no gradient
    return torch.where(apart, nearest, 1.0).sqrt() * apart


# -- the detector ---------------------------------------------------------------------------------------


class MemoryBank(nn.Module):
    """The detector; its calls are those of ``detectors.protocol.Detector``.

    Args:
        settings: see :class:`MemoryBankSettings`.
        categories: names of the training categories.
        backbone: frozen.
    """

    means: Tensor
    directions: Tensor
    noise: Tensor
    patches: Tensor

    def __init__(self, settings: MemoryBankSettings, categories: Sequence[str], backbone: Backbone):
        super().__init__()
        self.settings = settings
        self.categories = tuple(sorted(categories))
        self.fingerprint = backbone.fingerprint
        self.calibration: dict[str, float] = {}
        self._backbone = backbone
        shapes = tap_shapes(backbone, settings.size)
        least = -(-settings.size // GRID_STRIDE)
        self.grid = min(shapes[0][1:], (least, least))
        self.shapes = tuple((c, *min((h, w), self.grid)) for c, h, w in shapes)
        channels, rows = backbone.channels, len(self.categories)
        self.by_place, self.by_patch = (settings.entries in ("both", one) for one in ("places", "patches"))
        places = self.grid[0] * self.grid[1] if self.by_place else 0
        patches = settings.coreset if self.by_patch else 0
        half = torch.float16
        self.register_buffer("means", torch.zeros(rows, places, channels, dtype=half))
        self.register_buffer(
            "directions", torch.zeros(rows, places, settings.directions, channels, dtype=half)
        )
        self.register_buffer("noise", torch.ones(rows))
        self.register_buffer("patches", torch.zeros(rows, patches, channels, dtype=half))

    def extract(self, images: Tensor) -> Tensor:
        """N×3×size×size, uint8 or float in [0, 1], to packed taps, none finer than the grid, float32 N×P."""
        taps = self._backbone.taps(images)
        return pack(
            [
                tap if tap.shape[1:] == shape else F.adaptive_avg_pool2d(tap, shape[1:])
                for tap, shape in zip(taps, self.shapes, strict=True)
            ]
        )

    @torch.no_grad()
    def prepare(self, normals: Tensor, categories: Sequence[str]) -> None:
        """For each category the Gaussians of its places and the coreset of its patches, repeated if there are
        too few: greedy k-centre on a random projection, which comes, as the candidates, from torch's global
        generator.

        Raises:
            UsageError: a category has no normal.
        """
        projection = random_projection(self.patches.shape[2]).to(self.patches.device)
        seed = int(torch.randint(2**62, ()))  # the same for all, or each would depend on those before it
        self.directions.zero_()
        for row, category in enumerate(self.categories):
            own = normals_of(category, normals, categories).split(CHUNK)
            if self.by_place:
                tokens = torch.cat([self._tokens(part).half() for part in own])
                means, directions, noise = fit_gaussians(tokens, self.settings.directions)
                self.means[row] = means
                self.directions[row, :, : directions.shape[1]] = directions
                self.noise[row] = noise
            if self.by_patch:
                patches = torch.cat([self.around(part).half().flatten(0, 1) for part in own])
                order = torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed))
                patches = patches[order[: self.settings.candidates].to(patches.device)]
                projected = torch.cat([part.float() @ projection for part in patches.split(CHUNK * 1024)])
                kept = k_centre(projected, self.settings.coreset)
                self.patches[row] = patches[[kept[k % len(kept)] for k in range(self.settings.coreset)]]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        raise UsageError("memory_bank has nothing to train; leave its steps at 0")

    forward = loss

    def parameter_groups(self) -> list[dict[str, Any]]:
        return []

    @torch.inference_mode()
    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Distances to the nearest entries of the bank. A picture's score is the largest value of its map, as
        in PaDiM, or for patches alone the largest distance, re-weighted, as in PatchCore.

        Pictures are compared one by one, so that none depends on what it is scored with.
        """
        if self.by_place:
            maps = self.maps(batch)
            return counted(maps, batch).amax(dim=(1, 2)), maps
        scores, found = [], []
        for place, (features, rows) in enumerate(zip(batch["features"], self._rows(batch), strict=True)):
            bank, patches = self.kept(rows), self.around(features[None])[0]
            distances, nearest = torch.cdist(patches, bank).min(dim=1)
            skip = (
                patches_in(batch["ignore"][place].to(bank.device), self.grid) if "ignore" in batch else None
            )
            scores.append(self._reweighted(patches, distances, nearest, bank, skip))
            found.append(distances.view(self.grid))
        return torch.stack(scores), to_maps(torch.stack(found), self.settings.size)

    def maps(self, batch: Batch) -> Tensor:
        """Those of :meth:`score`, float32 N×size×size; differentiable in the features."""
        found = []
        for features, rows in zip(batch["features"], self._rows(batch), strict=True):
            each = torch.stack([self.distances(features[None], row) for row in rows])
            found.append(to_maps(each.amin(dim=0)[None], self.settings.size))
        return torch.cat(found)

    @torch.inference_mode()
    def calibrate(self, normals: Sequence[Batch]) -> None:
        """``threshold`` = 99 % quantile of the scores of normals."""
        if not normals:
            raise UsageError("no normal pictures to calibrate on")
        scores = torch.cat([self.score(batch)[0] for batch in normals])
        self.calibration = {"threshold": torch.quantile(scores, QUANTILE).item()}

    def distances(self, features: Tensor, row: int) -> Tensor:
        """h×w, of one picture (1×P), to the normals of the category in this row of the bank."""
        parts = []
        if self.by_place:
            parts.append(self.to_places(features, row))
        if self.by_patch:
            distances = torch.cdist(self.around(features)[0], self.kept([row]))
            parts.append(distances.amin(dim=1).view(self.grid))
        return parts[0] if len(parts) == 1 else geometric_mean(*parts)

    def to_places(self, features: Tensor, row: int) -> Tensor:
        """The part of the places alone."""
        own = Gaussians(self.means[row].float(), self.directions[row].float(), self.noise[row])
        tokens = self._tokens(features)[0].view(*self.grid, -1)
        return nearest_gaussian(tokens, own, self.settings.window)

    def _reweighted(
        self, patches: Tensor, distances: Tensor, nearest: Tensor, bank: Tensor, skip: Tensor | None
    ) -> Tensor:
        """The largest distance, times its patch's :func:`novelty`; none comes from ``skip``, bool h×w."""
        place = distances.argmax()
        if skip is not None:  # where nothing counts, as low as can be
            skipped = skip.flatten()
            counting = distances.masked_fill(skipped, -1.0).argmax()
            place = torch.where(skipped.all(), distances.argmin(), counting)  # no branch: a graph has none
        at = place[None]  # one-element lists, for a graph cannot make an index of a number
        count = min(self.settings.neighbours, len(bank))
        if count < 2:
            return distances[at][0]
        return distances[at][0] * novelty(patches[at][0], bank[nearest[at]][0], bank, count)

    def _tokens(self, features: Tensor) -> Tensor:
        """N×P packed taps to float32 features N×T×C of the places."""
        return on_one_grid(unpack(features.to(self.means.device).float(), self.shapes))

    def around(self, features: Tensor) -> Tensor:
        """The same of the patches around the places."""
        return on_one_grid(neighbourhood_means(unpack(features.to(self.patches.device).float(), self.shapes)))

    def kept(self, rows: Sequence[int]) -> Tensor:
        """The patches kept of categories, float32 M×C."""
        return torch.cat([self.patches[row].float() for row in rows])

    def _rows(self, batch: Batch) -> list[Sequence[int]]:
        """Of the bank, for each picture: its category's, or all."""
        names = batch.get("category") or [None] * len(batch["features"])
        return [bank_rows(name, self.categories) for name in names]


def geometric_mean(one: Tensor, other: Tensor) -> Tensor:
    """√(a·b), with the gradient 0 where it is 0."""
    product = one * other
    apart = product > 0
    return torch.where(apart, product, 1.0).sqrt() * apart


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
    backbone = load_backbone(settings.backbone, settings.layers, device, TAPPED[settings.entries])
    return MemoryBank(settings, categories, backbone).to(device)


MEMORY_BANK = Method(
    name="memory_bank",
    summary="compares patches with those of normal pictures; nothing is trained",
    settings=MemoryBankSettings,
    presets={"paper": PAPER},
    build=build,
)
