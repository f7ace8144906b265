"""DFD: its bands against OpenCV, patches and losses by hand, calibration, and that it learns."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from detectors import protocol
from detectors.dfd import (
    DFD,
    METHOD,
    PAPER,
    DFDSettings,
    class_loss,
    fine_grained,
    gaussian_loss,
    pixel_loss,
    pyramid_down,
    similarity_loss,
    split_bands,
)
from detectors.patches import STRIDES, to_maps
from generation.backbones import load_backbone, to_batch
from manifests.errors import UsageError
from manifests.pictures import small_mask
from training import checkpoints
from training.evaluation import predict
from training.fitting import Normal, batches, extract, train
from training.loading import Sample
from training.metrics import pixel_metrics

TINY = {"size": 64, "channels": 32, "width": 16, "heads": 2}


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(strides=STRIDES)


def make(backbone, **changed) -> DFD:
    torch.manual_seed(0)
    return DFD(DFDSettings(**{**TINY, "gaussian_share": 0.5, **changed}), ["a"], backbone)


def weave(seed: int, size: int = 64) -> np.ndarray:
    """A woven texture with noise: uint8 size×size×3."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] + rng.uniform(0, 12, (2, 1, 1))
    cloth = 120 + 40 * np.sin(x * 2 * np.pi / 12) + 40 * np.sin(y * 2 * np.pi / 12)
    noise = rng.normal(0, 6, (size, size, 1))
    return np.clip(cloth[..., None] + noise + [10, 0, -10], 0, 255).astype(np.uint8)


def spoil(seed: int, picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A patch turned by half a thread and a little darker."""
    rng, size = np.random.default_rng((seed, 1)), len(picture)
    h, w = rng.integers(size // 8, size // 3, 2)
    y, x = rng.integers(2, size - h), rng.integers(2, size - w)
    spoilt, mask = picture.copy(), np.zeros((size, size), bool)
    spoilt[y : y + h, x : x + w] = np.roll(picture, (6, 0), (0, 1))[y : y + h, x : x + w] * 0.8
    mask[y : y + h, x : x + w] = True
    return spoilt, mask


def batch_of(detector: DFD, count: int = 4, *, prepare: bool = False) -> dict:
    """As the loss takes it, by a detector that is prepared or that may stay as it was built."""
    size = detector.settings.size
    normals = [weave(i, size) for i in range(count)]
    spoilt = [spoil(i, picture) for i, picture in enumerate(normals)]
    features, names = extract(detector, normals), ["a"] * count
    if prepare:
        detector.prepare(features, names)
    changed = extract(detector, [image for image, _ in spoilt])
    return {
        "normal": detector.encode(features, names),
        "synthetic": detector.encode(changed, names),
        "mask": torch.from_numpy(np.stack([mask for _, mask in spoilt])).float(),
        "category": names,
    }


# -- bands and patches ----------------------------------------------------------------------------------


@given(height=st.integers(5, 40), width=st.integers(5, 40), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_bands_are_opencvs_pyramid_and_add_up(height, width, seed):
    picture = np.random.default_rng(seed).random((height, width, 3), np.float32)
    images = torch.from_numpy(picture).permute(2, 0, 1)[None]
    down = cv2.pyrDown(picture)
    np.testing.assert_allclose(pyramid_down(images)[0].permute(1, 2, 0), down, atol=2e-6)
    low, high = split_bands(images)
    wanted = cv2.pyrUp(down, dstsize=(width, height))
    np.testing.assert_allclose(low[0].permute(1, 2, 0), wanted, atol=2e-6)
    torch.testing.assert_close(low + high, images, rtol=0, atol=1e-7)
    assert high.min() < 0 < high.max()


def test_each_band_goes_through_the_encoder_as_it_is(backbone):
    detector = make(backbone)
    image = to_batch([weave(0)], 64)
    found = detector.extract(image)
    assert found.shape == (1, 2, 40 * 8 * 8 + 112 * 4 * 4)
    assert found.abs().max() < 1e4, "it must survive float16"
    low, high = split_bands(image.float() / 255)
    for place, band in enumerate((low, high)):
        fine, coarse = backbone.taps(band)
        torch.testing.assert_close(found[0, place, : 40 * 64], fine.flatten())
        torch.testing.assert_close(found[0, place, 40 * 64 :], coarse.flatten())
    swapped = make(backbone, bgr=True).extract(image.flip(1))
    torch.testing.assert_close(swapped, found)


def test_a_patch_is_its_flattened_neighbourhood_pooled_twice():
    """Written out for one place, as PatchCore's code does it."""
    fine, coarse = torch.randn(1, 4, 6, 6), torch.randn(1, 8, 6, 6)
    found = fine_grained([fine, coarse], 6).view(6, 6, 6)
    for y, x in ((2, 3), (0, 5)):
        pooled = []
        for tap in (fine, coarse):
            padded = F.pad(tap, [1] * 4)[0, :, y : y + 3, x : x + 3].flatten()
            pooled.append(padded.view(6, -1).mean(1))
        wanted = torch.cat(pooled).view(6, 2).mean(1)
        torch.testing.assert_close(found[y, x], wanted)


def test_the_papers_patches_and_network():
    paper = DFDSettings(**PAPER)
    assert (paper.size, paper.channels, paper.width, paper.heads, paper.noise) == (256, 1536, 1024, 16, 0.015)
    assert fine_grained([torch.zeros(1, 512, 32, 32), torch.zeros(1, 1024, 16, 16)], 1536).shape == (
        1,
        1024,
        1536,
    )
    assert paper.normalise == "batch" and DFDSettings().normalise == "clean"
    assert paper.leak is not None and DFDSettings().leak is None
    assert "normalise: batch" in paper.leak and "normalise: clean" in paper.leak
    assert protocol.get("dfd") is METHOD
    with pytest.raises(ValidationError, match="multiple"):
        DFDSettings(channels=100, heads=16)


# -- losses ---------------------------------------------------------------------------------------------


def test_losses_by_hand():
    clean, noisy = torch.tensor([0.7, 0.1]), torch.tensor([-0.2, -0.9])
    assert gaussian_loss(clean, noisy).item() == pytest.approx((0 + 0.4) / 2 + (0.3 + 0) / 2)
    normality = torch.tensor([[[1.0, 0.2], [-0.3, 0.5]], [[0.0, 2.0], [2.0, 2.0]]])
    mask = torch.tensor([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    normal, anomalous = (0 + 0.3 + 0 + 0.5 + 0 + 0 + 0) / 7, 0.2
    assert pixel_loss(normality, mask).item() == pytest.approx(normal + anomalous)
    assert pixel_loss(normality[1:], mask[1:]).item() == pytest.approx(0.5 / 4)
    sigmoid = 1 / (1 + np.exp(-np.array([0.3, 0.0])))  # of the least normal pixel of each
    assert class_loss(normality, mask).item() == pytest.approx(((sigmoid - [1, 0]) ** 2).mean())


def test_similarity_takes_the_patches_that_the_mask_touches():
    clean = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [3.0, 0.0]]])  # a grid of 2×2
    changed = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [0.0, 1.0], [4.0, 3.0]]])
    mask = torch.zeros(1, 8, 8)
    mask[0, 3, 4] = mask[0, 7, 7] = 1  # one pixel of the second patch, one of the fourth
    assert similarity_loss(changed, clean, mask).item() == pytest.approx((0 + 0.8) / 2)
    assert similarity_loss(changed, clean, 0 * mask).item() == 0


def test_the_gaussian_path_sees_noise_of_the_given_deviation(backbone):
    detector = make(backbone, noise=0.5)
    patches = torch.randn(2, 3, 64, 32)
    torch.manual_seed(1)
    noise = detector._noisy(patches) - patches
    assert noise.std().item() == pytest.approx(0.5, rel=0.05)
    assert noise.std(dim=(0, 1, 2)).min() > 0.4


def test_ascent_follows_the_live_path_to_the_distance_of_the_noise(backbone):
    detector = make(backbone, noise=0.5, perturbation="ascent").train()
    patches = torch.randn(2, 3, 64, 32)
    kept = [value.clone() for value in detector.gaussian_path.state_dict().values()]
    for _ in range(2):  # of another path the same patches climb elsewhere
        torch.manual_seed(1)
        climbed = detector._noisy(patches)
        change = climbed - patches
        distance = change.norm(dim=-1) / 32**0.5
        assert distance.min() > 0.5 - 1e-3 and distance.max() < 1 + 1e-3
        torch.manual_seed(1)
        detector.settings = detector.settings.model_copy(update={"perturbation": "noise"})
        noisy = detector._noisy(patches)
        detector.settings = detector.settings.model_copy(update={"perturbation": "ascent"})
        path = detector.gaussian_path.eval()
        normality = [path(x.flatten(0, 2)).mean().item() for x in (patches, noisy, climbed)]
        detector.train()
        assert normality[2] < min(normality[:2])
        assert detector.gaussian_path.training
        for value, before in zip(detector.gaussian_path.state_dict().values(), kept, strict=True):
            torch.testing.assert_close(value, before, rtol=0, atol=0)
        with torch.no_grad():
            detector.gaussian_path[3].weight.neg_()
        kept = [value.clone() for value in detector.gaussian_path.state_dict().values()]


def test_the_adapter_learns_from_what_climbed_but_not_from_how(backbone):
    detector = make(backbone, perturbation="ascent")
    patches = torch.randn(2, 3, 64, 32, requires_grad=True)
    detector._noisy(patches).sum().backward()
    torch.testing.assert_close(patches.grad, torch.ones_like(patches))


def test_a_share_of_the_samples_is_left_normal(backbone):
    detector = make(backbone, left_normal=0.2)
    count = 2000
    batch = {
        "normal": torch.zeros(count, 2, 1, 1),
        "synthetic": torch.ones(count, 2, 1, 1),
        "mask": torch.ones(count, 4, 4),
    }
    torch.manual_seed(0)
    _, synthetic, mask = detector._some_left_normal(batch)
    kept = synthetic[:, 0, 0, 0] == 1
    assert torch.equal(kept, mask.amax(dim=(1, 2)) == 1), "a picture without anomaly has no mask"
    assert kept.float().mean().item() == pytest.approx(0.8, abs=0.03)


def test_half_precision_keeps_the_noise(backbone):
    detector = make(backbone, noise=0.001, left_normal=0.0)
    batch = batch_of(detector)
    detector.eval()
    patches = detector._adapted(batch["normal"].transpose(0, 1))
    noisy = detector._noisy(patches)
    told = detector._gaussian(noisy) - detector._gaussian(patches)
    with torch.autocast("cpu", torch.bfloat16):
        same = detector._gaussian(noisy) - detector._gaussian(patches)
        losses = detector.train().loss(batch)
    torch.testing.assert_close(same, told, rtol=0.01, atol=1e-7)
    losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters())


def test_a_batch_of_normals_alone_has_a_finite_loss(backbone):
    detector = make(backbone, left_normal=1.0)
    losses = detector.loss(batch_of(detector))
    losses["loss"].backward()
    assert losses["similarity"].item() == 0
    assert all(torch.isfinite(p.grad).all() for p in detector.parameters() if p.grad is not None)


def test_a_few_steps_on_one_batch_lower_every_loss(backbone):
    detector = make(backbone, left_normal=0.0)
    batch = batch_of(detector, prepare=True)
    groups = detector.parameter_groups()
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(id(p) for p in detector.parameters())
    rates = [group["lr"] / detector.settings.lr for group in groups]
    assert rates == pytest.approx([1, 0.4, 0.2])
    optimizer = torch.optim.AdamW(groups, lr=detector.settings.lr)
    seen = []
    for _ in range(60):
        losses = detector.loss(batch)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        seen.append({name: value.item() for name, value in losses.items()})
    total = seen[0]["gauss"] + (seen[0]["pixel"] + seen[0]["class"]) / 2 + seen[0]["similarity"]
    assert seen[0]["loss"] == pytest.approx(total, rel=1e-5)
    for name in seen[0]:
        first, last = (np.mean([row[name] for row in rows]) for rows in (seen[:3], seen[-3:]))
        assert last < 0.9 * first, (name, first, last)


# -- scores ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ready(backbone) -> DFD:
    detector = make(backbone)
    features = extract(detector, [weave(i) for i in range(4)])
    detector.prepare(features, ["a"] * 4)
    detector.loss(batch_of(detector))  # fills the batch norms' statistics
    detector.eval()
    detector.calibrate([{"features": features[:2]}, {"features": features[2:]}])
    return detector


def test_patches_of_normals_are_standardised_band_by_band(ready):
    patches = ready._patches(extract(ready, [weave(i) for i in range(4)])).flatten(1, 2)
    torch.testing.assert_close(patches.mean(1), torch.zeros(2, 32), atol=1e-3, rtol=0)
    torch.testing.assert_close(patches.std(1), torch.ones(2, 32), atol=2e-2, rtol=0)


def test_paths_are_normalised_by_normals_and_pictures_scored_one_by_one(ready):
    normals = extract(ready, [weave(i) for i in range(4)])
    standard = ready._standard(ready.path_maps(normals))
    torch.testing.assert_close(standard.flatten(1).mean(1), torch.zeros(2), atol=1e-3, rtol=0)
    torch.testing.assert_close(standard.flatten(1).std(1), torch.ones(2), atol=1e-3, rtol=0)
    scores, maps = ready.score({"features": normals})
    torch.testing.assert_close(maps, standard.mean(0))
    torch.testing.assert_close(scores, standard.amax(dim=(2, 3)).mean(0))
    other = make(ready._backbone, gaussian_share=0.25, score_share=0.75).eval()
    other.load_state_dict(ready.state_dict())
    other.calibration = ready.calibration
    found, shown = other.score({"features": normals})
    torch.testing.assert_close(shown, 0.75 * standard[0] + 0.25 * standard[1])
    tops = standard.amax(dim=(2, 3))
    torch.testing.assert_close(found, 0.25 * tops[0] + 0.75 * tops[1])
    assert scores.min() <= ready.calibration["threshold"] <= scores.max()
    alone, alone_map = ready.score({"features": normals[2:3]})
    torch.testing.assert_close(alone[0], scores[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(alone_map[0], maps[2], rtol=1e-4, atol=1e-4)


def test_a_checkpoint_from_before_scores_had_a_share_keeps_its_own():
    assert DFDSettings().score_share == 0.5 and DFDSettings().gaussian_share == 0
    assert DFDSettings(gaussian_share=0.0).score_share == 0
    assert DFDSettings(gaussian_share=0.0, score_share=0.3).score_share == 0.3


def test_the_released_normalisation_is_the_one_of_the_slip(ready, backbone):
    """Every map by the range of each picture in turn, averaged; and it does leak."""
    leaking = make(backbone, normalise="batch").eval()
    leaking.load_state_dict(ready.state_dict())
    features = extract(ready, [weave(i) for i in range(3)])
    raw = ready.path_maps(features).double()
    scores, maps = leaking.score({"features": features})
    wanted = torch.zeros_like(raw[0])
    for path in raw:
        for n in range(3):
            wanted[n] += 0.5 * sum((path[n] - p.min()) / (p.max() - p.min()) for p in path) / 3
    torch.testing.assert_close(maps.double(), wanted, rtol=1e-4, atol=1e-4)
    tops = raw.amax(dim=(2, 3))
    ranged = (tops - tops.amin(1, keepdim=True)) / (tops.amax(1, keepdim=True) - tops.amin(1, keepdim=True))
    torch.testing.assert_close(scores.double(), ranged.mean(0), rtol=1e-4, atol=1e-4)
    fewer, _ = leaking.score({"features": features[:2]})
    assert not torch.allclose(fewer, scores[:2])


def test_the_released_normalisation_is_over_all_pictures_of_a_category_that_are_judged(ready, backbone):
    """More than are scored at once; the other category moves nothing."""
    leaking = make(backbone, normalise="batch").eval()
    leaking.load_state_dict(ready.state_dict())
    pictures = [weave(i) // (1 + i % 3) for i in range(24)]
    found = list(predict(leaking, pictures, ["a"] * 20 + ["b"] * 4))
    for part in (slice(0, 20), slice(20, 24)):
        scores, maps = leaking.score({"features": extract(leaking, pictures[part])})
        torch.testing.assert_close(torch.tensor([score for score, _ in found[part]]), scores)
        torch.testing.assert_close(torch.from_numpy(np.stack([m for _, m in found[part]])), maps)
        assert scores.min() < 0.2 < 0.8 < scores.max()


def test_maps_are_smoothed_as_scipy_does():
    from scipy.ndimage import gaussian_filter

    scores = torch.rand(1, 16, 16)
    large = F.interpolate(scores[None], (128, 128), mode="bilinear")[0, 0].numpy()
    wanted = gaussian_filter(large, 2.0, mode="mirror")
    np.testing.assert_allclose(to_maps(scores, 128)[0].numpy(), wanted, atol=1e-5)


def test_a_checkpoint_scores_as_the_detector_did(ready, tmp_path):
    checkpoints.save(tmp_path, "dfd", ready, seed=0)
    loaded = checkpoints.load(tmp_path)
    picture = spoil(0, weave(9))[0]
    (wanted, wanted_map), (score, scores) = (next(iter(predict(d, [picture]))) for d in (ready, loaded))
    assert score == wanted and loaded.calibration == ready.calibration
    np.testing.assert_array_equal(scores, wanted_map)
    with pytest.raises(UsageError, match="calibrate"):
        loaded.calibrate([])


def test_dfd_learns():
    """Pixel AP on unseen defects, drawn by code, is well above that of the untrained detector."""
    normals = [Normal(f"n{i}", "cloth", weave(i, 96)) for i in range(20)]
    samples = []
    for i in range(48):
        source = normals[i % 16]
        image, mask = spoil(i, source.pixels)
        recipe = {"category": "cloth", "image_id": source.image_id}
        samples.append(Sample(f"s{i}", image, mask, source.pixels, recipe, {}))
    tested = [spoil(i, weave(i, 96)) for i in range(100, 112)]
    masks = [small_mask(mask, 96) for _, mask in tested]

    def pixel_ap(steps: int) -> float:
        chosen = DFDSettings(size=96, channels=64, width=64, heads=2, steps=steps, lr=2e-3)
        detector = train("dfd", chosen, samples, normals[:16], normals[16:], seed=0)
        maps = [scores for _, scores in predict(detector, [image for image, _ in tested])]
        assert set(detector.calibration) >= {"threshold", "perlin_mean", "gaussian_deviation"}
        return pixel_metrics(maps, masks)["pixel_ap"]

    before, after = pixel_ap(1), pixel_ap(40)
    assert after > before + 0.2, (before, after)


def test_batches_of_the_loop_are_what_it_scores(ready):
    (batch,) = batches(ready, [Normal("n", "a", weave(3))])
    score, maps = ready.score(batch)
    assert score.shape == (1,) and maps.shape == (1, 64, 64)
