"""Severity as what is seen: a contrast against the picture's own variation, and the strength that gives it.

The measure is that of the contrast gate (:func:`generation.compose.compose`): the mean change inside the mask
over the mean local variation around the region, a contrast-to-texture ratio (inference: as Weber's law has
it, a change is seen in proportion to what surrounds it).

What is solved for leaves out what nobody sees, so that the ``leak`` of such a sample says what a generator
changed outside its region, and not how its soft edge ends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from generation.compose import changed, local_variation, quantise
from generation.protocol import Box, Edit, Source

FAINT, BOLD = 1.25, 6.0  # contrast at severity 0 and 1; the gate stands at 1
HALVINGS = 4  # strengths tried for the largest change of an operator that only takes away
CLOSE = 0.04  # relative error at which the search ends
TRIES = 9  # evaluations at most


@dataclass(frozen=True)
class Solved:
    """Attributes: ``patch`` float32 in [0, 1], h×w×C; ``strength`` that gave it; ``seen`` bool, h×w, the mask
    of its change."""

    patch: np.ndarray
    strength: float
    seen: np.ndarray


def solved(
    source: Source,
    box: Box,
    region: np.ndarray,
    severity: float,
    render: Callable[[float], np.ndarray],
    *,
    start: float | None = None,
    limit: float,
    takes_away: bool = False,
) -> Edit:
    """The edit whose change is what a severity asks for, as near as ``render`` comes; its measures tell what
    was wanted (the gates compare) and which strength it took.

    Args:
        box, region: of the edit; bool, h×w, not empty.
        render: ``strength -> patch``; see :func:`solve`; clipped here.
        start: a likely strength; None where the change grows in proportion to the strength: what would do if
            nothing were clipped or too small to be seen.
        takes_away: whether the operator can do no more than remove or rearrange what is there: severity 1 is
            then the most that it can do to this region, if that is less than ``BOLD``.
    """
    stored = source.pixels[box[0] : box[1], box[2] : box[3]]
    variation = local_variation(source.pixels, box, region)
    most = BOLD
    if takes_away:
        limit, largest = _furthest(render, stored, region, limit)
        most = min(most, max(largest / variation, FAINT))
    wanted = wanted_change(severity, variation, most)
    if start is None:
        start = wanted / max(_mean_change(render(limit), source.crop(box), region), 1e-6) * limit
    found = solve(lambda strength: np.clip(render(strength), 0, 1), stored, region, wanted, start, limit)
    patch = np.where(found.seen[..., None], found.patch, source.crop(box))
    return Edit(box, patch, region, {"wanted_change": wanted, "solved_strength": found.strength})


def _mean_change(after: np.ndarray, before: np.ndarray, region: np.ndarray) -> float:
    """Mean over the region of the largest difference over channels, in 8-bit levels."""
    return 255 * float(np.abs(after[region] - before[region]).max(axis=1).mean())


def wanted_change(severity: float, variation: float, most: float = BOLD) -> float:
    """The mean change inside the mask, in 8-bit levels, that a severity in [0, 1] asks for.

    Args:
        variation: of :func:`generation.compose.local_variation`.
        most: contrast at severity 1.
    """
    return (FAINT + (most - FAINT) * severity) * variation


def _furthest(
    render: Callable[[float], np.ndarray], before: np.ndarray, region: np.ndarray, limit: float
) -> tuple[float, float]:
    """(strength, mean change) of the largest change up to a limit: a pattern that is moved by its period is
    where it was, so that the largest strength need not change most."""
    strengths = [limit / 2**k for k in range(HALVINGS)]
    levels = [
        changed(before, quantise(np.clip(render(strength), 0, 1), before.dtype), region).level
        for strength in strengths
    ]
    best = int(np.argmax(levels))
    return strengths[best], levels[best]


def solve(
    render: Callable[[float], np.ndarray],
    before: np.ndarray,
    region: np.ndarray,
    wanted: float,
    start: float,
    limit: float,
) -> Solved:
    """The strength whose change comes nearest to the wanted one: secant steps within a bracket.

    Args:
        render: ``strength -> patch``, float32, h×w×C, clipped to [0, 1]; pure; ``before`` at 0, and further
            from it the larger the strength.
        before: uint8 or uint16, h×w×C; the stored pixels.
        region: bool, h×w; where the change counts.
        wanted: mean change in 8-bit levels.
        start: a likely strength, > 0.
        limit: the largest allowed. What it cannot reach is returned as near as it comes; the gates tell.
    """
    low, high = (0.0, 0.0), (np.inf, np.inf)  # (strength, change)
    best, error = None, np.inf
    strength = min(start, limit)
    for _ in range(TRIES):
        patch = render(strength)
        seen = changed(before, quantise(patch, before.dtype), region)
        change = seen.level
        if best is None or abs(change - wanted) < error:
            best, error = Solved(patch, strength, seen.inside > 0), abs(change - wanted)
        if error <= CLOSE * wanted:
            break
        if change < wanted:
            low = (strength, change)
            if strength >= limit:
                break
        else:
            high = (strength, change)
        if np.isinf(high[0]):
            growth = wanted / change if change > 0 else 8.0
            strength = min(limit, strength * float(np.clip(growth, 1.3, 8.0)))
        else:
            share = (wanted - low[1]) / max(high[1] - low[1], 1e-9)
            strength = low[0] + (high[0] - low[0]) * float(np.clip(share, 0.05, 0.95))
    assert best is not None
    return best
