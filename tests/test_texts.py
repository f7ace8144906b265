"""The bandit over the texts of a prompt bank: what a text's samples are worth, and the shares that follow."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from generation.cut.prompts import PromptParams, prompts_of
from manifests.errors import UsageError
from manifests.recipes import GeneratorSettings
from manifests.workspace import Workspace
from tests.test_prompts import cut, planned
from workflows import texts
from workflows.config import Generation, parse_config
from workflows.demo import write_drawn
from workflows.probing import Defects
from workflows.rounds import begin, open_round, write_settings
from workflows.rules import FACTOR
from workflows.stages import read_settings
from workflows.texts import PULLS, Pulled, from_worths, steer_texts

BANK = prompts_of(PromptParams(nouns={"nut": "hex nut (M4)"}), GeneratorSettings())
DRAW = st.floats(0, 1, exclude_max=True)


@given(st.lists(DRAW, min_size=6, max_size=6), st.floats(0.0001, 0.3), st.floats(0, 1))
def test_the_text_that_was_filled_is_found_again(draws, area, severity):
    defect, prompt, detail = BANK.words("nut", area, severity, draws)
    entry = BANK.entries[int(draws[0] * len(BANK.entries))]
    assert BANK.source("nut", defect, prompt, detail) == (
        entry,
        entry.prompts[int(draws[1] * len(entry.prompts))],
        entry.details[int(draws[2] * len(entry.details))],
    )


def test_a_text_that_no_template_fills_has_none():
    entry = BANK.entries[0]
    prompt, detail = (
        one[0].format(object="hex nut (M4)", size="tiny", shape="thin", severity="deep")
        for one in (entry.prompts, entry.details)
    )
    assert BANK.source("nut", entry.defect, prompt, detail) == (entry, entry.prompts[0], entry.details[0])
    assert BANK.source("nut", entry.defect, prompt.replace("crack", "crock"), detail) is None
    assert BANK.source("nut", entry.defect, prompt, detail.replace("thin", "odd")) is None
    assert BANK.source("nut", "unheard of", prompt, detail) is None


def test_texts_are_drawn_in_their_shares_and_nothing_else_changes():
    def words(**settings):
        return [recipe for recipe in planned(**cut(**settings)) if recipe.generator == "cut"]

    bank = prompts_of(PromptParams(), GeneratorSettings())
    first = {entry.defect: entry.prompts[0] for entry in bank.entries}
    even = words()
    only = words(texts={text: 0 for entry in bank.entries for text in entry.prompts[1:]})
    for one, other in zip(even, only, strict=True):
        _, used, _ = bank.source(other.category, other.defect, other.prompt, other.detail)
        assert used == first[other.defect]
        assert {k: v for k, v in asdict(one).items() if k != "prompt"} == {
            k: v for k, v in asdict(other).items() if k != "prompt"
        }
    assert words(texts=dict.fromkeys(first.values(), 1.0)) == even


def test_equal_worths_change_nothing_and_few_recipes_say_nothing():
    present = {"a": 1.2345, "b": 3.0, "c": 0.0, "d": 1 / 3}
    assert from_worths(dict.fromkeys(present, Pulled(50, 0.4)), present) == present
    few = {"a": Pulled(50, 0.9), "b": Pulled(PULLS - 1, 0.1), "c": Pulled(50, 0.1), "d": Pulled(0, 0)}
    assert from_worths(few, present) == present
    after = from_worths({**few, "b": Pulled(50, 0.1)}, present)
    assert after["c"] == 0 and after["d"] == 1 / 3  # left out by a user; without recipes
    assert after["a"] > 1.2345 and sum(after.values()) == pytest.approx(sum(present.values()), rel=0.01)
    assert after["a"] / after["b"] <= FACTOR**2 * 1.2345 / 3 * 1.01
    none = dict.fromkeys(present, 0.0)
    assert from_worths(dict.fromkeys(present, Pulled(50, 0.9)), none) == none


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
            shares = from_worths({text: pulled.get(text, Pulled(0, 0.0)) for text in shares}, shares)
        return shares

    better = [rounds(0.2) for _ in range(40)]
    assert np.mean([max(one, key=one.get) == "a" for one in better]) > 0.9
    assert np.mean([one["a"] for one in better]) > 1.5
    alike = np.array([list(rounds(0.0).values()) for _ in range(40)])
    assert np.median(alike.max(axis=1)) < 1.5 and np.median(alike.min(axis=1)) > 0.6


def test_texts_whose_samples_look_like_real_defects_are_drawn_more(monkeypatch):
    """Samples of one prompt point where the real defects do; those of another are all rejected."""
    settings, scratches = GeneratorSettings(), PromptParams(defects=("scratch",))
    bank = prompts_of(scratches, settings)
    alike, rejected, *others = bank.entries[0].prompts
    rows = []
    for recipe in (r for shard in range(12) for r in planned(shard, **cut(params=scratches))):
        if recipe.generator == "cut":
            _, used, _ = bank.source(recipe.category, recipe.defect, recipe.prompt, recipe.detail)
            status = "rejected" if used == rejected else "accepted"
            rows.append({**asdict(recipe), "used": used, "status": status, "attempts": 1})
    kept = [row for row in rows if row["status"] == "accepted"]
    directions = np.array([[1.0, 0.0] if row["used"] == alike else [0.0, 1.0] for row in kept], np.float32)
    real = {c: Defects(np.array([[1.0, 0.0]], np.float32), ("g",)) for c in {row["category"] for row in rows}}
    real["empty"] = real[rows[0]["category"]]  # defects of a category without samples
    round_ = SimpleNamespace(number=0, prompts={"cut": bank})
    ground = SimpleNamespace(round_=round_, recipes=kept, directions=directions, real=real)
    before = Generation(generators={"cut": settings, "perlin": GeneratorSettings()})
    vetoed: set[str] = set()
    monkeypatch.setattr(texts, "sample_rows", lambda *_: iter(rows))
    monkeypatch.setattr(texts, "vetoes", lambda *_: vetoed)

    def steered(generation=before):
        return steer_texts(None, ground, generation)

    after, (decision,) = steered()
    shares = after.generators["cut"].texts
    assert shares[alike] > 1.3 and all(shares[alike] > shares[text] > shares[rejected] for text in others)
    assert after.generators["perlin"] == before.generators["perlin"]
    assert decision.setting == "generators.cut.texts.scratch"
    assert repr(alike) in decision.reason and f"0.00 for {rejected!r}" in decision.reason
    assert decision.before == "prompts 1, 1, 1, 1; details 1, 1, 1"
    ground.recipes, ground.directions = kept[::4], directions[::4]  # as far as the proxy reads them
    fewer = steered()[0].generators["cut"].texts
    assert shares[alike] > fewer[alike] > 1.05 and fewer[rejected] < 0.8
    ground.real = {}  # nothing labelled: what is accepted is all that tells texts apart
    shares = steered()[0].generators["cut"].texts
    assert shares[alike] == pytest.approx(shares[others[0]], rel=0.02) and shares[rejected] < 0.8
    vetoed |= {row["sample_id"] for row in kept if row["used"] == alike}
    shares = steered()[0].generators["cut"].texts
    assert shares[alike] < 0.9 < shares[others[0]]
    left_out = before.model_copy(
        update={"generators": {**before.generators, "cut": GeneratorSettings(share=0.0)}}
    )
    assert steered(left_out) == (left_out, [])


def test_entries_of_other_categories_are_no_rivals(monkeypatch):
    """All of the one category's are rejected, none of the other's: neither says anything of its own texts."""
    entry = replace(BANK.entries[0], categories=("nut",))
    bank = replace(BANK, entries=(entry, replace(entry, categories=("bolt",))))
    rows = [
        {
            "sample_id": f"{category}-{at}", "generator": "cut", "category": category, "defect": entry.defect,
            "prompt": prompt, "detail": detail, "status": status, "attempts": 1,
        }
        for category, status in (("nut", "accepted"), ("bolt", "rejected"))
        for at in range(40)
        for _, prompt, detail in [bank.words(category, 0.01, 0.5, ((at + 0.5) / 40,) * 6)]
    ]  # fmt: skip
    round_ = SimpleNamespace(number=0, prompts={"cut": bank})
    monkeypatch.setattr(texts, "sample_rows", lambda *_: iter(rows))
    monkeypatch.setattr(texts, "vetoes", lambda *_: set())
    before = Generation(generators={"cut": GeneratorSettings()})
    assert steer_texts(None, SimpleNamespace(round_=round_, recipes=[], real={}), before) == (before, [])


def test_shares_of_texts_word_the_next_rounds_plan(tmp_path):
    write_drawn(tmp_path / "drawn", train=6, good=4, each=2)
    raw = {"source": str(tmp_path / "drawn"), "samples": 40, "generation": {"generators": {"cut": {}}}}
    space = Workspace(str(tmp_path / "ws"))
    with space.writing():
        begin(parse_config(raw, name="x", folder=tmp_path), space, new_round=False)
    first = open_round(space, 0)
    bank = first.prompts["cut"]
    wanted = {entry.defect: entry.prompts[-1] for entry in bank.entries}
    shares = {text: 0.0 for entry in bank.entries for text in entry.prompts[:-1]}
    own = {"cut": first.generation.generators["cut"].model_copy(update={"texts": shares})}
    after = first.generation.model_copy(update={"generators": own})
    config, _, began = read_settings(space, 0)
    write_settings(space, 1, config, after, first=began)
    recipes = open_round(space, 1).plan(0)
    assert recipes
    for recipe in recipes:
        used = bank.source(recipe.category, recipe.defect, recipe.prompt, recipe.detail)
        assert used is not None and used[1] == wanted[recipe.defect]


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
