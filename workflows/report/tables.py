"""The page's tables of figures: texts in rows, for the template to write."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from manifests.schema import GOOD, Image
from workflows.config import differences
from workflows.report.facts import HIDDEN, STATUSES, Facts, Row, TypeOutcome, matching
from workflows.rules import PER_PICTURE
from workflows.stored import licences, short_name

METRICS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1max": "image F1max",
    "image_fpr": "false alarms",
    "image_recall": "defect pictures found",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1max": "pixel F1max",
    "aupro": "AUPRO (FPR ≤ 0.3)",
    "spro": "sPRO (FPR ≤ 0.05)",
}
HEADLINE = ("image_auroc", "image_ap", "pixel_ap", "aupro")
NON_COMMERCIAL = re.compile(r"non-?\s?commercial|\bNC\b", re.IGNORECASE)
NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """``rows`` hold one text a column of ``head``; the first ``keys`` columns say what a row is about.

    A cell with a second line has its interval there. ``filters`` names, for each row, the samples it counts:
    columns of the samples and their values.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    keys: int = 1
    filters: Sequence[dict[str, str]] = ()


def notices(images: Sequence[Image]) -> list[Row]:
    """One a licence: the categories it covers, and whether it rules out commercial use."""
    return [
        {
            "licence": licence,
            "categories": ", ".join(categories),
            "non_commercial": bool(NON_COMMERCIAL.search(licence)),
        }
        for licence, categories in licences(images).items()
    ]


def pictures_table(images: Sequence[Image]) -> Table:
    counts = Counter((image.category, image.split, image.defect == GOOD) for image in images)
    columns = [("train", True), ("calibration", True)]
    columns += [(split, good) for split in ("feedback", "test") for good in (True, False)]
    head = ["train", "calibration", "feedback good", "feedback defective", "test good", "test defective"]
    return Table(
        "Real pictures",
        ["category", *head],
        [
            [category, *(_number(counts[category, *column]) for column in columns)]
            for category in sorted({image.category for image in images})
        ],
    )


def rounds_table(facts: Facts) -> Table:
    """Yield and mean figures on the feedback split, a row a round and detector."""
    means = matching(facts.metrics, split="feedback", category="mean", defect="all", size="all")
    names = [name for name in HEADLINE if any(row["metric"] == name for row in means)]
    detectors = sorted({row["detector"] for row in means or facts.metrics}) or [""]
    rows = []
    for number in facts.rounds:
        counts = count_by(matching(facts.outcomes, round=number), "status")
        yields = [*(_number(counts[status]) for status in STATUSES), _share(counts)]
        for detector in detectors:
            own = matching(means, round=number, detector=detector)
            rows.append([str(number), *yields, detector or "not yet", *_cells(own, names)])
    head = ["round", *STATUSES, "acceptance", "detector", *(METRICS[name] for name in names)]
    return Table("Rounds at a glance: means over categories on the feedback split", head, rows)


def figures_tables(metrics: Sequence[Row], split: str) -> list[Table]:
    """Figures of one split by category, by size of the defects and by type of defect; those there are."""
    found = matching(metrics, split=split)
    tables = [
        _metrics_table("By category", matching(found, defect="all", size="all"), ("category",)),
        _metrics_table(
            "By size of the defects, mean over categories (tiny is under 0.1 %, small under 1 %)",
            [row for row in matching(found, category="mean", defect="all") if row["size"] != "all"],
            ("size",),
        ),
        _metrics_table(
            "By generator" if split == "heldout_synthetic" else "By type of defect",
            [row for row in matching(found, size="all") if row["defect"] != "all"],
            ("category", "defect"),
        ),
    ]
    return [table for table in tables if table.rows]


def stress_tables(stress: Sequence[Row]) -> list[Table]:
    """Means over categories under each disturbance, a table a round and detector, a column a level."""
    metrics = (*HEADLINE, "spro")
    means = [row for row in matching(stress, category="mean") if row["metric"] in metrics]
    levels = sorted({row["level"] for row in means})
    tables = []
    for number, detector in sorted({(row["round"], row["detector"]) for row in means}):
        own = matching(means, round=number, detector=detector)
        kinds = sorted({row["kind"] for row in own})
        rows = [
            [METRICS[metric], kind, *_cells(found, levels, "level")]
            for metric in metrics
            for kind in kinds
            if (found := matching(own, metric=metric, kind=kind))
        ]
        head = ["metric", "change", *("as it is" if level == 0 else f"level {level}" for level in levels)]
        caption = f"Round {number}, {detector}: with other viewpoints, uneven light and blur"
        tables.append(Table(caption, head, rows, keys=2))
    return tables


def types_table(types: Sequence[TypeOutcome]) -> Table:
    """Real defects found, missed, gained and lost, a row a type and round."""
    head = ["category", "defect", "round", "defects", "found", "missed", "gained", "lost"]
    rows = [
        [
            each.category,
            each.defect,
            str(each.round),
            _number(each.defects),
            f"{_number(each.found)} ({each.found / each.defects:.0%})",
            _number(each.missed),
            *((_number(each.gained), _number(each.lost)) if each.compared else (NOTHING, NOTHING)),
        ]
        for each in sorted(types, key=lambda each: (each.category, each.defect, each.round))
    ]
    return Table("Real defects of the feedback split", head, rows, keys=2)


def generators_table(facts: Facts) -> Table:
    """Outcomes by round and generator."""
    rows, filters = [], []
    for number, generator in sorted({(row["round"], row["generator"]) for row in facts.outcomes}):
        counts = count_by(matching(facts.outcomes, round=number, generator=generator), "status")
        rows.append([str(number), generator, *(_number(counts[s]) for s in STATUSES), _share(counts)])
        filters.append({"round": str(number), "generator": generator})
    head = ["round", "generator", *STATUSES, "acceptance"]
    return Table("Samples by generator", head, rows, keys=2, filters=filters)


def reasons_table(facts: Facts) -> Table:
    """Why recipes were rejected or failed, the most frequent reason of each round first."""
    rows, filters = [], []
    for number in facts.rounds:
        lost = [row for row in facts.outcomes if row["round"] == number and row["status"] != "accepted"]
        ranked = sorted(count_by(lost, "status", "reason").items(), key=lambda item: (-item[1], item[0]))
        for (status, reason), count in ranked:
            rows.append([str(number), status, reason, _number(count)])
            filters.append({"round": str(number), "outcome": status, "reason": reason})
    head = ["round", "outcome", "reason", "recipes"]
    return Table("Why recipes were rejected or failed", head, rows, keys=3, filters=filters)


def decisions_table(facts: Facts, *, changed: bool) -> Table:
    """Decisions on all settings but those of :func:`hard_normals_table`."""
    title = "Settings that changed" if changed else "Settings that stayed"
    rows = [
        row
        for row in facts.decisions
        if (row["before"] != row["after"]) == changed and not row["setting"].startswith(PER_PICTURE)
    ]
    return _decisions(title, "setting", rows)


def hard_normals_table(facts: Facts) -> Table:
    """Decisions on how often single normal pictures are drawn; there may be dozens."""
    files = {image.image_id: short_name(image.path) for image in facts.images if image.path != HIDDEN}
    rows = [
        row | {"setting": files.get(image_id, image_id)}
        for row in facts.decisions
        if (image_id := row["setting"].removeprefix(PER_PICTURE)) != row["setting"]
    ]
    return _decisions("Normal pictures that are drawn more often or less", "picture", rows)


def _decisions(title: str, what: str, rows: Sequence[Row]) -> Table:
    cells = [
        [f"{row['round']} → {row['round'] + 1}", row["setting"]]
        + [row[name] for name in ("before", "after", "reason")]
        for row in rows
    ]
    return Table(title, ["rounds", what, "before", "after", "why"], cells, keys=2)


def settings_table(facts: Facts) -> Table:
    """The settings of generation that differ between rounds, a row each, a column a round; which pictures and
    which texts are drawn more often is told by the decisions alone."""
    rounds = {
        number: flattened({k: v for k, v in stored["generation"].items() if k not in ("normals", "nearest")})
        for number, stored in facts.settings.items()
    }
    names = dict.fromkeys(name for own in rounds.values() for name in own if ".texts." not in name)
    found = {name: [own.get(name, NOTHING) for own in rounds.values()] for name in names}
    rows = [[name, *values] for name, values in found.items() if len(set(values)) > 1]
    head = ["setting", *(f"round {number}" for number in rounds)]
    return Table("Settings of each round that are not the same in all", head, rows)


def flattened(settings: Any, place: str = "") -> dict[str, str]:
    """The leaves of a tree of settings as texts, by dotted names; lists are leaves.

    >>> flattened({"area": [0.1, 0.2], "generators": {"scar": {"share": 1.0}}})
    {'area': '[0.1, 0.2]', 'generators.scar.share': '1'}
    """
    if isinstance(settings, dict):
        return {
            name: text
            for key, value in settings.items()
            for name, text in flattened(value, f"{place}.{key}" if place else str(key)).items()
        }
    if isinstance(settings, list):
        return {place: f"[{', '.join(_leaf(value) for value in settings)}]"}
    return {place: _leaf(settings)}


def _leaf(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else NOTHING if value is None else str(value)


def configured_table(facts: Facts) -> Table:
    """What a person changed in the configuration between two rounds."""
    rows = []
    for before, after in itertools.pairwise(facts.rounds):
        old, new = (facts.settings[number]["config"] for number in (before, after))
        rows += [[f"{before} → {after}", line] for line in differences(old, new)]
    return Table("Changed by a person", ["rounds", "setting"], rows)


def seconds_table(facts: Facts) -> Table:
    stages = list(dict.fromkeys(stage for stage, _ in facts.seconds))
    rows = [
        [
            stage,
            *(
                f"{facts.seconds[stage, number]:.1f}" if (stage, number) in facts.seconds else NOTHING
                for number in facts.rounds
            ),
        ]
        for stage in stages
    ]
    return Table("Seconds a stage", ["stage", *(f"round {number}" for number in facts.rounds)], rows)


def effort_table(facts: Facts) -> Table:
    """What the samples of each generator took, over all rounds."""
    rows = []
    for generator in sorted({row["generator"] for row in facts.outcomes}):
        own = matching(facts.outcomes, generator=generator)
        recipes = sum(row["count"] for row in own)
        attempts = sum(row["attempts"] for row in own)
        seconds = sum(row["seconds"] for row in own)
        rows.append(
            [
                generator,
                _number(recipes),
                f"{attempts / recipes:.2f}",
                f"{1000 * seconds / recipes:,.1f}",
                f"{seconds:,.1f}",
            ]
        )
    head = ["generator", "recipes", "draws a recipe", "ms a recipe", "seconds in all"]
    return Table("Work of the generators, one core each", head, rows)


def count_by(rows: Sequence[Row], *names: str) -> Counter[Any]:
    """Recipes by one column, or by the tuple of several."""
    counts: Counter[Any] = Counter()
    for row in rows:
        counts[row[names[0]] if len(names) == 1 else tuple(row[name] for name in names)] += row["count"]
    return counts


def _metrics_table(title: str, found: Sequence[Row], by: tuple[str, ...]) -> Table:
    names = [name for name in METRICS if any(row["metric"] == name for row in found)]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in found:
        groups.setdefault((row["round"], row["detector"], *(row[name] for name in by)), []).append(row)
    rank = {"mean": 0, "tiny": 0, "small": 1, "large": 2}
    order = sorted(groups, key=lambda key: (*key[:2], *((rank.get(word, 9), word) for word in key[2:])))
    return Table(
        title,
        ["round", "detector", *by, *(METRICS[name] for name in names)],
        [[*map(str, key), *_cells(groups[key], names)] for key in order],
        keys=2 + len(by),
    )


def _cells(rows: Sequence[Row], names: Sequence[Any], by: str = "metric") -> list[str]:
    """The value and, on a second line, its interval, for each metric (or other column); a dash where there
    is none."""
    found = {row[by]: row for row in rows}
    return [_cell(found[name]) if name in found else NOTHING for name in names]


def _cell(row: Row) -> str:
    if row["value"] is None:
        return NOTHING
    return f"{row['value']:.3f}" + (f"\n{row['low']:.2f}–{row['high']:.2f}" if has_interval(row) else "")


def has_interval(row: Row) -> bool:
    return all(row[end] is not None and row[end] == row[end] for end in ("low", "high"))


def _share(counts: Counter[Any]) -> str:
    return f"{counts['accepted'] / counts.total():.1%}" if counts.total() else "not yet"


def _number(count: int) -> str:
    return f"{count:,}"
