"""What the steps of a training draw from: features of normals and samples, and the order they come in.

The frozen part of a detector sees every picture once. Features and masks are kept as rows, in memory or,
where they would take too much of it, in a file that the kernel pages in; the steps read rows, not pictures.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor

from detectors.protocol import Batch, Detector, Encoder, Settings
from generation.backbones import square, to_batch
from manifests.ahead import in_order
from manifests.errors import UsageError
from manifests.pictures import small_mask
from training.loading import FeatureSample, Sample

CHUNK = 16  # pictures in memory at once
# Through a frozen network at once. On a CPU few: from about 8 on, the activations outgrow what the C library
# keeps between allocations, and every layer's pages are new ones (1.3 to 2.1 times the time a picture at 16,
# over all detectors [measured]).
AT_ONCE_ON_CPU = 4
MEMORY_SHARE = 0.1  # of the free memory: what normals, samples and masks each may take before they go to disk
PHASES = 1  # spawn key of the samples' phases in a weighted mix
Item = TypeVar("Item")


@dataclass(frozen=True)
class Normal:
    """A picture of a good part: uint8, H×W×C; ``ignore``: bool H×W, where nothing counts, or None."""

    image_id: str
    category: str
    pixels: np.ndarray
    ignore: np.ndarray | None = None


@dataclass(frozen=True)
class Examples:
    """What the steps draw from. Features, or what :func:`encoded` made of them, are float16, on the CPU; they
    may lie in a file.

    Attributes:
        normals: features of the train split's normals, then of the shards' ``normal`` members.
        categories: one name a normal.
        pure: how many of ``normals`` are the train split's: these serve as prompts.
        synthetic: features of the samples.
        masks: bool, a sample each, size×size.
        source: index into ``normals``: what each sample was made from.
        weights: float64, a sample each: how often it is drawn, relative to the others. Those of weight 0 are
            held out: they only judge (see ``Settings.patience``).
        digest: sha256 over names, weights, masks and features: equal for the same samples and normals.
    """

    normals: Tensor
    categories: tuple[str, ...]
    pure: int
    synthetic: Tensor
    masks: Tensor
    source: tuple[int, ...]
    weights: np.ndarray
    digest: str


class Rows:
    """Tensors of one shape and type, appended and then read as one.

    Past ``limit`` bytes they go to a file without a name in ``folder`` (None: the system's temporary one),
    which ends with the process however that ends.
    """

    def __init__(self, limit: float, folder: str | None = None):
        self._limit, self._folder = limit, folder
        self._parts: list[Tensor] = []
        self._bytes = self._filed = 0
        self._file: IO[bytes] | None = None
        self._shape: tuple[int, ...] = ()
        self._type = np.dtype(np.float32)

    def append(self, rows: Tensor) -> None:
        """Rows N×…, on the CPU."""
        self._parts.append(rows)
        self._bytes += rows.nbytes
        if self._bytes > self._limit:
            self._file = self._file or tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - lives as long
            for part in self._parts:
                values = np.ascontiguousarray(part.numpy())
                self._file.write(values.data)
                self._filed += len(values)
                self._shape, self._type = values.shape[1:], values.dtype
            self._parts.clear()

    def tensor(self) -> Tensor:
        """All rows, R×…; nothing can be appended any more if they are in a file."""
        if self._file is None:
            return torch.cat(self._parts)
        self._file.flush()
        return torch.from_numpy(np.memmap(self._file, self._type, "r+", shape=(self._filed, *self._shape)))


class _Seen(NamedTuple):
    """A sample after the frozen part; ``normal`` is None if its picture was seen before or is not there."""

    sample_id: str
    image_id: str
    category: str
    weight: float
    mask: np.ndarray
    features: Tensor
    normal: Tensor | None


def collect(
    detector: Detector,
    samples: Iterable[Sample | FeatureSample],
    normals: Sequence[Normal],
    *,
    weight: Callable[[Sample | FeatureSample], float] | None = None,
    ranks: int = 1,
    folder: str | None = None,
) -> Examples:
    """Features of everything, each picture once.

    A sample's ``normal`` is taken from its shard (it went through the same encoding); if the shard holds
    none, or the very picture that ``normals`` has under its ``image_id``, from there. (Samples of one
    ``image_id`` have one normal: a run encodes them alike.) Normals that no sample was made from join as
    samples with an empty mask, so that all of them are rebuilt in training.

    Args:
        samples: with several processes, this one's share: its rank and every ``ranks``-th after it. The
            features of all shares are exchanged, so that every process draws from the same rows.
        weight: of a sample, see :class:`Examples`; None: 1 each.
        folder: for rows that do not fit into memory.

    Raises:
        UsageError: no sample to train on, one whose normal is not there, or features that are not those of
            the detector's frozen part.
    """
    size = detector.settings.size
    limit = MEMORY_SHARE * free_memory() / ranks
    known, synthetic, masks = Rows(limit, folder), Rows(limit, folder), Rows(limit, folder)
    of_normals = extract(detector, [normal.pixels for normal in normals])
    known.append(of_normals)
    categories = [normal.category for normal in normals]
    place = {normal.image_id: index for index, normal in enumerate(normals)}
    from_shards: dict[str, int] = {}
    ids, source, weights = [], [], []
    given = {normal.image_id: normal for normal in normals}
    own = _see(detector, samples, given, weight or (lambda _: 1.0), tuple(of_normals.shape[1:]))
    for seen in _all_ranks(own, ranks):
        if seen.normal is not None and seen.image_id not in from_shards:
            from_shards[seen.image_id] = len(categories)
            categories.append(seen.category)
            known.append(seen.normal[None])
        index = from_shards.get(seen.image_id, place.get(seen.image_id))
        if index is None:
            raise UsageError(
                f"sample {seen.sample_id}: the normal picture it was made from is neither in its shard "
                "nor in the train split; keep the normals in the shards (normals: true)"
            )
        ids.append((seen.sample_id, seen.image_id, seen.weight))
        source.append(index)
        weights.append(seen.weight)
        synthetic.append(seen.features[None])
        masks.append(torch.from_numpy(seen.mask)[None])
    if not any(weights):
        raise UsageError(
            "no accepted samples with a picture to train on; give a generator of pictures a share above 0"
        )
    used = {image_id for _, image_id, share in ids if share > 0}
    alone = [index for image_id, index in place.items() if image_id not in used]
    all_normals = known.tensor()
    for index in alone:
        synthetic.append(all_normals[index][None])
        masks.append(torch.zeros(1, size, size, dtype=torch.bool))
    all_masks = masks.tensor()
    all_synthetic = synthetic.tensor()
    digest = hashlib.sha256(repr((ids, list(place), categories)).encode())
    for mask in all_masks.numpy():
        digest.update(np.packbits(mask).data)
    for features in (all_normals, all_synthetic):
        for part in features.split(CHUNK):
            digest.update(np.ascontiguousarray(part.numpy()).data)
    return Examples(
        normals=all_normals,
        categories=tuple(categories),
        pure=len(normals),
        synthetic=all_synthetic,
        masks=all_masks,
        source=(*source, *alone),
        weights=np.array([*weights, *[1.0] * len(alone)]),
        digest=digest.hexdigest(),
    )


def encoded(
    detector: Encoder,
    examples: Examples,
    samples: Iterable[int],
    *,
    ranks: int = 1,
    folder: str | None = None,
) -> Examples:
    """The examples with what a prepared detector's loss sees in place of the features of some samples and of
    their normals. Other arguments as of :func:`collect`.

    Args:
        samples: rows of ``examples``, of several processes those that this one is to look at; in the places
            of all others there is nothing.
    """
    limit = MEMORY_SHARE * free_memory() / ranks
    wanted = set(samples)
    normals = {examples.source[row] for row in wanted}
    of_samples = [examples.categories[index] for index in examples.source]

    def rows(features: Tensor, categories: Sequence[str], chosen: Set[int]) -> Tensor:
        found = Rows(limit, folder)
        blank = torch.zeros_like(detector.encode(features[:1], categories[:1]), dtype=torch.float16).cpu()
        for part in chunks(range(len(features)), CHUNK):
            block = blank.repeat(len(part), *[1] * (blank.dim() - 1))
            own = [row for row in part if row in chosen]
            if own:
                seen = detector.encode(features[own], [categories[row] for row in own])
                block[[row - part[0] for row in own]] = seen.half().cpu()
            found.append(block)
        return found.tensor()

    return replace(
        examples,
        normals=rows(examples.normals, examples.categories, normals),
        synthetic=rows(examples.synthetic, of_samples, wanted),
    )


def _see(
    detector: Detector,
    samples: Iterable[Sample | FeatureSample],
    given: Mapping[str, Normal],
    weight: Callable[[Sample | FeatureSample], float],
    shape: tuple[int, ...],
) -> Iterator[list[_Seen]]:
    """Chunks of samples through the frozen part, while threads read the next ones. Samples of features, which
    must have the ``shape`` of the normals', have passed it when they were made, and so have the ``given``
    normals, by ``image_id``."""
    found: set[str] = set()
    small = in_order(partial(_small, size=detector.settings.size, given=given), samples)
    for chunk in chunks(small, CHUNK):
        fresh = {s.image_id: s.normal for s in chunk if s.normal is not None and s.image_id not in found}
        found |= set(fresh)
        images = [s.image for s in chunk if isinstance(s, Sample)]
        extracted = iter(extract(detector, images) if images else ())
        features = [next(extracted) if isinstance(s, Sample) else _checked(s, detector, shape) for s in chunk]
        pictures = [picture for picture in fresh.values() if picture is not None]
        of_fresh = dict(zip(fresh, extract(detector, pictures), strict=True)) if fresh else {}
        yield [
            _Seen(s.sample_id, s.image_id, s.category, weight(s), s.mask, row, of_fresh.pop(s.image_id, None))
            for s, row in zip(chunk, features, strict=True)
        ]


def _checked(sample: FeatureSample, detector: Detector, shape: tuple[int, ...]) -> Tensor:
    """The features of a sample, if the detector could have extracted them."""
    generator = sample.recipe["generator"]
    leave = f"or leave them out: training.generators.{generator}: 0"
    if sample.backbone != detector.fingerprint:
        raise UsageError(
            f"sample {sample.sample_id} holds features of {sample.backbone}, the detector looks at "
            f"{detector.fingerprint}: give both the same backbone, {leave}"
        )
    if sample.feature.shape != shape:
        raise UsageError(
            f"sample {sample.sample_id} holds features of shape {sample.feature.shape}, the detector's are "
            f"{shape}: set generation.generators.{generator}.params.size to detector.settings.size, {leave}"
        )
    return torch.from_numpy(sample.feature)


def _small(sample: Sample | FeatureSample, size: int, given: Mapping[str, Normal]) -> Sample | FeatureSample:
    """At the detector's size; without its normal if that is the given one."""
    normal = None if sample.normal is None else square(sample.normal, size)
    known = given.get(sample.image_id)
    if normal is not None and known is not None and np.array_equal(normal, square(known.pixels, size)):
        normal = None
    mask = small_mask(sample.mask, size)
    if isinstance(sample, FeatureSample):
        return replace(sample, mask=mask, normal=normal)
    return replace(sample, image=square(sample.image, size), mask=mask, normal=normal)


def _all_ranks(own: Iterator[list[_Seen]], ranks: int) -> Iterator[_Seen]:
    """The samples of all processes, in the order in which the shares were dealt out."""
    if ranks == 1:
        for chunk in own:
            yield from chunk
        return
    while any(shares := gather_object([next(own, [])])):
        for turn in range(CHUNK):
            yield from (share[turn] for share in shares if turn < len(share))


# -- the order ------------------------------------------------------------------------------------------


def draw(
    examples: Examples, settings: Settings, seed: int, rank: int = 0, ranks: int = 1, start: int = 0
) -> Generator[list[Batch], None, None]:
    """One process's share of every step from ``start`` on, in ``settings.accumulate`` micro-batches.

    All processes walk the same order and take turns. The next steps are put together in a thread.
    """
    steps = islice(order(examples, settings, seed), start, settings.steps)
    return in_order(partial(_step, examples, settings.accumulate, rank, ranks), steps, threads=1)


def _step(
    examples: Examples, accumulate: int, rank: int, ranks: int, drawn: tuple[list[int], list[int]]
) -> list[Batch]:
    rows, prompts = (part[rank::ranks] for part in drawn)
    return [gather(examples, rows[k::accumulate], prompts[k::accumulate]) for k in range(accumulate)]


def gather(examples: Examples, rows: Sequence[int], prompts: Sequence[int]) -> dict[str, Any]:
    """A batch as ``Detector.loss`` takes it.

    Args:
        rows: samples.
        prompts: index into ``normals``, one a sample.
    """
    source = [examples.source[row] for row in rows]
    return {
        "normal": examples.normals[source],
        "synthetic": examples.synthetic[rows],
        "prompt": examples.normals[prompts],
        "mask": examples.masks[rows].float(),
        "category": [examples.categories[index] for index in source],
    }


def order(examples: Examples, settings: Settings, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Without end: the samples of a step, and for each a random normal of its category as prompt.

    Every sample comes once before any comes again. In a weighted mix, a sample of the share w of the largest
    weight comes in the share w of these passes, evenly spread (inference: our own construction).
    """
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    prompts: dict[str, list[int]] = {}
    for index, name in enumerate(examples.categories[: examples.pure]):
        prompts.setdefault(name, []).append(index)
    upcoming = passes(examples.weights, rng, seed)
    queue: list[int] = []
    while True:
        while len(queue) < settings.batch:
            queue += next(upcoming).tolist()
        rows, queue = queue[: settings.batch], queue[settings.batch :]
        own = [prompts[examples.categories[examples.source[row]]] for row in rows]
        yield rows, [choices[rng.integers(len(choices))] for choices in own]


def passes(weights: np.ndarray, rng: np.random.Generator, seed: int) -> Iterator[np.ndarray]:
    """Without end: the samples of one pass, shuffled by ``rng``. Weights are ≥ 0, one at least > 0.

    With w = weight/largest weight and a random phase φ, a sample is due in pass t where ⌊(t+1)w + φ⌋ exceeds
    ⌊tw + φ⌋.
    """
    shares = weights / weights.max()
    phases = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(PHASES,))).random(len(shares))
    turn = 0
    while True:
        due = np.floor((turn + 1) * shares + phases) > np.floor(turn * shares + phases)
        yield rng.permutation(np.flatnonzero(due))
        turn += 1


# -- the frozen part ------------------------------------------------------------------------------------


def at_once(device: str) -> int:
    """How many pictures go through a frozen network at once, on a device of that type."""
    return AT_ONCE_ON_CPU if device == "cpu" else CHUNK


def extract(detector: Detector, pictures: Sequence[np.ndarray]) -> Tensor:
    """float16 features on the CPU, of uint8 pictures H×W×C of any sizes."""
    size, count = detector.settings.size, at_once("cuda" if torch.cuda.is_available() else "cpu")
    return torch.cat(
        [detector.extract(to_batch(chunk, size)).half().cpu() for chunk in chunks(pictures, count)]
    )


def batches(detector: Detector, normals: Iterable[Normal]) -> Iterator[Batch]:
    """Batches as ``score`` takes them."""
    for chunk in chunks(normals, CHUNK):
        batch: dict[str, Any] = {
            "features": extract(detector, [normal.pixels for normal in chunk]),
            "category": [normal.category for normal in chunk],
        }
        if any(normal.ignore is not None for normal in chunk):
            size = detector.settings.size
            nothing = np.zeros((size, size), np.bool_)
            ignore = [nothing if n.ignore is None else small_mask(n.ignore, size) for n in chunk]
            batch["ignore"] = torch.from_numpy(np.stack(ignore))
        yield batch


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` items, the last one shorter; what is not asked for is not read."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def free_memory() -> int:
    """Bytes that may be used without swapping: what the kernel says, within the container's limit."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or one without a limit
        return free
    return max(0, min(free, limit))
