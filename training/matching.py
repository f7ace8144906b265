"""The mix of generators whose samples look most like real defects of a category.

A defect is a direction: how the tokens of a frozen backbone under its mask differ from their nearest normal
ones, on average, at length 1. Defects of one kind in one category point the same way, whatever their shape. A
generator's samples give its density there, by a kernel of the cosine; the mix is the mixture of these
densities under which the real defects are most likely (Dempster, Laird & Rubin 1977, "Maximum likelihood from
incomplete data via the EM algorithm"), with a Dirichlet prior at the present shares. The direction, the
kernel, the test and every constant are inference.

Only shares come of it: no pixel of a real defect enters a sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import t

from training.proxy import covered

SHARP = 0.1  # of a cosine: the difference that makes a defect e times as likely
PRIOR = 1.0  # parts with a defect that the present shares are worth
STEPS = 100  # of EM
FEWEST = 3  # parts with a defect, or nothing is concluded
SURE = 0.01  # level of the one-sided test on parts left out


def direction(difference: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Where an anomaly lies from what is normal: float32 C, of length 1 or 0.

    Args:
        difference: token − nearest normal token, float32 h×w×C.
        mask: bool H×W; a token counts if a quarter of its place is covered, or the most covered one.
    """
    mean = difference[covered(mask, difference.shape)].mean(axis=0)
    length = float(np.linalg.norm(mean))
    return mean / length if length > 0 else mean


def densities(real: np.ndarray, samples: Sequence[np.ndarray], shares: np.ndarray) -> np.ndarray:
    """How likely each of R defects is under each of G generators, but for a factor: float64 R×G.

    Args:
        real: directions, R×C. samples: of each generator, S×C; one without any is as likely as the others
            together.
        shares: float64 G, > 0.
    """
    found = np.full((len(real), len(samples)), np.nan)
    for at, own in enumerate(samples):
        if len(own):
            found[:, at] = np.exp((real @ own.T).astype(np.float64) / SHARP).mean(axis=1)
    known = ~np.isnan(found[0])
    found[:, ~known] = (found[:, known] @ shares[known] / shares[known].sum())[:, None]
    return found


def mixture(likely: np.ndarray, votes: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The shares, float64 G, of sum 1, under which defects are most likely.

    Args:
        likely: R×G, of :func:`densities`. votes: float64 R, what each defect counts.
        shares: float64 G, of sum 1: the prior's.
    """
    found = shares
    for _ in range(STEPS):
        joint = found * likely
        blame = votes @ (joint / joint.sum(axis=1, keepdims=True))
        found = (PRIOR * shares + blame) / (PRIOR + votes.sum())
    return found


def matched(
    real: np.ndarray, groups: Sequence[str], samples: Sequence[np.ndarray], shares: np.ndarray
) -> np.ndarray | None:
    """The shares of the generators in one category, float64 G, of sum 1; None where those of all parts but
    one do not make the defects of that one more likely than the present shares do: by a one-sided test of the
    gain in log likelihood, a value a part.

    Args:
        real: directions, R×C; ``groups`` are the parts that they are on, each of which counts the same.
        samples: directions of each generator's samples, S×C.
        shares: at present, float64 G, > 0.
    """
    names = sorted(set(groups))
    if len(names) < FEWEST or not any(map(len, samples)):
        return None
    shares = shares / shares.sum()
    likely = densities(real, samples, shares)
    own = np.array([[group == name for group in groups] for name in names])
    votes = (own / own.sum(axis=1, keepdims=True)).sum(axis=0)
    gains = []
    for mine in own:
        found = mixture(likely[~mine], votes[~mine], shares)
        gains.append(float(np.log(likely[mine] @ found).mean() - np.log(likely[mine] @ shares).mean()))
    error = float(np.std(gains, ddof=1)) / np.sqrt(len(gains))
    if np.mean(gains) <= t.ppf(1 - SURE, len(gains) - 1) * error:
        return None
    return mixture(likely, votes, shares)
