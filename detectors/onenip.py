"""OneNIP: reconstruction from one normal picture's features, and a refiner (Gao, ECCV 2024; core.md 4).

A transformer rebuilds the features of a picture out of those of a normal one, the prompt. Because the
output stream starts from the prompt, an anomaly cannot be copied through: where rebuilt and real features
differ, something is wrong (``rec``). A small convolutional head, trained on synthetic anomalies, turns that
difference into a sharp mask (``ref``).

What differs from the released code, and why:

* channels are standardised with the statistics of the training normals (inference: the taps of a backbone
  differ in scale, and raw ones need far more steps); ``standardise: false`` restores the paper;
* the refiner has a cross-entropy beside the dice (inference): the dice's gradient vanishes once a mask is
  empty, and at a high learning rate the refiner then stays dead (met in practice); ``bce_weight: 0`` is the
  paper;
* the prompt is the nearest of a small bank of normals, so no class label is needed at test time (core.md
  4.6); ``fixed`` and ``random`` are the paper's ways, but among the bank's, where the paper draws from all
  normals of the train split: a checkpoint does not hold these;
* the weight of ``ref`` comes from normal pictures only (core.md 4.6), never from the test set;
* anomalies are the run's samples (``generation.preset: onenip`` draws nearly the paper's), the learning rate
  falls by a cosine after a warm-up, and no epoch is chosen on the test set.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from detectors.coreset import k_centre
from detectors.patches import CHUNK, statistics_of
from detectors.protocol import Batch, Method, Settings, counted
from generation.backbones import DEFAULT, Backbone, load_backbone
from generation.feature.operators import jitter
from manifests.errors import UsageError

POOL = 16  # the score is the largest mean of this many pixels a side (core.md 4.6)
QUANTILE = 0.99  # of the scores of normals: the threshold


class OneNIPSettings(Settings):
    """The defaults learn in about a minute on two CPU cores; ``paper`` is the published network."""

    steps: int = Field(500, ge=0, description="optimiser steps")
    lr: float = Field(2e-3, gt=0, description="peak learning rate")
    backbone: str = Field(DEFAULT, description="a timm model or a folder")
    layers: tuple[str, ...] | None = Field(None, description="modules to tap; default: all up to stride 16")
    hidden: int = Field(64, ge=8, description="width of the transformer; a multiple of heads and of 2")
    depth: int = Field(1, ge=1, description="layers of the encoder, and of the decoder")
    heads: int = Field(4, ge=1)
    ffn: int = Field(256, ge=8, description="width of the feed-forward parts")
    dropout: float = Field(0.0, ge=0, lt=1)
    refiner: int = Field(64, ge=1, description="width of the refiner")
    jitter: float = Field(20.0, ge=0, description="scale of the feature noise in training")
    standardise: bool = Field(True, description="bring every channel to mean 0 and deviation 1")
    prompt: Literal["nearest", "fixed", "random"] = Field("nearest", description="which normal is the prompt")
    bank: int = Field(8, ge=1, description="normals kept as prompts, for each category")
    recon_weight: float = Field(1.0, ge=0)
    dice_weight: float = Field(0.5, ge=0)
    bce_weight: float = Field(0.5, ge=0, description="of the refiner's cross-entropy; the paper has none")


PAPER = {
    "backbone": "tf_efficientnet_b4",
    "hidden": 256,
    "depth": 4,
    "heads": 8,
    "ffn": 1024,
    "dropout": 0.1,
    "refiner": 128,
    "standardise": False,
    "bce_weight": 0.0,
    "prompt": "random",
    "lr": 1e-4,
    "batch": 64,
    "steps": 57_000,  # 1000 epochs of MVTec AD's 3629 normals
}


def neighbour_mask(side: int, width: int) -> Tensor:
    """Which tokens a token may not attend to: those within ``width // 2`` rows and columns, itself included.

    Returns:
        bool, (side²)×(side²); True = forbidden. 49 for an inner token with width 7, 81 with 8, 121 with 10.

    Source: core.md 4.3.
    """
    place = torch.arange(side * side)
    rows, columns = place // side, place % side
    near_rows = (rows[:, None] - rows[None]).abs() <= width // 2
    near_columns = (columns[:, None] - columns[None]).abs() <= width // 2
    return near_rows & near_columns


def jittered(tokens: Tensor, scale: float) -> Tensor:
    """Tokens with noise of deviation ``scale``·‖token‖₂/C, independent in every element (core.md 4.3).

    Args:
        tokens: B×T×C.
    """
    everywhere = torch.ones(*tokens.shape[:2], 1, dtype=torch.bool, device=tokens.device)
    return jitter(tokens.transpose(1, 2)[..., None], everywhere, scale, None)[..., 0].transpose(1, 2)


def dice_loss(probability: Tensor, mask: Tensor) -> Tensor:
    """1 − (Σpg + 1)/(Σ(p² + g²) + 1) of each picture, averaged; both B×H×W.

    Without the usual factor 2 (core.md 4.4): a perfect large mask costs ½, an empty prediction of an empty
    mask 0. Only the gradient matters.
    """
    p, g = probability.flatten(1), mask.flatten(1)
    return (1 - ((p * g).sum(1) + 1) / ((p**2).sum(1) + (g**2).sum(1) + 1)).mean()


def largest_mean(maps: Tensor, side: int) -> Tensor:
    """The largest mean of ``side``×``side`` pixels of each map: B×H×W to B.

    As products with banded matrices: pooling over so large a window is slow, in ONNX Runtime most of all.
    """
    height, width = (_sliding_mean(length, side, maps) for length in maps.shape[1:])
    return (height @ maps @ width.T).amax(dim=(1, 2))


def _sliding_mean(length: int, side: int, like: Tensor) -> Tensor:
    place = torch.arange(length, device=like.device)
    offset = place - place[: length - side + 1, None]
    return ((offset >= 0) & (offset < side)).to(like.dtype) / side


class Feedforward(nn.Sequential):
    def __init__(self, s: OneNIPSettings):
        super().__init__(
            nn.Linear(s.hidden, s.ffn), nn.ReLU(), nn.Dropout(s.dropout), nn.Linear(s.ffn, s.hidden)
        )


class Attention(nn.Module):
    """Post-norm residual attention; the position is added to queries and keys, not to values."""

    def __init__(self, s: OneNIPSettings):
        super().__init__()
        self.attention = nn.MultiheadAttention(s.hidden, s.heads, dropout=s.dropout, batch_first=True)
        self.dropout = nn.Dropout(s.dropout)
        self.norm = nn.LayerNorm(s.hidden)

    def forward(self, x: Tensor, other: Tensor, position: Tensor, forbidden: Tensor | None) -> Tensor:
        a = self.attention
        parts = zip(a.in_proj_weight.chunk(3), a.in_proj_bias.chunk(3), strict=True)
        q, k, v = (
            F.linear(tokens, weight, bias).unflatten(-1, (a.num_heads, -1)).transpose(1, 2)
            for tokens, (weight, bias) in zip((x + position, other + position, other), parts, strict=True)
        )
        allowed = None if forbidden is None else ~forbidden
        found = _attend(q, k, v, allowed, a.dropout if self.training else 0.0)
        return self.norm(x + self.dropout(a.out_proj(found.transpose(1, 2).flatten(2))))


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, dropout: float) -> Tensor:
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, allowed, dropout)
    with torch.autocast("cpu", enabled=False):  # in bfloat16 it takes twice as long there (measured)
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), allowed, dropout)


class EncoderLayer(nn.Module):
    def __init__(self, s: OneNIPSettings):
        super().__init__()
        self.attend = Attention(s)
        self.feedforward = Feedforward(s)
        self.dropout = nn.Dropout(s.dropout)
        self.norm = nn.LayerNorm(s.hidden)

    def forward(self, x: Tensor, position: Tensor, forbidden: Tensor) -> Tensor:
        x = self.attend(x, x, position, forbidden)
        return self.norm(x + self.dropout(self.feedforward(x)))


class DecoderLayer(nn.Module):
    """Bidirectional: the prompt looks at the target, then the target at the prompt (core.md 4.3)."""

    def __init__(self, s: OneNIPSettings):
        super().__init__()
        self.prompt_attends = Attention(s)
        self.feedforward = Feedforward(s)
        self.dropout = nn.Dropout(s.dropout)
        self.norm = nn.LayerNorm(s.hidden)
        self.target_attends = Attention(s)

    def forward(
        self, prompt: Tensor, target: Tensor, position: Tensor, forbidden: Tensor
    ) -> tuple[Tensor, Tensor]:
        prompt = self.prompt_attends(prompt, target, position, forbidden)
        prompt = self.norm(prompt + self.dropout(self.feedforward(prompt)))
        target = self.target_attends(target, prompt, position, forbidden)
        return prompt, target


class Reconstruction(nn.Module):
    """Tokens of a target and of a prompt, both B×T×C, to the target's rebuilt tokens B×T×C."""

    forbidden: Tensor

    def __init__(self, s: OneNIPSettings, channels: int, side: int):
        super().__init__()
        self.project = nn.Linear(channels, s.hidden)
        self.rows = nn.Parameter(torch.rand(side, 1, s.hidden // 2))
        self.columns = nn.Parameter(torch.rand(1, side, s.hidden // 2))
        self.encoder = nn.ModuleList(EncoderLayer(s) for _ in range(s.depth))
        self.decoder = nn.ModuleList(DecoderLayer(s) for _ in range(s.depth))
        self.last = Attention(s)
        self.unproject = nn.Linear(s.hidden, channels)
        self.register_buffer("forbidden", neighbour_mask(side, side // 2), persistent=False)
        for parameter in [*self.encoder.parameters(), *self.decoder.parameters(), *self.last.parameters()]:
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, target: Tensor, prompt: Tensor) -> Tensor:
        side = len(self.rows)
        position = torch.cat([self.rows.expand(-1, side, -1), self.columns.expand(side, -1, -1)], dim=-1)
        position = position.flatten(0, 1)
        both = self.project(torch.cat([target, prompt]))
        for layer in self.encoder:
            both = layer(both, position, self.forbidden)
        target, prompt = both.split([target.shape[0], prompt.shape[0]])
        if prompt.shape[0] < target.shape[0]:  # one prompt serves a normal and its anomaly
            prompt = prompt.repeat(target.shape[0] // prompt.shape[0], 1, 1)
        for layer in self.decoder:
            prompt, target = layer(prompt, target, position, self.forbidden)
        return self.unproject(self.last(prompt, target, position, None))


class Refiner(nn.Sequential):
    """Absolute error N×C×h×w to logits N×1×4h×4w (core.md 4.3)."""

    def __init__(self, channels: int, width: int):
        layers: list[nn.Module] = []
        for inputs in (channels, width):
            layers += [
                nn.Conv2d(inputs, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(),
                nn.ConvTranspose2d(width, width, 2, stride=2),
            ]
        super().__init__(*layers, nn.Conv2d(width, 1, 1))


class OneNIP(nn.Module):
    """The detector; its calls are those of ``detectors.protocol.Detector``.

    Args:
        settings: see :class:`OneNIPSettings`.
        categories: names of the training categories.
        backbone: frozen; its features are C×h×h with h = ``side``.
    """

    mean: Tensor
    deviation: Tensor
    bank: Tensor

    def __init__(self, settings: OneNIPSettings, categories: Sequence[str], backbone: Backbone):
        super().__init__()
        self.settings = settings
        self.categories = tuple(sorted(categories))
        self.fingerprint = backbone.fingerprint
        self.calibration: dict[str, float] = {}
        self._backbone = backbone
        channels, self.side = backbone.channels, math.ceil(settings.size / backbone.stride)
        self.reconstruction = Reconstruction(settings, channels, self.side)
        self.refiner = Refiner(channels, settings.refiner)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("deviation", torch.ones(channels))
        tokens = self.side**2
        self.register_buffer(
            "bank",
            torch.zeros(len(self.categories), settings.bank, tokens, channels, dtype=torch.float16),
        )

    def extract(self, images: Tensor) -> Tensor:
        """N×3×size×size, uint8 or float in [0, 1], to float32 N×C×h×h."""
        return self._backbone.features(images)

    def prepare(self, normals: Tensor, categories: Sequence[str]) -> None:
        """Channel statistics and the bank of prompts.

        The bank holds, for each category, the normals that lie farthest from one another (pooled features;
        greedy, from the most typical one), repeated if there are too few.
        """
        if self.settings.standardise:
            mean, deviation = _channel_statistics(normals)
            self.mean.copy_(mean)
            self.deviation.copy_(deviation)
        for row, category in enumerate(self.categories):
            own = normals[[i for i, name in enumerate(categories) if name == category]]
            if not len(own):
                raise UsageError(
                    f"category {category}: no normal picture in the train split to serve as a prompt"
                )
            kept = k_centre(_pooled(self._tokens(own)), self.settings.bank)
            kept = [kept[i % len(kept)] for i in range(self.settings.bank)]
            self.bank[row] = self._tokens(own[kept]).half()

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters())}]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Reconstruction of normals, restoration of anomalies, and the refiner's dice (core.md 4.4)."""
        s = self.settings
        normal, synthetic, prompt = (self._tokens(batch[k]) for k in ("normal", "synthetic", "prompt"))
        real = torch.cat([normal, synthetic])
        clean = torch.cat([normal, normal])
        rebuilt = self.reconstruction(jittered(real, s.jitter), jittered(prompt, s.jitter))
        recon = F.mse_loss(rebuilt.float(), clean)
        mask = batch["mask"]
        mask = torch.cat([torch.zeros_like(mask), mask])
        logits = self._refine(rebuilt, real)
        dice = dice_loss(logits.sigmoid(), mask)
        bce = F.binary_cross_entropy_with_logits(logits, mask)
        loss = s.recon_weight * recon + s.dice_weight * dice + s.bce_weight * bce
        return {"loss": loss, "recon": recon, "dice": dice, "bce": bce}

    forward = loss

    @torch.inference_mode()
    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """½·rec + ½·κ·ref, and the largest mean of 16×16 pixels of it (core.md 4.6)."""
        maps = self.maps(batch)
        return largest_mean(counted(maps, batch), POOL), maps

    def maps(self, batch: Batch) -> Tensor:
        """Those of :meth:`score`, float32 N×size×size; differentiable in the features."""
        rec, ref = self.parts(batch)
        return 0.5 * rec + 0.5 * self.calibration.get("kappa", 1.0) * ref

    def parts(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """``rec`` (0 and more) and ``ref`` (in [0, 1]), float32 N×size×size."""
        real = self._tokens(batch["features"])
        rebuilt = self.reconstruction(real, self._prompts(real, batch.get("category")))
        size = (self.settings.size,) * 2
        error = (rebuilt.float() - real).norm(dim=-1).view(-1, 1, self.side, self.side)
        rec = F.interpolate(error, size, mode="bilinear", align_corners=True)[:, 0]
        return rec, self._refine(rebuilt, real).sigmoid()

    @torch.inference_mode()
    def calibrate(self, normals: Sequence[Batch]) -> None:
        """κ = ½·max of ``rec`` over normals; ``threshold`` = 99 % quantile of their scores."""
        if not normals:
            raise UsageError("no normal pictures to calibrate on")
        largest = max(counted(self.parts(batch)[0], batch).max().item() for batch in normals)
        self.calibration = {"kappa": 0.5 * largest}
        scores = torch.cat([self.score(batch)[0] for batch in normals])
        self.calibration["threshold"] = torch.quantile(scores.float(), QUANTILE).item()

    def _tokens(self, features: Tensor) -> Tensor:
        """N×C×h×h features to standardised float32 tokens N×h²×C."""
        tokens = features.to(self.mean.device).float().flatten(2).transpose(1, 2)
        return (tokens - self.mean) / self.deviation

    def _refine(self, rebuilt: Tensor, real: Tensor) -> Tensor:
        """Logits of the mask, float32 N×size×size."""
        error = (rebuilt - real).abs().transpose(1, 2).unflatten(2, (self.side, self.side))
        logits = self.refiner(error.contiguous(memory_format=torch.channels_last))
        logits = F.interpolate(logits.float(), (self.settings.size,) * 2, mode="bilinear", align_corners=True)
        return logits[:, 0]

    def _prompts(self, tokens: Tensor, categories: Sequence[str] | None) -> Tensor:
        """One prompt a picture, out of the bank."""
        bank = self.bank.float()
        if self.settings.prompt == "nearest":
            bank = bank.flatten(0, 1)
            likeness = F.normalize(_pooled(tokens), dim=1) @ F.normalize(_pooled(bank), dim=1).T
            return bank[likeness.argmax(dim=1)]
        if categories is None or not set(categories) <= set(self.categories):
            raise UsageError(
                f"prompt: {self.settings.prompt} needs the category of every picture, one of "
                f"{list(self.categories)}, found {categories and sorted(set(categories))}; "
                "or use prompt: nearest"
            )
        rows = torch.tensor([self.categories.index(name) for name in categories], device=bank.device)
        if self.settings.prompt == "fixed":
            return bank[rows, 0]
        # Drawn by the picture itself, so that it gets the same prompt whatever it is scored with.
        stored = tokens.detach().half().cpu().numpy()
        picked = [zlib.crc32(one.tobytes()) % self.settings.bank for one in stored]
        return bank[rows, torch.tensor(picked, device=bank.device)]


def _channel_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    mean, deviation = statistics_of(part.float().flatten(2).transpose(1, 2) for part in features.split(CHUNK))
    return mean, deviation.clamp_min(1e-6)


def _pooled(tokens: Tensor) -> Tensor:
    return tokens.float().mean(dim=1)


def build(settings: OneNIPSettings, categories: Sequence[str], device: str | torch.device = "cpu") -> OneNIP:
    """An untrained detector on ``device``. Its initial weights come from torch's global generator."""
    backbone = load_backbone(settings.backbone, settings.layers, device)
    return OneNIP(settings, categories, backbone).to(device)


ONENIP = Method(
    name="onenip",
    summary="rebuilds features from one normal picture; a refiner sharpens the difference",
    settings=OneNIPSettings,
    presets={"paper": PAPER},
    build=build,
    features=lambda settings: settings.model_dump(include={"backbone", "layers", "size"}),
)
