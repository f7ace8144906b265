"""Where a checkpoint's files are, whether the sampler can use them, and what provenance says of them.

Nothing here reads weights into memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from safetensors import SafetensorError

from manifests.errors import FlawsmithError

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
REMEDY = f"name {POCKET!r}, a folder of a Stable Diffusion 1.x or 2.x in diffusers' layout, or its hub id"
BROKEN = (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError)  # of the loading libraries


class ModelError(FlawsmithError):
    """A checkpoint that cannot be loaded."""


@dataclass(frozen=True)
class Checkpoint:
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

    def config(self, part: str) -> dict[str, Any]:
        """The settings of one component."""
        return self.read(f"{part}/{COMPONENTS[part]}")

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


def resolve(name: str) -> Checkpoint:
    if name == POCKET:
        return Checkpoint(name, str(shipped("sd")))
    if (folder := Path(name).expanduser()).is_dir():
        return Checkpoint(name, str(folder))
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ModelError(f"checkpoint {name!r}: no such folder, and not a hub id (owner/name); {REMEDY}")
    return Checkpoint(name, name, hub_commit(name, "model_index.json"))


def check_layout(source: Checkpoint) -> None:
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
    unet, vae = source.config("unet"), source.config("vae")
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
    schedule = source.config("scheduler")
    predicts = schedule.get("prediction_type", "epsilon") if "beta_start" in schedule else "flow"
    if predicts not in ("epsilon", "v_prediction"):
        raise ModelError(
            f"checkpoint {source.name}: by its scheduler ({schedule.get('_class_name')}) the UNet predicts "
            f"{predicts!r}; only epsilon and v_prediction can be sampled; {REMEDY}"
        )


def _check_folder(source: Checkpoint, part: str) -> None:
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


def identify(name: str) -> dict[str, str]:
    """What provenance says of a checkpoint, without loading it. Cheap when called again.

    Returns:
        ``id`` (``pocket``, the folder's own name, or the hub id); for a hub its commit as ``revision``, which
        stands for the weights; for a folder the start of the sha256 over the files that are read as
        ``weights``; ``licence`` if the model card names one.

    Raises:
        ModelError: no such checkpoint, no hub.
    """
    source = resolve(name)
    if source.revision is not None:
        return {"id": name, "revision": source.revision, **hub_licence(name, source.revision)}
    folder = Path(source.where)
    files = [file for part in COMPONENTS for file in sorted((folder / part).glob("*")) if _is_read(file)]
    named = name if name == POCKET else folder.resolve().name
    return {"id": named, "weights": fingerprint(folder, files), **licence(folder / "README.md")}


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


def _is_read(file: Path) -> bool:
    """Whether loading reads it: settings and safetensors, whole or in numbered parts; no variants."""
    weights = r"(diffusion_pytorch_)?model(-\d+-of-\d+)?\.safetensors"
    return file.suffix in (".json", ".txt") or re.fullmatch(weights, file.name) is not None


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
