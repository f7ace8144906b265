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

from generation.compose import VISIBLE, Changed, changed, local_variation, quantise
from generation.protocol import Edit, Measured, Places, Source, stored

# Contrast at severity 0 and 1. The gate stands at 1; of samples by the published recipes of DFD and OneNIP
# half have more than 9, a tenth more than 21 (measured on real pictures).
FAINT, BOLD = 1.25, 16.0
# Of the way from a region's tones to black or white, whichever is further: what severity 1 asks for at most.
# More is out of most operators' reach; rough materials meet it before BOLD [inferred].
ROOM = 0.65
HALVINGS = 4  # strengths tried for the largest change of a bounded operator
CLOSE = 0.04  # relative error at which the search ends
TRIES = 9  # evaluations at most
ENOUGH = 1024  # pixels whose change is looked at for the first strength


@dataclass(frozen=True)
class Solved:
    """Attributes: ``patch`` float32, N×C, as rendered; ``strength`` that gave it; ``after``, it in whole
    levels; ``seen`` what it changes."""

    patch: np.ndarray
    strength: float
    after: np.ndarray
    seen: Changed


def solved(
    source: Source,
    places: Places,
    before: np.ndarray,
    severity: float,
    render: Callable[[float], np.ndarray],
    *,
    start: float | None = None,
    limit: float,
    bounded: bool = False,
    whole: bool = False,
) -> Edit:
    """The edit whose change is what a severity asks for, as near as ``render`` comes; its measures tell what
    was wanted (the gates compare) and which strength it took.

    Args:
        places: of the edit; at least one.
        before: float32 in [0, 1], N×C; the source at the places.
        render: ``strength -> patch``; see :func:`solve`; clipped here.
        start: a likely strength; None where the change grows in proportion to the strength, at least up to
            strength 1.
        bounded: whether the operator can do no more than remove, rearrange or tint what is there: severity 1
            is then the most that it can do to this region, if that is less than what it asks for elsewhere.
        whole: severity 1 is what the operator does at its limit, less than that or more.
    """
    levels = stored(source.pixels, places.outer)
    variation = local_variation(source.pixels, places.box, places.region)
    most = boldest(before, variation)
    if bounded:
        limit, largest = _furthest(render, levels, places, limit)
        most = min(most, max(largest / variation, FAINT))
    if whole:
        everything = changed(levels, quantise(render(limit), levels.dtype), places).level
        most = max(everything / variation, FAINT)
    wanted = (FAINT + (most - FAINT) * severity) * variation
    if start is None:
        start = proportional(render(1.0), before, wanted)
    found = solve(render, levels, places, wanted, start, limit)
    inside = found.seen.inside
    patch = np.minimum(np.maximum(found.patch, 0), 1)
    unseen = np.flatnonzero(~inside)
    patch[unseen] = before[unseen]
    found.after[unseen] = levels[unseen]
    seen = found.seen._replace(change=found.seen.change * inside, visible=found.seen.visible & inside)
    measured = Measured(places, found.after, *seen, 0, variation)
    measures = {"wanted_change": wanted, "solved_strength": found.strength}
    return Edit(places.box, patch, places.region, measures, measured)


def proportional(after: np.ndarray, before: np.ndarray, wanted: float) -> float:
    """The share of a change whose mean over what is seen of it is ``wanted``, in 8-bit levels.

    With u_1 ≥ u_2 ≥ … the pixels' changes, k of them are seen from the share 2.5/u_k on (what rounds to 2
    levels is not), and their mean change is then share·mean(u_1…u_k).

    Args:
        after, before: float32 in [0, 1], N×C.
    """
    step = -(-len(after) // ENOUGH)
    change = np.abs(after[::step] - before[::step])
    levels = change[:, 0] if change.shape[1] == 1 else np.maximum.reduce(list(change.T))
    levels = 255 * np.sort(levels)[::-1]
    sums, counts = levels.cumsum(), np.arange(1, len(levels) + 1)
    seen = np.flatnonzero((VISIBLE + 0.5) * sums <= wanted * counts * levels)
    last = seen[-1] if len(seen) else 0
    return wanted * int(counts[last]) / max(float(sums[last]), 1e-6)


def boldest(before: np.ndarray, variation: float) -> float:
    """The contrast that severity 1 asks for: ``BOLD``, or less on a rough material.

    Args:
        before: float32 in [0, 1], N×C; the region's pixels.
        variation: of :func:`generation.compose.local_variation`, in 8-bit levels.
    """
    room = 255 * (0.5 + float(np.abs(before - np.float32(0.5)).mean()))
    return max(min(BOLD, ROOM * room / variation), FAINT)


def _furthest(
    render: Callable[[float], np.ndarray], before: np.ndarray, places: Places, limit: float
) -> tuple[float, float]:
    """(strength, mean change) of the largest change up to a limit: a pattern that is moved by its period is
    where it was, so that the largest strength need not change most."""
    strengths = [limit / 2**k for k in range(HALVINGS)]
    levels = [
        changed(before, quantise(render(strength), before.dtype), places).level for strength in strengths
    ]
    best = int(np.argmax(levels))
    return strengths[best], levels[best]


def solve(
    render: Callable[[float], np.ndarray],
    before: np.ndarray,
    places: Places,
    wanted: float,
    start: float,
    limit: float,
) -> Solved:
    """The strength whose change comes nearest to the wanted one: secant steps within a bracket.

    Args:
        render: ``strength -> patch``, float32, N×C; pure; ``before`` at 0, and further from it the larger
            the strength.
        before: uint8 or uint16, N×C; the stored pixels.
        places: where the change counts; N.
        wanted: mean change in 8-bit levels.
        start: a likely strength, > 0.
        limit: the largest allowed. What it cannot reach is returned as near as it comes; the gates tell.
    """
    low, high = (0.0, 0.0), (np.inf, np.inf)  # (strength, change)
    best, error = None, np.inf
    strength = min(start, limit)
    for _ in range(TRIES):
        patch = render(strength)
        after = quantise(patch, before.dtype)
        seen = changed(before, after, places)
        change = seen.level
        if best is None or abs(change - wanted) < error:
            best, error = Solved(patch, strength, after, seen), abs(change - wanted)
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
            strength = min(limit, strength * min(max(growth, 1.1), 8.0))
        else:
            share = (wanted - low[1]) / max(high[1] - low[1], 1e-9)
            strength = low[0] + (high[0] - low[0]) * min(max(share, 0.05), 0.95)
    assert best is not None
    return best
