"""What a detector that was trained before says of a sample: how far it lies above or below the alarm.

Generation knows no detector. Whoever has one hands it down as a :class:`Critic`, and samples are made that
it does not find yet ("deliberate practice": Askari-Hemmat et al. 2025, "Improving the scaling laws of
synthetic data with deliberate practice", which guides sampling by the learner's entropy; Hemmat et al. 2023,
"Feedback-guided data synthesis for imbalanced classification", by its loss). Both are published for
classifiers and diffusion models; the mean margin inside an anomaly's mask, and the search over draws of
generators without a gradient, are inference.

What is kept is the draw with the lowest margin. The one nearest to the threshold, which entropy would choose,
taught a linear head on frozen features neither more nor less (pixel AP 0.356 and 0.343; first draws 0.351,
draws by chance 0.359 to 0.374; 128 samples, three seeds).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np

from manifests.errors import UsageError
from manifests.pictures import eight_bit

if TYPE_CHECKING:  # torch is imported where a critic is asked, so that planning does not wait for it
    from torch import Tensor


@dataclass(frozen=True)
class Critic:
    """A trained detector.

    Attributes:
        size: side in pixels of the pictures that it looks at.
        margins: ``margins(pictures, categories) -> maps``: float32 B×3×size×size in [0, 1] and B names to
            float32 B×size×size, the anomaly map less the alarm threshold: above 0 it finds something. It is
            differentiable in the pictures.
        of_features: the same from a backbone's features B×C×h×w; None if the detector looks at none.
        backbone: fingerprint of that backbone; "" without one.
    """

    size: int
    margins: Callable[[Tensor, Sequence[str]], Tensor]
    of_features: Callable[[Tensor, Sequence[str]], Tensor] | None = None
    backbone: str = ""


@dataclass(frozen=True)
class Search:
    """Of each recipe's first ``candidates`` draws, the accepted one that ``critic`` finds least is kept."""

    critic: Critic
    candidates: int


def mean_margins(
    critic: Critic, contents: Sequence[np.ndarray], masks: Sequence[np.ndarray], categories: Sequence[str]
) -> list[float]:
    """The critic's mean margin inside the mask of each sample, all asked in one batch.

    Args:
        contents: pictures, uint8 or uint16 H×W×C; or features of ``critic.backbone``, float16 C×h×w.
        masks: uint8, 0 or 255, H×W or h×w; not empty.

    Raises:
        UsageError: features of another shape than the critic's.
    """
    import torch

    from generation.backbones import in_unit, to_batch

    with torch.inference_mode():
        if contents[0].dtype != np.float16:
            pictures = in_unit(to_batch([eight_bit(content) for content in contents], critic.size))
            maps = critic.margins(pictures, categories)
        else:
            assert critic.of_features is not None
            try:
                features = torch.from_numpy(np.stack(contents)).float()
                maps = critic.of_features(features, categories)
            except RuntimeError as error:
                raise UsageError(
                    f"generation.practice: the last round's detector cannot read features of shape "
                    f"{contents[0].shape}: set the generator's params.size to detector.settings.size"
                ) from error
    found = []
    for scored, mask in zip(maps.cpu().numpy(), masks, strict=True):
        cover = _covered(mask, scored.shape)
        found.append(float((scored * cover).sum() / cover.sum()))
    return found


def _covered(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """How much of each place of a map lies in a mask: float64 h×w, so that no thin anomaly is lost."""
    levels = mask.astype(np.float64)
    grows = shape[0] > mask.shape[0] or shape[1] > mask.shape[1]
    return cv2.resize(levels, shape[::-1], interpolation=cv2.INTER_NEAREST if grows else cv2.INTER_AREA)
