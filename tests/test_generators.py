"""Every generator keeps the contract: exact masks, same recipe same bytes, severity, area, location."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torchvision.transforms import functional as F

from generation import registry
from generation.compose import compose
from generation.cutpaste import colour_jitter
from generation.frequency.operators import band, hermitian
from generation.gates import Gates
from generation.masks import foreground
from generation.poisson import PoissonParams, _piece, blend_gradients, clone_gradients
from generation.protocol import Edit, Generator, Source, Undrawable
from generation.synthesis import attempt, batch_of, synthesise
from generation.textures import KINDS, procedural
from manifests.errors import PictureError, UsageError
from manifests.schema import Recipe, canonical_json
from tests.benchmarks import synthesis

CLASSIC = ("perlin", "cutpaste", "scar", "crack", "chip", "fibre", "poisson", "band")
FREQUENCY = tuple(
    name for name in registry.BUILT_IN if registry.get(name).family == "frequency" and name not in CLASSIC
)
FEATURE = tuple(name for name in registry.BUILT_IN if registry.get(name).family == "feature")
OPEN = Gates(leak_max=1, hollow_max=1, contrast_min=0, area_low=0, area_high=1e9, pixels_min=1, change_min=0)


def picture(height=96, width=80, channels=3, dtype=np.uint8, seed=0):
    """A drawn surface: a gradient, soft blotches and grain, in whole levels."""
    rng = np.random.default_rng(seed)
    small = rng.integers(90, 170, (6, 6, channels)).astype(np.uint8)
    smooth = cv2.resize(small, (width, height), interpolation=cv2.INTER_LINEAR_EXACT).reshape(
        height, width, -1
    )
    grain = rng.integers(-6, 7, (height, width, channels))
    pixels = np.clip(smooth.astype(np.int64) + grain, 0, 255)
    return (pixels * (257 if dtype == np.uint16 else 1)).astype(dtype)


def source(pixels=None, allowed=None):
    pixels = picture() if pixels is None else pixels
    donor = picture(70, 120, pixels.shape[2], pixels.dtype, seed=1)
    return Source(pixels, np.ones(pixels.shape[:2], bool) if allowed is None else allowed, (donor,))


def recipe(generator, seed=0, **changes):
    row = Recipe(
        sample_id=f"{generator}-{seed}",
        round=0,
        image_id="picture",
        category="drawn",
        generator=generator,
        defect="defect",
        prompt="",
        detail="",
        area=0.03,
        severity=0.7,
        count=1,
        location="anywhere",
        donors=("donor",),
        params="{}",
        seed=seed,
        batch=0,
        shard=0,
    )
    return replace(row, **changes)


def make(recipes, given_source=None, gates=OPEN, attempts=1):
    given_source = given_source or source()
    generator = registry.get(recipes[0].generator)
    return synthesise(recipes, lambda _: given_source, generator, None, gates, attempts, {})


# -- the contract, for every generator ------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(CLASSIC + FREQUENCY),
    height=st.integers(8, 70),
    width=st.integers(8, 70),
    channels=st.sampled_from([1, 3]),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    area=st.floats(0.002, 0.3),
    count=st.integers(1, 3),
    seed=st.integers(0, 2**62),
)
def test_outside_the_mask_every_byte_is_the_source(name, height, width, channels, dtype, area, count, seed):
    given_source = source(picture(height, width, channels, dtype))
    given_source.allowed[: height // 4] = False
    before = given_source.pixels.copy()
    (outcome,) = make([recipe(name, seed, area=area, count=count)], given_source, attempts=3)
    assert outcome.status != "failed", outcome.reason
    assume(outcome.status == "accepted")
    assert (given_source.pixels == before).all()
    assert outcome.pixels.dtype == dtype
    assert outcome.mask.dtype == np.uint8
    assert set(np.unique(outcome.mask)) <= {0, 255}
    outside = outcome.mask == 0
    assert outside[~given_source.allowed].all()
    np.testing.assert_array_equal(outcome.pixels[outside], before[outside])
    assert (outcome.pixels[~outside] != before[~outside]).any()


@pytest.mark.parametrize("name", CLASSIC + FREQUENCY)
def test_same_recipe_same_bytes_in_any_company_and_order(name):
    recipes = [recipe(name, seed, count=1 + seed % 3) for seed in range(6)]
    together = {o.recipe.sample_id: o for o in make(recipes, gates=Gates(), attempts=4)}
    backwards = {o.recipe.sample_id: o for o in make(recipes[::-1], gates=Gates(), attempts=4)}
    for one in recipes:
        (alone,) = make([one], gates=Gates(), attempts=4)
        for other in (together[one.sample_id], backwards[one.sample_id]):
            assert (other.status, other.reason, other.attempts) == (
                alone.status,
                alone.reason,
                alone.attempts,
            )
            np.testing.assert_array_equal(other.mask, alone.mask)
            np.testing.assert_array_equal(other.pixels, alone.pixels)


@pytest.mark.parametrize("name", [name for name in CLASSIC + FREQUENCY if name != "notch"])
def test_replay_of_the_accepted_attempt_gives_its_bytes(name):
    (outcome,) = make([recipe(name, 3, severity=0.4)], gates=Gates(), attempts=9)
    assert outcome.status == "accepted", outcome.reason
    given_source = source()
    (again,) = attempt(
        [outcome.recipe], lambda _: given_source, registry.get(name), None, outcome.attempts - 1
    )
    np.testing.assert_array_equal(again.pixels, outcome.pixels)
    np.testing.assert_array_equal(again.mask, outcome.mask)


@pytest.mark.parametrize("name", CLASSIC)
def test_severity_raises_the_contrast(name):
    """The same draw, weaker and stronger: the mean over ten draws rises with every step."""
    means: list[float] = []
    for severity in (0.0, 0.5, 1.0):
        outcomes = make([recipe(name, seed, severity=severity) for seed in range(10)])
        means.append(np.mean([outcome.contrast for outcome in outcomes]))
    assert means[0] < means[1] < means[2]


@pytest.mark.parametrize("name", CLASSIC)
@pytest.mark.parametrize("area", [0.005, 0.03, 0.15])
def test_area_is_obeyed(name, area):
    """The median mask is within 25 % of the wanted area, and nine of ten within a factor of two."""
    given_source = source(picture(160, 150))
    outcomes = make([recipe(name, seed, area=area, severity=0.9) for seed in range(20)], given_source)
    ratios = np.array([outcome.mask_area / area for outcome in outcomes])
    assert 0.75 < np.median(ratios) < 1.25
    assert np.mean((ratios > 0.5) & (ratios < 2)) >= 0.9


@pytest.mark.parametrize("name", CLASSIC)
def test_most_recipes_pass_the_default_gates(name):
    """At the first draw (a texture of perlin may resemble what it lies on), and in the end."""
    recipes = [recipe(name, seed, severity=0.2 + 0.04 * seed) for seed in range(20)]
    for attempts, share in ((1, 0.7 if name == "perlin" else 0.8), (6, 0.9)):
        outcomes = make(recipes, gates=Gates(), attempts=attempts)
        assert np.mean([outcome.status == "accepted" for outcome in outcomes]) > share


def opened(name, params, count=1, seeds=60, given_source=None):
    given_source = given_source or source(picture(256, 256))
    recipes = [
        recipe(name, seed, count=count, area=0.03, params=canonical_json(params)) for seed in range(seeds)
    ]
    gates = Gates(leak_max=1, hollow_max=1, contrast_min=0, area_low=0, area_high=1e9, change_min=0)
    found = [outcome for outcome in make(recipes, given_source, gates=gates) if outcome.status == "accepted"]
    assert len(found) > 0.9 * seeds
    return found


def boxes(outcomes):
    return np.array([cv2.boundingRect(outcome.mask)[2:] for outcome in outcomes])


def test_a_published_rectangle_has_the_published_sizes():
    sides = boxes(opened("cutpaste", {"published": True, "jitter": 0.1}, count=3))
    areas = sides.prod(axis=1) / 256**2
    assert 0.015 < areas.min() < 0.05 and 0.12 < areas.max() < 0.155
    assert np.abs(areas.mean() - 0.085) < 0.012  # uniform, not log-uniform
    ratios = sides[:, 1] / sides[:, 0]
    assert 0.28 < ratios.min() < 0.5 and 2 < ratios.max() < 3.6


def test_a_published_scar_has_the_published_sizes():
    lengths, widths = [], []
    for outcome in opened("scar", {"published": True, "jitter": 0.4}):
        (_, sides, _) = cv2.minAreaRect(cv2.findNonZero(outcome.mask))
        lengths.append(max(sides) + 1)
        widths.append(min(sides) + 1)
    assert min(lengths) > 9 and max(lengths) < 28 and 16 < np.mean(lengths) < 21
    assert min(widths) < 5 and 12 < max(widths) < 18


def test_published_patches_have_the_published_number():
    outcomes = opened("poisson", {"published": True, "shade": 0}, count=3, seeds=80)
    sides = boxes([o for o in outcomes if cv2.connectedComponents(o.mask)[0] == 2])
    assert sides.min() > 0.06 * 256 - 3 and 0.15 < sides.mean() / 256 < 0.45


def test_published_patches_come_from_anywhere_in_the_donor():
    """A donor whose pixels say where they are; the ends are places like any other."""
    y, x = np.mgrid[:200, :200].astype(np.uint8)
    donor = np.stack([y, x, x], axis=2)
    params = PoissonParams(published=True, resize_low=1, resize_high=1)
    rng = np.random.default_rng(0)
    corners = []
    for _ in range(400):
        target = (150, 170, 10, 40)  # rows 0 to 180 and columns 0 to 170 of the donor have room for it
        corners.append(255 * _piece(rng, donor, target, source(donor), params)[0, 0, :2])
    for found, most in zip(np.transpose(corners), (180, 170), strict=True):
        assert kstest(found / most, "uniform").pvalue > 0.01
        assert np.mean((found < 1) | (found > most - 1)) < 0.05


def test_the_published_colours_are_those_of_torchvision():
    piece = np.random.default_rng(0).random((9, 7, 3), np.float32)
    tensor = torch.from_numpy(piece).permute(2, 0, 1)
    for by in [(1.3, 1, 1, 0), (1, 0.7, 1, 0), (1, 1, 1.4, 0), (1, 1, 1, 0.07), (0.8, 1.2, 0.7, -0.05)]:
        expected = tensor
        for change, factor in zip(
            (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue), by, strict=True
        ):
            expected = change(expected, factor)
        np.testing.assert_allclose(colour_jitter(piece, by), expected.permute(1, 2, 0).numpy(), atol=3e-3)


def test_the_published_mask_is_filled_with_the_texture():
    """Its edge is hard: at full opacity every pixel of the mask is the texture's."""
    white = np.full((300, 300, 3), 255, np.uint8)
    params = {"texture": "folder", "augment": False, "mask": "threshold", "opacity": [1, 1]}
    given_source = replace(source(picture(128, 128)), donors=(white,))
    for outcome in opened("perlin", params, seeds=10, given_source=given_source):
        assert (outcome.pixels[outcome.mask > 0] == 255).all()


# What 4 recipes a generator give on the drawn picture: mask pixels and summed change. Not a hash of the
# bytes: kernels of numpy and OpenCV may round one level differently on another processor.
GOLDEN = {
    "perlin": [(225, 23890), (228, 33904), (219, 31988), (228, 33604)],
    "cutpaste": [(228, 24072), (236, 32912), (230, 24621), (228, 25749)],
    "scar": [(117, 16674), (219, 25883), (152, 20855), (233, 33505)],
    "crack": [(193, 27638), (224, 34100), (197, 30053), (264, 40955)],
    "chip": [(154, 26491), (271, 41191), (267, 55699), (277, 33668)],
    "fibre": [(295, 25204), (247, 15686), (322, 45477), (256, 15955)],
    "poisson": [(224, 31857), (227, 32417), (239, 31503), (233, 30315)],
    "band": [(213, 20052), (218, 24647), (206, 22082), (219, 22271)],
}


@pytest.mark.parametrize("name", CLASSIC + FREQUENCY)
def test_what_a_generator_measured_is_what_its_edit_gives(name):
    given_source = source()
    for seed in range(6):
        one = recipe(name, seed, count=1 + seed % 3)
        generator = registry.get(name)
        (edit,) = generator.apply([given_source], [generator.draw(one, given_source, one.rng(0))], None)
        again = compose(given_source.pixels, replace(edit, measured=None))
        assert edit.measured is not None and again.leak == 0
        for attribute, value in vars(compose(given_source.pixels, edit)).items():
            np.testing.assert_array_equal(value, getattr(again, attribute), attribute)


@pytest.mark.parametrize("name", CLASSIC)
def test_golden_samples(name):
    pixels = source().pixels.astype(np.int64)
    found = []
    for outcome in make([recipe(name, seed, count=1 + seed % 2) for seed in range(4)]):
        found.append((int((outcome.mask > 0).sum()), int(np.abs(outcome.pixels - pixels).sum())))
    np.testing.assert_allclose(found, GOLDEN[name], rtol=0.005, atol=2)


def test_a_fibre_is_long_and_soft_and_the_surface_shows_through():
    """Straight ones, along their middle and their edge, on grain that goes on below them."""
    surface = np.random.default_rng(0).integers(100, 156, (200, 200, 1)).astype(np.uint8)
    params = canonical_json({"bend": 0, "ratio_low": 20, "ratio_high": 30})
    slender, softer, kept = [], [], []
    for k in range(20):
        (outcome,) = make([recipe("fibre", k, severity=0.6, params=params)], source(surface))
        mask = outcome.mask > 0
        (_, sides, _) = cv2.minAreaRect(cv2.findNonZero(outcome.mask))
        slender.append(max(sides) / max(min(sides), 1))
        depth = cv2.distanceTransform(outcome.mask, cv2.DIST_L2, 3)
        change = np.abs(outcome.pixels.astype(int) - surface)[..., 0]
        edge, middle = mask & (depth <= 1), depth > 0.6 * depth.max()
        softer.append(change[edge].mean() / change[middle].mean())
        kept.append(np.corrcoef(outcome.pixels[middle].ravel(), surface[middle].ravel())[0, 1])
    assert np.median(slender) > 5.5
    assert np.median(softer) < 0.6
    assert np.median(kept) > 0.8


@pytest.mark.parametrize(("side", "area"), [(30, 0.02), (70, 0.05)])
def test_a_fibre_that_may_lie_on_a_part_alone_has_its_area_there(side, area):
    """What of it lies beside the part, on which it does not show, makes it thicker."""
    part = np.zeros((128, 128), bool)
    part[40 : 40 + side, 50 : 50 + side] = True
    outcomes = make([recipe("fibre", k, area=area) for k in range(20)], source(picture(128, 128), part))
    assert 0.8 < np.median([outcome.mask_area for outcome in outcomes]) / area < 1.25


def test_the_ratios_of_a_fibre_are_ordered():
    with pytest.raises(ValueError, match="ratio_low 8 exceeds ratio_high 6"):
        registry.get("fibre").params(ratio_high=6)


def plate(seed=0, side=128):
    """A bright, grained disc on a dark ground, and where it is."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] - side / 2
    disc = y**2 + x**2 < (0.35 * side) ** 2
    grain = rng.integers(0, 20, (side, side, 1))
    return (np.where(disc[..., None], 170, 20) + grain).astype(np.uint8), disc


def test_where_a_piece_is_missing_the_ground_shows():
    pixels, disc = plate()
    recipes = [recipe("chip", k, severity=1.0, count=1 + k % 3, location="foreground") for k in range(24)]
    outcomes = make(recipes, source(pixels, foreground(pixels)), Gates(), attempts=6)
    assert sum(outcome.status == "accepted" for outcome in outcomes) >= 22
    near = cv2.dilate((~disc).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
    deep = []
    for outcome in outcomes:
        if outcome.status != "accepted":
            continue
        gone = (outcome.mask > 0).astype(np.uint8)
        assert gone[~near & ~disc].sum() == 0
        inner = cv2.erode(gone, np.ones((5, 5), np.uint8)) > 0
        assert (outcome.pixels[inner] <= 40).all(), "the ground, or its shadow; nothing of the part"
        labels = cv2.connectedComponents(gone, connectivity=8)[1]
        large = [k for k in range(1, labels.max() + 1) if (labels == k).sum() > 20]
        assert all(near[labels == k].any() for k in large), "every piece is open to the ground"
        deep.append(0.02 < gone.mean() < 0.05)
    assert np.mean(deep) > 0.8, "the wanted area is 0.03"


@pytest.mark.parametrize("ground", [None, (215, 205, 60)], ids=["dark", "bright and coloured"])
def test_no_piece_is_missing_where_a_shadow_passes_for_the_part(ground):
    """Nor where the shadow differs from a bright ground by more than a pale part does."""
    pixels, disc = plate()
    shadow = np.zeros_like(disc)
    shadow[2:16, 2:30] = True
    if ground is not None:
        pixels = np.where(disc[..., None], (225, 215, 190), ground).astype(np.uint8)
        pixels += np.random.default_rng(0).integers(0, 9, pixels.shape, dtype=np.uint8)
        pixels[shadow] //= 2
    pixels[shadow] //= 2
    given_source = replace(source(pixels), find_part=lambda: disc | shadow)
    for outcome in make([recipe("chip", k, severity=1.0, count=3) for k in range(24)], given_source):
        assert outcome.status == "accepted"
        labels = cv2.connectedComponents((outcome.mask > 0).astype(np.uint8), connectivity=8)[1]
        own = [labels == k for k in range(1, labels.max() + 1)]
        assert all(disc[one].mean() > 0.5 for one in own if one.sum() > 20)


def test_ground_that_is_scarce_is_moved_in_blocks_and_not_pixel_by_pixel():
    """A smooth slope of grey around a part that leaves only a narrow frame of it."""
    slope = np.repeat(np.linspace(20, 80, 128)[:, None], 128, axis=1)
    part = np.zeros((128, 128), bool)
    part[20:108, 20:108] = True
    pixels = np.where(part, 180, slope).astype(np.uint8)[..., None].repeat(3, axis=2)
    steps = []
    for outcome in make(
        [recipe("chip", k, severity=1.0) for k in range(12)], source(pixels, foreground(pixels)), attempts=3
    ):
        inner = cv2.erode((outcome.mask > 0).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        across = np.abs(np.diff(outcome.pixels[..., 0].astype(int), axis=1))
        steps.append(across[inner[:, 1:] & inner[:, :-1]].mean())
    assert np.median(steps) < 5, "24 to 26 if single pixels are drawn"


def test_the_less_severe_the_more_of_the_piece_is_left():
    pixels, _ = plate()
    given_source = source(pixels, foreground(pixels))
    wanted = []
    for severity in (0.0, 0.25, 0.5, 0.75, 1.0):
        (outcome,) = make([recipe("chip", 3, severity=severity)], given_source, Gates())
        assert outcome.status == "accepted"
        change = np.abs(outcome.pixels.astype(int) - pixels).max(axis=2)[outcome.mask > 0].mean()
        assert change == pytest.approx(outcome.measures["wanted_change"], rel=0.15)
        wanted.append(outcome.contrast)
    steps = np.diff(wanted)
    assert wanted[0] == pytest.approx(1.25, rel=0.15) and (steps > 0.6 * steps.mean()).all()


def test_a_material_without_ground_gets_holes():
    pixels = picture(96, 96)
    assert foreground(pixels).all()
    tones = []
    for outcome in make([recipe("chip", k, severity=1.0) for k in range(12)], source(pixels), Gates(), 6):
        inner = cv2.erode((outcome.mask > 0).astype(np.uint8), np.ones((5, 5), np.uint8)) > 0
        shown = np.median(outcome.pixels[inner])
        tones.append(shown > 128)
        assert shown < 20 or 110 < shown < 235, "a dark tone, or a light one in the shadow"
    assert 2 <= sum(tones) <= 10, "both occur"


# -- textures -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3])
def test_procedural_textures_are_pictures(kind, channels):
    texture = procedural(kind, np.random.default_rng(1), 33, 50, channels)
    assert texture.shape == (33, 50, channels)
    assert texture.dtype == np.float32
    assert texture.min() >= 0
    assert texture.max() <= 1
    assert texture.std() > 0.005
    again = procedural(kind, np.random.default_rng(1), 33, 50, channels)
    np.testing.assert_array_equal(texture, again)


# -- single generators ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(16, 16), (15, 18), (9, 21)])
def test_frequency_noise_is_hermitian_and_keeps_the_mean(height, width):
    rng = np.random.default_rng(0)
    gain, turn = hermitian(rng, height, width, 1), hermitian(rng, height, width, -1)
    for noise, sign in ((gain, 1), (turn, -1)):
        for column in {0, width // 2} if width % 2 == 0 else {0}:
            for row in range(height):
                if (row, sign) != (-row % height, -1):
                    assert noise[row, column] == sign * noise[-row % height, column]
    image = rng.random((height, width, 3), np.float32)
    np.testing.assert_allclose(band(image, gain, turn)(0), image, atol=1e-6)
    gain[0, 0] = turn[0, 0] = 0
    changed = band(image, gain, turn)(1)
    np.testing.assert_allclose(changed.mean(axis=(0, 1)), image.mean(axis=(0, 1)), atol=1e-5)
    # Against the full complex transform with the noise mirrored by hand: the result is real by itself.
    rows, columns = np.meshgrid(-np.arange(height) % height, -np.arange(width) % width, indexing="ij")
    half = width // 2 + 1
    full = np.zeros((height, width), np.complex128)
    full[:, :half] = np.exp(gain + 1j * turn)
    full[:, half:] = np.conj(full[rows[:, half:], columns[:, half:]])
    literal = np.fft.ifft2(np.fft.fft2(image, axes=(0, 1)) * full[..., None], axes=(0, 1))
    assert np.abs(literal.imag).max() < 1e-6
    np.testing.assert_allclose(changed, literal.real, atol=1e-5)


@pytest.mark.parametrize("mixed", [False, True])
def test_poisson_solver_is_the_dense_solution(mixed):
    rng = np.random.default_rng(0)
    target, content = rng.random((2, 7, 9, 2), np.float32)
    change = clone_gradients(target, content, mixed)
    height, width = 7, 9
    index = np.arange(height * width).reshape(height, width)
    matrix, right = np.eye(height * width), np.zeros((height * width, 2))
    for y in range(1, height - 1):
        for x in range(1, width - 1):
            row = index[y, x]
            matrix[row, row] = -4
            for ny, nx in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                matrix[row, index[ny, nx]] = 1
                own, new = target[ny, nx] - target[y, x], content[ny, nx] - content[y, x]
                chosen = np.where(np.abs(new) > np.abs(own), new, own) if mixed else new
                right[row] += chosen - own
    solution = np.linalg.solve(matrix, right).reshape(height, width, 2)
    np.testing.assert_allclose(change, solution, atol=1e-5)


def test_gradients_blended_in_a_rectangle_are_those_of_the_sine_transform():
    change = np.random.default_rng(1).random((12, 15, 2), np.float32)
    region = np.zeros((12, 15), bool)
    region[1:-1, 1:-1] = True
    expected = clone_gradients(np.zeros_like(change), change, mixed=False)
    np.testing.assert_allclose(blend_gradients(change, region), expected, atol=1e-5)


def test_gradients_are_blended_in_a_region_of_any_shape():
    """What is 0 around the region stays; a step of the whole picture is none; 0 outside."""
    rng = np.random.default_rng(2)
    region = cv2.GaussianBlur(rng.random((40, 50)), (0, 0), 3) > 0.5
    change = rng.random((40, 50, 3), np.float32)
    inside = change * region[..., None]
    np.testing.assert_allclose(blend_gradients(inside, region), inside, atol=1e-5)
    for shift in (0.0, 0.3):
        blended = blend_gradients(change + np.float32(shift), region)
        assert not blended[~region].any()
        np.testing.assert_allclose(blended, blend_gradients(change, region), atol=1e-5)
    assert not blend_gradients(change, np.zeros_like(region)).any()
    whole = blend_gradients(change, np.ones_like(region))  # no border: known but for a constant
    np.testing.assert_allclose(np.diff(whole, axis=1), np.diff(change, axis=1), atol=1e-3)


@pytest.mark.parametrize("texture", ["folder", "normals"])
def test_perlin_never_goes_on_without_its_texture(texture):
    lonely = replace(source(), donors=())
    with pytest.raises(UsageError, match=r"generation\.textures"):
        make([recipe("perlin", params=canonical_json({"texture": texture}))], lonely)


def test_perlin_uses_the_named_texture():
    """Opaque, without augmenting, the inside of the mask shows the donor's only level."""
    plain = replace(source(), donors=(np.full((20, 20, 3), 251, np.uint8),))
    params = canonical_json({"texture": "folder", "augment": False, "opacity": [1.0, 1.0]})
    (outcome,) = make([recipe("perlin", params=params)], plain)
    inner = cv2.erode(outcome.mask, np.ones((5, 5), np.uint8)) > 0
    assert (outcome.pixels[inner] == 251).all()


def test_poisson_needs_another_picture():
    with pytest.raises(UsageError, match="two good pictures"):
        make([recipe("poisson")], replace(source(), donors=()))


# -- the loop and the registry ------------------------------------------------------------------------------


def stub(draw, apply, **more):
    return Generator("stub", "classic", "for tests", draw, apply, **more)


def whole(value, box=(0, 20, 0, 20)):
    shape = (box[1] - box[0], box[3] - box[2])
    return Edit(box, np.full((*shape, 3), value, np.float32), np.ones(shape, bool))


def run(generator, recipes, sources=None, gates=OPEN, attempts=3, model=None):
    return synthesise(recipes, sources or (lambda _: source()), generator, model, gates, attempts, {})


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (ValueError("bad\n number"), "ValueError: bad number"),
        (KeyError("x"), "KeyError: 'x'"),
        (PictureError("a.png is cut"), "PictureError: a.png is cut"),
    ],
)
@pytest.mark.parametrize("where", ["source", "draw", "apply"])
def test_a_deterministic_error_fails_its_recipe_alone(fault, reason, where):
    recipes = [recipe("stub", seed) for seed in range(3)]

    def hurt(place, seed):
        if place == where and seed == 1:
            raise fault

    def read(one):
        hurt("source", one.seed)
        return source()

    def draw(one, _source, _rng):
        hurt("draw", one.seed)
        return one.seed

    def apply(sources, draws, _model):
        for seed in draws:
            hurt("apply", seed)
        return [whole(0.1 * (seed + 1)) for seed in draws]

    for load in (None, lambda _params, _device: None):
        outcomes = run(stub(draw, apply, load=load), recipes, read)
        assert [o.status for o in outcomes] == ["accepted", "failed", "accepted"]
        assert outcomes[1].reason == reason


@pytest.mark.parametrize("fault", [OSError("disk"), MemoryError(), UsageError("wrong"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["source", "draw", "apply"])
def test_what_another_run_could_cure_propagates(fault, where):
    def hurt(place):
        if place == where:
            raise fault

    generator = stub(lambda *_: hurt("draw"), lambda *_: hurt("apply"))
    with pytest.raises(type(fault)):
        run(generator, [recipe("stub")], lambda _: hurt("source") or source())


def test_lack_of_memory_on_the_accelerator_propagates():
    import torch

    def apply(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run(stub(lambda *_: None, apply), [recipe("stub")])


def test_values_that_are_not_finite_fail():
    (outcome,) = run(stub(lambda *_: None, lambda *_: [whole(np.nan)]), [recipe("stub")])
    assert outcome.status == "failed"
    assert "not finite" in outcome.reason


def test_rejected_recipes_are_drawn_again_in_planned_batches_by_attempt():
    """Seven recipes in batches of three; odd ones pass at the first, even ones at the second attempt."""
    calls = []

    def draw(one, _source, rng):
        first = one.rng(0).integers(2**40) == rng.integers(2**40)
        if one.seed == 6:
            raise Undrawable("no room")
        return one.seed, 0.0 if first and one.seed % 2 == 0 else 0.1 * (one.seed + 1)

    def apply(sources, draws, _model):
        calls.append([seed for seed, _ in draws])
        return [whole(value) if value else Edit((0, 9, 0, 9), s.crop((0, 9, 0, 9)), np.ones((9, 9), bool))
                for s, (_, value) in zip(sources, draws, strict=True)]  # fmt: skip

    recipes = [recipe("stub", seed, batch=seed // 3, image_id=str(seed)) for seed in range(7)]
    generator = stub(draw, apply, load=lambda _params, _device: None, batch_size=3)
    outcomes = run(generator, recipes, attempts=3)
    assert calls == [[0, 1, 2], [3, 4, 5], [0, 2, 4]]
    assert [o.recipe.seed for o in outcomes] == list(range(7))
    assert [o.attempts for o in outcomes] == [2, 1, 2, 1, 2, 1, 3]
    assert (outcomes[6].status, outcomes[6].reason) == ("rejected", "no room")
    tries = [o.attempts for o in outcomes]
    assert batch_of(recipes, tries, 4) == [0, 2, 4]
    assert batch_of(recipes, tries, 3) == [3, 4, 5]


def test_the_later_of_two_equal_samples_is_the_duplicate():
    recipes = [recipe("stub", seed) for seed in range(2)]
    generator = stub(lambda *_: None, lambda sources, *_: [whole(0.9) for _ in sources])
    first, second = run(generator, recipes, attempts=2)
    assert first.status == "accepted"
    assert (second.status, second.reason, second.attempts) == ("rejected", "duplicate of a sample", 2)
    elsewhere = run(generator, [recipes[0], replace(recipes[1], image_id="another")])
    assert [o.status for o in elsewhere] == ["accepted", "accepted"]


def test_registry_names_the_nearest():
    assert {*CLASSIC, *FREQUENCY, *FEATURE} <= set(registry.names())
    with pytest.raises(UsageError, match="did you mean perlin"):
        registry.get("perlen")


def test_the_readme_lists_every_generator():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    table = readme.partition("<!-- generators -->")[2].partition("<!-- end of generators -->")[0]
    for name in registry.BUILT_IN:
        assert synthesis.readme_row(name) in table


def test_registry_takes_an_entry_point_of_another_package(monkeypatch):
    class Point:
        name, value = "scorch", "package:GENERATOR"

        def load(self):
            return stub(None, None)

    monkeypatch.setattr(registry, "entry_points", lambda group, name=None: [Point()])
    assert registry.get("scorch").name == "stub"
    assert "scorch" in registry.names()
    registry.get.cache_clear()  # a name is looked up once a process
    monkeypatch.setattr(Point, "load", lambda self: "text")
    with pytest.raises(UsageError, match=r"not a generation\.protocol\.Generator"):
        registry.get("scorch")


@pytest.mark.parametrize("name", [*CLASSIC, *FREQUENCY, *FEATURE])
def test_every_generator_describes_itself(name):
    generator = registry.get(name)
    assert generator.name == name
    assert generator.summary
    assert generator.defect
    with pytest.raises(ValueError, match="Extra inputs"):
        generator.params(colour="red")
