"""Times anomalib's Perlin generator in its own environment.

    peer_synthesis.py --textures DIR [--pictures DIR] [--count N] [--size PX] [--seed S]

Every call is made to draw an anomaly (probability 1), as ours does. The normal pictures are decoded and
resized before the clock starts; reading the texture files is part of anomalib's generator and is timed.
Threads: one, or as many as OMP_NUM_THREADS says. Prints one JSON object: ``seconds_per_picture`` (mean over
``count``), ``median``, ``min``, ``count``, ``size``, ``textures``, ``empty_masks``, ``threads``, ``version``.
"""

import argparse
import json
import os
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from anomalib.data.utils.generators.perlin import PerlinAnomalyGenerator
from torchvision import io
from torchvision.transforms.v2 import functional

WARM_UP = 5  # calls that are not counted
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}


def normal_pictures(folder: Path | None, size: int) -> list[torch.Tensor]:
    """float32 in [0, 1], 3×size×size each: the pictures of a folder, or one drawn by code."""
    if folder is None:
        return [torch.rand(3, size, size)]
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        sys.exit(f"{folder}: no .png, .jpg or .webp picture found; name a folder of pictures")
    pictures = [io.read_image(str(path), mode=io.ImageReadMode.RGB).float() / 255 for path in files[:50]]
    return [functional.resize(picture, [size, size], antialias=True) for picture in pictures]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--textures", type=Path, required=True, help="folder of .png or .jpg textures")
    parser.add_argument("--pictures", type=Path, help="folder of normal pictures; default: one drawn by code")
    parser.add_argument("--count", type=int, default=100, help="pictures to make")
    parser.add_argument("--size", type=int, default=256, help="side in pixels")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch.manual_seed(arguments.seed)
    pictures = normal_pictures(arguments.pictures, arguments.size)
    generator = PerlinAnomalyGenerator(anomaly_source_path=arguments.textures, probability=1.0)
    if not generator.anomaly_source_paths:  # anomalib goes on without textures and would look faster
        sys.exit(f"{arguments.textures}: no texture found; name a folder of .png, .jpg or .webp pictures")
    seconds, empty = [], 0
    for index in range(WARM_UP + arguments.count):
        picture = pictures[index % len(pictures)]
        start = time.perf_counter()
        _, mask = generator(picture)
        elapsed = time.perf_counter() - start
        if index >= WARM_UP:
            seconds.append(elapsed)
            empty += int(not mask.any())
    result = {
        "seconds_per_picture": statistics.mean(seconds),
        "median": statistics.median(seconds),
        "min": min(seconds),
        "count": arguments.count,
        "size": arguments.size,
        "textures": len(generator.anomaly_source_paths),
        "empty_masks": empty,
        "threads": torch.get_num_threads(),
        "version": version("anomalib"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
