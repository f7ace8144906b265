"""From shards to a detector on disk and its figures: reading, fitting, checkpoints, evaluation."""

import io
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from detectors.onenip import OneNIPSettings, build
from detectors.protocol import counted
from manifests.errors import UsageError
from manifests.pictures import encode, encode_mask, sha256, small_mask
from manifests.schema import METRICS, SCORES, Image, to_table
from manifests.shards import ShardError, pack, sample_json
from training import checkpoints
from training.checkpoints import CheckpointError
from training.evaluation import Judged, at_size, figures, ignored, judge, predict, score_rows, truth
from training.examples import Normal, collect, draw
from training.fitting import learning_rate, train
from training.loading import FeatureSample, Sample, ShardFile, read_all_samples, read_samples
from workflows import detecting
from workflows.detecting import _alarming, alarm_thresholds, calibration_normals

SETTINGS = OneNIPSettings(size=64, hidden=16, depth=1, heads=2, ffn=16, refiner=8, bank=2, steps=3, batch=4)


def texture(seed: int, shape=(48, 48, 3)) -> np.ndarray:
    return np.random.default_rng(seed).integers(60, 190, shape, dtype=np.uint8)


def sample(number: int, category: str = "a", normal: bool = True) -> Sample:
    source = texture(number)
    image, mask = source.copy(), np.zeros(source.shape[:2], bool)
    image[8:20, 10:22] = 255
    mask[8:20, 10:22] = True
    recipe = {"category": category, "image_id": f"n{number}"}
    return Sample(f"s{number}", image, mask, source if normal else None, recipe, {"contrast": 9.0})


def members(s: Sample, format: str = "webp") -> dict[str, bytes]:
    found = {f"image.{format}": encode(s.image, format), "mask.png": encode_mask(s.mask)}
    if s.normal is not None:
        found[f"normal.{format}"] = encode(s.normal, format)
    return found | {"json": sample_json(s.recipe, s.scores, {})}


def write_shard(path, samples) -> ShardFile:
    path.write_bytes(pack([(s.sample_id, members(s)) for s in samples]).data)
    return ShardFile(str(path), len(samples))


# -- reading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["webp", "png"])
def test_what_is_written_is_read(tmp_path, format):
    written = [sample(1), sample(2, normal=False)]
    path = tmp_path / "part-00000.tar"
    path.write_bytes(pack([(s.sample_id, members(s, format)) for s in written]).data)
    read = list(read_samples([ShardFile(str(path), 2)]))
    for found, wanted in zip(read, written, strict=True):
        assert (found.sample_id, found.category, found.image_id) == (
            wanted.sample_id,
            wanted.category,
            wanted.image_id,
        )
        np.testing.assert_array_equal(found.image, wanted.image)
        np.testing.assert_array_equal(found.mask, wanted.mask)
    np.testing.assert_array_equal(read[0].normal, written[0].normal)
    assert read[1].normal is None
    assert read[0].scores == {"contrast": 9.0}


def test_sixteen_bit_pictures_become_eight_bit(tmp_path):
    s = sample(1)
    wide = {key: data for key, data in members(s).items() if key in ("mask.png", "json")}
    wide["image.png"] = encode(s.image.astype(np.uint16) * 257, "png")
    path = tmp_path / "a.tar"
    path.write_bytes(pack([("s", wide)]).data)
    np.testing.assert_array_equal(next(read_samples([ShardFile(str(path), 1)])).image, s.image)


def test_vetoed_and_feature_samples_are_counted_and_left_out(tmp_path):
    sink = io.BytesIO()
    np.save(sink, np.zeros((4, 3, 3), np.float16))
    feature = {"feature.npy": sink.getvalue(), "mask.png": encode_mask(np.ones((3, 3), bool)), "json": b"{}"}
    rows = [("s1", members(sample(1))), ("s2", members(sample(2))), ("s3", feature)]
    path = tmp_path / "a.tar"
    path.write_bytes(pack(rows).data)
    read = read_samples([ShardFile(str(path), 3)], excluded={"s2"})
    assert [s.sample_id for s in read] == ["s1"]


# -- features -----------------------------------------------------------------------------------------


def feature_shard(path, feature, mask, backbone: str, number: int = 1) -> ShardFile:
    sink = io.BytesIO()
    np.save(sink, feature)
    s = sample(number)
    recipe = {**s.recipe, "generator": "feature-noise"}
    inside = {
        "feature.npy": sink.getvalue(),
        "mask.png": encode_mask(mask),
        "json": sample_json(recipe, s.scores, {"backbone": backbone}),
    }
    path.write_bytes(pack([("s1", members(s)), ("s2", inside)]).data)
    return ShardFile(str(path), 2)


def test_a_detector_learns_from_features_of_its_own_frozen_part(tmp_path):
    detector = build(SETTINGS, ["a"])
    feature = np.random.default_rng(0).normal(size=(detector.mean.shape[0], 4, 4)).astype(np.float16)
    mask = np.zeros((4, 4), bool)
    mask[1, 2] = True
    shard = feature_shard(tmp_path / "a.tar", feature, mask, detector.fingerprint)
    picture, features = read_all_samples([shard])
    assert picture.sample_id == "s1" and isinstance(features, FeatureSample)
    examples = collect(detector, [picture, features], [Normal("n1", "a", texture(1))])
    np.testing.assert_array_equal(examples.synthetic[1].numpy(), feature)
    np.testing.assert_array_equal(examples.masks[1].numpy(), np.kron(mask, np.ones((16, 16), bool)))
    assert [s.sample_id for s in read_samples([shard])] == ["s1"]


@pytest.mark.parametrize(
    ("shape", "backbone", "words"),
    [
        ((192, 4, 4), "another:blocks:0123", "another:blocks:0123.*the same backbone"),
        ((192, 7, 7), None, r"\(192, 7, 7\).*params.size"),
    ],
)
def test_features_that_are_not_the_detectors_are_refused(tmp_path, shape, backbone, words):
    detector = build(SETTINGS, ["a"])
    feature, mask = np.zeros(shape, np.float16), np.ones(shape[1:], bool)
    shard = feature_shard(tmp_path / "a.tar", feature, mask, backbone or detector.fingerprint)
    with pytest.raises(UsageError, match=f"s2.*{words}.*training.generators.feature-noise: 0"):
        collect(detector, read_all_samples([shard]), [Normal("n1", "a", texture(1))])


@pytest.mark.parametrize("feature", [np.zeros((4, 3), np.float16), np.full((4, 3, 3), np.nan, np.float16)])
def test_damaged_features_are_named(tmp_path, feature):
    shard = feature_shard(tmp_path / "a.tar", feature, np.ones((3, 3), bool), "x")
    with pytest.raises(ShardError, match=r"s2\.feature\.npy is no finite float16"):
        list(read_all_samples([shard]))


def test_a_damaged_header_that_webdataset_overlooks_is_named(tmp_path):
    shard = write_shard(tmp_path / "part-00007.tar", [sample(i) for i in range(4)])
    packed = pack([(f"s{i}", members(sample(i))) for i in range(4)])
    data = bytearray(packed.data)
    data[packed.offsets[2] + 150] ^= 0xFF  # the third sample's checksum
    (tmp_path / "part-00007.tar").write_bytes(data)
    with pytest.raises(ShardError, match=r"part-00007\.tar: 2 samples .* 4"):
        list(read_samples([shard]))


@pytest.mark.parametrize("lost", ["mask.png", "json", "image.webp"])
def test_a_sample_without_a_member_is_named(tmp_path, lost):
    kept = {key: data for key, data in members(sample(1)).items() if key != lost}
    path = tmp_path / "a.tar"
    path.write_bytes(pack([("s0", members(sample(0))), ("s1", kept)]).data)
    with pytest.raises(ShardError, match=rf"a\.tar: sample s1 has no \.?{lost.split('.')[0]}"):
        list(read_samples([ShardFile(str(path), 2)]))


def test_cut_and_missing_shards_are_named(tmp_path):
    shard = write_shard(tmp_path / "a.tar", [sample(i) for i in range(3)])
    data = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(data[: len(data) // 2])
    with pytest.raises(ShardError, match=r"a\.tar"):
        list(read_samples([shard]))
    with pytest.raises(ShardError, match=r"b\.tar is missing"):
        list(read_samples([ShardFile(str(tmp_path / "b.tar"), 1)]))


def test_no_pickle_is_opened_and_no_command_is_run(tmp_path):
    """Members of unknown names are not decoded; "pipe:" addresses, which webdataset would run, are files."""

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    path = tmp_path / "a.tar"
    path.write_bytes(pack([("s1", members(sample(1)) | {"pyd": pickle.dumps(Bomb())})]).data)
    assert len(list(read_samples([ShardFile(str(path), 1)]))) == 1
    with pytest.raises(ShardError):
        list(read_samples([ShardFile(f"pipe:touch {tmp_path / 'exploded'}", 1)]))
    assert not (tmp_path / "exploded").exists()


def test_a_mask_never_vanishes_when_it_shrinks():
    mask = np.zeros((500, 500), bool)
    mask[101, 101:300] = True
    assert small_mask(mask, 50).any()
    assert not small_mask(np.zeros((500, 500), bool), 50).any()


# -- fitting --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def normals():
    return [Normal(f"n{i}", "a", texture(i)) for i in range(6)]


@pytest.fixture(scope="module")
def trained(normals):
    return train("onenip", SETTINGS, [sample(i) for i in range(4)], normals[:4], normals[4:], seed=3)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(normals, trained):
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    again = train("onenip", SETTINGS, [sample(i) for i in range(4)], normals[:4], normals[4:], seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    for key, tensor in trained.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    assert again.calibration == trained.calibration
    other = train("onenip", SETTINGS, [sample(i) for i in range(4)], normals[:4], normals[4:], seed=4)
    assert any(not torch.equal(t, other.state_dict()[k]) for k, t in trained.state_dict().items())


def test_every_normal_is_rebuilt_and_sources_are_found(normals, trained):
    made = [sample(1), sample(2, normal=False), sample(9)]
    examples = collect(trained, made, normals)
    assert examples.pure == 6
    assert len(examples.synthetic) == 3 + 4  # normals 0, 3, 4 and 5 have no sample
    assert not examples.masks[3:].any()
    assert examples.source[1] == 2  # not in its shard: the train split's picture
    np.testing.assert_array_equal(examples.synthetic[3:], examples.normals[[0, 3, 4, 5]])
    with pytest.raises(UsageError, match="s17"):
        collect(trained, [sample(17, normal=False)], normals)


def test_a_normal_of_a_shard_that_is_the_train_splits_is_looked_at_once(normals, trained, monkeypatch):
    """Another picture under its name is looked at itself."""
    seen = []
    extract = trained.extract
    monkeypatch.setattr(trained, "extract", lambda images: (seen.extend(images), extract(images))[1])
    same, other = sample(1), replace(sample(2), normal=texture(77))
    examples = collect(trained, [same, other], normals)
    assert len(seen) == len(normals) + 2 + 1
    assert examples.source[:2] == (1, len(normals))
    assert len(examples.normals) == len(normals) + 1


def test_batches_are_fair_and_prompts_share_the_category(trained):
    normals = [Normal(f"n{i}", "ab"[i % 2], texture(i)) for i in range(6)]
    examples = collect(trained, [sample(i, "ab"[i % 2]) for i in range(6)], normals)
    settings = SETTINGS.model_copy(update={"steps": 6, "batch": 3})
    drawn = [batch for (batch,) in draw(examples, settings, seed=0)]
    seen = [tuple(row.flatten()[:8].tolist()) for batch in drawn for row in batch["synthetic"]]
    assert {seen.count(row) for row in seen} == {3}
    own = {name: examples.normals[[i for i in range(6) if "ab"[i % 2] == name]] for name in "ab"}
    for batch in drawn:
        for prompt, name in zip(batch["prompt"], batch["category"], strict=True):
            assert any(torch.equal(prompt, normal) for normal in own[name])
    halves = [list(draw(examples, settings, 0, rank, 2)) for rank in (0, 1)]
    assert sum(len(part[0][0]["mask"]) for part in halves) == 3


def test_nothing_to_train_on_is_an_error(normals):
    with pytest.raises(UsageError, match="no accepted samples"):
        train("onenip", SETTINGS, [], normals, normals, seed=0)
    with pytest.raises(UsageError, match="good parts"):
        train("onenip", SETTINGS, [sample(1)], [], normals, seed=0)


def test_the_rate_warms_up_and_falls_to_nothing():
    rates = [learning_rate(step, 200) for step in range(200)]
    assert max(rates) == rates[10] == 1
    assert 0 < rates[0] < rates[5]
    assert 0 < rates[-1] < 1e-3


# -- checkpoints ----------------------------------------------------------------------------------------


def test_a_checkpoint_scores_as_the_detector_did(tmp_path, trained):
    checkpoints.save(tmp_path / "onenip", "onenip", trained, seed=3, licences=["CC0", "CC0"])
    assert sorted(p.name for p in (tmp_path / "onenip").iterdir()) == ["config.yaml", "model.safetensors"]
    loaded = checkpoints.load(tmp_path / "onenip")
    pictures = [texture(7), texture(8, (30, 60, 1))]
    for (score, scores), (wanted, wanted_map) in zip(
        predict(loaded, pictures), predict(trained, pictures), strict=True
    ):
        assert score == wanted
        np.testing.assert_array_equal(scores, wanted_map)
    config = checkpoints.read_config(tmp_path / "onenip")
    assert config["licences"] == ["CC0"]
    assert (config["seed"], config["categories"], config["backbone"]) == (3, ["a"], trained.fingerprint)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize(
    "make", [lambda p: torch.save(Bomb(), p), lambda p: p.write_bytes(pickle.dumps(Bomb()))]
)
def test_a_pickle_under_the_name_of_safetensors_is_refused(tmp_path, trained, make):
    checkpoints.save(tmp_path, "onenip", trained, seed=3)
    make(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="pickle"):
        checkpoints.load(tmp_path)


def test_a_header_whose_length_begins_as_a_pickle_does_is_no_pickle(tmp_path, trained):
    from safetensors.torch import load_file, save_file

    checkpoints.save(tmp_path, "onenip", trained, seed=3)
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    config = tmp_path / "config.yaml"  # of a checkpoint from before its sha256 was kept
    lines = config.read_text().splitlines(True)
    config.write_text("".join(line for line in lines if not line.startswith("weights:")))
    for length in range(0, 256, 8):  # the header grows with its notes, by eight bytes at a time
        save_file(tensors, weights, metadata={"note": "x" * length})
        if weights.read_bytes().startswith(b"\x80"):
            break
    else:
        pytest.fail("no header of such a length was made")
    assert checkpoints.load(tmp_path).calibration == trained.calibration


def test_a_single_changed_byte_of_the_weights_is_seen(tmp_path, trained):
    checkpoints.save(tmp_path, "onenip", trained, seed=3)
    weights = tmp_path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged \(its sha256.*train again"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "pytorch_model.bin", "model.pkl"])
def test_a_pickle_by_name_is_refused(tmp_path, name):
    torch.save({}, tmp_path / name)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(CheckpointError, match="pickle"):
            checkpoints.load(path)


def test_yaml_cannot_run_code(tmp_path, trained):
    checkpoints.save(tmp_path, "onenip", trained, seed=3)
    (tmp_path / "config.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(CheckpointError, match="YAML"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("backbone", "other:x:0", "trained on backbone other"),
        ("settings", {"hiden": 3}, "do not fit this version"),
        ("categories", ["a", "b"], "does not fit its config"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, trained, field, value, message):
    import yaml

    checkpoints.save(tmp_path, "onenip", trained, seed=3)
    config = checkpoints.read_config(tmp_path) | {field: value}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(tmp_path)


def test_a_cut_file_and_an_empty_folder_are_named(tmp_path, trained):
    with pytest.raises(CheckpointError, match="is missing"):
        checkpoints.load(tmp_path)
    checkpoints.save(tmp_path, "onenip", trained, seed=3)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoints.load(tmp_path)


# -- evaluation -----------------------------------------------------------------------------------------


def row(tmp_path, number: int, defect: str = "good", **changes) -> Image:
    """A picture on disk; a defect is a white square, with a mask."""
    pixels, mask = texture(number, (80, 120, 1)), np.zeros((80, 120), np.uint8)
    if defect != "good":
        mask[20:50, 30:60] = 255
        pixels[mask > 0] = 255
    path, mask_path = tmp_path / f"{number}.png", tmp_path / f"{number}_mask.png"
    cv2.imwrite(str(path), pixels)
    cv2.imwrite(str(mask_path), mask)
    image = Image(
        image_id=f"i{number}",
        path=str(path),
        sha256=sha256(path.read_bytes()),
        category="a",
        defect=defect,
        mask_path=None if defect == "good" else str(mask_path),
        width=120,
        height=80,
        mode="L",
        bits=8,
        group=f"g{number}",
        split="feedback",
    )
    return replace(image, **changes)


def test_judged_pictures_become_rows_of_the_tables(tmp_path, trained):
    images = [row(tmp_path, i, "good" if i < 4 else "hole" if i < 7 else "stain") for i in range(10)]
    judged = judge(trained, images)
    assert [entry.anomalous for entry in judged] == [False] * 4 + [True] * 6
    rows = figures(judged, round_=1, detector="onenip", split="feedback", training_seed=3, resamples=20)
    table = to_table(rows, METRICS).to_pylist()
    found = {(r["category"], r["defect"], r["size"]) for r in table}
    assert found == {
        ("a", "all", "all"),
        ("a", "hole", "all"),
        ("a", "stain", "all"),
        ("a", "all", "large"),
        ("mean", "all", "all"),
        ("mean", "all", "large"),
    }
    whole = {r["metric"]: r for r in table if (r["category"], r["defect"], r["size"]) == ("a", "all", "all")}
    assert set(whole) == {
        "image_auroc", "image_ap", "image_f1max", "pixel_auroc", "pixel_ap", "pixel_f1max", "aupro",
    }  # fmt: skip
    assert all(r["low"] <= r["value"] + 0.01 and r["value"] <= r["high"] + 0.01 for r in whole.values())
    scores = score_rows(judged, round_=1, detector="onenip", split="feedback", training_seed=3)
    assert to_table(scores, SCORES)["label"].to_pylist() == [0] * 4 + [1] * 6


def test_alarms_are_counted_at_the_threshold(tmp_path):
    """4 good pictures, of which 1 raises an alarm; 3 holes, of which 2 do; 2 stains, of which none does."""
    defects = ["good"] * 4 + ["hole"] * 3 + ["stain"] * 2
    scores = [0.1, 0.2, 0.5, 0.9, 0.8, 0.7, 0.3, 0.1, 0.2]
    images = [row(tmp_path, i, defect) for i, defect in enumerate(defects)]
    judged = [replace(perfect(i, truth(i, 64)), score=s) for i, s in zip(images, scores, strict=True)]
    rows = figures(
        judged, round_=0, detector="d", split="feedback", training_seed=0, resamples=9, thresholds={"a": 0.5}
    )
    found = {
        (r["category"], r["defect"], r["metric"]): r["value"]
        for r in rows
        if r["metric"] in ("image_fpr", "image_recall")
    }
    assert found == {
        ("a", "all", "image_fpr"): 0.25, ("mean", "all", "image_fpr"): 0.25,
        ("a", "all", "image_recall"): pytest.approx(2 / 5),
        ("mean", "all", "image_recall"): pytest.approx(2 / 5),
        ("a", "hole", "image_recall"): pytest.approx(2 / 3), ("a", "stain", "image_recall"): 0,
    }  # fmt: skip
    none = next(r for r in rows if (r["defect"], r["metric"]) == ("stain", "image_recall"))
    assert none["low"] is None  # none of two is no proof that none ever will


def test_good_pictures_alone_tell_of_false_alarms(tmp_path):
    judged = [replace(perfect(i, truth(i, 64)), score=s) for s, i in enumerate([row(tmp_path, 0)])]
    (one, mean) = figures(
        judged, round_=0, detector="d", split="feedback", training_seed=0, thresholds={"a": -1.0}
    )
    assert (one["category"], one["metric"], one["value"]) == ("a", "image_fpr", 1.0)
    assert mean["category"] == "mean"


def perfect(image: Image, mask, ignore=None, wrong=None) -> Judged:
    scores = mask.astype(np.float32) if mask is not None else np.zeros((64, 64), np.float32)
    if wrong is not None:
        scores[wrong] = 2
    return Judged(image, float(scores.max()), scores, mask, ignore)


def test_ignored_places_do_not_count(tmp_path):
    roi = np.zeros((80, 120), np.uint8)
    roi[:, 30:] = 255
    cv2.imwrite(str(tmp_path / "roi.png"), roi)
    images = [
        row(tmp_path, i, defect, roi_path=str(tmp_path / "roi.png"))
        for i, defect in enumerate(["good", "good", "hole", "hole"])
    ]
    wrong = (slice(None), slice(0, 10))  # false alarms outside the region of interest
    judged = [perfect(i, truth(i, 64), ignored(i, 64), wrong) for i in images]
    values = {
        r["metric"]: r["value"]
        for r in figures(judged, round_=0, detector="d", split="test", training_seed=0, resamples=5)
        if (r["category"], r["size"], r["defect"]) == ("mean", "all", "all")
    }
    assert values["pixel_ap"] == values["aupro"] == 1


def brightness(size=64):
    """Its map is the picture's brightness, its score the largest counted value."""

    def score(batch):
        maps = batch["features"].float().mean(dim=1) / 255
        return counted(maps, batch).amax(dim=(1, 2)), maps

    return SimpleNamespace(
        settings=SimpleNamespace(size=size, leak=None), extract=lambda x: x.float(), score=score
    )


@pytest.mark.parametrize("tiles", [None, 0.25])
def test_ignored_places_do_not_count_in_held_out_samples(tmp_path, monkeypatch, tiles):
    roi = np.zeros((48, 48), np.uint8)
    roi[:, :24] = 255
    cv2.imwrite(str(tmp_path / "roi.png"), roi)
    image = replace(row(tmp_path, 0, roi_path=str(tmp_path / "roi.png")), width=48, height=48)
    one = sample(0)
    one.image[:, 40:] = 255  # brighter than the defect, outside the region
    one.image[8:20, 10:22] = 200
    one = replace(one, sample_id="000-00000-00000", recipe={**one.recipe, "generator": "scar"})
    monkeypatch.setattr(detecting, "samples_of", lambda *_: iter([one]))
    config = SimpleNamespace(detector=SimpleNamespace(tiles=tiles))
    round_ = SimpleNamespace(config=config, number=0, images={one.image_id: image})
    (judged,) = detecting._judge_samples(None, round_, brightness(32))
    assert judged.score < 0.9, "1 with what lies outside"
    assert judged.ignore is not None and judged.ignore.shape == judged.map.shape == judged.mask.shape
    assert judged.ignore[:, -1].all() and not judged.ignore[:, 0].any()


@pytest.mark.parametrize("size", [1, 4, 10, 128])
def test_every_tenth_sample_is_kept_from_training_however_small_the_shards(size):
    shards = -(-1000 // size)
    kept = [detecting.held_out(f"000-{s:05d}-{k:05d}") for s in range(shards) for k in range(size)]
    assert sum(kept) / len(kept) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("tiles", [None, 0.25])
def test_a_picture_gets_no_score_from_ignored_places(tmp_path, tiles):
    roi, ignore = np.zeros((80, 120), np.uint8), np.zeros((80, 120), np.uint8)
    roi[:, 30:] = 255
    ignore[:40] = 255
    places = {"roi_path": roi, "ignore_path": ignore}
    for name, mask in places.items():
        cv2.imwrite(str(tmp_path / f"{name}.png"), mask)
    paths = {name: str(tmp_path / f"{name}.png") for name in places}
    images = [row(tmp_path, 0), row(tmp_path, 1)]
    for image, spot in zip(images, ((60, 5), (60, 100)), strict=True):  # outside the region, inside it
        pixels = np.full((80, 120), 50, np.uint8)
        pixels[spot[0] - 4 : spot[0] + 4, spot[1] - 4 : spot[1] + 4] = 250
        pixels[2:12, 50:60] = 255  # in the ignore mask
        cv2.imwrite(image.path, pixels)
    images = [replace(i, sha256=sha256(Path(i.path).read_bytes()), **paths) for i in images]
    low, high = (entry.score for entry in judge(brightness(), images, tiles=tiles))
    assert low == pytest.approx(50 / 255, abs=0.01) and high == pytest.approx(250 / 255, abs=0.01)
    plain = [replace(image, roi_path=None, ignore_path=None) for image in images]
    assert min(entry.score for entry in judge(brightness(), plain, tiles=tiles)) > 0.99
    assert judge(brightness(), [plain[0], images[0]], tiles=tiles)[1].score == low


def test_onenip_reads_its_score_off_the_counted_places(trained):
    pictures = [texture(7), texture(8)]
    (score, scores), other = predict(trained, pictures)
    ignore = np.zeros((64, 64), bool)
    ignore[scores > np.quantile(scores, 0.3)] = True
    (less, same), unchanged = predict(trained, pictures, ignore=[ignore, None])
    np.testing.assert_array_equal(same, scores)
    lowest = torch.from_numpy(np.where(ignore, scores[~ignore].min(), scores))
    expected = torch.nn.functional.avg_pool2d(lowest[None], 16, stride=1).max().item()
    assert less == pytest.approx(expected, rel=1e-5) and less < score
    assert unchanged[0] == other[0]


def test_alarm_thresholds_are_set_on_counted_places_of_normals():
    """Every normal has a bright corner that its region of interest leaves out."""
    pixels, ignore = np.full((80, 80, 1), 50, np.uint8), np.zeros((80, 80), bool)
    pixels[:20, :20], ignore[:20, :20] = 255, True
    for tiles in (None, 0.25):
        config = SimpleNamespace(
            evaluation=SimpleNamespace(quantile=0.99), detector=SimpleNamespace(tiles=tiles)
        )
        round_ = SimpleNamespace(config=config)
        normals = [Normal("n", "a", pixels, ignore), Normal("m", "b", pixels)]
        found, _ = alarm_thresholds(round_, brightness(), normals)
        assert found["a"] == pytest.approx((50 / 255, 50 / 255), abs=0.01)
        assert found["b"] == pytest.approx((1, 1), abs=0.01)


@pytest.mark.parametrize("shots", [1, 2, 3, 4])
@pytest.mark.parametrize("shape", [(64, 64, 3), (40, 70, 1)])
def test_few_shots_are_calibrated_on_views_of_which_no_two_are_equal(shots, shape):
    corner = np.zeros(shape[:2], bool)
    corner[:12, :20] = True
    shown = [
        Normal(f"n{k}", "a", np.where(corner[..., None], 255, texture(k, shape)), corner)
        for k in range(shots)
    ]
    assert all(normal.pixels.dtype == np.uint8 for normal in shown)
    output = SimpleNamespace(output=SimpleNamespace(max_side=None))
    round_ = SimpleNamespace(images={}, config=output, pool=SimpleNamespace(normals={"a": shown}))
    views, again = (calibration_normals(round_, shown, None, None) for _ in range(2))
    assert len(views) == 5 and {one.image_id for one in views} == {one.image_id for one in shown}
    different = {one.pixels.tobytes() for one in (*views, *shown)}
    assert len(different) == 5 + shots, "views differ from each other and from what was trained on"
    for one, same in zip(views, again, strict=True):
        assert one.pixels.shape == shape and one.pixels.dtype == np.uint8
        np.testing.assert_array_equal(one.pixels, same.pixels)
        np.testing.assert_array_equal(one.ignore, same.ignore)
        bright = one.pixels[..., 0] > 220
        assert (bright == one.ignore).all(), "what does not count goes with the picture"


@pytest.mark.parametrize("tiles", [None, 0.25])
def test_the_threshold_for_no_known_category_is_the_stated_quantile_of_all_normals(tiles):
    config = SimpleNamespace(evaluation=SimpleNamespace(quantile=0.5), detector=SimpleNamespace(tiles=tiles))
    levels = {"a": [10, 20, 30], "b": [40, 250]}
    normals = [
        Normal(f"{name}{level}", name, np.full((80, 80, 1), level, np.uint8))
        for name, own in levels.items()
        for level in own
    ]
    _, overall = alarm_thresholds(SimpleNamespace(config=config), brightness(), normals)
    assert overall == pytest.approx(30 / 255, abs=1e-3)


def test_false_alarms_are_a_share_of_the_places_that_count(tmp_path):
    """Ten times the places that the quantile leaves to normals alarm, of those that count."""
    scores, ignore = np.zeros((40, 40), np.float32), np.ones((40, 40), bool)
    ignore[:, :10] = False  # 400 places count
    scores[:10, :4] = 1  # of which 40 alarm,
    scores[:, 20:] = 1  # and others that do not count
    seen = [Judged(row(tmp_path, 0), 1.0, scores, None, ignore)]
    (found,) = _alarming(seen, 0.5, 0.99)
    assert found["excess"] == pytest.approx(10)
    assert (found["x"], found["y"]) == pytest.approx((0.5 / 40, 0.5 / 40))
    assert _alarming([Judged(row(tmp_path, 0), 1.0, scores, None, np.ones((40, 40), bool))], 0.5, 0.99) == []


def test_without_masks_only_image_figures_are_given(tmp_path):
    images = [row(tmp_path, 0), row(tmp_path, 1, "hole", mask_path=None), row(tmp_path, 2, "hole")]
    judged = [perfect(i, truth(i, 64)) for i in images]
    metrics = {r["metric"] for r in figures(judged, round_=0, detector="d", split="test", training_seed=0)}
    assert metrics == {"image_auroc", "image_ap", "image_f1max"}


def test_a_category_without_defects_gives_no_row(tmp_path):
    judged = [perfect(i, truth(i, 64)) for i in (row(tmp_path, 0), row(tmp_path, 1))]
    assert figures(judged, round_=0, detector="d", split="test", training_seed=0) == []


def test_a_map_at_the_pictures_size_keeps_its_place():
    scores = np.zeros((64, 64), np.float32)
    scores[16:32, 32:48] = 1
    large = at_size(scores, 128, 256)
    assert large.shape == (128, 256)
    np.testing.assert_array_equal(large[36:60, 136:184], 1)
    assert large[:28].max() == large[:, :120].max() == 0
