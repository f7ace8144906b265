"""Samples and normals to a trained detector. The loop knows no detector, only the calls of the protocol.

The frozen part of a detector sees every picture once; its features stay in memory as float16 and the steps
draw from them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from detectors.protocol import Batch, Detector, Settings, get
from generation.backbones import to_batch
from manifests.errors import UsageError
from training.loading import Sample, small_mask

CHUNK = 16  # pictures through the frozen part at once
WARM_UP = 0.05  # share of the steps
Item = TypeVar("Item")
OnStep = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Normal:
    """A picture of a good part: uint8, H×W×C; ``ignore``: bool H×W, where nothing counts, or None."""

    image_id: str
    category: str
    pixels: np.ndarray
    ignore: np.ndarray | None = None


@dataclass(frozen=True)
class Examples:
    """What the steps draw from. Features are float16, on the CPU.

    Attributes:
        normals: features of the train split's normals, then of the shards' ``normal`` members.
        categories: one name a normal.
        pure: how many of ``normals`` are the train split's: these serve as prompts.
        synthetic: features of the samples.
        masks: bool, a sample each, size×size.
        source: index into ``normals``: what each sample was made from.
    """

    normals: Tensor
    categories: tuple[str, ...]
    pure: int
    synthetic: Tensor
    masks: Tensor
    source: tuple[int, ...]


def train(
    detector_name: str,
    settings: Settings,
    samples: Iterable[Sample],
    normals: Sequence[Normal],
    calibration: Sequence[Normal],
    *,
    seed: int,
    device: str = "cpu",
    on_step: OnStep | None = None,
) -> Detector:
    """Build, fit and calibrate a detector.

    The same seed, settings, pictures, thread count and machine give the same weights; torch's global random
    state is left as it was.

    Args:
        samples: synthetic anomalies, read once.
        normals: of the train split, at least one for each category of the samples.
        calibration: of the calibration split; never seen by the fit.
        on_step: ``on_step(step, steps, losses)``, after every step.

    Raises:
        UsageError: no samples, no normals, or a sample whose normal is not there.
    """
    if not normals or not calibration:
        raise UsageError("training needs pictures of good parts in the train and in the calibration split")
    categories = sorted({normal.category for normal in normals})
    with _seeded(seed):
        detector = get(detector_name).build(settings, categories, device)
        examples = collect(detector, samples, normals)
        detector.prepare(examples.normals[: examples.pure], examples.categories[: examples.pure])
        fit(detector, examples, seed=seed, on_step=on_step)
        detector.eval()
        detector.calibrate(list(batches(detector, calibration)))
    return detector


def collect(detector: Detector, samples: Iterable[Sample], normals: Sequence[Normal]) -> Examples:
    """Features of everything, each picture once.

    A sample's ``normal`` is taken from its shard (it went through the same encoding); if the shard holds
    none, from ``normals`` by ``image_id``. Normals that no sample was made from join as samples with an empty
    mask, so that all of them are rebuilt in training.
    """
    size = detector.settings.size
    features = [extract(detector, [normal.pixels for normal in normals])]
    categories = [normal.category for normal in normals]
    place = {normal.image_id: index for index, normal in enumerate(normals)}
    from_shards: dict[str, int] = {}
    used: set[str] = set()
    synthetic, masks, source = [], [], []
    for chunk in chunks(samples, CHUNK):
        fresh = {
            s.image_id: s.normal for s in chunk if s.normal is not None and s.image_id not in from_shards
        }
        if fresh:
            features.append(extract(detector, list(fresh.values())))
            known = {s.image_id: s.category for s in chunk}
            for image_id in fresh:
                from_shards[image_id] = len(categories)
                categories.append(known[image_id])
        for sample in chunk:
            index = from_shards.get(sample.image_id, place.get(sample.image_id))
            if index is None:
                raise UsageError(
                    f"sample {sample.sample_id}: the normal picture it was made from is neither in its shard "
                    "nor in the train split; keep the normals in the shards (normals: true)"
                )
            used.add(sample.image_id)
            source.append(index)
            masks.append(small_mask(sample.mask, size))
        synthetic.append(extract(detector, [sample.image for sample in chunk]))
    if not synthetic:
        raise UsageError(
            "no accepted samples with a picture to train on; give a generator of pictures a share above 0"
        )
    alone = [index for image_id, index in place.items() if image_id not in used]
    all_normals = torch.cat(features)
    return Examples(
        normals=all_normals,
        categories=tuple(categories),
        pure=len(normals),
        synthetic=torch.cat([*synthetic, all_normals[alone]]),
        masks=torch.from_numpy(np.stack([*masks, *[np.zeros((size, size), bool)] * len(alone)])),
        source=(*source, *alone),
    )


def fit(detector: Detector, examples: Examples, *, seed: int, on_step: OnStep | None = None) -> None:
    """The loop: AdamW on ``loss``, linear warm-up, then a cosine to zero over the settings' ``steps``."""
    s = detector.settings
    device = next(detector.parameters()).device
    accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="bf16" if fast_bf16(device) else "no")
    optimizer = torch.optim.AdamW(detector.parameters(), lr=s.lr, weight_decay=s.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate(step, s.steps))
    model, optimizer = accelerator.prepare(detector, optimizer)
    model.train()
    for step, batch in enumerate(
        draw(examples, s, seed, accelerator.process_index, accelerator.num_processes)
    ):
        losses = model({key: _to(value, accelerator.device) for key, value in batch.items()})
        optimizer.zero_grad()
        accelerator.backward(losses["loss"])
        accelerator.clip_grad_norm_(model.parameters(), s.clip)
        optimizer.step()
        schedule.step()
        if on_step:
            on_step(step + 1, s.steps, {key: value.item() for key, value in losses.items()})
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # takes the autocast off the detector again


def draw(examples: Examples, settings: Settings, seed: int, rank: int = 0, ranks: int = 1) -> Iterator[Batch]:
    """One batch a step: every sample once before any comes again, each with a random normal of its category
    as prompt. All ranks walk the same order and take turns."""
    rng = np.random.default_rng(np.random.SeedSequence(seed))
    prompts: dict[str, list[int]] = {}
    for index, name in enumerate(examples.categories[: examples.pure]):
        prompts.setdefault(name, []).append(index)
    queue: list[int] = []
    for _ in range(settings.steps):
        while len(queue) < settings.batch:
            queue += rng.permutation(len(examples.source)).tolist()
        rows, queue = queue[: settings.batch], queue[settings.batch :]
        names = [examples.categories[examples.source[row]] for row in rows]
        prompt = [int(rng.choice(prompts[name])) for name in names]
        mine = slice(rank, None, ranks)
        yield {
            "normal": examples.normals[[examples.source[row] for row in rows[mine]]],
            "synthetic": examples.synthetic[rows[mine]],
            "prompt": examples.normals[prompt[mine]],
            "mask": examples.masks[rows[mine]].float(),
            "category": names[mine],
        }


def learning_rate(step: int, steps: int) -> float:
    """Factor of the peak rate: linear warm-up, then half a cosine. Always above 0."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def extract(detector: Detector, pictures: Sequence[np.ndarray]) -> Tensor:
    """float16 features on the CPU, of uint8 pictures H×W×C of any sizes."""
    size = detector.settings.size
    return torch.cat(
        [detector.extract(to_batch(chunk, size)).half().cpu() for chunk in chunks(pictures, CHUNK)]
    )


def batches(detector: Detector, normals: Iterable[Normal]) -> Iterator[Batch]:
    """Batches as ``score`` takes them."""
    for chunk in chunks(normals, CHUNK):
        yield {
            "features": extract(detector, [normal.pixels for normal in chunk]),
            "category": [normal.category for normal in chunk],
        }


def fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 has instructions of its own here; elsewhere it is emulated and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public question for this; both answer False where the processor has no such instructions
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Weights, dropout and jitter draw from torch's global generator: seed it here, restore it after."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of ``size`` items, the last one shorter; what is not asked for is not read."""
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
