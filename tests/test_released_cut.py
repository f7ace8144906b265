"""The released loop that benchmarks measure against, and the counting of operations."""

import math

import pytest
import torch

from generation.cut.clip import load_clip
from generation.cut.models import load_sd
from generation.cut.tokens import token_positions
from tests.benchmarks import flops
from tests.benchmarks.released_cut import (
    OpenAttention,
    Store,
    align,
    attention_loss,
    opened,
    plms,
    read_objective,
    released,
    smoothed,
)
from tests.tiny_checkpoints import write_clip, write_sd2, write_sd15

PROMPT, NORMAL = "a photo of a tile with a crack on it", "a photo of a tile"
DETAIL = "a photo of a tile with a long jagged crack that runs across it"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    sd = load_sd(str(write_sd15(root / "sd15", sample_size=16)), channels_last=False)
    return sd, load_clip(str(write_clip(root / "clip")))


@pytest.fixture(scope="module")
def image():
    return torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(7))


def run(models, image, seed=0, **settings):
    settings = {"steps": 10, "inner": 2} | settings
    stream = torch.Generator().manual_seed(seed)
    return released(*models, image, PROMPT, NORMAL, DETAIL, "crack", stream, **settings)


def test_of_200_steps_61_are_executed(models, image):
    scheduler = plms(models[0], 200)
    assert len(scheduler.timesteps) == 201
    assert int(scheduler.timesteps[140]) == 301
    trace = run(models, image, steps=200, inner=1).trace
    assert len(trace.attention) == 61
    assert sum(not math.isnan(value) for value in trace.similarity) == 18
    assert trace.calls["decode_grad"] == 18


def test_same_seed_same_picture(models, image):
    first, again, other = run(models, image), run(models, image), run(models, image, seed=1)
    assert torch.equal(first.image, again.image)
    assert torch.equal(first.maps, again.maps)
    assert not torch.equal(first.image, other.image)
    assert first.image.shape == image.shape
    assert first.maps.shape == (16, 16, 77)
    assert torch.allclose(first.maps.sum(-1), torch.ones(16, 16), atol=1e-5)


def test_checkpoint_is_left_as_it_was(models, image):
    sd, clip = models
    before = dict(sd.unet.attn_processors)
    run(models, image)
    assert sd.unet.attn_processors == before
    for network in (sd.unet, sd.vae, clip.model):
        assert not any(p.requires_grad or p.grad is not None for p in network.parameters())


def test_open_attention_changes_nothing_but_rounding(models):
    sd = models[0]
    z, text = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), sd.embed([PROMPT])
    with torch.no_grad():
        usual = sd.unet(z, 500, text).sample
        with opened(sd.unet, OpenAttention(store := Store(16))):
            found = sd.unet(z, 500, text).sample
    assert torch.allclose(usual, found, atol=1e-5)
    store.finish()
    assert len(store.weights) == 5  # two of the way down, three of the way up
    assert {tuple(weights.shape) for weights in store.weights} == {(8, 256, 77)}


def test_no_maps_of_that_side_is_an_error(models, image):
    with pytest.raises(ValueError, match="5×5 queries"):
        run(models, image, side=5)
    with pytest.raises(ValueError, match="0 steps"):
        run(models, image, steps=2)


def test_smoothing_keeps_flat_maps_and_spreads_a_peak():
    flat = torch.full((16, 16, 77), 1 / 77)
    assert torch.allclose(smoothed(flat, 8), torch.full((16, 16), 1 / 75), atol=1e-7)
    peak = flat.clone()
    peak[5, 6, 8] = 1.0
    found = smoothed(peak, 8)
    assert found.argmax() == 5 * 16 + 6
    assert found[5, 6] == pytest.approx(1 / (1 + 2 * math.exp(-1)) ** 2, abs=0.01)
    assert found[5, 7] == pytest.approx(float(found[5, 6]) * math.exp(-1), abs=0.02)
    assert float(attention_loss(peak, [8])) == pytest.approx(1 - float(found.max()))
    assert float(attention_loss(peak, [8, 9])) > float(attention_loss(peak, [8]))


def test_released_alignment_of_the_embedding_moves_nothing(models):
    sd = models[0]
    text, detail, normal = (torch.cat([sd.embed([""]), sd.embed([t])]) for t in (PROMPT, DETAIL, NORMAL))
    (token,) = token_positions(sd, PROMPT, "crack")
    aligned = align(text, detail, normal, token)
    assert not torch.equal(detail, normal)
    assert (aligned - text).abs().max() < 1e-4 * text.abs().max()


def test_mask_keeps_the_rest_of_the_latents_near_the_normal_picture(models, image):
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    sd = models[0]
    masked, free = run(models, image, mask=mask), run(models, image)
    normal = sd.encode(image)
    change = [(found.latents - normal)[..., 8:].abs().mean() for found in (masked, free)]
    assert change[0] < change[1]


def test_word_of_several_tokens_and_v_prediction(tmp_path, models, image):
    sd = load_sd(str(write_sd2(tmp_path / "sd2", sample_size=16)), channels_last=False)
    stream = torch.Generator().manual_seed(0)
    texts = ("a photo of a tile with a broken edge", NORMAL, DETAIL, "broken edge")
    found = released(sd, models[1], image, *texts, stream, steps=10, inner=1)
    assert found.image.isfinite().all()
    assert len(found.trace.attention) == 4
    value, maps = read_objective(sd, found.latents, texts[0], texts[3])
    assert 0 < value < 1
    assert maps.shape == (16, 16, 77)


@pytest.mark.parametrize("settings", [{}, {"thresholds": {}}, {"gamma": 0.5, "inner": 1}])
def test_blocks_times_calls_are_the_operations_of_the_whole_loop(models, image, settings):
    results = []
    whole = flops.count(lambda: results.append(run(models, image, **settings)))
    trace = results[0].trace
    expected = {"steps": 10, "inner": 2} | settings
    refined = expected.pop("thresholds", None) is None and trace.refined
    assert refined == ("thresholds" not in settings)  # both ways are counted
    calls = flops.released_calls(**expected, early=trace.early, refined=refined)
    assert calls == trace.calls
    assert whole == pytest.approx(flops.total(flops.blocks(flops.geometry_of(*models)), calls), rel=0.02)


def test_blocks_of_stable_diffusion_15():
    once = flops.blocks(flops.sd15())
    assert once.keys() == flops.BLOCKS.keys()
    assert once["unet"] == pytest.approx(0.80e12, rel=0.02)
    assert once["unet_maps"] < once["unet"] / 1.5
    assert once["unet_maps_grad"] == pytest.approx(once["unet_maps"] + once["attention_to_latents"])
    assert 2.9 * once["unet"] > once["unet_grad"] > 2 * once["unet"]
    assert once["decode_grad"] > 1.9 * once["decode"]
    assert flops.released_calls()["unet"] == 61 * 14 + 10 + 15 + 1


def test_seconds_follow_from_peak_and_utilisation():
    assert flops.seconds_on("A100", 312e12, 0.5) == pytest.approx(2)
    assert flops.seconds_on("H100", 989e12, 1) == pytest.approx(1)
