import os
import subprocess
import sys

import pyarrow as pa
import pytest

from manifests.workspace import Workspace, WorkspaceError


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    space = Workspace(str(tmp_path))
    space.write_bytes("rounds/000/a.txt", b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space.*rounds/000/a\.txt"):
        space.write_bytes("rounds/000/a.txt", b"new")
    assert space.read_bytes("rounds/000/a.txt") == b"old"
    assert os.listdir(tmp_path / "rounds/000") == ["a.txt"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "rounds/../../x"])
def test_paths_stay_inside(tmp_path, name):
    with pytest.raises(WorkspaceError, match="inside"):
        Workspace(str(tmp_path)).write_bytes(name, b"")


def test_one_writer_and_a_dead_one_leaves_no_lock(tmp_path):
    space = Workspace(str(tmp_path))
    code = (
        "import sys, time; from manifests.workspace import Workspace\n"
        f"with Workspace({str(tmp_path)!r}).writing(): print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(WorkspaceError, match=f"in use by process {other.pid}"), space.writing():
            pass
        other.kill()
    (tmp_path / "rounds").mkdir()
    orphan = tmp_path / "rounds" / f"x.tar.{'0' * 32}.part"
    orphan.write_bytes(b"half")
    mine = tmp_path / "film.mkv.part"
    mine.write_bytes(b"a user's own")
    with space.writing():
        assert not orphan.exists() and mine.exists()


def test_an_unwritable_workspace_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(WorkspaceError, match="name another folder"),
        Workspace(str(tmp_path / "file" / "x")).writing(),
    ):
        pass


def test_appending_replaces_what_it_repeats(tmp_path):
    space = Workspace(str(tmp_path))
    schema = pa.schema([("round", pa.int32()), ("name", pa.string())])

    def append(number, *names):
        rows = [{"round": number, "name": name} for name in names]
        space.append_table("t.parquet", pa.Table.from_pylist(rows, schema=schema), {"round": number})

    append(0, "a")
    append(1, "b")
    append(1, "c", "d")
    assert space.read_table("t.parquet")["name"].to_pylist() == ["a", "c", "d"]


def test_a_damaged_table_is_named(tmp_path):
    space = Workspace(str(tmp_path))
    space.write_bytes("images.parquet", b"PAR1 but not really")
    with pytest.raises(WorkspaceError, match=r"images\.parquet is damaged"):
        space.read_table("images.parquet")


def test_an_object_store_prefix_is_a_workspace():
    space = Workspace("memory://bucket/run")
    space.write_bytes("rounds/000/settings.yaml", b"a: 1")
    assert space.rounds() == [0]
    assert space.size("rounds/000/settings.yaml") == 4
    assert space.size("nothing") is None
