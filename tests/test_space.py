"""The declared search space: what is in it, and that any point of it is a valid configuration."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from generation import registry
from manifests.recipes import GeneratorSettings
from workflows.config import Generation, parse_config
from workflows.probing import cost_of, weights_at_hand
from workflows.space import (
    apply_values,
    at_place,
    place_of,
    present_values,
    random_values,
    search_space,
    vary,
)

EVERYTHING = Generation(generators={name: GeneratorSettings() for name in registry.BUILT_IN})


def test_the_space_holds_what_the_loop_steers():
    space = search_space(EVERYTHING)
    assert set(space) >= {
        "area.low", "area.high", "severity.high", "count.low", "location", "generators.perlin.share",
        "generators.band.params.rings", "generators.band.params.amplitude", "generators.cut.params.gamma",
        "generators.cut.params.guidance", "generators.cut.params.attention",
        "generators.cut.params.refinement", "generators.feature-ascent.params.projection",
    }  # fmt: skip
    assert set(space) == set(present_values(EVERYTHING))


def test_what_is_off_or_null_is_not_searched_and_what_is_named_is():
    mix = {
        "perlin": GeneratorSettings(share=0),
        "cut": GeneratorSettings(defects={"crack": 2.0}, severity=(0.1, 0.2)),
    }
    space = search_space(Generation(generators=mix, categories={"nut v1.2": 1.0}, location="roi"))
    assert not [path for path in space if "perlin" in path] and "location" not in space
    assert set(space) > {
        "categories.nut v1.2", "generators.cut.defects.crack", "generators.cut.severity.low"
    }  # fmt: skip
    assert "generators.cut.area.low" not in space


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_any_point_is_a_valid_configuration_and_is_reached(seed):
    space = search_space(EVERYTHING)
    values = random_values(space, np.random.default_rng(seed))
    after = apply_values(EVERYTHING, json.loads(json.dumps(values)))
    parse_config({"source": "x", "generation": after.model_dump(mode="json")}, name="test")
    reached = present_values(after)
    pairs = {path.rpartition("low")[0] for path in space if path.endswith("low")}
    for path, value in values.items():
        if any(path in (f"{pair}low", f"{pair}high") for pair in pairs):
            stem = path.removesuffix("low").removesuffix("high")
            assert {reached[f"{stem}low"], reached[f"{stem}high"]} == {
                values[f"{stem}low"], values[f"{stem}high"]
            }  # fmt: skip
        else:
            assert reached[path] == value
    assert after.area[0] <= after.area[1]
    assert apply_values(after, reached) == after


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_places_and_values_are_inverse(seed):
    space = search_space(EVERYTHING)
    for path, value in random_values(space, np.random.default_rng(seed)).items():
        place = place_of(space[path], value)
        assert 0 <= place <= 1
        if not space[path].whole:
            assert at_place(space[path], place) == value


def test_present_values_change_nothing_and_limits_hold_them():
    odd = Generation(generators={"peak": GeneratorSettings(share=30, params={"tint": 1.0})}, area=(1e-5, 0.5))
    assert apply_values(odd, present_values(odd)) == odd
    assert search_space(odd)["generators.peak.share"].high == 30
    assert search_space(odd)["area.low"].low == 1e-5


def test_settings_that_vary_are_drawn_around_the_present_ones():
    own = GeneratorSettings(vary=0.1, params={"gamma": 0.5})
    mix = Generation(generators={"cut": own, "perlin": GeneratorSettings()})
    space = search_space(mix)
    drawn = [vary(mix, ["cut"], np.random.default_rng(seed))["cut"] for seed in range(40)]
    assert set(drawn[0]) >= {"gamma", "guidance", "attention", "refinement"}
    gammas = [values["gamma"] for values in drawn]
    assert 0.44 <= min(gammas) < 0.47 and 0.53 < max(gammas) <= 0.56
    recipes = [
        {"generator": "cut", "area": 0.01, "severity": 0.5, "defect": "", "category": "",
         "params": json.dumps(registry.get("cut").params(**values).model_dump(mode="json"))}
        for values in drawn
    ]  # fmt: skip
    for wanted in (0.45, 0.55):
        after = apply_values(mix, {"generators.cut.params.gamma": wanted})
        weights = weights_at_hand(after, mix, recipes, {"cut": 1.0, "perlin": 1.0})
        assert weights.sum() == pytest.approx(1)
        assert abs(weights @ gammas - wanted) < abs(np.mean(gammas) - wanted)
    assert "generators.cut.params.gamma" in space


def test_samples_at_hand_weigh_as_often_as_their_category_would_be_drawn():
    """More, the more often a generator's category is drawn than when the samples were made."""
    drawn = Generation(generators={"cut": GeneratorSettings(categories={"nut": 2.0})})
    after = Generation(
        generators={"cut": GeneratorSettings(categories={"nut": 3.0})}, categories={"bolt": 0.5}
    )
    own = {"generator": "cut", "area": 0.01, "severity": 0.5, "defect": "", "params": "{}"}
    recipes = [{**own, "category": category} for category in ("nut", "bolt")]
    nut, bolt = weights_at_hand(after, drawn, recipes, {"cut": 0.4})
    assert nut + bolt == pytest.approx(0.4) and nut / bolt == pytest.approx((3 / 2) / 0.5)
    one = cost_of(drawn, ["nut", "bolt"])
    mix = {**drawn.generators, "perlin": GeneratorSettings()}
    two = cost_of(Generation(generators=mix), ["nut", "bolt"])
    fast = registry.get("perlin").seconds
    assert one == registry.get("cut").seconds and two == pytest.approx((1.5 * one + fast) / 2.5)


def test_ranges_that_vary_stay_in_order():
    near = GeneratorSettings(vary=0.5, params={"period_low": 20.0, "period_high": 25.0})
    mix = Generation(generators={"peak": near})
    for seed in range(40):
        drawn = vary(mix, ["peak"], np.random.default_rng(seed))["peak"]
        assert registry.get("peak").params(**drawn).period_low == drawn["period_low"] <= drawn["period_high"]


def test_unknown_paths_and_wrong_values_are_named():
    with pytest.raises(KeyError, match=r"generators\.perlin\.nothing"):
        apply_values(EVERYTHING, {"generators.perlin.nothing": 1})
    with pytest.raises(ValidationError, match="location"):
        apply_values(EVERYTHING, {"location": "elsewhere"})
