"""Writes what is known of a backbone's features, its statistics and the operators' strengths on them, so that
no process has to find it anew and every machine has the same to the bit::

    python -m generation.feature.storing                    # of the default backbone: the shipped file
    python -m generation.feature.storing FOLDER             # beside the weights of a folder in timm's layout
    python -m generation.feature.storing FOLDER --layers blocks.3 blocks.7
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from generation import registry
from generation.backbones import DEFAULT, Backbone, load_backbone
from generation.feature.family import AscentParams, FeatureParams, calibrated, variant
from generation.feature.statistics import (
    FINGERPRINT,
    Statistics,
    estimate,
    file_of,
    fingerprint,
    normal_features,
    strengths_key,
)
from manifests.errors import UsageError


def write(backbone: Backbone) -> Path:
    """The file of a backbone, see :func:`generation.feature.statistics.file_of`; whole or not at all.

    Raises:
        UsageError: a backbone that has no folder to write to, or other layers than those that are shipped.
    """
    path = file_of(backbone)
    if path is None:
        raise UsageError(
            f"backbone {backbone.name}: its weights come from a hub, where nothing can be stored; "
            "save the model to a folder (timm.models.save_for_hf) and name that"
        )
    if backbone.name == DEFAULT and backbone.fingerprint != load_backbone().fingerprint:
        raise UsageError(f"backbone {DEFAULT}: what is shipped is of its default layers; leave --layers out")
    known = estimate(normal_features(backbone))
    name = torch.tensor(list(fingerprint(backbone).encode()), dtype=torch.uint8)
    aside = path.with_suffix(".part")
    save_file({**vars(known), **_strengths(backbone, known), FINGERPRINT: name}, aside)
    os.replace(aside, path)
    return path


def _strengths(backbone: Backbone, known: Statistics) -> dict[str, Tensor]:
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
            low, high = calibrated(backbone, known, operator, params)
            found[strengths_key(variant(operator, params))] = torch.tensor([low, high], dtype=torch.float64)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("backbone", nargs="?", default=DEFAULT, help="a folder; default: %(default)s")
    parser.add_argument("--layers", nargs="+", help="modules to tap; default: as the generators do")
    given = parser.parse_args()
    print(write(load_backbone(given.backbone, given.layers)))
