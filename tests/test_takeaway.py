"""What a user takes out of a workspace: contact sheet, export, predictions, doctor."""

import csv
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from detectors.protocol import counted
from generation.cut import models
from manifests import pictures, shards
from manifests.errors import PictureError, UsageError
from manifests.schema import IMAGES, to_table
from manifests.workspace import part
from tests.small_workspace import LICENCE, NASTY, write_workspace
from training.evaluation import predict as score_pictures
from workflows import contact, doctor, export, predict
from workflows.runtimes import Runtime


@pytest.fixture
def space(tmp_path):
    return write_workspace(tmp_path)


def stored(space, round_):
    """The members of a round's shard, decoded by the contract's own reader."""
    name = part("shards", round_, 0, "tar")
    return dict(shards.unpack(space.read_bytes(name), name))


def veto(space, *ids):
    space.write_table("review.parquet", pa.table({"sample_id": list(ids)}))


def stored_mask(members, shape):
    return pictures.decode_mask(members["mask.png"], name="mask", shape=shape)


# -- contact sheet --------------------------------------------------------------------------------------


def test_contact_sheet_is_spread_repeatable_and_leaves_out_what_a_person_rejected(space, tmp_path):
    veto(space, "000-00000-00000", "001-00000-00006")
    out = tmp_path / "new" / "sheet.png"
    shown = contact.contact_sheet(space, out, samples=4)
    assert shown == contact.contact_sheet(space, tmp_path / "again.png", samples=4)
    assert out.read_bytes() == (tmp_path / "again.png").read_bytes()
    assert {name[:3] for name in shown} == {"000", "001"}
    everything = contact.contact_sheet(space, out, samples=99)
    assert len(everything) == len(set(everything)) == 12
    assert not {"000-00000-00000", "001-00000-00006"} & set(everything)
    assert "000-00000-00006" in everything  # features are shown too
    with Pillow.open(out) as sheet:
        assert sheet.width > 3 * contact.TILE


@given(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ab"), st.sampled_from("xyz")), min_size=1),
    st.integers(1, 40),
    st.integers(0, 5),
)
def test_chosen_samples_cover_every_kind_before_one_comes_twice(kinds, count, seed):
    rows = [
        {"sample_id": str(i), "round": r, "category": c, "generator": g} for i, (r, c, g) in enumerate(kinds)
    ]
    chosen = contact.choose(rows, count, seed)
    assert len(chosen) == len({row["sample_id"] for row in chosen}) == min(count, len(rows))
    seen = [(row["round"], row["category"], row["generator"]) for row in chosen]
    assert len(set(seen)) == min(len(set(kinds)), count)


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_outline_shows_on_any_background_and_hides_no_defect(colour):
    picture = np.full((40, 40, 3), colour, np.uint8)
    mask = np.zeros((40, 40), bool)
    mask[15:20, 10:30] = True
    drawn = contact.outline(picture, mask)
    assert np.array_equal(drawn[mask], picture[mask])
    strongest = np.abs(drawn.astype(int) - picture).sum(axis=2)[12:15, 20].max()
    assert strongest >= 200


def test_a_thin_defect_survives_shrinking():
    mask = np.zeros((2000, 1000), bool)
    mask[777, 300:310] = True
    assert contact.fit_mask(mask, (168, 84)).any()


@pytest.mark.parametrize("name", ["sheet.jpg", "."])
def test_a_contact_sheet_is_a_png(space, tmp_path, name):
    with pytest.raises(UsageError, match=r"written as \.png"):
        contact.contact_sheet(space, tmp_path / name)


def test_a_damaged_sample_is_named_not_shown(space, tmp_path):
    name = part("shards", 1, 0, "tar")
    data = bytearray(space.read_bytes(name))
    data[600] ^= 255
    space.write_bytes(name, bytes(data))
    with pytest.raises(
        shards.ShardError, match=r"rounds/001/shards/part-00000\.tar .*001-00000-00000.*verify"
    ):
        contact.contact_sheet(space, tmp_path / "sheet.png", samples=99)


def test_a_round_that_is_not_there_or_empty_is_a_usage_error(space, tmp_path):
    with pytest.raises(UsageError, match="no round 7; rounds that are there: 0, 1"):
        contact.contact_sheet(space, tmp_path / "sheet.png", rounds=[7])
    space.write_yaml("rounds/002/settings.yaml", {**space.read_yaml("rounds/001/settings.yaml"), "round": 2})
    with pytest.raises(UsageError, match="round 2 has no samples yet"):
        export.export(space, "coco", tmp_path / "out", rounds=[2])
    veto(space, *(f"001-00000-{index:05d}" for index in range(7)))
    with pytest.raises(UsageError, match="every accepted sample of round 1 is rejected by hand"):
        export.export(space, "coco", tmp_path / "out", rounds=[1])


# -- export ---------------------------------------------------------------------------------------------


def test_mvtec_export_holds_the_same_pixels_and_stays_in_its_folder(space, tmp_path):
    veto(space, "001-00000-00002")
    known = space.read_table("images.parquet").to_pylist()
    gone = {**known[0], "image_id": "0" * 64, "path": str(tmp_path / "gone.png"), "split": "train"}
    space.write_table("images.parquet", to_table([*known, gone], IMAGES))  # of an earlier source
    out = tmp_path / "out"
    counts = export.export(space, "mvtec", out)
    assert counts == {"anomalies": 11, "normals": 6, "features_left_out": 2}
    everything = {path for path in tmp_path.rglob("*") if path.is_file()}
    outside = {path for path in everything if out not in path.parents and tmp_path / "ws" not in path.parents}
    assert {path.name for path in outside} == {f"{c}{i}.png" for c in ("bolt", "cloth") for i in range(4)}
    with open(out / "manifest.csv", encoding="utf-8", newline="") as file:
        entries = list(csv.DictReader(file))
    assert {str(p.relative_to(out)) for p in out.rglob("*.png") if "ground_truth" not in p.parts} == {
        entry["file"] for entry in entries
    }
    for entry in entries:
        pixels = pictures.decode((out / entry["file"]).read_bytes(), name=entry["file"]).pixels
        assert pixels.shape[2] == (1 if entry["category"] == "bolt" else 3)
        good = "/good/" in entry["file"]
        assert good == (entry["synthetic"] == "0")  # also for the synthetic defect that is called "good"
        if good:
            assert pictures.pixel_hash(pixels) == entry["image_id"]
            continue
        members = stored(space, int(entry["round"]))[entry["sample_id"]]
        original = pictures.decode(members["image.webp"], name="image").pixels
        assert np.array_equal(pixels, original[:, :, : pixels.shape[2]])
        mask = pictures.decode_mask((out / entry["mask"]).read_bytes(), name="mask", shape=pixels.shape[:2])
        assert np.array_equal(mask, stored_mask(members, pixels.shape[:2]))
        assert entry["mask"] == (
            entry["file"].replace("/test/", "/ground_truth/").replace(".png", "_mask.png")
        )
    folders = {entry["file"].split("/")[2] for entry in entries if entry["synthetic"] == "1"}
    assert len(folders) == len({name.casefold() for name in folders}) == 4
    readme = (out / "README.md").read_text(encoding="utf-8")
    assert "synthetic" in readme
    assert LICENCE in readme


def test_a_category_that_the_newest_configuration_lacks_keeps_its_good_pictures(space, tmp_path):
    """The second round begins a configuration without bolts."""
    stored_settings = space.read_yaml("rounds/001/settings.yaml")
    space.write_yaml("rounds/001/settings.yaml", {**stored_settings, "first": 1})
    known = space.read_table("rounds/000/images.parquet")
    rest = [row for row in known.to_pylist() if row["category"] != "bolt"]
    space.write_table("rounds/001/images.parquet", to_table(rest, IMAGES))
    counts = export.export(space, "mvtec", tmp_path / "out")
    assert counts["normals"] == 6
    for category in ("bolt", "cloth"):
        assert list((tmp_path / "out" / category / "train" / "good").glob("*.png"))


@pytest.mark.parametrize("format", ["coco", "yolo"])
def test_a_defect_has_one_number_whatever_is_exported(space, tmp_path, format):
    def numbers(name: str, rounds: list[int] | None) -> dict[str, int]:
        export.export(space, format, tmp_path / name, rounds=rounds)
        if format == "yolo":
            found = yaml.safe_load((tmp_path / name / "data.yaml").read_text(encoding="utf-8"))["names"]
            return {word: number for number, word in found.items()}
        document = json.loads((tmp_path / name / "annotations.json").read_text(encoding="utf-8"))
        return {entry["name"]: entry["id"] for entry in document["categories"]}

    every = numbers("every", None)
    assert sorted(every.values()) == list(range(format == "coco", len(every) + (format == "coco")))
    assert numbers("second", [1]) == every
    veto(space, "000-00000-00000")
    assert numbers("vetoed", None) == every


def test_coco_run_lengths_give_back_the_exact_mask(space, tmp_path):
    export.export(space, "coco", tmp_path / "out", rounds=[1])
    document = json.loads((tmp_path / "out" / "annotations.json").read_text(encoding="utf-8"))
    assert len(document["images"]) == 6
    names = {entry["id"]: entry["name"] for entry in document["categories"]}
    shown = {names[entry["category_id"]] for entry in document["annotations"]}
    assert shown == {"good", NASTY, "Scratch", "scratch"}
    assert [entry["name"] for entry in document["licenses"]] == [LICENCE]
    for image in document["images"]:
        shape = (image["height"], image["width"])
        union = np.zeros(shape, bool)
        own = [entry for entry in document["annotations"] if entry["image_id"] == image["id"]]
        assert len(own) == 2  # the ring and the pixel
        for entry in own:
            runs = entry["segmentation"]["counts"]
            flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
            instance = flat.reshape(shape, order="F")
            assert instance.sum() == entry["area"]
            x, y, width, height = entry["bbox"]
            assert instance[y : y + height, x : x + width].sum() == entry["area"]
            assert instance.any(axis=0).sum() == width
            union |= instance
        members = stored(space, 1)[image["file_name"].removesuffix(".png")]
        assert np.array_equal(union, stored_mask(members, shape))
        assert (tmp_path / "out" / "images" / image["file_name"]).is_file()


def filled(points, shape):
    """A normalised polygon as a mask, in the way ultralytics does it."""
    canvas = np.zeros(shape, np.uint8)
    cv2.fillPoly(canvas, [(points * (shape[1], shape[0])).astype(np.int32)], 1)
    return canvas > 0


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def test_yolo_polygons_cover_the_mask(space, tmp_path):
    counts = export.export(space, "yolo", tmp_path / "out")
    assert counts == {"anomalies": 12, "instances": 24, "features_left_out": 2}
    settings_ = yaml.safe_load((tmp_path / "out" / "data.yaml").read_text(encoding="utf-8"))
    sides = {}
    for side in ("train", "val"):
        labels = sorted((tmp_path / "out" / "labels" / side).glob("*.txt"))
        assert [p.stem for p in labels] == sorted(
            p.stem for p in (tmp_path / "out" / settings_[side]).glob("*.png")
        )
        for path in labels:
            with Pillow.open(tmp_path / "out" / settings_[side] / f"{path.stem}.png") as picture:
                shape = (picture.height, picture.width)
            union = np.zeros(shape, bool)
            for line in path.read_text().splitlines():
                number, *values = line.split()
                assert int(number) in settings_["names"]
                points = np.array(values, float).reshape(-1, 2)
                assert len(points) >= 3
                assert 0 < points.min() <= points.max() < 1
                union |= filled(points, shape)
            mask = stored_mask(stored(space, int(path.stem[:3]))[path.stem], shape)
            assert overlap(union, mask) > 0.97
            sides.setdefault(path.stem.split("-")[-1], set()).add(side)
    assert {"train", "val"} == set.union(*sides.values())
    assert all(len(found) == 1 for found in sides.values())  # one normal, one side (index fixes the normal)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), st.sampled_from([(48, 64), (33, 20)]))
def test_any_component_survives_run_lengths_and_polygon(seed, shape):
    rng = np.random.default_rng(seed)
    noise = cv2.GaussianBlur(rng.standard_normal(shape), (0, 0), 2.5)
    mask = noise > np.quantile(noise, 0.6)
    for part_ in export.components(mask):
        runs = export.run_lengths(part_)
        decoded = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(shape, order="F")
        assert np.array_equal(decoded, part_)
        assert overlap(filled(export.polygon(part_), shape), part_) > 0.9


def test_export_refuses_a_folder_in_use_and_leaves_nothing_half_done(space, tmp_path):
    used = tmp_path / "used"
    used.mkdir()
    (used / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match="holds something already"):
        export.export(space, "yolo", used)
    with pytest.raises(UsageError, match="choose one of mvtec, coco, yolo"):
        export.export(space, "voc", tmp_path / "new")
    before = set(tmp_path.iterdir())
    (tmp_path / "cloth1.png").write_bytes(b"another picture")
    with pytest.raises(PictureError, match=r"cloth1\.png: the file changed"):
        export.export(space, "mvtec", tmp_path / "new")
    assert set(tmp_path.iterdir()) == before


@given(st.lists(st.text(max_size=90), max_size=8))
def test_safe_names_are_distinct_and_cannot_leave_a_folder(words):
    names = export.safe_names(words)
    assert len({name.casefold() for name in names}) == len(words)
    assert all(re.fullmatch(r"[^\W_][\w.-]*|\w[\w.-]*", name) and len(name) < 70 for name in names)


# -- predictions ----------------------------------------------------------------------------------------


def brightness_detector():
    """Its map is the picture's brightness in [0, 1], its score the largest value."""

    def score(batch):
        maps = batch["features"].mean(dim=1) / 255
        return counted(maps, batch).amax(dim=(1, 2)), maps

    return SimpleNamespace(
        settings=SimpleNamespace(size=32, leak=None),
        categories=("bolt",),
        calibration={"threshold": 0.5},
        extract=lambda images: images.float(),
        score=score,
    )


def use_brightness(monkeypatch, notes=None, identity="one", seen=None, categories=("bolt",), ignores=True):
    """Predictions come from ``brightness_detector``; ``seen`` collects the pictures it is given."""
    facts = {"categories": list(categories), "calibration": {"threshold": 0.5}, "notes": notes or {}}
    facts["settings"] = {"size": 32}

    def score(images, category, ignore):
        watched = (image for image in images if seen is None or seen.append(image) is None)
        return score_pictures(brightness_detector(), watched, ignore=ignore)

    monkeypatch.setattr(
        predict, "open_detector", lambda path, device: Runtime(facts, identity, score, ignores)
    )


def test_predict_goes_on_after_unreadable_pictures(tmp_path, monkeypatch):
    use_brightness(monkeypatch)
    folder = tmp_path / "new" / "lower"
    folder.mkdir(parents=True)
    levels = dict(zip("abcdefghijklmnopqrstuvwxyz", range(0, 255, 10), strict=False))
    for name, level in levels.items():
        pixels = np.full((40, 24, 1), level, np.uint8)
        (folder / f"{name}.png").write_bytes(pictures.encode(pixels, "png"))
    (folder / "c.png").write_bytes(b"")
    (folder / "s.png").write_bytes((folder / "t.png").read_bytes()[:40])
    (folder / "notes.txt").write_text("not a picture")
    twin = tmp_path / "a.png"
    bright = np.full((9, 9, 3), 10, np.uint8)
    bright[:5] = 240
    twin.write_bytes(pictures.encode(bright, "png"))
    out = tmp_path / "found"
    rows = predict.predict(tmp_path / "checkpoint", [folder.parent, twin, tmp_path / "gone.png"], out)
    assert [row["path"] for row in rows] == [
        *(str(folder / f"{name}.png") for name in levels), str(twin), str(tmp_path / "gone.png"),
    ]  # fmt: skip
    failed = {row["path"]: row["error"] for row in rows if row["error"]}
    assert set(failed) == {str(folder / "c.png"), str(folder / "s.png"), str(tmp_path / "gone.png")}
    assert "0 bytes" in failed[str(folder / "c.png")]
    for row, level in zip(rows, levels.values(), strict=False):
        if not row["error"]:
            assert row["score"] == pytest.approx(level / 255, abs=1e-3)  # features may be half precision
            assert row["anomalous"] is (level > 127)
    good = [row for row in rows if not row["error"]]
    assert len({row["heat_map"].casefold() for row in good}) == len(good)  # two pictures are called "a"
    assert rows[3]["heat_map"] == str(out / "lower_d.png")
    scores = np.load(good[-1]["map"], allow_pickle=False)
    assert (scores.dtype, scores.shape) == (np.float32, (32, 32))
    with Pillow.open(good[-1]["heat_map"]) as heat:
        assert heat.size == (9, 9)
        drawn = np.array(heat)
    assert np.array_equal(drawn[8], bright[8])  # nothing is drawn far below the threshold
    with open(out / "scores.csv", encoding="utf-8", newline="") as file:
        listed = list(csv.DictReader(file))
    assert [float(row["score"] or -1) for row in listed] == [
        -1 if row["score"] is None else row["score"] for row in rows
    ]
    assert json.loads((out / "scores.json").read_text(encoding="utf-8"))["pictures"] == rows


def test_predict_goes_on_where_it_stopped_and_redoes_what_changed(tmp_path, monkeypatch):
    folder, out = tmp_path / "new", tmp_path / "found"
    folder.mkdir()
    levels = range(0, 240, 10)
    for number, level in enumerate(levels):
        picture = pictures.encode(np.full((12, 12, 1), level, np.uint8), "png")
        (folder / f"{number:02d}.png").write_bytes(picture)
    use_brightness(monkeypatch)
    encode = predict.encode

    def full(pixels, format):
        if pixels[0, 0, 0] >= 40:
            raise OSError(28, "No space left on device")
        return encode(pixels, format)

    monkeypatch.setattr(predict, "encode", full)
    with pytest.raises(OSError, match="No space"):
        predict.predict(tmp_path, [folder], out)
    monkeypatch.setattr(predict, "encode", encode)
    with open(out / "scores.csv", encoding="utf-8", newline="") as file:
        assert [float(row["score"]) for row in csv.DictReader(file)] == pytest.approx(
            [0, 10 / 255, 20 / 255, 30 / 255], abs=1e-3
        )
    with open(out / "scores.csv", "a", encoding="utf-8") as file:
        file.write(str(folder / "04.png") + ",0.1,0.5,Fal")  # killed while it wrote

    def scored_again(**changes):
        seen: list[np.ndarray] = []
        use_brightness(monkeypatch, seen=seen, **changes)
        rows = predict.predict(tmp_path, [folder], out)
        assert [row["score"] for row in rows] == pytest.approx([i / 255 for i in levels], abs=1e-3)
        return sorted(int(image[0, 0, 0]) for image in seen)

    assert scored_again() == list(levels)[4:]
    assert scored_again() == []
    table = (out / "scores.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(io.StringIO(table)))
    with open(out / "scores.csv", "w", encoding="utf-8", newline="") as file:  # as of a version without masks
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "ignored"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    assert scored_again() == []
    (out / "scores.csv").write_text(table.rstrip()[:-70], encoding="utf-8")  # killed in the last row
    assert scored_again() == [max(levels)]
    (out / "07.npy").unlink()
    changed = folder / "09.png"
    changed.write_bytes(pictures.encode(np.full((13, 13, 1), 90, np.uint8), "png"))
    assert scored_again() == [70, 90]
    assert scored_again(notes={"thresholds": {"bolt": 0.3}}) == list(levels)
    assert scored_again(notes={"thresholds": {"bolt": 0.3}}, identity="two") == list(levels)


def test_predict_keeps_the_rows_of_other_pictures_that_are_still_there(tmp_path, monkeypatch):
    use_brightness(monkeypatch)
    for number, name in enumerate(("one", "two")):
        (tmp_path / name).mkdir()
        for at in range(2):
            picture = pictures.encode(np.full((12, 12, 1), 40 * number + 9 * at, np.uint8), "png")
            (tmp_path / name / f"{name}{at}.png").write_bytes(picture)
    (tmp_path / "line").mkdir()
    (tmp_path / "line/camera").symlink_to(tmp_path / "two")
    out = tmp_path / "found"

    def listed():
        with open(out / "scores.csv", encoding="utf-8", newline="") as file:
            rows = [Path(row["path"]).name for row in csv.DictReader(file)]
        assert rows == [
            Path(row["path"]).name for row in json.loads((out / "scores.json").read_text())["pictures"]
        ]
        return rows

    assert len(predict.predict(tmp_path, [tmp_path / "one"], out)) == 2
    assert len(predict.predict(tmp_path, [tmp_path / "line"], out)) == 2, "a linked folder is looked through"
    assert listed() == ["two0.png", "two1.png", "one0.png", "one1.png"]
    (tmp_path / "one/one0.png").unlink()
    assert len(predict.predict(tmp_path, [tmp_path / "line"], out)) == 2
    assert listed() == ["two0.png", "two1.png", "one1.png"]
    use_brightness(monkeypatch, identity="two")
    assert len(predict.predict(tmp_path, [tmp_path / "line"], out)) == 2
    assert listed() == ["two0.png", "two1.png"], "what another detector found is not mixed in"


def test_predict_looks_only_where_it_is_told_to(tmp_path, monkeypatch, capsys):
    """A bright label at the left and a bright spot at the right: which of them counts is said by masks."""
    use_brightness(monkeypatch, notes={"places": True})
    new, rois = tmp_path / "new", tmp_path / "rois"
    new.mkdir(), rois.mkdir()
    right, left = np.zeros((2, 60, 80), bool)
    right[:, 40:], left[:, :40] = True, True
    for name, spot in (("good", False), ("bad", True)):
        picture = np.full((60, 80, 1), 120, np.uint8)  # nearly as bright as what raises an alarm
        picture[5:25, 5:25] = 250
        if spot:
            picture[30:50, 55:75] = 250
        (new / f"{name}.png").write_bytes(pictures.encode(picture, "png"))
        (rois / f"{name}.png").write_bytes(pictures.encode_mask(right))
    (tmp_path / "left.png").write_bytes(pictures.encode_mask(left))

    def verdicts(out, **places):
        rows = predict.predict(tmp_path, [new], tmp_path / out, **places)
        return {Path(row["path"]).stem: row["anomalous"] for row in rows}, rows

    found, unmasked = verdicts("found")
    assert found == {"bad": True, "good": True}
    assert "name the masks with --roi and --ignore" in " ".join(capsys.readouterr().err.split())
    for places in ({"roi": rois}, {"ignore": tmp_path / "left.png"}):
        found, rows = verdicts("found", **places)  # the rows of the call before do not stand
        assert found == {"bad": True, "good": False}
        assert "warning" not in capsys.readouterr().err
        for row, before in zip(rows, unmasked, strict=True):
            assert np.array_equal(np.load(row["map"]), np.load(before["map"]))
            drawn = np.asarray(Pillow.open(row["heat_map"]).convert("L")).astype(int)
            own = np.asarray(Pillow.open(row["path"]).convert("L")).astype(int)
            assert np.abs(drawn - own)[:, :38].max() <= 1
    assert verdicts("found", roi=rois, ignore=rois / "bad.png")[0] == {"bad": None, "good": None}
    (rois / "good.png").unlink()
    found, rows = verdicts("found", roi=rois)
    assert found == {"bad": True, "good": None}
    assert "good.png: the picture's mask of places is missing" in rows[1]["error"]
    found, _ = verdicts("found", ignore=tmp_path / "left.png")
    use_brightness(monkeypatch, notes={"places": False})
    assert verdicts("found", ignore=tmp_path / "left.png")[0] == found
    assert "in training all places counted" in " ".join(capsys.readouterr().err.split())
    rois.rename(new / "rois")  # masks among the pictures are none
    assert verdicts("found", roi=new / "rois")[0] == {"bad": True, "good": None}
    use_brightness(monkeypatch, ignores=False)
    with pytest.raises(UsageError, match="no input for places to ignore; export it again"):
        verdicts("other", ignore=tmp_path / "left.png")
    assert not (tmp_path / "other").exists()
    with pytest.raises(UsageError, match=r"--roi .*gone\.png: there is no such file"):
        verdicts("found", roi=tmp_path / "gone.png")


def test_predict_maps_16_bits_as_in_training_or_says_why_not(tmp_path, monkeypatch):
    use_brightness(monkeypatch)
    picture = tmp_path / "deep.png"
    picture.write_bytes(pictures.encode(np.full((16, 16, 1), 3000, np.uint16), "png"))
    (row,) = predict.predict(tmp_path, [picture], tmp_path / "out")
    assert "not trained on 16-bit pictures of one window" in row["error"]
    notes = {"window": [2000, 4000], "max_side": 8, "thresholds": {"bolt": 0.4}}
    use_brightness(monkeypatch, notes)
    (row,) = predict.predict(tmp_path, [picture], tmp_path / "out")
    assert row["score"] == pytest.approx(0.5, abs=0.01)
    assert (row["threshold"], row["anomalous"]) == (0.4, True)
    with pytest.raises(UsageError, match="--category nut: the detector was trained on bolt"):
        predict.predict(tmp_path, [picture], tmp_path / "out", category="nut")


def test_predict_says_that_a_category_was_not_named(tmp_path, monkeypatch, capsys):
    notes = {"thresholds": {"bolt": 0.3, "nut": 0.4}}
    use_brightness(monkeypatch, notes, categories=("bolt", "nut"))
    picture = tmp_path / "it.png"
    picture.write_bytes(pictures.encode(np.full((16, 16, 1), 90, np.uint8), "png"))
    for category, threshold in ((None, 0.5), ("nut", 0.4)):
        (row,) = predict.predict(tmp_path, [picture], tmp_path / "out", category=category)
        assert row["threshold"] == threshold
        assert ("--category NAME" in capsys.readouterr().err) is (category is None)


def test_predict_without_pictures_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no pictures in"):
        predict.predict(tmp_path, [tmp_path], tmp_path / "out")


def test_colours_do_not_depend_on_the_other_pictures():
    picture = np.full((16, 16, 1), 128, np.uint8)
    pale = predict.overlay(picture, np.full((8, 8), 0.01, np.float32), 0.5)
    strong = predict.overlay(picture, np.full((8, 8), 1.0, np.float32), 0.5)
    assert np.abs(pale.astype(int) - 128).max() <= 6
    assert np.abs(strong.astype(int) - 128).max() >= 60


# -- doctor ---------------------------------------------------------------------------------------------


def test_doctor_uses_every_part_and_never_raises(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = {check.name: check for check in doctor.checks()}
    for check in found.values():
        assert check.found
        assert "\n" not in check.found
        assert check.ok or check.remedy or check.name == "cuda"
    assert found["torch"].ok
    assert found["torch"].found.startswith(torch.__version__)
    assert found["hub"].ok is None
    assert "HF_HUB_OFFLINE" in found["hub"].found
    assert "perlin" in found["generators"].found
    assert all(check.ok is not False for check in found.values())


def test_doctor_tells_required_from_optional():
    def absent():
        import a_package_that_nobody_has  # noqa: F401

    def broken():
        raise OSError("undefined symbol: _ZN\nmore\nlines")

    required, optional = doctor._try("x", absent, "fix"), doctor._try("x", absent, "fix", optional=True)
    assert (required.ok, optional.ok) == (False, None)
    assert required.found == "a_package_that_nobody_has is not installed"
    assert doctor._try("x", broken, "fix").found == "OSError: undefined symbol: _ZN"
    assert doctor._try("x", lambda: "1.0", "fix") == doctor.Check("x", True, "1.0", "")


def test_doctor_calls_the_attention_operator_because_an_import_proves_nothing(monkeypatch):
    def fails(*_):
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\n  reasons")

    monkeypatch.setattr(doctor, "_installed", lambda name: True)
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.0.35")
    modules = {"xformers.ops": SimpleNamespace(memory_efficient_attention=fails)}
    monkeypatch.setattr(models, "import_module", modules.__getitem__)
    models.best_attention.cache_clear()
    check = doctor._try("xformers", doctor._xformers, "remedy", optional=True)
    assert check.ok is None
    models.best_attention.cache_clear()
    assert re.search(r"0\.0\.35; .*its operator fails on .*No operator found.*torch's own", check.found)


def test_predict_neither_replaces_nor_scores_what_it_should_not(tmp_path, monkeypatch):
    use_brightness(monkeypatch)
    new = tmp_path / "new"
    new.mkdir()
    for name in (b"a.png", b"teil_\xfc.png"):  # the second is no UTF-8
        with open(bytes(new) + b"/" + name, "wb") as file:
            file.write(pictures.encode(np.full((40, 50, 1), 90, np.uint8), "png"))
    before = (new / "a.png").read_bytes()
    with pytest.raises(UsageError, match="is a file; name a folder"):
        predict.predict(tmp_path, [new], new / "a.png")
    with pytest.raises(UsageError, match="heat maps would lie among the pictures"):
        predict.predict(tmp_path, [new], new)
    with pytest.raises(UsageError, match="would replace the picture"):
        predict.predict(tmp_path, [new / "a.png"], new)
    assert (new / "a.png").read_bytes() == before
    for _ in range(2):  # what the first call wrote is no picture of the second
        rows = predict.predict(tmp_path, [new], new / "found")
        assert [row["error"] for row in rows] == [None, None]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/scores.csv").write_bytes(b"path,score\n\xff,x\n")
    assert len(predict.predict(tmp_path, [new / "a.png"], tmp_path / "other")) == 1
