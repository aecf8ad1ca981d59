"""Several GPUs, one process each, started by torchrun. Not needed on a single GPU.

Every process (rank) runs the solver, but the blocks only on its share of the tokens. Self-attention
alone needs all tokens: an all-to-all before it trades tokens for heads, and another one after it
trades back (DeepSpeed-Ulysses, arXiv 2309.14509). So the attention, whichever it is, sees all
tokens of the rank's own heads. Shares may be unequal.
"""

import atexit
import sys
from collections import deque
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from model import Block, WanTransformer, WanVAE, build, find_weights, read_weights
from support.command_line import is_launched, local_rank, rank

# --------------------------------------------------------------------------------------------------
# Processes


def start():
    """Join the other processes, if torchrun has started several. They wait for one another as long
    as it takes."""
    if not is_launched():
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "cpu:gloo"
    dist.init_process_group(backend, timeout=timedelta(days=30))
    # Otherwise its threads may abort a process that ends before the others.
    atexit.register(dist.destroy_process_group)


def is_first():
    """Whether this is the process that reads, writes and prints; it is, if there is only one."""
    return rank() == 0


def say(line):
    """Print a line to stderr, above a progress bar if there is one, in the first process only."""
    if is_first():
        tqdm.write(line, file=sys.stderr)


def device_of(name):
    """The device of this process. Of several on a host, each has its own GPU."""
    device = torch.device(name)
    if device.type == "cuda" and dist.is_initialized():
        device = torch.device("cuda", local_rank())
    if device.index is not None:
        torch.cuda.set_device(device)  # some libraries start their kernels on the current one
    return device


def from_first(compute):
    """What `compute()` gives in the first process, in every process. If it fails there, all end,
    and the first one raises the error."""
    if not dist.is_initialized():
        return compute()
    result = None
    error = None
    if is_first():
        try:
            result = compute()
        except Exception as caught:
            error = caught
    outcome = [result, error]
    dist.broadcast_object_list(outcome, device="cpu")
    result, error = outcome
    if error is None:
        return result
    if is_first():
        raise error
    raise SystemExit(2)


def once_per_host(compute):
    """What `compute()` gives, in every process, but first in one of each host: the others then find
    its work done."""
    if not dist.is_initialized():
        return compute()
    if local_rank() == 0:
        result = compute()
    dist.all_reduce(torch.zeros(1))  # on the CPU: a barrier
    if local_rank() != 0:
        result = compute()
    return result


# --------------------------------------------------------------------------------------------------
# Exchanges


def shares(length):
    """How many of `length` items each rank has; they differ by one at most."""
    return [len(part) for part in torch.arange(length).tensor_split(dist.get_world_size())]


def own_part(x, dim):
    """This rank's share of a dimension of `x`."""
    return x.tensor_split(dist.get_world_size(), dim)[dist.get_rank()]


def gather(x, length):
    """The whole of `x`, (B, share, D), in every rank: (B, length, D)."""
    missing = shares(length)[0] - x.shape[1]
    padded = F.pad(x, (0, 0, 0, missing)).contiguous()  # all-gather wants equal shares
    parts = [torch.empty_like(padded) for _ in shares(length)]
    dist.all_gather(parts, padded)
    cut = [part[:, :share] for part, share in zip(parts, shares(length), strict=True)]
    return torch.cat(cut, dim=1)


def trade(x, given, taken, length):
    """An all-to-all: deal out dimension `given` of `x` to the ranks, and get all shares of
    dimension `taken`, which is `length` long in all.

    What is sent has `taken` as its first dimension, so each rank's share arrives in its place in
    one buffer, and nothing is put together afterwards. The result is a view of that buffer.
    """
    me = dist.get_rank()
    parts = []  # one for each rank
    for part in x.tensor_split(dist.get_world_size(), given):
        parts.append(part.movedim(taken, 0))
    received = x.new_empty(length, *parts[me].shape[1:])
    places = received.split(shares(length))

    transfers = []
    for peer in range(dist.get_world_size()):
        if peer == me:
            continue
        if parts[peer].numel() > 0:
            transfers.append(dist.P2POp(dist.isend, parts[peer].contiguous(), peer))
        if places[peer].numel() > 0:
            transfers.append(dist.P2POp(dist.irecv, places[peer], peer))
    started = dist.batch_isend_irecv(transfers) if transfers else []
    places[me].copy_(parts[me])
    for transfer in started:
        transfer.wait()
    return received.movedim(0, taken)


# --------------------------------------------------------------------------------------------------
# The transformer and the VAE


class Exchange:
    """What the blocks of a transformer share: how to attend to all tokens of this rank's heads."""

    def __init__(self, heads):
        self.heads = heads
        self.length = 0  # tokens of all ranks
        self.wrappers = {}
        # The compiler's own collectives would copy what is received once more.
        self.trade = torch.compiler.disable(trade)

    def on_my_heads(self, attend):
        """`attend` for this rank's tokens of all heads. One object for each attention, because
        compiled code is kept for an object."""
        if attend not in self.wrappers:

            def traded(query, key, value):
                query = self.trade(query, 1, 2, self.length)  # (B, my heads, N, head_dim)
                key = self.trade(key, 1, 2, self.length)
                value = self.trade(value, 1, 2, self.length)
                attended = query  # with more ranks than heads, some ranks have none
                if query.shape[1] > 0:
                    attended = attend(query, key, value)
                return self.trade(attended, 2, 1, self.heads)

            self.wrappers[attend] = torch.compiler.disable(traded, recursive=False)
        return self.wrappers[attend]


class SharedBlock(Block):
    """A block that works on this rank's tokens. `exchange` is that of all blocks, and `ring`, if
    weights are spread over the ranks too, has the blocks in order: first the one whose weights are
    all here, then the next."""

    exchange = None
    ring = None

    def self_attention(self, tokens, modulation, rotary, attend):
        if self.ring:
            self.fetch_weights()
        attend = self.exchange.on_my_heads(attend)
        return super().self_attention(tokens, modulation, rotary, attend)

    def fetch_weights(self):
        """Wait for this block's weights, and send for those of the next one."""
        while self.ring[0] is not self:
            self.ring[0].reshard()
            self.ring.rotate(-1)
        self.unshard()
        following = self.ring[1 % len(self.ring)]
        following.unshard(async_op=True)


class SharedTransformer(WanTransformer):
    """A transformer whose work the ranks share. More ranks than heads work, but gain little."""

    block = SharedBlock

    def __init__(self, config):
        super().__init__(config)
        self.exchange = Exchange(self.heads)
        self.ring = deque()
        for block in self.blocks:
            block.exchange = self.exchange
            block.ring = self.ring

    @classmethod
    def from_pretrained(cls, folder, device="cpu", dtype=torch.float32, adjust=None, shard=False):
        """With `shard`, the blocks' weights are spread over the ranks too (FSDP2). They are read
        one block at a time."""
        if not shard:
            return super().from_pretrained(folder, device, dtype, adjust)
        from torch.distributed.fsdp import fully_shard  # takes a second to import

        transformer = build(cls, folder)
        sources = find_weights(transformer, folder)
        ranks = (dist.get_world_size(),)
        mesh = dist.device_mesh.init_device_mesh(torch.device(device).type, ranks)
        for index, block in enumerate(transformer.blocks):
            prefix = f"blocks.{index}."
            read_weights(transformer, sources, device, dtype, prefix, adjust)
            fully_shard(block, mesh=mesh)
        transformer.ring.extend(transformer.blocks)
        rest = {}
        for name, source in sources.items():
            if not name.startswith("blocks."):
                rest[name] = source
        return read_weights(transformer, rest, device, dtype, adjust=adjust)

    def embed(self, latents, timestep, text):
        tokens, time_emb, modulation, context, rotary = super().embed(latents, timestep, text)
        self.exchange.length = tokens.shape[1]
        cos, sin = rotary
        rotary = (own_part(cos, 0), own_part(sin, 0))
        return own_part(tokens, 1), time_emb, modulation, context, rotary

    def to_patches(self, tokens, time_emb):
        return gather(super().to_patches(tokens, time_emb), self.exchange.length)


class SharedVAE(WanVAE):
    """A VAE whose tiles the ranks share. Every rank gets the whole result."""

    def tiles(self, height, width, scale, tiled, like):
        tiles = super().tiles(height, width, scale, tiled, like)
        return tiles[dist.get_rank() :: dist.get_world_size()]

    def sum_of_tiles(self, canvas):
        dist.all_reduce(canvas)
        return canvas
