"""The exact-mask contract against a slow, literal reading of docs/formats.md, and the gates."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from generation.compose import Composite, compose, compose_features, measure
from generation.gates import Gates, judge, nearest
from generation.protocol import Edit, FeatureEdit


def literal(pixels, edit):
    """Picture, mask, leak, hollow, contrast as the specification words them, on the whole picture."""
    levels = np.iinfo(pixels.dtype).max
    y0, y1, x0, x1 = edit.box
    after = pixels.astype(np.int64)
    after[y0:y1, x0:x1] = np.rint(np.clip(edit.patch.astype(np.float64), 0, 1) * levels)
    change = np.abs(after - pixels.astype(np.int64)).max(axis=2) * (255 / levels)
    allowed = np.zeros(change.shape, bool)
    allowed[y0:y1, x0:x1] = edit.region
    mask = (change > 2) & allowed
    padded = np.pad(mask, 2)
    mask = ndimage.binary_erosion(ndimage.binary_dilation(padded, np.ones((3, 3))), np.ones((3, 3)))[
        2:-2, 2:-2
    ]
    outside = np.pad(~mask, 1, constant_values=True)
    labels, count = ndimage.label(outside)
    for label in range(1, count + 1):
        hole = labels == label
        if label != labels[0, 0] and hole.sum() <= 16:
            mask |= hole[1:-1, 1:-1]
    mask &= allowed
    leak = ((change > 0) & ~mask).sum() / max((change > 0).sum(), 1)
    hollow = (mask & (change <= 2)).sum() / max(mask.sum(), 1)
    picture = np.where(mask[..., None], after, pixels).astype(pixels.dtype)
    contrast = 0.0
    if mask.any():
        ys, xs = np.nonzero(allowed)
        window = pixels[max(ys.min() - 8, 0) : ys.max() + 9, max(xs.min() - 8, 0) : xs.max() + 9].astype(
            np.float64
        )
        smooth = np.rint(ndimage.uniform_filter(window, (5, 5, 1), mode="mirror"))
        variation = np.abs(window - smooth).max(axis=2).mean() * (255 / levels)
        contrast = change[mask].mean() / max(variation, 4.0)
    return picture, mask, leak, hollow, contrast


@st.composite
def edits(draw):
    """A picture and an edit with changes around the threshold of visibility, holes, and leaks."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    height, width = draw(st.integers(5, 40)), draw(st.integers(5, 40))
    channels = draw(st.sampled_from([1, 3]))
    dtype = draw(st.sampled_from([np.uint8, np.uint16]))
    levels = np.iinfo(dtype).max
    pixels = rng.integers(0, levels + 1, (height, width, channels)).astype(dtype)
    y0, x0 = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
    y1, x1 = draw(st.integers(y0 + 1, height)), draw(st.integers(x0 + 1, width))
    shape = (y1 - y0, x1 - x0)
    patch = pixels[y0:y1, x0:x1].astype(np.float32) / np.float32(levels)
    spot = cv2.GaussianBlur(rng.random(shape, np.float32), (0, 0), 1.5) > draw(st.floats(0.4, 0.6))
    strength = draw(st.sampled_from([0.0, 1.0, 2.0, 3.0, 5.0, 80.0]))
    patch = patch + spot[..., None] * rng.normal(0, strength / 255, (*shape, channels)).astype(np.float32)
    region = rng.random(shape) < draw(st.sampled_from([0.0, 0.9, 1.0]))
    return pixels, Edit((y0, y1, x0, x1), np.clip(patch, 0, 1).astype(np.float32), region)


@settings(max_examples=150, deadline=None)
@given(edits())
def test_composite_follows_the_contract_literally(case):
    pixels, edit = case
    before = pixels.copy()
    composite = compose(pixels, edit)
    picture, mask, leak, hollow, contrast = literal(pixels, edit)
    assert (pixels == before).all()  # the source is not written to
    np.testing.assert_array_equal(composite.mask, mask.astype(np.uint8) * 255)
    np.testing.assert_array_equal(composite.content, picture)
    assert composite.content.dtype == pixels.dtype
    assert composite.leak == pytest.approx(leak)
    assert composite.hollow == pytest.approx(hollow)
    # OpenCV and scipy round the mean of 25 whole levels differently only at exact halves.
    assert composite.contrast == pytest.approx(contrast, rel=0.01)
    assert composite.area == pytest.approx(mask.mean())


@settings(max_examples=100, deadline=None)
@given(edits())
def test_the_pixels_of_the_region_alone_are_the_same_edit(case):
    """Where a patch changes nothing else, and what was measured before is taken over."""
    pixels, edit = case
    y0, y1, x0, x1 = edit.box
    levels = np.float32(np.iinfo(pixels.dtype).max)
    rest = pixels[y0:y1, x0:x1].astype(np.float32) / levels
    dense = compose(pixels, replace(edit, patch=np.where(edit.region[..., None], edit.patch, rest)))
    alone = replace(edit, patch=edit.patch[edit.region])
    for one in (alone, replace(alone, measured=measure(pixels, alone))):
        found = compose(pixels, one)
        for name in vars(dense):
            np.testing.assert_array_equal(getattr(found, name), getattr(dense, name), name)


@settings(max_examples=50, deadline=None)
@given(edits())
def test_mask_does_not_depend_on_how_tightly_the_box_is_cut(case):
    pixels, edit = case
    y0, y1, x0, x1 = edit.box
    patch = pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
    region = np.zeros(pixels.shape[:2], bool)
    patch[y0:y1, x0:x1], region[y0:y1, x0:x1] = edit.patch, edit.region
    wide = compose(pixels, Edit((0, pixels.shape[0], 0, pixels.shape[1]), patch, region))
    tight = compose(pixels, edit)
    np.testing.assert_array_equal(wide.mask, tight.mask)
    np.testing.assert_array_equal(wide.content, tight.content)
    np.testing.assert_allclose(wide.signature, tight.signature)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch": np.full((4, 4, 3), np.nan, np.float32)}, "not finite"),
        ({"patch": np.zeros((4, 5, 3), np.float32)}, "patch is"),
        ({"patch": np.zeros((4, 4, 3))}, "float64"),
        ({"region": np.ones((4, 4), np.uint8)}, "region is"),
        ({"box": (0, 4, 7, 11)}, "outside"),
    ],
)
def test_an_edit_that_does_not_fit_is_refused(change, message):
    parts = {"box": (0, 4, 0, 4), "patch": np.zeros((4, 4, 3), np.float32), "region": np.ones((4, 4), bool)}
    with pytest.raises(ValueError, match=message):
        compose(np.zeros((10, 10, 3), np.uint8), Edit(**{**parts, **change}))


def features(strength):
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(8, 6, 6)).astype(np.float16)
    mask = np.zeros((6, 6), bool)
    mask[1:3, 1:3] = True
    return FeatureEdit((clean + np.float16(strength)).astype(np.float16), mask, clean, ("a",), "b")


def test_features_outside_the_mask_are_clean_and_counted_as_leak():
    edit = features(1.0)
    composite = compose_features(edit)
    assert (composite.content[:, ~edit.mask] == edit.clean[:, ~edit.mask]).all()
    assert (composite.content[:, edit.mask] == edit.feature[:, edit.mask]).all()
    assert composite.leak == pytest.approx(32 / 36)
    assert composite.hollow == 0
    assert composite.area == pytest.approx(4 / 36)
    assert composite.contrast > compose_features(features(0.5)).contrast > 0


def composite(**measures):
    signature = np.arange(256, dtype=np.float32)
    good = dict(leak=0.0, hollow=0.0, contrast=5.0, area=0.02, change=30.0, signature=signature)
    empty = np.zeros((100, 100), np.uint8)
    return Composite(content=empty[..., None], mask=empty, **{**good, **measures})


@pytest.mark.parametrize(
    ("measures", "reason"),
    [
        ({}, ""),
        ({"area": 0.0}, "empty"),
        ({"area": 0.0002}, "area"),
        ({"area": 0.004}, "area"),
        ({"area": 0.09}, "area"),
        ({"leak": 0.5}, "leak"),
        ({"hollow": 0.5}, "hollow"),
        ({"contrast": 0.5}, "contrast"),
        ({"change": 3.0}, "duplicate of the source"),
    ],
)
def test_each_gate_names_itself(measures, reason):
    assert judge(composite(**measures), 0.02, Gates()) == reason


def test_near_duplicates_are_found_whatever_else_is_there():
    one = composite()
    others = [np.roll(one.signature, shift) for shift in (40, 90)]
    assert judge(one, 0.02, Gates(), others) == ""
    assert judge(one, 0.02, Gates(), [*others, one.signature * 1.05]) == "duplicate of a sample"
    assert nearest(one.signature, [one.signature]) == 0
    apart = np.zeros(256, np.float32)
    apart[0] = 1
    assert nearest(np.roll(apart, 1), [apart]) == 1
