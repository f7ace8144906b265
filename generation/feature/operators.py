"""The operators of the feature family, one implementation for shards and for training (core.md 5.7).

Each takes float32 features N×C×h×w, a bool mask N×h×w of the places to change, a strength and a generator of
random numbers on the CPU, and returns new features of the same shape: equal outside the mask, and at strength
0 everywhere. For training, ``gaussian`` and ``jitter`` take None in place of the generator: torch's global
one, on the features' device. Deviations and centre come from
:class:`generation.feature.statistics.Statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Gradient = Callable[[Tensor], Tensor]  # tokens K×C to the gradient, K×C, that makes each less normal
ASCENT_START = 0.1  # deviation of GLASS's starting noise, in channel deviations [0.015 of adapted features]
ASCENT_RATE = 0.1  # length of a step over the distance that is asked for
ASCENT_STEPS = 20
PROJECTED = 5  # steps between projections


def gaussian(
    features: Tensor, mask: Tensor, strength: float, random: torch.Generator | None, deviation: Tensor
) -> Tensor:
    """Isotropic noise (SimpleNet, DFD): N(0, (s·σ_c)²), σ_c the deviation of each channel, C."""
    return _within(mask, features + strength * deviation[:, None, None] * _normal(features, random), features)


def jitter(features: Tensor, mask: Tensor, strength: float, random: torch.Generator | None) -> Tensor:
    """Noise that grows with the token (UniAD, OneNIP): N(0, 1)·s·‖f‖₂/C; 20 as published."""
    length = features.norm(dim=1, keepdim=True) / features.shape[1]
    return _within(mask, features + strength * length * _normal(features, random), features)


def ascent(
    features: Tensor,
    mask: Tensor,
    strength: float,
    random: torch.Generator,
    deviation: Tensor,
    centre: Tensor,
    gradient: Gradient,
    *,
    manifold: bool,
) -> Tensor:
    """Gradient ascent with truncated projection (GLASS, Chen et al. 2024).

    From slightly noisy tokens, 20 steps of a fixed length along the normalised gradient; after every fifth
    the distance, in channel deviations over √C, is clamped to [s, 2·s]: from the token itself (manifold;
    published [0.5, 1]) or from the normal centre (hypersphere; published [r, 2r], for local anomalies
    [2r, 4r]).

    Args:
        deviation, centre: C each.
        gradient: of a discriminator: a probe's in shards, the live one's in training.
    """
    if strength == 0:
        return features
    tokens = _tokens(features, mask)
    scale = deviation * math.sqrt(len(deviation))
    origin = tokens if manifold else centre.expand_as(tokens)
    moved = tokens + ASCENT_START * deviation * torch.randn(tokens.shape, generator=random).to(tokens.device)
    for step in range(1, ASCENT_STEPS + 1):
        direction = torch.nn.functional.normalize(gradient(moved) * scale, dim=1)
        moved = moved + ASCENT_RATE * strength * direction * scale
        if step % PROJECTED == 0:
            moved = _project((moved - origin) / scale, strength, 2 * strength) * scale + origin
    return _placed(features, mask, moved)


def adversarial(
    features: Tensor,
    mask: Tensor,
    strength: float,
    random: torch.Generator,
    deviation: Tensor,
    gradient: Gradient,
) -> Tensor:
    """The perturbation of a given length that a discriminator finds least normal (latent perturbations, arXiv
    2207.01106; by projected gradient steps in place of a distorter network [inferred]): ‖δ/σ‖₂/√C = s."""
    if strength == 0:
        return features
    tokens = _tokens(features, mask)
    scale = deviation * math.sqrt(len(deviation))
    change = torch.nn.functional.normalize(
        torch.randn(tokens.shape, generator=random).to(tokens.device), dim=1
    )
    for _ in range(ASCENT_STEPS):
        direction = torch.nn.functional.normalize(gradient(tokens + strength * change * scale) * scale, dim=1)
        change = torch.nn.functional.normalize(change + 0.5 * direction, dim=1)
    return _placed(features, mask, tokens + strength * change * scale)


def flow_shift(
    features: Tensor,
    mask: Tensor,
    strength: float,
    random: torch.Generator,
    centre: Tensor,
    basis: Tensor,
    spread: Tensor,
) -> Tensor:
    """Latents pushed outward in the space of a flow and decoded (arXiv 2403.10550).

    The flow is the linear one that whitens the normals [inferred]: u = (f − μ)·V/√λ; u' = u + s·√C·(direction
    of u with noise).

    Args:
        centre: μ, C. basis: V, C×C, columns. spread: √λ, C.
    """
    tokens = _tokens(features, mask)
    latent = (tokens - centre) @ basis / spread
    noisy = latent + torch.randn(latent.shape, generator=random).to(latent.device)
    outward = torch.nn.functional.normalize(noisy, dim=1)
    moved = latent + strength * math.sqrt(len(spread)) * outward
    return _placed(features, mask, moved * spread @ basis.T + centre)


def copy_out(features: Tensor, mask: Tensor, strength: float, random: torch.Generator) -> Tensor:
    """Tokens replaced by others of the same picture (GeneralAD), of weight s in [0, 1]."""
    changed = features.clone()
    for one, found in zip(changed, mask, strict=True):
        places = found.flatten().nonzero()[:, 0]
        others = (~found).flatten().nonzero()[:, 0]
        others = others if len(others) else torch.arange(found.numel(), device=found.device)
        picked = others[torch.randint(len(others), (len(places),), generator=random).to(others.device)]
        flat = one.flatten(1)
        flat[:, places] += strength * (flat[:, picked] - flat[:, places])
    return changed


def shuffle(features: Tensor, mask: Tensor, strength: float, random: torch.Generator) -> Tensor:
    """The chosen tokens permuted among themselves (GeneralAD), none left in place, of weight s in [0, 1]."""
    changed = features.clone()
    for one, found in zip(changed, mask, strict=True):
        places = found.flatten().nonzero()[:, 0]
        order = torch.randperm(len(places), generator=random).to(places.device)
        flat = one.flatten(1)
        source = torch.empty_like(places)
        source[order] = places[order.roll(1)]  # along one cycle through all of them
        flat[:, places] += strength * (flat[:, source] - flat[:, places])
    return changed


def insert(
    features: Tensor, mask: Tensor, strength: float, random: torch.Generator, foreign: Tensor
) -> Tensor:
    """Tokens of another picture, at best of another category, of weight s in [0, 1].

    Args:
        foreign: N×C×h'×w'; a random window of the mask's box is taken where it is large enough, else random
            tokens.
    """
    changed = features.clone()
    for one, found, other in zip(changed, mask, foreign, strict=True):
        places = found.nonzero()
        if not len(places):
            continue
        corner, extent = places.amin(0), places.amax(0) - places.amin(0) + 1
        room = torch.tensor(other.shape[1:], device=places.device) - extent
        if (room >= 0).all():
            shift = torch.stack([torch.randint(int(r) + 1, (), generator=random) for r in room])
            y, x = (places - corner + shift.to(places.device)).T
        else:
            y, x = (torch.randint(side, (len(places),), generator=random) for side in other.shape[1:])
        here = one[:, places[:, 0], places[:, 1]]
        one[:, places[:, 0], places[:, 1]] = here + strength * (other[:, y, x] - here)
    return changed


def attended(features: Tensor, mask: Tensor, count: int) -> Tensor:
    """The ``count`` tokens of each mask that stand out most: GeneralAD's attention-selected places. The
    attention of a backbone without class token is the token's distance from the picture's mean [inferred].

    Returns:
        bool, N×h×w; at least one token where the mask has any.
    """
    distance = (features - features.mean(dim=(2, 3), keepdim=True)).norm(dim=1)
    distance = distance.masked_fill(~mask, -math.inf).flatten(1)
    order = distance.argsort(dim=1, descending=True)[:, : max(count, 1)]
    chosen = torch.zeros_like(distance, dtype=torch.bool).scatter_(1, order, True)
    return chosen.view_as(mask) & mask


def _normal(like: Tensor, random: torch.Generator | None) -> Tensor:
    device = random.device if random else like.device
    return torch.randn(like.shape, generator=random, device=device).to(like.device)


def _within(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask[:, None], new, old)


def _tokens(features: Tensor, mask: Tensor) -> Tensor:
    """K×C, the masked tokens of all pictures."""
    return features.permute(0, 2, 3, 1)[mask]


def _placed(features: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    changed = features.permute(0, 2, 3, 1).clone()
    changed[mask] = tokens
    return changed.permute(0, 3, 1, 2)


def _project(offset: Tensor, low: float, high: float) -> Tensor:
    length = offset.norm(dim=1, keepdim=True)
    return offset * (length.clamp(low, high) / length.clamp(min=1e-12))
