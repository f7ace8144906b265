"""Sources: what each layout finds, what is refused and how it is said, how pictures are divided."""

import csv
import io
import itertools
import json
import os
import random
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from manifests import pictures
from manifests.errors import PictureError, UsageError
from manifests.schema import IMAGES, Image, to_table
from manifests.sources import SourceSettings, assign_splits, scan, scan_textures

COUNTER = itertools.count()
FINAL = ["test", "calibration", "train", "feedback", "test", "train"]


def fresh(size=(16, 16), dtype=np.uint8):
    """A PNG that no other picture of the tests equals."""
    levels = np.random.default_rng(next(COUNTER)).integers(0, 256, (*size, 1))
    return pictures.encode(levels.astype(dtype), "png")


def mask(size=(16, 16), filled=True):
    levels = np.zeros(size, np.uint8)
    levels[3:6, 3:6] = filled
    return pictures.encode_mask(levels)


def put(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)


def mvtec(root: Path, normals=5, judged=4, defects=4, suffix="_mask"):
    for number in range(normals):
        put(root / f"train/good/{number:03}.png", fresh())
    for number in range(judged):
        put(root / f"test/good/{number:03}.png", fresh())
    for number in range(defects):
        put(root / f"test/crack/{number:03}.png", fresh())
        put(root / f"ground_truth/crack/{number:03}{suffix}.png", mask())
    return root


def read(path, **options):
    return scan([SourceSettings(path=str(path), **options)])


def said(result, level="error"):
    return [(Path(p.path.partition("::")[0]).name, p.what) for p in result.problems if p.level == level]


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("suffix", ["_mask", ""])
def test_mvtec_categories_at_any_depth(tmp_path, suffix):
    mvtec(tmp_path / "a/bolt", suffix=suffix)
    mvtec(tmp_path / "b/bolt", suffix=suffix)
    mvtec(tmp_path / "nut", suffix=suffix)
    put(tmp_path / "nut/README.txt", b"notes")
    result = read(tmp_path)
    assert not result.problems
    assert not result.fatal
    counts = Counter((image.category, image.defect, image.mask_path is not None) for image in result.images)
    for category in ("a_bolt", "b_bolt", "nut"):
        assert counts[category, "good", False] == 9
        assert counts[category, "crack", True] == 4
    assert to_table(result.images, IMAGES).num_rows == 39
    one = read(tmp_path / "nut")
    assert {image.category for image in one.images} == {"nut"}
    assert {image.category for image in read(tmp_path / "nut", category="M6").images} == {"M6"}


def test_every_problem_is_listed_at_once_with_its_file(tmp_path):
    root = mvtec(tmp_path / "bolt", defects=3)
    cut = put(root / "train/good/900.png", fresh((64, 64))[:900])
    put(root / "train/good/901.png", b"")
    put(root / "train/good/902.png", (root / "train/good/000.png").read_bytes())
    put(root / "train/good/note.txt", b"x")
    put(root / "test/crack/910.png", fresh())
    put(root / "ground_truth/crack/910_mask.png", mask((8, 16)))
    put(root / "test/crack/911.png", fresh())
    put(root / "ground_truth/crack/911_mask.png", mask(filled=False))
    put(root / "test/crack/912.png", fresh())
    put(root / "ground_truth/crack/999_mask.png", mask())
    result = read(root)
    assert not result.fatal
    errors = dict(said(result))
    assert set(errors) == {"900.png", "901.png", "910_mask.png", "911_mask.png", "999_mask.png"}
    assert "damaged" in errors["900.png"]
    assert "0 bytes" in errors["901.png"]
    assert "16×8" in errors["910_mask.png"]
    assert "empty" in errors["911_mask.png"]
    assert "without picture" in errors["999_mask.png"]
    warnings = dict(said(result, "warning"))
    assert "same picture" in warnings["902.png"]
    assert "without mask" in warnings["912.png"]
    assert "1 × .txt" in warnings["bolt"]
    assert all(problem.remedy for problem in result.problems)
    names = {Path(image.path).name for image in result.images}
    assert not names & {"900.png", "901.png", "902.png", "910.png", "911.png"}
    assert cut not in {image.path for image in result.images}


def test_what_stops_a_run(tmp_path):
    leak = mvtec(tmp_path / "leak")
    levels = pictures.decode(fresh(), name="x").pixels
    put(leak / "train/good/a.png", pictures.encode(levels, "png"))
    put(leak / "test/good/b.bmp", pictures.encode(levels, "png"))  # another name, the same content
    result = read(leak)
    assert result.fatal
    assert any("in train and" in what for _, what in said(result))

    assert read(tmp_path / "nowhere").fatal
    (tmp_path / "empty").mkdir()
    empty = read(tmp_path / "empty")
    assert empty.fatal
    assert "looking for" in empty.problems[0].what
    assert scan([]).fatal

    unusable = tmp_path / "unusable"
    put(unusable / "x.png", b"")
    assert read(unusable).fatal

    judged_only = mvtec(tmp_path / "two/judged", normals=0)
    (judged_only / "train/good").mkdir(parents=True)
    mvtec(tmp_path / "two/fine")
    result = read(tmp_path / "two")
    assert not result.fatal
    assert {image.category for image in result.images} == {"fine"}
    assert ("judged", "the category has 8 test pictures but no usable normal picture to train on") in said(
        result
    )

    put(tmp_path / "single/x.png", fresh())
    single = read(tmp_path / "single")
    assert not single.fatal
    assert "only one normal" in single.problems[0].what


def test_contradicting_labels_leave_the_picture_out(tmp_path):
    root = mvtec(tmp_path / "bolt")
    put(root / "test/crack/700.png", (root / "test/good/000.png").read_bytes())
    result = read(root)
    assert any("crack and good" in what for _, what in said(result))
    assert sum(image.split in ("feedback", "test") for image in result.images) == 7


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_list_columns_are_carried_through(tmp_path, kind):
    rows = [
        {"path": f"p/{n}.png", "category": "bolt", "group": f"g{n // 2}", "licence": "CC0"} for n in range(6)
    ]
    rows[5] |= {
        "defect": "dent",
        "mask_path": "p/m.png",
        "split": "test",
        "mm_per_pixel": "0.05",
        "licence": "",
    }
    columns = ("path", "category", "group", "licence", "defect", "mask_path", "split", "mm_per_pixel")
    rows = [{name: row.get(name, "") for name in columns} for row in rows]
    for row in rows:
        put(tmp_path / row["path"], fresh())
    put(tmp_path / "p/m.png", mask())
    path = tmp_path / f"list.{kind}"
    if kind == "csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    result = read(path, licence="house")
    assert not said(result)
    dent = next(image for image in result.images if image.defect == "dent")
    assert (dent.group, dent.licence, dent.mm_per_pixel) == ("g2", "house", 0.05)
    assert dent.mask_path == str(tmp_path / "p/m.png")
    assert {image.licence for image in result.images if image is not dent} == {"CC0"}
    by_group = Counter((image.group, image.split) for image in result.images if image is not dent)
    assert len({group for group, _ in by_group}) == len(by_group), "a group fell apart"
    assert any("group g2 is in train and in test" in what for _, what in said(result, "warning"))


def test_list_faults_name_row_and_column(tmp_path):
    path = tmp_path / "list.csv"
    path.write_text("file,split\na.png,train\n")
    result = read(path)
    assert result.fatal
    assert "no column path; it has file, split" in result.problems[0].what

    put(tmp_path / "a.png", fresh())
    path.write_text("path,split,defect\na.png,train,\nb.png,valid,\nc.png,train,dent\nd.png,train,\n")
    result = read(path)
    texts = " / ".join(what for _, what in said(result))
    assert "row 2: split is 'valid'" in texts
    assert "row 3: a picture with defect 'dent' is in split train" in texts
    assert "no such file" in texts
    assert len(result.images) == 1
    assert "no column part" in read(path, group="part").problems[0].what

    path.write_text("path,split\n" + "".join(f"{n}.png,{s}\n" for n, s in enumerate(FINAL)))
    for number in range(len(FINAL)):
        put(tmp_path / f"{number}.png", fresh())
    by_name = {Path(image.path).stem: image.split for image in read(path).images}
    assert by_name == {str(number): split for number, split in enumerate(FINAL)}


def test_webdataset_samples_are_read_inside_the_tar(tmp_path):
    good = {f"good/{n}.png": fresh() for n in range(4)}
    bad = {
        "x/7.image.png": fresh(),
        "x/7.mask.png": mask(),
        "x/7.json": b'{"defect": "dent", "category": "bolt"}',
    }
    extra = {"x/8.jpg": fresh(), "x/8.json": b'{"category": "bolt"}'}
    tar(tmp_path / "bolt-000.tar", good)
    tar(tmp_path / "bolt-001.tar", bad | extra)
    for path in (tmp_path / "bolt-{000..001}.tar", tmp_path):
        result = read(path, category="bolt")
        assert not said(result)
        assert len(result.images) == 6
        dent = next(image for image in result.images if image.defect == "dent")
        assert dent.path == f"tar://x/7.image.png::{tmp_path}/bolt-001.tar"
        assert pictures.load(dent).shape == (16, 16, 1)
        assert pictures.load_mask(dent).sum() == 9
    assert {image.category for image in read(tmp_path / "bolt-000.tar").images} == {"bolt"}


def test_hostile_and_damaged_tars_are_named(tmp_path):
    for name in ("/etc/a.png", "../a.png", "x/../../a.png"):
        result = read(tar(tmp_path / "x.tar", {name: fresh(), "ok.png": fresh()}))
        assert [what for _, what in said(result)] == [f"member {name!r} is refused"]
        assert len(result.images) == 1
    path = tar(tmp_path / "x.tar", {f"{n}.png": fresh((64, 64)) for n in range(8)})
    data = path.read_bytes()
    with tarfile.open(path) as archive:
        headers = [member.offset for member in archive]
    for end in (headers[5], headers[5] + 700, headers[5] + 100, headers[0] + 5):
        path.write_bytes(data[:end])
        result = read(path)
        assert result.fatal
        assert any("damaged or cut short" in what for _, what in said(result)), end
    path.write_bytes(data[: headers[4]] + b"\xff" * 512 + data[headers[4] + 512 :])
    assert any("damaged" in what for _, what in said(read(path)))


def test_groups_from_the_path_and_masks_of_places(tmp_path):
    for part, view in itertools.product("abcdefgh", "12"):
        put(tmp_path / f"bolt/part-{part}_{view}.png", fresh())
    roi = put(tmp_path / "roi.png", mask((32, 32)))
    result = read(tmp_path / "bolt", group=r"part-(.)", roi=roi, mm_per_pixel=0.1)
    assert {image.group for image in result.images} == set("abcdefgh")
    assert len({(image.group, image.split) for image in result.images}) == 8
    assert {(image.roi_path, image.mm_per_pixel) for image in result.images} == {(roi, 0.1)}
    assert len(said(read(tmp_path / "bolt", group="camera"), "warning")) == 16
    with pytest.raises(ValidationError, match="regular expression"):
        SourceSettings(path="x", group="(")

    put(tmp_path / "places/part-a_1.png", mask())
    own = read(tmp_path / "bolt", ignore=str(tmp_path / "places"))
    assert [Path(image.path).stem for image in own.images] == ["part-a_1"]
    assert read(tmp_path / "bolt", roi=str(tmp_path / "gone.png")).fatal
    nothing = put(tmp_path / "nothing.png", mask(filled=False))
    assert all("no place" in what for _, what in said(read(tmp_path / "bolt", roi=nothing))[:16])


def test_a_named_pipe_is_no_picture(tmp_path):
    """Reading it would wait for ever."""
    for number in range(3):
        put(tmp_path / f"bolt/{number}.png", fresh())
    os.mkfifo(tmp_path / "bolt/pipe.png")
    assert sorted(Path(image.path).name for image in read(tmp_path / "bolt").images) == [
        "0.png", "1.png", "2.png",
    ]  # fmt: skip


def test_one_window_a_source_from_train_normals_only(tmp_path):
    def deep(path, low, high):
        levels = np.random.default_rng(next(COUNTER)).integers(low + 1, high, (16, 16, 1)).astype(np.uint16)
        levels[0, :2, 0] = low, high
        put(path, pictures.encode(levels, "png"))

    for number in range(5):
        deep(tmp_path / f"bolt/train/good/{number}.png", 1000, 3000)
    deep(tmp_path / "bolt/test/good/0.png", 500, 60000)
    deep(tmp_path / "bolt/test/dent/0.png", 100, 65000)
    result = read(tmp_path / "bolt")
    assert {image.window for image in result.images} == {(1000, 3000)}
    assert {image.window for image in read(tmp_path / "bolt", window=(0, 4095)).images} == {(0, 4095)}
    deep(tmp_path / "bolt/train/good/9.png", 900, 9000)
    later = scan([SourceSettings(path=str(tmp_path / "bolt"))], result.images)
    assert {image.window for image in later.images} == {(1000, 3000)}, "an earlier window changed"


def test_scan_does_not_depend_on_names_order_or_threads(tmp_path):
    mvtec(tmp_path / "bolt", normals=9)
    sources = [SourceSettings(path=str(tmp_path))]
    seen = []
    first = scan(sources, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n, 17) for n in range(1, 18)]
    assert scan(sources) == first
    for number, path in enumerate(sorted((tmp_path / "bolt/train/good").iterdir(), reverse=True)):
        path.rename(path.with_name(f"renamed-{number}.png"))
    renamed = {image.image_id: image.split for image in scan(sources).images}
    assert renamed == {image.image_id: image.split for image in first.images}


def test_textures(tmp_path):
    put(tmp_path / "t/a.png", fresh())
    put(tmp_path / "t/deep/b.png", fresh())
    textures = scan_textures(str(tmp_path / "t"))
    assert [(image.category, image.split, image.defect) for image in textures] == [
        ("texture", "train", "good")
    ] * 2
    put(tmp_path / "t/c.png", b"")
    with pytest.raises(PictureError, match=r"c\.png: the file has 0 bytes"):
        scan_textures(str(tmp_path / "t"))
    with pytest.raises(UsageError, match="no such"):
        scan_textures(str(tmp_path / "missing"))


def picture(number, category, defect, split, group):
    return Image(f"id{number}", f"{number}.png", "", category, defect, None, 16, 16, "L", 8, group, split)


ROWS = st.lists(
    st.tuples(st.sampled_from("AB"), st.sampled_from(["good", "dent", "hole"]), st.integers(0, 25)),
    max_size=80,
)


def make(rows):
    """Normals of even groups are on the train side, everything else is judged."""
    return [
        picture(n, c, d, "train" if d == "good" and g % 2 == 0 else "test", f"{c}{g}")
        for n, (c, d, g) in enumerate(rows)
    ]


def dealt(images, sides):
    """(category, side) -> split -> groups, written anew as the oracle."""
    groups = {}
    for image, side in zip(images, sides, strict=True):
        groups.setdefault((image.category, side, image.group), set()).add(image.split)
    result = {}
    for (category, side, group), splits in groups.items():
        assert len(splits) == 1, f"group {group} fell apart"
        result.setdefault((category, side), Counter())[splits.pop()] += 1
    return result


@given(rows=ROWS, order=st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_splits_are_fair_atomic_and_independent_of_order(rows, order: random.Random):
    images = make(rows)
    placed = assign_splits(images)
    for (_, side), counts in dealt(placed, [image.split for image in images]).items():
        total = counts.total()
        if side == "test":
            assert set(counts) <= {"feedback", "test"}
            assert abs(counts["feedback"] - counts["test"]) <= 1
        else:
            assert set(counts) <= {"train", "calibration"}
            assert abs(counts["calibration"] - 0.2 * total) < 1
    shuffled = images[:]
    order.shuffle(shuffled)
    assert {i.image_id: i.split for i in assign_splits(shuffled)} == {i.image_id: i.split for i in placed}


@given(rows=ROWS, at=st.integers(0, 79), defect=st.sampled_from(["good", "dent", "other"]))
@settings(max_examples=100, deadline=None)
def test_relabelling_a_judged_picture_moves_nothing(rows, at, defect):
    images = make(rows)
    placed = assign_splits(images)
    if at < len(images) and images[at].split == "test":
        images[at] = replace(images[at], defect=defect)
    assert [image.split for image in assign_splits(images)] == [image.split for image in placed]


def test_a_picture_that_steered_never_becomes_a_test_picture():
    images = [picture(n, "A", "dent", "test", f"g{n}") for n in range(30)]
    earlier = assign_splits(images)
    regrouped = [replace(image, group=f"part{n // 3}") for n, image in enumerate(images)]
    later = {image.image_id: image.split for image in assign_splits(regrouped, earlier)}
    assert all(later[i.image_id] == "feedback" for i in earlier if i.split == "feedback")


@given(rows=ROWS, keep=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_earlier_groups_keep_their_split(rows, keep):
    images = make(rows)
    earlier = assign_splits(images[: int(keep * len(images))])
    later = assign_splits(images, earlier)
    assert later[: len(earlier)] == earlier
    dealt(later, [image.split for image in images])


def test_many_defect_types_of_one_picture_fill_both_halves():
    images = [picture(n, "A", f"type{n}", "test", f"g{n}") for n in range(10)]
    assert Counter(image.split for image in assign_splits(images)) == {"feedback": 5, "test": 5}
    fixed = [replace(images[0], split="test"), *images[1:]]
    assert assign_splits(fixed, final=frozenset({"id0"}))[0].split == "test"


def shots_of(path, shots, seed, category="bolt"):
    found = scan([SourceSettings(path=str(path))], shots=shots, seed=seed)
    assert not found.fatal
    sides = [image for image in found.images if image.category == category and image.split == "train"]
    return {Path(image.path).name for image in sides}


def test_shots_are_nested_and_each_categorys_own(tmp_path):
    mvtec(tmp_path / "s/bolt", normals=12)
    one, two, all_of = (shots_of(tmp_path / "s", shots, seed=3) for shots in (1, 2, 12))
    assert len(one) == 1 and len(two) == 2 and one < two < all_of == {f"{n:03}.png" for n in range(12)}
    assert shots_of(tmp_path / "s", 2, seed=3) == two
    assert len({frozenset(shots_of(tmp_path / "s", 2, seed)) for seed in range(6)}) > 1
    before = {seed: shots_of(tmp_path / "s", 2, seed) for seed in range(4)}
    mvtec(tmp_path / "s/anchor", normals=7)
    assert {seed: shots_of(tmp_path / "s", 2, seed) for seed in range(4)} == before
    other = [shots_of(tmp_path / "s", 2, seed, "anchor") for seed in range(4)]
    assert other != list(before.values()), "categories must not all choose the same places"


def test_pictures_that_are_no_shots_are_never_opened_and_judged_ones_stay(tmp_path, monkeypatch):
    """Whatever they show, even nothing at all: no read, no problem, no calibration, no change of split."""
    mvtec(tmp_path / "bolt", normals=10, judged=6, defects=6)
    everything = scan([SourceSettings(path=str(tmp_path / "bolt"))])
    shots = shots_of(tmp_path / "bolt", 2, seed=0)
    for path in (tmp_path / "bolt/train/good").iterdir():
        if path.name not in shots:
            path.write_bytes(b"no picture")
    opened = []
    read_bytes = pictures.read_bytes
    monkeypatch.setattr(pictures, "read_bytes", lambda path: opened.append(path) or read_bytes(path))
    found = scan([SourceSettings(path=str(tmp_path / "bolt"))], everything.images, shots=2, seed=0)
    normals = [i for i in found.images if i.split in ("train", "calibration")]
    assert [i.split for i in normals] == ["train"] * 2 and {Path(i.path).name for i in normals} == shots
    assert {Path(path).name for path in opened if "/train/" in path} == shots
    assert not found.problems and not found.fatal

    def judged(result):
        return [(i.path, i.split) for i in result.images if i.split in ("feedback", "test")]

    assert judged(found) == judged(everything)


def test_a_category_with_fewer_normals_than_shots_is_named(tmp_path):
    mvtec(tmp_path / "s/bolt", normals=3)
    mvtec(tmp_path / "s/anchor", normals=6)
    found = scan([SourceSettings(path=str(tmp_path / "s"))], shots=4)
    assert found.fatal
    assert said(found) == [("bolt", "the category has 3 usable normal pictures for 4 shots")]
    (shot,) = shots_of(tmp_path / "s", 1, seed=0, category="anchor")
    (tmp_path / "s/anchor/train/good" / shot).write_bytes(b"")
    found = scan([SourceSettings(path=str(tmp_path / "s"))], shots=1)
    assert found.fatal, "a damaged shot is not made up for, nor is its category left out"
    assert ("anchor", "the category has 0 usable normal pictures for 1 shots") in said(found)


def test_calibration_pictures_of_a_list_are_shots_or_nothing(tmp_path):
    rows = ["path,category,defect,split"]
    for number, split in enumerate(["train", "calibration"] * 4 + ["test", "feedback"]):
        put(tmp_path / f"{number}.png", fresh())
        rows.append(f"{number}.png,bolt,good,{split}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    for seed in range(3):
        found = scan([SourceSettings(path=str(tmp_path / "list.csv"))], shots=3, seed=seed)
        assert Counter(image.split for image in found.images) == {"train": 3, "test": 1, "feedback": 1}


def test_the_good_pictures_alone_of_a_category_are_a_flat_folder(tmp_path):
    for name in ("train/good/a.png", "train/good/b.png", "test/dent/c.png"):
        file = tmp_path / "bolt" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(len(list(tmp_path.rglob("*")))).integers(0, 256, (16, 16, 1), np.uint8)
        file.write_bytes(pictures.encode(pixels, "png"))
    found = scan([SourceSettings(path=str(tmp_path / "bolt" / "train" / "good"))])
    assert [(image.category, image.defect) for image in found.images] == [("bolt", "good")] * 2


def test_names_that_tables_use_for_what_is_over_all_are_refused(tmp_path):
    mvtec(tmp_path / "mean")
    mvtec(tmp_path / "nut")
    for folder in ("test", "ground_truth"):
        (tmp_path / "nut" / folder / "crack").rename(tmp_path / "nut" / folder / "all")
    found = read(tmp_path)
    assert {(i.category, i.defect) for i in found.images} == {("nut", "good")}
    errors = [problem for problem in found.problems if problem.level == "error"]
    assert any("'mean': no name for a category" in problem.what for problem in errors)
    assert any("'all': no name for a defect" in problem.what for problem in errors)


@pytest.mark.parametrize(
    "folders", ["Train/Good Test/NG ground_truth/NG", "train/ok test/ng", "Ground_Truth/x ok"]
)
def test_what_is_nearly_mvtec_does_not_pass_for_good_parts(tmp_path, folders):
    for folder in folders.split():
        put(tmp_path / folder / "0.png", fresh())
    found = read(tmp_path)
    assert found.fatal and not found.images
    assert "no train/good" in found.problems[0].what and "layout: folder" in found.problems[0].remedy
    assert len(read(tmp_path, layout="folder").images) == len(folders.split())


def test_one_picture_for_a_source_says_what_to_name(tmp_path):
    found = read(put(tmp_path / "a.png", fresh()))
    assert found.fatal and "name its folder" in found.problems[0].remedy
