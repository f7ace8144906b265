"""Predicted memory of the chains, and batches that fit."""

import numpy as np
import pytest
import torch

from generation.cut import memory
from generation.cut.settings import CutParams
from generation.protocol import Generator
from manifests.errors import FlawsmithError
from manifests.recipes import GeneratorSettings
from workflows import room
from workflows.config import Cluster, Generation


@pytest.fixture
def settings(tiny) -> CutParams:
    return CutParams(model=str(tiny["sd15"]), clip=str(tiny["clip"]), judge=None)


def test_alive_bytes_are_counted_until_they_are_freed():
    known = torch.zeros(1000)

    def run():
        first = torch.zeros(100)  # 400 bytes
        second = first + 1  # 800
        del first
        third = second.view(10, 10) * known[:10]  # 800
        del second, third
        return torch.zeros(50)

    assert memory._peak(run, [known]) == 800


def test_need_grows_with_batch_and_size_and_with_what_guides(settings):
    def peak(side, batch, **changes):
        return memory.peak_bytes(settings.model_copy(update=changes), side, side, batch)

    one = peak(128, 1)
    assert 1.9 * one < peak(128, 2) < 2.1 * one
    assert peak(256, 1) > 3 * one
    assert peak(128, 1, refinement=0, clip=None) < one


def test_the_weights_are_those_that_are_loaded(settings, tiny_sd, tiny_clip):
    sd = tiny_sd["sd15"]
    networks = (sd.unet, sd.vae, sd.text_encoder, tiny_clip.model)
    loaded = sum(p.numel() * p.element_size() for n in networks for p in (*n.parameters(), *n.buffers()))
    assert memory.predict(settings).weights == pytest.approx(loaded, rel=0.01)


def test_the_batch_is_the_largest_power_of_two_that_fits(settings, monkeypatch):
    monkeypatch.setattr(memory, "predict", lambda _s, _d, batch: memory.Need(100, 10 * batch))
    wanted = settings.model_copy(update={"batch": 12})
    found = [memory.fitting_batch(room, wanted) for room in (1000, 219, 180, 179, 111, 0)]
    assert found == [12, 8, 8, 4, 1, 1]


def stub(fit) -> Generator:
    return Generator("cut", "cut", "", lambda *_: None, lambda *_: [], fit=fit)


def test_a_batch_that_does_not_fit_is_replaced_and_said(monkeypatch):
    monkeypatch.setattr(
        room.registry, "get", lambda _: stub(lambda p, _room, _d: ({**p, "batch": 2}, 3 * 10**9))
    )
    generation = Generation(generators={"cut": GeneratorSettings(params={"batch": 8, "steps": 9})})
    found, notes = room.fitted(generation, Cluster(workers=1))
    assert found.generators["cut"].params == {"batch": 2, "steps": 9}
    assert "3.00 GB" in notes[0] and "batch 2, because more does not fit" in notes[0]
    same, notes = room.fitted(generation, Cluster(address="tcp://elsewhere:8786"))
    assert same == generation and not notes


def test_a_model_that_is_not_at_hand_leaves_the_batch_as_it_is(monkeypatch):
    def fit(*_):
        raise FlawsmithError("no such folder")

    monkeypatch.setattr(room.registry, "get", lambda _: stub(fit))
    generation = Generation(generators={"cut": GeneratorSettings()})
    found, notes = room.fitted(generation, Cluster(workers=1))
    assert found == generation and "no such folder" in notes[0]


def test_classic_generators_need_no_prediction():
    generation = Generation()
    assert room.fitted(generation, Cluster()) == (generation, [])
    assert (
        0
        < room.available(Cluster(workers=4)) * 4
        == pytest.approx(room.available(Cluster(workers=1)), rel=0.2)
    )
    assert np.isfinite(room._free())
