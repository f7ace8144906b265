"""The residual detector: what it subtracts, what it learns from the samples, and what its bank depends on."""

import cv2
import numpy as np
import pytest
import torch

from detectors import protocol
from detectors.memory_bank import TAPPED
from detectors.patches import to_maps
from detectors.residual import ITSELF, LOWEST, RESIDUAL, Residual, ResidualSettings
from generation.backbones import load_backbone
from manifests.errors import UsageError
from tests.test_memory_bank import weave
from training import checkpoints
from training.evaluation import predict
from training.fitting import Normal, batches, extract, train
from training.loading import Sample

SETTINGS = ResidualSettings(size=64, steps=40, batch=4, coreset=60, width=8)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(strides=TAPPED["both"])


def make(backbone, kinds: str, **changed) -> Residual:
    torch.manual_seed(0)
    detector = Residual(SETTINGS.model_copy(update=changed), sorted(set(kinds)), backbone).eval()
    detector.prepare(extract(detector, [weave(i, kind) for i, kind in enumerate(kinds)]), list(kinds))
    return detector


def spoilt(seed: int, kind: str = "a", level: int | None = 30) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(picture, mask, normal): a square of one grey level, or as it was."""
    normal = weave(seed, kind)
    picture, mask = normal.copy(), np.zeros(normal.shape[:2], bool)
    y, x = np.random.default_rng(seed).integers(4, 40, 2)
    mask[y : y + 18, x : x + 18] = True
    if level is not None:
        picture[mask] = level
    return picture, mask, normal


def samples(count: int, level: int | None) -> list[Sample]:
    found = []
    for k in range(count):
        picture, mask, normal = spoilt(k, "ab"[k % 2], level)
        recipe = {"category": "ab"[k % 2], "image_id": f"n{k}"}
        found.append(Sample(f"s{k}", picture, mask, normal, recipe, {}))
    return found


def trained(level: int | None):
    normals = [Normal(f"n{k}", "ab"[k % 2], weave(k, "ab"[k % 2])) for k in range(8)]
    held = [Normal(f"c{k}", "ab"[k % 2], weave(100 + k, "ab"[k % 2])) for k in range(4)]
    return train("residual", SETTINGS, samples(8, level), normals, held, seed=1)


@pytest.fixture(scope="module")
def detector():
    return trained(30)


def test_a_residual_by_hand(backbone):
    detector = make(backbone, "aaaa")
    features = extract(detector, [weave(50)])
    patches = detector.bank.around(features)[0]
    bank = detector.bank.kept([0])
    away = (patches[:, None] - bank[None]).norm(dim=2)
    near = away.argmin(dim=1)
    found = detector._seen(features, ["a"])[0][0].flatten(1).T
    torch.testing.assert_close(
        found[:, -1], away.min(dim=1).values / detector.median[0], rtol=1e-3, atol=1e-3
    )
    wanted = ((patches - bank[near]).abs() / detector.scale[0]).sqrt()
    torch.testing.assert_close(found[:, :-1], wanted, rtol=1e-3, atol=1e-3)


def test_where_the_head_sees_nothing_the_map_is_the_banks(backbone):
    """In deviations of the logarithm over the normals that filled it, whose patches in the bank are left
    out; it orders the places of a picture as the memory bank does."""
    detector = make(backbone, "a" * 12)
    normals = extract(detector, [weave(k) for k in range(12)])
    with torch.no_grad():
        detector.head[-1].weight.zero_()
        detector.head[-1].bias.fill_(-40.0)
    features = extract(detector, [weave(50), spoilt(51)[0]])
    found = detector._seen(features, ["a", "a"])[1]
    raw = torch.stack([detector.bank.distances(one[None], 0) for one in features]).log()
    wanted = (raw - detector.usual[0]) / detector.spread
    assert wanted.min() < LOWEST + 4  # all but what lies lower is kept
    torch.testing.assert_close(found, wanted.clamp_min(LOWEST))
    torch.testing.assert_close(detector.score({"features": features})[1], to_maps(found, 64))
    own = detector._seen(normals, ["a"] * 12)[1]
    own = own[own > LOWEST]
    assert own.mean().abs() < 0.3 and 0.7 < own.std() < 1.3


def test_the_head_adds_its_evidence(backbone):
    detector = make(backbone, "aaaa")
    features = extract(detector, [weave(50)])
    with torch.no_grad():
        detector.head[-1].weight.zero_()
        maps = []
        for probability in (0.001, 0.9):
            detector.head[-1].bias.fill_(float(np.log(probability / (1 - probability))))
            maps.append(detector.maps({"features": features}))
    torch.testing.assert_close(maps[1] - maps[0], torch.full_like(maps[0], np.log(0.999 / 0.1)))


@pytest.mark.parametrize("count", [1, 2])
def test_few_normals_give_finite_scores(backbone, count):
    """All or nearly all of their patches are in the bank, and one has no variance at its places."""
    detector = make(backbone, "a" * count)
    score, maps = detector.score({"features": extract(detector, [weave(0), weave(50), spoilt(51)[0]])})
    assert torch.isfinite(maps).all()
    assert score[0] < score[2] and score[1] < score[2]


def test_in_training_a_patch_of_the_bank_is_not_its_own_normal(backbone):
    detector = make(backbone, "aaa", coreset=200)
    features = extract(detector, [weave(0), weave(1), weave(2)])
    alone, apart = (
        torch.stack([detector._compared(one, [0], itself)[0][-1] for one in features])
        for itself in (0.0, ITSELF)
    )
    assert (alone < 0.05).float().mean() > 0.5
    assert apart.min() >= ITSELF
    torch.testing.assert_close(apart[alone >= ITSELF], alone[alone >= ITSELF])


def test_plain_parts_can_be_learned():
    """But for the border their patches are alike, so that most have no other normal in the bank."""
    plain = np.full((64, 64, 3), 90, np.uint8)
    normals = [Normal(f"n{k}", "a", plain) for k in range(4)]
    made = []
    for k in range(4):
        picture, mask, _ = spoilt(k)
        recipe = {"category": "a", "image_id": f"n{k}"}
        made.append(Sample(f"s{k}", np.where(mask[..., None], picture, plain), mask, plain, recipe, {}))
    detector = train("residual", SETTINGS, made, normals, normals, seed=0)
    score, maps = detector.score({"features": extract(detector, [plain, made[0].image])})
    assert torch.isfinite(maps).all() and score[1] > score[0]


def test_it_finds_what_the_samples_show_and_learns_it_from_them(detector):
    """The same pictures, the same steps; samples of dark squares teach dark squares, samples whose
    masks show nothing do not."""
    picture, mask, _ = spoilt(200, "b")
    lifts = []
    for one in (detector, trained(level=None)):
        features = extract(one, [picture])
        scores = one.maps({"features": features, "category": ["b"]}).detach()
        assert scores.shape == (1, 64, 64) and scores.dtype == torch.float32
        lift = (scores - to_maps(one._seen(features, ["b"])[1], 64))[0].numpy()
        lifts.append(lift[mask].mean() - lift[~mask].mean())
    assert lifts[0] > 2 * lifts[1]
    assert lifts[0] > 0.5
    (_, found), (_, normal) = predict(detector, [picture, weave(201, "b")], ["b", "b"])
    assert (found[mask].mean() - found[~mask].mean()) / normal.std() > 1


def test_training_is_the_same_again_and_a_checkpoint_scores_alike(detector, tmp_path):
    again = trained(30)
    for name, tensor in detector.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    checkpoints.save(tmp_path, "residual", detector, seed=1)
    loaded = checkpoints.load(tmp_path)
    pair = [next(iter(predict(one, [spoilt(7)[0]], ["a"]))) for one in (detector, loaded)]
    assert pair[0][0] == pair[1][0] > detector.calibration["threshold"]
    np.testing.assert_array_equal(pair[0][1], pair[1][1])


def test_a_picture_is_compared_with_its_category_or_with_all(backbone):
    detector = make(backbone, "aabb", coreset=200)
    features = extract(detector, [weave(2, "b")])
    seen = [detector._seen(features, name) for name in (["b"], ["a"], None)]
    for own, other, every in (
        [residuals[:, -1] for residuals, _ in seen],
        [deviations for _, deviations in seen],
    ):
        torch.testing.assert_close(own, every)  # the nearest patch of all is one of its own
        assert own.mean() < other.mean()
    with pytest.raises(UsageError, match="a, b"):
        detector.score({"features": features, "category": ["c"]})
    with pytest.raises(UsageError, match="category b"):
        Residual(SETTINGS, ["a", "b"], backbone).prepare(features, ["a"])
    with pytest.raises(UsageError, match="calibrate"):
        detector.calibrate([])


def test_maps_follow_the_features(detector):
    """Gradients: what a changed feature does to the map."""
    features = extract(detector, [spoilt(5)[0]]).float().requires_grad_()
    maps = detector.maps({"features": features, "category": ["a"]})
    (gradient,) = torch.autograd.grad(maps.sum(), features)
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0
    batch = next(iter(batches(detector, [Normal("n", "a", spoilt(5)[0])])))
    torch.testing.assert_close(detector.score(batch)[1], detector.maps(batch).detach())


def test_no_score_comes_from_an_ignored_place(detector):
    picture, mask, _ = spoilt(9)
    features = extract(detector, [picture])
    batch = {"features": features, "category": ["a"]}
    wide = cv2.dilate(mask.astype(np.uint8), np.ones((25, 25))) > 0
    less = detector.score(batch | {"ignore": torch.from_numpy(wide)[None]})[0]
    assert less < detector.score(batch)[0]


def test_it_is_registered():
    assert protocol.get("residual") is RESIDUAL
