"""The whole loop on small drawn pictures: learning, resuming, vetoes, and what the test split may touch."""

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from manifests.errors import PictureError, UsageError
from manifests.workspace import Workspace
from tests.small_workspace import write_judgement, write_workspace
from workflows import detecting, history, probing, rounds, steering, weighing
from workflows.config import parse_config
from workflows.demo import write_drawn
from workflows.detecting import evaluate_final
from workflows.export import export
from workflows.loop import run
from workflows.replaying import replay
from workflows.steering import explain
from workflows.stored import some_accepted
from workflows.upkeep import review, verify

SMALL = {
    "samples": 24,
    "rounds": 2,
    "output": {"shard_size": 12},
    "detector": {
        "name": "onenip",
        "settings": {"size": 96, "steps": 12, "batch": 4, "hidden": 32, "heads": 2, "depth": 1},
    },
    "evaluation": {"resamples": 20},
    "feedback": {"trials": 16},
    "cluster": {"workers": 1},
}


@pytest.fixture(scope="module", autouse=True)
def small_probes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "SIZE", 96)
        patch.setattr(probing, "SHARD", 12)
        yield


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_drawn(folder, train=12, good=8, each=4)
    shutil.rmtree(folder / "cloth")
    return folder


def tables(space: Workspace, *names: str) -> dict[str, list]:
    return {name: space.read_table(name).to_pylist() for name in names}


def loop(pictures: Path, workspace: Path, **changes) -> Workspace:
    config = parse_config({"source": str(pictures), **SMALL, **changes}, name="test", folder=workspace.parent)
    space = Workspace(str(workspace))
    run(config, space)
    return space


@pytest.fixture(scope="module")
def finished(pictures, tmp_path_factory) -> Workspace:
    return loop(pictures, tmp_path_factory.mktemp("loop") / "w")


def test_the_loop_closes(finished):
    assert finished.rounds() == [0, 1]
    first, second = (finished.read_yaml(f"rounds/00{n}/settings.yaml")["generation"] for n in (0, 1))
    decisions = finished.read_table("rounds/000/decisions.parquet").to_pylist()
    assert all(row["reason"] for row in decisions)
    changed = {row["setting"] for row in decisions if row["before"] != row["after"]}
    assert bool(changed) == (first != second) and "search" in {row["setting"] for row in decisions}
    trials = [
        row for row in finished.read_table("rounds/000/trials.parquet").to_pylist() if row["shards"] == 1
    ]
    assert [row["trial"] for row in trials] == list(range(16))
    assert [row["origin"] for row in trials[:3]] == ["current", "rule", "rule"]
    alarms = finished.read_table("rounds/000/alarms.parquet").to_pylist()
    assert {row["split"] for row in alarms} <= {"train", "calibration"}
    for number in (0, 1):
        metrics = finished.read_table(f"rounds/00{number}/metrics.parquet").to_pylist()
        assert {"feedback", "heldout_synthetic"} == {row["split"] for row in metrics}
        names = {row["metric"] for row in metrics if row["category"] == "mean" and row["split"] == "feedback"}
        assert names >= {"image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "aupro"}
        splits = {row["image_id"]: row["split"] for row in finished.read_table("images.parquet").to_pylist()}
        shown = finished.read_table(f"rounds/00{number}/heatmaps.parquet").to_pylist()
        assert {splits[row["image_id"]] for row in shown} == {row["split"] for row in shown} == {"feedback"}
        assert finished.names(f"rounds/00{number}/heatmaps") == sorted(row["file"][9:] for row in shown)
    kinds = {row["kind"] for row in finished.read_table("history.parquet").to_pylist()}
    assert kinds >= {"setting", "metric", "yield", "seconds.generate", "seconds.train", "gain", "stop"}
    assert b"<html" in finished.read_bytes("report/index.html")


def test_running_again_changes_nothing(finished, pictures):
    root = Path(finished.url)
    before = {path: path.stat().st_mtime_ns for path in root.glob("rounds/**/*") if path.is_file()}
    history = finished.read_table("history.parquet").to_pylist()
    loop(pictures, root)
    assert {path: path.stat().st_mtime_ns for path in root.glob("rounds/**/*") if path.is_file()} == before
    assert sorted(map(str, finished.read_table("history.parquet").to_pylist())) == sorted(map(str, history))


def test_labels_of_the_test_split_touch_nothing_but_the_final_figures(finished, pictures, tmp_path):
    """The masks of every test picture are replaced: everything the loop decides must stay the same."""
    altered = tmp_path / "pictures"
    shutil.copytree(pictures, altered)
    images = finished.read_table("images.parquet").to_pylist()
    touched = 0
    for row in images:
        if row["split"] == "test" and row["mask_path"]:
            mask = altered / Path(row["mask_path"]).relative_to(pictures)
            size = cv2.imread(str(mask), cv2.IMREAD_GRAYSCALE).shape
            wrong = np.zeros(size, np.uint8)
            wrong[:20, :20] = 255
            cv2.imwrite(str(mask), wrong)
            touched += 1
    assert touched > 3
    other = loop(altered, tmp_path / "w")
    for number in (0, 1):
        for file in sorted(Path(finished.url).glob(f"rounds/00{number}/shards/*.tar")):
            assert file.read_bytes() == (Path(other.url) / file.relative_to(finished.url)).read_bytes()
        names = [f"rounds/00{number}/{name}.parquet" for name in ("metrics", "scores", "found")]
        assert tables(finished, *names) == tables(other, *names)
    decisions = "rounds/000/decisions.parquet"
    assert tables(finished, decisions) == tables(other, decisions)
    weights = "rounds/001/detectors/onenip/model.safetensors"
    assert finished.read_bytes(weights) == other.read_bytes(weights)

    for space in (finished, other):
        evaluate_final(space)
    final = [
        [row for row in space.read_table("rounds/001/metrics.parquet").to_pylist() if row["split"] == "test"]
        for space in (finished, other)
    ]
    assert final[0] and final[0] != final[1]
    assert finished.read_table("looks.parquet").num_rows == 2
    shown = finished.read_table("rounds/001/heatmaps.parquet")["split"].to_pylist()
    assert {"feedback", "test"} == set(shown), "heat maps of the test split come with the final look"
    evaluate_final(finished)
    assert finished.read_table("looks.parquet").num_rows == 2, "a second look must not score again"


def test_normals_that_are_no_shots_touch_nothing(pictures, tmp_path):
    """All but two normals are replaced, by noise or by no picture at all: same samples, detector, figures."""
    generators = {"poisson": {}, "band": {}}
    changes = {"shots": 2, "seed": 5, "samples": 12, "generation": {"generators": generators}}
    first = loop(pictures, tmp_path / "w", **changes)
    images = first.read_table("images.parquet").to_pylist()
    shots = {Path(row["path"]).name for row in images if row["split"] == "train"}
    assert len(shots) == 2 and "calibration" not in {row["split"] for row in images}
    altered = tmp_path / "pictures"
    shutil.copytree(pictures, altered)
    rng = np.random.default_rng(0)
    others = [p for p in sorted((altered / "ring/train/good").glob("*.png")) if p.name not in shots]
    assert len(others) == 10
    for number, path in enumerate(others):
        if number % 2:
            path.write_bytes(b"no picture")
        else:
            cv2.imwrite(str(path), rng.integers(0, 256, (64, 64, 3), np.uint8))
    second = loop(altered, tmp_path / "other", **changes)
    for number in (0, 1):
        folder = f"rounds/00{number}"
        for name in ("shards/part-00000.tar", "detectors/onenip/model.safetensors"):
            assert first.read_bytes(f"{folder}/{name}") == second.read_bytes(f"{folder}/{name}")
        names = [f"{folder}/{name}.parquet" for name in ("metrics", "scores", "found")]
        assert str(tables(first, *names)) == str(tables(second, *names))  # as words: NaN equals NaN
        notes = [s.read_yaml(f"{folder}/detectors/onenip/config.yaml") for s in (first, second)]
        assert notes[0] == notes[1], "thresholds and calibration"
    decisions = "rounds/000/decisions.parquet"
    assert tables(first, decisions) == tables(second, decisions)
    used = {d for row in rounds.accepted_samples(first, 0) for d in (row["image_id"], *row["donors"])}
    assert used == {row["image_id"] for row in images if row["split"] == "train"}


def test_a_veto_is_honoured_by_training(finished, pictures, tmp_path):
    from workflows.detecting import samples_of

    copy = tmp_path / "w"
    shutil.copytree(finished.url, copy)
    space = Workspace(str(copy))
    ids = [sample.sample_id for sample in samples_of(space, 0)]
    review(space, ids[:2])
    assert [sample.sample_id for sample in samples_of(space, 0)] == ids[2:]
    weights = {n: space.read_bytes(f"rounds/00{n}/detectors/onenip/model.safetensors") for n in (0, 1)}
    loop(pictures, copy)
    again = {n: space.read_bytes(f"rounds/00{n}/detectors/onenip/model.safetensors") for n in (0, 1)}
    for n in (0, 1):
        assert again[n] != weights[n], "a detector that learned from a rejected sample must be trained again"
        assert space.exists(f"rounds/00{n}/found.parquet"), "and judged again"
    assert "2 samples rejected" in explain(space, 0) and "2 samples rejected" not in explain(finished, 0)
    review(space, [s.sample_id for s in samples_of(space, 1) if not detecting.held_out(s.sample_id)][:3])
    loop(pictures, copy)
    last = {n: space.read_bytes(f"rounds/00{n}/detectors/onenip/model.safetensors") for n in (0, 1)}
    assert last[0] == again[0], "round 0 knows nothing of the samples of round 1"
    assert last[1] != again[1]
    said = review(space, [], sorted(rounds.vetoes(space)))
    assert said.startswith("5 samples restored; 0 rejected in all")
    loop(pictures, copy)
    for n in (0, 1):
        restored = space.read_bytes(f"rounds/00{n}/detectors/onenip/model.safetensors")
        assert restored == weights[n], "without vetoes the detector is what it was before any"


def test_no_picture_is_scored_twice_in_an_evaluation(finished, tmp_path, monkeypatch):
    space = Workspace(str(shutil.copytree(finished.url, tmp_path / "w")))
    names = [f"rounds/001/{name}.parquet" for name in ("scores", "metrics", "alarms", "found")]

    def gain():
        return [row for row in space.read_table("history.parquet").to_pylist() if row["kind"] == "gain"]

    def start_again():
        for name in names:
            space.remove(name)
        history.forget(space, {(1, "gain")})

    start_again()  # on as many threads as below: they decide the last bits of a score
    assert detecting.evaluate(space, 1)
    detecting.compare_rounds(space, 0, 1)
    before, gained = tables(space, *names), gain()
    start_again()
    seen, real = Counter(), detecting.judge

    def judge(detector, images, *more, **settings):
        seen.update((detector, image.image_id) for image in images)
        return real(detector, images, *more, **settings)

    monkeypatch.setattr(detecting, "judge", judge)
    assert detecting.evaluate(space, 1, 0)
    assert set(seen.values()) == {1}
    assert str(tables(space, *names)) == str(before), "as words: NaN equals NaN"
    assert gain() == gained


def test_what_rests_on_a_detector_goes_with_it(tmp_path):
    """Round 0 is trained anew, then round 1: what a round has begun from stays, all else is derived again."""
    space = write_workspace(tmp_path)
    write_judgement(space)
    for number in (0, 1):
        history.remember(space, number, "gain", {"against": "0", "low": "0.1"})
        history.remember(space, number, "metric", {"feedback.aupro": "0.5"})
        space.write_bytes(f"rounds/00{number}/trials.parquet", b"")
    trained, judged = {"seconds.train"}, {"gain", "metric", "seconds.train"}

    def left(number):
        rows = space.read_table("history.parquet").to_pylist()
        names = {name for name in space.names(f"rounds/00{number}") if name.endswith(".parquet")}
        return names - {"shards.parquet", "images.parquet"}, {
            row["kind"] for row in rows if row["round"] == number
        }

    assert left(1) == ({"found.parquet", "heatmaps.parquet", "metrics.parquet", "trials.parquet"}, judged)
    detecting.remove_results(space, 0)
    assert left(0) == ({"decisions.parquet", "trials.parquet"}, trained)
    assert left(1) == ({"heatmaps.parquet", "metrics.parquet", "trials.parquet"}, {"metric", *trained})
    assert not space.names("rounds/000/heatmaps")
    detecting.remove_results(space, 1)
    assert left(1) == (set(), trained)


def test_a_run_of_fewer_rounds_than_there_are_says_no_untruth_of_them(finished, pictures, tmp_path):
    copy = tmp_path / "w"
    shutil.copytree(finished.url, copy)
    space = Workspace(str(copy))
    before = space.read_table("history.parquet").to_pylist()
    loop(pictures, copy, rounds=1)
    stops = [(row["round"], row["value"]) for row in before if row["kind"] == "stop"]
    after = space.read_table("history.parquet").to_pylist()
    assert stops == [(row["round"], row["value"]) for row in after if row["kind"] == "stop"]


def test_a_damaged_detector_is_named_and_trained_again(finished, pictures, tmp_path):
    copy = tmp_path / "w"
    shutil.copytree(finished.url, copy)
    space = Workspace(str(copy))
    name = "rounds/001/detectors/onenip/model.safetensors"
    whole = space.read_bytes(name)
    space.write_bytes(name, whole[: len(whole) // 2])
    assert any("detectors" in finding.path for finding in verify(space))
    loop(pictures, copy)
    assert space.read_bytes(name) == whole


def test_a_new_round_leaves_earlier_rounds_as_they_were(finished, pictures, tmp_path, capsys):
    """A picture is removed and the settings change: round 0 can still be replayed and repaired."""
    copy, fewer = tmp_path / "w", tmp_path / "fewer"
    shutil.copytree(finished.url, copy)
    shutil.copytree(pictures, fewer)
    removed = sorted((fewer / "ring/train/good").glob("*.png"))[0]
    removed.unlink()
    space = Workspace(str(copy))
    config = parse_config({"source": str(fewer), **SMALL}, name="test", folder=tmp_path)
    with pytest.raises(UsageError, match=r"(?s)source\.0\.path: .*--new-round"):
        rounds.begin(config, space, new_round=False)
    capsys.readouterr()
    assert rounds.begin(config, space, new_round=True) == 2
    said = " ".join(capsys.readouterr().err.split())
    changed = space.read_yaml("rounds/000/settings.yaml")["generation"]
    changed = changed != space.read_yaml("rounds/001/settings.yaml")["generation"]
    assert ("changed from round 0 to 1 (see `feedback --explain`) is not taken over" in said) == changed
    assert not steering.feedback(space, 1)
    assert "round 2 began with a configuration of its own" in explain(space, 1)
    assert rounds.begin(config, space, new_round=True) == 2, "an unfinished new round goes on"
    assert "round 2 has begun and is not judged yet: --new-round begins no other" in capsys.readouterr().err
    assert space.read_table("images.parquet").num_rows == finished.read_table("images.parquet").num_rows
    accepted = rounds.accepted_samples(space, 0)
    assert all(replay(space, row["sample_id"])["identical"] for row in accepted)


def test_a_judged_round_that_lost_a_table_is_named_and_judged_again(finished, pictures, tmp_path, capsys):
    space = Workspace(str(shutil.copytree(finished.url, tmp_path / "w")))
    lost = ["rounds/001/metrics.parquet", "rounds/001/alarms.parquet", "rounds/000/shards.parquet"]
    whole = {name: space.read_table(name).to_pylist() for name in lost}
    for name in lost:
        space.remove(name)
    assert {f.path for f in verify(space) if f.what.startswith("missing")} == set(lost)
    assert detecting.evaluate(space, 1)
    rounds.generate(space, 0, rounds.open_round(space, 0).config.cluster)
    own = {k: [row for row in space.read_table(k).to_pylist() if row.get("split") != "test"] for k in lost}
    assert own == {k: [row for row in v if row.get("split") != "test"] for k, v in whole.items()}
    assert verify(space) == []
    space.remove("images.parquet")
    assert [f.path for f in verify(space)] == ["images.parquet"]
    with pytest.raises(UsageError, match=r"images\.parquet lacks pictures"):
        export(space, "coco", tmp_path / "out")
    space.remove("rounds/000/images.parquet")
    first, *_ = verify(space)
    assert first.path == "rounds/000" and "restore that" in first.what


def test_figures_from_before_a_veto_are_marked(finished, tmp_path, capsys):
    space = Workspace(str(shutil.copytree(finished.url, tmp_path / "w")))
    assert not detecting.evaluate(space, 1) and "warning" not in capsys.readouterr().err
    accepted = [row["sample_id"] for row in rounds.accepted_samples(space, 1)]
    review(space, accepted)
    assert not detecting.evaluate(space, 1)
    said = " ".join(capsys.readouterr().err.split())
    assert "round 1: its detector and figures are from before samples were rejected or restored" in said
    with pytest.raises(UsageError, match="every accepted sample of round 1 is rejected by hand"):
        some_accepted(space, [1])


def test_the_final_look_leaves_out_a_round_whose_pictures_are_gone(finished, tmp_path):
    """Its configuration is an earlier one, perhaps: the others are scored."""
    space = Workspace(str(shutil.copytree(finished.url, tmp_path / "w")))
    for number in (0, 1):
        name = f"rounds/00{number}/metrics.parquet"
        rows = [row for row in space.read_table(name).to_pylist() if row["split"] != "test"]
        space.write_table(name, pa.Table.from_pylist(rows, schema=space.read_table(name).schema))
    rows = space.read_table("rounds/000/images.parquet").to_pylist()
    gone = [{**row, "path": row["path"] + ".gone"} if row["split"] == "test" else row for row in rows]
    images = space.read_table("rounds/000/images.parquet")
    for name in ("images.parquet", "textures.parquet"):
        space.write_table(f"rounds/001/{name}", space.read_table(f"rounds/000/{name}"))
    space.write_table("rounds/000/images.parquet", pa.Table.from_pylist(gone, schema=images.schema))
    settings = space.read_yaml("rounds/001/settings.yaml")
    space.write_yaml("rounds/001/settings.yaml", {**settings, "first": 1})
    with pytest.raises(PictureError, match=r"round 0 is not scored: .*\.gone: no such file"):
        evaluate_final(space)
    splits = [set(space.read_table(f"rounds/00{n}/metrics.parquet")["split"].to_pylist()) for n in (0, 1)]
    assert "test" not in splits[0] and "test" in splits[1]
    assert [row["round"] for row in space.read_table("looks.parquet").to_pylist()][-1] == 1


def test_textures_are_no_normals(pictures, tmp_path):
    textures = tmp_path / "textures"
    textures.mkdir()
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
        cv2.imwrite(str(textures / f"{seed}.png"), pixels)
    generators = {"perlin": {"params": {"texture": "folder"}}}
    changes = {"rounds": 1, "generation": {"generators": generators, "textures": str(textures)}}
    space = loop(pictures, tmp_path / "w", **changes)
    config = space.read_yaml("rounds/000/detectors/onenip/config.yaml")
    assert config["categories"] == ["ring"]
    donors = {d for row in rounds.accepted_samples(space, 0) for d in row["donors"]}
    assert donors == set(space.read_table("rounds/000/textures.parquet")["image_id"].to_pylist())


def test_without_labelled_anomalies_the_loop_goes_on(pictures, tmp_path):
    good = tmp_path / "parts"
    shutil.copytree(pictures / "ring" / "train" / "good", good)
    space = loop(good, tmp_path / "w")
    rows = space.read_table("rounds/000/decisions.parquet").to_pylist()
    assert any("no labelled real anomaly" in row["reason"] for row in rows)
    splits = {row["split"] for row in space.read_table("rounds/001/metrics.parquet").to_pylist()}
    assert splits == {"heldout_synthetic"}


def test_the_command_line_serves_a_finished_workspace(finished, pictures, tmp_path):
    from workflows.cli import app

    runner = CliRunner()

    def call(*words):
        result = runner.invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    assert "every shard is whole" in call("verify", finished.url)
    sample_id = next(
        row["sample_id"]
        for row in finished.read_table("rounds/001/samples/part-00000.parquet").to_pylist()
        if row["status"] == "accepted"
    )
    assert "the same bytes" in call("replay", finished.url, sample_id)
    assert "because" in call("feedback", finished.url, "--round", 0, "--explain")
    assert "report/index.html" in call("report", finished.url, "--no-pictures")
    call("show", finished.url, "--out", tmp_path / "c.png")
    assert cv2.imread(str(tmp_path / "c.png")) is not None
    call("export", finished.url, tmp_path / "out", "--format", "coco")
    picture = next(Path(finished.read_table("images.parquet")["path"][0].as_py()).parent.glob("*.png"))
    checkpoint = Path(finished.url) / "rounds/001/detectors/onenip"
    out = call("predict", checkpoint, picture, "--out", tmp_path / "found")
    assert str(picture.name) in out
    shutil.copytree(pictures / "ring", tmp_path / "hoop")
    before = {path for path in Path(finished.url).rglob("*") if path.is_file()}
    table = call("evaluate", finished.url, "--data", tmp_path / "hoop", "--category", "ring")
    assert "ring" in table and "image_auroc" in table and "hoop" not in table
    assert {path for path in Path(finished.url).rglob("*") if path.is_file()} == before


def test_learned_weights_are_stored_and_reach_the_training(finished, tmp_path, monkeypatch):
    space = Workspace(str(shutil.copytree(finished.url, tmp_path / "w")))
    round_ = rounds.open_round(space, 1)
    training = round_.config.training.model_copy(update={"weigh": True, "earlier": 0.5})
    asking = replace(round_, config=round_.config.model_copy(update={"training": training}))
    assert detecting._learned(space, round_, write=True) == {}
    monkeypatch.setattr(weighing, "learn", lambda evidence, _: np.linspace(0.5, 1.5, len(evidence.counts)))
    learned = detecting._learned(space, asking, write=True)
    for number in (0, 1):
        rows = space.read_table(f"rounds/00{number}/weights.parquet").to_pylist()
        accepted = [row["sample_id"] for row in rounds.accepted_samples(space, number)]
        assert [row["sample_id"] for row in rows] == accepted
        assert all(learned[row["sample_id"]] == row["weight"] for row in rows)
        assert np.mean([row["weight"] for row in rows]) == pytest.approx(1)
    monkeypatch.setattr(weighing, "learn", None)  # what is stored is read
    assert detecting._learned(space, asking, write=True) == learned
    sample = next(s for s in detecting.samples_of(space, 0) if not detecting.held_out(s.sample_id))
    assert detecting._weight(sample, asking, learned) == pytest.approx(0.5 * learned[sample.sample_id])
    assert detecting._weight(sample, asking, {}) == 0.5
    names = [row for row in space.read_table("history.parquet").to_pylist() if row["kind"] == "weight"]
    assert {row["round"] for row in names} == {0, 1}
    rejected = next(iter(learned))
    review(space, [rejected])
    monkeypatch.setattr(weighing, "learn", lambda evidence, _: np.full(len(evidence.counts), 2.0))
    again = detecting._learned(space, asking, write=True)
    assert set(again) == set(learned) - {rejected}
    assert {again[name] for name in again if name[:4] == rejected[:4]} == {2.0}
    assert all(again[name] == learned[name] for name in again if name[:4] != rejected[:4])
    review(space, [], [rejected])
    restored = detecting._learned(space, asking, write=True)
    assert set(restored) == set(learned) and restored[rejected] == 2.0, "it is weighed among the others again"
