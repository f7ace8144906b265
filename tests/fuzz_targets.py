"""The readers of foreign bytes, each with valid inputs to start from; see :mod:`tests.fuzz`."""

from __future__ import annotations

import atexit
import io
import json
import pickle
import re
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image as Pillow

from generation.cut.prompts import PromptParams, load_bank, prompts_of
from manifests import pictures
from manifests.errors import FlawsmithError
from manifests.layouts import list_source
from manifests.recipes import GeneratorSettings
from manifests.schema import IMAGES, RECIPES, SAMPLES, Image, images_from, recipes_from, to_table
from manifests.shards import SHARD_KEY, pack, sample_json, unpack
from manifests.sources import SourceSettings, scan
from manifests.verify import verify_round
from manifests.workspace import Workspace, part
from tests.fuzz import NAMES, Target
from training.loading import ShardFile, read_all_samples
from workflows.config import load_config, parse_config, to_yaml
from workflows.finished import finished_record, unfinished
from workflows.rounds import vetoes
from workflows.stages import stored_prompts

RNG = np.random.default_rng(0)


def any_of(*readers: Callable[[], Any]) -> None:
    """Calls every reader; refused is what all of them refuse."""
    refused = []
    for read in readers:
        try:
            read()
        except FlawsmithError as error:
            refused.append(error)
    if len(refused) == len(readers):
        raise refused[0]


# -- pictures -------------------------------------------------------------------------------------------


def _saved(picture: Pillow.Image, format: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, format, **options)
    return sink.getvalue()


@cache
def picture_seeds() -> tuple[bytes, ...]:
    colour = Pillow.fromarray(RNG.integers(0, 256, (24, 20, 3), np.uint8))
    deep = RNG.integers(0, 65536, (16, 12, 3), np.uint16)
    modes = {mode: colour.convert(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr")}
    exif = Pillow.Exif()
    exif[274] = 6
    seeds = [_saved(modes[mode], "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")]
    seeds += [_saved(modes["P"], "PNG", transparency=3, interlace=1), _saved(colour, "PNG", exif=exif)]
    seeds += [pictures.encode(deep, "png"), pictures.encode(deep[:, :, :1], "png")]
    seeds += [_saved(colour, "PNG", save_all=True, append_images=[modes["L"].convert("RGB")])]
    seeds += [_saved(modes[mode], "JPEG") for mode in ("L", "RGB", "CMYK")]
    seeds += [_saved(colour, "JPEG", progressive=True, exif=exif), _saved(colour, "MPO")]
    seeds += [_saved(modes[mode], "BMP") for mode in ("1", "L", "P", "RGB", "RGBA")]
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"):
        seeds.append(_saved(colour, "TIFF", compression=compression))
    seeds += [_saved(modes[mode], "TIFF") for mode in ("1", "P", "LA", "RGBA", "CMYK", "YCbCr")]
    seeds += [_saved(Pillow.fromarray(deep[:, :, 0]), "TIFF")]
    seeds += [_saved(colour, "TIFF", save_all=True, append_images=[colour])]
    seeds += [_saved(colour, "WEBP", lossless=True), _saved(colour, "WEBP"), _saved(modes["RGBA"], "WEBP")]
    seeds += [_saved(colour, "WEBP", save_all=True, append_images=[modes["L"].convert("RGB")])]
    return tuple(seeds)


def check_picture(data: bytes, folder: Path) -> None:
    any_of(lambda: _decode(data), lambda: _mask(data), lambda: _place(data, folder))


def _decode(data: bytes) -> None:
    found = pictures.decode(data, name="x")
    height, width, channels = found.pixels.shape
    assert min(height, width) >= pictures.MIN_SIDE and height * width <= pictures.MAX_PIXELS
    assert (channels, found.mode) in ((1, "L"), (3, "RGB"))
    assert found.pixels.dtype == {8: np.uint8, 16: np.uint16}[found.bits]


def _mask(data: bytes) -> None:
    orientation = pictures.orientation_of(data, name="x")
    mask = pictures.decode_mask(data, name="x", shape=(24, 20), orientation=orientation)
    assert mask.shape == (24, 20) and mask.dtype == bool


def _place(data: bytes, folder: Path) -> None:
    (folder / "x.png").write_bytes(data)
    assert pictures.load_location(str(folder / "x.png"), (10, 12)).shape == (10, 12)


# -- masks of MVTec LOCO --------------------------------------------------------------------------------

BETWEEN = b"\n-- mask --\n"


def check_masks(data: bytes, folder: Path) -> None:
    """``defects_config.json`` and the masks of one picture."""
    config, *masks = data.split(BETWEEN)
    own = folder / "ground_truth" / "defect" / "000"
    own.mkdir(parents=True)
    (folder / pictures.DEFECTS_CONFIG).write_bytes(config)
    for at, mask in enumerate(masks):
        (own / f"{at}.png").write_bytes(mask)
    picture = _saved(Pillow.new("RGB", (20, 24)), "PNG")
    (folder / "x.png").write_bytes(picture)
    image = Image(
        "0" * 64, str(folder / "x.png"), pictures.sha256(picture), "part", "defect", str(own), 20, 24,
        "RGB", 8, "g", "feedback",
    )  # fmt: skip
    pictures._saturations.cache_clear()  # one path, many files
    pictures.read_mask(str(own), (24, 20))
    for mask, saturation in pictures.load_defects(image):
        assert mask.shape == (24, 20) and saturation >= 1


@cache
def mask_seeds() -> tuple[bytes, ...]:
    config = [
        {"defect_name": "a", "pixel_value": 255, "saturation_threshold": 0.5, "relative_saturation": True},
        {"defect_name": "b", "pixel_value": 254, "saturation_threshold": 20, "relative_saturation": False},
    ]
    masks = []
    for value in (255, 254):
        mask = np.zeros((24, 20), np.uint8)
        mask[4:9, 3:12] = value
        masks.append(_saved(Pillow.fromarray(mask), "PNG"))
    return (BETWEEN.join([json.dumps(config, indent=1).encode(), *masks]),)


# -- configuration --------------------------------------------------------------------------------------


def check_config(data: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(data)
    config = load_config(path)
    again = parse_config(yaml.safe_load(to_yaml(config)), name="again")
    assert again.model_dump(mode="json") == config.model_dump(mode="json")


CONFIGS = (
    b"source: pictures/bottle\nsamples: 300\nrounds: 2\n",
    b"""source:
  - path: bottles
    layout: mvtec
    category: bottle
    roi: roi.png
    mm_per_pixel: 0.1
    licence: CC0
    group: '^(part\\d+)'
    window: [0, 4095]
  - {path: list.csv, group: part}
seed: 7
shots: 4
generation:
  generators:
    perlin: {share: 2, params: {texture: procedural}, area: [0.01, 0.02]}
    cut: {share: 1, defect: scratch, prompt: a photo of a {object} with a scratch}
    band: {}
  area: [0.002, 0.08]
  severity: [0.2, 1.0]
  count: [1, 3]
  location: foreground
  attempts: 6
  gates: {leak: 0.1}
output: {shard_size: 16, format: png, bits: 16, max_side: null, normals: false}
detector: {name: onenip, preset: paper, settings: {steps: 10}, tiles: 0.25}
training: {earlier: 0.5, generators: {perlin: 0.5}}
evaluation: {resamples: 100, quantile: 0.99}
feedback: {trials: 16, enabled: true}
cluster: {workers: 2, memory_limit: 4GB, address: 'tcp://127.0.0.1:1'}
""",
    b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nsource: *c\n",
    b"source: &a [x]\ngeneration: {preset: draem, generators: {scar: &s {share: 1}, poisson: *s}}\n",
)

CONFIG_WORDS = (
    b"!!python/object/apply:os.system ['touch owned']", b"!!python/name:os.system", b"!!python/object/new:x",
    b"!!python/module:os", b"&a ", b"*a", b"<<: *a", b"\n  ", b": ", b"- ", b"[", b"]", b"{", b"}", b"'",
    b'"',
    b"|\n", b".nan", b"-.inf", b"1e999", b"-1", b"0", b"null", b"~", b"2001-13-45", b"2001-01-01", b"0o9",
    b"0b", b"1_0", b"9" * 5000, b"1:99:99", b"!!binary AAA", b"!!set {a}", b"!!omap [a: 1]", b"!!timestamp x",
    b"!!int x", b"!!float x", b"!!bool x", b"? ", b"~nobody/x", b"../../x", b"\0", b"pipe:touch owned",
    b"%YAML 1.1",
    b"---\n", b"\xff", b"\\x00", b"\xed\xa0\x80", b"\\ud800", b'"\\ud800"', b'"\\0"', b"[" * 2000,
    b"{a: " * 600, b"(a+)+$", b"(?P<a",
    b"generation:", b"generators:", b"preset:", b"source:", b"path:", b"roi:", b"params:", b"texture: folder",
    b"bank: x.json", b"defects: [crack]", b"cluster:", b"output:", b"textures:",
)  # fmt: skip


# -- tables ---------------------------------------------------------------------------------------------


def check_table(data: bytes, folder: Path) -> None:
    """The same bytes in the place of every table."""
    space = Workspace(str(folder / "ws"))
    for name in ("images.parquet", "review.parquet", part("samples", 0, 0, "parquet")):
        space.write_bytes(name, data)
    finished_record(space, 0, 0)  # never raises: a damaged record is no record
    unfinished(space, 0, 1, set())
    verify_round(space, 0, 1)  # never raises: damage is a finding
    any_of(
        lambda: images_from(space.read_table("images.parquet")),
        lambda: recipes_from(space.read_table(part("samples", 0, 0, "parquet"))),
        lambda: vetoes(space),
    )


@cache
def table_seeds() -> tuple[bytes, ...]:
    image = Image("ab", "x.png", "cd", "part", "good", None, 20, 24, "RGB", 8, "g", "train")
    recipe = {
        "sample_id": "000-00000-00000", "round": 0, "image_id": "ab", "category": "part",
        "generator": "scar", "defect": "scratch", "prompt": "p", "detail": "d", "area": 0.1, "severity": 0.5,
        "count": 1, "location": "anywhere", "donors": ["x"], "params": "{}", "seed": 5, "batch": 0,
        "shard": 0,
    }  # fmt: skip
    outcome = {
        "wanted_area": 0.1, "status": "accepted", "reason": "", "leak": 0.0, "hollow": 0.0, "contrast": 2.0,
        "measures": "", "attempts": 1, "offset": 0, "checksum": "00000000", "seconds": 0.1, "device": "cpu",
        "versions": "{}",
    }  # fmt: skip
    record = {
        "round": 0, "shard": 0, "path": part("shards", 0, 0, "tar"), "sha256": "00", "bytes": 10,
        "accepted": 1, "rejected": 0, "failed": 0, "fingerprint": "{}", "seconds": 1.0,
    }  # fmt: skip
    samples = to_table([recipe | outcome], SAMPLES).replace_schema_metadata({SHARD_KEY: json.dumps(record)})
    tables = [to_table([image] * 3, IMAGES), to_table([recipe], RECIPES), samples]
    tables.append(pa.table({"sample_id": ["000-00000-00000"]}))
    seeds = []
    for table in tables:
        for options in ({"compression": "zstd", "write_page_checksum": True}, {"compression": "none"}):
            sink = io.BytesIO()
            pq.write_table(table, sink, **options)
            seeds.append(sink.getvalue())
    for change in ({"path": "../../../etc/passwd"}, {"path": 3}, {"bytes": "x"}, {"path": "/etc/passwd"}):
        sink = io.BytesIO()
        changed = samples.replace_schema_metadata({SHARD_KEY: json.dumps(record | change)})
        pq.write_table(changed, sink, compression="none")
        seeds.append(sink.getvalue())
    return tuple(seeds)


# -- tars -----------------------------------------------------------------------------------------------


class Canary:
    """Unpickling it calls ``print``; the audit hook sees the look-up."""

    def __reduce__(self) -> Any:
        return print, ("owned",)


def check_tar(data: bytes, folder: Path) -> None:
    path = folder / "part-00000.tar"
    path.write_bytes(data)
    any_of(lambda: _unpack(data, path), lambda: _learn(path), lambda: _source(path))


def _unpack(data: bytes, path: Path) -> None:
    size = sum(len(member) for _, members in unpack(data, str(path)) for member in members.values())
    assert size <= len(data)


def _learn(path: Path) -> None:
    for sample in read_all_samples([ShardFile(str(path), 2)]):
        assert sample.mask.ndim == 2


def _source(path: Path) -> None:
    listing = list_source(str(path), "webdataset", None, None)
    if not listing.found:
        raise FlawsmithError("no sample in it")
    for found in listing.found:
        with suppress(FlawsmithError):
            pictures.decode(pictures.read_bytes(found.path), name=found.path)
        if found.mask_path:
            with suppress(FlawsmithError):
                pictures.read_mask(found.mask_path, (24, 20))


@cache
def tar_seeds() -> tuple[bytes, ...]:
    pixels = RNG.integers(0, 256, (24, 20, 3), np.uint8)
    mask = pictures.encode_mask(pixels[:, :, 0] > 128)
    record = sample_json({"category": "part", "image_id": "x"}, {"leak": 0.0}, {"backbone": "b"})
    features = io.BytesIO()
    np.save(features, np.ones((4, 24, 20), np.float16))
    objects = io.BytesIO()
    np.save(objects, np.array([Canary()], object), allow_pickle=True)
    harmful = pickle.dumps(Canary())
    own = pack(
        [
            ("a", {"image.webp": pictures.encode(pixels, "webp"), "mask.png": mask, "json": record}),
            ("b", {"feature.npy": features.getvalue(), "mask.png": mask, "json": record}),
        ]
    ).data
    pickles = {"pyd": harmful, "pickle": harmful, "pkl": harmful, "pth": harmful, "npy": objects.getvalue()}
    members = {"mask.png": mask, "json": record, "feature.npy": objects.getvalue(), **pickles}
    return (
        own,
        pack([("a", members), ("b", {"image.png": pictures.encode(pixels, "png"), **members})]).data,
        _foreign(tarfile.PAX_FORMAT, mask, record),
        _foreign(tarfile.GNU_FORMAT, mask, record),
        _compressed("w:gz", mask, record),
        _compressed("w:xz", mask, record),
    )


def _foreign(format: int, mask: bytes, record: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=format) as tar:
        for name, data in ((f"{'long' * 40}.png", mask), ("å/b.png", mask), ("å/b.json", record)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = {"comment": "x"} if format == tarfile.PAX_FORMAT else {}
            tar.addfile(info, io.BytesIO(data))
        for kind, target in ((tarfile.SYMTYPE, "/etc/passwd"), (tarfile.LNKTYPE, "../x")):
            link = tarfile.TarInfo("c.png")
            link.type, link.linkname = kind, target
            tar.addfile(link)
        for kind in (tarfile.GNUTYPE_SPARSE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            odd = tarfile.TarInfo("d.png")
            odd.type = kind
            tar.addfile(odd)
    return sink.getvalue()


def _compressed(mode: Any, mask: bytes, record: bytes) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as tar:
        for name, data in (("a.mask.png", mask), ("a.json", record)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


TAR_WORDS = (
    b"../../x.png", b"/etc/passwd", b"a.json", b"a.image.png", b"::", b"\x80\xff\xff\xff\xff\xff\xff\xff",
    b"\xff\xff\xff\xff\xff\xff\xff\x00", b"77777777777", b"-0000000001", b"x\0", b"g\0", b"L", b"K", b"S",
    b"2", b"1",
    b"0", b"GNU.sparse.major=1\n", b"22 GNU.sparse.minor=0\n", b"28 GNU.sparse.realsize=9e9\n",
    b"30 size=99999999999999999999\n", b"15 size=-1000\n", b"12 path=../x\n", b"0 \n", b"\0" * 512,
    b"GNU.sparse.map=0,1,2", b'{"recipe": 3}', b"[]", b"nan", b"\x80\x04\x95", b"\x93NUMPY", b"'|O'",
    b"ustar\0",
)  # fmt: skip


# -- lists ----------------------------------------------------------------------------------------------

KINDS = (b"csv", b"jsonl", b"parquet")


def check_list(data: bytes, folder: Path) -> None:
    """The first line says the kind."""
    kind, _, rest = data.partition(b"\n")
    suffix = kind if kind in KINDS else KINDS[len(kind) % 3]
    path = folder / f"list.{suffix.decode()}"
    path.write_bytes(rest)
    listing = list_source(str(path), "list", None, None)
    for found in listing.found:
        for name in filter(None, (found.path, found.mask_path)):
            if not name.startswith(("http", "s3", "gs", "gcs", "abfs", "az")):  # these would ask a server
                with suppress(FlawsmithError):
                    pictures.read_bytes(name)
    if not listing.found:
        raise FlawsmithError("no row can be used")


@cache
def list_seeds() -> tuple[bytes, ...]:
    rows = [
        {"path": "a.png", "category": "part", "split": "train", "group": "1", "mm_per_pixel": 0.5},
        {"path": "b.png", "defect": "crack", "mask_path": "m.png", "split": "test", "licence": "CC0"},
        {"path": "memory://x/y.png", "split": "calibration"},
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [",".join(columns), *(",".join(str(row.get(name, "")) for name in columns) for row in rows)]
    sink = io.BytesIO()
    table = pa.table({name: [str(row.get(name, "")) for row in rows] for name in columns})
    pq.write_table(table, sink, compression="none")
    return (
        b"csv\n" + "\n".join(lines).encode(),
        b"jsonl\n" + "\n".join(map(json.dumps, rows)).encode(),
        b"parquet\n" + sink.getvalue(),
    )


LIST_WORDS = (
    b"../../x.png", b"/etc/passwd", b"pipe:touch owned", b"pipe://touch owned",
    b"simplecache::file:///etc/passwd",
    b"reference://x::memory://y", b"dask://x", b"git://x", b"github://a:b@/x", b"local:///etc/passwd",
    b"tar://x::y",
    b"tar://../x::/etc/passwd", b"zip://x::file:///y", b"libarchive://x", b"hdfs://x", b"data:x", b"data://x",
    b"nosuch://x", b"://", b"::", b"file:///dev/zero", b"nan", b"inf", b"-1", b"1e999", b'"', b",", b"\r",
    b"\0",
    b"[" * 3000, b"{}", b"null", b'{"path": {}}', b'{"path": []}', b"\xff\xfe", b'"\\ud800"', b"\\u0000",
    b"9" * 5000, b"path", b"split", b"feedback", b"calibration", b"good",
)  # fmt: skip


# -- prompts --------------------------------------------------------------------------------------------


def check_prompts(data: bytes, folder: Path) -> None:
    """A bank file in either syntax, what a workspace keeps of one, and a typed prompt."""
    space = Workspace(str(folder / "ws"))
    space.write_bytes("rounds/000/prompts.json", data)
    text = data.decode("utf-8", "replace")

    def bank(suffix: str) -> None:
        path = folder / f"bank.{suffix}"
        path.write_bytes(data)
        _words_of(PromptParams(bank=str(path)), GeneratorSettings(), load_bank(path).entries[0].defect)

    any_of(
        lambda: bank("json"),
        lambda: bank("yaml"),
        lambda: [
            prompts.words("part", 0.01, 0.5, [0.3] * 6) for prompts in stored_prompts(space, 0).values()
        ],
        lambda: _words_of(PromptParams(), GeneratorSettings(prompt=text), "x"),
        lambda: _words_of(PromptParams(), GeneratorSettings(prompt=text, defect=text[:20]), "x"),
        lambda: _words_of(PromptParams(), GeneratorSettings(detail=text[:300]), text[:40]),
    )


def _words_of(params: PromptParams, settings: GeneratorSettings, category: str) -> None:
    for text in prompts_of(params, settings).words(category, 0.01, 0.5, [0.3] * 6):
        assert isinstance(text, str)


@cache
def prompt_seeds() -> tuple[bytes, ...]:
    entry = {
        "defect": "crack", "word": "crack", "synonyms": ["fissure"], "kinds": ["object"], "place": "line",
        "categories": ["bolt"], "prompts": ["a photo of a {object} with a {size} crack on it"],
        "details": ["a photo of a {object} with a {shape} crack, {severity}"],
        "size": ["tiny", "long"], "shape": ["bent"], "severity": ["deep"],
    }  # fmt: skip
    bank = {"version": 1, "origin": "x", "entries": [entry, {**entry, "defect": "hole", "categories": []}]}
    wording = {"defect": "a", "prompts": ["b"], "details": ["c"], "size": ["tiny"], "severity": ["deep"]}
    stored = {"cut": {"entries": [wording], "nouns": {"part": "nut"}, "params": {"words": {}}}}
    return (
        json.dumps(bank, indent=1).encode(),
        yaml.safe_dump(bank).encode(),
        json.dumps(stored).encode(),
        b"a photo of a {object} with a {size} scratch on it",
    )


PROMPT_WORDS = (
    b"{object}", b"{size}", b"{shape}", b"{0}", b"{object.__class__}", b"{", b"}", b"a photo of a ",
    b"scratch",
    b" " * 300, b"a " * 40, b"\0", b"\n", b"\xff", b"\\ud800", "ß".encode(), "ﬁ".encode(), "İ".encode(),
    b"(a+)+$",
    b"[" * 3000, b"NaN", b"null", b"[]", b"{}", b"true", b"!!python/name:os.system", b"&a", b"*a",
    b"9" * 5000,
    b'"version": 1', b'"entries":', b"\xe2\x80\xae", b"2001-13-45", b".inf",
)  # fmt: skip


# -- file names -----------------------------------------------------------------------------------------


def check_names(data: bytes, folder: Path) -> None:
    """Files and folders of any name: what a scan gives fits into the table of pictures, as text."""
    parts = [part[:200] for part in re.split(rb"[/\0\n]", data) if part not in (b"", b".", b"..")] or [b"x"]
    category, defect, stem = (parts * 3)[:3]
    for place, level in ((b"train/good", 3), (b"test/good", 5), (b"test/" + defect, 7)):
        own = bytes(folder) + b"/source/" + category + b"/" + place
        Path(own.decode(errors="surrogateescape")).mkdir(parents=True, exist_ok=True)
        pixels = np.full((8, 8, 3), level, np.uint8)
        pixels[0, 0] = 255
        with open(own + b"/" + stem + b".png", "wb") as file:
            file.write(pictures.encode(pixels, "png"))
    found = scan([SourceSettings(path=str(folder / "source"))])
    images = images_from(to_table(found.images, IMAGES))
    assert images == found.images
    for problem in found.problems:
        f"{problem.path}: {problem.what}; {problem.remedy}".encode()
    if not found.images:
        raise FlawsmithError("nothing was read: " + "; ".join(problem.what for problem in found.problems))


NAMES_SEEDS = (b"bottle/crack/000", b"<script>alert(1)</script>/x/y", "Schraube ä/Riß/1".encode())
NAMES_WORDS = (
    b"\xff", b"\xed\xa0\x80", b"::", b"tar://", b"file://", b"://", b"{a,b}", b"*", b"%s", b"{0}", b"~",
    b"$HOME",
    b"train", b"good", b"test", b"ground_truth", b"validation", b"_mask", b".png", b".", b"..", b" ", b"\t",
    b"\r",
    b"\x1b[31m", b"[red]", b"'", b'"', b"\\", "\u202e".encode(), "\u2028".encode(), b"__MACOSX", b"-rf",
    b"&", b";",
)  # fmt: skip


# -- report ---------------------------------------------------------------------------------------------


class Tags(HTMLParser):
    """How often each tag stands in a page, and each attribute that could run or fetch something."""

    def __init__(self, page: str):
        super().__init__()
        self.found: Counter[str] = Counter()
        self.scripts: dict[str, str] = {}
        self._script: str | None = None
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag] += 1
        for name, value in attrs:
            if name.startswith("on") or name in ("src", "href", "srcdoc", "action", "data", "style"):
                self.found[f"{tag} {name} {(value or '')[:5]}"] += 1
        self._script = dict(attrs).get("id") if tag == "script" else self._script

    def handle_endtag(self, tag: str) -> None:
        self._script = None if tag == "script" else self._script

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data


def check_report(data: bytes, folder: Path) -> None:
    """Every line a hostile name: the page has the elements that it has with harmless names, and no other."""
    names = [line.decode("utf-8", "replace") for line in data.split(b"\n")]
    hostile = Tags(_page(folder, names))
    plain = Tags(_page(folder, [f"name{at}" for at in range(len(names))]))
    assert hostile.found == plain.found, hostile.found - plain.found
    prompts = json.loads(hostile.scripts["data"])["samples"]["prompt"]
    assert set(names) <= set(prompts["values"] if isinstance(prompts, dict) else prompts)


def _page(folder: Path, names: list[str]) -> str:
    """A report that shows each name as category, defect, detector's setting, reason, prompt and decision."""
    from workflows.report.page import write_report

    shutil.copytree(_workspace(), folder / "ws", dirs_exist_ok=True)
    space = Workspace(str(folder / "ws"))
    samples = space.read_table(part("samples", 0, 0, "parquet"))
    row = samples.to_pylist()[0]
    rows = [
        {**row, "sample_id": f"000-00000-{at:05d}", "status": "rejected", "offset": -1, "prompt": name}
        | {"category": name, "defect": name, "generator": "scar", "detail": name, "reason": f"{at} {name}"}
        for at, name in enumerate(names)
    ]
    space.write_table(part("samples", 0, 0, "parquet"), to_table(rows, SAMPLES))
    for table, columns in (
        ("decisions", ("setting", "before", "after", "reason")),
        ("found", ("category", "defect")),
        ("metrics", ("category", "detector", "defect")),
    ):
        path = f"rounds/000/{table}.parquet"
        stored = space.read_table(path)
        first = stored.to_pylist()[0]
        own = [first | dict.fromkeys(columns, f"{at} {name}") for at, name in enumerate(names)]
        space.write_table(path, pa.Table.from_pylist(own, schema=stored.schema))
    return space.read_bytes(write_report(space, with_pictures=False)).decode()


@cache
def _workspace() -> Path:
    from tests.small_workspace import write_judgement, write_workspace
    from workflows.report.page import write_report

    folder = Path(tempfile.mkdtemp(prefix="report-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    space = write_workspace(folder)
    write_judgement(space)
    for name in ("rounds/001", "rounds/000/heatmaps.parquet"):
        path = Path(space.path(name))
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    write_report(space, with_pictures=False)  # imports what it needs, unwatched
    return Path(space.path(""))


_REPORT = (
    b"<script>window.owned = 1</script>", b"</script><script>owned = 1</script>",
    b"<img src=x onerror=owned=1>",
    b"\" onmouseover=\"owned=1", b"' onfocus='owned=1", b"<!--", b"-->", b"<svg/onload=owned=1>",
    b"{{ 7 * 7 }}",
    b"]]><script>", b"javascript:owned=1", b"</style><style>*{}", b"&lt;script&gt;", b"$$x$$", b"scratch",
)  # fmt: skip


def report_seeds() -> tuple[bytes, ...]:
    _workspace()
    return _REPORT


REPORT_WORDS = (
    b"<", b">", b"&", b'"', b"'", b"</", b"<!--", b"-->", b"script", b"</script", b"style", b"onload=",
    b"javascript:",
    b"&#60;", b"&lt", b"{{", b"}}", b"{%", b"%}", b"\\u003c", b"\\", b"\0", "\u2028".encode(),
    "\u202e".encode(),
    b"<![CDATA[", b"`", b"${", b"$$", b"\\(", b"\xff", b"=", b"/", b" ",
)  # fmt: skip

TABLE_WORDS = (b"PAR1", b"sample_id", b"\x15\x00", b"../x", b"\xff" * 8)
PICTURE_WORDS = (
    b"IHDR", b"IDAT", b"PLTE", b"tRNS", b"acTL", b"eXIf", b"zTXt", b"iCCP", b"IEND", b"\xff\xd8", b"\xff\xda",
    b"\xff\xe1", b"Exif\0\0", b"II*\0", b"MM\0*", b"RIFF", b"WEBP", b"VP8L", b"VP8X", b"ANMF", b"BM",
    b"\xff\xff\xff\xff", b"\x00\x00\x40\x00\x00\x00\x40\x00",
)  # fmt: skip
MASK_WORDS = (
    b"pixel_value", b"255", b"[]", b"{}", b"NaN", b"Infinity", b"1e999", b"null", b'"x"', BETWEEN, b"-1",
    b"9" * 5000, b"[" * 3000, b"true", b"\xff",
)  # fmt: skip

TARGETS = {
    "config": Target(check_config, lambda: CONFIGS, CONFIG_WORDS, reads_anywhere=True),
    "tables": Target(check_table, table_seeds, TABLE_WORDS),
    "tars": Target(check_tar, tar_seeds, TAR_WORDS),
    "pictures": Target(check_picture, picture_seeds, PICTURE_WORDS),
    "masks": Target(check_masks, mask_seeds, MASK_WORDS),
    "lists": Target(check_list, list_seeds, LIST_WORDS, reads_anywhere=True),
    "prompts": Target(check_prompts, prompt_seeds, PROMPT_WORDS),
    "names": Target(check_names, lambda: NAMES_SEEDS, NAMES_WORDS),
    "report": Target(check_report, report_seeds, REPORT_WORDS, at_once=50, reads_anywhere=True),
}
assert tuple(TARGETS) == NAMES
