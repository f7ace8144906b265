"""VLAD: adapters that compare the patches of a frozen CLIP with words for good and damaged (core.md 2).

Known of VLAD is one sentence of the first abstract of CUT: a vision-language detector, trained on what CUT
generates (core.md 2.1). Network, losses, prompts and protocol were never published. **Everything here is
inference** (core.md 2.2): the design that neighbouring works of its authors suggest, which is APRIL-GAN's,
trained on samples in place of another data set. Its figures are not figures "of VLAD".

Linear adapters bring intermediate patch tokens into CLIP's joint space, where each is compared with the mean
embedding of texts that say "flawless" and of texts that say "damaged" (``text``). Each token is also compared
with those of a few normal pictures (``memory``), and the picture's own embedding with the texts (``p_cls``).

Taken from APRIL-GAN as the specification gives it: 7 normal and 5 abnormal states × 35 templates, the layers,
focal and dice loss summed over layers, Adam, the memory's 1 − cos on raw tokens. What differs, and why:

* the abnormal texts hold CUT's detailed descriptions too (core.md 2.2), of the shipped bank; articles fit the
  word after them ("an unblemished bottle");
* the factor of the cosines is the model's own learned one: 100 in OpenAI's weights, as published, and 13 in
  the shipped ones, whose adapters learn far less under 100 (met in practice);
* any tower of open_clip with ``forward_intermediates`` serves. Layers of a convolutional one differ in grid:
  each keeps its own, and only its map is resized;
* the adapters see channels standardised with the statistics of the training normals (the layers differ in
  scale); ``standardise: false`` is APRIL-GAN;
* branches and scores are scaled by figures of normal pictures, never of the test set;
* no band around the borders of masks is ignored: the masks of samples are exact, those of attention are not;
* normals are neither turned nor jittered, the learning rate warms up and falls by a cosine, and the default's
  gradients are clipped at 0.1.

A picture of a category that was not trained on is scored all the same (protocol Z of core.md 2.3): its
texts are made from its name when it is first met, and the memory, which holds nothing of it, is left out.
So train on a ``source`` of other categories with ``memory: false`` (the threshold then speaks of what is
scored), and judge or score the new one (``flawsmith evaluate --data`` or ``predict``). A picture without a
named category is an "object", and may be like a normal of any.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from detectors.patches import CHUNK, statistics_of
from detectors.protocol import Batch, Method, Settings, counted
from generation.backbones import in_unit
from generation.cut.checkpoints import POCKET
from generation.cut.clip import Clip, load_clip
from generation.cut.prompts import fill, load_bank
from manifests.errors import UsageError
from manifests.wording import fill_template, noun_of

NORMAL = (
    "{object}",
    "flawless {object}",
    "perfect {object}",
    "unblemished {object}",
    "{object} without flaw",
    "{object} without defect",
    "{object} without damage",
)
ABNORMAL = (
    "damaged {object}",
    "broken {object}",
    "{object} with flaw",
    "{object} with defect",
    "{object} with damage",
)
PHOTOS = (
    *("bad", "low resolution", "cropped", "bright", "dark", "close-up", "black and white"),
    *("jpeg corrupted", "blurry", "good"),
)
TEMPLATES = (
    *(f"a {photo} photo of {article} {{object}}." for photo in PHOTOS for article in ("a", "the")),
    *(
        f"a photo of {article} {look} {{object}}."
        for look in ("cool", "large", "small")
        for article in ("a", "the")
    ),
    *(f"a photo of {which} {{object}}." for which in ("a", "the", "my", "one")),
    *(f"there is {article} {{object}} in the scene." for article in ("a", "the")),
    *(f"this is {which} {{object}} in the scene." for which in ("a", "the", "one")),
)  # APRIL-GAN's 35
UNNAMED = "object"  # the noun of a picture whose category is not given
MEDIUM = {"area": 0.02, "severity": 0.6}  # of the anomalies that the descriptions speak of
TEXTS = 64  # texts through the text tower at once
STRIDES = (8, 16, 32)  # of the stages tapped by default; finer ones cost memory and taught nothing
BETAS = (0.5, 0.999)
LIMIT = 3.0  # deviations above the mean of normals' maxima: the map value that counts as much as p_cls = 1
QUANTILE = 0.99  # of the scores of normals: the threshold


class VladSettings(Settings):
    """The defaults learn in about a minute on two CPU cores; ``april`` is the specification's network."""

    steps: int = Field(500, ge=0, description="optimiser steps; 0: no adapters, the memory's map alone")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW; 0 makes it Adam")
    backbone: str = Field(
        POCKET, description="pocket, a folder, MODEL/TAG of open_clip, or hf-hub:OWNER/NAME"
    )
    layers: tuple[int, ...] | None = Field(
        None,
        description="blocks or stages to tap, from 1; default: four blocks, or stages of stride 8 to 32",
    )
    nouns: dict[str, str] = Field(
        default_factory=dict, description="what to call the object, by category; default: the category's name"
    )
    standardise: bool = Field(True, description="bring the adapters' inputs to mean 0 and deviation 1")
    ratio: float = Field(0.1, gt=0, description="of the image embedding's adapter to the embedding")
    memory: bool = Field(True, description="compare with the tokens of normal pictures, too")
    bank: int = Field(8, ge=1, description="normals kept in the memory, for each category")
    smooth: float = Field(
        4.0, ge=0, le=7, description="deviation of the Gaussian over maps, in pixels; 0: none"
    )

    @model_validator(mode="after")
    def _has_a_map(self) -> VladSettings:
        if self.steps == 0 and not self.memory:
            raise ValueError(
                "steps: 0 trains no adapters and memory: false keeps no normals: set one of them"
            )
        return self


APRIL = {
    "backbone": "ViT-L-14-336/openai",
    "size": 518,
    "layers": (6, 12, 18, 24),
    "standardise": False,
    "bank": 4,  # a picture takes 11 MB
    "clip": 1e9,  # none
    "lr": 1e-3,
    "batch": 8,
    "steps": 3_000,  # 5 epochs of 4800 samples
}  # validated, never run here: its weights need a hub


# -- texts ----------------------------------------------------------------------------------------------


def state_texts(noun: str) -> tuple[list[str], list[str]]:
    """The texts of a good and of a damaged object: states × templates, and CUT's descriptions (core.md 2.2).

    >>> good, damaged = state_texts("engine")
    >>> good[0], damaged[0]
    ('a bad photo of an engine.', 'a bad photo of a damaged engine.')
    """

    def photographed(states: Iterable[str]) -> list[str]:
        return [fill_template(photo, fill_template(state, noun)) for state in states for photo in TEMPLATES]

    described = [
        fill(entry, noun, **MEDIUM, draws=(0.0, (at + 0.5) / len(entry.details), 0.0, 0.0, 0.0)).detail
        for entry in load_bank().entries
        for at in range(len(entry.details))
    ]
    return photographed(NORMAL), [*photographed(ABNORMAL), *described]


def state_embeddings(clip: Clip, noun: str) -> Tensor:
    """(t_n, t_a): of each state the mean of its texts' embeddings, all of length 1. float32, 2×d.

    Raises:
        UsageError: the noun is so long that a text would be cut off.
    """

    def mean(texts: list[str]) -> Tensor:
        parts = [clip.text(texts[at : at + TEXTS]) for at in range(0, len(texts), TEXTS)]
        return F.normalize(torch.cat(parts).mean(dim=0), dim=0)

    return torch.stack([mean(texts) for texts in state_texts(noun)])


# -- losses ---------------------------------------------------------------------------------------------


def focal_loss(logits: Tensor, mask: Tensor, gamma: float = 2.0) -> Tensor:
    """−(1 − p)^γ·log p of the true state's probability p, averaged over pixels; no α. Both B×H×W."""
    surprise = F.binary_cross_entropy_with_logits(logits, mask, reduction="none")  # −log p
    return ((1 - torch.exp(-surprise)) ** gamma * surprise).mean()


def dice_loss(probability: Tensor, mask: Tensor) -> Tensor:
    """1 − (2·Σpg + 1)/(Σp + Σg + 1) of each picture, averaged; both B×H×W."""
    p, g = probability.flatten(1), mask.flatten(1)
    return (1 - (2 * (p * g).sum(1) + 1) / (p.sum(1) + g.sum(1) + 1)).mean()


# -- the detector ---------------------------------------------------------------------------------------


class Vlad(nn.Module):
    """The detector; its calls are those of ``detectors.protocol.Detector``.

    Features are packed, N×P: of each layer C·h·h values of its map, then the d of the image's embedding.

    Args:
        settings: see :class:`VladSettings`.
        categories: names of the training categories.
        clip: frozen, made for pictures of ``settings.size``.

    Raises:
        UsageError: the model has no such layers, or cannot see pictures of that size.
    """

    mean: Tensor
    deviation: Tensor
    texts: Tensor
    bank: Tensor

    def __init__(self, settings: VladSettings, categories: Sequence[str], clip: Clip):
        super().__init__()
        self.settings = settings
        self.categories = tuple(sorted(categories))
        self.calibration: dict[str, float] = {}
        self._clip = clip
        self._met: dict[str, Tensor] = {}  # texts of categories that were not trained on
        maps, embedding = _look(clip, torch.zeros(1, 3, settings.size, settings.size, dtype=torch.uint8))
        self.layers = _layers(settings, clip, [found.shape[-1] for found in maps])
        self.shapes = [(maps[layer - 1].shape[1], maps[layer - 1].shape[2]) for layer in self.layers]
        self.scale = float(clip.model.logit_scale.exp())
        self.fingerprint = _fingerprint(clip, self.layers)
        channels, width = [c for c, _ in self.shapes], embedding.shape[1]
        self.project = nn.ModuleList(nn.Linear(c, width) for c in channels)
        self.adapt = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.adapt.weight)  # the untrained image branch is CLIP's own answer
        packed = sum(c * side**2 for c, side in self.shapes) + width
        self.register_buffer("mean", torch.zeros(sum(channels)))
        self.register_buffer("deviation", torch.ones(sum(channels)))
        self.register_buffer("texts", torch.zeros(len(self.categories) + 1, 2, width))  # the last is unnamed
        kept = settings.bank if settings.memory else 0
        self.register_buffer("bank", torch.zeros(len(self.categories), kept, packed, dtype=torch.float16))

    def extract(self, images: Tensor) -> Tensor:
        """N×3×size×size, uint8 or float in [0, 1], to packed float32 features N×P."""
        maps, embedding = _look(self._clip, images, self.layers)
        return torch.cat([*(found.flatten(1) for found in maps), embedding], dim=1)

    @torch.no_grad()
    def prepare(self, normals: Tensor, categories: Sequence[str]) -> None:
        """The texts of every category, channel statistics, and the memory: normals at equal distances in the
        order given, repeated if there are too few."""
        nouns = [*(self._noun(category) for category in self.categories), UNNAMED]
        self.texts.copy_(torch.stack([state_embeddings(self._clip, noun) for noun in nouns]))
        if self.settings.standardise:
            statistics = [
                statistics_of(self._unpack(part)[0][layer] for part in normals.split(CHUNK))
                for layer in range(len(self.shapes))
            ]
            self.mean.copy_(torch.cat([mean for mean, _ in statistics]))
            self.deviation.copy_(torch.cat([deviation for _, deviation in statistics]).clamp_min(1e-6))
        for row, category in enumerate(self.categories if self.settings.memory else ()):
            own = [i for i, name in enumerate(categories) if name == category]
            if not own:
                raise UsageError(f"category {category}: no normal picture in the train split for the memory")
            chosen = torch.linspace(0, len(own) - 1, self.settings.bank).round().int().tolist()
            self.bank[row] = normals[[own[i] for i in chosen]].half()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """One group, with the specification's betas."""
        return [{"params": list(self.parameters()), "betas": BETAS}]

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Focal and dice loss of every layer's map, and cross-entropy of the picture's answer (core.md 2.2).

        A normal counts as often as a sample, with an empty mask.
        """
        parts = [self._unpack(batch[key]) for key in ("normal", "synthetic")]
        layers = [torch.cat(both) for both in zip(*(tokens for tokens, _ in parts), strict=True)]
        texts = self._texts([*batch["category"], *batch["category"]], 2 * len(batch["mask"]))
        mask = torch.cat([torch.zeros_like(batch["mask"]), batch["mask"]])
        maps = self._text_logits(layers, texts)
        focal = torch.stack([focal_loss(logits, mask) for logits in maps]).sum()
        dice = torch.stack([dice_loss(logits.sigmoid(), mask) for logits in maps]).sum()
        image = self._image_logits(torch.cat([embedding for _, embedding in parts]), texts)
        bce = F.binary_cross_entropy_with_logits(image, mask.amax(dim=(1, 2)))
        return {"loss": focal + dice + bce, "focal": focal, "dice": dice, "bce": bce}

    forward = loss

    @torch.inference_mode()
    def score(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """½·(p_cls + max S) and ½·S, with S in units that normals hardly reach (core.md 2.2). Of a picture
        with ignored places the map alone speaks: its embedding has seen them."""
        p_cls, branches = self.parts(batch)
        p_cls = _unless_ignored(p_cls, batch)
        maps = self._in_units(branches)
        return 0.5 * p_cls + counted(maps, batch).amax(dim=(1, 2)), maps

    def maps(self, batch: Batch) -> Tensor:
        """Those of :meth:`score`, float32 N×size×size; differentiable in the features."""
        return self._in_units(self.parts(batch)[1])

    def parts(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """p_cls, float32 N in [0, 1], and the maps of the branches, float32 N×size×size: ``text`` in [0, 1],
        unless no steps were trained; ``memory`` in [0, 2·layers], if the category has one.

        Raises:
            UsageError: neither branch can speak of a category.
        """
        layers, embedding = self._unpack(batch["features"])
        names = batch.get("category")
        texts = self._texts(names, len(embedding))
        branches = {}
        if self.settings.steps:
            maps = self._text_logits(layers, texts)
            branches["text"] = torch.stack([logits.sigmoid() for logits in maps]).mean(dim=0)
        if self.settings.memory:
            branches["memory"] = self._distances(layers, names)
        return self._image_logits(embedding, texts).sigmoid(), branches

    @torch.inference_mode()
    def calibrate(self, normals: Sequence[Batch]) -> None:
        """Mean and deviation of each branch's values on normals; ``unit``, from the maxima of their fused
        maps; ``threshold`` = 99 % quantile of their scores."""
        if not normals:
            raise UsageError("no normal pictures to calibrate on")
        sums: dict[str, Tensor] = {}
        for batch in normals:
            for name, found in self.parts(batch)[1].items():
                values = found.double()
                if "ignore" in batch:
                    values = values[~batch["ignore"].to(values.device)]
                values = values.flatten()
                part = torch.stack([torch.ones_like(values), values, values**2]).sum(dim=1)
                sums[name] = sums.get(name, 0) + part
        self.calibration = {}
        for name, (count, total, squares) in sums.items():
            mean = total / count
            self.calibration[f"{name}_mean"] = mean.item()
            self.calibration[f"{name}_deviation"] = max((squares / count - mean**2).item(), 1e-12) ** 0.5
        answers, maxima = [], []
        for batch in normals:
            p_cls, branches = self.parts(batch)
            answers.append(_unless_ignored(p_cls, batch))
            maxima.append(counted(self._fused(branches), batch).amax(dim=(1, 2)))
        highest = torch.cat(maxima)
        unit = (highest.mean() + LIMIT * highest.std(correction=0)).clamp_min(1e-6)
        scores = 0.5 * (torch.cat(answers) + highest / unit)
        self.calibration |= {"unit": unit.item(), "threshold": torch.quantile(scores, QUANTILE).item()}

    def _in_units(self, branches: Mapping[str, Tensor]) -> Tensor:
        return 0.5 * self._fused(branches) / self.calibration.get("unit", 1.0)

    def _fused(self, branches: Mapping[str, Tensor]) -> Tensor:
        """S = Σ (branch − mean)/deviation, smoothed; float32 N×size×size."""
        known = self.calibration
        scaled = [
            (found - known.get(f"{name}_mean", 0.0)) / known.get(f"{name}_deviation", 1.0)
            for name, found in branches.items()
        ]
        fused = torch.stack(scaled).sum(dim=0)
        if not self.settings.smooth:
            return fused
        reach = round(4 * self.settings.smooth)  # as scipy cuts it off
        return gaussian_blur(fused, 2 * reach + 1, self.settings.smooth)

    def _unpack(self, features: Tensor) -> tuple[list[Tensor], Tensor]:
        """Packed features to float32 raw tokens N×h²×C of each layer, and embeddings N×d."""
        features = features.to(self.mean.device).float()
        sizes = [channels * side**2 for channels, side in self.shapes]
        *maps, embedding = features.split([*sizes, features.shape[1] - sum(sizes)], dim=1)
        tokens = [
            found.view(len(found), channels, side**2).transpose(1, 2)
            for found, (channels, side) in zip(maps, self.shapes, strict=True)
        ]
        return tokens, embedding

    def _text_logits(self, layers: Sequence[Tensor], texts: Tensor) -> list[Tensor]:
        """Logits of the softmax over the two states, damaged less good, of each layer: float32 N×size×size.

        scale·[cos(P F, t_a) − cos(P F, t_n)], resized: the softmax over two is the sigmoid of the difference.
        """
        contrast = (texts[:, 1] - texts[:, 0])[:, None]
        widths = [channels for channels, _ in self.shapes]
        found = []
        for project, tokens, mean, deviation in zip(
            self.project, layers, self.mean.split(widths), self.deviation.split(widths), strict=True
        ):
            joint = F.normalize(project((tokens - mean) / deviation).float(), dim=-1)
            found.append(self._resized(self.scale * (joint * contrast).sum(dim=-1)))
        return found

    def _image_logits(self, embedding: Tensor, texts: Tensor) -> Tensor:
        """The same of the adapted embedding f + ratio·A f: float32 N."""
        joint = F.normalize(embedding + self.settings.ratio * self.adapt(embedding).float(), dim=-1)
        return self.scale * (joint * (texts[:, 1] - texts[:, 0])).sum(dim=-1)

    def _distances(self, layers: Sequence[Tensor], names: Sequence[str] | None) -> Tensor:
        """D = Σ_l min_q (1 − cos(f_p, m_q)) over the tokens of the category's normals, resized; over those of
        all categories where none is named. A category that the memory does not know gets the mean over
        normals, which is 0 once scaled.

        Raises:
            UsageError: it is not known, and there is no other branch.
        """
        known = {name: row for row, name in enumerate(self.categories)}
        unpacked: dict[str | None, list[Tensor]] = {}
        maps = []
        for i in range(len(layers[0])):
            name = names[i] if names is not None else None
            if name is None or name in known:
                if name not in unpacked:
                    bank = self.bank.flatten(0, 1) if name is None else self.bank[known[name]]
                    unpacked[name] = self._unpack(bank)[0]
                nearest = [
                    _cosine(tokens[i], kept.flatten(0, 1)).amax(dim=1)
                    for tokens, kept in zip(layers, unpacked[name], strict=True)
                ]
                maps.append(torch.cat([self._resized(1 - cosine[None]) for cosine in nearest]).sum(dim=0))
            elif self.settings.steps:
                mean = self.calibration.get("memory_mean", 0.0)
                maps.append(torch.full((self.settings.size,) * 2, mean, device=self.mean.device))
            else:
                raise UsageError(
                    f"category {name!r}: not one of {', '.join(self.categories)}, and steps: 0 left no "
                    "adapters that could speak of another: train with steps above 0"
                )
        return torch.stack(maps)

    def _resized(self, values: Tensor) -> Tensor:
        """N×h² to N×size×size."""
        side = math.isqrt(values.shape[1])
        size = (self.settings.size,) * 2
        return F.interpolate(values.view(-1, 1, side, side), size, mode="bilinear", align_corners=True)[:, 0]

    def _noun(self, category: str) -> str:
        return self.settings.nouns.get(category) or noun_of(category)

    def _texts(self, names: Sequence[str] | None, count: int) -> Tensor:
        """(t_n, t_a) of each picture, float32 ``count``×2×d."""
        if names is None:
            return self.texts[-1].expand(count, -1, -1)
        return torch.stack([self._text(name) for name in names])

    def _text(self, category: str) -> Tensor:
        if category in self.categories:
            return self.texts[self.categories.index(category)]
        if category not in self._met:
            self._met[category] = state_embeddings(self._clip, self._noun(category)).to(self.texts)
        return self._met[category]


def _look(clip: Clip, images: Tensor, layers: Sequence[int] | None = None) -> tuple[list[Tensor], Tensor]:
    """The frozen part.

    Args:
        images: N×3×size×size, uint8 or float in [0, 1].
        layers: blocks or stages, from 1; None: all.

    Returns:
        Their raw maps, float32 N×C×h×h, and the embeddings of the pictures, float32 N×d, of length 1.

    Raises:
        UsageError: the tower gives no intermediate maps.
    """
    visual = clip.model.visual
    if not hasattr(visual, "forward_intermediates"):
        raise UsageError(
            f"backbone {clip.name}: its image tower ({type(visual).__name__}) gives no intermediate maps; "
            "take a ViT, a ResNet or a timm tower of open_clip"
        )
    x = (in_unit(images.to(clip.device)) - clip.mean) / clip.std
    found = visual.forward_intermediates(x, indices=layers and [layer - 1 for layer in layers])
    return found["image_intermediates"], F.normalize(found["image_features"], dim=-1)


def _layers(settings: VladSettings, clip: Clip, sides: Sequence[int]) -> tuple[int, ...]:
    """The layers to tap, from 1, of a tower whose maps have these sides.

    Raises:
        UsageError: it has no such layers, or its patches do not fill the picture.
    """
    count, size = len(sides), settings.size
    patch = getattr(clip.model.visual, "patch_size", (1, 1))[0]
    if size % patch:
        raise UsageError(
            f"size {size}: backbone {clip.name} sees patches of {patch} pixels; take a multiple, such as "
            f"{max(1, round(size / patch)) * patch}"
        )
    if settings.layers is not None:
        if not settings.layers or not set(settings.layers) <= set(range(1, count + 1)):
            raise UsageError(f"layers {list(settings.layers)}: backbone {clip.name} has 1 to {count}")
        return tuple(sorted(set(settings.layers)))
    if len(set(sides)) == 1:
        return tuple(sorted({math.ceil(count * quarter / 4) for quarter in (1, 2, 3, 4)}))
    return tuple(at for at, side in enumerate(sides, 1) if round(size / side) in STRIDES)


def _fingerprint(clip: Clip, layers: Sequence[int]) -> str:
    """Of the model and its layers; equal ones give the same features up to rounding."""
    known = clip.identity
    version = known.get("weights") or known.get("revision") or known["source"]
    return f"{known['id']}:{version}:{'+'.join(map(str, layers))}"


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of every row with every row: N×M."""
    return F.normalize(a, dim=1) @ F.normalize(b, dim=1).T


def _unless_ignored(p_cls: Tensor, batch: Batch) -> Tensor:
    if "ignore" not in batch:
        return p_cls
    return p_cls.masked_fill(batch["ignore"].to(p_cls.device).flatten(1).any(dim=1), 0.0)


def build(settings: VladSettings, categories: Sequence[str], device: str | torch.device = "cpu") -> Vlad:
    """An untrained detector on ``device``. Its initial weights come from torch's global generator."""
    return Vlad(settings, categories, load_clip(settings.backbone, device, settings.size)).to(device)


VLAD = Method(
    name="vlad",
    summary="compares patches with words for good and damaged in CLIP's space, and with normal pictures",
    settings=VladSettings,
    presets={"april": APRIL},
    build=build,
    open_categories=True,
)
