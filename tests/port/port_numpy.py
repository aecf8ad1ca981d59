"""FreeSwim in NumPy, all of it: the text encoder, the VAE in chunks and in tiles, the transformer,
the inward window, both paths with override and cache, and the flow solver.

A port to start from, and an oracle. It shares no code with the rest, and is plain instead of fast,
for one clip at a time. `python tests/port/port_numpy.py OUT.safetensors` writes what it computes
for the reference sets, step by step, and `python tests/port/port_check.py OUT.safetensors` compares
that with ours.

Arrays have no batch dimension: tokens are (N, D) in (h, w, t) order, time innermost; latents
(16, T, H, W); videos (3, F, H, W). `note(name, value)` is called with every value that the checker
knows.
"""

import itertools
import json
import math
import sys
from pathlib import Path

import numpy as np
from safetensors import deserialize
from safetensors.numpy import load_file, save_file

PORT = Path(__file__).parent
REFERENCE = PORT.parent / "reference"


def ignore(name, value):
    """A `note` that keeps nothing."""


# --------------------------------------------------------------------------------------------------
# Layers that several parts share


def linear(weights, name, x):
    return x @ weights[name + ".weight"].T + weights[name + ".bias"]


def layer_norm(x, weight=1.0, bias=0.0, eps=1e-6):
    mean = x.mean(-1, keepdims=True)
    variance = x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + eps) * weight + bias


def rms_norm(x, weight, eps=1e-6):
    mean_square = (x**2).mean(-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    """The tanh approximation, as in Wan and UMT5."""
    return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(scores):
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    return scores / scores.sum(-1, keepdims=True)


# --------------------------------------------------------------------------------------------------
# The text encoder: UMT5


def position_bias(weights, config, layer, length):
    """(heads, L, L): every layer has its own table, by the bucket of key - query."""
    table = weights[
        f"encoder.block.{layer}.layer.0.SelfAttention.relative_attention_bias.weight"
    ]  # (buckets, heads)
    half = config["relative_attention_num_buckets"] // 2
    near = half // 2
    farthest = config["relative_attention_max_distance"]
    bias = np.zeros((table.shape[1], length, length))
    for query in range(length):
        for key in range(length):
            distance = abs(key - query)
            bucket = distance
            if distance >= near:
                growth = math.log(distance / near) / math.log(farthest / near)
                bucket = near + int(growth * (half - near))
                bucket = min(bucket, half - 1)
            if key > query:
                bucket += half
            bias[:, query, key] = table[bucket]
    return bias


def encode_text(weights, config, ids, mask, note=ignore):
    """Embeddings (L, D) of token ids (L,), zero where the mask is. (L,)"""
    heads = config["num_heads"]
    x = weights["shared.weight"][ids]
    note("embedded", x)
    for layer in range(config["num_layers"]):
        attention = f"encoder.block.{layer}.layer.0"
        network = f"encoder.block.{layer}.layer.1"
        bias = position_bias(weights, config, layer, len(ids))
        note(f"bias{layer}", bias)

        normed = rms_norm(x, weights[f"{attention}.layer_norm.weight"])
        parts = []
        for part in "qkv":
            projected = normed @ weights[f"{attention}.SelfAttention.{part}.weight"].T
            parts.append(projected.reshape(len(ids), heads, -1))
        query, key, value = parts
        scores = np.einsum("nhd,mhd->hnm", query, key) + bias  # not divided by sqrt(d)
        scores = np.where(mask > 0, scores, np.finfo(np.float32).min)
        attended = np.einsum("hnm,mhd->nhd", softmax(scores), value).reshape(len(ids), -1)
        x = x + attended @ weights[f"{attention}.SelfAttention.o.weight"].T

        normed = rms_norm(x, weights[f"{network}.layer_norm.weight"])
        gate = gelu(normed @ weights[f"{network}.DenseReluDense.wi_0.weight"].T)
        up = normed @ weights[f"{network}.DenseReluDense.wi_1.weight"].T
        x = x + (gate * up) @ weights[f"{network}.DenseReluDense.wo.weight"].T
        note(f"layer{layer}", x)
    x = rms_norm(x, weights["encoder.final_layer_norm.weight"])
    note("final", x)
    x = x * (mask > 0)[:, None]  # the cross-attention sees these zeros
    note("text", x)
    return x


# --------------------------------------------------------------------------------------------------
# The VAE. A clip streams through in chunks: frame 0 alone, then four frames each. `history` is what
# layers remember of earlier chunks, by their names; it is empty at the start of a clip


def convolve(x, weight, bias, stride=(1, 1, 1)):
    """(C, F, H, W), already padded, with (C', C, t, h, w): one tap after the other."""
    taps = weight.shape[2:]
    counts = []
    for length, tap, step in zip(x.shape[1:], taps, stride, strict=True):
        counts.append((length - tap) // step + 1)
    result = np.zeros((len(weight), *counts))
    for offsets in itertools.product(*[range(tap) for tap in taps]):
        slices = []
        for offset, count, step in zip(offsets, counts, stride, strict=True):
            slices.append(slice(offset, offset + step * (count - 1) + 1, step))
        frames, rows, columns = slices
        result += np.tensordot(weight[(..., *offsets)], x[:, frames, rows, columns], axes=1)
    return result + bias[:, None, None, None]


def causal_conv(weights, name, x, history):
    """A frame sees itself and the two frames before it; before the clip there are zeros."""
    weight = weights[name + ".weight"]
    past = history.get(name)
    if past is None:
        past = np.zeros((x.shape[0], 2, *x.shape[2:]))
    x = np.concatenate([past, x], axis=1)
    history[name] = x[:, -2:]
    rows = weight.shape[3] // 2
    columns = weight.shape[4] // 2
    x = np.pad(x, ((0, 0), (0, 0), (rows, rows), (columns, columns)))
    return convolve(x, weight, weights[name + ".bias"])


def frame_conv(weights, name, x, stride=1):
    """A 2D convolution of every frame, already padded."""
    weight = weights[name + ".weight"][:, :, None]
    return convolve(x, weight, weights[name + ".bias"], (1, stride, stride))


def channel_norm(x, gamma):
    """Root mean square over the channels (C, F, H, W). No mean is subtracted."""
    mean_square = (x**2).mean(0, keepdims=True)
    return x / np.sqrt(mean_square + 1e-24) * gamma.reshape(-1, 1, 1, 1)


def residual_block(weights, name, x, history):
    y = silu(channel_norm(x, weights[f"{name}.norm1.gamma"]))
    y = causal_conv(weights, f"{name}.conv1", y, history)
    y = silu(channel_norm(y, weights[f"{name}.norm2.gamma"]))
    y = causal_conv(weights, f"{name}.conv2", y, history)
    if f"{name}.conv_shortcut.weight" in weights:
        shortcut = f"{name}.conv_shortcut"
        x = convolve(x, weights[f"{shortcut}.weight"], weights[f"{shortcut}.bias"])
    return x + y


def frame_attention(weights, name, x):
    """One head among the positions of each frame, added to its input."""
    channels, frames, height, width = x.shape
    normed = channel_norm(x, weights[f"{name}.norm.gamma"])
    qkv = frame_conv(weights, f"{name}.to_qkv", normed)
    attended = np.zeros_like(x)
    for frame in range(frames):
        query, key, value = qkv[:, frame].reshape(3, channels, -1)
        shares = softmax(query.T @ key / math.sqrt(channels))
        attended[:, frame] = (value @ shares.T).reshape(channels, height, width)
    return x + frame_conv(weights, f"{name}.proj", attended)


def mid_block(weights, name, x, history):
    x = residual_block(weights, f"{name}.resnets.0", x, history)
    x = frame_attention(weights, f"{name}.attentions.0", x)
    return residual_block(weights, f"{name}.resnets.1", x, history)


def downsample(weights, name, x, history, temporal):
    x = np.pad(x, ((0, 0), (0, 0), (0, 1), (0, 1)))  # right and bottom only
    x = frame_conv(weights, f"{name}.resample.1", x, stride=2)
    if not temporal:
        return x
    past = history.get(name)
    history[name] = x[:, -1:]
    if past is None:  # the clip's first frame passes unchanged
        return x
    weight = weights[f"{name}.time_conv.weight"]
    bias = weights[f"{name}.time_conv.bias"]
    return convolve(np.concatenate([past, x], axis=1), weight, bias, (2, 1, 1))


def upsample_layer(weights, name, x, history, temporal):
    conv = f"{name}.time_conv"
    if temporal and conv not in history:
        history[conv] = np.zeros((x.shape[0], 2, *x.shape[2:]))  # not the first frame
    elif temporal:
        pairs = causal_conv(weights, conv, x, history)  # (2, C), not (C, 2)
        channels, frames, height, width = x.shape
        pairs = pairs.reshape(2, channels, frames, height, width).transpose(1, 2, 0, 3, 4)
        x = pairs.reshape(channels, 2 * frames, height, width)
    x = x.repeat(2, axis=2).repeat(2, axis=3)
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return frame_conv(weights, f"{name}.resample.1", x)


def encode_chunk(weights, config, frames, history, note=ignore):
    """Frames (3, 1 or 4, H, W) to the mean of a latent frame, (16, 1, H/8, W/8)."""
    x = causal_conv(weights, "encoder.conv_in", frames, history)
    index = 0
    for stage in range(4):
        for _ in range(config["num_res_blocks"]):
            x = residual_block(weights, f"encoder.down_blocks.{index}", x, history)
            index += 1
        if stage < 3:
            name = f"encoder.down_blocks.{index}"
            if stage == 1:
                note("downsample.before", x)
            x = downsample(weights, name, x, history, temporal=stage > 0)
            if stage == 1:
                note("downsample.after", x)
            index += 1
    x = mid_block(weights, "encoder.mid_block", x, history)
    x = silu(channel_norm(x, weights["encoder.norm_out.gamma"]))
    x = causal_conv(weights, "encoder.conv_out", x, history)
    moments = convolve(x, weights["quant_conv.weight"], weights["quant_conv.bias"])
    return moments[:16]  # the other 16 are log variances


def decode_chunk(weights, config, latents, history, note=ignore):
    """A latent frame (16, 1, h, w), not normalised, to frames (3, 1 or 4, 8h, 8w)."""
    x = convolve(latents, weights["post_quant_conv.weight"], weights["post_quant_conv.bias"])
    x = causal_conv(weights, "decoder.conv_in", x, history)
    x = mid_block(weights, "decoder.mid_block", x, history)
    for stage in range(4):
        block = f"decoder.up_blocks.{stage}"
        for index in range(config["num_res_blocks"] + 1):
            x = residual_block(weights, f"{block}.resnets.{index}", x, history)
        if stage < 3:
            if stage == 0:
                note("upsample.before", x)
            name = f"{block}.upsamplers.0"
            x = upsample_layer(weights, name, x, history, temporal=stage < 2)
            if stage == 0:
                note("upsample.after", x)
    x = silu(channel_norm(x, weights["decoder.norm_out.gamma"]))
    return causal_conv(weights, "decoder.conv_out", x, history)


def chunks_of(video):
    """Frame 0 alone, then four frames each."""
    chunks = [video[:, :1]]
    for first in range(1, video.shape[1], 4):
        chunks.append(video[:, first : first + 4])
    return chunks


def encode_tile(weights, config, video):
    history = {}
    means = [encode_chunk(weights, config, chunk, history) for chunk in chunks_of(video)]
    return np.concatenate(means, axis=1)


def decode_tile(weights, config, latents):
    history = {}
    parts = []
    for t in range(latents.shape[1]):
        parts.append(decode_chunk(weights, config, latents[:, t : t + 1], history))
    return np.concatenate(parts, axis=1)


def in_tiles(process, x, tile, stride, scale_up, scale_down):
    """`process` tiles of x, (C, F, H, W), and blend them as Diffusers does: each with the finished
    tile above it, then with the finished tile to its left."""

    def scaled(length):
        return length * scale_up // scale_down

    overlap = scaled(tile) - scaled(stride)
    rows = []
    for top in range(0, x.shape[2], stride):
        row = []
        for left in range(0, x.shape[3], stride):
            row.append(process(x[:, :, top : top + tile, left : left + tile]))
        rows.append(row)
    blended = []
    for i, row in enumerate(rows):
        pieces = []
        for j, piece in enumerate(row):
            if i > 0:
                blend(rows[i - 1][j], piece, overlap, axis=2)
            if j > 0:
                blend(row[j - 1], piece, overlap, axis=3)
            pieces.append(piece[:, :, : scaled(stride), : scaled(stride)])
        blended.append(np.concatenate(pieces, axis=3))
    return np.concatenate(blended, axis=2)


def blend(before, piece, overlap, axis):
    """Fade the start of a piece in over the end of the piece before it, in place."""
    overlap = min(overlap, before.shape[axis], piece.shape[axis])
    before = np.moveaxis(before, axis, 0)
    piece = np.moveaxis(piece, axis, 0)
    for index in range(overlap):
        share = index / overlap
        piece[index] = before[index - overlap] * (1 - share) + piece[index] * share


def statistics(config):
    """Mean and standard deviation of each latent channel."""
    mean = np.array(config["latents_mean"]).reshape(16, 1, 1, 1)
    std = np.array(config["latents_std"]).reshape(16, 1, 1, 1)
    return mean, std


def encode(weights, config, video):
    """A video (3, F, H, W) in [-1, 1] to normalised latents."""

    def process(tile):
        return encode_tile(weights, config, tile)

    mean, std = statistics(config)
    if max(video.shape[2:]) > 256:
        latents = in_tiles(process, video, 256, 192, scale_up=1, scale_down=8)
    else:
        latents = process(video)
    return (latents - mean) / std


def decode(weights, config, latents):
    """Normalised latents to a video in [-1, 1]."""

    def process(tile):
        return decode_tile(weights, config, tile)

    mean, std = statistics(config)
    latents = latents * std + mean
    if max(latents.shape[2:]) > 32:
        video = in_tiles(process, latents, 32, 24, scale_up=8, scale_down=1)
    else:
        video = process(latents)
    return video.clip(-1, 1)


def enlarge(frames, height, width):
    """Bilinear, with half-pixel centres: (3, F, H, W) to (3, F, height, width)."""
    for axis, length in ((2, height), (3, width)):
        old = frames.shape[axis]
        position = ((np.arange(length) + 0.5) * old / length - 0.5).clip(0, old - 1)
        lower = np.floor(position).astype(int)
        upper = np.minimum(lower + 1, old - 1)
        shape = [1, 1, 1, 1]
        shape[axis] = length
        share = (position - lower).reshape(shape)
        frames = frames.take(lower, axis) * (1 - share) + frames.take(upper, axis) * share
    return frames


# --------------------------------------------------------------------------------------------------
# The transformer


def token_positions(grid):
    """(N, 3): the frame, row and column of each token, in (h, w, t) order."""
    frames, height, width = grid
    positions = []
    for h in range(height):
        for w in range(width):
            for t in range(frames):
                positions.append((t, h, w))
    return np.array(positions)


def rotary_angles(positions, head_dim):
    """(N, head_dim / 2): the angle of each token's pairs of channels, first those by frame, then by
    row, then by column. `positions` is (N, 3). In float64: far out, float32 is too coarse."""
    spatial = 2 * (head_dim // 6)
    by_frame = frequencies(head_dim - 2 * spatial)
    by_position = frequencies(spatial)
    frame, row, column = positions.T
    return np.concatenate(
        [np.outer(frame, by_frame), np.outer(row, by_position), np.outer(column, by_position)],
        axis=1,
    )


def frequencies(channels):
    return 10000.0 ** (-np.arange(0, channels, 2) / channels)


def rotate(x, angles):
    """Rotate neighbouring pairs of channels of (N, heads, head_dim)."""
    first = x[..., 0::2]
    second = x[..., 1::2]
    cos = np.cos(angles)[:, None]
    sin = np.sin(angles)[:, None]
    rotated = np.stack([first * cos - second * sin, first * sin + second * cos], axis=-1)
    return rotated.reshape(x.shape)


def attend(query, key, value, scale, mask=None):
    """Attention of (N, heads, head_dim) to (M, heads, head_dim). `mask` is (N, M)."""
    scores = np.einsum("nhd,mhd->hnm", query, key) * scale
    if mask is not None:
        scores = np.where(mask, scores, -np.inf)
    return np.einsum("hnm,mhd->nhd", softmax(scores), value)


def self_attention(weights, block, tokens, modulation, heads, angles, scale, mask, note):
    shift, scale_by, gate = modulation[:3]
    x = layer_norm(tokens) * (1 + scale_by) + shift
    note("modulated", x)
    query = linear(weights, f"{block}.attn1.to_q", x)
    key = linear(weights, f"{block}.attn1.to_k", x)
    value = linear(weights, f"{block}.attn1.to_v", x)
    note("query.linear", query)
    note("key.linear", key)
    note("value", value)
    query = rms_norm(query, weights[f"{block}.attn1.norm_q.weight"])  # over all heads
    key = rms_norm(key, weights[f"{block}.attn1.norm_k.weight"])
    note("query.norm", query)
    note("key.norm", key)
    query = rotate(by_heads(query, heads), angles)
    key = rotate(by_heads(key, heads), angles)
    note("query.rotated", query)
    note("key.rotated", key)
    attended = attend(query, key, by_heads(value, heads), scale, mask).reshape(tokens.shape)
    note("attended", attended)
    tokens = tokens + gate * linear(weights, f"{block}.attn1.to_out.0", attended)
    note("self_attention", tokens)
    return tokens


def by_heads(x, heads):
    return x.reshape(len(x), heads, -1)


def cross_attention(weights, block, tokens, text, heads, note):
    """What the text adds to the tokens. No rotation, no mask, and the ordinary scale."""
    x = layer_norm(tokens, weights[f"{block}.norm2.weight"], weights[f"{block}.norm2.bias"])
    query = linear(weights, f"{block}.attn2.to_q", x)
    key = linear(weights, f"{block}.attn2.to_k", text)
    value = linear(weights, f"{block}.attn2.to_v", text)
    query = rms_norm(query, weights[f"{block}.attn2.norm_q.weight"])
    key = rms_norm(key, weights[f"{block}.attn2.norm_k.weight"])
    note("cross.query.norm", query)
    note("cross.key.norm", key)
    scale = (query.shape[1] // heads) ** -0.5
    parts = (by_heads(query, heads), by_heads(key, heads), by_heads(value, heads))
    attended = attend(*parts, scale).reshape(tokens.shape)
    output = linear(weights, f"{block}.attn2.to_out.0", attended)
    note("cross_attention", output)
    return output


def feed_forward(weights, block, tokens, modulation, note):
    shift, scale_by, gate = modulation[3:]
    x = layer_norm(tokens) * (1 + scale_by) + shift
    hidden = gelu(linear(weights, f"{block}.ffn.net.0.proj", x))
    note("ffn.hidden", hidden)
    return tokens + gate * linear(weights, f"{block}.ffn.net.2", hidden)


def embed(weights, config, latents, timestep, text, note):
    """Tokens (N, D), embedded time (D,), modulation (6, D), embedded text (L, D), angles."""
    _, frames, rows, columns = latents.shape
    height = rows // 2
    width = columns // 2
    # In a patch, channels come first, then its rows, then its columns.
    patches = latents.reshape(16, frames, height, 2, width, 2).transpose(2, 4, 1, 0, 3, 5)
    patches = patches.reshape(-1, 64)
    matrix = weights["patch_embedding.weight"].reshape(-1, 64)
    tokens = patches @ matrix.T + weights["patch_embedding.bias"]
    note("patches", tokens)
    half = config["freq_dim"] // 2
    phase = timestep * np.exp(-math.log(10000) * np.arange(half) / half)
    time = np.concatenate([np.cos(phase), np.sin(phase)])  # cosines first
    time = silu(linear(weights, "condition_embedder.time_embedder.linear_1", time))
    time = linear(weights, "condition_embedder.time_embedder.linear_2", time)
    note("time", time)
    modulation = linear(weights, "condition_embedder.time_proj", silu(time)).reshape(6, -1)
    note("modulation", modulation)
    text = gelu(linear(weights, "condition_embedder.text_embedder.linear_1", text))
    text = linear(weights, "condition_embedder.text_embedder.linear_2", text)
    note("text", text)
    positions = token_positions((frames, height, width))
    angles = rotary_angles(positions, config["attention_head_dim"])
    note("rotary.cos", np.cos(angles))
    note("rotary.sin", np.sin(angles))
    return tokens, time, modulation, text, angles


def unembed(weights, tokens, time, shape, note):
    """From tokens to the velocity, (16, T, 2H, 2W)."""
    _, frames, rows, columns = shape
    shift, scale_by = weights["scale_shift_table"][0] + time  # not the projected time
    patches = linear(weights, "proj_out", layer_norm(tokens) * (1 + scale_by) + shift)
    note("unpatchify", patches)
    # In a patch, rows come first here, then columns, then channels.
    patches = patches.reshape(rows // 2, columns // 2, frames, 2, 2, 16)
    velocity = patches.transpose(5, 2, 0, 3, 1, 4).reshape(shape)
    note("velocity", velocity)
    return velocity


def predict(weights, config, latents, timestep, text, scale, mask, dual, cache=None, note=ignore):
    """The velocity that the window path predicts at `latents`; `text` is (L, text_dim).

    With `dual`, the full path runs too, and its cross-attention outputs replace the window
    path's; they are kept in `cache`, if that is a dict. Without `dual`, those in the cache replace
    them. Without both, the window path has its own."""
    heads = config["num_attention_heads"]
    given = embed(weights, config, latents, timestep, text, note)
    window, time, modulation, text, angles = given
    full = window
    for index in range(config["num_layers"]):
        block = f"blocks.{index}"
        six = modulation + weights[f"{block}.scale_shift_table"][0]
        note_window = prefixed(note, "block0.") if index == 0 else ignore
        note_full = prefixed(note, "block0.full.") if index == 0 else ignore
        window = self_attention(
            weights, block, window, six, heads, angles, scale, mask, note_window
        )
        if dual:
            full = self_attention(weights, block, full, six, heads, angles, scale, None, note_full)
            content = cross_attention(weights, block, full, text, heads, note_window)
            full = feed_forward(weights, block, full + content, six, note_window)
            note(f"block{index}.full_tokens", full)
            if cache is not None:
                cache[index] = content
        elif cache is not None:
            content = cache[index]
        else:
            content = cross_attention(weights, block, window, text, heads, note_window)
        window = feed_forward(weights, block, window + content, six, ignore)
        note(f"block{index}.window_tokens", window)
    return unembed(weights, window, time, latents.shape, note)


def prefixed(note, prefix):
    def note_with_prefix(name, value):
        note(prefix + name, value)

    return note_with_prefix


# --------------------------------------------------------------------------------------------------
# The method


def window_starts(length, native):
    """Where each position's window starts along an axis, and how long windows are."""
    size = min(2 * (native // 2) + 1, length)
    starts = []
    for position in range(length):
        starts.append(min(max(position - native // 2, 0), length - size))
    return starts, size


def position_mask(grid, native):
    """Which positions of a frame see which, (H*W, H*W)."""
    _, height, width = grid
    tops, rows = window_starts(height, native[0])
    lefts, columns = window_starts(width, native[1])
    mask = np.zeros((height, width, height, width), bool)
    for h, top in enumerate(tops):
        for w, left in enumerate(lefts):
            mask[h, w, top : top + rows, left : left + columns] = True
    return mask.reshape(height * width, height * width)


def window_mask(grid, native):
    """Which tokens see which, (N, N). Frames make no difference."""
    mask = position_mask(grid, native)
    return mask.repeat(grid[0], axis=0).repeat(grid[0], axis=1)


def attention_scale(meta, config):
    tokens = meta["attention_base_tokens"]  # of a native frame
    return math.sqrt(math.log(2 * tokens, tokens) / config["attention_head_dim"])


def schedule(steps, strength, flow_shift):
    """Noise levels of the last int(steps * strength) of `steps` steps, then 0; and the timesteps,
    1000 times the levels, truncated. Both in float64, in this order of operations: in float32 some
    timesteps would be one less. Levels, which are not truncated, are rounded to float32 in the
    end."""
    levels = 0.999 * (1 - np.arange(steps) / steps)  # not from 1
    levels = flow_shift * levels / (1 + (flow_shift - 1) * levels)
    levels = levels[steps - int(steps * strength) :]
    timesteps = (1000 * levels).astype(int)
    levels = np.append(levels, 0)
    return levels.astype(np.float32).astype(np.float64), timesteps


def unipc(levels, start, predictions, index, corrected=None):
    """UniPC (arXiv 2302.04867) with B(h) = e^h - 1, from level `index` to the next.

    `predictions` are x0 at this level and at the one before. With `corrected`, x0 at the next
    level, it is the corrector, otherwise the predictor. The first and the last step have order 1.
    """
    with np.errstate(divide="ignore"):  # at the end no noise is left
        lambdas = np.log(1 - levels) - np.log(levels)
    h = lambdas[index + 1] - lambdas[index]
    order = min(2, len(levels) - 1 - index, index + 1)
    x0 = predictions[0]
    ratios = []
    slopes = []
    if order == 2:
        ratio = (lambdas[index - 1] - lambdas[index]) / h
        ratios.append(ratio)
        slopes.append((predictions[1] - x0) / ratio)
    if corrected is None:
        weights = [0.5] * len(slopes)
    else:
        ratios.append(1.0)
        slopes.append(corrected - x0)
        weights = corrector_weights(h, ratios)
    change = sum(weight * slope for weight, slope in zip(weights, slopes, strict=True))
    noisy_part = levels[index + 1] / levels[index] * start
    return noisy_part - (1 - levels[index + 1]) * np.expm1(-h) * (x0 + change)


def corrector_weights(h, ratios):
    if len(ratios) == 1:
        return [0.5]
    first = np.expm1(-h) / -h - 1
    right = np.array([first, 2 * (first / -h - 1 / 2)]) / np.expm1(-h)
    return np.linalg.solve([np.ones(2), ratios], right)


def solve(levels, latents, velocity_at):
    """All steps from noise to latents; yields those after each. `velocity_at(latents, index)` is
    the model."""
    start = latents
    predictions = []
    for index in range(len(levels) - 1):
        x0 = latents - levels[index] * velocity_at(latents, index)
        if index > 0:  # the last step once more, now that x0 at its end is known
            latents = unipc(levels, start, predictions, index - 1, x0)
        start = latents
        predictions = [x0, *predictions[:1]]
        latents = unipc(levels, start, predictions, index)
        yield latents


def generate(weights, config, latents, text, negative, steps, flow_shift, guidance):
    """A base clip from noise at native size; yields the latents after each step. No windows, one
    path, and the ordinary attention scale."""
    levels, timesteps = schedule(steps, 1.0, flow_shift)
    scale = config["attention_head_dim"] ** -0.5

    def velocity_at(latents, index):
        given = (weights, config, latents, timesteps[index])
        cond = predict(*given, text, scale, None, dual=False)
        uncond = predict(*given, negative, scale, None, dual=False)
        return uncond + guidance * (cond - uncond)

    yield from solve(levels, latents, velocity_at)


def refine(weights, config, meta, latents, text, negative, cache_interval=None):
    """The refinement of noised latents; yields those after each step."""
    scale = attention_scale(meta, config)
    mask = window_mask(meta["grid"], meta["native"])
    levels, timesteps = schedule(meta["steps"], meta["strength"], meta["flow_shift"])
    cache = None if cache_interval is None else {}

    def velocity_at(latents, index):
        given = (weights, config, latents, timesteps[index])
        is_dual = cache_interval is None or index % cache_interval == 0
        cond = predict(*given, text, scale, mask, is_dual, cache)
        uncond = predict(*given, negative, scale, mask, dual=cache_interval is None)
        return uncond + meta["guidance"] * (cond - uncond)

    yield from solve(levels, latents, velocity_at)


# --------------------------------------------------------------------------------------------------
# The reference sets


def load_json(file):
    return json.loads(file.read_text(encoding="utf-8"))


def load_weights(folder):
    """All in float64, whatever the dtype in the file: that of the computation is the port's."""
    (file,) = folder.glob("*.safetensors")
    weights = {}
    for name, entry in deserialize(file.read_bytes()):
        data = bytes(entry["data"])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            upper = np.frombuffer(data, np.uint16).astype(np.uint32)
            value = (upper << 16).view(np.float32)
        else:
            value = np.frombuffer(data, np.float32)
        weights[name] = value.reshape(entry["shape"]).astype(np.float64)
    return weights


def load(case="odd"):
    """The transformer's weights and config, settings, and tensors without their batch dimension."""
    folder = REFERENCE / case
    given = {}
    for name, value in load_file(folder / "expected.safetensors").items():
        given[name] = value[0] if len(value) == 1 else value
    weights = load_weights(folder / "transformer")
    config = load_json(folder / "transformer" / "config.json")
    return weights, config, load_json(folder / "meta.json"), given


def load_vae(case):
    folder = REFERENCE / case / "vae"
    return load_weights(folder), load_json(folder / "config.json")


def as_video(frames):
    """uint8 (F, H, W, 3) to (3, F, H, W) in [-1, 1]. 255 is 1, and 0 is -1."""
    return frames.transpose(3, 0, 1, 2) / 127.5 - 1


def text_steps(note):
    weights = load_weights(REFERENCE / "umt5")
    config = load_json(REFERENCE / "umt5" / "config.json")
    inputs = load_file(PORT / "steps.safetensors")
    ids = inputs["umt5.ids"]
    mask = inputs["umt5.mask"]
    note("umt5.ids", ids)
    note("umt5.mask", mask)
    text = encode_text(weights, config, ids, mask, prefixed(note, "umt5."))

    # What the table and the layers add, made small: then the epsilons of all norms matter.
    for name in weights:
        if name.endswith(("shared.weight", "SelfAttention.o.weight", "wo.weight")):
            weights[name] = 1e-3 * weights[name]
    note("umt5.small", encode_text(weights, config, ids, mask))
    return text


def norm_steps(note):
    """On numbers so small that the epsilons matter."""
    small = load_file(PORT / "steps.safetensors")["norm.input"].astype(np.float64)
    note("norm.input", small)
    note("norm.layer", layer_norm(small))
    note("norm.rms", rms_norm(small, 1.0))
    as_channels = 1e-2 * small.T[:, :, None, None]
    note("norm.vae", channel_norm(as_channels, np.ones(len(as_channels)))[..., 0, 0].T)


def vae_steps(note):
    """A corner of the set `wide`'s video, chunk by chunk, then frames of several tiles."""
    weights, config = load_vae("wide")
    *_, given = load("wide")
    whole = as_video(given["video"])
    video = whole[:, :, :16, :24]
    note("upsampled", enlarge(video[:, :1], 20, 30))
    note("vae.video", video)
    history = {}
    means = []
    for t, chunk in enumerate(chunks_of(video)):
        note_layers = prefixed(note, "vae.encode.") if t == 1 else ignore
        mean = encode_chunk(weights, config, chunk, history, note_layers)
        note_history(note, f"vae.encode.history{t}", history)
        note(f"vae.encode.chunk{t}", mean)
        means.append(mean)
    encoded = encode(weights, config, video)
    note("vae.encoded", encoded)
    history = {}
    for t, mean in enumerate(means):
        note_layers = prefixed(note, "vae.decode.") if t == 1 else ignore
        frames = decode_chunk(weights, config, mean, history, note_layers)
        note_history(note, f"vae.decode.history{t}", history)
        note(f"vae.decode.chunk{t}", frames)
    decoded = decode(weights, config, encoded)
    note("vae.decoded", decoded)
    note("upsampled.decoded", enlarge(decoded, 20, 30))  # not rounded to 8 bits before

    repeated = np.tile(whole[:, :1], (1, 1, 3, 2))
    latents = encode(weights, config, repeated[:, :, :264, :272])
    note("vae.tiled.encoded", latents)
    note("vae.tiled.decoded", decode(weights, config, latents)[:, :, 184:])
    # Only the width needs tiles, and the last tiles are shorter than the overlap.
    latents = encode(weights, config, repeated[:, :, :208, :400])
    note("vae.strip.encoded", latents)
    note("vae.strip.decoded", decode(weights, config, latents)[:, :, 184:])


def note_history(note, prefix, history):
    for name, past in history.items():
        note(f"{prefix}.{name}", past)


def transformer_steps(note, weights, config, meta, given):
    """One pass at the set's latents, both paths; then single passes as in the authors' files."""
    scale = attention_scale(meta, config)
    mask = window_mask(meta["grid"], meta["native"])
    note("mask", position_mask(meta["grid"], meta["native"]))
    rest = (scale, mask)
    first = (weights, config, given["latents"], given["timestep"])
    following = (weights, config, given["latents_next"], given["timestep_next"])
    text = given["text"]
    negative = given["negative"]
    everything = np.ones_like(mask)

    predict(*first, text, *rest, dual=True, note=prefixed(note, "dit."))
    note("dual_full", predict(*first, text, scale, everything, dual=False))
    note("dual_window", predict(*first, text, *rest, dual=True))
    note("dual_window_negative", predict(*first, negative, *rest, dual=True))
    cache = {}
    note("guide_window", predict(*first, text, *rest, dual=True, cache=cache))
    note("reuse_window", predict(*following, text, *rest, dual=False, cache=cache))
    note("window_only_negative", predict(*following, negative, *rest, dual=False))
    ended = text * (np.arange(len(text)) < 7)[:, None]  # a text of 7 tokens, then zeros
    note("zeros.velocity", predict(*first, ended, *rest, dual=False))

    small = predict(make_small(weights), *first[1:], text, *rest, dual=True, note=only(SMALL, note))
    note("small.velocity", small)
    folder = REFERENCE / "bfloat16"
    stored = (load_weights(folder), load_json(folder / "config.json"))
    latents = given["latents"]
    velocity = predict(*stored, latents, given["timestep"], text, *rest, dual=False)
    note("bfloat16.velocity", velocity)


SMALL = {  # what is noted with small weights: the output of every norm, or what follows it
    "block0.modulated": "small.modulated",
    "block0.query.norm": "small.query.norm",
    "block0.key.norm": "small.key.norm",
    "block0.cross.query.norm": "small.cross.query.norm",
    "block0.cross.key.norm": "small.cross.key.norm",
    "block0.ffn.hidden": "small.ffn.hidden",
}


def make_small(weights):
    """All that makes or changes tokens, and all queries and keys, divided by 1000: then the
    epsilons of all norms matter."""
    endings = ("to_q", "to_k", "to_out.0", "ffn.net.2", "patch_embedding")
    small = {}
    for name, value in weights.items():
        layer = name.rpartition(".")[0]
        small[name] = value / 1000 if layer.endswith(endings) else value
    return small


def only(names, note):
    """A `note` that knows only these names, {name: what it is called}."""

    def note_some(name, value):
        if name in names:
            note(names[name], value)

    return note_some


def rotary_steps(note):
    """Far out, float32 is too coarse for the angles: the last 21 tokens of a wide grid."""
    positions = token_positions((21, 2, 960))[-21:]
    angles = rotary_angles(positions, 128)
    note("rotary.far.cos", np.cos(angles))
    note("rotary.far.sin", np.sin(angles))


def timestep_steps(note):
    """Of whole schedules, where rounding in float32 would show."""
    found = []
    for steps in (4, 6, 10, 20, 35, 50):
        for flow_shift in (1.0, 3.0, 5.0, 9.0):
            _, timesteps = schedule(steps, 1.0, flow_shift)
            found.append(timesteps)
    note("unipc.timesteps", np.concatenate(found))


def solver_steps(note, meta, given):
    """Away from the clean latents: any velocity shows the solver at work."""
    levels, _ = schedule(meta["steps"], meta["strength"], meta["flow_shift"])
    note("unipc.levels", levels)
    away = given["init_latents"] - given["encoded"]

    def velocity_at(latents, index):
        return (index + 1) * away

    for index, latents in enumerate(solve(levels, given["init_latents"], velocity_at)):
        note(f"unipc.latents{index}", latents)


def base_steps(note, weights, config, meta, given):
    """A base clip of the native size, from the noise in the file."""
    noise = load_file(PORT / "steps.safetensors")["base.noise"].astype(np.float64)
    note("base.noise", noise)
    texts = (given["text"], given["negative"])
    settings = {"steps": 3, "flow_shift": 3.0, "guidance": meta["guidance"]}
    for index, latents in enumerate(generate(weights, config, noise, *texts, **settings)):
        note(f"base.step{index}", latents)


def whole_steps(note, weights, config, meta, given, text):
    """From the video to the refined, decoded clip. The noise is what the reference drew."""
    vae, vae_config = load_vae("odd")
    encoded = encode(vae, vae_config, as_video(given["video"]))
    note("encoded", encoded)
    noise = load_file(PORT / "steps.safetensors")["refine.noise"].astype(np.float64)
    note("refine.noise", noise)
    levels, _ = schedule(meta["steps"], meta["strength"], meta["flow_shift"])
    start = (1 - levels[0]) * encoded + levels[0] * noise
    note("init_latents", start)
    model = (weights, config, meta, start)
    texts = (given["text"], given["negative"])
    for index, latents in enumerate(refine(*model, *texts)):
        note(f"refine.step{index}", latents)
    note("decoded", decode(vae, vae_config, latents))
    for interval in (2, 3):
        *_, latents = refine(*model, *texts, interval)
        note(f"refine.cache{interval}", latents)
    *_, latents = refine(*model, text, given["negative"], 3)
    note("refine.ids", latents)  # with the text that text_steps encoded


def steps():
    """Everything that the checker knows, {name: float32 array}."""
    found = {}

    def note(name, value):
        if name not in found:
            found[name] = np.ascontiguousarray(value, np.float32)

    norm_steps(note)
    text = text_steps(note)
    vae_steps(note)
    odd = load("odd")
    transformer_steps(note, *odd)
    rotary_steps(note)
    _, _, meta, given = odd
    timestep_steps(note)
    solver_steps(note, meta, given)
    base_steps(note, *odd)
    whole_steps(note, *odd, text)
    return found


if __name__ == "__main__":
    save_file(steps(), sys.argv[1])
