"""FreeSwim in NumPy: the transformer, the inward window, both paths with override and cache, and
the flow solver.

A port to start from, and an oracle: it shares no code with the rest, and is plain instead of fast,
for one clip at a time. `python tests/port/port_numpy.py OUT.safetensors` writes what it computes
for the reference set `odd`, step by step; `python tests/port/port_check.py OUT.safetensors`
compares it. Tokens are (N, D) in (h, w, t) order, time innermost.
"""

import json
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

PORT = Path(__file__).parent
REFERENCE = PORT.parent / "reference"


def forget(name, value):
    """What is done with intermediate values; another `note` may keep them."""


def linear(weights, name, x):
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def layer_norm(x, weight=1.0, bias=0.0):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(
        x.var(-1, keepdims=True) + 1e-6
    ) * weight + bias


def rms_norm(x, weight):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rotary_angles(grid, head_dim):
    """(N, head_dim / 2): what each token's channel pairs are rotated by, some by its frame, others
    by row or column."""
    share = 2 * (head_dim // 6)
    split = head_dim - 2 * share, share, share
    frequencies = [10000.0 ** (-np.arange(0, channels, 2) / channels) for channels in split]
    return np.array(
        [
            np.concatenate([t * frequencies[0], h * frequencies[1], w * frequencies[2]])
            for h in range(grid[1])
            for w in range(grid[2])
            for t in range(grid[0])
        ]
    )


def rotate(x, angles):
    """Rotate neighbouring pairs of channels of `x`, (N, heads, head_dim)."""
    pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)


def attend(query, key, value, scale, mask=None):
    """Softmax attention of (N, heads, head_dim) to (M, heads, head_dim); `mask` (N, M) says which
    pairs there are."""
    scores = np.einsum("nhd,mhd->hnm", query, key) * scale
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hnm,mhd->nhd", scores / scores.sum(-1, keepdims=True), value)


def self_attention(weights, block, tokens, modulation, heads, angles, scale, mask, note):
    shift, scale_by, gate = modulation[:3]
    note("modulated", x := layer_norm(tokens) * (1 + scale_by) + shift)
    query, key, value = (linear(weights, f"{block}.attn1.to_{part}", x) for part in "qkv")
    note("query.linear", query), note("key.linear", key), note("value", value)
    query, key = (
        rms_norm(y, weights[f"{block}.attn1.norm_{part}.weight"])
        for part, y in (("q", query), ("k", key))
    )
    note("query.norm", query), note("key.norm", key)  # over all heads
    query, key, value = (y.reshape(len(y), heads, -1) for y in (query, key, value))
    query, key = rotate(query, angles), rotate(key, angles)
    note("query.rotated", query), note("key.rotated", key)
    note("attended", attended := attend(query, key, value, scale, mask).reshape(tokens.shape))
    tokens = tokens + gate * linear(weights, f"{block}.attn1.to_out.0", attended)
    note("self_attention", tokens)
    return tokens


def cross_attention(weights, block, tokens, text, heads):
    x = layer_norm(tokens, weights[f"{block}.norm2.weight"], weights[f"{block}.norm2.bias"])
    query = rms_norm(
        linear(weights, f"{block}.attn2.to_q", x), weights[f"{block}.attn2.norm_q.weight"]
    )
    key = rms_norm(
        linear(weights, f"{block}.attn2.to_k", text), weights[f"{block}.attn2.norm_k.weight"]
    )
    value = linear(weights, f"{block}.attn2.to_v", text)
    query, key, value = (y.reshape(len(y), heads, -1) for y in (query, key, value))
    attended = attend(query, key, value, query.shape[-1] ** -0.5)  # the ordinary scale, and no mask
    return linear(weights, f"{block}.attn2.to_out.0", attended.reshape(tokens.shape))


def feed_forward(weights, block, tokens, modulation):
    shift, scale_by, gate = modulation[3:]
    x = layer_norm(tokens) * (1 + scale_by) + shift
    x = linear(weights, f"{block}.ffn.net.2", gelu(linear(weights, f"{block}.ffn.net.0.proj", x)))
    return tokens + gate * x


def predict(
    weights, config, latents, timestep, text, scale, mask, dual, features=None, note=forget
):
    """The velocity that the window path predicts at `latents`, (16, T, 2H, 2W); `text` is (L,
    text_dim). With `dual`, the full path runs beside it and its cross-attention outputs take the
    place of the window path's; they are kept in `features`, if that is a dict. Without `dual`,
    those in `features` take it; without both, it has its own."""
    _, frames, rows, columns = latents.shape
    grid = frames, rows // 2, columns // 2
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    patches = (
        latents.reshape(16, frames, grid[1], 2, grid[2], 2)
        .transpose(2, 4, 1, 0, 3, 5)
        .reshape(-1, 64)
    )
    window = (
        patches @ weights["patch_embedding.weight"].reshape(-1, 64).T
        + weights["patch_embedding.bias"]
    )  # (N, D)
    note("patches", window)
    half = config["freq_dim"] // 2
    phase = timestep * np.exp(-math.log(10000) * np.arange(half) / half)
    time = np.concatenate([np.cos(phase), np.sin(phase)])
    time = silu(linear(weights, "condition_embedder.time_embedder.linear_1", time))
    note("time", time := linear(weights, "condition_embedder.time_embedder.linear_2", time))
    note(
        "modulation",
        modulation := linear(weights, "condition_embedder.time_proj", silu(time)).reshape(6, -1),
    )
    text = gelu(linear(weights, "condition_embedder.text_embedder.linear_1", text))
    note("text", text := linear(weights, "condition_embedder.text_embedder.linear_2", text))
    angles = rotary_angles(grid, head_dim)
    note("rotary.cos", np.cos(angles)), note("rotary.sin", np.sin(angles))
    full = window
    for index in range(config["num_layers"]):
        block, six = f"blocks.{index}", modulation + weights[f"blocks.{index}.scale_shift_table"][0]
        note_here = (lambda name, value: note(f"block0.{name}", value)) if index == 0 else forget
        window = self_attention(weights, block, window, six, heads, angles, scale, mask, note_here)
        if dual:
            full = self_attention(weights, block, full, six, heads, angles, scale, None, forget)
            content = cross_attention(weights, block, full, text, heads)
            full = feed_forward(weights, block, full + content, six)
            note(f"block{index}.full_tokens", full)
            if features is not None:
                features[index] = content
        elif features is not None:
            content = features[index]
        else:
            content = cross_attention(weights, block, window, text, heads)
        note_here("cross_attention", content)
        window = feed_forward(weights, block, window + content, six)
        note(f"block{index}.window_tokens", window)
    shift, scale_by = weights["scale_shift_table"][0] + time
    patches = linear(
        weights, "proj_out", layer_norm(window) * (1 + scale_by) + shift
    )  # (N, 2 * 2 * 16)
    patches = patches.reshape(*grid[1:], frames, 2, 2, 16).transpose(5, 2, 0, 3, 1, 4)
    note("velocity", velocity := patches.reshape(latents.shape))
    return velocity


def window_mask(grid, native):
    """May a query token see a key token? (N, N). Of each axis, a query sees the run of positions of
    odd, native size that is centred on it, or the nearest run that lies on the axis."""

    def starts(length, native_size):
        size = min(2 * (native_size // 2) + 1, length)
        return [min(max(i - native_size // 2, 0), length - size) for i in range(length)], size

    (tops, rows), (lefts, columns) = starts(grid[1], native[0]), starts(grid[2], native[1])
    mask = np.zeros((*grid[1:], *grid[1:]), bool)
    for h, top in enumerate(tops):
        for w, left in enumerate(lefts):
            mask[h, w, top : top + rows, left : left + columns] = True
    positions = grid[1] * grid[2]
    return (
        mask.reshape(positions, positions).repeat(grid[0], 0).repeat(grid[0], 1)
    )  # all frames see each other


def attention_scale(meta, config):
    tokens = meta[
        "attention_base_tokens"
    ]  # of a native frame; the authors' code has 1560, whatever the model
    return math.sqrt(math.log(2 * tokens, tokens) / config["attention_head_dim"])


def noise_levels(steps, strength, flow_shift):
    """Those of the last int(steps * strength) of `steps` steps, then 0; as Wan, from 0.999 on
    instead of 1."""
    levels = 0.999 * (1 - np.arange(steps) / steps)
    levels = flow_shift * levels / (1 + (flow_shift - 1) * levels)
    return (
        np.append(levels[steps - int(steps * strength) :], 0).astype(np.float32).astype(np.float64)
    )


def unipc(levels, start, cleans, index, corrected=None):
    """UniPC (arXiv 2302.04867) with B(h) = e^h - 1, from level `index` to the next, at most of
    order two. `cleans` are the predictions of the clean latents at this level and the one before;
    `corrected` that at the next, if known."""
    with np.errstate(divide="ignore"):  # at the end, where no noise is left
        snr = np.log(1 - levels) - np.log(levels)
    h = snr[index + 1] - snr[index]
    order = min(2, len(levels) - 1 - index, index + 1)
    ratios = [(snr[index - 1] - snr[index]) / h] if order == 2 else []
    slopes = [(cleans[1] - cleans[0]) / ratios[0]] if order == 2 else []
    weights = [0.5] * len(slopes)
    if corrected is not None:
        ratios, slopes = [*ratios, 1.0], [*slopes, corrected - cleans[0]]
        weights, first = [0.5], np.expm1(-h) / -h - 1
        if order == 2:
            right = np.array([first, 2 * (first / -h - 1 / 2)]) / np.expm1(-h)
            weights = np.linalg.solve([np.ones(2), ratios], right)
    clean = cleans[0] + sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
    return (
        levels[index + 1] / levels[index] * start - (1 - levels[index + 1]) * np.expm1(-h) * clean
    )


def solve(levels, latents, velocity_at):
    """All steps from noise to latents; yields those after each. `velocity_at(latents, index)` is
    the model."""
    start, cleans = latents, []
    for index in range(len(levels) - 1):
        clean = latents - levels[index] * velocity_at(latents, index)
        if index > 0:  # the last step again, now that its end is known
            latents = unipc(levels, start, cleans, index - 1, clean)
        start, cleans = latents, [clean, *cleans[:1]]
        latents = unipc(levels, start, cleans, index)
        yield latents


def refine(weights, config, meta, latents, text, negative, cache_interval=None):
    """The refinement of noised latents; yields those after each step."""
    scale, mask = attention_scale(meta, config), window_mask(meta["grid"], meta["native"])
    levels = noise_levels(meta["steps"], meta["strength"], meta["flow_shift"])
    features = {} if cache_interval else None

    def velocity_at(latents, index):
        timestep = int(1000 * levels[index])  # truncated; the noise level is not
        given = weights, config, latents, timestep
        guided = predict(*given, text, scale, mask, index % (cache_interval or 1) == 0, features)
        unguided = predict(*given, negative, scale, mask, cache_interval is None)
        return unguided + meta["guidance"] * (guided - unguided)

    yield from solve(levels, latents, velocity_at)


def load(case="odd"):
    """Weights, config, meta and tensors, without their batch dimension, of a reference set."""
    folder = REFERENCE / case
    config, meta = (
        json.loads((folder / file).read_text(encoding="utf-8"))
        for file in ("transformer/config.json", "meta.json")
    )
    weights = load_file(next((folder / "transformer").glob("*.safetensors")))
    given = {
        name: x[0] if len(x) == 1 else x
        for name, x in load_file(folder / "expected.safetensors").items()
    }
    return weights, config, meta, given


def steps():
    """What tests/port/steps.safetensors holds, as far as this port goes."""
    (weights, config, meta, given), noted = load(), {}
    scale, mask = attention_scale(meta, config), window_mask(meta["grid"], meta["native"])
    predict(
        weights,
        config,
        given["latents"],
        given["timestep"],
        given["text"],
        scale,
        mask,
        True,
        note=lambda name, value: noted.setdefault(f"dit.{name}", value),
    )
    noted["unipc.levels"] = levels = noise_levels(
        meta["steps"], meta["strength"], meta["flow_shift"]
    )
    away = given["init_latents"] - given["encoded"]  # any velocity shows the solver at work
    solved = solve(levels, given["init_latents"], lambda latents, index: (index + 1) * away)
    noted |= {
        f"unipc.latents{index}": latents for index, latents in zip(range(3), solved, strict=False)
    }
    whole = partial(
        refine, weights, config, meta, given["init_latents"], given["text"], given["negative"]
    )
    noted |= {f"refine.step{index}": latents for index, latents in enumerate(whole())}
    *_, noted["refine.cache3"] = whole(cache_interval=3)
    return {name: np.ascontiguousarray(value, np.float32) for name, value in noted.items()}


if __name__ == "__main__":
    save_file(steps(), sys.argv[1])
