"""What the page's charts show, as plain data of three kinds; the script draws them with Bokeh.

``lines``: values in [0, 1] over ``rows`` (rounds) with intervals; ``bars``: stacked horizontal bars, one a
row; ``ranges``: one horizontal bar from low to high a row. ``choose`` of a series holds what the menus choose
by.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from manifests.schema import LEAKING
from workflows.report.facts import STATUSES, Facts, Row, TypeOutcome, matching
from workflows.report.tables import HEADLINE, METRICS, count_by, has_interval

MOST_BARS = 24  # in one chart; the table beside it has every row
LONGEST = 28  # characters of a label

Chart = dict[str, Any]


def all_charts(facts: Facts, types: Sequence[TypeOutcome]) -> dict[str, Chart]:
    """Every chart that has something to show, by name."""
    charts = {
        "metrics": metrics_chart(facts.metrics),
        "shares": shares_chart(facts.outcomes),
        "area": ranges_chart(facts.settings, "area"),
        "severity": ranges_chart(facts.settings, "severity"),
        "types": types_chart(types),
        "generators": generators_chart(facts.outcomes),
        "reasons": reasons_chart(facts.outcomes),
        "seconds": seconds_chart(facts.seconds),
    }
    return {name: chart for name, chart in charts.items() if chart["series"]}


def metrics_chart(metrics: Sequence[Row]) -> Chart:
    """The main figures over the rounds with their intervals, by split and category."""
    rows = [row for row in metrics if row["metric"] in HEADLINE and row["value"] is not None]
    rows = matching(rows, defect="all", size="all")
    rounds = sorted({row["round"] for row in rows})
    detectors = {row["detector"] for row in rows}
    named = len(detectors) > 1 or any(LEAKING in name for name in detectors)
    keys = sorted(
        {(row["split"], row["category"], row["detector"], row["metric"]) for row in rows},
        key=lambda key: (*key[:3], HEADLINE.index(key[3])),
    )
    series = []
    for split, category, detector, metric in keys:
        own = {
            row["round"]: row
            for row in matching(rows, split=split, category=category, detector=detector, metric=metric)
        }
        known = [own.get(number) for number in rounds]
        bounded = [row if row and has_interval(row) else None for row in known]
        series.append(
            {
                "name": label(METRICS[metric].partition(" (")[0] + (f", {detector}" if named else "")),
                "values": [row and _finite(row["value"]) for row in known],
                "low": [row and _finite(row["low"]) for row in bounded],
                "high": [row and _finite(row["high"]) for row in bounded],
                "choose": {"split": split, "category": category},
            }
        )
    return {"kind": "lines", "rows": [f"round {number}" for number in rounds], "series": series}


def shares_chart(outcomes: Sequence[Row]) -> Chart:
    """What part of each round's recipes each generator had."""
    counts: dict[int, Counter[str]] = {}
    for row in outcomes:
        counts.setdefault(row["round"], Counter())[row["generator"]] += row["count"]
    rounds = sorted(counts)
    series = [
        {
            "name": label(name),
            "values": [_finite(counts[number][name] / counts[number].total()) for number in rounds],
        }
        for name in sorted({name for own in counts.values() for name in own})
    ]
    rows = [f"round {number}" for number in rounds]
    return {"kind": "bars", "rows": rows, "series": series, "title": "share of the recipes", "percent": True}


def ranges_chart(settings: Mapping[int, Row], name: str) -> Chart:
    """The range from which a setting of the samples is drawn, over the rounds."""
    ranges = {number: stored["generation"][name] for number, stored in settings.items()}
    is_area = name == "area"
    series = [
        {
            "name": name,
            "low": [low for low, _ in ranges.values()],
            "high": [high for _, high in ranges.values()],
        }
    ]
    return {
        "kind": "ranges",
        "rows": [f"round {number}" for number in ranges],
        "series": series if ranges else [],
        "title": "wanted area, share of the picture" if is_area else "severity: 0 just visible, 1 strongest",
        "log": is_area,
        "percent": is_area,
    }


def types_chart(types: Sequence[TypeOutcome]) -> Chart:
    """Real defects by type and round: found, gained, lost and missed; the types most missed first."""
    numbers = sorted({each.round for each in types})
    several = len({each.category for each in types}) > 1
    series = []
    for number in numbers:
        own = sorted((each for each in types if each.round == number), key=lambda each: -each.missed)
        own = own[:MOST_BARS]
        parts = {
            "found": [each.found - each.gained for each in own],
            "gained": [each.gained for each in own],
            "lost": [each.lost for each in own],
            "missed": [each.missed - each.lost for each in own],
        }
        rows = [label(f"{each.category}: {each.defect}" if several else each.defect) for each in own]
        series += [
            {"name": name, "values": counts, "rows": rows, "choose": {"round": str(number)}}
            for name, counts in parts.items()
        ]
    return {"kind": "bars", "rows": [], "series": series, "title": "real defects of the feedback split"}


def generators_chart(outcomes: Sequence[Row]) -> Chart:
    """Recipes by generator and outcome."""
    counts = count_by(outcomes, "generator", "status")
    names = sorted({row["generator"] for row in outcomes})
    series = [
        {"name": status, "values": [counts[name, status] for name in names]}
        for status in STATUSES
        if any(counts[name, status] for name in names)
    ]
    return {"kind": "bars", "rows": [label(name) for name in names], "series": series, "title": "recipes"}


def reasons_chart(outcomes: Sequence[Row]) -> Chart:
    """Recipes that were rejected or failed, by reason and generator."""
    lost = [row for row in outcomes if row["status"] != "accepted"]
    totals = count_by(lost, "reason")
    reasons = sorted(totals, key=lambda reason: (-totals[reason], reason))[:MOST_BARS]
    counts = count_by(lost, "generator", "reason")
    series = [
        {"name": label(generator), "values": [counts[generator, reason] for reason in reasons]}
        for generator in sorted({row["generator"] for row in lost})
    ]
    return {
        "kind": "bars",
        "rows": [label(reason) for reason in reasons],
        "series": series,
        "title": "recipes",
    }


def seconds_chart(seconds: Mapping[tuple[str, int], float]) -> Chart:
    """Seconds of each stage, by round."""
    numbers = sorted({number for _, number in seconds})
    series = [
        {"name": stage, "values": [seconds.get((stage, number), 0) for number in numbers]}
        for stage in dict.fromkeys(stage for stage, _ in seconds)
    ]
    rows = [f"round {number}" for number in numbers]
    return {"kind": "bars", "rows": rows, "series": series, "title": "seconds"}


def label(text: str) -> str:
    """A text that fits beside a chart and is written as it is: the library takes some signs for TeX."""
    short = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    for sign in ("$$", "\\(", "\\["):
        short = short.replace(sign, f"{sign[0]}\u200b{sign[1]}")
    return short


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None
