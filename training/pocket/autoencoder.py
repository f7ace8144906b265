"""The pocket autoencoder: an AutoencoderKL of Stable Diffusion's layout (f8, 4 channels), narrow where it is
large.

Two legs: first encoder and decoder together, then the decoder alone on the frozen latents, which sharpens
pictures without changing what the diffusion model was trained on.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from training.pocket import legs
from training.pocket.pictures import Photographs, batches

WIDTHS = (16, 32, 64, 128)
BATCH = 8
PEAK = 1e-3
CROPPED = 0.6  # share of the first leg that sees quarters of the pictures: four times as many steps an hour
CARRIED = 3  # colours
KL = 2e-5  # weight of the mean KL term: latents stay bounded, reconstruction hardly notices


def network() -> Any:
    """A new autoencoder, 2.7 million parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=WIDTHS,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,  # few: a group of two channels cannot say how bright or what colour a picture is
        sample_size=128,
        scaling_factor=1.0,
    )


@torch.no_grad()
def start_as_average(vae: Any) -> None:
    """Sets the weights so that the new network already passes the average colour of each 8×8 square.

    From random weights, brightness is learned soon and colour hardly ever: it is a small part of the error,
    and three of four channels end up saying the same. Here the first three latents begin as mean red, green
    and blue. A value is carried in a channel and its negative, since silu(x) − silu(−x) = x; two constant
    channels keep the norms from removing a picture's own level. Residual branches begin at zero.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            _zero(module.conv2)
            if module.conv_shortcut is not None:
                _carry(module.conv_shortcut, 1.0)
        elif isinstance(module, Attention):
            _zero(module.to_out[0])
        elif isinstance(module, Downsample2D):
            _carry(module.conv, 0.25)
        elif isinstance(module, Upsample2D):
            _carry(module.conv, 1.0)
    for entry, count in ((vae.encoder.conv_in, 3), (vae.decoder.conv_in, 3)):
        entry.weight[: 2 * CARRIED + 2] = 0
        entry.bias[: 2 * CARRIED + 2] = 0
        for at in range(count):
            entry.weight[at, at, 1, 1], entry.weight[CARRIED + at, at, 1, 1] = 1, -1
        entry.bias[2 * CARRIED], entry.bias[2 * CARRIED + 1] = 3, -3
    for leave in (vae.encoder.conv_out, vae.decoder.conv_out):
        leave.weight[:3, : 2 * CARRIED + 2] = 0
        for at in range(3):
            leave.weight[at, at, 1, 1], leave.weight[at, CARRIED + at, 1, 1] = 1, -1
    vae.encoder.conv_out.weight[4:] *= 0.1
    vae.encoder.conv_out.bias[4:] = -6  # log-variances: little noise
    for square in (vae.quant_conv, vae.post_quant_conv):
        square.weight.copy_(torch.eye(square.weight.shape[0])[:, :, None, None])
        square.bias.zero_()


def _zero(layer: Any) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _carry(conv: Any, weight: float) -> None:
    """The carried channels pass unchanged: the centre, or (0.25) the mean of two by two pixels."""
    carried = range(2 * CARRIED + 2)
    conv.weight[: len(carried)] = 0
    conv.bias[: len(carried)] = 0
    places = [(0, 0)] if conv.kernel_size == (1, 1) else [(1, 1)]
    if weight != 1:
        places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    for at in carried:
        for y, x in places:
            conv.weight[at, at, y, x] = weight


def train(out: Path, steps: int, seed: int, photos: Photographs, *, decoder_only: bool = False) -> Path:
    """Trains, or goes on training, until ``steps``; returns the checkpoint.

    Args:
        out: folder of the checkpoints ``autoencoder.pt`` and, for the second leg, ``decoder.pt``.
        decoder_only: the second leg; it starts from the average of the first.
    """
    path = out / ("decoder.pt" if decoder_only else "autoencoder.pt")
    torch.manual_seed(seed)
    vae = network()
    start_as_average(vae)
    if decoder_only:
        first = legs.load(out / "autoencoder.pt")
        assert first is not None, "the first leg comes first"
        vae.load_state_dict(first["average"])
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    optimiser = torch.optim.AdamW(
        [p for p in vae.parameters() if p.requires_grad], lr=PEAK, betas=(0.9, 0.99), weight_decay=1e-4
    )

    def loss(pictures: Tensor, step: int) -> legs.Loss:
        images = pictures * 2 - 1
        if not decoder_only and step < CROPPED * steps:
            images = _quarter(images, step)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            stream = torch.Generator().manual_seed(seed * 1_000_003 + step)  # whatever ran before this step
            result = vae.decode(posterior.sample(stream)).sample.float()
        error = (result - images).square().mean()
        absolute = (result - images).abs().mean()
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        total = absolute + 4 * error + KL * divergence + 0.25 * _edges(result, images)
        return legs.Loss(total, error.item())

    return legs.run(
        path,
        vae,
        optimiser,
        steps,
        PEAK / 2 if decoder_only else PEAK,
        BATCH,
        lambda step: batches(seed + decoder_only, step * BATCH, BATCH, photos),
        loss,
        lambda error: f"{10 * math.log10(4 / error):.2f} dB",
    )


def _quarter(images: Tensor, step: int) -> Tensor:
    """A quarter of each picture, another place every step, on the grid of the latents."""
    side = images.shape[-1] // 2
    top, left = step % 9 * side // 8, step // 9 % 9 * side // 8
    return images[..., top : top + side, left : left + side]


def _edges(result: Tensor, images: Tensor) -> Tensor:
    """L1 between horizontal and vertical differences: sharper lines at the same error."""
    difference = result - images
    return F.l1_loss(difference[..., 1:], difference[..., :-1]) + F.l1_loss(
        difference[..., 1:, :], difference[..., :-1, :]
    )
