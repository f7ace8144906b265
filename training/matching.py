"""The mix of generators whose samples look most like real defects of a category.

A defect is a direction: how the tokens of a frozen backbone under its mask differ from their nearest normal
ones, on average, at length 1. Defects of one kind in one category point the same way, whatever their shape. A
generator's samples give its density there, by a kernel of the cosine; the mix is the mixture of these
densities under which the real defects are most likely (Dempster, Laird & Rubin 1977, "Maximum likelihood from
incomplete data via the EM algorithm"), with a Dirichlet prior at the generators' shares. The direction, the
kernel, the tests and every constant are inference.

Only shares come of it: no pixel of a real defect enters a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import t

from training.proxy import covered

SHARP = 0.1  # of a cosine: the difference that makes a defect e times as likely
PRIOR = 1.0  # parts with a defect that the shares are worth
EVEN = 0.25  # of a category's samples, made by the shares alone: for defects that nobody has seen yet
STEPS = 60  # of EM
KNOWN = 5  # samples of a generator, or nothing is said of it
FEWEST = 3  # parts with a defect, or nothing is concluded
SURE = 0.02  # level of both tests
DRAWS = 99  # permutations
ROUNDING = 1e-9  # of a gain: equal densities give no more


def direction(difference: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Where an anomaly lies from what is normal: float32 C, of length 1 or 0.

    Args:
        difference: token − nearest normal token, float32 h×w×C.
        mask: bool H×W; a token counts if a quarter of its place is covered, or the most covered one.
    """
    mean = difference[covered(mask, difference.shape)].mean(axis=0)
    length = float(np.linalg.norm(mean))
    return mean / length if length > 0 else mean


def matched(
    real: np.ndarray,
    groups: Sequence[str],
    samples: Sequence[np.ndarray],
    shares: np.ndarray,
    present: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray | None:
    """The shares of the generators in one category, float64 G, of sum 1; None if they are no better than
    those at present beyond chance.

    Better is what makes the defects likelier. The gain must exceed what there is of it where the samples
    change their generators at random, for some sample is near by chance; and it must be there for parts left
    out, by a one-sided t-test, a value a part, for parts are alike by chance. That they all show one
    generator must be rarer than the level. A generator of fewer than ``KNOWN`` samples keeps its share.

    Args:
        real: directions, R×C; ``groups`` are the parts that they are on, each of which counts the same.
        samples: directions of each generator's samples, S×C.
        shares, present: float64 G, > 0: of the mix, and those of this category now.
    """
    names = sorted(set(groups))
    known = np.array([len(own) >= KNOWN for own in samples])
    if len(names) < FEWEST or known.sum() < 2:
        return None
    base, now = (own[known] / own[known].sum() for own in (shares, present))
    if float(now @ now) ** (len(names) - 1) > SURE:  # chance that all parts show one generator
        return None
    part = np.array([names.index(group) for group in groups])
    owner = np.repeat(np.arange(known.sum()), [len(own) for own, k in zip(samples, known, strict=True) if k])
    near = _kernel(real, np.concatenate([own for own, k in zip(samples, known, strict=True) if k]))
    likely = _densities(near, owner)
    left = []
    for k in range(len(names)):
        out = part == k
        found = _floored(likely[~out], part[~out], base)
        left.append(_gain(likely[out], part[out], found, now))
    error = float(np.std(left, ddof=1)) / np.sqrt(len(left))
    if not np.mean(left) > t.ppf(1 - SURE, len(left) - 1) * error + ROUNDING:
        return None
    found = _floored(likely, part, base)
    gain, nearer = _gain(likely, part, found, now), 0
    for _ in range(DRAWS):
        mixed = _densities(near, rng.permutation(owner))
        nearer += _gain(mixed, part, _floored(mixed, part, base), now) >= gain
    if (nearer + 1) / (DRAWS + 1) > SURE:
        return None
    result = present / present.sum()
    result[known] = result[known].sum() * found
    return result


def likeness(real: np.ndarray, groups: Sequence[str], samples: np.ndarray) -> np.ndarray:
    """How near each sample lies to real defects: float64 S, > 0, the density of these there but for a factor,
    every part counting the same.

    Args:
        real, groups: as :func:`matched` takes them. samples: directions, S×C.
    """
    votes = _votes(np.unique(np.asarray(groups), return_inverse=True)[1])
    return votes @ _kernel(real, samples) / votes.sum()


def _kernel(some: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.exp((some @ others.T).astype(np.float64) / SHARP)


def _densities(near: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Of R×S kernels and the generator of each sample: how likely each defect is under each generator, R×G,
    but for a factor."""
    own = owner[:, None] == np.arange(owner.max() + 1)
    return near @ (own / own.sum(axis=0))


def _votes(part: np.ndarray) -> np.ndarray:
    """What each defect counts, so that every part counts 1."""
    counts = np.bincount(part)
    return 1 / counts[part]


def mixture(likely: np.ndarray, votes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The shares, float64 G, of sum 1, under which defects are most likely.

    Args:
        likely: R×G; how likely each defect is under each generator, but for a factor.
        votes: float64 R, what each defect counts.
        shares: float64 G, of sum 1: the prior's.
    """
    found = shares
    for _ in range(STEPS):
        joint = found * likely
        blame = votes @ (joint / joint.sum(axis=1, keepdims=True))
        found = (PRIOR * shares + blame) / (PRIOR + votes.sum())
    return found


def _floored(likely: np.ndarray, part: np.ndarray, shares: np.ndarray) -> np.ndarray:
    return EVEN * shares + (1 - EVEN) * mixture(likely, _votes(part), shares)


def _gain(likely: np.ndarray, part: np.ndarray, after: np.ndarray, before: np.ndarray) -> float:
    """In log likelihood, the mean over parts."""
    votes = _votes(part)
    return float(votes @ np.log((likely @ after) / (likely @ before)) / votes.sum())
