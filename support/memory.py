"""More than a GPU holds: kept features and weights in CPU memory, copied beside the computation.

Copies run in a stream of their own, from memory that is pinned, so that they need not wait for the
computation, nor it for them. On a CPU, streams do nothing, and the same code copies at once.
"""

import copy
import os

import torch

from support.parallel import say


def pin(tensor):
    return tensor.pin_memory() if torch.cuda.is_available() else tensor


class Copies:
    """Copies in a stream beside the computation's: `start` has them begin once all that is queued
    there is done, `wait` has what is queued there from now on wait for them."""

    def __init__(self, device):
        self.streams = torch.get_device_module(device)
        self.stream = (
            self.streams.Stream(device) if device.type == "cuda" else self.streams.Stream()
        )

    def start(self, targets, sources):
        self.stream.wait_stream(self.streams.current_stream())
        with self.streams.stream(self.stream):
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)

    def wait(self):
        self.streams.current_stream().wait_stream(self.stream)


class CacheOnCPU:
    """The cross-attention cache of `freeswim.refine`, {block: (B, N, D)}: those of a block leave while
    it goes on, and come back while the block before it runs."""

    def __init__(self, device):
        self.device, self.kept = torch.device(device), {}
        self.copies = Copies(self.device)
        self.moving = None  # what is on its way, and has to live until then: index and tensor

    def __len__(self):
        return len(self.kept)

    def __setitem__(self, index, features):
        # those of the block before have left: only now may their memory be used again
        self.copies.wait()
        if index not in self.kept or self.kept[index].shape != features.shape:
            self.kept[index] = pin(torch.empty_like(features, device="cpu"))
        self.copies.start([self.kept[index]], [features])
        self.moving = None, features

    def __getitem__(self, index):
        if self.moving is None or self.moving[0] != index:
            self.fetch(index)
        self.copies.wait()
        features = self.moving[1]
        if index + 1 in self.kept:
            self.fetch(index + 1)
        return features

    def fetch(self, index):
        features = torch.empty_like(self.kept[index], device=self.device)
        self.copies.start([features], [self.kept[index]])
        self.moving = index, features


class StreamedBlocks:
    """A transformer's blocks with their weights in CPU memory. Two are on the GPU: that which runs,
    and the next."""

    def __init__(self, blocks, device):
        self.blocks, self.slots = blocks, [copy.deepcopy(blocks[0]).to(device) for _ in range(2)]
        for parameter in blocks.parameters():
            parameter.data = pin(parameter.data)
        self.copies = Copies(device)

    def __len__(self):
        return len(self.blocks)

    def __iter__(self):
        self.send(0)
        for index in range(len(self)):
            self.copies.wait()
            if index + 1 < len(self):
                self.send(
                    index + 1
                )  # into the slot of the block before, all of whose work is queued
            yield self.slots[index % 2]

    def send(self, index):
        self.copies.start(self.slots[index % 2].parameters(), self.blocks[index].parameters())


def stream_blocks(transformer, device):
    """Leave the weights of a transformer's blocks in CPU memory, where it was loaded, and have them
    streamed."""
    blocks = transformer.blocks
    del transformer.blocks
    transformer.to(device).blocks = StreamedBlocks(blocks, device)
    return transformer


def plan_memory(args, transformer, dtype, device):
    """Settle where features are kept, `args.features`, "gpu" or "cpu", and whether the blocks'
    weights are streamed, `args.offload`, if the user has not, by what is free on the GPU. Says so
    in a line."""
    if device.type == "cpu":
        args.features, args.offload = "gpu", False  # that is: left where the computation is
        return
    free, _ = torch.cuda.mem_get_info(device)
    (height, width), ranks = args.computed, int(os.environ.get("WORLD_SIZE", 1))
    channels = (
        (args.frames // 4 + 1)
        * (height // 16)
        * (width // 16)
        * transformer.heads
        * transformer.head_dim
    )
    tokens = channels * dtype.itemsize / ranks  # bytes
    weights = sum(parameter.numel() for parameter in transformer.parameters()) * dtype.itemsize
    kept = tokens * len(transformer.blocks) if args.cache_interval else 0
    working = (
        9 * tokens + 2**31 + 2**30
    )  # as measured; feed-forward pieces, the VAE, what lies idle between tensors
    needed = weights + working + kept
    args.features = args.features or ("gpu" if needed <= free else "cpu")
    if args.offload is None:
        args.offload = ranks == 1 and needed - kept * (args.features == "cpu") > free
    say(
        f"features on the {args.features.upper()}, weights on the {'CPU' if args.offload else 'GPU'}: all on the GPU "
        f"would take about {needed / 2**30:.0f} GiB of {free / 2**30:.0f}"
    )
