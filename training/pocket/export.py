"""Checkpoints of the training legs to the two model folders that are shipped: ``sd`` and ``clip``.

Both are what the ecosystem reads: a Stable Diffusion in diffusers' layout and an open_clip folder, averaged
weights in float16, with the whole vocabulary of CLIP. The same checkpoints give the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from generation.cut.clip import CONFIG as CLIP_CONFIG
from generation.cut.tokens import build_tokenizer
from manifests.errors import UsageError
from training.pocket import autoencoder, contrastive, diffusion, legs
from training.pocket.vocabulary import Vocabulary

CLIP_TOKENS = "token_embedding.weight"
# Running variances of the trunk's norms span more than float16 holds; they are few.
KEPT = ("running_mean", "running_var", "num_batches_tracked")


def export(checkpoints: Path, out: Path) -> tuple[Path, Path]:
    """Writes ``out/sd`` and ``out/clip``; what was there is replaced.

    Each folder is written aside and renamed: an interrupted export leaves the old one or none, never half.

    Args:
        checkpoints: folder with ``autoencoder.pt``, ``diffusion.pt``, ``contrastive.pt`` and, optionally,
            ``decoder.pt`` (without it the decoder is the autoencoder's own).

    Raises:
        UsageError: a checkpoint is missing, or of another vocabulary than today's captions.
    """
    words = Vocabulary()
    sd = _replaced(out / "sd", lambda folder: _write_sd(checkpoints, folder, words))
    clip = _replaced(out / "clip", lambda folder: _write_clip(checkpoints, folder, words))
    return sd, clip


def stable_diffusion(checkpoints: Path, words: Vocabulary) -> Any:
    """The pipeline of some checkpoints, float16, without a safety checker."""
    state = _state(checkpoints / "diffusion.pt")
    unet: Any = diffusion.unet()
    text: Any = diffusion.text_encoder(len(words.tokenizer))
    weights = _under(state["average"], "text.")
    weights[diffusion.TOKENS] = _expanded(weights[diffusion.TOKENS], words, checkpoints / "diffusion.pt")
    unet.load_state_dict(_under(state["average"], "unet."))
    text.load_state_dict(weights)
    text.config.pad_token_id = words.tokenizer.pad_token_id
    vae = joined_autoencoder(checkpoints)
    vae.register_to_config(scaling_factor=state["scaling"])
    for network in (unet, text, vae):
        torch.nn.Module.half(network.eval())
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=build_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(**diffusion.SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def joined_autoencoder(checkpoints: Path) -> Any:
    """The first leg's encoder, whose latents the diffusion model knows, with the second leg's decoder."""
    weights = dict(_state(checkpoints / "autoencoder.pt")["average"])
    second = legs.load(checkpoints / "decoder.pt")
    if second is not None:
        kept = ("encoder.", "quant_conv.")
        weights |= {key: value for key, value in second["average"].items() if not key.startswith(kept)}
    vae = autoencoder.network()
    vae.load_state_dict(weights)
    return vae


def clip_weights(checkpoints: Path, words: Vocabulary) -> dict[str, Tensor]:
    """The state of the averaged CLIP with the whole vocabulary, float16 but for the norms' statistics."""
    weights = dict(_state(checkpoints / "contrastive.pt")["average"])
    weights[CLIP_TOKENS] = _expanded(weights[CLIP_TOKENS], words, checkpoints / "contrastive.pt")
    return {
        key: (value if key.endswith(KEPT) else value.half()).contiguous() for key, value in weights.items()
    }


def _write_sd(checkpoints: Path, folder: Path, words: Vocabulary) -> None:
    stable_diffusion(checkpoints, words).save_pretrained(folder)
    # As the published ones say: diffusers would otherwise load this part alone in half precision.
    config = folder / "text_encoder/config.json"
    settings = {**json.loads(config.read_text(encoding="utf-8")), "dtype": "float32"}
    config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card("sd"), encoding="utf-8")


def _write_clip(checkpoints: Path, folder: Path, words: Vocabulary) -> None:
    folder.mkdir()
    settings = {"model_cfg": contrastive.CONFIG, "preprocess_cfg": contrastive.PREPROCESS}
    (folder / CLIP_CONFIG).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_file(
        clip_weights(checkpoints, words), folder / "open_clip_model.safetensors", metadata={"format": "pt"}
    )
    (folder / "README.md").write_text(_card("clip"), encoding="utf-8")


def _replaced(folder: Path, write: Callable[[Path], None]) -> Path:
    """A folder written aside by ``write``, then put in place of what was there."""
    aside, old = folder.with_name(f"{folder.name}.part"), folder.with_name(f"{folder.name}.old")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write(aside)
    for file in aside.rglob("*"):
        file.chmod(0o755 if file.is_dir() else 0o644)  # weights are written for their owner's eyes alone
    if folder.exists():
        os.replace(folder, old)
    os.replace(aside, folder)
    shutil.rmtree(old, ignore_errors=True)
    return folder


def _state(path: Path) -> dict[str, Any]:
    state = legs.load(path)
    if state is None:
        raise UsageError(f"{path} is missing: `flawsmith pocket train --out {path.parent}` writes it")
    return state


def _under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _expanded(small: Tensor, words: Vocabulary, path: Path) -> Tensor:
    if len(small) != words.size:
        raise UsageError(
            f"{path} knows {len(small)} tokens, the captions of this version use {words.size}: train again "
            "into another folder, or export with the version that trained it"
        )
    return words.expand(small)


def _card(part: str) -> str:
    """The model card: text with front matter, shipped beside this file."""
    return resources.files("training.pocket").joinpath(f"{part}.md").read_text(encoding="utf-8")
