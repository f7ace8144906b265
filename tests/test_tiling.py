"""Tiles: they cover a picture, what they say joins without a seam, and thin defects survive in them."""

import itertools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.errors import UsageError
from manifests.pictures import small_mask
from manifests.workspace import Workspace
from training.evaluation import predict
from training.fitting import Normal
from training.loading import Sample
from training.metrics import pixel_metrics
from training.tiling import blend, tile_normals, tile_samples, windows
from workflows import detecting, rounds
from workflows.config import check_detector, parse_config
from workflows.demo import write_drawn

shapes = st.tuples(st.integers(8, 200), st.integers(8, 200))
sizes, overlaps = st.integers(8, 64), st.floats(0, 0.75)


@given(shapes, sizes, overlaps)
@settings(max_examples=100, deadline=None)
def test_tiles_cover_the_picture_and_overlap_enough(shape, size, overlap):
    at = windows(shape, size, overlap)
    seen = np.zeros(shape, int)
    for window in at:
        part = window.of(seen)
        assert part.shape == (window.height, window.width) == tuple(min(side, size) for side in shape)
        part += 1
    assert seen.min() >= 1
    tops = sorted({window.top for window in at})
    for above, below in itertools.pairwise(tops):
        assert below - above <= max(1, np.floor(size * (1 - overlap))) + 1  # rounded to pixels


def pointwise(size):
    """Its map is the picture's brightness, so a tile's map is a part of the whole map."""

    def score(batch):
        maps = batch["features"].float().mean(dim=1) / 255
        return maps.amax(dim=(1, 2)), maps

    return SimpleNamespace(
        settings=SimpleNamespace(size=size, leak=None), extract=lambda images: images.float(), score=score
    )


@given(shapes, st.sampled_from([16, 33]), overlaps, st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_tiles_of_a_pointwise_detector_give_the_whole_map(shape, size, overlap, seed):
    shape = tuple(max(side, size + 1) for side in shape)  # else a tile would be resized
    pixels = np.random.default_rng(seed).integers(0, 256, (*shape, 1), dtype=np.uint8)
    ((score, found),) = predict(pointwise(size), [pixels], tiles=overlap)
    np.testing.assert_allclose(found, pixels[..., 0] / 255, atol=2e-3)  # features are half precision
    assert score == pytest.approx(pixels.max() / 255, abs=2e-3)


def test_a_picture_that_fits_is_scored_as_without_tiles():
    pictures = [np.random.default_rng(k).integers(0, 256, (20 + k, 30, 3), np.uint8) for k in range(3)]
    whole, tiled = (list(predict(pointwise(32), pictures, tiles=tiles)) for tiles in (None, 0.5))
    for (a, scores), (b, others) in zip(whole, tiled, strict=True):
        assert a == b
        np.testing.assert_array_equal(scores, others)


def test_no_seam_shows_where_tiles_disagree():
    """Each tile is off by a constant of its own, as a detector's context makes it."""
    shape, size = (200, 260), 64
    at = windows(shape, size, 0.5)
    rng = np.random.default_rng(0)
    maps = [np.full((size, size), value, np.float32) for value in rng.uniform(-1, 1, len(at))]
    blended = blend(maps, at, shape)
    steps = max(np.abs(np.diff(blended, axis=axis)).max() for axis in (0, 1))
    hard = np.zeros(shape, np.float32)
    for window, scores in zip(at, maps, strict=True):
        window.of(hard)[:] = scores
    cut = max(np.abs(np.diff(hard, axis=axis)).max() for axis in (0, 1))
    assert steps < 0.06 * cut
    assert blended.min() >= -1 and blended.max() <= 1


def line_detector(size):
    """Brightness above that of the neighbourhood: what a real detector's features can tell at its scale."""

    def score(batch):
        values = batch["features"].float().mean(dim=1, keepdim=True) / 255
        around = torch.nn.functional.avg_pool2d(values, 9, 1, 4, count_include_pad=False)
        maps = (values - around)[:, 0]
        return maps.amax(dim=(1, 2)), maps

    return SimpleNamespace(
        settings=SimpleNamespace(size=size, leak=None), extract=lambda images: images.float(), score=score
    )


def test_a_line_of_one_pixel_that_a_resize_loses_is_found_in_tiles():
    size, side = 64, 512
    rng = np.random.default_rng(3)
    pictures, masks = [], []
    for number in range(6):
        # Grain as coarse as the resize keeps, so that it does not average away as the line does.
        coarse = np.kron(rng.normal(0, 5, (side // 8, side // 8)), np.ones((8, 8)))
        mask = np.zeros((side, side), bool)
        if number % 2:
            mask[100 + 50 * number, 60:400] = True
        pictures.append((128 + coarse + 30 * mask).clip(0, 255).astype(np.uint8)[..., None])
        masks.append(mask)
    labels = np.array([mask.any() for mask in masks])
    found = {tiles: list(predict(line_detector(size), pictures, tiles=tiles)) for tiles in (None, 0.25)}
    precision = {}
    for tiles, results in found.items():
        maps = [scores for _, scores in results]
        fitted = [small_mask(mask, scores.shape) for mask, scores in zip(masks, maps, strict=True)]
        precision[tiles] = pixel_metrics(maps, fitted)["pixel_ap"]
    assert precision[None] < 0.15 and precision[0.25] > 0.8, precision
    scores = np.array([score for score, _ in found[0.25]])
    assert scores[labels].min() > scores[~labels].max()


def test_training_tiles_pair_with_their_normals():
    normal = np.random.default_rng(0).integers(0, 256, (90, 130, 3), np.uint8)
    image, mask = normal.copy(), np.zeros((90, 130), bool)
    mask[60:80, 5:12] = True
    image[mask] = 0
    sample = Sample("s", image, mask, normal, {"category": "a", "image_id": "n"}, {})
    tiles = {tile.image_id: tile for tile in tile_normals([Normal("n", "a", normal)], 64, 0.25)}
    assert len(tiles) == 6 == len(windows((90, 130), 64, 0.25))
    cut = list(tile_samples([sample], 64, 0.25))
    assert 0 < len(cut) < 6  # only where some of the mask is
    for part in cut:
        np.testing.assert_array_equal(part.normal, tiles[part.image_id].pixels)
        np.testing.assert_array_equal((part.image != part.normal).any(axis=2), part.mask)
        assert part.mask.any() and part.category == "a"


def test_a_run_in_tiles_trains_and_judges(tmp_path):
    """By the command's own stages, with some samples held out to stop by."""
    write_drawn(tmp_path / "pictures", train=8, good=3, each=1)
    shutil.rmtree(tmp_path / "pictures/cloth")
    detector = {"size": 32, "steps": 3, "hidden": 16, "ffn": 16, "bank": 1, "patience": 2}
    config = parse_config(
        {
            "source": str(tmp_path / "pictures"),
            "samples": 24,
            "generation": {"generators": {"cutpaste": {}}},
            "detector": {"name": "onenip", "settings": detector, "tiles": 0.25},
            "evaluation": {"resamples": 10},
            "cluster": {"workers": 1},
        },
        name="test",
    )
    space = Workspace(str(tmp_path / "run"))
    with space.writing():
        number = rounds.begin(config, space, new_round=False)
        assert rounds.generate(space, number, config.cluster)
        assert detecting.train(space, number) and detecting.evaluate(space, number)
    assert detecting.load_detector(space, number)[1]["tiles"] == 0.25


def test_a_tile_in_which_nothing_counts_does_not_decide():
    picture = np.zeros((64, 128, 1), np.uint8)
    picture[:, 64:] = 255
    ignore = np.zeros((64, 128), bool)
    ignore[:, 60:] = True
    (score, _), (whole, _) = (
        next(predict(pointwise(64), [picture], tiles=0.0, ignore=[given])) for given in (ignore, None)
    )
    assert score < 0.2 < 0.9 < whole


def test_tiles_are_refused_where_scores_depend_on_each_other():
    dfd = {"name": "dfd", "tiles": 0.25}
    check_detector(parse_config({"source": "x", "detector": dfd}, name="test"), "test")
    batch = dfd | {"settings": {"normalise": "batch"}}
    with pytest.raises(UsageError, match=r"detector\.tiles: .*normalise: batch"):
        check_detector(parse_config({"source": "x", "detector": batch}, name="test"), "test")
