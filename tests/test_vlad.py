"""VLAD: its texts, losses and branches against hand computations and peer libraries, on a small ViT and the
shipped CLIP; and that it learns."""

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.ndimage import gaussian_filter
from sklearn.metrics.pairwise import cosine_distances
from torchvision.ops import sigmoid_focal_loss

from detectors import protocol
from detectors.vlad import (
    ABNORMAL,
    APRIL,
    NORMAL,
    TEMPLATES,
    VLAD,
    Vlad,
    VladSettings,
    dice_loss,
    focal_loss,
    state_embeddings,
    state_texts,
)
from generation.cut.clip import load_clip
from generation.cut.prompts import load_bank
from manifests.errors import UsageError
from manifests.pictures import small_mask
from tests.test_onenip import spoil, weave
from tests.tiny_checkpoints import write_clip
from training import checkpoints
from training.evaluation import predict
from training.fitting import Normal, train
from training.loading import Sample
from training.metrics import pixel_metrics

SIZE = 64


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """A random ViT of 2 blocks, 8×8 patches of 8 pixels at ``SIZE``."""
    return str(write_clip(tmp_path_factory.mktemp("vlad") / "clip"))


def make(backbone, categories=("cup", "lid"), **changed) -> Vlad:
    torch.manual_seed(0)
    changed = {"size": SIZE, "bank": 2, "smooth": 0, "backbone": backbone, **changed}
    return VLAD.build(VladSettings(**changed), categories, "cpu")


def pictures(count: int, seed: int = 0) -> torch.Tensor:
    """uint8 N×3×SIZE×SIZE of smooth noise."""
    coarse = torch.rand(count, 3, 9, 9, generator=torch.Generator().manual_seed(seed))
    return (F.interpolate(coarse, (SIZE, SIZE), mode="bicubic").clamp(0, 1) * 255).byte()


@pytest.fixture(scope="module")
def prepared(vit):
    """A detector of two categories with texts, statistics, memory and calibration, its adapters random."""
    detector = make(vit).eval()
    normals = detector.extract(pictures(5)).half()
    detector.prepare(normals, ["cup", "lid", "cup", "lid", "lid"])
    held = detector.extract(pictures(4, seed=1)).half()
    detector.calibrate([{"features": held, "category": ["cup", "lid", "lid", "cup"]}])
    return detector, normals


# -- texts ----------------------------------------------------------------------------------------------


def test_texts_are_states_times_templates_and_the_descriptions():
    assert (len(set(NORMAL)), len(set(ABNORMAL)), len(set(TEMPLATES))) == (7, 5, 35)
    good, damaged = state_texts("engine")
    details = sum(len(entry.details) for entry in load_bank().entries)
    assert (len(set(good)), len(set(damaged))) == (7 * 35, 5 * 35 + details)
    assert {
        "a photo of an engine.",
        "a photo of the cool engine.",
        "a black and white photo of a flawless engine.",
        "a close-up photo of an unblemished engine.",
        "this is one engine without damage in the scene.",
    } <= set(good)
    assert {
        "a jpeg corrupted photo of the broken engine.",
        "there is an engine with flaw in the scene.",
    } <= set(damaged)
    described = damaged[5 * 35 :]
    assert all(text.startswith("a photo of an engine ") for text in described)
    assert not any(sign in text for text in (*good, *damaged) for sign in "{}")


def test_a_state_is_the_normalised_mean_of_normalised_texts(tiny_clip):
    found = state_embeddings(tiny_clip, "metal nut")
    for state, texts in zip(found, state_texts("metal nut"), strict=True):
        tokens = tiny_clip.tokenize(texts)
        with torch.no_grad():
            raw = tiny_clip.model.encode_text(tokens)
        mean = (raw / raw.norm(dim=1, keepdim=True)).mean(dim=0)
        torch.testing.assert_close(state, mean / mean.norm(), atol=1e-5, rtol=0)


def test_a_noun_that_would_be_cut_off_is_refused(tiny_clip):
    with pytest.raises(UsageError, match="shorten"):
        state_embeddings(tiny_clip, "very " * 70 + "long thing")


# -- losses ---------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.1, 3.0, 30.0]))
def test_focal_loss_is_torchvisions_without_alpha(seed, loud):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 5, 7, generator=generator) * loud
    mask = (torch.rand(2, 5, 7, generator=generator) > 0.7).float()
    wanted = sigmoid_focal_loss(logits, mask, alpha=-1, gamma=2, reduction="mean")
    torch.testing.assert_close(focal_loss(logits, mask), wanted, rtol=1e-4, atol=1e-7)


def test_dice_by_hand():
    mask = torch.zeros(1, 4, 4)
    assert dice_loss(mask, mask).item() == 0
    mask[:, :2] = 1
    assert dice_loss(mask, mask).item() == 0
    assert dice_loss(1 - mask, mask).item() == pytest.approx(1 - 1 / 17)
    assert dice_loss(torch.full_like(mask, 0.5), mask).item() == pytest.approx(1 - (8 + 1) / (8 + 8 + 1))
    two = torch.cat([mask, torch.zeros_like(mask)])
    assert dice_loss(torch.ones_like(two), two).item() == pytest.approx((1 - 17 / 25 + 1 - 1 / 17) / 2)


def test_the_loss_is_that_of_the_specification_written_out(prepared):
    """Both states' cosines, resized, softmax, focal and dice by layer; cross-entropy of the picture."""
    detector, normals = prepared
    with torch.no_grad():
        detector.adapt.weight.copy_(torch.randn(24, 24, generator=torch.Generator().manual_seed(2)))
    synthetic = detector.extract(pictures(2, seed=3))
    mask = torch.zeros(2, SIZE, SIZE)
    mask[0, 8:24, 30:50] = 1
    found = detector.loss(
        {"normal": normals[:2], "synthetic": synthetic, "mask": mask, "category": ["cup", "lid"]}
    )

    packed = torch.cat([normals[:2].float(), synthetic])
    truth = torch.cat([torch.zeros_like(mask), mask])
    texts = detector.texts[[0, 1, 0, 1]]
    wanted = 0.0
    for layer in range(2):
        maps = packed[:, layer * 32 * 64 : (layer + 1) * 32 * 64].view(4, 32, 8, 8)
        part = slice(layer * 32, (layer + 1) * 32)
        scaled = (maps - detector.mean[part, None, None]) / detector.deviation[part, None, None]
        linear = detector.project[layer]
        joint = torch.einsum("nchw,dc->ndhw", scaled, linear.weight) + linear.bias[:, None, None]
        joint = joint / joint.norm(dim=1, keepdim=True)
        logits = detector.scale * torch.einsum("ndhw,nsd->nshw", joint, texts)
        logits = F.interpolate(logits, (SIZE, SIZE), mode="bilinear", align_corners=True)
        p = logits.softmax(dim=1)
        true = torch.where(truth > 0, p[:, 1], p[:, 0])
        wanted = wanted - ((1 - true) ** 2 * true.log()).mean() + dice_loss(p[:, 1], truth)
    image = packed[:, 2 * 32 * 64 :]
    image = image + 0.1 * image @ detector.adapt.weight.T
    image = image / image.norm(dim=1, keepdim=True)
    states = detector.scale * torch.einsum("nd,nsd->ns", image, texts)
    wanted = wanted + F.cross_entropy(states, torch.tensor([0, 0, 1, 0]))
    torch.testing.assert_close(found["loss"], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["loss"], found["focal"] + found["dice"] + found["bce"])
    with torch.no_grad():
        detector.adapt.weight.zero_()


# -- the frozen part ------------------------------------------------------------------------------------


def test_features_of_a_vit_are_raw_blocks_without_the_class_token_and_the_embedding(vit):
    detector = make(vit)
    assert (detector.layers, detector.shapes) == ((1, 2), [(32, 8), (32, 8)])
    clip, images = load_clip(vit, size=SIZE), pictures(2)
    seen = []
    blocks = clip.model.visual.transformer.resblocks
    hooks = [block.register_forward_hook(lambda _m, _i, out: seen.append(out)) for block in blocks]
    embedding = clip.image(images.float() / 255)
    for hook in hooks:
        hook.remove()
    layers, found = detector._unpack(detector.extract(images))
    for tokens, block in zip(layers, seen, strict=True):
        torch.testing.assert_close(tokens, block[:, 1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found, embedding, atol=1e-5, rtol=1e-4)


def test_features_of_a_convolutional_tower_keep_the_grid_of_each_stage():
    detector = make("pocket", size=96)
    images = F.interpolate(pictures(2).float(), (96, 96)).byte()
    clip = load_clip("pocket")
    layers, found = detector._unpack(detector.extract(images))
    x = (images.float() / 255 - clip.mean) / clip.std
    with torch.no_grad():
        stages = clip.model.visual.trunk.forward_intermediates(x, intermediates_only=True)
        embedding = clip.model.encode_image(x, normalize=True)
    assert [shape[1] for shape in detector.shapes] == [stages[at - 1].shape[-1] for at in detector.layers]
    assert len({side for _, side in detector.shapes}) > 1
    for tokens, at in zip(layers, detector.layers, strict=True):
        torch.testing.assert_close(tokens, stages[at - 1].flatten(2).mT, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, embedding, atol=1e-5, rtol=1e-4)


def test_sizes_and_layers_that_a_tower_lacks_are_refused(vit):
    with pytest.raises(UsageError, match="patches of 8 pixels; take a multiple, such as 64"):
        make(vit, size=66)
    with pytest.raises(UsageError, match="has 1 to 2"):
        make(vit, layers=(0, 2))
    assert make(vit, layers=(2,)).shapes == [(32, 8)]


# -- branches -------------------------------------------------------------------------------------------


def test_the_untrained_image_branch_is_clips_own_answer(prepared):
    detector, normals = prepared
    p_cls, _ = detector.parts({"features": normals[:1], "category": ["lid"]})
    clip = detector._clip
    embedding = clip.image(pictures(1).float() / 255)
    states = clip.model.logit_scale.exp() * embedding @ state_embeddings(clip, "lid").T
    torch.testing.assert_close(p_cls, states.softmax(dim=1)[:, 1], atol=1e-3, rtol=0)


def test_memory_is_the_distance_to_the_nearest_token_summed_over_layers(prepared):
    detector, normals = prepared
    features = detector.extract(pictures(1, seed=7))
    own = normals[[1, 4]]  # of the lids 1, 3 and 4 the first and the last
    wanted = torch.zeros(1, 1, 8, 8)
    for mine, kept in zip(detector._unpack(features)[0], detector._unpack(own)[0], strict=True):
        distance = cosine_distances(mine[0], kept.flatten(0, 1)).min(axis=1)
        wanted += torch.from_numpy(distance).view(1, 1, 8, 8)
    wanted = F.interpolate(wanted, (SIZE, SIZE), mode="bilinear", align_corners=True)[0]
    found = detector.parts({"features": features, "category": ["lid"]})[1]["memory"]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


def test_a_picture_without_a_category_may_be_a_normal_of_any(prepared):
    detector, normals = prepared
    for known in normals[[0, 1]]:  # a cup and a lid
        memory = detector.parts({"features": known[None]})[1]["memory"]
        assert memory.abs().max() < 1e-4
    unnamed = detector._texts(None, 1)[0]
    torch.testing.assert_close(unnamed, state_embeddings(detector._clip, "object"))


def test_few_normals_fill_the_memory_and_none_is_an_error(vit):
    detector = make(vit, categories=("cup",), bank=3)
    normals = detector.extract(pictures(1))
    detector.prepare(normals, ["cup"])
    torch.testing.assert_close(detector.bank[0].float(), normals.expand(3, -1), atol=1e-2, rtol=1e-3)
    with pytest.raises(UsageError, match="category cup"):
        detector.prepare(normals, ["lid"])


def test_branches_are_scaled_by_normals_and_the_map_is_smoothed_as_scipy_does(vit):
    detector = make(vit, smooth=2.0).eval()
    features = detector.extract(pictures(6))
    names = ["cup", "lid"] * 3
    detector.prepare(features[:2], names[:2])
    batches = [
        {"features": features[:4], "category": names[:4]},
        {"features": features[4:], "category": names[4:]},
    ]
    detector.calibrate(batches)
    with torch.inference_mode():
        found = [detector.parts(batch) for batch in batches]
    p_cls = np.concatenate([p.numpy() for p, _ in found])
    fused = 0.0
    for name in ("text", "memory"):
        maps = np.concatenate([branches[name].numpy() for _, branches in found]).astype(np.float64)
        assert detector.calibration[f"{name}_mean"] == pytest.approx(maps.mean(), rel=1e-4)
        assert detector.calibration[f"{name}_deviation"] == pytest.approx(maps.std(), rel=1e-4)
        fused = fused + (maps - maps.mean()) / maps.std()
    smooth = np.stack([gaussian_filter(one, 2.0, mode="mirror", truncate=4) for one in fused])
    highest = smooth.max(axis=(1, 2))
    unit = highest.mean() + 3 * highest.std()
    scores, maps = (torch.cat(parts).numpy() for parts in zip(*map(detector.score, batches), strict=True))
    np.testing.assert_allclose(maps, 0.5 * smooth / unit, atol=1e-3)
    np.testing.assert_allclose(scores, 0.5 * (p_cls + highest / unit), atol=1e-3)
    assert detector.calibration["threshold"] == pytest.approx(np.quantile(scores, 0.99), abs=1e-3)
    assert maps.dtype == scores.dtype == np.float32


def test_what_else_is_in_the_batch_changes_nothing(prepared):
    """Nor does what was scored before: trained, unseen and odd pictures in one batch, then alone."""
    detector, _ = prepared
    features = detector.extract(pictures(4, seed=5))
    features[3] *= 20
    names = ["cup", "gear", "lid", "cup"]
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    scores, maps = detector.score({"features": features, "category": names})
    for i in (2, 1, 0):
        alone, map_ = detector.score({"features": features[i : i + 1], "category": names[i : i + 1]})
        torch.testing.assert_close(alone[0], scores[i], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(map_[0], maps[i], atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in detector.state_dict().items())


# -- categories that were not trained on ----------------------------------------------------------------


def test_an_unseen_category_is_scored_by_its_own_texts_and_without_a_memory(prepared):
    detector, normals = prepared
    features = normals[:2]
    scores, maps = detector.score({"features": features, "category": ["gear_box", "cup"]})
    assert scores.isfinite().all()
    torch.testing.assert_close(
        detector._texts(["gear_box"], 1)[0], state_embeddings(detector._clip, "gear box")
    )
    text = detector.parts({"features": features, "category": ["gear_box", "cup"]})[1]["text"]
    known = detector.calibration
    scaled = (text[0] - known["text_mean"]) / known["text_deviation"]
    torch.testing.assert_close(maps[0], 0.5 * scaled / known["unit"], atol=1e-4, rtol=1e-4)


def test_nouns_stand_for_names(vit):
    detector = make(vit, categories=("bft01",), nouns={"bft01": "paper", "x9": "metal sheet"})
    detector.prepare(detector.extract(pictures(1)), ["bft01"])
    for category, noun in (("bft01", "paper"), ("x9", "metal sheet")):
        torch.testing.assert_close(detector._texts([category], 1)[0], state_embeddings(detector._clip, noun))


def test_without_steps_the_memory_alone_makes_the_map(vit):
    detector = make(vit, steps=0).eval()
    features = detector.extract(pictures(3))
    detector.prepare(features, ["cup", "lid", "cup"])
    assert set(detector.parts({"features": features, "category": ["cup", "lid", "cup"]})[1]) == {"memory"}
    with pytest.raises(UsageError, match="steps"):
        detector.score({"features": features[:1], "category": ["gear"]})
    with pytest.raises(ValidationError, match="memory: false"):
        VladSettings(steps=0, memory=False)


# -- settings, checkpoints, training --------------------------------------------------------------------


def test_the_registry_knows_it_and_the_preset_is_valid():
    assert protocol.get("vlad") is VLAD
    april = VladSettings(**VLAD.presets["april"])
    assert (april.size, april.layers, april.lr) == (518, (6, 12, 18, 24), 1e-3)
    assert APRIL is VLAD.presets["april"]
    with pytest.raises(ValidationError):
        VladSettings(adaptors=3)


def test_torchs_optimiser_takes_the_groups(vit):
    detector = make(vit)
    optimizer = torch.optim.AdamW(detector.parameter_groups(), lr=1e-3)
    assert [group["betas"] for group in optimizer.param_groups] == [(0.5, 0.999)]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in detector.parameters()}


def test_a_checkpoint_scores_alike_and_is_refused_on_another_clip(vit, tmp_path):
    backbone = tmp_path / "clip"
    shutil.copytree(vit, backbone)
    detector = make(str(backbone)).eval()
    features = detector.extract(pictures(4))
    names = ["cup", "lid", "lid", "cup"]
    detector.prepare(features, names)
    detector.calibrate([{"features": features, "category": names}])
    checkpoints.save(tmp_path / "saved", "vlad", detector, seed=0)
    again = checkpoints.load(tmp_path / "saved")
    batch = {"features": detector.extract(pictures(3, seed=4)), "category": ["cup", "gear", "lid"]}
    for mine, other in zip(detector.score(batch), again.score(batch), strict=True):
        torch.testing.assert_close(mine, other)
    assert again.calibration == pytest.approx(detector.calibration)

    shutil.rmtree(backbone)
    write_clip(backbone, seed=1)
    with pytest.raises(checkpoints.CheckpointError, match="trained on backbone"):
        checkpoints.load(tmp_path / "saved")


def test_a_vit_learns_one_case_by_heart(prepared, vit):
    """Tokens that differ in one direction, under the mask: a linear adapter can tell them."""
    detector = make(vit, memory=False)
    detector.texts.copy_(prepared[0].texts)
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 2 * 32 * 64 + 24, generator=generator)
    synthetic = normal.clone()
    synthetic[:, : 2 * 32 * 64].view(1, 64, 8, 8)[:, ::4, 2:5, 3:7] += 3
    synthetic[:, 2 * 32 * 64 :] *= -1
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:5, 3:7] = 1
    mask = F.interpolate(mask[None], (SIZE, SIZE), mode="bilinear", align_corners=True)[0].round()
    batch = {"normal": normal, "synthetic": synthetic, "mask": mask, "category": ["cup"]}
    optimizer = torch.optim.Adam(detector.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        losses = detector.loss(batch)
        losses["loss"].backward()
        optimizer.step()
    found = detector.eval().score({"features": torch.cat([normal, synthetic]), "category": ["cup", "cup"]})
    assert pixel_metrics([found[1][1].numpy()], [mask[0].bool().numpy()])["pixel_ap"] > 0.95
    assert found[0][1] > found[0][0] + 0.5


def test_vlad_learns_and_speaks_of_a_category_it_never_saw():
    """Pixel AP on unseen defects, drawn by code, is well above that of hardly trained adapters, under the
    trained name and under another."""
    rng = np.random.default_rng(0)
    normals = [Normal(f"n{i}", "cloth", weave(rng)) for i in range(24)]
    samples = []
    for i in range(60):
        source = normals[i % 20]
        image, mask = spoil(rng, source.pixels)
        recipe = {"category": "cloth", "image_id": source.image_id}
        samples.append(Sample(f"s{i}", image, mask, source.pixels, recipe, {}))
    tested = [spoil(rng, weave(rng)) for _ in range(16)]
    masks = [small_mask(mask, 96) for _, mask in tested]

    def pixel_ap(steps: int, *categories: str) -> list[float]:
        chosen = VladSettings(size=96, steps=steps, memory=False)
        detector = train("vlad", chosen, samples, normals[:20], normals[20:], seed=0)
        found = []
        for category in categories:
            maps = [map_ for _, map_ in predict(detector, [image for image, _ in tested], [category] * 16)]
            found.append(pixel_metrics(maps, masks)["pixel_ap"])
        return found

    (before,) = pixel_ap(1, "cloth")
    after, unseen = pixel_ap(80, "cloth", "leather")
    assert after > before + 0.2, (before, after)
    assert unseen > before + 0.2, (before, unseen)
