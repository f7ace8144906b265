"""Stable Diffusion checkpoints: one loader for the shipped one, a folder in diffusers' layout, or a hub id.

Only safetensors are read, one component at a time. A checkpoint's safety checker is never loaded, because it
blackens pictures of defects. What the sampler needs of a checkpoint (text, pictures to latents and back, the
noise schedule, geometry) is here; the sampler itself is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from generation.cut.checkpoints import (
    BROKEN,
    REMEDY,
    Checkpoint,
    ModelError,
    check_layout,
    first_line,
    identify,
    resolve,
)
from manifests.errors import UsageError

ATTENTION_SIDE = 16  # of the maps the method reads (core.md 1.4)
LARGEST_ATTENTION_SIDE = 32  # beyond it maps are too fine to be semantic, and dear


@dataclass(frozen=True)
class StableDiffusion:
    """A frozen text-to-image checkpoint in eval mode; no parameter requires a gradient.

    Attributes:
        name: as given to :func:`load_sd`.
        identity: as :func:`identify` gives it.
        alphas: float64, T, on the CPU; the cumulative products of the checkpoint's own noise schedule.
        prediction: what the UNet returns.
        device, dtype: of the networks; latents and text embeddings are float32 outside of them.
        size: native side of a picture in pixels.
        factor: pixels a latent, 8 for every published checkpoint.
        attention_side: side of the cross-attention maps to read at native size: 16 if there are any, else the
            largest up to 32.
    """

    name: str
    identity: dict[str, str]
    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextModel
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    alphas: Tensor
    prediction: Literal["epsilon", "v_prediction"]
    device: torch.device
    dtype: torch.dtype
    size: int
    factor: int
    attention_side: int

    @property
    def stride(self) -> int:
        """Sides of pictures must be multiples of it: 64 for the published checkpoints."""
        return self.factor * 2 ** (len(self.unet.config["block_out_channels"]) - 1)

    @cached_property
    def context(self) -> int:
        """Tokens a text, begin and end included: 77 for every published checkpoint."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """Token ids, padded as the checkpoint's tokenizer does.

        Returns:
            int64, N×``context``, on ``device``; begin of text is at 0.

        Raises:
            UsageError: a text is longer than the encoder reads.
        """
        for text, ids in zip(texts, self.tokenizer(list(texts))["input_ids"], strict=True):
            if len(ids) > self.context:
                raise UsageError(
                    f"prompt {text!r}: {len(ids)} tokens, but {self.name} reads {self.context} (begin and "
                    f"end included) and would cut it off; shorten it by {len(ids) - self.context} tokens"
                )
        padded = self.tokenizer(
            list(texts), padding="max_length", max_length=self.context, return_tensors="pt"
        )
        return padded["input_ids"].to(self.device)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """What the UNet attends to: the encoder's last hidden state after its final norm, as in diffusers.

        Returns:
            float32, N×``context``×d, on ``device``.

        Raises:
            UsageError: a text is longer than the encoder reads.
        """
        return self.text_encoder(self.tokens(texts)).last_hidden_state.float()

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Pictures to latents: the mean of the posterior, no sample of it, so that no randomness is needed.

        Args:
            images: float, N×3×H×W in [0, 1]; sides are multiples of ``factor``.

        Returns:
            float32, N×c×H/``factor``×W/``factor``, on ``device``, scaled as the UNet expects.

        Raises:
            ValueError: other shapes.
        """
        if images.ndim != 4 or images.shape[1] != 3 or any(side % self.factor for side in images.shape[2:]):
            raise ValueError(
                f"images of shape {tuple(images.shape)}; expected N×3×H×W, H and W multiples of {self.factor}"
            )
        x = images.to(self.device, self.dtype) * 2 - 1
        mean = self.vae.encode(x).latent_dist.mean.float()
        return (mean - self._shift) * self.vae.config["scaling_factor"]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pictures; differentiable.

        Args:
            latents: float, N×c×h×w, as :meth:`encode` gives them.

        Returns:
            float32, N×3×H×W, on ``device``; about [0, 1], not clamped.
        """
        z = latents.to(self.device).float() / self.vae.config["scaling_factor"] + self._shift
        return self.vae.decode(z.to(self.dtype)).sample.float() / 2 + 0.5

    @property
    def _shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0


def load_sd(
    name: str,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    *,
    channels_last: bool = True,
    checkpointing: bool = False,
) -> StableDiffusion:
    """Load a frozen checkpoint without its safety checker.

    Args:
        name: ``pocket`` (shipped), a folder in diffusers' layout, or a hub id ``owner/name``.
        device: where it runs.
        dtype: of the networks; ``auto`` is float16 on CUDA and float32 elsewhere.
        channels_last: memory order of the convolutions; another order changes rounding.
        checkpointing: trade time for memory when gradients pass through the UNet and the decoder.

    Raises:
        ModelError: no such checkpoint, no hub, another architecture, missing or damaged files.
        UsageError: unknown dtype.
    """
    device = torch.device(device)
    chosen = dtype_of(dtype, device)
    source = resolve(name)
    check_layout(source)
    schedule = _component(source, "scheduler", lambda: DDIMScheduler.from_config(source.config("scheduler")))
    with _without_bars():
        text_encoder = _weights(source, "text_encoder", CLIPTextModel, dtype=chosen)
    unet = _weights(source, "unet", UNet2DConditionModel, dtype=chosen)
    vae = _weights(source, "vae", AutoencoderKL, dtype=chosen)
    tokenizer = _component(
        source, "tokenizer", lambda: CLIPTokenizer.from_pretrained(source.where, **source.place("tokenizer"))
    )
    for network in (text_encoder, unet, vae):
        network.to(device).eval().requires_grad_(False)
    if best_attention(str(device))[0] == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    if channels_last:
        unet.to(memory_format=torch.channels_last)
        vae.to(memory_format=torch.channels_last)
    if checkpointing:
        unet.enable_gradient_checkpointing()
        vae.enable_gradient_checkpointing()
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    return StableDiffusion(
        name=name,
        identity=identify(name),
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet,
        vae=vae,
        alphas=schedule.alphas_cumprod.double(),
        prediction=schedule.config.prediction_type,
        device=device,
        dtype=chosen,
        size=unet.config.sample_size * factor,
        factor=factor,
        attention_side=attention_side_of(unet.config, name),
    )


@lru_cache
def best_attention(device: str = "cpu") -> tuple[Literal["xformers", "sdpa"], str]:
    """The attention for layers whose maps are not read: xformers where its operator works, else torch's.

    An import proves little (its compiled part may be built for another torch), so the operator is called once
    a process, forward and backward.

    Returns:
        ``xformers`` or ``sdpa``, and one line that says why.
    """
    try:
        attention = import_module("xformers.ops").memory_efficient_attention
    except ImportError as error:
        return "sdpa", f"xformers is not used: {first_line(error)}"
    dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    query = torch.ones(1, 8, 2, 16, device=device, dtype=dtype, requires_grad=True)
    try:
        attention(query, query, query).sum().backward()
    except Exception as error:  # whatever a broken installation throws is the finding
        return "sdpa", f"xformers is not used: its operator fails on {device} ({first_line(error)})"
    return "xformers", f"xformers is used: its operator works on {device}"


def _weights(source: Checkpoint, part: str, network: Any, **settings: Any) -> Any:
    """One network with its weights; a tensor that is missing or of another shape is an error, not random."""

    def load() -> Any:
        return network.from_pretrained(
            source.where, **source.place(part), use_safetensors=True, output_loading_info=True, **settings
        )

    loaded, report = _component(source, part, load)
    wrong = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
    if wrong:
        raise ModelError(
            f"checkpoint {source.name}: {len(wrong)} tensors of its {part} are missing or of another shape "
            f"than its config.json says, e.g. {wrong[0]}; fetch or save {part}/ again"
        )
    return loaded


def _component(source: Checkpoint, part: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except BROKEN as error:
        again = (
            "fetch the checkpoint again, check the network, or " if source.revision else "copy it again, or "
        )
        raise ModelError(
            f"checkpoint {source.name}: its {part} cannot be loaded ({first_line(error)}); {again}{REMEDY}"
        ) from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers shows a bar for each network, in every worker; a caller's own choice is put back."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def attention_side_of(config: Any, name: str) -> int:
    side, sides = config.sample_size, []
    for index, block in enumerate(config.down_block_types):
        if "CrossAttn" in block:  # the up block of the same level sees the same side
            sides.append(side)
        if index < len(config.down_block_types) - 1:
            side = -(-side // 2)
    if "CrossAttn" in (config.mid_block_type or ""):
        sides.append(side)
    if not sides:
        raise ModelError(f"checkpoint {name}: its UNet has no cross-attention to a text; {REMEDY}")
    if ATTENTION_SIDE in sides:
        return ATTENTION_SIDE
    return max((side for side in sides if side <= LARGEST_ATTENTION_SIDE), default=min(sides))


def dtype_of(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"dtype {dtype!r}: expected auto, float32, float16 or bfloat16")
    return found
