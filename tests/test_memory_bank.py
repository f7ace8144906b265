"""The memory bank: coreset, neighbours and weights against brute force, and what its banks depend on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.neighbors import NearestNeighbors

from detectors.coreset import k_centre
from detectors.memory_bank import (
    MEMORY_BANK,
    PAPER,
    MemoryBank,
    MemoryBankSettings,
    neighbourhood_means,
    novelty,
)
from detectors.patches import STRIDES, pack, unpack
from generation.backbones import load_backbone
from manifests.errors import UsageError
from training import checkpoints
from training.evaluation import predict
from training.fitting import Normal, batches, extract


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(strides=STRIDES)


def weave(seed: int, kind: str = "a", size: int = 64) -> np.ndarray:
    """A texture with noise, one for each kind: uint8 size×size×3."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] + rng.uniform(0, 12, (2, 1, 1))
    cloth = 120 + 50 * np.sin(x * 2 * np.pi / 12) + 50 * np.sin(y * 2 * np.pi / (12 if kind == "a" else 5))
    return np.clip(cloth[..., None] + rng.normal(0, 6, (size, size, 3)), 0, 255).astype(np.uint8)


def make(backbone, normals: dict[str, int], **changed) -> MemoryBank:
    """A filled bank; ``normals``: pictures by category."""
    torch.manual_seed(0)
    detector = MemoryBank(MemoryBankSettings(size=64, **changed), list(normals), backbone).eval()
    categories = [name for name, count in normals.items() for _ in range(count)]
    detector.prepare(extract(detector, [weave(i, name) for i, name in enumerate(categories)]), categories)
    return detector


@given(
    points=st.lists(st.tuples(*[st.integers(-6, 6)] * 2), min_size=1, max_size=14),
    count=st.integers(1, 16),
)
@settings(max_examples=60, deadline=None)
def test_each_point_of_the_coreset_is_the_farthest_from_those_before(points, count):
    """By brute force. Ties may fall either way, so distances are compared and not places."""
    array = np.array(points, float)
    chosen = k_centre(torch.tensor(points, dtype=torch.float32), count)
    away = np.linalg.norm(array[:, None] - array[None], axis=2)
    to_mean = np.linalg.norm(array - array.mean(axis=0), axis=1)
    assert to_mean[chosen[0]] == pytest.approx(to_mean.min(), abs=1e-5)
    for place in range(1, len(chosen)):
        nearest = away[:, chosen[:place]].min(axis=1)
        assert nearest[chosen[place]] == pytest.approx(nearest.max(), abs=1e-5)
    assert len(chosen) == min(count, len(set(points)))


def test_packed_taps_come_out_as_they_went_in():
    taps = [torch.randn(2, 3, 5, 4), torch.randn(2, 7, 2, 2)]
    shapes = tuple((tap.shape[1], tap.shape[2], tap.shape[3]) for tap in taps)
    rows = pack(taps)
    assert rows.shape == (2, 60 + 28)
    for found, wanted in zip(unpack(rows, shapes), taps, strict=True):
        assert torch.equal(found, wanted)


def test_a_patch_is_the_mean_of_its_neighbours():
    tap = torch.randn(1, 2, 4, 4)
    found = neighbourhood_means([tap]).view(4, 4, 2)
    torch.testing.assert_close(found[1, 2], tap[0, :, 0:3, 1:4].mean(dim=(1, 2)))
    torch.testing.assert_close(found[0, 0], tap[0, :, 0:2, 0:2].mean(dim=(1, 2)))  # no zeros from beyond


def test_maps_hold_the_distance_to_the_nearest_neighbour(backbone):
    """scikit-learn's exact search over the same bank."""
    detector = make(backbone, {"a": 4}, coreset=40, neighbours=0)
    features = extract(detector, [weave(9), weave(3, "b")])
    patches = detector._patches(features)
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(detector.bank[0].float().numpy())
    wanted = search.kneighbors(patches.flatten(0, 1).numpy())[0].reshape(2, 8, 8)
    found = torch.stack([detector._score(row[None], "a")[1] for row in features])
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-3)
    scores, maps = detector.score({"features": features, "category": ["a", "a"]})
    np.testing.assert_allclose(scores.numpy(), wanted.max(axis=(1, 2)), rtol=1e-3)
    assert maps.shape == (2, 64, 64) and maps.dtype == torch.float32
    assert maps[1].mean() > maps[0].mean()


def test_the_weight_is_the_papers():
    bank = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    patch = torch.tensor([-1.0, 0.0])
    away = np.array([1.0, 2.0, 5**0.5])  # to the nearest, and to the two nearest to that one
    wanted = 1 - np.exp(away[0]) / np.exp(away).sum()
    assert novelty(patch, bank[0], bank, 3).item() == pytest.approx(wanted, rel=1e-5)
    far = novelty(torch.tensor([-500.0, 0.0]), bank[0], bank, 3)
    assert torch.isfinite(far) and 0 <= far <= 1


def test_a_picture_of_the_bank_scores_nothing_and_small_banks_hold_every_patch(backbone):
    detector = make(backbone, {"a": 1}, coreset=500)
    assert detector.filled.tolist() == [64]
    features = extract(detector, [weave(0)])
    scores, maps = detector.score({"features": features})
    odd, _ = detector.score({"features": extract(detector, [weave(0, "b")])})
    assert scores.item() < 0.02 * odd.item()
    assert maps.max() < 0.02 * odd.item()


def test_a_picture_is_compared_with_its_category_or_with_all(backbone):
    detector = make(backbone, {"b": 3, "a": 3}, coreset=100, neighbours=0)
    assert detector.categories == ("a", "b")
    features = extract(detector, [weave(8, "b")])
    own, other, every = (
        detector.score({"features": features} | ({"category": [name]} if name else {}))[0]
        for name in ("b", "a", None)
    )
    assert own < other
    assert every == own  # the nearest patch of all is one of its own
    with pytest.raises(UsageError, match="a, b"):
        detector.score({"features": features, "category": ["c"]})


def test_one_category_moves_nothing_in_anothers_bank(backbone):
    """The statistics and the choice of patches are each category's own."""
    alone, together = make(backbone, {"a": 3}, coreset=20), make(backbone, {"a": 3, "b": 2}, coreset=20)
    assert torch.equal(alone.bank[0], together.bank[0])


def test_pictures_are_scored_one_by_one(backbone):
    detector = make(backbone, {"a": 3}, coreset=50)
    features = extract(detector, [weave(7), weave(8, "b"), weave(9)])
    together, maps = detector.score({"features": features})
    for place, row in enumerate(features):
        alone, alone_map = detector.score({"features": row[None]})
        assert torch.equal(alone[0], together[place])
        torch.testing.assert_close(alone_map[0], maps[place])


def test_the_threshold_comes_from_normals_and_a_checkpoint_scores_alike(backbone, tmp_path):
    detector = make(backbone, {"a": 4, "b": 2}, coreset=30)
    normals = [Normal(f"n{i}", "a", weave(20 + i)) for i in range(5)]
    detector.calibrate(list(batches(detector, normals)))
    scores = [score for score, _ in predict(detector, [n.pixels for n in normals], ["a"] * 5)]
    assert detector.calibration["threshold"] == pytest.approx(np.quantile(scores, 0.99), rel=1e-5)
    checkpoints.save(tmp_path, "memory_bank", detector, seed=0)
    loaded = checkpoints.load(tmp_path)
    assert loaded.calibration == detector.calibration
    spoilt = weave(30)
    spoilt[20:40, 20:40] = 30
    pair = [next(iter(predict(one, [spoilt], ["a"]))) for one in (detector, loaded)]
    assert pair[0][0] == pair[1][0] > detector.calibration["threshold"]
    np.testing.assert_array_equal(pair[0][1], pair[1][1])


def test_a_category_without_normals_and_steps_are_refused(backbone):
    detector = MemoryBank(MemoryBankSettings(size=64), ["a", "b"], backbone)
    with pytest.raises(UsageError, match="category b"):
        detector.prepare(extract(detector, [weave(0)]), ["a"])
    with pytest.raises(UsageError, match="calibrate"):
        detector.calibrate([])
    with pytest.raises(ValidationError):
        MemoryBankSettings(steps=10)
    assert detector.parameter_groups() == [] and not list(detector.parameters())


def test_the_papers_layers_and_bank():
    from detectors import protocol

    assert protocol.get("memory_bank") is MEMORY_BANK
    paper = MemoryBankSettings(**PAPER)
    assert (paper.backbone, paper.steps, paper.size) == ("wide_resnet50_2", 0, 224)


def test_no_score_comes_from_an_ignored_place(backbone):
    detector = make(backbone, {"a": 6})
    picture = weave(40)
    picture[8:24, 8:24] = 255
    features = extract(detector, [picture, weave(41)])
    batch = {"features": features, "category": ["a", "a"]}
    ignore = torch.zeros(2, 64, 64, dtype=torch.bool)
    ignore[0, :40, :40] = True
    (spoilt, good), maps = detector.score(batch)
    (less, same), unchanged = detector.score(batch | {"ignore": ignore})
    assert less < 0.8 * spoilt and same == good
    nowhere = detector.score(batch | {"ignore": torch.ones(2, 64, 64, dtype=torch.bool)})[0]
    assert nowhere[0] <= less
    torch.testing.assert_close(unchanged, maps)
