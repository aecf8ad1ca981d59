"""The dual path, its cache and the whole refinement against the outputs of the authors' code.

`reference/wide` and `reference/odd` hold what the authors' code computed, in float32 on a CPU, with
two tiny random models. The authors hard-code 1560 native tokens, whatever the model; so
`scale_tokens` is 1560 here.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from diffusers.utils.torch_utils import randn_tensor
from oracle import relative, seeded
from references import REFINEMENTS, as_clip, interval_of, load, names, refined

from freeswim import (
    FlowUniPC,
    attention_scale,
    dense_window,
    draw_noise,
    generate,
    grouped_window,
    no_window,
    predict_cached,
    predict_dual,
    upsample,
)
from model import full_attention


@pytest.fixture(scope="module")
def sets():
    return {name: load(name) for name in ("wide", "odd")}


@pytest.fixture(params=["wide", "odd"])
def case(request, sets):
    return sets[request.param]


# --------------------------------------------------------------------------------------------------
# Parity


def test_single_passes(case):
    expected = case.expected
    text = expected["text"]
    negative = expected["negative"]
    now = case.transformer, expected["latents"], expected["timestep"]
    later = case.transformer, expected["latents_next"], expected["timestep_next"]
    attends = case.window, case.full
    cache = {}
    passes = {
        "dual_full": case.transformer(*now[1:], text, case.full),
        "dual_window": predict_dual(*now, text, *attends),
        "dual_window_negative": predict_dual(*now, negative, *attends),
        "guide_window": predict_dual(*now, text, *attends, cache),
        "reuse_window": predict_cached(*later, text, case.window, cache),
        "window_only_negative": case.transformer(*later[1:], negative, case.window),
    }
    errors = {name: relative(velocity, expected[name]) for name, velocity in passes.items()}
    assert all(error <= 1e-4 for error in errors.values()), errors


def test_every_step_without_cache(case):
    expected = case.expected["nocache.trace"]
    states = []
    shown = []

    def progress(steps):
        shown.extend(steps)
        return steps

    end = refined(case, save=states.append, progress=progress)
    assert len(shown) == len(expected)
    saved = [int(state["step"]) for state in states]
    assert saved == list(range(len(expected)))
    trace = [state["latents"] for state in states[1:]]
    for latents, step in zip([*trace, end], expected, strict=True):
        assert relative(latents[0], step) <= 1e-3


@pytest.mark.parametrize("name, tensor", REFINEMENTS)
def test_whole_refinement(sets, name, tensor):
    case = sets[name]
    latents = refined(case, cache_interval=interval_of(tensor))
    assert relative(latents, case.expected[tensor]) <= 1e-3


def test_schedule_and_first_noise(case):
    meta = case.meta
    expected = case.expected
    solver = FlowUniPC(meta["steps"], meta["flow_shift"], meta["strength"])
    kept = len(meta["timesteps"])
    assert solver.timesteps == meta["timesteps"]
    sigmas = torch.tensor(meta["sigmas"][-kept - 1 :])
    assert (solver.sigmas - sigmas).abs().max() <= 1e-6
    noise = torch.randn(expected["encoded"].shape, generator=seeded(meta["noise_seed"]))
    noised = solver.add_noise(expected["encoded"], noise)
    assert relative(noised, expected["init_latents"]) <= 1e-6


def test_from_video_to_video(case):
    expected = case.expected
    encoded = case.vae.encode(as_clip(expected["video"]))
    assert relative(encoded, expected["encoded"]) <= 1e-4
    latents = refined(case, latents=encoded)
    assert relative(latents, expected["nocache.latents"]) <= 1e-3
    if "decoded" in expected:
        decoded = case.vae.decode(expected["nocache.latents"])
        assert relative(decoded, expected["decoded"]) <= 1e-4
        decoded = case.vae.decode(latents)
        assert relative(decoded, expected["decoded"]) <= 1e-3


def test_every_reference_tensor_is_used():
    inputs = {"latents", "timestep", "latents_next", "timestep_next", "text", "negative", "video"}
    passes = {"dual_full", "dual_window", "dual_window_negative", "guide_window"}
    passes |= {"reuse_window", "window_only_negative"}
    others = {"mask", "encoded", "init_latents", "nocache.trace"}
    for name, extra in (("wide", {"cache1", "cache2", "cache5"}), ("odd", {"cache3"})):
        whole = {f"{kind}.latents" for kind in extra | {"nocache"}}
        decoded = {"decoded"} if name == "odd" else set()
        assert set(names(name)) == inputs | passes | others | whole | decoded


# --------------------------------------------------------------------------------------------------
# Every ingredient matters: without it the result is off by more than ten times the tolerance.


@pytest.mark.parametrize(
    "change",
    [
        {"override": False},
        {"window_attention": no_window},
        {"window_attention": partial(grouped_window, border="clipped")},
        {"scale_tokens": 2},
        {"cache_interval": 1},
        {"cache_interval": 3},
    ],
    ids=["no override", "no window", "clipped", "scale", "interval 1", "interval 3"],
)
def test_every_ingredient_matters(case, change):
    assert relative(refined(case, **change), case.expected["nocache.latents"]) > 1e-2


def test_a_slightly_wrong_scale_matters(case):
    """The ordinary scale and that of the tiny models' true token count are within 6% of the right
    one. A refinement shows them, but averages them out to two or three times its tolerance; single
    passes show them clearly."""
    expected = case.expected
    assert relative(refined(case, scale_tokens=None), expected["nocache.latents"]) > 1e-3
    rows, columns = case.meta["native"]
    of_true_count = attention_scale(case.transformer.head_dim, rows * columns)
    for wrong in (None, of_true_count):
        window = dense_window(tuple(case.meta["grid"]), case.window_size, scale=wrong)
        full = partial(full_attention, scale=wrong)
        inputs = expected["latents"], expected["timestep"], expected["text"]
        for attend_window, attend_full in (
            (window, full),
            (case.window, full),
            (window, case.full),
        ):
            velocity = predict_dual(case.transformer, *inputs, attend_window, attend_full)
            assert relative(velocity, expected["dual_window"]) > 1e-3


@pytest.mark.parametrize("head_dim, native_tokens", [(128, 1560), (20, 1560), (64, 8)])
def test_attention_scale_is_the_papers(head_dim, native_tokens):
    scale = attention_scale(head_dim, native_tokens)
    logarithm = scale**2 * head_dim
    assert native_tokens**logarithm == pytest.approx(2 * native_tokens)  # what log_n(2n) means


# --------------------------------------------------------------------------------------------------
# The cache is read, never written; nothing is kept between calls; no work is thrown away.


def test_the_cache_is_only_read(case):
    expected = case.expected
    text = expected["text"]
    now = case.transformer, expected["latents"], expected["timestep"], text
    latents = expected["latents_next"].clone()
    later = case.transformer, latents, expected["timestep_next"], text
    cache = {}
    guide = predict_dual(*now, case.window, case.full, cache)
    assert len(cache) == case.transformer.config["num_layers"]
    kept = {block: tensor.clone() for block, tensor in cache.items()}
    first = predict_cached(*later, case.window, cache)
    second = predict_cached(*later, case.window, cache)
    assert torch.equal(first, second)
    assert torch.equal(latents, expected["latents_next"])
    assert cache.keys() == kept.keys()
    for block, before in kept.items():
        assert torch.equal(cache[block], before)
    # A second caching step replaces every one of them, and none of the first has a part in it.
    predict_dual(*later, case.window, case.full, cache)
    for block, before in kept.items():
        assert not torch.equal(cache[block], before)
    again = predict_dual(*now, case.window, case.full, cache)
    assert torch.equal(again, guide)
    for block, before in kept.items():
        assert torch.equal(cache[block], before)


def test_without_override_a_pass_is_the_transformers_own(case):
    """And a dual pass whose two attentions are the same is that of one path."""
    expected = case.expected
    inputs = expected["latents"], expected["timestep"], expected["text"]
    alone = case.transformer(*inputs, case.window)
    dual = predict_dual(case.transformer, *inputs, case.window, case.window)
    assert relative(dual, alone) <= 1e-6


@pytest.mark.parametrize("interval", [None, 2])
def test_refinements_share_nothing(case, interval):
    encoded = case.expected["encoded"].clone()
    first = refined(case, latents=encoded, cache_interval=interval)
    assert torch.equal(encoded, case.expected["encoded"])
    refined(case, latents=-encoded, cache_interval=1)
    assert torch.equal(refined(case, latents=encoded, cache_interval=interval), first)


def test_clips_of_a_batch_do_not_mix(case):
    expected = case.expected
    latents = torch.cat([expected["latents"], expected["latents_next"]])
    timestep = torch.cat([expected["timestep"], expected["timestep_next"]])
    text = torch.cat([expected["text"], expected["negative"]])
    inputs = latents, timestep, text

    def passes(clip):
        mine = (case.transformer, *(part[clip] for part in inputs))
        cache = {}
        return [
            case.transformer(*mine[1:], case.window),
            predict_dual(*mine, case.window, case.full, cache),
            predict_cached(*mine, case.window, cache),
        ]

    together = passes(slice(0, 2))
    for clip in (slice(0, 1), slice(1, 2)):
        for both, alone in zip(together, passes(clip), strict=True):
            assert relative(both[clip], alone) <= 1e-5


def work(case, **options):
    """How many clips went through the first self-attention, the first cross-attention and the last
    feed-forward network in a refinement. (Clips, not calls: how they are batched and chunked does
    not count.)"""
    first = case.transformer.blocks[0]
    last = case.transformer.blocks[-1]
    parts = first.self_attn, first.cross_attn, last.ffn
    elements = dict.fromkeys(parts, 0)

    def count(part, inputs, output):
        elements[part] += output.numel()

    hooks = [part.register_forward_hook(count) for part in parts]
    refined(case, **options)
    for hook in hooks:
        hook.remove()
    frames, height, width = case.meta["grid"]
    of_a_clip = frames * height * width * case.transformer.dim
    return [elements[part] / of_a_clip for part in parts]


def test_no_work_is_thrown_away(case):
    steps = len(case.meta["timesteps"])
    guides = len(range(0, steps, 3))
    # Dual: two branches, two prompts; cross-attention in the full branch only, which ends with its
    # last one.
    assert work(case) == [4 * steps, 2 * steps, 2 * steps]
    # Cached: the two window branches at every step, the full branch at the caching steps;
    # cross-attention is the full branch's and the negative's own.
    assert work(case, cache_interval=3) == [2 * steps + guides, steps + guides, 2 * steps]


def test_guidance_1_skips_the_negative_pass(case):
    """Whatever the negative prompt is, and with none, the result is the same."""
    for options in ({}, {"cache_interval": 3}, {"override": False}):
        expected = refined(case, guidance=1, **options)
        for negative in (case.expected["negative"] + 1, None):
            changed = case.expected | {"negative": negative}
            other = SimpleNamespace(**(vars(case) | {"expected": changed}))
            assert torch.equal(refined(other, guidance=1, **options), expected)
    steps = len(case.meta["timesteps"])
    assert work(case, guidance=1) == [2 * steps, steps, steps]
    text = case.expected["text"]
    draws = [seeded(0) for _ in range(3)]
    settings = dict(steps=2, guidance=1)
    shape = (1, 16, 1, 4, 4)
    expected = generate(case.transformer, text, text, shape, generator=draws[0], **settings)
    for negative, draw in ((None, draws[1]), (text + 1, draws[2])):
        latents = generate(case.transformer, text, negative, shape, generator=draw, **settings)
        assert torch.equal(latents, expected)


def test_a_generator_for_each_clip(case):
    """The same noise as each clip would have alone, as in Diffusers; whatever the default dtype."""
    text = case.expected["text"].expand(2, -1, -1)
    shape = (2, 16, 1, 4, 4)
    one_clip = (1, 16, 1, 4, 4)
    draws = [seeded(seed) for seed in (5, 6)]
    together = generate(case.transformer, text, text, shape, steps=2, generator=draws)
    for row, seed in enumerate((5, 6)):
        draw = seeded(seed)
        prompt = text[:1]
        alone = generate(case.transformer, prompt, prompt, one_clip, steps=2, generator=draw)
        assert relative(together[row : row + 1], alone) <= 1e-5
    expected = draw_noise(shape, seeded(5), "cpu")
    torch.set_default_dtype(torch.float64)
    try:
        noise = draw_noise(shape, seeded(5), "cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(noise, expected)
    theirs = randn_tensor(shape, [seeded(seed) for seed in (5, 6)])
    draws = [seeded(seed) for seed in (5, 6)]
    assert torch.equal(draw_noise(shape, draws, "cpu"), theirs)


# --------------------------------------------------------------------------------------------------
# Upsampling


@pytest.mark.parametrize("size", [(12, 20), (15, 11), (6, 10), (3, 4)])
def test_upsampling_is_bilinear_with_half_pixel_centres(size):
    video = torch.randn(2, 3, 2, 6, 10, generator=seeded(0))

    def interpolation(old, new):
        """The matrix (new, old) that samples an axis at its new pixels' centres, without
        antialiasing."""
        matrix = torch.zeros(new, old)
        for pixel in range(new):
            centre = (pixel + 0.5) * old / new - 0.5
            position = min(max(centre, 0), old - 1)
            left = int(position)
            right = min(left + 1, old - 1)
            share = position - left
            matrix[pixel, left] += 1 - share
            matrix[pixel, right] += share
        return matrix

    height, width = size
    rows = interpolation(6, height) @ video
    expected = rows @ interpolation(10, width).T
    assert relative(upsample(video, height, width), expected) <= 1e-6
