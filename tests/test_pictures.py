"""Reading and writing pictures: depth, colour, orientation, damage, size."""

import hashlib
import io
import struct
import tarfile
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image as Pillow
from PIL import ImageOps

from manifests import pictures
from manifests.errors import PictureError, UsageError
from manifests.schema import Image

RNG = np.random.default_rng(0)


def noise(height, width, channels, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max, (height, width, channels), dtype, endpoint=True)


def saved(picture, format="PNG", **options):
    buffer = io.BytesIO()
    (picture if isinstance(picture, Pillow.Image) else Pillow.fromarray(np.squeeze(picture))).save(
        buffer, format, **options
    )
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def raw_png(samples, colour_type, depth=16, claim=None, orientation=1):
    """A PNG written from the specification, so that the oracle is neither Pillow nor OpenCV."""
    height, width = samples.shape[:2]
    claimed = claim or (width, height)
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in samples)
    exif = Pillow.Exif()
    exif[274] = orientation
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", *claimed, depth, colour_type, 0, 0, 0)),
            chunk(b"eXIf", exif.tobytes()[6:]) if orientation != 1 else b"",
            chunk(b"IDAT", zlib.compress(rows, 1)),
            chunk(b"IEND", b""),
        ]
    )


def exif(orientation):
    tags = Pillow.Exif()
    tags[274] = orientation
    return tags


def record(path, data, **changes):
    decoded = pictures.decode(data, name="x")
    height, width, _ = decoded.pixels.shape
    fields = {
        "image_id": pictures.pixel_hash(decoded.pixels),
        "path": str(path),
        "sha256": hashlib.sha256(data).hexdigest(),
        "category": "part",
        "defect": "good",
        "mask_path": None,
        "width": width,
        "height": height,
        "mode": decoded.mode,
        "bits": decoded.bits,
        "group": "g",
        "split": "train",
    }
    return Image(**(fields | changes))


@given(
    pixels=st.sampled_from([np.uint8, np.uint16]).flatmap(
        lambda dtype: arrays(
            dtype,
            st.tuples(st.integers(8, 20), st.integers(8, 20), st.sampled_from([1, 3])),
            fill=st.nothing(),
        )
    )
)
@settings(max_examples=60, deadline=None)
def test_lossless_formats_give_back_every_pixel(pixels):
    decoded = pictures.decode(pictures.encode(pixels, "png"), name="x")
    assert decoded.pixels.dtype == pixels.dtype
    np.testing.assert_array_equal(decoded.pixels, pixels)
    if pixels.dtype == np.uint8:
        webp = pictures.decode(pictures.encode(pixels, "webp"), name="x").pixels
        np.testing.assert_array_equal(webp, np.broadcast_to(pixels, webp.shape))


def test_encoding_is_deterministic_and_refuses_what_a_format_cannot_hold():
    pixels = noise(64, 48, 3)
    for format in ("webp", "png", "jpg"):
        assert pictures.encode(pixels, format) == pictures.encode(pixels.copy(order="F"), format)
    for format in ("webp", "jpg"):
        with pytest.raises(UsageError, match="png"):
            pictures.encode(noise(16, 16, 1, np.uint16), format)
    mask = noise(40, 30, 1)[:, :, 0] > 200
    stored = Pillow.open(io.BytesIO(pictures.encode_mask(mask)))
    assert stored.mode == "L"
    np.testing.assert_array_equal(np.asarray(stored), mask * 255)
    assert pictures.encode_mask(mask) == pictures.encode_mask(mask.astype(np.uint8) * 7)


@pytest.mark.parametrize(("colour_type", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_survive_and_alpha_composites_over_black(colour_type, channels):
    samples = noise(12, 20, channels, np.uint16)
    expected = samples
    if channels in (2, 4):
        alpha = samples[:, :, -1:].astype(np.float64) / 65535
        expected = np.rint(samples[:, :, :-1] * alpha).astype(np.uint16)
    decoded = pictures.decode(raw_png(samples, colour_type), name="x")
    assert (decoded.bits, decoded.mode) == (16, "L" if channels < 3 else "RGB")
    np.testing.assert_array_equal(decoded.pixels, expected)
    samples[..., -1] = 65535  # opaque: nothing changes
    opaque = pictures.decode(raw_png(samples, colour_type), name="x").pixels
    np.testing.assert_array_equal(opaque, samples[:, :, : opaque.shape[2]])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_agrees_with_pillow_for_every_format(orientation):
    stored = Pillow.fromarray(noise(16, 24, 3))
    for format in ("PNG", "TIFF", "WEBP"):
        data = saved(
            stored, format, exif=exif(orientation), **({"lossless": True} if format == "WEBP" else {})
        )
        expected = np.asarray(ImageOps.exif_transpose(Pillow.open(io.BytesIO(data))))
        decoded = pictures.decode(data, name="x")
        np.testing.assert_array_equal(decoded.pixels, expected)
        assert decoded.orientation == orientation
    deep = noise(16, 24, 3, np.uint16)
    narrow = raw_png((deep >> 8).astype(np.uint8), 2, depth=8, orientation=orientation)
    upright = pictures.decode(raw_png(deep, 2, orientation=orientation), name="x").pixels
    np.testing.assert_array_equal(upright >> 8, pictures.decode(narrow, name="x").pixels)


@pytest.mark.parametrize("shape", [(16, 24), (16, 16)])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_mask_drawn_on_stored_pixels_turns_with_its_picture(orientation, shape):
    stored = noise(*shape, 1)
    mask = stored[:, :, 0] > 128
    upright = pictures.decode(saved(stored, exif=exif(orientation)), name="x")
    expected = upright.pixels[:, :, 0] > 128
    size = upright.pixels.shape[:2]

    def read(data):
        return pictures.decode_mask(data, name="m", shape=size, orientation=orientation)

    np.testing.assert_array_equal(read(pictures.encode_mask(mask)), expected)
    np.testing.assert_array_equal(read(saved(mask.astype(np.uint8), exif=exif(orientation))), expected)
    if size != shape:  # the size tells that this one was drawn on the upright picture
        np.testing.assert_array_equal(read(pictures.encode_mask(expected)), expected)


def test_mask_counts_every_channel_but_alpha():
    levels = np.zeros((16, 16, 4), np.uint8)
    levels[3, 4, 2] = 1
    levels[..., 3] = 255
    mask = pictures.decode_mask(saved(levels), name="m", shape=(16, 16))
    assert mask.dtype == bool
    assert np.argwhere(mask).tolist() == [[3, 4]]
    square = np.zeros((64, 64), np.uint8)
    square[13:30, 21:43] = 255
    ringing = pictures.decode_mask(saved(square, "JPEG", quality=60), name="m", shape=(64, 64))
    assert np.count_nonzero(ringing != (square > 0)) < 20
    with pytest.raises(PictureError, match=r"16×16.*20×10"):
        pictures.decode_mask(saved(levels), name="m", shape=(10, 20))


def test_palette_bilevel_and_colour_key():
    picture = Pillow.fromarray(noise(16, 16, 3))
    palette = picture.quantize(16)
    np.testing.assert_array_equal(
        pictures.decode(saved(palette), name="x").pixels, np.asarray(palette.convert("RGB"))
    )
    bilevel = picture.convert("1")
    decoded = pictures.decode(saved(bilevel), name="x")
    assert decoded.mode == "L"
    np.testing.assert_array_equal(decoded.pixels[:, :, 0], np.asarray(bilevel) * 255)
    grey = np.full((16, 16), 9, np.uint8)
    grey[0] = 200
    keyed = pictures.decode(saved(Pillow.fromarray(grey), transparency=200), name="x").pixels
    assert keyed[0].max() == 0
    assert (keyed[1:] == 9).all()


BAD = {
    "no bytes": (b"", "0 bytes"),
    "text": (b"not a picture at all", "not a picture"),
    "cut": (saved(noise(64, 64, 3))[:3000], "damaged"),
    "cut 16 bit": (raw_png(noise(64, 64, 3, np.uint16), 2)[:3000], "damaged"),
    "cut jpeg": (saved(noise(64, 64, 3), "JPEG")[:2000], "damaged"),
    "one pixel": (saved(Pillow.new("RGB", (1, 1))), "1×1"),
    "huge claim": (raw_png(noise(8, 8, 1), 0, depth=8, claim=(20000, 20000)), "400000000 pixels"),
    "over limit": (raw_png(noise(8, 8, 1), 0, depth=8, claim=(9000, 9000)), "9000×9000"),
    "cmyk": (saved(Pillow.new("CMYK", (16, 16)), "JPEG"), "CMYK"),
    "float": (saved(Pillow.new("F", (16, 16)), "TIFF"), "mode F"),
    "animation": (
        saved(
            Pillow.new("RGB", (16, 16)),
            "WEBP",
            save_all=True,
            append_images=[Pillow.new("RGB", (16, 16), "red")],
        ),
        "frames",
    ),
    "gif": (saved(Pillow.new("L", (16, 16)), "GIF"), "not a picture"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_is_named_with_its_reason(kind):
    data, reason = BAD[kind]
    with pytest.raises(PictureError, match=reason) as caught:
        pictures.decode(data, name="line/part.png")
    assert str(caught.value).startswith("line/part.png: ")
    assert ";" in str(caught.value), "a remedy follows the reason"


def test_opencv_never_sees_a_chunk_that_claims_gigabytes(monkeypatch):
    data = bytearray(raw_png(noise(12, 12, 3, np.uint16), 2))
    data[33] = 0xF0  # the first byte of the data chunk's length: OpenCV would set aside 4 GiB for it
    seen = []
    monkeypatch.setattr(pictures.cv2, "imdecode", lambda *_: seen.append(1))
    with pytest.raises(PictureError, match="damaged"):
        pictures.decode(bytes(data), name="x")
    assert not seen


SEEDS = [
    saved(noise(12, 12, 3)),
    saved(noise(12, 12, 3), "JPEG", exif=exif(6)),
    saved(noise(12, 12, 3), "TIFF", compression="tiff_lzw"),
    saved(noise(12, 12, 3), "BMP"),
    saved(noise(12, 12, 3), "WEBP", lossless=True),
    saved(noise(12, 12, 1, np.uint16), "TIFF"),
    raw_png(noise(12, 12, 3, np.uint16), 2, orientation=5),
]


@given(
    seed=st.sampled_from(SEEDS),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=6),
    keep=st.floats(0.05, 1),
)
@settings(max_examples=400, deadline=None)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_damaged_bytes_raise_nothing_but_picture_error(seed, edits, keep):
    data = bytearray(seed[: max(1, int(len(seed) * keep))])
    for place, value in edits:
        data[int(place * len(data))] = value
    try:
        decoded = pictures.decode(bytes(data), name="x", max_pixels=100_000)
    except PictureError:
        return
    assert decoded.pixels.ndim == 3
    assert decoded.pixels.shape[2] in (1, 3)
    assert decoded.pixels.shape[0] * decoded.pixels.shape[1] <= 100_000


@given(
    low=st.integers(0, 65000),
    span=st.integers(1, 65535),
    bits=st.sampled_from([8, 16]),
    pixels=arrays(np.uint16, (8, 9, 1)),
)
@settings(max_examples=50, deadline=None)
def test_window_is_linear_and_clipped(low, span, bits, pixels):
    top = 2**bits - 1
    mapped = pictures.apply_window(pixels, (low, low + span), bits)
    exact = np.clip((pixels.astype(np.float64) - low) / span, 0, 1) * top
    assert np.abs(mapped - exact).max() <= 0.5 + 1e-6


def test_load_checks_the_file_maps_levels_and_shrinks(tmp_path):
    deep = noise(40, 60, 1, np.uint16)
    data = pictures.encode(deep, "png")
    path = tmp_path / "a.png"
    path.write_bytes(data)
    image = record(path, data, window_low=1000, window_high=60000)
    np.testing.assert_array_equal(pictures.load(image), pictures.apply_window(deep, (1000, 60000), 8))
    assert pictures.load(image, bits=16).dtype == np.uint16
    assert pictures.load(image, max_side=30).shape == (20, 30, 1)
    assert pictures.load(image, max_side=500).shape == (40, 60, 1)

    small = noise(16, 16, 3)
    path.write_bytes(pictures.encode(small, "png"))
    with pytest.raises(PictureError, match="changed"):
        pictures.load(image)
    again = record(path, path.read_bytes())
    np.testing.assert_array_equal(pictures.load(again, bits=16), small.astype(np.uint16) * 257)


def test_load_mask_follows_the_picture_and_keeps_thin_defects(tmp_path):
    mask = np.zeros((100, 200), bool)
    mask[50:52, 20:180] = True
    data = saved(noise(100, 200, 1), exif=exif(6))
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "m.png").write_bytes(pictures.encode_mask(mask))
    image = record(tmp_path / "a.png", data, defect="scratch", mask_path=str(tmp_path / "m.png"))
    np.testing.assert_array_equal(pictures.load_mask(image), np.rot90(mask, -1))
    thin = pictures.load_mask(image, max_side=20)
    assert thin.shape == pictures.load(image, max_side=20).shape[:2]
    assert thin.any()
    normal = record(tmp_path / "a.png", data)
    assert not pictures.load_mask(normal, max_side=20).any()
    location = pictures.load_location(str(tmp_path / "m.png"), (50, 100))
    assert location.shape == (50, 100)
    assert location.any()


def test_a_jpeg_of_places_is_as_large_as_it_was_drawn_and_one_that_lies_is_refused(tmp_path):
    disc = cv2.circle(np.zeros((256, 256), np.uint8), (128, 128), 60, 255, -1)
    cv2.imwrite(str(tmp_path / "roi.jpg"), disc, [cv2.IMWRITE_JPEG_QUALITY, 75])
    found = pictures.load_location(str(tmp_path / "roi.jpg"), (256, 256))
    assert found.sum() == pytest.approx((disc > 0).sum(), rel=0.01)
    cv2.imwrite(str(tmp_path / "lying.png"), disc[:160])
    assert pictures.load_location(str(tmp_path / "lying.png"), (16, 26)).shape == (16, 26)
    assert pictures.load_location(str(tmp_path / "lying.png"), (64, 64)).shape == (64, 64)
    with pytest.raises(
        PictureError, match=r"256×160 pixels, its upright picture 160×256 as it is read; turn it"
    ):
        pictures.load_location(str(tmp_path / "lying.png"), (256, 160))


def test_members_of_a_tar_are_read_by_name_and_a_new_tar_is_seen(tmp_path):
    def write(members):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    url = f"tar://b/k.png::{tmp_path}/x.tar"
    write({"a.png": b"1", "b/k.png": b"22"})
    assert pictures.read_bytes(url) == b"22"
    write({"b/k.png": b"4444", "a.png": b"333"})
    assert pictures.read_bytes(url) == b"4444"
    for missing in (f"tar://none.png::{tmp_path}/x.tar", f"tar://a::{tmp_path}/y.tar", f"{tmp_path}/no.png"):
        with pytest.raises(PictureError, match="no such file"):
            pictures.read_bytes(missing)
    with pytest.raises(PictureError, match="more than 3 bytes"):
        pictures.read_bytes(url, limit=3)


def test_a_passing_fault_is_not_called_a_bad_picture(monkeypatch, tmp_path):
    def fail(*_args, **_kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.open", fail)
    with pytest.raises(OSError, match="Input/output") as caught:
        pictures.read_bytes(str(tmp_path / "a.png"))
    assert not isinstance(caught.value, PictureError)
