"""OneNIP: the cheap checks of core.md 4.11, its losses, prompts, calibration, and that it learns."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from detectors import protocol
from detectors.onenip import (
    ONENIP,
    PAPER,
    OneNIP,
    OneNIPSettings,
    dice_loss,
    jittered,
    neighbour_mask,
)
from generation.backbones import load_backbone
from manifests.errors import UsageError
from manifests.pictures import small_mask
from training.evaluation import predict
from training.fitting import Normal, train
from training.loading import Sample
from training.metrics import pixel_metrics

TINY = {"size": 96, "hidden": 32, "depth": 1, "ffn": 64, "refiner": 16, "bank": 2}


@pytest.fixture(scope="module")
def backbone():
    return load_backbone()


def make(backbone, categories=("a",), **settings) -> OneNIP:
    torch.manual_seed(0)
    return OneNIP(OneNIPSettings(**{**TINY, **settings}), categories, backbone)


def features(count: int, channels: int = 192, side: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, channels, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("width", "forbidden"), [(7, 49), (8, 81), (10, 121)])
def test_neighbour_mask_of_an_inner_token(width, forbidden):
    mask = neighbour_mask(20, width)
    assert mask[10 * 20 + 10].sum() == forbidden
    assert mask.diagonal().all()
    assert torch.equal(mask, mask.T)


def test_jitter_has_the_deviation_of_the_formula():
    tokens = torch.randn(1, 2, 50_000) * torch.tensor([[[1.0], [5.0]]])
    torch.manual_seed(0)
    noise = jittered(tokens, 20) - tokens
    wanted = tokens.norm(dim=-1) / 50_000 * 20
    torch.testing.assert_close(noise.std(dim=-1), wanted, rtol=0.02, atol=0)
    assert torch.equal(jittered(tokens, 0), tokens)


def test_dice_has_no_factor_two():
    mask = torch.zeros(1, 64, 64)
    assert dice_loss(mask, mask).item() == 0
    mask[:, :32] = 1
    assert dice_loss(mask, mask).item() == pytest.approx(1 - 2049 / 4097)
    two = torch.cat([mask, torch.zeros_like(mask)])
    assert dice_loss(two, two).item() == pytest.approx((1 - 2049 / 4097) / 2)


def test_shapes_at_224_and_batch_one_with_the_picture_as_its_own_prompt(backbone):
    detector = make(backbone, size=224)
    images = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    found = detector.extract(images)
    assert found.shape == (1, 192, 14, 14)
    batch = {"normal": found, "synthetic": found, "prompt": found, "mask": torch.zeros(1, 224, 224)}
    assert math.isfinite(detector.loss(batch)["loss"].item())
    detector.eval()
    score, maps = detector.score({"features": found})
    assert (score.shape, maps.shape) == ((1,), (1, 224, 224))


def test_restoring_an_unchanged_picture_costs_what_rebuilding_it_costs(backbone):
    detector = make(backbone, jitter=0.0).eval()
    f = features(2)
    same = detector.loss({"normal": f, "synthetic": f, "prompt": f, "mask": torch.zeros(2, 96, 96)})
    tokens = detector._tokens(f)
    wanted = F.mse_loss(detector.reconstruction(tokens, tokens), tokens)
    assert same["recon"].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_the_refiner_teaches_the_transformer(backbone):
    """The paper lets the dice's gradient flow through the error into the reconstruction."""
    detector = make(backbone, recon_weight=0.0)
    mask = torch.zeros(2, 96, 96)
    mask[:, 10:30, 10:30] = 1
    detector.loss(
        {"normal": features(2), "synthetic": features(2, seed=1), "prompt": features(2), "mask": mask}
    )["loss"].backward()
    assert detector.reconstruction.project.weight.grad.abs().sum() > 0


def test_the_nearest_prompt_needs_no_label_and_finds_the_own_category(backbone):
    detector = make(backbone, categories=("a", "b")).eval()
    a, b = features(3) + 1, features(3, seed=1)
    b[:, ::2] -= 2
    detector.prepare(torch.cat([a, b]), ["a"] * 3 + ["b"] * 3)
    prompts = detector._prompts(detector._tokens(torch.cat([b[:1], a[:1]])), None)
    assert any(torch.equal(prompts[0], p) for p in detector.bank[1].float())
    assert any(torch.equal(prompts[1], p) for p in detector.bank[0].float())


@pytest.mark.parametrize("prompt", ["fixed", "random"])
def test_labelled_prompts_come_from_their_category_and_refuse_unknown_ones(backbone, prompt):
    detector = make(backbone, categories=("a", "b"), prompt=prompt).eval()
    detector.prepare(torch.cat([features(3), features(3, seed=1) + 5]), ["a"] * 3 + ["b"] * 3)
    found = detector._prompts(detector._tokens(features(4)), ["b", "a", "b", "b"])
    for row, chosen in zip((1, 0, 1, 1), found, strict=True):
        assert any(torch.equal(chosen, p) for p in detector.bank[row].float())
    with pytest.raises(UsageError, match="nearest"):
        detector.score({"features": features(1)})
    with pytest.raises(UsageError, match="nearest"):
        detector.score({"features": features(1), "category": ["c"]})


def test_few_normals_fill_the_bank_and_none_is_an_error(backbone):
    detector = make(backbone, bank=4)
    detector.prepare(features(2), ["a", "a"])
    assert (detector.bank.float().abs().sum(dim=(0, 2, 3)) > 0).all()
    with pytest.raises(UsageError, match="category a"):
        detector.prepare(features(2), ["b", "b"])


def test_fusion_is_calibrated_on_normals_and_pictures_are_scored_one_by_one(backbone):
    """κ = ½·max rec over the calibration normals; what else is scored with a picture changes nothing."""
    detector = make(backbone).eval()
    detector.prepare(features(4), ["a"] * 4)
    normals = [{"features": features(3, seed=5)}, {"features": features(3, seed=6)}]
    detector.calibrate(normals)
    largest = max(detector.parts(batch)[0].max().item() for batch in normals)
    assert detector.calibration["kappa"] == pytest.approx(largest / 2)
    scores = torch.cat([detector.score(batch)[0] for batch in normals])
    assert scores.min() <= detector.calibration["threshold"] <= scores.max()
    odd = features(1, seed=9) * 10
    alone, _ = detector.score({"features": odd})
    before = dict(detector.calibration)
    together, _ = detector.score({"features": torch.cat([odd, features(3, seed=5)])})
    torch.testing.assert_close(together[:1], alone)
    assert detector.calibration == before
    rec, ref = detector.parts({"features": odd})
    fused = 0.5 * rec + 0.5 * before["kappa"] * ref
    torch.testing.assert_close(alone, F.avg_pool2d(fused[None], 16, 1).max()[None])


def test_settings_are_checked_and_the_paper_preset_fits():
    with pytest.raises(ValidationError):
        OneNIPSettings(hiden=3)
    paper = OneNIPSettings(**PAPER)
    assert (paper.hidden, paper.depth, paper.heads, paper.ffn, paper.jitter) == (256, 4, 8, 1024, 20)


def test_the_registry_finds_it_and_names_the_choices():
    assert protocol.get("onenip") is ONENIP
    with pytest.raises(UsageError, match="onenip"):
        protocol.get("onenap")


def test_third_parties_add_detectors_by_entry_point(monkeypatch):
    class Point:
        name = "theirs"

        def load(self):
            return "their method"

    monkeypatch.setattr(protocol, "entry_points", lambda group, **named: [Point()])
    assert "theirs" in protocol.names()
    assert protocol.get("theirs") == "their method"


def weave(rng: np.random.Generator, size: int = 96) -> np.ndarray:
    """A woven texture with noise: uint8 size×size×3."""
    y, x = np.mgrid[:size, :size] + rng.uniform(0, 12, (2, 1, 1))
    cloth = 120 + 40 * np.sin(x * 2 * np.pi / 12) + 40 * np.sin(y * 2 * np.pi / 12)
    noise = rng.normal(0, 6, (size, size, 1))
    return np.clip(cloth[..., None] + noise + [10, 0, -10], 0, 255).astype(np.uint8)


def spoil(rng: np.random.Generator, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A patch of the cloth turned by half a thread and a little darker: subtle where it lies."""
    h, w = rng.integers(12, 28, 2)
    y, x = rng.integers(2, 94 - h), rng.integers(2, 94 - w)
    spoilt, mask = picture.copy(), np.zeros(picture.shape[:2], bool)
    patch = np.roll(picture, (6, 0), (0, 1))[y : y + h, x : x + w]
    spoilt[y : y + h, x : x + w] = patch * 0.9
    mask[y : y + h, x : x + w] = True
    return spoilt, mask


def test_onenip_learns():
    """Pixel AP on unseen defects, drawn by code, is well above that of the untrained detector."""
    rng = np.random.default_rng(0)
    normals = [Normal(f"n{i}", "cloth", weave(rng)) for i in range(24)]
    samples = []
    for i in range(60):
        source = normals[i % 20]
        image, mask = spoil(rng, source.pixels)
        recipe = {"category": "cloth", "image_id": source.image_id}
        samples.append(Sample(f"s{i}", image, mask, source.pixels, recipe, {}))
    tested = [spoil(rng, weave(rng)) for _ in range(16)]
    masks = [small_mask(mask, 96) for _, mask in tested]

    def pixel_ap(steps: int) -> float:
        settings = OneNIPSettings(size=96, hidden=64, depth=1, ffn=128, refiner=32, steps=steps, lr=2e-3)
        detector = train("onenip", settings, samples, normals[:20], normals[20:], seed=0)
        maps = [scores for _, scores in predict(detector, [image for image, _ in tested])]
        return pixel_metrics(maps, masks)["pixel_ap"]

    before, after = pixel_ap(0), pixel_ap(80)
    assert after > before + 0.2, (before, after)
