"""Randomly initialised checkpoints of the published layouts with tiny widths; a test needs no hub.

Depths, attention conventions, schedules and file names are those of the real ones; only widths differ.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from generation.cut.tokens import build_tokenizer

WIDTH = 32  # of a text embedding
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def write_sd15(folder: Path, seed: int = 0, sample_size: int = 64) -> Path:
    """Stable Diffusion 1.5: epsilon, PNDM, convolutional projections, 8 heads everywhere, quick GELU. Its
    index names a safety checker whose folder is not there."""
    unet = {"attention_head_dim": 8, "use_linear_projection": False}
    scheduler = PNDMScheduler(**SCHEDULE, skip_prk_steps=True, prediction_type="epsilon")
    tokenizer = build_tokenizer()
    _save(folder, seed, sample_size, unet, {"hidden_act": "quick_gelu"}, scheduler, tokenizer)
    _split_tokenizer(folder / "tokenizer", tokenizer)
    _name_tensors_as_published(folder)
    index = folder / "model_index.json"
    parts = json.loads(index.read_text(encoding="utf-8"))
    parts["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index.write_text(json.dumps(parts, indent=2), encoding="utf-8")
    (folder / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n# Tiny\n", encoding="utf-8")
    return folder


def write_sd2(folder: Path, seed: int = 0, sample_size: int = 96) -> Path:
    """Stable Diffusion 2.x: v-prediction, DDIM, linear projections, heads that grow with the width, GELU,
    padding ``!``."""
    unet = {"attention_head_dim": [2, 4, 4, 4], "use_linear_projection": True, "upcast_attention": True}
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, prediction_type="v_prediction")
    _save(folder, seed, sample_size, unet, {"hidden_act": "gelu"}, scheduler, build_tokenizer(pad="!"))
    return folder


def write_clip(folder: Path, seed: int = 0, image_size: int = 32, context: int = 77) -> Path:
    """A vision transformer with a text transformer, in open_clip's own folder layout."""
    tower = {"width": 32, "layers": 2}
    model = {
        "embed_dim": 24,
        "vision_cfg": {**tower, "image_size": image_size, "patch_size": 8, "head_width": 16},
        "text_cfg": {**tower, "context_length": context, "vocab_size": 49408, "heads": 2},
    }
    preprocess = {"mean": list(open_clip.OPENAI_DATASET_MEAN), "std": list(open_clip.OPENAI_DATASET_STD)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}, indent=2), encoding="utf-8"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        weights = open_clip.CLIP(**model).state_dict()
    save_file(
        {key: value.contiguous() for key, value in weights.items()}, folder / "open_clip_model.safetensors"
    )
    return folder


def _save(
    folder: Path,
    seed: int,
    sample_size: int,
    unet: dict[str, Any],
    text: dict[str, Any],
    scheduler: Any,
    tokenizer: CLIPTokenizer,
) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipeline: Any = StableDiffusionPipeline(
            vae=AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(8, 16, 16, 16),
                norm_num_groups=8,
                latent_channels=4,
                sample_size=sample_size * 8,
            ),
            text_encoder=CLIPTextModel(
                CLIPTextConfig(
                    vocab_size=49408,
                    hidden_size=WIDTH,
                    intermediate_size=2 * WIDTH,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    projection_dim=WIDTH,
                    pad_token_id=1,
                    bos_token_id=0,
                    eos_token_id=2,
                    **text,
                )
            ),
            tokenizer=tokenizer,
            unet=UNet2DConditionModel(
                sample_size=sample_size,
                block_out_channels=(32, 64, 64, 64),
                layers_per_block=2,
                cross_attention_dim=WIDTH,
                **unet,
            ),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    for network in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
        torch.nn.Module.half(network)
    pipeline.save_pretrained(folder)


def _name_tensors_as_published(folder: Path) -> None:
    """The 1.x files are older than today's names: a prefix in the text encoder and a tensor that is no
    longer used, other names in the VAE's attention."""
    file = folder / "text_encoder/model.safetensors"
    weights = {f"text_model.{key}": tensor for key, tensor in load_file(file).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(weights, file, metadata={"format": "pt"})
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(file)
    for new, old in older.items():
        weights = {key.replace(f".{new}.", f".{old}."): tensor for key, tensor in weights.items()}
    save_file(weights, file, metadata={"format": "pt"})


def _split_tokenizer(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """The files of a tokenizer as the published 1.x checkpoints have them, without ``tokenizer.json``."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    (folder / "tokenizer.json").unlink()
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {
        "content": "<|endoftext|>",
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }
    names = {
        "bos_token": {**special, "content": "<|startoftext|>"},
        "eos_token": special,
        "unk_token": special,
        "pad_token": "<|endoftext|>",
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(names), encoding="utf-8")
    settings = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": 77,
        "tokenizer_class": "CLIPTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
