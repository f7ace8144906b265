"""Twin chains: an anomaly and its normal counterpart, denoised side by side from one partly noised picture.

Both start from the same noised latents of the normal picture (core.md 1.3) and are denoised by DDIM with the
same guidance, one towards the anomaly prompt and one towards the normal prompt (1.16). What differs between
the two decoded pictures is the anomaly: neither the autoencoder's blur nor the model's idea of the material.
Attention- and prompt-guided steps act on the anomaly chain alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from generation.cut.attention import MapReader, anomaly_map, spoken_tokens, words_of
from generation.cut.clip import Clip
from generation.cut.guidance import Guide, Scene, align, attention_step, practise, refine, to_maps
from generation.cut.models import StableDiffusion
from generation.cut.settings import CutParams


@dataclass(frozen=True)
class Request:
    """One chain.

    Attributes:
        image: float32 in [0, 1], side×side×3; the normal picture, sides multiples of ``sd.stride``.
        location: bool, side×side; where the anomaly may be.
        normal, prompt, detail: the three prompts (core.md 1.10).
        word: the anomaly word, as it stands in ``prompt``.
        seed: of the noise.
        scene: the whole picture around it, where a guide looks at it.
    """

    image: np.ndarray
    location: np.ndarray
    normal: str
    prompt: str
    detail: str
    word: str
    seed: int
    scene: Scene | None = None


@dataclass(frozen=True)
class Twins:
    """Attributes: ``anomaly``, ``normal`` float32 in [0, 1], side×side×3, decoded; ``attention`` float32 in
    [0, 1], side×side, the word's map averaged over the last part of the chain; ``trace`` figures of the
    chain: ``attention`` objective at its end, ``cosine`` to the detailed description (NaN without CLIP),
    ``margin`` of the guide's critic before its last step, where there is a guide."""

    anomaly: np.ndarray
    normal: np.ndarray
    attention: np.ndarray
    trace: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def sample(
    requests: Sequence[Request],
    sd: StableDiffusion,
    reader: MapReader,
    clip: Clip | None,
    settings: CutParams,
    guide: Guide | None = None,
) -> list[Twins]:
    """Runs the chains of one batch.

    Work a step and chain: two to four evaluations of the UNet (``settings.twin``), at every n-th step a pass
    that stops after the last attention layer read, and in the last part one pass through decoder and CLIP.

    Args:
        requests: pictures of one size.
        reader: attached to ``sd``.
        clip: of the refinement; None leaves it out.
        guide: of the requests, which then have scenes; it acts where the refinement does. None: none.

    Returns:
        One pair a request. A sample's result depends on the others in the batch by rounding only.
    """
    image = _tensor([request.image for request in requests]).permute(0, 3, 1, 2)
    location = F.adaptive_max_pool2d(
        _tensor([request.location.astype(np.float32) for request in requests])[:, None],
        [side // sd.factor for side in image.shape[-2:]],
    )[:, 0].to(sd.device)
    place = location[:, None] > 0
    source = sd.encode(image)
    noise = torch.stack([_noise(request.seed, source.shape[1:]) for request in requests]).to(sd.device)
    times = timesteps(len(sd.alphas), settings.steps, settings.gamma)
    text = _texts(sd, requests, settings)
    words = words_of(sd, [r.prompt for r in requests], [r.word for r in requests])
    details = clip.text([r.detail for r in requests]) if clip is not None else None

    alpha = sd.alphas.float()
    first = alpha[times[0]] if len(times) else torch.tensor(1.0)
    anomaly = normal = first.sqrt() * source + (1 - first).sqrt() * noise
    start = None
    held, cosine, margin = (torch.full((len(requests),), float("nan")) for _ in range(3))
    scenes = [request.scene for request in requests if request.scene is not None]
    maps: list[Tensor] = []
    late = len(times) - max(1, round(settings.window * len(times)))
    for index, time in enumerate(times):
        at = torch.full((len(requests),), time, device=sd.device)
        if settings.attention and index % settings.every == 0:
            for _ in range(settings.inner):
                anomaly, start, held = attention_step(
                    reader, anomaly, at, text.prompt, words, location,
                    settings.attention, index / len(times), settings.reach, start,
                )  # fmt: skip
        wanted = index >= late
        out_anomaly, out_normal, found = _evaluate(reader, anomaly, normal, at, text, settings, read=wanted)
        if found is not None:
            maps.append(anomaly_map(found, words))
        here = alpha[time]
        following = alpha[times[index + 1]] if index + 1 < len(times) else alpha[0]
        clean, direction = _split(sd, anomaly, out_anomaly, here)
        clean_twin, direction_twin = _split(sd, normal, out_normal, here)
        if guide is not None and guide.strength and wanted:
            clean, margin = practise(sd, clip, guide, clean, clean_twin, details, location, scenes)
        if clip is not None and details is not None and settings.refinement and wanted:
            clean, cosine = refine(sd, clip, clean, details, location, settings.refinement)
        anomaly = following.sqrt() * clean + (1 - following).sqrt() * direction
        normal = following.sqrt() * clean_twin + (1 - following).sqrt() * direction_twin
        # Outside the location both chains are the source at the noise level just reached (core.md 1.8).
        known = following.sqrt() * source + (1 - following).sqrt() * noise
        anomaly, normal = (torch.where(place, z, known) for z in (anomaly, normal))

    decoded = torch.cat([sd.decode(anomaly[i : i + 1]) for i in range(len(requests))]).clamp(0, 1)
    twin = torch.cat([sd.decode(normal[i : i + 1]) for i in range(len(requests))]).clamp(0, 1)
    attention = torch.stack(maps).mean(dim=0) if maps else location
    if maps:
        held = (attention * to_maps(location, attention.shape[-2:])).amax(dim=(1, 2))
    attention = F.interpolate(attention[:, None], image.shape[-2:], mode="bilinear", align_corners=False)[
        :, 0
    ]
    return [
        Twins(
            _array(decoded[i].permute(1, 2, 0)),
            _array(twin[i].permute(1, 2, 0)),
            _array(attention[i].clamp(0, 1)),
            {"attention": float(held[i]), "cosine": float(cosine[i])}
            | ({"margin": float(margin[i])} if guide is not None else {}),
        )
        for i in range(len(requests))
    ]


def timesteps(trained: int, steps: int, gamma: float) -> list[int]:
    """The executed timesteps, descending: the last int(T·γ) of T evenly spaced ones (core.md 1.3)."""
    spaced = [index * (trained // steps) + (1 if steps < trained else 0) for index in range(steps)]
    return spaced[: int(steps * gamma)][::-1]


@dataclass(frozen=True)
class _Text:
    """Embeddings, N×tokens×d each; ``empty`` only where guidance is against the empty prompt."""

    prompt: Tensor
    normal: Tensor
    empty: Tensor | None


def _texts(sd: StableDiffusion, requests: Sequence[Request], settings: CutParams) -> _Text:
    """The embeddings of a batch; equal prompts are encoded once."""
    prompts, normals = [r.prompt for r in requests], [r.normal for r in requests]
    details = [r.detail for r in requests] if settings.align else []
    extra = [""] if settings.twin == "empty" else []
    unique = sorted({*prompts, *normals, *details, *extra})
    table = dict(zip(unique, sd.embed(unique), strict=True))
    prompt, normal = (torch.stack([table[text] for text in texts]) for texts in (prompts, normals))
    if details:
        words = words_of(sd, prompts, [r.word for r in requests])
        detail = torch.stack([table[text] for text in details])
        prompt = align(
            prompt, normal, detail, words, (spoken_tokens(sd, normals), spoken_tokens(sd, details))
        )
    empty = table[""][None].expand_as(prompt) if extra else None
    return _Text(prompt, normal, empty)


def _evaluate(
    reader: MapReader,
    anomaly: Tensor,
    normal: Tensor,
    at: Tensor,
    text: _Text,
    settings: CutParams,
    *,
    read: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Guided outputs of both chains in one pass, and the maps of the anomaly prompt if wanted."""
    count = len(anomaly)
    parts = [(anomaly, text.prompt), (normal, text.normal)]
    if settings.twin == "normal":
        parts.append((anomaly, text.normal))
    elif text.empty is not None:
        parts += [(anomaly, text.empty), (normal, text.empty)]
    latents, texts = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    output, maps = reader.predict(latents, at.repeat(len(parts)), texts, slice(0, count if read else 0))
    found = output.float().chunk(len(parts))
    weight = settings.guidance
    if settings.twin == "empty":
        guided = found[2] + weight * (found[0] - found[2])
        twin = found[3] + weight * (found[1] - found[3])
    else:
        base = found[2] if settings.twin == "normal" else found[1]
        guided = base + weight * (found[0] - base)
        twin = found[1]
    return guided, twin, maps if read else None


def _split(sd: StableDiffusion, latents: Tensor, output: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The predicted clean latents x̂₀ and noise of an evaluation (core.md 1.8)."""
    signal, spread = alpha.sqrt(), (1 - alpha).sqrt()
    if sd.prediction == "epsilon":
        return (latents - spread * output) / signal, output
    return signal * latents - spread * output, signal * output + spread * latents


def _noise(seed: int, shape: torch.Size) -> Tensor:
    """The noise of one sample, on the CPU so that every device gets the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _tensor(arrays: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(arrays))


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.float().cpu().numpy()
