"""The gradients that make the anomaly: attention to its word, likeness to its description (core.md 1.5), and,
where a detector is at hand, away from what it finds already.

Steps have a fixed length: each sample's gradient is divided by its root mean square over the allowed latents
(inference: the released step sizes fit the gradients of one checkpoint; a length in latents fits any).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from generation.critic import Critic
from generation.cut.attention import MapReader, Words, anomaly_map
from generation.cut.clip import Clip
from generation.cut.models import StableDiffusion
from generation.protocol import Box

ATTENTION_STEP = 0.003  # root mean square of a step at α = 1, in units of the latents' deviation
IMAGE_STEP = 0.15  # of a refinement step at strength 1
DECODED = 2  # pictures at a time whose gradient passes through the decoder
SCALE = 256.0  # of a gradient on its way through half precision; its length is normalised after
ALIGN_STEPS, ALIGN_RATE = 20, 0.1  # of the initial alignment, as released (core.md 1.7)


def attention_step(
    reader: MapReader,
    latents: Tensor,
    t: Tensor,
    text: Tensor,
    words: Words,
    location: Tensor,
    strength: float,
    progress: float,
    reach: float,
    start: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One step towards a strong, localised map of the anomaly word.

    L_att = 1 − max over the location; step length α_t = λ·(1 + Δ)·n_t / n_start, clipped to [0, 4λ] (core.md
    1.5, 1.8), n = places above the map's own mean within the location. A sample whose map reaches ``reach``
    rests.

    Args:
        latents: N×c×h×w; no gradient needed.
        t: int64, N.
        text: N×tokens×d of the anomaly prompts.
        location: float32, N×h×w in {0, 1}; where the anomaly may be.
        strength: λ.
        progress: Δ, share of the executed chain that is done, in [0, 1].
        start: n_start of each sample, float32, N; None at the first step.

    Returns:
        The latents, moved within the location only; n_start; the objective max A⊙m before the step, N.
    """
    with torch.enable_grad():
        z = latents.detach().requires_grad_(True)
        maps = anomaly_map(reader.maps(z, t, text), words)
        inside = to_maps(location, maps.shape[-2:])
        held = (maps * inside).amax(dim=(1, 2))
        (gradient,) = torch.autograd.grad(SCALE * held.sum(), z)
    found = maps.detach()
    active = ((found > found.mean(dim=(1, 2), keepdim=True)) & (inside > 0)).sum(dim=(1, 2)).float()
    start = active.clamp(min=1) if start is None else start
    alpha = (strength * (1 + progress) * active / start).clamp(0, 4 * strength)
    alpha = alpha * (held.detach() < reach)
    step = ATTENTION_STEP * alpha[:, None, None, None] * _unit(gradient * location[:, None], location)
    return latents + step, start, held.detach()


def refine(
    sd: StableDiffusion, clip: Clip, clean: Tensor, detail: Tensor, location: Tensor, strength: float
) -> tuple[Tensor, Tensor]:
    """One step of the predicted clean latents towards the detailed description.

    L_img = 1 − cos(CLIP_text(c′), CLIP_image(decode(x̂₀))) (core.md 1.5, 1.8). The step is taken on x̂₀ itself,
    as if the UNet did not depend on the latents: a gradient through decoder and CLIP alone (inference; the
    manifold-preserving guidance of He et al. 2023 does the same).

    Args:
        clean: x̂₀, N×c×h×w.
        detail: N×d, CLIP's embeddings of the descriptions.
        location: float32, N×h×w in {0, 1}.

    Returns:
        The moved latents, and the cosine before the step, N.
    """
    gradients, cosines = [], []
    # A few at a time: the decoder's activations, kept for its gradient, are the peak of a chain's memory.
    for few, described in zip(clean.detach().split(DECODED), detail.split(DECODED), strict=True):
        with torch.enable_grad():
            z = few.requires_grad_(True)
            cosine = clip.similarity(sd.decode(z).clamp(0, 1), described)
            gradients += torch.autograd.grad(SCALE * cosine.sum(), z)
        cosines.append(cosine.detach())
    gradient = torch.cat(gradients)
    step = IMAGE_STEP * strength * _unit(gradient * location[:, None], location)
    return clean + step, torch.cat(cosines)


@dataclass(frozen=True)
class Guide:
    """Attributes: ``critic`` to be escaped; ``strength`` of the steps, in those of the refinement."""

    critic: Critic
    strength: float


@dataclass(frozen=True)
class Scene:
    """The whole picture around a crop, as a critic sees it.

    Attributes:
        picture: float32 3×size×size in [0, 1], the untouched source.
        box: of the crop in it.
        category: its name.
    """

    picture: Tensor
    box: Box
    category: str


def practise(
    sd: StableDiffusion,
    clip: Clip | None,
    guide: Guide,
    clean: Tensor,
    twin: Tensor,
    detail: Tensor | None,
    location: Tensor,
    scenes: Sequence[Scene],
) -> tuple[Tensor, Tensor]:
    """One step of the predicted clean latents down the critic's margin inside the anomaly.

    The idea is deliberate practice (Askari-Hemmat et al. 2025): guidance by what the learner does not know
    yet, on x̂₀ as in :func:`refine`. The rest is inference. The critic sees the source plus the difference
    of the decoded twins, as the sample will be; its margin is averaged over the picture, weighted by that
    difference. The difference keeps its length, so that fading away is no way out; what goes against the
    detailed description is projected out (gradient surgery, Yu et al. 2020); and a sample that the critic
    does not find any more (margin ≤ 0) rests.

    Args:
        clean, twin: x̂₀ of both chains, N×c×h×w.
        detail: N×d, CLIP's embeddings of the descriptions; None without ``clip``.
        location: float32, N×h×w in {0, 1}.

    Returns:
        The moved latents, and the mean margin before the step, N.
    """
    steps, margins = [], []
    for at in range(0, len(clean), DECODED):
        few = slice(at, at + DECODED)
        place = location[few, None]
        with torch.no_grad():
            before = sd.decode(twin[few]).clamp(0, 1)
        with torch.enable_grad():
            z = clean[few].detach().requires_grad_(True)
            picture = sd.decode(z).clamp(0, 1)
            change = (picture - before) * F.interpolate(place, picture.shape[-2:])
            margin = _mean_margin(guide.critic, change, scenes[few])
            (gradient,) = torch.autograd.grad(SCALE * margin.sum(), z, retain_graph=clip is not None)
            down = -gradient.float() * place * (margin.detach() > 0)[:, None, None, None]
            if clip is not None and detail is not None:
                (up,) = torch.autograd.grad(SCALE * clip.similarity(picture, detail[few]).sum(), z)
                down = _without_conflict(down, up.float() * place)
        steps.append(down)
        margins.append(margin.detach())
    step = IMAGE_STEP * guide.strength * _unit(torch.cat(steps), location)
    return clean + step, torch.cat(margins)


def _mean_margin(critic: Critic, change: Tensor, scenes: Sequence[Scene]) -> Tensor:
    """Margins, N, of the scenes with a change N×3×h×w added to their crops; weighted by the change."""
    length = change.flatten(1).norm(dim=1).clamp(min=1e-6)
    change = change * (length.detach() / length)[:, None, None, None]
    seen, weights = [], []
    for one, scene in zip(change, scenes, strict=True):
        y0, y1, x0, x1 = scene.box
        part = F.interpolate(one[None], (y1 - y0, x1 - x0), mode="bilinear", antialias=True)[0]
        height, width = scene.picture.shape[-2:]
        part = F.pad(part, (x0, width - x1, y0, height - y1))
        seen.append((scene.picture.to(part) + part).clamp(0, 1))
        weights.append(part.detach().abs().amax(dim=0))
    maps = critic.margins(torch.stack(seen), [scene.category for scene in scenes])
    weight = torch.stack(weights).to(maps)
    return ((maps * weight).sum(dim=(1, 2)) / weight.sum(dim=(1, 2)).clamp(min=1e-6)).to(change.device)


def _without_conflict(step: Tensor, wanted: Tensor) -> Tensor:
    """``step`` without the part of it that goes against ``wanted``, of each sample."""
    along = (step * wanted).sum(dim=(1, 2, 3), keepdim=True)
    square = wanted.square().sum(dim=(1, 2, 3), keepdim=True).clamp(min=1e-30)
    return step - along.clamp(max=0) / square * wanted


def align(
    text: Tensor, normal: Tensor, detail: Tensor, words: Words, spoken: tuple[Tensor, Tensor]
) -> Tensor:
    """Moves the rows of the anomaly word in the direction "normal prompt → detailed prompt" (core.md 1.7).

    The corrected form: cosine over the embedding axis between e_anom − mean(E_normal) and mean(E_detailed) −
    mean(E_normal), means over the prompts' own tokens; twenty steps of 0.1; rows keep their length.

    Args:
        text, normal, detail: N×tokens×d, embeddings of the three prompts.
        words: of ``text``.
        spoken: bool, N×tokens each: the own tokens of ``normal`` and ``detail``.

    Returns:
        N×tokens×d; only rows of the anomaly word differ from ``text``.
    """
    start = _mean(normal, spoken[0])
    wanted = _mean(detail, spoken[1]) - start
    rows = words.anomaly[:, :, None] > 0
    length = text.norm(dim=-1, keepdim=True)
    current = text
    for _ in range(ALIGN_STEPS):
        with torch.enable_grad():
            e = current.detach().requires_grad_(True)
            cosine = torch.cosine_similarity(e - start[:, None], wanted[:, None], dim=-1)
            (gradient,) = torch.autograd.grad((cosine * rows[:, :, 0]).sum(), e)
        moved = current + ALIGN_RATE * length * gradient
        current = torch.where(rows, moved * length / moved.norm(dim=-1, keepdim=True).clamp(min=1e-6), text)
    return current


def _mean(text: Tensor, spoken: Tensor) -> Tensor:
    weight = spoken.float()
    return (text * weight[:, :, None]).sum(dim=1) / weight.sum(dim=1, keepdim=True).clamp(min=1)


def _unit(gradient: Tensor, location: Tensor) -> Tensor:
    """Each sample divided by its root mean square over the allowed latents; 0 stays 0."""
    places = location.sum(dim=(1, 2)).clamp(min=1) * gradient.shape[1]
    rms = (gradient.square().sum(dim=(1, 2, 3)) / places).sqrt()
    return torch.where(rms[:, None, None, None] > 0, gradient / rms.clamp(min=1e-30)[:, None, None, None], 0)


def to_maps(location: Tensor, shape: torch.Size) -> Tensor:
    """A place counts if any of its latents is allowed."""
    if location.shape[-2:] == shape:
        return location
    return torch.nn.functional.adaptive_max_pool2d(location[:, None], shape)[:, 0]
