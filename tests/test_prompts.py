"""Prompts: the shipped bank, banks of one's own, planning with them, and a language model that writes one."""

import json
import re
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from open_clip.tokenizer import SimpleTokenizer

from generation import registry
from generation.cut.prompts import (
    PromptParams,
    anomaly_word,
    fill,
    find_word,
    load_bank,
    normal_prompt,
    prompts_of,
    texts_of,
    too_long,
    word_of,
)
from generation.protocol import Edit, Generator
from manifests.errors import UsageError
from manifests.recipes import GeneratorSettings, Trait, check_prompts, plan_shard
from manifests.schema import canonical_json
from manifests.wording import Prompts, Wording, fill_template, from_plain, noun_of, to_plain
from manifests.workspace import Workspace
from tests.test_cli import flawsmith
from tests.test_recipes import PLAN, POOL
from workflows import prompting, rounds
from workflows.config import load_config
from workflows.stages import Job, load_round, make_shard, settings_hash

BANK = load_bank()
TOKENIZER = SimpleTokenizer()
ENTRY = {
    "defect": "scuff",
    "word": "scuff mark",
    "synonyms": ["scuffed"],
    "prompts": ["a photo of a {object} with a {shape} scuff mark"],
    "details": ["a photo of a {object} with a {size} {shape} scuff mark, a {severity} grey smear"],
    "size": ["small", "large"],
    "shape": ["elongated"],
    "severity": ["faint", "strong"],
}


def fillings(entry, noun):
    """Every text that an entry can give: (template's field, text)."""
    words = [getattr(entry, name) or ("",) for name in ("size", "shape", "severity")]
    return {
        (field, fill_template(template, noun, *chosen))
        for field in ("prompts", "details")
        for template in getattr(entry, field)
        for chosen in product(*words)
    }


# -- the shipped bank -----------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", BANK.entries, ids=lambda entry: entry.defect)
def test_every_filling_of_the_shipped_bank(entry):
    for noun in ("engine", "metal nut"):
        for field, text in fillings(entry, noun):
            assert not re.search(r"[{}]|  | [,.]|^\s|\s$", text), text
            assert re.search(rf"\b{entry.word}\b", text), (field, text)
            assert text.startswith(f"a photo of {'an' if noun == 'engine' else 'a'} ") or "{" not in text
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text), text
            assert len(text.split()) <= 31, text  # one more for the second word of the noun
            assert len(TOKENIZER.encode(text)) + 2 <= 77
            if field == "prompts":
                assert anomaly_word(text, entry.defect) == entry.word == word_of(text)


def test_the_shipped_bank_keeps_to_the_vocabulary_of_a_small_model():
    shapes = ["thin", "thick", "jagged", "branching", "round", "irregular", "curved", "straight", "elongated"]
    assert {word for entry in BANK.entries for word in entry.shape} <= set(shapes)
    assert {entry.defect for entry in BANK.entries} >= {
        *("crack", "scratch", "hole", "dent", "stain", "spot", "discoloration", "contamination", "fold"),
        *("broken edge", "missing piece", "bent"),
    }
    assert not too_long(BANK, ["metal nut"])
    assert len(too_long(BANK, ["nut " * 80])) == sum(len(e.prompts) + len(e.details) for e in BANK.entries)


@pytest.mark.parametrize(
    ("template", "noun", "text"),
    [
        ("A {object} with an {shape} dent", "hourglass", "An hourglass with a round dent"),
        ("a {object}", "uniform", "a uniform"),
        ("a {object}", "unimportant part", "an unimportant part"),
        ("a {object}", "USB plug", "a USB plug"),
        ("a {object}", "Ei", "an Ei"),
        ("vitamin a {object}, banana {object}", "egg", "vitamin an egg, banana egg"),
        ("{object} a orange", "x", "x a orange"),
    ],
)
def test_articles_fit_the_word_in_the_slot(template, noun, text):
    assert fill_template(template, noun, shape="round") == text


def test_words_follow_the_numbers():
    crack = next(entry for entry in BANK.entries if entry.defect == "crack")
    draws = (0.6, 0.0, 0.0, 0.0, 0.0)  # the third prompt: size and shape

    def size(area):
        return fill(crack, "nut", area=area, severity=0.5, draws=draws).prompt.split()[7]

    assert [size(a) for a in (0.0005, 0.001, 0.01, 0.04, 0.5)] == ["tiny", "short", "medium", "long", "long"]
    texts = [fill(crack, "nut", area=0.01, severity=s, draws=(0.9, 0.4, 0, 0, 0)) for s in (0, 0.3, 0.7, 1)]
    for text, word in zip(texts, ("faint", "slight", "clear", "deep"), strict=True):
        assert f" a {word} crack" in text.prompt and f" {word} " in text.detail
        assert text.normal == "a photo of a nut" == normal_prompt("nut")


def test_a_word_that_an_entry_lacks_is_its_nearest():
    wording = Wording("x", ("{size} {severity}",), ("",), size=("large", "small"), severity=("slight",))
    assert wording.sizes == (("small",), ("small",), ("small",), ("large",))
    assert wording.severities == (("slight",),) * 4


# -- the anomaly word -----------------------------------------------------------------------------------


def test_the_word_is_found_as_whole_words():
    assert find_word("a photo of a nut with a Crack on it", "crack") == (24, 29)
    prompt = "a photo of a screw thread with a thread on it"
    assert find_word(prompt, "thread")[0] == prompt.rindex("thread")
    assert find_word("with a broken  edge", "broken edge") == (7, 19)
    for text in ("a crack-free nut", "a cracker", "nutcrack", "crack_1", ""):
        with pytest.raises(UsageError, match=r"does not hold the anomaly word 'crack'.*params\.words"):
            find_word(text, "crack")
    with pytest.raises(UsageError, match="an anomaly word"):
        find_word("a photo of a nut", "  ")


@pytest.mark.parametrize(
    ("prompt", "word"),
    [
        ("a photo of a table that is faded", "faded"),
        ("a CRACKED bottle", "cracked"),
        ("a nut with scratches", "scratches"),
        ("a tile with a broken edge and a hole", "broken edge"),  # the longest
    ],
)
def test_the_word_of_a_typed_prompt(prompt, word):
    assert word_of(prompt) == word


def test_a_prompt_without_an_anomaly_word_is_refused():
    with pytest.raises(UsageError, match="holds no anomaly word; known are crack, scratch"):
        word_of("a photo of a bottle")


# -- banks of one's own ---------------------------------------------------------------------------------


def write_bank(path: Path, *entries, **fields) -> str:
    bank = {"version": 1, "entries": list(entries), **fields}
    path.write_text(json.dumps(bank) if path.suffix == ".json" else yaml.safe_dump(bank))
    return str(path)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_bank_of_ones_own(tmp_path, suffix):
    path = write_bank(tmp_path / f"bank.{suffix}", ENTRY)
    prompts = prompts_of(PromptParams(bank=path), GeneratorSettings())
    defect, prompt, detail = prompts.words("egg_01", 0.1, 1.0, (0.0,) * 6)
    assert (defect, prompt) == ("scuff", "a photo of an egg with an elongated scuff mark")
    assert detail == "a photo of an egg with a large elongated scuff mark, a strong grey smear"
    # The recipe's params name the word; its defect alone would show only a part of it.
    assert anomaly_word(prompt, defect, prompts.params["words"]) == "scuff mark"
    assert anomaly_word(prompt, defect) == "scuff"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": []}, r"entry 1 \(scuff\): shapes: no such field; known here: defect, word"),
        ({"word": None}, r"entry 1 \(scuff\): word: .*string.*found None"),
        ({"size": ["huge"]}, r"entry 1 \(scuff\): size\[0\]: .*'tiny'.*found 'huge'"),
        ({"size": []}, r"details\[0\] .*uses \{size\}.*fill the field size"),
        ({"word": "mark scuff"}, r"prompts\[0\] .*does not hold the word 'mark scuff' \(field word\)"),
        ({"word": "object"}, "does not hold the word 'object'"),
        ({"prompts": ["a scuff mark"]}, r"prompts\[0\] 'a scuff mark' lacks \{object\}"),
        ({"prompts": []}, r"prompts: .*at least 1"),
        ({"prompts": ["a scuff mark on {object.__class__}"]}, "has braces besides"),
        ({"prompts": ["a {object} scuff mark {colour}"]}, "has braces besides"),
        ({"prompts": ["a {object}\nscuff mark"]}, "line breaks"),
        ({"details": ["the {object} is bad"]}, r"details\[0\] .*must begin with 'a photo of a \{object\}'"),
        ({"details": ["a photo of a {object} " + "so " * 30]}, "35 words, at most 30"),
        ({"word": "{shape}"}, r"word: .*pattern"),
        ({"defect": "Dirt "}, r"the defect 'Dirt' has two entries"),
    ],
)
def test_a_wrong_bank_is_refused_with_file_entry_and_field(tmp_path, change, message):
    dirt = {**ENTRY, "defect": "dirt"}
    path = write_bank(tmp_path / "mine.json", dirt, {**ENTRY, **change})
    with pytest.raises(UsageError, match=message) as caught:
        load_bank(path)
    assert all(line.startswith(f"prompt bank {path}: ") for line in str(caught.value).splitlines())


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "cannot be read as JSON"),
        ("a.yaml", "a: [", "cannot be read as YAML"),
        ("a.json", "[" * 100_000, "cannot be read as JSON"),
        ("a.json", "[]", "must be a mapping with `version: 1` and `entries`, found list"),
        ("a.json", '{"version": 2, "entries": []}', r"(?s)version: .*entries: "),
        ("a.json", '{"version": 1, "entries": [3]}', r"entry 0: .*found 3"),
        ("a.json", '{"version": 1, "entries": {"a": 1}}', r"entries: .*found"),
        ("a.json", " " * (4 * 2**20 + 1), "at most"),
    ],
)
def test_a_file_that_is_no_bank(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        load_bank(tmp_path / name)
    with pytest.raises(UsageError, match=r"does not exist: correct params\.bank"):
        load_bank(tmp_path / "none.json")


# -- what the configuration asks for --------------------------------------------------------------------


def defects(params=None, **settings):
    found = prompts_of(params or PromptParams(), GeneratorSettings(**settings))
    return [entry.defect for entry in found.entries]


def test_kinds_and_defects_restrict_the_bank():
    any_, texture = defects(), defects(PromptParams(kind="texture"))
    assert "crack" in any_ and "bent" not in any_ and "fold" not in any_
    assert "fold" in texture and "bent" not in texture and set(any_) < set(texture)
    assert "bent" in defects(PromptParams(kind="object"))
    assert defects(PromptParams(defects=("Broken_Edge", "crack"))) == ["crack", "broken edge"]
    with pytest.raises(
        UsageError, match=r"params\.defects: the prompt bank has no 'scrach'; did you mean 'scr"
    ):
        defects(PromptParams(defects=("scrach",)))


def test_a_kind_without_entries_is_an_error(tmp_path):
    path = write_bank(tmp_path / "b.json", {**ENTRY, "kinds": ["object"]})
    with pytest.raises(UsageError, match=r"params\.kind: no entry .* texture and object; set .* to object"):
        defects(PromptParams(bank=path))


def test_a_given_defect_takes_its_entry_under_the_given_name():
    found = prompts_of(PromptParams(), GeneratorSettings(defect="broken_edge", detail="{size} chip"))
    assert [entry.defect for entry in found.entries] == ["broken_edge"]
    name, prompt, detail = found.words("nut", 0.2, 1, (0.0,) * 6)
    assert detail == "large chip" and anomaly_word(prompt, name, found.params["words"]) == "broken edge"
    with pytest.raises(UsageError, match=r"has no 'corrosion'; .*a `prompt` of its own"):
        defects(defect="corrosion")


def test_a_given_prompt_replaces_those_of_the_bank():
    found = prompts_of(PromptParams(), GeneratorSettings(prompt="an old {object} with {severity} scratches"))
    name, prompt, detail = found.words("nut", 0.2, 0.9, (0.0,) * 6)
    assert (name, prompt) == ("scratch", "an old nut with deep scratches")
    assert detail.startswith("a photo of a nut with a long thin scratch")
    assert anomaly_word(prompt, name, found.params["words"]) == "scratches"

    rust = GeneratorSettings(prompt="a {size} corrosion", defect="corrosion")
    assert prompts_of(PromptParams(), rust).words("nut", 0.2, 1, (0.0,) * 6) == (
        "corrosion",
        "a large corrosion",
        "a large corrosion",
    )
    worn = GeneratorSettings(prompt="a worn-out {object}", defect="wear", detail="a {object} that is worn")
    found = prompts_of(PromptParams(words={"wear": ("worn-out",)}), worn)
    assert anomaly_word("a worn-out nut", "wear", found.params["words"]) == "worn-out"
    for wrong, message in [
        (dict(prompt="a photo of a {object}"), "no anomaly word"),
        (dict(prompt="a photo of a {object}", defect="crack"), "no anomaly word"),
        (dict(prompt="a crack in {objects}"), "prompt: .*braces besides"),
        (dict(prompt="a {shape} corrosion", defect="corrosion"), r"uses \{shape\}, but there are no words"),
        (dict(detail="a {severity} thing", defect="hole"), r"detail: .*uses \{severity\}"),
    ]:
        with pytest.raises(UsageError, match=message):
            prompts_of(PromptParams(), GeneratorSettings(**wrong))


def test_a_typed_word_that_only_an_own_bank_knows_goes_into_the_recipe(tmp_path):
    params = PromptParams(bank=write_bank(tmp_path / "b.json", ENTRY))
    for settings in (dict(), dict(defect="scuff")):
        found = prompts_of(params, GeneratorSettings(prompt="a scuffed {object}", **settings))
        name, prompt, _ = found.words("nut", 0.1, 1, (0.0,) * 6)
        assert anomaly_word(prompt, name, found.params["words"]) == "scuffed"


# -- planning -------------------------------------------------------------------------------------------


def cut(params=None, **settings):
    """Settings and traits of a mix in which ``cut`` plans with prompts."""
    own = GeneratorSettings(**settings)
    trait = Trait("none", "defect", 4, "{}", prompts_of(params or PromptParams(), own))
    return {
        "generators": {"perlin": PLAN["generators"]["perlin"], "cut": own},
        "traits": {"perlin": PLAN["traits"]["perlin"], "cut": trait},
    }


def planned(shard=0, **changes):
    return plan_shard(**{**PLAN, **changes}, round_=0, shard=shard)


def test_a_plan_is_worded_from_the_bank_and_nothing_else_of_it_changes():
    mix = cut()
    recipes = planned(**mix)
    assert recipes == planned(**mix) != planned(1, **mix)
    unworded = {**mix["traits"], "cut": replace(mix["traits"]["cut"], prompts=None)}
    same = [replace(r, defect="", prompt="", detail="") for r in recipes]
    assert same == [
        replace(r, defect="", prompt="", detail="") for r in planned(**{**mix, "traits": unworded})
    ]
    own = [r for shard in range(10) for r in planned(shard, **mix) if r.generator == "cut"]
    assert {r.defect for r in own} == set(defects())
    assert len({r.prompt for r in own}) > 60
    for recipe in own:
        assert f"a photo of a {recipe.category} " in recipe.detail
        find_word(recipe.prompt, anomaly_word(recipe.prompt, recipe.defect))
    assert all(r.prompt == r.detail == "" and r.defect == "blob" for r in recipes if r.generator == "perlin")


def test_defects_of_the_bank_are_drawn_in_their_shares():
    def words(**settings):
        return [recipe for recipe in planned(**cut(**settings)) if recipe.generator == "cut"]

    even = words()
    name = even[0].defect
    only = words(defects={name: 1e9})
    assert {recipe.defect for recipe in only} == {name} != {recipe.defect for recipe in even}
    assert [recipe.seed for recipe in only] == [recipe.seed for recipe in even]
    assert name not in {recipe.defect for recipe in words(defects={name: 0})}


def test_prompts_survive_their_file():
    prompts = prompts_of(PromptParams(nouns={"nut": "hex nut"}), GeneratorSettings())
    again = from_plain(json.loads(canonical_json(to_plain(prompts))))
    assert again == prompts and planned(**cut()) == planned(**cut())
    assert again.of("nut")[0] == "hex nut"


@given(st.text(max_size=30))
def test_a_noun_is_words_whatever_the_category(category):
    noun = noun_of(category)
    assert noun and noun == " ".join(noun.split()) and not re.search(r"[\d_{}-]", noun)
    assert fill_template("a {object} x", noun).endswith(f"{noun} x")


def test_nouns():
    assert [noun_of(n) for n in ("metal_nut", "pcb-1", "03", "")] == ["metal nut", "pcb", "object", "object"]


def test_entries_of_a_category_serve_no_other(tmp_path):
    own = {**ENTRY, "categories": ["nut"]}
    only = PromptParams(bank=write_bank(tmp_path / "a.json", own))
    mix = cut(only)
    with pytest.raises(
        UsageError, match=r"generators\.cut: no prompt is for the category 'bolt', only for nut"
    ):
        check_prompts(mix["generators"], mix["traits"], POOL)
    general = {**ENTRY, "defect": "smear", "word": "smear", "prompts": ["a {object} with a smear"]}
    mix = cut(PromptParams(bank=write_bank(tmp_path / "b.json", own, general)))
    check_prompts(mix["generators"], mix["traits"], POOL)
    made = {(r.category, r.defect) for s in range(5) for r in planned(s, **mix) if r.generator == "cut"}
    assert made == {("nut", "scuff"), ("nut", "smear"), ("bolt", "smear")}


# -- a run ----------------------------------------------------------------------------------------------


def _texts(recipe, _source, _rng):
    return texts_of(recipe)


def _invert(sources, _draws, _model):
    box = (8, 24, 8, 24)
    return [Edit(box, 1 - source.crop(box), np.ones((16, 16), bool)) for source in sources]


class WordsParams(PromptParams):
    strength: float = 1.0


GENERATOR = Generator(
    "words", "cut", "a square", draw=_texts, apply=_invert, params=WordsParams, prompts=prompts_of
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A configuration whose generator takes its prompts from ``banks/mine.json`` beside it."""
    monkeypatch.setitem(registry.BUILT_IN, "words", "tests.test_prompts:GENERATOR")
    (tmp_path / "nut").mkdir()
    for seed in range(6):
        pixels = np.full((32, 32, 3), 40 + seed, np.uint8)
        cv2.imwrite(str(tmp_path / "nut" / f"{seed}.png"), pixels)
    (tmp_path / "banks").mkdir()
    write_bank(tmp_path / "banks/mine.json", ENTRY)
    settings = {
        "source": "nut",
        "samples": 8,
        "generation": {
            "location": "anywhere",
            "area": [0.25, 0.25],
            "generators": {"words": {"params": {"bank": "banks/mine.json"}}},
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def test_a_bank_is_found_beside_the_configuration_and_checked_with_it(run):
    config = load_config(run / "config.yaml")
    assert config.generation.generators["words"].params["bank"] == str(run / "banks/mine.json")
    write_bank(run / "banks/mine.json", {**ENTRY, "size": []})
    done = flawsmith("config", "check", run / "config.yaml")
    assert done.returncode == 2
    assert re.search(r"generators\.words: prompt bank .*mine\.json: entry 0 \(scuff\): details", done.stderr)


def test_a_run_keeps_its_prompts_and_needs_the_bank_no_more(run):
    config, space = load_config(run / "config.yaml"), Workspace(str(run / "space"))
    number = rounds.begin(config, space, new_round=False)
    stored = json.loads(space.read_bytes("rounds/000/prompts.json"))
    assert stored["words"]["entries"][0]["prompts"] == ENTRY["prompts"]
    assert rounds.plan(space, number) == 8
    before = space.read_bytes("rounds/000/recipes/part-00000.parquet")
    fingerprint = rounds.open_round(space, number).fingerprint()
    assert "prompts" in json.loads(fingerprint)

    (run / "banks/mine.json").unlink()
    load_round.cache_clear()
    rounds.write_settings(space, 1, config, config.generation, first=0)  # a steered round reads the first's
    recipe = rounds.open_round(space, 1).plan(0)[0]
    assert recipe.defect == "scuff" and recipe.settings()["bank"] is None  # no path of this machine
    texts, word = texts_of(recipe)
    assert word == "scuff mark" and texts.normal == "a photo of a nut" and word in texts.prompt
    record = make_shard(Job(space.url, 0, 0, settings_hash(space, 0)))
    assert record["failed"] == 0 and record["accepted"] > 0
    assert space.read_bytes("rounds/000/recipes/part-00000.parquet") == before
    assert record["fingerprint"] == fingerprint


def test_a_changed_bank_needs_a_new_round(run, capsys):
    config, space = load_config(run / "config.yaml"), Workspace(str(run / "space"))
    rounds.begin(config, space, new_round=False)
    write_bank(run / "banks/mine.json", {**ENTRY, "defect": "smear"})
    assert rounds.begin(config, space, new_round=False) == 0
    assert {r.defect for r in rounds.open_round(space, 0).plan(0)} == {"scuff"}
    assert rounds.begin(config, space, new_round=True) == 1
    assert {r.defect for r in rounds.open_round(space, 1).plan(0)} == {"smear"}
    assert {r.defect for r in rounds.open_round(space, 0).plan(0)} == {"scuff"}


def test_damaged_prompts_are_named(run):
    config, space = load_config(run / "config.yaml"), Workspace(str(run / "space"))
    rounds.begin(config, space, new_round=False)
    for damage in (b"{", b"[]", b'{"words": {}}', b'{"words": {"entries": [3], "nouns": {}, "params": {}}}'):
        space.write_bytes("rounds/000/prompts.json", damage)
        with pytest.raises(Exception, match=r"prompts\.json is damaged"):
            rounds.open_round(space, 0)


# -- a language model -----------------------------------------------------------------------------------

KEY = "sk-secret-0123456789"


def completion(content):
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


GOOD_ANSWER = completion(json.dumps({"entries": [ENTRY, {**ENTRY, "defect": "smear"}]}))


@contextmanager
def endpoint(*answers):
    """A chat endpoint on loopback that gives the answers in turn (the last one for ever); yields its address
    and the requests it got. An answer is (status, body), or a function of the handler."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append((self.path, dict(self.headers), json.loads(body)))
            answer = answers[min(len(seen), len(answers)) - 1]
            if callable(answer):
                answer(self)
                return
            self.send_response(answer[0])
            self.send_header("Content-Length", str(len(answer[1])))
            self.end_headers()
            self.wfile.write(answer[1])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """``flawsmith prompts`` against an address; its bank goes to ``bank.json``."""
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("TEST_KEY", KEY)

    def command(url, *words):
        options = ["--endpoint", url, "--model", "some-model", "--out", tmp_path / "bank.json"]
        done = flawsmith("prompts", *(words or ["metal_nut"]), *options, "--api-key-env", "TEST_KEY")
        assert KEY not in done.stdout + done.stderr
        if done.returncode:
            assert [path.name for path in tmp_path.iterdir()] == []  # nothing written, nothing left aside
        return done

    return command


def test_a_language_model_writes_a_bank(ask, tmp_path):
    fenced = completion("Sure!\n```json\n" + json.dumps([ENTRY]) + "\n```\nDone.")
    with endpoint(GOOD_ANSWER, fenced) as (url, seen):
        done = ask(url, "metal_nut", "pill", "pill")
    assert done.returncode == 0, done.stderr
    assert "3 entries for 2 categories" in done.stdout
    path, headers, body = seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "some-model" and "metal nut" in body["messages"][0]["content"]
    assert len(seen) == 2
    text = (tmp_path / "bank.json").read_text()
    assert KEY not in text and json.loads(text)["origin"] == "some-model at 127.0.0.1"
    prompts = prompts_of(PromptParams(bank=str(tmp_path / "bank.json")), GeneratorSettings())
    assert [entry.defect for entry in prompts.of("metal_nut")[1]] == ["scuff", "smear"]
    assert [entry.defect for entry in prompts.of("pill")[1]] == ["scuff"]


def test_a_wrong_answer_is_told_to_the_model_and_asked_for_again(ask):
    with endpoint(completion(json.dumps([{**ENTRY, "word": "rip"}])), GOOD_ANSWER) as (url, seen):
        assert ask(url).returncode == 0
    roles = [message["role"] for message in seen[1][2]["messages"]]
    assert roles == ["user", "assistant", "user"]
    assert "does not hold the word 'rip'" in seen[1][2]["messages"][2]["content"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("I am sorry", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ('{"defects": []}', "is no list of entries"),
        ('{"entries": []}', "entries: .*at least 1"),
        ('["crack"]', "is no list of entries"),
        (json.dumps([{**ENTRY, "details": ["a photo of a {object} " + "zyxwvutsrq" * 12]}]), "CLIP tokens"),
        (json.dumps([{**ENTRY, "prompts": ["a {object}"]}]), r"entry 0 \(scuff\): prompts\[0\]"),
    ],
)
def test_answers_that_are_no_entries(ask, content, message):
    with endpoint(completion(content)) as (url, seen):
        done = ask(url)
    assert done.returncode == 1 and len(seen) == prompting.ATTEMPTS
    assert re.search(message, done.stderr) and "nothing was written" in done.stderr
    assert "metal_nut" in done.stderr


def redirect(handler):
    handler.send_response(302)
    handler.send_header("Location", "http://127.0.0.1:9/elsewhere")
    handler.end_headers()


def hang_up(handler):
    handler.close_connection = True
    handler.connection.close()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((500, f"boom\nfor {KEY}".encode()), r"answered 500 .*: boom for \[key\]; try again later"),
        ((401, b""), r"answered 401 .*--api-key-env"),
        ((404, b"\xff"), r"answered 404 .*usually ends in /v1"),
        ((429, b"slow down"), r"answered 429 .*wait"),
        (redirect, "answered 302 .*redirects are not followed"),
        (hang_up, "the connection broke"),
        ((200, b"<html>"), "did not answer with a chat completion"),
        ((200, b'{"choices": []}'), "did not answer with a chat completion"),
        ((200, b'{"choices": [{"message": {"content": null}}]}'), "did not answer with a chat completion"),
        ((200, b" " * (prompting.MOST_BYTES + 1)), "more than 1048576 bytes"),
    ],
)
def test_an_endpoint_that_fails(ask, answer, message):
    with endpoint(answer) as (url, seen):
        done = ask(url)
    assert done.returncode == 1 and len(seen) == 1
    assert re.search(message, done.stderr), done.stderr


def silent(handler):
    time.sleep(1.5)


def trickle(handler):
    """Bytes that come often enough for the socket, but never end."""
    handler.send_response(200)
    handler.end_headers()
    try:
        for _ in range(60):
            handler.wfile.write(b" ")
            time.sleep(0.05)
    except OSError:
        pass


@pytest.mark.parametrize("answer", [silent, trickle])
def test_an_endpoint_that_is_too_slow(answer, monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    started = time.monotonic()
    with endpoint(answer) as (url, _):
        with pytest.raises(prompting.EndpointError, match=r"no whole answer within 0\.5 s.*--timeout"):
            prompting.ask(f"{url}/chat/completions", "m", [], None, timeout=0.5)
        assert time.monotonic() - started < 1.4


def test_nobody_listens(ask):
    with endpoint(GOOD_ANSWER) as (url, _):
        pass
    done = ask(url)
    assert done.returncode == 1 and "cannot be reached" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(endpoint="localhost:8000"), "no http or https address"),
        (dict(endpoint="file:///etc/passwd"), "no http or https address"),
        (dict(endpoint="http://host:port/v1"), "no http or https address"),
        (dict(endpoint=f"http://me:{KEY}@host/v1"), "--api-key-env"),
        (dict(key_variable="NO_SUCH_KEY"), "no such variable"),
        (dict(key_variable="BAD_KEY"), "characters that no key has"),
        (dict(out="there.json"), "is there already"),
        (dict(out="bank.yaml"), "ends in .json"),
        (dict(out="no/bank.json"), "there is no folder"),
        (dict(categories=["a{b}"]), "without braces"),
        (dict(categories=["nut", " "]), "1 to 60"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_asked(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("BAD_KEY", "a\nb")
    (tmp_path / "there.json").touch()
    monkeypatch.setattr(prompting, "ask", lambda *_: pytest.fail("asked"))
    given_ = {"categories": ["nut"], "endpoint": "http://127.0.0.1:9/v1", "out": "bank.json", **arguments}
    out = tmp_path / given_.pop("out")
    with pytest.raises(UsageError, match=message) as caught:
        prompting.write_bank(given_.pop("categories"), given_.pop("endpoint"), "m", out, **given_)
    assert KEY not in str(caught.value)


def test_the_full_address_is_taken_as_it_is():
    assert prompting._address("https://h/v1/chat/completions?v=2") == "https://h/v1/chat/completions?v=2"
    assert prompting._address("https://h/v1/") == "https://h/v1/chat/completions"


def test_prompts_without_entries_for_a_category_say_so():
    wording = Wording("x", ("a {object}",), ("b",), categories=("nut",))
    with pytest.raises(UsageError, match="only for nut"):
        Prompts((wording,)).of("bolt")
