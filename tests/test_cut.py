"""The sampler of ``cut``: attention maps, guided steps and twin chains, against plainly written oracles."""

import math
from contextlib import contextmanager
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from generation.cut import guidance
from generation.cut.attention import MapReader, anomaly_map, smooth, words_of
from generation.cut.chain import Request, sample, timesteps
from generation.cut.guidance import align, attention_step, refine
from generation.cut.models import StableDiffusion, load_sd
from generation.cut.settings import CutParams
from generation.cut.tokens import token_positions
from manifests.errors import UsageError

NORMAL = "a photo of a bottle"
PROMPT = "a photo of a bottle with a crack on it"
DETAIL = "a photo of a bottle with a deep jagged crack that runs across its side"
SETTINGS = CutParams(steps=20, gamma=0.2, guidance=4, every=1, window=0.5)
PLAIN = {"attention": 0, "refinement": 0}


def settings(**changes):
    return CutParams(**{**SETTINGS.model_dump(), **changes})


def request(seed=0, *, shape=(64, 64), location=None, **texts):
    rng = np.random.default_rng(seed)
    _, width = shape
    x = np.broadcast_to(np.arange(width, dtype=np.float32), shape)
    image = 0.5 + 0.3 * np.sin(x / (5 + seed))[..., None] * np.array([1, 0.8, 0.6], np.float32)
    image = np.clip(image + rng.normal(0, 0.03, image.shape), 0, 1).astype(np.float32)
    place = np.ones(shape, bool) if location is None else location
    words = {"normal": NORMAL, "prompt": PROMPT, "detail": DETAIL, "word": "crack", **texts}
    return Request(image, place, seed=seed, **words)


def corner(shape=(64, 64)):
    """The upper left quarter, and one pixel of the next latent."""
    place = np.zeros(shape, bool)
    place[: shape[0] // 2 + 1, : shape[1] // 2] = True
    return place


class Spy(StableDiffusion):
    """Keeps every latent that is decoded."""

    def decode(self, latents):
        self.seen.append(latents.detach().clone())
        return super().decode(latents)


def spy(sd):
    found = Spy(**{field.name: getattr(sd, field.name) for field in fields(sd)})
    object.__setattr__(found, "seen", [])
    return found


@contextmanager
def counted(sd):
    """Every evaluation of the UNet that is begun: (rows, timestep)."""
    calls = []

    def hook(_module, args):
        calls.append((len(args[0]), int(torch.as_tensor(args[1]).flatten()[0])))

    handle = sd.unet.register_forward_pre_hook(hook)
    try:
        yield calls
    finally:
        handle.remove()


def chains(sd, requests, clip=None, **changes):
    """(twins, final latents of the anomaly chains, of the normal chains)."""
    watched = spy(sd)
    twins = sample(requests, watched, reader(sd), clip, settings(**changes))
    latents = torch.cat(watched.seen)[-2 * len(requests) :]
    return twins, latents[: len(requests)], latents[len(requests) :]


_READERS = {}


def reader(sd):
    """One a checkpoint: its hooks stay."""
    return _READERS.setdefault(id(sd), MapReader(sd))


def equal(one, other):
    return np.array_equal(one.anomaly, other.anomaly) and np.array_equal(one.normal, other.normal)


def noised(sd, at=301, shape=(16, 16), count=1, seed=0):
    """Latents, timesteps and the embedded prompt, as in the middle of a chain."""
    z = torch.randn(count, 4, *shape, generator=torch.Generator().manual_seed(seed))
    return z, torch.full((count,), at), sd.embed([PROMPT] * count)


# -- attention maps ---------------------------------------------------------------------------------------


class Eager:
    """Attention written out, which keeps its probabilities: the oracle of the maps."""

    def __init__(self):
        self.probabilities = []

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)
        query, key, value = (attn.head_to_batch_dim(x) for x in (query, key, value))
        scores = torch.einsum("bqd,bkd->bqk", query, key) / math.sqrt(query.shape[-1])
        weights = scores.softmax(-1)
        self.probabilities.append(weights.unflatten(0, (-1, attn.heads)))
        return attn.to_out[0](attn.batch_to_head_dim(weights @ value))


@contextmanager
def eager(sd):
    """The UNet with written-out cross-attention; gives the recording processors by layer name."""
    before = dict(sd.unet.attn_processors)
    processors = {name: Eager() for name in before if ".attn2." in name}
    sd.unet.set_attn_processor({**before, **processors})
    try:
        yield processors
    finally:
        sd.unet.set_attn_processor(before)


def level_names(sd):
    """Cross-attention layers with side × side queries at native size."""
    side = sd.unet.config.sample_size
    with eager(sd) as processors, torch.no_grad():
        sd.unet(torch.zeros(1, 4, side, side), 1, sd.embed([""]))
        return [n for n, p in processors.items() if p.probabilities[0].shape[2] == sd.attention_side**2]


def eager_maps(sd, z, t, text):
    """Every layer of the level, N×h×w×tokens each, and the UNet's output."""
    names = level_names(sd)
    with eager(sd) as processors:
        output = sd.unet(z, t, text).sample
    shrink = sd.unet.config.sample_size // sd.attention_side
    shape = (z.shape[2] // shrink, z.shape[3] // shrink)
    return [processors[n].probabilities[0].mean(1).unflatten(1, shape) for n in names], output


@pytest.mark.parametrize("shape", [(32, 32), (16, 24), (24, 8)])
@pytest.mark.parametrize("name", ["sd15", "wide", "sd2"])
def test_maps_are_those_of_written_out_attention_in_every_layer(name, shape, tiny_sd):
    sd = tiny_sd[name]
    z, t, text = noised(sd, shape=shape, count=2)
    layers, output = eager_maps(sd, z, t, text)
    assert len(layers) == reader(sd).layers == 5  # two on the way down, three on the way up (core.md 1.4)
    stored = []
    read = MapReader.__dict__["_store"]

    def keep(self, *args):
        read(self, *args)
        stored.extend([] if self._maps is None else self._maps[-1:])

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(MapReader, "_store", keep)
        fresh = load_like(sd)
        found = MapReader(fresh).maps(z, t, text)
    assert len(stored) == 5
    for one, wanted in zip(stored, layers, strict=True):
        torch.testing.assert_close(one, wanted.flatten(1, 2), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found, torch.stack(layers).mean(0), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.sum(-1), torch.ones(found.shape[:-1]))

    with torch.no_grad():
        whole, second = reader(sd).predict(z, t, text, slice(1, 2))
    torch.testing.assert_close(whole, output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, found[1:2], rtol=1e-4, atol=1e-6)


def load_like(sd):
    """The same checkpoint without anything attached."""
    return load_sd(sd.name)


def test_the_maps_are_ordered_as_the_latents(tiny_sd):
    """A difference in one corner of the latents changes the map most in the same corner."""
    sd = tiny_sd["wide"]
    z, t, text = noised(sd, shape=(16, 32))
    other = z.clone()
    other[..., :2, -2:] += 3
    with torch.no_grad():
        change = (reader(sd).maps(other, t, text) - reader(sd).maps(z, t, text)).abs().sum(-1)[0]
    assert change.shape == (8, 16)
    row, column = divmod(int(change.argmax()), 16)
    assert row < 4 and column >= 12


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_the_cut_off_pass_has_the_maps_and_gradients_of_the_whole_one(checkpointing, train, tiny_sd):
    """Also where layers are computed again during the backward pass, in eval and in train mode."""
    wide = tiny_sd["wide"]
    z, t, text = noised(wide)
    words = words_of(wide, [PROMPT], ["crack"])
    layers, _ = eager_maps(wide, z.requires_grad_(), t, text)
    wanted = torch.stack(layers).mean(0)
    (gradient,) = torch.autograd.grad(anomaly_map(wanted, words).max(), z)
    assert gradient.abs().max() > 0

    sd = load_like(wide)
    if checkpointing:
        sd.unet.enable_gradient_checkpointing()
    sd.unet.train(train)
    attached = MapReader(sd)
    for read in (attached.maps, lambda *given: attached.predict(*given, slice(None))[1]):
        z = z.detach().requires_grad_()
        maps = read(z, t, text)
        torch.testing.assert_close(maps, wanted, rtol=1e-4, atol=1e-6)
        (found,) = torch.autograd.grad(anomaly_map(maps, words).max(), z)
        torch.testing.assert_close(found, gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_a_whole_chain_is_the_same_with_gradient_checkpointing(tiny_sd, tiny_clip):
    sd = load_like(tiny_sd["wide"])
    both = []
    for _ in range(2):
        both.append(sample([request()], sd, reader(sd), tiny_clip, settings(gamma=0.1))[0])
        sd.unet.enable_gradient_checkpointing()
        sd.vae.enable_gradient_checkpointing()
    np.testing.assert_allclose(both[0].anomaly, both[1].anomaly, atol=1e-4)
    np.testing.assert_array_equal(both[0].normal, both[1].normal)


def test_the_cut_off_pass_leaves_out_the_rest_of_the_network(tiny_sd):
    sd = tiny_sd["wide"]
    ran = []
    handles = [sd.unet.conv_out.register_forward_hook(lambda *_: ran.append("end"))]
    with torch.no_grad():
        reader(sd).maps(*noised(sd))
        assert ran == []
        reader(sd).predict(*noised(sd), slice(None))
        sd.unet(*noised(sd))  # nobody reads: nothing is stopped
    assert ran == ["end", "end"]
    handles[0].remove()


def test_reading_does_not_outlive_an_error(tiny_sd):
    sd = tiny_sd["sd15"]
    z, t, text = noised(sd)
    with pytest.raises(RuntimeError), torch.no_grad():
        reader(sd).maps(z[:, :3], t, text)
    with torch.no_grad():
        assert sd.unet(z, t, text).sample.shape == z.shape


def test_only_the_prompts_own_words_take_part(tiny_sd):
    """Begin, end and padding may hold any probability: the softmax goes over the words between them."""
    sd = tiny_sd["sd15"]
    prompts = [PROMPT, "a crack"]
    words = words_of(sd, prompts, ["crack", "crack"])
    assert words.spoken.sum(1).tolist() == [10, 2]
    assert [row.nonzero().flatten().tolist() for row in words.anomaly] == [[8], [2]]
    maps = torch.rand(2, 5, 4, 77, generator=torch.Generator().manual_seed(0)) / 20
    found = anomaly_map(maps, words)
    other = torch.where(words.spoken[:, None, None], maps, torch.rand(2, 5, 4, 77))
    torch.testing.assert_close(anomaly_map(other, words), found, rtol=0, atol=0)
    for row, end, at in ((0, 11, 8), (1, 3, 2)):
        share = (100 * maps[row, :, :, 1:end]).softmax(-1)[..., at - 1]
        torch.testing.assert_close(found[row], written_out_smoothing(share), rtol=1e-4, atol=1e-6)


def written_out_smoothing(share):
    """core.md 1.4, step 4, one place at a time."""
    kernel = np.array([[math.exp(-(dy * dy + dx * dx)) for dx in (-1, 0, 1)] for dy in (-1, 0, 1)])
    kernel /= kernel.sum()
    padded = np.pad(share.numpy(), 1, mode="reflect")
    height, width = share.shape
    return torch.tensor(
        [[(padded[y : y + 3, x : x + 3] * kernel).sum() for x in range(width)] for y in range(height)],
        dtype=share.dtype,
    )


def test_smoothing_keeps_a_constant_and_the_smallest_maps(tiny_sd):
    for shape in ((1, 1), (1, 5), (2, 2), (3, 7)):
        torch.testing.assert_close(smooth(torch.full((2, *shape), 0.3)), torch.full((2, *shape), 0.3))


@pytest.mark.parametrize(
    ("prompt", "word", "tokens"),
    [
        ("a photo of a nut with a missing piece", "missing piece", 2),
        ("a photo of a nut with discolouration on it", "discolouration", 4),
    ],
)
def test_a_word_of_several_tokens_can_take_hold(prompt, word, tokens, tiny_sd):
    """The word's share of a place is that of all its tokens: 1 where no other word has any."""
    sd = tiny_sd["sd15"]
    words = words_of(sd, [prompt], [word])
    assert int((words.anomaly > 0).sum()) == tokens
    mine = words.anomaly[0] > 0
    maps = torch.zeros(1, 4, 4, 77)
    maps[..., mine] = 0.8 / tokens
    torch.testing.assert_close(anomaly_map(maps, words), torch.ones(1, 4, 4), rtol=1e-3, atol=1e-3)
    maps = torch.full((1, 4, 4, 77), 0.01)
    share = tokens / int(words.spoken.sum())
    torch.testing.assert_close(anomaly_map(maps, words), torch.full((1, 4, 4), share))


def test_a_word_that_is_not_in_its_prompt_is_refused(tiny_sd):
    with pytest.raises(UsageError, match=r"'dent'.*crack on it"):
        words_of(tiny_sd["sd15"], [PROMPT], ["dent"])


# -- guided steps -----------------------------------------------------------------------------------------


def push(sd, z, t, text, location, *, strength=1.0, progress=0.0, reach=1.0, start=None, prompt=PROMPT):
    words = words_of(sd, [prompt] * len(z), ["crack"] * len(z))
    return attention_step(reader(sd), z, t, text, words, location, strength, progress, reach, start)


def held(sd, z, t, text, location):
    maps = anomaly_map(reader(sd).maps(z, t, text), words_of(sd, [PROMPT] * len(z), ["crack"] * len(z)))
    side = maps.shape[-2:]
    inside = torch.nn.functional.adaptive_max_pool2d(location[:, None], side)[:, 0]
    return (maps * inside).amax(dim=(1, 2))


@pytest.fixture
def scene(tiny_sd):
    """Two samples with a location of their own each, in the middle of a chain."""
    sd = tiny_sd["wide"]
    location = torch.zeros(2, 16, 16)
    location[0, 2:8, 3:9] = 1
    location[1, 10:, :5] = 1
    return sd, *noised(sd, count=2), location


@torch.no_grad()
def test_one_step_raises_the_words_largest_attention_in_the_location(scene):
    sd, z, t, text, location = scene
    moved, start, before = push(sd, z, t, text, location)
    torch.testing.assert_close(before, held(sd, z, t, text, location))
    assert (held(sd, moved, t, text, location) > before).all()
    assert (start >= 1).all()
    outside = (location == 0)[:, None].expand_as(z)
    assert torch.equal(moved[outside], z[outside])
    assert (moved[~outside] != z[~outside]).float().mean() > 0.9


def step_length(z, moved, location):
    """Root mean square of each sample's step over its allowed latents, in units of a step at α = 1."""
    squares = (moved - z).square().sum(dim=(1, 2, 3)) / (4 * location.sum(dim=(1, 2)))
    return squares.sqrt() / guidance.ATTENTION_STEP


@torch.no_grad()
def test_the_step_follows_alpha_and_is_clipped(scene):
    """α = λ·(1 + Δ)·n / n_start in [0, 4λ] (core.md 1.8)."""
    sd, z, t, text, location = scene
    first, start, _ = push(sd, z, t, text, location, strength=2, progress=0.25)
    torch.testing.assert_close(step_length(z, first, location), torch.full((2,), 2.5), rtol=1e-3, atol=0)
    for factor, wanted in ((2, 1.25), (0.5, 5.0), (1 / 3, 7.5), (0.01, 8.0)):
        moved, kept, _ = push(sd, z, t, text, location, strength=2, progress=0.25, start=start * factor)
        torch.testing.assert_close(kept, start * factor)
        torch.testing.assert_close(
            step_length(z, moved, location), torch.full((2,), wanted), rtol=1e-3, atol=0
        )


@torch.no_grad()
def test_a_sample_whose_word_has_taken_hold_rests(scene):
    sd, z, t, text, location = scene
    before = held(sd, z, t, text, location)
    between = float(before.mean())
    assert before.min() < between < before.max()
    moved, _, _ = push(sd, z, t, text, location, reach=between)
    rests = before >= between
    assert torch.equal(moved[rests], z[rests])
    assert not torch.equal(moved[~rests], z[~rests])


@torch.no_grad()
def test_neighbours_do_not_change_a_step(scene):
    sd, z, t, text, location = scene
    both, _, _ = push(sd, z, t, text, location)
    for row in range(2):
        one = slice(row, row + 1)
        alone, _, _ = push(sd, z[one], t[one], text[one], location[one])
        torch.testing.assert_close(alone, both[one], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_empty_location_moves_nothing(scene):
    sd, z, t, text, location = scene
    moved, _, before = push(sd, z, t, text, torch.zeros_like(location))
    assert torch.equal(moved, z) and (before == 0).all()


@torch.no_grad()
def test_one_refining_step_raises_the_cosine_inside_the_location(scene, tiny_clip):
    sd, _, _, _, location = scene
    clean = sd.encode(torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(3)))
    detail = tiny_clip.text([DETAIL, "a stain"])
    moved, before = refine(sd, tiny_clip, clean, detail, location, 0.1)
    torch.testing.assert_close(before, tiny_clip.similarity(sd.decode(clean).clamp(0, 1), detail))
    assert (tiny_clip.similarity(sd.decode(moved).clamp(0, 1), detail) > before).all()
    outside = (location == 0)[:, None].expand_as(clean)
    assert torch.equal(moved[outside], clean[outside])
    twice, _ = refine(sd, tiny_clip, clean, detail, location, 0.2)
    torch.testing.assert_close(twice - clean, 2 * (moved - clean), rtol=1e-3, atol=1e-6)
    still, _ = refine(sd, tiny_clip, clean, detail, location, 0.0)
    assert torch.equal(still, clean)


@pytest.mark.parametrize("word", ["crack", "jagged crack"])
def test_align_turns_the_words_rows_towards_the_description(word, tiny_sd):
    """core.md 1.7: mean(E_detail) − mean(E_normal), over the prompts' own tokens, is the direction."""
    sd = tiny_sd["sd15"]
    prompt = PROMPT.replace("crack", word)
    text, normal, detail = (sd.embed([t, "a crack"]) for t in (prompt, NORMAL, DETAIL))
    words = words_of(sd, [prompt, "a crack"], [word, "crack"])
    spoken = [words_of(sd, [t, "a crack"], ["a", "a"]).spoken for t in (NORMAL, DETAIL)]
    moved = align(text, normal, detail, words, (spoken[0], spoken[1]))
    mine = token_positions(sd, prompt, word)
    others = [row for row in range(77) if row not in mine]
    assert torch.equal(moved[0, others], text[0, others])
    torch.testing.assert_close(moved.norm(dim=-1), text.norm(dim=-1))

    def mean(table, one):
        return table[0, 1 : len(sd.tokenizer(one)["input_ids"]) - 1].mean(0)

    origin = mean(normal, NORMAL)
    direction = mean(detail, DETAIL) - origin
    for row in mine:
        before, after = (torch.cosine_similarity(e[0, row] - origin, direction, dim=0) for e in (text, moved))
        assert after > before + 0.01


# -- chains -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [10, 50, 100, 200, 999, 1000])
@pytest.mark.parametrize("gamma", [0.0, 0.05, 0.25, 0.3, 0.5, 0.75, 1.0])
def test_the_executed_timesteps_are_the_last_of_the_schedulers(steps, gamma):
    oracle = DDIMScheduler(steps_offset=1 if steps < 1000 else 0, timestep_spacing="leading")
    oracle.set_timesteps(steps)
    count = int(steps * gamma)
    found = timesteps(1000, steps, gamma)
    assert len(found) == count
    assert found == oracle.timesteps.tolist()[steps - count :]


@pytest.mark.parametrize(("twin", "evaluations"), [("normal", 3), ("shared", 2), ("empty", 4)])
def test_evaluations_a_step(twin, evaluations, tiny_sd):
    sd = tiny_sd["sd15"]
    with counted(sd) as calls:
        chains(sd, [request(0), request(1)], twin=twin, steps=50, gamma=0.07, **PLAIN)
    assert calls == [(2 * evaluations, at) for at in (41, 21, 1)]


@pytest.mark.parametrize(("every", "inner", "guided"), [(1, 1, 4), (1, 2, 8), (3, 1, 2), (9, 2, 2)])
def test_guided_steps_of_a_chain(every, inner, guided, tiny_sd):
    sd = tiny_sd["sd15"]
    with counted(sd) as calls:
        chains(sd, [request()], every=every, inner=inner, refinement=0, reach=1, twin="shared")
    assert sum(rows == 1 for rows, _ in calls) == guided
    assert sum(rows == 2 for rows, _ in calls) == 4


@pytest.mark.parametrize("gamma", [0.0, 0.04])
def test_no_step_gives_the_round_trip_of_the_picture_and_identical_twins(gamma, tiny_sd, tiny_clip):
    sd = tiny_sd["sd15"]
    asked = [request(0), request(1, location=corner())]
    with counted(sd) as calls:
        twins = sample(asked, sd, reader(sd), tiny_clip, settings(gamma=gamma))
    assert calls == []
    for one, found in zip(asked, twins, strict=True):
        image = torch.from_numpy(one.image).permute(2, 0, 1)[None]
        with torch.no_grad():
            trip = sd.decode(sd.encode(image)).clamp(0, 1)[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(found.anomaly, found.normal)
        np.testing.assert_allclose(found.normal, trip, atol=5e-5)  # another batch, another rounding
        assert found.attention.shape == (64, 64) and np.isfinite(found.attention).all()


def test_same_seed_same_pictures_and_another_seed_others(tiny_sd, tiny_clip):
    sd = tiny_sd["sd15"]
    first, again = (sample([request(0)], sd, reader(sd), tiny_clip, SETTINGS)[0] for _ in range(2))
    assert equal(first, again) and np.array_equal(first.attention, again.attention)
    assert first.trace == again.trace and all(math.isfinite(value) for value in first.trace.values())
    (other,) = sample([replace(request(0), seed=1)], sd, reader(sd), tiny_clip, SETTINGS)
    assert np.abs(other.normal - first.normal).max() > 1e-4
    assert np.abs(other.anomaly - first.anomaly).max() > 1e-4
    (other,) = sample([replace(request(0), prompt="a crack")], sd, reader(sd), tiny_clip, SETTINGS)
    np.testing.assert_allclose(other.normal, first.normal, atol=1e-5)
    assert np.abs(other.anomaly - first.anomaly).max() > 1e-4


def test_the_global_random_state_plays_no_part(tiny_sd):
    sd = tiny_sd["sd15"]
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    one, _, _ = chains(sd, [request()], **PLAIN)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    other, _, _ = chains(sd, [request()], **PLAIN)
    assert equal(one[0], other[0])


@pytest.mark.parametrize("name", ["sd15", "sd2"])
@pytest.mark.parametrize(("steps", "gamma"), [(10, 0.5), (8, 1.0)])
def test_plain_chains_are_those_of_diffusers(name, steps, gamma, tiny_sd, tiny):
    """Guidance 1, no guided step, the whole picture allowed: DDIM with η = 0 for each prompt.

    Step by step on the outputs that our loop got, because a random network amplifies rounding.
    """
    sd, asked, seen = tiny_sd[name], [request(3), request(4)], []
    handle = sd.unet.register_forward_hook(lambda _module, args, out: seen.append((*args, out.sample)))
    _, anomaly, normal = chains(sd, asked, steps=steps, gamma=gamma, guidance=1, twin="shared", **PLAIN)
    handle.remove()

    scheduler = DDIMScheduler.from_pretrained(tiny[name], subfolder="scheduler", clip_sample=False)
    assert scheduler.config.prediction_type == {"sd15": "epsilon", "sd2": "v_prediction"}[name]
    scheduler.set_timesteps(steps)
    executed = scheduler.timesteps[steps - int(steps * gamma) :]
    images = torch.from_numpy(np.stack([one.image for one in asked])).permute(0, 3, 1, 2)
    noises = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(one.seed)) for one in asked]
    noisy = scheduler.add_noise(sd.encode(images), torch.stack(noises), executed[:1].expand(2))
    z, texts = torch.cat([noisy, noisy]), sd.embed([PROMPT] * 2 + [NORMAL] * 2)
    assert len(seen) == len(executed)
    for t, (given, at, text, output) in zip(executed, seen, strict=True):
        assert (at == t).all()
        torch.testing.assert_close(text, texts)
        torch.testing.assert_close(given, z, rtol=1e-4, atol=1e-5)
        z = scheduler.step(output, t, given, eta=0).prev_sample
    torch.testing.assert_close(torch.cat([anomaly, normal]), z, rtol=1e-4, atol=1e-5)
    assert (anomaly - normal).abs().max() > 1e-3


@pytest.mark.parametrize("twin", ["normal", "shared", "empty"])
def test_guidance_of_one_step_is_the_written_out_formula(twin, tiny_sd, tiny):
    """core.md 1.16, with one executed step from one noised start, so that both latents are equal."""
    sd, weight = tiny_sd["sd15"], 5.0
    _, anomaly, normal = chains(sd, [request()], twin=twin, steps=20, gamma=0.05, guidance=weight, **PLAIN)
    scheduler = DDIMScheduler.from_pretrained(tiny["sd15"], subfolder="scheduler", clip_sample=False)
    scheduler.set_timesteps(20)
    image = torch.from_numpy(request().image).permute(2, 0, 1)[None]
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    z = scheduler.add_noise(sd.encode(image), noise, torch.tensor([1]))
    with torch.no_grad():
        a, n, e = (sd.unet(z, 1, sd.embed([text])).sample for text in (PROMPT, NORMAL, ""))
    wanted = (e + weight * (a - e), e + weight * (n - e)) if twin == "empty" else (n + weight * (a - n), n)
    for found, output in zip((anomaly, normal), wanted, strict=True):
        torch.testing.assert_close(found, scheduler.step(output, 1, z).prev_sample, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["sd15", "sd2"])
@pytest.mark.parametrize("twin", ["normal", "shared", "empty"])
def test_outside_the_location_both_chains_are_one(name, twin, tiny_sd, tiny_clip):
    """A latent is allowed if any of its pixels is; guided and refined steps are on."""
    sd = tiny_sd[name]
    asked = [request(0, location=corner()), request(1, location=corner()[::-1, ::-1].copy())]
    twins, anomaly, normal = chains(sd, asked, tiny_clip, twin=twin, align=True)
    inside = torch.zeros(2, 8, 8, dtype=torch.bool)
    inside[0, :5, :4] = True
    inside[1, 3:, 4:] = True
    same = (anomaly == normal).all(dim=1)
    assert same[~inside].all()
    assert not same[inside].any()
    for found in twins:
        assert found.anomaly.shape == found.normal.shape == (64, 64, 3)
        assert found.anomaly.dtype == found.attention.dtype == np.float32
        assert found.anomaly.min() >= 0 and found.anomaly.max() <= 1
        assert found.attention.min() >= 0 and found.attention.max() <= 1


def test_what_acts_on_the_anomaly_chain_leaves_the_normal_one_alone(tiny_sd, tiny_clip):
    sd = tiny_sd["sd15"]
    _, plain, normal = chains(sd, [request(location=corner())], **PLAIN)
    for changes, clip in (
        ({"attention": 10, "refinement": 0}, None),
        ({"attention": 0, "refinement": 1}, tiny_clip),
        ({"guidance": 9, **PLAIN}, None),
        ({"align": True, **PLAIN}, None),
    ):
        _, anomaly, twin = chains(sd, [request(location=corner())], clip, **changes)
        torch.testing.assert_close(twin, normal, rtol=0, atol=1e-5)
        assert (anomaly - plain).abs().max() > 1e-4, changes


def test_refinement_acts_in_the_last_part_only(tiny_sd, tiny_clip):
    """window 0.5 of 4 executed steps: two passes through decoder and CLIP, the last two."""
    sd = tiny_sd["sd15"]
    for window, steps in ((0.5, 2), (0.01, 1), (1.0, 4)):
        watched = spy(sd)
        (found,) = sample([request()], watched, reader(sd), tiny_clip, settings(window=window))
        assert len(watched.seen) == steps + 2  # and both ends
        assert math.isfinite(found.trace["cosine"])
    (found,) = sample([request()], sd, reader(sd), None, SETTINGS)
    assert math.isnan(found.trace["cosine"])


def test_guided_chains_end_with_more_attention_and_a_better_cosine(tiny_sd, tiny_clip):
    """Against the same chains without guided steps, the objectives measured by us on the final latents."""
    sd = tiny_sd["wide"]
    asked = [request(seed, location=corner()) for seed in range(3)]
    t, text = torch.ones(3, dtype=torch.int64), sd.embed([PROMPT] * 3)
    location = torch.zeros(3, 8, 8)
    location[:, :5, :4] = 1
    detail = tiny_clip.text([DETAIL])
    _, plain, _ = chains(sd, asked, **PLAIN)
    _, guided, _ = chains(sd, asked, refinement=0, reach=1, attention=3)
    _, refined, _ = chains(sd, asked, tiny_clip, attention=0, refinement=0.2)
    with torch.no_grad():
        assert held(sd, guided, t, text, location).mean() > held(sd, plain, t, text, location).mean()
        before, after = (tiny_clip.similarity(sd.decode(z).clamp(0, 1), detail) for z in (plain, refined))
    assert after.mean() > before.mean()


@pytest.mark.parametrize("shape", [(64, 128), (192, 64)])
def test_pictures_that_are_not_square(shape, tiny_sd, tiny_clip):
    place = np.zeros(shape, bool)
    place[: shape[0] // 2, : shape[1] // 2] = True
    for name in ("sd15", "wide"):
        sd = tiny_sd[name]
        twins, anomaly, normal = chains(sd, [request(shape=shape, location=place)], tiny_clip, gamma=0.1)
        assert twins[0].anomaly.shape == (*shape, 3) and twins[0].attention.shape == shape
        differs = (anomaly != normal).any(dim=1)[0]
        rows, columns = (side // 16 for side in shape)
        assert differs[:rows, :columns].all()
        assert not differs[rows:].any() and not differs[:, columns:].any()


def test_neighbours_in_a_batch_change_rounding_only(tiny_sd, tiny_double):
    """Four chains at once against each alone: within a level of 255 where twins differ by more than 10.

    A random network amplifies rounding (its lowest level normalises groups of a few values), so guided chains
    are compared in double precision, and at the native size.
    """
    asked = [request(seed, shape=(128, 128), location=corner((128, 128))) for seed in range(4)]
    for sd, changes in ((tiny_sd["sd15"], PLAIN), (tiny_double, {"attention": 1, "gamma": 0.1})):
        together = sample(asked, sd, reader(sd), None, settings(**changes))
        for one, found in zip(asked, together, strict=True):
            (alone,) = sample([one], sd, reader(sd), None, settings(**changes))
            assert 255 * np.abs(alone.anomaly - found.anomaly).max() < 1
            assert 255 * np.abs(alone.normal - found.normal).max() < 0.1
            assert 255 * np.abs(found.anomaly - found.normal).max() > 10


def test_networks_of_half_precision(tiny_sd, tiny_clip):
    """As on a GPU: latents, maps and pictures stay float32."""
    sd, wide = tiny_sd["sd15"], tiny_sd["wide"]
    half = load_sd(wide.name, dtype="bfloat16")
    z, t, text = noised(wide)
    with torch.no_grad():
        maps = reader(half).maps(z, t, text)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:-1]))
    torch.testing.assert_close(maps, reader(wide).maps(z, t, text).detach(), rtol=0.2, atol=0.01)
    half = load_sd(sd.name, dtype="bfloat16")
    changes = {"align": True, "gamma": 0.1}
    found, _, _ = chains(half, [request(location=corner())], tiny_clip, **changes)
    wanted, _, _ = chains(sd, [request(location=corner())], tiny_clip, **changes)
    assert found[0].anomaly.dtype == np.float32 and np.isfinite(found[0].anomaly).all()
    assert np.abs(found[0].normal - wanted[0].normal).mean() < 0.05


def test_a_word_of_several_tokens_in_a_chain(tiny_sd, tiny_clip):
    texts = {"prompt": "a photo of a bottle with discolouration on it", "word": "discolouration"}
    (found,) = sample(
        [request(**texts)], tiny_sd["sd15"], reader(tiny_sd["sd15"]), tiny_clip, settings(align=True)
    )
    assert np.isfinite(found.anomaly).all() and math.isfinite(found.trace["attention"])
    with pytest.raises(UsageError, match="does not hold the anomaly word"):
        sample([request(word="dent")], tiny_sd["sd15"], reader(tiny_sd["sd15"]), None, SETTINGS)
