"""Times the presets of pyimgano and defect-synthesis in their own environment.

    peer_presets.py NORMALS [--count N]

NORMALS is a ``.npy`` file of uint8 pictures N×H×W×3; a preset makes its samples from them in turn. Both
packages at their defaults, one defect a picture. Prints one JSON object: for each ``package: preset``,
``seconds`` (CPU, one a sample), ``leak``, ``hollow`` and ``area`` (means, of the picture and the mask that it
returns, as docs/formats.md has them), ``areas`` (of each sample), and ``versions``.
"""

import argparse
import json
import random
import time
from importlib.metadata import version
from pathlib import Path

import cv2
import numpy as np
from defect_synthesis.generators.cracks import CrackGenerator
from defect_synthesis.generators.scratches import ScratchGenerator
from defect_synthesis.generators.stains import StainGenerator
from pyimgano.synthesis import AnomalySynthesizer, SynthSpec

WARM_UP = 5
VISIBLE = 2  # 8-bit levels
GENERATORS = {"scratch": ScratchGenerator, "crack": CrackGenerator, "stain": StainGenerator}


def exactness(before: np.ndarray, after: np.ndarray, mask: np.ndarray) -> tuple[float, float, float]:
    """Share of changed pixels outside the mask, of the mask not visibly changed, of the picture masked."""
    change = cv2.absdiff(after, before).max(axis=2)
    changed, inside = np.count_nonzero(change), np.count_nonzero(mask)
    leak = np.count_nonzero(change[mask == 0]) / max(changed, 1)
    hollow = np.count_nonzero(change[mask > 0] <= VISIBLE) / max(inside, 1)
    return leak, hollow, inside / mask.size


def measure(make, normals: np.ndarray, count: int) -> dict[str, object]:
    """Timed in one pass and judged in another: to judge a sample would leave the next one a cold cache."""
    seconds, found = [], []
    for judged in (False, True):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - what defect-synthesis draws from
        for index in range(WARM_UP + count):
            before = normals[index % len(normals)]
            start = time.process_time()
            after, mask = make(before, index)
            spent = time.process_time() - start
            if judged:
                found.append(exactness(before, after, mask))
            else:
                seconds.append(spent)
    leak, hollow, area = np.mean(found[WARM_UP:], axis=0).tolist()
    areas = [one[2] for one in found[WARM_UP:]]
    return {"seconds": seconds[WARM_UP:], "leak": leak, "hollow": hollow, "area": area, "areas": areas}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("normals", type=Path)
    parser.add_argument("--count", type=int, default=100, help="samples a preset")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    normals = np.load(arguments.normals, allow_pickle=False)
    rows = {}
    for preset in GENERATORS:
        synthesizer, generator = AnomalySynthesizer(SynthSpec(preset=preset)), GENERATORS[preset]()

        def pyimgano(
            picture: np.ndarray, seed: int, synthesizer=synthesizer
        ) -> tuple[np.ndarray, np.ndarray]:
            found = synthesizer.synthesize(picture, seed=seed)
            return found.image_u8, found.mask_u8

        def defect_synthesis(
            picture: np.ndarray, _: int, generator=generator
        ) -> tuple[np.ndarray, np.ndarray]:
            found = generator.apply(picture)
            return found.image, found.anomaly_mask

        rows[f"pyimgano: {preset}"] = measure(pyimgano, normals, arguments.count)
        rows[f"defect-synthesis: {preset}"] = measure(defect_synthesis, normals, arguments.count)
    versions = {name: version(name) for name in ("pyimgano", "defect-synthesis")}
    print(json.dumps({"rows": rows, "versions": versions}))


if __name__ == "__main__":
    main()
