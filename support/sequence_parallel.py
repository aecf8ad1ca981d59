"""Several GPUs, one process each, started by torchrun. Not needed on a single GPU.

Every process (rank) runs the solver, but the blocks only on its shard of the tokens. Self-attention
alone needs all tokens: an all-to-all before it exchanges tokens for heads, and another one after it
exchanges back (DeepSpeed-Ulysses, arXiv 2309.14509). So the attention, whichever it is, sees all
tokens of the rank's own heads. Shards may be unequal.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from model import WanTransformer, build, find_weights, read_weights

# --------------------------------------------------------------------------------------------------
# Shards


def shard_sizes(length):
    """How many of `length` items each rank has; they differ by one at most."""
    return [len(part) for part in torch.arange(length).tensor_split(dist.get_world_size())]


def shard(x, dim):
    """This rank's shard of a dimension of `x`."""
    return x.tensor_split(dist.get_world_size(), dim)[dist.get_rank()]


def gather(x, length):
    """All of `x`, (B, shard, D), in every rank: (B, length, D)."""
    sizes = shard_sizes(length)
    missing = sizes[0] - x.shape[1]
    padded = F.pad(x, (0, 0, 0, missing)).contiguous()  # all-gather wants equal shards
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    cut = [part[:, :size] for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(cut, dim=1)


# The compiler's own collectives would copy what is received once more.
@torch.compiler.disable
def all_to_all(x, given, taken, length):
    """Deal out dimension `given` of `x` to the ranks, and get all shards of dimension `taken`,
    which is `length` long in all.

    What is sent has `taken` as its first dimension, so each rank's shard arrives in its place in
    one buffer, and nothing is put together afterwards. The result is a view of that buffer.
    """
    me = dist.get_rank()
    parts = []  # one for each rank
    for part in x.tensor_split(dist.get_world_size(), given):
        parts.append(part.movedim(taken, 0))
    received = x.new_empty(length, *parts[me].shape[1:])
    places = received.split(shard_sizes(length))

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
# The transformer


class SequenceParallel:
    """How the ranks share the tokens of a transformer with so many heads. More ranks than heads
    work, but gain little."""

    def __init__(self, heads):
        self.heads = heads
        self.num_tokens = 0  # of all ranks

    def shard_tokens(self, tokens):
        """This rank's tokens, of all (B, N, D)."""
        self.num_tokens = tokens.shape[1]
        return shard(tokens, 1)

    def gather_tokens(self, tokens):
        return gather(tokens, self.num_tokens)

    def attention(self, attend):
        """`attend` for this rank's tokens of all heads."""

        def attend_my_heads(query, key, value, **options):
            query = all_to_all(query, 1, 2, self.num_tokens)  # (B, my heads, N, head_dim)
            key = all_to_all(key, 1, 2, self.num_tokens)
            value = all_to_all(value, 1, 2, self.num_tokens)
            attended = query  # with more ranks than heads, some ranks have none
            if query.shape[1] > 0:
                attended = attend(query, key, value, **options)
            return all_to_all(attended, 2, 1, self.heads)

        return torch.compiler.disable(attend_my_heads, recursive=False)

    def window_attention(self, window_attention):
        """The same for a function that prepares a window attention, like
        freeswim.grouped_window."""

        def prepare(*arguments, **options):
            return self.attention(window_attention(*arguments, **options))

        return prepare


class SequenceParallelTransformer(WanTransformer):
    """A transformer whose tokens the ranks share. Its attention has to be one of `sequence`."""

    def __init__(self, config, sequence, **parts):
        super().__init__(config, **parts)
        self.sequence = sequence

    def embed(self, latents, timestep, text):
        tokens, time_emb, modulation, context, rotary, grid = super().embed(latents, timestep, text)
        cos, sin = rotary
        rotary = (shard(cos, 0), shard(sin, 0))
        tokens = self.sequence.shard_tokens(tokens)
        return tokens, time_emb, modulation, context, rotary, grid

    def final_layer(self, tokens, time_emb):
        return self.sequence.gather_tokens(super().final_layer(tokens, time_emb))


def load_sharded(folder, device, dtype, adjust=None, **parts):
    """A SequenceParallelTransformer whose blocks' weights are spread over the ranks too (FSDP2).
    They are read one block at a time. `parts` are the constructor's."""
    from torch.distributed.fsdp import fully_shard  # takes a second to import

    transformer = build(SequenceParallelTransformer, folder, prefetch=unshard_in_turn, **parts)
    sources = find_weights(transformer, folder)
    ranks = (dist.get_world_size(),)
    mesh = dist.device_mesh.init_device_mesh(torch.device(device).type, ranks)
    for index, block in enumerate(transformer.blocks):
        prefix = f"blocks.{index}."
        read_weights(transformer, sources, device, dtype, prefix, adjust)
        fully_shard(block, mesh=mesh)
    rest = {}
    for name, source in sources.items():
        if not name.startswith("blocks."):
            rest[name] = source
    return read_weights(transformer, rest, device, dtype, adjust=adjust)


def unshard_in_turn(blocks):
    """Yield the blocks, each with all its weights here. Meanwhile those of the next one arrive, at
    the end those of the first, for the next pass."""
    for index, block in enumerate(blocks):
        block.unshard()
        following = blocks[(index + 1) % len(blocks)]
        following.unshard(async_op=True)
        yield block
        if following is not block:
            block.reshard()


# --------------------------------------------------------------------------------------------------
# The VAE


class SharedTiles:
    """How the ranks share the tiles of a VAE. Every rank gets the whole result."""

    def own(self, tiles):
        return tiles[dist.get_rank() :: dist.get_world_size()]

    def add_up(self, canvas):
        """Each rank has added its own tiles to a canvas of zeros."""
        dist.all_reduce(canvas)
