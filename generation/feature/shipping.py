"""Writes what is shipped for the default backbone: its statistics and the operators' strengths on them.

python -m generation.feature.shipping
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from generation import registry
from generation.backbones import DEFAULT, load_backbone
from generation.feature.family import AscentParams, FeatureParams, calibrated, variant
from generation.feature.statistics import (
    FINGERPRINT,
    SHIPPED,
    estimate,
    normal_features,
    strengths_key,
)


def write(folder: Path) -> Path:
    """The file in ``folder``. Statistics are estimated, the strengths found with those of the installed file
    where there is one."""
    backbone = load_backbone(DEFAULT)
    known = estimate(normal_features(backbone))
    name = torch.tensor(list(backbone.fingerprint.encode()), dtype=torch.uint8)
    path = folder / SHIPPED
    save_file({**vars(known), **_strengths(), FINGERPRINT: name}, path)
    return path


def _strengths() -> dict[str, Tensor]:
    backbone = load_backbone(DEFAULT)
    found = {}
    for generator in map(registry.get, registry.BUILT_IN):
        if generator.family != "feature":
            continue
        operator = generator.apply.keywords["operator"]  # type: ignore[attr-defined]
        kinds: list[FeatureParams] = (
            [AscentParams(projection="manifold"), AscentParams(projection="hypersphere")]
            if generator.params is AscentParams
            else [FeatureParams()]
        )
        for params in kinds:
            low, high = calibrated(backbone, operator, params)
            found[strengths_key(variant(operator, params))] = torch.tensor([low, high], dtype=torch.float64)
    return found


if __name__ == "__main__":
    print(write(Path(__file__).parent))
