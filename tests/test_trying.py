"""`flawsmith try`: one picture, one prompt, four files and a line."""

import json
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from manifests.errors import UsageError
from manifests.pictures import decode, decode_mask
from tests.test_cli import flawsmith
from workflows.console import late
from workflows.trying import Wish, normal_of, noun_in, parse_settings, read_source, recipe_of, side_by_side

PROMPT = "a photo of a steel plate with a scratch on it"
FEW = ["--set", "steps=6", "--set", "size=64"]


@pytest.fixture
def plate(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (96, 128, 3)).astype(np.uint8)
    cv2.imwrite("plate.png", cv2.GaussianBlur(noise, (0, 0), 2))
    return tmp_path / "plate.png"


def attempted(plate, tiny, *words, prompt=PROMPT):
    named = ["--model", tiny["sd15"], "--clip", tiny["clip"]]
    return flawsmith("try", plate, "--prompt", prompt, *named, *FEW, *words)


def test_one_picture_one_prompt(plate, tiny):
    done = attempted(plate, tiny)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plate-cut: scratch, area ") and done.stdout.count("\n") == 1
    folder = plate.parent / "plate-cut"
    names = {path.name for path in folder.iterdir()}
    assert names == {"anomaly.png", "mask.png", "side_by_side.png", "recipe.json"}
    before = decode(plate.read_bytes(), name="before").pixels
    after = decode((folder / "anomaly.png").read_bytes(), name="after").pixels
    mask = decode_mask((folder / "mask.png").read_bytes(), name="mask", shape=(96, 128))
    assert after.shape == before.shape and mask.any()
    assert np.array_equal(after[~mask], before[~mask])
    sheet = decode((folder / "side_by_side.png").read_bytes(), name="sheet").pixels
    assert sheet.shape == (192, 3 * 256 + 8, 3)
    note = json.loads((folder / "recipe.json").read_text())
    assert note["normal"] == "a photo of a steel plate" and note["recipe"]["prompt"] == PROMPT
    assert note["recipe"]["detail"].startswith("a photo of a steel plate with")
    first = (folder / "anomaly.png").read_bytes()
    assert attempted(plate, tiny).returncode == 0  # its own files are replaced
    assert (folder / "anomaly.png").read_bytes() == first
    assert attempted(plate, tiny, "--seed", 1, "--out", "other").returncode == 0
    assert Path("other/anomaly.png").read_bytes() != first


def test_what_a_gate_rejects_is_written_and_named(plate, tiny, monkeypatch):
    from generation.gates import Gates

    monkeypatch.setattr(
        "workflows.trying.Gates", lambda: Gates(contrast_min=1e6, strength_min=0, spread_min=0, area_low=0)
    )
    done = attempted(plate, tiny)
    assert done.returncode == 0, done.stderr
    assert "a run would reject it: contrast" in done.stdout
    assert Path("plate-cut/anomaly.png").is_file()


def test_a_mask_limits_the_place_and_a_word_may_be_ones_own(plate, tiny):
    where = np.zeros((48, 64), np.uint8)
    where[4:30, 30:60] = 7
    cv2.imwrite("where.png", where)
    prompt = "macro of brushed steel, blorps all over"
    done = attempted(plate, tiny, "--mask", "where.png", "--word", "blorps", "--count", 2, prompt=prompt)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plate-cut: blorps, ")
    mask = cv2.imread("plate-cut/mask.png", cv2.IMREAD_UNCHANGED) > 0
    allowed = np.kron(where, np.ones((2, 2))) > 0
    assert mask.any() and not (mask & ~allowed).any()
    note = json.loads(Path("plate-cut/recipe.json").read_text())
    assert note["normal"] == "macro of brushed steel" and note["recipe"]["category"] == "object"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [],
            "--prompt is missing: say what to draw, with the word for the anomaly in it, e.g. flawsmith try",
        ),
        (["--prompt", "a photo of a plate"], "--word"),
        (["--prompt", PROMPT, "--word", "dent"], "--word dent: does not stand in the prompt"),
        (["--prompt", PROMPT, "--set", "stepz=3"], "--set: stepz: no such setting; did you mean 'steps'?"),
        (["--prompt", PROMPT, "--set", "steps"], "expected NAME=VALUE"),
        (["--prompt", PROMPT, "--set", "gamma=3"], "gamma"),
        (["--prompt", PROMPT, "--mask", "black.png"], "no pixel is set"),
        (["--prompt", PROMPT, "--out", "full"], "no recipe.json of an earlier trial"),
        (["--prompt", PROMPT, "--out", "plate.png"], "is a file"),
        (["--prompt", PROMPT, "--area", "0.9"], "--area"),
    ],
)
def test_wrong_usage_is_named_with_the_remedy_before_a_model_is_loaded(plate, words, message, monkeypatch):
    monkeypatch.setattr("workflows.trying.load_model", lambda *_: pytest.fail("a model was loaded"))
    cv2.imwrite("black.png", np.zeros((8, 8), np.uint8))
    Path("full").mkdir()
    Path("full/mask.png").write_text("somebody's")
    done = flawsmith("try", plate, *words)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert Path("full/mask.png").read_text() == "somebody's"
    assert not Path("plate-cut").exists()


@pytest.mark.parametrize("foreign", ['{"my": "recipe"}', "[1]", "\udcff"])
def test_a_foreign_file_of_the_same_name_stays(plate, foreign):
    Path("full").mkdir()
    Path("full/recipe.json").write_bytes(foreign.encode(errors="surrogateescape"))
    done = flawsmith("try", plate, "--prompt", PROMPT, "--out", "full")
    assert done.returncode == 2 and "full holds recipe.json" in done.stderr
    assert Path("full/recipe.json").read_bytes() == foreign.encode(errors="surrogateescape")


def test_what_cannot_be_read_or_loaded_is_a_failure(plate):
    done = flawsmith("try", "none.png", "--prompt", PROMPT)
    assert (done.returncode, "none.png: no such file" in done.stderr) == (1, True)
    done = flawsmith("try", plate, "--prompt", PROMPT, "--model", "no-such-model")
    assert (done.returncode, "no such folder" in done.stderr) == (1, True)
    assert not Path("plate-cut").exists()


def test_the_recipe_is_a_runs_and_the_same_for_the_same_wish():
    wish = Wish(PROMPT, area=0.001, severity=0.1, seed=3, params={"steps": 9})
    recipe, normal = recipe_of(wish, "id")
    assert recipe_of(wish, "id") == (recipe, normal)
    assert (recipe.defect, recipe.category, recipe.settings()["steps"]) == ("scratch", "steel plate", 9)
    from generation.cut.prompts import texts_of

    texts, word = texts_of(recipe)
    assert (texts.normal, word) == (normal, "scratch")
    own, _ = recipe_of(Wish(PROMPT, detail="a photo of a plate with a long scratch"), "id")
    assert own.detail == "a photo of a plate with a long scratch"


def test_the_normal_prompt_is_what_stands_before_the_anomaly():
    assert normal_of("a photo of a bottle, chipped edge, with a crack", "crack") == (
        "a photo of a bottle, chipped edge"
    )
    assert normal_of("a photo of a screw thread that is bent", "bent") == "a photo of a screw thread"
    assert normal_of("cracked glass", "cracked") == "a photo of an object"
    assert (noun_in("a photo of an apple"), noun_in("an apple")) == ("apple", "object")


def test_settings_are_read_as_in_a_configuration():
    assert parse_settings(["steps=30", "clip=null", "defects=[a, b]", "model=a=b"]) == {
        "steps": 30,
        "clip": None,
        "defects": ["a", "b"],
        "model": "a=b",
    }
    with pytest.raises(UsageError, match="YAML"):
        parse_settings(["steps=[3"])


def test_deep_and_grey_pictures(tmp_path):
    deep = np.linspace(100, 4000, 64 * 64).reshape(64, 64).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    source = read_source(tmp_path / "deep.png", None)
    assert source.pixels.dtype == np.uint8 and source.pixels.shape == (64, 64, 1)
    assert (source.pixels.min(), source.pixels.max()) == (0, 255)
    sheet = side_by_side(source.pixels, source.pixels, source.pixels[:, :, 0] > 128)
    assert sheet.shape == (256, 3 * 256 + 8, 3)


def test_only_what_takes_long_is_announced(capsys):
    with late("quick", seconds=5):
        pass
    with late("slow", seconds=0.01):
        time.sleep(0.2)
    said = capsys.readouterr().err
    assert "slow" in said and "quick" not in said
