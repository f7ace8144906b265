"""The feature family: operators against their equations, calibration, shards, and use inside training."""

import math
from dataclasses import replace

import cv2
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from generation import registry
from generation.backbones import DEFAULT, BackboneError, load_backbone, to_batch
from generation.feature import operators, statistics, storing
from generation.feature.family import Model, calibrated, tokens, variant
from generation.gates import Gates
from generation.masks import shaped
from generation.protocol import Source
from generation.synthesis import attempt, synthesise
from generation.textures import KINDS, procedural
from manifests.errors import UsageError
from manifests.recipes import Pool, _donors
from manifests.schema import canonical_json
from manifests.workspace import Workspace
from tests.test_generators import FEATURE, picture, recipe, source
from training.loading import read_all_samples
from workflows import detecting, probing, rounds
from workflows.config import check_detector, parse_config

CHANNELS = 12


def normal_tokens(seed=0, shape=(6, CHANNELS, 16, 16)):
    """Correlated features of unequal scale, as a backbone's are."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(CHANNELS, CHANNELS, generator=torch.Generator().manual_seed(9))
    noise = torch.randn(shape[0], shape[2], shape[3], CHANNELS, generator=generator)
    return (noise @ mix * torch.linspace(0.5, 3, CHANNELS) + 1).permute(0, 3, 1, 2).contiguous()


@pytest.fixture(scope="module")
def known():
    return statistics.estimate(normal_tokens())


def bound(name, known, **params):
    generator = registry.get(f"feature-{name}")
    operator = generator.apply.keywords["operator"]
    return operator.bind(known, generator.params(**params), normal_tokens(3))


NAMES = [name.removeprefix("feature-") for name in FEATURE]


@pytest.mark.parametrize("name", NAMES)
def test_equal_outside_the_mask_and_everywhere_at_strength_0(name, known):
    features = normal_tokens(1)
    mask = torch.rand(6, 16, 16, generator=torch.Generator().manual_seed(4)) < 0.3
    mask[5] = False  # a picture without a mask
    before = features.clone()
    perturb = bound(name, known)
    changed = perturb(features, mask, 0.7, torch.Generator().manual_seed(5))
    assert changed.shape == features.shape and changed.dtype == torch.float32
    outside = ~mask[:, None].expand_as(features)
    torch.testing.assert_close(changed[outside], features[outside], rtol=0, atol=0)
    assert (changed != features).any(dim=1)[mask].float().mean() > 0.99
    torch.testing.assert_close(features, before, rtol=0, atol=0)  # the caller's stay as they were
    again = perturb(features, mask, 0.7, torch.Generator().manual_seed(5))
    torch.testing.assert_close(again, changed, rtol=0, atol=0)
    still = perturb(features, mask, 0.0, torch.Generator().manual_seed(5))
    torch.testing.assert_close(still, features, rtol=0, atol=0)


def test_noise_has_the_deviation_of_its_equation(known):
    features = normal_tokens(1, (32, CHANNELS, 16, 16))
    mask = torch.ones(32, 16, 16, dtype=torch.bool)
    change = bound("noise", known)(features, mask, 0.5, torch.Generator().manual_seed(0)) - features
    torch.testing.assert_close(change.std(dim=(0, 2, 3)), 0.5 * known.deviation, rtol=0.05, atol=0)
    change = bound("jitter", known)(features, mask, 20.0, torch.Generator().manual_seed(0)) - features
    expected = 20 * features.norm(dim=1) / CHANNELS
    assert abs(float((change.square().mean(dim=1) / expected.square()).mean()) - 1) < 0.02


@pytest.mark.parametrize("projection", ["manifold", "hypersphere"])
def test_ascent_keeps_its_distance_and_rises(projection, known):
    features = normal_tokens(1)
    mask = torch.rand(6, 16, 16, generator=torch.Generator().manual_seed(4)) < 0.3
    changed = bound("ascent", known, projection=projection)(
        features, mask, 0.8, torch.Generator().manual_seed(5)
    )
    old, new = (x.permute(0, 2, 3, 1)[mask] for x in (features, changed))
    origin = old if projection == "manifold" else known.centre
    distance = ((new - origin) / known.deviation).norm(dim=1) / math.sqrt(CHANNELS)
    if projection == "hypersphere":  # relative to the token's own distance
        distance = distance / (((old - origin) / known.deviation).norm(dim=1) / math.sqrt(CHANNELS)) - 1
    assert distance.min() >= 0.8 - 1e-3 and distance.max() <= 1.6 + 1e-3

    def score(tokens):
        return (((tokens - known.centre) / known.deviation).abs() @ known.weight).mean()

    assert score(new) > score(old)


def test_local_tokens_go_towards_the_texture_and_no_nearer_to_the_centre(known):
    features, mask = normal_tokens(1), torch.ones(6, 16, 16, dtype=torch.bool)
    textured = normal_tokens(3) * 3
    textured[0] = known.centre[:, None, None]  # as normal as can be
    changed = operators.local(features, mask, 0.6, None, known.deviation, known.centre, textured)
    old, new, goal = (
        ((x.permute(0, 2, 3, 1).flatten(1, 2) - known.centre) / known.deviation)
        for x in (features, changed, textured)
    )
    ratio = new.norm(dim=2) / old.norm(dim=2)
    assert ratio.min() > 1 - 1e-4 and ratio.max() < 2 + 1e-4
    torch.testing.assert_close(new[0], old[0], rtol=1e-3, atol=1e-4)  # 0.4 of the distance, and back
    direction = torch.nn.functional.cosine_similarity(new[1:], (old + 0.6 * (goal - old))[1:], dim=2)
    torch.testing.assert_close(direction, torch.ones_like(direction))


def test_ascent_follows_the_discriminator_it_is_given(known):
    """As in training: any network's gradient."""
    network = torch.nn.Linear(CHANNELS, 1)

    def gradient(tokens):
        tokens = tokens.detach().requires_grad_(True)
        with torch.enable_grad():
            return torch.autograd.grad(network(tokens).sum(), tokens)[0]

    features, mask = normal_tokens(1), torch.ones(6, 16, 16, dtype=torch.bool)
    common = (features, mask, 0.5, torch.Generator().manual_seed(0), known.deviation)
    for changed in (
        operators.ascent(*common, known.centre, gradient, manifold=True),
        operators.adversarial(*common, gradient),
    ):
        risen = network(changed.permute(0, 2, 3, 1)) - network(features.permute(0, 2, 3, 1))
        assert (risen > 0).float().mean() > 0.98


def test_adversarial_perturbations_have_the_length_asked_for(known):
    features, mask = normal_tokens(1), torch.ones(6, 16, 16, dtype=torch.bool)
    change = bound("adversarial", known)(features, mask, 0.3, torch.Generator().manual_seed(0)) - features
    length = (change / known.deviation[:, None, None]).norm(dim=1) / math.sqrt(CHANNELS)
    torch.testing.assert_close(length, torch.full_like(length, 0.3), rtol=1e-3, atol=0)


def test_the_flow_shift_is_a_distance_among_whitened_features(known):
    features, mask = normal_tokens(1), torch.ones(6, 16, 16, dtype=torch.bool)
    changed = bound("flow", known)(features, mask, 1.5, torch.Generator().manual_seed(0))
    old, new = (
        (x.permute(0, 2, 3, 1).flatten(0, 2) - known.centre) @ known.basis / known.spread
        for x in (features, changed)
    )
    moved = (new - old).norm(dim=1) / math.sqrt(CHANNELS)
    torch.testing.assert_close(moved, torch.full_like(moved, 1.5), rtol=1e-2, atol=0)
    assert new.norm(dim=1).mean() > old.norm(dim=1).mean()


@pytest.mark.parametrize("name", ["copy", "shuffle"])
def test_moved_tokens_are_those_of_the_picture(name, known):
    features, mask = normal_tokens(1), torch.zeros(6, 16, 16, dtype=torch.bool)
    mask[:, 4:9, 3:12] = True
    changed = bound(name, known)(features, mask, 1.0, torch.Generator().manual_seed(0))
    for old, new, found in zip(features, changed, mask, strict=True):
        stock, moved = old.flatten(1).T, new[:, found].T
        distance = torch.cdist(moved, stock, compute_mode="donot_use_mm_for_euclid_dist").min(dim=1).values
        assert distance.max() < 1e-3
        if name == "shuffle":
            torch.testing.assert_close(
                moved.sum(1).sort().values, old[:, found].T.sum(1).sort().values, rtol=1e-5, atol=1e-4
            )


def test_an_inserted_window_is_that_of_the_other_picture():
    features, foreign = normal_tokens(1), normal_tokens(2)
    mask = torch.zeros(6, 16, 16, dtype=torch.bool)
    mask[:, 2:6, 5:12] = True
    changed = operators.insert(features, mask, 1.0, torch.Generator().manual_seed(0), foreign)
    piece = changed[0, :, 2:6, 5:12]
    windows = foreign[0].unfold(1, 4, 1).unfold(2, 7, 1)  # C×13×10×4×7
    difference = (windows - piece[:, None, None]).abs().amax(dim=(0, 3, 4))
    assert difference.min() < 1e-5


def test_the_attended_tokens_are_those_that_stand_out():
    features = normal_tokens(1)
    features[:, :, 3:5, 3:5] += 40
    mask = torch.zeros(6, 16, 16, dtype=torch.bool)
    mask[:, :8, :8] = True
    chosen = operators.attended(features, mask, 4)
    assert chosen.sum() == 24 and chosen[:, 3:5, 3:5].all()


def test_attended_tokens_follow_one_head_of_a_transformer_s_attention():
    features, mask = normal_tokens(1), torch.zeros(6, 16, 16, dtype=torch.bool)
    mask[:, :8, :8] = True
    attention = torch.full((6, 2, 16, 16), 1e-3)
    attention[:, 0, 1, 1:5] = attention[:, 1, 6, 1:5] = 0.1
    attention[:, :, 12, :] = 0.5  # outside the mask
    seen = set()
    for seed in range(8):
        chosen = operators.attended(features, mask, 4, attention, torch.Generator().manual_seed(seed))
        rows = [one.nonzero()[:, 0].unique().tolist() for one in chosen]
        assert all(row in ([1], [6]) for row in rows) and chosen.sum() == 24
        seen |= {row[0] for row in rows}
    assert seen == {1, 6}


# -- calibration
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "limit"),
    [("noise", 4.0), ("jitter", 400.0), ("flow", 8.0), ("ascent", 6.0), ("adversarial", 4.0)],
)
def test_a_probe_tells_what_the_severity_promises(name, limit, known):
    """On tokens that the calibration has not seen, within 5 points."""
    perturb = bound(name, known)
    found = statistics.separable(normal_tokens(0, (16, CHANNELS, 16, 16)), known, perturb, limit)
    assert 0 < found[0] < found[1] < limit
    unseen = normal_tokens(7, (16, CHANNELS, 16, 16))
    mask = torch.ones(16, 16, 16, dtype=torch.bool)
    for strength, target in zip(found, statistics.SEPARABLE, strict=True):
        changed = perturb(unseen, mask, strength, torch.Generator().manual_seed(11))
        assert abs(statistics.accuracy(*seen_alone((unseen, changed), known)) - target) < 0.05


def seen_alone(both, known):
    return ((statistics.standardised(x, known).permute(0, 2, 3, 1).flatten(0, 2)) for x in both)


@pytest.mark.parametrize("name", ["copy", "shuffle", "insert"])
def test_moved_tokens_are_told_by_those_around_them_more_with_severity(name):
    """On features that hang together in the picture, as a backbone's do; alone a token is best told halfway,
    and at the end not at all."""
    backbone = load_backbone(DEFAULT)
    features, known = statistics.normal_features(backbone), statistics.statistics(backbone)
    generator = registry.get(f"feature-{name}")
    perturb = generator.apply.keywords["operator"].bind(known, generator.params(), features.roll(1, 0))
    mask = torch.rand(len(features), 16, 16, generator=torch.Generator().manual_seed(5)) < 0.25

    def told(strength, beside):
        changed = perturb(features, mask, strength, torch.Generator().manual_seed(6))
        look = statistics.beside_others if beside else statistics.standardised
        clean, moved = (look(x, known).permute(0, 2, 3, 1)[mask] for x in (features, changed))
        order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(7))
        return statistics.accuracy(clean[order], moved[order])

    model = generator.load(generator.params().model_dump(mode="json"), "cpu")
    low, high = model.range
    found = [told(low * (high / low) ** severity, beside=True) for severity in (0.0, 0.5, 1.0)]
    assert found == sorted(found)
    assert found[0] == pytest.approx(0.6, abs=0.05) and found[2] == pytest.approx(0.8, abs=0.05)
    assert told(0.5, beside=False) > told(1.0, beside=False) + 0.1


def test_a_probe_that_is_linear_in_the_features_would_not_see_noise(known):
    """Why the probe sees |z|: the means are equal, so that no linear one can do better than chance."""
    features = normal_tokens(1, (16, CHANNELS, 16, 16))
    mask = torch.ones(16, 16, 16, dtype=torch.bool)
    noisy = operators.gaussian(features, mask, 2.0, torch.Generator().manual_seed(0), known.deviation)
    clean, moved = (x.permute(0, 2, 3, 1).flatten(0, 2).double() for x in (features, noisy))
    half = len(clean) // 2
    x, y = torch.cat([clean[:half], moved[:half]]), torch.cat([-torch.ones(half), torch.ones(half)]).double()
    weight = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1), y[:, None]).solution
    told = [torch.cat([z[half:], torch.ones(half, 1)], 1) @ weight for z in (clean, moved)]
    linear = ((told[0] < 0).double().mean() + (told[1] > 0).double().mean()) / 2
    assert linear < 0.55 < 0.85 < statistics.accuracy(*seen_alone((features, noisy), known))


def test_the_shipped_statistics_are_those_of_the_default_backbone():
    backbone = load_backbone(DEFAULT)
    assert statistics.stored(backbone)
    shipped = statistics.statistics(backbone)
    fresh = statistics.estimate(statistics.normal_features(backbone))
    torch.testing.assert_close(shipped.centre, fresh.centre, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(shipped.deviation, fresh.deviation, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["noise", "flow", "insert", "local"])
def test_the_shipped_strengths_are_those_that_calibration_finds(name):
    generator = registry.get(f"feature-{name}")
    params, operator = generator.params(), generator.apply.keywords["operator"]
    backbone = load_backbone(DEFAULT)
    stored = statistics.stored(backbone)[statistics.strengths_key(variant(operator, params))]
    np.testing.assert_allclose(
        stored, calibrated(backbone, statistics.statistics(backbone), operator, params), rtol=0.02
    )
    model = generator.load(params.model_dump(mode="json"), "cpu")
    assert model.range == tuple(stored.tolist())


def test_statistics_of_a_folder_are_stored_beside_its_weights(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "PICTURES", 4)  # seconds instead of a minute
    torch.manual_seed(0)
    timm.models.save_for_hf(timm.create_model("resnet10t", num_classes=0), tmp_path, safe_serialization=True)
    generator, params = (
        registry.get("feature-noise"),
        {"backbone": str(tmp_path), "layers": ["layer2"], "size": 64},
    )
    before = generator.load(params, "cpu")
    backbone = before.backbone
    assert not statistics.stored(backbone)
    file = storing.write(backbone)
    assert file.parent == tmp_path and not list(tmp_path.glob("*.part"))
    found = statistics.stored(backbone)
    wanted = {"strengths of " + name for name in ("gaussian", "local", "ascent manifold", "insert")}
    assert wanted <= found.keys()
    np.testing.assert_allclose(found["strengths of gaussian"], before.range, rtol=0.02)
    monkeypatch.chdir(tmp_path)
    assert statistics.stored(load_backbone(".", ("layer2",))).keys() == found.keys()
    other = load_backbone(str(tmp_path), ("layer1",))
    assert not statistics.stored(other)  # each choice of layers has its own
    monkeypatch.setattr(statistics, "CALIBRATION", -1)
    assert not statistics.stored(backbone)  # found by other rules
    monkeypatch.undo()
    edited = {**found, statistics.FINGERPRINT: torch.tensor(list(b"others"), dtype=torch.uint8)}
    save_file(edited, file)
    assert not statistics.stored(backbone)  # other weights
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(BackboneError, match=r"is damaged.*remove it"):
        statistics.stored(backbone)


def test_statistics_are_stored_only_where_they_are_looked_for():
    backbone = load_backbone(DEFAULT, ("blocks.1",))
    with pytest.raises(UsageError, match="default layers"):
        storing.write(backbone)
    with pytest.raises(UsageError, match="save the model to a folder"):
        storing.write(replace(backbone, name="resnet18"))


def test_a_transformer_with_patches_of_14_pixels_says_where_it_looks(tmp_path, monkeypatch):
    """As DINOv2's: the statistics are of pictures that its patches divide, and the places are attended."""
    monkeypatch.setattr(statistics, "PICTURES", 4)
    torch.manual_seed(0)
    sizes = {"embed_dim": 32, "depth": 5, "num_heads": 2}
    model = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=28, **sizes)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True, model_args={"img_size": 28, **sizes})
    params = {"backbone": str(tmp_path), "size": 140}
    generator = registry.get("feature-copy")
    loaded = generator.load(params, "cpu")
    (outcome,) = synthesise(
        [recipe("feature-copy", area=0.1, params=canonical_json(params))],
        lambda _: source(), generator, loaded, Gates(), 3, {},
    )  # fmt: skip
    assert outcome.status == "accepted", outcome.reason
    assert outcome.feature.feature.shape == (32, 10, 10)
    assert outcome.measures["solved_strength"] == pytest.approx(
        loaded.range[0] * (loaded.range[1] / loaded.range[0]) ** outcome.recipe.severity
    )
    batch = to_batch([source().pixels], 140)
    _, attention = loaded.backbone.features_and_attention(batch)
    changed = torch.from_numpy(outcome.mask[None] > 0)
    looks = attention[0].flatten(1)
    others = looks[:, ~changed.flatten()].mean(1)
    assert (looks[:, changed.flatten()].mean(1) > others).any()  # those that one of the heads looks at


def test_a_local_sample_is_told_as_its_severity_promises():
    """By a probe on other surfaces than the calibration's, changed by the generator's own draw and apply."""
    generator = registry.get("feature-local")
    model = generator.load(generator.params().model_dump(mode="json"), "cpu")
    allowed = np.ones((256, 256), np.bool_)
    found = {}
    for severity in (0.0, 1.0):
        clean, changed = [], []
        for number in range(24):
            rng = np.random.default_rng((77, number))
            kind = list(KINDS)[number % len(KINDS)]
            pixels = np.rint(procedural(kind, rng, 256, 256, 3) * 255).astype(np.uint8)
            one = Source(pixels, allowed)
            drawn = generator.draw(
                recipe("feature-local", number, severity=severity, area=0.25, count=4), one, rng
            )
            (edit,) = generator.apply([one], [drawn], model)
            for features, kept in ((edit.clean, clean), (edit.feature, changed)):
                whole = torch.from_numpy(features.astype(np.float32))[None]
                z = statistics.standardised(whole, model.statistics)[0]
                kept.append(z[:, torch.from_numpy(edit.mask)].T)
        order = torch.randperm(len(torch.cat(clean)), generator=torch.Generator().manual_seed(0))
        found[severity] = statistics.accuracy(torch.cat(clean)[order], torch.cat(changed)[order])
    assert found[0.0] == pytest.approx(0.6, abs=0.07) and found[1.0] == pytest.approx(0.8, abs=0.07)


# -- as generators
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEATURE)
def test_samples_lie_in_the_mask_follow_severity_and_replay(name):
    generator = registry.get(name)
    model = generator.load(generator.params(size=128).model_dump(mode="json"), "cpu")
    assert isinstance(model, Model)
    params = canonical_json({"size": 128})
    outcomes = {
        severity: synthesise(
            [recipe(name, seed, severity=severity, area=0.1, params=params) for seed in range(4)],
            lambda _: source(),
            generator,
            model,
            Gates(),
            3,
            {},
        )
        for severity in (0.0, 1.0)
    }
    contrast = {severity: np.mean([one.contrast for one in found]) for severity, found in outcomes.items()}
    assert contrast[1.0] > 1.15 * contrast[0.0]
    for outcome in outcomes[1.0]:
        assert outcome.status == "accepted", outcome.reason
        edit, outside = outcome.feature, outcome.mask == 0
        assert edit.feature.dtype == np.float16 and edit.backbone == model.backbone.fingerprint
        np.testing.assert_array_equal(edit.feature[:, outside], edit.clean[:, outside])
        assert 0.3 < outcome.mask_area / 0.1 < 2.2
    first = outcomes[1.0][0]
    group = [outcome.recipe for outcome in outcomes[1.0]]
    again = attempt(group, lambda _: source(), generator, model, first.attempts - 1)[0]
    np.testing.assert_array_equal(again.feature.feature, first.feature.feature)


@pytest.mark.parametrize(
    ("shape", "area", "count"), [("stroke", 0.02, 3), ("blob", 0.01, 3), ("blob", 0.004, 2)]
)
def test_tokens_keep_area_and_every_spot(shape, area, count):
    ratios = []
    for seed in range(20):
        allowed = np.ones((256, 256), bool)
        (y0, y1, x0, x1), part = shaped(np.random.default_rng(seed), allowed, area, count, shape)
        region = np.zeros((256, 256), bool)
        region[y0:y1, x0:x1] = part
        chosen = tokens(region, 16, 16)
        parts, labels = cv2.connectedComponents(region.astype(np.uint8))
        blown = np.kron(chosen, np.ones((16, 16), bool))
        assert all(blown[labels == label].any() for label in range(1, parts))
        ratios.append(chosen.mean() / max(region.mean(), (parts - 1) / 256))
    assert 0.7 < np.mean(ratios) < 1.3


def test_the_whole_foreground_is_a_mask_of_features():
    allowed = np.zeros((64, 64), bool)
    allowed[16:48, 16:48] = True
    generator = registry.get("feature-noise")
    params = canonical_json({"size": 64, "shape": "whole"})
    model = generator.load({"size": 64}, "cpu")
    (outcome,) = synthesise(
        [recipe("feature-noise", area=0.01, params=params)],
        lambda _: source(picture(64, 64), allowed),
        generator, model, Gates(), 3, {},
    )  # fmt: skip
    assert outcome.status == "accepted", outcome.reason


def test_a_run_of_features_trains_the_detector_that_looks_at_them(tmp_path):
    """From recipes through shards to weights, by the command's own stages; with nothing said of the features
    they are the detector's."""
    for number in range(6):
        file = tmp_path / "pictures/cloth/train/good" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), picture(64, 64, seed=number))
    layers = ("blocks.1", "blocks.2", "blocks.4")
    onenip = {"size": 64, "layers": layers, "steps": 2, "hidden": 16, "heads": 2, "ffn": 16, "bank": 1}
    config = parse_config(
        {
            "source": str(tmp_path / "pictures"),
            "samples": 12,
            "generation": {"generators": {"feature-noise": {}}, "location": "anywhere"},
            "detector": {"name": "onenip", "settings": onenip},
            "cluster": {"workers": 1},
        },
        name="test",
    )
    space = Workspace(str(tmp_path / "run"))
    with space.writing():
        number = rounds.begin(config, space, new_round=False)
        assert rounds.generate(space, number, config.cluster)
        assert detecting.train(space, number)
    rows = rounds.accepted_samples(space, number)
    assert len(rows) >= 10
    sample = next(read_all_samples(detecting._shards(space, number)))
    model = load_backbone(DEFAULT, layers)
    assert sample.backbone == model.fingerprint and sample.feature.shape == (176, 4, 4)
    assert sample.mask.shape == (4, 4) and sample.mask.any()
    assert probing.backbone_of(config.generation).fingerprint == model.fingerprint


def test_features_that_the_detector_cannot_learn_from_are_refused_before_any_is_made():
    def check(detector, params=None, **training):
        noise = {"params": params or {}}
        config = parse_config(
            {
                "source": "pictures",
                "generation": {"generators": {"feature-noise": noise}},
                "detector": detector,
                "training": training,
            },
            name="test",
        )
        check_detector(config, "test")

    small = {"name": "onenip", "settings": {"size": 64}}
    check(small)
    check(small, {"size": 64})
    named = {"size": 64, "layers": ["blocks.0", "blocks.1", "blocks.2", "blocks.4"]}  # its levels by name
    check(small, named)
    for params in ({"size": 96}, {"size": 64, "layers": ["blocks.1"]}):
        with pytest.raises(UsageError, match=r"feature-noise.params: .*other features than onenip"):
            check(small, params)
    with pytest.raises(UsageError, match="from which vlad cannot learn"):
        check({"name": "vlad"})
    check({"name": "vlad"}, generators={"feature-noise": 0.0})


def test_foreign_pictures_are_of_another_category():
    from manifests.schema import Image

    def image(category, number):
        fields = dict.fromkeys(Image.__dataclass_fields__)
        return Image(**{**fields, "image_id": f"{category}-{number}", "category": category})

    pool = Pool({name: tuple(image(name, k) for k in range(3)) for name in ("bolt", "cloth", "nut")})
    drawn = {_donors("foreign", "feature-insert", image("nut", 0), pool, at / 50)[0] for at in range(50)}
    assert drawn == {f"{name}-{k}" for name in ("bolt", "cloth") for k in range(3)}
    alone = Pool({"nut": pool.normals["nut"]})
    with pytest.raises(UsageError, match="another category"):
        _donors("foreign", "feature-insert", image("nut", 0), alone, 0.0)
