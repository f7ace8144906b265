"""Checkpoints of the published layouts with tiny widths, written and loaded once a session."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """Folders; ``wide`` reads its attention maps one level down, the others at the top."""
    from tests.tiny_checkpoints import write_clip, write_sd2, write_sd15

    root = tmp_path_factory.mktemp("tiny")
    return {
        "sd15": _attentive(write_sd15(root / "sd15", sample_size=16)),
        "wide": _attentive(write_sd15(root / "wide", sample_size=32)),
        "sd2": _attentive(write_sd2(root / "sd2", sample_size=16)),
        "clip": write_clip(root / "clip"),
        "judge": write_clip(root / "judge", seed=1),
    }


@pytest.fixture(scope="session")
def tiny_sd(tiny) -> dict[str, Any]:
    """The Stable Diffusions of ``tiny``, loaded. A test that attaches anything removes it again."""
    from generation.cut.models import load_sd

    return {name: load_sd(str(tiny[name])) for name in ("sd15", "wide", "sd2")}


@pytest.fixture(scope="session")
def tiny_double(tiny) -> Any:
    """``sd15`` in double precision: rounding, which a random network amplifies, is out of the way."""
    from dataclasses import replace

    import torch

    from generation.cut.models import load_sd

    sd = load_sd(str(tiny["sd15"]))
    for network in (sd.unet, sd.vae):
        torch.nn.Module.double(network)
    return replace(sd, dtype=torch.float64)


@pytest.fixture(scope="session")
def tiny_clip(tiny) -> Any:
    from generation.cut.clip import load_clip

    return load_clip(str(tiny["clip"]))


def _attentive(folder: Path) -> Path:
    """With queries ten times as loud: maps that random weights leave flat differ from place to place."""
    from safetensors.torch import load_file, save_file

    file = folder / "unet/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name in weights:
        if name.endswith("attn2.to_q.weight"):
            weights[name] = weights[name] * 10
    save_file(weights, file, metadata={"format": "pt"})
    return folder
