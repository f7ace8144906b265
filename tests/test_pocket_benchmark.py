"""The benchmark of the small models, on tiny random ones and drawn pictures."""

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest

from generation.cut.generator import GENERATOR
from tests.benchmarks import pocket
from tests.benchmarks.pocket_case import Part, estimate, evenly
from tests.benchmarks.pocket_models import overlap, strongest, word_for
from tests.benchmarks.pocket_samples import ROWS, Kept, made
from tests.benchmarks.pocket_usefulness import average_precision
from training.intervals import draw_counts
from training.metrics import pixel_metrics
from training.pocket.damage import damage
from training.pocket.pictures import numbered

FAST = {"steps": 4, "size": 64}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two categories, one below the other's data set, and a folder that is none."""
    root = tmp_path_factory.mktemp("data")
    (root / "textures").mkdir()
    cv2.imwrite(str(root / "textures/any.png"), np.zeros((64, 64, 3), np.uint8))
    number = 0
    for category, defect in (("one/plate", "cracked"), ("two/tile", "anomaly")):
        for kind, count in (("train/good", 8), ("test/good", 6), (f"test/{defect}", 6)):
            folder = root / category / kind
            folder.mkdir(parents=True)
            for at in range(count):
                rng, scene = numbered(5, number, ())
                number += 1
                pixels = scene.pixels
                if not kind.endswith("good"):
                    found = damage(rng, scene)
                    pixels = found.pixels
                    masks = root / category / "ground_truth" / defect
                    masks.mkdir(parents=True, exist_ok=True)
                    cv2.imwrite(str(masks / f"{at}_mask.png"), found.mask.astype(np.uint8) * 255)
                cv2.imwrite(str(folder / f"{at}.png"), (pixels[..., ::-1] * 255 + 0.5).astype(np.uint8))
    return root


@pytest.fixture(scope="module")
def command(data, tiny, tmp_path_factory):
    file = tmp_path_factory.mktemp("figures") / "pocket.json"
    given = ["--data", str(data), "--json", str(file), "--pictures", "2", "--params", json.dumps(FAST)]
    return file, [*given, "--model", str(tiny["sd15"]), "--clip", str(tiny["clip"])]


@pytest.fixture(scope="module")
def measured(command):
    """Measured in two goes: the second adds what the first left out."""
    file, given = command
    sheets = file.parent / "sheets"
    assert pocket.main([*given, "--only", "clip", "composition"]) == 0
    assert set(json.loads(file.read_text())["parts"]) == {"clip", "composition"}
    assert pocket.main([*given, "--sheets", str(sheets)]) == 0
    return json.loads(file.read_text()), sheets


def test_every_part_is_measured(measured):
    result, sheets = measured
    assert set(result["parts"]) == set(pocket.PARTS)
    summaries = {name: part["summary"] for name, part in result["parts"].items()}
    assert set(summaries["autoencoder"]["categories"]) == {"plate", "tile"}
    assert summaries["clip"]["real"]["plate: cracked"]["word"] == "crack"
    assert summaries["clip"]["real"]["tile: anomaly"]["word"] == "all words"
    assert 0 <= summaries["clip"]["real"]["plate: cracked"]["crops"]["mean"] <= 1
    assert summaries["clip"]["drawn"]["pictures"] == 2
    assert summaries["attention"]["mean"]["iou"]["mean"] >= 0
    assert summaries["acceptance"]["seconds_a_draw"] > 0
    assert list(summaries["composition"]["rows"]) == list(ROWS)
    assert list(summaries["usefulness"]["rows"]) == list(ROWS)
    assert 0 < summaries["usefulness"]["rows"]["perlin"]["pixel_ap"]["mean"] <= 1
    for category in ("plate", "tile"):
        assert cv2.imread(str(sheets / f"{category}.png")).shape[1] > 7 * 168


def test_what_is_there_is_kept_and_what_is_missing_is_measured(command, measured, monkeypatch, capsys):
    file, given = command
    asked = []

    def watched(name: str, part: Part) -> Part:
        def measure(case, unit):
            asked.append((name, unit))
            return part.measure(case, unit)

        return replace(part, measure=measure)

    monkeypatch.setattr(pocket, "PARTS", {name: watched(name, p) for name, p in pocket.PARTS.items()})
    before = json.loads(file.read_text())
    shorter = json.loads(file.read_text())
    del shorter["parts"]["autoencoder"]["units"]["tile"], shorter["parts"]["attention"]
    file.write_text(json.dumps(shorter))
    assert pocket.main([*given, "--only", "autoencoder", "clip"]) == 0
    assert asked == [("autoencoder", "tile")]
    assert "attention: missing" in capsys.readouterr().out
    again = json.loads(file.read_text())["parts"]["autoencoder"]
    assert again["summary"] == before["parts"]["autoencoder"]["summary"]
    file.write_text(json.dumps(before))


def test_figures_of_other_models_are_not_mixed(command, measured, tiny, capsys):
    _, given = command
    assert pocket.main([*given, "--clip", str(tiny["judge"])]) == 2
    assert "name another file" in " ".join(capsys.readouterr().out.split())


def test_remembered_chains_give_the_samples_of_the_generator(command):
    _, given = command
    arguments = pocket.arguments_of(given)
    case = pocket.read_case(arguments)
    round_ = case.plan("plate", 3)
    kept = Kept()
    first = made(case, round_, kept.generator(), 1)
    made(case, round_, kept.generator(composition="paste", mask="product"), 1)
    again = made(case, round_, kept.generator(), 1)
    plain = made(case, round_, GENERATOR, 1)
    for one, two, three in zip(plain, first, again, strict=True):
        assert one.status == two.status == three.status
        assert one.measures == two.measures == three.measures
        np.testing.assert_array_equal(one.pixels, two.pixels)
        np.testing.assert_array_equal(one.pixels, three.pixels)


def test_average_precision_is_that_of_the_metrics():
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 30, (3, 16, 16)).astype(np.float32)
    masks = rng.random((3, 16, 16)) < 0.1
    times = np.array([2, 0, 1])
    weights = np.broadcast_to(times[:, None, None].astype(float), scores.shape)
    chosen = np.repeat(np.arange(3), times)
    wanted = pixel_metrics(list(scores[chosen]), list(masks[chosen]))["pixel_ap"]
    assert average_precision(scores.ravel(), masks.ravel(), weights.ravel()) == pytest.approx(wanted)


def test_strongest_places_and_their_overlap():
    values = np.arange(100.0).reshape(10, 10)
    chosen = strongest(values, 0.1)
    assert chosen.sum() == 10 and chosen[-1].all()
    assert overlap(chosen, chosen) == 1 and overlap(chosen, ~chosen) == 0
    assert strongest(np.zeros((10, 10)), 0.1).sum() == 10


def test_means_leave_out_what_is_not_defined():
    found = estimate([[1.0, 0.0, None], [None], [1.0, 1.0]])
    assert found.value == 0.75
    low, high = found.interval
    assert 0.5 <= low <= 0.75 <= high <= 1
    pair = estimate([[1.0, 2.0, 3.0]]).resamples + estimate([[-1.0, -2.0, -3.0]]).resamples
    assert np.abs(pair).max() < 1e-12  # the same resamples


def test_evenly_and_words():
    assert evenly(range(10), 3) == [0, 4, 9] and evenly([1, 2], 3) == [1, 2]
    assert [word_for(name) for name in ("colour", "stain", "defective")] == ["discoloration", "stain", None]
    assert draw_counts(3, 5, 0).sum(axis=1).tolist() == [3] * 5
