"""The pocket diffusion model: a small UNet on the autoencoder's latents, and its text encoder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import CLIPTextConfig, CLIPTextModel

from training.pocket import autoencoder, legs
from training.pocket.captions import defect_caption, normal_caption, thing
from training.pocket.damage import damage
from training.pocket.pictures import SIDE, Photographs, numbered
from training.pocket.vocabulary import Vocabulary

WIDTHS = (96, 192)
TEXT_WIDTH = 128
BATCH = 32
REUSED = 2  # steps on the same pictures, under other noise: drawing and encoding them takes a fifth of a step
PEAK = 7e-4
TEXT_RATE = 2.0  # of the learning rate, for the text encoder and what listens to it: they learn last
TOKENS = "embeddings.token_embedding.weight"  # of the text encoder
DROPPED = 0.1  # captions left empty, for classifier-free guidance
EMPHASIS = 8.0  # weight of a latent that a defect covers, over one that it does not touch
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def unet() -> Any:
    network: Any = UNet2DConditionModel(
        sample_size=SIDE // 8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )
    network.set_attn_processor(AttnProcessor())  # on a CPU the fused kernel's backward pass is slower
    return network


def text_encoder(vocabulary_size: int) -> CLIPTextModel:
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary_size,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            projection_dim=TEXT_WIDTH,
            bos_token_id=vocabulary_size - 2,
            eos_token_id=vocabulary_size - 1,
        )
    )
    encoder.set_attn_implementation("eager")  # as in the UNet
    return encoder


class Model(nn.Module):
    """UNet and text encoder, trained together."""

    def __init__(self, vocabulary_size: int):
        super().__init__()
        self.unet: Any = unet()
        self.text: Any = text_encoder(vocabulary_size)


@torch.no_grad()
def start_with_words(model: Model) -> None:
    """Sets the weights so that the new UNet hears each word from the first step.

    From the usual random weights the words meant next to nothing after 2,000 steps: the text encoder's states
    grew along one direction that all tokens share, and of 77 tokens, some ten of them words, each got a 77th
    of the attention. Here a token begins as itself (strong embeddings, residual branches at zero), and the
    padding (end of text) as one direction that a constant feature of every query meets with a logit of −8.
    """
    direction = torch.ones(TEXT_WIDTH)
    direction[1::2] = -1  # of mean 0, so that the final norm keeps it
    table = model.text.get_parameter(TOKENS)
    nn.init.normal_(table)
    table -= (table @ direction / TEXT_WIDTH)[:, None] * direction
    table[-1] = 3 * direction
    for name, weight in model.text.named_parameters():
        if "position_embedding" in name:
            nn.init.normal_(weight, std=0.1)
        elif "out_proj" in name or "fc2" in name:
            nn.init.zeros_(weight)
    blocks: list[Any] = [m for m in model.unet.modules() if isinstance(m, BasicTransformerBlock)]
    for block in blocks:
        block.norm2.weight[0], block.norm2.bias[0] = 0, 1
        heads = block.attn2.heads
        depth = block.attn2.to_q.out_features // heads
        for first in range(0, heads * depth, depth):
            block.attn2.to_q.weight[first] = 0
            block.attn2.to_q.weight[first, 0] = 4 * depth**0.5
            block.attn2.to_k.weight[first] = -2 * direction / TEXT_WIDTH


@dataclass(frozen=True)
class Latents:
    """Encoded training pictures. ``latents`` float32 N×4×16×16, unscaled posterior means; ``cover`` float32
    N×1×16×16, share of each cell that a defect covers; ``captions`` one a picture."""

    latents: Tensor
    cover: Tensor
    captions: list[str]


class Encoded(IterableDataset[Latents]):
    """Scenes from ``start`` on: each once as it is and twice damaged, encoded by the frozen autoencoder."""

    def __init__(self, seed: int, start: int, scenes: int, photos: Photographs, vae: Any):
        self.seed, self.start, self.scenes, self.photos, self.vae = seed, start, scenes, photos, vae

    def __iter__(self) -> Iterator[Latents]:
        cv2.setNumThreads(0)
        torch.set_num_threads(1)
        number = self.start
        while True:
            yield self._encode(range(number, number + self.scenes))
            number += self.scenes

    @torch.inference_mode()
    def _encode(self, numbers: range) -> Latents:
        pictures, covers, captions = [], [], []
        for number in numbers:
            rng, scene = numbered(self.seed, number, self.photos)
            noun = thing(rng, scene)
            found = [damage(rng, scene) for _ in range(2)]
            pictures += [scene.pixels, *(one.pixels for one in found)]
            covers += [
                np.zeros(scene.part.shape, np.float32),
                *(one.mask.astype(np.float32) for one in found),
            ]
            captions += [normal_caption(rng, noun), *(defect_caption(rng, noun, one) for one in found)]
        images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2 - 1
        with torch.autocast("cpu", torch.bfloat16):
            means = self.vae.encode(images).latent_dist.mean.float()
        cover = nn.functional.avg_pool2d(torch.from_numpy(np.stack(covers))[:, None], 8)
        return Latents(means.clone(), cover, captions)


def frozen_autoencoder(out: Path) -> Any:
    """The average of the trained autoencoder."""
    state = legs.load(out / "autoencoder.pt")
    assert state is not None, "the autoencoder comes first"
    vae = autoencoder.network()
    vae.load_state_dict(state["average"])
    return vae.eval().requires_grad_(False)


def measure_scaling(vae: Any, photos: Photographs) -> float:
    """1 / deviation of the latents over 384 training pictures: the checkpoint's ``scaling_factor``."""
    sample = next(iter(Encoded(987_654, 0, 128, photos, vae)))
    return float(1 / sample.latents.std())


def train(out: Path, steps: int, seed: int, photos: Photographs) -> Path:
    """Trains, or goes on training, until ``steps``; returns the checkpoint ``diffusion.pt``."""
    path = out / "diffusion.pt"
    torch.manual_seed(seed)
    words = Vocabulary()
    model = Model(words.size)
    start_with_words(model)
    vae = frozen_autoencoder(out)
    state = legs.load(path)
    threads = torch.get_num_threads()
    scaling = state["scaling"] if state else round(measure_scaling(vae, photos), 5)
    torch.set_num_threads(threads)  # encoding here set it to 1
    listening = [p for name, p in model.named_parameters() if name.startswith("text.") or ".attn2." in name]
    ids_of = {id(p) for p in listening}
    others = [p for p in model.parameters() if id(p) not in ids_of]
    optimiser = torch.optim.AdamW(
        [{"params": others, "scale": 1.0}, {"params": listening, "scale": TEXT_RATE}],
        lr=PEAK,
        betas=(0.9, 0.99),
        weight_decay=1e-3,
        fused=True,
    )
    alphas = DDIMScheduler.from_config(SCHEDULE).alphas_cumprod

    def batches(step: int) -> Iterator[Latents]:
        scenes = BATCH // 3 + 1  # three pictures each
        first = step // REUSED * scenes
        drawn = Encoded(seed, first, scenes, photos, vae)
        found = iter(DataLoader(drawn, batch_size=None, num_workers=1, prefetch_factor=4))
        torch.set_num_threads(threads)
        batch = next(found)
        while True:
            yield batch
            step += 1
            if step % REUSED == 0:
                batch = next(found)

    def loss(batch: Latents, step: int) -> legs.Loss:
        stream = torch.Generator().manual_seed(seed * 1_000_003 + step)
        pick = torch.randperm(len(batch.captions), generator=stream)[:BATCH]
        captions = [batch.captions[i] for i in pick.tolist()]
        dropped = (torch.rand(BATCH, generator=stream) < DROPPED).tolist()
        ids = words(["" if empty else caption for empty, caption in zip(dropped, captions, strict=True)])
        error = _error(model, batch.latents[pick] * scaling, batch.cover[pick], ids, alphas, stream)
        return legs.Loss(error, error.item())

    return legs.run(
        path, model, optimiser, steps, PEAK, BATCH, batches, loss, "loss {:.4f}".format, {"scaling": scaling}
    )


def _error(
    model: Model, clean: Tensor, cover: Tensor, ids: Tensor, alphas: Tensor, stream: torch.Generator
) -> Tensor:
    """Squared error of v, heavier where the defect is.

    Timesteps are drawn evenly and weigh alike. (Min-SNR weights, and more of the low noise levels that
    synthesis uses, were tried and taught the words next to nothing: at low noise a defect is seen, not read.)
    """
    t = torch.randint(1000, (len(clean),), generator=stream)
    noise = torch.randn(clean.shape, generator=stream)
    alpha = alphas[t].view(-1, 1, 1, 1)
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    wanted = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    with torch.autocast("cpu", torch.bfloat16):
        text = model.text(ids).last_hidden_state
        found = model.unet(noisy, t, text).sample
    place = 1 + (EMPHASIS - 1) * cover.sqrt()
    return (place * (found.float() - wanted).square()).mean() / place.mean()
