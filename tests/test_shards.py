import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.pictures import encode, encode_mask
from manifests.shards import ShardError, _header, missing_members, pack, sample_json, unpack


def sample(seed: int) -> dict[str, bytes]:
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (16, 16, 3), np.uint8)
    return {
        "image.webp": encode(picture, "webp"),
        "mask.png": encode_mask(picture[..., 0] > 128),
        "normal.webp": encode(picture[::-1].copy(), "webp"),
        "json": sample_json({"seed": seed}, {"leak": 0.0}, {}),
    }


SAMPLES = [(f"000-00000-{i:05d}", sample(i)) for i in range(5)]


def test_a_shard_is_read_by_plain_webdataset(tmp_path):
    path = tmp_path / "part-00000.tar"
    path.write_bytes(pack(SAMPLES).data)
    dataset = webdataset.WebDataset(str(path), shardshuffle=False).decode("rgb8")
    found = list(dataset)
    assert [item["__key__"] for item in found] == [key for key, _ in SAMPLES]
    for item, (_, members) in zip(found, SAMPLES, strict=True):
        assert item["image.webp"].shape == (16, 16, 3)
        assert set(np.unique(item["mask.png"])) <= {0, 255}
        assert item["json"] == json.loads(members["json"])


def test_bytes_and_offsets_are_reproducible():
    packed = pack(SAMPLES)
    assert packed.data == pack(SAMPLES).data
    for (key, members), offset in zip(SAMPLES, packed.offsets, strict=True):
        with tarfile.open(fileobj=io.BytesIO(packed.data[offset:])) as tar:
            assert tar.next().name == f"{key}.{next(iter(members))}"
    with tarfile.open(fileobj=io.BytesIO(packed.data)) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}


@given(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=130),
    st.integers(0, 8**12),
)
@settings(deadline=None)
def test_headers_are_those_of_the_standard_library(name, size):
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    try:
        expected = info.tobuf(tarfile.USTAR_FORMAT)
    except ValueError:  # a name that ustar cannot hold
        with pytest.raises(ValueError, match=r"name|number"):
            _header(name, size)
    else:
        assert _header(name, size) == expected


def test_unpack_gives_back_what_was_packed():
    assert list(unpack(pack(SAMPLES).data, "x")) == SAMPLES
    assert list(unpack(pack([]).data, "x")) == []


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_no_damage_goes_unseen(data):
    """Any cut and any changed byte either raises or shows in the members or in the shard's sha256."""
    packed = pack(SAMPLES[:2])
    raw = bytearray(packed.data)
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw) - 1))]
    else:
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] ^= data.draw(st.integers(1, 255))
    try:
        found = list(unpack(bytes(raw), "x"))
    except ShardError as error:
        assert str(error).startswith("x")
    else:
        assert found != SAMPLES[:2] or hashlib.sha256(bytes(raw)).hexdigest() != packed.sha256


def test_a_cut_between_two_samples_is_seen():
    packed = pack(SAMPLES)
    with pytest.raises(ShardError, match="truncated"):
        list(unpack(packed.data[: packed.offsets[3]], "part-00000.tar"))


@pytest.mark.parametrize("name", ["../escape.json", "/etc/passwd", "a/b.json", "nokey"])
def test_members_that_are_no_samples_are_refused(name):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = 2
        tar.addfile(info, io.BytesIO(b"{}"))
    with pytest.raises(ShardError, match="not a member"):
        list(unpack(sink.getvalue(), "x"))


def test_links_are_refused():
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        info = tarfile.TarInfo("a.json")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(ShardError, match="not a member"):
        list(unpack(sink.getvalue(), "x"))


def test_what_a_sample_lacks():
    assert missing_members(SAMPLES[0][1]) == []
    assert missing_members({"json": b""}) == ["image", "mask"]
    assert missing_members({"feature.npy": b"", "mask.png": b""}) == ["json"]


@pytest.mark.parametrize("key", ["a.b", "a/b", "../a"])
def test_keys_that_readers_split_wrongly_are_refused(key):
    with pytest.raises(ValueError, match="neither dots nor slashes"):
        pack([(key, {"json": b"{}"})])
