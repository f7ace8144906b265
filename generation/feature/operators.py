"""The operators of the feature family, one implementation for shards and for training (core.md 5.7).

Each takes float32 features N×C×h×w, a bool mask N×h×w of the places to change, a strength and a generator of
random numbers, and returns new features of the same shape: equal outside the mask, and at strength 0
everywhere. Numbers are drawn where their generator is, so that one on the CPU gives the same on every device;
None is torch's global generator on the features' device, as training wants it. Deviations and centre come
from :class:`generation.feature.statistics.Statistics`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Random = torch.Generator | None
Gradient = Callable[[Tensor], Tensor]  # tokens K×C to the gradient, K×C, that makes each less normal
ASCENT_START = (
    0.1  # deviation of GLASS's starting noise over s, in channel deviations [0.015 of adapted features]
)
ASCENT_RATE = 0.1  # length of a step over the distance that is asked for
ASCENT_STEPS = 20
PROJECTED = 5  # steps between projections


def gaussian(features: Tensor, mask: Tensor, strength: float, random: Random, deviation: Tensor) -> Tensor:
    """Noise (SimpleNet, DFD): N(0, (s·σ_c)²), σ_c the deviation of each channel, C; isotropic, as published,
    where all of them are equal."""
    return _within(mask, features + strength * deviation[:, None, None] * _normal(features, random), features)


def jitter(features: Tensor, mask: Tensor, strength: float, random: Random) -> Tensor:
    """Noise that grows with the token (UniAD, OneNIP): N(0, 1)·s·‖f‖₂/C; 20 as published."""
    length = features.norm(dim=1, keepdim=True) / features.shape[1]
    return _within(mask, features + strength * length * _normal(features, random), features)


def ascent(
    features: Tensor,
    mask: Tensor,
    strength: float,
    random: Random,
    deviation: Tensor,
    centre: Tensor,
    gradient: Gradient,
    *,
    manifold: bool,
) -> Tensor:
    """Gradient ascent with truncated projection (GLASS, Chen et al. 2024).

    From tokens with noise of a tenth of the distance asked for, 20 steps of a fixed length along the
    normalised gradient; after every fifth the distance, in channel deviations over √C, is clamped. Manifold:
    that from the token itself, to [s, 2·s] (published [0.5, 1]). Hypersphere: that from the normal centre, to
    [1 + s, 1 + 2·s] times the token's own; published is [r, 2·r] with one r for all tokens, whose distances
    alone then give the changed ones away: a probe tells 100 % at any r [measured], so that no severity could
    be set.

    Args:
        deviation, centre: C each.
        gradient: of a discriminator: a probe's in shards, the live one's in training.
    """
    if strength == 0:
        return features
    tokens = _tokens(features, mask)
    scale, own = _distance(tokens, deviation, centre)
    origin = tokens if manifold else centre.expand_as(tokens)
    start, unit = (torch.zeros_like(own), 1.0) if manifold else (own, own)
    low, high = start + strength * unit, start + 2 * strength * unit
    moved = tokens + ASCENT_START * strength * deviation * _normal(tokens, random)
    for step in range(1, ASCENT_STEPS + 1):
        direction = torch.nn.functional.normalize(gradient(moved) * scale, dim=1)
        moved = moved + ASCENT_RATE * strength * direction * scale
        if step % PROJECTED == 0:
            moved = _project((moved - origin) / scale, low, high) * scale + origin
    return _placed(features, mask, moved)


def local(
    features: Tensor,
    mask: Tensor,
    strength: float,
    _random: Random,
    deviation: Tensor,
    centre: Tensor,
    textured: Tensor,
) -> Tensor:
    """Tokens of the picture with a texture over it, kept away from normal (GLASS's local synthesis).

    They take the place of the clean ones with weight s in [0, 1], and their distance from the normal centre
    is clamped to once to twice the clean token's own. Published is weight 1 and [2·r, 4·r] with one r for all
    (core.md 5.7): as with :func:`ascent`, a probe tells 100 % of them at the distance alone [measured].

    Args:
        deviation, centre: C each.
        textured: features of the textured picture, as ``features``.
    """
    if strength == 0:
        return features
    tokens = _tokens(features, mask)
    scale, own = _distance(tokens, deviation, centre)
    moved = tokens + strength * (_tokens(textured, mask) - tokens)
    return _placed(features, mask, _project((moved - centre) / scale, own, 2 * own) * scale + centre)


def adversarial(
    features: Tensor,
    mask: Tensor,
    strength: float,
    random: Random,
    deviation: Tensor,
    gradient: Gradient,
) -> Tensor:
    """The perturbation of a given length that a discriminator finds least normal (latent perturbations, arXiv
    2207.01106; by projected gradient steps in place of a distorter network [inferred]): ‖δ/σ‖₂/√C = s."""
    if strength == 0:
        return features
    tokens = _tokens(features, mask)
    scale = deviation * math.sqrt(len(deviation))
    change = torch.nn.functional.normalize(_normal(tokens, random), dim=1)
    for _ in range(ASCENT_STEPS):
        direction = torch.nn.functional.normalize(gradient(tokens + strength * change * scale) * scale, dim=1)
        change = torch.nn.functional.normalize(change + 0.5 * direction, dim=1)
    return _placed(features, mask, tokens + strength * change * scale)


def flow_shift(
    features: Tensor,
    mask: Tensor,
    strength: float,
    random: Random,
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
    if strength == 0:
        return features  # decoding what was encoded rounds
    tokens = _tokens(features, mask)
    latent = (tokens - centre) @ basis / spread
    noisy = latent + _normal(latent, random)
    outward = torch.nn.functional.normalize(noisy, dim=1)
    moved = latent + strength * math.sqrt(len(spread)) * outward
    return _placed(features, mask, moved * spread @ basis.T + centre)


def copy_out(features: Tensor, mask: Tensor, strength: float, random: Random) -> Tensor:
    """Tokens replaced by others of the same picture (GeneralAD), of weight s in [0, 1]."""
    changed = features.clone()
    for one, found in zip(changed, mask, strict=True):
        places = found.flatten().nonzero()[:, 0]
        others = (~found).flatten().nonzero()[:, 0]
        others = others if len(others) else torch.arange(found.numel(), device=found.device)
        draw = torch.randint(len(others), (len(places),), generator=random, device=_home(one, random))
        picked = others[draw.to(others.device)]
        flat = one.flatten(1)
        flat[:, places] += strength * (flat[:, picked] - flat[:, places])
    return changed


def shuffle(features: Tensor, mask: Tensor, strength: float, random: Random) -> Tensor:
    """The chosen tokens permuted among themselves (GeneralAD), none left in place, of weight s in [0, 1]."""
    changed = features.clone()
    for one, found in zip(changed, mask, strict=True):
        places = found.flatten().nonzero()[:, 0]
        order = torch.randperm(len(places), generator=random, device=_home(one, random)).to(places.device)
        flat = one.flatten(1)
        source = torch.empty_like(places)
        source[order] = places[order.roll(1)]  # along one cycle through all of them
        flat[:, places] += strength * (flat[:, source] - flat[:, places])
    return changed


def insert(features: Tensor, mask: Tensor, strength: float, random: Random, foreign: Tensor) -> Tensor:
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
        draw = partial(torch.randint, generator=random, device=_home(one, random))
        if (room >= 0).all():
            shift = torch.stack([draw(int(r) + 1, ()) for r in room])
            y, x = (places - corner + shift.to(places.device)).T
        else:
            y, x = (draw(side, (len(places),)) for side in other.shape[1:])
        here = one[:, places[:, 0], places[:, 1]]
        one[:, places[:, 0], places[:, 1]] = here + strength * (other[:, y, x] - here)
    return changed


def attended(
    features: Tensor, mask: Tensor, count: int, attention: Tensor | None = None, random: Random = None
) -> Tensor:
    """The ``count`` tokens of each mask that stand out most: GeneralAD's attention-selected places.

    Args:
        attention: of the class token, N×heads×h×w: those places are taken at which one head, drawn by chance
            for each picture, looks most. None, of a backbone without class token: those whose token is
            furthest from the picture's mean [inferred].

    Returns:
        bool, N×h×w; at least one token where the mask has any.
    """
    if attention is None:
        looks = (features - features.mean(dim=(2, 3), keepdim=True)).norm(dim=1)
    else:
        heads = torch.randint(
            attention.shape[1], (len(attention),), generator=random, device=_home(attention, random)
        )
        looks = attention[torch.arange(len(attention)), heads.to(attention.device)]
    looks = looks.masked_fill(~mask, -math.inf).flatten(1)
    order = looks.argsort(dim=1, descending=True)[:, : max(count, 1)]
    chosen = torch.zeros_like(looks, dtype=torch.bool).scatter_(1, order, True)
    return chosen.view_as(mask) & mask


def _normal(like: Tensor, random: Random) -> Tensor:
    return torch.randn(like.shape, generator=random, device=_home(like, random)).to(like.device)


def _home(like: Tensor, random: Random) -> torch.device:
    """Where numbers are drawn."""
    return like.device if random is None else random.device


def _within(mask: Tensor, new: Tensor, old: Tensor) -> Tensor:
    return torch.where(mask[:, None], new, old)


def _tokens(features: Tensor, mask: Tensor) -> Tensor:
    """K×C, the masked tokens of all pictures."""
    return features.permute(0, 2, 3, 1)[mask]


def _placed(features: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    changed = features.permute(0, 2, 3, 1).clone()
    changed[mask] = tokens
    return changed.permute(0, 3, 1, 2)


def _distance(tokens: Tensor, deviation: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """The unit of distances, √C deviations of each channel, C; how far tokens lie from the centre, K×1."""
    scale = deviation * math.sqrt(len(deviation))
    return scale, ((tokens - centre) / scale).norm(dim=1, keepdim=True)


def _project(offset: Tensor, low: Tensor, high: Tensor) -> Tensor:
    length = offset.norm(dim=1, keepdim=True)
    return offset * (length.clamp(low, high) / length.clamp(min=1e-12))
