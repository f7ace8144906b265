"""Samples that a detector does not find yet: detectors as critics, the search over draws, guided chains."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from detectors import protocol
from detectors.critic import as_critic
from generation import registry
from generation.critic import Critic, Search, mean_margins
from generation.cut.attention import MapReader
from generation.cut.chain import Request, sample
from generation.cut.guidance import Guide, Scene, _mean_margin, _without_conflict, practise
from generation.cut.settings import CutParams
from generation.protocol import Edit
from generation.synthesis import attempt, batch_of, synthesise
from manifests.errors import UsageError
from manifests.workspace import Workspace, WorkspaceError, part
from tests import test_cut_generator, test_generators
from tests.plain_detector import PLAIN, PlainSettings
from tests.test_generators import whole
from training import checkpoints
from workflows import rounds
from workflows.config import parse_config
from workflows.practice import load_critic
from workflows.replaying import replay
from workflows.stages import Job, load_round, make_shard, settings_hash
from workflows.upkeep import _damaged_files

SMALL = {
    "onenip": {"size": 64, "hidden": 16, "depth": 1, "heads": 2, "ffn": 16, "refiner": 8, "bank": 2},
    "memory_bank": {"size": 64, "coreset": 20},
    "dfd": {"size": 64, "channels": 32, "width": 16},
    "vlad": {"size": 64, "bank": 2},
}
OPEN = test_generators.OPEN
BOX = (0, 20, 0, 20)


def photographs(count: int, size: int = 64) -> torch.Tensor:
    return torch.from_numpy(
        np.stack([test_generators.picture(size, size, seed=seed) for seed in range(count)])
    ).permute(0, 3, 1, 2)


def trained(name: str, tiny) -> protocol.Detector:
    """Its trained part as it was drawn, the rest fitted to four pictures."""
    method = protocol.get(name)
    more = {"backbone": str(tiny["clip"])} if name == "vlad" else {}
    torch.manual_seed(0)
    detector = method.build(method.settings(**SMALL[name], **more), ["bottle"], "cpu")
    normals = detector.extract(photographs(4))
    detector.prepare(normals, ["bottle"] * 4)
    detector.eval()
    detector.calibrate([{"features": normals, "category": ["bottle"] * 4}])
    return detector


# -- detectors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SMALL))
def test_a_detectors_own_map_is_the_margin_and_its_gradient_leads_down(name, tiny):
    detector = trained(name, tiny)
    critic = as_critic(detector, {"bottle": 0.25})
    seen = photographs(6)[4:]
    _, maps = detector.score({"features": detector.extract(seen), "category": ["bottle"] * 2})
    pictures = (seen.float() / 255).requires_grad_(True)
    margins = critic.margins(pictures, ["bottle"] * 2)
    torch.testing.assert_close(margins.detach(), maps - 0.25, rtol=1e-3, atol=1e-4)
    place = margins[:, 20:40, 20:40]
    (gradient,) = torch.autograd.grad(place.mean(), pictures)
    assert gradient.isfinite().all() and gradient.abs().max() > 0
    lower = critic.margins(pictures.detach() - 1e-3 * gradient / gradient.abs().max(), ["bottle"] * 2)
    assert lower[:, 20:40, 20:40].mean() < place.mean()


def test_a_detector_without_a_gradient_is_refused():
    with pytest.raises(UsageError, match=r"Plain gives no maps that are differentiable"):
        as_critic(PLAIN.build(PlainSettings(), ["bottle"], "cpu"), {})


def test_a_margin_is_the_mean_over_the_mask_even_where_it_is_thin():
    critic = Critic(32, lambda pictures, _: pictures.mean(dim=1))
    dark = np.zeros((64, 64, 3), np.uint8)
    dark[10:12] = 255
    line, elsewhere = (np.zeros((64, 64), np.uint8) for _ in range(2))
    line[11], elsewhere[40:] = 255, 255
    assert mean_margins(critic, [dark, dark], [line, elsewhere], ["a", "a"]) == pytest.approx([1, 0])


# -- the search over draws ------------------------------------------------------------------------------


def dark_critic(size: int = 32) -> Critic:
    """Finds what is bright."""
    return Critic(size, lambda pictures, _categories: pictures.mean(dim=1) - 0.5)


def searched(name, seeds, candidates, **more):
    recipes = [test_generators.recipe(name, seed, image_id=str(seed)) for seed in seeds]
    search = Search(dark_critic(), candidates) if candidates else None
    generator = registry.get(name)
    given = more.pop("source", test_generators.source())
    return recipes, synthesise(
        recipes, lambda _: given, generator, more.pop("model", None), OPEN, 3, {}, search
    )


@pytest.mark.parametrize("name", ["perlin", "scar", "band"])
def test_the_search_keeps_the_draw_that_is_found_least_and_replay_needs_no_critic(name):
    recipes, chosen = searched(name, range(6), 4)
    _, first = searched(name, range(6), 0)

    def margins(outcomes):
        contents, masks = [o.pixels for o in outcomes], [o.mask for o in outcomes]
        return np.array(mean_margins(dark_critic(), contents, masks, ["drawn"] * len(outcomes)))

    assert all(outcome.status == "accepted" for outcome in (*chosen, *first))
    assert (margins(chosen) <= margins(first) + 1e-6).all()
    assert margins(chosen).mean() < margins(first).mean() - 0.02
    np.testing.assert_allclose([o.measures["margin"] for o in chosen], margins(chosen), atol=1e-5)
    for recipe, outcome in zip(recipes, chosen, strict=True):
        (again,) = attempt([recipe], lambda _: test_generators.source(), registry.get(name), None,
                           outcome.attempts - 1)  # fmt: skip
        np.testing.assert_array_equal(again.pixels, outcome.pixels)
    _, alone = searched(name, [3], 4)
    np.testing.assert_array_equal(alone[0].pixels, chosen[3].pixels)


def test_when_no_candidate_passes_the_draws_go_on_and_batches_are_known():
    """A drawn constant below 0.6 is rejected; the critic takes the darkest of those that pass."""
    drawn = {0: [0.9, 0.7, 0.8], 1: [0.0, 0.0, 0.7], 2: [0.0, 0.0, 0.0], 3: [0.0, 0.95, 0.0]}
    calls = []

    def draw(recipe, _source, rng):
        state = rng.bit_generator.state
        number = next(n for n in range(9) if recipe.rng(n).bit_generator.state == state)
        return recipe.seed, drawn[recipe.seed][number]

    def apply(sources, draws, _model):
        calls.append([seed for seed, _ in draws])
        return [whole(value) if value else Edit(BOX, s.crop(BOX), np.ones((20, 20), bool))
                for s, (_, value) in zip(sources, draws, strict=True)]  # fmt: skip

    generator = test_generators.stub(draw, apply, load=lambda _params, _device: None, batch_size=2)
    recipes = [test_generators.recipe("stub", seed, batch=seed // 2, image_id=str(seed)) for seed in range(4)]
    search = Search(dark_critic(), 2)
    outcomes = synthesise(recipes, lambda _: test_generators.source(), generator, None, OPEN, 3, {}, search)
    assert calls == [[0, 1], [0, 1], [2, 3], [2, 3], [1, 2]]
    tries = [outcome.attempts for outcome in outcomes]
    assert tries == [2, 3, 3, 2]
    assert [outcome.status for outcome in outcomes] == ["accepted", "accepted", "rejected", "accepted"]
    assert batch_of(recipes, tries, 0, 2) == [0, 1]
    assert batch_of(recipes, tries, 1, 2) == [1, 2]
    assert batch_of(recipes, tries, 3, 2) == [2, 3]


def test_features_are_searched_by_a_critic_of_their_backbone_only(tiny):
    generator = registry.get("feature-noise")
    params = json.dumps({"size": 64})
    model = generator.load(json.loads(params), "cpu")
    recipes = [test_generators.recipe("feature-noise", n, params=params, image_id=str(n)) for n in range(3)]
    own = as_critic(trained("onenip", tiny), {"bottle": 0.0})
    other = as_critic(trained("memory_bank", tiny), {"bottle": 0.0})

    def made(critic, **changes):
        search = Search(replace(critic, **changes), 3) if critic else None
        return synthesise(recipes, lambda _: test_generators.source(), generator, model, OPEN, 3, {}, search)

    def margins(outcomes):
        features, masks = [o.feature.feature for o in outcomes], [o.mask for o in outcomes]
        return np.array(mean_margins(own, features, masks, ["bottle"] * 3))

    assert (margins(made(own)) <= margins(made(None)) + 1e-4).all()
    assert all("candidates" not in outcome.measures for outcome in made(other))
    larger = [replace(recipe, params=json.dumps({"size": 96})) for recipe in recipes]
    model = generator.load({"size": 96}, "cpu")
    with pytest.raises(UsageError, match=r"params\.size"):
        synthesise(larger, lambda _: test_generators.source(), generator, model, OPEN, 3, {}, Search(own, 3))


# -- guided chains --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(tiny_sd, tiny_clip):
    """Latents of two pictures and of their twins, places, descriptions, and a critic that finds contrast."""
    sd = tiny_sd["sd15"]
    generator = torch.Generator().manual_seed(3)
    clean, twin = (sd.encode(torch.rand(2, 3, 64, 64, generator=generator)) for _ in range(2))
    location = torch.zeros(2, *clean.shape[2:])
    location[:, 2:-2, 2:-3] = 1
    kernel = torch.ones(3, 1, 5, 5) / 25

    def margins(pictures, _categories):
        blurred = torch.nn.functional.conv2d(pictures, kernel, padding=2, groups=3)
        return 20 * (pictures - blurred).abs().mean(dim=1) - 0.01

    scenes = [Scene(torch.full((3, 48, 48), 0.5), (8, 40, 8, 40), "bottle")] * 2
    detail = tiny_clip.text(["a deep crack", "a stain"])
    return sd, tiny_clip, Critic(48, margins), clean, twin, detail, location, scenes


@torch.no_grad()
def test_one_practising_step_lowers_the_margin_and_not_the_cosine(scene):
    sd, clip, critic, clean, twin, detail, location, scenes = scene

    def state(z):
        change = (sd.decode(z).clamp(0, 1) - sd.decode(twin).clamp(0, 1)) * torch.nn.functional.interpolate(
            location[:, None], (64, 64)
        )
        return _mean_margin(critic, change, scenes), clip.similarity(sd.decode(z).clamp(0, 1), detail)

    moved, before = practise(sd, clip, Guide(critic, 0.05), clean, twin, detail, location, scenes)
    margin, cosine = state(clean)
    torch.testing.assert_close(before, margin)
    after, kept = state(moved)
    assert (after < margin).all()
    assert (kept > cosine - 0.1 * (margin - after)).all()  # to first order it does not fall at all
    outside = (location == 0)[:, None].expand_as(clean)
    assert torch.equal(moved[outside], clean[outside])
    twice, _ = practise(sd, clip, Guide(critic, 0.1), clean, twin, detail, location, scenes)
    torch.testing.assert_close(twice - clean, 2 * (moved - clean), rtol=1e-3, atol=1e-5)
    content = replace(critic, margins=lambda *given: critic.margins(*given) - 10)
    still, _ = practise(sd, clip, Guide(content, 0.1), clean, twin, detail, location, scenes)
    assert torch.equal(still, clean)
    blind, _ = practise(sd, None, Guide(critic, 0.05), clean, twin, None, location, scenes)
    assert (state(blind)[0] < margin).all()


def test_what_goes_against_the_description_is_projected_out():
    wanted = torch.tensor([1.0, 0.0]).view(1, 2, 1, 1).repeat(2, 1, 1, 1)
    step = torch.tensor([[-1.0, 2.0], [1.0, 2.0]]).view(2, 2, 1, 1)
    found = _without_conflict(step, wanted).flatten(1)
    torch.testing.assert_close(found, torch.tensor([[0.0, 2.0], [1.0, 2.0]]))


def test_a_change_that_only_fades_lowers_no_margin(scene):
    critic, scenes = scene[2], scene[7]
    change = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    scale = torch.ones(2, 1, 1, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(_mean_margin(critic, change * scale, scenes).sum(), scale)
    assert gradient.abs().max() < 1e-4


def test_guided_chains_end_below_unguided_ones(tiny_sd, tiny_clip, scene):
    critic = scene[2]
    sd, settings = tiny_sd["sd15"], CutParams(**{**test_cut_generator.SETTINGS, "window": 0.5})
    reader = MapReader(sd)
    picture = test_cut_generator.picture(64, 64).astype(np.float32) / 255
    place = np.zeros((64, 64), np.bool_)
    place[16:48, 16:48] = True
    whole = torch.from_numpy(cv2.resize(picture, (48, 48))).permute(2, 0, 1)
    requests = [
        Request(
            picture, place, "a photo of a bottle", test_cut_generator.CRACK, "a photo of a deep crack",
            "crack", seed, Scene(whole, (0, 48, 0, 48), "bottle"),
        )
        for seed in range(2)
    ]  # fmt: skip
    found = {}
    for strength in (0.0, 0.5):
        twins = sample(requests, sd, reader, tiny_clip, settings, Guide(critic, strength))
        change = torch.from_numpy(np.stack([t.anomaly - t.normal for t in twins])).permute(0, 3, 1, 2)
        margin = _mean_margin(critic, change * torch.from_numpy(place), [r.scene for r in requests])
        found[strength] = margin.numpy(), np.array([t.trace["cosine"] for t in twins])
    assert (found[0.5][0] < found[0.0][0]).all()
    assert (found[0.5][1] > found[0.0][1] - 0.01).all()


# -- a round that practises -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def practising(tiny, tmp_path_factory):
    """A second round of pixel, feature and cut samples against a detector that lies in the first."""
    folder = tmp_path_factory.mktemp("practice")
    (folder / "bottle").mkdir()
    for index in range(5):
        picture = test_generators.picture(72, 64, seed=index)
        cv2.imwrite(str(folder / "bottle" / f"{index}.png"), picture)
    cut = {
        **test_cut_generator.SETTINGS,
        "model": str(tiny["sd15"]),
        "clip": str(tiny["clip"]),
        "judge": None,
    }
    raw = {
        "source": str(folder / "bottle"),
        "samples": 9,
        "detector": {"name": "onenip", "settings": SMALL["onenip"]},
        "generation": {
            "generators": {"cut": {"params": cut}, "scar": {}, "feature-noise": {"params": {"size": 64}}},
            "location": "anywhere",
            "area": [0.02, 0.05],
            "attempts": 3,
            "gates": test_cut_generator.OPEN.model_dump(mode="json"),
            "practice": {"candidates": 3, "guidance": 0.5},
        },
    }
    space = Workspace(str(folder / "w"))
    config = parse_config(raw, name="test")
    assert rounds.begin(config, space, new_round=False) == 0
    assert rounds.open_round(space, 0).critic is None
    with pytest.raises(WorkspaceError, match=r"rounds/000/detectors/onenip lacks model\.safetensors"):
        rounds.write_settings(space, 1, config, config.generation, first=0)
    place = Path(space.url) / "rounds/000/detectors/onenip"
    notes = {"map_thresholds": {"bottle": 0.5}}
    checkpoints.save(place, "onenip", trained("onenip", tiny), seed=0, notes=notes)
    rounds.write_settings(space, 1, config, config.generation, first=0)
    digest, count = settings_hash(space, 1), rounds.open_round(space, 1).shard_count
    records = [make_shard(Job(space.url, 1, shard, digest)) for shard in range(count)]
    tables = [space.read_table(part("samples", 1, shard, "parquet")) for shard in range(count)]
    return space, records[0], [row for table in tables for row in table.to_pylist()]


def test_a_round_that_practises_says_so_and_is_replayed(practising):
    space, record, rows = practising
    critic = rounds.open_round(space, 1).critic
    assert json.loads(record["fingerprint"])["critic"] == critic.sha256
    accepted = [row for row in rows if row["status"] == "accepted"]
    assert {row["generator"] for row in accepted} == {"cut", "scar", "feature-noise"}
    for row in accepted:
        measures = json.loads(row["measures"])
        assert "margin" in measures and (row["generator"] == "cut") != (measures.get("candidates") == 3)
        assert replay(space, row["sample_id"])["identical"]


def test_a_detector_trained_anew_leaves_the_round_that_practised_against_it(practising):
    """Round 1 makes its samples again, byte for byte, whatever has become of round 0's detector."""
    space, _, rows = practising
    before = Path(space.url) / "rounds/000/detectors/onenip"
    whole = {path: path.read_bytes() for path in before.iterdir()}
    try:
        (before / "model.safetensors").unlink()
        (before / "config.yaml").write_text("trained: anew\n")
        load_critic.cache_clear()
        load_round.cache_clear()
        made = next(
            row["sample_id"] for row in rows if (row["generator"], row["status"]) == ("cut", "accepted")
        )
        assert replay(space, made)["identical"]
        shard = rounds.open_round(space, 1).shard_count - 1
        tar = part("shards", 1, shard, "tar")
        stored = space.read_bytes(tar)
        space.remove(tar)
        make_shard(Job(space.url, 1, shard, settings_hash(space, 1)))
        assert space.read_bytes(tar) == stored
    finally:
        for path, data in whole.items():
            path.write_bytes(data)


def test_a_critic_that_changed_is_refused_and_named(practising):
    space, _, _ = practising
    path = Path(space.url) / "rounds/001/critic/config.yaml"
    text = path.read_text()
    path.write_text(text + "# touched\n")
    try:
        load_critic.cache_clear()
        load_round.cache_clear()
        with pytest.raises(WorkspaceError, match="no longer the detector"):
            make_shard(Job(space.url, 1, 0, settings_hash(space, 1)))
        assert "rounds/001/critic" in {finding.path for finding in _damaged_files(space, 1)}
    finally:
        path.write_text(text)
