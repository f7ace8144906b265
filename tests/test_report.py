"""The report's facts, pictures and page, without a browser; test_report_page.py opens it in one."""

import json
import math
import re
import shlex
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from manifests.schema import DECISIONS, LEAKING, METRICS, SAMPLES, SHARDS, STRESS, to_table
from manifests.workspace import Workspace, part, round_file
from tests.small_workspace import (
    HOSTILE,
    LICENCE,
    NASTY,
    metric_row,
    write_judgement,
    write_workspace,
)
from training.evaluation import Judged
from workflows import heatmaps, history
from workflows.report import charts, page, pictures, samples
from workflows.report.facts import read_facts, type_outcomes
from workflows.report.page import _cards, write_report


@pytest.fixture
def space(tmp_path):
    return write_workspace(tmp_path)


@pytest.fixture
def judged(space):
    write_judgement(space)
    return space


class Page(HTMLParser):
    """Checks that tags close in order; keeps text, addresses, and scripts by type."""

    VOID = ("meta", "img", "br", "link", "input")
    ADDRESSES = ("src", "href", "srcset", "action", "formaction", "data", "poster", "xlink:href")

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.addresses, self.scripts, self.policy = [], "", [], {}, ""
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "script":
            self.kind = (attrs.get("type", "run"), attrs.get("id"))
        if attrs.get("http-equiv") == "Content-Security-Policy":
            self.policy = attrs["content"]
        self.addresses += [value for name, value in attrs.items() if name in self.ADDRESSES]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[self.kind] = data if self.kind[0] != "run" else ""
        elif self.open and self.open[-1] != "style":
            self.text += data


def written(space, **options):
    """(text with single spaces, embedded data, page) of the report."""
    page = space.read_bytes(write_report(space, **options)).decode()
    parsed = Page(page)
    assert all(re.match(r"#|data:", address) for address in parsed.addresses)
    own = re.sub(
        r"<script>.*?</script>", "", page, flags=re.DOTALL
    )  # all but the code, which a hash vouches for
    assert not re.search(r"url\((?!\W*data:)|@import", own)
    data = json.loads(parsed.scripts["application/json", "data"])
    return re.sub(r"\s+", " ", parsed.text), data, page


def test_report_of_a_whole_run(space):
    rows = [
        metric_row(0, "feedback", "mean", "image_auroc", 0.811),
        metric_row(0, "feedback", "bolt", "image_auroc", 0.7),
        metric_row(0, "feedback", "bolt", "pixel_ap", 0.41, low=float("nan"), high=float("nan")),
        metric_row(0, "test", "mean", "image_auroc", 0.8225),
        metric_row(0, "test", "bolt", "image_auroc", 0.66, defect=NASTY),
    ]
    space.write_table(round_file(0, "metrics.parquet"), to_table(rows, METRICS))
    stress = [
        {"round": 0, "detector": "memory_bank", "seed": 0, "kind": "blur", "level": level, "strength": 0.0}
        | {"category": category, "metric": "aupro", "value": value, "low": value, "high": value}
        for level, value in ((0, 0.913), (2, 0.527))
        for category in ("mean", "bolt")
    ]
    space.write_table(round_file(0, "stress.parquet"), to_table(stress, STRESS))
    reason = f"missed defects are smaller {NASTY}"
    decisions = [
        {"round": 0, "setting": "area", "before": "[0.1, 0.2]", "after": "[0.05, 0.1]", "reason": reason},
        {"round": 0, "setting": "severity", "before": "[0, 1]", "after": "[0, 1]", "reason": "chance"},
        {
            "round": 0,
            "setting": "normals.f00d",
            "before": "1",
            "after": "2.5",
            "reason": "false alarms on it",
        },
    ]
    space.write_table(round_file(0, "decisions.parquet"), to_table(decisions, DECISIONS))
    gain = {"against": "0", "metric": "pixel_ap", "difference": "0.05", "low": "0.01", "high": "0.09"}
    for number, kind, kept in (
        (0, "seconds.train", {"train": "61.25"}), (0, "weighing", {"result": "every sample counts the same"}),
        (1, "weighing", {"result": "mean weight by generator: noise 0.50, scar 1.25"}), (1, "gain", gain),
        (1, "stop", {"reason": "all 2 rounds are done"}),
    ):  # fmt: skip
        history.remember(space, number, kind, kept)
    for number, often in enumerate((1.0, 3.0)):
        stored = space.read_yaml(round_file(number, "settings.yaml"))
        stored["generation"]["generators"]["scar"]["categories"] = {"bolt": often}
        space.write_yaml(round_file(number, "settings.yaml"), stored)
    space.write_table("review.parquet", pa.table({"sample_id": ["000-00000-00001"]}))
    text, data, page = written(space)
    assert (
        f"Non-commercial use only. Licence of the pictures of bolt, and of what was made from them: {LICENCE}"
        in text
    )
    for fact in (
        "0.8110.71–0.86", "0.410", "0.8230.72–0.87", "87.5%", "contrast below 1", "61.2",
        "[0.05, 0.1]", reason,
        "blur0.9130.91–0.910.5270.53–0.53", "rejected 1 of the accepted samples",
        "Round 0: every sample counts the same.",
        "Round 1: mean weight by generator: noise 0.50, scar 1.25.",
        "Round 1: against round 0: pixel_ap +0.050 [+0.010, +0.090].",
        "Round 1: the run stopped after it: all 2 rounds are done.",
        "generators.scar.categories.bolt13",
        "Normal pictures that are drawn more often or less", "0 → 1f00d12.5false alarms on it",
    ):  # fmt: skip
        assert fact in text, fact
    ids = data["samples"]["sample_id"]
    outcomes = data["samples"]["outcome"]
    by_id = {name: outcomes["values"][code] for name, code in zip(ids, outcomes["codes"], strict=True)}
    assert len(by_id) == 16
    assert by_id["000-00000-00001"] == "rejected by hand"
    assert by_id["001-00000-00007"] == "rejected"
    assert set(data["shown"]) == {name for name, outcome in by_id.items() if outcome == "accepted"}
    assert page.count('id="picture-') == 11 + 4  # 13 samples, two of them features; four normals, each once
    assert write_report(space) == "report/index.html"
    assert space.read_bytes("report/index.html").decode() == page


@pytest.mark.parametrize("first", [0, 1])
def test_a_change_is_told_only_within_a_configuration(space, first):
    """Another has other categories, or other pictures."""
    stored = space.read_yaml(round_file(1, "settings.yaml"))
    space.write_yaml(round_file(1, "settings.yaml"), {**stored, "first": first})
    for number, value in enumerate((0.6, 0.5)):
        row = metric_row(number, "feedback", "mean", "pixel_ap", value)
        space.write_table(round_file(number, "metrics.parquet"), to_table([row], METRICS))
    assert ("−0.100 on round 0" in written(space)[0]) == (first == 0)


def test_a_normal_that_is_drawn_more_often_is_named_by_its_file(space, tmp_path):
    known = space.read_table("images.parquet").to_pylist()[0]
    row = {"round": 0, "setting": f"normals.{known['image_id']}", "before": "1", "after": "2", "reason": "x"}
    space.write_table(round_file(0, "decisions.parquet"), to_table([row], DECISIONS))
    name = "/".join(Path(known["path"]).parts[-2:])
    assert f"0 → 1{name}12x" in written(space)[0]
    assert f"0 → 1{known['image_id']}12x" in written(space, with_pictures=False)[0]


def test_the_chart_of_shares_counts_the_recipes(space):
    """Not the settings' shares, which mixes of categories change."""
    chart = charts.shares_chart(read_facts(space).outcomes)
    found = {series["name"]: series["values"] for series in chart["series"]}
    assert chart["rows"] == ["round 0", "round 1"]
    assert found == {"feature-noise": [1 / 8] * 2, "perlin": [5 / 8] * 2, "scar": [2 / 8] * 2}


def test_report_of_a_run_that_stopped_early(space):
    text, _, _ = written(space)
    for lack in (
        "`flawsmith evaluate --final` reads it, once",
        "The sources have no pictures to judge by",
    ):
        assert lack in text
    for number in (0, 1):
        for name in ("shards.parquet", "samples/part-00000.parquet", "shards/part-00000.tar"):
            space.remove(round_file(number, name))
    text, data, page = written(space)
    assert "Samples by generator: none." in text
    assert data["count"] == 0
    assert 'id="picture-' not in page
    text, _, _ = written(Workspace(space.url + "-nothing"))
    assert "Real pictures: none." in text


def test_hostile_texts_stay_texts_and_nothing_can_be_fetched(judged):
    text, data, page = written(judged)
    parsed = Page(page)
    assert sorted(kind for kind, _ in parsed.scripts if kind != "text/plain") == ["application/json", "run"]
    assert page.count("<script>") == 3  # the page's own and the library's two
    assert len(re.findall(r"'sha256-[\w+/]{43}='", parsed.policy)) == 3
    rules = dict(rule.strip().partition(" ")[::2] for rule in parsed.policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert "unsafe" not in rules["script-src"]
    assert HOSTILE in text
    assert HOSTILE in data["samples"]["prompt"]["values"]
    assert all("$$" not in name for name in data["charts"]["types"]["series"][0]["rows"])


def test_a_page_that_may_leave_the_house_holds_no_picture_and_no_path(judged, tmp_path):
    _, data, page = written(judged, with_pictures=False)
    assert not re.search(r"data:image|id=\"(picture|sheet|heat)-\d", page.split("<script>")[0])
    assert str(tmp_path) not in page
    assert data["replay"] == "flawsmith replay ws"
    assert data["count"] == 16
    assert data["shown"] == {}


def test_neither_settings_nor_failures_name_files_on_such_a_page(judged, monkeypatch):
    facts = read_facts(judged)
    settings = dict(facts.settings)
    for number in facts.rounds:
        changed = {**settings[number]["config"], "detector": f"/home/someone/secret{number}"}
        settings[number] = {**settings[number], "config": changed}
    failed = {**facts.outcomes[0], "status": "failed", "reason": "PictureError: /home/someone/x.png: cut"}
    told = replace(facts, settings=settings, outcomes=[*facts.outcomes, failed])
    monkeypatch.setattr("workflows.report.page.read_facts", lambda _space: told)
    _, _, page = written(judged)
    assert "/home/someone/secret1" in page and "/home/someone/x.png" in page
    _, _, page = written(judged, with_pictures=False)
    assert "/home/someone" not in page and "PictureError" in page


def test_types_tell_what_was_gained_and_lost(judged):
    outcomes = {(t.round, t.defect): t for t in type_outcomes(read_facts(judged).found)}
    first, hostile, scratch = outcomes[0, HOSTILE], outcomes[1, HOSTILE], outcomes[1, "scratch"]
    assert (first.defects, first.found, first.compared) == (3, 0, False)
    assert (hostile.found, hostile.gained, hostile.lost, hostile.missed) == (1, 1, 0, 2)
    assert (scratch.found, scratch.gained, scratch.lost, scratch.missed) == (1, 0, 1, 1)
    drawn = charts.types_chart(list(outcomes.values()))["series"]
    for number in (0, 1):  # each bar is as long as there are defects
        own = [series["values"] for series in drawn if series["choose"] == {"round": str(number)}]
        assert sorted(map(sum, zip(*own, strict=True))) == [2, 3]


def test_heat_maps_are_stored_listed_and_removed(judged):
    rows = judged.read_table("rounds/001/heatmaps.parquet").to_pylist()
    assert [(row["kind"], row["image_id"]) for row in rows[:3]] == [
        ("miss", "flawed1"), ("miss", "scratcha"), ("miss", "flawed2"),
    ]  # fmt: skip
    gain = next(row for row in rows if row["kind"] == "gain")
    assert (gain["image_id"], gain["before"], gain["hit"]) == ("flawed0", 0.1, 0.9)
    assert {row["image_id"] for row in rows if row["kind"] == "false_alarm"} == {
        judged.read_table("images.parquet")["image_id"][3].as_py()
    }
    for row in rows:
        strip = cv2.imdecode(np.frombuffer(judged.read_bytes(f"rounds/001/{row['file']}"), np.uint8), 1)
        assert max(strip.shape[0], (strip.shape[1] - heatmaps.GAP) // 2) == heatmaps.SIDE
    heatmaps.remove_heatmaps(judged, 1)
    assert not judged.exists("rounds/001/heatmaps.parquet")
    assert judged.names("rounds/001/heatmaps") == []


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 1), st.floats(0.0001, 0.2)), max_size=40),
    st.lists(st.floats(0, 1), max_size=20),
)
def test_worst_pictures_cover_every_type_before_one_comes_twice(defects, good_scores):
    def image(name, defect):
        from types import SimpleNamespace

        return SimpleNamespace(image_id=name, category="part", defect=defect)

    found = [
        {"image_id": f"bad{i}", "category": "part", "defect": kind, "component": 1, "area": area, "hit": hit}
        for i, (kind, hit, area) in enumerate(defects)
    ]
    blank = np.zeros((2, 2), np.float32)
    entries = [Judged(image(f"good{i}", "good"), s, blank, None, None) for i, s in enumerate(good_scores)]
    picked = [pick for pick, _ in heatmaps.pick_worst(entries, found, {"part": (0.5, 0.5)})]
    missed = [row for row in found if row["hit"] < 0.5]
    misses = [pick for pick in picked if pick.kind == "miss"]
    assert len(misses) == min(len(missed), heatmaps.MOST)
    assert len({pick.image_id for pick in misses}) == len(misses)
    types = {row["defect"] for row in missed}
    assert {pick.defect[1] for pick in misses[: len(types)]} == types
    alarms = [pick.badness[0] for pick in picked if pick.kind == "false_alarm"]
    assert alarms == sorted((s - 0.5 for s in good_scores if s > 0.5), reverse=True)[: heatmaps.MOST]
    assert not any(pick.kind == "gain" for pick in picked)  # nothing to compare with


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([(96, 128), (128, 60)]))
def test_the_drawn_outline_encloses_the_mask(seed, shape):
    noise = cv2.GaussianBlur(np.random.default_rng(seed).standard_normal(shape), (0, 0), 4)
    mask = noise > np.quantile(noise, 0.8)
    drawn = np.zeros(shape, np.uint8)
    for closed in re.findall(r"M([^Z]*)Z", pictures.outline_path(mask)):
        points = np.array([pair.split() for pair in closed.split("L")], float) - 0.5
        own = np.zeros(shape, np.uint8)
        cv2.fillPoly(own, [points.astype(np.int32)], 1)
        drawn ^= own  # as the rule evenodd does
    assert (drawn & mask).sum() / (drawn | mask).sum() > 0.8


def noisy_workspace(tmp_path, count=40, side=200):
    """One round of samples of pure noise, which no encoder makes small."""
    from manifests import pictures as files
    from manifests import shards
    from tests.small_workspace import sample_row

    space = write_workspace(tmp_path)
    image = read_facts(space).images[0]
    rng = np.random.default_rng(0)
    members = []
    for index in range(count):
        pixels = rng.integers(0, 255, (side, side, 3), np.uint8)
        mask = np.zeros((side, side), bool)
        mask[20:50, 30:90] = True
        files_ = {"image.webp": files.encode(pixels, "webp"), "mask.png": files.encode_mask(mask)}
        files_ |= {"normal.webp": files.encode(pixels, "webp"), "json": shards.sample_json({}, {}, {})}
        members.append((f"000-00000-{index:05d}", files_))
    packed = shards.pack(members)
    space.write_bytes(part("shards", 0, 0, "tar"), packed.data)
    rows = [
        sample_row(0, index, "bolt", "perlin", "stain", image, offset, checksum)
        for index, (offset, checksum) in enumerate(zip(packed.offsets, packed.checksums, strict=True))
    ]
    space.write_table(part("samples", 0, 0, "parquet"), to_table(rows, SAMPLES))
    record = {
        "round": 0, "shard": 0, "path": part("shards", 0, 0, "tar"), "sha256": packed.sha256,
        "bytes": len(packed.data), "samples_bytes": 0, "accepted": count, "rejected": 0, "failed": 0,
        "fingerprint": "{}", "seconds": 1.0, "host": "here", "lossy": False,
    }  # fmt: skip
    space.write_table(round_file(0, "shards.parquet"), to_table([record], SHARDS))
    return space


def test_pictures_shrink_before_they_outgrow_the_page(tmp_path, monkeypatch):
    space = noisy_workspace(tmp_path)
    rows, total = samples.read_rows(space, [0], frozenset())
    assert total == len(rows) == 40
    sizes = []
    for room in (20_000_000, 2_500_000, 900_000):
        album = pictures.make_album(space, rows, room)
        assert len(album.shown) == 40  # each has its thumbnail
        outlines = [shown["mask"] for shown in album.shown.values()]
        assert sum(map(len, [*album.sheets, *album.pictures, *outlines])) <= room
        sizes.append(next(iter(album.shown.values()))["width"])
    assert sizes[0] == pictures.SIDES[0] > sizes[1] > sizes[2] == pictures.SIDES[-1]
    for largest in (3_500_000, 5_000_000):  # what the rest of the page takes, the library above all, counts
        monkeypatch.setattr(page, "LARGEST", largest)
        assert len(space.read_bytes(write_report(space))) <= largest


def test_a_long_table_is_thinned_evenly(space, monkeypatch):
    monkeypatch.setattr(samples, "MOST_ROWS", 6)
    rows, total = samples.read_rows(space, [0, 1], frozenset())
    assert total == 16
    assert [row["sample_id"] for row in rows] == [
        f"{n // 8:03d}-00000-{n % 8:05d}" for n in range(0, 16, math.ceil(16 / 6))
    ]


@given(st.lists(st.one_of(st.floats(), st.text(), st.integers(-(2**62), 2**62)), max_size=30))
@example([0.0, 0.0, 0, 0])
def test_columns_give_back_their_values(values):
    coded = samples._coded([samples._plain(value) for value in values])
    decoded = [coded["values"][c] for c in coded["codes"]] if isinstance(coded, dict) else coded
    for value, again in zip(values, json.loads(json.dumps(decoded, allow_nan=False)), strict=True):
        if isinstance(value, float):
            assert again is None if not math.isfinite(value) else math.isclose(value, again, rel_tol=1e-5)
        else:
            assert str(again) == str(value)


def test_the_replay_command_survives_a_shell(tmp_path):
    url = str(tmp_path / "my runs; rm -rf ~" / "$HOME")
    command = samples.replay_command(Workspace(url), paths=True)
    assert shlex.split(command) == ["flawsmith", "replay", url]


def test_a_detector_whose_figures_leak_is_named_beside_them(judged):
    facts = read_facts(judged)
    rows = [row | {"detector": f"dfd {LEAKING}"} for row in facts.metrics]
    assert all(LEAKING not in one["name"] for one in charts.metrics_chart(facts.metrics)["series"])
    assert all(one["name"].endswith(f"dfd {LEAKING}") for one in charts.metrics_chart(rows)["series"])
    cards = [_cards(replace(facts, metrics=metrics), [])[0]["note"] for metrics in (facts.metrics, rows)]
    assert [LEAKING in note for note in cards] == [False, True]
