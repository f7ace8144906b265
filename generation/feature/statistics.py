"""What a backbone's features of normal surfaces look like, and how strong each operator must be on them.

Estimated on surfaces that code draws, so they depend on the backbone alone and are the same on every machine
up to rounding. Those of the default backbone are shipped beside this file; ``python -m
generation.feature.storing`` writes them, and those of a backbone in a folder beside its weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from generation.backbones import DEFAULT, Backbone, BackboneError, to_batch
from generation.textures import KINDS, procedural

PICTURES, SIDE = 32, 256  # drawn for the estimate, and their side in pixels
SEPARABLE = (0.60, 0.80)  # a probe's accuracy at severity 0 and 1 (core.md 5.7: 60–80 % at the start)
RIDGE = 1e-2
FINGERPRINT = "fingerprint"
CALIBRATION = 2  # of the rules here and of the operators: raise it with them, and write what is stored anew

Perturb = Callable[[Tensor, Tensor, float, torch.Generator], Tensor]


@dataclass(frozen=True)
class Statistics:
    """Attributes: of tokens of normal surfaces: ``centre``, ``deviation`` (C each), ``basis`` (C×C, columns)
    and ``spread`` (C) of their covariance; ``weight`` (C) of the probe. float32, on the CPU."""

    centre: Tensor
    deviation: Tensor
    basis: Tensor
    spread: Tensor
    weight: Tensor

    def gradient(self, tokens: Tensor) -> Tensor:
        """Of the probe's score Σ_c w_c·|z_c|, z the standardised token: K×C to K×C. For
        :data:`generation.feature.operators.Gradient` in shards."""
        return self.weight * ((tokens - self.centre) / self.deviation).sign() / self.deviation


@lru_cache(maxsize=4)
def statistics(backbone: Backbone) -> Statistics:
    """Those of a backbone: stored, or estimated (seconds) once a process."""
    if found := stored(backbone):
        return Statistics(**{field.name: found[field.name] for field in fields(Statistics)})
    return estimate(normal_features(backbone))


def stored(backbone: Backbone) -> dict[str, Tensor]:
    """What the file of a backbone holds: the fields of :class:`Statistics`, and by :func:`strengths_key` the
    strengths of each operator at severity 0 and 1. Empty if there is none, or one of other weights, layers or
    rules.

    Raises:
        BackboneError: a file that is cut or damaged.
    """
    path = file_of(backbone)
    if path is None or not path.is_file():
        return {}
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise BackboneError(
            f"{path} is damaged ({error}): remove it, or write it anew: python -m generation.feature.storing"
        ) from error
    name = bytes(found.pop(FINGERPRINT, torch.empty(0, dtype=torch.uint8)).tolist()).decode()
    return found if name == fingerprint(backbone) else {}


def fingerprint(backbone: Backbone) -> str:
    """Of what is stored: layers, weights, and the rules by which statistics and strengths are found."""
    return f"{CALIBRATION}:{backbone.fingerprint.partition(':')[2]}"


def file_of(backbone: Backbone) -> Path | None:
    """Where a backbone's statistics are stored: the default one's in this package, those of a folder beside
    its weights, one file for each choice of layers; None for another, whose weights come from a hub."""
    if backbone.name == DEFAULT:
        return Path(str(resources.files("generation.feature"))) / f"{DEFAULT}.safetensors"
    folder = Path(backbone.name)
    digest = hashlib.sha256(fingerprint(backbone).encode()).hexdigest()[:8]
    return folder / f"flawsmith-{digest}.safetensors" if folder.is_dir() else None


def strengths_key(operator: str) -> str:
    return f"strengths of {operator}"


@lru_cache(maxsize=2)
def normal_features(backbone: Backbone) -> Tensor:
    """Features of the drawn surfaces: float32, N×C×h×w, on the CPU."""
    return features_of(backbone, normal_pictures(backbone))


def normal_pictures(backbone: Backbone) -> list[np.ndarray]:
    """The drawn surfaces, uint8 H×W×3, of a size that the backbone takes."""
    side = SIDE // backbone.stride * backbone.stride
    pictures = []
    for number in range(PICTURES):
        kind = list(KINDS)[number % len(KINDS)]
        drawn = procedural(kind, np.random.default_rng(number), side, side, 3)
        pictures.append(np.rint(drawn * 255).astype(np.uint8))
    return pictures


def features_of(backbone: Backbone, pictures: list[np.ndarray]) -> Tensor:
    batches = (to_batch(pictures[i : i + 8], len(pictures[0])) for i in range(0, len(pictures), 8))
    return torch.cat([backbone.features(batch).cpu() for batch in batches])


def estimate(features: Tensor) -> Statistics:
    """Statistics of features of normal pictures, N×C×h×w."""
    tokens = features.permute(0, 2, 3, 1).flatten(0, 2).double()
    centre = tokens.mean(0)
    deviation = tokens.std(0).clamp(min=1e-6)
    values, vectors = torch.linalg.eigh(torch.cov(tokens.T))
    noisy = tokens + 0.5 * deviation * torch.randn(
        tokens.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    weight, _ = _fit(*((x - centre) / deviation for x in (tokens, noisy)))
    found = Statistics(centre, deviation, vectors, values.clamp(min=1e-8).sqrt(), weight)
    return Statistics(**{name: value.float().contiguous() for name, value in vars(found).items()})


def standardised(features: Tensor, known: Statistics) -> Tensor:
    """N×C×h×w, in deviations of each channel from the centre."""
    return (features - known.centre[:, None, None]) / known.deviation[:, None, None]


def beside_others(features: Tensor, known: Statistics) -> Tensor:
    """How each standardised token differs from the mean of the eight around it (repeated at the border):
    N×C×h×w. It tells moved tokens, whose own values are those of any other place: the further the weight of
    the new token goes from 0 to 1 the better, where a probe of the token by itself is best at one half, for
    there a mixture is neither, and at chance at 1 [measured]."""
    own = standardised(features, known)
    padded = torch.nn.functional.pad(own, (1, 1, 1, 1), mode="replicate")
    around = (torch.nn.functional.avg_pool2d(padded, 3, stride=1) * 9 - own) / 8
    return own - around


def accuracy(clean: Tensor, changed: Tensor) -> float:
    """How well a probe tells changed tokens from clean ones: fitted on one half, judged on the other.

    The probe is linear in |z| [inferred]: linear in z itself it cannot see noise whose mean is 0, however
    strong.

    Args:
        clean, changed: z, K×C, of the same places before and after: tokens as :func:`standardised` or
            :func:`beside_others` gives them.
    """
    half = len(clean) // 2
    weight, bias = _fit(clean[:half].double(), changed[:half].double())
    scores = [(x[half:].double().abs() @ weight + bias) for x in (clean, changed)]
    return float(((scores[0] < 0).double().mean() + (scores[1] > 0).double().mean()) / 2)


def _fit(clean: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression of −1 and +1 on |z|: weights and bias."""
    x = torch.cat([clean, changed]).abs()
    y = torch.cat([-torch.ones(len(clean)), torch.ones(len(changed))]).double()
    mean = x.mean(0)
    x = x - mean
    gram = x.T @ x / len(x) + RIDGE * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(gram, x.T @ y / len(x))
    return weight, -(mean @ weight)


def separable(
    features: Tensor,
    known: Statistics,
    perturb: Perturb,
    limit: float,
    *,
    beside: bool = False,
    mask: Tensor | None = None,
) -> tuple[float, float]:
    """The strengths at which a probe tells 60 % and 80 %: those of severity 0 and 1.

    Bisection on the logarithm; where even ``limit`` stays below, it is ``limit``.

    Args:
        features: of normal pictures, N×C×h×w.
        perturb: an operator with all but features, mask, strength and random numbers given.
        beside: whether the probe sees tokens as :func:`beside_others` has them, not by themselves.
        mask: the tokens to change, bool N×h×w; None: a quarter of them, by chance.
    """
    generator = torch.Generator()
    if mask is None:
        mask = torch.rand(features.shape[0], *features.shape[2:], generator=generator.manual_seed(0)) < 0.25

    def seen(all_tokens: Tensor) -> Tensor:
        places = beside_others(all_tokens, known) if beside else standardised(all_tokens, known)
        return places.permute(0, 2, 3, 1)[mask]

    clean = seen(features)
    order = torch.randperm(len(clean), generator=generator.manual_seed(1))

    def told(strength: float) -> float:
        changed = perturb(features, mask, strength, generator.manual_seed(2))
        return accuracy(clean[order], seen(changed)[order])

    found = []
    for target in SEPARABLE:
        low, high = limit / 1000, limit
        if told(limit) > target:
            for _ in range(9):
                middle = (low * high) ** 0.5
                low, high = (low, middle) if told(middle) > target else (middle, high)
        found.append(high)
    return found[0], found[1]
