"""Faster on a GPU, with the same results: compiled blocks, tuned attention, a faster VAE.

This module is imported on a GPU only, because importing PyTorch's compiler takes seconds. What
works on the machine is tried at the start of a run, on small inputs. The method's loop does not
change.
"""

import copy
import math
from functools import partial

import torch
import torch.nn.functional as F

from freeswim import (
    HEADS_AT_A_TIME,
    compile_for_each_shape,
    dense_window,
    flex_options,
    flex_window,
    grouped_window,
    inward_mask,
    window_start,
)
from model import (
    Block,
    CausalConv3d,
    NormSiLU,
    WanTransformer,
    WanVAE,
    full_attention,
    rotary_table,
)
from support.parallel import SharedBlock, SharedTransformer, SharedVAE, say

# --------------------------------------------------------------------------------------------------
# Compiled blocks


class CompiledBlock(Block):
    """A block whose norms, modulation, rotation and residuals take few passes over memory. The
    attention stays the caller's."""

    self_attention = torch.compile(Block.self_attention, dynamic=False)
    cross_attention = torch.compile(Block.cross_attention, dynamic=False)
    # Chunk by chunk: all chunks in one graph would all be held in memory.
    feed_forward_chunk = torch.compile(Block.feed_forward_chunk, dynamic=False)


class CompiledTransformer(WanTransformer):
    block = CompiledBlock


class CompiledSharedBlock(SharedBlock, CompiledBlock):
    """Compiled, but for the exchanges between processes."""


class CompiledSharedTransformer(SharedTransformer):
    block = CompiledSharedBlock


@torch.compiler.disable
def flash_full_attention(query, key, value, scale=None):
    """model.full_attention through flash-attn-4, which is a fifth faster than cuDNN on Hopper GPUs.
    A few heads at a time, as in freeswim.flex_window."""
    from flash_attn.cute import flash_attn_func

    attended = torch.empty_like(query)
    for first in range(0, query.shape[1], HEADS_AT_A_TIME):
        heads = slice(first, first + HEADS_AT_A_TIME)
        result, _ = flash_attn_func(
            query[:, heads].transpose(1, 2).contiguous(),  # (B, N, heads, head_dim)
            key[:, heads].transpose(1, 2).contiguous(),
            value[:, heads].transpose(1, 2).contiguous(),
            softmax_scale=scale,
        )
        attended[:, heads] = result.transpose(1, 2)
    return attended


class FlashTransformer(CompiledTransformer):
    full_attention = staticmethod(flash_full_attention)


class FlashSharedTransformer(CompiledSharedTransformer):
    full_attention = staticmethod(flash_full_attention)


COMPILED = {
    WanTransformer: CompiledTransformer,
    SharedTransformer: CompiledSharedTransformer,
}
WITH_FLASH = {
    WanTransformer: FlashTransformer,
    SharedTransformer: FlashSharedTransformer,
}


def transformer_for(device, dtype, head_dim, transformer_class=WanTransformer):
    """The fastest class that works here in the place of a transformer's class, for this dtype and
    head size: with compiled blocks and flash-attn-4, with compiled blocks, or the class itself.
    Lines say why not a faster one."""
    try:
        with device, torch.no_grad():
            block = CompiledBlock(dim=16, heads=1, ffn_dim=16, eps=1e-6).to(dtype)
            tokens = torch.zeros(1, 4, 16, dtype=dtype)
            modulation = torch.zeros(1, 6, 16)
            rotary = rotary_table((1, 2, 2), 16, device)
            block.self_attention(tokens, modulation, rotary, full_attention)
    except Exception as error:  # a compiler can fail in many ways
        say(f"transformer blocks run uncompiled, and slower: {summary(error)}")
        return transformer_class
    try:
        try_full_attention(device, dtype, head_dim)
    except Exception as error:
        say(f"full attention by PyTorch; not flash-attn-4: {summary(error)}")
        return COMPILED[transformer_class]
    say("full attention by flash-attn-4")
    return WITH_FLASH[transformer_class]


def try_full_attention(device, dtype, head_dim):
    """Raise an error unless flash-attn-4 agrees with PyTorch's full attention."""
    query, key, value = trial_inputs(device, dtype, head_dim)
    expected = full_attention(query.float(), key.float(), value.float(), scale=0.1)
    compare(flash_full_attention(query, key, value, scale=0.1), expected, dtype)


# --------------------------------------------------------------------------------------------------
# The VAE: channels last in memory, as cuDNN wants them, and in float16 if asked for
#
# float16 has as many bits of precision as TF32, in which convolutions run otherwise, but a smaller
# range. Norms are computed in float32, and tiles are blended in float32.


def norm_silu(x, gamma, eps):
    """NormSiLU of positions (M, C), to be compiled into one pass over memory."""
    wide = x.float()
    mean_square = wide.square().mean(dim=1, keepdim=True)
    normed = wide * torch.rsqrt(mean_square + eps) * gamma.flatten()
    return F.silu(normed).to(x.dtype)


# Once for each number of channels. The number of positions is left open.
compiled_norm_silu = torch._dynamo.config.patch(recompile_limit=2**16)(
    torch.compile(norm_silu, dynamic=True)
)


class FastNormSiLU(NormSiLU):
    def forward(self, x):
        rows = x.permute(0, 2, 3, 4, 1)  # (B, F, H, W, C), as they are in memory
        positions = rows.reshape(-1, rows.shape[-1]).contiguous()
        # Of a view, the compiler would also note the shape of what it is a view of.
        result = compiled_norm_silu(positions.data, self.gamma, self.EPS)
        return result.view(rows.shape).permute(0, 4, 1, 2, 3)


class FastCausalConv3d(CausalConv3d):
    def forward(self, x, history):
        return torch.nn.Conv3d.forward(self, self.with_past(x, history))

    def with_past(self, x, history):
        return super().with_past(x.contiguous(memory_format=torch.channels_last_3d), history)

    def past_of(self, x, history):
        """Channels last too: otherwise `x` would be copied together with it each time."""
        past = super().past_of(x, history)
        return past.contiguous(memory_format=torch.channels_last_3d)


def use_fast_layers(module):
    """Put fast layers in the place of a module's layers. Their parameters are still to be read."""
    for name, layer in module.named_children():
        if type(layer) is NormSiLU:
            setattr(module, name, FastNormSiLU(len(layer.gamma)))
        elif type(layer) is CausalConv3d:
            channels = (layer.in_channels, layer.out_channels)
            setattr(module, name, FastCausalConv3d(*channels, layer.kernel_size))
        else:
            use_fast_layers(layer)


class FastVAE(WanVAE):
    def __init__(self, config):
        super().__init__(config)
        use_fast_layers(self)
        self.in_float16 = None  # a copy, if that is asked for

    @classmethod
    def from_pretrained(cls, folder, device="cuda", dtype=torch.float32, half=False):
        """As the WanVAE's. With `half`, it computes in float16."""
        vae = super().from_pretrained(folder, device, dtype)
        vae.use_channels_last()
        if half:
            vae.in_float16 = copy.deepcopy(vae).to(torch.float16)
        return vae

    def use_channels_last(self):
        for parameter in self.parameters():
            if parameter.ndim == 5:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last_3d)
            elif parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    def encode_tiles(self, pixels):
        if self.in_float16 is None:
            return super().encode_tiles(pixels)
        means = list(self.in_float16.encode_tiles(pixels))
        if are_finite(means):
            return means
        return super().encode_tiles(pixels)  # float16 overflowed

    def decode_tiles(self, latents):
        if self.in_float16 is None:
            return super().decode_tiles(latents)
        pixels = list(self.in_float16.decode_tiles(latents.half()))
        if are_finite(pixels):
            return pixels
        return super().decode_tiles(latents)


class FastSharedVAE(FastVAE, SharedVAE):
    """The same, whose tiles the ranks share."""


FAST_VAES = {WanVAE: FastVAE, SharedVAE: FastSharedVAE}


def are_finite(chunks):
    return all(bool(chunk.isfinite().all()) for chunk in chunks)


def load_vae(vae_class, folder, device, half, tiles_at_once):
    """The fast VAE in the place of a `vae_class`, if the compiler works here; else the class's own,
    in float32. More tiles at once are faster, and take more memory."""
    try:
        norm = FastNormSiLU(4).to(device).requires_grad_(False)
        norm(torch.zeros(1, 4, 1, 2, 2, device=device))
    except Exception as error:  # a compiler can fail in many ways
        say(f"the VAE runs uncompiled, and slower: {summary(error)}")
        return vae_class.from_pretrained(folder, device)
    vae = FAST_VAES[vae_class].from_pretrained(folder, device, half=half)
    vae.TILES_AT_ONCE = tiles_at_once
    return vae


# --------------------------------------------------------------------------------------------------
# The window attention, tuned: a tenth faster than `freeswim.flex_window` by Triton, a quarter by
# flash-attn-4
#
# A position is one number, row * ROW + column, so that a kernel compares both at once. The offset
# of a key from the first position of a query's window is then one subtraction. If the key lies
# before the window, the subtraction borrows: in its column, from bit 13, and in its row, from bit
# 30.

ROW = 2**14
BORROWS = 2**30 + 2**13
FAR_AWAY = 2**29  # the position of padding: behind every window
FLASH_OPTIONS = {"BACKEND": "FLASH"}  # FlexAttention through the package flash-attn-4
PADDED_TO = 128  # tokens; whole blocks are a tenth faster


def tuned_window(grid, window, scale=None, border="inward", device="cuda", options=None):
    """The same as `freeswim.flex_window`, faster. `options` are FlexAttention's; the default suits
    the device."""
    from torch.nn.attention.flex_attention import flex_attention

    if options is None:
        options = flex_options(device)
    num_tokens = grid[0] * grid[1] * grid[2]
    padding = -num_tokens % PADDED_TO
    mask = tuned_mask(grid, window, border, num_tokens + padding, device, options)
    compiled_attention = compile_for_each_shape(flex_attention)

    def attend(query, key, value):
        attended = torch.empty_like(query)
        for first in range(0, query.shape[1], HEADS_AT_A_TIME):
            heads = slice(first, first + HEADS_AT_A_TIME)
            result = compiled_attention(
                F.pad(query[:, heads], (0, 0, 0, padding)),
                F.pad(key[:, heads], (0, 0, 0, padding)),
                F.pad(value[:, heads], (0, 0, 0, padding)),
                block_mask=mask,
                scale=scale,
                kernel_options=options,
            )
            attended[:, heads] = result[:, :, :num_tokens]
        return attended

    # The kernel is compiled by itself, not as a part of a compiled transformer block.
    return torch.compiler.disable(attend, recursive=False)


def tuned_mask(grid, window, border, padded_tokens, device, options):
    """FlexAttention's mask: which blocks of tokens see each other, and for those that do so partly,
    a function that compares tokens."""
    from torch.nn.attention.flex_attention import BlockMask

    frames, height, width = grid
    rows, columns = window
    if border == "inward":
        rows = min(rows, height)
        columns = min(columns, width)
    last_offset = (rows - 1) * ROW + columns - 1

    def position_of(token):
        row = token // frames // width
        column = token // frames % width
        return torch.where(row < height, row * ROW + column, FAR_AWAY)

    def start_of(token):
        row = token // frames // width
        column = token // frames % width
        top = window_start(row, height, window[0], border)
        left = window_start(column, width, window[1], border)
        return top * ROW + left

    if "BACKEND" in options:  # FLASH cannot divide, so these are looked up
        position_of = looked_up(position_of, padded_tokens, device)
        start_of = looked_up(start_of, padded_tokens, device)

    def visible(batch, head, query_index, key_index):
        offset = position_of(key_index) - start_of(query_index)
        return (offset | (last_offset - offset)) & BORROWS == 0

    block_size = options.get("BLOCK_M", 128)
    partly, fully = block_lists(grid, window, border, padded_tokens, block_size, device)
    return BlockMask.from_kv_blocks(*partly, *fully, block_size, visible)


def looked_up(function, num_tokens, device):
    """`function` of a token as a table."""
    table = function(torch.arange(num_tokens, device=device)).int()

    def look_up(token):
        return table[token]

    return look_up


def block_lists(grid, window, border, padded_tokens, block_size, device):
    """For each block of queries, the blocks of keys that it sees partly, and those that it sees
    fully, for which FlexAttention skips the mask. Each is (count, list), as `BlockMask` wants them.

    Found from the positions that a block covers, H*W in all, rather than from N x N tokens.
    """
    frames, height, width = grid
    num_tokens = frames * height * width
    # A block's positions are those of every `frames`-th token and of its last one.
    first_token = torch.arange(0, padded_tokens, block_size)[:, None]
    within_block = torch.tensor([*range(0, block_size, frames), block_size - 1])
    tokens = (first_token + within_block).clamp(max=num_tokens - 1)
    positions = tokens.to(device) // frames  # (blocks, positions of a block)

    mask = inward_mask(height, width, window, border).to(device)
    seen = reduce_to_blocks(mask, positions, torch.any)
    fully = reduce_to_blocks(mask, positions, torch.all)
    fully[:, num_tokens // block_size :] = False  # padding is never seen
    return as_list(seen & ~fully), as_list(fully)


def reduce_to_blocks(mask, positions, reduce):
    """From a mask of positions, (H*W, H*W), to one of blocks: torch.any or torch.all of them."""
    queries = reduce(mask[positions], dim=1)  # (blocks, H*W)
    keys_first = reduce(queries.T[positions], dim=1)  # (blocks of keys, blocks of queries)
    return keys_first.T.contiguous()  # the kernel reads it row by row


def as_list(blocks):
    """A mask of blocks, (blocks, blocks), as FlexAttention's lists: how many blocks each row has,
    and their indices first."""
    count = blocks.sum(dim=1)
    indices = blocks.int().argsort(dim=1, descending=True, stable=True)
    return count[None, None].int(), indices[None, None].int()


# --------------------------------------------------------------------------------------------------
# Which window attention works here


def flash_window(grid, window, scale=None, border="inward", device="cuda"):
    """`tuned_window` through flash-attn-4. Raises ImportError without that package."""
    import flash_attn.cute  # noqa: F401

    return tuned_window(grid, window, scale, border, device, FLASH_OPTIONS)


WINDOWS = {  # from the fastest to the one that always works
    "flash-attn-4": flash_window,
    "Triton": tuned_window,
    "FlexAttention with default options": partial(flex_window, options={}),
    "groups of queries, without a compiler": grouped_window,
}


def window_for(device, dtype, head_dim):
    """The fastest window attention that works on a GPU, for this dtype and head size. A line says
    which it is, and why not a faster one."""
    reasons = []
    for name, window_attention in WINDOWS.items():
        try:
            try_window(window_attention, device, dtype, head_dim)
        except Exception as error:  # a compiler can fail in many ways
            reasons.append(f"not {name}: {summary(error)}")
            continue
        say("; ".join([f"window attention by {name}", *reasons]))
        return window_attention
    raise RuntimeError("; ".join(["no window attention works here", *reasons]))


def try_window(window_attention, device, dtype, head_dim):
    """Raise an error unless a window attention agrees with the dense mask on a small grid."""
    window = (5, 7)
    inputs = trial_inputs(device, dtype, head_dim)
    expected = dense_window(TRIAL_GRID, window, device=device)(*inputs)
    compare(window_attention(TRIAL_GRID, window, device=device)(*inputs), expected, dtype)


TRIAL_GRID = (3, 8, 16)  # frames, rows and columns of tokens


def trial_inputs(device, dtype, head_dim):
    """Query, key and value for TRIAL_GRID."""
    draw = torch.Generator(device).manual_seed(0)
    shape = (3, 1, 2, math.prod(TRIAL_GRID), head_dim)
    return torch.randn(shape, generator=draw, device=device).to(dtype)


def compare(attended, expected, dtype):
    """Raise ValueError if a result is off by more than a dtype's rounding."""
    expected = expected.float()
    error = ((attended.float() - expected).norm() / expected.norm()).item()
    limit = 1e-4 if dtype == torch.float32 else 2e-2
    if not error <= limit:
        raise ValueError(f"its result is off by {error:.1e}")


def summary(error):
    """An error in a few words, on one line."""
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:160]}"
