"""Metrics against scikit-learn, against oracles that spell out the definitions, and on toy cases."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from training import ranking
from training.components import component_recall
from training.intervals import Estimate, evaluate_images, evaluate_pixels, mean_estimate
from training.metrics import (
    LogicalDefect,
    MetricsError,
    aupro_cflow,
    defect_subsets,
    image_metrics,
    pixel_metrics,
    spro,
)

LIMIT = 0.3


def sklearn_metrics(scores, labels):
    precision, recall, _ = precision_recall_curve(labels, scores)
    total = np.maximum(precision + recall, 1e-300)
    return [
        roc_auc_score(labels, scores),
        average_precision_score(labels, scores),
        (2 * precision * recall / total).max(),
    ]


def components(mask):
    """8-connected components as flat masks, by a flood fill of its own."""
    left, found = set(zip(*np.nonzero(mask), strict=True)), []
    while left:
        stack, part = [left.pop()], np.zeros(mask.shape, bool)
        while stack:
            y, x = stack.pop()
            part[y, x] = True
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            stack += near
        found.append(part)
    return found


def area_to_limit(fpr, pro, limit=LIMIT):
    """Trapezoids from 0 to the limit, interpolated there, over the limit (core.md 6.3, step 5)."""
    keep = fpr <= limit
    end = np.interp(limit, fpr, pro) if (fpr == limit).sum() == 0 else pro[keep][-1]
    return np.trapezoid(np.append(pro[keep], end), np.append(fpr[keep], limit)) / limit


def curve_at(maps, masks, thresholds):
    parts = [(k, part) for k, mask in enumerate(masks) for part in components(mask)]
    normal = np.sort(np.concatenate([scores[~mask] for scores, mask in zip(maps, masks, strict=True)]))
    fpr = 1 - np.searchsorted(normal, thresholds, side="right") / normal.size
    overlaps = []
    for k, part in parts:
        inside = np.sort(maps[k][part])
        overlaps.append(1 - np.searchsorted(inside, thresholds, side="right") / inside.size)
    return fpr, np.mean(overlaps, axis=0)


def aupro_all_thresholds(maps, masks, limit=LIMIT):
    """Every distinct score is a threshold."""
    levels = np.unique(np.concatenate([np.ravel(scores) for scores in maps]))[::-1]
    fpr, pro = curve_at(maps, masks, np.append(levels, -np.inf))
    return area_to_limit(fpr, pro, limit)


def aupro_official(maps, masks, limit=LIMIT):
    """The 100-threshold version of the official tool (core.md 6.3, step 4)."""
    normal = np.sort(np.concatenate([scores[~mask] for scores, mask in zip(maps, masks, strict=True)]))
    ranks = np.linspace(normal.size - 1, 0, num=100, dtype=int)
    fpr, pro = curve_at(maps, masks, normal[ranks])
    return area_to_limit(np.append(fpr, 1.0), np.append(pro, 1.0), limit)


def simulated(pictures=12, side=96, seed=0, signal=1.0):
    """Smooth noise with blurred defects of differing strength; every second picture is good."""
    rng = np.random.default_rng(seed)
    maps, masks = [], []
    for k in range(pictures):
        mask = np.zeros((side, side), np.uint8)
        for _ in range(rng.integers(1, 4) * (k % 2)):
            centre, axes = rng.integers(8, side - 8, 2), rng.integers(1, side // 8, 2)
            cv2.ellipse(mask, tuple(map(int, centre)), tuple(map(int, axes)), 0.0, 0, 360, 1, -1)
        noise = cv2.GaussianBlur(rng.standard_normal((side, side), dtype=np.float32), (0, 0), 3) * 3
        bump = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 3) * rng.uniform(0.3, 1) * signal
        maps.append(noise + bump)
        masks.append(mask > 0)
    return maps, masks


# Few distinct values, so that ties are the rule.
few_levels = st.sampled_from([-2.5, -0.0, 0.0, 0.125, 1.0, 7.0])


@given(st.lists(st.tuples(few_levels | st.floats(-1e6, 1e6), st.booleans()), min_size=2, max_size=40))
def test_image_metrics_agree_with_scikit_learn(rows):
    scores, labels = (np.array(column) for column in zip(*rows, strict=True))
    assume(0 < labels.sum() < labels.size)
    assert list(image_metrics(scores, labels).values()) == pytest.approx(
        sklearn_metrics(scores, labels), abs=1e-12
    )


@st.composite
def small_maps(draw):
    shapes = draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=4))
    levels = few_levels | st.floats(-3, 3, width=32)
    maps = [draw(hnp.arrays(np.float32, shape, elements=levels)) for shape in shapes]
    masks = [draw(hnp.arrays(bool, shape)) for shape in shapes]
    positive = sum(mask.sum() for mask in masks)
    assume(0 < positive < sum(mask.size for mask in masks))
    return maps, masks


@given(small_maps(), st.sampled_from([0.05, 0.3, 1.0]), st.sampled_from([1, 3, 1 << 16]))
@settings(deadline=None, max_examples=150)
def test_pixel_metrics_agree_with_the_definitions(case, limit, block):
    """Pictures of several sizes, ties within and across blocks, either sign of zero."""
    maps, masks = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "BLOCK", block)
        found = list(pixel_metrics(maps, masks, fpr_limit=limit).values())
    pooled = [np.concatenate([np.ravel(a) for a in arrays]) for arrays in (maps, masks)]
    assert found[:3] == pytest.approx(sklearn_metrics(*pooled), abs=1e-9)
    assert found[3] == pytest.approx(aupro_all_thresholds(maps, masks, limit), abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_aupro_agrees_with_the_official_hundred_thresholds(seed):
    """Measured difference on such maps: up to 0.0022 over 30 seeds, half of them below 0.0007."""
    maps, masks = simulated(seed=seed)
    exact = pixel_metrics(maps, masks)["aupro"]
    assert exact == pytest.approx(aupro_all_thresholds(maps, masks), abs=1e-9)
    assert exact == pytest.approx(aupro_official(maps, masks), abs=0.004)


def disc(side=20, low=4, high=9):
    mask = np.zeros((side, side), bool)
    mask[low:high, low:high] = True
    return mask


def test_perfect_inverted_and_constant_maps():
    masks = [disc(), np.zeros((10, 30), bool)]
    share = disc().sum() / 700
    perfect = [mask.astype(np.float32) for mask in masks]
    assert list(pixel_metrics(perfect, masks).values()) == pytest.approx([1.0] * 4)
    assert pixel_metrics([-scores for scores in perfect], masks)["pixel_auroc"] == 0
    constant = pixel_metrics([np.full(mask.shape, 0.7, np.float32) for mask in masks], masks)
    assert constant == pytest.approx(
        {"pixel_auroc": 0.5, "pixel_ap": share, "pixel_f1max": 2 * share / (1 + share), "aupro": LIMIT / 2}
    )


def test_every_component_weighs_the_same():
    """Sizes 1 and 99, only the larger one found: PRO is one half up to the last threshold."""
    mask = np.zeros((20, 30), bool)
    mask[:9, :11] = True
    mask[15, 25] = True
    scores = mask.astype(np.float32)
    scores[15, 25] = -1
    assert pixel_metrics([scores], [mask])["aupro"] == pytest.approx(0.5)
    recall = component_recall([scores], [mask], threshold=0.5)
    assert [(r.overlap, r.size, r.area) for r in recall] == [
        (1.0, "large", 99 / 600),
        (0.0, "small", 1 / 600),
    ]


def test_no_defect_gives_nan_and_says_so():
    with pytest.warns(UserWarning, match="no anomalous pixels"):
        result = pixel_metrics([np.ones((4, 4), np.float32)], [np.zeros((4, 4), bool)])
    assert all(np.isnan(value) for value in result.values())
    with pytest.warns(UserWarning, match="no normal pictures"):
        assert all(np.isnan(value) for value in image_metrics(np.ones(3), np.ones(3, bool)).values())


def test_spro_saturates_and_counts_overlapping_defects():
    half = np.zeros((10, 20), np.float32)
    half[0, :10] = 1  # half of a defect of 20 pixels
    mask = np.zeros((10, 20), bool)
    mask[0] = True
    assert spro([half], [[LogicalDefect(mask, saturation=10)]]) == pytest.approx(1.0)
    # Unsaturated: the other half ties with all defect-free pixels; PRO rises from 1/2 to 1 along the FPR.
    assert spro([half], [[LogicalDefect(mask, saturation=20)]]) == pytest.approx(0.5 + 0.5 * 0.05 / 2)
    wider = mask.copy()
    wider[1] = True
    two = [LogicalDefect(mask, saturation=10), LogicalDefect(wider, saturation=20)]
    assert spro([half], [two]) == pytest.approx((1 + 0.5 + 0.5 * 0.05 / 2) / 2)


def test_ignored_pixels_and_other_sizes_count_nowhere():
    maps, masks = simulated(pictures=6, side=100)
    rng = np.random.default_rng(1)
    ignore = [rng.random(mask.shape) < 0.2 for mask in masks]
    expected = pixel_metrics(maps, masks, ignore)
    poisoned = [np.where(skip, np.float32(1e9), scores) for skip, scores in zip(ignore, maps, strict=True)]
    assert pixel_metrics(poisoned, masks, ignore) == expected

    tiny, large = np.zeros((100, 100), bool), np.zeros((100, 100), bool)
    tiny[5:8, 5:8] = True
    large[50:70, 50:70] = True
    scores = rng.random((100, 100), dtype=np.float32)
    both, good = [tiny | large], np.zeros((100, 100), bool)
    assert pixel_metrics([scores], both, size="tiny") == pixel_metrics([scores], [tiny], [large])
    assert pixel_metrics([scores, scores], [both[0], good], size="large") == pixel_metrics(
        [scores, scores], [large, good], [tiny, good]
    )
    with pytest.warns(UserWarning, match="no anomalous"):
        assert np.isnan(pixel_metrics([scores], both, size="small")["aupro"])


def test_an_ignored_strip_does_not_split_a_defect():
    mask, strip = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    mask[4, 1:8] = True
    mask[8, 8] = True
    strip[:, 4] = True
    recall = component_recall([mask.astype(np.float32)], [mask], 0.5, [strip])
    assert [r.overlap for r in recall] == [1.0, 1.0]
    scores = np.where(mask, 1, 0).astype(np.float32)
    scores[
        4, 5:8
    ] = -1  # one side of the strip is missed: half of the first defect, not the whole of a third one
    assert pixel_metrics([scores], [mask], [strip])["aupro"] == pytest.approx(0.75)


def test_aupro_cflow_follows_its_definition():
    maps, masks = simulated(seed=3)
    low, high = float(np.min(maps)), float(np.max(maps))
    fpr, pro = curve_at(maps, masks, np.arange(low, high, (high - low) / 200)[:200])
    fpr, pro = fpr[fpr < LIMIT][::-1], pro[fpr < LIMIT][::-1]
    expected = np.trapezoid(pro, (fpr - fpr.min()) / (fpr.max() - fpr.min()))
    assert aupro_cflow(maps, masks) == pytest.approx(expected, abs=1e-9)


def test_bad_maps_are_refused_by_name():
    maps, masks = [np.zeros((4, 4), np.float32) for _ in range(2)], [np.eye(4, dtype=bool)] * 2
    maps[1][2, 2] = np.nan
    with pytest.raises(MetricsError, match=r"part-7\.png.*finite"):
        pixel_metrics(maps, masks, names=["part-6.png", "part-7.png"])
    with pytest.raises(ValueError, match=r"picture 1.*\(4, 4\)"):
        pixel_metrics([maps[0], np.zeros((4, 5), np.float32)], masks)
    with pytest.raises(MetricsError, match=r"picture 1.*nan"):
        image_metrics(np.array([0.0, np.nan]), np.array([0, 1]))


def test_a_defect_type_is_judged_against_all_good_pictures():
    subsets = defect_subsets(["scratch", "good", "dent", "good", "scratch"])
    assert {name: rows.tolist() for name, rows in subsets.items()} == {
        "all": [0, 1, 2, 3, 4],
        "dent": [1, 2, 3],
        "scratch": [0, 1, 3, 4],
    }


@pytest.mark.parametrize("signal", [0.3, 1.0, 3.0])
def test_binned_resamples_equal_exact_ones(monkeypatch, signal):
    """Each resample, computed from histograms, against the exact metrics of the pictures drawn."""
    maps, masks = simulated(pictures=10, side=256, signal=signal)  # more anomalous pixels than bins
    groups = [k // 2 for k in range(10)]
    draws = np.array([[1, 1, 1, 1, 1], [2, 0, 1, 1, 1], [0, 3, 0, 1, 1], [0, 0, 0, 0, 5]], float)
    monkeypatch.setattr("training.intervals.draw_counts", lambda *_: draws)
    estimates = evaluate_pixels(maps, masks, groups)
    for row, counts in enumerate(draws):
        drawn = [k for k in range(10) for _ in range(int(counts[groups[k]]))]
        exact = pixel_metrics([maps[k] for k in drawn], [masks[k] for k in drawn])
        for name, bound in {
            "pixel_auroc": 2.5e-4,
            "aupro": 8.2e-4,
            "pixel_ap": 1e-3,
            "pixel_f1max": 1e-3,
        }.items():
            assert estimates[name].resamples[row] == pytest.approx(exact[name], abs=bound), name


def test_image_resamples_are_exact(monkeypatch):
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 6, 20).astype(float), rng.random(20) < 0.5
    groups = [f"part {k // 3}" for k in range(20)]
    draws = rng.multinomial(7, np.full(7, 1 / 7), size=8).astype(float)
    monkeypatch.setattr("training.intervals.draw_counts", lambda *_: draws)
    estimates = evaluate_images(scores, labels, groups)
    for row, counts in enumerate(draws):
        drawn = [k for k in range(20) for _ in range(int(counts[k // 3]))]
        found = [estimates[name].resamples[row] for name in ("image_auroc", "image_ap", "image_f1max")]
        assert found == pytest.approx(sklearn_metrics(scores[drawn], labels[drawn]), abs=1e-12)


def test_intervals_cover_the_truth():
    """Normal scores with a known AUROC: a 95 % interval should miss it in about one case in twenty."""
    rng = np.random.default_rng(0)
    truth, labels, hits = 0.7602499, np.arange(120) % 2 == 1, 0  # shift of one sigma: Phi(1 / sqrt 2)
    for seed in range(100):
        scores = rng.standard_normal(120) + labels
        low, high = evaluate_images(scores, labels, range(120), resamples=300, seed=seed)[
            "image_auroc"
        ].interval
        hits += low <= truth <= high
    assert hits >= 88


def test_copies_in_a_group_do_not_narrow_the_interval():
    rng = np.random.default_rng(3)
    labels = np.arange(40) % 2 == 1
    scores = rng.standard_normal(40) + labels
    copies, parts = np.tile(scores, 5), list(range(40)) * 5

    def width(groups):
        low, high = evaluate_images(copies, np.tile(labels, 5), groups)["image_auroc"].interval
        return high - low

    assert width(parts) > 1.7 * width(range(200))  # sqrt(5) = 2.24 expected


def test_resampling_is_repeatable_and_honest_about_too_little():
    maps, masks = simulated(pictures=4)
    first, again, other = (evaluate_pixels(maps, masks, "abcd", seed=seed)["aupro"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.resamples, again.resamples)
    assert not np.array_equal(first.resamples, other.resamples)
    assert first.value == pixel_metrics(maps, masks)["aupro"]
    assert np.isnan(evaluate_pixels(maps, masks, "aaaa")["aupro"].interval).all()
    # Both groups are needed: half of the resamples draw one of them twice.
    few = evaluate_images(np.array([1.0, 2.0]), np.array([0, 1]), ["a", "b"])["image_auroc"]
    assert 0.4 < np.isnan(few.resamples).mean() < 0.6
    assert np.isnan(Estimate(0.5, np.array([np.nan, np.nan, 0.5])).interval).all()


def test_mean_leaves_out_what_is_undefined():
    missing = Estimate(float("nan"), np.full(3, np.nan))
    mean = mean_estimate([Estimate(0.4, np.full(3, 0.4)), missing, Estimate(0.8, np.full(3, 0.8))])
    assert mean.value == pytest.approx(0.6)
    assert mean.interval == pytest.approx((0.6, 0.6))
    assert np.isnan(mean_estimate([missing]).value)
