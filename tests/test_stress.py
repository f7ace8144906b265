"""Pictures under stress: what stays true of them, and curves that begin at the undisturbed figures."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.pictures import sha256
from manifests.schema import METRICS, Image, to_table
from manifests.workspace import Workspace
from training.evaluation import Judged, figures, ignored, judge, truth
from training.stress import LEVELS, STRENGTHS, Stress, corners, disturb, light_field, place
from workflows import stressing
from workflows.tables import stress_table

KINDS = sorted(STRENGTHS)
anything = st.builds(Stress, st.sampled_from(KINDS), st.sampled_from(LEVELS))
names = st.text(max_size=12)
shapes = st.tuples(st.integers(24, 90), st.integers(24, 90))


def noise(shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@given(anything, names, shapes, st.sampled_from([1, 3]))
@settings(max_examples=60, deadline=None)
def test_a_picture_keeps_its_form_and_what_is_done_depends_on_its_name_alone(stress, name, shape, channels):
    pixels = noise((*shape, channels))
    before = pixels.copy()
    changed = disturb(pixels, stress, name)
    assert (changed.shape, changed.dtype) == (pixels.shape, np.uint8)
    np.testing.assert_array_equal(pixels, before)
    np.testing.assert_array_equal(changed, disturb(pixels, stress, name))
    if stress.level == 0:
        assert changed is pixels
        mask = pixels[..., 0] > 128
        assert place(mask, stress, name) is mask


@given(names, st.sampled_from(LEVELS), st.tuples(st.integers(60, 160), st.integers(60, 160)))
@settings(max_examples=60, deadline=None)
def test_a_mask_moves_with_its_picture(name, level, shape):
    mask = np.zeros(shape, np.uint8)
    cv2.ellipse(mask, (shape[1] // 3, shape[0] // 2), (shape[1] // 5, shape[0] // 4), 20, 0, 360, 1, -1)
    stress = Stress("viewpoint", level)
    picture = disturb(np.where(mask, 200, 40).astype(np.uint8)[..., None], stress, name)[..., 0] > 120
    moved = place(mask > 0, stress, name)
    outside = place(np.zeros(shape, bool), stress, name, outside=True)
    picture &= ~outside  # mirrored there
    assert (picture & moved).sum() / (picture | moved).sum() > 0.93


@given(names, st.floats(0, 0.3), st.floats(0.2, 5))
def test_nothing_leaves_the_frame(name, strength, aspect):
    found = corners(aspect, strength, name)
    assert found.min() >= -1e-6 and found.max() <= 1 + 1e-6
    if strength == 0:
        np.testing.assert_allclose(found, [[0, 0], [1, 0], [1, 1], [0, 1]], atol=1e-6)


@given(names, st.sampled_from(LEVELS), st.integers(0, 199), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_line_of_one_pixel_does_not_vanish(name, level, at, upright):
    mask = np.zeros((200, 200), bool)
    mask[at, 20:160] = True
    mask = mask.T if upright else mask
    assert place(mask, Stress("viewpoint", level), name).any()


def test_every_level_does_more_in_the_same_direction():
    smooth = cv2.GaussianBlur(noise((256, 256, 1)), (0, 0), 2)[..., None].astype(np.float32)
    pixels = (40 + 160 * (smooth - smooth.min()) / np.ptp(smooth)).astype(np.uint8)
    for kind in KINDS:
        for name in ("a", "b", "c"):
            change = [
                np.abs(disturb(pixels, Stress(kind, level), name).astype(float) - pixels).mean()
                for level in LEVELS
            ]
            assert change == sorted(change) and change[1] > 0, (kind, name)
    assert not np.array_equal(
        disturb(pixels, Stress("light", 4), "a"), disturb(pixels, Stress("light", 4), "b")
    )


@given(names, st.floats(0.01, 0.9), shapes)
@settings(max_examples=40, deadline=None)
def test_light_is_smooth_and_within_its_strength(name, strength, shape):
    gain = light_field(shape, strength, name)
    assert gain.min() == pytest.approx(1 - strength, abs=1e-5)
    assert gain.max() == pytest.approx(1 + strength, abs=1e-5)
    steps = [np.abs(np.diff(gain, axis=axis)).max() * shape[axis] for axis in (0, 1)]
    assert max(steps) < 8 * strength  # no edge that could be taken for a defect


def test_blur_takes_the_same_detail_of_a_larger_picture():
    small = cv2.GaussianBlur(noise((128, 128, 1)), (0, 0), 3)
    large = cv2.resize(small, (256, 256), interpolation=cv2.INTER_CUBIC)
    blurred = [disturb(p[..., None], Stress("blur", 4), "a")[..., 0].astype(float) for p in (small, large)]
    back = cv2.resize(blurred[1], (128, 128), interpolation=cv2.INTER_AREA)
    assert np.abs(back - blurred[0]).max() < 4


# -- curves ---------------------------------------------------------------------------------------------


def brightness(size=64):
    """Its map is the distance of a picture's brightness to its median."""

    def score(batch):
        maps = batch["features"].float().mean(dim=1) / 255
        maps = (maps - maps.flatten(1).median(dim=1).values[:, None, None]).abs()
        return maps.amax(dim=(1, 2)), maps

    return SimpleNamespace(
        settings=SimpleNamespace(size=size, leak=None), categories=("a", "b"), calibration={"threshold": 0.5},
        extract=lambda images: images.float(), score=score,
    )  # fmt: skip


@pytest.fixture
def images(tmp_path):
    rows = []
    for number in range(16):
        category, defective = "ab"[number % 2], number % 4 > 1
        pixels = np.clip(noise((80, 120, 1), number).astype(float) / 8 + 100, 0, 255).astype(np.uint8)
        mask = np.zeros((80, 120), np.uint8)
        if defective:
            mask[10 + number : 30 + number, 40:60] = 255
            pixels[mask > 0] += 8 + 4 * number
        path, mask_path = tmp_path / f"{number}.png", tmp_path / f"{number}_mask.png"
        cv2.imwrite(str(path), pixels)
        cv2.imwrite(str(mask_path), mask)
        image = Image(
            image_id=f"i{number}", path=str(path), sha256=sha256(path.read_bytes()), category=category,
            defect="hole" if defective else "good", mask_path=str(mask_path) if defective else None,
            width=120, height=80, mode="L", bits=8, group=f"g{number}", split="feedback",
        )  # fmt: skip
        rows.append(image)
    return rows


def test_what_is_mirrored_beyond_the_border_counts_nowhere(images, tmp_path):
    stress = Stress("viewpoint", 4)
    seen = disturb(np.full((80, 120, 1), 255, np.uint8), stress, images[2].image_id)
    assert seen.min() == 255  # no plain border
    skipped = ignored(images[2], 64, stress)
    assert 0.02 < skipped.mean() < 0.6
    assert not (skipped & truth(images[2], 64, stress)).any()
    roi = np.zeros((80, 120), np.uint8)
    roi[:, :60] = 255
    cv2.imwrite(str(tmp_path / "roi.png"), roi)
    more = ignored(replace(images[2], roi_path=str(tmp_path / "roi.png")), 64, stress)
    assert (more & ~skipped).any() and not (skipped & ~more).any()
    assert ignored(images[2], 64, Stress("light", 4)) is None


def with_saturations(images, folder):
    """The same pictures, their defects stored as MVTec LOCO stores them: half of the area saturates."""
    entry = {"defect_name": "hole", "pixel_value": 255, "saturation_threshold": 0.5}
    (folder / "defects_config.json").write_text(json.dumps([{**entry, "relative_saturation": True}]))
    found = []
    for image in images:
        if image.mask_path is not None:
            own = folder / "ground_truth" / "hole" / image.image_id
            own.mkdir(parents=True)
            shutil.copy(image.mask_path, own / "000.png")
            image = replace(image, mask_path=str(own))
        found.append(image)
    return found


def right_half(mask):
    half = mask.copy()
    if mask.any():
        half[:, : np.median(np.nonzero(mask)[1]).astype(int)] = False
    return half


def test_saturated_figures_are_those_of_defects_that_moved_with_the_picture(images, tmp_path):
    images = with_saturations(images, tmp_path)
    for stress in (Stress("blur", 2), Stress("viewpoint", 4)):

        def spro_of(found, stress=stress):
            """Of maps that mark what ``found`` makes of the moved mask."""
            judged = []
            for image in images:
                mask, skip = truth(image, (80, 120), stress), ignored(image, (80, 120), stress)
                judged.append(Judged(image, 0.0, found(mask).astype(np.float32), mask, skip))
            return stressing.by_category(judged, 5, stress)["mean"]["spro"].value

        assert spro_of(lambda mask: mask) == pytest.approx(1)
        assert spro_of(right_half) > 0.95, "half of each defect saturates it"
        assert spro_of(lambda mask: np.roll(mask, 40, axis=1)) < 0.3


def test_curves_begin_at_the_undisturbed_figures_and_fall(images, tmp_path, monkeypatch):
    images = with_saturations(images, tmp_path)
    config = SimpleNamespace(
        output=SimpleNamespace(max_side=None), seed=5, evaluation=SimpleNamespace(resamples=20),
        detector=SimpleNamespace(name="brightness", tiles=None),
    )  # fmt: skip
    held = replace(images[0], image_id="held", split="test", path="must not be read")
    known = {image.image_id: image for image in [*images, held]}
    monkeypatch.setattr(
        stressing, "open_round", lambda space, number: SimpleNamespace(images=known, config=config)
    )
    monkeypatch.setattr(stressing, "load_detector", lambda space, number: (brightness(), {}))
    space = Workspace(str(tmp_path / "w"))
    rows = stressing.stress(space, 1)
    assert space.exists("rounds/001/stress.parquet")

    judged = judge(brightness(), images)
    plain = to_table(
        figures(
            judged, round_=1, detector="brightness", split="feedback", training_seed=5, resamples=20
        ),
        METRICS,
    ).to_pylist()  # fmt: skip
    expected = {
        (row["category"], row["metric"]): (row["value"], row["low"], row["high"])
        for row in plain
        if (row["defect"], row["size"]) == ("all", "all") and not row["metric"].startswith("spro@")
    }
    assert len(expected) == 3 * 8
    for kind in KINDS:
        for level in LEVELS:
            found = {
                (row["category"], row["metric"]): (row["value"], row["low"], row["high"])
                for row in rows
                if (row["kind"], row["level"]) == (kind, level)
            }
            assert found == expected if level == 0 else level < 4 or found != expected, (kind, level)
    light = {row["level"]: row["value"] for row in rows
             if (row["kind"], row["category"], row["metric"]) == ("light", "mean", "pixel_ap")}  # fmt: skip
    assert light[4] < light[0] - 0.2

    monkeypatch.setattr(stressing, "load_detector", lambda *_: pytest.fail("the stored curves stand"))
    assert stressing.stress(space, 1) == rows
    table = stress_table(rows).splitlines()
    assert "level 4" in table[0]
    assert all(any(line.split()[:2] == [m, "light"] for line in table) for m in ("pixel_ap", "spro"))
