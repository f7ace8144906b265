"""A few hostile inputs for every target of ``make fuzz``, and the inputs that once came through."""

import io
import json
import random
import re
import tarfile
import tempfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from generation.cut.prompts import load_bank
from manifests import pictures
from manifests.errors import FlawsmithError, PictureError, UsageError
from manifests.layouts import list_source
from manifests.plain import from_json, from_yaml
from manifests.schema import SAMPLES, to_table
from manifests.shards import SHARD_KEY, ShardError, unpack
from manifests.sources import SourceSettings, scan
from manifests.verify import verify_round
from manifests.workspace import Workspace, WorkspaceError, part
from tests import fuzz
from tests.audit import explain
from tests.fuzz import Forbidden, Target, TooSlow, is_read, watched
from tests.fuzz_mutations import PNG, mutated, repaired
from tests.fuzz_targets import TARGETS, Canary, picture_seeds, tar_seeds
from training.loading import ShardFile, read_all_samples
from workflows.config import load_config
from workflows.finished import finished_record
from workflows.stages import stored_prompts

EXAMPLES = {"report": 1, "prompts": 10, "config": 10, "names": 15}


@pytest.mark.parametrize("name", fuzz.NAMES)
def test_hostile_inputs_are_read_or_refused_by_name(name, tmp_path):
    target = TARGETS[name]
    seeds = target.seeds()
    assert any(is_read(target, b"\n".join([seed] * target.at_once), tmp_path) for seed in seeds)

    @given(st.randoms(use_true_random=False))
    @settings(max_examples=EXAMPLES.get(name, 40), deadline=None, derandomize=True)
    def check(chance):
        data = b"\n".join(mutated(chance, seeds, target.words) for _ in range(target.at_once))
        is_read(target, data, tmp_path)

    check()


# -- the harness sees what it is to see -------------------------------------------------------------------


@pytest.mark.parametrize(
    "harm",
    [
        lambda: __import__("os").system("true"),
        lambda: __import__("subprocess").run(["true"], check=True),
        lambda: __import__("pickle").loads(__import__("pickle").dumps(Canary())),
        lambda: __import__("socket").create_connection(("127.0.0.1", 9)),
        lambda: Path(tempfile.gettempdir(), "flawsmith-escaped").write_text("x"),
        lambda: Path("/etc/hostname").read_text(),
    ],
)
def test_the_hook_stops_what_no_reader_may_do(harm, tmp_path):
    with pytest.raises(Forbidden), watched(tmp_path):
        harm()
    (tmp_path / "inside").write_text("x")


def test_other_errors_and_slow_readers_are_faults(tmp_path, monkeypatch):
    def broken(data, folder):
        raise KeyError(data)

    def endless(data, folder):
        while True:
            pass

    monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    for check, fault in ((broken, KeyError), (endless, TooSlow)):
        with pytest.raises(fault):
            is_read(Target(check, lambda: [b""], [b""]), b"x", tmp_path)


def test_mutations_follow_from_the_seed_and_right_checksums_get_damage_past_them():
    first, again = (
        [mutated(random.Random(seed), picture_seeds(), [b"IHDR"]) for seed in range(50)] for _ in "ab"
    )
    assert first == again and len(set(first)) > 45
    png = bytearray(next(seed for seed in picture_seeds() if seed.startswith(PNG)))
    png[20] ^= 1  # of the width
    with pytest.raises(PictureError):
        pictures.decode(bytes(png), name="x")
    assert repaired(bytes(png))[29:33] != bytes(png)[29:33]
    own = tar_seeds()[0]
    changed = bytearray(own)
    changed[0] ^= 1
    with pytest.raises(ShardError):
        list(unpack(bytes(changed), "x"))
    assert next(key for key, _ in unpack(repaired(bytes(changed)), "x")) == "`"


# -- what once came through -------------------------------------------------------------------------------

BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))


@pytest.mark.parametrize(
    "text",
    ["[" * 1000, "source: 2001-13-45", "source: !!timestamp x", "source: !!int _", BOMB + "source: *a11",
     "source: &a [*a]", "source: " + "9" * 5000],
)  # fmt: skip
def test_yaml_that_its_parser_or_a_reader_would_choke_on(text, tmp_path):
    with pytest.raises(ValueError, match=r"\w"):
        from_yaml(text)
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match="YAML"):
        load_config(path)
    with pytest.raises(UsageError, match="YAML"):
        load_bank(path)
    space = Workspace(str(tmp_path))
    with pytest.raises(WorkspaceError, match="damaged"):
        space.read_yaml("x.yaml")


def test_no_key_is_taken_twice_and_what_is_merged_in_may_be_overridden():
    with pytest.raises(ValueError, match="'a' twice"):
        from_yaml("x: 1\ny: {a: 1, b: 2, a: 3}\n")
    # y is merged into z before it is made itself
    merged = "b: &b {k: 1, l: 2}\nx: {y: &y {<<: *b, k: 3}}\nz: {<<: *y, l: 4}\n"
    assert from_yaml(merged) == yaml.safe_load(merged)
    assert from_yaml(merged)["x"]["y"] == {"k": 3, "l": 2}


def test_brackets_nest_to_a_bound():
    """The parser takes seconds for a line of open brackets, long before its stack is full."""
    assert from_yaml("[" * 100 + "]" * 100 + "\n")
    with pytest.raises(ValueError, match="nested too deeply"):
        from_yaml("[" * 101 + "]" * 101 + "\n")


def test_tags_make_no_objects():
    for text in ("!!python/object/apply:os.system [x]", "!!python/name:os.system", "!!python/module:os"):
        with pytest.raises(ValueError, match="python"):
            from_yaml(text)
    with pytest.raises(ValueError, match="deeply"):
        from_json("[" * 100_000)


def stored(tmp_path, table):
    space = Workspace(str(tmp_path))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    space.write_bytes(part("samples", 0, 0, "parquet"), sink.getvalue())
    return space


def test_a_table_without_its_columns_or_with_other_types_is_damaged(tmp_path):
    empty = to_table([], SAMPLES)
    for table in (
        empty.drop_columns(["seed"]),
        pa.Table.from_arrays([*empty.columns, empty["seed"]], [*empty.column_names, "seed"]),
        pa.table({**{name: [] for name in empty.column_names}, "seed": pa.array([], pa.list_(pa.int8()))}),
        pa.table({"sample_id": pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"),
                                                                       pa.py_buffer(b"\xff")])}),
    ):  # fmt: skip
        space = stored(tmp_path, table)
        with pytest.raises(WorkspaceError, match="damaged"):
            space.read_table(part("samples", 0, 0, "parquet"))
    more = empty.append_column("mine", pa.array([], pa.int8()))
    assert stored(tmp_path, more).read_table(part("samples", 0, 0, "parquet")).column_names[-1] == "mine"


RECORD = {
    "round": 0, "shard": 0, "path": part("shards", 0, 0, "tar"), "sha256": "0", "bytes": 1, "accepted": 0,
    "rejected": 0, "failed": 0, "fingerprint": "{}", "seconds": 1.0, "host": "h", "lossy": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "record",
    [{**RECORD, "path": "../../etc/passwd"}, {**RECORD, "path": 3}, {**RECORD, "bytes": "x"}, {}, [], 7,
     {key: value for key, value in RECORD.items() if key != "host"}],
)  # fmt: skip
def test_a_record_of_something_else_is_no_record(record, tmp_path):
    good = to_table([], SAMPLES).replace_schema_metadata({SHARD_KEY: json.dumps(RECORD)})
    written = stored(tmp_path, good)
    written.write_bytes(RECORD["path"], b"x")
    found = finished_record(written, 0, 0)
    assert found is not None and {key: found[key] for key in RECORD} == RECORD
    space = stored(tmp_path, good.replace_schema_metadata({SHARD_KEY: json.dumps(record)}))
    space.write_bytes(RECORD["path"], b"x")
    assert finished_record(space, 0, 0) is None
    assert "damaged" in verify_round(space, 0, 1)[0].what


def shard(name="a.json", data=b"{}", **changes):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        for field, value in changes.items():
            setattr(info, field, value)
        tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def sparse():
    """A member of no bytes that claims a tebibyte."""
    block = bytearray(shard("a.json", b"")[:512])
    block[156:157] = tarfile.GNUTYPE_SPARSE
    block[483:495] = b"%011o\0" % (2**33 - 1)
    return repaired(bytes(block)) + bytes(10240 - 512)


def negative():
    block = bytearray(shard("a.json", b"")[:512])
    block[124:136] = b"\xff" * 10 + b"\xfe\x00"
    return repaired(bytes(block) + bytes(10240 - 512))


@pytest.mark.parametrize(
    "data",
    [sparse(), negative(), tar_seeds()[4], shard(data=b"[1"), shard(data=b"3"), shard(data=b"[" * 9999)],
)
def test_shards_that_claim_more_than_they_hold_or_hold_no_record(data, tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(ShardError), watched(tmp_path):
        list(read_all_samples([ShardFile(str(path), 1)]))
    with watched(tmp_path):
        assert list_source(str(path), "webdataset", None, None).found == []
        with suppress(ShardError):
            list(unpack(data, "x"))


def test_pickles_in_a_shard_are_never_loaded(tmp_path):
    path = tmp_path / "x.tar"
    path.write_bytes(tar_seeds()[1])
    with watched(tmp_path):
        assert "pth" in dict(next(iter(unpack(path.read_bytes(), "x")))[1])
        with pytest.raises(ShardError, match="feature"):
            list(read_all_samples([ShardFile(str(path), 2)]))


def test_stored_prompts_with_slots_that_nothing_fills_are_damaged(tmp_path):
    entry = {"defect": "a", "prompts": ["b"], "details": ["c{0}"]}
    stored = {"cut": {"entries": [entry], "nouns": {}, "params": {}}}
    space = Workspace(str(tmp_path))
    space.write_bytes("rounds/000/prompts.json", json.dumps(stored).encode())
    with pytest.raises(WorkspaceError, match=r"prompts\.json is damaged"):
        stored_prompts(space, 0)


@pytest.mark.parametrize(
    "url",
    ["pipe:touch x", "pipe://touch x", "dask://x", "reference://x", "git://x", "simplecache::file:///etc/passwd",
     "zip://x::file:///y", "libarchive://x", "nosuch://x"],
)  # fmt: skip
def test_only_protocols_that_merely_read_are_opened(url, tmp_path):
    with pytest.raises(PictureError), watched(tmp_path):
        pictures.read_bytes(url)
    with pytest.raises((ValueError, OSError)), watched(tmp_path):
        pictures.open_file(url)


def test_a_list_of_impossible_names(tmp_path):
    path = tmp_path / "list.jsonl"
    path.write_text('{"path": "%s.png"}\n{"path": "\\ud800.png"}\n{"path": "a\\u0000.png"}\n' % ("a" * 300))
    listing = list_source(str(path), "list", None, None)
    assert [problem.what[:8] for problem in listing.problems] == ["its name"]
    for found in listing.found:
        with pytest.raises(PictureError):
            pictures.read_bytes(found.path)


def test_a_file_whose_name_is_no_text_is_left_out_by_name(tmp_path):
    good = tmp_path / "train" / "good"
    good.mkdir(parents=True)
    for index, name in enumerate((b"a.png", b"b\xff.png", b"note\xfe.t\xfdt")):
        pixels = np.full((8, 8, 3), index, np.uint8)
        with open(bytes(good) + b"/" + name, "wb") as file:
            file.write(pictures.encode(pixels, "png"))
    found = scan([SourceSettings(path=str(tmp_path))])
    assert [Path(image.path).name for image in found.images] == ["a.png"]
    problem = next(problem for problem in found.problems if problem.level == "error")
    assert problem.path.endswith("b\\udcff.png") and "UTF-8" in problem.what
    assert all(f"{one.path}{one.what}".encode() for one in found.problems)


def test_a_huge_limit_sets_nothing_aside(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert pictures.read_bytes(str(path), limit=2**60) == b"abc"
    with pytest.raises(PictureError, match="more than 2 bytes"):
        pictures.read_bytes(str(path), limit=2)
    assert issubclass(PictureError, FlawsmithError)


FLAW = {"id": "PYSEC-1", "fix_versions": ["9.1"]}


@pytest.mark.parametrize(
    ("packages", "stderr", "code", "said"),
    [
        ([{"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "?"}], "", 0, "1 of 2 "),
        ([{"name": "pillow", "version": "9", "vulns": [FLAW]}], "", 1, "pillow 9: PYSEC-1, mended in 9.1"),
        ([{"name": "a", "skip_reason": "not found"}], "", 2, "nothing was checked"),
        (None, "ConnectionError: no route", 2, "no route.*nothing was checked"),
        (None, "python: No module named pip_audit", 2, r"flawsmith\[audit\].*nothing was checked"),
    ],
)
def test_an_audit_that_could_not_be_made_is_no_clean_bill(packages, stderr, code, said):
    found, text = explain("" if packages is None else json.dumps({"dependencies": packages}), stderr)
    assert found == code
    assert re.search(said, text)
