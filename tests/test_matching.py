"""The mix of generators that real defects look like: planted mixtures, chance, bounds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.matching import EVEN, PRIOR, direction, matched, mixture

CHANNELS = 24


def around(rng, middle, count, spread=0.8):
    """Directions around one."""
    found = middle + spread * rng.normal(size=(count, CHANNELS)) / np.sqrt(CHANNELS)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def middles(rng, count):
    return np.linalg.qr(rng.normal(size=(CHANNELS, count)))[0].T


def match(real, samples, groups=None, present=None):
    even = np.full(len(samples), 1 / len(samples))
    groups = groups or [f"part {at}" for at in range(len(real))]
    rng = np.random.default_rng(0)
    return matched(real, groups, samples, even, even if present is None else present, rng)


@pytest.mark.parametrize("seed", range(5))
def test_a_planted_mixture_is_found(seed):
    """Of three generators' kinds, defects show the second and, half as often, the third."""
    rng = np.random.default_rng(seed)
    kinds = middles(rng, 3)
    samples = [around(rng, kind, 12) for kind in kinds]
    real = np.concatenate([around(rng, kinds[1], 40), around(rng, kinds[2], 20)])
    shares = match(real, samples)
    assert shares is not None and shares.sum() == pytest.approx(1)
    mean = EVEN / 3
    wanted = [mean, mean + (1 - EVEN) * 0.67, mean + (1 - EVEN) * 0.33]
    assert shares == pytest.approx(wanted, abs=0.06)
    assert match(real, samples, present=shares) is None, "what is there is not found again"


def test_few_defects_move_the_shares_less():
    rng = np.random.default_rng(0)
    kinds = middles(rng, 8)
    samples = [around(rng, kind, 12) for kind in kinds]
    real = around(rng, kinds[1], 20)
    few, many = match(real[:4], samples), match(real, samples)
    assert few is not None and many is not None and 0.5 < few[1] < many[1] < 1 - EVEN * 7 / 8 + 1e-9


def test_pictures_of_one_part_count_once():
    """Ten pictures of one part are what one is: 12 parts of one kind, one of another."""
    rng = np.random.default_rng(1)
    kinds = middles(rng, 3)
    samples = [around(rng, kind, 12) for kind in kinds]
    real = np.concatenate([around(rng, kinds[1], 12), around(rng, kinds[0], 10, spread=0.1)])
    names = [f"part {at}" for at in range(12)]
    ten, one = match(real, samples, [*names, *["odd"] * 10]), match(real[:13], samples, [*names, "odd"])
    assert ten is not None and one is not None
    np.testing.assert_allclose(ten, one, atol=0.03)
    assert match(real[10:], samples, ["a", "a", *["b"] * 10]) is None, "two parts"


@pytest.mark.parametrize(("null", "most"), [("alike", 5), ("present", 12), ("unlike", 5)])
def test_chance_changes_little(null, most):
    """Generators that are alike; defects that come from the present mix, whose parts are alike by chance;
    defects unlike all samples."""
    rng = np.random.default_rng(2)
    changed = 0
    for _ in range(80):
        kinds = middles(rng, 4)
        parts = int(rng.integers(3, 16))
        own = kinds[[3, 3, 3]] if null == "alike" else kinds[:3]
        samples = [around(rng, kind, 12) for kind in own]
        real = np.concatenate([around(rng, own[at], 1) for at in rng.integers(0, 3, parts)])
        if null == "unlike":
            real = around(rng, np.zeros(CHANNELS), parts)
        changed += match(real, samples) is not None
    assert changed <= most


def test_a_generator_of_few_samples_keeps_its_share():
    """One sample that happens to fit is no match for many that do."""
    rng = np.random.default_rng(3)
    kinds = middles(rng, 4)
    real = around(rng, kinds[1], 12)
    lucky = real.mean(axis=0, keepdims=True)
    lucky /= np.linalg.norm(lucky)
    samples = [*(around(rng, kind, 12) for kind in kinds), lucky, lucky[:0]]
    shares = match(real, samples)
    assert shares is not None and shares.argmax() == 1
    np.testing.assert_allclose(shares[4:], 1 / 6)
    assert shares.sum() == pytest.approx(1)
    assert match(real, [samples[0], lucky, lucky]) is None


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
        assert posterior(0.999 * found + 0.001 * other) <= posterior(found) + 1e-3


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
