"""``cut`` as a generator: twins to an exact mask, one outcome a recipe, the same bytes again."""

import json
import shutil
from collections import Counter
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from generation import registry
from generation.cut import chain
from generation.cut.attention import MapReader
from generation.cut.chain import Twins
from generation.cut.checkpoints import ModelError
from generation.cut.generator import Model, crop_around
from generation.cut.models import StableDiffusion
from generation.cut.residual import compose_twins, locate, soften
from generation.cut.settings import CutParams
from generation.gates import Gates
from generation.protocol import Source
from generation.synthesis import synthesise
from manifests.errors import UsageError
from manifests.schema import Recipe, canonical_json
from manifests.workspace import Workspace, part
from workflows import rounds
from workflows.config import parse_config
from workflows.replaying import replay
from workflows.stages import Job, make_shard, settings_hash

CUT = registry.get("cut")
OPEN = Gates(
    leak_max=1, hollow_max=1, contrast_min=0, area_low=0, area_high=1e9, pixels_min=1, change_min=0,
    duplicate=0, strength_min=0, spread_min=0, clip_gain_min=-2,
)  # fmt: skip
# Few steps of a random network draw something visible only under much guidance.
SETTINGS = {"size": 64, "steps": 20, "gamma": 0.2, "guidance": 40, "attention": 2, "refinement": 0.2}
CRACK = "a photo of a bottle with a crack on it"


def picture(height=96, width=80, channels=3, dtype=np.uint8, seed=0):
    """Soft blotches and grain."""
    rng = np.random.default_rng(seed)
    small = rng.integers(90, 170, (6, 6, channels)).astype(np.float32)
    smooth = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR).reshape(height, width, -1)
    pixels = np.clip(smooth + rng.integers(-5, 6, (height, width, channels)), 0, 255)
    return (pixels * (257 if dtype == np.uint16 else 1)).astype(dtype)


def source(pixels=None, allowed=None):
    pixels = picture() if pixels is None else pixels
    return Source(pixels, np.ones(pixels.shape[:2], np.bool_) if allowed is None else allowed)


def recipe(seed=0, params=None, **changes):
    settings = CutParams(**{**SETTINGS, **(params or {})})
    row = Recipe(
        sample_id=f"cut-{seed}",
        round=0,
        image_id="picture",
        category="bottle",
        generator="cut",
        defect="crack",
        prompt=CRACK,
        detail="a photo of a bottle with a deep jagged crack across its side",
        area=0.03,
        severity=0.7,
        count=1,
        location="anywhere",
        donors=(),
        params=canonical_json(settings.model_dump(mode="json")),
        seed=seed,
        batch=0,
        shard=0,
    )
    return replace(row, **changes)


@pytest.fixture(scope="module")
def model(tiny_sd, tiny_clip):
    sd = tiny_sd["sd15"]
    return Model(sd, MapReader(sd), tiny_clip, tiny_clip)


@pytest.fixture
def blind(tiny_sd):
    """No CLIP at all: with drawn twins no network runs."""
    return Model(tiny_sd["sd15"], None, None, None)


def make(recipes, model, given_source=None, gates=OPEN, attempts=1):
    given_source = given_source or source()
    return synthesise(recipes, lambda _: given_source, CUT, model, gates, attempts, {})


def drawn(requests, sign=1.0):
    """What a perfect model would give: the picture, and a bump in its location that fades outwards. Where the
    location is most of the picture, in a disc of it."""
    twins = []
    for request in requests:
        place = request.location.astype(np.uint8)
        depth = cv2.distanceTransform(np.pad(place, 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
        if place.mean() > 0.5:
            disc = np.zeros_like(place)
            y, x = np.unravel_index(depth.argmax(), depth.shape)
            cv2.circle(disc, (int(x), int(y)), 12, 1, -1)
            depth = cv2.distanceTransform(disc & place, cv2.DIST_L2, 5)
        bump = (0.05 + 0.25 * depth / max(depth.max(), 1))[..., None] * (depth > 0)[..., None]
        anomaly = np.clip(request.image + sign * bump, 0, 1).astype(np.float32)
        twins.append(Twins(anomaly, request.image, request.location.astype(np.float32), {"attention": 0.5}))
    return twins


@pytest.fixture
def drawing(monkeypatch):
    """Twins drawn by ``drawn``; gives the sizes of the batches."""
    sizes = []

    def sample(requests, *_):
        sizes.append(len(requests))
        return drawn(requests)

    monkeypatch.setattr(chain, "sample", sample)
    return sizes


def exact(outcome, given_source):
    """The contract of a mask."""
    outside = outcome.mask == 0
    assert outcome.pixels.dtype == given_source.pixels.dtype
    assert outcome.pixels.shape == given_source.pixels.shape
    assert set(np.unique(outcome.mask)) <= {0, 255}
    assert outside[~given_source.allowed].all()
    np.testing.assert_array_equal(outcome.pixels[outside], given_source.pixels[outside])


# -- where the anomaly is -------------------------------------------------------------------------------


def hill(height=80, width=90, radius=24.0, base=0.01, seed=0):
    """A disc that falls from 1 to 0.5 and then to a faint noise."""
    y, x = np.mgrid[:height, :width]
    distance = np.hypot(y - height // 2, x - width // 2) / radius
    noise = np.random.default_rng(seed).uniform(0, base, (height, width))
    return np.where(distance < 1, 1 - 0.5 * distance, noise).astype(np.float32)


@pytest.mark.parametrize("wanted", [20, 100, 400, 1200])
def test_the_mask_covers_about_what_is_wanted(wanted):
    found = locate(hill(), np.ones((80, 90), bool), wanted)
    assert 0.75 * wanted < found.sum() < 1.35 * wanted


def test_the_mask_grows_with_the_wanted_area_and_stops_where_nothing_stands_out():
    score, allowed = hill(), np.ones((80, 90), bool)
    wanted = [1, 5, 10, 50, 200, 600, 1500, 3000, 7200]
    areas = [int(locate(score, allowed, one).sum()) for one in wanted]
    assert areas == sorted(areas)
    assert spearmanr(wanted, areas).statistic > 0.9
    disc = score >= 0.5
    assert not (
        locate(score, allowed, 7200) & ~cv2.dilate(disc.astype(np.uint8), np.ones((3, 3))).astype(bool)
    ).any()


def test_the_mask_keeps_to_the_allowed_places():
    rng = np.random.default_rng(0)
    score = hill()
    for _ in range(20):
        allowed = cv2.resize(rng.integers(0, 2, (8, 9)).astype(np.uint8), (90, 80), interpolation=0) > 0
        found = locate(score, allowed, float(rng.uniform(1, 3000)))
        assert found.dtype == np.bool_ and not (found & ~allowed).any()
    assert not locate(score, np.zeros_like(allowed), 100).any()
    only = np.zeros_like(allowed)
    only[40, 45] = True
    assert not (locate(score, only, 100) & ~only).any()


def test_specks_are_dropped():
    score = hill()
    score[5, 5] = score[5, 80] = score[70, 10] = 0.98
    found = locate(score, np.ones_like(score, bool), 800)
    assert found.sum() > 500
    assert not found[5, 5] and not found[5, 80] and not found[70, 10]


def test_no_difference_gives_no_mask():
    allowed = np.ones((40, 40), bool)
    assert not locate(np.zeros((40, 40), np.float32), allowed, 100).any()
    crop = np.full((40, 40, 3), 0.5, np.float32)
    same = Twins(crop, crop, np.zeros((40, 40), np.float32))
    for composition in ("residual", "gradient", "paste"):
        for mask in ("twin", "attention", "product"):
            found = compose_twins(
                crop, same, allowed, 100, 0.1, 0.5, CutParams(composition=composition, mask=mask)
            )
            assert not found.region.any() and found.measures["strength"] == 0
            np.testing.assert_array_equal(found.patch, crop)


def test_the_weight_is_one_in_the_region_and_falls_off_close_by():
    region = np.zeros((64, 64), bool)
    region[20:30, 20:40] = True
    allowed = np.ones_like(region)
    allowed[:, 38:] = False
    weight = soften(region & allowed, allowed)
    assert weight.dtype == np.float32
    np.testing.assert_allclose(weight[region & allowed], 1, rtol=1e-6)
    assert (weight[~allowed] == 0).all()
    assert weight.min() >= 0 and weight.max() < 1 + 1e-6
    far = ~cv2.dilate(region.astype(np.uint8), np.ones((9, 9))).astype(bool)
    assert (weight[far] == 0).all()


# -- how it joins the source ----------------------------------------------------------------------------


def twins_of(crop, at=(slice(10, 24), slice(30, 52)), change=0.2):
    """At twice the crop's size, blurred and shifted in tone as a decoder does."""
    big = cv2.resize(crop, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR).reshape(
        2 * crop.shape[0], 2 * crop.shape[1], -1
    )
    normal = cv2.GaussianBlur(big, (0, 0), 2).reshape(big.shape) * 0.9 + 0.05
    normal = normal if normal.shape[2] == 3 else np.repeat(normal, 3, axis=2)
    bump = np.zeros(normal.shape[:2], np.float32)
    bump[2 * at[0].start : 2 * at[0].stop, 2 * at[1].start : 2 * at[1].stop] = change
    bump = cv2.GaussianBlur(bump, (0, 0), 3)
    return Twins(normal + bump[..., None], normal, (bump > change / 2).astype(np.float32))


@pytest.mark.parametrize("mask", ["twin", "attention", "product"])
@pytest.mark.parametrize("composition", ["residual", "gradient", "paste"])
@pytest.mark.parametrize("channels", [1, 3])
def test_without_weight_the_crop_is_untouched(mask, composition, channels):
    crop = picture(50, 61, channels).astype(np.float32) / 255
    settings = CutParams(mask=mask, composition=composition)
    for at in ((slice(10, 24), slice(30, 52)), (slice(0, 12), slice(40, 61))):  # the second at the border
        allowed = np.zeros((50, 61), bool)
        allowed[at[0].start : at[0].stop + 3, at[1].start : at[1].stop + 3] = True
        found = compose_twins(crop, twins_of(crop, at), allowed, 250, 0.1, 0.5, settings)
        assert found.patch.shape == crop.shape and found.patch.dtype == np.float32
        assert found.region.sum() > 50 and not (found.region & ~allowed).any()
        np.testing.assert_array_equal(found.patch[~found.region], crop[~found.region])
        assert np.abs(found.patch - crop)[found.region].mean() > 0.01
        assert set(found.measures) == {"concentration", "strength", "spread"}


@pytest.mark.parametrize("composition", ["residual", "gradient"])
def test_the_change_goes_from_just_visible_to_what_was_drawn(composition):
    crop = picture(50, 61).astype(np.float32) / 255
    settings, allowed = CutParams(composition=composition), np.ones((50, 61), bool)
    asked = np.linspace(0, 1, 9)
    changes, strengths = [], set()
    for severity in asked:
        found = compose_twins(crop, twins_of(crop), allowed, 250, 0.02, float(severity), settings)
        changes.append(float(np.abs(found.patch - crop)[found.region].mean()))
        strengths.add(found.measures["strength"])
    assert all(b > a for a, b in pairwise(changes))
    assert changes[-1] > 3 * changes[0]
    assert len(strengths) == 1  # what the model drew does not depend on what is asked for
    hardly = twins_of(crop, change=0.002)
    found = compose_twins(crop, hardly, allowed, 250, 0.1, 0.0, settings)
    assert np.abs(found.patch - crop).max() < 3.01 * 0.002 + 0.005  # not inflated beyond three times


def test_the_residual_keeps_the_detail_of_the_source():
    """Nothing of the decoder's blur comes with it; a paste brings it along."""
    crop = picture(50, 61).astype(np.float32) / 255
    allowed, made = np.ones((50, 61), bool), {}
    for composition in ("residual", "paste"):
        settings = CutParams(composition=composition)
        found = compose_twins(crop, twins_of(crop), allowed, 250, 0.15, 1.0, settings)
        inner = found.patch[14:20, 35:47]
        made[composition] = float((inner - cv2.blur(inner, (3, 3))).std())
    inner = crop[14:20, 35:47]
    detail = float((inner - cv2.blur(inner, (3, 3))).std())
    assert made["residual"] > 0.8 * detail
    assert made["paste"] < 0.6 * detail


@pytest.mark.parametrize("seed", range(20))
def test_the_place_of_a_line_is_long_and_narrow(seed):
    allowed = np.ones((256, 256), bool)
    allowed[:, :20] = False
    spots = {}
    for lines in ((), ("crack",)):
        one = recipe(seed, {"lines": lines}, area=0.02)
        (spots[lines],) = CUT.draw(one, source(picture(256, 256), allowed), one.rng(0)).spots
    (blob, line) = spots.values()
    assert line.wanted == blob.wanted
    assert line.allowed.sum() >= 0.5 * 2.2 * line.wanted
    (_, (width, height), _) = cv2.minAreaRect(np.argwhere(line.allowed).astype(np.float32))
    assert max(width, height) > 2.2 * min(width, height)
    top, _, left, _ = line.crop
    y, x = np.nonzero(line.allowed)
    assert allowed[y + top, x + left].all()


def test_where_no_line_fits_its_place_is_a_blob():
    allowed = np.zeros((64, 64), bool)
    allowed[28:37, 28:37] = True
    one = recipe(0, {"lines": ["crack"]}, area=0.009)
    (spot,) = CUT.draw(one, source(picture(64, 64), allowed), one.rng(0)).spots
    assert spot.allowed.sum() > 20


@pytest.mark.parametrize("seed", range(30))
def test_a_crop_holds_its_box_and_lies_in_the_picture(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 200, 2).tolist())
    corners = [sorted(rng.integers(0, side + 1, 2).tolist()) for side in shape]
    (y0, y1), (x0, x1) = ((a, max(b, a + 1)) if a < side else (side - 1, side)
                          for (a, b), side in zip(corners, shape, strict=True))  # fmt: skip
    top, bottom, left, right = crop_around((y0, y1, x0, x1), shape, float(rng.uniform(0.2, 1)))
    assert 0 <= top <= y0 < y1 <= bottom <= shape[0]
    assert 0 <= left <= x0 < x1 <= right <= shape[1]


# -- pictures of every kind -----------------------------------------------------------------------------

KINDS = [
    (96, 80, 3, np.uint8),
    (97, 131, 1, np.uint8),
    (70, 51, 3, np.uint16),
    (33, 40, 1, np.uint16),
    (60, 200, 3, np.uint8),
]
NARROW = [
    (64, 1, 3, np.uint8),
    (1, 90, 1, np.uint16),
    (2, 2, 3, np.uint8),
    (1, 1, 1, np.uint8),
    (3, 7, 1, np.uint8),
]


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("composition", ["residual", "gradient", "paste"])
@pytest.mark.parametrize("kind", KINDS)
def test_grey_colour_odd_and_deep_pictures(kind, composition, free, drawing, blind):
    given_source = source(picture(*kind))
    given_source.allowed[: kind[0] // 4] = False
    before = given_source.pixels.copy()
    recipes = [recipe(seed, {"composition": composition, "free": free}) for seed in range(2)]
    outcomes = make(recipes, blind, given_source, attempts=3)
    for outcome in outcomes:
        assert outcome.status == "accepted", outcome.reason
        exact(outcome, given_source)
        assert (outcome.pixels != before).any()
    np.testing.assert_array_equal(given_source.pixels, before)


@pytest.mark.parametrize("composition", ["residual", "gradient", "paste"])
@pytest.mark.parametrize("kind", NARROW)
def test_the_narrowest_pictures_have_a_clear_outcome(kind, composition, drawing, blind):
    given_source = source(picture(*kind))
    (outcome,) = make([recipe(0, {"composition": composition}, area=0.3)], blind, given_source, attempts=2)
    assert outcome.status in ("accepted", "rejected"), outcome.reason
    assert (outcome.reason == "") == (outcome.status == "accepted")
    if outcome.status == "accepted":
        exact(outcome, given_source)


def test_a_narrow_picture_through_the_networks(model):
    once = {"gamma": 0.05, "twin": "shared"}
    (outcome,) = make([recipe(0, once, area=0.2)], model, source(picture(50, 1, 1)))
    assert outcome.status in ("accepted", "rejected"), outcome.reason


# -- the contract of a generator ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(model):
    """Four recipes of one planned batch, two spots each in the last two, and what became of them."""
    given_source = source(picture(110, 90))
    given_source.allowed[:, :20] = False
    recipes = [recipe(seed, count=1 + seed // 2) for seed in range(4)]
    return given_source, recipes, make(recipes, model, given_source, attempts=2)


def test_outside_the_mask_every_byte_is_the_source(batch):
    given_source, recipes, outcomes = batch
    assert [outcome.recipe for outcome in outcomes] == recipes
    accepted = [outcome for outcome in outcomes if outcome.status == "accepted"]
    # Whether a difference stands out is up to random weights; that some does is not.
    assert len(accepted) >= 2, [outcome.reason for outcome in outcomes]
    for outcome in accepted:
        exact(outcome, given_source)
        assert outcome.mask.any()
        assert outcome.leak == 0
        assert {"attention", "clip_gain", "concentration", "strength", "spread"} == set(outcome.measures)
        assert all(np.isfinite(value) for value in outcome.measures.values())


def test_the_same_planned_batch_gives_the_same_bytes(batch, model):
    given_source, recipes, outcomes = batch
    for one, other in zip(outcomes, make(recipes, model, given_source, attempts=2), strict=True):
        assert (one.status, one.reason, one.attempts) == (other.status, other.reason, other.attempts)
        np.testing.assert_array_equal(one.pixels, other.pixels)
        np.testing.assert_array_equal(one.mask, other.mask)
        assert one.measures == other.measures


def test_other_company_changes_rounding_only(tiny_double):
    """Each recipe alone against four together, at the native size and in double precision, because a random
    network under much guidance amplifies rounding: a level at most."""
    model = Model(tiny_double, MapReader(tiny_double), None, None)
    params = {"size": 128, "gamma": 0.1, "attention": 1}
    recipes = [recipe(seed, params, count=1 + seed // 2) for seed in range(4)]
    together = make(recipes, model)
    assert sum(outcome.status == "accepted" for outcome in together) >= 2
    for one, wanted in zip(recipes, together, strict=True):
        (alone,) = make([one], model)
        assert (alone.status, alone.reason) == (wanted.status, wanted.reason)
        assert ((alone.mask > 0) ^ (wanted.mask > 0)).sum() <= 2
        both = (alone.mask > 0) & (wanted.mask > 0)
        assert np.abs(alone.pixels.astype(int) - wanted.pixels.astype(int))[both].max() <= 1


def test_every_recipe_has_one_outcome_whatever_the_gates_say(model):
    recipes = [recipe(seed, batch=seed // 2) for seed in range(4)]
    outcomes = make(recipes, model, gates=Gates(), attempts=2)
    assert [outcome.recipe for outcome in outcomes] == recipes
    for outcome in outcomes:
        assert outcome.status in ("accepted", "rejected")
        assert (outcome.status == "accepted") == (outcome.reason == "")


def test_severity_raises_the_contrast(drawing, blind):
    severities = np.linspace(0, 1, 8)
    for seed in range(3):
        outcomes = make(
            [recipe(seed, severity=float(one), sample_id=f"cut-{one:.2f}") for one in severities], blind
        )
        contrasts = [outcome.contrast for outcome in outcomes]
        assert spearmanr(severities, contrasts).statistic > 0.8  # flat at the limits of the gain
        assert contrasts == sorted(contrasts) and contrasts[-1] > 1.2 * contrasts[0]


def test_the_area_is_obeyed(drawing, blind):
    given_source = source(picture(160, 150))
    areas = (0.005, 0.02, 0.06)
    medians = []
    for area in areas:
        outcomes = make([recipe(seed, area=area, severity=0.9) for seed in range(8)], blind, given_source)
        medians.append(np.median([outcome.mask_area for outcome in outcomes]))
        assert 0.6 < medians[-1] / area < 1.6
    assert medians == sorted(medians)


def test_a_sample_has_as_many_chains_as_spots(drawing, blind):
    outcomes = make([recipe(0, count=1), recipe(1, count=3), recipe(2, count=2)], blind)
    assert drawing == [4, 2]  # six spots in batches of four
    parts = [cv2.connectedComponents(outcome.mask)[0] - 1 for outcome in outcomes]
    assert parts[0] == 1 and 2 <= parts[1] <= 3
    draws = [CUT.draw(o.recipe, source(), o.recipe.rng(0)) for o in outcomes]
    assert [len(one.spots) for one in draws] == [1, 3, 2]
    assert len({spot.seed for one in draws for spot in one.spots}) == 6


def test_another_attempt_is_another_draw():
    one, again, other = (CUT.draw(recipe(), source(), recipe().rng(number)) for number in (0, 0, 1))
    assert one.spots[0].seed == again.spots[0].seed != other.spots[0].seed
    assert one.spots[0].crop == again.spots[0].crop
    np.testing.assert_array_equal(one.spots[0].allowed, again.spots[0].allowed)


# -- what goes wrong ------------------------------------------------------------------------------------


class Flat(StableDiffusion):
    """Decodes everything to one colour."""

    colour = 0.4

    def decode(self, latents):
        shape = (len(latents), 3, latents.shape[2] * 8, latents.shape[3] * 8)
        return torch.full(shape, self.colour)


class Broken(Flat):
    colour = float("nan")


def swapped(model, kind):
    sd = model.sd
    return replace(model, sd=kind(**{field.name: getattr(sd, field.name) for field in fields(sd)}))


@pytest.mark.parametrize("composition", ["residual", "gradient", "paste"])
def test_a_picture_of_one_colour_is_rejected(composition, model):
    params = {"refinement": 0, "composition": composition}
    (outcome,) = make([recipe(0, params)], swapped(model, Flat), gates=Gates())
    assert (outcome.status, outcome.reason) == ("rejected", "constant")


@pytest.mark.parametrize("composition", ["residual", "gradient", "paste"])
def test_what_is_no_number_fails(composition, model):
    params = {"refinement": 0, "composition": composition}
    (outcome,) = make([recipe(0, params)], swapped(model, Broken), gates=Gates())
    assert outcome.status == "failed"
    assert "not finite" in outcome.reason
    assert outcome.pixels is None


@pytest.mark.parametrize("which", ["anomaly", "normal"])
def test_one_broken_chain_fails_its_own_sample_only(which, monkeypatch, blind):
    broken = {spot.seed for spot in CUT.draw(recipe(1), source(), recipe(1).rng(0)).spots}

    def sample(requests, *_):
        found = drawn(requests)
        for request, twins in zip(requests, found, strict=True):
            if request.seed in broken:
                picture = getattr(twins, which).copy()
                picture[0, 0] = np.nan
                object.__setattr__(twins, which, picture)
        return found

    monkeypatch.setattr(chain, "sample", sample)
    outcomes = make([recipe(seed) for seed in range(3)], blind)
    assert [outcome.status for outcome in outcomes] == ["accepted", "failed", "accepted"]


def raised(error):
    raise error("too much")


@pytest.mark.parametrize(
    ("error", "run_out"),
    [
        (MemoryError, raised),
        (torch.OutOfMemoryError, raised),
        (RuntimeError, lambda _: torch.empty(1 << 55, dtype=torch.uint8)),  # as torch says it on a CPU
    ],
)
def test_where_memory_runs_out_the_batch_is_halved(error, run_out, monkeypatch, blind):
    sizes = []

    def sample(requests, *_):
        sizes.append(len(requests))
        if len(requests) > 1:
            run_out(error)
        return drawn(requests)

    monkeypatch.setattr(chain, "sample", sample)
    outcomes = make([recipe(seed) for seed in range(4)], blind)
    assert sizes == [4, 2, 1, 1, 1, 1]
    assert [outcome.measures["batch"] for outcome in outcomes] == [1] * 4
    assert all(outcome.status == "accepted" for outcome in outcomes)

    def never(requests, *_):
        run_out(error)

    monkeypatch.setattr(chain, "sample", never)
    with pytest.raises(error):  # transient: nothing is recorded, the next run tries again
        make([recipe(seed) for seed in range(4)], blind)


def test_a_prompt_without_an_anomaly_word_is_a_mistake_of_the_configuration(blind):
    with pytest.raises(UsageError, match="holds no anomaly word"):
        make([recipe(prompt="a photo of a bottle", defect="zigzag")], blind)
    with pytest.raises(UsageError, match="holds no anomaly word"):
        make([recipe(0, {"words": {"zigzag": ("wobble",)}}, prompt="a bottle", defect="zigzag")], blind)


def test_a_word_of_ones_own(drawing, blind):
    words = {"words": {"zigzag": ("wobble",)}}
    (outcome,) = make([recipe(0, words, prompt="a bottle with a wobble", defect="zigzag")], blind)
    assert outcome.status == "accepted"


def test_a_checkpoint_that_is_not_there(tiny):
    for params, match in (
        ({"model": "no/such/folder"}, r"no such folder.*pocket"),
        ({"model": str(tiny["clip"])}, r"model_index\.json"),
        ({"model": str(tiny["sd15"]), "clip": "nothing"}, r"CLIP.*nothing"),
        ({"model": str(tiny["sd15"]), "clip": str(tiny["sd15"])}, r"CLIP folder"),
        ({"model": str(tiny["sd15"]), "clip": None, "judge": str(tiny["sd15"])}, r"CLIP folder"),
        ({"model": str(tiny["sd15"]), "clip": None, "judge": "nothing"}, r"CLIP.*nothing"),
    ):
        with pytest.raises(ModelError, match=match):
            CUT.load(CutParams(**params).model_dump(), "cpu")


def test_models_are_loaded_and_named(tiny):
    one = CutParams(model=str(tiny["sd15"]), clip=str(tiny["clip"]), judge=str(tiny["judge"])).model_dump()
    loaded = CUT.load(one, "cpu")
    assert loaded.judge.name != loaded.clip.name
    names = CUT.identify(one)
    assert (names["id"], names["clip_id"], names["judge_id"]) == ("sd15", "clip", "judge")
    assert len({names["weights"], names["clip_weights"], names["judge_weights"]}) == 3
    shared = CUT.load({**one, "judge": one["clip"]}, "cpu")
    assert shared.judge is shared.clip
    bare = CUT.load({**one, "judge": None, "clip": None}, "cpu")
    assert bare.clip is None and bare.judge is None
    assert not [key for key in CUT.identify({**one, "judge": None, "clip": None}) if "_" in key]


def test_the_safety_checker_is_never_loaded(tiny, tmp_path):
    """The index names one whose weights would not load."""
    folder = shutil.copytree(tiny["sd15"], tmp_path / "sd15")
    assert "safety_checker" in json.loads((folder / "model_index.json").read_text())
    (folder / "safety_checker").mkdir()
    (folder / "safety_checker/config.json").write_text("{")
    (folder / "safety_checker/model.safetensors").write_bytes(b"no weights")
    loaded = CUT.load(CutParams(model=str(folder), clip=None, judge=None).model_dump(), "cpu")
    kinds = {type(module).__name__ for part in vars(loaded.sd).values() if isinstance(part, torch.nn.Module)
             for module in part.modules()}  # fmt: skip
    assert kinds and not any("Safety" in kind for kind in kinds)


class Liking:
    """A judge that likes pictures the brighter they are, times ``taste``."""

    def __init__(self, taste):
        self.taste = taste

    def text(self, texts):
        return torch.ones(len(texts), 1)

    def similarity(self, images, _texts):
        return self.taste * images.mean(dim=(1, 2, 3))


@pytest.mark.parametrize(("taste", "reason"), [(1.0, ""), (0.0, "clip"), (-1.0, "clip")])
def test_what_the_description_does_not_fit_better_is_rejected(taste, reason, drawing, blind):
    (outcome,) = make([recipe()], replace(blind, judge=Liking(taste)), gates=Gates(hollow_max=1, leak_max=1))
    assert outcome.reason == reason
    gain = outcome.measures["clip_gain"]
    assert gain > 0 if taste > 0 else gain <= 0


# -- a run, and one sample of it again ------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cut") / "bottle"
    folder.mkdir()
    for index in range(5):
        cv2.imwrite(str(folder / f"{index}.png"), picture(72, 64, 3 if index % 2 else 1, seed=index))
    return folder


def run(pictures, tiny, folder, samples=6):
    """One shard, made in this process."""
    params = {**SETTINGS, "model": str(tiny["sd15"]), "clip": str(tiny["clip"]), "judge": str(tiny["judge"])}
    raw = {
        "source": str(pictures),
        "samples": samples,
        "generation": {
            "generators": {"cut": {"params": params}},
            "location": "anywhere",
            "area": [0.02, 0.05],
            "count": [1, 2],
            "attempts": 2,
            "gates": OPEN.model_dump(mode="json"),
        },
    }
    space = Workspace(str(folder))
    rounds.begin(parse_config(raw, name="test"), space, new_round=False)
    record = make_shard(Job(space.url, 0, 0, settings_hash(space, 0)))
    return space, record, space.read_table(part("samples", 0, 0, "parquet")).to_pylist()


def test_a_run_and_the_replay_of_each_sample(pictures, tiny, tmp_path):
    space, record, rows = run(pictures, tiny, tmp_path / "one")
    counts = Counter(row["status"] for row in rows)
    assert counts.total() == 6 and counts["failed"] == 0 and counts["accepted"] >= 2
    assert [row["batch"] for row in rows] == [0, 0, 0, 0, 1, 1]
    models = json.loads(record["fingerprint"])["models"]["cut"]
    assert {"id", "weights", "clip_id", "clip_weights", "judge_weights"} <= set(models)
    for row in rows:
        assert row["prompt"] and row["detail"].startswith("a photo of a bottle")
        if row["status"] == "accepted":
            assert replay(space, row["sample_id"])["identical"]
    again, _, _ = run(pictures, tiny, tmp_path / "two")
    path = part("shards", 0, 0, "tar")
    assert Path(space.url, path).read_bytes() == Path(again.url, path).read_bytes()


def test_a_sample_of_a_halved_batch_is_made_again_with_that_batch(pictures, tiny, tmp_path, monkeypatch):
    real, sizes = chain.sample, []

    def short_of_memory(requests, *rest):
        if len(requests) > 2:
            raise MemoryError
        return real(requests, *rest)

    def counting(requests, *rest):
        sizes.append(len(requests))
        return real(requests, *rest)

    monkeypatch.setattr(chain, "sample", short_of_memory)
    space, _, rows = run(pictures, tiny, tmp_path / "short", samples=4)
    accepted = [row for row in rows if row["status"] == "accepted"]
    assert accepted
    assert {json.loads(row["measures"])["batch"] for row in rows if row["attempts"] == 1} == {2}
    monkeypatch.setattr(chain, "sample", counting)
    for row in accepted:
        assert replay(space, row["sample_id"])["identical"]
    assert max(sizes) == 2
