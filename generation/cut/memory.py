"""How much memory the chains will need, found before they run.

The phases of one step are run on fake tensors, which have shapes and no data, while the bytes that are alive
are counted. Networks are built from their settings alone, so no weights are read.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import open_clip
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import CLIPTextConfig, CLIPTextModel

from generation.cut import chain
from generation.cut import clip as clips
from generation.cut.attention import MapReader, Words
from generation.cut.checkpoints import check_layout, resolve
from generation.cut.guidance import attention_step, refine
from generation.cut.models import StableDiffusion, attention_side_of, dtype_of
from generation.cut.settings import CutParams

CONTEXT = 77  # tokens a text, of every published checkpoint


@dataclass(frozen=True)
class Need:
    """Bytes. ``weights``: of the networks, once a process; ``peak``: beyond them, while a batch is made."""

    weights: int
    peak: int

    @property
    def total(self) -> int:
        return self.weights + self.peak


def fitting_batch(available: int, settings: CutParams, device: str = "cpu") -> int:
    """The most chains at a time that fit: ``settings.batch``, or the largest smaller power of two; 1 where
    even that is too much, since the attempt shows whether the prediction was right.

    Args:
        available: bytes that one process may use, its weights included.

    Raises:
        ModelError: a model does not exist or is of another kind.
    """
    batch = settings.batch
    while batch > 1 and predict(settings, device, batch).total > available:
        batch = 1 << (batch - 1).bit_length() - 1  # the next power of two below
    return batch


def peak_bytes(settings: CutParams, height: int, width: int, batch: int, device: str = "cpu") -> int:
    """As :func:`predict`, for pictures of another size: the peak alone.

    Args:
        height, width: in pixels, multiples of the checkpoint's stride.
    """
    return _predict(settings, device, batch, (height, width)).peak


def predict(settings: CutParams, device: str = "cpu", batch: int | None = None) -> Need:
    """What a batch of chains needs at the model's size.

    Args:
        settings: which models, which dtype, which size, what guides.
        device: kind of device it will run on; ``dtype: auto`` follows it.
        batch: chains at a time; None: ``settings.batch``.

    Raises:
        ModelError: a model does not exist or is of another kind.
    """
    return _predict(settings, device, batch or settings.batch, None)


def _predict(settings: CutParams, device: str, batch: int, shape: tuple[int, int] | None) -> Need:
    dtype = dtype_of(settings.dtype, torch.device(device))
    sd = _skeleton_sd(settings.model, dtype)
    clip = _skeleton_clip(settings.guide) if settings.guide else None
    # The judge sees one picture at a time, after the chains: its weights count, its peak is smaller.
    own = settings.referee if settings.referee != settings.guide else None
    judge = _skeleton_clip(own) if own else None
    networks = [sd.unet, sd.vae, sd.text_encoder, *(known.model for known in (clip, judge) if known)]
    with FakeTensorMode():
        if clip is not None:
            clip = replace(clip, mean=torch.zeros(1, 3, 1, 1), std=torch.ones(1, 3, 1, 1))
        tensors = [tensor for network in networks for tensor in _faked(network)]
        side = settings.size or sd.size
        height, width = shape or (side, side)
        phases = _phases(sd, clip, settings, batch, height, width)
        peak = max(_peak(phase, tensors) for phase in phases)
    return Need(sum(t.numel() * t.element_size() for t in tensors), peak)


def _phases(
    sd: StableDiffusion, clip: clips.Clip | None, settings: CutParams, batch: int, height: int, width: int
) -> list[Callable[[], Any]]:
    """What :func:`generation.cut.chain.sample` does one after the other, each with its own inputs."""
    reader = MapReader(sd)
    shape = (batch, sd.unet.config["in_channels"], height // sd.factor, width // sd.factor)

    def latents() -> Tensor:
        return torch.empty(shape)

    text = torch.empty(batch, CONTEXT, sd.unet.config["cross_attention_dim"])
    spoken = torch.ones(batch, CONTEXT, dtype=torch.bool)
    words = Words(spoken, spoken.float())
    location = torch.ones(batch, *shape[2:])
    at = torch.ones(batch, dtype=torch.long)

    def attend() -> Any:
        return attention_step(reader, latents(), at, text, words, location, 1.0, 0.0, 1.0, None)

    def evaluate() -> Any:
        texts = chain._Text(text, text, text)
        with torch.no_grad():
            return chain._evaluate(reader, latents(), latents(), at, texts, settings, read=True)

    def encode() -> Any:
        return sd.encode(torch.empty(batch, 3, height, width))

    def decode() -> Any:
        with torch.no_grad():
            return sd.decode(torch.empty(1, *shape[1:]))

    phases: list[Callable[[], Any]] = [encode, evaluate, decode]
    if settings.attention:
        phases.append(attend)
    if clip is not None and settings.refinement:
        known, detail = clip, torch.empty(batch, 1)  # of any width: it only joins the last product
        phases.append(lambda: refine(sd, known, latents(), detail, location, 1.0))
    return phases


def _skeleton_sd(name: str, dtype: torch.dtype) -> StableDiffusion:
    """A checkpoint's networks without weights, and no tokenizer."""
    source = resolve(name)
    check_layout(source)
    with torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(source.config("unet"))
        vae: Any = AutoencoderKL.from_config(source.config("vae"))
        text: Any = CLIPTextModel(CLIPTextConfig.from_dict(source.config("text_encoder")))
    for network in (unet, vae, text):
        torch.nn.Module.to(network, dtype).eval().requires_grad_(False)
        network.to(memory_format=torch.channels_last)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    nothing: Any = None
    return StableDiffusion(
        name=name,
        identity={},
        tokenizer=nothing,
        text_encoder=text,
        unet=unet,
        vae=vae,
        alphas=torch.ones(1000),
        prediction="epsilon",
        device=torch.device("cpu"),
        dtype=dtype,
        size=unet.config.sample_size * factor,
        factor=factor,
        attention_side=attention_side_of(unet.config, name),
    )


def _skeleton_clip(name: str) -> clips.Clip:
    model_name, settings = clips.arguments(name)
    settings.pop("pretrained", None)
    with torch.device("meta"), _without_warnings():  # open_clip warns that nothing was loaded
        model: Any = open_clip.create_model(model_name, load_weights=False, device="meta", **settings)
    size = open_clip.get_model_preprocess_cfg(model)["size"]
    nothing: Any = None
    return clips.Clip(
        name=name,
        identity={},
        model=model.eval().requires_grad_(False),
        tokenize=nothing,
        size=size if isinstance(size, int) else size[0],
        mean=nothing,
        std=nothing,
        device=torch.device("cpu"),
    )


@contextmanager
def _without_warnings() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _faked(network: Any) -> list[Tensor]:
    """Puts fake tensors in place of a network's meta tensors, and gives them back."""
    found: list[Tensor] = []
    for module in network.modules():
        for table in (module._parameters, module._buffers):
            for name, old in table.items():
                if old is not None:
                    new = torch.empty_strided(old.shape, old.stride(), dtype=old.dtype, device="cpu")
                    table[name] = torch.nn.Parameter(new, False) if table is module._parameters else new
                    found.append(table[name])
    return found


def _peak(run: Callable[[], Any], known: Iterable[Tensor]) -> int:
    """The most bytes that were alive at once while ``run`` ran, those of ``known`` not counted."""
    with _Alive(known) as alive:
        run()
    return alive.peak


class _Alive(TorchDispatchMode):
    """Counts bytes of storages from the operation that makes them until they are freed, also by backward."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self._count(value.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._seen:
            self._seen.add(key)
            self.now += size
            weakref.finalize(storage, self._forget, key, size).atexit = False

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size
