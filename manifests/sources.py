"""Sources to pictures: everything is read once, every problem is listed, every picture gets its split."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, field_validator

from manifests import pictures
from manifests.errors import FlawsmithError, PictureError, UsageError
from manifests.layouts import LISTS, Found, Layout, Listing, Problem, list_source, shown
from manifests.schema import GOOD, Image
from manifests.shots import choose_shots, missing_shots
from manifests.splits import assign_splits, side
from manifests.storage import Unreachable

__all__ = ["Problem", "Scan", "SourceSettings", "assign_splits", "scan", "scan_textures"]

_THREADS = 3


class SourceSettings(BaseModel):
    """Where pictures come from and what holds for all of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(description="folder, list, tar, folder of tars or brace pattern")
    layout: Layout = "auto"
    category: str | None = Field(
        default=None, description="name of the category, where the source has only one"
    )
    roi: str | None = Field(
        default=None, description="region of interest: a mask, or a folder with <stem>.png"
    )
    ignore: str | None = Field(
        default=None, description="places to leave alone: a mask, or a folder with <stem>.png"
    )
    mm_per_pixel: float | None = Field(default=None, gt=0)
    licence: str | None = None
    group: str | None = Field(
        default=None,
        description="regular expression searched in the picture's path below the source; its first group, or "
        "else the match, names the group. For lists: a column",
    )
    window: tuple[int, int] | None = Field(default=None, description="16-bit levels mapped to 0 and 1")
    max_pixels: int = Field(default=pictures.MAX_PIXELS, gt=0)

    @field_validator("window")
    @classmethod
    def _window_in_order(cls, window: tuple[int, int] | None) -> tuple[int, int] | None:
        if window is not None and not 0 <= window[0] < window[1] <= 65535:
            raise ValueError(f"expected 0 <= low < high <= 65535, found {window}")
        return window

    @field_validator("group")
    @classmethod
    def _group_compiles(cls, group: str | None) -> str | None:
        try:
            re.compile(group or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return group


@dataclass(frozen=True)
class Scan:
    """What the sources hold.

    Attributes:
        images: the usable pictures, sorted by category, train side before test side, and path.
        problems: everything found, errors first.
        fatal: the run cannot go on: a source is missing or unrecognised, no category has a normal picture
            to train on, one has fewer than the shots asked for, or the same picture is in train and test.
    """

    images: list[Image]
    problems: list[Problem]
    fatal: bool


@dataclass(frozen=True, slots=True)
class _Read:
    source: int
    final: bool
    image: Image
    levels: tuple[int, int]  # smallest and largest sample


def scan(
    sources: Sequence[SourceSettings],
    previous: Sequence[Image] = (),
    progress: Callable[[int, int], None] | None = None,
    *,
    shots: int | None = None,
    seed: int = 0,
) -> Scan:
    """Read every picture of every source once.

    A picture with an error is left out of ``images``. Of pictures with equal pixels the first is kept.

    Args:
        previous: the images of an earlier scan; their groups keep their split and their sources their
            16-bit window.
        progress: called with (pictures read, pictures in all).
        shots: normals of each category that are used, all of them to train; the others are not even read.
            None: all of them, some to calibrate.
        seed: chooses the shots.
    """
    problems: list[Problem] = []
    found: list[tuple[int, Found]] = []
    fatal = not sources
    for number, source in enumerate(sources):
        try:
            listing = _listing(source)
        except FlawsmithError as error:
            problems.append(_problem(source.path, error))
            fatal = True
            continue
        problems += listing.problems
        found += [(number, item) for item in listing.found]
        if not listing.found:
            problems.append(
                Problem("error", source.path, "the source has no usable picture", "correct its path")
            )

    if shots is not None:
        found = choose_shots(found, shots, seed)
    read: list[_Read] = []
    with ThreadPoolExecutor(_THREADS) as pool:
        results = pool.map(lambda item: _read(item[0], sources[item[0]], item[1]), found)
        for done, (one, troubles) in enumerate(results, start=1):
            problems += troubles
            if one is not None:
                read.append(one)
            if progress is not None:
                progress(done, len(found))

    read.sort(key=lambda one: (one.image.category, side(one.image.split), one.image.path))
    read, troubles, leaked = _without_duplicates(read)
    problems += troubles
    wanting = missing_shots([one.image for one in read], shots) if shots is not None else []
    problems += wanting
    read, troubles = _judged_categories(read)
    problems += troubles
    fatal = fatal or leaked or bool(wanting) or not read

    final = frozenset(one.image.image_id for one in read if one.final)
    placed = assign_splits([one.image for one in read], previous, final)
    read = [replace(one, image=image) for one, image in zip(read, placed, strict=True)]
    # Earlier windows may come from the levels of normals that are no shots.
    images, troubles = _with_windows(read, sources, previous if shots is None else ())
    problems += troubles
    problems.sort(key=lambda problem: problem.level)
    return Scan(images, problems, fatal)


def scan_textures(path: str) -> list[Image]:
    """The pictures of a folder of textures, as images of category ``texture`` in split ``train``.

    Raises:
        UsageError: no such folder, or no picture in it.
        PictureError: some cannot be used; all of them are named.
    """
    source = SourceSettings(path=path, layout="folder", category="texture")
    with ThreadPoolExecutor(_THREADS) as pool:
        listing = _listing(source)
        results = list(pool.map(lambda item: _read(0, source, item), listing.found))
    problems = [problem for problem in listing.problems if problem.level == "error"]
    problems += [problem for _, some in results for problem in some]
    troubles = [f"{problem.path}: {problem.what}; {problem.remedy}" for problem in problems]
    if troubles:
        raise PictureError("\n".join(troubles))
    textures = {one.image.image_id: one.image for one, _ in reversed(results) if one is not None}
    if not textures:
        raise UsageError(f"{path}: no picture in the folder of textures; correct the path")
    return sorted(textures.values(), key=lambda image: image.path)


# --- reading -------------------------------------------------------------------------------------------


def _is_list(source: SourceSettings) -> bool:
    return source.layout == "list" or (source.layout == "auto" and source.path.lower().endswith(LISTS))


def _listing(source: SourceSettings) -> Listing:
    for name in ("roi", "ignore"):
        location = getattr(source, name)
        if location is not None and not os.path.exists(location):
            raise UsageError(
                f"{location}: there is no such {name} file or folder; correct the source's {name}"
            )
    return list_source(
        source.path, source.layout, source.category, source.group if _is_list(source) else None
    )


def _problem(path: str, error: FlawsmithError) -> Problem:
    """Messages read ``path: what; remedy``."""
    text, path = shown(str(error)), shown(path)
    where, colon, rest = text.partition(": ")
    what, _, remedy = (rest if colon else text).rpartition("; ")
    return Problem(
        "error", where if colon else path, what or remedy, remedy if what else "correct the source"
    )


def _read(number: int, source: SourceSettings, found: Found) -> tuple[_Read | None, list[Problem]]:
    try:
        data = pictures.read_bytes(found.path)
        decoded = pictures.decode(data, name=found.path, max_pixels=source.max_pixels)
        shape = decoded.pixels.shape[:2]
        mask_path = found.mask_path and _checked_mask(found, found.mask_path, shape, decoded.orientation)
        roi, ignore = location_of(source.roi, found.path), location_of(source.ignore, found.path)
        _check_locations(found.path, roi, ignore, shape)
    except PictureError as error:
        return None, [_problem(found.path, error)]
    except Unreachable:
        raise  # a picture must not be left out of a run because its store did not answer for a while
    except OSError as error:
        what = f"cannot be read at the moment ({error})"
        return None, [Problem("error", found.path, what, "check the disk or the network and try again")]
    image_id = pictures.pixel_hash(decoded.pixels)
    group, warnings = found.group, []
    if group is None and source.group is not None and not _is_list(source):
        match = re.search(source.group, found.relative)
        group = match and (match[1] if match.re.groups else match[0])
        if not group:
            what = f"the group pattern {source.group!r} does not match {found.relative!r}"
            warnings = [
                Problem("warning", found.path, what, "correct the pattern; the picture is its own group")
            ]
    image = Image(
        image_id=image_id,
        path=found.path,
        sha256=pictures.sha256(data),
        category=found.category,
        defect=found.defect,
        mask_path=mask_path,
        width=shape[1],
        height=shape[0],
        mode=decoded.mode,
        bits=decoded.bits,
        group=group or image_id,
        split=found.split,
        licence=found.licence or source.licence,
        mm_per_pixel=found.mm_per_pixel or source.mm_per_pixel,
        roi_path=roi,
        ignore_path=ignore,
    )
    levels = (int(decoded.pixels.min()), int(decoded.pixels.max()))
    return _Read(number, found.final, image, levels), warnings


def _checked_mask(found: Found, path: str, shape: tuple[int, int], orientation: int) -> str | None:
    mask = pictures.read_mask(path, shape, orientation)
    if found.defect == GOOD:
        if mask.any():
            raise PictureError(f"{path}: a normal picture with a mask that is not empty; correct the label")
        return None
    if not mask.any():
        raise PictureError(
            f"{path}: the mask of a defect picture is empty; draw the defect or correct the label"
        )
    return path


def check_masks(roi: Path | None, ignore: Path | None) -> None:
    """Refuses masks of places that are not there.

    Raises:
        UsageError: so it is.
    """
    for option, location in (("--roi", roi), ("--ignore", ignore)):
        if location is not None and not location.exists():
            raise UsageError(f"{option} {location}: there is no such file or folder; name a mask")


def location_of(setting: str | None, path: str) -> str | None:
    """The region of interest or ignore mask of one picture: the one file for all, or the picture's own in a
    folder.

    Raises:
        PictureError: it is not in the folder.
    """
    if setting is None or not os.path.isdir(setting):
        return setting and os.path.abspath(setting)
    name = os.path.basename(path.partition("::")[0])
    stem = name.partition(".")[0] if "::" in path else os.path.splitext(name)[0]
    own = os.path.join(os.path.abspath(setting), f"{stem}.png")
    if not os.path.exists(own):
        raise PictureError(f"{own}: the picture's mask of places is missing; add it or name one file for all")
    return own


def _check_locations(path: str, roi: str | None, ignore: str | None, shape: tuple[int, int]) -> None:
    allowed = pictures.load_location(roi, shape) if roi else None
    ignored = pictures.load_location(ignore, shape) if ignore else None
    if allowed is not None and not (allowed & ~ignored if ignored is not None else allowed).any():
        raise PictureError(f"{path}: its region of interest leaves no place; draw it anew")
    if allowed is None and ignored is not None and ignored.all():
        raise PictureError(f"{path}: its ignore mask leaves no place; draw it anew")


# --- what all pictures together must satisfy -----------------------------------------------------------


def _without_duplicates(read: list[_Read]) -> tuple[list[_Read], list[Problem], bool]:
    """One picture of each content; whether one content is in train and test."""
    same: dict[str, list[_Read]] = defaultdict(list)
    for one in read:
        same[one.image.image_id].append(one)
    kept, problems, leaked = [], [], False
    for ones in same.values():
        first = ones[0].image
        if len({side(one.image.split) for one in ones}) > 1:
            other = next(one.image for one in ones if side(one.image.split) == "test")
            what = f"the same picture is in train and, as {other.path}, in test"
            problems.append(Problem("error", first.path, what, "remove it from one of them"))
            leaked = True
            continue
        labels = sorted({one.image.defect for one in ones})
        if len(labels) > 1:
            what = f"the same picture is {' and '.join(labels)} ({', '.join(one.image.path for one in ones)})"
            problems.append(Problem("error", first.path, what, "keep the one with the right label"))
            continue
        kept.append(ones[0])
        for one in ones[1:]:
            what = f"the same picture as {first.path}, which is kept"
            problems.append(Problem("warning", one.image.path, what, "remove one of them"))
    return kept, problems, leaked


def _judged_categories(read: list[_Read]) -> tuple[list[_Read], list[Problem]]:
    """The categories that can be trained on, and what is wanting in each."""
    categories: dict[str, list[Image]] = defaultdict(list)
    for one in read:
        categories[one.image.category].append(one.image)
    problems: list[Problem] = []
    usable = set()
    for category, images in sorted(categories.items()):

        def warn(what: str, remedy: str, category: str = category) -> None:
            problems.append(Problem("warning", category, what, remedy))

        normals = [image for image in images if side(image.split) == "train"]
        judged = [image for image in images if side(image.split) == "test"]
        defects = [image for image in judged if image.defect != GOOD]
        if not normals:
            what = f"the category has {len(judged)} test pictures but no usable normal picture to train on"
            problems.append(Problem("error", category, what, "add normal pictures; the category is left out"))
            continue
        usable.add(category)
        if len(normals) == 1:
            warn("the category has only one normal picture", "add normal pictures; more than 20 are usual")
        if defects and len(defects) == len(judged):
            warn(
                "defect pictures but no normal one under test",
                "add normal test pictures, or no rate can be judged",
            )
        without = [image for image in defects if image.mask_path is None]
        if without and len(without) == len(defects):
            warn(
                f"none of {len(defects)} defect pictures has a mask",
                "add masks, or judge at image level only",
            )
        else:
            for image in without:
                what = "a defect picture without mask"
                remedy = "add its mask, or it is judged at image level only"
                problems.append(Problem("warning", image.path, what, remedy))
        for group in sorted({image.group for image in normals} & {image.group for image in judged}):
            warn(f"group {group} is in train and in test", "keep pictures of one part on one side")
    return [one for one in read if one.image.category in usable], problems


def _with_windows(
    read: list[_Read], sources: Sequence[SourceSettings], previous: Sequence[Image]
) -> tuple[list[Image], list[Problem]]:
    """Give all 16-bit pictures of a source one window: set, kept, or the levels of its train split."""
    earlier = {image.image_id: image.window for image in previous if image.window is not None}
    windows: dict[int, tuple[int, int]] = {}
    problems = []
    for number, source in enumerate(sources):
        deep = [one for one in read if one.source == number and one.image.bits == 16]
        kept = [earlier[one.image.image_id] for one in deep if one.image.image_id in earlier]
        levels = [one.levels for one in deep if one.image.split == "train"]
        if not deep:
            continue
        if source.window is not None:
            windows[number] = source.window
        elif kept:
            windows[number] = kept[0]
        elif levels:
            low = min(low for low, _ in levels)
            windows[number] = (low, max(low + 1, *(high for _, high in levels)))
        else:
            windows[number] = (0, 65535)
            what = "16-bit pictures, but none to train on; the whole range 0 to 65535 is their window"
            problems.append(Problem("warning", source.path, what, "set window"))
    images = []
    for one in read:
        image = one.image
        if image.bits == 16:
            low, high = windows[one.source]
            image = replace(image, window_low=low, window_high=high)
        images.append(image)
    return images, problems
