"""Samples and normals to a trained detector. The loop knows no detector, only the calls of the protocol.

It runs in one process or, started by ``accelerate launch``, in several that share the pictures and the steps.
What decides a training is the same for any number of them and for any ``accumulate``, except the noise that a
loss draws, which differs from process to process, what a loss pools over the pixels of a batch, and batch
statistics: a batch norm sees the pictures of one micro-batch in one process, and the running statistics of
the first process are kept.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast, broadcast_object_list
from torch import Tensor

from detectors.protocol import Batch, Detector, Encoder, Settings, get
from manifests.errors import UsageError
from training import resuming
from training.examples import (
    Examples,
    Normal,
    batches,
    chunks,
    collect,
    draw,
    encoded,
    extract,
    gather,
    order,
)
from training.loading import FeatureSample, Sample
from training.resuming import Slot, State, StateError

WARM_UP = 0.05  # share of the steps
EVALUATIONS = 20  # of the held-out samples, in all steps, where the settings have a patience
NOISE, HELD_OUT = 1, 2  # spawn keys
OnStep = Callable[[int, int, dict[str, float]], None]
Say = Callable[[str], None]


def train(
    detector_name: str,
    settings: Settings,
    samples: Iterable[Sample | FeatureSample],
    normals: Sequence[Normal],
    calibration: Sequence[Normal],
    *,
    seed: int,
    device: str = "cpu",
    weight: Callable[[Sample | FeatureSample], float] | None = None,
    slot: Slot | None = None,
    folder: str | None = None,
    on_step: OnStep | None = None,
    say: Say = lambda _line: None,
) -> Detector:
    """Build, fit and calibrate a detector.

    The same seed, settings, pictures, thread count and machine give the same weights; torch's global random
    state is left as it was.

    Args:
        samples: synthetic anomalies, read once; with several processes this one's share (see ``collect``).
            Not read where the settings have no steps.
        normals: of the train split, at least one for each category of the samples.
        calibration: of the calibration split; never seen by the fit.
        device: ``cuda``: with several processes, each has its own.
        weight: of a sample in the mix; 0 holds it out; None: 1 each.
        slot: where the state is kept while training, and where that of a broken-off one is found.
        folder: for features that do not fit into memory; None: the system's temporary one.
        on_step: ``on_step(step, steps, losses)``, after every step.
        say: is given lines for a person.

    Raises:
        UsageError: no samples, no normals, a sample whose normal is not there, or a batch too small.
    """
    if not normals or not calibration:
        raise UsageError("training needs pictures of good parts in the train and in the calibration split")
    categories = sorted({normal.category for normal in normals})
    accelerator = _accelerator(torch.device(device))
    with _seeded(seed):
        detector = get(detector_name).build(settings, categories, accelerator.device)
        names = [normal.category for normal in normals]
        if settings.steps:
            ranks = accelerator.num_processes
            examples = collect(detector, samples, normals, weight=weight, ranks=ranks, folder=folder)
            detector.prepare(examples.normals[: examples.pure], names)
            fit(
                detector, examples, accelerator, seed=seed, slot=slot, folder=folder, on_step=on_step, say=say
            )
        else:
            detector.prepare(extract(detector, [normal.pixels for normal in normals]), names)
        detector.eval()
        detector.calibrate(list(batches(detector, calibration)))
    return detector


def fit(
    detector: Detector,
    examples: Examples,
    accelerator: Accelerator,
    *,
    seed: int,
    slot: Slot | None = None,
    folder: str | None = None,
    on_step: OnStep | None = None,
    say: Say = lambda _line: None,
) -> None:
    """The loop: AdamW on ``loss``, linear warm-up, then a cosine to zero over the settings' ``steps``."""
    s, rank, ranks = detector.settings, accelerator.process_index, accelerator.num_processes
    if s.batch < ranks * s.accumulate:
        raise UsageError(
            f"batch: {s.batch} samples cannot be shared by {ranks} processes in {s.accumulate} "
            f"micro-batches; set batch to {ranks * s.accumulate} or more"
        )
    optimizer = torch.optim.AdamW(
        detector.parameter_groups(), lr=s.lr, weight_decay=s.weight_decay, fused=True
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    identity = _identity(detector, examples, seed, accelerator)
    state = _resume(slot, identity, accelerator, say)
    if state.step:
        detector.load_state_dict(state.weights)
        resuming.restore_moments(optimizer, state.moments)
    if isinstance(detector, Encoder):  # by what was loaded: a preparation may differ in its last bits
        drawn_later = islice(order(examples, s, seed), state.step, s.steps)
        looked_at = {row for rows, _ in drawn_later for row in rows[rank::ranks]}
        if s.patience:
            looked_at |= set(_held_out(examples)[rank::ranks])
        examples = encoded(detector, examples, looked_at, ranks=ranks, folder=folder)
    step, best, held_out = state.step, state.best, state.held_out
    with warnings.catch_warnings():  # torch renames an option that accelerate still passes on
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        model = accelerator.prepare(detector)
    began = saved = time.monotonic()
    wait, interval = 0.0, resuming.EVERY
    drawn = draw(examples, s, seed, rank, ranks, step)
    while step < s.steps and not _stalled(held_out, s.patience):
        asked = time.monotonic()
        parts = [{key: _to(value, accelerator.device) for key, value in part.items()} for part in next(drawn)]
        wait += time.monotonic() - asked
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * learning_rate(step, s.steps)
        torch.manual_seed(spawn(seed, NOISE, rank, step))
        model.train()
        losses = _gradients(model, parts, s.batch, accelerator)
        accelerator.clip_grad_norm_(trained, s.clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if not torch.isfinite(losses["loss"]):
            raise UsageError(
                f"the loss is {losses['loss'].item()} at step {step}: lower detector.settings.lr"
            )
        if on_step:
            on_step(step, s.steps, {key: value.item() for key, value in losses.items()})
        if s.patience and step % max(1, s.steps // EVALUATIONS) == 0:
            held_out = (*held_out, held_out_loss(detector, examples, accelerator, seed))
            if not math.isfinite(held_out[-1]):
                raise UsageError(f"patience: the loss of the held-out samples is {held_out[-1]}; lower lr")
            if held_out[-1] <= min(held_out):
                best = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
        if slot and accelerator.is_main_process and time.monotonic() - saved >= interval:
            asked = time.monotonic()
            moments = resuming.moments_of(optimizer)
            slot.write(resuming.pack(State(step, detector.state_dict(), moments, best, held_out), identity))
            saved = time.monotonic()
            interval = max(resuming.EVERY, (saved - asked) / resuming.TIME_SHARE)
    drawn.close()
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # takes the autocast off the detector again
    if best:
        detector.load_state_dict(best)
    broadcast(list(detector.state_dict().values()))
    seconds = time.monotonic() - began
    if step > state.step:
        rate = (step - state.step) * s.batch / seconds
        stopped = f", stopped by patience: {s.patience}" if step < s.steps else ""
        say(f"{step} steps, {rate:.1f} samples/s, loader {wait / seconds:.1%} of step time{stopped}")


def _gradients(model: Any, parts: Sequence[Batch], total: int, accelerator: Accelerator) -> dict[str, Tensor]:
    """Adds up the gradients of one step, as of the mean over its ``total`` samples in all processes; returns
    this process's mean losses."""
    sums: dict[str, Tensor] = {}
    own = sum(len(part["category"]) for part in parts)
    for part in parts:
        count = len(part["category"])  # shares may differ by one, and the processes' gradients are averaged
        with nullcontext() if part is parts[-1] else accelerator.no_sync(model):
            losses = model(part)
            accelerator.backward(losses["loss"] * (count * accelerator.num_processes / total))
        for key, value in losses.items():
            sums[key] = sums.get(key, 0) + value.detach() * (count / own)
    return sums


@torch.no_grad()
def held_out_loss(detector: Detector, examples: Examples, accelerator: Accelerator, seed: int) -> float:
    """Mean loss of the held-out samples in evaluation mode, with the same prompts and noise every time.

    Raises:
        UsageError: no sample is held out.
    """
    rank, ranks, s = accelerator.process_index, accelerator.num_processes, detector.settings
    rows = _held_out(examples)
    if not rows:
        raise UsageError(
            "patience: no synthetic sample is held out to judge by; make more, or set it to null"
        )
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(HELD_OUT,)))
    names = np.array(examples.categories[: examples.pure])
    prompts = [
        int(rng.choice(np.flatnonzero(names == examples.categories[examples.source[row]]))) for row in rows
    ]
    broadcast(list(detector.state_dict().values()))  # running statistics differ from process to process
    detector.eval()
    torch.manual_seed(spawn(seed, HELD_OUT, rank))
    total = torch.zeros((), device=accelerator.device)
    own = list(zip(rows, prompts, strict=True))[rank::ranks]
    for chunk in chunks(own, max(1, s.batch // (ranks * s.accumulate))):
        batch = gather(examples, *map(list, zip(*chunk, strict=True)))
        found = detector.forward({key: _to(value, accelerator.device) for key, value in batch.items()})
        total += found["loss"] * len(chunk)
    return accelerator.reduce(total).item() / len(rows)


def _held_out(examples: Examples) -> list[int]:
    """Rows of the samples that only judge."""
    return np.flatnonzero(examples.weights == 0).tolist()


def _stalled(held_out: Sequence[float], patience: int | None) -> bool:
    """Whether the last ``patience`` evaluations found nothing better than what came before."""
    if patience is None or not held_out:
        return False
    return len(held_out) - 1 - held_out.index(min(held_out)) >= patience


def _resume(slot: Slot | None, identity: str, accelerator: Accelerator, say: Say) -> State:
    """The state of a broken-off training as the first process finds it, or that of the beginning."""
    data = [slot.read() if slot and accelerator.is_main_process else None]
    broadcast_object_list(data)
    if data[0] is not None:
        try:
            state = resuming.unpack(data[0], identity)
        except StateError as error:
            say(f"the state of a broken-off training {error}: beginning again")
        else:
            say(f"going on after step {state.step} of a broken-off training")
            return state
    return State(0, {}, {}, {}, ())


def _identity(detector: Detector, examples: Examples, seed: int, accelerator: Accelerator) -> str:
    """A name for all that decides the weights but the machine."""
    decides = (
        type(detector).__qualname__,
        detector.settings.model_dump_json(),
        detector.fingerprint,
        examples.digest,
        seed,
        accelerator.num_processes,
        next(detector.parameters()).device.type,
        torch.__version__,
        accelerator.mixed_precision,
    )
    return hashlib.sha256(repr(decides).encode()).hexdigest()


def spawn(seed: int, *key: int) -> int:
    """A seed for torch, independent of those of other keys."""
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])


def learning_rate(step: int, steps: int) -> float:
    """Factor of the peak rate: linear warm-up, then half a cosine. Always above 0."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def processes() -> tuple[int, int]:
    """This process's rank and how many there are, as ``accelerate launch`` says in the environment."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 has instructions of its own here; elsewhere it is emulated and slow."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # torch has no public question for this; both answer False where the processor has no such instructions
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def _accelerator(device: torch.device) -> Accelerator:
    # Buffers are not sent round at every step: the only ones that steps change are running statistics.
    distributed = DistributedDataParallelKwargs(broadcast_buffers=False)
    precision = "bf16" if fast_bf16(device) else "no"
    return Accelerator(cpu=device.type == "cpu", mixed_precision=precision, kwargs_handlers=[distributed])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Weights and noise draw from torch's global generator: seed it here, restore it after."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
