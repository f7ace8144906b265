"""Detectors and generators on the pretended device; `test_devices.py` runs this file with its plugin."""

import math

import cv2
import numpy as np
import pytest
import torch
from accelerate import Accelerator

from detectors import protocol
from generation import registry
from manifests.workspace import Workspace, part
from tests import test_generators
from tests.pretend_device import DEVICE, NAME, Elsewhere
from tests.test_fitting import LEARNING, NORMALS, SAMPLES
from training import fitting
from training.examples import extract
from workflows import rounds
from workflows.config import parse_config
from workflows.stages import Job, make_shard, settings_hash


def test_the_device_refuses_what_a_gpu_refuses():
    there, here = torch.arange(6.0).reshape(2, 3).to(NAME), torch.ones(2, 3)
    assert isinstance(there, Elsewhere) and there.device.type == NAME and there.sum().item() == 15
    assert torch.equal((there @ there.T).cpu(), torch.tensor([[5.0, 14.0], [14.0, 50.0]]))
    with pytest.raises(RuntimeError, match="same device"):
        there + here
    with pytest.raises(RuntimeError, match="same device as the indexed"):
        here[there[0].long() % 2]
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(there)
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(2, generator=torch.Generator(), device=NAME)


@pytest.mark.parametrize("name", [*LEARNING, "memory_bank"])
def test_a_detector_lives_on_its_device(name):
    method = protocol.get(name)
    settings = method.settings(**LEARNING.get(name, {"size": 64}))
    detector = method.build(settings, ["a"], NAME)
    features = extract(detector, [normal.pixels for normal in NORMALS])
    assert features.device.type == "cpu"
    detector.prepare(features, ["a"] * len(features))
    assert {tensor.device.type for tensor in detector.state_dict().values()} == {NAME}
    there = features.to(NAME)
    batch = {"features": there[:4], "category": ["a"] * 4}
    if settings.steps:
        seen = there
        if isinstance(detector, protocol.Encoder):
            seen = detector.encode(there, ["a"] * len(there)).half()
        mask = torch.zeros(2, settings.size, settings.size)
        mask[:, 5:20, 5:20] = 1
        learned = {"normal": seen[:2], "synthetic": seen[2:4], "prompt": there[4:6], "mask": mask.to(NAME)}
        detector.train()
        detector.loss({**learned, "category": ["a", "a"]})["loss"].backward()
        grown = [p.grad for group in detector.parameter_groups() for p in group["params"]]
        assert grown and all(gradient.device.type == NAME for gradient in grown)
    detector.eval()
    detector.calibrate([batch])
    assert all(isinstance(value, float) for value in detector.calibration.values())
    ignore = torch.zeros(4, settings.size, settings.size, dtype=torch.bool)
    scores, maps = detector.score({**batch, "ignore": ignore})
    assert scores.device.type == maps.device.type == NAME and maps.isfinite().all()


@pytest.mark.parametrize("name", LEARNING)
def test_training_moves_what_it_draws(name, monkeypatch):
    monkeypatch.setattr(fitting, "fast_bf16", lambda _device: False)
    monkeypatch.setattr(Accelerator, "device", DEVICE)
    settings = protocol.get(name).settings(**LEARNING[name], steps=3, batch=4, patience=9)
    losses: list[float] = []
    detector = fitting.train(
        name, settings, SAMPLES, NORMALS[:6], NORMALS[6:], seed=0, device=NAME,
        weight=lambda sample: float(sample.sample_id != "s3"),
        on_step=lambda _step, _steps, found: losses.append(found["loss"]),
    )  # fmt: skip
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert {tensor.device.type for tensor in detector.state_dict().values()} == {NAME}


def test_features_are_perturbed_where_they_are(tmp_path):
    for at, category in enumerate(("bottle", "nut")):
        (tmp_path / category).mkdir()
        for index in range(5):
            picture = test_generators.picture(72, 64, seed=index + 10 * at)
            cv2.imwrite(str(tmp_path / category / f"{index}.png"), picture)
    names = [name for name in registry.names() if registry.get(name).family == "feature"]
    generators = {name: {"params": {"size": 64}} for name in names}
    config = parse_config(
        {
            "source": [{"path": str(tmp_path / category)} for category in ("bottle", "nut")],
            "samples": 2 * len(names),
            "generation": {"generators": generators, "location": "anywhere", "area": [0.05, 0.3]},
        },
        name="test",
    )
    space = Workspace(str(tmp_path / "w"))
    rounds.begin(config, space, new_round=False)
    digest, count = settings_hash(space, 0), rounds.open_round(space, 0).shard_count
    for shard in range(count):
        make_shard(Job(space.url, 0, shard, digest))
    rows = [r for k in range(count) for r in space.read_table(part("samples", 0, k, "parquet")).to_pylist()]
    assert {row["generator"] for row in rows if row["status"] == "accepted"} == set(names)
    assert {row["device"] for row in rows} == {NAME}
