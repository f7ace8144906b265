"""Floating-point operations of diffusion samplers, counted on networks that take no memory and no time.

    python -m tests.benchmarks.flops

A sampler's cost is the sum over its building blocks of (operations once) × (calls). Blocks are counted by
``torch.utils.flop_counter`` on the meta device, where no number is ever computed: products and convolutions,
a multiplication and an addition counted as two; everything else (norms, activations, resampling) is not
counted, as is usual. Attention is counted with its weights written out.

Seconds are estimates and labelled so: peak of the card times an assumed utilisation, nothing was run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from generation.cut.clip import Clip
from generation.cut.models import StableDiffusion
from tests.benchmarks.released_cut import (
    EARLY,
    GAMMA,
    INNER,
    REFINEMENTS,
    STEPS,
    WINDOW,
    OpenAttention,
    Store,
    opened,
)

PEAK = {"A100": 312e12, "H100": 989e12}  # dense fp16 and bf16, tensor cores, by the makers' data sheets (SXM)
UTILISATION = 0.4  # assumed
BLOCKS = {
    "unet": "UNet, forward",
    "unet_grad": "UNet, forward and backward from its output to the latents",
    "unet_maps": "UNet up to the last map that is read, forward",
    "unet_maps_grad": "UNet up to the last map that is read, forward and backward to the latents",
    "attention_to_latents": "backward from the maps to the latents, alone",
    "attention_to_text": "backward from the maps to the text embedding, alone",
    "encode": "VAE, encode",
    "decode": "VAE, decode",
    "decode_grad": "VAE, decode and backward to the latents",
    "image": "CLIP, picture",
    "image_grad": "CLIP, picture and backward to it",
    "clip_text": "CLIP, text",
    "text": "text encoder",
}


@dataclass(frozen=True)
class Geometry:
    """Networks on the meta device, weights frozen, and the shapes that they are counted at.

    Attributes:
        clip: an open_clip model.
        pixels: side of the picture.
        side: of the attention maps that are read.
        context, clip_context: tokens a text, of the encoder and of CLIP.
        clip_pixels: side of the picture that CLIP sees.
    """

    unet: Any
    vae: Any
    text: Any
    clip: Any
    pixels: int
    side: int
    context: int
    clip_pixels: int
    clip_context: int


def sd15(pixels: int = 512) -> Geometry:
    """Stable Diffusion 1.5 with CLIP ViT-L/14, as the released method uses them."""
    settings: Any = open_clip.get_model_config("ViT-L-14")
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
        vae: Any = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        )
        text: Any = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408,
                hidden_size=768,
                intermediate_size=3072,
                num_hidden_layers=12,
                num_attention_heads=12,
                max_position_embeddings=77,
            )
        )
        clip = open_clip.CLIP(**settings)
    for network in (unet, vae, text, clip):
        network.eval().requires_grad_(False)
    return Geometry(unet, vae, text, clip, pixels, pixels // 32, 77, 224, 77)


def geometry_of(sd: StableDiffusion, clip: Clip) -> Geometry:
    """The shapes of loaded checkpoints, at their native size."""
    networks: tuple[Any, ...] = (sd.unet, sd.vae, sd.text_encoder, clip.model)
    unet, vae, text, model = (copy.deepcopy(network).to("meta") for network in networks)
    clip_context = clip.tokenize(["a"]).shape[1]
    return Geometry(unet, vae, text, model, sd.size, sd.attention_side, sd.context, clip.size, clip_context)


class _NoModules:
    """Stands in for the counter's bookkeeping by module, whose hooks refuse ``torch.autograd.grad`` towards a
    tensor that went straight into a module."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None: ...


def count(run: Callable[[], Any]) -> float:
    """Operations of a call, its backward passes included. Fused attention is turned off meanwhile: not every
    fused kernel is known to the counter."""
    fast = torch.backends.mha.get_fastpath_enabled()
    counter: Any = FlopCounterMode(display=False)
    counter.mod_tracker = _NoModules()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(counter)
        run()
    return float(counter.get_total_flops())


# -- blocks ---------------------------------------------------------------------------------------------


class _Enough(Exception):
    """All maps have been read."""


class _Truncating(OpenAttention):
    """Ends the pass at the last cross-attention that has maps of the wanted side, once its weights exist."""

    def __init__(self, store: Store, layers: int) -> None:
        super().__init__(store)
        self.layers = layers

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **settings: Any) -> Tensor:
        text = settings.get("encoder_hidden_states", args[0] if args else None)
        reads = text is not None and hidden_states.shape[1] == self.store.side**2
        if reads and len(self.store.incoming) == self.layers - 1:
            query = attn.head_to_batch_dim(attn.to_q(hidden_states))
            key = attn.head_to_batch_dim(attn.to_k(text))
            self.store.incoming.append(attn.get_attention_scores(query, key))
            raise _Enough
        return super().__call__(attn, hidden_states, *args, **settings)


def blocks(geometry: Geometry) -> dict[str, float]:
    """Operations of each of :data:`BLOCKS`, at batch 1, weights frozen."""
    unet, vae, clip = geometry.unet, geometry.vae, geometry.clip
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    latent = geometry.pixels // factor
    shape = (1, unet.config.in_channels, latent, latent)
    z = torch.zeros(shape, device="meta", requires_grad=True)
    text = torch.zeros(
        1, geometry.context, unet.config.cross_attention_dim, device="meta", requires_grad=True
    )
    t = torch.zeros((), dtype=torch.long, device="meta")
    picture = torch.zeros(1, 3, geometry.pixels, geometry.pixels, device="meta")
    small = torch.zeros(1, 3, geometry.clip_pixels, geometry.clip_pixels, device="meta", requires_grad=True)
    ids = torch.zeros(1, geometry.context, dtype=torch.long, device="meta")
    clip_ids = torch.zeros(1, geometry.clip_context, dtype=torch.long, device="meta")
    store = Store(geometry.side)
    counted: dict[str, float] = {}

    def towards(result: Tensor, variable: Tensor) -> None:
        torch.autograd.grad(result.sum(), [variable], retain_graph=True)

    def truncated() -> Tensor:
        store.incoming.clear()
        with opened(unet, _Truncating(store, layers)):
            try:
                unet(z, t, text)
            except _Enough:
                store.finish()
        return store.average()

    with opened(unet, OpenAttention(store)):
        with torch.no_grad():
            counted["unet"] = count(lambda: unet(z, t, text))
        store.finish()
        layers = len(store.weights)
        result = unet(z, t, text).sample
        store.finish()
        counted["unet_grad"] = counted["unet"] + count(lambda: towards(result, z))
        maps = store.average()
        counted["attention_to_latents"] = count(lambda: towards(maps, z))
        counted["attention_to_text"] = count(lambda: towards(maps, text))
    with torch.no_grad():
        counted["unet_maps"] = count(truncated)
    read = truncated()
    counted["unet_maps_grad"] = counted["unet_maps"] + count(lambda: towards(read, z))

    with torch.no_grad():
        counted["encode"] = count(lambda: vae.encode(picture))
        counted["decode"] = count(lambda: vae.decode(z))
        counted["image"] = count(lambda: clip.encode_image(small))
        counted["clip_text"] = count(lambda: clip.encode_text(clip_ids))
        counted["text"] = count(lambda: geometry.text(ids))
    counted["decode_grad"] = count(lambda: towards(vae.decode(z).sample, z))
    counted["image_grad"] = count(lambda: towards(clip.encode_image(small), small))
    return {name: counted[name] for name in BLOCKS}


def released_calls(
    steps: int = STEPS, gamma: float = GAMMA, inner: int = INNER, early: int = EARLY, refined: bool = True
) -> dict[str, int]:
    """How often the released loop uses each block for one picture.

    Args:
        steps, gamma, inner: its settings.
        early: steps with the early stage: at most 10, fewer if the map became compact.
        refined: whether the first threshold was missed.
    """
    chain = int(steps * gamma)
    executed = chain + 1
    window = sum(i > WINDOW * chain for i in range(executed))
    refinements = REFINEMENTS if refined else 0
    early = min(early, executed)
    calls = {
        "unet": executed * (2 + inner + 2) + early + 3 * refinements + refined,
        "attention_to_latents": executed * inner + refinements + refined,
        "attention_to_text": executed * inner,
        "encode": 1,
        "decode": 1,
        "decode_grad": window * inner,
        "image_grad": window * inner,
        "clip_text": window * inner,
        "text": 6,
    }
    return {name: number for name, number in calls.items() if number}


def total(once: Mapping[str, float], calls: Mapping[str, float]) -> float:
    """Operations of all calls."""
    return sum(once[name] * number for name, number in calls.items())


def seconds_on(card: str, flops: float, utilisation: float = UTILISATION) -> float:
    """An estimate, nothing was run: ``flops`` at the card's peak (:data:`PEAK`) times ``utilisation``.

    >>> round(seconds_on("A100", 312e12, 0.5), 6)
    2.0
    """
    return flops / (PEAK[card] * utilisation)


def show(once: Mapping[str, float], calls: Mapping[str, float], console: Console) -> None:
    table = Table(title="floating-point operations, batch 1")
    for column in ("block", "TFLOP once", "calls, released loop", "TFLOP"):
        table.add_column(column, justify="left" if column == "block" else "right")
    for name, meaning in BLOCKS.items():
        number = calls.get(name, 0)
        whole = f"{once[name] * number / 1e12:,.2f}" if number else ""
        table.add_row(meaning, f"{once[name] / 1e12:.4f}", str(number or ""), whole)
    everything = total(once, calls)
    table.add_row("all", "", "", f"{everything / 1e12:,.1f}", style="bold")
    console.print(table)
    guesses = ", ".join(f"{seconds_on(card, everything):.1f} s on an {card}" for card in PEAK)
    console.print(
        f"estimate of the released loop at {100 * UTILISATION:g} % of the half-precision peak: {guesses}"
    )


if __name__ == "__main__":
    show(blocks(sd15()), released_calls(), Console(width=120))
