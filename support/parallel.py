"""Several GPUs, one process each, started by torchrun; whoever has one GPU need not read this.

Every process (rank) runs the solver, but its blocks only on its share of the tokens. Self-attention
alone needs all of them: before it, an all-to-all trades tokens for heads, and after it another one
trades back (DeepSpeed-Ulysses, arXiv 2309.14509), so that the attention, whichever it is, sees all
tokens of its heads. Shares need not be equal.
"""

import atexit
import math
import os
import sys
from collections import deque
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
import torch.nn.functional as F

from model import Block, WanTransformer, WanVAE, build, find_weights, read_weights


def shares(length):
    """How many of `length` items each rank has; they differ by one at most."""
    return [len(part) for part in torch.arange(length).tensor_split(dist.get_world_size())]


def gather(x, length):
    """The whole of `x`, (B, share, D), in every rank: (B, length, D)."""
    padded = F.pad(
        x, (0, 0, 0, shares(length)[0] - x.shape[1])
    ).contiguous()  # all-gather wants equal shares
    parts = [torch.empty_like(padded) for _ in shares(length)]
    dist.all_gather(parts, padded)
    return torch.cat(
        [part[:, :share] for part, share in zip(parts, shares(length), strict=True)], dim=1
    )


def trade(x, given, taken, length):
    """Deal out dimension `given` of `x` to the ranks, and get all shares of dimension `taken`,
    `length` long."""
    parts = x.tensor_split(dist.get_world_size(), given)
    shape = list(parts[dist.get_rank()].shape)
    shapes = [shape[:taken] + [share] + shape[taken + 1 :] for share in shares(length)]
    sizes, sent = (
        [math.prod(shape) for shape in shapes],
        torch.cat([part.flatten() for part in parts]),
    )
    dist.all_to_all_single(
        received := x.new_empty(sum(sizes)), sent, sizes, [part.numel() for part in parts]
    )
    return torch.cat(
        [part.view(shape) for part, shape in zip(received.split(sizes), shapes, strict=True)], taken
    )


class SharedBlock(Block):
    """A block that works on this rank's tokens. All know `shared`: `length`, the tokens of all
    ranks, and `ring`, if weights are spread too: the block that has all of its own, the next one,
    and so on."""

    def self_attention(self, tokens, modulation, rotary, attend):
        ring = self.shared.ring
        while ring and ring[0] is not self:
            ring[0].reshard()
            ring.rotate(-1)
        if (
            ring
        ):  # the weights are on their way since the last block began; now send for the next one's
            self.unshard()
            ring[1 % len(ring)].unshard(async_op=True)

        def on_my_heads(query, key, value):
            query, key, value = (trade(x, 1, 2, self.shared.length) for x in (query, key, value))
            attended = (
                attend(query, key, value) if query.shape[1] > 0 else query
            )  # (B, my heads, N, head_dim)
            return trade(attended, 2, 1, self.self_attn.heads)

        return super().self_attention(tokens, modulation, rotary, on_my_heads)


class SharedTransformer(WanTransformer):
    """A transformer whose work the ranks share. More ranks than heads work, but gain little."""

    block = SharedBlock

    def __init__(self, config):
        super().__init__(config)
        self.shared = SimpleNamespace(length=0, ring=deque())
        for block in self.blocks:
            block.shared = self.shared

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32, shard=False):
        """With `shard`, the blocks' weights are spread over the ranks too (FSDP2), read one block
        at a time."""
        if not shard:
            return super().from_pretrained(folder, device, dtype)
        from torch.distributed.fsdp import (
            fully_shard,
        )  # takes a second, which only those who use it should wait

        transformer = build(cls, folder)
        sources = find_weights(transformer, folder)
        mesh = dist.device_mesh.init_device_mesh(
            torch.device(device).type, (dist.get_world_size(),)
        )
        for index, block in enumerate(transformer.blocks):
            read_weights(transformer, sources, device, dtype, f"blocks.{index}.")
            fully_shard(block, mesh=mesh)
        transformer.shared.ring.extend(transformer.blocks)
        rest = {name: source for name, source in sources.items() if not name.startswith("blocks.")}
        return read_weights(transformer, rest, device, dtype)

    def embed(self, latents, timestep, text):
        tokens, *rest, rotary = super().embed(latents, timestep, text)
        self.shared.length = tokens.shape[1]
        ranks, own = dist.get_world_size(), dist.get_rank()
        return (
            tokens.tensor_split(ranks, 1)[own],
            *rest,
            [table.tensor_split(ranks)[own] for table in rotary],
        )

    def unembed(self, tokens, time, grid):
        return super().unembed(gather(tokens, math.prod(grid)), time, grid)


class SharedVAE(WanVAE):
    """A VAE whose tiles the ranks share; every rank gets the whole result."""

    def tiles(self, *frame):
        return super().tiles(*frame)[dist.get_rank() :: dist.get_world_size()]

    def sum_of_tiles(self, canvas):
        return dist.all_reduce(canvas) or canvas


def say(line):
    """Print a line to stderr, once: if there are several processes, in the first."""
    if rank() == 0:
        print(line, file=sys.stderr)


def rank():
    return int(os.environ.get("RANK", 0))


def start():
    """Join the others, if torchrun has started several. They wait for one another as long as it
    takes."""
    if "RANK" in os.environ:
        dist.init_process_group(
            "cpu:gloo" + ",cuda:nccl" * torch.cuda.is_available(), timeout=timedelta(days=30)
        )
        atexit.register(
            dist.destroy_process_group
        )  # or its threads may abort a process that ends before the others


def device_of(name):
    """The device of this process. Of several on a host, each has its own GPU."""
    if name != "cpu" and dist.is_initialized():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device(name.split(":")[0] if dist.is_initialized() else name)


def from_first(compute):
    """What `compute` gives in the first process, in every process. If it fails there, all end, and
    the first tells."""
    if not dist.is_initialized():
        return compute()
    try:
        outcome = [compute() if rank() == 0 else None, None]  # result, error
    except Exception as error:
        outcome = [None, error]
    dist.broadcast_object_list(outcome, device="cpu")
    if outcome[1] is not None:
        raise outcome[1] if rank() == 0 else SystemExit(2)
    return outcome[0]


def once_per_host(compute):
    """What `compute` gives, in every process, but first in one of each host: the others then find
    its work done."""
    result = compute() if os.environ.get("LOCAL_RANK", "0") == "0" else None
    if dist.is_initialized():
        dist.all_reduce(torch.zeros(1))  # on the CPU: a barrier
    return result or compute()
