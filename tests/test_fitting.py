"""The loop: several processes, micro-batches, resume after a kill, mixes, patience, features on disk."""

import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from detectors import protocol
from detectors.onenip import OneNIPSettings
from detectors.residual import Residual, ResidualSettings
from manifests.errors import UsageError
from manifests.workspace import Workspace
from tests.plain_detector import NAME, PLACE, Plain, PlainSettings
from tests.test_training import sample, texture
from training import examples as examples_module
from training import fitting, resuming
from training.examples import Normal, Rows, collect, draw, passes
from training.fitting import train
from training.resuming import Slot
from workflows import detecting, rounds
from workflows.cli import app
from workflows.config import parse_config
from workflows.demo import write_drawn
from workflows.stages import read_settings

ROOT = Path(__file__).parent.parent
NORMALS = [Normal(f"n{i}", "a", texture(i)) for i in range(8)]
SAMPLES = [sample(i) for i in range(10)]


@pytest.fixture(autouse=True)
def _plain(monkeypatch):
    monkeypatch.setitem(protocol.BUILT_IN, NAME, PLACE)


def plain(samples=SAMPLES, seed=0, weight=None, slot=None, say=lambda _line: None, on_step=None, **changes):
    wanted = PlainSettings(**changes)
    options = {"seed": seed, "weight": weight, "slot": slot, "say": say, "on_step": on_step}
    return train(NAME, wanted, samples, NORMALS[:6], NORMALS[6:], **options)


def equal(one, other) -> bool:
    return all(torch.equal(tensor, other.state_dict()[key]) for key, tensor in one.state_dict().items())


def close(one: dict, other: dict, atol: float) -> None:
    for key, tensor in one.items():
        torch.testing.assert_close(tensor, other[key], rtol=0, atol=atol, msg=key)


# -- steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_micro_batches_change_nothing_but_rounding(accumulate):
    """Also where the batch cannot be divided evenly (4 in 3 parts)."""
    whole, parts = plain(), plain(accumulate=accumulate)
    close(whole.state_dict(), parts.state_dict(), 1e-6)
    assert not equal(whole, plain(batch=2)), "but what is learned depends on the batch"


def test_a_batch_too_small_to_be_shared_is_an_error():
    with pytest.raises(UsageError, match=r"batch: 4 .* set batch to 5"):
        plain(accumulate=5)


def test_groups_keep_their_own_rates():
    start, still = plain(steps=0).state_dict(), plain(slow=0.0, weight_decay=0.0001).state_dict()
    assert torch.equal(start["head.bias"], still["head.bias"])
    assert not torch.equal(start["head.weight"], still["head.weight"])


LEARNING = {  # the detectors that learn by steps, small
    "residual": {"size": 64, "coreset": 40, "width": 8},
    "onenip": {"size": 64, "hidden": 16, "heads": 2, "ffn": 16, "refiner": 8, "bank": 2},
    "dfd": {"size": 64, "channels": 16, "width": 16},
    "vlad": {},
}


def test_every_detector_that_learns_is_named_here():
    stepless = {n for n in protocol.names() if not protocol.get(n).settings().steps}
    assert set(LEARNING) == set(protocol.names()) - stepless - {NAME}


@pytest.mark.parametrize("name", LEARNING)
@pytest.mark.parametrize("bf16", [True, False])
def test_detectors_learn_with_and_without_bfloat16(name, bf16, monkeypatch):
    """Whatever this machine would choose: an operator that works in one may refuse the other's types."""
    monkeypatch.setattr(fitting, "fast_bf16", lambda _device: bf16)
    AcceleratorState._reset_state(reset_partial_state=True)
    losses: list[float] = []
    try:
        wanted = protocol.get(name).settings(**LEARNING[name], steps=3, batch=4, patience=9)
        detector = train(
            name, wanted, SAMPLES, NORMALS[:6], NORMALS[6:], seed=0,
            weight=lambda s: float(s.sample_id != "s3"),
            on_step=lambda _step, _steps, found: losses.append(found["loss"]),
        )  # fmt: skip
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    kinds = {tensor.dtype for tensor in detector.state_dict().values() if tensor.is_floating_point()}
    assert torch.bfloat16 not in kinds, "weights stay as they are"


def test_without_steps_no_sample_is_read():
    def unread():
        pytest.fail("a sample was read")
        yield

    detector = plain(samples=unread(), steps=0)
    assert detector.prepared == 6
    assert set(detector.calibration) == {"threshold"}


def test_losses_are_reported_and_the_loaders_share_is_said():
    losses, lines = [], []
    plain(on_step=lambda step, steps, found: losses.append((step, steps, found["loss"])), say=lines.append)
    assert [step for step, _, _ in losses] == list(range(1, 13)) and losses[-1][2] < losses[0][2]
    assert re.fullmatch(r"12 steps, [\d.]+ samples/s, loader [\d.]+% of step time", lines[-1])


@pytest.mark.parametrize("memory", [0.1, 0.0])
def test_what_a_loss_sees_is_worked_out_once_a_picture(monkeypatch, memory):
    """Of a prepared detector, by the category of each picture, kept in memory or on disk: the weights are
    those of a detector whose features are that already. Pictures of b are brighter than those of a."""
    monkeypatch.setattr(examples_module, "MEMORY_SHARE", memory)
    normals = [Normal(f"n{i}", "ab"[i % 2], texture(i) // 2 + 100 * (i % 2)) for i in range(8)]
    samples = []
    for i in (3, 0, 4, 1, 6, 5):
        made = sample(i, "ab"[i % 2], normal=False)
        samples.append(replace(made, image=np.where(made.mask[..., None], 255, normals[i].pixels)))
    extract, asked = Plain.extract, 0
    pictures = {"samples": samples, "normals": normals, "calibration": normals[:2]}
    learn = partial(train, NAME, settings=PlainSettings(), **pictures, seed=0)

    def doubled(self, images):
        found = extract(self, images)
        bright = (found.amin(dim=(1, 2, 3)) > 0.35)[:, None, None, None]
        return torch.where(bright, 2 * found, found)

    def encode(self, features, categories):
        nonlocal asked
        assert self.prepared == 8
        asked += len(features)
        factors = torch.tensor([2.0 if name == "b" else 1.0 for name in categories])
        return factors[:, None, None, None] * features

    with monkeypatch.context() as patched:
        patched.setattr(Plain, "extract", doubled)
        wanted = learn()
    monkeypatch.setattr(Plain, "encode", encode, raising=False)
    assert equal(learn(), wanted)
    every = 2 + 8 + 6 + 2  # for their shape, normals, samples, and normals that no sample was made from
    assert asked == every
    asked = 0
    learn(settings=PlainSettings(steps=1, batch=2))
    assert asked <= 2 + 2 * 2 < every, "no more than what is drawn"


def test_a_training_that_diverges_stops_and_says_so():
    with pytest.raises(UsageError, match=r"the loss is (nan|inf) at step \d+: lower detector\.settings\.lr"):
        plain(lr=1e30, weight_decay=0.0, steps=40)


# -- patience -------------------------------------------------------------------------------------------


def test_patience_stops_and_keeps_the_best_weights(monkeypatch):
    evaluate, found = fitting.held_out_loss, []

    def held_out_loss(detector, *rest):
        found.append((evaluate(detector, *rest), detector.head.weight.detach().clone()))
        return found[-1][0]

    monkeypatch.setattr(fitting, "held_out_loss", held_out_loss)
    lines: list[str] = []
    held = {"s3", "s7"}
    wild = {"steps": 40, "lr": 3.0, "weight": lambda s: float(s.sample_id not in held)}
    kept = plain(**wild, patience=3, say=lines.append)
    losses = [loss for loss, _ in found]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3 < 20, "every other step, until three in a row were no better"
    assert lines[-1].startswith(f"{2 * len(losses)} steps") and "stopped by patience: 3" in lines[-1]
    assert torch.equal(kept.head.weight, found[best][1])
    made = collect(kept, [SAMPLES[3], SAMPLES[7]], NORMALS[:6])
    batch = {"synthetic": made.synthetic[:2], "mask": made.masks[:2].float()}
    assert kept.loss(batch)["loss"].item() == pytest.approx(losses[best], rel=1e-4)


def test_held_out_samples_are_never_drawn_and_none_is_an_error():
    held = lambda s: float(s.sample_id != "s3")  # noqa: E731
    made = collect(plain(steps=0), SAMPLES, NORMALS[:6], weight=held)
    rows = [row for rows, _ in islice(examples_module.order(made, PlainSettings(), 0), 40) for row in rows]
    assert 3 not in rows and len(set(rows)) == len(made.source) - 1
    with pytest.raises(UsageError, match="patience: no synthetic sample is held out"):
        plain(patience=1)


# -- the order and the mix ------------------------------------------------------------------------------


@given(
    st.lists(st.floats(0, 9).filter(lambda w: w == 0 or w > 1e-3), min_size=1, max_size=12),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_mix_is_drawn_in_proportion_to_its_weights(weights, seed):
    """In any window of passes a sample comes as often as its weight says, but for one."""
    values = np.array(weights)
    if not values.any():
        return
    turns = [turn.tolist() for turn in islice(passes(values, np.random.default_rng(0), seed), 30)]
    for window in (turns, turns[7:19]):
        seen = Counter(row for turn in window for row in turn)
        for row, weight in enumerate(weights):
            assert abs(seen[row] - len(window) * weight / max(weights)) <= 1
    assert all(len(set(turn)) == len(turn) for turn in turns)


def test_equal_weights_are_whole_epochs_and_the_ranks_share_every_step():
    made = collect(plain(steps=0), SAMPLES, NORMALS[:6])
    wanted = PlainSettings(steps=10, batch=5, accumulate=2)
    place = {tuple(row.flatten().tolist()): index for index, row in enumerate(made.synthetic)}

    def rows(steps) -> list[list[int]]:
        return [
            [place[tuple(row.flatten().tolist())] for part in step for row in part["synthetic"]]
            for step in steps
        ]

    whole = rows(draw(made, wanted, 0))
    count = len(made.source)
    flat = [row for step in whole for row in step]
    assert len(flat) == 50 and all(flat.count(row) in (50 // count, 50 // count + 1) for row in range(count))
    halves = [rows(draw(made, wanted, 0, rank, 2)) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(step) for step in whole]
    assert rows(draw(made, wanted, 0, start=7)) == whole[7:]


# -- features on disk -----------------------------------------------------------------------------------


def test_rows_past_the_limit_lie_in_a_file_without_a_name(tmp_path):
    blocks = [torch.rand(n, 2, 3).half() for n in (3, 1, 4, 2)]
    for limit in (0, 40, 1e9):
        rows = Rows(limit, str(tmp_path))
        for block in blocks:
            rows.append(block)
        assert torch.equal(rows.tensor(), torch.cat(blocks))
        assert not list(tmp_path.iterdir())


def test_features_on_disk_give_the_same_weights(monkeypatch):
    in_memory = plain()
    opened, open_file = [], examples_module.tempfile.TemporaryFile
    monkeypatch.setattr(examples_module, "MEMORY_SHARE", 0.0)
    monkeypatch.setattr(
        examples_module.tempfile, "TemporaryFile", lambda **where: opened.append(where) or open_file(**where)
    )
    assert equal(in_memory, plain())
    assert len(opened) == 3, "normals, samples and masks"


# -- going on -------------------------------------------------------------------------------------------


@pytest.fixture
def states(monkeypatch) -> tuple[Slot, list[bytes]]:
    """A slot that keeps every state written, one a step, and gives the last."""
    monkeypatch.setattr(resuming, "EVERY", 0.0)
    monkeypatch.setattr(resuming, "TIME_SHARE", 1e9)
    kept: list[bytes] = []
    return Slot(lambda: kept[-1] if kept else None, kept.append), kept


WATCHED = {"noise": 0.3, "patience": 20, "steps": 40, "weight": lambda s: float(s.sample_id != "s3")}


def test_a_training_goes_on_as_if_it_had_not_been_broken_off(states):
    slot, kept = states
    losses: list[tuple[int, float]] = []
    keep = lambda step, _steps, found: losses.append((step, found["loss"]))  # noqa: E731
    whole = plain(**WATCHED, slot=slot, on_step=keep)
    assert len(kept) == 40
    for step in (1, 17, 40):
        again: list[tuple[int, float]] = []
        lines: list[str] = []
        slot = Slot(lambda state=kept[step - 1]: state, lambda _data: None)
        note = lambda step, _steps, found, again=again: again.append((step, found["loss"]))  # noqa: E731
        assert equal(whole, plain(**WATCHED, slot=slot, on_step=note, say=lines.append))
        assert again == losses[step:]
        assert lines[0] == f"going on after step {step} of a broken-off training"


def test_a_damaged_or_foreign_state_is_said_and_ignored(states):
    slot, kept = states
    whole = plain(slot=slot)
    for place in (0, 40, len(kept[5]) - 1):
        lines: list[str] = []
        spoilt = bytearray(kept[5])
        spoilt[place] ^= 1
        assert equal(whole, plain(slot=Slot(lambda s=bytes(spoilt): s, lambda _: None), say=lines.append))
        assert lines[0] == "the state of a broken-off training is damaged: beginning again"
    cut = Slot(lambda: kept[5][:100], lambda _: None)
    assert equal(whole, plain(slot=cut))
    for changes in (
        {"seed": 1},
        {"lr": 0.01},
        {"samples": SAMPLES[:9]},
        {"weight": lambda s: 2.0 + (s is SAMPLES[0])},
    ):
        lines = []
        assert equal(
            plain(**changes), plain(**changes, slot=Slot(lambda: kept[5], lambda _: None), say=lines.append)
        )
        assert "belongs to other settings, samples or versions" in lines[0]


def test_states_take_a_small_share_of_the_time(states, monkeypatch):
    slot, kept = states
    monkeypatch.setattr(resuming, "TIME_SHARE", 1e-6)
    plain(slot=slot)
    assert len(kept) == 1, "what took t seconds is not done again before t/share"


# -- several processes ----------------------------------------------------------------------------------


def onenip_without_noise(rank: int, ranks: int) -> dict:
    """Trains on this rank's share of the samples; no noise and no batch norm decides a weight, because what a
    micro-batch holds, and so its statistics, depends on the number of processes."""
    seen: list[list[int]] = []
    plain_gather = examples_module.gather

    def gather(made, rows, prompts):
        seen.append(list(rows))
        return plain_gather(made, rows, prompts)

    examples_module.gather = gather
    precise, fitting.fast_bf16 = fitting.fast_bf16, lambda _device: False
    AcceleratorState._reset_state(reset_partial_state=True)
    losses: list[float] = []
    try:
        wanted = OneNIPSettings(
            size=64, hidden=16, heads=2, ffn=16, refiner=8, bank=2, steps=5, batch=6,
            jitter=0, dice_weight=0, bce_weight=0,
        )  # fmt: skip
        detector = train(
            "onenip", wanted, islice(SAMPLES, rank, None, ranks), NORMALS[:6], NORMALS[6:], seed=0,
            on_step=lambda _step, _steps, found: losses.append(found["recon"]),
        )  # fmt: skip
    finally:
        examples_module.gather, fitting.fast_bf16 = plain_gather, precise
        AcceleratorState._reset_state(reset_partial_state=True)
    weights = {key: tensor.clone() for key, tensor in detector.state_dict().items()}
    return {"weights": weights, "rows": seen, "losses": losses, "calibration": detector.calibration}


def residual_broken_off(rank: int, ranks: int) -> dict:
    """Trains with held-out samples, and once more from the state after five of eight steps, which only the
    first process finds."""
    resuming.EVERY, resuming.TIME_SHARE = 0.0, 1e9
    kept: list[bytes] = []
    encode, forward = Residual.encode, Residual.forward
    encoded, blank = [0], [False]

    def counted(self, features, categories):
        encoded[0] += len(features)
        return encode(self, features, categories)

    def watched(self, batch):
        blank[0] |= bool((batch["synthetic"].flatten(1) == 0).all(dim=1).any())
        return forward(self, batch)

    Residual.encode, Residual.forward = counted, watched

    def run(slot: Slot, lines: list[str]) -> dict:
        wanted = ResidualSettings(size=64, steps=8, batch=4, coreset=40, width=8, patience=20)
        detector = train(
            "residual", wanted, islice(SAMPLES, rank, None, ranks), NORMALS[:6], NORMALS[6:], seed=0,
            slot=slot, weight=lambda s: float(s.sample_id != "s3"), say=lines.append,
        )  # fmt: skip
        return {"weights": detector.state_dict(), "calibration": detector.calibration, "lines": lines}

    whole = run(Slot(lambda: None, kept.append), [])
    encoded[0] = 0
    again = run(Slot(lambda: kept[4] if kept else None, lambda _data: None), [])
    return {"whole": whole, "again": again, "states": len(kept), "blank": blank[0], "encoded": encoded[0]}


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def in_two_processes(work: str, out: Path) -> list[dict]:
    """What a function of this module returns in either."""
    port = free_port()
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ranks", work, str(out)],
            cwd=ROOT,
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
                "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                "ACCELERATE_USE_CPU": "true",
            },
        )
        for rank in (0, 1)
    ]  # fmt: skip
    assert [process.wait(300) for process in running] == [0, 0]
    return [torch.load(f"{out}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_two_processes_go_on_as_if_they_had_not_been_broken_off(tmp_path):
    """With the statistics of batch norms and the held-out loss, which each process sees a part of; each
    prepares what it will see, and no more."""
    first, second = in_two_processes("residual_broken_off", tmp_path / "out")
    assert (first["states"], second["states"]) == (8, 0), "the first process alone writes"
    assert not first["blank"] and not second["blank"]
    for found in (first, second):  # two of four samples in each of three steps, one held out, their normals
        assert found["encoded"] <= 2 * (3 * 2 + 1) + 2  # and one of either to see the shape
    assert "going on after step 5" in first["again"]["lines"][0]
    for found in (first["again"], second["whole"], second["again"]):
        assert found["calibration"] == first["whole"]["calibration"]
        for key, tensor in first["whole"]["weights"].items():
            assert torch.equal(tensor, found["weights"][key]), key


def test_two_processes_learn_what_one_learns(tmp_path):
    first, second = in_two_processes("onenip_without_noise", tmp_path / "out")
    for key, tensor in first["weights"].items():
        assert torch.equal(tensor, second["weights"][key]), f"{key} differs between the processes"
    assert first["calibration"] == second["calibration"]
    assert len(first["rows"]) == len(second["rows"]) == 5
    turns = [
        row
        for halves in zip(first["rows"], second["rows"], strict=True)
        for pair in zip(*halves, strict=True)
        for row in pair
    ]
    for epoch in (turns[:10], turns[10:20], turns[20:]):  # ten samples, and no normal without one
        assert sorted(epoch) == list(range(10)), "every sample once before any comes again"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as there: how many compute the features decides their last bits
    alone = onenip_without_noise(0, 1)
    torch.set_num_threads(threads)
    learned = {key: value for key, value in alone["weights"].items() if not key.startswith("refiner.")}
    close({key: value.float() for key, value in learned.items()},
          {key: value.float() for key, value in first["weights"].items()}, 2e-4)  # fmt: skip


# -- in a workspace -------------------------------------------------------------------------------------

SMALL = {
    "samples": 40,
    "rounds": 2,
    "output": {"shard_size": 20},
    "training": {"earlier": 0.5, "generators": {"scar": 3, "band": 0}},
    "detector": {
        "name": "onenip",
        "settings": {"size": 64, "steps": 20, "batch": 4, "hidden": 16, "heads": 2, "ffn": 16, "refiner": 8},
    },
    "evaluation": {"quantile": 0.5},
    "cluster": {"workers": 1},
}


@pytest.fixture(scope="module")
def generated(tmp_path_factory) -> Workspace:
    """Two rounds with samples, none with a detector."""
    root = tmp_path_factory.mktemp("generated")
    write_drawn(root / "pictures", train=12, good=4, each=1)
    shutil.rmtree(root / "pictures/cloth")
    config = parse_config({"source": str(root / "pictures"), **SMALL}, name="test", folder=root)
    space = Workspace(str(root / "w"))
    with space.writing():
        rounds.begin(config, space, new_round=False)
        _, generation, first = read_settings(space, 0)
        rounds.write_settings(space, 1, config, generation, first=first)
        for number in (0, 1):
            rounds.generate(space, number, config.cluster)
    return space


def copy(space: Workspace, to: Path) -> Workspace:
    shutil.copytree(space.url, to)
    return Workspace(str(to))


WEIGHTS = "rounds/001/detectors/onenip/model.safetensors"
KILLED = """
import sys, time
from training import resuming
resuming.EVERY, resuming.TIME_SHARE = 0.0, 1e9
pack, packed = resuming.pack, []
def slow(state, identity):
    packed.append(state.step)
    if len(packed) == 8:
        print("in the middle", flush=True)
        time.sleep(600)
    return pack(state, identity)
resuming.pack = slow
from workflows.cli import app
app(["train", sys.argv[1]])
"""


def test_a_killed_training_goes_on_to_the_same_bytes(generated, tmp_path):
    undisturbed, space = copy(generated, tmp_path / "a"), copy(generated, tmp_path / "b")
    detecting.train(undisturbed, 1)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, space.url], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in the middle\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert space.exists("rounds/001/training.state") and not space.exists(WEIGHTS)
    done = CliRunner().invoke(app, ["train", space.url])
    assert done.exit_code == 0
    assert space.read_bytes(WEIGHTS) == undisturbed.read_bytes(WEIGHTS)
    assert not space.exists("rounds/001/training.state")
    assert not detecting.train(space, 1), "it is there now"


def test_a_runs_quantile_decides_for_pictures_of_no_known_category_too(generated, tmp_path):
    """There is one category, so both thresholds are of the same pictures."""
    space = copy(generated, tmp_path / "a")
    detecting.train(space, 0)
    facts = space.read_yaml("rounds/000/detectors/onenip/config.yaml")
    assert facts["calibration"]["threshold"] == facts["notes"]["thresholds"]["ring"]


def test_the_mix_is_that_of_the_configuration(generated, monkeypatch):
    """Earlier rounds and generators by their weights, no held-out sample, none of a left-out generator."""
    found = {}

    def fit(_name, _settings, samples, *_rest, weight, **_options):
        found.update({s.sample_id: (s.recipe["round"], s.recipe["generator"], weight(s)) for s in samples})
        raise InterruptedError

    monkeypatch.setattr(detecting, "fit_detector", fit)
    with pytest.raises(InterruptedError):
        detecting.train(generated, 1)
    rows = [row for number in (0, 1) for row in rounds.accepted_samples(generated, number)]
    wanted = {
        row["sample_id"]: (
            row["round"], row["generator"],
            (0.5 if row["round"] == 0 else 1.0) * (3.0 if row["generator"] == "scar" else 1.0),
        )
        for row in rows
        if row["generator"] != "band" and not detecting.held_out(row["sample_id"])
    }  # fmt: skip
    assert found == wanted and {number for number, _, _ in found.values()} == {0, 1}


def test_a_cut_shard_of_either_round_is_named(generated, tmp_path):
    space = copy(generated, tmp_path / "w")
    shard = Path(space.url) / "rounds/000/shards/part-00001.tar"
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    done = CliRunner().invoke(app, ["train", space.url])
    assert re.search(r"rounds/000/shards/part-00001\.tar", str(done.exception)) and done.exit_code != 0


def test_unknown_generators_in_the_mix_are_named():
    with pytest.raises(UsageError, match=r"training\.generators: .*scarr"):
        parse_config({"source": "x", "training": {"generators": {"scarr": 1}}}, name="test")


def test_accelerate_launch_trains_a_workspace(generated, tmp_path):
    """As a user types it: two processes, one lock, one writer, one voice."""
    space = copy(generated, tmp_path / "w")
    command = [
        "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port(),
        "-m", "workflows.cli", "train", f"file://{space.url}", "--round", "0",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(re.findall(r"20 steps, ", done.stderr)) == 1
    detecting.load_detector(space, 0)
    assert not space.exists("rounds/000/training.state")
