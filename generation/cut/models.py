"""Stable Diffusion checkpoints: one loader for the shipped one, a folder in diffusers' layout, or a hub id.

Only safetensors are read, one component at a time. A checkpoint's safety checker is never loaded, because it
blackens pictures of defects. What the sampler needs of a checkpoint (text, pictures to latents and back, the
noise schedule, geometry) is here; the sampler itself is not.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import import_module, resources
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DDIMScheduler
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from huggingface_hub import hf_hub_download
from open_clip.tokenizer import bytes_to_unicode, default_bpe
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from manifests.errors import FlawsmithError, UsageError

POCKET = "pocket"  # the shipped checkpoint, package data
COMPONENTS = {
    "tokenizer": "tokenizer_config.json",
    "text_encoder": "config.json",
    "unet": "config.json",
    "vae": "config.json",
    "scheduler": "scheduler_config.json",
}
WEIGHTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
ATTENTION_SIDE = 16  # of the maps the method reads (core.md 1.4)
LARGEST_ATTENTION_SIDE = 32  # beyond it maps are too fine to be semantic, and dear
REMEDY = f"name {POCKET!r}, a folder of a Stable Diffusion 1.x or 2.x in diffusers' layout, or its hub id"
BROKEN = (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError)  # of the loading libraries


class ModelError(FlawsmithError):
    """A checkpoint that cannot be loaded."""


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
    chosen = _dtype(dtype, device)
    source = _resolve(name)
    _check_layout(source)
    schedule = _component(
        source, "scheduler", lambda: DDIMScheduler.from_config(_config(source, "scheduler"))
    )
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
        attention_side=_attention_side(unet.config, name),
    )


def identify(name: str) -> dict[str, str]:
    """What provenance says of a checkpoint, without loading it. Cheap when called again.

    Returns:
        ``id`` (``pocket``, the folder's own name, or the hub id); for a hub its commit as ``revision``, which
        stands for the weights; for a folder the start of the sha256 over the files that are read as
        ``weights``; ``licence`` if the model card names one.

    Raises:
        ModelError: no such checkpoint, no hub.
    """
    source = _resolve(name)
    if source.revision is not None:
        return {"id": name, "revision": source.revision, **hub_licence(name, source.revision)}
    folder = Path(source.where)
    files = [file for part in COMPONENTS for file in sorted((folder / part).glob("*")) if _is_read(file)]
    named = name if name == POCKET else folder.resolve().name
    return {"id": named, "weights": fingerprint(folder, files), **licence(folder / "README.md")}


def token_positions(sd: StableDiffusion, prompt: str, word: str) -> list[int]:
    """Where a word, or several words in a row, stand in a prompt's tokens.

    A word counts wherever it stands whole, whatever its case and the punctuation beside it. If it stands
    there several times, all its places are given.

    Returns:
        Ascending indices into the rows of :meth:`StableDiffusion.tokens` (begin of text is 0), every
        byte-pair token of the word.

    Raises:
        UsageError: the word is not in the prompt, or the prompt is cut off.
    """
    sd.tokens([prompt])  # refuses a prompt that is cut off
    parts = word.split()
    pattern = r"\s+".join(re.escape(part) for part in parts)
    spans = (
        [m.span() for m in re.finditer(rf"(?<!\w){pattern}(?!\w)", prompt, re.IGNORECASE)] if parts else []
    )
    if not spans:
        raise UsageError(
            f"anomaly word {word!r} does not stand in the prompt {prompt!r}; write it there, or name a word "
            "of the prompt"
        )
    offsets = sd.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]
    return [
        index
        for index, (start, end) in enumerate(offsets)
        if start < end and any(start < last and first < end for first, last in spans)
    ]


def build_tokenizer(pad: str = "<|endoftext|>") -> CLIPTokenizer:
    """CLIP's tokenizer from the byte-pair vocabulary that open_clip ships; no hub is needed.

    Args:
        pad: the padding token: end of text as in Stable Diffusion 1.x, ``!`` in 2.x.

    Returns:
        A tokenizer whose ids equal ``open_clip.SimpleTokenizer``'s, 77 tokens a text. With the padding of 2.x
        a ``!`` in a text is read as padding, as by the published tokenizer.
    """
    with gzip.open(default_bpe(), "rt", encoding="utf-8") as lines:
        merges: Any = [tuple(line.split()) for line in lines.read().split("\n")[1 : 49152 - 256 - 2 + 1]]
    letters = list(bytes_to_unicode().values())
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge) for merge in merges)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=77)


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


def fingerprint(folder: Path, files: Iterable[Path]) -> str:
    """The start of the sha256 over files: names within ``folder`` and contents; hashed once a process."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(folder).as_posix()}\n".encode())
        digest.update(_sha256(file, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()[:16]


def licence(card: Path) -> dict[str, str]:
    """``{"licence": ...}`` from the front matter of a model card; empty if it is missing or names none."""
    if not card.is_file():
        return {}
    found = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    named = re.search(r"^license:\s*[\"']?([^\"'\s]+)", found[1], re.MULTILINE) if found else None
    return {"licence": named[1]} if named else {}


def shipped(part: str) -> Path:
    """The folder of a shipped checkpoint: ``sd`` or ``clip``.

    Raises:
        ModelError: this installation lacks it.
    """
    folder = Path(str(resources.files("generation") / "cut" / POCKET / part))
    if not folder.is_dir():
        raise ModelError(
            f"the shipped checkpoint {POCKET!r} is not in this installation ({folder} is missing); reinstall "
            "flawsmith, or name a folder of weights or a hub id"
        )
    return folder


@lru_cache
def hub_commit(name: str, filename: str, remedy: str = REMEDY) -> str:
    """The commit at which a hub's repository is read in this process, found by fetching one small file.

    Raises:
        ModelError: no hub and nothing cached, no such repository, or no such file in it.
    """
    try:
        return Path(hf_hub_download(name, filename)).parent.name
    except BROKEN as error:
        raise ModelError(
            f"checkpoint {name}: {filename} could not be fetched from the hub ({first_line(error)}). "
            "Without a hub (HF_HUB_OFFLINE is set, or no network) only folders and what is cached can be "
            f"used; {remedy}"
        ) from error


@dataclass(frozen=True)
class _Source:
    """Where a checkpoint is: a folder (no revision) or a hub id at one commit."""

    name: str
    where: str
    revision: str | None = None

    def place(self, part: str) -> dict[str, Any]:
        """Arguments of ``from_pretrained`` for one component."""
        return {
            "subfolder": part,
            "revision": self.revision or "main",
            "local_files_only": self.revision is None,
        }

    def read(self, filename: str) -> dict[str, Any]:
        """A JSON file of the checkpoint."""
        path = Path(self.where) / filename
        try:
            if self.revision is not None:
                path = Path(hf_hub_download(self.where, filename, revision=self.revision))
            return json.loads(path.read_text(encoding="utf-8"))
        except (*BROKEN, UnicodeDecodeError) as error:
            raise ModelError(
                f"checkpoint {self.name}: {filename} cannot be read ({first_line(error)}); {REMEDY}"
            ) from error


def _resolve(name: str) -> _Source:
    if name == POCKET:
        return _Source(name, str(shipped("sd")))
    if (folder := Path(name).expanduser()).is_dir():
        return _Source(name, str(folder))
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ModelError(f"checkpoint {name!r}: no such folder, and not a hub id (owner/name); {REMEDY}")
    return _Source(name, name, hub_commit(name, "model_index.json"))


def _config(source: _Source, part: str) -> dict[str, Any]:
    return source.read(f"{part}/{COMPONENTS[part]}")


def _check_layout(source: _Source) -> None:
    """Refuse what the sampler cannot use, before any weights are read."""
    index = source.read("model_index.json")
    pipeline = index.get("_class_name")
    if "text_encoder_2" in index or "transformer" in index:
        raise ModelError(
            f"checkpoint {source.name}: a {pipeline}, not a Stable Diffusion 1.x or 2.x (one text encoder, "
            f"one UNet); {REMEDY}"
        )
    expected = {"text_encoder": "CLIPTextModel", "unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    for part in COMPONENTS:
        if part not in index:
            raise ModelError(
                f"checkpoint {source.name}: model_index.json ({pipeline}) lists no {part}; {REMEDY}"
            )
        found = (index[part] or [None, None])[1]
        if part in expected and found != expected[part]:
            raise ModelError(
                f"checkpoint {source.name}: its {part} is a {found}, expected {expected[part]}; {REMEDY}"
            )
        if source.revision is None:
            _check_folder(source, part)
    unet, vae = _config(source, "unet"), _config(source, "vae")
    if (channels := unet.get("in_channels", 4)) != (latents := vae.get("latent_channels", 4)):
        kind = (
            "an inpainting or otherwise conditioned UNet" if channels > latents else "the UNet of another VAE"
        )
        raise ModelError(
            f"checkpoint {source.name}: its UNet takes {channels} channels where the VAE gives {latents}: "
            f"{kind}; use the text-to-image checkpoint of the family"
        )
    if unet.get("addition_embed_type") or unet.get("class_embed_type"):
        raise ModelError(
            f"checkpoint {source.name}: its UNet wants more than a text (as SDXL and upscalers do); {REMEDY}"
        )
    if not isinstance(unet.get("sample_size"), int):
        raise ModelError(
            f"checkpoint {source.name}: sample_size of unet/config.json is {unet.get('sample_size')!r}, "
            "expected one whole number; write the side of its native latents there"
        )
    schedule = _config(source, "scheduler")
    predicts = schedule.get("prediction_type", "epsilon") if "beta_start" in schedule else "flow"
    if predicts not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"checkpoint {source.name}: by its scheduler ({schedule.get('_class_name')}) the UNet predicts "
            f"{predicts!r}; only epsilon and v_prediction can be sampled; {REMEDY}"
        )


def _check_folder(source: _Source, part: str) -> None:
    folder = Path(source.where) / part
    found = sorted(file.name for file in folder.glob("*")) if folder.is_dir() else None
    if found is None or COMPONENTS[part] not in found:
        raise ModelError(
            f"checkpoint folder {source.where}: no {part}/{COMPONENTS[part]} ("
            f"{'the folder is missing' if found is None else f'found {found}'}); save it with diffusers' "
            "save_pretrained, or copy the folder whole"
        )
    weights = WEIGHTS.get(part)
    if weights and not {weights, f"{weights}.index.json"} & set(found):
        raise ModelError(
            f"checkpoint folder {source.where}: no {part}/{weights} (found {found}); only safetensors are "
            "read, and no variants: save it again with diffusers' save_pretrained(safe_serialization=True)"
        )


def _weights(source: _Source, part: str, network: Any, **settings: Any) -> Any:
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


def _component(source: _Source, part: str, load: Callable[[], Any]) -> Any:
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


def _is_read(file: Path) -> bool:
    """Whether loading reads it: settings and safetensors, whole or in numbered parts; no variants."""
    weights = r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors"
    return file.suffix in (".json", ".txt") or re.fullmatch(weights, file.name) is not None


def _attention_side(config: Any, name: str) -> int:
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


def _dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"dtype {dtype!r}: expected auto, float32, float16 or bfloat16")
    return found


@lru_cache(maxsize=256)
def _sha256(file: Path, size: int, mtime_ns: int) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


@lru_cache
def hub_licence(name: str, revision: str) -> dict[str, str]:
    try:
        return licence(Path(hf_hub_download(name, "README.md", revision=revision)))
    except BROKEN:
        return {}  # a repository without a card, or one whose card is not cached


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
