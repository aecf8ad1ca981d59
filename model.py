"""Wan2.1 from scratch: the diffusion transformer, the causal video VAE, the UMT5 text encoder, and
their loading.

Nothing here knows of FreeSwim: attention is handed to it as a function, a cross-attention output as
a tensor.

Letters in shapes: B clips, F frames, T latent frames (F = 4(T - 1) + 1), H x W tokens per frame, N
= T*H*W tokens, D channels, L text tokens. One token is a patch of 2 x 2 latents, one latent is 8 x
8 pixels. Tokens stand in (h, w, t) order, time innermost.
"""

import html
import json
import math
import re
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import ftfy
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn

# --------------------------------------------------------------------------------------------------
# The diffusion transformer


def full_attention(query, key, value, scale=None):
    """Every token sees every token. (B, heads, N, head_dim) each; `scale` defaults to 1 /
    sqrt(head_dim)."""
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def rotary_table(grid, head_dim, device):
    """Cosines and sines of the 3D rotary embedding, each (N, 1, head_dim / 2), for tokens in (h, w,
    t) order of `grid`, (T, H, W): a head's channels are split over frames, rows and columns, each
    rotated by its own position. The angles are computed in float64 and stored in float32, as Wan
    does."""
    share = 2 * (head_dim // 6)
    frames, rows, columns = (
        torch.arange(length, dtype=torch.float64, device=device) for length in grid
    )
    rows, columns, frames = (
        axis.flatten() for axis in torch.meshgrid(rows, columns, frames, indexing="ij")
    )

    def angles(position, channels):  # (N, channels / 2)
        exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=device) / channels
        return torch.outer(position, 10000.0**-exponent)

    angle = torch.cat(
        [angles(frames, head_dim - 2 * share), angles(rows, share), angles(columns, share)], dim=1
    )
    return angle.cos().float().unsqueeze(1), angle.sin().float().unsqueeze(1)


def rotate(x, rotary):
    """Rotate neighbouring channel pairs of `x`, (B, N, heads, head_dim), by the angles of its
    position; in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, N, heads, head_dim / 2, 2)
    if (
        torch.compiler.is_compiling()
    ):  # compilers fuse real numbers (not a stack of them); else, complex is one pass
        cos, sin = (part.unsqueeze(-1) for part in rotary)
        return (
            (pairs * cos + pairs.flip(-1) * torch.cat([-sin, sin], dim=-1)).flatten(-2).to(x.dtype)
        )
    return (
        torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(*rotary))
        .flatten(-2)
        .to(x.dtype)
    )


class Attention(nn.Module):
    """Multi-head attention from `x`, (B, N, D), to `context`, (B, M, D). The norms span all heads."""

    def __init__(self, dim, heads, eps):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)

    def forward(self, x, context, attend, rotary=None):
        query = self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))  # (B, N, heads, head_dim)
        key = self.norm_k(self.to_k(context)).unflatten(-1, (self.heads, -1))
        value = self.to_v(context).unflatten(-1, (self.heads, -1))
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        query, key, value = (
            part.transpose(1, 2) for part in (query, key, value)
        )  # (B, heads, N, head_dim)
        return self.to_out(attend(query, key, value).transpose(1, 2).flatten(2))  # (B, N, D)


class Block(nn.Module):
    """One transformer block, in three parts that a caller composes: self-attention,
    cross-attention, feed-forward. `tokens` is (B, N, D), `modulation` (B, 6, D) float32, the
    timestep's shifts, scales, gates, to which a block adds its learned table. Norms and residuals
    are computed in float32, matrix products in the dtype of the weights."""

    def __init__(self, dim, heads, ffn_dim, eps):
        super().__init__()
        self.eps, self.piece = (
            eps,
            2**29 // ffn_dim,
        )  # tokens whose feed-forward network runs at a time
        self.self_attn, self.cross_attn = Attention(dim, heads, eps), Attention(dim, heads, eps)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def self_attention(self, tokens, modulation, rotary, attend):
        """The tokens after self-attention."""
        shift, scale, gate = (self.table + modulation).chunk(6, dim=1)[:3]  # (B, 1, D) each
        x = modulate(tokens, shift, scale, self.eps)
        return (gate * self.self_attn(x, x, attend, rotary) + tokens.float()).to(
            tokens.dtype
        )  # cast last: it is large

    def cross_attention(self, tokens, text):
        """What the text, (B, L, D), adds to the tokens: the output itself, (B, N, D), not yet
        added."""
        return self.cross_attn(self.norm2(tokens.float()).to(tokens.dtype), text, full_attention)

    def feed_forward(self, tokens, modulation):
        """The tokens after the feed-forward network. In pieces: its inner tensor would be the
        largest of all."""
        return torch.cat(
            [self.feed_piece(x, modulation) for x in tokens.split(self.piece, dim=1)], dim=1
        )

    def feed_piece(self, tokens, modulation):  # what `feed_forward` does, to some of the tokens
        shift, scale, gate = (self.table + modulation).chunk(6, dim=1)[3:]
        return (tokens.float() + gate * self.ffn(modulate(tokens, shift, scale, self.eps))).to(
            tokens.dtype
        )


def modulate(tokens, shift, scale, eps):
    """Layer norm without weights, scaled and shifted, in float32; the result in the dtype of the
    tokens."""
    return (F.layer_norm(tokens.float(), tokens.shape[-1:], eps=eps) * (1 + scale) + shift).to(
        tokens.dtype
    )


class WanTransformer(nn.Module):
    """The DiT (Wan technical report, section 4.2). `config` is the content of the checkpoint's
    config.json."""

    FLOAT32 = "time_embedder", "table", "norm2"  # what stays in float32, whatever the dtype
    FIXED = {
        "_class_name": "WanTransformer3DModel",
        "image_dim": None,
        "added_kv_proj_dim": None,
        "cross_attn_norm": True,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": [1, 2, 2],
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
    }
    SIZES = {
        "num_attention_heads": range(1, 257),
        "attention_head_dim": range(6, 1025, 2),
        "num_layers": range(1, 257),
        "ffn_dim": range(1, 2**18),
        "text_dim": range(1, 2**16),
        "freq_dim": range(2, 2**16, 2),
    }
    block = Block  # what its blocks are: support/parallel.py has others

    def __init__(self, config):
        super().__init__()
        self.config, self.eps = config, config["eps"]
        self.heads, self.head_dim = config["num_attention_heads"], config["attention_head_dim"]
        dim = self.heads * self.head_dim
        self.patch_embedding = nn.Conv3d(
            config["in_channels"], dim, kernel_size=(1, 2, 2), stride=(1, 2, 2)
        )
        self.time_embedder = nn.Sequential(
            nn.Linear(config["freq_dim"], dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_proj, self.proj_out = (
            nn.Linear(dim, 6 * dim),
            nn.Linear(dim, 4 * config["out_channels"]),
        )
        self.text_embedder = nn.Sequential(
            nn.Linear(config["text_dim"], dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        blocks = (
            self.block(dim, self.heads, config["ffn_dim"], self.eps)
            for _ in range(config["num_layers"])
        )
        self.blocks = nn.ModuleList(blocks)
        self.table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """The DiT of a Diffusers `transformer/` folder. Raises ValueError for any other."""
        transformer = build(cls, folder)
        return read_weights(transformer, find_weights(transformer, folder), device, dtype)

    def embed(self, latents, timestep, text):
        """What the blocks work on: tokens (B, N, D), embedded time (B, D), its modulation (B, 6,
        D), text (B, L, D) and the rotary table. `latents` is (B, 16, T, 2H, 2W), `timestep` (B,)
        from 0 to 1000, `text` (B, L, text_dim)."""
        batch, channels, _, rows, columns = latents.shape
        if (batch, channels, rows % 2, columns % 2, batch) != (
            len(text),
            16,
            0,
            0,
            *getattr(timestep, "shape", "?"),
        ):
            raise ValueError(
                f"latents {[*latents.shape]}, timestep {timestep} and text {[*text.shape]} should be "
                "tensors (B, 16, T, 2H, 2W), (B,) and (B, L, text_dim)"
            )
        dtype = self.patch_embedding.weight.dtype
        patches = self.patch_embedding(latents.to(dtype))  # (B, D, T, H, W)
        tokens = patches.permute(0, 3, 4, 2, 1).flatten(
            1, 3
        )  # (B, H*W*T, D): the only place that sets the order
        half = self.config["freq_dim"] // 2
        frequency = torch.exp(-math.log(10000) * torch.arange(half, device=latents.device) / half)
        phase = timestep.float()[:, None] * frequency
        time = self.time_embedder(torch.cat([phase.cos(), phase.sin()], dim=-1))  # (B, D), float32
        modulation = (
            self.time_proj(F.silu(time).to(dtype)).unflatten(-1, (6, -1)).float()
        )  # (B, 6, D)
        rotary = rotary_table(patches.shape[2:], self.head_dim, latents.device)
        return tokens, time, modulation, self.text_embedder(text.to(dtype)), rotary

    def unembed(self, tokens, time, grid):
        """The velocity (B, 16, T, 2H, 2W), float32, that the last block's tokens mean; `grid` is
        (T, H, W)."""
        frames, height, width = grid
        shift, scale = (self.table + time[:, None]).chunk(2, dim=1)  # (B, 1, D) each
        patches = self.proj_out(modulate(tokens, shift, scale, self.eps))  # (B, N, 4 * 16)
        patches = patches.float().view(-1, height, width, frames, 2, 2, self.config["out_channels"])
        return patches.permute(0, 6, 3, 1, 4, 2, 5).flatten(5, 6).flatten(3, 4)

    def forward(self, latents, timestep, text, attend=full_attention):
        """The velocity noise - clean at `latents`, in its shape, float32. Inputs are as in `embed`."""
        batch, _, frames, height, width = latents.shape
        tokens, time, modulation, text, rotary = self.embed(latents, timestep, text)
        for block in self.blocks:
            tokens = block.self_attention(tokens, modulation, rotary, attend)
            tokens = tokens + block.cross_attention(tokens, text)
            tokens = block.feed_forward(tokens, modulation)
        return self.unembed(tokens, time, (frames, height // 2, width // 2))


# --------------------------------------------------------------------------------------------------
# The causal video VAE
#
# A clip streams through in chunks: its first frame (or the first 1 + 4k), then four frames (or 4k)
# at a time. What a layer must remember of the past stands in `history`, a dict keyed by the layer;
# absent means that the clip begins.


def per_frame(module, x):
    """Apply a 2D module to every frame of (B, C, F, H, W)."""
    return module(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)


class CausalConv3d(nn.Conv3d):
    """A convolution whose output frame sees its own input frame and the two before it, zeros at the
    clip's start."""

    def __init__(self, in_channels, out_channels, kernel_size=(3, 3, 3)):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            padding=(0, kernel_size[1] // 2, kernel_size[2] // 2),
        )

    def forward(self, x, history):
        past = (
            history[self]
            if self in history
            else torch.zeros_like(x[:, :, :1]).expand(-1, -1, 2, -1, -1)
        )
        x = torch.cat([past, x], dim=2)
        history[self] = x[:, :, -2:].clone()  # a copy: a view would keep the whole chunk alive
        # on a CPU, it would be slow: as 2D convolution over three frames' channels it is 5 times
        # faster
        if x.is_cuda:
            return super().forward(x)
        x = x.permute(0, 2, 3, 4, 1)  # channels last, in memory too
        frames = (
            torch.cat([x[:, :-2], x[:, 1:-1], x[:, 2:]], dim=-1).flatten(0, 1).movedim(-1, 1)
        )  # (B*F, 3C, H, W)
        weight = (
            self.weight.transpose(1, 2).flatten(1, 2).contiguous(memory_format=torch.channels_last)
        )
        frames = F.conv2d(frames, weight, self.bias, padding=self.padding[1:])
        return frames.unflatten(0, (len(x), -1)).transpose(1, 2)


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of (B, C, ...)."""

    def __init__(self, channels, spatial_dims=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * spatial_dims))

    def forward(self, x):
        mean_square = x.float().square().mean(dim=1, keepdim=True)
        return x * torch.rsqrt(mean_square + 1e-24).to(x.dtype) * self.gamma


class NormSiLU(ChannelNorm):
    def forward(self, x, history=None):
        return F.silu(super().forward(x))


class ResidualBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1, self.conv1 = NormSiLU(in_channels), CausalConv3d(in_channels, out_channels)
        self.norm2, self.conv2 = NormSiLU(out_channels), CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = (
            nn.Conv3d(in_channels, out_channels, 1)
            if in_channels != out_channels
            else nn.Identity()
        )

    def forward(self, x, history):
        y = self.conv1(self.norm1(x), history)
        return self.conv2(self.norm2(y), history) + self.conv_shortcut(x)


class FrameAttention(nn.Module):
    """Self-attention with one head among the positions of each frame, added to its input."""

    def __init__(self, channels):
        super().__init__()
        self.norm = ChannelNorm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def attend(self, frames):  # (B*F, C, H, W)
        query, key, value = (
            self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        )
        attended = F.scaled_dot_product_attention(query, key, value)  # (B*F, 1, H*W, C)
        return self.proj(attended.squeeze(1).transpose(1, 2).unflatten(2, frames.shape[2:]))

    def forward(self, x, history):
        return x + per_frame(self.attend, x)


class Downsample(nn.Module):
    """Halve the rows and columns and, if `temporal`, the frames after the first."""

    def __init__(self, channels, temporal):
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2)
        )
        self.time_conv = (
            nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None
        )

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
    """Double the rows and columns, halve the channels and, if `temporal`, double the frames after
    the first."""

    def __init__(self, channels, temporal):
        super().__init__()
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None
        conv = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest-exact"), conv)

    def forward(self, x, history):
        if self.time_conv is not None:
            first = x[:, :, :0]
            if (
                self.time_conv not in history
            ):  # the clip's first frame stays one frame, and is forgotten at once:
                first, x = x[:, :, :1], x[:, :, 1:]
                history[self.time_conv] = torch.zeros_like(first).expand(-1, -1, 2, -1, -1)
            if x.shape[2] > 0:  # for those that follow, the past begins with zeros, not with it
                pairs = self.time_conv(x, history).unflatten(1, (2, -1))  # (B, 2, C, F, H, W)
                x = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # (B, C, 2F, H, W)
            x = torch.cat([first, x], dim=2)
        return per_frame(self.resample, x)


class Layers(nn.ModuleDict):
    """Layers, or lists of layers, one after the other."""

    def forward(self, x, history):
        for part in self.values():
            for layer in part if isinstance(part, nn.ModuleList) else [part]:
                x = layer(x, history)
        return x


def residual_blocks(width, next_width, count):
    return [ResidualBlock(next_width if block else width, next_width) for block in range(count)]


def middle(width):
    return nn.ModuleList(
        [ResidualBlock(width, width), FrameAttention(width), ResidualBlock(width, width)]
    )


def build_encoder(base, multipliers, blocks):
    widths, down = [base * m for m in (1, *multipliers)], nn.ModuleList()
    for stage, (width, next_width) in enumerate(pairwise(widths)):
        down += residual_blocks(width, next_width, blocks)
        down += [Downsample(next_width, temporal=stage > 0)] if stage < 3 else []
    return Layers(
        {
            "conv_in": CausalConv3d(3, base),
            "down_blocks": down,
            "mid_block": middle(widths[-1]),
            "norm_out": NormSiLU(widths[-1]),
            "conv_out": CausalConv3d(widths[-1], 32),
        }
    )


def build_decoder(base, multipliers, blocks):
    widths, up = [base * m for m in (multipliers[-1], *multipliers[::-1])], nn.ModuleList()
    for stage, (width, next_width) in enumerate(pairwise(widths)):
        width = width // 2 if stage > 0 else width  # the upsampler before has halved the channels
        layers = {"resnets": nn.ModuleList(residual_blocks(width, next_width, blocks + 1))}
        if stage < 3:
            layers["upsamplers"] = nn.ModuleList([Upsample(next_width, temporal=stage < 2)])
        up.append(Layers(layers))
    return Layers(
        {
            "conv_in": CausalConv3d(16, widths[0]),
            "mid_block": middle(widths[0]),
            "up_blocks": up,
            "norm_out": NormSiLU(widths[-1]),
            "conv_out": CausalConv3d(widths[-1], 3),
        }
    )


class WanVAE(nn.Module):
    """The causal video VAE (Wan technical report, section 4.1). `config` is the content of its
    config.json.

    It wants float32: in bfloat16 a decoded clip is 2% off. Time is streamed, so that memory does
    not depend on a clip's length, beyond the clip itself. With `tiled`, frames larger than 256
    pixels are processed in tiles of 256 pixels every 192, blended linearly, exactly as Diffusers
    does."""

    FIXED = {
        "_class_name": "AutoencoderKLWan",
        "is_residual": None,
        "patch_size": None,
        "attn_scales": None,
        "temperal_downsample": [False, True, True],
        "z_dim": 16,
    }
    SIZES = {
        "base_dim": range(2, 1025, 2),
        "decoder_base_dim": range(2, 1025, 2),
        "dim_mult": [range(1, 65)] * 4,
        "num_res_blocks": range(1, 17),
        "latents_mean": [(-1000, 1000)] * 16,
        "latents_std": [(1e-6, 1000)] * 16,
    }

    def __init__(self, config):
        super().__init__()
        self.encoder = build_encoder(
            config["base_dim"], config["dim_mult"], config["num_res_blocks"]
        )
        self.quant_conv, self.post_quant_conv = nn.Conv3d(32, 32, 1), nn.Conv3d(16, 16, 1)
        width = config.get("decoder_base_dim") or config["base_dim"]
        self.decoder = build_decoder(width, config["dim_mult"], config["num_res_blocks"])
        # Of each latent channel, over the training set: latents are normalised with these. (16, 1,
        # 1, 1) each
        statistics = torch.tensor([config["latents_mean"], config["latents_std"]], device="cpu")
        self.mean, self.std = statistics.view(2, -1, 1, 1, 1)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """The VAE of a Diffusers `vae/` folder. Raises ValueError for any other."""
        vae = build(cls, folder)
        return read_weights(vae, find_weights(vae, folder), device, dtype)

    def encode_chunk(self, frames, history):
        """Frames (B, 3, f, H, W) to the means and log variances of their latents, (B, 32, t, H/8,
        W/8)."""
        return self.quant_conv(self.encoder(frames, history))

    def decode_chunk(self, latents, history):
        """Latents as `encode_chunk` gives them, (B, 16, t, H/8, W/8), to frames (B, 3, f, H, W),
        not clamped."""
        return self.decoder(self.post_quant_conv(latents), history)

    @torch.no_grad()
    def encode(self, video, tiled=True, progress=iter):
        """`video` (B, 3, F, H, W) in [-1, 1], F = 4k + 1, H and W multiples of 8 (ValueError if
        not), to its most likely latents (B, 16, k + 1, H/8, W/8), normalised. It may stay on the
        CPU. `progress` may wrap the tiles."""
        batch, _, frames, height, width = video.shape
        if frames % 4 != 1 or height % 8 or width % 8:
            raise ValueError(
                f"cannot encode {frames} frames of {width}x{height}: frames must be 4k + 1, sides 8k"
            )
        weights = self.quant_conv.weight
        latents = weights.new_zeros(batch, len(self.mean), frames // 4 + 1, height // 8, width // 8)
        for rows, columns, share in progress(
            self.tiles(height // 8, width // 8, 1, tiled, weights)
        ):
            tile = video[..., 8 * rows.start : 8 * rows.stop, 8 * columns.start : 8 * columns.stop]
            history = {}
            for t in range(latents.shape[2]):
                chunk = tile[:, :, :1] if t == 0 else tile[:, :, 4 * t - 3 : 4 * t + 1]
                mean, _ = self.encode_chunk(chunk.to(weights), history).chunk(2, dim=1)
                latents[:, :, t : t + 1, rows, columns] += share * mean
        return (self.total(latents) - self.mean.to(latents)) / self.std.to(latents)

    @torch.no_grad()
    def decode(self, latents, tiled=True, progress=iter):
        """Normalised `latents` (B, 16, T, h, w) to video (B, 3, 4T - 3, 8h, 8w), clamped to [-1,
        1]."""
        batch, _, frames, height, width = latents.shape
        latents = latents * self.std.to(latents) + self.mean.to(latents)
        video = latents.new_zeros(batch, 3, 4 * frames - 3, 8 * height, 8 * width)
        for rows, columns, share in progress(self.tiles(height, width, 8, tiled, latents)):
            tile = video[..., 8 * rows.start : 8 * rows.stop, 8 * columns.start : 8 * columns.stop]
            history = {}
            for t in range(frames):
                chunk = self.decode_chunk(latents[:, :, t : t + 1, rows, columns], history)
                tile[:, :, max(4 * t - 3, 0) : 4 * t + 1] += share * chunk
        return self.total(video).clamp_(-1, 1)

    def tiles(self, height, width, scale, tiled, like):
        """The tiles of a frame of `height` x `width` latents, as a list: rows and columns, in
        latents, as slices, and each output pixel's share in the sum of all tiles, (rows * scale,
        columns * scale). Shares add up to one.

        Diffusers blends a tile with the finished one above it, then with the finished one to its
        left. Where four tiles meet, the upper two have thus been blended horizontally before: there
        the horizontal ramp enters squared."""
        size, stride = (
            (32, 24)
            if tiled and max(height, width) > 32
            else (max(height, width), max(height, width))
        )

        def spans(length):
            for start in range(0, length, stride):
                stop, following = min(start + size, length), start + stride
                pixel = torch.arange(start * scale, stop * scale, device=like.device).to(like.dtype)
                rise = (pixel - start * scale) / (min(size - stride, stop - start) * scale)
                fall = 1 - (pixel - following * scale) / (
                    max(min(size - stride, length - following), 1) * scale
                )
                rise = rise.clamp(max=1) if start > 0 else torch.ones_like(pixel)
                yield slice(start, stop), rise, fall.clamp(max=1), pixel >= following * scale

        found = []
        for rows, rise, fall, shared in spans(height):  # shared: the following tile lies there too
            for columns, rise_x, fall_x, _ in spans(width):
                once, twice = rise_x * fall_x, rise_x**2 * (1 - (1 - fall_x) ** 2)
                found.append(
                    (
                        rows,
                        columns,
                        (rise * fall)[:, None] * torch.where(shared[:, None], twice, once),
                    )
                )
        return found

    def total(self, canvas):
        """The sum of all tiles. Here they are all on the canvas already; where processes share
        them, it is not so."""
        return canvas


# --------------------------------------------------------------------------------------------------
# The text encoder: UMT5 and its tokenizer


class TextLayer(nn.Module):
    """Self-attention with a relative position bias of its own, then a gated feed-forward network."""

    def __init__(self, config):
        super().__init__()
        dim, inner, eps = (
            config["d_model"],
            config["num_heads"] * config["d_kv"],
            config["layer_norm_epsilon"],
        )
        self.heads, self.buckets = config["num_heads"], config["relative_attention_num_buckets"]
        self.max_distance = config["relative_attention_max_distance"]
        self.attention_norm, self.ffn_norm = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)
        self.attention = nn.ModuleDict({name: nn.Linear(dim, inner, bias=False) for name in "qkv"})
        self.attention["o"] = nn.Linear(inner, dim, bias=False)
        self.attention["relative_attention_bias"] = nn.Embedding(self.buckets, self.heads)
        self.gate, self.up = (nn.Linear(dim, config["d_ff"], bias=False) for _ in range(2))
        self.down = nn.Linear(config["d_ff"], dim, bias=False)

    def position_bias(self, length, device):
        """(heads, L, L): a learned bias per bucket of distance, exact when near, logarithmic when
        far."""
        offset = (
            torch.arange(length, device=device) - torch.arange(length, device=device)[:, None]
        )  # key - query
        half, distance = self.buckets // 2, offset.abs()
        exact = half // 2
        far = (
            torch.log(distance.clamp(min=1).float() / exact)
            / math.log(self.max_distance / exact)
            * (half - exact)
        )
        bucket = torch.where(distance < exact, distance, (exact + far.long()).clamp(max=half - 1))
        return self.attention["relative_attention_bias"](bucket + half * (offset > 0)).permute(
            2, 0, 1
        )

    def forward(self, x, mask):
        """`x` (B, L, D); `mask` (B, L), nonzero where there is text."""
        x_norm = self.attention_norm(x)
        query, key, value = (
            self.attention[n](x_norm).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in "qkv"
        )
        scores = query @ key.transpose(-1, -2) + self.position_bias(
            x.shape[1], x.device
        )  # T5: not divided by sqrt(d)
        scores = scores.float().masked_fill(
            mask[:, None, None, :] == 0, torch.finfo(torch.float32).min
        )
        attended = scores.softmax(dim=-1).to(x.dtype) @ value  # (B, heads, L, d_kv)
        x = x + self.attention["o"](attended.transpose(1, 2).flatten(2))
        x_norm = self.ffn_norm(x)
        return x + self.down(F.gelu(self.gate(x_norm), approximate="tanh") * self.up(x_norm))


class TextEncoder(nn.Module):
    """The UMT5 encoder. `config` is the content of its config.json. Wan's has 5.7 billion
    parameters, needed once per prompt: `from_pretrained` reads none of them, each forward maps the
    embedding table and streams layer by layer."""

    FIXED = {"model_type": "umt5", "feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-6}
    SIZES = {
        "vocab_size": range(1, 2**22),
        "d_model": range(1, 2**16),
        "d_kv": range(1, 2**12),
        "d_ff": range(1, 2**18),
        "num_layers": range(1, 257),
        "num_heads": range(1, 257),
        "relative_attention_num_buckets": range(4, 4097, 2),
        "relative_attention_max_distance": range(4, 2**20),
    }

    def __init__(self, config):
        super().__init__()
        self.shared = nn.Embedding(config["vocab_size"], config["d_model"])
        self.layers = nn.ModuleList(TextLayer(config) for _ in range(config["num_layers"]))
        self.final_norm = nn.RMSNorm(config["d_model"], config["layer_norm_epsilon"])
        self.sources = None  # where its weights are, if they are streamed

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """The encoder of a `text_encoder/` folder, streamed; names and shapes are checked at once
        (ValueError)."""
        encoder = build(cls, folder)
        encoder.sources, encoder.target = find_weights(encoder, folder), (device, dtype)
        return encoder

    def run(self, name, *inputs):
        """What a part gives for its inputs, its weights in memory only meanwhile."""
        part = self.get_submodule(name)
        if (
            self.sources
        ):  # the table is mapped from the file as it is: of it, only a prompt's rows are read
            read_weights(
                self,
                self.sources,
                *(("cpu", None) if name == "shared" else self.target),
                name + ".",
            )
        weight = next(part.parameters())
        result = part(
            *(x.to(weight) if x.is_floating_point() else x.to(weight.device) for x in inputs)
        )
        if self.sources:
            part.to("meta")
        return result

    def forward(self, ids, mask):
        """Token ids (B, L) and mask (B, L) to (B, L, d_model). What stands at masked positions
        means nothing."""
        x = self.run("shared", ids)
        for index in range(len(self.layers)):
            x = self.run(f"layers.{index}", x, mask)
        return self.run("final_norm", x)


def clean_prompt(text):
    """The text as Wan's tokenizer expects it: broken Unicode mended, HTML entities resolved twice,
    single spaces."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(text)))).strip()


def load_tokenizer(folder, length=512):
    """The tokenizer of a `tokenizer/` folder, set to cut and pad texts to `length` tokens;
    ValueError if it is none."""
    file = Path(folder) / "tokenizer.json"
    read_json(file)
    try:
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.enable_padding(
            length=length, pad_id=tokenizer.get_vocab()["<pad>"], pad_token="<pad>"
        )
        tokenizer.enable_truncation(length)
        tokenizer.encode("a word")  # some faults show only in use
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # the library has no exception of its own, and its panics are not of Exception
        raise ValueError(f"{file} is no tokenizer with a token <pad> ({error!s:.200})") from None
    return tokenizer


def tokenize(tokenizer, prompts):
    """Token ids and mask, both int64 (B, length), of a list of prompts."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts should be a list of texts, but are {prompts!r:.99}")
    encodings = tokenizer.encode_batch([clean_prompt(prompt) for prompt in prompts])
    return torch.tensor([(encoding.ids, encoding.attention_mask) for encoding in encodings]).unbind(
        1
    )


@torch.no_grad()
def encode_prompt(encoder, tokenizer, prompts):
    """Text embeddings (B, length, d_model) of a list of prompts, zero after the end of each text.
    Raises ValueError if tokenizer and encoder do not belong together."""
    ids, mask = tokenize(tokenizer, prompts)
    if ids.max() >= (known := encoder.shared.num_embeddings):
        raise ValueError(f"the tokenizer knows token {ids.max()}, but the text encoder has {known}")
    return (embeddings := encoder(ids, mask)) * mask[..., None].to(embeddings)


# --------------------------------------------------------------------------------------------------
# Loading checkpoints in Diffusers layout

RENAMES = {  # ours: the checkpoint's
    "time_embedder.0.": "condition_embedder.time_embedder.linear_1.",
    "time_proj.": "condition_embedder.time_proj.",
    "time_embedder.2.": "condition_embedder.time_embedder.linear_2.",
    "table": "scale_shift_table",
    "text_embedder.0.": "condition_embedder.text_embedder.linear_1.",
    ".self_attn.": ".attn1.",
    "text_embedder.2.": "condition_embedder.text_embedder.linear_2.",
    ".cross_attn.": ".attn2.",
    ".to_out.": ".to_out.0.",
    ".ffn.0.": ".ffn.net.0.proj.",
    ".ffn.2.": ".ffn.net.2.",
    "mid_block.0.": "mid_block.resnets.0.",
    "mid_block.1.": "mid_block.attentions.0.",
    "mid_block.2.": "mid_block.resnets.1.",
    "layers.": "encoder.block.",
    "final_norm.": "encoder.final_layer_norm.",
    ".attention.": ".layer.0.SelfAttention.",
    ".attention_norm.": ".layer.0.layer_norm.",
    ".ffn_norm.": ".layer.1.layer_norm.",
    ".gate.": ".layer.1.DenseReluDense.wi_0.",
    ".up.": ".layer.1.DenseReluDense.wi_1.",
    ".down.": ".layer.1.DenseReluDense.wo.",
}


def checkpoint_name(name):
    """The name that a tensor of ours has in the published checkpoints."""
    for ours, theirs in RENAMES.items():
        name = name.replace(ours, theirs)
    return name


def build(cls, folder):
    """A `cls` as `folder`/config.json describes it, without memory (on the meta device). Raises
    ValueError, naming file and field, unless that is a Wan2.1 which can be built. An absent field
    is as good as null, false or empty."""
    file = Path(folder) / "config.json"
    config = {field: value for field, value in read_json(file).items() if value is not None}
    config.setdefault(
        "decoder_base_dim", config.get("base_dim")
    )  # a VAE's decoder, in Wan's as wide as its encoder
    for field, value in cls.FIXED.items():
        if (config.get(field) or None) != value:
            raise ValueError(f"{file}: {field} is {config.get(field)!r:.99}, but must be {value!r}")
    for field, sizes in cls.SIZES.items():
        value, sizes = config.get(field), sizes if isinstance(sizes, list) else [sizes]
        values = value if isinstance(value, list) else [value]
        if len(values) != len(sizes) or not all(
            type(x) is int and x in size
            if isinstance(size, range)
            else type(x) in (int, float) and size[0] <= x <= size[1]
            for x, size in zip(values, sizes, strict=True)
        ):
            raise ValueError(
                f"{file}: {field} is {value!r:.99}, but must be {len(sizes)} x {sizes[0]}"
            )
    with torch.device("meta"):
        return cls(config).eval().requires_grad_(False)


def find_weights(model, folder):
    """Where the weights of a model are: {our name: (checkpoint name, file)}. Raises ValueError,
    naming file and tensor, unless the safetensors files of `folder` have exactly its tensors. Only
    their headers are read."""
    folder, wanted = (
        Path(folder),
        {checkpoint_name(ours): (ours, x.shape) for ours, x in model.state_dict().items()},
    )
    files, index = (
        sorted(folder.glob("*.safetensors")),
        next(folder.glob("*.safetensors.index.json"), None),
    )
    indexed = read_json(index).get("weight_map") if index else None  # {checkpoint name: file name}
    if index:
        names = list(indexed.values()) if isinstance(indexed, dict) else [None]
        if any(
            type(name) is not str or Path(name).name != name or name[-12:] != ".safetensors"
            for name in names
        ):
            raise ValueError(
                f"{index}: weight_map must name .safetensors files beside it, but is {indexed!r:.300}"
            )
        files = [folder / name for name in sorted(set(names))]
    elif len(files) != 1:
        raise ValueError(
            f"{folder}: one .safetensors file is needed, or several and an index, but it has "
            f"{len(files) or 'none'}: {[file.name for file in folder.glob('*')]!s:.300}"
        )
    found = {}  # {(checkpoint name, file name): (shape, dtype)}
    for file in files:
        with opened(file) as tensors:
            entries = ((name, tensors.get_slice(name)) for name in tensors.keys())
            found |= {
                (name, file.name): (tuple(entry.get_shape()), entry.get_dtype())
                for name, entry in entries
            }
    indexed = indexed or dict(found.keys())
    faults = {name: "is missing" for name in wanted.keys() - indexed.keys()}
    faults |= {name: f"is missing from {file}" for name, file in indexed.items() - found.keys()}
    faults |= {name: f"should not be in {file}" for name, file in found.keys() - indexed.items()}
    faults |= {
        name: f"is not part of a {type(model).__name__}" for name in indexed.keys() - wanted.keys()
    }
    for (name, file), (shape, dtype) in ({} if faults else found).items():
        right = tuple(wanted[name][1])
        if shape != right or dtype not in ("F64", "F32", "F16", "BF16"):
            faults[name] = (
                f"in {file} is {dtype} {shape}, but should be floating-point numbers {right}"
            )
    for name, fault in faults.items():
        raise ValueError(f"{index or files[0]}: tensor {name} {fault}")
    return {wanted[name][0]: (name, folder / file) for name, file in indexed.items()}


def read_weights(model, sources, device, dtype, prefix=""):
    """Read the tensors of `model` whose names begin with `prefix`, one by one, each straight to its
    device and dtype (None: as in the file). On the CPU, a tensor that needs no cast is not read but
    mapped. Returns the model. Raises ValueError for a tensor with a number that is not finite."""
    state, float32 = {}, getattr(model, "FLOAT32", ())
    wanted = {ours: source for ours, source in sources.items() if ours.startswith(prefix)}
    for file in {file for _, file in wanted.values()}:
        with opened(file) as tensors:
            for ours, name in (
                (ours, name) for ours, (name, other) in wanted.items() if other == file
            ):
                tensor, keep = tensors.get_tensor(name), any(part in ours for part in float32)
                # What is kept is copied: else it would keep the file mapped, and all that was read
                # of it.
                state[ours] = tensor.to(device, torch.float32 if keep else dtype, copy=keep)
                if dtype is not None and not torch.stack(state[ours].aminmax()).isfinite().all():
                    raise ValueError(f"{file}: tensor {name} holds numbers that are not finite")
    model.load_state_dict(state, strict=False, assign=True)
    return model


@contextmanager
def opened(file):
    """The tensors of a safetensors file. Raises ValueError if it is not one, or not a whole one."""
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        state = (
            f"is no whole safetensors file ({error!s:.200})"
            if Path(file).is_file()
            else "is missing"
        )
        raise ValueError(f"{file} {state}; fetch it again") from None


def read_json(file):
    """The object in a JSON file. Raises ValueError if there is none."""
    try:
        content = json.loads(Path(file).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} is missing or not JSON ({error!s:.200})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds {content!r:.40}, not an object")
    return content
