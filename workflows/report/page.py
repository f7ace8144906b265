"""The page put together: facts to tables, charts and pictures, and those to one file."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup, escape

from manifests.schema import GOOD, LEAKING, canonical_json
from manifests.workspace import Workspace
from workflows import history
from workflows.report import charts, pictures, samples, tables
from workflows.report.facts import (
    Facts,
    Row,
    TypeOutcome,
    matching,
    read_facts,
    row_without_paths,
    type_outcomes,
    without_paths,
)

NAME = "report/index.html"
LARGEST = 25_000_000  # bytes of the page: pictures take what tables leave
LIBRARY = ("bokeh.min.js", "bokeh-api.min.js")
CARD_PICTURES = 4  # of a kind on the card of a type of defect


def write_report(space: Workspace, *, with_pictures: bool = True) -> str:
    """Writes ``report/index.html`` and returns that name. What a stopped run lacks is said to be missing.

    The page holds everything it needs, and its security policy forbids it to fetch anything. The same
    workspace gives the same bytes.

    Args:
        with_pictures: False for a page that may leave the house: no pictures, and no paths of files.

    Raises:
        WorkspaceError: a table is damaged.
        ShardError: a shard is damaged.
    """
    facts = read_facts(space)
    rows, total = samples.read_rows(space, facts.rounds, facts.vetoed)
    if not with_pictures:
        facts, rows = without_paths(facts), [row_without_paths(row) for row in rows]
    heat_pictures, heatmaps = pictures.heatmaps(space, facts.heatmaps) if with_pictures else ([], [])
    types = type_outcomes(facts.found)
    drawn = charts.all_charts(facts, types)
    style, script = _file("page.css"), _file("page.js")
    library = [_bokeh(name) for name in LIBRARY]
    fixed = dict(
        title="Flawsmith report",
        subtitle=_subtitle(facts),
        labelled=any(image.split == "feedback" and image.defect != GOOD for image in facts.images),
        tested=any(image.split == "test" for image in facts.images),
        policy=_policy(script, *library),
        style=Markup(style),
        script=Markup(script),
        library=[Markup(part) for part in library],
        notices=tables.notices(facts.images),
        cards=_cards(facts, types),
        latest=max((row["round"] for row in matching(facts.metrics, split="feedback")), default=None),
        charts=drawn,
        rounds=tables.rounds_table(facts),
        concluded=[
            f"Round {number}: {line}."
            for number in facts.rounds
            for line in history.in_words(facts.history, number)
        ],
        settings=tables.settings_table(facts),
        vetoed=len(facts.vetoed),
        feedback_figures=tables.figures_tables(facts.metrics, "feedback"),
        test_figures=tables.figures_tables(facts.metrics, "test"),
        heldout_figures=tables.figures_tables(facts.metrics, "heldout_synthetic"),
        stress_figures=tables.stress_tables(facts.stress),
        changed=tables.decisions_table(facts, changed=True),
        stayed=tables.decisions_table(facts, changed=False),
        hard_normals=tables.hard_normals_table(facts),
        configured=tables.configured_table(facts),
        types=tables.types_table(types),
        type_cards=_type_cards(types, heatmaps),
        generators=tables.generators_table(facts),
        reasons=tables.reasons_table(facts),
        seconds=tables.seconds_table(facts),
        effort=tables.effort_table(facts),
        shard_bytes=_bytes(sum(facts.bytes.values())) if facts.bytes else "",
        real_pictures=tables.pictures_table(facts.images),
        pictures=with_pictures,
        most_pictures=pictures.MOST_PICTURES,
        row_count=len(rows),
        total=total,
        heat_count=len(heatmaps),
        heat_left=len(facts.heatmaps) - len(heatmaps) if with_pictures else 0,
        heat_pictures=heat_pictures,
    )
    columns = {
        "charts": drawn,
        "samples": samples.columns(rows, facts.images, paths=with_pictures),
        "count": len(rows),
        "vetoed": samples.REJECTED_BY_HAND,
        "replay": samples.replay_command(space, paths=with_pictures),
        "heatmaps": _heatmap_rows(facts, heatmaps),
    }
    template = _template()

    def render(album: pictures.Album) -> str:
        shown = {name: {**own, "place": place} for place, (name, own) in enumerate(album.shown.items())}
        return template.render(
            **fixed,
            shown_count=len(album.shown),
            data=_json({**columns, "sheets": len(album.sheets), "shown": shown}),
            sheets=album.sheets,
            sample_pictures=album.pictures,
        )

    page = render(pictures.Album())
    if with_pictures:
        room = min(pictures.BYTES, LARGEST - len(page.encode()))
        page = render(pictures.make_album(space, rows, room))
    space.write_bytes(NAME, page.encode())
    return NAME


# -- parts of the page ------------------------------------------------------------------------------------


def _subtitle(facts: Facts) -> str:
    categories = sorted({image.category for image in facts.images if image.split})
    detectors = sorted({row["detector"] for row in facts.metrics})
    parts = [", ".join(categories[:8]) + (f" and {len(categories) - 8} more" if len(categories) > 8 else "")]
    parts.append(f"{len(facts.rounds)} round{'' if len(facts.rounds) == 1 else 's'}")
    return " · ".join(part for part in [*parts, ", ".join(detectors)] if part)


def _cards(facts: Facts, types: Sequence[TypeOutcome]) -> list[Row]:
    """The latest figures, each with what it was in the round before."""
    cards = []
    means = matching(facts.metrics, split="feedback", category="mean", defect="all", size="all")
    for metric in tables.HEADLINE:
        own = sorted(matching(means, metric=metric), key=lambda row: row["round"])
        if own:
            last = own[-1]
            began = facts.settings[last["round"]]["first"]
            alike = [row for row in own if row["round"] >= began]  # of the same categories and pictures
            before = matching(alike, round=last["round"] - 1, detector=last["detector"])
            note = f"{last['low']:.2f}–{last['high']:.2f}" if tables.has_interval(last) else "no interval"
            if before:
                change = f"{last['value'] - before[0]['value']:+.3f}".replace("-", "−")
                note += f"; {change} on round {last['round'] - 1}"
            name = tables.METRICS[metric].partition(" (")[0]
            if LEAKING in last["detector"]:
                note += f"; {last['detector']}"
            cards.append({"name": name, "value": f"{last['value']:.3f}", "note": note})
    if types:
        number = max(each.round for each in types)
        own_types = [each for each in types if each.round == number]
        gained, lost = (sum(getattr(each, name) for each in own_types) for name in ("gained", "lost"))
        found, defects = (sum(getattr(each, name) for each in own_types) for name in ("found", "defects"))
        compared = any(each.compared for each in own_types)
        note = f"{gained} gained, {lost} lost" if compared else "feedback split"
        cards.append({"name": "real defects found", "value": f"{found} of {defects}", "note": note})
    if facts.outcomes:
        counts = tables.count_by(facts.outcomes, "status")
        note = f"of {counts.total():,} recipes ({counts['accepted'] / counts.total():.1%})"
        cards.append({"name": "samples accepted", "value": f"{counts['accepted']:,}", "note": note})
    if facts.seconds:
        seconds = sum(facts.seconds.values())
        note = f"{len(facts.rounds)} rounds, all stages"
        cards.append({"name": "time", "value": _duration(seconds), "note": note})
    return cards


def _type_cards(types: Sequence[TypeOutcome], heatmaps: Sequence[Row]) -> list[Row]:
    """The types of the latest judged round, those most missed first, with places of their heat maps."""
    if not types:
        return []
    number = max(each.round for each in types)
    own = sorted(
        (each for each in types if each.round == number),
        key=lambda each: (-each.missed, each.category, each.defect),
    )
    cards = []
    for each in own:
        places = {
            word: [
                at
                for at, row in enumerate(heatmaps)
                if (row["round"], row["split"], row["kind"]) == (number, "feedback", kind)
                and (row["category"], row["defect"]) == (each.category, each.defect)
            ][:CARD_PICTURES]
            for word, kind in (("missed", "miss"), ("gained", "gain"))
        }
        card = {name: getattr(each, name) for name in TypeOutcome.__dataclass_fields__}
        cards.append({**card, "pictures": [(word, found) for word, found in places.items() if found]})
    return cards


def _heatmap_rows(facts: Facts, heatmaps: Sequence[Row]) -> list[Row]:
    known = {image.image_id: image.path for image in facts.images}
    numbers = ("score", "threshold", "hit", "before")
    return [
        {
            **{name: row[name] for name in ("round", "split", "kind", "image_id", "category", "defect")},
            **{name: row[name] if math.isfinite(row[name]) else None for name in numbers},
            "path": known.get(row["image_id"], ""),
        }
        for row in heatmaps
    ]


# -- writing ----------------------------------------------------------------------------------------------


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"lines": _lines, "is_number": _is_number, "tojson": canonical_json}
    return environment.from_string(_file("page.html"))


def _lines(cell: str) -> Markup:
    """A cell's text; its second line, an interval, small below."""
    first, _, second = cell.partition("\n")
    return escape(first) + (Markup("<small>{}</small>").format(second) if second else Markup(""))


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell == tables.NOTHING


def _json(value: Any) -> Markup:
    """JSON that may stand inside a script element, whatever texts it holds."""
    text = canonical_json(value)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _policy(*scripts: str) -> str:
    """Only these scripts run, pictures are those in the page, and nothing is fetched."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
        for script in scripts
    )
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _file(name: str) -> str:
    return (resources.files("workflows.report") / name).read_text(encoding="utf-8")


def _bokeh(name: str) -> str:
    """A script of the plotting library as its Python package ships it."""
    text = (resources.files("bokeh") / "server" / "static" / "js" / name).read_text(encoding="utf-8")
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
