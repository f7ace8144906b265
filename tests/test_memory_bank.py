"""The memory bank: coreset, neighbours and weights against brute force, and what its banks depend on."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sklearn.covariance import ledoit_wolf
from sklearn.neighbors import NearestNeighbors

from detectors.coreset import k_centre
from detectors.memory_bank import (
    MEMORY_BANK,
    PAPER,
    TAPPED,
    Gaussians,
    MemoryBank,
    MemoryBankSettings,
    fit_gaussians,
    nearest_gaussian,
    novelty,
    principal_axes,
)
from detectors.patches import neighbourhood_means, pack, unpack
from generation.backbones import load_backbone
from manifests.errors import UsageError
from training import checkpoints
from training.evaluation import predict
from training.fitting import Normal, batches, extract


@pytest.fixture(scope="module")
def backbones():
    return {entries: load_backbone(strides=strides) for entries, strides in TAPPED.items()}


@pytest.fixture(params=list(TAPPED))
def of(request, backbones):
    """Makes a filled bank; ``normals``: pictures by category."""
    return partial(make, backbones[request.param], entries=request.param)


@pytest.fixture
def of_patches(backbones):
    return partial(make, backbones["patches"], entries="patches")


def weave(seed: int, kind: str = "a", size: int = 64) -> np.ndarray:
    """A texture with noise, one for each kind: uint8 size×size×3."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] + rng.uniform(0, 12, (2, 1, 1))
    cloth = 120 + 50 * np.sin(x * 2 * np.pi / 12) + 50 * np.sin(y * 2 * np.pi / (12 if kind == "a" else 5))
    return np.clip(cloth[..., None] + rng.normal(0, 6, (size, size, 3)), 0, 255).astype(np.uint8)


def make(backbone, normals: dict[str, int], **changed) -> MemoryBank:
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
    found = neighbourhood_means([tap])[0][0].permute(1, 2, 0)
    torch.testing.assert_close(found[1, 2], tap[0, :, 0:3, 1:4].mean(dim=(1, 2)))
    torch.testing.assert_close(found[0, 0], tap[0, :, 0:2, 0:2].sum(dim=(1, 2)) / 9)  # zeros from beyond


def test_maps_hold_the_distance_to_the_nearest_neighbour(of_patches):
    """scikit-learn's exact search over the same bank."""
    detector = of_patches({"a": 4}, coreset=40, neighbours=0)
    features = extract(detector, [weave(9), weave(3, "b")])
    patches = detector.around(features)
    search = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(detector.patches[0].float().numpy())
    wanted = search.kneighbors(patches.flatten(0, 1).numpy())[0].reshape(2, 8, 8)
    found = torch.stack([detector.distances(row[None], 0) for row in features])
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-3, atol=1e-3)
    scores, maps = detector.score({"features": features, "category": ["a", "a"]})
    np.testing.assert_allclose(scores.numpy(), wanted.max(axis=(1, 2)), rtol=1e-3)
    assert maps.shape == (2, 64, 64) and maps.dtype == torch.float32
    assert maps[1].mean() > maps[0].mean()


def covariances(found: Gaussians) -> torch.Tensor:
    """T×C×C, as :class:`Gaussians` says."""
    w = found.directions.double()
    unit = torch.eye(w.shape[2], dtype=torch.float64)
    return found.noise.double() * torch.linalg.inv(unit - w.transpose(1, 2) @ w)


@pytest.mark.parametrize("count", [3, 9, 40])
def test_one_places_covariance_is_scikit_learns(count):
    """Ledoit and Wolf's, where all directions are kept; fewer and more normals than channels."""
    rng = np.random.default_rng(count)
    normals = rng.normal(3, 1, (count, 12)) @ rng.normal(0, 1, (12, 12))
    found = fit_gaussians(torch.tensor(normals[:, None], dtype=torch.float32), 12)
    np.testing.assert_allclose(found.means[0], normals.mean(axis=0), rtol=1e-5, atol=1e-5)
    wanted, _ = ledoit_wolf(normals)
    np.testing.assert_allclose(covariances(found)[0], wanted, rtol=1e-3, atol=1e-3 * np.abs(wanted).max())


def test_the_directions_kept_are_those_of_largest_variance():
    spread = torch.tensor([9.0, 0.1, 4.0, 0.1, 0.1, 0.1])
    tokens = torch.randn(400, 3, 6, generator=torch.Generator().manual_seed(0)) * spread
    found = fit_gaussians(tokens, 2)
    assert found.directions.shape == (3, 2, 6)
    assert found.directions.abs().argmax(dim=2).tolist() == [[0, 2]] * 3
    whole, part = (covariances(fit_gaussians(tokens, kept)) for kept in (6, 2))
    torch.testing.assert_close(part[:, 0, 0], whole[:, 0, 0], rtol=1e-3, atol=0)


def test_places_that_never_vary_share_the_noise_of_the_others():
    """Or the least change there would drown all else."""
    tokens = torch.randn(10, 2, 5, generator=torch.Generator().manual_seed(0))
    tokens[:, 1] = 7.0
    found = fit_gaussians(tokens, 5)
    step = torch.zeros(1, 2, 5)
    step[..., 0] = 1.0
    near = nearest_gaussian(found.means[None] + step, found, 0)[0]
    assert 1 < near[1] / near[0] < 10


@pytest.mark.parametrize("tokens", [torch.ones(1, 4, 3), torch.ones(5, 4, 3), torch.rand(1, 4, 3)])
def test_one_normal_and_equal_normals_have_finite_distances(tokens):
    found = fit_gaussians(tokens, 2)
    assert nearest_gaussian(tokens[0].view(2, 2, 3), found, 1).abs().max() == 0
    assert nearest_gaussian(tokens[0].view(2, 2, 3) + 1, found, 1).isfinite().all()


@given(rows=st.integers(1, 9), channels=st.integers(1, 9), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_principal_axes_rebuild_the_scatter(rows, channels, seed):
    x = torch.randn(2, rows, channels, generator=torch.Generator().manual_seed(seed))
    values, axes = principal_axes(x)
    assert values.shape == axes.shape[:2] == (2, min(rows, channels))
    assert (values.diff(dim=1) <= 1e-4).all()
    rebuilt = axes.transpose(1, 2) @ (values[:, :, None] * axes)
    torch.testing.assert_close(rebuilt, x.transpose(1, 2) @ x, rtol=1e-3, atol=1e-3)


@given(h=st.integers(1, 5), w=st.integers(1, 5), window=st.integers(0, 6), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_nearest_gaussian_of_the_places_around(h, w, window, seed):
    """By brute force, a pair of token and place at a time."""
    generator = torch.Generator().manual_seed(seed)
    found = fit_gaussians(torch.randn(6, h * w, 4, generator=generator), 2)
    tokens = torch.randn(h, w, 4, generator=generator)
    inverse = torch.linalg.inv(covariances(found))
    wanted = torch.full((h, w), float("inf"), dtype=torch.float64)
    for y, x, to_y, to_x in np.ndindex(h, w, h, w):
        if max(abs(y - to_y), abs(x - to_x)) <= window:
            away = (tokens[y, x] - found.means[to_y * w + to_x]).double()
            wanted[y, x] = min(wanted[y, x], (away @ inverse[to_y * w + to_x] @ away).sqrt())
    torch.testing.assert_close(nearest_gaussian(tokens, found, window).double(), wanted, rtol=1e-3, atol=1e-3)


def test_what_is_normal_at_one_place_is_not_at_another(backbones):
    """Patches know no place; a window reaches only so far."""

    def halves(seed: int, turned: bool = False) -> np.ndarray:
        parts = [weave(seed, "a")[:, :32], weave(seed, "b")[:, 32:]]
        return np.concatenate(parts[::-1] if turned else parts, axis=1)

    ratios = {}
    for entries, backbone in backbones.items():
        torch.manual_seed(0)
        detector = MemoryBank(MemoryBankSettings(size=64, entries=entries, window=1), ["a"], backbone).eval()
        detector.prepare(extract(detector, [halves(i) for i in range(8)]), ["a"] * 8)
        pair = extract(detector, [halves(20), halves(20, turned=True)])
        good, turned = detector.score({"features": pair})[1].mean(dim=(1, 2))
        ratios[entries] = (turned / good).item()
    assert ratios["places"] > 1.3 * ratios["patches"]
    assert ratios["places"] > ratios["both"] > ratios["patches"]


def test_both_is_the_geometric_mean_and_has_a_gradient(backbones):
    normals, odd = {"a": 4}, weave(9, "b")
    both = make(backbones["both"], normals, entries="both", coreset=40)
    places = make(backbones["both"], normals, entries="places")
    patches = make(backbones["both"], normals, entries="patches", coreset=40)
    features = extract(both, [odd])
    product = places.distances(features, 0) * patches.distances(features, 0)
    torch.testing.assert_close(both.distances(features, 0).square(), product, rtol=1e-3, atol=1e-3)
    known = extract(both, [weave(0)]).requires_grad_()  # a normal that the bank knows: distances near 0
    both.maps({"features": known}).sum().backward()
    assert known.grad.isfinite().all()


def test_the_weight_is_the_papers():
    bank = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0], [9.0, 9.0]])
    patch = torch.tensor([-1.0, 0.0])
    away = np.array([1.0, 2.0, 5**0.5])  # to the nearest, and to the two nearest to that one
    wanted = 1 - np.exp(away[0]) / np.exp(away).sum()
    assert novelty(patch, bank[0], bank, 3).item() == pytest.approx(wanted, rel=1e-5)
    far = novelty(torch.tensor([-500.0, 0.0]), bank[0], bank, 3)
    assert torch.isfinite(far) and 0 <= far <= 1


def test_a_picture_of_the_bank_scores_nothing_and_small_banks_hold_every_patch(of):
    detector = of({"a": 1}, coreset=500)
    if detector.by_patch:
        assert len(detector.kept([0])) == 500 and len(detector.kept([0]).unique(dim=0)) == 64
    features = extract(detector, [weave(0)])
    scores, maps = detector.score({"features": features})
    odd, _ = detector.score({"features": extract(detector, [weave(0, "b")])})
    assert scores.item() < 0.02 * odd.item()
    assert maps.max() < 0.02 * odd.item()


def test_a_picture_is_compared_with_its_category_or_with_all(of):
    detector = of({"b": 3, "a": 3}, coreset=100, neighbours=0)
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


def test_one_category_moves_nothing_in_anothers_bank(of):
    """The statistics and the choice of patches are each category's own."""
    alone = of({"b": 3}, coreset=20, candidates=60)
    together = of({"b": 3, "a": 2}, coreset=20, candidates=60)
    for name in ("means", "directions", "noise", "patches"):
        assert torch.equal(getattr(alone, name)[0], getattr(together, name)[1]), name


def test_pictures_are_scored_one_by_one(of):
    detector = of({"a": 3}, coreset=50)
    features = extract(detector, [weave(7), weave(8, "b"), weave(9)])
    together, maps = detector.score({"features": features})
    for place, row in enumerate(features):
        alone, alone_map = detector.score({"features": row[None]})
        assert torch.equal(alone[0], together[place])
        torch.testing.assert_close(alone_map[0], maps[place])


def test_the_threshold_comes_from_normals_and_a_checkpoint_scores_alike(of, tmp_path):
    detector = of({"a": 4, "b": 2}, coreset=30)
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


def test_a_category_without_normals_and_steps_are_refused(backbones):
    detector = MemoryBank(MemoryBankSettings(size=64), ["a", "b"], backbones["both"])
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
    assert (paper.backbone, paper.entries, paper.size) == ("wide_resnet50_2", "patches", 224)


def test_no_score_comes_from_an_ignored_place(of):
    detector = of({"a": 6})
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
