import hashlib
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from generation import registry
from manifests.errors import UsageError
from manifests.recipes import (
    GeneratorSettings,
    Pool,
    Trait,
    plan_shard,
    pool_from,
    sections,
    shard_count,
    shares_of,
)
from manifests.schema import RECIPES, Image, canonical_json, recipes_from, to_table
from workflows.config import Generation


def picture(name: str, category: str = "nut", split: str = "train", defect: str = "good") -> Image:
    digest = hashlib.sha256(name.encode()).hexdigest()
    return Image(digest, f"{name}.png", digest, category, defect, None, 64, 64, "RGB", 8, name, split)


POOL = pool_from([picture(f"{c}{i}", c) for c in ("nut", "bolt") for i in range(5)])
PLAN = dict(
    seed=7,
    samples=1000,
    shard_size=64,
    generators={"perlin": GeneratorSettings(share=3), "poisson": GeneratorSettings(share=1, defect="dent")},
    traits={
        "perlin": Trait("none", "blob", 1, "{}"),
        "poisson": Trait("normal", "patch", 4, canonical_json({"mixed": True})),
    },
    area=(0.001, 0.1),
    severity=(0.2, 0.8),
    count=(1, 3),
    location="foreground",
    pool=POOL,
)


def plan(shard: int, round_: int = 0, **changes):
    return plan_shard(**{**PLAN, **changes}, round_=round_, shard=shard)


def test_planning_is_a_function_of_settings_round_and_shard():
    assert plan(3) == plan(3)
    seeds = [recipe.seed for shard in range(4) for round_ in range(2) for recipe in plan(shard, round_)]
    assert len(set(seeds)) == len(seeds)


def test_golden_plan():
    """The plan of a seed is a promise: a change here makes every stored workspace unrepeatable."""
    text = canonical_json([[r.seed, r.image_id, r.generator, r.count, r.batch] for r in plan(0)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "69f9f71e135aff1d"


@given(st.integers(1, 300), st.integers(1, 70))
@settings(max_examples=40, deadline=None)
def test_every_sample_is_planned_exactly_once(samples, shard_size):
    count = shard_count(samples, shard_size)
    ids = [r.sample_id for s in range(count) for r in plan(s, samples=samples, shard_size=shard_size)]
    assert len(ids) == len(set(ids)) == samples
    with pytest.raises(IndexError):
        plan(count, samples=samples, shard_size=shard_size)


@given(
    st.integers(1, 400),
    st.integers(1, 70),
    st.integers(1, 70),
    st.lists(st.tuples(st.floats(0.01, 10), st.booleans()), min_size=1, max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_sections_hold_every_sample_once_and_one_kind_of_worker_each(samples, on_gpu, without, mix):
    generators = {f"g{i}": GeneratorSettings(share=share) for i, (share, _) in enumerate(mix)}
    wants = {f"g{i}" for i, (_, gpu) in enumerate(mix) if gpu}
    found = sections(samples, generators, wants, {True: on_gpu, False: without}, shares_of(generators, []))
    assert [shard for part in found for shard in part.shards] == list(range(found[-1].shards.stop))
    total = sum(settings.share for settings in generators.values())
    for part in found:
        assert set(part.generators) == {name for name in generators if (name in wants) == part.gpu}
        share = sum(settings.share for settings in part.generators.values()) / total
        assert abs(part.samples - samples * share) <= 1
        assert part.shard_size == (on_gpu if part.gpu else without)
    traits = {name: Trait("none", "blob", 1, "{}") for name in generators}
    recipes = [
        recipe
        for part in found
        for shard in part.shards
        for recipe in plan(
            shard,
            traits=traits,
            **{k: getattr(part, k) for k in ("generators", "samples", "shard_size", "first")},
        )
    ]
    assert len({recipe.sample_id for recipe in recipes}) == len(recipes) == samples
    assert len({recipe.seed for recipe in recipes}) == samples


def test_a_mix_of_one_kind_is_one_section_and_the_plan_that_it_always_was():
    own = PLAN["generators"]
    (part,) = sections(1000, own, [], {True: 8, False: 64}, shares_of(own, []))
    assert plan(3, first=part.first, samples=part.samples, shard_size=part.shard_size) == plan(3)


def test_ranges_shares_and_donors_are_kept():
    recipes = [recipe for shard in range(shard_count(1000, 64)) for recipe in plan(shard)]
    assert all(0.001 <= r.area <= 0.1 and 0.2 <= r.severity <= 0.8 and 1 <= r.count <= 3 for r in recipes)
    shares = Counter(r.generator for r in recipes)
    assert abs(shares["perlin"] / 1000 - 0.75) < 0.02
    for r in recipes:
        if r.generator == "poisson":
            (donor,) = r.donors
            assert donor != r.image_id
            assert donor in {image.image_id for image in POOL.normals[r.category]}
            assert r.defect == "dent"
        else:
            assert r.donors == () and r.defect == "blob"


def test_a_generator_draws_the_categories_as_often_as_its_own_shares_say():
    """P(generator, category) goes with share × the category's × the generator's for it, in every section."""
    own = {
        "perlin": GeneratorSettings(share=3, categories={"bolt": 0.5, "nowhere": 9}),
        "poisson": GeneratorSettings(share=1, categories={"bolt": 4}),
    }
    categories = list(POOL.normals)
    often = {c: 2.0 if c == categories[-1] else 1.0 for c in categories}
    weights = {
        (name, c): s.share * often[c] * s.categories.get(c, 1.0)
        for name, s in own.items()
        for c in categories
    }
    shares = shares_of(own, categories, often)
    total = sum(weights.values())
    for name in own:
        wanted = sum(w for (n, _), w in weights.items() if n == name) / total
        assert shares[name] / sum(shares.values()) == pytest.approx(wanted)
    recipes = [
        r for shard in range(60) for r in plan(shard, generators=own, samples=60 * 64, category_shares=often)
    ]
    drawn = Counter((r.generator, r.category) for r in recipes)
    for key, weight in weights.items():
        assert abs(drawn[key] / len(recipes) - weight / total) < 0.02, key
    parts = sections(60 * 64, own, ["poisson"], {True: 8, False: 64}, shares)
    drawn = Counter()
    for part in parts:
        given = {k: getattr(part, k) for k in ("generators", "samples", "shard_size", "first")}
        for shard in part.shards:
            drawn.update((r.generator, r.category) for r in plan(shard, category_shares=often, **given))
    assert len(parts) == 2
    for key, weight in weights.items():
        assert abs(drawn[key] / (60 * 64) - weight / total) < 0.02, key
    with pytest.raises(UsageError, match="no generator has a share above 0 for any category"):
        sections(10, own, [], {True: 8, False: 64}, dict.fromkeys(own, 0.0))
    only = {"perlin": GeneratorSettings(categories=dict.fromkeys(categories, 0.0)), "poisson": own["poisson"]}
    assert {r.generator for r in plan(0, generators=only)} == {"poisson"}


def test_batches_have_the_planned_size_and_one_generator():
    sizes = Counter((r.generator, r.batch) for r in plan(0))
    assert max(count for (name, _), count in sizes.items() if name == "poisson") == 4
    assert len({batch for _, batch in sizes}) == len(sizes)


def test_only_good_pictures_of_the_train_split_are_used():
    good = picture("a")
    pool = pool_from([good, picture("b", split="test"), picture("c", split="calibration")])
    assert pool.normals == {"nut": (good,)}
    with pytest.raises(UsageError, match="no good picture"):
        pool_from([picture("b", split="feedback")])


def test_missing_donors_are_an_error_with_a_remedy():
    alone = Pool({"nut": (picture("a"),)})
    with pytest.raises(UsageError, match=r"only one.*without it, under generation"):
        plan(0, pool=alone)
    textured = {"perlin": Trait("texture", "blob", 1, "{}")}
    with pytest.raises(UsageError, match=r"generation\.textures"):
        plan(0, generators={"perlin": GeneratorSettings()}, traits=textured)


def test_recipes_survive_their_table():
    recipes = plan(1)
    assert recipes_from(to_table(recipes, RECIPES)) == recipes


def test_a_generator_may_have_an_area_of_its_own():
    own = {**PLAN["generators"], "poisson": GeneratorSettings(defect="dent", area=(0.2, 0.3))}
    for shared, found in zip(plan(0), plan(0, generators=own), strict=True):
        if found.generator == "poisson":
            assert 0.2 <= found.area <= 0.3
        else:
            assert found == shared  # nobody else's numbers move


def test_categories_pictures_and_strengths_follow_their_settings_and_nothing_else_moves():
    hard = POOL.normals["nut"][2].image_id
    generators = {**PLAN["generators"], "poisson": GeneratorSettings(severity=(0.9, 1.0))}
    changes = {
        "generators": generators,
        "category_shares": {"bolt": 0.25},
        "normal_weights": {hard: 16.0},
    }
    before, after = ([r for s in range(15) for r in plan(s, **c)] for c in ({}, changes))
    assert [(r.seed, r.area, r.count) for r in before] == [(r.seed, r.area, r.count) for r in after]
    assert Counter(r.category for r in after)["bolt"] / len(after) == pytest.approx(0.2, abs=0.04)
    nuts = [r.image_id for r in after if r.category == "nut"]
    assert nuts.count(hard) / len(nuts) == pytest.approx(0.8, abs=0.05)
    assert all((r.severity >= 0.9) == (r.generator == "poisson") for r in after)
    paired = [r for s in range(15) for r in plan(s, normal_weights={hard: 2.0}, nearest={hard: "poisson"})]
    others = len(POOL.normals["nut"]) - 1
    for mine, often in ((True, 4), (False, 2)):
        own = [r.image_id for r in paired if r.category == "nut" and (r.generator == "poisson") == mine]
        assert own.count(hard) / len(own) == pytest.approx(often / (often + others), abs=0.12)
    with pytest.raises(UsageError, match=r"generation\.categories"):
        plan(0, category_shares={"bolt": 0, "nut": 0})


def test_presets_make_a_papers_data_and_yield_to_what_is_set_beside_them():
    for name in ("draem", "dfd", "onenip", "cutpaste", "nsa"):
        generation = Generation.model_validate({"preset": name})
        assert generation.gates.contrast_min == 0 and generation.generators
        for key, chosen in generation.generators.items():
            registry.get(key).params.model_validate(chosen.params)
    draem = Generation.model_validate({"preset": "draem", "gates": {"contrast_min": 2}, "count": [2, 2]})
    assert draem.generators["perlin"].params["mask"] == "threshold"
    assert (draem.gates.contrast_min, draem.gates.hollow_max, draem.count) == (2, 1, (2, 2))
    again = Generation.model_validate(draem.model_dump())
    assert again == draem
    with pytest.raises(ValueError, match="unknown 'dream'; known: draem"):
        Generation.model_validate({"preset": "dream"})
