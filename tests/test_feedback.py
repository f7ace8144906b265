import json

import numpy as np
import pytest

from manifests.recipes import GeneratorSettings
from workflows.config import Generation
from workflows.feedback import Found, Move, apply_move, decide, propose, sample_weights, search

GENERATION = Generation(
    generators={name: GeneratorSettings() for name in ("perlin", "scar", "frequency")},
    area=(0.001, 0.05),
    severity=(0.3, 0.9),
)


def defects(missed_is_small: bool, seed: int = 0, shuffled: bool = False) -> list[Found]:
    rng = np.random.default_rng(seed)
    areas = np.exp(rng.uniform(np.log(0.0005), np.log(0.1), 60))
    contrasts = np.exp(rng.uniform(np.log(0.5), np.log(8), 60))
    hits = (areas > 0.007) == missed_is_small
    if shuffled:
        rng.shuffle(hits)
    rows = zip(areas, contrasts, hits, strict=True)
    return [Found("nut", f"part {i}", a, c, float(h)) for i, (a, c, h) in enumerate(rows)]


def test_opposite_feedback_moves_settings_in_opposite_directions():
    learnable = {"perlin": 0.9, "scar": 0.1, "frequency": 0.5}
    small, _ = propose(defects(True), learnable)
    large, _ = propose(defects(False), {"perlin": 0.1, "scar": 0.9, "frequency": 0.5})
    after_small, after_large = apply_move(GENERATION, small), apply_move(GENERATION, large)
    assert after_small.area[0] < GENERATION.area[0] < after_large.area[0]
    assert after_small.area[1] < GENERATION.area[1] < after_large.area[1]

    def share(generation, name):
        return generation.generators[name].share / sum(s.share for s in generation.generators.values())

    assert share(after_small, "perlin") > 1 / 3 > share(after_large, "perlin")
    assert share(after_small, "scar") < 1 / 3 < share(after_large, "scar")


def test_weak_contrast_that_is_missed_asks_for_weaker_anomalies():
    def move(weak_missed):
        rows = [Found("n", f"{c}", 0.01, c, float((c > 2) == weak_missed)) for c in np.linspace(0.5, 4, 40)]
        return apply_move(GENERATION, propose(rows, {})[0])

    assert move(True).severity[0] < GENERATION.severity[0] < move(False).severity[0]


def test_shuffled_feedback_moves_nowhere_systematic():
    tilts = [propose(defects(True, seed, shuffled=True), {})[0].area for seed in range(200)]
    moved = [tilt for tilt in tilts if tilt]
    assert len(moved) < 0.2 * len(tilts)  # 10 % by chance at |z| > 1.64
    assert abs(np.mean(tilts)) < 3 * np.std(tilts) / np.sqrt(len(tilts))


def test_nothing_missed_changes_nothing():
    rows = [Found("n", f"{i}", 0.01, 2.0, 1.0) for i in range(20)]
    move, reasons = propose(rows, {"perlin": 0.9, "scar": 0.1})
    assert move == Move(0.0, 0.0, {"perlin": 0.0, "scar": 0.0})
    assert reasons["share.perlin"] == "nothing was missed"


def test_many_specks_on_one_part_or_one_hard_category_are_no_evidence():
    one_part = [Found("n", "p", a, 1.0, float(a > 0.01)) for a in np.geomspace(0.001, 0.1, 40)]
    assert propose(one_part, {})[0].area == 0
    easy = [Found("easy", f"{i}", 0.05, 1.0, 1.0) for i in range(20)]
    hard = [Found("hard", f"{i}", 0.001, 1.0, 0.0) for i in range(20)]
    assert propose(easy + hard, {})[0].area == 0


def test_no_move_changes_nothing_even_beyond_the_limits():
    odd = Generation(
        generators={"perlin": GeneratorSettings(share=9), "scar": GeneratorSettings(share=1)},
        area=(0.0001, 0.5),
    )
    assert apply_move(odd, Move()) == odd
    assert apply_move(odd, Move(area=-0.5)).area[0] == odd.area[0]


def test_noise_of_the_proxy_moves_nothing():
    for seed in range(8):
        rng = np.random.default_rng(seed)

        def noise(_, rng=rng):
            return 0.7 + 1e-4 * rng.random()

        trials = search(noise, Move(), ["scar"], trials=20, seed=seed, round_=0)
        assert decide(GENERATION, trials, Move(), {})[0] == GENERATION


def test_a_rule_that_the_proxy_finds_worse_is_not_followed():
    trials = search(lambda move: -abs(move.area), Move(-0.5), [], trials=16, seed=0, round_=0)
    assert decide(GENERATION, trials, Move(-0.5), {})[0] == GENERATION


def test_moves_respect_limits():
    generation = GENERATION
    for _ in range(40):
        generation = apply_move(generation, Move(1.0, 1.0, {"perlin": 1.0, "scar": -1.0}))
    assert 0 < generation.area[0] <= generation.area[1] <= 0.3
    assert 0 <= generation.severity[0] <= generation.severity[1] <= 1
    assert all(settings.share >= 0.04 for settings in generation.generators.values())


def test_weights_follow_the_move():
    areas = np.geomspace(*GENERATION.area, 50)
    names = np.array(["perlin"] * 25 + ["scar"] * 25)
    severities = np.full(50, 0.6)
    assert np.allclose(sample_weights(GENERATION, Move(), names, areas, severities), 1)
    larger = sample_weights(GENERATION, Move(area=0.5), names, areas, severities)
    assert np.all(np.diff(larger) > 0)
    more = sample_weights(GENERATION, Move(shares={"perlin": 1.0}), names, areas, severities)
    assert more[0] / more[-1] == pytest.approx(2.5)


def test_the_search_finds_a_better_move_and_goes_on_from_its_table():
    def value(move):
        return 1 - (move.area - 0.5) ** 2 - 0.1 * move.severity**2

    kept = []
    whole = search(value, Move(0.2), ["perlin"], trials=24, seed=3, round_=0, keep=kept.append)
    assert [trial.origin for trial in whole[:3]] == ["current", "rule", "sampler"]
    assert max(t.value for t in whole) > max(t.value for t in whole[:2]) and kept == whole
    resumed = search(value, Move(0.2), ["perlin"], trials=24, seed=3, round_=0, earlier=whole[:11])
    assert [t.params for t in resumed] == [t.params for t in whole]


def test_decisions_say_what_and_why():
    trials = search(lambda move: -move.area, Move(-0.5), [], trials=16, seed=0, round_=0)
    assert json.loads(max(trials, key=lambda t: t.value).params)["area"] < -0.5
    after, decisions = decide(GENERATION, trials, Move(-0.5), {"area": "missed are small"})
    assert after.area[1] < GENERATION.area[1]
    row = next(decision for decision in decisions if decision.setting == "area")
    assert "missed are small" in row.reason and row.before != row.after
