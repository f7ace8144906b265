"""Cross-attention maps of a UNet, read without changing it, and what the method makes of them (core.md 1.4).

Maps are read by hooks, so a checkpoint keeps whatever attention implementation it runs with. A pass that only
wants maps stops after the last layer that gives one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.cut.models import StableDiffusion
from generation.cut.tokens import token_positions

SHARPNESS = 100.0  # factor before the softmax over the words, as released
SIGMA = 0.5  # of the smoothing kernel exp(−(x / 2σ)²), as released: an effective deviation of 0.71


class _Enough(Exception):
    """Every wanted map has been read: the rest of the UNet need not run."""


class MapReader:
    """Reads the cross-attention layers of one level of a UNet.

    The level is the one whose queries form a square of ``sd.attention_side`` at the native size; at another
    size the maps scale with it. All of them are read: two on the way down and three on the way up in SD 1.x.
    """

    def __init__(self, sd: StableDiffusion):
        self._unet = sd.unet
        self._transformers = _level(sd)
        self._maps: list[Tensor] | None = None
        self._stop = False
        self._rows = slice(None)
        for transformer in self._transformers:
            for block in transformer.transformer_blocks:
                block.attn2.register_forward_hook(self._store, with_kwargs=True)
        self._transformers[-1].register_forward_hook(self._finish)

    @property
    def layers(self) -> int:
        return sum(len(transformer.transformer_blocks) for transformer in self._transformers)

    def maps(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Maps alone; differentiable; the UNet stops after the last layer of the level.

        Args:
            latents: N×c×h×w.
            t: int64, N.
            text: N×tokens×d.

        Returns:
            float32, N×h'×w'×tokens: probabilities, averaged over layers and heads.
        """
        with self._reading(slice(None), stop=True) as found, suppress(_Enough):
            self._run(latents, t, text)
        return _average(found, latents.shape[-2:])

    def predict(self, latents: Tensor, t: Tensor, text: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """A whole evaluation, and the maps of some of its rows.

        Returns:
            The UNet's output, and maps as :meth:`maps` gives them, of ``rows``.
        """
        with self._reading(rows, stop=False) as found:
            output = self._run(latents, t, text).sample
        return output, _average(found, latents.shape[-2:])

    def _run(self, latents: Tensor, t: Tensor, text: Tensor) -> Any:
        return self._unet(latents.to(self._unet.dtype), t, text.to(self._unet.dtype))

    @contextmanager
    def _reading(self, rows: slice, *, stop: bool) -> Iterator[list[Tensor]]:
        # Gradient checkpointing runs layers a second time during backward, when nobody reads: the layers that
        # are read keep their activations instead.
        again = [t for t in self._transformers if t.gradient_checkpointing]
        self._maps, self._rows, self._stop = [], rows, stop
        for transformer in again:
            transformer.gradient_checkpointing = False
        try:
            yield self._maps
        finally:
            self._maps, self._stop = None, False
            for transformer in again:
                transformer.gradient_checkpointing = True

    def _store(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        if self._maps is None:
            return
        hidden = (args[0] if args else kwargs["hidden_states"])[self._rows]
        text = kwargs["encoder_hidden_states"][self._rows]
        heads = attention.heads
        query = attention.to_q(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)
        key = attention.to_k(text).unflatten(-1, (heads, -1)).transpose(1, 2)
        scores = (query.float() @ key.float().transpose(-1, -2)) * attention.scale
        self._maps.append(scores.softmax(dim=-1).mean(dim=1))

    def _finish(self, *_: Any) -> None:
        if self._stop:
            raise _Enough


def _level(sd: StableDiffusion) -> list[Any]:
    """The transformers whose queries form a square of ``sd.attention_side`` at native size, as they run."""
    unet: Any = sd.unet
    depth = len(unet.down_blocks)
    side = unet.config.sample_size
    sides = [-(-side // 2**level) for level in range(depth)]
    blocks = [*zip(unet.down_blocks, sides, strict=True), (unet.mid_block, sides[-1])]
    blocks += zip(unet.up_blocks, reversed(sides), strict=True)
    return [
        transformer
        for block, at in blocks
        if at == sd.attention_side
        for transformer in (getattr(block, "attentions", None) or ())
    ]


def _average(maps: list[Tensor], shape: Sequence[int]) -> Tensor:
    """Queries back to a rectangle of the latents' aspect."""
    mean = torch.stack(maps).mean(dim=0)
    places = mean.shape[1]
    height = round((places * shape[0] / shape[1]) ** 0.5)
    return mean.unflatten(1, (height, places // height))


@dataclass(frozen=True)
class Words:
    """Which tokens of some prompts are words, and which of those name the anomaly.

    Attributes:
        spoken: bool, N×tokens; the prompt's own tokens: neither begin, end nor padding, which would swallow
            the softmax (core.md 7).
        anomaly: float32, N×tokens in {0, 1}; the anomaly's tokens.
    """

    spoken: Tensor
    anomaly: Tensor


def words_of(sd: StableDiffusion, prompts: Sequence[str], anomalies: Sequence[str]) -> Words:
    """Finds the anomaly words in their prompts; a word may have several tokens.

    Raises:
        UsageError: a word is not in its prompt, or a prompt is too long.
    """
    anomaly = torch.zeros((len(prompts), sd.context))
    for row, (prompt, word) in enumerate(zip(prompts, anomalies, strict=True)):
        anomaly[row, token_positions(sd, prompt, word)] = 1
    return Words(spoken_tokens(sd, prompts), anomaly.to(sd.device))


def spoken_tokens(sd: StableDiffusion, texts: Sequence[str]) -> Tensor:
    """bool, N×tokens; a text's own tokens, without begin, end and padding."""
    tokenized: Any = sd.tokenizer(list(texts))
    spoken = torch.zeros((len(texts), sd.context), dtype=torch.bool)
    for row, ids in enumerate(tokenized["input_ids"]):
        spoken[row, 1 : len(ids) - 1] = True
    return spoken.to(sd.device)


def anomaly_map(maps: Tensor, words: Words) -> Tensor:
    """The smoothed map of the anomaly word (core.md 1.4, steps 3 and 4).

    Args:
        maps: N×h×w×tokens, probabilities.

    Returns:
        float32, N×h×w, in [0, 1]: share of the prompt's words that each place gives to the anomaly.
    """
    scores = (SHARPNESS * maps).masked_fill(~words.spoken[:, None, None], float("-inf"))
    share = (scores.softmax(dim=-1) * words.anomaly[:, None, None]).sum(dim=-1)
    return smooth(share)


def smooth(maps: Tensor) -> Tensor:
    """3×3 Gaussian, reflected at the border; N×h×w."""
    axis = torch.arange(-1, 2, device=maps.device, dtype=maps.dtype)
    line = torch.exp(-((axis / (2 * SIGMA)) ** 2))
    kernel = (line[:, None] * line[None, :]) / line.sum() ** 2
    padded = F.pad(maps[:, None], (1, 1, 1, 1), mode="reflect" if min(maps.shape[-2:]) > 1 else "replicate")
    return F.conv2d(padded, kernel[None, None])[:, 0]
