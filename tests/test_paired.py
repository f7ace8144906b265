"""Paired bootstrap of a benchmark's arms: closed forms, known simulations, and what pairing must cancel."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.paired import (
    Runs,
    above_zero,
    behind,
    difference,
    fewer_samples,
    gap_closed,
    holm,
    over_seeds,
    p_behind,
    packed,
    unpacked,
)
from training.intervals import Estimate, draw_counts

RESAMPLES = 4000


def linear_runs(seeds: np.ndarray, groups: np.ndarray, resamples: int = RESAMPLES) -> Runs:
    """Runs of a metric that is the mean over groups of (a seed's level + a group's): one part."""
    counts = draw_counts(len(groups), resamples, 7) / len(groups)
    drawn = seeds[:, None] + counts @ groups
    return Runs((seeds + groups.mean())[:, None], drawn[:, None], np.array([len(groups)]))


def flat(value: float, resamples: int = 8) -> Estimate:
    return Estimate(value, np.full(resamples, value))


def test_the_variance_is_the_unbiased_one_of_seeds_plus_that_of_groups():
    """s²/n each, with the n − 1 of a sample's variance: neither three seeds nor four groups look surer."""
    rng = np.random.default_rng(0)
    seeds, groups = rng.normal(0, 0.02, 3), rng.normal(0.5, 0.05, 4)
    found = over_seeds(linear_runs(seeds, groups, 20_000))
    assert found.value == pytest.approx(seeds.mean() + groups.mean())
    expected = seeds.var(ddof=1) / len(seeds) + groups.var(ddof=1) / len(groups)
    assert found.resamples.var() == pytest.approx(expected, rel=0.05)


def test_one_seed_has_the_spread_of_its_groups_alone():
    groups = np.array([0.2, 0.4, 0.9])
    found = over_seeds(linear_runs(np.zeros(1), groups, 20_000))
    assert found.resamples.var() == pytest.approx(groups.var(ddof=1) / 3, rel=0.05)


def test_what_arms_share_cancels():
    """Groups differ widely, and so do seeds; the second arm is better by 0.01 everywhere."""
    rng = np.random.default_rng(1)
    seeds, groups = rng.normal(0, 0.05, 3), rng.uniform(0, 1, 10)
    one, other = (over_seeds(linear_runs(seeds + lead, groups)) for lead in (0.0, 0.01))
    low, high = one.interval
    assert high - low > 0.1
    assert difference(other, one).interval == pytest.approx((0.01, 0.01))


def test_parts_are_averaged():
    halves = [linear_runs(np.zeros(2), groups) for groups in (np.full(4, 0.2), np.full(4, 0.6))]
    joined = (np.concatenate([getattr(h, n) for h in halves], axis=1) for n in ("values", "resamples"))
    both = Runs(*joined, np.array([4, 4]))
    assert over_seeds(both).value == pytest.approx(0.4)
    np.testing.assert_allclose(over_seeds(both).resamples, 0.4)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """The bootstrap's own error with 30 groups: a percentile interval of a mean covers about 93 %."""
    covered = 0
    for trial in range(300):
        rng = np.random.default_rng([2, trial])
        found = over_seeds(linear_runs(np.zeros(1), rng.normal(0.5, 0.1, 30), 400))
        low, high = found.interval
        covered += low <= 0.5 <= high
    assert 0.88 <= covered / 300 <= 0.98


def test_gap_closed_by_hand():
    low = {"a": flat(0.2), "b": flat(0.4), "c": flat(0.5)}
    high = {"a": flat(0.6), "b": flat(0.5), "c": flat(0.5)}
    ratio, without = gap_closed(low, {"a": flat(0.5), "b": flat(0.35), "c": flat(0.9)}, high)
    assert ratio.value == pytest.approx((0.3 - 0.05) / (0.4 + 0.1))
    assert without == ["c"]
    uncertain = Estimate(0.6, np.linspace(0.1, 1.1, 100))  # above on average, not surely
    assert gap_closed({"a": flat(0.2, 100)}, {"a": flat(0.5, 100)}, {"a": uncertain})[1] == ["a"]


def test_near_identical_categories_close_the_gap_once():
    low = {name: flat(0.0) for name in ("paper1", "paper2", "nut")}
    high = {name: flat(0.4) for name in low}
    arm = {"paper1": flat(0.1), "paper2": flat(0.1), "nut": flat(0.4)}
    sets = {"paper1": "papers", "paper2": "papers", "nut": "nuts"}
    assert gap_closed(low, arm, high)[0].value == pytest.approx(0.6 / 1.2)
    ratio, _ = gap_closed(low, arm, high, sets)
    assert ratio.value == pytest.approx((0.1 + 0.4) / (0.4 + 0.4))
    np.testing.assert_allclose(ratio.resamples, ratio.value)


def test_the_ends_of_the_gap_close_none_and_all_of_it():
    rng = np.random.default_rng(3)
    groups = {name: rng.uniform(0.2, 0.6, 8) for name in "abc"}
    low = {name: over_seeds(linear_runs(np.zeros(2), own)) for name, own in groups.items()}
    high = {name: over_seeds(linear_runs(np.full(2, 0.2), own)) for name, own in groups.items()}
    for arm, expected in ((low, 0.0), (high, 1.0)):
        ratio, without = gap_closed(low, arm, high)
        assert not without
        assert ratio.interval == pytest.approx((expected, expected))


def test_no_gap_anywhere_is_said():
    ratio, without = gap_closed({"a": flat(0.5)}, {"a": flat(0.6)}, {"a": flat(0.4)})
    assert np.isnan(ratio.value) and np.isnan(ratio.interval).all() and without == ["a"]


@given(st.lists(st.floats(0.0001, 1), min_size=1, max_size=8))
def test_holm_rejects_what_stepping_down_rejects(p_values):
    """Against the procedure as it is defined: the smallest first, and none after the first that stays."""
    named = dict(enumerate(p_values))
    adjusted = holm({str(k): p for k, p in named.items()})
    rejected = set()
    for rank, (k, p) in enumerate(sorted(named.items(), key=lambda item: item[1])):
        if p * (len(named) - rank) >= 0.05:
            break
        rejected.add(str(k))
    assert {name for name, p in adjusted.items() if p < 0.05} == rejected


def test_behind_needs_more_than_one_unlucky_category():
    rng = np.random.default_rng(4)
    even = {f"c{k}": Estimate(0.0, rng.normal(0, 0.02, 1000)) for k in range(9)}
    assert p_behind(even["c0"]) == pytest.approx(0.5, abs=0.05)
    unlucky = Estimate(-0.035, rng.normal(-0.035, 0.02, 1000))
    assert p_behind(unlucky) < 0.05 and not above_zero(unlucky)
    assert behind({**even, "unlucky": unlucky}) == []
    late = Estimate(-0.1, rng.normal(-0.1, 0.02, 1000))
    assert behind({**even, "late": late}) == ["late"]


def test_too_few_resamples_for_so_many_tests_are_refused():
    """The least p-value of 99 resamples is 0.01: of five tests, none could ever be significant."""
    late = {f"c{k}": Estimate(-0.1, np.full(99, -0.1)) for k in range(5)}
    assert behind(dict(list(late.items())[:4])) == ["c0", "c1", "c2", "c3"]
    with pytest.raises(ValueError, match="99 resamples are too few for 5 tests"):
        behind(late)


@given(share=st.floats(0.05, 0.95), slope=st.floats(0.01, 0.2))
def test_fewer_samples_inverts_a_logarithmic_curve(share, slope):
    """AUPRO = 0.5 + slope·log n: the target at the fraction ``share`` of the samples needs 1/share fewer."""
    counts = [50, 100, 200, 1000]
    curve = [flat(0.5 + slope * np.log(n)) for n in counts]
    found = fewer_samples(counts, curve, flat(0.5 + slope * np.log(1000 * share)))
    assert found.value == pytest.approx(1 / share, rel=1e-6)
    np.testing.assert_allclose(found.resamples, 1 / share, rtol=1e-6)


def test_fewer_samples_at_the_ends_of_the_curve():
    counts, curve = [10, 40], [flat(0.5), flat(0.7)]
    assert fewer_samples(counts, curve, flat(0.4)).value == pytest.approx(4)
    assert fewer_samples(counts, curve, flat(0.8)).value == 0


def test_packing_loses_next_to_nothing():
    values = np.random.default_rng(5).random(400)
    assert np.abs(unpacked(packed(values)) - values).max() <= 0.5 / 65535 + 1e-12
    assert len(packed(values)) < 1100
