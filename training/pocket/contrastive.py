"""The pocket CLIP: EfficientNet-Lite0 with ImageNet weights and a small text tower, trained to tell defects.

Each picture is compared with captions of the same thing that name every defect, or none: telling the true
one is what the model is for. A symmetric contrastive loss over the batch keeps the space usable for whole
captions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from generation.backbones import lite0_weights
from training.pocket import legs
from training.pocket.captions import NOUNS, article, defect_caption, normal_caption, thing
from training.pocket.damage import DRAWERS, damage
from training.pocket.pictures import Photographs, numbered
from training.pocket.vocabulary import Vocabulary

IMAGE = 160  # side of the pictures it sees, in pixels
BATCH = 32
PEAK = 1e-3
TRUNK_RATE = 0.15  # of the learning rate, for the ImageNet weights
LARGEST_SCALE = math.log(100)  # of the logits, as published for CLIP
FROZEN_STAGES = 2  # of the trunk: edges and textures need no retraining
DEFECTS = list(DRAWERS)
CONFIG: dict[str, Any] = {
    "embed_dim": 128,
    "vision_cfg": {
        "timm_model_name": "tf_efficientnet_lite0",
        "timm_model_pretrained": False,
        "timm_pool": "avgmax",  # a small defect must not drown in the mean
        "timm_proj": "mlp",
        "image_size": IMAGE,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 96, "heads": 4, "layers": 3},
}
PREPROCESS: dict[str, Any] = {
    "mean": [127 / 255] * 3,
    "std": [128 / 255] * 3,
    "interpolation": "bicubic",
    "resize_mode": "squash",
}


@dataclass(frozen=True)
class Captioned:
    """``images`` uint8 N×side×side×3; ``captions``; ``nouns``; ``labels`` int64, index of the defect, the
    last for none."""

    images: Tensor
    captions: list[str]
    nouns: list[str]
    labels: Tensor


class CaptionedPictures(IterableDataset[Captioned]):
    def __init__(self, seed: int, start: int, size: int, photos: Photographs):
        self.seed, self.start, self.size, self.photos = seed, start, size, photos

    def __iter__(self) -> Iterator[Captioned]:
        cv2.setNumThreads(0)
        number = self.start
        while True:
            yield self.draw(range(number, number + self.size))
            number += self.size

    def draw(self, numbers: range) -> Captioned:
        images, captions, nouns, labels = [], [], [], []
        for number in numbers:
            rng, scene = numbered(self.seed, number, self.photos)
            noun = thing(rng, scene)
            if rng.random() < 0.1:
                pixels, caption, label = scene.pixels, normal_caption(rng, noun), len(DEFECTS)
            else:
                found = damage(rng, scene)
                pixels, label = found.pixels, DEFECTS.index(found.defect)
                caption = defect_caption(rng, noun, found)
            images.append((pixels * 255 + 0.5).astype(np.uint8))
            captions.append(caption)
            nouns.append(noun)
            labels.append(label)
        return Captioned(torch.from_numpy(np.stack(images)), captions, nouns, torch.tensor(labels))


def network(vocabulary_size: int) -> Any:
    """A new model whose text tower knows the small vocabulary only, the trunk with its ImageNet weights."""
    small = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "vocab_size": vocabulary_size}}
    model = open_clip.CLIP(**small)
    trunk = model.visual.trunk
    weights = {k: v for k, v in lite0_weights().items() if not k.startswith("classifier")}
    trunk.load_state_dict(weights)
    for module in (trunk.conv_stem, trunk.bn1, *trunk.blocks[:FROZEN_STAGES]):
        module.requires_grad_(False)
    return model


def prompts(noun: str) -> list[str]:
    """One caption a defect, and one of none."""
    words = [NOUNS[name][0] for name in DEFECTS]
    phrases = [word if word in ("contamination", "discoloration") else article(word) for word in words]
    return [
        *(f"a photo of {article(noun)} with {phrase}" for phrase in phrases),
        f"a photo of {article(noun)}",
    ]


def train(out: Path, steps: int, seed: int, photos: Photographs) -> Path:
    """Trains, or goes on training, until ``steps``; returns the checkpoint ``contrastive.pt``."""
    path = out / "contrastive.pt"
    torch.manual_seed(seed)
    words = Vocabulary()
    model = network(words.size)
    trunk = [p for p in model.visual.trunk.parameters() if p.requires_grad]
    others = [p for name, p in model.named_parameters() if not name.startswith("visual.trunk.")]
    optimiser = torch.optim.AdamW(
        [{"params": trunk, "scale": TRUNK_RATE}, {"params": others, "scale": 1.0}],
        lr=PEAK,
        weight_decay=1e-2,
        fused=True,
    )
    model.train()
    model.visual.trunk.eval()  # the norms keep ImageNet's statistics: batches are small

    def batches(step: int) -> Iterator[Captioned]:
        drawn = CaptionedPictures(seed + 2, step * BATCH, BATCH, photos)
        return iter(DataLoader(drawn, batch_size=None, num_workers=1, prefetch_factor=8))

    def loss(batch: Captioned, _step: int) -> legs.Loss:
        with torch.no_grad():
            model.logit_scale.clamp_(max=LARGEST_SCALE)
        return _loss(model, words, batch)

    return legs.run(
        path, model, optimiser, steps, PEAK, BATCH, batches, loss, lambda share: f"{share:.1%} told"
    )


def seen(images: Tensor) -> Tensor:
    """uint8 N×side×side×3 to the normalised float32 N×3×IMAGE×IMAGE that the tower sees."""
    x = images.permute(0, 3, 1, 2).float() / 255
    x = F.interpolate(x, (IMAGE, IMAGE), mode="bicubic", align_corners=False, antialias=True)
    return (x - PREPROCESS["mean"][0]) / PREPROCESS["std"][0]


def _loss(model: Any, words: Vocabulary, batch: Captioned) -> legs.Loss:
    # In float32: the trunk's depthwise convolutions are slower in bfloat16 on a CPU.
    image = model.encode_image(seen(batch.images), normalize=True)
    own = sorted(set(batch.nouns))[:2]  # a few nouns a step; every picture is compared under one of them
    names = [noun if noun in own else own[at % len(own)] for at, noun in enumerate(batch.nouns)]
    text = model.encode_text(
        words([*(p for noun in own for p in prompts(noun)), *batch.captions]), normalize=True
    )
    scale = model.logit_scale.exp()
    table = text[: len(own) * (len(DEFECTS) + 1)].view(len(own), len(DEFECTS) + 1, -1)
    chosen = table[torch.tensor([own.index(name) for name in names])]
    told = scale * torch.einsum("nd,nkd->nk", image, chosen)
    logits = scale * image @ text[len(own) * (len(DEFECTS) + 1) :].T
    target = torch.arange(len(image))
    symmetric = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    right = float((told.argmax(1) == batch.labels).float().mean())
    return legs.Loss(F.cross_entropy(told, batch.labels) + 0.5 * symmetric, right)
