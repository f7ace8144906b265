"""A detector as one file: the same scores in other runtimes, and predictions without torch."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from detectors import protocol
from detectors.onenip import OneNIPSettings
from detectors.protocol import Method, Settings
from detectors.residual import ResidualSettings
from manifests.errors import FlawsmithError, UsageError
from tests.test_training import sample, texture
from tests.tiny_checkpoints import write_clip
from training import checkpoints, graph
from training.evaluation import predict
from training.fitting import Normal, train
from workflows.cli import app
from workflows.predict import predict as predict_files
from workflows.runtimes import RuntimeFileError, alarm, export_model, open_detector

ROOT = Path(__file__).parent.parent
SETTINGS = OneNIPSettings(size=64, hidden=16, depth=1, heads=2, ffn=16, refiner=8, bank=2, steps=3, batch=4)
NOTES = {"max_side": 200, "window": [1000, 5000], "thresholds": {"a": 0.25, "b": 0.5}}
SHAPES = [(64, 64, 3), (48, 80, 3), (37, 61, 1), (131, 97, 1), (200, 160, 3), (20, 180, 3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint of two categories, and both files made of it."""
    normals = [Normal(f"n{i}", "ab"[i % 2], texture(i)) for i in range(6)]
    made = [sample(i, "ab"[i % 2]) for i in range(4)]
    detector = train("onenip", SETTINGS, made, normals[:4], normals[4:], seed=3)
    root = tmp_path_factory.mktemp("exported")
    checkpoints.save(root / "onenip", "onenip", detector, seed=3, licences=["CC0"], notes=NOTES)
    export_model(root / "onenip", root / "a.onnx", "onnx", "a")
    words = ["export-model", root / "onenip", "--format", "torch-export", "--out", root / "all.pt2"]
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert "uint8 batch×height×width×3 → score, map, anomalous" in done.output
    return root


@pytest.fixture(scope="module")
def eager(folder):
    return checkpoints.load(folder / "onenip")


def pictures() -> list[np.ndarray]:
    """Grey and colour, of many sizes; every other one has a bright spot."""
    found = []
    for number, shape in enumerate(SHAPES):
        picture = cv2.GaussianBlur(texture(number, shape), (0, 0), 1 + number).reshape(shape)
        if number % 2:
            picture[4:14, 6:20] = 255
        found.append(picture)
    return found


def colour(picture: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.broadcast_to(picture, (*picture.shape[:2], 3)))


def onnx(file: Path):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(["score", "map", "anomalous"], {"pictures": batch})


def torch_export(file: Path):
    module = torch.export.load(file).module()
    return lambda batch: [tensor.detach().numpy() for tensor in module(torch.tensor(batch))]


@pytest.mark.parametrize(
    ("file", "opened", "threshold"), [("a.onnx", onnx, 0.25), ("all.pt2", torch_export, None)]
)
def test_an_exported_file_scores_as_the_detector_it_was_made_of(folder, eager, file, opened, threshold):
    run, threshold = opened(folder / file), threshold or eager.calibration["threshold"]
    one_by_one, wanted = [], list(predict(eager, pictures()))
    for picture, (score, scores) in zip(pictures(), wanted, strict=True):
        found = run(colour(picture)[None])
        assert found[0].dtype == found[1].dtype == np.float32
        np.testing.assert_allclose(found[1][0], scores, rtol=0, atol=1e-3)
        assert found[0][0] == pytest.approx(score, abs=1e-3)
        assert found[2].tolist() == [found[0][0] > threshold]
        one_by_one.append(found[0][0])
    assert np.argsort(one_by_one).tolist() == np.argsort([score for score, _ in wanted]).tolist()
    batch = [texture(number, (90, 120, 3)) for number in range(3)]
    scores, maps, anomalous = run(np.stack(batch))
    for index, (score, map_) in enumerate(predict(eager, batch)):
        np.testing.assert_allclose(maps[index], map_, rtol=0, atol=1e-3)
        assert scores[index] == pytest.approx(score, abs=1e-3)
    assert anomalous.tolist() == (scores > threshold).tolist()


@pytest.mark.parametrize("category", ["a", None])
def test_a_bank_of_normal_patches_becomes_a_graph_too(tmp_path, category):
    """The default detector, of one category and of all that it knows; its graph takes one picture a batch."""
    normals = [Normal(f"n{i}", "ab"[i % 2], texture(i)) for i in range(8)]
    made = [sample(i, "ab"[i % 2]) for i in range(4)]
    settings = ResidualSettings(size=64, steps=3, batch=4, coreset=40, width=8)
    checkpoints.save(
        tmp_path / "it",
        "residual",
        train("residual", settings, made, normals[:6], normals[6:], seed=3),
        seed=3,
    )
    export_model(tmp_path / "it", tmp_path / "it.onnx", "onnx", category)
    run = onnx(tmp_path / "it.onnx")
    wanted = predict(
        checkpoints.load(tmp_path / "it"), pictures(), None if category is None else [category] * 6
    )
    for picture, (score, scores) in zip(pictures(), wanted, strict=True):
        found = run(colour(picture)[None])
        np.testing.assert_allclose(found[1][0], scores, rtol=0, atol=1e-3)
        assert found[0][0] == pytest.approx(score, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dfd", {"channels": 16, "noise": 0.1}),
        ("memory_bank", {"coreset": 40}),
        ("memory_bank", {"coreset": 40, "entries": "patches"}),
        ("residual", {"coreset": 40, "width": 8}),
        ("onenip", {"hidden": 16, "depth": 1, "heads": 2, "ffn": 16, "refiner": 8, "bank": 2}),
        ("vlad", {"bank": 2}),
    ],
)
def test_every_detector_becomes_a_graph(tmp_path_factory, tmp_path, name, settings):
    """Of one category, whose name some look at although it is the only one; with and without places that do
    not count, which may be left out."""
    if name == "vlad":
        settings = {**settings, "backbone": str(write_clip(tmp_path_factory.mktemp("clip")))}
    chosen = protocol.get(name).settings(
        size=64, batch=4, steps=0 if name == "memory_bank" else 2, **settings
    )
    normals = [Normal(f"n{i}", "nut", texture(i)) for i in range(6)]
    made = [sample(i, "nut") for i in range(4)]
    checkpoints.save(
        tmp_path / name, name, train(name, chosen, made, normals[:4], normals[4:], seed=3), seed=3
    )
    export_model(tmp_path / name, tmp_path / "it.onnx", "onnx", None)
    run = onnx(tmp_path / "it.onnx")
    eager, exported = open_detector(tmp_path / name), open_detector(tmp_path / "it.onnx")
    free = []
    for picture, (score, map_) in zip(pictures(), eager.score(pictures(), "nut", None), strict=True):
        found = run(colour(picture)[None])
        np.testing.assert_allclose(found[1][0], map_, rtol=0, atol=1e-3)
        assert found[0][0] == pytest.approx(score, abs=1e-3)
        free.append(score)
    places: list[np.ndarray | None] = [map_ > np.quantile(map_, 0.5), None] * 3
    both = (one.score(pictures(), "nut", places) for one in (eager, exported))
    lower = []
    for (score, map_), (other, found_map), before in zip(*both, free, strict=True):
        np.testing.assert_allclose(found_map, map_, rtol=0, atol=1e-3)
        assert other == pytest.approx(score, abs=1e-3)
        lower.append(score < before)
    assert any(lower[::2]) and not any(lower[1::2])


def test_one_file_holds_all_facts(folder, eager):
    metadata = onnxruntime.InferenceSession(folder / "a.onnx").get_modelmeta().custom_metadata_map
    from_onnx = {
        k.removeprefix("flawsmith."): json.loads(v) for k, v in metadata.items() if "flawsmith." in k
    }
    extra = {graph.EXTRA_FILE: ""}
    torch.export.load(folder / "all.pt2", extra_files=extra)
    from_pt2 = json.loads(extra[graph.EXTRA_FILE])
    config = checkpoints.read_config(folder / "onenip")
    assert (from_onnx["category"], from_onnx["threshold"]) == ("a", 0.25)
    assert (from_pt2["category"], from_pt2["threshold"]) == (None, eager.calibration["threshold"])
    for facts in (from_onnx, from_pt2):
        assert {name: facts[name] for name in config} == config
        assert facts["input"]["shape"] == ["batch", "height", "width", 3]
        assert facts["exported_with"]["torch"] == torch.__version__.partition("+")[0]
    assert not list(folder.glob(".*"))  # nothing half-written is left


class Toy(nn.Module):
    """Brightness of one channel, which the category names: a detector of another shape and with a list."""

    def __init__(self, settings, categories, device):
        super().__init__()
        self.settings, self.categories, self.fingerprint = settings, tuple(categories), "toy"
        self.calibration = {}
        self.weight = nn.Parameter(torch.tensor([2.0]))

    def extract(self, images):
        return torch.stack([images.float(), 255 - images.float()], dim=1) / 255

    @torch.inference_mode()
    def score(self, batch):
        if "category" not in batch:
            raise UsageError("toy needs the category of every picture")
        channel = torch.tensor([self.categories.index(name) for name in batch["category"]])
        maps = batch["features"][:, 0].float()[torch.arange(len(channel)), channel] * self.weight
        return maps.amax(dim=(1, 2)), maps


TOY = Method("toy", "for the tests", Settings, {}, Toy)


def test_any_detector_of_the_protocol_even_one_that_asks_for_a_category(tmp_path, monkeypatch):
    monkeypatch.setitem(protocol.BUILT_IN, "toy", f"{__name__}:TOY")
    toy = Toy(Settings(size=32), ["red", "green"], "cpu")
    toy.calibration = {"threshold": 1.0}
    checkpoints.save(tmp_path / "toy", "toy", toy, seed=0)
    with pytest.raises(UsageError, match="--category"):
        export_model(tmp_path / "toy", tmp_path / "toy.onnx", "onnx", None)
    facts = export_model(tmp_path / "toy", tmp_path / "toy.onnx", "onnx", "green")
    assert facts["input"]["shape"][0] == 1
    picture = np.zeros((50, 40, 3), np.uint8)
    picture[:, :, 1] = 204
    exported = open_detector(tmp_path / "toy.onnx")
    scores = [score for score, _ in exported.score([picture, picture // 2], "green", None)]
    assert scores == pytest.approx([1.6, 0.8], abs=1e-3)
    with pytest.raises(UsageError, match="pictures of green only"):
        list(exported.score([picture], "red", None))


def test_a_category_that_was_not_trained_on_has_a_file_too_if_the_detector_speaks_of_such(
    tmp_path_factory, tmp_path
):
    clip = str(write_clip(tmp_path_factory.mktemp("clip")))
    chosen = protocol.get("vlad").settings(size=64, batch=4, steps=2, backbone=clip, memory=False)
    normals = [Normal(f"n{i}", "nut", texture(i)) for i in range(6)]
    made = [sample(i, "nut") for i in range(4)]
    detector = train("vlad", chosen, made, normals[:4], normals[4:], seed=3)
    checkpoints.save(tmp_path / "it", "vlad", detector, seed=3, notes={"thresholds": {"nut": -1.0}})
    facts = export_model(tmp_path / "it", tmp_path / "it.onnx", "onnx", "bolt")
    assert facts["category"] == facts["input"]["category"] == "bolt"
    eager, exported = open_detector(tmp_path / "it"), open_detector(tmp_path / "it.onnx")
    overall = detector.calibration["threshold"]
    assert alarm(exported.facts, "bolt") == alarm(exported.facts, None) == ("bolt", overall)
    wanted, nuts = ([score for score, _ in eager.score(pictures(), name, None)] for name in ("bolt", "nut"))
    found = [score for score, _ in exported.score(pictures(), "bolt", None)]
    assert found == pytest.approx(wanted, abs=1e-3) and found != pytest.approx(nuts, abs=1e-3)


class Together(Settings):
    @property
    def leak(self) -> str:
        return "range: all compares the pictures with each other (range: none does not)"


def test_scores_that_depend_on_the_other_pictures_are_refused_where_a_picture_stands_alone(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(protocol.BUILT_IN, "toy", f"{__name__}:TOY")
    monkeypatch.setattr(f"{__name__}.TOY", Method("toy", "for the tests", Together, {}, Toy))
    toy = Toy(Together(size=32), ["red"], "cpu")
    toy.calibration = {"threshold": 1.0}
    checkpoints.save(tmp_path / "toy", "toy", toy, seed=0)
    (tmp_path / "it.png").write_bytes(cv2.imencode(".png", texture(0))[1].tobytes())
    words = ["predict", tmp_path / "toy", tmp_path / "it.png", "--out", tmp_path / "out"]
    for command in (words, ["export-model", tmp_path / "toy", "--out", tmp_path / "toy.onnx"]):
        found = CliRunner().invoke(app, [str(word) for word in command]).exception
        assert isinstance(found, UsageError) and "range: all" in str(found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.png", "toy"]


WITHOUT_TORCH = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ImportError("torch is not here")
sys.meta_path.insert(0, Blocked())
from workflows.cli import main
main()
"""


def test_predict_runs_an_exported_file_without_torch_and_finds_the_same(folder, tmp_path):
    source = tmp_path / "new"
    source.mkdir()
    for number, picture in enumerate(pictures()):
        cv2.imwrite(str(source / f"{number}.png"), picture[:, :, ::-1])
    cv2.imwrite(str(source / "deep.png"), (texture(7, (70, 90)).astype(np.uint16) * 15 + 1000))
    cv2.imwrite(str(source / "large.png"), texture(8, (500, 300, 3)))  # above max_side
    (source / "damaged.png").write_bytes((source / "0.png").read_bytes()[:60])
    words = [
        "predict",
        str(folder / "a.onnx"),
        str(source),
        "--category",
        "b",
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 3, done.stderr
    assert "damaged.png: " in done.stdout
    rows = predict_files(folder / "onenip", [source], tmp_path / "eager", category="b")
    with open(tmp_path / "out" / "scores.csv", encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["path"] for row in found] == [row["path"] for row in rows]
    for row, wanted in zip(found, rows, strict=True):
        if Path(row["path"]).name == "damaged.png":
            assert row["error"] == wanted["error"] != ""
            continue
        assert float(row["score"]) == pytest.approx(wanted["score"], abs=1e-3)
        assert float(row["threshold"]) == wanted["threshold"] == 0.5
        np.testing.assert_allclose(np.load(row["map"]), np.load(wanted["map"]), rtol=0, atol=1e-3)
        drawn = [cv2.imread(path).astype(int) for path in (row["heat_map"], wanted["heat_map"])]
        assert np.mean(np.abs(drawn[0] - drawn[1]) > 2) < 0.01


def test_whose_threshold_decides():
    facts = {
        "categories": ["a", "b"],
        "calibration": {"threshold": 0.9},
        "notes": {"thresholds": {"a": 0.1, "b": 0.2}},
    }
    assert alarm(facts, None) == (None, 0.9) and alarm(facts, "b") == ("b", 0.2)
    exported = facts | {"category": "a", "threshold": 0.1}
    assert alarm(exported, None) == ("a", 0.1) and alarm(exported, "b") == ("b", 0.2)
    with pytest.raises(UsageError, match="trained on a, b"):
        alarm(facts, "new")
    assert alarm(facts | {"open_categories": True}, "new") == ("new", 0.9)


def test_what_is_no_detector_is_refused(folder, tmp_path):
    from onnx import TensorProto, helper, save

    whole = (folder / "a.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(whole[: len(whole) // 2])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    other = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "other", [x], [y])
    save(
        helper.make_model(other, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "other.onnx",
    )
    for name, message in (("cut", "is damaged"), ("other", "no detector"), ("gone", "export-model")):
        with pytest.raises(RuntimeFileError, match=rf"{name}\.onnx.*{message}"):
            open_detector(tmp_path / f"{name}.onnx")
    with pytest.raises(UsageError, match="can run code"):
        open_detector(folder / "all.pt2")


def test_wrong_wishes_name_the_remedy(folder, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="choose one of onnx, torch-export"):
        export_model(folder / "onenip", tmp_path / "x.onnx", "openvino", None)
    with pytest.raises(UsageError, match=r"x\.pt.*\*\.onnx"):
        export_model(folder / "onenip", tmp_path / "x.pt", "onnx", None)
    with pytest.raises(UsageError, match="--category nut: the detector was trained on a, b"):
        export_model(folder / "onenip", tmp_path / "x.onnx", "onnx", "nut")
    monkeypatch.setattr(graph, "_version", lambda name: None if name == "onnxscript" else "1")
    with pytest.raises(UsageError, match=r"onnxscript: pip install 'flawsmith\[export\]'"):
        export_model(folder / "onenip", tmp_path / "x.onnx", "onnx", None)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"onnxruntime: pip install 'flawsmith\[export\]'"):
        open_detector(folder / "a.onnx")
    monkeypatch.undo()
    monkeypatch.setattr(graph, "MAX_ONNX_BYTES", 1000)
    with pytest.raises(FlawsmithError, match="torch-export"):
        export_model(folder / "onenip", tmp_path / "x.onnx", "onnx", None)
    assert not list(tmp_path.iterdir())
