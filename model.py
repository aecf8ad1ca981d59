"""Wan2.1 from scratch: the diffusion transformer, the causal video VAE, the UMT5 text encoder, and their loading.

Nothing here knows of FreeSwim: attention is handed to the transformer as a function, and a block's three parts can be
called one by one, so that a cross-attention output can be handed over as a tensor.

Letters in shapes: B clips, F frames, T latent frames (F = 4(T - 1) + 1), H x W tokens per frame, N = T*H*W tokens,
D channels, L text tokens. One token is a patch of 2 x 2 latents, one latent is 8 x 8 pixels. Tokens stand in
(h, w, t) order, time innermost.
"""
import html
import json
import math
import re
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import ftfy
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn

# ---------------------------------------------------------------------------------------------------------------------
# The diffusion transformer


def full_attention(query, key, value, scale=None):
    """Every token sees every token. (B, heads, N, head_dim) each; `scale` defaults to 1 / sqrt(head_dim)."""
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def rotary_table(grid, head_dim, device):
    """Cosines and sines of the 3D rotary embedding, each (N, 1, head_dim / 2), for tokens in (h, w, t) order.

    `grid` is (T, H, W). A head's channels are split over time, rows and columns, each rotated by its own position.
    The angles are computed in float64 and stored in float32, as Wan does.
    """
    frames, height, width = grid
    share = 2 * (head_dim // 6)

    def angles(length, channels):
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
        return torch.outer(torch.arange(length, dtype=torch.float64, device=device), 10000.0**-exponent)

    time = angles(frames, head_dim - 2 * share).view(1, 1, frames, -1).expand(height, width, -1, -1)
    rows = angles(height, share).view(height, 1, 1, -1).expand(-1, width, frames, -1)
    columns = angles(width, share).view(1, width, 1, -1).expand(height, -1, frames, -1)
    table = torch.cat([time, rows, columns], dim=-1).flatten(0, 2).unsqueeze(1)  # (N, 1, head_dim / 2)
    return table.cos().float(), table.sin().float()


def rotate(x, rotary):
    """Rotate neighbouring channel pairs of `x`, (B, N, heads, head_dim), by the angles of its position; in float32."""
    cos, sin = rotary
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, N, heads, head_dim / 2)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention from `x`, (B, N, D), to `context`, (B, M, D). Queries and keys are normalised over all
    heads at once, before the heads are split."""

    def __init__(self, dim, heads, eps):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)

    def forward(self, x, context, attention, rotary=None):
        query = self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))  # (B, N, heads, head_dim)
        key = self.norm_k(self.to_k(context)).unflatten(-1, (self.heads, -1))
        value = self.to_v(context).unflatten(-1, (self.heads, -1))
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))  # (B, heads, N, head_dim)
        return self.to_out(attention(query, key, value).transpose(1, 2).flatten(2))  # (B, N, D)


class Block(nn.Module):
    """One transformer block, in three parts that a caller composes: self-attention, cross-attention, feed-forward.

    `tokens` is (B, N, D); `time` is (B, 6, D) float32, the timestep's shifts, scales and gates. The normalisations
    and the modulated residuals are computed in float32; only matrix products run in the dtype of the weights.
    """

    def __init__(self, dim, heads, ffn_dim, eps):
        super().__init__()
        self.eps = eps
        self.self_attn = Attention(dim, heads, eps)
        self.cross_attn = Attention(dim, heads, eps)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def self_attention(self, tokens, time, rotary, attention):
        """The tokens after self-attention."""
        shift, scale, gate = (self.modulation + time).chunk(6, dim=1)[:3]  # (B, 1, D) each
        x = modulate(tokens, shift, scale, self.eps)
        return (tokens.float() + gate * self.self_attn(x, x, attention, rotary)).to(tokens.dtype)

    def cross_attention(self, tokens, text):
        """What the text, (B, L, D), adds to the tokens: the output itself, (B, N, D), not yet added."""
        return self.cross_attn(self.norm2(tokens.float()).to(tokens.dtype), text, full_attention)

    def feed_forward(self, tokens, time):
        """The tokens after the feed-forward network."""
        shift, scale, gate = (self.modulation + time).chunk(6, dim=1)[3:]
        return (tokens.float() + gate * self.ffn(modulate(tokens, shift, scale, self.eps))).to(tokens.dtype)


def modulate(tokens, shift, scale, eps):
    """Layer norm without weights, scaled and shifted, in float32; the result in the dtype of the tokens."""
    return (F.layer_norm(tokens.float(), tokens.shape[-1:], eps=eps) * (1 + scale) + shift).to(tokens.dtype)


class WanTransformer(nn.Module):
    """The DiT (Wan technical report, section 4.2). `config` is the content of the checkpoint's config.json."""

    FLOAT32 = "time_embedder", "modulation", "norm2"  # what stays in float32, whatever the dtype

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.heads, self.head_dim = config["num_attention_heads"], config["attention_head_dim"]
        dim = self.heads * self.head_dim
        self.patch_embedding = nn.Conv3d(config["in_channels"], dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.time_embedder = nn.Sequential(nn.Linear(config["freq_dim"], dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = nn.Sequential(
            nn.Linear(config["text_dim"], dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.blocks = nn.ModuleList(
            Block(dim, self.heads, config["ffn_dim"], config["eps"]) for _ in range(config["num_layers"])
        )
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)
        self.proj_out = nn.Linear(dim, config["out_channels"] * 4)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """The DiT of a Diffusers `transformer/` folder."""
        return load_model(cls, folder, device, dtype, cls.FLOAT32)

    def embed(self, latents, timestep, text):
        """What the blocks work on: tokens (B, N, D), embedded time (B, D), its modulation (B, 6, D), text (B, L, D)
        and the rotary table.

        `latents` is (B, 16, T, 2H, 2W), `timestep` (B,) from 0 to 1000, `text` (B, L, text_dim).
        """
        dtype = self.patch_embedding.weight.dtype
        patches = self.patch_embedding(latents.to(dtype))  # (B, D, T, H, W)
        tokens = patches.permute(0, 3, 4, 2, 1).flatten(1, 3)  # (B, H*W*T, D): the only place that sets the order
        half = self.config["freq_dim"] // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=latents.device) / half)
        phase = timestep.float()[:, None] * frequency
        time = self.time_embedder(torch.cat([phase.cos(), phase.sin()], dim=-1))  # (B, D), float32
        modulation = self.time_proj(F.silu(time).to(dtype)).unflatten(-1, (6, -1)).float()  # (B, 6, D)
        rotary = rotary_table(patches.shape[2:], self.head_dim, latents.device)
        return tokens, time, modulation, self.text_embedder(text.to(dtype)), rotary

    def unembed(self, tokens, time, grid):
        """The velocity (B, 16, T, 2H, 2W), float32, that the last block's tokens mean; `grid` is (T, H, W)."""
        frames, height, width = grid
        shift, scale = (self.modulation + time[:, None]).chunk(2, dim=1)  # (B, 1, D) each
        patches = self.proj_out(modulate(tokens, shift, scale, self.config["eps"]))  # (B, N, 4 * 16)
        patches = patches.float().view(-1, height, width, frames, 2, 2, self.config["out_channels"])
        return patches.permute(0, 6, 3, 1, 4, 2, 5).flatten(5, 6).flatten(3, 4)

    def forward(self, latents, timestep, text, attention=full_attention):
        """The velocity noise - clean at `latents`, same shape, float32. Shapes as in `embed`; `attention` maps query,
        key and value, (B, heads, N, head_dim) in (h, w, t) order, to the attended values."""
        batch, _, frames, height, width = latents.shape
        tokens, time, modulation, text, rotary = self.embed(latents, timestep, text)
        for block in self.blocks:
            tokens = block.self_attention(tokens, modulation, rotary, attention)
            tokens = tokens + block.cross_attention(tokens, text)
            tokens = block.feed_forward(tokens, modulation)
        return self.unembed(tokens, time, (frames, height // 2, width // 2))


# ---------------------------------------------------------------------------------------------------------------------
# The causal video VAE
#
# A clip streams through it in chunks: its first frame (or the first 1 + 4k), then four frames (or 4k) at a time. What a
# layer must remember of the past stands in `history`, a dict keyed by the layer; absent means that the clip begins.


class CausalConv3d(nn.Conv3d):
    """A convolution whose output frame sees its own input frame and the two before it, zeros at the clip's start."""

    def __init__(self, in_channels, out_channels, kernel_size=(3, 3, 3)):
        rows, columns = kernel_size[1] // 2, kernel_size[2] // 2
        super().__init__(in_channels, out_channels, kernel_size, padding=(0, rows, columns))

    def forward(self, x, history):
        past = history[self] if self in history else torch.zeros_like(x[:, :, :1]).expand(-1, -1, 2, -1, -1)
        x = torch.cat([past, x], dim=2)
        history[self] = x[:, :, -2:].clone()  # a copy: a view would keep the whole chunk alive
        return super().forward(x)


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of (B, C, ...)."""

    def __init__(self, channels, spatial_dims):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * spatial_dims))

    def forward(self, x):
        mean_square = x.float().square().mean(dim=1, keepdim=True)
        return x * torch.rsqrt(mean_square + 1e-24).to(x.dtype) * self.gamma


class ResidualBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1, self.conv1 = ChannelNorm(in_channels, 3), CausalConv3d(in_channels, out_channels)
        self.norm2, self.conv2 = ChannelNorm(out_channels, 3), CausalConv3d(out_channels, out_channels)
        same = in_channels == out_channels
        self.conv_shortcut = nn.Identity() if same else nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x, history):
        residual = self.conv_shortcut(x)
        x = self.conv1(F.silu(self.norm1(x)), history)
        x = self.conv2(F.silu(self.norm2(x)), history)
        return x + residual


def per_frame(module, x):
    """Apply a 2D module to every frame of (B, C, F, H, W)."""
    return module(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class FrameAttention(nn.Module):
    """Self-attention with one head among the positions of each frame, added to its input."""

    def __init__(self, channels):
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def attend(self, frames):  # (B*F, C, H, W)
        query, key, value = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        attended = F.scaled_dot_product_attention(query, key, value)  # (B*F, 1, H*W, C)
        return self.proj(attended.squeeze(1).transpose(1, 2).unflatten(2, frames.shape[2:]))

    def forward(self, x, history):
        return x + per_frame(self.attend, x)


class Downsample(nn.Module):
    """Halve the rows and columns and, if `temporal`, the frames after the first."""

    def __init__(self, channels, temporal):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x, history):
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        past, history[self] = history.get(self), x[:, :, -1:].clone()
        if past is not None:
            return self.time_conv(torch.cat([past, x], dim=2))
        # The clip's first frame passes as it is, and is the history of those that follow.
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2) if x.shape[2] > 1 else x


class Upsample(nn.Module):
    """Double the rows and columns, halve the channels and, if `temporal`, double the frames after the first."""

    def __init__(self, channels, temporal):
        super().__init__()
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1)
        )

    def forward(self, x, history):
        if self.time_conv is not None:
            first = x[:, :, :0]
            if self.time_conv not in history:  # the clip's first frame stays one frame, and is forgotten at once:
                first, x = x[:, :, :1], x[:, :, 1:]
                history[self.time_conv] = torch.zeros_like(first).expand(-1, -1, 2, -1, -1)
            if x.shape[2] > 0:  # for those that follow, the past begins with zeros, not with it
                pairs = self.time_conv(x, history).unflatten(1, (2, -1))  # (B, 2, C, F, H, W)
                x = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # (B, C, 2F, H, W)
            x = torch.cat([first, x], dim=2)
        return per_frame(self.resample, x)


class MidBlock(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(channels, channels), ResidualBlock(channels, channels)])
        self.attentions = nn.ModuleList([FrameAttention(channels)])

    def forward(self, x, history):
        for layer in (self.resnets[0], self.attentions[0], self.resnets[1]):
            x = layer(x, history)
        return x


class Encoder(nn.Module):
    def __init__(self, base, multipliers, blocks, temporal, latent_channels):
        super().__init__()
        widths = [base * m for m in (1, *multipliers)]
        self.conv_in = CausalConv3d(3, base)
        self.down_blocks = nn.ModuleList()
        for stage, (width, next_width) in enumerate(zip(widths, widths[1:])):
            for block in range(blocks):
                self.down_blocks.append(ResidualBlock(width if block == 0 else next_width, next_width))
            if stage < len(temporal):
                self.down_blocks.append(Downsample(next_width, temporal[stage]))
        self.mid_block = MidBlock(widths[-1])
        self.norm_out = ChannelNorm(widths[-1], 3)
        self.conv_out = CausalConv3d(widths[-1], 2 * latent_channels)

    def forward(self, x, history):
        x = self.conv_in(x, history)
        for layer in (*self.down_blocks, self.mid_block):
            x = layer(x, history)
        return self.conv_out(F.silu(self.norm_out(x)), history)


class UpBlock(nn.Module):
    def __init__(self, in_channels, out_channels, blocks, upsampler):
        super().__init__()
        self.resnets = nn.ModuleList(
            ResidualBlock(in_channels if block == 0 else out_channels, out_channels) for block in range(blocks + 1)
        )
        self.upsamplers = nn.ModuleList(upsampler)

    def forward(self, x, history):
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x, history)
        return x


class Decoder(nn.Module):
    def __init__(self, base, multipliers, blocks, temporal, latent_channels):
        super().__init__()
        widths = [base * m for m in (multipliers[-1], *multipliers[::-1])]
        self.conv_in = CausalConv3d(latent_channels, widths[0])
        self.mid_block = MidBlock(widths[0])
        self.up_blocks = nn.ModuleList()
        for stage, (width, next_width) in enumerate(zip(widths, widths[1:])):
            width = width if stage == 0 else width // 2  # the upsampler before has halved the channels
            upsampler = [Upsample(next_width, temporal[::-1][stage])] if stage < len(temporal) else []
            self.up_blocks.append(UpBlock(width, next_width, blocks, upsampler))
        self.norm_out = ChannelNorm(widths[-1], 3)
        self.conv_out = CausalConv3d(widths[-1], 3)

    def forward(self, x, history):
        x = self.conv_in(x, history)
        for layer in (self.mid_block, *self.up_blocks):
            x = layer(x, history)
        return self.conv_out(F.silu(self.norm_out(x)), history)


class WanVAE(nn.Module):
    """The causal video VAE (Wan technical report, section 4.1). `config` is the content of its config.json.

    Memory does not depend on a clip's length, beyond the clip itself: time is streamed. With `tiled`, frames larger
    than 256 pixels are processed in tiles of 256 pixels every 192, blended linearly, exactly as Diffusers does.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        shape = config["dim_mult"], config["num_res_blocks"], config["temperal_downsample"], config["z_dim"]
        self.encoder = Encoder(config["base_dim"], *shape)
        self.quant_conv = nn.Conv3d(2 * config["z_dim"], 2 * config["z_dim"], 1)
        self.post_quant_conv = nn.Conv3d(config["z_dim"], config["z_dim"], 1)
        self.decoder = Decoder(config.get("decoder_base_dim") or config["base_dim"], *shape)
        # Of each latent channel, over the training set: latents are normalised with these. (16, 1, 1, 1)
        self.mean = torch.tensor(config["latents_mean"], device="cpu").view(-1, 1, 1, 1)
        self.std = torch.tensor(config["latents_std"], device="cpu").view(-1, 1, 1, 1)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """The VAE of a Diffusers `vae/` folder."""
        return load_model(cls, folder, device, dtype)

    def encode_chunk(self, frames, history):
        """Frames (B, 3, f, H, W) to the means and log variances of their latents, (B, 32, t, H/8, W/8)."""
        return self.quant_conv(self.encoder(frames, history))

    def decode_chunk(self, latents, history):
        """Latents as `encode_chunk` gives them, (B, 16, t, H/8, W/8), to frames (B, 3, f, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(latents), history)

    @torch.no_grad()
    def encode(self, video, tiled=True, progress=iter):
        """`video` (B, 3, F, H, W) in [-1, 1], F = 4k + 1, H and W multiples of 8, to its most likely latents
        (B, 16, k + 1, H/8, W/8), normalised. `progress` may wrap the list of tiles, as tqdm does. Raises ValueError
        for another number of frames or size."""
        batch, _, frames, height, width = video.shape
        if frames % 4 != 1 or height % 8 or width % 8:
            raise ValueError(f"cannot encode {frames} frames of {width}x{height}: frames must be 4k + 1, sides 8k")
        latents = video.new_zeros(batch, self.config["z_dim"], frames // 4 + 1, height // 8, width // 8)
        for rows, columns, weight in progress(list(tiles(height // 8, width // 8, 1, tiled, video))):
            tile = video[..., 8 * rows.start : 8 * rows.stop, 8 * columns.start : 8 * columns.stop]
            history = {}
            for t in range(latents.shape[2]):
                chunk = tile[:, :, :1] if t == 0 else tile[:, :, 4 * t - 3 : 4 * t + 1]
                mean, _ = self.encode_chunk(chunk, history).chunk(2, dim=1)
                latents[:, :, t : t + 1, rows, columns] += weight * mean
        latents = self.total(latents)
        return (latents - self.mean.to(latents)) / self.std.to(latents)

    @torch.no_grad()
    def decode(self, latents, tiled=True, progress=iter):
        """Normalised `latents` (B, 16, T, h, w) to video (B, 3, 4T - 3, 8h, 8w), clamped to [-1, 1]."""
        batch, _, frames, height, width = latents.shape
        latents = latents * self.std.to(latents) + self.mean.to(latents)
        video = latents.new_zeros(batch, 3, 4 * frames - 3, 8 * height, 8 * width)
        for rows, columns, weight in progress(list(tiles(height, width, 8, tiled, latents))):
            history = {}
            for t in range(frames):
                chunk = self.decode_chunk(latents[:, :, t : t + 1, rows, columns], history)
                place = slice(8 * rows.start, 8 * rows.stop), slice(8 * columns.start, 8 * columns.stop)
                video[:, :, max(4 * t - 3, 0) : 4 * t + 1, *place] += weight * chunk
        return self.total(video).clamp_(-1, 1)

    def total(self, tiles):
        """The sum of all tiles; here they are all in already (but see `share_tiles`)."""
        return tiles


def tiles(height, width, scale, tiled, like):
    """The tiles of a frame of `height` x `width` latents: rows and columns, in latents, as slices, and the weight of
    each output pixel, (rows * scale, columns * scale). The weights of all tiles add up to one everywhere.

    Diffusers blends a tile with the finished one above it, then with the finished one to its left. Where four tiles
    meet, the upper two have thus been blended horizontally before: there the horizontal ramp enters squared.
    """
    size, stride = (32, 24) if tiled and max(height, width) > 32 else (max(height, width), max(height, width))

    def spans(length):
        starts = range(0, length, stride)
        for start, following in zip(starts, (*starts[1:], length)):
            stop = min(start + size, length)
            rise = torch.ones((stop - start) * scale, device=like.device, dtype=like.dtype)
            fall, shared = rise.clone(), torch.zeros_like(rise)  # shared: where the following tile lies too
            if start > 0:
                blend = min(size - stride, stop - start) * scale
                rise[:blend] = torch.arange(blend) / blend
            if following < length:
                blend = min(size - stride, length - following) * scale
                fall[-blend:] = 1 - torch.arange(blend) / blend
                shared[-blend:] = 1
            yield slice(start, stop), rise, fall, shared

    for rows, rise, fall, shared in spans(height):
        for columns, rise_x, fall_x, _ in spans(width):
            once, twice = rise_x * fall_x, rise_x**2 * (1 - (1 - fall_x) ** 2)
            yield rows, columns, (rise * fall)[:, None] * torch.where(shared[:, None] > 0, twice, once)


# ---------------------------------------------------------------------------------------------------------------------
# The text encoder: UMT5 and its tokenizer


class TextLayer(nn.Module):
    """Self-attention with a relative position bias of its own, then a gated feed-forward network."""

    def __init__(self, config):
        super().__init__()
        dim, inner = config["d_model"], config["num_heads"] * config["d_kv"]
        self.heads = config["num_heads"]
        self.buckets, self.max_distance = (
            config["relative_attention_num_buckets"], config["relative_attention_max_distance"]
        )
        self.attention_norm = nn.RMSNorm(dim, config["layer_norm_epsilon"])
        self.attention = nn.ModuleDict({
            "q": nn.Linear(dim, inner, bias=False),
            "k": nn.Linear(dim, inner, bias=False),
            "v": nn.Linear(dim, inner, bias=False),
            "o": nn.Linear(inner, dim, bias=False),
            "relative_attention_bias": nn.Embedding(self.buckets, self.heads),
        })
        self.ffn_norm = nn.RMSNorm(dim, config["layer_norm_epsilon"])
        self.gate = nn.Linear(dim, config["d_ff"], bias=False)
        self.up = nn.Linear(dim, config["d_ff"], bias=False)
        self.down = nn.Linear(config["d_ff"], dim, bias=False)

    def position_bias(self, length, device):
        """(heads, L, L): a learned bias per bucket of distance, exact when near, logarithmic when far."""
        position = torch.arange(length, device=device)
        offset = position[None, :] - position[:, None]  # key - query
        half, distance = self.buckets // 2, offset.abs()
        exact = half // 2
        far = torch.log(distance.clamp(min=1).float() / exact) / math.log(self.max_distance / exact) * (half - exact)
        bucket = torch.where(distance < exact, distance, (exact + far.long()).clamp(max=half - 1))
        return self.attention["relative_attention_bias"](bucket + half * (offset > 0)).permute(2, 0, 1)

    def forward(self, x, mask):
        """`x` (B, L, D); `mask` (B, L), nonzero where there is text."""
        normed = self.attention_norm(x)
        query, key, value = (
            self.attention[name](normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in "qkv"
        )
        scores = query @ key.transpose(-1, -2) + self.position_bias(x.shape[1], x.device)  # T5: not divided by sqrt(d)
        scores = scores.float().masked_fill(mask[:, None, None, :] == 0, torch.finfo(torch.float32).min)
        attended = scores.softmax(dim=-1).to(x.dtype) @ value  # (B, heads, L, d_kv)
        x = x + self.attention["o"](attended.transpose(1, 2).flatten(2))
        normed = self.ffn_norm(x)
        return x + self.down(F.gelu(self.gate(normed), approximate="tanh") * self.up(normed))


class TextEncoder(nn.Module):
    """The UMT5 encoder. `config` is the content of its config.json.

    Wan's has 5.7 billion parameters, needed once per prompt. So `from_pretrained` reads no weights: each forward
    looks the tokens up in the file's embedding table and streams the layers, one in memory at a time.
    """

    def __init__(self, config):
        super().__init__()
        self.shared = nn.Embedding(config["vocab_size"], config["d_model"])
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config["num_layers"]))
        self.final_norm = nn.RMSNorm(config["d_model"], config["layer_norm_epsilon"])
        self.fill = None

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """The encoder of a `text_encoder/` folder, streamed; names and shapes are checked at once."""
        encoder, sources = empty_model(cls, folder)

        def fill(name):  # the table stays where it is, mapped from the file, of which only a prompt's rows are read
            place = ("cpu", None) if name == "shared." else (device, dtype)
            read_weights(encoder, sources, *place, prefix=name)

        encoder.fill = fill
        return encoder

    @contextmanager
    def resident(self, name):
        """The submodule `name`, its weights in memory only within the `with`."""
        module = self.get_submodule(name)
        if self.fill:
            self.fill(name + ".")
        yield module
        if self.fill:
            module.to("meta")

    def forward(self, ids, mask):
        """Token ids (B, L) and mask (B, L) to (B, L, d_model). What stands at masked positions means nothing."""
        with self.resident("shared") as embedding:
            x = embedding(ids.to(embedding.weight.device))
        for index in range(len(self.layers)):
            with self.resident(f"layers.{index}") as layer:
                x = x.to(layer.gate.weight)  # its device and dtype
                x = layer(x, mask.to(x.device))
        with self.resident("final_norm") as norm:
            return norm(x)


def clean_prompt(text):
    """The text as Wan's tokenizer expects it: broken Unicode mended, HTML entities resolved (even those escaped
    twice), every run of white space one space."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def load_tokenizer(folder, length=512):
    """The tokenizer of a `tokenizer/` folder, set to cut and pad every text to `length` tokens. Raises ValueError if
    there is none."""
    file = Path(folder) / "tokenizer.json"
    read_json(file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.encode("a word")  # some faults show only in use
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the library has no exception of its own, and its panics are not of Exception
        raise ValueError(f"{file} is no tokenizer ({error!s:.200})") from None
    if tokenizer.token_to_id("<pad>") is None:
        raise ValueError(f"{file} has no token <pad>")
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id("<pad>"), pad_token="<pad>")
    return tokenizer


def tokenize(tokenizer, prompts):
    """Token ids and mask, both int64 (B, length), of a list of prompts."""
    encodings = tokenizer.encode_batch([clean_prompt(prompt) for prompt in prompts])
    return (
        torch.tensor([encoding.ids for encoding in encodings]),
        torch.tensor([encoding.attention_mask for encoding in encodings]),
    )


@torch.no_grad()
def encode_prompt(encoder, tokenizer, prompts):
    """Text embeddings (B, length, d_model) of a list of prompts, zero after the end of each text. Raises ValueError if
    tokenizer and encoder do not belong together."""
    ids, mask = tokenize(tokenizer, prompts)
    if ids.max() >= encoder.shared.num_embeddings:
        known = encoder.shared.num_embeddings
        raise ValueError(f"the tokenizer knows token {ids.max()}, but the text encoder has {known}")
    embeddings = encoder(ids, mask)
    return embeddings * mask[..., None].to(embeddings)


# ---------------------------------------------------------------------------------------------------------------------
# Loading checkpoints in Diffusers layout

REVISIONS = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": "0fad780a534b6463e45facd96134c9f345acfa5b",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "38ec498cb3208fb688890f8cc7e94ede2cbd7f68",
}

RENAMES = (  # ours, the checkpoint's
    ("time_embedder.0.", "condition_embedder.time_embedder.linear_1."),
    ("time_embedder.2.", "condition_embedder.time_embedder.linear_2."),
    ("time_proj.", "condition_embedder.time_proj."),
    ("text_embedder.0.", "condition_embedder.text_embedder.linear_1."),
    ("text_embedder.2.", "condition_embedder.text_embedder.linear_2."),
    (".self_attn.", ".attn1."),
    (".cross_attn.", ".attn2."),
    (".to_out.", ".to_out.0."),
    (".ffn.0.", ".ffn.net.0.proj."),
    (".ffn.2.", ".ffn.net.2."),
    ("modulation", "scale_shift_table"),
    ("layers.", "encoder.block."),
    (".attention.", ".layer.0.SelfAttention."),
    (".attention_norm.", ".layer.0.layer_norm."),
    (".ffn_norm.", ".layer.1.layer_norm."),
    (".gate.", ".layer.1.DenseReluDense.wi_0."),
    (".up.", ".layer.1.DenseReluDense.wi_1."),
    (".down.", ".layer.1.DenseReluDense.wo."),
    ("final_norm.", "encoder.final_layer_norm."),
)


def checkpoint_name(name):
    """The name that a tensor of ours has in the published checkpoints."""
    for ours, theirs in RENAMES:
        name = name.replace(ours, theirs)
    return name


def download(model):
    """The folder of a model: `model` itself if it is one, else the hub's snapshot of that id, fetched if needed."""
    if Path(model).is_dir():
        return Path(model)
    wanted = ["model_index.json", "scheduler/*.json", "tokenizer/tokenizer.json"]
    parts, kinds = ("transformer", "vae", "text_encoder"), ("json", "safetensors")
    wanted += [f"{part}/*.{kind}" for part in parts for kind in kinds]
    return Path(snapshot_download(model, revision=REVISIONS.get(model), allow_patterns=wanted))


def load_model(cls, folder, device, dtype, float32=()):
    """A `cls` with the weights of `folder`, in `dtype`, except tensors whose name contains one of `float32`."""
    model, sources = empty_model(cls, folder)
    read_weights(model, sources, device, dtype, float32=float32)
    return model


def empty_model(cls, folder):
    """A `cls` without memory (on the meta device), and where its weights are: {our name: (checkpoint name, file)}.

    Raises ValueError, naming file and field or tensor, unless config.json describes a Wan2.1 that can be built and the
    safetensors files have exactly the tensors of it. Nothing large is allocated or read.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    for field, (description, fits) in CONFIGS[cls.__name__].items():
        if not fits(config.get(field)):
            raise ValueError(f"{folder / 'config.json'}: {field} is {config.get(field)!r:.99}, but must be "
                             f"{description}")
    with torch.device("meta"):
        model = cls(config).eval().requires_grad_(False)

    index = next(folder.glob("*.safetensors.index.json"), None)
    if index:  # shards
        place = read_json(index).get("weight_map")
        if not isinstance(place, dict) or not all(isinstance(file, str) for file in place.values()):
            raise ValueError(f"{index}: weight_map must be an object of tensor names and file names")
        for name, file in place.items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ValueError(f"{index}: {name} is said to be in {file!r:.99}, no safetensors file beside it")
        files = [folder / file for file in sorted(set(place.values()))]
    else:
        place, files = None, sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            other = next((file for kind in ("bin", "pt", "pth", "ckpt") for file in folder.glob(f"*.{kind}")), None)
            found = f"{len(files)} without an index" if files else f"only {other.name}" if other else "none"
            raise ValueError(f"{folder}: one .safetensors file is needed (nothing else is read), but there is {found}")
    shapes, found = {}, {}
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():
                entry = tensors.get_slice(name)
                if entry.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                    raise ValueError(f"{file}: tensor {name} holds {entry.get_dtype()}, not floating-point numbers")
                if name in found or (place is not None and place.get(name) != file.name):
                    raise ValueError(f"{file}: tensor {name} should be in {place.get(name, 'no file')} by {index.name}")
                shapes[name], found[name] = tuple(entry.get_shape()), file
    sources = {}
    for ours, tensor in model.state_dict().items():
        name = checkpoint_name(ours)
        if name not in found:
            where = folder / place[name] if place and name in place else index or files[0]
            raise ValueError(f"{where}: tensor {name} is missing")
        if shapes[name] != tuple(tensor.shape):
            raise ValueError(f"{found[name]}: tensor {name} is {shapes[name]}, but should be {tuple(tensor.shape)}")
        sources[ours] = name, found.pop(name)
    for name, file in found.items():
        raise ValueError(f"{file}: tensor {name} is not part of {cls.__name__}")
    for name in set(place or ()) - set(shapes):
        raise ValueError(f"{index}: tensor {name} is in none of the files")
    return model, sources


def read_weights(model, sources, device, dtype, prefix="", float32=()):
    """Read the tensors of `model` whose names begin with `prefix`, one by one, each straight to its device and dtype
    (None: as in the file). On the CPU, a tensor that needs no cast is not read but mapped. Raises ValueError for a
    tensor with a number that is not finite."""
    state = {}
    wanted = {name: source for name, source in sources.items() if name.startswith(prefix)}
    for file in {file for _, file in wanted.values()}:
        with opened(file) as tensors:
            for ours, (name, place) in wanted.items():
                if place == file:
                    tensor, keep = tensors.get_tensor(name), any(part in ours for part in float32)
                    # What is kept is copied: else it would keep the file mapped, and all that was read of it.
                    state[ours] = tensor.to(device, torch.float32 if keep else dtype, copy=keep)
                    if dtype is not None and not torch.stack(state[ours].aminmax()).isfinite().all():
                        raise ValueError(f"{file}: tensor {name} holds numbers that are not finite")
    model.load_state_dict(state, strict=False, assign=True)


@contextmanager
def opened(file):
    """The tensors of a safetensors file. Raises ValueError if it is not one, or not a whole one."""
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        state = f"is no whole safetensors file ({error!s:.200})" if Path(file).is_file() else "is missing"
        raise ValueError(f"{file} {state}; fetch it again") from None


def read_json(file):
    """The object in a JSON file. Raises ValueError if there is none."""
    try:
        content = json.loads(Path(file).read_text())
    except OSError:
        raise ValueError(f"{file} is missing or cannot be read") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {content!r:.40}, not an object")
    return content


def number(low, high):
    return f"a number between {low} and {high}", lambda x: type(x) in (int, float) and low < x < high


def each(count, rule):
    return f"{count} times {rule[0]}", lambda x: type(x) is list and len(x) == count and all(map(rule[1], x))


def or_none(rule):
    return f"absent or {rule[0]}", lambda x: x is None or rule[1](x)


def whole(low, high, step=1):
    multiple = f", in steps of {step}" if step > 1 else ""
    return (f"a whole number from {low} to {high}{multiple}",
            lambda x: type(x) is int and low <= x <= high and (x - low) % step == 0)


def one_of(*choices):
    return " or ".join(map(repr, choices)), lambda x: any(type(x) is type(choice) and x == choice for choice in choices)


CONFIGS = {  # what each field of a config.json must be; an absent field is None
    "WanTransformer": {
        "_class_name": one_of("WanTransformer3DModel"), "image_dim": one_of(None), "added_kv_proj_dim": one_of(None),
        "in_channels": one_of(16), "out_channels": one_of(16), "patch_size": one_of([1, 2, 2]),
        "qk_norm": one_of("rms_norm_across_heads"), "cross_attn_norm": one_of(True), "eps": number(0, 0.01),
        "num_attention_heads": whole(1, 256), "attention_head_dim": whole(6, 1024, step=2),
        "num_layers": whole(1, 256), "ffn_dim": whole(1, 2**18), "text_dim": whole(1, 2**16),
        "freq_dim": whole(2, 2**16, step=2),
    },
    "WanVAE": {
        "_class_name": one_of("AutoencoderKLWan"), "is_residual": one_of(None, False), "patch_size": one_of(None),
        "z_dim": one_of(16), "base_dim": whole(2, 1024, step=2),
        "decoder_base_dim": or_none(whole(2, 1024, step=2)),
        "dim_mult": each(4, whole(1, 64)), "num_res_blocks": whole(1, 16),
        "temperal_downsample": one_of([False, True, True]), "attn_scales": one_of([]),
        "latents_mean": each(16, number(-1000, 1000)), "latents_std": each(16, number(0, 1000)),
    },
    "TextEncoder": {
        "model_type": one_of("umt5"), "feed_forward_proj": one_of("gated-gelu"), "vocab_size": whole(1, 2**22),
        "d_model": whole(1, 2**16), "d_kv": whole(1, 2**12), "d_ff": whole(1, 2**18), "num_layers": whole(1, 256),
        "num_heads": whole(1, 256), "relative_attention_num_buckets": whole(4, 4096, step=2),
        "relative_attention_max_distance": whole(4, 2**20), "layer_norm_epsilon": number(0, 0.01),
    },
}


# ---------------------------------------------------------------------------------------------------------------------
# More than one GPU: one process each, started by torchrun. Nothing above or in freeswim.py knows of it; whoever has one
# GPU has read enough.
#
# Every process (rank) holds the latents and runs the solver, but only its share of the tokens. Self-attention alone
# needs them all: before it, an all-to-all trades tokens for heads, after it another one trades back (DeepSpeed-Ulysses,
# arXiv 2309.14509), so that the attention, whichever it is, sees all tokens of its heads.


def swap(x, scattered, gathered, length):
    """Trade with all ranks. Of `x`, dimension `scattered` is whole here, and shared out; of dimension `gathered` each
    rank has its share, and gets the whole, `length` long. Shares need not be equal."""
    ranks = dist.get_world_size()
    parts = x.tensor_split(ranks, scattered)
    shares = [length // ranks + (rank < length % ranks) for rank in range(ranks)]
    before, after = parts[dist.get_rank()].shape[:gathered], parts[dist.get_rank()].shape[gathered + 1 :]
    sizes = [math.prod(before) * share * math.prod(after) for share in shares]
    received = x.new_empty(sum(sizes))
    sent = torch.cat([part.flatten() for part in parts])
    dist.all_to_all_single(received, sent, sizes, [part.numel() for part in parts])
    arrived = zip(received.split(sizes), shares)
    return torch.cat([part.view(*before, share, *after) for part, share in arrived], gathered)


def share_tokens(transformer):
    """Let the ranks share the work of `transformer`, changed in place: each runs its blocks on its own tokens. More
    ranks than heads work, but gain little."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    embed, unembed, length = transformer.embed, transformer.unembed, 0

    def embed_share(latents, timestep, text):
        nonlocal length
        tokens, *rest, rotary = embed(latents, timestep, text)
        length = tokens.shape[1]
        return tokens.tensor_split(ranks, 1)[rank], *rest, [table.tensor_split(ranks)[rank] for table in rotary]

    def unembed_all(tokens, time, grid):
        copies = tokens.expand(ranks, *tokens.shape)  # one for each rank
        return unembed(swap(copies, 0, 2, length)[0], time, grid)

    def self_attention(own, tokens, time, rotary, attention):
        def on_my_heads(query, key, value):
            query, key, value = (swap(x, 1, 2, length) for x in (query, key, value))  # (B, my heads, N, head_dim)
            attended = attention(query, key, value) if query.shape[1] > 0 else query
            return swap(attended, 2, 1, transformer.heads)

        return own(tokens, time, rotary, on_my_heads)

    transformer.embed, transformer.unembed = embed_share, unembed_all
    for block in transformer.blocks:
        block.self_attention = partial(self_attention, block.self_attention)


def share_tiles(vae):
    """Let the ranks share the tiles of `vae`, changed in place; every rank gets the whole result."""
    ranks, rank = dist.get_world_size(), dist.get_rank()

    def shared(method):
        return lambda x, tiled=True, progress=iter: method(x, tiled, lambda tiles: progress(tiles[rank::ranks]))

    def total(tiles):
        dist.all_reduce(tiles)
        return tiles

    vae.encode, vae.decode, vae.total = shared(vae.encode), shared(vae.decode), total


def load_sharded(folder, device, dtype):
    """The DiT of a Diffusers `transformer/` folder, its blocks' weights spread over the ranks. One block at a time is
    read whole."""
    from torch.distributed.fsdp import fully_shard  # takes a second, which only those who use it should wait

    transformer, sources = empty_model(WanTransformer, folder)
    mesh = dist.device_mesh.init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for index, block in enumerate(transformer.blocks):
        read_weights(transformer, sources, device, dtype, f"blocks.{index}.", WanTransformer.FLOAT32)
        fully_shard(block, mesh=mesh)
    transformer.blocks = ShardedBlocks(transformer.blocks)
    others = {name: source for name, source in sources.items() if not name.startswith("blocks.")}
    read_weights(transformer, others, device, dtype, float32=WanTransformer.FLOAT32)
    return transformer


class ShardedBlocks(nn.ModuleList):
    """Blocks whose weights are spread over the ranks (FSDP2). Whoever iterates finds each block whole, while the
    weights of the next are on their way."""

    def __iter__(self):
        blocks = list(super().__iter__())
        ahead = blocks[0].unshard(async_op=True)
        for block, following in zip(blocks, [*blocks[1:], None]):
            if ahead is not None:
                ahead.wait()
            ahead = following.unshard(async_op=True) if following else None
            yield block
            block.reshard()
