"""Wan from scratch: the diffusion transformer, the causal video VAE, the UMT5 text encoder, and how
their weights are loaded.

For FreeSwim, three things are as they need not be for Wan: the transformer's self-attention is a
function that the caller passes in, a block's three parts can be called one by one, and tokens are
ordered (h, w, t).

Shapes: B clips, F frames, T latent frames (F = 4 * (T - 1) + 1), H x W tokens per frame,
N = T * H * W tokens, D channels, L text tokens. One token is a patch of 2 x 2 latents. One latent
has Z = 16 channels and is S x S = 8 x 8 pixels; in Wan2.2-TI2V-5B, Z is 48 and S 16. Tokens are
ordered (h, w, t), time innermost.
"""

import html
import json
import math
import re
import stat
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import ftfy
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message names the file and what is wrong with it."""


class Limit(NamedTuple):
    """What a field of a config.json may hold: a number, or with `count` a list of so many, or of as
    many as another field says."""

    kind: str  # "a whole number", "an even number" or "a number"
    low: float
    high: float
    count: int | str | None = None


# --------------------------------------------------------------------------------------------------
# The diffusion transformer


def full_attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """Every token sees every token. (B, heads, N, head_dim) each; `scale` defaults to
    1 / sqrt(head_dim)."""
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def rotary_table(grid: tuple[int, int, int], head_dim: int, device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the 3D rotary embedding, (N, 1, head_dim / 2) each, for a `grid` of
    (T, H, W) tokens in (h, w, t) order.

    A head's channels are split over frame, row and column (44, 42 and 42 of Wan's 128), and each
    part is rotated by its own position. The split is that of Wan's code; where head_dim // 3 is
    odd, Diffusers has another. Angles are computed in float64 and stored in float32, as in Wan.
    """
    frames, height, width = grid
    frame = torch.arange(frames, dtype=torch.float64, device=device)
    row = torch.arange(height, dtype=torch.float64, device=device)
    column = torch.arange(width, dtype=torch.float64, device=device)
    row, column, frame = torch.meshgrid(row, column, frame, indexing="ij")  # (H, W, T) each

    spatial_channels = 2 * (head_dim // 6)
    frame_channels = head_dim - 2 * spatial_channels
    angles = torch.cat(
        [
            rotary_angles(frame.flatten(), frame_channels),
            rotary_angles(row.flatten(), spatial_channels),
            rotary_angles(column.flatten(), spatial_channels),
        ],
        dim=1,
    )  # (N, head_dim / 2)
    cos = angles.cos().float().unsqueeze(1)
    sin = angles.sin().float().unsqueeze(1)
    return cos, sin


def rotary_angles(position, channels):
    """Angles (N, channels / 2) for positions (N,): one frequency for each pair of channels."""
    exponent = torch.arange(0, channels, 2, dtype=torch.float64, device=position.device) / channels
    return torch.outer(position, 10000.0**-exponent)


def apply_rotary(x, rotary):
    """Rotate neighbouring pairs of channels of `x`, (B, N, heads, head_dim), by the angles of their
    token, in float32. `rotary` holds cosines and sines as in `rotary_table`."""
    if torch.compiler.is_compiling():
        return apply_rotary_real(x, rotary)
    return apply_rotary_complex(x, rotary)


def apply_rotary_real(x, rotary):
    """`apply_rotary` in real numbers, which a compiler fuses into one pass over memory."""
    cos, sin = rotary
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, N, heads, head_dim / 2, 2)
    cos = cos.unsqueeze(-1)
    sin = torch.cat([-sin.unsqueeze(-1), sin.unsqueeze(-1)], dim=-1)
    rotated = pairs * cos + pairs.flip(-1) * sin
    return rotated.flatten(-2).to(x.dtype)


def apply_rotary_complex(x, rotary):
    """`apply_rotary` in complex numbers, which takes one pass over memory without a compiler."""
    cos, sin = rotary
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, N, heads, head_dim / 2, 2)
    rotated = torch.view_as_complex(pairs) * torch.complex(cos, sin)
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention from `x`, (B, N, D), to `context`, (B, M, D). The query and key norms
    span all heads."""

    def __init__(self, dim, heads, eps):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim)
        self.to_k = nn.Linear(dim, dim)
        self.to_v = nn.Linear(dim, dim)
        self.to_out = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim, eps)
        self.norm_k = nn.RMSNorm(dim, eps)

    def forward(self, x, context, attend, rotary=None):
        query = self.norm_q(self.to_q(x)).unflatten(-1, (self.heads, -1))  # (B, N, heads, head_dim)
        key = self.norm_k(self.to_k(context)).unflatten(-1, (self.heads, -1))
        value = self.to_v(context).unflatten(-1, (self.heads, -1))
        if rotary is not None:
            query = apply_rotary(query, rotary)
            key = apply_rotary(key, rotary)
        query = query.transpose(1, 2)  # (B, heads, N, head_dim)
        key = key.transpose(1, 2)
        value = value.transpose(1, 2)
        attended = attend(query, key, value)
        return self.to_out(attended.transpose(1, 2).flatten(2))  # (B, N, D)


def modulate(tokens, shift, scale, eps):
    """Layer norm without weights, then scale and shift, in float32. The result has the dtype of the
    tokens."""
    normed = F.layer_norm(tokens.float(), tokens.shape[-1:], eps=eps)
    return (normed * (1 + scale) + shift).to(tokens.dtype)


# Elements of the feed-forward network's inner tensor at a time: 1 GiB in bfloat16. All tokens of a
# 3840x2160 clip at once would pass 2**31 elements, the most that 32-bit offsets can address.
FEED_FORWARD_ELEMENTS = 2**29


def random_table(rows, dim):
    """A scale_shift_table, (1, rows, dim), before training. Drawn so that it imports no compiler on
    the meta device, like `embedding_table`."""
    return nn.init.trunc_normal_(torch.empty(1, rows, dim), std=dim**-0.5)


class Block(nn.Module):
    """One transformer block, in three parts that the caller composes: self-attention,
    cross-attention and feed-forward network.

    `tokens` is (B, N, D). `modulation`, (B, 6, D) float32, is the timestep's shift, scale and gate
    for the self-attention and for the feed-forward network, to which a block adds its own table.
    Norms and residuals are computed in float32, matrix products in the dtype of the weights.
    """

    def __init__(self, dim, heads, ffn_dim, eps):
        super().__init__()
        self.eps = eps
        self.chunk = FEED_FORWARD_ELEMENTS // ffn_dim  # tokens
        self.self_attn = Attention(dim, heads, eps)
        self.cross_attn = Attention(dim, heads, eps)
        self.norm2 = nn.LayerNorm(dim, eps)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU("tanh"), nn.Linear(ffn_dim, dim))
        self.scale_shift_table = nn.Parameter(random_table(6, dim))

    def self_attention(self, tokens: Tensor, modulation: Tensor, rotary, attend) -> Tensor:
        """The tokens after self-attention."""
        shift, scale, gate, _, _, _ = (self.scale_shift_table + modulation).chunk(6, dim=1)
        x = modulate(tokens, shift, scale, self.eps)
        attended = self.self_attn(x, x, attend, rotary)
        return (gate * attended + tokens.float()).to(tokens.dtype)

    def cross_attention(self, tokens: Tensor, context: Tensor) -> Tensor:
        """What the text, `context` (B, L, D), adds to the tokens: (B, N, D), not yet added."""
        x = self.norm2(tokens.float()).to(tokens.dtype)
        return self.cross_attn(x, context, full_attention)

    def feed_forward(self, tokens: Tensor, modulation: Tensor) -> Tensor:
        """The tokens after the feed-forward network, a chunk of tokens at a time: its inner tensor
        would be the largest of all."""
        chunks = []
        for chunk in tokens.split(self.chunk, dim=1):
            chunks.append(self.feed_forward_chunk(chunk, modulation))
        return torch.cat(chunks, dim=1)

    def feed_forward_chunk(self, tokens, modulation):
        _, _, _, shift, scale, gate = (self.scale_shift_table + modulation).chunk(6, dim=1)
        x = modulate(tokens, shift, scale, self.eps)
        return (tokens.float() + gate * self.ffn(x)).to(tokens.dtype)


class WanTransformer(nn.Module):
    """The DiT (Wan technical report, section 4.2). `config` is the content of its config.json."""

    FLOAT32 = ("time_embedder", "scale_shift_table", "norm2")  # parts that always stay in float32
    FIXED = {
        "_class_name": "WanTransformer3DModel",
        "image_dim": None,
        "added_kv_proj_dim": None,
        "cross_attn_norm": True,
        "in_channels": (16, 48),  # one or the other
        "out_channels": (16, 48),
        "patch_size": [1, 2, 2],
        "qk_norm": "rms_norm_across_heads",
        "eps": 1e-6,
    }
    LIMITS = {
        "num_attention_heads": Limit("a whole number", 1, 256),
        "attention_head_dim": Limit("an even number", 6, 1024),
        "num_layers": Limit("a whole number", 1, 256),
        "ffn_dim": Limit("a whole number", 1, 2**18),
        "text_dim": Limit("a whole number", 1, 2**16),
        "freq_dim": Limit("an even number", 2, 2**16),
    }
    RENAMES = {  # ours: the checkpoint's
        "time_embedder.0.": "condition_embedder.time_embedder.linear_1.",
        "time_embedder.2.": "condition_embedder.time_embedder.linear_2.",
        "time_proj.": "condition_embedder.time_proj.",
        "text_embedder.0.": "condition_embedder.text_embedder.linear_1.",
        "text_embedder.2.": "condition_embedder.text_embedder.linear_2.",
        ".self_attn.": ".attn1.",
        ".cross_attn.": ".attn2.",
        ".to_out.": ".to_out.0.",
        ".ffn.0.": ".ffn.net.0.proj.",
        ".ffn.2.": ".ffn.net.2.",
    }
    boundary = 0  # it serves timesteps from here on: all. Wan2.2 has a second one for the rest

    def __init__(
        self,
        config: dict,
        block: type[Block] = Block,
        attention: Callable = full_attention,
        prefetch: Callable = iter,
    ):
        """`block` is the class of its blocks, and `attention` its full attention: a GPU has faster
        ones. `prefetch(blocks)` yields the blocks in order, each when its weights are on the
        device."""
        super().__init__()
        self.config = config
        self.full_attention = attention
        self.prefetch = prefetch
        self.eps = config["eps"]
        self.heads = config["num_attention_heads"]
        self.head_dim = config["attention_head_dim"]
        self.channels = config["in_channels"]
        self.dim = self.heads * self.head_dim
        dim = self.dim
        ffn_dim = config["ffn_dim"]
        patch = tuple(config["patch_size"])
        self.patch_embedding = nn.Conv3d(self.channels, dim, kernel_size=patch, stride=patch)
        self.time_embedder = nn.Sequential(
            nn.Linear(config["freq_dim"], dim), nn.SiLU(), nn.Linear(dim, dim)
        )
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = nn.Sequential(
            nn.Linear(config["text_dim"], dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.blocks = nn.ModuleList()
        for _ in range(config["num_layers"]):
            self.blocks.append(block(dim, self.heads, ffn_dim, self.eps))
        self.proj_out = nn.Linear(dim, 4 * self.channels)
        self.scale_shift_table = nn.Parameter(random_table(2, dim))

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32, adjust=None, **parts):
        """The DiT of a Diffusers `transformer/` folder. `adjust` is as in `read_weights`, `parts`
        are the constructor's. Raises CheckpointError for any other folder."""
        return load_model(cls, folder, device, dtype, adjust, **parts)

    def select_expert(self, timestep):
        """Get ready for a step at this timestep. Nothing to do: only Wan2.2-T2V-A14B has two
        transformers, of which support/experts.py loads the right one here."""

    def embed(self, latents: Tensor, timestep: Tensor, text: Tensor):
        """What the blocks work on: tokens (B, N, D), embedded time (B, D), its modulation
        (B, 6, D), embedded text (B, L, D), the rotary table, and the grid (T, H, W).

        `latents` is (B, Z, T, 2H, 2W), `timestep` (B,) from 0 to 1000, `text` (B, L, text_dim).
        Raises ValueError for other shapes.
        """
        self.check_inputs(latents, timestep, text)
        dtype = self.patch_embedding.weight.dtype
        patches = self.patch_embedding(latents.to(dtype))  # (B, D, T, H, W)
        tokens = patches.permute(0, 3, 4, 2, 1).flatten(1, 3)  # (B, H*W*T, D): sets the order
        grid = tuple(patches.shape[2:])
        rotary = rotary_table(grid, self.head_dim, latents.device)
        time_emb = self.time_embedder(self.timestep_embedding(timestep))  # (B, D), float32
        modulation = self.time_proj(F.silu(time_emb).to(dtype))
        modulation = modulation.unflatten(-1, (6, -1)).float()  # (B, 6, D)
        context = self.text_embedder(text.to(dtype))  # (B, L, D)
        return tokens, time_emb, modulation, context, rotary, grid

    def check_inputs(self, latents, timestep, text):
        if self.scale_shift_table.dtype != torch.float32:
            raise ValueError(
                "the time embedding, tables and norms of a transformer have to stay in float32; "
                "choose the dtype in from_pretrained, instead of .to(dtype)"
            )
        batch = latents.shape[0]
        right_latents = (
            latents.ndim == 5
            and latents.shape[1] == self.channels
            and latents.shape[3] % 2 == 0
            and latents.shape[4] % 2 == 0
        )
        right_timestep = isinstance(timestep, torch.Tensor) and timestep.shape == (batch,)
        right_text = text.ndim == 3 and text.shape[0] == batch
        if not (right_latents and right_timestep and right_text):
            raise ValueError(
                f"latents {list(latents.shape)}, timestep {timestep} and text {list(text.shape)} "
                f"should be tensors (B, {self.channels}, T, 2H, 2W), (B,) and (B, L, text_dim)"
            )

    def timestep_embedding(self, timestep):
        """The sinusoidal embedding of timesteps (B,): (B, freq_dim), cosines before sines."""
        half = self.config["freq_dim"] // 2
        index = torch.arange(half, device=timestep.device)
        frequency = torch.exp(-math.log(10000) * index / half)
        phase = timestep.float()[:, None] * frequency
        return torch.cat([phase.cos(), phase.sin()], dim=-1)

    def unembed(self, tokens: Tensor, time_emb: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """From the last block's tokens to the velocity, (B, Z, T, 2H, 2W) float32. `grid` is
        (T, H, W)."""
        return self.unpatchify(self.final_layer(tokens, time_emb).float(), grid)

    def unpatchify(self, patches, grid):
        """From a patch for every token, (B, N, 4Z), to (B, Z, T, 2H, 2W)."""
        frames, height, width = grid
        patches = patches.view(-1, height, width, frames, 2, 2, self.channels)
        patches = patches.permute(0, 6, 3, 1, 4, 2, 5)  # (B, Z, T, H, 2, W, 2)
        return patches.flatten(5, 6).flatten(3, 4)

    def final_layer(self, tokens, time_emb):
        """A patch of 2 x 2 latents for every token, (B, N, 4Z)."""
        shift, scale = (self.scale_shift_table + time_emb[:, None]).chunk(2, dim=1)  # (B, 1, D)
        return self.proj_out(modulate(tokens, shift, scale, self.eps))

    def forward(
        self, latents: Tensor, timestep: Tensor, text: Tensor, attend: Callable | None = None
    ) -> Tensor:
        """The velocity, noise - clean, at `latents`: float32, in their shape. Inputs are as in
        `embed`. `attend` is the self-attention, by default the transformer's full attention."""
        if attend is None:
            attend = self.full_attention
        tokens, time_emb, modulation, context, rotary, grid = self.embed(latents, timestep, text)
        for block in self.prefetch(self.blocks):
            tokens = block.self_attention(tokens, modulation, rotary, attend)
            tokens = tokens + block.cross_attention(tokens, context)
            tokens = block.feed_forward(tokens, modulation)
        return self.unembed(tokens, time_emb, grid)


# --------------------------------------------------------------------------------------------------
# The causal video VAE
#
# A clip streams through in chunks: first one frame, then four at a time (or 1 + 4k, then 4k).
# What a layer must remember of earlier chunks is in `history`, a dict keyed by the layer. A layer
# that is not in it is at the start of the clip.


def per_frame(module, x):
    """Apply a 2D module to every frame of (B, C, F, H, W)."""
    batch = x.shape[0]
    frames = x.transpose(1, 2).flatten(0, 1)  # (B*F, C, H, W)
    return module(frames).unflatten(0, (batch, -1)).transpose(1, 2)


class CausalConv3d(nn.Conv3d):
    """A convolution whose output frame sees its own input frame and the two before it. Before the
    clip's first frame there are zeros."""

    def __init__(self, in_channels, out_channels, kernel_size=(3, 3, 3)):
        padding = (0, kernel_size[1] // 2, kernel_size[2] // 2)
        super().__init__(in_channels, out_channels, kernel_size, padding=padding)

    def forward(self, x, history):
        if self in history:
            x = torch.cat([history[self], x], dim=2)
        else:
            x = F.pad(x, (0, 0, 0, 0, 2, 0))
        history[self] = x[:, :, -2:].clone()  # a view would keep the whole chunk in memory
        if x.is_cuda:
            return super().forward(x)
        return conv3d_by_conv2d(x, self.weight, self.bias, self.padding[1:])


def conv3d_by_conv2d(x, weight, bias, padding):
    """A 3D convolution with three taps in time, as a 2D convolution over three frames stacked as
    channels. On a CPU, PyTorch's conv3d is five times slower. (B, C, F + 2, H, W) to
    (B, C', F, H, W)."""
    batch = x.shape[0]
    x = x.permute(0, 2, 3, 4, 1)  # (B, F + 2, H, W, C), channels last in memory too
    frames = torch.cat([x[:, :-2], x[:, 1:-1], x[:, 2:]], dim=-1)  # (B, F, H, W, 3C)
    frames = frames.flatten(0, 1).movedim(-1, 1)  # (B*F, 3C, H, W)
    weight = weight.transpose(1, 2).flatten(1, 2)  # (C', 3C, kernel height, kernel width)
    weight = weight.contiguous(memory_format=torch.channels_last)
    frames = F.conv2d(frames, weight, bias, padding=padding)
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


class ChannelNorm(nn.Module):
    """Root-mean-square norm over the channels of (B, C, ...)."""

    EPS = 1e-24  # of the mean square: Wan divides by max(norm, 1e-12)

    def __init__(self, channels, spatial_dims=3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * spatial_dims))

    def forward(self, x):
        mean_square = x.float().square().mean(dim=1, keepdim=True)
        return x * torch.rsqrt(mean_square + self.EPS).to(x.dtype) * self.gamma


class NormSiLU(ChannelNorm):
    def forward(self, x):
        return F.silu(super().forward(x))


class ResidualBlock(nn.Module):
    def __init__(self, in_channels, out_channels, norm):
        super().__init__()
        self.norm1 = norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels)
        self.norm2 = norm(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels)
        self.conv_shortcut = nn.Identity()
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x, history):
        y = self.conv1(self.norm1(x), history)
        y = self.conv2(self.norm2(y), history)
        return y + self.conv_shortcut(x)


class FrameAttention(nn.Module):
    """Self-attention with one head among the positions of each frame, added to its input."""

    def __init__(self, channels):
        super().__init__()
        self.norm = ChannelNorm(channels, spatial_dims=2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def attend(self, frames):
        """What attention adds to frames (B*F, C, H, W)."""
        height, width = frames.shape[2:]
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2)  # (B*F, H*W, 3C)
        query, key, value = qkv.unsqueeze(1).chunk(3, dim=-1)  # (B*F, 1, H*W, C)
        attended = F.scaled_dot_product_attention(query, key, value)
        attended = attended.squeeze(1).transpose(1, 2)  # (B*F, C, H*W)
        return self.proj(attended.unflatten(2, (height, width)))

    def forward(self, x):
        return x + per_frame(self.attend, x)


class Downsample(nn.Module):
    """Halve the rows and columns and, if `temporal`, the frames after the first."""

    def __init__(self, channels, temporal):
        super().__init__()
        conv = nn.Conv2d(channels, channels, 3, stride=2)
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), conv)  # pads right and bottom
        self.frames = 2 if temporal else 1  # that become one
        self.time_conv = None
        if temporal:
            self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x, history):
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        past = history.get(self)  # the last frame of the chunk before
        history[self] = x[:, :, -1:].clone()
        if past is not None:
            return self.time_conv(torch.cat([past, x], dim=2))
        # The clip's first frame passes unchanged, and is the history of the frames after it.
        first = x[:, :, :1]
        if x.shape[2] == 1:
            return first
        return torch.cat([first, self.time_conv(x)], dim=2)


class Upsample(nn.Module):
    """Double the rows and columns, change the channels and, if `temporal`, double the frames after
    the first."""

    def __init__(self, channels, out_channels, temporal):
        super().__init__()
        self.frames = 2 if temporal else 1  # for each one
        self.time_conv = None
        if temporal:
            self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1))
        conv = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest-exact"), conv)

    def forward(self, x, history):
        if self.time_conv is not None:
            x = self.double_frames(x, history)
        return per_frame(self.resample, x)

    def double_frames(self, x, history):
        if self.time_conv in history:
            return self.frame_pairs(x, history)
        # The clip's first frame stays one frame. For the frames after it, the past is zeros: the
        # convolution never sees the first frame.
        first = x[:, :, :1]
        rest = x[:, :, 1:]
        zeros = torch.zeros_like(first)
        history[self.time_conv] = torch.cat([zeros, zeros], dim=2)  # keeps the layout in memory
        if rest.shape[2] == 0:
            return first
        return torch.cat([first, self.frame_pairs(rest, history)], dim=2)

    def frame_pairs(self, x, history):
        """Two frames for each one: (B, C, F, H, W) to (B, C, 2F, H, W)."""
        pairs = self.time_conv(x, history).unflatten(1, (2, -1))  # (B, 2, C, F, H, W)
        return pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)


class MidBlock(nn.Module):
    def __init__(self, channels, norm):
        super().__init__()
        self.resnets = nn.ModuleList(
            [ResidualBlock(channels, channels, norm), ResidualBlock(channels, channels, norm)]
        )
        self.attentions = nn.ModuleList([FrameAttention(channels)])

    def forward(self, x, history):
        x = self.resnets[0](x, history)
        x = self.attentions[0](x)
        return self.resnets[1](x, history)


def residual_blocks(in_channels, out_channels, count, norm):
    """`count` residual blocks, of which the first changes the channels."""
    blocks = nn.ModuleList([ResidualBlock(in_channels, out_channels, norm)])
    for _ in range(count - 1):
        blocks.append(ResidualBlock(out_channels, out_channels, norm))
    return blocks


class ResidualDownBlock(nn.Module):
    """A stage of Wan2.2-TI2V-5B's encoder, with a shortcut around all of it."""

    def __init__(self, in_channels, out_channels, blocks, downsampler, norm):
        super().__init__()
        self.out_channels = out_channels
        self.resnets = residual_blocks(in_channels, out_channels, blocks, norm)
        self.downsampler = downsampler  # None in the last stage

    def forward(self, x, history):
        y = x
        for block in self.resnets:
            y = block(y, history)
        if self.downsampler is None:
            return y + self.shortcut(x, frames=1, pixels=1)
        y = self.downsampler(y, history)
        return y + self.shortcut(x, frames=self.downsampler.frames, pixels=2)

    def shortcut(self, x, frames, pixels):
        """`x` in the shape of the output, without weights: blocks of `frames` x `pixels` x `pixels`
        positions become channels, and the mean of some in a row is one output channel."""
        # The clip's first frame has no neighbour: it follows a frame of zeros.
        x = F.pad(x, (0, 0, 0, 0, x.shape[2] % frames, 0))
        x = x.unflatten(4, (-1, pixels))
        x = x.unflatten(3, (-1, pixels))
        x = x.unflatten(2, (-1, frames))  # (B, C, F', frames, H', pixels, W', pixels)
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6)  # (B, C, frames, pixels, pixels, F', H', W')
        x = x.flatten(1, 4)
        return x.unflatten(1, (self.out_channels, -1)).mean(dim=2)


class Encoder(nn.Module):
    """Frames (B, 3, F, H, W), or their patches (B, 12, F, H, W), to moments (B, 2Z, T, H/8, W/8),
    chunk by chunk."""

    def __init__(self, config, norm):
        super().__init__()
        blocks = config["num_res_blocks"]
        channels = config["base_dim"]
        self.conv_in = CausalConv3d(pixel_channels(config), channels)
        self.down_blocks = nn.ModuleList()
        for stage, multiplier in enumerate(config["dim_mult"]):
            out_channels = config["base_dim"] * multiplier
            downsampler = None
            if stage < 3:
                downsampler = Downsample(out_channels, temporal=stage > 0)
            if config.get("is_residual"):
                block = ResidualDownBlock(channels, out_channels, blocks, downsampler, norm)
                self.down_blocks.append(block)
            else:
                self.down_blocks.extend(residual_blocks(channels, out_channels, blocks, norm))
                if downsampler is not None:
                    self.down_blocks.append(downsampler)
            channels = out_channels
        self.mid_block = MidBlock(channels, norm)
        self.norm_out = norm(channels)
        self.conv_out = CausalConv3d(channels, 2 * config["z_dim"])

    def forward(self, x, history):
        x = self.conv_in(x, history)
        for layer in self.down_blocks:
            x = layer(x, history)
        x = self.mid_block(x, history)
        return self.conv_out(self.norm_out(x), history)


class UpBlock(nn.Module):
    def __init__(self, in_channels, out_channels, blocks, upsampler, norm):
        super().__init__()
        self.resnets = residual_blocks(in_channels, out_channels, blocks, norm)
        self.upsamplers = nn.ModuleList()
        if upsampler is not None:
            self.upsamplers.append(upsampler)

    def forward(self, x, history):
        for block in self.resnets:
            x = block(x, history)
        for upsampler in self.upsamplers:
            x = upsampler(x, history)
        return x


class ResidualUpBlock(nn.Module):
    """A stage of Wan2.2-TI2V-5B's decoder, with a shortcut around all of it."""

    def __init__(self, in_channels, out_channels, blocks, upsampler, norm):
        super().__init__()
        self.out_channels = out_channels
        self.resnets = residual_blocks(in_channels, out_channels, blocks, norm)
        self.upsampler = upsampler  # None in the last stage, which has no shortcut either

    def forward(self, x, history):
        y = x
        for block in self.resnets:
            y = block(y, history)
        if self.upsampler is None:
            return y
        y = self.upsampler(y, history)
        shortcut = self.shortcut(x, self.upsampler.frames)
        # Of the clip's first frame the upsampler makes one: it is the last of its copies.
        return y + shortcut[:, :, -y.shape[2] :]

    def shortcut(self, x, frames):
        """`x` in the shape of the output, without weights: channels are repeated, and then become
        blocks of `frames` x 2 x 2 positions."""
        x = x.repeat_interleave(self.out_channels * frames * 4 // x.shape[1], dim=1)
        x = x.unflatten(1, (-1, frames, 2, 2))  # (B, C', frames, 2, 2, F, H, W)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4)  # (B, C', F, frames, H, 2, W, 2)
        return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


class Decoder(nn.Module):
    """Latents (B, Z, T, H/8, W/8) to frames (B, 3, F, H, W), or their patches (B, 12, F, H, W),
    chunk by chunk."""

    def __init__(self, config, norm):
        super().__init__()
        blocks = config["num_res_blocks"]
        base_dim = config.get("decoder_base_dim") or config["base_dim"]
        channels = base_dim * config["dim_mult"][-1]
        self.conv_in = CausalConv3d(config["z_dim"], channels)
        self.mid_block = MidBlock(channels, norm)
        self.up_blocks = nn.ModuleList()
        for stage, multiplier in enumerate(reversed(config["dim_mult"])):
            inner = base_dim * multiplier
            if config.get("is_residual"):
                out_channels = inner
                block = ResidualUpBlock
            else:
                out_channels = inner // 2  # the upsampler halves them
                block = UpBlock
            upsampler = None
            if stage < 3:
                upsampler = Upsample(inner, out_channels, temporal=stage < 2)
            self.up_blocks.append(block(channels, inner, blocks + 1, upsampler, norm))
            channels = out_channels
        self.norm_out = norm(inner)
        self.conv_out = CausalConv3d(inner, pixel_channels(config))

    def forward(self, x, history):
        x = self.conv_in(x, history)
        x = self.mid_block(x, history)
        for block in self.up_blocks:
            x = block(x, history)
        return self.conv_out(self.norm_out(x), history)


def pixel_channels(config):
    """The channels of what a VAE encodes: a pixel's 3, or those of a patch of pixels."""
    return 3 * (config.get("patch_size") or 1) ** 2


def patches_of(video, size):
    """A view of a video (B, 3, F, H, W) as patches of `size` x `size` pixels:
    (B, 3, size, size, F, H / size, W / size). Within a patch, columns come before rows."""
    video = video.unflatten(4, (-1, size)).unflatten(3, (-1, size))
    return video.permute(0, 1, 6, 4, 2, 3, 5)


def pixels_of(latents):
    """The slice of pixels, or patches, that a slice of latents stands for, along one axis."""
    return slice(8 * latents.start, 8 * latents.stop)


def frames_of(t):
    """The slice of frames that latent frame `t` stands for: the first one alone, then four each."""
    return slice(max(4 * t - 3, 0), 4 * t + 1)


class WanVAE(nn.Module):
    """The causal video VAE (Wan technical report, section 4.1). `config` is the content of its
    config.json.

    It wants float32: in bfloat16 a decoded clip is 2% off. Time is streamed, so apart from the clip
    itself memory does not depend on its length. With `tiled`, frames larger than 32 latents are
    processed in tiles of 32 latents, one every 24, blended linearly exactly as Diffusers does.

    Latents have Z channels and are S x S pixels: 16 and 8. Wan2.2-TI2V-5B's VAE has 48 and 16. It
    works on patches of 2 x 2 pixels, and has shortcuts around its stages (`is_residual`).
    """

    FIXED = {
        "_class_name": "AutoencoderKLWan",
        "is_residual": (None, True),
        "patch_size": None,
        "attn_scales": None,
        "temperal_downsample": [False, True, True],
        "z_dim": 16,
    }
    FIXED_IF_RESIDUAL = {"patch_size": 2, "z_dim": 48}
    LIMITS = {
        "base_dim": Limit("an even number", 2, 1024),
        "decoder_base_dim": Limit("an even number", 2, 1024),
        "dim_mult": Limit("a whole number", 1, 64, count=4),
        "num_res_blocks": Limit("a whole number", 1, 16),
        "latents_mean": Limit("a number", -1000, 1000, count="z_dim"),
        "latents_std": Limit("a number", 1e-6, 1000, count="z_dim"),
    }
    RENAMES = {}  # the names are the checkpoint's

    def __init__(self, config, norm=NormSiLU, tile=32, stride=24, tiles_at_once=1, share=None):
        """`norm` is the class of its norms: a GPU has a faster one. `tile` and `stride` are in
        latents; several tiles at once are faster on a GPU, but take memory. `share`, if several
        processes share the tiles, picks those of this one and adds up what all of them made."""
        super().__init__()
        self.config = config
        self.tile = tile
        self.stride = stride
        self.tiles_at_once = tiles_at_once
        self.share = share
        self.channels = config["z_dim"]
        self.patch = config.get("patch_size") or 1
        self.spatial_factor = 8 * self.patch  # pixels of a latent, along one axis
        self.encoder = Encoder(config, norm)
        self.quant_conv = nn.Conv3d(2 * self.channels, 2 * self.channels, 1)
        self.post_quant_conv = nn.Conv3d(self.channels, self.channels, 1)
        self.decoder = Decoder(config, norm)
        # Of each latent channel over the training set. Latents are normalised with them.
        self.mean = torch.tensor(config["latents_mean"], device="cpu").view(-1, 1, 1, 1)
        self.std = torch.tensor(config["latents_std"], device="cpu").view(-1, 1, 1, 1)

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32, **parts):
        """The VAE of a Diffusers `vae/` folder; `parts` are the constructor's. Raises
        CheckpointError for any other folder."""
        return load_model(cls, folder, device, dtype, **parts)

    def encode_chunk(self, frames: Tensor, history: dict) -> Tensor:
        """Frames (B, 3, f, H, W), or their patches (B, 12, f, H, W), to the means and log variances
        of their latents, (B, 2Z, t, H/8, W/8)."""
        return self.quant_conv(self.encoder(frames, history))

    def decode_chunk(self, latents: Tensor, history: dict) -> Tensor:
        """Latents (B, Z, t, H/8, W/8), not normalised, to frames (B, 3, f, H, W), or their patches
        (B, 12, f, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(latents), history)

    @torch.no_grad()
    def encode(self, video: Tensor, tiled: bool = True, progress: Callable = iter) -> Tensor:
        """A video (B, 3, F, H, W) in [-1, 1] to the posterior mean of its latents,
        (B, Z, k + 1, H/S, W/S), normalised.

        F must be 4k + 1, H and W multiples of S, and values finite floating-point numbers
        (ValueError if not). The video may stay on the CPU. `progress` may wrap the list of tiles.
        """
        check_video(video, self.spatial_factor)
        batch, _, frames, height, width = video.shape
        height = height // self.spatial_factor  # latents
        width = width // self.spatial_factor
        weight = self.quant_conv.weight
        shape = (batch, self.channels, frames // 4 + 1, height, width)
        latents = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        patches = patches_of(video, self.patch)
        tiles = self.tiles(height, width, 1, tiled, weight)
        for group in progress(tile_groups(tiles, self.tiles_at_once)):
            pixels = []
            for tile in group:
                pixels.append(patches[..., pixels_of(tile.rows), pixels_of(tile.columns)])
            for t, means in enumerate(self.encode_tiles(pixels)):
                for tile, mean in zip(group, means.split(batch), strict=True):
                    target = latents[:, :, t : t + 1, tile.rows, tile.columns]
                    target += tile.weight * mean
        if self.share is not None:
            self.share.add_up(latents)
        return (latents - self.mean.to(latents)) / self.std.to(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor, tiled: bool = True, progress: Callable = iter) -> Tensor:
        """Normalised `latents` (B, Z, T, h, w) to video (B, 3, 4T - 3, Sh, Sw), clamped to
        [-1, 1], in the VAE's dtype. `progress` may wrap the list of tiles."""
        latents = latents.to(self.quant_conv.weight.dtype)
        batch, _, frames, height, width = latents.shape
        latents = latents * self.std.to(latents) + self.mean.to(latents)
        size = self.spatial_factor
        video = latents.new_zeros(batch, 3, 4 * frames - 3, size * height, size * width)
        patches = patches_of(video, self.patch)
        tiles = self.tiles(height, width, 8, tiled, latents)
        for group in progress(tile_groups(tiles, self.tiles_at_once)):
            parts = [latents[..., tile.rows, tile.columns] for tile in group]
            for t, pixels in enumerate(self.decode_tiles(torch.cat(parts))):
                pixels = pixels.unflatten(1, (3, self.patch, self.patch))
                for tile, part in zip(group, pixels.split(batch), strict=True):
                    target = patches[..., pixels_of(tile.rows), pixels_of(tile.columns)]
                    target[..., frames_of(t), :, :] += tile.weight * part
        if self.share is not None:
            self.share.add_up(video)
        return video.clamp_(-1, 1)

    def encode_tiles(self, pixels):
        """The means (n*B, Z, 1, h, w) of one latent frame after the other, of a list of n tiles
        (B, 3, p, p, F, 8h, 8w) as in `patches_of`. They may be on the CPU."""
        history = {}
        for t in range(pixels[0].shape[4] // 4 + 1):
            chunk = torch.cat([tile[..., frames_of(t), :, :] for tile in pixels])
            chunk = chunk.flatten(1, 3).to(self.quant_conv.weight)
            mean, _ = self.encode_chunk(chunk, history).chunk(2, dim=1)
            yield mean

    def decode_tiles(self, latents):
        """The pixels (B, 3, 1 or 4, 8h, 8w), or patches (B, 12, 1 or 4, 8h, 8w), of one latent
        frame after the other, of latents (B, Z, T, h, w)."""
        history = {}
        for t in range(latents.shape[2]):
            yield self.decode_chunk(latents[:, :, t : t + 1], history)

    def tiles(self, height, width, scale, tiled, like):
        """The tiles of a frame of `height` x `width` latents that this process works on. An output
        pixel is 1 / `scale` latents large; weights have device and dtype of `like`."""
        size = self.tile
        stride = self.stride
        if not tiled or max(height, width) <= size:
            size = max(height, width)
            stride = size
        tiles = []
        for row in tiles_along_axis(height, size, stride, scale, like):
            for column in tiles_along_axis(width, size, stride, scale, like):
                tiles.append(Tile(row.latents, column.latents, blending_weight(row, column)))
        if self.share is not None:
            return self.share.own(tiles)
        return tiles


def check_video(video, multiple):
    """Raise ValueError for what cannot be encoded."""
    if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
        raise ValueError(
            f"a video is a floating-point tensor (B, 3, F, H, W) in [-1, 1], but this is "
            f"{video.dtype} {list(video.shape)}"
        )
    _, _, frames, height, width = video.shape
    if frames % 4 != 1 or height % multiple != 0 or width % multiple != 0:
        raise ValueError(
            f"cannot encode {frames} frames of {width}x{height}: "
            f"frames must be 4k + 1, and sides multiples of {multiple}"
        )
    if not is_finite(video):
        raise ValueError("the video holds numbers that are not finite")


class Tile(NamedTuple):
    rows: slice  # of latents
    columns: slice
    weight: torch.Tensor  # of each output pixel in the sum of all tiles, (rows, columns)

    @property
    def size(self):
        return self.weight.shape


def tile_groups(tiles, count):
    """The tiles in lists of up to `count` neighbours of the same size, to be processed at once."""
    groups = []
    group = []  # the last of them
    for tile in tiles:
        is_full = len(group) == count
        has_other_size = len(group) > 0 and group[0].size != tile.size
        if len(groups) == 0 or is_full or has_other_size:
            group = []
            groups.append(group)
        group.append(tile)
    return groups


class AxisTile(NamedTuple):
    """A tile along one axis."""

    latents: slice
    rise: torch.Tensor  # of each output pixel: from 0 to 1 where the tile before overlaps, then 1
    fall: torch.Tensor  # 1, then down to 0 where the next tile overlaps
    next_overlaps: torch.Tensor  # whether it does, bool


def tiles_along_axis(length, size, stride, scale, like):
    """Tiles of `size` latents, one every `stride`, over an axis of `length` latents."""
    tiles = []
    for start in range(0, length, stride):
        stop = min(start + size, length)
        next_start = start + stride
        pixel = torch.arange(start * scale, stop * scale, device=like.device).to(like.dtype)
        rise = torch.ones_like(pixel)
        fall = torch.ones_like(pixel)
        if start > 0:
            overlap = min(size - stride, stop - start)
            rise = ((pixel - start * scale) / (overlap * scale)).clamp(max=1)
        if next_start < length:
            overlap = min(size - stride, length - next_start)
            fall = (1 - (pixel - next_start * scale) / (overlap * scale)).clamp(max=1)
        next_overlaps = pixel >= next_start * scale
        tiles.append(AxisTile(slice(start, stop), rise, fall, next_overlaps))
    return tiles


def blending_weight(row, column):
    """The weight of each output pixel of a tile. The weights of all tiles add up to 1.

    Diffusers blends a tile first with the finished tile above it, then with the finished tile to
    its left. Where four tiles A B / C D meet, y and x being the rising ramps:

        B finished  = (1 - x) A + x B
        C finished  = (1 - y) A + y C
        D finished  = (1 - x) (C finished) + x ((1 - y) (B finished) + y D)

    Multiplied out, the lower tiles C and D have the weights y (1 - x) and y x, but the upper tiles
    A and B have (1 - y) (1 - x^2) and (1 - y) x^2: there, x enters squared.
    """
    vertical = (row.rise * row.fall)[:, None]
    once = column.rise * column.fall
    twice = column.rise**2 * (1 - (1 - column.fall) ** 2)
    horizontal = torch.where(row.next_overlaps[:, None], twice, once)
    return vertical * horizontal


# --------------------------------------------------------------------------------------------------
# The text encoder: UMT5 and its tokenizer


def embedding_table(rows, dim):
    """The same as nn.Embedding(rows, dim). That would draw its numbers in a way that, on the meta
    device, has PyTorch import its compiler, which takes seconds."""
    return nn.Embedding.from_pretrained(torch.randn(rows, dim), freeze=False)


class TextLayer(nn.Module):
    """Self-attention with its own relative position bias, then a gated feed-forward network."""

    def __init__(self, config):
        super().__init__()
        dim = config["d_model"]
        inner = config["num_heads"] * config["d_kv"]
        eps = config["layer_norm_epsilon"]
        self.heads = config["num_heads"]
        self.buckets = config["relative_attention_num_buckets"]
        self.max_distance = config["relative_attention_max_distance"]
        self.attention_norm = nn.RMSNorm(dim, eps)
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)
        self.relative_bias = embedding_table(self.buckets, self.heads)
        self.ffn_norm = nn.RMSNorm(dim, eps)
        self.gate = nn.Linear(dim, config["d_ff"], bias=False)
        self.up = nn.Linear(dim, config["d_ff"], bias=False)
        self.down = nn.Linear(config["d_ff"], dim, bias=False)

    def position_bias(self, length, device):
        """(heads, L, L): a learned bias for each bucket of distances. Half of the buckets are for
        keys behind the query. In each half, near distances have a bucket each, and far ones share
        buckets that grow logarithmically, up to `max_distance`."""
        position = torch.arange(length, device=device)
        offset = position - position[:, None]  # key - query
        distance = offset.abs()
        half = self.buckets // 2
        near = half // 2
        longest = math.log(self.max_distance / near)
        distance_log = torch.log(distance.clamp(min=1).float() / near) / longest
        far_bucket = near + (distance_log * (half - near)).long()
        far_bucket = far_bucket.clamp(max=half - 1)
        bucket = torch.where(distance < near, distance, far_bucket)
        bucket = bucket + half * (offset > 0)
        return self.relative_bias(bucket).permute(2, 0, 1)

    def forward(self, x, mask):
        """`x` is (B, L, D), `mask` (B, L), nonzero where there is text."""
        x = x + self.attention(self.attention_norm(x), mask)
        return x + self.feed_forward(self.ffn_norm(x))

    def attention(self, x, mask):
        query = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, L, d_kv)
        key = self.to_k(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        value = self.to_v(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        scores = query @ key.transpose(-1, -2)  # T5 does not divide by sqrt(d_kv)
        scores = scores + self.position_bias(x.shape[1], x.device)
        hidden = mask[:, None, None, :] == 0
        scores = scores.float().masked_fill(hidden, torch.finfo(torch.float32).min)
        attended = scores.softmax(dim=-1).to(x.dtype) @ value  # (B, heads, L, d_kv)
        return self.to_out(attended.transpose(1, 2).flatten(2))

    def feed_forward(self, x):
        gate = F.gelu(self.gate(x), approximate="tanh")
        return self.down(gate * self.up(x))


class TextEncoder(nn.Module):
    """The UMT5 encoder. `config` is the content of its config.json.

    Wan's has 5.7 billion parameters that are needed once per prompt. So `from_pretrained` reads
    none of them: each forward maps the embedding table and streams the layers one by one.
    """

    FIXED = {
        "model_type": "umt5",
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
    }
    LIMITS = {
        "vocab_size": Limit("a whole number", 1, 2**22),
        "d_model": Limit("a whole number", 1, 2**16),
        "d_kv": Limit("a whole number", 1, 2**12),
        "d_ff": Limit("a whole number", 1, 2**18),
        "num_layers": Limit("a whole number", 1, 256),
        "num_heads": Limit("a whole number", 1, 256),
        "relative_attention_num_buckets": Limit("an even number", 4, 4096),
        "relative_attention_max_distance": Limit("a whole number", 4, 2**20),
    }
    RENAMES = {  # ours: the checkpoint's
        "layers.": "encoder.block.",
        "final_norm.": "encoder.final_layer_norm.",
        ".attention_norm.": ".layer.0.layer_norm.",
        ".to_q.": ".layer.0.SelfAttention.q.",
        ".to_k.": ".layer.0.SelfAttention.k.",
        ".to_v.": ".layer.0.SelfAttention.v.",
        ".to_out.": ".layer.0.SelfAttention.o.",
        ".relative_bias.": ".layer.0.SelfAttention.relative_attention_bias.",
        ".ffn_norm.": ".layer.1.layer_norm.",
        ".gate.": ".layer.1.DenseReluDense.wi_0.",
        ".up.": ".layer.1.DenseReluDense.wi_1.",
        ".down.": ".layer.1.DenseReluDense.wo.",
    }
    SAME = {"encoder.embed_tokens.weight": "shared.weight"}  # another name for it, or a copy

    def __init__(self, config):
        super().__init__()
        self.shared = embedding_table(config["vocab_size"], config["d_model"])
        self.layers = nn.ModuleList()
        for _ in range(config["num_layers"]):
            self.layers.append(TextLayer(config))
        self.final_norm = nn.RMSNorm(config["d_model"], config["layer_norm_epsilon"])
        self.sources = None  # where the weights are, if they are streamed
        self.device = None  # and where they go
        self.dtype = None

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32):
        """The encoder of a `text_encoder/` folder, streamed. Names and shapes are checked at once
        (CheckpointError)."""
        encoder = build(cls, folder)
        encoder.sources = find_weights(encoder, folder)
        encoder.device = device
        encoder.dtype = dtype
        return encoder

    @contextmanager
    def loaded(self, name, device=None, dtype=None):
        """A part of the encoder. If weights are streamed, its own are in memory only meanwhile."""
        if self.sources is not None:
            read_weights(self, self.sources, device, dtype, prefix=name + ".")
        part = self.get_submodule(name)
        try:
            yield part
        finally:
            if self.sources is not None:
                part.to("meta")

    def _apply(self, function, recurse=True):
        """PyTorch's way of moving or casting a module. Raises ValueError if weights are streamed:
        there are none to move."""
        if self.sources is not None:
            raise ValueError(
                "a streamed TextEncoder cannot be moved or cast; give device and dtype to "
                "from_pretrained"
            )
        return super()._apply(function, recurse)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids (B, L) and mask (B, L) to embeddings (B, L, d_model). What comes out at masked
        positions has no meaning."""
        # The table is mapped from its file, in its dtype: only the prompt's rows are read.
        with self.loaded("shared", device="cpu") as table:
            x = table(ids.to(table.weight.device))
        for index in range(len(self.layers)):
            with self.loaded(f"layers.{index}", self.device, self.dtype) as layer:
                weight = layer.to_q.weight
                x = layer(x.to(weight), mask.to(weight.device))
        with self.loaded("final_norm", self.device, self.dtype) as norm:
            return norm(x.to(norm.weight))


def clean_prompt(text: str) -> str:
    """The text as Wan's tokenizer expects it: broken Unicode fixed, HTML entities resolved twice,
    single spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def load_tokenizer(folder: Path | str, length: int = 512) -> Tokenizer:
    """The tokenizer of a `tokenizer/` folder, set to cut and pad texts to `length` tokens. Raises
    CheckpointError if there is none."""
    file = Path(folder) / "tokenizer.json"
    read_json(file)
    try:
        tokenizer = Tokenizer.from_str(file.read_text(encoding="utf-8"))
        padding = tokenizer.get_vocab()["<pad>"]
        tokenizer.enable_padding(length=length, pad_id=padding, pad_token="<pad>")
        tokenizer.enable_truncation(length)
        tokenizer.encode("a word")  # some faults show only in use
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library's panics are not of class Exception
        raise CheckpointError(
            f"{file} is not a tokenizer with a token <pad> ({error!s:.200})"
        ) from None
    return tokenizer


def tokenize(tokenizer: Tokenizer, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Token ids and mask, int64 (B, length) each, of a list of prompts."""
    if isinstance(prompts, str):
        raise ValueError(f"prompts should be a list of texts, but are {prompts!r:.99}")
    encodings = tokenizer.encode_batch([clean_prompt(prompt) for prompt in prompts])
    ids = torch.tensor([encoding.ids for encoding in encodings])
    mask = torch.tensor([encoding.attention_mask for encoding in encodings])
    return ids, mask


@torch.no_grad()
def encode_prompt(encoder: TextEncoder, tokenizer: Tokenizer, prompts: list[str]) -> Tensor:
    """Text embeddings (B, length, d_model) of a list of prompts, zero after the end of each text.
    Raises CheckpointError if tokenizer and encoder do not belong together."""
    ids, mask = tokenize(tokenizer, prompts)
    vocabulary = encoder.shared.num_embeddings
    if ids.max() >= vocabulary:
        raise CheckpointError(
            f"the tokenizer knows token {ids.max()}, but the text encoder has {vocabulary}"
        )
    embeddings = encoder(ids, mask)
    return embeddings * mask[..., None].to(embeddings)


# --------------------------------------------------------------------------------------------------
# Loading checkpoints in Diffusers layout


def load_model(cls, folder, device, dtype, adjust=None, **parts):
    """A model with its weights on `device`. Raises CheckpointError unless `folder` has exactly the
    weights of a `cls`. `parts` are the constructor's arguments after the config."""
    model = build(cls, folder, **parts)
    return read_weights(model, find_weights(model, folder), device, dtype, adjust=adjust)


def build(cls, folder, **parts):
    """A `cls` as its config.json describes it, without memory (on the meta device). Raises
    CheckpointError, naming file and field, if it describes a model that is not supported."""
    file = Path(folder) / "config.json"
    config = {}
    for field, value in read_json(file).items():
        if value is not None:  # an absent field is as good as null
            config[field] = value
    if "quantization_config" in config:
        raise CheckpointError(
            f"{file}: the weights are quantized, which is not supported; use those in bfloat16, "
            "float16 or float32"
        )
    if "base_dim" in config:  # in Wan2.1, the VAE's decoder is as wide as its encoder
        config.setdefault("decoder_base_dim", config["base_dim"])
    check_config(file, config, cls)
    with torch.device("meta"):
        model = cls(config, **parts)
    return model.eval().requires_grad_(False)


def check_config(file, config, cls):
    fixed = dict(cls.FIXED)
    if config.get("is_residual"):
        fixed |= cls.FIXED_IF_RESIDUAL
    for field, wanted in fixed.items():
        value = config.get(field) or None  # false and empty are as good as null, too
        choices = wanted if isinstance(wanted, tuple) else (wanted,)
        allowed = [repr(choice) for choice in choices]
        if repr(value) not in allowed:  # 48.0 is not 48
            raise CheckpointError(
                f"{file}: {field} is {value!r:.99}, but must be {' or '.join(allowed)}"
            )
    for field, limit in cls.LIMITS.items():
        check_field(file, config, field, limit)


def check_field(file, config, field, limit):
    value = config.get(field)
    count = config[limit.count] if isinstance(limit.count, str) else limit.count
    if count is None:
        if not is_within(value, limit):
            raise CheckpointError(
                f"{file}: {field} is {value!r:.99}, but must be {limit.kind} "
                f"from {limit.low} to {limit.high}"
            )
        return
    if not isinstance(value, list) or len(value) != count:
        raise CheckpointError(
            f"{file}: {field} is {value!r:.99}, but must be a list of {count} numbers"
        )
    for item in value:
        if not is_within(item, limit):
            raise CheckpointError(
                f"{file}: {field} has {item!r:.99}, but each must be {limit.kind} "
                f"from {limit.low} to {limit.high}"
            )


def is_within(value, limit):
    whole = type(value) is int  # a bool is not
    if limit.kind == "a whole number" and not whole:
        return False
    if limit.kind == "an even number" and not (whole and value % 2 == 0):
        return False
    return (whole or type(value) is float) and limit.low <= value <= limit.high


def checkpoint_name(cls, name):
    """The name that our tensor `name` of a `cls` has in the published checkpoints."""
    for ours, theirs in cls.RENAMES.items():
        name = name.replace(ours, theirs)
    return name


FLOATS = ("F64", "F32", "F16", "BF16")  # in the header of a safetensors file


def kind_of_numbers(dtype):
    """What a dtype that is not among FLOATS means."""
    if dtype.startswith("F8") or dtype.startswith("F4") or dtype.startswith("F6"):
        return "float8 or less, which is not supported"
    return "not floating-point numbers; quantized weights are not supported"


def find_weights(model, folder):
    """Where the weights of `model` are: {our name: (checkpoint name, file)}.

    Raises CheckpointError, naming file and tensor, unless the safetensors files of `folder` have
    exactly its tensors. Only their headers are read.
    """
    source, files = list_tensors(Path(folder))
    headers = {}
    for file in sorted(set(files.values())):
        headers[file] = read_header(file)
    check_shards(source, files, headers)

    in_file = {}  # what a tensor is called in its file, by checkpoint name
    same = getattr(type(model), "SAME", {})
    for name in files:
        usual = same.get(name, name)
        if usual == name or usual not in files:
            in_file[usual] = name
    ours = {}  # by checkpoint name
    shapes = {}
    for name, tensor in model.state_dict().items():
        theirs = checkpoint_name(type(model), name)
        ours[theirs] = name
        shapes[theirs] = tuple(tensor.shape)
    for name in ours:
        if name not in in_file:
            raise CheckpointError(f"{source}: tensor {name} is missing")
    sources = {}
    for name, stored in in_file.items():
        if name not in ours:
            raise CheckpointError(
                f"{source}: tensor {name} is not part of a {type(model).__name__}"
            )
        file = files[stored]
        dtype, shape = headers[file][stored]
        if dtype not in FLOATS:
            raise CheckpointError(
                f"{source}: tensor {stored} in {file.name} is {dtype}, {kind_of_numbers(dtype)}"
            )
        if shape != shapes[name]:
            raise CheckpointError(
                f"{source}: tensor {stored} in {file.name} is {dtype} {shape}, "
                f"but should be floating-point numbers {shapes[name]}"
            )
        sources[ours[name]] = (stored, file)
    return sources


def list_tensors(folder):
    """The index of a sharded checkpoint, or its only file, and {checkpoint name: file}.

    Files of a variant (model.fp16.safetensors, model.safetensors.index.fp16.json) are read if there
    are no others. Hidden files, such as those that macOS puts into archives, are ignored.
    """
    files = []
    for file in visible_files(folder):
        if is_index(file) or file.suffix == ".safetensors":
            files.append(file)
    if any(is_plain(file) for file in files):
        files = [file for file in files if is_plain(file)]
    for file in files:
        if is_index(file):
            return file, read_index(file)
    if len(files) != 1:
        raise CheckpointError(f"{folder}: {what_is_missing(folder, files)}")
    return files[0], dict.fromkeys(read_header(files[0]), files[0])


def visible_files(folder):
    return sorted(file for file in folder.glob("*") if not file.name.startswith("."))


def is_index(file):
    return re.fullmatch(r".*\.safetensors\.index(\.\w+)?\.json", file.name) is not None


def is_plain(file):
    """Whether a file is not of a variant: no other word stands between its name and its endings."""
    name = file.name
    for ending in (".json", ".index", ".safetensors"):
        name = name.removesuffix(ending)
    return "." not in name


def what_is_missing(folder, weights):
    found = [file.name for file in visible_files(folder)]
    needed = (
        f"one .safetensors file is needed, or several and an index, but it has "
        f"{len(weights) or 'none'}: {found!s:.300}"
    )
    pickles = [name for name in found if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]
    if pickles and not weights:
        return f"has its weights as a pickle, {pickles[0]}, which is not read; {needed}"
    if any(name.endswith(".gguf") for name in found) and not weights:
        return f"has GGUF weights, which are quantized and not supported; {needed}"
    return needed


def read_index(index):
    """{checkpoint name: file} of a sharded checkpoint."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise CheckpointError(f"{index}: has no weight_map")
    files = {}
    for tensor, name in weight_map.items():
        is_name = isinstance(name, str) and Path(name).name == name
        if not is_name or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: weight_map must name .safetensors files in its folder, "
                f"but for {tensor:.99} it has {name!r:.300}"
            )
        files[tensor] = index.parent / name
    return files


def check_shards(source, files, headers):
    """The files must hold exactly the tensors that the index says."""
    for name, file in files.items():
        if name not in headers[file]:
            raise CheckpointError(f"{source}: tensor {name} is missing from {file.name}")
    for file, header in headers.items():
        for name in header:
            if files.get(name) != file:
                raise CheckpointError(f"{source}: tensor {name} should not be in {file.name}")


def read_header(file):
    """{checkpoint name: (dtype, shape)} of a safetensors file."""
    header = {}
    with opened(file) as tensors:
        for name in tensors.keys():
            entry = tensors.get_slice(name)
            header[name] = (entry.get_dtype(), tuple(entry.get_shape()))
    return header


def read_weights(model, sources, device, dtype, prefix="", adjust=None):
    """Read the tensors of `model` whose names begin with `prefix`, each straight to its device and
    dtype (None: as in the file). `adjust(name, tensor)` may change a tensor before that, to merge a
    LoRA. Returns the model.

    On the CPU, a tensor that needs no cast is not read but mapped. Raises CheckpointError for a
    tensor with a number that is not finite.
    """
    by_file = {}
    for ours, (name, file) in sources.items():
        if ours.startswith(prefix):
            by_file.setdefault(file, []).append((ours, name))
    state = {}
    for file, names in by_file.items():
        with opened(file) as tensors:
            for ours, name in names:
                tensor = tensors.get_tensor(name)
                if adjust is not None:
                    tensor = adjust(ours, tensor)
                if stays_float32(model, ours):
                    # A copy: a mapped tensor would keep all that was read of its file in memory.
                    tensor = tensor.to(device, torch.float32, copy=True)
                else:
                    tensor = tensor.to(device, dtype)
                if dtype is not None and not is_finite(tensor):
                    raise CheckpointError(
                        f"{file}: tensor {name} holds numbers that are not finite"
                    )
                state[ours] = tensor
    model.load_state_dict(state, strict=False, assign=True)
    return model


def stays_float32(model, name):
    return any(part in name for part in getattr(model, "FLOAT32", ()))


def is_finite(tensor):
    # Without a second tensor as large: isfinite() makes one, and so does aminmax() of a cropped
    # video.
    lowest = tensor.amin()
    highest = tensor.amax()
    return bool(lowest.isfinite() and highest.isfinite())


@contextmanager
def opened(file):
    """The tensors of a safetensors file. Raises CheckpointError if it cannot be read."""
    file = Path(file)
    try:
        with safe_open(file, "pt") as tensors:
            yield tensors
    except PermissionError:
        raise CheckpointError(f"{file}: permission denied") from None
    except (SafetensorError, OSError) as error:
        if not file.exists():
            raise CheckpointError(f"{file} {absence(file)}; fetch it again") from None
        if file.is_file() and is_lfs_pointer(file):
            raise CheckpointError(f"{file} {LFS_HELP}") from None
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({error!s:.200}); fetch it again"
        ) from None


LFS_HELP = "is a pointer of Git LFS, not the file; fetch it with `git lfs pull`"


def is_lfs_pointer(file):
    """Whether Git has cloned only a note in the place of a large file."""
    beginning = b"version https://git-lfs"
    with open(file, "rb") as content:
        return content.read(len(beginning)) == beginning


def absence(file):
    """How a file is not there."""
    if Path(file).is_symlink():
        return "is a link to nothing"
    return "is missing"


LARGEST_JSON = 2**27  # bytes; Wan's largest, the tokenizer, has 2**24


def read_json(file):
    """The object in a JSON file. Raises CheckpointError if there is none."""
    file = Path(file)
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for its writer
            raise CheckpointError(f"{file} is not an ordinary file")
        if status.st_size > LARGEST_JSON:
            raise CheckpointError(f"{file} is too large, {status.st_size / 2**20:.0f} MiB")
        if is_lfs_pointer(file):
            raise CheckpointError(f"{file} {LFS_HELP}")
        content = json.loads(file.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except PermissionError:
        raise CheckpointError(f"{file}: permission denied") from None
    except FileNotFoundError:
        raise CheckpointError(f"{file} {absence(file)}; fetch it again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not JSON ({error!s:.200})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds {content!r:.40}, not an object")
    return content
