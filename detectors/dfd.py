"""DFD: dual-path frequency discriminators (Bai et al., Knowledge-Based Systems 2024; core.md 3).

A picture is split into a low and a high frequency band; both go through one frozen encoder and one adapter.
Two discriminators say how normal each patch is: the Gaussian path learns from patches with noise and sees no
context, the Perlin path learns from synthetic anomalies and sees the whole picture.

What differs from the released code, and why:

* the default network is a small one for two CPU cores; ``paper`` is the published one;
* patch features are standardised, band by band, with the statistics of the training normals, and the noise is
  larger to match [inferred: at 0.4 a linear probe tells two of three noisy patches from clean ones, within
  the 60 to 80 % of core.md 5.7; 0.015 presumes features of deviation 0.2 to 0.5];
  ``standardise: false`` restores the paper;
* pictures are RGB, as the encoder expects; the released code feeds BGR (``bgr: true``);
* both bands, and clean and noisy patches, go through a discriminator in one batch, so that its batch norm
  has one set of statistics in training and in scoring [inferred];
* each path's maps are brought to mean 0 and deviation 1 over normal pictures before they are averaged
  (core.md 3.8). ``normalise: batch`` is the released code's, which leaks: see :meth:`DFD.score`;
* the default's maps are the Perlin path's alone (``gaussian_share``; published ½): isotropic noise is soon
  told from correlated features, and a Gaussian path that has learned just that drowns the other [measured
  with the default backbone, samples of the default mix, two seeds: pixel AP 0.39 and 0.35, by halves 0.27 and
  0.21]. Scores are of both, as published: the noise's path knows no places, but pictures [image AUROC 0.79
  and 0.80 without it, 0.89 and 0.84 by halves]. ``perturbation: ascent`` (not the paper's; one seed) gives
  maps of 0.32 by halves, but scores of 0.80;
* ``paper`` has the steps of one shot; with ``shots: k`` set ``steps`` to 800·k (core.md 3.7);
* AdamW with the loop's warm-up and cosine for all parts, in place of Adam and a cosine of the discriminators
  alone, of 76 steps; the published ratios of the learning rates are kept;
* the pixel and similarity losses are means over the pixels of a batch, so that micro-batches (``accumulate``)
  weigh them a little otherwise than one batch does;
* one detector serves all categories of a run; the released code trains one a category: give a run one
  category to compare;
* normals are not turned before an anomaly is drawn on them: the samples are the run's own
  (``generation.preset: dfd`` draws the published ones otherwise). The released code's 80 samples a shot are
  the run's ``samples``; what is published as the share of pictures left normal is ``left_normal``;
* the last steps' weights are taken, never those that do best on the test set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from detectors.patches import CHUNK, STRIDES, pack, statistics_of, tap_shapes, to_maps, unpack
from detectors.protocol import Batch, Method, Settings, counted
from generation.backbones import DEFAULT, Backbone, in_unit, load_backbone
from generation.feature.operators import ascent, gaussian
from manifests.errors import UsageError

PATHS = "perlin", "gaussian"
MARGIN = 0.5  # of the hinges
GAUSSIAN_RATE, PERLIN_RATE = 0.4, 0.2  # of the adapter's: 2e-4 and 1e-4 to 5e-4 (core.md 3.5, 3.7)
HALF = 6e4  # within the range of float16
QUANTILE = 0.99  # of the scores of normals: the threshold


class DFDSettings(Settings):
    """The defaults learn in about half a minute on a CPU core; ``paper`` is the published network."""

    size: int = Field(160, ge=32, description="pictures are resized to this many pixels a side")
    steps: int = Field(
        100,
        ge=0,
        description="optimiser steps; published: 800 times shots, of which the preset paper has one",
    )
    lr: float = Field(5e-3, gt=0, description="peak learning rate of the adapter; the others' follow")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    backbone: str = Field(DEFAULT, description="a timm model or a folder")
    layers: tuple[str, ...] | None = Field(None, description="modules to tap; default: strides 8 and 16")
    channels: int = Field(128, ge=8, description="of a patch feature; a multiple of heads")
    width: int = Field(128, ge=8, description="of the Gaussian path's hidden layer")
    heads: int = Field(4, ge=1, description="of the Perlin path's attention")
    noise: float = Field(0.4, ge=0, description="deviation of the Gaussian path's noise")
    perturbation: Literal["noise", "ascent"] = Field(
        "noise",
        description="what the Gaussian path learns to tell from patches: noise, or noise that climbs the "
        "path's own gradient to a distance of noise to twice noise (GLASS)",
    )
    left_normal: float = Field(0.2, ge=0, le=1, description="share of samples whose anomaly is left out")
    gaussian_share: float = Field(
        0.0, ge=0, le=1, description="weight of the Gaussian path in maps; the other has the rest"
    )
    score_share: float = Field(
        0.5, ge=0, le=1, description="the same in scores; where gaussian_share alone is named, that"
    )
    standardise: bool = Field(True, description="bring every channel of a band to mean 0 and deviation 1")
    bgr: bool = Field(False, description="the encoder sees blue first")
    normalise: Literal["clean", "batch"] = Field(
        "clean", description="paths by normals' statistics, or (leaking) by those of the pictures scored"
    )

    @model_validator(mode="before")
    @classmethod
    def _one_share(cls, given: Any) -> Any:
        """Also of checkpoints from before ``score_share``, whose thresholds are of scores mixed as maps."""
        if isinstance(given, dict) and "gaussian_share" in given:
            return {"score_share": given["gaussian_share"], **given}
        return given

    @model_validator(mode="after")
    def _whole_heads(self) -> DFDSettings:
        if self.channels % self.heads:
            raise ValueError(f"channels: {self.channels} is no multiple of heads: {self.heads}")
        return self

    @property
    def leak(self) -> str | None:
        if self.normalise == "clean":
            return None
        return (
            "normalise: batch brings scores and maps to the range of the pictures they are judged with "
            "(normalise: clean does not)"
        )


PAPER = {
    "size": 256,
    "backbone": "wide_resnet50_2",
    "channels": 1536,
    "width": 1024,
    "heads": 16,
    "noise": 0.015,
    "gaussian_share": 0.5,
    "standardise": False,
    "bgr": True,
    "normalise": "batch",
    "lr": 5e-4,
    "weight_decay": 1e-5,
    "clip": 1e9,  # none is published
    "batch": 8,
    "steps": 800,  # of one shot: a preset does not know how many there are
}


# -- multi-frequency information (core.md 3.2) ----------------------------------------------------------


def split_bands(images: Tensor) -> tuple[Tensor, Tensor]:
    """One level of a Laplacian pyramid: low = pyrUp(pyrDown(I)), high = I − low.

    Args:
        images: float32, N×C×H×W in [0, 1].

    Returns:
        (low, high), both of that shape; ``high`` is signed, and low + high = I.
    """
    low = pyramid_up(pyramid_down(images), images.shape[2], images.shape[3])
    return low, images - low


def pyramid_down(images: Tensor) -> Tensor:
    """OpenCV's pyrDown: smoothed by [1 4 6 4 1]/16 both ways (borders mirrored), then every second pixel."""
    return _smooth(images)[:, :, ::2, ::2]


def pyramid_up(images: Tensor, height: int, width: int) -> Tensor:
    """OpenCV's pyrUp to ``height``×``width``: zeros between the pixels, then smoothed with four times the
    gain."""
    n, c, h, w = images.shape
    spread = images.new_zeros(n, c, 2 * h, 2 * w)
    spread[:, :, ::2, ::2] = 4 * images
    return _smooth(spread)[:, :, :height, :width]


def _smooth(images: Tensor) -> Tensor:
    kernel = images.new_tensor([1, 4, 6, 4, 1]) / 16
    flat = F.pad(images, [2] * 4, mode="reflect").flatten(0, 1)[:, None]
    smooth = F.conv2d(F.conv2d(flat, kernel.view(1, 1, 5, 1)), kernel.view(1, 1, 1, 5))
    return smooth.view_as(images)


# -- fine-grained features (core.md 3.4) ----------------------------------------------------------------


def fine_grained(taps: Sequence[Tensor], channels: int) -> Tensor:
    """Patch features of a picture's neighbourhoods.

    The 3×3 neighbourhood of each place is one vector of 9·C numbers, pooled to ``channels``; the levels, on
    the grid of the finest, are joined and pooled to ``channels`` again.

    Args:
        taps: N×C×h×w, the finest first.

    Returns:
        N×(h·w)×``channels``.
    """
    grid = taps[0].shape[2:]
    levels = []
    for tap in taps:
        neighbourhoods = F.unfold(tap, 3, padding=1).transpose(1, 2)
        pooled = F.adaptive_avg_pool1d(neighbourhoods, channels).transpose(1, 2)
        levels.append(F.interpolate(pooled.unflatten(2, tap.shape[2:]), grid, mode="bilinear"))
    return F.adaptive_avg_pool1d(torch.cat(levels, dim=1).flatten(2).transpose(1, 2), channels)


def band_statistics(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of each band, float32 2×C, of patch features 2×N×T×C in parts."""
    # Bands side by side are channels.
    mean, deviation = statistics_of(part.permute(1, 2, 0, 3).flatten(2) for part in parts)
    return mean.view(2, -1), deviation.view(2, -1)


# -- discriminators (core.md 3.5) -----------------------------------------------------------------------


class GaussianPath(nn.Sequential):
    """Normality of each patch alone: M×C to M×1."""

    def __init__(self, channels: int, width: int):
        super().__init__(
            nn.Linear(channels, width),
            nn.BatchNorm1d(width),
            nn.LeakyReLU(0.2),
            nn.Linear(width, 1, bias=False),
        )


class PerlinPath(nn.Module):
    """Normality of each patch among the others of its picture: N×T×C to N×T."""

    def __init__(self, channels: int, heads: int, patches: int):
        super().__init__()
        self.project = nn.Sequential(
            nn.Linear(channels, channels), nn.BatchNorm1d(channels), nn.LeakyReLU(0.2)
        )
        self.class_token = nn.Parameter(torch.zeros(1, 1, channels))
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + patches, channels), std=0.02))
        self.block = Block(channels, heads, mlp_ratio=4, qkv_bias=True)
        self.norm = nn.LayerNorm(channels)
        self.last = nn.Linear(channels, 1, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.project(patches.flatten(0, 1)).view_as(patches)
        x = torch.cat([self.class_token.expand(len(x), 1, -1), x], dim=1) + self.position
        # On a processor in bfloat16 a step is 7 % faster with the plain operator than with the fused one,
        # whose backward is slow there (measured: one thread with AMX).
        attention: Any = self.block.attn
        attention.fused_attn = not torch.is_autocast_enabled("cpu")
        return self.last(self.norm(self.block(x)[:, 1:]))[..., 0]


# -- losses of one band (core.md 3.6) -------------------------------------------------------------------


def gaussian_loss(clean: Tensor, noisy: Tensor) -> Tensor:
    """Mean hinge of the normality of patches, and of the same with noise."""
    return F.relu(MARGIN - clean).mean() + F.relu(MARGIN + noisy).mean()


def pixel_loss(normality: Tensor, mask: Tensor) -> Tensor:
    """Mean hinge over normal pixels plus that over anomalous ones, each if there are any; both N×H×W."""
    anomalous = mask > 0
    hinges = [(F.relu(MARGIN - normality), ~anomalous), (F.relu(MARGIN + normality), anomalous)]
    return _total((hinge * places).sum() / places.sum() for hinge, places in hinges if places.any())


def class_loss(normality: Tensor, mask: Tensor) -> Tensor:
    """Squared error of each picture's largest sigmoid(−s) against whether it has an anomaly; N×H×W."""
    return F.mse_loss((-normality).sigmoid().amax(dim=(1, 2)), mask.amax(dim=(1, 2)))


def similarity_loss(changed: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
    """Mean cosine of the patches under the mask with the normal ones at the same place; 0 if there are none.

    Args:
        changed, clean: N×T×C.
        mask: N×H×W; a patch is under it if any of its pixels is (maximum pooling).
    """
    side = round(changed.shape[1] ** 0.5)
    under = F.adaptive_max_pool2d(mask, side).flatten(1) > 0
    cosine = F.cosine_similarity(changed.float(), clean.float(), dim=-1)
    return cosine[under].mean() if under.any() else 0 * cosine.sum()


# -- the detector ---------------------------------------------------------------------------------------


class DFD(nn.Module):
    """The detector; its calls are those of ``detectors.protocol.Detector``.

    Patches are 2×N×T×C: the low band, then the high one.

    Args:
        settings: see :class:`DFDSettings`.
        categories: names of the training categories.
        backbone: frozen.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, settings: DFDSettings, categories: Sequence[str], backbone: Backbone):
        super().__init__()
        self.settings = settings
        self.categories = tuple(sorted(categories))
        self.fingerprint = backbone.fingerprint
        self.calibration: dict[str, float] = {}
        self._backbone = backbone
        self.shapes = tap_shapes(backbone, settings.size)
        self.grid = self.shapes[0][1:]
        channels = settings.channels
        self.adapter = nn.Linear(channels, channels)
        nn.init.xavier_normal_(self.adapter.weight)
        self.gaussian_path = GaussianPath(channels, settings.width)
        self.perlin_path = PerlinPath(channels, settings.heads, self.grid[0] * self.grid[1])
        self.register_buffer("mean", torch.zeros(2, channels))
        self.register_buffer("deviation", torch.ones(2, channels))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Adapter and discriminators, each with its learning rate."""
        s = self.settings
        return [
            {"params": list(self.adapter.parameters()), "lr": s.lr, "weight_decay": 0.0},
            {"params": list(self.gaussian_path.parameters()), "lr": GAUSSIAN_RATE * s.lr},
            {"params": list(self.perlin_path.parameters()), "lr": PERLIN_RATE * s.lr},
        ]

    def extract(self, images: Tensor) -> Tensor:
        """N×3×size×size, uint8 or float in [0, 1], to the packed taps of both bands, float32 N×2×P."""
        pixels = in_unit(images.to(self._backbone.device))
        bands = split_bands(pixels.flip(1) if self.settings.bgr else pixels)
        return torch.stack([pack(self._backbone.taps(band)) for band in bands], dim=1)

    @torch.no_grad()
    def prepare(self, normals: Tensor, categories: Sequence[str]) -> None:
        """Statistics of the normals' patches."""
        if self.settings.standardise:
            self.mean, self.deviation = band_statistics(self._raw(part) for part in normals.split(CHUNK))

    @torch.no_grad()
    def encode(self, features: Tensor, categories: Sequence[str]) -> Tensor:
        """Patches, N×2×T×C: all that is frozen, once the statistics are known. Within what float16 holds,
        which a channel that never varies in normals may leave."""
        return self._patches(features).transpose(0, 1).clamp(-HALF, HALF)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """L = L_Gau + ½·L_pix + ½·L_cls + L_Sim, each summed over the bands (core.md 3.6)."""
        normal, synthetic, mask = self._some_left_normal(batch)
        clean, changed = (self._adapted(part.float().transpose(0, 1)) for part in (normal, synthetic))
        normality = self._gaussian(torch.stack([clean, self._noisy(clean)]))
        maps = self._enlarged(self._perlin(changed))
        gauss = _total(gaussian_loss(*pair) for pair in normality.unbind(1))
        pixel = _total(pixel_loss(band, mask) for band in maps)
        label = _total(class_loss(band, mask) for band in maps)
        similarity = _total(similarity_loss(*pair, mask) for pair in zip(changed, clean, strict=True))
        loss = gauss + 0.5 * pixel + 0.5 * label + similarity
        return {"loss": loss, "gauss": gauss, "pixel": pixel, "class": label, "similarity": similarity}

    forward = loss

    @torch.inference_mode()
    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Both paths normalised and mixed, in scores by ``score_share``, in maps by ``gaussian_share`` (by
        default the Perlin path alone); a path's score is the largest value of its map.

        With ``normalise: batch`` (the released code's; core.md 3.8, 3 and 4) the smallest and largest values
        of the very pictures that are scored decide: a picture's score then depends on what it is scored with,
        and on test pictures that is a leak. Published figures come from all test pictures of a category as
        one batch, and so do ours from all that are judged of it: the feedback half, the test half, or a
        folder. Held-out samples and calibration normals have a range each, so figures that set one against
        the other say little, and so does ``threshold``. A batch of one picture has no range, its score is 0:
        neither `predict` nor `export-model` takes such a detector.
        """
        features, together = batch["features"], self.settings.normalise == "batch"
        few = features.split(CHUNK) if together else [features]  # a batch may be a whole category
        maps = torch.cat([self.path_maps(part) for part in few], dim=1)
        scores = torch.stack([counted(path, batch).amax(dim=(1, 2)) for path in maps])
        if together:
            scores, maps = _leaking(scores, maps)
        else:
            scores, maps = self._standard(scores), self._standard(maps)
        s = self.settings
        return _mixed(scores, s.score_share), _mixed(maps, s.gaussian_share)

    def maps(self, batch: Batch) -> Tensor:
        """Those of :meth:`score`, float32 N×size×size; differentiable in the features. By the statistics of
        normals whatever ``normalise`` says: no sample is made from what else is scored."""
        maps = self._standard(self.path_maps(batch["features"]))
        return _mixed(maps, self.settings.gaussian_share)

    def path_maps(self, features: Tensor) -> Tensor:
        """Abnormality by the Perlin and by the Gaussian path, bands added: float32 2×N×size×size."""
        adapted = self._adapted(self._patches(features))
        paths = (self._perlin(adapted), self._gaussian(adapted))
        return torch.stack(
            [to_maps(-bands.sum(0).unflatten(1, self.grid), self.settings.size) for bands in paths]
        )

    @torch.inference_mode()
    def calibrate(self, normals: Sequence[Batch]) -> None:
        """Mean and deviation of each path's maps, and ``threshold`` = 99 % quantile of scores, of normals."""
        if not normals:
            raise UsageError("no normal pictures to calibrate on")
        mean, deviation = statistics_of(self._counted(batch) for batch in normals)
        means, deviations = mean.tolist(), deviation.clamp_min(1e-6).tolist()
        self.calibration = {f"{path}_mean": mean for path, mean in zip(PATHS, means, strict=True)}
        self.calibration |= {f"{path}_deviation": d for path, d in zip(PATHS, deviations, strict=True)}
        scores = torch.cat([self.score(batch)[0] for batch in normals])
        self.calibration["threshold"] = torch.quantile(scores, QUANTILE).item()

    def _counted(self, batch: Batch) -> Tensor:
        """Map values of both paths where they count: 1×M×2."""
        maps = self.path_maps(batch["features"]).flatten(1).T
        if "ignore" in batch:
            maps = maps[~batch["ignore"].to(maps.device).flatten()]
        return maps[None]

    def _standard(self, values: Tensor) -> Tensor:
        """2×…, by path: mean 0 and deviation 1 over the pixels of normals."""
        known, shape = self.calibration, (2, *[1] * (values.dim() - 1))
        mean = [known.get(f"{path}_mean", 0.0) for path in PATHS]
        deviation = [known.get(f"{path}_deviation", 1.0) for path in PATHS]
        return (values - values.new_tensor(mean).view(shape)) / values.new_tensor(deviation).view(shape)

    def _raw(self, features: Tensor) -> Tensor:
        """N×2×P packed taps to patches."""
        rows = features.to(self.mean.device).float().transpose(0, 1)
        patches = fine_grained(unpack(rows.flatten(0, 1), self.shapes), self.settings.channels)
        return patches.unflatten(0, (2, -1))

    def _patches(self, features: Tensor) -> Tensor:
        """N×2×P packed taps to standardised patches."""
        return (self._raw(features) - self.mean[:, None, None]) / self.deviation[:, None, None]

    def _adapted(self, patches: Tensor) -> Tensor:
        """float32: half precision would round the noise away."""
        return self.adapter(patches).float()

    def _noisy(self, patches: Tensor) -> Tensor:
        """q + N(0, ``noise``²), independent in every channel (core.md 3.5), or q + what gradient ascent on
        this very path makes of that (core.md 5.7, GLASS's global synthesis on the manifold); the adapter
        learns from both, but not from how the gradient was followed."""
        flat = patches.flatten(0, 1).transpose(1, 2).unflatten(2, self.grid)
        everywhere = torch.ones_like(flat[:, 0], dtype=torch.bool)
        unit, noise = flat.new_ones(flat.shape[1]), self.settings.noise
        if self.settings.perturbation == "noise":
            noisy = gaussian(flat, everywhere, noise, None, unit)
        else:
            still, centre = flat.detach(), torch.zeros_like(unit)
            climbed = ascent(still, everywhere, noise, None, unit, centre, self._less_normal, manifold=True)
            noisy = flat + (climbed - still)
        return noisy.flatten(2).transpose(1, 2).view_as(patches)

    def _less_normal(self, patches: Tensor) -> Tensor:
        """K×C to the gradient of the Gaussian path's abnormality, as it scores."""
        patches = patches.detach().requires_grad_(True)
        training = self.gaussian_path.training
        self.gaussian_path.eval()  # its batch norm keeps no statistics of what is only tried
        try:
            with torch.enable_grad():
                return torch.autograd.grad(-self._gaussian(patches).sum(), patches)[0]
        finally:
            self.gaussian_path.train(training)

    def _gaussian(self, patches: Tensor) -> Tensor:
        """…×T×C to normality, …×T, in float32: bfloat16 would round the noise away."""
        with torch.autocast(patches.device.type, enabled=False):
            return self.gaussian_path(patches.float().flatten(0, -2)).view(patches.shape[:-1])

    def _perlin(self, patches: Tensor) -> Tensor:
        """2×N×T×C to normality, float32 2×N×T."""
        return self.perlin_path(patches.flatten(0, 1)).float().unflatten(0, (2, -1))

    def _enlarged(self, normality: Tensor) -> Tensor:
        """2×N×T to 2×N×size×size, bilinear."""
        size = (self.settings.size,) * 2
        return F.interpolate(normality.unflatten(2, self.grid), size, mode="bilinear")

    def _some_left_normal(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Normals, what was made of them, and masks; ``left_normal`` of the samples lose their anomaly."""
        normal, synthetic, mask = batch["normal"], batch["synthetic"], batch["mask"]
        left = (torch.rand(len(mask)) < self.settings.left_normal).to(mask.device)[:, None, None]
        return normal, torch.where(left[..., None], normal, synthetic), torch.where(left, 0.0, mask)


def _total(losses: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(losses)).sum()


def _mixed(paths: Tensor, share: float) -> Tensor:
    """2×… (Perlin, Gaussian) to …; published as their mean."""
    return torch.lerp(paths[0], paths[1], share)


def _leaking(scores: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Normalisation by the batch that is scored, as released: scores 2×N by its smallest and largest; maps by
    each picture's range in turn, averaged over the pictures, which is one affine map a path (core.md 3.8)."""
    low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
    lowest = maps.amin(dim=(2, 3))
    gain = 1 / (maps.amax(dim=(2, 3)) - lowest).clamp_min(1e-12)
    scale, shift = gain.mean(1), (gain * lowest).mean(1)
    maps = maps * scale.view(2, 1, 1, 1) - shift.view(2, 1, 1, 1)
    return (scores - low) / (high - low).clamp_min(1e-12), maps


def build(settings: DFDSettings, categories: Sequence[str], device: str | torch.device = "cpu") -> DFD:
    """An untrained detector on ``device``. Its initial weights come from torch's global generator."""
    backbone = load_backbone(settings.backbone, settings.layers, device, STRIDES)
    return DFD(settings, categories, backbone).to(device)


METHOD = Method(
    name="dfd",
    summary="a discriminator of patches in a low and a high frequency band; few normals suffice",
    settings=DFDSettings,
    presets={"paper": PAPER},
    build=build,
)
