"""Sample weights: their gradient against differences, planted truth, bounds, tokens of real pictures."""

import numpy as np
import pytest

from training import proxy, weighting
from training.weighting import Labelled, hypergradient, labelled, learn, loss

CHANNELS, GRID = 8, 4
KIND = np.array([3.0, 2.5, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0])  # residuals of a real anomaly, over a normal one's
ALIEN = KIND[::-1].copy()


def normal_tokens(rng, count):
    return np.abs(rng.normal(1, 0.25, (count, CHANNELS))).astype(np.float32)


def anomalous_tokens(rng, count, kind=KIND):
    return normal_tokens(rng, count) * kind.astype(np.float32)


def evidence(rng, kinds, wrong=()):
    """One sample a kind, four tokens under its mask; those of ``wrong`` have their masks elsewhere."""
    samples, masks = [], []
    for at, kind in enumerate(kinds):
        residual = normal_tokens(rng, GRID * GRID).reshape(GRID, GRID, CHANNELS)
        residual[:2, :2] = anomalous_tokens(rng, 4, kind).reshape(2, 2, CHANNELS)
        mask = np.zeros((GRID, GRID), np.bool_)
        mask[(slice(2, 4),) * 2 if at in wrong else (slice(0, 2),) * 2] = True
        samples.append(residual)
        masks.append(mask)
    normals = normal_tokens(rng, 20 * GRID * GRID).reshape(20, GRID, GRID, CHANNELS)
    return proxy.with_samples(proxy.of_normals(normals), samples, masks, squares=True)


def real(rng, found, parts=16, each=3):
    """Pictures with an anomaly of the kind, and as many without."""
    pictures = []
    for part in range(2 * parts):
        bad = anomalous_tokens(rng, each) if part % 2 else np.zeros((0, CHANNELS), np.float32)
        pictures.append(
            Labelled(
                f"part {part}",
                proxy.described(bad, found.scale),
                proxy.described(normal_tokens(rng, 12), found.scale),
            )
        )
    return pictures


def error(found, weights, pictures):
    """Of the head, on parts it has nothing to do with."""
    return loss(proxy.solve(found, weights, weighting.SPREAD), pictures)[0]


def test_the_hypergradient_is_that_of_finite_differences():
    rng = np.random.default_rng(0)
    found = evidence(rng, [KIND, ALIEN, KIND, ALIEN * 0.5, KIND])
    pictures = real(rng, found, parts=3)
    weights = rng.uniform(0.5, 2.0, 5)
    head, gradient = hypergradient(found, weights, pictures)

    def value_at(weights):
        return loss(np.linalg.solve(*proxy.system(found, weights, weighting.SPREAD)[:2]), pictures)[0]

    assert loss(head, pictures)[0] == pytest.approx(value_at(weights))
    step = 1e-2 * np.eye(5)  # the sums are float32
    differences = [(value_at(weights + e) - value_at(weights - e)) / 2e-2 for e in step]
    np.testing.assert_allclose(gradient, differences, rtol=0.02, atol=1e-5)
    np.testing.assert_allclose(gradient @ weights, 0, atol=1e-4)  # only ratios matter


@pytest.mark.parametrize("seed", range(3))
def test_samples_of_an_alien_kind_fade_and_the_head_is_better_for_it(seed):
    rng = np.random.default_rng(seed)
    alien = np.arange(40) % 2 == 1
    found = evidence(rng, [ALIEN if bad else KIND for bad in alien])
    weights = learn(found, real(rng, found))
    assert weights.mean() == pytest.approx(1, abs=1e-6)
    assert weights.min() >= weighting.LOWEST and weights.max() <= weighting.HIGHEST
    assert weights[alien].mean() < 0.5 < 1.5 < weights[~alien].mean()
    held_out = real(rng, found, parts=60)
    assert error(found, weights, held_out) < 0.6 * error(found, np.ones(40), held_out)


@pytest.mark.parametrize("seed", range(3))
def test_among_noise_the_weighted_head_is_better(seed):
    """Half of the samples are patterns of chance."""
    rng = np.random.default_rng(seed)
    found = evidence(rng, [np.exp(rng.normal(0, 0.8, CHANNELS)) if at % 2 else KIND for at in range(40)])
    weights = learn(found, real(rng, found))
    held_out = real(rng, found, parts=60)
    assert error(found, weights, held_out) < error(found, np.ones(40), held_out)


@pytest.mark.parametrize("seed", range(5))
def test_samples_of_one_quality_keep_their_weight(seed):
    rng = np.random.default_rng(100 + seed)
    found = evidence(rng, [KIND] * 40)
    assert (learn(found, real(rng, found)) == 1).all()


@pytest.mark.parametrize("seed", range(5))
def test_labels_that_say_nothing_move_nothing(seed):
    """Anomalies that look like normal tokens."""
    rng = np.random.default_rng(200 + seed)
    found = evidence(rng, [KIND, ALIEN] * 20)
    pictures = [Labelled(p.group, p.normal[: len(p.anomalous)], p.normal) for p in real(rng, found)]
    assert (learn(found, pictures) == 1).all()


def test_weights_are_the_same_again_and_need_enough_parts():
    rng = np.random.default_rng(1)
    found = evidence(rng, [KIND, ALIEN] * 10)
    pictures = real(rng, found)
    first = learn(found, pictures)
    assert (first == learn(found, pictures)).all()
    np.testing.assert_allclose(learn(found, pictures[::-1]), first, atol=1e-6)
    assert (learn(found, pictures[:6]) == 1).all()  # three parts with an anomaly
    one_part = [Labelled("part", p.anomalous, p.normal) for p in pictures]
    assert (learn(found, one_part) == 1).all()


def test_the_loss_knows_no_scale_or_offset_and_every_anomaly_counts_the_same():
    rng = np.random.default_rng(2)
    found = evidence(rng, [KIND] * 4)
    pictures = real(rng, found, parts=3)
    head = rng.normal(size=CHANNELS + 1)
    value, gradient = loss(head, pictures)
    moved = 3 * head + 5 * np.eye(CHANNELS + 1)[-1]  # the last input is a constant 1
    assert loss(moved, pictures)[0] == pytest.approx(value)
    assert gradient @ head == pytest.approx(0, abs=1e-6) and gradient[-1] == pytest.approx(0, abs=1e-6)
    large = [Labelled(p.group, p.anomalous.repeat(1 + 8 * (p.group == "part 1"), axis=0), p.normal)
             for p in pictures]  # fmt: skip
    assert loss(head, large)[0] == pytest.approx(value)


def test_tokens_of_real_pictures():
    """A token that a mask covers is anomalous, one that it touches is neither, ignored ones are out."""
    residual = np.ones((2, 2, 2, 3), np.float32)
    masks, ignore = np.zeros((2, 8, 8), np.bool_), np.zeros((2, 8, 8), np.bool_)
    masks[1, :4, :4] = True
    masks[1, 0, 4] = True
    ignore[1, 4:, :4] = True
    kinds = np.array([False, True]), ("a", "b"), np.zeros(2, np.int8)
    judged = proxy.Judged(residual, kinds[0], masks, ignore, *kinds[1:])
    good, bad = labelled("bolt", judged, np.ones(3, np.float32))
    assert (len(good.anomalous), len(good.normal)) == (0, 4)
    assert (len(bad.anomalous), len(bad.normal)) == (1, 1)
    assert good.normal.shape[1] == 4 and (good.normal[:, -1] == 1).all()
    unmasked = proxy.Judged(residual, kinds[0], None, ignore, *kinds[1:])
    assert [p.group for p in labelled("bolt", unmasked, np.ones(3, np.float32))] == ["bolt/a"]
