"""Window and full attention on a GPU, and which of them works here.

Imported on a GPU only, because importing PyTorch's compiler takes seconds. Each attention is tried
at the start of a run, on small inputs, and used only if it agrees with a slow reference.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F

from freeswim import (
    compile_for_each_shape,
    dense_window,
    few_heads_at_a_time,
    flex_options,
    flex_window,
    grouped_window,
    window_mask,
    window_start,
)
from model import full_attention
from support.processes import say

# --------------------------------------------------------------------------------------------------
# Full attention


@torch.compiler.disable
def flash_attention(query, key, value, scale=None):
    """model.full_attention through flash-attn-4, which is a fifth faster than cuDNN on Hopper
    GPUs."""
    from flash_attn.cute import flash_attn_func

    attended, _ = flash_attn_func(
        query.transpose(1, 2).contiguous(),  # (B, N, heads, head_dim)
        key.transpose(1, 2).contiguous(),
        value.transpose(1, 2).contiguous(),
        softmax_scale=scale,
    )
    return attended.transpose(1, 2)


flash_full_attention = few_heads_at_a_time(flash_attention)


def choose_full_attention(device, dtype, head_dim):
    """The fastest full attention that works on a GPU, for this dtype and head size. A line says
    which, and why not a faster one."""
    query, key, value = trial_inputs(device, dtype, head_dim)
    expected = full_attention(query.float(), key.float(), value.float(), scale=0.1)
    try:
        compare(flash_full_attention(query, key, value, scale=0.1), expected, dtype)
    except Exception as error:  # a package can be missing, or fail, in many ways
        say(f"full attention by PyTorch; not flash-attn-4: {summary(error)}")
        return full_attention
    say("full attention by flash-attn-4")
    return flash_full_attention


# --------------------------------------------------------------------------------------------------
# Window attention, tuned: a tenth faster than `freeswim.flex_window` by Triton, a quarter by
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
        attended = compiled_attention(
            F.pad(query, (0, 0, 0, padding)),
            F.pad(key, (0, 0, 0, padding)),
            F.pad(value, (0, 0, 0, padding)),
            block_mask=mask,
            scale=scale,
            kernel_options=options,
        )
        return attended[:, :, :num_tokens]

    return few_heads_at_a_time(attend)


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
        position_of = as_table(position_of, padded_tokens, device)
        start_of = as_table(start_of, padded_tokens, device)

    def visible(batch, head, query_index, key_index):
        offset = position_of(key_index) - start_of(query_index)
        return (offset | (last_offset - offset)) & BORROWS == 0

    block_size = options.get("BLOCK_M", 128)
    partly, fully = block_lists(grid, window, border, padded_tokens, block_size, device)
    return BlockMask.from_kv_blocks(*partly, *fully, block_size, visible)


def as_table(function, num_tokens, device):
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

    mask = window_mask(height, width, window, border).to(device)
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


def choose_window(device, dtype, head_dim):
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
