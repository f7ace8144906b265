"""The bandit over the texts of a prompt bank: what a text's samples are worth, and the shares that follow."""

from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from generation.cut.prompts import PromptParams, prompts_of
from manifests.errors import UsageError
from manifests.recipes import GeneratorSettings
from tests.test_prompts import cut, planned
from workflows import texts
from workflows.config import Generation, parse_config
from workflows.probing import Defects
from workflows.rules import FACTOR
from workflows.texts import LEAST, PULLS, Pulled, from_worths, steer_texts

BANK = prompts_of(PromptParams(nouns={"nut": "hex nut (M4)"}), GeneratorSettings())
DRAW = st.floats(0, 1, exclude_max=True)


@given(st.lists(DRAW, min_size=6, max_size=6), st.floats(0.0001, 0.3), st.floats(0, 1))
def test_the_text_that_was_filled_is_found_again(draws, area, severity):
    defect, prompt, detail = BANK.words("nut", area, severity, draws)
    entry = BANK.entries[int(draws[0] * len(BANK.entries))]
    assert BANK.templates("nut", defect, prompt, detail) == (
        entry.prompts[int(draws[1] * len(entry.prompts))],
        entry.details[int(draws[2] * len(entry.details))],
    )


def test_a_text_that_no_template_fills_has_none():
    assert BANK.templates("nut", "crack", "a photo of a nut with an odd crack", "nothing") == ("", "")
    assert BANK.templates("nut", "unheard of", "a photo of a nut", "") == ("", "")


def test_texts_are_drawn_in_their_shares_and_nothing_else_changes():
    def words(**settings):
        return [recipe for recipe in planned(**cut(**settings)) if recipe.generator == "cut"]

    bank = prompts_of(PromptParams(), GeneratorSettings())
    first = {entry.defect: entry.prompts[0] for entry in bank.entries}
    even = words()
    only = words(texts={text: 0 for entry in bank.entries for text in entry.prompts[1:]})
    for one, other in zip(even, only, strict=True):
        used, _ = bank.templates(other.category, other.defect, other.prompt, other.detail)
        assert used == first[other.defect]
        assert {k: v for k, v in asdict(one).items() if k != "prompt"} == {
            k: v for k, v in asdict(other).items() if k != "prompt"
        }
    assert words(texts=dict.fromkeys(first.values(), 1.0)) == even


def test_equal_worths_change_nothing_and_few_samples_say_nothing():
    present = {"a": 1.0, "b": 3.0, "c": 0.0}
    assert from_worths(dict.fromkeys("abc", Pulled(50, 0.4)), present) == present
    assert (
        from_worths({"a": Pulled(50, 0.9), "b": Pulled(PULLS - 1, 0.1), "c": Pulled(0, 0)}, present)
        == present
    )
    after = from_worths({"a": Pulled(50, 0.9), "b": Pulled(50, 0.1), "c": Pulled(50, 0.9)}, present)
    assert after["c"] == 0 and after["a"] > 1 and sum(after.values()) == pytest.approx(4, rel=0.01)
    assert after["a"] / after["b"] <= FACTOR**2 / 3 * 1.01


def test_the_better_text_is_drawn_more_with_every_round():
    """Four texts whose samples' ranks overlap, one of them better by a fifth; and none better."""
    rng = np.random.default_rng(0)

    def rounds(best):
        shares = dict.fromkeys("abcd", 1.0)
        for _ in range(8):
            counts = rng.multinomial(60, np.array(list(shares.values())) / sum(shares.values()))
            pulled = {
                text: Pulled(n, float(np.clip(rng.normal(0.5, 0.29, n) + best * (text == "a"), 0, 1).mean()))
                for text, n in zip(shares, counts, strict=True)
                if n
            }
            shares = from_worths(pulled, {text: shares[text] for text in shares})
        return shares

    better = [rounds(0.2) for _ in range(40)]
    assert np.mean([max(one, key=one.get) == "a" for one in better]) > 0.9
    assert np.mean([one["a"] for one in better]) > 1.5
    assert all(share >= LEAST for one in better for share in one.values())
    alike = np.array([list(rounds(0.0).values()) for _ in range(40)])
    assert alike.mean(axis=0) == pytest.approx(np.ones(4), abs=0.2)


def test_texts_whose_samples_look_like_real_defects_are_drawn_more(monkeypatch):
    """Samples of one prompt point where the real defects do; those of another are all rejected."""
    settings, scratches = GeneratorSettings(), PromptParams(defects=("scratch",))
    bank = prompts_of(scratches, settings)
    alike, rejected, *others = bank.entries[0].prompts
    recipes = [r for shard in range(12) for r in planned(shard, **cut(params=scratches))]
    rows = []
    for recipe in (r for r in recipes if r.generator == "cut"):
        used, _ = bank.templates(recipe.category, recipe.defect, recipe.prompt, recipe.detail)
        status = "rejected" if used == rejected else "accepted"
        rows.append({**asdict(recipe), "used": used, "status": status, "attempts": 1})
    kept = [row for row in rows if row["status"] == "accepted"]
    directions = np.array([[1.0, 0.0] if row["used"] == alike else [0.0, 1.0] for row in kept], np.float32)
    real = {c: Defects(np.array([[1.0, 0.0]], np.float32), ("g",)) for c in {row["category"] for row in rows}}
    ground = SimpleNamespace(
        round_=SimpleNamespace(number=0, prompts={"cut": bank}),
        recipes=kept,
        directions=directions,
        real=real,
    )
    monkeypatch.setattr(texts, "sample_rows", lambda *_: rows)
    monkeypatch.setattr(texts, "accepted_samples", lambda *_: kept)
    before = Generation(generators={"cut": settings, "perlin": GeneratorSettings()})
    after, (decision,) = steer_texts(None, ground, before)
    shares = after.generators["cut"].texts
    assert shares[alike] > 1.3 and all(shares[alike] > shares[text] > shares[rejected] for text in others)
    assert after.generators["perlin"] == before.generators["perlin"]
    assert decision.setting == "generators.cut.texts.scratch"
    assert repr(alike) in decision.reason and f"0.00 for {rejected!r}" in decision.reason
    ground.real = {}  # nothing labelled: what is accepted is all that tells texts apart
    shares = steer_texts(None, ground, before)[0].generators["cut"].texts
    assert shares[alike] == pytest.approx(shares[others[0]], rel=0.02) and shares[rejected] < 0.8
    ground.round_.prompts = {}
    assert steer_texts(None, ground, before) == (before, [])


def test_unknown_texts_and_defects_are_refused_with_the_nearest_one(tmp_path):
    (tmp_path / "good").mkdir()

    def problems(**own):
        with pytest.raises(UsageError) as error:
            parse_config(
                {"source": str(tmp_path), "samples": 1, "generation": {"generators": own}},
                name="x",
                folder=tmp_path,
            )
        return str(error.value)

    wrong = problems(cut={"texts": {"a photo of a {object} with a crak on it": 2}, "defects": {"scrach": 1}})
    assert "generators.cut.texts" in wrong and "mean 'a photo of a {object} with a crack on it'" in wrong
    assert "generators.cut.defects" in wrong and "mean 'scratch'" in wrong
    assert "generators.band: it has no prompt bank" in problems(band={"defects": {"scratch": 1}})
