"""The released AnomalyAny loop as a reference to measure against, with its costs and its slips (core.md
1.2–1.7).

Written anew after the description and the order of calls in the published code; nothing of the product's
sampler is used. What is faithful on purpose:

* PLMS on the checkpoint's schedule. Its second step starts again from the sample that the first one saw, so
  the latent steps and the blend made in between are lost, and the sample lags one timestep behind.
* The latent of the normal picture is a sample of the posterior, not its mean.
* Every attention of the UNet computes its weights openly, and every UNet pass runs to the end, also where
  only maps at ``side``² are read.
* Pass A runs both halves with gradients on, only to fill the store; its graph lives until the inner loop
  ends. The first map of the inner loop therefore mixes both halves.
* Gradients are taken with ``retain_graph=True``, so what a graph saved is freed only when the next
  iteration's graph has replaced it: about two graphs live at once, beside that of pass A. Weights require a
  gradient (none is ever computed), as in a pipeline that nobody froze, so more activations are saved.
* Every iteration differentiates twice: towards the latents, and towards the embeddings of both halves.
* The picture that CLIP sees is decoded from the noisy latents; the text is encoded anew each time.
* No mask in the attention loss; the activation count that was to weight it only decides when to stop early.
* The first alignment of the embedding takes its cosine along the tokens, where it depends on nothing but
  signs: 20 steps that change nothing. A word of several tokens makes it fail in the released code, and is
  left out here.
* Refinement fixes the number of its repeats, each with two passes whose results nobody reads.
* A mask blends at the timestep just left, not at the one that comes.

Not reproduced: loading CLIP twice for every picture (a matter of start-up), and the blend's noise, which the
released code takes from the global stream; here it comes from the given one, so that a seed says it all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import PNDMScheduler
from torch import Tensor, nn

from generation.cut.clip import Clip
from generation.cut.models import StableDiffusion
from generation.cut.tokens import token_positions

STEPS, GAMMA, GUIDANCE, INNER = 200, 0.3, 12.5, 10
SCALE, SCALE_RANGE = 50.0, (1.0, 0.5)
THRESHOLDS = {0: 0.05, 10: 0.5, 20: 0.8}
EARLY = 10  # steps that may be refined, so of the thresholds only the first is ever looked up
REFINEMENTS = 5
WINDOW = 0.7  # share of the chain after which CLIP has a say
STEP, STEP_FALL, LEAST_STEP = 0.02, 1e-4, 1e-4
IMAGE_WEIGHT, ATTENTION_WEIGHT = 0.1, 0.5
COMPACT = (10 / 256, 50 / 256)  # shares of active positions between which a map counts as compact
ALIGNMENTS, ALIGNMENT_STEP = 20, 0.1


@dataclass(frozen=True)
class Trace:
    """What happened on the way, one entry a step.

    Attributes:
        attention: the objective, the largest value of the smoothed map (the least of several tokens'), before
            the last inner step.
        similarity: cosine of the decoded noisy latents with the description, likewise; NaN before the window.
        active: positions at or above the map's mean in the last inner iteration.
        early: steps at which the early stage ran.
        refined: whether a threshold was missed and the refinement ran.
        unet_calls: forward passes of the UNet, a pass over both halves counted once.
        calls: how often each of ``flops.blocks`` was used at batch 1.
    """

    attention: list[float]
    similarity: list[float]
    active: list[int]
    early: int
    refined: bool
    unet_calls: int
    calls: dict[str, int]


@dataclass(frozen=True)
class Released:
    """Attributes:
    image: float32, 1×3×H×W in [0, 1].
    latents: float32, 1×c×h×w, at the end of the chain.
    maps: float32, side×side×tokens; probabilities of the last pass averaged over layers, heads and both
        halves, which is what the released code draws as attention maps.
    """

    image: Tensor
    latents: Tensor
    maps: Tensor
    trace: Trace


# -- attention ------------------------------------------------------------------------------------------


class Store:
    """Weights of cross-attentions with exactly ``side``² queries; a finished pass replaces the one before."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.incoming: list[Tensor] = []
        self.weights: list[Tensor] = []

    def finish(self) -> None:
        if not self.incoming:
            raise ValueError(f"no cross-attention of the UNet has {self.side}×{self.side} queries")
        self.weights, self.incoming = self.incoming, []

    def average(self) -> Tensor:
        """side×side×tokens: the mean over layers, heads and whatever batch the last pass had."""
        return torch.cat(self.weights).mean(0).unflatten(0, (self.side, self.side))


class OpenAttention:
    """Attention with its weights written out, of which those that a store wants are kept."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key = attn.head_to_batch_dim(attn.to_k(context))
        value = attn.head_to_batch_dim(attn.to_v(context))
        weights = attn.get_attention_scores(query, key, attention_mask)
        if encoder_hidden_states is not None and weights.shape[1] == self.store.side**2:
            self.store.incoming.append(weights)
        mixed = attn.batch_to_head_dim(torch.bmm(weights, value))
        return attn.to_out[1](attn.to_out[0](mixed))


@contextmanager
def opened(unet: Any, processor: Any) -> Iterator[None]:
    """All attentions of a UNet go through ``processor`` meanwhile."""
    before = dict(unet.attn_processors)
    unet.set_attn_processor(processor)
    try:
        yield
    finally:
        unet.set_attn_processor(before)


@contextmanager
def _unfrozen(networks: Sequence[nn.Module]) -> Iterator[None]:
    """Weights require a gradient meanwhile, so that graphs save what they save in the released code."""
    frozen = [p for p in chain(*(n.parameters() for n in networks)) if not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def smoothed(average: Tensor, token: int) -> Tensor:
    """The map of one token (core.md 1.4): without the first and the last token, times 100, softmax over the
    others, smoothed 3×3 with the released kernel (sigma 0.5, effectively 0.71).

    Args:
        average: side×side×tokens, as :meth:`Store.average` gives it.

    Returns:
        side×side, in [0, 1].
    """
    shares = (average[:, :, 1:-1] * 100).softmax(-1)[:, :, token - 1]
    bell = torch.exp(-(torch.tensor([-1.0, 0.0, 1.0], device=shares.device) ** 2))
    kernel = torch.outer(bell, bell) / bell.sum() ** 2
    padded = F.pad(shares[None, None], (1, 1, 1, 1), mode="reflect")
    return F.conv2d(padded, kernel[None, None].to(padded.dtype))[0, 0]


def attention_loss(average: Tensor, tokens: Sequence[int]) -> Tensor:
    """max over tokens of max(0, 1 − largest value of its map)."""
    return torch.stack([(1 - smoothed(average, token).max()).clamp_min(0) for token in tokens]).max()


@torch.no_grad()
def read_objective(
    sd: StableDiffusion, latents: Tensor, prompt: str, word: str, timestep: int = 1, side: int | None = None
) -> tuple[float, Tensor]:
    """The attention objective of finished latents, read alike for whatever made them: one conditional pass
    with the prompt's own embedding.

    Args:
        latents: 1×c×h×w.

    Returns:
        the largest value of the word's map (the least of several tokens'), and side×side×tokens.
    """
    store = Store(side or sd.attention_side)
    with opened(sd.unet, OpenAttention(store)):
        t = torch.tensor(timestep, device=sd.device)
        sd.unet(latents.to(sd.device, sd.dtype), t, sd.embed([prompt]).to(sd.dtype))
    store.finish()
    average = store.average().float()
    return 1 - float(attention_loss(average, token_positions(sd, prompt, word))), average


# -- the loop -------------------------------------------------------------------------------------------


def plms(sd: StableDiffusion, steps: int) -> Any:
    """The scheduler that the 1.x checkpoints ship (PLMS, offset 1, last alpha of step 0), on the schedule of
    this one: ``steps`` + 1 timesteps."""
    scheduler: Any = PNDMScheduler(
        num_train_timesteps=len(sd.alphas),
        skip_prk_steps=True,
        set_alpha_to_one=False,
        prediction_type=sd.prediction,
        steps_offset=1,
    )
    scheduler.alphas_cumprod = sd.alphas.float()
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    scheduler.set_timesteps(steps)
    return scheduler


def align(text: Tensor, detail: Tensor, normal: Tensor, token: int) -> Tensor:
    """The first alignment of the anomaly token's row, as released: the cosine runs along the tokens, so its
    gradient is zero but for rounding.

    Args:
        text, detail, normal: 2×tokens×d, the empty prompt first.
    """
    row = text[:, [token]]
    target = (detail - normal).mean(0, keepdim=True)
    for _ in range(ALIGNMENTS):
        with torch.enable_grad():
            row = row.detach().requires_grad_(True)
            moved = row.mean(0, keepdim=True) - normal[:, [token]].mean(0, keepdim=True)
            loss = 1 - F.cosine_similarity(moved, target, dim=1).mean()
            row = row - ALIGNMENT_STEP * _gradient(loss, row)
    aligned = text.detach().clone()
    aligned[:, [token]] = row.detach()
    return aligned


def _gradient(loss: Tensor, variable: Tensor) -> Tensor:
    return torch.autograd.grad(loss, [variable], retain_graph=True)[0]


@torch.no_grad()
def released(
    sd: StableDiffusion,
    clip: Clip,
    image: Tensor,
    prompt: str,
    normal_prompt: str,
    detail: str,
    word: str,
    generator: torch.Generator,
    *,
    mask: Tensor | None = None,
    steps: int = STEPS,
    gamma: float = GAMMA,
    guidance: float = GUIDANCE,
    inner: int = INNER,
    scale: float = SCALE,
    scale_range: tuple[float, float] = SCALE_RANGE,
    thresholds: Mapping[int, float] = THRESHOLDS,
    side: int | None = None,
) -> Released:
    """One picture by the released loop; defaults are those of its notebooks.

    Args:
        sd, clip: in float32, loaded without checkpointing.
        image: float, 1×3×S×S in [0, 1], the normal picture.
        word: of ``prompt``; the released code asks for the indices of its tokens.
        generator: of ``sd.device``.
        mask: 1×1×H×W; where it is not zero the anomaly may be. None: everywhere, without blending.
        steps: T; int(T·gamma) + 1 of the T + 1 timesteps are executed.
        inner: iterations a step, at least 1.
        side: of the attention maps; None: ``sd.attention_side``, 16 in the released code.

    Raises:
        ValueError: no step would be executed, or no attention has maps of that side.
    """
    count = int(steps * gamma)
    if not 1 <= count <= steps:
        raise ValueError(f"steps {steps} and gamma {gamma}: {count} steps, expected 1 to {steps}")
    store, tokens = Store(side or sd.attention_side), token_positions(sd, prompt, word)
    passes = _Passes(sd, clip, store, detail, tokens)
    with opened(sd.unet, OpenAttention(store)), _unfrozen((sd.unet, sd.vae, clip.model)):
        scheduler = plms(sd, steps)
        timesteps = scheduler.timesteps[steps - count :]
        scales = torch.linspace(*scale_range, steps + 1, dtype=torch.float64).tolist()
        text, described, normal = (passes.embed(words) for words in (prompt, detail, normal_prompt))
        source = passes.encode(image, generator)
        if len(tokens) == 1:
            text = align(text, described, normal, tokens[0])
        latents = scheduler.add_noise(source, _noise(source, generator), timesteps[:1])
        where = None if mask is None else passes.shrink(mask, source)

        attention: list[float] = []
        similarity: list[float] = []
        active: list[int] = []
        early, refined, may_refine = 0, False, True
        for i, t in enumerate(timesteps):
            with torch.enable_grad():
                both = passes.unet(torch.cat([latents] * 2), t, text)  # pass A; its graph is kept alive
                latents = latents.clone().detach().requires_grad_(True)
                text = text.clone().detach().requires_grad_(True)
                size = max(LEAST_STEP, STEP - STEP_FALL * i)
                for _ in range(inner):
                    image_loss = passes.image_loss(latents) if i > WINDOW * count else None
                    found = smoothed(store.average(), tokens[-1])
                    positive = int((found >= found.mean()).sum())
                    if COMPACT[0] < positive / found.numel() < COMPACT[1]:
                        may_refine = False
                    loss = passes.attention_loss(latents, t, text[1:])
                    total = ATTENTION_WEIGHT * (i / count) * loss
                    if image_loss is not None:
                        total = total + IMAGE_WEIGHT * image_loss
                    latents = latents - 2 * size * passes.towards_latents(total, latents)
                    total = total + 1 - F.cosine_similarity(text, described, dim=1).mean()
                    text = text - size * passes.towards_text(total, text)
                    cosine = float("nan") if image_loss is None else 1 - float(image_loss.detach())
                    del total, image_loss, found
                attention.append(1 - float(loss.detach()))
                similarity.append(cosine)
                active.append(positive)
                del both
                if i < EARLY and may_refine:
                    early += 1
                    latents = latents.clone().detach().requires_grad_(True)
                    passes.unet(latents, t, text[1:])  # nobody reads the result
                    if i in thresholds and float(loss.detach()) > 1 - thresholds[i]:
                        refined = True
                        latents = passes.refine(latents, t, text, scale, scales[i])
            empty, found = passes.unet(torch.cat([latents] * 2), t, text).chunk(2)
            latents = scheduler.step(empty + guidance * (found - empty), int(t), latents).prev_sample
            noised = scheduler.add_noise(source, _noise(source, generator), t[None])
            if where is not None:
                latents = latents * where + noised * (1 - where)
        return Released(
            image=passes.decode(latents),
            latents=latents,
            maps=store.average(),
            trace=Trace(attention, similarity, active, early, refined, passes.unet_calls, dict(passes.calls)),
        )


class _Passes:
    """The networks, and how often they were used for one picture."""

    def __init__(
        self, sd: StableDiffusion, clip: Clip, store: Store, detail: str, tokens: Sequence[int]
    ) -> None:
        self.sd, self.clip, self.store, self.detail, self.tokens = sd, clip, store, detail, tokens
        self.calls: Counter[str] = Counter()
        self.unet_calls = 0

    def refine(self, latents: Tensor, t: Tensor, text: Tensor, scale: float, share: float) -> Tensor:
        for _ in range(REFINEMENTS):
            latents = latents.clone().detach().requires_grad_(True)
            loss = self.attention_loss(latents, t, text[1:])
            latents = latents - scale * (share / 10) ** 0.5 * self.towards_latents(loss, latents)
            with torch.no_grad():  # neither result is read
                self.unet(latents, t, text[:1])
                self.unet(latents, t, text[1:])
        latents = latents.clone().detach().requires_grad_(True)
        loss = self.attention_loss(latents, t, text[1:])
        return latents - scale * share**0.5 * self.towards_latents(loss, latents)

    def unet(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        result = self.sd.unet(latents, t.to(latents.device), text).sample
        self.store.finish()
        self.unet_calls += 1
        self.calls["unet"] += len(latents)
        return result

    def attention_loss(self, latents: Tensor, t: Tensor, text: Tensor) -> Tensor:
        self.unet(latents, t, text)
        return attention_loss(self.store.average(), self.tokens)

    def image_loss(self, latents: Tensor) -> Tensor:
        self.calls.update({"decode_grad": 1, "image_grad": 1, "clip_text": 1})
        picture = self.sd.decode(latents).clamp(0, 1)
        return 1 - self.clip.similarity(picture, self.clip.text([self.detail])).mean()

    def towards_latents(self, loss: Tensor, latents: Tensor) -> Tensor:
        self.calls["attention_to_latents"] += 1
        return _gradient(loss, latents)

    def towards_text(self, loss: Tensor, text: Tensor) -> Tensor:
        self.calls["attention_to_text"] += 1
        return _gradient(loss, text)

    def embed(self, text: str) -> Tensor:
        """2×tokens×d; the empty prompt, encoded anew for each text, comes first."""
        self.calls["text"] += 2
        return torch.cat([self.sd.embed([""]), self.sd.embed([text])])

    def encode(self, image: Tensor, generator: torch.Generator) -> Tensor:
        self.calls["encode"] += 1
        x = image.to(self.sd.device, self.sd.dtype) * 2 - 1
        drawn = self.sd.vae.encode(x).latent_dist.sample(generator)
        return (drawn - (self.sd.vae.config.get("shift_factor") or 0.0)) * self.sd.vae.config[
            "scaling_factor"
        ]

    def decode(self, latents: Tensor) -> Tensor:
        self.calls["decode"] += 1
        return self.sd.decode(latents).clamp(0, 1)

    def shrink(self, mask: Tensor, latents: Tensor) -> Tensor:
        wanted = F.interpolate(mask.to(latents), latents.shape[-2:], mode="nearest")
        return (wanted != 0).to(latents.dtype)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
