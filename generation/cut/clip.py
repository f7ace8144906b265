"""How well a picture fits a text: a frozen open_clip model, differentiable in the picture.

It is the image loss of the refinement (core.md 1.5, L_img) and a figure for generated pictures (1.12).

Weights are safetensors, or what ``torch.load(weights_only=True)`` accepts; no pickled objects.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from generation.cut.checkpoints import (
    BROKEN,
    POCKET,
    ModelError,
    fingerprint,
    first_line,
    hub_commit,
    hub_licence,
    licence,
    shipped,
)
from manifests.errors import UsageError

CONFIG = "open_clip_config.json"
HUB = "hf-hub:"
REMEDY = (
    f"name {POCKET!r}, a folder with {CONFIG} and open_clip_model.safetensors, MODEL/TAG as "
    f"open_clip.list_pretrained() gives them, or {HUB}OWNER/NAME"
)


@dataclass(frozen=True)
class Clip:
    """A frozen image–text model in eval mode and float32; no parameter requires a gradient.

    Attributes:
        name: as given to :func:`load_clip`.
        identity: as :func:`identify_clip` gives it.
        tokenize: texts to int64 N×context.
        size: side of the square picture it sees.
        mean, std: 1×3×1×1, of its normalisation, on ``device``.
    """

    name: str
    identity: dict[str, str]
    model: Any
    tokenize: Callable[[list[str]], Tensor]
    size: int
    mean: Tensor
    std: Tensor
    device: torch.device

    @torch.no_grad()
    def text(self, texts: Sequence[str]) -> Tensor:
        """float32, N×d, of length 1, on ``device``.

        Raises:
            UsageError: a text is longer than the model reads.
        """
        self._refuse_cut(texts)
        return self.model.encode_text(self.tokenize(list(texts)).to(self.device), normalize=True)

    def image(self, images: Tensor) -> Tensor:
        """Embeddings of pictures; differentiable.

        Args:
            images: float, N×3×H×W in [0, 1], any size; brought to ``size``² whatever their aspect.

        Returns:
            float32, N×d, of length 1, on ``device``.
        """
        x = images.to(self.device).float()
        if x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", align_corners=False, antialias=True)
        return self.model.encode_image((x - self.mean) / self.std, normalize=True)

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """Cosine of each picture with its text; differentiable in the pictures.

        Args:
            images: as for :meth:`image`.
            texts: N×d or 1×d, from :meth:`text`.

        Returns:
            float32, N, in [-1, 1].
        """
        return (self.image(images) * texts.to(self.device)).sum(-1)

    def _refuse_cut(self, texts: Sequence[str]) -> None:
        if not isinstance(self.tokenize, open_clip.SimpleTokenizer):
            return  # other tokenizers do not say how long a text was
        context = self.tokenize.context_length or open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH
        for text in texts:
            if (length := len(self.tokenize.encode(text)) + 2) > context:
                raise UsageError(
                    f"text {text!r}: {length} tokens, but {self.name} reads {context} (begin and end "
                    f"included) and would cut it off; shorten it by {length - context} tokens"
                )


def load_clip(name: str = POCKET, device: str | torch.device = "cpu", size: int | None = None) -> Clip:
    """Load a frozen image–text model.

    Args:
        name: ``pocket`` (shipped), a folder in open_clip's layout, a pair ``MODEL/TAG`` such as
            ``ViT-B-16/laion2b_s34b_b88k``, or ``hf-hub:OWNER/NAME``.
        device: where it runs.
        size: side of the pictures it shall see; position embeddings are interpolated. None: as published.

    Raises:
        ModelError: no such model, no hub, missing or damaged files.
    """
    device = torch.device(device)
    identity = identify_clip(name)
    model_name, settings = arguments(name)
    try:
        model: Any = open_clip.create_model(
            model_name,
            require_pretrained=True,
            weights_only=True,
            device="cpu",
            force_image_size=size,
            **settings,
        )
        tokenize: Any = open_clip.get_tokenizer(model_name)
    except (*BROKEN, AttributeError) as error:
        raise ModelError(
            f"CLIP {name}: it cannot be loaded ({first_line(error)}). Without a hub (HF_HUB_OFFLINE is set, "
            f"or no network) only folders and what is cached can be used; {REMEDY}"
        ) from error
    preprocess = open_clip.get_model_preprocess_cfg(model)
    size = preprocess["size"]
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ModelError(f"CLIP {name}: it sees pictures of {size}, only square ones are supported; {REMEDY}")
    return Clip(
        name=name,
        identity=identity,
        model=model.to(device).eval().requires_grad_(False),
        tokenize=tokenize,
        size=sides.pop(),
        mean=torch.tensor(preprocess["mean"], device=device).view(1, 3, 1, 1),
        std=torch.tensor(preprocess["std"], device=device).view(1, 3, 1, 1),
        device=device,
    )


def identify_clip(name: str = POCKET) -> dict[str, str]:
    """What provenance says of the model, without loading it. Cheap when called again.

    Returns:
        ``id`` (``pocket``, the folder's own name, or ``name``); for a folder the start of the sha256 over its
        files as ``weights``; for ``hf-hub:`` its commit as ``revision``; for a pair the ``source`` that its
        tag stands for in the installed open_clip; ``licence`` if the model card names one.

    Raises:
        ModelError: no such model, no hub.
    """
    if (folder := _folder(name)) is not None:
        weights = sorted(folder.glob("*.safetensors"))
        if not (folder / CONFIG).is_file() or not weights:
            found = sorted(file.name for file in folder.iterdir())
            raise ModelError(
                f"CLIP folder {folder}: expected {CONFIG} and open_clip_model.safetensors (other weight "
                f"files are not read), found {found}; copy it whole, or save the weights as safetensors"
            )
        named = name if name == POCKET else folder.resolve().name
        return {
            "id": named,
            "weights": fingerprint(folder, [*sorted(folder.glob("*.json")), *weights]),
            **licence(folder / "README.md"),
        }
    if name.startswith(HUB):
        revision = hub_commit(name.removeprefix(HUB), CONFIG, REMEDY)
        return {"id": name, "revision": revision, **hub_licence(name.removeprefix(HUB), revision)}
    pretrained = _pretrained(name)
    return {"id": name, "source": str(pretrained.get("hf_hub") or pretrained.get("url"))}


def _folder(name: str) -> Path | None:
    if name == POCKET:
        return shipped("clip")
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else None


def _pretrained(name: str) -> dict[str, Any]:
    """open_clip's settings of a pair ``MODEL/TAG``."""
    model, _, tag = name.rpartition("/")
    found = open_clip.get_pretrained_cfg(model, tag) if model else None
    if found:
        return found
    tags = open_clip.list_pretrained_tags_by_model(model or name)
    hint = f"its tags: {', '.join(tags)}" if tags else "open_clip knows no such model"
    raise ModelError(f"CLIP {name!r}: no such folder, and no pair MODEL/TAG ({hint}); {REMEDY}")


def arguments(name: str) -> tuple[str, dict[str, Any]]:
    """Name and further arguments of ``open_clip.create_model``."""
    if (folder := _folder(name)) is not None:
        return f"local-dir:{folder}", {}
    if name.startswith(HUB):
        return name, {}
    model, _, tag = name.rpartition("/")
    # open_clip only warns where a tag was trained with another activation than the model's settings say
    return model, {"pretrained": tag, "force_quick_gelu": bool(_pretrained(name).get("quick_gelu"))}
