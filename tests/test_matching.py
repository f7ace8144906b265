"""The mix of generators that real defects look like: planted mixtures, chance, bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.matching import PRIOR, direction, matched, mixture

CHANNELS = 24
EVEN = np.full(3, 1 / 3)


def around(rng, middle, count, spread=0.8):
    """Directions around one."""
    found = middle + spread * rng.normal(size=(count, CHANNELS)) / np.sqrt(CHANNELS)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def middles(rng, count):
    return np.linalg.qr(rng.normal(size=(CHANNELS, count)))[0].T


def parts(count):
    return [f"part {at}" for at in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_mixture_is_found(seed):
    """Of three generators' kinds, defects show the second and, half as often, the third."""
    rng = np.random.default_rng(seed)
    kinds = middles(rng, 3)
    samples = [around(rng, kind, 12) for kind in kinds]
    real = np.concatenate([around(rng, kinds[1], 40), around(rng, kinds[2], 20)])
    shares = matched(real, parts(60), samples, EVEN)
    assert shares is not None and shares.sum() == pytest.approx(1)
    assert shares == pytest.approx([0.02, 0.66, 0.32], abs=0.06)


def test_few_defects_move_the_shares_less_and_equal_generators_not_at_all():
    rng = np.random.default_rng(0)
    kinds = middles(rng, 3)
    samples = [around(rng, kind, 12) for kind in kinds]
    real = around(rng, kinds[1], 20)
    few, many = (matched(real[:n], parts(n), samples, EVEN) for n in (4, 20))
    assert few is not None and many is not None and 0.5 < few[1] < many[1] < 1
    assert matched(real, parts(20), [samples[1]] * 3, EVEN) is None


def test_pictures_of_one_part_count_once():
    """Ten pictures of one part against one each of four others."""
    rng = np.random.default_rng(1)
    kinds = middles(rng, 3)
    samples = [around(rng, kind, 12) for kind in kinds]
    real = np.concatenate([around(rng, kinds[0], 10), around(rng, kinds[1], 4)])
    shares = matched(real, ["one"] * 10 + parts(4), samples, EVEN)
    assert shares is None or shares[1] > shares[0]
    assert matched(real[:12], ["one"] * 10 + ["two"] * 2, samples, EVEN) is None


def test_defects_unlike_all_samples_change_nothing_but_as_rarely_as_is_said():
    rng = np.random.default_rng(2)
    changed = 0
    for _ in range(150):
        samples = [around(rng, np.zeros(CHANNELS), 12) for _ in range(3)]
        real = around(rng, np.zeros(CHANNELS), int(rng.integers(3, 12)))
        changed += matched(real, parts(len(real)), samples, EVEN) is not None
    assert changed <= 6  # 1.5 expected at a level of 1 %


def test_a_generator_without_samples_keeps_its_share_beside_the_others():
    rng = np.random.default_rng(3)
    kinds = middles(rng, 2)
    none = np.empty((0, CHANNELS), np.float32)
    samples = [around(rng, kinds[0], 12), around(rng, kinds[1], 12), none]
    shares = matched(around(rng, kinds[1], 12), parts(12), samples, EVEN)
    assert shares is not None and shares[1] > shares[2] > shares[0]
    assert matched(around(rng, kinds[1], 12), parts(12), [none] * 3, EVEN) is None


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(2, 6))
@settings(max_examples=50, deadline=None)
def test_a_mixture_is_the_best_there_is(seed, defects, generators):
    """No share of the mixture can be moved to another generator to its gain (the posterior is concave)."""
    rng = np.random.default_rng(seed)
    likely = np.exp(rng.normal(0, 1, (defects, generators)))
    votes, prior = rng.uniform(0.2, 1, defects), rng.dirichlet(np.ones(generators))
    found = mixture(likely, votes, prior)
    assert found.sum() == pytest.approx(1) and (found > 0).all()

    def posterior(shares):
        return votes @ np.log(likely @ shares) + PRIOR * prior @ np.log(shares)

    for other in np.eye(generators):
        assert posterior(0.999 * found + 0.001 * other) <= posterior(found) + 1e-4


def test_a_direction_is_the_mean_under_the_mask():
    difference = np.zeros((4, 4, 3), np.float32)
    difference[0, 0] = (3, 0, 0)
    difference[0, 1] = (0, 4, 0)
    mask = np.zeros((8, 8), np.bool_)
    mask[:2, :4] = True
    np.testing.assert_allclose(direction(difference, mask), [0.6, 0.8, 0], atol=1e-6)
    mask[:] = False
    mask[7, 7] = True  # nothing differs there
    assert (direction(difference, mask) == 0).all()
