"""The smallest detector: one convolution on shrunk pictures, in float32; noise by setting."""

import torch
import torch.nn.functional as F
from torch import nn

from detectors.protocol import Method, Settings


class PlainSettings(Settings):
    size: int = 32
    steps: int = 12
    batch: int = 4
    lr: float = 0.05
    clip: float = 1e6
    noise: float = 0.0
    slow: float = 1.0  # the bias learns at this share of the rate


class Plain(nn.Module):
    fingerprint = "plain"

    def __init__(self, settings, categories):
        super().__init__()
        self.settings, self.categories = settings, tuple(categories)
        self.calibration = {}
        self.prepared = 0
        self.head = nn.Conv2d(3, 1, 3, padding=1)

    def extract(self, images):
        return F.avg_pool2d(images.float() / 255, 4)

    def prepare(self, normals, categories):
        assert len(normals) == len(categories)
        self.prepared = len(normals)

    def parameter_groups(self):
        lr = self.settings.lr
        return [{"params": [self.head.weight]}, {"params": [self.head.bias], "lr": lr * self.settings.slow}]

    def loss(self, batch):
        seen = batch["synthetic"].float()
        seen = seen + self.settings.noise * torch.randn_like(seen)
        with torch.autocast(seen.device.type, enabled=False):
            found = self.head(seen)[:, 0]
        return {"loss": F.mse_loss(found, F.avg_pool2d(batch["mask"], 4))}

    forward = loss

    def score(self, batch):
        maps = F.interpolate(self.head(batch["features"].float()), (self.settings.size,) * 2)[:, 0].detach()
        return maps.amax(dim=(1, 2)), maps

    def calibrate(self, normals):
        self.calibration = {"threshold": max(self.score(batch)[0].max().item() for batch in normals)}


PLAIN = Method(
    name="plain",
    summary="",
    settings=PlainSettings,
    presets={},
    build=lambda settings, categories, device: Plain(settings, categories).to(device),
)
NAME, PLACE = "plain", "tests.plain_detector:PLAIN"
