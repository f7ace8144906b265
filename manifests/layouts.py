"""The ways pictures lie on a disk: which file is which picture, mask, category and defect.

Nothing is decoded here. Every listing is in an order of its own names, never of the directory.

* ``mvtec``: any folder below the path that holds ``train/good`` is a category; ``test/good`` and
  ``test/<defect>`` beside it are judged; masks are ``ground_truth/<defect>/<stem>_mask.png``,
  ``<stem>.png``, or, as in MVTec LOCO, all pictures in ``<stem>/``, one a defect. Where there is
  ``validation/good``, it is the calibration split and all of ``train/good`` the train split.
* ``folder``: every picture below the path is a normal one.
* ``list``: CSV, JSONL or Parquet with the column ``path`` and, where wanted, ``category, defect, mask_path,
  split, group, licence, mm_per_pixel``; paths are relative to the list. ``split`` is ``train`` or ``test``
  (the other half of each is then chosen), or, where a list names ``calibration`` or ``feedback``, final.
* ``webdataset``: a tar, a folder of tars or a brace pattern; ``image.png`` or ``png`` (or another picture
  extension) is the picture, ``mask.*`` its mask, ``json`` may hold the list's columns.
"""

from __future__ import annotations

import csv
import io
import os
import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import braceexpand
import pyarrow as pa
import pyarrow.parquet as pq

from manifests.errors import UsageError
from manifests.pictures import EXTENSIONS, open_file, read_bytes
from manifests.plain import from_json
from manifests.schema import GOOD
from manifests.storage import Unreachable

Layout = Literal["auto", "mvtec", "folder", "list", "webdataset"]

LISTS = (".csv", ".jsonl", ".parquet")
_SPLITS = ("train", "test", "calibration", "feedback")
_RESERVED = {"category": "mean", "defect": "all"}  # by which tables of figures call what is over all
_MAX_JSON = 2**20


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing to put right. An ``error`` leaves the picture out, a ``warning`` does not."""

    level: Literal["error", "warning"]
    path: str
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Found:
    """One picture as the source describes it; ``split`` is ``train`` or ``test`` unless ``final``."""

    path: str
    relative: str
    category: str
    defect: str
    split: str
    mask_path: str | None = None
    final: bool = False
    group: str | None = None
    licence: str | None = None
    mm_per_pixel: float | None = None


@dataclass(frozen=True, slots=True)
class Listing:
    found: list[Found] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def list_source(path: str, layout: Layout, category: str | None, group: str | None) -> Listing:
    """All pictures of one source.

    Args:
        category: overrides the category's name, where the source has only one.
        group: for lists, the column that names the group.

    Raises:
        UsageError: the path is missing, or nothing there fits the layout.
    """
    if "://" not in path and "{" not in path and not os.path.exists(path):
        raise UsageError(f"{path}: there is no such file or folder; correct the source's path")
    return _named_apart(_in_text(_list(path, layout, category, group)))


def _list(path: str, layout: Layout, category: str | None, group: str | None) -> Listing:
    path = path if "://" in path else os.path.abspath(path)  # tables outlive the working directory
    layout = recognise(path) if layout == "auto" else layout
    if layout == "list":
        return _list_table(path, category, group)
    if layout == "webdataset":
        return _list_shards(path, category)
    if not os.path.isdir(path):
        raise UsageError(f"{path}: layout {layout} needs a local folder; correct the path or the layout")
    return _list_mvtec(path, category) if layout == "mvtec" else _list_folder(path, category)


def shown(text: str) -> str:
    """A file's name as text that any table and terminal takes; what is not UTF-8 becomes ``\\udc..``."""
    return text.encode("utf-8", "backslashreplace").decode()


def _in_text(listing: Listing) -> Listing:
    """Without the files whose names are not UTF-8: no table can hold them."""
    found: list[Found] = []
    problems = [replace(one, path=shown(one.path), what=shown(one.what)) for one in listing.problems]
    for one in listing.found:
        texts = (one.path, one.mask_path or "", one.category, one.defect, one.group or "", one.licence or "")
        if all(text == shown(text) for text in texts):
            found.append(one)
        else:
            what = "its name, or that of its mask or group, is not UTF-8"
            problems.append(Problem("error", shown(one.path), what, "rename the file or folder"))
    return Listing(found, problems)


def _named_apart(listing: Listing) -> Listing:
    """Without the pictures whose category or defect has a name that means something else in tables."""
    found, problems = listing.found, list(listing.problems)
    for label, name in _RESERVED.items():
        taken = [one.path for one in found if getattr(one, label) == name]
        if taken:
            what = f"tables call what is over all {name!r}: no name for a {label} ({len(taken)} pictures)"
            problems.append(Problem("error", taken[0], what, "rename its folder, or correct the list"))
            found = [one for one in found if getattr(one, label) != name]
    return Listing(found, problems)


def recognise(path: str) -> Layout:
    """The layout that fits a path.

    Raises:
        UsageError: none does; the message says what was looked for.
    """
    if path.lower().endswith(LISTS):
        return "list"
    if path.lower().endswith(".tar"):
        return "webdataset"
    files = 0
    pictures = shards = False
    folders = set()
    for folder, names in walk(path):
        if _is_category(folder, Path(path)):
            return "mvtec"
        folders.add(folder.relative_to(path).name.lower())
        files += len(names)
        pictures = pictures or any(_is_picture(name) for name in names)
        shards = shards or (folder == Path(path) and any(name.endswith(".tar") for name in names))
    if not shards and pictures and (folders >= {"train", "test"} or "ground_truth" in folders):
        raise UsageError(
            f"{path}: it has folders as MVTec AD's, but no train/{GOOD} with the good parts, so its defects "
            f"would pass for good ones; rename the folders to train/{GOOD}, test/... and ground_truth/... in "
            "small letters, or set layout: folder if every picture below it is of a good part"
        )
    if shards or pictures:
        return "webdataset" if shards else "folder"
    raise UsageError(
        f"{path}: no source found among {files} files, looking for a folder with train/{GOOD} (mvtec), tar "
        f"files (webdataset), pictures ({', '.join(sorted(EXTENSIONS))}) or a path that ends in "
        f"{', '.join(LISTS)}; correct the path"
    )


def _is_category(folder: Path, top: Path) -> bool:
    """Whether ``folder`` is the train/good of a category that lies in ``top``, which may be the category."""
    return folder.parts[-2:] == ("train", GOOD) and folder.parent.parent.is_relative_to(top)


def walk(path: str | Path) -> Iterator[tuple[Path, list[str]]]:
    """Folders and their file names, sorted; hidden ones are left out, links followed once."""
    seen = set()
    for folder, folders, names in os.walk(path, followlinks=True, onerror=_unlisted):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        yield Path(folder), sorted(name for name in names if not name.startswith("."))


def _unlisted(error: OSError) -> None:
    if isinstance(error, FileNotFoundError):
        return  # a category without test or ground_truth
    remedy = "name its folder" if isinstance(error, NotADirectoryError) else "check its permissions"
    raise UsageError(f"{error.filename}: the folder cannot be listed ({error.strerror}); {remedy}")


def _is_picture(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _pictures_below(root: Path, below: Path, ignored: Counter[str]) -> list[Path]:
    """Relative paths of all pictures below a folder; other files are counted by extension."""
    pictures = []
    for folder, names in walk(root / below):
        for name in names:
            if _is_picture(name) and not (folder / name).is_fifo():  # which nobody may ever write to
                pictures.append((folder / name).relative_to(root))
            else:
                ignored[os.path.splitext(name)[1].lower() or name] += 1
    return pictures


def _ignored(path: str, counts: Counter[str]) -> list[Problem]:
    if not counts:
        return []
    kinds = ", ".join(f"{number} × {kind}" for kind, number in sorted(counts.items()))
    return [
        Problem(
            "warning", path, f"files that are not pictures are ignored: {kinds}", "remove or convert them"
        )
    ]


# --- folders -------------------------------------------------------------------------------------------


def _list_folder(path: str, category: str | None) -> Listing:
    ignored: Counter[str] = Counter()
    folder = Path(path)
    # The good pictures alone of a category: train/good would be no name for it.
    own = folder.parent.parent if folder.parts[-2:] == ("train", GOOD) else folder
    name = category or own.name
    found = [
        Found(str(folder / file), file.as_posix(), name, GOOD, "train")
        for file in _pictures_below(folder, Path(), ignored)
    ]
    return Listing(found, _ignored(path, ignored))


def _list_mvtec(path: str, category: str | None) -> Listing:
    top = Path(path)
    roots = [folder.parent.parent for folder, _ in walk(top) if _is_category(folder, top)]
    if not roots:
        raise UsageError(
            f"{path}: no folder train/{GOOD} below it; correct the path or choose another layout"
        )
    if category and len(roots) > 1:
        raise UsageError(
            f"{path}: category {category} is set, but {len(roots)} categories are there; unset it"
        )
    names = Counter(root.name for root in roots)
    result = Listing()
    ignored: Counter[str] = Counter()
    outside = sum(_is_picture(name) for _, files in walk(top) for name in files)
    for root in roots:
        name = root.name
        if names[name] > 1 and root != top:
            name = "_".join(root.relative_to(top).parts)
        outside -= _list_category(top, root, category or name, result, ignored)
    result.problems.extend(_ignored(path, ignored))
    if outside:
        places = f"train/{GOOD}, validation/{GOOD}, test/* and ground_truth/*"
        what = f"{outside} pictures outside {places} are ignored"
        result.problems.append(
            Problem("warning", path, what, "name them as a source of their own if they matter")
        )
    return result


def _list_category(top: Path, root: Path, category: str, result: Listing, ignored: Counter[str]) -> int:
    """Add one category; returns how many picture files it accounts for."""
    masks = {
        file.relative_to("ground_truth").with_suffix(""): file
        for file in _pictures_below(root, Path("ground_truth"), ignored)
    }
    unused = set(masks)
    in_folders: dict[Path, list[Path]] = defaultdict(list)
    for key in masks:
        in_folders[key.parent].append(key)
    validation = _pictures_below(root, Path("validation", GOOD), ignored)
    pictures = _pictures_below(root, Path("train", GOOD), ignored) + validation
    pictures += _pictures_below(root, Path("test"), ignored)
    for file in pictures:
        split, defect = file.parts[:2]
        if len(file.parts) < 3:
            what = "lies directly in test/"
            result.problems.append(
                Problem("error", str(root / file), what, "move it to test/good or test/<defect>")
            )
            continue
        stem = file.relative_to(split).with_suffix("")
        named = [
            key for key in (stem.with_name(stem.name + "_mask"), stem) if split == "test" and key in masks
        ]
        unused.difference_update(named[:1])
        mask = str(root / masks[named[0]]) if named else None
        if split == "test" and not named and stem in in_folders:
            unused.difference_update(in_folders[stem])
            mask = str(root / "ground_truth" / stem)
        relative = (root / file).relative_to(top).as_posix()
        if split == "validation":
            split = "calibration"
        final = bool(validation) and split != "test"
        result.found.append(Found(str(root / file), relative, category, defect, split, mask, final))
    for key in sorted(unused):
        what = f"a mask without picture: test/{key.as_posix().removesuffix('_mask')}.* is missing"
        result.problems.append(
            Problem("error", str(root / masks[key]), what, "add the picture or remove the mask")
        )
    return len(pictures) + len(masks)


# --- lists ---------------------------------------------------------------------------------------------


def _list_table(path: str, category: str | None, group: str | None) -> Listing:
    rows = _read_rows(path)
    columns = {name for row in rows for name in row}
    missing = [name for name in ("path", *([group] if group else [])) if name not in columns]
    if missing:
        there = ", ".join(sorted(map(str, columns))) or "none"
        raise UsageError(
            f"{path}: no column {', '.join(missing)}; it has {there}; add it or correct its name"
        )
    final = any(row.get("split") in ("calibration", "feedback") for row in rows)
    folder = path.rpartition("/")[0] if "/" in path else "."
    default = category or PurePosixPath(path).stem
    result = Listing()
    for number, row in enumerate(rows, start=1):
        try:
            result.found.append(_from_row(row, folder, default, group or "group", final))
        except ValueError as error:
            problem = Problem("error", path, f"row {number}: {error}", "correct the row or remove it")
            result.problems.append(problem)
    return result


def _read_rows(path: str) -> list[dict[str, Any]]:
    try:
        data = read_bytes(path, limit=2**31)
        if path.lower().endswith(".parquet"):
            return _parquet_rows(data)
        text = data.decode("utf-8-sig")
        if path.lower().endswith(".csv"):
            return list(csv.DictReader(io.StringIO(text, newline="")))
        rows = [from_json(line) for line in text.splitlines() if line.strip()]
    except (ValueError, csv.Error, pa.ArrowException) as error:
        raise UsageError(
            f"{path}: the list cannot be read ({error}); expected CSV, JSONL or Parquet"
        ) from error
    if not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}: every line must be a JSON object; correct the list")
    return rows


def _parquet_rows(data: bytes) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(pa.BufferReader(data))
        table.validate(full=True)
    except OSError as error:  # of damaged bytes; nothing is read from a disk here
        raise ValueError(str(error)) from error
    return table.to_pylist()


def _from_row(row: dict[str, Any], folder: str, category: str, group: str, final: bool) -> Found:
    file = _text(row, "path")
    if file is None:
        raise ValueError("path is empty")
    mask = _text(row, "mask_path")
    return Found(
        path=_below(folder, file),
        relative=file,
        mask_path=_below(folder, mask) if mask else None,
        final=final,
        **_labels(row, category, group),
    )


def _labels(row: dict[str, Any], category: str, group: str) -> dict[str, Any]:
    """What a list's row or a shard's json says of one picture, checked; the same names in both."""
    defect = _text(row, "defect") or GOOD
    split = _text(row, "split") or ("train" if defect == GOOD else "test")
    if split not in _SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(_SPLITS)}")
    if defect != GOOD and split in ("train", "calibration"):
        raise ValueError(
            f"a picture with defect {defect!r} is in split {split}; real defects are for judging"
        )
    scale = _text(row, "mm_per_pixel")
    if scale is not None and not float(scale) > 0:
        raise ValueError(f"mm_per_pixel is {scale}, expected a positive number")
    return {
        "category": _text(row, "category") or category,
        "defect": defect,
        "split": split,
        "group": _text(row, group),
        "licence": _text(row, "licence"),
        "mm_per_pixel": float(scale) if scale is not None else None,
    }


def _text(row: dict[str, Any], name: str) -> str | None:
    value = row.get(name)
    return None if value is None or str(value).strip() in ("", "nan") else str(value).strip()


def _below(folder: str, file: str) -> str:
    return file if "://" in file or os.path.isabs(file) else f"{folder}/{file}"


# --- shards --------------------------------------------------------------------------------------------


def _list_shards(path: str, category: str | None) -> Listing:
    if os.path.isdir(path):
        archives = [str(Path(path) / name) for name in sorted(os.listdir(path)) if name.endswith(".tar")]
        default = Path(path).name
    else:
        archives = sorted(braceexpand.braceexpand(path))
        default = re.sub(r"[-_.]?\d*$", "", PurePosixPath(archives[0]).stem)
    if not archives:
        raise UsageError(f"{path}: no tar file in it; correct the path or choose another layout")
    result = Listing()
    for archive in archives:
        _list_archive(archive, category or default or "shards", result)
    return result


def _list_archive(archive: str, category: str, result: Listing) -> None:
    samples: dict[str, dict[str, str]] = defaultdict(dict)
    texts: dict[str, bytes] = {}

    def problem(path: str, what: str, remedy: str) -> None:
        result.problems.append(Problem("error", path, what, remedy))

    try:
        with open_file(archive) as file:
            for tar, member in _members(file):
                name = member.name
                parts = PurePosixPath(name).parts
                if name.startswith("/") or ".." in parts or "::" in name or not member.isfile():
                    problem(
                        archive, f"member {name!r} is refused", "pack plain files under plain relative names"
                    )
                    continue
                stem, dot, extension = parts[-1].partition(".")
                key = str(PurePosixPath(name).with_name(stem)) if dot and stem else name
                samples[key][extension.lower()] = name
                if extension.lower() == "json" and member.size <= _MAX_JSON:
                    reader = tar.extractfile(member)
                    texts[key] = reader.read() if reader else b""
    except (tarfile.TarError, ValueError, OverflowError) as error:
        what = f"the tar is damaged or cut short after {len(samples)} samples ({error}); all are left out"
        problem(archive, what, "restore it or pack it again")
        return
    except Unreachable:
        raise
    except OSError as error:
        problem(
            archive,
            f"the tar cannot be read ({error.strerror or error})",
            "restore it or correct the pattern",
        )
        return
    for key, names in samples.items():
        picture = _member_of(names, ("image.", ""))
        mask = _member_of(names, ("mask.",))
        if picture is None:
            problem(
                archive, f"sample {key} has no picture", "pack a picture as image.png, or remove the sample"
            )
            continue
        try:
            row = from_json(texts.get(key, b"{}"))
            if not isinstance(row, dict):
                raise ValueError("its json is not an object")
            if mask and _text(row, "defect") is None:
                row["defect"] = "defect"
            labels = _labels(row, category, "group")
        except ValueError as error:
            problem(archive, f"sample {key}: {error}", "correct its json")
            continue
        result.found.append(
            Found(
                path=f"tar://{picture}::{archive}",
                relative=f"{PurePosixPath(archive).name}/{picture}",
                mask_path=f"tar://{mask}::{archive}" if mask else None,
                **labels,
            )
        )


def _member_of(names: dict[str, str], prefixes: tuple[str, ...]) -> str | None:
    for prefix in prefixes:
        for extension in sorted(EXTENSIONS):
            if prefix + extension[1:] in names:
                return names[prefix + extension[1:]]
    return None


def _members(file: Any) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Members of a tar that is whole; :mod:`tarfile` itself ends silently at a damaged header."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            if not member.isdir():
                yield tar, member
        file.seek(tar.offset)
        if file.read(512) != bytes(512):
            raise tarfile.ReadError(f"no end mark at byte {tar.offset:,}")
