"""Faster on a GPU, and the same numbers: blocks compiled, and window attention by flash-attn-4.

The method's loop stays as it is. Both are tried out first: where one does not work, a line says so,
and the run goes on without it.
"""

from functools import partial

import torch

from freeswim import FLEX_OPTIONS, flex_window, grouped_window
from model import Block, WanTransformer, full_attention, rotary_table
from support.checks import say


class CompiledBlock(Block):
    """Norms, modulation, rotation and residuals in few passes over memory. The attention is the
    caller's."""

    self_attention = torch.compile(Block.self_attention, dynamic=False)
    cross_attention = torch.compile(Block.cross_attention, dynamic=False)
    feed_piece = torch.compile(
        Block.feed_piece, dynamic=False
    )  # not all pieces at once: they would all be held


class CompiledTransformer(WanTransformer):
    block = CompiledBlock


def transformer_for(device):
    """The fastest class of transformer that works on a device: on a GPU the compiled one."""
    if device.type == "cpu":
        return WanTransformer  # where compiling takes longer than a small model's whole run
    try:
        with device, torch.no_grad():
            tokens, modulation = torch.zeros(1, 4, 16), torch.zeros(1, 6, 16)
            CompiledBlock(16, 1, 16, 1e-6).self_attention(
                tokens, modulation, rotary_table((1, 2, 2), 16, device), full_attention
            )
        return CompiledTransformer
    except Exception as error:  # whatever a compiler may lack
        say(f"blocks are not compiled, and slower: {type(error).__name__}: {str(error)[:200]!r}")
        return WanTransformer


def window_for(device, dtype, head_dim):
    """What prepares the fastest window attention that works on a device; None leaves it to
    `freeswim.refine`."""
    if device.type == "cpu" or dtype != torch.bfloat16:
        return None
    try:
        import flash_attn.cute  # noqa: F401  (of the package flash-attn-4)

        prepare = partial(flex_window, options=FLEX_OPTIONS["flash-attn-4"])
        grid, window = (3, 8, 16), (5, 7)
        parts = torch.randn(3, 1, 2, 384, head_dim, device=device, dtype=dtype)
        expected = grouped_window(grid, window)(*parts)
        error = (prepare(grid, window, device=device)(*parts) - expected).norm() / expected.norm()
        if not error <= 2e-2:
            raise ValueError(f"its result is {error:.1e} off")
        return prepare
    except Exception as error:  # without the package, or whatever it does not know
        say(
            f"window attention by Triton, not by flash-attn-4: {type(error).__name__}: {str(error)[:200]!r}"
        )
        return None
