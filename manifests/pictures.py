"""Reading and writing pictures: the one decoder and the one encoder, with an explicit policy.

What is read: PNG, JPEG, BMP, TIFF and WebP; 8 or 16 bits; grey or RGB.

* Size: a file has at most 256 MiB; the header's width × height is compared with ``max_pixels`` before any
  pixel is decoded; a picture has at least 8 pixels a side.
* EXIF orientation is applied, so that width and height are those a person sees.
* 1-bit pictures become grey, palettes become RGB.
* 16-bit RGB is never narrowed (Pillow would, silently); what cannot be read at full depth is refused.
* Alpha: dropped where it is opaque everywhere, otherwise the picture is composited over black. A colour
  under a transparent pixel is whatever an editor left there and must not count as content; black is the
  background of most cut-out data sets (inference).
* Refused, with the remedy in the message: CMYK, YCCK, Lab and float pictures, animations, several pages
  (of an MPO file, a JPEG with previews or a stereo partner, the first picture is read).
* Whatever the bytes are, the only error of decoding is :class:`PictureError`.

Masks: non-zero in any channel but alpha is defect. JPEG masks are cut at half the range, because JPEG
writes small non-zero levels around every edge.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import math
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Literal

import cv2
import numpy as np
from PIL import Image as Pillow

from manifests import storage
from manifests.errors import PictureError, UsageError
from manifests.plain import from_json
from manifests.schema import GOOD, Image
from manifests.storage import StorageError

MAX_BYTES = 256 * 2**20
MAX_PIXELS = 64_000_000
MIN_SIDE = 8
PROTOCOLS = ("file", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https", "hf", "memory")
DEFECTS_CONFIG = "defects_config.json"
LYING = math.log(1.1)  # sides' ratio from which a mask of places counts as lying, its picture as standing
EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # MPO comes with JPEG
_DEEP_GREY = ("I;16", "I;16L", "I;16B")
_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", *_DEEP_GREY)
_ORIENTATION, _PHOTOMETRIC, _BITS, _PLANAR = 274, 262, 258, 284  # TIFF tags, the first also in EXIF
_WEBP_SIDE = 16383
_PIECE = 4 * 2**20  # bytes

Format = Literal["webp", "png", "jpg"]


@dataclass(frozen=True, slots=True)
class Decoded:
    """Pixels as stored in the file, upright.

    Attributes:
        pixels: uint8 or uint16, H×W×C with C = 1 (grey) or 3 (RGB).
        mode: ``L`` or ``RGB``.
        bits: 8 or 16.
        orientation: the EXIF orientation that was applied, 1 to 8 (1 = none).
    """

    pixels: np.ndarray
    mode: Literal["L", "RGB"]
    bits: Literal[8, 16]
    orientation: int


# --- bytes ---------------------------------------------------------------------------------------------


def read_bytes(path: str, limit: int = MAX_BYTES) -> bytes:
    """The bytes of a local file or fsspec URL, also of a tar's member: ``tar://member::/path/x.tar``.

    Raises:
        PictureError: the file is missing, may not be read, is a folder, or has more than ``limit`` bytes.
        StorageError: the credentials or rights to read a remote file are missing.
        OSError: everything that may pass (a lost network share, say); the caller may try again.
    """
    try:
        if path.startswith("tar://"):
            data = _read_member(path, limit)
        else:
            with open_file(path) as file:
                data = _at_most(file, limit + 1)
    except FileNotFoundError as error:
        raise PictureError(f"{path}: no such file; restore it, or correct what names it") from error
    except (PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise PictureError(f"{path}: {error.strerror or error}; expected a readable picture") from error
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise PictureError(f"{path}: {error.strerror}; correct the path") from error
    except (ValueError, OverflowError, ImportError, tarfile.TarError) as error:
        raise PictureError(f"{path}: cannot be opened ({error}); check the path or URL") from error
    except StorageError as error:
        if isinstance(error.__cause__, ImportError | ValueError):  # the URL's kind
            raise PictureError(str(error)) from error
        raise
    if len(data) > limit:
        raise PictureError(f"{path}: more than {limit:,} bytes; store the picture in a smaller file")
    return data


def _read_member(path: str, limit: int) -> bytes:
    member, _, archive = path.removeprefix("tar://").partition("::")
    local = os.stat(archive) if "://" not in archive else None
    index = _tar_index(archive, (local.st_mtime_ns, local.st_size) if local else None)
    if member not in index:
        raise FileNotFoundError(f"no member {member}")
    offset, size = index[member]
    with open_file(archive) as file:
        file.seek(offset)
        return _at_most(file, min(size, limit + 1))


@functools.lru_cache(maxsize=256)
def _tar_index(archive: str, _stamp: tuple[int, int] | None) -> dict[str, tuple[int, int]]:
    """Member -> (offset, size). Reading by offset needs no shared handle, so threads do not meet."""
    with open_file(archive) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        return {m.name: (m.offset_data, m.size) for m in tar if m.isfile()}


def _at_most(file: IO[bytes], size: int) -> bytes:
    """Up to ``size`` bytes. ``read(size)`` would set them aside before it knows how many there are."""
    pieces: list[bytes] = []
    while size > 0 and (piece := file.read(min(size, _PIECE))):
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def open_file(path: str) -> IO[bytes]:
    """A binary reader of a local file or an fsspec URL.

    fsspec also knows protocols that start programs, unpickle, or write copies of what they read; a list of
    pictures may come from anyone, so only those of ``PROTOCOLS`` are opened, and no chain of them.

    Raises:
        ValueError: another protocol, or a chain.
        FileNotFoundError, StorageError, Unreachable: see :func:`manifests.storage.open_file`.
    """
    protocol, mark, _ = path.partition("://")
    if not mark:
        return open(path, "rb")
    if protocol not in PROTOCOLS or "::" in path:
        raise ValueError(f"protocols that are read: {', '.join(PROTOCOLS)}")
    return storage.open_file(path)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def pixel_hash(pixels: np.ndarray) -> str:
    """sha256 (hex) of shape, dtype and little-endian bytes: equal pictures in other files are equal."""
    digest = hashlib.sha256(f"{pixels.shape} {pixels.dtype.name} ".encode())
    little = pixels.astype(pixels.dtype.newbyteorder("<"), copy=False)
    digest.update(np.ascontiguousarray(little).data)
    return digest.hexdigest()


# --- decoding ------------------------------------------------------------------------------------------


def decode(data: bytes, *, name: str, max_pixels: int = MAX_PIXELS) -> Decoded:
    """Decode one picture by the policy above.

    Args:
        data: the file's bytes.
        name: what to call it in messages.
        max_pixels: refuse a larger width × height before decoding (Pillow's own bound, about 179 million,
            holds besides).

    Raises:
        PictureError: the picture is damaged, too large, too small or of a kind that is not read.
    """
    with _refusing(name):
        header = _open(data, name, max_pixels)
        picture = header.picture
        if min(picture.size) < MIN_SIDE:
            raise PictureError(f"{name}: {_size(picture)} pixels, fewer than {MIN_SIDE} a side; leave it out")
        pixels = _pixels(header, data, name)
        colour, alpha = _split_alpha(pixels)
        if alpha is not None:
            colour = _over_black(colour, alpha)
        mode: Literal["L", "RGB"] = "L" if colour.shape[2] == 1 else "RGB"
        bits: Literal[8, 16] = 16 if colour.dtype == np.uint16 else 8
        return Decoded(np.ascontiguousarray(colour), mode, bits, header.orientation)


def decode_mask(data: bytes, *, name: str, shape: tuple[int, int], orientation: int = 1) -> np.ndarray:
    """Decode the mask of an upright picture of ``shape``.

    EXIF: a mask with a rotation of its own is turned by that. Otherwise it was drawn on the picture's
    stored pixels or on the upright picture, and its size tells which; where both fit (``orientation`` 2 to
    4, or a square picture) it is taken as drawn on the stored pixels and turned like the picture, so that
    picture and mask files that match pixel by pixel still match.

    Args:
        shape: (H, W) of the upright picture.
        orientation: the picture's EXIF orientation, 1 to 8.

    Returns:
        bool, H×W; true = defect.

    Raises:
        PictureError: not a readable mask, or of another size.
    """
    with _refusing(name):
        height, width = shape
        header = _open(data, name, max(height * width, MAX_PIXELS))
        mask = _drawn(header, data, name)
        stored = (width, height) if orientation >= 5 else (height, width)
        if header.orientation == 1 and mask.shape == stored:
            mask = _orient(mask, orientation)
        if mask.shape != shape:
            raise PictureError(
                f"{name}: the mask has {mask.shape[1]}×{mask.shape[0]} pixels, its picture {width}×{height}; "
                "draw it at the picture's size"
            )
        return np.ascontiguousarray(mask)


def _drawn(header: _Header, data: bytes, name: str) -> np.ndarray:
    """Where a mask's file is not black: bool, H×W. JPEG's ringing is cut at half the range."""
    colour, _ = _split_alpha(_pixels(header, data, name))
    floor = np.iinfo(colour.dtype).max // 2 if header.picture.format in ("JPEG", "MPO") else 0
    return np.asarray((colour > floor).any(axis=2))


def orientation_of(data: bytes, *, name: str) -> int:
    """EXIF orientation of a picture, 1 to 8, from its header alone."""
    with _refusing(name):
        return _open(data, name, 2**62).orientation


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Pillow meets damaged bytes with errors of a dozen types: all of them become a PictureError."""
    try:
        yield
    except (PictureError, MemoryError):
        raise
    except Pillow.DecompressionBombError as error:
        raise PictureError(f"{name}: {error}; make it smaller or cut it into tiles") from error
    except Exception as error:
        raise PictureError(
            f"{name}: damaged or cut short ({type(error).__name__}: {error}); restore or replace it"
        ) from error


@dataclass(frozen=True, slots=True)
class _Header:
    picture: Any  # Pillow's, of some format; its plugins' attributes are untyped
    orientation: int
    deep: bool  # 16 bits a sample; Pillow's mode does not tell
    raw: Any  # Pillow's name for the samples' layout in the file


def _open(data: bytes, name: str, max_pixels: int) -> _Header:
    """What the header says, judged before any pixel is decoded."""
    if not data:
        raise PictureError(f"{name}: the file has 0 bytes; restore or replace it")
    try:
        picture: Any = Pillow.open(io.BytesIO(data), formats=_FORMATS)
    except Pillow.UnidentifiedImageError as error:
        kinds = ", ".join(_FORMATS)
        raise PictureError(f"{name}: not a picture, or a damaged one; expected one of {kinds}") from error
    if picture.width * picture.height > max_pixels:
        raise PictureError(
            f"{name}: {_size(picture)} pixels, more than the limit of {max_pixels:,}; make it smaller, "
            "cut it into tiles or raise max_pixels"
        )
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
        raise PictureError(f"{name}: {picture.n_frames} frames or pages; store each as a picture of its own")
    if picture.mode not in _MODES:
        raise PictureError(
            f"{name}: colour mode {picture.mode} is not read; convert it to 8- or 16-bit grey or RGB"
        )
    raw = picture.tile[0].args if picture.tile else None  # WebP has no tiles
    deep = picture.format == "TIFF" and max(picture.tag_v2.get(_BITS, (1,))) > 8
    deep = deep or (picture.format == "PNG" and "16" in str(raw))
    orientation = picture.getexif().get(_ORIENTATION, 1)  # last: for PNG, Pillow decodes to find it
    return _Header(picture, orientation if orientation in range(1, 9) else 1, deep, raw)


def _pixels(header: _Header, data: bytes, name: str) -> np.ndarray:
    """Upright samples with their alpha, if any: uint8 or uint16, H×W×C with C = 1 to 4."""
    picture, orientation = header.picture, header.orientation
    tiff = picture.format == "TIFF"
    if header.deep and picture.mode not in _DEEP_GREY:
        plain = picture.mode == "RGB" and picture.tag_v2.get(_PLANAR, 1) == 1 if tiff else True
        if not plain or (tiff and orientation != 1):
            raise PictureError(
                f"{name}: a 16-bit TIFF with alpha, separate planes or an orientation; store it as 16-bit PNG"
            )
        # Pillow narrows the samples but finds damage, which OpenCV may not, or only after it has set aside
        # the 4 GiB that a damaged chunk claims to have; OpenCV then reads the samples at full depth.
        picture.load()
        Pillow.open(io.BytesIO(data), formats=_FORMATS).verify()
        pixels = _read_deep(data, grey=header.raw == "LA;16B")
    elif header.deep:
        if tiff and picture.tag_v2.get(_PHOTOMETRIC) == 0:
            raise PictureError(f"{name}: a 16-bit TIFF whose zero is white; store it with zero as black")
        pixels = np.array(picture).astype(np.uint16, copy=False)
    else:
        pixels = np.array(picture.convert(_eight_bit_mode(picture)))
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return pixels if tiff else _orient(pixels, orientation)  # Pillow turns TIFF itself


def _eight_bit_mode(picture: Any) -> str:
    transparent = "transparency" in picture.info
    if picture.mode in ("P", "PA"):
        return "RGBA" if transparent or picture.mode == "PA" else "RGB"
    if picture.mode == "1":
        return "L"
    return {"L": "LA", "RGB": "RGBA"}.get(picture.mode, picture.mode) if transparent else picture.mode


def _read_deep(data: bytes, grey: bool) -> np.ndarray:
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.ndim != 3:
        raise ValueError("the 16-bit samples cannot be read")
    pixels = pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]]
    return pixels[:, :, [0, -1]] if grey else pixels  # OpenCV spreads grey + alpha over four channels


def _split_alpha(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    if pixels.shape[2] in (2, 4):
        return pixels[:, :, :-1], pixels[:, :, -1:]
    return pixels, None


def _over_black(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    top = int(np.iinfo(colour.dtype).max)
    if int(alpha.min()) == top:
        return colour
    return ((colour.astype(np.uint32) * alpha + top // 2) // top).astype(colour.dtype)


def _orient(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn stored pixels upright (EXIF 2.32, tag 274)."""
    if orientation >= 5:
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    return array[:, ::-1] if orientation in (2, 3, 6, 7) else array


def _size(picture: Pillow.Image) -> str:
    return f"{picture.width}×{picture.height}"


# --- from the images table -----------------------------------------------------------------------------


def load(image: Image, bits: int = 8, max_side: int | None = None) -> np.ndarray:
    """One picture of the images table, ready for use.

    16-bit pictures are mapped by their source's window, 8-bit ones are widened by ×257 where ``bits`` is
    16. ``max_side`` shrinks the longer side by area averaging; nothing is ever enlarged.

    Returns:
        uint8 (``bits`` = 8) or uint16 (16), H×W×C with C = 1 or 3.

    Raises:
        PictureError: the file is gone, or is not the one that was read when the table was made.
    """
    pixels = decode(_unchanged(image), name=image.path, max_pixels=image.width * image.height).pixels
    if pixels.dtype == np.uint16:
        pixels = apply_window(pixels, image.window or (0, 65535), bits)
    elif bits == 16:
        pixels = pixels.astype(np.uint16) * np.uint16(257)
    return shrink(pixels, max_side)


def load_mask(image: Image, max_side: int | None = None) -> np.ndarray:
    """The defect mask of one picture at the size :func:`load` gives it; all false for a normal picture.

    A shrunk pixel is defect where at least half of it is; a mask that would vanish keeps every pixel it
    touches (inference: a defect too thin for the scale must not turn its picture into a normal one).

    Returns:
        bool, H×W.

    Raises:
        PictureError: a defect picture without mask, or a mask that cannot be used.
    """
    shape = (image.height, image.width)
    if image.mask_path is None and image.defect != GOOD:
        raise PictureError(
            f"{image.path}: a defect picture without mask; only image-level figures are possible"
        )
    if image.mask_path is None:
        return np.zeros(shrunk(shape, max_side), bool)
    turned = orientation_of(_unchanged(image), name=image.path)
    mask = read_mask(image.mask_path, shape, turned)
    if shrunk(shape, max_side) == shape:
        return mask
    share = shrink(mask.astype(np.float32)[:, :, None], max_side)[:, :, 0]
    small = share >= 0.5
    return small if small.any() else share > 0


def read_mask(path: str, shape: tuple[int, int], orientation: int = 1) -> np.ndarray:
    """The mask at ``path``, or, where that is a folder (MVTec LOCO), all the masks in it together.

    Args:
        shape, orientation: as for :func:`decode_mask`.

    Returns:
        bool, H×W.
    """
    masks = [
        decode_mask(read_bytes(file), name=file, shape=shape, orientation=orientation)
        for file in _mask_files(path)
    ]
    return np.any(masks, axis=0)


def has_saturations(image: Image) -> bool:
    """Whether the picture's defects are stored one by one beside a file of saturation thresholds."""
    return image.mask_path is not None and os.path.isfile(_defects_config(image.mask_path))


def load_defects(image: Image) -> list[tuple[np.ndarray, int]]:
    """The defects of one picture of MVTec LOCO, at its original size, each with its saturation area.

    A defect is one PNG; the value of its pixels names its entry in the category's ``defects_config.json``,
    whose ``saturation_threshold`` is a share of the defect's area, rounded down, if ``relative_saturation``
    is true, else a number of pixels (core.md 6.5).

    Returns:
        (bool H×W, pixels at which it counts as found, at least 1), one a defect; none for a normal picture.

    Raises:
        PictureError: a mask or the file cannot be used, or does not know a pixel value.
    """
    if image.mask_path is None:
        return []
    shape = (image.height, image.width)
    turned = orientation_of(_unchanged(image), name=image.path)
    thresholds = _saturations(_defects_config(image.mask_path))
    defects = []
    for file in _mask_files(image.mask_path):
        data = read_bytes(file)
        mask = decode_mask(data, name=file, shape=shape, orientation=turned)
        with _refusing(file):
            value = int(_split_alpha(_pixels(_open(data, file, MAX_PIXELS), data, file))[0].max())
        if value not in thresholds:
            known = ", ".join(map(str, sorted(thresholds)))
            raise PictureError(
                f"{file}: pixels of value {value}, but {DEFECTS_CONFIG} knows {known}; correct one of them"
            )
        threshold, relative = thresholds[value]
        area = int(np.count_nonzero(mask))
        defects.append((mask, max(1, int(threshold * area if relative else min(threshold, area)))))
    return defects


def _mask_files(path: str) -> list[str]:
    if not os.path.isdir(path):
        return [path]
    names = sorted(n for n in os.listdir(path) if os.path.splitext(n)[1].lower() in EXTENSIONS)
    if not names:
        raise PictureError(f"{path}: no mask in the folder; draw the defect or correct the label")
    return [os.path.join(path, name) for name in names]


def _defects_config(mask_folder: str) -> str:
    """``CATEGORY/defects_config.json``, of ``CATEGORY/ground_truth/DEFECT/STEM``."""
    return os.path.join(os.path.dirname(mask_folder), "..", "..", DEFECTS_CONFIG)


@functools.lru_cache(maxsize=64)
def _saturations(path: str) -> dict[int, tuple[float, bool]]:
    """By pixel value: (saturation threshold, whether it is a share of the defect's area)."""
    try:
        return {
            int(entry["pixel_value"]): (
                float(entry["saturation_threshold"]),
                bool(entry["relative_saturation"]),
            )
            for entry in from_json(read_bytes(path))
        }
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise PictureError(
            f"{path}: no list of pixel_value, saturation_threshold and relative_saturation "
            f"({type(error).__name__}: {error}); restore it from the data set"
        ) from error


def load_location(path: str, shape: tuple[int, int]) -> np.ndarray:
    """A region of interest or an ignore mask, fitted to a picture of ``shape`` by nearest neighbour.

    Any size is accepted, because one file may serve pictures of several sizes, but it must be drawn on the
    upright picture: which EXIF turns is not known here, and a mask that lies would be stretched.

    Returns:
        bool, H×W; true where the mask is non-zero, in a JPEG above half the range.

    Raises:
        PictureError: not a readable mask, or it lies where the picture stands.
    """
    data = read_bytes(path)
    with _refusing(path):
        mask = _drawn(_open(data, path, MAX_PIXELS), data, path)
    aspects = [math.log(wide / tall) for tall, wide in (mask.shape, shape)]
    if aspects[0] * aspects[1] < 0 and min(map(abs, aspects)) > LYING:
        raise PictureError(
            f"{path}: the mask of places has {mask.shape[1]}×{mask.shape[0]} pixels, its upright picture "
            f"{shape[1]}×{shape[0]} as it is read; turn it as the picture is shown"
        )
    size = (shape[1], shape[0])
    return cv2.resize(np.asarray(mask, np.uint8), size, interpolation=cv2.INTER_NEAREST_EXACT).astype(bool)


def small_mask(mask: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """A mask at size×size, or h×w, by nearest neighbour (core.md 6.2); one that would vanish keeps every
    pixel it touches.

    Args:
        mask: bool, H×W.
    """
    levels = mask.astype(np.float32)
    side = (size, size) if isinstance(size, int) else size[::-1]
    small = cv2.resize(levels, side, interpolation=cv2.INTER_NEAREST_EXACT) > 0
    if mask.any() and not small.any():
        return cv2.resize(levels, side, interpolation=cv2.INTER_AREA) > 0
    return small


def apply_window(pixels: np.ndarray, window: tuple[int, int], bits: int) -> np.ndarray:
    """Map 16-bit levels linearly so that ``window`` = (low, high) fills the range, clipped outside.

    Args:
        pixels: uint16, any shape.
        bits: 8 or 16, of the result.

    Returns:
        uint8 or uint16 of the same shape.
    """
    return _window_table(int(window[0]), int(window[1]), bits)[pixels]


@functools.lru_cache(maxsize=16)
def _window_table(low: int, high: int, bits: int) -> np.ndarray:
    if not low < high:
        raise UsageError(f"window: low {low} must be less than high {high}")
    top = {8: 255, 16: 65535}[bits]
    share = (np.arange(65536) - low) / (high - low)
    return np.rint(share.clip(0, 1) * top).astype(np.uint8 if bits == 8 else np.uint16)


def _unchanged(image: Image) -> bytes:
    data = read_bytes(image.path)
    found = sha256(data)
    if found != image.sha256:
        raise PictureError(
            f"{image.path}: the file changed since it was read (sha256 expected {image.sha256[:12]}…, found "
            f"{found[:12]}…); restore it, or start a workspace from the new pictures"
        )
    return data


def shrunk(shape: tuple[int, int], max_side: int | None) -> tuple[int, int]:
    """The (H, W) that :func:`load` gives a picture of ``shape``."""
    longest = max(shape)
    if max_side is None or longest <= max_side:
        return shape
    return max(1, round(shape[0] * max_side / longest)), max(1, round(shape[1] * max_side / longest))


def shrink(pixels: np.ndarray, max_side: int | None) -> np.ndarray:
    height, width = shrunk(pixels.shape[:2], max_side)
    if (height, width) == pixels.shape[:2]:
        return pixels
    small = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return small.reshape(height, width, pixels.shape[2])


# --- encoding ------------------------------------------------------------------------------------------


def eight_bit(pixels: np.ndarray) -> np.ndarray:
    """uint8 or uint16 to uint8, rounded."""
    return pixels if pixels.dtype == np.uint8 else ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def with_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """H×W×C to H×W×``channels`` (1 or 3): grey is repeated, colour is averaged. For a second picture, which
    must be like the one it serves."""
    if pixels.shape[2] == channels:
        return pixels
    if channels == 3:
        return np.repeat(pixels, 3, axis=2)
    return np.rint(pixels.mean(axis=2, keepdims=True)).astype(pixels.dtype)


def encode(pixels: np.ndarray, format: Format) -> bytes:
    """The same bytes for the same pixels (and package versions), without date or other metadata.

    ``webp`` is lossless (grey is stored as three equal channels, WebP having no grey), ``png`` is lossless
    at 8 or 16 bits, ``jpg`` has quality 95 and is lossy.

    Args:
        pixels: uint8 or uint16, H×W×C with C = 1 or 3.

    Raises:
        UsageError: the format cannot hold such a picture.
    """
    if format != "png" and pixels.dtype != np.uint8:
        raise UsageError(f"format {format} holds 8 bits, the picture has 16; choose png, or 8 bits")
    if format == "webp" and max(pixels.shape[:2]) > _WEBP_SIDE:
        raise UsageError(f"format webp holds at most {_WEBP_SIDE} pixels a side; choose png")
    pixels = np.ascontiguousarray(pixels)
    if format == "png":
        ordered = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if pixels.shape[2] == 3 else pixels
        return _png(ordered, cv2.IMWRITE_PNG_FILTER_UP)
    buffer = io.BytesIO()
    picture = Pillow.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    if format == "webp":
        # For lossless WebP "quality" is effort, not fidelity.
        picture.convert("RGB").save(buffer, "WEBP", lossless=True, quality=0, method=0, exact=True)
    else:
        picture.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def encode_mask(mask: np.ndarray) -> bytes:
    """An 8-bit grey PNG with 0 and 255; non-zero of ``mask`` (bool or uint8, H×W) is 255."""
    levels = np.where(mask, np.uint8(255), np.uint8(0))
    return _png(levels, cv2.IMWRITE_PNG_FILTER_NONE)  # unfiltered runs are what run-length coding likes


def _png(pixels: np.ndarray, row_filter: int) -> bytes:
    options = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_RLE]
    return cv2.imencode(".png", pixels, [*options, cv2.IMWRITE_PNG_FILTER, row_filter])[1].tobytes()
