"""The pocket models' training: pictures and captions, legs that resume exactly, and the export."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from generation.cut.checkpoints import identify
from generation.cut.clip import load_clip
from generation.cut.models import load_sd
from manifests.errors import UsageError
from tests.test_cli import flawsmith
from training.pocket import autoencoder, contrastive, diffusion, legs, train
from training.pocket.captions import NOUNS, defect_caption, normal_caption, thing
from training.pocket.damage import DRAWERS, VISIBLE, damage
from training.pocket.export import export, joined_autoencoder
from training.pocket.pictures import numbered
from training.pocket.vocabulary import Vocabulary

TEXTS = [
    "a photo of a hazelnut with a crack on it",
    "a photo of a zipper with a crack on it",
    "a photo of a metal plate with a long thin scratch",
    "",
]


@pytest.fixture(scope="module")
def words() -> Vocabulary:
    return Vocabulary()


def write_checkpoints(folder: Path, words: Vocabulary) -> tuple[diffusion.Model, torch.nn.Module]:
    """Checkpoints as the legs leave them, random; the two models whose text towers are compared."""
    torch.manual_seed(0)
    vae = autoencoder.network()
    legs.save(folder / "autoencoder.pt", {"average": legs.snapshot(vae), "step": 1})
    model = diffusion.Model(words.size)
    legs.save(folder / "diffusion.pt", {"average": legs.snapshot(model), "scaling": 0.71, "step": 1})
    clip = contrastive.network(words.size)
    with torch.no_grad():  # statistics that float16 does not hold
        next(m for m in clip.modules() if isinstance(m, torch.nn.BatchNorm2d)).running_var[:2] = torch.tensor(
            [1e-8, 1e5]
        )
    legs.save(folder / "contrastive.pt", {"average": legs.snapshot(clip), "step": 1})
    return model.eval(), clip.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory, words):
    folder = tmp_path_factory.mktemp("pocket")
    models = write_checkpoints(folder, words)
    export(folder, folder)
    return folder, *models


def test_the_exported_stable_diffusion_reads_texts_as_the_trained_one(exported, words):
    folder, model, _ = exported
    sd = load_sd(str(folder / "sd"))
    assert (sd.size, sd.factor, sd.attention_side, sd.prediction) == (128, 8, 16, "v_prediction")
    assert sd.vae.config["scaling_factor"] == 0.71
    assert identify(str(folder / "sd"))["licence"] == "apache-2.0"
    found = sd.embed(TEXTS)
    trained = model.text(words(TEXTS)).last_hidden_state.detach()
    rounded = model.text.half().float()(words(TEXTS)).last_hidden_state.detach()
    assert torch.allclose(found, rounded, atol=1e-5)
    assert torch.allclose(found, trained, atol=2e-3, rtol=1e-3)
    assert torch.equal(found[0], found[1])  # hazelnut and zipper are both "some thing"
    rows = sd.text_encoder.embeddings.token_embedding.weight
    unknown = torch.ones(len(rows), dtype=torch.bool)
    unknown[torch.tensor(words.known)] = False
    assert (rows[unknown] == rows[unknown][0]).all() and len(rows) == 49408


def test_diffusers_reads_the_exported_folder(exported):
    from diffusers import StableDiffusionPipeline

    folder, _, _ = exported
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "sd", safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pictures = pipeline("a photo of a plate", num_inference_steps=2, output_type="np").images
    assert pictures.shape == (1, 128, 128, 3) and np.isfinite(pictures).all()


def test_the_exported_clip_gives_the_embeddings_of_the_trained_one(exported, words):
    folder, _, model = exported
    clip = load_clip(str(folder / "clip"))
    pictures = torch.rand((2, 128, 128, 3), generator=torch.Generator().manual_seed(0))
    seen = contrastive.seen((pictures * 255).round().byte())
    with torch.no_grad():
        texts = model.encode_text(words(TEXTS), normalize=True)
        images = model.encode_image(seen, normalize=True)
    found = clip.image(((pictures * 255).round() / 255).permute(0, 3, 1, 2))
    assert torch.allclose(clip.text(TEXTS), texts, atol=2e-3)
    assert torch.allclose(found, images, atol=5e-3)


def test_an_export_is_reproducible_replaces_the_old_one_and_is_never_half(exported, words, monkeypatch):
    folder, _, _ = exported

    def content() -> dict[str, str]:
        files = [path for part in ("sd", "clip") for path in sorted((folder / part).rglob("*"))]
        return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files if p.is_file()}

    first = content()
    assert all(Path(name).stat().st_mode & 0o044 == 0o044 for name in first)
    (folder / "sd/leftover").write_text("of an older version")
    export(folder, folder)
    assert content() == first

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.pocket.export.save_file", full)
    with pytest.raises(OSError, match="No space"):
        export(folder, folder)
    assert content() == first


def test_the_decoder_leg_replaces_the_decoder_alone(tmp_path):
    first, second = autoencoder.network(), autoencoder.network()
    legs.save(tmp_path / "autoencoder.pt", {"average": legs.snapshot(first)})
    legs.save(tmp_path / "decoder.pt", {"average": legs.snapshot(second)})
    joined = joined_autoencoder(tmp_path).state_dict()
    for key, value in joined.items():
        origin = first if key.startswith(("encoder.", "quant_conv.")) else second
        assert torch.equal(value, origin.state_dict()[key]), key


def test_what_cannot_be_exported_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"diffusion\.pt is missing: `flawsmith pocket train --out"):
        export(tmp_path, tmp_path)
    model = diffusion.Model(100)
    legs.save(tmp_path / "diffusion.pt", {"average": legs.snapshot(model), "scaling": 1.0, "step": 1})
    with pytest.raises(UsageError, match="knows 100 tokens"):
        export(tmp_path, tmp_path)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("leg", ["autoencoder", "diffusion", "contrastive", "decoder"])
def test_an_interrupted_leg_ends_with_the_same_weights(leg, tmp_path, monkeypatch):
    """Two steps at once, and two that were killed after the first."""
    module = {"diffusion": diffusion, "contrastive": contrastive}.get(leg, autoencoder)
    monkeypatch.setattr(module, "BATCH", 2)
    monkeypatch.setattr(legs, "SAVE_SECONDS", 0)
    monkeypatch.setattr(diffusion, "measure_scaling", lambda *_: 0.7)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        torch.manual_seed(1)
        legs.save(folder / "autoencoder.pt", {"average": legs.snapshot(autoencoder.network())})
        if leg == "autoencoder":
            (folder / "autoencoder.pt").unlink()
    run = train.LEGS[leg]
    run(whole, 2, 5, ())
    torch.rand(7)  # what happened before in a process must not count
    save = legs.save

    def killed(path, state):
        save(path, state)
        if state["step"] == 1:
            raise Stopped

    monkeypatch.setattr(legs, "save", killed)
    with pytest.raises(Stopped):
        run(parts, 2, 5, ())
    monkeypatch.setattr(legs, "save", save)
    run(parts, 2, 5, ())
    first, second = (legs.load(folder / f"{leg}.pt") for folder in (whole, parts))
    assert first["step"] == second["step"] == 2
    for kind in ("network", "average"):
        differing = [key for key in first[kind] if not torch.equal(first[kind][key], second[kind][key])]
        assert not differing


def test_measuring_the_scaling_leaves_the_threads_as_they_were(monkeypatch, tmp_path):
    legs.save(tmp_path / "autoencoder.pt", {"average": legs.snapshot(autoencoder.network())})
    threads = [2]

    def measured(*_args):
        torch.set_num_threads(1)
        return 0.7

    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(diffusion, "measure_scaling", measured)
    monkeypatch.setattr(diffusion, "BATCH", 3)
    diffusion.train(tmp_path, 0, 0, ())
    assert 1 in threads and threads[-1] == 2


def test_training_runs_what_is_left_in_order_and_refuses_another_seed(tmp_path, words, monkeypatch, capsys):
    write_checkpoints(tmp_path, words)
    monkeypatch.setattr(train, "STEPS", {"autoencoder": 1, "diffusion": 1, "contrastive": 2, "decoder": 1})
    ran = []
    for name in train.LEGS:
        monkeypatch.setitem(train.LEGS, name, lambda out, steps, seed, photos, name=name: ran.append(name))
    sd, clip = train.train_all(tmp_path)
    assert ran == ["contrastive", "decoder"]
    assert "autoencoder is trained (1 steps)" in capsys.readouterr().out
    assert (sd / "model_index.json").is_file() and (clip / "open_clip_config.json").is_file()
    with pytest.raises(UsageError, match="begun with another seed"):
        train.train_all(tmp_path, seed=1)


def test_the_command_says_how_long_it_takes_and_what_textures_lack(tmp_path):
    shown = flawsmith("pocket", "train", "--help")
    assert shown.returncode == 0 and "hours" in shown.stdout
    done = flawsmith("pocket", "train", "--out", tmp_path / "out", "--textures", tmp_path / "none")
    assert (done.returncode, "no pictures" in done.stderr) == (2, True), done.stderr


def test_a_picture_is_a_function_of_its_number():
    for number in (0, 1, 11):
        (rng, first), (again, second) = (numbered(3, number, ()) for _ in range(2))
        assert np.array_equal(first.pixels, second.pixels) and first.noun == second.noun
        assert np.array_equal(damage(rng, first).pixels, damage(again, second).pixels)
    assert not np.array_equal(numbered(3, 0, ())[1].pixels, numbered(4, 0, ())[1].pixels)


def test_masks_are_where_pixels_changed_and_captions_say_what_changed(words):
    """Of every defect: exact masks, its name in every caption, and no word outside the small vocabulary."""
    seen = set()
    for number in range(120):
        rng, scene = numbered(0, number, ())
        found = damage(rng, scene)
        changed = np.abs(found.pixels - scene.pixels).max(axis=2) > VISIBLE
        assert found.mask.any() and np.array_equal(found.mask, changed), (number, found.defect)
        assert found.pixels.min() >= 0 and found.pixels.max() <= 1
        seen.add(found.defect)
        noun = thing(rng, scene)
        caption = defect_caption(rng, noun, found)
        stems = {word[:4] for name in NOUNS[found.defect] for word in name.split()}
        assert any(stem in caption for stem in stems), (found.defect, caption)
        for text in (caption, normal_caption(rng, noun)):
            known = text.replace("unknownword", "")
            assert (words([known])[0, :] > 0).all(), text
            assert len(words.tokenizer(text)["input_ids"]) <= 77
    assert seen == set(DRAWERS)


def test_the_vocabulary_gives_every_other_token_one_row(words):
    ids = words(["a photo of a quokka"])[0]
    assert (ids == 0).any() and ids[0] == words.size - 2 and (ids == words.size - 1).any()
    full = words.expand(torch.arange(words.size))
    assert full.shape == (49408,) and int((full == 0).sum()) == 49408 - len(words.known)
