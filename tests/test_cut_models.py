"""Stable Diffusion and CLIP checkpoints: the published layouts load, and what does not fit says why."""

import json
import shutil

import diffusers
import open_clip
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from generation.cut import checkpoints, models
from generation.cut.checkpoints import ModelError, identify
from generation.cut.clip import identify_clip, load_clip
from generation.cut.models import best_attention, load_sd
from generation.cut.tokens import build_tokenizer, token_positions
from manifests.errors import UsageError
from tests.tiny_checkpoints import write_clip, write_sd2, write_sd15

PROMPT = "a photo of a Metal nut with a (broken) edge, a missing  piece, and discolouration."


@pytest.fixture(scope="module", autouse=True)
def _no_hub(tmp_path_factory):
    """No test may reach for a hub, nor find what an earlier use of one has left."""
    from huggingface_hub import constants

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "sd15": write_sd15(root / "sd15"),
        "sd2": write_sd2(root / "sd2"),
        "clip": write_clip(root / "clip"),
    }


@pytest.fixture(scope="module")
def sd15(folders):
    return load_sd(str(folders["sd15"]))


@pytest.fixture(scope="module")
def sd2(folders):
    return load_sd(str(folders["sd2"]))


@pytest.fixture(scope="module")
def clip(folders):
    return load_clip(str(folders["clip"]))


@pytest.fixture
def damaged(folders, tmp_path):
    """A copy of the 1.5 checkpoint that a test may spoil."""
    return shutil.copytree(folders["sd15"], tmp_path / "damaged")


@pytest.fixture(scope="module")
def images():
    return torch.rand(2, 3, 64, 128, generator=torch.Generator().manual_seed(0))


def edit(file, **changes):
    settings = json.loads(file.read_text())
    settings.update(changes)
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def test_the_layouts_have_their_geometry(sd15, sd2):
    assert (sd15.size, sd15.factor, sd15.stride, sd15.attention_side) == (512, 8, 64, 16)
    assert (sd2.size, sd2.factor, sd2.stride, sd2.attention_side) == (768, 8, 64, 24)
    assert (sd15.prediction, sd2.prediction) == ("epsilon", "v_prediction")


@pytest.mark.parametrize("name", ["sd15", "sd2"])
def test_the_attention_side_is_one_that_a_forward_pass_has(name, request):
    """The oracle counts the queries of every cross-attention layer at native size."""
    sd = request.getfixturevalue(name)
    sides = set()
    hooks = [
        module.register_forward_hook(
            lambda _module, inputs, _out: sides.add(round(inputs[0].shape[1] ** 0.5))
        )
        for path, module in sd.unet.named_modules()
        if path.endswith("attn2")
    ]
    side = sd.unet.config.sample_size
    with torch.no_grad():
        sd.unet(torch.zeros(1, 4, side, side), 500, sd.embed([""]))
    for hook in hooks:
        hook.remove()
    assert sd.attention_side in sides
    assert sd.attention_side == (16 if 16 in sides else max(s for s in sides if s <= 32))


@pytest.mark.parametrize(
    ("sample_size", "side"),
    [(64, 16), (32, 16), (16, 16), (96, 24), (48, 24), (24, 24), (512, 64)],
)
def test_attention_sides_of_other_sizes(sd15, sample_size, side):
    config = diffusers.configuration_utils.FrozenDict({**sd15.unet.config, "sample_size": sample_size})
    assert models.attention_side_of(config, "any") == side


def test_everything_is_frozen_and_in_eval_mode(sd15):
    for network in (sd15.unet, sd15.vae, sd15.text_encoder):
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", ["sd15", "sd2"])
def test_text_equals_that_of_the_diffusers_pipeline(name, request, folders):
    sd = request.getfixturevalue(name)
    pipeline = StableDiffusionPipeline.from_pretrained(
        folders[name], safety_checker=None, dtype=torch.float32
    )
    wanted, empty = pipeline.encode_prompt([PROMPT, "a crack"], "cpu", 1, True)
    found = sd.embed([PROMPT, "a crack"])
    assert found.shape == (2, 77, 32) and found.dtype == torch.float32 and not found.requires_grad
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(sd.embed([""]), empty[:1])


@pytest.mark.parametrize("name", ["sd15", "sd2"])
def test_the_noise_schedule_is_the_checkpoints(name, request, folders):
    sd = request.getfixturevalue(name)
    wanted = DDIMScheduler.from_pretrained(folders[name], subfolder="scheduler").alphas_cumprod
    assert sd.alphas.dtype == torch.float64
    torch.testing.assert_close(sd.alphas, wanted.double(), rtol=0, atol=0)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(sd.alphas, (1 - betas).cumprod(0), rtol=1e-4, atol=1e-7)


def test_latents_are_the_scaled_mean_of_the_posterior(sd15, images):
    latents = sd15.encode(images)
    assert latents.shape == (2, 4, 8, 16) and latents.dtype == torch.float32 and not latents.requires_grad
    with torch.no_grad():
        posterior = sd15.vae.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(latents, posterior.mean * 0.18215)
    torch.testing.assert_close(sd15.encode(images), latents, rtol=0, atol=0)


def test_decode_undoes_the_scale_and_is_differentiable(sd15, images):
    latents = sd15.encode(images).requires_grad_()
    decoded = sd15.decode(latents)
    assert decoded.shape == images.shape and decoded.dtype == torch.float32
    with torch.no_grad():
        wanted = sd15.vae.decode(latents / 0.18215).sample / 2 + 0.5
    torch.testing.assert_close(decoded.detach(), wanted)
    decoded.mean().backward()
    assert latents.grad.abs().sum() > 0


def test_a_shift_of_the_latents_is_applied_both_ways(damaged, sd15, images):
    edit(damaged / "vae/config.json", shift_factor=0.5)
    shifted = load_sd(str(damaged))
    latents = sd15.encode(images)
    torch.testing.assert_close(shifted.encode(images), latents - 0.5 * 0.18215)
    torch.testing.assert_close(
        shifted.decode(shifted.encode(images)), sd15.decode(latents), rtol=1e-4, atol=1e-5
    )


def test_pictures_of_a_wrong_shape_are_refused(sd15):
    for shape in [(1, 1, 64, 64), (3, 64, 64), (1, 3, 60, 64)]:
        with pytest.raises(ValueError, match="multiples of 8"):
            sd15.encode(torch.zeros(shape))


def test_gradient_checkpointing_changes_no_gradient(folders, sd15):
    checkpointed = load_sd(str(folders["sd15"]), checkpointing=True)
    gradients = []
    for sd in (sd15, checkpointed):
        z = torch.ones(1, 4, 16, 16, requires_grad=True)
        noise = sd.unet(z, 300, sd.embed(["a crack"])).sample
        sd.decode(noise).mean().backward()
        assert z.grad is not None
        gradients.append(z.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_half_precision_networks_still_give_float32(folders, images):
    sd = load_sd(str(folders["sd15"]), dtype="bfloat16", channels_last=False)
    assert sd.unet.dtype == torch.bfloat16
    latents = sd.encode(images)
    assert {latents.dtype, sd.decode(latents).dtype, sd.embed(["a"]).dtype} == {torch.float32}
    with pytest.raises(UsageError, match=r"int8.*float16"):
        load_sd(str(folders["sd15"]), dtype="int8")


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_token_ids_equal_those_of_open_clip(pad):
    texts = [
        PROMPT,
        "It's 3x faded?? don't",
        "a scratch-like café ünïcode 12 <b> 裂纹 🔩",
        "",
        "o'clock  \n new line",
    ]
    ours = build_tokenizer(pad)(texts)["input_ids"]
    for ids, theirs in zip(ours, open_clip.SimpleTokenizer()(texts).tolist(), strict=True):
        assert ids == theirs[: len(ids)] and not any(theirs[len(ids) :])


def test_saved_tokenizers_of_both_layouts_give_the_same_ids(sd15, sd2):
    one, two = sd15.tokens([PROMPT, "a"]), sd2.tokens([PROMPT, "a"])
    assert one.shape == two.shape == (2, 77) and one.dtype == torch.int64
    end = one[1].tolist().index(49407)
    assert torch.equal(one[:, : end + 1], two[:, : end + 1])
    assert one[1, end + 1] == 49407 and two[1, end + 1] == 0  # padded with end of text, and with "!"


@pytest.mark.parametrize(
    ("word", "pieces"),
    [
        ("metal", ["metal</w>"]),
        ("broken", ["broken</w>"]),
        ("missing piece", ["missing</w>", "piece</w>"]),
        ("Discolouration", ["disc", "ol", "our", "ation</w>"]),
        ("(broken) edge", ["(</w>", "broken</w>", ")</w>", "edge</w>"]),
        ("a", ["a</w>"]),  # the last of four
    ],
)
def test_the_tokens_of_a_word_are_found(sd15, word, pieces):
    positions = token_positions(sd15, PROMPT, word)
    ids = sd15.tokens([PROMPT])[0]
    assert [sd15.tokenizer.convert_ids_to_tokens(ids[i].item()) for i in positions] == pieces


def test_the_index_of_the_published_example(sd15):
    """core.md 1.10: the anomaly token of this prompt has index 8."""
    assert token_positions(sd15, "a photo of a bottle with a crack on it", "crack") == [8]


@pytest.mark.parametrize("word", ["crack", "break", "brok", "piece missing", "", " "])
def test_a_word_that_is_not_in_the_prompt_is_refused(sd15, word):
    with pytest.raises(UsageError, match="does not hold"):
        token_positions(sd15, PROMPT, word)


def test_a_text_that_would_be_cut_off_is_refused(sd15):
    sd15.tokens(["crack " * 75])
    with pytest.raises(UsageError, match=r"crack crack.*78 tokens.*77"):
        sd15.embed(["fine", "crack " * 76])
    with pytest.raises(UsageError, match="78 tokens"):
        token_positions(sd15, "crack " * 76, "crack")


def test_identity_follows_what_is_read(folders, damaged, sd15):
    found = identify(str(folders["sd15"]))
    assert found == sd15.identity
    assert found == {"id": "sd15", "weights": found["weights"], "licence": "creativeml-openrail-m"}
    (damaged / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not read")
    assert identify(str(damaged))["weights"] == found["weights"]
    edit(damaged / "scheduler/scheduler_config.json", beta_end=0.02)
    assert identify(str(damaged))["weights"] != found["weights"]
    other = write_sd15(damaged.parent / "other", seed=1)
    assert identify(str(other))["weights"] != found["weights"]


def test_a_cached_hub_repository_is_read_at_its_commit(folders, tmp_path, monkeypatch, sd15):
    from huggingface_hub import constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--tiny--sd15"
    shutil.copytree(folders["sd15"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(diffusers.models.modeling_utils, "HF_HUB_CACHE", str(tmp_path), raising=False)
    found = identify("tiny/sd15")
    assert found == {"id": "tiny/sd15", "revision": commit, "licence": "creativeml-openrail-m"}
    sd = load_sd("tiny/sd15")
    assert sd.identity == found
    torch.testing.assert_close(sd.embed(["a crack"]), sd15.embed(["a crack"]))


def refuse(folder, match):
    with pytest.raises(ModelError, match=match):
        load_sd(str(folder))


def test_names_that_lead_nowhere_are_refused():
    refuse("no/such/folder", r"no such folder.*pocket")
    refuse("nowhere", r"no such folder.*hub id")
    refuse("owner/not-cached", r"owner/not-cached.*hub.*HF_HUB_OFFLINE.*pocket")
    with pytest.raises(ModelError, match="hub"):
        identify("owner/not-cached")


def test_a_missing_pocket_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(checkpoints.resources, "files", lambda _package: tmp_path)
    refuse("pocket", r"pocket.*not in this installation.*reinstall")
    with pytest.raises(ModelError, match=r"pocket.*reinstall"):
        load_clip("pocket")


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_part_is_named(damaged, part):
    shutil.rmtree(damaged / part)
    refuse(damaged, rf"no {part}/.*folder is missing")


def test_a_folder_without_an_index_is_refused(damaged):
    (damaged / "model_index.json").unlink()
    refuse(damaged, r"model_index\.json cannot be read.*layout")


def test_other_weight_files_are_not_read(damaged):
    (damaged / "unet/diffusion_pytorch_model.safetensors").rename(
        damaged / "unet/diffusion_pytorch_model.bin"
    )
    refuse(damaged, r"no unet/diffusion_pytorch_model\.safetensors.*model\.bin.*only safetensors")


@pytest.mark.parametrize(
    "file",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    ],
)
@pytest.mark.parametrize("kept", [0.0, 0.5])
def test_truncated_weights_are_refused(damaged, file, kept):
    content = (damaged / file).read_bytes()
    (damaged / file).write_bytes(content[: int(len(content) * kept)])
    refuse(damaged, f"its {file.partition('/')[0]} cannot be loaded")


@pytest.mark.parametrize(
    "file", ["unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"]
)
@pytest.mark.parametrize("change", ["drop", "reshape"])
def test_weights_that_do_not_fit_are_never_random(damaged, file, change):
    weights = load_file(damaged / file)
    key = next(key for key in weights if key.endswith("weight") and weights[key].ndim == 2)
    if change == "drop":
        del weights[key]
    else:
        weights[key] = weights[key][:-1].clone()
    save_file(weights, damaged / file, metadata={"format": "pt"})
    refuse(damaged, f"its {file.partition('/')[0]}")


def test_a_tokenizer_without_its_vocabulary_is_refused(damaged):
    (damaged / "tokenizer/vocab.json").unlink()
    refuse(damaged, "tokenizer")


def test_other_architectures_are_refused(damaged):
    index = damaged / "model_index.json"
    kept = index.read_text()
    edit(index, text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    refuse(damaged, r"not a Stable Diffusion 1\.x or 2\.x")
    index.write_text(kept)
    edit(index, vae=["diffusers", "AutoencoderTiny"])
    refuse(damaged, r"vae is a AutoencoderTiny, expected AutoencoderKL")
    index.write_text(kept)
    edit(index, unet=None)
    refuse(damaged, "lists no unet")


def test_an_inpainting_unet_is_refused(damaged):
    edit(damaged / "unet/config.json", in_channels=9)
    refuse(damaged, r"9 channels.*gives 4.*inpainting")


def test_a_unet_that_wants_more_than_a_text_is_refused(damaged):
    edit(damaged / "unet/config.json", addition_embed_type="text_time")
    refuse(damaged, "more than a text")


def test_other_predictions_are_refused(damaged):
    edit(damaged / "scheduler/scheduler_config.json", prediction_type="sample")
    refuse(damaged, r"predicts 'sample'")
    edit(damaged / "scheduler/scheduler_config.json", prediction_type=None, beta_start=None)
    refuse(damaged, r"predicts 'flow'")


def test_attention_is_torchs_own_where_xformers_does_not_work(monkeypatch):
    def broken(*_arguments):
        raise NotImplementedError("No operator found\nfor these inputs")

    monkeypatch.setattr(
        models, "import_module", lambda _name: type("ops", (), {"memory_efficient_attention": broken})
    )
    best_attention.cache_clear()
    name, line = best_attention("cpu")
    assert name == "sdpa" and "\n" not in line and "No operator found" in line
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        models,
        "import_module",
        lambda _name: type("ops", (), {"memory_efficient_attention": staticmethod(plain)}),
    )
    best_attention.cache_clear()
    assert best_attention("cpu")[0] == "xformers"
    best_attention.cache_clear()


def test_clip_embeddings_are_those_of_open_clip(clip, folders):
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folders['clip']}")
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    normalise = preprocess.transforms[-1]
    with torch.no_grad():
        wanted = model.eval().encode_image(normalise(images), normalize=True)
        words = model.encode_text(open_clip.SimpleTokenizer()(["a crack", "a nut"]), normalize=True)
    torch.testing.assert_close(clip.image(images), wanted)
    torch.testing.assert_close(clip.text(["a crack", "a nut"]), words)
    torch.testing.assert_close(clip.similarity(images, words), (wanted * words).sum(-1))


def test_clip_similarity_is_differentiable_at_any_size(clip):
    images = torch.rand(2, 3, 48, 80, generator=torch.Generator().manual_seed(2), requires_grad=True)
    similarity = clip.similarity(images, clip.text(["a crack"]))
    assert similarity.shape == (2,) and similarity.abs().max() <= 1
    (gradient,) = torch.autograd.grad(similarity.sum(), images)
    assert (gradient.flatten(1).abs().sum(1) > 0).all()
    stepped = clip.similarity(images.detach() + 0.05 * gradient.sign(), clip.text(["a crack"]))
    assert (stepped > similarity).all()


def test_a_text_too_long_for_clip_is_refused(tmp_path):
    short = load_clip(str(write_clip(tmp_path / "short", context=8)))
    assert short.text(["one two three four five six"]).shape == (1, 24)
    with pytest.raises(UsageError, match=r"9 tokens.*reads 8"):
        short.text(["a nut", "one two three four five six seven"])


def test_clip_identity_and_errors(folders, tmp_path, clip):
    assert (
        identify_clip(str(folders["clip"]))
        == clip.identity
        == {"id": "clip", "weights": clip.identity["weights"]}
    )
    assert identify_clip("ViT-B-16/laion2b_s34b_b88k")["source"].startswith("laion/")
    for name, match in [
        ("ViT-B-16/laion2b_s34b_b88k", r"cannot be loaded.*HF_HUB_OFFLINE"),
        ("ViT-B-16/no_such_tag", r"its tags: .*laion2b_s34b_b88k"),
        ("ViT-Z-99/openai", r"no such model"),
        ("nothing", r"no such folder"),
        ("hf-hub:owner/not-cached", r"owner/not-cached.*hub.*pocket"),
    ]:
        with pytest.raises(ModelError, match=match):
            load_clip(name)
    damaged = shutil.copytree(folders["clip"], tmp_path / "clip")
    weights = damaged / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_clip(str(damaged))
    weights.rename(damaged / "open_clip_pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin.*safetensors"):
        load_clip(str(damaged))
