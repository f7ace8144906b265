"""The report of a workspace: one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

import base64
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
from PIL import Image as Pillow

from manifests.schema import GOOD, Image
from manifests.workspace import Workspace, round_file
from workflows.config import differences
from workflows.contact import caption, choose, triptych
from workflows.rounds import vetoes
from workflows.stored import accepted_rows, licences, read_sample, source_images

NAME = "report/index.html"
SAMPLES = 24
METRICS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1max": "image F1max",
    "pixel_auroc": "pixel AUROC",
    "pixel_ap": "pixel AP",
    "pixel_f1max": "pixel F1max",
    "aupro": "AUPRO (FPR ≤ 0.3)",
    "spro": "sPRO (FPR ≤ 0.05)",
    "image_fpr": "false alarms",
    "image_recall": "defect pictures found",
}
HEADLINE = ("image_auroc", "image_ap", "pixel_ap", "aupro")
SPLITS = {
    "feedback": (
        "Figures on the feedback split",
        "Real pictures that the loop may look at: they decide the next round's settings.",
    ),
    "heldout_synthetic": (
        "Figures on samples kept from training (synthetic)",
        "Every tenth sample, of the same generators, beside calibration normals: a check that the detector "
        "learned what it was shown, no measure of real defects. By generator, as defect type.",
    ),
    "test": (
        "Final figures on the test split",
        "Real pictures that decided nothing: no setting, threshold or epoch was chosen on them.",
    ),
}
INTERVALS = (
    "Below each figure: its 95 % bootstrap interval, resampling groups of pictures that belong together."
)
NON_COMMERCIAL = re.compile(r"non-?\s?commercial|\bNC\b", re.IGNORECASE)

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """``rows`` hold one text a column of ``head``; the first ``keys`` columns say what a row is about."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    keys: int = 1


@dataclass(frozen=True)
class Section:
    title: str
    text: str
    tables: Sequence[Table]


def write_report(space: Workspace) -> str:
    """Writes ``report/index.html`` and returns that name. What a stopped run lacks is said to be missing.

    The same workspace gives the same bytes.

    Raises:
        WorkspaceError: a table is damaged.
        ShardError: a shard is damaged.
    """
    images = source_images(space)
    rounds = space.rounds()
    history = space.read_table("history.parquet").to_pylist() if space.exists("history.parquet") else []
    made = {number: _outcomes(space, number) for number in rounds}
    metrics = _metrics(space, rounds)
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (resources.files("workflows") / "report.html").read_text(encoding="utf-8")
    )
    page = template.render(
        title="Flawsmith report",
        notices=_notices(images),
        sections=[
            Section("Pictures", "Real pictures by category and split.", [_pictures(images)]),
            _overview(made, metrics, len(vetoes(space))),
            *(_figures(split, metrics) for split in SPLITS if split != "test" and _of(metrics, split=split)),
            _figures("test", metrics),
            _synthesis(made),
            _changes(space, rounds),
            _seconds(history),
        ],
        samples=_samples(space),
    )
    space.write_bytes(NAME, page.encode())
    return NAME


# -- sections -------------------------------------------------------------------------------------------


def _notices(images: Sequence[Image]) -> list[Row]:
    return [
        {
            "licence": licence,
            "categories": ", ".join(categories),
            "non_commercial": bool(NON_COMMERCIAL.search(licence)),
        }
        for licence, categories in licences(images).items()
    ]


def _pictures(images: Sequence[Image]) -> Table:
    counts = Counter((image.category, image.split, image.defect == GOOD) for image in images)
    columns = [("train", True), ("calibration", True)]
    columns += [(split, good) for split in ("feedback", "test") for good in (True, False)]
    return Table(
        "Real pictures",
        [
            "category",
            "train",
            "calibration",
            "feedback good",
            "feedback defective",
            "test good",
            "test defective",
        ],
        [
            [category, *(str(counts[category, *column]) for column in columns)]
            for category in sorted({image.category for image in images})
        ],
    )


def _overview(made: dict[int, Counter[Any]], metrics: Sequence[Row], vetoed: int) -> Section:
    text = f"Each row is a round. {INTERVALS} Figures are means over categories on the feedback split."
    if vetoed:
        text += f" A person rejected {vetoed} of the accepted samples; training leaves them out."
    means = _of(metrics, split="feedback", category="mean", defect="all", size="all")
    names = [name for name in HEADLINE if any(row["metric"] == name for row in means)]
    detectors = sorted({row["detector"] for row in means}) or [""]
    rows = []
    for number, outcomes in made.items():
        total = outcomes["accepted"] + outcomes["rejected"] + outcomes["failed"]
        share = f"{outcomes['accepted'] / total:.1%}" if total else "not yet"
        counts = [str(outcomes[status]) for status in ("accepted", "rejected", "failed")]
        for detector in detectors:
            own = [row for row in means if row["round"] == number and row["detector"] == detector]
            rows.append([str(number), *counts, share, detector or "not yet", *_cells(own, names)])
    head = ["round", "accepted", "rejected", "failed", "acceptance", "detector"]
    head += [METRICS[name] for name in names]
    return Section("Rounds", text, [Table("Rounds at a glance", head, rows)])


def _figures(split: str, metrics: Sequence[Row]) -> Section:
    title, text = SPLITS[split]
    found = _of(metrics, split=split)
    if not found:
        return Section(title, "Not yet: `flawsmith evaluate --final` reads the test split, once.", [])
    tables = [
        _metrics_table("By category", _of(found, defect="all", size="all"), ("category",)),
        _metrics_table(
            "By size of the defects (mean over categories; tiny is under 0.1 %, small under 1 %)",
            [row for row in _of(found, category="mean", defect="all") if row["size"] != "all"],
            ("size",),
        ),
        _metrics_table(
            "By type of defect",
            [row for row in _of(found, size="all") if row["defect"] != "all"],
            ("category", "defect"),
        ),
    ]
    return Section(title, f"{text} {INTERVALS}", [table for table in tables if table.rows])


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


def _synthesis(made: dict[int, Counter[Any]]) -> Section:
    mix, reasons = [], []
    for number, outcomes in made.items():
        by_generator: dict[str, Counter[str]] = {}
        why: Counter[tuple[str, str]] = Counter()
        for key, count in outcomes.items():
            if isinstance(key, tuple):
                generator, status, reason = key
                by_generator.setdefault(generator, Counter())[status] += count
                if reason:
                    why[status, reason] += count
        for generator, counts in sorted(by_generator.items()):
            statuses = [str(counts[status]) for status in ("accepted", "rejected", "failed")]
            share = f"{counts['accepted'] / counts.total():.1%}"
            mix.append([str(number), generator, *statuses, share])
        ranked = sorted(why.items(), key=lambda item: (-item[1], item[0]))
        reasons += [[str(number), status, reason, str(count)] for (status, reason), count in ranked]
    head = ["round", "generator", "accepted", "rejected", "failed", "acceptance"]
    return Section(
        "Samples",
        "Every recipe has one outcome. The reason is that of the last attempt.",
        [
            Table("Samples by generator", head, mix, keys=2),
            Table(
                "Why recipes were rejected or failed", ["round", "outcome", "reason", "recipes"], reasons, 3
            ),
        ],
    )


def _changes(space: Workspace, rounds: Sequence[int]) -> Section:
    decisions = _rows(space, rounds, "decisions.parquet")
    listed = [
        [f"{row['round']} → {row['round'] + 1}", row["setting"], row["before"], row["after"], row["reason"]]
        for row in decisions
    ]
    configured = []
    for before, after in itertools.pairwise(rounds):
        old, new = (space.read_yaml(round_file(n, "settings.yaml"))["config"] for n in (before, after))
        configured += [[f"{before} → {after}", line] for line in differences(old, new)]
    head = ["rounds", "setting", "before", "after", "why"]
    return Section(
        "What the figures changed",
        "Settings of a round follow from the figures of the round before, on the feedback split.",
        [
            Table("Settings that changed", head, [line for line in listed if line[2] != line[3]], keys=2),
            Table("Settings that stayed", head, [line for line in listed if line[2] == line[3]], keys=2),
            *([Table("Changed by a person", ["rounds", "setting"], configured)] if configured else []),
        ],
    )


def _seconds(history: Sequence[Row]) -> Section:
    seconds = {
        (row["name"], row["round"]): f"{float(row['value']):.1f}"
        for row in history
        if row["kind"].split(".")[0] == "seconds"
    }
    rounds = sorted({number for _, number in seconds})
    stages = dict.fromkeys(stage for stage, _ in seconds)
    rows = [[stage, *(seconds.get((stage, number), "–") for number in rounds)] for stage in stages]
    return Section(
        "Time",
        "Of the last run of each stage.",
        [Table("Seconds a stage", ["stage", *(f"round {number}" for number in rounds)], rows)],
    )


def _samples(space: Workspace) -> list[Row]:
    shown = []
    for row in choose(accepted_rows(space), SAMPLES):
        buffer = io.BytesIO()
        Pillow.fromarray(triptych(read_sample(space, row))).save(buffer, "WEBP", quality=80)
        data = base64.b64encode(buffer.getvalue()).decode()
        shown.append({"uri": f"data:image/webp;base64,{data}", "caption": caption(row)})
    return shown


# -- tables of the workspace ------------------------------------------------------------------------------


def _rows(space: Workspace, rounds: Iterable[int], name: str) -> list[Row]:
    """The rows of one table of every round that has it."""
    paths = [round_file(number, name) for number in rounds]
    return [row for path in paths if space.exists(path) for row in space.read_table(path).to_pylist()]


def _metrics(space: Workspace, rounds: Iterable[int]) -> list[Row]:
    """Figures of every round; where there are several seeds, the detector's name says which."""
    rows = _rows(space, rounds, "metrics.parquet")
    if len({row["seed"] for row in rows}) > 1:
        rows = [row | {"detector": f"{row['detector']}, seed {row['seed']}"} for row in rows]
    return rows


def _outcomes(space: Workspace, number: int) -> Counter[Any]:
    """Recipes of a round by status, and by (generator, status, reason), of the shards that are finished."""
    counts: Counter[Any] = Counter()
    folder = f"rounds/{number:03d}/samples"
    keys = ["generator", "status", "reason"]
    for name in space.names(folder):
        table = space.read_table(f"{folder}/{name}").select(keys)
        for row in table.group_by(keys).aggregate([([], "count_all")]).to_pylist():
            counts[row["status"]] += row["count_all"]
            counts[row["generator"], row["status"], row["reason"]] += row["count_all"]
    return counts


def _of(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _cells(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """The value and, on a second line, its interval, for each metric; a dash where there is none."""
    by_name = {row["metric"]: row for row in rows}
    return [_cell(by_name[name]) if name in by_name else "–" for name in names]


def _cell(row: Row) -> str:
    if row["value"] is None:
        return "–"
    known = all(row[end] is not None and row[end] == row[end] for end in ("low", "high"))
    return f"{row['value']:.3f}" + (f"\n{row['low']:.2f}–{row['high']:.2f}" if known else "")
